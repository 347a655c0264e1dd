/** Requests are core NATS: a queue group answers, the server knows at once when nobody is there, and nothing is stored. */

import { type Msg, headers as newHeaders, type Subscription } from '@nats-io/transport-node'
import {
  BusError,
  checkDuration,
  checkFilter,
  checkFunction,
  checkHeaders,
  checkInteger,
  checkPayload,
  checkSignal,
  checkSubject,
  checkTotal,
  closedError,
  optionsOf,
  type Payload,
  type Request,
  type RequestOptions,
  type RequestReply,
  type Responder,
  type RespondOptions,
} from '../core/index.ts'
import { errorText } from '../runtime/error-text.ts'
import { ANSWER_WITHIN_MS, type Context } from './context.ts'
import { isNoResponders, isTimeout, natsError } from './errors.ts'
import { headersOf, pack, parsed, plain, unpack } from './wire.ts'

type Handler = (request: Request) => Payload | Promise<Payload>

const DEFAULT_CONCURRENCY = 16
const MAX_CONCURRENCY = 10_000
/** How long a closing bus waits for its handlers. */
const CLOSE_GRACE_MS = 500
/** One group for all: of the responders whose subjects match, whatever those are, the server takes one. */
const GROUP = 'klieo'
const TIMEOUT = 'klieo-timeout-ms'
const FAILED = 'klieo-failed'
/** Nobody is there: asked again after each of these. */
const HEARD_OF_MS = [5, 15, 30]
/** On its way a request ages unseen: its responder counts from the arrival, and gives up so much earlier. */
const TRANSIT_MS = 5

export class NatsRequestReply implements RequestReply {
  readonly #context: Context
  readonly #responders = new Set<NatsResponder>()
  /** How to end each request of this bus that is under way. */
  readonly #requests = new Set<(error: BusError) => void>()

  constructor(context: Context) {
    this.#context = context
  }

  async request(subject: string, payload: Payload, options: RequestOptions): Promise<Uint8Array> {
    this.#context.checkOpen()
    checkSubject(subject)
    const bytes = checkPayload(payload, this.#context.maxPayloadBytes)
    const { timeoutMs, headers, signal } = optionsOf(options ?? null, ['timeoutMs', 'headers', 'signal'])
    checkDuration('timeoutMs', timeoutMs)
    const checkedHeaders = checkHeaders(headers)
    checkTotal(bytes, checkedHeaders, this.#context.maxPayloadBytes)
    checkSignal(signal)
    const aborted = () => new BusError('timeout', `request on "${subject}": the caller's signal was aborted`, { cause: signal?.reason })
    if (signal?.aborted) throw aborted()
    const late = () => new BusError('timeout', `request on "${subject}" was not answered within ${timeoutMs} ms`)
    if (timeoutMs === 0) throw late()
    const { promise, resolve, reject } = Promise.withResolvers<Uint8Array>()
    const onAbort = () => reject(aborted())
    signal?.addEventListener('abort', onAbort, { once: true })
    this.#requests.add(reject)
    void this.#ask(subject, bytes, checkedHeaders, timeoutMs, late).then(resolve, reject)
    try {
      return await promise
    } finally {
      this.#requests.delete(reject)
      signal?.removeEventListener('abort', onAbort)
    }
  }

  async respond(subject: string, handler: Handler, options: RespondOptions = {}): Promise<Responder> {
    this.#context.checkOpen()
    checkFilter(subject)
    checkFunction('handler', handler)
    const { concurrency = DEFAULT_CONCURRENCY } = optionsOf(options, ['concurrency'])
    checkInteger('concurrency', concurrency, 1, MAX_CONCURRENCY)
    const responder: NatsResponder = new NatsResponder(this.#context, subject, handler, concurrency, () =>
      this.#responders.delete(responder),
    )
    this.#responders.add(responder)
    try {
      // The server knows of it when it answers what was sent after it.
      await this.#context.ask(() => flushed(this.#context))
      this.#context.checkOpen()
    } catch (error) {
      // Its caller has nothing to close it by.
      void responder.close()
      throw error
    }
    return responder
  }

  async close(): Promise<void> {
    for (const end of this.#requests) end(closedError('the bus'))
    const grace = Promise.withResolvers<void>()
    const cancel = this.#context.clock.setTimer(grace.resolve, CLOSE_GRACE_MS)
    await Promise.race([grace.promise, Promise.all([...this.#responders].map((responder) => responder.close()))])
    cancel()
  }

  async #ask(
    subject: string,
    bytes: Uint8Array,
    headers: Readonly<Record<string, string>>,
    timeoutMs: number,
    late: () => BusError,
  ): Promise<Uint8Array> {
    const { nc, names, clock } = this.#context
    const packed = pack(bytes, headers, { [TIMEOUT]: String(timeoutMs) })
    const endsAt = clock.now() + timeoutMs
    const ask = () =>
      nc.request(names.request(subject), packed.payload, { timeout: Math.max(1, endsAt - clock.now()), headers: packed.headers })
    let reply: Msg
    try {
      reply = await (nc.info?.cluster === undefined ? ask() : this.#heardOf(ask, endsAt))
    } catch (error) {
      if (isNoResponders(error))
        throw new BusError('not_found', `nobody answers requests on "${subject}"; start a responder there`, { cause: error })
      if (isTimeout(error)) throw late()
      throw natsError(error)
    }
    const failed = headersOf(reply)?.get(FAILED)
    if (failed) throw new BusError('handler_failed', String(parsed(failed) ?? failed))
    return plain(reply.data)
  }

  /** In a cluster a server hears of a responder at another one a little after that one has answered him. */
  async #heardOf(ask: () => Promise<Msg>, endsAt: number): Promise<Msg> {
    const { clock } = this.#context
    for (const pauseMs of HEARD_OF_MS) {
      try {
        return await ask()
      } catch (error) {
        if (!isNoResponders(error) || clock.now() + pauseMs >= endsAt) throw error
      }
      await new Promise<void>((resolve) => clock.setTimer(resolve, pauseMs))
    }
    return ask()
  }
}

/** Until the server has seen what was sent so far: a flush of the client's waits as long as the connection stands, answered or not. */
async function flushed({ nc, clock }: Context): Promise<void> {
  const late = Promise.withResolvers<never>()
  const cancel = clock.setTimer(() => late.reject(new BusError('connection', 'NATS did not answer in time')), ANSWER_WITHIN_MS)
  try {
    await Promise.race([nc.flush(), late.promise])
  } finally {
    cancel()
  }
}

class NatsResponder implements Responder {
  readonly #context: Context
  readonly #handler: Handler
  readonly #concurrency: number
  readonly #onClose: () => void
  readonly #subscription: Subscription
  readonly #waiting: { readonly msg: Msg; readonly deadline: number }[] = []
  readonly #running = new Map<AbortController, Promise<void>>()
  #closing: Promise<void> | undefined

  constructor(context: Context, filter: string, handler: Handler, concurrency: number, onClose: () => void) {
    this.#context = context
    this.#handler = handler
    this.#concurrency = concurrency
    this.#onClose = onClose
    this.#subscription = context.nc.subscribe(context.names.request(filter), {
      queue: GROUP,
      callback: (error, msg) => {
        if (!error) this.#take(msg)
      },
    })
  }

  /** Takes no more and waits for what runs, which learns of it by its signal. Its reply counts unless the bus is closed. */
  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  async #close(): Promise<void> {
    try {
      this.#subscription.unsubscribe()
      await flushed(this.#context)
    } catch {
      // Without a connection nobody is asked any more.
    }
    this.#waiting.length = 0
    for (const controller of this.#running.keys()) controller.abort(closedError('the responder'))
    await Promise.all(this.#running.values())
    this.#onClose()
  }

  #take(msg: Msg): void {
    const timeoutMs = Number(headersOf(msg)?.get(TIMEOUT) || 0)
    const margin = Math.min(TRANSIT_MS, timeoutMs / 10)
    // One of another client of NATS says nothing of a deadline.
    const deadline = timeoutMs > 0 ? this.#context.clock.now() + timeoutMs - margin : Number.POSITIVE_INFINITY
    this.#waiting.push({ msg, deadline })
    this.#next()
  }

  #next(): void {
    while (this.#running.size < this.#concurrency) {
      const next = this.#waiting.shift()
      if (!next) return
      if (this.#context.clock.now() < next.deadline) this.#start(next.msg, next.deadline)
    }
  }

  #start(msg: Msg, deadline: number): void {
    const { clock } = this.#context
    const controller = new AbortController()
    const late = () => controller.abort(new BusError('timeout', 'the deadline of the request is over'))
    const cancel = Number.isFinite(deadline) ? clock.setTimer(late, deadline - clock.now() + TRANSIT_MS, true) : () => {}
    const done = this.#handle(msg, deadline, controller.signal).finally(() => {
      cancel()
      this.#running.delete(controller)
      this.#next()
    })
    this.#running.set(controller, done)
  }

  async #handle(msg: Msg, deadline: number, signal: AbortSignal): Promise<void> {
    const { isClosed, maxPayloadBytes, names } = this.#context
    let reply: Uint8Array
    const headers = newHeaders()
    try {
      const { payload, headers: given } = unpack(headersOf(msg), msg.data)
      const request = { subject: names.requestSubjectOf(msg.subject), payload, headers: given, signal }
      reply = checkPayload(await this.#handler(request), maxPayloadBytes, 'reply')
    } catch (error) {
      reply = new Uint8Array(0)
      headers.set(FAILED, JSON.stringify(errorText(error)))
    }
    // An answer to the abort at the deadline comes too late.
    if (isClosed() || this.#context.clock.now() >= deadline) return
    try {
      msg.respond(reply, { headers })
    } catch {
      // The connection is gone: the requester's timeout tells him.
    }
  }
}
