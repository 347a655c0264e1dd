import pg from 'pg'
import { expect, test } from 'vitest'
import { PostgresBus, Worker } from '../../src/index.ts'
import { MemoryBus } from '../../src/memory/index.ts'

/** What a newcomer gets wrong, and what the message must tell him. */

async function message(call: () => unknown): Promise<string> {
  try {
    await call()
  } catch (error) {
    return `${(error as { code?: string }).code}: ${(error as Error).message}`
  }
  throw new Error('nothing was refused')
}

test('section 7 a transaction in the place of the options is refused, and not ignored', async () => {
  const bus = MemoryBus.create()
  const client = new pg.Client()
  expect(await message(() => bus.pubsub.publish('a', 'b', client as never))).toMatch(/^invalid_argument: options .*pass \{ tx \}/)
  expect(await message(() => bus.jobs.enqueue('q', { payload: '' }, client as never))).toMatch(/^invalid_argument: options .*pass \{ tx \}/)
  await bus.close()
})

test('section 7 an element of a batch is named by its place', async () => {
  const bus = MemoryBus.create()
  expect(await message(() => bus.jobs.enqueueMany('q', [{ payload: '' }, { payload: '', priority: 101 }]))).toMatch(
    /^invalid_argument: jobs\[1\]: priority/,
  )
  expect(await message(() => bus.pubsub.publishMany([{ subject: 'a b', payload: '' }]))).toMatch(
    /^invalid_argument: messages\[0\]: subject/,
  )
  await bus.close()
})

test('section 7 what cas expects, and where a queue is to be given', async () => {
  const bus = MemoryBus.create()
  expect(await message(() => bus.kv.cas('b', 'k', 'v', undefined as never))).toMatch(
    /^invalid_argument: expected .*null while the key is to be absent/,
  )
  expect(await message(() => new Worker(bus as never, 'q', async () => {}))).toMatch(/^invalid_argument: jobs .*bus\.jobs/)
  expect(await message(() => bus.jobs.claimMany('q', 'w', 1, undefined as never))).toMatch(/^invalid_argument: /)
  await bus.close()
})

test('section 7 connect refuses what is no pool and no connection string, before it connects', async () => {
  expect(await message(() => PostgresBus.connect({ pool: new pg.Client() as never }))).toMatch(/^invalid_argument: pool/)
  expect(await message(() => PostgresBus.connect({ connectionString: 'localhost:5432/db' }))).toMatch(/^invalid_argument: connectionString/)
  expect(await message(() => PostgresBus.connect({ retention: 3 as never }))).toMatch(/^invalid_argument: retention/)
})
