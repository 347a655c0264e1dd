/**
 * The same random traces in memory and on Postgres are seen to do the same (the rules P1 to J8, as far as one observer sees them).
 *
 *   KLIEO_TEST_SEED=7 npx vitest run test/model/equivalence.test.ts     other traces
 *   KLIEO_MODEL_RUNS=5000 …                                             more of them, of each area
 */

import fc from 'fast-check'
import { afterAll, beforeAll, describe, test } from 'vitest'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { run } from './run.ts'
import { type Area, traces } from './steps.ts'
import { PostgresStage } from './worlds.ts'

const SEED = Number(process.env.KLIEO_TEST_SEED ?? 20_261)
const RUNS = process.env.KLIEO_MODEL_RUNS === undefined ? undefined : Number(process.env.KLIEO_MODEL_RUNS)
/** A trace takes a fifth of a second or so. */
const NORMAL_RUNS: Readonly<Record<Area, number>> = { pubsub: 30, jobs: 30, kv: 30, requests: 12, admin: 30, everything: 25 }
const STEPS = 40

let stage: PostgresStage

beforeAll(async () => {
  stage = await PostgresStage.open(databaseUrl(), freshSchema())
})

afterAll(() => stage.close())

describe('P1 to J8: the same traces are seen to do the same in memory and on Postgres', () => {
  for (const [area, runs] of Object.entries(NORMAL_RUNS) as [Area, number][]) {
    test(`${area}, seed ${SEED}`, { timeout: (RUNS ?? runs) * 3_000 + 60_000 }, async () => {
      let slow = 0
      const property = fc.asyncProperty(traces(area, STEPS), async (trace) => {
        if ((await run(stage, trace)) === 'too slow') slow++
      })
      await fc.assert(property, { seed: SEED, numRuns: RUNS ?? runs, verbose: 0 })
      if (slow > (RUNS ?? runs) / 2) throw new Error(`the machine was too slow for ${slow} of ${RUNS ?? runs} traces`)
    })
  }
})
