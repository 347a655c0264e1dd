/** klieo-bus itself, by its public interface and with nothing that a user could not set. */

import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { type Msg, PostgresBus, Worker } from '../../dist/index.js'
import type { Contender, JobsSession, KvSession, LogSession, RequestSession } from '../contenders.ts'

const QUEUE = 'bench'
const SUBJECT = 'bench.log'
const BUCKET = 'bench'
/** Handlers at once in a drain: enough that claims and acks go in batches of hundreds. */
export const DRAIN_CONCURRENCY = 1_000

async function version(): Promise<string> {
  const { version } = JSON.parse(await readFile(join(import.meta.dirname, '..', '..', 'package.json'), 'utf8')) as { version: string }
  return version
}

export const klieoJobs: Contender<JobsSession> = {
  name: 'klieo-bus',
  version,
  settings: `jobs: the defaults (a pool of 10), drained by one Worker with concurrency ${DRAIN_CONCURRENCY}; latencies with concurrency 10`,
  async open({ postgresUrl }) {
    const bus = await PostgresBus.connect({ connectionString: postgresUrl })
    let queue = QUEUE
    let queues = 0
    return {
      // A queue of its own: what was left in the one before is no longer looked at.
      async reset() {
        queue = `${QUEUE}-${++queues}`
      },
      enqueue: (payload) => bus.jobs.enqueue(queue, { payload }),
      enqueueMany: (payloads) =>
        bus.jobs.enqueueMany(
          queue,
          payloads.map((payload) => ({ payload })),
        ),
      async drain(count) {
        let started = 0
        const { promise, resolve, reject } = Promise.withResolvers<void>()
        const worker = new Worker(
          bus.jobs,
          queue,
          async () => {
            if (++started === count) resolve()
          },
          { concurrency: DRAIN_CONCURRENCY, onError: reject },
        )
        await promise
        // Resolves when the acks of all that ran are durable.
        await worker.stop()
      },
      async work(onStart) {
        return new Worker(bus.jobs, queue, async ({ payload }) => onStart(Buffer.from(payload)), { concurrency: 10 })
      },
      [Symbol.asyncDispose]: () => bus.close(),
    }
  },
}

export const klieoLog: Contender<LogSession> = {
  name: 'klieo-bus',
  version,
  settings: 'publish/subscribe: the defaults, a stream with maxInFlight 256, maxAckPending 1,000, every ack awaited, many at once',
  async open({ postgresUrl }) {
    const bus = await PostgresBus.connect({ connectionString: postgresUrl })
    let durables: string[] = []
    let made = 0
    return {
      async reset() {
        await Promise.all(durables.map((durable) => bus.pubsub.deleteDurable(durable)))
        durables = []
      },
      publish: (payload) => bus.pubsub.publish(SUBJECT, payload),
      publishMany: (payloads) => bus.pubsub.publishMany(payloads.map((payload) => ({ subject: SUBJECT, payload }))),
      async addDurables(count) {
        for (let n = 0; n < count; n++) {
          const durable = `bench-${++made}`
          // What was published for the one before is not for this one.
          await (await bus.pubsub.subscribe(SUBJECT, durable, { start: 'new' })).close()
          durables.push(durable)
        }
      },
      async consume(count) {
        await Promise.all(durables.map((durable) => consumeOne(bus, durable, count)))
      },
      [Symbol.asyncDispose]: () => bus.close(),
    }
  },
}

async function consumeOne(bus: PostgresBus, durable: string, count: number): Promise<void> {
  const stream = await bus.pubsub.subscribe(SUBJECT, durable)
  const acks = new Set<Promise<void>>()
  let failure: unknown
  let taken = 0
  for await (const msg of stream) {
    const ack: Promise<void> = settle(msg).finally(() => acks.delete(ack))
    acks.add(ack)
    if (failure !== undefined) break
    if (++taken === count) break
  }
  await Promise.all(acks)
  await stream.close()
  if (failure !== undefined) throw failure

  async function settle(msg: Msg): Promise<void> {
    try {
      await msg.ack()
    } catch (error) {
      failure ??= error
    }
  }
}

export const klieoKv: Contender<KvSession> = {
  name: 'klieo-bus',
  version,
  settings: 'key-value: the defaults',
  async open({ postgresUrl }) {
    const bus = await PostgresBus.connect({ connectionString: postgresUrl })
    return {
      async reset() {},
      put: (key, value) => bus.kv.put(BUCKET, key, value),
      get: (key) => bus.kv.get(BUCKET, key),
      cas: (key, value, revision) => bus.kv.cas(BUCKET, key, value, revision),
      [Symbol.asyncDispose]: () => bus.close(),
    }
  },
}

export const klieoRequests: Contender<RequestSession> = {
  name: 'klieo-bus',
  version,
  settings: 'requests: the defaults, requester and responder are two buses in one process',
  async open({ postgresUrl }) {
    const requester = await PostgresBus.connect({ connectionString: postgresUrl })
    const responder = await PostgresBus.connect({ connectionString: postgresUrl })
    await responder.requestReply.respond('bench.echo', ({ payload }) => payload)
    return {
      request: (payload) => requester.requestReply.request('bench.echo', payload, { timeoutMs: 5_000 }),
      async [Symbol.asyncDispose]() {
        await requester.close()
        await responder.close()
      },
    }
  },
}
