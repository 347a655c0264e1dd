/** The data directory of an embedded server: where it lies, how it is made, what its settings are. */

import { randomBytes } from 'node:crypto'
import { access, appendFile, chown, mkdir, mkdtemp, readdir, readFile, realpath, rename, rm, writeFile } from 'node:fs/promises'
import { basename, dirname, join, resolve } from 'node:path'
import { BusError, invalid } from '../core/index.ts'
import { type Account, canEnter, temporaryPlaces } from './embedded-account.ts'
import type { Binaries } from './embedded-binaries.ts'
import type { Supervision } from './embedded-supervision.ts'

export interface Cluster {
  readonly dataDir: string
  /** Of the superuser `postgres`. */
  readonly password: string
  /** Removed at the end, so not worth an fsync. */
  readonly throwAway: boolean
}

export interface ClusterRequest {
  /** A fresh temporary one if absent. */
  readonly dataDir: string | undefined
  readonly keep: boolean
  readonly account: Account
  readonly binaries: Binaries
  readonly supervision: Supervision
}

const PASSWORD_FILE = 'klieo-password'
const SETTINGS_FILE = 'klieo.conf'

/**
 * Finds the cluster or makes it. Whatever is removed at the end was made here, and is guarded from the moment it exists.
 * @throws conflict when a server runs there, permission_denied, invalid_argument, unavailable
 */
export async function prepareCluster(request: ClusterRequest): Promise<Cluster> {
  const { account, keep } = request
  if (request.dataDir === undefined) {
    const [place] = await temporaryPlaces(account)
    const dataDir = await mkdtemp(join(place!, 'klieo-data-'))
    return { dataDir, password: await makeCluster(request, dataDir, keep), throwAway: !keep }
  }
  const dataDir = resolve(request.dataDir)
  const existing = await readdir(dataDir).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return []
    throw new BusError('permission_denied', `startEmbeddedPostgres: cannot read the dataDir ${dataDir}: ${error.message}`, { cause: error })
  })
  if (existing.length > 0) return openCluster(dataDir, request)
  return { dataDir: await makeClusterAt(dataDir, request), password: await readPassword(dataDir), throwAway: !keep }
}

async function openCluster(path: string, { account, keep }: ClusterRequest): Promise<Cluster> {
  const dataDir = await realpath(path)
  if (!keep) {
    throw invalid('keep', keep, `must not be false for ${dataDir}, which is not empty: only what this call makes is removed again`)
  }
  const isCluster = await access(join(dataDir, 'PG_VERSION')).then(
    () => true,
    () => false,
  )
  if (!isCluster) throw invalid('dataDir', path, `must be empty or hold a Postgres cluster; ${dataDir} holds something else`)
  await refuseRunning(dataDir)
  if (!(await canEnter(account, dataDir))) throw closedDirectory(dataDir, account)
  return { dataDir, password: await readPassword(dataDir), throwAway: false }
}

/**
 * Made beside its place and renamed into it: a call that dies half way leaves no half cluster, and of two at the same time one
 * makes it and the other finds it.
 */
async function makeClusterAt(dataDir: string, request: ClusterRequest): Promise<string> {
  const { supervision, keep } = request
  let beside: string
  try {
    await mkdir(dirname(dataDir), { recursive: true })
    beside = await mkdtemp(join(dirname(dataDir), `.${basename(dataDir)}-`))
  } catch (error) {
    throw new BusError(
      'permission_denied',
      `startEmbeddedPostgres: cannot make the dataDir ${dataDir}: ${(error as Error).message}; choose one in a directory that this user can write`,
      { cause: error },
    )
  }
  await makeCluster(request, beside, false)
  try {
    await rename(beside, dataDir)
  } catch (error) {
    await rm(beside, { recursive: true, force: true })
    await refuseRunning(dataDir)
    const { code, message } = error as NodeJS.ErrnoException
    const why =
      code === 'ENOTEMPTY' || code === 'EEXIST'
        ? 'somebody else made it meanwhile; try again'
        : `${message}; name a new directory inside it`
    throw new BusError('conflict', `startEmbeddedPostgres: cannot make the dataDir ${dataDir}: ${why}`, { cause: error })
  }
  await supervision.request({ do: 'guard', remove: keep ? [] : [dataDir] })
  return realpath(dataDir)
}

/** Fills an empty directory of this process's own. */
async function makeCluster({ account, binaries, supervision }: ClusterRequest, dataDir: string, keep: boolean): Promise<string> {
  const password = randomBytes(18).toString('base64url')
  const passwordDir = await mkdtemp(join((await temporaryPlaces(account))[0]!, 'klieo-init-'))
  try {
    await supervision.request({ do: 'guard', remove: [passwordDir, ...(keep ? [] : [dataDir])] })
    await own(account, dataDir)
    if (!(await canEnter(account, dataDir))) throw closedDirectory(dataDir, account)
    await own(account, passwordDir)
    const passwordFile = join(passwordDir, 'password')
    await writeOwn(account, passwordFile, `${password}\n`)
    const { code, output } = await supervision.request({
      do: 'run',
      file: binaries.initdb,
      args: [
        ...['-D', dataDir, `--pwfile=${passwordFile}`, '--username=postgres', '--auth=scram-sha-256'],
        ...['--encoding=UTF8', '--locale=C', '--no-instructions'],
        // A cluster is synced when it is to last.
        ...(keep ? [] : ['--no-sync']),
      ],
      as: { uid: account.uid, gid: account.gid },
    })
    if (code !== 0) throw new BusError('unavailable', `startEmbeddedPostgres: initdb failed with code ${code}:\n${output}`)
    await writeOwn(account, join(dataDir, PASSWORD_FILE), `${password}\n`)
    await writeOwn(account, join(dataDir, SETTINGS_FILE), '')
    await appendFile(join(dataDir, 'postgresql.conf'), `\n# Written anew at every start:\ninclude '${SETTINGS_FILE}'\n`)
  } finally {
    await rm(passwordDir, { recursive: true, force: true })
  }
  await supervision.request({ do: 'guard', remove: keep ? [] : [dataDir] })
  return password
}

/**
 * A file and not arguments of the command: those would outrank ALTER SYSTEM.
 * Only TCP on the loopback interface: a socket in the data directory would have too long a name on some systems.
 */
export async function writeSettings(
  { dataDir, throwAway }: Cluster,
  account: Account,
  port: number,
  settings: Readonly<Record<string, string>>,
): Promise<void> {
  const all: Record<string, string> = {
    listen_addresses: '127.0.0.1',
    unix_socket_directories: '',
    // Losing power loses the cluster anyway; commits stay in order and a crash of the server alone loses nothing.
    ...(throwAway ? { fsync: 'off', full_page_writes: 'off' } : {}),
    // In files below the data directory, which go with it, and not in a /dev/shm that containers keep small.
    ...(throwAway ? { dynamic_shared_memory_type: 'mmap' } : {}),
    ...settings,
    port: String(port),
  }
  const lines = Object.entries(all).map(([name, value]) => `${name} = '${value.replaceAll('\\', '\\\\').replaceAll("'", "''")}'\n`)
  await writeOwn(account, join(dataDir, SETTINGS_FILE), lines.join(''))
}

/** @throws invalid_argument */
export function checkSettings(value: unknown): asserts value is Readonly<Record<string, string>> {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) throw invalid('settings', value, 'must be an object of strings')
  for (const [name, setting] of Object.entries(value)) {
    if (!/^[A-Za-z_][A-Za-z0-9_.]*$/.test(name)) throw invalid('settings', name, 'has a name that is no setting of Postgres')
    if (typeof setting !== 'string' || /[\0\r\n]/.test(setting)) {
      throw invalid('settings', setting, `must have a string of one line as the value of "${name}"`)
    }
  }
}

async function readPassword(dataDir: string): Promise<string> {
  try {
    return (await readFile(join(dataDir, PASSWORD_FILE), 'utf8')).trim()
  } catch (error) {
    throw new BusError(
      'permission_denied',
      `startEmbeddedPostgres: ${dataDir} holds no readable ${PASSWORD_FILE}; start only what startEmbeddedPostgres made, as the user who made it`,
      { cause: error },
    )
  }
}

/** Postgres refuses too, but only after our settings are written over those of the running server. */
async function refuseRunning(dataDir: string): Promise<void> {
  const pidFile = await readFile(join(dataDir, 'postmaster.pid'), 'utf8').catch(() => '')
  const pid = Number(pidFile.split('\n', 1)[0])
  if (!Number.isInteger(pid) || pid <= 0) return
  try {
    process.kill(pid, 0)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EPERM') return
  }
  // After a restart of the machine or container the pid may be somebody else's.
  const command = await readFile(`/proc/${pid}/comm`, 'utf8').catch(() => 'postgres')
  if (command.trim() !== 'postgres') return
  throw new BusError(
    'conflict',
    `startEmbeddedPostgres: a server runs in ${dataDir} already (process ${pid}); stop it, or use another dataDir`,
  )
}

function closedDirectory(dataDir: string, account: Account): BusError {
  const why = account.foreign ? ` (Postgres refuses to run as root, so it runs as ${account.name})` : ''
  return new BusError(
    'permission_denied',
    `startEmbeddedPostgres: ${account.name} cannot enter ${dataDir}${why}; choose a dataDir below directories that everybody can enter, ` +
      'such as one in /var/tmp, or open those above it with chmod o+x',
  )
}

async function own(account: Account, path: string): Promise<void> {
  if (account.uid !== undefined && account.gid !== undefined) await chown(path, account.uid, account.gid)
}

async function writeOwn(account: Account, path: string, text: string): Promise<void> {
  await writeFile(path, text, { mode: 0o600 })
  await own(account, path)
}
