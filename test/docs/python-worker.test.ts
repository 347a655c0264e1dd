/** The worker of docs/python-worker.md, as it stands there: beside others, killed, told to stop, too late. */

import { spawn } from 'node:child_process'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import pg from 'pg'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { PostgresBus, Worker } from '../../src/index.ts'
import { Child } from '../support/child.ts'
import { eventually } from '../support/wait.ts'
import { FreshDatabase } from './fresh-database.ts'
import { blocksOf, document, findPython } from './psql.ts'

const text = await document('python-worker.md')
const python = await findPython()
const LEASE_MS = 900

let database: FreshDatabase
let directory: string
let file: string
let client: pg.Client
/** Holds the table that the handler writes to, so that the handler takes as long as the test likes. */
let obstacle: pg.Client
let workers: Child[] = []

beforeAll(async () => {
  database = await FreshDatabase.make()
  directory = await mkdtemp(join(tmpdir(), 'klieo-python-'))
  file = join(directory, 'worker.py')
  await writeFile(file, blocksOf(text, 'python')[0]!.code)
  ;[client, obstacle] = [new pg.Client({ connectionString: database.url }), new pg.Client({ connectionString: database.url })]
  await Promise.all([client.connect(), obstacle.connect()])
  await client.query(blocksOf(text, 'sql')[0]!.code)
})

afterAll(async () => {
  await Promise.all([client?.end(), obstacle?.end()])
  await database?.[Symbol.asyncDispose]()
  await rm(directory, { recursive: true, force: true })
})

beforeEach(() => client.query('truncate receipts'))

afterEach(async () => {
  await obstacle.query('rollback')
  await Promise.all(workers.map((worker) => worker.kill()))
  workers = []
  await client.query(`delete from klieo.jobs`)
})

async function start(env: Readonly<Record<string, string>> = {}): Promise<Child> {
  const worker = new Child(
    spawn(python!, [file], { env: { ...process.env, DATABASE_URL: database.url, LEASE_MS: String(LEASE_MS), ...env } }),
    file,
  )
  workers.push(worker)
  await says(worker, 'ready')
  return worker
}

const says = (worker: Child, what: string) => worker.next((line) => typeof line.text === 'string' && line.text.startsWith(what))
const enqueue = async (order: number | string, more = ''): Promise<string> =>
  (await client.query(`select klieo.enqueue('receipts', convert_to($1, 'utf8')${more}) as id`, [`{"order": ${order}}`])).rows[0].id
const receipts = async (): Promise<number[]> =>
  (await client.query('select order_id from receipts order by 1')).rows.map(({ order_id: id }) => Number(id))
const jobs = async () => (await client.query(`select id, state, attempts, last_error from klieo.job_details order by id`)).rows
const hinder = () => obstacle.query('begin; lock table receipts in exclusive mode')
/** So many handlers wait behind the obstacle. */
const isHandling = (handlers = 1) =>
  eventually(
    async () => (await client.query(`select from pg_locks where not granted and relation = 'receipts'::regclass`)).rowCount === handlers,
    { what: 'the handlers' },
  )

describe.skipIf(python === undefined)('the worker in Python (skipped without python3 and psycopg)', () => {
  test('writes what it is told to, each once, beside another one and a Worker of the package', async () => {
    await Promise.all([start(), start()])
    await using bus = await PostgresBus.connect({ connectionString: database.url })
    await using _worker = new Worker(bus.jobs, 'receipts', async (job) => {
      const { order } = JSON.parse(new TextDecoder().decode(job.payload)) as { order: number }
      const own = new pg.Client({ connectionString: database.url })
      await own.connect()
      try {
        await own.query('begin')
        await own.query('insert into receipts (order_id) values ($1)', [order])
        await job.ack({ tx: own })
        await own.query('commit')
      } finally {
        await own.end()
      }
    })
    const orders = Array.from({ length: 60 }, (_, n) => n + 1)
    // Until each has one: else whoever is quicker might do them all.
    await hinder()
    for (const order of orders) await enqueue(order)
    await isHandling(3)
    await obstacle.query('rollback')
    await eventually(async () => (await jobs()).length === 0, { what: 'the last job', timeoutMs: 20_000 })
    expect(await receipts()).toEqual(orders)
    await Promise.all(workers.map((worker) => says(worker, 'done')))
  })

  test('J3 killed in the middle of a job it loses it, and another one does it: its receipt is there once', async () => {
    const first = await start()
    await hinder()
    const id = await enqueue(1)
    await isHandling()
    await first.kill('SIGKILL')
    await obstacle.query('rollback')
    await says(await start(), `done ${id} attempt 2`)
    expect(await receipts()).toEqual([1])
    expect(await jobs()).toEqual([])
  })

  test('heartbeats keep a job that takes longer than the lease', async () => {
    // Long enough for a machine that is busy with other things.
    const leaseMs = 3 * LEASE_MS
    const worker = await start({ LEASE_MS: String(leaseMs) })
    await hinder()
    const id = await enqueue(1)
    await isHandling()
    const [{ leased_until: first }] = (await client.query('select leased_until from klieo.job_details')).rows
    // Three leases later, by the clock of the server.
    await eventually(
      async () => {
        const claimed = await client.query(`select * from klieo.claim('receipts', 'rival')`)
        expect(claimed.rowCount).toBe(0)
        return (
          await client.query(`select clock_timestamp() > $1::timestamptz + $2 * interval '1 millisecond' as over`, [first, 2 * leaseMs])
        ).rows[0].over
      },
      { what: 'three leases' },
    )
    await obstacle.query('rollback')
    await says(worker, `done ${id} attempt 1`)
    expect(await receipts()).toEqual([1])
  })

  test('J6 too late with its ack it is refused, and its receipt is rolled back', async () => {
    const worker = await start()
    await hinder()
    const id = await enqueue(1)
    await isHandling()
    worker.pause()
    const rival = await eventually(
      async () => (await client.query(`select id, token from klieo.claim('receipts', 'rival', 60000)`)).rows[0] ?? false,
      {
        what: 'the end of the lease',
      },
    )
    expect(rival.id).toBe(id)
    await obstacle.query('rollback')
    worker.resume()
    await says(worker, `lost ${id}`)
    expect(await receipts()).toEqual([])
    expect(await jobs()).toMatchObject([{ id, state: 'running', attempts: 2 }])
    expect((await client.query('select klieo.ack($1, $2) as done', [id, rival.token])).rows[0].done).toBe(true)
    // And goes on with the next one.
    const next = await enqueue(2)
    await says(worker, `done ${next} attempt 1`)
  })

  test('J4 what its handler raises is in last_error, and after the last attempt in the dead letter', async () => {
    const worker = await start()
    const [wrong, twice] = [await enqueue('?', ', max_attempts => 1'), await enqueue(1)]
    await says(worker, `failed ${wrong} attempt 1`)
    await says(worker, `done ${twice}`)
    const again = await enqueue(1)
    await says(worker, `failed ${again} attempt 1`)
    const [dead, waiting] = await jobs()
    expect(dead).toMatchObject({ id: wrong, state: 'dead', attempts: 1 })
    expect(dead.last_error).toContain('Expecting value')
    expect(waiting).toMatchObject({ id: again, attempts: 1 })
    expect(waiting.last_error).toContain('duplicate key')
    const { rows } = await client.query(`select headers->>'dlq_error' as error from klieo.message_details where subject = 'receipts.dlq'`)
    expect(rows).toEqual([{ error: dead.last_error }])
  })

  test('an error of the database that leaves the connection is a failure like any other', async () => {
    const worker = await start({ PGOPTIONS: '-c lock_timeout=100ms' })
    await hinder()
    const id = await enqueue(1)
    await says(worker, `failed ${id} attempt 1`)
    await obstacle.query('rollback')
    expect((await jobs())[0]!.last_error).toContain('lock timeout')
    await says(worker, `done ${id}`)
    expect(await receipts()).toEqual([1])
  })

  test.each(['SIGTERM', 'SIGINT'] as const)('told by %s to stop it finishes its job, begins no other and exits with 0', async (signal) => {
    const worker = await start()
    await hinder()
    const id = await enqueue(1)
    await isHandling()
    const next = await enqueue(2)
    worker.signal(signal)
    await obstacle.query('rollback')
    expect(await worker.exited).toEqual({ code: 0, signal: null })
    expect(worker.unread()).toContainEqual({ text: `done ${id} attempt 1` })
    expect(await receipts()).toEqual([1])
    expect(await jobs()).toMatchObject([{ id: next, attempts: 0 }])
  })

  test('told to stop while it has nothing to do it exits with 0 at once', async () => {
    const worker = await start()
    expect(await worker.kill('SIGTERM')).toEqual({ code: 0, signal: null })
  })

  test('it ends with an error when its connection is cut, and its job comes back', async () => {
    const worker = await start()
    await hinder()
    const id = await enqueue(1)
    await isHandling()
    await client.query(
      `select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid in (select pid from pg_locks where not granted)`,
    )
    expect((await worker.exited).code).toBe(1)
    await obstacle.query('rollback')
    await says(await start(), `done ${id} attempt 2`)
    expect(await receipts()).toEqual([1])
  })
})
