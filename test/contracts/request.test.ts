import { type } from 'arktype'
import * as v from 'valibot'
import { beforeAll, describe, expect, test } from 'vitest'
import { z } from 'zod'
import { type Bus, bytes, decode, defineRequest, encode, json, type RequestContract } from '../../src/index.ts'
import { fresh, onEachBackend } from './support/backends.ts'

type Price = RequestContract<{
  readonly ask: { item: string }
  readonly asked: { item: string }
  readonly answer: { cents: number }
  readonly answered: { cents: number }
}>

const ask = { timeoutMs: 5_000 }

onEachBackend((backend) => {
  let bus: Bus<never>
  beforeAll(async () => {
    bus = (await backend.connect()) as Bus<never>
  })

  const contracts: Readonly<Record<string, (subject: string) => Price>> = {
    zod: (subject) => defineRequest(subject, { request: z.object({ item: z.string() }), reply: z.object({ cents: z.number() }) }) as Price,
    valibot: (subject) =>
      defineRequest(subject, { request: v.object({ item: v.string() }), reply: v.object({ cents: v.number() }) }) as Price,
    arktype: (subject) => defineRequest(subject, { request: type({ item: 'string' }), reply: type({ cents: 'number' }) }) as Price,
  }

  describe.each(Object.entries(contracts))('schemas of %s', (_name, define) => {
    test('T1 T8 what is asked and answered arrives as data', async () => {
      const price = define(`${fresh()}.tea`)
      await using _responder = await price.respond(bus, ({ item }, request) => {
        expect(request).toMatchObject({ subject: price.subject, headers: { trace: 'x' } })
        expect(request.signal).toBeInstanceOf(AbortSignal)
        return { cents: item.length }
      })
      expect(await price.request(bus, { item: 'tea' }, { ...ask, headers: { trace: 'x' } })).toEqual({ cents: 3 })
    })

    test('T1 T8 a request that does not match is refused at the requester, and where it was sent all the same, by the responder', async () => {
      const price = define(`${fresh()}.tea`)
      const ran: unknown[] = []
      await using _responder = await price.respond(bus, (data) => {
        ran.push(data)
        return { cents: 1 }
      })
      await expect(price.request(bus, { item: 7 } as never, ask)).rejects.toMatchObject({
        code: 'invalid_argument',
        message: expect.stringMatching(/^data does not match: item: expected (a )?string; nothing was sent$/),
      })
      await expect(bus.requestReply.request(price.subject, encode({ item: 7 }), ask)).rejects.toMatchObject({
        code: 'handler_failed',
        message: expect.stringMatching(/the request does not match: item: expected (a )?string$/),
      })
      await expect(bus.requestReply.request(price.subject, 'no JSON', ask)).rejects.toMatchObject({
        code: 'handler_failed',
        message: expect.stringContaining('not JSON in UTF-8'),
      })
      expect(ran).toEqual([])
    })

    test('T8 a reply that does not match is refused at the responder, and where it was sent all the same, by the requester', async () => {
      const price = define(`${fresh()}.tea`)
      const wrong = await price.respond(bus, async () => ({ cents: 'hunter2' }) as never)
      const refused = await price.request(bus, { item: 'tea' }, ask).catch((error: Error) => error)
      expect(refused).toMatchObject({
        code: 'handler_failed',
        message: expect.stringMatching(/reply does not match: cents: expected (a )?number/),
      })
      expect((refused as Error).message).not.toContain('hunter2')
      await wrong.close()
      await using _foreign = await bus.requestReply.respond(price.subject, () => encode({ cents: 'hunter2' }))
      const refusedHere = await price.request(bus, { item: 'tea' }, ask).catch((error: Error) => error)
      expect(refusedHere).toMatchObject({
        code: 'handler_failed',
        message: expect.stringMatching(/^the reply on ".*" does not match: cents: expected (a )?number$/),
      })
      expect((refusedHere as Error).message).not.toContain('hunter2')
    })
  })

  test('T2 T8 transforms and defaults count at the receiving end, in both directions', async () => {
    const days = defineRequest(`${fresh()}.days`, {
      request: z.object({ from: z.coerce.date<Date>(), count: z.number().default(2) }),
      reply: z.array(z.string().transform((day) => new Date(day))).refine(async () => true),
    })
    await using _responder = await days.respond(bus, ({ from, count }) =>
      Array.from({ length: count }, (_, n) => new Date(from.getTime() + n * 86_400_000).toISOString()),
    )
    const from = new Date('2030-01-01T00:00:00Z')
    expect(await days.request(bus, { from }, ask)).toEqual([from, new Date('2030-01-02T00:00:00Z')])
  })

  test('T8 a filter is responded on and a subject of it is asked; types alone and bytes work, too', async () => {
    const root = fresh()
    const prices = defineRequest(`${root}.*`, { request: json<string>(), reply: bytes() })
    await using _responder = await prices.respond(bus, (data, { subject }) => `${subject} ${data}`)
    const reply = await prices.at(`${root}.tea`).request(bus, 'green', ask)
    expect(Buffer.from(reply).toString()).toBe(`${root}.tea green`)
    const all = defineRequest<string, string>(`${root}.>`)
    await expect(all.request(bus, 'x', ask)).rejects.toMatchObject({
      code: 'invalid_argument',
      message: expect.stringContaining('at(subject)'),
    })
    expect(() => all.at('elsewhere')).toThrow(expect.objectContaining({ code: 'invalid_argument' }))
    await using _echo = await all.respond(bus, (data) => data)
    expect(await all.at(`${root}.a.b`).request(bus, 'x', ask)).toBe('x')
  })

  test('T8 what the handler throws is told as it is, and no responder is no responder', async () => {
    const price = defineRequest<string, unknown>(`${fresh()}.tea`)
    await expect(price.request(bus, 'x', ask)).rejects.toMatchObject({ code: 'not_found' })
    await using _responder = await price.respond(bus, (data) => {
      if (data === 'nothing') return undefined
      throw new Error('sold out')
    })
    await expect(price.request(bus, 'x', ask)).rejects.toMatchObject({ code: 'handler_failed', message: 'sold out' })
    await expect(price.request(bus, 'nothing', ask)).rejects.toMatchObject({
      code: 'handler_failed',
      message: expect.stringContaining('JSON'),
    })
    await expect(price.request(bus, 'x', {} as never)).rejects.toMatchObject({ code: 'invalid_argument' })
    await expect(price.respond(bus, 7 as never)).rejects.toMatchObject({ code: 'invalid_argument' })
    await expect(price.respond({} as never, () => 1)).rejects.toMatchObject({ code: 'invalid_argument' })
  })

  test('T2 the bytes of both are JSON, so that a plain caller and a typed one understand one another', async () => {
    const price = defineRequest(`${fresh()}.tea`, { request: z.object({ item: z.string() }), reply: z.number() })
    await using _responder = await price.respond(bus, ({ item }) => item.length)
    expect(decode(await bus.requestReply.request(price.subject, encode({ item: 'tea' }), ask))).toBe(3)
  })
})

test('T1 what is no subject, and what is no schema of the request or the reply, is refused by name', () => {
  const refuses = (define: () => unknown, message: RegExp) =>
    expect(define).toThrow(expect.objectContaining({ code: 'invalid_argument', message: expect.stringMatching(message) }))
  refuses(() => defineRequest('a b'), /^subject /)
  refuses(() => defineRequest('a', 7 as never), /^formats /)
  refuses(() => defineRequest('a', { request: 7, reply: json() } as never), /^request /)
  refuses(() => defineRequest('a', { request: json(), reply: {} } as never), /^reply /)
})
