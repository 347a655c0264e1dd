/**
 * The process between a test and its Postgres: it is the postmaster's parent, and it outlives the process that asked for it.
 *
 * It is started in a session of its own, so that Ctrl-C in the terminal reaches neither it nor Postgres, and reads commands
 * from its stdin. The end of that stream is the one event that follows from every death of the other side, `kill -9`
 * included: the server is then ended and a throw-away data directory removed. Being the parent it needs no pid file, cannot
 * hit a stranger whose pid was used again, and leaves no zombies.
 *
 * It runs from the source or the built file as it is, so it imports nothing but Node.
 */

import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { readdirSync, readFileSync } from 'node:fs'
import { rm } from 'node:fs/promises'
import { createInterface } from 'node:readline'

/** The account a command runs under; neither is given where there is nothing to change. */
export interface Identity {
  readonly uid?: number
  readonly gid?: number
}

/** What the other side asks for, a JSON line each. Every one is answered by the {@link Answer} with its id. */
export type Command = { readonly id: number } & (
  | { readonly do: 'guard'; readonly remove: readonly string[] }
  | { readonly do: 'run'; readonly file: string; readonly args: readonly string[]; readonly as: Identity }
  | { readonly do: 'start'; readonly file: string; readonly dataDir: string; readonly as: Identity }
  | { readonly do: 'stop'; readonly signal: NodeJS.Signals }
  | { readonly do: 'crash' }
  | { readonly do: 'end'; readonly signal: NodeJS.Signals }
)

export interface Answer {
  readonly id: number
  readonly error?: string
  /** `run` */
  readonly code?: number | null
  readonly output?: string
  /** `start` */
  readonly pid?: number
}

/** What it says unasked. */
export type Event = { readonly event: 'log'; readonly lines: readonly string[] } | { readonly event: 'exit'; readonly pid: number }

interface Server {
  readonly process: ChildProcess
  readonly dataDir: string
  /** The postmaster and everybody it started are gone: all have let go of the pipes they inherited. */
  readonly gone: Promise<void>
}

/** Each step of an ending gets this long before the next, harsher one. */
const PATIENCE_MS = 10_000
/** A backend that computes does not look whether its postmaster is alive. */
const ORPHANS_MAY_TAKE_MS = 2_000
/** Log lines are dropped beyond this when nobody reads them: the other side may be stopped in a debugger for hours. */
const MAX_UNSENT_BYTES = 4_000_000

let server: Server | undefined
/** Removed at the end: a throw-away data directory, and what is unfinished. */
let removable: readonly string[] = []
let ending: Promise<void> | undefined
/** An initdb that is under way. */
const running = new Set<{ process: ChildProcess; closed: Promise<unknown> }>()

function send(message: Answer | Event): void {
  if ('event' in message && message.event === 'log' && process.stdout.writableLength > MAX_UNSENT_BYTES) return
  process.stdout.write(`${JSON.stringify(message)}\n`)
}

/** Few variables on purpose: PGPORT and its like change a server, and secrets are none of a database's business. */
function environment(): NodeJS.ProcessEnv {
  const kept = ['PATH', 'TZ', 'LD_LIBRARY_PATH', 'DYLD_LIBRARY_PATH'].map((name) => [name, process.env[name]] as const)
  return { ...Object.fromEntries(kept.filter(([, value]) => value !== undefined)), LC_ALL: 'C' }
}

async function run(file: string, args: readonly string[], as: Identity): Promise<{ code: number | null; output: string }> {
  const child = spawn(file, args, { ...as, cwd: '/', env: environment(), stdio: ['ignore', 'pipe', 'pipe'] })
  let output = ''
  for (const stream of [child.stdout!, child.stderr!]) {
    stream.setEncoding('utf8').on('data', (text: string) => {
      output = (output + text).slice(-20_000)
    })
  }
  const { promise, resolve, reject } = Promise.withResolvers<number | null>()
  child.on('error', reject)
  child.on('close', resolve)
  const entry = { process: child, closed: promise.catch(() => {}) }
  running.add(entry)
  try {
    return { code: await promise, output }
  } finally {
    running.delete(entry)
  }
}

async function start(file: string, dataDir: string, as: Identity): Promise<number> {
  if (server) throw new Error('the server is running')
  // The fourth descriptor does nothing but be inherited: stderr ends early when the settings turn the log collector on.
  const child = spawn(file, ['-D', dataDir], { ...as, cwd: '/', env: environment(), stdio: ['ignore', 'ignore', 'pipe', 'pipe'] })
  const { promise: spawned, resolve, reject } = Promise.withResolvers<void>()
  child.on('spawn', resolve)
  child.on('error', reject)
  await spawned
  const pid = child.pid!
  const { promise: gone, resolve: isGone } = Promise.withResolvers<void>()
  const started: Server = { process: child, dataDir, gone }
  server = started
  ;(child.stdio[3] as NodeJS.ReadableStream).on('error', () => {}).resume()
  const log = createInterface({ input: child.stderr! })
  log.on('line', (line) => send({ event: 'log', lines: [line] }))
  child.on('close', () => {
    server = undefined
    isGone()
    send({ event: 'exit', pid })
  })
  return pid
}

async function within(gone: Promise<void>, ms: number): Promise<boolean> {
  const late = Promise.withResolvers<boolean>()
  const timer = setTimeout(() => late.resolve(false), ms)
  try {
    return await Promise.race([gone.then(() => true), late.promise])
  } finally {
    clearTimeout(timer)
  }
}

/** SIGINT ends transactions and sessions and writes a checkpoint, SIGQUIT gives up as in a crash, SIGKILL is one. */
async function stop(signal: NodeJS.Signals): Promise<void> {
  const stopped = server
  if (!stopped) return
  const steps: NodeJS.Signals[] = signal === 'SIGINT' ? ['SIGINT', 'SIGQUIT'] : ['SIGQUIT']
  for (const step of steps) {
    // A server that a test has stopped would sleep through anything but SIGKILL.
    stopped.process.kill(step)
    stopped.process.kill('SIGCONT')
    if (await within(stopped.gone, PATIENCE_MS)) return
  }
  await crash()
}

async function crash(): Promise<void> {
  const crashed = server
  if (!crashed) return
  // Stopped, it starts no child that the list would miss.
  crashed.process.kill('SIGSTOP')
  const children = childrenOf(crashed.process.pid!)
  crashed.process.kill('SIGKILL')
  if (!(await within(crashed.gone, ORPHANS_MAY_TAKE_MS))) {
    for (const pid of children) {
      try {
        process.kill(pid, 'SIGKILL')
      } catch {
        // Gone meanwhile.
      }
    }
    await crashed.gone
  }
  // A process closes its files a little before it is gone, and a lock or a port may be looked at right after this.
  const deadline = performance.now() + ORPHANS_MAY_TAKE_MS
  while (children.some(exists) && performance.now() < deadline) await new Promise((resolve) => setTimeout(resolve, 2))
}

/** A zombie counts as gone: where the first process of a container does not bury the dead they stay for ever. */
function exists(pid: number): boolean {
  try {
    process.kill(pid, 0)
    return process.platform !== 'linux' || !/\) [ZX]/.test(readFileSync(`/proc/${pid}/stat`, 'latin1'))
  } catch {
    return false
  }
}

function childrenOf(parent: number): number[] {
  const processes = process.platform === 'linux' ? linuxProcesses() : otherProcesses()
  return processes.filter(([, ppid]) => ppid === parent).map(([pid]) => pid)
}

/** Slim images have no ps. */
function linuxProcesses(): [pid: number, ppid: number][] {
  const found: [number, number][] = []
  for (const name of readdirSync('/proc')) {
    if (!/^\d+$/.test(name)) continue
    try {
      const stat = readFileSync(`/proc/${name}/stat`, 'latin1')
      // The command's name stands in parentheses and may hold anything, parentheses too.
      const ppid = Number(
        stat
          .slice(stat.lastIndexOf(')') + 1)
          .trim()
          .split(' ')[1],
      )
      found.push([Number(name), ppid])
    } catch {
      // Gone meanwhile.
    }
  }
  return found
}

function otherProcesses(): [pid: number, ppid: number][] {
  const table = execFileSync('ps', ['-A', '-o', 'pid=,ppid='], { encoding: 'utf8' })
  return table
    .trim()
    .split('\n')
    .map((line) => line.trim().split(/\s+/).map(Number) as [number, number])
}

/**
 * A postmaster that was killed leaves its small System V segment behind until it is started again in the same directory,
 * which a throw-away one never is. The pid file names it: the second number of its seventh line.
 */
function removeSharedMemory(dataDir: string): void {
  try {
    const segment = readFileSync(`${dataDir}/postmaster.pid`, 'latin1').split('\n')[6]?.trim().split(/\s+/)[1]
    if (segment && /^\d+$/.test(segment)) execFileSync('ipcrm', ['-m', segment], { stdio: 'ignore' })
  } catch {
    // No pid file after an orderly end, or no ipcrm: 56 bytes stay until the machine restarts.
  }
}

/** Ends the server, then itself. The first call decides how. */
function end(signal: NodeJS.Signals): Promise<void> {
  ending ??= (async () => {
    for (const { process: child, closed } of running) {
      child.kill('SIGKILL')
      await closed
    }
    await stop(signal)
    for (const path of removable) {
      removeSharedMemory(path)
      await rm(path, { recursive: true, force: true, maxRetries: 5, retryDelay: 100 })
    }
  })()
  return ending
}

async function obey(command: Command): Promise<Omit<Answer, 'id'>> {
  if (ending && command.do !== 'end') throw new Error('the supervisor is ending')
  switch (command.do) {
    case 'guard':
      removable = command.remove
      return {}
    case 'run':
      return run(command.file, command.args, command.as)
    case 'start':
      return { pid: await start(command.file, command.dataDir, command.as) }
    case 'stop':
      await stop(command.signal)
      return {}
    case 'crash':
      await crash()
      return {}
    case 'end':
      await end(command.signal)
      return {}
  }
}

async function leave(): Promise<void> {
  // A cluster that is kept is worth a checkpoint.
  await end(removable.length > 0 ? 'SIGQUIT' : 'SIGINT').catch(() => {})
  process.exit(0)
}

process.stdout.on('error', () => {})
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, leave)
const commands = createInterface({ input: process.stdin })
commands.on('line', async (line) => {
  const command = JSON.parse(line) as Command
  try {
    send({ id: command.id, ...(await obey(command)) })
  } catch (error) {
    send({ id: command.id, error: error instanceof Error ? error.message : String(error) })
  }
})
commands.on('close', leave)
