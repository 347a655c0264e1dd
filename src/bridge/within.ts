import { systemClock } from '../runtime/clock.ts'

/** Resolves when it has settled, and after so long at the latest: what is asked of a server that is away may take longer than anybody can wait. */
export async function within(ms: number, settling: Promise<unknown>): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>()
  const cancel = systemClock.setTimer(resolve, ms)
  await Promise.race([settling.catch(() => {}), promise])
  cancel()
}

/** Resolves when the signal is aborted. */
export function aborted(signal: AbortSignal): Promise<void> {
  if (signal.aborted) return Promise.resolve()
  return new Promise((resolve) => signal.addEventListener('abort', () => resolve(), { once: true }))
}

/** What it resolves to, or `undefined` when the signal is aborted before: leaves nothing with a signal that lives longer. */
export async function unlessAborted<T>(signal: AbortSignal, settling: Promise<T>): Promise<T | undefined> {
  const { promise, resolve } = Promise.withResolvers<undefined>()
  const onAbort = () => resolve(undefined)
  signal.addEventListener('abort', onAbort, { once: true })
  if (signal.aborted) onAbort()
  try {
    return await Promise.race([settling, promise])
  } finally {
    signal.removeEventListener('abort', onAbort)
  }
}

/** Resolves after so long, or when the signal is aborted. */
export function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const done = () => {
      cancel()
      signal.removeEventListener('abort', done)
      resolve()
    }
    const cancel = systemClock.setTimer(done, ms)
    signal.addEventListener('abort', done, { once: true })
    if (signal.aborted) done()
  })
}
