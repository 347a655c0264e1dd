/**
 * Standard input, a line at a time, as bytes: a payload need not be text. A line ends with a newline, or carriage return and newline. What
 * stands after the last newline may be half a line of a program that died, so it is told apart.
 */

const NEWLINE = 0x0a
const RETURN = 0x0d

export interface Line {
  readonly bytes: Uint8Array
  /** From 1. */
  readonly number: number
  /** `too-long`: longer than allowed, `bytes` is empty and nothing follows. `partial`: input ended before its newline. */
  readonly problem?: 'too-long' | 'partial'
}

export async function* linesOf(input: AsyncIterable<Uint8Array>, maxBytes: number): AsyncGenerator<Line> {
  let count = 0
  let begun: Uint8Array[] = []
  let size = 0
  for await (const chunk of input) {
    let from = 0
    for (let end = chunk.indexOf(NEWLINE); end >= 0; end = chunk.indexOf(NEWLINE, from)) {
      const bytes = withoutReturn(joined(begun, chunk.subarray(from, end)))
      begun = []
      size = 0
      from = end + 1
      count++
      if (bytes.byteLength > maxBytes) return yield { bytes: new Uint8Array(), number: count, problem: 'too-long' }
      yield { bytes, number: count }
    }
    if (from === chunk.byteLength) continue
    begun.push(chunk.subarray(from))
    size += chunk.byteLength - from
    // One more: a carriage return that does not count.
    if (size > maxBytes + 1) return yield { bytes: new Uint8Array(), number: count + 1, problem: 'too-long' }
  }
  if (size > 0) yield { bytes: joined(begun, new Uint8Array()), number: count + 1, problem: 'partial' }
}

function joined(begun: readonly Uint8Array[], last: Uint8Array): Uint8Array {
  return begun.length === 0 ? last : Buffer.concat([...begun, last])
}

function withoutReturn(line: Uint8Array): Uint8Array {
  return line.at(-1) === RETURN ? line.subarray(0, -1) : line
}
