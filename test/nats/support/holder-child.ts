/** Claims a job, says so, and holds it until it is killed: node holder-child.ts <server> <prefix> <queue> <leaseTtlMs> */

import { NatsBus } from '../../../src/nats/index.ts'

const [servers, prefix, queue, ttl] = process.argv.slice(2) as [string, string, string, string]
const bus = await NatsBus.connect({ servers, prefix, jobAckWaitMs: 300 })
const askedAt = Date.now()
const job = await bus.jobs.claim(queue, 'holder', Number(ttl), { waitMs: 10_000 })
process.stdout.write(`${JSON.stringify({ claimed: job?.id, attempt: job?.attempt, askedAt })}\n`)
setInterval(() => {}, 1_000)
