/** The one place where what the NATS clients throw becomes a BusError. They tell their errors apart by name. */

import { JetStreamApiError } from '@nats-io/jetstream'
import { RequestError } from '@nats-io/transport-node'
import { BusError, type BusErrorCode } from '../core/index.ts'

interface Verdict {
  readonly code: BusErrorCode
  readonly hint: string
}

/** Each as long as the client waits for an answer: 5 s. */
const PATIENT_TRIES = 3
/** Of a stream without a leader the client says the same as of a server without JetStream. */
const NOBODY_ANSWERS =
  'JetStream does not answer: a cluster is electing a leader, or the server was not started with -js, or the account may not use it'

const BY_NAME: Readonly<Record<string, Verdict>> = {
  ClosedConnectionError: { code: 'connection', hint: 'the connection to NATS was closed' },
  DrainingConnectionError: { code: 'connection', hint: 'the connection to NATS is being closed' },
  ConnectionError: { code: 'connection', hint: 'the connection to NATS was lost' },
  ProtocolError: { code: 'connection', hint: 'the connection to NATS was lost' },
  // A request whose answer does not come: the server is away, or has no quorum. A write may have happened.
  TimeoutError: { code: 'connection', hint: 'NATS did not answer in time' },
  RequestError: { code: 'connection', hint: 'NATS did not answer' },
  NoRespondersError: {
    code: 'unavailable',
    hint: NOBODY_ANSWERS,
  },
  JetStreamNotEnabled: { code: 'unavailable', hint: NOBODY_ANSWERS },
  AuthorizationError: { code: 'permission_denied', hint: 'NATS refuses the user' },
  UserAuthenticationExpiredError: { code: 'permission_denied', hint: 'the credentials of the user have expired' },
  PermissionViolationError: { code: 'permission_denied', hint: 'the user may not use the subject' },
}

/** JetStream's own codes, as in its errors.json. */
const WRONG_LAST_SEQUENCE = [10_071, 10_164]
/** Of a newer server, to the second of two messages of one id while the first is being stored. */
const DUPLICATE_UNDER_WAY = 10_158
const STREAM_NOT_FOUND = 10_059
const CONSUMER_NOT_FOUND = 10_014
const NO_MESSAGE = 10_037
/** Than the stream takes: somebody has set its max_msg_size. */
const TOO_LARGE = [10_054, 10_097]
/** Deleting what was deleted before. */
const NO_SUCH_SEQUENCE = [10_043, 10_057]

export function natsError(error: unknown): BusError {
  if (error instanceof BusError) return error
  const { name, message, cause } = error instanceof Error ? error : { name: '', message: String(error), cause: undefined }
  if (error instanceof JetStreamApiError) {
    if (TOO_LARGE.includes(error.code)) return new BusError('payload_too_large', `JetStream: ${message} (${error.code})`, { cause: error })
    // 503: no leader, or out of memory, disk or connections. Of a duplicate it is not known yet whether the first one is stored.
    const code =
      error.status === 503 || error.status === 500 || error.code === DUPLICATE_UNDER_WAY
        ? 'unavailable'
        : error.status === 404
          ? 'not_found'
          : 'internal'
    return new BusError(code, `JetStream: ${message} (${error.code})`, { cause: error })
  }
  if (name === 'InvalidArgumentError' && message.includes('max_payload'))
    return new BusError('payload_too_large', `NATS takes no message as large as this with its headers: ${message}`, { cause: error })
  // That a request failed says nothing; its cause does.
  const inner = name === 'RequestError' && cause instanceof Error ? BY_NAME[cause.name] : undefined
  const { code, hint } = inner ?? BY_NAME[name] ?? { code: 'internal', hint: 'an unexpected error of the NATS client' }
  return new BusError(code, `${hint}: ${message}`, { cause: error })
}

/** Runs it; whatever it rejects with is a BusError. */
export async function mapped<T>(run: () => Promise<T>): Promise<T> {
  try {
    return await run()
  } catch (error) {
    throw natsError(error)
  }
}

/** Likewise, for what may be asked again: a cluster that is making a stream answers when somebody leads it, which may take an election. */
export function patiently<T>(run: () => Promise<T>): Promise<T> {
  return mapped(async () => {
    for (let tries = 1; ; tries++) {
      try {
        return await run()
      } catch (error) {
        if (!isTimeout(error) || tries === PATIENT_TRIES) throw error
      }
    }
  })
}

function isApi(error: unknown, ...codes: number[]): boolean {
  return error instanceof JetStreamApiError && codes.includes(error.code)
}

export function isWrongSequence(error: unknown): boolean {
  return isApi(error, ...WRONG_LAST_SEQUENCE)
}

export function isDuplicateUnderWay(error: unknown): boolean {
  return isApi(error, DUPLICATE_UNDER_WAY)
}

export function isNotThere(error: unknown): boolean {
  return isApi(error, STREAM_NOT_FOUND, CONSUMER_NOT_FOUND, NO_MESSAGE, ...NO_SUCH_SEQUENCE)
}

/** Nobody listens on the subject. */
export function isNoResponders(error: unknown): boolean {
  if (!(error instanceof Error)) return false
  if (error instanceof RequestError) return error.isNoResponders()
  return error.name === 'NoRespondersError' || (error.cause instanceof Error && error.cause.name === 'NoRespondersError')
}

export function isTimeout(error: unknown): boolean {
  return error instanceof Error && (error.name === 'TimeoutError' || (error.cause instanceof Error && error.cause.name === 'TimeoutError'))
}
