/**
 * The schema's versions. The migrations are the files of sql/migrations, applied by Kysely's migrator; the same list
 * serves `PostgresBus.connect`, `klieo-bus migrate` and kysely-ctl.
 *
 * Many processes may start at once: who finds the schema current takes no lock, the others queue up on one advisory lock
 * that is taken first, in the transaction that migrates. Old code runs against a newer schema as long as the schema says
 * that it is compatible with it (meta.compatible_with).
 */

import { readdirSync, readFileSync } from 'node:fs'
import {
  type DatabaseIntrospector,
  Kysely,
  PostgresAdapter,
  PostgresDialect,
  type PostgresDialectConfig,
  PostgresIntrospector,
  sql,
  type TableMetadata,
} from 'kysely'
import { MIGRATION_LOCK_ID, type Migration, type MigrationProvider, Migrator } from 'kysely/migration'
import type pg from 'pg'
import { BusError } from '../core/index.ts'
import { reconnectDelayMs } from '../runtime/backoff.ts'
import { isTransient, LACKS_A_RIGHT, sqlState, toBusError, toPermissionError } from './errors.ts'
import { checkSchema, DEFAULT_SCHEMA, inSchema, quoteIdentifier } from './schema-name.ts'
import { takeClient } from './sockets.ts'

const FOLDER = new URL('../../sql/migrations/', import.meta.url)
const MIGRATION_TABLE = 'migrations'
const LOCK_TABLE = 'migrations_lock'
/** Any number will do, as long as nobody else uses it. */
const LOCK_ID = 5_203_947_117_801_442n
const MAX_TRIES = 6
/** So long the server may say nothing. */
const PATIENCE = { query_timeout: 30_000 }
/**
 * Two who created the same thing at once (23505 on a catalog index, 42P06, 42P07, 42710): the other one won. And a lock that
 * was not granted in time (55P03).
 */
const PASSING = new Set(['23505', '42P06', '42P07', '42710', '42723', '55P03'])
/** A thing of that name is there, and it stays there. */
const TAKEN = new Set(['42P07', '42710', '42723'])

/** The migrations in order, without their endings. */
export function migrationNames(): string[] {
  return readdirSync(FOLDER)
    .filter((file) => file.endsWith('.sql'))
    .map((file) => file.slice(0, -'.sql'.length))
    .sort()
}

function migrationText(name: string, schema: string): string {
  return inSchema(readFileSync(new URL(`${name}.sql`, FOLDER), 'utf8'), schema)
}

/** The migrations for Kysely's migrator, written for one schema. */
export class SqlMigrationProvider implements MigrationProvider {
  readonly #schema: string

  constructor(schema: string = DEFAULT_SCHEMA) {
    checkSchema(schema)
    this.#schema = schema
  }

  async getMigrations(): Promise<Record<string, Migration>> {
    const migrations = migrationNames().map((name): [string, Migration] => [
      name,
      {
        up: async (db) => {
          // What the text does not qualify is Postgres's own, whatever schemas the session looks into first.
          await sql`set local search_path = pg_catalog, pg_temp`.execute(db)
          await sql.raw(migrationText(name, this.#schema)).execute(db)
        },
      },
    ])
    return Object.fromEntries(migrations)
  }
}

/** Kysely's migrator over these migrations; kysely.config.ts hands it to kysely-ctl. */
// biome-ignore lint/suspicious/noExplicitAny: whatever the database holds besides
export function createMigrator(db: Kysely<any>, schema: string = DEFAULT_SCHEMA): Migrator {
  return new Migrator({
    db,
    provider: new SqlMigrationProvider(schema),
    migrationTableSchema: schema,
    migrationTableName: MIGRATION_TABLE,
    migrationLockTableName: LOCK_TABLE,
  })
}

/** The lock is our own, taken before the migrator looks at anything; Kysely's would be a session's, which poolers break. */
class LockedAdapter extends PostgresAdapter {
  override async acquireMigrationLock(): Promise<void> {}
  override async releaseMigrationLock(): Promise<void> {}
}

class LockedDialect extends PostgresDialect {
  readonly #schema: string

  constructor(config: PostgresDialectConfig, schema: string) {
    super(config)
    this.#schema = schema
  }

  override createAdapter(): PostgresAdapter {
    return new LockedAdapter()
  }

  // biome-ignore lint/suspicious/noExplicitAny: as in Kysely's own signature
  override createIntrospector(db: Kysely<any>): DatabaseIntrospector {
    return new SchemaIntrospector(db, this.#schema)
  }
}

/** The tables of one schema. Kysely's looks at every table of the database, and fails when somebody drops one just then. */
class SchemaIntrospector extends PostgresIntrospector {
  // biome-ignore lint/suspicious/noExplicitAny: as in Kysely's own signature
  readonly #db: Kysely<any>
  readonly #schema: string

  // biome-ignore lint/suspicious/noExplicitAny: as in Kysely's own signature
  constructor(db: Kysely<any>, schema: string) {
    super(db)
    this.#db = db
    this.#schema = schema
  }

  override async getTables(): Promise<TableMetadata[]> {
    const { rows } = await sql<{ name: string }>`select tablename as name from pg_tables where schemaname = ${this.#schema}`.execute(
      this.#db,
    )
    return rows.map(({ name }) => ({ name, schema: this.#schema, isView: false, isForeign: false, columns: [] }))
  }
}

export interface SchemaState {
  /** Migrations that are applied, in order. */
  readonly applied: readonly string[]
  /** Migrations of this package that are not. */
  readonly missing: readonly string[]
  /** Migrations this package does not know: the schema is newer. */
  readonly unknown: readonly string[]
  /** The oldest package schema version that may still use it. */
  readonly compatibleWith: number
}

/** What is there; reads only. */
export async function readSchemaState(pool: pg.Pool, schema: string): Promise<SchemaState> {
  const names = migrationNames()
  try {
    const text = inSchema(
      `select m.name, (select value from klieo.meta where key = 'compatible_with') as compatible_with
       from klieo.${MIGRATION_TABLE} m order by m.name`,
      schema,
    )
    const { rows } = await pool.query<{ name: string; compatible_with: string | null }>({ text, ...PATIENCE } as pg.QueryConfig)
    const applied = rows.map(({ name }) => name)
    return {
      applied,
      missing: names.filter((name) => !applied.includes(name)),
      unknown: applied.filter((name) => !names.includes(name)),
      compatibleWith: Number(rows[0]?.compatible_with ?? 0),
    }
  } catch (error) {
    const state = sqlState(error)
    if (state === '42P01' || state === '3F000') return { applied: [], missing: names, unknown: [], compatibleWith: 0 }
    if (state !== LACKS_A_RIGHT) throw toBusError(error, 'read the schema version')
    const whose = { text: 'select current_user::text as role', ...PATIENCE } as pg.QueryConfig
    const { rows } = await pool.query<{ role: string }>(whose).catch(() => ({ rows: [] }))
    throw toPermissionError(error, { doing: 'connect', schema, role: rows[0]?.role })
  }
}

/** @throws schema_outdated unless this package can work with the schema */
export function checkSchemaState(state: SchemaState, schema: string): void {
  if (state.unknown.length > 0 && state.compatibleWith > migrationNames().length) {
    throw new BusError(
      'schema_outdated',
      `schema "${schema}" was migrated by a newer klieo-bus (${state.unknown.join(', ')}) that this version cannot work with; upgrade the package`,
    )
  }
  if (state.missing.length > 0) {
    throw new BusError(
      'schema_outdated',
      `schema "${schema}" lacks ${state.missing.join(', ')}; run \`klieo-bus migrate\` or connect with migrate: true`,
    )
  }
}

/**
 * Brings the schema up to date.
 * @returns the migrations that were applied now
 * @throws schema_outdated when the schema is newer than this package can work with; permission_denied; connection
 */
export async function migrate(pool: pg.Pool, schema: string): Promise<string[]> {
  for (let tries = 1; ; tries++) {
    const state = await readSchemaState(pool, schema)
    // A newer schema has all of ours and more: the migrator would call that corrupt.
    if (state.missing.length === 0 || state.unknown.length > 0) {
      checkSchemaState(state, schema)
      return []
    }
    try {
      return await migrateOnce(pool, schema)
    } catch (error) {
      const state = sqlState(error) ?? ''
      const passing = isTransient(error) || PASSING.has(state)
      if (tries === MAX_TRIES && TAKEN.has(state)) throw taken(error, schema)
      if (state === LACKS_A_RIGHT) throw toOwnerError(error, schema)
      if (!passing || tries === MAX_TRIES) throw toBusError(error, `migrate schema "${schema}"`)
      await new Promise((resolve) => setTimeout(resolve, reconnectDelayMs(tries)))
    }
  }
}

/**
 * The missing migrations as one transaction for psql: what {@link migrate} would do, the migrator's own tables and rows included.
 * @returns empty when none is missing
 */
export function migrationScript(missing: readonly string[], schema: string): string {
  if (missing.length === 0) return ''
  const table = (name: string) => `${quoteIdentifier(schema)}.${quoteIdentifier(name)}`
  const steps = missing.map(
    (name) => `-- ${name}
set local search_path = pg_catalog, pg_temp;

${migrationText(name, schema).trim()}

insert into ${table(MIGRATION_TABLE)} (name, timestamp)
values ('${name}', to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'));
`,
  )
  return `begin;
set local lock_timeout = '60s';
do $$ begin perform pg_advisory_xact_lock(${LOCK_ID}); end $$;
set local lock_timeout = '10s';

create schema if not exists ${quoteIdentifier(schema)};
create table if not exists ${table(MIGRATION_TABLE)} (name varchar(255) not null primary key, timestamp varchar(255) not null);
create table if not exists ${table(LOCK_TABLE)} (id varchar(255) not null primary key, is_locked integer default 0 not null);
insert into ${table(LOCK_TABLE)} (id, is_locked) values ('${MIGRATION_LOCK_ID}', 0) on conflict do nothing;

${steps.join('\n')}
commit;
`
}

function taken(error: unknown, schema: string): BusError {
  const text = error instanceof Error ? error.message : String(error)
  return new BusError(
    'schema_outdated',
    `schema "${schema}" holds something that its list of migrations does not account for (${text}); use another schema if it is not the bus's, else restore it from a dump`,
    { cause: error },
  )
}

/** What no kind of role may: the tables and functions are their owner's. */
function toOwnerError(error: unknown, schema: string): BusError {
  const { message } = toBusError(error, `migrate schema "${schema}"`)
  return new BusError(
    'permission_denied',
    `${message}; migrate as the owner of the schema, or as a role that may create one in this database, and connect with migrate: false`,
    { cause: error },
  )
}

async function migrateOnce(pool: pg.Pool, schema: string): Promise<string[]> {
  const db = new Kysely<unknown>({ dialect: new LockedDialect({ pool: withoutEvents(pool) }, schema) })
  return db
    .transaction()
    .setIsolationLevel('read committed')
    .setAccessMode('read write')
    .execute(async (tx) => {
      await sql`set local lock_timeout = '60s'`.execute(tx)
      await sql`select pg_advisory_xact_lock(${sql.lit(LOCK_ID.toString())}::bigint)`.execute(tx)
      await sql`set local lock_timeout = '10s'`.execute(tx)
      const { error, results } = await createMigrator(tx, schema).migrateToLatest()
      if (error !== undefined) throw error
      return (results ?? []).filter(({ status }) => status === 'Success').map(({ migrationName }) => migrationName)
    })
}

/** A connection that breaks while the migrator has it must not end the process: its statement fails as well. */
function withoutEvents(pool: pg.Pool): Pick<pg.Pool, 'end' | 'options'> & { connect(): Promise<pg.PoolClient> } {
  const ignore = () => {}
  return {
    options: pool.options,
    end: () => pool.end(),
    async connect() {
      const client = await takeClient(pool, ignore)
      const release = client.release.bind(client)
      client.release = (error) => {
        client.off('error', ignore)
        release(error)
      }
      return client
    },
  }
}
