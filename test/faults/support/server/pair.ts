/** A primary and its streaming standby, of an installed Postgres: what the primary commits reaches the standby a moment later. */

import { execFile } from 'node:child_process'
import { access, chown, constants, mkdtemp } from 'node:fs/promises'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { chooseAccount, temporaryPlaces } from '../../../../src/testing/embedded-account.ts'
import { type Cluster, prepareCluster, writeSettings } from '../../../../src/testing/embedded-cluster.ts'
import { Supervision } from '../../../../src/testing/embedded-supervision.ts'
import { Relay } from '../../../postgres/support/relay.ts'
import { session } from '../../../support/sessions.ts'
import { eventually } from '../../../support/wait.ts'

export interface Pair extends AsyncDisposable {
  /** Of the primary, whichever that is. */
  readonly connectionString: string
  /** Resolves once the standby shows whatever is committed now. */
  caughtUp(): Promise<void>
  /** From now on the standby hears nothing of the primary. */
  part(): void
  /** The primary is killed, the standby promoted and reached where the primary was. */
  failOver(): Promise<void>
}

export async function hasBaseBackup(directory: string | undefined): Promise<boolean> {
  if (directory === undefined) return false
  return access(join(directory, 'pg_basebackup'), constants.X_OK).then(
    () => true,
    () => false,
  )
}

/** @param directory where the programs are */
export async function startPair(directory: string): Promise<Pair> {
  const account = await chooseAccount(undefined)
  const as = { uid: account.uid, gid: account.gid }
  const binaries = { initdb: join(directory, 'initdb'), postgres: join(directory, 'postgres') }
  const [port, standbyPort] = [await freePort(), await freePort()]
  const [primaries, standbys] = [new Supervision(), new Supervision()]
  let relay: Relay | undefined
  const end = async () => {
    await relay?.[Symbol.asyncDispose]()
    await Promise.all([primaries.end('SIGQUIT'), standbys.end('SIGQUIT')])
  }
  try {
    const primary = await prepareCluster({ dataDir: undefined, keep: false, account, binaries, supervision: primaries })
    const at = (port_: number) => `postgres://postgres:${primary.password}@127.0.0.1:${port_}/postgres`
    const start = async (supervision: Supervision, cluster: Cluster, port_: number) => {
      await writeSettings(cluster, account, port_, {})
      await supervision.startServer({ file: binaries.postgres, dataDir: cluster.dataDir, as })
      await eventually(() => query(at(port_), 'select 1'), { timeoutMs: 30_000, what: 'a server of the pair' })
    }
    await start(primaries, primary, port)
    relay = await Relay.start(at(port))
    const parted = relay

    const dataDir = await mkdtemp(join((await temporaryPlaces(account))[0]!, 'klieo-standby-'))
    if (account.uid !== undefined && account.gid !== undefined) await chown(dataDir, account.uid, account.gid)
    await standbys.request({ do: 'guard', remove: [dataDir] })
    const copy = ['-D', dataDir, '-d', relay.connectionString, '-R', '-X', 'stream', '-c', 'fast', '--no-sync']
    await promisify(execFile)(join(directory, 'pg_basebackup'), copy, { ...as, cwd: '/' })
    const standby: Cluster = { dataDir, password: primary.password, throwAway: true }
    await start(standbys, standby, standbyPort)

    return {
      connectionString: at(port),
      async caughtUp() {
        const [row] = await query<{ lsn: string }>(at(port), 'select pg_current_wal_insert_lsn() as lsn')
        await eventually(
          async () => {
            const [seen] = await query<{ there: boolean }>(at(standbyPort), 'select pg_last_wal_replay_lsn() >= $1::pg_lsn as there', [
              row?.lsn,
            ])
            return seen?.there
          },
          { timeoutMs: 30_000, what: 'the standby' },
        )
      },
      part() {
        parted.refuse(true)
        parted.cut()
      },
      async failOver() {
        await primaries.request({ do: 'crash' })
        await standbys.request({ do: 'stop', signal: 'SIGINT' })
        await start(standbys, standby, port)
        await query(at(port), 'select pg_promote()')
      },
      [Symbol.asyncDispose]: end,
    }
  } catch (error) {
    await end().catch(() => {})
    throw error
  }
}

async function query<R>(url: string, text: string, values: unknown[] = []): Promise<R[]> {
  await using client = await session(url)
  return (await client.query(text, values)).rows as R[]
}

async function freePort(): Promise<number> {
  const server = createServer()
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const address = server.address()
  await new Promise((resolve) => server.close(resolve))
  return typeof address === 'object' && address ? address.port : 0
}
