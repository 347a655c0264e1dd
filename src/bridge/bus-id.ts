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
