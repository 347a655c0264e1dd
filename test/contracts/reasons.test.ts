import type { StandardSchemaV1 } from '@standard-schema/spec'
import { type } from 'arktype'
import fc from 'fast-check'
import * as v from 'valibot'
import { expect, test } from 'vitest'
import { z } from 'zod'
import { Form, type Format, type FormatOptions } from '../../src/contracts/format.ts'
import { checkHeaders } from '../../src/core/index.ts'
import { encode } from '../../src/index.ts'

async function reason(schema: Format, value: unknown, options?: FormatOptions): Promise<string> {
  const reading = await Form.of(schema, options).read(encode(value))
  if (reading.matches) throw new Error('it matches')
  return reading.reason
}

/** One that answers as it is told. */
function answering(...issues: StandardSchemaV1.Issue[]): StandardSchemaV1 {
  return { '~standard': { version: 1, vendor: 'test', validate: () => ({ issues }) } }
}

test('T10 a reason says where, and what was expected there', async () => {
  const zod = z.object({ items: z.array(z.object({ price: z.number() })), name: z.string().min(3), kind: z.enum(['a', 'b']) })
  expect(await reason(zod, { items: [{ price: 1 }, { price: '2' }], name: 'x', kind: 'c' })).toBe(
    'items[1].price: expected number; name: too_small; kind: invalid_value',
  )
  const valibot = v.object({ items: v.array(v.object({ price: v.number() })), name: v.pipe(v.string(), v.minLength(3)) })
  expect(await reason(valibot, { items: [{ price: '2' }], name: 'x' })).toBe('items[0].price: expected number; name: expected >=3')
  const arktype = type({ items: type({ price: 'number' }).array(), name: 'string >= 3' })
  expect(await reason(arktype, { items: [{ price: '2' }], name: 'x' })).toBe(
    'items[0].price: expected a number; name: expected at least length 3',
  )
  expect(await reason(z.number(), 'x')).toBe('expected number')
})

test('T10 a reason never repeats a value, whatever the validator says in its messages', async () => {
  const secret = 'hunter2'
  const values = { a: secret, b: secret, c: secret, d: secret }
  const schemas = [
    z.object({
      a: z.number(),
      b: z.email(),
      c: z.enum(['x']),
      d: z.string().refine((s) => s === '', { error: (issue) => `not ${issue.input}` }),
    }),
    z.strictObject({ a: z.string(), b: z.string(), c: z.string(), d: z.number() }),
    v.object({
      a: v.number(),
      b: v.pipe(v.string(), v.email()),
      c: v.literal('x'),
      d: v.pipe(
        v.string(),
        v.check(
          (s) => s === '',
          (i) => `not ${i.input}`,
        ),
      ),
    }),
    v.strictObject({ a: v.picklist(['y']), b: v.string(), c: v.string(), d: v.union([v.number(), v.date()]) }),
    type({ a: 'number', b: 'string.email', c: "'x'", d: 'string < 3' }),
    type({ a: 'number | boolean', b: 'string.uuid', c: '/^x/', d: 'string.json.parse' }),
    type({ a: 'boolean', b: 'string.ip', c: "'x' | 'y'", d: 'string < 3 | string.ip' }),
    type({ a: [{ x: 'number' }, '|', { y: 'boolean' }], b: 'string.ip < 3', c: 'string', d: 'string' }),
    answering({ message: `a is ${secret}`, path: ['a'] }),
  ] satisfies Format[]
  const quoted = await Promise.all(schemas.map((schema) => reason(schema, values, { explain: (issue) => issue.message })))
  expect(quoted.filter((told) => told.includes(secret)).length).toBeGreaterThanOrEqual(4)
  for (const schema of schemas) {
    const told = await reason(schema, values)
    expect(told).not.toContain(secret)
    expect(told).toMatch(/^[ad]: /)
  }
})

test('T10 of the branches of a union or an intersection the reason says what each expected', async () => {
  for (const [schema, value, told] of [
    [type({ a: 'boolean' }), { a: 'hunter2' }, 'a: expected false or true'],
    [type({ a: "'x' | 'y'" }), { a: 'hunter2' }, 'a: expected "x" or "y"'],
    [type({ a: 'string.ip' }), { a: 'hunter2' }, 'a: expected an IP address'],
    [type({ a: 'string < 3 & /^x/' }), { a: 'hunter2' }, 'a: expected matched by ^x and at most length 2'],
    [type([{ x: 'number' }, '|', { y: 'boolean' }]), { x: 'hunter2', y: 'hunter2' }, 'expected a number at x or false or true at y'],
  ] as const) {
    expect(await reason(schema, value)).toBe(told)
  }
})

test('T10 `explain` says it in the caller’s words, beside the path', async () => {
  const schema = z.object({ n: z.number('a number, please') })
  expect(await reason(schema, { n: 'x' }, { explain: (issue) => issue.message })).toBe('n: a number, please')
  expect(await reason(schema, { n: 'x' }, { explain: () => 'two\r\nlines\0' })).toBe('n: two lines')
  expect(
    await reason(
      schema,
      { n: 'x' },
      {
        explain: () => {
          throw new Error('from explain')
        },
      },
    ),
  ).toBe('it does not match')
})

test('T10 many issues and long names are cut, and paths are written so that they can be read', async () => {
  const many = z.array(z.number())
  expect(
    await reason(
      many,
      Array.from({ length: 1_000 }, () => 'x'),
    ),
  ).toMatch(/^\[0\]: expected number; .*\[7\]: expected number; and 992 more$/)
  const record = z.record(z.string(), z.number())
  expect(await reason(record, { 'a b."c': 'x' })).toBe('["a b.\\"c"]: expected number')
  expect(await reason(record, { [`k${'ey'.repeat(10_000)}`]: 'x' })).toMatch(/^k(ey)+e…: expected number$/)
  const segments = answering({ message: 'm', path: [{ key: 'a' }, { key: 0 }, Symbol('s')] }, { message: 'm' })
  expect(await reason(segments, 1)).toBe('a[0]["Symbol(s)"]: it does not match; it does not match')
})

test('T10 whatever a schema answers, the reason is a header’s value of at most 4,000 characters', async () => {
  const issue = fc.record({
    message: fc.string(),
    path: fc.array(
      fc.oneof(fc.string({ unit: 'binary' }), fc.integer(), fc.record({ key: fc.string({ unit: 'binary', maxLength: 500 }) })),
    ),
    expected: fc.oneof(fc.string({ unit: 'binary', maxLength: 5_000 }), fc.anything()),
    code: fc.anything(),
    type: fc.anything(),
  })
  await fc.assert(
    fc.asyncProperty(fc.array(issue, { minLength: 1, maxLength: 20 }), fc.boolean(), async (issues, explained) => {
      const options = explained ? { explain: (one: StandardSchemaV1.Issue) => `${one.message}\n\ud800`.repeat(500) } : undefined
      const told = `invalid_payload: ${await reason(answering(...(issues as StandardSchemaV1.Issue[])), 1, options)}`
      expect(told.length).toBeLessThanOrEqual(4_000)
      expect(checkHeaders({ dlq_reason: told })).toEqual({ dlq_reason: told })
    }),
  )
})

test('T10 issues that cannot be read are a refusal all the same', async () => {
  const hostile = new Proxy([], {
    get() {
      throw new Error('not yours')
    },
  })
  const schema = { '~standard': { version: 1, vendor: 'test', validate: () => ({ issues: hostile }) } } as unknown as StandardSchemaV1
  expect(await reason(schema, 1)).toBe('it does not match')
  const nothing = { '~standard': { version: 1, vendor: 'test', validate: () => undefined } } as unknown as StandardSchemaV1
  expect(await reason(nothing, 1)).toBe('the schema threw')
})
