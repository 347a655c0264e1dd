/**
 * The clients that the programs here use, installed once for each state of package-lock.json, outside of this project's own
 * dependencies: `npm ci` at the root stays small.
 */

import { execFile } from 'node:child_process'
import { createHash } from 'node:crypto'
import { copyFile, mkdir, readdir, readFile, rename, rm, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'

const root = join(import.meta.dirname, '..', '..')
/** Ignored by git. */
const scratch = join(root, '.klieo')
const INSTALL_MS = 240_000

/** @returns the directory that holds their node_modules */
export async function installClients(): Promise<string> {
  const hash = createHash('sha256')
  for (const name of ['package.json', 'package-lock.json']) hash.update(await readFile(join(import.meta.dirname, name)))
  const directory = join(scratch, `clients-${hash.digest('hex').slice(0, 12)}`)
  await mkdir(scratch, { recursive: true })
  // Test files start at once, in processes of their own.
  const lock = join(scratch, 'clients.lock')
  while (!(await exists(directory))) {
    if (!(await takeLock(lock))) {
      await sleep(200)
      continue
    }
    try {
      if (!(await exists(directory))) await install(directory)
    } finally {
      await rm(lock, { force: true })
    }
  }
  return directory
}

async function install(directory: string): Promise<void> {
  for (const name of await readdir(scratch)) {
    if (/^clients-/.test(name)) await rm(join(scratch, name), { recursive: true, force: true })
  }
  const unfinished = `${directory}.unfinished`
  await mkdir(unfinished, { recursive: true })
  for (const name of ['package.json', 'package-lock.json']) await copyFile(join(import.meta.dirname, name), join(unfinished, name))
  // No script of theirs is needed, and Prisma's would fetch an engine.
  const args = ['ci', '--ignore-scripts', '--no-audit', '--no-fund', '--loglevel=error', '--prefer-offline', '--fetch-retries=1']
  try {
    await promisify(execFile)('npm', args, { cwd: unfinished, timeout: INSTALL_MS })
  } catch (error) {
    const { stderr, killed } = error as { stderr?: string; killed?: boolean }
    const reason = killed ? `nothing came of it within ${INSTALL_MS / 1_000} s` : (stderr ?? '').trim().split('\n').slice(0, 4).join('\n')
    await rm(unfinished, { recursive: true, force: true })
    throw new Error(
      `the clients of test/clients could not be installed, which needs the npm registry or a cache that has them all:\n${reason}`,
    )
  }
  await rename(unfinished, directory)
}

/** Held by a process that lives. */
async function takeLock(lock: string): Promise<boolean> {
  try {
    await writeFile(lock, String(process.pid), { flag: 'wx' })
    return true
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error
  }
  const holder = Number(await readFile(lock, 'utf8').catch(() => '0'))
  if (holder > 0 && !isAlive(holder)) await rm(lock, { force: true })
  return false
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0)
    return true
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM'
  }
}

async function exists(path: string): Promise<boolean> {
  return (await stat(path).catch(() => undefined)) !== undefined
}
