/** Connects, says what came of it, waits for a line of stdin if there is a third argument, closes, and has nothing left to do. */

import { PostgresBus } from '../../../src/index.ts'
import { outcome } from './outcome.ts'

const [connectionString, schema, wait] = process.argv.slice(2) as [string, string, string?]
let bus: PostgresBus | undefined
const connected = await outcome(
  PostgresBus.connect({ connectionString, schema, maintenance: false }).then((made) => {
    bus = made
  }),
)
process.stdout.write(`${JSON.stringify({ connected })}\n`)
if (wait) {
  await new Promise((resolve) => process.stdin.once('data', resolve))
  process.stdin.destroy()
}
await bus?.close()
