/** docs/sql.md against the catalogs, and its examples against psql. */

import pg from 'pg'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { FreshDatabase, onServer } from './fresh-database.ts'
import { blocksOf, differences, document, findPsql, stepsOf } from './psql.ts'

const text = await document('sql.md')
const psql = await findPsql()

interface Section {
  readonly name: string
  readonly text: string
}

/** The third-level sections of the reference, by what they are named after. */
const sections: Section[] = text
  .split(/^(?=##+ )/m)
  .filter((part) => part.startsWith('### '))
  .map((part) => ({ name: part.slice(4, part.indexOf('\n')), text: part }))
const functions = sections.filter((section) => blocksOf(section.text, 'sql').length > 0)
const views = sections.filter((section) => blocksOf(section.text, 'sql').length === 0)

/** The rows of the one table of a section: the cells of each. */
function tableOf(section: Section): string[][] {
  const lines = section.text.split('\n').filter((line) => line.startsWith('| '))
  return lines.slice(1).map((line) =>
    line
      .split('|')
      .slice(1, -1)
      .map((cell) => cell.trim()),
  )
}

/** As the catalogs print it, with the short names of types. */
function plain(signature: string): string {
  return signature
    .toLowerCase()
    .replaceAll('timestamp with time zone', 'timestamptz')
    .replaceAll('integer', 'int')
    .replaceAll(/::(?:double precision|[a-z0-9]+)(?:\[\])?/g, '')
    .replaceAll(/\s+/g, ' ')
    .replaceAll('returns table(', 'returns table (')
}

let database: FreshDatabase
let client: pg.Client

beforeAll(async () => {
  database = await FreshDatabase.make()
  client = new pg.Client({ connectionString: database.url })
  await client.connect()
})

afterAll(async () => {
  await client?.end()
  await database?.[Symbol.asyncDispose]()
})

async function rows<R extends pg.QueryResultRow>(query: string): Promise<R[]> {
  return (await client.query<R>(query)).rows
}

describe('the reference', () => {
  test('has every function that a role may call, here or among those for the packages, and no other', async () => {
    const packages = [...text.slice(text.indexOf('## For the packages')).matchAll(/`([a-z_]+)`/g)].map(([, name]) => name!)
    const granted = await rows<{ name: string }>(
      `select distinct name from klieo.role_rights() where may = 'execute' and kind <> 'owner' order by name`,
    )
    const owners = ['create_roles', 'grant_role', 'revoke_role', 'role_rights']
    expect([...functions.map(({ name }) => name), ...packages].sort()).toEqual([...granted.map(({ name }) => name), ...owners].sort())
  })

  test('has every view that a role may read', async () => {
    const granted = await rows<{ name: string }>(
      `select distinct r.name from klieo.role_rights() r join pg_class c on c.relname = r.name and c.relnamespace = 'klieo'::regnamespace
       where r.may = 'select' and r.kind <> 'owner' and c.relkind = 'v'`,
    )
    expect(views.map(({ name }) => name).sort()).toEqual(granted.map(({ name }) => name).sort())
  })

  test.each(functions)('says of $name what the catalogs say: parameters, defaults and what it answers', async (section) => {
    const [found] = await rows<{ arguments: string; result: string }>(
      `select pg_get_function_arguments(p.oid) as arguments, pg_get_function_result(p.oid) as result
       from pg_proc p where p.pronamespace = 'klieo'::regnamespace and p.proname = '${section.name}'`,
    )
    expect(found, section.name).toBeDefined()
    const signature = blocksOf(section.text, 'sql')[0]!.code.trim()
    expect(plain(signature)).toBe(plain(`klieo.${section.name}(${found!.arguments}) returns ${found!.result}`))
  })

  test.each(functions)('has each parameter of $name in its table, with the default that it has', (section) => {
    const inside = /\(([\s\S]*?)\) returns /.exec(blocksOf(section.text, 'sql')[0]!.code)![1]!
    const parameters =
      inside === ''
        ? []
        : inside.split(', ').map((parameter) => {
            const [head, standard] = parameter.split(' default ')
            return { name: head!.trim().split(' ')[0], standard: standard ?? '' }
          })
    const table = tableOf(section).map(([name, , standard]) => ({
      name: name!.replaceAll('`', ''),
      standard: standard!.replaceAll('`', ''),
    }))
    expect(table).toEqual(parameters)
  })

  test.each(functions)('names the roles that may call $name', async (section) => {
    const kinds = await rows<{ kind: string }>(`select kind from klieo.role_rights() where name = '${section.name}'`)
    const said = /^Role: (.*?)\. Errors: /m.exec(section.text)?.[1]
    const expected = kinds.map(({ kind }) => kind)
    if (expected.length === 4) expect(said).toBe('everyone who has one')
    else if (expected[0] === 'owner') expect(said).toBe('the owner')
    else expect(said?.replaceAll('`', '').split(', ').sort()).toEqual(expected.sort())
  })

  test.each(functions)('names errors of $name that its table of errors explains', (section) => {
    const table = text.slice(text.indexOf('## Errors'), text.indexOf('## Publish'))
    const said = /Errors: (.*)/.exec(section.text)?.[1]
    expect(said).toBeDefined()
    for (const [, state] of said!.matchAll(/`([0-9A-Z]{5})`/g)) expect(table).toContain(`\`${state}\``)
  })

  test.each(views)('has the columns of $name', async (section) => {
    const columns = await rows<{ name: string }>(
      `select attname::text as name from pg_attribute where attrelid = 'klieo.${section.name}'::regclass and attnum > 0 order by attnum`,
    )
    expect(tableOf(section).map(([name]) => name!.replaceAll('`', ''))).toEqual(columns.map(({ name }) => name))
  })

  test('has an example of each', () => {
    expect(sections.filter((section) => stepsOf(section.text).length === 0).map(({ name }) => name)).toEqual([])
  })
})

/** Roles belong to the whole server, and can be dropped once no database knows them. */
const dropRoles = () =>
  onServer(...['producer', 'worker', 'reader', 'admin', 'shipping'].map((role) => `drop role if exists app_bus_${role}`))

test.skipIf(psql === undefined)('psql prints what the reference says, statement for statement (skipped without a psql)', async () => {
  await dropRoles()
  const fresh = await FreshDatabase.make()
  try {
    expect(await differences('sql.md', psql!, fresh.url)).toBe('')
  } finally {
    await fresh[Symbol.asyncDispose]()
    await dropRoles()
  }
})
