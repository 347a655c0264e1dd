/** Kysely's migrator over the files of sql/migrations, and what it does as a script. Loaded only where there is something to migrate. */

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
import { MIGRATION_TABLE, migrationNames, migrationText } from './migrations.ts'
import { checkSchema, DEFAULT_SCHEMA, quoteIdentifier } from './schema-name.ts'
import { takeClient } from './sockets.ts'

const LOCK_TABLE = 'migrations_lock'
/** Any number will do, as long as nobody else uses it. */
const LOCK_ID = 5_203_947_117_801_442n

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

/**
 * The missing migrations as one transaction for psql: what {@link migrateOnce} would do, the migrator's own tables and rows included.
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

/** Under a lock of the bus's own, in one transaction. @returns the migrations that were applied */
export async function migrateOnce(pool: pg.Pool, schema: string): Promise<string[]> {
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
