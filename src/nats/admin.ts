import { AckPolicy, DeliverPolicy } from '@nats-io/jetstream'
import {
  type Admin,
  type BucketInfo,
  BusError,
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
  invalid,
  type JobDetails,
  type JobId,
  type JobInfo,
  type JobState,
  jobRuns,
  type ListJobsOptions,
  noSuchJob,
  type PurgeMessagesOptions,
  type PurgeQueueOptions,
  type QueueInfo,
  type SubscribeOptions,
} from '../core/index.ts'
import type { Context } from './context.ts'
import { infoOf } from './deliveries.ts'
import type { Durables } from './durables.ts'
import { absent, type Entries } from './entries.ts'
import { isNotThere } from './errors.ts'
import { isJobId, type JobRecord, type JobRecords, LEASE_RAN_OUT, MAX_ATTEMPTS_EXCEEDED } from './job-records.ts'
import { bucketOf } from './kv.ts'
import { pull } from './pull.ts'

const PURGE_BATCH = 500
const NEVER = new AbortController().signal

/** Lists read every job or key: for an operator, not for an app. */
export class NatsAdmin implements Admin {
  readonly #context: Context
  readonly #durables: Durables
  readonly #kv: Entries
  readonly #records: JobRecords

  constructor(context: Context, durables: Durables, kv: Entries, records: JobRecords) {
    this.#context = context
    this.#durables = durables
    this.#kv = kv
    this.#records = records
  }

  async queues(): Promise<QueueInfo[]> {
    this.#context.checkOpen()
    const [records, paused] = await Promise.all([this.#records.all(), this.#records.paused()])
    const now = this.#context.serverClock.now()
    const byQueue = new Map<string, JobRecord[]>([...paused.keys()].map((queue) => [queue, []]))
    for (const record of records) {
      const { queue } = record.data
      byQueue.set(queue, [...(byQueue.get(queue) ?? []), record])
    }
    const infos = [...byQueue].map(([queue, jobs]): QueueInfo => {
      const counts = { ready: 0, scheduled: 0, running: 0, dead: 0 }
      let oldest = Number.POSITIVE_INFINITY
      for (const job of jobs) {
        const state = stateOf(job, now)
        counts[state]++
        if (state === 'ready') oldest = Math.min(oldest, job.state.dueAt)
      }
      const pausedAt = paused.get(queue)
      return {
        queue,
        ...counts,
        ...(Number.isFinite(oldest) ? { oldestReadyAt: new Date(oldest) } : {}),
        ...(pausedAt === undefined ? {} : { pausedAt: new Date(pausedAt) }),
      }
    })
    return infos.sort((a, b) => (a.queue < b.queue ? -1 : 1))
  }

  async *jobs(options?: ListJobsOptions): AsyncIterable<JobInfo> {
    this.#context.checkOpen()
    const { queue, state, after } = checkListing(options)
    if (after !== undefined && !isJobId(after)) throw invalid('after', after, 'must be the id of a job')
    const records = await this.#records.all(queue)
    const now = this.#context.serverClock.now()
    for (const record of records) {
      if (after !== undefined && record.data.id <= after) continue
      const info = infoOfJob(record, now)
      if (state === undefined || info.state === state) yield info
    }
  }

  async job(id: JobId): Promise<JobDetails | null> {
    this.#context.checkOpen()
    checkJobId(id)
    const record = await this.#records.find(id)
    if (!record) return null
    const { headers, payload } = record.data
    return { ...infoOfJob(record, this.#context.serverClock.now()), headers, payload }
  }

  async retryJob(id: JobId): Promise<void> {
    this.#context.checkOpen()
    checkJobId(id)
    for (;;) {
      const record = await this.#records.find(id)
      if (!record) throw noSuchJob(id)
      if (await this.#retry(record)) return
    }
  }

  async retryDead(queue: string): Promise<number> {
    this.#context.checkOpen()
    checkQueue(queue)
    let count = 0
    for (const listed of await this.#records.all(queue)) {
      let record: JobRecord | null = listed
      while (record && stateOf(record, this.#context.serverClock.now()) === 'dead') {
        if (await this.#retry(record)) {
          count++
          break
        }
        record = await this.#records.find(listed.data.id)
      }
    }
    return count
  }

  async cancelJob(id: JobId, reason = 'cancelled'): Promise<void> {
    this.#context.checkOpen()
    checkJobId(id)
    checkText('reason', reason)
    for (;;) {
      const record = await this.#records.find(id)
      if (!record) throw noSuchJob(id)
      if (record.state.is === 'dead') return
      if (await this.#buried(record)) return
      if (await this.#records.bury(record, reason, undefined)) return
    }
  }

  async removeJob(id: JobId): Promise<void> {
    this.#context.checkOpen()
    checkJobId(id)
    for (;;) {
      const record = await this.#records.find(id)
      if (!record) throw noSuchJob(id)
      if (stateOf(record, this.#context.serverClock.now()) === 'running') throw jobRuns(id)
      if (await this.#remove(record)) return
    }
  }

  async purgeQueue(queue: string, options?: PurgeQueueOptions): Promise<number> {
    this.#context.checkOpen()
    checkQueue(queue)
    const states: readonly JobState[] = checkPurge(options)
    let count = 0
    for (const record of await this.#records.all(queue)) {
      if (states.includes(stateOf(record, this.#context.serverClock.now())) && (await this.#remove(record))) count++
    }
    return count
  }

  async pauseQueue(queue: string): Promise<void> {
    this.#context.checkOpen()
    checkQueue(queue)
    await this.#records.pause(queue)
  }

  async resumeQueue(queue: string): Promise<void> {
    this.#context.checkOpen()
    checkQueue(queue)
    await this.#records.resume(queue)
  }

  async durables(): Promise<DurableInfo[]> {
    this.#context.checkOpen()
    const durables = await this.#durables.all()
    const infos = await Promise.all(
      durables.map(async (durable): Promise<DurableInfo | null> => {
        const info = await this.#durables.infoOf(durable)
        if (!info) return null
        const out = info.num_ack_pending
        // JetStream counts what was delivered more than once, and does not say which of it is out and which waits.
        const redelivering = Math.min(out, info.num_redelivered)
        return {
          durable: durable.durable,
          filter: durable.filter,
          pending: info.num_pending,
          inFlight: out - redelivering,
          redelivering,
          lastActiveAt: new Date(info.delivered.last_active ?? info.created),
        }
      }),
    )
    return infos.filter((info) => info !== null).sort((a, b) => (a.durable < b.durable ? -1 : 1))
  }

  async seekDurable(durable: string, start: NonNullable<SubscribeOptions['start']>): Promise<void> {
    this.#context.checkOpen()
    checkDurable(durable)
    await this.#durables.seek(durable, checkStart(start))
  }

  async purgeMessages(filter: string, options?: PurgeMessagesOptions): Promise<number> {
    this.#context.checkOpen()
    checkFilter(filter, 'filter')
    const before = checkBefore(options)
    let count = 0
    for (const seq of await this.#published(filter, before)) if (await this.#deleteMessage(seq)) count++
    return count
  }

  async buckets(): Promise<BucketInfo[]> {
    this.#context.checkOpen()
    const byBucket = new Map<string, { keys: number; bytes: number }>()
    for (const entry of await this.#kv.all('>', true)) {
      if (absent(entry)) continue
      const bucket = bucketOf(entry.key)
      const sum = byBucket.get(bucket) ?? { keys: 0, bytes: 0 }
      sum.keys++
      sum.bytes += entry.bytes
      byBucket.set(bucket, sum)
    }
    return [...byBucket].map(([bucket, sum]) => ({ bucket, ...sum })).sort((a, b) => (a.bucket < b.bucket ? -1 : 1))
  }

  /** @returns false when the state was another one by then */
  async #retry(record: JobRecord): Promise<boolean> {
    const { data, state } = record
    const now = this.#context.serverClock.now()
    const shown = stateOf(record, now)
    if (shown === 'running') throw jobRuns(data.id)
    if (await this.#buried(record)) return false
    const round = state.round + 1
    if (shown !== 'ready') {
      const { attempts, error = state.reason } = state
      const ready = {
        is: 'ready',
        attempts: shown === 'dead' ? 0 : attempts,
        dueAt: now,
        round,
        ...(error === undefined ? {} : { error }),
      } as const
      if ((await this.#records.write(record, ready)) === null) return false
    }
    // For one that is ready, too: whoever made it so may have died before the ticket.
    await this.#records.ticket(data.queue, data.id, shown === 'ready' ? crypto.randomUUID() : round)
    return true
  }

  /** One that is dead and whose letter nobody has published yet gets it. @returns whether it was one */
  async #buried(record: JobRecord): Promise<boolean> {
    if (record.state.is === 'dead' || stateOf(record, this.#context.serverClock.now()) !== 'dead') return false
    if (record.state.is === 'dying') await this.#records.finishBurying(record)
    else await this.#records.bury(record, MAX_ATTEMPTS_EXCEEDED, LEASE_RAN_OUT)
    return true
  }

  /** First the state: from then on nobody claims it. */
  async #remove(record: JobRecord): Promise<boolean> {
    const { attempts, dueAt, round } = record.state
    const revision = await this.#records.write(record, { is: 'done', attempts, dueAt, round })
    if (revision === null) return false
    await this.#records.forget(record.data, revision)
    return true
  }

  /**
   * The numbers of the stored messages that match. They are deleted one by one: a purge by subject of nats-server 2.9 moves durables with a wider
   * filter past messages that it leaves alone.
   */
  async #published(filter: string, before: Date | undefined): Promise<number[]> {
    const { jsm, names } = this.#context
    const { name } = await this.#context.ask(() =>
      jsm.consumers.add(names.messages, {
        ack_policy: AckPolicy.None,
        deliver_policy: DeliverPolicy.All,
        filter_subject: names.message(filter),
        inactive_threshold: 60_000 * 1e6,
        headers_only: true,
        mem_storage: true,
        num_replicas: 1,
      }),
    )
    const seqs: number[] = []
    try {
      for (;;) {
        const { messages, how } = await pull(this.#context, names.messages, name, { batch: PURGE_BATCH, waitMs: 0, signal: NEVER })
        if (how !== 'answered') {
          this.#context.checkOpen()
          throw new BusError('connection', 'NATS did not answer in time; purge again', { retryable: true })
        }
        for (const { seq, time } of messages.map(infoOf)) if (before === undefined || time < before.getTime()) seqs.push(seq)
        if (messages.length < PURGE_BATCH) return seqs
      }
    } finally {
      jsm.consumers.delete(names.messages, name).catch(() => {})
    }
  }

  /** @returns false when it was gone before */
  #deleteMessage(seq: number): Promise<boolean> {
    const { jsm, names } = this.#context
    return this.#context.ask(async () => {
      try {
        return await jsm.streams.deleteMessage(names.messages, seq, false)
      } catch (error) {
        if (isNotThere(error)) return false
        throw error
      }
    })
  }
}

/** One whose last lease is over is dead, whether or not somebody has buried it. */
function stateOf({ state, data }: JobRecord, now: number): JobState {
  const isLast = state.attempts >= data.maxAttempts
  if (state.is === 'running') return (state.until ?? 0) > now ? 'running' : isLast ? 'dead' : 'ready'
  if (state.is === 'ready') return state.dueAt > now ? 'scheduled' : 'ready'
  return 'dead'
}

function infoOfJob(record: JobRecord, now: number): JobInfo {
  const { data, state } = record
  const shown = stateOf(record, now)
  const lastError = lastErrorOf(state, shown)
  return {
    id: data.id,
    queue: data.queue,
    state: shown,
    priority: data.priority,
    attempts: state.attempts,
    maxAttempts: data.maxAttempts,
    enqueuedAt: new Date(data.enqueuedAt),
    runAt: new Date(state.dueAt),
    ...(state.is === 'running' && shown !== 'dead' && state.until !== undefined ? { leasedUntil: new Date(state.until) } : {}),
    ...(state.workerId === undefined ? {} : { workerId: state.workerId }),
    ...(data.dedupKey === undefined ? {} : { dedupKey: data.dedupKey }),
    ...(lastError === undefined ? {} : { lastError }),
    ...(state.diedAt === undefined ? {} : { diedAt: new Date(state.diedAt) }),
    payloadBytes: data.payloadBytes,
  }
}

function lastErrorOf({ is, error, reason }: JobRecord['state'], shown: JobState): string | undefined {
  if (shown !== 'dead') return error
  // Nobody has buried it yet.
  if (is === 'running') return LEASE_RAN_OUT
  return reason === undefined || reason === MAX_ATTEMPTS_EXCEEDED ? error : reason
}
