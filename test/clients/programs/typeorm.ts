import { typeormTx } from 'klieo-bus/adapters/typeorm'
import { DataSource, type EntityManager, EntitySchema } from 'typeorm'
import type { Client, OpenTransaction } from './client.ts'

const Row = new EntitySchema<{ id: number }>({ name: 'Row', tableName: 'rows', columns: { id: { type: 'int', primary: true } } })

async function open(url: string): Promise<DataSource> {
  return new DataSource({ type: 'postgres', url, entities: [Row], poolSize: 2, poolErrorHandler: () => {} }).initialize()
}

export async function connect(connectionString: string): Promise<Client> {
  const dataSource = await open(connectionString)
  const opened = (manager: EntityManager): OpenTransaction & { manager: EntityManager } => ({
    manager,
    tx: typeormTx(manager),
    insert: (id) => manager.insert(Row, { id }),
  })
  return {
    transaction: (work) => dataSource.transaction((manager) => work(opened(manager))),
    nested: (open, work) => (open as ReturnType<typeof opened>).manager.transaction((inner) => work(opened(inner))),
    mistaken: {
      // @ts-expect-error the data source itself
      dataSource: () => typeormTx(dataSource),
      manager: () => typeormTx(dataSource.manager),
      'query runner': () => typeormTx(dataSource.createQueryRunner()),
      nothing: () => typeormTx(undefined as never),
    },
    knowsOver: true,
  }
}

/** By hand, on a query runner. */
export async function connectOnQueryRunner(connectionString: string): Promise<Client> {
  const dataSource = await open(connectionString)
  return {
    async transaction(work) {
      const runner = dataSource.createQueryRunner()
      try {
        await runner.startTransaction()
        await work({ tx: typeormTx(runner), insert: (id) => runner.manager.insert(Row, { id }) })
        await runner.commitTransaction()
      } catch (error) {
        await runner.rollbackTransaction().catch(() => {})
        throw error
      } finally {
        await runner.release()
      }
    },
    mistaken: {},
    knowsOver: true,
  }
}
