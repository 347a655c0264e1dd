/**
 * How a message of the bus looks on NATS. Payload and headers are NATS's own wherever NATS can carry them, so that
 * anybody's consumer can read them; what it cannot goes along as data of the bus's:
 *
 *   klieo-headers   JSON: names and values that NATS or its clients would act on, trim or refuse
 *   klieo-packed    the payload begins with so many bytes of that JSON: JetStream takes less than 64 KiB of headers
 */

import type { StoredMsg } from '@nats-io/jetstream'
import { type Msg, type MsgHdrs, headers as newHeaders } from '@nats-io/transport-node'
import { EMPTY_HEADERS, type Headers } from '../core/index.ts'

const ODD = 'klieo-headers'
const PACKED = 'klieo-packed'
/** What the bus or the server reads. */
const RESERVED = /^(?:nats-|klieo-|kv-|status$|description$)/i
/** The server takes the first place that reads like the name of a header of its own for that header, and overlooks the real one behind it. */
const SERVERS = 'Nats-'
const PLAIN_NAME = /^[A-Za-z0-9][A-Za-z0-9_.-]*$/
/** Above this they go into the payload. */
const MOST_HEADER_BYTES = 16 * 1024
const PLAIN_ID = /^[\x21-\x7e]+$/
/** Not for users: what the bus publishes itself is deduplicated in the same window. */
const OWN_IDS = 'klieo:'
const ENCODED_IDS = 'base64:'

const encoder = new TextEncoder()
const decoder = new TextDecoder()

export interface Packed {
  readonly headers: MsgHdrs
  readonly payload: Uint8Array
}

/** @param own the bus's own headers, plain ASCII */
export function pack(payload: Uint8Array, headers: Headers, own: Readonly<Record<string, string>> = {}): Packed {
  const packed = newHeaders()
  for (const [name, value] of Object.entries(own)) packed.set(name, value)
  if (headers === EMPTY_HEADERS) return { headers: packed, payload }
  const entries = Object.entries(headers)
  const isPlain = ([name, value]: [string, string]) =>
    PLAIN_NAME.test(name) &&
    !RESERVED.test(name) &&
    value.length > 0 &&
    value.trim() === value &&
    !/\p{Cc}/u.test(value) &&
    !`${name} ${value}`.includes(SERVERS)
  const size = entries.reduce((sum, [name, value]) => sum + name.length + Buffer.byteLength(value) + 4, 0)
  if (size > MOST_HEADER_BYTES) {
    const json = encoder.encode(JSON.stringify(entries))
    packed.set(PACKED, String(json.byteLength))
    const both = new Uint8Array(json.byteLength + payload.byteLength)
    both.set(json)
    both.set(payload, json.byteLength)
    return { headers: packed, payload: both }
  }
  for (const entry of entries) if (isPlain(entry)) packed.set(...entry)
  const odd = entries.filter((entry) => !isPlain(entry))
  if (odd.length > 0) packed.set(ODD, JSON.stringify(odd).replaceAll(SERVERS, '\\u004eats-'))
  return { headers: packed, payload }
}

/** Another client may write names that this one refuses to read, one with a space as a rule: such a message has no headers. */
export function headersOf(msg: Pick<Msg, 'headers'> | Pick<StoredMsg, 'header'>): MsgHdrs | undefined {
  try {
    return 'header' in msg ? msg.header : msg.headers
  } catch {
    return undefined
  }
}

/** The client's bytes are a Buffer where they come from a socket; of that `slice` shares its memory, which nobody expects of a Uint8Array. */
export function plain(bytes: Uint8Array): Uint8Array {
  return new Uint8Array(bytes.buffer, bytes.byteOffset, bytes.byteLength)
}

export function unpack(headers: MsgHdrs | undefined, bytes: Uint8Array): { readonly headers: Headers; readonly payload: Uint8Array } {
  const data = plain(bytes)
  if (!headers) return { headers: EMPTY_HEADERS, payload: data }
  const entries: [string, string][] = []
  for (const name of headers.keys()) if (!RESERVED.test(name)) entries.push([name, headers.get(name)])
  const odd = headers.get(ODD)
  if (odd) entries.push(...(pairs(odd) ?? []))
  const length = Number(headers.get(PACKED))
  const packed = length > 0 ? pairs(decoder.decode(data.subarray(0, length))) : undefined
  if (packed) entries.push(...packed)
  return { headers: Object.freeze(Object.fromEntries(entries)), payload: packed ? data.subarray(length) : data }
}

/** Anybody may publish there: what the bus has not packed is left as it is. */
function pairs(json: string): [string, string][] | undefined {
  const value = parsed(json)
  const isPair = (pair: unknown) => Array.isArray(pair) && pair.length === 2 && pair.every((part) => typeof part === 'string')
  return Array.isArray(value) && value.every(isPair) ? (value as [string, string][]) : undefined
}

/** @returns `undefined` when it is no JSON */
export function parsed(json: string): unknown {
  try {
    return JSON.parse(json)
  } catch {
    return undefined
  }
}

/** A `msgId` as the `Nats-Msg-Id`: as it is where a header can carry it. */
export function wireId(msgId: string): string {
  if (PLAIN_ID.test(msgId) && !msgId.startsWith(OWN_IDS) && !msgId.startsWith(ENCODED_IDS)) return msgId
  return ENCODED_IDS + Buffer.from(msgId).toString('base64url')
}

/** The `Nats-Msg-Id` of what the bus itself publishes. */
export function ownId(...parts: readonly (string | number)[]): string {
  return OWN_IDS + parts.join(':')
}

/** A name with dots as one token; no name holds `=`. */
export function tokenOf(name: string): string {
  return name.replaceAll('.', '=')
}

export function nameOf(token: string): string {
  return token.replaceAll('=', '.')
}
