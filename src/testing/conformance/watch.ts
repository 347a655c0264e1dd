/** Watches of the key-value store: K6. */

import assert from 'node:assert/strict'
import type { KvChange } from '../../core/types.ts'
import { ascending, eventually, firstOf, Reader, rejects, type Suite, sorted, text, unique } from './kit.ts'

const revisionOf = (change: KvChange) => (change.operation === 'put' ? change.entry.revision : change.revision)
const keyOf = (change: KvChange) => (change.operation === 'put' ? change.entry.key : change.key)
/** A change as a line of text. */
const told = (change: KvChange) => (change.operation === 'put' ? `${change.entry.key}=${text(change.entry.value)}` : `-${change.key}`)

export function watchTests<Tx>(suite: Suite<Tx>): void {
  suite.group('watch', () => {
    suite.without('watch', 'K6 watch is unsupported here, and says so', async (stage) => {
      const bus = await stage.open()
      await rejects(bus.kv.watch(unique('b')), 'unsupported')
    })

    suite.where('watch', 'K6 watch yields the present entries first, then every change', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      const made: Record<string, number> = {}
      for (const key of ['a', 'b', 'gone']) made[key] = await bus.kv.put(bucket, key, '1')
      await bus.kv.delete(bucket, 'gone')
      made.b = await bus.kv.put(bucket, 'b', '2')
      const watch = new Reader(await other.kv.watch(bucket))
      const present = await watch.take(2)
      assert.deepEqual(sorted(present.map(told)), ['a=1', 'b=2'])
      for (const change of present) assert.equal(revisionOf(change), made[keyOf(change)])
      await watch.nothing()
      const revisions = [await bus.kv.put(bucket, 'c', '3'), await bus.kv.cas(bucket, 'a', '4', made.a!)]
      await bus.kv.delete(bucket, 'b')
      const changes = await watch.take(3)
      assert.deepEqual(sorted(changes.map(told)), sorted(['c=3', 'a=4', '-b']))
      const by = new Map(changes.map((change) => [keyOf(change), revisionOf(change)]))
      assert.deepEqual([by.get('c'), by.get('a')], revisions)
      assert.ok(by.get('b')! > made.b!, 'a delete has a revision of its own')
      await watch.nothing()
    })

    suite.where('watch', 'K6 watch yields every one of many present entries before what comes later', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const keys = Array.from({ length: 1_200 }, (_, index) => `k.${index}`)
      for (let start = 0; start < keys.length; start += 200) {
        await Promise.all(keys.slice(start, start + 200).map((key) => bus.kv.put(bucket, key, 'x')))
      }
      const watch = new Reader(await bus.kv.watch(bucket, 'k.*'))
      await bus.kv.put(bucket, 'k.new', 'later')
      const changes = await watch.take(1_201)
      assert.deepEqual(sorted(changes.slice(0, 1_200).map(keyOf)), sorted(keys))
      assert.equal(told(changes[1_200]!), 'k.new=later')
      await watch.nothing()
    })

    suite.where('watch', 'K6 with updatesOnly the present entries are left out', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      await bus.kv.put(bucket, 'old', '1')
      const watch = new Reader(await bus.kv.watch(bucket, undefined, { updatesOnly: true }))
      await watch.nothing()
      await bus.kv.put(bucket, 'new', '2')
      await bus.kv.put(bucket, 'old', '3')
      assert.deepEqual((await watch.take(2)).map(told), ['new=2', 'old=3'])
    })

    suite.where('watch', 'K6 a change made before the first element is asked for is not missed', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      const watch = await bus.kv.watch(bucket, '>', { updatesOnly: true })
      await other.kv.put(bucket, 'k', '1')
      await other.kv.put(bucket, 'k', '2')
      assert.deepEqual((await new Reader(watch).take(2)).map(told), ['k=1', 'k=2'])
    })

    suite.where('watch', 'K6 a filter leaves out other keys, and no other bucket comes in', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      await bus.kv.put(bucket, 'a.1', 'present')
      await bus.kv.put(bucket, 'b.1', 'present')
      const one = new Reader(await bus.kv.watch(bucket, 'a.*'))
      const deep = new Reader(await bus.kv.watch(bucket, 'a.>'))
      for (const key of ['b.1', 'a.2', 'a.2.x', 'a', 'a_2']) await bus.kv.put(bucket, key, 'new')
      await bus.kv.put(`${bucket}.x`, 'a.3', 'elsewhere')
      await bus.kv.delete(bucket, 'a.1')
      assert.deepEqual(sorted((await one.take(3)).map(told)), sorted(['a.1=present', 'a.2=new', '-a.1']))
      assert.deepEqual(sorted((await deep.take(4)).map(told)), sorted(['a.1=present', 'a.2=new', 'a.2.x=new', '-a.1']))
      await Promise.all([one.nothing(), deep.nothing()])
    })

    suite.where('watch', 'K6 no change is skipped, and revisions of a key come in order, while many write', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      const watch = new Reader(await other.kv.watch(bucket))
      const made: string[] = []
      await Promise.all(
        ['a', 'b', 'c'].flatMap((key) =>
          [bus, other].map(async (handle) => {
            for (let count = 0; count < 20; count++) made.push(`${key} ${await handle.kv.put(bucket, key, 'x')}`)
          }),
        ),
      )
      const seen = await watch.take(120)
      assert.deepEqual(sorted(seen.map((change) => `${keyOf(change)} ${revisionOf(change)}`)), sorted(made))
      for (const key of ['a', 'b', 'c']) ascending(seen.filter((change) => keyOf(change) === key).map(revisionOf))
      await watch.nothing()
    })

    suite.where('watch', 'K6 a watch opened while others write ends with what is there, and goes back at no key', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      const last = new Map<string, number>()
      const writing = Promise.all(
        ['a', 'b'].map(async (key) => {
          for (let count = 0; count < 40; count++) last.set(key, await bus.kv.put(bucket, key, `${count}`))
        }),
      )
      await eventually(async () => last.size === 2, 'the first writes')
      const watch = new Reader(await other.kv.watch(bucket))
      const reached = new Map<string, number>()
      await writing
      while (reached.get('a') !== last.get('a') || reached.get('b') !== last.get('b')) {
        const change = await watch.next()
        assert.ok(revisionOf(change) > (reached.get(keyOf(change)) ?? 0), 'revisions grow')
        reached.set(keyOf(change), revisionOf(change))
      }
      await watch.nothing()
    })

    suite.where('watch', 'K6 every watch sees every change', async (stage) => {
      const buses = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      const watches = await Promise.all([0, 1, 1].map(async (index) => new Reader(await buses[index]!.kv.watch(bucket))))
      await buses[0]!.kv.put(bucket, 'k', '1')
      await buses[1]!.kv.delete(bucket, 'k')
      for (const watch of watches) assert.deepEqual((await watch.take(2)).map(told), ['k=1', '-k'])
    })

    suite.where('watch', 'K6 a watch ends at close, at abort and at the end of its bus, without throwing', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const controller = new AbortController()
      const closed = await bus.kv.watch(bucket)
      const aborted = await bus.kv.watch(bucket, '>', { signal: controller.signal })
      const bused = await bus.kv.watch(bucket)
      const readers = [closed, aborted, bused].map((watch) => new Reader<KvChange>(watch))
      for (const reader of readers) void reader.ask()
      await Promise.all([closed.close(), closed.close()])
      controller.abort()
      await readers[0]!.ended()
      await readers[1]!.ended()
      await bus.kv.put(bucket, 'k', '1')
      assert.equal(told(await firstOf(readers[2]!)), 'k=1')
      void readers[2]!.ask()
      await bus.close()
      await readers[2]!.ended()
      await using _disposed = closed
    })
  })
}
