/** Both servers, what is published on one of them, and what is found on the other. */

import { randomBytes } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import {
  Bridge,
  type BridgedBus,
  type BridgeOptions,
  type BridgeStats,
  type Bus,
  type Msg,
  type MsgStream,
  PostgresBus,
} from '../../../src/index.ts'
import { NatsBus } from '../../../src/nats/index.ts'
import { Gate } from '../../faults/support/network/gate.ts'
import { type NatsServer, natsServer } from '../../support/nats-server.ts'
import { databaseUrl, freshSchema } from '../../support/server.ts'
import { eventually } from '../../support/wait.ts'

export type Backend = 'postgres' | 'nats'
/** What the tests do on either bus: nothing of it has to do with transactions. */
export type AnyBus = Bus<never>

export const DIRECTIONS: readonly (readonly [Backend, Backend])[] = [
  ['postgres', 'nats'],
  ['nats', 'postgres'],
]
/** The least that a bridge takes. */
export const ACK_WAIT_MS = 1_000
/** How long a bus may take to close whose server is away. */
const CLOSES_WITHIN_MS = 3_000

export const textOf = ({ payload }: Pick<Msg, 'payload'>) => Buffer.from(payload).toString()

export interface ConnectOptions {
  readonly maxPayloadBytes?: number
  /** Its way to the server. */
  readonly gate?: Gate
}

export class Stage {
  readonly schema = freshSchema()
  readonly prefix = `b${randomBytes(4).toString('hex')}`
  #server: Pick<NatsServer, 'url' | 'remove'> | undefined
  readonly #given: (() => Promise<unknown>)[] = []
  #names = 0
  /** To publish and to look with; no bridge uses these. */
  readonly at = {} as Record<Backend, AnyBus>

  async start(): Promise<void> {
    this.#server = await natsServer()
    await PostgresBus.migrate({ connectionString: databaseUrl(), schema: this.schema })
    this.at.postgres = await this.#connect('postgres', {})
    this.at.nats = await this.#connect('nats', {})
  }

  async stop(): Promise<void> {
    await this.clean()
    await Promise.all([this.at.postgres?.close(), this.at.nats?.close()])
    await this.#server?.remove()
  }

  get natsUrl(): string {
    return this.#server!.url
  }

  fresh(what: string): string {
    return `${what}${++this.#names}`
  }

  /** Of this test's own; ended after it. */
  async connect(backend: Backend, options: ConnectOptions = {}): Promise<AnyBus> {
    const bus = await this.#connect(backend, options)
    this.#given.push(() => bus.close())
    return bus
  }

  async gate(backend: Backend): Promise<Gate> {
    const { hostname, port } = backend === 'postgres' ? new URL(databaseUrl()) : new URL(`nats://${this.natsUrl}`)
    const gate = await Gate.start(hostname, Number(port || 5432))
    this.#given.push(() => gate[Symbol.asyncDispose]())
    return gate
  }

  bridge(from: BridgedBus, to: BridgedBus, subject: string, options: BridgeOptions): Crossing {
    const crossing = new Crossing(from, to, subject, options)
    this.#given.push(() => crossing.bridge.stop({ graceMs: 0 }).catch(() => {}))
    return crossing
  }

  async read(backend: Backend, filter: string): Promise<Reading> {
    const stream = await this.at[backend].pubsub.subscribe(filter, this.fresh('reading'), { maxInFlight: 256 })
    const reading = new Reading(stream, (text) => this.at[backend].pubsub.publish(filter.replace(/[*>]$/, 'end'), text))
    this.#given.push(() => stream.close())
    return reading
  }

  async durable(backend: Backend, name: string) {
    return (await this.at[backend].admin.durables()).find(({ durable }) => durable === name)
  }

  /** Nothing of it is left, and nothing is with anybody. */
  async isDone(backend: Backend, name: string): Promise<void> {
    await eventually(async () => {
      const found = await this.durable(backend, name)
      if (!found || found.pending + found.inFlight + found.redelivering > 0) throw new Error(JSON.stringify(found))
    })
  }

  /** A member that fetches so many and then does nothing more: what is left of a process that died. */
  async deadHolder(backend: Backend, subject: string, durable: string, count: number, ackWaitMs = ACK_WAIT_MS): Promise<Msg<never>[]> {
    const bus = await this.connect(backend)
    const stream = await bus.pubsub.subscribe(subject, durable, { ackWaitMs, maxInFlight: count })
    const messages = stream[Symbol.asyncIterator]()
    const held: Msg<never>[] = []
    while (held.length < count) held.push((await messages.next()).value!)
    return held
  }

  /** The last given first, and together: some wait for a server that is away. */
  async clean(): Promise<void> {
    const over = new Promise((resolve) => setTimeout(resolve, CLOSES_WITHIN_MS).unref())
    for (const end of this.#given.splice(0).reverse()) await Promise.race([end().catch(() => {}), over])
  }

  async #connect(backend: Backend, { gate, ...options }: ConnectOptions): Promise<AnyBus> {
    if (backend === 'nats') {
      const servers = gate ? `127.0.0.1:${gate.port}` : this.natsUrl
      return NatsBus.connect({ servers, prefix: this.prefix, ...options })
    }
    const url = new URL(databaseUrl())
    if (gate) url.host = `127.0.0.1:${gate.port}`
    const bus = await PostgresBus.connect({
      connectionString: url.href,
      schema: this.schema,
      maintenance: false,
      migrate: false,
      ...options,
    })
    return bus as unknown as AnyBus
  }
}

/** A bridge and what it said. */
export class Crossing {
  readonly bridge: Bridge
  readonly errors: unknown[] = []

  constructor(from: BridgedBus, to: BridgedBus, subject: string, options: BridgeOptions) {
    this.bridge = new Bridge(from, to, subject, { ackWaitMs: ACK_WAIT_MS, onError: (error) => this.errors.push(error), ...options })
  }

  get stats(): BridgeStats {
    return this.bridge.stats
  }

  async until(state: BridgeStats['state']): Promise<void> {
    await eventually(() => this.bridge.stats.state === state, { what: `a bridge that is ${state}` })
  }
}

/** Everything on a filter, in the order in which it is stored. */
export class Reading {
  readonly seen: Msg<never>[] = []
  readonly #publish: (text: string) => Promise<unknown>

  constructor(stream: MsgStream<never>, publish: (text: string) => Promise<unknown>) {
    this.#publish = publish
    void (async () => {
      for await (const message of stream) {
        this.seen.push(message)
        await message.ack().catch(() => {})
      }
    })()
  }

  get texts(): string[] {
    return this.inOrder().map(textOf)
  }

  inOrder(): Msg<never>[] {
    const bySeq = new Map(this.seen.map((message) => [message.seq, message]))
    return [...bySeq.values()].sort((a, b) => a.seq - b.seq)
  }

  async until(count: number): Promise<void> {
    await eventually(
      () => {
        if (this.inOrder().length < count) throw new Error(`so far: ${this.texts.join(' ')}`)
      },
      { what: `${count} messages` },
    )
  }

  /** @returns all there is: what is published last comes last */
  async all(): Promise<string[]> {
    await this.#publish('the end')
    await eventually(() => this.texts.includes('the end'))
    return this.texts.filter((text) => text !== 'the end')
  }
}

/** The same bus, with some of it replaced. */
export function altered(bus: AnyBus, pubsub: Partial<AnyBus['pubsub']>): BridgedBus {
  const { pubsub: own, kv, admin, supports } = bus
  return {
    kv,
    admin,
    supports,
    pubsub: {
      publish: (...args) => own.publish(...args),
      publishMany: (...args) => own.publishMany(...args),
      subscribe: (...args) => own.subscribe(...args),
      deleteDurable: (...args) => own.deleteDurable(...args),
      ...pubsub,
    },
  }
}

/** The source of a bridge, whose acks wait. */
export class HeldAcks {
  readonly bus: BridgedBus
  readonly #until = Promise.withResolvers<void>()
  waiting = 0

  constructor(bus: AnyBus) {
    this.bus = altered(bus, { subscribe: async (...args) => this.#held(await bus.pubsub.subscribe(...args)) })
  }

  letGo(): void {
    this.#until.resolve()
  }

  #held(stream: MsgStream<never>): MsgStream<never> {
    const messages = stream[Symbol.asyncIterator]()
    const next = async () => {
      const result = await messages.next()
      if (result.done) return result
      const ack = result.value.ack.bind(result.value)
      result.value.ack = async () => {
        this.waiting++
        await this.#until.promise
        return ack()
      }
      return result
    }
    return { close: () => stream.close(), [Symbol.asyncDispose]: () => stream.close(), [Symbol.asyncIterator]: () => ({ next }) }
  }
}

/** The source of a bridge, whose messages come one by one, so far apart. */
export function slow(bus: AnyBus, everyMs: number): BridgedBus {
  return altered(bus, {
    async subscribe(...args) {
      const stream = await bus.pubsub.subscribe(...args)
      const messages = stream[Symbol.asyncIterator]()
      let last: Promise<unknown> = Promise.resolve()
      const next = async () => {
        const result = await messages.next()
        last = last.then(() => sleep(everyMs))
        await last
        return result
      }
      return { close: () => stream.close(), [Symbol.asyncDispose]: () => stream.close(), [Symbol.asyncIterator]: () => ({ next }) }
    },
  })
}

/** The target of a bridge, whose publishes wait before they are sent. */
export class HeldPublishes {
  readonly bus: BridgedBus
  readonly #until = Promise.withResolvers<void>()
  waiting = 0

  constructor(bus: AnyBus) {
    this.bus = altered(bus, {
      publish: async (...args) => {
        this.waiting++
        await this.#until.promise
        return bus.pubsub.publish(...args)
      },
      publishMany: async (messages) => {
        this.waiting += messages.length
        await this.#until.promise
        return bus.pubsub.publishMany(messages)
      },
    })
  }

  letGo(): void {
    this.#until.resolve()
  }
}
