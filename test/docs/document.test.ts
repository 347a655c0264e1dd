/** What the checks of examples refuse: an example that they passed over would be worth nothing. */

import { expect, test } from 'vitest'
import { type Known, wrongCommands } from './commands.ts'
import { blocksOf, complaints, isOutput, type Surroundings } from './document.ts'
import { Project, programsOf, surroundings } from './programs.ts'
import { statementsOf } from './statements.ts'

const around: Surroundings = {
  packages: new Set(['klieo-bus', 'pg']),
  peers: new Set(['pg-boss']),
  read: (path) => (path === 'test/there.test.ts' ? "runs('guide.md')" : undefined),
  clients: ["runs('other.md')"],
}

/** A document of one block: what stands after the fence, and its lines. */
const guide = (info: string, ...code: string[]) => blocksOf('docs/guide.md', ['Text.', `\`\`\`${info}`, ...code, '```', ''].join('\n'))
const wrong = (info: string, ...code: string[]) => complaints(guide(info, ...code), around)

test('a program that says nothing of what it prints is refused, with its place', () => {
  expect(wrong('ts', 'await bus.close()')).toEqual([expect.stringMatching(/^docs\/guide\.md:3: it says nothing of what it prints/)])
  expect(wrong('ts', "console.log('a') // → a")).toEqual([])
  expect(wrong('ts no-run: it needs a mail server', 'await bus.close()')).toEqual([])
})

test('a block in a language that nobody checks is refused', () => {
  expect(wrong('python', 'print(1)')).toEqual([expect.stringContaining('nobody checks a block of "python"')])
  expect(wrong('', 'who knows')).toHaveLength(1)
  expect(wrong('python by=test/there.test.ts', 'print(1)')).toEqual([])
  expect(wrong('yaml no-run: it needs a cluster', 'a: 1')).toEqual([])
  expect(wrong('text', 'output')).toEqual([])
})

test('a claim by a test that does not exist, or says nothing of the document, is refused', () => {
  expect(wrong('ts by=test/nowhere.test.ts', '')).toEqual(['docs/guide.md:3: there is no test/nowhere.test.ts'])
  const claimed = (document: string) => blocksOf(document, '<!-- examples: test/there.test.ts -->\n\n```python\n1\n```\n')
  expect(complaints(claimed('docs/guide.md'), around)).toEqual([])
  expect(complaints(claimed('docs/else.md'), around)).toEqual(['docs/else.md:4: test/there.test.ts says nothing of else.md'])
})

test('what imports a package of nobody here must be in the tests of clients', () => {
  const code = "import { sql } from 'drizzle-orm/pg-core' // → a"
  expect(wrong('ts', code)).toEqual([expect.stringContaining('it imports drizzle-orm, and no test of test/clients says guide.md')])
  const other = blocksOf('docs/other.md', `\`\`\`ts\n${code}\n\`\`\`\n`)
  expect(complaints(other, around)).toEqual([])
  expect(programsOf(other, around)).toEqual([])
  expect(wrong('ts of=pg-boss', "import { PgBoss } from 'pg-boss'")).toEqual([])
  expect(wrong('ts of=agenda', "import { Agenda } from 'agenda'")).toHaveLength(1)
})

test('a file that nobody imports or starts is refused', () => {
  expect(wrong('ts file=worker.ts', 'export {}')).toEqual([expect.stringContaining('nobody imports or starts worker.ts')])
  const started = blocksOf('docs/guide.md', '```ts file=worker.ts\nexport {}\n```\n```sh\nnode worker.ts\n```\n')
  expect(complaints(started, around)).toEqual([])
})

test('what follows the language must be understood, and a block must end', () => {
  expect(() => guide('ts norun: typing error', '1')).toThrow('docs/guide.md:2: "norun: typing error"')
  expect(() => blocksOf('docs/guide.md', '```ts\n1\n')).toThrow('docs/guide.md:1: the block is never closed')
})

test('a program keeps the lines of its document, over the blocks that go on with it', async () => {
  const text = 'Text.\n\n```ts\nconst a: number = 1\n```\n\nMore.\n\n```ts continued\nconst b: string = a\nconsole.log(b) // → 1\n```\n'
  const blocks = blocksOf('docs/guide.md', text)
  expect(complaints(blocks, around)).toEqual([])
  const programs = programsOf(blocks, around)
  expect(programs).toMatchObject([{ path: 'guide/line-4.ts', outputs: ['1'], line: 4 }])
  await using project = await Project.create(programs, await surroundings())
  expect(await project.compile(programs)).toMatch(/^guide\/line-4\.ts\(10,7\): error TS2322.*\n$/)
}, 60_000)

test('an output is a whole line, but for what it leaves open', () => {
  expect(isOutput('job 1', 'job 12')).toBe(false)
  expect(isOutput('job … (a.b)', 'job 12 (a.b)')).toBe(true)
  expect(isOutput('job … (a.b)', 'job 12 (acb)')).toBe(false)
})

test('commands that do not exist are refused', () => {
  const known: Known = { scripts: new Set(['chaos']), packages: new Set(['pg']), help: 'klieo-bus migrate', has: (file) => file === 'a.ts' }
  const found = (...code: string[]) => guide('sh', ...code).flatMap((block) => wrongCommands(block, known))
  expect(
    found(
      'npm ci && npm run chaos -- --seed 7   # npm run nothing',
      'DATABASE_URL=postgres://x npx klieo-bus migrate --check',
      'npm install --save-dev pg',
      "node a.ts & printf '%s\\n' 'a | frob'",
    ),
  ).toEqual([])
  expect(found('npm run frob')).toEqual(['docs/guide.md:3: package.json has no script "frob"'])
  expect(found('', 'npx klieo-bus frob')).toEqual(['docs/guide.md:4: klieo-bus has no command "frob"'])
  expect(found('npm install pgg')).toHaveLength(1)
  expect(found('node b.ts')).toHaveLength(1)
  expect(found('echo 1 | frobnicate')).toHaveLength(1)
})

test('statements end where their line does, bodies in dollars apart, and keep what they say that they answer', () => {
  const [block] = guide(
    'sql',
    '-- A comment.',
    "select 1, 'a;b'; -- → 1 | a;b",
    'create function f() returns int language sql as $$',
    '  select 1;',
    '$$;',
    'select f();',
    '-- → 1',
    'select 2',
  )
  expect(statementsOf(block!)).toEqual([
    { text: "-- A comment.\nselect 1, 'a;b';", line: 3, rows: ['1 | a;b'] },
    { text: 'create function f() returns int language sql as $$\n  select 1;\n$$;', line: 5, rows: [] },
    { text: 'select f();', line: 8, rows: ['1'] },
    { text: 'select 2', line: 10, rows: [] },
  ])
})
