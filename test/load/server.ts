/** The server of one scenario: fresh, its own, on disk as a cluster that is kept. */

import { readdirSync, readFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { startEmbeddedPostgres } from '../../src/testing/index.ts'
import { startInstalled } from '../postgres/support/installed-postgres.ts'
import { type Session, session } from '../support/sessions.ts'

export interface LoadServer extends AsyncDisposable {
  readonly url: string
  readonly version: string
  readonly pid: number
  restart(): Promise<void>
}

/** Latencies are those of commits that are on the disk, as a cluster that is kept has them. */
const DURABLE = { fsync: 'on', full_page_writes: 'on', synchronous_commit: 'on', max_wal_size: '4GB', shared_buffers: '256MB' }

/** @param binaries a directory with an installed server's programs; without it the embedded one */
export async function startServer(binaries: string | undefined, settings: Readonly<Record<string, string>> = {}): Promise<LoadServer> {
  const all = { ...DURABLE, max_connections: '300', ...settings }
  if (binaries === undefined) {
    const server = await startEmbeddedPostgres({ settings: all })
    return {
      url: server.connectionString,
      version: server.version,
      get pid() {
        return server.pid
      },
      restart: () => server.restart(),
      [Symbol.asyncDispose]: () => server.stop('immediate'),
    }
  }
  const server = await startInstalled(binaries, all)
  const url = server.connectionString
  await using client = await session(url)
  const { rows } = await client.query<{ server_version: string }>('show server_version')
  return {
    url,
    version: rows[0]?.server_version ?? '',
    get pid() {
      return server.pid
    },
    restart: () => server.moveTo(server.port),
    [Symbol.asyncDispose]: () => server.stop(),
  }
}

/** Memory that the server's processes do not share, in MiB: `shared_buffers` are not in it. Undefined where there is no /proc. */
export function privateMemoryMiB(pid: number): number | undefined {
  try {
    let kib = 0
    for (const name of readdirSync('/proc')) {
      if (!/^\d+$/.test(name)) continue
      try {
        const status = readFileSync(`/proc/${name}/status`, 'utf8')
        if (Number(/^PPid:\s+(\d+)/m.exec(status)?.[1]) === pid) kib += Number(/^RssAnon:\s+(\d+)/m.exec(status)?.[1] ?? 0)
      } catch {
        // It has just ended.
      }
    }
    return kib / 1024
  } catch {
    return undefined
  }
}

/** The most that {@link privateMemoryMiB} answered while `work` ran. */
export async function peakPrivateMemory<T>(pid: number, work: () => Promise<T>): Promise<{ result: T; peakMiB: number }> {
  let peakMiB = privateMemoryMiB(pid) ?? 0
  const stop = new AbortController()
  const watching = (async () => {
    while (!stop.signal.aborted) {
      peakMiB = Math.max(peakMiB, privateMemoryMiB(pid) ?? 0)
      await sleep(100)
    }
  })()
  try {
    return { result: await work(), peakMiB: Math.max(peakMiB, privateMemoryMiB(pid) ?? 0) }
  } finally {
    stop.abort()
    await watching
  }
}

/** Buffers that a statement touches, found or read; it is rolled back. */
export async function buffersOf(client: Session, statement: string): Promise<number> {
  await client.query('begin')
  try {
    const { rows } = await client.query(`explain (analyze, buffers, format json) ${statement}`)
    const plan = (rows[0] as { 'QUERY PLAN': { Plan: Record<string, number> }[] })['QUERY PLAN'][0]?.Plan
    return (plan?.['Shared Hit Blocks'] ?? 0) + (plan?.['Shared Read Blocks'] ?? 0)
  } finally {
    await client.query('rollback')
  }
}

/** Transactions of the database so far, without waiting for what backends have not told yet. */
export async function transactions(client: Session): Promise<number> {
  const { rows } = await client.query<{ n: string }>(
    'select xact_commit + xact_rollback as n from pg_stat_database where datname = current_database()',
  )
  return Number(rows[0]?.n)
}
