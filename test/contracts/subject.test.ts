import { setTimeout as sleep } from 'node:timers/promises'
import { type } from 'arktype'
import pg from 'pg'
import * as v from 'valibot'
import { beforeAll, describe, expect, test } from 'vitest'
import { z } from 'zod'
import { type Bus, bytes, type Codec, decode, defineSubject, encode, json, PostgresBus, type SubjectContract } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { fresh, onEachBackend, stored, take } from './support/backends.ts'

const text = (payload: Uint8Array) => Buffer.from(payload).toString()

onEachBackend((backend) => {
  let bus: Bus<never>
  beforeAll(async () => {
    bus = (await backend.connect()) as Bus<never>
  })

  const validators: Readonly<Record<string, (subject: string) => SubjectContract<{ order: number }>>> = {
    zod: (subject) => defineSubject(subject, z.object({ order: z.number() })) as SubjectContract<{ order: number }>,
    valibot: (subject) => defineSubject(subject, v.object({ order: v.number() })) as SubjectContract<{ order: number }>,
    arktype: (subject) => defineSubject(subject, type({ order: 'number' })) as SubjectContract<{ order: number }>,
  }

  describe.each(Object.entries(validators))('a schema of %s', (_name, define) => {
    test('T1 T2 what matches arrives as data, beside all that a message is', async () => {
      const created = define(`${fresh()}.created`)
      const ack = await created.publish(bus, { order: 7 }, { headers: { trace: 'x' }, msgId: fresh() })
      const stream = await created.subscribe(bus, fresh())
      const [msg] = await take(stream, 1)
      expect(msg).toMatchObject({ subject: created.subject, data: { order: 7 }, headers: { trace: 'x' }, seq: ack.seq, attempt: 1 })
      expect(text(msg!.payload)).toBe('{"order":7}')
      expect(msg!.publishedAt).toBeInstanceOf(Date)
      await stream.close()
    })

    test('T1 what does not match is refused at the sender, who is told where, and nothing is sent', async () => {
      const created = define(`${fresh()}.created`)
      await expect(created.publish(bus, { order: 'seven' } as never)).rejects.toMatchObject({
        name: 'BusError',
        code: 'invalid_argument',
        message: expect.stringMatching(/^data does not match: order: expected (a )?number; nothing was sent$/),
      })
      await expect(created.publishMany(bus, [{ data: { order: 1 } }, { data: {} as never }])).rejects.toMatchObject({
        code: 'invalid_argument',
        message: expect.stringMatching(/^messages\[1\]: data does not match: /),
      })
      expect(await stored(bus, created.subject)).toEqual([])
    })
  })

  test('T1 without a schema nothing is validated, and what JSON cannot hold is refused all the same', async () => {
    const created = defineSubject<{ order: number }>(`${fresh()}.created`)
    await created.publish(bus, { order: 7 })
    await created.publish(bus, 'something else' as never)
    await expect(created.publish(bus, undefined as never)).rejects.toMatchObject({ code: 'invalid_argument' })
    await expect(created.publish(bus, { order: 7n } as never)).rejects.toMatchObject({ code: 'invalid_argument' })
    const stream = await created.subscribe(bus, fresh())
    expect((await take(stream, 2)).map(({ data }) => data)).toEqual([{ order: 7 }, 'something else'])
    await stream.close()
  })

  test('T1 publishMany sends all in order, with headers and msgId', async () => {
    const created = defineSubject(`${fresh()}.created`, z.object({ order: z.number() }))
    const msgId = fresh()
    const acks = await created.publishMany(bus, [
      { data: { order: 1 }, headers: { a: 'b' } },
      { data: { order: 2 }, msgId },
      { data: { order: 2 }, msgId },
    ])
    expect(acks.map(({ duplicate }) => duplicate)).toEqual([false, false, true])
    expect(await created.publishMany(bus, [])).toEqual([])
    const stream = await created.subscribe(bus, fresh())
    expect((await take(stream, 2)).map(({ data, headers }) => ({ data, headers }))).toEqual([
      { data: { order: 1 }, headers: { a: 'b' } },
      { data: { order: 2 }, headers: {} },
    ])
    await stream.close()
  })

  test('T2 the data is sent as it was given: defaults and transforms are applied once, at the receiver', async () => {
    const grown = z.object({ n: z.number().transform((n) => n + 1), currency: z.string().default('EUR') })
    const prices = defineSubject(`${fresh()}.prices`, grown)
    await prices.publish(bus, { n: 1 })
    const stream = await prices.subscribe(bus, fresh())
    const [msg] = await take(stream, 1)
    expect(decode(msg!.payload)).toEqual({ n: 1 })
    expect(msg!.data).toEqual({ n: 2, currency: 'EUR' })
    await stream.close()
  })

  test('T1 the sender validates what the bytes say: a Date is refused where the receiver would refuse it, and coerced where he would', async () => {
    const dates = defineSubject(`${fresh()}.dates`, z.object({ at: z.date() }))
    const at = new Date('2030-01-02T03:04:05Z')
    await expect(dates.publish(bus, { at })).rejects.toMatchObject({
      code: 'invalid_argument',
      message: 'data does not match: at: expected date; nothing was sent',
    })
    const coerced = defineSubject(`${fresh()}.dates`, z.object({ at: z.coerce.date<Date>() }))
    await coerced.publish(bus, { at })
    const stream = await coerced.subscribe(bus, fresh())
    expect((await take(stream, 1))[0]?.data).toEqual({ at })
    await stream.close()
    const numbers = defineSubject(`${fresh()}.numbers`, z.number().or(z.nan()))
    await expect(numbers.publish(bus, Number.NaN)).rejects.toMatchObject({ code: 'invalid_argument' })
  })

  test('T1 a schema may take its time, at both ends, and a slow refusal sends nothing either', async () => {
    const even = z.number().refine(async (n) => {
      await sleep(1)
      return n % 2 === 0
    })
    const evens = defineSubject(`${fresh()}.evens`, even)
    await evens.publish(bus, 2)
    await expect(evens.publish(bus, 3)).rejects.toMatchObject({ code: 'invalid_argument' })
    await expect(evens.publishMany(bus, [{ data: 5 }, { data: undefined as never }])).rejects.toMatchObject({
      message: expect.stringMatching(/^messages\[[01]\]: /),
    })
    const stream = await evens.subscribe(bus, fresh())
    await evens.publish(bus, 4)
    expect((await take(stream, 2)).map(({ data }) => data)).toEqual([2, 4])
    await stream.close()
  })

  test('T1 the data is read when the call is made', async () => {
    const slow = z.object({ order: z.number() }).refine(async () => true)
    const created = defineSubject(`${fresh()}.created`, slow)
    const data = { order: 1 }
    const published = created.publish(bus, data)
    data.order = 2
    await published
    const raw = new Uint8Array([1, 2, 3])
    const blobs = defineSubject(`${fresh()}.blobs`, bytes())
    const sent = blobs.publish(bus, raw)
    raw.fill(0)
    await sent
    expect(decode((await stored(bus, created.subject))[0]!.payload)).toEqual({ order: 1 })
    expect((await stored(bus, blobs.subject))[0]!.payload).toEqual(new Uint8Array([1, 2, 3]))
  })

  test('T2 bytes stay bytes', async () => {
    const blobs = defineSubject(`${fresh()}.blobs`, bytes())
    await blobs.publish(bus, new Uint8Array([0, 255, 128]))
    await blobs.publish(bus, 'text')
    await blobs.publish(bus, '')
    await expect(blobs.publish(bus, '\ud800')).rejects.toMatchObject({ code: 'invalid_argument' })
    const stream = await blobs.subscribe(bus, fresh())
    const received = (await take(stream, 3)).map(({ data }) => data)
    expect(received).toEqual([new Uint8Array([0, 255, 128]), new Uint8Array(Buffer.from('text')), new Uint8Array()])
    await stream.close()
  })

  test('T1 T2 a codec of the caller’s own, alone and beneath a schema', async () => {
    const rows: Codec<readonly string[]> = {
      encode: (row) => row.join(','),
      decode: (payload) => text(payload).split(','),
    }
    const lines = defineSubject(`${fresh()}.lines`, rows)
    await lines.publish(bus, ['a', 'b'])
    const pair = z.tuple([z.string(), z.coerce.number<string>()])
    const pairs = defineSubject(lines.subject, pair, { codec: rows as Codec })
    await pairs.publish(bus, ['c', '7'])
    await expect(pairs.publish(bus, ['c', 'seven'])).rejects.toMatchObject({ code: 'invalid_argument' })
    await expect(lines.publish(bus, 7 as never)).rejects.toMatchObject({
      code: 'invalid_argument',
      message: 'data cannot be encoded: the codec threw',
      cause: expect.any(TypeError),
    })
    await expect(defineSubject('a', { encode: () => 7 as never, decode: String }).publish(bus, 1 as never)).rejects.toMatchObject({
      code: 'invalid_argument',
    })
    const stream = await lines.subscribe(bus, fresh())
    expect((await take(stream, 2)).map(({ data }) => data)).toEqual([
      ['a', 'b'],
      ['c', '7'],
    ])
    await stream.close()
  })

  test('T1 what a codec encodes and does not decode is refused at the sender, and nothing is sent', async () => {
    const even: Codec<number> = {
      encode: String,
      decode: (payload) => {
        if (Number(text(payload)) % 2 !== 0) throw new RangeError(`${text(payload)} is secret`)
        return Number(text(payload))
      },
    }
    const counted = defineSubject(`${fresh()}.counted`, even)
    const refusal = { code: 'invalid_argument', message: 'data does not match: the codec refused it; nothing was sent' }
    await expect(counted.publish(bus, 7)).rejects.toMatchObject(refusal)
    await expect(counted.publishMany(bus, [{ data: 2 }, { data: 3 }])).rejects.toMatchObject({
      ...refusal,
      message: `messages[1]: ${refusal.message}`,
    })
    await counted.publish(bus, 4)
    expect((await stored(bus, counted.subject)).map(({ payload }) => text(payload))).toEqual(['4'])
  })

  test('T1 a filter is subscribed to, and a subject of it is published to', async () => {
    const root = fresh()
    const orders = defineSubject(`${root}.*`, json<number>()).at(`${root}.paid`)
    await orders.publish(bus, 1)
    const all = defineSubject<number>(`${root}.>`)
    await all.at(`${root}.made.again`).publish(bus, 2)
    const stream = await all.subscribe(bus, fresh())
    expect((await take(stream, 2)).map(({ subject, data }) => [subject, data])).toEqual([
      [`${root}.paid`, 1],
      [`${root}.made.again`, 2],
    ])
    await stream.close()
    expect(() => all.at('elsewhere')).toThrow(expect.objectContaining({ code: 'invalid_argument' }))
    expect(() => all.at(`${root}.*`)).toThrow(expect.objectContaining({ code: 'invalid_argument' }))
    const refusal = { code: 'invalid_argument', message: expect.stringContaining('at(subject)') }
    await expect(all.publish(bus, 1)).rejects.toMatchObject(refusal)
    await expect(all.publishMany(bus, [{ data: 1 }])).rejects.toMatchObject(refusal)
  })

  test('T1 what the bus refuses it still refuses', async () => {
    const created = defineSubject(`${fresh()}.created`, z.object({ order: z.number() }))
    await expect(created.publish(bus, { order: 1 }, { msgId: '' })).rejects.toMatchObject({ code: 'invalid_argument' })
    await expect(created.subscribe(bus, 'no durable')).rejects.toMatchObject({ code: 'invalid_argument' })
    await expect(created.subscribe(bus, fresh(), { onError: 7 as never })).rejects.toMatchObject({ code: 'invalid_argument' })
    await expect(defineSubject<string>('a').publish(bus, 'x'.repeat(1024 * 1024))).rejects.toMatchObject({ code: 'payload_too_large' })
    const closed = await backend.connect()
    await closed.close()
    await expect(created.publish(closed as Bus<never>, { order: 1 })).rejects.toMatchObject({ code: 'closed' })
    await expect(created.subscribe(closed as Bus<never>, fresh())).rejects.toMatchObject({ code: 'closed' })
  })
})

test('T1 what is no subject, schema, codec or bus is refused by name', async () => {
  const refuses = (define: () => unknown, message: RegExp) =>
    expect(define).toThrow(expect.objectContaining({ code: 'invalid_argument', message: expect.stringMatching(message) }))
  refuses(() => defineSubject('a b'), /^subject /)
  for (const wrong of [7, null, {}, 'zod', { encode: () => '' }, { '~standard': 7 }, { '~standard': { validate: 7 } }]) {
    refuses(() => defineSubject('a', wrong as never), /^format .*Standard Schema/)
  }
  refuses(() => defineSubject('a', bytes(), { codec: json() }), /^codec /)
  refuses(() => defineSubject('a', z.number(), { codec: {} as never }), /^codec /)
  refuses(() => defineSubject('a', z.number(), { explain: 7 as never }), /^explain /)
  for (const wrong of [undefined, null, 7, {}, { pubsub: 7 }]) {
    await expect(defineSubject<number>('a').publish(wrong as never, 1)).rejects.toMatchObject({
      code: 'invalid_argument',
      message: expect.stringMatching(/^bus /),
    })
  }
})

test('T1 in the caller’s transaction a typed publish is there if that commits', async () => {
  const bus = await PostgresBus.connect({ connectionString: databaseUrl(), schema: freshSchema() })
  const created = defineSubject('orders.created', z.object({ order: z.number() }))
  const client = new pg.Client({ connectionString: databaseUrl() })
  await client.connect()
  for (const [order, how] of [
    [1, 'rollback'],
    [2, 'commit'],
  ] as const) {
    await client.query('begin')
    await created.publish(bus, { order }, { tx: client })
    await created.publishMany(bus, [{ data: { order: order * 10 } }], { tx: client })
    await expect(created.publish(bus, {} as never, { tx: client })).rejects.toMatchObject({ code: 'invalid_argument' })
    await client.query(how)
  }
  const stream = await created.subscribe(bus, 'billing')
  const [first, second] = await take(stream, 2)
  expect([first?.data, second?.data]).toEqual([{ order: 2 }, { order: 20 }])
  await created.publish(bus, { order: 3 })
  const { value: third } = await stream[Symbol.asyncIterator]().next()
  await client.query('begin')
  await third.ack({ tx: client })
  await client.query('commit')
  await expect(third.ack()).rejects.toMatchObject({ code: 'already_settled' })
  await client.end()
  await bus.close()
})

test('T2 an encoded value is what encode makes of it, so that both kinds of callers understand one another', async () => {
  const bus = await PostgresBus.connect({ connectionString: databaseUrl(), schema: freshSchema() })
  const created = defineSubject('orders.created', z.object({ order: z.number() }))
  await bus.pubsub.publish('orders.created', encode({ order: 1 }))
  await created.publish(bus, { order: 2 })
  const typed = await created.subscribe(bus, 'typed')
  const plain = await bus.pubsub.subscribe('orders.created', 'plain')
  expect((await take(typed, 2)).map(({ data }) => data)).toEqual([{ order: 1 }, { order: 2 }])
  expect((await take(plain, 2)).map(({ payload }) => decode(payload))).toEqual([{ order: 1 }, { order: 2 }])
  await bus.close()
})
