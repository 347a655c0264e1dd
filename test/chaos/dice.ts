/** Everything in a chaos run that looks like chance: a seed repeats it. */

import { randomFrom } from '../postgres/support/random.ts'

export class Dice {
  readonly #random: () => number

  /** @param seed names who throws: each logical client has dice of its own, so that no race changes what another one does */
  constructor(seed: string) {
    this.#random = randomFrom(seed)
    // Seeds that differ in their last character begin alike.
    for (let n = 0; n < 8; n++) this.#random()
  }

  chance(probability: number): boolean {
    return this.#random() < probability
  }

  /** An integer, both ends included. */
  between(least: number, most: number): number {
    return least + Math.floor(this.#random() * (most - least + 1))
  }

  pick<T>(things: readonly T[]): T {
    return things[Math.floor(this.#random() * things.length)] as T
  }

  /** One of the names, each as often as its weight says. */
  weighted<K extends string>(weights: Readonly<Record<K, number>>): K {
    const entries = Object.entries(weights) as [K, number][]
    let rest = this.#random() * entries.reduce((sum, [, weight]) => sum + weight, 0)
    for (const [name, weight] of entries) {
      rest -= weight
      if (rest < 0) return name
    }
    return entries.at(-1)![0]
  }

  shuffled<T>(things: readonly T[]): T[] {
    const rest = [...things]
    const shuffled: T[] = []
    while (rest.length > 0) shuffled.push(...rest.splice(Math.floor(this.#random() * rest.length), 1))
    return shuffled
  }
}
