/** For kysely-ctl (`npx kysely migrate list`, `npx kysely migrate up`): the same migrations that PostgresBus.connect applies. */

import { PostgresDialect } from 'kysely'
import { defineConfig } from 'kysely-ctl'
import pg from 'pg'
import { createMigrator } from './src/postgres/migrator.ts'

const connectionString = process.env.DATABASE_URL

export default defineConfig({
  dialect: new PostgresDialect({ pool: new pg.Pool(connectionString ? { connectionString } : {}) }),
  migrations: { migrator: (db) => createMigrator(db, process.env.KLIEO_SCHEMA ?? 'klieo') },
})
