/**
 * A stream of messages that match. Each message of the stream beneath is
 *   read      decoded and validated, which may take a while
 *   yielded   when it matches
 *   buried    when it does not: its letter is published, and only then is it ended. Where the letter cannot be published it comes again.
 */

import {
  BusError,
  type Headers,
  isBusError,
  type Msg,
  type MsgStream,
  type Pubsub,
  type SubscribeOptions,
  type TxOption,
} from '../core/index.ts'
import { retryDelayMs } from '../runtime/backoff.ts'
import { isDeadLetter, publishLetter } from '../runtime/dead-letter.ts'
import { errorText } from '../runtime/error-text.ts'
import type { Form, Reading } from './format.ts'
import { INVALID_PAYLOAD } from './reason.ts'

export interface TypedMsg<Data, Tx = never> extends Msg<Tx> {
  /** What the schema made of the payload. */
  readonly data: Data
}

/** As `MsgStream`; what does not match is not yielded. */
export interface TypedMsgStream<Data, Tx = never> extends AsyncIterable<TypedMsg<Data, Tx>>, AsyncDisposable {
  close(): Promise<void>
}

export interface TypedSubscribeOptions extends SubscribeOptions {
  /**
   * Told of each message that did not match (`invalid_argument`), once its letter is stored, and of each letter that could not be published, with
   * what kept it; that message comes again. @default a process warning
   */
  readonly onError?: (error: BusError, msg: Msg) => void
}

export interface TypedStreamOptions<Data, Tx> {
  readonly stream: MsgStream<Tx>
  readonly pubsub: Pick<Pubsub, 'publish'>
  readonly durable: string
  readonly form: Form<never, Data>
  readonly signal: AbortSignal | undefined
  readonly onError: TypedSubscribeOptions['onError']
}

/** A message whose letter cannot be published is not asked for more often than this. */
const LONGEST_PAUSE_MS = 60_000
const DONE: IteratorReturnResult<undefined> = Object.freeze({ done: true, value: undefined })

export class ReadingStream<Data, Tx> implements TypedMsgStream<Data, Tx> {
  readonly #options: TypedStreamOptions<Data, Tx>
  /** Each with how to end its reading. */
  readonly #reading = new Map<Msg<Tx>, (closed: undefined) => void>()
  readonly #burying = new Set<Promise<void>>()
  readonly #onAbort = () => void this.close()
  #closing: Promise<void> | undefined

  constructor(options: TypedStreamOptions<Data, Tx>) {
    this.#options = options
    options.signal?.addEventListener('abort', this.#onAbort, { once: true })
    if (options.signal?.aborted) this.#onAbort()
  }

  [Symbol.asyncIterator](): AsyncIterator<TypedMsg<Data, Tx>, undefined> {
    const messages = this.#options.stream[Symbol.asyncIterator]()
    return { next: () => this.#next(messages) }
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  /** Hands back what was not yielded. What is being read counts as an attempt. */
  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    this.#options.signal?.removeEventListener('abort', this.#onAbort)
    const read = [...this.#reading]
    this.#reading.clear()
    // What cannot be handed back comes again when its ack wait is over.
    const handedBack = read.map(([msg, end]) => {
      end(undefined)
      return msg.nak().catch(() => {})
    })
    await this.#options.stream.close()
    await Promise.all([...handedBack, ...this.#burying])
  }

  async #next(messages: AsyncIterator<Msg<Tx>>): Promise<IteratorResult<TypedMsg<Data, Tx>, undefined>> {
    for (;;) {
      const { done, value: msg } = await messages.next()
      if (done) return DONE
      const reading = await this.#read(msg)
      if (!this.#reading.delete(msg) || !reading) return DONE
      if (reading.matches) return { done: false, value: new ReadMsg(msg, reading.data) }
      const buried = this.#bury(msg, reading.reason)
      this.#burying.add(buried)
      await buried
      this.#burying.delete(buried)
    }
  }

  /** `undefined` when it closes meanwhile: a schema may not answer for long, or ever. */
  #read(msg: Msg<Tx>): Promise<Reading<Data> | undefined> {
    return new Promise((resolve) => {
      this.#reading.set(msg, resolve)
      void Promise.resolve(this.#options.form.read(msg.payload)).then(resolve)
    })
  }

  /** Never rejects: one bad message must not end the stream. */
  async #bury(msg: Msg<Tx>, reason: string): Promise<void> {
    const { pubsub, durable } = this.#options
    const which = `message ${msg.seq} on "${msg.subject}"`
    let fate = 'it is a dead letter already and gets none of its own'
    if (!isDeadLetter(msg)) {
      try {
        // Somebody else who has it by now may have found that it matches; and it stays this stream's until its letter is there.
        await msg.extend()
        await publishLetter(pubsub, msg as Msg<never>, durable, INVALID_PAYLOAD, reason)
      } catch (error) {
        if (isBusError(error, 'closed') || isBusError(error, 'lease_lost')) return
        const code = error instanceof BusError ? error.code : 'internal'
        const text = `${which} does not match, and its dead letter cannot be published; it comes again: ${errorText(error)}`
        this.#report(new BusError(code, text, { cause: error }), msg)
        await msg.nak(Math.min(LONGEST_PAUSE_MS, retryDelayMs(msg.attempt))).catch(() => {})
        return
      }
      fate = `it was published on "${durable}.dlq"`
    }
    this.#report(new BusError('invalid_argument', `${which} does not match: ${reason}; ${fate}`), msg)
    // Comes again if this fails: the letter is not stored twice, and it is ended then.
    await msg.term(`${INVALID_PAYLOAD}: ${reason}`).catch(() => {})
  }

  #report(error: BusError, msg: Msg<Tx>): void {
    const { onError, durable } = this.#options
    try {
      if (onError) onError(error, msg as Msg)
      else process.emitWarning(`durable "${durable}": ${error.message}`, 'KlieoBusWarning')
    } catch {
      // A listener that throws must not end the stream.
    }
  }
}

class ReadMsg<Data, Tx> implements TypedMsg<Data, Tx> {
  readonly #msg: Msg<Tx>
  readonly data: Data

  constructor(msg: Msg<Tx>, data: Data) {
    this.#msg = msg
    this.data = data
  }

  get subject(): string {
    return this.#msg.subject
  }
  get payload(): Uint8Array {
    return this.#msg.payload
  }
  get headers(): Headers {
    return this.#msg.headers
  }
  get seq(): number {
    return this.#msg.seq
  }
  get attempt(): number {
    return this.#msg.attempt
  }
  get publishedAt(): Date {
    return this.#msg.publishedAt
  }

  ack(options?: TxOption<Tx>): Promise<void> {
    return this.#msg.ack(options)
  }

  nak(delayMs?: number): Promise<void> {
    return this.#msg.nak(delayMs)
  }

  term(reason?: string): Promise<void> {
    return this.#msg.term(reason)
  }

  extend(): Promise<void> {
    return this.#msg.extend()
  }
}
