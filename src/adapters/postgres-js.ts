import { type AdaptedTx, fromPostgresJs, hasMethods, notATransaction } from './adapted.ts'

interface Unsafe {
  unsafe(query: string, parameters: never): PromiseLike<unknown>
}

/** What `sql.begin` hands its callback, or a connection that `sql.reserve` has set aside and that has begun. */
export type PostgresJsTransaction = (Unsafe & { savepoint(work: never): unknown }) | (Unsafe & { release(): void })

/**
 * The transaction that `sql.begin` or `savepoint` hands its callback, or a reserved connection.
 * @throws invalid_argument for the instance itself, which sends each statement on any connection
 */
export function postgresJsTx(tx: PostgresJsTransaction): AdaptedTx {
  if (!hasMethods(tx, ['unsafe', 'savepoint']) && !hasMethods(tx, ['unsafe', 'release'])) {
    throw notATransaction(tx, 'what sql.begin hands its callback, or a reserved connection, not sql itself')
  }
  const unsafe = tx.unsafe.bind(tx) as (query: string, parameters: unknown[]) => PromiseLike<Record<string, unknown>[]>
  return {
    async query(text, values) {
      try {
        return { rows: inLowerCase(await unsafe(text, values)) }
      } catch (error) {
        throw fromPostgresJs(error)
      }
    },
  }
}

/** An instance may be set to give every column a name in PascalCase. */
function inLowerCase(rows: Record<string, unknown>[]): Record<string, unknown>[] {
  const lower = (name: string) => name.toLowerCase()
  if (Object.keys(rows[0] ?? {}).every((name) => name === lower(name))) return rows
  return rows.map((row) => Object.fromEntries(Object.entries(row).map(([name, value]) => [lower(name), value])))
}
