/** The statements of administration. What is only looked at is read from the views. */

import type { JobState } from '../core/admin.ts'

export const QUEUES = `
  select queue, ready, scheduled, running, dead, date_part('epoch', oldest_ready_at) * 1000::double precision as oldest_ready_at_ms,
    date_part('epoch', paused_at) * 1000::double precision as paused_at_ms
  from klieo.queue_stats
  order by queue`

const JOB_COLUMNS = `
    id::text as id, queue, state, priority, attempts, max_attempts, date_part('epoch', enqueued_at) * 1000::double precision as enqueued_at_ms,
    date_part('epoch', run_at) * 1000::double precision as run_at_ms, date_part('epoch', leased_until) * 1000::double precision as leased_until_ms,
    worker_id, dedup_key, last_error, date_part('epoch', died_at) * 1000::double precision as died_at_ms, octet_length(payload) as payload_bytes`

/** How many jobs a statement lists, at the most. */
export const JOBS_PAGE = 500

const JOBS = `
  select ${JOB_COLUMNS}
  from klieo.job_details j
  where j.id > $1::text::bigint
  order by j.id
  limit ${JOBS_PAGE}`

// Nobody knows how many are in a state: an order that is asked for first is not got by sorting all that are.
const JOBS_IN_STATE = `
  select ${JOB_COLUMNS}
  from (select * from klieo.job_details j where j.id > $1::text::bigint and j.died_at is null order by j.id offset 0) j
  where j.state = $2::text
  order by j.id
  limit ${JOBS_PAGE}`

const DEAD_JOBS = `
  select ${JOB_COLUMNS}
  from klieo.job_details j
  where j.id > $1::text::bigint and j.died_at is not null
  order by j.id
  limit ${JOBS_PAGE}`

// The living and the dead of a queue have an index each.
const LIVING_JOBS_OF_QUEUE = `
  select ${JOB_COLUMNS}
  from klieo.job_details j
  where j.id > $1::text::bigint and j.queue = $2::text and j.died_at is null
  order by j.id
  limit ${JOBS_PAGE}`

const DEAD_JOBS_OF_QUEUE = `
  select ${JOB_COLUMNS}
  from klieo.job_details j
  where j.id > $1::text::bigint and j.queue = $2::text and j.died_at is not null
  order by j.id
  limit ${JOBS_PAGE}`

// By the number: `id` alone would be the text.
const JOBS_OF_QUEUE = `
  select *
  from ((${LIVING_JOBS_OF_QUEUE}) union all (${DEAD_JOBS_OF_QUEUE})) j
  order by j.id::bigint
  limit ${JOBS_PAGE}`

const JOBS_OF_QUEUE_IN_STATE = `
  select ${JOB_COLUMNS}
  from (
    select * from klieo.job_details j where j.id > $1::text::bigint and j.queue = $2::text and j.died_at is null order by j.id offset 0
  ) j
  where j.state = $3::text
  order by j.id
  limit ${JOBS_PAGE}`

/** $1 after this id, then the queue and the state where they are given, but for `dead`. */
export function jobsStatement(ofQueue: boolean, state: JobState | undefined): string {
  if (state === undefined) return ofQueue ? JOBS_OF_QUEUE : JOBS
  if (state === 'dead') return ofQueue ? DEAD_JOBS_OF_QUEUE : DEAD_JOBS
  return ofQueue ? JOBS_OF_QUEUE_IN_STATE : JOBS_IN_STATE
}

/** $1 id */
export const JOB = `
  select ${JOB_COLUMNS}, headers, encode(payload, 'base64') as payload
  from klieo.job_details j
  where j.id = $1::text::bigint`

/** $1 id. This one and the next two answer a row with an outcome and the queue, or none: there is no such job. */
export const RETRY_JOB = `select outcome, queue from klieo.retry_job($1::text::bigint)`

/** $1 id, $2 reason */
export const CANCEL_JOB = `select outcome, queue from klieo.cancel_job($1::text::bigint, $2)`

/** $1 id */
export const REMOVE_JOB = `select outcome, queue from klieo.remove_job($1::text::bigint)`

/** $1 queue */
export const RETRY_DEAD = `select klieo.retry_dead($1) as count`

/** $1 queue, $2 states, $3 how many */
export const PURGE_QUEUE = `select klieo.purge_queue($1, $2::text::text[], $3) as count`

/** $1 queue */
export const PAUSE_QUEUE = `select klieo.pause_queue($1)`

/** $1 queue */
export const RESUME_QUEUE = `select klieo.resume_queue($1)`

export const DURABLES = `
  select durable, filter, pending, in_flight, redelivering, date_part('epoch', last_active_at) * 1000::double precision as last_active_at_ms
  from klieo.consumer_stats
  order by durable`

/** $1 durable, $2 seq or null, $3 time in ms or null, $4 whether to start with what comes */
export const SEEK_DURABLE = `
  select klieo.seek_durable($1, $2, to_timestamp($3::double precision / 1000::double precision), $4) as done`

/** $1 filter, $2 time in ms or null, $3 and $4 position in the log, $5 how many to look at */
export const PURGE_MESSAGES = `
  select purged, last_tx::text as last_tx, last_seq
  from klieo.purge_messages_from($1, to_timestamp($2::double precision / 1000::double precision), $3::text::xid8, $4, $5)`

export const BUCKETS = `select bucket, keys, bytes from klieo.bucket_stats order by bucket`
