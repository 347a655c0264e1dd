/** Sends one request and waits; it is there to be killed meanwhile. */

import { PostgresBus } from '../../../src/index.ts'

const [connectionString, schema, subject, payload] = process.argv.slice(2) as [string, string, string, string]
const bus = await PostgresBus.connect({ connectionString, schema, maintenance: false })
await bus.requestReply.request(subject, payload, { timeoutMs: 60_000 })
