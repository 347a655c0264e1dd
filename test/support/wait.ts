import { setTimeout as sleep } from 'node:timers/promises'

export interface EventuallyOptions {
  /** @default 20_000 */
  readonly timeoutMs?: number
  /** @default 20 */
  readonly everyMs?: number
  /** What is waited for, for the message of the failure. */
  readonly what?: string
}

/**
 * Polls until `check` answers something truthy and answers that; a `check` that throws is not there yet, one that returns
 * nothing is, so that a row of assertions can be waited for.
 * @throws after `timeoutMs`, with the last error of `check` as the cause
 */
export async function eventually<T>(check: () => T | Promise<T>, options: EventuallyOptions = {}): Promise<T> {
  const { timeoutMs = 20_000, everyMs = 20, what = 'what was waited for' } = options
  const deadline = performance.now() + timeoutMs
  for (;;) {
    let last: string
    let cause: unknown
    try {
      const value = await check()
      if (value || value === undefined) return value
      last = `the last answer was ${String(value)}`
    } catch (error) {
      cause = error
      last = error instanceof Error ? error.message : String(error)
    }
    if (performance.now() >= deadline) throw new Error(`${what} did not come within ${timeoutMs} ms: ${last}`, { cause })
    await sleep(everyMs)
  }
}

export interface Deferred<T> {
  readonly promise: Promise<T>
  resolve(value: T): void
  reject(error: unknown): void
}

/** A promise that the test settles itself. */
export function deferred<T = void>(): Deferred<T> {
  return Promise.withResolvers<T>()
}
