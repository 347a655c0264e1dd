/**
 * The server has executed a statement and the answer never arrives: the caller cannot know. Calls that may be repeated are; the
 * settlements find out by themselves; everything else is told as `connection`, and has happened once or not at all.
 */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { type Msg, PostgresBus, type PostgresTx } from '../../src/index.ts'
import { outcome, Taker, text } from '../postgres/support/outcome.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { count } from './support/network/backends.ts'
import { type End, Tap } from './support/network/tap.ts'

const connectionString = databaseUrl()
const schema = freshSchema()
const LONG_MS = 120_000

let direct: PostgresBus
let observer: Session
let names = 0

beforeAll(async () => {
  direct = await PostgresBus.connect({ connectionString, schema })
  observer = await session(connectionString)
})

afterAll(async () => {
  await direct.close()
  await observer[Symbol.asyncDispose]()
})

const fresh = () => `reply${++names}`
const stored = (subject: string) => count(observer, `${schema}.messages where subject = $1`, [subject])
const jobsOf = (queue: string) => count(observer, `${schema}.jobs where queue = $1`, [queue])

/** A bus of one test's own, whose pool goes through a tap. */
interface Tapped {
  readonly tap: Tap
  readonly bus: PostgresBus
}

async function tapped(body: (tapped: Tapped) => Promise<void>, options = ''): Promise<void> {
  await using tap = await Tap.start(connectionString)
  const url = new URL(tap.connectionString)
  if (options) url.searchParams.set('options', options)
  await using bus = await PostgresBus.connect({
    connectionString: url.href,
    listenConnectionString: connectionString,
    schema,
    maintenance: false,
    pollIntervalMs: 200,
  })
  await body({ tap, bus })
}

/** The outcome of a call whose answer was lost after the server had executed it. */
async function lost(tap: Tap, statement: RegExp, call: () => Promise<unknown>, end: End = 'cut'): Promise<string> {
  const executed = tap.loseAnswer(statement, end)
  const result = outcome(call())
  await executed
  return result
}

describe.concurrent('the answer to a write is lost', () => {
  test('P1 P12 publish with a msgId: connection, and the repeat stores nothing and answers the first one’s seq', () =>
    tapped(async ({ tap, bus }) => {
      const subject = fresh()
      const publish = () => bus.pubsub.publish(subject, 'x', { msgId: subject })
      expect(await lost(tap, /publish_many/, publish)).toBe('connection')
      expect(await stored(subject)).toBe(1)
      const { rows } = await observer.query(`select seq::int from ${schema}.messages where subject = $1`, [subject])
      expect(await publish()).toEqual({ seq: (rows[0] as { seq: number }).seq, duplicate: true })
      expect(await stored(subject)).toBe(1)
    }))

  test('P1 publish without one: connection, not called retryable, stored once and delivered once', () =>
    tapped(async ({ tap, bus }) => {
      const subject = fresh()
      const executed = tap.loseAnswer(/publish_many/)
      const failure = await bus.pubsub.publish(subject, 'x').catch((error: unknown) => error)
      await executed
      expect(failure).toMatchObject({ code: 'connection', retryable: false })
      const taker = new Taker(await bus.pubsub.subscribe(subject, subject))
      await (await taker.expect()).ack()
      await bus.pubsub.publish(subject, 'after')
      expect(text((await taker.expect()).payload)).toBe('after')
    }))

  test('P1 publishes of one tick share the lost answer: each is told connection, each is stored once', () =>
    tapped(async ({ tap, bus }) => {
      const subject = fresh()
      await bus.pubsub.publish(fresh(), 'warm')
      const executed = tap.loseAnswer(/publish_many/)
      const results = await Promise.all(Array.from({ length: 20 }, (_, n) => outcome(bus.pubsub.publish(subject, `${n}`))))
      await executed
      expect(new Set(results)).toEqual(new Set(['connection']))
      expect(await stored(subject)).toBe(20)
    }))

  test('P1 P12 publishMany: connection; the repeat finds the messages that had ids, and the whole batch was stored', () =>
    tapped(async ({ tap, bus }) => {
      const subject = fresh()
      const messages = Array.from({ length: 5 }, (_, n) => ({ subject, payload: `${n}`, msgId: `${subject}-${n}` }))
      expect(await lost(tap, /publish_many/, () => bus.pubsub.publishMany(messages))).toBe('connection')
      const acks = await bus.pubsub.publishMany(messages)
      expect(acks.map(({ duplicate }) => duplicate)).toEqual(Array(5).fill(true))
      expect(await stored(subject)).toBe(5)
    }))

  test('J1 enqueue without a dedup key: connection, and the job exists once', () =>
    tapped(async ({ tap, bus }) => {
      const queue = fresh()
      expect(await lost(tap, /enqueue_one/, () => bus.jobs.enqueue(queue, { payload: 'x' }))).toBe('connection')
      expect(await jobsOf(queue)).toBe(1)
      const later = fresh()
      expect(await lost(tap, /enqueue_one/, () => bus.jobs.enqueue(later, { payload: 'x', delayMs: 50, priority: 3 }))).toBe('connection')
      expect(await jobsOf(later)).toBe(1)
    }))

  test('J5 enqueue and enqueueMany with dedup keys: connection; the repeat answers the ids of the jobs that are there', () =>
    tapped(async ({ tap, bus }) => {
      const queue = fresh()
      const one = () => bus.jobs.enqueue(queue, { payload: 'x', dedupKey: 'one' })
      expect(await lost(tap, /enqueue_many/, one)).toBe('connection')
      const id = await one()
      expect(text((await bus.kv.get(`dedup.${queue}`, 'one'))!.value)).toBe(id)
      expect(await jobsOf(queue)).toBe(1)

      const jobs = ['a', 'b', 'c'].map((dedupKey) => ({ payload: dedupKey, dedupKey }))
      expect(await lost(tap, /enqueue_many/, () => bus.jobs.enqueueMany(queue, jobs))).toBe('connection')
      const ids = await bus.jobs.enqueueMany(queue, jobs)
      expect(new Set(ids).size).toBe(3)
      expect(await jobsOf(queue)).toBe(4)
    }))

  test('K1 K4 put: connection; the value is there, and the repeat makes a later revision of the same value', () =>
    tapped(async ({ tap, bus }) => {
      const bucket = fresh()
      expect(await lost(tap, /kv_write/, () => bus.kv.put(bucket, 'k', 'v'))).toBe('connection')
      const entry = await direct.kv.get(bucket, 'k')
      expect(text(entry!.value)).toBe('v')
      expect(await bus.kv.put(bucket, 'k', 'v')).toBeGreaterThan(entry!.revision)
    }))

  test('K2 cas: connection; the repeat loses to the write that had arrived and names its revision', () =>
    tapped(async ({ tap, bus }) => {
      const bucket = fresh()
      expect(await lost(tap, /kv_write/, () => bus.kv.cas(bucket, 'k', '1', null))).toBe('connection')
      const first = (await direct.kv.get(bucket, 'k'))!
      await expect(bus.kv.cas(bucket, 'k', '1', null)).rejects.toMatchObject({
        code: 'cas_conflict',
        expected: null,
        actual: first.revision,
      })
      expect(await lost(tap, /kv_write/, () => bus.kv.cas(bucket, 'k', '2', first.revision))).toBe('connection')
      const second = (await direct.kv.get(bucket, 'k'))!
      expect(text(second.value)).toBe('2')
      await expect(bus.kv.cas(bucket, 'k', '2', first.revision)).rejects.toMatchObject({ code: 'cas_conflict', actual: second.revision })
    }))

  test('K3 delete: connection; the key is gone, the repeat succeeds, the repeat of a conditional one is told that it is absent', () =>
    tapped(async ({ tap, bus }) => {
      const bucket = fresh()
      const revision = await bus.kv.put(bucket, 'k', 'v')
      await bus.kv.put(bucket, 'l', 'v')
      expect(await lost(tap, /kv_write/, () => bus.kv.delete(bucket, 'k', { expected: revision }))).toBe('connection')
      expect(await direct.kv.get(bucket, 'k')).toBeNull()
      await expect(bus.kv.delete(bucket, 'k', { expected: revision })).rejects.toMatchObject({ code: 'cas_conflict', actual: null })
      expect(await lost(tap, /kv_write/, () => bus.kv.delete(bucket, 'l'))).toBe('connection')
      await bus.kv.delete(bucket, 'l')
    }))

  test('P4 P11 subscribe: connection; the durable exists once, and the repeat joins it', () =>
    tapped(async ({ tap, bus }) => {
      const subject = fresh()
      expect(await lost(tap, /create_durable/, () => bus.pubsub.subscribe(subject, subject))).toBe('connection')
      await direct.pubsub.publish(subject, 'meanwhile')
      const taker = new Taker(await bus.pubsub.subscribe(subject, subject, { start: 'new' }))
      expect(text((await taker.expect()).payload)).toBe('meanwhile')
    }))

  test('P1 explicit transactions (the role’s default is another isolation): the answer to COMMIT is lost, nothing is doubled or half done', () =>
    tapped(async ({ tap, bus }) => {
      const subject = fresh()
      const publish = () => bus.pubsub.publish(subject, 'x', { msgId: subject })
      expect(await lost(tap, /^commit$/, publish)).toBe('connection')
      expect(await stored(subject)).toBe(1)
      expect((await publish()).duplicate).toBe(true)
      const job = await claimed(bus, fresh())
      expect(await lost(tap, /^commit$/, () => job.ack())).toBe('ok')
      expect(await count(observer, `${schema}.jobs where id = $1`, [job.id])).toBe(0)
    }, '-c default_transaction_isolation=serializable'))
})

async function claimed(bus: PostgresBus, queue: string, leaseMs = LONG_MS) {
  await direct.jobs.enqueue(queue, { payload: queue, maxAttempts: 5 })
  const job = await bus.jobs.claim(queue, 'w', leaseMs)
  expect(job).not.toBeNull()
  return job!
}

async function delivered(bus: PostgresBus, subject: string, ackWaitMs = LONG_MS) {
  await direct.pubsub.publish(subject, subject)
  const taker = new Taker(await bus.pubsub.subscribe(subject, subject, { ackWaitMs }))
  return { taker, message: await taker.expect() }
}

const unsettled = (subject: string) =>
  count(observer, `${schema}.deliveries d join ${schema}.consumer_offsets o on o.id = d.consumer_id where o.durable = $1`, [subject])

describe.concurrent('the answer to a settlement is lost', () => {
  test('P7 ack and term of a message: the bus finds out, they succeed, and it is never handed out again', () =>
    tapped(async ({ tap, bus }) => {
      for (const how of ['ack', 'term'] as const) {
        const subject = fresh()
        const { taker, message } = await delivered(bus, subject)
        expect(await lost(tap, /ack_deliveries/, () => message[how]())).toBe('ok')
        expect(await unsettled(subject)).toBe(0)
        expect(await outcome(message.ack())).toBe('already_settled')
        await direct.pubsub.publish(subject, 'after')
        expect(text((await taker.expect()).payload)).toBe('after')
      }
    }))

  test('P5 nak of a message: it succeeds, and the message comes once more', () =>
    tapped(async ({ tap, bus }) => {
      const subject = fresh()
      const { taker, message } = await delivered(bus, subject)
      expect(await lost(tap, /nak_deliveries/, () => message.nak(2_000))).toBe('ok')
      const again = await taker.expect()
      expect([again.seq, again.attempt]).toEqual([message.seq, 2])
      await again.ack()
      expect(await unsettled(subject)).toBe(0)
    }))

  test('P7 extend: connection; the repeat succeeds and the message is still the holder’s', () =>
    tapped(async ({ tap, bus }) => {
      const { message } = await delivered(bus, fresh())
      expect(await lost(tap, /extend_deliveries/, () => message.extend())).toBe('connection')
      await message.extend()
      await message.ack()
    }))

  test('J6 ack, nak and deadLetter of a job: the bus finds out and they succeed; nothing is dead-lettered twice', () =>
    tapped(async ({ tap, bus }) => {
      const done = await claimed(bus, fresh())
      expect(await lost(tap, /ack_job/, () => done.ack())).toBe('ok')
      expect(await jobsOf(done.queue)).toBe(0)

      const failed = await claimed(bus, fresh())
      expect(await lost(tap, /nak_jobs/, () => failed.nak(60_000))).toBe('ok')
      expect(await count(observer, `${schema}.job_details where queue = $1 and state = 'scheduled'`, [failed.queue])).toBe(1)

      const dead = await claimed(bus, fresh())
      expect(await lost(tap, /dead_letter_jobs/, () => dead.deadLetter('poison'))).toBe('ok')
      expect(await stored(`${dead.queue}.dlq`)).toBe(1)
      expect(await outcome(dead.ack())).toBe('already_settled')
    }))

  test('J4 nak of the last attempt: it succeeds, and exactly one dead letter is there', () =>
    tapped(async ({ tap, bus }) => {
      const queue = fresh()
      await direct.jobs.enqueue(queue, { payload: 'x', maxAttempts: 1 })
      const job = (await bus.jobs.claim(queue, 'w', LONG_MS))!
      expect(await lost(tap, /nak_jobs/, () => job.nak())).toBe('ok')
      expect(await stored(`${queue}.dlq`)).toBe(1)
    }))

  test('J6 heartbeat of a job: connection; the repeat succeeds, and the lease was not lost', () =>
    tapped(async ({ tap, bus }) => {
      const job = await claimed(bus, fresh())
      expect(await lost(tap, /heartbeat_job/, () => job.heartbeat())).toBe('connection')
      expect(job.lease.signal.aborted).toBe(false)
      await job.heartbeat()
      await job.ack()
    }))

  test('P7 J6 acks of one tick share the lost answer, and each is found out', () =>
    tapped(async ({ tap, bus }) => {
      const queue = fresh()
      await direct.jobs.enqueueMany(
        queue,
        Array.from({ length: 30 }, (_, n) => ({ payload: `${n}` })),
      )
      const jobs = await bus.jobs.claimMany(queue, 'w', LONG_MS, { limit: 30 })
      const executed = tap.loseAnswer(/ack_jobs/)
      expect(new Set(await Promise.all(jobs.map((job) => outcome(job.ack()))))).toEqual(new Set(['ok']))
      await executed
      expect(await jobsOf(queue)).toBe(0)
    }))

  test('P7 an ack that was lost before the server had it whole is sent again and ends the message', () =>
    tapped(async ({ tap, bus }) => {
      const subject = fresh()
      const { message } = await delivered(bus, subject)
      const broken = tap.breakRequest(/ack_deliveries/)
      const result = outcome(message.ack())
      await broken
      expect(await result).toBe('ok')
      expect(await unsettled(subject)).toBe(0)
    }))
})

describe.concurrent('the answer to what hands out is lost', () => {
  test('J3 claim: connection; the job is claimed again when the lease that nobody holds is over, as the next attempt', () =>
    tapped(async ({ tap, bus }) => {
      const queue = fresh()
      await direct.jobs.enqueue(queue, { payload: 'x' })
      expect(await lost(tap, /take_jobs/, () => bus.jobs.claim(queue, 'w', 1_500))).toBe('connection')
      expect(await direct.jobs.claim(queue, 'w', 1_500)).toBeNull()
      const job = await bus.jobs.claim(queue, 'w', LONG_MS, { waitMs: 20_000 })
      expect(job?.attempt).toBe(2)
      await job?.ack()
    }))

  test('P5 a fetch of a stream: the stream goes on, and its messages come again when the ack wait is over, none lost', () =>
    tapped(async ({ tap, bus }) => {
      const subject = fresh()
      const taker = new Taker(await bus.pubsub.subscribe(subject, subject, { ackWaitMs: 1_500 }))
      await direct.pubsub.publish(subject, 'first')
      await (await taker.expect()).ack()
      const executed = tap.loseAnswer(/fetch_messages/, 'cut', 0.5)
      await direct.pubsub.publishMany(['a', 'b', 'c'].map((payload) => ({ subject, payload })))
      // A stream fetches for whom asks.
      const asked = taker.expect(20_000)
      await executed
      const seen = new Set<string>()
      for (let message = await asked; ; message = await taker.expect()) {
        seen.add(text(message.payload))
        await message.ack()
        if (seen.size === 3) break
      }
      expect(await unsettled(subject)).toBe(0)
    }))

  test('K5 lease: connection; nobody has it twice, it is free when its ttl is over, and the next fence is higher', () =>
    tapped(async ({ tap, bus }) => {
      const bucket = fresh()
      expect(await lost(tap, /take_lease/, () => bus.kv.lease(bucket, 'k', 2_500))).toBe('connection')
      expect(await outcome(direct.kv.lease(bucket, 'k', 1_000))).toBe('lease_held')
      const { rows } = await observer.query(`select fence::int from ${schema}.kv_leases where bucket = $1`, [bucket])
      const lease = await bus.kv.lease(bucket, 'k', LONG_MS, { waitMs: 20_000 })
      expect(lease.fence).toBeGreaterThan((rows[0] as { fence: number }).fence)
      await lease.release()
    }))

  test('K5 heartbeat of a lease: connection; the repeat succeeds, and it was not lost', () =>
    tapped(async ({ tap, bus }) => {
      const lease = await bus.kv.lease(fresh(), 'k', LONG_MS)
      expect(await lost(tap, /extend_lease/, () => lease.heartbeat())).toBe('connection')
      expect(lease.signal.aborted).toBe(false)
      await lease.heartbeat()
      await lease.release()
    }))

  test('K5 release: connection; it is free at once, and the repeat does nothing to the next holder', () =>
    tapped(async ({ tap, bus }) => {
      const bucket = fresh()
      const lease = await bus.kv.lease(bucket, 'k', LONG_MS)
      expect(await lost(tap, /release_lease/, () => lease.release())).toBe('connection')
      const next = await direct.kv.lease(bucket, 'k', LONG_MS)
      await lease.release()
      await next.heartbeat()
      await next.release()
    }))

  test('K5 J6 a release that never reached the server is made by the repeat', () =>
    tapped(async ({ tap, bus }) => {
      const bucket = fresh()
      const lease = await bus.kv.lease(bucket, 'k', LONG_MS)
      const broken = tap.breakRequest(/release_lease/)
      expect(await outcome(lease.release())).toBe('connection')
      await broken
      expect(await outcome(direct.kv.lease(bucket, 'k', LONG_MS))).toBe('lease_held')
      await lease.release()
      await (await direct.kv.lease(bucket, 'k', LONG_MS)).release()

      const job = await claimed(bus, fresh())
      const jobBroken = tap.breakRequest(/release_jobs/)
      expect(await outcome(job.lease.release())).toBe('connection')
      await jobBroken
      await job.lease.release()
      expect((await direct.jobs.claim(job.queue, 'w', LONG_MS))?.attempt).toBe(2)
    }))

  test('R1 a request and a reply: one handling, and the requester gets the reply or connection', () =>
    tapped(async ({ tap, bus }) => {
      const subject = fresh()
      let handled = 0
      await using _responder = await bus.requestReply.respond(subject, ({ payload }) => {
        handled++
        return payload
      })
      const executed = tap.loseAnswer(/reply_to_request/)
      expect(text(await direct.requestReply.request(subject, 'r', { timeoutMs: 15_000 }))).toBe('r')
      await executed
      expect(handled).toBe(1)
      const sent = tap.loseAnswer(/send_request/)
      const result = await outcome(bus.requestReply.request(subject, 's', { timeoutMs: 15_000 }))
      await sent
      expect(['ok', 'connection']).toContain(result)
      expect(handled).toBeLessThanOrEqual(2)
    }))
})

describe.concurrent('the answer to the caller’s own COMMIT is lost', () => {
  test('P1 P7 J1 K4 what the bus did in the transaction holds together: all of it is there, once, and an ack in it has ended its job', () =>
    tapped(async ({ bus }) => {
      await using tap = await Tap.start(connectionString)
      await using caller = await session(tap.connectionString)
      const name = fresh()
      const job = await claimed(bus, name)
      await caller.query('begin')
      await bus.pubsub.publish(name, 'in it', { tx: caller })
      await bus.jobs.enqueue(`${name}-next`, { payload: 'x', dedupKey: 'k' }, { tx: caller })
      await bus.kv.put(name, 'k', 'v', { tx: caller })
      await job.ack({ tx: caller })
      const executed = tap.loseAnswer(/^commit$/)
      await expect(caller.query('commit')).rejects.toThrow()
      await executed
      // The caller cannot know either; asked again, the bus can.
      expect(await outcome(job.ack())).toBe('already_settled')
      expect([await stored(name), await jobsOf(`${name}-next`), await jobsOf(name)]).toEqual([1, 1, 0])
      expect(text((await direct.kv.get(name, 'k'))!.value)).toBe('v')
    }))

  test('P1 P7 the COMMIT itself never arrives: nothing of it is there, and the job is still its holder’s', () =>
    tapped(async ({ bus }) => {
      await using tap = await Tap.start(connectionString)
      await using caller = await session(tap.connectionString)
      const name = fresh()
      const job = await claimed(bus, name)
      await caller.query('begin')
      await bus.pubsub.publish(name, 'in it', { tx: caller })
      await job.ack({ tx: caller })
      const broken = tap.breakRequest(/^commit$/)
      await expect(caller.query('commit')).rejects.toThrow()
      await broken
      await eventually(async () => expect(await outcome(job.ack())).toBe('ok'))
      expect([await stored(name), await jobsOf(name)]).toEqual([0, 0])
    }))
})

describe.concurrent('the answer does not come, and the connection stays open', () => {
  // Half a minute is what the bus waits for an answer.
  const patience = 60_000

  test('P12 publish: connection, and the repeat finds what was stored', { timeout: patience }, () =>
    tapped(async ({ tap, bus }) => {
      const subject = fresh()
      const publish = () => bus.pubsub.publish(subject, 'x', { msgId: subject })
      expect(await lost(tap, /publish_many/, publish, 'silent')).toBe('connection')
      expect((await publish()).duplicate).toBe(true)
    }),
  )

  test('P7 J6 acks: the bus finds out', { timeout: patience }, () =>
    tapped(async ({ tap, bus }) => {
      const subject = fresh()
      const { message } = await delivered(bus, subject)
      expect(await lost(tap, /ack_deliveries/, () => message.ack(), 'silent')).toBe('ok')
      expect(await unsettled(subject)).toBe(0)
    }),
  )

  test('J3 claim, in the middle of the answer: connection, and the next claim goes through', { timeout: patience }, () =>
    tapped(async ({ tap, bus }) => {
      const queue = fresh()
      await direct.jobs.enqueue(queue, { payload: 'x'.repeat(10_000) })
      await direct.jobs.enqueue(queue, { payload: 'y' })
      const executed = tap.loseAnswer(/take_jobs/, 'silent', 0.5)
      const call = outcome(bus.jobs.claim(queue, 'w', 5_000))
      await executed
      const other = await bus.jobs.claim(queue, 'w', LONG_MS)
      expect(text(other!.payload)).toBe('y')
      expect(await call).toBe('connection')
      const again = await bus.jobs.claim(queue, 'w', LONG_MS)
      expect([again?.payload.length, again?.attempt]).toEqual([10_000, 2])
    }),
  )

  test('K4 put and get: connection, and both go through afterwards', { timeout: patience }, () =>
    tapped(async ({ tap, bus }) => {
      const bucket = fresh()
      await Promise.all([
        lost(tap, /kv_write/, () => bus.kv.put(bucket, 'k', 'v'), 'silent').then((result) => expect(result).toBe('connection')),
        eventually(async () => text((await direct.kv.get(bucket, 'k'))!.value) === 'v'),
      ])
      expect(text((await bus.kv.get(bucket, 'k'))!.value)).toBe('v')
    }),
  )
})

test('P1 P7 J1 J6 answers are lost at random under load: no msgId and no dedup key is there twice, no settlement is undone, nothing is lost', () =>
  tapped(async ({ tap, bus }) => {
    const name = fresh()
    const handled = new Map<string, number>()
    const stream = await bus.pubsub.subscribe(name, name, { ackWaitMs: 2_000 })
    const consuming = (async () => {
      for await (const message of stream as AsyncIterable<Msg<PostgresTx>>) {
        const result = await outcome(message.ack())
        if (result === 'ok') handled.set(text(message.payload), (handled.get(text(message.payload)) ?? 0) + 1)
        else expect(['connection', 'lease_lost']).toContain(result)
      }
    })()
    const insist = async (call: () => Promise<unknown>) => eventually(async () => expect(await outcome(call())).toBe('ok'))
    let losing = true
    const lossy = (async () => {
      const statements = [/publish_many/, /enqueue_many/, /ack_deliveries/, /fetch_messages/]
      for (let n = 0; losing; n++) await Promise.race([tap.loseAnswer(statements[n % statements.length]!), eventually(() => !losing)])
    })()
    let count = 0
    // So many, and until enough was lost: which statements meet a loss depends on what is sent meanwhile.
    for (; count < 40 || (tap.losses <= 10 && count < 1_000); count++) {
      await Promise.all([
        insist(() => bus.pubsub.publish(name, `${count}`, { msgId: `${name}-${count}` })),
        insist(() => bus.jobs.enqueue(name, { payload: `${count}`, dedupKey: `${count}` })),
      ])
    }
    losing = false
    await lossy
    tap.loseNothing()
    expect(tap.losses).toBeGreaterThan(10)
    await eventually(() => handled.size === count, { timeoutMs: 15_000, what: 'all messages' })
    await eventually(async () => (await unsettled(name)) === 0)
    await stream.close()
    await consuming
    expect([...handled.values()].every((times) => times === 1)).toBe(true)
    expect([await stored(name), await jobsOf(name)]).toEqual([count, count])
  }))
