import { setTimeout as sleep } from 'node:timers/promises'
import { expect, test } from 'vitest'
import { Limited } from '../../src/cli/limited.ts'
import { type JobQueue, Worker } from '../../src/index.ts'
import { MemoryBus } from '../../src/memory/index.ts'

const CLAIM_MS = 10

/** As a server far away. */
function slow(jobs: JobQueue<never>): JobQueue<never> {
  return {
    enqueue: (...args) => jobs.enqueue(...args),
    enqueueMany: (...args) => jobs.enqueueMany(...args),
    claim: (...args) => jobs.claim(...args),
    async claimMany(...args) {
      const claimed = await jobs.claimMany(...args)
      await sleep(CLAIM_MS)
      return claimed
    },
  }
}

/** Handlers that take less time than a claim: a worker then claims ahead. @returns how many were handled, and how many are left in the queue */
async function work(jobs: number, concurrency: number, limits: { readonly count?: number; readonly untilEmpty: boolean }) {
  const bus = MemoryBus.create()
  await bus.jobs.enqueueMany(
    'q',
    Array.from({ length: jobs }, () => ({ payload: '' })),
  )
  const errors: unknown[] = []
  const { promise: end, resolve } = Promise.withResolvers<void>()
  const limited = new Limited(slow(bus.jobs as JobQueue<never>), { concurrency, ...limits }, resolve)
  let handled = 0
  const worker = new Worker(
    limited.jobs,
    'q',
    () =>
      limited.handle(async () => {
        await sleep(1)
        handled++
      }),
    { concurrency, onError: (error) => errors.push(error) },
  )
  await end
  await worker.stop()
  const left = await bus.jobs.claimMany('q', 'test', 1_000, { limit: 1_000 })
  await bus.close()
  return { handled, left: left.length, errors }
}

test.each([1, 2, 30])('J8 a worker of %i places that is to do so many jobs does as many, and no more', async (concurrency) => {
  expect(await work(150, concurrency, { count: 100, untilEmpty: false })).toEqual({ handled: 100, left: 50, errors: [] })
})

test('J8 a worker that ends with the last job leaves none, however many there were', async () => {
  const numbers = Array.from({ length: 16 }, (_, at) => at + 1)
  const done = await Promise.all(numbers.map((jobs) => work(jobs, 1, { untilEmpty: true })))
  expect(done).toEqual(numbers.map((handled) => ({ handled, left: 0, errors: [] })))
})
