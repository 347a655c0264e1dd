/** What the suite skips on a backend is what its `supports` explains, and stands in docs/backends.md: it does not grow unseen. */

import { readFile } from 'node:fs/promises'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { type Bus, type Capabilities, PostgresBus } from '../../src/index.ts'
import { MemoryBus } from '../../src/memory/index.ts'
import { NatsBus } from '../../src/nats/index.ts'
import { whySkipped } from '../../src/testing/conformance/kit.ts'
import { conformance } from '../../src/testing/index.ts'
import { type ConformanceTest, conformanceReport } from '../support/conformance-report.ts'
import { natsServer, whyNoNats } from '../support/nats-server.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'

interface Registered {
  readonly tests: readonly string[]
  readonly skipped: readonly string[]
}

/** What the suite would run on such a backend. */
function registered(supports: Capabilities): Registered {
  const [tests, skipped]: [string[], string[]] = [[], []]
  const runner = {
    describe: (_name: string, body: () => void) => body(),
    test: Object.assign((name: string) => tests.push(name), { skip: (name: string) => skipped.push(name) }),
  }
  conformance(runner, { name: 'any', supports, connect: () => Promise.reject(new Error('nothing is run')) })
  return { tests, skipped }
}

const EVERYTHING: Capabilities = {
  backend: 'any',
  transactions: true,
  persistent: true,
  shared: true,
  watch: true,
  fencing: 'strict',
  jobFencing: 'strict',
  readYourWrites: true,
  priorities: true,
  redeliveryCounts: true,
}

/** By member, as it is named in a skipped test: what it is not to be there. */
const LACKING: Readonly<Record<string, Partial<Capabilities>>> = {
  transactions: { transactions: false },
  watch: { watch: false },
  "fencing: 'strict'": { fencing: 'local' },
  "jobFencing: 'strict'": { jobFencing: 'local' },
  readYourWrites: { readYourWrites: false },
  priorities: { priorities: false },
  redeliveryCounts: { redeliveryCounts: false },
}

const lacks = (supports: Capabilities, lacking: Partial<Capabilities>) =>
  Object.entries(lacking).every(([member, value]) => supports[member as keyof Capabilities] === value)

test('a backend that can do everything skips nothing', () => {
  expect(registered(EVERYTHING).skipped).toEqual([])
})

for (const [member, lacking] of Object.entries(LACKING)) {
  test(`a backend without ${member} skips what needs it, and says so`, () => {
    const { skipped } = registered({ ...EVERYTHING, ...lacking })
    expect(skipped.length).toBeGreaterThan(0)
    expect(skipped.map((name) => whySkipped(name)?.member)).toEqual(skipped.map(() => member))
    const all = new Set(registered(EVERYTHING).tests)
    expect(skipped.map((name) => whySkipped(name)?.name).filter((name) => !all.has(name ?? ''))).toEqual([])
  })
}

const noNats = whyNoNats()

describe.each([
  { backend: 'PostgresBus', missing: undefined },
  { backend: 'MemoryBus', missing: undefined },
  { backend: 'NatsBus', missing: noNats },
])('$backend', ({ backend, missing }) => {
  let supports: Capabilities
  let end = async () => {}

  beforeAll(async () => {
    if (missing !== undefined) return
    const { bus, remove } = await opened(backend)
    supports = bus.supports
    end = async () => {
      await bus.close()
      await remove()
    }
  })

  afterAll(() => end())

  test.skipIf(missing !== undefined)(`skips exactly what its supports explains${missing === undefined ? '' : ` (${missing})`}`, () => {
    const expected = Object.values(LACKING)
      .filter((lacking) => lacks(supports, lacking))
      .flatMap((lacking) => registered({ ...EVERYTHING, ...lacking }).skipped)
    const plain = (names: readonly string[]) => names.map((name) => whySkipped(name)?.name).sort()
    expect(plain(registered(supports).skipped)).toEqual(plain(expected))
  })

  test.skipIf(missing !== undefined)(
    `skips as many tests as docs/backends.md says${missing === undefined ? '' : ` (${missing})`}`,
    async () => {
      const { tests, skipped } = registered(supports)
      const seen = [
        ...tests.map((name): ConformanceTest => ({ backend, name, state: 'passed' })),
        ...skipped.map((name): ConformanceTest => ({ backend, name, state: 'skipped' })),
      ]
      const { lines, unexplained } = conformanceReport(seen, new Map())
      const words = (line: string) => line.replaceAll(/\s+/g, ' ').trim()
      const written = (await readFile(new URL('../../docs/backends.md', import.meta.url), 'utf8')).split('\n').map(words)
      expect(written).toContain(words(lines[1] ?? ''))
      expect(unexplained).toEqual([])
    },
  )
})

async function opened(backend: string): Promise<{ readonly bus: Bus<never>; remove(): Promise<void> }> {
  const nothing = async () => {}
  if (backend === 'MemoryBus') return { bus: MemoryBus.create(), remove: nothing }
  if (backend === 'PostgresBus') {
    const bus = await PostgresBus.connect({ connectionString: databaseUrl(), schema: freshSchema() })
    return { bus: bus as unknown as Bus<never>, remove: nothing }
  }
  const server = await natsServer()
  return { bus: await NatsBus.connect({ servers: server.url }), remove: () => server.remove() }
}

test('a report names a backend that was not run, and what was skipped by anything else', () => {
  const { lines, unexplained } = conformanceReport(
    [
      { backend: 'A', name: 'P1 one', state: 'passed' },
      { backend: 'A', name: 'P1 two (a lacks: watch)', state: 'skipped' },
      { backend: 'A', name: 'P1 three', state: 'skipped' },
    ],
    new Map([['B', 'it is not there']]),
  )
  expect(unexplained).toEqual(['A: P1 three'])
  expect(lines).toEqual([
    'backend  passed  failed  skipped  skipped because `supports` lacks',
    'A             1       0        2  watch 1',
    'B             -       -        -  not run: it is not there',
    '',
    'Skipped where `supports` lacks watch: one test',
    '  P1 two (A)',
    '',
    'Skipped, and not by `supports`:',
    '  A: P1 three',
  ])
})
