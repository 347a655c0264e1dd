import type { JobState, QueueInfo } from '../../index.ts'
import { command } from '../command.ts'
import { confirmed } from '../confirm.ts'
import { EXIT, Failure } from '../failure.ts'
import { type Column, printRows } from '../table.ts'
import { ago, number, plural } from '../text.ts'

const QUEUE = { description: 'the name of the queue' } as const
const PURGEABLE = ['ready', 'scheduled', 'dead'] as const satisfies readonly JobState[]

const COLUMNS: readonly Column<QueueInfo>[] = [
  { title: 'queue', cell: ({ queue }) => queue },
  { title: 'ready', right: true, cell: ({ ready }) => number(ready) },
  { title: 'scheduled', right: true, cell: ({ scheduled }) => number(scheduled) },
  { title: 'running', right: true, cell: ({ running }) => number(running) },
  { title: 'dead', right: true, cell: ({ dead }) => number(dead) },
  { title: 'oldest ready', cell: ({ oldestReadyAt }) => ago(oldestReadyAt) },
  { title: 'paused', cell: ({ pausedAt }) => ago(pausedAt) },
]

const list = command({
  name: 'queues',
  summary: 'show every queue that holds a job or is paused',
  arguments: {},
  options: {},
  examples: [
    { line: 'klieo-bus queues', says: 'ready, scheduled, running and dead jobs of each' },
    { line: 'klieo-bus queues --json', says: 'an object for each' },
  ],
  async run(_invocation, session) {
    const bus = await session.connect()
    await printRows(session.output, COLUMNS, await bus.admin.queues(), { none: 'no queue holds a job' })
    return EXIT.done
  },
})

const pause = command({
  name: 'queues pause',
  summary: 'give no more jobs of a queue to anybody; running ones go on',
  arguments: { queue: QUEUE },
  options: {},
  examples: [{ line: 'klieo-bus queues pause mail', says: 'until klieo-bus queues resume mail' }],
  async run({ args: { queue } }, session) {
    const bus = await session.connect()
    await bus.admin.pauseQueue(queue)
    await session.output.result({ queue, paused: true }, `queue "${queue}" is paused`)
    return EXIT.done
  },
})

const resume = command({
  name: 'queues resume',
  summary: 'go on with a paused queue',
  arguments: { queue: QUEUE },
  options: {},
  examples: [{ line: 'klieo-bus queues resume mail', says: 'waiting workers go on at once' }],
  async run({ args: { queue } }, session) {
    const bus = await session.connect()
    await bus.admin.resumeQueue(queue)
    await session.output.result({ queue, paused: false }, `queue "${queue}" goes on`)
    return EXIT.done
  },
})

const purge = command({
  name: 'queues purge',
  summary: 'remove the jobs of a queue that are not running',
  details: 'They are gone for good, without a dead letter. On a terminal it asks first; elsewhere it needs --yes.',
  arguments: { queue: QUEUE },
  options: {
    state: { type: 'text', value: 'STATE', description: 'only these; else all of them', choices: PURGEABLE, multiple: true },
    yes: { type: 'flag', short: 'y', description: 'do not ask' },
  },
  examples: [{ line: 'klieo-bus queues purge mail --state dead --yes', says: 'forgets the dead jobs' }],
  async run({ args: { queue }, options }, session) {
    const states = options.state as readonly (typeof PURGEABLE)[number][]
    const which = states.length === 0 ? PURGEABLE : states
    if (!(await confirmed(`Remove the ${which.join(', ')} jobs of queue "${queue}" for good?`, options.yes))) {
      throw new Failure(EXIT.failed, 'nothing was removed')
    }
    const bus = await session.connect()
    const removed = await bus.admin.purgeQueue(queue, { states: which })
    await session.output.result({ queue, removed }, `${plural(removed, 'job')} removed from "${queue}"`)
    return EXIT.done
  },
})

export const COMMANDS = [list, pause, resume, purge]
