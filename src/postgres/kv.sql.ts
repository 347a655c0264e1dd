/** The statements of the key-value store and its leases. Whatever may run in a caller's transaction takes and answers text. */

/** $1 buckets, $2 keys, $3 how many bytes. A row for each key that is there; a null value: ask again, there was too much. */
export const GET = `
  select n, value, revision, extract(epoch from updated_at) * 1000::numeric as updated_at_ms
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

/** $1 bucket, $2 filter or null, $3 after this key, $4 how many */
export const KEYS = `select key from klieo.kv_keys($1, $2, $3, $4) as key`

/**
 * The snapshot up to which a watch has read is kept by the client alone. What it took for ended must be so after a crash, too,
 * or its transaction ids would be given out again and taken for seen: where anything is unflushed, a record of our own makes
 * this transaction wait for the disk. After a failover to a standby that lacks the end of the log, which is another timeline, no
 * flush has helped.
 */
export const WATCH_SNAPSHOT = `
  select pg_current_snapshot()::text as snapshot, left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) as timeline,
    case when pg_current_wal_flush_lsn() < pg_current_wal_insert_lsn() then pg_logical_emit_message(true, 'klieo', '')::text end as flushed`

/** Present entries as of a snapshot. $1 bucket, $2 filter or null, $3 after this key, $4 how many, $5 snapshot, $6 how many bytes */
export const WATCH_ENTRIES = `
  select key, value, revision, extract(epoch from updated_at) * 1000::numeric as updated_at_ms, found
  from klieo.kv_entries_at($1, $2, $3, $4, $5::text::pg_snapshot, $6)`

/**
 * A page of the window between two snapshots. $1 bucket, $2 filter or null, $3 old snapshot, $4 new snapshot, $5 after this revision,
 * $6 how many, $7 how many bytes
 */
export const WATCH_CHANGES = `
  select key, value, revision, extract(epoch from updated_at) * 1000::numeric as updated_at_ms, found
  from klieo.kv_changes_between($1, $2, $3::text::pg_snapshot, $4::text::pg_snapshot, $5, $6, $7)`

/** Grants a lease that nobody holds. $1 bucket, $2 key, $3 token, $4 holder, $5 ttl in ms */
export const LEASE = `
  select fence, extract(epoch from expires_at) * 1000::numeric as expires_at_ms
  from klieo.take_lease($1, $2, $3::text::uuid, $4, $5)`

/** How long the holder still has, in ms; null: nobody holds it. */
export const LEASE_LEFT = `select klieo.lease_left($1, $2) as left_ms`

/** Null: it is lost. $1 bucket, $2 key, $3 token, $4 ttl in ms */
export const LEASE_HEARTBEAT = `
  select extract(epoch from klieo.extend_lease($1, $2, $3::text::uuid, $4)) * 1000::numeric as expires_at_ms`

export const LEASE_RELEASE = `select klieo.release_lease($1, $2, $3::text::uuid)`
