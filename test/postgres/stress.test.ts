/**
 * Twenty thousand messages through everything that makes a log lose or double them: transactions that roll back, commit late,
 * undo savepoints or are prepared and ended later, and members that are killed. What must hold is read from the database.
 */

import { randomBytes } from 'node:crypto'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { type EmbeddedPostgres, startEmbeddedPostgres } from '../../src/testing/embedded-postgres.ts'
import { type Child, startChild } from '../support/child.ts'
import { type Session, session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { randomFrom } from './support/random.ts'

const MESSAGES = 20_000
const MEMBERS = 4
const PUBLISHERS = 6
const ACK_WAIT_MS = 4_000
const KILLS = 8
/** Two cores have ten processes to run here, and another file's beside them. */
const PATIENCE_MS = 180_000
const SUBJECT = 'stress'
const seed = process.env.KLIEO_TEST_SEED ?? randomBytes(4).toString('hex')
const random = randomFrom(seed)
const below = (n: number) => Math.floor(random() * n)

let server: EmbeddedPostgres
let bus: PostgresBus
let observer: Session

beforeAll(async () => {
  server = await startEmbeddedPostgres({ settings: { max_prepared_transactions: '50' } })
  bus = await PostgresBus.connect({ connectionString: server.connectionString })
  observer = await session(server.connectionString)
  // Every first delivery is noted in the transaction of the fetch, under the durable's lock: n is the order of handing out.
  await observer.query(`
    create table effects (message text not null);
    create table plain_acks (message text not null);
    create table handed_out (n bigserial primary key, consumer_id int not null, seq bigint not null);
    create function note_first_delivery() returns trigger language plpgsql as $$
      begin insert into public.handed_out (consumer_id, seq) values (new.consumer_id, new.seq); return null; end $$;
    create trigger note_first_delivery after insert on klieo.deliveries for each row execute function note_first_delivery();
  `)
  for (const durable of ['exactly', 'plainly']) await (await bus.pubsub.subscribe(SUBJECT, durable)).close()
})

afterAll(async () => {
  await bus?.close()
  await observer?.[Symbol.asyncDispose]()
  await server?.stop('immediate')
})

class Publishing {
  readonly committed: string[] = []
  readonly prepared: { readonly gid: string; readonly messages: string[] }[] = []
  readonly dropped = { rolledBack: 0, undone: 0, late: 0, prepared: 0 }

  /** Transactions one after the other, so that the messages of `name` have an order; until enough are committed by all. */
  async run(name: string): Promise<void> {
    await using client = await session(server.connectionString)
    let number = 0
    while (this.committed.length < MESSAGES) {
      const share = Math.min(10 + below(60), MESSAGES - this.committed.length)
      const outcome = random()
      const willBePrepared = outcome < 0.1
      // A prepared transaction commits at any later time: its messages are an order of their own.
      const order = willBePrepared ? `${name}-${number++}` : name
      const fresh = (count: number) => Array.from({ length: count }, () => `${order}:${number++}`)
      const kept = fresh(share)
      await client.query('begin')
      const half = Math.ceil(kept.length / 2)
      await this.#publish(client, kept.slice(0, half))
      if (random() < 0.3) {
        await client.query('savepoint s')
        await this.#publish(client, fresh(1 + below(5)))
        await client.query('rollback to s')
        this.dropped.undone++
      }
      if (random() < 0.3) await client.query('savepoint kept')
      const before = this.committed.length
      // Late: only when the others have committed a good deal more.
      if (random() < 0.2) {
        this.dropped.late++
        await eventually(() => this.committed.length >= Math.min(MESSAGES, before + 400), { timeoutMs: 2_000 }).catch(() => {})
      }
      await this.#publish(client, kept.slice(half))
      if (willBePrepared) {
        const gid = `stress-${order}`
        await client.query(`prepare transaction '${gid}'`)
        this.prepared.push({ gid, messages: kept })
        if (this.prepared.length > 5) await this.endPrepared(client)
      } else if (outcome < 0.2) {
        await client.query('rollback')
        this.dropped.rolledBack++
      } else {
        await client.query('commit')
        this.committed.push(...kept)
      }
    }
  }

  async endPrepared(client: Session): Promise<void> {
    const [one] = this.prepared.splice(below(this.prepared.length), 1)
    if (!one) return
    if (random() < 0.7) {
      await client.query(`commit prepared '${one.gid}'`)
      this.committed.push(...one.messages)
    } else {
      await client.query(`rollback prepared '${one.gid}'`)
      this.dropped.prepared++
    }
  }

  async #publish(client: Session, messages: readonly string[]): Promise<void> {
    if (messages.length === 0) return
    if (random() < 0.2) {
      for (const payload of messages.slice(0, 3)) await bus.pubsub.publish(SUBJECT, payload, { tx: client })
      await this.#publish(client, messages.slice(3))
    } else {
      await bus.pubsub.publishMany(
        messages.map((payload) => ({ subject: SUBJECT, payload })),
        { tx: client },
      )
    }
  }
}

async function column(sql: string): Promise<string[]> {
  const { rows } = await observer.query<{ message: string }>(sql)
  return rows.map(({ message }) => message)
}

describe('20,000 messages', () => {
  test(`P1 P3 P7 P8 P9 with late, undone and prepared transactions and killed members: nothing lost, nothing twice, each publisher's order kept (KLIEO_TEST_SEED=${seed})`, async () => {
    const members: Child[] = []
    const start = async (): Promise<Child> => {
      const child = startChild(new URL('support/stress-member.ts', import.meta.url), {
        args: [server.connectionString, SUBJECT, String(ACK_WAIT_MS)],
      })
      members.push(child)
      await child.next(({ ready }) => ready === true)
      return child
    }
    try {
      const working = await Promise.all(Array.from({ length: MEMBERS }, start))
      const publishing = new Publishing()
      const publishers = Array.from({ length: PUBLISHERS }, (_, n) => publishing.run(`p${n}`))
      const killing = (async () => {
        for (let kills = 1; kills <= KILLS; kills++) {
          // Spread over the work by what has been handed out, not by the clock.
          const share = (MESSAGES * 2 * (kills - random())) / (KILLS + 1)
          await eventually(
            async () => {
              await noneDied(working)
              const { rows } = await observer.query<{ n: string }>('select coalesce(max(n), 0) as n from handed_out')
              expect(Number(rows[0]?.n)).toBeGreaterThanOrEqual(share)
            },
            { timeoutMs: PATIENCE_MS, everyMs: 30, what: `first deliveries before kill ${kills}` },
          )
          const victim = below(MEMBERS)
          await (working[victim] as Child).kill('SIGKILL')
          working[victim] = await start()
        }
      })()
      await Promise.all(publishers)
      while (publishing.prepared.length > 0) await publishing.endPrepared(observer)
      await killing
      await eventually(
        async () => {
          const { rows } = await observer.query(
            'select durable, pending::int, (in_flight + redelivering)::int as held from klieo.consumer_stats',
          )
          expect(rows.map(({ pending, held }) => [pending, held])).toEqual([
            [0, 0],
            [0, 0],
          ])
        },
        { timeoutMs: PATIENCE_MS, everyMs: 100, what: 'the end of the work' },
      )
      await noneDied(working)
      await Promise.all(working.map((member) => member.kill()))

      const committed = new Set(publishing.committed)
      expect(committed.size).toBeGreaterThanOrEqual(MESSAGES)
      expect(Object.values(publishing.dropped).filter((count) => count > 0).length).toBe(4)
      const effects = await column('select message from effects')
      const acks = await column('select message from plain_acks')
      expect(twice(effects)).toEqual([])
      expect(difference(committed, new Set(effects))).toEqual([])
      expect(difference(new Set(effects), committed)).toEqual([])
      // A member killed between an ack and its note leaves none; the deliveries are gone, so it was acked.
      expect(twice(acks)).toEqual([])
      expect(difference(new Set(acks), committed)).toEqual([])
      expect(acks.length).toBeGreaterThan(committed.size - KILLS * 150)

      for (const durable of ['exactly', 'plainly']) {
        const firsts = await column(
          `select convert_from(m.payload, 'UTF8') as message
           from handed_out h
           join klieo.consumer_offsets o on o.id = h.consumer_id and o.durable = '${durable}'
           join klieo.messages m using (seq)
           order by h.n`,
        )
        expect(twice(firsts)).toEqual([])
        expect(difference(committed, new Set(firsts))).toEqual([])
        expect(outOfOrder(firsts)).toEqual([])
      }
    } finally {
      await Promise.all(members.map((child) => child.kill()))
    }
  }, 400_000)
})

/** A member that died of an error, not by us, has said why. */
async function noneDied(members: readonly Child[]): Promise<void> {
  for (const member of members) {
    const exit = await Promise.race([member.exited, Promise.resolve(undefined)])
    expect(exit && member.stderr).toBeUndefined()
  }
}

function twice(list: readonly string[]): string[] {
  const seen = new Set<string>()
  return list.filter((one) => seen.has(one) || !seen.add(one))
}

function difference(left: ReadonlySet<string>, right: ReadonlySet<string>): string[] {
  return [...left].filter((one) => !right.has(one))
}

/** Messages that come after a later one of the same publisher. */
function outOfOrder(list: readonly string[]): string[] {
  const last = new Map<string, number>()
  return list.filter((one) => {
    const [publisher, number] = one.split(':') as [string, string]
    const late = Number(number) < (last.get(publisher) ?? -1)
    last.set(publisher, Math.max(last.get(publisher) ?? -1, Number(number)))
    return late
  })
}
