const LONGEST = 4_000

/** What is kept or sent of a handler's error: its message, never its stack. */
export function errorText(error: unknown): string {
  let text: string
  try {
    text = error instanceof Error ? error.message : String(error)
  } catch {
    text = 'the handler threw something that has no text'
  }
  return text.replaceAll('\0', '').toWellFormed().slice(0, LONGEST).toWellFormed()
}

/** Within `longest` characters, well-formed and without control characters. */
export function oneLine(text: string, longest: number): string {
  return text
    .slice(0, longest)
    .replaceAll(/[\p{Cc}\u2028\u2029]+/gu, ' ')
    .toWellFormed()
    .trim()
}
