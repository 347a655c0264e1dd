const MOST = 100_000

/**
 * The ids of what a bridge has published, of the last 100,000: it must not be published again, however late it comes again. Also not once it was
 * acked: a nats-server that was killed has forgotten acks that it had answered.
 */
export class Published {
  readonly #ids = new Set<string>()
  /** Goes on behind what it has answered. */
  readonly #oldest = this.#ids.values()

  has(id: string): boolean {
    return this.#ids.has(id)
  }

  add(id: string): void {
    this.#ids.add(id)
    if (this.#ids.size > MOST) this.#ids.delete(this.#oldest.next().value as string)
  }
}
