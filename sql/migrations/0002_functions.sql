-- klieo-bus, functions. The first part is the interface for SQL; the rest is what it and the packages are made of.
-- Parameters of batches are parallel arrays; payloads travel as one value that is cut up here, because every driver can
-- send one bytea, and none sends many cheaply.
--
-- Plans. The tables swing between empty and full faster than autovacuum looks at them, and a plan made for an empty table
-- reads a full one from end to end (measured: 60 ms instead of 2 ms for a claim of 100 out of 40,000). Every statement here
-- has an index that is right at any size, so the functions forbid the other ways, and look rows up by = any(array) or in a
-- lateral subquery, where the planner cannot turn the join round (measured: 5 ms instead of 0.9 ms for 100 acks).
--
-- SQLSTATEs of our own: KB001 the durable does not exist; KB002 must not run in a transaction that has written;
-- KB003 needs READ COMMITTED; KB004 the database was restored from a dump and needs klieo.rebase(); KB005 conflict.
-- Bad arguments are 22023, too large ones 54000.

-- ---------------------------------------------------------------- names and filters

create function klieo.filter_pattern(filter text) returns text
language sql immutable strict parallel safe as $$
  select '^' || string_agg(
    case token when '*' then '[^.]+' when '>' then '.+' else regexp_replace(token, '([^A-Za-z0-9_-])', '\\\1', 'g') end,
    '\.' order by n) || '$'
  from unnest(string_to_array(filter, '.')) with ordinality as t(token, n)
$$;
comment on function klieo.filter_pattern(text) is 'The regular expression of a filter: * is one token, a last > one or more.';

create function klieo.check_subject(subject text) returns void
language plpgsql immutable as $$
begin
  if subject is null or octet_length(subject) > 1024
    or subject !~ '^[\x21-\x29\x2b-\x2d\x2f-\x3d\x3f-\x7e]+(\.[\x21-\x29\x2b-\x2d\x2f-\x3d\x3f-\x7e]+)*$'
    or subject ~ '^(\$|_INBOX)' then
    raise exception 'subject must be 1 to 1024 bytes of tokens joined by ".", of printable ASCII without wildcards, the first token not beginning with $ or _INBOX'
      using errcode = '22023';
  end if;
end
$$;
comment on function klieo.check_subject(text) is 'Raises 22023 unless a message may be published there.';

create function klieo.check_name(argument text, name text) returns void
language plpgsql immutable as $$
begin
  if name is null or length(name) > (case when argument = 'bucket' and left(name, 6) = 'dedup.' then 134 else 128 end) or name !~ '^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$' then
    raise exception '% must be 1 to 128 characters of A-Z a-z 0-9 _ - with single dots between them', argument using errcode = '22023';
  end if;
end
$$;
comment on function klieo.check_name(text, text) is 'Raises 22023 unless it may name a queue or bucket.';

create function klieo.check_key(bucket text, key text, writing boolean) returns void
language plpgsql immutable as $$
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
$$;
comment on function klieo.check_key(text, text, boolean) is 'Raises 22023 unless bucket and key are well-formed, and for writing not those of the bus.';

create function klieo.check_headers(headers jsonb) returns void
language plpgsql immutable as $$
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
$$;
comment on function klieo.check_headers(jsonb) is 'Raises 22023 unless it is an object of strings with legal names and values.';

create function klieo.check_payload(argument text, payload bytea) returns void
language plpgsql immutable as $$
begin
  if payload is null then
    raise exception '% must not be null', argument using errcode = '22023';
  elsif octet_length(payload) > 8388608 then
    raise exception '% must be at most 8 MiB', argument using errcode = '54000';
  end if;
end
$$;
comment on function klieo.check_payload(text, bytea) is 'Raises 22023 for null and 54000 beyond 8 MiB.';

-- ---------------------------------------------------------------- publish

create function klieo.publish_many(subjects text[], payloads bytea, starts int[], lengths int[], headers text[], msg_ids text[])
returns table (seq bigint, duplicate boolean)
language plpgsql
set enable_seqscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_seqs bigint[];
  v_new bigint[];
begin
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
language plpgsql as $$
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
language plpgsql as $$
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
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off as $$
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
language sql immutable parallel safe as $$
  select ('x' || left(md5('klieo.creation'), 16))::bit(64)::bigint
$$;
comment on function klieo.creation_lock() is 'The advisory lock that keeps pruning and the making of durables apart.';

create function klieo.create_durable(durable text, filter text, start_seq bigint, start_time timestamptz, start_new boolean)
returns setof int
language plpgsql as $$
#variable_conflict use_column
begin
  -- Shared: durables may be made side by side, but not beside a prune, which would not know of them.
  perform pg_advisory_xact_lock_shared(klieo.creation_lock());
  return query
    insert into klieo.consumer_offsets as o (durable, filter, pattern, start_seq, start_time, lo)
    values (create_durable.durable, create_durable.filter, klieo.filter_pattern(create_durable.filter),
      coalesce(create_durable.start_seq, 0), coalesce(create_durable.start_time, '-infinity'),
      case when create_durable.start_new then pg_current_snapshot() else '1:1:' end)
    on conflict (durable) do nothing
    returning o.id;
end
$$;
comment on function klieo.create_durable(text, text, bigint, timestamptz, boolean) is
  'Makes a durable that begins with everything, at a seq, at a time, or with what is published from now on; answers its id, or no row if there is one of that name.';

-- Hands out messages of a durable: first what is due again, then what is new.
--
-- The transaction must not have written: its own xid would look finished in its own snapshot, and what it publishes after
-- the cursor has moved would never be delivered. The durable's row is locked in one statement and the snapshot taken in a
-- later one: a snapshot from before the lock would move the cursor backwards. Both need READ COMMITTED.
--
-- Only committed dead letters may be published elsewhere; here nothing is (see bury_deliveries).
create function klieo.fetch_messages(consumer int, max_messages int, ack_wait_ms bigint, max_ack_pending int, max_deliver int, max_bytes bigint)
returns table (
  tx xid8, seq bigint, subject text, headers jsonb, payload bytea, published_at timestamptz, attempt int, token uuid,
  more boolean, final_due boolean, due_in_ms double precision)
language plpgsql
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off as $$
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
  v_due boolean;
  v_final boolean;
  v_more boolean := false;
  v_full boolean := false;
  v_moved boolean := false;
  v_room int;
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
  select coalesce(bool_or(not d.final), false), coalesce(bool_or(d.final), false) into v_due, v_final
  from klieo.deliveries d where d.consumer_id = fetch_messages.consumer and d.visible_at <= v_now;

  if v_due or c.hi is not null or c.last_active_at < v_now - interval '30 seconds' or klieo.window_has_message(c.lo, v_hi) then
    select o.* into c from klieo.consumer_offsets o where o.id = fetch_messages.consumer for no key update;
    if not found then
      raise exception 'the durable does not exist' using errcode = 'KB001';
    end if;

    if v_due then
      with due as materialized (
        select d.tx, d.seq, d.visible_at
        from klieo.deliveries d
        where d.consumer_id = fetch_messages.consumer and d.visible_at <= v_now and not d.final
        order by d.visible_at, d.seq
        limit fetch_messages.max_messages
        for no key update skip locked
      ), sized as (
        select due.seq, m.size, sum(m.size) over (order by due.visible_at, due.seq rows unbounded preceding) as bytes
        from due
        left join lateral (select octet_length(m.payload) as size from klieo.messages m where m.tx = due.tx and m.seq = due.seq limit 1) m on true
      ), vanished as (
        -- Somebody has deleted the message by hand: it must not be in the way for ever.
        delete from klieo.deliveries d
        where d.consumer_id = fetch_messages.consumer and d.seq = any (array(select sized.seq from sized where sized.size is null))
      ), again as (
        update klieo.deliveries d
        set attempt = d.attempt + 1,
          token = gen_random_uuid(),
          visible_at = clock_timestamp() + v_wait,
          final = coalesce(d.attempt + 1 >= fetch_messages.max_deliver, false)
        where d.consumer_id = fetch_messages.consumer
          and d.seq = any (array(select sized.seq from sized where sized.bytes - sized.size < fetch_messages.max_bytes))
        returning d.tx, d.seq, d.attempt, d.token
      )
      select
        coalesce(array_agg(again.tx order by again.tx, again.seq), '{}'), coalesce(array_agg(again.seq order by again.tx, again.seq), '{}'),
        coalesce(array_agg(again.attempt order by again.tx, again.seq), '{}'), coalesce(array_agg(again.token order by again.tx, again.seq), '{}'),
        v_bytes - coalesce((select max(sized.bytes) from sized where sized.bytes - sized.size < fetch_messages.max_bytes), 0)
      into v_tx, v_seq, v_attempt, v_token, v_bytes
      from again;
    end if;

    select fetch_messages.max_ack_pending - count(*) into v_room
    from (select from klieo.deliveries d where d.consumer_id = fetch_messages.consumer limit fetch_messages.max_ack_pending) pending;
    v_full := v_room <= 0;
    v_room := least(v_room, fetch_messages.max_messages - cardinality(v_seq));

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
        select fetch_messages.consumer, kept.tx, kept.seq, 1, clock_timestamp() + v_wait, gen_random_uuid(), coalesce(1 >= fetch_messages.max_deliver, false)
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
      exit when v_bytes <= 0 or v_scanned >= 4000;
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
    select null::xid8, null::bigint, null::text, null::jsonb, null::bytea, null::timestamptz, null::int, null::uuid, v_more, v_final,
      least(
        case when v_full then 50 end,
        (select extract(epoch from d.visible_at - clock_timestamp()) * 1000
         from klieo.deliveries d
         where d.consumer_id = fetch_messages.consumer and d.visible_at > v_now
         order by d.visible_at
         limit 1))::double precision;
end
$$;
comment on function klieo.fetch_messages(int, int, bigint, int, int, bigint) is
  'Hands out messages of a durable: due redeliveries first, then new ones, at most max_messages and about max_bytes. The last row has a null seq and says whether there is more at once, whether deliveries wait to be dead-lettered, and when the next redelivery is due.';

create function klieo.bury_deliveries(consumer int, max_messages int) returns int
language plpgsql
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off as $$
#variable_conflict use_column
declare
  v_count int;
begin
  with ended as materialized (
    select d.seq
    from klieo.deliveries d
    where d.consumer_id = bury_deliveries.consumer and d.visible_at <= (select clock_timestamp()) and d.final
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
language plpgsql
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off as $$
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
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off as $$
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

create function klieo.ack_deliveries(consumers int[], seqs bigint[], tokens uuid[], no_wait boolean default false) returns setof int
language plpgsql
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off as $$
#variable_conflict use_column
declare
  v_ns int[];
  v_consumers int[];
  v_seqs bigint[];
begin
  select array_agg(m.n), array_agg(distinct m.consumer_id), array_agg(m.seq) into v_ns, v_consumers, v_seqs
  from klieo.settle_deliveries(ack_deliveries.consumers, ack_deliveries.seqs, ack_deliveries.tokens, ack_deliveries.no_wait) m;
  -- By token as well: two durables in one batch may hold the same message.
  delete from klieo.deliveries d where d.consumer_id = any(v_consumers) and d.seq = any(v_seqs) and d.token = any(ack_deliveries.tokens);
  return query select unnest(v_ns);
end
$$;
comment on function klieo.ack_deliveries(int[], bigint[], uuid[], boolean) is
  'Ends deliveries; answers the positions of those whose token was still valid.';

create function klieo.extend_waiting(consumers int[], seqs bigint[], tokens uuid[], waits_ms bigint[]) returns table (n int, extended boolean)
language plpgsql
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off as $$
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
language plpgsql
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off as $$
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

create function klieo.release_deliveries(consumers int[], seqs bigint[], tokens uuid[]) returns setof int
language plpgsql
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off as $$
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
language plpgsql
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off as $$
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

-- ---------------------------------------------------------------- key-value

create function klieo.dedup_lives(bucket text, value bytea) returns boolean
language sql stable
set enable_seqscan = off
set jit = off as $$
  select left(bucket, 6) = 'dedup.' and exists (
    select from klieo.jobs j where j.id = convert_from(value, 'UTF8')::bigint and j.died_at is null
  )
$$;
comment on function klieo.dedup_lives(text, bytea) is 'Whether an idempotency record is kept alive by its job.';

create function klieo.kv_get(bucket text, key text)
returns table (value bytea, revision bigint, updated_at timestamptz)
language plpgsql stable
set enable_seqscan = off
set jit = off as $$
#variable_conflict use_column
begin
  return query
    select e.value, e.revision, e.updated_at
    from klieo.kv_entries e
    where e.bucket = kv_get.bucket
      and e.key = kv_get.key
      and e.value is not null
      and (e.expires_at is null or e.expires_at > clock_timestamp() or klieo.dedup_lives(e.bucket, e.value));
end
$$;
comment on function klieo.kv_get(text, text) is 'The entry of a key; no row while it is absent.';

-- The revision is drawn in the update, so after the row is locked: a key's revisions grow in commit order. Drawn in the
-- insert it may be from before a wait; then the insert turns into the update and draws again.
create function klieo.kv_put(bucket text, key text, value bytea, ttl_ms bigint default null) returns bigint
language plpgsql
set enable_seqscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_expiry interval := make_interval(secs => kv_put.ttl_ms / 1000.0);
  v_revision bigint;
  v_at timestamptz;
begin
  perform klieo.check_key(kv_put.bucket, kv_put.key, true);
  perform klieo.check_payload('value', kv_put.value);
  insert into klieo.kv_entries as e (bucket, key, revision, updated_at, expires_at, value)
  values (kv_put.bucket, kv_put.key, nextval('klieo.kv_revision'), clock_timestamp(), clock_timestamp() + v_expiry, kv_put.value)
  on conflict (bucket, key) do update
    set tx = pg_current_xact_id(), revision = nextval('klieo.kv_revision'), updated_at = clock_timestamp(), expires_at = clock_timestamp() + v_expiry, value = excluded.value
  returning e.revision, e.updated_at into v_revision, v_at;
  insert into klieo.kv_changes (revision, changed_at, bucket, key, value) values (v_revision, v_at, kv_put.bucket, kv_put.key, kv_put.value);
  return v_revision;
end
$$;
comment on function klieo.kv_put(text, text, bytea, bigint) is 'Writes a key, absent again after ttl_ms; answers the new revision.';

create function klieo.kv_cas(bucket text, key text, value bytea, expected bigint, ttl_ms bigint default null) returns bigint
language plpgsql
set enable_seqscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_expiry interval := make_interval(secs => kv_cas.ttl_ms / 1000.0);
  v_revision bigint;
  v_at timestamptz;
begin
  perform klieo.check_key(kv_cas.bucket, kv_cas.key, true);
  perform klieo.check_payload('value', kv_cas.value);
  if kv_cas.expected is null then
    insert into klieo.kv_entries as e (bucket, key, revision, updated_at, expires_at, value)
    values (kv_cas.bucket, kv_cas.key, nextval('klieo.kv_revision'), clock_timestamp(), clock_timestamp() + v_expiry, kv_cas.value)
    on conflict (bucket, key) do update
      set tx = pg_current_xact_id(), revision = nextval('klieo.kv_revision'), updated_at = clock_timestamp(), expires_at = clock_timestamp() + v_expiry, value = excluded.value
      where e.value is null or e.expires_at <= clock_timestamp()
    returning e.revision, e.updated_at into v_revision, v_at;
  else
    update klieo.kv_entries e
    set tx = pg_current_xact_id(), revision = nextval('klieo.kv_revision'), updated_at = clock_timestamp(), expires_at = clock_timestamp() + v_expiry, value = kv_cas.value
    where e.bucket = kv_cas.bucket
      and e.key = kv_cas.key
      and e.revision = kv_cas.expected
      and e.value is not null
      and (e.expires_at is null or e.expires_at > clock_timestamp())
    returning e.revision, e.updated_at into v_revision, v_at;
  end if;
  if v_revision is not null then
    insert into klieo.kv_changes (revision, changed_at, bucket, key, value) values (v_revision, v_at, kv_cas.bucket, kv_cas.key, kv_cas.value);
  end if;
  return v_revision;
end
$$;
comment on function klieo.kv_cas(text, text, bytea, bigint, bigint) is
  'Writes a key only while it is at the expected revision (null: absent); answers the new revision, or null if it lost.';

create function klieo.kv_delete(bucket text, key text, expected bigint default null) returns bigint
language plpgsql
set enable_seqscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_revision bigint;
  v_at timestamptz;
begin
  perform klieo.check_key(kv_delete.bucket, kv_delete.key, false);
  update klieo.kv_entries e
  set tx = pg_current_xact_id(), revision = nextval('klieo.kv_revision'), updated_at = clock_timestamp(), expires_at = null, value = null
  where e.bucket = kv_delete.bucket
    and e.key = kv_delete.key
    and e.value is not null
    and (e.expires_at is null or e.expires_at > clock_timestamp() or klieo.dedup_lives(e.bucket, e.value))
    and (kv_delete.expected is null or e.revision = kv_delete.expected)
  returning e.revision, e.updated_at into v_revision, v_at;
  if v_revision is not null then
    insert into klieo.kv_changes (revision, changed_at, bucket, key, value) values (v_revision, v_at, kv_delete.bucket, kv_delete.key, null);
  end if;
  return v_revision;
end
$$;
comment on function klieo.kv_delete(text, text, bigint) is
  'Deletes a key, if expected is given only while it is at that revision; answers the revision of the deletion, or null if there was nothing to delete.';

create function klieo.kv_expire(max_entries int) returns table (bucket text, count int)
language plpgsql as $$
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
$$;
comment on function klieo.kv_expire(int) is 'Turns expired entries into tombstones, so that watches see them go; answers how many of which bucket.';

-- ---------------------------------------------------------------- jobs

create function klieo.enqueue_many(
  queues text[], payloads bytea, starts int[], lengths int[], headers text[], dedup_keys text[], max_attempts int[],
  delays_ms bigint[], run_ats timestamptz[], priorities int[])
returns table (id bigint, added boolean)
language plpgsql
set enable_seqscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_ids bigint[];
  v_new bigint[];
  v_found bigint[];
  v_missing boolean;
begin
  if enqueue_many.dedup_keys is null then
    return query
      with stored as (
        insert into klieo.jobs as j (queue, run_at, visible_at, max_attempts, priority, headers, payload)
        select i.queue, due.at, due.at, coalesce(i.max_attempts, 5), coalesce(i.priority, 0), coalesce(i.headers::jsonb, '{}'),
          substring(enqueue_many.payloads from i.start for i.length)
        from unnest(enqueue_many.queues, enqueue_many.starts, enqueue_many.lengths, enqueue_many.headers, enqueue_many.max_attempts,
            enqueue_many.delays_ms, enqueue_many.run_ats, enqueue_many.priorities)
            with ordinality as i(queue, start, length, headers, max_attempts, delay_ms, run_at, priority, n),
          lateral (select coalesce(i.run_at, clock_timestamp() + make_interval(secs => coalesce(i.delay_ms, 0) / 1000.0))) as due(at)
        order by i.n
        returning j.id
      )
      select stored.id, true from stored order by stored.id;
    return;
  end if;

  v_ids := array(select nextval('klieo.job_id') from generate_series(1, cardinality(enqueue_many.starts)));
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

create function klieo.enqueue(
  queue text, payload bytea, headers jsonb default '{}', dedup_key text default null, max_attempts int default 5,
  run_at timestamptz default now(), priority int default 0)
returns bigint
language plpgsql as $$
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
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off as $$
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

-- Claims the best claimable jobs. Priorities are walked from the top, one index range each, so that neither delayed nor
-- running jobs of a higher priority stand in the way. A job whose last lease ran out is buried when it is met.
create function klieo.claim_jobs(queue text, worker_id text, lease_ttl_ms bigint, max_jobs int, max_bytes bigint default 16777216)
returns table (id bigint, payload bytea, headers jsonb, attempt int, max_attempts int, fence int, token uuid, expires_at timestamptz)
language plpgsql
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off as $$
#variable_conflict use_column
declare
  v_now timestamptz := clock_timestamp();
  v_ttl interval := make_interval(secs => claim_jobs.lease_ttl_ms / 1000.0);
  v_priority int := 101;
  v_room int := claim_jobs.max_jobs;
  v_bytes bigint := claim_jobs.max_bytes;
  v_ended bigint[];
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'jobs must be claimed in READ COMMITTED' using errcode = 'KB003';
  end if;
  loop
    select j.priority into v_priority
    from klieo.jobs j
    where j.queue = claim_jobs.queue and j.died_at is null and j.priority < v_priority
    order by j.priority desc
    limit 1;
    exit when not found;
    loop
      -- The limit sits with the lock, in a materialized CTE: elsewhere it would lock too many rows or answer too few.
      for id, payload, headers, attempt, max_attempts, fence, token, expires_at in
        with due as materialized (
          select j.id, j.visible_at, octet_length(j.payload) as size
          from klieo.jobs j
          where j.queue = claim_jobs.queue and j.died_at is null and j.priority = v_priority and j.visible_at <= v_now
          order by j.visible_at, j.id
          limit v_room
          for no key update skip locked
        ), fitting as (
          select s.id, s.visible_at
          from (select d.*, sum(d.size) over (order by d.visible_at, d.id rows unbounded preceding) - d.size as before from due d) s
          where s.before < v_bytes
        ), claimed as (
          update klieo.jobs j
          set attempts = j.attempts + 1,
            fence = j.fence + 1,
            token = gen_random_uuid(),
            worker_id = claim_jobs.worker_id,
            visible_at = clock_timestamp() + v_ttl
          where j.id = any (array(select f.id from fitting f)) and j.attempts < j.max_attempts
          returning j.id, j.payload, j.headers, j.attempts, j.max_attempts, j.fence, j.token, j.visible_at
        )
        select c.id, c.payload, c.headers, c.attempts, c.max_attempts, c.fence, c.token, c.visible_at
        from claimed c
        join fitting f on f.id = c.id
        order by f.visible_at, f.id
      loop
        v_room := v_room - 1;
        v_bytes := v_bytes - octet_length(payload);
        return next;
      end loop;
      if v_room = 0 or v_bytes <= 0 then
        return;
      end if;
      with ended as materialized (
        select j.id
        from klieo.jobs j
        where j.queue = claim_jobs.queue and j.died_at is null and j.priority = v_priority and j.visible_at <= v_now
          and j.attempts >= j.max_attempts
        order by j.visible_at, j.id
        limit 100
        for no key update skip locked
      )
      select array_agg(ended.id) into v_ended from ended;
      exit when v_ended is null;
      perform klieo.bury_jobs(v_ended, null);
    end loop;
  end loop;
end
$$;
comment on function klieo.claim_jobs(text, text, bigint, int, bigint) is
  'Claims up to max_jobs jobs for lease_ttl_ms, best first, with about max_bytes of payload; each comes with a token that its settlement needs.';

create function klieo.next_job_in_ms(queue text) returns double precision
language plpgsql stable
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off as $$
#variable_conflict use_column
declare
  v_now timestamptz := clock_timestamp();
  v_priority int := 101;
  v_next timestamptz;
  v_least timestamptz;
begin
  loop
    select j.priority into v_priority
    from klieo.jobs j
    where j.queue = next_job_in_ms.queue and j.died_at is null and j.priority < v_priority
    order by j.priority desc
    limit 1;
    exit when not found;
    select j.visible_at into v_next
    from klieo.jobs j
    where j.queue = next_job_in_ms.queue and j.died_at is null and j.priority = v_priority
    order by j.visible_at
    limit 1;
    if v_next <= v_now then
      -- It has just become due, or is locked: by a claim that is about to commit, or by an ack in an open transaction.
      v_least := least(v_least, v_now + interval '50 milliseconds');
      select j.visible_at into v_next
      from klieo.jobs j
      where j.queue = next_job_in_ms.queue and j.died_at is null and j.priority = v_priority and j.visible_at > v_now
      order by j.visible_at
      limit 1;
    end if;
    v_least := least(v_least, v_next);
  end loop;
  return extract(epoch from v_least - v_now) * 1000;
end
$$;
comment on function klieo.next_job_in_ms(text) is 'When the next delayed or running job of the queue becomes claimable; null: there is none.';

create function klieo.settle_jobs(ids bigint[], tokens uuid[], no_wait boolean) returns bigint[]
language plpgsql
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off as $$
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

create function klieo.ack_jobs(ids bigint[], tokens uuid[], no_wait boolean default false) returns setof bigint
language plpgsql
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off as $$
#variable_conflict use_column
declare
  v_mine bigint[] := klieo.settle_jobs(ack_jobs.ids, ack_jobs.tokens, ack_jobs.no_wait);
begin
  return query delete from klieo.jobs j where j.id = any(v_mine) returning j.id;
end
$$;
comment on function klieo.ack_jobs(bigint[], uuid[], boolean) is 'Ends jobs that are done; answers those whose token was still valid.';

create function klieo.nak_jobs(ids bigint[], tokens uuid[], delays_ms bigint[], errors text[], no_wait boolean default false) returns setof bigint
language plpgsql
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off as $$
#variable_conflict use_column
declare
  v_mine bigint[] := klieo.settle_jobs(nak_jobs.ids, nak_jobs.tokens, nak_jobs.no_wait);
  v_ended bigint[];
begin
  with given as (
    update klieo.jobs j
    set token = null, run_at = due.at, visible_at = due.at, last_error = coalesce(n.error, j.last_error)
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

create function klieo.release_jobs(ids bigint[], tokens uuid[]) returns setof bigint
language plpgsql
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off as $$
#variable_conflict use_column
declare
  v_mine bigint[] := klieo.settle_jobs(release_jobs.ids, release_jobs.tokens, true);
begin
  return query
    update klieo.jobs j
    set token = null, run_at = clock_timestamp(), visible_at = clock_timestamp()
    where j.id = any(v_mine)
    returning j.id;
end
$$;
comment on function klieo.release_jobs(bigint[], uuid[]) is 'Makes claimed jobs claimable again at once; the attempt counts.';

create function klieo.dead_letter_jobs(ids bigint[], tokens uuid[], reasons text[], no_wait boolean default false) returns setof bigint
language plpgsql
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off as $$
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
create function klieo.heartbeat_job(id bigint, token uuid, lease_ttl_ms bigint, no_wait boolean default false) returns timestamptz
language plpgsql
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off as $$
#variable_conflict use_column
declare
  v_until timestamptz;
begin
  if cardinality(klieo.settle_jobs(array[heartbeat_job.id], array[heartbeat_job.token], true)) = 0 then
    select j.visible_at into v_until from klieo.jobs j where j.id = heartbeat_job.id and j.token = heartbeat_job.token;
    if not found or heartbeat_job.no_wait or v_until > clock_timestamp() then
      return v_until;
    end if;
    if cardinality(klieo.settle_jobs(array[heartbeat_job.id], array[heartbeat_job.token], false)) = 0 then
      return null;
    end if;
  end if;
  update klieo.jobs j
  set visible_at = greatest(j.visible_at, clock_timestamp() + make_interval(secs => heartbeat_job.lease_ttl_ms / 1000.0))
  where j.id = heartbeat_job.id
  returning j.visible_at into v_until;
  return v_until;
end
$$;
comment on function klieo.heartbeat_job(bigint, uuid, bigint, boolean) is 'Extends a lease, never shortening it; answers its end, or null when it is lost.';

create function klieo.retry_dead(queue text, id bigint default null) returns bigint
language plpgsql as $$
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
language plpgsql
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off as $$
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

-- ---------------------------------------------------------------- retention

create function klieo.prune_messages(retention_ms bigint, max_messages int) returns int
language plpgsql
set jit = off as $$
#variable_conflict use_column
declare
  v_bound xid8;
  v_count int;
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
  with old as materialized (
    select m.tx, m.seq
    from klieo.messages m
    where m.tx < v_bound
      and m.published_at < clock_timestamp() - make_interval(secs => prune_messages.retention_ms / 1000.0)
      and not exists (select from klieo.deliveries d where d.seq = m.seq)
    order by m.tx, m.seq
    limit prune_messages.max_messages
  )
  delete from klieo.messages m
  using old
  where m.tx = old.tx and m.seq = old.seq;
  get diagnostics v_count = row_count;
  return v_count;
end
$$;
comment on function klieo.prune_messages(bigint, int) is 'Removes messages older than retention_ms that every durable is past and none has in flight; answers how many.';

create function klieo.prune_kv(max_rows int) returns int
language plpgsql as $$
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
language plpgsql as $$
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
  delete from klieo.requests r where r.deadline < clock_timestamp() - interval '1 second';
  delete from klieo.replies r where r.expires_at < clock_timestamp() - interval '1 second';
  -- Deliveries whose durable is gone.
  delete from klieo.deliveries d where not exists (select from klieo.consumer_offsets o where o.id = d.consumer_id);
  return v_most;
end
$$;
comment on function klieo.prune_rest(bigint, int) is 'Removes old dead jobs, message ids, requests and replies; answers how many, of the largest kind.';

-- ---------------------------------------------------------------- presence, repair

create function klieo.presence_class() returns int
language sql immutable parallel safe as $$
  select ('x' || left(md5('klieo.presence'), 8))::bit(32)::int
$$;
comment on function klieo.presence_class() is 'The first half of the advisory locks that show which processes answer requests in this schema.';

create function klieo.live_responders(subject text) returns boolean
language plpgsql
set enable_seqscan = off
set jit = off as $$
begin
  -- Who can take a process's lock finds it dead; the lock goes with this transaction.
  return exists (
    select from klieo.responders r
    where live_responders.subject ~ r.pattern
      and case
        when r.alive_until is null then not pg_try_advisory_xact_lock_shared(klieo.presence_class(), r.instance_id)
        else r.alive_until > clock_timestamp()
      end);
end
$$;
comment on function klieo.live_responders(text) is 'Whether any live process answers requests on the subject.';

-- Stable: the snapshot and the rows are of one moment. In two statements a commit in between would look like the future.
create function klieo.restored() returns boolean
language sql stable
set enable_seqscan = off as $$
  select exists (
      select from klieo.consumer_offsets o
      where pg_snapshot_xmax(o.lo) > pg_snapshot_xmax(pg_current_snapshot()) or pg_snapshot_xmax(o.hi) > pg_snapshot_xmax(pg_current_snapshot())
    )
    or coalesce((select m.tx >= pg_snapshot_xmax(pg_current_snapshot()) from klieo.messages m order by m.tx desc, m.seq desc limit 1), false)
$$;
comment on function klieo.restored() is 'Whether this database was restored from a dump of another cluster, so that klieo.rebase() is needed.';

create function klieo.rebase() returns boolean
language plpgsql as $$
begin
  if not klieo.restored() then
    return false;
  end if;
  lock table klieo.consumer_offsets, klieo.deliveries, klieo.messages, klieo.kv_entries, klieo.kv_changes, klieo.kv_horizons in access exclusive mode;
  if not klieo.restored() then
    return false;
  end if;
  -- From stored data alone: what a durable had not been handed out waits in deliveries, with no attempt counted.
  insert into klieo.deliveries (consumer_id, tx, seq, attempt, visible_at)
  select o.id, m.tx, m.seq, 0, now()
  from klieo.consumer_offsets o
  join klieo.messages m
    on (m.subject = o.filter or m.subject ~ o.pattern) and m.seq >= o.start_seq and m.published_at >= o.start_time
  where not pg_visible_in_snapshot(m.tx, o.lo)
    and not coalesce(pg_visible_in_snapshot(m.tx, o.hi) and (m.tx, m.seq) <= (o.pos_tx, o.pos_seq), false)
  on conflict do nothing;
  update klieo.deliveries set tx = '3';
  update klieo.messages set tx = '3';
  update klieo.consumer_offsets set lo = pg_current_snapshot(), hi = null, pos_tx = '0', pos_seq = 0;
  update klieo.kv_entries set tx = '3';
  truncate klieo.kv_changes, klieo.kv_horizons;
  return true;
end
$$;
comment on function klieo.rebase() is
  'Makes the log of a restored database deliverable again: nothing acknowledged comes back, nothing undelivered is lost. Answers whether it was needed.';
