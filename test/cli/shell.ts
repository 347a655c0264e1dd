/** Examples of a document, typed into a shell one after the other, as a reader would. */

import { type ChildProcess, spawn } from 'node:child_process'
import { expect } from 'vitest'
import { eventually } from '../support/wait.ts'

export interface Example {
  readonly code: string
  /** Each line that is printed, with … for anything. */
  readonly prints: readonly string[]
}

/** @param of the language and what stands after it */
export function examplesOf(markdown: string, of: RegExp): Example[] {
  return [...markdown.matchAll(/^```(sh[^\n]*)\n([\s\S]*?)^```/gm)]
    .filter(([, info]) => of.test(info!))
    .map(([, , code]) => ({ code: code!, prints: [...code!.matchAll(/# → (.*)$/gm)].map(([, text]) => text!) }))
}

function matches(printed: string, wanted: string): boolean {
  const pattern = wanted.split('…').map((part) => part.replaceAll(/[.*+?^${}()|[\]\\]/g, '\\$&'))
  return new RegExp(`^${pattern.join('.*')}$`).test(printed)
}

export interface Place {
  readonly cwd: string
  readonly env: NodeJS.ProcessEnv
}

export async function runInOrder(examples: readonly Example[], { cwd, env }: Place): Promise<void> {
  await using shell = new Shell(spawn('bash', [], { cwd, env, stdio: 'pipe', detached: true }))
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
