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
  invalid,
  type JobDetails,
  type JobId,
  type JobInfo,
  type ListJobsOptions,
  type PurgeMessagesOptions,
  type PurgeQueueOptions,
  type QueueInfo,
  type SubscribeOptions,
} from '../core/index.ts'
import type { Context } from './context.ts'
import type { MemoryStore } from './store.ts'

export class MemoryAdmin implements Admin {
  readonly #context: Context

  constructor(context: Context) {
    this.#context = context
  }

  async queues(): Promise<QueueInfo[]> {
    const { jobs } = await this.#store()
    return jobs.queues().sort(by(({ queue }) => queue))
  }

  async *jobs(options?: ListJobsOptions): AsyncIterable<JobInfo> {
    this.#context.checkOpen()
    const listing = checkListing(options)
    if (listing.after !== undefined && !/^(?:0|[1-9][0-9]{0,17})$/.test(listing.after))
      throw invalid('after', listing.after, 'must be the id of a job')
    const { jobs } = await this.#store()
    yield* jobs.list(listing)
  }

  async job(id: JobId): Promise<JobDetails | null> {
    this.#context.checkOpen()
    checkJobId(id)
    const { jobs } = await this.#store()
    return jobs.details(id)
  }

  async retryJob(id: JobId): Promise<void> {
    this.#context.checkOpen()
    checkJobId(id)
    const { jobs } = await this.#store()
    jobs.retry(id)
  }

  async retryDead(queue: string): Promise<number> {
    this.#context.checkOpen()
    checkQueue(queue)
    const { jobs } = await this.#store()
    return jobs.retryDead(queue)
  }

  async cancelJob(id: JobId, reason = 'cancelled'): Promise<void> {
    this.#context.checkOpen()
    checkJobId(id)
    checkText('reason', reason)
    const { jobs } = await this.#store()
    jobs.cancel(id, reason)
  }

  async removeJob(id: JobId): Promise<void> {
    this.#context.checkOpen()
    checkJobId(id)
    const { jobs } = await this.#store()
    jobs.remove(id)
  }

  async purgeQueue(queue: string, options?: PurgeQueueOptions): Promise<number> {
    this.#context.checkOpen()
    checkQueue(queue)
    const states = checkPurge(options)
    const { jobs } = await this.#store()
    return jobs.purge(queue, states)
  }

  async pauseQueue(queue: string): Promise<void> {
    this.#context.checkOpen()
    checkQueue(queue)
    const { jobs } = await this.#store()
    jobs.pause(queue)
  }

  async resumeQueue(queue: string): Promise<void> {
    this.#context.checkOpen()
    checkQueue(queue)
    const { jobs } = await this.#store()
    jobs.resume(queue)
  }

  async durables(): Promise<DurableInfo[]> {
    const { log } = await this.#store()
    return log.durables().sort(by(({ durable }) => durable))
  }

  async seekDurable(durable: string, start: NonNullable<SubscribeOptions['start']>): Promise<void> {
    this.#context.checkOpen()
    checkDurable(durable)
    const to = structuredClone(checkStart(start))
    const { log } = await this.#store()
    log.seek(durable, to)
  }

  async purgeMessages(filter: string, options?: PurgeMessagesOptions): Promise<number> {
    this.#context.checkOpen()
    checkFilter(filter, 'filter')
    const before = checkBefore(options)
    const { log } = await this.#store()
    return log.purge(filter, before)
  }

  async buckets(): Promise<BucketInfo[]> {
    const { entries } = await this.#store()
    return entries.buckets().sort(by(({ bucket }) => bucket))
  }

  async #store(): Promise<MemoryStore> {
    this.#context.checkOpen()
    const { store, deadJobsMs } = this.#context
    await store.turn()
    store.jobs.pruneDead(deadJobsMs)
    return store
  }
}

function by<T>(name: (item: T) => string): (a: T, b: T) => number {
  return (a, b) => (name(a) < name(b) ? -1 : 1)
}
