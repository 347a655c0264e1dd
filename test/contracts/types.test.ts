/** What compiles, and what must not: `npm run typecheck` reads this file, and a directive that nothing needs is an error. */

import { type } from 'arktype'
import * as v from 'valibot'
import { describe, expect, expectTypeOf, test } from 'vitest'
import { z } from 'zod'
import {
  type BucketContract,
  type Bus,
  bytes,
  defineBucket,
  defineQueue,
  defineRequest,
  defineSubject,
  type FilterContract,
  json,
  type PostgresTx,
  type QueueContract,
  type RequestContract,
  type SubjectContract,
  type TypedChange,
  type TypedEntry,
  type TypedJob,
  type TypedMsg,
} from '../../src/index.ts'
import type { MemoryBus } from '../../src/memory/index.ts'

interface Order {
  readonly order: number
}

const order = z.object({ order: z.number(), note: z.string().default('none') })
type OrderGiven = { order: number; note?: string | undefined }
type OrderGot = { order: number; note: string }

/** Compiled, never run. */
function compiled(_code: () => unknown): void {}

declare const postgres: Bus<PostgresTx>
declare const memory: MemoryBus
declare const tx: PostgresTx

describe('T1 T2 what the sender gives and the receiver gets', () => {
  test('is what zod, valibot and arktype say of it', () => {
    expectTypeOf(defineSubject('a.b', order)).toEqualTypeOf<SubjectContract<OrderGiven, OrderGot>>()
    const valibot = v.object({ order: v.number(), note: v.optional(v.string(), 'none') })
    expectTypeOf(defineSubject('a.b', valibot)).toEqualTypeOf<SubjectContract<OrderGiven, OrderGot>>()
    const arktype = type({ order: 'number', when: type('string.date.iso.parse') })
    expectTypeOf(defineQueue('q', arktype)).toEqualTypeOf<QueueContract<{ order: number; when: string }, { order: number; when: Date }>>()
    expectTypeOf(defineBucket('b', z.string().transform(Number))).toEqualTypeOf<BucketContract<string, number>>()
  })

  test('is the type alone where there is no schema, and bytes or what a codec says where there is one', () => {
    expectTypeOf(defineSubject<Order>('a.b')).toEqualTypeOf<SubjectContract<Order>>()
    expectTypeOf(defineSubject('a.b')).toEqualTypeOf<SubjectContract<unknown>>()
    expectTypeOf(defineQueue<Order>('q')).toEqualTypeOf<QueueContract<Order>>()
    expectTypeOf(defineQueue('q', bytes())).toEqualTypeOf<QueueContract<Uint8Array | string, Uint8Array>>()
    const dates = { encode: (date: Date) => date.toISOString(), decode: (payload: Uint8Array) => String(payload).length }
    expectTypeOf(defineBucket('b', dates)).toEqualTypeOf<BucketContract<Date, number>>()
    expectTypeOf(defineSubject('a.*', json<Order>())).toEqualTypeOf<FilterContract<'a.*', Order, Order>>()
  })

  test('flows to messages, jobs, entries, changes and replies', () => {
    compiled(async () => {
      for await (const msg of await defineSubject('a.b', order).subscribe(postgres, 'd')) {
        expectTypeOf(msg).toEqualTypeOf<TypedMsg<OrderGot, PostgresTx>>()
        await msg.ack({ tx })
      }
      for await (const msg of await defineSubject('a.>', order).subscribe(memory, 'd')) expectTypeOf(msg.data).toEqualTypeOf<OrderGot>()
      defineQueue('q', order).worker(postgres, async (job, signal) => {
        expectTypeOf(job).toEqualTypeOf<TypedJob<OrderGot, PostgresTx>>()
        expectTypeOf(signal).toEqualTypeOf<AbortSignal>()
        await job.ack({ tx })
      })
      expectTypeOf(await defineQueue('q', order).claim(memory, 'w', 1_000)).toEqualTypeOf<TypedJob<OrderGot> | null>()
      expectTypeOf(await defineBucket('b', order).get(postgres, 'k')).toEqualTypeOf<TypedEntry<OrderGot> | null>()
      for await (const change of await defineBucket('b', order).watch(memory)) expectTypeOf(change).toEqualTypeOf<TypedChange<OrderGot>>()
      const price = defineRequest('price.tea', { request: z.string().transform(Number), reply: order })
      expectTypeOf(await price.request(postgres, '7', { timeoutMs: 1 })).toEqualTypeOf<OrderGot>()
      await price.respond(memory, (data) => {
        expectTypeOf(data).toEqualTypeOf<number>()
        return { order: data }
      })
      const plain = defineRequest<Order, string>('price.tea')
      expectTypeOf(plain).toEqualTypeOf<
        RequestContract<{ readonly ask: Order; readonly asked: Order; readonly answer: string; readonly answered: string }>
      >()
    })
  })
})

describe('T1 wrong code does not compile', () => {
  test('data that the schema does not take', () => {
    compiled(() => {
      // @ts-expect-error a string is no number
      defineSubject('a.b', order).publish(memory, { order: '7' })
      // @ts-expect-error it is missing
      defineSubject<Order>('a.b').publish(memory, {})
      // @ts-expect-error a string is no number
      defineQueue('q', order).enqueueMany(memory, [{ data: { order: 1 } }, { data: { order: '2' } }])
      // @ts-expect-error the input is a string, the number comes of it
      defineBucket('b', z.string().transform(Number)).put(memory, 'k', 7)
      // @ts-expect-error not JSON: bytes
      defineQueue('q', bytes()).enqueue(memory, { order: 7 })
      // @ts-expect-error the payload is the data
      defineQueue('q', order).enqueue(memory, { order: 7 }, { payload: 'x' })
      // @ts-expect-error the answer lacks its order
      defineRequest('price.tea', { request: order, reply: order }).respond(memory, () => ({ note: '' }))
      // @ts-expect-error neither a schema nor a codec
      defineSubject('a.b', { order: 'number' })
    })
  })

  test('a transaction on a bus that has none, or of another kind', () => {
    compiled(async () => {
      const created = defineSubject('a.b', order)
      await created.publish(postgres, { order: 7 }, { tx })
      await created.publishMany(postgres, [{ data: { order: 7 } }], { tx })
      await defineQueue('q', order).enqueue(postgres, { order: 7 }, { tx, dedupKey: 'k' })
      await defineBucket('b', order).cas(postgres, 'k', { order: 7 }, null, { tx })
      // @ts-expect-error the memory bus has no transactions
      await created.publish(memory, { order: 7 }, { tx })
      // @ts-expect-error the memory bus has no transactions
      await created.publishMany(memory, [{ data: { order: 7 } }], { tx })
      // @ts-expect-error the memory bus has no transactions
      await defineQueue('q', order).enqueue(memory, { order: 7 }, { tx })
      // @ts-expect-error the memory bus has no transactions
      await defineBucket('b', order).put(memory, 'k', { order: 7 }, { tx })
      // @ts-expect-error the memory bus has no transactions
      await defineBucket('b', order).delete(memory, 'k', { tx })
      // @ts-expect-error no transaction
      await created.publish(postgres, { order: 7 }, { tx: 7 })
      // @ts-expect-error no bus
      await created.publish({}, { order: 7 })
    })
  })

  test('publishing to a filter, or to a subject that it does not take', () => {
    compiled(async () => {
      const orders = defineSubject('orders.*', order)
      await orders.at('orders.created').publish(memory, { order: 7 })
      const id = String(7)
      await orders.at(`orders.${id}`).publish(memory, { order: 7 })
      // @ts-expect-error name one of its subjects
      await orders.publish(memory, { order: 7 })
      // @ts-expect-error not one of them
      orders.at('invoices.created')
      // @ts-expect-error not one of them
      defineSubject('a.*.c', order).at('a.b.d')
      defineSubject('a.>', order).at('a.b.c.d')
      // A name that is not known when compiled is any.
      defineSubject<Order>('orders.*').at(id)
      // @ts-expect-error name one of its subjects
      await defineRequest('price.*', { request: order, reply: order }).request(memory, { order: 7 }, { timeoutMs: 1 })
      await defineRequest('price.*', { request: order, reply: order }).at('price.tea').request(memory, { order: 7 }, { timeoutMs: 1 })
    })
  })

  test('a change that may be invalid, taken for a put', () => {
    compiled(async () => {
      for await (const change of await defineBucket('b', order).watch(memory)) {
        // @ts-expect-error a deletion has no entry
        change.entry
        // @ts-expect-error what does not match has no data
        if (change.operation !== 'delete') change.entry.data
      }
    })
  })

  test('and what compiles is what is exported', () => expect(typeof defineSubject).toBe('function'))
})
