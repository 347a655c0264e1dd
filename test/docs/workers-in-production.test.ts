/** What docs/workers-in-production.md says of shutdown, connections and retries. */

import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import pg from 'pg'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { encode, PostgresBus, Worker } from '../../src/index.ts'
import { startChild } from '../support/child.ts'
import { deferred, eventually } from '../support/wait.ts'
import { type Block, blocksOf } from './document.ts'
import { FreshDatabase, withClient } from './fresh-database.ts'
import { Project, programsOf, root, surroundings } from './programs.ts'

const document = 'docs/workers-in-production.md'
let database: FreshDatabase
let url: string
let text: string
let blocks: Block[]
let project: Project

beforeAll(async () => {
  const around = await surroundings()
  text = await readFile(join(root, document), 'utf8')
  blocks = blocksOf(document, text)
  project = await Project.create(programsOf(blocks, around), around)
  database = await FreshDatabase.make()
  url = database.url
})

afterAll(async () => {
  await project?.[Symbol.asyncDispose]()
  await database?.[Symbol.asyncDispose]()
})

test('SIGTERM lets the handler of the guide end, and the process with it', async () => {
  await using bus = await PostgresBus.connect({ connectionString: url })
  await using worker = startChild(project.path('workers-in-production/worker.ts'), { env: { DATABASE_URL: url } })
  await bus.jobs.enqueue('mail', { payload: encode({ to: 'ann' }) })
  await worker.next((line) => line.text === 'sending to ann')
  worker.signal('SIGTERM')
  await worker.next((line) => line.text === 'sent to ann')
  expect(await worker.exited).toEqual({ code: 0, signal: null })
  expect(await bus.jobs.claim('mail', 'test', 1_000)).toBeNull()
})

test('a handler that outlives the grace loses its job at once: the attempt counts, and after the last one the job is dead', async () => {
  await using bus = await PostgresBus.connect({ connectionString: url })
  await bus.jobs.enqueue('slow', { payload: 'a', maxAttempts: 2 })
  for (const attempt of [1, 2]) {
    const begun = deferred<number>()
    const aborted = deferred<unknown>()
    const worker = new Worker(bus.jobs, 'slow', async (job, signal) => {
      begun.resolve(job.attempt)
      signal.addEventListener('abort', () => aborted.resolve(signal.reason))
      await aborted.promise
    })
    expect(await begun.promise).toBe(attempt)
    await worker.stop({ graceMs: 50 })
    expect(await aborted.promise).toMatchObject({ code: 'closed' })
  }
  const rows = await withClient(url, (client) => client.query("select state, attempts from klieo.job_details where queue = 'slow'"))
  expect(rows.rows).toEqual([{ state: 'dead', attempts: 2 }])
})

test('a bus has the connections of its pool, one to listen, and one more when it responds', async () => {
  const statement = blocks.find(({ language, by }) => language === 'sql' && by)!.code
  const count = () =>
    withClient(url, async (client) => {
      const { rows } = await client.query<{ application_name: string; count: string }>(statement)
      return Object.fromEntries(rows.map((row) => [row.application_name, Number(row.count)]))
    })
  await eventually(async () => expect(await count()).toEqual({}))
  const pool = new pg.Pool({ connectionString: url, max: 4, application_name: 'klieo-bus pool of the test' })
  const bus = await PostgresBus.connect({ pool })
  await Promise.all(Array.from({ length: 20 }, (_, at) => bus.jobs.claimMany(`q${at}`, 'w', 1_000, { limit: 1 })))
  expect(await count()).toEqual({ 'klieo-bus pool of the test': 4, 'klieo-bus listen': 1 })
  const waiting = Promise.allSettled(Array.from({ length: 20 }, (_, at) => bus.jobs.claim(`q${at}`, 'w', 1_000, { waitMs: 20_000 })))
  await bus.requestReply.respond('price', () => '')
  await eventually(async () =>
    expect(await count()).toEqual({ 'klieo-bus pool of the test': 4, 'klieo-bus listen': 1, 'klieo-bus presence': 1 }),
  )
  await eventually(() => pool.idleCount === 4)
  await bus.close()
  await waiting
  await pool.end()
})

test('handlers that hold all connections of the pool keep the heartbeats from theirs: the lease is lost', async () => {
  const lost = async (max: number) => {
    const pool = new pg.Pool({ connectionString: url, max })
    const bus = await PostgresBus.connect({ pool })
    const queue = `held-${max}`
    await bus.jobs.enqueueMany(queue, [{ payload: 'a' }, { payload: 'b' }])
    const results: string[] = []
    const worker = new Worker(
      bus.jobs,
      queue,
      async (_job, signal) => {
        const client = await pool.connect()
        await new Promise((resolve) => setTimeout(resolve, 1_500))
        client.release()
        results.push(signal.aborted ? 'lost' : 'kept')
      },
      { concurrency: 2, leaseTtlMs: 600, onError: () => {} },
    )
    await eventually(() => results.length >= 2)
    await worker.stop()
    await bus.close()
    await pool.end()
    return results
  }
  expect(await lost(4)).toEqual(['kept', 'kept'])
  expect(await lost(2)).toContain('lost')
})

test('the table of attempts is what the pauses add up to', () => {
  const rows = [...text.matchAll(/^\| (\d+)(?: \(default\))? \| ([\d a-z]+) \|$/gm)].map(([, attempts, most]) => [Number(attempts), most])
  expect(rows.map(([attempts]) => attempts)).toEqual([5, 10, 12, 15, 20])
  for (const [attempts, most] of rows as [number, string][]) {
    let seconds = 0
    for (let attempt = 1; attempt < attempts; attempt++) seconds += Math.min(3_600, 2 ** (attempt - 1))
    expect(most).toBe(inWords(seconds))
  }
})

function inWords(seconds: number): string {
  const [h, min, s] = [Math.floor(seconds / 3_600), Math.floor((seconds % 3_600) / 60), seconds % 60]
  if (h > 0) return `${h} h ${min} min`
  return min > 0 ? `${min} min ${s} s` : `${s} s`
}
