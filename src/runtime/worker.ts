import {
  BusError,
  type ClaimedJob,
  checkDuration,
  checkFunction,
  checkId,
  checkInteger,
  checkQueue,
  invalid,
  isBusError,
  type JobQueue,
  MAX_CLAIM_LIMIT,
  optionsOf,
  reading,
} from '../core/index.ts'
import { reconnectDelayMs } from './backoff.ts'
import { type Claim, HeldJob } from './claimed-job.ts'
import { errorText } from './error-text.ts'
import { Pace, Ready } from './prefetch.ts'
import { Run } from './run.ts'

export interface WorkerOptions {
  /** Jobs handled at once. @default 1 */
  readonly concurrency?: number
  /** How long a claim lasts between two heartbeats, which come every third of it. @default 30_000 */
  readonly leaseTtlMs?: number
  /** Shown beside a running job. @default a random id */
  readonly workerId?: string
  /** Told of everything that goes wrong: a handler that threw (with its job), a claim that failed. @default a process warning */
  readonly onError?: (error: unknown, job?: ClaimedJob) => void
}

export interface StopOptions {
  /** How long running handlers may take to end; then their signal is aborted and their jobs go back. @default 30_000 */
  readonly graceMs?: number
}

export type JobHandler<Tx = never> = (job: ClaimedJob<Tx>, signal: AbortSignal) => Promise<void>

const CLAIM_WAIT_MS = 20_000
/** A lease shorter than this would be nothing but heartbeats. */
const LEAST_HEARTBEAT_MS = 10
/** Heartbeats come with every second tick; so one may be late by a tick, and no job needs a timer of its own. */
const TICKS_PER_HEARTBEAT = 2
/** Settlements under way; when there are more, no handler is begun. */
const MOST_UNSETTLED = 1_000

/**
 * Runs a handler for the jobs of a queue, on any backend. It starts at once, claims as many jobs as it has free places,
 * heartbeats while a handler runs, acks when it returns and naks with backoff when it throws. A handler that settled the
 * job itself is left alone. The handler's signal is aborted when the lease is lost and when the worker stops.
 *
 * A place is free again when its handler has ended; the ack follows together with others.
 *
 * Where handlers take less time than claiming their jobs does, and there is a backlog, jobs are claimed ahead: as many as
 * should be begun within 100 ms, and at most 1,000. One that is not begun within a second, or a sixth of `leaseTtlMs`, or
 * before the worker stops or its bus closes, goes back to the queue, and the attempt is not counted. When the process dies
 * it is: the jobs that it had claimed ahead come back when their leases run out, like those that it was handling.
 *
 * @throws invalid_argument from the constructor
 */
export class Worker<Tx = never> implements AsyncDisposable {
  readonly #jobs: JobQueue<Tx>
  readonly #queue: string
  readonly #handler: JobHandler<Tx>
  readonly #concurrency: number
  readonly #leaseTtlMs: number
  readonly #workerId: string
  readonly #onError: ((error: unknown, job?: ClaimedJob) => void) | undefined
  readonly #running = new Set<Run<Tx>>()
  readonly #ready = new Ready<Tx>()
  readonly #pace: Pace
  readonly #claiming = new AbortController()
  readonly #loop: Promise<void>
  #unsettled = 0
  /** The loop waits for places. */
  #wake: (() => void) | undefined
  /** The stop waits for the last settlement. */
  #onIdle: (() => void) | undefined
  #ticker: NodeJS.Timeout | undefined
  #staleTimer: NodeJS.Timeout | undefined
  #stopped: Promise<void> | undefined

  constructor(jobs: JobQueue<Tx>, queue: string, handler: JobHandler<Tx>, options: WorkerOptions = {}) {
    if (typeof jobs !== 'object' || jobs === null || typeof reading('jobs', jobs, () => jobs.claimMany) !== 'function')
      throw invalid('jobs', jobs, 'must be a JobQueue, such as bus.jobs')
    checkQueue(queue)
    checkFunction('handler', handler)
    const given = optionsOf(options, ['concurrency', 'leaseTtlMs', 'workerId', 'onError'])
    const { concurrency = 1, leaseTtlMs = 30_000, workerId = `worker-${crypto.randomUUID()}`, onError } = given
    checkInteger('concurrency', concurrency, 1, 1_000)
    checkDuration('leaseTtlMs', leaseTtlMs, 1)
    checkId('workerId', workerId)
    if (onError !== undefined) checkFunction('onError', onError)
    this.#jobs = jobs
    this.#queue = queue
    this.#handler = handler
    this.#concurrency = concurrency
    this.#leaseTtlMs = leaseTtlMs
    this.#workerId = workerId
    this.#onError = onError
    this.#pace = new Pace(concurrency, leaseTtlMs)
    this.#loop = this.#claimLoop()
  }

  /** Claims no more, lets running handlers end, naks the rest. Idempotent. @throws invalid_argument, and then it has not stopped */
  async stop(options: StopOptions = {}): Promise<void> {
    const { graceMs = 30_000 } = optionsOf(options, ['graceMs'])
    checkDuration('graceMs', graceMs)
    this.#stopped ??= this.#stop(graceMs)
    await this.#stopped
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.stop()
  }

  async #stop(graceMs: number): Promise<void> {
    this.#claiming.abort()
    this.#wake?.()
    clearTimeout(this.#staleTimer)
    const handedBack = this.#putBack(this.#ready.drain())
    await this.#loop
    const { promise: over, resolve } = Promise.withResolvers<void>()
    const timer = setTimeout(resolve, graceMs)
    this.#onIdle = resolve
    if (this.#running.size + this.#unsettled === 0) resolve()
    await over
    clearTimeout(timer)
    const reason = new BusError('closed', 'the worker stops')
    await Promise.all(
      [...this.#running].map(async (run) => {
        run.abort(reason)
        await this.#attempt(run.job, () => run.job.nak(0, { error: 'the worker stopped' }))
      }),
    )
    await handedBack
  }

  async #claimLoop(): Promise<void> {
    const { signal } = this.#claiming
    let failures = 0
    while (!signal.aborted) {
      const limit = this.#wanted()
      if (limit === 0) {
        await new Promise<void>((resolve) => {
          this.#wake = resolve
        })
        this.#wake = undefined
        continue
      }
      // A claim ahead of the need does not wait for jobs: what comes in later is for whoever has a place.
      const waitMs = limit > this.#free ? 0 : CLAIM_WAIT_MS
      try {
        const jobs = await this.#jobs.claimMany(this.#queue, this.#workerId, this.#leaseTtlMs, { limit, waitMs, signal })
        failures = 0
        if (signal.aborted) await this.#putBack(jobs)
        else this.#take(jobs, limit)
      } catch (error) {
        if (isBusError(error, 'closed')) return this.#busClosed(error)
        this.#report(error)
        await this.#pause(reconnectDelayMs(++failures, 5_000))
      }
    }
  }

  get #free(): number {
    return this.#concurrency - this.#running.size
  }

  /** How many jobs to claim now; 0: none. */
  #wanted(): number {
    if (this.#unsettled >= MOST_UNSETTLED) return 0
    const ready = this.#pace.ready
    // Few large claims are cheaper than many small ones.
    const ahead = this.#ready.size <= ready / 2 ? ready : 0
    return Math.max(0, Math.min(MAX_CLAIM_LIMIT, this.#free + ahead - this.#ready.size))
  }

  #take(jobs: readonly ClaimedJob<Tx>[], asked: number): void {
    const held: HeldJob<Claim, Tx>[] = []
    for (const job of jobs) {
      if (HeldJob.is(job)) held.push(job)
      else this.#start(job)
    }
    if (jobs.length > 0 && held.length === 0) return
    const tookMs = held[0]?.ageMs ?? 0
    this.#pace.claimed(asked, held.length, tookMs, this.#ready.size === 0)
    // What has a place is begun however long the claim took; the others wait from their arrival, but for what that took of the lease.
    this.#ready.add(held, performance.now() - Math.min(tookMs, this.#pace.staleMs / 2))
    this.#begin()
    this.#watchStale()
  }

  /** Begins what is ready, as far as there are places. */
  #fill(): void {
    if (this.#ready.size === 0) return
    // The process may have stood still for longer than they may wait.
    if (this.#isStale()) this.#handBackStale()
    this.#begin()
  }

  #begin(): void {
    while (this.#free > 0 && this.#unsettled < MOST_UNSETTLED) {
      const job = this.#ready.take()
      if (!job) return
      this.#start(job)
    }
  }

  /** The bus hands the jobs back itself; the handlers learn of it by their signal. */
  #busClosed(error: BusError): void {
    this.#claiming.abort()
    clearTimeout(this.#staleTimer)
    this.#ready.drain()
    for (const run of this.#running) run.abort(error)
  }

  #start(job: ClaimedJob<Tx>): void {
    const run = new Run(job, performance.now())
    this.#running.add(run)
    this.#tick()
    // A claim that took long has left little of the lease.
    if (HeldJob.is(job) && job.ageMs > this.#leaseTtlMs / 3) void run.beat()
    void this.#run(run)
  }

  async #run(run: Run<Tx>): Promise<void> {
    let failed: { readonly error: unknown } | undefined
    try {
      await this.#handler(run.handed, run.signal)
    } catch (error) {
      failed = { error }
    }
    this.#running.delete(run)
    this.#unsettled++
    this.#pace.handled(performance.now() - run.startedAt)
    this.#fill()
    this.#wakeLoop()
    const { job } = run
    try {
      if (failed) {
        this.#report(failed.error, job)
        await job.nak(undefined, { error: errorText(failed.error) })
      } else if (!run.wasSettled) {
        // Settled in a transaction that was rolled back, it is not done: an ack then would lose it.
        await job.ack()
      }
    } catch (error) {
      this.#settlementFailed(error, job)
    }
    run.end()
    if (this.#unsettled-- >= MOST_UNSETTLED) this.#fill()
    this.#wakeLoop()
    if (this.#running.size + this.#unsettled === 0) this.#onIdle?.()
  }

  #wakeLoop(): void {
    if (this.#wake && this.#wanted() > 0) this.#wake()
  }

  #isStale(): boolean {
    const { since } = this.#ready
    return since !== undefined && performance.now() - since >= this.#pace.staleMs
  }

  #watchStale(): void {
    const { since } = this.#ready
    if (this.#staleTimer || since === undefined || this.#claiming.signal.aborted) return
    this.#staleTimer = setTimeout(
      () => {
        this.#staleTimer = undefined
        if (this.#isStale()) this.#handBackStale()
        this.#watchStale()
      },
      Math.max(1, since + this.#pace.staleMs - performance.now()),
    )
    this.#staleTimer.unref()
  }

  #handBackStale(): void {
    const stale = this.#ready.drain(performance.now() - this.#pace.staleMs)
    this.#pace.stalled()
    void this.#putBack(stale)
    this.#wakeLoop()
  }

  /** What nobody has begun goes back to the queue. */
  async #putBack(jobs: readonly ClaimedJob<Tx>[]): Promise<void> {
    await Promise.all(
      jobs.map((job) => {
        if (!HeldJob.is(job)) return this.#attempt(job, () => job.lease.release())
        job.wait()
        return job.putBack()
      }),
    )
  }

  /** One timer for the heartbeats of all jobs; none while nothing runs. A beat that fails is followed by the next. */
  #tick(): void {
    if (this.#ticker) return
    const tickMs = Math.max(LEAST_HEARTBEAT_MS, this.#leaseTtlMs / 3) / TICKS_PER_HEARTBEAT
    this.#ticker = setTimeout(() => {
      this.#ticker = undefined
      for (const run of this.#running) if (run.isDue(TICKS_PER_HEARTBEAT)) void run.beat()
      if (this.#running.size > 0) this.#tick()
    }, tickMs)
    this.#ticker.unref()
  }

  /** Settles on the worker's behalf. */
  async #attempt(job: ClaimedJob<Tx>, settle: () => Promise<void>): Promise<void> {
    try {
      await settle()
    } catch (error) {
      this.#settlementFailed(error, job)
    }
  }

  /** That the handler settled the job before, or that the bus closed, is no error. */
  #settlementFailed(error: unknown, job: ClaimedJob<Tx>): void {
    if (!isBusError(error, 'already_settled') && !isBusError(error, 'closed')) this.#report(error, job)
  }

  #report(error: unknown, job?: ClaimedJob<Tx>): void {
    try {
      if (this.#onError) this.#onError(error, job as ClaimedJob | undefined)
      else {
        const which = job ? `, job ${job.id}, attempt ${job.attempt}` : ''
        process.emitWarning(`worker of queue "${this.#queue}"${which}: ${errorText(error)}`, 'KlieoBusWarning')
      }
    } catch {
      // A listener that throws must not end the worker.
    }
  }

  #pause(ms: number): Promise<void> {
    const { signal } = this.#claiming
    const { promise, resolve } = Promise.withResolvers<void>()
    const timer = setTimeout(resolve, ms)
    signal.addEventListener('abort', resolve as () => void, { once: true })
    return promise.finally(() => {
      clearTimeout(timer)
      signal.removeEventListener('abort', resolve as () => void)
    })
  }
}
