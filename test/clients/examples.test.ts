/** Every block of docs/transactions.md, copied into a fresh project. */

import { mkdir, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import pg from 'pg'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { startChild } from '../support/child.ts'
import { eventually } from '../support/wait.ts'
import { Project } from './project.ts'

const page = await readFile(join(import.meta.dirname, '..', '..', 'docs', 'transactions.md'), 'utf8')
const examples = page
  .split(/^## /m)
  .slice(1)
  .flatMap((section) => {
    const title = section.slice(0, section.indexOf('\n'))
    const directory = title.toLowerCase().replaceAll(/[^a-z]+/g, '-')
    const block = (language: string) => new RegExp(`^\`\`\`${language}\\n([\\s\\S]*?)^\`\`\``, 'm').exec(section)?.[1]
    const code = block('ts')
    const installed = /^`npm install (.*)`$/m.exec(section)?.[1]?.split(' ') ?? []
    return code === undefined ? [] : [{ title, directory, code, schema: block('prisma'), installed }]
  })

let project: Project

beforeAll(async () => {
  project = await Project.make()
  for (const { directory, code, schema } of examples) {
    await mkdir(project.path(directory))
    await project.write(join(directory, 'orders.ts'), code)
    if (schema === undefined) continue
    await project.write(join(directory, 'schema.prisma'), schema)
    await project.generatePrismaClient(directory)
  }
}, 300_000)

afterAll(() => project[Symbol.asyncDispose]())

test('docs/transactions.md has a block for every client that its table names, and links to it', () => {
  const linked = [...page.matchAll(/\]\(#([a-z-]+)\)/g)].map(([, anchor]) => anchor)
  const anchors = examples.map(({ title }) => title.toLowerCase().replaceAll('.', '').replaceAll(' ', '-'))
  expect(anchors).toEqual(expect.arrayContaining(linked))
  expect(linked).toEqual(expect.arrayContaining(anchors))
  expect(examples.length).toBe(9)
})

test('a block imports what its section installs, and these are the clients here', async () => {
  const { dependencies } = JSON.parse(await readFile(join(import.meta.dirname, 'package.json'), 'utf8')) as { dependencies: object }
  for (const { title, code, installed } of examples) {
    expect(Object.keys(dependencies), title).toEqual(expect.arrayContaining(installed))
    const imported = [...code.matchAll(/ from '((?:@[^/']+\/)?[^/'.]+)/g)].map(([, name]) => name!).filter((name) => name !== 'klieo-bus')
    expect(imported.length, title).toBeGreaterThan(0)
    expect(installed, title).toEqual(expect.arrayContaining(imported))
  }
})

test('every block compiles strictly', async () => {
  await project.compileStrictly(examples.map(({ directory }) => join(directory, 'orders.ts')))
}, 120_000)

test.each(examples)(
  'P1 J1 the block for $title prints what it says, leaves the receipt and no job, and ends on SIGTERM',
  async (example) => {
    const url = await project.database()
    const cwd = project.path(example.directory)
    await using child = startChild(join(cwd, 'orders.ts'), { env: { DATABASE_URL: url }, cwd })
    const [, printed] = /\/\/ → (.*)$/m.exec(example.code) ?? []
    expect(printed).toBe('order 1 has its receipt')
    await child.next((line) => line.text === printed, 60_000)
    const client = new pg.Client({ connectionString: url })
    await client.connect()
    try {
      expect((await client.query('select id, receipt from orders')).rows).toEqual([{ id: 1, receipt: 'R-1' }])
      await eventually(async () => (await client.query('select from klieo.jobs')).rowCount === 0, {
        what: 'the end of the job',
        timeoutMs: 30_000,
      })
    } finally {
      await client.end()
    }
    expect(await child.kill('SIGTERM')).toEqual({ code: 0, signal: null })
    expect(child.stderr).toBe('')
  },
  120_000,
)
