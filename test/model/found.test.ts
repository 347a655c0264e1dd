/** Traces in which memory and Postgres were once seen to differ. */

import { afterAll, beforeAll, expect, test } from 'vitest'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { run } from './run.ts'
import type { Step } from './steps.ts'
import { GRAIN_MS, PostgresStage } from './worlds.ts'

const DAY_AND_HOUR_MS = 25 * 60 * 60 * 1_000
const TRIES = 5

let stage: PostgresStage

beforeAll(async () => {
  stage = await PostgresStage.open(databaseUrl(), freshSchema())
})

afterAll(() => stage.close())

function same(name: string, trace: readonly Step[]): void {
  test(name, { timeout: 120_000 }, async () => {
    let outcome = await run(stage, trace)
    for (let tries = 1; outcome === 'too slow' && tries < TRIES; tries++) outcome = await run(stage, trace)
    expect(outcome).toBe('done')
  })
}

const subscribe: Step = { do: 'subscribe', bus: 0, durable: 0, filter: 0, start: 'all', ackWaitMs: 4 * GRAIN_MS }
const claim: Step = { do: 'claim', bus: 0, queue: 0, ttlMs: 2 * GRAIN_MS, limit: 0, waitMs: 0 }
const advance: Step = { do: 'advance', ms: GRAIN_MS }

same('P5 messages that are given back in one moment come back in the order in which they were', [
  subscribe,
  subscribe,
  {
    do: 'publishMany',
    bus: 0,
    messages: [
      { subject: 0, headers: 0 },
      { subject: 0, headers: 0 },
    ],
  },
  { do: 'read', stream: 0 },
  { do: 'read', stream: 1 },
  // The latest that is held, twice: the second message, and then the first.
  { do: 'settle', delivery: 0, how: 'nak', delayMs: 0 },
  { do: 'settle', delivery: 0, how: 'nak', delayMs: 0 },
  { do: 'read', stream: 0 },
  { do: 'read', stream: 1 },
])

same('J8 of jobs whose leases end in one moment the one that was claimed first has waited longest', [
  { do: 'enqueue', bus: 0, queue: 0, job: { headers: 0, delayMs: GRAIN_MS } },
  { do: 'enqueue', bus: 0, queue: 0, job: { headers: 0 } },
  claim,
  advance,
  { ...claim, ttlMs: GRAIN_MS },
  advance,
  claim,
  claim,
])

same('J8 a job that is claimed with others of its priority keeps no lead over the older ones', [
  { do: 'enqueue', bus: 0, queue: 0, job: { headers: 0, delayMs: GRAIN_MS } },
  { do: 'enqueue', bus: 0, queue: 0, job: { headers: 0 } },
  advance,
  { ...claim, limit: 2 },
  advance,
  advance,
  claim,
  claim,
])

same('J5 a record that its job has kept outlives it by what is left of the hour', [
  { do: 'enqueue', bus: 0, queue: 0, job: { headers: 0, dedupKey: 0 } },
  { do: 'advance', ms: DAY_AND_HOUR_MS },
  claim,
  { do: 'settleJob', claim: 0, how: 'ack', delayMs: 0 },
  { do: 'enqueue', bus: 0, queue: 0, job: { headers: 0, dedupKey: 0 } },
  { do: 'record', bus: 0, queue: 0, key: 0, how: 'get' },
  { do: 'advance', ms: DAY_AND_HOUR_MS },
  { do: 'enqueue', bus: 0, queue: 0, job: { headers: 0, dedupKey: 0 } },
])

same('J4 a job whose last lease is released is dead at once', [
  { do: 'enqueue', bus: 0, queue: 0, job: { headers: 0, maxAttempts: 1 } },
  claim,
  { do: 'settleJob', claim: 0, how: 'release', delayMs: 0 },
  { do: 'letters', bus: 0 },
])

same('J4 a job whose last lease has run out when it is released died of that', [
  { do: 'enqueue', bus: 0, queue: 0, job: { headers: 0, maxAttempts: 1 } },
  { ...claim, ttlMs: 0 },
  { do: 'settleJob', claim: 0, how: 'release', delayMs: 0 },
  { do: 'letters', bus: 0 },
])
