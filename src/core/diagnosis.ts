/** What was found when somebody looked at a bus and its server. */

/** `ok` and `notice` need nothing; a `warning` gets worse if nobody does anything; with an `error` something does not work. */
export type FindingLevel = 'ok' | 'notice' | 'warning' | 'error'

export interface Finding {
  /** What was looked at, such as `old_snapshot` or `dead_jobs`; docs/command-line.md lists them. Stable, for scripts. */
  readonly code: string
  readonly level: FindingLevel
  /** One sentence, with names and numbers. */
  readonly message: string
  /** What to do. */
  readonly advice?: string
}
