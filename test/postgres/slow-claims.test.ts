import { afterEach, beforeEach, expect, test } from 'vitest'
import { type ClaimedJob, type JobQueue, PostgresBus, Worker } from '../../src/index.ts'
import { MemoryBus } from '../../src/memory/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { eventually } from '../support/wait.ts'
import { rival } from './support/rival.ts'

const connectionString = databaseUrl()
let schema: string
let bus: PostgresBus

beforeEach(async () => {
  schema = freshSchema()
  bus = await PostgresBus.connect({ connectionString, schema, maintenance: false })
})
afterEach(async () => {
  await bus.close()
})

test('J2 jobs whose claim took longer than jobs may wait for a place are begun all the same', async () => {
  await using observer = await rival(connectionString)
  await observer.query(`create function ${schema}.slow() returns trigger language plpgsql as $$
    begin
      if new.attempts > old.attempts then
        perform pg_sleep(0.3);
      end if;
      return new;
    end $$`)
  await observer.query(`create trigger slow before update on ${schema}.jobs for each row execute function ${schema}.slow()`)
  let runs = 0
  await bus.jobs.enqueue('q', { payload: 'x' })
  const worker = new Worker(
    bus.jobs,
    'q',
    async () => {
      runs++
    },
    { concurrency: 4, leaseTtlMs: 1_500 },
  )
  await eventually(() => runs === 1)
  await worker.stop()
})

/** Every second job is somebody's own object. */
function wrapped(jobs: JobQueue): JobQueue {
  const own = (job: ClaimedJob): ClaimedJob =>
    new Proxy(job, {
      get: (target, key) => {
        const value: unknown = Reflect.get(target, key, target)
        return typeof value === 'function' ? value.bind(target) : value
      },
    })
  return {
    enqueue: jobs.enqueue.bind(jobs),
    enqueueMany: jobs.enqueueMany.bind(jobs),
    claim: jobs.claim.bind(jobs),
    claimMany: async (...args) => (await jobs.claimMany(...args)).map((job, n) => (n % 2 === 0 ? job : own(job))),
  }
}

test('J2 a queue that wraps some of its jobs has all of them handled', async () => {
  const memory = MemoryBus.create()
  const seen = new Set<string>()
  await memory.jobs.enqueueMany(
    'q',
    ['0', '1', '2', '3'].map((payload) => ({ payload, maxAttempts: 1 })),
  )
  const worker = new Worker(
    wrapped(memory.jobs),
    'q',
    async ({ payload }) => {
      seen.add(Buffer.from(payload).toString())
    },
    { concurrency: 4 },
  )
  await eventually(() => seen.size === 4)
  await worker.stop()
  await memory.close()
})

for (const kind of ['memory', 'postgres'] as const) {
  test(`J8 what a worker on ${kind} has claimed ahead and puts back keeps its place`, async () => {
    const own = kind === 'memory' ? MemoryBus.create() : bus
    const order: number[] = []
    const count = 1_500
    await own.jobs.enqueueMany(
      'q',
      Array.from({ length: count }, (_, n) => ({ payload: `${n}` })),
    )
    const gate = Promise.withResolvers<void>()
    let begun = 0
    const worker = new Worker(
      own.jobs as JobQueue,
      'q',
      async ({ payload }) => {
        order.push(Number(Buffer.from(payload).toString()))
        if (++begun > 600) await gate.promise
      },
      { concurrency: 2 },
    )
    await eventually(() => begun === 602)
    const stopped = worker.stop()
    gate.resolve()
    await stopped
    for (let left = count - begun; left > 0; ) {
      const jobs = await own.jobs.claimMany('q', 'next', 60_000, { limit: 500 })
      for (const { payload } of jobs) order.push(Number(Buffer.from(payload).toString()))
      left -= jobs.length
      expect(jobs.length).toBeGreaterThan(0)
    }
    expect(order).toEqual(Array.from({ length: count }, (_, n) => n))
    if (own !== bus) await own.close()
  })
}
