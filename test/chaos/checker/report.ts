/** What a check found: how much it looked at, and what broke a rule. */

export interface Violation {
  readonly rule: string
  /** One sentence. */
  readonly text: string
  /** The entries that show it, trimmed. */
  readonly evidence: readonly string[]
}

export interface Report {
  readonly directory: string
  readonly entries: number
  /** What happened, by kind and outcome. */
  readonly counts: Readonly<Record<string, number>>
  /** What each rule looked at: a rule that looked at nothing has shown nothing. */
  readonly checked: Readonly<Record<string, number>>
  /** All of them by rule; of each rule only the first {@link KEPT} are kept below. */
  readonly broken: Readonly<Record<string, number>>
  readonly violations: readonly Violation[]
}

const KEPT = 20
const LONGEST = 600

export class Findings {
  readonly violations: Violation[] = []
  readonly broken: Record<string, number> = {}
  readonly checked: Record<string, number> = {}

  /** @param evidence is written out only if it is kept */
  violation(rule: string, text: string, ...evidence: unknown[]): void {
    const count = (this.broken[rule] ?? 0) + 1
    this.broken[rule] = count
    if (count <= KEPT) this.violations.push({ rule, text, evidence: evidence.flat().map(show) })
  }

  looked(rule: string, times = 1): void {
    this.checked[rule] = (this.checked[rule] ?? 0) + times
  }
}

/** What names itself by `toString`, or plain data. */
function show(thing: unknown): string {
  const text = typeof thing === 'string' ? thing : thing instanceof Shown ? thing.toString() : JSON.stringify(thing)
  return text.length > LONGEST ? `${text.slice(0, LONGEST)}…` : text
}

/** An entry that knows how to write itself as evidence. */
export abstract class Shown {
  abstract toString(): string
}

/** The report as text, for people. */
export function describe(report: Report): string {
  const lines = [`${report.entries} entries in ${report.directory}`, '', 'what happened']
  for (const [name, count] of Object.entries(report.counts).sort()) lines.push(`  ${name.padEnd(40)} ${count}`)
  lines.push('', 'what was checked')
  for (const [name, count] of Object.entries(report.checked).sort()) lines.push(`  ${name.padEnd(40)} ${count}`)
  lines.push('', report.violations.length === 0 ? 'no rule was broken' : 'broken rules')
  for (const [name, count] of Object.entries(report.broken).sort()) lines.push(`  ${name.padEnd(40)} ${count}`)
  for (const { rule, text, evidence } of report.violations) {
    lines.push('', `${rule}: ${text}`)
    for (const line of evidence) lines.push(`    ${line}`)
  }
  return `${lines.join('\n')}\n`
}
