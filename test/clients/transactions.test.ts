/** Each client's own transaction as `tx`: the same scenario (programs/scenario.ts) on the real client and a real server. */

import { copyFile, readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { type Child, type Line, startChild } from '../support/child.ts'
import { Project } from './project.ts'

const programs = join(import.meta.dirname, 'programs')
let project: Project

beforeAll(async () => {
  project = await Project.make()
  for (const name of await readdir(programs)) await copyFile(join(programs, name), project.path(name))
  await project.generatePrismaClient()
}, 300_000)

afterAll(() => project[Symbol.asyncDispose]())

test('each adapter takes its client’s transaction, and refuses what it can tell apart, as the types of both say', async () => {
  const names = (await readdir(programs)).filter((name) => name.endsWith('.ts'))
  expect(names.length).toBeGreaterThan(8)
  await project.compileStrictly(names)
}, 120_000)

interface Case {
  readonly name: string
  readonly args: readonly [module: string, exported?: string]
  /** What of the mistaken ones is refused beside `nothing`, and by whom it is known that a transaction is over. */
  readonly mistaken: readonly string[]
  readonly knowsOver: boolean
  readonly nests: boolean
  /** Its rows are written by the commit. @default false */
  readonly defers?: boolean
  /** It does not answer on a connection that it has lost: while it was idle, or ever. */
  readonly hangs?: 'idle' | 'ever'
}

const STEP_MS = 60_000

const CASES: readonly Case[] = [
  { name: 'pg', args: ['pg'], mistaken: ['pool'], knowsOver: false, nests: false },
  { name: 'Kysely', args: ['kysely'], mistaken: ['database'], knowsOver: true, nests: false },
  { name: 'Drizzle on node-postgres', args: ['drizzle', 'connectOnPg'], mistaken: ['database', 'nothing'], knowsOver: false, nests: true },
  {
    name: 'Drizzle on postgres.js, on one connection',
    args: ['drizzle', 'connectOnPostgresJs'],
    mistaken: ['database', 'nothing'],
    knowsOver: true,
    nests: true,
  },
  { name: 'postgres.js', args: ['postgres-js'], mistaken: ['instance', 'nothing'], knowsOver: true, nests: true, hangs: 'idle' },
  {
    name: 'postgres.js that renames, on one connection',
    args: ['postgres-js', 'connectTransforming'],
    mistaken: ['instance', 'nothing'],
    knowsOver: true,
    nests: true,
  },
  {
    name: 'postgres.js on a reserved connection',
    args: ['postgres-js', 'connectReserved'],
    mistaken: [],
    knowsOver: true,
    nests: false,
    hangs: 'ever',
  },
  { name: 'Knex', args: ['knex'], mistaken: ['instance', 'nothing'], knowsOver: true, nests: true },
  { name: 'Knex with a hook', args: ['knex', 'connectHooked'], mistaken: ['instance', 'nothing'], knowsOver: true, nests: true },
  { name: 'Prisma', args: ['prisma'], mistaken: ['client', 'nothing'], knowsOver: true, nests: false },
  { name: 'Prisma, extended', args: ['prisma', 'connectExtended'], mistaken: ['client'], knowsOver: true, nests: false },
  { name: 'TypeORM', args: ['typeorm'], mistaken: ['dataSource', 'manager', 'query runner', 'nothing'], knowsOver: true, nests: true },
  { name: 'TypeORM on a query runner', args: ['typeorm', 'connectOnQueryRunner'], mistaken: [], knowsOver: true, nests: false },
  { name: 'MikroORM', args: ['mikro-orm'], mistaken: ['entity manager', 'nothing'], knowsOver: true, nests: true },
  { name: 'MikroORM by hand', args: ['mikro-orm', 'connectByHand'], mistaken: [], knowsOver: true, nests: false, defers: true },
]

const NOTHING = {
  ...{ row: 0, messages: 0, intact_messages: 0, intact_headers: 0, jobs: 0, intact_jobs: 0, held_messages: 1, held_jobs: 1 },
  ...{ put: null, cas: 'before', gone: 'before' },
}
const EVERYTHING = {
  ...{ row: 1, messages: 3, intact_messages: 2, intact_headers: 1, jobs: 3, intact_jobs: 1, held_messages: 0, held_jobs: 0 },
  ...{ put: 'intact', cas: 'intact', gone: null },
}

describe.each(CASES)('the transaction of $name', { timeout: STEP_MS + 5_000 }, ({ args, mistaken, knowsOver, nests, hangs, defers }) => {
  let child: Child

  beforeAll(async () => {
    child = startChild(project.path('scenario.ts'), {
      args: args.filter((arg) => arg !== undefined),
      env: { DATABASE_URL: await project.database() },
      cwd: project.directory,
    })
    await child.next((line) => line.ready === args[0], STEP_MS)
  })

  afterAll(async () => {
    child.endInput()
    const timer = setTimeout(() => child.signal('SIGKILL'), STEP_MS)
    const exit = await child.exited
    clearTimeout(timer)
    expect(exit).toEqual({ code: 0, signal: null })
  })

  async function step(name: string): Promise<Line> {
    child.send({ step: name })
    const { step: _, ...facts } = await child.next((line) => line.step === name, STEP_MS)
    return facts
  }

  test('P1 J1 P7 commit: the row, what it published, enqueued and wrote, and its acks, are there together, and nothing before', async () => {
    expect(await step('commit')).toEqual({ open: NOTHING, after: EVERYTHING })
  })

  test('P1 J1 P7 rollback: none of it is, and what it had acked can be acked again', async () => {
    expect(await step('rollback')).toEqual({ failed: 'no', after: NOTHING, later: { ...NOTHING, held_messages: 0, held_jobs: 0 } })
  })

  test('P1 J1 a unique violation in the middle leaves nothing, the client throws it as ever, and a call after it in the transaction is conflict', async () => {
    expect(await step('unique violation')).toEqual({ state: '23505', next: defers ? 'ok' : 'conflict', after: NOTHING })
  })

  test('P7 K2 a refused ack and a lost cas in the middle take nothing with them', async () => {
    const codes = ['lease_lost', 'cas_conflict', 'cas_conflict', 'already_settled']
    expect(await step('refused')).toEqual({ codes, holder: 'ok', after: EVERYTHING })
  })

  test.runIf(nests)('P1 J1 what a savepoint of its own rolls back is gone, and the rest stays', async () => {
    expect(await step('nested')).toEqual({ after: NOTHING, outer: true })
  })

  test('P14 whoever waits is woken by the commit', async () => {
    const { job, tookMs } = await step('wake up')
    expect(job).toBe(true)
    expect(tookMs).toBeLessThan(5_000)
  })

  test('section 7 what the server refuses has the bus’s code and the server’s SQLSTATE, and neither payload nor statement', async () => {
    expect(await step('errors')).toEqual({
      'too large': ['payload_too_large', 'none'],
      'too large for the table': ['payload_too_large', '23514'],
      'refused by a rule': ['invalid_argument', '23514'],
      leaks: false,
      outdated: ['schema_outdated', '42883'],
    })
  })

  test('section 7 what is no transaction, or none any more, is refused', async () => {
    const found = Object.fromEntries([...mistaken, ...(knowsOver ? ['over'] : [])].map((name) => [name, 'invalid_argument']))
    expect(await step('mistaken')).toEqual({ found, enqueued: 0 })
  })

  test('P1 J1 two thousand jobs and a megabyte arrive as they were', async () => {
    expect(await step('volume')).toEqual({ jobs: 2_000, large: true })
  })

  test.skipIf(hangs)('P1 J1 a call after the connection was lost is refused, and is in nobody else’s transaction', async () => {
    const { code, ...left } = await step('connection lost while idle')
    expect(['connection', 'invalid_argument']).toContain(code)
    expect(left).toEqual({ enqueued: 0, after: NOTHING })
  })

  test.skipIf(hangs === 'ever')(
    'section 7 a connection that is lost during a call is told as connection, and nothing is left',
    async () => {
      expect(await step('connection lost')).toEqual({ code: 'connection', after: NOTHING })
    },
  )
})
