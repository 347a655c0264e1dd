/** No value ever becomes part of a statement: by reading the source, and by asking the catalog. */

import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'

const SRC = join(import.meta.dirname, '..', '..', 'src')
const HOME_OF_QUOTING = 'postgres/schema-name.ts'

/** What a statement may be made of besides its own text: constants of the source. Kysely's sql`` makes parameters of the rest. */
const CONSTANTS: Readonly<Record<string, readonly string[]>> = {
  'postgres/admin.sql.ts': ['JOB_COLUMNS', 'JOBS_PAGE', 'LIVING_JOBS_OF_QUEUE', 'DEAD_JOBS_OF_QUEUE'],
  'postgres/kv.sql.ts': ['WRITE_PARAMETERS'],
  'postgres/database.ts': ['CHECK_MS'],
  'postgres/migrations.ts': ['MIGRATION_TABLE'],
}

interface Template {
  readonly tag: string
  /** The text, with § for each expression. */
  readonly text: string
  readonly expressions: readonly string[]
}

/** The template literals of a source, those inside expressions included. Comments and plain strings are passed over. */
function templates(source: string): Template[] {
  const found: Template[] = []
  let at = 0
  const code = (until: string | undefined): string => {
    const start = at
    let depth = 0
    while (at < source.length) {
      const two = source.slice(at, at + 2)
      const char = source[at] as string
      if (two === '//') at = skipTo('\n')
      else if (two === '/*') at = skipTo('*/')
      else if (char === "'" || char === '"') quoted(char)
      // A regular expression, for all that this source writes: it follows an operator or a bracket.
      else if (char === '/' && /[=(,:!&|?[{;]\s*$/.test(source.slice(Math.max(0, at - 3), at))) regularExpression()
      else if (char === '`') template(/[\w.]*(?:<[^`<>]*>)?$/.exec(source.slice(Math.max(0, at - 60), at))?.[0] ?? '')
      else if (until !== undefined && depth === 0 && char === until) return source.slice(start, at)
      else {
        if (char === '{') depth++
        if (char === '}') depth--
        at++
      }
    }
    return source.slice(start)
  }
  const skipTo = (end: string) => {
    const found = source.indexOf(end, at)
    return found < 0 ? source.length : found + end.length
  }
  const quoted = (quote: string) => {
    for (at++; at < source.length && source[at] !== quote; at++) if (source[at] === '\\') at++
    at++
  }
  const regularExpression = () => {
    let inClass = false
    for (at++; at < source.length && (inClass || source[at] !== '/') && source[at] !== '\n'; at++) {
      if (source[at] === '\\') at++
      else if (source[at] === '[') inClass = true
      else if (source[at] === ']') inClass = false
    }
    at++
  }
  const template = (tag: string) => {
    let text = ''
    const expressions: string[] = []
    at++
    while (at < source.length && source[at] !== '`') {
      if (source.startsWith('${', at)) {
        at += 2
        expressions.push(code('}').trim())
        at++
        text += '§'
      } else {
        if (source[at] === '\\') text += source[at++]
        text += source[at++]
      }
    }
    at++
    found.push({ tag, text, expressions })
  }
  code(undefined)
  return found
}

const files = readdirSync(SRC, { recursive: true, encoding: 'utf8' }).filter((file) => file.endsWith('.ts'))
const read = (file: string) => readFileSync(join(SRC, file), 'utf8')
const SQL =
  /\bklieo\.[a-z_]|^\s*(?:select|insert into|update|delete from|with|create|alter|drop|truncate|lock|set|begin|listen|notify|grant|revoke|do|call)\s+[a-z$"]/i

describe('the source', () => {
  test('the reader of templates that these tests rely on finds what is spliced, wherever it is', () => {
    // biome-ignore-start lint/suspicious/noTemplateCurlyInString: source to be read
    const source = [
      "// a comment with a ` in it, and it's one",
      "const s = 'not `this`', r = /[`']/.test(x)",
      'const a = `select ${one} from x ${`inner ${two}`}`',
      'const b = sql<Row>`select ${three}`',
      'const c = `begin; ${{ four: `}` }.four}`',
    ].join('\n')
    // biome-ignore-end lint/suspicious/noTemplateCurlyInString: source to be read
    expect(templates(source).map(({ tag, text, expressions }) => [tag, text, expressions])).toEqual([
      ['', 'inner §', ['two']],
      ['', 'select § from x §', ['one', `\`inner \${two}\``]],
      ['sql<Row>', 'select §', ['three']],
      ['', '}', []],
      ['', 'begin; §', ['{ four: `}` }.four']],
    ])
  })

  test('statements are fixed texts: nothing is spliced into one but constants, and the quoted schema in its one place', () => {
    const spliced: string[] = []
    let statements = 0
    for (const file of files) {
      if (file.startsWith('testing/')) continue
      for (const { tag, text, expressions } of templates(read(file))) {
        if (!SQL.test(text) || tag.startsWith('sql') || tag.endsWith('sql')) continue
        statements++
        if (file === HOME_OF_QUOTING) continue
        for (const expression of expressions) {
          if (!CONSTANTS[file]?.includes(expression)) spliced.push(`${file}: \${${expression}} in ${text.trim().slice(0, 60)}`)
        }
      }
    }
    expect(spliced).toEqual([])
    expect(statements).toBeGreaterThan(30)
  })

  test('no statement is put together with +, concat, join or replace, and raw SQL is what the migrations are', () => {
    const wrong: string[] = []
    for (const file of files) {
      if (!file.startsWith('postgres/') || file === HOME_OF_QUOTING) continue
      for (const [index, line] of read(file).split('\n').entries()) {
        const plain = /['`]\s*(?:select|insert|update|delete|with|set|begin|lock) [^'`]*['`]\s*(?:\+|\.concat|\.replace)/i.test(line)
        const raw = /sql\.(?:raw|lit|id|ref|table)\b/.test(line) && !/migrationText\(|LOCK_ID/.test(line)
        if (plain || raw) wrong.push(`${file}:${index + 1}: ${line.trim()}`)
      }
    }
    expect(wrong).toEqual([])
  })

  test('names are quoted in one place', () => {
    const quoting = files.filter(
      (file) => !file.startsWith('testing/') && /'""'|escapeIdentifier|escapeLiteral|quote_ident/.test(read(file)),
    )
    expect(quoting).toEqual([HOME_OF_QUOTING])
  })
})

describe('the functions', () => {
  const schema = freshSchema()
  let client: Session

  beforeAll(async () => {
    client = await session(databaseUrl())
    await PostgresBus.migrate({ connectionString: databaseUrl(), schema })
  })

  afterAll(() => client[Symbol.asyncDispose]())

  test('what is put together in a function is formatted with %I and %L alone', async () => {
    const { rows } = await client.query<{ name: string; body: string }>(
      `select proname as name, prosrc as body from pg_proc where pronamespace = $1::regnamespace and prosrc ~* '\\mexecute\\s+[^''{]'`,
      [schema],
    )
    expect(rows.map(({ name }) => name).sort()).toEqual(['create_roles', 'grant_role', 'revoke_public', 'revoke_role'])
    for (const { name, body } of rows) {
      // A literal with the word in it is no statement.
      for (const [, rest] of body.matchAll(/^\s*execute\s+(.*)$/gm)) {
        const format = /^format\('((?:[^']|'')*)', [^|]*\);$/.exec(rest as string)
        expect(format, `${name}: ${rest}`).not.toBeNull()
        expect(format?.[1]?.replaceAll(/%[IL]/g, ''), name).not.toContain('%')
      }
    }
  })

  test('every function pins its search_path, those that run as their owner before all, and only what is granted does', async () => {
    const { rows } = await client.query<{ name: string; definer: boolean; path: string | null }>(
      `select p.proname as name, p.prosecdef as definer, (select c from unnest(p.proconfig) c where c like 'search_path=%') as path
       from pg_proc p where p.pronamespace = $1::regnamespace`,
      [schema],
    )
    expect(rows.length).toBeGreaterThan(70)
    expect(rows.filter(({ path }) => path !== 'search_path=pg_catalog, pg_temp')).toEqual([])
    const { rows: granted } = await client.query<{ name: string }>(
      `select distinct name from ${schema}.role_rights() where kind <> 'owner' and may = 'execute'`,
    )
    const names = new Set(granted.map(({ name }) => name))
    expect(rows.filter(({ name, definer }) => definer && !names.has(name))).toEqual([])
    // What needs no table needs no owner's rights.
    expect(
      rows
        .filter(({ name, definer }) => !definer && names.has(name))
        .map(({ name }) => name)
        .sort(),
    ).toEqual(['as_text', 'presence_class'])
  })

  test('no two functions share a name, so that a grant by name means one of them', async () => {
    const { rows } = await client.query(
      'select proname from pg_proc where pronamespace = $1::regnamespace group by 1 having count(*) > 1',
      [schema],
    )
    expect(rows).toEqual([])
  })
})
