/** The end of a chaos run: waits until everything that could be consumed has been, and reads the tables. */

import type pg from 'pg'
import type { FinalState } from './record.ts'
import { BUCKET, DURABLES } from './world.ts'

/** What of the durable `o` nobody has fetched yet: the condition of the view `consumer_stats`. */
const UNREAD = `
  m.tx >= pg_snapshot_xmin(o.lo)
  and not pg_visible_in_snapshot(m.tx, o.lo)
  and not coalesce(pg_visible_in_snapshot(m.tx, o.hi) and (m.tx, m.seq) <= (o.pos_tx, o.pos_seq), false)
  and (m.subject = o.filter or m.subject ~ o.pattern)
  and m.seq >= o.start_seq and m.published_at >= o.start_time`

export interface Left {
  readonly unread: number
  readonly inFlight: number
  readonly jobs: number
  readonly prepared: number
}

/** In one snapshot: what moves from one place to another is in one of them. */
export async function whatIsLeft(client: pg.ClientBase): Promise<Left> {
  const { rows } = await client.query<Record<keyof Left, string>>(`
    select
      (select coalesce(sum(pending), 0) from klieo.consumer_stats) as unread,
      (select count(*) from klieo.deliveries) as "inFlight",
      (select count(*) from klieo.jobs where died_at is null) as jobs,
      (select count(*) from pg_prepared_xacts) as prepared`)
  const [row] = rows
  return { unread: Number(row!.unread), inFlight: Number(row!.inFlight), jobs: Number(row!.jobs), prepared: Number(row!.prepared) }
}

export function nothingIsLeft(left: Left): boolean {
  return Object.values(left).every((count) => count === 0)
}

export async function readFinalState(client: pg.ClientBase): Promise<FinalState> {
  const durables = await client.query<{ durable: string; filter: string; unsettled: string[] }>(`
    select o.durable, o.filter, coalesce(array_agg(u.seq) filter (where u.seq is not null), '{}') as unsettled
    from klieo.consumer_offsets o
    left join lateral (
      select d.seq from klieo.deliveries d where d.consumer_id = o.id
      union all
      select m.seq from klieo.messages m where ${UNREAD}
    ) u on true
    group by o.durable, o.filter`)
  const messages = await client.query<{ seq: string; payload_text: string | null; subject: string; headers: Record<string, string> }>(
    'select seq, payload_text, subject, headers from klieo.message_details order by seq',
  )
  const jobs = await client.query<{
    id: string
    payload_text: string
    queue: string
    state: string
    attempts: number
    max_attempts: number
  }>('select id, payload_text, queue, state, attempts, max_attempts from klieo.job_details order by id')
  const entries = await client.query<{ key: string; value: string; revision: string }>(
    `select key, convert_from(value, 'UTF8') as value, revision from klieo.kv_entries where bucket = $1 and value is not null order by key`,
    [BUCKET],
  )
  return {
    durables: durables.rows.map(({ durable, filter, unsettled }) => ({
      name: durable,
      filter,
      maxDeliver: DURABLES.find(({ name }) => name === durable)?.maxDeliver ?? null,
      unsettled: unsettled.map(Number),
    })),
    messages: messages.rows.map(({ seq, payload_text, subject, headers }) => ({ seq: Number(seq), id: payload_text, subject, headers })),
    jobs: jobs.rows.map(({ id, payload_text, queue, state, attempts, max_attempts }) => ({
      job: id,
      id: payload_text,
      queue,
      state,
      attempts,
      maxAttempts: max_attempts,
    })),
    entries: entries.rows.map(({ key, value, revision }) => ({ key, value, revision: Number(revision) })),
  }
}
