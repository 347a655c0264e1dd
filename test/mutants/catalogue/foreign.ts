/** Workers and consumers that have nothing but SQL: what the functions for them add to those of the package. */

import type { Mutant } from '../mutant.ts'

const SQL = 'sql/migrations/0009_foreign_workers.sql'
const WORKERS = 'test/postgres/foreign-workers.test.ts'
const CONSUMERS = 'test/postgres/foreign-consumers.test.ts'

export const foreignMutants: readonly Mutant[] = [
  {
    id: 'foreign-claim-beside-work',
    rule: 'J7',
    guarantee: "a claim never runs in a caller's transaction",
    broken: 'klieo.claim is content with a transaction that has written',
    edits: [{ file: SQL, find: "  perform klieo.check_unwritten('a claim');\n", replace: '' }],
    files: [WORKERS],
    caughtBy: ['J7 it is refused with KB002 in a transaction that has written'],
    beside: ['J8 the highest priority comes first'],
  },
  {
    id: 'foreign-nak-by-id',
    rule: 'J6',
    guarantee: 'once a job has been claimed again, the nak of the older claim is refused and changes nothing',
    broken: 'klieo.nak takes the token of whoever holds the job',
    edits: [
      {
        file: SQL,
        find: 'klieo.nak_jobs(array[nak.id], array[nak.token],',
        replace: 'klieo.nak_jobs(array[nak.id], array[(select j.token from klieo.jobs j where j.id = nak.id)],',
      },
    ],
    files: [WORKERS],
    caughtBy: ['J6 once the job is claimed again every settlement of the older claim answers false'],
    beside: ['J4 a nak of the last attempt makes the job dead at once'],
  },
  {
    id: 'foreign-heartbeat-of-nobody',
    rule: 'J6',
    guarantee: 'the heartbeat of an older claim is refused',
    broken: 'klieo.heartbeat answers a time, whoever has the job',
    edits: [
      {
        file: SQL,
        find: 'return (select h.until from klieo.heartbeat_job(heartbeat.id, heartbeat.token, heartbeat.lease_ttl_ms) h);',
        replace:
          'return coalesce((select h.until from klieo.heartbeat_job(heartbeat.id, heartbeat.token, heartbeat.lease_ttl_ms) h), clock_timestamp());',
      },
    ],
    files: [WORKERS],
    caughtBy: ['J6 once the job is claimed again every settlement of the older claim answers false'],
    beside: ['J6 a heartbeat never shortens a lease'],
  },
  {
    id: 'foreign-joins-any-filter',
    rule: 'P11',
    guarantee: 'subscribing to a durable with another filter is refused and changes nothing',
    broken: 'klieo.subscribe joins whatever is there',
    edits: [{ file: SQL, find: 'if v_filter <> subscribe.filter then', replace: 'if v_filter is null then' }],
    files: [CONSUMERS],
    caughtBy: ['P11 the same filter joins and keeps the position; another one is KB005'],
    beside: ['a durable begins with everything'],
  },
  {
    id: 'foreign-letters-unwritten',
    rule: 'P6',
    guarantee: 'what is left unsettled at its last delivery goes to the dead-letter subject',
    broken: 'klieo.bury counts and does nothing',
    edits: [{ file: SQL, find: 'return klieo.bury_deliveries(v_id, bury.max_messages);', replace: 'return 1;' }],
    files: [CONSUMERS],
    caughtBy: ['P6 left unsettled, the message is buried by whoever calls bury()'],
    beside: ['P6 a nak of it ends the message at once'],
  },
  {
    id: 'foreign-release-settles',
    rule: 'P10',
    guarantee: 'what is handed back comes again at once, and its delivery is not counted',
    broken: 'klieo.release_message naks',
    edits: [
      {
        file: SQL,
        find: 'klieo.release_deliveries(array[f.id], array[release_message.seq], array[release_message.token]) n',
        replace: 'klieo.nak_deliveries(array[f.id], array[release_message.seq], array[release_message.token], array[0]) n',
      },
    ],
    files: [CONSUMERS],
    caughtBy: ['P10 what was released comes again at once'],
    beside: ['P5 a nak comes back at once'],
  },
]
