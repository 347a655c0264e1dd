/** Leases that stand in one queue, and jobs that wait for a place. */

import assert from 'node:assert/strict'
import { test } from 'vitest'
import { MemoryBus, VirtualClock } from '../../src/memory/index.ts'
import { type Claim, HeldJob } from '../../src/runtime/claimed-job.ts'
import { Deadline } from '../../src/runtime/deadlines.ts'
import { Ready } from '../../src/runtime/prefetch.ts'

test('J6 a job whose lease was lost or that was settled while it waited for a place is passed over', async () => {
  const clock = new VirtualClock()
  await using bus = MemoryBus.create({ clock })
  await bus.jobs.enqueueMany('q', [{ payload: 'short' }, { payload: 'settled' }, { payload: 'long' }])
  const [short] = await bus.jobs.claimMany('q', 'w', 1_000, { limit: 1 })
  const [settled, long] = await bus.jobs.claimMany('q', 'w', 60_000, { limit: 2 })
  const held = [short, settled, long].filter((job) => job !== undefined && HeldJob.is(job)) as unknown as HeldJob<Claim, never>[]
  const ready = new Ready<never>()
  ready.add(held.slice(0, 1), 0)
  ready.add(held.slice(1), 0)
  await settled?.ack()
  await clock.advance(1_000)
  assert.equal(ready.size, 3)
  assert.equal(ready.take()?.id, long?.id)
  assert.deepEqual([ready.take(), ready.size, ready.since], [undefined, 0, undefined])
})

test('K5 leases of one duration end each at its own time, whatever was moved or called off', async () => {
  const clock = new VirtualClock()
  const ended: string[] = []
  const deadline = (name: string) => new Deadline({ lost: () => ended.push(`${name} ${clock.now()}`) })
  const [late, early, off, moved] = [deadline('late'), deadline('early'), deadline('off'), deadline('moved')]
  late.set(clock, 100, 120)
  early.set(clock, 100, 100)
  off.set(clock, 100, 90)
  moved.set(clock, 100, 95)
  off.clear()
  moved.set(clock, 100, 150)
  off.clear()
  await clock.advance(110)
  assert.deepEqual(ended, ['early 100'])
  await clock.advance(200)
  assert.deepEqual(ended, ['early 100', 'late 120', 'moved 150'])
  early.set(clock, 100, clock.now() + 100)
  await clock.advance(100)
  assert.deepEqual(ended.at(-1), 'early 410')
})
