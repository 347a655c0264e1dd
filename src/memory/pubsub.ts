import {
  type CheckedMessage,
  type CheckedSubscription,
  checkBatch,
  checkDurable,
  checkEach,
  checkFunction,
  checkMessage,
  checkSignal,
  checkSubscription,
  type Message,
  type MsgStream,
  optionsOf,
  type Payload,
  type PubAck,
  type PublishOptions,
  type Pubsub,
  SUBSCRIBE_OPTIONS,
  type SubscribeOptions,
  type TxOption,
} from '../core/index.ts'
import { type DeliveryBackend, DurableStream } from '../runtime/stream.ts'
import { type Context, checkTx, POLL_INTERVAL_MS } from './context.ts'
import type { Durable, MemoryDelivery } from './log.ts'

type Stream = DurableStream<MemoryDelivery, never>

export class MemoryPubsub implements Pubsub {
  readonly #context: Context
  readonly #streams = new Set<Stream>()

  constructor(context: Context) {
    this.#context = context
  }

  async publish(subject: string, payload: Payload, options: PublishOptions = {}): Promise<PubAck> {
    this.#context.checkOpen()
    const { headers, msgId, tx } = optionsOf(options, ['headers', 'msgId', 'tx'])
    const message = checkMessage(
      { subject, payload, ...(headers === undefined ? {} : { headers }), ...(msgId === undefined ? {} : { msgId }) },
      this.#context.maxPayloadBytes,
    )
    checkTx(tx)
    return (await this.#publish([message]))[0] as PubAck
  }

  async publishMany(messages: readonly Message[], options: TxOption<never> = {}): Promise<PubAck[]> {
    this.#context.checkOpen()
    const { tx } = optionsOf(options, ['tx'])
    checkBatch('messages', messages)
    const checked = checkEach('messages', messages, (message) => checkMessage(message, this.#context.maxPayloadBytes))
    checkTx(tx)
    return checked.length === 0 ? [] : this.#publish(checked)
  }

  async subscribe(subject: string, durable: string, options: SubscribeOptions = {}): Promise<MsgStream> {
    this.#context.checkOpen()
    const { signal, onInterrupted, ...given } = optionsOf(options, SUBSCRIBE_OPTIONS)
    checkDurable(durable)
    const subscription = checkSubscription(subject, given)
    checkSignal(signal)
    if (onInterrupted !== undefined) checkFunction('onInterrupted', onInterrupted)
    const { store, messagesMs } = this.#context
    // The caller's objects may change before the turn comes.
    const start = structuredClone(subscription.start)
    await store.turn()
    this.#context.checkOpen()
    const found = store.log.durable(durable, subject, start, messagesMs)
    const stream: Stream = new DurableStream<MemoryDelivery, never>({
      clock: store.clock,
      backend: this.#backend(found, subscription),
      ear: store.bell.listen({ kind: 'message', name: subject }, { kind: 'durable', name: durable }),
      ackWaitMs: subscription.ackWaitMs,
      maxInFlight: subscription.maxInFlight,
      pollIntervalMs: POLL_INTERVAL_MS,
      signal,
      onInterrupted,
      checkTx,
      isClosed: this.#context.isClosed,
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
    await this.#context.store.turn()
    this.#context.store.log.deleteDurable(durable)
  }

  async close(): Promise<void> {
    await Promise.all([...this.#streams].map((stream) => stream.handBack()))
  }

  async #publish(messages: readonly CheckedMessage[]): Promise<PubAck[]> {
    const { store, messagesMs } = this.#context
    await store.turn()
    return store.log.publish(messages, messagesMs)
  }

  #backend(durable: Durable, subscription: CheckedSubscription): DeliveryBackend<MemoryDelivery, never> {
    const { store } = this.#context
    const { log } = store
    return {
      fetch: async (limit) => {
        await store.turn()
        this.#context.checkOpen()
        return log.fetch(durable, limit, subscription)
      },
      ack: async (delivery) => {
        await store.turn()
        return log.ack(delivery)
      },
      nak: async (delivery, delayMs) => {
        await store.turn()
        return log.nak(delivery, delayMs)
      },
      term: async (delivery) => {
        await store.turn()
        return log.ack(delivery)
      },
      extend: async (delivery) => {
        await store.turn()
        return log.extend(delivery, subscription.ackWaitMs) ? 'extended' : 'lost'
      },
      release: async (deliveries) => {
        await store.turn()
        log.release(deliveries)
      },
    }
  }
}
