/** Who may settle a job, written out as the steps of the holder, of another claimer and of the reaper. */

import { describe, expect, test } from 'vitest'
import { session } from '../support/sessions.ts'
import {
  bus,
  caller,
  claim,
  claimed,
  connectionString,
  deadLetters,
  freshQueue,
  LONG_MS,
  left,
  observer,
  other,
  SHORT_MS,
  schema,
  setTheStage,
  untilExpired,
  untilWaitedFor,
} from './support/jobs-stage.ts'
import { outcome } from './support/outcome.ts'

setTheStage()

describe('a job that was claimed again', () => {
  test('J6 every settlement of the older claim is refused and changes nothing; the newer one stands', async () => {
    const { queue, job: first } = await claimed(SHORT_MS)
    const second = await claim(other, queue, LONG_MS)
    expect(second.attempt).toBe(2)
    expect(second.lease.fence).toBeGreaterThan(first.lease.fence)
    const before = await observer.query(`select * from ${schema}.jobs where queue = $1`, [queue])
    expect(await outcome(first.heartbeat())).toBe('lease_lost')
    expect(await outcome(first.nak(0))).toBe('lease_lost')
    expect(await outcome(first.deadLetter('late'))).toBe('lease_lost')
    expect(await outcome(first.ack())).toBe('lease_lost')
    expect((await observer.query(`select * from ${schema}.jobs where queue = $1`, [queue])).rows).toEqual(before.rows)
    expect(await deadLetters(queue)).toEqual([])
    expect(await outcome(second.ack())).toBe('ok')
    expect(await left(queue)).toBe(0)
  })

  test('J6 an ack that meets the other claim before that one has committed waits for it, and is refused when it commits', async () => {
    const { queue, job } = await claimed(SHORT_MS)
    await untilExpired(queue)
    await caller.query('begin')
    const { rows } = await caller.query(`select id from ${schema}.claim_jobs($1, 'other', 60000, 1)`, [queue])
    expect(rows).toHaveLength(1)
    const ack = outcome(job.ack())
    await untilWaitedFor(caller)
    await caller.query('commit')
    expect(await ack).toBe('lease_lost')
    expect(await left(queue)).toBe(1)
  })

  test('J6 the same ack succeeds when that claim is rolled back', async () => {
    const { queue, job } = await claimed(SHORT_MS)
    await untilExpired(queue)
    await caller.query('begin')
    await caller.query(`select id from ${schema}.claim_jobs($1, 'other', 60000, 1)`, [queue])
    const ack = outcome(job.ack())
    await untilWaitedFor(caller)
    await caller.query('rollback')
    expect(await ack).toBe('ok')
    expect(await left(queue)).toBe(0)
  })

  test('J6 a heartbeat that meets the other claim before it has committed does not answer that the lease goes on', async () => {
    const { queue, job } = await claimed(SHORT_MS)
    await untilExpired(queue)
    await caller.query('begin')
    await caller.query(`select id from ${schema}.claim_jobs($1, 'other', 60000, 1)`, [queue])
    const heartbeat = outcome(job.heartbeat())
    // Whether it waits for the claim or answers at once, it must not answer "ok" to a holder who has lost the job.
    await Promise.race([heartbeat, untilWaitedFor(caller)])
    await caller.query('commit')
    expect(await heartbeat).toBe('lease_lost')
  })

  test('J6 a claim whose connection dies before it commits leaves the job to its holder', async () => {
    const { queue, job } = await claimed(SHORT_MS)
    await untilExpired(queue)
    const dying = await session(connectionString)
    await dying.query('begin')
    await dying.query(`select id from ${schema}.claim_jobs($1, 'other', 60000, 1)`, [queue])
    await observer.query('select pg_terminate_backend($1)', [dying.pid])
    expect(await outcome(job.ack())).toBe('ok')
    expect(await left(queue)).toBe(0)
    await dying[Symbol.asyncDispose]()
  })
})

describe('a job whose lease ran out and that nobody claimed', () => {
  test('J6 its ack succeeds and it is never claimed again', async () => {
    const { queue, job } = await claimed(SHORT_MS)
    await untilExpired(queue)
    expect(await outcome(job.ack())).toBe('ok')
    expect(await other.jobs.claim(queue, 'worker', LONG_MS)).toBeNull()
  })

  test('J6 its heartbeat takes the lease up again', async () => {
    const { queue, job } = await claimed(SHORT_MS)
    await untilExpired(queue)
    expect(await outcome(job.heartbeat())).toBe('ok')
    expect(await other.jobs.claim(queue, 'worker', LONG_MS)).toBeNull()
    expect(await outcome(job.ack())).toBe('ok')
  })

  test('J6 of an ack and a claim at the same moment exactly one gets it, fifty times over', async () => {
    const queue = freshQueue()
    const ids = await bus.jobs.enqueueMany(
      queue,
      Array.from({ length: 50 }, () => ({ payload: 'p' })),
    )
    const held = await bus.jobs.claimMany(queue, 'first', SHORT_MS, { limit: 50 })
    expect(held).toHaveLength(50)
    await untilExpired(queue)
    const claims = Array.from({ length: 50 }, () => other.jobs.claim(queue, 'second', LONG_MS))
    const acks = held.map((job) => outcome(job.ack()))
    const won = new Set((await Promise.all(claims)).flatMap((job) => (job ? [job.id] : [])))
    const outcomes = await Promise.all(acks)
    const acked = new Set(held.filter((_, n) => outcomes[n] === 'ok').map(({ id }) => id))
    expect([...acked].filter((id) => won.has(id))).toEqual([])
    // A claim may pass over a row that the ack of another was just looking at; nothing is lost by it.
    for (let job = await other.jobs.claim(queue, 'second', LONG_MS); job; job = await other.jobs.claim(queue, 'second', LONG_MS)) {
      expect(won.has(job.id)).toBe(false)
      expect(acked.has(job.id)).toBe(false)
      won.add(job.id)
    }
    expect(new Set([...acked, ...won])).toEqual(new Set(ids))
  })
})

describe('settling twice', () => {
  test('J6 ack, ack: the second is already_settled', async () => {
    const { job } = await claimed(LONG_MS)
    await job.ack()
    expect(await outcome(job.ack())).toBe('already_settled')
  })

  test('J6 nak, ack: the nak stands and the job is claimed again', async () => {
    const { queue, job } = await claimed(LONG_MS)
    await job.nak(0)
    expect(await outcome(job.ack())).toBe('already_settled')
    expect((await claim(other, queue, LONG_MS)).attempt).toBe(2)
  })

  test('J6 two acks at once: one of them ends the job, the other is already_settled', async () => {
    const { queue, job } = await claimed(LONG_MS)
    expect((await Promise.all([outcome(job.ack()), outcome(job.ack())])).sort()).toEqual(['already_settled', 'ok'])
    expect(await left(queue)).toBe(0)
  })
})

describe('nak', () => {
  test('J4 a nak of the last attempt publishes the dead letter at once, whatever its delay, with headers that tell the story', async () => {
    const { queue, job } = await claimed(LONG_MS, { maxAttempts: 1 })
    await job.nak(60_000)
    expect((await deadLetters(queue)).map(({ headers }) => headers)).toEqual([
      { dlq_reason: 'max_attempts_exceeded', dlq_queue: queue, dlq_job_id: job.id, dlq_attempts: '1' },
    ])
    expect(await other.jobs.claim(queue, 'worker', LONG_MS)).toBeNull()
  })

  test('J7 a nak with a delay is claimable neither before it is over nor long after, and another job is not held up', async () => {
    const { queue, job } = await claimed(LONG_MS)
    const naked = performance.now()
    await job.nak(1_000)
    await bus.jobs.enqueue(queue, { payload: 'new' })
    const fresh = await claim(other, queue, LONG_MS)
    expect(fresh.id).not.toBe(job.id)
    const again = await claim(other, queue, LONG_MS)
    const after = performance.now() - naked
    expect(again.id).toBe(job.id)
    expect(after).toBeGreaterThanOrEqual(1_000)
    expect(after).toBeLessThan(2_000)
  })

  test('J6 a job put back by retry_dead is fenced against the claim that let it die', async () => {
    const { queue, job } = await claimed(SHORT_MS, { maxAttempts: 1 })
    await untilExpired(queue)
    expect(await other.jobs.claim(queue, 'worker', LONG_MS)).toBeNull()
    expect(await deadLetters(queue)).toHaveLength(1)
    expect(await outcome(job.ack())).toBe('lease_lost')
    await observer.query(`select ${schema}.retry_dead($1)`, [queue])
    expect(await outcome(job.ack())).toBe('lease_lost')
    const again = await claim(other, queue, LONG_MS)
    expect(again.attempt).toBe(1)
    expect(again.lease.fence).toBeGreaterThan(job.lease.fence)
    expect(await outcome(job.ack())).toBe('lease_lost')
    expect(await outcome(again.ack())).toBe('ok')
  })
})

describe('a job in its last attempt', () => {
  test('J3 an ack that meets the burial before that has committed is refused when it commits: one dead letter, no ack', async () => {
    const { queue, job } = await claimed(SHORT_MS, { maxAttempts: 1 })
    await untilExpired(queue)
    await caller.query('begin')
    await caller.query(`select * from ${schema}.claim_jobs($1, 'other', 60000, 1)`, [queue])
    const ack = outcome(job.ack())
    await untilWaitedFor(caller)
    await caller.query('commit')
    expect(await ack).toBe('lease_lost')
    expect(await deadLetters(queue)).toHaveLength(1)
  })

  test('J3 it runs out but nobody has buried it: its ack succeeds and no dead letter follows', async () => {
    const { queue, job } = await claimed(SHORT_MS, { maxAttempts: 1 })
    await untilExpired(queue)
    expect(await outcome(job.ack())).toBe('ok')
    await observer.query(`select * from ${schema}.reap_jobs(100)`)
    expect(await deadLetters(queue)).toEqual([])
  })
})

describe('settlements of many at once', () => {
  test('J6 of two acks of one job by the process that claimed it twice, the older is refused and the newer stands', async () => {
    const { queue, job: first } = await claimed(SHORT_MS)
    const second = await claim(bus, queue, LONG_MS)
    expect(await Promise.all([first, second].map((job) => outcome(job.ack())))).toEqual(['lease_lost', 'ok'])
    expect(await left(queue)).toBe(0)
    const { queue: another, job: older } = await claimed(SHORT_MS)
    const newer = await claim(bus, another, LONG_MS)
    expect(await Promise.all([newer, older].map((job) => outcome(job.ack())))).toEqual(['ok', 'lease_lost'])
    expect(await left(another)).toBe(0)
  })

  test('J6 of two naks of one job by the process that claimed it twice, the delay of the newer counts', async () => {
    const { queue, job: first } = await claimed(SHORT_MS)
    const second = await claim(bus, queue, LONG_MS)
    expect(await Promise.all([outcome(first.nak(LONG_MS)), outcome(second.nak(0))])).toEqual(['lease_lost', 'ok'])
    const third = await claim(other, queue, LONG_MS)
    expect(third.attempt).toBe(3)
    await third.ack()
  })

  test('J2 batches of shuffled ids from eight clients never reach the caller as a deadlock', async () => {
    const queue = freshQueue()
    await bus.jobs.enqueueMany(
      queue,
      Array.from({ length: 200 }, () => ({ payload: 'p' })),
    )
    const { rows } = await observer.query(`select id, token from ${schema}.claim_jobs($1, 'w', 60000, 200)`, [queue])
    const tokens = rows as { id: string; token: string }[]
    const clients = await Promise.all(Array.from({ length: 8 }, () => session(connectionString)))
    try {
      // Every client locks all of them, again and again: only the order in which the rows are locked keeps them apart.
      await Promise.all(
        clients.map(async (client) => {
          for (let round = 0; round < 10; round++) {
            const mine = tokens.toSorted(() => Math.random() - 0.5)
            await client.query('begin')
            const { rows: locked } = await client.query(`select cardinality(${schema}.settle_jobs($1, $2, false)) as n`, [
              mine.map(({ id }) => id),
              mine.map(({ token }) => token),
            ])
            expect(locked).toEqual([{ n: 200 }])
            await client.query('rollback')
          }
        }),
      )
      const acked = await Promise.all(
        clients.map(async (client) => {
          const mine = tokens.toSorted(() => Math.random() - 0.5)
          const answer = await client.query(`select * from ${schema}.ack_jobs($1, $2)`, [
            mine.map(({ id }) => id),
            mine.map(({ token }) => token),
          ])
          return answer.rowCount ?? 0
        }),
      )
      expect(acked.reduce((sum, n) => sum + n, 0)).toBe(200)
      expect(await left(queue)).toBe(0)
    } finally {
      await Promise.all(clients.map((client) => client[Symbol.asyncDispose]()))
    }
  })
})
