/**
 * How many jobs a worker has ready beyond those it handles, so that its places do not stand idle while a claim is under
 * way. None while handlers take longer than two claims: then a claim is cheap beside the work. Nor while the last claim
 * found less than it asked for: then there is no backlog, and what comes in next may as well go to another worker.
 * Otherwise as many as are expected to be begun within {@link READY_MS}, a share of the lease, and a thousand; it begins
 * with the concurrency and doubles while everything is used up before the next claim has brought more.
 */

import type { Claim, HeldJob } from './claimed-job.ts'

const READY_MS = 100
const MOST_READY = 1_000
/** What waits longer than this, or than the lease's share, goes back to the queue. */
const MOST_WAIT_MS = 1_000
/** A job that was begun after so much of its lease has the rest for its first heartbeat. */
const LEASE_SHARE = 1 / 6
/** The weight of the newest handler's time in the mean. */
const NEWEST = 1 / 16

export class Pace {
  readonly #concurrency: number
  readonly #readyMs: number
  #window: number
  #backlog = false
  #handlerMs: number | undefined
  #claimMs = 0
  /** How long a job may wait for a place, in ms. */
  readonly staleMs: number

  constructor(concurrency: number, leaseTtlMs: number) {
    this.#concurrency = concurrency
    this.#readyMs = Math.min(READY_MS, leaseTtlMs * LEASE_SHARE)
    this.staleMs = Math.min(MOST_WAIT_MS, leaseTtlMs * LEASE_SHARE)
    this.#window = concurrency
  }

  /** How many to have ready; 0: claim only for free places. */
  get ready(): number {
    const handlerMs = this.#handlerMs
    if (!this.#backlog || handlerMs === undefined || handlerMs >= 2 * this.#claimMs) return 0
    return Math.floor(Math.min(this.#window, (this.#readyMs * this.#concurrency) / handlerMs))
  }

  handled(ms: number): void {
    this.#handlerMs = this.#handlerMs === undefined ? ms : this.#handlerMs + (ms - this.#handlerMs) * NEWEST
  }

  /** @param idle nothing was ready when it came */
  claimed(asked: number, got: number, tookMs: number, idle: boolean): void {
    this.#backlog = got === asked
    if (got > 0) this.#claimMs = tookMs
    if (this.#backlog && idle && this.ready === this.#window) this.#window = Math.min(MOST_READY, this.#window * 2)
  }

  /** Jobs had to go back: the handlers are not what they were. */
  stalled(): void {
    this.#window = this.#concurrency
    this.#handlerMs = Math.max(this.#handlerMs ?? 0, this.staleMs)
  }
}

interface Batch<Tx> {
  readonly jobs: readonly HeldJob<Claim, Tx>[]
  /** Local time at which they were asked for. */
  readonly at: number
  next: number
}

/** Jobs that wait for a place, the longest waiting first. */
export class Ready<Tx> {
  readonly #batches: Batch<Tx>[] = []
  #size = 0

  get size(): number {
    return this.#size
  }

  /** When the first of them was asked for. */
  get since(): number | undefined {
    return this.#batches[0]?.at
  }

  add(jobs: readonly HeldJob<Claim, Tx>[], at: number): void {
    if (jobs.length === 0) return
    for (const job of jobs) job.wait()
    this.#batches.push({ jobs, at, next: 0 })
    this.#size += jobs.length
  }

  /** One that is still held; the others are passed over. */
  take(): HeldJob<Claim, Tx> | undefined {
    for (let batch = this.#batches[0]; batch; batch = this.#batches[0]) {
      while (batch.next < batch.jobs.length) {
        const job = batch.jobs[batch.next++] as HeldJob<Claim, Tx>
        this.#size--
        if (batch.next === batch.jobs.length) this.#batches.shift()
        if (job.isHeld) return job
      }
    }
    return undefined
  }

  /** Takes out all that were asked for before; without a time, all. */
  drain(before = Number.POSITIVE_INFINITY): HeldJob<Claim, Tx>[] {
    const drained: HeldJob<Claim, Tx>[] = []
    for (let batch = this.#batches[0]; batch && batch.at <= before; batch = this.#batches[0]) {
      this.#batches.shift()
      drained.push(...batch.jobs.slice(batch.next))
    }
    this.#size -= drained.length
    return drained
  }
}
