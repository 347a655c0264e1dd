/**
 * A random walk over the log: publishing sessions with savepoints, rollbacks and prepared transactions, fetches of a few
 * messages and a few bytes that commit late or never, settlements of every kind, and pruning that keeps nothing it need
 * not keep. The walk is made of the bus's own statements on plain sessions, so that every step is taken in a known order
 * and a failure can be walked again by its seed.
 */

import { afterAll, beforeAll, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { type EmbeddedPostgres, startEmbeddedPostgres } from '../../src/testing/embedded-postgres.ts'
import { type Session, session } from '../support/sessions.ts'

const FIRST_SEED = 1
const WALKS_FOR_MS = 6_000
/** On a machine however slow. */
const LEAST_WALKS = 6
const STEPS = 150
const PUBLISHERS = 5
const SUBJECTS = ['r.x', 'b.a', 'c', 'r.y', 'z.a'] as const

interface Durable {
  readonly name: string
  readonly filter: string
  readonly takes: (subject: string) => boolean
  readonly maxDeliver: number | null
}

const DURABLES: readonly Durable[] = [
  { name: 'star', filter: '*.a', takes: (subject) => /^[^.]+\.a$/.test(subject), maxDeliver: 3 },
  { name: 'rare', filter: 'r.x', takes: (subject) => subject === 'r.x', maxDeliver: null },
  { name: 'all', filter: '>', takes: () => true, maxDeliver: null },
]

interface Published {
  readonly seq: number
  readonly subject: string
  readonly publisher: number
}

interface Delivery {
  readonly seq: number
  readonly token: string
}

let server: EmbeddedPostgres
let publishers: Session[]
let fetcher: Session
let settler: Session

beforeAll(async () => {
  // Its own: prepared transactions are off by default, and open transactions of other tests would keep pruning from its work.
  server = await startEmbeddedPostgres({ settings: { max_prepared_transactions: '20' } })
  await PostgresBus.migrate({ connectionString: server.connectionString })
  publishers = await Promise.all(Array.from({ length: PUBLISHERS }, () => session(server.connectionString)))
  fetcher = await session(server.connectionString)
  settler = await session(server.connectionString)
})

afterAll(async () => {
  await Promise.all([...publishers, fetcher, settler].map((each) => each[Symbol.asyncDispose]()))
  await server.stop('immediate')
})

/** The same numbers for the same seed (a linear congruential generator is random enough to choose steps). */
function random(seed: number): (below: number) => number {
  let state = BigInt(seed) * 2_862_933_555_777_941_757n + 3_037_000_493n
  return (below) => {
    state = BigInt.asUintN(64, state * 6_364_136_223_846_793_005n + 1_442_695_040_888_963_407n)
    return Number((state >> 33n) % BigInt(below))
  }
}

/** One publishing session: the messages of its open transaction, a list per savepoint. */
class Publisher {
  readonly #session: Session
  readonly #number: number
  readonly #walk: Walk
  #levels: Published[][] | undefined

  constructor(number: number, walk: Walk) {
    this.#session = publishers[number]!
    this.#number = number
    this.#walk = walk
  }

  async step(): Promise<void> {
    const { pick } = this.#walk
    if (!this.#levels) {
      await this.#session.query('begin')
      this.#levels = [[]]
      // Some have their xid long before they publish.
      if (pick(2) === 0) await this.#session.query('select pg_current_xact_id()')
      return
    }
    const choice = pick(20)
    if (choice < 10) await this.#publish(this.#levels.at(-1)!)
    else if (choice < 12) await this.#session.query(`savepoint s${this.#levels.push([])}`)
    else if (choice < 13 && this.#levels.length > 1) {
      await this.#session.query(`rollback to s${this.#levels.length}`)
      this.#levels.pop()
    } else if (choice < 17) await this.#end(pick(5) === 0 ? 'prepare' : 'commit')
    else await this.#end('rollback')
  }

  async finish(): Promise<void> {
    if (this.#levels) await this.#end('commit')
  }

  async #publish(into: Published[]): Promise<void> {
    for (let left = 1 + this.#walk.pick(3); left > 0; left--) {
      const subject = SUBJECTS[this.#walk.pick(SUBJECTS.length)]!
      const { rows } = await this.#session.query<{ seq: number }>('select klieo.publish($1, $2)::int as seq', [
        subject,
        Buffer.alloc(this.#walk.pick(30), 'x'),
      ])
      into.push({ seq: rows[0]!.seq, subject, publisher: this.#number })
    }
  }

  async #end(how: 'commit' | 'rollback' | 'prepare'): Promise<void> {
    const messages = this.#levels!.flat()
    this.#levels = undefined
    if (how === 'prepare') await this.#walk.prepare(this.#session, messages)
    else {
      await this.#session.query(how)
      if (how === 'commit') this.#walk.committed(messages)
    }
  }
}

class Walk {
  readonly pick: (below: number) => number
  readonly #publishers: Publisher[]
  readonly #messages = new Map<number, Published>()
  /** What was prepared: nothing is promised about its order. */
  readonly #unordered = new Set<number>()
  readonly #prepared = new Map<string, Published[]>()
  readonly #held: { readonly durable: Durable; readonly delivery: Delivery }[] = []
  readonly #acks = new Map<string, number>()
  readonly #handedOut = new Map<Durable, number[]>(DURABLES.map((durable) => [durable, []]))
  #open: { readonly durable: Durable; readonly deliveries: Delivery[] } | undefined
  #names = 0

  constructor(seed: number) {
    this.pick = random(seed)
    this.#publishers = Array.from({ length: PUBLISHERS }, (_, number) => new Publisher(number, this))
  }

  committed(messages: readonly Published[]): void {
    for (const message of messages) this.#messages.set(message.seq, message)
  }

  async prepare(client: Session, messages: Published[]): Promise<void> {
    const name = `p${++this.#names}`
    await client.query(`prepare transaction '${name}'`)
    this.#prepared.set(name, messages)
    for (const { seq } of messages) this.#unordered.add(seq)
  }

  async run(): Promise<void> {
    await settler.query('truncate klieo.messages, klieo.deliveries, klieo.consumer_offsets restart identity')
    for (const { name, filter } of DURABLES) {
      await settler.query(
        `insert into klieo.consumer_offsets (durable, filter, pattern, lo) values ($1, $2, klieo.filter_pattern($2), '1:1:')`,
        [name, filter],
      )
    }
    for (let step = 0; step < STEPS; step++) {
      const choice = this.pick(20)
      if (choice < 9) await this.#publishers[this.pick(PUBLISHERS)]!.step()
      else if (choice < 10) await this.#endPrepared(this.pick(4) > 0)
      else if (choice < 14) await this.#fetch(DURABLES[this.pick(DURABLES.length)]!)
      else if (choice < 19) await this.#settle()
      else await settler.query(this.pick(2) === 0 ? 'select klieo.prune_messages(0, 100)' : 'select * from klieo.reap_deliveries(10)')
    }
    await this.#endFetch(true)
    for (const publisher of this.#publishers) await publisher.finish()
    while (this.#prepared.size > 0) await this.#endPrepared(true)
    for (const durable of DURABLES) await this.#drain(durable)
  }

  /** What is wrong with what came out. */
  async faults(): Promise<string[]> {
    const faults: string[] = []
    let buried = 0
    for (const durable of DURABLES) {
      for (const { seq, subject } of this.#messages.values()) {
        if (!durable.takes(subject)) continue
        const acks = this.#acks.get(`${durable.name} ${seq}`) ?? 0
        if (acks === 0 && durable.maxDeliver !== null) buried++
        else if (acks !== 1) faults.push(`${durable.name}: message ${seq} was acked ${acks} times`)
      }
      faults.push(...this.#disorder(durable))
    }
    // The dead letters are messages like others, and "all" takes them.
    const letters = [...this.#acks.keys()].filter((key) => key.startsWith('all ') && !this.#messages.has(Number(key.slice(4)))).length
    if (letters !== buried) faults.push(`${buried} messages were acked by nobody, and ${letters} dead letters or phantoms came`)
    const { rows } = await settler.query('select from klieo.deliveries')
    if (rows.length > 0) faults.push(`${rows.length} deliveries are left`)
    return faults
  }

  /** P8 for the transactions of one session, each of which ended before the next began. */
  #disorder(durable: Durable): string[] {
    const last = new Map<number, number>()
    const seen = new Set<number>()
    for (const seq of this.#handedOut.get(durable)!) {
      const message = this.#messages.get(seq)
      if (!message || seen.has(seq) || this.#unordered.has(seq)) continue
      seen.add(seq)
      if (seq < (last.get(message.publisher) ?? 0)) return [`${durable.name}: message ${seq} was handed out late`]
      last.set(message.publisher, seq)
    }
    return []
  }

  async #endPrepared(commit: boolean): Promise<void> {
    const [entry] = this.#prepared
    if (!entry) return
    const [name, messages] = entry
    this.#prepared.delete(name)
    await settler.query(`${commit ? 'commit' : 'rollback'} prepared '${name}'`)
    if (commit) this.committed(messages)
  }

  /** A fetch commits at once, a few steps later, or never: its process died. */
  async #fetch(durable: Durable): Promise<void> {
    if (this.#open) return this.#endFetch(this.pick(5) > 1)
    await fetcher.query('begin')
    const deliveries = await this.#fetched(fetcher, durable, 1 + this.pick(5), this.pick(2) * 100_000, 1 + this.pick(60))
    this.#open = { durable, deliveries }
    if (this.pick(3) > 0) await this.#endFetch(true)
  }

  async #endFetch(commit: boolean): Promise<void> {
    if (!this.#open) return
    const { durable, deliveries } = this.#open
    this.#open = undefined
    await fetcher.query(commit ? 'commit' : 'rollback')
    if (!commit) return
    this.#handedOut.get(durable)!.push(...deliveries.map(({ seq }) => seq))
    this.#held.push(...deliveries.map((delivery) => ({ durable, delivery })))
  }

  async #fetched(client: Session, { name, maxDeliver }: Durable, limit: number, waitMs: number, bytes: number): Promise<Delivery[]> {
    const { rows } = await client.query<{ seq: number; token: string }>(
      `select f.seq::int as seq, f.token
       from klieo.consumer_offsets o, klieo.fetch_messages(o.id, $2, $3, 12, $4, $5) f
       where o.durable = $1 and f.seq is not null`,
      [name, limit, waitMs, maxDeliver, bytes],
    )
    return rows
  }

  async #settle(): Promise<void> {
    if (this.#held.length === 0) return
    const [held] = this.#held.splice(this.pick(this.#held.length), 1)
    const { durable, delivery } = held!
    const choice = this.pick(20)
    if (choice < 12) await this.#ack(durable, delivery)
    else if (choice < 15) await this.#call('nak_deliveries($1, $2, $3, $4, true)', durable, delivery, [0])
    else if (choice < 17) await this.#call('release_deliveries($1, $2, $3)', durable, delivery)
    else if (choice < 19) {
      await this.#call('extend_deliveries($1, $2, $3, $4, true)', durable, delivery, [5])
      this.#held.push(held!)
    }
    // Else its holder is gone.
  }

  async #ack(durable: Durable, delivery: Delivery): Promise<void> {
    if (!(await this.#call('ack_deliveries($1, $2, $3, true)', durable, delivery))) return
    const key = `${durable.name} ${delivery.seq}`
    this.#acks.set(key, (this.#acks.get(key) ?? 0) + 1)
  }

  async #call(call: string, { name }: Durable, { seq, token }: Delivery, ...more: unknown[]): Promise<boolean> {
    const { rows } = await settler.query<{ id: number }>('select id from klieo.consumer_offsets where durable = $1', [name])
    const settled = await settler.query(`select * from klieo.${call}`, [[rows[0]!.id], [seq], [token], ...more])
    return settled.rows.length > 0
  }

  async #drain(durable: Durable): Promise<void> {
    for (let empty = 0; empty < 2; ) {
      await settler.query(
        `update klieo.deliveries set visible_at = clock_timestamp() - interval '1 s' where visible_at > clock_timestamp()`,
      )
      await settler.query('select * from klieo.reap_deliveries(1000)')
      const deliveries = await this.#fetched(settler, durable, 100, 100_000, 100_000)
      this.#handedOut.get(durable)!.push(...deliveries.map(({ seq }) => seq))
      for (const delivery of deliveries) await this.#ack(durable, delivery)
      empty = deliveries.length > 0 ? 0 : empty + 1
    }
  }
}

test('P3 P6 P8 P9 P13 whatever publishers, members and pruning do, each message of a committed transaction is settled once, in order', async () => {
  const end = performance.now() + WALKS_FOR_MS
  let seed = FIRST_SEED
  for (; performance.now() < end || seed - FIRST_SEED < LEAST_WALKS; seed++) {
    const walk = new Walk(seed)
    await walk.run()
    expect(await walk.faults(), `seed ${seed}`).toEqual([])
  }
}, 60_000)
