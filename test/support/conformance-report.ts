/** What a run of the conformance suite came to, for people: a row a backend, and what was skipped where and why. */

import { whySkipped } from '../../src/testing/conformance/kit.ts'

export interface ConformanceTest {
  /** As the harness names it. */
  readonly backend: string
  readonly name: string
  readonly state: 'passed' | 'failed' | 'skipped'
}

export interface ConformanceReport {
  readonly lines: readonly string[]
  /** Skipped by somebody else than the suite. */
  readonly unexplained: readonly string[]
}

/** @param notRun why the suite did not run, by backend */
export function conformanceReport(tests: readonly ConformanceTest[], notRun: ReadonlyMap<string, string>): ConformanceReport {
  const backends = [...new Set([...tests.map(({ backend }) => backend), ...notRun.keys()])].sort()
  /** By member of `supports`, then by test: the backends that lack it. */
  const reasons = new Map<string, Map<string, string[]>>()
  const unexplained: string[] = []
  for (const { backend, name, state } of tests) {
    if (state !== 'skipped') continue
    const why = whySkipped(name)
    if (!why) unexplained.push(`${backend}: ${name}`)
    else {
      const skipped = reasons.get(why.member) ?? new Map<string, string[]>()
      reasons.set(why.member, skipped)
      skipped.set(why.name, [...(skipped.get(why.name) ?? []), backend])
    }
  }
  const mostFirst = [...reasons].sort(([a, these], [b, those]) => those.size - these.size || (a < b ? -1 : 1))
  const rows = backends.map((backend) => {
    const why = notRun.get(backend)
    const of = tests.filter((one) => one.backend === backend)
    const count = (state: ConformanceTest['state']) => String(of.filter((one) => one.state === state).length)
    const by = mostFirst.flatMap(([member, skipped]) => {
      const here = [...skipped.values()].filter((lacking) => lacking.includes(backend)).length
      return here === 0 ? [] : [`${member} ${here}`]
    })
    return why === undefined
      ? [backend, count('passed'), count('failed'), count('skipped'), by.join(', ')]
      : [backend, '-', '-', '-', `not run: ${why}`]
  })
  const table = aligned([['backend', 'passed', 'failed', 'skipped', 'skipped because `supports` lacks'], ...rows])
  const lists = mostFirst.flatMap(([member, skipped]) => [
    '',
    `Skipped where \`supports\` lacks ${member}: ${skipped.size === 1 ? 'one test' : `${skipped.size} tests`}`,
    ...[...skipped].map(([name, lacking]) => `  ${name} (${lacking.join(', ')})`),
  ])
  const odd = unexplained.length === 0 ? [] : ['', 'Skipped, and not by `supports`:', ...unexplained.map((name) => `  ${name}`)]
  return { lines: [...table, ...lists, ...odd], unexplained }
}

function aligned(rows: readonly (readonly string[])[]): string[] {
  const widths = (rows[0] ?? []).map((_, column) => Math.max(...rows.map((row) => (row[column] as string).length)))
  return rows.map((row) =>
    row
      .map((cell, column) =>
        column === 0 || column === row.length - 1 ? cell.padEnd(widths[column] as number) : cell.padStart(widths[column] as number),
      )
      .join('  ')
      .trimEnd(),
  )
}
