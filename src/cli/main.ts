#!/usr/bin/env node
/** The command line: parses, dispatches, and ends with an exit code. It uses the public API alone and holds no SQL. */

import { readFileSync } from 'node:fs'
import { EXIT, exitCodeOf, Failure, isBusFailure, ReaderGone, sentence, UsageError } from './failure.ts'
import { Output } from './output.ts'
import { parse, splitAtCommand } from './parse.ts'
import { allCommands, findCommand, siblingsOf } from './registry.ts'
import { Session } from './session.ts'

const LEAST_NODE = 22
/** The name of the command, once it is known. */
let running = ''

async function main(argv: readonly string[]): Promise<number> {
  // npm only warns of an old Node, and what fails then names a function that is missing.
  if (Number.parseInt(process.versions.node, 10) < LEAST_NODE) {
    throw new Failure(EXIT.failed, `Node ${LEAST_NODE} or newer is needed, this is ${process.version} [unsupported]`)
  }
  const { leading, rest } = splitAtCommand(argv)
  const plain = new Output(false)
  if (leading.includes('--version')) return say(plain, `${version()}\n`)
  const wantsHelp = leading.includes('--help') || leading.includes('-h')
  if (rest.length === 0 || rest[0] === 'help') {
    if (rest.length === 0 && !wantsHelp) throw new UsageError('a command is missing')
    return help(plain, rest.slice(1))
  }
  const found = await findCommand(rest)
  if ('group' in found) {
    if (!wantsHelp && rest.length === 1) {
      const words = found.group.map(({ name }) => name.split(' ')[1])
      throw new UsageError(`${rest[0]} is followed by one of ${words.join(', ')}`)
    }
    return help(plain, rest.slice(0, 1))
  }
  const { command } = found
  running = command.name
  const { invocation, json, help: asked, url, schema } = parse(command, [...leading, ...found.rest])
  if (asked) return help(plain, command.name.split(' '))
  const output = new Output(json)
  const session = new Session(output, url, schema)
  try {
    return await command.run(invocation, session)
  } finally {
    await session.close()
  }
}

async function help(output: Output, words: readonly string[]): Promise<number> {
  const { commandHelp, groupHelp, overview } = await import('./help.ts')
  if (words.length === 0) return say(output, overview(await allCommands()))
  const found = await findCommand(words)
  return say(output, 'group' in found ? groupHelp(found.group) : commandHelp(found.command, await siblingsOf(found.command.name)))
}

async function say(output: Output, text: string): Promise<number> {
  await output.write(text)
  return EXIT.done
}

function version(): string {
  return (JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as { version: string }).version
}

function tell(error: unknown): number {
  if (error instanceof ReaderGone) return EXIT.done
  const hint = error instanceof UsageError && error.seeHelp ? `; see klieo-bus ${running === '' ? '' : `${running} `}--help` : ''
  process.stderr.write(`klieo-bus: ${sentence(error)}${hint}\n`)
  if (error instanceof Failure) return error.exitCode
  return isBusFailure(error) ? exitCodeOf(error.code) : EXIT.failed
}

// What is written to a pipe or a file is written when `write` returns; and a terminal or pipe that is still read must not keep the process.
main(process.argv.slice(2)).then(
  (code) => process.exit(code),
  (error: unknown) => process.exit(tell(error)),
)
