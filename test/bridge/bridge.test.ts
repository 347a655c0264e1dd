/** The rules of the bridge, B1 to B8, on real servers and in both directions; B3 and B4 are in order.test.ts. */

import { randomBytes } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { jetstreamManager } from '@nats-io/jetstream'
import { connect } from '@nats-io/transport-node'
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import { Bridge, type BridgeOptions, BusError, type Message, type PostgresBus, type SubscribeOptions } from '../../src/index.ts'
import { MemoryBus } from '../../src/memory/index.ts'
import { NatsBus } from '../../src/nats/index.ts'
import { RolesStage } from '../security/support/roles-stage.ts'
import { startChild } from '../support/child.ts'
import { ownNatsServer, publishRaw, whyNoNats, whyNoOwnNats } from '../support/nats-server.ts'
import { eventually } from '../support/wait.ts'
import { ACK_WAIT_MS, type AnyBus, altered, type Backend, DIRECTIONS, HeldAcks, HeldPublishes, Stage, textOf } from './support/stage.ts'

const missing = whyNoNats()
const HEADER_ROOM = 512

describe.skipIf(missing !== undefined)(`the bridge${missing === undefined ? '' : ` (${missing})`}`, () => {
  const stage = new Stage()
  beforeAll(() => stage.start())
  afterEach(() => stage.clean())
  afterAll(() => stage.stop())

  const publish = async (backend: Backend, subject: string, ...texts: readonly string[]) => {
    for (const text of texts) await stage.at[backend].pubsub.publish(subject, text)
  }
  const numbers = (from: number, to: number) => Array.from({ length: to - from + 1 }, (_, n) => String(from + n))

  describe.each(DIRECTIONS)('from %s to %s', (from, to) => {
    // ---------------------------------------------------------------- B1

    test('B1 a message has its subject, payload and headers there, and bridge_id and bridge_path', async () => {
      const subject = stage.fresh('whole')
      const headers = {
        plain: 'text',
        'Case-Sensitive': 'A',
        'case-sensitive': 'a',
        umlaut: 'größer → 7',
        empty: '',
        spaces: '  around  ',
        tab: 'a\tb',
        'Nats-Msg-Id': 'mine',
        'nats-expected-last-sequence': '9',
        'klieo-headers': '{"x":1}',
        'klieo-packed': '7',
        'KV-Operation': 'DEL',
        Status: '404',
        description: 'no messages',
        '!#$%&*+-.^_`|~': 'odd name',
      }
      const payloads = [new Uint8Array(), new Uint8Array([0, 255, 10, 13]), randomBytes(300_000)]
      for (const payload of payloads) await stage.at[from].pubsub.publish(`${subject}.a`, payload, { headers })
      await stage.at[from].pubsub.publish(`${subject}.b.c`, 'none')
      await stage.at[from].pubsub.publish(`${subject}.b.c`, 'many', { headers: { long: 'x'.repeat(40_000) } })
      const there = await stage.read(to, `${subject}.>`)
      stage.bridge(await stage.connect(from), await stage.connect(to), `${subject}.>`, { durable: subject })
      await there.until(5)
      const own = expect.stringMatching(/^[0-9a-f]{8}$/)
      const added = { bridge_id: expect.stringMatching(/^bridge:[0-9a-f]{8}:\d+:\d+/), bridge_path: own }
      const first = there.seen.filter((message) => message.subject === `${subject}.a`)
      expect(first.map(({ payload }) => Buffer.from(payload))).toEqual(payloads.map((payload) => Buffer.from(payload)))
      for (const message of first) expect(message.headers).toEqual({ ...headers, ...added })
      const second = there.seen.filter((message) => message.subject === `${subject}.b.c`)
      expect(second.map(textOf)).toEqual(['none', 'many'])
      expect(second[0]?.headers).toEqual(added)
      expect(second[1]?.headers).toEqual({ long: 'x'.repeat(40_000), ...added })
      expect(new Set(there.seen.map((message) => message.headers.bridge_id)).size).toBe(5)
      await stage.isDone(from, subject)
    })

    test('B1 B5 what is as large as the target takes goes there, and a byte more does not', async () => {
      const subject = stage.fresh('limit')
      const source = stage.at[from]
      const there = await stage.read(to, subject)
      const letters = await stage.read(from, `${subject}.dlq`)
      // What the bridge adds counts: one of the same length is relayed first, to know how much that is.
      await source.pubsub.publish(subject, 'x')
      const { bridge } = stage.bridge(await stage.connect(from), await stage.connect(to), subject, { durable: subject })
      await there.until(1)
      const added = Object.entries(there.seen[0]!.headers).reduce((sum, [name, value]) => sum + name.length + value.length, 0)
      const most = 1024 * 1024
      await source.pubsub.publish(subject, new Uint8Array(most - added - HEADER_ROOM))
      await source.pubsub.publish(subject, new Uint8Array(most))
      await source.pubsub.publish(subject, 'after')
      await there.until(3)
      expect(there.seen.map(({ payload }) => payload.byteLength)).toEqual([1, most - added - HEADER_ROOM, 5])
      await letters.until(1)
      expect(letters.seen[0]?.headers).toMatchObject({ dlq_reason: expect.stringMatching(/^bridge_refused: /), dlq_subject: subject })
      await stage.isDone(from, subject)
      expect(bridge.stats).toMatchObject({ relayed: 3, refused: 1 })
    })

    test('B1 B3 while the target is away nothing is acked and no more than maxInFlight held; back, all come in order and once', async () => {
      const subject = stage.fresh('away')
      const gate = await stage.gate(to)
      const target = await stage.connect(to, { gate })
      const there = await stage.read(to, `${subject}.*`)
      const crossing = stage.bridge(await stage.connect(from), target, `${subject}.*`, { durable: subject, maxInFlight: 10 })
      await publish(from, `${subject}.a`, '0')
      await there.until(1)
      await stage.isDone(from, subject)
      gate.shut()
      for (const n of numbers(1, 25)) await publish(from, `${subject}.${Number(n) % 2 === 0 ? 'a' : 'b'}`, n)
      await eventually(() => crossing.stats.held === 10)
      // NATS is given five seconds for an answer.
      if (to === 'postgres') await eventually(() => crossing.errors.length > 0)
      expect(crossing.stats).toMatchObject({ state: 'relaying', held: 10, relayed: 1, oldestHeldAt: expect.any(Date) })
      const { pending, inFlight, redelivering } = (await stage.durable(from, subject))!
      expect(pending + inFlight + redelivering).toBe(25)
      gate.open()
      await there.until(26)
      const texts = await there.all()
      const even = (text: string) => Number(text) % 2 === 0
      expect(texts.filter(even)).toEqual(numbers(0, 25).filter(even))
      expect(texts.filter((text) => !even(text))).toEqual(numbers(0, 25).filter((text) => !even(text)))
      await stage.isDone(from, subject)
    })

    // ---------------------------------------------------------------- B2

    test('B2 what a bridge published and did not come to ack is stored once, by the one that follows', async () => {
      const subject = stage.fresh('once')
      const gates = [await stage.gate(from), await stage.gate(to)] as const
      const acks = new HeldAcks(await stage.connect(from, { gate: gates[0] }))
      const there = await stage.read(to, subject)
      await publish(from, subject, 'A', 'B')
      const first = stage.bridge(acks.bus, await stage.connect(to, { gate: gates[1] }), subject, { durable: subject })
      await there.until(2)
      await eventually(() => acks.waiting === 2)
      for (const gate of gates) gate.shut()
      await publish(from, subject, 'C')
      const second = stage.bridge(await stage.connect(from), await stage.connect(to), subject, { durable: subject })
      await there.until(3)
      expect(await there.all()).toEqual(['A', 'B', 'C'])
      expect(second.stats).toMatchObject({ relayed: 1, duplicates: 2 })
      expect(first.stats).toMatchObject({ relayed: 2 })
      await stage.isDone(from, subject)
    })

    test('B2 B8 the source is away for longer than the ack wait: what was published and not acked is not published again', async () => {
      const subject = stage.fresh('longer')
      const gate = await stage.gate(from)
      const acks = new HeldAcks(await stage.connect(from, { gate }))
      const there = await stage.read(to, subject)
      await publish(from, subject, 'A', 'B')
      const crossing = stage.bridge(acks.bus, await stage.connect(to), subject, { durable: subject })
      await there.until(2)
      await eventually(() => acks.waiting === 2)
      gate.shut()
      await publish(from, subject, 'C')
      await eventually(async () => {
        const { inFlight, redelivering } = (await stage.durable(from, subject))!
        return from === 'nats' || (inFlight === 0 && redelivering === 2)
      })
      await sleep(from === 'nats' ? 1.5 * ACK_WAIT_MS : 0)
      acks.letGo()
      gate.open()
      await there.until(3)
      expect(await there.all()).toEqual(['A', 'B', 'C'])
      await stage.isDone(from, subject)
      expect(crossing.stats).toMatchObject({ relayed: 3, duplicates: 0, skipped: 0, refused: 0 })
    })

    test('B2 what the target stored while the reading ended is not published by the next one', async () => {
      const subject = stage.fresh('late')
      const [source, target] = [await stage.connect(from), await stage.connect(to)]
      const published: string[] = []
      const answer = Promise.withResolvers<void>()
      const slow = altered(target, {
        publish: async (...args) => {
          published.push(textOf({ payload: args[1] as Uint8Array }))
          const ack = await target.pubsub.publish(...args)
          if (published.length === 1) await answer.promise
          return ack
        },
      })
      let interrupt: SubscribeOptions['onInterrupted']
      const watched = altered(source, {
        subscribe: (filter, durable, options) => {
          interrupt = options?.onInterrupted
          return source.pubsub.subscribe(filter, durable, options)
        },
      })
      const there = await stage.read(to, subject)
      await publish(from, subject, 'A')
      const crossing = stage.bridge(watched, slow, subject, { durable: subject })
      await there.until(1)
      // A goes back while the answer to its publish is on its way.
      interrupt?.(new BusError('connection', 'a fetch failed'))
      await crossing.until('recovering')
      await eventually(async () => (await stage.durable(from, subject))!.redelivering + (from === 'nats' ? 1 : 0) > 0)
      answer.resolve()
      await publish(from, subject, 'B')
      await there.until(2)
      expect(await there.all()).toEqual(['A', 'B'])
      await stage.isDone(from, subject)
      expect(published).toEqual(['A', 'B'])
    })

    // ---------------------------------------------------------------- B5

    test('B5 what the target does not take gets a letter with the reason, and the others go on in order', async () => {
      const subject = stage.fresh('refused')
      const there = await stage.read(to, subject)
      const letters = await stage.read(from, `${subject}.dlq`)
      const batch = ['1', 'x'.repeat(2_000), '2', 'y'.repeat(3_000), '3']
      const messages = batch.map((payload): Message => ({ subject, payload, headers: { trace: payload.slice(0, 1) } }))
      const acks = await stage.at[from].pubsub.publishMany(messages)
      const target = await stage.connect(to, { maxPayloadBytes: 1_000 })
      const crossing = stage.bridge(await stage.connect(from), target, subject, { durable: subject })
      await there.until(3)
      await letters.until(2)
      expect(await there.all()).toEqual(['1', '2', '3'])
      expect(letters.inOrder().map((letter) => [letter.subject, textOf(letter), letter.headers])).toEqual(
        [1, 3].map((n) => [
          `${subject}.dlq`,
          batch[n],
          {
            trace: batch[n]?.slice(0, 1),
            dlq_reason: expect.stringMatching(/^bridge_refused: .*1000/),
            dlq_subject: subject,
            dlq_seq: String(acks[n]?.seq),
            dlq_attempts: '1',
          },
        ]),
      )
      await stage.isDone(from, subject)
      await eventually(() => crossing.stats.held === 0)
      expect(crossing.stats).toMatchObject({ relayed: 3, refused: 2 })
      expect(crossing.errors).toEqual([2_000, 3_000].map(() => expect.objectContaining({ code: 'payload_too_large' })))
    })

    test('B5 headers that are too many with those of the bridge are refused, too', async () => {
      const subject = stage.fresh('headers')
      const there = await stage.read(to, subject)
      const letters = await stage.read(from, `${subject}.dlq`)
      await stage.at[from].pubsub.publish(subject, 'first', { headers: { h: 'x'.repeat(64 * 1024 - 10) } })
      await publish(from, subject, 'then')
      stage.bridge(await stage.connect(from), await stage.connect(to), subject, { durable: subject })
      await letters.until(1)
      await there.until(1)
      expect(await there.all()).toEqual(['then'])
      expect(letters.seen[0]?.headers).toMatchObject({ dlq_reason: expect.stringMatching(/^bridge_refused: /), dlq_headers_dropped: '1' })
    })

    test('B5 a letter that the source is too far away to take waits for it, and is one', async () => {
      const subject = stage.fresh('letter')
      const letters = await stage.read(from, `${subject}.dlq`)
      const source = await stage.connect(from)
      const failing = new Set(['connection', 'unavailable'] as const)
      const tries: string[] = []
      const flaky = altered(source, {
        publish: async (...args) => {
          tries.push(args[0])
          for (const code of failing) {
            failing.delete(code)
            // It was stored, and the answer lost.
            await source.pubsub.publish(...args)
            throw new BusError(code, 'not answered')
          }
          return source.pubsub.publish(...args)
        },
      })
      await publish(from, subject, 'x'.repeat(2_000))
      stage.bridge(flaky, await stage.connect(to, { maxPayloadBytes: 1_000 }), subject, { durable: subject })
      await eventually(() => tries.length >= 3)
      await stage.isDone(from, subject)
      expect(tries).toEqual([1, 2, 3].map(() => `${subject}.dlq`))
      expect(await letters.all()).toHaveLength(1)
    })

    test('B5 a durable on > ends its own letters where they are refused, without another', async () => {
      const durable = stage.fresh('everything')
      const subject = stage.fresh('s')
      const letters = await stage.read(from, `${durable}.dlq`)
      const there = await stage.read(to, subject)
      const target = await stage.connect(to, { maxPayloadBytes: 1_000 })
      const crossing = stage.bridge(await stage.connect(from), target, '>', { durable, start: 'new' })
      await crossing.until('relaying')
      await publish(from, subject, 'x'.repeat(2_000), 'after')
      await there.until(1)
      await eventually(() => crossing.stats.refused === 2)
      await stage.isDone(from, durable)
      expect(await letters.all()).toHaveLength(1)
      expect(await there.all()).toEqual(['after'])
      await stage.at[from].pubsub.deleteDurable(durable)
      await expect(crossing.bridge.ended).rejects.toMatchObject({ code: 'not_found' })
    })

    // ---------------------------------------------------------------- B7

    test('B7 stop relays what was read', async () => {
      const subject = stage.fresh('stop')
      const there = await stage.read(to, subject)
      const publishes = new HeldPublishes(await stage.connect(to))
      await publish(from, subject, ...numbers(1, 30))
      const crossing = stage.bridge(await stage.connect(from), publishes.bus, subject, { durable: subject, maxInFlight: 20 })
      await eventually(() => crossing.stats.held === 20)
      const stopped = crossing.bridge.stop()
      publishes.letGo()
      await stopped
      expect(crossing.stats).toMatchObject({ state: 'ended', relayed: 20, held: 0 })
      expect(await there.all()).toEqual(numbers(1, 20))
      expect(await stage.durable(from, subject)).toMatchObject({ pending: 10, inFlight: 0, redelivering: 0 })
    })

    test('B7 after graceMs it hands back the rest, and the next bridge goes on there at once', async () => {
      const subject = stage.fresh('grace')
      const there = await stage.read(to, subject)
      const target = await stage.connect(to)
      const publishes = new HeldPublishes(target)
      await publish(from, subject, ...numbers(1, 30))
      const options = { durable: subject, ackWaitMs: 20_000, maxInFlight: 20 }
      const crossing = stage.bridge(await stage.connect(from), publishes.bus, subject, options)
      await eventually(() => crossing.stats.held === 20)
      await crossing.bridge.stop({ graceMs: 50 })
      expect(crossing.stats).toMatchObject({ state: 'ended', relayed: 0 })
      const next = stage.bridge(await stage.connect(from), target, subject, options)
      await there.until(30)
      expect(await there.all()).toEqual(numbers(1, 30))
      expect(next.stats).toMatchObject({ relayed: 30, duplicates: 0 })
    }, 15_000)

    test('B7 stop ends in time while either server is away', async () => {
      for (const away of [from, to]) {
        const subject = stage.fresh('stop-away')
        const gate = await stage.gate(away)
        const source = await stage.connect(from, away === from ? { gate } : {})
        const target = await stage.connect(to, away === to ? { gate } : {})
        const crossing = stage.bridge(source, target, subject, { durable: subject, ackWaitMs: 30_000 })
        await crossing.until('relaying')
        gate.shut()
        await publish(from, subject, 'x')
        // What was asked of NATS hears nothing of it for a while.
        if (away === 'postgres') await eventually(() => crossing.errors.length > 0)
        const askedAt = performance.now()
        await crossing.bridge.stop({ graceMs: 100 })
        expect(performance.now() - askedAt, away).toBeLessThan(8_000)
      }
    })

    test('B7 a bridge ends when either of its buses is closed, idle or waiting', async () => {
      for (const closed of [from, to]) {
        const subject = stage.fresh('closing')
        const buses = { [from]: await stage.connect(from), [to]: await stage.connect(to) } as Record<Backend, AnyBus>
        const crossing = stage.bridge(buses[from], buses[to], subject, { durable: subject })
        await crossing.until('relaying')
        await buses[closed].close()
        await crossing.bridge.ended
        expect(crossing.stats.state).toBe('ended')
        await crossing.bridge.stop()
      }
      const subject = stage.fresh('closing')
      const first = stage.bridge(await stage.connect(from), await stage.connect(to), subject, { durable: subject })
      await first.until('relaying')
      const source = await stage.connect(from)
      const second = stage.bridge(source, await stage.connect(to), subject, { durable: subject })
      await source.close()
      await second.bridge.ended
    })

    test('B7 a bus that is closed amid messages leaves them to the next bridge', async () => {
      const subject = stage.fresh('amid')
      const there = await stage.read(to, subject)
      await publish(from, subject, ...numbers(1, 300))
      for (const closed of [from, to]) {
        const buses = { [from]: await stage.connect(from), [to]: await stage.connect(to) } as Record<Backend, AnyBus>
        const crossing = stage.bridge(buses[from], buses[to], subject, { durable: subject, maxInFlight: 10 })
        await eventually(() => crossing.stats.relayed > 0, { everyMs: 1 })
        await buses[closed].close()
        await crossing.bridge.ended
        expect(crossing.errors).toEqual([])
      }
      stage.bridge(await stage.connect(from), await stage.connect(to), subject, { durable: subject })
      await there.until(300)
      expect(await there.all()).toEqual(numbers(1, 300))
    })

    // ---------------------------------------------------------------- B8

    test('B8 another filter, and a durable that is deleted, end it', async () => {
      const subject = stage.fresh('deleted')
      await (await stage.at[from].pubsub.subscribe(`${subject}.other`, subject)).close()
      const refused = stage.bridge(await stage.connect(from), await stage.connect(to), subject, { durable: subject })
      await expect(refused.bridge.ended).rejects.toMatchObject({ code: 'conflict' })
      await expect(refused.bridge.stop()).rejects.toMatchObject({ code: 'conflict' })
      expect(refused.stats.state).toBe('ended')
      await stage.at[from].pubsub.deleteDurable(subject)
      const crossing = stage.bridge(await stage.connect(from), await stage.connect(to), subject, { durable: subject })
      await crossing.until('relaying')
      await stage.at[from].pubsub.deleteDurable(subject)
      await expect(crossing.bridge.ended).rejects.toMatchObject({ code: 'not_found' })
    })

    test('B8 what passes of a fetch or a publish does not end it, also where it is a conflict that may be repeated', async () => {
      const subject = stage.fresh('passing')
      const target = await stage.connect(to)
      const there = await stage.read(to, subject)
      const errors = ['connection', 'unavailable', 'timeout', 'conflict'] as const
      let tries = 0
      const once =
        <A extends unknown[], R>(act: (...args: A) => Promise<R>) =>
        async (...args: A) => {
          const code = errors[tries++]
          if (code !== undefined) throw new BusError(code, 'for once', { retryable: true })
          return act(...args)
        }
      const flaky = altered(target, { publish: once((...args) => target.pubsub.publish(...args)) })
      const crossing = stage.bridge(await stage.connect(from), flaky, subject, { durable: subject })
      await publish(from, subject, 'x')
      await there.until(1)
      expect(crossing.stats).toMatchObject({ state: 'relaying', relayed: 1 })
    })
  })

  // ------------------------------------------------------------------ both directions at once

  test('B6 two bridges in a circle: each message is there once on either side', async () => {
    const subject = stage.fresh('circle')
    const [there, here] = [await stage.read('nats', `${subject}.*`), await stage.read('postgres', `${subject}.*`)]
    const out = stage.bridge(await stage.connect('postgres'), await stage.connect('nats'), `${subject}.*`, { durable: `${subject}-out` })
    const back = stage.bridge(await stage.connect('nats'), await stage.connect('postgres'), `${subject}.*`, { durable: `${subject}-back` })
    for (const n of numbers(1, 20))
      await Promise.all([publish('postgres', `${subject}.a`, `p${n}`), publish('nats', `${subject}.b`, `n${n}`)])
    await Promise.all([there.until(40), here.until(40)])
    await eventually(() => out.stats.skipped === 20 && back.stats.skipped === 20)
    const wanted = [...numbers(1, 20).map((n) => `p${n}`), ...numbers(1, 20).map((n) => `n${n}`)].sort()
    expect((await there.all()).sort()).toEqual(wanted)
    expect((await here.all()).sort()).toEqual(wanted)
    expect([out.stats, back.stats]).toEqual([0, 0].map(() => expect.objectContaining({ relayed: expect.any(Number), duplicates: 0 })))
    await Promise.all([stage.isDone('postgres', `${subject}-out`), stage.isDone('nats', `${subject}-back`)])
  })

  test('B1 a message of another client with a name of a header that cannot be read stops nothing', async () => {
    const subject = stage.fresh('name')
    const there = await stage.read('postgres', subject)
    await publishRaw(stage.natsUrl, `${stage.prefix}.msg.${subject}`, 'two words: x', '1')
    await publish('nats', subject, '2')
    stage.bridge(await stage.connect('nats'), await stage.connect('postgres'), subject, { durable: subject })
    await there.until(2)
    expect(await there.all()).toEqual(['1', '2'])
  })

  test('B1 B6 the dead letter that a consumer of a relayed message left is a message of its own, and goes back', async () => {
    const subject = stage.fresh('buried')
    const consumer = `${subject}-consumer`
    const here = await stage.read('postgres', `${consumer}.dlq`)
    const target = stage.at.nats
    const options = { maxDeliver: 1, ackWaitMs: ACK_WAIT_MS }
    const messages = (await target.pubsub.subscribe(subject, consumer, options))[Symbol.asyncIterator]()
    stage.bridge(await stage.connect('postgres'), await stage.connect('nats'), subject, { durable: `${subject}-out` })
    const back = stage.bridge(await stage.connect('nats'), await stage.connect('postgres'), `${consumer}.dlq`, {
      durable: `${subject}-back`,
    })
    await publish('postgres', subject, 'poison')
    await (await messages.next()).value!.nak()
    await here.until(1)
    expect(here.seen[0]?.headers).toMatchObject({ dlq_reason: 'max_deliver_exceeded', dlq_subject: subject })
    expect(back.stats).toMatchObject({ relayed: 1, skipped: 0 })
  })

  test.each(DIRECTIONS)('B8 a right that a role lacks or loses ends it, from %s to %s', async (from, to) => {
    await using roles = await RolesStage.open()
    const nats = await stage.connect('nats')
    const run = (postgres: PostgresBus, durable: string) => {
      const [source, target] = from === 'postgres' ? [postgres, nats] : [nats, postgres]
      return stage.bridge(source, target, durable, { durable })
    }
    await using reader = await roles.connect('reader')
    await expect(run(reader, stage.fresh('lacks')).bridge.ended).rejects.toMatchObject({ code: 'permission_denied' })
    await roles.rows(`grant ${roles.schema}_reader to ${roles.login('worker')}`)
    await using worker = await roles.connect('worker')
    const subject = stage.fresh('loses')
    const crossing = run(worker, subject)
    const source = from === 'postgres' ? worker : nats
    await source.pubsub.publish(subject, '1')
    await eventually(() => crossing.stats.relayed === 1)
    await roles.rows(`revoke ${roles.schema}_worker from ${roles.login('worker')}`)
    if (to === 'postgres') await source.pubsub.publish(subject, '2')
    await expect(crossing.bridge.ended).rejects.toMatchObject({ code: 'permission_denied' })
  })

  test.skipIf(process.env.NATS_URL)('B8 a user who may not publish ends it, on NATS', async () => {
    const users = ['all', 'none'].map((user) => {
      const permissions = user === 'all' ? '' : ', permissions: { publish: { deny: "klieo.msg.>" } }'
      return `{ user: ${user}, password: x${permissions} }`
    })
    const server = await ownNatsServer(`authorization { users: [ ${users.join(', ')} ] }\n`)
    try {
      await using all = await NatsBus.connect({ servers: server.url, user: 'all', pass: 'x' })
      await using none = await NatsBus.connect({ servers: server.url, user: 'none', pass: 'x' })
      const subject = stage.fresh('denied')
      await publish('postgres', subject, 'x')
      const target = stage.bridge(await stage.connect('postgres'), none, subject, { durable: subject })
      await expect(target.bridge.ended).rejects.toMatchObject({ code: 'permission_denied' })
      // What it had in hand went back.
      expect(await stage.durable('postgres', subject)).toMatchObject({ inFlight: 0, redelivering: 1 })
      stage.bridge(await stage.connect('postgres'), all, subject, { durable: subject })
      await stage.isDone('postgres', subject)
    } finally {
      await server.remove()
    }
  })

  test.skipIf(whyNoOwnNats() !== undefined)('B2 what a killed nats-server has forgotten to be acked is not published again', async () => {
    const subject = stage.fresh('killed')
    const server = await ownNatsServer()
    try {
      await using source = await NatsBus.connect({ servers: server.url })
      await using target = MemoryBus.create()
      const crossing = stage.bridge(source, target, `${subject}.*`, { durable: subject })
      await crossing.until('relaying')
      await source.pubsub.publishMany(numbers(1, 1_000).map((n): Message => ({ subject: `${subject}.${n}`, payload: n })))
      await eventually(() => crossing.stats.relayed === 1_000 && crossing.stats.held === 0, { everyMs: 1 })
      await server.stop('SIGKILL')
      await server.start()
      await eventually(async () => {
        const [found] = await source.admin.durables()
        return crossing.stats.state === 'relaying' && found && found.pending + found.inFlight + found.redelivering === 0
      })
      expect(crossing.stats).toMatchObject({ relayed: 1_000, duplicates: 0 })
      await crossing.bridge.stop()
    } finally {
      await server.remove()
    }
  })

  test('B5 what a server takes less of than the bus allows is refused by its words, and no reason to end', async () => {
    const subject = stage.fresh('server')
    const letters = await stage.read('postgres', `${subject}.dlq`)
    const server = await ownNatsServer('max_payload: 256KB\n')
    try {
      await using small = await NatsBus.connect({ servers: server.url, maxPayloadBytes: 'server' })
      await stage.at.postgres.pubsub.publish(subject, new Uint8Array(256 * 1024))
      await publish('postgres', subject, 'after')
      const crossing = stage.bridge(await stage.connect('postgres'), small, subject, { durable: subject })
      await letters.until(1)
      await stage.isDone('postgres', subject)
      // An operator has set a limit of his own on the stream.
      const nc = await connect({ servers: server.url })
      const jsm = await jetstreamManager(nc)
      await jsm.streams.update('klieo_messages', { max_msg_size: 2_000 })
      await publish('postgres', subject, 'x'.repeat(3_000), 'still after')
      await letters.until(2)
      await stage.isDone('postgres', subject)
      await nc.close()
      expect(crossing.stats).toMatchObject({ state: 'relaying', relayed: 2, refused: 2 })
      await crossing.bridge.stop()
    } finally {
      await server.remove()
    }
  })
})

test('its arguments are checked at once', async () => {
  await using bus = MemoryBus.create()
  const make = (subject: unknown, options: unknown) => () => new Bridge(bus, bus, subject as string, options as BridgeOptions)
  const durable = 'd'
  const wrong: readonly (readonly [string, () => unknown])[] = [
    ['subject', make('a..b', { durable })],
    ['subject', make('>.a', { durable })],
    ['subject', make(7, { durable })],
    ['options', make('a', undefined)],
    ['durable', make('a', {})],
    ['durable', make('a', { durable: 'a.b' })],
    ['durable', make('a', { durable: '' })],
    ['start', make('a', { durable, start: 'begin' })],
    ['start', make('a', { durable, start: { seq: -1 } })],
    ['maxInFlight', make('a', { durable, maxInFlight: 0 })],
    ['maxInFlight', make('a', { durable, maxInFlight: 10_001 })],
    ['maxInFlight', make('a', { durable, maxInFlight: '1' })],
    ['ackWaitMs', make('a', { durable, ackWaitMs: 999 })],
    ['ackWaitMs', make('a', { durable, ackWaitMs: 1_000.5 })],
    ['onError', make('a', { durable, onError: 'log' })],
  ]
  for (const [what, construct] of wrong) {
    expect(construct, what).toThrow(expect.objectContaining({ code: 'invalid_argument' }))
    if (what !== 'options') expect(construct).toThrow(what)
  }
  const bridge = new Bridge(bus, bus, 'a', { durable })
  await expect(bridge.stop({ graceMs: -1 })).rejects.toMatchObject({ code: 'invalid_argument' })
  await bridge.stop()
  expect(bridge.stats).toMatchObject({ state: 'ended', relayed: 0, held: 0 })
  await bridge[Symbol.asyncDispose]()
})

test('B7 a bridge ends that is stopped in the moment in which a reading begins', async () => {
  const goOn: number[] = []
  for (let moment = 0; moment < 20; moment++) {
    await using source = MemoryBus.create()
    await using target = MemoryBus.create()
    let stop = () => {}
    const lease: typeof source.kv.lease = async (...args) => {
      const granted = await source.kv.lease(...args)
      const beat = granted.heartbeat.bind(granted)
      granted.heartbeat = async () => {
        await beat()
        void (async () => {
          for (let n = 0; n < moment; n++) await null
          stop()
        })()
      }
      return granted
    }
    const { get, cas } = source.kv
    const kv = Object.assign(Object.create(source.kv), { lease, get: get.bind(source.kv), cas: cas.bind(source.kv) })
    const bridge = new Bridge({ ...altered(source, {}), kv }, target, 'a', { durable: 'd' })
    stop = () => void bridge.stop({ graceMs: 0 })
    if (!(await Promise.race([bridge.ended.then(() => true), sleep(500, false)]))) goOn.push(moment)
  }
  expect(goOn).toEqual([])
})

test('B7 a bridge that is stopped while a reading ends keeps no process alive', async () => {
  await using child = startChild(new URL('./support/stopped-child.ts', import.meta.url))
  await child.next(({ stopped }) => stopped === true)
  const stoppedAt = performance.now()
  expect((await child.exited).code).toBe(0)
  expect(performance.now() - stoppedAt).toBeLessThan(5_000)
})

test('B8 a durable that is deleted between two readings ends it, and is not made anew', async () => {
  await using source = MemoryBus.create()
  await using target = MemoryBus.create()
  const interrupts: NonNullable<SubscribeOptions['onInterrupted']>[] = []
  const watched = altered(source, {
    subscribe: async (subject, durable, options) => {
      interrupts.push(options!.onInterrupted!)
      return source.pubsub.subscribe(subject, durable, options)
    },
  })
  await source.pubsub.publish('a', '1')
  const bridge = new Bridge(watched, target, 'a', { durable: 'd', onError: () => {} })
  await eventually(() => bridge.stats.relayed === 1 && bridge.stats.held === 0)
  interrupts[0]?.(new BusError('connection', 'a fetch failed'))
  await eventually(() => bridge.stats.state === 'recovering')
  await source.pubsub.deleteDurable('d')
  await eventually(() => bridge.stats.state === 'ended' || interrupts.length === 2)
  expect(await source.admin.durables()).toEqual([])
  await expect(bridge.ended).rejects.toMatchObject({ code: 'not_found' })
})

test('B8 a durable that is deleted ends also who waits to take over', async () => {
  await using source = MemoryBus.create()
  await using target = MemoryBus.create()
  await source.pubsub.publish('a', '1')
  const looks: unknown[] = []
  const admin = Object.create(source.admin, { durables: { value: () => source.admin.durables().finally(() => looks.push(1)) } })
  const first = new Bridge(source, target, 'a', { durable: 'd' })
  await eventually(() => first.stats.relayed === 1 && first.stats.held === 0)
  const second = new Bridge({ ...altered(source, {}), admin }, target, 'a', { durable: 'd' })
  await eventually(() => looks.length > 0, { timeoutMs: 2_000 })
  await source.pubsub.deleteDurable('d')
  await expect(first.ended).rejects.toMatchObject({ code: 'not_found' })
  await eventually(() => second.stats.state !== 'waiting')
  await expect(second.ended).rejects.toMatchObject({ code: 'not_found' })
  expect(second.stats).toMatchObject({ relayed: 0, duplicates: 0 })
  expect(await source.admin.durables()).toEqual([])
})

test('what onError throws is thrown where nobody catches it, and ends nothing', async () => {
  await using source = MemoryBus.create()
  await using target = MemoryBus.create({ maxPayloadBytes: 100 })
  const thrown: unknown[] = []
  const listeners = process.listeners('uncaughtException')
  process.removeAllListeners('uncaughtException')
  process.on('uncaughtException', (error) => thrown.push(error))
  try {
    const fail = () => {
      throw new Error('mine')
    }
    await using bridge = new Bridge(source, target, 'a', { durable: 'd', onError: fail })
    await source.pubsub.publish('a', 'x'.repeat(200))
    await source.pubsub.publish('a', 'y')
    await eventually(() => bridge.stats.relayed === 1)
    expect(bridge.stats.refused).toBe(1)
    await eventually(() => thrown.length === 1)
    expect(thrown).toEqual([expect.objectContaining({ message: 'mine' })])
  } finally {
    process.removeAllListeners('uncaughtException')
    for (const listener of listeners) process.on('uncaughtException', listener)
  }
})
