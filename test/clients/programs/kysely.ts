import { Kysely, PostgresDialect, type Transaction } from 'kysely'
import pg from 'pg'
import type { Client, OpenTransaction } from './client.ts'

interface Tables {
  rows: { id: number }
}

export async function connect(connectionString: string): Promise<Client> {
  const pool = new pg.Pool({ connectionString, max: 2 })
  // pg ends the process otherwise, when a connection breaks.
  pool.on('error', () => {})
  pool.on('connect', (client) => client.on('error', () => {}))
  const db = new Kysely<Tables>({ dialect: new PostgresDialect({ pool }) })
  const opened = (tx: Transaction<Tables>): OpenTransaction => ({
    tx,
    insert: (id) => tx.insertInto('rows').values({ id }).execute(),
  })
  return {
    transaction: (work) => db.transaction().execute((tx) => work(opened(tx))),
    mistaken: { database: () => db as never },
    knowsOver: true,
  }
}
