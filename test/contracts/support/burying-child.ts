/**
 * Meets a message that does not match, and is gone the moment before or after its letter is published: SIGKILL, at a place that no other process
 * could hit.
 */

import { defineSubject, PostgresBus, type PublishOptions } from '../../../src/index.ts'

const { CONNECTION, SCHEMA, SUBJECT, DURABLE, WHEN } = process.env as Readonly<Record<string, string>>
const bus = await PostgresBus.connect({ connectionString: CONNECTION!, schema: SCHEMA! })
const { pubsub } = bus

const dying = {
  pubsub: {
    publish: async (subject: string, payload: Uint8Array | string, options?: PublishOptions) => {
      if (WHEN === 'before') process.kill(process.pid, 'SIGKILL')
      const ack = await pubsub.publish(subject, payload, options)
      process.kill(process.pid, 'SIGKILL')
      return ack
    },
    publishMany: (...args: Parameters<typeof pubsub.publishMany>) => pubsub.publishMany(...args),
    subscribe: (...args: Parameters<typeof pubsub.subscribe>) => pubsub.subscribe(...args),
    deleteDurable: (...args: Parameters<typeof pubsub.deleteDurable>) => pubsub.deleteDurable(...args),
  },
}
const stream = await defineSubject<number>(SUBJECT!).subscribe(dying, DURABLE!, { ackWaitMs: 500 })
for await (const msg of stream) throw new Error(`message ${msg.seq} was yielded`)
