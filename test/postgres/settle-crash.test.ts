/** The server is killed (SIGKILL to the postmaster) with claims, leases and settlements just made. */

import { afterEach, describe, expect, test } from 'vitest'
import { isBusError, PostgresBus, Worker } from '../../src/index.ts'
import { type EmbeddedPostgres, startEmbeddedPostgres } from '../../src/testing/embedded-postgres.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { outcome, Taker } from './support/outcome.ts'

/**
 * Commits are not waited for by default, and the log is written as late as can be: what a crash may lose, it loses here.
 */
const FORGETFUL = { synchronous_commit: 'off', wal_writer_delay: '10s', wal_writer_flush_after: '1GB', autovacuum: 'off' }
const LONG_MS = 60_000

let server: EmbeddedPostgres | undefined
afterEach(async () => {
  await server?.stop('immediate')
  server = undefined
})

async function start(settings: Record<string, string>): Promise<EmbeddedPostgres> {
  server = await startEmbeddedPostgres({ settings })
  return server
}

async function crash(running: EmbeddedPostgres): Promise<void> {
  await running.kill()
  await running.restart()
}

describe('where the server does not wait for commits by default', () => {
  test('J6 and K5 the bus waits all the same: claims, deliveries and leases survive a crash, and no fence is granted twice', async () => {
    const running = await start(FORGETFUL)
    const { connectionString } = running
    await using bus = await PostgresBus.connect({ connectionString, maintenance: false })
    const [first] = await bus.jobs.enqueueMany('q', [{ payload: 'first' }, { payload: 'second' }])
    await using stream = await bus.pubsub.subscribe('s', 'd', { ackWaitMs: LONG_MS })
    const { seq } = await bus.pubsub.publish('s', 'p')
    const message = await new Taker(stream).expect()
    const lease = await bus.kv.lease('b', 'k', LONG_MS)
    const job = await bus.jobs.claim('q', 'w', LONG_MS)
    expect(job?.id).toBe(first)
    await crash(running)

    await using other = await PostgresBus.connect({ connectionString, maintenance: false })
    const second = await other.jobs.claim('q', 'w', LONG_MS)
    expect(second?.id).not.toBe(first)
    expect(await other.jobs.claim('q', 'w', LONG_MS)).toBeNull()
    expect(await outcome(other.kv.lease('b', 'k', LONG_MS))).toBe('lease_held')
    await using rival = await other.pubsub.subscribe('s', 'd', { ackWaitMs: LONG_MS })
    expect(await new Taker(rival).take(1_500)).toBeNull()
    // Their holders have not noticed.
    expect(await outcome(lease.heartbeat())).toBe('ok')
    expect(await outcome(job!.ack())).toBe('ok')
    expect(await outcome(message.ack())).toBe('ok')
    expect(message.seq).toBe(seq)
    await lease.release()
    expect((await other.kv.lease('b', 'k', LONG_MS)).fence).toBeGreaterThan(lease.fence)
  })

  test('J6 a claim by SQL that a crash forgets is given to another with another token, and the forgotten holder can settle nothing', async () => {
    const running = await start(FORGETFUL)
    const { connectionString } = running
    await using bus = await PostgresBus.connect({ connectionString, maintenance: false })
    await bus.jobs.enqueue('q', { payload: 'p' })
    const claim = async (by: Session) =>
      (await by.query(`select id, token, attempt from klieo.claim_jobs('q', 'w', 60000, 1)`)).rows as {
        id: string
        token: string
        attempt: number
      }[]
    const before = await session(connectionString)
    // Whatever is written is on disk now; nothing after it need be.
    await before.query('checkpoint')
    const [forgotten] = await claim(before)
    await crash(running)
    await using after = await session(connectionString)
    const [again] = await claim(after)
    // It was forgotten: the claim counts as the first once more.
    expect([again?.id, again?.attempt]).toEqual([forgotten!.id, 1])
    expect(again!.token).not.toBe(forgotten!.token)
    for (const settle of [
      'select from klieo.ack_jobs($1, $2)',
      'select from klieo.nak_jobs($1, $2, array[0], array[null])',
      `select from klieo.dead_letter_jobs($1, $2, array['r'])`,
      'select from klieo.release_jobs($1, $2)',
    ]) {
      expect((await after.query(settle, [[forgotten!.id], [forgotten!.token]])).rowCount).toBe(0)
    }
    expect((await after.query('select from klieo.ack_jobs($1, $2)', [[again!.id], [again!.token]])).rowCount).toBe(1)
    await before[Symbol.asyncDispose]()
  })
})

describe('an ack in a prepared transaction', () => {
  test('J6 and P7 neither the end of the lease nor a crash gives the job or the message to anybody; COMMIT PREPARED ends them', async () => {
    const running = await start({ max_prepared_transactions: '10' })
    const { connectionString } = running
    await using bus = await PostgresBus.connect({ connectionString, maintenance: false, pollIntervalMs: 100 })
    await using stream = await bus.pubsub.subscribe('s', 'd', { ackWaitMs: 200 })
    await bus.pubsub.publish('s', 'p')
    const message = await new Taker(stream).expect()
    await bus.jobs.enqueue('q', { payload: 'p' })
    const job = await bus.jobs.claim('q', 'w', 200)
    await using caller = await session(connectionString)
    await caller.query('begin')
    await job!.ack({ tx: caller })
    await message.ack({ tx: caller })
    await caller.query(`prepare transaction 'later'`)
    await stream.close()
    await crash(running)

    await using other = await PostgresBus.connect({ connectionString, maintenance: false, pollIntervalMs: 100 })
    await using look = await session(connectionString)
    await eventually(async () => {
      const { rows } = await look.query('select bool_and(visible_at < clock_timestamp()) as over from klieo.jobs')
      return (rows[0] as { over: boolean }).over
    })
    await using rival = await other.pubsub.subscribe('s', 'd')
    const taker = new Taker(rival)
    expect(await taker.take(500)).toBeNull()
    expect(await other.jobs.claim('q', 'w', LONG_MS)).toBeNull()
    await look.query(`commit prepared 'later'`)
    expect(await taker.take(500)).toBeNull()
    expect(await other.jobs.claim('q', 'w', LONG_MS)).toBeNull()
    expect((await look.query('select from klieo.jobs')).rowCount).toBe(0)
    expect((await look.query('select from klieo.deliveries')).rowCount).toBe(0)
  })
})

describe('a server that is killed again and again under load', () => {
  test('J3 and J6 every job has exactly one effect, and the workers go on by themselves', async () => {
    const running = await start({})
    const { connectionString } = running
    const JOBS = 400
    await using bus = await PostgresBus.connect({ connectionString })
    await using setup = await session(connectionString)
    await setup.query('create table effects (job bigint not null)')
    const surprises: unknown[] = []
    const passing = (error: unknown) =>
      isBusError(error, 'connection') || isBusError(error, 'lease_lost') || isBusError(error, 'unavailable')
    await bus.jobs.enqueueMany(
      'q',
      Array.from({ length: JOBS }, () => ({ payload: 'p', maxAttempts: 100 })),
    )
    const workers = Array.from(
      { length: 2 },
      () =>
        new Worker(
          bus.jobs,
          'q',
          async (job) => {
            await using client = await session(connectionString).catch(() => undefined as unknown as Session)
            if (!client) return job.nak(100)
            try {
              await client.query('begin')
              await client.query('insert into effects values ($1)', [job.id])
              await job.ack({ tx: client })
              await client.query('commit')
            } catch {
              // The transaction may have been committed; only the job knows.
              throw new Error('the server went away')
            }
          },
          {
            concurrency: 4,
            leaseTtlMs: 1_000,
            onError: (error) => {
              if (!passing(error) && (error as Error).message !== 'the server went away') surprises.push(error)
            },
          },
        ),
    )
    try {
      for (let crashes = 1; crashes <= 3; crashes++) {
        await eventually(
          async () => {
            await using look = await session(connectionString)
            const { rows } = await look.query('select count(*)::int as n from effects')
            return (rows[0] as { n: number }).n >= crashes * 60
          },
          { timeoutMs: 20_000, what: 'work before the crash' },
        )
        await crash(running)
      }
      await eventually(
        async () => {
          await using look = await session(connectionString)
          return (await look.query('select from klieo.jobs')).rowCount === 0
        },
        { timeoutMs: 30_000, everyMs: 100, what: 'the end of the queue' },
      )
    } finally {
      await Promise.all(workers.map((worker) => worker.stop({ graceMs: 2_000 })))
    }
    await using look = await session(connectionString)
    const { rows } = await look.query('select count(*)::int as n, count(distinct job)::int as jobs from effects')
    expect(rows).toEqual([{ n: JOBS, jobs: JOBS }])
    expect((await look.query(`select from klieo.messages where subject = 'q.dlq'`)).rowCount).toBe(0)
    expect(surprises).toEqual([])
  }, 90_000)
})
