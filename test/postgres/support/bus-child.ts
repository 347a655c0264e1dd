/** A bus that does nothing but its maintenance, in a process of its own. */

import { PostgresBus } from '../../../src/index.ts'

const [connectionString, schema] = process.argv.slice(2) as [string, string]
await PostgresBus.connect({ connectionString, schema })
process.stdout.write('{"ready":true}\n')
