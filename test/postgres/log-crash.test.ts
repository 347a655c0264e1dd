/** A server of this file's own: it is killed, it keeps prepared transactions, and in the end it becomes a standby. */

import { randomBytes } from 'node:crypto'
import { chmod, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { BusError, PostgresBus } from '../../src/index.ts'
import { type EmbeddedPostgres, startEmbeddedPostgres } from '../../src/testing/embedded-postgres.ts'
import { session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { randomFrom } from './support/random.ts'
import { next, type PgMsg, take, takeUntil, text } from './support/reading.ts'

let server: EmbeddedPostgres
let names = 0

beforeAll(async () => {
  server = await startEmbeddedPostgres({ settings: { max_prepared_transactions: '20' } })
})

afterAll(async () => {
  await server?.stop('immediate')
})

const connect = () => PostgresBus.connect({ connectionString: server.connectionString, pollIntervalMs: 50 })
const freshSubject = () => `crash.${++names}`

/** Publishes in a transaction that is then prepared under the name. */
async function prepare(subject: string, payload: string, gid: string): Promise<void> {
  await using client = await session(server.connectionString)
  await client.query('begin')
  await client.query(`select klieo.publish($1, $2)`, [subject, Buffer.from(payload)])
  await client.query(`prepare transaction '${gid}'`)
}

async function finish(how: 'commit' | 'rollback', gid: string): Promise<void> {
  await using client = await session(server.connectionString)
  await client.query(`${how} prepared '${gid}'`)
}

describe('prepared transactions', () => {
  test('P9 a prepared one is invisible, delays nothing, and is delivered once when it is committed; rolled back, never', async () => {
    await using bus = await connect()
    const subject = freshSubject()
    const stream = await bus.pubsub.subscribe(subject, 'prepared')
    await prepare(subject, 'kept', 'kept')
    await prepare(subject, 'dropped', 'dropped')
    const begunAt = performance.now()
    await Promise.all(Array.from({ length: 100 }, (_, n) => bus.pubsub.publish(subject, `${n}`)))
    expect((await take(stream, 100)).length).toBe(100)
    expect(performance.now() - begunAt).toBeLessThan(4_000)
    await finish('commit', 'kept')
    expect(await take(stream, 1)).toEqual(['kept'])
    await finish('rollback', 'dropped')
    await bus.pubsub.publish(subject, 'end')
    expect(await takeUntil(stream, 'end')).toEqual([])
  })

  test('P9 one that outlives a crash of the server is delivered once after COMMIT PREPARED, by the stream that was open all the time', async () => {
    await using bus = await connect()
    const subject = freshSubject()
    const stream = await bus.pubsub.subscribe(subject, 'through-the-crash')
    await prepare(subject, 'kept', 'crash-kept')
    await prepare(subject, 'dropped', 'crash-dropped')
    await bus.pubsub.publish(subject, 'before the crash')
    expect(await take(stream, 1)).toEqual(['before the crash'])
    await server.kill()
    await server.restart()
    await eventually(() => bus.pubsub.publish(subject, 'after the crash'), { everyMs: 100 })
    expect(await takeUntil(stream, 'after the crash')).toEqual([])
    await finish('rollback', 'crash-dropped')
    await finish('commit', 'crash-kept')
    expect(await take(stream, 1)).toEqual(['kept'])
    await bus.pubsub.publish(subject, 'end')
    expect((await takeUntil(stream, 'end')).filter((text) => text !== 'after the crash')).toEqual([])
  })
})

describe('a server that is killed', () => {
  const seed = process.env.KLIEO_TEST_SEED ?? randomBytes(4).toString('hex')

  test(`P3 P9 between the pages of a backlog: everything comes, no first delivery twice, nothing acked again (KLIEO_TEST_SEED=${seed})`, async () => {
    const backlog = 8_000
    const random = randomFrom(seed)
    const subject = freshSubject()
    await using bus = await connect()
    await using client = await session(server.connectionString)
    await client.query(
      `with numbers as (select n, convert_to(n::text, 'UTF8') as bytes from generate_series(1, $2::int) n),
         batch as (
           select array_agg($1::text order by n) as subjects, string_agg(bytes, '' order by n) as payloads,
             array_agg(1 + start order by n) as starts, array_agg(length order by n) as lengths
           from (
             select n, bytes, octet_length(bytes) as length, (sum(octet_length(bytes)) over (order by n) - octet_length(bytes))::int as start
             from numbers
           ) cut
         )
       select count(*) from batch, klieo.publish_many(subjects, payloads, starts, lengths, null, null)`,
      [subject, backlog],
    )
    const stream = await bus.pubsub.subscribe(subject, 'pages', { maxInFlight: 7, ackWaitMs: 2_000 })
    const kills = [0.1, 0.35, 0.6, 0.85].map((share) => Math.floor(backlog * (share + random() * 0.1)))
    const firsts = new Set<string>()
    const acked = new Set<string>()
    const uncertain = new Set<string>()
    const wrong: string[] = []
    let killing = Promise.resolve()
    const ack = async (message: PgMsg) => {
      try {
        await message.ack()
        if (acked.has(text(message))) wrong.push(`${text(message)} was acked twice`)
        acked.add(text(message))
      } catch (error) {
        // Whether it was done nobody knows; `lease_lost` after an ack whose answer was lost.
        if (!(error instanceof BusError) || !['connection', 'lease_lost', 'timeout', 'unavailable'].includes(error.code)) throw error
        uncertain.add(text(message))
      }
    }
    const acks: Promise<void>[] = []
    const dealtWith = new Set<string>()
    for (let seen = 0; dealtWith.size < backlog; seen++) {
      const message = await next(stream, 20_000, `a message after ${seen}, ${acked.size} acked`)
      const payload = text(message)
      if (acked.has(payload)) wrong.push(`${payload} came after its ack`)
      if (message.attempt === 1) {
        if (firsts.has(payload)) wrong.push(`${payload} was delivered for the first time twice`)
        firsts.add(payload)
      }
      acks.push(ack(message).then(() => void dealtWith.add(payload)))
      if (acks.length >= 7 || firsts.size === backlog) await Promise.all(acks.splice(0))
      if (kills.length > 0 && dealtWith.size >= (kills[0] as number)) {
        kills.shift()
        // Wherever it hits: in a fetch, in an ack, between the two.
        killing = killing.then(() => server.kill()).then(() => server.restart())
      }
    }
    await Promise.all(acks)
    await killing
    // What is uncertain was either done or comes again, and the last word is an ack.
    await eventually(() => bus.pubsub.publish(subject, 'end'), { everyMs: 100 })
    for (let message = await next(stream); text(message) !== 'end'; message = await next(stream)) {
      expect(uncertain).toContain(text(message))
      await message.ack()
    }
    expect(kills).toEqual([])
    expect(wrong).toEqual([])
    expect(firsts.size + uncertain.size).toBeGreaterThanOrEqual(backlog)
  }, 90_000)
})

describe('a standby', () => {
  test('section 8 it is refused at connect with unsupported, and once promoted it goes on with the positions of its durables', async () => {
    const subject = freshSubject()
    {
      await using bus = await connect()
      const stream = await bus.pubsub.subscribe(subject, 'failover')
      for (const n of [1, 2, 3]) await bus.pubsub.publish(subject, `${n}`)
      expect(await take(stream, 1)).toEqual(['1'])
    }
    await server.kill()
    const signal = join(server.dataDir, 'standby.signal')
    await writeFile(signal, '')
    await chmod(signal, 0o666)
    await server.restart()
    const error = await connect().then(
      () => undefined,
      (reason: unknown) => reason,
    )
    expect(error).toBeInstanceOf(BusError)
    expect((error as BusError).code).toBe('unsupported')
    expect((error as BusError).message).toContain('standby')
    {
      await using client = await session(server.connectionString)
      await client.query('select pg_promote()')
    }
    await using bus = await connect()
    const stream = await bus.pubsub.subscribe(subject, 'failover')
    await bus.pubsub.publish(subject, 'end')
    expect(await takeUntil(stream, 'end')).toEqual(['2', '3'])
  })
})
