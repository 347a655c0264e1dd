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
import { Batcher } from '../runtime/batcher.ts'
import type { Topic } from '../runtime/bell.ts'
import type { Extension, Whereabouts } from '../runtime/settlement.ts'
import { type Delivery, type DeliveryBackend, DurableStream, type Fetched } from '../runtime/stream.ts'
import { ACKS_AT_ONCE, fromBase64, packPayloads, pgArray, pgArrayOrNull } from './arrays.ts'
import type { Context } from './context.ts'
import { checkTx, type PostgresTx } from './database.ts'
import {
  ACK,
  BURY,
  CREATE_DURABLE,
  DELETE_DURABLE,
  DELIVERY_WHEREABOUTS,
  EXTEND,
  FETCH,
  FIND_DURABLE,
  NAK,
  PUBLISH,
  RELEASE,
} from './pubsub.sql.ts'

/** A fetch stops after so many bytes of payload, so that a batch of large messages fits into memory. */
const MAX_FETCH_BYTES = 16 * 1024 * 1024
const MAX_PUBLISH_BATCH_BYTES = 4 * 1024 * 1024
/** One statement carries at most so much. */
export const MAX_STATEMENT_BYTES = 256 * 1024 * 1024
const BURY_BATCH = 1_000

interface PgDelivery extends Delivery {
  readonly durable: string
  readonly consumer: number
  readonly token: string
}

/** A durable, as its members know it. */
interface Consumer {
  id: number
  readonly madeAt: string
}

interface DurableRow extends Record<string, unknown> {
  readonly id: number
  readonly filter: string
  readonly made_at: string
}

interface FetchRow extends Record<string, unknown> {
  readonly seq: number | null
  readonly subject: string
  readonly headers: Headers
  readonly payload: string
  readonly published_at_ms: string | number
  readonly attempt: number
  readonly token: string
  readonly more: boolean
  readonly final_due: boolean
  readonly due_in_ms: number | null
}

interface PublishRow extends Record<string, unknown> {
  readonly seq: string
  readonly duplicate: string
  readonly tx: string
}

interface Nak {
  readonly delivery: PgDelivery
  readonly delayMs: number
}

interface Wait {
  readonly delivery: PgDelivery
  readonly ackWaitMs: number
}

export class PostgresPubsub implements Pubsub<PostgresTx> {
  readonly #context: Context
  readonly #streams = new Set<DurableStream<PgDelivery, PostgresTx>>()
  readonly #publishes: Batcher<CheckedMessage, PubAck>
  readonly #acks: Batcher<PgDelivery, boolean>
  readonly #naks: Batcher<Nak, boolean>
  readonly #extensions: Batcher<Wait, Extension>

  constructor(context: Context) {
    this.#context = context
    this.#publishes = new Batcher((messages) => this.#publish(messages), {
      weight: ({ payload }) => payload.byteLength,
      maxWeight: MAX_PUBLISH_BATCH_BYTES,
    })
    this.#acks = new Batcher((deliveries) => this.#ack(deliveries), { maxParallel: ACKS_AT_ONCE })
    this.#naks = new Batcher((naks) => this.#nak(naks, false))
    this.#extensions = new Batcher((extensions) => this.#extend(extensions, false))
  }

  async publish(subject: string, payload: Payload, options: PublishOptions<PostgresTx> = {}): Promise<PubAck> {
    this.#context.checkOpen()
    const { headers, msgId, tx } = optionsOf(options, ['headers', 'msgId', 'tx'])
    checkTx(tx)
    const message = checkMessage(
      { subject, payload, ...(headers === undefined ? {} : { headers }), ...(msgId === undefined ? {} : { msgId }) },
      this.#context.maxPayloadBytes,
    )
    if (tx !== undefined) return (await this.#publishIn(tx, [message]))[0] as PubAck
    // A message id may have to wait for somebody's open transaction; nobody else's publish waits along.
    if (msgId !== undefined) return (await this.#publish([message]))[0] as PubAck
    return this.#publishes.add(message)
  }

  async publishMany(messages: readonly Message[], options: TxOption<PostgresTx> = {}): Promise<PubAck[]> {
    this.#context.checkOpen()
    const { tx } = optionsOf(options, ['tx'])
    checkTx(tx)
    checkBatch('messages', messages)
    const checked = checkEach('messages', messages, (message) => checkMessage(message, this.#context.maxPayloadBytes))
    if (checked.length === 0) return []
    return tx === undefined ? this.#publish(checked) : this.#publishIn(tx, checked)
  }

  async subscribe(subject: string, durable: string, options: SubscribeOptions = {}): Promise<MsgStream<PostgresTx>> {
    this.#context.checkOpen()
    const { signal, onInterrupted, ...given } = optionsOf(options, SUBSCRIBE_OPTIONS)
    checkDurable(durable)
    const subscription = checkSubscription(subject, given)
    checkSignal(signal)
    if (onInterrupted !== undefined) checkFunction('onInterrupted', onInterrupted)
    const consumer = await this.#findOrCreate(subject, durable, subscription)
    this.#context.checkOpen()
    const { bell, clock, pollIntervalMs } = this.#context
    const stream: DurableStream<PgDelivery, PostgresTx> = new DurableStream<PgDelivery, PostgresTx>({
      clock,
      backend: this.#backend(consumer, durable, subscription),
      ear: bell.listen({ kind: 'message', name: subject }, { kind: 'durable', name: durable }),
      ackWaitMs: subscription.ackWaitMs,
      maxInFlight: subscription.maxInFlight,
      pollIntervalMs,
      signal,
      onInterrupted,
      checkTx,
      isClosed: this.#context.isClosed,
      onClose: (closed) => this.#closed(closed),
    })
    this.#streams.add(stream)
    return stream
  }

  async deleteDurable(durable: string): Promise<void> {
    this.#context.checkOpen()
    checkDurable(durable)
    const [gone] = await this.#context.db.query<{ done: boolean }>(DELETE_DURABLE, [durable], 'deleteDurable')
    if (!gone?.done) throw noSuchDurable(durable)
    this.#context.ringer.ring([{ kind: 'durable', name: durable }])
  }

  async close(): Promise<void> {
    await Promise.all([...this.#streams].map((stream) => stream.handBack()))
  }

  /** A closed stream is kept while it has yielded messages that the bus must hand back. */
  #closed(stream: DurableStream<PgDelivery, PostgresTx>): void {
    if (!stream.holds) this.#streams.delete(stream)
  }

  async #findOrCreate(filter: string, durable: string, { start }: CheckedSubscription): Promise<Consumer> {
    const seq = typeof start === 'object' && 'seq' in start ? start.seq : 0
    const time = typeof start === 'object' && 'time' in start ? start.time.getTime() : null
    for (;;) {
      const found = await this.#find(durable, 'subscribe')
      if (found?.filter === filter) return { id: found.id, madeAt: found.made_at }
      if (found) {
        throw new BusError(
          'conflict',
          `durable "${durable}" exists with the filter "${found.filter}", not "${filter}"; use another name, or delete it and lose its position`,
        )
      }
      await this.#context.db.query(CREATE_DURABLE, [durable, filter, seq, time, start === 'new'], 'subscribe')
    }
  }

  async #find(durable: string, doing: string): Promise<DurableRow | undefined> {
    return (await this.#context.db.query<DurableRow>(FIND_DURABLE, [durable], doing))[0]
  }

  #backend(consumer: Consumer, durable: string, subscription: CheckedSubscription): DeliveryBackend<PgDelivery, PostgresTx> {
    const { ackWaitMs } = subscription
    const rung: readonly Topic[] = [{ kind: 'durable', name: durable }]
    const ring = () => this.#context.ringer.ring(rung)
    const { maxDeliver } = subscription
    return {
      fetch: (limit) => this.#fetch(consumer, durable, limit, subscription),
      ack: (delivery, tx, noWait) => {
        if (tx !== undefined) return this.#ackIn(tx, delivery, noWait)
        return noWait ? this.#ackNow(delivery) : this.#acks.add(delivery)
      },
      nak: async (delivery, delayMs, noWait) => {
        const done = noWait ? (await this.#nak([{ delivery, delayMs }], true))[0] === true : await this.#naks.add({ delivery, delayMs })
        ring()
        // A nak of the last delivery has published its dead letter.
        if (done && maxDeliver !== null && delivery.attempt >= maxDeliver)
          this.#context.ringer.ring([{ kind: 'message', name: `${durable}.dlq` }])
        return done
      },
      term: (delivery, _reason, noWait) => (noWait ? this.#ackNow(delivery) : this.#acks.add(delivery)),
      // An ack in a caller's transaction may hold the row: nobody else's extension is in a batch with it.
      extend: async (delivery, noWait) =>
        noWait ? ((await this.#extend([{ delivery, ackWaitMs }], true))[0] as Extension) : this.#extensions.add({ delivery, ackWaitMs }),
      whereabouts: async ({ consumer: id, seq, token }) => {
        const [row] = await this.#context.db.query<{ whereabouts: Whereabouts }>(DELIVERY_WHEREABOUTS, [id, seq, token], 'settle')
        return row?.whereabouts ?? 'gone'
      },
      release: async (deliveries) => {
        await this.#context.db.query(RELEASE, keys(deliveries), 'release')
        ring()
      },
    }
  }

  async #fetch(consumer: Consumer, durable: string, limit: number, subscription: CheckedSubscription): Promise<Fetched<PgDelivery>> {
    this.#context.checkOpen()
    const { ackWaitMs, maxAckPending, maxDeliver } = subscription
    const { id } = consumer
    let rows: FetchRow[]
    try {
      rows = await this.#context.db.query<FetchRow>(FETCH, [id, limit, ackWaitMs, maxAckPending, maxDeliver, MAX_FETCH_BYTES], 'fetch')
    } catch (error) {
      if (!isBusError(error, 'not_found')) throw error
      // A durable that was moved has another id; one that was deleted and made anew is another.
      const moved = await this.#find(durable, 'fetch')
      if (moved?.made_at !== consumer.madeAt || moved.id === id) throw error
      consumer.id = moved.id
      return this.#fetch(consumer, durable, limit, subscription)
    }
    const end = rows.pop()
    // In a transaction of its own: what is published beside a cursor that moves is lost to it.
    // If it fails, what was fetched is still to be handed out: the next fetch tells again.
    if (end?.final_due) await this.#bury(id, durable).catch(() => {})
    const deliveries = rows.map(
      (row): PgDelivery => ({
        consumer: id,
        durable,
        token: row.token,
        seq: row.seq as number,
        subject: row.subject,
        payload: fromBase64(row.payload),
        headers: row.headers,
        attempt: row.attempt,
        publishedAt: new Date(Number(row.published_at_ms)),
      }),
    )
    return { deliveries, more: end?.more ?? false, dueInMs: end?.due_in_ms ?? null }
  }

  async #bury(consumer: number, durable: string): Promise<void> {
    const [row] = await this.#context.db.query<{ count: number }>(BURY, [consumer, BURY_BATCH], 'dead-letter')
    if (row && row.count > 0) this.#context.ringer.ring([{ kind: 'message', name: `${durable}.dlq` }])
  }

  /** Keeps nothing of the messages but what is sent: what they hold, a hundred MiB perhaps, is free while it is under way. */
  #publish(messages: readonly CheckedMessage[]): Promise<PubAck[]> {
    return this.#send(publishParameters(messages), topics(messages))
  }

  async #send(parameters: readonly unknown[], rung: readonly Topic[]): Promise<PubAck[]> {
    const rows = await this.#context.db.query<PublishRow>(PUBLISH, parameters, 'publish')
    this.#context.ringer.ring(rung)
    return rows.map(toPubAck)
  }

  async #publishIn(tx: PostgresTx, messages: readonly CheckedMessage[]): Promise<PubAck[]> {
    const rows = await this.#context.db.queryIn<PublishRow>(tx, PUBLISH, publishParameters(messages), 'publish', {
      rows: messages.length,
      columns: ['seq'],
    })
    const xid = rows[0]?.tx
    if (xid !== undefined) this.#context.ringer.afterCommit(xid, topics(messages))
    return rows.map(toPubAck)
  }

  async #ack(deliveries: readonly PgDelivery[]): Promise<boolean[]> {
    const done = await this.#settle(ACK, deliveries, ['false'], 'ack')
    // Another stream of this process may wait for room in maxAckPending.
    this.#context.bell.ring([...new Set(deliveries.map(({ durable }) => durable))].map((name) => ({ kind: 'durable', name })))
    return done
  }

  async #ackNow(delivery: PgDelivery): Promise<boolean> {
    return (await this.#settle(ACK, [delivery], ['true'], 'ack'))[0] === true
  }

  async #ackIn(tx: PostgresTx, delivery: PgDelivery, noWait: boolean): Promise<boolean> {
    const expected = { rows: 1, orNone: true, columns: ['n'] }
    const rows = await this.#context.db.queryIn(tx, ACK, [...keys([delivery]), String(noWait)], 'ack', expected)
    return rows.length > 0
  }

  #nak(naks: readonly Nak[], noWait: boolean): Promise<boolean[]> {
    const deliveries = naks.map(({ delivery }) => delivery)
    return this.#settle(NAK, deliveries, [pgArray(naks.map(({ delayMs }) => delayMs)), String(noWait)], 'nak')
  }

  async #extend(extensions: readonly Wait[], noWait: boolean): Promise<Extension[]> {
    const deliveries = extensions.map(({ delivery }) => delivery)
    const waits = pgArray(extensions.map(({ ackWaitMs }) => ackWaitMs))
    const values = [...keys(deliveries), waits, String(noWait)]
    const rows = await this.#context.db.query<{ n: string; extended: boolean }>(EXTEND, values, 'extend')
    const found = new Map(rows.map(({ n, extended }) => [Number(n), extended ? 'extended' : 'held'] as const))
    return deliveries.map((_, index) => found.get(index + 1) ?? 'lost')
  }

  /** @returns for each delivery whether its token was still valid */
  async #settle(text: string, deliveries: readonly PgDelivery[], more: readonly unknown[], doing: string): Promise<boolean[]> {
    const rows = await this.#context.db.query<{ n: string }>(text, [...keys(deliveries), ...more], doing)
    if (rows.length === deliveries.length) return deliveries.map(() => true)
    const settled = new Set(rows.map(({ n }) => Number(n)))
    return deliveries.map((_, index) => settled.has(index + 1))
  }
}

function keys(deliveries: readonly PgDelivery[]): string[] {
  return [
    pgArray(deliveries.map(({ consumer }) => consumer)),
    pgArray(deliveries.map(({ seq }) => seq)),
    pgArray(deliveries.map(({ token }) => token)),
  ]
}

function publishParameters(messages: readonly CheckedMessage[]): unknown[] {
  const { bytes, starts, lengths } = packPayloads(messages.map(({ payload }) => payload))
  if (bytes.byteLength > MAX_STATEMENT_BYTES) throw tooMuch('messages', bytes.byteLength)
  const headers = pgArrayOrNull(
    messages.map((message) => JSON.stringify(message.headers)),
    '{}',
  )
  const ids = pgArrayOrNull(
    messages.map(({ msgId }) => msgId ?? null),
    null,
  )
  return [pgArray(messages.map(({ subject }) => subject)), bytes, starts, lengths, headers, ids]
}

export function tooMuch(what: string, bytes: number): BusError {
  return new BusError(
    'payload_too_large',
    `${what} hold ${bytes} bytes together; one call carries at most ${MAX_STATEMENT_BYTES}: make several calls`,
  )
}

function topics(messages: readonly CheckedMessage[]): Topic[] {
  return [...new Set(messages.map(({ subject }) => subject))].map((name) => ({ kind: 'message', name }))
}

function toPubAck({ seq, duplicate }: PublishRow): PubAck {
  return { seq: Number(seq), duplicate: duplicate === 'true' }
}
