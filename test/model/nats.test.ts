/**
 * The same random traces in memory and on NATS are seen to do the same, but for what docs/backends.md says.
 *
 *   KLIEO_TEST_SEED=7 npx vitest run test/model/nats.test.ts     other traces
 *   KLIEO_MODEL_RUNS=500 …                                       more of them, of each area
 */

import fc from 'fast-check'
import { afterAll, beforeAll, describe, test } from 'vitest'
import { natsServer, whyNoNats } from '../support/nats-server.ts'
import { NatsStage } from './nats-world.ts'
import { run } from './run.ts'
import { type Area, traces } from './steps.ts'
import { WITH_NATS } from './terms.ts'

const missing = whyNoNats()
const SEED = Number(process.env.KLIEO_TEST_SEED ?? 20_261)
const RUNS = process.env.KLIEO_MODEL_RUNS === undefined ? undefined : Number(process.env.KLIEO_MODEL_RUNS)
/** A trace takes two seconds or so. */
const NORMAL_RUNS: Readonly<Record<Area, number>> = { pubsub: 8, jobs: 8, kv: 8, requests: 4, admin: 8, everything: 8 }
const STEPS = 40

describe.skipIf(missing !== undefined)(`the same traces in memory and on NATS${missing === undefined ? '' : ` (${missing})`}`, () => {
  let server: Awaited<ReturnType<typeof natsServer>>
  let stage: NatsStage

  beforeAll(async () => {
    server = await natsServer()
    stage = await NatsStage.open(server.url)
  })

  afterAll(async () => {
    await stage?.close()
    await server?.remove()
  })

  for (const [area, runs] of Object.entries(NORMAL_RUNS) as [Area, number][]) {
    test(`P1 to J8: ${area}, seed ${SEED}`, { timeout: (RUNS ?? runs) * 20_000 + 60_000 }, async () => {
      let slow = 0
      const property = fc.asyncProperty(traces(area, STEPS), async (trace) => {
        if ((await run(stage, trace, { terms: WITH_NATS })) === 'too slow') slow++
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
})
