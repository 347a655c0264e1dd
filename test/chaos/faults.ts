/** Does to the system what the schedule says, and undoes it. */

import { setTimeout as sleep } from 'node:timers/promises'
import { session } from '../support/sessions.ts'
import type { Crew, Mate } from './crew.ts'
import { now, type Recorder } from './record.ts'
import type { Fault, FaultKind } from './schedule.ts'
import type { ChaosServer } from './server.ts'

const TERMINATED = 3
/** Between two faults of the server, however long it took to come back: what is always down is never used. */
const SERVER_UP_MS = 10_000

export class Faults {
  readonly #crew: Crew
  readonly #server: ChaosServer
  readonly #recorder: Recorder
  readonly #healing = new AbortController()
  readonly #underWay = new Set<Promise<void>>()
  /** Server faults, one after the other. */
  #serverTurn: Promise<void> = Promise.resolve()
  #serverUpAt = performance.now()
  readonly counts = new Map<FaultKind, number>()

  constructor(crew: Crew, server: ChaosServer, recorder: Recorder) {
    this.#crew = crew
    this.#server = server
    this.#recorder = recorder
  }

  /** Carries out the schedule; resolves after `forMs`. */
  async run(faults: readonly Fault[], forMs: number, signal: AbortSignal): Promise<void> {
    const begun = performance.now()
    const until = (ms: number) => sleep(Math.max(0, begun + ms - performance.now()), undefined, { signal })
    for (const fault of faults) {
      await until(fault.atMs)
      const work = this.#inject(fault)
      this.#underWay.add(work)
      void work.finally(() => this.#underWay.delete(work))
    }
    await until(forMs)
  }

  /** Everything that was broken is mended: nobody is stopped or missing, every wire carries. */
  async heal(): Promise<void> {
    this.#healing.abort()
    await Promise.all(this.#underWay)
    for (const mate of this.#crew.mates) {
      mate.relay.thaw()
      mate.relay.refuse(false)
      if (mate.stopped) mate.resume()
      if (!mate.alive) mate.spawn()
    }
    this.#note('healed')
  }

  /** As long as the fault lasts, or until everything is to be mended. */
  async #last(ms: number): Promise<void> {
    await sleep(Math.max(0, ms), undefined, { signal: this.#healing.signal }).catch(() => {})
  }

  #note(fault: string, target?: string): void {
    this.#recorder.write({ kind: 'fault', at: now(), fault, ...(target === undefined ? {} : { target }) })
  }

  #hit(kind: FaultKind, target?: string): void {
    this.counts.set(kind, (this.counts.get(kind) ?? 0) + 1)
    this.#note(kind, target)
  }

  async #inject(fault: Fault): Promise<void> {
    const { kind, target, lengthMs } = fault
    switch (kind) {
      case 'serverKill':
      case 'serverRestart': {
        this.#serverTurn = this.#serverTurn.then(() => this.#hitServer(kind, lengthMs))
        return this.#serverTurn
      }
      case 'terminate':
      case 'terminateInTransaction':
      case 'terminateListeners':
      case 'vacuum':
      case 'checkpoint':
      case 'snapshot':
        // The server may be down: then there is nobody to ask, and no fault.
        return this.#ask(kind, target, lengthMs).catch(() => {})
      default: {
        const mate = this.#crew.pick(target)
        if (mate) await this.#hitMate(kind, mate, lengthMs)
      }
    }
  }

  async #hitServer(kind: 'serverKill' | 'serverRestart', lengthMs: number): Promise<void> {
    await this.#last(this.#serverUpAt + SERVER_UP_MS - performance.now())
    if (this.#healing.signal.aborted) return
    this.#hit(kind)
    if (kind === 'serverKill') {
      await this.#server.kill()
      await this.#last(lengthMs)
    }
    await this.#server.restart()
    this.#serverUpAt = performance.now()
    this.#note('serverUp')
  }

  async #hitMate(kind: FaultKind, mate: Mate, lengthMs: number): Promise<void> {
    const { relay } = mate
    this.#hit(kind, mate.name)
    switch (kind) {
      case 'kill':
        await mate.kill()
        await this.#last(lengthMs)
        return mate.spawn()
      case 'stop':
        mate.stop()
        await this.#last(lengthMs)
        mate.resume()
        return this.#note('continue', mate.name)
      case 'rejoin':
        return mate.order({ do: 'rejoin' })
      case 'cut':
        return relay.cut()
      case 'reset':
        return relay.reset()
      case 'hold':
        relay.holdAnswers()
        await this.#last(lengthMs)
        return relay.thaw()
      case 'freeze':
        relay.freeze()
        await this.#last(lengthMs)
        return relay.thaw()
      case 'silence':
        relay.silence()
        await this.#last(lengthMs)
        return relay.cut()
      case 'refuse':
        relay.refuse(true)
        await this.#last(lengthMs)
        return relay.refuse(false)
      default:
        throw new Error(`${kind} is no fault of a process`)
    }
  }

  async #ask(kind: FaultKind, target: number, lengthMs: number): Promise<void> {
    await using client = await session(this.#server.connectionString, { applicationName: 'chaos runner' })
    switch (kind) {
      case 'vacuum':
        this.#hit(kind)
        await client.query('vacuum')
        return
      case 'checkpoint':
        this.#hit(kind)
        await client.query('checkpoint')
        return
      case 'snapshot':
        await client.query('begin isolation level repeatable read')
        await client.query('select count(*) from pg_class')
        this.#hit(kind)
        await this.#last(lengthMs)
        await client.query('commit')
        return
      default: {
        const { rows } = await client.query<{ pid: number }>(
          `select pid from pg_stat_activity
           where backend_type = 'client backend' and application_name <> 'chaos runner' and (${CONNECTIONS[kind] ?? 'true'})
           order by hashtext(pid::text || $1)
           limit ${kind === 'terminate' ? TERMINATED : TERMINATED * 2}`,
          [String(target)],
        )
        if (rows.length === 0) return
        this.#hit(kind, rows.map(({ pid }) => pid).join(','))
        await client.query('select pg_terminate_backend(pid) from unnest($1::int[]) as pid', [rows.map(({ pid }) => pid)])
      }
    }
  }
}

/** Which connections a fault ends. */
const CONNECTIONS: Partial<Record<FaultKind, string>> = {
  terminateInTransaction: `state like 'idle in transaction%' or xact_start < clock_timestamp() - interval '50 ms'`,
  terminateListeners: `query ilike 'listen %' or query ilike '%pg_notify%'`,
}
