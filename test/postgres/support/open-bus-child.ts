/**
 * A process in which everything a bus has is open: a stream, a watch, waits for a job, a lease and a reply, a responder and a worker.
 * It says so, and does what the lines of its stdin say: `close` closes the bus and tells how the waits ended; after that nothing
 * but the bus could keep it alive. It never calls process.exit.
 */

import { createInterface } from 'node:readline'
import { PostgresBus, Worker } from '../../../src/index.ts'
import { outcome } from './outcome.ts'

const [connectionString, schema] = process.argv.slice(2) as [string, string]
const say = (line: object) => process.stdout.write(`${JSON.stringify(line)}\n`)
const bus = await PostgresBus.connect({ connectionString, schema, pollIntervalMs: 100 })

const stream = await bus.pubsub.subscribe('open', `open-${process.pid}`)
const watch = await bus.kv.watch('open')
const held = await bus.kv.lease('open', `held-${process.pid}`, 60_000)
await bus.requestReply.respond('open.hang', () => new Promise<never>(() => {}))
const worker = new Worker(bus.jobs, 'worked', async () => {}, { onError: () => {} })
const ends = {
  stream: outcome(read(stream)),
  watch: outcome(read(watch)),
  claim: outcome(bus.jobs.claim('empty', 'w', 1_000, { waitMs: 30_000 })),
  lease: outcome(bus.kv.lease('open', `held-${process.pid}`, 1_000, { waitMs: 30_000 })),
  request: outcome(bus.requestReply.request('open.hang', '', { timeoutMs: 30_000 })),
}
say({ ready: true })

async function read(things: AsyncIterable<unknown>): Promise<void> {
  for await (const thing of things) say({ came: typeof thing })
}

const input = createInterface({ input: process.stdin })
for await (const line of input) {
  const command = JSON.parse(line) as string
  if (command === 'work') {
    const results: Record<string, number> = {}
    for (let n = 0; n < 100; n++) {
      const calls = [
        bus.pubsub.publish('elsewhere', `${n}`),
        bus.kv.put('elsewhere', 'k', `${n}`),
        bus.jobs.enqueue('worked', { payload: `${n}` }),
        bus.kv.get('elsewhere', 'k'),
      ]
      for (const result of await Promise.all(calls.map(outcome))) results[result] = (results[result] ?? 0) + 1
    }
    say({ worked: results })
  }
  if (command === 'close') break
}
process.stdin.destroy()
const startedAt = performance.now()
await bus.close()
const closedInMs = performance.now() - startedAt
await worker.stop({ graceMs: 0 })
const ended: Record<string, string> = {}
for (const [name, end] of Object.entries(ends)) ended[name] = await end
say({ closedInMs, ended, aborted: held.signal.aborted })
