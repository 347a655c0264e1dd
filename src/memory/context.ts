import { BusError } from '../core/index.ts'
import type { MemoryStore } from './store.ts'

/** What the four interfaces of one bus share. */
export interface Context {
  readonly store: MemoryStore
  readonly maxPayloadBytes: number
  readonly messagesMs: number
  readonly deadJobsMs: number
  isClosed(): boolean
  /** @throws closed */
  checkOpen(): void
}

/** Every change in the store rings; polling only guards against a clock that jumps. */
export const POLL_INTERVAL_MS = 60_000

/** @throws unsupported */
export function checkTx(tx: unknown): void {
  if (tx === undefined) return
  throw new BusError('unsupported', 'tx: the memory backend has no transactions; PostgresBus takes the transaction of the caller')
}
