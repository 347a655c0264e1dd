/** Wake-ups, callers' transactions, connections, and requests. */

import type { Mutant } from '../mutant.ts'

const BUS = 'src/postgres/bus.ts'
const DATABASE = 'src/postgres/database.ts'
const PUBSUB = 'src/postgres/pubsub.ts'
const REQUESTS = 'src/postgres/request-reply.ts'
const REQUESTS_SQL = 'sql/migrations/0008_requests.sql'
const POSTGRES = 'test/conformance/postgres.test.ts'
const WAKE_UPS = 'test/postgres/wake-ups.test.ts'
const REQUEST_TESTS = 'test/postgres/request-reply.test.ts'

export const callMutants: readonly Mutant[] = [
  {
    id: 'notification-is-truth',
    rule: 'P14',
    guarantee: 'nothing depends on a notification: what nobody was told of comes within the poll interval',
    broken: 'a stream waits until it is rung',
    edits: [
      {
        file: 'src/runtime/stream.ts',
        find: 'Math.min(jittered(pollIntervalMs), fetched.dueInMs ?? pollIntervalMs)',
        replace: 'Math.min(jittered(pollIntervalMs) * 1_000_000, fetched.dueInMs ?? 1_000_000_000)',
      },
    ],
    files: ['test/postgres/polls.test.ts'],
    caughtBy: ['P14 a message that nobody is told of comes with the poll'],
    beside: ['P14 a job that nobody is told of comes with the poll'],
  },
  {
    id: 'notification-is-truth-for-jobs',
    rule: 'P14',
    guarantee: 'nothing depends on a notification: a job that nobody was told of is claimed within the poll interval',
    broken: 'a claim waits until it is rung',
    edits: [
      {
        file: 'src/postgres/jobs.ts',
        find: 'pauseMs: async () => Math.min(jittered(pollIntervalMs), dueInMs ?? pollIntervalMs)',
        replace: 'pauseMs: async () => Math.min(jittered(pollIntervalMs) * 1_000_000, dueInMs ?? 1_000_000_000)',
      },
    ],
    files: ['test/postgres/polls.test.ts'],
    caughtBy: ['P14 a job that nobody is told of comes with the poll'],
    beside: ['P14 a message that nobody is told of comes with the poll'],
  },
  {
    id: 'no-look-after-reconnect',
    rule: 'P14',
    guarantee: 'what was told while nobody listened is found when LISTEN is there again',
    broken: 'nobody looks after the reconnect',
    edits: [
      {
        file: BUS,
        find: 'listened = true\n        bell.ringAll()',
        replace: 'listened = true',
      },
    ],
    files: [WAKE_UPS],
    caughtBy: [
      'P14 it is terminated again and again while others publish',
      'P14 what commits in a caller’s transaction while nobody listens',
    ],
    beside: ['P14 a publish, a put, a job, a lease that ends and a request'],
  },
  {
    id: 'callers-commit-wakes-nobody',
    rule: 'P14',
    guarantee: 'a publish in the caller’s transaction wakes while its process lives',
    broken: 'nobody looks whether that transaction has ended',
    edits: [{ file: 'src/postgres/ringer.ts', find: 'if (!this.#looking) {', replace: 'if (this.#looking) {' }],
    files: [WAKE_UPS],
    caughtBy: ['P14 a publish in a transaction of a pg client that commits late'],
    beside: ['P14 a publish, a put, a job, a lease that ends and a request'],
  },
  {
    id: 'notify-in-callers-transaction',
    rule: 'P14',
    guarantee: 'a commit that publishes is not serialised behind other commits by a notification',
    broken: 'the notification is sent in the caller’s transaction',
    edits: [
      {
        file: PUBSUB,
        find: 'const xid = rows[0]?.tx\n    if (xid !== undefined) this.#context.ringer.afterCommit(xid, topics(messages))',
        replace: `await this.#context.db.queryIn(tx, 'select pg_notify($1::text, $2::text)', [this.#context.ringer.channel, this.#context.ringer.notice(topics(messages))], 'publish')`,
      },
    ],
    files: [WAKE_UPS],
    caughtBy: ['P1 P14 a prepared transaction: delivered when it is committed'],
    beside: ['P14 a publish, a put, a job, a lease that ends and a request'],
  },
  {
    id: 'publish-outside-transaction',
    rule: 'P1',
    guarantee: 'a publish with tx becomes visible when that transaction commits, and never if it rolls back',
    broken: 'it is published on a connection of the bus',
    edits: [
      {
        file: PUBSUB,
        find: 'this.#context.db.queryIn<PublishRow>(tx, PUBLISH, ',
        replace: 'this.#context.db.query<PublishRow>(PUBLISH, ',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['P1 a publish with tx is delivered once that transaction commits', 'P1 J1 what was published or enqueued with tx'],
    beside: ['J1 a job enqueued with tx is claimable once that transaction commits'],
  },
  {
    id: 'retry-in-callers-transaction',
    rule: 'section 7',
    guarantee: 'nothing is repeated inside a caller’s transaction',
    broken: 'a serialization failure or a deadlock is answered by another try there',
    edits: [
      {
        file: DATABASE,
        find: '      const rows = await this.#sendIn<R>(tx, sql, values)\n',
        replace:
          '      const rows = await this.#sendIn<R>(tx, sql, values).catch((error: unknown) => {\n        if (isTransient(error)) return this.#sendIn<R>(tx, sql, values)\n        throw error\n      })\n',
      },
    ],
    files: ['test/postgres/process.test.ts'],
    caughtBy: ['section 7 in the caller’s transaction: a deadlock or a serialization failure is a retryable conflict'],
    beside: ['a statement that is cancelled is a timeout'],
  },
  {
    id: 'commits-not-durable',
    rule: 'J6',
    guarantee: 'what the bus has answered survives a crash, whatever the server does by default',
    broken: 'the bus does not ask for commits that wait for the disk',
    edits: [{ file: DATABASE, find: `server.durable === 'off' || `, replace: '' }],
    files: ['test/postgres/settle-crash.test.ts'],
    caughtBy: ['J6 and K5 the bus waits all the same: claims, deliveries and leases survive a crash'],
    beside: ['J6 a claim by SQL that a crash forgets'],
  },
  {
    id: 'standby-accepted',
    rule: 'section 8',
    guarantee: 'a standby is refused at connect',
    broken: 'nobody looks whether the server is one',
    edits: [{ file: DATABASE, find: 'if (server.standby) throw', replace: 'if (server.standby && server.version < 0) throw' }],
    files: ['test/postgres/log-crash.test.ts'],
    caughtBy: ['section 8 it is refused at connect with unsupported'],
    beside: ['P9 a prepared one is invisible, delays nothing'],
  },
  {
    id: 'reply-to-another-request',
    rule: 'R4',
    guarantee: 'a late reply never reaches another request',
    broken: 'a reply goes to whichever request has waited longest',
    edits: [
      {
        file: REQUESTS,
        find: 'const pending = this.#pending.get(request_id)',
        replace: `const pending = this.#pending.get(request_id.length > 0 ? ([...this.#pending.keys()][0] ?? '') : '')`,
      },
    ],
    files: [POSTGRES],
    caughtBy: ['R4 requests of many at once each get their own answer'],
    beside: ['R1 a live responder answers'],
  },
  {
    id: 'late-reply-kept',
    rule: 'R4',
    guarantee: 'a late reply is dropped and never reaches another request',
    broken: 'replies carry no request, are kept beyond its deadline, and the next request takes what is there',
    edits: [
      {
        file: REQUESTS,
        find: 'const pending = this.#pending.get(request_id)',
        replace: `const pending = this.#pending.get(request_id) ?? [...this.#pending.values()][0]`,
      },
      { file: REQUESTS, find: 'if (!answered) void sending', replace: 'if (answered && timeoutMs < 0) void sending' },
      {
        file: REQUESTS_SQL,
        find: 'and r.claimed_by = reply_to_request.process and r.deadline > clock_timestamp()',
        replace: 'and r.claimed_by = reply_to_request.process',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['R4 a late reply is dropped and never reaches another request'],
    beside: ['R4 requests of many at once each get their own answer'],
  },
  {
    id: 'request-handled-twice',
    rule: 'R1',
    guarantee: 'exactly one live responder handles a request',
    broken: 'claims of requests do not lock what they found',
    edits: [
      {
        file: REQUESTS_SQL,
        find: '\n      for no key update skip locked',
        replace: '',
      },
    ],
    files: [POSTGRES, REQUEST_TESTS],
    caughtBy: [
      'R1 of several responders one handles each request',
      'R1 two responders in two processes, one slow: each request is handled once',
    ],
    beside: ['R1 a live responder answers'],
  },
  {
    id: 'dead-responder-counts-as-live',
    rule: 'R4',
    guarantee: 'a responder killed with kill -9 stops counting as live within a second',
    broken: 'whoever once registered counts as live',
    edits: [
      {
        file: 'sql/migrations/0006_upkeep.sql',
        find: 'if not pg_try_advisory_xact_lock_shared(klieo.presence_class(), r.instance_id) then',
        replace: 'if true then',
      },
    ],
    files: [REQUEST_TESTS],
    caughtBy: ['R2 R4 a responder killed with kill -9 is not found within a second'],
    beside: ['R2 two that register at once: each is found as soon as its respond has resolved'],
  },
  {
    id: 'late-request-started',
    rule: 'R4',
    guarantee: 'a request past its deadline is not started',
    broken: 'nobody takes a request back, and a claim takes it whatever its deadline',
    edits: [
      { file: REQUESTS, find: 'if (!answered) void sending', replace: 'if (answered && timeoutMs < 0) void sending' },
      {
        file: REQUESTS,
        find: 'if (clock.now() - askedAt < request.left_ms) this.#start(request)',
        replace: 'this.#start(request)',
      },
      { file: REQUESTS_SQL, find: 'r.deadline > (select clock_timestamp()) and', replace: '' },
    ],
    files: [POSTGRES],
    caughtBy: ['R4 a request past its deadline is not started'],
    beside: ['R1 a live responder answers'],
  },
  {
    id: 'stack-to-requester',
    rule: 'R3',
    guarantee: 'a requester gets the thrown message, and no stack',
    broken: 'he gets the stack',
    edits: [
      {
        file: 'src/runtime/error-text.ts',
        find: 'error instanceof Error ? error.message : String(error)',
        replace: 'error instanceof Error ? (error.stack ?? error.message) : String(error)',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['R3 a handler that throws: handler_failed with its message, and no stack'],
    beside: ['R3 a responder goes on after a handler threw'],
  },
]
