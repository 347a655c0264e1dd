import { defineEntity, type EntityManager, MikroORM, p } from '@mikro-orm/postgresql'
import { mikroOrmTx } from 'klieo-bus/adapters/mikro-orm'
import type { Client, OpenTransaction } from './client.ts'

const Row = defineEntity({ name: 'Row', tableName: 'rows', properties: { id: p.integer().primary() } })

function open(clientUrl: string): Promise<MikroORM> {
  return MikroORM.init({ clientUrl, entities: [Row], pool: { min: 0, max: 2 } })
}

export async function connect(connectionString: string): Promise<Client> {
  const orm = await open(connectionString)
  const opened = (em: EntityManager): OpenTransaction & { em: EntityManager } => ({
    em,
    tx: mikroOrmTx(em),
    insert: (id) => em.persist(em.create(Row, { id })).flush(),
  })
  return {
    transaction: (work) => orm.em.fork().transactional((em) => work(opened(em as EntityManager))),
    nested: (open, work) => (open as ReturnType<typeof opened>).em.transactional((inner) => work(opened(inner as EntityManager))),
    mistaken: { 'entity manager': () => mikroOrmTx(orm.em.fork()), nothing: () => mikroOrmTx(undefined as never) },
    knowsOver: true,
  }
}

/** By hand, and the row written by the commit. */
export async function connectByHand(connectionString: string): Promise<Client> {
  const orm = await open(connectionString)
  return {
    async transaction(work) {
      const em = orm.em.fork()
      await em.begin()
      try {
        await work({ tx: mikroOrmTx(em), insert: async (id) => em.persist(em.create(Row, { id })) })
        await em.commit()
      } catch (error) {
        await em.rollback().catch(() => {})
        throw error
      }
    },
    mistaken: {},
    knowsOver: true,
  }
}
