import { parseArgs } from 'node:util'

const HELP = `An inventory of the packages under node_modules: what klieo-bus does, at work.

  npm start                run it on an embedded PostgreSQL that goes with it
  npm start -- --keep      leave the data for a look with psql
  DATABASE_URL=… npm start run it on that server, in two schemas of its own

Every package of package-lock.json becomes a row and a job, in one transaction.
Three worker processes hash its files and write the result in the transaction
that acks the job. Half-way one of them is killed with kill -9. The table at the
end is counted in the database.

Exit codes: 0 everything adds up, 1 it does not or the run failed, 2 wrong usage
`

export interface Options {
  readonly keep: boolean
}

export class UsageError extends Error {}

/** @returns the text to print where that is all there is to do */
export function readCommandLine(args: readonly string[]): Options | string {
  try {
    const { values } = parseArgs({
      args: [...args],
      options: { keep: { type: 'boolean', default: false }, help: { type: 'boolean', short: 'h', default: false } },
    })
    return values.help ? HELP : { keep: values.keep }
  } catch (error) {
    // "Unknown option '--x'. To specify a positional …": the first sentence is the one that helps.
    throw new UsageError((error as Error).message.split('. ')[0])
  }
}
