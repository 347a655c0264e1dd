/** The holder's side of a claimed job: written once for every backend. */

import {
  type ClaimedJob,
  checkDuration,
  checkText,
  closedError,
  type Headers,
  type Lease,
  type NakOptions,
  optionsOf,
  type TxOption,
} from '../core/index.ts'
import { retryDelayMs } from './backoff.ts'
import type { Clock } from './clock.ts'
import { type Beat, HeldLease, type LeaseBackend } from './lease.ts'
import { Settlement, type Whereabouts } from './settlement.ts'

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
   * `null` when somebody else claimed it or it is gone.
   * @param noWait do not wait for who has locked the job: where it is still the holder's, answer its expiry as it is
   */
  heartbeat(claim: C, ttlMs: number, noWait: boolean): Promise<Beat | null>
  /**
   * Claimable again at once.
   * @param counted false: nobody began to handle it, and the attempt is taken back
   */
  release(claim: C, counted: boolean): Promise<void>
  /** Where answers can be lost or jobs acked in a transaction. */
  whereabouts?(claim: C): Promise<Whereabouts>
}

/** The same for all jobs of one claim. */
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

/** Who has claimed a job and is to know of it when it is lost. */
export interface JobWatcher {
  lost(reason: unknown): void
}

export class HeldJob<C extends Claim, Tx> implements ClaimedJob<Tx> {
  readonly #claimed: Claimed<C, Tx>

  constructor(claim: C, context: ClaimContext<C, Tx>) {
    this.#claimed = new Claimed(claim, context, this)
  }

  /** Whether it is one, not only wrapped in something that looks like it. */
  static is<Tx>(job: ClaimedJob<Tx>): job is HeldJob<Claim, Tx> {
    return #claimed in job
  }

  get id(): string {
    return this.#claimed.claim.id
  }
  get queue(): string {
    return this.#claimed.claim.queue
  }
  get payload(): Uint8Array {
    return this.#claimed.claim.payload
  }
  get headers(): Headers {
    return this.#claimed.claim.headers
  }
  get attempt(): number {
    return this.#claimed.claim.attempt
  }
  get maxAttempts(): number {
    return this.#claimed.claim.maxAttempts
  }
  get lease(): Lease {
    return this.#claimed.lease
  }

  async heartbeat(): Promise<void> {
    await this.#claimed.prolong()
  }

  ack(options?: TxOption<Tx>): Promise<void> {
    return this.#claimed.ack(options)
  }

  nak(delayMs?: number, options?: NakOptions): Promise<void> {
    return this.#claimed.nak(delayMs, options)
  }

  deadLetter(reason: string): Promise<void> {
    return this.#claimed.deadLetter(reason)
  }

  /** The bus closes. @internal */
  async handBack(): Promise<void> {
    await this.#claimed.handBack()
  }

  /** How long ago it was asked for. @internal */
  get ageMs(): number {
    return this.#claimed.ageMs
  }

  /** Neither settled nor known to be lost. @internal */
  get isHeld(): boolean {
    return this.#claimed.open && !this.#claimed.isLost
  }

  /** A settlement by whoever had it in hands succeeded, if only in a transaction. @internal */
  get wasSettled(): boolean {
    return this.#claimed.wasSettled
  }

  /** It waits for a free place: if it goes back before it is begun, the attempt is not counted. @internal */
  wait(): void {
    this.#claimed.waits = true
  }

  /** The handler gets it. @internal */
  begin(watcher: JobWatcher): void {
    this.#claimed.waits = false
    this.#claimed.watcher = watcher
  }

  /** It waited in vain: back with it. Never rejects; what fails comes back when its lease runs out. @internal */
  async putBack(): Promise<void> {
    await this.#claimed.putBack()
  }
}

/** What the job and its lease have in common, out of the user's sight. */
class Claimed<C extends Claim, Tx> extends Settlement implements LeaseBackend {
  readonly claim: C
  readonly lease: HeldLease
  readonly #context: ClaimContext<C, Tx>
  readonly #job: HeldJob<C, Tx>
  waits = false
  wasSettled = false
  isLost = false
  watcher: JobWatcher | undefined

  constructor(claim: C, context: ClaimContext<C, Tx>, job: HeldJob<C, Tx>) {
    const { clock, ttlMs, askedAt } = context
    super(clock, askedAt + ttlMs)
    this.claim = claim
    this.#context = context
    this.#job = job
    this.lease = new HeldLease(this, clock, { fence: claim.fence, ttlMs, expiresAt: claim.expiresAt, askedAt }, this)
  }

  get ageMs(): number {
    return this.#context.clock.now() - this.#context.askedAt
  }

  async ack(options: TxOption<Tx> | undefined): Promise<void> {
    const { tx } = optionsOf(options, ['tx'])
    this.#context.checkTx(tx)
    this.#checkOpen()
    await this.settle(tx !== undefined, (noWait) => this.#context.backend.ack(this.claim, tx, noWait), 'gone')
  }

  async nak(delayMs: number | undefined, options: NakOptions | undefined): Promise<void> {
    if (delayMs !== undefined) checkDuration('delayMs', delayMs)
    const { error } = optionsOf(options, ['error'])
    if (error !== undefined) checkText('error', error)
    const delay = delayMs ?? retryDelayMs(this.claim.attempt)
    this.#checkOpen()
    await this.settle(false, (noWait) => this.#context.backend.nak(this.claim, delay, error, noWait), 'free')
  }

  async deadLetter(reason: string): Promise<void> {
    checkText('reason', reason)
    this.#checkOpen()
    await this.settle(false, (noWait) => this.#context.backend.deadLetter(this.claim, reason, noWait), 'free')
  }

  /** With the lease. */
  async prolong(): Promise<void> {
    this.#checkOpen()
    const { clock, ttlMs } = this.#context
    const askedAt = clock.now()
    if (await this.lease.beat()) this.deadline = Math.max(this.deadline, askedAt + ttlMs)
  }

  async handBack(): Promise<void> {
    const mine = this.abandon()
    this.lease.close()
    this.#context.onEnd(this.#job)
    if (mine) await this.#tryRelease()
  }

  async putBack(): Promise<void> {
    if (!this.abandon()) return
    this.lease.end()
    this.#context.onEnd(this.#job)
    await this.#tryRelease()
  }

  override describe(): string {
    return `job ${this.claim.id} (attempt ${this.claim.attempt})`
  }

  /** For the lease. */
  async heartbeat(): Promise<Beat | null> {
    this.#checkOpen()
    return this.#context.backend.heartbeat(this.claim, this.#context.ttlMs, this.inTransaction)
  }

  /** For the lease: the holder had it in hands, and so the attempt counts. */
  async release(): Promise<void> {
    if (!this.abandon()) return
    try {
      await this.#context.backend.release(this.claim, true)
    } catch (error) {
      this.takeBack()
      throw error
    }
    this.#context.onEnd(this.#job)
  }

  /** For the lease. */
  onLost(reason: unknown): void {
    this.isLost = true
    this.#context.onEnd(this.#job)
    this.watcher?.lost(reason)
  }

  protected override whereabouts(): Promise<Whereabouts> | undefined {
    return this.#context.backend.whereabouts?.(this.claim)
  }

  protected override onSettled(inTransaction: boolean): void {
    this.wasSettled = true
    // In a transaction it may still be rolled back: then the lease goes on.
    if (inTransaction) this.lease.protect()
    else this.lease.end()
    this.#context.onEnd(this.#job)
  }

  #checkOpen(): void {
    if (this.#context.isClosed()) throw closedError('the bus')
  }

  async #tryRelease(): Promise<void> {
    try {
      await this.#context.backend.release(this.claim, !this.waits)
    } catch {
      // It comes back by itself when its lease runs out.
    }
  }
}
