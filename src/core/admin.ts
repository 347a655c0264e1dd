/**
 * What an operator does with a bus: look at it, retry, cancel and remove jobs, hold a queue, move a durable, empty a log. The rules (A1 … A6)
 * are in docs/contract.md. Nothing here is needed to run an app; the command line is made of it.
 */

import type { Headers, JobId, SubscribeOptions } from './types.ts'

/**
 * `ready`: claimable now, expired leases included. `scheduled`: delayed, or waiting after a failure. `running`: claimed, lease not over.
 * `dead`: out of attempts, dead-lettered or cancelled.
 */
export type JobState = 'ready' | 'scheduled' | 'running' | 'dead'

export interface QueueInfo {
  readonly queue: string
  readonly ready: number
  readonly scheduled: number
  readonly running: number
  readonly dead: number
  /** Since when the longest-waiting claimable job waits. */
  readonly oldestReadyAt?: Date
  /** Since when the queue is paused (A3). */
  readonly pausedAt?: Date
}

/** A job that still exists, without what it carries. */
export interface JobInfo {
  readonly id: JobId
  readonly queue: string
  readonly state: JobState
  readonly priority: number
  /** Claims so far. */
  readonly attempts: number
  readonly maxAttempts: number
  readonly enqueuedAt: Date
  /** When it became or becomes due, before it was last claimed. */
  readonly runAt: Date
  /** The end of its lease, also when that is over and nobody has claimed the job since. */
  readonly leasedUntil?: Date
  /** Who claimed it last; not kept by every backend. */
  readonly workerId?: string
  readonly dedupKey?: string
  /** What its last handler said, or why it is dead. */
  readonly lastError?: string
  readonly diedAt?: Date
  readonly payloadBytes: number
}

export interface JobDetails extends JobInfo {
  readonly headers: Headers
  readonly payload: Uint8Array
}

export interface ListJobsOptions {
  /** @default all queues */
  readonly queue?: string
  /** @default all states */
  readonly state?: JobState
  /** Only jobs after this one, in the order of ids. @default from the first */
  readonly after?: JobId
}

export interface PurgeQueueOptions {
  /** What is removed; a running job never is. @default all three */
  readonly states?: readonly Exclude<JobState, 'running'>[]
}

export interface DurableInfo {
  readonly durable: string
  readonly filter: string
  /** Messages never handed out yet. */
  readonly pending: number
  /** Handed out and unsettled, ack wait not over. */
  readonly inFlight: number
  /** Waiting to be handed out again. */
  readonly redelivering: number
  /** When a member last fetched, to within half a minute. */
  readonly lastActiveAt: Date
}

export interface PurgeMessagesOptions {
  /** Only what was published before. @default everything that is stored */
  readonly before?: Date
}

export interface BucketInfo {
  readonly bucket: string
  /** Present keys. */
  readonly keys: number
  /** Of their values. */
  readonly bytes: number
}

export interface Admin {
  /** Every queue that holds a job or is paused, by name (A1). Costs what counting costs. */
  queues(): Promise<QueueInfo[]>
  /** Jobs in the order of their ids, read as they are asked for (A1). @throws invalid_argument */
  jobs(options?: ListJobsOptions): AsyncIterable<JobInfo>
  /** `null` when there is no such job (any more). */
  job(id: JobId): Promise<JobDetails | null>
  /**
   * Makes a dead job ready again with all its attempts, and a scheduled one ready now (A2). Does nothing to a ready one.
   * @throws not_found, conflict for a running job
   */
  retryJob(id: JobId): Promise<void>
  /** Makes all dead jobs of a queue ready again, with all their attempts (A2). @returns how many */
  retryDead(queue: string): Promise<number>
  /**
   * Makes a job dead, whoever holds it: the holder's settlement is refused with `lease_lost`, and so is its next heartbeat (A2). Its dead letter
   * has the reason. Does nothing to a dead one.
   * @param reason @default 'cancelled'
   * @throws not_found, conflict (retryable) while an open transaction is about to settle it
   */
  cancelJob(id: JobId, reason?: string): Promise<void>
  /** Removes a job without a trace (A2). @throws not_found, conflict for a running job: cancel it first */
  removeJob(id: JobId): Promise<void>
  /** Removes the jobs of a queue that are not running (A2). @returns how many */
  purgeQueue(queue: string, options?: PurgeQueueOptions): Promise<number>
  /** A claim that begins after it resolved gives no job of this queue; running ones go on (A3). Idempotent. */
  pauseQueue(queue: string): Promise<void>
  /** Idempotent; claims that wait go on at once (A3). */
  resumeQueue(queue: string): Promise<void>
  /** Every durable, by name (A1). */
  durables(): Promise<DurableInfo[]>
  /**
   * Moves a durable; what its members hold is not theirs any more (A4).
   * @param start as in `subscribe`: `{ seq }` is the first message to come again
   * @throws not_found
   */
  seekDurable(durable: string, start: NonNullable<SubscribeOptions['start']>): Promise<void>
  /** Removes stored messages whose subject matches, delivered or not (A5). @returns how many */
  purgeMessages(filter: string, options?: PurgeMessagesOptions): Promise<number>
  /** Every bucket with a present key, by name (A1). */
  buckets(): Promise<BucketInfo[]>
}
