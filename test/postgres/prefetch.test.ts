/** What a worker claims ahead of its need, and a stream fetches ahead of it. */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { type Bus, type JobQueue, PostgresBus, Worker } from '../../src/index.ts'
import { MemoryBus, MemoryStore } from '../../src/memory/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'

const schema = freshSchema()
const connectionString = databaseUrl()
const store = new MemoryStore()
const LONG_MS = 60_000
const MANY = 3_000
const MOST_READY = 1_000

let observer: Session
let queues = 0

beforeAll(async () => {
  observer = await session(connectionString)
})

afterAll(async () => {
  await observer.query(`drop schema if exists ${schema} cascade`)
  await observer[Symbol.asyncDispose]()
})

const backends: readonly { readonly name: string; open(): Promise<Bus<never>> }[] = [
  { name: 'MemoryBus', open: async () => MemoryBus.create({ store }) },
  {
    name: 'PostgresBus',
    open: async () => (await PostgresBus.connect({ connectionString, schema, maintenance: false })) as unknown as Bus<never>,
  },
]

/** Its claims are written down; the jobs are the queue's own. */
function observed(jobs: JobQueue): { readonly jobs: JobQueue; readonly limits: number[]; claimed: number } {
  const seen = {
    limits: [] as number[],
    claimed: 0,
    jobs: {
      enqueue: jobs.enqueue.bind(jobs),
      enqueueMany: jobs.enqueueMany.bind(jobs),
      claim: jobs.claim.bind(jobs),
      claimMany: async (...args: Parameters<JobQueue['claimMany']>) => {
        seen.limits.push(args[3].limit)
        const got = await jobs.claimMany(...args)
        seen.claimed += got.length
        return got
      },
    } satisfies JobQueue,
  }
  return seen
}

/** Handlers that take no time, until so many have begun: from then on they end when they are told to. */
function quickThenStuck(quick: number) {
  const gate = Promise.withResolvers<void>()
  const counts = { begun: 0, stuck: 0 }
  return {
    counts,
    open: () => gate.resolve(),
    handler: async () => {
      if (++counts.begun <= quick) return
      counts.stuck++
      await gate.promise
    },
  }
}

for (const { name, open } of backends) {
  describe(name, () => {
    test('J3 what a worker has claimed ahead goes back at once when it stops, its only attempt not counted', async () => {
      await using bus = await open()
      await using other = await open()
      const queue = `q${++queues}`
      await bus.jobs.enqueueMany(
        queue,
        Array.from({ length: MANY }, () => ({ payload: 'p', maxAttempts: 1 })),
      )
      const seen = observed(bus.jobs)
      const { counts, handler, open: release } = quickThenStuck(500)
      const worker = new Worker(seen.jobs, queue, handler, { concurrency: 4, onError: () => {} })
      await eventually(() => counts.stuck === 4 && seen.claimed > counts.begun, { what: 'handlers that are stuck, and jobs ready' })
      const ended = worker.stop({ graceMs: 5_000 })
      const left: string[] = []
      await eventually(
        async () => {
          for (const job of await other.jobs.claimMany(queue, 'w', LONG_MS, { limit: 1_000 })) {
            expect(job.attempt).toBe(1)
            left.push(job.id)
          }
          return left.length >= MANY - 504
        },
        { what: 'the rest, while the stuck ones still have their grace' },
      )
      release()
      await ended
      expect(new Set(left).size).toBe(MANY - 504)
      expect(counts.begun).toBe(504)
    })

    test('J3 what waits for a place longer than a sixth of the lease goes to others, its only attempt not counted', async () => {
      await using bus = await open()
      await using other = await open()
      const queue = `q${++queues}`
      await bus.jobs.enqueueMany(
        queue,
        Array.from({ length: MANY }, () => ({ payload: 'p', maxAttempts: 1 })),
      )
      const seen = observed(bus.jobs)
      const { counts, handler, open: release } = quickThenStuck(500)
      const worker = new Worker(seen.jobs, queue, handler, { concurrency: 4, leaseTtlMs: 3_000 })
      await eventually(() => counts.stuck === 4 && seen.claimed > counts.begun, { what: 'handlers that are stuck, and jobs ready' })
      const left: string[] = []
      await eventually(
        async () => {
          for (const job of await other.jobs.claimMany(queue, 'w', LONG_MS, { limit: 1_000 })) {
            expect(job.attempt).toBe(1)
            left.push(job.id)
          }
          return left.length >= MANY - 504
        },
        { what: 'the rest, though the worker runs on' },
      )
      release()
      await worker.stop()
      expect(new Set(left).size).toBe(MANY - 504)
      expect(counts.begun).toBe(504)
    })

    test('J2 a worker with a backlog holds no more than its places and a thousand', async () => {
      await using bus = await open()
      const queue = `q${++queues}`
      const count = 20_000
      for (let n = 0; n < count; n += 10_000)
        await bus.jobs.enqueueMany(
          queue,
          Array.from({ length: 10_000 }, () => ({ payload: '' })),
        )
      const seen = observed(bus.jobs)
      let begun = 0
      let most = 0
      await using worker = new Worker(
        seen.jobs,
        queue,
        async () => {
          most = Math.max(most, seen.claimed - begun++)
        },
        { concurrency: 10 },
      )
      await eventually(() => begun === count, { timeoutMs: 20_000, what: 'the end of the backlog' })
      await worker.stop()
      expect(most).toBeLessThanOrEqual(10 + MOST_READY)
      expect(Math.max(...seen.limits)).toBeGreaterThan(10)
    })

    test('J2 a worker whose handlers take long claims only for free places', async () => {
      await using bus = await open()
      const queue = `q${++queues}`
      await bus.jobs.enqueueMany(
        queue,
        Array.from({ length: 40 }, () => ({ payload: '' })),
      )
      const seen = observed(bus.jobs)
      let ended = 0
      await using worker = new Worker(
        seen.jobs,
        queue,
        async () => {
          // Long beside a claim on a busy machine, too.
          await new Promise((resolve) => setTimeout(resolve, 500))
          ended++
        },
        { concurrency: 4 },
      )
      await eventually(() => ended >= 16, { what: 'sixteen jobs' })
      await worker.stop()
      expect(Math.max(...seen.limits)).toBeLessThanOrEqual(4)
      // A claim may have been under way when it was told to stop: what that brought went back.
      expect(seen.claimed - ended).toBeLessThanOrEqual(4)
    })
  })
}

test('P8 a quick consumer of a long backlog has never more than maxInFlight handed out', async () => {
  await using bus = await PostgresBus.connect({ connectionString, schema, maintenance: false })
  const count = 5_000
  await bus.pubsub.publishMany(Array.from({ length: count }, () => ({ subject: 's.ahead', payload: '' })))
  await using stream = await bus.pubsub.subscribe('s.ahead', 'ahead', { maxInFlight: 64 })
  let seen = 0
  let most = 0
  const acks: Promise<void>[] = []
  for await (const message of stream) {
    acks.push(message.ack())
    if (++seen % 250 === 0) {
      const { rows } = await observer.query(
        `select (in_flight + redelivering)::int as held from ${schema}.consumer_stats where durable = 'ahead'`,
      )
      most = Math.max(most, (rows as { held: number }[])[0]!.held)
    }
    if (seen === count) break
  }
  await Promise.all(acks)
  expect(most).toBeGreaterThan(0)
  expect(most).toBeLessThanOrEqual(64)
})
