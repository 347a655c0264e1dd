/** Time as the runtime sees it, so that the memory backend can be driven by a clock of the test's own. */
export interface Clock {
  /** Monotonic milliseconds; only differences mean anything. */
  now(): number
  /** The time of day. */
  date(): Date
  /**
   * Calls back once after `ms`; answers how to cancel it.
   * @param background does not keep the process alive
   */
  setTimer(callback: () => void, ms: number, background?: boolean): () => void
}

/** The longest a Node timer can run; a longer one would fire at once. */
const MAX_TIMER_MS = 2_147_483_647

export const systemClock: Clock = {
  now: () => performance.now(),
  date: () => new Date(),
  setTimer(callback, ms, background = false) {
    const timer = setTimeout(callback, Math.min(Math.max(0, ms), MAX_TIMER_MS))
    if (background) timer.unref()
    return () => clearTimeout(timer)
  },
}
