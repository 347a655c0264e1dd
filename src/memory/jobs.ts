import {
  type CheckedJob,
  type ClaimedJob,
  type ClaimManyOptions,
  type ClaimOptions,
  checkBatch,
  checkDuration,
  checkEach,
  checkId,
  checkJob,
  checkLimit,
  checkQueue,
  checkSignal,
  type Job,
  type JobId,
  type JobQueue,
  MAX_WAIT_MS,
  optionsOf,
  type TxOption,
} from '../core/index.ts'
import { type ClaimBackend, type ClaimContext, HeldJob } from '../runtime/claimed-job.ts'
import { longPoll } from '../runtime/long-poll.ts'
import { type Context, checkTx, POLL_INTERVAL_MS } from './context.ts'
import type { MemoryClaim } from './job-table.ts'

export class MemoryJobs implements JobQueue {
  readonly #context: Context
  readonly #held = new Set<HeldJob<MemoryClaim, never>>()

  constructor(context: Context) {
    this.#context = context
  }

  async enqueue(queue: string, job: Job, options: TxOption<never> = {}): Promise<JobId> {
    this.#context.checkOpen()
    checkQueue(queue)
    const { tx } = optionsOf(options, ['tx'])
    const checked = this.#check(job)
    checkTx(tx)
    return (await this.#enqueue(queue, [checked]))[0] as JobId
  }

  async enqueueMany(queue: string, jobs: readonly Job[], options: TxOption<never> = {}): Promise<JobId[]> {
    this.#context.checkOpen()
    checkQueue(queue)
    const { tx } = optionsOf(options, ['tx'])
    checkBatch('jobs', jobs)
    const checked = checkEach('jobs', jobs, (job) => this.#check(job))
    checkTx(tx)
    return checked.length === 0 ? [] : this.#enqueue(queue, checked)
  }

  async claim(queue: string, workerId: string, leaseTtlMs: number, options: ClaimOptions = {}): Promise<ClaimedJob | null> {
    const { waitMs = 0, signal } = optionsOf(options, ['waitMs', 'signal'])
    return (await this.claimMany(queue, workerId, leaseTtlMs, { limit: 1, waitMs, ...(signal === undefined ? {} : { signal }) }))[0] ?? null
  }

  async claimMany(queue: string, workerId: string, leaseTtlMs: number, options: ClaimManyOptions): Promise<ClaimedJob[]> {
    this.#context.checkOpen()
    checkQueue(queue)
    checkId('workerId', workerId)
    checkDuration('leaseTtlMs', leaseTtlMs)
    const { limit, waitMs = 0, signal } = optionsOf(options ?? null, ['limit', 'waitMs', 'signal'])
    checkLimit(limit)
    checkDuration('waitMs', waitMs, 0, MAX_WAIT_MS)
    checkSignal(signal)
    const { store } = this.#context
    const found = await longPoll({
      clock: store.clock,
      waitMs,
      signal,
      ear: store.bell.listen({ kind: 'queue', name: queue }),
      attempt: async () => {
        const jobs = await this.#claim(queue, workerId, leaseTtlMs, limit)
        return jobs.length > 0 ? jobs : undefined
      },
      pauseMs: async () => store.jobs.nextInMs(queue) ?? POLL_INTERVAL_MS,
    })
    return found ?? []
  }

  async close(): Promise<void> {
    await Promise.all([...this.#held].map((job) => job.handBack()))
  }

  #check(job: Job): CheckedJob {
    return checkJob(job, this.#context.maxPayloadBytes)
  }

  async #enqueue(queue: string, jobs: readonly CheckedJob[]): Promise<JobId[]> {
    const { store, deadJobsMs } = this.#context
    await store.turn()
    return store.jobs.enqueue(queue, jobs, deadJobsMs)
  }

  async #claim(queue: string, workerId: string, ttlMs: number, limit: number): Promise<HeldJob<MemoryClaim, never>[]> {
    const { store } = this.#context
    const askedAt = store.clock.now()
    await store.turn()
    this.#context.checkOpen()
    const context: ClaimContext<MemoryClaim, never> = {
      clock: store.clock,
      backend: this.#backend,
      ttlMs,
      askedAt,
      checkTx,
      isClosed: this.#context.isClosed,
      onEnd: this.#onEnd,
    }
    const jobs = store.jobs.claim(queue, workerId, ttlMs, limit).map((claim) => new HeldJob<MemoryClaim, never>(claim, context))
    for (const job of jobs) this.#held.add(job)
    return jobs
  }

  readonly #onEnd = (job: HeldJob<MemoryClaim, never>) => void this.#held.delete(job)

  readonly #backend: ClaimBackend<MemoryClaim, never> = {
    ack: async (claim) => {
      const { store } = this.#context
      await store.turn()
      return store.jobs.ack(claim)
    },
    nak: async (claim, delayMs, error) => {
      const { store } = this.#context
      await store.turn()
      return store.jobs.nak(claim, delayMs, error)
    },
    deadLetter: async (claim, reason) => {
      const { store } = this.#context
      await store.turn()
      return store.jobs.deadLetter(claim, reason)
    },
    heartbeat: async (claim, ttlMs) => {
      const { store } = this.#context
      await store.turn()
      const end = store.jobs.heartbeat(claim, ttlMs)
      return end && { expiresAt: end, extended: true }
    },
    release: async (claim, counted) => {
      const { store } = this.#context
      await store.turn()
      store.jobs.release(claim, counted)
    },
  }
}
