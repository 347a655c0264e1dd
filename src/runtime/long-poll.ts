import type { Ear } from './bell.ts'
import type { Clock } from './clock.ts'

export interface LongPoll<T> {
  readonly clock: Clock
  readonly waitMs: number
  readonly signal: AbortSignal | undefined
  /** Made before the first attempt. */
  readonly ear: Ear
  /** `undefined`: nothing there; wait and try again. */
  attempt(): Promise<T | undefined>
  /** How long to wait at the most before the next attempt. */
  pauseMs(): Promise<number>
}

/** Tries, waits for a ring or for time to pass, and tries again, until `waitMs` is over; `undefined` when nothing came. */
export async function longPoll<T>(poll: LongPoll<T>): Promise<T | undefined> {
  const end = poll.clock.now() + poll.waitMs
  try {
    for (;;) {
      if (poll.signal?.aborted) return undefined
      const found = await poll.attempt()
      if (found !== undefined) return found
      if (poll.clock.now() >= end) return undefined
      const pause = await poll.pauseMs()
      const left = end - poll.clock.now()
      await poll.ear.wait(Math.max(1, Math.min(left, pause)), poll.signal)
    }
  } finally {
    poll.ear.close()
  }
}
