import { defineEntity, type EntityManager, MikroORM, p } from '@mikro-orm/postgresql'
import { mikroOrmTx } from 'klieo-bus/adapters/mikro-orm'
import type { Client, OpenTransaction } from './client.ts'

const Row = defineEntity({ name: 'Row', tableName: 'rows', properties: { id: p.integer().primary() } })

export async function connect(connectionString: string): Promise<Client> {
  const orm = await MikroORM.init({ clientUrl: connectionString, entities: [Row], pool: { min: 0, max: 2 } })
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
