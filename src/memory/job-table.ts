/**
 * The jobs of all queues. The counterpart of a server: every method runs to its end in one go, so each is a transaction.
 *
 * A job is, in turn,
 *   waiting   delayed, or claimed: claimable at `visibleAt`
 *   ready     claimable now
 *   dead      its attempts are used up, or its holder said so
 * and goes away when it is acked. A job that is claimed has a token, which every settlement of that claim must show.
 */

import {
  type CheckedJob,
  type CheckedListing,
  DEDUP_WINDOW_MS,
  type Headers,
  type JobDetails,
  type JobId,
  type JobInfo,
  type JobState,
  jobRuns,
  noSuchJob,
  type PurgeableState,
  type QueueInfo,
} from '../core/index.ts'
import type { Bell } from '../runtime/bell.ts'
import type { Claim } from '../runtime/claimed-job.ts'
import type { Clock } from '../runtime/clock.ts'
import { type Alarm, type Alarms, alarm } from './alarms.ts'
import type { Entries } from './entries.ts'
import { Heap, type Slotted } from './heap.ts'
import type { Log } from './log.ts'

interface JobRow extends Slotted {
  readonly number: number
  readonly id: JobId
  readonly queue: Queue
  readonly payload: Uint8Array
  readonly headers: Headers
  readonly dedupKey: string | undefined
  readonly maxAttempts: number
  readonly priority: number
  attempts: number
  /** 0: nobody's. */
  token: number
  visibleAt: number
  /** Grows with each time that `visibleAt` is set: of those of one moment the earlier set has waited longer, as by a server's finer clock. */
  order: number
  /** When it became or becomes due, before it was claimed. */
  dueAt: number
  /** The `order` of that. */
  dueOrder: number
  lastError: string | undefined
  workerId: string | undefined
  /** By the clock's `now()`, as all of these. */
  readonly enqueuedAt: number
  /** By the clock's `now()`; `undefined` while it is not dead. */
  diedAt: number | undefined
  /** Set while its last attempt is under way. */
  readonly alarm: Alarm
}

interface Queue {
  readonly name: string
  readonly waiting: Heap<JobRow>
  /** By priority; none of them is empty. */
  readonly ready: Map<number, Heap<JobRow>>
  /** In the order of their deaths. */
  readonly dead: Map<JobId, JobRow>
}

export interface MemoryClaim extends Claim {
  readonly row: JobRow
  readonly token: number
}

/** A dead job, as it can be looked at. */
export interface DeadJob {
  readonly id: JobId
  readonly queue: string
  readonly payload: Uint8Array
  readonly headers: Headers
  readonly attempts: number
  readonly maxAttempts: number
  readonly priority: number
  readonly dedupKey?: string
  /** What the last attempt said of itself, or the reason it was given up for. */
  readonly lastError?: string
}

/** Old dead jobs are looked for once in so many jobs, and whenever somebody looks at dead ones. */
const PRUNE_EVERY = 1_024
const LONGEST_REASON = 4_000

const longestWaiting = (a: JobRow, b: JobRow) => a.visibleAt < b.visibleAt || (a.visibleAt === b.visibleAt && a.order < b.order)

export class JobTable {
  readonly #clock: Clock
  readonly #bell: Bell
  readonly #alarms: Alarms
  readonly #log: Log
  readonly #entries: Entries
  readonly #queues = new Map<string, Queue>()
  readonly #jobs = new Map<JobId, JobRow>()
  /** When each was paused. */
  readonly #paused = new Map<string, Date>()
  #lastNumber = 0
  #lastToken = 0
  #lastOrder = 0
  #untilPrune = PRUNE_EVERY

  constructor(clock: Clock, bell: Bell, alarms: Alarms, log: Log, entries: Entries) {
    this.#clock = clock
    this.#bell = bell
    this.#alarms = alarms
    this.#log = log
    this.#entries = entries
  }

  /** Neither gone nor dead. */
  lives(id: JobId): boolean {
    return this.#jobs.get(id)?.diedAt === undefined && this.#jobs.has(id)
  }

  enqueue(queueName: string, jobs: readonly CheckedJob[], deadJobsMs: number): JobId[] {
    this.#untilPrune -= jobs.length
    if (this.#untilPrune <= 0) this.pruneDead(deadJobsMs)
    const now = this.#clock.now()
    const ids = jobs.map((job): JobId => {
      const id = String(this.#lastNumber + 1)
      if (job.dedupKey !== undefined) {
        const first = this.#entries.record(queueName, job.dedupKey, id, DEDUP_WINDOW_MS)
        if (first !== id) return first
      }
      this.#add(this.#queue(queueName), job, now)
      return id
    })
    this.#ring(queueName)
    return ids
  }

  claim(queueName: string, workerId: string, ttlMs: number, limit: number): MemoryClaim[] {
    const queue = this.#queues.get(queueName)
    if (!queue || this.#paused.has(queueName)) return []
    this.#ripen(queue)
    const claims: MemoryClaim[] = []
    for (const priority of [...queue.ready.keys()].sort((a, b) => b - a)) {
      const ready = queue.ready.get(priority)
      const rows: JobRow[] = []
      while (claims.length + rows.length < limit) {
        const row = ready?.peek()
        if (!row) break
        this.#leave(row)
        rows.push(row)
      }
      // What is claimed together waits again together: then the oldest first.
      const claimed = new Map(rows.toSorted((a, b) => a.number - b.number).map((row) => [row, this.#claimRow(row, workerId, ttlMs)]))
      claims.push(...rows.map((row) => claimed.get(row) as MemoryClaim))
    }
    return claims
  }

  /** When the next job becomes claimable; `null`: there is none. */
  nextInMs(queueName: string): number | null {
    const queue = this.#queues.get(queueName)
    if (!queue || this.#paused.has(queueName)) return null
    if (queue.ready.size > 0) return 0
    const next = queue.waiting.peek()
    return next ? Math.max(0, next.visibleAt - this.#clock.now()) : null
  }

  /** Each of these answers whether the claim was still its holder's. */
  ack(claim: MemoryClaim): boolean {
    const row = holding(claim)
    if (!row) return false
    this.#drop(row)
    return true
  }

  nak(claim: MemoryClaim, delayMs: number, error: string | undefined): boolean {
    const row = holding(claim)
    if (!row) return false
    row.lastError = error ?? row.lastError
    this.#giveBack(row, this.#clock.now() + delayMs, ++this.#lastOrder)
    return true
  }

  /** Claimable again at once. @param counted false: nobody began to handle it, and the attempt is taken back */
  release(claim: MemoryClaim, counted: boolean): void {
    const row = holding(claim)
    if (!row) return
    if (!counted) {
      row.attempts--
      this.#alarms.clear(row.alarm)
    }
    const now = this.#clock.now()
    // Died of a lease that was over already, as if its alarm had come a moment before.
    if (counted && row.attempts >= row.maxAttempts && row.visibleAt <= now) this.#bury(row)
    // As if nobody had claimed it, it keeps its place.
    else if (counted) this.#giveBack(row, now, ++this.#lastOrder)
    else this.#giveBack(row, row.dueAt, row.dueOrder)
  }

  deadLetter(claim: MemoryClaim, reason: string): boolean {
    const row = holding(claim)
    if (!row) return false
    this.#bury(row, reason)
    return true
  }

  /** Never shortens; `null` when it is somebody else's, dead or gone. */
  heartbeat(claim: MemoryClaim, ttlMs: number): Date | null {
    const row = holding(claim)
    if (!row) return null
    const now = this.#clock.now()
    // It may have run out and not been claimed again.
    this.#leave(row)
    if (now + ttlMs >= row.visibleAt) row.order = ++this.#lastOrder
    row.visibleAt = Math.max(row.visibleAt, now + ttlMs)
    row.queue.waiting.push(row)
    if (row.attempts >= row.maxAttempts) this.#alarms.set(row.alarm, row.visibleAt)
    return this.#dateOf(row.visibleAt)
  }

  dead(queueName: string): DeadJob[] {
    const rows = this.#queues.get(queueName)?.dead.values() ?? []
    return [...rows].map((row) => ({
      id: row.id,
      queue: queueName,
      payload: row.payload.slice(),
      headers: row.headers,
      attempts: row.attempts,
      maxAttempts: row.maxAttempts,
      priority: row.priority,
      ...(row.dedupKey === undefined ? {} : { dedupKey: row.dedupKey }),
      ...(row.lastError === undefined ? {} : { lastError: row.lastError }),
    }))
  }

  /** Puts dead jobs back with all their attempts; answers how many. */
  retryDead(queueName: string, id?: JobId): number {
    const queue = this.#queues.get(queueName)
    if (!queue) return 0
    const rows = [...queue.dead.values()].filter((row) => id === undefined || row.id === id)
    for (const row of rows) {
      queue.dead.delete(row.id)
      row.diedAt = undefined
      row.attempts = 0
      this.#wait(row)
    }
    if (rows.length > 0) this.#ring(queueName)
    return rows.length
  }

  /** @throws not_found, conflict */
  retry(id: JobId): void {
    const row = this.#existing(id)
    const state = this.#stateOf(row)
    if (state === 'running') throw jobRuns(id)
    if (state === 'dead') this.retryDead(row.queue.name, id)
    else if (state === 'scheduled') {
      this.#leave(row)
      this.#wait(row)
      this.#ring(row.queue.name)
    }
  }

  /** @throws not_found */
  cancel(id: JobId, reason: string): void {
    const row = this.#existing(id)
    if (row.diedAt === undefined) this.#bury(row, reason)
  }

  /** @throws not_found, conflict */
  remove(id: JobId): void {
    const row = this.#existing(id)
    if (this.#stateOf(row) === 'running') throw jobRuns(id)
    this.#drop(row)
  }

  purge(queueName: string, states: readonly PurgeableState[]): number {
    const rows = this.#all().filter((row) => row.queue.name === queueName && states.some((state) => state === this.#stateOf(row)))
    for (const row of rows) this.#drop(row)
    return rows.length
  }

  pause(queueName: string): void {
    if (!this.#paused.has(queueName)) this.#paused.set(queueName, this.#clock.date())
  }

  resume(queueName: string): void {
    if (this.#paused.delete(queueName)) this.#ring(queueName)
  }

  queues(): QueueInfo[] {
    const counts = new Map<string, Record<JobState, number> & { oldest: number }>()
    const countsOf = (queueName: string) => {
      const known = counts.get(queueName) ?? { ready: 0, scheduled: 0, running: 0, dead: 0, oldest: Number.POSITIVE_INFINITY }
      counts.set(queueName, known)
      return known
    }
    for (const row of this.#all()) {
      const known = countsOf(row.queue.name)
      const state = this.#stateOf(row)
      known[state]++
      if (state === 'ready') known.oldest = Math.min(known.oldest, row.visibleAt)
    }
    for (const queueName of this.#paused.keys()) countsOf(queueName)
    return [...counts].map(([queue, { oldest, ...states }]) => {
      const pausedAt = this.#paused.get(queue)
      return {
        queue,
        ...states,
        ...(oldest === Number.POSITIVE_INFINITY ? {} : { oldestReadyAt: this.#dateOf(oldest) }),
        ...(pausedAt === undefined ? {} : { pausedAt: new Date(pausedAt) }),
      }
    })
  }

  list({ queue, state, after }: CheckedListing): JobInfo[] {
    const rows = this.#all().filter(
      (row) =>
        (queue === undefined || row.queue.name === queue) &&
        (state === undefined || this.#stateOf(row) === state) &&
        (after === undefined || row.number > Number(after)),
    )
    return rows.map((row) => this.#infoOf(row))
  }

  details(id: JobId): JobDetails | null {
    const row = this.#all().find((one) => one.id === id)
    return row ? { ...this.#infoOf(row), headers: row.headers, payload: row.payload.slice() } : null
  }

  /** By their ids. What is due, and after its last attempt, is dead by now. */
  #all(): JobRow[] {
    for (const queue of this.#queues.values()) this.#ripen(queue)
    return [...this.#jobs.values()]
  }

  #existing(id: JobId): JobRow {
    const row = this.#all().find((one) => one.id === id)
    if (!row) throw noSuchJob(id)
    return row
  }

  #stateOf(row: JobRow): JobState {
    if (row.diedAt !== undefined) return 'dead'
    if (row.visibleAt <= this.#clock.now()) return 'ready'
    return row.token === 0 ? 'scheduled' : 'running'
  }

  #infoOf(row: JobRow): JobInfo {
    return {
      id: row.id,
      queue: row.queue.name,
      state: this.#stateOf(row),
      priority: row.priority,
      attempts: row.attempts,
      maxAttempts: row.maxAttempts,
      enqueuedAt: this.#dateOf(row.enqueuedAt),
      runAt: this.#dateOf(row.dueAt),
      ...(row.token === 0 ? {} : { leasedUntil: this.#dateOf(row.visibleAt) }),
      ...(row.workerId === undefined ? {} : { workerId: row.workerId }),
      ...(row.dedupKey === undefined ? {} : { dedupKey: row.dedupKey }),
      ...(row.lastError === undefined ? {} : { lastError: row.lastError }),
      ...(row.diedAt === undefined ? {} : { diedAt: this.#dateOf(row.diedAt) }),
      payloadBytes: row.payload.byteLength,
    }
  }

  /** Due now. */
  #wait(row: JobRow): void {
    row.visibleAt = this.#clock.now()
    row.dueAt = row.visibleAt
    row.order = ++this.#lastOrder
    row.dueOrder = row.order
    row.queue.waiting.push(row)
  }

  pruneDead(olderThanMs: number): void {
    this.#untilPrune = PRUNE_EVERY
    const before = this.#clock.now() - olderThanMs
    for (const queue of this.#queues.values()) {
      for (const row of queue.dead.values()) {
        if ((row.diedAt as number) >= before) break
        queue.dead.delete(row.id)
        this.#jobs.delete(row.id)
      }
    }
  }

  #queue(name: string): Queue {
    const known = this.#queues.get(name)
    if (known) return known
    const queue: Queue = { name, waiting: new Heap(longestWaiting), ready: new Map(), dead: new Map() }
    this.#queues.set(name, queue)
    return queue
  }

  #add(queue: Queue, job: CheckedJob, now: number): void {
    const number = ++this.#lastNumber
    const delay = job.runAt === undefined ? (job.delayMs ?? 0) : job.runAt.getTime() - this.#clock.date().getTime()
    const order = ++this.#lastOrder
    const row: JobRow = {
      number,
      id: String(number),
      queue,
      payload: job.payload,
      headers: job.headers,
      dedupKey: job.dedupKey,
      maxAttempts: job.maxAttempts,
      priority: job.priority,
      attempts: 0,
      token: 0,
      visibleAt: now + delay,
      order,
      dueAt: now + delay,
      dueOrder: order,
      lastError: undefined,
      workerId: undefined,
      enqueuedAt: now,
      diedAt: undefined,
      slot: -1,
      alarm: alarm(() => this.#bury(row)),
    }
    this.#jobs.set(row.id, row)
    queue.waiting.push(row)
  }

  /** What is due becomes ready, or, after its last attempt, dead. */
  #ripen(queue: Queue): void {
    const now = this.#clock.now()
    for (let row = queue.waiting.peek(); row && row.visibleAt <= now; row = queue.waiting.peek()) {
      if (row.attempts >= row.maxAttempts) this.#bury(row)
      else {
        queue.waiting.remove(row)
        const ready = queue.ready.get(row.priority) ?? new Heap<JobRow>(longestWaiting)
        queue.ready.set(row.priority, ready)
        ready.push(row)
      }
    }
  }

  #claimRow(row: JobRow, workerId: string, ttlMs: number): MemoryClaim {
    row.attempts++
    row.workerId = workerId
    row.token = ++this.#lastToken
    row.visibleAt = this.#clock.now() + ttlMs
    row.order = ++this.#lastOrder
    row.queue.waiting.push(row)
    if (row.attempts >= row.maxAttempts) this.#alarms.set(row.alarm, row.visibleAt)
    return {
      row,
      token: row.token,
      id: row.id,
      queue: row.queue.name,
      payload: row.payload.slice(),
      headers: row.headers,
      attempt: row.attempts,
      maxAttempts: row.maxAttempts,
      fence: row.token,
      expiresAt: this.#dateOf(row.visibleAt),
    }
  }

  #giveBack(row: JobRow, dueAt: number, order: number): void {
    row.token = 0
    if (row.attempts >= row.maxAttempts) {
      this.#bury(row)
      return
    }
    this.#leave(row)
    row.visibleAt = dueAt
    row.dueAt = dueAt
    row.order = order
    row.dueOrder = order
    row.queue.waiting.push(row)
    this.#ring(row.queue.name)
  }

  /** @param reason the caller's; without: its attempts are used up */
  #bury(row: JobRow, reason?: string): void {
    if (reason !== undefined) row.lastError = beginning(reason)
    else if (row.token !== 0) row.lastError = 'the lease of the last attempt ran out'
    this.#leave(row)
    this.#alarms.clear(row.alarm)
    row.token = 0
    row.diedAt = this.#clock.now()
    row.queue.dead.set(row.id, row)
    const error = reason === undefined ? row.lastError : undefined
    this.#log.publishLetter(
      `${row.queue.name}.dlq`,
      row.payload,
      Object.freeze({
        ...row.headers,
        dlq_reason: beginning(oneLine(reason ?? 'max_attempts_exceeded')),
        dlq_queue: row.queue.name,
        dlq_job_id: row.id,
        dlq_attempts: String(row.attempts),
        ...(row.dedupKey === undefined ? {} : { dlq_dedup_key: oneLine(row.dedupKey) }),
        ...(error === undefined ? {} : { dlq_error: oneLine(error) }),
      }),
    )
  }

  #drop(row: JobRow): void {
    this.#leave(row)
    this.#alarms.clear(row.alarm)
    row.token = 0
    row.queue.dead.delete(row.id)
    this.#jobs.delete(row.id)
  }

  /** Takes it out of the heap it is in. */
  #leave(row: JobRow): void {
    if (row.slot < 0) return
    const { waiting, ready } = row.queue
    const ripe = ready.get(row.priority)
    if (ripe?.holds(row)) {
      ripe.remove(row)
      if (ripe.size === 0) ready.delete(row.priority)
    } else waiting.remove(row)
  }

  #ring(queueName: string): void {
    this.#bell.ring([{ kind: 'queue', name: queueName }])
  }

  #dateOf(at: number): Date {
    return new Date(this.#clock.date().getTime() + at - this.#clock.now())
  }
}

function holding({ row, token }: MemoryClaim): JobRow | undefined {
  return row.token === token ? row : undefined
}

/** Of a reason so much is kept, in characters, not in units of UTF-16. */
function beginning(reason: string): string {
  return reason.length <= LONGEST_REASON ? reason : [...reason].slice(0, LONGEST_REASON).join('')
}

/** Header values have no line breaks. */
function oneLine(text: string): string {
  return text.replace(/[\r\n]+/g, ' ')
}
