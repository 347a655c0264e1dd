import pg from 'pg'
import { expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'

const connectionString = databaseUrl()

async function preparedAfterUse(preparedStatements: boolean): Promise<number> {
  const pool = new pg.Pool({ connectionString, max: 1 })
  const bus = await PostgresBus.connect({ pool, schema: freshSchema(), maintenance: false, preparedStatements })
  try {
    await bus.jobs.enqueue('q', { payload: 'x' })
    const job = await bus.jobs.claim('q', 'w', 10_000)
    expect(Buffer.from(job!.payload).toString()).toBe('x')
    await job!.ack()
    const { rows } = await pool.query('select count(*)::int as n from pg_prepared_statements')
    return (rows[0] as { n: number }).n
  } finally {
    await bus.close()
    await pool.end()
  }
}

test('own statements are prepared, unless told otherwise', async () => {
  expect(await preparedAfterUse(true)).toBeGreaterThanOrEqual(3)
  expect(await preparedAfterUse(false)).toBe(0)
})

test('payloads of every length and byte come back as they were', async () => {
  const bus = await PostgresBus.connect({ connectionString, schema: freshSchema(), maintenance: false })
  try {
    for (const length of [0, 1, 2, 3, 56, 57, 58, 255, 256, 4_097, 300_000]) {
      const payload = Uint8Array.from({ length }, (_, n) => (n * 151 + length) % 256)
      await bus.jobs.enqueue('q', { payload })
      const job = await bus.jobs.claim('q', 'w', 10_000)
      expect(job!.payload).toEqual(payload)
      await job!.ack()
    }
  } finally {
    await bus.close()
  }
})
