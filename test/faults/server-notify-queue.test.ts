/** A listener that sleeps in a transaction fills the notification queue, which then refuses whoever notifies, in the whole cluster. */

import pg from 'pg'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { type EmbeddedPostgres, startEmbeddedPostgres } from '../../src/testing/index.ts'
import { outcome, Taker, text } from '../postgres/support/outcome.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'

/** Far beyond what a test waits: who finds something sooner was woken. */
const NO_POLL_MS = 600_000
const SOON_MS = 10_000

let server: EmbeddedPostgres
let sleeper: Session
let filler: Session

beforeAll(async () => {
  // The least that a server takes; older ones have 8 GB, whatever they are told.
  server = await startEmbeddedPostgres({ settings: { max_notify_queue_pages: '64' } })
  sleeper = await session(server.connectionString)
  filler = await session(server.connectionString)
})
afterAll(async () => {
  await sleeper[Symbol.asyncDispose]()
  await filler[Symbol.asyncDispose]()
  await server.stop('immediate')
})

async function fill(): Promise<void> {
  // Each by itself: one simple query is one transaction.
  for (const step of ['listen sleepy', 'begin', 'select 1']) await sleeper.query(step)
  await filler.query('select pg_notification_queue_usage()')
  for (let n = 0; n < 1_000; n++) {
    const failed = await filler.query(`select pg_notify('sleepy', repeat('x', 7900))`).then(
      () => undefined,
      (error: { code?: string }) => error.code,
    )
    if (failed === '54000') return
  }
  throw new Error('the queue did not become full')
}

async function drain(): Promise<void> {
  for (const step of ['commit', 'unlisten *']) await sleeper.query(step)
}

/** Counts the notifications that the server refuses. */
class CountingPool extends pg.Pool {
  refused = 0

  constructor() {
    super({ connectionString: server.connectionString })
    const send = this.query.bind(this) as (...args: unknown[]) => Promise<unknown>
    const counting = async (...args: unknown[]) => {
      try {
        return await send(...args)
      } catch (error) {
        if (JSON.stringify(args[0]).includes('pg_notify')) this.refused++
        throw error
      }
    }
    Object.assign(this, { query: counting })
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.end()
  }
}

const connect = (pollIntervalMs: number) =>
  PostgresBus.connect({ connectionString: server.connectionString, pollIntervalMs, maintenance: false })

describe('a full notification queue', () => {
  test('P1 P14 J1 K4 every write succeeds, in a caller’s transaction too, and what waits finds it by its poll', async () => {
    await using bus = await connect(200)
    await using other = await connect(200)
    await using stream = await other.pubsub.subscribe('full', 'full')
    const taker = new Taker(stream)
    await using watch = await other.kv.watch('full', undefined, { updatesOnly: true })
    const changes = watch[Symbol.asyncIterator]()
    await fill()
    try {
      const claim = other.jobs.claim('full', 'w', 60_000, { waitMs: 20_000 })
      const change = changes.next()
      await bus.pubsub.publish('full', 'alone')
      await bus.pubsub.publishMany(['a', 'b'].map((payload) => ({ subject: 'full', payload })))
      await using caller = await session(server.connectionString)
      await caller.query('begin')
      await bus.pubsub.publish('full', 'in a transaction', { tx: caller })
      await bus.jobs.enqueue('full', { payload: 'in a transaction' }, { tx: caller })
      await bus.kv.put('full', 'in-a-transaction', 'v', { tx: caller })
      await caller.query('commit')
      await bus.jobs.enqueue('full', { payload: 'alone' })
      await bus.jobs.enqueueMany('full', [{ payload: 'many' }])
      await bus.kv.put('full', 'alone', 'v')
      await bus.kv.cas('full', 'created', 'v', null)
      await bus.kv.delete('full', 'created')
      const lease = await bus.kv.lease('full', 'lease', 60_000)
      const waiting = other.kv.lease('full', 'lease', 60_000, { waitMs: 20_000 })
      await lease.release()

      const came: string[] = []
      while (came.length < 4) {
        const message = await taker.expect()
        came.push(text(message.payload))
        await message.ack()
      }
      expect(came).toEqual(['alone', 'a', 'b', 'in a transaction'])
      expect((await change).value).toMatchObject({ operation: 'put' })
      const jobs = [(await claim)!]
      while (jobs.length < 3) jobs.push((await other.jobs.claim('full', 'w', 60_000, { waitMs: 10_000 }))!)
      expect(jobs.map(({ payload }) => text(payload)).sort()).toEqual(['alone', 'in a transaction', 'many'])
      for (const job of jobs) await job.ack()
      await (await waiting).release()
    } finally {
      await drain()
    }
  })

  test('P14 what was rung while it was full wakes once it is drained, without a poll', async () => {
    await using pool = new CountingPool()
    await using bus = await PostgresBus.connect({ pool, maintenance: false })
    await using other = await connect(NO_POLL_MS)
    await using stream = await other.pubsub.subscribe('kept', 'kept')
    const message = new Taker(stream).expect(SOON_MS)
    await using watch = await other.kv.watch('kept', undefined, { updatesOnly: true })
    const change = watch[Symbol.asyncIterator]().next()
    const claim = other.jobs.claim('kept', 'w', 60_000, { waitMs: 20_000 })
    await fill()
    try {
      await bus.pubsub.publish('kept', 'message')
      await bus.kv.put('kept', 'k', 'v')
      await bus.jobs.enqueue('kept', { payload: 'job' })
      // So the first ring of each is over and was in vain.
      const sofar = pool.refused
      await eventually(() => pool.refused > sofar + 2, { timeoutMs: SOON_MS, what: 'notifications that are refused' })
    } finally {
      await drain()
    }
    expect(text((await message).payload)).toBe('message')
    expect((await change).value).toMatchObject({ operation: 'put' })
    expect(text((await claim)!.payload)).toBe('job')
  })

  test('P14 once it is drained everything wakes again, without a poll', async () => {
    await using bus = await connect(NO_POLL_MS)
    await using other = await connect(NO_POLL_MS)
    await using stream = await other.pubsub.subscribe('drained', 'drained')
    await using watch = await other.kv.watch('drained', undefined, { updatesOnly: true })
    await fill()
    try {
      await bus.pubsub.publish('drained', 'unheard')
    } finally {
      await drain()
    }
    const taker = new Taker(stream)
    const change = watch[Symbol.asyncIterator]().next()
    const claim = other.jobs.claim('drained', 'w', 60_000, { waitMs: 20_000 })
    expect(text((await taker.expect(SOON_MS)).payload)).toBe('unheard')
    await bus.pubsub.publish('drained', 'heard')
    expect(text((await taker.expect(SOON_MS)).payload)).toBe('heard')
    await using caller = await session(server.connectionString)
    await caller.query('begin')
    await bus.pubsub.publish('drained', 'in a transaction', { tx: caller })
    await caller.query('commit')
    expect(text((await taker.expect(SOON_MS)).payload)).toBe('in a transaction')
    await bus.kv.put('drained', 'k', 'v')
    expect((await change).value).toMatchObject({ operation: 'put' })
    await bus.jobs.enqueue('drained', { payload: 'job' })
    expect(text((await claim)!.payload)).toBe('job')
  })

  test('P14 R1 a bus that connects while it is full works by polling, and is woken once it is drained', async () => {
    await fill()
    {
      await using bus = await connect(200)
      await using stream = await bus.pubsub.subscribe('late', 'late')
      const taker = new Taker(stream)
      await using _responder = await bus.requestReply.respond('late.ask', ({ payload }) => payload)
      await bus.pubsub.publish('late', 'polled')
      expect(text((await taker.expect()).payload)).toBe('polled')
      expect(text(await bus.requestReply.request('late.ask', 'asked', { timeoutMs: 10_000 }))).toBe('asked')
    }
    await using bus = await connect(NO_POLL_MS)
    await using stream = await bus.pubsub.subscribe('later', 'later')
    const taker = new Taker(stream)
    await drain()
    await using other = await connect(NO_POLL_MS)
    // Its listener tries again by itself; what is published once it listens wakes.
    await eventually(
      async () => {
        await other.pubsub.publish('later', 'woken')
        expect(await taker.take(1_000)).not.toBeNull()
      },
      { timeoutMs: 20_000 },
    )
    expect(await outcome(bus.kv.put('later', 'k', 'v'))).toBe('ok')
  }, 60_000)
})
