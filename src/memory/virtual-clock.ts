import type { Clock } from '../runtime/clock.ts'

interface Timer {
  readonly at: number
  readonly callback: () => void
}

/** Kept from before anybody's fake timers. */
const immediate = setImmediate
/** A chain of so many calls of the bus ends between two timers. */
const TURNS = 10

/**
 * A clock that stands still until it is told to go on: `MemoryBus.create({ clock: new VirtualClock() })`. Then leases,
 * delays and expiries take no time in a test. A `Worker` heartbeats by the real time, whatever its bus goes by.
 */
export class VirtualClock implements Clock {
  readonly #startedAt: number
  readonly #timers = new Set<Timer>()
  #now = 0

  /** @param start the time of day at the start. @default now */
  constructor(start: Date = new Date()) {
    this.#startedAt = start.getTime()
  }

  now(): number {
    return this.#now
  }

  date(): Date {
    return new Date(this.#startedAt + this.#now)
  }

  setTimer(callback: () => void, ms: number): () => void {
    const timer = { at: this.#now + Math.max(0, ms), callback }
    this.#timers.add(timer)
    return () => this.#timers.delete(timer)
  }

  /** Goes on by so much; what becomes due meanwhile happens one after the other, each followed by what it causes. */
  async advance(ms: number): Promise<void> {
    const end = this.#now + ms
    await settle()
    for (;;) {
      let next: Timer | undefined
      for (const timer of this.#timers) if (timer.at <= end && (!next || timer.at < next.at)) next = timer
      if (!next) break
      this.#timers.delete(next)
      this.#now = Math.max(this.#now, next.at)
      next.callback()
      await settle()
    }
    this.#now = end
    await settle()
  }
}

async function settle(): Promise<void> {
  for (let turn = 0; turn < TURNS; turn++) await new Promise<void>((resolve) => void immediate(resolve))
}
