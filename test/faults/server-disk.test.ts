/** The disk of the server is full: first that of the tables, then that of the write-ahead log, which no server survives. */

import { randomBytes } from 'node:crypto'
import { rm, statfs, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { BusError, PostgresBus } from '../../src/index.ts'
import { startEmbeddedPostgres } from '../../src/testing/index.ts'
import { outcome, Taker, text } from '../postgres/support/outcome.ts'
import { session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { mountSmallDisk, whyNoSmallDisk } from './support/server/tmpfs.ts'

const why = await whyNoSmallDisk()
const unless = why === '' ? '' : ` (skipped: ${why})`
const MIB = 1024 * 1024
const LONG_MS = 600_000

/** Calls it again and again until it is refused. @returns how many succeeded, and the refusal */
async function until(call: (n: number) => Promise<unknown>, most = 20_000): Promise<{ succeeded: number; error: unknown }> {
  for (let n = 0; n < most; n++) {
    try {
      await call(n)
    } catch (error) {
      return { succeeded: n, error }
    }
  }
  throw new Error(`${most} calls succeeded`)
}

describe.skipIf(why !== '')(`a full disk${unless}`, () => {
  test('P1 J1 J5 P12 under the tables: publish and enqueue are unavailable, reads and acks go on, and with room all goes on by itself', async () => {
    await using server = await startEmbeddedPostgres({ settings: { autovacuum: 'off' } })
    await using disk = await mountSmallDisk(4)
    await using admin = await session(server.connectionString)
    await admin.query(`create tablespace small location '${disk.path}'`)
    await admin.query('alter database postgres set default_tablespace = small')
    await using bus = await PostgresBus.connect({ connectionString: server.connectionString, pollIntervalMs: 200, maintenance: false })
    await bus.kv.put('disk', 'k', 'v')
    await bus.pubsub.publishMany(['kept', 'acked', 'termed'].map((payload) => ({ subject: 'disk', payload })))
    await using stream = await bus.pubsub.subscribe('disk', 'disk', { ackWaitMs: LONG_MS, maxInFlight: 3 })
    const taker = new Taker(stream)
    const [kept, acked, termed] = [await taker.expect(), await taker.expect(), await taker.expect()]
    await bus.jobs.enqueueMany('held', [{ payload: 'acked' }, { payload: 'kept' }])
    const jobs = await bus.jobs.claimMany('held', 'w', LONG_MS, { limit: 2 })
    await using late = await bus.pubsub.subscribe('late', 'late')

    // Large ones until a large one has no room any more, then small ones until there is none at all.
    const stored = { messages: [] as string[], jobs: [] as string[] }
    const refused = { messages: [] as string[], jobs: [] as string[] }
    const publish = async (payload: string) => {
      try {
        await bus.pubsub.publish('late', payload, { msgId: payload.slice(0, 40) })
        stored.messages.push(payload)
      } catch (error) {
        refused.messages.push(payload)
        throw error
      }
    }
    const enqueue = async (payload: string) => {
      try {
        await bus.jobs.enqueue('late', { payload, dedupKey: payload.slice(0, 40) })
        stored.jobs.push(payload)
      } catch (error) {
        refused.jobs.push(payload)
        throw error
      }
    }
    const both = (payload: string) => (stored.jobs.length < stored.messages.length ? enqueue(payload) : publish(payload))
    for (const bytes of [48 * 1024, 3_000, 200]) {
      for (const fill of [both, publish, enqueue]) {
        const { error } = await until(() => fill(randomBytes(bytes).toString('base64')))
        expect(error).toBeInstanceOf(BusError)
        expect(error).toMatchObject({ code: 'unavailable', retryable: true, cause: { code: '53100' } })
      }
    }

    // A delete and a mark on a row need no room; what would write a new row may find none, and then says so.
    expect(text((await bus.kv.get('disk', 'k'))!.value)).toBe('v')
    expect(Math.min(stored.messages.length, stored.jobs.length)).toBeGreaterThan(0)
    const keys: string[] = []
    for await (const key of bus.kv.keys('disk')) keys.push(key)
    expect(keys).toEqual(['k'])
    expect(await outcome(acked.ack())).toBe('ok')
    expect(await outcome(termed.term())).toBe('ok')
    expect(await outcome(jobs[0]!.ack())).toBe('ok')
    const others = {
      extend: await outcome(kept.extend()),
      heartbeat: await outcome(jobs[1]!.heartbeat()),
      put: await outcome(bus.kv.put('disk', 'new', 'v'.repeat(100))),
      cas: await outcome(bus.kv.cas('disk', 'created', 'v', null)),
      lease: await outcome(bus.kv.lease('disk', 'lease', 1_000)),
      claim: await outcome(bus.jobs.claim('late', 'w', 1)),
      subscribe: await outcome(bus.pubsub.subscribe('late', 'new').then((opened) => opened.close())),
    }
    for (const [call, code] of Object.entries(others)) expect(['ok', 'unavailable'], call).toContain(code)

    // Whoever waits for something goes on by himself.
    const waiting = new Taker(late).take(60_000)
    await disk.resize(64)
    await eventually(async () => expect(await outcome(bus.pubsub.publish('disk', 'after'))).toBe('ok'))
    expect(await waiting).not.toBeNull()
    await kept.ack()
    const after = await taker.expect()
    expect(text(after.payload)).toBe('after')
    await after.ack()
    if (others.heartbeat === 'ok') expect(await outcome(jobs[1]!.ack())).toBe('ok')

    // What was refused was refused whole: neither message nor id, neither job nor record.
    const { rows } = await admin.query<{ kind: string; payloads: string[] }>(
      `select 'messages' as kind, array_agg(convert_from(payload, 'UTF8')) as payloads from klieo.messages where subject = 'late'
       union all select 'jobs', array_agg(convert_from(payload, 'UTF8')) from klieo.jobs where queue = 'late'`,
    )
    for (const { kind, payloads } of rows) expect(payloads.sort()).toEqual(stored[kind as 'messages' | 'jobs'].sort())
    for (const payload of refused.messages) {
      expect((await bus.pubsub.publish('late', payload, { msgId: payload.slice(0, 40) })).duplicate).toBe(false)
    }
    const recorded: string[] = []
    for await (const key of bus.kv.keys('dedup.late')) recorded.push(key)
    expect(recorded).toHaveLength(stored.jobs.length)
    const known = new Set(stored.jobs)
    expect(refused.jobs.some((payload) => known.has(payload))).toBe(false)
    await admin.query('alter database postgres reset default_tablespace')
    await stream.close()
    await late.close()
    await bus.close()
    await admin.query('drop schema klieo cascade')
    await admin.query('drop tablespace small')
  }, 240_000)

  test('P1 J1 K4 under the log: the server dies and comes back with room, nothing acknowledged is lost, and the bus goes on by itself', async () => {
    await using disk = await mountSmallDisk(160)
    const dataDir = join(disk.path, 'data')
    const settings = { min_wal_size: '32MB', max_wal_size: '32MB', autovacuum: 'off', wal_recycle: 'off', wal_init_zero: 'on' }
    await using server = await startEmbeddedPostgres({ dataDir, keep: false, settings })
    await using bus = await PostgresBus.connect({ connectionString: server.connectionString, pollIntervalMs: 200 })
    await using stream = await bus.pubsub.subscribe('log', 'log')
    const taker = new Taker(stream)
    await bus.pubsub.publish('log', 'before')
    await (await taker.expect()).ack()

    // All but a little of the room goes to a stranger; the next segment of the log needs 16 MiB.
    const { bavail, bsize } = await statfs(disk.path)
    const ballast = join(disk.path, 'ballast')
    await writeFile(ballast, Buffer.alloc(Math.max(0, bavail * bsize - 6 * MIB)))
    const acknowledged: string[] = []
    const codes: string[] = []
    let failures = 0
    for (let n = 0; n < 2_000 && failures < 5; n++) {
      const payload = `${n} ${randomBytes(8 * 1024).toString('base64')}`
      const code = await outcome(bus.kv.put('log', `${n % 4}`, payload).then(() => bus.jobs.enqueue('log', { payload: `${n}` })))
      codes.push(code)
      if (code === 'ok') acknowledged.push(`${n}`)
      else failures++
    }
    for (const code of codes) expect(['ok', 'unavailable', 'connection']).toContain(code)
    expect(failures).toBe(5)
    await rm(ballast)
    // It may have come back by itself as often as it died; one that has given up is started.
    await server.restart()
    await eventually(async () => expect(await outcome(bus.pubsub.publish('log', 'after'))).toBe('ok'), { timeoutMs: 20_000 })
    const message = await taker.expect(20_000)
    expect(text(message.payload)).toBe('after')
    await message.ack()
    await using admin = await session(server.connectionString)
    const { rows } = await admin.query<{ payload: string }>(
      `select convert_from(payload, 'UTF8') as payload from klieo.jobs where queue = 'log'`,
    )
    const there = new Set(rows.map(({ payload }) => payload))
    expect(acknowledged.filter((payload) => !there.has(payload))).toEqual([])
    await stream.close()
    await bus.close()
    await server.stop('immediate')
  }, 240_000)
})
