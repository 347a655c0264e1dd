import { jetstream, jetstreamManager, RetentionPolicy, StorageType, type StreamConfig } from '@nats-io/jetstream'
import { connect, credsAuthenticator, type NatsConnection, type NodeConnectionOptions } from '@nats-io/transport-node'
import {
  type Bus,
  BusError,
  type Capabilities,
  checkDuration,
  checkInteger,
  closedError,
  DEFAULT_MAX_PAYLOAD_BYTES,
  DUPLICATE_WINDOW_MS,
  invalid,
  isBusError,
  LARGEST_MAX_PAYLOAD_BYTES,
  MAX_HEADER_BYTES,
  optionsOf,
} from '../core/index.ts'
import { Bell } from '../runtime/bell.ts'
import { systemClock } from '../runtime/clock.ts'
import { NatsAdmin } from './admin.ts'
import { ANSWER_WITHIN_MS, type Context, Names } from './context.ts'
import { Durables } from './durables.ts'
import { Entries } from './entries.ts'
import { isNotThere, mapped, patiently } from './errors.ts'
import { JobRecords } from './job-records.ts'
import { NatsJobs } from './jobs.ts'
import { NatsKv } from './kv.ts'
import { Leases } from './leases.ts'
import { NatsPubsub } from './pubsub.ts'
import { NatsRequestReply } from './request-reply.ts'
import { ServerClock } from './server-clock.ts'

export interface NatsBusOptions {
  /** `host:port`, one or several of a cluster. @default 127.0.0.1:4222 */
  readonly servers?: string | readonly string[]
  readonly user?: string
  readonly pass?: string
  readonly token?: string
  readonly authenticator?: NodeConnectionOptions['authenticator']
  /** The contents of a `.creds` file. */
  readonly credentials?: string
  readonly tls?: NodeConnectionOptions['tls']
  /** What its streams, buckets and subjects begin with: 1 to 32 characters of A-Z a-z 0-9 _ -. @default 'klieo' */
  readonly prefix?: string
  /** Of the streams it makes: 1, 3 or 5 servers of a cluster. @default 1 */
  readonly replicas?: number
  /**
   * The largest payload; 1 byte to 8 MiB, and below the server's `max_payload`. `'server'`: what that allows, and at most 8 MiB.
   * @default 1 MiB, or what the server takes if that is less
   */
  readonly maxPayloadBytes?: number | 'server'
  readonly retention?: {
    /** The age at which messages are removed, whether or not a durable has been past them (P13). Only for a stream that does not exist yet. @default 7 days */
    readonly messagesMs?: number
  }
  /**
   * A job whose process died comes back at the end of its lease, but no sooner than this after the process was last heard of. Only for queues that
   * nobody has claimed from yet. @default 30_000
   */
  readonly jobAckWaitMs?: number
}

const WEEK_MS = 7 * 24 * 60 * 60 * 1_000
const QUICK_MS = 1_000
/** A connection on which two of these were not answered is given up. */
const PING_MS = 10_000
/** How long a closing bus waits for answers. */
const CLOSE_GRACE_MS = 300
/** Revisions of a key that the server keeps: so far a watch may fall behind (K6). The most that NATS allows. */
const KV_HISTORY = 64

const SUPPORTS: Capabilities = Object.freeze({
  backend: 'nats',
  transactions: false,
  persistent: true,
  shared: true,
  watch: true,
  fencing: 'local',
  jobFencing: 'strict',
  readYourWrites: false,
  priorities: false,
  redeliveryCounts: false,
})

/**
 * The bus on NATS JetStream (server 2.9 or later, started with `-js`). What it does otherwise than Postgres stands in docs/backends.md, and as
 * data in `supports`.
 */
export class NatsBus implements Bus<never> {
  readonly pubsub: NatsPubsub
  readonly requestReply: NatsRequestReply
  readonly kv: NatsKv
  readonly jobs: NatsJobs
  readonly admin: NatsAdmin
  readonly supports: Capabilities = SUPPORTS
  readonly #nc: NatsConnection
  readonly #context: Context
  /** What the server has not answered yet, and how to end it. One promise for all of them would remember every answer as long as the bus lives. */
  readonly #asked = new Map<Promise<unknown>, (error: BusError) => void>()
  readonly #reconnected = new Set<() => void>()
  #closing: Promise<void> | undefined
  /** Nothing is asked any more, also not by a call that is under way. */
  #over = false

  /** Connects, and makes the streams and buckets that are not there. @throws invalid_argument, connection, permission_denied, unavailable, conflict */
  static async connect(options: NatsBusOptions = {}): Promise<NatsBus> {
    const given = optionsOf(options, [
      'servers',
      'user',
      'pass',
      'token',
      'authenticator',
      'credentials',
      'tls',
      'prefix',
      'replicas',
      'maxPayloadBytes',
      'retention',
      'jobAckWaitMs',
    ])
    const { prefix = 'klieo', replicas = 1, maxPayloadBytes, jobAckWaitMs = 30_000, servers } = given
    if (typeof prefix !== 'string' || !/^[A-Za-z0-9_-]{1,32}$/.test(prefix))
      throw invalid('prefix', prefix, 'must be 1 to 32 characters of A-Z a-z 0-9 _ -')
    checkInteger('replicas', replicas, 1, 5)
    if (maxPayloadBytes !== undefined && maxPayloadBytes !== 'server')
      checkInteger('maxPayloadBytes', maxPayloadBytes, 1, LARGEST_MAX_PAYLOAD_BYTES)
    checkDuration('jobAckWaitMs', jobAckWaitMs, 100)
    const { messagesMs = WEEK_MS } = optionsOf(given.retention, ['messagesMs'], 'retention')
    checkDuration('retention.messagesMs', messagesMs, DUPLICATE_WINDOW_MS)
    const nc = await mapped(() =>
      connect({
        name: 'klieo-bus',
        maxReconnectAttempts: -1,
        reconnectTimeWait: 250,
        // One that stands still takes connections and says nothing: there may be others.
        timeout: ANSWER_WITHIN_MS,
        pingInterval: PING_MS,
        maxPingOut: 2,
        // Two errors with their stacks for each request, in case that one fails, took a third of the time of a publish.
        noAsyncTraces: true,
        // A server that refuses the user once it is back, or for a while, is asked again, too.
        ignoreAuthErrorAbort: true,
        ...(servers === undefined ? {} : { servers: typeof servers === 'string' ? servers : [...servers] }),
        ...(given.user === undefined ? {} : { user: given.user }),
        ...(given.pass === undefined ? {} : { pass: given.pass }),
        ...(given.token === undefined ? {} : { token: given.token }),
        ...(given.authenticator === undefined ? {} : { authenticator: given.authenticator }),
        ...(given.credentials === undefined ? {} : { authenticator: authenticatorOf(given.credentials) }),
        ...(given.tls === undefined ? {} : { tls: given.tls }),
      }),
    )
    try {
      return await NatsBus.#open(nc, prefix, { replicas, messagesMs, jobAckWaitMs, maxPayloadBytes })
    } catch (error) {
      await nc.close()
      throw error
    }
  }

  static async #open(
    nc: NatsConnection,
    prefix: string,
    options: {
      readonly replicas: number
      readonly messagesMs: number
      readonly jobAckWaitMs: number
      readonly maxPayloadBytes: number | 'server' | undefined
    },
  ): Promise<NatsBus> {
    const { replicas, messagesMs, jobAckWaitMs } = options
    // Headers and what the bus adds to them go along.
    const room = (nc.info?.max_payload ?? DEFAULT_MAX_PAYLOAD_BYTES) - 2 * MAX_HEADER_BYTES
    if (room < 1) {
      throw new BusError(
        'unsupported',
        `this server takes messages of ${nc.info?.max_payload} bytes, and headers alone may have ${2 * MAX_HEADER_BYTES}; raise max_payload in its configuration`,
      )
    }
    const most = options.maxPayloadBytes === 'server' ? LARGEST_MAX_PAYLOAD_BYTES : DEFAULT_MAX_PAYLOAD_BYTES
    const maxPayloadBytes = typeof options.maxPayloadBytes === 'number' ? options.maxPayloadBytes : Math.min(most, room)
    if (maxPayloadBytes > room) {
      throw new BusError(
        'unsupported',
        `maxPayloadBytes is ${maxPayloadBytes}, but this server takes ${room} bytes besides headers; raise max_payload in its configuration`,
      )
    }
    const js = jetstream(nc)
    const jsm = await mapped(() => jetstreamManager(nc))
    const quick = await jetstreamManager(nc, { checkAPI: false, timeout: QUICK_MS })
    const names = new Names(prefix)
    await ensureStream(jsm, {
      name: names.messages,
      description: 'messages of klieo-bus',
      subjects: [names.message('>')],
      max_age: messagesMs * 1e6,
      duplicate_window: DUPLICATE_WINDOW_MS * 1e6,
      storage: StorageType.File,
      num_replicas: replicas,
    })
    await ensureStream(jsm, {
      name: names.work,
      description: 'what is to be done by klieo-bus workers',
      subjects: [names.ticket('>')],
      retention: RetentionPolicy.Workqueue,
      duplicate_window: DUPLICATE_WINDOW_MS * 1e6,
      storage: StorageType.File,
      num_replicas: replicas,
    })
    const isReplicated = await Entries.make({ js }, names.kv, KV_HISTORY, replicas)
    for (const bucket of [names.leases, names.durables, names.jobs]) await Entries.make({ js }, bucket, 1, replicas)
    return new NatsBus(nc, { js, jsm, quick, names, maxPayloadBytes, jobAckWaitMs, isReplicated }).#start()
  }

  private constructor(
    nc: NatsConnection,
    parts: Pick<Context, 'js' | 'jsm' | 'quick' | 'names' | 'maxPayloadBytes' | 'jobAckWaitMs' | 'isReplicated'>,
  ) {
    this.#nc = nc
    void (async () => {
      for await (const status of nc.status()) if (status.type === 'reconnect') this.#forgetPulls()
    })().catch(() => {})
    const clock = systemClock
    const context: Context = {
      ...parts,
      nc,
      clock,
      bell: new Bell(clock),
      serverClock: new ServerClock(clock, async () => {
        const subject = `$KV.${parts.names.leases}.=clock`
        const stream = `KV_${parts.names.leases}`
        const after = clock.now()
        const { seq } = await parts.js.publish(subject, '')
        const before = clock.now()
        const stored = await parts.jsm.streams.getMessage(stream, { seq })
        if (stored) return { after, storedAt: stored.time.getTime(), before }
        // Another bus has written the next one since.
        const next = await parts.jsm.streams.getMessage(stream, { last_by_subj: subject })
        if (!next)
          throw new BusError('unavailable', `the time of NATS is not known: stream "${stream}" was purged at that moment; try again`)
        return { after, storedAt: next.time.getTime(), before: clock.now() }
      }),
      isClosed: () => this.#closing !== undefined,
      checkOpen: () => {
        if (this.#closing) throw closedError('the bus')
      },
      ask: async (run) => {
        // A connection that is being closed takes a question and never answers it.
        if (this.#over) throw closedError('the bus')
        const { promise: ended, reject } = Promise.withResolvers<never>()
        const asked = mapped(run)
        this.#asked.set(asked, reject)
        try {
          return await Promise.race([asked, ended])
        } catch (error) {
          if (this.#closing && isBusError(error, 'connection')) throw closedError('the bus')
          throw error
        } finally {
          this.#asked.delete(asked)
        }
      },
      onReconnect: (callback, signal) => {
        if (this.#over) return callback()
        this.#reconnected.add(callback)
        signal.addEventListener('abort', () => this.#reconnected.delete(callback), { once: true })
      },
    }
    this.#context = context
    const durables = new Durables(context, new Entries(context, parts.names.durables))
    const entries = new Entries(context, parts.names.kv)
    const records = new JobRecords(context, new Entries(context, parts.names.jobs), entries)
    this.pubsub = new NatsPubsub(context, durables)
    this.requestReply = new NatsRequestReply(context)
    this.kv = new NatsKv(context, entries, new Leases(context, new Entries(context, parts.names.leases)))
    this.jobs = new NatsJobs(context, records)
    this.admin = new NatsAdmin(context, durables, entries, records)
  }

  async #start(): Promise<NatsBus> {
    await mapped(() => this.#context.serverClock.sample())
    return this
  }

  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  async #close(): Promise<void> {
    // From here on the bus is closed for everybody, also for those who are woken now.
    await Promise.resolve()
    this.#context.bell.ringAll()
    await Promise.allSettled([this.pubsub.close(), this.requestReply.close(), this.kv.close(), this.jobs.close()])
    // What was asked before is answered, if the server is there.
    const grace = Promise.withResolvers<void>()
    const cancel = systemClock.setTimer(grace.resolve, CLOSE_GRACE_MS)
    await Promise.race([Promise.allSettled(this.#asked.keys()), grace.promise])
    cancel()
    this.#over = true
    for (const end of this.#asked.values()) end(closedError('the bus'))
    this.#forgetPulls()
    await this.#nc.close()
  }

  #forgetPulls(): void {
    for (const callback of [...this.#reconnected]) callback()
  }
}

function authenticatorOf(credentials: unknown) {
  // Never the value: it is secret.
  const wrong = () => invalid('credentials', typeof credentials, 'must be the text of a .creds file')
  if (typeof credentials !== 'string') throw wrong()
  try {
    const authenticator = credsAuthenticator(new TextEncoder().encode(credentials))
    // It reads them when it is first asked.
    authenticator('nonce')
    return authenticator
  } catch {
    throw wrong()
  }
}

/** Makes it, or checks that it is the bus's. */
async function ensureStream(jsm: Context['jsm'], config: Partial<StreamConfig> & Pick<StreamConfig, 'name'>): Promise<void> {
  const found = await patiently(async () => {
    try {
      return await jsm.streams.info(config.name)
    } catch (error) {
      if (!isNotThere(error)) throw error
      return jsm.streams.add(config)
    }
  })
  const { subjects, retention } = found.config
  if (subjects?.join() !== config.subjects?.join() || (config.retention !== undefined && retention !== config.retention)) {
    throw new BusError(
      'conflict',
      `stream "${config.name}" exists and is not the bus's: its subjects are ${subjects?.join(', ')}; choose another prefix`,
    )
  }
}
