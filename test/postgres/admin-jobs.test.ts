/** What an operator does to jobs beside those who hold, claim and settle them: the steps of two sessions, written out. */

import { describe, expect, test } from 'vitest'
import type { ListJobsOptions } from '../../src/index.ts'
import { JOBS_PAGE, jobsStatement } from '../../src/postgres/admin.sql.ts'
import { eventually } from '../support/wait.ts'
import {
  bus,
  caller,
  claim,
  claimed,
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
} from './support/jobs-stage.ts'
import { outcome } from './support/outcome.ts'

setTheStage()

describe('beside an ack in an open transaction', () => {
  test('A6 cancel, retry and remove say conflict at once and change nothing; after the commit there is no such job', async () => {
    const { queue, job } = await claimed(LONG_MS)
    await caller.query('begin')
    await job.ack({ tx: caller })
    for (const call of [() => bus.admin.cancelJob(job.id), () => bus.admin.retryJob(job.id), () => bus.admin.removeJob(job.id)]) {
      await expect(call()).rejects.toMatchObject({ code: 'conflict', retryable: true })
    }
    expect(await bus.admin.purgeQueue(queue)).toBe(0)
    await caller.query('commit')
    expect(await outcome(bus.admin.cancelJob(job.id))).toBe('not_found')
    expect(await deadLetters(queue)).toEqual([])
  })

  test('A6 after a rollback the job can be cancelled, and its holder is refused', async () => {
    const { queue, job } = await claimed(LONG_MS)
    await caller.query('begin')
    await job.ack({ tx: caller })
    await caller.query('rollback')
    await bus.admin.cancelJob(job.id, 'enough')
    expect(await outcome(job.heartbeat())).toBe('lease_lost')
    expect((await deadLetters(queue)).map(({ headers }) => headers.dlq_reason)).toEqual(['enough'])
  })
})

describe('cancelling', () => {
  test('A2 an ack in a transaction that began before is refused, and the transaction goes on', async () => {
    const { job } = await claimed(LONG_MS)
    await caller.query('begin isolation level repeatable read')
    await caller.query('select 1')
    await bus.admin.cancelJob(job.id)
    await caller.query(`insert into ${schema}.results values ($1)`, [job.id])
    expect(await outcome(job.ack({ tx: caller }))).not.toBe('ok')
    await caller.query('rollback')
    expect((await bus.admin.job(job.id))?.state).toBe('dead')
  })

  test('A2 of a cancel and an ack at the same moment one wins, fifty times over', async () => {
    const ends = new Set<string>()
    for (let round = 0; round < 50; round++) {
      const { queue, job } = await claimed(LONG_MS)
      const both = round % 2 === 0 ? [job.ack(), bus.admin.cancelJob(job.id)] : [bus.admin.cancelJob(job.id), job.ack()]
      const outcomes = await Promise.all(both.map(outcome))
      const [acked, cancelled] = round % 2 === 0 ? outcomes : outcomes.toReversed()
      const letters = await deadLetters(queue)
      ends.add(`${acked}, ${cancelled}`)
      if (acked === 'ok') expect([cancelled, letters.length, await left(queue)]).toEqual(['not_found', 0, 0])
      else expect([acked, cancelled, letters.length, await left(queue)]).toEqual(['lease_lost', 'ok', 1, 1])
    }
    expect([...ends].every((end) => ['ok, not_found', 'lease_lost, ok'].includes(end))).toBe(true)
  })

  test('A2 a job whose lease has run out is cancelled once, however many claim, reap and cancel', async () => {
    for (let round = 0; round < 20; round++) {
      const { queue, job } = await claimed(SHORT_MS, { maxAttempts: 1 })
      if (round === 0) await untilExpired(queue)
      else await observer.query(`update ${schema}.jobs set visible_at = clock_timestamp() where id = $1`, [job.id])
      await Promise.all([
        outcome(bus.admin.cancelJob(job.id)),
        outcome(other.admin.cancelJob(job.id)),
        other.jobs.claim(queue, 'w', LONG_MS),
        observer.query(`select ${schema}.reap_jobs(10)`),
      ])
      expect((await deadLetters(queue)).length).toBe(1)
      expect((await bus.admin.job(job.id))?.state).toBe('dead')
    }
  })
})

describe('pausing', () => {
  test('A3 a claim that began before may give a job; one that begins after the pause resolved gives none', async () => {
    const queue = freshQueue()
    await bus.jobs.enqueueMany(
      queue,
      Array.from({ length: 200 }, () => ({ payload: 'x' })),
    )
    let paused = false
    const after: boolean[] = []
    const claims = [bus, other].map(async (one) => {
      for (let n = 0; n < 60; n++) {
        const begunAfter = paused
        const job = await one.jobs.claim(queue, 'w', LONG_MS)
        if (begunAfter) after.push(job !== null)
        await job?.ack()
      }
    })
    await bus.admin.pauseQueue(queue)
    paused = true
    await Promise.all(claims)
    expect(after).not.toContain(true)
    expect(after.length).toBeGreaterThan(0)
    await bus.admin.resumeQueue(queue)
    expect(await bus.jobs.claim(queue, 'w', LONG_MS)).not.toBeNull()
  })

  test('A3 a pause in a transaction that rolls back was none', async () => {
    const { queue } = await claimed(LONG_MS)
    await bus.jobs.enqueue(queue, { payload: 'x' })
    await caller.query('begin')
    await caller.query(`select ${schema}.pause_queue($1)`, [queue])
    await caller.query('rollback')
    expect(await bus.jobs.claim(queue, 'w', LONG_MS)).not.toBeNull()
  })

  test('J3 a last lease that runs out while the queue is paused is buried all the same', async () => {
    const { queue } = await claimed(SHORT_MS, { maxAttempts: 1 })
    await bus.admin.pauseQueue(queue)
    await untilExpired(queue)
    await eventually(
      async () => {
        await observer.query(`select ${schema}.reap_jobs(10)`)
        return (await deadLetters(queue)).length === 1
      },
      { what: 'the dead letter' },
    )
    await bus.admin.resumeQueue(queue)
  })

  test('J2 asking whether a queue is paused costs a claim no page but that of an empty index', async () => {
    const queue = freshQueue()
    const buffers = async () => {
      await bus.jobs.enqueue(queue, { payload: 'x' })
      await caller.query('begin')
      const { rows } = await caller.query(
        `explain (analyze, buffers, format json) select exists (select from ${schema}.paused_queues p where p.queue = $1)`,
        [queue],
      )
      await caller.query('rollback')
      const [{ Plan: plan }] = (rows[0] as { 'QUERY PLAN': [{ Plan: Record<string, number> }] })['QUERY PLAN']
      return (plan['Shared Hit Blocks'] ?? 0) + (plan['Shared Read Blocks'] ?? 0)
    }
    await buffers()
    expect(await buffers()).toBeLessThanOrEqual(2)
  })
})

test('A2 a purge of more than fits in one statement removes all that was there', async () => {
  const queue = freshQueue()
  await bus.jobs.enqueueMany(
    queue,
    Array.from({ length: 10_050 }, () => ({ payload: 'x' })),
  )
  const held = await claim(bus, queue, LONG_MS)
  expect(await bus.admin.purgeQueue(queue)).toBe(10_049)
  expect(await left(queue)).toBe(1)
  await held.ack()
})

test('A2 one dead job is retried, and a small queue purged, without a look at the jobs beside them', async () => {
  const many = freshQueue()
  const few = freshQueue()
  await bus.jobs.enqueueMany(
    many,
    Array.from({ length: 10_000 }, () => ({ payload: 'x' })),
  )
  await observer.query(`update ${schema}.jobs set died_at = now() where queue = $1`, [many])
  const pages = async (call: string) => {
    const { rows } = await caller.query(`explain (analyze, buffers, format json) select * from ${schema}.${call}`)
    const [{ Plan: plan }] = (rows[0] as { 'QUERY PLAN': [{ Plan: Record<string, number> }] })['QUERY PLAN']
    return (plan['Shared Hit Blocks'] ?? 0) + (plan['Shared Read Blocks'] ?? 0)
  }
  const { rows: dead } = await observer.query(`select id from ${schema}.jobs where queue = $1 order by id limit 10`, [many])
  const retried: number[] = []
  const purged: number[] = []
  // The first of them also pay for the making of plans, which looks at the catalogs.
  for (const { id } of dead as { id: string }[]) {
    retried.push(await pages(`retry_job(${id})`))
    await bus.jobs.enqueue(few, { payload: 'x' })
    purged.push(await pages(`purge_queue('${few}')`))
  }
  expect([await left(many), await left(few)]).toEqual([10_000, 0])
  expect(Math.min(...retried)).toBeLessThan(60)
  expect(Math.min(...purged)).toBeLessThan(60)
})

test('A1 what the role may not is told with the grant for it', async () => {
  const role = `looks_${schema}`
  await observer.query(`create role "${role}" login`)
  await observer.query(`select ${schema}.grant_role('reader', '${role}')`)
  await caller.query(`set role "${role}"`)
  await expect(caller.query(`select ${schema}.cancel_job(1)`)).rejects.toMatchObject({ code: '42501' })
  expect((await caller.query(`select * from ${schema}.queue_stats, ${schema}.bucket_stats limit 0`)).rows).toEqual([])
  await caller.query('reset role')
  await observer.query(`select ${schema}.revoke_role('${role}')`)
  await observer.query(`drop role "${role}"`)
})

describe('a listing', () => {
  /** Rows read by the statement of a page, as a plan says that is made for any values. */
  async function read(statement: string, values: string): Promise<number> {
    await observer.query(`prepare page as ${statement.replaceAll('klieo.', `${schema}.`)}`)
    try {
      const { rows } = await observer.query(`explain (analyze, costs off, timing off, summary off) execute page(${values})`)
      const lines = (rows as { 'QUERY PLAN': string }[]).map((row) => row['QUERY PLAN'])
      return lines.reduce((sum, line) => sum + Number(/Scan .*actual rows=([0-9]+)/.exec(line)?.[1] ?? 0) + removed(line), 0)
    } finally {
      await observer.query('deallocate page')
    }
  }
  async function listed(options: ListJobsOptions): Promise<number[]> {
    const ids: number[] = []
    for await (const { id } of bus.admin.jobs(options)) ids.push(Number(id))
    return ids
  }
  const removed = (line: string) => Number(/Rows Removed by Filter: ([0-9]+)/.exec(line)?.[1] ?? 0)

  test('A1 reads about a page, and of a queue or of the dead not what lies in others', async () => {
    const [big, small] = [freshQueue(), freshQueue()]
    const fill = (queue: string, count: number, diedAt = 'null') =>
      observer.query(
        `insert into ${schema}.jobs (queue, payload, run_at, visible_at, died_at)
         select $1, 'x', now(), now(), ${diedAt}::timestamptz from generate_series(1, $2)`,
        [queue, count],
      )
    const [row] = (await observer.query(`select last_value::text as id from ${schema}.job_id`)).rows as { id: string }[]
    const after = `'${row!.id}'`
    await fill(small, 3)
    await fill(big, 20_000)
    await fill(small, 2, 'now()')
    await observer.query(`analyze ${schema}.jobs`)
    expect(await read(jobsStatement(false, undefined), after)).toBeLessThan(4 * JOBS_PAGE)
    expect(await read(jobsStatement(false, 'ready'), `${after}, 'ready'`)).toBeLessThan(4 * JOBS_PAGE)
    for (const state of [undefined, 'ready', 'dead'] as const) {
      expect((await listed({ queue: small, ...(state && { state }) })).length).toBe({ all: 5, ready: 3, dead: 2 }[state ?? 'all'])
      expect(await read(jobsStatement(true, state), `${after}, '${small}'${state === 'ready' ? ", 'ready'" : ''}`)).toBeLessThan(JOBS_PAGE)
    }
    // Page after page, each once and in their order.
    const ids = await listed({ queue: big })
    expect(ids.length).toBe(20_000)
    expect(ids).toEqual([...new Set(ids)].sort((a, b) => a - b))
  })
})
