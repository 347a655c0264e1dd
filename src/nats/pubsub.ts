import type { Msg } from '@nats-io/transport-node'
import {
  BusError,
  type CheckedMessage,
  type CheckedSubscription,
  checkBatch,
  checkDurable,
  checkEach,
  checkFunction,
  checkMessage,
  checkSignal,
  checkSubscription,
  type Headers,
  isBusError,
  type Message,
  type MsgStream,
  noSuchDurable,
  optionsOf,
  type Payload,
  type PubAck,
  type PublishOptions,
  type Pubsub,
  SUBSCRIBE_OPTIONS,
  type SubscribeOptions,
  type TxOption,
} from '../core/index.ts'
import { type DeliveryBackend, DurableStream, type Fetched } from '../runtime/stream.ts'
import { type Context, checkTx, POLL_INTERVAL_MS, PullEar } from './context.ts'
import { type HeldDelivery, Hold, infoOf, nakVerb } from './deliveries.ts'
import { type Durable, type Durables, isBeforeStart } from './durables.ts'
import { LONG_TRANSIT_MS, pull } from './pull.ts'
import { headersOf, ownId, pack, unpack, wireId } from './wire.ts'

type Stream = DurableStream<HeldDelivery, never>

const AGAIN_MS = 100
/** So often a member looks whether its durable was moved by somebody who died before he told it. */
const LOOK_MS = 10_000
/** A pull that waits outlives a process that stands still: it must be over before somebody else takes what that had in hand to be all there is. */
const SHARE_OF_ACK_WAIT = 3
const LEAST_WAIT_MS = 250
/** Messages of one pull. */
const BATCH = 256
/** Publishes of one call under way at once. */
const WINDOW = 256

export class NatsPubsub implements Pubsub {
  readonly #context: Context
  readonly #durables: Durables
  readonly #streams = new Set<Stream>()

  constructor(context: Context, durables: Durables) {
    this.#context = context
    this.#durables = durables
  }

  async publish(subject: string, payload: Payload, options: PublishOptions = {}): Promise<PubAck> {
    this.#context.checkOpen()
    const { headers, msgId, tx } = optionsOf(options, ['headers', 'msgId', 'tx'])
    const message = checkMessage(
      { subject, payload, ...(headers === undefined ? {} : { headers }), ...(msgId === undefined ? {} : { msgId }) },
      this.#context.maxPayloadBytes,
    )
    checkTx(tx)
    return this.#publish(message)
  }

  /** In order, on one connection; what fails leaves what went before it: NATS 2.9 has no publish of several. */
  async publishMany(messages: readonly Message[], options: TxOption<never> = {}): Promise<PubAck[]> {
    this.#context.checkOpen()
    const { tx } = optionsOf(options, ['tx'])
    checkBatch('messages', messages)
    const checked = checkEach('messages', messages, (message) => checkMessage(message, this.#context.maxPayloadBytes))
    checkTx(tx)
    const acks: PubAck[] = []
    for (let start = 0; start < checked.length; start += WINDOW) {
      acks.push(...(await Promise.all(checked.slice(start, start + WINDOW).map((message) => this.#publish(message)))))
    }
    return acks
  }

  async subscribe(subject: string, durable: string, options: SubscribeOptions = {}): Promise<MsgStream> {
    this.#context.checkOpen()
    const { signal, onInterrupted, ...given } = optionsOf(options, SUBSCRIBE_OPTIONS)
    checkDurable(durable)
    const subscription = checkSubscription(subject, given)
    checkSignal(signal)
    if (onInterrupted !== undefined) checkFunction('onInterrupted', onInterrupted)
    const found = await this.#durables.join(durable, subject, subscription)
    this.#context.checkOpen()
    const { clock, bell, isClosed } = this.#context
    const ear = new PullEar(bell)
    const stream: Stream = new DurableStream<HeldDelivery, never>({
      clock,
      backend: new Member(this.#context, this.#durables, found, subscription, ear),
      ear,
      ackWaitMs: subscription.ackWaitMs,
      maxInFlight: subscription.maxInFlight,
      pollIntervalMs: POLL_INTERVAL_MS,
      // JetStream counts a delivery as an attempt, whether it was yielded or not (P10).
      onDemand: true,
      signal,
      onInterrupted,
      checkTx,
      isClosed,
      // A closed stream is kept while it has yielded messages that the bus must hand back.
      onClose: (closed) => {
        if (!closed.holds) this.#streams.delete(closed)
      },
    })
    this.#streams.add(stream)
    return stream
  }

  async deleteDurable(durable: string): Promise<void> {
    this.#context.checkOpen()
    checkDurable(durable)
    await this.#durables.delete(durable)
  }

  async close(): Promise<void> {
    await Promise.all([...this.#streams].map((stream) => stream.handBack()))
  }

  async #publish({ subject, payload, headers, msgId }: CheckedMessage): Promise<PubAck> {
    const { js, names } = this.#context
    const packed = pack(payload, headers)
    const ack = await this.#context.ask(() =>
      js.publish(names.message(subject), packed.payload, {
        headers: packed.headers,
        ...(msgId === undefined ? {} : { msgID: wireId(msgId) }),
      }),
    )
    return { seq: ack.seq, duplicate: ack.duplicate }
  }
}

function interrupted(): BusError {
  return new BusError('connection', 'NATS did not answer a fetch in time, or was away', { retryable: true })
}

/** One stream's side of a durable. */
class Member implements DeliveryBackend<HeldDelivery, never> {
  readonly #context: Context
  readonly #durables: Durables
  readonly #wanted: CheckedSubscription
  readonly #ear: PullEar
  #durable: Durable
  #lookedAt: number

  constructor(context: Context, durables: Durables, durable: Durable, wanted: CheckedSubscription, ear: PullEar) {
    this.#context = context
    this.#lookedAt = context.clock.now()
    this.#durables = durables
    this.#durable = durable
    this.#wanted = wanted
    this.#ear = ear
  }

  /** First what is there; then the server is asked to send what comes. A server is silent about a consumer that is gone only when asked anew. */
  async fetch(limit: number): Promise<Fetched<HeldDelivery>> {
    const { names, clock } = this.#context
    if (clock.now() - this.#lookedAt >= LOOK_MS) await this.#renew()
    const longestMs = Math.min(LOOK_MS, Math.max(LEAST_WAIT_MS, Math.round(this.#wanted.ackWaitMs / SHARE_OF_ACK_WAIT)))
    for (const waitMs of [0, longestMs]) {
      this.#context.checkOpen()
      const { messages, how } = await pull(this.#context, names.messages, this.#durable.consumer, {
        // Whoever waits gets the first one when it comes.
        batch: waitMs === 0 ? Math.min(limit, BATCH) : 1,
        waitMs,
        signal: this.#ear.ended,
        transitMs: LONG_TRANSIT_MS,
      })
      const cut = how !== 'answered' && !this.#ear.ended.aborted
      if (messages.length > 0) return this.#take(messages, cut)
      if (how === 'answered') continue
      if (!cut || (await this.#renew())) break
      // Nothing was wrong with the durable: the connection was away, or the server busy.
      return { deliveries: [], more: false, dueInMs: AGAIN_MS, interrupted: interrupted() }
    }
    return { deliveries: [], more: true, dueInMs: null }
  }

  async #take(messages: readonly Msg[], cut: boolean): Promise<Fetched<HeldDelivery>> {
    const handedOutAt = this.#context.clock.now()
    const taken = await Promise.allSettled(messages.map((msg) => this.#taken(msg)))
    const deliveries = taken.flatMap((one) => (one.status === 'fulfilled' && one.value !== null ? [one.value] : []))
    // One whose letter could not be published comes again; the others are there.
    const failed = taken.find((one) => one.status === 'rejected')
    if (failed && deliveries.length === 0) throw failed.reason
    return { deliveries, more: true, dueInMs: null, handedOutAt, ...(cut || failed ? { interrupted: interrupted() } : {}) }
  }

  /** @returns `null` when it is none of this durable's, or was delivered often enough */
  async #taken(msg: Msg): Promise<HeldDelivery | null> {
    const { names } = this.#context
    const { deliveries: attempt, seq, time } = infoOf(msg)
    const { payload, headers } = unpack(headersOf(msg), msg.data)
    const { ackWaitMs, maxDeliver } = this.#wanted
    const hold = new Hold(this.#context, msg, this.#durable.ackWaitMs, ackWaitMs)
    const delivery = { subject: names.subjectOf(msg.subject), payload, headers, seq, attempt, publishedAt: new Date(time), hold }
    if (isBeforeStart(this.#durable.start, seq, time)) {
      await hold.settle('+TERM')
      return null
    }
    if (maxDeliver !== null && attempt > maxDeliver) {
      await this.#bury(delivery, attempt - 1)
      return null
    }
    return delivery
  }

  ack({ hold }: HeldDelivery): Promise<boolean> {
    return hold.settle('+ACK')
  }

  async nak(delivery: HeldDelivery, delayMs: number): Promise<boolean> {
    const { maxDeliver } = this.#wanted
    if (maxDeliver === null || delivery.attempt < maxDeliver) return delivery.hold.settle(nakVerb(delayMs))
    if (delivery.hold.isOver) return false
    return this.#bury(delivery, delivery.attempt)
  }

  term({ hold }: HeldDelivery): Promise<boolean> {
    return hold.settle('+TERM')
  }

  async extend({ hold }: HeldDelivery): Promise<'extended' | 'lost'> {
    return (await hold.extend(this.#wanted.ackWaitMs)) ? 'extended' : 'lost'
  }

  async release(deliveries: readonly HeldDelivery[]): Promise<void> {
    await Promise.all(deliveries.map(({ hold }) => hold.settle('-NAK')))
  }

  /**
   * First the letter, then the end of the message. Who dies in between leaves a message that comes again after its ack wait
   * and is buried again: the letter's id makes that one letter within the duplicate window of two minutes. The other way
   * round a message could be gone and no letter there.
   */
  async #bury({ payload, headers, subject, seq, hold }: HeldDelivery, attempts: number): Promise<boolean> {
    const { maxPayloadBytes } = this.#context
    const added = { dlq_reason: 'max_deliver_exceeded', dlq_subject: subject, dlq_seq: String(seq), dlq_attempts: String(attempts) }
    try {
      await this.#publishLetter(seq, payload, { ...headers, ...added })
    } catch (error) {
      if (!isBusError(error, 'payload_too_large')) throw error
      // Somebody else's client may publish what leaves no room for more.
      const dropped = { dlq_headers_dropped: String(Object.keys(headers).length), dlq_payload_bytes: String(payload.byteLength) }
      await this.#publishLetter(seq, payload.subarray(0, maxPayloadBytes), { ...added, ...dropped })
    }
    return hold.settle('+TERM')
  }

  async #publishLetter(seq: number, payload: Uint8Array, headers: Headers): Promise<void> {
    const { js, names } = this.#context
    const { durable, id, consumer } = this.#durable
    const letter = pack(payload, headers)
    await this.#context.ask(() =>
      js.publish(names.message(`${durable}.dlq`), letter.payload, { headers: letter.headers, msgID: ownId('dlq', id, consumer, seq) }),
    )
  }

  /** The durable may have been moved, or deleted, or its consumer never made. @returns whether it was moved @throws not_found */
  async #renew(): Promise<boolean> {
    const { clock, checkOpen } = this.#context
    checkOpen()
    const before = this.#durable
    const now = await this.#durables.find(before.durable)
    const moved = now?.consumer !== before.consumer
    // Whoever moved or deleted it may have died before he took it away.
    if (moved) await this.#durables.deleteConsumer(before.consumer)
    if (!now || now.id !== before.id) throw noSuchDurable(before.durable)
    if (await this.#durables.ensure(now)) this.#lookedAt = clock.now()
    this.#durable = now
    return moved
  }
}
