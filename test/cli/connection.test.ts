/** Which server a command talks to, and what it says when it cannot. */

import { randomBytes } from 'node:crypto'
import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { findTarget, shownUrl } from '../../src/cli/connection.ts'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { build, complaint, directory, klieo, shell } from './command.ts'

const SECRET = 'hunter2-and-more'
const schema = freshSchema()
const role = `cli_${randomBytes(5).toString('hex')}`
let owner: Session

beforeAll(async () => {
  await build()
  owner = await session(databaseUrl())
  await PostgresBus.migrate({ connectionString: databaseUrl(), schema })
  await owner.query(`create role ${role} login password '${SECRET}'`)
}, 60_000)

afterAll(async () => {
  await owner.query(`drop role ${role}`)
  await owner[Symbol.asyncDispose]()
})

/** What libpq's variables say of the server of the tests. */
function variables(): Record<string, string> {
  const { hostname, port, pathname, username, password } = new URL(databaseUrl())
  const all = {
    PGHOST: hostname,
    PGPORT: port || '5432',
    PGDATABASE: pathname.slice(1),
    PGUSER: decodeURIComponent(username),
    PGPASSWORD: decodeURIComponent(password),
  }
  return Object.fromEntries(Object.entries(all).filter(([, value]) => value !== ''))
}

describe('a command connects', () => {
  test('by DATABASE_URL: a pipe of jobs comes out as it went in', async () => {
    const env = { DATABASE_URL: databaseUrl(), KLIEO_SCHEMA: schema }
    expect((await shell("printf '%s\\n' a b c | klieo-bus enqueue by-url", { env })).stdout).toBe('3 jobs enqueued in "by-url"\n')
    expect((await shell("klieo-bus work by-url --exec 'cat' --until-empty", { env })).stdout).toBe('abc')
  })

  test('by PG* variables', async () => {
    const env = { ...variables(), KLIEO_SCHEMA: schema }
    expect((await shell("printf '%s\\n' a b c | klieo-bus enqueue by-variables", { env })).stdout).toBe(
      '3 jobs enqueued in "by-variables"\n',
    )
    expect((await shell("klieo-bus work by-variables --exec 'cat' --until-empty", { env })).stdout).toBe('abc')
  })

  test('by --url and --schema, which outrank the environment, before the command or after it', async () => {
    const env = { DATABASE_URL: 'postgres://127.0.0.1:1/none', KLIEO_SCHEMA: 'none' }
    const options = ['--url', databaseUrl(), '--schema', schema]
    expect((await klieo(['kv', 'put', 'b', 'k', 'v', ...options], { env })).code).toBe(0)
    expect((await klieo([...options, 'kv', 'get', 'b', 'k'], { env })).stdout).toBe('v')
  })

  test('by the first of them that is there', async () => {
    await using place = await directory()
    const state = { url: 'postgres://me:secret@127.0.0.1:7/up', schema: 'ups', pid: process.pid }
    await mkdir(join(place.path, '.klieo'))
    await mkdir(join(place.path, 'below'))
    await writeFile(join(place.path, '.klieo', 'up.json'), JSON.stringify(state))
    const below = join(place.path, 'below')
    const url = 'postgres://me:secret@host/db'
    expect(findTarget(url, 'x', { DATABASE_URL: 'postgres://other' }, below)).toEqual({
      connectionString: url,
      schema: 'x',
      what: '--url: me@host/db',
    })
    expect(findTarget(undefined, undefined, { DATABASE_URL: url, PGHOST: 'h' }, below)).toMatchObject({
      connectionString: url,
      schema: 'klieo',
    })
    expect(findTarget(undefined, undefined, { PGHOST: 'h', PGUSER: 'u', PGDATABASE: 'd' }, below)).toEqual({
      schema: 'klieo',
      what: 'PG* variables: u@h:5432/d',
    })
    expect(findTarget(undefined, undefined, {}, below)).toEqual({
      connectionString: state.url,
      schema: 'ups',
      what: `klieo-bus up in ${place.path}`,
    })
    // One that has ended without a word.
    await writeFile(join(place.path, '.klieo', 'up.json'), JSON.stringify({ ...state, pid: 2 ** 22 }))
    expect(findTarget(undefined, undefined, {}, below)).toMatchObject({ schema: 'klieo', what: expect.stringContaining('defaults') })
  })

  test('an address is shown without what it may hide', () => {
    expect(shownUrl('postgres://me:secret@host:1/db?password=secret&sslkey=secret')).toBe('me@host:1/db')
    expect(shownUrl('postgres://me:sec ret@:1/db')).not.toContain('sec')
    expect(shownUrl('host=h password=secret')).not.toContain('secret')
    expect(shownUrl('/var/run/postgresql secret')).toBe('/var/run/postgresql')
    expect(shownUrl('https://me:secret@host')).not.toContain('secret')
  })
})

describe('what keeps it from connecting is one sentence without a password, and exit code 1:', () => {
  const changed = (change: (url: URL) => void) => {
    const url = new URL(databaseUrl())
    url.password = SECRET
    change(url)
    return url.href
  }

  const addresses: readonly (readonly [string, string, string])[] = [
    ['nobody listens', changed((url) => (url.port = '1')), '[connection]'],
    ['an unknown host', changed((url) => (url.hostname = 'no.such.host.invalid')), '[connection]'],
    ['a refused login', changed((url) => (url.username = 'nobody_of_this_name')), '[permission_denied]'],
    ['an unknown database', Object.assign(new URL(databaseUrl()), { pathname: '/no_such_database' }).href, '[not_found]'],
  ]

  test.each(addresses)('%s', async (_what, url, code) => {
    for (const ran of [await klieo(['queues', '--url', url], { env: {} }), await klieo(['queues'], { env: { DATABASE_URL: url } })]) {
      expect(ran).toMatchObject({ code: 1, stdout: '' })
      const said = complaint(ran)
      expect(said).toMatch(new RegExp(`\\((--url|DATABASE_URL): .*\\) \\${code}$`))
      expect(said).not.toContain(SECRET)
    }
  })

  test('no schema', async () => {
    const ran = await klieo(['queues', '--schema', 'no_such_schema'])
    expect(ran.code).toBe(1)
    expect(complaint(ran)).toMatch(/^schema "no_such_schema" lacks 0001_tables.*run `klieo-bus migrate`.*\[schema_outdated\]$/)
  })

  test('missing rights: the sentence names the role and the statement that grants them', async () => {
    const url = Object.assign(new URL(databaseUrl()), { username: role, password: SECRET }).href
    for (const args of [['queues'], ['publish', 'a', 'b'], ['enqueue', 'q', 'x'], ['migrate']]) {
      const ran = await klieo([...args, '--schema', schema], { env: { DATABASE_URL: url } })
      expect(ran, args.join(' ')).toMatchObject({ code: 1, stdout: '' })
      expect(complaint(ran)).toMatch(new RegExp(`${role}.*\\[permission_denied\\]$`))
      expect(ran.stderr).not.toContain(SECRET)
    }
    const lines = await klieo(['enqueue', 'q', '--schema', schema], { env: { DATABASE_URL: url }, input: 'a\nb\n' })
    expect(lines.code).toBe(1)
  })

  test('rights for one thing and not for another', async () => {
    await owner.query(`select "${schema}".grant_role('producer', $1)`, [role])
    const env = { DATABASE_URL: Object.assign(new URL(databaseUrl()), { username: role, password: SECRET }).href, KLIEO_SCHEMA: schema }
    expect((await klieo(['enqueue', 'q', 'x'], { env })).code).toBe(0)
    const ran = await klieo(['queues', 'pause', 'q'], { env })
    expect(ran.code).toBe(1)
    expect(complaint(ran)).toMatch(/grant_role.*\[permission_denied\]$/)
    await owner.query(`select "${schema}".revoke_role('producer', $1)`, [role]).catch(() => owner.query(`drop owned by ${role}`))
  })

  test('an address that is none is wrong usage', async () => {
    for (const url of ['mysql://me:hunter2-and-more@host/db', 'no address', 'postgres://host:99999/x']) {
      const ran = await klieo(['queues', '--url', url], { env: {} })
      expect(ran.code).toBe(2)
      expect(complaint(ran)).not.toContain(SECRET)
    }
  })
})

describe('migrate', () => {
  test('--check says what is missing, migrate applies it, and --json has an object for each', async () => {
    const fresh = freshSchema()
    const missing = await klieo(['migrate', '--check', '--schema', fresh])
    expect(missing).toMatchObject({ code: 1, stderr: '' })
    const names = missing.stdout
      .trim()
      .split('\n')
      .map((line) => line.replace('missing ', ''))
    expect(names[0]).toBe('0001_tables')
    const { objects, code } = await klieo(['migrate', '--schema', fresh, '--json'])
    expect(code).toBe(0)
    expect(objects).toEqual([...names.map((migration) => ({ migration, applied: true })), { schema: fresh, upToDate: true }])
    expect(await klieo(['migrate', '--check', '--schema', fresh])).toMatchObject({ code: 0, stdout: `schema "${fresh}" is up to date\n` })
  })

  test('--sql prints one transaction that does what migrate does, to the last function', async () => {
    const [byScript, byMigrate] = [freshSchema(), freshSchema()]
    const { stdout, code } = await klieo(['migrate', '--sql', '--schema', byScript])
    expect(code).toBe(0)
    await owner.query(stdout)
    await owner.query('reset search_path')
    await PostgresBus.migrate({ connectionString: databaseUrl(), schema: byMigrate })
    const contents = async (name: string) => {
      const { rows } = await owner.query(
        `select string_agg(thing, E'\n' order by thing) as all from (
           select c.relkind::text || ' ' || c.relname || ' ' || coalesce(array_to_string(array(select a.attname || ' ' || format_type(a.atttypid, a.atttypmod) from pg_attribute a where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped order by a.attnum), ', '), '') as thing from pg_class c where c.relnamespace = $1::regnamespace
           union all select 'function ' || p.proname || pg_get_function_identity_arguments(p.oid) || coalesce(p.proacl::text, '') from pg_proc p where p.pronamespace = $1::regnamespace
         ) t`,
        [`"${name}"`],
      )
      return (rows[0] as { all: string }).all.replaceAll(name, 'schema')
    }
    expect(await contents(byScript)).toBe(await contents(byMigrate))
    expect(await PostgresBus.migrate({ connectionString: databaseUrl(), schema: byScript, check: true })).toEqual([])
    expect(await PostgresBus.migrate({ connectionString: databaseUrl(), schema: byScript })).toEqual([])
    expect(await klieo(['migrate', '--sql', '--schema', byScript])).toMatchObject({ code: 0, stdout: '' })
    await using bus = await PostgresBus.connect({ connectionString: databaseUrl(), schema: byScript, maintenance: false })
    expect((await bus.pubsub.publish('a', 'b')).seq).toBe(1)
  })
})

test('doctor says what is wrong and what to do, and ends with 1; with 0 where nothing is', async () => {
  const fresh = freshSchema()
  const wrong = await klieo(['doctor', '--schema', fresh])
  expect(wrong.code).toBe(1)
  expect(wrong.stdout).toMatch(/^(error|warning) +.*\n {9}.*klieo-bus migrate/m)
  await PostgresBus.migrate({ connectionString: databaseUrl(), schema: fresh })
  const { objects } = await klieo(['doctor', '--schema', fresh, '--json'])
  expect(objects.length).toBeGreaterThan(3)
  for (const finding of objects) {
    expect(finding).toMatchObject({
      code: expect.any(String),
      level: expect.stringMatching(/^(ok|notice|warning|error)$/),
      message: expect.any(String),
    })
  }
})
