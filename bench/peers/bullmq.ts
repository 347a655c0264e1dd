/** BullMQ on PostgreSQL and on Redis: the same calls, another backend. */

import pg from 'pg'
import type { Contender, JobsSession, Servers } from '../contenders.ts'
import { fromStored, load, type Stored, toStored, versionOf } from './packages.ts'

const PACKAGE = 'bullmq'

interface Closable {
  on(event: string, listener: (...args: never[]) => void): unknown
  waitUntilReady(): Promise<unknown>
  close(): Promise<void>
}

interface Queue extends Closable {
  add(name: string, data: Stored): Promise<unknown>
  addBulk(jobs: readonly { name: string; data: Stored }[]): Promise<unknown>
}

interface QueueOptions {
  readonly connection: unknown
  readonly defaultJobOptions?: { removeOnComplete: boolean; removeOnFail: boolean }
}

interface WorkerOptions {
  readonly connection: unknown
  readonly concurrency: number
}

interface BullMq {
  readonly Queue: new (name: string, options: QueueOptions, backend?: unknown) => Queue
  readonly Worker: new (
    name: string,
    handler: (job: { data: Stored }) => Promise<void>,
    options: WorkerOptions,
    backend?: unknown,
  ) => Closable
  readonly createPostgresBackend: unknown
  runMigrations(client: pg.Client): Promise<unknown>
}

interface Redis {
  flushall(): Promise<unknown>
  quit(): Promise<unknown>
}

interface IoRedis {
  readonly Redis: new (url: string, options: { maxRetriesPerRequest: null }) => Redis
}

/** What the two backends do not share. */
interface Backend {
  readonly forQueue: unknown
  readonly forWorker: unknown
  readonly factory?: unknown
  readonly concurrency: number
  close(): Promise<unknown>
}

async function open({ Queue, Worker }: BullMq, backend: Backend): Promise<JobsSession> {
  let resets = 0
  let queue = await openQueue()

  async function openQueue(): Promise<Queue> {
    const defaultJobOptions = { removeOnComplete: true, removeOnFail: true }
    const opened = new Queue(`bench-${resets}`, { connection: backend.forQueue, defaultJobOptions }, backend.factory)
    opened.on('error', () => {})
    await opened.waitUntilReady()
    return opened
  }

  async function openWorker(handler: (job: { data: Stored }) => Promise<void>): Promise<Closable> {
    const options = { connection: backend.forWorker, concurrency: backend.concurrency }
    const worker = new Worker(`bench-${resets}`, handler, options, backend.factory)
    worker.on('error', () => {})
    await worker.waitUntilReady()
    return worker
  }

  return {
    // A queue of its own each time: emptying one goes by a few hundred jobs a call.
    async reset() {
      await queue.close()
      resets++
      queue = await openQueue()
    },
    enqueue: (payload) => queue.add('noop', toStored(payload)),
    enqueueMany: (payloads) => queue.addBulk(payloads.map((payload) => ({ name: 'noop', data: toStored(payload) }))),
    async drain(count) {
      const { promise, resolve } = Promise.withResolvers<void>()
      let completed = 0
      const worker = await openWorker(async () => {})
      // Told once the server has stored the end of the job.
      worker.on('completed', () => {
        if (++completed === count) resolve()
      })
      await promise
      await worker.close()
    },
    async work(onStart) {
      const worker = await openWorker(async ({ data }) => onStart(fromStored(data)))
      return { [Symbol.asyncDispose]: () => worker.close() }
    },
    async [Symbol.asyncDispose]() {
      await queue.close()
      await backend.close()
    },
  }
}

const ON_POSTGRES = { concurrency: 8, connections: 10, enqueueConnections: 32 }
const ON_REDIS = { concurrency: 100 }

export const bullMqOnPostgres: Contender<JobsSession> = {
  name: 'BullMQ on Postgres',
  version: () => versionOf(PACKAGE),
  settings: `concurrency ${ON_POSTGRES.concurrency}, a pool of ${ON_POSTGRES.connections} for the worker and of ${ON_POSTGRES.enqueueConnections} for the queue, finished jobs removed`,
  drains: 3_000,
  // 300,000 jobs would take it five minutes.
  leaveOut: ['snapshot'],
  async open({ postgresUrl: connectionString }) {
    const bullMq = await load<BullMq>(PACKAGE)
    const client = new pg.Client({ connectionString })
    await client.connect()
    await bullMq.runMigrations(client)
    await client.end()
    return open(bullMq, {
      forQueue: { connectionString, max: ON_POSTGRES.enqueueConnections },
      forWorker: { connectionString, max: ON_POSTGRES.connections },
      factory: bullMq.createPostgresBackend,
      concurrency: ON_POSTGRES.concurrency,
      close: async () => {},
    })
  },
}

export const bullMqOnRedis: Contender<JobsSession> = {
  name: 'BullMQ on Redis',
  version: () => versionOf(PACKAGE),
  settings: `concurrency ${ON_REDIS.concurrency}, finished jobs removed`,
  server: 'redis',
  drains: 30_000,
  // It is about dead rows in PostgreSQL.
  leaveOut: ['snapshot'],
  async open({ redisUrl }: Servers) {
    if (redisUrl === undefined) throw new Error('there is no Redis')
    const [bullMq, { Redis }] = await Promise.all([load<BullMq>(PACKAGE), load<IoRedis>('ioredis')])
    const connection = new Redis(redisUrl, { maxRetriesPerRequest: null })
    await connection.flushall()
    return open(bullMq, {
      forQueue: connection,
      forWorker: connection,
      concurrency: ON_REDIS.concurrency,
      close: () => connection.quit(),
    })
  },
}
