/** What a block of `sh` tells its reader to type: whether there is such a thing. */

import type { Block } from './document.ts'

export interface Known {
  /** Of package.json. */
  readonly scripts: ReadonlySet<string>
  /** Packages that an example may install. */
  readonly packages: ReadonlySet<string>
  /** What `klieo-bus --help` says. */
  readonly help: string
  /** Whether the document, or the project, has such a file. */
  has(file: string): boolean
}

/** Programs that come from elsewhere. */
const ELSEWHERE = new Set([
  'cd',
  'curl',
  'docker',
  'echo',
  'export',
  'git',
  'kill',
  'kubectl',
  'pg_dump',
  'pg_restore',
  'printf',
  'psql',
  'python3',
  'pip',
  'createdb',
])
/** Of npm itself. */
const NPM = new Set(['ci', 'install', 'pack', 'audit'])

/** What is wrong with the commands of a block; each with its place. */
export function wrongCommands({ document, line, code }: Block, known: Known): string[] {
  return code.split('\n').flatMap((text, index) =>
    commandsOf(text).flatMap((words) => {
      const what = wrong(words, known)
      return what === undefined ? [] : [`${document}:${line + index}: ${what}`]
    }),
  )
}

/** The simple commands of a line, each as its words, without what is set before them and where they write. */
function commandsOf(line: string): string[][] {
  const text = line.replace(/(^|\s)#.*$/, '').replaceAll(/'[^']*'|"[^"]*"/g, (quoted) => quoted.replaceAll(/[\s|&;]/g, '_'))
  return text
    .split(/&&|\|\|?|;|(?<!>)&/)
    .map((command) => command.trim().split(/\s+/))
    .map((words) =>
      words.slice(
        Math.max(
          0,
          words.findIndex((word) => !/^\w+=/.test(word)),
        ),
      ),
    )
    .filter(([word]) => word !== undefined && word !== '' && !/^\w+=/.test(word))
}

function wrong([program, ...words]: readonly string[], known: Known): string | undefined {
  if (program === 'npx') return wrong(words, known)
  if (program === 'npm') return wrongNpm(words, known)
  if (program === 'klieo-bus') {
    const [command] = words
    if (command === undefined || command.startsWith('--') || new RegExp(`\\b${command}\\b`).test(known.help)) return undefined
    return `klieo-bus has no command "${command}"`
  }
  if (program === 'node') {
    const file = words.find((word) => !word.startsWith('-'))
    return file === undefined || known.has(file) ? undefined : `there is no ${file}`
  }
  if (program === 'vitest' || ELSEWHERE.has(program!) || (program!.includes('/') && known.has(program!))) return undefined
  return `"${program}" is no command that test/docs/commands.ts knows`
}

function wrongNpm([command, ...words]: readonly string[], { scripts, packages }: Known): string | undefined {
  if (command === 'run') {
    const script = words.find((word) => !word.startsWith('-'))
    return script !== undefined && scripts.has(script) ? undefined : `package.json has no script "${script}"`
  }
  if (command === 'start' || command === 'test') return scripts.has(command) ? undefined : `package.json has no script "${command}"`
  if (!NPM.has(command!)) return `npm ${command} is no command that test/docs/commands.ts knows`
  if (command !== 'install') return undefined
  const strange = words.filter((word) => !word.startsWith('-') && !/\.tgz$/.test(word)).filter((word) => !packages.has(word))
  return strange.length === 0 ? undefined : `nobody here knows the package ${strange.join(', ')}`
}
