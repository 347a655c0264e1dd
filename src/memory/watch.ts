import type { KvChange, KvWatch } from '../core/index.ts'
import type { Clock } from '../runtime/clock.ts'

/** Only somebody who waits for a change keeps the process alive, so the timer that does it never needs to fire. */
const FOR_EVER_MS = 2_147_483_647
const DONE: IteratorReturnResult<undefined> = Object.freeze({ done: true, value: undefined })

export interface WatchOptions {
  readonly clock: Clock
  readonly signal: AbortSignal | undefined
  /** Begins: changes are pushed from now on. @returns how to end it */
  start(push: (change: KvChange) => void): () => void
  onClose(watch: PushedWatch): void
}

/** The consuming side of a watch whose changes are pushed; those that nobody has asked for yet wait in memory. */
export class PushedWatch implements KvWatch {
  readonly #options: WatchOptions
  readonly #waiters: ((result: IteratorResult<KvChange, undefined>) => void)[] = []
  readonly #onAbort = () => void this.close()
  readonly #stop: () => void
  #changes: KvChange[] = []
  /** How many of them were yielded. */
  #yielded = 0
  #cancelTimer: (() => void) | undefined
  #closed = false

  constructor(options: WatchOptions) {
    this.#options = options
    this.#stop = options.start((change) => this.#push(change))
    if (options.signal?.aborted) void this.close()
    else options.signal?.addEventListener('abort', this.#onAbort, { once: true })
  }

  [Symbol.asyncIterator](): AsyncIterator<KvChange, undefined> {
    return { next: () => this.#next() }
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  async close(): Promise<void> {
    if (this.#closed) return
    this.#closed = true
    this.#stop()
    this.#options.signal?.removeEventListener('abort', this.#onAbort)
    for (const resolve of this.#waiters.splice(0)) resolve(DONE)
    this.#changes = []
    this.#cancelTimer?.()
    this.#options.onClose(this)
  }

  #next(): Promise<IteratorResult<KvChange, undefined>> {
    if (this.#closed) return Promise.resolve(DONE)
    const change = this.#changes[this.#yielded]
    if (change) {
      this.#yielded++
      if (this.#yielded * 2 > this.#changes.length) {
        this.#changes = this.#changes.slice(this.#yielded)
        this.#yielded = 0
      }
      return Promise.resolve({ done: false, value: change })
    }
    return new Promise((resolve) => {
      this.#waiters.push(resolve)
      this.#cancelTimer ??= this.#options.clock.setTimer(() => {}, FOR_EVER_MS)
    })
  }

  #push(change: KvChange): void {
    const resolve = this.#waiters.shift()
    if (!resolve) {
      this.#changes.push(change)
      return
    }
    if (this.#waiters.length === 0) {
      this.#cancelTimer?.()
      this.#cancelTimer = undefined
    }
    resolve({ done: false, value: change })
  }
}
