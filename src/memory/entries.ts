/**
 * The key-value entries, their watches, and the leases. The counterpart of a server: every method runs to its end in one
 * go. Revisions and fences are drawn from one counter each and never twice, so a deleted key needs no tombstone to go on
 * growing.
 */

import { type BucketInfo, casConflict, type KvChange, type KvEntry, matches, type Revision } from '../core/index.ts'
import type { Bell } from '../runtime/bell.ts'
import type { Clock } from '../runtime/clock.ts'
import { type Alarm, type Alarms, alarm } from './alarms.ts'

interface StoredEntry {
  readonly key: string
  readonly value: Uint8Array
  readonly revision: Revision
  readonly updatedAt: number
  /** `undefined`: never. */
  expiresAt: number | undefined
  /** The job that an idempotency record lives as long as (J5). */
  readonly keptBy: string | undefined
  readonly alarm: Alarm
}

interface Watcher {
  readonly bucket: string
  readonly filter: string | undefined
  push(change: KvChange): void
}

interface StoredLease {
  readonly fence: number
  expiresAt: number
}

const RECORD_RECHECK_MS = 60 * 60 * 1_000
const encoder = new TextEncoder()
const decoder = new TextDecoder()

export class Entries {
  readonly #clock: Clock
  readonly #bell: Bell
  readonly #alarms: Alarms
  readonly #jobLives: (id: string) => boolean
  readonly #buckets = new Map<string, Map<string, StoredEntry>>()
  readonly #watchers = new Set<Watcher>()
  readonly #leases = new Map<string, StoredLease>()
  #lastRevision = 0
  #lastFence = 0

  constructor(clock: Clock, bell: Bell, alarms: Alarms, jobLives: (id: string) => boolean) {
    this.#clock = clock
    this.#bell = bell
    this.#alarms = alarms
    this.#jobLives = jobLives
  }

  get(bucket: string, key: string): KvEntry | null {
    const entry = this.#present(bucket, key)
    return entry ? toEntry(entry) : null
  }

  put(bucket: string, key: string, value: Uint8Array, ttlMs: number | undefined): Revision {
    // One that has expired goes first, as a change of its own.
    this.#present(bucket, key)
    return this.#write(bucket, key, value, ttlMs, undefined)
  }

  /** @throws cas_conflict */
  cas(bucket: string, key: string, value: Uint8Array, expected: Revision | null, ttlMs: number | undefined): Revision {
    const actual = this.#present(bucket, key)?.revision ?? null
    if (actual !== expected) throw casConflict(key, expected, actual)
    return this.#write(bucket, key, value, ttlMs, undefined)
  }

  /** @throws cas_conflict */
  delete(bucket: string, key: string, expected: Revision | undefined): void {
    const entry = this.#present(bucket, key)
    if (expected !== undefined && entry?.revision !== expected) throw casConflict(key, expected, entry?.revision ?? null)
    if (entry) this.#remove(bucket, entry)
  }

  /** Takes a dedup key for a job; answers the job that has it (J5). */
  record(queue: string, key: string, jobId: string, windowMs: number): string {
    const bucket = `dedup.${queue}`
    const first = this.#present(bucket, key)
    if (first) return decoder.decode(first.value)
    this.#write(bucket, key, encoder.encode(jobId), windowMs, jobId)
    return jobId
  }

  keys(bucket: string, filter: string | undefined): string[] {
    const keys = [...(this.#buckets.get(bucket)?.keys() ?? [])]
    return keys.filter((key) => (filter === undefined || matches(filter, key)) && this.#present(bucket, key) !== undefined)
  }

  buckets(): BucketInfo[] {
    const infos = [...this.#buckets.keys()].map((bucket): BucketInfo => {
      const values = this.keys(bucket, undefined).map((key) => this.#buckets.get(bucket)?.get(key)?.value.byteLength ?? 0)
      return { bucket, keys: values.length, bytes: values.reduce((sum, bytes) => sum + bytes, 0) }
    })
    return infos.filter(({ keys }) => keys > 0)
  }

  /** The present entries, and from then on every change is pushed. @returns how to stop it */
  watch(watcher: Watcher, updatesOnly: boolean): () => void {
    if (!updatesOnly) {
      for (const key of this.keys(watcher.bucket, watcher.filter)) {
        watcher.push({ operation: 'put', entry: toEntry(this.#present(watcher.bucket, key) as StoredEntry) })
      }
    }
    this.#watchers.add(watcher)
    return () => this.#watchers.delete(watcher)
  }

  /** `undefined` while somebody holds it. */
  lease(name: string, ttlMs: number): { readonly fence: number; readonly expiresAt: Date } | undefined {
    const held = this.#leases.get(name)
    const now = this.#clock.now()
    if (held && held.expiresAt > now) return undefined
    const lease = { fence: ++this.#lastFence, expiresAt: now + ttlMs }
    this.#leases.set(name, lease)
    return { fence: lease.fence, expiresAt: this.#dateOf(lease.expiresAt) }
  }

  leaseEndsInMs(name: string): number {
    const held = this.#leases.get(name)
    return held ? Math.max(0, held.expiresAt - this.#clock.now()) : 0
  }

  /** `null` once it ran out, even if nobody took it (K5). */
  heartbeatLease(name: string, fence: number, ttlMs: number): Date | null {
    const held = this.#leases.get(name)
    const now = this.#clock.now()
    if (held?.fence !== fence || held.expiresAt <= now) return null
    held.expiresAt = now + ttlMs
    return this.#dateOf(held.expiresAt)
  }

  releaseLease(name: string, fence: number): void {
    if (this.#leases.get(name)?.fence !== fence) return
    this.#leases.delete(name)
    this.#bell.ring([{ kind: 'lease', name }])
  }

  /** The entry, unless it has expired: then it is deleted now. */
  #present(bucket: string, key: string): StoredEntry | undefined {
    const entry = this.#buckets.get(bucket)?.get(key)
    if (!entry || !this.#expired(entry)) return entry
    this.#remove(bucket, entry)
    return undefined
  }

  #expired({ expiresAt, keptBy }: StoredEntry): boolean {
    return expiresAt !== undefined && expiresAt <= this.#clock.now() && !(keptBy !== undefined && this.#jobLives(keptBy))
  }

  #write(bucket: string, key: string, value: Uint8Array, ttlMs: number | undefined, keptBy: string | undefined): Revision {
    const keys = this.#buckets.get(bucket) ?? new Map<string, StoredEntry>()
    this.#buckets.set(bucket, keys)
    const before = keys.get(key)
    if (before) this.#alarms.clear(before.alarm)
    const entry: StoredEntry = {
      key,
      value,
      revision: ++this.#lastRevision,
      updatedAt: this.#clock.date().getTime(),
      expiresAt: ttlMs === undefined ? undefined : this.#clock.now() + ttlMs,
      keptBy,
      alarm: alarm(() => this.#expire(bucket, entry)),
    }
    keys.set(key, entry)
    if (entry.expiresAt !== undefined) this.#alarms.set(entry.alarm, entry.expiresAt)
    this.#tell(bucket, key, () => ({ operation: 'put', entry: toEntry(entry) }))
    return entry.revision
  }

  #expire(bucket: string, entry: StoredEntry): void {
    if (this.#expired(entry)) {
      this.#remove(bucket, entry)
      return
    }
    // An idempotency record whose job lives; it outlives the job by what is left of the hour.
    entry.expiresAt = this.#clock.now() + RECORD_RECHECK_MS
    this.#alarms.set(entry.alarm, entry.expiresAt)
  }

  #remove(bucket: string, entry: StoredEntry): void {
    this.#alarms.clear(entry.alarm)
    const keys = this.#buckets.get(bucket)
    keys?.delete(entry.key)
    if (keys?.size === 0) this.#buckets.delete(bucket)
    const revision = ++this.#lastRevision
    this.#tell(bucket, entry.key, () => ({ operation: 'delete', key: entry.key, revision }))
  }

  /** @param change made anew for each watcher, who may do with the bytes what he likes */
  #tell(bucket: string, key: string, change: () => KvChange): void {
    for (const watcher of this.#watchers) {
      if (watcher.bucket === bucket && (watcher.filter === undefined || matches(watcher.filter, key))) watcher.push(change())
    }
  }

  #dateOf(at: number): Date {
    return new Date(this.#clock.date().getTime() + at - this.#clock.now())
  }
}

function toEntry({ key, value, revision, updatedAt }: StoredEntry): KvEntry {
  return { key, value: value.slice(), revision, updatedAt: new Date(updatedAt) }
}
