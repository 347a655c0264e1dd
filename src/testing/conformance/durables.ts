/** Durables, their positions and what they get: P3, P4, P8, P9, P11, P12, P13. */

import assert from 'node:assert/strict'
import { ascending, eventually, pause, Reader, rejects, type Suite, text, unique } from './kit.ts'

export function durableTests<Tx>(suite: Suite<Tx>): void {
  suite.group('durables', () => {
    suite.test('P3 every durable that matches gets every message', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('p')
      const members = await Promise.all([
        stage.subscribe(bus, subject, unique('d')),
        stage.subscribe(other, subject, unique('d')),
        stage.subscribe(other, `${subject}`, unique('d')),
      ])
      const wide = await stage.subscribe(bus, `*`, unique('d'), { start: 'new' })
      await bus.pubsub.publishMany(['1', '2', '3'].map((payload) => ({ subject, payload })))
      for (const { reader } of members) {
        assert.deepEqual(
          (await reader.take(3)).map(({ payload }) => text(payload)),
          ['1', '2', '3'],
        )
      }
      const seen: string[] = []
      while (seen.length < 3) {
        const message = await wide.next()
        if (message.subject === subject) seen.push(text(message.payload))
        await message.ack()
      }
      assert.deepEqual(seen, ['1', '2', '3'])
    })

    suite.test('P3 the members of a durable share its messages, each going to one of them', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('p')
      const durable = unique('d')
      const streams = await Promise.all([bus, other, other].map((handle) => handle.pubsub.subscribe(subject, durable, { maxInFlight: 4 })))
      const seen: number[] = []
      const counts = await Promise.all([
        ...streams.map(async (stream) => {
          let count = 0
          for await (const message of stream) {
            seen.push(message.seq)
            count++
            assert.equal(message.attempt, 1)
            await pause(2)
            await message.ack()
            if (seen.length === 150) for (const each of streams) void each.close()
          }
          return count
        }),
        (async () => {
          for (let batch = 0; batch < 15; batch++) {
            await bus.pubsub.publishMany(Array.from({ length: 10 }, (_, index) => ({ subject, payload: `${batch}-${index}` })))
          }
          return 0
        })(),
      ])
      assert.equal(new Set(seen).size, 150, 'no message went to two members')
      assert.equal(seen.length, 150)
      assert.ok(
        counts.slice(0, 3).every((count) => count > 0),
        `every member had some: ${counts.join(', ')}`,
      )
    })

    suite.test('P4 what was published while nobody was subscribed is delivered at the next subscription', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const durable = unique('d')
      await bus.pubsub.publish(subject, 'before the durable')
      const first = await stage.subscribe(bus, subject, durable)
      await (await first.next()).ack()
      await first.stream.close()
      await bus.pubsub.publish(subject, 'while away')
      await bus.close()
      const later = await stage.open()
      await later.pubsub.publish(subject, 'after')
      const second = await stage.subscribe(later, subject, durable)
      assert.deepEqual(
        (await second.reader.take(2)).map(({ payload }) => text(payload)),
        ['while away', 'after'],
      )
      await second.nothing()
    })

    suite.test('P4 a durable keeps its position through any number of streams', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const durable = unique('d')
      await bus.pubsub.publishMany(Array.from({ length: 10 }, (_, index) => ({ subject, payload: `${index}` })))
      const seen: string[] = []
      while (seen.length < 10) {
        const { stream, next } = await stage.subscribe(bus, subject, durable)
        const message = await next()
        assert.equal(message.attempt, 1)
        seen.push(text(message.payload))
        await message.ack()
        await stream.close()
      }
      assert.deepEqual(
        seen,
        Array.from({ length: 10 }, (_, index) => `${index}`),
      )
    })

    suite.test('P8 messages published one after the other come in that order, from whatever handle', async (stage) => {
      const buses = [await stage.open(), await stage.open()]
      const subject = unique('p')
      const { reader } = await stage.subscribe(buses[0]!, `${subject}.*`, unique('d'))
      const acks: number[] = []
      for (let index = 0; index < 40; index++)
        acks.push((await buses[index % 2]!.pubsub.publish(`${subject}.${index % 3}`, `${index}`)).seq)
      const messages = await reader.take(40)
      assert.deepEqual(
        messages.map(({ seq }) => seq),
        acks,
      )
      assert.deepEqual(
        messages.map(({ payload }) => Number(text(payload))),
        Array.from({ length: 40 }, (_, index) => index),
      )
    })

    suite.test('P8 a publishMany keeps its order, and comes after what resolved before it', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('p')
      await bus.pubsub.publish(subject, '0')
      await other.pubsub.publishMany(Array.from({ length: 300 }, (_, index) => ({ subject, payload: `${index + 1}` })))
      await bus.pubsub.publish(subject, '301')
      const stream = await bus.pubsub.subscribe(subject, unique('d'), { maxInFlight: 400 })
      const messages = await new Reader(stream).take(302)
      assert.deepEqual(
        messages.map(({ payload }) => Number(text(payload))),
        Array.from({ length: 302 }, (_, index) => index),
      )
    })

    suite.test('P9 no message is skipped while many publish and durables come into being', async (stage) => {
      const buses = [await stage.open(), await stage.open()]
      const subject = unique('p')
      const published: number[] = []
      const publishers = Array.from({ length: 6 }, async (_, publisher) => {
        for (let round = 0; round < 15; round++) {
          const bus = buses[(publisher + round) % 2]!
          const acks =
            publisher % 2 === 0
              ? [await bus.pubsub.publish(subject, 'one')]
              : await bus.pubsub.publishMany([
                  { subject, payload: 'a' },
                  { subject, payload: 'b' },
                ])
          published.push(...acks.map(({ seq }) => seq))
        }
      })
      const consumers = Array.from({ length: 3 }, async (_, index) => {
        await pause(index * 10)
        const { stream, reader } = await stage.subscribe(buses[index % 2]!, subject, unique('d'))
        const seen: number[] = []
        while (seen.length < 6 * 15 + 3 * 15) {
          const message = await reader.next()
          seen.push(message.seq)
          await message.ack()
        }
        await reader.nothing(100)
        await stream.close()
        return seen
      })
      await Promise.all(publishers)
      for (const seen of await Promise.all(consumers)) assert.deepEqual(new Set(seen), new Set(published))
    })

    suite.test('P11 a subscription with the same filter joins the durable, whatever its other options say', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const durable = unique('d')
      const first = await stage.subscribe(bus, subject, durable)
      await bus.pubsub.publishMany(['1', '2'].map((payload) => ({ subject, payload })))
      await (await first.next()).ack()
      await first.stream.close()
      const second = await stage.subscribe(bus, subject, durable, {
        start: 'new',
        ackWaitMs: 10_000,
        maxDeliver: 7,
        maxAckPending: 3,
        maxInFlight: 2,
      })
      assert.equal(text((await second.next()).payload), '2')
    })

    suite.test('P11 a subscription with another filter is refused and changes nothing', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('p')
      const durable = unique('d')
      const { next } = await stage.subscribe(bus, `${subject}.a`, durable)
      for (const filter of [`${subject}.b`, `${subject}.*`, `${subject}.>`, `${subject}.A`]) {
        await rejects(other.pubsub.subscribe(filter, durable), 'conflict')
      }
      await bus.pubsub.publish(`${subject}.b`, 'not mine')
      await bus.pubsub.publish(`${subject}.a`, 'mine')
      assert.equal(text((await next()).payload), 'mine')
    })

    suite.test('P11 of subscriptions that race to create a durable with different filters one kind wins', async (stage) => {
      const buses = [await stage.open(), await stage.open()]
      const subject = unique('p')
      const durable = unique('d')
      const tries = await Promise.allSettled(
        Array.from({ length: 8 }, (_, index) => buses[index % 2]!.pubsub.subscribe(`${subject}.${index % 2}`, durable)),
      )
      const joined = tries.flatMap((outcome, index) => (outcome.status === 'fulfilled' ? [index % 2] : []))
      assert.ok(joined.length > 0 && new Set(joined).size === 1)
      for (const outcome of tries) if (outcome.status === 'rejected') await rejects(Promise.reject(outcome.reason), 'conflict')
    })

    suite.test('P11 deleteDurable forgets filter and position; without one it is not_found', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const durable = unique('d')
      await rejects(bus.pubsub.deleteDurable(durable), 'not_found')
      await bus.pubsub.publish(`${subject}.a`, 'old')
      const first = await stage.subscribe(bus, `${subject}.a`, durable)
      await (await first.next()).ack()
      await first.stream.close()
      await bus.pubsub.deleteDurable(durable)
      await rejects(bus.pubsub.deleteDurable(durable), 'not_found')
      const second = await stage.subscribe(bus, `${subject}.>`, durable)
      const again = await second.next()
      assert.equal(text(again.payload), 'old')
      assert.equal(again.attempt, 1)
    })

    suite.test('P11 start: all is the default, new leaves out what is there already', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      await bus.pubsub.publish(subject, 'old')
      const all = await stage.subscribe(bus, subject, unique('d'), { start: 'all' })
      const usual = await stage.subscribe(bus, subject, unique('d'))
      const fresh = await stage.subscribe(bus, subject, unique('d'), { start: 'new' })
      await bus.pubsub.publish(subject, 'new')
      assert.deepEqual(
        (await all.reader.take(2)).map(({ payload }) => text(payload)),
        ['old', 'new'],
      )
      assert.deepEqual(
        (await usual.reader.take(2)).map(({ payload }) => text(payload)),
        ['old', 'new'],
      )
      assert.equal(text((await fresh.next()).payload), 'new')
      await fresh.nothing()
    })

    suite.test('P11 a durable started at new gets what is published before its first message is asked for', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('p')
      const durable = unique('d')
      const stream = await bus.pubsub.subscribe(subject, durable, { start: 'new' })
      await stream.close()
      await other.pubsub.publish(subject, 'meanwhile')
      const { next } = await stage.subscribe(other, subject, durable, { start: 'new' })
      assert.equal(text((await next()).payload), 'meanwhile')
    })

    suite.test('P11 start: a sequence number is the first one delivered', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const seqs: number[] = []
      for (const payload of ['1', '2', '3', '4']) seqs.push((await bus.pubsub.publish(subject, payload)).seq)
      ascending(seqs)
      const third = await stage.subscribe(bus, subject, unique('d'), { start: { seq: seqs[2]! } })
      assert.deepEqual(
        (await third.reader.take(2)).map(({ seq }) => seq),
        seqs.slice(2),
      )
      const future = await stage.subscribe(bus, subject, unique('d'), { start: { seq: 1 } })
      assert.deepEqual(
        (await future.reader.take(4)).map(({ seq }) => seq),
        seqs,
      )
    })

    suite.test('P11 start: a time leaves out what was published before it', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const probe = await stage.subscribe(bus, subject, unique('d'))
      await bus.pubsub.publish(subject, 'early')
      const early = await probe.next()
      // The clock of the store tells when it has moved on.
      const late = await eventually(async () => {
        await bus.pubsub.publish(subject, 'late')
        const message = await probe.next()
        return message.publishedAt.getTime() > early.publishedAt.getTime() + 2 && message
      }, 'a later time of publishing')
      const { next } = await stage.subscribe(bus, subject, unique('d'), { start: { time: late.publishedAt } })
      const first = await next()
      assert.equal(text(first.payload), 'late')
      assert.ok(first.publishedAt.getTime() >= late.publishedAt.getTime())
      const past = await stage.subscribe(bus, subject, unique('d'), { start: { time: new Date(0) } })
      assert.equal(text((await past.next()).payload), 'early')
    })
  })

  suite.group('duplicates and retention', () => {
    suite.test('P12 a second publish with the same msgId stores nothing and answers the first seq', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('p')
      const msgId = unique('id')
      const first = await bus.pubsub.publish(subject, 'first', { msgId })
      assert.equal(first.duplicate, false)
      for (const handle of [bus, other]) {
        assert.deepEqual(await handle.pubsub.publish(subject, 'second', { msgId }), { seq: first.seq, duplicate: true })
      }
      assert.equal((await bus.pubsub.publish(subject, 'another', { msgId: `${msgId}x` })).duplicate, false)
      const { reader } = await stage.subscribe(bus, subject, unique('d'))
      assert.deepEqual(
        (await reader.take(2)).map(({ payload }) => text(payload)),
        ['first', 'another'],
      )
      await reader.nothing()
    })

    suite.test('P12 the same msgId on another subject is the same message', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const msgId = unique('id')
      const first = await bus.pubsub.publish(`${subject}.a`, 'first', { msgId })
      assert.deepEqual(await bus.pubsub.publish(`${subject}.b`, 'second', { msgId }), { seq: first.seq, duplicate: true })
      const { next, nothing } = await stage.subscribe(bus, `${subject}.*`, unique('d'))
      assert.equal((await next()).subject, `${subject}.a`)
      await nothing()
    })

    suite.test('P12 publishMany knows duplicates of earlier calls and within itself', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const [a, b] = [unique('id'), unique('id')]
      const earlier = await bus.pubsub.publish(subject, 'a', { msgId: a })
      const acks = await bus.pubsub.publishMany([
        { subject, payload: 'b1', msgId: b },
        { subject, payload: 'a2', msgId: a },
        { subject, payload: 'b2', msgId: b },
        { subject, payload: 'none' },
        { subject, payload: 'none' },
      ])
      assert.deepEqual(
        acks.map(({ duplicate }) => duplicate),
        [false, true, true, false, false],
      )
      assert.equal(acks[1]!.seq, earlier.seq)
      assert.equal(acks[2]!.seq, acks[0]!.seq)
      assert.notEqual(acks[3]!.seq, acks[4]!.seq)
      const { reader } = await stage.subscribe(bus, subject, unique('d'))
      assert.deepEqual(
        (await reader.take(4)).map(({ payload }) => text(payload)),
        ['a', 'b1', 'none', 'none'],
      )
      await reader.nothing()
    })

    suite.test('P12 of concurrent publishes with one msgId one is stored', async (stage) => {
      const buses = [await stage.open(), await stage.open()]
      const subject = unique('p')
      const msgId = `${unique('id')} 漢字 '\\"`
      const acks = await Promise.all(
        Array.from({ length: 12 }, (_, index) => buses[index % 2]!.pubsub.publish(subject, `${index}`, { msgId })),
      )
      assert.equal(acks.filter(({ duplicate }) => !duplicate).length, 1)
      assert.equal(new Set(acks.map(({ seq }) => seq)).size, 1)
      const { next, nothing } = await stage.subscribe(buses[0]!, subject, unique('d'))
      assert.equal((await next()).seq, acks[0]!.seq)
      await nothing()
    })

    suite.test('P13 a message that was acked stays for durables to come until it is old', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      await bus.pubsub.publishMany(['acked', 'ended', 'unread'].map((payload) => ({ subject, payload })))
      const first = await stage.subscribe(bus, subject, unique('d'))
      await (await first.next()).ack()
      await (await first.next()).term()
      const later = await stage.subscribe(bus, subject, unique('d'))
      assert.deepEqual(
        (await later.reader.take(3)).map(({ payload }) => text(payload)),
        ['acked', 'ended', 'unread'],
      )
    })
  })
}
