/** A project as a user of a client has it: the packed package and the client, in a directory that knows nothing of this clone. */

import { execFile } from 'node:child_process'
import { mkdir, mkdtemp, readdir, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import pg from 'pg'
import { databaseUrl } from '../support/server.ts'
import { installClients } from './install.ts'

const run = promisify(execFile)
const root = join(import.meta.dirname, '..', '..')
const tsc = join(root, 'node_modules', 'typescript', 'bin', 'tsc')
const STRICT = [
  ...[
    '--noEmit',
    '--strict',
    '--exactOptionalPropertyTypes',
    '--noUncheckedIndexedAccess',
    '--skipLibCheck',
    '--allowImportingTsExtensions',
  ],
  ...['--module', 'nodenext', '--target', 'es2024', '--lib', 'es2024,esnext.disposable', '--types', 'node'],
]

export class Project implements AsyncDisposable {
  readonly directory: string
  readonly #databases: string[] = []

  private constructor(directory: string) {
    this.directory = directory
  }

  static async make(): Promise<Project> {
    const clients = await installClients()
    const project = new Project(await mkdtemp(join(tmpdir(), 'klieo-clients-')))
    const modules = join(project.directory, 'node_modules')
    const own = join(modules, 'klieo-bus')
    await mkdir(own, { recursive: true })
    for (const name of await readdir(join(clients, 'node_modules'))) {
      if (!name.startsWith('.')) await symlink(join(clients, 'node_modules', name), join(modules, name))
    }
    await run(process.execPath, ['scripts/build.ts'], { cwd: root })
    const { stdout } = await run('npm', ['pack', '--silent', '--pack-destination', project.directory], { cwd: root })
    await run('tar', ['-xzf', join(project.directory, stdout.trim()), '-C', own, '--strip-components', '1'])
    await project.write('package.json', '{ "type": "module", "private": true }')
    return project
  }

  async write(name: string, text: string): Promise<void> {
    await writeFile(join(this.directory, name), text)
  }

  path(name: string): string {
    return join(this.directory, name)
  }

  /** Makes Prisma's client from the schema.prisma that is there. */
  async generatePrismaClient(directory = '.'): Promise<void> {
    const command = join(this.directory, 'node_modules', 'prisma', 'build', 'index.js')
    // The engine for migrations would be fetched first, and is not used.
    const env = { ...process.env, PRISMA_SCHEMA_ENGINE_BINARY: process.execPath, CHECKPOINT_DISABLE: '1' }
    await run(process.execPath, [command, 'generate'], { cwd: this.path(directory), env, timeout: 60_000 })
  }

  /** @throws what the compiler found */
  async compileStrictly(names: readonly string[]): Promise<void> {
    await run(process.execPath, [tsc, ...STRICT, ...names], { cwd: this.directory }).catch((error: { stdout: string }) => {
      throw new Error(error.stdout)
    })
  }

  /** A database of its own, so that a program may use the default names. */
  async database(): Promise<string> {
    const name = `clients_${crypto.randomUUID().replaceAll('-', '')}`
    await onServer(`create database ${name}`)
    this.#databases.push(name)
    return Object.assign(new URL(databaseUrl()), { pathname: `/${name}` }).href
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const name of this.#databases) await onServer(`drop database ${name} with (force)`)
    await rm(this.directory, { recursive: true, force: true })
  }
}

async function onServer(statement: string): Promise<void> {
  const client = new pg.Client({ connectionString: databaseUrl() })
  await client.connect()
  try {
    await client.query(statement)
  } finally {
    await client.end()
  }
}
