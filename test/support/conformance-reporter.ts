import type { TestCase, TestModule, TestRunEndReason } from 'vitest/node'
import { type ConformanceTest, conformanceReport } from './conformance-report.ts'
import { SummaryReporter } from './summary-reporter.ts'

const SUITE = /^conformance of (.+)$/
/** A backend that cannot be run has one test, which says why. */
const NOT_RUN = /^conformance of (.+?) \((.+)\)$/

/** Of `npm run conformance`. A test that is skipped by anything else than `supports` fails the run. */
export default class ConformanceReporter extends SummaryReporter {
  override onTestRunEnd(modules: readonly TestModule[], unhandledErrors: readonly unknown[], reason: TestRunEndReason): void {
    const tests: ConformanceTest[] = []
    const notRun = new Map<string, string>()
    for (const module of modules) {
      for (const test of module.children.allTests()) {
        const [, missing, why] = (test.parent.type === 'module' && NOT_RUN.exec(test.name)) || []
        const { state } = test.result()
        const backend = SUITE.exec(topOf(test))?.[1]
        if (missing !== undefined && why !== undefined) notRun.set(missing, why)
        else if (backend !== undefined && state !== 'pending') tests.push({ backend, name: test.name, state })
      }
    }
    const { lines, unexplained } = conformanceReport(tests, notRun)
    process.stdout.write(`\n${lines.join('\n')}\n\n`)
    if (unexplained.length > 0) process.exitCode = 1
    super.onTestRunEnd(modules, unhandledErrors, reason)
  }
}

/** The name of the outermost group. */
function topOf(test: TestCase): string {
  let { parent } = test
  while (parent.type === 'suite' && parent.parent.type === 'suite') parent = parent.parent
  return parent.type === 'suite' ? parent.name : test.name
}
