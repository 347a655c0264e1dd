/** What is for people only: colours, questions, the progress bar. A terminal is made by `script` of util-linux. */

import { execFileSync } from 'node:child_process'
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { beforeAll, describe, expect, test } from 'vitest'
import { wantsColour } from '../../src/cli/output.ts'
import { progressLine } from '../../src/cli/progress.ts'
import { tableLines } from '../../src/cli/table.ts'
import { clip, duration, printable, width } from '../../src/cli/text.ts'
import { PostgresBus } from '../../src/index.ts'
import { NODE } from '../support/child.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { build, directory, klieo, MAIN, shell } from './command.ts'

const schema = freshSchema()
const env = { DATABASE_URL: databaseUrl(), KLIEO_SCHEMA: schema, TERM: 'xterm' }
const ESC = '\x1b'

const hasScript = (() => {
  try {
    return /util-linux/.test(execFileSync('script', ['--version'], { encoding: 'utf8' }))
  } catch {
    return false
  }
})()

beforeAll(async () => {
  await build()
  await PostgresBus.migrate({ connectionString: databaseUrl(), schema })
}, 60_000)

/** Runs it on a terminal; what it shows is on standard output. */
async function onTerminal(command: string, more: Record<string, string> = {}): Promise<{ code: number | null; stdout: string }> {
  const line = `"${NODE}" "${MAIN}" ${command}`
  return shell(`script --quiet --return --command "$LINE" /dev/null`, { env: { ...env, ...more, LINE: line } })
}

describe.skipIf(!hasScript)('on a terminal', () => {
  test('heads of tables are bold, and plain with NO_COLOR, in a pipe and with --json', async () => {
    await klieo(['enqueue', 'coloured', 'x'], { env })
    expect((await onTerminal('queues')).stdout).toContain(`${ESC}[1mqueue`)
    expect((await onTerminal('queues', { NO_COLOR: '1' })).stdout).not.toContain(ESC)
    expect((await onTerminal('queues --json')).stdout).not.toContain(ESC)
    expect((await klieo(['queues'], { env: { ...env, FORCE_COLOR: '1' } })).stdout).not.toContain(ESC)
  })

  test('lines of a file are enqueued with a progress bar, which is gone at the end', async () => {
    await using place = await directory()
    const file = join(place.path, 'lines')
    await writeFile(file, Array.from({ length: 3_000 }, (_, at) => `${at}\n`).join(''))
    const { stdout, code } = await onTerminal(`enqueue bar < ${file}`)
    expect(code).toBe(0)
    expect(stdout).toMatch(/█+░+ \d+% {2}[\d,]+ jobs/)
    expect(stdout.trim().endsWith('3,000 jobs enqueued in "bar"')).toBe(true)
    expect((await shell(`klieo-bus enqueue bar < ${file}`, { env })).stderr).toBe('')
  })

  test('a purge asks, and does nothing without a yes', async () => {
    await klieo(['enqueue', 'asked', 'x', 'y'], { env })
    const answer = (text: string) =>
      shell(`{ sleep 2; echo ${text}; sleep 3; } | script --quiet --return --command "$LINE" /dev/null`, {
        env: { ...env, LINE: `"${NODE}" "${MAIN}" queues purge asked` },
      })
    const no = await answer('n')
    expect(no.code).toBe(1)
    expect(no.stdout).toContain('Remove the ready, scheduled, dead jobs of queue "asked" for good? [y/N]')
    expect(no.stdout).toContain('nothing was removed')
    expect((await answer('y')).stdout).toContain('2 jobs removed from "asked"')
  })

  test('a value is shown on a terminal, and is as it was written elsewhere', async () => {
    const value = `a${ESC}[2J\tb\n\x9b31mc`
    await klieo(['kv', 'put', 'shown', 'text'], { env, input: value })
    await klieo(['kv', 'put', 'shown', 'bytes'], { env, input: new Uint8Array([0xff, 0x1b]) })
    expect((await onTerminal('kv get shown text')).stdout).toBe('a\\u001b[2J\tb\r\n\\u009b31mc\r\n')
    expect((await onTerminal('kv get shown bytes')).stdout).toBe('(2 bytes that are no text)\r\n')
    expect((await klieo(['kv', 'get', 'shown', 'text'], { env })).stdout).toBe(value)
  })

  test('a payload that is missing is asked for, not waited for in silence', async () => {
    const { code, stdout } = await onTerminal('publish a.b')
    expect(code).toBe(2)
    expect(stdout).toContain("a payload is missing: give it as an argument ('' for an empty one) or on standard input")
  })
})

test('colours are for a terminal that knows them and whose owner has not said no', () => {
  expect(wantsColour(true, {})).toBe(true)
  expect(wantsColour(true, { NO_COLOR: '' })).toBe(true)
  expect(wantsColour(true, { NO_COLOR: '0' })).toBe(false)
  expect(wantsColour(true, { TERM: 'dumb' })).toBe(false)
  expect(wantsColour(false, { FORCE_COLOR: '1' })).toBe(false)
})

describe('texts', () => {
  test('a table is as wide as its content, cuts what may be cut, and shows no control character', () => {
    const columns = [
      { title: 'id', right: true, cell: (row: readonly string[]) => row[0]! },
      { title: 'error', flexible: true, cell: (row: readonly string[]) => row[1]! },
    ]
    const rows = [
      ['1', 'short'],
      ['100', `a${ESC}[2J long one that goes on`],
    ]
    expect(tableLines(columns, rows, Number.POSITIVE_INFINITY)).toEqual([
      ' id  error',
      '  1  short',
      '100  a\\u001b[2J long one that goes on',
    ])
    expect(tableLines(columns, rows, 20)).toEqual([' id  error', '  1  short', '100  a\\u001b[2J lon…'])
  })

  test('wide and combined characters are counted as they are shown', () => {
    expect(width('abc')).toBe(3)
    expect(width('日本')).toBe(4)
    expect(width('e\u0301')).toBe(1)
    expect(width('👩‍👩‍👧')).toBe(2)
    expect(clip('日本語', 5)).toBe('日本…')
  })

  test('what others wrote cannot move the cursor or turn the text around', () => {
    expect(printable(`a\tb\nc\r${ESC}]0;title\x07\u202e\u009b`)).toBe('a\\tb\\nc\\r\\u001b]0;title\\u0007\\u202e\\u009b')
  })

  test('durations and progress', () => {
    expect([0, 999, 61_000, 3_600_000, 90_061_000].map(duration)).toEqual(['0s', '0s', '1m 1s', '1h', '1d 1h'])
    expect(progressLine(1_500, 'jobs', 500)).toBe('1,500 jobs, 3,000/s')
    expect(progressLine(50, 'jobs', 100, 0.5)).toBe(`${'█'.repeat(12)}${'░'.repeat(12)} 50%  50 jobs, 500/s`)
  })
})
