/** A transaction of a chaos run's own, whose end is in the record. */

import type pg from 'pg'
import { takeClient } from '../../src/postgres/sockets.ts'
import type { Dice } from './dice.ts'
import type { Member } from './member.ts'

let transactions = 0

export class Transaction {
  readonly name: string
  readonly client: pg.PoolClient
  readonly #member: Member
  #savepoints = 0
  #over = false

  static async begin(member: Member): Promise<Transaction> {
    const client = await takeClient(member.pool, ignore)
    const transaction = new Transaction(member, client)
    try {
      await client.query('begin')
    } catch (error) {
      transaction.#release(true)
      throw error
    }
    return transaction
  }

  private constructor(member: Member, client: pg.PoolClient) {
    this.#member = member
    this.name = `${member.name}.t${++transactions}`
    this.client = client
  }

  async commit(): Promise<void> {
    await this.#end('commit', async () => {
      const { command } = await this.client.query('commit')
      if (command !== 'COMMIT') throw Object.assign(new Error('the transaction was aborted'), { code: 'rolled_back' })
    })
  }

  async rollback(): Promise<void> {
    await this.#end('rollback', async () => void (await this.client.query('rollback')))
  }

  /** Somebody else ends it: see {@link resolveOne}. */
  async prepare(): Promise<void> {
    let failed = true
    try {
      await this.client.query(`prepare transaction '${this.name}'`)
      failed = false
    } finally {
      this.#release(failed)
    }
  }

  /** Runs `work` within a savepoint. @param keep false: what was done since is undone */
  async savepoint(keep: boolean, work: (name: string) => Promise<void>): Promise<void> {
    const name = `s${++this.#savepoints}`
    const tx = `${this.name}/${name}`
    await this.client.query(`savepoint ${name}`)
    await work(tx)
    if (keep) await this.client.query(`release savepoint ${name}`)
    else await this.#member.call({ do: 'rollback', tx }, async () => void (await this.client.query(`rollback to savepoint ${name}`)))
  }

  /** What fails in it ends it. */
  async during<T>(work: () => Promise<T>): Promise<T> {
    try {
      return await work()
    } catch (error) {
      if (!this.#over) await this.rollback().catch(() => {})
      throw error
    }
  }

  async #end(how: 'commit' | 'rollback', make: () => Promise<void>): Promise<void> {
    let failed = true
    this.#over = true
    try {
      await this.#member.call({ do: how, tx: this.name }, make)
      failed = false
    } finally {
      this.#release(failed)
    }
  }

  #release(broken: boolean): void {
    this.#over = true
    giveBack(this.client, broken)
  }
}

const ignore = () => {}

/** Work with a connection of the pool's. */
export async function withClient<T>(pool: pg.Pool, work: (client: pg.PoolClient) => Promise<T>): Promise<T> {
  const client = await takeClient(pool, ignore)
  let broken = true
  try {
    const result = await work(client)
    broken = false
    return result
  } finally {
    giveBack(client, broken)
  }
}

/** The listener stays with a connection that is to be ended: it may break before it is gone. */
function giveBack(client: pg.PoolClient, broken: boolean): void {
  if (!broken) client.off('error', ignore)
  client.release(broken)
}

/** Ends one of the prepared transactions, whoever's it is, unless somebody else is about to. @returns whether there was one */
export async function resolveOne(member: Pick<Member, 'call'>, client: pg.ClientBase, dice: Dice, olderThanMs: number): Promise<boolean> {
  const { rows } = await client.query<{ gid: string }>(
    `select gid from pg_prepared_xacts where prepared <= clock_timestamp() - $1 * interval '1 ms' order by gid`,
    [olderThanMs],
  )
  if (rows.length === 0) return false
  const { gid } = dice.pick(rows)
  const locked = await client.query<{ mine: boolean }>('select pg_try_advisory_lock(hashtext($1)) as mine', [gid])
  if (!locked.rows[0]!.mine) return true
  try {
    const how = dice.chance(0.7) ? 'commit' : 'rollback'
    await member.call({ do: how, tx: gid }, async () => void (await client.query(`${how} prepared '${gid}'`)))
  } finally {
    await client.query('select pg_advisory_unlock(hashtext($1))', [gid])
  }
  return true
}
