/** graphile-worker as it comes, and with the batching that its page on performance describes. */

import pg from 'pg'
import type { Contender, JobsSession } from '../contenders.ts'
import { fromStored, load, type Stored, toStored, versionOf } from './packages.ts'

const PACKAGE = 'graphile-worker'
const TASK = 'noop'

interface WorkerSettings {
  readonly concurrentJobs?: number
  readonly maxPoolSize?: number
  readonly localQueue?: { readonly size: number }
  readonly completeJobBatchDelay?: number
  readonly failJobBatchDelay?: number
}

interface Runner {
  stop(): Promise<void>
}

interface GraphileWorker {
  run(options: {
    preset: { worker: WorkerSettings & { connectionString: string; logger: unknown } }
    noHandleSignals: boolean
    parsedCronItems: readonly never[]
    taskList: Readonly<Record<string, (payload: Stored) => Promise<void>>>
  }): Promise<Runner>
  makeWorkerUtils(options: { preset: { worker: { connectionString: string; logger: unknown; maxPoolSize: number } } }): Promise<{
    migrate(): Promise<void>
    addJob(task: string, payload: Stored): Promise<unknown>
    addJobs(jobs: readonly { identifier: string; payload: Stored }[]): Promise<unknown>
    release(): Promise<void>
  }>
  readonly Logger: new (factory: () => () => void) => unknown
}

/** As many as the tuned worker has: 10, its default, enqueue a third less. */
const ENQUEUE_CONNECTIONS = 25

async function open(connectionString: string, settings: WorkerSettings): Promise<JobsSession> {
  const { makeWorkerUtils, run, Logger } = await load<GraphileWorker>(PACKAGE)
  // A line per job would be measured too.
  const logger = new Logger(() => () => {})
  const utils = await makeWorkerUtils({ preset: { worker: { connectionString, logger, maxPoolSize: ENQUEUE_CONNECTIONS } } })
  await utils.migrate()
  const client = new pg.Client({ connectionString })
  await client.connect()
  const start = (task: (payload: Stored) => void) =>
    run({
      preset: { worker: { ...settings, connectionString, logger } },
      noHandleSignals: true,
      parsedCronItems: [],
      taskList: { [TASK]: async (payload) => task(payload) },
    })

  return {
    reset: async () => void (await client.query('truncate graphile_worker._private_jobs')),
    enqueue: (payload) => utils.addJob(TASK, toStored(payload)),
    enqueueMany: (payloads) => utils.addJobs(payloads.map((payload) => ({ identifier: TASK, payload: toStored(payload) }))),
    async drain(count) {
      const { promise, resolve } = Promise.withResolvers<void>()
      let handled = 0
      const runner = await start(() => {
        if (++handled === count) resolve()
      })
      await promise
      // Its batch of completions goes out before this resolves.
      await runner.stop()
    },
    async work(onStart) {
      const runner = await start((payload) => onStart(fromStored(payload)))
      return { [Symbol.asyncDispose]: () => runner.stop() }
    },
    async [Symbol.asyncDispose]() {
      await utils.release()
      await client.end()
    },
  }
}

export const graphileWorkerDefault: Contender<JobsSession> = {
  name: 'graphile-worker, default',
  version: () => versionOf(PACKAGE),
  settings: 'the defaults, but for 10 jobs at once instead of 1',
  drains: 5_000,
  // It enqueues as the tuned one does, and 300,000 jobs would take it five minutes.
  leaveOut: ['enqueue', 'snapshot'],
  open: ({ postgresUrl }) => open(postgresUrl, { concurrentJobs: 10, maxPoolSize: 12 }),
}

/** The configuration that its page on performance was measured with. */
const TUNED = {
  concurrentJobs: 24,
  maxPoolSize: 25,
  localQueue: { size: 500 },
  completeJobBatchDelay: 0,
  failJobBatchDelay: 0,
}

export const graphileWorkerTuned: Contender<JobsSession> = {
  name: 'graphile-worker, tuned',
  version: () => versionOf(PACKAGE),
  settings:
    'the configuration of its page on performance: 24 jobs at once, a pool of 25, localQueue of 500, completions and failures batched with a delay of 0',
  open: ({ postgresUrl }) => open(postgresUrl, TUNED),
}

export const graphileWorkerFarAhead: Contender<JobsSession> = {
  name: 'graphile-worker, far ahead',
  version: () => versionOf(PACKAGE),
  settings: 'tuned, but with a localQueue of 5,000: the fastest found for jobs that do nothing; a process holds as many locked',
  // It enqueues as the other does, and with few jobs waiting it differs in nothing.
  leaveOut: ['enqueue', 'latency'],
  open: ({ postgresUrl }) => open(postgresUrl, { ...TUNED, localQueue: { size: 5_000 } }),
}
