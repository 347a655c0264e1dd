import {
  BusError,
  casConflict,
  checkBucket,
  checkDuration,
  checkExpected,
  checkFilter,
  checkKey,
  checkPayload,
  checkRevision,
  checkSignal,
  type KvChange,
  type KvDeleteOptions,
  type KvEntry,
  type KvPutOptions,
  type KvStore,
  type KvWatch,
  type KvWatchOptions,
  type Lease,
  type LeaseOptions,
  optionsOf,
  type Payload,
  type Revision,
} from '../core/index.ts'
import { jittered } from '../runtime/backoff.ts'
import { Batcher } from '../runtime/batcher.ts'
import { HeldLease } from '../runtime/lease.ts'
import { longPoll } from '../runtime/long-poll.ts'
import { type ChangeSource, ChangeWatch, WatchCutOff } from '../runtime/watch.ts'
import { pgArray } from './arrays.ts'
import type { Context } from './context.ts'
import { checkTx, type PostgresTx, type Row } from './database.ts'
import { GET, KEYS, LEASE, LEASE_HEARTBEAT, LEASE_LEFT, LEASE_RELEASE, WATCH_CHANGES, WATCH_ENTRIES, WATCH_SNAPSHOT } from './kv.sql.ts'
import { KvWrites, type Write, type Written } from './kv-writes.ts'

/** How long prune_kv leaves changes, less a margin. */
export const CHANGES_KEPT_MS = 9 * 60 * 1_000
const KEYS_PAGE = 1_000
const ENTRIES_PAGE = 1_000
/** Each page looks through what is left of its window: larger ones, because a watch that was slow has a large window to read. */
const CHANGES_PAGE = 2_000
/** Of values in a page, about; one may be larger. */
const WATCH_PAGE_BYTES = 4 * 1024 * 1024
/** What a watch reads before it resolves. */
const READ_AT_ONCE = 1_000
const READ_AT_ONCE_BYTES = 8 * 1024 * 1024

/** What the values of a batch of gets come to, about; one value may be larger. */
const GET_BYTES = 4 * 1024 * 1024

interface Get {
  readonly bucket: string
  readonly key: string
}

interface GetRow extends Row {
  readonly n: number
  readonly value: Uint8Array | null
  readonly revision: number
  readonly updated_at_ms: string
}

interface EntryRow extends Row {
  readonly key: string
  readonly value: Uint8Array | null
  readonly revision: number
  readonly updated_at_ms: string
}

interface WatchRow extends EntryRow {
  /** Rows of this page, with those that were too much for one answer. */
  readonly found: number
}

export class PostgresKv implements KvStore<PostgresTx> {
  readonly #context: Context
  readonly #gets: Batcher<Get, KvEntry | null>
  readonly #writes: KvWrites
  readonly #watches = new Set<ChangeWatch>()
  readonly #grants = new Set<Promise<unknown>>()
  readonly #leases = new Map<HeldLease, () => Promise<void>>()

  constructor(context: Context) {
    this.#context = context
    this.#gets = new Batcher((gets) => this.#get(gets))
    this.#writes = new KvWrites(context)
  }

  async get(bucket: string, key: string): Promise<KvEntry | null> {
    this.#context.checkOpen()
    checkBucket(bucket, 'read')
    checkKey(bucket, key)
    return this.#gets.add({ bucket, key })
  }

  async put(bucket: string, key: string, value: Payload, options: KvPutOptions<PostgresTx> = {}): Promise<Revision> {
    const { bytes, ttlMs, tx } = this.#checkWrite(bucket, key, value, options)
    const { revision } = await this.#write({ bucket, key, value: bytes, expected: null, ttlMs, doing: 'put' }, tx)
    return revision as Revision
  }

  async cas(
    bucket: string,
    key: string,
    value: Payload,
    expected: Revision | null,
    options: KvPutOptions<PostgresTx> = {},
  ): Promise<Revision> {
    const { bytes, ttlMs, tx } = this.#checkWrite(bucket, key, value, options)
    checkExpected(expected)
    for (;;) {
      const { revision, actual } = await this.#write({ bucket, key, value: bytes, expected: expected ?? 0, ttlMs, doing: 'cas' }, tx)
      if (revision !== null) return revision
      // What was in the way may be gone again: then the key is as expected now.
      if (actual !== expected) throw casConflict(key, expected, actual)
    }
  }

  async delete(bucket: string, key: string, options: KvDeleteOptions<PostgresTx> = {}): Promise<void> {
    this.#context.checkOpen()
    checkBucket(bucket, 'read')
    checkKey(bucket, key)
    const { expected, tx } = optionsOf(options, ['expected', 'tx'])
    checkTx(tx)
    if (expected !== undefined) checkRevision('expected', expected)
    const { revision, actual } = await this.#write(
      { bucket, key, value: null, expected: expected ?? null, ttlMs: null, doing: 'delete' },
      tx,
    )
    // A key that is absent is not at the expected revision either.
    if (revision === null && expected !== undefined) throw casConflict(key, expected, actual)
  }

  async *keys(bucket: string, filter?: string): AsyncGenerator<string, void, undefined> {
    this.#context.checkOpen()
    checkBucket(bucket, 'read')
    if (filter !== undefined) checkFilter(filter, 'filter')
    let after = ''
    for (;;) {
      const rows = await this.#context.db.query<{ key: string }>(KEYS, [bucket, filter ?? null, after, KEYS_PAGE], 'keys')
      for (const { key } of rows) yield key
      if (rows.length < KEYS_PAGE) return
      after = rows.at(-1)?.key ?? after
    }
  }

  async watch(bucket: string, filter?: string, options: KvWatchOptions = {}): Promise<KvWatch> {
    this.#context.checkOpen()
    checkBucket(bucket, 'read')
    if (filter !== undefined) checkFilter(filter, 'filter')
    const { signal, updatesOnly = false } = optionsOf(options, ['signal', 'updatesOnly'])
    checkSignal(signal)
    const { bell, clock, pollIntervalMs, isClosed } = this.#context
    const ear = bell.listen({ kind: 'bucket', name: bucket })
    try {
      const source = await this.#changes(bucket, filter ?? null, updatesOnly)
      this.#context.checkOpen()
      const watch = new ChangeWatch({
        clock,
        ear,
        source,
        pollIntervalMs,
        keptMs: CHANGES_KEPT_MS,
        signal,
        isClosed,
        onClose: (closed) => this.#watches.delete(closed),
      })
      if (!watch.closed) this.#watches.add(watch)
      return watch
    } catch (error) {
      ear.close()
      throw error
    }
  }

  async lease(bucket: string, key: string, ttlMs: number, options: LeaseOptions = {}): Promise<Lease> {
    this.#context.checkOpen()
    checkBucket(bucket, 'write')
    checkKey(bucket, key)
    checkDuration('ttlMs', ttlMs)
    const { waitMs = 0, signal } = optionsOf(options, ['waitMs', 'signal'])
    checkDuration('waitMs', waitMs)
    checkSignal(signal)
    const { clock, bell, pollIntervalMs, db } = this.#context
    const lease = await longPoll({
      clock,
      waitMs,
      signal,
      ear: bell.listen({ kind: 'lease', name: `${bucket}/${key}` }),
      attempt: () => {
        const grant = this.#lease(bucket, key, ttlMs)
        this.#grants.add(grant)
        return grant.finally(() => this.#grants.delete(grant))
      },
      pauseMs: async () => {
        const [row] = await db.query<{ left_ms: number | null }>(LEASE_LEFT, [bucket, key], 'lease')
        // A little later than it ends: the server's clock is the one that counts.
        return Math.min(jittered(pollIntervalMs), row?.left_ms == null ? 0 : row.left_ms + 1)
      },
    })
    if (lease) return lease
    this.#context.checkOpen()
    if (signal?.aborted) {
      throw new BusError('timeout', `lease "${key}" in bucket "${bucket}": the caller's signal was aborted`, { cause: signal.reason })
    }
    throw new BusError('lease_held', `lease "${key}" in bucket "${bucket}" is held by somebody else; try again, or wait with waitMs`)
  }

  async close(): Promise<void> {
    const watchesClosed = Promise.all([...this.#watches].map((watch) => watch.close()))
    // What a grant under way brings is handed back, too.
    await Promise.allSettled(this.#grants)
    await Promise.all([watchesClosed, ...[...this.#leases.values()].map((handBack) => handBack())])
  }

  #checkWrite(bucket: string, key: string, value: Payload, options: KvPutOptions<PostgresTx>) {
    this.#context.checkOpen()
    checkBucket(bucket, 'write')
    checkKey(bucket, key)
    const { ttlMs, tx } = optionsOf(options, ['ttlMs', 'tx'])
    checkTx(tx)
    if (ttlMs !== undefined) checkDuration('ttlMs', ttlMs)
    const bytes = checkPayload(value, this.#context.maxPayloadBytes, 'value')
    return { bytes, ttlMs: ttlMs ?? null, tx }
  }

  #write(write: Write, tx: PostgresTx | undefined): Promise<Written> {
    return tx === undefined ? this.#writes.write(write) : this.#writes.writeIn(tx, write)
  }

  async #get(gets: readonly Get[]): Promise<(KvEntry | null | Promise<KvEntry | null>)[]> {
    const values = [pgArray(gets.map(({ bucket }) => bucket)), pgArray(gets.map(({ key }) => key)), GET_BYTES]
    const entries = new Array<KvEntry | null | Promise<KvEntry | null>>(gets.length).fill(null)
    for (const row of await this.#context.db.query<GetRow>(GET, values, 'get')) {
      const get = gets[row.n - 1] as Get
      // Without its value: there was too much for one answer.
      entries[row.n - 1] = row.value === null ? this.#gets.add(get) : toEntry({ ...row, key: get.key })
    }
    return entries
  }

  /**
   * The entries of a snapshot, page by page, and then one window of changes after the other. The first entries are read at
   * once, so that what is written right after `watch` has resolved does not replace them; of one that is replaced before its
   * page is read, only the change is seen.
   */
  async #changes(bucket: string, filter: string | null, updatesOnly: boolean): Promise<ChangeSource> {
    const { db, clock } = this.#context
    let readUpTo = clock.now()
    let hiAskedAt = readUpTo
    let timeline: string | undefined
    const snapshot = async () => {
      const [row] = await db.query<{ snapshot: string; timeline: string }>(WATCH_SNAPSHOT, [], 'watch')
      if (!row || (timeline !== undefined && row.timeline !== timeline)) throw new WatchCutOff('another server was promoted')
      timeline = row.timeline
      return row.snapshot
    }
    const start = await snapshot()
    let lo = start
    let hi: string | undefined
    let entriesAfter: string | undefined = updatesOnly ? undefined : ''
    let position = 0
    const readEntries = async () => {
      const rows = await db.query<WatchRow>(WATCH_ENTRIES, [bucket, filter, entriesAfter, ENTRIES_PAGE, start, WATCH_PAGE_BYTES], 'watch')
      entriesAfter = isLast(rows, ENTRIES_PAGE) ? undefined : rows.at(-1)?.key
      return rows
    }
    const first: EntryRow[] = []
    let bytes = 0
    while (entriesAfter !== undefined && first.length < READ_AT_ONCE && bytes < READ_AT_ONCE_BYTES) {
      const rows = await readEntries()
      bytes += rows.reduce((sum, { value }) => sum + (value?.byteLength ?? 0), 0)
      first.push(...rows)
    }
    return {
      read: async () => {
        if (first.length > 0) return first.splice(0).map(toChange)
        if (entriesAfter !== undefined) {
          const rows = await readEntries()
          if (rows.length > 0) return rows.map(toChange)
        }
        if (hi === undefined) {
          hiAskedAt = clock.now()
          hi = await snapshot()
        }
        const values = [bucket, filter, lo, hi, position, CHANGES_PAGE, WATCH_PAGE_BYTES]
        const rows = await db.query<WatchRow>(WATCH_CHANGES, values, 'watch')
        if (isLast(rows, CHANGES_PAGE)) {
          lo = hi
          hi = undefined
          position = 0
          readUpTo = hiAskedAt
        } else position = rows.at(-1)?.revision ?? position
        return rows.map(toChange)
      },
      readUpTo: () => readUpTo,
    }
  }

  async #lease(bucket: string, key: string, ttlMs: number): Promise<Lease | undefined> {
    this.#context.checkOpen()
    const { clock, db, instance, ringer } = this.#context
    const token = crypto.randomUUID()
    const askedAt = clock.now()
    const [row] = await db.query<{ fence: number; expires_at_ms: string }>(LEASE, [bucket, key, token, instance, ttlMs], 'lease')
    if (!row) return undefined
    const release = async () => {
      await db.query(LEASE_RELEASE, [bucket, key, token], 'release')
      this.#leases.delete(lease)
      ringer.ring([{ kind: 'lease', name: `${bucket}/${key}` }])
    }
    const lease: HeldLease = new HeldLease(
      `lease "${key}" in bucket "${bucket}"`,
      clock,
      { fence: row.fence, ttlMs, expiresAt: new Date(Number(row.expires_at_ms)), askedAt },
      {
        heartbeat: async () => {
          this.#context.checkOpen()
          const [beat] = await db.query<{ expires_at_ms: string | null }>(LEASE_HEARTBEAT, [bucket, key, token, ttlMs], 'heartbeat')
          if (beat?.expires_at_ms != null) return { expiresAt: new Date(Number(beat.expires_at_ms)), extended: true }
          this.#leases.delete(lease)
          return null
        },
        release,
      },
    )
    this.#leases.set(lease, async () => {
      lease.close()
      await release().catch(() => {}) // it ends by itself
    })
    lease.signal.addEventListener('abort', () => this.#leases.delete(lease), { once: true })
    return lease
  }
}

function toEntry({ key, value, revision, updated_at_ms }: EntryRow): KvEntry {
  return { key, value: value as Uint8Array, revision: Number(revision), updatedAt: new Date(Number(updated_at_ms)) }
}

/** Whether nothing comes after these. */
function isLast(rows: readonly WatchRow[], page: number): boolean {
  const found = rows[0]?.found ?? 0
  return found < page && rows.length === found
}

function toChange(row: EntryRow): KvChange {
  return row.value === null
    ? { operation: 'delete', key: row.key, revision: Number(row.revision) }
    : { operation: 'put', entry: toEntry(row) }
}
