-- klieo-bus, functions: publish, the cursor that reads the log (docs/adr/0001-log.md), and the settling of deliveries.

create function klieo.publish_many(subjects text[], payloads bytea, starts int[], lengths int[], headers text[], msg_ids text[])
returns table (seq bigint, duplicate boolean)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.publish_many(text[], bytea, int[], int[], text[], text[]) is
  'Stores messages in order and answers a row for each. Payload n is lengths[n] bytes of payloads from starts[n], counted from 1; headers are JSON texts; msg_ids may be null. Checks nothing but sizes: publish() does.';

create function klieo.publish(subject text, payload bytea, headers jsonb default '{}', msg_id text default null) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
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
$$;
comment on function klieo.publish(text, bytea, jsonb, text) is
  'Publishes a message in this transaction and answers its seq. A second one with the same msg_id within two minutes stores nothing and answers the first one''s.';

-- ---------------------------------------------------------------- the cursor

create function klieo.cursor_snapshot() returns pg_snapshot
language plpgsql
set search_path = pg_catalog, pg_temp as $$
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
$$;
comment on function klieo.cursor_snapshot() is 'The present snapshot, with this transaction among the running ones.';

create function klieo.window_has_message(lo pg_snapshot, hi pg_snapshot) returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.window_has_message(pg_snapshot, pg_snapshot) is 'Whether hi sees any message that lo does not.';

create function klieo.creation_lock() returns bigint
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp as $$
  select ('x' || left(md5('klieo.creation'), 16))::bit(64)::bigint
$$;
comment on function klieo.creation_lock() is 'The advisory lock that keeps pruning and the making of durables apart.';

create function klieo.create_durable(durable text, filter text, start_seq bigint, start_time timestamptz, start_new boolean)
returns setof int
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
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
$$;
comment on function klieo.create_durable(text, text, bigint, timestamptz, boolean) is
  'Makes a durable that begins with everything, at a seq, at a time, or with what is published from now on; answers its id, or no row if there is one of that name.';

create function klieo.find_durable(durable text) returns table (id int, filter text, created_at timestamptz)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
  return query select o.id, o.filter, o.created_at from klieo.consumer_offsets o where o.durable = find_durable.durable;
end
$$;
comment on function klieo.find_durable(text) is
  'The id of a durable, its filter and when it was made; no row: there is none. It has another id after it was moved, and was made at another time after it was deleted.';

create function klieo.delete_durable(durable text) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off as $$
#variable_conflict use_column
declare
  v_id int;
begin
  delete from klieo.consumer_offsets o where o.durable = delete_durable.durable returning o.id into v_id;
  delete from klieo.deliveries d where d.consumer_id = v_id;
  return v_id is not null;
end
$$;
comment on function klieo.delete_durable(text) is 'Deletes a durable, its position and what is unsettled; answers whether there was one.';

-- Hands out messages of a durable: first what is due again, then what is new.
--
-- The transaction must not have written: its own xid would look finished in its own snapshot, and what it publishes after
-- the cursor has moved would never be delivered. The durable's row is locked in one statement and the snapshot taken in a
-- later one: a snapshot from before the lock would move the cursor backwards. Both need READ COMMITTED.
--
-- Only committed dead letters may be published elsewhere; here nothing is (see bury_deliveries).
create function klieo.fetch_messages(
  consumer int, max_messages int, ack_wait_ms bigint, max_ack_pending int, max_deliver int, max_bytes bigint, max_scan int default 4000)
returns table (
  tx xid8, seq bigint, subject text, headers jsonb, payload bytea, published_at timestamptz, attempt int, token uuid,
  more boolean, final_due boolean, due_in_ms double precision)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.fetch_messages(int, int, bigint, int, int, bigint, int) is
  'Hands out messages of a durable: due redeliveries first, then new ones, at most max_messages and about max_bytes, of about max_scan looked at. The last row has a null seq and says whether there is more at once, whether deliveries wait to be dead-lettered, and when the next redelivery is due.';

create function klieo.bury_deliveries(consumer int, max_messages int) returns int
language plpgsql security definer
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
$$;
comment on function klieo.bury_deliveries(int, int) is
  'Publishes on <durable>.dlq what was left unsettled at its last delivery, and forgets it; answers how many. Must not share a transaction with fetch_messages.';

create function klieo.reap_deliveries(max_messages int) returns table (durable text, count int)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.reap_deliveries(int) is 'Buries what was left unsettled at its last delivery, where no member fetches; answers how many of which durable.';

create function klieo.settle_deliveries(consumers int[], seqs bigint[], tokens uuid[], no_wait boolean)
returns table (n int, consumer_id int, seq bigint)
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.settle_deliveries(int[], bigint[], uuid[], boolean) is
  'Locks the deliveries whose tokens are still valid and answers their positions; no_wait passes over those that an open transaction holds.';

-- A token belongs to one delivery of one message to one durable, so no durable and message that were not named together are met. By
-- the primary key rows are locked in one order, and the token is looked at again after a wait.
create function klieo.ack_deliveries(consumers int[], seqs bigint[], tokens uuid[], no_wait boolean default false) returns setof int
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.ack_deliveries(int[], bigint[], uuid[], boolean) is
  'Ends deliveries; answers the positions of those whose token was still valid.';

create function klieo.extend_waiting(consumers int[], seqs bigint[], tokens uuid[], waits_ms bigint[]) returns table (n int, extended boolean)
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.extend_waiting(int[], bigint[], uuid[], bigint[]) is
  'Restarts visibility timeouts, after whoever has locked the deliveries; answers the positions of those whose token is still valid then.';

-- Waits, or not, as heartbeat_job does.
create function klieo.extend_deliveries(consumers int[], seqs bigint[], tokens uuid[], waits_ms bigint[], no_wait boolean default false)
returns table (n int, extended boolean)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.extend_deliveries(int[], bigint[], uuid[], bigint[], boolean) is
  'Restarts visibility timeouts, never shortening one; answers the positions of those whose token is still valid, and whether they were extended.';

create function klieo.delivery_whereabouts(consumer int, seq bigint, token uuid) returns text
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
  return (
    select case when d.token is null then 'free' when d.token = delivery_whereabouts.token then 'mine' else 'other' end
    from klieo.deliveries d
    where d.consumer_id = delivery_whereabouts.consumer and d.seq = delivery_whereabouts.seq
  );
end
$$;
comment on function klieo.delivery_whereabouts(int, bigint, uuid) is
  'Whose a delivery is: free, mine (of the token''s bearer) or other; null: it is settled.';

create function klieo.release_deliveries(consumers int[], seqs bigint[], tokens uuid[]) returns setof int
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.release_deliveries(int[], bigint[], uuid[]) is
  'Hands back what was not yielded to a handler: the attempt is not counted. Answers the positions of those whose token was still valid.';

create function klieo.nak_deliveries(consumers int[], seqs bigint[], tokens uuid[], delays_ms bigint[], no_wait boolean default false)
returns setof int
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.nak_deliveries(int[], bigint[], uuid[], bigint[], boolean) is
  'Gives deliveries back, to be handed out again after their delays; answers the positions of those whose token was still valid.';
