/** The curves of a run. */

import type { Results } from './results.ts'
import { type Line, linePlot, type PlotOptions } from './svg.ts'

type Shape = Omit<PlotOptions, 'lines'>

const CALLERS = { xLabel: 'concurrent callers', xScale: 'log', xTicks: [1, 2, 4, 8, 16, 32, 64, 128, 256] } as const
const SHARES = { xLabel: 'share of the samples, %', yLabel: 'ms (logarithmic)', yScale: 'log', xTicks: [0, 25, 50, 75, 90, 99] } as const

export const PLOTS: Readonly<Record<string, Shape>> = {
  enqueue: { title: 'Enqueue', yLabel: 'jobs/s (logarithmic)', yScale: 'log', ...CALLERS },
  publish: { title: 'Publish, acknowledged', yLabel: 'messages/s (logarithmic)', yScale: 'log', ...CALLERS },
  snapshot: { title: 'Drain with and without an old snapshot held open', xLabel: 'jobs processed before', yLabel: 'jobs/s' },
  backlog: { title: 'One claim in front of a backlog, p50', xLabel: 'jobs in the table', xScale: 'log', yLabel: 'ms' },
  'latency-idle': { title: 'Enqueue to start of the handler, idle', ...SHARES },
  'latency-500': { title: 'Enqueue to start of the handler, 500 jobs/s', ...SHARES },
  request: { title: 'Request and reply, round trip', ...SHARES },
}

/** @returns SVG texts by the name of the plot */
export function plots(results: Results): Map<string, string> {
  const drawn = new Map<string, string>()
  for (const [name, shape] of Object.entries(PLOTS)) {
    const lines = new Map<string, [number, number][]>()
    for (const { plot, contender, median } of results.rows) {
      if (plot?.plot !== name) continue
      const line = plot.line ?? contender
      lines.set(line, [...(lines.get(line) ?? []), [plot.x, median]])
    }
    if (lines.size === 0) continue
    const sorted = [...lines].map(([line, points]): Line => ({ name: line, points: points.sort(([a], [b]) => a - b) }))
    drawn.set(name, linePlot({ ...shape, lines: sorted }))
  }
  return drawn
}
