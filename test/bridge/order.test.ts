/** The rules of the bridge on order and on takeovers, B3 and B4, on real servers and in both directions: bridge.test.ts has the others. */

import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { Tap } from '../faults/support/network/tap.ts'
import { type Child, startChild } from '../support/child.ts'
import { whyNoNats } from '../support/nats-server.ts'
import { databaseUrl } from '../support/server.ts'
import { eventually } from '../support/wait.ts'
import type { Setup } from './support/bridge-child.ts'
import { ACK_WAIT_MS, type Backend, DIRECTIONS, Stage, slow } from './support/stage.ts'

const missing = whyNoNats()

describe.skipIf(missing !== undefined)(`the order of a bridge${missing === undefined ? '' : ` (${missing})`}`, () => {
  const stage = new Stage()
  beforeAll(() => stage.start())
  afterEach(() => stage.clean())
  afterAll(() => stage.stop())

  const publish = async (backend: Backend, subject: string, ...texts: readonly string[]) => {
    for (const text of texts) await stage.at[backend].pubsub.publish(subject, text)
  }
  const numbers = (from: number, to: number) => Array.from({ length: to - from + 1 }, (_, n) => String(from + n))

  const child = (from: Backend, subject: string, durable: string): Child => {
    const { schema, prefix, natsUrl: servers } = stage
    const setup: Setup = { connectionString: databaseUrl(), schema, servers, prefix, from, subject, durable, ackWaitMs: ACK_WAIT_MS }
    return startChild(new URL('./support/bridge-child.ts', import.meta.url), { args: [JSON.stringify(setup)] })
  }
  const statsOf = async (bridge: Child) => {
    bridge.send('stats')
    return bridge.next()
  }

  describe.each(DIRECTIONS)('from %s to %s', (from, to) => {
    // ---------------------------------------------------------------- B3

    test('B3 A and B in the hands of a dead one and C published later are stored as A, B, C', async () => {
      const subject = stage.fresh('order')
      const there = await stage.read(to, subject)
      await publish(from, subject, 'A', 'B')
      await stage.deadHolder(from, subject, subject, 2)
      await publish(from, subject, 'C')
      const crossing = stage.bridge(await stage.connect(from), await stage.connect(to), subject, { durable: subject })
      await there.until(3)
      expect(await there.all()).toEqual(['A', 'B', 'C'])
      expect(crossing.stats).toMatchObject({ relayed: 3, duplicates: 0 })
    })

    test('B3 also where an earlier bridge had a longer ack wait', async () => {
      const subject = stage.fresh('longer')
      const longer = 3 * ACK_WAIT_MS
      const there = await stage.read(to, subject)
      const first = stage.bridge(await stage.connect(from), await stage.connect(to), subject, { durable: subject, ackWaitMs: longer })
      await first.until('relaying')
      await first.bridge.stop()
      await publish(from, subject, 'A', 'B')
      await stage.deadHolder(from, subject, subject, 2, longer)
      await publish(from, subject, 'C')
      stage.bridge(await stage.connect(from), await stage.connect(to), subject, { durable: subject })
      await there.until(3)
      expect(await there.all()).toEqual(['A', 'B', 'C'])
    })

    test('B3 a fetch whose answer is lost between two messages of a subject', async () => {
      const subject = stage.fresh('lost')
      const there = await stage.read(to, subject)
      const target = await stage.connect(to)
      await publish(from, subject, '1')
      if (from === 'postgres') {
        await using tap = await Tap.start(databaseUrl())
        const { schema } = stage
        const source = await PostgresBus.connect({ connectionString: tap.connectionString, schema, maintenance: false, migrate: false })
        const { bridge } = stage.bridge(source, target, subject, { durable: subject })
        await there.until(1)
        await stage.isDone(from, subject)
        const fetched = tap.loseAnswer(/fetch_messages/)
        // An idle fetch may be the one whose answer is lost: then the next one is.
        await publish(from, subject, '2')
        await fetched
        await publish(from, subject, '3')
        await there.until(3)
        expect(await there.all()).toEqual(['1', '2', '3'])
        await bridge.stop()
        await source.close()
        return
      }
      const gate = await stage.gate(from)
      const crossing = stage.bridge(await stage.connect(from, { gate }), target, subject, { durable: subject })
      await there.until(1)
      await stage.isDone(from, subject)
      gate.loseAnswers()
      await publish(from, subject, '2')
      await eventually(async () => (await stage.durable(from, subject))!.inFlight === 1)
      gate.shut()
      gate.open()
      await publish(from, subject, '3')
      await there.until(3)
      expect(await there.all()).toEqual(['1', '2', '3'])
      expect(crossing.stats).toMatchObject({ relayed: 3 })
    })

    test('B3 more messages than the bridge may hold do not keep it from what a dead one has in hand', async () => {
      const subject = stage.fresh('many')
      const there = await stage.read(to, `${subject}.*`)
      for (const n of numbers(1, 60)) await publish(from, `${subject}.${Number(n) % 3}`, n)
      await stage.deadHolder(from, `${subject}.*`, subject, 20)
      for (const n of numbers(61, 90)) await publish(from, `${subject}.${Number(n) % 3}`, n)
      stage.bridge(await stage.connect(from), await stage.connect(to), `${subject}.*`, { durable: subject, maxInFlight: 7 })
      await there.until(90)
      const texts = await there.all()
      for (const rest of [0, 1, 2]) {
        const of = (text: string) => Number(text) % 3 === rest
        expect(texts.filter(of)).toEqual(numbers(1, 90).filter(of))
      }
    })

    test('B3 what a dead one had in hand is waited for as long as it keeps coming', async () => {
      const subject = stage.fresh('slowly')
      const there = await stage.read(to, subject)
      await publish(from, subject, ...numbers(1, 30))
      // The first one comes last: its ack wait is over last.
      const [first] = await stage.deadHolder(from, subject, subject, 30)
      await first?.extend()
      await publish(from, subject, '31')
      stage.bridge(slow(await stage.connect(from), ACK_WAIT_MS / 25), await stage.connect(to), subject, { durable: subject })
      await there.until(31)
      expect(await there.all()).toEqual(numbers(1, 31))
    })

    // ---------------------------------------------------------------- B4

    test('B4 the second waits, and follows at once on one that stops', async () => {
      const subject = stage.fresh('second')
      const there = await stage.read(to, subject)
      const first = stage.bridge(await stage.connect(from), await stage.connect(to), subject, { durable: subject, ackWaitMs: 20_000 })
      await first.until('relaying')
      const second = stage.bridge(await stage.connect(from), await stage.connect(to), subject, { durable: subject, ackWaitMs: 20_000 })
      await publish(from, subject, '1')
      await there.until(1)
      expect([first.stats.relayed, second.stats.state]).toEqual([1, 'waiting'])
      const stoppedAt = performance.now()
      await first.bridge.stop()
      expect(first.stats.state).toBe('ended')
      await second.until('relaying')
      expect(performance.now() - stoppedAt).toBeLessThan(5_000)
      await publish(from, subject, '2')
      await there.until(2)
      expect([first.stats.relayed, second.stats.relayed]).toEqual([1, 1])
    })

    test('B4 one that dies is followed within twice the ack wait', async () => {
      const subject = stage.fresh('dies')
      const there = await stage.read(to, subject)
      await using first = child(from, subject, subject)
      await publish(from, subject, '1')
      await there.until(1)
      const second = stage.bridge(await stage.connect(from), await stage.connect(to), subject, { durable: subject })
      await first.kill('SIGKILL')
      const diedAt = performance.now()
      await publish(from, subject, '2')
      await second.until('relaying')
      expect(performance.now() - diedAt).toBeLessThan(2 * ACK_WAIT_MS + 500)
      await there.until(2)
      expect(await there.all()).toEqual(['1', '2'])
    })

    test('B3 B4 one that stood still takes nothing meant for the next, and relays nothing more', async () => {
      const subject = stage.fresh('still')
      const there = await stage.read(to, subject)
      await using first = child(from, subject, subject)
      await publish(from, subject, '0')
      await there.until(1)
      await stage.isDone(from, subject)
      const second = stage.bridge(await stage.connect(from), await stage.connect(to), subject, { durable: subject })
      first.pause()
      await second.until('relaying')
      await publish(from, subject, ...numbers(1, 20))
      await there.until(21)
      first.resume()
      await eventually(async () => (await statsOf(first)).state === 'waiting')
      await publish(from, subject, ...numbers(21, 40))
      await there.until(41)
      expect(await there.all()).toEqual(numbers(0, 40))
      expect(await statsOf(first)).toMatchObject({ relayed: 1, duplicates: 0, state: 'waiting' })
      expect(second.stats).toMatchObject({ relayed: 40, duplicates: 0 })
    })
  })
})
