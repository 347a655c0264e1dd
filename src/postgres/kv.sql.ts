/** The statements of the key-value store and its leases. Whatever may run in a caller's transaction takes and answers text. */

/** $1 buckets, $2 keys, $3 how many bytes. A row for each key that is there; a null value: ask again, there was too much. */
export const GET = `
  select n, value, revision, extract(epoch from updated_at) * 1000 as updated_at_ms
  from klieo.kv_get_many($1::text::text[], $2::text::text[], $3)`

const WRITE_PARAMETERS = `$1::text::text[], $2::text::text[], $3::bytea, $4::text::int[], $5::text::int[], $6::text::bigint[], $7::text::bigint[], $8::text::int[]`

/**
 * $1 buckets, $2 keys, $3 values, $4 starts, $5 lengths (null: a deletion), $6 expected revisions (0: absent, null: anything),
 * $7 ttls in ms or null, $8 ends of rounds or null. Answers a revision for each (null: lost), and for what lost the revision now.
 */
export const WRITE = `
  select w.revisions::text as revisions, w.actuals::text as actuals, pg_current_xact_id_if_assigned()::text as tx
  from klieo.kv_write(${WRITE_PARAMETERS}) w`

/** The same; fails with 55P03 rather than wait for somebody's open transaction. */
export const WRITE_SOON = `
  select w.revisions::text as revisions, w.actuals::text as actuals
  from klieo.kv_write_soon(${WRITE_PARAMETERS}) w`

/** $1 bucket, $2 pattern or null, $3 after this key, $4 how many */
export const KEYS = `
  select e.key
  from klieo.kv_entries e
  where e.bucket = $1
    and e.key > $3
    and e.value is not null
    and (e.expires_at is null or e.expires_at > (select clock_timestamp()) or klieo.dedup_lives(e.bucket, e.value))
    and ($2::text is null or e.key ~ (select klieo.filter_pattern($2)))
  order by e.key
  limit $4`

/**
 * The snapshot up to which a watch has read is kept by the client alone. What it took for ended must be so after a crash, too,
 * or its transaction ids would be given out again and taken for seen: where anything is unflushed, a record of our own makes
 * this transaction wait for the disk. After a failover to a standby that lacks the end of the log, which is another timeline, no
 * flush has helped.
 */
export const WATCH_SNAPSHOT = `
  select pg_current_snapshot()::text as snapshot, left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) as timeline,
    case when pg_current_wal_flush_lsn() < pg_current_wal_insert_lsn() then pg_logical_emit_message(true, 'klieo', '')::text end as flushed`

/**
 * Present entries as of a snapshot: what a later transaction wrote comes among the changes, and is left out here. Of what was
 * found only so many bytes of values are answered, and one value at the least.
 * $1 bucket, $2 filter or null, $3 after this key, $4 how many, $5 snapshot, $6 how many bytes
 */
export const WATCH_ENTRIES = `
  select p.key, p.value, p.revision, p.updated_at_ms, p.found
  from (
    select e.*, count(*) over () as found, sum(octet_length(e.value)) over (order by e.key rows unbounded preceding) as bytes
    from (
      select e.key, e.value, e.revision, extract(epoch from e.updated_at) * 1000 as updated_at_ms
      from klieo.kv_entries e
      where e.bucket = $1
        and e.key > $3
        and e.value is not null
        and (e.expires_at is null or e.expires_at > (select clock_timestamp()) or klieo.dedup_lives(e.bucket, e.value))
        and ($2::text is null or e.key ~ (select klieo.filter_pattern($2)))
        -- An xid beyond the present one is from the cluster that a restored dump came from.
        and (pg_visible_in_snapshot(e.tx, $5::pg_snapshot) or e.tx >= pg_snapshot_xmax(pg_current_snapshot()))
      order by e.key
      limit $4
    ) e
  ) p
  where p.bytes - octet_length(p.value) < $6
  order by p.key`

/**
 * A page of the window between two snapshots (two arms, so that each starts from the index; docs/adr/0001-log.md), in the order of the revisions. A key's revisions grow in commit order, so
 * that order over a window, and windows one after the other, keep it. Bytes as above.
 * $1 bucket, $2 filter or null, $3 old snapshot, $4 new snapshot, $5 after this revision, $6 how many, $7 how many bytes
 */
export const WATCH_CHANGES = `
  select p.key, p.value, p.revision, p.updated_at_ms, p.found
  from (
    select c.*, count(*) over () as found, sum(coalesce(octet_length(c.value), 0)) over (order by c.revision rows unbounded preceding) as bytes
    from (
      select u.key, u.value, u.revision, extract(epoch from u.changed_at) * 1000 as updated_at_ms
      from (
        (
          select s.key, s.value, s.revision, s.changed_at
          from klieo.kv_changes s
          where s.tx = any (array(select x.tx from pg_snapshot_xip($3::pg_snapshot) as x(tx) where pg_visible_in_snapshot(x.tx, $4::pg_snapshot)))
            and s.bucket = $1
            and s.revision > $5
            and ($2::text is null or s.key ~ (select klieo.filter_pattern($2)))
        )
        union all
        (
          select n.key, n.value, n.revision, n.changed_at
          from klieo.kv_changes n
          where n.tx >= pg_snapshot_xmax($3::pg_snapshot)
            and n.tx < pg_snapshot_xmax($4::pg_snapshot)
            and pg_visible_in_snapshot(n.tx, $4::pg_snapshot)
            and n.bucket = $1
            and n.revision > $5
            and ($2::text is null or n.key ~ (select klieo.filter_pattern($2)))
        )
      ) u
      order by u.revision
      limit $6
    ) c
  ) p
  where p.bytes - coalesce(octet_length(p.value), 0) < $7
  order by p.revision`

/**
 * Grants a lease that nobody holds. Where it is held, a look without a lock: those who wait write nothing. The fence and
 * the expiry are set after the row is locked.
 * $1 bucket, $2 key, $3 token, $4 holder, $5 ttl in ms
 */
export const LEASE = `
  insert into klieo.kv_leases as l (bucket, key, fence, token, holder, expires_at)
  select $1, $2, nextval('klieo.lease_fence'), $3::uuid, $4, clock_timestamp() + make_interval(secs => $5::double precision / 1000)
  where not exists (select from klieo.kv_leases h where h.bucket = $1 and h.key = $2 and h.expires_at > clock_timestamp())
  on conflict (bucket, key) do update
    set fence = nextval('klieo.lease_fence'), token = excluded.token, holder = excluded.holder,
      expires_at = clock_timestamp() + make_interval(secs => $5::double precision / 1000)
    where l.expires_at <= clock_timestamp()
  returning l.fence, extract(epoch from l.expires_at) * 1000 as expires_at_ms`

/** How long the holder still has, in ms; no row: nobody holds it. */
export const LEASE_LEFT = `
  select extract(epoch from expires_at - clock_timestamp()) * 1000 as left_ms
  from klieo.kv_leases
  where bucket = $1 and key = $2 and expires_at > clock_timestamp()`

/** Locked first, so that the expiry is looked at after a wait. $1 bucket, $2 key, $3 token, $4 ttl in ms */
export const LEASE_HEARTBEAT = `
  with mine as materialized (
    select l.bucket, l.key from klieo.kv_leases l where l.bucket = $1 and l.key = $2 and l.token = $3::uuid for no key update
  )
  update klieo.kv_leases l
  set expires_at = clock_timestamp() + make_interval(secs => $4::double precision / 1000)
  from mine
  where l.bucket = mine.bucket and l.key = mine.key and l.expires_at > clock_timestamp()
  returning extract(epoch from l.expires_at) * 1000 as expires_at_ms`

/** The row stays, so that the fence grows for ever. */
export const LEASE_RELEASE = `
  update klieo.kv_leases set expires_at = '-infinity' where bucket = $1 and key = $2 and token = $3::uuid`
