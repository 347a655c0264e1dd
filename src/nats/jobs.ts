import { AckPolicy } from '@nats-io/jetstream'
import type { Msg } from '@nats-io/transport-node'
import {
  BusError,
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
  DEDUP_WINDOW_MS,
  type Job,
  type JobId,
  type JobQueue,
  MAX_DURATION_MS,
  MAX_WAIT_MS,
  optionsOf,
  type TxOption,
} from '../core/index.ts'
import { type Claim, type ClaimBackend, type ClaimContext, HeldJob } from '../runtime/claimed-job.ts'
import { consumerInfo, makeConsumer } from './consumers.ts'
import { type Context, checkTx, PullEar } from './context.ts'
import { Hold, nakVerb } from './deliveries.ts'
import {
  type JobData,
  type JobRecord,
  type JobRecords,
  type JobState,
  LEASE_RAN_OUT,
  MAX_ATTEMPTS_EXCEEDED,
  type NewJob,
} from './job-records.ts'
import { pull } from './pull.ts'
import { tokenOf } from './wire.ts'

interface NatsClaim extends Claim {
  readonly hold: Hold
  /** As the holder last wrote it. */
  record: JobRecord
}

/** One call of claim. A job may come twice in it: it has a second ticket where it was retried, and the first again when its lease is over. */
interface Call {
  readonly given: Set<JobId>
  /** Handed back once the call is over. */
  readonly tooMany: Hold[]
}

const WINDOW = 256
const MOST_TICKETS = 100
const PULL_MS = 20_000
/** A consumer hears of a ticket a little after its publisher was answered, and says until then that there is none. */
const SIGNAL_MS = 25
/** Of a job that one server does not know and others do the ticket comes again after this. */
const STALE_MS = 250
/** A ticket that could not be looked at comes again after this, or, when that cannot be said, after its ack wait. */
const FAILED_MS = 1_000
/** A ticket may be in the hands of somebody who died, for one of them. */
const STRANDED_ACK_WAITS = 2
/** A sweep reads every job of the queue: so many times as long as it took passes before the next. */
const SWEEP_PAUSES = 100
/** A paused queue is looked at again, should the word of its resumption be lost. */
const PAUSED_MS = 1_000

export class NatsJobs implements JobQueue {
  readonly #context: Context
  readonly #records: JobRecords
  readonly #held = new Set<HeldJob<NatsClaim, never>>()
  /** What goes on after its caller was answered. */
  readonly #background = new Set<Promise<void>>()
  readonly #consumers = new Map<string, Promise<string>>()
  /** When the jobs of each queue are looked through next, by the local clock. */
  readonly #sweeps = new Map<string, number>()
  readonly #claiming = new Set<PullEar>()

  constructor(context: Context, records: JobRecords) {
    this.#context = context
    this.#records = records
  }

  async enqueue(queue: string, job: Job, options: TxOption<never> = {}): Promise<JobId> {
    this.#context.checkOpen()
    checkQueue(queue)
    const { tx } = optionsOf(options, ['tx'])
    const checked = this.#check(job)
    checkTx(tx)
    return (await this.#enqueue(queue, [checked]))[0] as JobId
  }

  /** In order; what fails leaves what went before it: NATS 2.9 has no publish of several. */
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
    const { clock, bell } = this.#context
    const end = clock.now() + waitMs
    const ear = new PullEar(bell)
    const onAbort = () => ear.close()
    if (signal?.aborted) return []
    signal?.addEventListener('abort', onAbort, { once: true })
    this.#claiming.add(ear)
    try {
      // First what is there, then what comes until the time is over.
      for (let waitFor = 0; ; waitFor = Math.min(PULL_MS, end - clock.now())) {
        const consumer = await this.#consumer(queue)
        if (waitFor < 0 || ear.ended.aborted) return []
        if ((await this.#records.pausedAt(queue)) !== null) {
          await this.#untilResumed(queue, ear, Math.min(PAUSED_MS, end - clock.now()))
          if (clock.now() >= end) return []
          continue
        }
        const found = await this.#claim(queue, consumer, workerId, leaseTtlMs, limit, Math.ceil(waitFor), ear)
        if (found.length === 0) this.#sweepNowAndThen(queue)
        if (found.length > 0 || clock.now() >= end) return found
      }
    } finally {
      this.#claiming.delete(ear)
      signal?.removeEventListener('abort', onAbort)
      ear.close()
    }
  }

  async close(): Promise<void> {
    for (const ear of this.#claiming) ear.close()
    await Promise.all([...this.#held].map((job) => job.handBack()))
    await Promise.all(this.#background)
  }

  #check(job: Job): CheckedJob {
    const checked = checkJob(job, this.#context.maxPayloadBytes)
    if (checked.priority === 0) return checked
    throw new BusError(
      'unsupported',
      'priority: a queue of NATS has one order; PostgresBus and MemoryBus have priorities, or use a queue for each',
    )
  }

  async #enqueue(queue: string, jobs: readonly CheckedJob[]): Promise<JobId[]> {
    const ids: JobId[] = []
    for (let start = 0; start < jobs.length; start += WINDOW) {
      const some = jobs.slice(start, start + WINDOW)
      const made = await this.#write(queue, some)
      ids.push(...made.map(({ id }) => id))
      // Written without waiting for one another, on one connection: they stay in order.
      await Promise.all(made.filter(({ isNew }) => isNew).map(({ id }) => this.#records.ticket(queue, id, 0)))
    }
    return ids
  }

  async #write(queue: string, jobs: readonly CheckedJob[]): Promise<{ readonly id: string; readonly isNew: boolean }[]> {
    const now = this.#context.serverClock.now()
    const written = await Promise.all(
      jobs.map(async (job) => {
        const id = this.#records.newId()
        return { id, job, revision: await this.#records.writeData(queue, id, newJob(job, now)) }
      }),
    )
    const made: { id: string; isNew: boolean }[] = []
    for (const { id, job, revision } of written) {
      const first = job.dedupKey === undefined ? id : await this.#records.record(queue, job.dedupKey, id, DEDUP_WINDOW_MS)
      if (first === id) made.push({ id, isNew: true })
      else {
        await this.#records.erase(revision)
        // Whoever wrote the record may have died before the ticket. One of this batch gets its own, in its place.
        const found = made.some(({ id: earlier }) => earlier === first) ? null : await this.#records.read(queue, first)
        if (found?.revision === 0) await this.#records.ticket(queue, first, 0)
        made.push({ id: first, isNew: false })
      }
    }
    return made
  }

  /** One consumer per queue that somebody claims from. */
  #consumer(queue: string): Promise<string> {
    const known = this.#consumers.get(queue)
    if (known) return known
    const made = this.#makeConsumer(queue)
    made.catch(() => this.#consumers.delete(queue))
    this.#consumers.set(queue, made)
    return made
  }

  async #makeConsumer(queue: string): Promise<string> {
    const { names, jobAckWaitMs } = this.#context
    const name = `queue-${tokenOf(queue)}`
    if (await consumerInfo(this.#context, names.work, name)) return name
    await makeConsumer(this.#context, names.work, {
      durable_name: name,
      description: `queue ${queue} of klieo-bus`,
      ack_policy: AckPolicy.Explicit,
      filter_subject: names.ticket(tokenOf(queue)),
      ack_wait: jobAckWaitMs * 1e6,
      max_deliver: -1,
      max_ack_pending: -1,
      max_waiting: 8_192,
    })
    return name
  }

  async #untilResumed(queue: string, ear: PullEar, ms: number): Promise<void> {
    if (ms <= 0) return
    const subscription = this.#context.nc.subscribe(this.#records.pauseSubject(queue), { callback: () => ear.ring() })
    try {
      await ear.wait(ms)
    } finally {
      subscription.unsubscribe()
    }
  }

  async #claim(
    queue: string,
    consumer: string,
    workerId: string,
    ttlMs: number,
    limit: number,
    waitMs: number,
    ear: PullEar,
  ): Promise<ClaimedJob[]> {
    const { names } = this.#context
    const found: NatsClaim[] = []
    const contexts = new Map<NatsClaim, number>()
    const call: Call = { given: new Set(), tooMany: [] }
    let last = false
    for (let wait = waitMs; ; wait = last ? SIGNAL_MS : 0) {
      const batch = wait > 0 ? 1 : Math.min(MOST_TICKETS, limit - found.length)
      const { messages, how } = await pull(this.#context, names.work, consumer, { batch, waitMs: wait, signal: ear.ended })
      if (how === 'silent') this.#consumers.delete(queue)
      const arrivedAt = this.#context.clock.now()
      const claims = await Promise.allSettled(messages.map((msg) => this.#open(queue, msg, workerId, ttlMs, call)))
      for (const claim of claims) {
        if (claim.status === 'rejected') {
          // Its ticket comes again. What was claimed beside it is the caller's.
          if (found.length === 0 && claims.every(({ status }) => status === 'rejected')) throw claim.reason
        } else if (claim.value) {
          found.push(claim.value)
          contexts.set(claim.value, arrivedAt)
        }
      }
      if (found.length >= limit || how !== 'answered' || ear.ended.aborted || (wait > 0 && messages.length === 0)) break
      // It said that there is nothing more: once again, with a little patience.
      last = messages.length < batch
    }
    for (const hold of call.tooMany) hold.last(0)
    // Of those that came together the one that has waited longest goes first (J8).
    found.sort((a, b) => a.record.state.dueAt - b.record.state.dueAt)
    const held = found.map((claim) => {
      const job = new HeldJob<NatsClaim, never>(claim, this.#holding(ttlMs, contexts.get(claim) as number))
      this.#held.add(job)
      return job
    })
    if (!this.#context.isClosed() && !ear.ended.aborted) return held
    // Nobody is there any more to get them.
    await Promise.all(
      held.map((job) => {
        job.wait()
        return job.putBack()
      }),
    )
    this.#context.checkOpen()
    return []
  }

  #holding(ttlMs: number, askedAt: number): ClaimContext<NatsClaim, never> {
    const { clock, isClosed } = this.#context
    return { clock, backend: this.#backend, ttlMs, askedAt, checkTx, isClosed, onEnd: this.#onEnd }
  }

  /** What a ticket is good for; `undefined`: nothing now. */
  async #open(queue: string, msg: Msg, workerId: string, ttlMs: number, call: Call): Promise<NatsClaim | undefined> {
    const { serverClock, jobAckWaitMs, isReplicated } = this.#context
    const id = msg.string()
    const hold = new Hold(this.#context, msg, jobAckWaitMs, jobAckWaitMs)
    try {
      for (;;) {
        const [record, pausedAt] = await Promise.all([this.#records.read(queue, id), this.#records.pausedAt(queue)])
        const now = serverClock.now()
        if (call.given.has(id)) {
          call.tooMany.push(hold)
          return undefined
        }
        if (record === null) {
          if (!(await this.#records.isGone(queue, id))) {
            await hold.settleAnyway(nakVerb(STALE_MS))
            return undefined
          }
          await this.#records.forgetState(queue, id)
          await hold.settleAnyway('+ACK')
          return undefined
        }
        const { data, state } = record
        if (state.is === 'dying' && !(await this.#records.finishBurying(record))) continue
        // Somebody may have retried it, and the ticket be for that.
        if (state.is === 'dead' && isReplicated && (await this.#records.write(record, state)) === null) continue
        if (state.is === 'done') await this.#records.forget(data, record.revision)
        if (state.is === 'dying' || state.is === 'done' || state.is === 'dead') {
          await hold.settleAnyway('+ACK')
          return undefined
        }
        const notBefore = state.is === 'running' ? (state.until ?? 0) : state.dueAt
        if (pausedAt !== null || notBefore > now) {
          await hold.settleAnyway(nakVerb(Math.min(MAX_DURATION_MS, Math.ceil(Math.max(0, notBefore - now)))))
          return undefined
        }
        if (state.attempts >= data.maxAttempts) {
          if (!(await this.#records.bury(record, MAX_ATTEMPTS_EXCEEDED, LEASE_RAN_OUT))) continue
          await hold.settleAnyway('+ACK')
          return undefined
        }
        const running: JobState = {
          is: 'running',
          attempts: state.attempts + 1,
          dueAt: state.dueAt,
          round: state.round,
          until: now + ttlMs,
          workerId,
          claim: crypto.randomUUID(),
          ...(state.error === undefined ? {} : { error: state.error }),
        }
        const revision = await this.#records.write(record, running)
        if (revision === null) continue
        call.given.add(id)
        hold.last(ttlMs)
        return {
          id,
          queue,
          payload: data.payload,
          headers: data.headers,
          attempt: running.attempts,
          maxAttempts: data.maxAttempts,
          fence: revision,
          expiresAt: new Date(running.until as number),
          hold,
          record: { data, state: running, revision },
        }
      }
    } catch (error) {
      hold.handBack(FAILED_MS)
      throw error
    }
  }

  readonly #onEnd = (job: HeldJob<NatsClaim, never>) => void this.#held.delete(job)

  /** The state decides, by compare-and-set; the ticket follows. */
  readonly #backend: ClaimBackend<NatsClaim, never> = {
    ack: (claim) =>
      this.#inTurn(claim, async () => {
        const { hold } = claim
        const revision = await this.#writeState(claim, (state) => ({ ...bare(state), is: 'done' }))
        if (revision === null) return false
        this.#later(async () => {
          await this.#records.forget(claim.record.data, revision)
          await hold.settleAnyway('+ACK')
        })
        return true
      }),
    nak: (claim, delayMs, error) =>
      this.#inTurn(claim, async () => {
        const { hold } = claim
        if (claim.attempt >= claim.maxAttempts) return this.#bury(claim, MAX_ATTEMPTS_EXCEEDED, error)
        const dueAt = this.#context.serverClock.now() + delayMs
        const said = error ?? claim.record.state.error
        const ready = (state: JobState): JobState => ({
          ...bare(state),
          is: 'ready',
          dueAt,
          ...(said === undefined ? {} : { error: said }),
        })
        if ((await this.#writeState(claim, ready)) === null) return false
        await this.#follow(hold, () => (delayMs === 0 ? this.#queueUp(claim) : hold.settleAnyway(nakVerb(delayMs))))
        return true
      }),
    deadLetter: (claim, reason) => this.#inTurn(claim, () => this.#bury(claim, reason, undefined)),
    heartbeat: (claim, ttlMs) =>
      this.#inTurn(claim, async () => {
        const until = Math.max(claim.record.state.until ?? 0, this.#context.serverClock.now() + ttlMs)
        const revision = await this.#writeState(claim, (state) => ({ ...state, until }))
        if (revision === null) return null
        claim.record = { ...claim.record, state: { ...claim.record.state, until }, revision }
        claim.hold.prolong(ttlMs)
        return { expiresAt: new Date(until), extended: true }
      }),
    release: async (claim, counted) => {
      await this.#inTurn(claim, async () => {
        // The last attempt was begun and given back: it was the last.
        if (counted && claim.attempt >= claim.maxAttempts) {
          const ranOut = (claim.record.state.until ?? 0) <= this.#context.serverClock.now()
          return this.#bury(claim, MAX_ATTEMPTS_EXCEEDED, ranOut ? LEASE_RAN_OUT : undefined)
        }
        const dueAt = counted ? this.#context.serverClock.now() : claim.record.state.dueAt
        const attempts = claim.attempt - (counted ? 0 : 1)
        if ((await this.#writeState(claim, (state) => ({ ...bare(state), is: 'ready', attempts, dueAt }))) === null) return false
        // As if nobody had claimed it, it keeps its place.
        await this.#follow(claim.hold, () => (counted ? this.#queueUp(claim) : claim.hold.settleAnyway('-NAK')))
        return true
      })
    },
    // Asked where the answer to a write was lost, and so the ticket may not have followed.
    whereabouts: async ({ queue, id, record, hold }) => {
      const found = await this.#records.read(queue, id)
      if (found?.state.claim === record.state.claim && found?.state.is === 'running') return 'mine'
      const isOther = found !== null && found.state.claim !== record.state.claim
      // Whoever gets it next does the rest. Of somebody else's claim it is the ticket, too.
      if (isOther) hold.end()
      else await hold.settleAnyway('-NAK')
      if (!found) return (await this.#records.isGone(queue, id)) ? 'gone' : 'mine'
      if (found.state.is === 'done') return 'gone'
      return isOther ? 'other' : 'free'
    },
  }

  readonly #turns = new WeakMap<NatsClaim, Promise<unknown>>()

  /** One write of a holder's at a time: each expects the one before it. */
  #inTurn<T>(claim: NatsClaim, write: () => Promise<T>): Promise<T> {
    const before = this.#turns.get(claim) ?? Promise.resolve()
    const turn = before.then(write, write)
    this.#turns.set(
      claim,
      turn.catch(() => {}),
    )
    return turn
  }

  /** An earlier write of the holder's may have arrived although its answer did not: then the state is still his, at another revision. */
  async #writeState(claim: NatsClaim, next: (state: JobState) => JobState): Promise<number | null> {
    const revision = await this.#records.write(claim.record, next(claim.record.state))
    if (revision !== null) return revision
    const found = await this.#records.read(claim.queue, claim.id)
    if (found?.state.is !== 'running' || found.state.claim !== claim.record.state.claim) return null
    claim.record = found
    return this.#records.write(found, next(found.state))
  }

  async #bury(claim: NatsClaim, reason: string, error: string | undefined): Promise<boolean> {
    const revision = await this.#writeState(claim, (state) => this.#records.dying(state, reason, error))
    if (revision === null) return false
    const state = this.#records.dying(claim.record.state, reason, error)
    await this.#follow(claim.hold, async () => {
      await this.#records.finishBurying({ data: claim.record.data, state, revision })
      await claim.hold.settleAnyway('+ACK')
    })
    return true
  }

  /** The state is written, and that is what counts: what fails after it is done by whoever gets the ticket next. */
  async #follow(hold: Hold, run: () => Promise<void>): Promise<void> {
    try {
      await run()
    } catch {
      hold.handBack()
    }
  }

  /** Behind those that have waited longer (J8): what comes back goes before them in JetStream, and so a new ticket takes the place of the old one. */
  async #queueUp({ queue, id, hold }: NatsClaim): Promise<void> {
    await this.#records.ticket(queue, id, crypto.randomUUID())
    await hold.settleAnyway('+ACK')
  }

  /** Where a queue has run empty, a job that waits has no ticket. */
  #sweepNowAndThen(queue: string): void {
    const { clock, jobAckWaitMs } = this.#context
    const strandedMs = STRANDED_ACK_WAITS * jobAckWaitMs
    const due = this.#sweeps.get(queue)
    if (due !== undefined && clock.now() < due) return
    this.#sweeps.set(queue, clock.now() + strandedMs)
    // Whoever has only begun to claim from it leaves that to others.
    if (due === undefined) return
    this.#later(async () => {
      const startedAt = clock.now()
      await this.#sweep(queue, strandedMs)
      this.#sweeps.set(queue, clock.now() + Math.max(strandedMs, SWEEP_PAUSES * (clock.now() - startedAt)))
    })
  }

  async #sweep(queue: string, strandedMs: number): Promise<void> {
    const before = this.#context.serverClock.now() - strandedMs
    for (const { data, state, revision } of await this.#records.all(queue)) {
      // Another process does the rest.
      if (this.#context.isClosed()) return
      const { id, dedupKey } = data
      if (readySince(data, state) > before) continue
      // Its enqueuer may have been about to find that an earlier job has the key.
      if (revision === 0 && dedupKey !== undefined && (await this.#records.record(queue, dedupKey, id, DEDUP_WINDOW_MS)) !== id) continue
      await this.#records.ticket(queue, id, `swept-${revision}`)
    }
  }

  /** What is left undone is done by who gets the ticket next. */
  #later(run: () => Promise<void>): void {
    const running = run()
      .catch(() => {})
      .finally(() => this.#background.delete(running))
    this.#background.add(running)
  }
}

/** Since when there is something to do, by the server's time; infinite for one that is done with. */
function readySince({ enqueuedAt }: JobData, { is, dueAt, until, diedAt }: JobState): number {
  if (is === 'ready') return Math.max(dueAt, enqueuedAt)
  if (is === 'running') return until ?? 0
  return is === 'dying' ? (diedAt ?? 0) : Number.POSITIVE_INFINITY
}

/** Without what only a running job has. */
function bare({ attempts, dueAt, round, error, claim }: JobState): Omit<JobState, 'is'> {
  return { attempts, dueAt, round, ...(error === undefined ? {} : { error }), ...(claim === undefined ? {} : { claim }) }
}

function newJob({ payload, headers, dedupKey, maxAttempts, priority, delayMs, runAt }: CheckedJob, now: number): NewJob {
  const due = runAt?.getTime() ?? (delayMs ? now + delayMs : undefined)
  return { payload, headers, dedupKey, maxAttempts, priority, runAt: due }
}
