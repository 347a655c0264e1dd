/** The one place where what Postgres and its driver throw becomes a BusError. */

import { BusError, type BusErrorCode } from '../core/index.ts'
import { grantStatement, ownersGrants, type RoleKind } from './schema-name.ts'

interface DriverError {
  readonly code?: unknown
  readonly message?: unknown
  readonly constraint?: unknown
  /** In which function of the server it happened; none: in the statement itself. */
  readonly where?: unknown
}

interface Verdict {
  readonly code: BusErrorCode
  readonly hint: string
  readonly retryable?: boolean
}

export const LACKS_A_RIGHT = '42501'

/** What the repair of a restored database is called in messages. */
export const REPAIR = 'repair the restored log'

const BY_STATE: Readonly<Record<string, Verdict>> = {
  '40001': { code: 'conflict', hint: 'the transaction met a concurrent one; repeat it', retryable: true },
  '40P01': { code: 'conflict', hint: 'the transaction was chosen to end a deadlock; repeat it', retryable: true },
  '25P02': { code: 'conflict', hint: 'the transaction has failed before; roll it back' },
  '55P03': { code: 'timeout', hint: 'a lock was not granted in time; try again', retryable: true },
  '57014': { code: 'timeout', hint: 'the server cancelled the statement; raise statement_timeout or find what it waited for' },
  '25006': {
    code: 'connection',
    hint: 'the server or the transaction is read-only; connect to the primary, or begin the transaction as read write',
  },
  '57P03': { code: 'connection', hint: 'the server is starting up or shutting down', retryable: true },
  '25P03': { code: 'connection', hint: 'the server ended an idle transaction' },
  '25P04': { code: 'connection', hint: 'the server ended a long transaction' },
  '54000': { code: 'payload_too_large', hint: 'something is larger than the server takes' },
  '23514': { code: 'invalid_argument', hint: 'a table of the bus refuses the value' },
  '42P01': {
    code: 'schema_outdated',
    hint: 'the tables of the bus are missing or old; run `klieo-bus migrate` or connect with migrate: true, or restore the schema from a dump if that finds nothing to do',
  },
  '42703': { code: 'schema_outdated', hint: 'the tables of the bus are old; run `klieo-bus migrate` or connect with migrate: true' },
  '42883': {
    code: 'schema_outdated',
    hint: 'the functions of the bus are missing or old; run `klieo-bus migrate` or connect with migrate: true, or restore the schema from a dump if that finds nothing to do',
  },
  '42725': {
    code: 'schema_outdated',
    hint: 'somebody has added a function of a name of the bus’s to its schema; drop it, or restore the schema from a dump',
  },
  ...Object.fromEntries(
    ['42P10', '42704', '42804', '42809', '42P13', '23502'].map((state) => [
      state,
      { code: 'schema_outdated', hint: 'the schema of the bus is not as its migrations made it; restore it from a dump' } as const,
    ]),
  ),
  '3F000': { code: 'schema_outdated', hint: 'the schema of the bus is missing; run `klieo-bus migrate` or connect with migrate: true' },
  [LACKS_A_RIGHT]: { code: 'permission_denied', hint: 'the role may not do this; see docs/security.md for the rights' },
  '3D000': { code: 'not_found', hint: 'the database does not exist; create it' },
  KB001: { code: 'not_found', hint: 'the durable does not exist; it was deleted, or never subscribed to' },
  KB002: { code: 'invalid_argument', hint: 'tx must not be a transaction that has written' },
}

const BY_CLASS: Readonly<Record<string, Verdict>> = {
  '08': { code: 'connection', hint: 'the connection to the server was lost; a write may or may not have happened' },
  '22': { code: 'invalid_argument', hint: 'the server refuses a value' },
  '28': { code: 'permission_denied', hint: 'the server refused the login' },
  '53': { code: 'unavailable', hint: 'the server lacks a resource (connections, memory or disk); try again later' },
  '57': { code: 'connection', hint: 'the server ended the connection; a write may or may not have happened' },
}

/** Errors of the network from before anything was sent: repeating is safe. */
const NEVER_SENT = new Set(['ECONNREFUSED', 'ENOTFOUND', 'EAI_AGAIN', 'ENOENT', 'EHOSTUNREACH', 'ENETUNREACH'])
/** pg's, when a server took the connection and did not answer in time. */
const NEVER_SENT_TEXT = /^timeout expired$/
const LOST = new Set(['ECONNRESET', 'EPIPE', 'ETIMEDOUT', 'ECONNABORTED'])
const LOST_TEXT =
  /Connection terminated|Client has encountered a connection error|Connection ended|not queryable|Query read timeout|Client was closed/
/** pg's own limit and that of its pool, for a connection that is not ready in time. */
const NOT_LET_IN_TEXT = /^timeout expired$|due to connection timeout/
const TX_OVER_TEXT = /Transaction is already (committed|rolled back)/
const POOL_ENDED_TEXT = /Cannot use a pool after calling end/
const STANDBY_TEXT = /recovery is in progress/
const NOTIFY_QUEUE_TEXT = /NOTIFY queue/
const NO_SSL_TEXT = /does not support SSL/
const POOL_FULL_TEXT = /timeout exceeded when trying to connect/

export function sqlState(error: unknown): string | undefined {
  const code = (error as DriverError | undefined)?.code
  return typeof code === 'string' && /^[0-9A-Z]{5}$/.test(code) ? code : undefined
}

/** The statement may be sent again without its notification: consumers poll. */
export function isNotifyQueueFull(error: unknown): boolean {
  return error instanceof Error && NOTIFY_QUEUE_TEXT.test(error.message)
}

/** The least of the roles that may; what is not here a worker may. */
const KIND_FOR: Readonly<Record<string, RoleKind>> = {
  publish: 'producer',
  enqueue: 'producer',
  request: 'producer',
  get: 'reader',
  keys: 'reader',
  queues: 'reader',
  jobs: 'reader',
  job: 'reader',
  durables: 'reader',
  buckets: 'reader',
  diagnose: 'reader',
  retryJob: 'admin',
  retryDead: 'admin',
  cancelJob: 'admin',
  removeJob: 'admin',
  purgeQueue: 'admin',
  pauseQueue: 'admin',
  resumeQueue: 'admin',
  seekDurable: 'admin',
  purgeMessages: 'admin',
  deleteDurable: 'admin',
  [REPAIR]: 'admin',
}

/**
 * Says which right is missing, and how it is granted.
 * @param what role: who lacks it; undefined: whoever the caller's transaction is of
 */
export function toPermissionError(error: unknown, what: { doing: string; schema: string; role: string | undefined }): BusError {
  const { doing, schema, role } = what
  // What a function does it does as its owner, whoever has called it.
  if ((error as DriverError).where !== undefined) return toOwnersError(error, doing, schema)
  const who = role === undefined ? 'the role' : `the role "${role}"`
  const grant = grantStatement(schema, KIND_FOR[doing] ?? 'worker', role ?? '<role>')
  return new BusError(
    'permission_denied',
    `${doing}: ${who} lacks a right in schema "${schema}" (${(error as Error).message}); its owner grants what this needs with: ${grant}`,
    { cause: withoutValues(error) },
  )
}

/** No grant to a caller mends this. */
function toOwnersError(error: unknown, doing: string, schema: string): BusError {
  return new BusError(
    'permission_denied',
    `${doing}: the owner of the functions in schema "${schema}" lacks a right of its own (${(error as Error).message}); give it back, as that role or a superuser, with: ${ownersGrants(schema)}`,
    { cause: withoutValues(error) },
  )
}

/** @param doing what was being done, for the message */
export function toBusError(error: unknown, doing: string): BusError {
  if (error instanceof BusError) return error
  const { code: state, message, constraint } = (error ?? {}) as DriverError
  const text = typeof message === 'string' && message !== '' ? message : String(state ?? 'unknown error')
  const verdict = judge(typeof state === 'string' ? state : '', text, constraint, error)
  // Node's error about an address carries the whole of it, with its password.
  if (state === 'ERR_INVALID_URL') return new BusError('invalid_argument', `${doing}: the connection string is not a valid address`)
  return new BusError(verdict.code, `${doing}: ${verdict.hint} (${text})`, { cause: withoutValues(error), ...retryable(verdict) })
}

/**
 * What the server says of a row it refuses repeats the row ("Failing row contains …", "Key (…)=(…) already exists"), and its context may
 * repeat the parameters of a statement: payloads, headers, keys. A cause is logged by whoever logs an error, so they go no further.
 */
function withoutValues(error: unknown): unknown {
  if (sqlState(error) === undefined || typeof error !== 'object' || error === null) return error
  for (const field of ['detail', 'where', 'internalQuery']) {
    if ((error as Record<string, unknown>)[field] !== undefined) Reflect.set(error, field, undefined)
  }
  return error
}

function retryable(verdict: Verdict): { retryable?: boolean } {
  return verdict.retryable === undefined ? {} : { retryable: verdict.retryable }
}

function judge(code: string, text: string, constraint: unknown, error: unknown): Verdict {
  if (typeof constraint === 'string' && constraint.endsWith('_size')) {
    return { code: 'payload_too_large', hint: 'a payload or its headers are larger than the tables of the bus take' }
  }
  if (STANDBY_TEXT.test(text)) return { code: 'connection', hint: 'the server is a standby; connect to the primary' }
  if (NOTIFY_QUEUE_TEXT.test(text))
    return { code: 'unavailable', hint: 'a listener that sleeps in a transaction has filled the notification queue' }
  const known = BY_STATE[code]
  if (known) return known
  if (NEVER_SENT.has(code) || NEVER_SENT_TEXT.test(text) || (error instanceof AggregateError && error.errors.length > 0)) {
    return { code: 'connection', hint: 'the server cannot be reached', retryable: true }
  }
  if (NOT_LET_IN_TEXT.test(text)) {
    return { code: 'connection', hint: 'the server did not take the connection in time; nothing was sent', retryable: true }
  }
  if (LOST.has(code) || LOST_TEXT.test(text)) {
    return { code: 'connection', hint: 'the connection to the server was lost; a write may or may not have happened' }
  }
  if (TX_OVER_TEXT.test(text)) return { code: 'invalid_argument', hint: 'tx must be a transaction that is still open' }
  if (code === 'ERR_SOCKET_BAD_PORT') return { code: 'invalid_argument', hint: 'the port of the server is not one' }
  if (NO_SSL_TEXT.test(text))
    return { code: 'connection', hint: 'the server takes no encrypted connection; drop sslmode, or set up its certificate' }
  if (POOL_ENDED_TEXT.test(text)) return { code: 'closed', hint: 'the pool of the bus has been ended' }
  if (POOL_FULL_TEXT.test(text)) {
    return { code: 'unavailable', hint: 'no connection of the pool was free in time; raise its size or its connectionTimeoutMillis' }
  }
  if (/^[0-9A-Z]{5}$/.test(code)) {
    const byClass = BY_CLASS[code.slice(0, 2)]
    if (byClass) return byClass
  }
  return { code: 'internal', hint: 'unexpected error' }
}

/** The same statement may be sent again at once: a serialization failure or deadlock, or two who changed the same catalog row. */
export function isTransient(error: unknown): boolean {
  const state = sqlState(error)
  return (
    state === '40001' ||
    state === '40P01' ||
    (state === 'XX000' && /tuple concurrently (updated|deleted)/.test(String((error as Error).message)))
  )
}
