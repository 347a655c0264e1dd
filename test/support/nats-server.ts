/** A nats-server for a test file: that of the run (global-setup.ts), or one of its own on loopback with a store that goes with it. */

import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { connect, createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { inject } from 'vitest'

const STARTS_WITHIN_MS = 10_000
/** The largest payload of a bus is 8 MiB, and its headers come on top. */
export const NATS_CONFIG = 'max_payload: 16MB\n'

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

declare module 'vitest' {
  interface ProvidedContext {
    /** See global-setup.ts. */
    readonly nats: { readonly url: string | undefined; readonly missing: string | undefined }
  }
}

/** Why there is none to test on; `undefined`: there is one. */
export function whyNoNats(): string | undefined {
  return inject('nats').missing
}

/** Why a test cannot have one that it may stop; `undefined`: it can. */
export function whyNoOwnNats(): string | undefined {
  if (process.env.NATS_URL) return 'it stops its server, and NATS_URL is not its own'
  return natsServerVersion() === undefined ? 'it stops its server, and no nats-server is installed' : undefined
}

/** Of the one on the PATH; `undefined`: there is none. */
export function natsServerVersion(): string | undefined {
  const { status, stdout } = spawnSync('nats-server', ['--version'], { encoding: 'utf8' })
  return status === 0 ? stdout.replace('nats-server:', '').trim() : undefined
}

/**
 * One of the test's own, which it may stop and start.
 * @param flags besides those that say where it listens and stores
 */
export async function ownNatsServer(settings = NATS_CONFIG, flags: readonly string[] = ['-js']): Promise<NatsServer> {
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

/** As a client does that does not look at the names of headers. */
export async function publishRaw(url: string, subject: string, header: string, payload: string): Promise<void> {
  const [host, port] = url.split(':')
  const socket = connect(Number(port), host)
  const head = `NATS/1.0\r\n${header}\r\n\r\n`
  const size = Buffer.byteLength(head)
  socket.write('CONNECT {"verbose":false,"pedantic":false,"headers":true}\r\n')
  socket.write(`HPUB ${subject} ${size} ${size + Buffer.byteLength(payload)}\r\n${head}${payload}\r\nPING\r\n`)
  await new Promise<void>((resolve, reject) => {
    socket.once('error', reject)
    socket.on('data', (data) => data.includes('PONG') && resolve())
  })
  socket.destroy()
}

/** That of the run, which is shared, or one of the test's own. */
export async function natsServer(): Promise<Pick<NatsServer, 'url' | 'remove'>> {
  const { url } = inject('nats')
  return url === undefined ? ownNatsServer() : { url, remove: async () => {} }
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
