/** The two worlds that a trace is played in: a backend, its time, and when it has come to rest. */

import { setImmediate as immediate, setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'
import { type Bus, PostgresBus } from '../../src/index.ts'
import { MemoryBus, MemoryStore, VirtualClock } from '../../src/memory/index.ts'
import { ServerTime } from './server-time.ts'
import { SteppedClock } from './stepped-clock.ts'

/** All durations and steps of time in traces are multiples of it, so that what a trace takes in reality never decides. */
export const GRAIN_MS = 30_000
/** A trace that takes longer has used up some of it; with what its last step waits it is still not all of it. */
export const TRACE_MS = GRAIN_MS / 2
/** What must come comes: with a notification, or at the next poll within a second or so. A machine may be busy. */
export const PATIENCE_MS = 12_000
/** Timers for less than this are polls, and no events of a trace. */
const SHORTEST_EVENT_MS = 5_000

/** Only what both backends are: nothing here takes a transaction. */
export type AnyBus = Bus<never>

export interface World {
  readonly name: string
  open(): Promise<AnyBus>
  close(bus: AnyBus): Promise<void>
  /** The time of day, by the clock that dates what is stored. */
  now(): number
  /** @param waitedMs so long somebody still waits, at the most: what he waits for is found when it is there */
  advance(ms: number, waitedMs: number): Promise<void>
  /** What is over is buried and pruned, which may be a while after it was over. */
  maintain(): Promise<void>
  /** Nothing is under way any more. */
  rest(): Promise<void>
  /** Waits until it is so; `expected` false: only until the world has come to rest. Answers whether it is so. */
  until(condition: () => boolean, expected: boolean): Promise<boolean>
}

/** Where a world is made for each trace. */
export interface Stage {
  /** @param patienceMs so long what must come is waited for */
  world(patienceMs?: number): Promise<World & { readonly gaveUp: boolean }>
}

/** The machine was too slow for what the bus does within a time: the trace proves nothing. */
export class TooSlow extends Error {}

export class MemoryWorld implements World {
  readonly name = 'memory'
  readonly #clock = new VirtualClock()
  readonly #store = new MemoryStore(this.#clock)

  async open(): Promise<AnyBus> {
    return MemoryBus.create({ store: this.#store })
  }

  async close(bus: AnyBus): Promise<void> {
    await bus.close()
  }

  now(): number {
    return this.#clock.date().getTime()
  }

  /** An alarm rings a millisecond after what is over at once. */
  async maintain(): Promise<void> {
    await this.#clock.advance(1)
  }

  async advance(ms: number): Promise<void> {
    await this.#clock.advance(ms)
  }

  async rest(): Promise<void> {
    await this.#clock.advance(0)
  }

  async until(condition: () => boolean): Promise<boolean> {
    await this.rest()
    return condition()
  }
}

/** One schema, emptied for each trace. */
export class PostgresStage {
  readonly pool: pg.Pool
  readonly schema: string
  readonly time: ServerTime

  private constructor(pool: pg.Pool, schema: string, time: ServerTime) {
    this.pool = pool
    this.schema = schema
    this.time = time
  }

  static async open(connectionString: string, schema: string): Promise<PostgresStage> {
    await PostgresBus.migrate({ connectionString, schema })
    const pool = new pg.Pool({ connectionString, max: 10, idleTimeoutMillis: 0 })
    pool.on('error', () => {})
    return new PostgresStage(pool, schema, await ServerTime.of(pool, schema))
  }

  async world(patienceMs = PATIENCE_MS): Promise<PostgresWorld> {
    await this.time.empty()
    return new PostgresWorld(this, patienceMs)
  }

  async close(): Promise<void> {
    await this.pool.end()
  }
}

/** How long a closing bus tries to hand back, less a margin. */
const HAND_BACK_MS = 400

export class PostgresWorld implements World {
  readonly name = 'postgres'
  readonly #stage: PostgresStage
  readonly #clock = new SteppedClock()
  readonly #patienceMs: number
  /** Something that was expected did not come. */
  gaveUp = false

  constructor(stage: PostgresStage, patienceMs: number) {
    this.#stage = stage
    this.#patienceMs = patienceMs
  }

  async open(): Promise<AnyBus> {
    const { pool, schema } = this.#stage
    const bus = await PostgresBus.connect({ pool, schema, migrate: false, maintenance: false, clock: this.#clock })
    return bus as unknown as AnyBus
  }

  async close(bus: AnyBus): Promise<void> {
    const startedAt = performance.now()
    await bus.close()
    if (performance.now() - startedAt > HAND_BACK_MS) throw new TooSlow('a bus took long to close')
  }

  now(): number {
    return Date.now()
  }

  /** From one thing that happens to the next, as it would be without jumps. */
  async advance(ms: number, waitedMs: number): Promise<void> {
    const { time } = this.#stage
    for (let left = ms; left > 0; ) {
      // Waits are made of polls, which are no events: to find the end of one, no step is left out.
      const waited = ms - left < waitedMs ? GRAIN_MS : Number.POSITIVE_INFINITY
      const next = Math.min(waited, await time.nextInMs(), this.#clock.nextInMs(SHORTEST_EVENT_MS))
      const by = Math.min(left, Math.ceil(next / GRAIN_MS) * GRAIN_MS)
      await time.shift(by)
      await time.maintain()
      this.#clock.jump(by)
      await this.rest()
      left -= by
    }
  }

  async maintain(): Promise<void> {
    await this.#stage.time.maintain()
  }

  async rest(): Promise<void> {
    const { pool } = this.#stage
    this.#clock.jump(0)
    for (let quiet = 0; quiet < 3; quiet++) {
      await immediate()
      if (pool.totalCount === pool.idleCount && pool.waitingCount === 0) continue
      quiet = -1
      await sleep(1)
    }
  }

  async until(condition: () => boolean, expected: boolean): Promise<boolean> {
    // Once something is missing, nothing else is worth a wait.
    const waits = expected && !this.gaveUp
    if (!waits) await this.rest()
    for (const end = performance.now() + this.#patienceMs; waits && !condition() && performance.now() < end; ) await sleep(1)
    if (expected && !condition()) this.gaveUp = true
    return condition()
  }
}
