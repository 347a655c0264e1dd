/**
 * A request is a row that one live responder claims; its reply is a row that the requester picks up. Both are told of by
 * notification and found by polling without one.
 */

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
  type Headers,
  isBusError,
  optionsOf,
  type Payload,
  type Request,
  type RequestOptions,
  type RequestReply,
  type Responder,
  type RespondOptions,
} from '../core/index.ts'
import { jittered, reconnectDelayMs } from '../runtime/backoff.ts'
import type { Ear } from '../runtime/bell.ts'
import { errorText } from '../runtime/error-text.ts'
import { asBuffer } from './arrays.ts'
import type { Context } from './context.ts'
import type { Row } from './database.ts'
import { isNotifyQueueFull } from './errors.ts'
import type { Presence } from './presence.ts'
import { CLAIM_REQUESTS, PICK_UP, REPLY, SEND, WITHDRAW } from './request-reply.sql.ts'

/** How long a closing bus lets its handlers reply. */
const CLOSE_GRACE_MS = 500
const REPLY_TRIES = 5

interface Pending {
  resolve(reply: Uint8Array): void
  reject(error: unknown): void
}

interface ReplyRow extends Row {
  readonly request_id: string
  readonly ok: boolean
  readonly payload: Uint8Array
}

interface RequestRow extends Row {
  readonly id: string
  readonly subject: string
  readonly headers: Headers
  readonly payload: Uint8Array
  readonly left_ms: number
}

export class PostgresRequestReply implements RequestReply {
  readonly #context: Context
  readonly #presence: Presence
  readonly #pending = new Map<string, Pending>()
  readonly #responders = new Set<PostgresResponder>()
  #picking: Promise<void> | undefined
  #ear: Ear | undefined

  constructor(context: Context, presence: Presence) {
    this.#context = context
    this.#presence = presence
  }

  async request(subject: string, payload: Payload, options: RequestOptions): Promise<Uint8Array> {
    const { clock, maxPayloadBytes } = this.#context
    this.#context.checkOpen()
    checkSubject(subject)
    const bytes = checkPayload(payload, maxPayloadBytes)
    const { timeoutMs, headers: given, signal } = optionsOf(options ?? null, ['timeoutMs', 'headers', 'signal'])
    checkDuration('timeoutMs', timeoutMs)
    const headers = checkHeaders(given)
    checkTotal(bytes, headers, maxPayloadBytes)
    checkSignal(signal)

    const id = crypto.randomUUID()
    const reply = Promise.withResolvers<Uint8Array>()
    // Whoever settles first decides; a rejection before anybody waits is no unhandled one.
    reply.promise.catch(() => {})
    this.#pending.set(id, reply)
    const cancelTimer = clock.setTimer(
      () => reply.reject(new BusError('timeout', `request "${subject}": no reply within ${timeoutMs} ms`)),
      timeoutMs,
    )
    const onAbort = () =>
      reply.reject(new BusError('timeout', `request "${subject}": the caller's signal was aborted`, { cause: signal?.reason }))
    if (signal?.aborted) onAbort()
    else signal?.addEventListener('abort', onAbort, { once: true })
    let answered = false
    let sending: Promise<unknown> = Promise.resolve()
    try {
      if (!signal?.aborted) {
        // It has its ear before anything is sent, and looks when it is rung: a look right away would be one too early.
        this.#pickUp()
        const sent = this.#send(id, subject, headers, bytes, clock.now() + timeoutMs)
        sending = sent.catch(() => {})
        sent.then((sent) => {
          if (!sent) reply.reject(new BusError('not_found', `request "${subject}": no live responder; start one, or check the subject`))
        }, reply.reject)
      }
      const result = await reply.promise
      answered = true
      return result
    } catch (error) {
      answered = isBusError(error, 'not_found') || isBusError(error, 'handler_failed')
      throw error
    } finally {
      cancelTimer()
      signal?.removeEventListener('abort', onAbort)
      this.#pending.delete(id)
      if (this.#pending.size === 0) this.#ear?.ring()
      // A request that nobody waits for must not be started: taken back when it has been sent, not before.
      if (!answered) void sending.then(() => this.#context.db.query(WITHDRAW, [id], 'request')).catch(() => {})
    }
  }

  async respond(
    subject: string,
    handler: (request: Request) => Payload | Promise<Payload>,
    options: RespondOptions = {},
  ): Promise<Responder> {
    this.#context.checkOpen()
    checkFilter(subject)
    checkFunction('handler', handler)
    const { concurrency = 16 } = optionsOf(options, ['concurrency'])
    checkInteger('concurrency', concurrency, 1, 10_000)
    const instance = await this.#presence.instance()
    const responder = new PostgresResponder(this.#context, this.#presence, instance, subject, handler, concurrency, (closed) =>
      this.#responders.delete(closed),
    )
    this.#responders.add(responder)
    try {
      await this.#presence.register(responder, subject)
      this.#context.checkOpen()
    } catch (error) {
      await responder.end()
      throw error
    }
    responder.start()
    return responder
  }

  async close(): Promise<void> {
    for (const { reject } of this.#pending.values()) reject(closedError('the bus'))
    this.#ear?.ring()
    await Promise.all([...this.#responders].map((responder) => responder.end(CLOSE_GRACE_MS)))
    await this.#presence.close()
    await this.#picking
  }

  async #send(id: string, subject: string, headers: Headers, payload: Uint8Array, deadline: number): Promise<boolean> {
    const { clock, db, ringer, instance, bell } = this.#context
    const topic = { kind: 'request', name: subject } as const
    const notice = ringer.notice([topic])
    // What is left when there is a connection for it.
    const send = (channel: string | null) =>
      db.query<{ sent: boolean }>(
        SEND,
        () => [id, subject, JSON.stringify(headers), asBuffer(payload), instance, Math.max(0, deadline - clock.now()), channel, notice],
        'request',
      )
    const [row] = await send(ringer.channel).catch((error) => {
      if (isNotifyQueueFull(error)) return send(null)
      throw error
    })
    if (row?.sent !== true) return false
    bell.ring([topic])
    return true
  }

  /** Runs while somebody waits for a reply. */
  #pickUp(): void {
    this.#picking ??= this.#pick().finally(() => {
      this.#picking = undefined
      if (this.#pending.size > 0 && !this.#context.isClosed()) this.#pickUp()
    })
  }

  async #pick(): Promise<void> {
    const { bell, db, instance, pollIntervalMs } = this.#context
    const ear = bell.listen({ kind: 'inbox', name: instance })
    this.#ear = ear
    let failures = 0
    try {
      for (;;) {
        await ear.wait(failures === 0 ? jittered(pollIntervalMs) : reconnectDelayMs(failures))
        if (this.#pending.size === 0 || this.#context.isClosed()) return
        try {
          const replies = await db.query<ReplyRow>(PICK_UP, [instance], 'request')
          failures = 0
          for (const { request_id, ok, payload } of replies) {
            const pending = this.#pending.get(request_id)
            if (ok) pending?.resolve(payload)
            else pending?.reject(new BusError('handler_failed', new TextDecoder().decode(payload)))
            this.#pending.delete(request_id)
          }
          if (this.#pending.size === 0) return
        } catch {
          failures++
        }
      }
    } finally {
      ear.close()
      this.#ear = undefined
    }
  }
}

class PostgresResponder implements Responder {
  readonly #context: Context
  readonly #presence: Presence
  readonly #instance: number
  readonly #filter: string
  readonly #handler: (request: Request) => Payload | Promise<Payload>
  readonly #concurrency: number
  readonly #onEnd: (responder: PostgresResponder) => void
  readonly #running = new Map<AbortController, Promise<void>>()
  readonly #ear: Ear
  #loop: Promise<void> | undefined
  #ending: Promise<void> | undefined

  constructor(
    context: Context,
    presence: Presence,
    instance: number,
    filter: string,
    handler: (request: Request) => Payload | Promise<Payload>,
    concurrency: number,
    onEnd: (responder: PostgresResponder) => void,
  ) {
    this.#context = context
    this.#presence = presence
    this.#instance = instance
    this.#filter = filter
    this.#handler = handler
    this.#concurrency = concurrency
    this.#onEnd = onEnd
    this.#ear = context.bell.listen({ kind: 'request', name: filter })
  }

  start(): void {
    this.#loop = this.#run()
  }

  /** Takes no more requests, tells the handlers that run by their signals, and waits for their replies. Idempotent. */
  close(): Promise<void> {
    return this.end(Number.POSITIVE_INFINITY)
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  /** @param graceMs how long running handlers may take; then nobody waits for them */
  end(graceMs = 0): Promise<void> {
    const before = this.#ending
    this.#ending ??= this.#end(graceMs)
    for (const controller of this.#running.keys()) controller.abort(closedError('the responder'))
    if (before === undefined || graceMs === Number.POSITIVE_INFINITY) return this.#ending
    // Closed before, it may wait for a handler that never ends; whoever closes the bus does not.
    const grace = Promise.withResolvers<void>()
    const cancel = this.#context.clock.setTimer(grace.resolve, graceMs)
    return Promise.race([before, grace.promise]).finally(cancel)
  }

  async #end(graceMs: number): Promise<void> {
    this.#ear.ring()
    await this.#presence.unregister(this).catch(() => {}) // it counts as live as long as its process does
    await this.#loop
    this.#ear.close()
    const done = Promise.all(this.#running.values()).then(() => {})
    if (graceMs === Number.POSITIVE_INFINITY && !this.#context.isClosed()) await done
    else {
      let cancel = () => {}
      await Promise.race([
        done,
        new Promise<void>((resolve) => (cancel = this.#context.clock.setTimer(resolve, Math.min(graceMs, CLOSE_GRACE_MS)))),
      ])
      cancel()
    }
    this.#onEnd(this)
  }

  async #run(): Promise<void> {
    const { db, pollIntervalMs } = this.#context
    let failures = 0
    while (!this.#ending && !this.#context.isClosed()) {
      const free = this.#concurrency - this.#running.size
      if (free <= 0) {
        await this.#ear.wait(pollIntervalMs)
        continue
      }
      try {
        const { clock } = this.#context
        let askedAt = clock.now()
        // Looked at when there is a connection: the time spent waiting for one is not the requests'.
        const values = () => {
          askedAt = clock.now()
          return [this.#filter, this.#instance, free]
        }
        const requests = await db.query<RequestRow>(CLAIM_REQUESTS, values, 'respond')
        failures = 0
        // An answer that came late is about requests that nobody waits for any more.
        for (const request of requests) if (clock.now() - askedAt < request.left_ms) this.#start(request)
        if (requests.length < free) await this.#ear.wait(jittered(pollIntervalMs))
      } catch (error) {
        if (isBusError(error, 'closed')) return
        await this.#ear.wait(reconnectDelayMs(++failures))
      }
    }
  }

  #start(row: RequestRow): void {
    const controller = new AbortController()
    const cancelTimer = this.#context.clock.setTimer(
      () => controller.abort(new BusError('timeout', 'the requester has stopped waiting')),
      row.left_ms,
      true,
    )
    const handled = this.#handle(row, controller.signal).finally(() => {
      cancelTimer()
      // Only when all places were taken is there something that was not asked for.
      const wasFull = this.#running.size >= this.#concurrency
      this.#running.delete(controller)
      if (wasFull) this.#ear.ring()
    })
    this.#running.set(controller, handled)
    if (this.#context.isClosed()) controller.abort(closedError('the bus'))
  }

  async #handle({ id, subject, headers, payload }: RequestRow, signal: AbortSignal): Promise<void> {
    let ok = true
    let reply: Uint8Array
    try {
      reply = checkPayload(await this.#handler({ subject, payload, headers, signal }), this.#context.maxPayloadBytes, 'reply')
    } catch (error) {
      ok = false
      reply = new TextEncoder().encode(errorText(error))
    }
    const { db, ringer, bell } = this.#context
    const notice = ringer.notice([{ kind: 'inbox', name: '<inbox>' }])
    let channel: string | null = ringer.channel
    for (let tries = 1; tries <= REPLY_TRIES; tries++) {
      try {
        const [row] = await db.query<{ inbox: string | null }>(REPLY, [id, this.#instance, ok, asBuffer(reply), channel, notice], 'reply')
        if (row?.inbox != null) bell.ring([{ kind: 'inbox', name: row.inbox }])
        return
      } catch (error) {
        if (isNotifyQueueFull(error)) channel = null
        if (!isBusError(error, 'connection') && !isBusError(error, 'unavailable')) return
        await new Promise<void>((resolve) => this.#context.clock.setTimer(resolve, reconnectDelayMs(tries)))
      }
    }
  }
}
