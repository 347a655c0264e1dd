import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { next, take, text } from './support/reading.ts'

const schema = freshSchema()
/** A poll interval far above what the tests allow: only a wake-up or an answer of the fetch itself is in time. */
const POLL_MS = 10_000
const IN_TIME_MS = 5_000
let bus: PostgresBus
let other: PostgresBus

beforeAll(async () => {
  const options = { connectionString: databaseUrl(), schema, pollIntervalMs: POLL_MS }
  bus = await PostgresBus.connect(options)
  other = await PostgresBus.connect(options)
})

afterAll(async () => {
  await Promise.all([bus?.close(), other?.close()])
})

describe('a stream that is a little behind', () => {
  for (const maxInFlight of [1, 2, 3, 16]) {
    test(`P14 with room for ${maxInFlight}: what was published while its messages were handled comes at once`, async () => {
      const subject = `flow.${maxInFlight}`
      const stream = await bus.pubsub.subscribe(subject, `flow-${maxInFlight}`, { maxInFlight })
      await other.pubsub.publishMany(Array.from({ length: maxInFlight }, (_, n) => ({ subject, payload: `0.${n}` })))
      for (let round = 1; round <= 6; round++) {
        const held = []
        for (let n = 0; n < maxInFlight; n++) held.push(await next(stream, IN_TIME_MS, `message ${n} of round ${round - 1}`))
        expect(held.map(text)).toEqual(held.map((_, n) => `${round - 1}.${n}`))
        // The bell for these rings while there is no room.
        await other.pubsub.publishMany(Array.from({ length: maxInFlight }, (_, n) => ({ subject, payload: `${round}.${n}` })))
        await Promise.all(held.map((message) => message.ack()))
      }
    })
  }

  test('P14 with a page that fills exactly, again and again, the rest comes at once', async () => {
    const subject = 'flow.pages'
    const stream = await bus.pubsub.subscribe(subject, 'flow-pages', { maxInFlight: 4 })
    for (let round = 0; round < 10; round++) {
      await other.pubsub.publishMany(Array.from({ length: 1 + (round % 5) }, (_, n) => ({ subject, payload: `${round}.${n}` })))
      const got = await take(stream, 1 + (round % 5), IN_TIME_MS)
      expect(got).toEqual(Array.from({ length: 1 + (round % 5) }, (_, n) => `${round}.${n}`))
    }
  })

  for (const settle of ['ack', 'term'] as const) {
    test(`P14 a message whose bell rang while there was no room comes at once when ${settle} makes some`, async () => {
      const subject = `flow.rung.${settle}`
      const stream = await bus.pubsub.subscribe(subject, `flow-rung-${settle}`, { maxInFlight: 1 })
      // Another durable of the same process: what it gets, the bell has rung for.
      const witness = await bus.pubsub.subscribe(subject, `flow-witness-${settle}`)
      await other.pubsub.publish(subject, '0')
      let held = await next(stream, IN_TIME_MS)
      expect(await take(witness, 1)).toEqual(['0'])
      for (let round = 0; round < 5; round++) {
        const following = next(stream, IN_TIME_MS, `message ${round + 1}`)
        await other.pubsub.publish(subject, `${round + 1}`)
        expect(await take(witness, 1)).toEqual([`${round + 1}`])
        await held[settle]()
        held = await following
      }
      expect(text(held)).toBe('5')
    })
  }
})
