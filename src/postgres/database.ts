/**
 * The bus's way to the server: its own statements on the pool, and those in a caller's transaction.
 *
 * Own statements are prepared and each is its own transaction. They need READ COMMITTED, durable commits and a primary;
 * where the role's defaults are others, each is wrapped in a transaction that says so ("explicit" mode, slower and right).
 * Where the pool goes through a pooler that cannot keep prepared statements, they are sent unprepared.
 */

import { createHash } from 'node:crypto'
import type { CompiledQuery, Transaction } from 'kysely'
import pg from 'pg'
import { BusError, closedError, invalid, isBusError, kindOf, reading } from '../core/index.ts'
import { reconnectDelayMs } from '../runtime/backoff.ts'
import { isNotifyQueueFull, isTransient, LACKS_A_RIGHT, REPAIR, sqlState, toBusError, toPermissionError } from './errors.ts'
import { inSchema } from './schema-name.ts'
import { type Sockets, takeClient } from './sockets.ts'

/** Any client's open transaction: what adapters turn theirs into. */
export interface QueryableTx {
  query(text: string, values: unknown[]): Promise<{ rows: unknown[] }>
}

/** The transaction the caller already has open: a `pg` client, a Kysely transaction, or an object with `query`. */
// biome-ignore lint/suspicious/noExplicitAny: a Kysely transaction of whatever database type the caller has
export type PostgresTx = QueryableTx | pg.ClientBase | Transaction<any>

/** Values, or how to make them once a connection is there. */
type Values = readonly unknown[] | (() => readonly unknown[])

export type Row = Readonly<Record<string, unknown>>

const MAX_TRIES = 5
const READ_ONLY = '25006'
/** How long statements that are under way may hold up `close`. */
const CLOSE_MS = 300
/**
 * A connection that something on the way has forgotten says nothing for ever. No statement of the bus takes so long but one that
 * waits for another's transaction, and that one may be sent again.
 */
const SILENT_MS = 30_000
/** How often a full notification queue is asked whether it is still full. */
const QUEUE_ASKED_EVERY_MS = 500
/** For a connection, and for each lock of a repair. */
const CHECK_MS = 5_000
const GOODBYE_MS = 300

type ServerRow = Readonly<{ version: number; standby: boolean; isolation: string; durable: string; readonly: string; role: string }>

/** Parsers of our own, so that neither the session's DateStyle nor an app's changes to pg's parsers reach us. */
const parsers: Readonly<Record<number, (text: string) => unknown>> = {
  16: (text) => text === 't',
  17: (text) =>
    new Uint8Array(
      text.startsWith('\\x') ? Buffer.from(text.slice(2), 'hex') : (pg.types.getTypeParser(17) as (t: string) => Buffer)(text),
    ),
  20: Number,
  21: Number,
  23: Number,
  701: Number,
  114: JSON.parse,
  3802: JSON.parse,
}
const types = { getTypeParser: (oid: number) => parsers[oid] ?? ((text: string) => text) }

/** What a statement answers in any case, so that an object that is no transaction is not taken for one. */
interface Expected {
  readonly rows: number
  /** So many, or none. */
  readonly orNone?: boolean
  readonly columns: readonly string[]
}

function checkAnswer(rows: readonly Row[], { rows: count, orNone = false, columns }: Expected): void {
  if (orNone && rows.length === 0) return
  if (rows.length !== count || !rows.every((row) => columns.every((column) => row[column] !== undefined))) {
    throw new BusError(
      'invalid_argument',
      `tx: its query() must resolve to what the server answers: ${count} row(s) with the columns ${columns.join(', ')}`,
    )
  }
}

/** Loaded with the first transaction of Kysely's: it is most of what there is to load, and few hand one in. */
let compiled: typeof CompiledQuery | undefined

async function loadKysely(): Promise<typeof CompiledQuery> {
  compiled ??= (await import('kysely')).CompiledQuery
  return compiled
}

export class Database {
  readonly pool: pg.Pool
  readonly schema: string
  readonly #ownsPool: boolean
  readonly #texts = new Map<string, { name: string; text: string }>()
  readonly #underWay = new Set<(error: unknown) => void>()
  #onIdle: (() => void) | undefined
  readonly #sockets: Sockets
  readonly #onPoolError = () => {
    this.#suspect = true
  }
  #prepare: boolean
  /** Whose connections the pool's are. */
  #role: string | undefined
  #generation = 0
  #explicit = false
  /** The connection was lost: what answers next may be another cluster. */
  #suspect = false
  /** The schema is there, so that there is something to look at. */
  #guarded = false
  #looking: Promise<void> | undefined
  #lookingBeside: Promise<void> | undefined
  #closed = false
  #queueAskedAt = Number.NEGATIVE_INFINITY
  /** Explicit mode is only there because a statement met a read-only transaction. */
  #readOnlyTried = false

  /** @param sockets those of an own pool */
  constructor(pool: pg.Pool, ownsPool: boolean, schema: string, sockets: Sockets, prepare = true) {
    this.#prepare = prepare
    this.#sockets = sockets
    this.pool = pool
    this.schema = schema
    this.#ownsPool = ownsPool
    pool.on('error', this.#onPoolError)
  }

  /**
   * Looks at what the server is.
   * @throws unsupported for a standby or an old server, connection, permission_denied
   */
  async open(): Promise<void> {
    const [server] = await this.query<ServerRow>(
      `select current_setting('server_version_num')::int as version, pg_is_in_recovery() as standby,
         current_setting('default_transaction_isolation') as isolation, current_setting('synchronous_commit') as durable,
         current_setting('default_transaction_read_only') as readonly, current_user::text as role`,
      [],
      'connect',
    )
    if (!server) throw new BusError('internal', 'connect: the server answered nothing')
    this.#role = server.role
    if (server.standby) throw new BusError('unsupported', 'connect: this server is a standby, which cannot write; connect to the primary')
    if (server.version < 140_000) {
      throw new BusError('unsupported', `connect: PostgreSQL 14 or newer is needed, this is ${Math.floor(server.version / 10_000)}`)
    }
    this.#explicit = server.isolation !== 'read committed' || server.durable === 'off' || server.readonly === 'on'
  }

  /** An own statement, in a transaction of its own. `text` names the schema `klieo`. */
  async query<R extends Row = Row>(text: string, values: Values, doing: string): Promise<R[]> {
    if (this.#closed) throw closedError('the bus')
    if (this.#mayHaveMissedAnExchange()) await this.#look(doing)
    for (let tries = 1; ; tries++) {
      try {
        return await this.#send<R>(text, values, doing)
      } catch (error) {
        if (!(await this.#remedy(error, tries))) {
          const busError = this.#toBusError(error, doing, this.#role)
          if (busError.code === 'connection') this.#suspect = true
          throw busError
        }
      }
    }
  }

  /** A statement in the caller's transaction. Nothing is repeated there. */
  async queryIn<R extends Row = Row>(
    tx: PostgresTx,
    text: string,
    values: readonly unknown[],
    doing: string,
    expected?: Expected,
  ): Promise<R[]> {
    if (this.#closed) throw closedError('the bus')
    const sql = this.#statement(text).text
    try {
      if (this.#mayHaveMissedAnExchange()) await this.#lookFor(tx, doing)
      const rows = await this.#sendIn<R>(tx, sql, values)
      if (expected) checkAnswer(rows, expected)
      return rows
    } catch (error) {
      throw this.#toBusError(error, doing, undefined)
    }
  }

  #toBusError(error: unknown, doing: string, role: string | undefined): BusError {
    return sqlState(error) === LACKS_A_RIGHT ? toPermissionError(error, { doing, schema: this.schema, role }) : toBusError(error, doing)
  }

  async #sendIn<R extends Row>(tx: PostgresTx, sql: string, values: readonly unknown[]): Promise<R[]> {
    const answer: { readonly rows?: unknown } | undefined = isKysely(tx)
      ? await tx.executeQuery<R>((compiled ?? (await loadKysely())).raw(sql, [...values]))
      : await (tx as QueryableTx).query(sql, [...values])
    const rows = answer?.rows
    if (!Array.isArray(rows) || !rows.every((row) => typeof row === 'object' && row !== null)) {
      throw new BusError('invalid_argument', 'tx: what it executes must resolve to an object with rows, and each row must be an object')
    }
    return rows as R[]
  }

  /** A connection for statements that belong together; always given back. */
  async withClient<T>(work: (client: pg.PoolClient) => Promise<T>, doing: string): Promise<T> {
    let failure: unknown
    // A connection that breaks while it is out must not end the process.
    const onError = (error: unknown) => {
      failure ??= error
    }
    let client: pg.PoolClient
    try {
      client = await takeClient(this.pool, onError)
    } catch (error) {
      throw toBusError(error, doing)
    }
    try {
      return await work(client)
    } catch (error) {
      failure ??= error
      throw error
    } finally {
      client.off('error', onError)
      client.release(failure !== undefined && sqlState(failure) === undefined)
    }
  }

  text(sql: string): string {
    return this.#statement(sql).text
  }

  async close(): Promise<void> {
    if (this.#closed) return
    this.#closed = true
    await this.#idle()
    if (!this.#ownsPool) {
      this.pool.off('error', this.#onPoolError)
      this.#sockets.cut()
      return this.#abandon()
    }
    // An own pool is listened to for good: its connections may break until the last goodbye, and an error that nobody hears ends the process.
    const ended = this.pool.end()
    // A statement that waits for somebody's lock, or a goodbye to a server that does not answer, must not hold up the end.
    const timer = setTimeout(() => {
      this.#abandon()
      this.#sockets.cut()
    }, CLOSE_MS)
    await ended
    // The pool does not wait for the goodbyes of idle connections.
    await this.#sockets.closed(CLOSE_MS)
    clearTimeout(timer)
    this.#sockets.cut()
    // The pool forgets who waited for a connection.
    this.#abandon()
  }

  #abandon(): void {
    for (const reject of this.#underWay) reject(closedError('the bus'))
  }

  /** Resolves when no statement is under way, or after a while. */
  async #idle(): Promise<void> {
    if (this.#underWay.size === 0) return
    const { promise, resolve } = Promise.withResolvers<void>()
    this.#onIdle = resolve
    const timer = setTimeout(resolve, CLOSE_MS)
    await promise
    clearTimeout(timer)
  }

  async #track<T>(work: Promise<T>): Promise<T> {
    const { promise, resolve, reject } = Promise.withResolvers<T>()
    this.#underWay.add(reject)
    work.then(resolve, reject)
    try {
      return await promise
    } finally {
      this.#underWay.delete(reject)
      if (this.#underWay.size === 0) this.#onIdle?.()
    }
  }

  /** @param silentMs how long the server may say nothing; 0: as long as it takes */
  async #send<R extends Row>(text: string, values: Values, doing: string, silentMs = SILENT_MS): Promise<R[]> {
    if (this.#closed) throw closedError('the bus')
    const statement = this.#statement(text)
    const base = { ...(this.#prepare ? statement : { text: statement.text }), types, query_timeout: silentMs }
    if (typeof values === 'function' || this.#explicit) {
      const late = () => ({ ...base, values: [...(typeof values === 'function' ? values() : values)] }) as pg.QueryConfig
      return this.#track(this.#explicit ? this.#sendExplicitly<R>(late, doing, silentMs) : this.#sendLate<R>(late, doing))
    }
    return (await this.#track(this.pool.query<R>({ ...base, values: [...values] } as pg.QueryConfig))).rows
  }

  /** Its values are made when there is a connection for it. */
  #sendLate<R extends Row>(query: () => pg.QueryConfig, doing: string): Promise<R[]> {
    return this.withClient(async (client) => (await client.query<R>(query())).rows, doing)
  }

  #sendExplicitly<R extends Row>(query: () => pg.QueryConfig, doing: string, silentMs: number): Promise<R[]> {
    return this.withClient(async (client) => {
      const send = (text: string) => client.query({ text, query_timeout: silentMs } as pg.QueryConfig)
      await send('begin isolation level read committed read write')
      try {
        await send('set local synchronous_commit = on')
        const { rows } = await client.query<R>(query())
        await send('commit')
        return rows
      } catch (error) {
        // Where the server has said nothing, a rollback would wait behind what it has not answered: the connection is thrown away.
        if (sqlState(error) !== undefined) await send('rollback').catch(() => {})
        throw error
      }
    }, doing)
  }

  #statement(text: string): { name: string; text: string } {
    const known = this.#texts.get(text)
    if (known) return known
    const own = inSchema(text, this.schema)
    const hash = createHash('sha256').update(own).digest('hex').slice(0, 24)
    const statement = { name: `klieo_${hash}_${this.#generation}`, text: own }
    this.#texts.set(text, statement)
    return statement
  }

  /** Whether the statement may be sent again. */
  async #remedy(error: unknown, tries: number): Promise<boolean> {
    if (tries >= MAX_TRIES) return false
    const state = sqlState(error)
    if (isTransient(error)) {
      await new Promise((resolve) => setTimeout(resolve, reconnectDelayMs(tries)))
      return true
    }
    // A prepared statement that is not there, or there already: a pooler, or DISCARD ALL. Of statements that meet it at once the
    // first ends the preparing, and all are sent again.
    if (state === '26000' || state === '42P05') {
      this.#prepare = false
      return true
    }
    // One that is out of date since a migration: prepared anew under another name.
    if (this.#prepare && state === '0A000') {
      this.#generation++
      this.#texts.clear()
      return true
    }
    if (state === 'KB003') {
      this.#explicit = true
      return true
    }
    // The role's default has changed; or this is a standby, where saying so is in vain and need not be kept up.
    if (state === READ_ONLY && this.#explicit === this.#readOnlyTried) {
      this.#explicit = this.#readOnlyTried = !this.#explicit
      return this.#explicit
    }
    if (state === 'KB004') {
      await this.repair()
      return true
    }
    // Postgres frees what all have read when somebody notifies, and while the queue is full nobody can: it would stay full for ever.
    // Asking how full it is frees it, too.
    if (isNotifyQueueFull(error) && performance.now() >= this.#queueAskedAt + QUEUE_ASKED_EVERY_MS) {
      this.#queueAskedAt = performance.now()
      await this.#send('select pg_notification_queue_usage()', [], 'notify').catch(() => {})
      return true
    }
    return false
  }

  /** A connection of ours was lost elsewhere. */
  suspect(): void {
    this.#suspect = true
  }

  /**
   * Before anything is published: the server may have been replaced by one that was restored from a dump. So it may after a lost
   * connection, and when there was no connection that would have noticed.
   */
  #mayHaveMissedAnExchange(): boolean {
    if (this.#guarded && this.pool.totalCount === 0) this.#suspect = true
    return this.#guarded && this.#suspect
  }

  /** For a statement of our own, on the pool that it will use itself. */
  async #look(doing: string): Promise<void> {
    this.#looking ??= this.#lookOnce(async () => {
      const [row] = await this.#send<{ restored: boolean }>('select klieo.restored() as restored', [], 'reconnect')
      if (row?.restored) await this.repair()
    }).finally(() => {
      this.#looking = undefined
    })
    try {
      await this.#looking
    } catch (error) {
      throw this.#toBusError(error, doing, this.#role)
    }
  }

  /**
   * For a statement in the caller's transaction, beside the pool: there it could wait for the connection that this very
   * transaction holds. Where the server has no connection to spare, in the transaction itself, which cannot repair.
   */
  async #lookFor(tx: PostgresTx, doing: string): Promise<void> {
    this.#lookingBeside ??= this.#lookOnce(() => this.#checkBeside()).finally(() => {
      this.#lookingBeside = undefined
    })
    try {
      return await this.#lookingBeside
    } catch (error) {
      if (sqlState(error) === LACKS_A_RIGHT) throw this.#toBusError(error, doing, this.#role)
      if (!isBusError(error, 'unavailable') && !isBusError(error, 'connection')) throw error
    }
    const [row] = await this.#sendIn<{ restored: string }>(tx, this.text('select klieo.restored()::text as restored'), [])
    if (row?.restored !== 'true') return
    this.repair().catch(() => {}) // it waits for this transaction to end
    throw new BusError('conflict', 'the database was restored from a dump and is being repaired; roll back and run the transaction again', {
      retryable: true,
    })
  }

  /** A right that is lacking is told by the call that needed it, with the grant for that call. */
  async #lookOnce(look: () => Promise<void>): Promise<void> {
    try {
      await look()
      this.#suspect = false
    } catch (error) {
      if (sqlState(error) === LACKS_A_RIGHT && (error as pg.DatabaseError).where === undefined) throw error
      throw this.#toBusError(error, 'reconnect', this.#role)
    }
  }

  /** A repair that cannot have its locks soon gives up: the call may be made again. */
  async #checkBeside(): Promise<void> {
    const client = new pg.Client({
      application_name: 'klieo-bus check',
      connectionTimeoutMillis: CHECK_MS,
      query_timeout: SILENT_MS,
      ...configOf(this.pool),
      stream: this.#sockets.stream,
    })
    client.on('error', () => {})
    try {
      await client.connect()
      const { rows } = await client.query<{ restored: boolean }>(this.text('select klieo.restored() as restored'))
      if (!rows[0]?.restored) return
      await client.query(`begin isolation level read committed read write; set local lock_timeout = '${CHECK_MS}ms'`)
      await client.query(this.text('select klieo.rebase()')).catch((error: unknown) => {
        throw this.#toBusError(error, REPAIR, this.#role)
      })
      await client.query('commit')
    } finally {
      // Where the server is silent nothing answers the goodbye; the socket is cut when the bus closes.
      await Promise.race([client.end().catch(() => {}), new Promise((resolve) => setTimeout(resolve, GOODBYE_MS).unref())])
    }
  }

  async repairIfRestored(): Promise<void> {
    const [row] = await this.query<{ restored: boolean }>('select klieo.restored() as restored', [], 'connect')
    if (row?.restored) await this.repair()
    this.#guarded = true
  }

  /** Makes the log of a restored database deliverable again; does nothing when it is not needed. */
  async repair(): Promise<void> {
    try {
      await this.#send('select klieo.rebase()', [], REPAIR, 0)
    } catch (error) {
      throw this.#toBusError(error, REPAIR, this.#role)
    }
  }
}

/** Where a pool connects. Its password is not enumerable. */
export function configOf(pool: pg.Pool): pg.ClientConfig {
  const { options } = pool as unknown as { options: pg.PoolConfig }
  const { connectionString, host, port, user, database, ssl, password } = options
  const given = { connectionString, host, port, user, database, ssl, password }
  return Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined))
}

// biome-ignore lint/suspicious/noExplicitAny: see PostgresTx
function isKysely(tx: PostgresTx): tx is Transaction<any> {
  return 'executeQuery' in tx && typeof tx.executeQuery === 'function'
}

/** @throws invalid_argument for what is no transaction */
export function checkTx(tx: unknown): void {
  if (tx !== undefined) reading('tx', tx, () => checkTransaction(tx))
}

function checkTransaction(tx: unknown): void {
  if (typeof tx !== 'object' || tx === null)
    throw invalid('tx', tx, 'must be a transaction: a pg client, a Kysely transaction or an object with query()')
  if ('executeQuery' in tx && typeof tx.executeQuery === 'function') {
    if ('isTransaction' in tx && tx.isTransaction === false) {
      throw new BusError('invalid_argument', `tx (${kindOf(tx)}) must be a Kysely transaction, not the Kysely instance itself`)
    }
    return
  }
  if (!('query' in tx) || typeof tx.query !== 'function') {
    throw invalid('tx', tx, 'must be a transaction: a pg client, a Kysely transaction or an object with query()')
  }
  if (tx instanceof pg.Pool || ('totalCount' in tx && 'idleCount' in tx)) {
    throw new BusError(
      'invalid_argument',
      'tx (a pool) must be a client that has a transaction open: a pool sends each statement on any connection',
    )
  }
}
