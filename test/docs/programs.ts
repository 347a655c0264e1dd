/** The examples of all documents as programs in one project that knows the package by its name alone; compiled in one go. */

import { execFile } from 'node:child_process'
import { chmod, mkdir, mkdtemp, readdir, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { promisify } from 'node:util'
import { type Block, blocksOf, importsOf, isClients, outputsOf, type Surroundings } from './document.ts'

export const root = join(import.meta.dirname, '..', '..')
const run = promisify(execFile)

/** What a document says of its examples that import nothing: `bus` is a connected bus, and `client` a pg client of the reader's own. */
const PRELUDE = [
  "import pg from 'pg'",
  "import { BusError, decode, encode, isBusError, PostgresBus, Worker } from 'klieo-bus'",
  'const bus = await PostgresBus.connect({ connectionString: process.env.DATABASE_URL as string })',
  'const client = new pg.Client({ connectionString: process.env.DATABASE_URL as string })',
  'await client.connect()',
].join('; ')

/** A program of one or more blocks, each at the lines that it has in its document, so that errors name these. */
export interface Program {
  readonly document: string
  /** Inside the project. */
  readonly path: string
  readonly code: string
  /** What it prints, in order; empty: it is not run by itself. */
  readonly outputs: readonly string[]
  /** Whether `vitest` runs it. */
  readonly isTest: boolean
  /** Where it begins; what stands there runs after everything before it in the document. */
  readonly line: number
  readonly of?: string
}

/** `docs/outbox.md` has its programs in `outbox/`. */
export function directoryOf(document: string): string {
  return document.split('/').at(-1)!.replace(/\.md$/, '')
}

export function programsOf(blocks: readonly Block[], surroundings: Surroundings): Program[] {
  const chains: Block[][] = []
  for (const block of blocks) {
    if (block.language !== 'ts' || isClients(block, surroundings)) continue
    if (block.continued) chains.at(-1)?.push(block)
    else chains.push([block])
  }
  return chains.map((chain) => {
    const [first] = chain as [Block]
    const bare = !chain.some(({ code }) => importsOf(code).length > 0)
    const lines: string[] = []
    for (const { line, code } of chain) lines.push(...Array<string>(Math.max(0, line - 1 - lines.length)).fill(''), code)
    let code = lines.join('\n')
    // On the line of the fence, if not before.
    if (bare) code = code.startsWith('\n') ? `${PRELUDE}${code}` : `${PRELUDE}\n${code}`
    const byOthers = chain.some(({ by, notRun }) => by ?? notRun)
    return {
      document: first.document,
      path: join(directoryOf(first.document), first.file ?? `line-${first.line}.ts`),
      code: `${code}\n`,
      outputs: byOthers ? [] : chain.flatMap(outputsOf),
      isTest: !byOthers && (first.file?.endsWith('.test.ts') ?? false),
      line: first.line,
      ...(first.of ? { of: first.of } : {}),
    }
  })
}

/** README.md and the documents of docs/, without its directories. */
export async function documents(): Promise<ReadonlyMap<string, readonly Block[]>> {
  const names = ['README.md', ...(await readdir(join(root, 'docs'))).filter((name) => name.endsWith('.md')).map((name) => `docs/${name}`)]
  const found = new Map<string, readonly Block[]>()
  for (const name of names.sort()) found.set(name, blocksOf(name, await readFile(join(root, name), 'utf8')))
  return found
}

export async function surroundings(): Promise<Surroundings> {
  const manifest = JSON.parse(await readFile(join(root, 'package.json'), 'utf8')) as Record<string, Record<string, string>>
  const bench = JSON.parse(await readFile(join(root, 'bench', 'package.json'), 'utf8')) as typeof manifest
  const files = new Map<string, string>()
  const clients: string[] = []
  for (const path of await readdir(join(root, 'test'), { recursive: true })) {
    if (!path.endsWith('.ts') || path.includes('node_modules')) continue
    const text = await readFile(join(root, 'test', path), 'utf8')
    files.set(`test/${path}`, text)
    if (path.startsWith('clients/')) clients.push(text)
  }
  return {
    packages: new Set(['klieo-bus', ...Object.keys({ ...manifest.dependencies, ...manifest.devDependencies })]),
    peers: new Set(Object.keys(bench.dependencies!)),
    read: (path) => files.get(path),
    clients,
  }
}

/** A directory with the programs, the package built and the packages that the examples may import. */
export class Project implements AsyncDisposable {
  readonly directory: string

  private constructor(directory: string) {
    this.directory = directory
  }

  static async create(programs: readonly Program[], { packages }: Pick<Surroundings, 'packages'>): Promise<Project> {
    await run(process.execPath, ['scripts/build.ts'], { cwd: root })
    const project = new Project(await mkdtemp(join(tmpdir(), 'klieo-docs-')))
    // A server that root starts runs under another account.
    await chmod(project.directory, 0o755)
    await writeFile(project.path('package.json'), '{ "type": "module", "private": true }')
    for (const name of packages) await project.#link(name, name === 'klieo-bus' ? root : join(root, 'node_modules', name))
    // Its command, as npm would link it.
    await project.#link('.bin/klieo-bus', join(root, 'dist', 'cli', 'main.js'))
    await project.#link('.bin/node', join(root, 'node_modules', '.bin', 'node'))
    for (const { path, code } of programs) {
      await mkdir(dirname(project.path(path)), { recursive: true })
      await writeFile(project.path(path), code)
    }
    return project
  }

  /** What `of=` names, where the benchmark has it. */
  async linkPeers({ peers, packages }: Pick<Surroundings, 'peers' | 'packages'>): Promise<void> {
    for (const name of peers) if (!packages.has(name)) await this.#link(name, join(root, 'bench', 'node_modules', name))
  }

  path(path: string): string {
    return join(this.directory, path)
  }

  async #link(name: string, target: string): Promise<void> {
    const link = this.path(join('node_modules', name))
    await mkdir(dirname(link), { recursive: true })
    await symlink(target, link)
  }

  /** Strictly, all at once. @returns the compiler's complaints, as `outbox/line-12.ts(14,3): …`: line 14 of docs/outbox.md */
  async compile(programs: readonly Program[]): Promise<string> {
    const config = {
      compilerOptions: {
        ...{ noEmit: true, strict: true, exactOptionalPropertyTypes: true, noUncheckedIndexedAccess: true, skipLibCheck: true },
        ...{ module: 'nodenext', target: 'es2024', lib: ['es2024', 'esnext.disposable'], types: ['node'] },
        // Node runs them as they are.
        ...{ erasableSyntaxOnly: true, verbatimModuleSyntax: true, allowImportingTsExtensions: true },
      },
      files: programs.map(({ path }) => path),
    }
    await writeFile(this.path('tsconfig.json'), JSON.stringify(config))
    const tsc = join(root, 'node_modules', 'typescript', 'bin', 'tsc')
    return run(process.execPath, [tsc, '-p', 'tsconfig.json', '--pretty', 'false'], { cwd: this.directory }).then(
      () => '',
      (error: { stdout: string; message: string }) => error.stdout || error.message,
    )
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await rm(this.directory, { recursive: true, force: true })
  }
}
