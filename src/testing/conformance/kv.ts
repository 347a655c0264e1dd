/** Entries of the key-value store: K1 to K4. What watches them: watch.ts; leases: leases.ts. */

import assert from 'node:assert/strict'
import type { Bus } from '../../core/types.ts'
import { ascending, eventually, oddPayloads, pause, rejects, type Suite, sameBytes, sorted, succeeds, text, unique } from './kit.ts'

async function collect(keys: AsyncIterable<string>): Promise<string[]> {
  const seen: string[] = []
  for await (const key of keys) seen.push(key)
  return seen.sort()
}

async function conflict(promise: Promise<unknown>, expected: number | null, actual: number | null): Promise<void> {
  const error = await rejects(promise, 'cas_conflict')
  assert.equal(error.expected, expected, 'expected')
  assert.equal(error.actual, actual, 'actual')
}

export function kvTests<Tx>(suite: Suite<Tx>): void {
  suite.group('entries', () => {
    suite.test('K4 get answers what was put: key, value, revision and time', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      assert.equal(await bus.kv.get(bucket, 'k'), null)
      const before = Date.now()
      const revision = await bus.kv.put(bucket, 'k', 'value')
      assert.ok(Number.isSafeInteger(revision) && revision >= 1)
      const entry = await bus.kv.get(bucket, 'k')
      assert.equal(entry?.key, 'k')
      sameBytes(entry!.value, 'value')
      assert.equal(entry?.revision, revision)
      assert.ok(entry!.updatedAt instanceof Date && Math.abs(entry!.updatedAt.getTime() - before) < 60_000)
    })

    suite.test('K4 values come back byte for byte', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      for (const { payload, bytes } of oddPayloads()) {
        const revision = await bus.kv.put(bucket, 'put', payload)
        sameBytes((await bus.kv.get(bucket, 'put'))!.value, bytes)
        await bus.kv.cas(bucket, 'put', payload, revision)
        sameBytes((await bus.kv.get(bucket, 'put'))!.value, bytes)
      }
    })

    suite.test('K4 a buffer may be reused as soon as put has returned its promise', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const buffer = Uint8Array.of(1, 2)
      const put = bus.kv.put(bucket, 'k', buffer)
      buffer.fill(0)
      await put
      sameBytes((await bus.kv.get(bucket, 'k'))!.value, Uint8Array.of(1, 2))
    })

    suite.test('K4 a resolved write is seen by the next get of the same handle', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      for (let count = 0; count < 20; count++) {
        const revision = await bus.kv.put(bucket, 'k', `${count}`)
        assert.equal((await bus.kv.get(bucket, 'k'))?.revision, revision)
      }
      await bus.kv.delete(bucket, 'k')
      assert.equal(await bus.kv.get(bucket, 'k'), null)
    })

    suite.where('readYourWrites', 'K4 a resolved write is seen by the next get of every handle', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      for (let count = 0; count < 20; count++) {
        const revision = await bus.kv.put(bucket, 'k', `${count}`)
        const entry = await other.kv.get(bucket, 'k')
        assert.equal(entry?.revision, revision)
        await bus.kv.cas(bucket, 'k', `${count} again`, revision)
        sameBytes((await other.kv.get(bucket, 'k'))!.value, `${count} again`)
        await other.kv.delete(bucket, 'k')
        assert.equal(await bus.kv.get(bucket, 'k'), null)
      }
    })

    suite.test('K4 buckets and keys are told apart by every character', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const keys = ['a', 'A', 'a.b', 'a/b', 'a-b', 'a_b', 'a=b', 'ab', 'a.b.c', '/', '//', '-', '=', '_', 'a/.b', 'x'.repeat(512)]
      for (const name of [bucket, `${bucket}.x`, `${bucket}_x`]) for (const key of keys) await bus.kv.put(name, key, `${name} ${key}`)
      for (const name of [bucket, `${bucket}.x`, `${bucket}_x`]) {
        for (const key of keys) sameBytes((await bus.kv.get(name, key))!.value, `${name} ${key}`)
        assert.deepEqual(await collect(bus.kv.keys(name)), sorted(keys))
      }
    })

    suite.test('K1 revisions of a key grow through puts, cas, deletes, expiry and new beginnings', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      const seen = [await bus.kv.put(bucket, 'k', '1')]
      seen.push(await bus.kv.put(bucket, 'k', '1'))
      seen.push(await bus.kv.cas(bucket, 'k', '2', seen.at(-1)!))
      await bus.kv.delete(bucket, 'k')
      seen.push(await other.kv.cas(bucket, 'k', '3', null))
      await other.kv.delete(bucket, 'k', { expected: seen.at(-1)! })
      seen.push(await bus.kv.put(bucket, 'k', '4', { ttlMs: 300 }))
      await eventually(async () => (await bus.kv.get(bucket, 'k')) === null, 'the expiry')
      seen.push(await bus.kv.cas(bucket, 'k', '5', null))
      seen.push(await bus.kv.put(bucket, 'k', '6'))
      ascending(seen)
    })

    suite.test('K1 concurrent puts get different revisions, and the greatest one is what is left', async (stage) => {
      const buses = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      const made = await Promise.all(
        Array.from({ length: 30 }, async (_, index) => ({
          value: `${index}`,
          revision: await buses[index % 2]!.kv.put(bucket, 'k', `${index}`),
        })),
      )
      assert.equal(new Set(made.map(({ revision }) => revision)).size, 30)
      const last = made.reduce((one, two) => (one.revision > two.revision ? one : two))
      const entry = await buses[0]!.kv.get(bucket, 'k')
      assert.equal(entry?.revision, last.revision)
      sameBytes(entry!.value, last.value)
    })

    suite.test('K1 a reader never sees a revision go back while others put and delete', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      let writing = true
      const values = new Map<number, string>()
      const reading = (async () => {
        let least = 0
        while (writing) {
          const entry = await other.kv.get(bucket, 'k')
          if (entry) {
            assert.ok(entry.revision >= least, `revision ${entry.revision} after ${least}`)
            least = entry.revision
            assert.equal(values.get(least) ?? text(entry.value), text(entry.value), 'a revision has one value')
            values.set(least, text(entry.value))
          }
          await pause(1)
        }
      })()
      const writers = ['a', 'b'].map(async (writer) => {
        for (let count = 0; count < 30; count++) {
          await bus.kv.put(bucket, 'k', `${writer}${count}`)
          if (count % 3 === 0) await bus.kv.delete(bucket, 'k')
        }
      })
      await Promise.all(writers)
      writing = false
      await reading
    })

    suite.test('K2 cas with null succeeds only while the key is absent', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const revision = await bus.kv.cas(bucket, 'k', 'first', null)
      await conflict(bus.kv.cas(bucket, 'k', 'second', null), null, revision)
      sameBytes((await bus.kv.get(bucket, 'k'))!.value, 'first')
      await bus.kv.delete(bucket, 'k')
      const again = await bus.kv.cas(bucket, 'k', 'third', null)
      assert.ok(again > revision)
      sameBytes((await bus.kv.get(bucket, 'k'))!.value, 'third')
    })

    suite.test('K2 cas with a revision succeeds only while the key is at it', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      await conflict(bus.kv.cas(bucket, 'k', 'x', 1), 1, null)
      assert.equal(await bus.kv.get(bucket, 'k'), null)
      const first = await bus.kv.put(bucket, 'k', '1')
      const second = await bus.kv.cas(bucket, 'k', '2', first)
      assert.ok(second > first)
      await conflict(bus.kv.cas(bucket, 'k', '3', first), first, second)
      await conflict(bus.kv.cas(bucket, 'k', '3', second + 1_000_000), second + 1_000_000, second)
      const entry = await bus.kv.get(bucket, 'k')
      assert.equal(entry?.revision, second)
      sameBytes(entry!.value, '2')
    })

    suite.test('K2 no revision from before a delete is ever good again', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const first = await bus.kv.put(bucket, 'k', '1')
      await bus.kv.delete(bucket, 'k')
      for (let guess = first; guess < first + 5; guess++) await conflict(bus.kv.cas(bucket, 'k', 'x', guess), guess, null)
      const second = await bus.kv.put(bucket, 'k', '1')
      await conflict(bus.kv.cas(bucket, 'k', 'x', first), first, second)
    })

    suite.test('K2 an expired key is absent', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const revision = await bus.kv.put(bucket, 'k', 'x', { ttlMs: 300 })
      await eventually(async () => (await bus.kv.get(bucket, 'k')) === null, 'the expiry')
      await conflict(bus.kv.cas(bucket, 'k', 'y', revision), revision, null)
      await bus.kv.delete(bucket, 'k')
      assert.ok((await bus.kv.cas(bucket, 'k', 'y', null)) > revision)
    })

    for (const start of ['absent', 'present', 'deleted'] as const) {
      suite.test(`K2 of concurrent cas calls on a key that is ${start} one succeeds`, async (stage) => {
        const buses = [await stage.open(), await stage.open()]
        const bucket = unique('b')
        let expected: number | null = null
        if (start !== 'absent') expected = await buses[0]!.kv.put(bucket, 'k', 'x')
        if (start === 'deleted') {
          await buses[0]!.kv.delete(bucket, 'k')
          expected = null
        }
        const outcomes = await Promise.all(
          Array.from({ length: 16 }, (_, index) => succeeds(buses[index % 2]!.kv.cas(bucket, 'k', `${index}`, expected), 'cas_conflict')),
        )
        assert.equal(outcomes.filter(Boolean).length, 1)
        sameBytes((await buses[0]!.kv.get(bucket, 'k'))!.value, `${outcomes.indexOf(true)}`)
      })
    }

    suite.test('K2 counters kept by cas lose no increment', async (stage) => {
      const buses = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      const increment = async (bus: Bus<Tx>) => {
        for (;;) {
          const entry = await bus.kv.get(bucket, 'n')
          const next = String(Number(entry === null ? 0 : text(entry.value)) + 1)
          if (await succeeds(bus.kv.cas(bucket, 'n', next, entry?.revision ?? null), 'cas_conflict')) return
        }
      }
      await Promise.all(
        Array.from({ length: 5 }, async (_, index) => {
          for (let count = 0; count < 8; count++) await increment(buses[index % 2]!)
        }),
      )
      sameBytes((await buses[1]!.kv.get(bucket, 'n'))!.value, '40')
    })

    suite.test('K3 delete of an absent key succeeds, as often as one likes', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      await bus.kv.delete(bucket, 'never')
      await bus.kv.put(bucket, 'k', 'x')
      await bus.kv.delete(bucket, 'k')
      await bus.kv.delete(bucket, 'k')
      assert.equal(await bus.kv.get(bucket, 'k'), null)
      assert.deepEqual(await collect(bus.kv.keys(bucket)), [])
    })

    suite.test('K3 with expected it deletes only while the key is at that revision', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const first = await bus.kv.put(bucket, 'k', '1')
      const second = await bus.kv.put(bucket, 'k', '2')
      await conflict(bus.kv.delete(bucket, 'k', { expected: first }), first, second)
      sameBytes((await bus.kv.get(bucket, 'k'))!.value, '2')
      await bus.kv.delete(bucket, 'k', { expected: second })
      assert.equal(await bus.kv.get(bucket, 'k'), null)
      await conflict(bus.kv.delete(bucket, 'k', { expected: second }), second, null)
    })

    suite.test('K3 of concurrent conditional deletes one succeeds', async (stage) => {
      const buses = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      const expected = await buses[0]!.kv.put(bucket, 'k', 'x')
      const outcomes = await Promise.all(
        Array.from({ length: 8 }, (_, index) => succeeds(buses[index % 2]!.kv.delete(bucket, 'k', { expected }), 'cas_conflict')),
      )
      assert.equal(outcomes.filter(Boolean).length, 1)
    })
  })

  suite.group('time to live', () => {
    suite.test('K2 an entry is absent once its ttl is over, and not before', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      await bus.kv.put(bucket, 'long', 'x', { ttlMs: 60_000 })
      const asked = performance.now()
      await bus.kv.put(bucket, 'short', 'x', { ttlMs: 500 })
      const put = performance.now()
      await eventually(async () => (await bus.kv.get(bucket, 'short')) === null, 'the expiry')
      const now = performance.now()
      assert.ok(now - asked >= 495, `gone after ${now - asked} ms`)
      assert.ok(now - put <= 2_500, `gone after ${now - put} ms only`)
      assert.deepEqual(await collect(bus.kv.keys(bucket)), ['long'])
      sameBytes((await bus.kv.get(bucket, 'long'))!.value, 'x')
    })

    suite.test('K2 a write without a ttl ends the one before it; cas may give one', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const revision = await bus.kv.put(bucket, 'kept', 'x', { ttlMs: 400 })
      await bus.kv.cas(bucket, 'kept', 'y', revision)
      await bus.kv.put(bucket, 'kept2', 'x', { ttlMs: 400 })
      await bus.kv.put(bucket, 'kept2', 'y')
      await bus.kv.cas(bucket, 'gone', 'x', null, { ttlMs: 400 })
      await eventually(async () => (await bus.kv.get(bucket, 'gone')) === null, 'the expiry')
      await pause(100)
      sameBytes((await bus.kv.get(bucket, 'kept'))!.value, 'y')
      sameBytes((await bus.kv.get(bucket, 'kept2'))!.value, 'y')
    })
  })

  suite.group('keys', () => {
    suite.test('K4 keys yields the present ones, by a filter as in subjects', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const all = ['a', 'b', 'a.x', 'a.y', 'a.x.1', 'b.x', 'a_x', 'axx.x', 'a/x.x', 'A.x']
      for (const key of [...all, 'gone']) await bus.kv.put(bucket, key, 'x')
      await bus.kv.delete(bucket, 'gone')
      const filters: Record<string, string[]> = {
        '>': all,
        '*': ['a', 'b', 'a_x'],
        'a.*': ['a.x', 'a.y'],
        'a.>': ['a.x', 'a.y', 'a.x.1'],
        '*.x': ['a.x', 'b.x', 'axx.x', 'a/x.x', 'A.x'],
        '*.*.*': ['a.x.1'],
        'a.x': ['a.x'],
        a_x: ['a_x'],
        gone: [],
        'z.>': [],
      }
      assert.deepEqual(await collect(bus.kv.keys(bucket)), sorted(all))
      for (const [filter, expected] of Object.entries(filters)) {
        assert.deepEqual(await collect(bus.kv.keys(bucket, filter)), sorted(expected), `filter ${filter}`)
      }
      assert.deepEqual(await collect(bus.kv.keys(unique('empty'))), [])
    })

    suite.test('K4 keys yields every one of many once', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const keys = Array.from({ length: 1_200 }, (_, index) => `k.${index}`)
      for (let start = 0; start < keys.length; start += 200) {
        await Promise.all(keys.slice(start, start + 200).map((key) => bus.kv.put(bucket, key, 'x')))
      }
      assert.deepEqual(await collect(bus.kv.keys(bucket)), sorted(keys))
      assert.deepEqual(await collect(bus.kv.keys(bucket, 'k.*')), sorted(keys))
    })
  })
}
