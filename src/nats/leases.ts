/**
 * Leases on a bucket of their own. The holder writes at every heartbeat, by compare-and-set on his last revision, so that
 * who has lost it is refused by the server; the revision of the grant is the fence, which never comes again.
 *
 * There is no clock to ask: the end of a lease is the server's time of its last write plus its ttl, and others compare that
 * with the server's time as they know it ({@link ServerClock}). The holder counts from before he asked, and so gives up
 * first. A takeover is a compare-and-set, too: of two that think the lease is over one gets it, and the holder whose
 * heartbeat came in between keeps it.
 */

import type { Lease } from '../core/index.ts'
import { HeldLease } from '../runtime/lease.ts'
import { longPoll } from '../runtime/long-poll.ts'
import type { Context } from './context.ts'
import type { Entries, StoredEntry } from './entries.ts'

const encoder = new TextEncoder()
/** How far the servers' time as known to two processes may be apart. */
const SKEW_MS = 10
const LONGEST_WAIT_MS = 5_000
/** After this it is looked at again, and then after twice as long each time. */
const SHORTEST_WAIT_MS = 5

export class Leases {
  readonly #context: Context
  readonly #entries: Entries
  readonly #held = new Map<HeldLease, () => Promise<void>>()

  constructor(context: Context, entries: Entries) {
    this.#context = context
    this.#entries = entries
  }

  /** @returns `undefined` when it was held all the time */
  async acquire(place: string, what: string, ttlMs: number, waitMs: number, signal: AbortSignal | undefined): Promise<Lease | undefined> {
    const { clock, bell, nc, serverClock } = this.#context
    const ear = bell.listen({ kind: 'lease', name: place })
    // Whoever writes there publishes, and so can be heard: before it is stored, by a cluster.
    let heardAt = clock.now()
    const heard = () => {
      heardAt = clock.now()
      ear.ring()
    }
    const subscription = waitMs > 0 ? nc.subscribe(this.#entries.subject(place), { callback: heard }) : undefined
    let endsAt = 0
    try {
      return await longPoll({
        clock,
        waitMs,
        signal,
        ear,
        attempt: async () => {
          this.#context.checkOpen()
          const last = await this.#entries.read(place)
          const now = serverClock.atLeast()
          endsAt = last ? endOf(last) + SKEW_MS : 0
          if (last && !last.deleted && endsAt > now) return undefined
          return this.#grant(place, what, ttlMs, last?.revision ?? 0)
        },
        pauseMs: async () => {
          const soon = Math.max(SHORTEST_WAIT_MS, clock.now() - heardAt)
          return Math.max(1, Math.min(LONGEST_WAIT_MS, soon, endsAt - serverClock.atLeast()))
        },
      })
    } finally {
      subscription?.unsubscribe()
    }
  }

  async close(): Promise<void> {
    await Promise.all([...this.#held.values()].map((handBack) => handBack().catch(() => {})))
  }

  async #grant(place: string, what: string, ttlMs: number, expected: number): Promise<HeldLease | undefined> {
    const { clock, serverClock } = this.#context
    const holder = crypto.randomUUID()
    const askedAt = clock.now()
    const fence = await this.#write(place, holder, ttlMs, expected)
    if (fence === null) return undefined
    let revision: number = fence
    let deadline = askedAt + ttlMs
    /** One write at a time: each expects the one before it. */
    let writing: Promise<unknown> = Promise.resolve()
    const inTurn = <T>(write: () => Promise<T>): Promise<T> => {
      const turn = writing.then(write, write)
      writing = turn.catch(() => {})
      return turn
    }
    const release = () =>
      inTurn(async () => {
        this.#held.delete(lease)
        if (await this.#entries.remove(place, revision)) return
        const last = await this.#entries.read(place)
        if (last && !last.deleted && new TextDecoder().decode(last.value) === holder) await this.#entries.remove(place, last.revision)
      })
    const lease: HeldLease = new HeldLease(
      what,
      clock,
      { fence, ttlMs, expiresAt: new Date(serverClock.now() + ttlMs), askedAt },
      {
        heartbeat: () =>
          inTurn(async () => {
            this.#context.checkOpen()
            const beatAt = clock.now()
            if (beatAt >= deadline) return null
            const next = (await this.#write(place, holder, ttlMs, revision)) ?? (await this.#writeAgain(place, holder, ttlMs))
            if (next === null) return null
            revision = next
            deadline = beatAt + ttlMs
            return { expiresAt: new Date(serverClock.now() + ttlMs), extended: true }
          }),
        release,
      },
    )
    this.#held.set(lease, async () => {
      lease.close()
      await release()
    })
    lease.signal.addEventListener('abort', () => this.#held.delete(lease), { once: true })
    // The bus was closed while the grant was on its way: nobody will release it.
    if (this.#context.isClosed()) await this.#held.get(lease)?.()
    return lease
  }

  #write(place: string, holder: string, ttlMs: number, expected: number): Promise<number | null> {
    return this.#entries.write(place, encoder.encode(holder), expected, ttlMs)
  }

  /** An earlier heartbeat may have arrived although its answer did not: then it is still ours, at another revision. */
  async #writeAgain(place: string, holder: string, ttlMs: number): Promise<number | null> {
    const last = await this.#entries.read(place)
    if (!last || last.deleted || new TextDecoder().decode(last.value) !== holder) return null
    return this.#write(place, holder, ttlMs, last.revision)
  }
}

function endOf({ expiresAt, storedAt }: StoredEntry): number {
  return expiresAt ?? storedAt
}
