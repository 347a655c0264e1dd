/** Every example of README.md and docs/*.md: somebody checks it, it compiles, and it does what it says. CONTRIBUTING.md says how. */

import { execFile } from 'node:child_process'
import { existsSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { type EmbeddedPostgres, startEmbeddedPostgres } from '../../src/testing/index.ts'
import { type Line, startChild } from '../support/child.ts'
import { type Known, wrongCommands } from './commands.ts'
import { type Block, complaints, isOutput, outputsOf } from './document.ts'
import { FreshDatabase, withClient } from './fresh-database.ts'
import { directoryOf, documents, type Program, Project, programsOf, root, surroundings } from './programs.ts'
import { concernsCluster, runStatements } from './statements.ts'

const run = promisify(execFile)
/** An example begins with a Node, a connection and a schema. */
const PATIENCE_MS = 30_000
const around = await surroundings()
const all = [...(await documents())].map(([document, blocks]) => ({ document, blocks, programs: programsOf(blocks, around) }))
const ours = all.flatMap(({ programs }) => programs).filter(({ of }) => of === undefined)
const peers = all.flatMap(({ programs }) => programs).filter(({ of }) => of !== undefined)

let project: Project
let help: string

beforeAll(async () => {
  project = await Project.create([...ours, ...peers], around)
  help = (await run(process.execPath, [join(root, 'dist', 'cli', 'main.js'), '--help'])).stdout
}, 60_000)

afterAll(() => project[Symbol.asyncDispose]())

test('the README and the guides have examples', () => {
  expect(ours.filter(({ document }) => document === 'README.md').length).toBeGreaterThanOrEqual(7)
  expect(ours.filter(({ outputs }) => outputs.length > 0).length).toBeGreaterThanOrEqual(7)
})

test('every example is checked by somebody', () => {
  expect(all.flatMap(({ blocks }) => complaints(blocks, around))).toEqual([])
})

test('every example compiles strictly', async () => {
  expect(await project.compile(ours)).toBe('')
}, 60_000)

// They are installed by bench/setup alone.
test.skipIf(peers.length === 0 || !existsSync(join(root, 'bench', 'node_modules')))(
  'what another package is shown with compiles, too',
  async () => {
    await project.linkPeers(around)
    expect(await project.compile(peers)).toBe('')
  },
  60_000,
)

test('every command exists', async () => {
  const { scripts } = JSON.parse(await readFile(join(root, 'package.json'), 'utf8')) as { scripts: Record<string, string> }
  const found = all.flatMap(({ document, blocks }) => {
    const known: Known = {
      scripts: new Set(Object.keys(scripts)),
      packages: new Set([...around.packages, ...around.peers]),
      help,
      has: (file) => existsSync(project.path(join(directoryOf(document), file))) || existsSync(join(root, file)),
    }
    return blocks.filter(({ language, by }) => language === 'sh' && by === undefined).flatMap((block) => wrongCommands(block, known))
  })
  expect(found).toEqual([])
})

test('every link to a file finds it', async () => {
  const missing: string[] = []
  for (const { document } of all) {
    const text = await readFile(join(root, document), 'utf8')
    for (const [, path] of text.matchAll(/\]\((?!https?:)([^)#\s]+)/g)) {
      if (!existsSync(join(root, dirname(document), path!))) missing.push(`${document}: ${path}`)
    }
  }
  expect(missing).toEqual([])
})

test('the index of docs/ has every document', async () => {
  const index = await readFile(join(root, 'docs', 'README.md'), 'utf8')
  const names = all.map(({ document }) => document).filter((document) => document.startsWith('docs/') && document !== 'docs/README.md')
  expect(names.filter((document) => !index.includes(`](${document.slice('docs/'.length)})`))).toEqual([])
})

test('every JSON is one', () => {
  for (const { blocks } of all) for (const { language, code } of blocks) if (language === 'json') JSON.parse(code)
})

interface Step {
  readonly name: string
  readonly line: number
  run(url: string): Promise<void>
}

for (const { document, blocks, programs } of all) {
  const steps = [...programs.flatMap(programStep), ...blocks.flatMap(blockStep)].sort((a, b) => a.line - b.line)
  if (steps.length === 0) continue
  describe(document, () => {
    let url: string
    let server: EmbeddedPostgres | undefined
    let database: FreshDatabase | undefined
    // Programs make the schema themselves.
    const migrate = blocks.find(({ line }) => line === steps[0]?.line)?.language === 'sql'

    /** A database of its own, since the examples use the schema's default name; roles and settings would be everybody's on the server. */
    beforeAll(async () => {
      if (blocks.some((block) => block.language === 'sql' && concernsCluster(block))) {
        server = await startEmbeddedPostgres()
        url = server.connectionString
        if (migrate) await PostgresBus.migrate({ connectionString: url })
      } else {
        database = await FreshDatabase.make({ migrate })
        url = database.url
      }
    })

    afterAll(async () => {
      await server?.stop('immediate')
      await database?.[Symbol.asyncDispose]()
    })

    for (const step of steps) test(`${step.name} at line ${step.line}`, () => step.run(url), 120_000)
  })
}

function programStep(program: Program): Step[] {
  const { line, path, outputs, isTest, of } = program
  if (of !== undefined || (outputs.length === 0 && !isTest)) return []
  if (isTest) return [{ name: 'the test passes', line, run: (url) => runTest(path, url) }]
  return [{ name: 'the example prints what it says', line, run: (url) => runProgram(program, url) }]
}

function blockStep(block: Block): Step[] {
  const { language, line } = block
  if (block.by !== undefined || block.notRun !== undefined) return []
  if (language === 'sql') return [{ name: 'the statements run, and find what they made', line, run: (url) => runSql(block, url) }]
  if (language !== 'sh' || outputsOf(block).length === 0) return []
  return [{ name: 'the commands print what they say', line, run: (url) => runCommands(block, url) }]
}

async function runProgram({ document, path, outputs, line }: Program, url: string): Promise<void> {
  const cwd = project.path(directoryOf(document))
  const textOf = (printed: Line) => (typeof printed.text === 'string' ? printed.text : JSON.stringify(printed))
  await using child = startChild(project.path(path), { env: { DATABASE_URL: url }, cwd })
  for (const expected of outputs) {
    await child
      .next((printed) => isOutput(expected, textOf(printed)), PATIENCE_MS)
      .catch((error: Error) => {
        const printed = child.unread().map(textOf).join('\n')
        throw new Error(`${document}:${line} does not print "${expected}", but:\n${printed}\n${error.message}`, { cause: error })
      })
  }
}

async function runTest(path: string, url: string): Promise<void> {
  const vitest = join(root, 'node_modules', 'vitest', 'vitest.mjs')
  const env = { PATH: process.env.PATH, HOME: process.env.HOME, DATABASE_URL: url }
  await run(project.path('node_modules/.bin/node'), [vitest, 'run', path], { cwd: project.directory, env }).catch(
    (error: Error & { stdout: string; stderr: string }) => {
      throw new Error(`${error.stdout}\n${error.stderr}`)
    },
  )
}

function runSql(block: Block, url: string): Promise<void> {
  return withClient(url, (client) => runStatements(client, block))
}

async function runCommands(block: Block, url: string): Promise<void> {
  const cwd = project.path(directoryOf(block.document))
  const env = { ...process.env, DATABASE_URL: url, PATH: `${project.path('node_modules/.bin')}:${process.env.PATH}` }
  const { stdout } = await run('bash', ['-euo', 'pipefail', '-c', block.code], { cwd: existsSync(cwd) ? cwd : project.directory, env })
  const lines = stdout.split('\n')
  for (const text of outputsOf(block)) {
    const at = lines.findIndex((line) => isOutput(text, line))
    expect(at, `"${text}" in:\n${stdout}`).toBeGreaterThanOrEqual(0)
    lines.splice(0, at + 1)
  }
}
