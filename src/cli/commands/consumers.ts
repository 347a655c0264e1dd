import type { DurableInfo } from '../../index.ts'
import { command } from '../command.ts'
import { EXIT } from '../failure.ts'
import { type Column, printRows } from '../table.ts'
import { ago, number } from '../text.ts'
import { startOf } from '../values.ts'

const COLUMNS: readonly Column<DurableInfo>[] = [
  { title: 'durable', cell: ({ durable }) => durable },
  { title: 'filter', flexible: true, cell: ({ filter }) => filter },
  { title: 'pending', right: true, cell: ({ pending }) => number(pending) },
  { title: 'in flight', right: true, cell: ({ inFlight }) => number(inFlight) },
  { title: 'redelivering', right: true, cell: ({ redelivering }) => number(redelivering) },
  { title: 'last active', cell: ({ lastActiveAt }) => ago(lastActiveAt) },
]

const list = command({
  name: 'consumers ls',
  summary: 'show every durable, and how far it is',
  arguments: {},
  options: {},
  examples: [{ line: 'klieo-bus consumers ls', says: 'pending, in flight, redelivering, last active' }],
  async run(_invocation, session) {
    const bus = await session.connect()
    await printRows(session.output, COLUMNS, await bus.admin.durables(), { none: 'no durable' })
    return EXIT.done
  },
})

const remove = command({
  name: 'consumers rm',
  summary: 'delete durables: what they have not had they will never have',
  arguments: { durables: { description: 'the name of a durable', rest: true, shownAs: 'DURABLE' } },
  options: {},
  examples: [{ line: 'klieo-bus consumers rm billing', says: 'its messages need not be kept any more' }],
  exitCodes: { 3: 'there is no such durable' },
  async run({ args: { durables } }, session) {
    const bus = await session.connect()
    for (const durable of durables) {
      await bus.pubsub.deleteDurable(durable)
      await session.output.result({ durable, removed: true }, `durable "${durable}" removed`)
    }
    return EXIT.done
  },
})

const seek = command({
  name: 'consumers seek',
  summary: 'move a durable to another place of the log',
  details: 'What its members hold is not theirs any more.',
  arguments: {
    durable: { description: 'the name of the durable' },
    where: { description: 'all, new, the number of the first message to come again, or a time such as 2026-01-31T12:00:00Z' },
  },
  options: {},
  examples: [
    { line: 'klieo-bus consumers seek billing all', says: 'everything that is stored comes again' },
    { line: 'klieo-bus consumers seek billing 2026-01-31T12:00:00Z', says: 'what was published since then' },
  ],
  exitCodes: { 3: 'there is no such durable' },
  async run({ args: { durable, where } }, session) {
    const start = startOf('WHERE', where)
    const bus = await session.connect()
    await bus.admin.seekDurable(durable, start)
    await session.output.result({ durable, start }, `durable "${durable}" begins at ${where}`)
    return EXIT.done
  },
})

export const COMMANDS = [list, remove, seek]
