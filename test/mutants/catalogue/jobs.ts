/** Jobs: claims, leases, attempts, dead letters, idempotency. */

import type { Mutant } from '../mutant.ts'

const SQL = 'sql/migrations/0005_jobs.sql'
const KV = 'sql/migrations/0004_key_value.sql'
const JOBS = 'src/postgres/jobs.ts'
const WORKER = 'src/runtime/worker.ts'
const POSTGRES = 'test/conformance/postgres.test.ts'
const SETTLING = 'test/postgres/settle-jobs.test.ts'
const SETTLING_IN_TX = 'test/postgres/settle-jobs-in-transactions.test.ts'
const CLAIMS = 'test/postgres/workers-claim.test.ts'
const KILLED = 'test/postgres/workers-killed.test.ts'

export const jobMutants: readonly Mutant[] = [
  {
    id: 'job-ack-unfenced',
    rule: 'J6',
    guarantee: 'once a job has been claimed again, the ack of the older claim is refused and changes nothing',
    broken: 'an ack does not compare the token',
    edits: [{ file: SQL, find: 'where j.id = ack_job.id and j.token = ack_job.token;', replace: 'where j.id = ack_job.id;' }],
    files: [SETTLING],
    caughtBy: ['J6 every settlement of the older claim is refused and changes nothing'],
    beside: ['J6 its ack succeeds and it is never claimed again'],
  },
  {
    id: 'job-heartbeat-unfenced',
    rule: 'J6',
    guarantee: 'once a job has been claimed again, the heartbeat of the older claim is refused and changes nothing',
    broken: 'a heartbeat does not compare the token',
    edits: [
      {
        file: SQL,
        find: 'where j.id = s.id and j.token = s.token for update skip locked',
        replace: 'where j.id = s.id and s.token is not null for update skip locked',
      },
    ],
    files: [POSTGRES],
    caughtBy: [' of the older claim is refused and changes nothing'],
    beside: ['J6 heartbeats keep the job for as long as they come'],
  },
  {
    id: 'token-from-counter',
    rule: 'J6',
    guarantee: 'no two claims have the same token, be there a crash between them',
    broken: 'the token is the number of the claim, which a crash gives out again',
    edits: [
      {
        file: SQL,
        find: `        return query
          update klieo.jobs j
          set attempts = j.attempts + 1, fence = j.fence + 1, token = (v_token || lpad(to_hex(j.id), 16, '0'))::uuid,`,
        replace: `        return query
          update klieo.jobs j
          set attempts = j.attempts + 1, fence = j.fence + 1, token = (lpad(to_hex(j.fence + 1), 16, '0') || lpad(to_hex(j.id), 16, '0'))::uuid,`,
      },
    ],
    files: ['test/postgres/settle-crash.test.ts'],
    caughtBy: ['J6 a claim by SQL that a crash forgets'],
    beside: ['J6 and K5 the bus waits all the same'],
  },
  {
    id: 'job-ack-in-transaction-outside',
    rule: 'J6',
    guarantee: 'an ack with tx takes effect with the caller’s transaction',
    broken: 'it is sent on a connection of the bus',
    edits: [
      {
        file: JOBS,
        find: `this.#context.db.queryIn(tx, ACK_JOBS, [...keys([claim]), String(noWait)], 'ack', expected)`,
        replace: `this.#context.db.query(ACK_JOBS, [...keys([claim]), String(noWait)], 'ack')`,
      },
    ],
    files: [SETTLING_IN_TX],
    caughtBy: ['J6 the lease runs out meanwhile and the transaction rolls back'],
    beside: ['J6 the job was lost before: lease_lost'],
  },
  {
    id: 'heartbeat-waits-for-ack',
    rule: 'J6',
    guarantee: 'a heartbeat never waits behind an ack in an open transaction',
    broken: 'it waits for the row',
    edits: [
      {
        file: SQL,
        find: 'klieo.settle_jobs(array[heartbeat_job.id], array[heartbeat_job.token], true)) = 0',
        replace: 'klieo.settle_jobs(array[heartbeat_job.id], array[heartbeat_job.token], false)) = 0',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['J6 a heartbeat does not wait behind an ack in an open transaction'],
    beside: ['J6 an ack of a job with tx takes effect with that transaction'],
  },
  {
    id: 'heartbeat-shortens',
    rule: 'J6',
    guarantee: 'a heartbeat never shortens a lease',
    broken: 'the end of the lease is set to what the caller says, be it earlier',
    edits: [
      {
        file: SQL,
        find: 'set visible_at = greatest(j.visible_at, clock_timestamp() + make_interval(secs => heartbeat_job.lease_ttl_ms / 1000.0))',
        replace: 'set visible_at = clock_timestamp() + make_interval(secs => heartbeat_job.lease_ttl_ms / 1000.0)',
      },
    ],
    files: ['test/postgres/windows.test.ts'],
    caughtBy: ['J6 a heartbeat never shortens a lease'],
    beside: ['P7 an extend never shortens an ack wait'],
  },
  {
    id: 'claim-without-lock',
    rule: 'J2',
    guarantee: 'a job is claimed by one worker at a time',
    broken: 'the jobs that are found are not locked',
    edits: [{ file: SQL, find: 'limit v_room\n      for no key update skip locked', replace: 'limit v_room' }],
    files: [CLAIMS],
    caughtBy: ['J2 sixteen sessions claim two thousand jobs: each exactly once'],
    beside: ['J7 in a REPEATABLE READ transaction it is refused'],
  },
  {
    id: 'claim-waits-for-locks',
    rule: 'J2',
    guarantee: 'concurrent claims never block one another',
    broken: 'a claim waits for what another has locked',
    edits: [{ file: SQL, find: 'limit v_room\n      for no key update skip locked', replace: 'limit v_room\n      for no key update' }],
    files: [POSTGRES],
    caughtBy: ['J2 a claim does not wait behind an ack in an open transaction'],
    beside: ['J2 of concurrent claims for one job one gets it'],
  },
  {
    id: 'claim-under-frozen-snapshot',
    rule: 'J7',
    guarantee: 'a claim never hands out what is no longer there',
    broken: 'it runs in REPEATABLE READ, too',
    edits: [{ file: SQL, find: `if current_setting('transaction_isolation') <> 'read committed' then`, replace: 'if false then' }],
    files: [CLAIMS],
    caughtBy: ['J7 in a REPEATABLE READ transaction it is refused'],
    beside: ['J2 neither waits for it nor gets what it took'],
  },
  {
    id: 'attempt-counted-at-the-end',
    rule: 'J3',
    guarantee: 'every claim counts as an attempt before the handler runs, so that a job whose worker dies each time ends too',
    broken: 'the attempt is counted when the job is naked',
    edits: [
      {
        file: SQL,
        find: `        return query
          update klieo.jobs j
          set attempts = j.attempts + 1, fence = j.fence + 1,`,
        replace: `        return query
          update klieo.jobs j
          set fence = j.fence + 1,`,
      },
      {
        file: SQL,
        find: 'returning j.id, j.payload, j.headers, j.attempts, j.max_attempts, j.fence, j.token, j.visible_at;\n      else',
        replace: 'returning j.id, j.payload, j.headers, j.attempts + 1, j.max_attempts, j.fence, j.token, j.visible_at;\n      else',
      },
      {
        file: SQL,
        find: 'set token = null, run_at = case',
        replace: 'set attempts = j.attempts + 1, token = null, run_at = case',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['J3 a job whose worker dies each time has exactly maxAttempts runs', 'J3 a job of one attempt runs once'],
    beside: ['J4 a nak of the last attempt ends the job at once'],
  },
  {
    id: 'reaper-needed',
    rule: 'J3',
    guarantee: 'a lease that runs out makes the job claimable again, with or without a reaper running',
    broken: 'claims pass over a job that somebody has claimed, until the reaper takes its token away',
    edits: [
      {
        file: SQL,
        find: 'and j.visible_at <= v_now and j.visible_at >= (select t.head from there t)\n      order by j.visible_at, j.id',
        replace:
          'and j.visible_at <= v_now and j.visible_at >= (select t.head from there t) and j.token is null\n      order by j.visible_at, j.id',
      },
      {
        file: SQL,
        find: 'begin\n  with ended as materialized (\n    select j.id\n    from klieo.jobs j\n    where j.died_at is null and j.attempts >= j.max_attempts',
        replace:
          'begin\n  update klieo.jobs j set token = null where j.token is not null and j.attempts < j.max_attempts and j.visible_at <= clock_timestamp();\n  with ended as materialized (\n    select j.id\n    from klieo.jobs j\n    where j.died_at is null and j.attempts >= j.max_attempts',
      },
    ],
    files: [KILLED, SETTLING],
    caughtBy: ['J3 its job is claimable when the lease ends, not before, as the next attempt, with no reaper anywhere'],
    beside: ['J6 nak, ack: the nak stands and the job is claimed again'],
  },
  {
    id: 'max-attempts-off-by-one',
    rule: 'J3',
    guarantee: 'exactly maxAttempts runs, then exactly one dead letter',
    broken: 'a claim hands a job out once more',
    edits: [
      {
        file: SQL,
        find: 'j.attempts >= j.max_attempts as ended, octet_length',
        replace: 'j.attempts > j.max_attempts as ended, octet_length',
      },
      {
        file: SQL,
        find: 'where j.died_at is null and j.attempts >= j.max_attempts and j.visible_at <= (select clock_timestamp())',
        replace: 'where j.died_at is null and j.attempts > j.max_attempts and j.visible_at <= (select clock_timestamp())',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['J3 a job of one attempt runs once', 'J3 a job whose worker dies each time has exactly maxAttempts runs'],
    beside: ['J4 a nak of the last attempt ends the job at once'],
  },
  {
    id: 'job-buried-twice',
    rule: 'J4',
    guarantee: 'a job that dies leaves exactly one dead letter, however many reapers and claimers there are',
    broken: 'the reaper does not lock what it found before it buries it',
    edits: [{ file: SQL, find: 'limit reap_jobs.max_jobs\n    for no key update skip locked', replace: 'limit reap_jobs.max_jobs' }],
    files: ['test/postgres/reaper.test.ts'],
    caughtBy: ['J4 two reapers and four claimers at once bury each exactly once'],
    beside: ['J3 and J4 with no reaper a claim buries them'],
  },
  {
    id: 'job-letter-apart',
    rule: 'J4',
    guarantee: 'a job dies and its dead letter is published in one transaction',
    broken: 'first the job is dead, then the letter is published',
    edits: [
      {
        file: JOBS,
        find: `const [done] = await this.#settle(DEAD_LETTER_JOBS, [claim], [pgArray([reason]), String(noWait)], 'deadLetter')`,
        replace: `const [done] = (
        await this.#context.db.query(
          'update klieo.jobs set died_at = clock_timestamp(), token = null, last_error = $3::text where id = $1::text::bigint and token = $2::text::uuid and $4::boolean is not null returning id',
          [claim.id, claim.token, reason, noWait],
          'deadLetter',
        )
      ).map(() => true)
      if (done)
        await this.#context.db.query(
          \`insert into klieo.messages (subject, payload, headers) select j.queue || '.dlq', j.payload, j.headers || jsonb_build_object('dlq_reason', $2::text) from klieo.jobs j where j.id = $1::text::bigint\`,
          [claim.id, reason],
          'deadLetter',
        )`,
      },
    ],
    files: ['test/postgres/letters.test.ts'],
    caughtBy: ['J4 a dead letter that cannot be stored leaves a job at deadLetter'],
    beside: ['J4 a dead letter that cannot be stored leaves a job at its last nak'],
  },
  {
    id: 'job-letter-lost',
    rule: 'J4',
    guarantee: 'a nak of the last attempt publishes the dead letter at once',
    broken: 'the job is dead and nothing is published',
    edits: [
      {
        file: SQL,
        find: 'if v_ended is not null then\n    perform klieo.bury_jobs(v_ended, null);\n  end if;\n  return query select unnest(v_mine);',
        replace: 'update klieo.jobs j set died_at = clock_timestamp() where j.id = any(v_ended);\n  return query select unnest(v_mine);',
      },
    ],
    files: [SETTLING],
    caughtBy: ['J4 a nak of the last attempt publishes the dead letter at once'],
    beside: ['J6 nak, ack: the nak stands and the job is claimed again'],
  },
  {
    id: 'enqueue-outside-transaction',
    rule: 'J1',
    guarantee: 'a job enqueued with tx exists if and only if that transaction commits',
    broken: 'it is enqueued on a connection of the bus',
    edits: [
      {
        file: JOBS,
        find: 'this.#context.db.queryIn<EnqueueRow>(tx, ENQUEUE, ',
        replace: 'this.#context.db.query<EnqueueRow>(ENQUEUE, ',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['P1 J1 what was published or enqueued with tx does not exist after a rollback'],
    beside: ['P1 a publish with tx is delivered once that transaction commits'],
  },
  {
    id: 'dedup-record-after-job',
    rule: 'J5',
    guarantee: 'the first enqueue writes the idempotency record in the transaction of the job, also under concurrency',
    broken: 'the record is looked for first, and written when the job is there',
    edits: [
      {
        file: JOBS,
        find: 'if (enqueue.job.dedupKey !== undefined) return (await this.#enqueue([enqueue]))[0] as JobId',
        replace: `if (enqueue.job.dedupKey !== undefined) {
      const record = [\`dedup.\${queue}\`, enqueue.job.dedupKey]
      const [known] = await this.#context.db.query<{ id: string }>(
        \`select convert_from(value, 'UTF8') as id from klieo.kv_entries where bucket = $1 and key = $2 and value is not null\`,
        record,
        'enqueue',
      )
      if (known) return known.id
      const id = await this.#enqueueOne({ queue, job: { ...enqueue.job, dedupKey: undefined } })
      await this.#context.db.query(
        \`insert into klieo.kv_entries (bucket, key, revision, updated_at, value)
         values ($1, $2, nextval('klieo.kv_revision'), clock_timestamp(), convert_to($3, 'UTF8')) on conflict do nothing\`,
        [...record, id],
        'enqueue',
      )
      return id
    }`,
      },
    ],
    files: [POSTGRES],
    caughtBy: ['J5 an enqueue that waits for a transaction with its key', 'J5 of concurrent enqueues with one key one adds a job'],
    beside: ['J5 a second enqueue with the key answers the first id and adds nothing'],
  },
  {
    id: 'dedup-record-dies-with-job',
    rule: 'J5',
    guarantee: 'a dedupKey counts for 24 hours from its enqueue at the least, though its job is done',
    broken: 'the record is over as soon as its job is gone',
    edits: [{ file: SQL, find: `clock_timestamp() + interval '24 hours'`, replace: 'clock_timestamp()' }],
    files: [POSTGRES],
    caughtBy: ['J5 the record outlives its job: acked, dead or alive'],
    beside: ['J5 the record never stops a retry of its own job'],
  },
  {
    id: 'dedup-record-by-age',
    rule: 'J5',
    guarantee: 'a dedupKey counts for as long as its job lives, be that longer than 24 hours',
    broken: 'the record is over after 24 hours',
    edits: [
      {
        file: KV,
        find: `select left(bucket, 6) = 'dedup.' and exists (`,
        replace: `select left(bucket, 6) = 'dedup.' and false and exists (`,
      },
    ],
    files: ['test/postgres/windows.test.ts'],
    caughtBy: ['J5 the record of a job that lives longer than a day still counts'],
    beside: ['J5 the record of a job that is done is over after a day'],
  },
  {
    id: 'priority-ignored',
    rule: 'J8',
    guarantee: 'among claimable jobs higher priority goes first',
    broken: 'a claim takes what has waited longest, of whatever priority',
    edits: [{ file: SQL, find: 'j.died_at is null and j.priority = (select t.priority from there t)', replace: 'j.died_at is null' }],
    files: [POSTGRES],
    caughtBy: ['J8 higher priority goes first', 'J8 a job that comes in later with a higher priority goes before'],
    beside: ['J8 within a priority the job that has waited longest goes first'],
  },
  {
    id: 'newest-first',
    rule: 'J8',
    guarantee: 'within a priority the job that has waited longest goes first',
    broken: 'the newest goes first',
    edits: [
      {
        file: SQL,
        find: 'order by j.visible_at, j.id\n      limit v_room',
        replace: 'order by j.visible_at desc, j.id desc\n      limit v_room',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['J8 within a priority the job that has waited longest goes first'],
    beside: ['J8 a delayed job of high priority holds up nobody'],
  },
  {
    id: 'head-never-looked-below',
    rule: 'J1',
    guarantee: 'a job whose transaction commits late is found, wherever claims begin to look',
    broken: 'once a head is noted, nobody looks below it again',
    edits: [
      {
        file: SQL,
        find: `look_is_due.looked_at + make_interval(secs => least(look_is_due.look_ms * 0.02, 5))`,
        replace: `look_is_due.looked_at + interval '1 hour'`,
      },
    ],
    files: ['test/postgres/heads.test.ts'],
    caughtBy: ['J1 a job whose transaction commits long after the head has passed it is found'],
    beside: ['J7 a waiting claim gets a job behind dead rows at its time'],
  },
  {
    id: 'worker-does-not-heartbeat',
    rule: 'Worker',
    guarantee: 'a worker heartbeats while its handler runs',
    broken: 'it does not',
    edits: [{ file: WORKER, find: 'if (run.isDue(TICKS_PER_HEARTBEAT)) void run.beat()', replace: 'run.isDue(TICKS_PER_HEARTBEAT)' }],
    files: [POSTGRES],
    caughtBy: ['Worker heartbeats while the handler runs'],
    beside: ['Worker acks a job when its handler returns'],
  },
  {
    id: 'worker-acks-what-was-rolled-back',
    rule: 'J6',
    guarantee: 'a job that its handler acked in a transaction that was rolled back comes back',
    broken: 'the worker acks it because its handler has returned',
    edits: [{ file: WORKER, find: '} else if (!run.wasSettled) {', replace: '} else {' }],
    files: ['test/postgres/callers-transaction.test.ts'],
    caughtBy: ['J6 Worker: a job that its handler acked in a transaction that was rolled back comes back'],
    beside: ['P7 a refused ack and a lost cas leave the transaction usable'],
  },
  {
    id: 'prefetched-attempt-counts',
    rule: 'J3',
    guarantee: 'what a worker claimed ahead and never began goes back without its attempt being counted',
    broken: 'the attempt is counted',
    edits: [
      {
        file: 'src/runtime/claimed-job.ts',
        find: 'await this.#context.backend.release(this.claim, !this.waits)',
        replace: 'await this.#context.backend.release(this.claim, true)',
      },
    ],
    files: ['test/postgres/prefetch.test.ts'],
    caughtBy: ['J3 what a worker has claimed ahead goes back at once when it stops'],
    beside: ['J2 a worker whose handlers take long claims only for free places'],
  },
]
