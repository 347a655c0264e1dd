/** What the terminal shows: lines with the time, one live line of progress below them, tables. Plain lines where it is none. */

const WIDTH = 80
const INDENT = '         '
/** Without a terminal the live line becomes a line each so many per cent. */
const PLAIN_STEP = 0.25

export class Screen {
  readonly #out: NodeJS.WriteStream
  readonly #startedAt = performance.now()
  readonly #live: boolean
  readonly #colours: boolean
  #progress = ''
  #plainStep = 0
  #closed = false

  constructor(out: NodeJS.WriteStream = process.stdout) {
    this.#out = out
    this.#live = out.isTTY === true && process.env.TERM !== 'dumb'
    this.#colours = this.#live && !process.env.NO_COLOR
  }

  /** Seconds since the start. */
  get seconds(): string {
    return ((performance.now() - this.#startedAt) / 1000).toFixed(1)
  }

  /**
   * A stage, in plain words, behind the time.
   * @param style one of the colours below
   */
  say(text: string, style: (text: string) => string = (plain) => plain): void {
    const [first = '', ...rest] = wrap(text, WIDTH - INDENT.length).map(style)
    this.#write(`${this.dim(`${this.seconds.padStart(5)} s`)}  ${first}\n${rest.map((line) => `${INDENT}${line}\n`).join('')}`)
  }

  print(text: string): void {
    this.#write(`${text}\n`)
  }

  progress(done: number, total: number, text: string): void {
    const share = total === 0 ? 1 : done / total
    const line = `${done} of ${total} packages, ${text}`
    if (this.#live) {
      const filled = Math.floor(share * 24)
      const bar = `[${'#'.repeat(filled)}${'.'.repeat(24 - filled)}] `
      const columns = Math.min(this.#out.columns || WIDTH, WIDTH) - 1
      this.#progress = `${INDENT}${bar}${line}`.slice(0, columns)
      this.#write('')
    } else if (share >= this.#plainStep + PLAIN_STEP) {
      this.#plainStep = Math.floor(share / PLAIN_STEP) * PLAIN_STEP
      this.say(line)
    }
  }

  endProgress(): void {
    this.#progress = ''
    this.#write('')
  }

  /** Nothing is shown any more. */
  close(): void {
    if (this.#closed) return
    this.endProgress()
    this.#closed = true
  }

  dim = (text: string) => this.#colour('2', text)
  bold = (text: string) => this.#colour('1', text)
  green = (text: string) => this.#colour('32', text)
  red = (text: string) => this.#colour('31', text)

  #colour(code: string, text: string): string {
    return this.#colours ? `\x1b[${code}m${text}\x1b[0m` : text
  }

  /** The live line is the last one always: taken away, the text written, and put back, in one write, so that nothing flickers. */
  #write(text: string): void {
    if (this.#closed) return
    this.#out.write(this.#live ? `\r\x1b[K${text}${this.#progress}` : text)
  }
}

function wrap(text: string, width: number): string[] {
  const lines: string[] = []
  for (const word of text.split(' ')) {
    const last = lines.at(-1)
    if (last !== undefined && last.length + 1 + word.length <= width) lines[lines.length - 1] = `${last} ${word}`
    else lines.push(word)
  }
  return lines
}

/** `61.3 MB`: the unit is 1,000,000 bytes. */
export function megabytes(bytes: number): string {
  return `${(bytes / 1e6).toFixed(1)} MB`
}

export function grouped(value: number): string {
  return value.toLocaleString('en-US')
}
