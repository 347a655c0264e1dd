/**
 * A job or message ends in the transaction that publishes its dead letter. The proof is a letter that cannot be stored: then
 * nothing has ended, and when it can be again there is exactly one.
 */

import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { outcome, Taker } from './support/outcome.ts'

const schema = freshSchema()
const connectionString = databaseUrl()
const LONG_MS = 60_000
const SHORT_MS = 300
/** What is fetched on a busy machine must not run out before it is yielded. */
const ACK_WAIT_MS = 3_000

let bus: PostgresBus
let observer: Session
let names = 0

beforeAll(async () => {
  bus = await PostgresBus.connect({ connectionString, schema, maintenance: false, pollIntervalMs: 50 })
  observer = await session(connectionString)
  await observer.query(`
    create function ${schema}.refuse() returns trigger language plpgsql as $$
    begin
      raise exception 'no letters today';
    end $$;
    create trigger refuse_letters before insert on ${schema}.messages
      for each row when (new.subject like '%.dlq') execute function ${schema}.refuse();
    alter table ${schema}.messages disable trigger refuse_letters`)
})

afterEach(() => refuseLetters(false))

afterAll(async () => {
  await bus.close()
  await observer.query(`drop schema ${schema} cascade`)
  await observer[Symbol.asyncDispose]()
})

const fresh = () => `l${++names}`

async function refuseLetters(refuse: boolean): Promise<void> {
  await observer.query(`alter table ${schema}.messages ${refuse ? 'enable' : 'disable'} trigger refuse_letters`)
}

async function count(text: string, value: unknown): Promise<number> {
  const { rows } = await observer.query(`select count(*)::int as n from ${schema}.${text}`, [value])
  return (rows[0] as { n: number }).n
}

const lettersOf = (name: string) => count('messages where subject = $1', `${name}.dlq`)
const living = (queue: string) => count('jobs where queue = $1 and died_at is null', queue)
const dead = (queue: string) => count('jobs where queue = $1 and died_at is not null', queue)

async function untilOver(table: 'jobs' | 'deliveries', condition: string, value: unknown): Promise<void> {
  await eventually(async () => (await count(`${table} where ${condition} and visible_at > clock_timestamp()`, value)) === 0, {
    what: 'the end of the lease',
  })
}

describe('a dead letter that cannot be stored', () => {
  test('J4 a dead letter that cannot be stored leaves a job at deadLetter as it was; when it can be, there is one', async () => {
    const queue = fresh()
    await bus.jobs.enqueue(queue, { payload: 'x' })
    const job = await bus.jobs.claim(queue, 'w', LONG_MS)
    await refuseLetters(true)
    expect(await outcome(job!.deadLetter('r'))).toBe('internal')
    expect([await living(queue), await dead(queue), await lettersOf(queue)]).toEqual([1, 0, 0])
    await refuseLetters(false)
    // It is still the holder's.
    await job!.deadLetter('r')
    expect([await living(queue), await dead(queue), await lettersOf(queue)]).toEqual([0, 1, 1])
  })

  test('J4 a dead letter that cannot be stored leaves a job at its last nak as it was; when it can be, there is one', async () => {
    const queue = fresh()
    await bus.jobs.enqueue(queue, { payload: 'x', maxAttempts: 1 })
    const job = await bus.jobs.claim(queue, 'w', LONG_MS)
    await refuseLetters(true)
    expect(await outcome(job!.nak(0))).toBe('internal')
    expect([await living(queue), await dead(queue), await lettersOf(queue)]).toEqual([1, 0, 0])
    await refuseLetters(false)
    await job!.nak(0)
    expect([await living(queue), await dead(queue), await lettersOf(queue)]).toEqual([0, 1, 1])
  })

  test('J3 J4 one that a claim cannot store leaves the job whose last lease ran out, and hands nothing out; the next claim buries it', async () => {
    const queue = fresh()
    await bus.jobs.enqueue(queue, { payload: 'x', maxAttempts: 1 })
    await bus.jobs.claim(queue, 'w', SHORT_MS)
    await untilOver('jobs', 'queue = $1', queue)
    await bus.jobs.enqueue(queue, { payload: 'behind it' })
    await refuseLetters(true)
    expect(await outcome(bus.jobs.claimMany(queue, 'w', LONG_MS, { limit: 5 }))).toBe('internal')
    expect([await living(queue), await dead(queue), await lettersOf(queue)]).toEqual([2, 0, 0])
    await refuseLetters(false)
    expect((await bus.jobs.claimMany(queue, 'w', LONG_MS, { limit: 5 })).map(({ attempt }) => attempt)).toEqual([1])
    expect([await living(queue), await dead(queue), await lettersOf(queue)]).toEqual([1, 1, 1])
  })

  test('P6 a dead letter that cannot be stored leaves its message where it was; when it can be, there is one', async () => {
    const subject = fresh()
    await using stream = await bus.pubsub.subscribe(subject, subject, { ackWaitMs: ACK_WAIT_MS, maxDeliver: 1 })
    const { seq } = await bus.pubsub.publish(subject, 'x')
    await refuseLetters(true)
    const taker = new Taker(stream)
    expect((await taker.expect()).seq).toBe(seq)
    await untilOver('deliveries', 'seq = $1', seq)
    // Fetches go on meanwhile, and each tries to bury it.
    const { seq: later } = await bus.pubsub.publish(subject, 'y')
    const other = await taker.expect()
    expect(other.seq).toBe(later)
    await other.ack()
    expect([await count('deliveries where seq = $1', seq), await lettersOf(subject)]).toEqual([1, 0])
    await refuseLetters(false)
    void taker.take(1)
    await eventually(async () => expect([await count('deliveries where seq = $1', seq), await lettersOf(subject)]).toEqual([0, 1]))
  })

  test('P6 one that a nak of the last delivery cannot store leaves the message with its holder', async () => {
    const subject = fresh()
    await using stream = await bus.pubsub.subscribe(subject, subject, { ackWaitMs: LONG_MS, maxDeliver: 1 })
    const { seq } = await bus.pubsub.publish(subject, 'x')
    const message = await new Taker(stream).expect()
    await refuseLetters(true)
    expect(await outcome(message.nak())).toBe('internal')
    expect([await count('deliveries where seq = $1', seq), await lettersOf(subject)]).toEqual([1, 0])
    await refuseLetters(false)
    await message.nak()
    expect([await count('deliveries where seq = $1', seq), await lettersOf(subject)]).toEqual([0, 1])
  })
})
