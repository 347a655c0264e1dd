/** The statements of the job queue. Whatever may run in a caller's transaction takes and answers text. */

/** $1 queues, $2 payloads, $3 starts, $4 lengths, then or null: $5 headers, $6 dedup keys, $7 max attempts, $8 delays in ms, $9 due times, $10 priorities */
export const ENQUEUE = `
  select e.id::text as id, e.added::text as added, pg_current_xact_id()::text as tx
  from klieo.enqueue_many($1::text::text[], $2::bytea, $3::text::int[], $4::text::int[], $5::text::text[], $6::text::text[],
    $7::text::int[], $8::text::bigint[], $9::text::timestamptz[], $10::text::int[]) e`

/** The same on the bus's own connection, in one row: the ids in the order of the jobs, joined by commas. */
export const ENQUEUE_MANY = `
  select string_agg(e.id::text, ',') as ids
  from klieo.enqueue_many($1::text::text[], $2::bytea, $3::text::int[], $4::text::int[], $5::text::text[], $6::text::text[],
    $7::text::int[], $8::text::bigint[], $9::text::timestamptz[], $10::text::int[]) e`

/** A job with nothing but a payload, for a call that has nobody to share a statement with. $1 queue, $2 payload */
export const ENQUEUE_PLAIN = `select klieo.enqueue_one($1, $2)::text as id`

/** One job without a dedup key, likewise. $1 queue, $2 payload, $3 headers, $4 max attempts, $5 priority, $6 delay in ms, $7 due time or null */
export const ENQUEUE_ONE = `select klieo.enqueue_one($1, $2, $3, $4, $5, $6, $7)::text as id`

/**
 * $1 queue, $2 worker, $3 lease in ms, $4 jobs, $5 bytes, $6 how far ahead to look for the next job, in ms.
 * A last row without an id: `fence` 1 when dead letters were published on the way, `max_attempts` the ms to the next job.
 */
export const CLAIM = `
  select id::text as id, encode(payload, 'base64') as payload, headers, attempt, max_attempts, fence, token::text as token, date_part('epoch', expires_at) * 1000::double precision as expires_at_ms
  from klieo.take_jobs($1, $2, $3, $4, $5, $6)`

/** $1 id, $2 token */
export const JOB_WHEREABOUTS = `select klieo.job_whereabouts($1::text::bigint, $2::text::uuid) as whereabouts`

/** $1 ids, $2 tokens, $3 whether to pass over locked rows */
export const ACK_JOBS = `
  select id::text as id from klieo.ack_jobs($1::text::bigint[], $2::text::uuid[], $3::text::boolean) as id`

/** $1 id, $2 token */
export const ACK_JOB = `
  select klieo.ack_job($1, $2) as done`

/** $1 ids, $2 tokens, $3 delays in ms, $4 errors, $5 whether to pass over locked rows */
export const NAK_JOBS = `
  select id::text as id from klieo.nak_jobs($1::text::bigint[], $2::text::uuid[], $3::text::bigint[], $4::text::text[], $5::text::boolean) as id`

/** $1 ids, $2 tokens, $3 reasons, $4 whether to pass over locked rows */
export const DEAD_LETTER_JOBS = `
  select id::text as id from klieo.dead_letter_jobs($1::text::bigint[], $2::text::uuid[], $3::text::text[], $4::text::boolean) as id`

/** $1 ids, $2 tokens, $3 whether each attempt counts */
export const RELEASE_JOBS = `
  select id::text as id from klieo.release_jobs($1::text::bigint[], $2::text::uuid[], $3::text::boolean[]) as id`

/** $1 id, $2 token, $3 lease in ms, $4 whether to pass over a locked row */
export const HEARTBEAT_JOB = `
  select extract(epoch from h.until) * 1000::numeric as expires_at_ms, h.extended
  from klieo.heartbeat_job($1::text::bigint, $2::text::uuid, $3, $4) h`
