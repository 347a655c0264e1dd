import {
  BusError,
  type ClaimedJob,
  checkDuration,
  checkFunction,
  checkId,
  checkInteger,
  checkOptions,
  checkQueue,
  invalid,
  isBusError,
  type JobQueue,
} from '../core/index.ts'
import { reconnectDelayMs } from './backoff.ts'
import { errorText } from './error-text.ts'

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

interface Running<Tx> {
  readonly job: ClaimedJob<Tx>
  readonly controller: AbortController
  readonly done: Promise<void>
}

const CLAIM_WAIT_MS = 20_000
/** A lease shorter than this would be nothing but heartbeats. */
const LEAST_HEARTBEAT_MS = 10

/**
 * Runs a handler for the jobs of a queue, on any backend. It starts at once, claims as many jobs as it has free places,
 * heartbeats while a handler runs, acks when it returns and naks with backoff when it throws. A handler that settled the
 * job itself is left alone. The handler's signal is aborted when the lease is lost and when the worker stops.
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
  readonly #running = new Set<Running<Tx>>()
  readonly #claiming = new AbortController()
  readonly #loop: Promise<void>
  #slotFreed: (() => void) | undefined
  #stopped: Promise<void> | undefined

  constructor(jobs: JobQueue<Tx>, queue: string, handler: JobHandler<Tx>, options: WorkerOptions = {}) {
    if (typeof jobs !== 'object' || jobs === null || typeof jobs.claimMany !== 'function')
      throw invalid('jobs', jobs, 'must be a JobQueue, such as bus.jobs')
    checkQueue(queue)
    checkFunction('handler', handler)
    checkOptions(options)
    const { concurrency = 1, leaseTtlMs = 30_000, workerId = `worker-${crypto.randomUUID()}`, onError } = options
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
    this.#loop = this.#claimLoop()
  }

  /** Claims no more, lets running handlers end, naks the rest. Idempotent; never rejects. */
  stop(options: StopOptions = {}): Promise<void> {
    const { graceMs = 30_000 } = options
    checkDuration('graceMs', graceMs)
    this.#stopped ??= this.#stop(graceMs)
    return this.#stopped
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.stop()
  }

  async #stop(graceMs: number): Promise<void> {
    this.#claiming.abort()
    this.#slotFreed?.()
    await this.#loop
    const { promise: graceOver, resolve } = Promise.withResolvers<void>()
    const timer = setTimeout(resolve, graceMs)
    await Promise.race([graceOver, Promise.all([...this.#running].map(({ done }) => done))])
    clearTimeout(timer)
    const reason = new BusError('closed', 'the worker stops')
    await Promise.all(
      [...this.#running].map(async ({ job, controller }) => {
        controller.abort(reason)
        await this.#attempt(job, () => job.nak(0, { error: 'the worker stopped' }))
      }),
    )
  }

  async #claimLoop(): Promise<void> {
    const { signal } = this.#claiming
    let failures = 0
    while (!signal.aborted) {
      const limit = this.#concurrency - this.#running.size
      if (limit === 0) {
        await new Promise<void>((resolve) => {
          this.#slotFreed = resolve
        })
        continue
      }
      try {
        const jobs = await this.#jobs.claimMany(this.#queue, this.#workerId, this.#leaseTtlMs, { limit, waitMs: CLAIM_WAIT_MS, signal })
        failures = 0
        for (const job of jobs) {
          if (signal.aborted) await this.#attempt(job, () => job.lease.release())
          else this.#start(job)
        }
      } catch (error) {
        if (isBusError(error, 'closed')) return this.#busClosed(error)
        this.#report(error)
        await this.#pause(reconnectDelayMs(++failures, 5_000))
      }
    }
  }

  /** The bus hands the jobs back itself; the handlers learn of it by their signal. */
  #busClosed(error: BusError): void {
    this.#claiming.abort()
    for (const { controller } of this.#running) controller.abort(error)
  }

  #start(job: ClaimedJob<Tx>): void {
    const controller = new AbortController()
    const running: Running<Tx> = { job, controller, done: this.#run(job, controller).finally(() => this.#running.delete(running)) }
    this.#running.add(running)
    void running.done.then(() => this.#slotFreed?.())
  }

  async #run(job: ClaimedJob<Tx>, controller: AbortController): Promise<void> {
    const { signal: lost } = job.lease
    const onLost = () => controller.abort(lost.reason)
    if (lost.aborted) onLost()
    else lost.addEventListener('abort', onLost, { once: true })
    const heartbeat = this.#heartbeats(job, controller)
    const watched = watchSettlement(job)
    try {
      await this.#handler(watched.job, controller.signal)
      heartbeat.stop()
      // Settled in a transaction that was rolled back, it is not done: an ack now would lose it.
      if (!watched.settled) await this.#attempt(job, () => job.ack())
    } catch (error) {
      heartbeat.stop()
      this.#report(error, job)
      await this.#attempt(job, () => job.nak(undefined, { error: errorText(error) }))
    } finally {
      heartbeat.stop()
      lost.removeEventListener('abort', onLost)
    }
  }

  /** Every third of the lease. One that fails is followed by the next; the lease's own signal tells when it is too late. */
  #heartbeats(job: ClaimedJob<Tx>, controller: AbortController): { stop(): void } {
    let stopped = false
    let timer: NodeJS.Timeout
    const beat = async () => {
      try {
        await job.heartbeat()
      } catch (error) {
        if (isBusError(error, 'lease_lost') || isBusError(error, 'closed')) {
          stopped = true
          controller.abort(error)
        }
      }
      if (!stopped) next()
    }
    const next = () => {
      timer = setTimeout(() => void beat(), Math.max(LEAST_HEARTBEAT_MS, this.#leaseTtlMs / 3))
      timer.unref()
    }
    next()
    return {
      stop: () => {
        stopped = true
        clearTimeout(timer)
      },
    }
  }

  /** Settles on the worker's behalf: that the handler did so before, or that the bus closed, is no error. */
  async #attempt(job: ClaimedJob<Tx>, settle: () => Promise<void>): Promise<void> {
    try {
      await settle()
    } catch (error) {
      if (!isBusError(error, 'already_settled') && !isBusError(error, 'closed')) this.#report(error, job)
    }
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

const SETTLEMENTS: ReadonlySet<PropertyKey> = new Set(['ack', 'nak', 'deadLetter'])

/** The job as the handler gets it, and whether he settled it himself. */
function watchSettlement<Tx>(job: ClaimedJob<Tx>): { readonly job: ClaimedJob<Tx>; readonly settled: boolean } {
  const watched = {
    settled: false,
    job: new Proxy(job, {
      get(target, key) {
        const value: unknown = Reflect.get(target, key, target)
        if (typeof value !== 'function') return value
        return async (...args: unknown[]) => {
          const result: unknown = await value.apply(target, args)
          if (SETTLEMENTS.has(key)) watched.settled = true
          return result
        }
      },
    }),
  }
  return watched
}
