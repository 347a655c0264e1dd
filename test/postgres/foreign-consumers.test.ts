/** Consumers that have nothing but SQL: subscribe, fetch and the settlements of messages, beside one another and beside the package's. */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { BusError, PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'

const schema = freshSchema()
const LONG_MS = 60_000

interface Delivery {
  readonly seq: string
  readonly subject: string
  readonly headers: Readonly<Record<string, string>>
  readonly payload: Buffer
  readonly published_at: Date
  readonly attempt: number
  readonly token: string
}

let bus: PostgresBus
/** Two foreign consumers, and one who publishes. */
let one: Session
let two: Session
let publisher: Session

beforeAll(async () => {
  bus = await PostgresBus.connect({ connectionString: databaseUrl(), schema, maintenance: false, pollIntervalMs: 100 })
  ;[one, two, publisher] = [await session(databaseUrl()), await session(databaseUrl()), await session(databaseUrl())]
  await one.query(`create table ${schema}.results (seq bigint not null)`)
})

afterAll(async () => {
  await bus.close()
  await Promise.all([one, two, publisher].map((client) => client[Symbol.asyncDispose]()))
})

let durables = 0
/** A durable that nobody has used; its subjects begin with its name. */
async function durable(start = ''): Promise<string> {
  const name = `d${++durables}`
  expect(await value(one, `select klieo.subscribe($1, $1 || '.>'${start})`, [name])).toBe(true)
  return name
}

async function rows<R>(client: Session, text: string, values: readonly unknown[] = []): Promise<R[]> {
  return (await client.query(text.replaceAll('klieo.', `${schema}.`), [...values])).rows as R[]
}

/** The only value of the only row. */
async function value<T>(client: Session, text: string, values: readonly unknown[] = []): Promise<T> {
  return Object.values((await rows<Record<string, T>>(client, text, values))[0] as Record<string, T>)[0] as T
}

const publish = (name: string, token = 'a') =>
  value<string>(publisher, `select klieo.publish($1 || '.' || $2, 'p', '{"h": "v"}')`, [name, token])
const fetch = (client: Session, name: string, more = '') => rows<Delivery>(client, `select * from klieo.fetch($1${more})`, [name])
const settle = (client: Session, how: string, name: string, { seq, token }: Delivery, more = '') =>
  value<boolean>(client, `select klieo.${how}_message($1, $2, $3${more})`, [name, seq, token])
const unsettled = (name: string) =>
  rows(one, 'select d.* from klieo.deliveries d join klieo.consumer_offsets o on o.id = d.consumer_id where o.durable = $1', [name])
const letters = (name: string) =>
  rows<{ headers: Record<string, string>; payload_text: string }>(
    one,
    'select headers, payload_text from klieo.message_details where subject = $1 order by seq',
    [`${name}.dlq`],
  )
/** One delivery, whose time is over. */
async function expired(client: Session, name: string, more = ''): Promise<Delivery> {
  const [delivery] = await fetch(client, name, `, ack_wait_ms => 1${more}`)
  await eventually(
    () => value(one, `select klieo.deliveries.visible_at < clock_timestamp() from klieo.deliveries where seq = $1`, [delivery!.seq]),
    { what: 'the end of the ack wait' },
  )
  return delivery!
}

async function stateOf(client: Session, text: string): Promise<string | undefined> {
  try {
    await rows(client, text)
    return undefined
  } catch (error) {
    return (error as { code?: string }).code
  }
}

describe('subscribing', () => {
  test('P11 the same filter joins and keeps the position; another one is KB005 and changes nothing', async () => {
    const name = await durable()
    const seq = await publish(name)
    const [delivery] = await fetch(one, name)
    expect(await settle(one, 'ack', name, delivery!)).toBe(true)
    const before = await rows(one, 'select * from klieo.consumer_offsets where durable = $1', [name])
    expect(await value(two, `select klieo.subscribe($1, $1 || '.>', start_seq => $2)`, [name, seq])).toBe(false)
    expect(await stateOf(two, `select klieo.subscribe('${name}', 'other.>')`)).toBe('KB005')
    expect(await rows(one, 'select * from klieo.consumer_offsets where durable = $1', [name])).toEqual(before)
    expect(await fetch(two, name)).toEqual([])
  })

  test('a durable begins with everything, with what is new, at a seq or at a time', async () => {
    const name = await durable()
    const [, second] = [await publish(name, 'first'), await publish(name, 'second')]
    // As text: a Date has no microseconds.
    const time = await value<string>(one, 'select clock_timestamp()::text')
    await publish(name, 'third')
    const subjects = async (start: string, values: readonly unknown[] = []) => {
      const other = `${name}-${Math.random().toString(36).slice(2)}`
      await rows(one, `select klieo.subscribe($1, $2${start})`, [other, `${name}.>`, ...values])
      await publish(name, 'last')
      return (await fetch(one, other, ', 100')).map(({ subject }) => subject.slice(name.length + 1))
    }
    expect(await subjects('')).toEqual(['first', 'second', 'third', 'last'])
    expect(await subjects(`, 'new'`)).toEqual(['last'])
    expect((await subjects(', start_seq => $3', [second]))[0]).toBe('second')
    expect((await subjects(', start_time => $3', [time]))[0]).toBe('third')
  })
})

describe('fetching', () => {
  test('P3 a fetch that comes back empty says that nothing is there, also to a durable that takes little of what is published', async () => {
    const name = await durable()
    await publisher.query(
      `select count(*) from ${schema}.publish_many(array_fill('other'::text, array[9000]), ''::bytea, array_fill(1, array[9000]), array_fill(0, array[9000]), null, null)`,
    )
    const seq = await publish(name)
    expect((await fetch(one, name)).map((message) => message.seq)).toEqual([seq])
  })

  test('P3 two members share a durable, each message going to one; P8 in the order of publishing', async () => {
    const name = await durable()
    const seqs: string[] = []
    for (let n = 0; n < 40; n++) seqs.push(await publish(name))
    const fetched: Delivery[][] = [[], []]
    await Promise.all(
      [one, two].map(async (client, at) => {
        for (let batch = await fetch(client, name, ', 3'); batch.length > 0; batch = await fetch(client, name, ', 3'))
          fetched[at]!.push(...batch)
      }),
    )
    const all = fetched.flat().map(({ seq }) => Number(seq))
    expect(all.toSorted((a, b) => a - b)).toEqual(seqs.map(Number))
    for (const part of fetched) {
      const own = part.map(({ seq }) => Number(seq))
      expect(own).toEqual(own.toSorted((a, b) => a - b))
    }
    expect(fetched.flat()[0]).toMatchObject({ headers: { h: 'v' }, attempt: 1 })
    expect(fetched.flat()[0]!.payload.toString()).toBe('p')
  })

  test('P9 what commits late is not skipped', async () => {
    const name = await durable()
    await two.query('begin')
    const late = await value<string>(two, `select klieo.publish($1 || '.late', 'p')`, [name])
    const early = await publish(name, 'early')
    expect((await fetch(one, name, ', 10')).map(({ seq }) => seq)).toEqual([early])
    await two.query('commit')
    expect(Number(late)).toBeLessThan(Number(early))
    expect((await fetch(one, name, ', 10')).map(({ seq }) => seq)).toEqual([late])
  })

  test('P5 what is not settled in time comes again, before what is new, with its attempt counted; maxAckPending holds new ones back', async () => {
    const name = await durable()
    const [first, second] = [await publish(name), await publish(name)]
    expect((await expired(one, name)).seq).toBe(first)
    expect(await fetch(two, name)).toMatchObject([{ seq: first, attempt: 2 }])
    expect(await fetch(two, name, ', 10, max_ack_pending => 1')).toEqual([])
    expect(await fetch(two, name, ', 10')).toMatchObject([{ seq: second, attempt: 1 }])
  })

  test('it is refused with KB002 after a write, KB003 beyond READ COMMITTED and KB001 without a durable', async () => {
    const name = await durable()
    await one.query('begin')
    await rows(one, `select klieo.publish($1 || '.x', 'p')`, [name])
    expect(await stateOf(one, `select * from klieo.fetch('${name}')`)).toBe('KB002')
    await one.query('rollback')
    await one.query('begin isolation level serializable')
    expect(await stateOf(one, `select * from klieo.fetch('${name}')`)).toBe('KB003')
    await one.query('rollback')
    expect(await stateOf(one, `select * from klieo.fetch('nobody')`)).toBe('KB001')
    expect(await stateOf(one, `select klieo.bury('nobody')`)).toBe('KB001')
  })
})

describe('settling', () => {
  test('P7 once the message was handed out again, every settlement of the older delivery answers false and changes nothing', async () => {
    const name = await durable()
    await publish(name)
    const first = await expired(one, name)
    const [second] = await fetch(two, name)
    const before = await unsettled(name)
    for (const how of ['ack', 'nak', 'term', 'extend', 'release']) expect(await settle(one, how, name, first), how).toBe(false)
    expect(await unsettled(name)).toEqual(before)
    expect(await settle(two, 'ack', name, second!)).toBe(true)
    expect(await settle(two, 'ack', name, second!)).toBe(false)
    expect(await unsettled(name)).toEqual([])
  })

  test('P7 what ran out and was not handed out again can still be acknowledged, and never comes back', async () => {
    const name = await durable()
    await publish(name)
    expect(await settle(one, 'ack', name, await expired(one, name))).toBe(true)
    expect(await fetch(two, name)).toEqual([])
  })

  test('P7 an ack goes with the transaction, and until it ends the message is not handed out again', async () => {
    const name = await durable()
    await publish(name)
    const delivery = await expired(one, name)
    await one.query('begin')
    await rows(one, 'insert into klieo.results values ($1)', [delivery.seq])
    expect(await settle(one, 'ack', name, delivery)).toBe(true)
    expect(await fetch(two, name)).toEqual([])
    await one.query('rollback')
    expect(await fetch(two, name)).toMatchObject([{ seq: delivery.seq, attempt: 2 }])
    expect(await rows(one, 'select * from klieo.results where seq = $1', [delivery.seq])).toEqual([])
  })

  test('P5 a nak comes back at once, or not before its delay is over; P6 a term never', async () => {
    const name = await durable()
    const seq = await publish(name)
    expect(await settle(one, 'nak', name, (await fetch(one, name))[0]!)).toBe(true)
    const [again] = await fetch(two, name)
    expect(again).toMatchObject({ seq, attempt: 2 })
    expect(await settle(two, 'nak', name, again!, ', 300')).toBe(true)
    const due = await value<Date>(one, 'select visible_at from klieo.deliveries where seq = $1', [seq])
    const third = (await eventually(async () => (await fetch(one, name))[0] ?? false, { what: 'the end of the delay' })) as Delivery
    expect(third).toMatchObject({ seq, attempt: 3 })
    expect((await value<Date>(one, 'select clock_timestamp()')) >= due).toBe(true)
    expect(await settle(one, 'term', name, third)).toBe(true)
    expect(await unsettled(name)).toEqual([])
  })

  test('an extension never shortens the time, and does not wait behind an ack in an open transaction', async () => {
    const name = await durable()
    await publish(name)
    const [delivery] = await fetch(one, name)
    const end = () => value<Date>(two, 'select visible_at from klieo.deliveries where seq = $1', [delivery!.seq])
    const at = await end()
    expect(await settle(one, 'extend', name, delivery!, ', 1')).toBe(true)
    expect(await end()).toEqual(at)
    expect(await settle(one, 'extend', name, delivery!, `, ${LONG_MS}`)).toBe(true)
    expect((await end()) > at).toBe(true)
    await one.query('begin')
    expect(await settle(one, 'ack', name, delivery!)).toBe(true)
    await two.query(`set statement_timeout = '5s'`)
    expect(await settle(two, 'extend', name, delivery!)).toBe(true)
    await two.query('reset statement_timeout')
    await one.query('commit')
    expect(await settle(two, 'extend', name, delivery!)).toBe(false)
  })

  test('P10 what was released comes again at once, and its delivery is not counted', async () => {
    const name = await durable()
    const seq = await publish(name)
    expect(await settle(one, 'release', name, (await fetch(one, name, ', max_deliver => 1'))[0]!)).toBe(true)
    expect(await fetch(two, name, ', max_deliver => 1')).toMatchObject([{ seq, attempt: 1 }])
  })
})

describe('the last delivery', () => {
  test('P6 left unsettled, the message is buried by whoever calls bury(), once', async () => {
    const name = await durable()
    const seq = await publish(name)
    const delivery = await expired(one, name, ', max_deliver => 1')
    expect(await fetch(two, name, ', max_deliver => 1')).toEqual([])
    expect(await Promise.all([one, two].map((client) => value(client, 'select klieo.bury($1)', [name])))).toContain(1)
    expect(await letters(name)).toEqual([
      {
        payload_text: 'p',
        headers: { h: 'v', dlq_reason: 'max_deliver_exceeded', dlq_subject: `${name}.a`, dlq_seq: seq, dlq_attempts: '1' },
      },
    ])
    expect(await settle(one, 'ack', name, delivery)).toBe(false)
    expect(await value(one, 'select klieo.bury($1)', [name])).toBe(0)
    // Its filter takes the letter, too.
    expect(await fetch(two, name)).toMatchObject([{ subject: `${name}.dlq`, attempt: 1 }])
  })

  test('P6 a nak of it ends the message at once', async () => {
    const name = await durable()
    await publish(name)
    const [delivery] = await fetch(one, name, ', max_deliver => 1')
    expect(await settle(one, 'nak', name, delivery!)).toBe(true)
    expect(await letters(name)).toHaveLength(1)
    expect(await unsettled(name)).toEqual([])
  })
})

test('P3 a stream of the package and a foreign consumer are members of one durable', async () => {
  const name = await durable()
  await using stream = await bus.pubsub.subscribe(`${name}.>`, name, { ackWaitMs: LONG_MS, maxInFlight: 1 })
  const seqs: number[] = []
  for (let n = 0; n < 20; n++) seqs.push(Number(await publish(name)))
  const messages = stream[Symbol.asyncIterator]()
  const theirs = await messages.next()
  const mine = await fetch(one, name, ', 100, 1')
  expect(mine.length).toBeGreaterThan(0)
  expect(mine.map(({ seq }) => Number(seq))).not.toContain(theirs.value.seq)
  await theirs.value.ack()
  // What the foreign member leaves unsettled comes to the other.
  const got = new Set([theirs.value.seq])
  while (got.size < seqs.length) {
    const { value: message } = await messages.next()
    got.add(message.seq)
    await message.ack()
  }
  expect([...got].sort((a, b) => a - b)).toEqual(seqs)
  expect(await settle(one, 'ack', name, mine[0]!)).toBe(false)
  await expect(bus.pubsub.subscribe('other.>', name)).rejects.toSatisfy((error) => error instanceof BusError && error.code === 'conflict')
})

test('section 7: arguments that break a rule are refused with 22023, and nothing is written', async () => {
  const name = await durable()
  await publish(name)
  const count = () => rows(one, 'select (select count(*) from klieo.consumer_offsets) as o, (select count(*) from klieo.deliveries) as d')
  const before = await count()
  const token = `'00000000-0000-0000-0000-000000000001'`
  const names = ['null', `''`, `'a b'`, `'a.b'`, `repeat('d', 129)`]
  const filters = [
    'null',
    `''`,
    `'.'`,
    `'a..b'`,
    `'>.a'`,
    `'a*'`,
    `'a.>b'`,
    `'$a'`,
    `'_INBOX.a'`,
    `'a b'`,
    `E'a\\nb'`,
    `'ü'`,
    `repeat('a', 1025)`,
  ]
  const calls = [
    ...names.flatMap((durable) => [
      `subscribe(${durable}, 'a')`,
      `fetch(${durable})`,
      `bury(${durable})`,
      ...['ack', 'nak', 'term', 'extend', 'release'].map((how) => `${how}_message(${durable}, 1, ${token})`),
    ]),
    ...['ack', 'nak', 'term', 'extend', 'release'].flatMap((how) => [
      `${how}_message('${name}', null, ${token})`,
      `${how}_message('${name}', 1, null)`,
    ]),
    ...filters.map((filter) => `subscribe('new', ${filter})`),
    ...['null', `'old'`].map((start) => `subscribe('new', 'a', ${start})`),
    `subscribe('new', 'a', start_seq => -1)`,
    `subscribe('new', 'a', 'new', start_seq => 1)`,
    `subscribe('new', 'a', start_seq => 1, start_time => now())`,
    ...['null', '0', '1001'].flatMap((most) => [`fetch('${name}', ${most})`, `bury('${name}', ${most})`]),
    ...['null', '0', '2147483648'].flatMap((ms) => [`fetch('${name}', 1, ${ms})`, `extend_message('${name}', 1, ${token}, ${ms})`]),
    `fetch('${name}', max_deliver => 0)`,
    ...['null', '0'].map((most) => `fetch('${name}', max_ack_pending => ${most})`),
    ...['null', '-1', '2147483648'].map((ms) => `nak_message('${name}', 1, ${token}, ${ms})`),
  ]
  const wrong: string[] = []
  for (const call of calls) {
    const state = await stateOf(one, `select * from klieo.${call}`)
    if (state !== '22023') wrong.push(`${call}: ${state}`)
  }
  expect(wrong).toEqual([])
  expect(await count()).toEqual(before)
  for (const filter of ['>', '*', 'a.*.>', 'a.*', '*.b', '!.#']) {
    expect(await value(one, 'select klieo.subscribe($1, $2)', [`f-${filter.length}-${Math.random().toString(36).slice(2)}`, filter])).toBe(
      true,
    )
  }
})
