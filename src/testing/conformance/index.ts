/**
 * The conformance suite: every rule of the contract as a test, against the public interfaces alone, so that a backend of
 * anybody's can be held to it.
 *
 * ```ts
 * import { describe, test } from 'vitest' // or 'node:test'
 * import { conformance } from 'klieo-bus/testing'
 *
 * conformance({ describe, test }, { name: 'mine', supports, connect: () => MyBus.connect(url) })
 * ```
 *
 * Each test takes names of its own, so the store may be shared and need not be empty. What the backend's
 * {@link Capabilities} lack is skipped visibly; where the contract says what it answers instead, that is tested. A test
 * needs up to 20 seconds on a busy machine: raise the limit of a runner that allows less.
 */

import { adminTests } from './admin.ts'
import { argumentTests } from './arguments.ts'
import { dedupTests } from './dedup.ts'
import { deliveryTests } from './delivery.ts'
import { durableTests } from './durables.ts'
import { jobEndingTests } from './job-endings.ts'
import { jobTests } from './jobs.ts'
import { type ConformanceHarness, type ConformanceRunner, Suite } from './kit.ts'
import { kvTests } from './kv.ts'
import { leaseTests } from './leases.ts'
import { lifecycleTests } from './lifecycle.ts'
import { nameTests } from './names.ts'
import { pubsubTests } from './pubsub.ts'
import { requestReplyTests } from './request-reply.ts'
import { transactionalSettlementTests } from './settlement-in-transactions.ts'
import { streamTests } from './streams.ts'
import { transactionTests } from './transactions.ts'
import { watchTests } from './watch.ts'
import { workerTests } from './worker.ts'

export type { CallersTransaction, ConformanceHarness, ConformanceRunner } from './kit.ts'

/** Registers the tests with the runner. */
export function conformance<Tx = never>(runner: ConformanceRunner, harness: ConformanceHarness<Tx>): void {
  const suite = new Suite(runner, harness)
  runner.describe(`conformance of ${harness.name}`, () => {
    pubsubTests(suite)
    durableTests(suite)
    deliveryTests(suite)
    streamTests(suite)
    requestReplyTests(suite)
    kvTests(suite)
    watchTests(suite)
    leaseTests(suite)
    jobTests(suite)
    dedupTests(suite)
    jobEndingTests(suite)
    workerTests(suite)
    transactionTests(suite)
    transactionalSettlementTests(suite)
    adminTests(suite)
    nameTests(suite)
    argumentTests(suite)
    lifecycleTests(suite)
  })
}
