/** Completion scripts, from what the commands declare. They ask nobody: a key press must not wait for a server. */

import { type Command, optionsOf } from './command.ts'
import { UsageError } from './failure.ts'

interface Word {
  readonly text: string
  readonly says: string
}

interface Tree {
  /** What may follow the words of a command, the first word of several, or nothing. */
  readonly after: ReadonlyMap<string, readonly Word[]>
  /** What may follow an option of a command: `jobs ls:--state`. */
  readonly choices: ReadonlyMap<string, readonly string[]>
}

/** @throws UsageError for a shell that there is none for */
export function completionScript(shell: string, commands: readonly Command[]): string {
  if (shell === 'bash') return bash(treeOf(commands))
  if (shell === 'zsh') return zsh(treeOf(commands))
  throw new UsageError(`completion is for bash and zsh, not "${shell}"`)
}

function treeOf(commands: readonly Command[]): Tree {
  const after = new Map<string, Word[]>([['', []]])
  const choices = new Map<string, readonly string[]>()
  const add = (path: string, word: Word) => {
    const words = after.get(path) ?? []
    if (!words.some(({ text }) => text === word.text)) words.push(word)
    after.set(path, words)
  }
  for (const command of commands) {
    const { name, summary } = command
    const [first = '', second] = name.split(' ')
    const siblings = commands.filter((other) => other.name.startsWith(`${first} `)).map((other) => other.name.split(' ')[1])
    add('', { text: first, says: second === undefined ? summary : siblings.join(', ') })
    if (second !== undefined) add(first, { text: second, says: summary })
    for (const { choices: some = [], description } of Object.values(command.arguments)) {
      for (const text of some) add(name, { text, says: description })
    }
    for (const [option, { description, choices: some }] of Object.entries(optionsOf(command))) {
      add(name, { text: `--${option}`, says: description })
      if (some) choices.set(`${name}:--${option}`, some)
    }
  }
  add('', { text: 'help', says: 'what there is' })
  add('', { text: '--version', says: 'which one this is' })
  return { after, choices }
}

function quote(text: string): string {
  return `'${text.replaceAll("'", "'\\''")}'`
}

function paths({ after }: Tree): string {
  return [...after.keys()].filter(Boolean).map(quote).join('|')
}

function bash(tree: Tree): string {
  const cases = (entries: Iterable<readonly [string, readonly string[]]>) =>
    [...entries].map(([path, words]) => `    ${quote(path)}) words=${quote(words.join(' '))} ;;`).join('\n')
  return `# Completion of klieo-bus for bash: source <(klieo-bus completion bash)
_klieo_bus() {
  local path='' word words='' i
  local current="\${COMP_WORDS[COMP_CWORD]}" previous="\${COMP_WORDS[COMP_CWORD-1]}"
  for ((i = 1; i < COMP_CWORD; i++)); do
    word="\${path:+$path }\${COMP_WORDS[i]}"
    case "$word" in
    ${paths(tree)}) path="$word" ;;
    esac
  done
  case "$path:$previous" in
${cases(tree.choices)}
  *)
    case "$path" in
${cases([...tree.after].map(([path, words]) => [path, words.map(({ text }) => text)] as const))}
    esac
    ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o default -F _klieo_bus klieo-bus
`
}

function zsh(tree: Tree): string {
  const entries = (words: readonly Word[]) => words.map(({ text, says }) => quote(`${text}:${says}`)).join(' ')
  const afterCases = [...tree.after].map(([path, words]) => `    (${quote(path)}) entries=(${entries(words)}) ;;`).join('\n')
  const choiceCases = [...tree.choices].map(([path, words]) => `  (${quote(path)}) entries=(${words.map(quote).join(' ')}) ;;`).join('\n')
  return `#compdef klieo-bus
# Completion of klieo-bus for zsh: source <(klieo-bus completion zsh), after compinit
_klieo_bus() {
  local command_path='' word
  local -a entries
  integer i
  for ((i = 2; i < CURRENT; i++)); do
    word="\${command_path:+$command_path }$words[i]"
    case "$word" in
    (${paths(tree)}) command_path="$word" ;;
    esac
  done
  case "$command_path:$words[CURRENT-1]" in
${choiceCases}
  (*)
    case "$command_path" in
${afterCases}
    esac
    ;;
  esac
  _describe 'klieo-bus' entries || _files
}
compdef _klieo_bus klieo-bus
`
}
