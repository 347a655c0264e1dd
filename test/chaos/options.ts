/** The command line of a chaos run. */

import { randomInt } from 'node:crypto'
import { resolve } from 'node:path'
import { parseArgs } from 'node:util'

export interface Options {
  readonly minutes: number
  readonly seed: string
  /** Where the programs of an installed server are; without it, the embedded one. */
  readonly postgres: string | undefined
  /** Where the record stays. */
  readonly keep: string | undefined
  readonly rate: number
}

export const USAGE = `npm run chaos -- [--minutes 1] [--seed N] [--postgres <bin directory>] [--keep <directory>] [--rate 1]`

/** @throws an Error that says what is wrong */
export function readOptions(args: readonly string[]): Options {
  const text = { type: 'string' } as const
  const { values } = parseArgs({ args: [...args], options: { minutes: text, seed: text, postgres: text, keep: text, rate: text } })
  return {
    minutes: positive('minutes', values.minutes ?? '1'),
    seed: values.seed ?? String(randomInt(1, 1_000_000)),
    postgres: values.postgres && resolve(values.postgres),
    keep: values.keep && resolve(values.keep),
    rate: positive('rate', values.rate ?? '1'),
  }
}

/** What repeats the faults and the choices of everybody in the run. */
export function commandOf({ minutes, seed, postgres, rate }: Options): string {
  const more = [...(postgres === undefined ? [] : ['--postgres', postgres]), ...(rate === 1 ? [] : ['--rate', String(rate)])]
  return ['npm run chaos --', '--minutes', minutes, '--seed', seed, ...more].join(' ')
}

function positive(name: string, value: string): number {
  const number = Number(value)
  if (!(number > 0)) throw new Error(`--${name} must be a number above 0, not ${value}`)
  return number
}
