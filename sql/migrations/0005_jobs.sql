-- klieo-bus, functions: jobs.
--
--   ready ─ claim ─▶ running ─ ack ─▶ gone
--     ▲                 │ ├─ nak, or the lease runs out ─▶ scheduled or ready, while attempts are left
--     └─ the time comes ┘ └─ the last attempt fails, deadLetter ─▶ dead ─ retry_dead ─▶ ready

create function klieo.enqueue_many(
  queues text[], payloads bytea, starts int[], lengths int[], headers text[], dedup_keys text[], max_attempts int[],
  delays_ms bigint[], run_ats timestamptz[], priorities int[])
returns table (id bigint, added boolean)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.enqueue_many(text[], bytea, int[], int[], text[], text[], int[], bigint[], timestamptz[], int[]) is
  'Enqueues jobs in order and answers a row for each. Payloads as in publish_many; the other arrays may be null for their defaults. Checks nothing but what the tables check: enqueue() does.';

-- A call that has nobody to share a statement with: the one insert, and nothing beside it.
create function klieo.enqueue_one(
  queue text, payload bytea, headers jsonb default '{}', max_attempts int default 5, priority int default 0,
  delay_ms double precision default 0, run_at timestamptz default null)
returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
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
$$;
comment on function klieo.enqueue_one(text, bytea, jsonb, int, int, double precision, timestamptz) is
  'Enqueues a job without a dedup key and answers its id. Checks nothing but what the tables check: enqueue() does.';

create function klieo.enqueue(
  queue text, payload bytea, headers jsonb default '{}', dedup_key text default null, max_attempts int default 5,
  run_at timestamptz default now(), priority int default 0)
returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
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
$$;
comment on function klieo.enqueue(text, bytea, jsonb, text, int, timestamptz, int) is
  'Enqueues a job in this transaction and answers its id; with a dedup_key that is taken, the id of the first job.';

create function klieo.bury_jobs(ids bigint[], reason text) returns int
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.bury_jobs(bigint[], text) is
  'Makes jobs, which the caller has locked, dead and publishes their dead letters on <queue>.dlq; a null reason: their attempts are used up.';

-- Where the claimable jobs of a queue begin. Dead row versions that an old snapshot pins gather at the head of a priority, and a
-- scan that begins there visits each of them. So a claim that was slow notes where it found the first job, and later claims begin
-- there (docs/adr/0008-heads.md). Below a head a job may still turn up: its transaction committed late, or its claim was rolled
-- back. So the claims look from the very beginning again, as often as that takes a twentieth of the time.
create function klieo.look_is_due(looked_at timestamptz, look_ms double precision) returns boolean
language sql volatile
set search_path = pg_catalog, pg_temp as $$
  -- At most five seconds later, should a look have stood still; at once, should the clock have been set back.
  select look_is_due.looked_at is null
    or clock_timestamp() not between look_is_due.looked_at and look_is_due.looked_at + make_interval(secs => least(look_is_due.look_ms * 0.02, 5))
$$;
comment on function klieo.look_is_due(timestamptz, double precision) is 'Whether a queue may be looked through again: that may take a twentieth of the time.';

create function klieo.look_for_heads(queue text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.look_for_heads(text) is 'Looks through the whole queue and notes the priorities at whose head dead rows lie, and where their jobs begin.';

create function klieo.head_before(first timestamptz, looked_at timestamptz) returns timestamptz
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp as $$
  -- What is being enqueued just now may become visible in another order. Nothing old does.
  select case
    when head_before.first < head_before.looked_at - interval '1 second' then head_before.first
    else least(head_before.first, head_before.looked_at) - interval '100 milliseconds'
  end
$$;
comment on function klieo.head_before(timestamptz, timestamptz) is 'The head to note after the first job was found there; null: none was.';

create function klieo.move_head(queue text, priority smallint, begun_from timestamptz, head timestamptz) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off as $$
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
$$;
comment on function klieo.move_head(text, smallint, timestamptz, timestamptz) is 'Notes that the jobs of a priority begin later than a claim began from, or earlier.';

-- Claims the best claimable jobs. Priorities are walked from the top, one index range each, so that neither delayed nor
-- running jobs of a higher priority stand in the way. A job whose last lease ran out is buried when it is met.
create function klieo.take_jobs(queue text, worker_id text, lease_ttl_ms bigint, max_jobs int, max_bytes bigint, horizon_ms bigint)
returns table (id bigint, payload bytea, headers jsonb, attempt int, max_attempts int, fence int, token uuid, expires_at timestamptz)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.take_jobs(text, text, bigint, int, bigint, bigint) is
  'claim_jobs, and perhaps a last row without an id: fence is 1 when dead letters were published on the way; max_attempts is, when there was nothing to claim, the time in ms to the next job within horizon_ms.';

create function klieo.claim_jobs(queue text, worker_id text, lease_ttl_ms bigint, max_jobs int, max_bytes bigint default 16777216)
returns table (id bigint, payload bytea, headers jsonb, attempt int, max_attempts int, fence int, token uuid, expires_at timestamptz)
language sql security definer
set search_path = pg_catalog, pg_temp as $$
  select t.* from klieo.take_jobs(claim_jobs.queue, claim_jobs.worker_id, claim_jobs.lease_ttl_ms, claim_jobs.max_jobs, claim_jobs.max_bytes, null) t
  where t.id is not null
$$;
comment on function klieo.claim_jobs(text, text, bigint, int, bigint) is
  'Claims up to max_jobs jobs for lease_ttl_ms, best first, with about max_bytes of payload; each comes with a token that its settlement needs.';

create function klieo.next_job_at(queue text, horizon_ms bigint) returns timestamptz
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.next_job_at(text, bigint) is
  'When the next delayed or running job of the queue becomes claimable, within horizon_ms; null: there is none.';

create function klieo.settle_jobs(ids bigint[], tokens uuid[], no_wait boolean) returns bigint[]
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.settle_jobs(bigint[], uuid[], boolean) is
  'Locks the jobs whose tokens are still valid and answers their ids; no_wait passes over those that an open transaction holds.';

create function klieo.job_whereabouts(id bigint, token uuid) returns text
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
  return (
    select case when j.token is null then 'free' when j.token = job_whereabouts.token then 'mine' else 'other' end
    from klieo.jobs j
    where j.id = job_whereabouts.id
  );
end
$$;
comment on function klieo.job_whereabouts(bigint, uuid) is 'Whose a job is: free, mine (of the token''s bearer) or other; null: it is gone.';

create function klieo.ack_job(id bigint, token uuid) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
  delete from klieo.jobs j where j.id = ack_job.id and j.token = ack_job.token;
  return found;
end
$$;
comment on function klieo.ack_job(bigint, uuid) is 'Ends a job that is done; answers whether its token was still valid.';

-- A token belongs to one claim of one job, so no pair of an id and another's token is met. By the primary key rows are locked in
-- the order of their ids, and the token is looked at again after a wait.
create function klieo.ack_jobs(ids bigint[], tokens uuid[], no_wait boolean default false) returns setof bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.ack_jobs(bigint[], uuid[], boolean) is 'Ends jobs that are done; answers those whose token was still valid.';

create function klieo.nak_jobs(ids bigint[], tokens uuid[], delays_ms bigint[], errors text[], no_wait boolean default false) returns setof bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.nak_jobs(bigint[], uuid[], bigint[], text[], boolean) is
  'Puts jobs back, claimable after their delays; one whose attempts are used up is dead at once. Answers those whose token was still valid.';

create function klieo.release_jobs(ids bigint[], tokens uuid[], counted boolean[] default null) returns setof bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.release_jobs(bigint[], uuid[], boolean[]) is
  'Makes claimed jobs claimable again at once; one whose attempts are used up is dead. Those whose handling never began (counted is false) are as if they had not been claimed.';

create function klieo.dead_letter_jobs(ids bigint[], tokens uuid[], reasons text[], no_wait boolean default false) returns setof bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
  v_mine bigint[] := klieo.settle_jobs(dead_letter_jobs.ids, dead_letter_jobs.tokens, dead_letter_jobs.no_wait);
begin
  perform klieo.bury_jobs(array[d.id], d.reason)
  from unnest(dead_letter_jobs.ids, dead_letter_jobs.reasons) as d(id, reason)
  where d.id = any(v_mine);
  return query select unnest(v_mine);
end
$$;
comment on function klieo.dead_letter_jobs(bigint[], uuid[], text[], boolean) is
  'Makes jobs dead, each for its reason; answers those whose token was still valid.';

-- A heartbeat must not wait behind an ack in somebody's open transaction. Where the row is locked and still has our token, and
-- the lease is not over, it is such an ack: the lease is the holder's, and nothing is extended. Where the lease is over it may
-- also be a claim that is about to commit, so that is waited for, unless the holder (no_wait) knows of an ack of his own.
create function klieo.heartbeat_job(id bigint, token uuid, lease_ttl_ms bigint, no_wait boolean default false)
returns table (until timestamptz, extended boolean)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.heartbeat_job(bigint, uuid, bigint, boolean) is 'Extends a lease, never shortening it; answers its end and whether it could be extended, or no row when it is lost.';

create function klieo.retry_dead(queue text, id bigint default null) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
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
$$;
comment on function klieo.retry_dead(text, bigint) is 'Puts dead jobs back with all their attempts, the queue''s or one; answers how many.';

create function klieo.reap_jobs(max_jobs int) returns table (queue text, count int)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.reap_jobs(int) is 'Buries jobs whose last lease ran out; answers how many of which queue. Claims do the same, so nothing depends on it.';
