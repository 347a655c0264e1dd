/**
 * The statements of request/reply. The tables are unlogged, so these transactions wait for no disk, and a notification
 * sent along holds the commit lock for microseconds.
 */

/**
 * Sends a request if a live responder takes its subject. Its time runs from when the statement came in, whatever it waits for:
 * now() is the start of the transaction, and that is this statement.
 * $1 id, $2 subject, $3 headers, $4 payload, $5 inbox, $6 timeout in ms, $7 channel, or null not to notify, $8 notification
 */
export const SEND = `
  with live as materialized (
    select klieo.live_responders($2) as yes
  ), sent as (
    insert into klieo.requests (id, subject, headers, payload, inbox, deadline)
    select $1::uuid, $2, $3::jsonb, $4, $5, now() + make_interval(secs => $6::double precision / 1000)
    from live
    where live.yes
    returning 1
  ), told as (
    select case when $7::text is not null then pg_notify($7, $8)::text end from sent
  )
  select (select count(*) from told)::int as sent`

/** $1 id */
export const WITHDRAW = `delete from klieo.requests where id = $1::uuid`

/** $1 filter, $2 process, $3 how many */
export const CLAIM_REQUESTS = `
  with open as materialized (
    select r.id
    from klieo.requests r
    where r.claimed_by is null and r.deadline > (select clock_timestamp()) and r.subject ~ (select klieo.filter_pattern($1))
    order by r.deadline
    limit $3
    for no key update skip locked
  )
  update klieo.requests r
  set claimed_by = $2
  from open
  where r.id = open.id
  returning r.id::text as id, r.subject, r.headers, r.payload, extract(epoch from r.deadline - clock_timestamp()) * 1000 as left_ms`

/**
 * Replies to a request that still waits and is still ours; the first reply removes it, so there is no second.
 * $1 id, $2 process, $3 whether the handler succeeded, $4 payload, $5 channel, or null not to notify, $6 notification, in which the inbox is '<inbox>'
 */
export const REPLY = `
  with answered as (
    delete from klieo.requests r
    where r.id = $1::uuid and r.claimed_by = $2 and r.deadline > clock_timestamp()
    returning r.id, r.inbox, r.deadline
  ), reply as (
    insert into klieo.replies (request_id, inbox, ok, payload, expires_at)
    select a.id, a.inbox, $3, $4, a.deadline from answered a
    on conflict do nothing
    returning inbox
  )
  select reply.inbox, case when $5::text is not null then pg_notify($5, replace($6, '<inbox>', reply.inbox))::text end from reply`

/** $1 inbox */
export const PICK_UP = `
  delete from klieo.replies where inbox = $1 returning request_id::text as request_id, ok, payload`

export const NEW_INSTANCE = `select nextval('klieo.instance_id')::int as id`

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
export const REGISTER = `
  with gone as (
    delete from klieo.responders where instance_id = $1
  )
  insert into klieo.responders (instance_id, filter, pattern, alive_until)
  select $1, f.filter, klieo.filter_pattern(f.filter), clock_timestamp() + make_interval(secs => $3::double precision / 1000)
  from unnest($2::text::text[]) as f(filter)`

/** $1 process, $2 ms. Answers how many rows there are: a server crash empties the table. */
export const SIGN_OF_LIFE = `
  with alive as (
    update klieo.responders
    set alive_until = clock_timestamp() + make_interval(secs => $2::double precision / 1000)
    where instance_id = $1
    returning 1
  )
  select count(*)::int as rows from alive`
