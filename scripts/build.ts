/**
 * Compiles src/ to dist/, and does nothing when dist/ was made from what is there now. Prints nothing when all is well.
 *
 * Several may run at once in one clone: each compiles into a directory of its own, and only a whole result that is newer than
 * what is there takes the place of dist/.
 */

import { execFile } from 'node:child_process'
import { createHash } from 'node:crypto'
import { chmod, mkdir, mkdtemp, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'

const root = join(import.meta.dirname, '..')
const dist = join(root, 'dist')
/** Ignored by git, and on the same file system as dist. */
const scratch = join(root, '.klieo')
/** Inside of dist, so that the two are one: a hash of everything that dist depends on. */
const STAMP = '.inputs'
const CONFIGURATION = ['tsconfig.json', 'tsconfig.build.json', 'package.json', 'node_modules/typescript/package.json', 'scripts/build.ts']

const inputs = await hashInputs()
if (!(await isCurrent(inputs))) {
  await mkdir(scratch, { recursive: true })
  const workspace = await mkdtemp(join(scratch, 'build-'))
  try {
    const built = join(workspace, 'dist')
    await compile(built)
    await aimSourceMaps(built)
    await chmod(join(built, 'cli', 'main.js'), 0o755).catch(ignoreMissing)
    await writeFile(join(built, STAMP), inputs)
    await putInPlace(built, join(workspace, 'old'))
  } catch (error) {
    process.stderr.write(`${error instanceof Error ? error.message : String(error)}\n`)
    process.exitCode = 1
  } finally {
    await rm(workspace, { recursive: true, force: true })
  }
}

async function hashInputs(): Promise<string> {
  const sources = (await readdir(join(root, 'src'), { recursive: true }))
    .filter((path) => path.endsWith('.ts'))
    .map((path) => join('src', path))
  const hash = createHash('sha256')
  for (const path of [...CONFIGURATION, ...sources.sort()]) {
    const text = await readFile(join(root, path))
    hash.update(`${path}\0${text.byteLength}\0`).update(text)
  }
  return hash.digest('hex')
}

async function isCurrent(wanted: string): Promise<boolean> {
  return (await readFile(join(dist, STAMP), 'utf8').catch(ignoreMissing)) === wanted
}

async function compile(outDir: string): Promise<void> {
  const compiler = join(root, 'node_modules', 'typescript', 'bin', 'tsc')
  try {
    await promisify(execFile)(process.execPath, [compiler, '-p', 'tsconfig.build.json', '--outDir', outDir], {
      cwd: root,
      maxBuffer: 1 << 26,
    })
  } catch (error) {
    const { stdout, stderr, message } = error as Error & { stdout?: string; stderr?: string }
    throw new Error(`${stdout ?? ''}${stderr ?? ''}`.trim() || message)
  }
}

/** Maps point from where they were written to src/; dist/ is two directories nearer to it. */
async function aimSourceMaps(built: string): Promise<void> {
  for (const path of await readdir(built, { recursive: true })) {
    if (!path.endsWith('.js.map')) continue
    const map = JSON.parse(await readFile(join(built, path), 'utf8')) as { sources: string[] }
    map.sources = map.sources.map((source) => source.replace(/^\.\.\/\.\.\//, ''))
    await writeFile(join(built, path), JSON.stringify(map))
  }
}

async function putInPlace(built: string, old: string): Promise<void> {
  for (;;) {
    // Somebody else was faster, and a test may be running from it.
    if (await isCurrent(inputs)) return
    await rename(dist, old).catch(ignoreMissing)
    try {
      return await rename(built, dist)
    } catch (error) {
      if (!['ENOTEMPTY', 'EEXIST'].includes((error as NodeJS.ErrnoException).code ?? '')) throw error
      await rm(old, { recursive: true, force: true })
    }
  }
}

function ignoreMissing(error: NodeJS.ErrnoException): undefined {
  if (error.code !== 'ENOENT') throw error
}
