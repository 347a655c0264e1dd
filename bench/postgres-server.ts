/** The PostgreSQL of a run: one of our own with settings that suit a server, or the one that DATABASE_URL names. */

import { availableParallelism, totalmem } from 'node:os'
import pg from 'pg'
import { type EmbeddedPostgres, startEmbeddedPostgres } from '../dist/testing/index.js'

export interface PostgresServer extends AsyncDisposable {
  readonly url: string
  /** Undefined where it is not ours: its CPU is not measured then. */
  readonly pid: number | undefined
  readonly version: string
  readonly settings: string
  /** A fresh database; everything is on disk when it is there. */
  createDatabase(): Promise<{ readonly url: string; drop(): Promise<void> }>
}

/** Commits are durable: both are the defaults, said aloud because the whole comparison rests on them. */
const SETTINGS: Readonly<Record<string, string>> = {
  fsync: 'on',
  full_page_writes: 'on',
  synchronous_commit: 'on',
  shared_buffers: totalmem() >= 4 * 2 ** 30 ? '1GB' : '256MB',
  max_wal_size: '8GB',
  checkpoint_timeout: '30min',
  max_connections: '300',
}
const SHOWN = ['fsync', 'synchronous_commit', 'full_page_writes', 'shared_buffers', 'max_wal_size', 'checkpoint_timeout', 'max_connections']

export async function startPostgres(): Promise<PostgresServer> {
  const { DATABASE_URL } = process.env
  if (DATABASE_URL) return describe(DATABASE_URL, undefined, async () => {})
  const server: EmbeddedPostgres = await startEmbeddedPostgres({ settings: SETTINGS })
  return describe(server.connectionString, server.pid, () => server.stop())
}

async function describe(url: string, pid: number | undefined, stop: () => Promise<void>): Promise<PostgresServer> {
  const client = new pg.Client({ connectionString: url })
  client.on('error', () => {})
  await client.connect()
  const { rows } = await client.query<{ name: string; setting: string }>(
    'select name, current_setting(name) as setting from pg_settings where name = any($1)',
    [SHOWN],
  )
  const { rows: versions } = await client.query<{ server_version: string }>('show server_version')
  const values = new Map(rows.map(({ name, setting }) => [name, setting]))
  let made = 0
  return {
    url,
    pid,
    version: versions[0]!.server_version,
    settings: SHOWN.map((name) => `${name} ${values.get(name)}`).join(', '),
    async createDatabase() {
      const name = `klieo_bench_${process.pid}_${++made}`
      await client.query(`create database ${name}`)
      await client.query('checkpoint')
      const own = new URL(url)
      own.pathname = `/${name}`
      return { url: own.href, drop: async () => void (await client.query(`drop database if exists ${name} with (force)`)) }
    },
    async [Symbol.asyncDispose]() {
      await client.end().catch(() => {})
      await stop()
    },
  }
}

export function machine(): string {
  return `${availableParallelism()} cores, ${Math.round(totalmem() / 2 ** 30)} GiB of memory, ${process.platform} ${process.arch}`
}
