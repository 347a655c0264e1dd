/**
 * The time of the server, as far as it can be known: no reply of NATS carries it, but a stored message does. A message
 * stored between two moments of ours tells the difference to within half of what the round trip took. All buses judge
 * expiries by it, and so by one clock, whatever their own say.
 */

import type { Clock } from '../runtime/clock.ts'

/** A message was stored at a time of the server's, in ms since 1970, between two of ours. */
export interface Sample {
  readonly after: number
  readonly storedAt: number
  readonly before: number
}

export type Probe = () => Promise<Sample>

const TRIES = 3
const AGAIN_AFTER_MS = 60_000

export class ServerClock {
  readonly #clock: Clock
  readonly #probe: Probe
  #offset = 0
  /** By so much it may be off. */
  #uncertainty = 0
  #sampledAt = Number.NEGATIVE_INFINITY
  #sampling: Promise<void> | undefined

  constructor(clock: Clock, probe: Probe) {
    this.#clock = clock
    this.#probe = probe
  }

  /** The best of a few samples is the one whose round trip was the shortest. */
  async sample(): Promise<void> {
    let shortest = Number.POSITIVE_INFINITY
    let offset = this.#offset
    for (let tries = 0; tries < TRIES; tries++) {
      const { after, storedAt, before } = await this.#probe()
      if (before - after >= shortest) continue
      shortest = before - after
      offset = storedAt - (after + before) / 2
    }
    this.#offset = offset
    this.#uncertainty = shortest / 2
    this.#sampledAt = this.#clock.now()
  }

  /** The server's time now, in ms since 1970. */
  now(): number {
    const now = this.#clock.now()
    if (now - this.#sampledAt > AGAIN_AFTER_MS && !this.#sampling) {
      // A failure leaves the old difference, which is off by the drift of a minute.
      this.#sampling = this.sample()
        .catch(() => {})
        .finally(() => {
          this.#sampling = undefined
        })
    }
    return this.#offset + now
  }

  /** It is not earlier than this, but for the drift of a minute: to judge by whether somebody else's time is over. */
  atLeast(): number {
    return this.now() - this.#uncertainty
  }
}
