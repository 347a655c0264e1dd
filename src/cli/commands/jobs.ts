import type { Admin, JobDetails, JobInfo, JobState } from '../../index.ts'
import { command } from '../command.ts'
import { EXIT, Failure, sentence } from '../failure.ts'
import type { Output } from '../output.ts'
import type { Session } from '../session.ts'
import { type Column, printRows } from '../table.ts'
import { ago, bytes, payloadFields, printable, shownPayload } from '../text.ts'

const STATES = ['ready', 'scheduled', 'running', 'dead'] as const satisfies readonly JobState[]
const IDS = { description: 'the id of a job, as `jobs ls` shows it', rest: true, shownAs: 'ID' } as const

const COLOUR = { ready: 'green', scheduled: 'yellow', running: 'cyan', dead: 'red' } as const

export const JOB_COLUMNS: readonly Column<JobInfo>[] = [
  { title: 'id', right: true, cell: ({ id }) => id },
  { title: 'queue', cell: ({ queue }) => queue },
  { title: 'state', cell: ({ state }) => state },
  { title: 'attempts', right: true, cell: ({ attempts, maxAttempts }) => `${attempts}/${maxAttempts}` },
  { title: 'priority', right: true, cell: ({ priority }) => String(priority) },
  { title: 'enqueued', cell: ({ enqueuedAt }) => ago(enqueuedAt) },
  { title: 'size', right: true, cell: ({ payloadBytes }) => bytes(payloadBytes) },
  { title: 'worker', flexible: true, cell: ({ workerId }) => workerId ?? '' },
  { title: 'error', flexible: true, cell: ({ lastError }) => lastError ?? '' },
]

export const LIMIT_OPTION = {
  limit: { type: 'integer', value: 'N', description: 'at most so many; 0: all', default: '100', least: 0 },
} as const

/** Prints jobs page by page, so that a million of them need no memory. */
export async function printJobs(
  output: Output,
  jobs: AsyncIterable<JobInfo>,
  columns: readonly Column<JobInfo>[],
  limit: number,
  none: string,
): Promise<void> {
  let shown = 0
  let page: JobInfo[] = []
  let more = false
  for await (const job of jobs) {
    if (limit > 0 && shown === limit) {
      more = true
      break
    }
    shown++
    if (output.json) await output.object(job)
    else page.push(job)
    if (limit === 0 && page.length === 1_000) {
      await printRows(output, columns, page, { none })
      page = []
    }
  }
  if (!output.json && (page.length > 0 || shown === 0)) await printRows(output, columns, page, { none })
  if (more && !output.json) output.note(`there are more: --limit 0 shows all, --after ${page.at(-1)?.id ?? ''} the next`)
}

const list = command({
  name: 'jobs ls',
  summary: 'show jobs, in the order of their ids',
  arguments: { queue: { description: 'only of this queue', optional: true } },
  options: {
    state: { type: 'text', value: 'STATE', description: 'only these', choices: STATES },
    after: { type: 'text', value: 'ID', description: 'only after this one' },
    ...LIMIT_OPTION,
  },
  examples: [
    { line: 'klieo-bus jobs ls', says: 'the first hundred of all queues' },
    { line: 'klieo-bus jobs ls mail --state running', says: 'who works on what' },
  ],
  async run({ args, options }, session) {
    const bus = await session.connect()
    const jobs = bus.admin.jobs({
      ...(args.queue === undefined ? {} : { queue: args.queue }),
      ...(options.state === undefined ? {} : { state: options.state as JobState }),
      ...(options.after === undefined ? {} : { after: options.after }),
    })
    await printJobs(session.output, jobs, JOB_COLUMNS, options.limit, 'no such job')
    return EXIT.done
  },
})

const show = command({
  name: 'jobs show',
  summary: 'show all of a job, with its headers and payload',
  arguments: { id: { description: 'the id of the job' } },
  options: {},
  examples: [{ line: 'klieo-bus jobs show 42', says: 'state, times, worker, last error, headers, payload' }],
  exitCodes: { 3: 'there is no such job (any more)' },
  async run({ args }, session) {
    const { output } = session
    const bus = await session.connect()
    const job = await bus.admin.job(args.id)
    if (job === null) throw new Failure(EXIT.absent, `there is no job "${args.id}" (any more)`)
    const { payload, ...rest } = job
    if (output.json) await output.object({ ...rest, ...payloadFields('payload', payload) })
    else await output.line(details(output, job))
    return EXIT.done
  },
})

function details(output: Output, job: JobDetails): string {
  const at = (time: Date | undefined) => time && `${time.toISOString()} (${time.getTime() > Date.now() ? 'to come' : ago(time)})`
  const rows: readonly (readonly [string, string | undefined])[] = [
    ['job', job.id],
    ['queue', job.queue],
    ['state', output.style(COLOUR[job.state], job.state)],
    ['attempts', `${job.attempts} of ${job.maxAttempts}`],
    ['priority', String(job.priority)],
    ['enqueued', at(job.enqueuedAt)],
    ['due', at(job.runAt)],
    ['leased until', at(job.leasedUntil)],
    ['worker', job.workerId],
    ['dedup key', job.dedupKey],
    ['died', at(job.diedAt)],
    ['last error', job.lastError],
    ...Object.entries(job.headers).map(([name, value]) => [`header ${name}`, value] as const),
    ['payload', `${shownPayload(job.payload)}`],
  ]
  const shown = rows.filter((row): row is readonly [string, string] => row[1] !== undefined && row[1] !== '')
  const longest = Math.max(...shown.map(([name]) => name.length))
  return shown
    .map(([name, value]) => `${output.style('bold', name.padEnd(longest))}  ${name === 'state' ? value : printable(value)}`)
    .join('\n')
}

/** Does something to each job; what cannot be done to one does not keep the others from it. */
export async function forEachJob(
  session: Session,
  ids: readonly string[],
  done: string,
  act: (admin: Admin, id: string) => Promise<void>,
): Promise<number> {
  const { output } = session
  const bus = await session.connect()
  let failure: unknown
  for (const id of ids) {
    try {
      await act(bus.admin, id)
      await output.report({ id, [done]: true }, `job ${id} ${done}`)
    } catch (error) {
      if (ids.length === 1) throw error
      failure ??= error
      output.warn(`job ${id}: ${sentence(error)}`)
    }
  }
  if (failure !== undefined) throw new Failure(EXIT.failed, 'some of the jobs were left as they are')
  return EXIT.done
}

const retry = command({
  name: 'jobs retry',
  summary: 'make dead or waiting jobs ready now',
  details: 'A dead job gets all its attempts anew.',
  arguments: { ids: IDS },
  options: {},
  examples: [{ line: 'klieo-bus jobs retry 42 43', says: 'both are ready' }],
  exitCodes: { 3: 'there is no such job', 4: 'the job is running' },
  run: ({ args }, session) => forEachJob(session, args.ids, 'ready', (admin, id) => admin.retryJob(id)),
})

const cancel = command({
  name: 'jobs cancel',
  summary: 'make jobs dead, whoever works on them',
  details: 'The holder of a running one is told at its next heartbeat, and its ack is refused. The dead letter has the reason.',
  arguments: { ids: IDS },
  options: { reason: { type: 'text', value: 'TEXT', description: 'goes with the dead letter', default: 'cancelled' } },
  examples: [{ line: "klieo-bus jobs cancel 42 --reason 'wrong address'", says: 'the job is dead' }],
  exitCodes: { 3: 'there is no such job', 4: 'an open transaction is about to settle it' },
  run: ({ args, options }, session) => forEachJob(session, args.ids, 'cancelled', (admin, id) => admin.cancelJob(id, options.reason)),
})

const remove = command({
  name: 'jobs rm',
  summary: 'remove jobs without a trace',
  arguments: { ids: IDS },
  options: {},
  examples: [{ line: 'klieo-bus jobs rm 42', says: 'it never was' }],
  exitCodes: { 3: 'there is no such job', 4: 'the job is running: cancel it first' },
  run: ({ args }, session) => forEachJob(session, args.ids, 'removed', (admin, id) => admin.removeJob(id)),
})

export const COMMANDS = [list, show, retry, cancel, remove]
