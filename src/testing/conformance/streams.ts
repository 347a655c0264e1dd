/** Streams and their limits: P3, P10. */

import assert from 'node:assert/strict'
import type { Bus, Msg, MsgStream } from '../../core/types.ts'
import { firstOf, PATIENCE_MS, QUIET_MS, Reader, type Suite, text, timed, unique, within } from './kit.ts'

/** Short enough to wait for, long enough for a busy machine to act in. */
const ACK_WAIT_MS = 500
/** Where the test must act before the time runs out. */
const LONG_WAIT_MS = 2_500

function publishNumbers<Tx>(bus: Bus<Tx>, subject: string, count: number): Promise<unknown> {
  return bus.pubsub.publishMany(Array.from({ length: count }, (_, index) => ({ subject, payload: `${index + 1}` })))
}

const payloads = (messages: readonly { readonly payload: Uint8Array }[]) => messages.map(({ payload }) => text(payload))

export function streamTests<Tx>(suite: Suite<Tx>): void {
  suite.group('streams', () => {
    suite.test('P10 closing hands back what was not yielded, at once and without counting; what was yielded stays', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('p')
      const durable = unique('d')
      await publishNumbers(bus, subject, 10)
      const first = await stage.subscribe(bus, subject, durable)
      const [one, two] = await first.reader.take(2)
      const second = await stage.subscribe(other, subject, durable)
      void second.reader.ask()
      await first.stream.close()
      const rest = await second.reader.take(8, 2_000)
      assert.deepEqual(payloads(rest), ['3', '4', '5', '6', '7', '8', '9', '10'])
      assert.ok(rest.every(({ attempt }) => attempt === 1))
      await second.nothing()
      await one!.ack()
      await two!.nak()
      const again = await second.next()
      assert.deepEqual([text(again.payload), again.attempt], ['2', 2])
    })

    suite.test('P10 what was yielded goes back when its ack wait is over, though its stream is closed', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const durable = unique('d')
      await bus.pubsub.publish(subject, 'x')
      const first = await stage.subscribe(bus, subject, durable, { ackWaitMs: ACK_WAIT_MS })
      await first.next()
      await first.stream.close()
      const second = await stage.subscribe(bus, subject, durable)
      assert.equal((await second.next()).attempt, 2)
    })

    suite.test('P10 closing the bus hands back what was yielded, too', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('p')
      const durable = unique('d')
      await publishNumbers(bus, subject, 20)
      const first = await stage.subscribe(bus, subject, durable)
      await first.reader.take(3)
      const second = await stage.subscribe(other, subject, durable)
      void second.reader.ask()
      await bus.close()
      const messages = await second.reader.take(20, 2_000)
      assert.equal(new Set(messages.map(({ seq }) => seq)).size, 20)
      for (const { payload, attempt } of messages) if (Number(text(payload)) > 3) assert.equal(attempt, 1)
    })

    suite.test('P10 closing the bus hands back what a closed stream had yielded', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('p')
      const durable = unique('d')
      await bus.pubsub.publish(subject, 'x')
      const first = await stage.subscribe(bus, subject, durable)
      await first.next()
      await first.stream.close()
      const second = await stage.subscribe(other, subject, durable)
      await second.nothing()
      await bus.close()
      await second.next(2_000)
    })

    suite.test('P10 what ran out before it was yielded is dropped', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('p')
      const durable = unique('d')
      await publishNumbers(bus, subject, 4)
      const slow = await stage.subscribe(bus, subject, durable, { ackWaitMs: 800 })
      await (await slow.next()).ack()
      const quick = await stage.subscribe(other, subject, durable, { ackWaitMs: 800 })
      for (const message of await quick.reader.take(3)) await message.ack()
      await slow.nothing()
    })

    suite.test('P10 close ends the iteration, is idempotent, and a closed stream yields nothing more', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const { stream, reader } = await stage.subscribe(bus, subject, unique('d'))
      void reader.ask()
      await Promise.all([stream.close(), stream.close()])
      await stream.close()
      await reader.ended()
      await bus.pubsub.publish(subject, 'x')
      for await (const message of stream) assert.fail(`nothing was due, but ${message.seq} came`)
    })

    suite.test('P10 a stream can be disposed of', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const durable = unique('d')
      await publishNumbers(bus, subject, 2)
      {
        await using stream: MsgStream<Tx> = await bus.pubsub.subscribe(subject, durable)
        await (await new Reader(stream).next()).ack()
      }
      const { next } = await stage.subscribe(bus, subject, durable)
      assert.deepEqual([text((await next(2_000)).payload)], ['2'])
    })

    suite.test('P10 members come, go and leave work behind, and every message is handled', async (stage) => {
      const buses = [await stage.open(), await stage.open()]
      const subject = unique('p')
      const durable = unique('d')
      await publishNumbers(buses[0]!, subject, 120)
      const handled = new Map<number, number>()
      const member = async (index: number) => {
        while (handled.size < 120) {
          const stream = await buses[index % 2]!.pubsub.subscribe(subject, durable, { ackWaitMs: LONG_WAIT_MS, maxInFlight: 10 })
          const reader = new Reader(stream)
          for (let count = 0; count < 5 + index && handled.size < 120; count++) {
            const message = await reader.poll(300)
            if (message === undefined) break
            await message.ack()
            handled.set(message.seq, (handled.get(message.seq) ?? 0) + 1)
          }
          await stream.close()
        }
      }
      await within(Promise.all([0, 1, 2, 3].map(member)), 15_000, 'all messages')
      assert.equal(handled.size, 120)
      assert.ok(
        [...handled.values()].every((times) => times === 1),
        'nothing was acked twice',
      )
    })

    suite.test('P10 an abort signal closes the stream', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const durable = unique('d')
      await publishNumbers(bus, subject, 3)
      const controller = new AbortController()
      const first = await stage.subscribe(bus, subject, durable, { signal: controller.signal })
      const held = await first.next()
      controller.abort()
      await first.reader.ended()
      const second = await stage.subscribe(bus, subject, durable)
      assert.deepEqual(payloads(await second.reader.take(2, 2_000)), ['2', '3'])
      await held.ack()
    })

    suite.test('P10 a stream subscribed with an aborted signal yields nothing', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      await bus.pubsub.publish(subject, 'x')
      const { reader } = await stage.subscribe(bus, subject, unique('d'), { signal: AbortSignal.abort() })
      await reader.ended()
    })

    suite.test('P3 maxInFlight bounds what a stream has handed out and unsettled', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const durable = unique('d')
      await publishNumbers(bus, subject, 6)
      const { next, nothing } = await stage.subscribe(bus, subject, durable, { maxInFlight: 2 })
      const [one, two] = [await next(), await next()]
      await nothing()
      await one.ack()
      const three = await next()
      await nothing()
      await two.term()
      await three.nak(5_000)
      assert.deepEqual(payloads([await next(), await next()]), ['4', '5'])
      await nothing()
      const neighbour = await stage.subscribe(bus, subject, durable)
      assert.equal(text((await neighbour.next()).payload), '6')
    })

    suite.test('P3 maxAckPending bounds what the durable has handed out and unsettled, over all members', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('p')
      const durable = unique('d')
      await publishNumbers(bus, subject, 6)
      const options = { maxAckPending: 3 }
      const first = await stage.subscribe(bus, subject, durable, options)
      const second = await stage.subscribe(other, subject, durable, options)
      const held: Msg<Tx>[] = [await first.next()]
      // What the first member fetched and did not yield counts as well; together they have three.
      for (let count = 1; count < 3; count++) held.push(await firstOf(first.reader, second.reader))
      await Promise.all([first.nothing(), second.nothing()])
      for (const message of held.splice(0)) await message.ack()
      for (let count = 0; count < 3; count++) held.push(await firstOf(first.reader, second.reader))
      assert.deepEqual(payloads(held).sort(), ['4', '5', '6'])
    })

    suite.test('P3 redeliveries are exempt from maxAckPending', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const { next, nothing } = await stage.subscribe(bus, subject, unique('d'), { maxAckPending: 2, ackWaitMs: 1_000 })
      await publishNumbers(bus, subject, 3)
      const [one] = [await next(), await next()]
      await nothing(QUIET_MS)
      await one.nak()
      const again = await next()
      assert.deepEqual([text(again.payload), again.attempt], ['1', 2])
      let redelivered = await next()
      // On a busy machine its own ack wait may be over, too, before it is looked for what is due.
      while (text(redelivered.payload) === '1') redelivered = await next()
      assert.deepEqual([text(redelivered.payload), redelivered.attempt], ['2', 2])
    })

    suite.test('P3 an iteration that was left can be taken up again', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const { stream } = await stage.subscribe(bus, subject, unique('d'))
      await publishNumbers(bus, subject, 4)
      const seen: string[] = []
      for (let round = 0; round < 2; round++) {
        for await (const message of stream) {
          seen.push(text(message.payload))
          await message.ack()
          if (seen.length % 2 === 0) break
        }
      }
      assert.deepEqual(seen, ['1', '2', '3', '4'])
    })

    suite.test('P5 messages after a large backlog of other subjects are found', async (stage) => {
      const bus = await stage.open()
      const root = unique('p')
      await publishNumbers(bus, `${root}.common`, 3_000)
      await bus.pubsub.publish(`${root}.rare`, 'found')
      const { next } = await stage.subscribe(bus, `${root}.rare`, unique('d'))
      const ms = await timed(async () => assert.equal(text((await next()).payload), 'found'))
      assert.ok(ms < PATIENCE_MS)
    })
  })
}
