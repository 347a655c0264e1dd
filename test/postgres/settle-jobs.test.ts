/** Who may settle a job, written out as the steps of the holder, of another claimer and of open transactions. */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { type ClaimedJob, PostgresBus, type PostgresTx } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { outcome } from './support/outcome.ts'

const schema = freshSchema()
const connectionString = databaseUrl()
/** Long enough for the steps between a claim and its end on a busy machine, short enough to wait for. */
const SHORT_MS = 300
const LONG_MS = 60_000

let bus: PostgresBus
let other: PostgresBus
let observer: Session
let caller: Session

beforeAll(async () => {
  bus = await PostgresBus.connect({ connectionString, schema, maintenance: false })
  other = await PostgresBus.connect({ connectionString, schema, maintenance: false })
  observer = await session(connectionString)
  caller = await session(connectionString)
  await observer.query(`create table ${schema}.results (job text not null)`)
})

afterAll(async () => {
  await Promise.all([bus.close(), other.close()])
  await observer.query(`drop schema ${schema} cascade`)
  await Promise.all([observer[Symbol.asyncDispose](), caller[Symbol.asyncDispose]()])
})

let queues = 0
/** A queue with one job, and its first claim. */
async function claimed(leaseTtlMs: number, job: { maxAttempts?: number } = {}): Promise<{ queue: string; job: ClaimedJob<PostgresTx> }> {
  const queue = `q${++queues}`
  await bus.jobs.enqueue(queue, { payload: 'p', ...job })
  return { queue, job: await claim(bus, queue, leaseTtlMs) }
}

async function claim(by: PostgresBus, queue: string, leaseTtlMs: number, waitMs = 10_000): Promise<ClaimedJob<PostgresTx>> {
  const job = await by.jobs.claim(queue, 'worker', leaseTtlMs, { waitMs })
  if (!job) throw new Error(`nothing to claim in ${queue}`)
  return job
}

/** By the clock of the server, which alone decides. */
async function untilExpired(queue: string): Promise<void> {
  await eventually(
    async () => {
      const { rows } = await observer.query(
        `select bool_and(visible_at <= clock_timestamp()) as over from ${schema}.jobs where queue = $1`,
        [queue],
      )
      return (rows[0] as { over: boolean }).over
    },
    { what: 'the end of the lease' },
  )
}

async function left(queue: string): Promise<number> {
  const { rows } = await observer.query(`select count(*)::int as n from ${schema}.jobs where queue = $1`, [queue])
  return (rows[0] as { n: number }).n
}

async function results(job: string): Promise<number> {
  const { rows } = await observer.query(`select count(*)::int as n from ${schema}.results where job = $1`, [job])
  return (rows[0] as { n: number }).n
}

async function deadLetters(queue: string): Promise<{ headers: Record<string, string> }[]> {
  const { rows } = await observer.query(`select headers from ${schema}.messages where subject = $1`, [`${queue}.dlq`])
  return rows as { headers: Record<string, string> }[]
}

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
    const queue = `q${++queues}`
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

describe('an ack in the caller’s transaction', () => {
  test('J6 the lease runs out meanwhile: nobody gets the job; the commit ends it, and the result is there once', async () => {
    const { queue, job } = await claimed(SHORT_MS)
    await caller.query('begin')
    await caller.query(`insert into ${schema}.results values ($1)`, [job.id])
    await job.ack({ tx: caller })
    await untilExpired(queue)
    expect(await other.jobs.claim(queue, 'worker', LONG_MS)).toBeNull()
    await caller.query('commit')
    expect(await left(queue)).toBe(0)
    expect(await results(job.id)).toBe(1)
  })

  test('J6 the lease runs out meanwhile and the transaction rolls back: the job is claimed again, and the result is not there', async () => {
    const { queue, job } = await claimed(SHORT_MS)
    await caller.query('begin')
    await caller.query(`insert into ${schema}.results values ($1)`, [job.id])
    await job.ack({ tx: caller })
    await untilExpired(queue)
    const waiting = claim(other, queue, LONG_MS)
    await caller.query('rollback')
    const again = await waiting
    expect(again.id).toBe(job.id)
    expect(again.attempt).toBe(2)
    expect(await results(job.id)).toBe(0)
    expect(await outcome(job.ack())).not.toBe('ok')
    expect(await outcome(again.ack())).toBe('ok')
  })

  test('J3 it is the last attempt and its lease runs out meanwhile: neither a claim nor the reaper buries it before the transaction ends', async () => {
    const { queue, job } = await claimed(SHORT_MS, { maxAttempts: 1 })
    await caller.query('begin')
    await job.ack({ tx: caller })
    await untilExpired(queue)
    expect(await other.jobs.claim(queue, 'worker', LONG_MS)).toBeNull()
    await observer.query(`select * from ${schema}.reap_jobs(100)`)
    expect(await deadLetters(queue)).toEqual([])
    await caller.query('commit')
    await observer.query(`select * from ${schema}.reap_jobs(100)`)
    expect(await deadLetters(queue)).toEqual([])
    expect(await left(queue)).toBe(0)
  })

  test('J6 the job was lost before: lease_lost, the transaction goes on, and rolling it back leaves no result', async () => {
    const { queue, job } = await claimed(SHORT_MS)
    const again = await claim(other, queue, LONG_MS)
    await caller.query('begin')
    await caller.query(`insert into ${schema}.results values ($1)`, [job.id])
    expect(await outcome(job.ack({ tx: caller }))).toBe('lease_lost')
    // Still usable.
    expect((await caller.query('select 1 as one')).rows).toEqual([{ one: 1 }])
    await caller.query('rollback')
    expect(await results(job.id)).toBe(0)
    expect(await outcome(again.ack())).toBe('ok')
  })

  test('J6 a heartbeat neither waits for it nor disturbs it', async () => {
    const { queue, job } = await claimed(LONG_MS)
    await caller.query('begin')
    await job.ack({ tx: caller })
    const started = performance.now()
    expect(await outcome(job.heartbeat())).toBe('ok')
    expect(performance.now() - started).toBeLessThan(1_000)
    await caller.query('commit')
    expect(await left(queue)).toBe(0)
  })

  test('J6 after the commit a heartbeat is refused and a second ack is already_settled', async () => {
    const { job } = await claimed(LONG_MS)
    await caller.query('begin')
    await job.ack({ tx: caller })
    await caller.query('commit')
    expect(await outcome(job.heartbeat())).toBe('lease_lost')
    expect(await outcome(job.ack())).toBe('already_settled')
  })

  test('J6 a second ack while it is open is already_settled at once, in another transaction and without one', async () => {
    const { queue, job } = await claimed(LONG_MS)
    await caller.query('begin')
    await job.ack({ tx: caller })
    expect(await outcome(job.ack())).toBe('already_settled')
    expect(await outcome(job.nak(0))).toBe('already_settled')
    expect(await outcome(job.deadLetter('no'))).toBe('already_settled')
    await observer.query('begin')
    expect(await outcome(job.ack({ tx: observer }))).toBe('already_settled')
    await observer.query('rollback')
    await caller.query('commit')
    expect(await left(queue)).toBe(0)
    expect(await deadLetters(queue)).toEqual([])
  })

  test('J6 rolled back to a savepoint it has not happened: the holder acks once more in the same transaction', async () => {
    const { queue, job } = await claimed(LONG_MS)
    await caller.query('begin')
    await caller.query('savepoint s')
    await job.ack({ tx: caller })
    await caller.query('rollback to savepoint s')
    expect(await outcome(job.ack({ tx: caller }))).toBe('ok')
    await caller.query('commit')
    expect(await left(queue)).toBe(0)
  })

  test('J6 it was rolled back and another has claimed the job: nothing was settled, so a further settlement is lease_lost', async () => {
    const { queue, job } = await claimed(SHORT_MS)
    await caller.query('begin')
    await job.ack({ tx: caller })
    await caller.query('rollback')
    const again = await claim(other, queue, LONG_MS)
    expect(await outcome(job.nak(0))).toBe('lease_lost')
    expect(await outcome(job.ack())).toBe('lease_lost')
    expect(await outcome(again.ack())).toBe('ok')
  })

  test('J6 its connection dies: the job stays with the holder, who acks it without a transaction', async () => {
    const { queue, job } = await claimed(LONG_MS)
    const dying = await session(connectionString)
    await dying.query('begin')
    await job.ack({ tx: dying })
    await observer.query('select pg_terminate_backend($1)', [dying.pid])
    await eventually(async () => (await observer.query('select from pg_stat_activity where pid = $1', [dying.pid])).rowCount === 0)
    expect(await left(queue)).toBe(1)
    expect(await outcome(job.ack())).toBe('ok')
    expect(await left(queue)).toBe(0)
    await dying[Symbol.asyncDispose]()
  })

  test('J6 a REPEATABLE READ transaction that began after the claim can ack, and another heartbeat meanwhile never loses the result', async () => {
    const { queue, job } = await claimed(LONG_MS)
    await caller.query('begin isolation level repeatable read')
    await caller.query(`insert into ${schema}.results values ($1)`, [job.id])
    await job.heartbeat()
    const acked = await outcome(job.ack({ tx: caller }))
    // The heartbeat changed the row after the snapshot: the server may ask for a repetition, but not settle half.
    if (acked === 'ok') await caller.query('commit')
    else {
      expect(acked).toBe('conflict')
      await caller.query('rollback')
      expect(await outcome(job.ack())).toBe('ok')
    }
    expect(await left(queue)).toBe(0)
    expect(await results(job.id)).toBe(acked === 'ok' ? 1 : 0)
  })
})

describe('an ack whose connection dies', () => {
  test('J6 it is asked for again, and ends the job', async () => {
    const { queue, job } = await claimed(LONG_MS)
    expect(await outcome(ackOnDyingConnection(job))).toBe('ok')
    expect(await left(queue)).toBe(0)
  })

  test('J6 another got the job since: it is refused, also where a heartbeat beside an ack in a transaction had found the row locked', async () => {
    const { queue, job } = await claimed(2_500)
    await caller.query('begin')
    await job.ack({ tx: caller })
    await eventually(async () => {
      const { rows } = await observer.query(
        `select visible_at - clock_timestamp() < interval '500 ms' as soon from ${schema}.jobs where queue = $1`,
        [queue],
      )
      return (rows[0] as { soon: boolean }).soon
    })
    // The row is locked, so the server cannot extend the lease.
    await job.heartbeat()
    await caller.query('rollback')
    const again = await claim(other, queue, LONG_MS)
    expect(await outcome(ackOnDyingConnection(job))).not.toBe('ok')
    expect(await outcome(again.ack())).toBe('ok')
  })
})

describe('the clock of the server is set forward', () => {
  /** To every lease it is as if its time had passed; the holder's own clock knows nothing of it. */
  async function setForward(queue: string): Promise<void> {
    await observer.query(`update ${schema}.jobs set visible_at = visible_at - interval '1 hour' where queue = $1`, [queue])
  }

  test('J6 the job is claimed early, and the holder who believes in his lease can neither extend nor settle', async () => {
    const { queue, job } = await claimed(LONG_MS)
    await setForward(queue)
    const again = await claim(other, queue, LONG_MS)
    expect(await outcome(job.heartbeat())).toBe('lease_lost')
    expect(await outcome(job.nak(0))).toBe('lease_lost')
    expect(await outcome(job.ack())).toBe('lease_lost')
    expect(await outcome(again.ack())).toBe('ok')
  })

  test('J6 nor on a dying connection: the token decides, not what the holder reckons', async () => {
    const { queue, job } = await claimed(LONG_MS)
    await setForward(queue)
    const again = await claim(other, queue, LONG_MS)
    expect(await outcome(ackOnDyingConnection(job))).not.toBe('ok')
    expect(await outcome(again.ack())).toBe('ok')
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
  test('J2 batches of shuffled ids from eight clients never reach the caller as a deadlock', async () => {
    const queue = `q${++queues}`
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

async function blockedBy(pid: number): Promise<number[]> {
  const { rows } = await observer.query('select pid from pg_stat_activity where $1 = any(pg_blocking_pids(pid))', [pid])
  return (rows as { pid: number }[]).map((row) => row.pid)
}

/** Acks, and ends the connection in the middle of the statement: whether it was executed the client cannot know. */
async function ackOnDyingConnection(job: ClaimedJob<PostgresTx>): Promise<void> {
  await using blocker = await session(connectionString)
  await blocker.query('begin')
  await blocker.query(`lock table ${schema}.jobs in access exclusive mode`)
  const ack = job.ack()
  ack.catch(() => {})
  await untilWaitedFor(blocker)
  const [pid] = await blockedBy(blocker.pid)
  await blocker.query('select pg_terminate_backend($1)', [pid])
  await blocker.query('rollback')
  await ack
}

/** Resolves once one backend waits for a lock of the session. */
async function untilWaitedFor(holder: Session): Promise<void> {
  await eventually(async () => (await blockedBy(holder.pid)).length === 1, { what: 'somebody waiting for the lock' })
}
