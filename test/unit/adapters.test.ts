import { inspect } from 'node:util'
import { expect, test } from 'vitest'
import { fromPostgresJs } from '../../src/adapters/adapted.ts'
import { drizzleTx } from '../../src/adapters/drizzle.ts'
import { knexTx, positional } from '../../src/adapters/knex.ts'
import { mikroOrmTx } from '../../src/adapters/mikro-orm.ts'
import { postgresJsTx } from '../../src/adapters/postgres-js.ts'
import { prismaTx } from '../../src/adapters/prisma.ts'
import { typeormTx } from '../../src/adapters/typeorm.ts'
import { toBusError } from '../../src/postgres/errors.ts'
import * as jobs from '../../src/postgres/jobs.sql.ts'
import * as kv from '../../src/postgres/kv.sql.ts'
import * as pubsub from '../../src/postgres/pubsub.sql.ts'

const adapters = { drizzleTx, knexTx, mikroOrmTx, postgresJsTx, prismaTx, typeormTx } as Readonly<Record<string, (tx: unknown) => unknown>>
const garbage: readonly unknown[] = [
  ...[undefined, null, 7, 'begin', true, [], {}, () => {}],
  new Proxy({}, { get: () => fail(), has: () => fail() }),
]

function fail(): never {
  throw new Error('not to be read')
}

test.each(Object.entries(adapters))('section 7 %s refuses whatever is no transaction with invalid_argument', (_, adapt) => {
  for (const tx of garbage) expect(() => adapt(tx)).toThrow(expect.objectContaining({ code: 'invalid_argument' }))
})

test('Knex numbers parameters anew: in the order of their use, a tenth is not a first, and what is quoted or a question mark stays', () => {
  const values = Array.from({ length: 11 }, (_, i) => `v${i + 1}`)
  const { sql, bindings } = positional(`select $10::text, $1, $11, $1::text::int[], a ? '$2 ? it''s', "$3 ?" ?| x`, values)
  expect(sql).toBe(`select ?::text, ?, ?, ?::text::int[], a \\? '$2 \\? it''s', "$3 \\?" \\?| x`)
  expect(bindings).toEqual(['v10', 'v1', 'v11', 'v1'])
})

test('what is sent in a caller’s transaction holds nothing that a client takes for a parameter of its own', () => {
  for (const text of [jobs.ENQUEUE, jobs.ACK_JOBS, kv.WRITE, pubsub.PUBLISH, pubsub.ACK]) {
    const withoutCasts = text.replaceAll('::', '')
    expect(withoutCasts).not.toMatch(/[?:@{}\\'"]/)
  }
})

test('section 7 a connection that postgres.js has lost is connection', () => {
  const error = Object.assign(new Error('write CONNECTION_CLOSED db:5432'), { code: 'CONNECTION_CLOSED' })
  expect(toBusError(fromPostgresJs(error), 'enqueue')).toMatchObject({ code: 'connection', retryable: false, cause: { cause: error } })
})

test('section 7 what postgres.js keeps of a statement with its error goes no further, and the rest does', () => {
  const detail = { code: '23514', constraint_name: 'jobs_payload_size', where: 'PL/pgSQL function', internal_query: 'secret' }
  const error = Object.defineProperties(Object.assign(new Error('refused'), detail), {
    query: { value: 'select secret', enumerable: true },
    parameters: { value: ['secret'], enumerable: true },
    args: { value: ['secret'], enumerable: true },
  })
  const kept = fromPostgresJs(error) as Error
  expect(kept).toMatchObject({
    message: 'refused',
    stack: error.stack,
    code: '23514',
    constraint: 'jobs_payload_size',
    where: detail.where,
  })
  expect(inspect(kept, { showHidden: true })).not.toContain('secret')
  const lost = Object.defineProperty(Object.assign(new Error('write CONNECTION_CLOSED'), { code: 'CONNECTION_CLOSED' }), 'parameters', {
    value: ['secret'],
    enumerable: true,
  })
  expect(inspect(toBusError(fromPostgresJs(lost), 'enqueue'), { showHidden: true })).not.toContain('secret')
})
