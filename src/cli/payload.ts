/** Payloads come as an argument or, as bytes, from standard input. */

import { fstatSync } from 'node:fs'
import type { OptionSpecs } from './command.ts'
import { EXIT, Failure, UsageError } from './failure.ts'
import type { Output } from './output.ts'
import { number, shownLines } from './text.ts'

export const DEFAULT_MAX_PAYLOAD = 1_048_576
export const LARGEST_PAYLOAD = 8_388_608

export const MAX_PAYLOAD_OPTION = {
  'max-payload': {
    type: 'integer',
    value: 'BYTES',
    description: 'the limit of payload and headers together, as maxPayloadBytes of the app',
    default: String(DEFAULT_MAX_PAYLOAD),
    least: 1,
    most: LARGEST_PAYLOAD,
  },
} as const satisfies OptionSpecs

export const HEADER_OPTION = {
  header: { type: 'text', short: 'H', value: 'NAME:VALUE', description: 'a header', multiple: true },
} as const satisfies OptionSpecs

export const PAYLOAD_ARGUMENT = {
  description: 'what it carries; - or none: standard input, all of it',
  optional: true,
} as const

/** @throws UsageError for a directory, which Node takes for an empty file */
export function standardInput(): NodeJS.ReadStream {
  if (fstatSync(0).isDirectory()) throw new UsageError('standard input is a directory', { seeHelp: false })
  return process.stdin
}

/**
 * The argument's text, or everything on standard input.
 * @throws UsageError on a terminal without an argument, where waiting in silence would look like work
 */
export async function payloadOf(argument: string | undefined, maxBytes: number): Promise<string | Uint8Array> {
  if (argument !== undefined && argument !== '-') return argument
  if (argument === undefined && process.stdin.isTTY) {
    throw new UsageError(`a payload is missing: give it as an argument ('' for an empty one) or on standard input`)
  }
  const chunks: Buffer[] = []
  let size = 0
  for await (const chunk of standardInput() as AsyncIterable<Buffer>) {
    chunks.push(chunk)
    size += chunk.byteLength
    if (size > maxBytes) {
      throw new Failure(EXIT.failed, `standard input holds more than ${number(maxBytes)} bytes, the limit of a payload [payload_too_large]`)
    }
  }
  return Buffer.concat(chunks)
}

/** Byte for byte. A terminal is shown what they are: what others wrote must not move its cursor; and its prompt begins on a line of its own. */
export async function writeBytes(output: Output, bytes: Uint8Array): Promise<void> {
  if (!output.isTerminal) return output.write(bytes)
  const lines = shownLines(bytes)
  await output.write(lines.endsWith('\n') ? lines : `${lines}\n`)
}
