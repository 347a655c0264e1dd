/** Opens a bus with everything a bus can have, and says when the process is about to run out of things to do. */

import { MemoryBus } from '../../src/memory/index.ts'

const [waitFor] = process.argv.slice(2)
const bus = MemoryBus.create()
await bus.pubsub.publish('s', 'x')
const stream = await bus.pubsub.subscribe('s', 'd', { maxDeliver: 1 })
await stream[Symbol.asyncIterator]().next()
await bus.requestReply.respond('r', () => '')
await bus.kv.put('b', 'k', 'v', { ttlMs: 3_600_000 })
const watch = await bus.kv.watch('b', undefined, { updatesOnly: true })
await bus.kv.lease('b', 'lease', 3_600_000)
await bus.jobs.enqueueMany('q', [
  { payload: '', maxAttempts: 1 },
  { payload: '', delayMs: 3_600_000 },
])
await bus.jobs.claim('q', 'w', 3_600_000)

process.once('beforeExit', () => console.log(JSON.stringify({ idle: true })))
console.log(JSON.stringify({ ready: true }))
if (waitFor === 'message') await stream[Symbol.asyncIterator]().next()
if (waitFor === 'change') await watch[Symbol.asyncIterator]().next()
if (waitFor === 'job') await bus.jobs.claim('q', 'w', 1_000, { waitMs: 30_000 })
if (waitFor === 'close') {
  const ended = [stream[Symbol.asyncIterator]().next(), watch[Symbol.asyncIterator]().next()]
  const refused = bus.jobs.claim('q', 'w', 1_000, { waitMs: 30_000 }).catch(({ code }) => code)
  await bus.close()
  console.log(JSON.stringify({ ended: (await Promise.all(ended)).map(({ done }) => done), refused: await refused }))
}
