import { type } from 'arktype'
import * as v from 'valibot'
import { beforeAll, describe, expect, test } from 'vitest'
import { z } from 'zod'
import {
  type Bus,
  BusError,
  type Codec,
  defineSubject,
  encode,
  type Msg,
  type SubjectContract,
  type TypedSubscribeOptions,
} from '../../src/index.ts'
import { deferred, eventually } from '../support/wait.ts'
import { fresh, onEachBackend, stored, take } from './support/backends.ts'

const order = z.object({ order: z.number() })
const text = (payload: Uint8Array) => Buffer.from(payload).toString()

/** What the stream told, and how to hear it. */
function ear(): { readonly told: BusError[]; readonly onError: NonNullable<TypedSubscribeOptions['onError']> } {
  const told: BusError[] = []
  return { told, onError: (error) => told.push(error) }
}

/** The bus, but for what its `publish` does. */
function publishing(bus: Bus<never>, publish: Bus['pubsub']['publish']): Pick<Bus<never>, 'pubsub'> {
  const { pubsub } = bus
  return {
    pubsub: {
      publish,
      publishMany: (...args) => pubsub.publishMany(...args),
      subscribe: (...args) => pubsub.subscribe(...args),
      deleteDurable: (...args) => pubsub.deleteDurable(...args),
    },
  }
}

onEachBackend((backend) => {
  let bus: Bus<never>
  beforeAll(async () => {
    bus = (await backend.connect()) as Bus<never>
  })

  const contracts: Readonly<Record<string, (subject: string) => SubjectContract<{ order: number }>>> = {
    zod: (subject) => defineSubject(subject, z.object({ order: z.number() })) as SubjectContract<{ order: number }>,
    valibot: (subject) => defineSubject(subject, v.object({ order: v.number() })) as SubjectContract<{ order: number }>,
    arktype: (subject) => defineSubject(subject, type({ order: 'number' })) as SubjectContract<{ order: number }>,
    'a schema that takes its time': (subject) =>
      defineSubject(
        subject,
        z.object({ order: z.number() }).refine(async () => true),
      ) as SubjectContract<{ order: number }>,
  }

  describe.each(Object.entries(contracts))('a schema of %s', (_name, define) => {
    test('T3 what does not match is not yielded, is on the dead-letter subject with the reason, and is ended for this durable alone', async () => {
      const created = define(`${fresh()}.created`)
      const [durable, other] = [fresh(), fresh()]
      const payload = encode({ order: 'seven' })
      const { seq } = await bus.pubsub.publish(created.subject, payload, { headers: { trace: 'x' } })
      await created.publish(bus, { order: 8 })
      const { told, onError } = ear()
      const stream = await created.subscribe(bus, durable, { onError, ackWaitMs: 500 })
      expect((await take(stream, 1)).map(({ data }) => data)).toEqual([{ order: 8 }])
      const [letter, ...more] = await stored(bus, `${durable}.dlq`)
      expect(more).toEqual([])
      expect(letter?.payload).toEqual(payload)
      expect(letter?.headers).toEqual({
        trace: 'x',
        dlq_reason: expect.stringMatching(/^invalid_payload: order: expected (a )?number$/),
        dlq_subject: created.subject,
        dlq_seq: String(seq),
        dlq_attempts: '1',
      })
      expect(told).toEqual([expect.any(BusError)])
      expect(told[0]).toMatchObject({ code: 'invalid_argument', message: expect.stringContaining(`"${durable}.dlq"`) })
      await stream.close()

      // It is not there any more for this durable, and still for another.
      const durables = await bus.admin.durables()
      expect(durables.find((info) => info.durable === durable)).toMatchObject({ pending: 0, inFlight: 0, redelivering: 0 })
      const others = await bus.pubsub.subscribe(created.subject, other)
      expect((await take(others, 2)).map((msg) => msg.seq)[0]).toBe(seq)
      await others.close()
    })
  })

  test('T3 what cannot be decoded does not match, with a type alone too', async () => {
    const typed = defineSubject<number>(`${fresh()}.a`)
    const numbers: Codec<number> = {
      encode: String,
      decode: (payload) => {
        const number = Number(text(payload))
        if (Number.isNaN(number)) throw new RangeError(`${text(payload)} is secret`)
        return number
      },
    }
    const coded = defineSubject(`${fresh()}.b`, numbers)
    for (const [contract, reason] of [
      [typed, 'invalid_payload: not JSON in UTF-8'],
      [coded, 'invalid_payload: the codec refused it'],
    ] as const) {
      const durable = fresh()
      for (const payload of ['', '{"order":', new Uint8Array([0xff])]) {
        await bus.pubsub.publish(contract.subject, payload)
      }
      await bus.pubsub.publish(contract.subject, '7')
      const stream = await contract.subscribe(bus, durable, { onError: () => {} })
      // To Number('') is 0.
      const matching = contract === typed ? [7] : [0, 7]
      expect((await take(stream, matching.length)).map(({ data }) => data)).toEqual(matching)
      await stream.close()
      const letters = await stored(bus, `${durable}.dlq`)
      expect(letters.map(({ headers }) => headers.dlq_reason)).toEqual(Array.from({ length: 4 - matching.length }, () => reason))
    }
  })

  test('T3 a schema that throws has refused, whenever it does', async () => {
    for (const refuse of [
      v.pipe(
        v.string(),
        v.transform((value) => JSON.parse(value)),
      ),
      v.pipeAsync(
        v.string(),
        v.transformAsync(async (value) => JSON.parse(value)),
      ),
    ]) {
      const subject = `${fresh()}.a`
      const durable = fresh()
      const nested = defineSubject(subject, refuse)
      await expect(nested.publish(bus, 'hunter2')).rejects.toMatchObject({
        code: 'invalid_argument',
        message: 'data does not match: the schema threw; nothing was sent',
      })
      await bus.pubsub.publish(subject, encode('hunter2'))
      await nested.publish(bus, '7')
      const stream = await nested.subscribe(bus, durable, { onError: () => {} })
      expect((await take(stream, 1)).map(({ data }) => data)).toEqual([7])
      expect((await stored(bus, `${durable}.dlq`)).map(({ headers }) => headers.dlq_reason)).toEqual(['invalid_payload: the schema threw'])
      await stream.close()
    }
  })

  test('T3 the attempts of a letter are those of the message', async () => {
    const subject = `${fresh()}.a`
    const durable = fresh()
    await bus.pubsub.publish(subject, encode({ order: 'x' }))
    const plain = await bus.pubsub.subscribe(subject, durable)
    for await (const msg of plain) {
      await msg.nak()
      if (msg.attempt === 2) break
    }
    await plain.close()
    const contract = defineSubject(subject, order)
    await contract.publish(bus, { order: 1 })
    const stream = await contract.subscribe(bus, durable, { onError: () => {} })
    await take(stream, 1)
    expect((await stored(bus, `${durable}.dlq`))[0]?.headers.dlq_attempts).toBe('3')
    await stream.close()
  })

  test('T3 who dies between the letter and the end of the message leaves one letter, and the message ends', async () => {
    const created = defineSubject(`${fresh()}.created`, order)
    const durable = fresh()
    await bus.pubsub.publish(created.subject, encode({}))
    await created.publish(bus, { order: 1 })
    const doomed = (await backend.connect()) as Bus<never>
    const letters: string[] = []
    const dying = publishing(doomed, async (subject, ...rest) => {
      const ack = await doomed.pubsub.publish(subject, ...rest)
      letters.push(subject)
      await doomed.close()
      return ack
    })
    const first = await created.subscribe(dying, durable, { onError: () => {} })
    for await (const _msg of first) throw new Error('its bus is closed')
    expect(letters).toEqual([`${durable}.dlq`])

    const { told, onError } = ear()
    const second = await created.subscribe(bus, durable, { onError })
    expect((await take(second, 1)).map(({ data }) => data)).toEqual([{ order: 1 }])
    expect(told).toHaveLength(1)
    expect(await stored(bus, `${durable}.dlq`)).toHaveLength(1)
    await second.close()
    const rest = await bus.pubsub.subscribe(created.subject, durable)
    await created.publish(bus, { order: 2 })
    expect((await take(rest, 1)).map((msg) => text(msg.payload))).toEqual(['{"order":2}'])
    await rest.close()
  })

  test('T4 while its letter cannot be published a message comes again, the others are yielded, and the stream says so', async () => {
    const created = defineSubject(`${fresh()}.created`, order)
    const durable = fresh()
    await bus.pubsub.publish(created.subject, encode({}))
    await created.publish(bus, { order: 1 })
    let down = true
    const flaky = publishing(bus, async (...args) => {
      if (down) throw new BusError('unavailable', 'no room')
      return await bus.pubsub.publish(...args)
    })
    const { told, onError } = ear()
    const stream = await created.subscribe(flaky, durable, { onError })
    expect((await take(stream, 1)).map(({ data }) => data)).toEqual([{ order: 1 }])
    expect(told).toHaveLength(1)
    expect(told[0]).toMatchObject({ code: 'unavailable', message: expect.stringContaining('it comes again: no room') })
    expect(await stored(bus, `${durable}.dlq`)).toEqual([])
    down = false
    const next = take(stream, 1)
    await eventually(() => told.length === 2)
    expect(told[1]?.code).toBe('invalid_argument')
    expect((await stored(bus, `${durable}.dlq`)).map(({ headers }) => headers.dlq_attempts)).toEqual(['2'])
    await created.publish(bus, { order: 2 })
    expect((await next).map(({ data }) => data)).toEqual([{ order: 2 }])
    await stream.close()
  })

  test('T4 a bus too small for any letter leaves the message for another', async () => {
    const created = defineSubject(`${fresh()}.created`, order)
    const durable = fresh()
    await bus.pubsub.publish(created.subject, encode({}))
    const small = (await backend.connect({ maxPayloadBytes: 20 })) as Bus<never>
    const { told, onError } = ear()
    const stream = await created.subscribe(small, durable, { onError })
    const waiting = take(stream, 1)
    await eventually(() => told.length > 0)
    expect(told[0]).toMatchObject({ code: 'payload_too_large' })
    await stream.close()
    expect(await waiting).toEqual([])
    expect(await stored(bus, `${durable}.dlq`)).toEqual([])
    const larger = await created.subscribe(bus, durable, { onError })
    const next = take(larger, 1)
    await eventually(async () => (await stored(bus, `${durable}.dlq`)).length === 1)
    await larger.close()
    await next
  })

  test('T4 a listener that throws does not end the stream, and without one there is a warning', async () => {
    const created = defineSubject(`${fresh()}.created`, order)
    const durable = fresh()
    await bus.pubsub.publish(created.subject, encode({ order: 'hunter2' }))
    await created.publish(bus, { order: 1 })
    const stream = await created.subscribe(bus, fresh(), {
      onError: () => {
        throw new Error('from the listener')
      },
    })
    expect(await take(stream, 1)).toHaveLength(1)
    await stream.close()
    const warned = deferred<Error>()
    const listen = (warning: Error) => {
      if (warning.message.includes(durable)) warned.resolve(warning)
    }
    process.on('warning', listen)
    const silent = await created.subscribe(bus, durable)
    expect(await take(silent, 1)).toHaveLength(1)
    const warning = await warned.promise
    process.off('warning', listen)
    expect(warning).toMatchObject({ name: 'KlieoBusWarning', message: expect.stringContaining('order: expected number') })
    expect(warning.message).not.toContain('hunter2')
    await silent.close()
  })

  test('T5 a dead letter gets no letter: a durable that gets its own, and two that get one another’s, come to an end', async () => {
    const root = fresh()
    const durables = [`${root}-a`, `${root}-b`]
    const own = defineSubject<unknown>('>').at(`${root}.created`)
    const everything = defineSubject('>', z.object({ [root]: z.number() }))
    const told: Msg[] = []
    const streams = await Promise.all(
      durables.map((durable) => everything.subscribe(bus, durable, { start: 'new', onError: (_error, msg) => told.push(msg) })),
    )
    // Joins at the present end of the log.
    const waiting = streams.map((stream) => take(stream, 1))
    await own.publish(bus, { [root]: 'x' })
    await eventually(async () => {
      // Each was told of the message, of its own letter and of the other's.
      expect(told.filter(({ subject }) => subject.startsWith(root))).toHaveLength(6)
    })
    await own.publish(bus, { [root]: 1 })
    for (const [msg] of await Promise.all(waiting)) expect(msg?.data).toEqual({ [root]: 1 })
    for (const durable of durables) expect(await stored(bus, `${durable}.dlq`)).toHaveLength(1)
    expect(told.filter(({ subject }) => subject.startsWith(root))).toHaveLength(6)
    await Promise.all(streams.map((stream) => stream.close()))
    for (const durable of durables) await bus.pubsub.deleteDurable(durable)
  })

  test('T5 only what is a letter counts as one', async () => {
    const subject = `${fresh()}.dlq`
    const durable = fresh()
    await bus.pubsub.publish(subject, 'no JSON')
    await bus.pubsub.publish(subject, 'no JSON', { headers: { dlq_reason: 'max_deliver_exceeded' } })
    await bus.pubsub.publish(`${subject}s`, 'no JSON', { headers: { dlq_reason: 'made up' } })
    for (const [n, filter] of [subject, `${subject}s`].entries()) {
      const stream = await defineSubject<number>(filter).subscribe(bus, `${durable}-${n}`, { onError: () => {} })
      await defineSubject<number>(filter).publish(bus, 7)
      await take(stream, 1)
      expect(await stored(bus, `${durable}-${n}.dlq`)).toHaveLength(1)
      await stream.close()
    }
  })

  test('T6 a letter too large with what is added to it loses the headers of the message, then the end of its payload', async () => {
    const limit = 2_000
    const subject = `${fresh()}.a`
    const durable = fresh()
    const tight = (await backend.connect({ maxPayloadBytes: limit })) as Bus<never>
    const contract = defineSubject<number>(subject)
    const header = 'h'.repeat(limit - 620)
    await tight.pubsub.publish(subject, 'x'.repeat(600), { headers: { header } })
    await tight.pubsub.publish(subject, 'y'.repeat(limit))
    await tight.pubsub.publish(subject, 'z'.repeat(limit - 500), { headers: { trace: 'z' } })
    await tight.pubsub.publish(subject, '7')
    const stream = await contract.subscribe(tight, durable, { onError: () => {} })
    expect((await take(stream, 1)).map(({ data }) => data)).toEqual([7])
    await stream.close()
    const [dropped, cut, whole] = await stored(bus, `${durable}.dlq`)
    expect(text(dropped!.payload)).toBe('x'.repeat(600))
    expect(dropped!.headers).toMatchObject({
      dlq_headers_dropped: '1',
      dlq_subject: subject,
      dlq_reason: 'invalid_payload: not JSON in UTF-8',
    })
    expect(dropped!.headers).not.toHaveProperty('header')
    expect(cut!.headers).toMatchObject({ dlq_headers_dropped: '0', dlq_payload_bytes: String(limit) })
    expect(text(cut!.payload)).toMatch(/^y{1700,}$/)
    expect(text(whole!.payload)).toBe('z'.repeat(limit - 500))
    expect(whole!.headers).toMatchObject({ trace: 'z' })
    expect(whole!.headers).not.toHaveProperty('dlq_payload_bytes')
  })

  test('T6 headers at their own limit are dropped, where the payload is empty too', async () => {
    const subject = `${fresh()}.a`
    const durable = fresh()
    const contract = defineSubject<number>(subject)
    await bus.pubsub.publish(subject, '', { headers: { h: 'h'.repeat(64 * 1024 - 1) } })
    await contract.publish(bus, 7)
    const stream = await contract.subscribe(bus, durable, { onError: () => {} })
    await take(stream, 1)
    await stream.close()
    expect((await stored(bus, `${durable}.dlq`)).map(({ headers }) => headers.dlq_headers_dropped)).toEqual(['1'])
  })

  test('T6 one that was larger than this bus allows is cut down to what it does', async () => {
    const subject = `${fresh()}.a`
    const durable = fresh()
    const contract = defineSubject<number>(subject)
    await bus.pubsub.publish(subject, 'x'.repeat(100_000))
    await contract.publish(bus, 7)
    const small = (await backend.connect({ maxPayloadBytes: 500 })) as Bus<never>
    const stream = await contract.subscribe(small, durable, { onError: () => {} })
    await take(stream, 1)
    await stream.close()
    const letters = await stored(bus, `${durable}.dlq`)
    expect(letters.map(({ payload, headers }) => [payload.byteLength, headers.dlq_payload_bytes])).toEqual([[0, '100000']])
  })

  test('T3 P10 closing hands back what is being validated, and yields nothing more', async () => {
    for (const how of ['close', 'abort'] as const) {
      const entered = deferred()
      const gate = deferred()
      const slow = z.number().refine(async () => {
        entered.resolve()
        await gate.promise
        return true
      })
      const subject = `${fresh()}.a`
      const durable = fresh()
      const controller = new AbortController()
      await bus.pubsub.publish(subject, '7')
      const stream = await defineSubject(subject, slow).subscribe(bus, durable, { signal: controller.signal })
      const waiting = take(stream, 1)
      await entered.promise
      if (how === 'abort') controller.abort()
      await stream.close()
      // Its ack wait is half a minute: it was handed back.
      const other = await bus.pubsub.subscribe(subject, durable)
      expect((await take(other, 1)).map((msg) => text(msg.payload))).toEqual(['7'])
      await other.close()
      gate.resolve()
      expect(await waiting).toEqual([])
    }
  })

  test('T3 P7 a message that somebody else has by now gets no letter', async () => {
    const entered = deferred()
    const gate = deferred()
    const older = z.number().refine(async () => {
      entered.resolve()
      await gate.promise
      return false
    })
    const subject = `${fresh()}.a`
    const durable = fresh()
    await bus.pubsub.publish(subject, '7')
    const { told, onError } = ear()
    const stream = await defineSubject(subject, older).subscribe(bus, durable, { ackWaitMs: 100, onError })
    const waiting = take(stream, 1)
    await entered.promise
    const other = await defineSubject<number>(subject).subscribe(bus, durable, { ackWaitMs: 30_000 })
    expect((await take(other, 1)).map(({ data, attempt }) => [data, attempt])).toEqual([[7, 2]])
    await other.close()
    gate.resolve()
    await bus.pubsub.publish(subject, '8')
    await eventually(async () => told.length > 0, { what: 'the refusal of 8' })
    await stream.close()
    expect(await waiting).toEqual([])
    expect(told.map(({ message }) => message)).toEqual([expect.stringContaining('does not match')])
    expect((await stored(bus, `${durable}.dlq`)).map(({ payload }) => text(payload))).toEqual(['8'])
  })

  test('T3 P10 closing ends an iteration whose schema does not answer', async () => {
    const entered = deferred()
    const silent = z.number().refine(() => {
      entered.resolve()
      return new Promise<boolean>(() => {})
    })
    const subject = `${fresh()}.a`
    await bus.pubsub.publish(subject, '7')
    const stream = await defineSubject(subject, silent).subscribe(bus, fresh())
    const waiting = take(stream, 1)
    await entered.promise
    await stream.close()
    expect(await waiting).toEqual([])
  })

  test('T3 P7 what was yielded is settled like any message', async () => {
    const created = defineSubject(`${fresh()}.created`, order)
    const durable = fresh()
    for (const n of [1, 2, 3]) await created.publish(bus, { order: n })
    const stream = await created.subscribe(bus, durable)
    const seen: string[] = []
    for await (const msg of stream) {
      seen.push(`${msg.data.order}/${msg.attempt}`)
      await msg.extend()
      if (msg.data.order === 1 && msg.attempt === 1) await msg.nak(0)
      else if (msg.data.order === 2) await msg.term('enough')
      else await msg.ack()
      await expect(msg.ack()).rejects.toMatchObject({ code: 'already_settled' })
      if (msg.data.order === 3) break
    }
    expect(seen).toEqual(['1/1', '1/2', '2/1', '3/1'])
    expect(await stored(bus, `${durable}.dlq`)).toEqual([])
    await stream.close()
  })
})
