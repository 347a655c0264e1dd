/** What the calls of all contracts do with their arguments. */

import { type Bus, BusError, checkBatch, checkEach, invalid, isBusError, reading } from '../core/index.ts'
import type { Maybe } from './format.ts'

export type BusPart = 'pubsub' | 'requestReply' | 'kv' | 'jobs'

/** @throws invalid_argument for what is no bus */
export function partOf<Tx, K extends BusPart>(bus: Pick<Bus<Tx>, K>, part: K): Bus<Tx>[K] {
  const found = reading('bus', bus, () => (typeof bus === 'object' && bus !== null ? bus[part] : undefined))
  if (typeof found !== 'object' || found === null) throw invalid('bus', bus, `must be a bus, with its ${part}`)
  return found
}

/**
 * Writes all of a batch, or rejects with the first that is refused, named by its place. All are read before it waits for one.
 * @throws invalid_argument
 */
export async function writeEach<I, O>(argument: string, items: readonly I[], write: (item: I) => Maybe<O>): Promise<O[]> {
  checkBatch(argument, items)
  const written = checkEach(argument, items, (item) => item).map(async (item, index) => {
    try {
      return await write(item)
    } catch (error) {
      if (!isBusError(error)) throw error
      throw new BusError(error.code, `${argument}[${index}]: ${error.message}`, { cause: error.cause })
    }
  })
  return await Promise.all(written)
}
