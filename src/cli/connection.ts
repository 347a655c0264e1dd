/** Which server: `--url`, else DATABASE_URL, else PG* variables, else the running `klieo-bus up` of this directory or one above it. */

import { userInfo } from 'node:os'
import type { PostgresBus, PostgresBusOptions } from '../index.ts'
import { EXIT, Failure, isBusFailure, sentence } from './failure.ts'
import { findRunning } from './up-state.ts'

export const PG_VARIABLES = ['PGHOST', 'PGPORT', 'PGDATABASE', 'PGUSER'] as const

export interface Target {
  /** None: what PG* say, and the defaults of Postgres. */
  readonly connectionString?: string
  readonly schema: string
  /** Where it was found and what it is, without a password. */
  readonly what: string
}

export function findTarget(url: string | undefined, schema: string | undefined, env: NodeJS.ProcessEnv, directory: string): Target {
  const named = schema ?? (env.KLIEO_SCHEMA || 'klieo')
  if (url !== undefined) return { connectionString: url, schema: named, what: `--url: ${shownUrl(url)}` }
  if (env.DATABASE_URL) {
    return { connectionString: env.DATABASE_URL, schema: named, what: `DATABASE_URL: ${shownUrl(env.DATABASE_URL)}` }
  }
  if (PG_VARIABLES.some((name) => env[name])) return { schema: named, what: `PG* variables: ${shownEnvironment(env)}` }
  const running = findRunning(directory)
  if (running) {
    return {
      connectionString: running.url,
      schema: schema ?? (env.KLIEO_SCHEMA || running.schema),
      what: `klieo-bus up in ${running.directory}`,
    }
  }
  return {
    schema: named,
    what: `no --url, DATABASE_URL or PG* variable, and no klieo-bus up running here, so Postgres's defaults: ${shownEnvironment(env)}`,
  }
}

/** Who, where and which database; nothing else of what may stand in an address. */
export function shownUrl(text: string): string {
  try {
    const { username, host, pathname, protocol } = new URL(text)
    if (!/^postgres(ql)?:$/.test(protocol)) return 'an address that is none of a Postgres server'
    return `${username === '' ? '' : `${username}@`}${host}${pathname}`
  } catch {
    return text.startsWith('/') ? text.split(' ', 1)[0]! : 'an address that cannot be read'
  }
}

function shownEnvironment(env: NodeJS.ProcessEnv): string {
  const user = env.PGUSER || userInfo().username
  return `${user}@${env.PGHOST || 'localhost'}:${env.PGPORT || '5432'}/${env.PGDATABASE || user}`
}

export type ConnectOptions = Pick<PostgresBusOptions, 'maxPayloadBytes'>

/** @throws Failure: cannot be connected to, with what was tried */
export async function connect(target: Target, options: ConnectOptions = {}): Promise<PostgresBus> {
  const { PostgresBus } = await import('../index.ts')
  return explained(target, () =>
    PostgresBus.connect({
      ...connectionOf(target),
      // Looking at a database must not change it, and a command does not know how long its app keeps messages.
      migrate: false,
      maintenance: false,
      ...options,
    }),
  )
}

export function connectionOf({ connectionString, schema }: Target): Pick<PostgresBusOptions, 'connectionString' | 'schema'> {
  return { ...(connectionString === undefined ? {} : { connectionString }), schema }
}

/** Says which server it was when something fails on the way to it. */
export async function explained<T>(target: Target, act: () => Promise<T>): Promise<T> {
  try {
    return await act()
  } catch (error) {
    if (!isBusFailure(error)) throw error
    const code = error.code === 'invalid_argument' ? EXIT.usage : EXIT.failed
    const text = sentence(error).slice(0, -` [${error.code}]`.length)
    throw new Failure(code, `${text} (${target.what}) [${error.code}]`, { cause: error })
  }
}
