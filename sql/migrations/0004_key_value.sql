-- klieo-bus, functions: the key-value store. Deleted keys stay as tombstones for a week: a revision drawn before the deletion
-- must not come back after it.

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
    -- Locked first, so that the expiry is looked at after a wait; where it is lost already, nothing is locked.
    perform from klieo.kv_entries e
    where e.bucket = kv_cas.bucket and e.key = kv_cas.key and e.revision = kv_cas.expected and e.value is not null
    for no key update;
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
  perform from klieo.kv_entries e
  where e.bucket = kv_delete.bucket and e.key = kv_delete.key and e.value is not null and (kv_delete.expected is null or e.revision = kv_delete.expected)
  for no key update;
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
