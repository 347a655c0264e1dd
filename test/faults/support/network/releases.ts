/** Schemas of other releases: half-migrated ones, the next one's, and one whose columns stand in another order. */

import { cp, mkdtemp, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { Kysely, PostgresDialect } from 'kysely'
import pg from 'pg'
import { migrationNames } from '../../../../src/postgres/migrations.ts'
import { createMigrator } from '../../../../src/postgres/migrator.ts'
import { inSchema } from '../../../../src/postgres/schema-name.ts'

const ROOT = fileURLToPath(new URL('../../../../', import.meta.url))
const NEXT = new URL('./next-release.sql', import.meta.url)
export const NEXT_NAME = '0999_next'

/** Applies the first `count` migrations. */
export async function migratePartly(connectionString: string, schema: string, count: number): Promise<void> {
  const name = migrationNames()[count - 1]
  if (name === undefined) return
  const db = new Kysely<unknown>({ dialect: new PostgresDialect({ pool: new pg.Pool({ connectionString, max: 1 }) }) })
  try {
    const { error } = await createMigrator(db, schema).migrateTo(name)
    if (error) throw error
  } finally {
    await db.destroy()
  }
}

export interface Release extends AsyncDisposable {
  /** What its processes import. */
  readonly index: string
}

/** The package as it is, with one more migration: what runs beside the present release during a rolling deploy. */
export async function nextRelease(): Promise<Release> {
  const directory = await mkdtemp(join(tmpdir(), 'klieo-next-release-'))
  for (const part of ['src', 'sql', 'package.json']) await cp(join(ROOT, part), join(directory, part), { recursive: true })
  await symlink(join(ROOT, 'node_modules'), join(directory, 'node_modules'))
  await writeFile(join(directory, 'sql/migrations', `${NEXT_NAME}.sql`), await readFile(NEXT))
  return {
    index: pathToFileURL(join(directory, 'src/index.ts')).href,
    [Symbol.asyncDispose]: () => rm(directory, { recursive: true, force: true }),
  }
}

/**
 * The schema of the next release, made by hand, with the columns of every table in the opposite order: as after tables that were
 * rebuilt, or restored from a dump that somebody edited.
 */
export async function reorderedNextSchema(client: pg.ClientBase, schema: string): Promise<void> {
  const names = migrationNames()
  for (const name of names) {
    const text = await readFile(join(ROOT, 'sql/migrations', `${name}.sql`), 'utf8')
    await client.query(inSchema(withColumnsReversed(text), schema))
  }
  await client.query(inSchema(await readFile(NEXT, 'utf8'), schema))
  await client.query(`create table ${schema}.migrations (name varchar(255) primary key, timestamp varchar(255) not null)`)
  await client.query(`insert into ${schema}.migrations select name, 'now' from unnest($1::text[]) as name`, [[...names, NEXT_NAME]])
}

/** In the migrations a table is written with a line for each column, and what is no column begins with a word that says so. */
function withColumnsReversed(sql: string): string {
  return sql.replaceAll(/^(create (?:unlogged )?table \S+ \(\n)([\s\S]*?)(\n\))/gm, (_, head: string, body: string, tail: string) => {
    const lines = body.split('\n').map((line) => line.replace(/,$/, ''))
    const isColumn = (line: string) => !/^\s*(--|primary key|constraint|check|unique)/.test(line)
    const kept = lines.filter((line) => !isColumn(line) && !/^\s*--/.test(line))
    return head + [...lines.filter(isColumn).reverse(), ...kept].join(',\n') + tail
  })
}
