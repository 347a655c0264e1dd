/** The comparison can fail: a memory bus that breaks one rule is told from Postgres within the normal number of traces. */

import assert from 'node:assert/strict'
import fc from 'fast-check'
import { afterAll, beforeAll, describe, test } from 'vitest'
import type { ClaimedJob, Lease, Msg, MsgStream } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { Difference, run } from './run.ts'
import { type Area, traces } from './steps.ts'
import { type AnyBus, PostgresStage } from './worlds.ts'

/** As many as equivalence.test.ts plays of an area, at the least. */
const RUNS = 25
const STEPS = 40
const SEED = 7
/** What a broken rule keeps back never comes: no second chance, and less of a wait than between two that are right. */
const PATIENCE_MS = 4_000

let stage: PostgresStage

beforeAll(async () => {
  stage = await PostgresStage.open(databaseUrl(), freshSchema())
})

afterAll(() => stage.close())

/** The same but for what is given; whatever else is called is called on the original. */
function but<T extends object>(original: T, changed: Partial<T>): T {
  return new Proxy(original, {
    get(target, name) {
      if (name in changed) return changed[name as keyof T]
      const value: unknown = Reflect.get(target, name, target)
      return typeof value === 'function' ? value.bind(target) : value
    },
  })
}

function withMessages(change: (msg: Msg) => Msg): (bus: AnyBus) => AnyBus {
  const stream = (original: MsgStream): MsgStream =>
    but(original, {
      [Symbol.asyncIterator]() {
        const iterator = original[Symbol.asyncIterator]()
        return {
          next: async () => {
            const result = await iterator.next()
            return result.done ? result : { done: false, value: change(result.value) }
          },
        }
      },
    })
  return (bus) =>
    but(bus, {
      pubsub: but(bus.pubsub, { subscribe: async (...given) => stream(await bus.pubsub.subscribe(...given)) }),
    })
}

function withJobs(change: (job: ClaimedJob) => ClaimedJob): (bus: AnyBus) => AnyBus {
  return (bus) =>
    but(bus, {
      jobs: but(bus.jobs, {
        claim: async (...given) => {
          const job = await bus.jobs.claim(...given)
          return job && change(job)
        },
        claimMany: async (...given) => (await bus.jobs.claimMany(...given)).map(change),
      }),
    })
}

function withLeases(change: (lease: Lease) => Lease): (bus: AnyBus) => AnyBus {
  return (bus) => but(bus, { kv: but(bus.kv, { lease: async (...given) => change(await bus.kv.lease(...given)) }) })
}

const FAULTS: readonly { readonly what: string; readonly area: Area; readonly wrap: (bus: AnyBus) => AnyBus }[] = [
  { what: 'P5 an ack that does nothing', area: 'pubsub', wrap: withMessages((msg) => but(msg, { ack: async () => {} })) },
  { what: 'P5 an attempt that is not counted', area: 'pubsub', wrap: withMessages((msg) => but(msg, { attempt: 1 })) },
  { what: 'P5 a nak that forgets its delay', area: 'pubsub', wrap: withMessages((msg) => but(msg, { nak: () => msg.nak() })) },
  { what: 'P6 a term that only gives the message back', area: 'pubsub', wrap: withMessages((msg) => but(msg, { term: () => msg.nak() })) },
  {
    what: 'P7 a second settlement that is let pass',
    area: 'pubsub',
    wrap: withMessages((msg) => but(msg, { ack: () => msg.ack().catch(() => {}) })),
  },
  {
    what: 'P11 a durable whose filter is changed',
    area: 'pubsub',
    wrap: (bus) => but(bus, { pubsub: but(bus.pubsub, { subscribe: (_filter, ...rest) => bus.pubsub.subscribe('s.>', ...rest) }) }),
  },
  {
    what: 'P12 a message id that is ignored',
    area: 'pubsub',
    wrap: (bus) =>
      but(bus, {
        pubsub: but(bus.pubsub, {
          publish: (subject, payload, { headers } = {}) => bus.pubsub.publish(subject, payload, headers === undefined ? {} : { headers }),
        }),
      }),
  },
  { what: 'J3 a lease that a heartbeat does not extend', area: 'jobs', wrap: withJobs((job) => but(job, { heartbeat: async () => {} })) },
  { what: 'J4 a dead letter that is lost', area: 'jobs', wrap: withJobs((job) => but(job, { deadLetter: () => job.ack() })) },
  {
    what: 'J5 a dedup key that is ignored',
    area: 'jobs',
    wrap: (bus) => but(bus, { jobs: but(bus.jobs, { enqueue: (queue, { dedupKey: _, ...job }) => bus.jobs.enqueue(queue, job) }) }),
  },
  {
    what: 'J8 a priority that is ignored',
    area: 'jobs',
    wrap: (bus) =>
      but(bus, {
        jobs: but(bus.jobs, {
          enqueueMany: (queue, jobs) =>
            bus.jobs.enqueueMany(
              queue,
              Array.isArray(jobs) ? jobs.map((job) => (job?.priority === undefined ? job : { ...job, priority: 0 })) : jobs,
            ),
        }),
      }),
  },
  {
    what: 'K2 a cas that does not look at the revision',
    area: 'kv',
    wrap: (bus) => but(bus, { kv: but(bus.kv, { cas: (bucket, key, value, _, options) => bus.kv.put(bucket, key, value, options) }) }),
  },
  {
    what: 'section 5: a ttl that is ignored',
    area: 'kv',
    wrap: (bus) => but(bus, { kv: but(bus.kv, { put: (bucket, key, value) => bus.kv.put(bucket, key, value) }) }),
  },
  { what: 'K5 a release that does nothing', area: 'kv', wrap: withLeases((lease) => but(lease, { release: async () => {} })) },
  {
    what: 'K6 a watch that begins with what comes',
    area: 'kv',
    wrap: (bus) =>
      but(bus, {
        kv: but(bus.kv, { watch: (bucket, filter, options) => bus.kv.watch(bucket, filter, { ...options, updatesOnly: true }) }),
      }),
  },
  {
    what: 'R3 a failed handler that looks like a timeout',
    area: 'requests',
    wrap: (bus) =>
      but(bus, {
        requestReply: but(bus.requestReply, {
          request: (...given) =>
            bus.requestReply.request(...given).catch((error) => {
              throw Object.assign(error, error.code === 'handler_failed' ? { code: 'timeout' } : {})
            }),
        }),
      }),
  },
]

describe('a rule that is broken is found', () => {
  for (const { what, area, wrap } of FAULTS) {
    test(what, { timeout: 120_000 }, async () => {
      const property = fc.asyncProperty(traces(area, STEPS), async (trace) => {
        await run(stage, trace, { wrap, patienceMs: PATIENCE_MS })
      })
      // The first trace that differs will do: no shrinking.
      const { failed, errorInstance } = await fc.check(property, { seed: SEED, numRuns: RUNS, endOnFailure: true })
      assert.ok(failed, `none of ${RUNS} traces was seen to differ`)
      assert.ok(errorInstance instanceof Difference, String(errorInstance))
    })
  }
})
