/** Leases of the key-value store, and the buckets of the bus: K5, J5. */

import assert from 'node:assert/strict'
import type { Bus, Lease } from '../../core/types.ts'
import {
  ascending,
  eventually,
  PATIENCE_MS,
  pause,
  QUIET_MS,
  rejects,
  type Suite,
  sameBytes,
  succeeds,
  TICK_MS,
  timed,
  unique,
  within,
  withinASecond,
} from './kit.ts'

/** Short enough to wait for. */
const TTL_MS = 500
/** Not over while a test runs. */
const LONG_TTL_MS = 60_000

export function leaseTests<Tx>(suite: Suite<Tx>): void {
  suite.group('leases', () => {
    suite.test('K5 while a lease is live another one is refused, on every handle and on the same', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      const lease = await bus.kv.lease(bucket, 'k', LONG_TTL_MS)
      assert.ok(Number.isSafeInteger(lease.fence))
      assert.ok(Math.abs(lease.expiresAt.getTime() - Date.now() - LONG_TTL_MS) < 30_000)
      assert.equal(lease.signal.aborted, false)
      for (const handle of [other, bus]) {
        const error = await rejects(handle.kv.lease(bucket, 'k', LONG_TTL_MS), 'lease_held')
        assert.equal(error.retryable, true)
      }
      await other.kv.lease(bucket, 'k2', LONG_TTL_MS)
      await other.kv.lease(`${bucket}.x`, 'k', LONG_TTL_MS)
      await lease.heartbeat()
    })

    suite.test('K5 release frees the key at once and may be called again', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      const first = await bus.kv.lease(bucket, 'k', LONG_TTL_MS)
      await first.release()
      await first.release()
      const second = await other.kv.lease(bucket, 'k', LONG_TTL_MS)
      await first.release()
      await rejects(first.heartbeat(), 'lease_lost')
      await rejects(bus.kv.lease(bucket, 'k', LONG_TTL_MS), 'lease_held')
      await second.heartbeat()
    })

    suite.test('K5 await using releases', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      {
        await using _lease: Lease = await bus.kv.lease(bucket, 'k', LONG_TTL_MS)
        await rejects(bus.kv.lease(bucket, 'k', LONG_TTL_MS), 'lease_held')
      }
      await bus.kv.lease(bucket, 'k', LONG_TTL_MS)
    })

    suite.test('K5 a lease ends when its ttl is over, and not before', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      const asked = performance.now()
      await bus.kv.lease(bucket, 'k', TTL_MS)
      await eventually(() => succeeds(other.kv.lease(bucket, 'k', LONG_TTL_MS), 'lease_held'), 'the end of the lease')
      const took = performance.now() - asked
      assert.ok(took >= TTL_MS - TICK_MS, `free after ${took} ms`)
    })

    suite.test('K5 heartbeats keep it for as long as they come', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      const lease = await bus.kv.lease(bucket, 'k', 2_500)
      let expiresAt = lease.expiresAt.getTime()
      for (let beat = 0; beat < 5; beat++) {
        await pause(600)
        await lease.heartbeat()
        assert.ok(lease.expiresAt.getTime() > expiresAt, 'a heartbeat extends')
        expiresAt = lease.expiresAt.getTime()
        await rejects(other.kv.lease(bucket, 'k', LONG_TTL_MS), 'lease_held')
      }
      assert.equal(lease.signal.aborted, false)
    })

    suite.test('K5 expiry is strict: afterwards heartbeat is refused even if nobody took the lease', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const lease = await bus.kv.lease(bucket, 'k', 300)
      await pause(450)
      for (let tries = 0; tries < 2; tries++) await rejects(lease.heartbeat(), 'lease_lost')
      await lease.release()
      await bus.kv.lease(bucket, 'k', LONG_TTL_MS)
    })

    suite.test('K5 a lost lease can do nothing to the new holder', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      const lost = await bus.kv.lease(bucket, 'k', 300)
      const holder = await other.kv.lease(bucket, 'k', LONG_TTL_MS, { waitMs: PATIENCE_MS })
      await rejects(lost.heartbeat(), 'lease_lost')
      await lost.release()
      await lost[Symbol.asyncDispose]()
      await rejects(bus.kv.lease(bucket, 'k', LONG_TTL_MS), 'lease_held')
      await holder.heartbeat()
    })

    suite.test('K5 the signal is aborted when the lease is known to be lost', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const asked = performance.now()
      const lease = await bus.kv.lease(bucket, 'k', 300)
      const aborted = Promise.withResolvers<void>()
      lease.signal.addEventListener('abort', () => aborted.resolve())
      await within(aborted.promise, 3_000, 'the abort')
      assert.ok(performance.now() - asked >= 300 - 100)
      const released = await bus.kv.lease(bucket, 'other', 300)
      await released.release()
      await pause(450)
      assert.equal(released.signal.aborted, false, 'a lease that was released was not lost')
    })

    suite.test('K5 waitMs waits for the holder to release', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      const holder = await bus.kv.lease(bucket, 'k', LONG_TTL_MS)
      const waiting = other.kv.lease(bucket, 'k', LONG_TTL_MS, { waitMs: 20_000 })
      assert.equal(await Promise.race([waiting, pause(QUIET_MS)]), undefined)
      await holder.release()
      const lease = await within(waiting, 3_000, 'the lease')
      assert.ok(lease.fence > holder.fence)
      await lease.heartbeat()
    })

    suite.test('K5 waitMs waits for the lease of a dead holder to run out', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      const asked = performance.now()
      await bus.kv.lease(bucket, 'k', 700)
      const granted = performance.now()
      await other.kv.lease(bucket, 'k', LONG_TTL_MS, { waitMs: 20_000 })
      assert.ok(performance.now() - asked >= 700 - TICK_MS)
      assert.ok(performance.now() - granted <= 700 + 1_500, 'soon after the expiry')
    })

    suite.test('K5 waitMs over: lease_held, and not before', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      await bus.kv.lease(bucket, 'k', LONG_TTL_MS)
      const ms = await timed(() => rejects(other.kv.lease(bucket, 'k', LONG_TTL_MS, { waitMs: 400 }), 'lease_held'))
      assert.ok(ms >= 400 - TICK_MS && ms < 3_000, `took ${ms} ms`)
    })

    suite.test('K5 an abort ends the waiting, and no lease is granted to nobody', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      const holder = await bus.kv.lease(bucket, 'k', LONG_TTL_MS)
      const controller = new AbortController()
      const waiting = other.kv.lease(bucket, 'k', LONG_TTL_MS, { waitMs: 20_000, signal: controller.signal })
      waiting.catch(() => {})
      await pause(50)
      controller.abort()
      await withinASecond(assert.rejects(waiting), bus, 'the end of the waiting')
      await holder.release()
      await other.kv.lease(bucket, 'k', LONG_TTL_MS)
    })

    suite.test('K5 of any number of concurrent acquirers one gets it', async (stage) => {
      const buses = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      const outcomes = await Promise.all(
        Array.from({ length: 20 }, (_, index) => succeeds(buses[index % 2]!.kv.lease(bucket, 'k', LONG_TTL_MS), 'lease_held')),
      )
      assert.equal(outcomes.filter(Boolean).length, 1)
    })

    suite.test('K5 those who wait get it one after the other, and never two at once', async (stage) => {
      const buses = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      let holders = 0
      const fences: number[] = []
      const acquire = async (bus: Bus<Tx>) => {
        const lease = await bus.kv.lease(bucket, 'k', LONG_TTL_MS, { waitMs: 20_000 })
        assert.equal(++holders, 1)
        fences.push(lease.fence)
        await pause(5)
        holders--
        await lease.release()
      }
      await Promise.all(Array.from({ length: 10 }, (_, index) => acquire(buses[index % 2]!)))
      ascending(fences)
    })

    suite.test('K5 the fence grows through release, expiry and whatever happens to the value', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      const fences: number[] = []
      for (let round = 0; round < 3; round++) {
        const released = await bus.kv.lease(bucket, 'k', LONG_TTL_MS)
        fences.push(released.fence)
        await released.heartbeat()
        assert.equal(released.fence, fences.at(-1), 'a heartbeat is no grant')
        await released.release()
        await bus.kv.put(bucket, 'k', 'x')
        await bus.kv.delete(bucket, 'k')
        fences.push((await other.kv.lease(bucket, 'k', 300)).fence)
        const next = await bus.kv.lease(bucket, 'k', LONG_TTL_MS, { waitMs: PATIENCE_MS })
        fences.push(next.fence)
        await next.release()
      }
      ascending(fences)
    })

    suite.test('K5 a lease does not touch the value of the key, nor the value the lease', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const lease = await bus.kv.lease(bucket, 'k', LONG_TTL_MS)
      assert.equal(await bus.kv.get(bucket, 'k'), null)
      for await (const key of bus.kv.keys(bucket)) assert.fail(`no key was due, but ${key} came`)
      const revision = await bus.kv.cas(bucket, 'k', 'x', null)
      await lease.heartbeat()
      await lease.release()
      const entry = await bus.kv.get(bucket, 'k')
      assert.equal(entry?.revision, revision)
      sameBytes(entry!.value, 'x')
      await bus.kv.lease(bucket, 'k', LONG_TTL_MS)
      await bus.kv.delete(bucket, 'k', { expected: revision })
      await rejects(bus.kv.lease(bucket, 'k', LONG_TTL_MS), 'lease_held')
    })

    suite.test('K5 closing the bus frees its leases at once', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const bucket = unique('b')
      const lease = await bus.kv.lease(bucket, 'k', LONG_TTL_MS)
      await bus.close()
      assert.equal(lease.signal.aborted, true)
      await other.kv.lease(bucket, 'k', LONG_TTL_MS)
      await lease.release()
      await rejects(other.kv.lease(bucket, 'k', LONG_TTL_MS), 'lease_held')
    })
  })
}
