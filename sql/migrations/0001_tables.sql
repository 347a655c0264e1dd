-- klieo-bus, tables. Everything lives in one schema. The word before the dot, "klieo", stands for the schema's name:
-- a bus in another schema is made from this text with that one word replaced.
--
-- The log. `messages` is append-only. A durable keeps no position but a snapshot: what the new snapshot sees and the old
-- one did not is new, in whatever order transactions commit. What is handed out and unsettled stands in `deliveries`, so
-- that a publish writes one row however many durables there are, and the churn is in narrow rows.
--
-- Time. One column, visible_at, says when a job or delivery may be handed out (again): ready, delayed and leased are the
-- same thing with different times, so that an expired lease needs nobody to return it.

create schema if not exists klieo;

create table klieo.meta (
  key text primary key,
  value text not null
);
comment on table klieo.meta is 'Facts about this schema.';
comment on column klieo.meta.key is 'compatible_with: the oldest schema version a client may have been written for.';
comment on column klieo.meta.value is 'The value, as text.';
insert into klieo.meta (key, value) values ('compatible_with', '1');

-- ---------------------------------------------------------------- publish / subscribe

create sequence klieo.message_seq cache 1;

create table klieo.messages (
  tx xid8 not null default pg_current_xact_id(),
  seq bigint not null default nextval('klieo.message_seq'),
  published_at timestamptz not null default clock_timestamp(),
  subject text collate "C" not null,
  headers jsonb not null default '{}',
  payload bytea not null,
  -- The cursor's index, and the only one: a publish pays for a single index entry, at the right-hand end.
  primary key (tx, seq),
  constraint messages_payload_size check (octet_length(payload) <= 8388608),
  constraint messages_headers_size check (pg_column_size(headers) <= 262144),
  constraint messages_headers_object check (jsonb_typeof(headers) = 'object'),
  constraint messages_subject_length check (octet_length(subject) between 1 and 1024)
) with (autovacuum_vacuum_insert_scale_factor = 0.05, vacuum_truncate = false);
alter sequence klieo.message_seq owned by klieo.messages.seq;
comment on table klieo.messages is 'The log: every published message, append-only, until retention removes it.';
comment on column klieo.messages.tx is 'The publishing transaction (the top one, never a subtransaction): what snapshots are asked about.';
comment on column klieo.messages.seq is 'Unique, growing in the order of publishing, not of committing.';
comment on column klieo.messages.published_at is 'When it was published, by the database clock.';
comment on column klieo.messages.subject is 'Tokens joined by dots.';
comment on column klieo.messages.headers is 'Names and values, all strings.';
comment on column klieo.messages.payload is 'The bytes, at most 8 MiB.';

create table klieo.message_ids (
  msg_id text collate "C" primary key,
  seq bigint not null,
  expires_at timestamptz not null
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, vacuum_truncate = false);
create index message_ids_expiry on klieo.message_ids (expires_at);
comment on table klieo.message_ids is 'Publishers'' message ids, for two minutes: a second publish with one stores nothing.';
comment on column klieo.message_ids.msg_id is 'The id.';
comment on column klieo.message_ids.seq is 'The message that was stored.';
comment on column klieo.message_ids.expires_at is 'When the id may be used again.';

create table klieo.consumer_offsets (
  id int generated always as identity primary key,
  durable text collate "C" not null unique,
  filter text collate "C" not null,
  pattern text collate "C" not null,
  start_seq bigint not null default 0,
  start_time timestamptz not null default '-infinity',
  lo pg_snapshot not null,
  hi pg_snapshot,
  pos_tx xid8 not null default '0',
  pos_seq bigint not null default 0,
  created_at timestamptz not null default clock_timestamp(),
  last_active_at timestamptz not null default clock_timestamp(),
  constraint consumer_offsets_names_length check (octet_length(durable) between 1 and 128 and octet_length(filter) between 1 and 1024)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, vacuum_truncate = false);
comment on table klieo.consumer_offsets is 'The durables, one row each: what has been handed out of the log.';
comment on column klieo.consumer_offsets.id is 'Names the durable in deliveries; a durable made anew gets another one.';
comment on column klieo.consumer_offsets.durable is 'The name.';
comment on column klieo.consumer_offsets.filter is 'The subjects it takes; * is one token, a last > one or more.';
comment on column klieo.consumer_offsets.pattern is 'The same as a regular expression.';
comment on column klieo.consumer_offsets.start_seq is 'Messages with a smaller seq are not for it.';
comment on column klieo.consumer_offsets.start_time is 'Messages published earlier are not for it.';
comment on column klieo.consumer_offsets.lo is 'Whatever this snapshot sees has been handed out.';
comment on column klieo.consumer_offsets.hi is 'The open window: what hi sees and lo does not is being handed out, in the order (tx, seq); null: no window is open.';
comment on column klieo.consumer_offsets.pos_tx is 'The last message of the open window that was handed out or passed over: its tx.';
comment on column klieo.consumer_offsets.pos_seq is 'And its seq.';
comment on column klieo.consumer_offsets.created_at is 'When the durable was made.';
comment on column klieo.consumer_offsets.last_active_at is 'When a member last fetched, to within half a minute.';

create table klieo.deliveries (
  consumer_id int not null,
  seq bigint not null,
  tx xid8 not null,
  attempt int not null,
  visible_at timestamptz not null,
  token uuid,
  final boolean not null default false,
  primary key (consumer_id, seq)
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0, vacuum_truncate = false);
-- On an expression and without seq, so that for a message of a durable no plan, made while the table was empty, can prefer it to the
-- primary key.
create index deliveries_due on klieo.deliveries ((consumer_id + 0), visible_at);
-- For the reaper.
create index deliveries_final on klieo.deliveries (visible_at) where final;
comment on table klieo.deliveries is 'Messages that are handed out and not settled, or wait to be handed out again.';
comment on column klieo.deliveries.consumer_id is 'The durable.';
comment on column klieo.deliveries.seq is 'The message.';
comment on column klieo.deliveries.tx is 'And its tx, by which the log finds it.';
comment on column klieo.deliveries.attempt is 'Deliveries so far.';
comment on column klieo.deliveries.visible_at is 'When it may be handed out again.';
comment on column klieo.deliveries.token is 'Random, new with each delivery: only its bearer may settle. Null while nobody holds the message.';
comment on column klieo.deliveries.final is 'This delivery is the last one allowed: left unsettled, the message goes to the dead-letter subject.';

-- ---------------------------------------------------------------- key-value

create sequence klieo.kv_revision cache 1;

create table klieo.kv_entries (
  bucket text collate "C" not null,
  key text collate "C" not null,
  tx xid8 not null default pg_current_xact_id(),
  revision bigint not null,
  updated_at timestamptz not null,
  expires_at timestamptz,
  value bytea,
  primary key (bucket, key),
  constraint kv_entries_value_size check (octet_length(value) <= 8388608),
  constraint kv_entries_names_length check (octet_length(bucket) between 1 and 134 and octet_length(key) between 1 and 2048),
  -- The number of a job, or reading a record would fail for ever.
  constraint kv_entries_dedup_value check (left(bucket, 6) <> 'dedup.' or value is null or encode(value, 'escape') ~ '^[0-9]{1,18}$')
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000, vacuum_truncate = false);
create index kv_entries_expiry on klieo.kv_entries (expires_at) where expires_at is not null;
alter sequence klieo.kv_revision owned by klieo.kv_entries.revision;
comment on table klieo.kv_entries is 'The key-value store: the current entry of each key. A deleted key stays as a tombstone for a week, longer than any statement is under way, so that its revisions grow for ever.';
comment on column klieo.kv_entries.bucket is 'The bucket; dedup.<queue> holds the idempotency records of a queue.';
comment on column klieo.kv_entries.key is 'The key.';
comment on column klieo.kv_entries.tx is 'The transaction that wrote the entry: tells a starting watch what it will see again among the changes.';
comment on column klieo.kv_entries.revision is 'Grows with every change of the key; drawn after the row is locked.';
comment on column klieo.kv_entries.updated_at is 'When it changed, by the database clock.';
comment on column klieo.kv_entries.expires_at is 'When the entry is absent; null: never. An idempotency record also lives as long as its job.';
comment on column klieo.kv_entries.value is 'The bytes; null: a tombstone.';

create table klieo.kv_changes (
  tx xid8 not null default pg_current_xact_id(),
  revision bigint not null,
  changed_at timestamptz not null,
  bucket text collate "C" not null,
  key text collate "C" not null,
  value bytea,
  primary key (tx, revision)
) with (autovacuum_vacuum_insert_scale_factor = 0.1, vacuum_truncate = false);
comment on table klieo.kv_changes is 'Every change of every key for ten minutes: what watches read.';
comment on column klieo.kv_changes.tx is 'The transaction, as in messages.';
comment on column klieo.kv_changes.revision is 'The revision the change made.';
comment on column klieo.kv_changes.changed_at is 'When.';
comment on column klieo.kv_changes.bucket is 'The bucket.';
comment on column klieo.kv_changes.key is 'The key.';
comment on column klieo.kv_changes.value is 'The new value; null: deleted or expired.';

create table klieo.kv_horizons (
  at timestamptz primary key,
  tx xid8 not null
);
comment on table klieo.kv_horizons is 'What had ended when, about every minute, for ten minutes: changes are pruned by it.';
comment on column klieo.kv_horizons.at is 'A time.';
comment on column klieo.kv_horizons.tx is 'All transactions below had ended then.';

create sequence klieo.lease_fence cache 1;

create table klieo.kv_leases (
  bucket text collate "C" not null,
  key text collate "C" not null,
  fence bigint not null,
  token uuid not null,
  holder text,
  expires_at timestamptz not null,
  primary key (bucket, key)
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, vacuum_truncate = false);
alter sequence klieo.lease_fence owned by klieo.kv_leases.fence;
comment on table klieo.kv_leases is 'Leases, apart from the values of their keys. A released lease stays, expired.';
comment on column klieo.kv_leases.bucket is 'The bucket; $klieo holds the leases of the bus itself.';
comment on column klieo.kv_leases.key is 'The key.';
comment on column klieo.kv_leases.fence is 'Grows with every grant.';
comment on column klieo.kv_leases.token is 'Random, new with each grant: only its bearer may extend or release.';
comment on column klieo.kv_leases.holder is 'The process that holds or held it, for people.';
comment on column klieo.kv_leases.expires_at is 'When it ends, by the database clock.';

-- ---------------------------------------------------------------- jobs

create sequence klieo.job_id cache 1;

create table klieo.jobs (
  id bigint not null default nextval('klieo.job_id') primary key,
  enqueued_at timestamptz not null default clock_timestamp(),
  run_at timestamptz not null,
  visible_at timestamptz not null,
  died_at timestamptz,
  attempts int not null default 0,
  max_attempts int not null default 5,
  fence int not null default 0,
  priority smallint not null default 0,
  token uuid,
  queue text collate "C" not null,
  worker_id text,
  dedup_key text collate "C",
  last_error text,
  headers jsonb not null default '{}',
  payload bytea not null,
  constraint jobs_payload_size check (octet_length(payload) <= 8388608),
  constraint jobs_headers_size check (pg_column_size(headers) <= 262144),
  constraint jobs_headers_object check (jsonb_typeof(headers) = 'object'),
  constraint jobs_queue_length check (octet_length(queue) between 1 and 128),
  constraint jobs_priority_range check (priority between -100 and 100),
  constraint jobs_max_attempts_positive check (max_attempts >= 1)
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0, vacuum_truncate = false);
alter sequence klieo.job_id owned by klieo.jobs.id;
-- Ready, delayed and leased jobs in one index; dead ones are outside it and never slow a claim.
create index jobs_due on klieo.jobs (queue, priority desc, visible_at, id) where died_at is null;
-- For the reaper: expired jobs without an attempt left. Written only once a job's last attempt begins.
create index jobs_exhausted on klieo.jobs (visible_at) where died_at is null and attempts >= max_attempts;
create index jobs_dead on klieo.jobs (queue, died_at) where died_at is not null;
comment on table klieo.jobs is 'Jobs that are not done: an acknowledged job is deleted, a dead one stays to be inspected and retried.';
comment on column klieo.jobs.id is 'The job''s id.';
comment on column klieo.jobs.enqueued_at is 'When it was enqueued.';
comment on column klieo.jobs.run_at is 'When it became or becomes due, before it was last claimed.';
comment on column klieo.jobs.visible_at is 'When it may be claimed: its due time, or the end of its lease.';
comment on column klieo.jobs.died_at is 'When it became dead; null: it lives.';
comment on column klieo.jobs.attempts is 'Claims so far.';
comment on column klieo.jobs.max_attempts is 'Claims it may have.';
comment on column klieo.jobs.fence is 'Claims ever, also over retries of a dead job: grows with every claim.';
comment on column klieo.jobs.priority is '-100 to 100; higher is claimed first.';
comment on column klieo.jobs.token is 'Random, new with each claim: only its bearer may settle or extend. Null while nobody holds the job.';
comment on column klieo.jobs.queue is 'The queue.';
comment on column klieo.jobs.worker_id is 'Who claimed it last.';
comment on column klieo.jobs.dedup_key is 'Its idempotency key; the record is in kv_entries, bucket dedup.<queue>.';
comment on column klieo.jobs.last_error is 'What its last handler said, or why it is dead.';
comment on column klieo.jobs.headers is 'Names and values, all strings.';
comment on column klieo.jobs.payload is 'The bytes, at most 8 MiB.';

create table klieo.job_heads (
  queue text collate "C" not null,
  seq bigint generated always as identity,
  priorities smallint[] not null,
  heads timestamptz[] not null,
  looked_at timestamptz not null,
  look_ms double precision not null,
  primary key (queue, seq)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, vacuum_truncate = false);
comment on table klieo.job_heads is 'Where claims begin while dead rows that an old snapshot pins lie before the jobs of a queue. Hints: the last row of a queue counts, and none at all is right, too.';
comment on column klieo.job_heads.queue is 'The queue.';
comment on column klieo.job_heads.seq is 'The largest counts.';
comment on column klieo.job_heads.priorities is 'The priorities that have a head.';
comment on column klieo.job_heads.heads is 'For each, the visible_at at which its jobs begin.';
comment on column klieo.job_heads.looked_at is 'When the queue was last looked through from the beginning.';
comment on column klieo.job_heads.look_ms is 'How long that took: the next look comes after twenty times as long.';

create table klieo.paused_queues (
  queue text collate "C" primary key,
  paused_at timestamptz not null default clock_timestamp(),
  constraint paused_queues_queue_length check (octet_length(queue) between 1 and 128)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 100, vacuum_truncate = false);
comment on table klieo.paused_queues is 'Queues that claims find empty until they are resumed.';
comment on column klieo.paused_queues.queue is 'The queue.';
comment on column klieo.paused_queues.paused_at is 'Since when.';

-- ---------------------------------------------------------------- request / reply
-- Unlogged: no disk write waits on a request, and a server crash empties the tables, as the contract allows.

create sequence klieo.instance_id as int cycle;

create unlogged table klieo.responders (
  id bigint generated always as identity primary key,
  instance_id int not null,
  filter text collate "C" not null,
  pattern text collate "C" not null,
  alive_until timestamptz
);
create index responders_instance on klieo.responders (instance_id);
comment on table klieo.responders is 'Who answers requests. A row counts while its process holds the advisory lock (presence_class(), instance_id), or until alive_until.';
comment on column klieo.responders.id is 'One responder of a process.';
comment on column klieo.responders.instance_id is 'The process, as its lock names it.';
comment on column klieo.responders.filter is 'The subjects it answers.';
comment on column klieo.responders.pattern is 'The same as a regular expression.';
comment on column klieo.responders.alive_until is 'Behind a pooler, which keeps no lock for a process: live until then. Null: as long as the lock is held.';

create unlogged table klieo.requests (
  id uuid primary key,
  subject text collate "C" not null,
  headers jsonb not null default '{}',
  payload bytea not null,
  inbox text not null,
  deadline timestamptz not null,
  claimed_by int,
  constraint requests_payload_size check (octet_length(payload) <= 8388608),
  constraint requests_headers_size check (pg_column_size(headers) <= 262144),
  constraint requests_headers_object check (jsonb_typeof(headers) = 'object'),
  constraint requests_subject_length check (octet_length(subject) between 1 and 1024),
  constraint requests_inbox_length check (octet_length(inbox) <= 128)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0, vacuum_truncate = false);
-- Starts at the present time: what nobody has vacuumed away yet lies before it.
create index requests_open on klieo.requests (deadline) where claimed_by is null;
comment on table klieo.requests is 'Requests that are not answered yet.';
comment on column klieo.requests.id is 'Chosen by the requester.';
comment on column klieo.requests.subject is 'The subject.';
comment on column klieo.requests.headers is 'Names and values, all strings.';
comment on column klieo.requests.payload is 'The bytes.';
comment on column klieo.requests.inbox is 'The requesting process.';
comment on column klieo.requests.deadline is 'When the requester stops waiting, by the database clock.';
comment on column klieo.requests.claimed_by is 'The responding process; null: nobody yet.';

create unlogged table klieo.replies (
  request_id uuid primary key,
  inbox text not null,
  ok boolean not null,
  payload bytea not null,
  expires_at timestamptz not null,
  constraint replies_payload_size check (octet_length(payload) <= 8388608)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0, vacuum_truncate = false);
create index replies_inbox on klieo.replies (inbox);
comment on table klieo.replies is 'Replies that their requesters have not picked up yet. The primary key lets the first one win.';
comment on column klieo.replies.request_id is 'The request.';
comment on column klieo.replies.inbox is 'The requesting process.';
comment on column klieo.replies.ok is 'False: the handler failed and payload is its message.';
comment on column klieo.replies.payload is 'The bytes.';
comment on column klieo.replies.expires_at is 'The request''s deadline: nobody waits after it.';

-- The migrator's own tables, which are there before this runs, unless psql runs it.
do $$
begin
  if to_regclass('klieo.migrations') is not null then
    comment on table klieo.migrations is 'The migrations that were applied.';
    comment on column klieo.migrations.name is 'The file in sql/migrations.';
    comment on column klieo.migrations.timestamp is 'When it was applied.';
  end if;
  if to_regclass('klieo.migrations_lock') is not null then
    comment on table klieo.migrations_lock is 'One row, which the migrator of kysely-ctl locks.';
    comment on column klieo.migrations_lock.id is 'Names the row.';
    comment on column klieo.migrations_lock.is_locked is 'Not used on PostgreSQL.';
  end if;
end
$$;
