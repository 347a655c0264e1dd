/** Deliveries, redeliveries and their settlement: P5, P6, P7. */

import assert from 'node:assert/strict'
import type { Bus } from '../../core/types.ts'
import { firstOf, PATIENCE_MS, pause, QUIET_MS, rejects, type Suite, sameHeaders, succeeds, TICK_MS, text, unique } from './kit.ts'

/** Short enough to wait for, long enough for a busy machine to act in. */
const ACK_WAIT_MS = 500
/** Where the test must act before the time runs out. */
const LONG_WAIT_MS = 2_500

function publishNumbers<Tx>(bus: Bus<Tx>, subject: string, count: number): Promise<unknown> {
  return bus.pubsub.publishMany(Array.from({ length: count }, (_, index) => ({ subject, payload: `${index + 1}` })))
}

const payloads = (messages: readonly { readonly payload: Uint8Array }[]) => messages.map(({ payload }) => text(payload))

export function deliveryTests<Tx>(suite: Suite<Tx>): void {
  suite.group('redelivery', () => {
    suite.test('P5 a message nobody settled comes again after its ack wait, not before, with the attempt one higher', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('p')
      const durable = unique('d')
      const { reader } = await stage.subscribe(bus, subject, durable, { ackWaitMs: ACK_WAIT_MS })
      const second = await stage.subscribe(other, subject, durable, { ackWaitMs: ACK_WAIT_MS })
      const asked = performance.now()
      await bus.pubsub.publish(subject, 'x', { headers: { h: '1' } })
      const first = await firstOf(reader, second.reader)
      const again = await firstOf(reader, second.reader)
      assert.ok(performance.now() - asked >= ACK_WAIT_MS - TICK_MS)
      assert.deepEqual([first.attempt, again.attempt], [1, 2])
      assert.deepEqual(
        [again.seq, again.subject, text(again.payload), again.publishedAt.getTime()],
        [first.seq, first.subject, text(first.payload), first.publishedAt.getTime()],
      )
      sameHeaders(again.headers, { h: '1' })
      await again.ack()
    })

    suite.test('P5 attempts count up one by one, through any mixture of naks and silence', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const { next } = await stage.subscribe(bus, subject, unique('d'), { ackWaitMs: ACK_WAIT_MS })
      await bus.pubsub.publish(subject, 'x')
      for (let attempt = 1; attempt <= 5; attempt++) {
        const message = await next()
        assert.equal(message.attempt, attempt)
        if (attempt === 5) await message.ack()
        else if (attempt % 2 === 1) await message.nak()
      }
    })

    suite.test('P5 a nak brings the message back at once', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const { next } = await stage.subscribe(bus, subject, unique('d'))
      await bus.pubsub.publish(subject, 'x')
      const message = await next()
      await message.nak()
      const again = await next(2_000)
      assert.equal(again.attempt, 2)
      await again.nak(0)
      assert.equal((await next(2_000)).attempt, 3)
    })

    suite.test('P5 a message one member naked may go to another', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('p')
      const durable = unique('d')
      await bus.pubsub.publish(subject, 'x')
      const first = await stage.subscribe(bus, subject, durable)
      const message = await first.next()
      const second = await stage.subscribe(other, subject, durable)
      const coming = second.next()
      await message.nak()
      assert.equal((await coming).attempt, 2)
    })

    suite.test('P5 new messages flow while a nak waits for its delay', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const { next } = await stage.subscribe(bus, subject, unique('d'))
      await bus.pubsub.publish(subject, 'delayed')
      await (await next()).nak(LONG_WAIT_MS)
      await publishNumbers(bus, subject, 3)
      assert.deepEqual(
        [text((await next(LONG_WAIT_MS)).payload), text((await next()).payload), text((await next()).payload)],
        ['1', '2', '3'],
      )
      assert.equal(text((await next()).payload), 'delayed')
    })

    suite.test('P5 redeliveries come before new messages', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const durable = unique('d')
      await publishNumbers(bus, subject, 5)
      const first = await stage.subscribe(bus, subject, durable, { maxInFlight: 2 })
      const held = await first.reader.take(2)
      await first.stream.close()
      for (const message of held) await message.nak()
      const second = await stage.subscribe(bus, subject, durable, { maxInFlight: 5 })
      const messages = await second.reader.take(5)
      assert.deepEqual(
        messages.slice(0, 2).map(({ attempt }) => attempt),
        [2, 2],
      )
      assert.deepEqual(payloads(messages.slice(0, 2)).sort(), ['1', '2'])
      assert.deepEqual(payloads(messages.slice(2)), ['3', '4', '5'])
    })

    suite.test('P5 a naked message comes before what its stream has fetched and not yielded', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      await publishNumbers(bus, subject, 6)
      const { next } = await stage.subscribe(bus, subject, unique('d'), { ackWaitMs: LONG_WAIT_MS })
      for (const number of ['1', '2', '3']) {
        const message = await next()
        assert.deepEqual([text(message.payload), message.attempt], [number, 1])
        await message.nak()
        const again = await next()
        assert.deepEqual([text(again.payload), again.attempt], [number, 2])
        await again.ack()
      }
    })

    suite.test('P5 extend restarts the visibility timeout as often as it is called', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const durable = unique('d')
      const { reader } = await stage.subscribe(bus, subject, durable, { ackWaitMs: LONG_WAIT_MS })
      const other = await stage.subscribe(bus, subject, durable, { ackWaitMs: LONG_WAIT_MS })
      await bus.pubsub.publish(subject, 'x')
      const message = await firstOf(reader, other.reader)
      let asked = 0
      for (let round = 0; round < 4; round++) {
        await other.nothing(700)
        asked = performance.now()
        await message.extend()
      }
      const again = await firstOf(reader, other.reader)
      assert.ok(performance.now() - asked >= LONG_WAIT_MS - TICK_MS, 'not before the time that the last extend gave')
      assert.equal(again.attempt, 2)
    })

    suite.test('P5 the ack wait is that of the stream that delivered the message', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const durable = unique('d')
      const patient = await stage.subscribe(bus, subject, durable, { ackWaitMs: 20_000 })
      await bus.pubsub.publish(subject, 'x')
      const message = await patient.next()
      const hasty = await stage.subscribe(bus, subject, durable, { ackWaitMs: 300 })
      await hasty.nothing(700)
      await message.ack()
      await hasty.nothing()
    })
  })

  suite.alone('delays', () => {
    suite.test('P5 a nak with a delay is back not before the delay is over, and within a second after', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const { next } = await stage.subscribe(bus, subject, unique('d'))
      await bus.pubsub.publish(subject, 'x')
      let message = await next()
      for (const delayMs of [300, 1_200]) {
        const naked = performance.now()
        await message.nak(delayMs)
        message = await next()
        const took = performance.now() - naked
        assert.ok(took >= delayMs - TICK_MS, `came after ${took} ms`)
        assert.ok(took <= delayMs + 1_000, `came after ${took} ms`)
      }
    })
  })

  suite.group('endings', () => {
    suite.test('P6 term ends the message for this durable alone', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const first = await stage.subscribe(bus, subject, unique('d'), { ackWaitMs: ACK_WAIT_MS })
      const second = await stage.subscribe(bus, subject, unique('d'), { ackWaitMs: ACK_WAIT_MS })
      await publishNumbers(bus, subject, 2)
      await (await first.next()).term()
      await (await first.next()).term('of no use')
      await first.nothing(ACK_WAIT_MS + QUIET_MS)
      assert.deepEqual(new Set(payloads(await second.reader.take(2))), new Set(['1', '2']))
    })

    suite.test('P6 term is no dead letter', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const durable = unique('d')
      const { next } = await stage.subscribe(bus, subject, durable, { maxDeliver: 1 })
      const letters = await stage.subscribe(bus, `${durable}.dlq`, unique('d'))
      await bus.pubsub.publish(subject, 'x')
      await (await next()).term('reason')
      await letters.nothing()
    })

    suite.test('P6 the last delivery left unsettled becomes one dead letter with payload, headers and story', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('p')
      const durable = unique('d')
      const { next, nothing } = await stage.subscribe(bus, subject, durable, { ackWaitMs: 1_000, maxDeliver: 3 })
      const letters = await stage.subscribe(other, `${durable}.dlq`, unique('d'))
      const { seq } = await bus.pubsub.publish(subject, Uint8Array.of(0, 255), {
        headers: { mine: 'yes', empty: '', dlq_seq: 'not mine', dlq_from: 'kept' },
      })
      for (const attempt of [1, 2, 3]) assert.equal((await next()).attempt, attempt)
      const [letter] = await Promise.all([letters.next(), nothing(1_000 + QUIET_MS)])
      assert.equal(letter.subject, `${durable}.dlq`)
      assert.deepEqual([...letter.payload], [0, 255])
      const { dlq_reason, ...headers } = letter.headers
      assert.ok(dlq_reason)
      sameHeaders(headers, { mine: 'yes', empty: '', dlq_from: 'kept', dlq_subject: subject, dlq_seq: String(seq), dlq_attempts: '3' })
      await letter.ack()
      await Promise.all([letters.nothing(600), nothing(600)])
    })

    suite.test('P6 a nak of the last delivery ends the message, too', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const durable = unique('d')
      const { next, nothing } = await stage.subscribe(bus, subject, durable, { ackWaitMs: 20_000, maxDeliver: 2 })
      const letters = await stage.subscribe(bus, `${durable}.dlq`, unique('d'))
      await bus.pubsub.publish(subject, 'x')
      await (await next()).nak()
      await (await next()).nak()
      const [letter] = await Promise.all([letters.next(), nothing()])
      assert.equal(letter.headers.dlq_attempts, '2')
      await letters.nothing()
    })

    suite.test('P6 the last delivery acked in time is no dead letter', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const durable = unique('d')
      const { next, nothing } = await stage.subscribe(bus, subject, durable, { ackWaitMs: LONG_WAIT_MS, maxDeliver: 2 })
      const letters = await stage.subscribe(bus, `${durable}.dlq`, unique('d'))
      await bus.pubsub.publish(subject, 'x')
      await (await next()).nak()
      await (await next()).ack()
      await Promise.all([letters.nothing(), nothing()])
    })

    suite.test('P6 a dead letter concerns one durable alone', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const [strict, lenient] = [unique('d'), unique('d')]
      const first = await stage.subscribe(bus, subject, strict, { maxDeliver: 1 })
      const second = await stage.subscribe(bus, subject, lenient)
      const letters = await stage.subscribe(bus, `${lenient}.dlq`, unique('d'))
      const dead = await stage.subscribe(bus, `${strict}.dlq`, unique('d'))
      await bus.pubsub.publish(subject, 'x')
      await (await first.next()).nak()
      await Promise.all([dead.next(), first.nothing()])
      assert.equal((await second.next()).attempt, 1)
      await letters.nothing()
    })
  })

  suite.group('settlement', () => {
    for (const settlement of ['ack', 'nak', 'term', 'extend'] as const) {
      suite.where(
        'strictFencing',
        `P7 once the message was handed out again, ${settlement} of the older delivery is refused and changes nothing`,
        async (stage) => {
          const [bus, other] = [await stage.open(), await stage.open()]
          const subject = unique('p')
          const durable = unique('d')
          const old = await stage.subscribe(bus, subject, durable, { ackWaitMs: 300 })
          await bus.pubsub.publish(subject, 'x')
          const stale = await old.next()
          const fresh = await stage.subscribe(other, subject, durable, { ackWaitMs: LONG_WAIT_MS })
          const message = await fresh.next()
          assert.equal(message.attempt, stale.attempt + 1)
          for (let tries = 0; tries < 2; tries++) await rejects(stale[settlement](), 'lease_lost')
          await fresh.nothing()
          await message.extend()
          await message.ack()
          await fresh.nothing()
        },
      )
    }

    suite.where('strictFencing', 'P7 a refused ack leaves the message to be redelivered if the newer holder fails', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const { next } = await stage.subscribe(bus, subject, unique('d'), { ackWaitMs: 1_000 })
      await bus.pubsub.publish(subject, 'x')
      const first = await next()
      assert.equal((await next()).attempt, 2)
      await rejects(first.ack(), 'lease_lost')
      assert.equal((await next()).attempt, 3)
    })

    suite.where('strictFencing', 'P7 expired but not handed out again: ack succeeds, and the message never comes again', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const durable = unique('d')
      const { stream, next } = await stage.subscribe(bus, subject, durable, { ackWaitMs: 300 })
      await bus.pubsub.publish(subject, 'x')
      const message = await next()
      await stream.close()
      await pause(500)
      await message.ack()
      const later = await stage.subscribe(bus, subject, durable)
      await later.nothing()
    })

    suite.where('strictFencing', 'P7 expired but not handed out again: nak, term and extend succeed as well', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const durable = unique('d')
      const { stream, reader } = await stage.subscribe(bus, subject, durable, { ackWaitMs: LONG_WAIT_MS })
      await publishNumbers(bus, subject, 3)
      const [naked, ended, extended] = await reader.take(3)
      await stream.close()
      await pause(LONG_WAIT_MS + 200)
      await extended!.extend()
      await naked!.nak(5_000)
      await ended!.term()
      const later = await stage.subscribe(bus, subject, durable)
      await later.nothing()
      await extended!.ack()
    })

    suite.where('strictFencing', 'P7 of an ack and a redelivery that race one wins', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      await publishNumbers(bus, subject, 30)
      const durable = unique('d')
      const { reader, stream } = await stage.subscribe(bus, subject, durable, { ackWaitMs: 600, maxInFlight: 50 })
      const held = await reader.take(30)
      await stream.close()
      const other = await stage.subscribe(bus, subject, durable, { maxInFlight: 50 })
      const again = new Set<number>()
      const reading = (async () => {
        for await (const message of other.stream) {
          again.add(message.seq)
          await message.ack()
        }
      })()
      await pause(500)
      const acked = new Set<number>()
      for (const message of held) {
        if (await succeeds(message.ack(), 'lease_lost')) acked.add(message.seq)
        await pause(8)
      }
      const deadline = performance.now() + PATIENCE_MS
      while (acked.size + again.size < 30 && performance.now() < deadline) await pause(20)
      await pause(QUIET_MS)
      await other.stream.close()
      await reading
      for (const { seq } of held)
        assert.ok(acked.has(seq) !== again.has(seq), `message ${seq}: acked ${acked.has(seq)}, again ${again.has(seq)}`)
    })

    for (const [first, second] of [
      ['ack', 'ack'],
      ['ack', 'nak'],
      ['ack', 'term'],
      ['nak', 'ack'],
      ['nak', 'nak'],
      ['term', 'ack'],
      ['term', 'nak'],
    ] as const) {
      suite.test(`P7 ${second} after ${first} is already_settled, and the ${first} stands`, async (stage) => {
        const bus = await stage.open()
        const subject = unique('p')
        const { next, nothing, stream } = await stage.subscribe(bus, subject, unique('d'))
        await bus.pubsub.publish(subject, 'x')
        const message = await next()
        // Nobody reads meanwhile: what is settled a second time was not handed out again.
        await message[first]()
        for (let tries = 0; tries < 2; tries++) await rejects(message[second](), 'already_settled')
        if (first === 'nak') {
          const again = await next()
          assert.equal(again.attempt, 2)
          await rejects(message[second](), 'already_settled')
          await again.ack()
        }
        await nothing()
        await stream.close()
      })
    }

    suite.test('P7 of settlements at the same moment the first stands', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const { next, nothing } = await stage.subscribe(bus, subject, unique('d'))
      await bus.pubsub.publish(subject, 'x')
      const message = await next()
      const [ack, nak, term] = [message.ack(), message.nak(), message.term()]
      await Promise.all([ack, rejects(nak, 'already_settled'), rejects(term, 'already_settled')])
      await nothing()
    })

    suite.test('P7 a bad argument to nak or term settles nothing', async (stage) => {
      const bus = await stage.open()
      const subject = unique('p')
      const { next, nothing } = await stage.subscribe(bus, subject, unique('d'))
      await bus.pubsub.publish(subject, 'x')
      const message = await next()
      for (const delay of [-1, 0.5, Number.NaN, Number.POSITIVE_INFINITY, 2_147_483_648])
        await rejects(message.nak(delay), 'invalid_argument', 'delayMs')
      await rejects(message.nak('1' as unknown as number), 'invalid_argument', 'delayMs')
      await message.ack()
      await nothing()
    })
  })
}
