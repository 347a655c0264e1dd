/** The work for each job or message must not grow with their number. The bounds are some ten times what it takes. */

import assert from 'node:assert/strict'
import { test } from 'vitest'
import { MemoryBus } from '../../src/memory/index.ts'

const COUNT = 100_000
const LIMIT_MS = 15_000

test('J8 a hundred thousand jobs of all priorities are claimed in order, in seconds', async () => {
  await using bus = MemoryBus.create()
  const started = performance.now()
  const jobs = Array.from({ length: COUNT }, (_, n) => ({ payload: '', priority: (n % 201) - 100 }))
  await bus.jobs.enqueueMany('q', jobs)
  let last = 100
  let claimed = 0
  while (claimed < COUNT) {
    const batch = await bus.jobs.claimMany('q', 'w', 60_000, { limit: 1_000 })
    for (const { id } of batch) {
      const { priority } = jobs[Number(id) - 1] as { readonly priority: number }
      assert.ok(priority <= last)
      last = priority
    }
    claimed += batch.length
    await Promise.all(batch.map((job, n) => (n % 2 === 0 ? job.ack() : job.nak(60_000))))
  }
  assert.equal(claimed, COUNT)
  assert.equal(await bus.jobs.claim('q', 'w', 1_000), null)
  assert.ok(performance.now() - started < LIMIT_MS, `took ${performance.now() - started} ms`)
})

test('P3 a hundred thousand messages are delivered and acked in seconds, a rare subject among them', async () => {
  await using bus = MemoryBus.create()
  const started = performance.now()
  await bus.pubsub.publishMany(Array.from({ length: COUNT }, (_, n) => ({ subject: n === COUNT - 1 ? 'rare' : 'common', payload: '' })))
  for await (const msg of await bus.pubsub.subscribe('rare', 'r')) {
    assert.equal(msg.seq, COUNT)
    break
  }
  let seq = 0
  for await (const msg of await bus.pubsub.subscribe('>', 'all')) {
    assert.equal(msg.seq, ++seq)
    void msg.ack()
    if (seq === COUNT) break
  }
  assert.ok(performance.now() - started < LIMIT_MS, `took ${performance.now() - started} ms`)
})
