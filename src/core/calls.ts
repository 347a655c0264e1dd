/** The checked form of what a caller hands in: written once, used by every backend. */

import {
  checkDate,
  checkDuration,
  checkHeaders,
  checkId,
  checkInteger,
  checkPayload,
  checkTotal,
  EMPTY_HEADERS,
  invalid,
  MAX_BATCH,
  MAX_CLAIM_LIMIT,
  MAX_DURATION_MS,
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
  checkSubject(message.subject)
  const payload = checkPayload(message.payload, maxPayloadBytes)
  const headers = checkHeaders(message.headers)
  checkTotal(payload, headers, maxPayloadBytes)
  if (message.msgId !== undefined) checkId('msgId', message.msgId)
  return { subject: message.subject, payload, headers, msgId: message.msgId }
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
  const payload = checkPayload(job.payload, maxPayloadBytes)
  const headers = job.headers === undefined ? EMPTY_HEADERS : checkHeaders(job.headers)
  checkTotal(payload, headers, maxPayloadBytes)
  if (job.dedupKey !== undefined) checkId('dedupKey', job.dedupKey)
  if (job.maxAttempts !== undefined) checkInteger('maxAttempts', job.maxAttempts, 1, MAX_MAX_ATTEMPTS)
  if (job.delayMs !== undefined) checkDuration('delayMs', job.delayMs)
  if (job.runAt !== undefined) checkDate('runAt', job.runAt)
  if (job.delayMs !== undefined && job.runAt !== undefined) throw invalid('runAt', job.runAt, 'must not be given together with delayMs')
  if (job.priority !== undefined) checkInteger('priority', job.priority, -100, 100)
  return {
    payload,
    headers,
    dedupKey: job.dedupKey,
    maxAttempts: job.maxAttempts ?? DEFAULT_MAX_ATTEMPTS,
    delayMs: job.delayMs,
    runAt: job.runAt,
    priority: job.priority ?? 0,
  }
}

/** Checks each element; what is refused is named by its place. */
export function checkEach<I, O>(argument: string, items: readonly I[], check: (item: I) => O): O[] {
  return items.map((item, index) => {
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
  if (!Array.isArray(value) || value.length > MAX_BATCH) throw invalid(argument, value, `must be an array of at most ${MAX_BATCH}`)
}

export function checkLimit(value: unknown): asserts value is number {
  checkInteger('limit', value, 1, MAX_CLAIM_LIMIT)
}

export interface CheckedSubscription {
  readonly ackWaitMs: number
  /** `null`: unlimited. */
  readonly maxDeliver: number | null
  readonly maxAckPending: number
  readonly maxInFlight: number
  readonly start: 'all' | 'new' | { readonly seq: number } | { readonly time: Date }
}

export function checkSubscription(filter: string, options: SubscribeOptions): CheckedSubscription {
  checkFilter(filter)
  const { ackWaitMs = 30_000, maxDeliver, maxAckPending = 1_000, maxInFlight = 256, start = 'all' } = options
  checkDuration('ackWaitMs', ackWaitMs, 1)
  if (maxDeliver !== undefined) checkInteger('maxDeliver', maxDeliver, 1, MAX_DURATION_MS)
  checkInteger('maxAckPending', maxAckPending, 1, MAX_DURATION_MS)
  checkInteger('maxInFlight', maxInFlight, 1, 100_000)
  if (start !== 'all' && start !== 'new') {
    if (typeof start !== 'object' || start === null) throw invalid('start', start, 'must be "all", "new", { seq } or { time }')
    if ('seq' in start && !('time' in start)) checkInteger('start.seq', start.seq, 0, Number.MAX_SAFE_INTEGER)
    else if ('time' in start && !('seq' in start)) checkDate('start.time', start.time)
    else throw invalid('start', start, 'must be "all", "new", { seq } or { time }')
  }
  return { ackWaitMs, maxDeliver: maxDeliver ?? null, maxAckPending, maxInFlight, start }
}
