import { type AdaptedTx, hasMethods, notATransaction, over, rowsOf } from './adapted.ts'

/** Knex's transaction; the instance itself has no `isCompleted`. */
export interface KnexTransaction {
  raw(sql: string, bindings: never): PromiseLike<unknown>
  isCompleted(): boolean
}

/**
 * The transaction that `knex.transaction` resolves to or hands its callback.
 * @throws invalid_argument for the instance itself
 */
export function knexTx(trx: KnexTransaction): AdaptedTx {
  if (!hasMethods(trx, ['raw', 'isCompleted'])) throw notATransaction(trx, 'a transaction of Knex, not the instance itself')
  const raw = trx.raw.bind(trx) as (sql: string, bindings: readonly unknown[]) => PromiseLike<unknown>
  return {
    async query(text, values) {
      if (trx.isCompleted()) throw over()
      const { sql, bindings } = positional(text, values)
      try {
        return rowsOf(await raw(sql, bindings))
      } catch (error) {
        throw withoutStatement(error)
      }
    },
  }
}

/** Quoted text, as SQL has it; a numbered parameter; or a question mark, which means a parameter to Knex. */
const TOKENS = /'(?:[^']|'')*'|"(?:[^"]|"")*"|\$(\d+)|\?/g

/** Knex numbers parameters itself, in the order of its question marks, and a literal one is escaped by a backslash. */
export function positional(text: string, values: readonly unknown[]): { readonly sql: string; readonly bindings: unknown[] } {
  const bindings: unknown[] = []
  const sql = text.replace(TOKENS, (token, number: string | undefined) => {
    if (number === undefined) return token.replaceAll('?', '\\?')
    bindings.push(values[Number(number) - 1])
    return '?'
  })
  return { sql, bindings }
}

/** Knex puts the whole statement before what the server said. */
function withoutStatement(error: unknown): unknown {
  if (!(error instanceof Error)) return error
  const at = error.message.lastIndexOf(' - ')
  if (at >= 0) error.message = error.message.slice(at + 3)
  return error
}
