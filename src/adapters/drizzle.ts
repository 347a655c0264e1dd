import { type AdaptedTx, driverError, hasMethods, notATransaction, rowsOf } from './adapted.ts'

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
  return {
    async query(text, values) {
      try {
        return rowsOf(await execute({ getSQL: () => ({ toQuery: () => ({ sql: text, params: values }) }) }))
      } catch (error) {
        throw driverError(error, 'cause')
      }
    },
  }
}
