/** Which commands there are, and where. A command loads its own file alone; help and completion load all. */

import type { Command } from './command.ts'
import { UsageError } from './failure.ts'
import { nearest } from './nearest.ts'

interface Group {
  /** The first words of its commands. */
  readonly words: readonly string[]
  load(): Promise<readonly Command[]>
}

/** In the order of the help. */
const GROUPS: readonly Group[] = [
  { words: ['up'], load: async () => (await import('./commands/up.ts')).COMMANDS },
  { words: ['migrate'], load: async () => (await import('./commands/migrate.ts')).COMMANDS },
  { words: ['doctor'], load: async () => (await import('./commands/doctor.ts')).COMMANDS },
  { words: ['publish', 'subscribe'], load: async () => (await import('./commands/pubsub.ts')).COMMANDS },
  { words: ['request', 'respond'], load: async () => (await import('./commands/requests.ts')).COMMANDS },
  { words: ['kv'], load: async () => (await import('./commands/kv.ts')).COMMANDS },
  { words: ['enqueue'], load: async () => (await import('./commands/enqueue.ts')).COMMANDS },
  { words: ['work'], load: async () => (await import('./commands/work.ts')).COMMANDS },
  { words: ['queues'], load: async () => (await import('./commands/queues.ts')).COMMANDS },
  { words: ['jobs'], load: async () => (await import('./commands/jobs.ts')).COMMANDS },
  { words: ['dead'], load: async () => (await import('./commands/dead.ts')).COMMANDS },
  { words: ['consumers'], load: async () => (await import('./commands/consumers.ts')).COMMANDS },
  { words: ['bridge'], load: async () => (await import('./commands/bridge.ts')).COMMANDS },
  { words: ['completion'], load: async () => (await import('./commands/completion.ts')).COMMANDS },
]

export async function allCommands(): Promise<Command[]> {
  return (await Promise.all(GROUPS.map(({ load }) => load()))).flat()
}

/** `queues pause` and its like, of `queues`. */
export async function siblingsOf(name: string): Promise<Command[]> {
  return (await allCommands()).filter((command) => command.name.startsWith(`${name} `))
}

export interface Found {
  readonly command: Command
  /** What follows the command's words. */
  readonly rest: readonly string[]
}

/**
 * The command that the words begin with.
 * @returns the commands of a group where only its first word was given, and that is no command by itself
 * @throws UsageError for an unknown one
 */
export async function findCommand(words: readonly string[]): Promise<Found | { readonly group: readonly Command[] }> {
  const [first = '', second] = words
  const group = GROUPS.find((one) => one.words.includes(first))
  if (!group) throw new UsageError(`there is no command "${first}"${await hint(first)}`)
  const commands = (await group.load()).filter(({ name }) => name.split(' ')[0] === first)
  const twoWords = second === undefined ? undefined : commands.find(({ name }) => name === `${first} ${second}`)
  if (twoWords) return { command: twoWords, rest: words.slice(2) }
  const oneWord = commands.find(({ name }) => name === first)
  if (oneWord) return { command: oneWord, rest: words.slice(1) }
  if (second === undefined || second === '-h' || second === '--help') return { group: commands }
  if (second.startsWith('-')) throw new UsageError(`${first} is followed by one of ${secondWords(commands).join(', ')}`)
  const meant = nearest(second, secondWords(commands))
  throw new UsageError(
    `there is no command "${first} ${second}"${meant === undefined ? `; there are ${secondWords(commands).join(', ')}` : `; did you mean "${first} ${meant}"?`}`,
  )
}

function secondWords(commands: readonly Command[]): string[] {
  return commands.flatMap(({ name }) => name.split(' ').slice(1))
}

async function hint(word: string): Promise<string> {
  const first = nearest(
    word,
    GROUPS.flatMap(({ words }) => words),
  )
  if (first !== undefined) return `; did you mean "${first}"?`
  // `klieo-bus get`, `klieo-bus pause`: the second word alone.
  const whole = (await allCommands()).find(({ name }) => name.split(' ')[1] === word)
  return whole === undefined ? '' : `; did you mean "${whole.name}"?`
}
