import { type AdaptedTx, fromPostgresJs, hasMethods, inLowerCase, notATransaction, over } from './adapted.ts'

interface Unsafe {
  unsafe(query: string, parameters: never): PromiseLike<unknown>
}

/** What `sql.begin` hands its callback, or a connection that `sql.reserve` has set aside and that has begun. */
export type PostgresJsTransaction = (Unsafe & { savepoint(work: never): unknown }) | (Unsafe & { release(): void })

type Send = (query: string, parameters: unknown[]) => PromiseLike<Record<string, unknown>[]>

/**
 * The transaction that `sql.begin` or `savepoint` hands its callback, or a reserved connection.
 * @throws invalid_argument for the instance itself, which sends each statement on any connection
 */
export function postgresJsTx(tx: PostgresJsTransaction): AdaptedTx {
  if (!hasMethods(tx, ['unsafe', 'savepoint']) && !hasMethods(tx, ['unsafe', 'release'])) {
    throw notATransaction(tx, 'what sql.begin hands its callback, or a reserved connection, not sql itself')
  }
  const send = tx.unsafe.bind(tx) as Send
  return {
    async query(text, values) {
      try {
        await checkOpen(tx, (query) => send(query, []))
        return { rows: inLowerCase(await send(text, values)) }
      } catch (error) {
        throw fromPostgresJs(error)
      }
    },
  }
}

/** Which transaction each was when it was first seen. */
const seen = new WeakMap<object, string>()

/** Nothing outside of a transaction block, where a statement is its own transaction. */
const WHICH = `select case when now() <> statement_timestamp() then pg_backend_pid() || ' ' || extract(epoch from now()) end as transaction`

/**
 * postgres.js 3.4 connects anew under a transaction whose connection was lost, and sends what is left of it there: by itself, or in the
 * middle of somebody else's transaction. A message would be there without its row. So each call asks first where it is. A first one cannot tell
 * somebody else's.
 * @param tx a reserved connection may have one transaction after the other
 * @throws invalid_argument
 */
export async function checkOpen(tx: object, send: (query: string) => PromiseLike<Record<string, unknown>[]>): Promise<void> {
  const transaction = inLowerCase(await send(WHICH))[0]?.transaction
  if (typeof transaction !== 'string') throw over()
  if (hasMethods(tx, ['release'])) return
  if ((seen.get(tx) ?? transaction) !== transaction) throw over()
  seen.set(tx, transaction)
}
