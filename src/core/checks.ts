/**
 * The rules of names, sizes and durations (docs/contract.md, section 7), checked once, at the edge of every public call and
 * before anything is sent. Each failure names the argument, the kind of the value and the rule; never the value
 * itself, which may be secret or huge.
 */

import { BusError } from './errors.ts'
import { kindOf } from './subjects.ts'
import type { Headers, Payload } from './types.ts'

export const MAX_DURATION_MS = 2_147_483_647
export const MAX_WAIT_MS = 30_000
export const MAX_HEADER_BYTES = 64 * 1024
export const DEFAULT_MAX_PAYLOAD_BYTES = 1024 * 1024
export const LARGEST_MAX_PAYLOAD_BYTES = 8 * 1024 * 1024
export const MAX_CLAIM_LIMIT = 1_000
export const MAX_BATCH = 100_000
export const EMPTY_HEADERS: Headers = Object.freeze({})

const PLAIN_NAME = /^[A-Za-z0-9_-]{1,128}$/
const DOTTED_NAME = /^[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*$/
const KEY = /^[A-Za-z0-9_\-/=]+(?:\.[A-Za-z0-9_\-/=]+)*$/
const HEADER_NAME = /^[\x21-\x39\x3b-\x7e]+$/
const HEADER_VALUE = /^[^\r\n\0]*$/

export function invalid(argument: string, value: unknown, rule: string): BusError {
  return new BusError('invalid_argument', `${argument} (${kindOf(value)}) ${rule}`)
}

export function checkDurable(value: unknown): asserts value is string {
  if (typeof value !== 'string' || !PLAIN_NAME.test(value)) {
    throw invalid('durable', value, 'must be 1 to 128 characters of A-Z a-z 0-9 _ -')
  }
}

function checkDotted(argument: string, value: unknown): asserts value is string {
  if (typeof value !== 'string' || value.length > 128 || !DOTTED_NAME.test(value)) {
    throw invalid(argument, value, 'must be 1 to 128 characters of A-Z a-z 0-9 _ - with single dots between them')
  }
}

export function checkQueue(value: unknown): asserts value is string {
  checkDotted('queue', value)
}

/** Buckets under `dedup.` belong to the bus (J5). */
export function isDedupBucket(bucket: string): boolean {
  return bucket.startsWith('dedup.')
}

/** @param access writing and leasing are refused in the buckets of the bus */
export function checkBucket(value: unknown, access: 'read' | 'write'): asserts value is string {
  if (typeof value === 'string' && isDedupBucket(value)) {
    checkDotted('bucket', value.slice('dedup.'.length))
    if (access === 'write') throw invalid('bucket', value, 'must not begin with "dedup.": those buckets are written by enqueue alone')
    return
  }
  checkDotted('bucket', value)
}

export function checkKey(bucket: string, value: unknown): asserts value is string {
  if (isDedupBucket(bucket)) return checkId('key', value)
  if (typeof value !== 'string' || value.length > 512 || !KEY.test(value)) {
    throw invalid('key', value, 'must be 1 to 512 characters of A-Z a-z 0-9 _ - / = . with no dot first, last or doubled')
  }
}

/** Free text that names something: `dedupKey`, `msgId`, `workerId`. */
export function checkId(argument: string, value: unknown): asserts value is string {
  if (typeof value !== 'string' || value.length < 1 || value.length > 512 || value.includes('\0') || !value.isWellFormed()) {
    throw invalid(argument, value, 'must be 1 to 512 characters without NUL and without lone surrogates')
  }
}

/** Text that is stored beside a job or message: a reason, an error. */
export function checkText(argument: string, value: unknown): asserts value is string {
  if (typeof value !== 'string' || value.includes('\0') || !value.isWellFormed()) {
    throw invalid(argument, value, 'must be a string without NUL and without lone surrogates')
  }
}

export function checkInteger(argument: string, value: unknown, least: number, most: number): asserts value is number {
  if (typeof value !== 'number' || !Number.isInteger(value) || value < least || value > most) {
    throw invalid(argument, value, `must be an integer from ${least} to ${most}`)
  }
}

export function checkDuration(argument: string, value: unknown, least = 0, most = MAX_DURATION_MS): asserts value is number {
  checkInteger(argument, value, least, most)
}

/** @returns a copy: a Date of the caller's may change before it is sent, or have methods of its own */
export function checkDate(argument: string, value: unknown): Date {
  const copy = reading(argument, value, () => (value instanceof Date ? new Date(Date.prototype.getTime.call(value)) : undefined))
  // Postgres ends at the year 294276, JavaScript at 275760: whatever a Date holds fits, but for the far past.
  if (copy === undefined || Number.isNaN(copy.getTime()) || copy.getUTCFullYear() < -4712) {
    throw invalid(argument, value, 'must be a valid Date')
  }
  return copy
}

export function checkRevision(argument: string, value: unknown): asserts value is number {
  checkInteger(argument, value, 1, Number.MAX_SAFE_INTEGER)
}

/** What `cas` expects: a revision, or `null` for "absent". */
export function checkExpected(value: unknown): asserts value is number | null {
  if (value === null) return
  if (typeof value !== 'number' || !Number.isSafeInteger(value) || value < 1) {
    throw invalid('expected', value, 'must be a revision, or null while the key is to be absent')
  }
}

export function checkSignal(value: unknown): asserts value is AbortSignal | undefined {
  // A proxy of one is an instance, and has no state that can be read.
  const valid = () => value instanceof AbortSignal && typeof value.aborted === 'boolean'
  if (value !== undefined && !reading('signal', value, valid)) throw invalid('signal', value, 'must be an AbortSignal')
}

export function checkFunction(argument: string, value: unknown): void {
  if (typeof value !== 'function') throw invalid(argument, value, 'must be a function')
}

/**
 * What a caller's getter or proxy throws while an argument is read is a mistake in the argument.
 * @throws invalid_argument
 */
export function reading<T>(argument: string, value: unknown, read: () => T): T {
  try {
    return read()
  } catch (error) {
    if (error instanceof BusError) throw error
    throw invalid(argument, value, 'cannot be read: it threw')
  }
}

/**
 * These fields of an object, each read once: what is checked is what is used, whatever a getter would answer next time.
 * @throws invalid_argument
 */
export function fieldsOf<T extends object, K extends keyof T>(
  argument: string,
  value: T,
  names: readonly K[],
): { readonly [P in K]: T[P] | undefined } {
  return reading(argument, value, () => Object.fromEntries(names.map((name) => [name, value[name]]))) as { [P in K]: T[P] | undefined }
}

/** Those of an options bag; `undefined` is an empty one, `null` none. @throws invalid_argument */
export function optionsOf<T extends object, K extends keyof T>(
  value: T | null | undefined,
  names: readonly K[],
  argument = 'options',
): { readonly [P in K]: T[P] | undefined } {
  reading(argument, value, () => checkOptions(value, argument))
  return fieldsOf(argument, value ?? ({} as T), names)
}

/** An options bag: `undefined` is an empty one. */
export function checkOptions(value: unknown, argument = 'options'): void {
  if (value === undefined) return
  if (typeof value !== 'object' || value === null || Array.isArray(value)) throw invalid(argument, value, 'must be an object')
  // A transaction in the place of the options would be ignored, and the call would not take part in it.
  if (
    typeof (value as { query?: unknown }).query === 'function' ||
    typeof (value as { executeQuery?: unknown }).executeQuery === 'function'
  ) {
    throw invalid(argument, value, 'must be options, not a transaction: pass { tx }')
  }
}

const encoder = new TextEncoder()

/**
 * The payload as bytes of the package's own: a caller may reuse his buffer as soon as the call has returned its promise.
 * @throws invalid_argument, payload_too_large
 */
export function toBytes(argument: string, value: Payload): Uint8Array {
  if (typeof value === 'string') return encoder.encode(value)
  if (value instanceof Uint8Array) return new Uint8Array(value)
  throw invalid(argument, value, 'must be a Uint8Array or a string')
}

/** Checks the size before it copies: 100 MB are refused without being touched. */
export function checkPayload(value: unknown, maxBytes: number, argument = 'payload'): Uint8Array {
  return reading(argument, value, () => payloadOf(value, maxBytes, argument))
}

function payloadOf(value: unknown, maxBytes: number, argument: string): Uint8Array {
  if (typeof value !== 'string' && !(value instanceof Uint8Array)) throw invalid(argument, value, 'must be a Uint8Array or a string')
  const tooLarge = (size: number) =>
    new BusError('payload_too_large', `${argument} is ${size} bytes; the limit of this bus is ${maxBytes} (maxPayloadBytes)`)
  if (typeof value === 'string') {
    if (value.length > maxBytes) throw tooLarge(value.length)
    if (!value.isWellFormed()) throw invalid(argument, value, 'must not hold lone surrogates')
  } else if (value.byteLength > maxBytes) throw tooLarge(value.byteLength)
  const bytes = toBytes(argument, value)
  if (bytes.byteLength > maxBytes) throw tooLarge(bytes.byteLength)
  return bytes
}

/** Payload and headers count together, as in NATS. @throws payload_too_large */
export function checkTotal(payload: Uint8Array, headers: Headers, maxBytes: number): void {
  if (headers === EMPTY_HEADERS) return
  let bytes = payload.byteLength
  for (const [name, text] of Object.entries(headers)) bytes += name.length + Buffer.byteLength(text)
  if (bytes > maxBytes) {
    throw new BusError(
      'payload_too_large',
      `payload and headers are ${bytes} bytes; the limit of this bus is ${maxBytes} (maxPayloadBytes)`,
    )
  }
}

/** A checked copy of the headers. */
export function checkHeaders(value: unknown): Headers {
  return value === undefined ? EMPTY_HEADERS : reading('headers', value, () => headersOf(value))
}

function headersOf(value: unknown): Headers {
  if (typeof value !== 'object' || value === null || Array.isArray(value) || value instanceof Map) {
    throw invalid('headers', value, 'must be an object of strings')
  }
  const names = Object.keys(value)
  if (names.length === 0) return EMPTY_HEADERS
  let bytes = 0
  const copy: [string, string][] = []
  for (const name of names) {
    const text = (value as Record<string, unknown>)[name]
    if (!HEADER_NAME.test(name)) throw invalid('headers', name, 'has a name that is not printable ASCII without ":" and space')
    if (typeof text !== 'string') throw invalid('headers', text, `must have a string as the value of "${name}"`)
    if (!HEADER_VALUE.test(text) || !text.isWellFormed()) {
      throw invalid('headers', text, `must not have CR, LF, NUL or a lone surrogate in the value of "${name}"`)
    }
    bytes += name.length + Buffer.byteLength(text)
    if (bytes > MAX_HEADER_BYTES) throw invalid('headers', value, `must be at most ${MAX_HEADER_BYTES} bytes, names and values together`)
    copy.push([name, text])
  }
  // fromEntries defines own properties, so that a header called __proto__ is just a header.
  return Object.freeze(Object.fromEntries(copy))
}
