/**
 * What ends by itself at its time unless it is called off first. A bus holds thousands of leases, and nearly all of them
 * are called off long before: so they stand in a queue for each duration, in the order of their ends, on one timer each.
 */

import type { Clock } from './clock.ts'

export interface Expiring {
  /** Its time is over; it is in no queue any more. */
  lost(): void
}

export class Deadline {
  readonly owner: Expiring
  /** By the clock's `now()`. */
  at = 0
  /** Where it stands; `undefined`: in no queue. */
  lane: Lane | undefined
  before: Deadline | undefined
  after: Deadline | undefined

  constructor(owner: Expiring) {
    this.owner = owner
  }

  /** Sets it, or moves it. @param durationMs how long it is from its beginning to `at` */
  set(clock: Clock, durationMs: number, at: number): void {
    this.clear()
    laneOf(clock, durationMs).add(this, at)
  }

  clear(): void {
    this.lane?.remove(this)
  }
}

/** Times closer than this are the same: a timer may fire a fraction of a millisecond early. */
const PRECISION_MS = 1

class Lane {
  readonly #clock: Clock
  readonly #onEmpty: () => void
  #first: Deadline | undefined
  #last: Deadline | undefined
  #armedFor = Number.POSITIVE_INFINITY
  #cancel: (() => void) | undefined

  constructor(clock: Clock, onEmpty: () => void) {
    this.#clock = clock
    this.#onEmpty = onEmpty
  }

  /** Nearly always at the end: what lasts equally long ends in the order in which it began. */
  add(it: Deadline, at: number): void {
    it.at = at
    it.lane = this
    let before = this.#last
    while (before && before.at > at) before = before.before
    const after = before ? before.after : this.#first
    it.before = before
    it.after = after
    if (before) before.after = it
    else this.#first = it
    if (after) after.before = it
    else this.#last = it
    this.#arm()
  }

  remove(it: Deadline): void {
    const { before, after } = it
    if (before) before.after = after
    else this.#first = after
    if (after) after.before = before
    else this.#last = before
    it.lane = it.before = it.after = undefined
  }

  /** A timer that is armed too early is left alone: it fires, finds nothing due and is armed anew. */
  #arm(): void {
    const first = this.#first
    if (!first || first.at >= this.#armedFor) return
    this.#cancel?.()
    this.#armedFor = first.at
    this.#cancel = this.#clock.setTimer(() => this.#fire(), Math.max(0, first.at - this.#clock.now()), true)
  }

  #fire(): void {
    this.#armedFor = Number.POSITIVE_INFINITY
    this.#cancel = undefined
    const now = this.#clock.now()
    for (let first = this.#first; first && first.at - now < PRECISION_MS; first = this.#first) {
      this.remove(first)
      first.owner.lost()
    }
    if (this.#first) this.#arm()
    else if (this.#cancel === undefined) this.#onEmpty()
  }
}

const lanes = new WeakMap<Clock, Map<number, Lane>>()

function laneOf(clock: Clock, durationMs: number): Lane {
  const ofClock = lanes.get(clock) ?? new Map<number, Lane>()
  lanes.set(clock, ofClock)
  const lane = ofClock.get(durationMs) ?? new Lane(clock, () => ofClock.delete(durationMs))
  ofClock.set(durationMs, lane)
  return lane
}
