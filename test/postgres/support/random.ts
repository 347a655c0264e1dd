/** Numbers from 0 up to 1 that a seed repeats, so that a failing run can be run again (xorshift, 32 bits). */
export function randomFrom(seed: string): () => number {
  let state = 0x9e3779b9
  for (const character of seed) state = Math.imul(state ^ character.charCodeAt(0), 0x01000193) >>> 0
  state ||= 1
  return () => {
    state ^= state << 13
    state >>>= 0
    state ^= state >>> 17
    state ^= state << 5
    state >>>= 0
    return state / 2 ** 32
  }
}
