/**
 * Clusters of an installed Postgres, for tests that need its tools: a pg_dump dumps servers of its own version and older ones,
 * and the embedded server comes without one. The cluster and the server are made as the embedded ones are, and end as they do.
 */

import { execFile } from 'node:child_process'
import { access, constants, readdir } from 'node:fs/promises'
import { createServer } from 'node:net'
import { delimiter, join } from 'node:path'
import { promisify } from 'node:util'
import { chooseAccount } from '../../../src/testing/embedded-account.ts'
import { prepareCluster, writeSettings } from '../../../src/testing/embedded-cluster.ts'
import { Supervision } from '../../../src/testing/embedded-supervision.ts'
import { session } from '../../support/sessions.ts'
import { eventually } from '../../support/wait.ts'

const TOOLS = ['initdb', 'postgres', 'pg_dump', 'pg_restore']

/** The newest directory that holds a server and the tools: /usr/lib/postgresql/N/bin, then those on PATH. */
export async function findInstalled(): Promise<string | undefined> {
  const root = '/usr/lib/postgresql'
  const versions = await readdir(root).catch(() => [])
  const numbered = versions.sort((a, b) => Number(b) - Number(a)).map((version) => join(root, version, 'bin'))
  for (const directory of [...numbered, ...(process.env.PATH ?? '').split(delimiter)]) {
    const found = await Promise.all(TOOLS.map((tool) => access(join(directory, tool), constants.X_OK).then(() => true))).catch(() => [])
    if (found.length > 0) return directory
  }
  return undefined
}

export interface InstalledServer extends AsyncDisposable {
  readonly connectionString: string
  readonly port: number
  /** The postmaster's; another one after {@link moveTo}. */
  readonly pid: number
  /** Ends the sessions in order and starts again, with the same data, on that port. */
  moveTo(port: number): Promise<void>
  stop(): Promise<void>
}

/**
 * @param directory what {@link findInstalled} answered
 * @param settings as in postgresql.conf, on top of those of a cluster that is thrown away
 */
export async function startInstalled(directory: string, settings: Readonly<Record<string, string>> = {}): Promise<InstalledServer> {
  const account = await chooseAccount(undefined)
  const binaries = { initdb: join(directory, 'initdb'), postgres: join(directory, 'postgres') }
  const supervision = new Supervision()
  try {
    const cluster = await prepareCluster({ dataDir: undefined, keep: false, account, binaries, supervision })
    let port = await freePort()
    let pid = 0
    const url = () => `postgres://postgres:${cluster.password}@127.0.0.1:${port}/postgres`
    const start = async () => {
      await writeSettings(cluster, account, port, settings)
      const as = { uid: account.uid, gid: account.gid }
      pid = await supervision.startServer({ file: binaries.postgres, dataDir: cluster.dataDir, as })
      await eventually(() => answers(url()), { timeoutMs: 30_000, what: 'the installed server' })
    }
    await start()
    let stopped: Promise<void> | undefined
    const stop = () => (stopped ??= supervision.end('SIGQUIT'))
    return {
      get connectionString() {
        return url()
      },
      get port() {
        return port
      },
      get pid() {
        return pid
      },
      async moveTo(other) {
        await supervision.request({ do: 'stop', signal: 'SIGINT' })
        port = other
        await start()
      },
      stop,
      [Symbol.asyncDispose]: stop,
    }
  } catch (error) {
    await supervision.end('SIGQUIT').catch(() => {})
    throw error
  }
}

/** A server that refuses the password is up: a test may have changed it. */
async function answers(url: string): Promise<void> {
  try {
    await (await session(url))[Symbol.asyncDispose]()
  } catch (error) {
    if ((error as { code?: string }).code !== '28P01') throw error
  }
}

/** Runs one of the tools to its end. @throws with what it said */
export async function runTool(directory: string, tool: 'pg_dump' | 'pg_restore', args: readonly string[]): Promise<void> {
  await promisify(execFile)(join(directory, tool), [...args])
}

export async function freePort(): Promise<number> {
  const server = createServer()
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const address = server.address()
  await new Promise((resolve) => server.close(resolve))
  return typeof address === 'object' && address ? address.port : 0
}
