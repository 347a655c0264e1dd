/** Opens all that a bus can have open, closes it and has nothing more to do: node idle-child.ts <server> <prefix> */

import { NatsBus } from '../../../src/nats/index.ts'

const [servers, prefix] = process.argv.slice(2) as [string, string]
const bus = await NatsBus.connect({ servers, prefix })
const stream = await bus.pubsub.subscribe('idle', 'idle')
void (async () => {
  for await (const message of stream) await message.ack()
})()
await bus.requestReply.respond('idle', () => '')
await bus.kv.watch('idle')
await bus.kv.lease('idle', 'k', 60_000)
await bus.jobs.enqueue('idle', { payload: '' })
await bus.jobs.claim('idle', 'w', 60_000)
void bus.jobs.claim('none', 'w', 60_000, { waitMs: 30_000 })
await bus.close()
process.stdout.write(`${JSON.stringify({ closed: true })}\n`)
