/** The holder's side of a claimed job: written once for every backend. */

import {
  type ClaimedJob,
  checkDuration,
  checkOptions,
  checkText,
  closedError,
  type Headers,
  type Lease,
  type NakOptions,
  type TxOption,
} from '../core/index.ts'
import { retryDelayMs } from './backoff.ts'
import type { Clock } from './clock.ts'
import { HeldLease } from './lease.ts'
import { type Settle, Settlement, type Whereabouts } from './settlement.ts'

/** A job as a backend claimed it. */
export interface Claim {
  readonly id: string
  readonly queue: string
  readonly payload: Uint8Array
  readonly headers: Headers
  readonly attempt: number
  readonly maxAttempts: number
  readonly fence: number
  readonly expiresAt: Date
}

/** Settlements answer whether the claim was still the holder's. */
export interface ClaimBackend<C, Tx> {
  ack(claim: C, tx: Tx | undefined, noWait: boolean): Promise<boolean>
  nak(claim: C, delayMs: number, error: string | undefined, noWait: boolean): Promise<boolean>
  deadLetter(claim: C, reason: string, noWait: boolean): Promise<boolean>
  /**
   * The expiry, or `null` when somebody else claimed it or it is gone.
   * @param noWait do not wait for who has locked the job: where it is still the holder's, answer its expiry as it is
   */
  heartbeat(claim: C, ttlMs: number, noWait: boolean): Promise<Date | null>
  /** Claimable again at once. */
  release(claim: C): Promise<void>
  /** Where answers can be lost or jobs acked in a transaction. */
  whereabouts?(claim: C): Promise<Whereabouts>
}

export interface ClaimContext<C, Tx> {
  readonly clock: Clock
  readonly backend: ClaimBackend<C, Tx>
  readonly ttlMs: number
  /** Local time at which the claim was asked for. */
  readonly askedAt: number
  checkTx(tx: Tx | undefined): void
  isClosed(): boolean
  /** It ended, or was given back: the bus need not hand it back. */
  onEnd(job: HeldJob<C & Claim, Tx>): void
}

export class HeldJob<C extends Claim, Tx> implements ClaimedJob<Tx> {
  readonly #claim: C
  readonly #context: ClaimContext<C, Tx>
  readonly #settlement: Settlement
  readonly #lease: HeldLease

  constructor(claim: C, context: ClaimContext<C, Tx>) {
    this.#claim = claim
    this.#context = context
    const { clock, askedAt, ttlMs, backend } = context
    const what = `job ${claim.id} (attempt ${claim.attempt})`
    this.#settlement = new Settlement(what, clock, askedAt + ttlMs)
    this.#lease = new HeldLease(
      what,
      clock,
      { fence: claim.fence, ttlMs, expiresAt: claim.expiresAt, askedAt },
      {
        heartbeat: () => {
          if (context.isClosed()) throw closedError('the bus')
          return backend.heartbeat(claim, ttlMs, this.#settlement.inTransaction)
        },
        release: async () => {
          if (!this.#settlement.abandon()) return
          context.onEnd(this)
          await backend.release(claim)
        },
      },
    )
    this.#lease.signal.addEventListener('abort', () => context.onEnd(this), { once: true })
  }

  get id(): string {
    return this.#claim.id
  }
  get queue(): string {
    return this.#claim.queue
  }
  get payload(): Uint8Array {
    return this.#claim.payload
  }
  get headers(): Headers {
    return this.#claim.headers
  }
  get attempt(): number {
    return this.#claim.attempt
  }
  get maxAttempts(): number {
    return this.#claim.maxAttempts
  }
  get lease(): Lease {
    return this.#lease
  }

  async heartbeat(): Promise<void> {
    if (this.#context.isClosed()) throw closedError('the bus')
    const { clock, ttlMs } = this.#context
    const askedAt = clock.now()
    const before = this.#lease.expiresAt
    await this.#lease.heartbeat()
    if (this.#lease.expiresAt <= before) return
    this.#settlement.deadline = Math.max(this.#settlement.deadline, askedAt + ttlMs)
  }

  async ack(options?: TxOption<Tx>): Promise<void> {
    checkOptions(options)
    const tx = options?.tx
    this.#context.checkTx(tx)
    await this.#settle(tx !== undefined, (noWait) => this.#context.backend.ack(this.#claim, tx, noWait))
  }

  async nak(delayMs?: number, options?: NakOptions): Promise<void> {
    if (delayMs !== undefined) checkDuration('delayMs', delayMs)
    checkOptions(options)
    const error = options?.error
    if (error !== undefined) checkText('error', error)
    const delay = delayMs ?? retryDelayMs(this.#claim.attempt)
    await this.#settle(false, (noWait) => this.#context.backend.nak(this.#claim, delay, error, noWait), 'free')
  }

  async deadLetter(reason: string): Promise<void> {
    checkText('reason', reason)
    await this.#settle(false, (noWait) => this.#context.backend.deadLetter(this.#claim, reason, noWait), 'free')
  }

  /** The bus closes. */
  async handBack(): Promise<void> {
    const mine = this.#settlement.abandon()
    this.#lease.close()
    this.#context.onEnd(this)
    if (!mine) return
    try {
      await this.#context.backend.release(this.#claim)
    } catch {
      // It comes back by itself when its lease runs out.
    }
  }

  async #settle(inTransaction: boolean, settle: Settle, leaves?: 'gone' | 'free'): Promise<void> {
    if (this.#context.isClosed()) throw closedError('the bus')
    const { backend } = this.#context
    const look = backend.whereabouts && (() => backend.whereabouts?.(this.#claim) ?? Promise.resolve<Whereabouts>('gone'))
    await this.#settlement.settle(inTransaction, settle, look, leaves)
    // In a transaction it may still be rolled back: then the lease goes on.
    if (inTransaction) this.#lease.protect()
    else this.#lease.end()
    this.#context.onEnd(this)
  }
}
