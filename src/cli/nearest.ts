/** For "did you mean". */

/** The candidate that is fewest typing slips away, if that is close enough to be meant. */
export function nearest(word: string, candidates: readonly string[]): string | undefined {
  let best: string | undefined
  let least = Math.max(1, Math.floor(word.length / 3)) + 1
  for (const candidate of candidates) {
    const slips = distance(word, candidate)
    if (slips < least) {
      least = slips
      best = candidate
    }
  }
  return best
}

/** Letters inserted, left out, replaced, or two exchanged (optimal string alignment). */
function distance(from: string, to: string): number {
  let before: number[] = []
  let above = Array.from({ length: to.length + 1 }, (_, at) => at)
  for (let row = 1; row <= from.length; row++) {
    const current = [row]
    for (let at = 1; at <= to.length; at++) {
      const same = from[row - 1] === to[at - 1]
      let slips = Math.min(above[at]! + 1, current[at - 1]! + 1, above[at - 1]! + (same ? 0 : 1))
      const exchanged = row > 1 && at > 1 && from[row - 1] === to[at - 2] && from[row - 2] === to[at - 1]
      if (exchanged) slips = Math.min(slips, before[at - 2]! + 1)
      current.push(slips)
    }
    before = above
    above = current
  }
  return above[to.length]!
}
