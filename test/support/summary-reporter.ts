import type { Reporter, TestModule, TestRunEndReason } from 'vitest/node'

/**
 * One line at the end that a script can read: `N passed, N failed`, and `, N skipped` when there are any.
 *
 * A file that could not be loaded, a hook or the setup that failed and an error outside of any test count as one failure each:
 * none of them is a failed test, and without them a broken run would read "0 failed".
 */
export class SummaryReporter implements Reporter {
  onTestRunEnd(modules: readonly TestModule[], unhandledErrors: readonly unknown[], reason: TestRunEndReason): void {
    let passed = 0
    let failed = unhandledErrors.length
    let skipped = 0
    for (const module of modules) {
      let failedHere = 0
      for (const test of module.children.allTests()) {
        const { state } = test.result()
        if (state === 'passed') passed++
        else if (state === 'failed') failedHere++
        else if (state === 'skipped') skipped++
      }
      if (!module.ok() && failedHere === 0) failedHere = 1
      failed += failedHere
    }
    if (reason === 'failed' && failed === 0) failed = 1
    process.stdout.write(`${passed} passed, ${failed} failed${skipped > 0 ? `, ${skipped} skipped` : ''}\n`)
  }
}
