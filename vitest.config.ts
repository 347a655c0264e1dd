import { defineConfig } from 'vitest/config'
import { SummaryReporter } from './test/support/summary-reporter.ts'

/** `npm run cluster`: three servers of NATS under load want a machine for themselves. */
const cluster = process.env.KLIEO_TESTS === 'cluster'

export default defineConfig({
  test: {
    include: [cluster ? 'test/cluster/**/*.test.ts' : 'test/**/*.test.ts'],
    exclude: ['**/node_modules/**', ...(cluster ? [] : ['test/cluster/**'])],
    globalSetup: ['test/support/global-setup.ts'],
    reporters: ['default', new SummaryReporter()],
    // Tests start processes, kill servers and read the clock: each file has a process of its own.
    pool: 'forks',
    // All files share one server; more workers only make each other late.
    maxWorkers: cluster ? 1 : 2,
    // A test that passes at the second try is a test that failed.
    retry: 0,
    // Only a failure uses it up: a test may start a dozen processes on a machine that has much else to do.
    testTimeout: 60_000,
    // Some files start a server of their own.
    hookTimeout: 90_000,
    teardownTimeout: 30_000,
  },
})
