/** Claims beside one another and beside open transactions. */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { outcome, text } from './support/outcome.ts'

const schema = freshSchema()
const connectionString = databaseUrl()
const LONG_MS = 60_000

let bus: PostgresBus
let observer: Session
let caller: Session
let queues = 0

beforeAll(async () => {
  bus = await PostgresBus.connect({ connectionString, schema, maintenance: false, pollIntervalMs: 100, maxPayloadBytes: 4 * 1024 * 1024 })
  observer = await session(connectionString)
  caller = await session(connectionString)
})

afterAll(async () => {
  await bus.close()
  await observer.query(`drop schema ${schema} cascade`)
  await Promise.all([observer[Symbol.asyncDispose](), caller[Symbol.asyncDispose]()])
})

async function enqueued(many: number, job: { priority?: number; maxAttempts?: number } = {}): Promise<{ queue: string; ids: string[] }> {
  const queue = `q${++queues}`
  return {
    queue,
    ids: await bus.jobs.enqueueMany(
      queue,
      Array.from({ length: many }, () => ({ payload: 'p', ...job })),
    ),
  }
}

/** A claim in an open transaction, by SQL: its rows stay locked until the caller ends it. */
async function openClaim(by: Session, queue: string, many: number): Promise<string[]> {
  await by.query('begin')
  const { rows } = await by.query(`select id from ${schema}.claim_jobs($1, 'w', 60000, $2)`, [queue, many])
  return (rows as { id: string }[]).map(({ id }) => id)
}

describe('a claim beside another that has not committed', () => {
  test('J2 neither waits for it nor gets what it took, and answers null when there is nothing else', async () => {
    const { queue, ids } = await enqueued(5)
    const taken = await openClaim(caller, queue, 3)
    const got = await bus.jobs.claimMany(queue, 'w', LONG_MS, { limit: 5 })
    expect([...taken, ...got.map(({ id }) => id)].sort()).toEqual(ids.toSorted())
    expect(got).toHaveLength(2)
    expect(await bus.jobs.claim(queue, 'w', LONG_MS)).toBeNull()
    await caller.query('commit')
  })

  test('J2 a claim that waits gets the jobs within a poll interval when the other is rolled back', async () => {
    const { queue, ids } = await enqueued(1)
    await openClaim(caller, queue, 1)
    const waiting = bus.jobs.claim(queue, 'w', LONG_MS, { waitMs: 10_000 })
    await caller.query('rollback')
    const job = await waiting
    expect(job).toMatchObject({ id: ids[0], attempt: 1 })
  })

  test('J8 the highest priority is locked: the next one is handed out meanwhile, and the first when it is free', async () => {
    const queue = `q${++queues}`
    const [high] = await bus.jobs.enqueueMany(queue, [{ payload: 'high', priority: 10 }])
    await bus.jobs.enqueueMany(queue, [
      { payload: 'low', priority: -1 },
      { payload: 'middle', priority: 1 },
    ])
    expect(await openClaim(caller, queue, 1)).toEqual([high])
    expect(text((await bus.jobs.claim(queue, 'w', LONG_MS))!.payload)).toBe('middle')
    await caller.query('rollback')
    expect(text((await bus.jobs.claim(queue, 'w', LONG_MS))!.payload)).toBe('high')
    expect(text((await bus.jobs.claim(queue, 'w', LONG_MS))!.payload)).toBe('low')
  })

  test('J2 a burial that has not committed holds up neither a claim nor an enqueue of the queue', async () => {
    const { queue } = await enqueued(3, { maxAttempts: 1 })
    await observer.query(`select from ${schema}.claim_jobs($1, 'dead', 1, 3)`, [queue])
    await expect
      .poll(
        async () =>
          (await observer.query(`select from ${schema}.jobs where queue = $1 and visible_at < clock_timestamp()`, [queue])).rowCount,
      )
      .toBe(3)
    await caller.query('begin')
    expect((await caller.query(`select from ${schema}.claim_jobs($1, 'w', 60000, 1)`, [queue])).rowCount).toBe(0)
    const id = await bus.jobs.enqueue(queue, { payload: 'fresh' })
    expect((await bus.jobs.claim(queue, 'w', LONG_MS))?.id).toBe(id)
    await caller.query('commit')
  })

  test('J1 a job enqueued in an open transaction is claimed by nobody before the commit, and at once after it', async () => {
    const queue = `q${++queues}`
    await caller.query('begin')
    const late = await bus.jobs.enqueue(queue, { payload: 'late', priority: 100 }, { tx: caller })
    const early = await bus.jobs.enqueue(queue, { payload: 'early' })
    expect((await bus.jobs.claim(queue, 'w', LONG_MS))?.id).toBe(early)
    expect(await bus.jobs.claim(queue, 'w', LONG_MS)).toBeNull()
    const waiting = bus.jobs.claim(queue, 'w', LONG_MS, { waitMs: 10_000 })
    await caller.query('commit')
    expect((await waiting)?.id).toBe(late)
  })
})

describe('many claims at once', () => {
  test('J2 sixteen sessions claim two thousand jobs: each exactly once, in batches no larger than asked for', async () => {
    const { queue, ids } = await enqueued(2_000)
    const clients = await Promise.all(Array.from({ length: 16 }, () => session(connectionString)))
    try {
      const taken = await Promise.all(
        clients.map(async (client, n) => {
          const mine: string[] = []
          for (;;) {
            const { rows } = await client.query(`select id, attempt from ${schema}.claim_jobs($1, $2, 60000, $3)`, [queue, `w${n}`, n + 1])
            expect(rows.length).toBeLessThanOrEqual(n + 1)
            if (rows.length === 0) return mine
            for (const { id, attempt } of rows as { id: string; attempt: number }[]) {
              expect(attempt).toBe(1)
              mine.push(id)
            }
          }
        }),
      )
      const rest = await observer.query(`select id from ${schema}.claim_jobs($1, 'rest', 60000, 2000)`, [queue])
      const all = [...taken.flat(), ...(rest.rows as { id: string }[]).map(({ id }) => id)]
      expect(all.toSorted()).toEqual(ids.toSorted())
      const { rows } = await observer.query(`select count(distinct token)::int as n from ${schema}.jobs where queue = $1`, [queue])
      expect(rows).toEqual([{ n: 2_000 }])
    } finally {
      await Promise.all(clients.map((client) => client[Symbol.asyncDispose]()))
    }
  })

  test('J2 a batch of large jobs stops early by their size; those it left are claimable at once, their attempts not counted', async () => {
    const queue = `q${++queues}`
    const payload = new Uint8Array(4 * 1024 * 1024)
    const ids: string[] = []
    for (let n = 0; n < 10; n++) ids.push(await bus.jobs.enqueue(queue, { payload }))
    const got: string[] = []
    let batches = 0
    while (got.length < 10) {
      const jobs = await bus.jobs.claimMany(queue, 'w', LONG_MS, { limit: 100 })
      expect(jobs.length).toBeGreaterThan(0)
      for (const job of jobs) {
        expect(job.attempt).toBe(1)
        got.push(job.id)
      }
      batches++
    }
    expect(got).toEqual(ids)
    expect(batches).toBeGreaterThan(1)
  })
})

describe('where a claim must not run', () => {
  test('J7 in a REPEATABLE READ transaction it is refused: a frozen snapshot would hand out what is no longer there', async () => {
    const { queue } = await enqueued(1)
    await caller.query('begin isolation level repeatable read')
    await expect(caller.query(`select from ${schema}.claim_jobs($1, 'w', 60000, 1)`, [queue])).rejects.toThrow('READ COMMITTED')
    await caller.query('rollback')
  })

  test('J7 where connections are SERIALIZABLE by default the bus claims and settles all the same, concurrently', async () => {
    const url = new URL(connectionString)
    url.searchParams.set('options', '-c default_transaction_isolation=serializable')
    await using strict = await PostgresBus.connect({ connectionString: url.href, schema, maintenance: false })
    const { queue, ids } = await enqueued(100)
    const jobs = (await Promise.all(Array.from({ length: 20 }, () => strict.jobs.claimMany(queue, 'w', LONG_MS, { limit: 10 })))).flat()
    for (;;) {
      const rest = await strict.jobs.claimMany(queue, 'w', LONG_MS, { limit: 10 })
      if (rest.length === 0) break
      jobs.push(...rest)
    }
    expect(jobs.map(({ id }) => id).sort()).toEqual(ids.toSorted())
    const outcomes = await Promise.all(jobs.map((job, n) => outcome(n % 2 ? job.ack() : job.nak(0))))
    expect(new Set(outcomes)).toEqual(new Set(['ok']))
  })
})
