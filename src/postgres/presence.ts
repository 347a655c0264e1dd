/**
 * What makes a process count as live for requests (R2, R4).
 *
 *   by lock        a session of its own holds an advisory lock. When the process dies its kernel closes the socket, the
 *                  server ends the session, and the lock is gone: nothing has to time out.
 *   by sign of life  behind a pooler, where a session belongs to nobody: a time that is moved on every third of a second.
 *
 * When the session is lost it is made anew, with the same number, and the rows are written again: a server crash empties
 * the table.
 */

import pg from 'pg'
import { BusError, closedError } from '../core/index.ts'
import { reconnectDelayMs } from '../runtime/backoff.ts'
import { pgArray } from './arrays.ts'
import type { Database } from './database.ts'
import { toBusError } from './errors.ts'
import { BE_PRESENT, END_FORMER, NEW_INSTANCE, REGISTER, SIGN_OF_LIFE } from './request-reply.sql.ts'
import { Sockets } from './sockets.ts'

const ALIVE_MS = 1_000
const SIGN_EVERY_MS = 300
const PING_MS = 15_000
const CONNECT_MS = 10_000
/** Who looks whether a process lives holds its lock for much less. */
const FORMER_MS = 1_000
/** How long a server may take to answer the goodbye. */
const GOODBYE_MS = 300

export class Presence {
  readonly #db: Database
  readonly #config: pg.ClientConfig
  readonly #byLock: () => boolean
  readonly #filters = new Map<object, string>()
  readonly #end = Promise.withResolvers<void>()
  #instance: Promise<number> | undefined
  #keeping: Promise<void> | undefined
  /** Resolved while the process counts as live; a new one while it does not (yet, or any more). */
  #live = pending()
  /** How it is kept just now: a row is written for that, whatever has become of LISTEN meanwhile. */
  #mode: 'lock' | 'sign of life' = 'sign of life'
  #writing: Promise<void> = Promise.resolve()
  #closed = false
  /** Of a session that is being made: a close does not wait for one that nobody answers. */
  #connecting: Sockets | undefined

  /** @param byLock whether a session of the configuration is ours alone */
  constructor(db: Database, config: pg.ClientConfig, byLock: () => boolean) {
    this.#db = db
    this.#config = config
    this.#byLock = byLock
  }

  /** The number of this process. */
  instance(): Promise<number> {
    this.#instance ??= this.#db.query<{ id: number }>(NEW_INSTANCE, [], 'respond').then(([row]) => (row as { id: number }).id)
    this.#instance.catch(() => {
      this.#instance = undefined
    })
    return this.#instance
  }

  /** Resolves once requests that match the filter find this process. @throws connection, when it cannot be made to count as live */
  async register(responder: object, filter: string): Promise<void> {
    if (this.#closed) throw closedError('the bus')
    this.#filters.set(responder, filter)
    this.#keeping ??= this.#keep()
    try {
      await this.#live.promise
      await this.#write()
    } catch (error) {
      this.#filters.delete(responder)
      throw error
    }
  }

  async unregister(responder: object): Promise<void> {
    if (this.#filters.delete(responder) && !this.#closed) await this.#write()
  }

  async close(): Promise<void> {
    if (this.#closed) return
    this.#filters.clear()
    if (this.#keeping) await this.#write().catch(() => {}) // the lock goes with the session
    this.#closed = true
    // Whoever waits to count as live, and whatever the loop is at just now.
    this.#live.reject(closedError('the bus'))
    this.#end.resolve()
    this.#connecting?.cut()
    await this.#keeping
  }

  /** One write after the other, so that the last one is what holds. */
  #write(): Promise<void> {
    this.#writing = this.#writing
      .catch(() => {})
      .then(async () => {
        if (this.#closed) throw closedError('the bus')
        const filters = pgArray([...this.#filters.values()])
        await this.#db.query(REGISTER, [await this.instance(), filters, this.#mode === 'lock' ? null : ALIVE_MS], 'respond')
      })
    return this.#writing
  }

  /** Runs while there are responders. Who waits for it is told of a failure; what was live before is mended. */
  async #keep(): Promise<void> {
    let failures = 0
    while (!this.#closed) {
      const live = this.#live
      const ready = () => {
        failures = 0
        live.resolve()
      }
      try {
        await (this.#byLock() ? this.#holdLock(ready) : this.#showLife(ready))
      } catch (error) {
        live.reject(toBusError(error, 'respond'))
      }
      // Closed before it counted as live.
      if (this.#closed) live.reject(closedError('the bus'))
      this.#live = pending()
      if (this.#closed) break
      await this.#pause(reconnectDelayMs(++failures))
      if (this.#filters.size === 0) {
        this.#keeping = undefined
        return
      }
    }
    this.#live.reject(closedError('the bus'))
  }

  async #holdLock(ready: () => void): Promise<void> {
    const sockets = new Sockets()
    const client = new pg.Client({
      application_name: 'klieo-bus presence',
      connectionTimeoutMillis: CONNECT_MS,
      keepAlive: true,
      ...this.#config,
      stream: sockets.stream,
    })
    const lost = Promise.withResolvers<void>()
    client.on('error', () => lost.resolve())
    client.on('end', () => lost.resolve())
    this.#connecting = sockets
    try {
      await client.connect()
      this.#connecting = undefined
      await this.#takeLock(client, lost.promise)
      if (this.#closed) return
      this.#mode = 'lock'
      await this.#write()
      ready()
      while (!this.#closed) {
        const over = await Promise.race([lost.promise.then(() => true), this.#pause(PING_MS).then(() => false)])
        if (over) return
        // A connection that is half open answers no ping.
        if (!this.#closed) await Promise.race([client.query('select 1'), lost.promise, this.#late()])
      }
    } finally {
      this.#connecting = undefined
      const timer = setTimeout(() => sockets.cut(), GOODBYE_MS)
      await client.end().catch(() => {})
      clearTimeout(timer)
    }
  }

  /**
   * Waits for a moment if somebody is just looking whether we live, and longer where a session of our own that we have given up has
   * the lock: if the network has forgotten it, the server does not know yet and would take the process for live when it is dead.
   */
  async #takeLock(client: pg.Client, lost: Promise<void>): Promise<void> {
    const instance = await this.instance()
    const taken = client.query(this.#db.text(BE_PRESENT), [instance]).then(() => true)
    taken.catch(() => {}) // nobody waits for it once the bus has closed
    while (!this.#closed) {
      const over = await Promise.race([taken, lost.then(() => true), this.#pause(FORMER_MS).then(() => false)])
      if (over) return void (await taken)
      if (!this.#closed) await this.#db.query(END_FORMER, [instance], 'respond').catch(() => {})
    }
  }

  async #late(): Promise<never> {
    await new Promise<void>((resolve) => setTimeout(resolve, CONNECT_MS).unref())
    throw new BusError('connection', 'the presence connection does not answer')
  }

  async #showLife(ready: () => void): Promise<void> {
    this.#mode = 'sign of life'
    await this.#write()
    ready()
    while (!this.#closed && !this.#byLock()) {
      await this.#pause(SIGN_EVERY_MS)
      if (this.#closed) return
      const [row] = await this.#db.query<{ rows: number }>(SIGN_OF_LIFE, [await this.instance(), ALIVE_MS], 'respond')
      if (row?.rows !== this.#filters.size) await this.#write()
    }
  }

  async #pause(ms: number): Promise<void> {
    let timer: NodeJS.Timeout | undefined
    await Promise.race([
      this.#end.promise,
      new Promise<void>((resolve) => {
        timer = setTimeout(resolve, ms)
      }),
    ])
    clearTimeout(timer)
  }
}

function pending(): PromiseWithResolvers<void> {
  const deferred = Promise.withResolvers<void>()
  deferred.promise.catch(() => {}) // nobody need be waiting
  return deferred
}
