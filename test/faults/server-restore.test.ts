/** What else a dump holds besides messages: leases, fences, ids, dead jobs; and what it does not: a transaction that was only prepared. */

import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { findInstalled, type InstalledServer, runTool, startInstalled } from '../postgres/support/installed-postgres.ts'
import { outcome, Taker, text } from '../postgres/support/outcome.ts'
import { type Session, session } from '../support/sessions.ts'

const installed = await findInstalled()
const LONG_MS = 600_000
/** Held at the dump, so free again so long after it at the most. */
const SHORT_MS = 3_000

let directory: string
beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), 'klieo-dump-'))
})
afterAll(() => rm(directory, { recursive: true, force: true }))

/** Brings the cluster so many transaction ids ahead. */
const burn = (client: Session, count: number) =>
  client.query(`do $$ begin for n in 1..${count} loop perform pg_current_xact_id(); commit; end loop; end $$`)

async function allowPrepared(server: InstalledServer): Promise<void> {
  {
    await using client = await session(server.connectionString)
    await client.query('alter system set max_prepared_transactions = 4')
  }
  await server.moveTo(server.port)
}

async function copy(from: InstalledServer, target: InstalledServer, schema: string): Promise<void> {
  const file = join(directory, `${schema}.dump`)
  await runTool(installed as string, 'pg_dump', ['-Fc', '-n', schema, '-f', file, from.connectionString])
  await runTool(installed as string, 'pg_restore', ['--exit-on-error', '-d', target.connectionString, file])
}

describe.skipIf(installed === undefined)(`a restored dump${installed ? '' : ' (skipped: needs an installed Postgres)'}`, () => {
  test.each([
    ['a fresh cluster, whose transaction ids begin anew', 5_000, 0],
    ['a cluster that is ahead in transaction ids, where nothing need be repaired', 0, 20_000],
  ])(
    'P4 P7 P12 J3 J4 J5 J6 K1 K5 in %s',
    async (_, ahead, behind) => {
      const schema = `rest_${ahead}`
      await using source = await startInstalled(installed as string)
      await allowPrepared(source)
      await using client = await session(source.connectionString)
      if (ahead > 0) await burn(client, ahead)
      await using bus = await PostgresBus.connect({ connectionString: source.connectionString, schema, maintenance: false })
      await using stream = await bus.pubsub.subscribe('m', 'm', { ackWaitMs: SHORT_MS })
      const published = await bus.pubsub.publish('m', 'held', { msgId: 'held' })
      const message = await new Taker(stream).expect()
      const ready = await bus.jobs.enqueue('q', { payload: 'ready', dedupKey: 'ready' })
      const held = await bus.jobs.enqueue('q', { payload: 'held', priority: 1 })
      await bus.jobs.enqueue('dying', { payload: 'dead', dedupKey: 'dead' })
      const job = (await bus.jobs.claim('q', 'w', SHORT_MS))!
      expect(job.id).toBe(held)
      await (await bus.jobs.claim('dying', 'w', LONG_MS))!.deadLetter('by hand')
      const lease = await bus.kv.lease('b', 'held', LONG_MS)
      const released = await bus.kv.lease('b', 'released', LONG_MS)
      await released.release()
      await bus.kv.put('b', 'gone', 'v')
      const before = await bus.kv.put('b', 'k', 'v')
      await bus.kv.delete('b', 'gone')
      // Prepared and not committed: not in the dump, in no part.
      await client.query('begin')
      await bus.pubsub.publish('m', 'prepared', { tx: client, msgId: 'prepared' })
      await bus.jobs.enqueue('q', { payload: 'prepared', dedupKey: 'prepared' }, { tx: client })
      await bus.kv.put('b', 'prepared', 'v', { tx: client })
      await client.query(`prepare transaction 'open'`)
      await bus.pubsub.publish('m', 'unread')

      await using target = await startInstalled(installed as string)
      await using there = await session(target.connectionString)
      if (behind > 0) await burn(there, behind)
      await copy(source, target, schema)
      await client.query(`rollback prepared 'open'`)
      const { rows } = await there.query<{ restored: boolean }>(`select ${schema}.restored() as restored`)
      expect(rows[0]!.restored).toBe(ahead > 0)

      await using restored = await PostgresBus.connect({ connectionString: target.connectionString, schema, pollIntervalMs: 200 })
      expect(await restored.pubsub.publish('m', 'held', { msgId: 'held' })).toMatchObject({ duplicate: true, seq: published.seq })
      expect(await restored.pubsub.publish('m', 'again', { msgId: 'prepared' })).toMatchObject({ duplicate: false })
      await using restoredStream = await restored.pubsub.subscribe('m', 'm')
      const taker = new Taker(restoredStream)
      const came: [string, number][] = []
      while (came.length < 3) {
        const each = await taker.expect()
        came.push([text(each.payload), each.attempt])
        await each.ack()
      }
      expect(came.sort()).toEqual([
        ['again', 1],
        ['held', 2],
        ['unread', 1],
      ])

      expect(await restored.jobs.enqueue('q', { payload: 'ready', dedupKey: 'ready' })).toBe(ready)
      expect(text((await restored.kv.get('dedup.q', 'ready'))!.value)).toBe(ready)
      expect(await restored.kv.get('dedup.q', 'prepared')).toBeNull()
      expect(await restored.kv.get('b', 'prepared')).toBeNull()
      expect(Number(await restored.jobs.enqueue('q', { payload: 'new' }))).toBeGreaterThan(Number(held))
      const jobs = new Map<string, number>()
      while (jobs.size < 3) {
        const claimed = (await restored.jobs.claim('q', 'w', LONG_MS, { waitMs: 20_000 }))!
        jobs.set(text(claimed.payload), claimed.attempt)
        if (text(claimed.payload) === 'held') expect(claimed.lease.fence).toBeGreaterThan(job.lease.fence)
        await claimed.ack()
      }
      expect(Object.fromEntries(jobs)).toEqual({ held: 2, ready: 1, new: 1 })
      const { rows: dead } = await there.query(`select state, dedup_key from ${schema}.job_details`)
      expect(dead).toEqual([{ state: 'dead', dedup_key: 'dead' }])
      await using dlq = await restored.pubsub.subscribe('dying.dlq', 'dlq')
      expect((await new Taker(dlq).expect()).headers).toMatchObject({ dlq_reason: 'by hand', dlq_dedup_key: 'dead' })

      expect(await outcome(restored.kv.lease('b', 'held', LONG_MS))).toBe('lease_held')
      expect((await restored.kv.lease('b', 'released', LONG_MS)).fence).toBeGreaterThan(released.fence)
      expect((await restored.kv.lease('b', 'new', LONG_MS)).fence).toBeGreaterThan(lease.fence)
      expect(await restored.kv.cas('b', 'k', 'w', before)).toBeGreaterThan(before)
      expect(await restored.kv.cas('b', 'gone', 'w', null)).toBeGreaterThan(before)
      // The source lives on and knows nothing of it.
      expect(await outcome(message.ack())).toBe('ok')
    },
    90_000,
  )
})
