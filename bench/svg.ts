/**
 * Line plots as SVG, without a library. Readable on a light and on a dark page: nothing is filled behind the plot, lines have
 * middling colours, and text follows the reader's scheme.
 */

export interface Line {
  readonly name: string
  readonly points: readonly (readonly [x: number, y: number])[]
}

export interface PlotOptions {
  readonly title: string
  readonly xLabel: string
  readonly yLabel: string
  readonly lines: readonly Line[]
  /** @default 'linear' */
  readonly xScale?: 'linear' | 'log'
  readonly yScale?: 'linear' | 'log'
  /** Drawn and labelled instead of round numbers. */
  readonly xTicks?: readonly number[]
}

const WIDTH = 760
const HEIGHT = 380
const PLOT = { left: 72, top: 36, right: 530, bottom: 326 }
const COLOURS = ['#d9480f', '#1c7ed6', '#2f9e44', '#9c36b5', '#e0a100', '#0c8599', '#e64980', '#868e96']
const DASHES = ['', '6 3', '2 3', '8 3 2 3']

interface Axis {
  at(value: number): number
  readonly ticks: readonly number[]
}

export function linePlot(options: PlotOptions): string {
  const lines = options.lines.filter(({ points }) => points.length > 0)
  const xs = lines.flatMap(({ points }) => points.map(([x]) => x))
  const ys = lines.flatMap(({ points }) => points.map(([, y]) => y))
  const x = axis(options.xScale ?? 'linear', xs, [PLOT.left, PLOT.right], options.xTicks)
  const y = axis(options.yScale ?? 'linear', ys, [PLOT.bottom, PLOT.top])
  const parts = [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${HEIGHT}" width="${WIDTH}" height="${HEIGHT}" role="img" aria-label="${escaped(options.title)}">`,
    '<style>text{font:12px system-ui,sans-serif;fill:#333}.t{font-size:14px;font-weight:600}.g{stroke:#8886;stroke-width:1}',
    '@media (prefers-color-scheme:dark){text{fill:#ccc}}</style>',
    `<text class="t" x="${PLOT.left}" y="20">${escaped(options.title)}</text>`,
  ]
  for (const tick of x.ticks) {
    const at = n(x.at(tick))
    parts.push(`<path class="g" d="M${at} ${PLOT.top}V${PLOT.bottom}"/>`)
    parts.push(`<text x="${at}" y="${PLOT.bottom + 17}" text-anchor="middle">${short(tick)}</text>`)
  }
  for (const tick of y.ticks) {
    const at = n(y.at(tick))
    parts.push(`<path class="g" d="M${PLOT.left} ${at}H${PLOT.right}"/>`)
    parts.push(`<text x="${PLOT.left - 7}" y="${n(y.at(tick) + 4)}" text-anchor="end">${short(tick)}</text>`)
  }
  const middle = { x: (PLOT.left + PLOT.right) / 2, y: (PLOT.top + PLOT.bottom) / 2 }
  parts.push(`<text x="${middle.x}" y="${PLOT.bottom + 38}" text-anchor="middle">${escaped(options.xLabel)}</text>`)
  parts.push(`<text transform="translate(16 ${middle.y}) rotate(-90)" text-anchor="middle">${escaped(options.yLabel)}</text>`)
  for (const [index, { name, points }] of lines.entries()) {
    const stroke = `stroke="${COLOURS[index % COLOURS.length]}" stroke-width="2" stroke-dasharray="${DASHES[Math.floor(index / 2) % DASHES.length]}"`
    const path = points.map(([px, py], i) => `${i === 0 ? 'M' : 'L'}${n(x.at(px))} ${n(y.at(py))}`).join('')
    parts.push(`<path fill="none" ${stroke} d="${path}"/>`)
    if (points.length < 30) {
      for (const [px, py] of points) {
        parts.push(`<circle cx="${n(x.at(px))}" cy="${n(y.at(py))}" r="2.6" fill="${COLOURS[index % COLOURS.length]}"/>`)
      }
    }
    const at = PLOT.top + 8 + index * 20
    parts.push(`<path ${stroke} d="M${PLOT.right + 14} ${at}h24"/><text x="${PLOT.right + 44}" y="${at + 4}">${escaped(name)}</text>`)
  }
  parts.push('</svg>\n')
  return parts.join('\n')
}

function axis(scale: 'linear' | 'log', values: readonly number[], [from, to]: readonly [number, number], fixed?: readonly number[]): Axis {
  if (scale === 'log') {
    const positive = values.filter((value) => value > 0)
    const low = Math.floor(Math.log10(Math.min(...positive)) * 3) / 3
    const high = Math.max(low + 0.5, Math.ceil(Math.log10(Math.max(...positive)) * 3) / 3)
    const at = (value: number) => from + ((Math.log10(Math.max(value, 10 ** low)) - low) / (high - low)) * (to - from)
    const inside = (value: number) => Math.log10(value) >= low - 1e-9 && Math.log10(value) <= high + 1e-9
    const decades = Array.from({ length: 15 }, (_, index) => 10 ** (index - 4))
    const each = high - low > 2.4 ? [1] : [1, 2, 5]
    return { at, ticks: fixed ?? decades.flatMap((decade) => each.map((factor) => decade * factor)).filter(inside) }
  }
  const high = Math.max(...values, 0)
  const step = roundStep(high / 5)
  const top = Math.max(step, Math.ceil(high / step - 1e-9) * step)
  const ticks = fixed ?? Array.from({ length: Math.round(top / step) + 1 }, (_, index) => index * step)
  return { at: (value) => from + (value / top) * (to - from), ticks }
}

function roundStep(least: number): number {
  if (!(least > 0)) return 1
  const decade = 10 ** Math.floor(Math.log10(least))
  return (([1, 2, 2.5, 5, 10] as const).find((factor) => factor * decade >= least - 1e-12) ?? 10) * decade
}

function n(value: number): string {
  return String(Math.round(value * 10) / 10)
}

function short(value: number): string {
  if (value >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`
  if (value >= 1e3) return `${+(value / 1e3).toPrecision(3)}k`
  return String(+value.toPrecision(3))
}

function escaped(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('"', '&quot;')
}
