import type { Bell } from '../runtime/bell.ts'
import type { Clock } from '../runtime/clock.ts'
import type { Database } from './database.ts'
import type { Ringer } from './ringer.ts'

/** What the four interfaces of one bus share. */
export interface Context {
  readonly db: Database
  readonly bell: Bell
  readonly ringer: Ringer
  readonly clock: Clock
  /** Names this process in inboxes and notifications. */
  readonly instance: string
  readonly maxPayloadBytes: number
  readonly pollIntervalMs: number
  isClosed(): boolean
  /** @throws closed */
  checkOpen(): void
}
