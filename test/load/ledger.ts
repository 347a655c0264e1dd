/** What a run has measured, each beside its bound, printed as it comes. */

export interface Bound {
  readonly atMost?: number
  readonly atLeast?: number
  /** Why this and no other: what a user would notice beyond it. */
  readonly why: string
}

export interface Entry {
  readonly scenario: string
  readonly what: string
  readonly value: number
  readonly unit: string
  readonly bound?: Bound
  readonly held: boolean
}

export class Ledger {
  readonly entries: Entry[] = []
  #scenario = ''

  begin(scenario: string, title: string): void {
    this.#scenario = scenario
    process.stdout.write(`\n${scenario}: ${title}\n`)
  }

  /** A figure and its bound; without one it is only told. */
  measure(what: string, value: number, unit: string, bound?: Bound): void {
    const held =
      bound === undefined || (value <= (bound.atMost ?? Number.POSITIVE_INFINITY) && value >= (bound.atLeast ?? Number.NEGATIVE_INFINITY))
    this.#add({ scenario: this.#scenario, what, value, unit, ...(bound ? { bound } : {}), held })
  }

  /** Nothing lost, nothing twice, nothing else: a count that is right or wrong. */
  exactly(what: string, value: number, wanted: number, why: string): void {
    this.measure(what, value, '', { atMost: wanted, atLeast: wanted, why })
  }

  broke(what: string, why: string): void {
    this.#add({ scenario: this.#scenario, what, value: Number.NaN, unit: '', bound: { why }, held: false })
  }

  get held(): number {
    return this.entries.filter(({ bound, held }) => bound && held).length
  }

  get broken(): readonly Entry[] {
    return this.entries.filter(({ held }) => !held)
  }

  #add(entry: Entry): void {
    this.entries.push(entry)
    process.stdout.write(`${line(entry)}\n`)
  }
}

export function line({ what, value, unit, bound, held }: Entry): string {
  const state = bound === undefined ? '      ' : held ? 'held  ' : 'BROKEN'
  const figure = Number.isNaN(value) ? '' : `${number(value)}${unit === '' ? '' : ` ${unit}`}`
  return `  ${state} ${what.padEnd(66)} ${figure.padStart(14)}${bound ? `  ${limit(bound)}` : ''}`
}

function limit({ atMost, atLeast, why }: Bound): string {
  const sides =
    atMost !== undefined && atMost === atLeast
      ? `= ${number(atMost)}`
      : [atLeast === undefined ? '' : `≥ ${number(atLeast)}`, atMost === undefined ? '' : `≤ ${number(atMost)}`]
          .filter((side) => side !== '')
          .join(', ')
  return sides === '' ? `(${why})` : `${sides}  (${why})`
}

function number(value: number): string {
  if (Number.isInteger(value) || Math.abs(value) >= 1_000) return Math.round(value).toLocaleString('en')
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2)
}
