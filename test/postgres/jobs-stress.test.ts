/**
 * Jobs enqueued in transactions that commit, roll back and use savepoints, worked by processes that are killed at random: every
 * job of a committed transaction has exactly one effect, none of a rolled-back one has any.
 */

import { afterAll, beforeAll, beforeEach, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { type Child, startChild } from '../support/child.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'

const schema = freshSchema()
const connectionString = databaseUrl()
const LEASE_MS = 800
const PROCESSES = 3
const ENqueueRS = 4
const TRANSACTIONS = 150
const PER_TRANSACTION = 5
const KILLS = 12
const PLAIN_JOBS = 4_000
const ROUNDS = 8

let bus: PostgresBus
let observer: Session
let queue: string

beforeAll(async () => {
  bus = await PostgresBus.connect({ connectionString, schema })
  observer = await session(connectionString)
  // No keys: a job whose effect is there twice is to be found, not prevented.
  await observer.query(`create table ${schema}.effects (job bigint not null, payload text not null, worker int not null)`)
  await observer.query(`create table ${schema}.acks (job bigint not null)`)
})

beforeEach(async () => {
  queue = `work-${crypto.randomUUID()}`
  await observer.query(`truncate ${schema}.effects, ${schema}.acks`)
})

afterAll(async () => {
  await bus.close()
  await observer.query(`drop schema ${schema} cascade`)
  await observer[Symbol.asyncDispose]()
})

test('J1, J2, J3 and J6 workers killed at random: one effect for each job of a committed transaction, none for any other', async () => {
  const kept: string[] = []
  const discarded: string[] = []
  const complaints: unknown[] = []
  let producing = true
  let orphaned = 0

  /** Starts a process anew whenever it was killed, until there is nothing left to do. */
  const children = Array.from({ length: PROCESSES }, () => start('transaction'))
  const killing = (async () => {
    await Promise.all(children.map((child) => child.next(({ ready }) => ready === true, 30_000)))
    for (let kill = 0; kill < KILLS; kill++) {
      const victim = kill % PROCESSES
      const before = await effects()
      // Killed in the middle of its work: some jobs later than the last kill, not some time later.
      await eventually(async () => (await effects()) >= before + 20 || (!producing && (await jobsLeft()) === 0), { timeoutMs: 30_000 })
      complaints.push(...complaintsOf(children[victim]!))
      const victimProcess = children[victim]!
      await victimProcess.kill('SIGKILL')
      orphaned += await heldBy(victimProcess)
      children[victim] = start('transaction')
    }
  })()

  const enqueuing = Promise.all(
    Array.from({ length: ENqueueRS }, async (_, enqueuer) => {
      await using client = await session(connectionString)
      for (let transaction = 0; transaction < TRANSACTIONS; transaction++) {
        const dice = Math.random()
        const name = `${enqueuer}.${transaction}`
        const mine = Array.from({ length: PER_TRANSACTION }, (_, n) => `${name}.${n}`)
        await client.query('begin')
        if (dice < 0.2) {
          await bus.jobs.enqueueMany(queue, jobs(mine), { tx: client })
          await client.query('rollback')
          discarded.push(...mine)
        } else if (dice < 0.4) {
          await bus.jobs.enqueue(queue, jobs([mine[0]!])[0]!, { tx: client })
          await client.query('savepoint s')
          await bus.jobs.enqueueMany(queue, jobs(mine.slice(1)), { tx: client })
          await client.query('rollback to savepoint s')
          await client.query('commit')
          kept.push(mine[0]!)
          discarded.push(...mine.slice(1))
        } else {
          await bus.jobs.enqueueMany(queue, jobs(mine), { tx: client })
          await client.query('commit')
          kept.push(...mine)
        }
      }
    }),
  ).finally(() => {
    producing = false
  })

  try {
    await Promise.all([enqueuing, killing])
    await eventually(async () => (await jobsLeft()) === 0, { timeoutMs: 40_000, everyMs: 100, what: 'the end of the queue' })
    for (const child of children) complaints.push(...complaintsOf(child))
  } finally {
    await Promise.all(children.map((child) => child.kill('SIGKILL')))
  }

  // The kills hit jobs in the middle.
  expect(orphaned).toBeGreaterThan(KILLS)
  const { rows } = await observer.query(`select payload from ${schema}.effects`)
  const seen = (rows as { payload: string }[]).map(({ payload }) => payload)
  expect(seen.filter((payload, n) => seen.indexOf(payload) !== n)).toEqual([])
  const without = new Set(seen)
  expect(kept.filter((payload) => !without.has(payload))).toEqual([])
  expect(discarded.filter((payload) => without.has(payload))).toEqual([])
  expect(seen.length).toBe(kept.length)
  const { rows: letters } = await observer.query(`select from ${schema}.messages where subject = $1`, [`${queue}.dlq`])
  expect(letters).toEqual([])
  expect(complaints).toEqual([])
}, 120_000)

test('J3 and J6 with plain acks, under kills and stops: every job has an effect, and of all its acks at most one succeeds', async () => {
  const complaints: unknown[] = []
  const ids = await bus.jobs.enqueueMany(queue, jobs(Array.from({ length: PLAIN_JOBS }, (_, n) => `p${n}`)))
  const children = Array.from({ length: PROCESSES }, () => start('plain'))
  let stopped = 0
  try {
    await Promise.all(children.map((child) => child.next(({ ready }) => ready === true, 30_000)))
    for (let round = 0; round < ROUNDS; round++) {
      const before = await effects()
      await eventually(async () => (await effects()) >= before + 150 || (await jobsLeft()) === 0, { timeoutMs: 30_000 })
      const victim = children[round % PROCESSES]!
      if (round % 2) {
        complaints.push(...complaintsOf(victim))
        await victim.kill('SIGKILL')
        children[round % PROCESSES] = start('plain')
      } else {
        // Stopped until others have taken over all that it held; when it goes on, it acks what is no longer its.
        victim.pause()
        stopped += await heldBy(victim)
        await eventually(async () => (await heldBy(victim)) === 0, { timeoutMs: 20_000, what: 'the others taking over' })
        victim.resume()
      }
    }
    await eventually(async () => (await jobsLeft()) === 0, { timeoutMs: 40_000, everyMs: 100, what: 'the end of the queue' })
    for (const child of children) complaints.push(...complaintsOf(child))
  } finally {
    await Promise.all(children.map((child) => child.kill('SIGKILL')))
  }
  expect(stopped).toBeGreaterThan(0)
  const { rows: twice } = await observer.query(`select job from ${schema}.acks group by job having count(*) > 1`)
  expect(twice).toEqual([])
  const { rows: done } = await observer.query(`select distinct job from ${schema}.effects`)
  expect(new Set((done as { job: string }[]).map(({ job }) => job))).toEqual(new Set(ids))
  expect(complaints).toEqual([])
}, 120_000)

function start(mode: 'transaction' | 'plain'): Child {
  return startChild(new URL('./support/effects-child.ts', import.meta.url), {
    args: [connectionString, schema, queue, String(LEASE_MS), mode],
  })
}

/** How many jobs are claimed by the process. */
async function heldBy(child: Child): Promise<number> {
  const { rows } = await observer.query(`select count(*)::int as n from ${schema}.jobs where worker_id = $1 and token is not null`, [
    `worker-${child.pid}`,
  ])
  return (rows[0] as { n: number }).n
}

function jobs(payloads: readonly string[]): { payload: string; maxAttempts: number }[] {
  // Attempts enough for every kill: that none is dead-lettered is part of the test.
  return payloads.map((payload) => ({ payload, maxAttempts: 1_000 }))
}

function complaintsOf(child: Child): unknown[] {
  return [...child.unread().filter(({ unexpected }) => unexpected !== undefined), ...(child.stderr === '' ? [] : [child.stderr])]
}

async function effects(): Promise<number> {
  const { rows } = await observer.query(`select count(*)::int as n from ${schema}.effects`)
  return (rows[0] as { n: number }).n
}

async function jobsLeft(): Promise<number> {
  const { rows } = await observer.query(`select count(*)::int as n from ${schema}.jobs`)
  return (rows[0] as { n: number }).n
}
