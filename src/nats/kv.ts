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
  isDedupBucket,
  type KvChange,
  type KvDeleteOptions,
  type KvEntry,
  type KvPutOptions,
  type KvStore,
  type KvWatch,
  type KvWatchOptions,
  type Lease,
  type LeaseOptions,
  matches,
  optionsOf,
  type Payload,
  type Revision,
} from '../core/index.ts'
import { ChangeWatch } from '../runtime/watch.ts'
import { type Context, checkTx, PullEar } from './context.ts'
import { absent, type Entries, type StoredEntry } from './entries.ts'
import type { Leases } from './leases.ts'
import { WatchSource } from './watch.ts'
import { nameOf, tokenOf } from './wire.ts'

/** A watch reads on while it is read; the server keeps what it has not read, so far as the history of its keys goes. */
const FOR_EVER_MS = 2_147_483_647

export class NatsKv implements KvStore {
  readonly #context: Context
  readonly #entries: Entries
  readonly #leases: Leases
  readonly #watches = new Set<ChangeWatch>()

  constructor(context: Context, entries: Entries, leases: Leases) {
    this.#context = context
    this.#entries = entries
    this.#leases = leases
  }

  async get(bucket: string, key: string): Promise<KvEntry | null> {
    this.#context.checkOpen()
    checkBucket(bucket, 'read')
    checkKey(bucket, key)
    const entry = await this.#entries.read(place(bucket, key))
    return entry && !absent(entry) ? shown(key, entry) : null
  }

  async put(bucket: string, key: string, value: Payload, options: KvPutOptions = {}): Promise<Revision> {
    const { bytes, ttlMs } = this.#checkWrite(bucket, key, value, options)
    return this.#entries.put(place(bucket, key), bytes, ttlMs)
  }

  async cas(bucket: string, key: string, value: Payload, expected: Revision | null, options: KvPutOptions = {}): Promise<Revision> {
    const { bytes, ttlMs } = this.#checkWrite(bucket, key, value, options)
    checkExpected(expected)
    for (;;) {
      // Read first: the sequence of a tombstone is no revision, and one that has expired is none any more.
      const last = await this.#entries.read(place(bucket, key))
      const actual = last && !absent(last) ? last.revision : null
      if (actual !== expected) throw casConflict(key, expected, actual)
      const revision = await this.#entries.write(place(bucket, key), bytes, last?.revision ?? 0, ttlMs)
      if (revision !== null) return revision
    }
  }

  async delete(bucket: string, key: string, options: KvDeleteOptions = {}): Promise<void> {
    this.#context.checkOpen()
    checkBucket(bucket, 'read')
    checkKey(bucket, key)
    const { expected, tx } = optionsOf(options, ['expected', 'tx'])
    if (expected !== undefined) checkRevision('expected', expected)
    checkTx(tx)
    for (;;) {
      const last = await this.#entries.read(place(bucket, key))
      const actual = last && !absent(last) ? last.revision : null
      if (expected !== undefined && actual !== expected) throw casConflict(key, expected, actual)
      // One that has expired becomes a tombstone: a watch hears of it, and a revision of it is never good again.
      if (!last || last.deleted) return
      if (await this.#entries.remove(place(bucket, key), last.revision)) return
    }
  }

  async *keys(bucket: string, filter?: string): AsyncGenerator<string, void, undefined> {
    this.#context.checkOpen()
    checkBucket(bucket, 'read')
    if (filter !== undefined) checkFilter(filter, 'filter')
    const entries = await this.#entries.all(pattern(bucket, filter), true)
    for (const entry of entries) {
      const key = keyOf(bucket, entry.key)
      if (!absent(entry) && (filter === undefined || matches(filter, key))) yield key
    }
  }

  async watch(bucket: string, filter?: string, options: KvWatchOptions = {}): Promise<KvWatch> {
    this.#context.checkOpen()
    checkBucket(bucket, 'read')
    if (filter !== undefined) checkFilter(filter, 'filter')
    const { signal, updatesOnly = false } = optionsOf(options, ['signal', 'updatesOnly'])
    checkSignal(signal)
    const { clock, bell, isClosed } = this.#context
    const ear = new PullEar(bell)
    const change = (entry: StoredEntry): KvChange | undefined => {
      const key = keyOf(bucket, entry.key)
      if (filter !== undefined && !matches(filter, key)) return undefined
      return entry.deleted ? { operation: 'delete', key, revision: entry.revision } : { operation: 'put', entry: shown(key, entry) }
    }
    const source = await WatchSource.open(this.#context, this.#entries, pattern(bucket, filter), updatesOnly, ear.ended, change)
    this.#context.checkOpen()
    const watch = new ChangeWatch({
      clock,
      ear,
      source,
      pollIntervalMs: 1,
      keptMs: FOR_EVER_MS,
      signal,
      isClosed,
      onClose: (closed) => {
        this.#watches.delete(closed)
        source.close()
      },
    })
    if (!watch.closed) this.#watches.add(watch)
    return watch
  }

  async lease(bucket: string, key: string, ttlMs: number, options: LeaseOptions = {}): Promise<Lease> {
    this.#context.checkOpen()
    checkBucket(bucket, 'write')
    checkKey(bucket, key)
    checkDuration('ttlMs', ttlMs)
    const { waitMs = 0, signal } = optionsOf(options, ['waitMs', 'signal'])
    checkDuration('waitMs', waitMs)
    checkSignal(signal)
    const what = `lease "${key}" in bucket "${bucket}"`
    const lease = await this.#leases.acquire(place(bucket, key), what, ttlMs, waitMs, signal)
    if (lease) return lease
    this.#context.checkOpen()
    if (signal?.aborted) throw new BusError('timeout', `${what}: the caller's signal was aborted`, { cause: signal.reason })
    throw new BusError('lease_held', `${what} is held by somebody else; try again, or wait with waitMs`)
  }

  async close(): Promise<void> {
    await Promise.all([...[...this.#watches].map((watch) => watch.close()), this.#leases.close()])
  }

  /** The value is a copy. */
  #checkWrite(bucket: string, key: string, value: Payload, options: KvPutOptions) {
    this.#context.checkOpen()
    checkBucket(bucket, 'write')
    checkKey(bucket, key)
    const { ttlMs, tx } = optionsOf(options, ['ttlMs', 'tx'])
    if (ttlMs !== undefined) checkDuration('ttlMs', ttlMs)
    const bytes = checkPayload(value, this.#context.maxPayloadBytes, 'value')
    checkTx(tx)
    return { bytes, ttlMs }
  }
}

/** All buckets of the bus are one of NATS: the bucket is the first token of the key. Dedup keys are free text and so are encoded. */
export function place(bucket: string, key: string): string {
  return `${tokenOf(bucket)}.${isDedupBucket(bucket) ? Buffer.from(key).toString('base64url') : key}`
}

/** What a read of the bucket takes; in a dedup bucket the filter is looked at afterwards. */
function pattern(bucket: string, filter: string | undefined): string {
  return `${tokenOf(bucket)}.${filter === undefined || isDedupBucket(bucket) ? '>' : filter}`
}

export function bucketOf(placed: string): string {
  return nameOf(placed.slice(0, placed.indexOf('.')))
}

function keyOf(bucket: string, placed: string): string {
  const key = placed.slice(placed.indexOf('.') + 1)
  return isDedupBucket(bucket) ? Buffer.from(key, 'base64url').toString() : key
}

function shown(key: string, { value, revision, storedAt }: StoredEntry): KvEntry {
  return { key, value, revision, updatedAt: new Date(storedAt) }
}
