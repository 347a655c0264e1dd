/**
 * The consuming side of a watch, written once for every backend: changes are read when there is room for them, and
 * yielded in the order in which they were read.
 */

import { BusError, isBusError, type KvChange, type KvWatch } from '../core/index.ts'
import { jittered, reconnectDelayMs } from './backoff.ts'
import type { Ear } from './bell.ts'
import type { Clock } from './clock.ts'

export interface ChangeSource {
  /** The next changes, oldest first; none: wait for a ring. */
  read(): Promise<readonly KvChange[]>
  /** Local time up to which everything has been read. @default that of the last read */
  readUpTo?(): number
}

export interface WatchOptions {
  readonly clock: Clock
  readonly ear: Ear
  readonly source: ChangeSource
  readonly pollIntervalMs: number
  /** Changes are kept by the backend for so long at the least; a watch reads them before, wanted or not. */
  readonly keptMs: number
  readonly signal: AbortSignal | undefined
  isClosed(): boolean
  onClose(watch: ChangeWatch): void
}

/** Changes may be gone that the watch has not read: it ends rather than skip them (K6). */
export class WatchCutOff extends BusError {
  constructor(why: string) {
    super('connection', `the watch was cut off and may have missed changes: ${why}; watch again`, { retryable: true })
  }
}

interface Waiter {
  resolve(result: IteratorResult<KvChange, undefined>): void
  reject(error: unknown): void
}

/** Read ahead so far, in changes or in bytes of values; beyond it only when the changes would otherwise be pruned. */
const READ_AHEAD = 1_000
const READ_AHEAD_BYTES = 8 * 1024 * 1024
/** And not beyond this: a watch that nobody reads is cut off in the end rather than fill the memory. */
const MOST_BYTES = 64 * 1024 * 1024
/** What a change takes besides its value, about. */
const CHANGE_BYTES = 256
const DONE: IteratorReturnResult<undefined> = Object.freeze({ done: true, value: undefined })
const PASSING = new Set(['connection', 'unavailable', 'timeout', 'conflict'])

export class ChangeWatch implements KvWatch {
  readonly #options: WatchOptions
  readonly #changes: KvChange[] = []
  /** What they take. */
  #bytes = 0
  readonly #waiters: Waiter[] = []
  readonly #onAbort = () => void this.close()
  readonly #running: Promise<void>
  #closed = false
  #waitsForRoom = false
  #failure: { readonly error: unknown } | undefined

  constructor(options: WatchOptions) {
    this.#options = options
    options.signal?.addEventListener('abort', this.#onAbort, { once: true })
    this.#running = this.#run()
    if (options.signal?.aborted) void this.close()
  }

  get closed(): boolean {
    return this.#closed
  }

  [Symbol.asyncIterator](): AsyncIterator<KvChange, undefined> {
    return { next: () => this.#next() }
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  async close(): Promise<void> {
    if (!this.#closed) {
      this.#closed = true
      this.#options.signal?.removeEventListener('abort', this.#onAbort)
      for (const waiter of this.#waiters.splice(0)) waiter.resolve(DONE)
      this.#changes.length = 0
      this.#bytes = 0
      this.#options.ear.close()
      this.#options.onClose(this)
    }
    await this.#running
  }

  #next(): Promise<IteratorResult<KvChange, undefined>> {
    if (this.#closed) return Promise.resolve(DONE)
    const change = this.#changes.shift()
    if (change) {
      this.#bytes -= sizeOf(change)
      if (!this.#isFull && this.#waitsForRoom) this.#options.ear.ring()
      return Promise.resolve({ done: false, value: change })
    }
    if (this.#failure) {
      const { error } = this.#failure
      void this.close()
      return Promise.reject(error)
    }
    return new Promise((resolve, reject) => this.#waiters.push({ resolve, reject }))
  }

  get #isFull(): boolean {
    return this.#changes.length >= READ_AHEAD || this.#bytes >= READ_AHEAD_BYTES
  }

  async #run(): Promise<void> {
    const { clock, ear, source, pollIntervalMs, keptMs } = this.#options
    let failures = 0
    let lastRead = clock.now()
    while (!this.#closed) {
      const late = clock.now() - lastRead
      if (late > keptMs) {
        return this.#fail(new WatchCutOff(this.#isFull ? 'its changes were not taken for too long' : 'it could not read for too long'))
      }
      const untilMs = this.#bytes >= MOST_BYTES ? keptMs + 1 : keptMs / 2
      if (this.#isFull && late < untilMs) {
        this.#waitsForRoom = true
        await ear.wait(untilMs - late)
        this.#waitsForRoom = false
        continue
      }
      try {
        const startedAt = clock.now()
        const changes = await source.read()
        failures = 0
        if (this.#closed) return
        this.#take(changes)
        lastRead = source.readUpTo?.() ?? startedAt
        if (changes.length > 0) continue
        await ear.wait(jittered(pollIntervalMs))
      } catch (error) {
        if (this.#options.isClosed() || isBusError(error, 'closed')) return void this.close()
        if (!(error instanceof BusError) || error instanceof WatchCutOff || !PASSING.has(error.code)) return this.#fail(error)
        await ear.wait(reconnectDelayMs(++failures))
      }
    }
  }

  #take(changes: readonly KvChange[]): void {
    for (const change of changes) {
      const waiter = this.#waiters.shift()
      if (waiter) waiter.resolve({ done: false, value: change })
      else {
        this.#changes.push(change)
        this.#bytes += sizeOf(change)
      }
    }
  }

  #fail(error: unknown): void {
    this.#failure = { error }
    const waiter = this.#waiters.shift()
    if (!waiter) return
    waiter.reject(error)
    void this.close()
  }
}

function sizeOf(change: KvChange): number {
  return CHANGE_BYTES + (change.operation === 'put' ? change.entry.value.byteLength : 0)
}
