import {
  type Bus,
  type Capabilities,
  checkDuration,
  checkInteger,
  checkQueue,
  closedError,
  DEFAULT_MAX_PAYLOAD_BYTES,
  invalid,
  type JobId,
  LARGEST_MAX_PAYLOAD_BYTES,
  optionsOf,
  reading,
} from '../core/index.ts'
import type { Clock } from '../runtime/clock.ts'
import { MemoryAdmin } from './admin.ts'
import type { Context } from './context.ts'
import type { DeadJob } from './job-table.ts'
import { MemoryJobs } from './jobs.ts'
import { MemoryKv } from './kv.ts'
import { MemoryPubsub } from './pubsub.ts'
import { MemoryRequestReply } from './request-reply.ts'
import { MemoryStore } from './store.ts'

export interface MemoryBusOptions {
  /** Share it with other buses, as processes share a database. @default a store of its own */
  readonly store?: MemoryStore
  /** What the store goes by: see {@link MemoryStore}. @default the system's */
  readonly clock?: Clock
  /** The largest payload; 1 byte to 8 MiB. @default 1 MiB */
  readonly maxPayloadBytes?: number
  readonly retention?: {
    /** The age at which messages that every durable is past are removed. @default 7 days */
    readonly messagesMs?: number
    /** How long dead jobs are kept. @default 14 days */
    readonly deadJobsMs?: number
  }
}

const WEEK_MS = 7 * 24 * 60 * 60 * 1_000

const SUPPORTS: Capabilities = Object.freeze({
  backend: 'memory',
  transactions: false,
  persistent: false,
  shared: false,
  watch: true,
  fencing: 'strict',
  jobFencing: 'strict',
  readYourWrites: true,
  priorities: true,
  redeliveryCounts: true,
})

/**
 * The bus in one process, with nothing stored: for unit tests, and for whoever needs no more. It keeps every rule of the
 * contract; what needs transactions is refused with `unsupported`.
 */
export class MemoryBus implements Bus<never> {
  readonly pubsub: MemoryPubsub
  readonly requestReply: MemoryRequestReply
  readonly kv: MemoryKv
  readonly jobs: MemoryJobs
  readonly admin: MemoryAdmin
  readonly supports: Capabilities = SUPPORTS
  readonly #context: Context
  #closing: Promise<void> | undefined

  /** @throws invalid_argument */
  static create(options: MemoryBusOptions = {}): MemoryBus {
    const given = optionsOf(options, ['store', 'clock', 'maxPayloadBytes', 'retention'])
    const { store = new MemoryStore(), clock, maxPayloadBytes = DEFAULT_MAX_PAYLOAD_BYTES, retention } = given
    if (!reading('store', store, () => store instanceof MemoryStore)) throw invalid('store', store, 'must be a MemoryStore')
    checkInteger('maxPayloadBytes', maxPayloadBytes, 1, LARGEST_MAX_PAYLOAD_BYTES)
    const { messagesMs = WEEK_MS, deadJobsMs = 2 * WEEK_MS } = optionsOf(retention, ['messagesMs', 'deadJobsMs'], 'retention')
    checkDuration('retention.messagesMs', messagesMs)
    checkDuration('retention.deadJobsMs', deadJobsMs)
    store.attach(clock)
    return new MemoryBus(store, maxPayloadBytes, messagesMs, deadJobsMs)
  }

  private constructor(store: MemoryStore, maxPayloadBytes: number, messagesMs: number, deadJobsMs: number) {
    this.#context = {
      store,
      maxPayloadBytes,
      messagesMs,
      deadJobsMs,
      isClosed: () => this.#closing !== undefined,
      checkOpen: () => {
        if (this.#closing) throw closedError('the bus')
      },
    }
    this.pubsub = new MemoryPubsub(this.#context)
    this.requestReply = new MemoryRequestReply(this.#context)
    this.kv = new MemoryKv(this.#context)
    this.jobs = new MemoryJobs(this.#context)
    this.admin = new MemoryAdmin(this.#context)
  }

  /** The dead jobs of a queue, the longest dead first (J4). */
  async deadJobs(queue: string): Promise<DeadJob[]> {
    this.#context.checkOpen()
    checkQueue(queue)
    const { store, deadJobsMs } = this.#context
    await store.turn()
    store.jobs.pruneDead(deadJobsMs)
    return store.jobs.dead(queue)
  }

  /** Puts dead jobs back with all their attempts, the queue's or one; answers how many. */
  async retryDead(queue: string, id?: JobId): Promise<number> {
    this.#context.checkOpen()
    checkQueue(queue)
    if (id !== undefined && typeof id !== 'string') throw invalid('id', id, 'must be the id of a job')
    const { store, deadJobsMs } = this.#context
    await store.turn()
    store.jobs.pruneDead(deadJobsMs)
    return store.jobs.retryDead(queue, id)
  }

  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  async #close(): Promise<void> {
    const { store } = this.#context
    // From here on the bus is closed for everybody, also for those who are woken now.
    await Promise.resolve()
    store.bell.ringAll()
    await Promise.all([this.pubsub.close(), this.requestReply.close(), this.kv.close(), this.jobs.close()])
    store.detach()
  }
}
