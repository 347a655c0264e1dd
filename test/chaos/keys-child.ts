/** Reads and writes a few hot keys, also in transactions, and holds leases: in time, too long, or until it is killed. */

import type { Lease } from '../../src/index.ts'
import type { Dice } from './dice.ts'
import { Member, text } from './member.ts'
import { Transaction } from './transaction.ts'
import { BUCKET, KEYS, LEASES } from './world.ts'

const WRITERS = 5
const WRITE_EVERY_MS = 130
const HOLDERS = 3
const HOLD_EVERY_MS = 250
const TTL_MS = 1_200

const member = await Member.start()

class Writer {
  readonly #dice: Dice
  /** What it saw last: a revision for a cas that others may have outrun. */
  readonly #seen = new Map<string, number | null>()

  constructor(name: string) {
    this.#dice = member.dice(name)
  }

  async step(): Promise<void> {
    const key = this.#dice.pick(KEYS)
    switch (this.#dice.weighted({ get: 30, put: 16, cas: 26, casOfSeen: 8, delete: 6, deleteIf: 6, transaction: 8 })) {
      case 'get':
        await this.#get(key)
        return
      case 'put':
        return this.#put(key)
      case 'cas':
        return this.#cas(key, await this.#get(key))
      case 'casOfSeen':
        return this.#cas(key, this.#seen.get(key) ?? null)
      case 'delete':
        return this.#delete(key)
      case 'deleteIf': {
        const revision = await this.#get(key)
        if (revision !== null) await this.#delete(key, revision)
        return
      }
      case 'transaction':
        return this.#transaction(key)
    }
  }

  async #get(key: string): Promise<number | null> {
    const { kv } = await member.bus()
    const entry = await member.call(
      { do: 'get', key },
      () => kv.get(BUCKET, key),
      (found) => ({ value: found && text(found.value), revision: found?.revision ?? null }),
    )
    this.#seen.set(key, entry?.revision ?? null)
    return entry?.revision ?? null
  }

  async #put(key: string, transaction?: Transaction): Promise<void> {
    const { kv } = await member.bus()
    const value = member.id()
    const revision = await member.call(
      { do: 'put', key, value, ...inside(transaction) },
      () => kv.put(BUCKET, key, value, options(transaction)),
      (put) => ({ revision: put }),
    )
    this.#seen.set(key, revision)
  }

  async #cas(key: string, expected: number | null, transaction?: Transaction): Promise<void> {
    const { kv } = await member.bus()
    const value = member.id()
    const revision = await member.call(
      { do: 'cas', key, value, expected, ...inside(transaction) },
      () => kv.cas(BUCKET, key, value, expected, options(transaction)),
      (put) => ({ revision: put }),
    )
    this.#seen.set(key, revision)
  }

  async #delete(key: string, expected?: number, transaction?: Transaction): Promise<void> {
    const { kv } = await member.bus()
    const condition = expected === undefined ? {} : { expected }
    await member.call({ do: 'delete', key, ...condition, ...inside(transaction) }, () =>
      kv.delete(BUCKET, key, { ...condition, ...options(transaction) }),
    )
    this.#seen.set(key, null)
  }

  async #transaction(first: string): Promise<void> {
    const dice = this.#dice
    const revision = await this.#get(first)
    const second = dice.chance(0.4) ? dice.pick(KEYS) : undefined
    const transaction = await Transaction.begin(member)
    await transaction.during(async () => {
      switch (dice.weighted({ put: 3, cas: 4, delete: 1, deleteIf: 1 })) {
        case 'put':
          await this.#put(first, transaction)
          break
        case 'cas':
          // Lost or not, the transaction goes on: a conflict does not abort it.
          await member.tolerated(this.#cas(first, revision, transaction))
          break
        case 'delete':
          await this.#delete(first, undefined, transaction)
          break
        case 'deleteIf':
          if (revision !== null) await member.tolerated(this.#delete(first, revision, transaction))
          break
      }
      if (second !== undefined) await this.#put(second, transaction)
      if (dice.chance(0.3)) await member.pause(dice.between(0, 600))
      if (dice.chance(0.75)) await transaction.commit()
      else await transaction.rollback()
    })
  }
}

function inside(transaction: Transaction | undefined): { tx?: string } {
  return transaction ? { tx: transaction.name } : {}
}

function options(transaction: Transaction | undefined): { tx?: Transaction['client'] } {
  return transaction ? { tx: transaction.client } : {}
}

class Holder {
  readonly #dice: Dice

  constructor(name: string) {
    this.#dice = member.dice(name)
  }

  async step(): Promise<void> {
    const dice = this.#dice
    const key = dice.pick(LEASES)
    const waitMs = dice.chance(0.4) ? 0 : dice.between(100, 3_000)
    const { kv } = await member.bus()
    const lease = await member.call(
      { do: 'lease', key, ttlMs: TTL_MS, waitMs },
      () => kv.lease(BUCKET, key, TTL_MS, { waitMs, signal: member.ended }),
      ({ fence }) => ({ fence }),
    )
    switch (dice.weighted({ short: 50, beats: 25, overrun: 15, forget: 10 })) {
      case 'short':
        await member.hold(dice.between(0, TTL_MS / 2))
        return this.#release(key, lease)
      case 'beats':
        for (let times = dice.between(1, 4); times > 0; times--) {
          await member.hold(TTL_MS * 0.5)
          await this.#beat(key, lease)
        }
        return this.#release(key, lease)
      case 'overrun':
        await member.hold(TTL_MS * (0.9 + dice.between(0, 10) / 10))
        await member.tolerated(this.#beat(key, lease))
        return this.#release(key, lease)
      case 'forget':
        return
    }
  }

  async #beat(key: string, lease: Lease): Promise<void> {
    await member.call({ do: 'leaseHeartbeat', key, fence: lease.fence, ttlMs: TTL_MS }, () => lease.heartbeat())
  }

  async #release(key: string, lease: Lease): Promise<void> {
    await member.call({ do: 'leaseRelease', key, fence: lease.fence, ttlMs: TTL_MS }, () => lease.release())
  }
}

for (let n = 1; n <= WRITERS; n++) {
  const writer = new Writer(`writer ${n}`)
  member.produces(WRITE_EVERY_MS, () => writer.step())
}
for (let n = 1; n <= HOLDERS; n++) {
  const holder = new Holder(`holder ${n}`)
  member.produces(HOLD_EVERY_MS, () => holder.step())
}
