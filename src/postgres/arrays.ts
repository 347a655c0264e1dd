/**
 * Batches as parameters that every driver can send: a text that the statement casts (`$1::text::bigint[]`), and one bytea
 * with all payloads, which the functions cut up again. A driver's own array and bytea[] support differs too much between
 * clients to be used in a caller's transaction, and sends bytes as hexadecimal text.
 */

/** Batches of acks under way at once: while one waits for the disk the next is gathered and sent. */
export const ACKS_AT_ONCE = 2

type Element = string | number | null

/** A Postgres array literal. */
export function pgArray(elements: readonly Element[]): string {
  return `{${elements.map(element).join(',')}}`
}

function element(value: Element): string {
  if (value === null) return 'NULL'
  if (typeof value === 'number') return String(value)
  return `"${value.replaceAll('\\', '\\\\').replaceAll('"', '\\"')}"`
}

/** `null`, which the functions take for "all defaults", when no element differs from the default. */
export function pgArrayOrNull<T extends Element>(elements: readonly T[], standard: T): string | null {
  return elements.every((value) => value === standard) ? null : pgArray(elements)
}

/** The same bytes as the kind that every driver sends as bytea. */
export function asBuffer(bytes: Uint8Array): Buffer {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
}

/**
 * What `encode(…, 'base64')` answered. pg reads every field as text, so bytes cannot come as they are; as base64 they are two thirds of
 * the hexadecimal that bytea comes in, and cheaper to decode.
 */
export function fromBase64(text: string): Uint8Array {
  return new Uint8Array(Buffer.from(text, 'base64'))
}

export interface PackedPayloads {
  readonly bytes: Buffer
  /** Positions count from 1. */
  readonly starts: string
  readonly lengths: string
}

export function packPayloads(payloads: readonly Uint8Array[]): PackedPayloads {
  let start = 1
  const starts = payloads.map((payload) => {
    const own = start
    start += payload.byteLength
    return own
  })
  const only = payloads.length === 1 ? payloads[0] : undefined
  const bytes = only ? asBuffer(only) : Buffer.concat(payloads)
  return { bytes, starts: pgArray(starts), lengths: pgArray(payloads.map((payload) => payload.byteLength)) }
}
