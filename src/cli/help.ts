/** The texts of --help, from what the commands declare. */

import { COMMON_OPTIONS, CONNECTION_OPTIONS, type Command, type OptionSpecs } from './command.ts'
import { EXIT_CODES } from './failure.ts'

/** What stands on the left of its explanation; longer ones have a line of their own. */
const LONGEST_LEFT = 40
/** Longer lines are hard to read, on however wide a terminal. */
const MOST_COLUMNS = 100

export function usageOf({ name, arguments: args }: Command): string {
  const words = Object.entries(args).map(([argument, { optional, rest, shownAs }]) => {
    const word = `${shownAs ?? argument.toUpperCase()}${rest ? '...' : ''}`
    return optional ? `[${word}]` : word
  })
  return ['klieo-bus', name, ...words].join(' ')
}

export function overview(commands: readonly Command[]): string {
  return `klieo-bus: a durable message bus on PostgreSQL

${rows(commands.map((command) => [usageOf(command).slice('klieo-bus '.length), command.summary]))}

Options of all commands:
${optionRows({ ...CONNECTION_OPTIONS, ...COMMON_OPTIONS })}
  --version

Exit codes:
${codeRows(EXIT_CODES)}

klieo-bus COMMAND --help shows a command's options and examples.
`
}

export function groupHelp(commands: readonly Command[]): string {
  return `${rows(commands.map((command) => [usageOf(command), command.summary]))}\n`
}

/** @param siblings whose first word is this command */
export function commandHelp(command: Command, siblings: readonly Command[] = []): string {
  const own = Object.entries(command.arguments).map(([name, { shownAs, description }]): [string, string] => [
    shownAs ?? name.toUpperCase(),
    description,
  ])
  const common = { ...(command.connects === false ? {} : CONNECTION_OPTIONS), ...COMMON_OPTIONS }
  const codes = { ...EXIT_CODES, ...command.exitCodes }
  const parts = [
    `${usageOf(command)}\n\n${wrapped(introductionOf(command), '')}`,
    ...(own.length > 0 ? [rows(own)] : []),
    ...(siblings.length > 0 ? [rows(siblings.map((sibling) => [usageOf(sibling), sibling.summary]))] : []),
    `Options:\n${optionRows({ ...command.options, ...common })}`,
    `Examples:\n${command.examples.map(({ line, says }) => `  ${line.replaceAll('\n', '\n  ')}\n      ${says}`).join('\n')}`,
    `Exit codes:\n${codeRows(codes)}`,
  ]
  return `${parts.join('\n\n')}\n`
}

function introductionOf({ summary, details }: Command): string {
  return `${summary[0]!.toUpperCase()}${summary.slice(1)}.${details === undefined ? '' : ` ${details}`}`
}

function codeRows(codes: Readonly<Record<number, string>>): string {
  return rows(Object.entries(codes))
}

function optionRows(specs: OptionSpecs): string {
  return rows(
    Object.entries(specs).map(([name, spec]) => {
      const short = spec.short === undefined ? '' : `-${spec.short}, `
      const value = spec.type === 'flag' ? '' : ` ${spec.value ?? 'VALUE'}`
      const notes = [
        ...(spec.choices ? [spec.choices.join(', ')] : []),
        ...(spec.multiple ? ['may be repeated'] : []),
        ...(spec.default === undefined ? [] : [`default: ${spec.default}`]),
      ]
      return [`${short}--${name}${value}`, `${spec.description}${notes.length > 0 ? ` (${notes.join('; ')})` : ''}`]
    }),
  )
}

function rows(pairs: readonly (readonly [string, string])[]): string {
  const longest = Math.min(LONGEST_LEFT, Math.max(...pairs.map(([left]) => left.length)))
  const indent = ' '.repeat(longest + 4)
  return pairs
    .map(([left, right]) => {
      const text = wrapped(right, indent).trimStart()
      return left.length > longest ? `  ${left}\n${indent}${text}` : `  ${left.padEnd(longest)}  ${text}`
    })
    .join('\n')
}

/** Lines of the terminal's width, each indented. */
function wrapped(text: string, indent: string): string {
  const cells = Math.max(40, Math.min(MOST_COLUMNS, process.stdout.columns ?? MOST_COLUMNS))
  const lines: string[] = []
  let line = indent
  for (const word of text.split(' ')) {
    if (line.length + word.length > cells && line.trim() !== '') {
      lines.push(line.trimEnd())
      line = indent
    }
    line += `${word} `
  }
  return [...lines, line.trimEnd()].join('\n')
}
