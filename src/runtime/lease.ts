/** The holder's side of a lease, of a key or of a job. The server decides; the local clock only makes him give up early. */

import { closedError, isBusError, type Lease, leaseLost } from '../core/index.ts'
import type { Clock } from './clock.ts'
import { Deadline } from './deadlines.ts'

export interface LeaseGrant {
  readonly fence: number
  readonly ttlMs: number
  readonly expiresAt: Date
  /** Local time at which the grant was asked for: the lease ends no earlier than `ttlMs` after it. */
  readonly askedAt: number
}

export interface Beat {
  readonly expiresAt: Date
  /**
   * Whether the holder has the ttl from now. False: an ack in an open transaction holds it. The expiry does not tell: after the server's
   * clock was set back it stays where it is, or is an earlier one.
   */
  readonly extended: boolean
}

export interface LeaseBackend {
  /** `null` when the lease is lost. */
  heartbeat(): Promise<Beat | null>
  release(): Promise<void>
  /** Told when it is known to be lost, with the reason. */
  onLost?(reason: unknown): void
}

/** Something with a name for messages, made only when there is one to write. */
export interface Described {
  describe(): string
}

export class HeldLease implements Lease {
  readonly fence: number
  readonly #what: string | Described
  readonly #clock: Clock
  readonly #ttlMs: number
  readonly #backend: LeaseBackend
  readonly #deadline = new Deadline(this)
  /** Made for the first who reads `signal`. */
  #controller: AbortController | undefined
  #expiresAt: Date
  #ended = false
  #closed = false
  /** The server may hold it still: released again, it is told again. */
  #releaseFailed = false
  #lost: { readonly reason: unknown } | undefined

  constructor(what: string | Described, clock: Clock, grant: LeaseGrant, backend: LeaseBackend) {
    this.#what = what
    this.#clock = clock
    this.#ttlMs = grant.ttlMs
    this.#backend = backend
    this.fence = grant.fence
    this.#expiresAt = grant.expiresAt
    this.#watch(grant.askedAt)
  }

  get expiresAt(): Date {
    return this.#expiresAt
  }

  get signal(): AbortSignal {
    if (!this.#controller) {
      this.#controller = new AbortController()
      if (this.#lost) this.#controller.abort(this.#lost.reason)
    }
    return this.#controller.signal
  }

  async heartbeat(): Promise<void> {
    await this.beat()
  }

  /** @returns whether it was extended */
  async beat(): Promise<boolean> {
    if (this.#closed) throw closedError('the bus')
    if (this.#ended) throw this.#leaseLost()
    const askedAt = this.#clock.now()
    const beat = await this.#backend.heartbeat()
    if (beat === null) {
      const error = this.#leaseLost()
      this.lost(error)
      throw error
    }
    if (this.#ended || !beat.extended) return false
    this.#expiresAt = beat.expiresAt
    this.#watch(askedAt)
    return true
  }

  async release(): Promise<void> {
    if (this.#ended && !this.#releaseFailed) return
    this.end()
    this.#releaseFailed = false
    try {
      await this.#backend.release()
    } catch (error) {
      // The bus hands back what is held when it closes.
      if (isBusError(error, 'closed')) return
      this.#releaseFailed = true
      throw error
    }
  }

  /** An ack in the caller's transaction protects it: whatever its expiry, nobody else gets it before that ends. */
  protect(): void {
    this.#deadline.clear()
  }

  /** No longer held, and nobody needs to be told. */
  end(): void {
    this.#ended = true
    this.#deadline.clear()
  }

  /** Ended by somebody else: the holder learns of it by the signal. */
  lost(reason: unknown = this.#leaseLost()): void {
    this.#deadline.clear()
    if (this.#lost) return
    this.#lost = { reason }
    this.#controller?.abort(reason)
    this.#backend.onLost?.(reason)
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

  #watch(askedAt: number): void {
    this.#deadline.set(this.#clock, this.#ttlMs, askedAt + this.#ttlMs)
  }

  #leaseLost() {
    return leaseLost(typeof this.#what === 'string' ? this.#what : this.#what.describe())
  }
}
