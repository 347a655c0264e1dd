/**
 * One reading of the bridge's durable, from when it has the lease until the lease is lost, a fetch fails, or it is to stop.
 *
 * A message is, in turn,
 *   held        read, and in its lane: the messages of its subject in order, or all where the other bus stores batches whole
 *   published   the other bus has it
 *   gone        acked here
 * While it is held or published its ack wait is extended. One that ran out of it all the same, because the server was away, comes again and takes
 * the place of its older delivery.
 *
 * What an earlier reading had in hand comes back when its ack wait is over, and behind messages that were published after it where these are
 * there already. So a reading begins by looking how much is out, and holds what it reads until that has come; then all of it is sorted by number.
 * The same holds after a fetch that failed, which may have been handed messages: another reading begins.
 */

import { crc32 } from 'node:zlib'
import {
  BusError,
  type DurableInfo,
  isBusError,
  type Message,
  type Msg,
  type MsgStream,
  noSuchDurable,
  type PubAck,
  type SubscribeOptions,
} from '../core/index.ts'
import { reconnectDelayMs } from '../runtime/backoff.ts'
import { systemClock } from '../runtime/clock.ts'
import { isDeadLetter, publishLetter } from '../runtime/dead-letter.ts'
import { errorText } from '../runtime/error-text.ts'
import type { BridgedBus, BridgeStats } from './bridge.ts'
import { passes } from './passes.ts'
import type { Published } from './published.ts'
import { aborted, pause, within } from './within.ts'

export interface RelayOptions {
  readonly from: BridgedBus
  readonly to: BridgedBus
  readonly fromId: string
  readonly toId: string
  readonly subject: string
  readonly durable: string
  readonly start: NonNullable<SubscribeOptions['start']>
  readonly maxInFlight: number
  readonly ackWaitMs: number
  /** There was such a durable while this bridge ran: if there is none any more, it was deleted. */
  readonly wasThere: boolean
  /** Of an earlier bridge of the durable, or its own. */
  readonly longestAckWaitMs: number
  readonly counts: { relayed: number; duplicates: number; skipped: number; refused: number }
  readonly published: Published
  /** An earlier reading of this process ended by something that did not arrive. */
  readonly afterFailure: boolean
  /** The lease is ours for certain. */
  mayPublish(): boolean
  /** Aborted when the lease is known to be lost. */
  readonly lost: AbortSignal
  onState(state: BridgeStats['state']): void
  onError(error: unknown): void
}

interface Held {
  readonly id: string
  readonly since: number
  /** The newest delivery. */
  msg: Msg
  isPublished: boolean
  isAcking: boolean
}

export const BRIDGE_ID = 'bridge_id'
export const BRIDGE_PATH = 'bridge_path'

/** Asked for at once: a server hands out as many in one round trip. */
const MOST_ASKS = 256
/** Of one `publishMany`. */
const MOST_OF_A_BATCH = 256
const MOST_BYTES_OF_A_BATCH = 4 * 1024 * 1024
/** The durable is the bridge's own: what bounds it is `maxInFlight`. */
const MAX_ACK_PENDING = 100_000
/** How long what was held may take to be handed back. */
const HAND_BACK_MS = 2_000
const LOOK_MS = 100
const UNCERTAIN_MS = 20
/** So long, and so many, published messages wait to be acked together. */
const GATHER_MS = 5
const MOST_GATHERED = 64
const STALE_MS = 1_000
const TELL_EVERY_MS = 1_000
const LONGEST_LOOK_MS = 2_000
const REFUSALS = new Set(['payload_too_large', 'invalid_argument'])
/** One lane for everything. */
const ALL = ''

export class Relay {
  readonly #options: RelayOptions
  /** In the order in which they are to be relayed. */
  readonly #held = new Map<string, Held>()
  readonly #lanes = new Map<string, Held[]>()
  /** The other bus stores a batch whole and in its order. */
  readonly #isWhole: boolean
  readonly #ending = new AbortController()
  #failure: { readonly error: unknown } | undefined
  #messages: AsyncIterator<Msg> | undefined
  #asking = 0
  /** To be held at once. */
  #most: number
  /** How many came with each reading; until they are complete, nothing is relayed. */
  #recovering: { missing: number; extra: number } | undefined
  #onRecovered: (() => void) | undefined
  #finishing = false
  #isInterrupted = false
  #toldAt = Number.NEGATIVE_INFINITY
  /** To be acked. */
  readonly #toAck: Held[] = []
  #cancelGathering: (() => void) | undefined

  constructor(options: RelayOptions) {
    this.#options = options
    this.#isWhole = options.to.supports.transactions
    this.#most = options.maxInFlight
  }

  get held(): number {
    return this.#held.size
  }

  get oldest(): Date | undefined {
    for (const { msg } of this.#held.values()) return msg.publishedAt
    return undefined
  }

  /**
   * @returns whether it ended because something did not arrive
   * @throws what trying again does not mend, and what may be mended by another reading
   */
  async run(): Promise<boolean> {
    const { from, subject, durable, start, ackWaitMs, maxInFlight, lost, onState } = this.#options
    const end = () => this.#end()
    lost.addEventListener('abort', end, { once: true })
    let stream: MsgStream | undefined
    let cancelBeat: (() => void) | undefined
    try {
      onState('recovering')
      // A statement whose client is gone may be running still, and hand out messages.
      if (this.#options.afterFailure) await pause(STALE_MS, this.#ending.signal)
      const out = await this.#handedOut()
      if (this.#ending.signal.aborted || lost.aborted) return false
      this.#recovering = out > 0 ? { missing: out, extra: out } : undefined
      // Where the missing are all due, they come first.
      if (from.supports.redeliveryCounts) this.#most = Math.min(MAX_ACK_PENDING, Math.max(maxInFlight, out))
      stream = await from.pubsub.subscribe(subject, durable, {
        start,
        ackWaitMs,
        // Never more than is asked for: what lies in the stream goes back. Where the missing come at any time, there must be room for them
        // behind what is held (#room), and nothing is fetched ahead.
        maxInFlight: from.supports.redeliveryCounts || out === 0 ? this.#most : MAX_ACK_PENDING,
        maxAckPending: MAX_ACK_PENDING,
        // What it was handed comes after messages that the next fetch brings.
        onInterrupted: (error) => {
          this.#isInterrupted = true
          this.#trouble(error)
          this.#end()
        },
      })
      cancelBeat = this.#extendHeld()
      this.#messages = stream[Symbol.asyncIterator]()
      this.#ask()
      if (this.#recovering) await this.#recovered()
      this.#recovering = undefined
      for (const held of [...this.#held.values()].sort((a, b) => a.msg.seq - b.msg.seq)) {
        this.#held.delete(held.id)
        this.#held.set(held.id, held)
        if (!held.isPublished) this.#push(held)
      }
      if (!this.#ending.signal.aborted) onState('relaying')
      this.#idle()
      await aborted(this.#ending.signal)
      if (this.#failure) throw this.#failure.error
      return this.#isInterrupted
    } finally {
      lost.removeEventListener('abort', end)
      cancelBeat?.()
      this.#end()
      await this.#handBack(stream)
    }
  }

  /** Reads no more, and ends when what was read is relayed, or after `graceMs`. */
  finish(graceMs: number): void {
    // What it had in hand is on its way back.
    if (this.#ending.signal.aborted) return
    this.#finishing = true
    // Nothing is relayed before what is missing has come.
    if (this.#recovering) {
      this.#end()
      return
    }
    const cancel = systemClock.setTimer(() => this.#end(), graceMs)
    this.#ending.signal.addEventListener('abort', cancel, { once: true })
    this.#idle()
  }

  #end(): void {
    this.#ending.abort()
    this.#onRecovered?.()
  }

  #fail(error: unknown): void {
    if (this.#ending.signal.aborted) return
    this.#failure ??= { error }
    this.#end()
  }

  /**
   * How many messages an earlier reading had in hand. Where the server tells whose time is over: once that is all of them, so that they come first.
   */
  async #handedOut(): Promise<number> {
    const { from, durable, wasThere, longestAckWaitMs } = this.#options
    const until = systemClock.now() + 2 * longestAckWaitMs
    for (let pauseMs = LOOK_MS; ; pauseMs = Math.min(LONGEST_LOOK_MS, pauseMs * 2)) {
      const found: DurableInfo | undefined = (await from.admin.durables()).find((one) => one.durable === durable)
      const isLast = systemClock.now() >= until || this.#ending.signal.aborted
      if (found) {
        const out = found.inFlight + found.redelivering
        if (!from.supports.redeliveryCounts || found.inFlight === 0 || isLast) return out
      } else if (!wasThere) return 0
      // Made anew it would begin with what was relayed long ago. A server of a cluster that has just come back may not know it yet.
      else if (isLast || from.supports.readYourWrites) throw noSuchDurable(durable)
      await pause(pauseMs, this.#ending.signal)
    }
  }

  /** Resolves when they have come, or have not for so long that they will not: a message may have been purged. */
  #recovered(): Promise<void> {
    const { from, ackWaitMs, longestAckWaitMs } = this.#options
    const { promise, resolve } = Promise.withResolvers<void>()
    let seen = this.#recovering?.missing
    const look = () => {
      const missing = this.#recovering?.missing
      if (missing === seen) return resolve()
      seen = missing
      cancel = systemClock.setTimer(look, ackWaitMs / 2)
    }
    let cancel = systemClock.setTimer(look, from.supports.redeliveryCounts ? ackWaitMs / 2 : 2 * longestAckWaitMs)
    const looking = setInterval(() => this.#ask(from.supports.redeliveryCounts ? 0 : 1), LOOK_MS)
    this.#onRecovered = resolve
    if (this.#ending.signal.aborted || (this.#recovering && this.#recovering.missing <= 0)) resolve()
    return promise.finally(() => {
      cancel()
      clearInterval(looking)
    })
  }

  // ------------------------------------------------------------------ reading

  /** @param least to ask for where it holds as much as it may: what is missing may be behind that */
  #ask(least = 0): void {
    while (this.#messages && !this.#finishing && this.#asking < MOST_ASKS && this.#asking < Math.max(least, this.#room())) {
      if (this.#ending.signal.aborted) return
      this.#asking++
      this.#messages.next().then(
        (next) => {
          this.#asking--
          if (next.done) return this.#end()
          const { missing = 0 } = this.#recovering ?? {}
          this.#take(next.value)
          // Where one of the missing has come, the next one may be one, too.
          this.#ask(this.#recovering && this.#recovering.missing < missing ? this.#recovering.missing : 0)
        },
        (error) => {
          this.#asking--
          this.#fail(error)
        },
      )
    }
  }

  #room(): number {
    const { from } = this.#options
    if (!this.#recovering || from.supports.redeliveryCounts) return this.#most - this.#held.size
    const { extra, missing } = this.#recovering
    return this.#most - (this.#held.size - (extra - missing))
  }

  #take(msg: Msg): void {
    // It was asked for before.
    if (this.#ending.signal.aborted) {
      msg.nak().catch(() => {})
      return
    }
    const { fromId, toId, published, from } = this.#options
    const id = `bridge:${fromId}:${msg.seq}:${msg.publishedAt.getTime()}:${markOf(msg)}`
    const found = this.#held.get(id)
    if (found) {
      found.msg = msg
      if (found.isPublished) void this.#ack(found)
      return
    }
    const isThere = published.has(id)
    const cameFromThere = isRelayed(msg) && msg.headers[BRIDGE_PATH]?.split(',').includes(toId) === true
    const held: Held = { id, since: systemClock.now(), msg, isPublished: isThere || cameFromThere, isAcking: false }
    this.#held.set(id, held)
    if (held.isPublished) {
      if (!isThere) this.#options.counts.skipped++
      void this.#ack(held)
    } else if (!this.#recovering) this.#push(held)
    if (this.#recovering && (from.supports.redeliveryCounts || msg.attempt > 1) && --this.#recovering.missing <= 0) this.#onRecovered?.()
  }

  /** What has not been settled in a third of its ack wait is extended, again and again. */
  #extendHeld(): () => void {
    const { ackWaitMs, to } = this.#options
    const every = ackWaitMs / 3
    const timer = setInterval(() => {
      const now = systemClock.now()
      // One that is lost comes again; where the server is away, the next time does it.
      for (const { msg, since } of this.#held.values()) if (now - since >= every / 2) msg.extend().catch(() => {})
      // Nothing is sent; one that was closed says so.
      to.pubsub.publishMany([]).catch((error) => this.#fail(error))
    }, every)
    return () => clearInterval(timer)
  }

  // ------------------------------------------------------------------ publishing

  #push(held: Held): void {
    const key = this.#isWhole ? ALL : held.msg.subject
    const lane = this.#lanes.get(key)
    if (lane) {
      lane.push(held)
      return
    }
    const made = [held]
    this.#lanes.set(key, made)
    // What came together is published together.
    queueMicrotask(() => void this.#drain(key, made).catch((error) => this.#fail(error)))
  }

  async #drain(key: string, lane: Held[]): Promise<void> {
    while (lane.length > 0) {
      const batch = this.#batchOf(lane)
      if (!(await this.#publish(batch))) return
      lane.splice(0, batch.length)
    }
    this.#lanes.delete(key)
  }

  #done(batch: readonly Held[]): void {
    const { published } = this.#options
    for (const held of batch) {
      held.isPublished = true
      published.add(held.id)
      this.#ackSoon(held)
    }
  }

  #batchOf(lane: readonly Held[]): Held[] {
    if (!this.#isWhole) return lane.slice(0, 1)
    const batch: Held[] = []
    let bytes = 0
    for (const held of lane) {
      bytes += held.msg.payload.byteLength
      if (batch.length === MOST_OF_A_BATCH || (batch.length > 0 && bytes > MOST_BYTES_OF_A_BATCH)) break
      batch.push(held)
    }
    return batch
  }

  /** Until it is there. @returns false when the reading has ended before */
  async #publish(batch: readonly Held[]): Promise<boolean> {
    const { to, counts, mayPublish } = this.#options
    for (let failures = 1; ; failures++) {
      // Not for certain at the moment: a heartbeat is late, and either comes or ends this.
      while (!this.#ending.signal.aborted && !mayPublish()) await pause(UNCERTAIN_MS, this.#ending.signal)
      if (this.#ending.signal.aborted) return false
      try {
        const messages = batch.map((held) => this.#relayed(held))
        const [first] = messages as [Message]
        const acks: PubAck[] =
          messages.length === 1
            ? [await to.pubsub.publish(first.subject, first.payload, { headers: first.headers ?? {}, msgId: first.msgId ?? '' })]
            : await to.pubsub.publishMany(messages)
        for (const { duplicate } of acks) duplicate ? counts.duplicates++ : counts.relayed++
        this.#done(batch)
        return true
      } catch (error) {
        if (error instanceof BusError && REFUSALS.has(error.code)) {
          if (batch.length > 1) return this.#publishEach(batch)
          return this.#refuse(batch[0] as Held, error)
        }
        if (!passes(error)) throw error
        this.#trouble(error)
        await pause(reconnectDelayMs(failures), this.#ending.signal)
      }
    }
  }

  /** Where one of a batch is refused. */
  async #publishEach(batch: readonly Held[]): Promise<boolean> {
    for (const held of batch) if (!(await this.#publish([held]))) return false
    return true
  }

  #relayed({ id, msg }: Held): Message {
    const { subject, payload, headers } = msg
    const path = isRelayed(msg) ? headers[BRIDGE_PATH] : undefined
    const { fromId } = this.#options
    return {
      subject,
      payload,
      headers: { ...headers, [BRIDGE_ID]: id, [BRIDGE_PATH]: path === undefined ? fromId : `${path},${fromId}` },
      msgId: id,
    }
  }

  /** The letter first: who dies before the ack writes it again, and within the duplicate window that is one. */
  async #refuse(held: Held, refusal: unknown): Promise<boolean> {
    const { msg } = held
    const { from, durable, counts, onError } = this.#options
    for (let failures = 1; ; failures++) {
      if (this.#ending.signal.aborted) return false
      try {
        if (!isDeadLetter(msg)) await publishLetter(from.pubsub, msg, durable, 'bridge_refused', errorText(refusal))
        counts.refused++
        onError(refusal)
        this.#done([held])
        return true
      } catch (error) {
        if (!passes(error)) throw error
        this.#trouble(error)
        await pause(reconnectDelayMs(failures), this.#ending.signal)
      }
    }
  }

  /** Every lane meets it when a server is away. */
  #trouble(error: unknown): void {
    const now = systemClock.now()
    if (now - this.#toldAt < TELL_EVERY_MS) return
    this.#toldAt = now
    this.#options.onError(error)
  }

  // ------------------------------------------------------------------ settling

  /** What was published one after the other is acked together: a statement for each would cost more than the publish. */
  #ackSoon(held: Held): void {
    this.#toAck.push(held)
    if (this.#toAck.length >= MOST_GATHERED) this.#ackGathered()
    else this.#cancelGathering ??= systemClock.setTimer(() => this.#ackGathered(), GATHER_MS)
  }

  #ackGathered(): void {
    this.#cancelGathering?.()
    this.#cancelGathering = undefined
    for (const held of this.#toAck.splice(0)) void this.#ack(held)
  }

  async #ack(held: Held): Promise<void> {
    if (held.isAcking) return
    held.isAcking = true
    for (let failures = 1; ; failures++) {
      const { msg } = held
      try {
        await msg.ack()
        break
      } catch (error) {
        // It was handed back while its publish was on its way: it comes again, and is acked then.
        if (isBusError(error, 'already_settled')) break
        // Likewise, or has already.
        if (isBusError(error, 'lease_lost')) {
          if (held.msg !== msg) continue
          break
        }
        if (!passes(error)) return isBusError(error, 'closed') ? this.#end() : this.#fail(error)
        if (this.#ending.signal.aborted) return
        await pause(reconnectDelayMs(failures), this.#ending.signal)
      }
    }
    this.#held.delete(held.id)
    this.#idle()
    this.#ask()
  }

  #idle(): void {
    if (this.#finishing && this.#held.size === 0) this.#end()
  }

  /** What is not published goes back, for the next reading. */
  async #handBack(stream: MsgStream | undefined): Promise<void> {
    this.#ackGathered()
    const back = [...this.#held.values()].filter(({ isPublished }) => !isPublished).map(({ msg }) => msg.nak())
    await within(HAND_BACK_MS, Promise.allSettled([...back, stream?.close()]))
  }
}

/** A dead letter and whatever else is made of a relayed message has its headers and is not it: it has another subject. */
function isRelayed({ subject, headers }: Pick<Msg, 'subject' | 'headers'>): boolean {
  return headers[BRIDGE_ID]?.endsWith(`:${markOf({ subject })}`) === true
}

function markOf({ subject }: Pick<Msg, 'subject'>): string {
  return crc32(subject).toString(36)
}
