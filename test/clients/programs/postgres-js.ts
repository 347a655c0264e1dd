import { postgresJsTx } from 'klieo-bus/adapters/postgres-js'
import postgres from 'postgres'
import type { Client, OpenTransaction } from './client.ts'

type Options = postgres.Options<Record<string, never>>

/** @param options what apps set that changes what comes and goes */
export async function connect(connectionString: string, options: Options = {}): Promise<Client> {
  const sql = postgres(connectionString, { max: 2, onnotice: () => {}, ...options })
  const opened = (tx: postgres.TransactionSql): OpenTransaction & { sql: typeof tx } => ({
    sql: tx,
    tx: postgresJsTx(tx),
    insert: (id) => tx`insert into rows values (${id})`,
  })
  return {
    transaction: (work) => sql.begin((tx) => work(opened(tx))),
    nested: (open, work) => (open as ReturnType<typeof opened>).sql.savepoint((inner) => work(opened(inner))),
    // @ts-expect-error the instance itself
    mistaken: { instance: () => postgresJsTx(sql), nothing: () => postgresJsTx(undefined as never) },
    knowsOver: true,
  }
}

/** Columns in PascalCase, undefined for null, errors with their statements, and one connection. */
export function connectTransforming(connectionString: string): Promise<Client> {
  return connect(connectionString, { max: 1, debug: () => {}, transform: { ...postgres.pascal, undefined: null } })
}

/** A connection set aside, which begins and ends by hand. */
export async function connectReserved(connectionString: string): Promise<Client> {
  const sql = postgres(connectionString, { max: 2, onnotice: () => {} })
  return {
    async transaction(work) {
      const reserved = await sql.reserve()
      try {
        await reserved`begin`
        await work({ tx: postgresJsTx(reserved), insert: (id) => reserved`insert into rows values (${id})` })
        await reserved`commit`
      } catch (error) {
        await reserved`rollback`.catch(() => {})
        throw error
      } finally {
        reserved.release()
      }
    },
    mistaken: {},
    knowsOver: true,
  }
}
