/** The statements of request/reply. */

/**
 * Sends a request if a live responder takes its subject.
 * $1 id, $2 subject, $3 headers, $4 payload, $5 inbox, $6 timeout in ms, $7 channel, or null not to notify, $8 notification
 */
export const SEND = `select klieo.send_request($1::text::uuid, $2, $3, $4, $5, $6, $7, $8) as sent`

/** $1 id */
export const WITHDRAW = `select klieo.withdraw_request($1::text::uuid)`

/** $1 filter, $2 process, $3 how many */
export const CLAIM_REQUESTS = `select id::text as id, subject, headers, payload, left_ms from klieo.claim_requests($1, $2, $3)`

/**
 * Replies to a request that still waits and is still ours; the first reply removes it, so there is no second.
 * $1 id, $2 process, $3 whether the handler succeeded, $4 payload, $5 channel, or null not to notify, $6 notification, in which the inbox is '<inbox>'
 */
export const REPLY = `select klieo.reply_to_request($1::text::uuid, $2, $3, $4, $5, $6) as inbox`

/** $1 inbox */
export const PICK_UP = `select request_id::text as request_id, ok, payload from klieo.pick_up_replies($1)`

export const NEW_INSTANCE = `select klieo.new_instance() as id`

/** Held by a session as long as its process lives; see klieo.live_responders. $1 process */
export const BE_PRESENT = `select pg_advisory_lock(klieo.presence_class(), $1)`

/** Ends the session that is present for a process; who only looks holds another kind of lock. $1 process */
export const END_FORMER = `
  select pg_terminate_backend(l.pid)
  from pg_locks l
  where l.locktype = 'advisory'
    and l.granted
    and l.mode = 'ExclusiveLock'
    and l.objsubid = 2
    and l.classid = (klieo.presence_class()::bigint & 4294967295)::oid
    and l.objid = ($1::bigint & 4294967295)::oid
    and l.database = (select oid from pg_database where datname = current_database())`

/** The responders of a process, anew. $1 process, $2 filters, $3 null, or how long they count as live without another sign of life, in ms */
export const REGISTER = `select klieo.register_responders($1, $2::text::text[], $3)`

/** $1 process, $2 ms. Answers how many rows there are: a server crash empties the table. */
export const SIGN_OF_LIFE = `select klieo.sign_of_life($1, $2) as rows`
