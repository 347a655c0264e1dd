/** The work: what package-lock.json lists, and what lies under node_modules. Nothing here knows of the bus. */

import { createHash, type Hash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { readdir, readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'

export interface LockedPackage {
  /** Where it is installed, below the project: `node_modules/pg`. Unlike the name it occurs once. */
  readonly path: string
  readonly name: string
  readonly version: string
}

/**
 * The packages of a lock file. Those for other platforms are listed there too, and not installed here.
 * @throws an Error that says what to do when there is no lock file
 */
export async function readLockFile(project: string): Promise<LockedPackage[]> {
  const file = join(project, 'package-lock.json')
  const text = await readFile(file, 'utf8').catch(() => {
    throw new Error(`${file} cannot be read: run npm ci first`)
  })
  const { packages } = JSON.parse(text) as { packages: Record<string, { name?: string; version?: string; link?: boolean }> }
  return Object.entries(packages)
    .filter(([path, { link }]) => path.startsWith('node_modules/') && !link)
    .map(([path, { name, version }]) => ({
      path,
      name: name ?? path.slice(path.lastIndexOf('node_modules/') + 'node_modules/'.length),
      version: version ?? '',
    }))
}

export interface Measured {
  readonly installed: boolean
  readonly licence: string
  readonly files: number
  readonly bytes: number
  /** Over the names and contents of all files, in order; empty when it is not installed. */
  readonly sha256: string
}

const NOT_INSTALLED: Measured = { installed: false, licence: '', files: 0, bytes: 0, sha256: '' }
/** Larger files are read in pieces. */
const STREAM_FROM_BYTES = 4_000_000

export async function measurePackage(project: string, path: string): Promise<Measured> {
  const directory = join(project, path)
  const manifest = await readFile(join(directory, 'package.json'), 'utf8').catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT' || error.code === 'ENOTDIR') return undefined
    throw error
  })
  if (manifest === undefined) return NOT_INSTALLED
  const hash = createHash('sha256')
  let files = 0
  let bytes = 0
  for await (const name of filesBelow(directory)) {
    files++
    hash.update(`${name}\0`)
    bytes += await addFile(hash, join(directory, name))
  }
  return { installed: true, licence: licenceIn(manifest), files, bytes, sha256: hash.digest('hex') }
}

async function addFile(hash: Hash, file: string): Promise<number> {
  const { size } = await stat(file)
  if (size < STREAM_FROM_BYTES) {
    const content = await readFile(file)
    hash.update(content)
    return content.length
  }
  let bytes = 0
  for await (const piece of createReadStream(file, { highWaterMark: 1_000_000 }) as AsyncIterable<Buffer>) {
    hash.update(piece)
    bytes += piece.length
  }
  return bytes
}

/** Regular files in a fixed order, so that equal packages have equal hashes. What lies in a node_modules of its own is a package of its own. */
async function* filesBelow(directory: string, prefix = ''): AsyncGenerator<string> {
  const entries = await readdir(join(directory, prefix), { withFileTypes: true })
  for (const entry of entries.sort((a, b) => (a.name < b.name ? -1 : 1))) {
    const name = `${prefix}${entry.name}`
    if (entry.isFile()) yield name
    else if (entry.isDirectory() && entry.name !== 'node_modules') yield* filesBelow(directory, `${name}/`)
  }
}

/** Old packages write `{ type }` or a list of them. */
function licenceIn(manifest: string): string {
  const { license, licenses } = JSON.parse(manifest) as { license?: unknown; licenses?: unknown }
  const first = license ?? (Array.isArray(licenses) ? licenses[0] : licenses)
  const text = typeof first === 'object' && first !== null && 'type' in first ? first.type : first
  return typeof text === 'string' && text !== '' ? text : 'none given'
}
