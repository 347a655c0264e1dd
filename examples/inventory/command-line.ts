import { parseArgs } from 'node:util'
import { BACKENDS, type Backend } from './backend.ts'

const HELP = `An inventory of the packages under node_modules: what klieo-bus does, at work.

  npm start                run it on an embedded PostgreSQL that goes with it
  npm start -- --keep      leave the data for a look with psql
  DATABASE_URL=… npm start run it on that server, in two schemas of its own
  npm start -- --backend nats
                           the bus on NATS JetStream, the tables in PostgreSQL:
                           a nats-server of the PATH that goes with the run, or
                           that of NATS_URL=host:port, under a prefix of its own

Every package of package-lock.json becomes a row and a job, in one transaction.
Three worker processes hash its files and write the result in the transaction
that acks the job. Half-way one of them is killed with kill -9. The table at the
end is counted in the database. On NATS there is no such transaction: the order
of the steps, and keys by which a second try is known, do what it did.

Exit codes: 0 everything adds up, 1 it does not or the run failed, 2 wrong usage
`

export interface Options {
  readonly backend: Backend
  readonly keep: boolean
}

export class UsageError extends Error {}

/** @returns the text to print where that is all there is to do */
export function readCommandLine(args: readonly string[]): Options | string {
  const { help, keep, backend: name } = parse(args)
  if (help) return HELP
  const backend = BACKENDS.find((known) => known === name)
  if (backend === undefined) throw new UsageError(`--backend is ${BACKENDS.join(' or ')}, not '${name}'`)
  return { backend, keep }
}

function parse(args: readonly string[]) {
  try {
    return parseArgs({
      args: [...args],
      options: {
        backend: { type: 'string', default: 'postgres' },
        keep: { type: 'boolean', default: false },
        help: { type: 'boolean', short: 'h', default: false },
      },
    }).values
  } catch (error) {
    // "Unknown option '--x'. To specify a positional …": the first sentence is the one that helps.
    throw new UsageError((error as Error).message.split('. ')[0])
  }
}
