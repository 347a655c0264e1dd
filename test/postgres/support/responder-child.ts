/** Answers requests with their payloads, and says which it handles; the payload `hang` is never answered. It is there to be killed and stopped. */

import { PostgresBus } from '../../../src/index.ts'

const [connectionString, schema, subject] = process.argv.slice(2) as [string, string, string]
const bus = await PostgresBus.connect({ connectionString, schema, maintenance: false })
await bus.requestReply.respond(subject, async ({ payload }) => {
  const handling = new TextDecoder().decode(payload)
  process.stdout.write(`${JSON.stringify({ handling })}\n`)
  if (handling === 'hang') await new Promise<never>(() => {})
  return payload
})
process.stdout.write('{"ready":true}\n')
