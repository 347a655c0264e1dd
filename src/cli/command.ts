/** What a command is: data from which parsing, help and completion are made, and the function that runs. */

import type { Session } from './session.ts'

export interface ArgumentSpec {
  readonly description: string
  readonly optional?: true
  /** Takes all that follow; the last argument alone. */
  readonly rest?: true
  readonly choices?: readonly string[]
  /** Shown in the place of the argument's name. */
  readonly shownAs?: string
}

/** What an option's text becomes. `command`: a line for the shell, not empty. `duration`: milliseconds, from `500ms`, `30s`, `5m`, `1h`, `7d`. `time`: a Date, from ISO 8601. */
export interface OptionKinds {
  readonly flag: boolean
  readonly text: string
  readonly command: string
  readonly integer: number
  readonly duration: number
  readonly time: Date
}

export interface OptionSpec {
  readonly type: keyof OptionKinds
  readonly description: string
  readonly short?: string
  /** Stands for the value in the help; none for flags. */
  readonly value?: string
  /** As it would be typed. */
  readonly default?: string
  readonly choices?: readonly string[]
  readonly multiple?: true
  readonly required?: true
  /** Of an integer. */
  readonly least?: number
  readonly most?: number
}

export interface Example {
  readonly line: string
  /** What it does, or shows. */
  readonly says: string
}

type ArgumentValue<A extends ArgumentSpec> = A extends { rest: true }
  ? readonly string[]
  : A extends { optional: true }
    ? string | undefined
    : string

type OptionValue<O extends OptionSpec> = O extends { multiple: true }
  ? readonly OptionKinds[O['type']][]
  : O extends { type: 'flag' } | { default: string } | { required: true }
    ? OptionKinds[O['type']]
    : OptionKinds[O['type']] | undefined

export type ArgumentSpecs = Readonly<Record<string, ArgumentSpec>>
export type OptionSpecs = Readonly<Record<string, OptionSpec>>

export interface Invocation<A extends ArgumentSpecs, O extends OptionSpecs> {
  readonly args: { readonly [K in keyof A]: ArgumentValue<A[K]> }
  readonly options: { readonly [K in keyof O]: OptionValue<O[K]> }
}

interface CommandSpec<A extends ArgumentSpecs, O extends OptionSpecs> {
  /** One or two words: `publish`, `kv get`. */
  readonly name: string
  readonly summary: string
  /** Further sentences of the help. */
  readonly details?: string
  readonly arguments: A
  readonly options: O
  readonly examples: readonly Example[]
  /** Codes of its own, besides those of all commands. */
  readonly exitCodes?: Readonly<Record<number, string>>
  /** Whether `--url` and `--schema` mean anything to it. @default true */
  readonly connects?: boolean
  /** @returns the exit code */
  run(invocation: Invocation<A, O>, session: Session): Promise<number>
}

/** A command whose types nobody needs any more. */
export interface Command extends Omit<CommandSpec<ArgumentSpecs, OptionSpecs>, 'run'> {
  run(invocation: Invocation<ArgumentSpecs, OptionSpecs>, session: Session): Promise<number>
}

export function command<const A extends ArgumentSpecs, const O extends OptionSpecs>(spec: CommandSpec<A, O>): Command {
  return spec as unknown as Command
}

/** What every command takes. */
export const COMMON_OPTIONS = {
  json: { type: 'flag', description: 'one JSON object a line, for scripts' },
  help: { type: 'flag', short: 'h', description: 'this text' },
} as const satisfies OptionSpecs

export const CONNECTION_OPTIONS = {
  url: {
    type: 'text',
    value: 'URL',
    description: 'where the server is; else DATABASE_URL, else PG* variables, else a running `klieo-bus up`',
  },
  schema: { type: 'text', value: 'NAME', description: 'the schema of the bus; else KLIEO_SCHEMA, else klieo' },
} as const satisfies OptionSpecs

/** All options of a command: its own, then those of all. */
export function optionsOf(what: Pick<Command, 'options' | 'connects'>): OptionSpecs {
  return { ...what.options, ...(what.connects === false ? {} : CONNECTION_OPTIONS), ...COMMON_OPTIONS }
}
