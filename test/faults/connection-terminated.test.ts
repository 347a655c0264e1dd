/**
 * A connection of the pool is terminated in the middle of a statement. That it is in the middle is made sure of: somebody holds a
 * table that the statement needs, often one that it comes to after it has written to others.
 */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { outcome, Taker, text } from '../postgres/support/outcome.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { count, named, terminate, untilWaiting } from './support/network/backends.ts'

const connectionString = databaseUrl()
const NAME = 'terminated pool'
const LONG_MS = 120_000
const schema = freshSchema()

let bus: PostgresBus
let observer: Session
let names = 0
const uncaught: unknown[] = []
const note = (error: unknown) => void uncaught.push(error)

beforeAll(async () => {
  // The bus listens elsewhere, and has nothing else under way: what waits for a lock is the statement of the test.
  bus = await PostgresBus.connect({
    connectionString: named(connectionString, NAME),
    listenConnectionString: connectionString,
    schema,
    maintenance: false,
  })
  observer = await session(connectionString)
  process.on('unhandledRejection', note)
  process.on('uncaughtExceptionMonitor', note)
})

afterAll(async () => {
  await bus.close()
  await observer[Symbol.asyncDispose]()
  process.off('unhandledRejection', note)
  process.off('uncaughtExceptionMonitor', note)
})

const fresh = () => `terminated${++names}`
const stored = (subject: string) => count(observer, `${schema}.messages where subject = $1`, [subject])
const jobsOf = (queue: string) => count(observer, `${schema}.jobs where queue = $1`, [queue])

/** The outcome of a call whose connection is terminated while it waits for the table. */
async function terminatedAt(table: string, call: () => Promise<unknown>, statement = ''): Promise<string> {
  // After a lost connection, and when it has none, the bus first looks whether the server is still the same one: not now.
  await Promise.all([bus.kv.get('terminated', 'healthy'), bus.jobs.claim('terminated', 'w', 1)])
  await using holder = await session(connectionString)
  await holder.query(`begin; lock table ${schema}.${table} in access exclusive mode`)
  const result = outcome(call())
  await terminate(observer, await untilWaiting(observer, NAME, statement))
  await holder.query('rollback')
  const code = await result
  // The pool has healed: the very next call goes through.
  expect(await outcome(bus.kv.get('terminated', 'healthy'))).toBe('ok')
  expect(uncaught).toEqual([])
  return code
}

describe('a write', () => {
  test('P1 publish: connection, not called retryable, and nothing is stored', async () => {
    const subject = fresh()
    let failure: unknown
    const call = () =>
      bus.pubsub.publish(subject, 'x').catch((error: unknown) => {
        failure = error
        throw error
      })
    expect(await terminatedAt('messages', call)).toBe('connection')
    expect(failure).toMatchObject({ code: 'connection', retryable: false, message: expect.stringContaining('may or may not') })
    expect(await stored(subject)).toBe(0)
  })

  test('P1 P12 publishMany with ids, which are written before the messages: all of it is absent, and the repeat is no duplicate', async () => {
    const subject = fresh()
    const messages = ['a', 'b'].map((payload) => ({ subject, payload, msgId: `${subject}-${payload}` }))
    expect(await terminatedAt('messages', () => bus.pubsub.publishMany(messages))).toBe('connection')
    expect(await count(observer, `${schema}.message_ids where msg_id like $1`, [`${subject}-%`])).toBe(0)
    expect((await bus.pubsub.publishMany(messages)).map(({ duplicate }) => duplicate)).toEqual([false, false])
    expect(await stored(subject)).toBe(2)
  })

  test.for(['jobs', 'kv_entries', 'kv_changes'])(
    'J1 J5 enqueueMany with dedup keys, at %s: neither the jobs nor their records are there, and the repeat enqueues',
    async (table) => {
      const queue = fresh()
      const enqueue = () =>
        bus.jobs.enqueueMany(
          queue,
          ['a', 'b'].map((dedupKey) => ({ payload: 'x', dedupKey })),
        )
      expect(await terminatedAt(table, enqueue)).toBe('connection')
      expect(await jobsOf(queue)).toBe(0)
      expect(await bus.kv.get(`dedup.${queue}`, 'a')).toBeNull()
      expect(new Set(await enqueue()).size).toBe(2)
      expect(await jobsOf(queue)).toBe(2)
    },
  )

  test('K1 K6 put, cas and delete, after the entry and before its change is recorded: the old value stands, and the next change is seen', async () => {
    const bucket = fresh()
    const first = await bus.kv.put(bucket, 'k', 'old')
    await using watch = await bus.kv.watch(bucket, undefined, { updatesOnly: true })
    const change = watch[Symbol.asyncIterator]().next()
    // The first try gives way to the lock by itself; the one after it waits.
    const waits = 'kv_write\\('
    expect(await terminatedAt('kv_changes', () => bus.kv.put(bucket, 'k', 'new'), waits)).toBe('connection')
    expect(await terminatedAt('kv_changes', () => bus.kv.cas(bucket, 'k', 'new', first), waits)).toBe('connection')
    expect(await terminatedAt('kv_changes', () => bus.kv.delete(bucket, 'k'), waits)).toBe('connection')
    const entry = (await bus.kv.get(bucket, 'k'))!
    expect([text(entry.value), entry.revision]).toEqual(['old', first])
    const next = await bus.kv.cas(bucket, 'k', 'new', first)
    expect((await change).value).toMatchObject({ operation: 'put', entry: { revision: next } })
  })

  test('K5 lease: connection, and the lease is free', async () => {
    const bucket = fresh()
    expect(await terminatedAt('kv_leases', () => bus.kv.lease(bucket, 'k', LONG_MS))).toBe('connection')
    await (await bus.kv.lease(bucket, 'k', LONG_MS)).release()
  })
})

describe('what hands out', () => {
  test('J3 claim: connection, and the job is claimable at once, its attempt not counted', async () => {
    const queue = fresh()
    await bus.jobs.enqueue(queue, { payload: 'x' })
    expect(await terminatedAt('jobs', () => bus.jobs.claim(queue, 'w', LONG_MS))).toBe('connection')
    const job = await bus.jobs.claim(queue, 'w', LONG_MS)
    expect(job?.attempt).toBe(1)
    await job?.ack()
  })

  test('J3 J4 a claim that buries what is out of attempts, before the dead letter is written: neither is done, and then each once', async () => {
    const queue = fresh()
    await bus.jobs.enqueue(queue, { payload: 'x', maxAttempts: 1 })
    await bus.jobs.claim(queue, 'w', 1)
    await observer.query('select pg_sleep(0.01)')
    expect(await terminatedAt('messages', () => bus.jobs.claim(queue, 'w', LONG_MS))).toBe('connection')
    expect([await stored(`${queue}.dlq`), await count(observer, `${schema}.jobs where queue = $1 and died_at is null`, [queue])]).toEqual([
      0, 1,
    ])
    expect(await bus.jobs.claim(queue, 'w', LONG_MS)).toBeNull()
    expect([await stored(`${queue}.dlq`), await count(observer, `${schema}.jobs where queue = $1 and died_at is null`, [queue])]).toEqual([
      1, 0,
    ])
  })

  test.for(['deliveries', 'consumer_offsets', 'messages'])(
    'P5 P9 a fetch, at %s: the stream goes on and hands out everything once, at attempt 1',
    async (table) => {
      const subject = fresh()
      const taker = new Taker(await bus.pubsub.subscribe(subject, subject, { ackWaitMs: LONG_MS }))
      await bus.pubsub.publish(subject, '0')
      await (await taker.expect()).ack()
      const asked = taker.expect(20_000)
      await using publisher = await session(connectionString)
      await publisher.query('begin')
      await bus.pubsub.publishMany(
        ['1', '2'].map((payload) => ({ subject, payload })),
        { tx: publisher },
      )
      await publisher.query(`lock table ${schema}.${table} in access exclusive mode`)
      // The poll runs into the lock.
      await terminate(observer, await untilWaiting(observer, NAME, 'fetch_messages'))
      await publisher.query('commit')
      const one = await asked
      await one.ack()
      const two = await taker.expect()
      await two.ack()
      expect([text(one.payload), one.attempt, text(two.payload), two.attempt]).toEqual(['1', 1, '2', 1])
      expect(await taker.take(300)).toBeNull()
      expect(uncaught).toEqual([])
    },
  )
})

describe('a settlement', () => {
  async function claimed(maxAttempts = 5) {
    const queue = fresh()
    await bus.jobs.enqueue(queue, { payload: 'x', maxAttempts })
    return (await bus.jobs.claim(queue, 'w', LONG_MS))!
  }

  test('J6 P7 ack of a job and of a message: asked for again, they succeed', async () => {
    const job = await claimed()
    expect(await terminatedAt('jobs', () => job.ack())).toBe('ok')
    expect(await jobsOf(job.queue)).toBe(0)

    const subject = fresh()
    await bus.pubsub.publish(subject, 'x')
    const message = await new Taker(await bus.pubsub.subscribe(subject, subject, { ackWaitMs: LONG_MS })).expect()
    expect(await terminatedAt('deliveries', () => message.ack())).toBe('ok')
    expect(await outcome(message.ack())).toBe('already_settled')
  })

  test('J4 deadLetter and the nak of a last attempt, before the dead letter is written: asked for again, one dead letter each', async () => {
    const poison = await claimed()
    expect(await terminatedAt('messages', () => poison.deadLetter('poison'))).toBe('ok')
    const last = await claimed(1)
    expect(await terminatedAt('messages', () => last.nak())).toBe('ok')
    for (const { queue } of [poison, last]) {
      expect(await stored(`${queue}.dlq`)).toBe(1)
      expect(await count(observer, `${schema}.job_details where queue = $1 and state = 'dead'`, [queue])).toBe(1)
    }
  })

  test('P6 the nak of a last delivery, before its dead letter is written: asked for again, one dead letter', async () => {
    const subject = fresh()
    await bus.pubsub.publish(subject, 'x')
    const message = await new Taker(await bus.pubsub.subscribe(subject, subject, { ackWaitMs: LONG_MS, maxDeliver: 1 })).expect()
    expect(await terminatedAt('messages', () => message.nak())).toBe('ok')
    expect(await stored(`${subject}.dlq`)).toBe(1)
  })

  test('J6 K5 heartbeats: connection, and the lease goes on', async () => {
    const job = await claimed()
    expect(await terminatedAt('jobs', () => job.heartbeat())).toBe('connection')
    await job.heartbeat()
    const lease = await bus.kv.lease(fresh(), 'k', LONG_MS)
    expect(await terminatedAt('kv_leases', () => lease.heartbeat())).toBe('connection')
    await lease.heartbeat()
    expect([job.lease.signal.aborted, lease.signal.aborted]).toEqual([false, false])
    await Promise.all([job.ack(), lease.release()])
  })
})

describe('the caller’s transaction', () => {
  test('P1 J1 K4 J6 in the middle of each call: connection, nothing of the transaction is there, the bus and the job are as before', async () => {
    const name = fresh()
    await bus.jobs.enqueue(name, { payload: 'x' })
    const job = (await bus.jobs.claim(name, 'w', LONG_MS))!
    const calls: [string, (tx: Session) => Promise<unknown>][] = [
      ['messages', (tx) => bus.pubsub.publish(name, 'in it', { tx, msgId: name })],
      ['jobs', (tx) => bus.jobs.enqueue(`${name}-next`, { payload: 'x', dedupKey: 'k' }, { tx })],
      ['kv_changes', (tx) => bus.kv.put(name, 'k', 'v', { tx })],
      ['jobs', (tx) => job.ack({ tx })],
    ]
    for (const [table, call] of calls) {
      await using caller = await session(named(connectionString, 'terminated caller'))
      await using holder = await session(connectionString)
      await caller.query('begin')
      await bus.pubsub.publish(name, 'before', { tx: caller })
      await holder.query(`begin; lock table ${schema}.${table === 'messages' ? 'message_ids' : table} in access exclusive mode`)
      const result = outcome(call(caller))
      await terminate(observer, await untilWaiting(observer, 'terminated caller'))
      await holder.query('rollback')
      expect(await result).toBe('connection')
      expect(await outcome(bus.pubsub.publish(name, 'after', { tx: caller }))).toBe('connection')
    }
    expect([await stored(name), await jobsOf(`${name}-next`)]).toEqual([0, 0])
    expect(await bus.kv.get(name, 'k')).toBeNull()
    expect((await bus.pubsub.publish(name, 'x', { msgId: name })).duplicate).toBe(false)
    await job.ack()
    expect(await jobsOf(name)).toBe(0)
    expect(uncaught).toEqual([])
  })
})
