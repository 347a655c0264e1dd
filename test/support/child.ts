/** Processes of a test's own, to be killed and stopped as no handle in this process can be. */

import { type ChildProcess, spawn } from 'node:child_process'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'

/** A line of the child's stdout; one that is no JSON object arrives as `{ text }`. */
export type Line = Readonly<Record<string, unknown>>

export interface Exit {
  readonly code: number | null
  readonly signal: NodeJS.Signals | null
}

export interface ChildOptions {
  readonly args?: readonly string[]
  /** On top of this process's own. */
  readonly env?: Readonly<Record<string, string | undefined>>
  readonly cwd?: string
  /** In a process group of its own, as a terminal starts a command: see {@link Child.interruptGroup}. @default false */
  readonly group?: boolean
}

/** The project's own Node where the one that runs the tests cannot read TypeScript. */
export const NODE = process.features.typescript ? process.execPath : fileURLToPath(new URL('../../node_modules/.bin/node', import.meta.url))

/**
 * Starts a TypeScript file in a process of its own.
 * @param file a path, or a URL relative to the test: `new URL('./worker.ts', import.meta.url)`
 */
export function startChild(file: string | URL, options: ChildOptions = {}): Child {
  const path = file instanceof URL ? fileURLToPath(file) : file
  const process_ = spawn(NODE, [path, ...(options.args ?? [])], {
    cwd: options.cwd,
    env: { ...process.env, ...options.env },
    stdio: ['pipe', 'pipe', 'pipe'],
    detached: options.group ?? false,
  })
  return new Child(process_, path)
}

interface Waiter {
  readonly matches: (line: Line) => boolean
  readonly resolve: (line: Line) => void
  readonly reject: (error: Error) => void
}

export class Child implements AsyncDisposable {
  readonly #process: ChildProcess
  readonly #file: string
  #unread: Line[] = []
  #waiters: Waiter[] = []
  #stderr = ''
  #over = false
  /** Resolves when the process is gone and all its output read; never rejects. */
  readonly exited: Promise<Exit>

  constructor(process_: ChildProcess, file: string) {
    this.#process = process_
    this.#file = file
    const exit = Promise.withResolvers<Exit>()
    this.exited = exit.promise
    createInterface({ input: process_.stdout! }).on('line', (text) => this.#read(text))
    process_.stderr!.setEncoding('utf8').on('data', (text: string) => {
      this.#stderr = (this.#stderr + text).slice(-20_000)
    })
    // Writing to a child that is gone is no error of the test's.
    process_.stdin!.on('error', () => {})
    process_.on('error', (error) => {
      this.#stderr += error.message
      this.#end()
      exit.resolve({ code: null, signal: null })
    })
    process_.on('close', (code, signal) => {
      this.#end()
      exit.resolve({ code, signal })
    })
  }

  get pid(): number {
    if (this.#process.pid === undefined) throw new Error(`${this.#file} could not be started: ${this.#stderr}`)
    return this.#process.pid
  }

  /** The last 20,000 characters of what it wrote there. */
  get stderr(): string {
    return this.#stderr
  }

  /**
   * The first unread line that matches; it counts as read, those before it do not.
   * @throws when none came within `timeoutMs` (30_000), or the process ended without one
   */
  async next<T extends Line = Line>(matches: (line: Line) => boolean = () => true, timeoutMs = 30_000): Promise<T> {
    const at = this.#unread.findIndex(matches)
    if (at >= 0) return this.#unread.splice(at, 1)[0] as T
    if (this.#over) throw this.#ended()
    const { promise, resolve, reject } = Promise.withResolvers<Line>()
    const waiter: Waiter = { matches, resolve, reject }
    this.#waiters.push(waiter)
    const timer = setTimeout(() => {
      this.#waiters = this.#waiters.filter((other) => other !== waiter)
      reject(new Error(`${this.#file} wrote no such line within ${timeoutMs} ms; stderr: ${this.#stderr}`))
    }, timeoutMs)
    try {
      return (await promise) as T
    } finally {
      clearTimeout(timer)
    }
  }

  /** The lines that nobody has read so far. */
  unread(): readonly Line[] {
    return [...this.#unread]
  }

  /** Writes a JSON line to its stdin. */
  send(message: unknown): void {
    this.#process.stdin!.write(`${JSON.stringify(message)}\n`)
  }

  /** Writes to its stdin as it is. */
  write(text: string): void {
    this.#process.stdin!.write(text)
  }

  /** Ends its stdin. */
  endInput(): void {
    this.#process.stdin!.end()
  }

  /** Sends the signal and waits for the end. */
  async kill(signal: NodeJS.Signals = 'SIGKILL'): Promise<Exit> {
    if (!this.#over) this.#process.kill(signal)
    return this.exited
  }

  /** Sends a signal and waits for nothing. */
  signal(signal: NodeJS.Signals): void {
    this.#process.kill(signal)
  }

  /** As if the machine had lost it: its connections stay open and nobody answers on them. */
  pause(): void {
    this.#process.kill('SIGSTOP')
  }

  resume(): void {
    this.#process.kill('SIGCONT')
  }

  /** What a terminal does on Ctrl-C: SIGINT to the whole group. Needs `group: true`, else it would hit the tests too. */
  interruptGroup(signal: NodeJS.Signals = 'SIGINT'): void {
    process.kill(-this.pid, signal)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.kill('SIGKILL')
  }

  #read(text: string): void {
    const line = parse(text)
    const at = this.#waiters.findIndex((waiter) => waiter.matches(line))
    if (at < 0) this.#unread.push(line)
    else this.#waiters.splice(at, 1)[0]!.resolve(line)
  }

  #end(): void {
    this.#over = true
    for (const waiter of this.#waiters.splice(0)) waiter.reject(this.#ended())
  }

  #ended(): Error {
    return new Error(`${this.#file} ended without such a line; stderr: ${this.#stderr}`)
  }
}

function parse(text: string): Line {
  try {
    const value: unknown = JSON.parse(text)
    if (typeof value === 'object' && value !== null && !Array.isArray(value)) return value as Line
  } catch {
    // Not ours: a warning, a log line.
  }
  return { text }
}
