import {
  BusError,
  checkBucket,
  checkDuration,
  checkExpected,
  checkFilter,
  checkKey,
  checkPayload,
  checkRevision,
  checkSignal,
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
import { HeldLease } from '../runtime/lease.ts'
import { longPoll } from '../runtime/long-poll.ts'
import { type Context, checkTx } from './context.ts'
import { PushedWatch } from './watch.ts'

export class MemoryKv implements KvStore {
  readonly #context: Context
  readonly #watches = new Set<PushedWatch>()
  readonly #leases = new Map<HeldLease, () => Promise<void>>()

  constructor(context: Context) {
    this.#context = context
  }

  async get(bucket: string, key: string): Promise<KvEntry | null> {
    this.#context.checkOpen()
    checkBucket(bucket, 'read')
    checkKey(bucket, key)
    const { store } = this.#context
    await store.turn()
    return store.entries.get(bucket, key)
  }

  async put(bucket: string, key: string, value: Payload, options: KvPutOptions = {}): Promise<Revision> {
    const { bytes, ttlMs } = this.#checkWrite(bucket, key, value, options)
    const { store } = this.#context
    await store.turn()
    return store.entries.put(bucket, key, bytes, ttlMs)
  }

  async cas(bucket: string, key: string, value: Payload, expected: Revision | null, options: KvPutOptions = {}): Promise<Revision> {
    const { bytes, ttlMs } = this.#checkWrite(bucket, key, value, options)
    checkExpected(expected)
    const { store } = this.#context
    await store.turn()
    return store.entries.cas(bucket, key, bytes, expected, ttlMs)
  }

  async delete(bucket: string, key: string, options: KvDeleteOptions = {}): Promise<void> {
    this.#context.checkOpen()
    checkBucket(bucket, 'read')
    checkKey(bucket, key)
    const { expected, tx } = optionsOf(options, ['expected', 'tx'])
    if (expected !== undefined) checkRevision('expected', expected)
    checkTx(tx)
    const { store } = this.#context
    await store.turn()
    store.entries.delete(bucket, key, expected)
  }

  async *keys(bucket: string, filter?: string): AsyncGenerator<string, void, undefined> {
    this.#context.checkOpen()
    checkBucket(bucket, 'read')
    if (filter !== undefined) checkFilter(filter, 'filter')
    const { store } = this.#context
    await store.turn()
    yield* store.entries.keys(bucket, filter)
  }

  async watch(bucket: string, filter?: string, options: KvWatchOptions = {}): Promise<KvWatch> {
    this.#context.checkOpen()
    checkBucket(bucket, 'read')
    if (filter !== undefined) checkFilter(filter, 'filter')
    const { signal, updatesOnly = false } = optionsOf(options, ['signal', 'updatesOnly'])
    checkSignal(signal)
    const { store } = this.#context
    await store.turn()
    this.#context.checkOpen()
    const watch = new PushedWatch({
      clock: store.clock,
      signal,
      start: (push) => store.entries.watch({ bucket, filter, push }, updatesOnly),
      onClose: (closed) => this.#watches.delete(closed),
    })
    if (!signal?.aborted) this.#watches.add(watch)
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
    const { store } = this.#context
    const name = `${bucket}/${key}`
    const what = `lease "${key}" in bucket "${bucket}"`
    const lease = await longPoll({
      clock: store.clock,
      waitMs,
      signal,
      ear: store.bell.listen({ kind: 'lease', name }),
      attempt: () => this.#lease(name, what, ttlMs),
      pauseMs: async () => store.entries.leaseEndsInMs(name),
    })
    if (lease) return lease
    this.#context.checkOpen()
    if (signal?.aborted) throw new BusError('timeout', `${what}: the caller's signal was aborted`, { cause: signal.reason })
    throw new BusError('lease_held', `${what} is held by somebody else; try again, or wait with waitMs`)
  }

  async close(): Promise<void> {
    await Promise.all([...[...this.#watches].map((watch) => watch.close()), ...[...this.#leases.values()].map((handBack) => handBack())])
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

  async #lease(name: string, what: string, ttlMs: number): Promise<Lease | undefined> {
    const { store } = this.#context
    const askedAt = store.clock.now()
    await store.turn()
    this.#context.checkOpen()
    const granted = store.entries.lease(name, ttlMs)
    if (!granted) return undefined
    const { fence, expiresAt } = granted
    const release = async () => {
      this.#leases.delete(lease)
      await store.turn()
      store.entries.releaseLease(name, fence)
    }
    const lease: HeldLease = new HeldLease(
      what,
      store.clock,
      { fence, ttlMs, expiresAt, askedAt },
      {
        heartbeat: async () => {
          this.#context.checkOpen()
          await store.turn()
          const end = store.entries.heartbeatLease(name, fence, ttlMs)
          return end && { expiresAt: end, extended: true }
        },
        release,
      },
    )
    this.#leases.set(lease, async () => {
      lease.close()
      await release()
    })
    lease.signal.addEventListener('abort', () => this.#leases.delete(lease), { once: true })
    return lease
  }
}
