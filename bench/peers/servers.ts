/** Redis and NATS on loopback, on ports of their own, with their data in a directory that goes with them. */

import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { existsSync, rmSync } from 'node:fs'
import { mkdtemp } from 'node:fs/promises'
import { connect, createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { delimiter, join } from 'node:path'
import { setTimeout as pause } from 'node:timers/promises'

const READY_MS = 10_000
const STOP_MS = 5_000

export interface Server {
  readonly url: string
  readonly pid: number
  readonly version: string
  readonly settings: string
  stop(): Promise<void>
}

/** @returns undefined where it is not installed */
export async function startRedis(): Promise<Server | undefined> {
  const program = find('redis-server')
  if (program === undefined) return undefined
  const settings = [
    ['appendonly', 'yes'],
    ['appendfsync', 'always'],
    // No snapshots and no rewrites of the file: a fork of the server would be measured too.
    ['save', ''],
    ['auto-aof-rewrite-percentage', '0'],
  ] as const
  const version = /v=([\d.]+)/.exec(ask(program, '--version'))?.[1] ?? 'of an unknown version'
  return start({
    program,
    scheme: 'redis',
    version,
    settings: settings.map(([name, value]) => `${name} ${value || '""'}`).join(', '),
    args: (port, directory) => [
      ...['--bind', '127.0.0.1', '--port', `${port}`, '--dir', directory],
      ...settings.flatMap(([name, value]) => [`--${name}`, value]),
    ],
    hello: 'PING\r\n',
    ready: /^\+PONG/,
  })
}

/** @returns undefined where it is not installed */
export async function startNats(): Promise<Server | undefined> {
  const program = find('nats-server')
  if (program === undefined) return undefined
  const version = /v([\d.]+)/.exec(ask(program, '--version'))?.[1] ?? 'of an unknown version'
  return start({
    program,
    scheme: 'nats',
    version,
    settings: 'JetStream with file storage, which it syncs every two minutes and not before it acknowledges (its default)',
    args: (port, directory) => ['-a', '127.0.0.1', '-p', `${port}`, '-js', '-sd', directory],
    hello: '',
    ready: /^INFO .*"jetstream":true/,
  })
}

interface Start {
  readonly program: string
  readonly scheme: string
  readonly version: string
  readonly settings: string
  args(port: number, directory: string): string[]
  /** What is sent to it, and what its answer has to look like. */
  readonly hello: string
  readonly ready: RegExp
}

async function start({ program, scheme, version, settings, args, hello, ready }: Start): Promise<Server> {
  const directory = await mkdtemp(join(tmpdir(), `klieo-bench-${scheme}-`))
  const port = await freePort()
  const child = spawn(program, args(port, directory), { stdio: ['ignore', 'pipe', 'pipe'] })
  let said = ''
  for (const stream of [child.stdout, child.stderr]) {
    stream.on('data', (chunk: Buffer) => {
      said = (said + chunk.toString()).slice(-2_000)
    })
  }
  const ended = new Promise<void>((resolve) => {
    child.once('exit', () => resolve())
    child.once('error', () => resolve())
  })
  const removeData = () => rmSync(directory, { recursive: true, force: true })
  // Also when the bench ends without having stopped it, by an error or a second Ctrl-C.
  const atExit = () => {
    child.kill('SIGKILL')
    removeData()
  }
  process.once('exit', atExit)
  const stop = async () => {
    await end(child, ended)
    process.removeListener('exit', atExit)
    removeData()
  }
  const deadline = performance.now() + READY_MS
  while (!ready.test(await answer(port, hello))) {
    if (child.exitCode === null && child.pid !== undefined && performance.now() < deadline) {
      await pause(20)
      continue
    }
    await stop()
    throw new Error(`${program} did not become ready within ${READY_MS} ms. ${said.trim()}`)
  }
  return { url: `${scheme}://127.0.0.1:${port}`, pid: child.pid!, version, settings, stop }
}

async function end(child: ChildProcess, ended: Promise<void>): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null || child.pid === undefined) return
  child.kill('SIGTERM')
  const timer = setTimeout(() => child.kill('SIGKILL'), STOP_MS)
  await ended
  clearTimeout(timer)
}

/** @returns the first that it says, or an empty string */
function answer(port: number, hello: string): Promise<string> {
  return new Promise((resolve) => {
    const socket = connect(port, '127.0.0.1')
    const done = (text: string) => {
      socket.destroy()
      resolve(text)
    }
    socket.setTimeout(1_000, () => done(''))
    socket.once('error', () => done(''))
    socket.once('close', () => done(''))
    socket.once('data', (chunk) => done(chunk.toString()))
    socket.once('connect', () => {
      if (hello) socket.write(hello)
    })
  })
}

function freePort(): Promise<number> {
  return new Promise((resolve, reject) => {
    const server = createServer()
    server.once('error', reject)
    server.listen(0, '127.0.0.1', () => {
      const address = server.address()
      server.close(() => resolve(typeof address === 'object' && address ? address.port : 0))
    })
  })
}

/** Debian has servers in sbin, which not every user's PATH holds. */
function find(program: string): string | undefined {
  const directories = [...(process.env.PATH ?? '').split(delimiter), '/usr/sbin', '/usr/local/sbin', '/usr/local/bin']
  return directories.map((directory) => join(directory, program)).find((path) => existsSync(path))
}

function ask(program: string, argument: string): string {
  return execFileSync(program, [argument], { encoding: 'utf8' })
}
