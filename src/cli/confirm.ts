/** Asks before something is lost for good. */

import { createInterface } from 'node:readline/promises'
import { UsageError } from './failure.ts'

/**
 * @param what ends with a question mark
 * @returns false when a person says no
 * @throws UsageError where nobody can be asked
 */
export async function confirmed(what: string, yes: boolean): Promise<boolean> {
  if (yes) return true
  if (!process.stdin.isTTY || !process.stderr.isTTY) throw new UsageError(`${what} Nobody can be asked here: say --yes`, { seeHelp: false })
  const terminal = createInterface({ input: process.stdin, output: process.stderr })
  try {
    return /^y(es)?$/i.test((await terminal.question(`${what} [y/N] `)).trim())
  } finally {
    terminal.close()
  }
}
