/** What is asked of the server to tell how it is. Of the catalogs, and of the views that readers may look at. */

/** Connections by database: of sessions that are not its own a role sees no kind. */
export const SERVER = `
  select current_setting('server_version') as version, current_setting('server_version_num')::int as version_num, pg_is_in_recovery() as standby,
    current_setting('default_transaction_isolation') as isolation, current_setting('default_transaction_read_only') as readonly,
    current_setting('synchronous_commit') as synchronous_commit, current_setting('fsync') as fsync, current_setting('autovacuum') as autovacuum,
    current_user::text as role, current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int as places,
    (select sum(d.numbackends)::int from pg_stat_database d) as connections`

/** Which kinds of roles this one can stand for; each function is one that only they may call. */
export const KINDS = `
  select has_function_privilege('klieo.enqueue_many(text[],bytea,int[],int[],text[],text[],int[],bigint[],timestamptz[],int[])', 'execute') as producer,
    has_function_privilege('klieo.take_jobs(text,text,bigint,int,bigint,bigint)', 'execute') as worker,
    has_table_privilege('klieo.queue_stats', 'select') as reader,
    has_function_privilege('klieo.retry_dead(text,bigint)', 'execute') as admin`

export const RESTORED = `select klieo.restored() as restored`

/** What keeps dead rows from being vacuumed away, oldest first. $1 how old, in ms */
export const HORIZON = `
  select h.kind, h.name, h.detail, round(extract(epoch from clock_timestamp() - h.since))::int as seconds
  from (
    select 'session' as kind, a.pid::text as name, concat_ws(', ', nullif(a.application_name, ''), a.usename, a.state) as detail, a.xact_start as since
    from pg_stat_activity a
    where a.datname = current_database() and (a.backend_xmin is not null or a.backend_xid is not null) and a.pid <> pg_backend_pid()
      and a.backend_type = 'client backend'
    union all
    select 'prepared transaction', p.gid, p.owner::text, p.prepared
    from pg_prepared_xacts p
    where p.database = current_database()
  ) h
  where h.since < clock_timestamp() - $1 * interval '1 millisecond'
  order by h.since
  limit 5`

/** Slots say how many transactions they are behind, not since when. */
export const SLOTS = `
  select s.slot_name::text as name, age(coalesce(s.xmin, s.catalog_xmin)) as behind, s.active
  from pg_replication_slots s
  where s.xmin is not null and age(s.xmin) > 1000000 and (s.database is null or s.database = current_database())`

/** Tables of the bus with more dead rows than live ones. $1 the schema, $2 how many at the least */
export const BLOAT = `
  select t.relname::text as table, t.n_dead_tup as dead, t.n_live_tup as live, pg_size_pretty(pg_total_relation_size(t.relid)) as size,
    coalesce(to_char(greatest(t.last_autovacuum, t.last_vacuum) at time zone 'UTC', 'YYYY-MM-DD HH24:MI "UTC"'), 'never') as vacuumed
  from pg_stat_user_tables t
  where t.schemaname = $1::text and t.n_dead_tup > greatest($2::bigint, t.n_live_tup)
  order by t.n_dead_tup desc`

export const NOTIFY_QUEUE = `select pg_notification_queue_usage() as usage`

/** Who keeps the queue from being emptied: a session that listens and is idle in a transaction. */
export const IDLE_IN_TRANSACTION = `
  select a.pid::text as pid, round(extract(epoch from clock_timestamp() - a.xact_start))::int as seconds
  from pg_stat_activity a
  where a.state like 'idle in transaction%'
  order by a.xact_start
  limit 1`

/** $1 how long nobody fetched, in ms */
export const ABANDONED = `
  select c.durable, c.filter, c.pending + c.redelivering as waiting, round(extract(epoch from clock_timestamp() - c.last_active_at))::int as seconds
  from klieo.consumer_stats c
  where c.last_active_at < clock_timestamp() - $1 * interval '1 millisecond'
  order by c.last_active_at`

export const QUEUE_HEALTH = `
  select q.queue, q.dead, q.ready, q.running, q.paused_at is not null as paused,
    round(extract(epoch from clock_timestamp() - q.oldest_ready_at))::int as waiting_seconds
  from klieo.queue_stats q
  order by q.queue`
