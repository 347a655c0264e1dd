/**
 * Concurrent calls gathered into one: what is asked for within a tick, or while an earlier batch is under way, goes out
 * together, in the order of the calls. Each call still answers for itself: if a batch is refused, its calls are tried one
 * by one.
 */

import { isBusError } from '../core/index.ts'

interface Entry<I, O> {
  readonly input: I
  readonly weight: number
  resolve(output: O): void
  reject(error: unknown): void
}

export interface BatcherOptions<I> {
  /** Calls in one batch at the most. @default 500 */
  readonly maxCalls?: number
  /** Batches under way at once; more than 1 gives up the order between batches. @default 1 */
  readonly maxParallel?: number
  /** What a call adds to its batch, and what a batch may hold. @default 0 and no limit */
  readonly weight?: (input: I) => number
  readonly maxWeight?: number
}

export class Batcher<I, O> {
  readonly #run: (inputs: readonly I[]) => Promise<readonly (O | PromiseLike<O>)[]>
  readonly #options: Required<BatcherOptions<I>>
  #waiting: Entry<I, O>[] = []
  #underWay = 0
  #scheduled = false

  /** @param run answers one output per input, in their order; a promise where a call goes on without its batch */
  constructor(run: (inputs: readonly I[]) => Promise<readonly (O | PromiseLike<O>)[]>, options: BatcherOptions<I> = {}) {
    this.#run = run
    this.#options = { maxCalls: 500, maxParallel: 1, weight: () => 0, maxWeight: Number.POSITIVE_INFINITY, ...options }
  }

  add(input: I): Promise<O> {
    return new Promise<O>((resolve, reject) => {
      this.#waiting.push({ input, weight: this.#options.weight(input), resolve, reject })
      this.#schedule()
    })
  }

  #schedule(): void {
    if (this.#scheduled || this.#underWay >= this.#options.maxParallel) return
    this.#scheduled = true
    queueMicrotask(() => {
      this.#scheduled = false
      while (this.#waiting.length > 0 && this.#underWay < this.#options.maxParallel) void this.#flush(this.#take())
    })
  }

  #take(): Entry<I, O>[] {
    const { maxCalls, maxWeight } = this.#options
    let count = 0
    let weight = 0
    for (const entry of this.#waiting) {
      weight += entry.weight
      if (count === maxCalls || (count > 0 && weight > maxWeight)) break
      count++
    }
    return this.#waiting.splice(0, count)
  }

  async #flush(batch: readonly Entry<I, O>[]): Promise<void> {
    this.#underWay++
    try {
      await this.#attempt(batch)
    } finally {
      this.#underWay--
      if (this.#waiting.length > 0) this.#schedule()
    }
  }

  async #attempt(batch: readonly Entry<I, O>[]): Promise<void> {
    try {
      const outputs = await this.#run(batch.map(({ input }) => input))
      for (const [index, entry] of batch.entries()) entry.resolve(outputs[index] as O)
    } catch (error) {
      // After a lost connection nobody knows what happened: trying again could do it twice.
      if (batch.length === 1 || isBusError(error, 'connection') || isBusError(error, 'closed') || isBusError(error, 'unavailable')) {
        for (const entry of batch) entry.reject(error)
        return
      }
      for (const entry of batch) await this.#attempt([entry])
    }
  }
}
