/** The built command line, run as a person or a script runs it. */

import { execFile, spawn } from 'node:child_process'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { Child, type Line, NODE } from '../support/child.ts'
import { databaseUrl } from '../support/server.ts'

const root = join(import.meta.dirname, '..', '..')
export const MAIN = join(root, 'dist', 'cli', 'main.js')

/** For `beforeAll`. */
export async function build(): Promise<void> {
  await promisify(execFile)(process.execPath, ['scripts/build.ts'], { cwd: root })
}

export interface Ran {
  readonly code: number | null
  readonly signal: NodeJS.Signals | null
  readonly stdout: string
  readonly stderr: string
  /** Of --json. */
  readonly objects: Record<string, unknown>[]
}

class Finished implements Ran {
  readonly code: number | null
  readonly signal: NodeJS.Signals | null
  readonly stdout: string
  readonly stderr: string

  constructor(code: number | null, signal: NodeJS.Signals | null, stdout: string, stderr: string) {
    this.code = code
    this.signal = signal
    this.stdout = stdout
    this.stderr = stderr
  }

  get objects(): Record<string, unknown>[] {
    return this.stdout
      .split('\n')
      .filter(Boolean)
      .map((line) => JSON.parse(line) as Record<string, unknown>)
  }
}

export interface RunOptions {
  readonly input?: string | Uint8Array
  /** Instead of the server of the tests; what is undefined is taken away. */
  readonly env?: Readonly<Record<string, string | undefined>>
  readonly cwd?: string
}

/** Nothing of this process's own settings, but for the server. */
function environment(env: RunOptions['env'] = { DATABASE_URL: databaseUrl() }): NodeJS.ProcessEnv {
  const { PATH, HOME, USER, TMPDIR } = process.env
  return { PATH, HOME, USER, TMPDIR, ...env }
}

export async function klieo(args: readonly string[], options: RunOptions = {}): Promise<Ran> {
  return finished(
    spawn(NODE, [MAIN, ...args], { cwd: options.cwd ?? tmpdir(), env: environment(options.env), stdio: 'pipe' }),
    options.input,
  )
}

/** Runs a line of a shell in which `klieo-bus` is the built command. */
export async function shell(line: string, options: RunOptions = {}): Promise<Ran> {
  const script = `klieo-bus() { "${NODE}" "${MAIN}" "$@"; }\n${line}`
  return finished(
    spawn('bash', ['-c', script], { cwd: options.cwd ?? tmpdir(), env: environment(options.env), stdio: 'pipe' }),
    options.input,
  )
}

async function finished(child: ReturnType<typeof spawn>, input: string | Uint8Array = ''): Promise<Ran> {
  let stdout = ''
  let stderr = ''
  child.stdout!.setEncoding('utf8').on('data', (text: string) => {
    stdout += text
  })
  child.stderr!.setEncoding('utf8').on('data', (text: string) => {
    stderr += text
  })
  child.stdin!.on('error', () => {}).end(input)
  const { promise, resolve, reject } = Promise.withResolvers<Ran>()
  child.on('error', reject)
  child.on('close', (code, signal) => resolve(new Finished(code, signal, stdout, stderr)))
  return promise
}

/** One that goes on until it is told to stop. In a process group of its own, as a terminal starts it. */
export function start(args: readonly string[], options: RunOptions = {}): Child {
  const child = spawn(NODE, [MAIN, ...args], {
    cwd: options.cwd ?? tmpdir(),
    env: environment(options.env),
    stdio: 'pipe',
    detached: true,
  })
  if (options.input !== undefined) child.stdin!.write(options.input)
  return new Child(child, `klieo-bus ${args.join(' ')}`)
}

export const text = (wanted: string) => (line: Line) => line.text === wanted

/** A directory that the account of an embedded server can enter. */
export async function directory(): Promise<{ readonly path: string } & AsyncDisposable> {
  const path = await mkdtemp(join(tmpdir(), 'klieo-cli-'))
  await promisify(execFile)('chmod', ['755', path])
  return { path, [Symbol.asyncDispose]: () => rm(path, { recursive: true, force: true }) }
}

/** The one sentence of a failure, which is all that there is on standard error. */
export function complaint(ran: Ran): string {
  const lines = ran.stderr.trim().split('\n')
  if (lines.length !== 1 || !lines[0]!.startsWith('klieo-bus: ')) throw new Error(`not one sentence: ${JSON.stringify(ran)}`)
  return lines[0]!.slice('klieo-bus: '.length)
}
