import { BusError } from '../core/index.ts'

const PASSING = new Set(['connection', 'unavailable', 'timeout', 'lease_lost', 'lease_held'])

/** Whether trying again may mend it. */
export function passes(error: unknown): error is BusError {
  // A durable with another filter is a conflict, too, and no reason to try again.
  return error instanceof BusError && (PASSING.has(error.code) || (error.code === 'conflict' && error.retryable))
}
