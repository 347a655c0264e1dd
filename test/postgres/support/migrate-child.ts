/** Migrates the schema named by its arguments as soon as a line comes in, and says what it did. */

import { PostgresBus } from '../../../src/index.ts'

const [connectionString, schema] = process.argv.slice(2) as [string, string]
process.stdout.write('{"ready":true}\n')
process.stdin.once('data', async () => {
  try {
    const bus = await PostgresBus.connect({ connectionString, schema })
    const { seq } = await bus.pubsub.publish('started', String(process.pid))
    await bus.close()
    process.stdout.write(`${JSON.stringify({ seq })}\n`)
  } catch (error) {
    process.stdout.write(`${JSON.stringify({ error: String(error) })}\n`)
  }
  process.stdin.destroy()
})
