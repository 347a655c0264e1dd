-- The schema of klieo-bus as the migrations make it, read back from the catalogs by scripts/dump-schema.ts.
-- For reading; a test fails when it drifts.

create schema klieo;

create sequence klieo.instance_id as integer cycle cache 1;

create sequence klieo.job_id as bigint cache 1;

create sequence klieo.kv_revision as bigint cache 1;

create sequence klieo.lease_fence as bigint cache 1;

create sequence klieo.message_seq as bigint cache 1;

create table klieo.consumer_offsets (
  id integer not null generated always as identity,
  durable text collate "C" not null,
  filter text collate "C" not null,
  pattern text collate "C" not null,
  start_seq bigint not null default 0,
  start_time timestamp with time zone not null default '-infinity'::timestamp with time zone,
  lo pg_snapshot not null,
  hi pg_snapshot,
  pos_tx xid8 not null default '0'::xid8,
  pos_seq bigint not null default 0,
  created_at timestamp with time zone not null default clock_timestamp(),
  last_active_at timestamp with time zone not null default clock_timestamp(),
  constraint consumer_offsets_pkey PRIMARY KEY (id),
  constraint consumer_offsets_durable_key UNIQUE (durable),
  constraint consumer_offsets_names_length CHECK ((((octet_length(durable) >= 1) AND (octet_length(durable) <= 128)) AND ((octet_length(filter) >= 1) AND (octet_length(filter) <= 1024))))
) with (fillfactor=50, autovacuum_vacuum_scale_factor=0, autovacuum_vacuum_threshold=1000, vacuum_truncate=false);

create table klieo.deliveries (
  consumer_id integer not null,
  seq bigint not null,
  tx xid8 not null,
  attempt integer not null,
  visible_at timestamp with time zone not null,
  token uuid,
  final boolean not null default false,
  constraint deliveries_pkey PRIMARY KEY (consumer_id, seq)
) with (fillfactor=70, autovacuum_vacuum_scale_factor=0, autovacuum_vacuum_threshold=1000, autovacuum_vacuum_cost_delay=0, vacuum_truncate=false);

create table klieo.job_heads (
  queue text collate "C" not null,
  seq bigint not null generated always as identity,
  priorities smallint[] not null,
  heads timestamp with time zone[] not null,
  looked_at timestamp with time zone not null,
  look_ms double precision not null,
  constraint job_heads_pkey PRIMARY KEY (queue, seq)
) with (autovacuum_vacuum_scale_factor=0, autovacuum_vacuum_threshold=1000, vacuum_truncate=false);

create table klieo.jobs (
  id bigint not null default nextval('klieo.job_id'::regclass),
  enqueued_at timestamp with time zone not null default clock_timestamp(),
  run_at timestamp with time zone not null,
  visible_at timestamp with time zone not null,
  died_at timestamp with time zone,
  attempts integer not null default 0,
  max_attempts integer not null default 5,
  fence integer not null default 0,
  priority smallint not null default 0,
  token uuid,
  queue text collate "C" not null,
  worker_id text,
  dedup_key text collate "C",
  last_error text,
  headers jsonb not null default '{}'::jsonb,
  payload bytea not null,
  constraint jobs_pkey PRIMARY KEY (id),
  constraint jobs_headers_object CHECK ((jsonb_typeof(headers) = 'object'::text)),
  constraint jobs_headers_size CHECK ((pg_column_size(headers) <= 262144)),
  constraint jobs_max_attempts_positive CHECK ((max_attempts >= 1)),
  constraint jobs_payload_size CHECK ((octet_length(payload) <= 8388608)),
  constraint jobs_priority_range CHECK (((priority >= '-100'::integer) AND (priority <= 100))),
  constraint jobs_queue_length CHECK (((octet_length(queue) >= 1) AND (octet_length(queue) <= 128)))
) with (fillfactor=70, autovacuum_vacuum_scale_factor=0, autovacuum_vacuum_threshold=1000, autovacuum_vacuum_cost_delay=0, vacuum_truncate=false);

create table klieo.kv_changes (
  tx xid8 not null default pg_current_xact_id(),
  revision bigint not null,
  changed_at timestamp with time zone not null,
  bucket text collate "C" not null,
  key text collate "C" not null,
  value bytea,
  constraint kv_changes_pkey PRIMARY KEY (tx, revision)
) with (autovacuum_vacuum_insert_scale_factor=0.1, vacuum_truncate=false);

create table klieo.kv_entries (
  bucket text collate "C" not null,
  key text collate "C" not null,
  tx xid8 not null default pg_current_xact_id(),
  revision bigint not null,
  updated_at timestamp with time zone not null,
  expires_at timestamp with time zone,
  value bytea,
  constraint kv_entries_pkey PRIMARY KEY (bucket, key),
  constraint kv_entries_dedup_value CHECK ((("left"(bucket, 6) <> 'dedup.'::text) OR (value IS NULL) OR (encode(value, 'escape'::text) ~ '^[0-9]{1,18}$'::text))),
  constraint kv_entries_names_length CHECK ((((octet_length(bucket) >= 1) AND (octet_length(bucket) <= 134)) AND ((octet_length(key) >= 1) AND (octet_length(key) <= 2048)))),
  constraint kv_entries_value_size CHECK ((octet_length(value) <= 8388608))
) with (fillfactor=70, autovacuum_vacuum_scale_factor=0.01, autovacuum_vacuum_threshold=1000, vacuum_truncate=false);

create table klieo.kv_horizons (
  at timestamp with time zone not null,
  tx xid8 not null,
  constraint kv_horizons_pkey PRIMARY KEY (at)
);

create table klieo.kv_leases (
  bucket text collate "C" not null,
  key text collate "C" not null,
  fence bigint not null,
  token uuid not null,
  holder text,
  expires_at timestamp with time zone not null,
  constraint kv_leases_pkey PRIMARY KEY (bucket, key)
) with (fillfactor=70, autovacuum_vacuum_scale_factor=0, autovacuum_vacuum_threshold=1000, vacuum_truncate=false);

create table klieo.message_ids (
  msg_id text collate "C" not null,
  seq bigint not null,
  expires_at timestamp with time zone not null,
  constraint message_ids_pkey PRIMARY KEY (msg_id)
) with (autovacuum_vacuum_scale_factor=0, autovacuum_vacuum_threshold=5000, vacuum_truncate=false);

create table klieo.messages (
  tx xid8 not null default pg_current_xact_id(),
  seq bigint not null default nextval('klieo.message_seq'::regclass),
  published_at timestamp with time zone not null default clock_timestamp(),
  subject text collate "C" not null,
  headers jsonb not null default '{}'::jsonb,
  payload bytea not null,
  constraint messages_pkey PRIMARY KEY (tx, seq),
  constraint messages_headers_object CHECK ((jsonb_typeof(headers) = 'object'::text)),
  constraint messages_headers_size CHECK ((pg_column_size(headers) <= 262144)),
  constraint messages_payload_size CHECK ((octet_length(payload) <= 8388608)),
  constraint messages_subject_length CHECK (((octet_length(subject) >= 1) AND (octet_length(subject) <= 1024)))
) with (autovacuum_vacuum_insert_scale_factor=0.05, vacuum_truncate=false);

create table klieo.meta (
  key text not null,
  value text not null,
  constraint meta_pkey PRIMARY KEY (key)
);

create table klieo.paused_queues (
  queue text collate "C" not null,
  paused_at timestamp with time zone not null default clock_timestamp(),
  constraint paused_queues_pkey PRIMARY KEY (queue),
  constraint paused_queues_queue_length CHECK (((octet_length(queue) >= 1) AND (octet_length(queue) <= 128)))
) with (autovacuum_vacuum_scale_factor=0, autovacuum_vacuum_threshold=100, vacuum_truncate=false);

create unlogged table klieo.replies (
  request_id uuid not null,
  inbox text not null,
  ok boolean not null,
  payload bytea not null,
  expires_at timestamp with time zone not null,
  constraint replies_pkey PRIMARY KEY (request_id),
  constraint replies_payload_size CHECK ((octet_length(payload) <= 8388608))
) with (autovacuum_vacuum_scale_factor=0, autovacuum_vacuum_threshold=1000, autovacuum_vacuum_cost_delay=0, vacuum_truncate=false);

create unlogged table klieo.requests (
  id uuid not null,
  subject text collate "C" not null,
  headers jsonb not null default '{}'::jsonb,
  payload bytea not null,
  inbox text not null,
  deadline timestamp with time zone not null,
  claimed_by integer,
  constraint requests_pkey PRIMARY KEY (id),
  constraint requests_headers_object CHECK ((jsonb_typeof(headers) = 'object'::text)),
  constraint requests_headers_size CHECK ((pg_column_size(headers) <= 262144)),
  constraint requests_inbox_length CHECK ((octet_length(inbox) <= 128)),
  constraint requests_payload_size CHECK ((octet_length(payload) <= 8388608)),
  constraint requests_subject_length CHECK (((octet_length(subject) >= 1) AND (octet_length(subject) <= 1024)))
) with (autovacuum_vacuum_scale_factor=0, autovacuum_vacuum_threshold=1000, autovacuum_vacuum_cost_delay=0, vacuum_truncate=false);

create unlogged table klieo.responders (
  id bigint not null generated always as identity,
  instance_id integer not null,
  filter text collate "C" not null,
  pattern text collate "C" not null,
  alive_until timestamp with time zone,
  constraint responders_pkey PRIMARY KEY (id)
);

CREATE INDEX deliveries_due ON klieo.deliveries USING btree (((consumer_id + 0)), visible_at);

CREATE INDEX deliveries_final ON klieo.deliveries USING btree (visible_at) WHERE final;

CREATE INDEX jobs_dead ON klieo.jobs USING btree (queue, died_at) WHERE (died_at IS NOT NULL);

CREATE INDEX jobs_due ON klieo.jobs USING btree (queue, priority DESC, visible_at, id) WHERE (died_at IS NULL);

CREATE INDEX jobs_exhausted ON klieo.jobs USING btree (visible_at) WHERE ((died_at IS NULL) AND (attempts >= max_attempts));

CREATE INDEX kv_entries_expiry ON klieo.kv_entries USING btree (expires_at) WHERE (expires_at IS NOT NULL);

CREATE INDEX message_ids_expiry ON klieo.message_ids USING btree (expires_at);

CREATE INDEX replies_inbox ON klieo.replies USING btree (inbox);

CREATE INDEX requests_open ON klieo.requests USING btree (deadline) WHERE (claimed_by IS NULL);

CREATE INDEX responders_instance ON klieo.responders USING btree (instance_id);

create view klieo.bucket_stats as
 SELECT bucket,
    count(*) AS keys,
    sum(octet_length(value)) AS bytes
   FROM klieo.kv_entries e
  WHERE ((value IS NOT NULL) AND
        CASE
            WHEN ((expires_at IS NULL) OR (expires_at > clock_timestamp())) THEN true
            WHEN ("left"(bucket, 6) = 'dedup.'::text) THEN (EXISTS ( SELECT
               FROM klieo.jobs j
              WHERE ((j.id = (convert_from(e.value, 'UTF8'::name))::bigint) AND (j.died_at IS NULL))))
            ELSE false
        END)
  GROUP BY bucket;

create view klieo.consumer_stats as
 SELECT o.durable,
    o.filter,
    ( SELECT count(*) AS count
           FROM klieo.messages m
          WHERE ((m.tx >= pg_snapshot_xmin(o.lo)) AND (NOT pg_visible_in_snapshot(m.tx, o.lo)) AND (NOT COALESCE((pg_visible_in_snapshot(m.tx, o.hi) AND (ROW(m.tx, m.seq) <= ROW(o.pos_tx, o.pos_seq))), false)) AND ((m.subject = o.filter) OR (m.subject ~ o.pattern)) AND (m.seq >= o.start_seq) AND (m.published_at >= o.start_time))) AS pending,
    COALESCE(d.in_flight, (0)::bigint) AS in_flight,
    COALESCE((d.unsettled - d.in_flight), (0)::bigint) AS redelivering,
    o.last_active_at
   FROM (klieo.consumer_offsets o
     LEFT JOIN ( SELECT d_1.consumer_id,
            count(*) AS unsettled,
            count(*) FILTER (WHERE ((d_1.token IS NOT NULL) AND (d_1.visible_at > clock_timestamp()))) AS in_flight
           FROM klieo.deliveries d_1
          GROUP BY d_1.consumer_id) d ON ((d.consumer_id = o.id)));

create view klieo.job_details as
 SELECT id,
    queue,
        CASE
            WHEN (died_at IS NOT NULL) THEN 'dead'::text
            WHEN (visible_at <= statement_timestamp()) THEN 'ready'::text
            WHEN (token IS NOT NULL) THEN 'running'::text
            ELSE 'scheduled'::text
        END AS state,
    priority,
    attempts,
    max_attempts,
    run_at,
        CASE
            WHEN ((token IS NOT NULL) AND (died_at IS NULL)) THEN visible_at
            ELSE NULL::timestamp with time zone
        END AS leased_until,
    worker_id,
    dedup_key,
    last_error,
    enqueued_at,
    died_at,
    headers,
    payload,
    klieo.as_text(payload) AS payload_text
   FROM klieo.jobs j;

create view klieo.message_details as
 SELECT seq,
    subject,
    headers,
    published_at,
    payload,
    klieo.as_text(payload) AS payload_text
   FROM klieo.messages m;

create view klieo.queue_stats as
 SELECT j.queue,
    count(*) FILTER (WHERE ((j.died_at IS NULL) AND (j.visible_at <= clock_timestamp()))) AS ready,
    count(*) FILTER (WHERE ((j.died_at IS NULL) AND (j.visible_at > clock_timestamp()) AND (j.token IS NULL))) AS scheduled,
    count(*) FILTER (WHERE ((j.died_at IS NULL) AND (j.visible_at > clock_timestamp()) AND (j.token IS NOT NULL))) AS running,
    count(*) FILTER (WHERE (j.died_at IS NOT NULL)) AS dead,
    min(j.visible_at) FILTER (WHERE ((j.died_at IS NULL) AND (j.visible_at <= clock_timestamp()))) AS oldest_ready_at,
    ( SELECT p.paused_at
           FROM klieo.paused_queues p
          WHERE (p.queue = j.queue)) AS paused_at
   FROM klieo.jobs j
  GROUP BY j.queue
UNION ALL
 SELECT p.queue,
    0 AS ready,
    0 AS scheduled,
    0 AS running,
    0 AS dead,
    NULL::timestamp with time zone AS oldest_ready_at,
    p.paused_at
   FROM klieo.paused_queues p
  WHERE (NOT (EXISTS ( SELECT
           FROM klieo.jobs j
          WHERE (j.queue = p.queue))));

CREATE OR REPLACE FUNCTION klieo.ack(id bigint, token uuid)
 RETURNS boolean
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  perform klieo.check_holder('id', ack.id, ack.token);
  return klieo.ack_job(ack.id, ack.token);
end
$function$;

CREATE OR REPLACE FUNCTION klieo.ack_deliveries(consumers integer[], seqs bigint[], tokens uuid[], no_wait boolean DEFAULT false)
 RETURNS SETOF integer
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_ns int[];
  v_consumers int[];
  v_seqs bigint[];
begin
  if ack_deliveries.no_wait then
    select array_agg(m.n), array_agg(distinct m.consumer_id), array_agg(m.seq) into v_ns, v_consumers, v_seqs
    from klieo.settle_deliveries(ack_deliveries.consumers, ack_deliveries.seqs, ack_deliveries.tokens, true) m;
    delete from klieo.deliveries d where d.consumer_id = any(v_consumers) and d.seq = any(v_seqs) and d.token = any(ack_deliveries.tokens);
    return query select unnest(v_ns);
  else
    return query
      with gone as (
        delete from klieo.deliveries d
        where d.consumer_id = any(array(select distinct c from unnest(ack_deliveries.consumers) as c)) and d.seq = any(ack_deliveries.seqs)
          and d.token = any(ack_deliveries.tokens)
        returning d.token
      )
      select u.n::int
      from unnest(ack_deliveries.tokens) with ordinality as u(token, n)
      join gone on gone.token = u.token;
  end if;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.ack_job(id bigint, token uuid)
 RETURNS boolean
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
begin
  delete from klieo.jobs j where j.id = ack_job.id and j.token = ack_job.token;
  return found;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.ack_jobs(ids bigint[], tokens uuid[], no_wait boolean DEFAULT false)
 RETURNS SETOF bigint
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_mine bigint[];
begin
  if ack_jobs.no_wait then
    v_mine := klieo.settle_jobs(ack_jobs.ids, ack_jobs.tokens, true);
    return query delete from klieo.jobs j where j.id = any(v_mine) returning j.id;
  else
    return query delete from klieo.jobs j where j.id = any(ack_jobs.ids) and j.token = any(ack_jobs.tokens) returning j.id;
  end if;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.ack_message(durable text, seq bigint, token uuid)
 RETURNS boolean
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
#variable_conflict use_column
begin
  perform klieo.check_durable(ack_message.durable);
  perform klieo.check_holder('seq', ack_message.seq, ack_message.token);
  return exists (
    select from klieo.find_durable(ack_message.durable) f
    cross join lateral klieo.ack_deliveries(array[f.id], array[ack_message.seq], array[ack_message.token]) n);
end
$function$;

CREATE OR REPLACE FUNCTION klieo.as_text(payload bytea)
 RETURNS text
 LANGUAGE plpgsql
 IMMUTABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  return convert_from(payload, 'UTF8');
exception
  when others then
    return null;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.bury(durable text, max_messages integer DEFAULT 1000)
 RETURNS integer
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
declare
  v_id int;
begin
  perform klieo.check_durable(bury.durable);
  perform klieo.check_number('max_messages', bury.max_messages, 1, 1000);
  select f.id into v_id from klieo.find_durable(bury.durable) f;
  if not found then
    raise exception 'the durable does not exist' using errcode = 'KB001';
  end if;
  return klieo.bury_deliveries(v_id, bury.max_messages);
end
$function$;

CREATE OR REPLACE FUNCTION klieo.bury_deliveries(consumer integer, max_messages integer)
 RETURNS integer
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_count int;
begin
  with ended as materialized (
    select d.seq
    from klieo.deliveries d
    where d.consumer_id + 0 = bury_deliveries.consumer and d.visible_at <= (select clock_timestamp()) and d.final
    order by d.visible_at
    limit bury_deliveries.max_messages
    for update skip locked
  ), gone as (
    delete from klieo.deliveries d
    where d.consumer_id = bury_deliveries.consumer and d.seq = any (array(select ended.seq from ended))
    returning d.consumer_id, d.tx, d.seq, d.attempt
  ), letter as (
    insert into klieo.messages (subject, payload, headers)
    select o.durable || '.dlq', m.payload,
      m.headers || jsonb_build_object(
        'dlq_reason', 'max_deliver_exceeded', 'dlq_subject', m.subject, 'dlq_seq', m.seq::text, 'dlq_attempts', gone.attempt::text)
    from gone
    cross join lateral (select * from klieo.messages m where m.tx = gone.tx and m.seq = gone.seq limit 1) m
    cross join lateral (select o.durable from klieo.consumer_offsets o where o.id = gone.consumer_id limit 1) o
    order by gone.seq
    returning 1
  )
  select count(*) into v_count from letter;
  return v_count;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.bury_jobs(ids bigint[], reason text)
 RETURNS integer
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_count int;
begin
  with dead as (
    update klieo.jobs j
    set died_at = clock_timestamp(),
      token = null,
      last_error = case
        when bury_jobs.reason is not null then left(bury_jobs.reason, 4000)
        when j.token is not null then 'the lease of the last attempt ran out'
        else j.last_error
      end
    where j.id = any(bury_jobs.ids)
    returning j.id, j.queue, j.headers, j.payload, j.attempts, j.dedup_key, j.last_error
  ), letter as (
    insert into klieo.messages (subject, payload, headers)
    select dead.queue || '.dlq', dead.payload,
      dead.headers || jsonb_strip_nulls(jsonb_build_object(
        -- A header holds no line breaks, and only so much.
        'dlq_reason', coalesce(left(regexp_replace(bury_jobs.reason, '[\r\n]+', ' ', 'g'), 4000), 'max_attempts_exceeded'),
        'dlq_queue', dead.queue,
        'dlq_job_id', dead.id::text,
        'dlq_attempts', dead.attempts::text,
        'dlq_dedup_key', regexp_replace(dead.dedup_key, '[\r\n]+', ' ', 'g'),
        'dlq_error', case when bury_jobs.reason is null then left(regexp_replace(dead.last_error, '[\r\n]+', ' ', 'g'), 4000) end))
    from dead
    order by dead.id
    returning 1
  )
  select count(*) into v_count from letter;
  return v_count;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.cancel_job(id bigint, reason text DEFAULT 'cancelled'::text)
 RETURNS TABLE(outcome text, queue text)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  j klieo.jobs;
begin
  select * into j from klieo.jobs x where x.id = cancel_job.id for update skip locked;
  if not found then
    return query select 'locked', x.queue from klieo.jobs x where x.id = cancel_job.id;
    return;
  end if;
  queue := j.queue;
  if j.died_at is not null then
    outcome := 'dead';
  else
    perform klieo.bury_jobs(array[cancel_job.id], coalesce(cancel_job.reason, 'cancelled'));
    outcome := 'cancelled';
  end if;
  return next;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.channel()
 RETURNS text
 LANGUAGE plpgsql
 STABLE SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  return 'klieo_' || left(encode(sha256(convert_to(klieo.schema_name()::text, 'UTF8')), 'hex'), 16);
end
$function$;

CREATE OR REPLACE FUNCTION klieo.check_durable(durable text)
 RETURNS void
 LANGUAGE plpgsql
 IMMUTABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  if durable is null or durable !~ '^[A-Za-z0-9_-]{1,128}$' then
    raise exception 'durable must be 1 to 128 characters of A-Z a-z 0-9 _ -' using errcode = '22023';
  end if;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.check_filter(filter text)
 RETURNS void
 LANGUAGE plpgsql
 IMMUTABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  if filter is null or octet_length(filter) > 1024
    or filter !~ '^([\x21-\x29\x2b-\x2d\x2f-\x3d\x3f-\x7e]+|\*)(\.([\x21-\x29\x2b-\x2d\x2f-\x3d\x3f-\x7e]+|\*))*(\.>)?$' and filter <> '>'
    or filter ~ '^(\$|_INBOX)' then
    raise exception 'filter must be 1 to 1024 bytes of tokens joined by ".", of printable ASCII, * for one token and a last > for the rest, the first token not beginning with $ or _INBOX'
      using errcode = '22023';
  end if;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.check_headers(headers jsonb)
 RETURNS void
 LANGUAGE plpgsql
 IMMUTABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  if headers is null or jsonb_typeof(headers) <> 'object' then
    raise exception 'headers must be a JSON object of strings' using errcode = '22023';
  end if;
  if headers <> '{}' and exists (
    select from jsonb_each(headers) h
    where jsonb_typeof(h.value) <> 'string' or h.key !~ '^[\x21-\x39\x3b-\x7e]+$' or h.value #>> '{}' ~ '[\r\n]'
  ) then
    raise exception 'headers must have printable ASCII names without ":" and space, and strings without CR and LF as values' using errcode = '22023';
  end if;
  if (select sum(octet_length(h.key) + octet_length(h.value)) from jsonb_each_text(headers) h) > 65536 then
    raise exception 'headers must be at most 64 KiB, names and values together' using errcode = '22023';
  end if;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.check_holder(argument text, id bigint, token uuid)
 RETURNS void
 LANGUAGE plpgsql
 IMMUTABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  if id is null then
    raise exception '% must not be null', argument using errcode = '22023';
  elsif token is null then
    raise exception 'token must not be null' using errcode = '22023';
  end if;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.check_id(argument text, id text)
 RETURNS void
 LANGUAGE plpgsql
 IMMUTABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  if id is null or length(id) not between 1 and 512 then
    raise exception '% must be 1 to 512 characters', argument using errcode = '22023';
  end if;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.check_key(bucket text, key text, writing boolean)
 RETURNS void
 LANGUAGE plpgsql
 IMMUTABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  perform klieo.check_name('bucket', bucket);
  if left(bucket, 6) = 'dedup.' then
    if writing then
      raise exception 'bucket must not begin with "dedup.": those buckets are written by enqueue alone' using errcode = '22023';
    end if;
    if key is null or length(key) not between 1 and 512 then
      raise exception 'key must be 1 to 512 characters' using errcode = '22023';
    end if;
  elsif key is null or length(key) > 512 or key !~ '^[A-Za-z0-9_/=-]+(\.[A-Za-z0-9_/=-]+)*$' then
    raise exception 'key must be 1 to 512 characters of A-Z a-z 0-9 _ - / = . with no dot first, last or doubled' using errcode = '22023';
  end if;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.check_name(argument text, name text)
 RETURNS void
 LANGUAGE plpgsql
 IMMUTABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  if name is null or length(name) > (case when argument = 'bucket' and left(name, 6) = 'dedup.' then 134 else 128 end) or name !~ '^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$' then
    raise exception '% must be 1 to 128 characters of A-Z a-z 0-9 _ - with single dots between them', argument using errcode = '22023';
  end if;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.check_number(argument text, value bigint, lowest bigint, highest bigint)
 RETURNS void
 LANGUAGE plpgsql
 IMMUTABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  if check_number.value is null or check_number.value not between check_number.lowest and check_number.highest then
    raise exception '% must be from % to %', argument, check_number.lowest, check_number.highest using errcode = '22023';
  end if;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.check_payload(argument text, payload bytea)
 RETURNS void
 LANGUAGE plpgsql
 IMMUTABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  if payload is null then
    raise exception '% must not be null', argument using errcode = '22023';
  elsif octet_length(payload) > 8388608 then
    raise exception '% must be at most 8 MiB', argument using errcode = '54000';
  end if;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.check_subject(subject text)
 RETURNS void
 LANGUAGE plpgsql
 IMMUTABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  if subject is null or octet_length(subject) > 1024
    or subject !~ '^[\x21-\x29\x2b-\x2d\x2f-\x3d\x3f-\x7e]+(\.[\x21-\x29\x2b-\x2d\x2f-\x3d\x3f-\x7e]+)*$'
    or subject ~ '^(\$|_INBOX)' then
    raise exception 'subject must be 1 to 1024 bytes of tokens joined by ".", of printable ASCII without wildcards, the first token not beginning with $ or _INBOX'
      using errcode = '22023';
  end if;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.check_unwritten(what text)
 RETURNS void
 LANGUAGE plpgsql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  if pg_current_xact_id_if_assigned() is not null then
    raise exception '% must not be in a transaction that has written: commit first', what using errcode = 'KB002';
  end if;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.claim(queue text, worker_id text, lease_ttl_ms bigint DEFAULT 30000, max_jobs integer DEFAULT 1)
 RETURNS TABLE(id bigint, payload bytea, headers jsonb, attempt integer, max_attempts integer, fence integer, token uuid, leased_until timestamp with time zone)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
#variable_conflict use_column
begin
  perform klieo.check_name('queue', claim.queue);
  perform klieo.check_id('worker_id', claim.worker_id);
  perform klieo.check_number('lease_ttl_ms', claim.lease_ttl_ms, 0, 2147483647);
  perform klieo.check_number('max_jobs', claim.max_jobs, 1, 1000);
  perform klieo.check_unwritten('a claim');
  return query
    select c.id, c.payload, c.headers, c.attempt, c.max_attempts, c.fence, c.token, c.expires_at
    from klieo.claim_jobs(claim.queue, claim.worker_id, claim.lease_ttl_ms, claim.max_jobs) c;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.claim_jobs(queue text, worker_id text, lease_ttl_ms bigint, max_jobs integer, max_bytes bigint DEFAULT 16777216)
 RETURNS TABLE(id bigint, payload bytea, headers jsonb, attempt integer, max_attempts integer, fence integer, token uuid, expires_at timestamp with time zone)
 LANGUAGE sql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
  select t.* from klieo.take_jobs(claim_jobs.queue, claim_jobs.worker_id, claim_jobs.lease_ttl_ms, claim_jobs.max_jobs, claim_jobs.max_bytes, null) t
  where t.id is not null
$function$;

CREATE OR REPLACE FUNCTION klieo.claim_requests(filter text, process integer, max_requests integer)
 RETURNS TABLE(id uuid, subject text, headers jsonb, payload bytea, left_ms double precision)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_pattern text := klieo.filter_pattern(claim_requests.filter);
begin
  return query
    with open as materialized (
      select r.id
      from klieo.requests r
      where r.claimed_by is null and r.deadline > (select clock_timestamp()) and r.subject ~ v_pattern
      order by r.deadline
      limit claim_requests.max_requests
      for no key update skip locked
    )
    update klieo.requests r
    set claimed_by = claim_requests.process
    where r.id = any (array(select open.id from open))
    returning r.id, r.subject, r.headers, r.payload, (extract(epoch from r.deadline - clock_timestamp()) * 1000)::double precision;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.create_durable(durable text, filter text, start_seq bigint, start_time timestamp with time zone, start_new boolean)
 RETURNS SETOF integer
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
#variable_conflict use_column
begin
  -- Shared: durables may be made side by side, but not beside a prune, which would not know of them.
  perform pg_advisory_xact_lock_shared(klieo.creation_lock());
  return query
    insert into klieo.consumer_offsets as o (durable, filter, pattern, start_seq, start_time, lo)
    values (create_durable.durable, create_durable.filter, klieo.filter_pattern(create_durable.filter),
      coalesce(create_durable.start_seq, 0), coalesce(create_durable.start_time, '-infinity'),
      case when create_durable.start_new then klieo.cursor_snapshot() else '1:1:' end)
    on conflict (durable) do nothing
    returning o.id;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.create_roles(prefix text DEFAULT NULL::text)
 RETURNS SETOF text
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
#variable_conflict use_column
declare
  v_kind text;
  v_role text;
begin
  foreach v_kind in array array['producer', 'worker', 'reader', 'admin'] loop
    v_role := coalesce(create_roles.prefix, klieo.schema_name() || '_') || v_kind;
    if octet_length(v_role) > 63 then
      raise exception 'prefix must be short enough for names of 63 bytes' using errcode = '22023';
    end if;
    begin
      if not exists (select from pg_roles a where a.rolname = v_role) then
        execute format('create role %I nologin', v_role);
      end if;
    exception when duplicate_object then
      -- Somebody else has just made it.
    end;
    perform klieo.grant_role(v_kind, v_role);
    return next v_role;
  end loop;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.creation_lock()
 RETURNS bigint
 LANGUAGE sql
 IMMUTABLE PARALLEL SAFE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
  select ('x' || left(md5('klieo.creation'), 16))::bit(64)::bigint
$function$;

CREATE OR REPLACE FUNCTION klieo.cursor_snapshot()
 RETURNS pg_snapshot
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
declare
  v_own xid8 := pg_current_xact_id_if_assigned();
  v_now pg_snapshot := pg_current_snapshot();
begin
  -- A transaction is not among the running ones of its own snapshot: with a later one ended it looks ended itself, and what it
  -- published afterwards would never be delivered.
  if v_own is null or v_own >= pg_snapshot_xmax(v_now) then
    return v_now;
  end if;
  return (
    select format('%s:%s:%s', least(pg_snapshot_xmin(v_now), v_own), pg_snapshot_xmax(v_now), string_agg(r.tx::text, ',' order by r.tx))::pg_snapshot
    from (select pg_snapshot_xip(v_now) as tx union select v_own) r);
end
$function$;

CREATE OR REPLACE FUNCTION klieo.dead_letter(id bigint, token uuid, reason text)
 RETURNS boolean
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  perform klieo.check_holder('id', dead_letter.id, dead_letter.token);
  if dead_letter.reason is null then
    raise exception 'reason must not be null' using errcode = '22023';
  end if;
  return exists (select from klieo.dead_letter_jobs(array[dead_letter.id], array[dead_letter.token], array[dead_letter.reason]));
end
$function$;

CREATE OR REPLACE FUNCTION klieo.dead_letter_jobs(ids bigint[], tokens uuid[], reasons text[], no_wait boolean DEFAULT false)
 RETURNS SETOF bigint
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_mine bigint[] := klieo.settle_jobs(dead_letter_jobs.ids, dead_letter_jobs.tokens, dead_letter_jobs.no_wait);
begin
  perform klieo.bury_jobs(array[d.id], d.reason)
  from unnest(dead_letter_jobs.ids, dead_letter_jobs.reasons) as d(id, reason)
  where d.id = any(v_mine);
  return query select unnest(v_mine);
end
$function$;

CREATE OR REPLACE FUNCTION klieo.dedup_lives(bucket text, value bytea)
 RETURNS boolean
 LANGUAGE sql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET jit TO 'off'
AS $function$
  select left(bucket, 6) = 'dedup.' and exists (
    select from klieo.jobs j where j.id = convert_from(value, 'UTF8')::bigint and j.died_at is null
  )
$function$;

CREATE OR REPLACE FUNCTION klieo.delete_durable(durable text)
 RETURNS boolean
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
AS $function$
#variable_conflict use_column
declare
  v_id int;
begin
  delete from klieo.consumer_offsets o where o.durable = delete_durable.durable returning o.id into v_id;
  delete from klieo.deliveries d where d.consumer_id = v_id;
  return v_id is not null;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.delivery_whereabouts(consumer integer, seq bigint, token uuid)
 RETURNS text
 LANGUAGE plpgsql
 STABLE SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
begin
  return (
    select case when d.token is null then 'free' when d.token = delivery_whereabouts.token then 'mine' else 'other' end
    from klieo.deliveries d
    where d.consumer_id = delivery_whereabouts.consumer and d.seq = delivery_whereabouts.seq
  );
end
$function$;

CREATE OR REPLACE FUNCTION klieo.elect_maintainer(token uuid, holder text, ttl_ms double precision)
 RETURNS boolean
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  return klieo.extend_lease('$klieo', 'maintenance', elect_maintainer.token, elect_maintainer.ttl_ms) is not null
    or exists (
      select from klieo.grant_lease('$klieo', 'maintenance', elect_maintainer.token, elect_maintainer.holder, elect_maintainer.ttl_ms)
    );
end
$function$;

CREATE OR REPLACE FUNCTION klieo.enqueue(queue text, payload bytea, headers jsonb DEFAULT '{}'::jsonb, dedup_key text DEFAULT NULL::text, max_attempts integer DEFAULT 5, run_at timestamp with time zone DEFAULT now(), priority integer DEFAULT 0)
 RETURNS bigint
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
declare
  v_id bigint;
begin
  perform klieo.check_name('queue', enqueue.queue);
  perform klieo.check_payload('payload', enqueue.payload);
  perform klieo.check_headers(enqueue.headers);
  if enqueue.dedup_key is not null and length(enqueue.dedup_key) not between 1 and 512 then
    raise exception 'dedup_key must be 1 to 512 characters' using errcode = '22023';
  elsif coalesce(enqueue.max_attempts, 0) not between 1 and 1000000 then
    raise exception 'max_attempts must be from 1 to 1000000' using errcode = '22023';
  elsif coalesce(enqueue.priority, 101) not between -100 and 100 then
    raise exception 'priority must be from -100 to 100' using errcode = '22023';
  elsif enqueue.run_at is null or not isfinite(enqueue.run_at) then
    raise exception 'run_at must be a time' using errcode = '22023';
  end if;
  select j.id into v_id
  from klieo.enqueue_many(
    array[enqueue.queue], enqueue.payload, array[1], array[octet_length(enqueue.payload)], array[enqueue.headers::text],
    case when enqueue.dedup_key is not null then array[enqueue.dedup_key] end, array[enqueue.max_attempts], null,
    array[enqueue.run_at], array[enqueue.priority]) j;
  return v_id;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.enqueue_many(queues text[], payloads bytea, starts integer[], lengths integer[], headers text[], dedup_keys text[], max_attempts integer[], delays_ms bigint[], run_ats timestamp with time zone[], priorities integer[])
 RETURNS TABLE(id bigint, added boolean)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_now timestamptz := clock_timestamp();
  v_due timestamptz := coalesce(enqueue_many.run_ats[1], v_now + enqueue_many.delays_ms[1] * interval '1 millisecond');
  v_ids bigint[];
  v_new bigint[];
  v_found bigint[];
  v_missing boolean;
begin
  -- Said here, without the row that a check of the table would print.
  if 8388608 < any (enqueue_many.lengths) then
    raise exception 'payload must be at most 8 MiB' using errcode = '54000';
  end if;
  if enqueue_many.dedup_keys is null and cardinality(enqueue_many.starts) = 1 then
    insert into klieo.jobs as j (queue, run_at, visible_at, max_attempts, priority, headers, payload)
    values (enqueue_many.queues[1], coalesce(v_due, v_now), coalesce(v_due, v_now), coalesce(enqueue_many.max_attempts[1], 5),
      coalesce(enqueue_many.priorities[1], 0), coalesce(enqueue_many.headers[1]::jsonb, '{}'), enqueue_many.payloads)
    returning j.id into id;
    added := true;
    return next;
    return;
  elsif enqueue_many.dedup_keys is null then
    return query
      insert into klieo.jobs as j (queue, run_at, visible_at, max_attempts, priority, headers, payload)
      select i.queue, due.at, due.at, coalesce(i.max_attempts, 5), coalesce(i.priority, 0), coalesce(i.headers::jsonb, '{}'),
        substring(enqueue_many.payloads from i.start for i.length)
      from unnest(enqueue_many.queues, enqueue_many.starts, enqueue_many.lengths, enqueue_many.headers, enqueue_many.max_attempts,
          enqueue_many.delays_ms, enqueue_many.run_ats, enqueue_many.priorities)
          with ordinality as i(queue, start, length, headers, max_attempts, delay_ms, run_at, priority, n),
        lateral (select coalesce(i.run_at, v_now + coalesce(i.delay_ms, 0) * interval '1 millisecond')) as due(at)
      order by i.n
      returning j.id, true;
    return;
  end if;

  -- For each queue, as the records below: a record without an id would count as deleted, for ever.
  v_ids := array(select nextval('klieo.job_id') from generate_series(1, cardinality(enqueue_many.queues)));
  loop
    -- The record is written before the job and in its transaction. Sorted, so that two batches do not deadlock; a key
    -- whose enqueuer has not committed yet is waited for.
    with firsts as (
      select distinct on (i.queue, i.key) i.queue, i.key, v_ids[i.n] as id
      from unnest(enqueue_many.queues, enqueue_many.dedup_keys) with ordinality as i(queue, key, n)
      where i.key is not null
      order by i.queue, i.key, i.n
    ), taken as (
      insert into klieo.kv_entries as e (bucket, key, revision, updated_at, expires_at, value)
      select 'dedup.' || firsts.queue, firsts.key, nextval('klieo.kv_revision'), clock_timestamp(), clock_timestamp() + interval '24 hours',
        convert_to(firsts.id::text, 'UTF8')
      from firsts
      order by firsts.queue, firsts.key
      on conflict (bucket, key) do update
        set tx = pg_current_xact_id(), revision = nextval('klieo.kv_revision'), updated_at = clock_timestamp(), expires_at = excluded.expires_at, value = excluded.value
        where e.value is null or (e.expires_at <= clock_timestamp() and not klieo.dedup_lives(e.bucket, e.value))
      returning e.bucket, e.key, e.revision, e.updated_at, e.value
    ), logged as (
      insert into klieo.kv_changes (revision, changed_at, bucket, key, value)
      select taken.revision, taken.updated_at, taken.bucket, taken.key, taken.value from taken
    )
    select v_new || array_agg(convert_from(taken.value, 'UTF8')::bigint) into v_new from taken;

    -- A statement of its own: it sees what was waited for.
    select array_agg(case when i.key is null then v_ids[i.n] else convert_from(e.value, 'UTF8')::bigint end order by i.n), bool_or(i.key is not null and e.value is null)
    into v_found, v_missing
    from unnest(enqueue_many.queues, enqueue_many.dedup_keys) with ordinality as i(queue, key, n)
    left join lateral (select e.value from klieo.kv_entries e where e.bucket = 'dedup.' || i.queue and e.key = i.key limit 1) e on true;
    -- A record that was deleted between the two statements: once more.
    exit when not coalesce(v_missing, false);
  end loop;

  insert into klieo.jobs (id, queue, run_at, visible_at, max_attempts, priority, dedup_key, headers, payload)
  select v_ids[i.n], i.queue, due.at, due.at, coalesce(i.max_attempts, 5), coalesce(i.priority, 0), i.key, coalesce(i.headers::jsonb, '{}'),
    substring(enqueue_many.payloads from i.start for i.length)
  from unnest(enqueue_many.queues, enqueue_many.starts, enqueue_many.lengths, enqueue_many.headers, enqueue_many.max_attempts,
      enqueue_many.delays_ms, enqueue_many.run_ats, enqueue_many.priorities, enqueue_many.dedup_keys)
      with ordinality as i(queue, start, length, headers, max_attempts, delay_ms, run_at, priority, key, n),
    lateral (select coalesce(i.run_at, clock_timestamp() + make_interval(secs => coalesce(i.delay_ms, 0) / 1000.0))) as due(at)
  where i.key is null or v_ids[i.n] = any(v_new)
  order by i.n;

  return query
    select f.id, coalesce(f.id = v_ids[f.n], false)
    from unnest(v_found) with ordinality as f(id, n)
    order by f.n;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.enqueue_one(queue text, payload bytea, headers jsonb DEFAULT '{}'::jsonb, max_attempts integer DEFAULT 5, priority integer DEFAULT 0, delay_ms double precision DEFAULT 0, run_at timestamp with time zone DEFAULT NULL::timestamp with time zone)
 RETURNS bigint
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
#variable_conflict use_column
declare
  v_due timestamptz := coalesce(enqueue_one.run_at, clock_timestamp() + enqueue_one.delay_ms * interval '1 millisecond');
  v_id bigint;
begin
  insert into klieo.jobs (queue, run_at, visible_at, max_attempts, priority, headers, payload)
  values (enqueue_one.queue, v_due, v_due, enqueue_one.max_attempts, enqueue_one.priority, enqueue_one.headers, enqueue_one.payload)
  returning id into v_id;
  return v_id;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.extend_deliveries(consumers integer[], seqs bigint[], tokens uuid[], waits_ms bigint[], no_wait boolean DEFAULT false)
 RETURNS TABLE(n integer, extended boolean)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  m record;
  v_done int[] := '{}';
  v_left int[];
begin
  for m in
    select * from klieo.settle_deliveries(extend_deliveries.consumers, extend_deliveries.seqs, extend_deliveries.tokens, true)
  loop
    update klieo.deliveries d
    set visible_at = greatest(d.visible_at, clock_timestamp() + make_interval(secs => extend_deliveries.waits_ms[m.n] / 1000.0))
    where d.consumer_id = m.consumer_id and d.seq = m.seq;
    v_done := v_done || m.n;
    n := m.n;
    extended := true;
    return next;
  end loop;
  if cardinality(v_done) = cardinality(extend_deliveries.seqs) then
    return;
  end if;
  v_left := '{}';
  for m in
    select g.n::int as n, d.visible_at
    from unnest(extend_deliveries.consumers, extend_deliveries.seqs, extend_deliveries.tokens) with ordinality as g(consumer_id, seq, token, n)
    cross join lateral (
      select d.visible_at from klieo.deliveries d where d.consumer_id = g.consumer_id and d.seq = g.seq and d.token = g.token limit 1
    ) d
    where g.n <> all (v_done)
  loop
    if extend_deliveries.no_wait or m.visible_at > clock_timestamp() then
      n := m.n;
      extended := false;
      return next;
    else
      v_left := v_left || m.n;
    end if;
  end loop;
  if v_left <> '{}' then
    return query
      select v_left[e.n], e.extended
      from (
        select array_agg(extend_deliveries.consumers[l]) as consumers, array_agg(extend_deliveries.seqs[l]) as seqs,
          array_agg(extend_deliveries.tokens[l]) as tokens, array_agg(extend_deliveries.waits_ms[l]) as waits
        from unnest(v_left) as l
      ) w
      cross join lateral klieo.extend_waiting(w.consumers, w.seqs, w.tokens, w.waits) e;
  end if;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.extend_lease(bucket text, key text, token uuid, ttl_ms double precision)
 RETURNS timestamp with time zone
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_until timestamptz;
begin
  perform from klieo.kv_leases l
  where l.bucket = extend_lease.bucket and l.key = extend_lease.key and l.token = extend_lease.token
  for no key update;
  if found then
    update klieo.kv_leases l
    set expires_at = clock_timestamp() + make_interval(secs => extend_lease.ttl_ms / 1000)
    where l.bucket = extend_lease.bucket and l.key = extend_lease.key and l.expires_at > clock_timestamp()
    returning l.expires_at into v_until;
  end if;
  return v_until;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.extend_message(durable text, seq bigint, token uuid, ack_wait_ms bigint DEFAULT 30000)
 RETURNS boolean
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
#variable_conflict use_column
begin
  perform klieo.check_durable(extend_message.durable);
  perform klieo.check_holder('seq', extend_message.seq, extend_message.token);
  perform klieo.check_number('ack_wait_ms', extend_message.ack_wait_ms, 1, 2147483647);
  return exists (
    select from klieo.find_durable(extend_message.durable) f
    cross join lateral klieo.extend_deliveries(array[f.id], array[extend_message.seq], array[extend_message.token], array[extend_message.ack_wait_ms]) e);
end
$function$;

CREATE OR REPLACE FUNCTION klieo.extend_waiting(consumers integer[], seqs bigint[], tokens uuid[], waits_ms bigint[])
 RETURNS TABLE(n integer, extended boolean)
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  m record;
begin
  for m in
    select * from klieo.settle_deliveries(extend_waiting.consumers, extend_waiting.seqs, extend_waiting.tokens, false)
  loop
    update klieo.deliveries d
    set visible_at = greatest(d.visible_at, clock_timestamp() + make_interval(secs => extend_waiting.waits_ms[m.n] / 1000.0))
    where d.consumer_id = m.consumer_id and d.seq = m.seq;
    n := m.n;
    extended := true;
    return next;
  end loop;
end
$function$;

CREATE OR REPLACE FUNCTION klieo."fetch"(durable text, max_messages integer DEFAULT 1, ack_wait_ms bigint DEFAULT 30000, max_deliver integer DEFAULT NULL::integer, max_ack_pending integer DEFAULT 1000)
 RETURNS TABLE(seq bigint, subject text, headers jsonb, payload bytea, published_at timestamp with time zone, attempt integer, token uuid)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
#variable_conflict use_column
declare
  v_id int;
begin
  perform klieo.check_durable("fetch".durable);
  perform klieo.check_number('max_messages', "fetch".max_messages, 1, 1000);
  perform klieo.check_number('ack_wait_ms', "fetch".ack_wait_ms, 1, 2147483647);
  perform klieo.check_number('max_deliver', coalesce("fetch".max_deliver, 1), 1, 2147483647);
  perform klieo.check_number('max_ack_pending', "fetch".max_ack_pending, 1, 2147483647);
  select f.id into v_id from klieo.find_durable("fetch".durable) f;
  if not found then
    raise exception 'the durable does not exist' using errcode = 'KB001';
  end if;
  -- Who is handed nothing pauses, and does not learn that there is more. So he walks farther past what is not for him: for a third of a second.
  return query
    select m.seq, m.subject, m.headers, m.payload, m.published_at, m.attempt, m.token
    from klieo.fetch_messages(v_id, "fetch".max_messages, "fetch".ack_wait_ms, "fetch".max_ack_pending, "fetch".max_deliver, 16777216, 50000) m
    where m.seq is not null;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.fetch_messages(consumer integer, max_messages integer, ack_wait_ms bigint, max_ack_pending integer, max_deliver integer, max_bytes bigint, max_scan integer DEFAULT 4000)
 RETURNS TABLE(tx xid8, seq bigint, subject text, headers jsonb, payload bytea, published_at timestamp with time zone, attempt integer, token uuid, more boolean, final_due boolean, due_in_ms double precision)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  c klieo.consumer_offsets;
  v_hi pg_snapshot;
  v_now timestamptz := clock_timestamp();
  v_wait interval := make_interval(secs => fetch_messages.ack_wait_ms / 1000.0);
  v_tx xid8[] := '{}';
  v_seq bigint[] := '{}';
  v_attempt int[] := '{}';
  v_token uuid[] := '{}';
  -- Random once for the fetch, and of each delivery its own.
  v_fetch text := left(replace(gen_random_uuid()::text, '-', ''), 16);
  v_due boolean;
  v_final boolean;
  v_more boolean := false;
  v_again boolean := false;
  v_full boolean := false;
  v_moved boolean := false;
  v_room int;
  v_free int;
  v_bytes bigint := fetch_messages.max_bytes;
  v_scan int;
  v_scanned int := 0;
  p record;
begin
  if pg_current_xact_id_if_assigned() is not null then
    raise exception 'messages must not be fetched in a transaction that has written' using errcode = 'KB002';
  end if;
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'messages must be fetched in READ COMMITTED' using errcode = 'KB003';
  end if;

  -- A look without a lock: an idle durable costs no write.
  select o.* into c from klieo.consumer_offsets o where o.id = fetch_messages.consumer;
  if not found then
    raise exception 'the durable does not exist' using errcode = 'KB001';
  end if;
  select pg_current_snapshot() into v_hi;
  if pg_snapshot_xmax(c.lo) > pg_snapshot_xmax(v_hi) then
    raise exception 'the database was restored from a dump' using errcode = 'KB004';
  end if;
  -- The first of each kind is enough: after a crash of who held them a hundred thousand may be due.
  v_due := exists (select from klieo.deliveries d where d.consumer_id + 0 = fetch_messages.consumer and d.visible_at <= v_now and not d.final);
  -- The cast leaves only the index of what is final: by the others all that is due would be read, or in flight.
  v_final := exists (select from klieo.deliveries d where d.consumer_id::bigint = fetch_messages.consumer and d.visible_at <= v_now and d.final);

  if v_due or c.hi is not null or c.last_active_at < v_now - interval '30 seconds' or klieo.window_has_message(c.lo, v_hi) then
    select o.* into c from klieo.consumer_offsets o where o.id = fetch_messages.consumer for no key update;
    if not found then
      raise exception 'the durable does not exist' using errcode = 'KB001';
    end if;

    if v_due then
      with due as materialized (
        select d.tx, d.seq, d.visible_at
        from klieo.deliveries d
        where d.consumer_id + 0 = fetch_messages.consumer and d.visible_at <= v_now and not d.final
        order by d.visible_at, d.seq
        limit fetch_messages.max_messages
        for no key update skip locked
      ), sized as (
        select due.seq, m.size, sum(m.size) over (order by due.visible_at, due.seq rows unbounded preceding) as bytes
        from due
        left join lateral (select octet_length(m.payload) as size from klieo.messages m where m.tx = due.tx and m.seq = due.seq limit 1) m on true
      ), vanished as (
        -- The message was purged, or deleted by hand: it must not be in the way for ever.
        delete from klieo.deliveries d
        where d.consumer_id = fetch_messages.consumer and d.seq = any (array(select sized.seq from sized where sized.size is null))
      ), again as (
        update klieo.deliveries d
        set attempt = d.attempt + 1,
          token = (v_fetch || lpad(to_hex(d.seq), 16, '0'))::uuid,
          visible_at = clock_timestamp() + v_wait,
          final = coalesce(d.attempt + 1 >= fetch_messages.max_deliver, false)
        where d.consumer_id = fetch_messages.consumer
          and d.seq = any (array(select sized.seq from sized where sized.bytes - sized.size < fetch_messages.max_bytes))
        returning d.tx, d.seq, d.attempt, d.token
      )
      select
        coalesce(array_agg(again.tx order by again.tx, again.seq), '{}'), coalesce(array_agg(again.seq order by again.tx, again.seq), '{}'),
        coalesce(array_agg(again.attempt order by again.tx, again.seq), '{}'), coalesce(array_agg(again.token order by again.tx, again.seq), '{}'),
        v_bytes - coalesce((select max(sized.bytes) from sized where sized.bytes - sized.size < fetch_messages.max_bytes), 0),
        (select count(*) from sized where sized.size is null) = fetch_messages.max_messages
      into v_tx, v_seq, v_attempt, v_token, v_bytes, v_again
      from again;
      if v_again then
        -- Nothing else of what was looked at. What is behind it is looked at at once, and is not to wait for as many fetches as were purged.
        delete from klieo.deliveries d
        where d.consumer_id = fetch_messages.consumer
          and d.seq = any (array(
            select g.seq
            from (
              select d.tx, d.seq
              from klieo.deliveries d
              where d.consumer_id + 0 = fetch_messages.consumer and d.visible_at <= v_now and not d.final
              order by d.visible_at, d.seq
              limit 1000
              for update skip locked
            ) g
            where not exists (select from klieo.messages m where m.tx = g.tx and m.seq = g.seq)));
      end if;
    end if;

    v_room := fetch_messages.max_messages - cardinality(v_seq);
    -- Counting takes as long as there is much in flight: not for a batch that is full already.
    if v_room > 0 then
      select fetch_messages.max_ack_pending - count(*) into v_free
      from (select from klieo.deliveries d where d.consumer_id = fetch_messages.consumer limit fetch_messages.max_ack_pending) pending;
      v_full := v_free <= 0;
      v_room := least(v_room, v_free);
    end if;

    v_scan := v_room;
    while v_room > 0 and v_bytes > 0 loop
      if c.hi is null then
        select klieo.cursor_snapshot(), '0', 0 into c.hi, c.pos_tx, c.pos_seq;
        if not klieo.window_has_message(c.lo, c.hi) then
          c.hi := null;
          -- Nothing to hand out. The snapshot is moved on now and then, so that retention sees that this durable is past.
          if c.last_active_at < v_now - interval '30 seconds' then
            select klieo.cursor_snapshot() into v_hi;
            if not klieo.window_has_message(c.lo, v_hi) then
              c.lo := v_hi;
              v_moved := true;
            end if;
          end if;
          exit;
        end if;
      end if;

      -- The scan is limited, not the hits: a rare filter must not walk the log in one statement. Stragglers that were
      -- running at lo have smaller xids than all that began after it, so (tx, seq) serves them first and one position is
      -- enough. The bound of the second arm is folded into one row comparison, which the index can start from.
      with candidate as materialized (
        select u.tx, u.seq, u.size, u.hit
        from (
          (
            select m.tx, m.seq, octet_length(m.payload) as size,
              (m.subject = c.filter or m.subject ~ c.pattern) and m.seq >= c.start_seq and m.published_at >= c.start_time as hit
            from klieo.messages m
            -- Only those that have ended: a bulk publish that is still open must not be read again and again.
            where m.tx = any (array(select x.tx from pg_snapshot_xip(c.lo) as x(tx) where pg_visible_in_snapshot(x.tx, c.hi)))
              and (m.tx, m.seq) > (c.pos_tx, c.pos_seq)
            order by m.tx, m.seq
            limit v_scan
          )
          union all
          (
            select m.tx, m.seq, octet_length(m.payload),
              (m.subject = c.filter or m.subject ~ c.pattern) and m.seq >= c.start_seq and m.published_at >= c.start_time
            from klieo.messages m
            where (m.tx, m.seq) > (greatest(c.pos_tx, pg_snapshot_xmax(c.lo)), case when c.pos_tx >= pg_snapshot_xmax(c.lo) then c.pos_seq else 0 end)
              and m.tx < pg_snapshot_xmax(c.hi)
              and pg_visible_in_snapshot(m.tx, c.hi)
            order by m.tx, m.seq
            limit v_scan
          )
        ) u
        order by u.tx, u.seq
        limit v_scan
      ), counted as (
        select k.tx, k.seq, k.size, k.hit,
          count(*) filter (where k.hit) over before as hits,
          coalesce(sum(k.size) filter (where k.hit) over before, 0) as bytes
        from candidate k
        window before as (order by k.tx, k.seq rows between unbounded preceding and 1 preceding)
      ), kept as (
        select * from counted where counted.hits < v_room and (counted.bytes < v_bytes or counted.hits = 0)
      ), handed_out as (
        insert into klieo.deliveries as d (consumer_id, tx, seq, attempt, visible_at, token, final)
        select fetch_messages.consumer, kept.tx, kept.seq, 1, clock_timestamp() + v_wait, (v_fetch || lpad(to_hex(kept.seq), 16, '0'))::uuid, coalesce(1 >= fetch_messages.max_deliver, false)
        from kept
        where kept.hit
        returning d.tx, d.seq, d.token
      )
      select
        (select count(*) from candidate) as candidates,
        (select count(*) from kept) as kept,
        (select last.tx from kept last order by last.tx desc, last.seq desc limit 1) as last_tx,
        (select last.seq from kept last order by last.tx desc, last.seq desc limit 1) as last_seq,
        (select coalesce(sum(k.size), 0) from kept k where k.hit) as bytes,
        coalesce(array_agg(h.tx order by h.tx, h.seq), '{}') as tx,
        coalesce(array_agg(h.seq order by h.tx, h.seq), '{}') as seq,
        coalesce(array_agg(h.token order by h.tx, h.seq), '{}') as token
      into p
      from handed_out h;

      v_moved := true;
      v_tx := v_tx || p.tx;
      v_seq := v_seq || p.seq;
      v_token := v_token || p.token;
      v_attempt := v_attempt || array_fill(1, array[cardinality(p.seq)]);
      v_room := v_room - cardinality(p.seq);
      v_bytes := v_bytes - p.bytes;
      v_scanned := v_scanned + p.candidates;
      if p.candidates < v_scan and p.kept = p.candidates then
        -- The window is used up: what hi saw has been handed out.
        c.lo := c.hi;
        c.hi := null;
        c.pos_tx := '0';
        c.pos_seq := 0;
        -- What was committed since: with hands full the next fetch finds it, else the next round.
        v_more := cardinality(v_seq) > 0;
        exit when v_more;
        continue;
      end if;
      c.pos_tx := p.last_tx;
      c.pos_seq := p.last_seq;
      v_more := true;
      exit when v_bytes <= 0 or v_scanned >= fetch_messages.max_scan;
      v_scan := least(1000, greatest(v_room, case when cardinality(p.seq) * 4 < p.candidates then v_scan * 4 else v_scan end));
    end loop;

    if v_moved or c.last_active_at < v_now - interval '30 seconds' then
      update klieo.consumer_offsets o
      set lo = c.lo, hi = c.hi, pos_tx = c.pos_tx, pos_seq = c.pos_seq, last_active_at = v_now
      where o.id = fetch_messages.consumer;
    end if;
  end if;

  return query
    select m.tx, m.seq, m.subject, m.headers, m.payload, m.published_at, h.attempt, h.token, null::boolean, null::boolean, null::double precision
    from unnest(v_tx, v_seq, v_attempt, v_token) with ordinality as h(tx, seq, attempt, token, n)
    cross join lateral (select * from klieo.messages m where m.tx = h.tx and m.seq = h.seq limit 1) m
    order by h.n;
  -- The last row tells how to go on.
  return query
    select null::xid8, null::bigint, null::text, null::jsonb, null::bytea, null::timestamptz, null::int, null::uuid, v_more or v_again, v_final,
      least(
        case when v_full then 50 end,
        (select extract(epoch from d.visible_at - clock_timestamp()) * 1000
         from klieo.deliveries d
         where d.consumer_id + 0 = fetch_messages.consumer and d.visible_at > v_now
         order by d.visible_at
         limit 1))::double precision;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.filter_pattern(filter text)
 RETURNS text
 LANGUAGE sql
 IMMUTABLE PARALLEL SAFE STRICT
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
  select '^' || string_agg(
    case token when '*' then '[^.]+' when '>' then '.+' else regexp_replace(token, '([^A-Za-z0-9_-])', '\\\1', 'g') end,
    '\.' order by n) || '$'
  from unnest(string_to_array(filter, '.')) with ordinality as t(token, n)
$function$;

CREATE OR REPLACE FUNCTION klieo.find_durable(durable text)
 RETURNS TABLE(id integer, filter text, created_at timestamp with time zone)
 LANGUAGE plpgsql
 STABLE SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
begin
  return query select o.id, o.filter, o.created_at from klieo.consumer_offsets o where o.durable = find_durable.durable;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.grant_lease(bucket text, key text, token uuid, holder text, ttl_ms double precision)
 RETURNS TABLE(fence bigint, expires_at timestamp with time zone)
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
begin
  return query
    insert into klieo.kv_leases as l (bucket, key, fence, token, holder, expires_at)
    select grant_lease.bucket, grant_lease.key, nextval('klieo.lease_fence'), grant_lease.token, grant_lease.holder,
      clock_timestamp() + make_interval(secs => grant_lease.ttl_ms / 1000)
    where not exists (
      select from klieo.kv_leases h where h.bucket = grant_lease.bucket and h.key = grant_lease.key and h.expires_at > clock_timestamp()
    )
    on conflict (bucket, key) do update
      set fence = nextval('klieo.lease_fence'), token = excluded.token, holder = excluded.holder,
        expires_at = clock_timestamp() + make_interval(secs => grant_lease.ttl_ms / 1000)
      where l.expires_at <= clock_timestamp()
    returning l.fence, l.expires_at;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.grant_role(kind text, role text)
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
#variable_conflict use_column
declare
  r record;
begin
  if grant_role.kind is null or grant_role.kind not in ('producer', 'worker', 'reader', 'admin') then
    raise exception 'kind must be producer, worker, reader or admin' using errcode = '22023';
  elsif grant_role.role = 'public' then
    raise exception 'role must not be public, which is everybody' using errcode = '22023';
  elsif not exists (select from pg_roles a where a.rolname = grant_role.role) then
    raise exception 'role does not exist; make it with: create role … login' using errcode = '42704';
  end if;
  execute format('grant usage on schema %I to %I', klieo.schema_name(), grant_role.role);
  for r in select g.may, g.name from klieo.role_rights() g where g.kind = grant_role.kind loop
    if r.may = 'execute' then
      execute format('grant execute on function %I.%I to %I', klieo.schema_name(), r.name, grant_role.role);
    -- The migrations are not there when psql made the schema.
    elsif to_regclass(format('%I.%I', klieo.schema_name(), r.name)) is not null then
      execute format('grant select on table %I.%I to %I', klieo.schema_name(), r.name, grant_role.role);
    end if;
  end loop;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.head_before(first timestamp with time zone, looked_at timestamp with time zone)
 RETURNS timestamp with time zone
 LANGUAGE sql
 IMMUTABLE PARALLEL SAFE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
  -- What is being enqueued just now may become visible in another order. Nothing old does.
  select case
    when head_before.first < head_before.looked_at - interval '1 second' then head_before.first
    else least(head_before.first, head_before.looked_at) - interval '100 milliseconds'
  end
$function$;

CREATE OR REPLACE FUNCTION klieo.heartbeat(id bigint, token uuid, lease_ttl_ms bigint DEFAULT 30000)
 RETURNS timestamp with time zone
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  perform klieo.check_holder('id', heartbeat.id, heartbeat.token);
  perform klieo.check_number('lease_ttl_ms', heartbeat.lease_ttl_ms, 0, 2147483647);
  return (select h.until from klieo.heartbeat_job(heartbeat.id, heartbeat.token, heartbeat.lease_ttl_ms) h);
end
$function$;

CREATE OR REPLACE FUNCTION klieo.heartbeat_job(id bigint, token uuid, lease_ttl_ms bigint, no_wait boolean DEFAULT false)
 RETURNS TABLE(until timestamp with time zone, extended boolean)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_until timestamptz;
begin
  if cardinality(klieo.settle_jobs(array[heartbeat_job.id], array[heartbeat_job.token], true)) = 0 then
    select j.visible_at into v_until from klieo.jobs j where j.id = heartbeat_job.id and j.token = heartbeat_job.token;
    if not found then
      return;
    end if;
    if heartbeat_job.no_wait or v_until > clock_timestamp() then
      return query select v_until, false;
      return;
    end if;
    if cardinality(klieo.settle_jobs(array[heartbeat_job.id], array[heartbeat_job.token], false)) = 0 then
      return;
    end if;
  end if;
  -- The end need not move: after the clock was set back it lies beyond what was asked for.
  return query
    update klieo.jobs j
    set visible_at = greatest(j.visible_at, clock_timestamp() + make_interval(secs => heartbeat_job.lease_ttl_ms / 1000.0))
    where j.id = heartbeat_job.id
    returning j.visible_at, true;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.job_whereabouts(id bigint, token uuid)
 RETURNS text
 LANGUAGE plpgsql
 STABLE SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
begin
  return (
    select case when j.token is null then 'free' when j.token = job_whereabouts.token then 'mine' else 'other' end
    from klieo.jobs j
    where j.id = job_whereabouts.id
  );
end
$function$;

CREATE OR REPLACE FUNCTION klieo.kv_cas(bucket text, key text, value bytea, expected bigint, ttl_ms bigint DEFAULT NULL::bigint)
 RETURNS bigint
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  perform klieo.check_key(kv_cas.bucket, kv_cas.key, true);
  perform klieo.check_payload('value', kv_cas.value);
  if kv_cas.expected < 1 then
    return null;
  end if;
  return (
    select w.revisions[1]
    from klieo.kv_write(array[kv_cas.bucket], array[kv_cas.key], kv_cas.value, array[1], array[octet_length(kv_cas.value)], array[coalesce(kv_cas.expected, 0)], array[kv_cas.ttl_ms], null) w
  );
end
$function$;

CREATE OR REPLACE FUNCTION klieo.kv_changes_between(bucket text, filter text, lo pg_snapshot, hi pg_snapshot, after_revision bigint, max_changes integer, max_bytes bigint)
 RETURNS TABLE(key text, value bytea, revision bigint, updated_at timestamp with time zone, found bigint)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_pattern text := klieo.filter_pattern(kv_changes_between.filter);
begin
  return query
    select p.key, p.value, p.revision, p.changed_at, p.found
    from (
      select c.*, count(*) over () as found, sum(coalesce(octet_length(c.value), 0)) over (order by c.revision rows unbounded preceding) as bytes
      from (
        select u.key, u.value, u.revision, u.changed_at
        from (
          (
            select s.key, s.value, s.revision, s.changed_at
            from klieo.kv_changes s
            where s.tx = any (array(
                select x.tx from pg_snapshot_xip(kv_changes_between.lo) as x(tx) where pg_visible_in_snapshot(x.tx, kv_changes_between.hi)))
              and s.bucket = kv_changes_between.bucket
              and s.revision > kv_changes_between.after_revision
              and (v_pattern is null or s.key ~ v_pattern)
          )
          union all
          (
            select n.key, n.value, n.revision, n.changed_at
            from klieo.kv_changes n
            where n.tx >= pg_snapshot_xmax(kv_changes_between.lo)
              and n.tx < pg_snapshot_xmax(kv_changes_between.hi)
              and pg_visible_in_snapshot(n.tx, kv_changes_between.hi)
              and n.bucket = kv_changes_between.bucket
              and n.revision > kv_changes_between.after_revision
              and (v_pattern is null or n.key ~ v_pattern)
          )
        ) u
        order by u.revision
        limit kv_changes_between.max_changes
      ) c
    ) p
    where p.bytes - coalesce(octet_length(p.value), 0) < kv_changes_between.max_bytes
    order by p.revision;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.kv_delete(bucket text, key text, expected bigint DEFAULT NULL::bigint)
 RETURNS bigint
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  perform klieo.check_key(kv_delete.bucket, kv_delete.key, false);
  return (
    select w.revisions[1]
    from klieo.kv_write(array[kv_delete.bucket], array[kv_delete.key], null, array[null::int], array[null::int], array[kv_delete.expected], array[null::bigint], null) w
  );
end
$function$;

CREATE OR REPLACE FUNCTION klieo.kv_entries_at(bucket text, filter text, after_key text, max_keys integer, at_snapshot pg_snapshot, max_bytes bigint)
 RETURNS TABLE(key text, value bytea, revision bigint, updated_at timestamp with time zone, found bigint)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_pattern text := klieo.filter_pattern(kv_entries_at.filter);
begin
  return query
    select p.key, p.value, p.revision, p.updated_at, p.found
    from (
      select e.*, count(*) over () as found, sum(octet_length(e.value)) over (order by e.key rows unbounded preceding) as bytes
      from (
        select e.key, e.value, e.revision, e.updated_at
        from klieo.kv_entries e
        where e.bucket = kv_entries_at.bucket
          and e.key > kv_entries_at.after_key
          and e.value is not null
          and (e.expires_at is null or e.expires_at > (select clock_timestamp()) or klieo.dedup_lives(e.bucket, e.value))
          and (v_pattern is null or e.key ~ v_pattern)
          -- An xid beyond the present one is from the cluster that a restored dump came from.
          and (pg_visible_in_snapshot(e.tx, kv_entries_at.at_snapshot) or e.tx >= pg_snapshot_xmax(pg_current_snapshot()))
        order by e.key
        limit kv_entries_at.max_keys
      ) e
    ) p
    where p.bytes - octet_length(p.value) < kv_entries_at.max_bytes
    order by p.key;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.kv_expire(max_entries integer)
 RETURNS TABLE(bucket text, count integer)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
#variable_conflict use_column
begin
  -- An idempotency record whose job lives is looked at again in an hour.
  update klieo.kv_entries e
  set expires_at = clock_timestamp() + interval '1 hour'
  where (e.bucket, e.key) in (
      select x.bucket, x.key from klieo.kv_entries x
      where x.expires_at <= (select clock_timestamp()) and left(x.bucket, 6) = 'dedup.'
      order by x.expires_at
      limit kv_expire.max_entries
    )
    and e.expires_at <= clock_timestamp()
    and klieo.dedup_lives(e.bucket, e.value);
  return query
    with expired as materialized (
      select e.bucket, e.key
      from klieo.kv_entries e
      where e.expires_at <= (select clock_timestamp()) and not klieo.dedup_lives(e.bucket, e.value)
      order by e.expires_at
      limit kv_expire.max_entries
      for no key update skip locked
    ), buried as (
      update klieo.kv_entries e
      set tx = pg_current_xact_id(), revision = nextval('klieo.kv_revision'), updated_at = clock_timestamp(), expires_at = null, value = null
      from expired
      where e.bucket = expired.bucket and e.key = expired.key
      returning e.bucket, e.key, e.revision, e.updated_at
    ), logged as (
      insert into klieo.kv_changes (revision, changed_at, bucket, key, value)
      select buried.revision, buried.updated_at, buried.bucket, buried.key, null from buried
      returning bucket
    )
    select logged.bucket, count(*)::int from logged group by logged.bucket;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.kv_get(bucket text, key text)
 RETURNS TABLE(value bytea, revision bigint, updated_at timestamp with time zone)
 LANGUAGE plpgsql
 STABLE SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
#variable_conflict use_column
begin
  return query
    select g.value, g.revision, g.updated_at from klieo.kv_get_many(array[kv_get.bucket], array[kv_get.key], 1) g;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.kv_get_many(buckets text[], keys text[], max_bytes bigint)
 RETURNS TABLE(n bigint, value bytea, revision bigint, updated_at timestamp with time zone)
 LANGUAGE plpgsql
 STABLE SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
 SET jit TO 'off'
AS $function$
#variable_conflict use_column
begin
  return query
    select i.n,
      case when sum(octet_length(e.value)) over (order by i.n) - octet_length(e.value) < kv_get_many.max_bytes then e.value end,
      e.revision, e.updated_at
    from unnest(kv_get_many.buckets, kv_get_many.keys) with ordinality as i(bucket, key, n),
      lateral (
        select x.value, x.revision, x.updated_at
        from klieo.kv_entries x
        where x.bucket = i.bucket
          and x.key = i.key
          and x.value is not null
          and (x.expires_at is null or x.expires_at > clock_timestamp() or klieo.dedup_lives(x.bucket, x.value))
        limit 1
      ) e
    order by i.n;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.kv_keys(bucket text, filter text, after_key text, max_keys integer)
 RETURNS SETOF text
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_pattern text := klieo.filter_pattern(kv_keys.filter);
begin
  return query
    select e.key
    from klieo.kv_entries e
    where e.bucket = kv_keys.bucket
      and e.key > kv_keys.after_key
      and e.value is not null
      and (e.expires_at is null or e.expires_at > (select clock_timestamp()) or klieo.dedup_lives(e.bucket, e.value))
      and (v_pattern is null or e.key ~ v_pattern)
    order by e.key
    limit kv_keys.max_keys;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.kv_put(bucket text, key text, value bytea, ttl_ms bigint DEFAULT NULL::bigint)
 RETURNS bigint
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  perform klieo.check_key(kv_put.bucket, kv_put.key, true);
  perform klieo.check_payload('value', kv_put.value);
  return (
    select w.revisions[1]
    from klieo.kv_write(array[kv_put.bucket], array[kv_put.key], kv_put.value, array[1], array[octet_length(kv_put.value)], array[null::bigint], array[kv_put.ttl_ms], null) w
  );
end
$function$;

CREATE OR REPLACE FUNCTION klieo.kv_write(buckets text[], keys text[], payload bytea, starts integer[], lengths integer[], expected bigint[], ttls_ms bigint[], round_ends integer[], OUT revisions bigint[], OUT actuals bigint[])
 RETURNS record
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
 SET jit TO 'off'
AS $function$
#variable_conflict use_column
declare
  v_from int := 1;
  v_to int;
  v_puts boolean;
  v_creates boolean;
  v_updates boolean;
  v_creating boolean;
  v_tids tid[];
  v_ns int[];
  v_row record;
begin
  revisions := array_fill(null::bigint, array[cardinality(kv_write.keys)]);
  actuals := revisions;
  select bool_or(i.length is not null and i.expected is null), bool_or(i.length is not null and i.expected = 0), bool_or(i.length is null or i.expected > 0)
  into v_puts, v_creates, v_updates
  from unnest(kv_write.lengths, kv_write.expected) as i(length, expected);
  foreach v_to in array coalesce(kv_write.round_ends, array[cardinality(kv_write.keys)]) loop
    -- Whatever the key is, and then what must be absent.
    foreach v_creating in array array[false, true] loop
      continue when not case when v_creating then v_creates else v_puts end;
      for v_row in
        with input as materialized (
          select i.bucket, i.key, i.start, i.length, i.ttl_ms, (v_from + i.n - 1)::int as n
          from unnest(kv_write.buckets[v_from:v_to], kv_write.keys[v_from:v_to], kv_write.starts[v_from:v_to], kv_write.lengths[v_from:v_to],
            kv_write.expected[v_from:v_to], kv_write.ttls_ms[v_from:v_to]) with ordinality as i(bucket, key, start, length, expected, ttl_ms, n)
          where i.length is not null and case when v_creating then i.expected = 0 else i.expected is null end
        ), written as (
          insert into klieo.kv_entries as e (bucket, key, revision, updated_at, expires_at, value)
          select i.bucket, i.key, nextval('klieo.kv_revision'), clock_timestamp(), clock_timestamp() + make_interval(secs => i.ttl_ms / 1000.0),
            substring(kv_write.payload from i.start for i.length)
          from input i
          on conflict (bucket, key) do update
            set tx = pg_current_xact_id(), revision = nextval('klieo.kv_revision'), updated_at = clock_timestamp(), value = excluded.value,
              expires_at = clock_timestamp() + make_interval(secs => extract(epoch from excluded.expires_at - excluded.updated_at)::double precision)
            where not v_creating or e.value is null or e.expires_at <= clock_timestamp()
          returning e.bucket, e.key, e.revision, e.updated_at, e.value
        ), logged as (
          insert into klieo.kv_changes (revision, changed_at, bucket, key, value)
          select w.revision, w.updated_at, w.bucket, w.key, w.value from written w
        )
        select i.n, w.revision from written w join input i on i.bucket = w.bucket and i.key = w.key
      loop
        revisions[v_row.n] := v_row.revision;
      end loop;
    end loop;

    -- What must be there. Locked first, so that the expiry is looked at after a wait; where it is lost already, nothing is
    -- locked. By their places on disk the planner cannot but look the locked rows up.
    if v_updates then
      select array_agg(l.ctid), array_agg((v_from + i.n - 1)::int) into v_tids, v_ns
      from unnest(kv_write.buckets[v_from:v_to], kv_write.keys[v_from:v_to], kv_write.lengths[v_from:v_to], kv_write.expected[v_from:v_to])
          with ordinality as i(bucket, key, length, expected, n),
        lateral (
          select e.ctid
          from klieo.kv_entries e
          where e.bucket = i.bucket and e.key = i.key and e.value is not null and (i.expected is null or e.revision = i.expected)
          for no key update
        ) l
      where i.length is null or i.expected > 0;
      for v_row in
        with written as (
          update klieo.kv_entries e
          set tx = pg_current_xact_id(), revision = nextval('klieo.kv_revision'), updated_at = clock_timestamp(),
            expires_at = clock_timestamp() + make_interval(secs => i.ttl_ms / 1000.0), value = substring(kv_write.payload from i.start for i.length)
          from (
            select l.tid, l.n, kv_write.starts[l.n] as start, kv_write.lengths[l.n] as length, kv_write.expected[l.n] as expected, kv_write.ttls_ms[l.n] as ttl_ms
            from unnest(v_tids, v_ns) as l(tid, n)
          ) i
          where e.ctid = i.tid
            and e.value is not null
            and (e.expires_at is null or e.expires_at > clock_timestamp() or (i.length is null and klieo.dedup_lives(e.bucket, e.value)))
            and (i.expected is null or e.revision = i.expected)
          returning i.n, e.bucket, e.key, e.revision, e.updated_at, e.value
        ), logged as (
          insert into klieo.kv_changes (revision, changed_at, bucket, key, value)
          select w.revision, w.updated_at, w.bucket, w.key, w.value from written w
        )
        select w.n, w.revision from written w
      loop
        revisions[v_row.n] := v_row.revision;
      end loop;
    end if;

    -- A statement of its own: it sees what was waited for.
    if v_creates or v_updates then
      for v_row in
        select (v_from + i.n - 1)::int as n, g.revision
        from unnest(kv_write.buckets[v_from:v_to], kv_write.keys[v_from:v_to], kv_write.expected[v_from:v_to], revisions[v_from:v_to])
            with ordinality as i(bucket, key, expected, revision, n),
          lateral (select g.revision from klieo.kv_get(i.bucket, i.key) g) g
        where i.expected is not null and i.revision is null
      loop
        actuals[v_row.n] := v_row.revision;
      end loop;
    end if;
    v_from := v_to + 1;
  end loop;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.kv_write_soon(buckets text[], keys text[], payload bytea, starts integer[], lengths integer[], expected bigint[], ttls_ms bigint[], round_ends integer[], OUT revisions bigint[], OUT actuals bigint[])
 RETURNS record
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET lock_timeout TO '20ms'
AS $function$
begin
  select w.revisions, w.actuals into revisions, actuals
  from klieo.kv_write(kv_write_soon.buckets, kv_write_soon.keys, kv_write_soon.payload, kv_write_soon.starts, kv_write_soon.lengths,
    kv_write_soon.expected, kv_write_soon.ttls_ms, kv_write_soon.round_ends) w;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.lease_left(bucket text, key text)
 RETURNS double precision
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
begin
  return (
    select extract(epoch from l.expires_at - clock_timestamp()) * 1000
    from klieo.kv_leases l
    where l.bucket = lease_left.bucket and l.key = lease_left.key and l.expires_at > clock_timestamp()
  );
end
$function$;

CREATE OR REPLACE FUNCTION klieo.live_responders(subject text)
 RETURNS boolean
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET jit TO 'off'
AS $function$
declare
  r record;
  v_tried int := 0;
begin
  if exists (select from klieo.responders d where d.alive_until > clock_timestamp() and live_responders.subject ~ d.pattern) then
    return true;
  end if;
  -- Who can take a process's lock finds it dead; the lock goes with this transaction. The youngest first: the old ones are the
  -- likelier to be dead.
  for r in
    select distinct d.instance_id from klieo.responders d
    where d.alive_until is null and live_responders.subject ~ d.pattern
    order by d.instance_id desc
  loop
    if not pg_try_advisory_xact_lock_shared(klieo.presence_class(), r.instance_id) then
      return true;
    else
      v_tried := v_tried + 1;
      -- So many that died: rather look through all locks once than fill the lock table with their names.
      exit when v_tried = 64;
    end if;
  end loop;
  return v_tried = 64 and exists (
    select
    from klieo.responders d
    join pg_locks l on l.objid = (d.instance_id::bigint & 4294967295)::oid
    where d.alive_until is null
      and live_responders.subject ~ d.pattern
      and l.locktype = 'advisory'
      and l.granted
      and l.mode = 'ExclusiveLock'
      and l.objsubid = 2
      and l.classid = (klieo.presence_class()::bigint & 4294967295)::oid
      and l.database = (select oid from pg_database where datname = current_database()));
end
$function$;

CREATE OR REPLACE FUNCTION klieo.look_for_heads(queue text)
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_lock int := hashtext(look_for_heads.queue);
  v_now timestamptz := clock_timestamp();
  v_start timestamptz;
  v_first timestamptz;
  v_priorities smallint[] := '{}';
  v_heads timestamptz[] := '{}';
begin
  -- One at a time looks; not until the end of the transaction, in which an SQL caller may go on working.
  if not pg_try_advisory_lock(klieo.presence_class() # 1, v_lock) then
    return;
  end if;
  begin
    -- The first of these is planned meanwhile: none has such a priority.
    for p in reverse 101..-100 loop
      v_start := clock_timestamp();
      select j.visible_at into v_first
      from klieo.jobs j
      where j.queue = look_for_heads.queue and j.died_at is null and j.priority = p::smallint and j.visible_at <= v_now
      order by j.visible_at
      limit 1;
      if p <= 100 and clock_timestamp() - v_start > interval '0.2 milliseconds' then
        v_priorities := v_priorities || p::smallint;
        v_heads := v_heads || klieo.head_before(v_first, v_now);
      end if;
    end loop;
    -- Newest first: nothing is updated here, so that the reader of the newest row meets no dead one.
    if v_priorities <> '{}' or exists (select from klieo.job_heads h where h.queue = look_for_heads.queue) then
      insert into klieo.job_heads (queue, priorities, heads, looked_at, look_ms)
      values (look_for_heads.queue, v_priorities, v_heads, clock_timestamp(), extract(epoch from clock_timestamp() - v_now) * 1000);
    end if;
  exception when query_canceled or others then
    perform pg_advisory_unlock(klieo.presence_class() # 1, v_lock);
    raise;
  end;
  perform pg_advisory_unlock(klieo.presence_class() # 1, v_lock);
end
$function$;

CREATE OR REPLACE FUNCTION klieo.look_is_due(looked_at timestamp with time zone, look_ms double precision)
 RETURNS boolean
 LANGUAGE sql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
  -- At most five seconds later, should a look have stood still; at once, should the clock have been set back.
  select look_is_due.looked_at is null
    or clock_timestamp() not between look_is_due.looked_at and look_is_due.looked_at + make_interval(secs => least(look_is_due.look_ms * 0.02, 5))
$function$;

CREATE OR REPLACE FUNCTION klieo.move_head(queue text, priority smallint, begun_from timestamp with time zone, head timestamp with time zone)
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
AS $function$
#variable_conflict use_column
begin
  insert into klieo.job_heads (queue, priorities, heads, looked_at, look_ms)
  select h.queue, h.priorities,
    array(
      select case
          when u.priority <> move_head.priority then u.head
          when move_head.head < move_head.begun_from then least(u.head, move_head.head)
          -- Another one has found something below what this claim began from: that stands.
          when u.head < move_head.begun_from then u.head
          else greatest(u.head, move_head.head)
        end
      from unnest(h.priorities, h.heads) with ordinality as u(priority, head, n)
      order by u.n),
    h.looked_at, h.look_ms
  from (select * from klieo.job_heads n where n.queue = move_head.queue order by n.seq desc limit 1) h
  where move_head.priority = any(h.priorities);
end
$function$;

CREATE OR REPLACE FUNCTION klieo.nak(id bigint, token uuid, delay_ms bigint DEFAULT NULL::bigint, error text DEFAULT NULL::text)
 RETURNS boolean
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_attempts int;
  v_delay_ms bigint := nak.delay_ms;
begin
  perform klieo.check_holder('id', nak.id, nak.token);
  if v_delay_ms is not null then
    perform klieo.check_number('delay_ms', v_delay_ms, 0, 2147483647);
  else
    select j.attempts into v_attempts from klieo.jobs j where j.id = nak.id and j.token = nak.token;
    if not found then
      return false;
    end if;
    -- A second, doubled with each attempt up to an hour, and cut at random by up to half, so that what failed together does not
    -- come back together.
    v_delay_ms := round(least(3600000, 1000 * 2 ^ least(v_attempts - 1, 30)) * (0.5 + random() / 2));
  end if;
  return exists (select from klieo.nak_jobs(array[nak.id], array[nak.token], array[v_delay_ms], array[left(nak.error, 4000)]));
end
$function$;

CREATE OR REPLACE FUNCTION klieo.nak_deliveries(consumers integer[], seqs bigint[], tokens uuid[], delays_ms bigint[], no_wait boolean DEFAULT false)
 RETURNS SETOF integer
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  m record;
  v_final boolean;
  v_ended int[] := '{}';
begin
  for m in
    select * from klieo.settle_deliveries(nak_deliveries.consumers, nak_deliveries.seqs, nak_deliveries.tokens, nak_deliveries.no_wait)
  loop
    update klieo.deliveries d
    set token = null, visible_at = clock_timestamp() + make_interval(secs => case when d.final then 0 else nak_deliveries.delays_ms[m.n] / 1000.0 end)
    where d.consumer_id = m.consumer_id and d.seq = m.seq
    returning d.final into v_final;
    if v_final and m.consumer_id <> all(v_ended) then
      v_ended := v_ended || m.consumer_id;
    end if;
    return next m.n;
  end loop;
  -- A nak of the last delivery ends the message at once.
  perform klieo.bury_deliveries(e.consumer_id, 1000) from unnest(v_ended) as e(consumer_id);
end
$function$;

CREATE OR REPLACE FUNCTION klieo.nak_jobs(ids bigint[], tokens uuid[], delays_ms bigint[], errors text[], no_wait boolean DEFAULT false)
 RETURNS SETOF bigint
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_mine bigint[] := klieo.settle_jobs(nak_jobs.ids, nak_jobs.tokens, nak_jobs.no_wait);
  v_ended bigint[];
begin
  with given as (
    update klieo.jobs j
    -- One that ends here became due when it did: nobody waits for it any more.
    set token = null, run_at = case when j.attempts >= j.max_attempts then j.run_at else due.at end, visible_at = due.at,
      last_error = coalesce(n.error, j.last_error)
    from unnest(nak_jobs.ids, nak_jobs.delays_ms, nak_jobs.errors) as n(id, delay_ms, error),
      lateral (select clock_timestamp() + make_interval(secs => n.delay_ms / 1000.0)) as due(at)
    where j.id = n.id and j.id = any(v_mine)
    returning j.id, j.attempts >= j.max_attempts as ended
  )
  select array_agg(given.id) filter (where given.ended) into v_ended from given;
  if v_ended is not null then
    perform klieo.bury_jobs(v_ended, null);
  end if;
  return query select unnest(v_mine);
end
$function$;

CREATE OR REPLACE FUNCTION klieo.nak_message(durable text, seq bigint, token uuid, delay_ms bigint DEFAULT 0)
 RETURNS boolean
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
#variable_conflict use_column
begin
  perform klieo.check_durable(nak_message.durable);
  perform klieo.check_holder('seq', nak_message.seq, nak_message.token);
  perform klieo.check_number('delay_ms', nak_message.delay_ms, 0, 2147483647);
  return exists (
    select from klieo.find_durable(nak_message.durable) f
    cross join lateral klieo.nak_deliveries(array[f.id], array[nak_message.seq], array[nak_message.token], array[nak_message.delay_ms]) n);
end
$function$;

CREATE OR REPLACE FUNCTION klieo.new_instance()
 RETURNS integer
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  return nextval('klieo.instance_id');
end
$function$;

CREATE OR REPLACE FUNCTION klieo.next_job_at(queue text, horizon_ms bigint)
 RETURNS timestamp with time zone
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_now timestamptz := clock_timestamp();
  v_end timestamptz := v_now + make_interval(secs => next_job_at.horizon_ms / 1000.0);
  v_priority smallint := 101;
  v_heads klieo.job_heads;
  v_floor smallint;
  v_head timestamptz;
  v_there smallint;
  v_next timestamptz;
  v_least timestamptz;
begin
  select h.* into v_heads from klieo.job_heads h where h.queue = next_job_at.queue order by h.seq desc limit 1;
  loop
    v_floor := null;
    v_head := '-infinity';
    if v_heads.priorities <> '{}' then
      select u.priority, u.head into v_floor, v_head
      from unnest(v_heads.priorities, v_heads.heads) as u(priority, head)
      where u.priority < v_priority
      order by u.priority desc
      limit 1;
    end if;
    select j.priority into v_there
    from klieo.jobs j
    where j.queue = next_job_at.queue and j.died_at is null and j.priority < v_priority and j.priority > coalesce(v_floor, -101::smallint)
    order by j.priority desc
    limit 1;
    if v_there is not null then
      v_head := '-infinity';
    end if;
    v_priority := coalesce(v_there, v_floor);
    exit when v_priority is null;
    select j.visible_at into v_next
    from klieo.jobs j
    where j.queue = next_job_at.queue and j.died_at is null and j.priority = v_priority
      and j.visible_at >= v_head and j.visible_at <= v_end
    order by j.visible_at
    limit 1;
    if v_next <= v_now then
      -- It has just become due, or is locked: by a claim that is about to commit, or by an ack in an open transaction.
      v_least := least(v_least, v_now + interval '50 milliseconds');
      select j.visible_at into v_next
      from klieo.jobs j
      where j.queue = next_job_at.queue and j.died_at is null and j.priority = v_priority
        and j.visible_at > v_now and j.visible_at <= v_end
      order by j.visible_at
      limit 1;
    end if;
    v_least := least(v_least, v_next);
  end loop;
  return v_least;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.pause_queue(queue text)
 RETURNS boolean
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
#variable_conflict use_column
begin
  perform klieo.check_name('queue', pause_queue.queue);
  insert into klieo.paused_queues as p (queue) values (pause_queue.queue) on conflict (queue) do nothing;
  return found;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.pick_up_replies(inbox text)
 RETURNS TABLE(request_id uuid, ok boolean, payload bytea)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
begin
  return query delete from klieo.replies p where p.inbox = pick_up_replies.inbox returning p.request_id, p.ok, p.payload;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.presence_class()
 RETURNS integer
 LANGUAGE sql
 IMMUTABLE PARALLEL SAFE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
  select ('x' || left(md5('klieo.presence'), 8))::bit(32)::int
$function$;

CREATE OR REPLACE FUNCTION klieo.prune_kv(max_rows integer)
 RETURNS integer
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
#variable_conflict use_column
declare
  v_at timestamptz;
  v_bound xid8;
  v_changes int;
  v_entries int;
begin
  -- Ten minutes from when a change became visible, not from when it was made: its transaction may have been open for long.
  insert into klieo.kv_horizons (at, tx)
  select clock_timestamp(), pg_snapshot_xmin(pg_current_snapshot())
  where not exists (select from klieo.kv_horizons h where h.at > clock_timestamp() - interval '1 minute')
  on conflict do nothing;
  select h.at, h.tx into v_at, v_bound
  from klieo.kv_horizons h
  where h.at <= clock_timestamp() - interval '10 minutes'
  order by h.at desc
  limit 1;
  delete from klieo.kv_horizons h where h.at < v_at;
  with old as materialized (
    select c.tx, c.revision
    from klieo.kv_changes c
    where c.tx < v_bound
    order by c.tx, c.revision
    limit prune_kv.max_rows
  )
  delete from klieo.kv_changes c
  using old
  where c.tx = old.tx and c.revision = old.revision;
  get diagnostics v_changes = row_count;
  -- A tombstone may go once no statement can be under way that drew a revision before it.
  with old as materialized (
    select e.bucket, e.key
    from klieo.kv_entries e
    where e.value is null and e.updated_at < clock_timestamp() - interval '7 days'
    limit prune_kv.max_rows
    for update skip locked
  )
  delete from klieo.kv_entries e
  using old
  where e.bucket = old.bucket and e.key = old.key;
  get diagnostics v_entries = row_count;
  return greatest(v_changes, v_entries);
end
$function$;

CREATE OR REPLACE FUNCTION klieo.prune_messages(retention_ms bigint, max_messages integer)
 RETURNS integer
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_old timestamptz := clock_timestamp() - make_interval(secs => prune_messages.retention_ms / 1000.0);
  v_bound xid8;
  v_tx xid8 := '0';
  v_seq bigint := 0;
  v_held bigint[];
  v_count int;
  v_removed int := 0;
  p record;
begin
  -- Not while a durable is being made that may begin with what is about to go (see create_durable); the next round will do.
  if not pg_try_advisory_xact_lock(klieo.creation_lock()) then
    return 0;
  end if;
  -- Below the oldest transaction that any durable still waits for, everything has been handed out to everybody. A late
  -- commit has an xid above it, however old its published_at.
  select o.xmin into v_bound
  from (
    select pg_snapshot_xmin(lo) as xmin from klieo.consumer_offsets
    union all
    select pg_snapshot_xmin(pg_current_snapshot())
  ) o
  order by o.xmin
  limit 1;
  -- The scan is limited, not the hits: every ten seconds with nothing to remove, it must not read the log. The oldest come first,
  -- but for what a long transaction published late, which may hold up what is behind it for as long as it was open. What is
  -- passed over because somebody holds it holds nothing up.
  loop
    with page as materialized (
      select m.tx, m.seq, m.published_at
      from klieo.messages m
      where (m.tx, m.seq) > (v_tx, v_seq) and m.tx < v_bound
      order by m.tx, m.seq
      limit prune_messages.max_messages
    )
    select
      count(*) as rows, coalesce(bool_or(page.published_at < v_old), false) as any_old, min(page.seq) as least, max(page.seq) as most,
      (select l.tx from page l order by l.tx desc, l.seq desc limit 1) as last_tx,
      (select l.seq from page l order by l.tx desc, l.seq desc limit 1) as last_seq
    into p
    from page;
    exit when not p.any_old;
    v_held := array(select d.seq from klieo.deliveries d where d.seq between p.least and p.most);
    delete from klieo.messages m
    where (m.tx, m.seq) > (v_tx, v_seq) and (m.tx, m.seq) <= (p.last_tx, p.last_seq)
      and m.published_at < v_old
      and m.seq <> all (v_held);
    get diagnostics v_count = row_count;
    v_removed := v_removed + v_count;
    exit when p.rows < prune_messages.max_messages or v_removed >= prune_messages.max_messages;
    v_tx := p.last_tx;
    v_seq := p.last_seq;
  end loop;
  return v_removed;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.prune_rest(dead_jobs_ms bigint, max_rows integer)
 RETURNS integer
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
#variable_conflict use_column
declare
  v_count int;
  v_most int := 0;
begin
  delete from klieo.jobs j
  where j.id = any (array(
    select d.id from klieo.jobs d
    where d.died_at < clock_timestamp() - make_interval(secs => prune_rest.dead_jobs_ms / 1000.0)
    limit prune_rest.max_rows
    for update skip locked));
  get diagnostics v_count = row_count;
  v_most := greatest(v_most, v_count);
  -- A minute later than the ids end: publish_many may just be looking one up.
  delete from klieo.message_ids i
  where i.msg_id = any (array(
    select d.msg_id from klieo.message_ids d
    where d.expires_at < (select clock_timestamp() - interval '1 minute')
    order by d.expires_at
    limit prune_rest.max_rows
    for update skip locked));
  get diagnostics v_count = row_count;
  v_most := greatest(v_most, v_count);
  delete from klieo.job_heads h
  where exists (select from klieo.job_heads n where n.queue = h.queue and n.seq > h.seq)
    or h.looked_at < clock_timestamp() - interval '1 day';
  delete from klieo.requests r where r.deadline < clock_timestamp() - interval '1 second';
  delete from klieo.replies r where r.expires_at < clock_timestamp() - interval '1 second';
  -- Responders whose process died: the lock that would show it alive can be had.
  delete from klieo.responders r
  where r.id = any (array(
    select d.id from klieo.responders d
    where case
        when d.alive_until is null then pg_try_advisory_xact_lock_shared(klieo.presence_class(), d.instance_id)
        else d.alive_until < clock_timestamp() - interval '1 minute'
      end
    limit least(prune_rest.max_rows, 500)));
  -- Deliveries whose durable is gone or was moved, but for those that an open transaction is about to settle.
  with gone as materialized (
    select d.consumer_id, d.seq
    from klieo.deliveries d
    where not exists (select from klieo.consumer_offsets o where o.id = d.consumer_id)
    for update skip locked
  )
  delete from klieo.deliveries d
  using gone
  where d.consumer_id = gone.consumer_id and d.seq = gone.seq;
  return v_most;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.publish(subject text, payload bytea, headers jsonb DEFAULT '{}'::jsonb, msg_id text DEFAULT NULL::text)
 RETURNS bigint
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
declare
  v_seq bigint;
begin
  perform klieo.check_subject(publish.subject);
  perform klieo.check_payload('payload', publish.payload);
  perform klieo.check_headers(publish.headers);
  if publish.msg_id is not null and length(publish.msg_id) not between 1 and 512 then
    raise exception 'msg_id must be 1 to 512 characters' using errcode = '22023';
  end if;
  select p.seq into v_seq
  from klieo.publish_many(
    array[publish.subject], publish.payload, array[1], array[octet_length(publish.payload)], array[publish.headers::text],
    case when publish.msg_id is not null then array[publish.msg_id] end) p;
  return v_seq;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.publish_many(subjects text[], payloads bytea, starts integer[], lengths integer[], headers text[], msg_ids text[])
 RETURNS TABLE(seq bigint, duplicate boolean)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_seqs bigint[];
  v_new bigint[];
begin
  -- Said here, without the row that a check of the table would print.
  if 8388608 < any (publish_many.lengths) then
    raise exception 'payload must be at most 8 MiB' using errcode = '54000';
  end if;
  if publish_many.msg_ids is null then
    -- The default draws the numbers in the order of the input: the sort is below the insert.
    return query
      with stored as (
        insert into klieo.messages as m (subject, payload, headers)
        select i.subject, substring(publish_many.payloads from i.start for i.length), coalesce(i.headers::jsonb, '{}')
        from unnest(publish_many.subjects, publish_many.starts, publish_many.lengths, publish_many.headers)
          with ordinality as i(subject, start, length, headers, n)
        order by i.n
        returning m.seq
      )
      select stored.seq, false from stored order by stored.seq;
    return;
  end if;

  v_seqs := array(select nextval('klieo.message_seq') from generate_series(1, cardinality(publish_many.subjects)));
  -- Sorted, so that two batches meet in the same order and do not deadlock. An id whose publisher has not committed yet
  -- is waited for: whether this is a duplicate is decided by how that transaction ends.
  with firsts as (
    select distinct on (i.msg_id) i.msg_id, v_seqs[i.n] as seq
    from unnest(publish_many.msg_ids) with ordinality as i(msg_id, n)
    where i.msg_id is not null
    order by i.msg_id, i.n
  ), taken as (
    insert into klieo.message_ids as d (msg_id, seq, expires_at)
    select firsts.msg_id, firsts.seq, clock_timestamp() + interval '2 minutes'
    from firsts
    order by firsts.msg_id
    on conflict (msg_id) do update
      set seq = excluded.seq, expires_at = excluded.expires_at
      where d.expires_at <= clock_timestamp()
    returning d.seq
  )
  select coalesce(array_agg(taken.seq), '{}') into v_new from taken;

  insert into klieo.messages (seq, subject, payload, headers)
  select v_seqs[i.n], i.subject, substring(publish_many.payloads from i.start for i.length), coalesce(i.headers::jsonb, '{}')
  from unnest(publish_many.subjects, publish_many.starts, publish_many.lengths, publish_many.headers, publish_many.msg_ids)
    with ordinality as i(subject, start, length, headers, msg_id, n)
  where i.msg_id is null or v_seqs[i.n] = any(v_new)
  order by i.n;

  -- A statement of its own: it sees what the publisher that was waited for has committed.
  return query
    select
      case when fresh.yes then v_seqs[i.n] else (select d.seq from klieo.message_ids d where d.msg_id = i.msg_id) end,
      not fresh.yes
    from unnest(publish_many.msg_ids) with ordinality as i(msg_id, n),
      lateral (select i.msg_id is null or v_seqs[i.n] = any(v_new)) as fresh(yes)
    order by i.n;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.purge_messages(filter text, before timestamp with time zone DEFAULT NULL::timestamp with time zone)
 RETURNS bigint
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
declare
  v_tx xid8 := '0';
  v_seq bigint := 0;
  v_count bigint;
  v_sum bigint := 0;
begin
  perform klieo.check_filter(purge_messages.filter);
  loop
    select p.purged, p.last_tx, p.last_seq into v_count, v_tx, v_seq
    from klieo.purge_messages_from(purge_messages.filter, purge_messages.before, v_tx, v_seq, 10000) p;
    exit when not found;
    v_sum := v_sum + v_count;
  end loop;
  return v_sum;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.purge_messages_from(filter text, before timestamp with time zone, after_tx xid8, after_seq bigint, max_messages integer)
 RETURNS TABLE(purged bigint, last_tx xid8, last_seq bigint)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_pattern text := klieo.filter_pattern(purge_messages_from.filter);
  v_txs xid8[];
  v_seqs bigint[];
  v_all int;
begin
  perform klieo.check_filter(purge_messages_from.filter);
  with scanned as materialized (
    select m.tx, m.seq, m.subject, m.published_at
    from klieo.messages m
    where (m.tx, m.seq) > (purge_messages_from.after_tx, purge_messages_from.after_seq)
    order by m.tx, m.seq
    limit purge_messages_from.max_messages
  ), chosen as (
    select s.tx, s.seq from scanned s
    where (s.subject = purge_messages_from.filter or s.subject ~ v_pattern)
      and (purge_messages_from.before is null or s.published_at < purge_messages_from.before)
  )
  select l.tx, l.seq, (select count(*) from scanned), (select array_agg(c.tx order by c.tx, c.seq) from chosen c),
    (select array_agg(c.seq order by c.tx, c.seq) from chosen c)
  into last_tx, last_seq, v_all, v_txs, v_seqs
  from (select s.tx, s.seq from scanned s order by s.tx desc, s.seq desc limit 1) l;
  if not found then
    return;
  end if;
  delete from klieo.messages m
  using unnest(v_txs, v_seqs) as c(tx, seq)
  where m.tx = c.tx and m.seq = c.seq;
  get diagnostics purged = row_count;
  -- Whoever holds one may settle it. One that nobody holds would be looked for, and not found. By durable and then by seq, as the index
  -- has them; and `is true` keeps this a look into a hash table, which as a join might become one into all that is purged for each.
  with waiting as materialized (
    select d.consumer_id, d.seq
    from klieo.deliveries d
    where d.consumer_id = any (array(select o.id from klieo.consumer_offsets o))
      and d.seq between (select min(c.seq) from unnest(v_seqs) as c(seq)) and (select max(c.seq) from unnest(v_seqs) as c(seq))
      and d.token is null
      and (d.seq in (select c.seq from unnest(v_seqs) as c(seq))) is true
    for update skip locked
  )
  delete from klieo.deliveries d
  using waiting w
  where d.consumer_id = w.consumer_id and d.seq = w.seq;
  return next;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.purge_queue(queue text, states text[] DEFAULT '{ready,scheduled,dead}'::text[], max_jobs integer DEFAULT NULL::integer)
 RETURNS bigint
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_dead bigint := 0;
  v_rest bigint := 0;
begin
  perform klieo.check_name('queue', purge_queue.queue);
  if purge_queue.states is null or not purge_queue.states <@ array['ready', 'scheduled', 'dead'] then
    raise exception 'states must be of ready, scheduled and dead' using errcode = '22023';
  end if;
  -- The dead and the living are in an index each, and no index has both.
  if 'dead' = any (purge_queue.states) then
    delete from klieo.jobs j
    where j.id = any (array(
      select d.id from klieo.jobs d
      where d.queue = purge_queue.queue and d.died_at is not null
      limit purge_queue.max_jobs
      for update skip locked));
    get diagnostics v_dead = row_count;
  end if;
  if purge_queue.states && array['ready', 'scheduled'] then
    delete from klieo.jobs j
    where j.id = any (array(
      select l.id from klieo.jobs l
      where l.queue = purge_queue.queue and l.died_at is null
        and case
          when l.visible_at <= clock_timestamp() then 'ready' = any (purge_queue.states)
          else l.token is null and 'scheduled' = any (purge_queue.states)
        end
      limit purge_queue.max_jobs - v_dead
      for update skip locked));
    get diagnostics v_rest = row_count;
  end if;
  return v_dead + v_rest;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.reap_deliveries(max_messages integer)
 RETURNS TABLE(durable text, count integer)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
begin
  return query
    with ended as materialized (
      select d.consumer_id, least(count(*), reap_deliveries.max_messages)::int as most
      from (
        select d.consumer_id from klieo.deliveries d
        where d.final and d.visible_at <= (select clock_timestamp())
        order by d.visible_at
        limit reap_deliveries.max_messages
      ) d
      group by d.consumer_id
    ), buried as materialized (
      select ended.consumer_id, klieo.bury_deliveries(ended.consumer_id, ended.most) as count from ended
    )
    select o.durable, buried.count
    from buried
    join klieo.consumer_offsets o on o.id = buried.consumer_id
    where buried.count > 0;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.reap_jobs(max_jobs integer)
 RETURNS TABLE(queue text, count integer)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_ended bigint[];
begin
  with ended as materialized (
    select j.id
    from klieo.jobs j
    where j.died_at is null and j.attempts >= j.max_attempts and j.visible_at <= (select clock_timestamp())
    order by j.visible_at
    limit reap_jobs.max_jobs
    for no key update skip locked
  )
  select array_agg(ended.id) into v_ended from ended;
  if v_ended is null then
    return;
  end if;
  perform klieo.bury_jobs(v_ended, null);
  return query select j.queue, count(*)::int from klieo.jobs j where j.id = any(v_ended) group by j.queue;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.rebase()
 RETURNS boolean
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
declare
  v_lo pg_snapshot;
begin
  if not klieo.restored() then
    return false;
  end if;
  lock table klieo.consumer_offsets, klieo.deliveries, klieo.messages, klieo.kv_entries, klieo.kv_changes, klieo.kv_horizons in access exclusive mode;
  if not klieo.restored() then
    return false;
  end if;
  -- From stored data alone: what a durable had not been handed out waits in deliveries, with no attempt counted.
  -- Due in the order of the log, and no two at once: a fetch would sort all that are.
  insert into klieo.deliveries (consumer_id, tx, seq, attempt, visible_at)
  select o.id, m.tx, m.seq, 0,
    now() - interval '1 hour' + row_number() over (partition by o.id order by m.tx, m.seq) * interval '1 microsecond'
  from klieo.consumer_offsets o
  join klieo.messages m
    on (m.subject = o.filter or m.subject ~ o.pattern) and m.seq >= o.start_seq and m.published_at >= o.start_time
  where not pg_visible_in_snapshot(m.tx, o.lo)
    and not coalesce(pg_visible_in_snapshot(m.tx, o.hi) and (m.tx, m.seq) <= (o.pos_tx, o.pos_seq), false)
  on conflict do nothing;
  update klieo.deliveries set tx = '3';
  update klieo.messages set tx = '3';
  v_lo := klieo.cursor_snapshot();
  update klieo.consumer_offsets set lo = v_lo, hi = null, pos_tx = '0', pos_seq = 0;
  update klieo.kv_entries set tx = '3';
  truncate klieo.kv_changes, klieo.kv_horizons;
  return true;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.register_responders(process integer, filters text[], alive_ms double precision)
 RETURNS void
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
begin
  delete from klieo.responders r where r.instance_id = register_responders.process;
  insert into klieo.responders (instance_id, filter, pattern, alive_until)
  select register_responders.process, f.filter, klieo.filter_pattern(f.filter),
    clock_timestamp() + make_interval(secs => register_responders.alive_ms / 1000)
  from unnest(register_responders.filters) as f(filter);
end
$function$;

CREATE OR REPLACE FUNCTION klieo.release(id bigint, token uuid)
 RETURNS boolean
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  perform klieo.check_holder('id', release.id, release.token);
  return exists (select from klieo.release_jobs(array[release.id], array[release.token], array[false]));
end
$function$;

CREATE OR REPLACE FUNCTION klieo.release_deliveries(consumers integer[], seqs bigint[], tokens uuid[])
 RETURNS SETOF integer
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  m record;
begin
  for m in
    select * from klieo.settle_deliveries(release_deliveries.consumers, release_deliveries.seqs, release_deliveries.tokens, true)
  loop
    update klieo.deliveries d
    set attempt = d.attempt - 1, token = null, final = false, visible_at = clock_timestamp()
    where d.consumer_id = m.consumer_id and d.seq = m.seq;
    return next m.n;
  end loop;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.release_jobs(ids bigint[], tokens uuid[], counted boolean[] DEFAULT NULL::boolean[])
 RETURNS SETOF bigint
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_mine bigint[] := klieo.settle_jobs(release_jobs.ids, release_jobs.tokens, true);
  v_uncounted bigint[] := array(
    select u.id from unnest(release_jobs.ids, release_jobs.counted) as u(id, counted) where not u.counted and u.id = any(v_mine));
  v_counted bigint[] := array(select m.id from unnest(v_mine) as m(id) where m.id <> all (v_uncounted));
  v_ended bigint[];
begin
  with given as (
    -- Where the last lease is over already, it died of that, as if it had been reaped a moment before.
    update klieo.jobs j
    set token = case when j.attempts >= j.max_attempts and j.visible_at <= clock_timestamp() then j.token end,
      run_at = case when j.attempts >= j.max_attempts then j.run_at else clock_timestamp() end, visible_at = clock_timestamp()
    where j.id = any(v_counted)
    returning j.id, j.attempts >= j.max_attempts as ended
  )
  select array_agg(given.id) filter (where given.ended) into v_ended from given;
  if v_ended is not null then
    perform klieo.bury_jobs(v_ended, null);
  end if;
  -- As if nobody had claimed it: it keeps its place in the queue, which may lie below a head.
  if v_uncounted <> '{}' then
    update klieo.jobs j
    set token = null, visible_at = j.run_at, attempts = j.attempts - 1
    where j.id = any(v_uncounted);
    perform klieo.move_head(f.queue, f.priority, 'infinity', f.first)
    from (select j.queue, j.priority, min(j.run_at) as first from klieo.jobs j where j.id = any(v_uncounted) group by j.queue, j.priority) f;
  end if;
  return query select unnest(v_mine);
end
$function$;

CREATE OR REPLACE FUNCTION klieo.release_lease(bucket text, key text, token uuid)
 RETURNS void
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
begin
  update klieo.kv_leases l
  set expires_at = '-infinity'
  where l.bucket = release_lease.bucket and l.key = release_lease.key and l.token = release_lease.token;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.release_message(durable text, seq bigint, token uuid)
 RETURNS boolean
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
#variable_conflict use_column
begin
  perform klieo.check_durable(release_message.durable);
  perform klieo.check_holder('seq', release_message.seq, release_message.token);
  return exists (
    select from klieo.find_durable(release_message.durable) f
    cross join lateral klieo.release_deliveries(array[f.id], array[release_message.seq], array[release_message.token]) n);
end
$function$;

CREATE OR REPLACE FUNCTION klieo.remove_job(id bigint)
 RETURNS TABLE(outcome text, queue text)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  j klieo.jobs;
begin
  select * into j from klieo.jobs x where x.id = remove_job.id for update skip locked;
  if not found then
    return query select 'locked', x.queue from klieo.jobs x where x.id = remove_job.id;
    return;
  end if;
  queue := j.queue;
  if j.died_at is null and j.token is not null and j.visible_at > clock_timestamp() then
    outcome := 'running';
  else
    delete from klieo.jobs x where x.id = remove_job.id;
    outcome := 'removed';
  end if;
  return next;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.reply_to_request(id uuid, process integer, ok boolean, payload bytea, channel text, notice text)
 RETURNS text
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_inbox text;
begin
  with answered as (
    delete from klieo.requests r
    where r.id = reply_to_request.id and r.claimed_by = reply_to_request.process and r.deadline > clock_timestamp()
    returning r.id, r.inbox, r.deadline
  )
  insert into klieo.replies as p (request_id, inbox, ok, payload, expires_at)
  select a.id, a.inbox, reply_to_request.ok, reply_to_request.payload, a.deadline from answered a
  on conflict do nothing
  returning p.inbox into v_inbox;
  if v_inbox is not null and reply_to_request.channel is not null then
    perform pg_notify(reply_to_request.channel, replace(reply_to_request.notice, '<inbox>', v_inbox));
  end if;
  return v_inbox;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.resign_maintainer(token uuid)
 RETURNS void
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  perform klieo.release_lease('$klieo', 'maintenance', resign_maintainer.token);
end
$function$;

CREATE OR REPLACE FUNCTION klieo.restored()
 RETURNS boolean
 LANGUAGE sql
 STABLE SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
AS $function$
  select exists (
      select from klieo.consumer_offsets o
      where pg_snapshot_xmax(o.lo) > pg_snapshot_xmax(pg_current_snapshot()) or pg_snapshot_xmax(o.hi) > pg_snapshot_xmax(pg_current_snapshot())
    )
    or coalesce((select m.tx >= pg_snapshot_xmax(pg_current_snapshot()) from klieo.messages m order by m.tx desc, m.seq desc limit 1), false)
    or coalesce((select c.tx >= pg_snapshot_xmax(pg_current_snapshot()) from klieo.kv_changes c order by c.tx desc, c.revision desc limit 1), false)
    or exists (select from klieo.kv_horizons h where h.tx > pg_snapshot_xmax(pg_current_snapshot()))
$function$;

CREATE OR REPLACE FUNCTION klieo.resume_queue(queue text)
 RETURNS boolean
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
#variable_conflict use_column
begin
  perform klieo.check_name('queue', resume_queue.queue);
  delete from klieo.paused_queues p where p.queue = resume_queue.queue;
  return found;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.retry_dead(queue text, id bigint DEFAULT NULL::bigint)
 RETURNS bigint
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
#variable_conflict use_column
declare
  v_count bigint;
begin
  update klieo.jobs j
  set died_at = null, attempts = 0, token = null, run_at = clock_timestamp(), visible_at = clock_timestamp()
  where j.queue = retry_dead.queue and j.died_at is not null and (retry_dead.id is null or j.id = retry_dead.id);
  get diagnostics v_count = row_count;
  return v_count;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.retry_job(id bigint)
 RETURNS TABLE(outcome text, queue text)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  j klieo.jobs;
begin
  select * into j from klieo.jobs x where x.id = retry_job.id for no key update skip locked;
  if not found then
    return query select 'locked', x.queue from klieo.jobs x where x.id = retry_job.id;
    return;
  end if;
  queue := j.queue;
  if j.died_at is null and j.attempts >= j.max_attempts and j.visible_at <= clock_timestamp() then
    -- Its last lease ran out, and nobody has met it since.
    perform klieo.bury_jobs(array[j.id], null);
    j.died_at := clock_timestamp();
  end if;
  if j.died_at is not null then
    -- As retry_dead() does, which may look through all the dead of the queue for it.
    update klieo.jobs x
    set died_at = null, attempts = 0, token = null, run_at = clock_timestamp(), visible_at = clock_timestamp()
    where x.id = retry_job.id;
    outcome := 'retried';
  elsif j.visible_at <= clock_timestamp() then
    outcome := 'ready';
  elsif j.token is not null then
    outcome := 'running';
  else
    update klieo.jobs x set run_at = clock_timestamp(), visible_at = clock_timestamp() where x.id = retry_job.id;
    outcome := 'retried';
  end if;
  return next;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.revoke_public()
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
declare
  r record;
begin
  for r in select distinct g.may, g.name from klieo.role_rights() g loop
    if r.may = 'execute' then
      execute format('revoke all on function %I.%I from public', klieo.schema_name(), r.name);
    elsif to_regclass(format('%I.%I', klieo.schema_name(), r.name)) is null then
      continue;
    elsif r.may = 'usage' then
      execute format('revoke all on sequence %I.%I from public', klieo.schema_name(), r.name);
    else
      execute format('revoke all on table %I.%I from public', klieo.schema_name(), r.name);
    end if;
  end loop;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.revoke_role(role text)
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
#variable_conflict use_column
declare
  r record;
begin
  if not exists (select from pg_roles a where a.rolname = revoke_role.role) then
    raise exception 'role does not exist' using errcode = '42704';
  end if;
  for r in select distinct g.may, g.name from klieo.role_rights() g loop
    if r.may = 'execute' then
      execute format('revoke all on function %I.%I from %I', klieo.schema_name(), r.name, revoke_role.role);
    elsif to_regclass(format('%I.%I', klieo.schema_name(), r.name)) is null then
      continue;
    elsif r.may = 'usage' then
      execute format('revoke all on sequence %I.%I from %I', klieo.schema_name(), r.name, revoke_role.role);
    else
      execute format('revoke all on table %I.%I from %I', klieo.schema_name(), r.name, revoke_role.role);
    end if;
  end loop;
  execute format('revoke all on schema %I from %I', klieo.schema_name(), revoke_role.role);
end
$function$;

CREATE OR REPLACE FUNCTION klieo.role_rights()
 RETURNS TABLE(kind text, may text, name text)
 LANGUAGE sql
 IMMUTABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
  select k.kind, r.may, n.name
  from (values
    -- What every process looks at when it connects.
    ('{producer,worker,reader,admin}'::text[], 'select', '{meta,migrations}'::text[]),
    ('{producer,worker,reader,admin}', 'execute', '{restored}'),

    ('{producer,worker}', 'execute', '{publish,publish_many,enqueue,enqueue_many,enqueue_one}'),
    ('{producer,worker}', 'execute', '{send_request,withdraw_request,pick_up_replies}'),
    ('{producer,worker}', 'execute', '{channel}'),

    ('{worker}', 'execute', '{find_durable,create_durable,fetch_messages,bury_deliveries,ack_deliveries,nak_deliveries,extend_deliveries,release_deliveries,delivery_whereabouts}'),
    ('{worker}', 'execute', '{claim_jobs,take_jobs,ack_job,ack_jobs,nak_jobs,release_jobs,dead_letter_jobs,heartbeat_job,job_whereabouts}'),
    ('{worker}', 'execute', '{claim,heartbeat,ack,nak,release,dead_letter}'),
    ('{worker}', 'execute', '{subscribe,fetch,bury,ack_message,nak_message,term_message,extend_message,release_message}'),
    ('{worker}', 'execute', '{kv_put,kv_cas,kv_delete,kv_write,kv_write_soon,kv_entries_at,kv_changes_between}'),
    ('{worker}', 'execute', '{take_lease,lease_left,extend_lease,release_lease}'),
    ('{worker}', 'execute', '{presence_class,new_instance,register_responders,sign_of_life,claim_requests,reply_to_request}'),

    ('{worker,reader,admin}', 'execute', '{kv_get,kv_get_many,kv_keys}'),
    ('{reader,admin}', 'select', '{queue_stats,consumer_stats,job_details,message_details,bucket_stats}'),
    ('{reader,admin}', 'execute', '{as_text}'),

    ('{admin}', 'execute', '{retry_dead,delete_durable,rebase}'),
    ('{admin}', 'execute', '{retry_job,cancel_job,remove_job,purge_queue,pause_queue,resume_queue,seek_durable,purge_messages,purge_messages_from}'),
    ('{admin}', 'execute', '{elect_maintainer,resign_maintainer,reap_jobs,reap_deliveries,kv_expire,prune_messages,prune_kv,prune_rest}'),

    -- The owner's alone: what the others are made of.
    ('{owner}', 'execute', '{role_rights,grant_role,revoke_role,create_roles,revoke_public,schema_name}'),
    ('{owner}', 'execute', '{filter_pattern,check_subject,check_filter,check_name,check_key,check_headers,check_payload}'),
    ('{owner}', 'execute', '{check_id,check_number,check_holder,check_durable,check_unwritten}'),
    ('{owner}', 'execute', '{cursor_snapshot,window_has_message,creation_lock,settle_deliveries,extend_waiting}'),
    ('{owner}', 'execute', '{settle_jobs,bury_jobs,look_is_due,look_for_heads,head_before,move_head,next_job_at}'),
    ('{owner}', 'execute', '{dedup_lives,grant_lease,live_responders}'),
    ('{owner}', 'select', '{messages,message_ids,consumer_offsets,deliveries,kv_entries,kv_changes,kv_horizons,kv_leases,jobs,job_heads,paused_queues,responders,requests,replies,migrations_lock}'),
    ('{owner}', 'usage', '{message_seq,kv_revision,lease_fence,job_id,instance_id,consumer_offsets_id_seq,job_heads_seq_seq,responders_id_seq}')
  ) as r(kinds, may, names),
  unnest(r.kinds) as k(kind),
  unnest(r.names) as n(name)
$function$;

CREATE OR REPLACE FUNCTION klieo.schema_name()
 RETURNS name
 LANGUAGE sql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
  select n.nspname from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = 'klieo.meta'::regclass
$function$;

CREATE OR REPLACE FUNCTION klieo.seek_durable(durable text, start_seq bigint DEFAULT NULL::bigint, start_time timestamp with time zone DEFAULT NULL::timestamp with time zone, start_new boolean DEFAULT false)
 RETURNS boolean
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
AS $function$
#variable_conflict use_column
declare
  v_id int;
begin
  -- Apart from pruning, as the making of one.
  perform pg_advisory_xact_lock_shared(klieo.creation_lock());
  select o.id into v_id from klieo.consumer_offsets o where o.durable = seek_durable.durable for update;
  if not found then
    return false;
  end if;
  update klieo.consumer_offsets o
  set id = default,
    lo = case when seek_durable.start_new then klieo.cursor_snapshot() else '1:1:' end,
    hi = null,
    pos_tx = '0',
    pos_seq = 0,
    start_seq = coalesce(seek_durable.start_seq, 0),
    start_time = coalesce(seek_durable.start_time, '-infinity')
  where o.id = v_id;
  -- What an open transaction holds is removed by it, or later with what belongs to no durable.
  delete from klieo.deliveries d
  where d.consumer_id = v_id
    and d.seq = any (array(select x.seq from klieo.deliveries x where x.consumer_id = v_id order by x.seq for update skip locked));
  return true;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.send_request(id uuid, subject text, headers jsonb, payload bytea, inbox text, timeout_ms double precision, channel text, notice text)
 RETURNS boolean
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  if not klieo.live_responders(send_request.subject) then
    return false;
  end if;
  insert into klieo.requests (id, subject, headers, payload, inbox, deadline)
  values (send_request.id, send_request.subject, send_request.headers, send_request.payload, send_request.inbox,
    now() + make_interval(secs => send_request.timeout_ms / 1000));
  if send_request.channel is not null then
    perform pg_notify(send_request.channel, send_request.notice);
  end if;
  return true;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.settle_deliveries(consumers integer[], seqs bigint[], tokens uuid[], no_wait boolean)
 RETURNS TABLE(n integer, consumer_id integer, seq bigint)
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
begin
  -- Locked one after the other in one order, so that two batches do not deadlock. The token is looked at again after a wait.
  if settle_deliveries.no_wait then
    return query
      select g.n::int, d.consumer_id, d.seq
      from (
        select * from unnest(settle_deliveries.consumers, settle_deliveries.seqs, settle_deliveries.tokens)
          with ordinality as u(consumer_id, seq, token, n)
        order by u.consumer_id, u.seq
      ) g
      cross join lateral (
        select d.consumer_id, d.seq from klieo.deliveries d
        where d.consumer_id = g.consumer_id and d.seq = g.seq and d.token = g.token
        for update skip locked
      ) d;
  else
    return query
      select g.n::int, d.consumer_id, d.seq
      from (
        select * from unnest(settle_deliveries.consumers, settle_deliveries.seqs, settle_deliveries.tokens)
          with ordinality as u(consumer_id, seq, token, n)
        order by u.consumer_id, u.seq
      ) g
      cross join lateral (
        select d.consumer_id, d.seq from klieo.deliveries d
        where d.consumer_id = g.consumer_id and d.seq = g.seq and d.token = g.token
        for update
      ) d;
  end if;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.settle_jobs(ids bigint[], tokens uuid[], no_wait boolean)
 RETURNS bigint[]
 LANGUAGE plpgsql
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
begin
  -- Locked one after the other in the order of their ids, so that two batches do not deadlock. The token is looked at again
  -- after a wait.
  if settle_jobs.no_wait then
    return array(
      select j.id
      from (select * from unnest(settle_jobs.ids, settle_jobs.tokens) as u(id, token) order by u.id) s
      cross join lateral (select j.id from klieo.jobs j where j.id = s.id and j.token = s.token for update skip locked) j);
  end if;
  return array(
    select j.id
    from (select * from unnest(settle_jobs.ids, settle_jobs.tokens) as u(id, token) order by u.id) s
    cross join lateral (select j.id from klieo.jobs j where j.id = s.id and j.token = s.token for update) j);
end
$function$;

CREATE OR REPLACE FUNCTION klieo.sign_of_life(process integer, alive_ms double precision)
 RETURNS integer
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_rows int;
begin
  update klieo.responders r
  set alive_until = clock_timestamp() + make_interval(secs => sign_of_life.alive_ms / 1000)
  where r.instance_id = sign_of_life.process;
  get diagnostics v_rows = row_count;
  return v_rows;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.subscribe(durable text, filter text, start text DEFAULT 'all'::text, start_seq bigint DEFAULT NULL::bigint, start_time timestamp with time zone DEFAULT NULL::timestamp with time zone)
 RETURNS boolean
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
declare
  v_filter text;
begin
  perform klieo.check_durable(subscribe.durable);
  perform klieo.check_filter(subscribe.filter);
  if subscribe.start is null or subscribe.start not in ('all', 'new') then
    raise exception 'start must be all or new' using errcode = '22023';
  elsif num_nonnulls(nullif(subscribe.start, 'all'), subscribe.start_seq, subscribe.start_time) > 1 then
    raise exception 'start must be given once: as new, as start_seq or as start_time' using errcode = '22023';
  elsif subscribe.start_seq is not null then
    perform klieo.check_number('start_seq', subscribe.start_seq, 0, 9007199254740991);
  end if;
  loop
    perform klieo.create_durable(subscribe.durable, subscribe.filter, subscribe.start_seq, subscribe.start_time, subscribe.start = 'new');
    if found then
      return true;
    end if;
    select f.filter into v_filter from klieo.find_durable(subscribe.durable) f;
    -- Unless it was deleted between the two statements: once more.
    exit when found;
  end loop;
  if v_filter <> subscribe.filter then
    raise exception 'the durable exists with another filter' using errcode = 'KB005';
  end if;
  return false;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.take_jobs(queue text, worker_id text, lease_ttl_ms bigint, max_jobs integer, max_bytes bigint, horizon_ms bigint)
 RETURNS TABLE(id bigint, payload bytea, headers jsonb, attempt integer, max_attempts integer, fence integer, token uuid, expires_at timestamp with time zone)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
declare
  v_now timestamptz := clock_timestamp();
  v_ttl interval := make_interval(secs => take_jobs.lease_ttl_ms / 1000.0);
  v_priority smallint := 101;
  v_room int := take_jobs.max_jobs;
  v_bytes bigint := take_jobs.max_bytes;
  v_heads klieo.job_heads;
  v_floor smallint;
  v_head timestamptz := '-infinity';
  v_started timestamptz;
  v_took interval;
  v_count int;
  v_size bigint;
  v_first timestamptz;
  v_ids bigint[];
  v_sizes bigint[];
  v_ended bigint[];
  v_token text;
  v_buried boolean := false;
  v_slow boolean := false;
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'jobs must be claimed in READ COMMITTED' using errcode = 'KB003';
  end if;
  if exists (select from klieo.paused_queues p where p.queue = take_jobs.queue) then
    return;
  end if;
  select h.* into v_heads from klieo.job_heads h where h.queue = take_jobs.queue order by h.seq desc limit 1;
  if v_heads.priorities <> '{}' and klieo.look_is_due(v_heads.looked_at, v_heads.look_ms) then
    perform klieo.look_for_heads(take_jobs.queue);
    select h.* into v_heads from klieo.job_heads h where h.queue = take_jobs.queue order by h.seq desc limit 1;
  end if;
  loop
    -- The next priority below the last: one that is there, or one with a head, where looking for what is there would visit the dead.
    if v_heads.priorities <> '{}' then
      select u.priority, u.head into v_floor, v_head
      from unnest(v_heads.priorities, v_heads.heads) as u(priority, head)
      where u.priority < v_priority
      order by u.priority desc
      limit 1;
    end if;
    v_started := clock_timestamp();
    -- The limit sits with the lock, in a materialized CTE: elsewhere it would lock too many rows or answer too few.
    with there as materialized (
      select coalesce(t.priority, v_floor) as priority, case when t.priority is null then v_head else '-infinity' end as head
      from (
        select (
          select j.priority
          from klieo.jobs j
          where j.queue = take_jobs.queue and j.died_at is null and j.priority < v_priority and j.priority > coalesce(v_floor, -101::smallint)
          order by j.priority desc
          limit 1) as priority
        offset 0) t
    ), due as materialized (
      select j.id, j.visible_at, j.attempts >= j.max_attempts as ended, octet_length(j.payload) as size
      from klieo.jobs j
      where j.queue = take_jobs.queue and j.died_at is null and j.priority = (select t.priority from there t)
        and j.visible_at <= v_now and j.visible_at >= (select t.head from there t)
      order by j.visible_at, j.id
      limit v_room
      for no key update skip locked
    )
    select (select t.priority from there t), count(*), coalesce(sum(d.size) filter (where not d.ended), 0),
      array_agg(d.id) filter (where not d.ended), array_agg(d.size) filter (where not d.ended), array_agg(d.id) filter (where d.ended)
    into v_priority, v_count, v_size, v_ids, v_sizes, v_ended
    from due d;
    v_took := clock_timestamp() - v_started;
    if v_priority = v_floor then
      if v_took > interval '0.3 milliseconds' + v_count * interval '5 microseconds' then
        -- Not behind what somebody has locked: he may let go of it as it is.
        select j.visible_at into v_first
        from klieo.jobs j
        where j.queue = take_jobs.queue and j.died_at is null and j.priority = v_priority and j.visible_at >= v_head and j.visible_at <= v_now
        order by j.visible_at
        limit 1;
        if klieo.head_before(v_first, v_now) > v_head then
          perform klieo.move_head(take_jobs.queue, v_priority, v_head, klieo.head_before(v_first, v_now));
        end if;
      end if;
    elsif v_took > interval '2 milliseconds' + v_count * interval '20 microseconds' then
      v_slow := true;
    end if;
    exit when v_priority is null;
    if v_ids is not null then
      if v_size > v_bytes then
        -- At least one, and no more than fit.
        v_ids := array(
          select s.id
          from (select u.*, sum(u.size) over (order by u.n) - u.size as before from unnest(v_ids, v_sizes) with ordinality as u(id, size, n)) s
          where s.before < v_bytes
          order by s.n);
      end if;
      v_room := v_room - cardinality(v_ids);
      v_bytes := v_bytes - v_size;
      -- Random once for the claim, and of each job its own: drawn for each, the random bits would cost as much as the rest.
      v_token := coalesce(v_token, left(replace(gen_random_uuid()::text, '-', ''), 16));
      if v_ids = array(select u.id from unnest(v_ids) as u(id) order by u.id) then
        -- By the primary key they come in this order.
        return query
          update klieo.jobs j
          set attempts = j.attempts + 1, fence = j.fence + 1, token = (v_token || lpad(to_hex(j.id), 16, '0'))::uuid,
            worker_id = take_jobs.worker_id, visible_at = clock_timestamp() + v_ttl
          where j.id = any(v_ids)
          returning j.id, j.payload, j.headers, j.attempts, j.max_attempts, j.fence, j.token, j.visible_at;
      else
        return query
          with claimed as (
            update klieo.jobs j
            set attempts = j.attempts + 1, fence = j.fence + 1, token = (v_token || lpad(to_hex(j.id), 16, '0'))::uuid,
              worker_id = take_jobs.worker_id, visible_at = clock_timestamp() + v_ttl
            where j.id = any(v_ids)
            returning j.id, j.payload, j.headers, j.attempts, j.max_attempts, j.fence, j.token, j.visible_at
          )
          select c.id, c.payload, c.headers, c.attempts, c.max_attempts, c.fence, c.token, c.visible_at
          from claimed c
          join unnest(v_ids) with ordinality as o(id, n) on o.id = c.id
          order by o.n;
      end if;
    end if;
    if v_ended is not null then
      perform klieo.bury_jobs(v_ended, null);
      v_buried := true;
      -- They took the places of others.
      if v_room > 0 and v_bytes > 0 then
        v_priority := v_priority + 1;
      end if;
    end if;
    exit when v_room = 0 or v_bytes <= 0;
    v_floor := null;
    v_head := '-infinity';
  end loop;
  if v_slow and klieo.look_is_due(v_heads.looked_at, v_heads.look_ms) then
    perform klieo.look_for_heads(take_jobs.queue);
  end if;
  if v_buried or (v_room = take_jobs.max_jobs and take_jobs.horizon_ms is not null) then
    id := null;
    fence := v_buried::int;
    expires_at := null;
    if v_room = take_jobs.max_jobs then
      expires_at := klieo.next_job_at(take_jobs.queue, take_jobs.horizon_ms);
    end if;
    max_attempts := ceil(extract(epoch from expires_at - clock_timestamp()) * 1000);
    return next;
  end if;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.take_lease(bucket text, key text, token uuid, holder text, ttl_ms double precision)
 RETURNS TABLE(fence bigint, expires_at timestamp with time zone)
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  perform klieo.check_key(take_lease.bucket, take_lease.key, true);
  return query
    select g.fence, g.expires_at
    from klieo.grant_lease(take_lease.bucket, take_lease.key, take_lease.token, take_lease.holder, take_lease.ttl_ms) g;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.term_message(durable text, seq bigint, token uuid)
 RETURNS boolean
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
begin
  return klieo.ack_message(term_message.durable, term_message.seq, term_message.token);
end
$function$;

CREATE OR REPLACE FUNCTION klieo.window_has_message(lo pg_snapshot, hi pg_snapshot)
 RETURNS boolean
 LANGUAGE plpgsql
 STABLE
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_bitmapscan TO 'off'
 SET enable_mergejoin TO 'off'
 SET jit TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
declare
  v_tx xid8;
begin
  if exists (
    select from klieo.messages m
    where m.tx = any (array(select x.tx from pg_snapshot_xip(lo) as x(tx) where pg_visible_in_snapshot(x.tx, hi)))
  ) then
    return true;
  end if;
  -- From transaction to transaction, not from row to row: one that is open may have published a great deal.
  select m.tx into v_tx from klieo.messages m where m.tx >= pg_snapshot_xmax(lo) and m.tx < pg_snapshot_xmax(hi) order by m.tx, m.seq limit 1;
  while found loop
    if pg_visible_in_snapshot(v_tx, hi) then
      return true;
    end if;
    select m.tx into v_tx from klieo.messages m where m.tx > v_tx and m.tx < pg_snapshot_xmax(hi) order by m.tx, m.seq limit 1;
  end loop;
  return false;
end
$function$;

CREATE OR REPLACE FUNCTION klieo.withdraw_request(id uuid)
 RETURNS void
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET plan_cache_mode TO 'force_generic_plan'
AS $function$
#variable_conflict use_column
begin
  delete from klieo.requests r where r.id = withdraw_request.id;
end
$function$;

comment on column klieo.bucket_stats.bucket is 'The bucket; dedup.<queue> holds the idempotency records of a queue.';

comment on column klieo.bucket_stats.bytes is 'Bytes of their values.';

comment on column klieo.bucket_stats.keys is 'Present keys.';

comment on column klieo.consumer_offsets.created_at is 'When the durable was made.';

comment on column klieo.consumer_offsets.durable is 'The name.';

comment on column klieo.consumer_offsets.filter is 'The subjects it takes; * is one token, a last > one or more.';

comment on column klieo.consumer_offsets.hi is 'The open window: what hi sees and lo does not is being handed out, in the order (tx, seq); null: no window is open.';

comment on column klieo.consumer_offsets.id is 'Names the durable in deliveries; a durable made anew gets another one.';

comment on column klieo.consumer_offsets.last_active_at is 'When a member last fetched, to within half a minute.';

comment on column klieo.consumer_offsets.lo is 'Whatever this snapshot sees has been handed out.';

comment on column klieo.consumer_offsets.pattern is 'The same as a regular expression.';

comment on column klieo.consumer_offsets.pos_seq is 'And its seq.';

comment on column klieo.consumer_offsets.pos_tx is 'The last message of the open window that was handed out or passed over: its tx.';

comment on column klieo.consumer_offsets.start_seq is 'Messages with a smaller seq are not for it.';

comment on column klieo.consumer_offsets.start_time is 'Messages published earlier are not for it.';

comment on column klieo.consumer_stats.durable is 'The name.';

comment on column klieo.consumer_stats.filter is 'The subjects it takes.';

comment on column klieo.consumer_stats.in_flight is 'Handed out and unsettled, ack wait not over.';

comment on column klieo.consumer_stats.last_active_at is 'When a member last fetched, to within half a minute.';

comment on column klieo.consumer_stats.pending is 'Messages never handed out yet.';

comment on column klieo.consumer_stats.redelivering is 'Waiting to be handed out again.';

comment on column klieo.deliveries.attempt is 'Deliveries so far.';

comment on column klieo.deliveries.consumer_id is 'The durable.';

comment on column klieo.deliveries.final is 'This delivery is the last one allowed: left unsettled, the message goes to the dead-letter subject.';

comment on column klieo.deliveries.seq is 'The message.';

comment on column klieo.deliveries.token is 'Random, new with each delivery: only its bearer may settle. Null while nobody holds the message.';

comment on column klieo.deliveries.tx is 'And its tx, by which the log finds it.';

comment on column klieo.deliveries.visible_at is 'When it may be handed out again.';

comment on column klieo.job_details.attempts is 'Claims so far.';

comment on column klieo.job_details.dedup_key is 'Its idempotency key.';

comment on column klieo.job_details.died_at is 'When it became dead.';

comment on column klieo.job_details.enqueued_at is 'When it was enqueued.';

comment on column klieo.job_details.headers is 'Its headers.';

comment on column klieo.job_details.id is 'The job''s id.';

comment on column klieo.job_details.last_error is 'What its last handler said, or why it is dead.';

comment on column klieo.job_details.leased_until is 'The end of its lease; null: nobody holds it.';

comment on column klieo.job_details.max_attempts is 'Claims it may have.';

comment on column klieo.job_details.payload is 'Its payload.';

comment on column klieo.job_details.payload_text is 'The payload as UTF-8 text; null where it is none.';

comment on column klieo.job_details.priority is 'Higher is claimed first.';

comment on column klieo.job_details.queue is 'The queue.';

comment on column klieo.job_details.run_at is 'When it became or becomes due.';

comment on column klieo.job_details.state is 'ready, scheduled, running or dead, when the statement began.';

comment on column klieo.job_details.worker_id is 'Who claimed it last.';

comment on column klieo.job_heads.heads is 'For each, the visible_at at which its jobs begin.';

comment on column klieo.job_heads.look_ms is 'How long that took: the next look comes after twenty times as long.';

comment on column klieo.job_heads.looked_at is 'When the queue was last looked through from the beginning.';

comment on column klieo.job_heads.priorities is 'The priorities that have a head.';

comment on column klieo.job_heads.queue is 'The queue.';

comment on column klieo.job_heads.seq is 'The largest counts.';

comment on column klieo.jobs.attempts is 'Claims so far.';

comment on column klieo.jobs.dedup_key is 'Its idempotency key; the record is in kv_entries, bucket dedup.<queue>.';

comment on column klieo.jobs.died_at is 'When it became dead; null: it lives.';

comment on column klieo.jobs.enqueued_at is 'When it was enqueued.';

comment on column klieo.jobs.fence is 'Claims ever, also over retries of a dead job: grows with every claim.';

comment on column klieo.jobs.headers is 'Names and values, all strings.';

comment on column klieo.jobs.id is 'The job''s id.';

comment on column klieo.jobs.last_error is 'What its last handler said, or why it is dead.';

comment on column klieo.jobs.max_attempts is 'Claims it may have.';

comment on column klieo.jobs.payload is 'The bytes, at most 8 MiB.';

comment on column klieo.jobs.priority is '-100 to 100; higher is claimed first.';

comment on column klieo.jobs.queue is 'The queue.';

comment on column klieo.jobs.run_at is 'When it became or becomes due, before it was last claimed.';

comment on column klieo.jobs.token is 'Random, new with each claim: only its bearer may settle or extend. Null while nobody holds the job.';

comment on column klieo.jobs.visible_at is 'When it may be claimed: its due time, or the end of its lease.';

comment on column klieo.jobs.worker_id is 'Who claimed it last.';

comment on column klieo.kv_changes.bucket is 'The bucket.';

comment on column klieo.kv_changes.changed_at is 'When.';

comment on column klieo.kv_changes.key is 'The key.';

comment on column klieo.kv_changes.revision is 'The revision the change made.';

comment on column klieo.kv_changes.tx is 'The transaction, as in messages.';

comment on column klieo.kv_changes.value is 'The new value; null: deleted or expired.';

comment on column klieo.kv_entries.bucket is 'The bucket; dedup.<queue> holds the idempotency records of a queue.';

comment on column klieo.kv_entries.expires_at is 'When the entry is absent; null: never. An idempotency record also lives as long as its job.';

comment on column klieo.kv_entries.key is 'The key.';

comment on column klieo.kv_entries.revision is 'Grows with every change of the key; drawn after the row is locked.';

comment on column klieo.kv_entries.tx is 'The transaction that wrote the entry: tells a starting watch what it will see again among the changes.';

comment on column klieo.kv_entries.updated_at is 'When it changed, by the database clock.';

comment on column klieo.kv_entries.value is 'The bytes; null: a tombstone.';

comment on column klieo.kv_horizons.at is 'A time.';

comment on column klieo.kv_horizons.tx is 'All transactions below had ended then.';

comment on column klieo.kv_leases.bucket is 'The bucket; $klieo holds the leases of the bus itself.';

comment on column klieo.kv_leases.expires_at is 'When it ends, by the database clock.';

comment on column klieo.kv_leases.fence is 'Grows with every grant.';

comment on column klieo.kv_leases.holder is 'The process that holds or held it, for people.';

comment on column klieo.kv_leases.key is 'The key.';

comment on column klieo.kv_leases.token is 'Random, new with each grant: only its bearer may extend or release.';

comment on column klieo.message_details.headers is 'Its headers.';

comment on column klieo.message_details.payload is 'Its payload.';

comment on column klieo.message_details.payload_text is 'The payload as UTF-8 text; null where it is none.';

comment on column klieo.message_details.published_at is 'When it was published.';

comment on column klieo.message_details.seq is 'Its number.';

comment on column klieo.message_details.subject is 'Its subject.';

comment on column klieo.message_ids.expires_at is 'When the id may be used again.';

comment on column klieo.message_ids.msg_id is 'The id.';

comment on column klieo.message_ids.seq is 'The message that was stored.';

comment on column klieo.messages.headers is 'Names and values, all strings.';

comment on column klieo.messages.payload is 'The bytes, at most 8 MiB.';

comment on column klieo.messages.published_at is 'When it was published, by the database clock.';

comment on column klieo.messages.seq is 'Unique, growing in the order of publishing, not of committing.';

comment on column klieo.messages.subject is 'Tokens joined by dots.';

comment on column klieo.messages.tx is 'The publishing transaction (the top one, never a subtransaction): what snapshots are asked about.';

comment on column klieo.meta.key is 'compatible_with: the oldest schema version a client may have been written for.';

comment on column klieo.meta.value is 'The value, as text.';

comment on column klieo.paused_queues.paused_at is 'Since when.';

comment on column klieo.paused_queues.queue is 'The queue.';

comment on column klieo.queue_stats.dead is 'Out of attempts or dead-lettered.';

comment on column klieo.queue_stats.oldest_ready_at is 'Since when the longest-waiting claimable job waits.';

comment on column klieo.queue_stats.paused_at is 'Since when claims find it empty; null: it is not paused.';

comment on column klieo.queue_stats.queue is 'The queue.';

comment on column klieo.queue_stats.ready is 'Claimable now, expired leases included.';

comment on column klieo.queue_stats.running is 'Claimed, lease not over.';

comment on column klieo.queue_stats.scheduled is 'Delayed, or waiting after a failure.';

comment on column klieo.replies.expires_at is 'The request''s deadline: nobody waits after it.';

comment on column klieo.replies.inbox is 'The requesting process.';

comment on column klieo.replies.ok is 'False: the handler failed and payload is its message.';

comment on column klieo.replies.payload is 'The bytes.';

comment on column klieo.replies.request_id is 'The request.';

comment on column klieo.requests.claimed_by is 'The responding process; null: nobody yet.';

comment on column klieo.requests.deadline is 'When the requester stops waiting, by the database clock.';

comment on column klieo.requests.headers is 'Names and values, all strings.';

comment on column klieo.requests.id is 'Chosen by the requester.';

comment on column klieo.requests.inbox is 'The requesting process.';

comment on column klieo.requests.payload is 'The bytes.';

comment on column klieo.requests.subject is 'The subject.';

comment on column klieo.responders.alive_until is 'Behind a pooler, which keeps no lock for a process: live until then. Null: as long as the lock is held.';

comment on column klieo.responders.filter is 'The subjects it answers.';

comment on column klieo.responders.id is 'One responder of a process.';

comment on column klieo.responders.instance_id is 'The process, as its lock names it.';

comment on column klieo.responders.pattern is 'The same as a regular expression.';

comment on table klieo.consumer_offsets is 'The durables, one row each: what has been handed out of the log.';

comment on table klieo.deliveries is 'Messages that are handed out and not settled, or wait to be handed out again.';

comment on table klieo.job_heads is 'Where claims begin while dead rows that an old snapshot pins lie before the jobs of a queue. Hints: the last row of a queue counts, and none at all is right, too.';

comment on table klieo.jobs is 'Jobs that are not done: an acknowledged job is deleted, a dead one stays to be inspected and retried.';

comment on table klieo.kv_changes is 'Every change of every key for ten minutes: what watches read.';

comment on table klieo.kv_entries is 'The key-value store: the current entry of each key. A deleted key stays as a tombstone for a week, longer than any statement is under way, so that its revisions grow for ever.';

comment on table klieo.kv_horizons is 'What had ended when, about every minute, for ten minutes: changes are pruned by it.';

comment on table klieo.kv_leases is 'Leases, apart from the values of their keys. A released lease stays, expired.';

comment on table klieo.message_ids is 'Publishers'' message ids, for two minutes: a second publish with one stores nothing.';

comment on table klieo.messages is 'The log: every published message, append-only, until retention removes it.';

comment on table klieo.meta is 'Facts about this schema.';

comment on table klieo.paused_queues is 'Queues that claims find empty until they are resumed.';

comment on table klieo.replies is 'Replies that their requesters have not picked up yet. The primary key lets the first one win.';

comment on table klieo.requests is 'Requests that are not answered yet.';

comment on table klieo.responders is 'Who answers requests. A row counts while its process holds the advisory lock (presence_class(), instance_id), or until alive_until.';

comment on view klieo.bucket_stats is 'A row per bucket that holds a key.';

comment on view klieo.consumer_stats is 'A row per durable.';

comment on view klieo.job_details is 'A row per job that still exists.';

comment on view klieo.message_details is 'A row per stored message.';

comment on view klieo.queue_stats is 'A row per queue that holds jobs or is paused.';

comment on function klieo."fetch"(durable text, max_messages integer, ack_wait_ms bigint, max_deliver integer, max_ack_pending integer) is 'Hands out messages of a durable: redeliveries that are due, then new ones, with about 16 MiB of payload; each comes with a token, without which nobody settles it. Commit before you begin to work.';

comment on function klieo.ack(id bigint, token uuid) is 'Ends a job that is done, with the transaction; false: it is not yours any more, and nothing has changed.';

comment on function klieo.ack_deliveries(consumers integer[], seqs bigint[], tokens uuid[], no_wait boolean) is 'Ends deliveries; answers the positions of those whose token was still valid.';

comment on function klieo.ack_job(id bigint, token uuid) is 'Ends a job that is done; answers whether its token was still valid.';

comment on function klieo.ack_jobs(ids bigint[], tokens uuid[], no_wait boolean) is 'Ends jobs that are done; answers those whose token was still valid.';

comment on function klieo.ack_message(durable text, seq bigint, token uuid) is 'Ends a message for its durable, with the transaction; false: it is not yours any more, and nothing has changed.';

comment on function klieo.as_text(payload bytea) is 'The bytes as UTF-8 text; null where they are none.';

comment on function klieo.bury(durable text, max_messages integer) is 'Publishes on <durable>.dlq what was left unsettled at its last delivery (max_deliver), and ends it; answers how many. In a transaction of its own, never beside a fetch.';

comment on function klieo.bury_deliveries(consumer integer, max_messages integer) is 'Publishes on <durable>.dlq what was left unsettled at its last delivery, and forgets it; answers how many. Must not share a transaction with fetch_messages.';

comment on function klieo.bury_jobs(ids bigint[], reason text) is 'Makes jobs, which the caller has locked, dead and publishes their dead letters on <queue>.dlq; a null reason: their attempts are used up.';

comment on function klieo.cancel_job(id bigint, reason text) is 'Makes a job dead, whoever holds it, and publishes its dead letter. The outcome is cancelled; dead, which it was before; locked by an open transaction; or no row: there is no such job.';

comment on function klieo.channel() is 'The channel to LISTEN on: what processes of the package commit is told there as JSON whose topics are texts like queue:mail and message:orders.created. A hint, which may come too often or never.';

comment on function klieo.check_durable(durable text) is 'Raises 22023 unless it may name a durable.';

comment on function klieo.check_filter(filter text) is 'Raises 22023 unless it may be a durable''s filter.';

comment on function klieo.check_headers(headers jsonb) is 'Raises 22023 unless it is an object of strings with legal names and values.';

comment on function klieo.check_holder(argument text, id bigint, token uuid) is 'Raises 22023 unless there is something to be settled, and a token.';

comment on function klieo.check_id(argument text, id text) is 'Raises 22023 unless it is free text that may name something.';

comment on function klieo.check_key(bucket text, key text, writing boolean) is 'Raises 22023 unless bucket and key are well-formed, and for writing not those of the bus.';

comment on function klieo.check_name(argument text, name text) is 'Raises 22023 unless it may name a queue or bucket.';

comment on function klieo.check_number(argument text, value bigint, lowest bigint, highest bigint) is 'Raises 22023 unless the value is in the range.';

comment on function klieo.check_payload(argument text, payload bytea) is 'Raises 22023 for null and 54000 beyond 8 MiB.';

comment on function klieo.check_subject(subject text) is 'Raises 22023 unless a message may be published there.';

comment on function klieo.check_unwritten(what text) is 'Raises KB002 in a transaction that has written.';

comment on function klieo.claim(queue text, worker_id text, lease_ttl_ms bigint, max_jobs integer) is 'Claims up to max_jobs jobs, best first, with about 16 MiB of payload; each comes with a token, without which nobody settles it. Commit before you begin to work.';

comment on function klieo.claim_jobs(queue text, worker_id text, lease_ttl_ms bigint, max_jobs integer, max_bytes bigint) is 'Claims up to max_jobs jobs for lease_ttl_ms, best first, with about max_bytes of payload; each comes with a token that its settlement needs.';

comment on function klieo.claim_requests(filter text, process integer, max_requests integer) is 'Gives open requests to a responding process, with the ms that are left of each.';

comment on function klieo.create_durable(durable text, filter text, start_seq bigint, start_time timestamp with time zone, start_new boolean) is 'Makes a durable that begins with everything, at a seq, at a time, or with what is published from now on; answers its id, or no row if there is one of that name.';

comment on function klieo.create_roles(prefix text) is 'Makes four roles without a login, called <prefix>producer, <prefix>worker, <prefix>reader and <prefix>admin (the prefix is the schema''s name and _ unless given), and grants them their rights; answers their names. Needs the right to create roles where they are missing.';

comment on function klieo.creation_lock() is 'The advisory lock that keeps pruning and the making of durables apart.';

comment on function klieo.cursor_snapshot() is 'The present snapshot, with this transaction among the running ones.';

comment on function klieo.dead_letter(id bigint, token uuid, reason text) is 'Makes a claimed job dead at once and publishes its dead letter with the reason. False: it is not yours any more, and nothing has changed.';

comment on function klieo.dead_letter_jobs(ids bigint[], tokens uuid[], reasons text[], no_wait boolean) is 'Makes jobs dead, each for its reason; answers those whose token was still valid.';

comment on function klieo.dedup_lives(bucket text, value bytea) is 'Whether an idempotency record is kept alive by its job.';

comment on function klieo.delete_durable(durable text) is 'Deletes a durable, its position and what is unsettled; answers whether there was one.';

comment on function klieo.delivery_whereabouts(consumer integer, seq bigint, token uuid) is 'Whose a delivery is: free, mine (of the token''s bearer) or other; null: it is settled.';

comment on function klieo.elect_maintainer(token uuid, holder text, ttl_ms double precision) is 'Whether the bearer of the token is the one process that reaps and prunes, for the next ttl_ms.';

comment on function klieo.enqueue(queue text, payload bytea, headers jsonb, dedup_key text, max_attempts integer, run_at timestamp with time zone, priority integer) is 'Enqueues a job in this transaction and answers its id; with a dedup_key that is taken, the id of the first job.';

comment on function klieo.enqueue_many(queues text[], payloads bytea, starts integer[], lengths integer[], headers text[], dedup_keys text[], max_attempts integer[], delays_ms bigint[], run_ats timestamp with time zone[], priorities integer[]) is 'Enqueues jobs in order and answers a row for each. Payloads as in publish_many; the other arrays may be null for their defaults. Checks nothing but what the tables check: enqueue() does.';

comment on function klieo.enqueue_one(queue text, payload bytea, headers jsonb, max_attempts integer, priority integer, delay_ms double precision, run_at timestamp with time zone) is 'Enqueues a job without a dedup key and answers its id. Checks nothing but what the tables check: enqueue() does.';

comment on function klieo.extend_deliveries(consumers integer[], seqs bigint[], tokens uuid[], waits_ms bigint[], no_wait boolean) is 'Restarts visibility timeouts, never shortening one; answers the positions of those whose token is still valid, and whether they were extended.';

comment on function klieo.extend_lease(bucket text, key text, token uuid, ttl_ms double precision) is 'Extends a lease of the token''s bearer; answers its end, or null when it is lost.';

comment on function klieo.extend_message(durable text, seq bigint, token uuid, ack_wait_ms bigint) is 'Gives a handler ack_wait_ms from now on, never less than it had; false: the message is not yours any more.';

comment on function klieo.extend_waiting(consumers integer[], seqs bigint[], tokens uuid[], waits_ms bigint[]) is 'Restarts visibility timeouts, after whoever has locked the deliveries; answers the positions of those whose token is still valid then.';

comment on function klieo.fetch_messages(consumer integer, max_messages integer, ack_wait_ms bigint, max_ack_pending integer, max_deliver integer, max_bytes bigint, max_scan integer) is 'Hands out messages of a durable: due redeliveries first, then new ones, at most max_messages and about max_bytes, of about max_scan looked at. The last row has a null seq and says whether there is more at once, whether deliveries wait to be dead-lettered, and when the next redelivery is due.';

comment on function klieo.filter_pattern(filter text) is 'The regular expression of a filter: * is one token, a last > one or more.';

comment on function klieo.find_durable(durable text) is 'The id of a durable, its filter and when it was made; no row: there is none. It has another id after it was moved, and was made at another time after it was deleted.';

comment on function klieo.grant_lease(bucket text, key text, token uuid, holder text, ttl_ms double precision) is 'Grants a lease that nobody holds, in any bucket; no row: somebody does.';

comment on function klieo.grant_role(kind text, role text) is 'Gives a role the rights of a kind (producer, worker, reader or admin), besides those it has. For the owner of the schema; may be repeated.';

comment on function klieo.head_before(first timestamp with time zone, looked_at timestamp with time zone) is 'The head to note after the first job was found there; null: none was.';

comment on function klieo.heartbeat(id bigint, token uuid, lease_ttl_ms bigint) is 'Extends the lease of a claimed job to lease_ttl_ms from now, never shortening it; answers its end, or null when the job is not yours any more.';

comment on function klieo.heartbeat_job(id bigint, token uuid, lease_ttl_ms bigint, no_wait boolean) is 'Extends a lease, never shortening it; answers its end and whether it could be extended, or no row when it is lost.';

comment on function klieo.job_whereabouts(id bigint, token uuid) is 'Whose a job is: free, mine (of the token''s bearer) or other; null: it is gone.';

comment on function klieo.kv_cas(bucket text, key text, value bytea, expected bigint, ttl_ms bigint) is 'Writes a key only while it is at the expected revision (null: absent); answers the new revision, or null if it lost.';

comment on function klieo.kv_changes_between(bucket text, filter text, lo pg_snapshot, hi pg_snapshot, after_revision bigint, max_changes integer, max_bytes bigint) is 'The changes of a bucket that hi sees and lo does not, in the order of their revisions, from after a revision on, with about max_bytes of values; found says how many there are up to max_changes.';

comment on function klieo.kv_delete(bucket text, key text, expected bigint) is 'Deletes a key, if expected is given only while it is at that revision; answers the revision of the deletion, or null if there was nothing to delete.';

comment on function klieo.kv_entries_at(bucket text, filter text, after_key text, max_keys integer, at_snapshot pg_snapshot, max_bytes bigint) is 'The entries of a bucket that a snapshot sees and that are there still, in the order of their keys, from after a key on, with about max_bytes of values; found says how many there are up to max_keys.';

comment on function klieo.kv_expire(max_entries integer) is 'Turns expired entries into tombstones, so that watches see them go; answers how many of which bucket.';

comment on function klieo.kv_get(bucket text, key text) is 'The entry of a key; no row while it is absent.';

comment on function klieo.kv_get_many(buckets text[], keys text[], max_bytes bigint) is 'The entries of keys, by their positions; no row while one is absent. Once the values before it come to max_bytes, an entry is answered without its value: ask for it again.';

comment on function klieo.kv_keys(bucket text, filter text, after_key text, max_keys integer) is 'The keys of a bucket that match the filter (null: all), in order, from after a key on.';

comment on function klieo.kv_put(bucket text, key text, value bytea, ttl_ms bigint) is 'Writes a key, absent again after ttl_ms; answers the new revision.';

comment on function klieo.kv_write(buckets text[], keys text[], payload bytea, starts integer[], lengths integer[], expected bigint[], ttls_ms bigint[], round_ends integer[], OUT revisions bigint[], OUT actuals bigint[]) is 'Writes and deletes keys, in rounds that end where round_ends says (null: one round). Answers for each write its revision, or null if it lost and, where the key is there, its revision now. Checks nothing but what the tables check.';

comment on function klieo.kv_write_soon(buckets text[], keys text[], payload bytea, starts integer[], lengths integer[], expected bigint[], ttls_ms bigint[], round_ends integer[], OUT revisions bigint[], OUT actuals bigint[]) is 'The same, but fails with 55P03 and writes nothing where one of the keys is locked for more than an instant: nobody else waits along.';

comment on function klieo.lease_left(bucket text, key text) is 'How long the holder of a lease still has, in ms; null: nobody holds it.';

comment on function klieo.live_responders(subject text) is 'Whether any live process answers requests on the subject.';

comment on function klieo.look_for_heads(queue text) is 'Looks through the whole queue and notes the priorities at whose head dead rows lie, and where their jobs begin.';

comment on function klieo.look_is_due(looked_at timestamp with time zone, look_ms double precision) is 'Whether a queue may be looked through again: that may take a twentieth of the time.';

comment on function klieo.move_head(queue text, priority smallint, begun_from timestamp with time zone, head timestamp with time zone) is 'Notes that the jobs of a priority begin later than a claim began from, or earlier.';

comment on function klieo.nak(id bigint, token uuid, delay_ms bigint, error text) is 'Gives a job back after a failure, claimable after delay_ms (null: after a backoff), with the error in last_error; after its last attempt it is dead. False: it is not yours any more, and nothing has changed.';

comment on function klieo.nak_deliveries(consumers integer[], seqs bigint[], tokens uuid[], delays_ms bigint[], no_wait boolean) is 'Gives deliveries back, to be handed out again after their delays; answers the positions of those whose token was still valid.';

comment on function klieo.nak_jobs(ids bigint[], tokens uuid[], delays_ms bigint[], errors text[], no_wait boolean) is 'Puts jobs back, claimable after their delays; one whose attempts are used up is dead at once. Answers those whose token was still valid.';

comment on function klieo.nak_message(durable text, seq bigint, token uuid, delay_ms bigint) is 'Gives a message back, to be handed out again after delay_ms; at its last delivery it goes to <durable>.dlq. False: it is not yours any more, and nothing has changed.';

comment on function klieo.new_instance() is 'A number for a process that answers requests.';

comment on function klieo.next_job_at(queue text, horizon_ms bigint) is 'When the next delayed or running job of the queue becomes claimable, within horizon_ms; null: there is none.';

comment on function klieo.pause_queue(queue text) is 'From its commit on claims find the queue empty; running jobs go on. Answers whether it was not paused before.';

comment on function klieo.pick_up_replies(inbox text) is 'The replies of an inbox, which are gone then.';

comment on function klieo.presence_class() is 'The first half of the advisory locks that show which processes answer requests in this schema.';

comment on function klieo.prune_kv(max_rows integer) is 'Removes changes older than ten minutes and tombstones older than a week; answers how many, of the larger kind.';

comment on function klieo.prune_messages(retention_ms bigint, max_messages integer) is 'Removes messages older than retention_ms that every durable is past and none has in flight, about max_messages of them; answers how many.';

comment on function klieo.prune_rest(dead_jobs_ms bigint, max_rows integer) is 'Removes old dead jobs, message ids, heads, requests and replies; answers how many, of the largest kind.';

comment on function klieo.publish(subject text, payload bytea, headers jsonb, msg_id text) is 'Publishes a message in this transaction and answers its seq. A second one with the same msg_id within two minutes stores nothing and answers the first one''s.';

comment on function klieo.publish_many(subjects text[], payloads bytea, starts integer[], lengths integer[], headers text[], msg_ids text[]) is 'Stores messages in order and answers a row for each. Payload n is lengths[n] bytes of payloads from starts[n], counted from 1; headers are JSON texts; msg_ids may be null. Checks nothing but sizes: publish() does.';

comment on function klieo.purge_messages(filter text, before timestamp with time zone) is 'Removes stored messages whose subject matches, delivered or not, all or those published before a time; answers how many. One that is handed out may still be settled.';

comment on function klieo.purge_messages_from(filter text, before timestamp with time zone, after_tx xid8, after_seq bigint, max_messages integer) is 'Looks at max_messages stored messages after a position in the log and removes those whose subject matches; answers how many, and the last position. No row: that was the end of the log.';

comment on function klieo.purge_queue(queue text, states text[], max_jobs integer) is 'Removes jobs of a queue that are not running, of some states or all, at most max_jobs of them; answers how many. Those that an open transaction holds stay.';

comment on function klieo.reap_deliveries(max_messages integer) is 'Buries what was left unsettled at its last delivery, where no member fetches; answers how many of which durable.';

comment on function klieo.reap_jobs(max_jobs integer) is 'Buries jobs whose last lease ran out; answers how many of which queue. Claims do the same, so nothing depends on it.';

comment on function klieo.rebase() is 'Makes the log of a restored database deliverable again: nothing acknowledged comes back, nothing undelivered is lost. Answers whether it was needed.';

comment on function klieo.register_responders(process integer, filters text[], alive_ms double precision) is 'The responders of a process, anew. They count as live while it holds its lock, or, with alive_ms, for so long without another sign of life.';

comment on function klieo.release(id bigint, token uuid) is 'Gives back a job whose handling has not begun, as if it had not been claimed. False: it is not yours any more, or another session has it locked; nothing has changed.';

comment on function klieo.release_deliveries(consumers integer[], seqs bigint[], tokens uuid[]) is 'Hands back what was not yielded to a handler: the attempt is not counted. Answers the positions of those whose token was still valid.';

comment on function klieo.release_jobs(ids bigint[], tokens uuid[], counted boolean[]) is 'Makes claimed jobs claimable again at once; one whose attempts are used up is dead. Those whose handling never began (counted is false) are as if they had not been claimed.';

comment on function klieo.release_lease(bucket text, key text, token uuid) is 'Ends a lease of the token''s bearer.';

comment on function klieo.release_message(durable text, seq bigint, token uuid) is 'Gives back a message whose handling has not begun, without counting the delivery. False: it is not yours any more, or another session has it locked; nothing has changed.';

comment on function klieo.remove_job(id bigint) is 'Removes a job that is not running. The outcome is removed; running, and nothing was changed; locked by an open transaction; or no row: there is no such job.';

comment on function klieo.reply_to_request(id uuid, process integer, ok boolean, payload bytea, channel text, notice text) is 'Replies to a request that still waits and is still the process''s; answers its inbox, or null. The inbox is put where the notice says <inbox>.';

comment on function klieo.resign_maintainer(token uuid) is 'Somebody else may be elected at once.';

comment on function klieo.restored() is 'Whether this database was restored from a dump of another cluster, so that klieo.rebase() is needed.';

comment on function klieo.resume_queue(queue text) is 'Ends a pause; answers whether there was one.';

comment on function klieo.retry_dead(queue text, id bigint) is 'Puts dead jobs back with all their attempts, the queue''s or one; answers how many.';

comment on function klieo.retry_job(id bigint) is 'Makes a dead job ready with all its attempts, and a scheduled one ready now. The outcome is retried; ready or running, and nothing was changed; locked by an open transaction; or no row: there is no such job.';

comment on function klieo.revoke_public() is 'Takes from everybody what Postgres gives everybody. The last step of every migration that makes something.';

comment on function klieo.revoke_role(role text) is 'Takes from a role all rights in this schema, also those that default privileges gave it. For the owner of the schema.';

comment on function klieo.role_rights() is 'What each kind of role may do in this schema: execute a function, or select from a table or view. What only the owner may is there, too.';

comment on function klieo.schema_name() is 'The name of this schema.';

comment on function klieo.seek_durable(durable text, start_seq bigint, start_time timestamp with time zone, start_new boolean) is 'Moves a durable: to everything that is stored, to a seq, to a time, or to what is published from now on. What its members hold is not theirs any more. Answers whether there is such a durable.';

comment on function klieo.send_request(id uuid, subject text, headers jsonb, payload bytea, inbox text, timeout_ms double precision, channel text, notice text) is 'Sends a request if a live responder takes its subject, and tells the channel, unless that is null; answers whether it did.';

comment on function klieo.settle_deliveries(consumers integer[], seqs bigint[], tokens uuid[], no_wait boolean) is 'Locks the deliveries whose tokens are still valid and answers their positions; no_wait passes over those that an open transaction holds.';

comment on function klieo.settle_jobs(ids bigint[], tokens uuid[], no_wait boolean) is 'Locks the jobs whose tokens are still valid and answers their ids; no_wait passes over those that an open transaction holds.';

comment on function klieo.sign_of_life(process integer, alive_ms double precision) is 'The responders of a process live on for alive_ms; answers how many there are: a server crash empties the table.';

comment on function klieo.subscribe(durable text, filter text, start text, start_seq bigint, start_time timestamp with time zone) is 'Makes a durable unless there is one; answers whether it did. It begins with all that is stored, with what is new, at a seq or at a time; one that is there keeps its position.';

comment on function klieo.take_jobs(queue text, worker_id text, lease_ttl_ms bigint, max_jobs integer, max_bytes bigint, horizon_ms bigint) is 'claim_jobs, and perhaps a last row without an id: fence is 1 when dead letters were published on the way; max_attempts is, when there was nothing to claim, the time in ms to the next job within horizon_ms.';

comment on function klieo.take_lease(bucket text, key text, token uuid, holder text, ttl_ms double precision) is 'Grants a lease that nobody holds to the bearer of a token; no row: somebody does.';

comment on function klieo.term_message(durable text, seq bigint, token uuid) is 'Ends a message that is never to come again to this durable, though nothing came of it; false: it is not yours any more, and nothing has changed.';

comment on function klieo.window_has_message(lo pg_snapshot, hi pg_snapshot) is 'Whether hi sees any message that lo does not.';

comment on function klieo.withdraw_request(id uuid) is 'Takes a request back.';
