/** A hundred thousand messages through the command, while it is killed and both servers go away and come back. */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { NatsBus } from '../../src/nats/index.ts'
import { type EmbeddedPostgres, startEmbeddedPostgres } from '../../src/testing/index.ts'
import { build, start } from '../cli/command.ts'
import type { Child } from '../support/child.ts'
import { type NatsServer, ownNatsServer, whyNoNats } from '../support/nats-server.ts'
import { eventually } from '../support/wait.ts'

const MESSAGES = 100_000
const BATCH = 500
const SUBJECTS = 40
const ASKS = 256
const LONG_MS = 180_000
const missing = process.env.NATS_URL ? 'it stops its server, and NATS_URL is not its own' : whyNoNats()

describe.skipIf(missing !== undefined)(`the bridge under faults${missing === undefined ? '' : ` (${missing})`}`, () => {
  let postgres: EmbeddedPostgres
  let nats: NatsServer

  beforeAll(async () => {
    ;[postgres, nats] = await Promise.all([startEmbeddedPostgres(), ownNatsServer(), build()])
  })
  afterAll(async () => {
    await postgres?.stop('immediate')
    await nats?.remove()
  })

  test('B1 B2 B3 B4 of 100,000 messages none is lost, doubled or out of order, whatever is killed', { timeout: 2 * LONG_MS }, async () => {
    const source = await PostgresBus.connect({ connectionString: postgres.connectionString })
    const fleet = await NatsBus.connect({ servers: nats.url })
    const consumer = await consume(fleet)

    const bridge = () =>
      start(['bridge', '--from', 'postgres', '--to', 'nats', '--subject', 'orders.>', '--ack-wait', '2s', '--every', '1s', '--json'], {
        env: { DATABASE_URL: postgres.connectionString, NATS_URL: nats.url },
      })
    let running: Child = bridge()
    const publishing = publishAll(source)
    const killBridge = async () => {
      running.kill('SIGKILL')
      await running.exited
      running = bridge()
    }
    const killNats = async () => {
      await nats.stop('SIGKILL')
      await nats.start()
    }
    const killPostgres = async () => {
      await postgres.kill()
      await postgres.restart()
    }
    const faults: readonly (readonly [string, () => Promise<unknown>])[] = [
      ['the bridge is killed', killBridge],
      ['NATS is killed', killNats],
      ['PostgreSQL is killed', killPostgres],
      ['the bridge is killed again', killBridge],
      ['NATS is stopped', () => nats.stop().then(nats.start)],
      ['PostgreSQL is stopped', () => postgres.restart()],
      ['all three at once', () => Promise.all([killBridge(), killNats(), killPostgres()])],
    ]
    for (const [index, [what, strike]] of faults.entries()) {
      const from = ((index + 1) * MESSAGES) / (faults.length + 1)
      await eventually(() => consumer.seen.size >= from, { timeoutMs: LONG_MS, everyMs: 20, what: `${from} messages, before ${what}` })
      // It strikes while there is something to strike.
      expect(consumer.seen.size, what).toBeLessThan(MESSAGES)
      await strike()
    }
    await publishing
    await eventually(() => consumer.seen.size >= MESSAGES, { timeoutMs: LONG_MS, everyMs: 50, what: 'all messages' }).catch((error) => {
      throw new Error(`${consumer.seen.size} of ${MESSAGES}; the bridge: ${running.stderr.slice(-2_000)}`, { cause: error })
    })

    running.kill('SIGINT')
    const last = await running.next(({ state }) => state === 'ended', 30_000)
    expect(await running.exited).toEqual({ code: 0, signal: null })
    expect(last).toMatchObject({ durable: 'bridge-orders-all', held: 0, refused: 0, skipped: 0 })
    // What came more than once is a redelivery of one stored message to the consumer, never a second message.
    expect(consumer.doubled).toEqual([])
    expect(consumer.outOfOrder()).toEqual([])
    const [durable] = await source.admin.durables()
    expect(durable).toMatchObject({ durable: 'bridge-orders-all', pending: 0, inFlight: 0, redelivering: 0 })
    await Promise.all([source.close(), fleet.close()])
  })
})

async function publishAll(bus: PostgresBus): Promise<void> {
  const message = (n: number) => ({ subject: `orders.s${n % SUBJECTS}`, payload: String(n) })
  for (let from = 0; from < MESSAGES; from += BATCH) {
    const batch = Array.from({ length: BATCH }, (_, n) => ({ ...message(from + n), msgId: `first-${from + n}` }))
    // It may have been stored where the answer was lost, and is sent again with the same ids.
    await eventually(() => bus.pubsub.publishMany(batch).then(() => true), { timeoutMs: 60_000, everyMs: 50, what: 'a publish' })
  }
}

async function consume(bus: NatsBus) {
  /** The number of a message on NATS, by what it says. */
  const seen = new Map<number, number>()
  const bySubject = new Map<string, (readonly [seq: number, n: number])[]>()
  const doubled: number[] = []
  const messages = (await bus.pubsub.subscribe('orders.>', 'fleet', { ackWaitMs: 5_000 }))[Symbol.asyncIterator]()
  const ask = () => {
    messages.next().then(({ done, value }) => {
      if (done) return
      const n = Number(Buffer.from(value.payload).toString())
      const seq = seen.get(n)
      if (seq === undefined) {
        seen.set(n, value.seq)
        const list = bySubject.get(value.subject) ?? []
        list.push([value.seq, n])
        bySubject.set(value.subject, list)
      } else if (seq !== value.seq) doubled.push(n)
      value.ack().catch(() => {})
      ask()
    })
  }
  for (let n = 0; n < ASKS; n++) ask()
  return {
    seen,
    doubled,
    /** By their numbers on NATS, those of a subject are to be as they were published. */
    outOfOrder(): string[] {
      const wrong: string[] = []
      for (const [subject, list] of bySubject) {
        const sorted = [...list].sort(([a], [b]) => a - b)
        for (const [index, [, n]] of sorted.entries()) if (index > 0 && n < (sorted[index - 1]?.[1] ?? 0)) wrong.push(`${subject}: ${n}`)
      }
      return wrong
    },
  }
}
