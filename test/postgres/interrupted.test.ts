/** What a stream tells its consumer by `onInterrupted`: that messages may come behind others that were published after them. */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { type BusError, PostgresBus } from '../../src/index.ts'
import { MemoryBus } from '../../src/memory/index.ts'
import { named, terminate, untilWaiting } from '../faults/support/network/backends.ts'
import { Tap } from '../faults/support/network/tap.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'

const schema = freshSchema()
const NAME = 'interrupted consumer'
const options = { schema, maintenance: false, migrate: false, pollIntervalMs: 100 }
let names = 0
const fresh = () => `interrupted${++names}`
const text = (payload: Uint8Array) => Buffer.from(payload).toString()

describe('onInterrupted', () => {
  let bus: PostgresBus
  let observer: Session

  beforeAll(async () => {
    await PostgresBus.migrate({ connectionString: databaseUrl(), schema })
    bus = await PostgresBus.connect({ connectionString: named(databaseUrl(), NAME), ...options })
    observer = await session(databaseUrl())
  })
  afterAll(async () => {
    await bus?.close()
    await observer?.[Symbol.asyncDispose]()
  })

  test('is told when the backend is terminated during a fetch, and the stream goes on', async () => {
    const subject = fresh()
    const told: BusError[] = []
    await using stream = await bus.pubsub.subscribe(subject, subject, { onInterrupted: (error) => told.push(error) })
    const messages = stream[Symbol.asyncIterator]()
    await observer.query('begin')
    await observer.query(`select from ${schema}.consumer_offsets where durable = $1 for update`, [subject])
    await using publisher = await PostgresBus.connect({ connectionString: databaseUrl(), ...options })
    await publisher.pubsub.publish(subject, 'x')
    const next = messages.next()
    await using other = await session(databaseUrl())
    await terminate(other, await untilWaiting(other, NAME, 'fetch_messages'))
    await eventually(() => told.length > 0)
    expect(told).toEqual([expect.objectContaining({ code: 'connection' })])
    await observer.query('rollback')
    const message = (await next).value!
    expect([text(message.payload), message.attempt]).toEqual(['x', 1])
    await message.ack()
    expect(told).toHaveLength(1)
  })

  test('is told before the message comes whose fetch was answered to nobody, behind one that was published later', async () => {
    const subject = fresh()
    const seen: string[] = []
    await using tap = await Tap.start(databaseUrl())
    const away = await PostgresBus.connect({ connectionString: tap.connectionString, ...options })
    const subscription = { ackWaitMs: 500, onInterrupted: ({ code }: BusError) => seen.push(code) }
    const stream = await away.pubsub.subscribe(subject, subject, subscription)
    const messages = stream[Symbol.asyncIterator]()
    await bus.pubsub.publish(subject, 'first')
    const lost = tap.loseAnswer(/fetch_messages/)
    const next = messages.next()
    await lost
    await bus.pubsub.publish(subject, 'second')
    for (let ask = next, n = 0; n < 2; n++, ask = messages.next()) {
      const message = (await ask).value!
      seen.push(`${text(message.payload)} ${message.attempt}`)
      await message.ack()
    }
    expect(seen).toEqual(['connection', 'second 1', 'first 2'])
    await away.close()
  })

  test('is told when nobody asked for what was fetched, and it went back', async () => {
    const subject = fresh()
    const told: BusError[] = []
    for (const payload of ['1', '2', '3']) await bus.pubsub.publish(subject, payload)
    const subscription = { ackWaitMs: 400, onInterrupted: (error: BusError) => told.push(error) }
    await using stream = await bus.pubsub.subscribe(subject, subject, subscription)
    await (await stream[Symbol.asyncIterator]().next()).value!.ack()
    await eventually(() => told.length > 0)
    expect(told).toEqual([expect.objectContaining({ code: 'timeout', message: expect.stringMatching(/^2 messages/) })])
  })

  test('is not told of what is no interruption: idle, redelivered, closed', async () => {
    const subject = fresh()
    const told: BusError[] = []
    const stream = await bus.pubsub.subscribe(subject, subject, { ackWaitMs: 200, onInterrupted: (error) => told.push(error) })
    const messages = stream[Symbol.asyncIterator]()
    const first = messages.next()
    await eventually(async () => (await bus.admin.durables()).some(({ durable }) => durable === subject))
    await bus.pubsub.publish(subject, 'x')
    expect((await first).value!.attempt).toBe(1)
    const again = (await messages.next()).value!
    expect(again.attempt).toBe(2)
    await again.nak()
    await (await messages.next()).value!.ack()
    const last = messages.next()
    await stream.close()
    expect(await last).toEqual({ done: true, value: undefined })
    expect(told).toEqual([])
  })

  test('what it throws is thrown where nobody catches it, and the stream goes on', async () => {
    const subject = fresh()
    const thrown: unknown[] = []
    const listeners = process.listeners('uncaughtException')
    process.removeAllListeners('uncaughtException')
    process.on('uncaughtException', (error) => thrown.push(error))
    try {
      await using tap = await Tap.start(databaseUrl())
      const away = await PostgresBus.connect({ connectionString: tap.connectionString, ...options })
      const onInterrupted = () => {
        throw new Error('mine')
      }
      const messages = (await away.pubsub.subscribe(subject, subject, { ackWaitMs: 500, onInterrupted }))[Symbol.asyncIterator]()
      await bus.pubsub.publish(subject, 'x')
      const lost = tap.loseAnswer(/fetch_messages/)
      const next = messages.next()
      await lost
      expect((await next).value!.attempt).toBe(2)
      expect(thrown).toEqual([expect.objectContaining({ message: 'mine' })])
      await away.close()
    } finally {
      process.removeAllListeners('uncaughtException')
      for (const listener of listeners) process.on('uncaughtException', listener)
    }
  })

  test('is a function', async () => {
    await using memory = MemoryBus.create()
    for (const each of [bus, memory]) {
      const wrong = { onInterrupted: 'log' as unknown as () => void }
      await expect(each.pubsub.subscribe('a', 'a', wrong)).rejects.toMatchObject({ code: 'invalid_argument' })
    }
  })
})
