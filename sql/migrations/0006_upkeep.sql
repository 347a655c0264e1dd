-- klieo-bus, functions: retention, the presence of responders, and the repair of a restored log.

create function klieo.prune_messages(retention_ms bigint, max_messages int) returns int
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.prune_messages(bigint, int) is 'Removes messages older than retention_ms that every durable is past and none has in flight, about max_messages of them; answers how many.';

create function klieo.prune_kv(max_rows int) returns int
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
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
$$;
comment on function klieo.prune_kv(int) is 'Removes changes older than ten minutes and tombstones older than a week; answers how many, of the larger kind.';

create function klieo.prune_rest(dead_jobs_ms bigint, max_rows int) returns int
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
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
$$;
comment on function klieo.prune_rest(bigint, int) is 'Removes old dead jobs, message ids, heads, requests and replies; answers how many, of the largest kind.';

create function klieo.elect_maintainer(token uuid, holder text, ttl_ms double precision) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return klieo.extend_lease('$klieo', 'maintenance', elect_maintainer.token, elect_maintainer.ttl_ms) is not null
    or exists (
      select from klieo.grant_lease('$klieo', 'maintenance', elect_maintainer.token, elect_maintainer.holder, elect_maintainer.ttl_ms)
    );
end
$$;
comment on function klieo.elect_maintainer(uuid, text, double precision) is
  'Whether the bearer of the token is the one process that reaps and prunes, for the next ttl_ms.';

create function klieo.resign_maintainer(token uuid) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform klieo.release_lease('$klieo', 'maintenance', resign_maintainer.token);
end
$$;
comment on function klieo.resign_maintainer(uuid) is 'Somebody else may be elected at once.';

-- ---------------------------------------------------------------- presence, repair

create function klieo.presence_class() returns int
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp as $$
  select ('x' || left(md5('klieo.presence'), 8))::bit(32)::int
$$;
comment on function klieo.presence_class() is 'The first half of the advisory locks that show which processes answer requests in this schema.';

create function klieo.live_responders(subject text) returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off as $$
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
$$;
comment on function klieo.live_responders(text) is 'Whether any live process answers requests on the subject.';

-- Stable: the snapshot and the rows are of one moment. In two statements a commit in between would look like the future.
create function klieo.restored() returns boolean
language sql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off as $$
  select exists (
      select from klieo.consumer_offsets o
      where pg_snapshot_xmax(o.lo) > pg_snapshot_xmax(pg_current_snapshot()) or pg_snapshot_xmax(o.hi) > pg_snapshot_xmax(pg_current_snapshot())
    )
    or coalesce((select m.tx >= pg_snapshot_xmax(pg_current_snapshot()) from klieo.messages m order by m.tx desc, m.seq desc limit 1), false)
    or coalesce((select c.tx >= pg_snapshot_xmax(pg_current_snapshot()) from klieo.kv_changes c order by c.tx desc, c.revision desc limit 1), false)
    or exists (select from klieo.kv_horizons h where h.tx > pg_snapshot_xmax(pg_current_snapshot()))
$$;
comment on function klieo.restored() is 'Whether this database was restored from a dump of another cluster, so that klieo.rebase() is needed.';

create function klieo.rebase() returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
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
$$;
comment on function klieo.rebase() is
  'Makes the log of a restored database deliverable again: nothing acknowledged comes back, nothing undelivered is lost. Answers whether it was needed.';
