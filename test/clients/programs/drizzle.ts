import { drizzle as drizzleOnPg } from 'drizzle-orm/node-postgres'
import { integer, type PgDatabase, type PgQueryResultHKT, pgTable } from 'drizzle-orm/pg-core'
import { drizzle as drizzleOnPostgresJs } from 'drizzle-orm/postgres-js'
import { drizzleTx } from 'klieo-bus/adapters/drizzle'
import pg from 'pg'
import postgres from 'postgres'
import type { Client, OpenTransaction } from './client.ts'

const rows = pgTable('rows', { id: integer().primaryKey() })

export async function connectOnPg(connectionString: string): Promise<Client> {
  const pool = new pg.Pool({ connectionString, max: 2 })
  // pg ends the process otherwise, when a connection breaks.
  pool.on('error', () => {})
  pool.on('connect', (client) => client.on('error', () => {}))
  return client(drizzleOnPg(pool), false)
}

export async function connectOnPostgresJs(connectionString: string): Promise<Client> {
  const sql = postgres(connectionString, { max: 1, debug: () => {}, onnotice: () => {} })
  return client(drizzleOnPostgresJs(sql), true)
}

type Schema = Record<string, never>
type Transaction<H extends PgQueryResultHKT> = Parameters<Parameters<PgDatabase<H, Schema>['transaction']>[0]>[0]

function client<H extends PgQueryResultHKT>(db: PgDatabase<H, Schema>, knowsOver: boolean): Client {
  const opened = (tx: Transaction<H>): OpenTransaction & { drizzle: Transaction<H> } => ({
    drizzle: tx,
    tx: drizzleTx(tx),
    insert: (id) => tx.insert(rows).values({ id }),
  })
  return {
    transaction: (work) => db.transaction((tx) => work(opened(tx))),
    nested: (open, work) => (open as ReturnType<typeof opened>).drizzle.transaction((inner) => work(opened(inner))),
    // @ts-expect-error the database itself
    mistaken: { database: () => drizzleTx(db), nothing: () => drizzleTx(undefined as never) },
    knowsOver,
  }
}
