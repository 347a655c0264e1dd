/** One job in the hands of a worker's handler. */

import { type ClaimedJob, isBusError } from '../core/index.ts'
import { HeldJob, type JobWatcher } from './claimed-job.ts'

export class Run<Tx> implements JobWatcher {
  readonly job: ClaimedJob<Tx>
  /** The job as the handler gets it. */
  readonly handed: ClaimedJob<Tx>
  /** Local time. */
  readonly startedAt: number
  readonly #controller = new AbortController()
  readonly #foreign: ForeignJob<Tx> | undefined
  #ticks = 0
  #beating = false
  #silent = false

  /** Those of the package tell by themselves that they were settled or lost; others are wrapped and listened to. */
  constructor(job: ClaimedJob<Tx>, startedAt: number) {
    this.job = job
    this.startedAt = startedAt
    if (HeldJob.is(job)) {
      this.#foreign = undefined
      this.handed = job
      job.begin(this)
    } else {
      this.#foreign = new ForeignJob(job, this)
      this.handed = this.#foreign.handed
    }
  }

  get signal(): AbortSignal {
    return this.#controller.signal
  }

  /** Whether the handler settled the job himself. */
  get wasSettled(): boolean {
    return this.#foreign ? this.#foreign.wasSettled : (this.job as unknown as HeldJob<never, Tx>).wasSettled
  }

  lost(reason: unknown): void {
    this.abort(reason)
  }

  abort(reason: unknown): void {
    this.#controller.abort(reason)
  }

  /** A tick of the worker's clock. @param ticks between two heartbeats */
  isDue(ticks: number): boolean {
    return !this.#beating && !this.#silent && ++this.#ticks >= ticks
  }

  /** Extends the lease; never rejects. The lease's own signal tells when it is too late. */
  async beat(): Promise<void> {
    this.#beating = true
    try {
      await this.job.heartbeat()
    } catch (error) {
      if (isBusError(error, 'lease_lost') || isBusError(error, 'closed')) {
        this.#silent = true
        this.abort(error)
      }
    }
    this.#ticks = 0
    this.#beating = false
  }

  end(): void {
    this.#foreign?.end()
  }
}

const SETTLEMENTS: ReadonlySet<PropertyKey> = new Set(['ack', 'nak', 'deadLetter'])

/** A job of a JobQueue that somebody else wrote, or wrapped. */
class ForeignJob<Tx> {
  readonly handed: ClaimedJob<Tx>
  readonly #lost: AbortSignal
  readonly #onLost: () => void
  wasSettled = false

  constructor(job: ClaimedJob<Tx>, watcher: JobWatcher) {
    this.handed = new Proxy(job, {
      get: (target, key) => {
        const value: unknown = Reflect.get(target, key, target)
        if (typeof value !== 'function') return value
        return async (...args: unknown[]) => {
          const result: unknown = await value.apply(target, args)
          if (SETTLEMENTS.has(key)) this.wasSettled = true
          return result
        }
      },
    })
    this.#lost = job.lease.signal
    this.#onLost = () => watcher.lost(this.#lost.reason)
    if (this.#lost.aborted) this.#onLost()
    else this.#lost.addEventListener('abort', this.#onLost, { once: true })
  }

  end(): void {
    this.#lost.removeEventListener('abort', this.#onLost)
  }
}
