/**
 * The consume loop: written once for every backend.
 *
 * A delivery is, in turn,
 *   buffered   fetched and not yet yielded: it counts as handed out, on the server too
 *   yielded    with its holder, until it is settled or its ack wait is over
 * and leaves the buffer without being yielded in two ways: it is *handed back* (the stream closes, or nobody asked for it
 * in half its ack wait; the attempt is not counted), or *dropped* (its ack wait ran out before anybody asked: the server
 * may have given it to another member).
 *
 * Nothing is fetched before somebody asks. How much is fetched at once follows the consumer: it doubles while a batch is
 * used up within an eighth of the ack wait, and halves when some of it had to be handed back. Where there is a backlog and
 * a batch is half used up within {@link QUICK_MS} (and an eighth of the ack wait), the next one is fetched while the
 * consumer works; otherwise only when he has to wait for it.
 */

import {
  BusError,
  checkDuration,
  checkText,
  closedError,
  type Headers,
  isBusError,
  type Msg,
  type MsgStream,
  optionsOf,
  type TxOption,
} from '../core/index.ts'
import { AGAIN_AFTER_MS, jittered, reconnectDelayMs } from './backoff.ts'
import type { Ear } from './bell.ts'
import type { Clock } from './clock.ts'
import { type Extension, Settlement, type Whereabouts } from './settlement.ts'

/** One handed-out message as a backend fetched it. */
export interface Delivery {
  readonly subject: string
  readonly payload: Uint8Array
  readonly headers: Headers
  readonly seq: number
  readonly attempt: number
  readonly publishedAt: Date
}

export interface Fetched<D> {
  readonly deliveries: readonly D[]
  /** There may be more at once: do not wait. */
  readonly more: boolean
  /** When the next redelivery of this durable is due; `null`: none is waiting. */
  readonly dueInMs: number | null
  /** It may have been handed more, which did not arrive. */
  readonly interrupted?: BusError
  /** Local time before which none of it was handed out, where the fetch may have waited. @default when it was sent */
  readonly handedOutAt?: number
}

/** The seam: a backend only moves messages. Settlements answer whether the delivery was still the holder's. */
export interface DeliveryBackend<D, Tx> {
  fetch(limit: number): Promise<Fetched<D>>
  /** @param noWait answer false at once where an open transaction holds the row */
  ack(delivery: D, tx: Tx | undefined, noWait: boolean): Promise<boolean>
  nak(delivery: D, delayMs: number, noWait: boolean): Promise<boolean>
  term(delivery: D, reason: string | undefined, noWait: boolean): Promise<boolean>
  extend(delivery: D, noWait: boolean): Promise<Extension>
  /** Hands back without counting the attempt. */
  release(deliveries: readonly D[]): Promise<void>
  /** Where answers can be lost or messages acked in a transaction. */
  whereabouts?(delivery: D): Promise<Whereabouts>
}

export interface StreamOptions<D extends Delivery, Tx> {
  readonly clock: Clock
  readonly backend: DeliveryBackend<D, Tx>
  readonly ear: Ear
  readonly ackWaitMs: number
  readonly maxInFlight: number
  readonly pollIntervalMs: number
  /** Fetch no more than was asked for, where a message that is handed back counts as an attempt all the same. @default false */
  readonly onDemand?: boolean
  readonly signal: AbortSignal | undefined
  readonly onInterrupted?: ((error: BusError) => void) | undefined
  /** Checks a caller's transaction; throws `unsupported` where there are none. */
  checkTx(tx: Tx | undefined): void
  isClosed(): boolean
  /** The stream is closed and needs no closing by the bus. */
  onClose(stream: DurableStream<D, Tx>): void
}

interface Waiter<Tx> {
  resolve(result: IteratorResult<Msg<Tx>, undefined>): void
  reject(error: unknown): void
}

const FIRST_BATCH = 16
/** A consumer that takes longer for half a batch gains nothing from one that is there before he asks. */
const QUICK_MS = 500
const DONE: IteratorReturnResult<undefined> = Object.freeze({ done: true, value: undefined })
/** Errors after which the stream goes on: the server is away, or short of something. */
const PASSING = new Set(['connection', 'unavailable', 'timeout', 'conflict'])

export class DurableStream<D extends Delivery, Tx> implements MsgStream<Tx> {
  readonly #options: StreamOptions<D, Tx>
  readonly #buffer: Held<D, Tx>[] = []
  readonly #yielded = new Set<Held<D, Tx>>()
  readonly #waiters: Waiter<Tx>[] = []
  readonly #onAbort = () => void this.close()
  #batch: number
  #batchStartedAt = 0
  #pumping: Promise<void> | undefined
  #closing: Promise<void> | undefined
  #failure: { error: unknown } | undefined
  /** A message was just given back without a delay: it is fetched before a new one is yielded (P5). */
  #redelivering = false
  /** Counts the times that it was set: a fetch that was sent before does not bring the message. */
  #redeliveries = 0
  /** The last fetch brought as much as it asked for. */
  #backlog = false
  #cancelStale: (() => void) | undefined

  constructor(options: StreamOptions<D, Tx>) {
    this.#options = options
    this.#batch = Math.min(FIRST_BATCH, options.maxInFlight)
    if (options.signal?.aborted) void this.close()
    else options.signal?.addEventListener('abort', this.#onAbort, { once: true })
  }

  [Symbol.asyncIterator](): AsyncIterator<Msg<Tx>, undefined> {
    return { next: () => this.#next() }
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  /** Messages it yielded are still with their holders. */
  get holds(): boolean {
    return this.#yielded.size > 0
  }

  /** Ends the iterations and hands back what was not yielded (P10). Idempotent. */
  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  /** The bus closes: what was yielded goes back as well. */
  async handBack(): Promise<void> {
    await this.close()
    const yielded = [...this.#yielded].filter((held) => held.abandon())
    this.#yielded.clear()
    let left = yielded
    // Passed over while an extension of its own has it locked.
    for (const pauseMs of [0, ...AGAIN_AFTER_MS]) {
      if (left.length === 0) return
      if (pauseMs > 0) await new Promise((resolve) => setTimeout(resolve, pauseMs))
      const done = await Promise.allSettled(left.map((held) => this.#options.backend.nak(held.delivery, 0, true)))
      left = left.filter((_, n) => done[n]?.status === 'fulfilled' && done[n].value === false)
    }
  }

  async #close(): Promise<void> {
    this.#options.signal?.removeEventListener('abort', this.#onAbort)
    for (const waiter of this.#waiters.splice(0)) waiter.resolve(DONE)
    this.#cancelStale?.()
    this.#options.ear.close()
    await this.#pumping
    await this.#release(this.#buffer.splice(0))
    this.#options.onClose(this)
    this.#watchYielded()
  }

  /** What nobody settles must not be remembered for ever. */
  #watchYielded(): void {
    if (!this.holds || this.#options.isClosed()) return
    const { clock } = this.#options
    const last = Math.max(...[...this.#yielded].map((held) => held.deadline))
    clock.setTimer(
      () => {
        for (const held of this.#yielded) if (clock.now() >= held.deadline) this.#yielded.delete(held)
        if (this.holds) this.#watchYielded()
        else this.#options.onClose(this)
      },
      last - clock.now() + 1,
      true,
    )
  }

  #next(): Promise<IteratorResult<Msg<Tx>, undefined>> {
    if (this.#closing) return Promise.resolve(DONE)
    if (this.#failure) {
      const { error } = this.#failure
      void this.close()
      return Promise.reject(error)
    }
    const held = this.#waiters.length === 0 ? this.#takeBuffered() : undefined
    if (held) {
      const value = this.#yield(held)
      if (this.#mayFetchAhead()) this.#pump()
      return Promise.resolve({ done: false, value })
    }
    const next = new Promise<IteratorResult<Msg<Tx>, undefined>>((resolve, reject) => this.#waiters.push({ resolve, reject }))
    this.#pump()
    return next
  }

  /** Gives buffered messages to those who asked. */
  #serve(): void {
    while (this.#waiters.length > 0) {
      const held = this.#takeBuffered()
      if (!held) return
      this.#waiters.shift()?.resolve({ done: false, value: this.#yield(held) })
    }
  }

  #takeBuffered(): Held<D, Tx> | undefined {
    for (;;) {
      const held = this.#buffer[0]
      if (!held || (this.#redelivering && held.delivery.attempt === 1)) return undefined
      this.#buffer.shift()
      if (this.#options.clock.now() < held.deadline) return held
      // Ran out before it was yielded: it comes again when its time is over on the server, too.
      this.#tell(new BusError('timeout', `${held.describe()} was fetched so late that its ack wait was over`, { retryable: true }))
    }
  }

  #yield(held: Held<D, Tx>): Msg<Tx> {
    this.#yielded.add(held)
    return new YieldedMsg(held)
  }

  /** @param again to be handed out again at once */
  readonly #settled = (held: Held<D, Tx>, again: boolean): void => {
    if (!this.#yielded.delete(held)) return
    if (again && (this.#buffer.length > 0 || this.#pumping)) {
      this.#redelivering = true
      this.#redeliveries++
    }
    this.#options.ear.ring()
    if (this.#closing && !this.holds) this.#options.onClose(this)
  }

  /** Whether the buffer runs low and the consumer is quick enough to want more before he has to wait. */
  #mayFetchAhead(): boolean {
    if (this.#options.onDemand || this.#pumping || !this.#backlog || this.#redelivering || this.#buffer.length > this.#batch / 2)
      return false
    const { clock, ackWaitMs } = this.#options
    return clock.now() - this.#batchStartedAt < Math.min(QUICK_MS, ackWaitMs / 8)
  }

  #pump(): void {
    if (this.#pumping || this.#closing) return
    this.#pumping = this.#run().finally(() => {
      this.#pumping = undefined
      // Somebody may have asked in the very moment the loop decided to rest.
      if (this.#waiters.length > 0) this.#pump()
    })
  }

  /** How many to fetch now; 0: rest. */
  #wanted(): number {
    if (this.#closing || this.#failure) return 0
    if (this.#waiters.length === 0 && this.#buffer.length > this.#batch / 2) return 0
    const { clock, maxInFlight, onDemand } = this.#options
    const most = onDemand ? this.#waiters.length : this.#batch
    const limit = this.#redelivering ? 1 : most
    if (this.#buffer.length + this.#yielded.size + limit > maxInFlight) {
      const now = clock.now()
      for (const held of this.#yielded) if (now >= held.deadline) this.#yielded.delete(held)
    }
    return Math.max(0, Math.min(maxInFlight - this.#buffer.length - this.#yielded.size, limit))
  }

  /** Runs while somebody asks; ahead of that, fetches once. */
  async #run(): Promise<void> {
    const { backend, ear, clock, pollIntervalMs } = this.#options
    let failures = 0
    do {
      const limit = this.#wanted()
      if (limit === 0) {
        if (this.#waiters.length === 0) return
        this.#redelivering = false
        this.#serve()
        if (this.#waiters.length === 0) continue
        await ear.wait(this.#untilRoom())
        continue
      }
      const sentAt = clock.now()
      const redeliveries = this.#redeliveries
      try {
        const fetched = await backend.fetch(limit)
        failures = 0
        if (redeliveries === this.#redeliveries) this.#redelivering = false
        this.#backlog = fetched.deliveries.length === limit
        if (fetched.interrupted) this.#tell(fetched.interrupted)
        this.#take(fetched.deliveries, fetched.handedOutAt ?? sentAt)
        if (fetched.deliveries.length > 0 || fetched.more || this.#redelivering || this.#waiters.length === 0) continue
        await ear.wait(Math.max(1, Math.min(jittered(pollIntervalMs), fetched.dueInMs ?? pollIntervalMs)))
      } catch (error) {
        if (this.#options.isClosed() || isBusError(error, 'closed')) return void this.close()
        const passes = error instanceof BusError && PASSING.has(error.code)
        if (passes) this.#tell(error)
        // Whoever asks next meets it, if it lasts.
        if (this.#waiters.length === 0) {
          this.#backlog = false
          return
        }
        if (!passes) return this.#fail(error)
        this.#redelivering = false
        this.#serve()
        await ear.wait(reconnectDelayMs(++failures))
      }
    } while (!this.#closing && this.#waiters.length > 0)
  }

  /** What the callback throws is thrown where nobody catches it, and does not end the loop. */
  #tell(error: BusError): void {
    try {
      this.#options.onInterrupted?.(error)
    } catch (thrown) {
      queueMicrotask(() => {
        throw thrown
      })
    }
  }

  /** How long until a yielded message that nobody settles stops counting. */
  #untilRoom(): number {
    const now = this.#options.clock.now()
    let least = this.#options.pollIntervalMs
    for (const held of this.#yielded) least = Math.min(least, held.deadline - now)
    return Math.max(1, least)
  }

  #take(deliveries: readonly D[], sentAt: number): void {
    const { clock, ackWaitMs, maxInFlight } = this.#options
    const now = clock.now()
    if (deliveries.length > 0) {
      if (this.#batchStartedAt > 0 && this.#buffer.length <= this.#batch / 2 && now - this.#batchStartedAt < ackWaitMs / 8) {
        this.#batch = Math.min(maxInFlight, this.#batch * 2)
      }
      this.#batchStartedAt = now
    }
    for (const delivery of deliveries) {
      const held = new Held(delivery, sentAt, this.#options, this.#settled)
      // Redeliveries come before what is new.
      const before = delivery.attempt === 1 ? -1 : this.#buffer.findIndex((other) => other.delivery.attempt === 1)
      if (before < 0) this.#buffer.push(held)
      else this.#buffer.splice(before, 0, held)
    }
    this.#serve()
    this.#watchStale()
  }

  /** What nobody asks for within half its ack wait goes back to the other members. */
  #watchStale(): void {
    if (this.#cancelStale || this.#closing || this.#buffer.length === 0) return
    const { clock, ackWaitMs } = this.#options
    let due = Number.POSITIVE_INFINITY
    for (const { fetchedAt } of this.#buffer) due = Math.min(due, fetchedAt + ackWaitMs / 2)
    this.#cancelStale = clock.setTimer(
      () => {
        this.#cancelStale = undefined
        const now = clock.now()
        const all = this.#buffer.splice(0)
        const stale = all.filter((held) => held.fetchedAt + ackWaitMs / 2 <= now)
        this.#buffer.push(...all.filter((held) => held.fetchedAt + ackWaitMs / 2 > now))
        if (stale.length > 0) {
          this.#tell(new BusError('timeout', `${stale.length} messages that nobody asked for in time went back`, { retryable: true }))
          this.#batch = Math.max(1, Math.floor(this.#batch / 2))
          this.#batchStartedAt = 0
          void this.#release(stale)
        }
        this.#watchStale()
      },
      due - clock.now(),
      true,
    )
  }

  async #release(held: readonly Held<D, Tx>[]): Promise<void> {
    if (held.length === 0) return
    try {
      await this.#options.backend.release(held.map(({ delivery }) => delivery))
    } catch {
      // They come back by themselves when their ack wait is over.
    }
  }

  #fail(error: unknown): void {
    const waiter = this.#waiters.shift()
    if (waiter) {
      waiter.reject(error)
      void this.close()
    } else this.#failure = { error }
  }
}

/** A delivery in the hands of the stream, and of its holder. */
class Held<D extends Delivery, Tx> extends Settlement {
  readonly delivery: D
  readonly fetchedAt: number
  readonly #options: StreamOptions<D, Tx>
  readonly #onEnd: (held: Held<D, Tx>, again: boolean) => void
  #again = false

  constructor(delivery: D, fetchedAt: number, options: StreamOptions<D, Tx>, onEnd: (held: Held<D, Tx>, again: boolean) => void) {
    super(options.clock, fetchedAt + options.ackWaitMs)
    this.delivery = delivery
    this.fetchedAt = fetchedAt
    this.#options = options
    this.#onEnd = onEnd
  }

  async ack(options: TxOption<Tx> | undefined): Promise<void> {
    const { tx } = optionsOf(options, ['tx'])
    this.#options.checkTx(tx)
    this.#checkOpen()
    this.#again = false
    await this.settle(tx !== undefined, (noWait) => this.#options.backend.ack(this.delivery, tx, noWait), 'gone')
  }

  async nak(delayMs: number): Promise<void> {
    checkDuration('delayMs', delayMs)
    this.#checkOpen()
    this.#again = delayMs === 0
    await this.settle(false, (noWait) => this.#options.backend.nak(this.delivery, delayMs, noWait), 'free')
  }

  async term(reason: string | undefined): Promise<void> {
    if (reason !== undefined) checkText('reason', reason)
    this.#checkOpen()
    this.#again = false
    await this.settle(false, (noWait) => this.#options.backend.term(this.delivery, reason, noWait), 'gone')
  }

  async inProgress(): Promise<void> {
    this.#checkOpen()
    await this.extend(this.#options.ackWaitMs, (noWait) => this.#options.backend.extend(this.delivery, noWait))
  }

  override describe(): string {
    return `message ${this.delivery.seq} (attempt ${this.delivery.attempt})`
  }

  protected override whereabouts(): Promise<Whereabouts> | undefined {
    return this.#options.backend.whereabouts?.(this.delivery)
  }

  protected override onSettled(_inTransaction: boolean): void {
    this.#onEnd(this, this.#again)
  }

  #checkOpen(): void {
    if (this.#options.isClosed()) throw closedError('the bus')
  }
}

class YieldedMsg<D extends Delivery, Tx> implements Msg<Tx> {
  readonly #held: Held<D, Tx>

  constructor(held: Held<D, Tx>) {
    this.#held = held
  }

  get subject(): string {
    return this.#held.delivery.subject
  }
  get payload(): Uint8Array {
    return this.#held.delivery.payload
  }
  get headers(): Headers {
    return this.#held.delivery.headers
  }
  get seq(): number {
    return this.#held.delivery.seq
  }
  get attempt(): number {
    return this.#held.delivery.attempt
  }
  get publishedAt(): Date {
    return this.#held.delivery.publishedAt
  }

  ack(options?: TxOption<Tx>): Promise<void> {
    return this.#held.ack(options)
  }

  nak(delayMs = 0): Promise<void> {
    return this.#held.nak(delayMs)
  }

  term(reason?: string): Promise<void> {
    return this.#held.term(reason)
  }

  extend(): Promise<void> {
    return this.#held.inProgress()
  }
}
