/** How far something is, on one line of a terminal that is written over. */

import { number } from './text.ts'

const EVERY_MS = 100
const BAR_CELLS = 24

export interface Progress {
  /** @param part 0 to 1, where the whole is known */
  show(count: number, part?: number): void
  /** Takes the line away. */
  end(): void
}

const SILENT: Progress = { show: () => {}, end: () => {} }

/** Silent where nobody watches. @param what is counted: `jobs` */
export function progressOn(stream: NodeJS.WriteStream, what: string): Progress {
  if (!stream.isTTY) return SILENT
  const startedAt = performance.now()
  let shownAt = Number.NEGATIVE_INFINITY
  return {
    show(count, part) {
      const now = performance.now()
      if (now - shownAt < EVERY_MS) return
      shownAt = now
      stream.write(`\r\x1b[K${progressLine(count, what, now - startedAt, part)}`)
    },
    end: () => void stream.write('\r\x1b[K'),
  }
}

export interface StatusLine {
  show(text: string): void
  /** Takes the line away. */
  end(): void
}

/** A line that is written over, silent where nobody watches. */
export function lineOn(stream: NodeJS.WriteStream): StatusLine {
  if (!stream.isTTY) return { show: () => {}, end: () => {} }
  return {
    show: (text) => void stream.write(`\r\x1b[K${text.slice(0, (stream.columns || 80) - 1)}`),
    end: () => void stream.write('\r\x1b[K'),
  }
}

export function progressLine(count: number, what: string, tookMs: number, part?: number): string {
  const rate = tookMs > 0 ? `, ${number(Math.round((count * 1_000) / tookMs))}/s` : ''
  if (part === undefined) return `${number(count)} ${what}${rate}`
  const full = Math.round(Math.min(1, part) * BAR_CELLS)
  return `${'█'.repeat(full)}${'░'.repeat(BAR_CELLS - full)} ${Math.floor(Math.min(1, part) * 100)}%  ${number(count)} ${what}${rate}`
}
