/** What the caller's own transaction decides: `tx` of P1, P9, P12, P14, J1, J5, K1, K2, K6. Settlement: settlement-in-transactions.ts. */

import assert from 'node:assert/strict'
import { pause, QUIET_MS, Reader, rejects, type Suite, sameBytes, sorted, text, unique, within } from './kit.ts'

const LONG_TTL_MS = 60_000

export function transactionTests<Tx>(suite: Suite<Tx>): void {
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

  suite.group('publish and enqueue in a transaction', () => {
    suite.where('transactions', 'P1 a publish with tx is delivered once that transaction commits, and not before', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('p')
      const { reader } = await stage.subscribe(other, `${subject}.*`, unique('d'))
      const transaction = await stage.begin()
      const { tx } = transaction
      const ack = await bus.pubsub.publish(`${subject}.a`, '1', { tx, headers: { h: '1' } })
      const acks = await bus.pubsub.publishMany(
        [
          { subject: `${subject}.b`, payload: '2' },
          { subject: `${subject}.a`, payload: '3' },
        ],
        { tx },
      )
      await reader.nothing()
      await transaction.commit()
      const messages = await reader.take(3, 3_000)
      assert.deepEqual(
        messages.map(({ payload }) => text(payload)),
        ['1', '2', '3'],
      )
      assert.deepEqual(
        messages.map(({ seq }) => seq),
        [ack, ...acks].map(({ seq }) => seq),
      )
    })

    suite.where('transactions', 'P1 J1 what was published or enqueued with tx does not exist after a rollback', async (stage) => {
      const bus = await stage.open()
      const [subject, queue] = [unique('p'), unique('q')]
      const { reader } = await stage.subscribe(bus, subject, unique('d'))
      const { tx, rollback } = await stage.begin()
      await bus.pubsub.publish(subject, 'x', { tx })
      await bus.pubsub.publishMany([{ subject, payload: 'x' }], { tx })
      await bus.jobs.enqueue(queue, { payload: 'x' }, { tx })
      await bus.jobs.enqueueMany(queue, [{ payload: 'x' }], { tx })
      await rollback()
      await reader.nothing()
      assert.equal(await bus.jobs.claim(queue, 'w', LONG_TTL_MS), null)
      await bus.pubsub.publish(subject, 'after')
      assert.equal(text((await reader.next()).payload), 'after')
    })

    suite.where(
      'transactions',
      'J1 a job enqueued with tx is claimable once that transaction commits, and wakes a waiting claim',
      async (stage) => {
        const [bus, other] = [await stage.open(), await stage.open()]
        const queue = unique('q')
        const waiting = other.jobs.claim(queue, 'w', LONG_TTL_MS, { waitMs: 20_000 })
        const { tx, commit } = await stage.begin()
        const id = await bus.jobs.enqueue(queue, { payload: 'x' }, { tx })
        assert.equal(await Promise.race([waiting, pause(QUIET_MS)]), undefined)
        await commit()
        assert.equal((await within(waiting, 3_000, 'the job'))?.id, id)
      },
    )

    suite.where('transactions', 'P9 an open transaction holds back its own messages and no others', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const { reader } = await stage.subscribe(bus, subject, unique('d'))
      const [first, second] = [await stage.begin(), await stage.begin()]
      await bus.pubsub.publish(subject, 'first', { tx: first.tx })
      await bus.pubsub.publish(subject, 'second', { tx: second.tx })
      for (let count = 0; count < 5; count++) await bus.pubsub.publish(subject, `free ${count}`)
      assert.deepEqual(
        (await reader.take(5, 3_000)).map(({ payload }) => text(payload)),
        Array.from({ length: 5 }, (_, n) => `free ${n}`),
      )
      await second.commit()
      assert.equal(text((await reader.next(3_000)).payload), 'second')
      await bus.pubsub.publish(subject, 'later')
      assert.equal(text((await reader.next(3_000)).payload), 'later')
      await first.commit()
      assert.equal(text((await reader.next(3_000)).payload), 'first')
      await reader.nothing()
    })

    suite.where(
      'transactions',
      'P9 no message is skipped, whatever the order in which transactions begin, publish and commit',
      async (stage) => {
        const bus = await stage.open()
        const subject = unique('p')
        const { reader } = await stage.subscribe(bus, subject, unique('d'))
        const expected: string[] = []
        const publisher = async (name: number) => {
          for (let round = 0; round < 6; round++) {
            const { tx, commit, rollback } = await stage.begin()
            const payloads = [`${name}.${round}.a`, `${name}.${round}.b`]
            for (const payload of payloads) {
              await bus.pubsub.publish(subject, payload, { tx })
              await pause(Math.random() * 30)
            }
            if ((name + round) % 4 === 0) await rollback()
            else {
              await commit()
              expected.push(...payloads)
            }
          }
        }
        const seen: string[] = []
        const publishing = Promise.all([0, 1, 2, 3].map(publisher))
        let over = false
        const end = () => {
          over = true
        }
        publishing.then(end, end)
        while (!over || seen.length < expected.length) {
          const message = over ? await reader.next() : await reader.poll(50)
          if (!message) continue
          seen.push(text(message.payload))
          await message.ack()
        }
        await publishing
        await reader.nothing()
        assert.deepEqual(sorted(seen), sorted(expected))
      },
    )

    suite.where('transactions', 'P9 a durable started at new, while a transaction is open, gets what that commits later', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const { tx, commit } = await stage.begin()
      await bus.pubsub.publish(subject, 'open', { tx })
      await bus.pubsub.publish(subject, 'done')
      const { reader } = await stage.subscribe(bus, subject, unique('d'), { start: 'new' })
      await commit()
      assert.equal(text((await reader.next()).payload), 'open')
      await reader.nothing()
    })

    suite.where('transactions', 'P12 a msgId of a transaction that rolled back is free again', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const msgId = unique('id')
      const { tx, rollback } = await stage.begin()
      assert.equal((await bus.pubsub.publish(subject, 'lost', { tx, msgId })).duplicate, false)
      assert.equal((await bus.pubsub.publish(subject, 'lost again', { tx, msgId })).duplicate, true)
      const racing = bus.pubsub.publish(subject, 'kept', { msgId })
      racing.catch(() => {})
      await bus.pubsub.publish(subject, 'free')
      await rollback()
      assert.equal((await within(racing, 3_000, 'the publish')).duplicate, false)
      const { reader } = await stage.subscribe(bus, subject, unique('d'))
      assert.deepEqual(sorted((await reader.take(2)).map(({ payload }) => text(payload))), ['free', 'kept'])
    })

    suite.where('transactions', 'J5 the record comes and goes with the transaction of its job', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const bucket = `dedup.${queue}`
      const lost = await stage.begin()
      const lostId = await bus.jobs.enqueue(queue, { payload: 'lost', dedupKey: 'k' }, { tx: lost.tx })
      assert.equal(await bus.jobs.enqueue(queue, { payload: 'lost', dedupKey: 'k' }, { tx: lost.tx }), lostId)
      assert.equal(await bus.kv.get(bucket, 'k'), null)
      const racing = bus.jobs.enqueue(queue, { payload: 'kept', dedupKey: 'k' })
      racing.catch(() => {})
      await bus.jobs.enqueue(`${queue}.free`, { payload: 'free' })
      await lost.rollback()
      const id = await within(racing, 3_000, 'the enqueue')
      sameBytes((await bus.kv.get(bucket, 'k'))!.value, id)
      const later = await stage.begin()
      assert.equal(await bus.jobs.enqueue(queue, { payload: 'more', dedupKey: 'k' }, { tx: later.tx }), id)
      await later.commit()
      const jobs = await bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 10 })
      assert.deepEqual(
        jobs.map(({ payload }) => text(payload)),
        ['kept'],
      )
    })

    suite.where('transactions', 'J5 an enqueue that waits for a transaction with its key answers that one’s job', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const first = await stage.begin()
      const id = await bus.jobs.enqueue(queue, { payload: 'first', dedupKey: 'k' }, { tx: first.tx })
      const racing = bus.jobs.enqueue(queue, { payload: 'second', dedupKey: 'k' })
      racing.catch(() => {})
      // The other one has been sent before this, and has not been answered.
      await bus.jobs.enqueue(`${queue}.free`, { payload: 'free' })
      await first.commit()
      assert.equal(await within(racing, 3_000, 'the enqueue'), id)
      const jobs = await bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 10 })
      assert.deepEqual(
        jobs.map(({ payload }) => text(payload)),
        ['first'],
      )
    })

    suite.where('transactions', 'P1 a refused argument does not abort the transaction', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const { tx, commit } = await stage.begin()
      await bus.pubsub.publish(subject, 'one', { tx })
      await rejects(bus.pubsub.publish(`${subject}.*`, 'x', { tx }), 'invalid_argument')
      await rejects(bus.pubsub.publish(subject, 'x'.repeat(1_048_577), { tx }), 'payload_too_large')
      await rejects(bus.jobs.enqueue('no queue', { payload: 'x' }, { tx }), 'invalid_argument')
      await bus.pubsub.publish(subject, 'two', { tx })
      await commit()
      const { reader } = await stage.subscribe(bus, subject, unique('d'))
      assert.deepEqual(
        (await reader.take(2)).map(({ payload }) => text(payload)),
        ['one', 'two'],
      )
    })

    suite.where('transactions', 'P1 anything else than a transaction is refused as tx', async (stage) => {
      const bus = await stage.open()
      for (const tx of [null, 1, 'tx', {}, []] as unknown as Tx[]) {
        await rejects(bus.pubsub.publish(unique('p'), 'x', { tx }), 'invalid_argument', 'tx')
        await rejects(bus.jobs.enqueue(unique('q'), { payload: 'x' }, { tx }), 'invalid_argument', 'tx')
        await rejects(bus.kv.put(unique('b'), 'k', 'x', { tx }), 'invalid_argument', 'tx')
      }
    })
  })

  suite.group('keys in a transaction', () => {
    suite.where('transactions', 'K1 put, cas and delete with tx are seen once that transaction commits', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const old = await bus.kv.put(bucket, 'cas', 'old')
      await bus.kv.put(bucket, 'deleted', 'old')
      const { tx, commit } = await stage.begin()
      const put = await bus.kv.put(bucket, 'put', 'new', { tx })
      const cas = await bus.kv.cas(bucket, 'cas', 'new', old, { tx })
      const twice = await bus.kv.cas(bucket, 'cas', 'newer', cas, { tx })
      await bus.kv.delete(bucket, 'deleted', { tx })
      assert.equal(await bus.kv.get(bucket, 'put'), null)
      sameBytes((await bus.kv.get(bucket, 'cas'))!.value, 'old')
      sameBytes((await bus.kv.get(bucket, 'deleted'))!.value, 'old')
      await commit()
      assert.equal((await bus.kv.get(bucket, 'put'))?.revision, put)
      assert.equal((await bus.kv.get(bucket, 'cas'))?.revision, twice)
      assert.equal(await bus.kv.get(bucket, 'deleted'), null)
    })

    suite.where(
      'transactions',
      'K1 after a rollback value and revision are the old ones, and the next revision is a new one',
      async (stage) => {
        const bus = await stage.open()
        const bucket = unique('b')
        const old = await bus.kv.put(bucket, 'k', 'old')
        const { tx, rollback } = await stage.begin()
        const lost = await bus.kv.put(bucket, 'k', 'lost', { tx })
        await bus.kv.delete(bucket, 'k', { tx })
        await bus.kv.cas(bucket, 'other', 'lost', null, { tx })
        await rollback()
        const entry = await bus.kv.get(bucket, 'k')
        assert.equal(entry?.revision, old)
        sameBytes(entry!.value, 'old')
        assert.equal(await bus.kv.get(bucket, 'other'), null)
        const next = await bus.kv.cas(bucket, 'k', 'new', old)
        assert.ok(next > old && next !== lost)
      },
    )

    suite.where('transactions', 'K1 a write that waits for an open transaction gets the greater revision', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const old = await bus.kv.put(bucket, 'present', 'x')
      const { tx, commit } = await stage.begin()
      const first = [await bus.kv.put(bucket, 'absent', '1', { tx }), await bus.kv.cas(bucket, 'present', '1', old, { tx })]
      const waiting = Promise.all([bus.kv.put(bucket, 'absent', '2'), bus.kv.put(bucket, 'present', '2')])
      assert.equal(await Promise.race([waiting, pause(QUIET_MS)]), undefined)
      await commit()
      const second = await within(waiting, 5_000, 'the writes that waited')
      assert.ok(second[0] > first[0]! && second[1] > first[1]!, `${first} and then ${second}`)
      sameBytes((await bus.kv.get(bucket, 'absent'))!.value, '2')
      sameBytes((await bus.kv.get(bucket, 'present'))!.value, '2')
    })

    suite.where('transactions', 'K2 a lost cas does not abort the transaction', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const revision = await bus.kv.put(bucket, 'k', 'x')
      const { tx, commit } = await stage.begin()
      const error = await rejects(bus.kv.cas(bucket, 'k', 'y', revision + 1, { tx }), 'cas_conflict')
      assert.deepEqual([error.expected, error.actual], [revision + 1, revision])
      await rejects(bus.kv.cas(bucket, 'k', 'y', null, { tx }), 'cas_conflict')
      await rejects(bus.kv.delete(bucket, 'k', { expected: revision + 1, tx }), 'cas_conflict')
      await bus.kv.put(bucket, 'after', 'y', { tx })
      await commit()
      sameBytes((await bus.kv.get(bucket, 'k'))!.value, 'x')
      sameBytes((await bus.kv.get(bucket, 'after'))!.value, 'y')
    })

    suite.where('transactions', 'K2 when the winner of a cas rolls back, one who waited wins', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const { tx, rollback } = await stage.begin()
      await bus.kv.cas(bucket, 'k', 'winner', null, { tx })
      const rest = [1, 2, 3].map((n) =>
        bus.kv.cas(bucket, 'k', `${n}`, null).then(
          () => n,
          (error: unknown) => error as Error,
        ),
      )
      await pause(50)
      await rollback()
      const outcomes = await within(Promise.all(rest), 5_000, 'the others')
      const winners = outcomes.filter((outcome) => typeof outcome === 'number')
      assert.equal(winners.length, 1)
      sameBytes((await bus.kv.get(bucket, 'k'))!.value, `${winners[0]}`)
    })

    suite.where('transactions', 'K6 a watch yields what a transaction changed once it commits', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const watch = new Reader(await bus.kv.watch(bucket))
      const [lost, kept] = [await stage.begin(), await stage.begin()]
      await bus.kv.put(bucket, 'lost', 'x', { tx: lost.tx })
      const revision = await bus.kv.put(bucket, 'kept', 'x', { tx: kept.tx })
      await bus.kv.put(bucket, 'free', 'x')
      const first = await watch.next()
      assert.ok(first.operation === 'put' && first.entry.key === 'free')
      await watch.nothing()
      await lost.rollback()
      await kept.commit()
      const second = await watch.next()
      assert.ok(second.operation === 'put' && second.entry.key === 'kept' && second.entry.revision === revision)
      await watch.nothing()
    })
  })

  suite.alone('times of commits', () => {
    suite.where('transactions', "P14 what the caller's transaction published is delivered within 50 ms of its commit", async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('p')
      const { next, reader } = await stage.subscribe(other, subject, unique('d'))
      const took: number[] = []
      while (took.length < 10 && !took.some((ms) => ms <= 50)) {
        const { tx, commit } = await stage.begin()
        void reader.ask()
        await bus.pubsub.publish(subject, 'x', { tx })
        await pause(100)
        await commit()
        const committed = performance.now()
        const message = await next()
        took.push(performance.now() - committed)
        await message.ack()
      }
      assert.ok(Math.min(...took) <= 50, `the tries took ${took.map(Math.round).join(', ')} ms`)
    })
  })
}
