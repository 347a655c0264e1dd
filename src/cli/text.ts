/** Values as people read them. */

const decoder = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })

/** `undefined` for bytes that are no UTF-8. */
export function textOf(bytes: Uint8Array): string | undefined {
  try {
    return decoder.decode(bytes)
  } catch {
    return undefined
  }
}

/** A payload in JSON: its text, or base64 under another name. */
export function payloadFields<Name extends string>(name: Name, bytes: Uint8Array): Record<string, string> {
  const text = textOf(bytes)
  return text === undefined ? { [`${name}Base64`]: Buffer.from(bytes).toString('base64') } : { [name]: text }
}

/** A payload on one line of a person's screen. */
export function shownPayload(bytes: Uint8Array): string {
  const text = textOf(bytes)
  return text === undefined ? `(${plural(bytes.byteLength, 'byte')} that are no text)` : printable(text)
}

/** A payload on a person's screen, with its own lines and tabs. */
export function shownLines(bytes: Uint8Array): string {
  const text = textOf(bytes)
  if (text === undefined) return shownPayload(bytes)
  const parts = text.split(/(\r?\n|\t)/)
  return parts.map((part, at) => (at % 2 === 1 ? part : printable(part))).join('')
}

/** What others wrote must not move a cursor, change a title or colour what follows. */
export function printable(text: string): string {
  return text.replaceAll(/[\p{Cc}\u2028\u2029\u202a-\u202e\u2066-\u2069]/gu, (character) => {
    if (character === '\n') return '\\n'
    if (character === '\r') return '\\r'
    if (character === '\t') return '\\t'
    return `\\u${character.codePointAt(0)!.toString(16).padStart(4, '0')}`
  })
}

export function number(value: number): string {
  return value.toLocaleString('en-US')
}

export function plural(count: number, what: string): string {
  return `${number(count)} ${what}${count === 1 ? '' : 's'}`
}

const UNITS: readonly (readonly [string, number])[] = [
  ['d', 86_400_000],
  ['h', 3_600_000],
  ['m', 60_000],
  ['s', 1_000],
]

/** Two units at the most: `1d 4h`, `3m 20s`, `0s`. */
export function duration(ms: number): string {
  const parts: string[] = []
  let left = Math.max(0, ms)
  for (const [unit, size] of UNITS) {
    const count = Math.floor(left / size)
    left -= count * size
    if (count > 0) parts.push(`${count}${unit}`)
    else if (parts.length > 0) break
    if (parts.length === 2) break
  }
  return parts.length > 0 ? parts.join(' ') : '0s'
}

export function ago(time: Date | undefined, now: number = Date.now()): string {
  return time === undefined ? '' : `${duration(now - time.getTime())} ago`
}

export function bytes(count: number): string {
  if (count < 1_024) return `${count} B`
  if (count < 1_024 * 1_024) return `${(count / 1_024).toFixed(1)} KiB`
  return `${(count / 1_024 / 1_024).toFixed(1)} MiB`
}

/** Terminal cells: wide characters take two, combining ones none. */
export function width(text: string): number {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: what is plain ASCII needs no look
  if (/^[\x00-\x7f]*$/.test(text)) return text.length
  let cells = 0
  for (const { segment } of new Intl.Segmenter().segment(text)) {
    cells += /\p{Emoji_Presentation}|[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6]/u.test(
      segment,
    )
      ? 2
      : 1
  }
  return cells
}

/** At most so many cells, with an ellipsis where something is left out. */
export function clip(text: string, cells: number): string {
  if (width(text) <= cells) return text
  let clipped = ''
  let used = 0
  for (const { segment } of new Intl.Segmenter().segment(text)) {
    used += width(segment)
    if (used > cells - 1) break
    clipped += segment
  }
  return `${clipped}…`
}
