import {
  type Admin,
  type BucketInfo,
  checkBefore,
  checkDurable,
  checkFilter,
  checkJobId,
  checkListing,
  checkPurge,
  checkQueue,
  checkStart,
  checkText,
  type DurableInfo,
  type Headers,
  invalid,
  type JobDetails,
  type JobId,
  type JobInfo,
  type JobState,
  jobIsBeingSettled,
  jobRuns,
  type ListJobsOptions,
  noSuchDurable,
  noSuchJob,
  type PurgeMessagesOptions,
  type PurgeQueueOptions,
  type QueueInfo,
  type SubscribeOptions,
} from '../core/index.ts'
import { AGAIN_AFTER_MS } from '../runtime/backoff.ts'
import {
  BUCKETS,
  CANCEL_JOB,
  DURABLES,
  JOB,
  JOBS_PAGE,
  jobsStatement,
  PAUSE_QUEUE,
  PURGE_MESSAGES,
  PURGE_QUEUE,
  QUEUES,
  REMOVE_JOB,
  RESUME_QUEUE,
  RETRY_DEAD,
  RETRY_JOB,
  SEEK_DURABLE,
} from './admin.sql.ts'
import { fromBase64, pgArray } from './arrays.ts'
import type { Context } from './context.ts'

/** Removed, or looked at, in one statement. */
const BATCH = 10_000

interface QueueRow extends Record<string, unknown> {
  readonly queue: string
  readonly ready: number
  readonly scheduled: number
  readonly running: number
  readonly dead: number
  readonly oldest_ready_at_ms: number | null
  readonly paused_at_ms: number | null
}

interface JobRow extends Record<string, unknown> {
  readonly id: string
  readonly queue: string
  readonly state: JobState
  readonly priority: number
  readonly attempts: number
  readonly max_attempts: number
  readonly enqueued_at_ms: number
  readonly run_at_ms: number
  readonly leased_until_ms: number | null
  readonly worker_id: string | null
  readonly dedup_key: string | null
  readonly last_error: string | null
  readonly died_at_ms: number | null
  readonly payload_bytes: number
}

interface DurableRow extends Record<string, unknown> {
  readonly durable: string
  readonly filter: string
  readonly pending: number
  readonly in_flight: number
  readonly redelivering: number
  readonly last_active_at_ms: number
}

interface OutcomeRow extends Record<string, unknown> {
  readonly outcome: 'retried' | 'ready' | 'running' | 'cancelled' | 'dead' | 'removed' | 'locked'
  readonly queue: string
}

export class PostgresAdmin implements Admin {
  readonly #context: Context

  constructor(context: Context) {
    this.#context = context
  }

  async queues(): Promise<QueueInfo[]> {
    this.#context.checkOpen()
    const rows = await this.#query<QueueRow>(QUEUES, [], 'queues')
    return rows.map(({ queue, ready, scheduled, running, dead, oldest_ready_at_ms, paused_at_ms }) => ({
      queue,
      ready,
      scheduled,
      running,
      dead,
      ...(oldest_ready_at_ms === null ? {} : { oldestReadyAt: new Date(oldest_ready_at_ms) }),
      ...(paused_at_ms === null ? {} : { pausedAt: new Date(paused_at_ms) }),
    }))
  }

  async *jobs(options?: ListJobsOptions): AsyncIterable<JobInfo> {
    this.#context.checkOpen()
    const { queue, state, after = '0' } = checkListing(options)
    if (!isNumber(after)) throw invalid('after', after, 'must be the id of a job')
    const statement = jobsStatement(queue !== undefined, state)
    const which = [queue, state === 'dead' ? undefined : state].filter((value) => value !== undefined)
    for (let last = after; ; ) {
      const rows = await this.#query<JobRow>(statement, [last, ...which], 'jobs')
      yield* rows.map(toJobInfo)
      const end = rows.at(-1)
      if (!end || rows.length < JOBS_PAGE) return
      last = end.id
    }
  }

  async job(id: JobId): Promise<JobDetails | null> {
    this.#context.checkOpen()
    checkJobId(id)
    if (!isNumber(id)) return null
    const [row] = await this.#query<JobRow & { readonly headers: Headers; readonly payload: string }>(JOB, [id], 'job')
    return row ? { ...toJobInfo(row), headers: row.headers, payload: fromBase64(row.payload) } : null
  }

  async retryJob(id: JobId): Promise<void> {
    const { outcome, queue } = await this.#change(id, RETRY_JOB, [], 'retryJob')
    if (outcome === 'running') throw jobRuns(id)
    this.#context.ringer.ring([{ kind: 'queue', name: queue }])
  }

  async retryDead(queue: string): Promise<number> {
    this.#context.checkOpen()
    checkQueue(queue)
    const [row] = await this.#query<{ count: number }>(RETRY_DEAD, [queue], 'retryDead')
    this.#context.ringer.ring([{ kind: 'queue', name: queue }])
    return row?.count ?? 0
  }

  async cancelJob(id: JobId, reason = 'cancelled'): Promise<void> {
    this.#context.checkOpen()
    checkText('reason', reason)
    const { outcome, queue } = await this.#change(id, CANCEL_JOB, [reason], 'cancelJob')
    if (outcome === 'cancelled') this.#context.ringer.ring([{ kind: 'message', name: `${queue}.dlq` }])
  }

  async removeJob(id: JobId): Promise<void> {
    const { outcome } = await this.#change(id, REMOVE_JOB, [], 'removeJob')
    if (outcome === 'running') throw jobRuns(id)
  }

  async purgeQueue(queue: string, options?: PurgeQueueOptions): Promise<number> {
    this.#context.checkOpen()
    checkQueue(queue)
    const states = pgArray(checkPurge(options))
    for (let sum = 0; ; ) {
      const [row] = await this.#query<{ count: number }>(PURGE_QUEUE, [queue, states, BATCH], 'purgeQueue')
      const count = row?.count ?? 0
      sum += count
      if (count < BATCH) return sum
    }
  }

  async pauseQueue(queue: string): Promise<void> {
    this.#context.checkOpen()
    checkQueue(queue)
    await this.#query(PAUSE_QUEUE, [queue], 'pauseQueue')
  }

  async resumeQueue(queue: string): Promise<void> {
    this.#context.checkOpen()
    checkQueue(queue)
    await this.#query(RESUME_QUEUE, [queue], 'resumeQueue')
    this.#context.ringer.ring([{ kind: 'queue', name: queue }])
  }

  async durables(): Promise<DurableInfo[]> {
    this.#context.checkOpen()
    const rows = await this.#query<DurableRow>(DURABLES, [], 'durables')
    return rows.map(({ durable, filter, pending, in_flight, redelivering, last_active_at_ms }) => ({
      durable,
      filter,
      pending,
      inFlight: in_flight,
      redelivering,
      lastActiveAt: new Date(last_active_at_ms),
    }))
  }

  async seekDurable(durable: string, start: NonNullable<SubscribeOptions['start']>): Promise<void> {
    this.#context.checkOpen()
    checkDurable(durable)
    const to = checkStart(start)
    const seq = typeof to === 'object' && 'seq' in to ? to.seq : null
    const time = typeof to === 'object' && 'time' in to ? to.time.getTime() : null
    const [row] = await this.#query<{ done: boolean }>(SEEK_DURABLE, [durable, seq, time, to === 'new'], 'seekDurable')
    if (!row?.done) throw noSuchDurable(durable)
    this.#context.ringer.ring([{ kind: 'durable', name: durable }])
  }

  async purgeMessages(filter: string, options?: PurgeMessagesOptions): Promise<number> {
    this.#context.checkOpen()
    checkFilter(filter, 'filter')
    const before = checkBefore(options)?.getTime() ?? null
    let position: { readonly last_tx: string; readonly last_seq: number } = { last_tx: '0', last_seq: 0 }
    for (let sum = 0; ; ) {
      const [row] = await this.#query<{ purged: number; last_tx: string; last_seq: number }>(
        PURGE_MESSAGES,
        [filter, before, position.last_tx, position.last_seq, BATCH],
        'purgeMessages',
      )
      if (!row) return sum
      sum += row.purged
      position = row
    }
  }

  async buckets(): Promise<BucketInfo[]> {
    this.#context.checkOpen()
    return this.#query<BucketInfo & Record<string, unknown>>(BUCKETS, [], 'buckets')
  }

  /** @throws not_found, conflict while an open transaction is about to settle it */
  async #change(id: JobId, text: string, more: readonly unknown[], doing: string): Promise<OutcomeRow> {
    this.#context.checkOpen()
    checkJobId(id)
    if (!isNumber(id)) throw noSuchJob(id)
    // A claim or a heartbeat lets go of it at once.
    for (const pauseMs of [0, ...AGAIN_AFTER_MS]) {
      if (pauseMs > 0) await new Promise((resolve) => setTimeout(resolve, pauseMs))
      const [row] = await this.#query<OutcomeRow>(text, [id, ...more], doing)
      if (!row) throw noSuchJob(id)
      if (row.outcome !== 'locked') return row
    }
    throw jobIsBeingSettled(id)
  }

  #query<R extends Record<string, unknown>>(text: string, values: readonly unknown[], doing: string): Promise<R[]> {
    return this.#context.db.query<R>(text, values, doing)
  }
}

/** Ids of this backend are numbers; to those who hold them they are opaque, so none is written in two ways. */
function isNumber(id: JobId): boolean {
  return /^(?:0|[1-9][0-9]{0,17})$/.test(id)
}

function toJobInfo(row: JobRow): JobInfo {
  const date = (ms: number | null, key: 'leasedUntil' | 'diedAt') => (ms === null ? {} : { [key]: new Date(ms) })
  return {
    id: row.id,
    queue: row.queue,
    state: row.state,
    priority: row.priority,
    attempts: row.attempts,
    maxAttempts: row.max_attempts,
    enqueuedAt: new Date(row.enqueued_at_ms),
    runAt: new Date(row.run_at_ms),
    ...date(row.leased_until_ms, 'leasedUntil'),
    ...(row.worker_id === null ? {} : { workerId: row.worker_id }),
    ...(row.dedup_key === null ? {} : { dedupKey: row.dedup_key }),
    ...(row.last_error === null ? {} : { lastError: row.last_error }),
    ...date(row.died_at_ms, 'diedAt'),
    payloadBytes: row.payload_bytes,
  }
}
