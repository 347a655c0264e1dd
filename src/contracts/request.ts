import {
  type Bus,
  BusError,
  checkFilter,
  checkFunction,
  checkSubject,
  hasWildcard,
  invalid,
  matches,
  optionsOf,
  type Request,
  type RequestOptions,
  type Responder,
  type RespondOptions,
} from '../core/index.ts'
import { partOf } from './calls.ts'
import { Form, type Format, type FormatOptions, type InputOf, type OutputOf } from './format.ts'
import type { IsFilter, SubjectIn } from './subject.ts'

export interface RequestFormats<Q extends Format, A extends Format> {
  /** A schema or a codec for what is asked. */
  readonly request: Q
  /** A schema or a codec for what is answered. */
  readonly reply: A
}

/** What each side gives and gets. */
export interface Exchange {
  /** What the requester gives. */
  readonly ask: unknown
  /** What the responder gets of it. */
  readonly asked: unknown
  /** What the responder gives. */
  readonly answer: unknown
  /** What the requester gets of it. */
  readonly answered: unknown
}

interface ExchangeOf<Q extends Format, A extends Format> {
  readonly ask: InputOf<Q>
  readonly asked: OutputOf<Q>
  readonly answer: InputOf<A>
  readonly answered: OutputOf<A>
}

/** A filter and what is asked and answered there. To ask, name a subject of it: `prices.at('price.tea').request(…)`. */
export interface RequestFilterContract<S extends string, X extends Exchange> {
  readonly subject: S
  /**
   * As `requestReply.respond`, with the data of the request. A request that does not match is answered with `handler_failed` and the reason, and the
   * handler does not run; so is a reply that does not match.
   * @throws what `requestReply.respond` throws
   */
  respond(
    bus: Pick<Bus<never>, 'requestReply'>,
    handler: (data: X['asked'], request: Request) => X['answer'] | Promise<X['answer']>,
    options?: RespondOptions,
  ): Promise<Responder>
  /** The contract of one subject that this one takes. @throws invalid_argument for another */
  at(subject: SubjectIn<S>): RequestContract<X>
}

/** A subject and what is asked and answered there. */
export interface RequestContract<X extends Exchange> extends RequestFilterContract<string, X> {
  /**
   * As `requestReply.request`, of data; resolves with the data of the reply.
   * @throws invalid_argument when the data does not match, and then nothing was sent; handler_failed when the request does not match the responder's
   * contract, or the reply does not match: the handler may have done its work then; and what `requestReply.request` throws
   */
  request(bus: Pick<Bus<never>, 'requestReply'>, data: X['ask'], options: RequestOptions): Promise<X['answered']>
}

/**
 * What is asked and answered on a subject, said once for both sides.
 *
 * @param subject a filter may be given: it can be responded on, and `at(subject)` is the contract of one of its subjects
 * @param formats schemas or codecs: `format.ts`. Without them both are JSON, of the types `Q` and `A`, and are not validated
 * @throws invalid_argument
 */
export function defineRequest<const S extends string, Q extends Format, A extends Format>(
  subject: S,
  formats: RequestFormats<Q, A>,
  options?: FormatOptions,
): IsFilter<S> extends true ? RequestFilterContract<S, ExchangeOf<Q, A>> : RequestContract<ExchangeOf<Q, A>>
export function defineRequest<Q = unknown, A = unknown>(
  subject: string,
): RequestContract<{ readonly ask: Q; readonly asked: Q; readonly answer: A; readonly answered: A }>
export function defineRequest(
  subject: string,
  formats?: RequestFormats<Format, Format>,
  options?: FormatOptions,
): RequestContract<Exchange> {
  checkFilter(subject)
  const { request, reply } = optionsOf(formats, ['request', 'reply'], 'formats')
  return new DefinedRequest(subject, Form.of(request, options, 'request'), Form.of(reply, options, 'reply'))
}

class DefinedRequest implements RequestContract<Exchange> {
  readonly subject: string
  readonly #request: Form<unknown, unknown>
  readonly #reply: Form<unknown, unknown>

  constructor(subject: string, request: Form<unknown, unknown>, reply: Form<unknown, unknown>) {
    this.subject = subject
    this.#request = request
    this.#reply = reply
  }

  at(subject: string): RequestContract<Exchange> {
    checkSubject(subject)
    if (!matches(this.subject, subject)) throw invalid('subject', subject, `must be one that "${this.subject}" takes`)
    return new DefinedRequest(subject, this.#request, this.#reply)
  }

  async request(bus: Pick<Bus<never>, 'requestReply'>, data: unknown, options: RequestOptions): Promise<unknown> {
    const requestReply = partOf(bus, 'requestReply')
    if (hasWildcard(this.subject)) {
      throw invalid('subject', this.subject, 'must not hold a wildcard to be asked: name one with at(subject)')
    }
    const written = this.#request.write(data)
    const reply = await requestReply.request(this.subject, written instanceof Promise ? await written : written, options)
    const reading = await this.#reply.read(reply)
    if (reading.matches) return reading.data
    throw new BusError('handler_failed', `the reply on "${this.subject}" does not match: ${reading.reason}`)
  }

  async respond(
    bus: Pick<Bus<never>, 'requestReply'>,
    handler: (data: unknown, request: Request) => unknown,
    options?: RespondOptions,
  ): Promise<Responder> {
    const requestReply = partOf(bus, 'requestReply')
    checkFunction('handler', handler)
    const answer = async (request: Request) => {
      const reading = await this.#request.read(request.payload)
      // What is thrown here is what the requester is told.
      if (!reading.matches) throw new BusError('invalid_argument', `the request does not match: ${reading.reason}`)
      return await this.#reply.write(await handler(reading.data, request), 'reply')
    }
    return await requestReply.respond(this.subject, answer, options)
  }
}
