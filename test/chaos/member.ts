/** What every child process of a chaos run has: a bus, a record, logical clients that do one thing at a time, and the runner's orders. */

import { once } from 'node:events'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'
import { BusError, isBusError, PostgresBus } from '../../src/index.ts'
import { Dice } from './dice.ts'
import { type Answers, type Call, now, Recorder } from './record.ts'
import { type Assignment, type Order, SCHEMA, type Word } from './world.ts'

/** Longer than anything may take that the bus bounds itself, and than the faults last. */
const HUNG_AFTER_S = 60
const TELL_EVERY_S = 5
const AFTER_A_FAILURE_MS = 300

export class Member {
  readonly assignment: Assignment
  readonly recorder: Recorder
  /** For the transactions of its own. */
  readonly pool: pg.Pool
  #bus: Promise<PostgresBus>
  #sessions = 0
  #gentle = false
  #ending = false
  #ids = 0
  #calls = 0
  #delivered = 0
  readonly #ended = new AbortController()
  readonly #open = new Map<Call, number>()
  readonly #producers = new Set<Promise<void>>()
  readonly #others = new Set<Promise<void>>()
  /** To do before the bus closes: a Worker stops. */
  readonly onRejoin = new Set<() => Promise<void>>()

  static async start(): Promise<Member> {
    const member = new Member(JSON.parse(process.argv[2]!) as Assignment)
    await member.#bus
    return member
  }

  private constructor(assignment: Assignment) {
    this.assignment = assignment
    const { directory, name, incarnation, role, connectionString } = assignment
    this.recorder = new Recorder(join(directory, `${name}.${incarnation}.jsonl`))
    this.recorder.write({ kind: 'process', at: now(), name: `${name}.${incarnation}`, role, pid: process.pid })
    this.pool = new pg.Pool({
      connectionString,
      max: 8,
      application_name: 'chaos caller',
      connectionTimeoutMillis: 10_000,
      // A wire that has gone silent must not hold a transaction, nor a call, for ever.
      query_timeout: 20_000,
      idle_in_transaction_session_timeout: 15_000,
      options: '-c lock_timeout=12000',
    })
    this.pool.on('error', () => {})
    this.#bus = this.#connect()
    this.#watch()
    void this.#obey()
  }

  get name(): string {
    return `${this.assignment.name}.${this.assignment.incarnation}`
  }

  /** Names the bus that is open now. */
  get session(): string {
    return `${this.name}.${this.#sessions}`
  }

  get gentle(): boolean {
    return this.#gentle
  }

  get ending(): boolean {
    return this.#ending
  }

  /** Aborted when everything is to end. */
  get ended(): AbortSignal {
    return this.#ended.signal
  }

  bus(): Promise<PostgresBus> {
    return this.#bus
  }

  dice(client: string): Dice {
    const { seed, name, incarnation } = this.assignment
    return new Dice(`${seed} ${name} ${incarnation} ${client}`)
  }

  /** In the whole run no other thing has this id. */
  id(): string {
    return `${this.name}-${(++this.#ids).toString(36)}`
  }

  async call<T>(call: Call, make: () => Promise<T>, answer?: (result: T) => Answers[keyof Answers]): Promise<T> {
    return this.#watched(call, () => this.recorder.call(call, make, answer))
  }

  async callMany<T>(
    calls: readonly Call[],
    make: () => Promise<readonly T[]>,
    answer: (result: T) => Answers[keyof Answers],
  ): Promise<void> {
    await this.#watched(calls[0]!, () => this.recorder.callMany(calls, make, answer))
  }

  async #watched<T>(call: Call, make: () => Promise<T>): Promise<T> {
    this.#calls++
    this.#open.set(call, 0)
    try {
      return await make()
    } finally {
      this.#open.delete(call)
    }
  }

  delivered(): void {
    this.#delivered++
  }

  /** A pause of the load's; cut short by the end. */
  async pause(ms: number): Promise<void> {
    await sleep(ms / this.assignment.rate, undefined, { signal: this.ended }).catch(() => {})
  }

  /** A time that a lease or an ack wait is measured against: no rate changes it. */
  async hold(ms: number): Promise<void> {
    await sleep(ms, undefined, { signal: this.ended }).catch(() => {})
  }

  /** A logical client that makes things, one after the other; it ends when things get gentle. @param settle waits for what it left under way */
  produces(everyMs: number, step: () => Promise<void>, settle: () => Promise<void> = async () => {}): void {
    const dice = this.dice(`pace ${this.#producers.size}`)
    const loop = this.#loop(
      () => this.#gentle,
      async () => {
        const succeeded = await this.tolerated(step())
        // While the server is away, each try would be a call of which nobody knows whether it happened.
        await this.pause(dice.between(0, 2 * everyMs) + (succeeded ? 0 : AFTER_A_FAILURE_MS))
      },
    )
    this.#producers.add(loop.then(settle))
  }

  /** One that takes what is there; it ends with the process. */
  takes(step: () => Promise<void>): void {
    this.#others.add(
      this.#loop(
        () => this.#ending,
        async () => {
          if (!(await this.tolerated(step()))) await this.pause(100)
        },
      ),
    )
  }

  async #loop(over: () => boolean, step: () => Promise<void>): Promise<void> {
    await this.#bus
    while (!over()) await step()
  }

  /**
   * What a fault may do to a call is in the record; what is wrong in here ends the process, and is seen.
   * @returns whether it succeeded
   */
  async tolerated(work: Promise<unknown>): Promise<boolean> {
    try {
      await work
      return true
    } catch (error) {
      if (error instanceof TypeError || error instanceof ReferenceError || error instanceof RangeError) throw error
      return false
    }
  }

  say(word: Word): void {
    process.stdout.write(`${JSON.stringify(word)}\n`)
  }

  async #connect(): Promise<PostgresBus> {
    const { connectionString, maintenance } = this.assignment
    for (;;) {
      try {
        const bus = await PostgresBus.connect({ connectionString, schema: SCHEMA, maintenance, pollIntervalMs: 500 })
        this.#sessions++
        return bus
      } catch (error) {
        if (!(error instanceof BusError) || !['connection', 'unavailable', 'timeout'].includes(error.code)) throw error
        await sleep(200)
      }
    }
  }

  async #rejoin(): Promise<void> {
    if (this.#ending) return
    const old = await this.#bus
    const reopened = Promise.withResolvers<PostgresBus>()
    // Whoever begins something now waits for the other bus.
    this.#bus = reopened.promise
    await Promise.all([...this.onRejoin].map((prepare) => prepare()))
    await this.call({ do: 'close', member: this.session }, () => old.close())
    reopened.resolve(await this.#connect())
  }

  async #calm(): Promise<void> {
    this.#gentle = true
    await Promise.all(this.#producers)
    this.say({ calm: true })
  }

  async #end(): Promise<void> {
    this.#ending = true
    this.#ended.abort()
    await Promise.all([...this.onRejoin].map((prepare) => prepare()))
    const bus = await this.#bus
    await this.call({ do: 'close', member: this.session }, () => bus.close())
    await Promise.all([...this.#producers, ...this.#others])
    await this.pool.end()
    this.say({ ended: true })
  }

  /** The end of the input is the end of the runner. */
  async #obey(): Promise<void> {
    const input = createInterface({ input: process.stdin })
    let turn: Promise<void> = this.#bus.then(() => this.say({ ready: true }))
    input.on('line', (line) => {
      const order = JSON.parse(line) as Order
      turn = turn.then(() => (order.do === 'rejoin' ? this.#rejoin() : order.do === 'gentle' ? this.#calm() : this.#end()))
    })
    await once(input, 'close')
    if (!this.#ending) process.exit(3)
  }

  /** Seconds in which this process ran: one that was stopped is not late. */
  #watch(): void {
    let seconds = 0
    const timer = setInterval(() => {
      if (++seconds % TELL_EVERY_S === 0) this.say({ calls: this.#calls, delivered: this.#delivered })
      for (const [call, waited] of this.#open) {
        this.#open.set(call, waited + 1)
        if (waited + 1 === HUNG_AFTER_S) this.say({ hung: call })
      }
    }, 1_000)
    timer.unref()
  }
}

/** Whether the call may have happened all the same. A call under way when its bus closes may, too. */
export function isAmbiguous(error: unknown): boolean {
  return !isBusError(error) || ['connection', 'closed', 'timeout', 'internal'].includes(error.code)
}

const decoder = new TextDecoder()

export function text(bytes: Uint8Array): string {
  return decoder.decode(bytes)
}
