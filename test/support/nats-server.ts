/** A nats-server for a test file: NATS_URL where it is set, else one of its own on loopback with a store that goes with it. */

import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { connect, createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

const STARTS_WITHIN_MS = 10_000
/** The largest payload of a bus is 8 MiB, and its headers come on top. */
const CONFIG = 'max_payload: 16MB\n'

export interface NatsServer {
  readonly url: string
  /** @param signal SIGKILL: as a crash */
  stop(signal?: NodeJS.Signals): Promise<void>
  /** On the same port and store. */
  start(): Promise<void>
  /** As if its machine had stood still: its connections stay, and nobody answers on them. */
  pause(): void
  resume(): void
  /** Stops it and removes its store. */
  remove(): Promise<void>
}

/** Why there is none to test on; `undefined`: there is one. */
export function whyNoNats(): string | undefined {
  if (process.env.NATS_URL) return undefined
  const found = spawnSync('nats-server', ['--version'], { encoding: 'utf8' })
  return found.status === 0 ? undefined : 'no nats-server is installed, and NATS_URL is not set'
}

/**
 * One of the test's own, which it may stop and start.
 * @param flags besides those that say where it listens and stores
 */
export async function ownNatsServer(settings = CONFIG, flags: readonly string[] = ['-js']): Promise<NatsServer> {
  const store = await mkdtemp(join(tmpdir(), 'klieo-nats-'))
  const config = join(store, 'server.conf')
  await writeFile(config, settings)
  const port = await freePort()
  let server: ChildProcess | undefined
  const start = async () => {
    const child = spawn('nats-server', ['-c', config, ...flags, '-a', '127.0.0.1', '-p', String(port), '-sd', join(store, 'js')], {
      stdio: ['ignore', 'ignore', 'pipe'],
    })
    let said = ''
    child.stderr.on('data', (chunk) => {
      said = (said + chunk).slice(-4_000)
    })
    server = child
    const deadline = performance.now() + STARTS_WITHIN_MS
    while (!(await answers(port))) {
      if (child.exitCode !== null || performance.now() > deadline) throw new Error(`nats-server did not start: ${said}`)
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
  }
  const stop = async (signal: NodeJS.Signals = 'SIGTERM') => {
    const child = server
    server = undefined
    child?.kill('SIGCONT')
    if (!child || child.exitCode !== null || child.signalCode !== null) return
    const ended = new Promise((resolve) => child.once('exit', resolve))
    child.kill(signal)
    await ended
  }
  await start()
  return {
    url: `127.0.0.1:${port}`,
    start,
    stop,
    pause: () => void server?.kill('SIGSTOP'),
    resume: () => void server?.kill('SIGCONT'),
    remove: async () => {
      await stop()
      await rm(store, { recursive: true, force: true })
    },
  }
}

/** NATS_URL where it is set. */
export async function natsServer(): Promise<Pick<NatsServer, 'url' | 'remove'>> {
  const url = process.env.NATS_URL
  return url ? { url, remove: async () => {} } : ownNatsServer()
}

export async function freePort(): Promise<number> {
  const server = createServer()
  await new Promise<void>((resolve) => void server.listen(0, '127.0.0.1', resolve))
  const address = server.address()
  await new Promise((resolve) => server.close(resolve))
  return typeof address === 'object' && address !== null ? address.port : 0
}

async function answers(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(port, '127.0.0.1')
    socket.once('data', () => {
      socket.destroy()
      resolve(true)
    })
    socket.once('error', () => resolve(false))
  })
}
