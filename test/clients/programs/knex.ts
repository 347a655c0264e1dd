import { knexTx } from 'klieo-bus/adapters/knex'
import knex, { type Knex } from 'knex'
import type { Client, OpenTransaction } from './client.ts'

/** @param config what apps set that changes what comes and goes */
export async function connect(connectionString: string, config: Knex.Config = {}): Promise<Client> {
  const db = knex({ client: 'pg', connection: connectionString, pool: { min: 0, max: 2 }, ...config })
  const opened = (trx: Knex.Transaction): OpenTransaction & { trx: typeof trx } => ({
    trx,
    tx: knexTx(trx),
    insert: (id) => trx('rows').insert({ id }),
  })
  return {
    transaction: (work) => db.transaction((trx) => work(opened(trx))),
    nested: (open, work) => (open as ReturnType<typeof opened>).trx.transaction((inner) => work(opened(inner))),
    // @ts-expect-error the instance itself
    mistaken: { instance: () => knexTx(db), nothing: () => knexTx(undefined as never) },
    knowsOver: true,
  }
}

/** A hook that takes the rows out of every answer, as apps write it for `raw`. */
export function connectHooked(connectionString: string): Promise<Client> {
  return connect(connectionString, { postProcessResponse: (result) => result?.rows ?? result, compileSqlOnError: false })
}
