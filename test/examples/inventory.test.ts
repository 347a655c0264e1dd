import { execFile } from 'node:child_process'
import { mkdtemp, readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { jetstreamManager } from '@nats-io/jetstream'
import { connect } from '@nats-io/transport-node'
import pg from 'pg'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { startAggregates } from '../../examples/inventory/aggregates.ts'
import { openBus } from '../../examples/inventory/backend.ts'
import { createKeys, createTables, type Schemas } from '../../examples/inventory/database.ts'
import { addHalf, sweep } from '../../examples/inventory/enqueue.ts'
import { complaints, readBusCounts, readCounts } from '../../examples/inventory/report.ts'
import { RESULTS, type Result } from '../../examples/inventory/topics.ts'
import { encode, PostgresBus } from '../../src/index.ts'
import { type Child, type Exit, startChild } from '../support/child.ts'
import { type NatsServer, ownNatsServer, whyNoOwnNats } from '../support/nats-server.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'

const MAIN = new URL('../../examples/inventory/main.ts', import.meta.url)
const PROJECT = fileURLToPath(new URL('../../', import.meta.url))
const exec = promisify(execFile)
/** A run takes a few seconds; this is for a machine that does much else. */
const RUN_MS = 120_000

let pool: pg.Pool

beforeAll(() => {
  pool = new pg.Pool({ connectionString: databaseUrl(), max: 2 })
})

afterAll(() => pool.end())

function start(args: string[] = [], url = databaseUrl(), group = false): Child {
  return startChild(MAIN, { args, env: { DATABASE_URL: url }, group })
}

async function outputOf(child: Child): Promise<string> {
  await child.exited
  return child
    .unread()
    .map(({ text }) => String(text))
    .join('\n')
}

/** The number behind a name in the table at the end. */
function figure(output: string, name: string): number {
  const line = output.split('\n').find((text) => text.startsWith(`  ${name}  `))
  return Number(
    line
      ?.slice(name.length + 2)
      .match(/[\d,]+/)?.[0]
      .replaceAll(',', ''),
  )
}

async function existing(schemas: readonly string[]): Promise<string[]> {
  const { rows } = await pool.query<{ nspname: string }>('select nspname from pg_namespace where nspname = any($1)', [schemas])
  return rows.map(({ nspname }) => nspname)
}

function schemasIn(output: string): string[] {
  return output.match(/\b(inventory|klieo)_[0-9a-f]{8}\b/g) ?? []
}

interface Run {
  readonly output: string
  readonly stderr: string
  readonly exit: Exit
}

/** Two at once, the second one with --keep: made once, looked at by several tests. */
let runs: Promise<Run[]> | undefined
function twoRuns(): Promise<Run[]> {
  runs ??= Promise.all(
    [[], ['--keep']].map(async (args) => {
      await using child = start(args)
      const output = await outputOf(child)
      return { output, stderr: child.stderr, exit: await child.exited }
    }),
  )
  return runs
}

test(
  'J1, J3, P7 two runs at once lose nothing and double nothing, although a worker of each is killed at work',
  async () => {
    for (const { output, stderr, exit } of await twoRuns()) {
      expect(stderr).toBe('')
      expect(output).toMatch(/kill -9 \d+: worker-\d/)
      expect(output).toMatch(/came back: attempt 2/)
      expect(figure(output, 'packages in the lock file')).toBeGreaterThan(100)
      expect(figure(output, 'jobs enqueued')).toBe(figure(output, 'packages in the lock file'))
      expect(figure(output, 'results')).toBe(figure(output, 'packages in the lock file'))
      expect(figure(output, 'lost')).toBe(0)
      expect(figure(output, 'doubled')).toBe(0)
      expect(figure(output, 'redelivered')).toBeGreaterThan(0)
      expect(figure(output, 'left of the rolled back')).toBe(0)
      expect(output).toMatch(/Everything adds up/)
      expect(exit).toEqual({ code: 0, signal: null })
    }
  },
  RUN_MS,
)

test(
  'K5 the lease of the reporter moves on when its holder is killed, and the fence grows',
  async () => {
    for (const { output } of await twoRuns()) {
      const elected = [...output.matchAll(/(worker-\d) is elected to report progress \(lease with fence (\d+)\)/g)]
      const killed = elected.findIndex(([, name]) => name === output.match(/kill -9 \d+: (worker-\d)/)?.[1])
      expect(killed).toBeGreaterThanOrEqual(0)
      expect(elected[killed + 1]?.[1]).toMatch(/worker-\d/)
      expect(elected[killed + 1]?.[1]).not.toBe(elected[killed]?.[1])
      expect(Number(elected[killed + 1]?.[2])).toBeGreaterThan(Number(elected[killed]?.[2]))
    }
  },
  RUN_MS,
)

test(
  'without a terminal the output is plain, and what stands above the queries fits into 80 columns',
  async () => {
    const [plain] = await twoRuns()
    // biome-ignore lint/suspicious/noControlCharactersInRegex: escape sequences are what must not be there
    expect(plain?.output).not.toMatch(/[\x1b\r]/)
    expect(Math.max(...(plain?.output ?? '').split('\n').map((line) => line.length))).toBeLessThanOrEqual(80)
  },
  RUN_MS,
)

test(
  'a run takes its schemas with it, and with --keep leaves them and prints queries that work',
  async () => {
    const [plain, kept] = await twoRuns()
    const gone = new Set(schemasIn(plain?.output ?? ''))
    const there = new Set(schemasIn(kept?.output ?? ''))
    expect([gone.size, there.size]).toEqual([2, 2])
    expect(await existing([...gone])).toEqual([])
    expect((await existing([...there])).sort()).toEqual([...there].sort())

    const queries = kept?.output.match(/^ {2}select [^;]+;/gm) ?? []
    expect(queries).toHaveLength(4)
    for (const query of queries) expect((await pool.query(query)).rowCount).toBeGreaterThan(0)
    await pool.query(kept?.output.match(/drop schema [^;]+;/)?.[0] ?? '')
    expect(await existing([...there])).toEqual([])
  },
  RUN_MS,
)

test(
  'Ctrl-C in the middle ends the workers and leaves nothing in the database',
  async () => {
    await using child = start([], databaseUrl(), true)
    const tables = await child.next(({ text }) => /tables in schema/.test(String(text)), RUN_MS)
    const started = await child.next(({ text }) => /workers started/.test(String(text)), RUN_MS)
    const pids = (/processes (.*)/.exec(String(started.text))?.[1] ?? '').split(', ').map(Number)
    expect(pids).toHaveLength(3)
    child.interruptGroup('SIGINT')

    expect(await child.exited).toEqual({ code: 130, signal: null })
    expect(child.stderr).toBe('')
    for (const pid of pids) await eventually(() => !isAlive(pid), { what: `the end of worker ${pid}` })
    expect(await existing(schemasIn(String(tables.text)))).toEqual([])
  },
  RUN_MS,
)

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0)
    return true
  } catch {
    return false
  }
}

test(
  '--keep leaves the data, and the queries that it prints run as they are',
  async () => {
    await using child = start(['--keep'])
    const output = await outputOf(child)
    const schemas = [...new Set(schemasIn(output))]
    try {
      expect(await child.exited).toEqual({ code: 0, signal: null })
      expect((await existing(schemas)).sort()).toEqual([...schemas].sort())
      const [table, afterlife] = output.split('Open the database with')
      expect(table).toMatch(/Everything adds up/)
      const queries = afterlife!.split('\n\n').filter((part) => part.startsWith('  -- '))
      expect(queries).toHaveLength(3)
      for (const query of queries) {
        for (const { rows } of [await pool.query(query)].flat()) expect(rows, query).not.toEqual([])
      }
    } finally {
      for (const schema of schemas) await pool.query(`drop schema if exists ${schema} cascade`)
    }
  },
  RUN_MS,
)

test('--help is for a terminal of 80 columns, and exits with 0', async () => {
  await using child = start(['--help'])
  const output = await outputOf(child)
  expect(await child.exited).toEqual({ code: 0, signal: null })
  expect(output).toMatch(/--keep/)
  expect(Math.max(...output.split('\n').map((line) => line.length))).toBeLessThanOrEqual(80)
})

test.each([
  [['--kep'], "Unknown option '--kep'"],
  [['--backend', 'kafka'], "--backend is postgres or nats, not 'kafka'"],
  [['--backend'], "Option '--backend <value>' argument missing"],
])('%j is refused in one line, with exit code 2', async (args, sentence) => {
  await using child = start(args)
  expect(await child.exited).toEqual({ code: 2, signal: null })
  expect(child.stderr).toBe(`inventory: ${sentence}; see npm start -- --help\n`)
})

test('a server that cannot be reached is told of in one line, with exit code 1', async () => {
  await using child = start([], 'postgres://nobody@127.0.0.1:1/nowhere')
  expect(await child.exited).toEqual({ code: 1, signal: null })
  expect(child.stderr).toMatch(/^inventory: the server of DATABASE_URL does not answer: .*ECONNREFUSED.*\n$/)
})

/** What a run leaves of three packages, one of them not installed and one that needed two attempts; it adds up. */
async function makeSoundRun(): Promise<Schemas> {
  const schemas = { inventory: freshSchema(), bus: freshSchema() }
  await using bus = await PostgresBus.connect({ pool, schema: schemas.bus, maintenance: false })
  await createTables(pool, schemas)
  const { inventory } = schemas
  await pool.query(`
    insert into ${inventory}.packages values
      ('node_modules/a', 'a', '1.0.0', '1'), ('node_modules/b', 'b', '1.0.0', '2'), ('node_modules/c', 'c', '1.0.0', '3');
    insert into ${inventory}.results values
      ('node_modules/a', 'worker-1', 1, true, 'MIT', 2, 20, 'x'),
      ('node_modules/b', 'worker-1', 2, true, 'ISC', 1, 10, 'y'),
      ('node_modules/c', 'worker-2', 1, false, '', 0, 0, '');
    insert into ${inventory}.licences values ('MIT', 1), ('ISC', 1);
    insert into ${inventory}.sizes values ('up to 0.1 MB', 2, 30), ('not installed', 1, 0);
  `)
  for (const subject of ['installed', 'installed', 'missing']) await bus.pubsub.publish(`inventory.result.${subject}`, '{}')
  return schemas
}

let sound: Promise<Schemas> | undefined

async function figuresOf(db: pg.Pool | pg.ClientBase, schemas: Schemas) {
  return { ...(await readCounts(db, schemas)), ...(await readBusCounts(db, schemas)) }
}

/** What is said about the sound run once it is doctored; every test doctors it in a transaction that is rolled back. */
async function complaintsAfter(doctor: (schemas: Schemas) => string): Promise<string> {
  sound ??= makeSoundRun()
  const schemas = await sound
  await using client = await session(databaseUrl())
  await client.query('begin')
  await client.query(doctor(schemas))
  return complaints(3, await figuresOf(client, schemas)).join('\n')
}

test('figures that add up are not complained about', async () => {
  expect(await complaintsAfter(() => 'select')).toBe('')
})

type Doctor = (schemas: Schemas) => string
const NEVER = 'node_modules/never-committed'
const DOCTORED: [string, Doctor, RegExp][] = [
  ['a result that is missing', ({ inventory: i }) => `delete from ${i}.results where path like '%/c'`, /1 packages have no result/],
  [
    'a result that is there twice',
    ({ inventory: i }) => `insert into ${i}.results select * from ${i}.results where path like '%/a'`,
    /1 results are there twice/,
  ],
  ['a row without a job', ({ inventory: i }) => `update ${i}.packages set job_id = '1'`, /3 packages, but 1 jobs/],
  [
    'a package that is missing',
    ({ inventory: i }) => `delete from ${i}.packages where path like '%/a'`,
    /lists 3 packages, the table holds 2/,
  ],
  ['a run without a redelivery', ({ inventory: i }) => `update ${i}.results set attempt = 1`, /no job was redelivered/],
  ['a licence added twice', ({ inventory: i }) => `update ${i}.licences set packages = 2 where licence = 'MIT'`, /3 licences counted/],
  ['a size added twice', ({ inventory: i }) => `update ${i}.sizes set packages = 3 where bytes > 0`, /4 sizes counted/],
  ['a sum that is wrong', ({ inventory: i }) => `update ${i}.sizes set bytes = 31 where bytes > 0`, /30 bytes in the results, but 31/],
  ['a message too many', ({ bus: b }) => `select ${b}.publish('inventory.result.missing', '{}')`, /3 results, but 4 messages/],
  ['a job that is left', ({ bus: b }) => `select ${b}.enqueue('inventory', '{"path":"x"}')`, /1 jobs are still there, 0 of them dead/],
  ['a rolled-back row that exists', ({ inventory: i }) => `insert into ${i}.packages values ('${NEVER}', '', '', '9')`, /rolled-back/],
  ['a rolled-back job that exists', ({ bus: b }) => `select ${b}.enqueue('inventory', '{"path":"${NEVER}"}')`, /rolled-back/],
]

test.each(DOCTORED)('%s is complained about', async (_, doctor, complaint) => {
  expect(await complaintsAfter(doctor)).toMatch(complaint)
})

test.each([
  [
    'a worker killed after its effect and nothing tried again',
    { resultsAgain: 0, additionsAgain: 0, swept: 2 },
    /no result was tried again/,
  ],
  ['a sweep that found nothing', { resultsAgain: 1, additionsAgain: 0, swept: 0 }, /the sweep found none/],
  ['what was tried again and swept', { resultsAgain: 1, additionsAgain: 3, swept: 2 }, /^$/],
])('without transactions: %s', async (_, keys, complaint) => {
  sound ??= makeSoundRun()
  expect(complaints(3, { ...(await figuresOf(pool, await sound)), keys }).join()).toMatch(complaint)
})

test(
  'a run whose figures do not add up says so and exits with 1',
  async () => {
    await using child = start()
    const tables = await child.next(({ text }) => /tables in schema/.test(String(text)), RUN_MS)
    const inventory = schemasIn(String(tables.text)).find((name) => name.startsWith('inventory_'))
    // From here on the run waits for a lease of two seconds to run out: there is time to tamper with what it counts.
    await child.next(({ text }) => /kill -9/.test(String(text)), RUN_MS)
    const { rowCount } = await pool.query(
      `update ${inventory}.licences set packages = packages + 1000 where licence = (select min(licence) from ${inventory}.licences)`,
    )
    expect(rowCount).toBe(1)

    const output = await outputOf(child)
    expect(output).toMatch(/does not add up: \d+ packages installed, but 1\d\d\d licences counted/)
    expect(output).not.toMatch(/Everything adds up/)
    expect(await child.exited).toEqual({ code: 1, signal: null })
  },
  RUN_MS,
)

function startOnNats(env: Readonly<Record<string, string | undefined>>, args: string[] = [], group = false): Child {
  return startChild(MAIN, {
    args: ['--backend', 'nats', ...args],
    env: { DATABASE_URL: databaseUrl(), NATS_URL: undefined, ...env },
    group,
  })
}

test.each([
  [
    'no nats-server is installed',
    { PATH: '/nowhere' },
    /^inventory: there is no nats-server on the PATH, and NATS_URL is not set: install one .*\n$/,
  ],
  ['NATS_URL leads nowhere', { NATS_URL: '127.0.0.1:1' }, /^inventory: the bus cannot be on the server of NATS_URL: .*refused\n$/],
  ['NATS_URL has a user', { NATS_URL: 'nats://u:p@127.0.0.1:1' }, /^inventory: NATS_URL is host:port.*without a user\n$/],
])('on NATS: %s, which is told in one line, with exit code 1', async (_, env, sentence) => {
  await using child = startOnNats(env)
  expect(await child.exited).toEqual({ code: 1, signal: null })
  expect(child.stderr).toMatch(sentence)
})

const missing = whyNoOwnNats()

describe.skipIf(missing !== undefined)(`the example on NATS${missing === undefined ? '' : ` (${missing})`}`, () => {
  let shared: NatsServer
  /** Where a nats-server of a run's own has its store. */
  let temporary: string

  beforeAll(async () => {
    shared = await ownNatsServer()
    temporary = await mkdtemp(join(tmpdir(), 'klieo-test-'))
  })

  afterAll(async () => {
    await shared?.remove()
    await rm(temporary, { recursive: true, force: true })
  })

  async function streams(prefix: string | undefined): Promise<string[]> {
    const nats = await connect({ servers: shared.url })
    try {
      const names: string[] = []
      for await (const name of (await jetstreamManager(nats)).streams.names()) if (name.includes(`${prefix}_`)) names.push(name)
      return names
    } finally {
      await nats.close()
    }
  }

  /** A nats-server of its own is gone, and so is its store. */
  async function expectNoServer(url: string): Promise<void> {
    await eventually(
      () =>
        connect({ servers: url }).then(
          (nats) => nats.close().then(() => false),
          () => true,
        ),
      { what: 'the end of nats-server' },
    )
    await eventually(async () => (await readdir(temporary)).length === 0, { what: 'the end of its store' })
  }

  test(
    'J1, J3, J5, P12 with nothing but keys a run on a server of its own loses nothing and doubles nothing, and takes the server with it',
    async () => {
      await using child = startOnNats({ TMPDIR: temporary })
      const output = await outputOf(child)
      expect(child.stderr).toBe('')
      expect(output).toMatch(/job was not acked/)
      expect(output).toMatch(/came back: attempt 2 by worker-\d/)
      const packages = figure(output, 'packages in the lock file')
      expect(packages).toBeGreaterThan(100)
      for (const name of ['jobs enqueued', 'results', 'counted by durable "sizes"']) expect(figure(output, name), name).toBe(packages)
      for (const name of ['lost', 'doubled', 'left of the rolled back']) expect(figure(output, name), name).toBe(0)
      expect(figure(output, 'redelivered')).toBeGreaterThan(0)
      expect(figure(output, 'tried again')).toBeGreaterThan(0)
      expect(figure(output, 'enqueued by the sweep')).toBe(2)
      expect(output).toMatch(/Everything adds up/)
      expect(Math.max(...output.split('\n').map((line) => line.length))).toBeLessThanOrEqual(80)
      expect(await child.exited).toEqual({ code: 0, signal: null })
      await expectNoServer(serverIn(output))
      expect(await existing(schemasIn(output))).toEqual([])
    },
    RUN_MS,
  )

  test(
    '--keep leaves rows and streams, and what it prints runs as it is',
    async () => {
      await using child = startOnNats({ NATS_URL: shared.url }, ['--keep'])
      const output = await outputOf(child)
      expect(await child.exited).toEqual({ code: 0, signal: null })
      expect(output).toMatch(/Everything adds up/)
      const queries = output.match(/^ {2}select [^;]+;/gm) ?? []
      expect(queries).toHaveLength(2)
      for (const query of queries) expect((await pool.query(query)).rowCount, query).toBeGreaterThan(0)

      const [look, remove] = output.match(/^ {2}node --input-type=module -e "[^"]+"/gm) ?? []
      const run = (command = '') => exec('/bin/sh', ['-c', command], { cwd: PROJECT, env: { ...process.env, NATS_URL: shared.url } })
      expect((await run(look)).stdout).toMatch(/^\d+ klieo_\w+\.msg\.inventory\.result\.installed \{.*"worker":"worker-\d"/)
      const tables = schemasIn(output)
      const prefix = tables.find((name) => name.startsWith('klieo_'))
      expect(await streams(prefix)).toHaveLength(6)
      await run(remove)
      expect(await streams(prefix)).toEqual([])
      await pool.query(output.match(/drop schema [^;]+;/)?.[0] ?? '')
      expect(await existing(tables)).toEqual([])
    },
    RUN_MS,
  )

  test(
    'Ctrl-C in the middle leaves neither streams nor schemas on servers that others use',
    async () => {
      await using child = startOnNats({ NATS_URL: shared.url }, [], true)
      const tables = await child.next(({ text }) => /tables in schema/.test(String(text)), RUN_MS)
      await child.next(({ text }) => /workers started/.test(String(text)), RUN_MS)
      const schemas = schemasIn(String(tables.text))
      const prefix = schemas.find((name) => name.startsWith('klieo_'))
      expect(await streams(prefix)).toHaveLength(6)
      child.interruptGroup('SIGINT')
      expect(await child.exited).toEqual({ code: 130, signal: null })
      expect(child.stderr).toBe('')
      expect(await streams(prefix)).toEqual([])
      expect(await existing(schemas)).toEqual([])
    },
    RUN_MS,
  )

  test('P5, J5 what is delivered or enqueued a second time is known by its key', async () => {
    const schemas = { inventory: freshSchema(), bus: '' }
    const { inventory } = schemas
    await using bus = await openBus({ backend: 'nats', servers: [shared.url], prefix: 'keys' }, pool, true)
    await createTables(pool, schemas)
    await createKeys(pool, schemas)

    const packages = ['a', 'b'].map((name) => ({ path: `node_modules/${name}`, name, version: '1.0.0' }))
    await addHalf(bus, pool, schemas, packages[0]!, packages[1]!)
    expect([await sweep(bus, pool, schemas), await sweep(bus, pool, schemas)]).toEqual([2, 0])
    const jobs: string[] = []
    for await (const { dedupKey = '' } of bus.admin.jobs()) jobs.push(dedupKey)
    expect(jobs.sort()).toEqual(['node_modules/a', 'node_modules/b'])

    const result: Result = {
      path: 'node_modules/a',
      worker: 'w',
      attempt: 1,
      installed: true,
      licence: 'MIT',
      files: 1,
      bytes: 7,
      sha256: '',
    }
    for (const msgId of ['first', 'more than two minutes later']) await bus.pubsub.publish(RESULTS.installed, encode(result), { msgId })
    await startAggregates(bus, pool, schemas)
    const added = () => pool.query(`select durable, tries from ${inventory}.added order by durable`).then(({ rows }) => rows)
    await eventually(async () => (await added()).filter(({ tries }) => tries === 2).length === 2, { what: 'both, twice' })
    const { rows } = await pool.query(
      `select l.packages as licences, s.packages as sizes, s.bytes::int from ${inventory}.licences l, ${inventory}.sizes s`,
    )
    expect(rows).toEqual([{ licences: 1, sizes: 1, bytes: 7 }])
  })

  test.each(['SIGINT', 'SIGKILL'] as const)(
    'a server of its own does not outlive %s in the middle',
    async (signal) => {
      await using child = startOnNats({ TMPDIR: temporary }, [], true)
      const server = await child.next(({ text }) => /nats-server \d/.test(String(text)), RUN_MS)
      const tables = await child.next(({ text }) => /tables in schema/.test(String(text)), RUN_MS)
      await child.next(({ text }) => /workers started/.test(String(text)), RUN_MS)
      child.interruptGroup(signal)
      await child.exited
      await expectNoServer(serverIn(String(server.text)))
      if (signal === 'SIGKILL')
        for (const schema of schemasIn(String(tables.text))) await pool.query(`drop schema if exists ${schema} cascade`)
    },
    RUN_MS,
  )
})

function serverIn(output: string): string {
  return /nats-server [\d.]+ on (\S+)/.exec(output)?.[1] ?? ''
}
