import {
  type Bus,
  BusError,
  type ClaimedJob,
  type ClaimManyOptions,
  type ClaimOptions,
  checkFunction,
  checkQueue,
  fieldsOf,
  type Headers,
  isBusError,
  type Job,
  type JobId,
  type JobQueue,
  type Lease,
  type NakOptions,
  optionsOf,
  type TxOption,
} from '../core/index.ts'
import { Worker, type WorkerOptions } from '../runtime/worker.ts'
import { partOf, writeEach } from './calls.ts'
import { Form, type Format, type FormatOptions, type InputOf, type OutputOf } from './format.ts'
import { INVALID_PAYLOAD } from './reason.ts'

/** What a job has besides its data. */
export type TypedJobOptions = Omit<Job, 'payload'>
export type TypedEnqueueOptions<Tx = never> = TypedJobOptions & TxOption<Tx>

export interface TypedNewJob<In> extends TypedJobOptions {
  readonly data: In
}

export interface TypedJob<Data, Tx = never> extends ClaimedJob<Tx> {
  /** What the schema made of the payload. */
  readonly data: Data
}

export type TypedJobHandler<Data, Tx = never> = (job: TypedJob<Data, Tx>, signal: AbortSignal) => Promise<void>

/**
 * A queue and what its jobs hold. A job that cannot be decoded or does not match is dead at once, with `dlq_reason` `invalid_payload: …`, and no
 * handler sees it.
 */
export interface QueueContract<In, Out = In> {
  readonly queue: string
  /** As `jobs.enqueue`, of data. @throws invalid_argument when the data does not match, and then nothing was enqueued */
  enqueue<Tx>(bus: Pick<Bus<Tx>, 'jobs'>, data: In, options?: TypedEnqueueOptions<NoInfer<Tx>>): Promise<JobId>
  /** All or none. @throws as `enqueue`; what does not match is named by its place */
  enqueueMany<Tx>(bus: Pick<Bus<Tx>, 'jobs'>, jobs: readonly TypedNewJob<In>[], options?: TxOption<NoInfer<Tx>>): Promise<JobId[]>
  /** Begins to work. `onError` is told of jobs that do not match, too. @throws what the constructor of `Worker` throws */
  worker<Tx>(bus: Pick<Bus<Tx>, 'jobs'>, handler: TypedJobHandler<Out, Tx>, options?: WorkerOptions): Worker<Tx>
  /** As `jobs.claim`: the first that matches, `null` when there is none within `waitMs`. */
  claim<Tx>(bus: Pick<Bus<Tx>, 'jobs'>, workerId: string, leaseTtlMs: number, options?: ClaimOptions): Promise<TypedJob<Out, Tx> | null>
  /** As `jobs.claimMany`. There may be more jobs even where fewer than `limit` come: those that do not match count. */
  claimMany<Tx>(bus: Pick<Bus<Tx>, 'jobs'>, workerId: string, leaseTtlMs: number, options: ClaimManyOptions): Promise<TypedJob<Out, Tx>[]>
}

/**
 * What the jobs of a queue hold, said once for those who enqueue and those who work.
 *
 * @param format a schema or a codec: `format.ts`. Without one the data is JSON of the type `T` and is not validated; what is not JSON does not match
 * @throws invalid_argument
 */
export function defineQueue<F extends Format>(queue: string, format: F, options?: FormatOptions): QueueContract<InputOf<F>, OutputOf<F>>
export function defineQueue<T = unknown>(queue: string): QueueContract<T>
export function defineQueue(queue: string, format?: Format, options?: FormatOptions): QueueContract<unknown> {
  checkQueue(queue)
  return new DefinedQueue(queue, Form.of(format, options))
}

const JOB_OPTIONS = ['headers', 'dedupKey', 'maxAttempts', 'delayMs', 'runAt', 'priority'] as const

class DefinedQueue<In, Out> implements QueueContract<In, Out> {
  readonly queue: string
  readonly #form: Form<In, Out>

  constructor(queue: string, form: Form<In, Out>) {
    this.queue = queue
    this.#form = form
  }

  async enqueue<Tx>(bus: Pick<Bus<Tx>, 'jobs'>, data: In, options?: TypedEnqueueOptions<Tx>): Promise<JobId> {
    const jobs = partOf(bus, 'jobs')
    const { tx, ...given } = optionsOf(options, [...JOB_OPTIONS, 'tx'])
    const written = this.#form.write(data)
    const payload = written instanceof Promise ? await written : written
    return await jobs.enqueue(this.queue, jobOf(payload, given), tx === undefined ? {} : { tx })
  }

  async enqueueMany<Tx>(bus: Pick<Bus<Tx>, 'jobs'>, jobs: readonly TypedNewJob<In>[], options?: TxOption<Tx>): Promise<JobId[]> {
    const queue = partOf(bus, 'jobs')
    const written = await writeEach('jobs', jobs, async (job) => {
      const { data, ...given } = fieldsOf('job', job, [...JOB_OPTIONS, 'data'])
      return jobOf(await this.#form.write(data as In), given)
    })
    return await queue.enqueueMany(this.queue, written, options)
  }

  worker<Tx>(bus: Pick<Bus<Tx>, 'jobs'>, handler: TypedJobHandler<Out, Tx>, options?: WorkerOptions): Worker<Tx> {
    const jobs = partOf(bus, 'jobs')
    checkFunction('handler', handler)
    const run = async (job: ClaimedJob<Tx>, signal: AbortSignal) => {
      const reading = await this.#form.read(job.payload)
      if (reading.matches) return await handler(new ReadJob(job, reading.data), signal)
      await bury(job, reading.reason)
      // The job is settled: the worker only reports it.
      throw mismatch(job, reading.reason)
    }
    return new Worker(jobs, this.queue, run, options)
  }

  async claim<Tx>(
    bus: Pick<Bus<Tx>, 'jobs'>,
    workerId: string,
    leaseTtlMs: number,
    options?: ClaimOptions,
  ): Promise<TypedJob<Out, Tx> | null> {
    const jobs = partOf(bus, 'jobs')
    return (await this.#claim(options, (rest) => claimOne(jobs, this.queue, workerId, leaseTtlMs, rest)))[0] ?? null
  }

  async claimMany<Tx>(
    bus: Pick<Bus<Tx>, 'jobs'>,
    workerId: string,
    leaseTtlMs: number,
    options: ClaimManyOptions,
  ): Promise<TypedJob<Out, Tx>[]> {
    const jobs = partOf(bus, 'jobs')
    return await this.#claim(options, (rest) => jobs.claimMany(this.queue, workerId, leaseTtlMs, { ...options, ...rest }))
  }

  /** Claims until something matches, nothing is there or the time is over. */
  async #claim<Tx>(
    options: ClaimOptions | undefined,
    claim: (rest: ClaimOptions) => Promise<ClaimedJob<Tx>[]>,
  ): Promise<ReadJob<Out, Tx>[]> {
    const { waitMs = 0 } = optionsOf(options, ['waitMs'])
    const until = performance.now() + waitMs
    let rest = { ...options }
    for (;;) {
      const claimed = await claim(rest)
      const read = await Promise.all(claimed.map((job) => this.#read(job)))
      const matching = read.filter((job) => job instanceof ReadJob)
      if (matching.length > 0 || claimed.length === 0) return matching
      // Nothing is in the caller's hands that an error could take from him.
      const failed = read.find((outcome) => outcome instanceof BusError)
      if (failed) throw failed
      rest = { ...options, waitMs: Math.max(0, Math.ceil(until - performance.now())) }
    }
  }

  /** `null` when it did not match and is dead, or somebody else's; an error when it is not: it comes back when its lease is over. */
  async #read<Tx>(job: ClaimedJob<Tx>): Promise<ReadJob<Out, Tx> | BusError | null> {
    const reading = await this.#form.read(job.payload)
    if (reading.matches) return new ReadJob(job, reading.data)
    try {
      await bury(job, reading.reason)
      return null
    } catch (error) {
      if (isBusError(error, 'lease_lost')) return null
      return error instanceof BusError ? error : new BusError('internal', 'the job does not match and could not be ended', { cause: error })
    }
  }
}

function jobOf(payload: Uint8Array, options: { readonly [K in keyof TypedJobOptions]: TypedJobOptions[K] | undefined }): Job {
  return { ...Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined)), payload }
}

async function claimOne<Tx>(
  jobs: JobQueue<Tx>,
  queue: string,
  workerId: string,
  leaseTtlMs: number,
  options: ClaimOptions,
): Promise<ClaimedJob<Tx>[]> {
  const job = await jobs.claim(queue, workerId, leaseTtlMs, options)
  return job ? [job] : []
}

function bury(job: ClaimedJob<never>, reason: string): Promise<void> {
  return job.deadLetter(`${INVALID_PAYLOAD}: ${reason}`)
}

function mismatch({ id, queue }: Pick<ClaimedJob, 'id' | 'queue'>, reason: string): BusError {
  return new BusError('invalid_argument', `job ${id} does not match: ${reason}; it was published on "${queue}.dlq"`)
}

class ReadJob<Data, Tx> implements TypedJob<Data, Tx> {
  readonly #job: ClaimedJob<Tx>
  readonly data: Data

  constructor(job: ClaimedJob<Tx>, data: Data) {
    this.#job = job
    this.data = data
  }

  get id(): JobId {
    return this.#job.id
  }
  get queue(): string {
    return this.#job.queue
  }
  get payload(): Uint8Array {
    return this.#job.payload
  }
  get headers(): Headers {
    return this.#job.headers
  }
  get attempt(): number {
    return this.#job.attempt
  }
  get maxAttempts(): number {
    return this.#job.maxAttempts
  }
  get lease(): Lease {
    return this.#job.lease
  }

  heartbeat(): Promise<void> {
    return this.#job.heartbeat()
  }

  ack(options?: TxOption<Tx>): Promise<void> {
    return this.#job.ack(options)
  }

  nak(delayMs?: number, options?: NakOptions): Promise<void> {
    return this.#job.nak(delayMs, options)
  }

  deadLetter(reason: string): Promise<void> {
    return this.#job.deadLetter(reason)
  }
}
