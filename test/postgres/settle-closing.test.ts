/** A bus that closes while its statements are under way, and on a server that does not answer. */

import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { outcome, Taker } from './support/outcome.ts'

const schema = freshSchema()
const connectionString = databaseUrl()
const LONG_MS = 60_000
/** `close` takes half a second for statements that do not end, and a little more for everything else. */
const CLOSED_WITHIN_MS = 3_000

let other: PostgresBus
let observer: Session
let closing: PostgresBus
let names = 0

beforeAll(async () => {
  other = await PostgresBus.connect({ connectionString, schema, maintenance: false, pollIntervalMs: 100 })
  observer = await session(connectionString)
})

beforeEach(async () => {
  closing = await PostgresBus.connect({ connectionString, schema, maintenance: false, pollIntervalMs: 100 })
  return () => closing.close()
})

afterAll(async () => {
  await other.close()
  await observer.query(`drop schema ${schema} cascade`)
  await observer[Symbol.asyncDispose]()
})

/** A session that keeps everybody out of a table until it is disposed of. */
async function locked(table: string): Promise<Session> {
  const blocker = await session(connectionString)
  await blocker.query('begin')
  await blocker.query(`lock table ${schema}.${table} in access exclusive mode`)
  return blocker
}

async function untilWaitedFor(holder: Session): Promise<void> {
  await eventually(
    async () => {
      const { rowCount } = await observer.query('select from pg_stat_activity where $1 = any(pg_blocking_pids(pid))', [holder.pid])
      return (rowCount ?? 0) > 0
    },
    { what: 'somebody waiting for the lock' },
  )
}

async function closesInTime(bus: PostgresBus): Promise<boolean> {
  const tooLate = Promise.withResolvers<boolean>()
  const timer = setTimeout(() => tooLate.resolve(false), CLOSED_WITHIN_MS)
  const closed = await Promise.race([bus.close().then(() => true), tooLate.promise])
  clearTimeout(timer)
  return closed
}

describe('what is just being handed out when the bus closes', () => {
  test('J6 a job whose claim is under way goes back at once, not when its lease ends', async () => {
    const queue = `q${++names}`
    const id = await other.jobs.enqueue(queue, { payload: 'p' })
    const blocker = await locked('jobs')
    const claim = closing.jobs.claim(queue, 'w', LONG_MS)
    claim.catch(() => {})
    await untilWaitedFor(blocker)
    const closed = closing.close()
    await blocker[Symbol.asyncDispose]()
    await closed
    const again = await other.jobs.claim(queue, 'w', LONG_MS, { waitMs: 2_000 })
    expect(again?.id).toBe(id)
  })

  test('P10 messages whose fetch is under way go back at once, their attempt not counted', async () => {
    const durable = `d${++names}`
    const stream = await closing.pubsub.subscribe(durable, durable, { ackWaitMs: LONG_MS })
    const blocker = await locked('deliveries')
    const { seq } = await other.pubsub.publish(durable, 'p')
    const taken = new Taker(stream).take(60_000)
    await untilWaitedFor(blocker)
    const closed = closing.close()
    await blocker[Symbol.asyncDispose]()
    await closed
    await taken
    await using rival = await other.pubsub.subscribe(durable, durable)
    expect(await new Taker(rival).take(2_000)).toMatchObject({ seq, attempt: 1 })
  })

  test('K5 a lease whose grant is under way goes back at once', async () => {
    const key = `k${++names}`
    const blocker = await locked('kv_leases')
    const lease = closing.kv.lease('b', key, LONG_MS)
    lease.catch(() => {})
    await untilWaitedFor(blocker)
    const closed = closing.close()
    await blocker[Symbol.asyncDispose]()
    await closed
    expect(await outcome(other.kv.lease('b', key, LONG_MS, { waitMs: 2_000 }))).toBe('ok')
  })
})

describe('closing behind a lock that nobody gives up', () => {
  test('a claim that waits does not hold up close, and is rejected with closed', async () => {
    await using blocker = await locked('jobs')
    const claim = outcome(closing.jobs.claim(`q${++names}`, 'w', LONG_MS))
    await untilWaitedFor(blocker)
    expect(await closesInTime(closing)).toBe(true)
    expect(await claim).toBe('closed')
  })

  test('a job in its hands that it cannot hand back does not hold up close', async () => {
    const queue = `q${++names}`
    await other.jobs.enqueue(queue, { payload: 'p' })
    expect(await closing.jobs.claim(queue, 'w', LONG_MS)).not.toBeNull()
    await using _blocker = await locked('jobs')
    expect(await closesInTime(closing)).toBe(true)
  })

  test('a fetch that waits does not hold up close, and its stream ends', async () => {
    const durable = `d${++names}`
    const stream = await closing.pubsub.subscribe(durable, durable)
    await using blocker = await locked('deliveries')
    const taken = new Taker(stream).take(60_000)
    await untilWaitedFor(blocker)
    expect(await closesInTime(closing)).toBe(true)
    expect(await taken).toBeNull()
  })

  test('an ack that waits does not hold up close, and is rejected', async () => {
    const queue = `q${++names}`
    await other.jobs.enqueue(queue, { payload: 'p' })
    const job = await closing.jobs.claim(queue, 'w', LONG_MS)
    await using blocker = await locked('jobs')
    const ack = outcome(job!.ack())
    await untilWaitedFor(blocker)
    expect(await closesInTime(closing)).toBe(true)
    expect(['closed', 'connection']).toContain(await ack)
  })

  test('what it is extending at that very moment is handed back at once', async () => {
    const name = `d${++names}`
    const count = 6
    for (let round = 0; round < 6; round++) {
      await using bus = await PostgresBus.connect({ connectionString, schema, maintenance: false })
      await other.pubsub.publishMany(Array.from({ length: count }, () => ({ subject: name, payload: 'p' })))
      await other.jobs.enqueueMany(
        name,
        Array.from({ length: count }, () => ({ payload: 'p' })),
      )
      const taker = new Taker(await bus.pubsub.subscribe(name, name, { ackWaitMs: LONG_MS }))
      const messages = []
      while (messages.length < count) messages.push(await taker.expect())
      const jobs = await bus.jobs.claimMany(name, 'w', LONG_MS, { limit: count })
      expect(jobs.length).toBe(count)
      const extensions = [...messages.map((message) => outcome(message.extend())), ...jobs.map((job) => outcome(job.heartbeat()))]
      await bus.close()
      await Promise.all(extensions)
      expect(await other.jobs.claimMany(name, 'w', 0, { limit: 100 })).toHaveLength(count)
      await observer.query(`delete from ${schema}.jobs where queue = $1`, [name])
      const { rows } = await observer.query(`select in_flight::int as held from ${schema}.consumer_stats where durable = $1`, [name])
      expect(rows).toEqual([{ held: 0 }])
      await using stream = await other.pubsub.subscribe(name, name, { ackWaitMs: LONG_MS })
      const again = new Taker(stream)
      for (let n = 0; n < count; n++) await (await again.expect()).ack()
    }
  })
})
