import { BusError } from '../core/index.ts'
import { Bell } from '../runtime/bell.ts'
import { type Clock, systemClock } from '../runtime/clock.ts'
import { Alarms } from './alarms.ts'
import { Entries } from './entries.ts'
import { JobTable } from './job-table.ts'
import { Log } from './log.ts'
import { Switchboard } from './switchboard.ts'

/** Kept from before anybody's fake timers: a call of the bus must end under them, too. */
const immediate = setImmediate

/**
 * What buses in one process share when they are created on it, as processes share a database. It outlives them: a bus
 * that is created on it later finds what they left. Opaque but for that; its parts belong to the package.
 */
export class MemoryStore {
  /** @internal */
  readonly clock: Clock
  /** @internal */
  readonly bell: Bell
  /** @internal */
  readonly log: Log
  /** @internal */
  readonly entries: Entries
  /** @internal */
  readonly jobs: JobTable
  /** @internal */
  readonly switchboard = new Switchboard()
  readonly #alarms: Alarms
  #source: Clock
  #bound: boolean
  #buses = 0
  #turn: Promise<void> | undefined

  /** @param clock what all buses on it go by. @default the system's, or that of the first bus that is created with one */
  constructor(clock?: Clock) {
    this.#source = clock ?? systemClock
    this.#bound = clock !== undefined
    this.clock = {
      now: () => this.#source.now(),
      date: () => this.#source.date(),
      setTimer: (callback, ms, background) => this.#source.setTimer(callback, ms, background),
    }
    this.bell = new Bell(this.clock)
    this.#alarms = new Alarms(this.clock)
    this.log = new Log(this.clock, this.bell, this.#alarms)
    this.entries = new Entries(this.clock, this.bell, this.#alarms, (id) => this.jobs.lives(id))
    this.jobs = new JobTable(this.clock, this.bell, this.#alarms, this.log, this.entries)
  }

  /**
   * What stands for the way to a server: a call has its effect after it, never within the caller's own tick, and what is
   * called in one tick has its effects in that order.
   * @internal
   */
  turn(): Promise<void> {
    this.#turn ??= new Promise((resolve) => {
      immediate(() => {
        this.#turn = undefined
        resolve()
      })
    })
    return this.#turn
  }

  /** @internal A bus opens on it. @throws invalid_argument when it goes by another clock */
  attach(clock: Clock | undefined): void {
    if (clock !== undefined && clock !== this.#source) {
      if (this.#bound) throw new BusError('invalid_argument', 'clock (an object) must be the clock of the store: all its buses go by one')
      this.#source = clock
    }
    this.#bound = true
    if (++this.#buses === 1) this.#alarms.start()
  }

  /** @internal */
  detach(): void {
    if (--this.#buses === 0) this.#alarms.stop()
  }
}
