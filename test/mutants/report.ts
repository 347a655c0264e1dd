/** What is printed: a table for people, in the form that Markdown shows as one. */

import type { Judgement } from './judge.ts'
import type { Mutant } from './mutant.ts'

export interface Outcome {
  readonly mutant: Mutant
  readonly judgement: Judgement
  readonly ms: number
}

export function seconds(ms: number): string {
  return (ms / 1_000).toFixed(1)
}

export function line({ mutant, judgement, ms }: Outcome): string {
  const { verdict, by, why } = judgement
  return `${verdict.padEnd(8)} ${mutant.rule.padEnd(4)} ${mutant.id} (${seconds(ms)} s) ${verdict === 'caught' ? `by ${by.length}` : why}`
}

export function table(outcomes: readonly Outcome[]): string {
  const rows = outcomes.map(({ mutant, judgement: { verdict, by, also, why }, ms }) => {
    const caught =
      verdict === 'caught' ? by.join('<br>') + (also.length > 0 ? `<br>and ${also.length} more` : '') : `**${verdict}**: ${why}`
    return [`${mutant.id}: ${mutant.broken}`, `${mutant.rule} ${mutant.guarantee}`, caught, seconds(ms)]
  })
  return [['mutant', 'guarantee', 'caught by', 'seconds'], ['---', '---', '---', '---:'], ...rows]
    .map((cells) => `| ${cells.map((cell) => cell.replaceAll('\n', ' ').replaceAll('|', '\\|')).join(' | ')} |`)
    .join('\n')
}

export function list(mutants: readonly Mutant[]): string {
  return mutants
    .map(({ id, rule, guarantee, broken, edits, files, caughtBy }) =>
      [
        `${id}`,
        `  ${rule}: ${guarantee}`,
        `  broken: ${broken} (${[...new Set(edits.map(({ file }) => file))].join(', ')})`,
        `  caught by: ${caughtBy.join('; ')} (${files.join(', ')})`,
      ].join('\n'),
    )
    .join('\n')
}
