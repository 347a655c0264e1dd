import assert from 'node:assert/strict'
import { test } from 'vitest'
import { Heap } from '../../src/memory/heap.ts'

/** The same numbers in every run. */
function random(seed: number): () => number {
  let state = seed
  return () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    return state / 2 ** 32
  }
}

test('a heap whose items come, move and go in any order always has the least on top', () => {
  for (let seed = 1; seed <= 50; seed++) {
    const next = random(seed)
    const heap = new Heap<{ slot: number; at: number }>((a, b) => a.at < b.at)
    const items: { slot: number; at: number }[] = []
    for (let step = 0; step < 400; step++) {
      const item = items[Math.floor(next() * items.length)]
      const what = next()
      if (!item || what < 0.45) {
        const fresh = { slot: -1, at: Math.floor(next() * 50) }
        items.push(fresh)
        heap.push(fresh)
      } else if (what < 0.7) {
        item.at = Math.floor(next() * 50)
        heap.moved(item)
      } else {
        assert.ok(heap.holds(item))
        heap.remove(item)
        assert.equal(item.slot, -1)
        assert.ok(!heap.holds(item))
        items.splice(items.indexOf(item), 1)
      }
      assert.equal(heap.size, items.length)
      assert.equal(heap.peek()?.at, items.length === 0 ? undefined : Math.min(...items.map(({ at }) => at)))
    }
    const rest = Array.from({ length: heap.size }, () => heap.pop()?.at)
    assert.deepEqual(
      rest,
      items.map(({ at }) => at).sort((a, b) => a - b),
    )
    assert.equal(heap.pop(), undefined)
  }
})
