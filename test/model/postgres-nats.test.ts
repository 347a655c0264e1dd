/**
 * The same random traces on Postgres and on NATS, side by side, are seen to do the same, but for what terms.ts says.
 *
 *   KLIEO_TEST_SEED=7 npx vitest run test/model/postgres-nats.test.ts     other traces
 *   KLIEO_MODEL_RUNS=500 …                                                more of them, of each area
 */

import fc from 'fast-check'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { natsServer, whyNoNats } from '../support/nats-server.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { NatsStage } from './nats-world.ts'
import { run } from './run.ts'
import { type Area, type Step, traces } from './steps.ts'
import { WITH_NATS } from './terms.ts'
import { GRAIN_MS, PostgresStage } from './worlds.ts'

const missing = whyNoNats()
const SEED = Number(process.env.KLIEO_TEST_SEED ?? 20_261)
const RUNS = process.env.KLIEO_MODEL_RUNS === undefined ? undefined : Number(process.env.KLIEO_MODEL_RUNS)
/** A trace takes two seconds or so. */
const NORMAL_RUNS: Readonly<Record<Area, number>> = { pubsub: 4, jobs: 4, kv: 4, requests: 2, admin: 8, everything: 8 }
const STEPS = 40
const TRIES = 5

describe.skipIf(missing !== undefined)(`the same traces on Postgres and on NATS${missing === undefined ? '' : ` (${missing})`}`, () => {
  let server: Awaited<ReturnType<typeof natsServer>>
  let stages: [PostgresStage, NatsStage]

  beforeAll(async () => {
    server = await natsServer()
    stages = [await PostgresStage.open(databaseUrl(), freshSchema()), await NatsStage.open(server.url)]
  })

  afterAll(async () => {
    for (const stage of stages ?? []) await stage.close()
    await server?.remove()
  })

  for (const [area, runs] of Object.entries(NORMAL_RUNS) as [Area, number][]) {
    test(`P1 to A6: ${area}, seed ${SEED}`, { timeout: (RUNS ?? runs) * 20_000 + 60_000 }, async () => {
      let slow = 0
      const property = fc.asyncProperty(traces(area, STEPS), async (trace) => {
        if ((await run(stages, trace, { terms: WITH_NATS })) === 'too slow') slow++
      })
      await fc.assert(property, {
        seed: SEED,
        numRuns: RUNS ?? runs,
        verbose: 0,
        interruptAfterTimeLimit: (RUNS ?? runs) * 15_000,
        markInterruptAsFailure: true,
      })
      if (slow > (RUNS ?? runs) / 2) throw new Error(`the machine was too slow for ${slow} of ${RUNS ?? runs} traces`)
    })
  }

  /** A trace in which they were once seen to differ. */
  function same(name: string, trace: readonly Step[]): void {
    test(name, { timeout: 120_000 }, async () => {
      let outcome = await run(stages, trace, { terms: WITH_NATS })
      for (let tries = 1; outcome === 'too slow' && tries < TRIES; tries++) outcome = await run(stages, trace, { terms: WITH_NATS })
      expect(outcome).toBe('done')
    })
  }

  same('A1 a job whose lease is over shows when that ended', [
    { do: 'enqueue', bus: 0, queue: 0, job: { headers: 0 } },
    { do: 'claim', bus: 0, queue: 0, ttlMs: 0, limit: 0, waitMs: 0 },
    { do: 'jobAdmin', bus: 0, job: 0, how: 'look' },
  ])

  same('J4 a job that died of its last lease says so', [
    { do: 'enqueue', bus: 0, queue: 0, job: { headers: 0, maxAttempts: 1 } },
    { do: 'claim', bus: 0, queue: 0, ttlMs: 0, limit: 0, waitMs: 0 },
    { do: 'claim', bus: 0, queue: 0, ttlMs: 0, limit: 0, waitMs: 0 },
    { do: 'letters', bus: 0 },
    { do: 'jobAdmin', bus: 0, job: 0, how: 'look' },
  ])

  same('P12 a header with the name of one of the server’s hides no msgId', [
    { do: 'publish', bus: 0, subject: 0, headers: 0, msgId: 0 },
    { do: 'publish', bus: 0, subject: 0, headers: 2, msgId: 0 },
    { do: 'consume', bus: 0, durable: 0, filter: 0 },
  ])

  same('J8 a job with a dedup key that a batch has twice does not go before what stands before it', [
    { do: 'enqueueMany', bus: 0, queue: 0, jobs: [{ headers: 0 }, { headers: 0, dedupKey: 0 }, { headers: 0, dedupKey: 0 }] },
    { do: 'claim', bus: 0, queue: 0, ttlMs: 2 * GRAIN_MS, limit: 0, waitMs: 0 },
  ])

  same('J2 a claim of several jobs gives each of them once, also one whose lease is over at once', [
    { do: 'enqueue', bus: 0, queue: 0, job: { headers: 0, inMs: 2 * GRAIN_MS } },
    { do: 'jobAdmin', bus: 0, job: 0, how: 'retry' },
    { do: 'claim', bus: 0, queue: 0, ttlMs: 0, limit: 5, waitMs: 0 },
  ])
})
