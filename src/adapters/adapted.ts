/**
 * What the adapters have in common: the shape that `tx` takes, and errors as the bus reads them. A client's own error often
 * repeats the statement and its parameters, which are payloads; the driver's error inside of it has the SQLSTATE and does not.
 */

import { BusError, kindOf, reading } from '../core/index.ts'

/** What every call of the bus takes as `tx`. */
export interface AdaptedTx {
  query(text: string, values: unknown[]): Promise<{ rows: unknown[] }>
}

export function notATransaction(value: unknown, what: string): BusError {
  return new BusError('invalid_argument', `tx (${kindOf(value)}) must be ${what}`)
}

export function over(): BusError {
  return new BusError('invalid_argument', 'tx must be a transaction that is still open')
}

/**
 * @param reason what the client threw
 * @param field where the client keeps the driver's error
 */
export function driverError(reason: unknown, field: 'cause' | 'driverError'): unknown {
  const inner = typeof reason === 'object' && reason !== null ? (reason as Record<string, unknown>)[field] : undefined
  return fromPostgresJs(inner instanceof Error ? inner : reason)
}

/** Of postgres.js, for a connection that is no more. */
const LOST = new Set(['CONNECTION_CLOSED', 'CONNECTION_ENDED', 'CONNECTION_DESTROYED'])

/** postgres.js has names of its own for the constraint that was violated, and for a lost connection. */
export function fromPostgresJs(error: unknown): unknown {
  if (typeof error !== 'object' || error === null) return error
  const kept = withoutStatement(error)
  const { code, message, constraint_name: constraint } = kept as Record<string, unknown>
  if (LOST.has(String(code))) return Object.assign(new Error(String(message), { cause: kept }), { code: 'ECONNRESET' })
  if (constraint !== undefined && !('constraint' in kept)) Object.defineProperty(kept, 'constraint', { value: constraint })
  return kept
}

const OF_THE_STATEMENT = new Set(['query', 'parameters', 'args', 'types', 'internal_query'])

/** postgres.js adds the statement and its parameters to an error, for all to see where it is set to `debug`, and lets nobody take them away. */
function withoutStatement(error: object): object {
  if (!(error instanceof Error && 'parameters' in error)) return error
  const kept = Object.entries(error).filter(([name]) => !OF_THE_STATEMENT.has(name))
  return Object.assign(new Error(error.message), Object.fromEntries(kept), { stack: error.stack })
}

/** The rows of a result of whatever shape: pg's, or the array that postgres.js and some hooks answer. */
export function rowsOf(result: unknown): { rows: unknown[] } {
  // What it is instead the bus says, where it looks at the answer.
  return (Array.isArray(result) ? { rows: result } : result) as { rows: unknown[] }
}

/** Whether all of these are methods of what may be anything at all. @throws invalid_argument for what cannot be read */
export function hasMethods(value: unknown, names: readonly string[]): boolean {
  if ((typeof value !== 'object' && typeof value !== 'function') || value === null) return false
  return reading('tx', value, () => names.every((name) => typeof (value as Record<string, unknown>)[name] === 'function'))
}

/** An instance of postgres.js may be set to give every column a name in PascalCase. */
export function inLowerCase(rows: Record<string, unknown>[]): Record<string, unknown>[] {
  const lower = (name: string) => name.toLowerCase()
  if (Object.keys(rows[0] ?? {}).every((name) => name === lower(name))) return rows
  return rows.map((row) => Object.fromEntries(Object.entries(row).map(([name, value]) => [lower(name), value])))
}
