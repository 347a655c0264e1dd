/** Administration: what an operator is told and what he does. */

import type { Mutant } from '../mutant.ts'

const SQL = 'sql/migrations/0010_admin.sql'
const JOBS_SQL = 'sql/migrations/0005_jobs.sql'
const PUBSUB = 'src/postgres/pubsub.ts'
const POSTGRES = 'test/conformance/postgres.test.ts'
const MESSAGES = 'test/postgres/admin-messages.test.ts'
const JOBS = 'test/postgres/admin-jobs.test.ts'

export const adminMutants: readonly Mutant[] = [
  {
    id: 'pause-unheeded',
    rule: 'A3',
    guarantee: 'a paused queue gives no job',
    broken: 'a claim does not ask whether the queue is paused',
    edits: [
      {
        file: JOBS_SQL,
        find: 'if exists (select from klieo.paused_queues p where p.queue = take_jobs.queue) then',
        replace: 'if false then',
      },
    ],
    files: [JOBS],
    caughtBy: ['A3 a claim that began before may give a job; one that begins after the pause resolved gives none'],
    beside: ['A3 a pause in a transaction that rolls back was none'],
  },
  {
    id: 'cancel-without-lock',
    rule: 'A6',
    guarantee: 'an operator waits for nobody’s transaction',
    broken: 'cancelling waits for whoever has the job locked',
    edits: [
      {
        file: SQL,
        find: 'select * into j from klieo.jobs x where x.id = cancel_job.id for update skip locked;',
        replace: "set local lock_timeout = '3s'; select * into j from klieo.jobs x where x.id = cancel_job.id for update;",
      },
    ],
    files: [JOBS],
    caughtBy: ['A6 cancel, retry and remove say conflict at once and change nothing'],
    beside: ['A6 after a rollback the job can be cancelled'],
  },
  {
    id: 'running-job-removed',
    rule: 'A2',
    guarantee: 'a running job is not removed',
    broken: 'removing does not look at the lease',
    edits: [
      {
        file: SQL,
        find: 'if j.died_at is null and j.token is not null and j.visible_at > clock_timestamp() then',
        replace: 'if false then',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['A2 a job is removed without a letter, unless it is running'],
    beside: ['A2 all dead jobs of a queue are retried, and of no other'],
  },
  {
    id: 'listing-by-text',
    rule: 'A1',
    guarantee: 'jobs are listed in the order of their ids, each once',
    broken: 'the order is that of the ids as texts',
    edits: [{ file: 'src/postgres/admin.sql.ts', find: 'order by j.id::bigint', replace: 'order by j.id' }],
    files: [POSTGRES],
    caughtBy: ['A1 more jobs than fit in a page are listed once each'],
    beside: ['A1 a job is shown with what it carries'],
  },
  {
    id: 'moved-durable-keeps-its-id',
    rule: 'A4',
    guarantee: 'what was handed out before a durable was moved cannot be settled',
    broken: 'the durable keeps its id, and what open transactions hold keeps its place',
    edits: [{ file: SQL, find: 'set id = default,\n    lo =', replace: 'set lo =' }],
    files: [MESSAGES],
    caughtBy: ['A4 beside an ack in an open transaction'],
    beside: ['A5 of a message whose last delivery is out'],
  },
  {
    id: 'members-stay-behind',
    rule: 'A4',
    guarantee: 'the members of a moved durable move with it',
    broken: 'a member does not look for the new id',
    edits: [{ file: PUBSUB, find: 'if (moved?.made_at !== consumer.madeAt || moved.id === id) throw error', replace: 'throw error' }],
    files: [MESSAGES],
    caughtBy: ['A4 a fetch that waits for the durable while it is moved'],
    beside: ['A4 a durable that was deleted and made anew is another'],
  },
  {
    id: 'members-join-a-namesake',
    rule: 'A4',
    guarantee: 'members of a deleted durable do not go on with one of the same name',
    broken: 'a member takes whatever has the name',
    edits: [
      {
        file: PUBSUB,
        find: 'if (moved?.made_at !== consumer.madeAt || moved.id === id) throw error',
        replace: 'if (moved === undefined || moved.id === id) throw error',
      },
    ],
    files: [MESSAGES],
    caughtBy: ['A4 a durable that was deleted and made anew is another'],
    beside: ['A4 a fetch that waits for the durable while it is moved'],
  },
  {
    id: 'members-part-by-time-zone',
    rule: 'A4',
    guarantee: 'the members of a moved durable move with it',
    broken: 'a member takes the durable for another when it is told of in another time zone',
    edits: [{ file: 'src/postgres/pubsub.sql.ts', find: 'extract(epoch from created_at)::text', replace: 'created_at::text' }],
    files: [MESSAGES],
    caughtBy: ['A4 its members move with it, whatever time zone'],
    beside: ['A4 a fetch that waits for the durable while it is moved'],
  },
  {
    id: 'upkeep-waits-for-what-a-move-left',
    rule: 'A6',
    guarantee: 'an operator’s move holds up no upkeep',
    broken: 'what belongs to no durable is removed after whoever has it locked',
    edits: [
      {
        file: 'sql/migrations/0006_upkeep.sql',
        find: 'where o.id = d.consumer_id)\n    for update skip locked',
        replace: 'where o.id = d.consumer_id)\n    for update',
      },
    ],
    files: [MESSAGES],
    caughtBy: ['A6 what a move left to an open transaction holds up no upkeep'],
    beside: ['A4 beside an ack that is rolled back'],
  },
  {
    id: 'purged-in-the-way',
    rule: 'P5',
    guarantee: 'what is due comes within a second, whatever was purged before it',
    broken: 'a fetch clears away as many as it may hand out, and says that there is no more',
    edits: [
      { file: 'sql/migrations/0003_publish_subscribe.sql', find: 'if v_again then', replace: 'v_again := false;\n      if v_again then' },
    ],
    files: [MESSAGES],
    caughtBy: ['P5 what is due comes at once, however many messages were purged'],
    beside: ['A5 of a message whose last delivery is out'],
  },
  {
    id: 'purge-whenever-published',
    rule: 'A5',
    guarantee: 'only what was published before the time goes, if one is given',
    broken: 'a purge removes what matches, whenever it was published',
    edits: [
      {
        file: SQL,
        find: 'and (purge_messages_from.before is null or s.published_at < purge_messages_from.before)',
        replace: '',
      },
    ],
    files: [POSTGRES],
    caughtBy: ['A5 only what was published before a time goes'],
    beside: ['A5 what matches is gone for every durable'],
  },
]
