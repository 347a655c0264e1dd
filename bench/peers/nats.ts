/** NATS: JetStream as a log, its key-value store, and requests over the core. */

import type { Contender, KvSession, LogSession, RequestSession, Servers } from '../contenders.ts'
import { load, versionOf } from './packages.ts'

const TRANSPORT = '@nats-io/transport-node'
const JETSTREAM = '@nats-io/jetstream'
const KV = '@nats-io/kv'

const STREAM = 'BENCH'
const SUBJECT = 'bench.log'

interface Message {
  readonly data: Uint8Array
  respond(data: Uint8Array): boolean
}

interface Connection {
  subscribe(subject: string, options: { callback: (error: unknown, message: Message) => void }): unknown
  request(subject: string, data: Uint8Array, options: { timeout: number }): Promise<Message>
  flush(): Promise<void>
  close(): Promise<void>
}

interface Transport {
  connect(options: { servers: string }): Promise<Connection>
}

interface JsMessage {
  ack(): void
  ackAck(): Promise<boolean>
}

interface Messages extends AsyncIterable<JsMessage> {
  close(): Promise<unknown>
}

interface JetStream {
  jetstream(connection: Connection): {
    publish(subject: string, data: Uint8Array): Promise<unknown>
    readonly consumers: {
      get(stream: string, durable: string): Promise<{ consume(options: { max_messages?: number }): Promise<Messages> }>
    }
  }
  jetstreamManager(connection: Connection): Promise<{
    readonly streams: { add(config: object): Promise<unknown>; delete(name: string): Promise<unknown> }
    readonly consumers: { add(stream: string, config: object): Promise<unknown>; delete(stream: string, name: string): Promise<unknown> }
  }>
}

interface NatsKv {
  readonly Kvm: new (
    connection: Connection,
  ) => {
    create(
      bucket: string,
      options: { history: number; storage: 'file' },
    ): Promise<{
      put(key: string, value: Uint8Array): Promise<number>
      get(key: string): Promise<unknown>
      create(key: string, value: Uint8Array): Promise<number>
      update(key: string, value: Uint8Array, revision: number): Promise<number>
      destroy(): Promise<boolean>
    }>
  }
}

interface LogSettings {
  /** Of the consumer. */
  readonly maxAckPending?: number
  /** Asked for at once by the client. */
  readonly maxMessages?: number
  /** Each ack is waited for, many at once. */
  readonly confirmed?: boolean
}

async function connect({ natsUrl }: Servers): Promise<Connection> {
  if (natsUrl === undefined) throw new Error('there is no NATS server')
  const { connect } = await load<Transport>(TRANSPORT)
  return connect({ servers: natsUrl })
}

async function openLog(servers: Servers, { maxAckPending, maxMessages, confirmed = false }: LogSettings): Promise<LogSession> {
  const connection = await connect(servers)
  const { jetstream, jetstreamManager } = await load<JetStream>(JETSTREAM)
  const [js, manager] = [jetstream(connection), await jetstreamManager(connection)]
  const create = () => manager.streams.add({ name: STREAM, subjects: [SUBJECT], storage: 'file', retention: 'limits' })
  const remove = () => manager.streams.delete(STREAM)
  // Left behind by a process that was ended.
  await remove().catch(() => {})
  await create()
  let durables: string[] = []

  async function consumeOne(durable: string, count: number): Promise<void> {
    const consumer = await js.consumers.get(STREAM, durable)
    const messages = await consumer.consume(maxMessages === undefined ? {} : { max_messages: maxMessages })
    const acks: Promise<boolean>[] = []
    let taken = 0
    for await (const message of messages) {
      if (confirmed) acks.push(message.ackAck())
      else message.ack()
      if (++taken === count) break
    }
    await Promise.all(acks)
    await messages.close()
  }

  return {
    async reset() {
      await remove()
      await create()
      durables = []
    },
    publish: (payload) => js.publish(SUBJECT, payload),
    publishMany: (payloads) => Promise.all(payloads.map((payload) => js.publish(SUBJECT, payload))),
    async addDurables(count) {
      for (let n = 0; n < count; n++) {
        const durable = `bench-${durables.length + 1}`
        await manager.consumers.add(STREAM, {
          durable_name: durable,
          ack_policy: 'explicit',
          deliver_policy: 'all',
          ...(maxAckPending === undefined ? {} : { max_ack_pending: maxAckPending }),
        })
        durables.push(durable)
      }
    },
    async consume(count) {
      await Promise.all(durables.map((durable) => consumeOne(durable, count)))
      // An ack that nobody waits for has been read by the server once it has answered what was sent after it.
      await connection.flush()
    },
    async [Symbol.asyncDispose]() {
      await remove().catch(() => {})
      await connection.close()
    },
  }
}

function log(name: string, settings: string, options: LogSettings, leaveOut: readonly string[] = []): Contender<LogSession> {
  const version = () => versionOf(JETSTREAM)
  return { name, version, settings, server: 'nats', leaveOut, open: (servers) => openLog(servers, options) }
}

export const jetStreamDefault = log(
  'NATS JetStream, default',
  'file storage; consumers with the defaults (max_ack_pending 1,000, 100 messages asked for at once); an ack is sent and not waited for',
  {},
)

export const jetStreamLarge = log(
  'NATS JetStream, large window',
  'file storage; max_ack_pending 20,000 and 5,000 messages asked for at once; an ack is sent and not waited for',
  { maxAckPending: 20_000, maxMessages: 5_000 },
  // It publishes as the one with the defaults does.
  ['publish'],
)

export const jetStreamConfirmed = log(
  'NATS JetStream, confirmed acks',
  'file storage; max_ack_pending 20,000 and 5,000 messages asked for at once; each ack is answered by the server, many at once',
  { maxAckPending: 20_000, maxMessages: 5_000, confirmed: true },
  ['publish'],
)

export const natsKv: Contender<KvSession> = {
  name: 'NATS KV',
  version: () => versionOf(KV),
  settings: 'file storage, a history of 1, direct gets (all but the storage by default)',
  server: 'nats',
  async open(servers) {
    const connection = await connect(servers)
    const { Kvm } = await load<NatsKv>(KV)
    const create = () => new Kvm(connection).create('bench', { history: 1, storage: 'file' })
    await (await create()).destroy()
    let bucket = await create()
    return {
      async reset() {
        await bucket.destroy()
        bucket = await create()
      },
      put: (key, value) => bucket.put(key, value),
      get: (key) => bucket.get(key),
      cas: (key, value, revision) => (revision === null ? bucket.create(key, value) : bucket.update(key, value, revision)),
      async [Symbol.asyncDispose]() {
        await bucket.destroy()
        await connection.close()
      },
    }
  },
}

export const natsRequests: Contender<RequestSession> = {
  name: 'NATS request/reply',
  version: () => versionOf(TRANSPORT),
  settings: 'the defaults; requester and responder have a connection each',
  server: 'nats',
  async open(servers) {
    const [requester, responder] = await Promise.all([connect(servers), connect(servers)])
    responder.subscribe('bench.echo', { callback: (_, message) => void message.respond(message.data) })
    await responder.flush()
    return {
      request: (payload) => requester.request('bench.echo', payload, { timeout: 5_000 }),
      async [Symbol.asyncDispose]() {
        await Promise.all([requester.close(), responder.close()])
      },
    }
  },
}
