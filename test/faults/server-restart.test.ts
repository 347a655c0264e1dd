/** The server goes away and comes back under two processes that use everything the bus has, without a pause. */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { type EmbeddedPostgres, startEmbeddedPostgres } from '../../src/testing/index.ts'
import { type Child, startChild } from '../support/child.ts'
import { session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import type { Kind, Report, Tally } from './support/server/load-child.ts'

const CHILD = new URL('./support/server/load-child.ts', import.meta.url)
const NAMES = ['one', 'two']
/** What a call may be told while the server is away, or because of it. */
const ALLOWED: Readonly<Record<Kind, readonly string[]>> = {
  publish: ['connection'],
  publishOnce: ['connection'],
  stream: ['connection', 'lease_lost'],
  enqueue: ['connection'],
  work: ['connection', 'lease_lost'],
  put: ['connection'],
  cas: ['connection', 'cas_conflict'],
  lease: ['connection', 'lease_held'],
  request: ['connection', 'timeout', 'not_found'],
  watch: [],
}
/** The rule: five seconds after the server is up everything goes on. */
const GOES_ON_MS = 5_000

let server: EmbeddedPostgres
beforeAll(async () => {
  server = await startEmbeddedPostgres()
})
afterAll(() => server.stop('immediate'))

async function status(child: Child): Promise<Record<Kind, Tally>> {
  child.send('status')
  return (await child.next(({ status: told }) => told !== undefined)).status as Record<Kind, Tally>
}

/** Resolves once every interface of every process has succeeded with something begun after `since`. */
async function allGoOn(children: readonly Child[], since: number, timeoutMs: number): Promise<void> {
  await eventually(
    async () => {
      for (const [index, child] of children.entries()) {
        for (const [kind, { lastOk }] of Object.entries(await status(child))) {
          if (lastOk <= since) throw new Error(`${kind} of process ${NAMES[index]} has not gone on`)
        }
      }
    },
    { timeoutMs, everyMs: 50, what: 'all going on' },
  )
}

describe('a server that goes away under load', () => {
  test('P1 P3 P12 R4 K1 K5 J1 J3 stopped or killed, three times: all four interfaces go on within 5 s, and nothing acknowledged is lost', async () => {
    const { connectionString } = server
    const schema = 'load'
    await (await PostgresBus.connect({ connectionString, schema })).close()
    await using one = startChild(CHILD, { args: [connectionString, schema, 'one'] })
    await using two = startChild(CHILD, { args: [connectionString, schema, 'two'] })
    const children = [one, two]
    await Promise.all(children.map((child) => child.next(({ ready }) => ready === true)))
    await allGoOn(children, 0, 20_000)
    for (const way of ['stop', 'kill', 'kill'] as const) {
      if (way === 'kill') await server.kill()
      await server.restart()
      await allGoOn(children, Date.now(), GOES_ON_MS)
    }

    for (const child of children) child.send('settle')
    await Promise.all(children.map((child) => child.next(({ settled }) => settled === true)))
    const tallies = await Promise.all(children.map(status))
    const reports = await eventually(
      async () => {
        const told: Report[] = []
        for (const child of children) {
          child.send('report')
          told.push((await child.next(({ report }) => report !== undefined)).report as Report)
        }
        const missing = (wanted: (report: Report) => readonly string[], got: (report: Report) => readonly string[]) => {
          const there = new Set(told.flatMap(got))
          return told.flatMap(wanted).filter((payload) => !there.has(payload))
        }
        expect(
          missing(
            ({ published, publishedOnce }) => [...published, ...publishedOnce],
            ({ received }) => received,
          ),
        ).toEqual([])
        expect(
          missing(
            ({ enqueued }) => enqueued,
            ({ handled }) => handled,
          ),
        ).toEqual([])
        return told
      },
      { timeoutMs: 20_000, everyMs: 200, what: 'what was published and enqueued' },
    )
    for (const tally of tallies) {
      for (const [kind, { codes }] of Object.entries(tally) as [Kind, Tally][]) {
        for (const code of Object.keys(codes)) expect(['ok', ...ALLOWED[kind]], `${kind}: ${code}`).toContain(code)
      }
    }
    expect(reports.flatMap(({ wrongs }) => wrongs)).toEqual([])
    expect(reports.every(({ published, enqueued, increments }) => published.length > 0 && enqueued.length > 0 && increments > 0)).toBe(true)
    const fences = reports.flatMap((report) => report.fences)
    expect(new Set(fences).size).toBe(fences.length)
    for (const report of reports) expect(report.fences).toEqual(report.fences.toSorted((a, b) => a - b))

    await using client = await session(connectionString)
    const { rows: twice } = await client.query(
      `select convert_from(payload, 'UTF8') as payload from ${schema}.messages
       where payload like '%-once-%' group by payload having count(*) > 1`,
    )
    expect(twice).toEqual([])
    await using bus = await PostgresBus.connect({ connectionString, schema, maintenance: false })
    for (const [index, { lastPut }] of reports.entries()) {
      const entry = await bus.kv.get('load', NAMES[index]!)
      expect(entry!.revision).toBeGreaterThanOrEqual(lastPut.revision)
      expect(Number(new TextDecoder().decode(entry!.value))).toBeGreaterThanOrEqual(lastPut.value)
    }
    const counter = Number(new TextDecoder().decode((await bus.kv.get('load', 'counter'))!.value))
    const sum = (of: (report: Report) => number) => reports.reduce((total, report) => total + of(report), 0)
    expect(counter).toBeGreaterThanOrEqual(sum(({ increments }) => increments))
    expect(counter).toBeLessThanOrEqual(sum(({ increments, perhapsIncremented }) => increments + perhapsIncremented))

    for (const child of children) child.send('close')
    for (const child of children) {
      expect(await child.exited).toEqual({ code: 0, signal: null })
      expect(child.stderr).toBe('')
    }
  }, 90_000)
})
