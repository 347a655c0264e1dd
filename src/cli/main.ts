#!/usr/bin/env node
/** The command line. It uses the public API alone and holds no SQL. */

import { readFileSync } from 'node:fs'
import { parseArgs } from 'node:util'
import { BusError, PostgresBus } from '../index.ts'

const HELP = `klieo-bus: a durable message bus on PostgreSQL

  klieo-bus migrate            bring the schema up to date
  klieo-bus migrate --check    only look: exit 0 when it is up to date, 1 when it is not

  --url URL        where the server is; else DATABASE_URL, else the PG* environment
  --schema NAME    the schema of the bus (default: klieo)
  --help, --version

Exit codes: 0 done · 1 failed, or not up to date · 2 wrong usage
`

const USAGE = 2
const LEAST_NODE = 22

class UsageError extends Error {}

async function main(args: readonly string[]): Promise<number> {
  const { values, positionals } = parse(args)
  if (values.help) return print(HELP)
  if (values.version) return print(`${version()}\n`)
  const [command, ...rest] = positionals
  if (command === undefined) throw new UsageError('a command is missing')
  if (command !== 'migrate') throw new UsageError(`there is no command "${command}"`)
  if (rest.length > 0) throw new UsageError(`migrate takes no argument "${rest[0]}"`)
  // npm only warns of an old Node, and what fails then names a function that is missing.
  if (Number.parseInt(process.versions.node, 10) < LEAST_NODE) {
    throw new BusError('unsupported', `Node ${LEAST_NODE} or newer is needed, this is ${process.version}`)
  }
  return migrate(values)
}

function parse(args: readonly string[]) {
  try {
    return parseArgs({
      args: [...args],
      allowPositionals: true,
      options: {
        url: { type: 'string' },
        schema: { type: 'string' },
        check: { type: 'boolean' },
        help: { type: 'boolean', short: 'h' },
        version: { type: 'boolean' },
      },
    })
  } catch (error) {
    throw new UsageError((error as Error).message.split('. ')[0])
  }
}

async function migrate({ url, schema, check }: { url?: string; schema?: string; check?: boolean }): Promise<number> {
  const connectionString = url ?? process.env.DATABASE_URL
  const names = await PostgresBus.migrate({
    ...(connectionString ? { connectionString } : {}),
    ...(schema === undefined ? {} : { schema }),
    check: check ?? false,
  })
  const where = `schema "${schema ?? 'klieo'}"`
  if (names.length === 0) return print(`${where} is up to date\n`)
  for (const name of names) print(`${check ? 'missing' : 'applied'} ${name}\n`)
  return check ? 1 : print(`${where} is up to date\n`)
}

function print(text: string): number {
  process.stdout.write(text)
  return 0
}

function version(): string {
  return (JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as { version: string }).version
}

main(process.argv.slice(2)).then(
  (code) => {
    process.exitCode = code
  },
  (error: unknown) => {
    if (error instanceof UsageError) {
      process.stderr.write(`klieo-bus: ${error.message}; see klieo-bus --help\n`)
      process.exitCode = USAGE
      return
    }
    const text = error instanceof BusError ? `${error.message} [${error.code}]` : String(error)
    process.stderr.write(`klieo-bus: ${text}\n`)
    process.exitCode = 1
  },
)
