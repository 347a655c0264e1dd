/** The key-value store, its watches and its leases. */

import type { Mutant } from '../mutant.ts'

const SQL = 'sql/migrations/0004_key_value.sql'
const POSTGRES = 'test/conformance/postgres.test.ts'
const RACES = 'test/postgres/kv-races.test.ts'
const LEASES = 'test/postgres/leases.test.ts'

export const keyMutants: readonly Mutant[] = [
  {
    id: 'hard-delete',
    rule: 'K1',
    guarantee: 'a key’s revisions grow in commit order, across deletions and new beginnings',
    broken: 'a deleted key leaves no tombstone',
    edits: [
      {
        file: SQL,
        find: '    v_from := v_to + 1;\n',
        replace: '    delete from klieo.kv_entries e where e.key = any(kv_write.keys) and e.value is null;\n    v_from := v_to + 1;\n',
      },
    ],
    files: [RACES],
    caughtBy: ['K1 a put that waited behind a deletion is later than it'],
    beside: ['K1 a put that waited behind a lock'],
  },
  {
    id: 'revision-before-lock',
    rule: 'K1',
    guarantee: 'a key’s revisions grow in commit order',
    broken: 'the revision is drawn before the row is locked',
    edits: [
      {
        file: SQL,
        find: `set tx = pg_current_xact_id(), revision = nextval('klieo.kv_revision'), updated_at = clock_timestamp(), value = excluded.value,`,
        replace: 'set tx = pg_current_xact_id(), revision = excluded.revision, updated_at = clock_timestamp(), value = excluded.value,',
      },
    ],
    files: [RACES],
    caughtBy: ['K1 a put that waited behind a lock'],
    beside: ['K2 the winner of a race for an absent key rolls back'],
  },
  {
    id: 'cas-ignores-expected',
    rule: 'K2',
    guarantee: 'a cas succeeds only while the key is at the expected revision',
    broken: 'it succeeds while the key is there',
    edits: [
      {
        file: SQL,
        find: 'e.value is not null and (i.expected is null or e.revision = i.expected)\n          for no key update',
        replace: 'e.value is not null\n          for no key update',
      },
      {
        file: SQL,
        find: '\n            and (i.expected is null or e.revision = i.expected)\n          returning',
        replace: '\n          returning',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['K2 cas with a revision succeeds only while the key is at it'],
    beside: ['K2 cas with null succeeds only while the key is absent'],
  },
  {
    id: 'cas-null-overwrites',
    rule: 'K2',
    guarantee: 'cas with null succeeds only while the key is absent',
    broken: 'it succeeds in any case',
    edits: [
      {
        file: SQL,
        find: '            where not v_creating or e.value is null or e.expires_at <= clock_timestamp()\n',
        replace: '',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['K2 cas with null succeeds only while the key is absent'],
    beside: ['K2 cas with a revision succeeds only while the key is at it'],
  },
  {
    id: 'expiry-looked-at-before-wait',
    rule: 'K2',
    guarantee: 'an entry that runs out while a cas waits for it is absent to that cas',
    broken: 'what counts is the moment at which the wait began',
    edits: [
      {
        file: SQL,
        find: 'and (e.expires_at is null or e.expires_at > clock_timestamp() or (i.length is null',
        replace: 'and (e.expires_at is null or e.expires_at > statement_timestamp() or (i.length is null',
      },
    ],
    files: [RACES],
    caughtBy: ['K2 an entry that runs out while the cas waits for its row is absent to it'],
    beside: ['K1 K2 an expectation from before a deletion never fits again'],
  },
  {
    id: 'ttl-ignored',
    rule: 'K2',
    guarantee: 'an expired key is absent',
    broken: 'it is there until somebody removes it',
    edits: [
      {
        file: SQL,
        find: 'and (x.expires_at is null or x.expires_at > clock_timestamp() or klieo.dedup_lives(x.bucket, x.value))\n',
        replace: '\n',
      },
      {
        file: SQL,
        find: 'limit kv_expire.max_entries\n      for no key update skip locked',
        replace: 'limit 0\n      for no key update skip locked',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['K2 an entry is absent once its ttl is over', 'K2 an expired key is absent'],
    beside: ['K4 get answers what was put'],
  },
  {
    id: 'write-outside-transaction',
    rule: 'K1',
    guarantee: 'a write with tx is seen once that transaction commits',
    broken: 'it is made on a connection of the bus',
    edits: [
      {
        file: 'src/postgres/kv-writes.ts',
        find: 'this.#context.db.queryIn<WrittenRow>(tx, WRITE, ',
        replace: 'this.#context.db.query<WrittenRow>(WRITE, ',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['K1 put, cas and delete with tx are seen once that transaction commits'],
    beside: ['K2 a lost cas does not abort the transaction'],
  },
  {
    id: 'watch-by-position',
    rule: 'K6',
    guarantee: 'a watch skips no change, in whatever order transactions commit',
    broken: 'it passes over what was running when it looked last',
    edits: [
      {
        file: SQL,
        find: `where s.tx = any (array(
                select x.tx from pg_snapshot_xip(kv_changes_between.lo) as x(tx) where pg_visible_in_snapshot(x.tx, kv_changes_between.hi)))`,
        replace: 'where false',
      },
    ],
    files: [RACES],
    caughtBy: ['K6 a transaction that began before the watch and commits after it is a change'],
    beside: ['K2 the winner of a race for an absent key rolls back'],
  },
  {
    id: 'watch-begins-twice',
    rule: 'K6',
    guarantee: 'a watch yields the present entries, and then every change, none of them twice',
    broken: 'the entries are read as they are, and not as of the snapshot from which the changes are read',
    edits: [
      {
        file: SQL,
        find: '          and (pg_visible_in_snapshot(e.tx, kv_entries_at.at_snapshot) or e.tx >= pg_snapshot_xmax(pg_current_snapshot()))\n',
        replace: '',
      },
    ],
    files: [RACES],
    caughtBy: ['K6 what is written between the snapshot of a watch and its entries is seen once'],
    beside: ['K6 a transaction that began before the watch and commits after it is a change'],
  },
  {
    id: 'changes-pruned-by-age',
    rule: 'K6',
    guarantee: 'a change reaches every open watch, however long its transaction was open',
    broken: 'changes are removed ten minutes after they were made, not after they could be seen',
    edits: [
      {
        file: 'sql/migrations/0006_upkeep.sql',
        find: 'where c.tx < v_bound\n',
        replace: `where c.changed_at < clock_timestamp() - interval '10 minutes'\n`,
      },
    ],
    files: ['test/postgres/interleavings.test.ts'],
    caughtBy: ['K6 a change whose transaction was open for longer than changes are kept'],
    beside: ['P9 a process connects while a publishing transaction is open'],
  },
  {
    id: 'fence-does-not-grow',
    rule: 'K5',
    guarantee: 'the fence of a lease grows with every grant',
    broken: 'the next holder gets the fence of the one before',
    edits: [{ file: SQL, find: `set fence = nextval('klieo.lease_fence'), token`, replace: 'set fence = l.fence, token' }],
    files: [POSTGRES],
    caughtBy: ['K5 the fence grows through release, expiry and whatever happens to the value'],
    beside: ['K5 while a lease is live another one is refused'],
  },
  {
    id: 'fence-restarts-at-release',
    rule: 'K5',
    guarantee: 'the fence of a lease grows for ever',
    broken: 'it counts in the row of the lease, which a release removes',
    edits: [
      {
        file: SQL,
        find: `grant_lease.key, nextval('klieo.lease_fence'), grant_lease.token`,
        replace: 'grant_lease.key, 1, grant_lease.token',
      },
      { file: SQL, find: `set fence = nextval('klieo.lease_fence'), token`, replace: 'set fence = l.fence + 1, token' },
      {
        file: SQL,
        find: `update klieo.kv_leases l\n  set expires_at = '-infinity'\n`,
        replace: 'delete from klieo.kv_leases l\n',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['K5 the fence grows through release, expiry and whatever happens to the value'],
    beside: ['K5 release frees the key at once'],
  },
  {
    id: 'lease-shared',
    rule: 'K5',
    guarantee: 'a lease is exclusive',
    broken: 'a grant does not look whether the lease is held',
    edits: [
      {
        file: SQL,
        find: `    where not exists (
      select from klieo.kv_leases h where h.bucket = grant_lease.bucket and h.key = grant_lease.key and h.expires_at > clock_timestamp()
    )
`,
        replace: '',
      },
      { file: SQL, find: '\n      where l.expires_at <= clock_timestamp()\n    returning l.fence', replace: '\n    returning l.fence' },
    ],
    files: [POSTGRES],
    caughtBy: ['K5 while a lease is live another one is refused', 'K5 of any number of concurrent acquirers one gets it'],
    beside: ['K4 get answers what was put'],
  },
  {
    id: 'lease-expiry-not-strict',
    rule: 'K5',
    guarantee: 'after its expiry a heartbeat is refused, even if nobody took the lease',
    broken: 'whoever held it last may take it up again',
    edits: [
      {
        file: SQL,
        find: 'and l.key = extend_lease.key and l.expires_at > clock_timestamp()',
        replace: 'and l.key = extend_lease.key',
      },
    ],
    files: [LEASES],
    caughtBy: ['K5 it is strict: after it the heartbeat is refused although nobody took the lease'],
    beside: ['K5 a grant that waits for another grant that is rolled back gets the key'],
  },
  {
    id: 'lease-expiry-before-wait',
    rule: 'K5',
    guarantee: 'expiry is strict: what counts is the moment at which the heartbeat is granted',
    broken: 'the expiry is looked at before the row is waited for',
    edits: [
      {
        file: SQL,
        find: 'and l.token = extend_lease.token\n  for no key update',
        replace: 'and l.token = extend_lease.token',
      },
    ],
    files: [LEASES],
    caughtBy: ['K5 a heartbeat that waited for the row until the lease was over is refused'],
    beside: ['K5 it is strict: after it the heartbeat is refused although nobody took the lease'],
  },
  {
    id: 'lease-release-unfenced',
    rule: 'K5',
    guarantee: 'releasing a lost lease does nothing to the new holder',
    broken: 'a release does not compare the token',
    edits: [
      {
        file: SQL,
        find: 'and l.key = release_lease.key and l.token = release_lease.token',
        replace: 'and l.key = release_lease.key',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['K5 a lost lease can do nothing to the new holder'],
    beside: ['K5 release frees the key at once'],
  },
]
