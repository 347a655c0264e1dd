-- klieo-bus, functions: administration. What an operator does, besides retry_dead() and delete_durable(); docs/contract.md, A1 to A6.
--
-- Nothing here waits for a job that an open transaction is about to settle: it says so ('locked'), and may be called again.

create function klieo.check_filter(filter text) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp as $$
begin
  if filter is null or octet_length(filter) > 1024
    or filter !~ '^([\x21-\x29\x2b-\x2d\x2f-\x3d\x3f-\x7e]+|\*)(\.([\x21-\x29\x2b-\x2d\x2f-\x3d\x3f-\x7e]+|\*))*(\.>)?$' and filter <> '>'
    or filter ~ '^(\$|_INBOX)' then
    raise exception 'filter must be 1 to 1024 bytes of tokens joined by ".", of printable ASCII, * for one token and a last > for the rest, the first token not beginning with $ or _INBOX'
      using errcode = '22023';
  end if;
end
$$;
comment on function klieo.check_filter(text) is 'Raises 22023 unless it may be a durable''s filter.';

-- ---------------------------------------------------------------- jobs

create function klieo.retry_job(id bigint) returns table (outcome text, queue text)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.retry_job(bigint) is
  'Makes a dead job ready with all its attempts, and a scheduled one ready now. The outcome is retried; ready or running, and nothing was changed; locked by an open transaction; or no row: there is no such job.';

create function klieo.cancel_job(id bigint, reason text default 'cancelled') returns table (outcome text, queue text)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.cancel_job(bigint, text) is
  'Makes a job dead, whoever holds it, and publishes its dead letter. The outcome is cancelled; dead, which it was before; locked by an open transaction; or no row: there is no such job.';

create function klieo.remove_job(id bigint) returns table (outcome text, queue text)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.remove_job(bigint) is
  'Removes a job that is not running. The outcome is removed; running, and nothing was changed; locked by an open transaction; or no row: there is no such job.';

create function klieo.purge_queue(queue text, states text[] default '{ready,scheduled,dead}', max_jobs int default null) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.purge_queue(text, text[], int) is
  'Removes jobs of a queue that are not running, of some states or all, at most max_jobs of them; answers how many. Those that an open transaction holds stay.';

create function klieo.pause_queue(queue text) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
  perform klieo.check_name('queue', pause_queue.queue);
  insert into klieo.paused_queues as p (queue) values (pause_queue.queue) on conflict (queue) do nothing;
  return found;
end
$$;
comment on function klieo.pause_queue(text) is 'From its commit on claims find the queue empty; running jobs go on. Answers whether it was not paused before.';

create function klieo.resume_queue(queue text) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
  perform klieo.check_name('queue', resume_queue.queue);
  delete from klieo.paused_queues p where p.queue = resume_queue.queue;
  return found;
end
$$;
comment on function klieo.resume_queue(text) is 'Ends a pause; answers whether there was one.';

-- ---------------------------------------------------------------- durables and messages

-- A moved durable gets another id. So what its members hold is not theirs any more, without a wait for a delivery that an open
-- transaction is about to settle; and a fetch that waits for the row finds none of the old id, and looks again.
create function klieo.seek_durable(
  durable text, start_seq bigint default null, start_time timestamptz default null, start_new boolean default false)
returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off as $$
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
$$;
comment on function klieo.seek_durable(text, bigint, timestamptz, boolean) is
  'Moves a durable: to everything that is stored, to a seq, to a time, or to what is published from now on. What its members hold is not theirs any more. Answers whether there is such a durable.';

create function klieo.purge_messages_from(filter text, before timestamptz, after_tx xid8, after_seq bigint, max_messages int)
returns table (purged bigint, last_tx xid8, last_seq bigint)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.purge_messages_from(text, timestamptz, xid8, bigint, int) is
  'Looks at max_messages stored messages after a position in the log and removes those whose subject matches; answers how many, and the last position. No row: that was the end of the log.';

create function klieo.purge_messages(filter text, before timestamptz default null) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
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
$$;
comment on function klieo.purge_messages(text, timestamptz) is
  'Removes stored messages whose subject matches, delivered or not, all or those published before a time; answers how many. One that is handed out may still be settled.';
