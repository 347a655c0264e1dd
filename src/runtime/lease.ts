/** The holder's side of a lease, of a key or of a job. The server decides; the local clock only makes him give up early. */

import { closedError, isBusError, type Lease, leaseLost } from '../core/index.ts'
import type { Clock } from './clock.ts'

export interface LeaseGrant {
  readonly fence: number
  readonly ttlMs: number
  readonly expiresAt: Date
  /** Local time at which the grant was asked for: the lease ends no earlier than `ttlMs` after it. */
  readonly askedAt: number
}

export interface LeaseBackend {
  /** The new expiry, or `null` when the lease is lost. */
  heartbeat(): Promise<Date | null>
  release(): Promise<void>
}

export class HeldLease implements Lease {
  readonly fence: number
  readonly #what: string
  readonly #clock: Clock
  readonly #ttlMs: number
  readonly #backend: LeaseBackend
  readonly #controller = new AbortController()
  #expiresAt: Date
  #ended = false
  #closed = false
  #cancelTimer: () => void

  constructor(what: string, clock: Clock, grant: LeaseGrant, backend: LeaseBackend) {
    this.#what = what
    this.#clock = clock
    this.#ttlMs = grant.ttlMs
    this.#backend = backend
    this.fence = grant.fence
    this.#expiresAt = grant.expiresAt
    this.#cancelTimer = this.#watch(grant.askedAt)
  }

  get expiresAt(): Date {
    return this.#expiresAt
  }

  get signal(): AbortSignal {
    return this.#controller.signal
  }

  async heartbeat(): Promise<void> {
    if (this.#closed) throw closedError('the bus')
    if (this.#ended) throw leaseLost(this.#what)
    const askedAt = this.#clock.now()
    const expiresAt = await this.#backend.heartbeat()
    if (expiresAt === null) {
      const error = leaseLost(this.#what)
      this.lost(error)
      throw error
    }
    // Not extended (an ack in an open transaction holds the row): nothing moves.
    if (this.#ended || expiresAt <= this.#expiresAt) return
    this.#expiresAt = expiresAt
    this.#cancelTimer()
    this.#cancelTimer = this.#watch(askedAt)
  }

  async release(): Promise<void> {
    if (this.#ended) return
    this.end()
    try {
      await this.#backend.release()
    } catch (error) {
      // The bus hands back what is held when it closes.
      if (!isBusError(error, 'closed')) throw error
    }
  }

  /** An ack in the caller's transaction protects it: whatever its expiry, nobody else gets it before that ends. */
  protect(): void {
    this.#cancelTimer()
  }

  /** No longer held, and nobody needs to be told. */
  end(): void {
    this.#ended = true
    this.#cancelTimer()
  }

  /** Ended by somebody else: the holder learns of it by the signal. */
  lost(reason: unknown = leaseLost(this.#what)): void {
    this.#cancelTimer()
    if (!this.#controller.signal.aborted) this.#controller.abort(reason)
  }

  /** The bus closes: the lease was handed back. */
  close(): void {
    if (this.#ended) return
    this.#closed = true
    this.end()
    this.lost(closedError('the bus'))
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.release()
  }

  #watch(askedAt: number): () => void {
    const left = askedAt + this.#ttlMs - this.#clock.now()
    return this.#clock.setTimer(() => this.lost(), left, true)
  }
}
