/**
 * Ctrl-C, and what service managers send. The first one asks to end in order: what runs is let end. The second one kills it, and ends
 * klieo-bus even where a server does not answer.
 */

import { EXIT } from './failure.ts'

/** To hand back what was held. */
const KILLED_MAY_TAKE_MS = 2_000
const SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const

export class Interrupts {
  readonly #drain = new AbortController()
  readonly #kill = new AbortController()
  readonly #onSignal = () => {
    if (!this.#drain.signal.aborted) return this.#drain.abort()
    this.#kill.abort()
    setTimeout(() => process.exit(EXIT.interrupted), KILLED_MAY_TAKE_MS).unref()
  }

  constructor() {
    for (const signal of SIGNALS) process.on(signal, this.#onSignal)
  }

  /** Aborted by the first one, or by {@link end}. */
  get drain(): AbortSignal {
    return this.#drain.signal
  }

  /** Aborted by the second one. */
  get kill(): AbortSignal {
    return this.#kill.signal
  }

  /** Ends as the first Ctrl-C does: there is nothing more to do. */
  end(): void {
    this.#drain.abort()
  }

  [Symbol.dispose](): void {
    // After a Ctrl-C what is left to do is handing back, which a further one must not cut short.
    if (this.#drain.signal.aborted) return
    for (const signal of SIGNALS) process.off(signal, this.#onSignal)
  }
}

/** Resolves when the signal is aborted. */
export function aborted(signal: AbortSignal): Promise<void> {
  if (signal.aborted) return Promise.resolve()
  return new Promise((resolve) => signal.addEventListener('abort', () => resolve(), { once: true }))
}
