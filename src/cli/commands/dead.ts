import type { JobInfo } from '../../index.ts'
import { command } from '../command.ts'
import { EXIT } from '../failure.ts'
import type { Column } from '../table.ts'
import { ago, plural } from '../text.ts'
import { forEachJob, JOB_COLUMNS, LIMIT_OPTION, printJobs } from './jobs.ts'

const COLUMNS: readonly Column<JobInfo>[] = [
  ...JOB_COLUMNS.filter(({ title }) => ['id', 'queue', 'attempts'].includes(title)),
  { title: 'died', cell: ({ diedAt }) => ago(diedAt) },
  ...JOB_COLUMNS.filter(({ title }) => ['size', 'error'].includes(title)),
]

const list = command({
  name: 'dead ls',
  summary: 'show dead jobs, and why they died',
  arguments: { queue: { description: 'only of this queue', optional: true } },
  options: { after: { type: 'text', value: 'ID', description: 'only after this one' }, ...LIMIT_OPTION },
  examples: [{ line: 'klieo-bus dead ls mail', says: 'id, attempts, when, and the last error' }],
  async run({ args, options }, session) {
    const bus = await session.connect()
    const jobs = bus.admin.jobs({
      state: 'dead',
      ...(args.queue === undefined ? {} : { queue: args.queue }),
      ...(options.after === undefined ? {} : { after: options.after }),
    })
    await printJobs(session.output, jobs, COLUMNS, options.limit, 'no job is dead')
    return EXIT.done
  },
})

const retry = command({
  name: 'dead retry',
  summary: 'put the dead jobs of a queue back, with all their attempts',
  arguments: {
    queue: { description: 'the name of the queue' },
    ids: { description: 'only these; else all', optional: true, rest: true, shownAs: 'ID' },
  },
  options: {},
  examples: [
    { line: 'klieo-bus dead retry mail', says: 'says how many' },
    { line: 'klieo-bus dead retry mail 42', says: 'this one' },
  ],
  async run({ args: { queue, ids } }, session) {
    if (ids.length > 0) return forEachJob(session, ids, 'ready', (admin, id) => admin.retryJob(id))
    const bus = await session.connect()
    const retried = await bus.admin.retryDead(queue)
    await session.output.result({ queue, retried }, `${plural(retried, 'job')} of "${queue}" put back`)
    return EXIT.done
  },
})

export const COMMANDS = [list, retry]
