/** Every way in which a call of the package can fail. docs/errors.md says what each means and what to do. */
export type BusErrorCode =
  | 'not_found'
  | 'conflict'
  | 'cas_conflict'
  | 'lease_held'
  | 'lease_lost'
  | 'already_settled'
  | 'timeout'
  | 'handler_failed'
  | 'invalid_argument'
  | 'payload_too_large'
  | 'schema_outdated'
  | 'unsupported'
  | 'closed'
  | 'connection'
  | 'unavailable'
  | 'permission_denied'
  | 'internal'

/** Data that goes with some codes. */
export interface BusErrorDetails {
  /** The driver's or handler's error. */
  readonly cause?: unknown
  /** Overrides what the code implies: the same call may succeed later and repeating it is safe. */
  readonly retryable?: boolean
  /** `cas_conflict`: the revision the caller expected; `null` for "absent". */
  readonly expected?: number | null
  /** `cas_conflict`: the revision now; `null` while the key is absent. */
  readonly actual?: number | null
}

const RETRYABLE: ReadonlySet<BusErrorCode> = new Set(['lease_held', 'unavailable'])

/**
 * The one error class of the package. Decide by `code`, never by the text.
 *
 * `retryable` is true where the same call may succeed later *and* repeating it is safe. A `connection` error of a
 * write is therefore not retryable: the write may have happened.
 */
export class BusError extends Error {
  override readonly name = 'BusError'
  readonly code: BusErrorCode
  readonly retryable: boolean
  declare readonly expected?: number | null
  declare readonly actual?: number | null

  constructor(code: BusErrorCode, message: string, details: BusErrorDetails = {}) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause })
    this.code = code
    this.retryable = details.retryable ?? RETRYABLE.has(code)
    if (details.expected !== undefined) this.expected = details.expected
    if (details.actual !== undefined) this.actual = details.actual
  }
}

export function isBusError(error: unknown, code?: BusErrorCode): error is BusError {
  return error instanceof BusError && (code === undefined || error.code === code)
}

/** A `cas` that lost: says what was expected and what is there. */
export function casConflict(key: string, expected: number | null, actual: number | null): BusError {
  const wanted = expected === null ? 'to be absent' : `to be at revision ${expected}`
  const found = actual === null ? 'it is absent' : `it is at revision ${actual}`
  return new BusError('cas_conflict', `key "${key}" was expected ${wanted}, but ${found}; read it again and decide anew`, {
    expected,
    actual,
  })
}

export function leaseLost(what: string): BusError {
  return new BusError(
    'lease_lost',
    `${what} no longer belongs to this holder: its time ran out and it was given on, or it ended; nothing was changed`,
  )
}

export function alreadySettled(what: string): BusError {
  return new BusError('already_settled', `${what} was settled before; the first settlement stands`)
}

export function closedError(what: string): BusError {
  return new BusError('closed', `${what} is closed`)
}
