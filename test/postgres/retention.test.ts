import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, untilBlocked } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { fetchIn } from './support/fetching.ts'
import { next, take, takeUntil, text } from './support/reading.ts'
import { rival } from './support/rival.ts'

const connectionString = databaseUrl()
const SUBJECT = 'kept'
/** An open transaction of anybody on the server holds removal back: another test's may be open for some seconds. */
const PATIENTLY = { timeoutMs: 25_000, everyMs: 100 }
let observer: Session
let schema: string
let bus: PostgresBus

beforeAll(async () => {
  observer = await rival(connectionString)
})
afterAll(async () => {
  await observer?.[Symbol.asyncDispose]()
})
beforeEach(async () => {
  schema = freshSchema()
  bus = await PostgresBus.connect({ connectionString, schema, maintenance: false, pollIntervalMs: 50 })
})
afterEach(async () => {
  await bus.close()
})

/** One round as the maintaining process makes it, with messages too old as soon as they are there. */
async function prune(client: Session = observer): Promise<number> {
  const { rows } = await client.query(`select ${schema}.prune_messages(0, 5000) as count`)
  return (rows[0] as { count: number }).count
}

async function stored(): Promise<string[]> {
  const { rows } = await observer.query(`select payload_text from ${schema}.message_details order by seq`)
  return (rows as { payload_text: string }[]).map((row) => row.payload_text)
}

const publish = (payload: string) => bus.pubsub.publish(SUBJECT, payload)
const publishIn = (client: Session, payload: string) =>
  client.query(`select ${schema}.publish($1, convert_to($2, 'UTF8'))`, [SUBJECT, payload])

/** Fetches nothing, until the durable's snapshot has moved past what it was handed. */
async function moveOn(durable: string): Promise<void> {
  await observer.query(`update ${schema}.consumer_offsets set last_active_at = '-infinity' where durable = $1`, [durable])
  expect(await fetchIn(observer, schema, durable)).toEqual([])
}

/** Until the durable waits for no transaction as old as the message's, whoever on the server has one open. */
async function movePast(durable: string, payload: string): Promise<void> {
  const past = async () => {
    await moveOn(durable)
    const { rows } = await observer.query(
      `select m.tx < pg_snapshot_xmin(o.lo) as past
       from ${schema}.messages m, ${schema}.consumer_offsets o
       where m.payload = convert_to($1, 'UTF8') and o.durable = $2`,
      [payload, durable],
    )
    return (rows[0] as { past: boolean }).past
  }
  await eventually(past, { ...PATIENTLY, what: `${durable} being past ${payload}` })
}

describe('retention', () => {
  test('P13 a straggler that commits while old messages are removed is delivered, however old its published_at', async () => {
    const stream = await bus.pubsub.subscribe(SUBJECT, 'reader')
    await using straggler = await rival(connectionString)
    await straggler.query('begin')
    await publishIn(straggler, 'straggler')
    for (let n = 0; n < 20; n++) await publish(`${n}`)
    expect((await take(stream, 20)).length).toBe(20)
    await moveOn('reader')
    await prune()
    await straggler.query('commit')
    // Committed, and nobody has seen it: it must outlive any number of rounds.
    await prune()
    await prune()
    expect(await stored()).toContain('straggler')
    expect(await take(stream, 1)).toEqual(['straggler'])
  })

  test('P13 it commits between the bound and the delete of one round: still delivered', async () => {
    const stream = await bus.pubsub.subscribe(SUBJECT, 'reader')
    await using straggler = await rival(connectionString)
    await using pruner = await rival(connectionString)
    await using holder = await rival(connectionString)
    await publish('old')
    expect(await take(stream, 1)).toEqual(['old'])
    await straggler.query('begin')
    await publishIn(straggler, 'straggler')
    await publish('old too')
    expect(await take(stream, 1)).toEqual(['old too'])
    await stream.close()
    await movePast('reader', 'old')
    // The bound is read from the durables; the delete needs the log, and there it is held.
    await holder.query('begin')
    await holder.query(`lock table ${schema}.deliveries in access exclusive mode`)
    const pruning = prune(pruner)
    await untilBlocked(observer, pruner.pid)
    await straggler.query('commit')
    await holder.query('commit')
    await pruning
    expect(await stored()).toContain('straggler')
    await using again = await bus.pubsub.subscribe(SUBJECT, 'reader')
    expect(await take(again, 1)).toEqual(['straggler'])
  })

  test('P13 a message stays while any durable has not been past it, and goes when the last one has', async () => {
    const quick = await bus.pubsub.subscribe(SUBJECT, 'quick')
    const slow = await bus.pubsub.subscribe(SUBJECT, 'slow')
    for (let n = 0; n < 5; n++) await publish(`${n}`)
    expect((await take(quick, 5)).length).toBe(5)
    await moveOn('quick')
    await prune()
    expect((await stored()).length).toBe(5)
    expect((await take(slow, 5)).length).toBe(5)
    await Promise.all([quick.close(), slow.close()])
    await eventually(async () => {
      await moveOn('quick')
      await moveOn('slow')
      await prune()
      expect(await stored()).toEqual([])
    }, PATIENTLY)
  })

  test('P13 a message in flight stays until it is settled, so that its redelivery has something to hand out', async () => {
    const stream = await bus.pubsub.subscribe(SUBJECT, 'reader')
    await publish('in flight')
    await publish('settled')
    const held = await next(stream)
    expect(text(held)).toBe('in flight')
    expect(await take(stream, 1)).toEqual(['settled'])
    await eventually(async () => {
      await moveOn('reader').catch(() => {})
      await prune()
      expect(await stored()).toEqual(['in flight'])
    }, PATIENTLY)
    await held.nak()
    const again = await next(stream)
    expect([text(again), again.attempt]).toEqual(['in flight', 2])
    await again.ack()
    await stream.close()
    await eventually(async () => {
      await moveOn('reader')
      await prune()
      expect(await stored()).toEqual([])
    }, PATIENTLY)
  })

  test('P13 a page that is open keeps what it has not handed out yet', async () => {
    await (await bus.pubsub.subscribe(SUBJECT, 'reader')).close()
    for (let n = 0; n < 10; n++) await publish(`${n}`)
    const first = await fetchIn(observer, schema, 'reader', { maxMessages: 3 })
    expect(first.map((one) => one.text)).toEqual(['0', '1', '2'])
    await prune()
    const rest = await fetchIn(observer, schema, 'reader', { maxMessages: 100 })
    expect(rest.map((one) => one.text)).toEqual(['3', '4', '5', '6', '7', '8', '9'])
  })

  test('P13 with publishers, stragglers and readers running, rounds without a pause lose nothing', async () => {
    let running = true
    let removed = 0
    const stream = await bus.pubsub.subscribe(SUBJECT, 'reader')
    await using pruner = await rival(connectionString)
    const pruning = (async () => {
      while (running) removed += await prune(pruner)
    })()
    const stragglers = await Promise.all(Array.from({ length: 4 }, () => rival(connectionString)))
    try {
      const publishing = stragglers.map(async (client, who) => {
        for (let n = 0; n < 150; n++) {
          await client.query('begin')
          await publishIn(client, `${who}.${n}`)
          // The others commit meanwhile: half of the commits come late.
          if (n % 2 === 0) await publish(`${who}.${n} beside`)
          await client.query('commit')
        }
      })
      const got = await take(stream, 4 * 150 + 4 * 75, 20_000)
      await Promise.all(publishing)
      expect(new Set(got).size).toBe(got.length)
      await eventually(async () => {
        // While another transaction runs on the server, the durable's snapshot may have stayed before it.
        await moveOn('reader')
        return removed > 0
      }, PATIENTLY)
      await publish('end')
      expect(await takeUntil(stream, 'end')).toEqual([])
    } finally {
      running = false
      await pruning
      await Promise.all(stragglers.map((client) => client[Symbol.asyncDispose]()))
    }
  })

  test('P13 a connected bus prunes by itself: messages older than the retention age go once they are acked', async () => {
    await using own = await PostgresBus.connect({ connectionString, schema, retention: { messagesMs: 0 }, pollIntervalMs: 50 })
    const stream = await own.pubsub.subscribe(SUBJECT, 'reader')
    await own.pubsub.publish(SUBJECT, 'old')
    expect(await take(stream, 1)).toEqual(['old'])
    await stream.close()
    await eventually(async () => {
      // Once is not enough: while another transaction runs on the server, the durable's new snapshot reaches no further than that.
      await moveOn('reader')
      expect(await stored()).toEqual([])
    }, PATIENTLY)
  })
})
