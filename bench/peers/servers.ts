/** Redis and NATS on loopback, on ports of their own, with their data in a directory that goes with them. */

import { execFileSync, spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { mkdtemp } from 'node:fs/promises'
import { connect, createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { delimiter, join } from 'node:path'
import { setTimeout as pause } from 'node:timers/promises'

const READY_MS = 10_000

/**
 * Holds the server and its data. When its standard input ends, because the bench closed it or is gone in whatever way, both go
 * too: nobody else would end the servers of a bench that was killed. Nothing in the data is worth an orderly shutdown.
 * $1 is the directory, the rest the server's command line.
 */
const KEEPER = `
trap : INT TERM
directory=$1
shift
"$@" </dev/null &
server=$!
echo "$server" >&3
cat >/dev/null
kill -9 "$server"
wait "$server" 2>/dev/null
rm -rf "$directory"
`

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
  const keeper = spawn('/bin/sh', ['-c', KEEPER, 'keeper', directory, program, ...args(port, directory)], {
    stdio: ['pipe', 'pipe', 'pipe', 'pipe'],
  })
  let said = ''
  for (const stream of [keeper.stdout, keeper.stderr]) {
    stream.on('data', (chunk: Buffer) => {
      said = (said + chunk.toString()).slice(-2_000)
    })
  }
  const ended = new Promise<void>((resolve) => {
    keeper.once('exit', () => resolve())
  })
  // Ctrl-C reaches the keeper too, which may be gone before it is told.
  keeper.stdin.on('error', () => {})
  const stop = async () => {
    keeper.stdin.end()
    await ended
  }
  const pid = await new Promise<number>((resolve, reject) => {
    keeper.once('error', reject)
    keeper.stdio[3]!.once('data', (chunk: Buffer) => resolve(Number(chunk.toString())))
  })
  const deadline = performance.now() + READY_MS
  while (!ready.test(await answer(port, hello))) {
    if (performance.now() < deadline && isAlive(pid)) {
      await pause(20)
      continue
    }
    await stop()
    throw new Error(`${program} did not become ready within ${READY_MS} ms. ${said.trim()}`)
  }
  return { url: `${scheme}://127.0.0.1:${port}`, pid, version, settings, stop }
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0)
    return true
  } catch {
    return false
  }
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
