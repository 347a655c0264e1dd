/**
 * A dump restored into another cluster, whose transaction ids begin anew: every stored snapshot is then of a future that will
 * not come. Two clusters of an installed Postgres, because a dump needs its tools; without them the tests are skipped.
 */

import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import pg from 'pg'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { fetchIn } from './support/fetching.ts'
import { findInstalled, type InstalledServer, runTool, startInstalled } from './support/installed-postgres.ts'
import { next, type PgMsg, take, takeUntil, text } from './support/reading.ts'

const installed = await findInstalled()
/** In flight at the dump, so handed out again so long after at the most. */
const ACK_WAIT_MS = 2_000
const SUBJECT = 'restored'
const numbers = (from: number, to: number) => Array.from({ length: to - from }, (_, n) => `${from + n}`)

let source: InstalledServer
let directory: string

beforeAll(async () => {
  if (installed === undefined) return
  source = await startBusy()
  directory = await mkdtemp(join(tmpdir(), 'klieo-dump-'))
})

afterAll(async () => {
  await source?.stop()
  if (directory) await rm(directory, { recursive: true, force: true })
})

const burn = (client: Session) => client.query('do $$ begin for n in 1..5000 loop perform pg_current_xact_id(); commit; end loop; end $$')

/** So many transactions ahead that no restore catches up. */
async function startBusy(): Promise<InstalledServer> {
  const server = await startInstalled(installed as string)
  await using client = await session(server.connectionString)
  await burn(client)
  return server
}

const connect = (server: InstalledServer, schema: string) =>
  PostgresBus.connect({ connectionString: server.connectionString, schema, pollIntervalMs: 50 })

async function copy(from: InstalledServer, target: InstalledServer, schema: string): Promise<void> {
  const file = join(directory, `${schema}.dump`)
  await runTool(installed as string, 'pg_dump', ['-Fc', '-n', schema, '-f', file, from.connectionString])
  await runTool(installed as string, 'pg_restore', ['--exit-on-error', '-d', target.connectionString, file])
}

/** Puts a copy of the schema in another cluster where the source was, under the feet of whoever is connected. */
async function exchange(server: InstalledServer, schema: string): Promise<InstalledServer> {
  const target = await startInstalled(installed as string)
  await copy(server, target, schema)
  const { port, connectionString } = server
  await server.stop()
  // The password is the new cluster's own, and the bus knows only the old one.
  await using client = await session(target.connectionString)
  await client.query(`alter role postgres password '${decodeURIComponent(new URL(connectionString).password)}'`)
  await target.moveTo(port)
  return target
}

async function hold(stream: Awaited<ReturnType<PostgresBus['pubsub']['subscribe']>>, count: number): Promise<PgMsg[]> {
  const held: PgMsg[] = []
  while (held.length < count) held.push(await next(stream))
  return held
}

/** Reads and acks so many; the attempt with which each came. */
async function attempts(stream: Awaited<ReturnType<PostgresBus['pubsub']['subscribe']>>, count: number): Promise<Map<string, number>> {
  const came = new Map<string, number>()
  for (let n = 0; n < count; n++) {
    const message = await next(stream, 10_000, `message ${n + 1} of ${count} (so far: ${[...came.keys()].join(', ')})`)
    expect(came.has(text(message))).toBe(false)
    came.set(text(message), message.attempt)
    await message.ack()
  }
  return came
}

describe.skipIf(installed === undefined)('a database restored from a dump', () => {
  test('P4 P9 what was acked stays so, what was in flight comes again, what was unread comes, and so does what is new', async () => {
    const schema = 'halves'
    await using bus = await connect(source, schema)
    const publish = async (from: number, to: number) => {
      for (const payload of numbers(from, to)) await bus.pubsub.publish(SUBJECT, payload)
    }
    const subscribe = (durable: string, maxInFlight = 256) =>
      bus.pubsub.subscribe(SUBJECT, durable, { ackWaitMs: ACK_WAIT_MS, maxInFlight })
    await (await subscribe('never-read')).close()
    // Its pages are full: the window they are cut from is open when the dump is made.
    const halves = await subscribe('halves', 10)
    const done = await subscribe('done')
    await publish(0, 30)
    await bus.pubsub.publish('elsewhere', 'for nobody')
    await (await bus.pubsub.subscribe(SUBJECT, 'newcomer', { start: 'new' })).close()
    await using open = await session(source.connectionString)
    await open.query('begin')
    await bus.pubsub.publish(SUBJECT, 'uncommitted', { tx: open })
    await publish(30, 40)
    expect(await take(halves, 10)).toEqual(numbers(0, 10))
    expect((await hold(halves, 10)).map(text)).toEqual(numbers(10, 20))
    expect((await take(done, 40)).length).toBe(40)
    const revision = await bus.kv.put('settings', 'colour', 'red')
    const job = await bus.jobs.enqueue('work', { payload: 'job', dedupKey: 'once' })

    await using target = await startInstalled(installed as string)
    await copy(source, target, schema)
    await open.query('rollback')

    // Nobody has repaired it yet: nothing is handed out by a cursor that would skip what comes.
    {
      await using client = await session(target.connectionString)
      const { rows } = await client.query<{ restored: boolean }>(`select ${schema}.restored() as restored`)
      expect(rows[0]?.restored).toBe(true)
      await expect(fetchIn(client, schema, 'done')).rejects.toMatchObject({ code: 'KB004' })
    }
    await using restored = await connect(target, schema)
    await restored.pubsub.publish(SUBJECT, 'new')
    const again = (durable: string) => restored.pubsub.subscribe(SUBJECT, durable)
    const came = await attempts(await again('halves'), 31)
    expect(new Set(came.keys())).toEqual(new Set([...numbers(10, 40), 'new']))
    for (const payload of numbers(10, 20)) expect(came.get(payload)).toBe(2)
    for (const payload of numbers(20, 40)) expect(came.get(payload)).toBe(1)
    const never = await attempts(await again('never-read'), 41)
    expect(new Set(never.keys())).toEqual(new Set([...numbers(0, 40), 'new']))
    expect(await takeUntil(await again('done'), 'new')).toEqual([])
    expect((await takeUntil(await again('newcomer'), 'new')).sort()).toEqual(numbers(30, 40).sort())
    // And nothing comes after that, to anybody.
    await restored.pubsub.publish(SUBJECT, 'end')
    for (const durable of ['halves', 'never-read', 'done', 'newcomer']) {
      await eventually(async () => {
        await using client = await session(target.connectionString)
        const { rows } = await client.query(
          `select pending::int, in_flight::int + redelivering::int as held from ${schema}.consumer_stats where durable = $1`,
          [durable],
        )
        expect((rows[0] as { held: number }).held + (rows[0] as { pending: number }).pending).toBe(1)
      })
    }
    expect(await restored.kv.put('settings', 'colour', 'blue')).toBeGreaterThan(revision)
    expect(await restored.jobs.enqueue('work', { payload: 'job', dedupKey: 'once' })).toBe(job)
    expect((await restored.jobs.claim('work', 'worker', 1_000))?.id).toBe(job)
  }, 60_000)

  test('K1 K6 keys alone: a watch yields what the dump held and every change since, and revisions go on growing', async () => {
    const schema = 'keys'
    await using bus = await connect(source, schema)
    const before = await bus.kv.put('settings', 'colour', 'red')
    await bus.kv.put('settings', 'size', 'small')
    await bus.kv.delete('settings', 'size')
    await using target = await startInstalled(installed as string)
    await copy(source, target, schema)
    await using restored = await connect(target, schema)
    const watch = await restored.kv.watch('settings')
    const changes = watch[Symbol.asyncIterator]()
    const first = await changes.next()
    expect(first.value).toMatchObject({ operation: 'put', entry: { key: 'colour', revision: before } })
    const after = await restored.kv.cas('settings', 'colour', 'blue', before)
    expect(after).toBeGreaterThan(before)
    const second = await changes.next()
    expect(second.value).toMatchObject({ operation: 'put', entry: { key: 'colour', revision: after } })
    // The new cluster comes to the transaction ids that the dump's changes carry: they must not look new then.
    await using client = await session(target.connectionString)
    await burn(client)
    await burn(client)
    const last = await restored.kv.put('settings', 'colour', 'green')
    const third = await changes.next()
    expect(third.value).toMatchObject({ operation: 'put', entry: { key: 'colour', revision: last } })
  })

  test('P9 a bus that lives through the exchange of its server repairs it before it publishes, and its stream goes on', async () => {
    const schema = 'exchanged'
    await using server = await startBusy()
    await using bus = await connect(server, schema)
    const stream = await bus.pubsub.subscribe(SUBJECT, 'reader', { ackWaitMs: ACK_WAIT_MS })
    for (const payload of numbers(0, 5)) await bus.pubsub.publish(SUBJECT, payload)
    await (await bus.pubsub.subscribe(SUBJECT, 'never-read')).close()
    expect(await take(stream, 5)).toEqual(numbers(0, 5))
    await using _target = await exchange(server, schema)
    await eventually(() => bus.pubsub.publish(SUBJECT, 'new'), { everyMs: 100, timeoutMs: 20_000 })
    expect(await takeUntil(stream, 'new')).toEqual([])
    const never = await bus.pubsub.subscribe(SUBJECT, 'never-read')
    expect(await takeUntil(never, 'new')).toEqual(numbers(0, 5))
  }, 60_000)

  test('P9 so it does before it publishes in a transaction of the caller’s, though it has sent nothing itself since', async () => {
    const schema = 'exchanged_tx'
    await using server = await startBusy()
    await using bus = await PostgresBus.connect({ connectionString: server.connectionString, schema, maintenance: false })
    const stream = await bus.pubsub.subscribe(SUBJECT, 'reader')
    for (const payload of numbers(0, 5)) await bus.pubsub.publish(SUBJECT, payload)
    expect(await take(stream, 5)).toEqual(numbers(0, 5))
    await stream.close()
    await using target = await exchange(server, schema)
    await using caller = await session(target.connectionString.replace(/:[^:@]*@/, `:${new URL(server.connectionString).password}@`))
    await caller.query('begin')
    await bus.pubsub.publish(SUBJECT, 'in a transaction', { tx: caller })
    await caller.query('commit')
    await using again = await bus.pubsub.subscribe(SUBJECT, 'reader')
    await bus.pubsub.publish(SUBJECT, 'end')
    expect(await takeUntil(again, 'end')).toEqual(['in a transaction'])
  }, 60_000)

  test('P9 so does one whose pool had no connection open when it happened, so that none was lost', async () => {
    const schema = 'exchanged_idle'
    await using server = await startBusy()
    const pool = new pg.Pool({ connectionString: server.connectionString, idleTimeoutMillis: 50 })
    pool.on('error', () => {})
    try {
      await using bus = await PostgresBus.connect({ pool, schema, maintenance: false })
      const stream = await bus.pubsub.subscribe(SUBJECT, 'reader')
      for (const payload of numbers(0, 5)) await bus.pubsub.publish(SUBJECT, payload)
      expect(await take(stream, 5)).toEqual(numbers(0, 5))
      await stream.close()
      await eventually(() => pool.totalCount === 0)
      await using _target = await exchange(server, schema)
      await bus.pubsub.publish(SUBJECT, 'first')
      await using again = await bus.pubsub.subscribe(SUBJECT, 'reader')
      await bus.pubsub.publish(SUBJECT, 'end')
      expect(await takeUntil(again, 'end')).toEqual(['first'])
    } finally {
      await pool.end()
    }
  }, 60_000)
})
