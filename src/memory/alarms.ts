import type { Clock } from '../runtime/clock.ts'
import { Heap, type Slotted } from './heap.ts'

/** Something that happens by itself at its time: an entry expires, a last attempt ends. */
export interface Alarm extends Slotted {
  /** By the clock's `now()`. */
  at: number
  ring(): void
}

export function alarm(ring: () => void): Alarm {
  return { at: 0, slot: -1, ring }
}

/** Any number of alarms on one timer, which never keeps the process alive. */
export class Alarms {
  readonly #clock: Clock
  readonly #waiting = new Heap<Alarm>((a, b) => a.at < b.at)
  #running = false
  #armedFor = Number.POSITIVE_INFINITY
  #cancel: (() => void) | undefined

  constructor(clock: Clock) {
    this.#clock = clock
  }

  /** Sets it, or moves it. */
  set(it: Alarm, at: number): void {
    it.at = at
    if (it.slot < 0) this.#waiting.push(it)
    else this.#waiting.moved(it)
    this.#arm()
  }

  clear(it: Alarm): void {
    if (it.slot >= 0) this.#waiting.remove(it)
  }

  start(): void {
    this.#running = true
    this.#arm()
  }

  stop(): void {
    this.#running = false
    this.#disarm()
  }

  /** A timer that is armed too early is left alone: it fires, finds nothing due and is armed anew. */
  #arm(): void {
    const next = this.#waiting.peek()
    if (!this.#running || !next || next.at >= this.#armedFor) return
    this.#disarm()
    this.#armedFor = next.at
    // A timer may fire a fraction of a millisecond before its time.
    this.#cancel = this.#clock.setTimer(() => this.#fire(), Math.max(1, next.at - this.#clock.now()), true)
  }

  #disarm(): void {
    this.#cancel?.()
    this.#cancel = undefined
    this.#armedFor = Number.POSITIVE_INFINITY
  }

  #fire(): void {
    this.#disarm()
    const now = this.#clock.now()
    for (let next = this.#waiting.peek(); next && next.at <= now; next = this.#waiting.peek()) {
      this.#waiting.remove(next)
      next.ring()
    }
    this.#arm()
  }
}
