import { BusError } from './errors.ts'

const encoder = new TextEncoder()
const decoder = new TextDecoder('utf-8', { fatal: true })

/**
 * A JSON value as bytes.
 * @throws invalid_argument for what JSON cannot hold: undefined, functions, cycles, BigInt
 */
export function encode(value: unknown): Uint8Array {
  let text: string | undefined
  try {
    text = JSON.stringify(value)
  } catch (cause) {
    throw new BusError('invalid_argument', 'value cannot be written as JSON: it holds a cycle or a BigInt', { cause })
  }
  if (text === undefined) throw new BusError('invalid_argument', `value (${typeof value}) cannot be written as JSON`)
  return encoder.encode(text)
}

/**
 * The JSON value in a payload.
 * @throws invalid_argument when it is not JSON in UTF-8
 */
export function decode<T = unknown>(payload: Uint8Array | string): T {
  try {
    return JSON.parse(typeof payload === 'string' ? payload : decoder.decode(payload)) as T
  } catch (cause) {
    throw new BusError('invalid_argument', 'payload is not JSON in UTF-8', { cause })
  }
}
