/** Tables for people: as wide as the terminal, as narrow as their content. */

import type { Output } from './output.ts'
import { clip, printable, width } from './text.ts'

export interface Column<Row> {
  readonly title: string
  readonly right?: boolean
  /** May be cut where the terminal is too narrow. */
  readonly flexible?: boolean
  cell(row: Row): string
}

const GAP = '  '
const LEAST_FLEXIBLE = 12

/** The lines of a table, its head first. @param columns cells of the terminal */
export function tableLines<Row>(columns: readonly Column<Row>[], rows: readonly Row[], available: number): string[] {
  const cells = rows.map((row) => columns.map((column) => printable(column.cell(row))))
  const all = [columns.map(({ title }) => title), ...cells]
  const widths = columns.map((_, at) => Math.max(...all.map((line) => width(line[at]!))))
  shrink(columns, widths, available)
  return all.map((line) =>
    line
      .map((cell, at) => {
        const text = clip(cell, widths[at]!)
        const padding = ' '.repeat(widths[at]! - width(text))
        return columns[at]!.right ? padding + text : text + padding
      })
      .join(GAP)
      .trimEnd(),
  )
}

function shrink<Row>(columns: readonly Column<Row>[], widths: number[], available: number): void {
  let over = widths.reduce((sum, one) => sum + one, GAP.length * (widths.length - 1)) - available
  for (let at = columns.length - 1; at >= 0 && over > 0; at--) {
    if (!columns[at]!.flexible) continue
    const less = Math.min(over, Math.max(0, widths[at]! - LEAST_FLEXIBLE))
    widths[at]! -= less
    over -= less
  }
}

/** A table for people, or an object a row for scripts. */
export async function printRows<Row extends object>(
  output: Output,
  columns: readonly Column<Row>[],
  rows: readonly Row[],
  options: { readonly none: string; readonly toJson?: (row: Row) => object },
): Promise<void> {
  if (output.json) {
    for (const row of rows) await output.object(options.toJson?.(row) ?? row)
    return
  }
  if (rows.length === 0) return output.note(options.none)
  const [head, ...lines] = tableLines(columns, rows, output.columns)
  await output.line([output.style('bold', head!), ...lines].join('\n'))
}
