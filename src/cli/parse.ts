/** From an argument vector to a command and its values, by what the command declares. */

import { parseArgs } from 'node:util'
import {
  type ArgumentSpecs,
  COMMON_OPTIONS,
  CONNECTION_OPTIONS,
  type Command,
  type Invocation,
  type OptionSpecs,
  optionsOf,
} from './command.ts'
import { UsageError } from './failure.ts'
import { nearest } from './nearest.ts'
import { typedValue } from './values.ts'

/** Options that may stand before the command. */
const LEADING: OptionSpecs = { ...CONNECTION_OPTIONS, ...COMMON_OPTIONS, version: { type: 'flag', description: '' } }

export interface Split {
  /** What stands before the command: options of all commands. */
  readonly leading: readonly string[]
  /** From the command's first word on. */
  readonly rest: readonly string[]
}

/** Finds where the command begins. */
export function splitAtCommand(argv: readonly string[]): Split {
  let at = 0
  while (at < argv.length && argv[at]!.startsWith('-') && argv[at] !== '-' && argv[at] !== '--') {
    const [name, inline] = argv[at]!.replace(/^--?/, '').split('=', 2)
    const spec = LEADING[name === 'h' ? 'help' : name!]
    at += spec !== undefined && spec.type !== 'flag' && inline === undefined ? 2 : 1
  }
  return { leading: argv.slice(0, at), rest: argv.slice(at) }
}

export interface Parsed {
  readonly invocation: Invocation<ArgumentSpecs, OptionSpecs>
  readonly json: boolean
  readonly help: boolean
  readonly url: string | undefined
  readonly schema: string | undefined
}

/** @throws UsageError: one sentence that names what is wrong */
export function parse(command: Command, argv: readonly string[]): Parsed {
  const specs = optionsOf(command)
  const { given, positionals } = read(command.name, specs, argv)
  const values: Record<string, unknown> = {}
  const help = given.has('help')
  for (const [name, spec] of Object.entries(specs)) {
    const texts = given.get(name)
    if (spec.type === 'flag') values[name] = texts !== undefined
    else if (texts === undefined && spec.required && !help) throw new UsageError(`${command.name} needs --${name} ${spec.value ?? 'VALUE'}`)
    else {
      const typed = (texts ?? (spec.default === undefined ? [] : [spec.default])).map((text) => typedValue(`--${name}`, spec, text))
      values[name] = spec.multiple ? typed : typed.at(-1)
    }
  }
  return {
    invocation: { args: help ? {} : argumentsOf(command, positionals), options: values } as Invocation<ArgumentSpecs, OptionSpecs>,
    json: values.json === true,
    help,
    url: values.url as string | undefined,
    schema: values.schema as string | undefined,
  }
}

function read(who: string, specs: OptionSpecs, argv: readonly string[]) {
  const options = Object.fromEntries(
    Object.entries(specs).map(([name, { type, short }]) => [
      name,
      { type: type === 'flag' ? ('boolean' as const) : ('string' as const), multiple: true, ...(short ? { short } : {}) },
    ]),
  )
  const { tokens } = parseArgs({ args: [...argv], options, allowPositionals: true, strict: false, tokens: true })
  const given = new Map<string, string[]>()
  const positionals: string[] = []
  for (const token of tokens) {
    if (token.kind === 'positional') positionals.push(token.value)
    if (token.kind !== 'option') continue
    const spec = Object.hasOwn(specs, token.name) ? specs[token.name] : undefined
    if (spec === undefined) throw unknownOption(who, token.rawName, specs)
    if (spec.type === 'flag') {
      if (token.value !== undefined) throw new UsageError(`${token.rawName} takes no value`)
      given.set(token.name, [])
      continue
    }
    // `--ttl --json` is a value that was forgotten; a negative number is one that was not.
    const forgotten = token.value === undefined || (!token.inlineValue && /^-./.test(token.value) && !/^-\d/.test(token.value))
    if (forgotten) throw new UsageError(`${token.rawName} needs a value: ${token.rawName} ${spec.value ?? 'VALUE'}`)
    const texts = given.get(token.name) ?? []
    if (texts.length > 0 && !spec.multiple) throw new UsageError(`${token.rawName} is given twice`)
    given.set(token.name, [...texts, token.value as string])
  }
  return { given, positionals }
}

function unknownOption(who: string, rawName: string, specs: OptionSpecs): UsageError {
  const meant = rawName.startsWith('--') ? nearest(rawName.slice(2), Object.keys(specs)) : undefined
  const dash = rawName.startsWith('--') ? '' : '; an argument that begins with - stands behind --'
  const hint = meant === undefined ? dash : `; did you mean --${meant}?`
  return new UsageError(`${who} has no option "${rawName}"${hint}`)
}

function argumentsOf({ name, arguments: specs }: Command, positionals: readonly string[]): Record<string, string | readonly string[]> {
  const values: Record<string, string | readonly string[]> = {}
  let at = 0
  for (const [argument, spec] of Object.entries(specs)) {
    const shown = spec.shownAs ?? argument.toUpperCase()
    if (positionals.length <= at && !spec.optional) throw new UsageError(`${name} needs ${shown}: ${spec.description}`)
    if (spec.rest) {
      values[argument] = positionals.slice(at)
      at = positionals.length
    } else if (at < positionals.length) values[argument] = positionals[at++]!
  }
  if (at < positionals.length) throw new UsageError(`${name} takes no argument "${positionals[at]}"`)
  return values
}
