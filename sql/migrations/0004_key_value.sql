-- klieo-bus, functions: the key-value store. Deleted keys stay as tombstones for a week: a revision drawn before the deletion
-- must not come back after it.

create function klieo.dedup_lives(bucket text, value bytea) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off as $$
  select left(bucket, 6) = 'dedup.' and exists (
    select from klieo.jobs j where j.id = convert_from(value, 'UTF8')::bigint and j.died_at is null
  )
$$;
comment on function klieo.dedup_lives(text, bytea) is 'Whether an idempotency record is kept alive by its job.';

create function klieo.kv_get_many(buckets text[], keys text[], max_bytes bigint)
returns table (n bigint, value bytea, revision bigint, updated_at timestamptz)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set plan_cache_mode = force_generic_plan
set jit = off as $$
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
$$;
comment on function klieo.kv_get_many(text[], text[], bigint) is
  'The entries of keys, by their positions; no row while one is absent. Once the values before it come to max_bytes, an entry is answered without its value: ask for it again.';

create function klieo.kv_get(bucket text, key text)
returns table (value bytea, revision bigint, updated_at timestamptz)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
  return query
    select g.value, g.revision, g.updated_at from klieo.kv_get_many(array[kv_get.bucket], array[kv_get.key], 1) g;
end
$$;
comment on function klieo.kv_get(text, text) is 'The entry of a key; no row while it is absent.';

-- The one place where keys are written, for one write as for many. Each write has a bucket, a key, a value (without a length: a
-- deletion) and what the key is expected to be: at a revision, absent (0) or anything (null). The result is as if they were made
-- one after the other: several writes of a key are in several rounds, and the keys of a round are in one order everywhere, so
-- that two calls do not deadlock.
--
-- The revision is drawn in the update, so after the row is locked: a key's revisions grow in commit order. Drawn in the
-- insert it may be from before a wait; then the insert turns into the update and draws again. So is the expiry.
--
-- Generic plans: for one made anew each time, because it knows how long the arrays are, a single write would cost twice as much.
create function klieo.kv_write(
  buckets text[], keys text[], payload bytea, starts int[], lengths int[], expected bigint[], ttls_ms bigint[], round_ends int[],
  out revisions bigint[], out actuals bigint[])
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set plan_cache_mode = force_generic_plan
set jit = off as $$
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
$$;
comment on function klieo.kv_write(text[], text[], bytea, int[], int[], bigint[], bigint[], int[]) is
  'Writes and deletes keys, in rounds that end where round_ends says (null: one round). Answers for each write its revision, or null if it lost and, where the key is there, its revision now. Checks nothing but what the tables check.';

create function klieo.kv_write_soon(
  buckets text[], keys text[], payload bytea, starts int[], lengths int[], expected bigint[], ttls_ms bigint[], round_ends int[],
  out revisions bigint[], out actuals bigint[])
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '20ms' as $$
begin
  select w.revisions, w.actuals into revisions, actuals
  from klieo.kv_write(kv_write_soon.buckets, kv_write_soon.keys, kv_write_soon.payload, kv_write_soon.starts, kv_write_soon.lengths,
    kv_write_soon.expected, kv_write_soon.ttls_ms, kv_write_soon.round_ends) w;
end
$$;
comment on function klieo.kv_write_soon(text[], text[], bytea, int[], int[], bigint[], bigint[], int[]) is
  'The same, but fails with 55P03 and writes nothing where one of the keys is locked for more than an instant: nobody else waits along.';

create function klieo.kv_put(bucket text, key text, value bytea, ttl_ms bigint default null) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
begin
  perform klieo.check_key(kv_put.bucket, kv_put.key, true);
  perform klieo.check_payload('value', kv_put.value);
  return (
    select w.revisions[1]
    from klieo.kv_write(array[kv_put.bucket], array[kv_put.key], kv_put.value, array[1], array[octet_length(kv_put.value)], array[null::bigint], array[kv_put.ttl_ms], null) w
  );
end
$$;
comment on function klieo.kv_put(text, text, bytea, bigint) is 'Writes a key, absent again after ttl_ms; answers the new revision.';

create function klieo.kv_cas(bucket text, key text, value bytea, expected bigint, ttl_ms bigint default null) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
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
$$;
comment on function klieo.kv_cas(text, text, bytea, bigint, bigint) is
  'Writes a key only while it is at the expected revision (null: absent); answers the new revision, or null if it lost.';

create function klieo.kv_delete(bucket text, key text, expected bigint default null) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
begin
  perform klieo.check_key(kv_delete.bucket, kv_delete.key, false);
  return (
    select w.revisions[1]
    from klieo.kv_write(array[kv_delete.bucket], array[kv_delete.key], null, array[null::int], array[null::int], array[kv_delete.expected], array[null::bigint], null) w
  );
end
$$;
comment on function klieo.kv_delete(text, text, bigint) is
  'Deletes a key, if expected is given only while it is at that revision; answers the revision of the deletion, or null if there was nothing to delete.';

create function klieo.kv_expire(max_entries int) returns table (bucket text, count int)
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
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

-- ---------------------------------------------------------------- listing and watching

create function klieo.kv_keys(bucket text, filter text, after_key text, max_keys int) returns setof text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.kv_keys(text, text, text, int) is 'The keys of a bucket that match the filter (null: all), in order, from after a key on.';

-- What a later transaction wrote comes among the changes, and is left out here. Of what was found only so many bytes of values are
-- answered, and one value at the least.
create function klieo.kv_entries_at(bucket text, filter text, after_key text, max_keys int, at_snapshot pg_snapshot, max_bytes bigint)
returns table (key text, value bytea, revision bigint, updated_at timestamptz, found bigint)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.kv_entries_at(text, text, text, int, pg_snapshot, bigint) is
  'The entries of a bucket that a snapshot sees and that are there still, in the order of their keys, from after a key on, with about max_bytes of values; found says how many there are up to max_keys.';

-- Two arms, so that each starts from the index (docs/adr/0001-log.md). A key's revisions grow in commit order, so that the order of
-- revisions over a window, and windows one after the other, keep it. Bytes as above.
create function klieo.kv_changes_between(
  bucket text, filter text, lo pg_snapshot, hi pg_snapshot, after_revision bigint, max_changes int, max_bytes bigint)
returns table (key text, value bytea, revision bigint, updated_at timestamptz, found bigint)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.kv_changes_between(text, text, pg_snapshot, pg_snapshot, bigint, int, bigint) is
  'The changes of a bucket that hi sees and lo does not, in the order of their revisions, from after a revision on, with about max_bytes of values; found says how many there are up to max_changes.';

-- ---------------------------------------------------------------- leases

-- Where it is held, a look without a lock: those who wait write nothing. The fence and the expiry are set after the row is locked.
create function klieo.grant_lease(bucket text, key text, token uuid, holder text, ttl_ms double precision)
returns table (fence bigint, expires_at timestamptz)
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.grant_lease(text, text, uuid, text, double precision) is 'Grants a lease that nobody holds, in any bucket; no row: somebody does.';

create function klieo.take_lease(bucket text, key text, token uuid, holder text, ttl_ms double precision)
returns table (fence bigint, expires_at timestamptz)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform klieo.check_key(take_lease.bucket, take_lease.key, true);
  return query
    select g.fence, g.expires_at
    from klieo.grant_lease(take_lease.bucket, take_lease.key, take_lease.token, take_lease.holder, take_lease.ttl_ms) g;
end
$$;
comment on function klieo.take_lease(text, text, uuid, text, double precision) is
  'Grants a lease that nobody holds to the bearer of a token; no row: somebody does.';

create function klieo.lease_left(bucket text, key text) returns double precision
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
  return (
    select extract(epoch from l.expires_at - clock_timestamp()) * 1000
    from klieo.kv_leases l
    where l.bucket = lease_left.bucket and l.key = lease_left.key and l.expires_at > clock_timestamp()
  );
end
$$;
comment on function klieo.lease_left(text, text) is 'How long the holder of a lease still has, in ms; null: nobody holds it.';

-- Locked first, so that the expiry is looked at after a wait.
create function klieo.extend_lease(bucket text, key text, token uuid, ttl_ms double precision) returns timestamptz
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set plan_cache_mode = force_generic_plan as $$
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
$$;
comment on function klieo.extend_lease(text, text, uuid, double precision) is 'Extends a lease of the token''s bearer; answers its end, or null when it is lost.';

-- The row stays, so that the fence grows for ever.
create function klieo.release_lease(bucket text, key text, token uuid) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
  update klieo.kv_leases l
  set expires_at = '-infinity'
  where l.bucket = release_lease.bucket and l.key = release_lease.key and l.token = release_lease.token;
end
$$;
comment on function klieo.release_lease(text, text, uuid) is 'Ends a lease of the token''s bearer.';
