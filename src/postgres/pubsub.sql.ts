/** The statements of publish/subscribe. Whatever may run in a caller's transaction takes and answers text. */

/** $1 subjects, $2 payloads, $3 starts, $4 lengths, $5 headers or null, $6 message ids or null */
export const PUBLISH = `
  select p.seq::text as seq, p.duplicate::text as duplicate, pg_current_xact_id()::text as tx
  from klieo.publish_many($1::text::text[], $2::bytea, $3::text::int[], $4::text::int[], $5::text::text[], $6::text::text[]) p`

/** $1 name, $2 filter, $3 start seq, $4 start time in ms or null, $5 whether to start with what comes. Answers nothing if it exists. */
export const CREATE_DURABLE = `
  select id
  from klieo.create_durable($1, $2, $3, to_timestamp($4::double precision / 1000::double precision), $5) as id`

/** $1 name. The time as a number: as a timestamp it would be told in the time zone of the session. */
export const FIND_DURABLE = `select id, filter, extract(epoch from created_at)::text as made_at from klieo.find_durable($1)`

export const DELETE_DURABLE = `select klieo.delete_durable($1) as done`

/** $1 consumer, $2 messages, $3 ack wait in ms, $4 max ack pending, $5 max deliver or null, $6 bytes */
export const FETCH = `
  select seq, subject, headers, encode(payload, 'base64') as payload, date_part('epoch', published_at) * 1000::double precision as published_at_ms, attempt,
    token::text as token, more, final_due, due_in_ms
  from klieo.fetch_messages($1, $2, $3, $4, $5, $6)`

export const BURY = `select klieo.bury_deliveries($1, $2) as count`

/** $1 consumers, $2 seqs, $3 tokens, $4 whether to pass over locked rows. All settlements answer the positions that were still theirs. */
export const ACK = `
  select n::text as n
  from klieo.ack_deliveries($1::text::int[], $2::text::bigint[], $3::text::uuid[], $4::text::boolean) as n`

/** $1 consumers, $2 seqs, $3 tokens, $4 delays in ms, $5 whether to pass over locked rows */
export const NAK = `
  select n::text as n
  from klieo.nak_deliveries($1::text::int[], $2::text::bigint[], $3::text::uuid[], $4::text::bigint[], $5::text::boolean) as n`

/** $1 consumers, $2 seqs, $3 tokens, $4 ack waits in ms, $5 whether to pass over locked rows */
export const EXTEND = `
  select n::text as n, extended
  from klieo.extend_deliveries($1::text::int[], $2::text::bigint[], $3::text::uuid[], $4::text::bigint[], $5::text::boolean)`

/** $1 consumer, $2 seq, $3 token */
export const DELIVERY_WHEREABOUTS = `select klieo.delivery_whereabouts($1, $2, $3::text::uuid) as whereabouts`

/** $1 consumers, $2 seqs, $3 tokens */
export const RELEASE = `
  select n::text as n
  from klieo.release_deliveries($1::text::int[], $2::text::bigint[], $3::text::uuid[]) as n`
