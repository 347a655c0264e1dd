/** This side of the supervisor: see embedded-supervisor.ts for what it does and why it is a process. */

import { type ChildProcess, spawn } from 'node:child_process'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { BusError } from '../core/index.ts'
import type { Answer, Command, Event } from './embedded-supervisor.ts'

type WithoutId<T> = T extends unknown ? Omit<T, 'id'> : never

/** How much of the server's log an error quotes. */
const TAIL_LINES = 30

/** A command's reach into the event loop: counted, because several may wait at once. */
interface Refable {
  ref?(): unknown
  unref?(): unknown
}

export class Supervision {
  readonly #process: ChildProcess
  readonly #onLog: ((line: string) => void) | undefined
  readonly #pending = new Map<number, PromiseWithResolvers<Answer>>()
  readonly #exited = Promise.withResolvers<void>()
  #lastId = 0
  #waiting = 0
  #failure: BusError | undefined
  #tail: string[] = []
  #serverGone = Promise.withResolvers<void>()

  constructor(onLog?: (line: string) => void) {
    this.#onLog = onLog
    // In the sources this module ends in .ts and so does the other; in dist both end in .js.
    const file = new URL(import.meta.url.endsWith('.ts') ? './embedded-supervisor.ts' : './embedded-supervisor.js', import.meta.url)
    // Options of this process's Node (a debugger, a loader, coverage) are not meant for that one.
    const { NODE_OPTIONS: _, NODE_V8_COVERAGE: __, ...env } = process.env
    this.#process = spawn(process.execPath, [fileURLToPath(file)], { cwd: '/', detached: true, env, stdio: ['pipe', 'pipe', 'pipe'] })
    let complaint = ''
    this.#process.stderr!.setEncoding('utf8').on('data', (text: string) => {
      complaint = (complaint + text).slice(-4_000)
    })
    this.#process.stdin!.on('error', () => {})
    createInterface({ input: this.#process.stdout! }).on('line', (line) => this.#hear(JSON.parse(line) as Answer | Event))
    this.#process.on('error', (error) => this.#fail(`the embedded server's supervisor could not be started: ${error.message}`, error))
    this.#process.on('close', (code, signal) => {
      const how = signal ? `by ${signal}` : `with code ${code}`
      this.#fail(`the embedded server's supervisor ended ${how}${complaint ? `: ${complaint}` : ''}`)
      this.#exited.resolve()
    })
    this.#hold(false)
  }

  /** The last lines of the server's log. */
  get tail(): string {
    return this.#tail.join('\n')
  }

  /** Resolves when the server that was started last is gone, and the supervisor with it or not. */
  get serverGone(): Promise<void> {
    return this.#serverGone.promise
  }

  async startServer(command: Omit<Extract<Command, { do: 'start' }>, 'id' | 'do'>): Promise<number> {
    this.#serverGone = Promise.withResolvers()
    this.#tail = []
    const { pid } = await this.request({ do: 'start', ...command })
    return pid!
  }

  /** @throws unavailable when the supervisor is gone or could not do it */
  async request(command: WithoutId<Command>): Promise<Answer> {
    if (this.#failure) throw this.#failure
    const id = ++this.#lastId
    const pending = Promise.withResolvers<Answer>()
    this.#pending.set(id, pending)
    this.#hold(true)
    try {
      this.#process.stdin!.write(`${JSON.stringify({ id, ...command })}\n`)
      const answer = await pending.promise
      if (answer.error !== undefined) throw new BusError('unavailable', `the embedded server: ${answer.error}`)
      return answer
    } finally {
      this.#pending.delete(id)
      this.#hold(false)
    }
  }

  /** Ends the server and the supervisor; the data directory goes too unless it is kept. */
  async end(signal: NodeJS.Signals): Promise<void> {
    this.#hold(true)
    try {
      await this.request({ do: 'end', signal })
      this.#process.stdin!.end()
      await this.#exited.promise
    } finally {
      this.#hold(false)
    }
  }

  #hear(message: Answer | Event): void {
    if ('id' in message) {
      this.#pending.get(message.id)?.resolve(message)
    } else if (message.event === 'log') {
      this.#tail = [...this.#tail, ...message.lines].slice(-TAIL_LINES)
      for (const line of message.lines) this.#onLog?.(line)
    } else {
      this.#serverGone.resolve()
    }
  }

  #fail(text: string, cause?: unknown): void {
    this.#failure ??= new BusError('unavailable', text, { cause })
    this.#serverGone.resolve()
    for (const { reject } of this.#pending.values()) reject(this.#failure)
  }

  /** A server that nobody waits for must not keep a process alive; a command that somebody waits for must. */
  #hold(hold: boolean): void {
    if (hold) this.#waiting++
    else if (this.#waiting > 0) this.#waiting--
    const { stdin, stdout, stderr } = this.#process
    for (const handle of [this.#process, stdin, stdout, stderr] as Refable[]) {
      if (this.#waiting > 0) handle.ref?.()
      else handle.unref?.()
    }
  }
}
