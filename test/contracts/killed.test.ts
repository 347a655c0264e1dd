import { expect, test } from 'vitest'
import { type Bus, defineSubject, PostgresBus } from '../../src/index.ts'
import { startChild } from '../support/child.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { eventually } from '../support/wait.ts'
import { stored, take } from './support/backends.ts'

test.each(['before', 'after'])('T3 T4 killed in the moment %s its letter is published: one letter, and the message ends', async (when) => {
  const schema = freshSchema()
  await using bus = await PostgresBus.connect({ connectionString: databaseUrl(), schema })
  const plain = bus as unknown as Bus<never>
  const contract = defineSubject<number>('orders.counted')
  await bus.pubsub.publish('orders.counted', 'no JSON')
  await using child = startChild(new URL('./support/burying-child.ts', import.meta.url), {
    env: { CONNECTION: databaseUrl(), SCHEMA: schema, SUBJECT: 'orders.counted', DURABLE: 'totals', WHEN: when },
  })
  expect(await child.exited).toMatchObject({ signal: 'SIGKILL' })
  expect(await stored(plain, 'totals.dlq')).toHaveLength(when === 'before' ? 0 : 1)

  const stream = await contract.subscribe(bus, 'totals', { onError: () => {} })
  const next = take(stream, 1)
  await eventually(async () => {
    const durables = await bus.admin.durables()
    expect(durables.find(({ durable }) => durable === 'totals')).toMatchObject({ pending: 0, inFlight: 0, redelivering: 0 })
  })
  expect((await stored(plain, 'totals.dlq')).map(({ headers }) => headers.dlq_reason)).toEqual(['invalid_payload: not JSON in UTF-8'])
  await contract.publish(bus, 7)
  expect((await next).map(({ data }) => data)).toEqual([7])
})
