/**
 * Ctrl-C, and what service managers send. The first one asks to end in order: what runs is let end. The second one kills it.
 */

const SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const

export class Interrupts {
  readonly #drain = new AbortController()
  readonly #kill = new AbortController()
  readonly #onSignal = () => {
    if (this.#drain.signal.aborted) this.#kill.abort()
    else this.#drain.abort()
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
    for (const signal of SIGNALS) process.off(signal, this.#onSignal)
  }
}

/** Resolves when the signal is aborted. */
export function aborted(signal: AbortSignal): Promise<void> {
  if (signal.aborted) return Promise.resolve()
  return new Promise((resolve) => signal.addEventListener('abort', () => resolve(), { once: true }))
}
