/** All that a bus does at once, on a cluster that something happens to, and whether its promises held. */

import { randomBytes } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { type ClaimedJob, isBusError, type MsgStream } from '../../../src/core/index.ts'
import { NatsBus } from '../../../src/nats/index.ts'
import { eventually } from '../../support/wait.ts'

/** What the server may take for an answer. */
const ANSWER_MS = 5_000
/** What a busy machine adds. */
const SLACK_MS = 3_000
/** So many answers a call waits for, one after the other; a settlement whose answer was lost is asked for again. */
const ANSWERS = {
  publish: 1,
  subscribe: 4,
  'ack of a message': 2,
  enqueue: 4,
  claim: 4,
  'ack of a job': 4,
  lease: 2,
  heartbeat: 2,
  release: 2,
  get: 1,
  cas: 2,
} as const
const CLAIM_WAIT_MS = 1_000
const LEASE_TTL_MS = 3_000
const JOB_TTL_MS = 5_000
const JOB_ACK_WAIT_MS = 1_000
const ACK_WAIT_MS = 3_000
/** The rest of a small machine is for the servers. */
const PACE_MS = 15
const STEPS = 8
/** An ack is answered before the followers have it. */
const UNREPLICATED_MS = 1_000
/** What may happen while nobody leads. Anything else is a failure of the test. */
const PASSING = new Set(['connection', 'unavailable'])

type What = 'published' | 'consumed' | 'enqueued' | 'worked' | 'leased' | 'counted'

export class Load implements AsyncDisposable {
  /** What calls were rejected with, each of a kind that a fault may bring. */
  readonly failures: string[] = []
  readonly #buses: NatsBus[]
  readonly #name = `l${randomBytes(4).toString('hex')}`
  readonly #prefix: string
  readonly #stop = new AbortController()
  readonly #actors: Promise<void>[] = []
  readonly #done: Record<What, number> = { published: 0, consumed: 0, enqueued: 0, worked: 0, leased: 0, counted: 0 }
  readonly #broken: string[] = []
  readonly #calls = new Set<{ readonly what: string; readonly endsBy: number }>()
  #feeding = true

  readonly #published = new Map<string, number>()
  readonly #seqs = new Map<string, Set<number>>()
  readonly #acked = new Map<string, number>()
  readonly #faultsAt: number[] = []
  readonly #enqueued = new Set<string>()
  readonly #workedOff = new Set<string>()
  /** Nobody knows whether the ack arrived. */
  readonly #perhapsDone = new Set<string>()
  readonly #running = new Map<string, ClaimedJob>()
  #holder: AbortSignal | undefined
  #fence = 0
  #unknown = 0

  private constructor(buses: NatsBus[], prefix: string) {
    this.#buses = buses
    this.#prefix = prefix
  }

  /** On buses of its own, made with three replicas. */
  static async begin(servers: readonly string[], prefix = 'klieo'): Promise<Load> {
    const open = () => NatsBus.connect({ servers, prefix, replicas: 3, jobAckWaitMs: JOB_ACK_WAIT_MS })
    const buses = await Promise.all([open(), open()])
    const load = new Load(buses, prefix)
    const [one, two] = buses as [NatsBus, NatsBus]
    load.#start(load.#publish(one), load.#consume(two), load.#enqueue(one), load.#work(one, 'a'), load.#work(two, 'b'))
    load.#start(load.#lease(one), load.#lease(two), load.#count(one), load.#count(two))
    return load
  }

  /** Whether a stream or a consumer is one that it uses. */
  readonly isOurs = (what: string): boolean => {
    const [stream = '', consumer] = what.split('/')
    return stream.includes(`${this.#prefix}_`) && (consumer === undefined || consumer.includes(this.#name))
  }

  /** A leader is about to fall: what it answered just before may be known to it alone. */
  fault(): void {
    this.#faultsAt.push(performance.now())
  }

  /** Until each kind of work went on for a while from now on. */
  async progress(): Promise<void> {
    const before = { ...this.#done }
    const still = () => Object.entries(before).filter(([what, count]) => this.#done[what as What] < count + STEPS)
    const isThere = () => {
      const last = this.failures.slice(-5).join('; ')
      if (!this.#isBroken() && still().length > 0) throw new Error(`not yet ${still().map(([what]) => what)}; last: ${last}`)
    }
    await eventually(isThere, { timeoutMs: 60_000, what: 'progress' })
    this.#check()
  }

  /** Until what is under way is over. */
  async calm(): Promise<void> {
    const calls = [...this.#calls]
    await eventually(() => this.#isBroken() || calls.every((call) => !this.#calls.has(call)), {
      timeoutMs: 60_000,
      what: 'the end of calls',
    })
    this.#check()
  }

  /** Publishes no more, waits for the rest, and looks whether everything is there. */
  async end(): Promise<void> {
    this.#feeding = false
    await eventually(
      () => {
        if (this.#isBroken()) return
        const unread = [...this.#published.keys()].filter((id) => !this.#seqs.has(id))
        const undone = [...this.#enqueued].filter((id) => !this.#workedOff.has(id) && !this.#perhapsDone.has(id))
        if (unread.length + undone.length > 0) throw new Error(`lost so far: messages ${unread.join()}, jobs ${undone.join()}`)
      },
      { timeoutMs: 60_000, what: 'all that was acknowledged' },
    )
    this.#check()
    this.#stop.abort()
    await Promise.all(this.#actors)
    for (const [id, seqs] of this.#seqs) if (seqs.size > 1) this.#broken.push(`P12 ${id} was stored as ${[...seqs].join()}`)
    const [bus] = this.#buses as [NatsBus]
    const value = Number(new TextDecoder().decode((await bus.kv.get(this.#name, 'count'))?.value))
    const { counted } = this.#done
    if (value < counted || value > counted + this.#unknown)
      this.#broken.push(`K2 ${counted} increments, and ${this.#unknown} perhaps, made ${value}`)
    this.#check()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#stop.abort()
    await Promise.all(this.#buses.map((bus) => bus.close()))
    await Promise.allSettled(this.#actors)
  }

  #checkTime({ what, endsBy }: { readonly what: string; readonly endsBy: number }): void {
    const lateMs = performance.now() - endsBy
    if (lateMs > 0) this.#broken.push(`${what} is ${Math.round(lateMs)} ms too late`)
  }

  #isBroken(): boolean {
    for (const call of this.#calls) this.#checkTime(call)
    return this.#broken.length > 0
  }

  #check(): void {
    if (this.#isBroken()) throw new Error(this.#broken.join('\n'))
  }

  #start(...actors: Promise<void>[]): void {
    for (const actor of actors) {
      this.#actors.push(
        actor.catch((error) => {
          if (!this.#stop.signal.aborted) this.#broken.push(String(error?.stack ?? error))
        }),
      )
    }
  }

  /** Repeats it until the load ends. */
  async #loop(step: () => Promise<void>, goesOn: () => boolean = () => true): Promise<void> {
    while (!this.#stop.signal.aborted && goesOn()) {
      await step()
      await sleep(PACE_MS)
    }
  }

  /** The answer, or `undefined` when it failed as it may, or with one of the codes that the caller expects. */
  async #call<T>(what: keyof typeof ANSWERS, run: () => Promise<T>, expected: readonly string[] = [], waitMs = 0): Promise<T | undefined> {
    const startedAt = performance.now()
    const call = { what, endsBy: startedAt + waitMs + ANSWERS[what] * ANSWER_MS + SLACK_MS }
    this.#calls.add(call)
    try {
      return await run()
    } catch (error) {
      if (!isBusError(error)) throw error
      if (expected.includes(error.code)) return undefined
      if (!PASSING.has(error.code)) throw new Error(`${what}: ${error.code}: ${error.message}`, { cause: error })
      this.failures.push(`${what}: ${error.code}: ${error.message}`)
      return undefined
    } finally {
      this.#calls.delete(call)
      this.#checkTime(call)
    }
  }

  /** Until it is acknowledged, with the same id. */
  async #publish(bus: NatsBus): Promise<void> {
    let n = 0
    await this.#loop(
      async () => {
        const id = `m${n}`
        const ack = await this.#call('publish', () => bus.pubsub.publish(this.#name, id, { msgId: `${this.#name}-${id}` }))
        if (!ack) return
        this.#published.set(id, ack.seq)
        this.#done.published++
        n++
      },
      () => this.#feeding,
    )
  }

  async #consume(bus: NatsBus): Promise<void> {
    let stream: MsgStream<never> | undefined
    while (!stream && !this.#stop.signal.aborted)
      stream = await this.#call('subscribe', () => bus.pubsub.subscribe(this.#name, this.#name, { start: 'all', ackWaitMs: ACK_WAIT_MS }))
    this.#stop.signal.addEventListener('abort', () => void stream?.close(), { once: true })
    for await (const message of stream ?? []) {
      const id = new TextDecoder().decode(message.payload)
      this.#seqs.set(id, (this.#seqs.get(id) ?? new Set()).add(message.seq))
      const ackedAt = this.#acked.get(id)
      const mayBeForgotten =
        ackedAt !== undefined && this.#faultsAt.some((at) => ackedAt > at - UNREPLICATED_MS && ackedAt < at + ANSWER_MS)
      if (ackedAt !== undefined && !mayBeForgotten)
        this.#broken.push(`P3 ${id} came back, ${Math.round(performance.now() - ackedAt)} ms after its ack`)
      const acked = await this.#call('ack of a message', () => message.ack().then(() => true), ['lease_lost'])
      if (!acked) continue
      this.#acked.set(id, performance.now())
      this.#done.consumed++
    }
  }

  async #enqueue(bus: NatsBus): Promise<void> {
    let n = 0
    await this.#loop(
      async () => {
        const payload = `j${n}`
        if (!(await this.#call('enqueue', () => bus.jobs.enqueue(this.#name, { payload, dedupKey: payload, maxAttempts: 50 })))) return
        this.#enqueued.add(payload)
        this.#done.enqueued++
        n++
      },
      () => this.#feeding,
    )
  }

  async #work(bus: NatsBus, workerId: string): Promise<void> {
    await this.#loop(async () => {
      const claim = () => bus.jobs.claim(this.#name, workerId, JOB_TTL_MS, { waitMs: CLAIM_WAIT_MS, signal: this.#stop.signal })
      const job = await this.#call('claim', claim, [], CLAIM_WAIT_MS)
      if (!job) return
      const payload = new TextDecoder().decode(job.payload)
      if (this.#workedOff.has(payload)) this.#broken.push(`J2 ${payload} was claimed after its ack`)
      const other = this.#running.get(payload)
      if (other && !other.lease.signal.aborted) this.#broken.push(`J2 ${payload} was claimed while somebody else had it`)
      this.#running.set(payload, job)
      this.#perhapsDone.delete(payload)
      let isRefused = false
      const ack = async () => {
        try {
          await job.ack()
          return true
        } catch (error) {
          // It comes again at the end of its lease.
          isRefused = isBusError(error, 'lease_lost') || isBusError(error, 'unavailable')
          throw error
        }
      }
      if (!(await this.#call('ack of a job', ack, ['lease_lost']))) {
        if (!isRefused) this.#perhapsDone.add(payload)
        return
      }
      this.#running.delete(payload)
      this.#workedOff.add(payload)
      this.#done.worked++
    })
  }

  async #lease(bus: NatsBus): Promise<void> {
    await this.#loop(async () => {
      const lease = await this.#call('lease', () => bus.kv.lease(this.#name, 'leader', LEASE_TTL_MS), ['lease_held'])
      if (!lease) return
      if (this.#holder && !this.#holder.aborted) this.#broken.push(`K5 a second holder, fence ${lease.fence} after ${this.#fence}`)
      if (lease.fence <= this.#fence) this.#broken.push(`K5 fence ${lease.fence} after ${this.#fence}`)
      this.#holder = lease.signal
      this.#fence = lease.fence
      this.#done.leased++
      await this.#call('heartbeat', () => lease.heartbeat(), ['lease_lost'])
      if (this.#holder === lease.signal) this.#holder = undefined
      await this.#call('release', () => lease.release(), ['lease_lost'])
    })
  }

  async #count(bus: NatsBus): Promise<void> {
    await this.#loop(async () => {
      const entry = await this.#call('get', () => bus.kv.get(this.#name, 'count'))
      if (entry === undefined) return
      const next = String(Number(new TextDecoder().decode(entry?.value ?? new Uint8Array())) + 1)
      let isConflict = false
      const revision = await this.#call('cas', async () => {
        try {
          return await bus.kv.cas(this.#name, 'count', next, entry?.revision ?? null)
        } catch (error) {
          isConflict = isBusError(error, 'cas_conflict')
          throw error
        }
      }, ['cas_conflict'])
      if (revision !== undefined) this.#done.counted++
      else if (!isConflict) this.#unknown++
    })
  }
}
