/** A PgBouncer of a test's own, in transaction mode, in front of the server that the tests run on. */

import { execFile, spawn } from 'node:child_process'
import { access, chown, constants, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { delimiter, join } from 'node:path'
import { promisify } from 'node:util'
import { chooseAccount, temporaryPlaces } from '../../../../src/testing/embedded-account.ts'
import { session } from '../../../support/sessions.ts'
import { eventually } from '../../../support/wait.ts'

export interface Installed {
  readonly file: string
  /** As a number that can be compared: 1.18.0 is 1.018. */
  readonly version: number
}

/** On PATH, or where Debian puts it. */
export async function findPgBouncer(): Promise<Installed | undefined> {
  for (const directory of [...(process.env.PATH ?? '').split(delimiter), '/usr/sbin']) {
    const file = join(directory, 'pgbouncer')
    try {
      await access(file, constants.X_OK)
      const { stdout } = await promisify(execFile)(file, ['--version'])
      const [, major, minor] = /(\d+)\.(\d+)/.exec(stdout) ?? []
      return { file, version: Number(major) + Number(minor) / 1_000 }
    } catch {
      // Not there.
    }
  }
  return undefined
}

/** It refuses to run as root. Whoever it runs as finds its shell at the other end of a pipe: when we are gone, so is it. */
const KEEPER = `"$1" "$2" >/dev/null 2>&1 & child=$!; read -r signal; kill -"\${signal:-KILL}" $child; wait $child`

export class PgBouncer implements AsyncDisposable {
  readonly connectionString: string
  readonly #file: string
  readonly #directory: string
  readonly #account: { readonly uid?: number; readonly gid?: number }
  #running: { stop(signal: string): Promise<void> } | undefined

  private constructor(file: string, directory: string, account: { uid?: number; gid?: number }, connectionString: string) {
    this.#file = file
    this.#directory = directory
    this.#account = account
    this.connectionString = connectionString
  }

  /** @param settings beyond those that make it a pooler in transaction mode */
  static async start({ file }: Installed, target: string, settings: Readonly<Record<string, string>> = {}): Promise<PgBouncer> {
    const account = await chooseAccount(undefined)
    const [place] = await temporaryPlaces(account)
    const directory = await mkdtemp(join(place as string, 'klieo-pgbouncer-'))
    const port = await freePort()
    const { hostname, port: serverPort, username, password, pathname } = new URL(target)
    const database = decodeURIComponent(pathname.slice(1)) || 'postgres'
    const server = [
      `host=${hostname}`,
      `port=${serverPort || 5432}`,
      `dbname=${database}`,
      `user=${decodeURIComponent(username)}`,
      ...(password ? [`password=${decodeURIComponent(password)}`] : []),
    ].join(' ')
    const options = {
      listen_addr: '127.0.0.1',
      listen_port: String(port),
      unix_socket_dir: '',
      auth_type: 'any',
      admin_users: 'pgbouncer',
      pool_mode: 'transaction',
      max_client_conn: '500',
      default_pool_size: '20',
      ignore_startup_parameters: 'options',
      ...settings,
    }
    const ini = `[databases]\n${database} = ${server}\n[pgbouncer]\n${Object.entries(options)
      .map(([name, value]) => `${name} = ${value}\n`)
      .join('')}`
    await writeFile(join(directory, 'pgbouncer.ini'), ini)
    if (account.uid !== undefined && account.gid !== undefined) {
      await chown(directory, account.uid, account.gid)
      await chown(join(directory, 'pgbouncer.ini'), account.uid, account.gid)
    }
    const bouncer = new PgBouncer(file, directory, account, `postgres://pooled@127.0.0.1:${port}/${database}`)
    await bouncer.start()
    return bouncer
  }

  async start(): Promise<void> {
    const { uid, gid } = this.#account
    const keeper = spawn('/bin/sh', ['-c', KEEPER, 'sh', this.#file, join(this.#directory, 'pgbouncer.ini')], {
      stdio: ['pipe', 'ignore', 'ignore'],
      cwd: '/',
      ...(uid === undefined ? {} : { uid }),
      ...(gid === undefined ? {} : { gid }),
    })
    keeper.stdin?.on('error', () => {})
    const ended = new Promise<void>((resolve) => keeper.once('close', () => resolve()))
    this.#running = {
      stop: async (signal) => {
        keeper.stdin?.end(`${signal}\n`)
        await ended
      },
    }
    await eventually(async () => (await session(this.connectionString))[Symbol.asyncDispose](), {
      timeoutMs: 15_000,
      what: 'a PgBouncer that answers',
    })
  }

  /** Ends it and every connection through it, in the middle of whatever goes on. */
  async stop(): Promise<void> {
    await this.#running?.stop('KILL')
    this.#running = undefined
  }

  /** A command of its console, such as RECONNECT. */
  async command(text: string): Promise<void> {
    const url = new URL(this.connectionString)
    url.pathname = '/pgbouncer'
    url.username = 'pgbouncer'
    const { Client } = (await import('pg')).default
    const client = new Client({ connectionString: url.href })
    client.on('error', () => {})
    await client.connect()
    try {
      await client.query(text)
    } finally {
      await client.end()
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop()
    await rm(this.#directory, { recursive: true, force: true })
  }
}

async function freePort(): Promise<number> {
  const server = createServer()
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as { port: number }
  await new Promise<void>((resolve) => server.close(() => resolve()))
  return port
}
