import { execFileSync } from 'node:child_process'
import { beforeAll, describe, expect, test } from 'vitest'
import { commandHelp } from '../../src/cli/help.ts'
import { allCommands } from '../../src/cli/registry.ts'
import { build, complaint, klieo, shell } from './command.ts'

const commands = await allCommands()
const nowhere = { env: {} }

beforeAll(build, 60_000)

describe('--help', () => {
  test('shows every command with what it is for, the options of all, and the exit codes', async () => {
    const { code, stdout, stderr } = await klieo(['--help'], nowhere)
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' })
    for (const { name } of commands) expect(stdout).toMatch(new RegExp(`^ {2}${name}( |$)`, 'm'))
    for (const word of ['--url', '--schema', '--json', '--version', '130']) expect(stdout).toContain(word)
  })

  test.each(commands.map((command) => [command.name, command] as const))(
    'of %s shows its arguments, options and examples',
    (_name, command) => {
      const shown = commandHelp(command)
      expect(command.examples.length).toBeGreaterThan(0)
      for (const { line } of command.examples) expect(shown).toContain(line)
      for (const option of Object.keys(command.options)) expect(shown).toContain(`--${option}`)
      for (const argument of Object.values(command.arguments)) expect(shown.replaceAll(/\s+/g, ' ')).toContain(argument.description)
    },
  )

  test('stands after the command, before it, or as help COMMAND', async () => {
    const { code, stdout } = await klieo(['kv', 'get', '--help'], nowhere)
    expect(code).toBe(0)
    expect(stdout).toContain('klieo-bus kv get BUCKET KEY')
    for (const args of [
      ['help', 'kv', 'get'],
      ['--help', 'kv', 'get'],
    ])
      expect((await klieo(args, nowhere)).stdout).toBe(stdout)
  })

  test('of the first word of several commands lists them', async () => {
    expect((await klieo(['kv', '--help'], nowhere)).stdout).toContain('kv put BUCKET KEY [VALUE]')
  })

  test('of a command that is also the first word of others names them', async () => {
    expect((await klieo(['queues', '--help'], nowhere)).stdout).toContain('klieo-bus queues pause QUEUE')
  })

  test('every example is a line that a shell can read', () => {
    for (const { examples } of commands) for (const { line } of examples) execFileSync('bash', ['-n', '-c', line])
  })
})

describe('wrong usage is one sentence and exit code 2:', () => {
  const wrong: readonly (readonly [string, readonly string[], string])[] = [
    ['no command', [], 'a command is missing'],
    ['an unknown command', ['frobnicate'], 'there is no command "frobnicate"'],
    ['a mistyped command', ['publsih', 'a'], 'there is no command "publsih"; did you mean "publish"?'],
    ['the second word alone', ['put', 'a'], 'did you mean "kv put"?'],
    ['a mistyped second word', ['kv', 'gte'], 'there is no command "kv gte"; did you mean "kv get"?'],
    ['half a command', ['kv'], 'kv is followed by one of get, put'],
    ['an unknown option', ['publish', 'a', '--heder', 'x:y'], 'publish has no option "--heder"; did you mean --header?'],
    ['an option of another command', ['kv', 'get', 'a', 'b', '--exec', 'true'], 'kv get has no option "--exec"'],
    ['an option without its value', ['kv', 'put', 'a', 'b', 'c', '--ttl'], '--ttl needs a value: --ttl TIME'],
    ['an option that swallowed the next', ['kv', 'put', 'a', 'b', 'c', '--ttl', '--json'], '--ttl needs a value'],
    ['a flag with a value', ['kv', 'get', 'a', 'b', '--json=yes'], '--json takes no value'],
    ['an option twice', ['kv', 'put', 'a', 'b', 'c', '--ttl', '1s', '--ttl', '2s'], '--ttl is given twice'],
    ['a duration without a unit', ['kv', 'put', 'a', 'b', 'c', '--ttl', '30'], '--ttl is a duration such as 500ms, 30s'],
    ['a duration beyond what a timer takes', ['kv', 'put', 'a', 'b', 'c', '--ttl', '30d'], '24d at the most'],
    ['a number that is none', ['work', 'q', '--exec', 'cat', '-c', 'many'], '--concurrency is an integer from 1 to 1000, not "many"'],
    ['a number out of range', ['enqueue', 'q', 'x', '--priority', '-101'], '--priority is an integer from -100 to 100'],
    ['a time that is none', ['enqueue', 'q', 'x', '--at', 'tomorrow'], '--at is a time such as'],
    ['a header without a colon', ['publish', 'a', 'b', '-H', 'x'], '--header is NAME:VALUE'],
    ['an argument too few', ['kv', 'get', 'a'], 'kv get needs KEY: the key'],
    ['an argument too many', ['publish', 'a', 'b', 'c'], 'publish takes no argument "c"'],
    ['work without a command', ['work', 'q'], 'work needs --exec COMMAND'],
    ['work with an empty command', ['work', 'q', '--exec', ' '], '--exec must not be empty'],
    ['an argument that looks like an option', ['publish', 'a', '-5'], 'an argument that begins with - stands behind --'],
    ['a shell that there is no completion for', ['completion', 'fish'], 'completion is for bash and zsh, not "fish"'],
    ['migrate --down', ['migrate', '--down'], 'migrate has no way down: dropping what a migration made would lose the messages'],
  ]

  test.each(wrong)('%s', async (_what, args, says) => {
    const ran = await klieo(args, nowhere)
    expect(ran).toMatchObject({ code: 2, stdout: '' })
    expect(complaint(ran)).toContain(says)
  })
})

test('--version says which one it is', async () => {
  expect((await klieo(['--version'], nowhere)).stdout).toMatch(/^\d+\.\d+\.\d+\n$/)
})

describe('completion', () => {
  /** What is offered for the last word of each line. */
  const complete = async (...lines: readonly (readonly string[])[]) => {
    const probes = lines.map((words) => {
      const quoted = words.map((word) => `'${word}'`).join(' ')
      return `COMP_WORDS=(${quoted}); COMP_CWORD=${words.length - 1}; _klieo_bus; echo "\${COMPREPLY[*]}"`
    })
    const { stdout, stderr } = await shell(['source <(klieo-bus completion bash)', ...probes].join('\n'), nowhere)
    expect(stderr).toBe('')
    return stdout.split('\n').map((line) => line.split(' ').filter(Boolean))
  }

  test('for bash completes commands, their second words, options and choices', async () => {
    const some = [
      ['klieo-bus', 'pub'],
      ['klieo-bus', 'kv', 'l'],
      ['klieo-bus', 'work', 'letters', '--conc'],
      ['klieo-bus', 'completion', ''],
    ]
    const every = commands.map(({ name }) => ['klieo-bus', ...name.split(' '), '--he'])
    const [publish, kv, option, shells, ...helps] = await complete(...some, ...every)
    expect(publish).toEqual(['publish'])
    expect(kv).toContain('lease')
    expect(option).toEqual(['--concurrency'])
    expect(shells).toEqual(expect.arrayContaining(['bash', 'zsh']))
    for (const [at, { name }] of commands.entries()) expect(helps[at], name).toContain('--help')
  })

  test('for zsh is a script that zsh can read, and completes a command', async ({ skip }) => {
    const { stdout } = await klieo(['completion', 'zsh'], nowhere)
    expect(stdout).toContain('#compdef klieo-bus')
    for (const { name } of commands) expect(stdout).toContain(`'${name}'`)
    try {
      execFileSync('zsh', ['-n', '-c', stdout])
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return skip('there is no zsh')
      throw error
    }
    // What _describe is given is what it would show.
    const probe = `compdef() { : }; _files() { : }; _describe() { print -l -- "\${(@P)2}" }
      ${stdout}
      words=(klieo-bus kv ''); CURRENT=3; _klieo_bus`
    expect(execFileSync('zsh', ['-f', '-c', probe], { encoding: 'utf8' })).toContain('put:write a key')
  })
})
