/** Connects, says what came of it, closes, and has nothing left to do. */

import { PostgresBus } from '../../../src/index.ts'
import { outcome } from './outcome.ts'

const [connectionString, schema] = process.argv.slice(2) as [string, string]
let bus: PostgresBus | undefined
const connected = await outcome(
  PostgresBus.connect({ connectionString, schema }).then((made) => {
    bus = made
  }),
)
await bus?.close()
process.stdout.write(`${JSON.stringify({ connected })}\n`)
