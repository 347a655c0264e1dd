/**
 * LISTEN, and the only user of pg-listen.
 *
 *   connecting ──▶ listening        a notification sent from the pool came back: the bus is woken
 *       │    └──▶ poll-only ─┐      it did not: a pooler is in between; the bus polls
 *       │           └────────┘      and looks again every half minute
 *       └── lost ──▶ connecting     for ever, with growing pauses
 *
 * The probe is sent on another connection: through a pooler a session may well hear what it sent itself, and nothing else.
 *
 * pg-listen reconnects by itself and pings the connection, but gives up after three seconds by default, can lose an event
 * while it is re-listening, and goes on reconnecting after it was closed. So its patience is set to infinite, its errors
 * end it and a new one is made, and its pauses throw once it is closed.
 */

import type pg from 'pg'
import createSubscriber from 'pg-listen'
import { reconnectDelayMs } from '../runtime/backoff.ts'
import { Sockets } from './sockets.ts'

export type ListenerState = 'connecting' | 'listening' | 'poll-only' | 'closed'

export interface ListenerEvents {
  /** Sends a notification on the channel from another connection. */
  notify(payload: string): Promise<void>
  onNotification(payload: string): void
  /** The connection is there (again): whatever was sent meanwhile is lost, so look for yourself. */
  onConnected(): void
}

type Subscriber = ReturnType<typeof createSubscriber.default>

const PING_MS = 15_000
const QUERY_TIMEOUT_MS = 10_000
const PROBE_MS = 2_000
const CLOSE_MS = 300
const RETRY_MS = 30_000

// pg-listen is CommonJS whose default export is the function.
const create = ((createSubscriber as unknown as { default?: unknown }).default ?? createSubscriber) as typeof createSubscriber.default

export class Listener {
  readonly #config: pg.ClientConfig
  readonly #channel: string
  readonly #events: ListenerEvents
  readonly #end = Promise.withResolvers<void>()
  readonly #decided = Promise.withResolvers<void>()
  #state: ListenerState = 'connecting'
  #direct = false
  #running: Promise<void> | undefined
  /** Of a connection that is being made: a close does not wait for one that nobody answers. */
  #connecting: Sockets | undefined

  constructor(config: pg.ClientConfig, channel: string, events: ListenerEvents) {
    this.#config = config
    this.#channel = channel
    this.#events = events
  }

  get state(): ListenerState {
    return this.#state
  }

  /** Whether a session of the configuration is ours alone: it has heard what another one sent. */
  get direct(): boolean {
    return this.#direct
  }

  /** Resolves once it listens, or is known not to, or `ms` are over. */
  async start(ms: number): Promise<void> {
    this.#running ??= this.#run()
    let timer: NodeJS.Timeout | undefined
    const late = new Promise<void>((resolve) => {
      timer = setTimeout(resolve, ms)
    })
    await Promise.race([this.#decided.promise, late])
    clearTimeout(timer)
  }

  async close(): Promise<void> {
    this.#state = 'closed'
    this.#end.resolve()
    this.#connecting?.cut()
    await this.#running
  }

  async #run(): Promise<void> {
    let failures = 0
    while (!this.#closed()) {
      const listened = await this.#listen()
      if (this.#closed()) return
      if (this.#state === 'poll-only') {
        await this.#pause(RETRY_MS)
        continue
      }
      failures = listened ? 1 : failures + 1
      this.#state = 'connecting'
      await this.#pause(reconnectDelayMs(failures))
    }
  }

  #closed(): boolean {
    return this.#state === 'closed'
  }

  /** One subscriber's life. @returns whether it came to listen */
  async #listen(): Promise<boolean> {
    let over = false
    const broken = Promise.withResolvers<void>()
    const probed = Promise.withResolvers<boolean>()
    const probe = `probe:${crypto.randomUUID()}`
    const sockets = new Sockets()
    const subscriber = this.#subscriber(sockets, () => over)
    if (!subscriber) return false
    subscriber.events.on('error', () => broken.resolve())
    subscriber.events.on('notification', ({ payload }) => {
      if (payload === probe) probed.resolve(true)
      else if (typeof payload === 'string' && !over) this.#events.onNotification(payload)
    })
    subscriber.events.on('connected', () => {
      // A reconnect that was under way when this one was given up.
      if (over) void closeQuietly(subscriber)
      else if (this.#state === 'listening') this.#events.onConnected()
    })
    this.#connecting = sockets
    try {
      await subscriber.connect()
      await subscriber.listenTo(this.#channel)
      this.#connecting = undefined
      await this.#events.notify(probe)
      const timer = setTimeout(() => probed.resolve(false), PROBE_MS)
      const heard = await Promise.race([probed.promise, broken.promise.then(() => undefined), this.#end.promise.then(() => undefined)])
      clearTimeout(timer)
      if (heard === undefined) return false
      this.#direct = heard
      if (!this.#closed()) this.#state = heard ? 'listening' : 'poll-only'
      this.#decided.resolve()
      if (!heard) return false
      this.#events.onConnected()
      await Promise.race([broken.promise, this.#end.promise])
      return true
    } catch {
      return false
    } finally {
      over = true
      this.#connecting = undefined
      await closeQuietly(subscriber)
      sockets.cut()
    }
  }

  /** @returns nothing where the configuration cannot be read */
  #subscriber(sockets: Sockets, isOver: () => boolean): Subscriber | undefined {
    const text = (value: unknown) => String(value)
    try {
      return create(
        {
          application_name: 'klieo-bus listen',
          connectionTimeoutMillis: QUERY_TIMEOUT_MS,
          ...this.#config,
          query_timeout: QUERY_TIMEOUT_MS,
          stream: sockets.stream,
        },
        {
          parse: text,
          serialize: text,
          paranoidChecking: PING_MS,
          retryLimit: Number.POSITIVE_INFINITY,
          retryTimeout: Number.POSITIVE_INFINITY,
          retryInterval: (attempt: number) => {
            if (isOver()) throw new Error('closed')
            return reconnectDelayMs(attempt + 1)
          },
        } as Parameters<typeof create>[1],
      )
    } catch {
      return undefined
    }
  }

  async #pause(ms: number): Promise<void> {
    let timer: NodeJS.Timeout | undefined
    await Promise.race([
      this.#end.promise,
      new Promise<void>((resolve) => {
        timer = setTimeout(resolve, ms)
      }),
    ])
    clearTimeout(timer)
  }
}

/** A connection that is half open never answers the goodbye. */
async function closeQuietly(subscriber: Subscriber): Promise<void> {
  let timer: NodeJS.Timeout | undefined
  try {
    await Promise.race([
      subscriber.close(),
      new Promise<void>((resolve) => {
        timer = setTimeout(resolve, CLOSE_MS)
      }),
    ])
  } catch {
    // It was gone already.
  } finally {
    clearTimeout(timer)
  }
}
