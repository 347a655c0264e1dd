/** The log and the cursor that reads it. */

import type { Mutant } from '../mutant.ts'

const SQL = 'sql/migrations/0003_publish_subscribe.sql'
const UPKEEP = 'sql/migrations/0006_upkeep.sql'
const INTERLEAVINGS = 'test/postgres/log-interleavings.test.ts'
const LOG = 'test/postgres/log.test.ts'
const RETENTION = 'test/postgres/retention.test.ts'
const POSTGRES = 'test/conformance/postgres.test.ts'

export const logMutants: readonly Mutant[] = [
  {
    id: 'cursor-by-position',
    rule: 'P9',
    guarantee: 'no message is skipped, in whatever order transactions commit',
    broken: 'a fetch reads what began after the last one, and passes over what was still running then',
    edits: [
      {
        file: SQL,
        find: 'where m.tx = any (array(select x.tx from pg_snapshot_xip(c.lo) as x(tx) where pg_visible_in_snapshot(x.tx, c.hi)))',
        replace: 'where false',
      },
    ],
    files: [LOG],
    caughtBy: [
      'P9 a message that commits after a later one was read is delivered',
      'P9 the same where the later transaction commits first',
    ],
    beside: ['P1 what is rolled back is never delivered'],
  },
  {
    id: 'cursor-at-oldest-open-transaction',
    rule: 'P9',
    guarantee: 'an open transaction, of anyone in the cluster, holds back only its own messages',
    broken: 'a fetch reads only what is below the oldest transaction that is open',
    edits: [
      {
        file: SQL,
        find: 'then\n    return v_now;',
        replace: `then\n    return format('%s:%s:', pg_snapshot_xmin(v_now), pg_snapshot_xmin(v_now))::pg_snapshot;`,
      },
    ],
    files: [LOG],
    caughtBy: ['P9 a write transaction open in another database delays nothing'],
    beside: ['P11 another filter is refused with conflict'],
  },
  {
    id: 'snapshot-before-lock',
    rule: 'P3',
    guarantee: 'a message goes to one member of its durable at a time',
    broken: 'the cursor is moved to a snapshot from before its row was locked',
    edits: [{ file: SQL, find: `select klieo.cursor_snapshot(), '0', 0 into c.hi`, replace: `select v_hi, '0', 0 into c.hi` }],
    files: [INTERLEAVINGS],
    caughtBy: ['P3 one that waits for the other’s lock'],
    beside: ['P9 it is refused under a snapshot that stands still'],
  },
  {
    id: 'fetch-in-writing-transaction',
    rule: 'J7',
    guarantee: 'no fetch runs in a transaction that has written',
    broken: 'the fetch does not look whether its transaction has written',
    edits: [{ file: SQL, find: 'if pg_current_xact_id_if_assigned() is not null then', replace: 'if false then' }],
    files: [INTERLEAVINGS],
    caughtBy: ['J7 it is refused once the transaction has written'],
    beside: ['P9 it is refused under a snapshot that stands still'],
  },
  {
    id: 'own-transaction-counts-as-ended',
    rule: 'P9',
    guarantee: 'what a transaction publishes after it has fetched is delivered',
    broken: 'the fetching transaction is not among the running ones of its own snapshot',
    edits: [{ file: SQL, find: 'if v_own is null or v_own >= pg_snapshot_xmax(v_now) then', replace: 'if true then' }],
    files: [INTERLEAVINGS],
    caughtBy: ['P9 what a transaction publishes after it fetched is delivered'],
    beside: ['P3 one that waits for the other’s lock'],
  },
  {
    id: 'fetch-under-frozen-snapshot',
    rule: 'P9',
    guarantee: 'no cursor is moved under a snapshot that stands still',
    broken: 'a fetch runs in REPEATABLE READ, too',
    edits: [
      {
        file: SQL,
        find: `if current_setting('transaction_isolation') <> 'read committed' then`,
        replace: 'if false then',
      },
    ],
    files: [INTERLEAVINGS],
    caughtBy: ['P9 it is refused under a snapshot that stands still'],
    beside: ['P3 one that waits for the other’s lock'],
  },
  {
    id: 'window-widens',
    rule: 'P9',
    guarantee: 'no message is skipped, in whatever order transactions commit',
    broken: 'a window that is read page by page is closed with a snapshot taken at its last page',
    edits: [
      {
        file: SQL,
        find: 'c.lo := c.hi;\n        c.hi := null;',
        replace: 'c.lo := klieo.cursor_snapshot();\n        c.hi := null;',
      },
    ],
    files: [INTERLEAVINGS],
    caughtBy: ['P9 a window that is read page by page is not widened'],
    beside: ['P3 one that waits behind a fetch that fails'],
  },
  {
    id: 'publish-order-lost',
    rule: 'P8',
    guarantee: 'what one call publishes is handed out in its order',
    broken: 'the messages of a batch are stored in the opposite order',
    edits: [
      {
        file: SQL,
        find: 'order by i.n\n        returning m.seq',
        replace: 'order by i.n desc\n        returning m.seq',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['P8 a publishMany keeps its order'],
    beside: ['P8 messages published one after the other come in that order'],
  },
  {
    id: 'message-id-ignored',
    rule: 'P12',
    guarantee: 'a second publish with the same msgId stores nothing and answers the first seq',
    broken: 'an id that is taken is taken over',
    edits: [
      {
        file: SQL,
        find: 'set seq = excluded.seq, expires_at = excluded.expires_at\n      where d.expires_at <= clock_timestamp()',
        replace: 'set seq = excluded.seq, expires_at = excluded.expires_at',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['P12 a second publish with the same msgId', 'P12 of concurrent publishes with one msgId one is stored'],
    beside: ['P8 messages published one after the other come in that order'],
  },
  {
    id: 'message-id-for-ever',
    rule: 'P12',
    guarantee: 'a msgId is remembered for two minutes, and then free again',
    broken: 'an id never runs out',
    edits: [
      {
        file: SQL,
        find: 'where d.expires_at <= clock_timestamp()\n    returning d.seq',
        replace: 'where false\n    returning d.seq',
      },
    ],
    files: ['test/postgres/windows.test.ts'],
    caughtBy: ['P12 a msgId is free again once its two minutes are over'],
    beside: ['J5 the record of a job that is done is over after a day'],
  },
  {
    id: 'message-id-window-prolonged',
    rule: 'P12',
    guarantee: 'the duplicate window begins with the first publish',
    broken: 'each duplicate begins the two minutes anew',
    edits: [
      {
        file: SQL,
        find: 'set seq = excluded.seq, expires_at = excluded.expires_at\n      where d.expires_at <= clock_timestamp()\n    returning d.seq',
        replace:
          'set seq = case when d.expires_at <= clock_timestamp() then excluded.seq else d.seq end, expires_at = excluded.expires_at\n    returning d.seq',
      },
    ],
    files: ['test/postgres/windows.test.ts'],
    caughtBy: ['P12 a duplicate does not prolong the two minutes'],
    beside: ['J5 the record of a job that is done is over after a day'],
  },
  {
    id: 'retention-by-age',
    rule: 'P13',
    guarantee: 'a message is removed when every durable has been past it; never a late commit that one has not yet seen',
    broken: 'what is old enough goes',
    edits: [
      { file: UPKEEP, find: 'where (m.tx, m.seq) > (v_tx, v_seq) and m.tx < v_bound', replace: 'where (m.tx, m.seq) > (v_tx, v_seq)' },
    ],
    files: [RETENTION],
    caughtBy: ['P13 a straggler that commits while old messages are removed', 'P13 a message stays while any durable has not been past it'],
    beside: ['P13 a message in flight stays until it is settled'],
  },
  {
    id: 'retention-forgets-in-flight',
    rule: 'P13',
    guarantee: 'a message in flight is not removed',
    broken: 'what every durable has been handed goes, settled or not',
    edits: [{ file: UPKEEP, find: '\n      and m.seq <> all (v_held)', replace: '' }],
    files: [RETENTION],
    caughtBy: ['P13 a message in flight stays until it is settled'],
    beside: ['P13 a page that is open keeps what it has not handed out yet'],
  },
  {
    id: 'durable-made-beside-pruning',
    rule: 'P13',
    guarantee: 'a durable that begins with everything is handed everything that is there',
    broken: 'a durable is made while messages are being removed',
    edits: [{ file: SQL, find: 'perform pg_advisory_xact_lock_shared(klieo.creation_lock());', replace: '' }],
    files: ['test/postgres/interleavings.test.ts'],
    caughtBy: ['P13 a durable that is made while messages are being pruned'],
    beside: ['P9 a process connects while a publishing transaction is open'],
  },
  {
    id: 'rebase-skipped',
    rule: 'P9',
    guarantee: 'a database restored from a dump is repaired before anything is published',
    broken: 'connecting does not look whether the database was restored, and a fetch that notices repairs nothing',
    edits: [
      {
        file: 'src/postgres/database.ts',
        find: `[], 'connect')\n    if (row?.restored) await this.repair()`,
        replace: `[], 'connect')\n    if (row === undefined) await this.repair()`,
      },
      {
        file: 'src/postgres/database.ts',
        find: `if (state === 'KB004') {\n      await this.repair()`,
        replace: `if (state === 'KB004') {`,
      },
    ],
    files: ['test/postgres/restore.test.ts'],
    caughtBy: ['P4 P9 what was acked stays so, what was in flight comes again'],
    beside: ['P9 so it does before it publishes in a transaction of the caller’s'],
  },
]
