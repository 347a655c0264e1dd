/** The fetch itself, called as a session of the test calls it, so that a race can be held open between its steps. */

import type pg from 'pg'

export interface Fetch {
  readonly maxMessages?: number
  readonly ackWaitMs?: number
  readonly maxAckPending?: number
}

export interface Fetched {
  readonly text: string
  readonly seq: number
  readonly attempt: number
  readonly token: string
}

interface FetchedRow {
  readonly seq: string | null
  readonly text: string
  readonly attempt: number
  readonly token: string
}

/** Hands out messages of the durable in the session's transaction, or in one of its own where none is open. */
export async function fetchIn(client: pg.ClientBase, schema: string, durable: string, options: Fetch = {}): Promise<Fetched[]> {
  const { maxMessages = 100, ackWaitMs = 60_000, maxAckPending = 1_000_000 } = options
  const { rows } = await client.query<FetchedRow>(
    `select f.seq, convert_from(f.payload, 'UTF8') as text, f.attempt, f.token
     from ${schema}.fetch_messages((select id from ${schema}.consumer_offsets where durable = $1), $2, $3, $4, null, 100000000) f
     where f.seq is not null`,
    [durable, maxMessages, ackWaitMs, maxAckPending],
  )
  return rows.map(({ seq, text, attempt, token }) => ({ seq: Number(seq), text, attempt, token }))
}

/** @returns those whose tokens were still valid */
export async function ackIn(client: pg.ClientBase, schema: string, durable: string, deliveries: readonly Fetched[]): Promise<Fetched[]> {
  const { rows } = await client.query<{ n: number }>(
    `select n
     from ${schema}.ack_deliveries(
       array_fill((select id from ${schema}.consumer_offsets where durable = $1), array[cardinality($2::bigint[])]),
       $2::bigint[], $3::uuid[]) as n`,
    [durable, deliveries.map(({ seq }) => seq), deliveries.map(({ token }) => token)],
  )
  return rows.map(({ n }) => deliveries[n - 1] as Fetched)
}
