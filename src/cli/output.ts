/** What a command shows: results on standard output, everything else on standard error. */

import { ReaderGone } from './failure.ts'

/** On and off, of ECMA-48 (select graphic rendition). */
const STYLES = {
  bold: [1, 22],
  dim: [2, 22],
  red: [31, 39],
  green: [32, 39],
  yellow: [33, 39],
  cyan: [36, 39],
} as const

export type Style = keyof typeof STYLES

function styled(style: Style, text: string): string {
  const [on, off] = STYLES[style]
  return `\x1b[${on}m${text}\x1b[${off}m`
}

/** Colours are for people: a terminal that knows them, and whose owner has not said no (no-color.org). */
export function wantsColour(isTerminal: boolean, env: NodeJS.ProcessEnv): boolean {
  return isTerminal && !env.NO_COLOR && env.TERM !== 'dumb'
}

export class Output {
  readonly json: boolean
  readonly isTerminal = process.stdout.isTTY === true
  readonly #colour = wantsColour(process.stdout.isTTY === true, process.env)
  readonly #errorColour = wantsColour(process.stderr.isTTY === true, process.env)
  readonly #gone = Promise.withResolvers<never>()
  #isGone = false

  constructor(json: boolean) {
    this.json = json
    this.#gone.promise.catch(() => {})
    process.stdout.on('error', (error: NodeJS.ErrnoException) => {
      this.#isGone = true
      this.#gone.reject(error.code === 'EPIPE' ? new ReaderGone() : error)
    })
    // Nobody reads the errors: there is nobody to tell.
    process.stderr.on('error', () => {})
  }

  /** The reader of standard output has gone. */
  get isGone(): boolean {
    return this.#isGone
  }

  /** Rejects when the reader goes. */
  get gone(): Promise<never> {
    return this.#gone.promise
  }

  /** Of a terminal; unlimited elsewhere. */
  get columns(): number {
    return this.isTerminal ? (process.stdout.columns ?? 80) : Number.POSITIVE_INFINITY
  }

  /**
   * Resolves when it is written, at the pace of the reader.
   * @throws ReaderGone
   */
  async write(chunk: string | Uint8Array): Promise<void> {
    if (this.#isGone) return this.#gone.promise
    const { promise, resolve } = Promise.withResolvers<void>()
    process.stdout.write(chunk, () => resolve())
    await promise
    if (this.#isGone) await this.#gone.promise
  }

  line(text: string): Promise<void> {
    return this.write(`${text}\n`)
  }

  /** For scripts: one object, one line. */
  object(value: object): Promise<void> {
    return this.line(JSON.stringify(value))
  }

  /** The one or the other, as it was asked for. */
  result(value: object, text: string): Promise<void> {
    return this.json ? this.object(value) : this.line(text)
  }

  /** As {@link result}, of what is done whoever reads it: that the reader has gone is no reason to stop halfway. */
  async report(value: object, text: string): Promise<void> {
    if (this.#isGone) return
    await this.result(value, text).catch((error) => {
      if (!(error instanceof ReaderGone)) throw error
    })
  }

  /** What is good to know and no result. */
  note(text: string): void {
    process.stderr.write(`${text}\n`)
  }

  /** A failure that does not end the command. */
  warn(text: string): void {
    this.note(`klieo-bus: ${text}`)
  }

  style(style: Style, text: string): string {
    return this.#colour ? styled(style, text) : text
  }

  styleError(style: Style, text: string): string {
    return this.#errorColour ? styled(style, text) : text
  }
}
