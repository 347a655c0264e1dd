/**
 * Wake-ups inside one process. A waiter takes an ear *before* it looks for work, so a ring between the look and the wait
 * is not lost; a ring is a hint and may come too often or never, so every wait has a time limit as well.
 */

import { matches } from '../core/index.ts'
import type { Clock } from './clock.ts'

/** What a ring is about. `*` as the name: whatever it is. */
export interface Topic {
  readonly kind: 'message' | 'durable' | 'queue' | 'bucket' | 'lease' | 'request' | 'inbox'
  /** A subject, durable, queue, bucket, `bucket/key`, request subject or inbox. */
  readonly name: string
}

/** What an ear listens for; for `message` and `request` the name is a filter. */
export type Interest = Topic

export class Ear {
  readonly interest: readonly Interest[]
  readonly #bell: Bell
  #rung = false
  #wake: (() => void) | undefined

  constructor(bell: Bell, interest: readonly Interest[]) {
    this.#bell = bell
    this.interest = interest
  }

  ring(): void {
    this.#rung = true
    this.#wake?.()
  }

  /** Resolves when rung since the last wait, after `ms`, or when the signal aborts; never rejects. */
  async wait(ms: number, signal?: AbortSignal): Promise<void> {
    if (!this.#rung && !signal?.aborted && ms > 0) {
      const { promise, resolve } = Promise.withResolvers<void>()
      const cancel = this.#bell.clock.setTimer(resolve, ms)
      signal?.addEventListener('abort', resolve as () => void, { once: true })
      this.#wake = resolve
      await promise
      this.#wake = undefined
      cancel()
      signal?.removeEventListener('abort', resolve as () => void)
    }
    this.#rung = false
  }

  close(): void {
    this.#bell.forget(this)
    this.ring()
  }
}

export class Bell {
  readonly clock: Clock
  readonly #ears = new Map<Topic['kind'], Set<Ear>>()

  constructor(clock: Clock) {
    this.clock = clock
  }

  listen(...interest: Interest[]): Ear {
    const ear = new Ear(this, interest)
    for (const { kind } of interest) {
      const ears = this.#ears.get(kind) ?? new Set()
      this.#ears.set(kind, ears.add(ear))
    }
    return ear
  }

  forget(ear: Ear): void {
    for (const { kind } of ear.interest) this.#ears.get(kind)?.delete(ear)
  }

  ring(topics: Iterable<Topic>): void {
    for (const topic of topics) {
      for (const ear of this.#ears.get(topic.kind) ?? []) {
        if (ear.interest.some((interest) => interest.kind === topic.kind && concerns(topic, interest))) ear.ring()
      }
    }
  }

  /** After a reconnect, or when the bus closes: everybody looks again. */
  ringAll(): void {
    for (const ears of this.#ears.values()) for (const ear of ears) ear.ring()
  }
}

function concerns(topic: Topic, interest: Interest): boolean {
  if (topic.name === '*' || topic.name === interest.name || interest.name === '*') return true
  if (topic.kind === 'message' || topic.kind === 'request') return matches(interest.name, topic.name)
  return false
}
