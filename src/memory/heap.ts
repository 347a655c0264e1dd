/** A binary heap whose items know where they are, so that one can be moved or taken out without a search. */

export interface Slotted {
  /** Its place in the one heap it is in; -1: in none. */
  slot: number
}

export class Heap<T extends Slotted> {
  readonly #items: T[] = []
  readonly #before: (a: T, b: T) => boolean

  /** @param before a strict order */
  constructor(before: (a: T, b: T) => boolean) {
    this.#before = before
  }

  get size(): number {
    return this.#items.length
  }

  /** In no order. It may be changed meanwhile. */
  items(): T[] {
    return [...this.#items]
  }

  peek(): T | undefined {
    return this.#items[0]
  }

  holds(item: T): boolean {
    return this.#items[item.slot] === item
  }

  push(item: T): void {
    item.slot = this.#items.length
    this.#items.push(item)
    this.#up(item)
  }

  pop(): T | undefined {
    const first = this.#items[0]
    if (first) this.remove(first)
    return first
  }

  /** What the order depends on has changed. */
  moved(item: T): void {
    this.#up(item)
    this.#down(item)
  }

  remove(item: T): void {
    const last = this.#items.pop() as T
    if (last !== item) {
      last.slot = item.slot
      this.#items[last.slot] = last
      this.moved(last)
    }
    item.slot = -1
  }

  #up(item: T): void {
    while (item.slot > 0) {
      const parent = this.#items[(item.slot - 1) >> 1] as T
      if (!this.#before(item, parent)) return
      this.#swap(item, parent)
    }
  }

  #down(item: T): void {
    for (;;) {
      const left = this.#items[item.slot * 2 + 1]
      const right = this.#items[item.slot * 2 + 2]
      const child = left && right && this.#before(right, left) ? right : left
      if (!child || !this.#before(child, item)) return
      this.#swap(child, item)
    }
  }

  #swap(a: T, b: T): void {
    const { slot } = a
    a.slot = b.slot
    b.slot = slot
    this.#items[a.slot] = a
    this.#items[b.slot] = b
  }
}
