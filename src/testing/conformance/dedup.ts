/** Dedup keys, and the records in the buckets of the bus: J5. */

import assert from 'node:assert/strict'
import type { Bus, ClaimedJob } from '../../core/types.ts'
import { rejects, type Suite, sameBytes, sorted, text, unique } from './kit.ts'

/** Not over while a test runs. */
const LONG_TTL_MS = 60_000

/** Claims one that must be there. */
async function claimed<Tx>(bus: Bus<Tx>, queue: string, waitMs = 0): Promise<ClaimedJob<Tx>> {
  const job = await bus.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs })
  assert.ok(job, 'a job was due')
  return job
}

export function dedupTests<Tx>(suite: Suite<Tx>): void {
  suite.group('dedup keys', () => {
    suite.test('J5 a second enqueue with the key answers the first id and adds nothing', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const queue = unique('q')
      const id = await bus.jobs.enqueue(queue, { payload: 'first', dedupKey: 'k' })
      assert.equal(
        await bus.jobs.enqueue(queue, { payload: 'second', dedupKey: 'k', ...(bus.supports.priorities ? { priority: 5 } : {}) }),
        id,
      )
      assert.equal(await other.jobs.enqueue(queue, { payload: 'third', dedupKey: 'k', delayMs: 5_000 }), id)
      assert.notEqual(await bus.jobs.enqueue(queue, { payload: 'other', dedupKey: 'K' }), id)
      const jobs = await bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 10 })
      assert.deepEqual(sorted(jobs.map(({ payload }) => text(payload))), ['first', 'other'])
    })

    suite.test('J5 the key counts in its queue alone', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const ids = [
        await bus.jobs.enqueue(queue, { payload: 'x', dedupKey: 'k' }),
        await bus.jobs.enqueue(`${queue}.a`, { payload: 'x', dedupKey: 'k' }),
        await bus.jobs.enqueue(queue, { payload: 'x' }),
        await bus.jobs.enqueue(queue, { payload: 'x' }),
      ]
      assert.equal(new Set(ids).size, 4)
    })

    suite.test('J5 of concurrent enqueues with one key one adds a job, and all answer its id', async (stage) => {
      const buses = [await stage.open(), await stage.open()]
      const queue = unique('q')
      const ids = await Promise.all(
        Array.from({ length: 16 }, (_, index) =>
          index % 4 === 0
            ? buses[index % 2]!.jobs.enqueueMany(queue, [{ payload: `${index}`, dedupKey: 'k' }]).then(([id]) => id)
            : buses[index % 2]!.jobs.enqueue(queue, { payload: `${index}`, dedupKey: 'k' }),
        ),
      )
      assert.equal(new Set(ids).size, 1)
      assert.equal((await buses[0]!.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 50 })).length, 1)
    })

    suite.test('J5 enqueueMany knows keys of earlier calls and within itself', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const earlier = await bus.jobs.enqueue(queue, { payload: 'a', dedupKey: 'a' })
      const ids = await bus.jobs.enqueueMany(queue, [
        { payload: 'b', dedupKey: 'b' },
        { payload: 'a2', dedupKey: 'a' },
        { payload: 'b2', dedupKey: 'b' },
        { payload: 'free' },
      ])
      assert.equal(ids[1], earlier)
      assert.equal(ids[2], ids[0])
      assert.equal(new Set(ids).size, 3)
      const jobs = await bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 10 })
      assert.deepEqual(sorted(jobs.map(({ payload }) => text(payload))), ['a', 'b', 'free'])
    })

    suite.test('J5 many concurrent enqueueMany calls with the same keys in different orders all succeed', async (stage) => {
      const buses = [await stage.open(), await stage.open()]
      const queue = unique('q')
      const keys = ['a', 'b', 'c', 'd', 'e']
      const answers = await Promise.all(
        Array.from({ length: 10 }, async (_, index) => {
          const order = index % 2 === 0 ? keys : keys.toReversed()
          const ids = await buses[index % 2]!.jobs.enqueueMany(
            queue,
            order.map((dedupKey) => ({ payload: dedupKey, dedupKey })),
          )
          return new Map(order.map((key, place) => [key, ids[place]]))
        }),
      )
      for (const key of keys) assert.equal(new Set(answers.map((answer) => answer.get(key))).size, 1)
      assert.equal((await buses[0]!.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 50 })).length, 5)
    })

    suite.test('J5 the record outlives its job: acked, dead or alive, the key adds nothing', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const acked = await bus.jobs.enqueue(queue, { payload: 'x', dedupKey: 'acked' })
      await (await claimed(bus, queue)).ack()
      const dead = await bus.jobs.enqueue(queue, { payload: 'x', dedupKey: 'dead' })
      await (await claimed(bus, queue)).deadLetter('broken')
      assert.equal(await bus.jobs.enqueue(queue, { payload: 'again', dedupKey: 'acked' }), acked)
      assert.equal(await bus.jobs.enqueue(queue, { payload: 'again', dedupKey: 'dead' }), dead)
      assert.equal(await bus.jobs.claim(queue, 'w', LONG_TTL_MS), null)
    })

    suite.test('J5 the record never stops a retry of its own job', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const id = await bus.jobs.enqueue(queue, { payload: 'x', dedupKey: 'k' })
      await (await claimed(bus, queue)).nak(0)
      const again = await claimed(bus, queue)
      assert.deepEqual([again.id, again.attempt], [id, 2])
      assert.equal(await bus.jobs.enqueue(queue, { payload: 'x', dedupKey: 'k' }), id)
    })

    suite.test('J5 kv shows the record: bucket dedup.<queue>, the id as its value, keys of free text', async (stage) => {
      const bus = await stage.open()
      const queue = `${unique('q')}.sub`
      const bucket = `dedup.${queue}`
      assert.equal(await bus.kv.get(bucket, 'k'), null)
      const keys = ['k', 'with space', 'order/17:..x.', '漢字 \u{1f600}', "'; drop table jobs; --", '%', '_', 'x'.repeat(512)]
      for (const dedupKey of keys) {
        const id = await bus.jobs.enqueue(queue, { payload: 'x', dedupKey })
        const entry = await bus.kv.get(bucket, dedupKey)
        assert.equal(entry?.key, dedupKey)
        sameBytes(entry!.value, id)
        assert.ok(entry!.revision >= 1 && entry!.updatedAt instanceof Date)
      }
      const listed: string[] = []
      for await (const key of bus.kv.keys(bucket)) listed.push(key)
      assert.deepEqual(sorted(listed), sorted(keys))
      for (const job of await bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 20 })) await job.ack()
      assert.ok(await bus.kv.get(bucket, 'k'), 'also when the job is gone')
    })

    suite.test('J5 users may read and delete in the buckets of the bus, but not write there', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const bucket = `dedup.${queue}`
      const id = await bus.jobs.enqueue(queue, { payload: '1', dedupKey: 'k' })
      for (const name of [bucket, 'dedup.x']) {
        await rejects(bus.kv.put(name, 'k', 'x'), 'invalid_argument', 'bucket')
        await rejects(bus.kv.cas(name, 'k', 'x', null), 'invalid_argument', 'bucket')
        await rejects(bus.kv.lease(name, 'k', 1_000), 'invalid_argument', 'bucket')
      }
      sameBytes((await bus.kv.get(bucket, 'k'))!.value, id)
      await (await claimed(bus, queue)).ack()
      await bus.kv.delete(bucket, 'k')
      await bus.kv.delete(bucket, 'k')
      assert.equal(await bus.kv.get(bucket, 'k'), null)
      assert.notEqual(await bus.jobs.enqueue(queue, { payload: '2', dedupKey: 'k' }), id)
      sameBytes((await claimed(bus, queue)).payload, '2')
    })
  })
}
