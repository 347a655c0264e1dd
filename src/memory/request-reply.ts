import {
  BusError,
  checkDuration,
  checkFilter,
  checkFunction,
  checkHeaders,
  checkInteger,
  checkOptions,
  checkPayload,
  checkSignal,
  checkSubject,
  closedError,
  type Payload,
  type Request,
  type RequestOptions,
  type RequestReply,
  type Responder,
  type RespondOptions,
} from '../core/index.ts'
import type { Context } from './context.ts'
import type { Answerer, Call } from './switchboard.ts'

type Handler = (request: Request) => Payload | Promise<Payload>

const DEFAULT_CONCURRENCY = 16
const MAX_CONCURRENCY = 10_000

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
    checkOptions(options)
    const { timeoutMs, headers, signal } = options ?? {}
    checkDuration('timeoutMs', timeoutMs)
    const checkedHeaders = checkHeaders(headers)
    checkSignal(signal)
    const { clock, switchboard, turn } = this.#tools()
    const deadline = clock.now() + timeoutMs
    await turn()
    this.#context.checkOpen()

    const { promise, resolve, reject } = Promise.withResolvers<Uint8Array>()
    const call: Call = { subject, payload: bytes, headers: checkedHeaders, deadline, answer: resolve, fail: reject }
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
    checkOptions(options)
    const { concurrency = DEFAULT_CONCURRENCY } = options
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
    await Promise.all([...this.#responders].map((responder) => responder.close()))
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
  readonly #running = new Set<AbortController>()
  #closed = false

  constructor(context: Context, filter: string, handler: Handler, concurrency: number, onClose: () => void) {
    this.#context = context
    this.#handler = handler
    this.#onClose = onClose
    this.#answerer = { filter, concurrency, running: 0, run: (call) => void this.#run(call) }
    context.store.switchboard.add(this.#answerer)
  }

  /** Takes no more; what runs learns of it by its signal, and its reply still counts unless the bus is closed. */
  async close(): Promise<void> {
    if (this.#closed) return
    this.#closed = true
    this.#context.store.switchboard.remove(this.#answerer)
    for (const controller of this.#running) controller.abort(closedError('the responder'))
    this.#onClose()
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  async #run(call: Call): Promise<void> {
    const { store, isClosed, maxPayloadBytes } = this.#context
    const { clock, switchboard } = store
    const controller = new AbortController()
    this.#running.add(controller)
    let cancel: (() => void) | undefined
    try {
      await store.turn()
      const left = call.deadline - clock.now()
      if (left <= 0) return
      if (this.#closed) controller.abort(closedError('the responder'))
      cancel = clock.setTimer(() => controller.abort(new BusError('timeout', 'the deadline of the request is over')), left, true)
      const { subject, payload, headers } = call
      const reply = checkPayload(await this.#handler({ subject, payload, headers, signal: controller.signal }), maxPayloadBytes, 'reply')
      await store.turn()
      if (!isClosed()) call.answer(reply)
    } catch (error) {
      await store.turn()
      if (!isClosed()) call.fail(new BusError('handler_failed', messageOf(error)))
    } finally {
      cancel?.()
      this.#running.delete(controller)
      switchboard.done(this.#answerer)
    }
  }
}

/** The requester learns what was thrown, and nothing of where. */
function messageOf(error: unknown): string {
  let text = ''
  try {
    text = error instanceof Error ? error.message : String(error)
  } catch {
    // It has no text.
  }
  return text === '' ? 'the handler threw something without a message' : text
}
