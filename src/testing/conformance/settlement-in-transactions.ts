/** Settlement within the caller's own transaction: `tx` of P7, J2, J6. */

import assert from 'node:assert/strict'
import type { Bus } from '../../core/types.ts'
import { pause, QUIET_MS, rejects, type Suite, sameBytes, text, timed, unique, within } from './kit.ts'

const LONG_TTL_MS = 60_000

export function transactionalSettlementTests<Tx>(suite: Suite<Tx>): void {
  suite.without('transactions', 'P1 J1 every call that takes tx answers unsupported, and does nothing', async (stage) => {
    const bus = await stage.open()
    const [subject, queue, bucket] = [unique('p'), unique('q'), unique('b')]
    const tx = { query: async () => ({ rows: [] }) } as Tx
    const { reader } = await stage.subscribe(bus, subject, unique('d'))
    await rejects(bus.pubsub.publish(subject, 'x', { tx }), 'unsupported')
    await rejects(bus.pubsub.publishMany([{ subject, payload: 'x' }], { tx }), 'unsupported')
    await reader.nothing()
    await rejects(bus.jobs.enqueue(queue, { payload: 'x' }, { tx }), 'unsupported')
    await rejects(bus.jobs.enqueueMany(queue, [{ payload: 'x' }], { tx }), 'unsupported')
    assert.equal(await bus.jobs.claim(queue, 'w', LONG_TTL_MS), null)
    const revision = await bus.kv.put(bucket, 'k', 'x')
    await rejects(bus.kv.put(bucket, 'k', 'y', { tx }), 'unsupported')
    await rejects(bus.kv.cas(bucket, 'k', 'y', revision, { tx }), 'unsupported')
    await rejects(bus.kv.delete(bucket, 'k', { tx }), 'unsupported')
    sameBytes((await bus.kv.get(bucket, 'k'))!.value, 'x')
    await bus.pubsub.publish(subject, 'x')
    const message = await reader.next()
    await rejects(message.ack({ tx }), 'unsupported')
    await message.ack()
    await bus.jobs.enqueue(queue, { payload: 'x' })
    const job = await bus.jobs.claim(queue, 'w', LONG_TTL_MS)
    await rejects(job!.ack({ tx }), 'unsupported')
    await job!.ack()
  })

  suite.group('settlement in a transaction', () => {
    const message = async (stage: Parameters<Parameters<typeof suite.test>[1]>[0], bus: Bus<Tx>, ackWaitMs: number) => {
      const [subject, durable] = [unique('p'), unique('d')]
      const { next, reader } = await stage.subscribe(bus, subject, durable, { ackWaitMs })
      await bus.pubsub.publish(subject, 'x')
      return { message: await next(), next, reader, subject, durable }
    }

    suite.where('transactions', 'P7 an ack with tx takes effect when that transaction commits, beside what else it did', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const held = await message(stage, bus, 500)
      const { tx, commit } = await stage.begin()
      await bus.kv.put(bucket, 'result', 'done', { tx })
      await held.message.ack({ tx })
      await commit()
      await held.reader.nothing(900)
      sameBytes((await bus.kv.get(bucket, 'result'))!.value, 'done')
    })

    suite.where('transactions', 'P7 an ack with tx that is rolled back was none: the message comes again', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const held = await message(stage, bus, 700)
      const { tx, rollback } = await stage.begin()
      await bus.kv.put(bucket, 'result', 'done', { tx })
      await held.message.ack({ tx })
      await rollback()
      assert.equal((await held.next()).attempt, 2)
      assert.equal(await bus.kv.get(bucket, 'result'), null)
    })

    suite.where(
      'transactions',
      'P7 a message acked in an open transaction is not handed out before that ends, though its ack wait is over',
      async (stage) => {
        const bus = await stage.open()
        for (const end of ['commit', 'rollback'] as const) {
          const held = await message(stage, bus, 800)
          const transaction = await stage.begin()
          await held.message.ack({ tx: transaction.tx })
          await held.reader.nothing(1_300)
          await transaction[end]()
          if (end === 'commit') await held.reader.nothing(1_000)
          else assert.equal((await held.next()).attempt, 2)
        }
      },
    )

    suite.where('transactions', 'P7 after a rollback the same delivery may be settled again', async (stage) => {
      const bus = await stage.open()
      const held = await message(stage, bus, 20_000)
      const { tx, rollback } = await stage.begin()
      await held.message.ack({ tx })
      await rollback()
      await held.message.nak()
      const again = await held.next()
      assert.equal(again.attempt, 2)
      const { tx: second, commit } = await stage.begin()
      await again.ack({ tx: second })
      await commit()
      await rejects(again.nak(), 'already_settled')
    })

    suite.where('transactions', 'P7 a settlement refused in a transaction does not abort it', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const held = await message(stage, bus, 300)
      const again = await held.next()
      const { tx, commit } = await stage.begin()
      await rejects(held.message.ack({ tx }), 'lease_lost')
      await bus.kv.put(bucket, 'k', 'x', { tx })
      await commit()
      sameBytes((await bus.kv.get(bucket, 'k'))!.value, 'x')
      assert.ok(again)
    })

    suite.where('transactions', 'P7 several acks, publishes and writes may share one transaction', async (stage) => {
      const bus = await stage.open()
      const [subject, queue, bucket] = [unique('p'), unique('q'), unique('b')]
      const { reader } = await stage.subscribe(bus, subject, unique('d'), { ackWaitMs: 1_500 })
      const out = await stage.subscribe(bus, `${subject}.out`, unique('d'))
      await bus.pubsub.publishMany([
        { subject, payload: '1' },
        { subject, payload: '2' },
      ])
      await bus.jobs.enqueue(queue, { payload: 'job' })
      const [one, two] = await reader.take(2)
      const job = await bus.jobs.claim(queue, 'w', 1_500)
      const { tx, commit } = await stage.begin()
      await one!.ack({ tx })
      await bus.pubsub.publish(`${subject}.out`, 'made', { tx })
      await two!.ack({ tx })
      await job!.ack({ tx })
      const id = await bus.jobs.enqueue(queue, { payload: 'next' }, { tx })
      await bus.kv.put(bucket, 'k', 'x', { tx })
      await commit()
      assert.equal(text((await out.next()).payload), 'made')
      assert.equal((await bus.jobs.claim(queue, 'w', LONG_TTL_MS))?.id, id)
      assert.equal(await bus.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 1_800 }), null)
      await reader.nothing()
    })

    suite.where('transactions', 'J6 an ack of a job with tx takes effect with that transaction', async (stage) => {
      const bus = await stage.open()
      for (const end of ['commit', 'rollback'] as const) {
        const queue = unique('q')
        await bus.jobs.enqueue(queue, { payload: 'x' })
        const job = await bus.jobs.claim(queue, 'w', 500)
        const transaction = await stage.begin()
        await job!.ack({ tx: transaction.tx })
        assert.equal(await bus.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 900 }), null, 'not before the transaction ends')
        await transaction[end]()
        if (end === 'commit') assert.equal(await bus.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 600 }), null)
        else assert.equal((await bus.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 5_000 }))?.attempt, 2)
      }
    })

    suite.where('transactions', 'J6 a refused ack of a job does not abort the transaction', async (stage) => {
      const bus = await stage.open()
      const [queue, bucket] = [unique('q'), unique('b')]
      await bus.jobs.enqueue(queue, { payload: 'x' })
      const stale = await bus.jobs.claim(queue, 'w', 300)
      const fresh = await bus.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 5_000 })
      const { tx, commit } = await stage.begin()
      await rejects(stale!.ack({ tx }), 'lease_lost')
      await bus.kv.put(bucket, 'k', 'x', { tx })
      await commit()
      assert.ok(await bus.kv.get(bucket, 'k'))
      await fresh!.ack()
    })

    suite.where('transactions', 'J6 a heartbeat does not wait behind an ack in an open transaction', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      await bus.jobs.enqueue(queue, { payload: 'x' })
      const job = await bus.jobs.claim(queue, 'w', LONG_TTL_MS)
      const { tx, commit } = await stage.begin()
      await job!.ack({ tx })
      const ms = await timed(() => within(job!.heartbeat(), 2_000, 'the heartbeat'))
      assert.ok(ms < 2_000)
      await within(job!.lease.heartbeat(), 2_000, 'the heartbeat of the lease')
      assert.equal(job!.lease.signal.aborted, false)
      await commit()
      assert.equal(await bus.jobs.claim(queue, 'w', LONG_TTL_MS), null)
    })

    suite.where('transactions', 'J2 a claim does not wait behind an ack in an open transaction', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      await bus.jobs.enqueueMany(queue, [{ payload: '1' }, { payload: '2' }])
      const job = await bus.jobs.claim(queue, 'w', 300)
      const { tx, commit } = await stage.begin()
      await job!.ack({ tx })
      await pause(350)
      // Both are due, and the claim has room for both.
      const next = await within(bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 5 }), 2_000, 'the claim')
      assert.deepEqual(
        next.map(({ payload }) => text(payload)),
        ['2'],
      )
      await commit()
      assert.equal(await bus.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: QUIET_MS }), null)
    })

    suite.where(
      'transactions',
      'P7 a second settlement while the ack waits in its transaction does not wait, and is refused',
      async (stage) => {
        const bus = await stage.open()
        const held = await message(stage, bus, 20_000)
        const { tx, commit } = await stage.begin()
        await held.message.ack({ tx })
        await within(rejects(held.message.nak(), 'already_settled'), 2_000, 'the refusal')
        await commit()
        await held.reader.nothing()
      },
    )
  })
}
