/**
 * Reaping and pruning. One process of many does it: the one that holds the bus's own lease. Nothing depends on it but
 * space and tidiness: expired leases are taken back by whoever claims next, with or without it.
 *
 *   candidate ── lease granted ──▶ elected ── lease lost, or an error ──▶ candidate
 *       └── its role lacks the rights (docs/security.md) ──▶ out
 */

import { isBusError } from '../core/index.ts'
import { reconnectDelayMs } from '../runtime/backoff.ts'
import type { Topic } from '../runtime/bell.ts'
import type { Context } from './context.ts'

/** $1 token, $2 holder, $3 lease in ms */
const ELECT = 'select klieo.elect_maintainer($1::text::uuid, $2, $3) as elected'
const RESIGN = 'select klieo.resign_maintainer($1::text::uuid)'

const LEASE_MS = 15_000
const REAP_EVERY_MS = 1_000
const PRUNE_EVERY_MS = 10_000
const REAP_BATCH = 500
const PRUNE_BATCH = 5_000
/** One round removes so much at the most, so that the lease is renewed in time. */
const MAX_ROUNDS = 20

export interface Retention {
  /** Messages older than this are removed once every durable is past them. */
  readonly messagesMs: number
  /** Dead jobs are kept so long. */
  readonly deadJobsMs: number
}

export class Maintenance {
  readonly #context: Context
  readonly #retention: Retention
  readonly #end = Promise.withResolvers<void>()
  readonly #token = crypto.randomUUID()
  #closed = false
  #elected = false
  /** The lease may still be ours, whatever failed since. */
  #granted = false
  #running: Promise<void> | undefined

  constructor(context: Context, retention: Retention) {
    this.#context = context
    this.#retention = retention
  }

  start(): void {
    this.#running = this.#run()
  }

  async close(): Promise<void> {
    this.#closed = true
    this.#end.resolve()
    await this.#running
    // Somebody else may start at once.
    await this.#resign()
  }

  async #resign(): Promise<void> {
    if (this.#granted) await this.#context.db.query(RESIGN, [this.#token], 'maintenance').catch(() => {})
    this.#granted = false
  }

  async #run(): Promise<void> {
    const { clock } = this.#context
    let failures = 0
    let prunedAt = Number.NEGATIVE_INFINITY
    while (!this.#closed) {
      try {
        this.#elected = await this.#holdLease()
        if (this.#elected) {
          await this.#reap()
          if (clock.now() - prunedAt >= PRUNE_EVERY_MS) {
            await this.#prune()
            prunedAt = clock.now()
          }
        }
        failures = 0
      } catch (error) {
        // A role that may not do this leaves it to those that may, without a word: that is what its rights say.
        if (isBusError(error, 'permission_denied')) return await this.#resign()
        this.#elected = false
        failures++
      }
      const pause =
        failures > 0 ? reconnectDelayMs(failures, LEASE_MS) : this.#elected ? REAP_EVERY_MS : (LEASE_MS / 3) * (0.5 + Math.random())
      await this.#pause(pause)
    }
  }

  async #holdLease(): Promise<boolean> {
    const { db, instance } = this.#context
    const [row] = await db.query<{ elected: boolean }>(ELECT, [this.#token, instance, LEASE_MS], 'maintenance')
    this.#granted = row?.elected === true
    return this.#granted
  }

  async #reap(): Promise<void> {
    const { db, ringer } = this.#context
    const topics: Topic[] = []
    await this.#rounds(async () => {
      const rows = await db.query<{ queue: string; count: number }>(
        'select queue, count from klieo.reap_jobs($1)',
        [REAP_BATCH],
        'reap jobs',
      )
      for (const { queue } of rows) topics.push({ kind: 'message', name: `${queue}.dlq` })
      return rows.reduce((sum, { count }) => sum + count, 0) >= REAP_BATCH
    })
    await this.#rounds(async () => {
      const rows = await db.query<{ durable: string; count: number }>(
        'select durable, count from klieo.reap_deliveries($1)',
        [REAP_BATCH],
        'reap deliveries',
      )
      for (const { durable } of rows) topics.push({ kind: 'message', name: `${durable}.dlq` })
      return rows.reduce((sum, { count }) => sum + count, 0) >= REAP_BATCH
    })
    await this.#rounds(async () => {
      const rows = await db.query<{ bucket: string; count: number }>(
        'select bucket, count from klieo.kv_expire($1)',
        [REAP_BATCH],
        'expire keys',
      )
      for (const { bucket } of rows) topics.push({ kind: 'bucket', name: bucket })
      return rows.reduce((sum, { count }) => sum + count, 0) >= REAP_BATCH
    })
    if (topics.length > 0) ringer.ring(topics)
  }

  async #prune(): Promise<void> {
    const { db } = this.#context
    const { messagesMs, deadJobsMs } = this.#retention
    const statements: readonly [string, readonly unknown[]][] = [
      ['select klieo.prune_messages($1, $2) as count', [messagesMs, PRUNE_BATCH]],
      ['select klieo.prune_kv($1) as count', [PRUNE_BATCH]],
      ['select klieo.prune_rest($1, $2) as count', [deadJobsMs, PRUNE_BATCH]],
    ]
    for (const [statement, values] of statements) {
      await this.#rounds(async () => {
        const [row] = await db.query<{ count: number }>(statement, values, 'prune')
        return row !== undefined && row.count >= PRUNE_BATCH
      })
    }
  }

  /** Again and again while there is a full batch. */
  async #rounds(round: () => Promise<boolean>): Promise<void> {
    for (let rounds = 0; rounds < MAX_ROUNDS && !this.#closed; rounds++) {
      if (!(await round())) return
    }
  }

  async #pause(ms: number): Promise<void> {
    let cancel = () => {}
    await Promise.race([this.#end.promise, new Promise<void>((resolve) => (cancel = this.#context.clock.setTimer(resolve, ms)))])
    cancel()
  }
}
