import { execFile } from 'node:child_process'
import { mkdtemp, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import pg from 'pg'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { startChild } from '../support/child.ts'
import { databaseUrl } from '../support/server.ts'

const root = join(import.meta.dirname, '..', '..')
const readme = await readFile(join(root, 'README.md'), 'utf8')
const blocks = (language: string) =>
  [...readme.matchAll(new RegExp(`^\`\`\`${language}\\n([\\s\\S]*?)^\`\`\``, 'gm'))].map(([, code]) => code as string)

/** What the README says of its examples: `bus` is a connected bus, and `client` a pg client of your own. */
const PRELUDE = `import pg from 'pg'
import { decode, encode, PostgresBus } from 'klieo-bus'
const bus = await PostgresBus.connect({ connectionString: process.env.DATABASE_URL as string })
const client = new pg.Client({ connectionString: process.env.DATABASE_URL })
await client.connect()
`

let project: string
let url: string
const database = `readme_${crypto.randomUUID().replaceAll('-', '')}`

/** A database of its own, since the examples use the schema's default name; the package by its own name. */
beforeAll(async () => {
  const client = new pg.Client({ connectionString: databaseUrl() })
  await client.connect()
  await client.query(`create database ${database}`)
  await client.end()
  url = Object.assign(new URL(databaseUrl()), { pathname: `/${database}` }).href
  await promisify(execFile)(process.execPath, ['scripts/build.ts'], { cwd: root })
  project = await mkdtemp(join(tmpdir(), 'klieo-readme-'))
  await writeFile(join(project, 'package.json'), '{ "type": "module", "private": true }')
  await promisify(execFile)('mkdir', ['-p', join(project, 'node_modules')])
  await symlink(root, join(project, 'node_modules', 'klieo-bus'))
  for (const name of ['pg', '@types']) await symlink(join(root, 'node_modules', name), join(project, 'node_modules', name))
}, 60_000)

afterAll(async () => {
  await rm(project, { recursive: true, force: true })
  const client = new pg.Client({ connectionString: databaseUrl() })
  await client.connect()
  await client.query(`drop database ${database} with (force)`)
  await client.end()
})

const examples = blocks('ts').map((code, index) => ({
  file: `example-${index}.ts`,
  code: code.includes("from 'klieo-bus'") ? code : `${code.includes('from ') ? '' : PRELUDE}${code}`,
  prints: [...code.matchAll(/\/\/ → (.*)$/gm)].map(([, text]) => text as string),
}))

test('the README has examples, and each says what it prints', () => {
  expect(examples.length).toBeGreaterThanOrEqual(7)
  for (const { prints } of examples) expect(prints.length).toBeGreaterThan(0)
})

test('every example of the README compiles strictly', async () => {
  for (const { file, code } of examples) await writeFile(join(project, file), `${code}\nexport {}\n`)
  const tsc = join(root, 'node_modules', 'typescript', 'bin', 'tsc')
  const strict = [
    '--noEmit',
    '--strict',
    '--skipLibCheck',
    '--module',
    'nodenext',
    '--target',
    'es2024',
    '--lib',
    'es2024,esnext.disposable',
    '--types',
    'node',
  ]
  await promisify(execFile)(process.execPath, [tsc, ...strict, ...examples.map(({ file }) => file)], { cwd: project }).catch(
    (error: { stdout: string }) => {
      throw new Error(error.stdout)
    },
  )
}, 60_000)

test.each(examples)('the README example $file prints what it says', async ({ file, code, prints }) => {
  await writeFile(join(project, file), `${code}\nexport {}\n`)
  await using child = startChild(join(project, file), { env: { DATABASE_URL: url }, cwd: project })
  for (const text of prints) await child.next((line) => line.text === text || JSON.stringify(line) === text)
})

test('every statement of the README runs, and finds what it made', async () => {
  const client = new pg.Client({ connectionString: url })
  await client.connect()
  const statements = blocks('sql')
    .flatMap((text) => text.replaceAll(/--.*$/gm, '').split(';'))
    .map((text) => text.trim())
    .filter((text) => text !== '')
  expect(statements.length).toBeGreaterThanOrEqual(8)
  for (const statement of statements) expect((await client.query(statement)).rows.length, statement).toBeGreaterThan(0)
  await client.end()
})
