/** A bus, another, a session that looks and one with transactions of its own: the stage on which settlements of jobs are tried. */

import { afterAll, beforeAll } from 'vitest'
import { type ClaimedJob, PostgresBus, type PostgresTx } from '../../../src/index.ts'
import { databaseUrl, freshSchema } from '../../support/server.ts'
import { type Session, session } from '../../support/sessions.ts'
import { eventually } from '../../support/wait.ts'

export const schema = freshSchema()
export const connectionString = databaseUrl()
/** Long enough for the steps between a claim and its end on a busy machine, short enough to wait for. */
export const SHORT_MS = 500
export const LONG_MS = 60_000

export let bus: PostgresBus
export let other: PostgresBus
export let observer: Session
export let caller: Session

/** To be called once by a test file. */
export function setTheStage(): void {
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
}

let queues = 0
/** A name that nobody has used. */
export function freshQueue(): string {
  return `q${++queues}`
}

/** A queue with one job, and its first claim. */
export async function claimed(
  leaseTtlMs: number,
  job: { maxAttempts?: number } = {},
): Promise<{ queue: string; job: ClaimedJob<PostgresTx> }> {
  const queue = freshQueue()
  await bus.jobs.enqueue(queue, { payload: 'p', ...job })
  return { queue, job: await claim(bus, queue, leaseTtlMs) }
}

export async function claim(by: PostgresBus, queue: string, leaseTtlMs: number, waitMs = 10_000): Promise<ClaimedJob<PostgresTx>> {
  const job = await by.jobs.claim(queue, 'worker', leaseTtlMs, { waitMs })
  if (!job) throw new Error(`nothing to claim in ${queue}`)
  return job
}

/** By the clock of the server, which alone decides. */
export async function untilExpired(queue: string): Promise<void> {
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

export async function left(queue: string): Promise<number> {
  const { rows } = await observer.query(`select count(*)::int as n from ${schema}.jobs where queue = $1`, [queue])
  return (rows[0] as { n: number }).n
}

export async function results(job: string): Promise<number> {
  const { rows } = await observer.query(`select count(*)::int as n from ${schema}.results where job = $1`, [job])
  return (rows[0] as { n: number }).n
}

export async function deadLetters(queue: string): Promise<{ headers: Record<string, string> }[]> {
  const { rows } = await observer.query(`select headers from ${schema}.messages where subject = $1`, [`${queue}.dlq`])
  return rows as { headers: Record<string, string> }[]
}

export async function blockedBy(pid: number): Promise<number[]> {
  const { rows } = await observer.query('select pid from pg_stat_activity where $1 = any(pg_blocking_pids(pid))', [pid])
  return (rows as { pid: number }[]).map((row) => row.pid)
}

/** Acks, and ends the connection in the middle of the statement: whether it was executed the client cannot know. */
export async function ackOnDyingConnection(job: ClaimedJob<PostgresTx>): Promise<void> {
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
export async function untilWaitedFor(holder: Session): Promise<void> {
  await eventually(async () => (await blockedBy(holder.pid)).length === 1, { what: 'somebody waiting for the lock' })
}
