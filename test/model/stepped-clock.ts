import type { Clock } from '../../src/runtime/clock.ts'

interface Timer {
  readonly at: number
  readonly ms: number
  readonly callback: () => void
  readonly real: NodeJS.Timeout
}

/**
 * What the local deadlines of a Postgres bus go by while a test shifts the server's time: it stands still until it jumps, so
 * that what a step takes never counts. Its timers also ring by real time, because polling must go on; whoever is
 * rung too early looks at `now()` and waits again.
 */
export class SteppedClock implements Clock {
  readonly #timers = new Set<Timer>()
  #now = 0

  now(): number {
    return this.#now
  }

  date(): Date {
    return new Date()
  }

  setTimer(callback: () => void, ms: number): () => void {
    const timer: Timer = {
      at: this.#now + Math.max(0, ms),
      ms,
      callback,
      real: setTimeout(() => this.#ring(timer), Math.min(Math.max(0, ms), 2_147_483_647)).unref(),
    }
    this.#timers.add(timer)
    return () => this.#forget(timer)
  }

  /** How long until the next timer rings that was set for so long at the least; shorter ones are polls. */
  nextInMs(setForMs: number): number {
    let next = Number.POSITIVE_INFINITY
    for (const { at, ms } of this.#timers) if (ms >= setForMs && at > this.#now) next = Math.min(next, at - this.#now)
    return next
  }

  jump(ms: number): void {
    this.#now += ms
    const due = [...this.#timers].filter(({ at }) => at <= this.#now).sort((a, b) => a.at - b.at)
    for (const timer of due) this.#ring(timer)
  }

  #ring(timer: Timer): void {
    if (!this.#timers.has(timer)) return
    this.#forget(timer)
    timer.callback()
  }

  #forget(timer: Timer): void {
    clearTimeout(timer.real)
    this.#timers.delete(timer)
  }
}
