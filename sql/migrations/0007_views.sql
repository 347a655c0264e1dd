-- klieo-bus, views: what to look at with psql. They count on demand and cost what counting costs.

create view klieo.queue_stats as
select
  j.queue,
  count(*) filter (where j.died_at is null and j.visible_at <= clock_timestamp()) as ready,
  count(*) filter (where j.died_at is null and j.visible_at > clock_timestamp() and j.token is null) as scheduled,
  count(*) filter (where j.died_at is null and j.visible_at > clock_timestamp() and j.token is not null) as running,
  count(*) filter (where j.died_at is not null) as dead,
  min(j.visible_at) filter (where j.died_at is null and j.visible_at <= clock_timestamp()) as oldest_ready_at,
  (select p.paused_at from klieo.paused_queues p where p.queue = j.queue) as paused_at
from klieo.jobs j
group by j.queue
-- Not a full join: a condition on the queue would not reach the index.
union all
select p.queue, 0, 0, 0, 0, null, p.paused_at
from klieo.paused_queues p
where not exists (select from klieo.jobs j where j.queue = p.queue);
comment on view klieo.queue_stats is 'A row per queue that holds jobs or is paused.';
comment on column klieo.queue_stats.queue is 'The queue.';
comment on column klieo.queue_stats.ready is 'Claimable now, expired leases included.';
comment on column klieo.queue_stats.scheduled is 'Delayed, or waiting after a failure.';
comment on column klieo.queue_stats.running is 'Claimed, lease not over.';
comment on column klieo.queue_stats.dead is 'Out of attempts or dead-lettered.';
comment on column klieo.queue_stats.oldest_ready_at is 'Since when the longest-waiting claimable job waits.';
comment on column klieo.queue_stats.paused_at is 'Since when claims find it empty; null: it is not paused.';

create view klieo.consumer_stats as
select
  o.durable,
  o.filter,
  (
    select count(*)
    from klieo.messages m
    where m.tx >= pg_snapshot_xmin(o.lo)
      and not pg_visible_in_snapshot(m.tx, o.lo)
      and not coalesce(pg_visible_in_snapshot(m.tx, o.hi) and (m.tx, m.seq) <= (o.pos_tx, o.pos_seq), false)
      and (m.subject = o.filter or m.subject ~ o.pattern)
      and m.seq >= o.start_seq
      and m.published_at >= o.start_time
  ) as pending,
  coalesce(d.in_flight, 0) as in_flight,
  coalesce(d.unsettled - d.in_flight, 0) as redelivering,
  o.last_active_at
from klieo.consumer_offsets o
-- Counted once for all: where one durable has most of them, the planner would read them all for each.
left join (
  select d.consumer_id, count(*) as unsettled, count(*) filter (where d.token is not null and d.visible_at > clock_timestamp()) as in_flight
  from klieo.deliveries d
  group by d.consumer_id
) d on d.consumer_id = o.id;
comment on view klieo.consumer_stats is 'A row per durable.';
comment on column klieo.consumer_stats.durable is 'The name.';
comment on column klieo.consumer_stats.filter is 'The subjects it takes.';
comment on column klieo.consumer_stats.pending is 'Messages never handed out yet.';
comment on column klieo.consumer_stats.in_flight is 'Handed out and unsettled, ack wait not over.';
comment on column klieo.consumer_stats.redelivering is 'Waiting to be handed out again.';
comment on column klieo.consumer_stats.last_active_at is 'When a member last fetched, to within half a minute.';

-- Not parallel safe: the exception block is a subtransaction.
create function klieo.as_text(payload bytea) returns text
language plpgsql immutable
set search_path = pg_catalog, pg_temp as $$
begin
  return convert_from(payload, 'UTF8');
exception
  when others then
    return null;
end
$$;
comment on function klieo.as_text(bytea) is 'The bytes as UTF-8 text; null where they are none.';

create view klieo.job_details as
select
  j.id,
  j.queue,
  case
    when j.died_at is not null then 'dead'
    -- A stable time, so that the view becomes part of the query: else no index gives its rows in their order.
    when j.visible_at <= statement_timestamp() then 'ready'
    when j.token is not null then 'running'
    else 'scheduled'
  end as state,
  j.priority,
  j.attempts,
  j.max_attempts,
  j.run_at,
  case when j.token is not null and j.died_at is null then j.visible_at end as leased_until,
  j.worker_id,
  j.dedup_key,
  j.last_error,
  j.enqueued_at,
  j.died_at,
  j.headers,
  j.payload,
  klieo.as_text(j.payload) as payload_text
from klieo.jobs j;
comment on view klieo.job_details is 'A row per job that still exists.';
comment on column klieo.job_details.id is 'The job''s id.';
comment on column klieo.job_details.queue is 'The queue.';
comment on column klieo.job_details.state is 'ready, scheduled, running or dead, when the statement began.';
comment on column klieo.job_details.priority is 'Higher is claimed first.';
comment on column klieo.job_details.attempts is 'Claims so far.';
comment on column klieo.job_details.max_attempts is 'Claims it may have.';
comment on column klieo.job_details.run_at is 'When it became or becomes due.';
comment on column klieo.job_details.leased_until is 'The end of its lease; null: nobody holds it.';
comment on column klieo.job_details.worker_id is 'Who claimed it last.';
comment on column klieo.job_details.dedup_key is 'Its idempotency key.';
comment on column klieo.job_details.last_error is 'What its last handler said, or why it is dead.';
comment on column klieo.job_details.enqueued_at is 'When it was enqueued.';
comment on column klieo.job_details.died_at is 'When it became dead.';
comment on column klieo.job_details.headers is 'Its headers.';
comment on column klieo.job_details.payload is 'Its payload.';
comment on column klieo.job_details.payload_text is 'The payload as UTF-8 text; null where it is none.';

create view klieo.message_details as
select m.seq, m.subject, m.headers, m.published_at, m.payload, klieo.as_text(m.payload) as payload_text
from klieo.messages m;
comment on view klieo.message_details is 'A row per stored message.';
comment on column klieo.message_details.seq is 'Its number.';
comment on column klieo.message_details.subject is 'Its subject.';
comment on column klieo.message_details.headers is 'Its headers.';
comment on column klieo.message_details.published_at is 'When it was published.';
comment on column klieo.message_details.payload is 'Its payload.';
comment on column klieo.message_details.payload_text is 'The payload as UTF-8 text; null where it is none.';

create view klieo.bucket_stats as
select e.bucket, count(*) as keys, sum(octet_length(e.value))::bigint as bytes
from klieo.kv_entries e
where e.value is not null
  and case
    when e.expires_at is null or e.expires_at > clock_timestamp() then true
    -- As dedup_lives, which readers may not call.
    when left(e.bucket, 6) = 'dedup.'
      then exists (select from klieo.jobs j where j.id = convert_from(e.value, 'UTF8')::bigint and j.died_at is null)
    else false
  end
group by e.bucket;
comment on view klieo.bucket_stats is 'A row per bucket that holds a key.';
comment on column klieo.bucket_stats.bucket is 'The bucket; dedup.<queue> holds the idempotency records of a queue.';
comment on column klieo.bucket_stats.keys is 'Present keys.';
comment on column klieo.bucket_stats.bytes is 'Bytes of their values.';
