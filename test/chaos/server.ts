/** The server of a chaos run: the embedded one or an installed one, made, killed and restarted in the same way. */

import { appendFileSync } from 'node:fs'
import { join } from 'node:path'
import { chooseAccount } from '../../src/testing/embedded-account.ts'
import { prepareCluster, writeSettings } from '../../src/testing/embedded-cluster.ts'
import { Supervision } from '../../src/testing/embedded-supervision.ts'
import { startEmbeddedPostgres } from '../../src/testing/index.ts'
import { freePort } from '../postgres/support/installed-postgres.ts'
import { session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'

export interface ChaosServer {
  readonly connectionString: string
  readonly version: string
  /** kill -9 of the postmaster; all sessions end. */
  kill(): Promise<void>
  /** Ends the sessions in order if it runs, and starts it. */
  restart(): Promise<void>
  stop(): Promise<void>
}

const SETTINGS = {
  max_connections: '300',
  max_prepared_transactions: '100',
  synchronous_commit: 'on',
  log_line_prefix: '%m [%p] %a ',
  checkpoint_timeout: '30s',
}

/**
 * @param directory where its programs are; without it, the embedded server
 * @param logTo its log goes there
 */
export async function startChaosServer(directory: string | undefined, logTo: string): Promise<ChaosServer> {
  const onLog = (line: string) => appendFileSync(join(logTo, 'server.log'), `${line}\n`)
  if (directory === undefined) {
    const server = await startEmbeddedPostgres({ settings: SETTINGS, onLog })
    return {
      connectionString: server.connectionString,
      version: server.version,
      kill: () => server.kill(),
      restart: () => server.restart(),
      stop: () => server.stop('immediate'),
    }
  }
  return startInstalled(directory, onLog)
}

async function startInstalled(directory: string, onLog: (line: string) => void): Promise<ChaosServer> {
  const account = await chooseAccount(undefined)
  const binaries = { initdb: join(directory, 'initdb'), postgres: join(directory, 'postgres') }
  const supervision = new Supervision(onLog)
  try {
    const cluster = await prepareCluster({ dataDir: undefined, keep: false, account, binaries, supervision })
    const port = await freePort()
    const connectionString = `postgres://postgres:${cluster.password}@127.0.0.1:${port}/postgres`
    await writeSettings(cluster, account, port, SETTINGS)
    const start = async () => {
      await supervision.startServer({ file: binaries.postgres, dataDir: cluster.dataDir, as: { uid: account.uid, gid: account.gid } })
      return eventually(() => versionOf(connectionString), { timeoutMs: 60_000, what: 'the installed server' })
    }
    const version = await start()
    return {
      connectionString,
      version,
      kill: async () => void (await supervision.request({ do: 'crash' })),
      restart: async () => {
        await supervision.request({ do: 'stop', signal: 'SIGINT' })
        await start()
      },
      stop: () => supervision.end('SIGQUIT'),
    }
  } catch (error) {
    await supervision.end('SIGQUIT').catch(() => {})
    throw error
  }
}

async function versionOf(connectionString: string): Promise<string> {
  await using client = await session(connectionString, { applicationName: 'chaos runner' })
  const { rows } = await client.query<{ server_version: string }>('show server_version')
  return rows[0]!.server_version
}
