import type { Finding } from '../../index.ts'
import { command } from '../command.ts'
import { connectionOf, explained } from '../connection.ts'
import { EXIT } from '../failure.ts'
import { plural, printable } from '../text.ts'

const MARK = { ok: 'ok', notice: 'notice', warning: 'warning', error: 'error' } as const
const COLOUR = { ok: 'green', notice: 'cyan', warning: 'yellow', error: 'red' } as const

const doctor = command({
  name: 'doctor',
  summary: 'look for what is wrong, and say what to do about it',
  details:
    'Only looks: at the version, the schema, rights, wake-ups, old snapshots, bloat, the notification queue, durables and dead jobs.',
  arguments: {},
  options: {},
  examples: [
    { line: 'klieo-bus doctor', says: 'a line for each finding, and what to do' },
    { line: 'klieo-bus doctor --json', says: 'code, level, message and advice of each' },
  ],
  exitCodes: { 0: 'nothing is wrong', 1: 'a warning or an error was found, or it could not look' },
  async run(_invocation, { output, target }) {
    const { PostgresBus } = await import('../../index.ts')
    const findings: readonly Finding[] = await explained(target, () => PostgresBus.diagnose(connectionOf(target)))
    const wrong = findings.filter(({ level }) => level === 'warning' || level === 'error').length
    for (const finding of findings) {
      const { level, message, advice } = finding
      const todo = advice === undefined ? '' : `\n         ${printable(advice)}`
      await output.result(finding, `${output.style(COLOUR[level], MARK[level].padEnd(7))}  ${printable(message)}${todo}`)
    }
    if (!output.json) await output.line(wrong === 0 ? 'nothing is wrong' : `${plural(wrong, 'finding')} to look at`)
    return wrong === 0 ? EXIT.done : EXIT.failed
  },
})

export const COMMANDS = [doctor]
