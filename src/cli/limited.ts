/** `work --count` and `--until-empty`: when a worker has had enough. */

import type { ClaimedJob, ClaimManyOptions, JobQueue } from '../index.ts'

export interface Limits {
  /** Places of the worker. */
  readonly concurrency: number
  /** End after so many jobs. @default without end */
  readonly count?: number | undefined
  /** End when nothing is claimable. */
  readonly untilEmpty: boolean
}

/**
 * A queue for a worker that gives so many jobs, or none once it was found empty. It gives only what has a place: a worker that has claimed
 * ahead hands back what it has not begun when it is told to stop, and those jobs would be counted, or taken for done.
 */
export class Limited<Tx> {
  readonly jobs: JobQueue<Tx>
  readonly #queue: JobQueue<Tx>
  readonly #untilEmpty: boolean
  readonly #isLimited: boolean
  readonly #onEnd: () => void
  #left: number
  #free: number
  #wake: (() => void) | undefined

  /** @param onEnd called when the last job has begun, or nothing was claimable */
  constructor(queue: JobQueue<Tx>, { concurrency, count, untilEmpty }: Limits, onEnd: () => void) {
    this.#queue = queue
    this.#untilEmpty = untilEmpty
    this.#isLimited = untilEmpty || count !== undefined
    this.#onEnd = onEnd
    this.#left = count ?? Number.POSITIVE_INFINITY
    this.#free = concurrency
    this.jobs = {
      enqueue: (...args) => queue.enqueue(...args),
      enqueueMany: (...args) => queue.enqueueMany(...args),
      claim: (...args) => queue.claim(...args),
      claimMany: (name, workerId, leaseTtlMs, options) =>
        this.#isLimited ? this.#claim(name, workerId, leaseTtlMs, options) : queue.claimMany(name, workerId, leaseTtlMs, options),
    }
  }

  /** Handles a job that came from {@link jobs}. */
  async handle(run: () => Promise<void>): Promise<void> {
    this.#free--
    if (--this.#left <= 0) this.#onEnd()
    try {
      await run()
    } finally {
      this.#free++
      this.#wake?.()
    }
  }

  async #claim(name: string, workerId: string, leaseTtlMs: number, options: ClaimManyOptions): Promise<ClaimedJob<Tx>[]> {
    await this.#place(options.signal)
    const limit = Math.min(options.limit, this.#free, this.#left)
    if (options.signal?.aborted || limit <= 0) return []
    const claimed = await this.#queue.claimMany(name, workerId, leaseTtlMs, {
      ...options,
      limit,
      ...(this.#untilEmpty ? { waitMs: 0 } : {}),
    })
    if (this.#untilEmpty && claimed.length === 0) this.#onEnd()
    return claimed
  }

  /** Resolves when one more job may begin, or none any more. */
  async #place(signal: AbortSignal | undefined): Promise<void> {
    while (!signal?.aborted && (this.#free <= 0 || this.#left <= 0)) {
      const { promise, resolve } = Promise.withResolvers<void>()
      const wake = () => resolve()
      this.#wake = wake
      signal?.addEventListener('abort', wake, { once: true })
      await promise
      signal?.removeEventListener('abort', wake)
    }
  }
}
