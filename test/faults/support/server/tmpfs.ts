/** A small disk: a file system in memory that is full when it is full. Only root may mount one, and not in every container. */

import { execFile } from 'node:child_process'
import { chown, mkdtemp, rmdir } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { chooseAccount, temporaryPlaces } from '../../../../src/testing/embedded-account.ts'

const exec = promisify(execFile)

export interface SmallDisk extends AsyncDisposable {
  /** Belongs to the account that the servers run as. */
  readonly path: string
  resize(mib: number): Promise<void>
}

/** Mounts it where the account of the servers can reach it. @throws where mounting is not possible */
export async function mountSmallDisk(mib: number): Promise<SmallDisk> {
  const account = await chooseAccount(undefined)
  const path = await mkdtemp(join((await temporaryPlaces(account))[0]!, 'klieo-disk-'))
  try {
    await exec('mount', ['-t', 'tmpfs', '-o', `size=${mib}m,mode=0700`, 'tmpfs', path])
  } catch (error) {
    await rmdir(path)
    throw error
  }
  let unmounted: Promise<void> | undefined
  const unmount = async () => {
    // Whatever still has a file open keeps it, and nobody finds it any more.
    await exec('umount', [path]).catch(() => exec('umount', ['-l', path]))
    await rmdir(path)
  }
  const disk: SmallDisk = {
    path,
    async resize(to) {
      await exec('mount', ['-o', `remount,size=${to}m`, path])
    },
    [Symbol.asyncDispose]: () => (unmounted ??= unmount()),
  }
  if (account.uid !== undefined && account.gid !== undefined) await chown(path, account.uid, account.gid)
  return disk
}

/** Why there can be no small disk here; empty where there can. */
export async function whyNoSmallDisk(): Promise<string> {
  try {
    await (await mountSmallDisk(1))[Symbol.asyncDispose]()
    return ''
  } catch (error) {
    return `mounting is not possible here: ${(error as Error).message.trim().split('\n').at(-1)}`
  }
}
