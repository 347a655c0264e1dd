/** Which NATS: `--nats`, else NATS_URL, else 127.0.0.1:4222. */

import { readFile } from 'node:fs/promises'
import type { NatsBus, NatsBusOptions } from '../nats/index.ts'
import type { OptionSpecs } from './command.ts'
import { EXIT, Failure, isBusFailure, sentence, UsageError } from './failure.ts'

export const NATS_OPTIONS = {
  nats: {
    type: 'text',
    value: 'URL',
    description: 'nats://[USER:PASSWORD@]HOST[:PORT], several with commas, tls:// for TLS; else NATS_URL, else 127.0.0.1:4222',
  },
  'nats-prefix': { type: 'text', value: 'NAME', description: 'what its streams and subjects begin with', default: 'klieo' },
  'nats-creds': { type: 'text', value: 'FILE', description: 'a .creds file of NATS' },
} as const satisfies OptionSpecs

export interface NatsTarget {
  readonly options: NatsBusOptions
  /** Where it was found and what it is, without a password. */
  readonly what: string
}

interface Given {
  readonly nats: string | undefined
  readonly 'nats-prefix': string
  readonly 'nats-creds': string | undefined
}

export async function findNats(given: Given, env: NodeJS.ProcessEnv): Promise<NatsTarget> {
  const source = given.nats === undefined ? 'NATS_URL' : '--nats'
  const text = given.nats ?? (env.NATS_URL || undefined)
  const urls = text?.split(',').map((one, n) => urlOf(source, one.trim(), n === 0))
  const login = urls?.find(({ username }) => username !== '')
  const user = login && plain(source, login.username)
  const pass = login && plain(source, login.password)
  const servers = urls?.map(({ hostname, port }) => `${hostname}:${port || '4222'}`)
  const file = given['nats-creds']
  return {
    options: {
      prefix: given['nats-prefix'],
      maxPayloadBytes: 'server',
      ...(servers ? { servers } : {}),
      ...(user && pass ? { user, pass } : {}),
      // As other clients of NATS read it.
      ...(user && !pass ? { token: user } : {}),
      ...(urls?.some(({ protocol }) => protocol === 'tls:') ? { tls: {} } : {}),
      ...(file === undefined ? {} : { credentials: await contentsOf(file) }),
    },
    what: servers ? `${source}: ${servers.join(', ')}` : 'no --nats and no NATS_URL, so 127.0.0.1:4222',
  }
}

/** @throws Failure: cannot be connected to, with what was tried */
export async function connectNats({ options, what }: NatsTarget): Promise<NatsBus> {
  const { NatsBus } = await load()
  try {
    return await NatsBus.connect(options)
  } catch (error) {
    if (!isBusFailure(error)) throw error
    const code = error.code === 'invalid_argument' ? EXIT.usage : EXIT.failed
    const text = sentence(error).slice(0, -` [${error.code}]`.length)
    throw new Failure(code, `${text} (${what}) [${error.code}]`, { cause: error })
  }
}

async function load(): Promise<typeof import('../nats/index.ts')> {
  try {
    return await import('../nats/index.ts')
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ERR_MODULE_NOT_FOUND') throw error
    throw new Failure(
      EXIT.failed,
      'the clients of NATS are not installed: npm install @nats-io/transport-node @nats-io/jetstream @nats-io/kv [unsupported]',
      { cause: error },
    )
  }
}

function urlOf(source: string, text: string, isFirst: boolean): URL {
  const hasScheme = /^\w+:\/\//.test(text)
  // The rest of a password with a comma of its own, whose beginning would be taken for a host, looked up and shown.
  if (!isFirst && !hasScheme && text.includes('@')) throw notAnAddress(source)
  const url = URL.parse(hasScheme ? text : `nats://${text}`)
  // What comes behind an address is the rest of a password with a / ? or # of its own: what stands before it is none of the host's, and is not shown.
  if (!url || !/^(?:nats|tls):$/.test(url.protocol) || url.hostname === '' || !/^\/?$/.test(url.pathname + url.search + url.hash))
    throw notAnAddress(source)
  return url
}

function plain(source: string, text: string): string {
  try {
    return decodeURIComponent(text)
  } catch {
    throw notAnAddress(source)
  }
}

function notAnAddress(source: string): UsageError {
  return new UsageError(
    `${source} is not an address of NATS, such as nats://127.0.0.1:4222; in a user or password % / ? # @ , are written as %25 %2F …`,
  )
}

async function contentsOf(file: string): Promise<string> {
  try {
    return await readFile(file, 'utf8')
  } catch (error) {
    throw new UsageError(`--nats-creds cannot be read: ${sentence(error)}`, { seeHelp: false })
  }
}
