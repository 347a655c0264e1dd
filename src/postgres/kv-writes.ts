/**
 * Puts, conditional writes and deletions of one process, gathered into one statement (docs/adr/0007-kv-batches.md).
 *
 *   waiting ─▶ batch ─▶ done        what is asked for within a tick, or while the batch before is under way
 *                 └──▶ lane ─▶ done   a key was locked by somebody's open transaction: nothing was written
 *
 * A lane is the queue of one key, with a statement of its own that waits as long as the lock takes and holds nobody else up. While
 * a key has a lane all its writes go there, so they stay in the order of their calls. Writes of one key in a batch are made one
 * after the other, in rounds.
 */

import type { Revision } from '../core/index.ts'
import { Batcher } from '../runtime/batcher.ts'
import type { Topic } from '../runtime/bell.ts'
import { asBuffer, pgArray, pgArrayOrNull } from './arrays.ts'
import type { Context } from './context.ts'
import type { PostgresTx, Row } from './database.ts'
import { sqlState } from './errors.ts'
import { WRITE, WRITE_SOON } from './kv.sql.ts'

const MAX_BATCH_BYTES = 4 * 1024 * 1024
const LOCK_NOT_AVAILABLE = '55P03'

export interface Write {
  readonly bucket: string
  readonly key: string
  /** `null`: a deletion. */
  readonly value: Uint8Array | null
  /** A revision, 0 for absent, `null` for anything. */
  readonly expected: Revision | null
  readonly ttlMs: number | null
  readonly doing: 'put' | 'cas' | 'delete'
}

export interface Written {
  /** `null`: it lost, or there was nothing to delete. */
  readonly revision: Revision | null
  /** What a conditional write that lost has found; `null`: absent. */
  readonly actual: Revision | null
}

interface WrittenRow extends Row {
  readonly revisions: string
  readonly actuals: string
  readonly tx?: string | null
}

interface Lane {
  readonly batcher: Batcher<Write, Written>
  underWay: number
}

const LIMITS = { weight: ({ value }: Write) => value?.byteLength ?? 0, maxWeight: MAX_BATCH_BYTES }

export class KvWrites {
  readonly #context: Context
  readonly #lanes = new Map<string, Lane>()
  readonly #batches: Batcher<Write, Written>

  constructor(context: Context) {
    this.#context = context
    this.#batches = new Batcher((writes) => this.#writeSoon(writes), LIMITS)
  }

  write(write: Write): Promise<Written> {
    return this.#batches.add(write)
  }

  /** In the caller's transaction: waits for whoever has the key, and is told of after the commit. */
  async writeIn(tx: PostgresTx, write: Write): Promise<Written> {
    const { text, restore } = parameters([write])
    const [row] = await this.#context.db.queryIn<WrittenRow>(tx, WRITE, text, write.doing, { rows: 1, columns: ['revisions', 'actuals'] })
    const [written] = restore(row)
    if (written?.revision != null && row?.tx != null) this.#context.ringer.afterCommit(row.tx, topics([write], [written]))
    return written as Written
  }

  async #writeSoon(writes: readonly Write[]): Promise<(Written | Promise<Written>)[]> {
    const free = this.#lanes.size === 0 ? writes : writes.filter((write) => !this.#lanes.has(idOf(write)))
    let written: readonly Written[] | undefined
    try {
      written = free.length === 0 ? [] : await this.#send(WRITE_SOON, free)
    } catch (error) {
      if (!isLocked(error)) throw error
    }
    if (written !== undefined && free === writes) return [...written]
    const outcomes = new Map(written?.map((one, index) => [free[index], one]))
    return writes.map((write) => outcomes.get(write) ?? this.#inLane(write))
  }

  async #inLane(write: Write): Promise<Written> {
    const id = idOf(write)
    const lane = this.#lanes.get(id) ?? { batcher: new Batcher<Write, Written>((writes) => this.#send(WRITE, writes), LIMITS), underWay: 0 }
    this.#lanes.set(id, lane)
    lane.underWay++
    try {
      return await lane.batcher.add(write)
    } finally {
      if (--lane.underWay === 0) this.#lanes.delete(id)
    }
  }

  async #send(statement: string, writes: readonly Write[]): Promise<Written[]> {
    const { text, restore } = parameters(writes)
    const [row] = await this.#context.db.query<WrittenRow>(statement, text, writes[0]?.doing ?? 'put')
    const written = restore(row)
    this.#context.ringer.ring(topics(writes, written))
    return written
  }
}

/** No bucket holds a slash. */
function idOf({ bucket, key }: Write): string {
  return `${bucket}/${key}`
}

function isLocked(error: unknown): boolean {
  return sqlState((error as { cause?: unknown }).cause) === LOCK_NOT_AVAILABLE
}

function topics(writes: readonly Write[], written: readonly Written[]): Topic[] {
  const buckets = new Set<string>()
  for (const [index, { bucket }] of writes.entries()) if (written[index]?.revision != null) buckets.add(bucket)
  return [...buckets].map((name) => ({ kind: 'bucket', name }))
}

interface Parameters {
  readonly text: unknown[]
  /** The answer in the order of the writes. */
  restore(row: WrittenRow | undefined): Written[]
}

/** The n-th write of a key is in the n-th round, and within a round all are in the order that every process has. */
function parameters(writes: readonly Write[]): Parameters {
  const rounds = new Map<string, number>()
  const ordered = writes.map((write, index) => {
    const id = idOf(write)
    const round = (rounds.get(id) ?? 0) + 1
    rounds.set(id, round)
    return { write, index, id, round }
  })
  if (ordered.length > 1) ordered.sort((a, b) => a.round - b.round || (a.id < b.id ? -1 : 1))
  const ends = ordered.flatMap(({ round }, n) => (round === ordered[n + 1]?.round ? [] : [n + 1]))
  let length = 0
  const starts: number[] = []
  const values: Uint8Array[] = []
  for (const { write } of ordered) {
    starts.push(length + 1)
    length += write.value?.byteLength ?? 0
    if (write.value !== null) values.push(write.value)
  }
  const column = (of: (write: Write) => string | number | null) => pgArray(ordered.map(({ write }) => of(write)))
  return {
    text: [
      column(({ bucket }) => bucket),
      column(({ key }) => key),
      values.length === 1 ? asBuffer(values[0] as Uint8Array) : Buffer.concat(values),
      pgArray(starts),
      column(({ value }) => value?.byteLength ?? null),
      column(({ expected }) => expected),
      pgArrayOrNull(
        ordered.map(({ write }) => write.ttlMs),
        null,
      ),
      ends.length > 1 ? pgArray(ends) : null,
    ],
    restore: (row) => {
      const revisions = numbers(row?.revisions)
      const actuals = numbers(row?.actuals)
      const restored = new Array<Written>(writes.length)
      for (const [n, { index }] of ordered.entries()) restored[index] = { revision: revisions[n] ?? null, actual: actuals[n] ?? null }
      return restored
    },
  }
}

/** A Postgres array of numbers. */
function numbers(text: string | undefined): (number | null)[] {
  return (text ?? '{}')
    .slice(1, -1)
    .split(',')
    .map((item) => (item === 'NULL' || item === '' ? null : Number(item)))
}
