/** `node test/chaos/checker/main.ts <directory>`: checks a record again. Ends with 1 if a rule was broken. */

import { check, describe } from './index.ts'

const [directory] = process.argv.slice(2)
if (directory === undefined) {
  console.error('usage: node test/chaos/checker/main.ts <directory of a run>')
  process.exitCode = 2
} else {
  const report = await check(directory)
  console.log(describe(report))
  process.exitCode = report.violations.length === 0 ? 0 : 1
}
