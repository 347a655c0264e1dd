/** Acks of jobs in the caller's transaction, on dying connections and under a clock that jumps. */

import { describe, expect, test } from 'vitest'
import { session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import {
  ackOnDyingConnection,
  caller,
  claim,
  claimed,
  connectionString,
  deadLetters,
  LONG_MS,
  left,
  observer,
  other,
  results,
  SHORT_MS,
  schema,
  setTheStage,
  untilExpired,
} from './support/jobs-stage.ts'
import { outcome } from './support/outcome.ts'

setTheStage()

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
