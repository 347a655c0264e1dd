import pg from 'pg'
import {
  type Bus,
  BusError,
  type Capabilities,
  checkDuration,
  checkInteger,
  closedError,
  DEFAULT_MAX_PAYLOAD_BYTES,
  type Finding,
  invalid,
  LARGEST_MAX_PAYLOAD_BYTES,
  optionsOf,
  reading,
} from '../core/index.ts'
import { Bell } from '../runtime/bell.ts'
import { type Clock, systemClock } from '../runtime/clock.ts'
import { PostgresAdmin } from './admin.ts'
import type { Context } from './context.ts'
import { configOf, Database, type PostgresTx } from './database.ts'
import { type DiagnosisThresholds, diagnose } from './diagnosis.ts'
import { PostgresJobs } from './jobs.ts'
import { PostgresKv } from './kv.ts'
import { Listener } from './listener.ts'
import { Maintenance } from './maintenance.ts'
import { checkSchemaState, migrate, readSchemaState } from './migrations.ts'
import { Presence } from './presence.ts'
import { PostgresPubsub } from './pubsub.ts'
import { PostgresRequestReply } from './request-reply.ts'
import { Ringer } from './ringer.ts'
import { channelOf, checkSchema, DEFAULT_SCHEMA } from './schema-name.ts'
import { Sockets } from './sockets.ts'

export interface PostgresBusOptions {
  /** Where the server is. @default the PG* environment */
  readonly connectionString?: string
  /** A pool of the app's own, instead of `connectionString`. The bus neither configures nor ends it. */
  readonly pool?: pg.Pool
  /** Several buses can share a database, each in a schema of its own. @default 'klieo' */
  readonly schema?: string
  /** Bring the schema up to date; false: `schema_outdated` unless it is. @default true */
  readonly migrate?: boolean
  /** Take part in electing the one process that reaps and prunes. @default true */
  readonly maintenance?: boolean
  readonly retention?: {
    /** How old a message becomes at the least, in ms. @default 604_800_000 (7 days) */
    readonly messagesMs?: number
    /** How long a dead job is kept, in ms. @default 1_209_600_000 (14 days) */
    readonly deadJobsMs?: number
  }
  /** 1 to 8,388,608. @default 1_048_576 */
  readonly maxPayloadBytes?: number
  /** A direct connection for LISTEN and presence when the pool goes through a pooler. @default where the pool connects */
  readonly listenConnectionString?: string
  /**
   * Prepare the bus's own statements once for each connection. A pooler that cannot keep them (PgBouncer in transaction mode before 1.21 or
   * without `max_prepared_statements`) is noticed at the first error; false: never try. @default true
   */
  readonly preparedStatements?: boolean
  /** The floor under the notifications, in ms; jittered; at least 10. @default 1_000 */
  readonly pollIntervalMs?: number
  /** What its own waits and deadlines go by, apart from the server's clock; for tests that move both. @internal */
  readonly clock?: Clock
}

export interface DiagnoseOptions extends Pick<PostgresBusOptions, 'connectionString' | 'pool' | 'schema' | 'listenConnectionString'> {
  /** From when on a thing is worth telling. */
  readonly thresholds?: DiagnosisThresholds
}

const DEFAULT_RETENTION = { messagesMs: 7 * 24 * 60 * 60 * 1_000, deadJobsMs: 14 * 24 * 60 * 60 * 1_000 }
/** How long `connect` waits for LISTEN before it goes on without; LISTEN may come later. */
const LISTEN_WAIT_MS = 3_000
/** How long `close` tries to hand back what is unsettled. */
const HAND_BACK_MS = 500

const SUPPORTS: Capabilities = Object.freeze({
  backend: 'postgres',
  transactions: true,
  persistent: true,
  shared: true,
  watch: true,
  fencing: 'strict',
  jobFencing: 'strict',
  readYourWrites: true,
  priorities: true,
  redeliveryCounts: true,
})

/** The bus on PostgreSQL 14 or newer. */
export class PostgresBus implements Bus<PostgresTx> {
  readonly pubsub: PostgresPubsub
  readonly requestReply: PostgresRequestReply
  readonly kv: PostgresKv
  readonly jobs: PostgresJobs
  readonly admin: PostgresAdmin
  readonly supports: Capabilities = SUPPORTS
  readonly #context: Context
  readonly #listener: Listener
  readonly #maintenance: Maintenance | undefined
  readonly #state: { closed: boolean }
  #closing: Promise<void> | undefined

  private constructor(
    context: Context,
    state: { closed: boolean },
    listener: Listener,
    presence: Presence,
    maintenance: Maintenance | undefined,
  ) {
    this.#context = context
    this.#state = state
    this.#listener = listener
    this.#maintenance = maintenance
    this.pubsub = new PostgresPubsub(context)
    this.requestReply = new PostgresRequestReply(context, presence)
    this.kv = new PostgresKv(context)
    this.jobs = new PostgresJobs(context)
    this.admin = new PostgresAdmin(context)
  }

  /**
   * Connects, brings the schema up to date and begins to listen.
   *
   * @throws invalid_argument, connection, permission_denied, unavailable, unsupported for a standby or a server older than
   * 14, schema_outdated for a schema that this version cannot work with
   */
  static async connect(given: PostgresBusOptions = {}): Promise<PostgresBus> {
    const options = optionsOf(given, OPTIONS)
    const checked = check(options)
    const { clock = systemClock } = options
    const ownsPool = options.pool === undefined
    const sockets = new Sockets()
    const pool = options.pool ?? new pg.Pool({ ...connectionOf(options.connectionString), ...POOL_DEFAULTS, stream: sockets.stream })
    const db = new Database(pool, ownsPool, checked.schema, sockets, options.preparedStatements ?? true)
    try {
      await db.open()
      if (checked.migrate) await migrate(pool, checked.schema)
      else checkSchemaState(await readSchemaState(pool, checked.schema), checked.schema)
      // Before anything is published: afterwards old and new xids could not be told apart.
      await db.repairIfRestored()
    } catch (error) {
      await db.close().catch(() => {})
      throw error
    }

    const bell = new Bell(clock)
    const instance = crypto.randomUUID()
    const channel = channelOf(checked.schema)
    const ringer = new Ringer(db, bell, channel, instance)
    const state = { closed: false }
    const direct = options.listenConnectionString === undefined ? configOf(pool) : connectionOf(options.listenConnectionString)
    let listened = false
    const listener = new Listener(direct, channel, {
      notify: async (payload) => void (await db.query('select pg_notify($1, $2)', [channel, payload], 'listen')),
      onNotification: (payload) => ringer.heard(payload),
      onConnected: () => {
        if (listened) db.suspect()
        listened = true
        bell.ringAll()
      },
    })
    const context: Context = {
      db,
      bell,
      ringer,
      clock,
      instance,
      maxPayloadBytes: checked.maxPayloadBytes,
      pollIntervalMs: checked.pollIntervalMs,
      isClosed: () => state.closed,
      checkOpen() {
        if (state.closed) throw closedError('the bus')
      },
    }
    // A pooler that lets LISTEN through to nobody keeps no lock for a session either.
    const presence = new Presence(db, direct, () => listener.direct)
    await listener.start(LISTEN_WAIT_MS)
    const maintenance = checked.maintenance ? new Maintenance(context, checked.retention) : undefined
    const bus = new PostgresBus(context, state, listener, presence, maintenance)
    maintenance?.start()
    return bus
  }

  /**
   * Brings the schema up to date without connecting a bus, or only looks whether it is (`check: true`).
   *
   * @returns the migrations that were applied; with `check` those that are missing
   * @throws schema_outdated for a schema of a newer version that this one cannot work with, permission_denied, connection
   */
  static async migrate(
    given: Pick<PostgresBusOptions, 'connectionString' | 'pool' | 'schema'> & { readonly check?: boolean } = {},
  ): Promise<string[]> {
    const options = optionsOf(given, ['connectionString', 'pool', 'schema', 'check'])
    const { schema } = check(options)
    checkBoolean('check', options.check)
    return withPool(options, schema, async (pool) => {
      if (!options.check) return migrate(pool, schema)
      return [...(await lookForMissing(pool, schema))]
    })
  }

  /**
   * The SQL that {@link PostgresBus.migrate} would run, as one transaction, for who reviews it or runs it as another role. Only looks.
   *
   * @returns empty when the schema is up to date
   * @throws schema_outdated for a schema of a newer version that this one cannot work with, permission_denied, connection
   */
  static async migrationSql(given: Pick<PostgresBusOptions, 'connectionString' | 'pool' | 'schema'> = {}): Promise<string> {
    const options = optionsOf(given, ['connectionString', 'pool', 'schema'])
    const { schema } = check(options)
    const { migrationScript } = await import('./migrator.ts')
    return withPool(options, schema, async (pool) => migrationScript(await lookForMissing(pool, schema), schema))
  }

  /**
   * Looks at the server and the schema without connecting a bus: version, rights, LISTEN, old snapshots, dead rows, the notification queue,
   * durables that nobody reads, dead and waiting jobs. Changes nothing.
   *
   * @returns what was found, the good as well; what the role may not look at is a finding, too
   * @throws invalid_argument, connection, unavailable, permission_denied where the server lets nobody in
   */
  static async diagnose(given: DiagnoseOptions = {}): Promise<Finding[]> {
    const options = optionsOf(given, ['connectionString', 'pool', 'schema', 'listenConnectionString', 'thresholds'])
    const { schema } = check(options)
    const {
      oldSnapshotMs = 300_000,
      abandonedMs = 86_400_000,
      waitingMs = 300_000,
      deadRows = 10_000,
    } = optionsOf(options.thresholds, ['oldSnapshotMs', 'abandonedMs', 'waitingMs', 'deadRows'], 'thresholds')
    for (const [name, ms] of Object.entries({ oldSnapshotMs, abandonedMs, waitingMs, deadRows })) checkDuration(`thresholds.${name}`, ms)
    const { pool, db } = openDatabase(options.pool, options.connectionString, schema)
    try {
      return await diagnose({
        db,
        schema,
        thresholds: { oldSnapshotMs, abandonedMs, waitingMs, deadRows },
        listens: () => listens(options.listenConnectionString, pool, db, schema),
        readSchema: () => readSchemaState(pool, schema),
      })
    } finally {
      await db.close()
    }
  }

  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  async #close(): Promise<void> {
    const { bell, ringer, db } = this.#context
    this.#state.closed = true
    bell.ringAll()
    const handBack = Promise.all([
      this.pubsub.close(),
      this.jobs.close(),
      this.kv.close(),
      this.requestReply.close(),
      this.#maintenance?.close(),
    ]).then(() => ringer.close())
    // Behind somebody's lock, or a server that does not answer, nothing can be handed back: it comes back by itself.
    let timer: NodeJS.Timeout | undefined
    await Promise.race([handBack, new Promise<void>((resolve) => (timer = setTimeout(resolve, HAND_BACK_MS)))])
    clearTimeout(timer)
    await Promise.all([this.#listener.close(), db.close()])
    await handBack
  }
}

/** How long a server may take to let a connection in. */
const CONNECT_MS = 10_000

/**
 * Whoever takes a connection and never answers must not keep a call waiting for ever. A pool's own limit would count the time that a
 * call waits for a connection to be free, too.
 */
class PoolClient extends pg.Client {
  constructor(config?: pg.ClientConfig) {
    super({ connectionTimeoutMillis: CONNECT_MS, ...config })
  }
}

const POOL_DEFAULTS: pg.PoolConfig = { fallback_application_name: 'klieo-bus', keepAlive: true, Client: PoolClient }

/** A pool for one piece of work, unless the caller has one. */
async function withPool<T>(
  options: { readonly connectionString?: string | undefined; readonly pool?: pg.Pool | undefined },
  schema: string,
  work: (pool: pg.Pool) => Promise<T>,
): Promise<T> {
  const { pool, db } = openDatabase(options.pool, options.connectionString, schema)
  try {
    await db.open()
    return await work(pool)
  } finally {
    await db.close()
  }
}

async function lookForMissing(pool: pg.Pool, schema: string): Promise<readonly string[]> {
  const state = await readSchemaState(pool, schema)
  if (state.unknown.length > 0) checkSchemaState(state, schema)
  return state.missing
}

function connectionOf(connectionString: string | undefined): pg.ClientConfig {
  return connectionString === undefined ? {} : { connectionString }
}

/** For a look or a migration: one connection is enough. */
function openDatabase(given: pg.Pool | undefined, connectionString: string | undefined, schema: string): { pool: pg.Pool; db: Database } {
  const sockets = new Sockets()
  const pool = given ?? new pg.Pool({ ...connectionOf(connectionString), ...POOL_DEFAULTS, stream: sockets.stream, max: 1 })
  return { pool, db: new Database(pool, given === undefined, schema, sockets) }
}

/** Whether a session hears what another one sends; `undefined` where it could not be had. */
async function listens(direct: string | undefined, pool: pg.Pool, db: Database, schema: string): Promise<boolean | undefined> {
  const channel = channelOf(schema)
  const listener = new Listener(direct === undefined ? configOf(pool) : connectionOf(direct), channel, {
    notify: async (payload) => void (await db.query('select pg_notify($1, $2)', [channel, payload], 'listen')),
    onNotification: () => {},
    onConnected: () => {},
  })
  await listener.start(LISTEN_WAIT_MS)
  const { state } = listener
  await listener.close()
  return state === 'connecting' ? undefined : state === 'listening'
}

const OPTIONS = [
  ...(['connectionString', 'pool', 'schema', 'migrate', 'maintenance', 'retention'] as const),
  ...(['maxPayloadBytes', 'listenConnectionString', 'preparedStatements', 'pollIntervalMs', 'clock'] as const),
]

/** @param options each read once */
function check(options: Partial<{ readonly [K in keyof PostgresBusOptions]: PostgresBusOptions[K] | undefined }>) {
  const { connectionString, pool, schema = DEFAULT_SCHEMA, maintenance = true, retention, listenConnectionString } = options
  const { maxPayloadBytes = DEFAULT_MAX_PAYLOAD_BYTES, pollIntervalMs = 1_000 } = options
  if (connectionString !== undefined && pool !== undefined) {
    throw invalid('pool', pool, 'must not be given together with connectionString')
  }
  checkConnectionString('connectionString', connectionString)
  checkConnectionString('listenConnectionString', listenConnectionString)
  // A client of the caller's own cannot be shared with him; a pool counts its connections.
  if (
    pool !== undefined &&
    !reading('pool', pool, () => typeof pool === 'object' && pool !== null && typeof pool.totalCount === 'number')
  ) {
    throw invalid('pool', pool, 'must be a pg.Pool')
  }
  checkSchema(schema)
  checkBoolean('migrate', options.migrate)
  checkBoolean('maintenance', options.maintenance)
  checkBoolean('preparedStatements', options.preparedStatements)
  const { messagesMs = DEFAULT_RETENTION.messagesMs, deadJobsMs = DEFAULT_RETENTION.deadJobsMs } = optionsOf(
    retention,
    ['messagesMs', 'deadJobsMs'],
    'retention',
  )
  checkDuration('retention.messagesMs', messagesMs)
  checkDuration('retention.deadJobsMs', deadJobsMs)
  checkInteger('maxPayloadBytes', maxPayloadBytes, 1, LARGEST_MAX_PAYLOAD_BYTES)
  checkDuration('pollIntervalMs', pollIntervalMs, 10)
  return { schema, migrate: options.migrate ?? true, maintenance, retention: { messagesMs, deadJobsMs }, maxPayloadBytes, pollIntervalMs }
}

function checkConnectionString(argument: string, value: unknown): void {
  if (value === undefined) return
  const invalidString = () =>
    new BusError('invalid_argument', `${argument} must be a connection string such as postgres://user@host:5432/database`)
  if (typeof value !== 'string' || !/^(postgres(ql)?:\/\/|socket:|\/)/.test(value)) throw invalidString()
  try {
    // Reads it, and connects nowhere. What it throws repeats the string, password and all: it is no cause.
    new pg.Client({ connectionString: value })
  } catch {
    throw invalidString()
  }
}

function checkBoolean(argument: string, value: unknown): void {
  if (value !== undefined && typeof value !== 'boolean') throw invalid(argument, value, 'must be a boolean')
}
