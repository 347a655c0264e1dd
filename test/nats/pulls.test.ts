/** How a member asks for its messages: several in a pull, and what it tells when a pull was not answered. */

import { connect, type NatsConnection } from '@nats-io/transport-node'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import type { BusError, Msg, MsgStream } from '../../src/index.ts'
import { NatsBus } from '../../src/nats/index.ts'
import { Gate } from '../faults/support/network/gate.ts'
import { type NatsServer, ownNatsServer, whyNoNats } from '../support/nats-server.ts'
import { eventually } from '../support/wait.ts'

const missing = process.env.NATS_URL ? 'it stops its server, and NATS_URL is not its own' : whyNoNats()
const text = ({ payload }: Msg<never>) => Number(Buffer.from(payload).toString())

describe.skipIf(missing !== undefined)(`pulls of NATS${missing === undefined ? '' : ` (${missing})`}`, () => {
  let server: NatsServer
  let bus: NatsBus
  let nc: NatsConnection
  let names = 0
  const fresh = () => `pulls${++names}`

  beforeAll(async () => {
    server = await ownNatsServer()
    bus = await NatsBus.connect({ servers: server.url })
    nc = await connect({ servers: server.url, maxReconnectAttempts: -1, reconnectTimeWait: 100 })
  })
  afterAll(async () => {
    await bus?.close()
    await nc?.close()
    await server?.remove()
  })

  const publish = (subject: string, from: number, to: number) =>
    bus.pubsub.publishMany(Array.from({ length: to - from + 1 }, (_, n) => ({ subject, payload: String(from + n) })))

  /** Asks so often at once. */
  const ask = (stream: MsgStream<never>, times: number) => {
    const messages = stream[Symbol.asyncIterator]()
    const came: number[] = []
    const asked = Array.from({ length: times }, () =>
      messages.next().then(async ({ value }) => {
        if (value === undefined) return
        came.push(text(value))
        await value.ack()
      }),
    )
    return { came, all: Promise.all(asked) }
  }

  /** The sizes of the pulls that the server is asked for. */
  const watchPulls = async (durable: string) => {
    const sizes: number[] = []
    const subscription = nc.subscribe(`$JS.API.CONSUMER.MSG.NEXT.klieo_messages.*`, {
      callback: (_error, { subject, data }) => {
        if (subject.includes(`.${durable}-`)) sizes.push((JSON.parse(Buffer.from(data).toString()) as { batch: number }).batch)
      },
    })
    await nc.flush()
    return { sizes, end: () => subscription.unsubscribe() }
  }

  const numbers = (from: number, to: number) => Array.from({ length: to - from + 1 }, (_, n) => from + n)

  test('P8 who asks 600 times at once is served in order, by a few pulls', async () => {
    const subject = fresh()
    await publish(subject, 1, 600)
    await using stream = await bus.pubsub.subscribe(subject, subject, { maxInFlight: 1_000 })
    const pulls = await watchPulls(subject)
    const { came, all } = ask(stream, 600)
    await all
    await nc.flush()
    pulls.end()
    expect(came).toEqual(numbers(1, 600))
    expect(pulls.sizes.length).toBeLessThan(10)
    expect(Math.max(...pulls.sizes)).toBe(256)
  })

  test('P3 a pull for more than there is gives what there is at once, and what comes later when it comes', async () => {
    const subject = fresh()
    await publish(subject, 1, 3)
    await using stream = await bus.pubsub.subscribe(subject, subject)
    const { came, all } = ask(stream, 10)
    await eventually(() => came.length === 3)
    await publish(subject, 4, 10)
    await all
    expect(came).toEqual(numbers(1, 10))
    expect((await bus.admin.durables()).find(({ durable }) => durable === subject)).toMatchObject({ pending: 0, inFlight: 0 })
  })

  test('no more is pulled than was asked for, nor than maxInFlight', async () => {
    const subject = fresh()
    await publish(subject, 1, 30)
    await using stream = await bus.pubsub.subscribe(subject, subject, { maxInFlight: 10 })
    const messages = stream[Symbol.asyncIterator]()
    const asked = Array.from({ length: 20 }, () => messages.next())
    const first = await Promise.all(asked.slice(0, 10))
    const counts = async () => (await bus.admin.durables()).find(({ durable }) => durable === subject)
    expect(await counts()).toMatchObject({ inFlight: 10, pending: 20 })
    for (const { value } of first) await value!.ack()
    const then = await Promise.all(asked.slice(10))
    expect(then.map(({ value }) => text(value!))).toEqual(numbers(11, 20))
    expect(await counts()).toMatchObject({ inFlight: 10, pending: 10 })
    for (const { value } of then) await value!.ack()
  })

  test('P5 what is in a pull that was answered to nobody comes again, and onInterrupted is told before that', async () => {
    const subject = fresh()
    const [host = '', port] = server.url.split(':')
    await using gate = await Gate.start(host, Number(port))
    const away = await NatsBus.connect({ servers: `127.0.0.1:${gate.port}` })
    const seen: string[] = []
    const subscription = { ackWaitMs: 2_000, onInterrupted: ({ code }: BusError) => seen.push(code) }
    const stream = await away.pubsub.subscribe(subject, subject, subscription)
    const messages = stream[Symbol.asyncIterator]()
    await publish(subject, 1, 5)
    gate.loseAnswers()
    const asked = Array.from({ length: 6 }, () => messages.next())
    await eventually(async () => (await bus.admin.durables()).find(({ durable }) => durable === subject)?.inFlight === 1)
    gate.shut()
    gate.open()
    await bus.pubsub.publish(subject, '6')
    for (const next of asked) {
      const message = (await next).value!
      seen.push(`${text(message)} ${message.attempt}`)
      await message.ack()
    }
    // The one that was lost comes behind those that were published after it.
    expect(seen).toEqual(['connection', '2 1', '3 1', '4 1', '5 1', '6 1', '1 2'])
    await away.close()
  })

  test('onInterrupted is told of a server that was restarted during a pull, and the stream goes on', async () => {
    const subject = fresh()
    const told: BusError[] = []
    await using stream = await bus.pubsub.subscribe(subject, subject, { onInterrupted: (error) => told.push(error) })
    const pulls = await watchPulls(subject)
    const next = stream[Symbol.asyncIterator]().next()
    await eventually(() => pulls.sizes.length === 2)
    expect(told).toEqual([])
    await server.stop()
    await server.start()
    await eventually(() => bus.pubsub.publish(subject, '1').then(() => true))
    const message = (await next).value!
    expect(text(message)).toBe(1)
    await message.ack()
    expect(told.length).toBeGreaterThan(0)
    expect(told[0]).toMatchObject({ code: 'connection', retryable: true })
    pulls.end()
  })

  test('onInterrupted is not told of a stream that is closed, nor of a durable that is idle', async () => {
    const subject = fresh()
    const told: BusError[] = []
    const stream = await bus.pubsub.subscribe(subject, subject, { ackWaitMs: 300, onInterrupted: (error) => told.push(error) })
    const pulls = await watchPulls(subject)
    const next = stream[Symbol.asyncIterator]().next()
    // One that waits is over within its ack wait, and is followed by another.
    await eventually(() => pulls.sizes.length >= 6)
    await stream.close()
    expect(await next).toEqual({ done: true, value: undefined })
    expect(told).toEqual([])
    pulls.end()
  })

  test('onInterrupted is a function', async () => {
    const wrong = { onInterrupted: {} as unknown as () => void }
    await expect(bus.pubsub.subscribe('a', 'a', wrong)).rejects.toMatchObject({ code: 'invalid_argument' })
  })
})
