import type { KvPutOptions } from '../../src/index.ts'
import { Ref } from './compare.ts'
import { leftSeen } from './jobs-actions.ts'
import { collected, type OpenWatch, type Player, text } from './player.ts'
import { BUCKETS, KEY_FILTERS, KEYS, type Step } from './steps.ts'
import { GRAIN_MS } from './worlds.ts'

type Do<Name extends Step['do']> = Extract<Step, { do: Name }>

/** So far back there is none: a revision that never was. */
const NONE_BACK = 9
const NEVER = 999_999_999

export const kvActions = {
  async put(player: Player, { bus, ttlMs, ...place }: Do<'put'>, n: number) {
    const { kv } = await player.bus(bus)
    const { bucket, key, scope } = placeOf(place)
    player.start(`${n} put ${scope}`, kv.put(bucket, key, `v${n}`, ttl(ttlMs)), (revision) => player.revision(scope, revision))
  },

  async cas(player: Player, { bus, ttlMs, expected, ...place }: Do<'cas'>, n: number) {
    const { kv } = await player.bus(bus)
    const { bucket, key, scope } = placeOf(place)
    const known = expected === null ? null : revisionOf(player, scope, expected)
    player.start(`${n} cas ${scope}`, kv.cas(bucket, key, `v${n}`, known, ttl(ttlMs)), (revision) => player.revision(scope, revision))
  },

  async delete(player: Player, { bus, expected, ...place }: Do<'delete'>, n: number) {
    const { kv } = await player.bus(bus)
    const { bucket, key, scope } = placeOf(place)
    const options = expected === undefined ? {} : { expected: revisionOf(player, scope, expected) }
    player.start(`${n} delete ${scope}`, kv.delete(bucket, key, options), () => null)
  },

  async get(player: Player, { bus, ...place }: Do<'get'>, n: number) {
    const { kv } = await player.bus(bus)
    const { bucket, key, scope } = placeOf(place)
    player.start(`${n} get ${scope}`, kv.get(bucket, key), (entry) =>
      entry === null
        ? null
        : {
            key: entry.key,
            value: text(entry.value),
            revision: player.revision(scope, entry.revision),
            ageMs: Math.floor((player.world.now() - entry.updatedAt.getTime()) / GRAIN_MS) * GRAIN_MS,
          },
    )
  },

  async keys(player: Player, { bus, bucket, filter }: Do<'keys'>, n: number) {
    const { kv } = await player.bus(bus)
    const keys = collected(kv.keys(BUCKETS[bucket] as string, filter === undefined ? undefined : KEY_FILTERS[filter]))
    player.start(`${n} keys`, keys, (found) => found.toSorted())
  },

  async watch(player: Player, { bus, bucket: which, filter, updatesOnly }: Do<'watch'>, n: number) {
    const { kv } = await player.bus(bus)
    const bucket = BUCKETS[which] as string
    player.start(`${n} watch`, kv.watch(bucket, filter === undefined ? undefined : KEY_FILTERS[filter], { updatesOnly }), (watch) => {
      const open: OpenWatch = { watch, bucket, changes: [], over: false }
      player.watches.push(open)
      void follow(open)
      return 'watching'
    })
  },

  closeWatch(player: Player, { watch: back }: Do<'closeWatch'>, n: number) {
    const picked = player.pick(player.watches, back)
    if (!picked) return 'no watch'
    player.start(`${n} closeWatch`, picked.watch.close(), () => null)
    return undefined
  },

  async lease(player: Player, { bus, ttlMs, waitMs, ...place }: Do<'lease'>, n: number) {
    const { kv } = await player.bus(bus)
    const { bucket, key, scope } = placeOf(place)
    const awaited = `lease ${scope}`
    if (player.awaited.has(awaited)) return 'somebody waits'
    if (waitMs > 0) player.awaited.add(awaited)
    const leased = kv.lease(bucket, key, ttlMs, { waitMs }).finally(() => player.awaited.delete(awaited))
    player.start(`${n} lease ${scope}`, leased, (lease) => {
      player.leases.push({ lease, scope, released: false })
      return { fence: new Ref(`fence of ${scope}`, lease.fence), leftMs: waitMs === 0 ? leftSeen(player, lease.expiresAt) : null }
    })
    return undefined
  },

  settleLease(player: Player, { lease: back, how }: Do<'settleLease'>, n: number) {
    const picked = player.pickOpen(player.leases, back, ({ released }) => released)
    if (!picked) return 'no lease'
    const { lease, scope } = picked
    if (how === 'release') picked.released = true
    const settled = how === 'heartbeat' ? lease.heartbeat() : lease.release()
    player.start(`${n} ${how} of ${scope}`, settled, () => (how === 'heartbeat' ? leftSeen(player, lease.expiresAt) : null))
    return undefined
  },
}

async function follow(open: OpenWatch): Promise<void> {
  try {
    for await (const change of open.watch) open.changes.push(change)
    open.over = 'ended'
  } catch (error) {
    open.over = String(error)
  }
}

function placeOf({ bucket, key }: { readonly bucket: number; readonly key: number }) {
  const [inBucket, name] = [BUCKETS[bucket] as string, KEYS[key] as string]
  return { bucket: inBucket, key: name, scope: `${inBucket}/${name}` }
}

function revisionOf(player: Player, scope: string, back: number): number {
  return (back === NONE_BACK ? undefined : player.pick(player.revisions.get(scope) ?? [], back)) ?? NEVER
}

function ttl(ttlMs: number | undefined): KvPutOptions<never> {
  return ttlMs === undefined ? {} : { ttlMs }
}
