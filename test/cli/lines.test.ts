import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { type Line, linesOf } from '../../src/cli/lines.ts'
import { nearest } from '../../src/cli/nearest.ts'
import { durationOf, headersOf, startOf, timeOf } from '../../src/cli/values.ts'

async function read(chunks: readonly Uint8Array[], maxBytes = 1_000): Promise<Line[]> {
  async function* input() {
    yield* chunks
  }
  const lines: Line[] = []
  for await (const line of linesOf(input(), maxBytes)) lines.push(line)
  return lines
}

const bytes = (text: string) => Buffer.from(text)
const shown = (lines: readonly Line[]) =>
  lines.map(({ bytes: line, problem }) => `${Buffer.from(line).toString('latin1')}${problem ? `!${problem}` : ''}`)

describe('standard input by lines', () => {
  test('gives the same lines however its bytes arrive', async () => {
    const input = fc.uint8Array({ maxLength: 60 }).map((all) => all.map((byte) => (byte % 4 === 0 ? 0x0a : byte % 4 === 1 ? 0x0d : byte)))
    await fc.assert(
      fc.asyncProperty(input, fc.array(fc.nat(60), { maxLength: 8 }), async (all, cuts) => {
        const places = [0, ...cuts.filter((cut) => cut < all.length).sort((a, b) => a - b), all.length]
        const chunks = places.slice(1).map((end, at) => all.subarray(places[at], end))
        const text = Buffer.from(all).toString('latin1')
        const whole = text.split('\n')
        const last = whole.pop()!
        const wanted = [...whole.map((line) => line.replace(/\r$/, '')), ...(last === '' ? [] : [`${last}!partial`])]
        expect(shown(await read(chunks))).toEqual(wanted)
      }),
    )
  })

  test('numbers them from 1, and ends at one that is too long, wherever that becomes known', async () => {
    const short = bytes('ab\n')
    expect(await read([short, bytes('abcd\n'), short], 3)).toEqual([
      { bytes: bytes('ab'), number: 1 },
      { bytes: new Uint8Array(), number: 2, problem: 'too-long' },
    ])
    expect(shown(await read([bytes('abc'), bytes('de')], 3))).toEqual(['!too-long'])
    expect(shown(await read([bytes('abc\r'), bytes('\n')], 3))).toEqual(['abc'])
    expect(shown(await read([bytes('abc\r\n')], 3))).toEqual(['abc'])
    expect(shown(await read([bytes('abcd')], 3))).toEqual(['abcd!partial'])
  })
})

test('durations, times, headers and places of the log are read as they are written, and nothing else', () => {
  expect(['0s', '1ms', '1.5s', '2m', '1h', '24d'].map((text) => durationOf('--ttl', text))).toEqual([
    0, 1, 1_500, 120_000, 3_600_000, 2_073_600_000,
  ])
  for (const text of ['', '5', 's', '-1s', '1 s', '1w', '1e3s', '25d', '١s'])
    expect(() => durationOf('--ttl', text), text).toThrow('--ttl is a duration')
  expect(timeOf('--at', '2026-01-31').toISOString()).toBe('2026-01-31T00:00:00.000Z')
  expect(timeOf('--at', '2026-01-31T12:00+01:00').toISOString()).toBe('2026-01-31T11:00:00.000Z')
  for (const text of ['2026', '2026-01-31T12:00', '2026-02-31T99:00Z', '1700000000', 'now'])
    expect(() => timeOf('--at', text), text).toThrow('--at is a time')
  expect(headersOf(['a:b', 'c: d:e', 'f:'])).toEqual({ a: 'b', c: 'd:e', f: '' })
  expect(() => headersOf([':x'])).toThrow('NAME:VALUE')
  expect(startOf('--start', '7')).toEqual({ seq: 7 })
  expect(startOf('--start', '2026-01-31')).toEqual({ time: new Date('2026-01-31') })
  for (const text of ['', 'last', '-1', '1.5']) expect(() => startOf('--start', text), text).toThrow('--start is all, new')
})

test('a word that was mistyped is recognised, one that was not meant is not', () => {
  const words = ['publish', 'subscribe', 'up', 'kv']
  expect(['pubish', 'pulbish', 'publishs', 'subscrbe', 'uo'].map((word) => nearest(word, words))).toEqual([
    'publish',
    'publish',
    'publish',
    'subscribe',
    'up',
  ])
  expect(['frobnicate', 'work', 'x'].map((word) => nearest(word, words))).toEqual([undefined, undefined, undefined])
})
