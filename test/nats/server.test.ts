/** What a server that goes away and comes back does to a bus, and what a bus asks of a server. */

import { jetstreamManager } from '@nats-io/jetstream'
import { connect } from '@nats-io/transport-node'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { NatsBus } from '../../src/nats/index.ts'
import { type NatsServer, ownNatsServer, whyNoOwnNats } from '../support/nats-server.ts'
import { eventually } from '../support/wait.ts'

const missing = whyNoOwnNats()
const LONG_TTL_MS = 60_000
const text = (bytes: Uint8Array) => Buffer.from(bytes).toString()

describe.skipIf(missing !== undefined)(`a server of NATS${missing === undefined ? '' : ` (${missing})`}`, () => {
  let server: NatsServer
  let bus: NatsBus

  beforeAll(async () => {
    server = await ownNatsServer()
    bus = await NatsBus.connect({ servers: server.url })
  })

  afterAll(async () => {
    await bus?.close()
    await server?.remove()
  })

  for (const signal of ['SIGTERM', 'SIGKILL'] as const) {
    test(`after its end by ${signal} streams, watches, responders, leases and claims go on`, async () => {
      const name = signal.toLowerCase()
      const stream = await bus.pubsub.subscribe(name, name)
      const messages = stream[Symbol.asyncIterator]()
      const watch = await bus.kv.watch(name)
      const changes = watch[Symbol.asyncIterator]()
      await bus.requestReply.respond(name, ({ payload }) => payload)
      await bus.pubsub.publish(name, 'before')
      const held = (await messages.next()).value!
      await bus.kv.put(name, 'before', '1')
      expect((await changes.next()).value).toMatchObject({ operation: 'put', entry: { key: 'before' } })
      const lease = await bus.kv.lease(name, 'k', LONG_TTL_MS)
      await bus.jobs.enqueue(name, { payload: 'before' })
      const job = await bus.jobs.claim(name, 'w', LONG_TTL_MS)
      const [message, change] = [messages.next(), changes.next()]
      // A claim ends with the connection; a worker claims again.
      const claim = eventually(() => bus.jobs.claim(name, 'w', LONG_TTL_MS, { waitMs: 1_000 }), { timeoutMs: 30_000 })

      await server.stop(signal)
      await server.start()

      const again = <T>(call: () => Promise<T>) => eventually(call, { timeoutMs: 15_000 })
      await again(() => bus.pubsub.publish(name, 'after', { msgId: `${name} after` }))
      await again(() => bus.kv.put(name, 'after', '2'))
      await again(() => bus.jobs.enqueue(name, { payload: 'after', dedupKey: 'after' }))
      expect(text((await message).value!.payload)).toBe('after')
      expect((await change).value).toMatchObject({ operation: 'put', entry: { key: 'after' } })
      expect(text((await claim)!.payload)).toBe('after')
      expect(text(await again(() => bus.requestReply.request(name, 'hello', { timeoutMs: 1_000 })))).toBe('hello')
      await held.ack()
      await lease.heartbeat()
      await job!.heartbeat()
      await job!.ack()
      expect(await bus.kv.get(name, 'before')).toBeTruthy()
      await stream.close()
      await watch.close()
      await lease.release()
    }, 60_000)
  }

  test('while it is away calls end with connection, and close resolves', async () => {
    const other = await NatsBus.connect({ servers: server.url })
    await server.stop()
    try {
      await expect(other.pubsub.publish('away', 'x')).rejects.toMatchObject({ code: 'connection' })
      await other.close()
      await expect(NatsBus.connect({ servers: server.url })).rejects.toMatchObject({ code: 'connection' })
    } finally {
      await server.start()
    }
  })

  test('a stream of the name that is not the bus’s is refused and left alone', async () => {
    const nc = await connect({ servers: server.url })
    const jsm = await jetstreamManager(nc)
    await jsm.streams.add({ name: 'theirs_messages', subjects: ['theirs.other'] })
    await expect(NatsBus.connect({ servers: server.url, prefix: 'theirs' })).rejects.toMatchObject({ code: 'conflict' })
    expect((await jsm.streams.info('theirs_messages')).config.subjects).toEqual(['theirs.other'])
    await nc.close()
  })

  test.skipIf(process.env.NATS_URL)('a server whose max_payload leaves no room beside headers is refused at once', async () => {
    const small = await ownNatsServer('max_payload: 128KB\n')
    try {
      for (const maxPayloadBytes of [undefined, 'server'] as const) {
        const options = { servers: small.url, ...(maxPayloadBytes === undefined ? {} : { maxPayloadBytes }) }
        await expect(NatsBus.connect(options)).rejects.toMatchObject({
          code: 'unsupported',
          message: expect.stringMatching(/131072.*raise max_payload/),
        })
      }
    } finally {
      await small.remove()
    }
  })

  test('the largest payload is what the server takes, and more is refused at connect', async () => {
    const small = await ownNatsServer('max_payload: 1MB\n')
    try {
      await using limited = await NatsBus.connect({ servers: small.url })
      await limited.pubsub.publish('s', new Uint8Array(800_000))
      await expect(limited.pubsub.publish('s', new Uint8Array(1_000_000))).rejects.toMatchObject({ code: 'payload_too_large' })
      await expect(NatsBus.connect({ servers: small.url, maxPayloadBytes: 1_048_576 })).rejects.toMatchObject({ code: 'unsupported' })
    } finally {
      await small.remove()
    }
  })

  test('without JetStream it says so', async () => {
    const plain = await ownNatsServer('', [])
    try {
      await expect(NatsBus.connect({ servers: plain.url })).rejects.toMatchObject({
        code: 'unavailable',
        message: expect.stringContaining('-js'),
      })
    } finally {
      await plain.remove()
    }
  })

  test('options are checked before anything is connected', async () => {
    for (const prefix of ['', 'a.b', 'a b', '*', 7, 'x'.repeat(33)])
      await expect(NatsBus.connect({ prefix: prefix as string })).rejects.toMatchObject({
        code: 'invalid_argument',
        message: expect.stringContaining('prefix'),
      })
    for (const options of [{ replicas: 0 }, { replicas: 6 }, { jobAckWaitMs: 1 }, { retention: { messagesMs: 1 } }])
      await expect(NatsBus.connect(options)).rejects.toMatchObject({ code: 'invalid_argument' })
  })

  test('keys, values and payloads of 8 MiB pass', async () => {
    await using large = await NatsBus.connect({ servers: server.url, maxPayloadBytes: 8 * 1024 * 1024 })
    const bytes = new Uint8Array(8 * 1024 * 1024).fill(7)
    // Each is sent or read within 5 s, or once more on a machine that has much else to do.
    const again = <T>(call: () => Promise<T>) => eventually(call, { timeoutMs: 20_000 })
    await again(() => large.kv.put('large', 'k', bytes))
    expect((await again(() => large.kv.get('large', 'k')))?.value.byteLength).toBe(bytes.byteLength)
    await large.jobs.enqueue('large', { payload: bytes })
    expect((await large.jobs.claim('large', 'w', LONG_TTL_MS))?.payload.byteLength).toBe(bytes.byteLength)
  })
})
