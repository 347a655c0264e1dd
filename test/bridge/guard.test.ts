import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { expect, test } from 'vitest'
import { Guard } from '../../src/bridge/guard.ts'
import { MemoryBus } from '../../src/memory/index.ts'

const READINGS = 10_000
const MOST_BYTES = 5_000_000

test('readings that fail again and again leave nothing in memory', async () => {
  setFlagsFromString('--expose-gc')
  const gc = runInNewContext('gc') as () => void
  await using bus = MemoryBus.create()
  const lease = await bus.kv.lease('b', 'k', 60_000)
  const guard = new Guard(lease, 60_000, new AbortController().signal)
  const used = async () => {
    await new Promise((resolve) => setImmediate(resolve))
    gc()
    return process.memoryUsage().heapUsed
  }
  for (let n = 0; n < 100; n++) expect(await guard.begin()).toBe(true)
  const before = await used()
  for (let n = 0; n < READINGS; n++) await guard.begin()
  expect((await used()) - before).toBeLessThan(MOST_BYTES)
  guard.end()
})
