/** Delays that grow and are spread, so that what failed together does not come back together. */

const FIRST_RETRY_MS = 1_000
const LONGEST_RETRY_MS = 60 * 60 * 1_000

/**
 * How long a job waits after its n-th attempt failed: 1 s, 2 s, 4 s, … up to an hour, each cut at random by up to half.
 * @param attempt 1 for the first
 */
export function retryDelayMs(attempt: number): number {
  const full = Math.min(LONGEST_RETRY_MS, FIRST_RETRY_MS * 2 ** Math.min(attempt - 1, 30))
  return Math.round(full * (0.5 + Math.random() / 2))
}

/** How long a loop waits after its n-th failure in a row: 50 ms doubling up to `mostMs`, cut at random by up to half. */
export function reconnectDelayMs(failures: number, mostMs = 2_000): number {
  return Math.min(mostMs, 50 * 2 ** Math.min(failures - 1, 20)) * (0.5 + Math.random() / 2)
}

/** The poll interval with its jitter: 75 to 100 % of it, so never later than what was asked for. */
export function jittered(ms: number): number {
  return ms * (0.75 + Math.random() / 4)
}

/** Pauses, in ms, after which what is to be handed back is handed back again: an extension or a heartbeat of its holder's had it locked. */
export const AGAIN_AFTER_MS: readonly number[] = [10, 20, 50]
