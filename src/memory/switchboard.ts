/**
 * Requests on their way to the responders of all buses on the store.
 *
 *   waiting   every responder that matches is busy
 *   running   with exactly one responder
 * and it is over when it is answered, when its deadline is over or when its requester gives up; an answer that comes later
 * is dropped.
 */

import { BusError, type Headers, matches } from '../core/index.ts'

export interface Call {
  readonly subject: string
  readonly payload: Uint8Array
  readonly headers: Headers
  /** By the clock's `now()`. */
  readonly deadline: number
  /** Nobody waits for the answer any more: it is not started. */
  isOver(): boolean
  answer(reply: Uint8Array): void
  fail(error: BusError): void
}

export interface Answerer {
  readonly filter: string
  readonly concurrency: number
  running: number
  run(call: Call): void
}

export class Switchboard {
  /** The one that was given a call last is the last: so they share the load. */
  readonly #answerers = new Set<Answerer>()
  readonly #waiting = new Set<Call>()

  add(answerer: Answerer): void {
    this.#answerers.add(answerer)
    this.#offerWaiting(answerer)
  }

  remove(answerer: Answerer): void {
    this.#answerers.delete(answerer)
    for (const call of this.#waiting) {
      if (this.#matching(call.subject).length > 0) continue
      this.#waiting.delete(call)
      call.fail(nobody(call.subject))
    }
  }

  /** @throws not_found when nobody answers on the subject */
  call(call: Call): void {
    const answerers = this.#matching(call.subject)
    if (answerers.length === 0) throw nobody(call.subject)
    const free = answerers.filter(({ running, concurrency }) => running < concurrency)
    const [first, ...others] = free
    if (!first) this.#waiting.add(call)
    else
      this.#give(
        call,
        others.reduce((least, one) => (one.running < least.running ? one : least), first),
      )
  }

  /** Its requester no longer waits. */
  forget(call: Call): void {
    this.#waiting.delete(call)
  }

  /** A call has ended there. */
  done(answerer: Answerer): void {
    answerer.running--
    if (this.#answerers.has(answerer)) this.#offerWaiting(answerer)
  }

  #matching(subject: string): Answerer[] {
    return [...this.#answerers].filter(({ filter }) => matches(filter, subject))
  }

  #offerWaiting(answerer: Answerer): void {
    for (const call of this.#waiting) {
      if (answerer.running >= answerer.concurrency) return
      if (matches(answerer.filter, call.subject)) this.#give(call, answerer)
    }
  }

  #give(call: Call, answerer: Answerer): void {
    this.#waiting.delete(call)
    this.#answerers.delete(answerer)
    this.#answerers.add(answerer)
    answerer.running++
    answerer.run(call)
  }
}

function nobody(subject: string): BusError {
  return new BusError('not_found', `nobody answers requests on "${subject}"; start a responder there`)
}
