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
