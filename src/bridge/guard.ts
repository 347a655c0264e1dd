import type { Lease } from '../core/index.ts'
import { systemClock } from '../runtime/clock.ts'
import { unlessAborted } from './within.ts'

/** Keeps a lease, and says whether it is ours for certain: by the clock, too, after a process that stood still. */
export class Guard {
  readonly #lease: Lease
  readonly #ttlMs: number
  readonly #over: AbortSignal
  #until = 0
  #cancel: (() => void) | undefined
  #ended = false

  constructor(lease: Lease, ttlMs: number, stopping: AbortSignal) {
    this.#lease = lease
    this.#ttlMs = ttlMs
    this.#over = AbortSignal.any([lease.signal, stopping])
  }

  get holds(): boolean {
    return !this.#ended && !this.#lease.signal.aborted && systemClock.now() < this.#until
  }

  /** @returns false when the lease is lost, or the bridge stopped */
  async begin(): Promise<boolean> {
    const over = this.#over
    while (!over.aborted) {
      this.#cancel?.()
      if (await unlessAborted(over, this.#beat())) return true
      await unlessAborted(over, new Promise((resolve) => setTimeout(resolve, Math.min(250, this.#ttlMs / 10))))
    }
    return false
  }

  end(): void {
    this.#ended = true
    this.#cancel?.()
  }

  async #beat(): Promise<boolean> {
    const askedAt = systemClock.now()
    let done = false
    try {
      await this.#lease.heartbeat()
      this.#until = askedAt + this.#ttlMs
      done = true
    } catch {
      // The signal says when it is over.
    }
    if (!this.#ended && !this.#lease.signal.aborted) {
      this.#cancel?.()
      this.#cancel = systemClock.setTimer(() => void this.#beat(), done ? this.#ttlMs / 3 : Math.min(250, this.#ttlMs / 10), true)
    }
    return done
  }
}
