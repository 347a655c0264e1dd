/**
 * Every function that a role may call, with what it does not expect: it answers, or refuses with a state that docs/errors.md documents;
 * what is checked writes nothing.
 */

import fc from 'fast-check'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'

/** A failing run prints it. */
const SEED = Number(process.env.KLIEO_TEST_SEED ?? 20_261)

const schema = freshSchema()
let owner: Session

beforeAll(async () => {
  owner = await session(databaseUrl())
  await PostgresBus.migrate({ connectionString: databaseUrl(), schema })
})

afterAll(() => owner[Symbol.asyncDispose]())

const UUID = `'00000000-0000-0000-0000-000000000001'::uuid`
const NAMES = [
  `''`,
  `'.'`,
  `'a..b'`,
  `'a b'`,
  `E'a\\n'`,
  `'ü'`,
  `'>'`,
  `'*'`,
  `'"'`,
  `E'\\\\'`,
  `'%s'`,
  `'$a'`,
  `'''; drop table x; --'`,
  `repeat('x', 3000)`,
]
const INTS = ['0', '-1', '2147483647', '-2147483648']
const BIGINTS = [...INTS, '9223372036854775807', '-9223372036854775808']

/** By type: first what is right, then what is not. */
const CORPUS: Readonly<Record<string, readonly string[]>> = {
  text: [`'a'`, 'null', ...NAMES],
  bytea: [`'\\x61'::bytea`, 'null', `''::bytea`],
  jsonb: [
    `'{}'::jsonb`,
    'null',
    `'null'::jsonb`,
    `'5'::jsonb`,
    `'[]'::jsonb`,
    `'{"a": 5}'::jsonb`,
    `'{"": "x"}'::jsonb`,
    `'{"a": "x\\n"}'::jsonb`,
  ],
  integer: ['1', 'null', ...INTS],
  bigint: ['1', 'null', ...BIGINTS],
  'double precision': ['1', 'null', '-1', '0.5', `'NaN'`, `'Infinity'`, `'-Infinity'`, '1e308'],
  boolean: ['false', 'null', 'true'],
  uuid: [UUID, 'null'],
  xid8: [`'3'::xid8`, 'null', `'18446744073709551615'::xid8`],
  pg_snapshot: [`'1:1:'::pg_snapshot`, 'null', `'1:9223372036854775807:'::pg_snapshot`],
  'timestamp with time zone': ['now()', 'null', `'infinity'`, `'-infinity'`, `'294276-12-31'`, `'4713-01-01 BC'`],
  'text[]': [`array['a']`, 'null', `'{}'::text[]`, 'array[null]::text[]', `array['']`, `array[repeat('x', 3000)]`, `array['a', 'b']`],
  'integer[]': ['array[1]', 'null', `'{}'::int[]`, 'array[null]::int[]', 'array[-1]', 'array[2147483647]', 'array[1, 1]'],
  'bigint[]': [
    'array[1]::bigint[]',
    'null',
    `'{}'::bigint[]`,
    'array[null]::bigint[]',
    'array[-9223372036854775808]',
    'array[9223372036854775807]',
  ],
  'uuid[]': [`array[${UUID}]`, 'null', `'{}'::uuid[]`, 'array[null]::uuid[]'],
  'boolean[]': ['array[true]', 'null', `'{}'::boolean[]`, 'array[null]::boolean[]'],
  'timestamp with time zone[]': ['array[now()]', 'null', `array['infinity'::timestamptz]`],
}

/** Bad arguments are of class 22 (most of them 22023); what a table refuses is 23502 or 23514; what is too large 54000; KB001 to KB005 are ours. */
const DOCUMENTED = /^(?:22\w{3}|23502|23514|54000|KB00[1-5])$/

const CONTENT = `
  select (select count(*) from klieo.messages) + (select count(*) from klieo.jobs) + (select count(*) from klieo.kv_entries)
    + (select count(*) from klieo.kv_leases where bucket <> '$klieo') as rows`

interface Signature {
  readonly name: string
  readonly types: readonly string[]
}

async function functions(): Promise<Signature[]> {
  const { rows } = await owner.query<Signature>(
    `select p.proname as name, array(select format_type(t.oid, null) from unnest(p.proargtypes) with ordinality as t(oid, n) order by n)::text[] as types
     from pg_proc p
     where p.pronamespace = $1::regnamespace and p.proname in (select r.name from ${schema}.role_rights() r where r.kind <> 'owner')
     order by p.proname`,
    [schema],
  )
  return rows
}

/** What it is refused with; undefined: it answers. Nothing of it stays. */
async function refusal(call: string): Promise<{ readonly code: string; readonly message: string } | undefined> {
  try {
    await owner.query(`begin; set local statement_timeout = '10s'; select * from ${schema}.${call}; rollback`)
    return undefined
  } catch (error) {
    await owner.query('rollback')
    const { code = '', message } = error as { code?: string; message: string }
    return { code, message }
  }
}

function callOf({ name, types }: Signature, values: readonly string[]): string {
  return `${name}(${values.map((value, at) => `${value}::${types[at]}`).join(', ')})`
}

function valuesFor({ name }: Signature, type: string): readonly string[] {
  const values = CORPUS[type]
  if (values === undefined) throw new Error(`${name}: nothing is known for ${type}`)
  return values
}

test('section 7: whatever one argument is, the answer is one, or a documented refusal', async () => {
  const undocumented: string[] = []
  let calls = 0
  let refused = 0
  for (const signature of await functions()) {
    const right = signature.types.map((type) => valuesFor(signature, type)[0] as string)
    for (const [index, type] of signature.types.entries()) {
      for (const value of valuesFor(signature, type).slice(1)) {
        calls++
        const call = callOf(signature, right.with(index, value))
        const error = await refusal(call)
        if (error) refused++
        if (error && !DOCUMENTED.test(error.code)) undocumented.push(`${call.slice(0, 250)}: ${error.code} ${error.message}`)
      }
    }
  }
  expect(undocumented).toEqual([])
  expect(calls).toBeGreaterThan(1_000)
  expect(refused).toBeGreaterThan(200)
}, 120_000)

test(`section 7: so it is whatever several arguments are (KLIEO_TEST_SEED=${SEED})`, async () => {
  const known = (await functions()).filter(({ types }) => types.length > 1)
  const calls = fc
    .constantFrom(...known)
    .chain((signature) =>
      fc.tuple(...signature.types.map((type) => fc.constantFrom(...valuesFor(signature, type)))).map((values) => callOf(signature, values)),
    )
  await fc.assert(
    fc.asyncProperty(calls, async (call) => {
      const error = await refusal(call)
      if (error && !DOCUMENTED.test(error.code)) throw new Error(`${error.code} ${error.message}`)
    }),
    { seed: SEED, numRuns: 1_500 },
  )
}, 120_000)

test('section 7: names, times and headers that break the rules are refused by the functions for SQL callers', async () => {
  const content = async () => (await owner.query(CONTENT.replaceAll('klieo.', `${schema}.`))).rows
  const before = await content()
  const calls = [
    ...NAMES.filter((name) => name !== `'"'` && name !== `E'\\\\'` && name !== `'%s'`).map((name) => `publish(${name}, '')`),
    ...NAMES.flatMap((name) => [
      `enqueue(${name}, '')`,
      `kv_put(${name}, 'k', '')`,
      `kv_put('b', ${name}, '')`,
      `kv_cas('b', ${name}, '', null)`,
    ]),
    ...NAMES.flatMap((name) => [`claim(${name}, 'w')`, `subscribe(${name}, 'a')`, `fetch(${name})`, `ack_message(${name}, 1, ${UUID})`]),
    ...NAMES.slice(0, 7).map((filter) => `subscribe('d', ${filter}::text || '.>.a')`),
    ...NAMES.flatMap((name) => [`take_lease(${name}, 'k', ${UUID}, 'me', 1)`, `kv_delete('b', ${name})`]),
    ...(CORPUS.jsonb?.slice(1) ?? []).flatMap((headers) => [`publish('a', '', ${headers})`, `enqueue('q', '', ${headers})`]),
    ...[`'infinity'`, `'-infinity'`, 'null'].map((time) => `enqueue('q', '', run_at => ${time})`),
    ...['0', '-1', '1000001', 'null'].map((attempts) => `enqueue('q', '', max_attempts => ${attempts})`),
    ...['-101', '101', 'null'].map((priority) => `enqueue('q', '', priority => ${priority})`),
    ...[`''`, `repeat('x', 513)`].flatMap((id) => [`enqueue('q', '', dedup_key => ${id})`, `publish('a', '', msg_id => ${id})`]),
    `publish('a', null)`,
    `enqueue('q', null)`,
    `kv_put('b', 'k', null)`,
    `kv_put('dedup.q', 'k', '1')`,
  ]
  const wrong: string[] = []
  for (const call of calls) {
    const code = await owner.query(`select * from ${schema}.${call}`).then(
      () => 'done',
      (error: { code?: string }) => error.code,
    )
    if (code !== '22023') wrong.push(`${call}: ${code}`)
  }
  expect(wrong).toEqual([])
  expect(await content()).toEqual(before)
})

test('section 7: a bus on the schema works as before after all of that', async () => {
  await using bus = await PostgresBus.connect({ connectionString: databaseUrl(), schema, migrate: false })
  await using stream = await bus.pubsub.subscribe('a', 'after', { start: 'new' })
  const { seq } = await bus.pubsub.publish('a', 'x', { msgId: 'after' })
  for await (const msg of stream) {
    expect(msg.seq).toBe(seq)
    await msg.ack()
    break
  }
  const id = await bus.jobs.enqueue('after', { payload: 'x', dedupKey: 'k' })
  const job = await bus.jobs.claim('after', 'w', 60_000)
  expect(job?.id).toBe(id)
  await job?.ack()
  const revision = await bus.kv.put('after', 'k', 'x')
  expect((await bus.kv.get('after', 'k'))?.revision).toBe(revision)
})
