/**
 * A mutant: the bus with one guarantee broken on purpose. The tests that claim to hold that guarantee must fail on it, or
 * they hold nothing.
 */

export interface Edit {
  /** From the root of the clone. */
  readonly file: string
  /** Stands in the file exactly once. */
  readonly find: string
  readonly replace: string
}

export interface Mutant {
  /** kebab-case. */
  readonly id: string
  /** The rule of docs/contract.md that is broken; the names of the tests that catch it cite it. */
  readonly rule: string
  /** What the rule promises, in one sentence. */
  readonly guarantee: string
  /** What is done to the source. */
  readonly broken: string
  readonly edits: readonly Edit[]
  /** Test files, from the root of the clone. */
  readonly files: readonly string[]
  /** Parts of the names of tests of these files: one of them at the least must fail. */
  readonly caughtBy: readonly string[]
  /** Parts of the names of tests that run along: one of them at the least must pass, which shows that the bus still works otherwise. */
  readonly beside: readonly string[]
}

/** @throws when the text is not there exactly once: then the source has changed, and the mutant must follow it */
export function applyEdit(text: string, { file, find, replace }: Edit): string {
  const at = text.indexOf(find)
  if (at < 0) throw new Error(`${file} does not hold the text to be replaced:\n${find}`)
  if (text.indexOf(find, at + 1) >= 0) throw new Error(`${file} holds the text to be replaced more than once:\n${find}`)
  if (find === replace) throw new Error(`${file}: the replacement changes nothing:\n${find}`)
  return text.slice(0, at) + replace + text.slice(at + find.length)
}

/** The files that the mutant changes, as they become. @param read answers a file of the clone */
export function mutate(mutant: Mutant, read: (file: string) => string): Map<string, string> {
  const changed = new Map<string, string>()
  for (const edit of mutant.edits) changed.set(edit.file, applyEdit(changed.get(edit.file) ?? read(edit.file), edit))
  return changed
}
