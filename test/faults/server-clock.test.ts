/**
 * The clock of the database jumps by an hour: a machine is woken, a standby whose clock is off takes over. Times only decide when something
 * is handed out (again); who may settle it is decided by tokens, and those know no time.
 */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus, Worker } from '../../src/index.ts'
import { outcome, Taker, text } from '../postgres/support/outcome.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { type DatabaseClock, startClock } from './support/server/clock.ts'

const schema = freshSchema()
const HOUR_MS = 3_600_000
const TTL_MS = 60_000

let clock: DatabaseClock
let connectionString: string
let client: Session
let bus: PostgresBus
let other: PostgresBus

beforeAll(async () => {
  clock = await startClock(databaseUrl(), freshSchema())
  connectionString = clock.connectionString
  client = await session(connectionString)
  await PostgresBus.migrate({ connectionString, schema })
  await clock.govern(schema)
  bus = await PostgresBus.connect({ connectionString, schema, maintenance: false, pollIntervalMs: 100 })
  other = await PostgresBus.connect({ connectionString, schema, maintenance: false, pollIntervalMs: 100 })
})
afterAll(async () => {
  await Promise.all([bus.close(), other.close()])
  await client[Symbol.asyncDispose]()
})

const jump = (ms: number) => clock.jump(ms)
let names = 0
const fresh = () => `clock-${++names}`

async function deadLetters(queue: string): Promise<Record<string, string>[]> {
  const { rows } = await client.query<{ headers: Record<string, string> }>(
    `select headers from ${schema}.message_details where subject = $1`,
    [`${queue}.dlq`],
  )
  return rows.map(({ headers }) => headers)
}

describe('an hour ahead', () => {
  test('P5 P7 a message comes again early, its first holder is refused, the second is not; settled without that it never comes', async () => {
    const name = fresh()
    await using stream = await bus.pubsub.subscribe(name, name, { ackWaitMs: TTL_MS })
    const taker = new Taker(stream)
    for (const payload of ['again', 'settled']) await bus.pubsub.publish(name, payload)
    const [first, settled] = [await taker.expect(), await taker.expect()]
    // Nobody has asked since it ran out.
    await stream.close()
    await jump(HOUR_MS)
    expect(await outcome(settled.ack())).toBe('ok')
    await using second = await other.pubsub.subscribe(name, name, { ackWaitMs: TTL_MS })
    const rival = new Taker(second)
    const again = await rival.expect()
    expect([text(again.payload), again.attempt]).toEqual(['again', 2])
    for (const settle of [first.extend, first.nak, first.ack]) expect(await outcome(settle.call(first))).toBe('lease_lost')
    expect(await outcome(again.ack())).toBe('ok')
    await bus.pubsub.publish(name, 'end')
    expect(text((await rival.expect()).payload)).toBe('end')
  })

  test('J3 J6 so it is with a job, and what was delayed is due early', async () => {
    const name = fresh()
    await bus.jobs.enqueue(name, { payload: 'held' })
    await bus.jobs.enqueue(name, { payload: 'later', delayMs: HOUR_MS / 2 })
    const first = (await bus.jobs.claim(name, 'w', TTL_MS))!
    expect(await other.jobs.claim(name, 'v', TTL_MS)).toBeNull()
    await jump(HOUR_MS)
    const claimed = await other.jobs.claimMany(name, 'v', TTL_MS, { limit: 10 })
    expect(claimed.map(({ payload, attempt }) => [text(payload), attempt])).toEqual(
      expect.arrayContaining([
        ['held', 2],
        ['later', 1],
      ]),
    )
    for (const settle of [first.heartbeat, first.nak, first.ack]) expect(await outcome(settle.call(first))).toBe('lease_lost')
    for (const job of claimed) expect(await outcome(job.ack())).toBe('ok')
  })

  test('J3 J4 in the middle of every attempt: exactly maxAttempts runs, then exactly one dead letter', async () => {
    const name = fresh()
    const id = await bus.jobs.enqueue(name, { payload: 'p', maxAttempts: 3 })
    const attempts: number[] = []
    const late: string[] = []
    for (let run = 1; run <= 3; run++) {
      const job = (await bus.jobs.claim(name, 'w', TTL_MS))!
      attempts.push(job.attempt)
      await jump(HOUR_MS)
      if (run < 3) continue
      // It is dead as soon as somebody looks for work.
      expect(await other.jobs.claim(name, 'v', TTL_MS)).toBeNull()
      late.push(await outcome(job.ack()), await outcome(job.nak()))
    }
    expect(attempts).toEqual([1, 2, 3])
    expect(late).toEqual(['lease_lost', 'lease_lost'])
    expect(await deadLetters(name)).toMatchObject([{ dlq_reason: 'max_attempts_exceeded', dlq_job_id: id, dlq_attempts: '3' }])
  })

  test('K5 a lease is over for its holder whoever asks first, the next has a higher fence, and the old release frees nothing', async () => {
    const name = fresh()
    const [unasked, taken] = [await bus.kv.lease(name, 'unasked', TTL_MS), await bus.kv.lease(name, 'taken', TTL_MS)]
    await jump(HOUR_MS)
    expect(await outcome(unasked.heartbeat())).toBe('lease_lost')
    expect(unasked.signal.aborted).toBe(true)
    const next = await other.kv.lease(name, 'taken', TTL_MS)
    expect(next.fence).toBeGreaterThan(taken.fence)
    expect(await outcome(taken.heartbeat())).toBe('lease_lost')
    await taken.release()
    expect(await outcome(other.kv.lease(name, 'taken', TTL_MS))).toBe('lease_held')
    await next.heartbeat()
    await next.release()
  })
})

describe('an hour back', () => {
  test('P7 J6 K5 what is held stays held, may be extended and settled by its holder, and comes to nobody else', async () => {
    const name = fresh()
    await using stream = await bus.pubsub.subscribe(name, name, { ackWaitMs: TTL_MS })
    await bus.pubsub.publish(name, 'm')
    const message = await new Taker(stream).expect()
    await bus.jobs.enqueue(name, { payload: 'j' })
    const job = (await bus.jobs.claim(name, 'w', TTL_MS))!
    const lease = await bus.kv.lease(name, 'k', TTL_MS)
    await jump(-HOUR_MS)
    expect(await other.jobs.claim(name, 'v', TTL_MS)).toBeNull()
    expect(await outcome(other.kv.lease(name, 'k', TTL_MS))).toBe('lease_held')
    expect(await outcome(message.extend())).toBe('ok')
    expect(await outcome(job.heartbeat())).toBe('ok')
    expect(await outcome(lease.heartbeat())).toBe('ok')
    expect(await outcome(message.ack())).toBe('ok')
    expect(await outcome(job.ack())).toBe('ok')
    await lease.release()
    const next = await other.kv.lease(name, 'k', TTL_MS)
    expect(next.fence).toBeGreaterThan(lease.fence)
    await next.release()
    expect(await other.jobs.claim(name, 'v', TTL_MS)).toBeNull()
  })

  test('K5 J6 a holder that goes on heartbeating is not told that it has lost what it holds', async () => {
    const name = fresh()
    const ttlMs = 1_500
    const lease = await bus.kv.lease(name, 'k', ttlMs)
    let aborted = false
    const done = Promise.withResolvers<void>()
    const worker = new Worker(
      bus.jobs,
      name,
      async (_job, signal) => {
        signal.addEventListener('abort', () => (aborted = true))
        await done.promise
      },
      { leaseTtlMs: ttlMs },
    )
    const id = await bus.jobs.enqueue(name, { payload: 'long' })
    const running = async () => {
      const { rows } = await client.query(`select state from ${schema}.job_details where id = $1`, [id])
      return (rows[0] as { state: string } | undefined)?.state
    }
    await eventually(async () => (await running()) === 'running')
    await jump(-HOUR_MS)
    const until = performance.now() + 3 * ttlMs
    while (performance.now() < until) {
      await lease.heartbeat()
      await client.query('select pg_sleep(0.3)')
    }
    expect([lease.signal.aborted, aborted]).toEqual([false, false])
    done.resolve()
    await eventually(async () => (await running()) === undefined)
    await worker.stop()
    await lease.release()
  })

  test('P5 J3 K5 what its holder has left comes late, when the clock is right again, and nothing is lost', async () => {
    const name = fresh()
    await bus.jobs.enqueue(name, { payload: 'j' })
    await bus.pubsub.publish(name, 'm')
    let fence: number
    {
      const gone = await PostgresBus.connect({ connectionString, schema, maintenance: false })
      const held = await gone.pubsub.subscribe(name, name, { ackWaitMs: TTL_MS })
      await new Taker(held).expect()
      await gone.jobs.claim(name, 'gone', TTL_MS)
      fence = (await gone.kv.lease(name, 'k', TTL_MS)).fence
      // As if it had been killed: nothing is handed back when its connections are dead.
      await client.query(
        `update ${schema}.deliveries set token = gen_random_uuid() where consumer_id = (select id from ${schema}.consumer_offsets where durable = $1)`,
        [name],
      )
      await client.query(`update ${schema}.jobs set token = gen_random_uuid() where queue = $1`, [name])
      await client.query(`update ${schema}.kv_leases set token = gen_random_uuid() where bucket = $1`, [name])
      await gone.close()
    }
    await jump(-HOUR_MS)
    expect(await bus.jobs.claim(name, 'w', TTL_MS)).toBeNull()
    expect(await outcome(bus.kv.lease(name, 'k', TTL_MS))).toBe('lease_held')
    await jump(HOUR_MS + TTL_MS)
    await using stream = await bus.pubsub.subscribe(name, name)
    const message = await new Taker(stream).expect()
    expect([text(message.payload), message.attempt]).toEqual(['m', 2])
    await message.ack()
    const job = (await bus.jobs.claim(name, 'w', TTL_MS))!
    expect([text(job.payload), job.attempt]).toEqual(['j', 2])
    await job.ack()
    const lease = await bus.kv.lease(name, 'k', TTL_MS)
    expect(lease.fence).toBeGreaterThan(fence)
    await lease.release()
  })

  test('J1 J8 P14 what is enqueued and published after the jump is worked at once', async () => {
    const name = fresh()
    await bus.jobs.enqueue(name, { payload: 'before' })
    await jump(-HOUR_MS)
    await bus.jobs.enqueue(name, { payload: 'after' })
    await bus.pubsub.publish(name, 'after')
    // Its time has not come again; nobody waits for it.
    const after = (await bus.jobs.claim(name, 'w', TTL_MS, { waitMs: 5_000 }))!
    expect(text(after.payload)).toBe('after')
    await after.ack()
    await using stream = await bus.pubsub.subscribe(name, name)
    expect(text((await new Taker(stream).expect()).payload)).toBe('after')
    await jump(HOUR_MS)
    expect(text((await bus.jobs.claim(name, 'w', TTL_MS))!.payload)).toBe('before')
  })
})
