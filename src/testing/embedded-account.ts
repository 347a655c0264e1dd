/** Whom Postgres runs as, and where that account can go. */

import { execFile } from 'node:child_process'
import { lstat, realpath, stat } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { promisify } from 'node:util'
import { BusError } from '../core/index.ts'
import type { Identity } from './embedded-supervisor.ts'

const exec = promisify(execFile)

export interface Account extends Identity {
  /** For messages. */
  readonly name: string
  /** Another than this process's own: root's servers run under it. */
  readonly foreign: boolean
}

/** Present on every Unix; the first one is there where a Postgres was installed. */
const UNPRIVILEGED = ['postgres', 'nobody']

/**
 * This process's own account, unless it is root's, whom Postgres refuses: then the owner of the cluster that is to be
 * started, else an account without rights.
 * @throws permission_denied
 */
export async function chooseAccount(dataDir: string | undefined): Promise<Account> {
  if (process.getuid?.() !== 0) return { name: 'this user', foreign: false }
  const owner = dataDir === undefined ? undefined : await stat(dataDir).catch(() => undefined)
  if (owner && owner.uid !== 0) return { name: `the user with id ${owner.uid}`, foreign: true, uid: owner.uid, gid: owner.gid }
  for (const name of UNPRIVILEGED) {
    const ids = await Promise.all(['-u', '-g'].map((flag) => exec('id', [flag, name]).then(({ stdout }) => Number(stdout)))).catch(
      () => null,
    )
    const [uid, gid] = ids ?? []
    if (uid !== undefined && gid !== undefined && uid > 0) return { name: `the account "${name}"`, foreign: true, uid, gid }
  }
  throw new BusError(
    'permission_denied',
    'startEmbeddedPostgres: Postgres refuses to run as root, and there is neither an account "postgres" nor "nobody" to run it as; run it as another user',
  )
}

/** Asks the system itself: the account tries to enter the directory, so that ACLs and mounts have their say. */
export async function canEnter(account: Account, directory: string): Promise<boolean> {
  try {
    await exec('/bin/sh', ['-c', 'cd -- "$1"', 'sh', directory], { uid: account.uid, gid: account.gid, cwd: '/' })
    return true
  } catch (error) {
    // A container may have no other user to change to.
    if (error instanceof Error && 'syscall' in error) {
      throw new BusError('permission_denied', `startEmbeddedPostgres: cannot start a process as ${account.name}: ${error.message}`, {
        cause: error,
      })
    }
    return false
  }
}

/**
 * Places for temporary directories, best first, symbolic links resolved: those where nobody but us can replace what we
 * made, and which the account can enter. TMPDIR may well be a directory that only root may enter.
 */
export async function temporaryPlaces(account: Account): Promise<string[]> {
  const places: string[] = []
  for (const candidate of new Set([tmpdir(), '/tmp', '/var/tmp'])) {
    const path = await realpath(candidate).catch(() => undefined)
    if (path === undefined || places.includes(path)) continue
    const { mode, uid } = await lstat(path)
    const ours = uid === 0 || uid === process.getuid?.()
    const shared = (mode & 0o022) !== 0
    const sticky = (mode & 0o1000) !== 0
    if (ours && (!shared || sticky) && (await canEnter(account, path))) places.push(path)
  }
  if (places.length > 0) return places
  throw new BusError(
    'permission_denied',
    `startEmbeddedPostgres: found no temporary directory that ${account.name} can enter; set TMPDIR to one that everybody can (mode 1777)`,
  )
}
