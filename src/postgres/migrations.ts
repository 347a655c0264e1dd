/**
 * The schema's versions. The migrations are the files of sql/migrations, applied by Kysely's migrator; the same list
 * serves `PostgresBus.connect`, `klieo-bus migrate` and kysely-ctl.
 *
 * Many processes may start at once: who finds the schema current takes no lock, the others queue up on one advisory lock
 * that is taken first, in the transaction that migrates. Old code runs against a newer schema as long as the schema says
 * that it is compatible with it (meta.compatible_with).
 */

import { readdirSync, readFileSync } from 'node:fs'
import type pg from 'pg'
import { BusError } from '../core/index.ts'
import { reconnectDelayMs } from '../runtime/backoff.ts'
import { isTransient, LACKS_A_RIGHT, sqlState, toBusError, toPermissionError } from './errors.ts'
import { inSchema } from './schema-name.ts'

const FOLDER = new URL('../../sql/migrations/', import.meta.url)
export const MIGRATION_TABLE = 'migrations'
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

export function migrationText(name: string, schema: string): string {
  return inSchema(readFileSync(new URL(`${name}.sql`, FOLDER), 'utf8'), schema)
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
      // Kysely is most of what there is to load, and who finds the schema current does not need it.
      const { migrateOnce } = await import('./migrator.ts')
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
