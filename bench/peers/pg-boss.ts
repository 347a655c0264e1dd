/** pg-boss with batches for throughput and with LISTEN/NOTIFY for latency. */

import type { Contender, JobsSession } from '../contenders.ts'
import { fromStored, load, type Stored, toStored, versionOf } from './packages.ts'

const PACKAGE = 'pg-boss'
/** NOTIFY in each insert costs throughput, so that only the queue of the latencies has it. */
const QUEUE = 'bench'
const NOTIFIED = 'bench-notified'

interface WorkOptions {
  readonly batchSize: number
  readonly localConcurrency: number
  readonly burstWhenBatchFull: boolean
  readonly pollingIntervalSeconds: number
}

interface Boss {
  on(event: 'error' | 'warning', listener: (error: unknown) => void): void
  start(): Promise<unknown>
  stop(options: { graceful: boolean; close: boolean }): Promise<void>
  createQueue(name: string, options: { notify: boolean }): Promise<void>
  deleteAllJobs(): Promise<unknown>
  send(name: string, data: Stored): Promise<string | null>
  insert(name: string, jobs: readonly { data: Stored }[]): Promise<unknown>
  work(name: string, options: WorkOptions, handler: (jobs: readonly { data: Stored }[]) => Promise<void>): Promise<string>
  offWork(name: string, options: { wait: boolean }): Promise<void>
}

interface PgBossModule {
  readonly PgBoss: new (options: { connectionString: string; max: number; useListenNotify: boolean }) => Boss
}

const DRAIN: WorkOptions = { batchSize: 1_000, localConcurrency: 4, burstWhenBatchFull: true, pollingIntervalSeconds: 0.5 }
const WAIT: WorkOptions = { batchSize: 100, localConcurrency: 1, burstWhenBatchFull: true, pollingIntervalSeconds: 0.5 }

async function open(connectionString: string): Promise<JobsSession> {
  const { PgBoss } = await load<PgBossModule>(PACKAGE)
  const boss = new PgBoss({ connectionString, max: 10, useListenNotify: true })
  let failure: unknown
  boss.on('error', (error) => {
    failure ??= error
  })
  await boss.start()
  await boss.createQueue(QUEUE, { notify: false })
  await boss.createQueue(NOTIFIED, { notify: true })
  let queue = QUEUE

  return {
    reset: async () => void (await boss.deleteAllJobs()),
    enqueue: (payload) => boss.send(queue, toStored(payload)),
    enqueueMany: (payloads) =>
      boss.insert(
        queue,
        payloads.map((payload) => ({ data: toStored(payload) })),
      ),
    async drain(count) {
      const { promise, resolve } = Promise.withResolvers<void>()
      let handled = 0
      await boss.work(QUEUE, DRAIN, async (jobs) => {
        handled += jobs.length
        if (handled === count) resolve()
      })
      await promise
      // Waits until the batches under way are completed.
      await boss.offWork(QUEUE, { wait: true })
      if (failure) throw failure
    },
    async work(onStart) {
      queue = NOTIFIED
      await boss.work(NOTIFIED, WAIT, async (jobs) => {
        for (const { data } of jobs) onStart(fromStored(data))
      })
      return {
        async [Symbol.asyncDispose]() {
          queue = QUEUE
          await boss.offWork(NOTIFIED, { wait: true })
        },
      }
    },
    [Symbol.asyncDispose]: () => boss.stop({ graceful: true, close: true }),
  }
}

export const pgBoss: Contender<JobsSession> = {
  name: 'pg-boss, tuned',
  version: () => versionOf(PACKAGE),
  settings:
    'a pool of 10; drained in batches of 1,000 by 4 workers, fetching again at once while batches are full; latencies with LISTEN/NOTIFY, batches of 100, 1 worker',
  open: ({ postgresUrl }) => open(postgresUrl),
}
