/**
 * The life of one delivery or claim in the hands of its holder.
 *
 *   open ── ack | nak | term | deadLetter ──▶ settled
 *   open ── ack({ tx }) ──▶ in the caller's transaction
 *
 * From "in the caller's transaction" a further settlement is tried on the server, because that transaction may have been
 * rolled back, in which case nothing was settled; it never waits for a transaction that is still open. A refusal by the
 * server (`lease_lost`) leaves the state as it was.
 */

import { alreadySettled, isBusError, leaseLost } from '../core/index.ts'
import { reconnectDelayMs } from './backoff.ts'
import type { Clock } from './clock.ts'

/** How often a settlement whose answer was lost is asked for again. */
const MAX_TRIES = 5

/**
 * @param noWait answer false at once where the row is locked by an open transaction
 * @returns whether the holder still was the holder
 */
export type Settle = (noWait: boolean) => Promise<boolean>

/** What became of it, by its token: not there any more, nobody's, still the holder's, or somebody else's. */
export type Whereabouts = 'gone' | 'free' | 'mine' | 'other'

/** `held`: nothing was extended, since an ack in the caller's open transaction holds the row. */
export type Extension = 'extended' | 'held' | 'lost'

/** A delivery or a claim names itself and says where to ask after it; the rest is the same for both. */
export abstract class Settlement {
  readonly #clock: Clock
  /** Local time at which the server may have given it to somebody else. */
  deadline: number
  #state: 'open' | 'settling' | 'in-tx' | 'settled' = 'open'
  #triedInTransaction = false

  constructor(clock: Clock, deadline: number) {
    this.#clock = clock
    this.deadline = deadline
  }

  /** What it is, for messages. */
  abstract describe(): string

  /**
   * Asked after a refusal that may have other reasons than a lost lease. Backends whose answers cannot be lost answer
   * `undefined`.
   */
  protected abstract whereabouts(): Promise<Whereabouts> | undefined

  get open(): boolean {
    return this.#state === 'open'
  }

  get settled(): boolean {
    return this.#state === 'settled'
  }

  /** A transaction of the caller's may hold the row: whoever waited for it could wait for himself. */
  get inTransaction(): boolean {
    return this.#triedInTransaction
  }

  /**
   * @param leaves where a success leaves it: an ack lets it go, a nak leaves it free
   * @throws already_settled, lease_lost
   */
  protected async settle(inTransaction: boolean, settle: Settle, leaves: 'gone' | 'free'): Promise<void> {
    const before = this.#state
    if (before === 'settled' || before === 'settling') throw alreadySettled(this.describe())
    this.#state = 'settling'
    if (inTransaction) this.#triedInTransaction = true
    try {
      const noWait = before === 'in-tx'
      let done: boolean
      try {
        done = await settle(noWait)
      } catch (error) {
        if (inTransaction) throw error
        done = await this.#insist(error, () => settle(noWait), leaves)
      }
      if (!done) throw noWait ? await this.#refused() : leaseLost(this.describe())
      this.#state = inTransaction ? 'in-tx' : 'settled'
    } catch (error) {
      this.#state = before
      throw error
    }
    this.onSettled(inTransaction)
  }

  /** A settlement succeeded. */
  protected abstract onSettled(inTransaction: boolean): void

  /** Extends; never counts as a settlement. The deadline moves on only by what the server did. @throws already_settled, lease_lost */
  async extend(forMs: number, extend: (noWait: boolean) => Promise<Extension>): Promise<void> {
    if (this.#state === 'settled' || this.#state === 'settling') throw alreadySettled(this.describe())
    const sent = this.#clock.now()
    const extension = await extend(this.#triedInTransaction)
    if (extension === 'lost') throw leaseLost(this.describe())
    if (extension === 'extended') this.deadline = Math.max(this.deadline, sent + forMs)
  }

  /** Marks it as given back by the bus itself. */
  abandon(): boolean {
    if (this.#state !== 'open') return false
    this.#state = 'settled'
    return true
  }

  /** What was abandoned could not be given back. */
  protected takeBack(): void {
    this.#state = 'open'
  }

  /** After an ack in a transaction: that one has ended it, or is still open; or it was rolled back, and the lease is lost. */
  async #refused(): Promise<Error> {
    const found = await this.whereabouts()
    return found === 'free' || found === 'other' ? leaseLost(this.describe()) : alreadySettled(this.describe())
  }

  /**
   * The answer to a settlement may be lost with the connection. Asked again, "not yours any more" then means that the
   * first try arrived, provided that nobody else could have got it meanwhile and that it is where a success leaves it.
   */
  async #insist(first: unknown, settle: () => Promise<boolean>, leaves: 'gone' | 'free'): Promise<boolean> {
    let error = first
    for (let tries = 1; ; tries++) {
      if (!isBusError(error, 'connection') || tries === MAX_TRIES || this.#clock.now() >= this.deadline) throw error
      await new Promise<void>((resolve) => this.#clock.setTimer(resolve, reconnectDelayMs(tries)))
      try {
        if (await settle()) return true
        const found = await this.whereabouts()
        // Read last: a process that was stopped in between looks when somebody else may have settled it.
        if (this.#clock.now() >= this.deadline) return false
        return found === undefined || found === 'gone' || found === leaves
      } catch (next) {
        error = next
      }
    }
  }
}
