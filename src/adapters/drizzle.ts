import { type AdaptedTx, driverError, hasMethods, notATransaction, rowsOf } from './adapted.ts'
import { checkOpen } from './postgres-js.ts'

/** Drizzle's transaction on any of its PostgreSQL drivers; the database itself has no `rollback`. */
export interface DrizzleTransaction {
  execute(query: never): PromiseLike<unknown>
  rollback(): never
}

/** What `execute` takes besides `sql`: anything that can be turned into a text with parameters, as ours is already. */
interface Statement {
  getSQL(): { toQuery(): { sql: string; params: unknown[] } }
}

/**
 * The transaction that `db.transaction` hands its callback.
 * @throws invalid_argument for the database itself
 */
export function drizzleTx(tx: DrizzleTransaction): AdaptedTx {
  if (!hasMethods(tx, ['execute', 'rollback'])) throw notATransaction(tx, 'what db.transaction hands its callback, not the database itself')
  const execute = tx.execute.bind(tx) as (statement: Statement) => PromiseLike<unknown>
  const send = (sql: string, params: unknown[]) => execute({ getSQL: () => ({ toQuery: () => ({ sql, params }) }) })
  const client = clientOf(tx)
  return {
    async query(text, values) {
      try {
        if (client) await checkOpen(client, (query) => send(query, []) as PromiseLike<Record<string, unknown>[]>)
        return rowsOf(await send(text, values))
      } catch (error) {
        throw driverError(error, 'cause')
      }
    },
  }
}

/** That of postgres.js, which needs to be watched; Drizzle keeps it where its types do not say. */
function clientOf(tx: object): object | undefined {
  const { session } = tx as { readonly session?: { readonly client?: object } }
  return hasMethods(session?.client, ['unsafe', 'savepoint']) ? session?.client : undefined
}
