/** Stops a bridge, which it gives a minute, while a reading of it ends, and has nothing more to do: node stopped-child.ts */

import { Bridge, type BridgedBus, BusError, type SubscribeOptions } from '../../../src/index.ts'
import { MemoryBus } from '../../../src/memory/index.ts'
import { eventually } from '../../support/wait.ts'

const source = MemoryBus.create()
const target = MemoryBus.create()
let interrupt: SubscribeOptions['onInterrupted']
let isClosing = false
const closing = Promise.withResolvers<void>()
const pubsub: BridgedBus['pubsub'] = Object.create(source.pubsub, {
  subscribe: {
    value: async (...[subject, durable, options]: Parameters<typeof source.pubsub.subscribe>) => {
      interrupt = options?.onInterrupted
      const stream = await source.pubsub.subscribe(subject, durable, options)
      const close = async () => {
        isClosing = true
        await closing.promise
        await stream.close()
      }
      return { close, [Symbol.asyncIterator]: () => stream[Symbol.asyncIterator]() }
    },
  },
})
const { kv, admin, supports } = source
const bridge = new Bridge({ pubsub, kv, admin, supports }, target, 'a', { durable: 'd', onError: () => {} })
await eventually(() => bridge.stats.state === 'relaying')
interrupt?.(new BusError('connection', 'a fetch failed'))
await eventually(() => isClosing)
const stopped = bridge.stop({ graceMs: 60_000 })
closing.resolve()
await stopped
await Promise.all([source.close(), target.close()])
process.stdout.write(`${JSON.stringify({ stopped: true })}\n`)
