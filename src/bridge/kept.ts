/** What bridges keep in the key-value store of a bus. */

import { decode, isBusError, type KvStore } from '../core/index.ts'

const BUCKET = 'klieo-bridge'
const KEY = 'bus'

/** Names a bus in the ids and paths of what is relayed: drawn once, and kept in the bus. */
export async function idOf(kv: Pick<KvStore, 'get' | 'cas'>): Promise<string> {
  for (;;) {
    const found = await kv.get(BUCKET, KEY)
    if (found) return decode<string>(found.value)
    try {
      await kv.cas(BUCKET, KEY, JSON.stringify(crypto.randomUUID().slice(0, 8)), null)
    } catch (error) {
      if (!isBusError(error, 'cas_conflict')) throw error
    }
  }
}

/**
 * The longest ack wait that a bridge of the durable had. What one with a longer one had in hand comes back later than by the own; and a consumer of
 * NATS keeps that of its first one.
 */
export async function longestAckWait(kv: Pick<KvStore, 'get' | 'cas'>, durable: string, ackWaitMs: number): Promise<number> {
  const key = `ack-wait/${durable}`
  for (;;) {
    const found = await kv.get(BUCKET, key)
    const longest = found ? decode<number>(found.value) : 0
    if (longest >= ackWaitMs) return longest
    try {
      await kv.cas(BUCKET, key, JSON.stringify(ackWaitMs), found?.revision ?? null)
      return ackWaitMs
    } catch (error) {
      if (!isBusError(error, 'cas_conflict')) throw error
    }
  }
}
