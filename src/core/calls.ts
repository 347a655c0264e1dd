/** The checked form of what a caller hands in: written once, used by every backend. */

import {
  checkDate,
  checkDuration,
  checkHeaders,
  checkId,
  checkInteger,
  checkPayload,
  checkTotal,
  fieldsOf,
  invalid,
  MAX_BATCH,
  MAX_CLAIM_LIMIT,
  MAX_DURATION_MS,
  reading,
} from './checks.ts'
import { BusError } from './errors.ts'
import { checkFilter, checkSubject } from './subjects.ts'
import type { Headers, Job, Message, SubscribeOptions } from './types.ts'

export const DEFAULT_MAX_ATTEMPTS = 5
export const MAX_MAX_ATTEMPTS = 1_000_000
/** How long a `msgId` is remembered (P12). */
export const DUPLICATE_WINDOW_MS = 120_000
/** How long a `dedupKey` is remembered at the least (J5). */
export const DEDUP_WINDOW_MS = 24 * 60 * 60 * 1000

export interface CheckedMessage {
  readonly subject: string
  readonly payload: Uint8Array
  readonly headers: Headers
  readonly msgId: string | undefined
}

export function checkMessage(message: Message, maxPayloadBytes: number): CheckedMessage {
  if (typeof message !== 'object' || message === null) throw invalid('message', message, 'must be an object')
  const { subject, payload, headers, msgId } = fieldsOf('message', message, ['subject', 'payload', 'headers', 'msgId'])
  checkSubject(subject)
  const bytes = checkPayload(payload, maxPayloadBytes)
  const checked = checkHeaders(headers)
  checkTotal(bytes, checked, maxPayloadBytes)
  if (msgId !== undefined) checkId('msgId', msgId)
  return { subject, payload: bytes, headers: checked, msgId }
}

export interface CheckedJob {
  readonly payload: Uint8Array
  readonly headers: Headers
  readonly dedupKey: string | undefined
  readonly maxAttempts: number
  readonly delayMs: number | undefined
  readonly runAt: Date | undefined
  readonly priority: number
}

export function checkJob(job: Job, maxPayloadBytes: number): CheckedJob {
  if (typeof job !== 'object' || job === null) throw invalid('job', job, 'must be an object with a payload')
  const given = fieldsOf('job', job, ['payload', 'headers', 'dedupKey', 'maxAttempts', 'delayMs', 'runAt', 'priority'])
  const payload = checkPayload(given.payload, maxPayloadBytes)
  const headers = checkHeaders(given.headers)
  checkTotal(payload, headers, maxPayloadBytes)
  const { dedupKey, maxAttempts = DEFAULT_MAX_ATTEMPTS, delayMs, runAt, priority = 0 } = given
  if (dedupKey !== undefined) checkId('dedupKey', dedupKey)
  checkInteger('maxAttempts', maxAttempts, 1, MAX_MAX_ATTEMPTS)
  if (delayMs !== undefined) checkDuration('delayMs', delayMs)
  const due = runAt === undefined ? undefined : checkDate('runAt', runAt)
  if (delayMs !== undefined && runAt !== undefined) throw invalid('runAt', runAt, 'must not be given together with delayMs')
  checkInteger('priority', priority, -100, 100)
  return { payload, headers, dedupKey, maxAttempts, delayMs, runAt: due, priority }
}

/** Checks each element; what is refused is named by its place. */
export function checkEach<I, O>(argument: string, items: readonly I[], check: (item: I) => O): O[] {
  // By their places: the caller's iterator may be another one, or never end.
  const copy = () => Array.from({ length: Math.min(items.length, MAX_BATCH) }, (_, index) => items[index] as I)
  return reading(argument, items, copy).map((item, index) => {
    try {
      return check(item)
    } catch (error) {
      if (error instanceof BusError) throw new BusError(error.code, `${argument}[${index}]: ${error.message}`, { cause: error.cause })
      throw error
    }
  })
}

/** @throws invalid_argument unless it is an array of a size one statement can carry */
export function checkBatch(argument: string, value: unknown): asserts value is readonly unknown[] {
  const valid = () => Array.isArray(value) && value.length <= MAX_BATCH
  if (!reading(argument, value, valid)) throw invalid(argument, value, `must be an array of at most ${MAX_BATCH}`)
}

export function checkLimit(value: unknown): asserts value is number {
  checkInteger('limit', value, 1, MAX_CLAIM_LIMIT)
}

/** What `subscribe` takes. */
export const SUBSCRIBE_OPTIONS = ['ackWaitMs', 'maxDeliver', 'maxAckPending', 'maxInFlight', 'start', 'signal', 'onInterrupted'] as const

export interface CheckedSubscription {
  readonly ackWaitMs: number
  /** `null`: unlimited. */
  readonly maxDeliver: number | null
  readonly maxAckPending: number
  readonly maxInFlight: number
  readonly start: 'all' | 'new' | { readonly seq: number } | { readonly time: Date }
}

export function checkSubscription(
  filter: string,
  options: Partial<Omit<SubscribeOptions, 'signal' | 'onInterrupted'>>,
): CheckedSubscription {
  checkFilter(filter)
  const { ackWaitMs = 30_000, maxDeliver, maxAckPending = 1_000, maxInFlight = 256, start = 'all' } = options
  checkDuration('ackWaitMs', ackWaitMs, 1)
  if (maxDeliver !== undefined) checkInteger('maxDeliver', maxDeliver, 1, MAX_DURATION_MS)
  checkInteger('maxAckPending', maxAckPending, 1, MAX_DURATION_MS)
  checkInteger('maxInFlight', maxInFlight, 1, 100_000)
  return { ackWaitMs, maxDeliver: maxDeliver ?? null, maxAckPending, maxInFlight, start: checkStart(start) }
}

/** @throws invalid_argument */
export function checkStart(start: unknown): CheckedSubscription['start'] {
  return reading('start', start, () => startOf(start))
}

function startOf(start: unknown): CheckedSubscription['start'] {
  if (start === 'all' || start === 'new') return start
  if (typeof start === 'object' && start !== null && 'seq' in start !== 'time' in start) {
    if ('time' in start) {
      return { time: checkDate('start.time', start.time) }
    }
    const { seq } = start as { readonly seq: unknown }
    checkInteger('start.seq', seq, 0, Number.MAX_SAFE_INTEGER)
    return { seq }
  }
  throw invalid('start', start, 'must be "all", "new", { seq } or { time }')
}
