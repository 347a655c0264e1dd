import {
  type Bus,
  checkFilter,
  checkFunction,
  checkSubject,
  fieldsOf,
  type Headers,
  hasWildcard,
  invalid,
  type Message,
  matches,
  optionsOf,
  type PubAck,
  type PublishOptions,
  type TxOption,
} from '../core/index.ts'
import { partOf, writeEach } from './calls.ts'
import { Form, type Format, type FormatOptions, type InputOf, type OutputOf } from './format.ts'
import { ReadingStream, type TypedMsgStream, type TypedSubscribeOptions } from './stream.ts'

/** Whether a literal holds a wildcard; a `string` that is not known when compiled counts as one without. */
export type IsFilter<S extends string> = `.${S}.` extends `${string}.*.${string}` | `${string}.>.${string}` ? true : false

/** The subjects that a literal filter takes, as far as a type can say it: each wildcard is any string. */
export type SubjectIn<S extends string> = S extends `${infer Token}.${infer Rest}` ? `${TokenIn<Token>}.${SubjectIn<Rest>}` : TokenIn<S>
type TokenIn<T extends string> = T extends '*' | '>' ? string : T

export interface TypedMessage<In> {
  readonly data: In
  readonly headers?: Headers
  readonly msgId?: string
}

/** A filter and what the messages there hold. To publish, name a subject of it: `orders.at('orders.created').publish(…)`. */
export interface FilterContract<S extends string, In, Out> {
  readonly subject: S
  /**
   * As `pubsub.subscribe`, and each message has its `data`. What cannot be decoded or does not match is not yielded: it goes to `<durable>.dlq`
   * with its headers and `dlq_reason` (`invalid_payload: …`), and is ended for this durable.
   * @throws what `pubsub.subscribe` throws
   */
  subscribe<Tx>(bus: Pick<Bus<Tx>, 'pubsub'>, durable: string, options?: TypedSubscribeOptions): Promise<TypedMsgStream<Out, Tx>>
  /** The contract of one subject that this one takes. @throws invalid_argument for another */
  at(subject: SubjectIn<S>): SubjectContract<In, Out>
}

/** A subject and what its messages hold. */
export interface SubjectContract<In, Out = In> extends FilterContract<string, In, Out> {
  /**
   * As `pubsub.publish`, of data.
   * @throws invalid_argument when the data does not match, and then nothing was sent; and what `pubsub.publish` throws
   */
  publish<Tx>(bus: Pick<Bus<Tx>, 'pubsub'>, data: In, options?: PublishOptions<NoInfer<Tx>>): Promise<PubAck>
  /** All or none, in this order. @throws as `publish`; what does not match is named by its place */
  publishMany<Tx>(bus: Pick<Bus<Tx>, 'pubsub'>, messages: readonly TypedMessage<In>[], options?: TxOption<NoInfer<Tx>>): Promise<PubAck[]>
}

/**
 * What the messages on a subject hold, said once for those who publish and those who subscribe.
 *
 * @param subject a filter may be given: it can be subscribed to, and `at(subject)` is the contract of one of its subjects
 * @param format a schema or a codec: `format.ts`. Without one the data is JSON of the type `T` and is not validated; what is not JSON does not match
 * @throws invalid_argument
 */
export function defineSubject<const S extends string, F extends Format>(
  subject: S,
  format: F,
  options?: FormatOptions,
): IsFilter<S> extends true ? FilterContract<S, InputOf<F>, OutputOf<F>> : SubjectContract<InputOf<F>, OutputOf<F>>
export function defineSubject<T = unknown>(subject: string): SubjectContract<T>
export function defineSubject(subject: string, format?: Format, options?: FormatOptions): SubjectContract<unknown> {
  checkFilter(subject)
  return new DefinedSubject(subject, Form.of(format, options))
}

class DefinedSubject<In, Out> implements SubjectContract<In, Out> {
  readonly subject: string
  readonly #form: Form<In, Out>

  constructor(subject: string, form: Form<In, Out>) {
    this.subject = subject
    this.#form = form
  }

  at(subject: string): SubjectContract<In, Out> {
    checkSubject(subject)
    if (!matches(this.subject, subject)) throw invalid('subject', subject, `must be one that "${this.subject}" takes`)
    return new DefinedSubject(subject, this.#form)
  }

  async publish<Tx>(bus: Pick<Bus<Tx>, 'pubsub'>, data: In, options?: PublishOptions<Tx>): Promise<PubAck> {
    const pubsub = partOf(bus, 'pubsub')
    this.#checkPublishable()
    const written = this.#form.write(data)
    return await pubsub.publish(this.subject, written instanceof Promise ? await written : written, options)
  }

  async publishMany<Tx>(bus: Pick<Bus<Tx>, 'pubsub'>, messages: readonly TypedMessage<In>[], options?: TxOption<Tx>): Promise<PubAck[]> {
    const pubsub = partOf(bus, 'pubsub')
    this.#checkPublishable()
    const written = await writeEach('messages', messages, async (message): Promise<Message> => {
      const { data, headers, msgId } = fieldsOf('message', message, ['data', 'headers', 'msgId'])
      const payload = await this.#form.write(data as In)
      return { subject: this.subject, payload, ...(headers === undefined ? {} : { headers }), ...(msgId === undefined ? {} : { msgId }) }
    })
    return await pubsub.publishMany(written, options)
  }

  async subscribe<Tx>(bus: Pick<Bus<Tx>, 'pubsub'>, durable: string, options?: TypedSubscribeOptions): Promise<TypedMsgStream<Out, Tx>> {
    const pubsub = partOf(bus, 'pubsub')
    const { onError, signal } = optionsOf(options, ['onError', 'signal'])
    if (onError !== undefined) checkFunction('onError', onError)
    const stream = await pubsub.subscribe(this.subject, durable, options)
    return new ReadingStream({ stream, pubsub: pubsub as Bus['pubsub'], durable, form: this.#form, signal, onError })
  }

  /** Before the data is looked at: it may be sent nowhere. */
  #checkPublishable(): void {
    if (hasWildcard(this.subject)) {
      throw invalid('subject', this.subject, 'must not hold a wildcard to be published to: name one with at(subject)')
    }
  }
}
