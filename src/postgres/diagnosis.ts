/**
 * How a server and a schema are: what a person would look at when something is wrong, in the order in which he would.
 * Only looks. What the role may not look at is said, and passed over.
 */

import { BusError, type Finding, type FindingLevel, isBusError } from '../core/index.ts'
import type { Database, Row } from './database.ts'
import {
  ABANDONED,
  BLOAT,
  HORIZON,
  IDLE_IN_TRANSACTION,
  KINDS,
  NOTIFY_QUEUE,
  QUEUE_HEALTH,
  RESTORED,
  SERVER,
  SLOTS,
} from './diagnosis.sql.ts'
import type { SchemaState } from './migrations.ts'
import { grantStatement } from './schema-name.ts'

/** From when on a thing is worth telling. */
export interface DiagnosisThresholds {
  /** A transaction that is open for so long. @default 300_000 (5 minutes) */
  readonly oldSnapshotMs?: number
  /** A durable of which nobody has fetched for so long; told to within half a minute. @default 86_400_000 (a day) */
  readonly abandonedMs?: number
  /** A claimable job that has waited for so long. @default 300_000 (5 minutes) */
  readonly waitingMs?: number
  /** Dead row versions in a table, beyond as many as there are live ones. @default 10_000 */
  readonly deadRows?: number
}

const FEW_PLACES = 0.8
const NOTIFY_QUEUE_FILLING = 0.25

interface ServerRow extends Row {
  readonly version: string
  readonly version_num: number
  readonly standby: boolean
  readonly isolation: string
  readonly readonly: string
  readonly synchronous_commit: string
  readonly fsync: string
  readonly autovacuum: string
  readonly role: string
  readonly places: number
  readonly connections: number
}

interface Looked {
  readonly db: Database
  readonly schema: string
  readonly thresholds: Required<DiagnosisThresholds>
  /** Whether LISTEN is heard; `undefined`: it could not be tried. */
  listens(): Promise<boolean | undefined>
  readSchema(): Promise<SchemaState>
}

/** @throws connection, unavailable, permission_denied for a server that lets nobody in */
export async function diagnose(looked: Looked): Promise<Finding[]> {
  const { db } = looked
  const [server] = await db.query<ServerRow>(SERVER, [], 'diagnose')
  if (!server) throw new BusError('internal', 'diagnose: the server answered nothing')
  const findings = [...ofServer(server)]
  if (findings.some(({ level }) => level === 'error')) return findings
  const schema = await guarded('schema', () => ofSchema(looked, server.role))
  findings.push(...schema)
  findings.push(...(await guarded('listen', () => ofListening(looked))))
  findings.push(...(await guarded('old_snapshot', () => ofHorizon(looked, server.role))))
  findings.push(...(await guarded('notify_queue', () => ofNotifyQueue(looked))))
  findings.push(...(await guarded('bloat', () => ofBloat(looked))))
  if (schema.some(({ level }) => level === 'error')) return findings
  findings.push(...(await guarded('role', () => ofRole(looked, server.role))))
  findings.push(...(await guarded('abandoned_durable', () => ofDurables(looked))))
  findings.push(...(await guarded('queues', () => ofQueues(looked))))
  return findings
}

async function guarded(code: string, look: () => Promise<Finding[]>): Promise<Finding[]> {
  try {
    return await look()
  } catch (error) {
    if (!isBusError(error, 'permission_denied')) throw error
    return [found(code, 'warning', 'not looked at: the role may not', error.message)]
  }
}

function found(code: string, level: FindingLevel, message: string, advice?: string): Finding {
  return advice === undefined ? { code, level, message } : { code, level, message, advice }
}

function* ofServer(server: ServerRow): Generator<Finding> {
  if (server.standby) {
    yield found('server', 'error', `PostgreSQL ${server.version} is a standby, which cannot write`, 'connect to the primary')
  } else if (server.version_num < 140_000) {
    yield found('server', 'error', `PostgreSQL ${server.version} is older than 14`, 'upgrade the server')
  } else yield found('server', 'ok', `PostgreSQL ${server.version}`)
  if (server.fsync === 'off') {
    yield found('durability', 'warning', 'fsync is off: a crash of the machine can lose or spoil what was committed', 'set fsync = on')
  }
  if (server.isolation !== 'read committed' || server.readonly === 'on' || server.synchronous_commit === 'off') {
    const defaults = [
      ...(server.isolation === 'read committed' ? [] : [`default_transaction_isolation = ${server.isolation}`]),
      ...(server.readonly === 'on' ? ['default_transaction_read_only = on'] : []),
      ...(server.synchronous_commit === 'off' ? ['synchronous_commit = off'] : []),
    ]
    yield found(
      'defaults',
      'notice',
      `the role's defaults are ${defaults.join(', ')}: each call takes a transaction that says otherwise, and is slower`,
      'give the role of the bus the usual defaults',
    )
  }
  if (server.autovacuum === 'off')
    yield found('autovacuum', 'warning', 'autovacuum is off: the tables of the bus grow', 'set autovacuum = on')
  if (server.connections > server.places * FEW_PLACES) {
    yield found(
      'connections',
      'warning',
      `${server.connections} of ${server.places} connections are taken`,
      'make pools smaller, put a pooler in between, or raise max_connections; a bus takes its pool, one connection to listen on and one for responders',
    )
  }
}

async function ofSchema({ db, schema, readSchema }: Looked, role: string): Promise<Finding[]> {
  const { applied, missing, unknown } = await readSchema()
  if (applied.length === 0) {
    return [found('schema', 'error', `there is no bus in schema "${schema}"`, 'run klieo-bus migrate, or name another one with --schema')]
  }
  if (missing.length > 0) {
    return [
      found(
        'schema',
        'error',
        `schema "${schema}" lacks ${missing.join(', ')}`,
        `run klieo-bus migrate as the owner of the schema, not necessarily as ${role}`,
      ),
    ]
  }
  const [row] = await db.query<{ restored: boolean }>(RESTORED, [], 'diagnose')
  if (row?.restored) {
    return [
      found(
        'restored',
        'error',
        `schema "${schema}" was restored from a dump of another cluster, and its log is not repaired`,
        'let a bus connect, or run select klieo.rebase(), before anything is published',
      ),
    ]
  }
  return unknown.length > 0
    ? [
        found(
          'schema',
          'notice',
          `schema "${schema}" is newer than this version (${unknown.join(', ')}), which can work with it`,
          'upgrade the package',
        ),
      ]
    : [found('schema', 'ok', `schema "${schema}" is up to date`)]
}

async function ofRole({ db, schema }: Looked, role: string): Promise<Finding[]> {
  const [row] = await db.query<Record<'producer' | 'worker' | 'reader' | 'admin', boolean>>(KINDS, [], 'diagnose')
  const kinds = (['producer', 'worker', 'reader', 'admin'] as const).filter((kind) => row?.[kind])
  if (kinds.length > 0) return [found('role', 'ok', `role "${role}" may do what a ${kinds.join(', ')} may`)]
  return [
    found(
      'role',
      'error',
      `role "${role}" may do nothing in schema "${schema}"`,
      `the owner of the schema runs ${grantStatement(schema, 'worker', role)}, or another kind`,
    ),
  ]
}

async function ofListening({ listens }: Looked): Promise<Finding[]> {
  const heard = await listens()
  if (heard) return [found('listen', 'ok', 'LISTEN works: consumers are woken')]
  return [
    found(
      'listen',
      'warning',
      heard === undefined
        ? 'no connection for LISTEN could be had: consumers poll'
        : 'LISTEN hears nothing, as behind a pooler in transaction mode: consumers poll',
      'give listenConnectionString (--listen-url), a connection that goes to the server directly',
    ),
  ]
}

async function ofHorizon({ db, thresholds }: Looked, role: string): Promise<Finding[]> {
  const rows = await db.query<{ kind: string; name: string; detail: string; seconds: number }>(
    HORIZON,
    [thresholds.oldSnapshotMs],
    'diagnose',
  )
  const slots = await db.query<{ name: string; behind: number; active: boolean }>(SLOTS, [], 'diagnose')
  const findings = rows.map(({ kind, name, detail, seconds }) =>
    found(
      'old_snapshot',
      'warning',
      `${kind} ${name}${detail ? ` (${detail})` : ''} has been open for ${duration(seconds)}: nothing that died since is vacuumed away`,
      kind === 'session'
        ? `end it, with select pg_terminate_backend(${name}) if need be, and set idle_in_transaction_session_timeout`
        : 'commit or roll it back: commit prepared, rollback prepared',
    ),
  )
  findings.push(
    ...slots.map(({ name, behind, active }) =>
      found(
        'old_snapshot',
        'warning',
        `replication slot "${name}"${active ? '' : ', which nobody uses,'} holds the rows of ${behind} transactions`,
        active ? 'look why its consumer is behind' : 'drop it: select pg_drop_replication_slot(…)',
      ),
    ),
  )
  return findings.length > 0 ? findings : [found('old_snapshot', 'ok', `no transaction that role "${role}" sees has been open for long`)]
}

async function ofBloat({ db, schema, thresholds }: Looked): Promise<Finding[]> {
  const rows = await db.query<{ table: string; dead: number; live: number; size: string; vacuumed: string }>(
    BLOAT,
    [schema, thresholds.deadRows],
    'diagnose',
  )
  if (rows.length === 0) return [found('bloat', 'ok', 'no table holds more dead rows than live ones')]
  return rows.map(({ table, dead, live, size, vacuumed }) =>
    found(
      'bloat',
      'warning',
      `table ${table} holds ${dead} dead rows beside ${live} live ones, in ${size}; last vacuumed: ${vacuumed}`,
      'look for an old snapshot first, which no vacuum can pass; then vacuum the table, and see that autovacuum keeps up',
    ),
  )
}

async function ofNotifyQueue({ db }: Looked): Promise<Finding[]> {
  const [row] = await db.query<{ usage: number }>(NOTIFY_QUEUE, [], 'diagnose')
  const usage = row?.usage ?? 0
  const percent = `${Math.round(usage * 100)} %`
  if (usage < NOTIFY_QUEUE_FILLING) return [found('notify_queue', 'ok', `the notification queue is ${percent} full`)]
  const [idle] = await db.query<{ pid: string; seconds: number }>(IDLE_IN_TRANSACTION, [], 'diagnose')
  return [
    found(
      'notify_queue',
      'warning',
      `the notification queue is ${percent} full: when it is full nobody is woken, and whatever notifies in its transaction fails`,
      idle
        ? `a session that listens is idle in a transaction; the oldest idle one is ${idle.pid}, for ${duration(idle.seconds)}: end it`
        : 'find the session that listens and does not read',
    ),
  ]
}

async function ofDurables({ db, thresholds }: Looked): Promise<Finding[]> {
  const rows = await db.query<{ durable: string; filter: string; waiting: number; seconds: number }>(
    ABANDONED,
    [thresholds.abandonedMs],
    'diagnose',
  )
  if (rows.length === 0) return [found('abandoned_durable', 'ok', 'every durable is read')]
  return rows.map(({ durable, filter, waiting, seconds }) =>
    found(
      'abandoned_durable',
      'warning',
      `nobody has read durable "${durable}" (${filter}) for ${duration(seconds)}; ${waiting} messages wait for it, and no message is removed before it is past it`,
      `start its consumers, or give it up: klieo-bus consumers rm ${durable}`,
    ),
  )
}

interface QueueRow extends Row {
  readonly queue: string
  readonly dead: number
  readonly ready: number
  readonly running: number
  readonly paused: boolean
  readonly waiting_seconds: number | null
}

async function ofQueues({ db, thresholds }: Looked): Promise<Finding[]> {
  const rows = await db.query<QueueRow>(QUEUE_HEALTH, [], 'diagnose')
  const findings: Finding[] = []
  for (const { queue, dead, ready, running, paused, waiting_seconds: waiting } of rows) {
    if (dead > 0) {
      findings.push(
        found(
          'dead_jobs',
          'warning',
          `queue "${queue}" holds ${dead} dead ${dead === 1 ? 'job' : 'jobs'}`,
          `klieo-bus jobs ls ${queue} --state dead shows why; klieo-bus dead retry ${queue} puts them back`,
        ),
      )
    }
    if (paused) {
      findings.push(
        found('paused_queue', 'notice', `queue "${queue}" is paused; ${ready} jobs are ready`, `klieo-bus queues resume ${queue}`),
      )
    } else if (waiting !== null && waiting * 1_000 > thresholds.waitingMs) {
      findings.push(
        found(
          'waiting_queue',
          'warning',
          `a job of queue "${queue}" has been ready for ${duration(waiting)}; ${ready} are ready and ${running} running`,
          running === 0 ? 'nobody works on it: start a worker' : 'start more workers, or give them a larger concurrency',
        ),
      )
    }
  }
  return findings.length > 0
    ? findings
    : [found('queues', 'ok', `${rows.length} ${rows.length === 1 ? 'queue' : 'queues'}, without dead jobs or jobs that wait for long`)]
}

function duration(seconds: number): string {
  if (seconds < 120) return `${seconds} s`
  if (seconds < 2 * 3_600) return `${Math.round(seconds / 60)} min`
  return seconds < 2 * 86_400 ? `${Math.round(seconds / 3_600)} h` : `${Math.round(seconds / 86_400)} days`
}
