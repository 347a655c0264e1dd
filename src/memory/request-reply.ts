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
import { systemClock } from '../runtime/clock.ts'
import { errorText } from '../runtime/error-text.ts'
import type { Context } from './context.ts'
import type { Answerer, Call } from './switchboard.ts'

type Handler = (request: Request) => Payload | Promise<Payload>

const DEFAULT_CONCURRENCY = 16
const MAX_CONCURRENCY = 10_000
/** How long a closing bus waits for its handlers. */
const CLOSE_GRACE_MS = 500

export class MemoryRequestReply implements RequestReply {
  readonly #context: Context
  readonly #responders = new Set<MemoryResponder>()
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
    const { clock, switchboard, turn } = this.#tools()
    const deadline = clock.now() + timeoutMs
    await turn()
    this.#context.checkOpen()

    const { promise, resolve, reject } = Promise.withResolvers<Uint8Array>()
    let over = false
    const isOver = () => over || clock.now() >= deadline
    const call: Call = { subject, payload: bytes, headers: checkedHeaders, deadline, isOver, answer: resolve, fail: reject }
    const aborted = () => new BusError('timeout', `request on "${subject}": the caller's signal was aborted`, { cause: signal?.reason })
    const onAbort = () => reject(aborted())
    if (signal?.aborted) throw aborted()
    switchboard.call(call)
    const cancel = clock.setTimer(
      () => reject(new BusError('timeout', `request on "${subject}" was not answered within ${timeoutMs} ms`)),
      deadline - clock.now(),
    )
    signal?.addEventListener('abort', onAbort, { once: true })
    this.#requests.add(reject)
    try {
      return await promise
    } finally {
      // What comes now is dropped: a promise is settled once.
      over = true
      this.#requests.delete(reject)
      signal?.removeEventListener('abort', onAbort)
      cancel()
      switchboard.forget(call)
    }
  }

  async respond(subject: string, handler: Handler, options: RespondOptions = {}): Promise<Responder> {
    this.#context.checkOpen()
    checkFilter(subject)
    checkFunction('handler', handler)
    const { concurrency = DEFAULT_CONCURRENCY } = optionsOf(options, ['concurrency'])
    checkInteger('concurrency', concurrency, 1, MAX_CONCURRENCY)
    await this.#tools().turn()
    this.#context.checkOpen()
    const responder: MemoryResponder = new MemoryResponder(this.#context, subject, handler, concurrency, () =>
      this.#responders.delete(responder),
    )
    this.#responders.add(responder)
    return responder
  }

  async close(): Promise<void> {
    for (const end of this.#requests) end(closedError('the bus'))
    const grace = Promise.withResolvers<void>()
    // By real time: nobody drives the clock of a test while he waits for close().
    const cancel = systemClock.setTimer(grace.resolve, CLOSE_GRACE_MS)
    await Promise.race([grace.promise, Promise.all([...this.#responders].map((responder) => responder.close()))])
    cancel()
  }

  #tools() {
    const { store } = this.#context
    return { clock: store.clock, switchboard: store.switchboard, turn: () => store.turn() }
  }
}

class MemoryResponder implements Responder {
  readonly #context: Context
  readonly #handler: Handler
  readonly #onClose: () => void
  readonly #answerer: Answerer
  readonly #running = new Map<AbortController, Promise<void>>()
  #closing: Promise<void> | undefined

  constructor(context: Context, filter: string, handler: Handler, concurrency: number, onClose: () => void) {
    this.#context = context
    this.#handler = handler
    this.#onClose = onClose
    this.#answerer = { filter, concurrency, running: 0, run: (call) => this.#start(call) }
    context.store.switchboard.add(this.#answerer)
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
    this.#context.store.switchboard.remove(this.#answerer)
    for (const controller of this.#running.keys()) controller.abort(closedError('the responder'))
    await Promise.all(this.#running.values())
    this.#onClose()
  }

  #start(call: Call): void {
    const { clock, switchboard } = this.#context.store
    const controller = new AbortController()
    const late = () => controller.abort(new BusError('timeout', 'the deadline of the request is over'))
    const cancel = clock.setTimer(late, call.deadline - clock.now(), true)
    const done = this.#handle(call, controller.signal).finally(() => {
      cancel()
      this.#running.delete(controller)
      switchboard.done(this.#answerer)
    })
    this.#running.set(controller, done)
  }

  async #handle(call: Call, signal: AbortSignal): Promise<void> {
    const { store, isClosed, maxPayloadBytes } = this.#context
    await store.turn()
    if (call.isOver()) return
    let answer: () => void
    try {
      const { subject, payload, headers } = call
      const reply = checkPayload(await this.#handler({ subject, payload, headers, signal }), maxPayloadBytes, 'reply')
      answer = () => call.answer(reply)
    } catch (error) {
      answer = () => call.fail(new BusError('handler_failed', errorText(error)))
    }
    await store.turn()
    // An answer to the abort at the deadline comes too late, too.
    if (!isClosed() && !call.isOver()) answer()
  }
}
