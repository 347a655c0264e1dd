/**
 * Runs a command of the user's for a job, message or request: its payload on standard input, its headers in the environment.
 *
 *   running ── exits ──▶ ended
 *      ├── told to stop (its lease is lost, nobody waits) ── SIGTERM, after 5 s SIGKILL ──▶ ended
 *      └── killed (the second Ctrl-C) ── SIGKILL ──▶ ended
 *
 * It has a process group of its own: Ctrl-C in the terminal then reaches klieo-bus alone, which lets it end, and a shell's children are
 * told to stop along with the shell.
 */

import { type ChildProcess, spawn } from 'node:child_process'
import type { Headers } from '../index.ts'
import { EXIT, Failure } from './failure.ts'

const KILL_AFTER_MS = 5_000
/** A program that it left behind may hold its output open for ever. */
const OUTPUT_MAY_TAKE_MS = 1_000
const TAIL_CHARACTERS = 2_000
/** A single variable of Linux takes 128 KiB; what does not fit is left out, and KLIEO_HEADERS with it. */
const LARGEST_VARIABLE = 100_000

export interface ExecRequest {
  readonly command: string
  readonly input: Uint8Array
  readonly env: Readonly<Record<string, string>>
  /** Aborted: it is to stop. */
  readonly stop?: AbortSignal
  /** Aborted: at once. */
  readonly kill?: AbortSignal
  /** Takes what it writes on standard output; rejects when it cannot. */
  onOutput(chunk: Buffer): Promise<void>
  /** Takes what it writes on standard error, besides being kept. */
  onError(chunk: Buffer): void
}

export interface ExecResult {
  readonly code: number | null
  readonly signal: NodeJS.Signals | null
  /** The end of what it wrote on standard error. */
  readonly tail: string
}

/** @throws Failure when it could not be started; what `onOutput` throws */
export async function exec(request: ExecRequest): Promise<ExecResult> {
  const { command, input, env, stop, kill } = request
  const child = spawn(command, { shell: true, detached: process.platform !== 'win32', stdio: 'pipe', env: { ...process.env, ...env } })
  const { promise: exited, resolve, reject } = Promise.withResolvers<{ code: number | null; signal: NodeJS.Signals | null }>()
  child.on('error', (error) => reject(new Failure(EXIT.failed, `the command could not be started: ${error.message}`)))
  child.on('exit', (code, signal) => resolve({ code, signal }))
  // It need not read what it is given.
  child.stdin.on('error', () => {}).end(input)
  let tail = ''
  child.stderr.on('data', (chunk: Buffer) => {
    tail = (tail + chunk.toString('utf8')).slice(-2 * TAIL_CHARACTERS)
    request.onError(chunk)
  })
  const output = pump(child, request)
  const killing = new Killing(child, stop, kill)
  try {
    // When its output cannot be written any more it is not needed any more.
    const failed = output.then(() => new Promise<never>(() => {}))
    const ended = await Promise.race([exited, failed])
    await Promise.race([output, new Promise<void>((done) => setTimeout(done, OUTPUT_MAY_TAKE_MS).unref())])
    return { ...ended, tail: tail.trim().slice(-TAIL_CHARACTERS) }
  } catch (error) {
    killing.stop()
    throw error
  } finally {
    killing.end()
    for (const stream of [child.stdout, child.stderr]) stream.destroy()
  }
}

async function pump(child: ChildProcess, { onOutput }: ExecRequest): Promise<void> {
  try {
    for await (const chunk of child.stdout as AsyncIterable<Buffer>) await onOutput(chunk)
  } catch (error) {
    // Destroyed above, when it was waited for long enough.
    if ((error as NodeJS.ErrnoException).code !== 'ERR_STREAM_PREMATURE_CLOSE') throw error
  }
}

class Killing {
  readonly #child: ChildProcess
  readonly #stop: AbortSignal | undefined
  readonly #kill: AbortSignal | undefined
  #timer: NodeJS.Timeout | undefined
  readonly #onStop = () => this.stop()
  readonly #onKill = () => signalGroup(this.#child, 'SIGKILL')

  constructor(child: ChildProcess, stop: AbortSignal | undefined, kill: AbortSignal | undefined) {
    this.#child = child
    this.#stop = stop
    this.#kill = kill
    stop?.addEventListener('abort', this.#onStop)
    kill?.addEventListener('abort', this.#onKill)
    if (stop?.aborted) this.stop()
    if (kill?.aborted) this.#onKill()
  }

  stop(): void {
    signalGroup(this.#child, 'SIGTERM')
    this.#timer ??= setTimeout(() => signalGroup(this.#child, 'SIGKILL'), KILL_AFTER_MS)
    this.#timer.unref()
  }

  end(): void {
    if (this.#child.exitCode !== null || this.#child.signalCode !== null) clearTimeout(this.#timer)
    this.#stop?.removeEventListener('abort', this.#onStop)
    this.#kill?.removeEventListener('abort', this.#onKill)
  }
}

/** Of a command with a process group of its own: the signal reaches what it has started, too. */
export function signalGroup(child: ChildProcess, signal: NodeJS.Signals): void {
  if (child.pid === undefined || child.exitCode !== null || child.signalCode !== null) return
  try {
    if (process.platform === 'win32') child.kill(signal)
    else process.kill(-child.pid, signal)
  } catch {
    // Gone meanwhile.
  }
}

/** Why a command did not succeed, in words that are kept as the error of its job. */
export function failureOf({ code, signal, tail }: ExecResult): string {
  const how = signal === null ? `exit code ${code}` : `ended by ${signal}`
  return tail === '' ? how : `${how}: ${tail}`
}

/**
 * The headers as variables: `KLIEO_HEADER_TRACE_ID` for `trace-id`, and KLIEO_HEADERS with all of them as JSON, since names may differ in
 * what a variable's name cannot hold.
 */
export function headerVariables(headers: Headers): Record<string, string> {
  const variables: Record<string, string> = {}
  for (const [name, value] of Object.entries(headers)) {
    variables[`KLIEO_HEADER_${name.toUpperCase().replaceAll(/[^A-Z0-9]/g, '_')}`] = value
  }
  const all = JSON.stringify(headers)
  return Buffer.byteLength(all) > LARGEST_VARIABLE ? variables : { ...variables, KLIEO_HEADERS: all }
}
