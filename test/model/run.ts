/**
 * Plays a trace in memory and in other worlds, step by step, until two of them differ. What has come in memory is what the others are
 * given time for.
 */

import { adminActions } from './admin-actions.ts'
import { Comparison, type Seen } from './compare.ts'
import { jobsActions } from './jobs-actions.ts'
import { kvActions } from './kv-actions.ts'
import { misuse } from './misuse.ts'
import { type Look, Player } from './player.ts'
import { pubsubActions } from './pubsub-actions.ts'
import { requestActions } from './request-actions.ts'
import type { Step } from './steps.ts'
import { ALIKE, type Terms } from './terms.ts'
import { type AnyBus, GRAIN_MS, MemoryWorld, type Stage, TooSlow, TRACE_MS } from './worlds.ts'

/** A watch whose process stands still for nine minutes is cut off: time that jumps so far would look like that. */
const LONG_MS = 8 * 60_000
/** Below what messages and dead jobs are kept for: when exactly they go is not promised. */
const LONGEST_TRACE_MS = 5 * 24 * 60 * 60_000

/** What a trace and its last step may take and still prove something. */
const WHOLE_MS = GRAIN_MS - 1_000

const passed = new WeakMap<Player, number>()

export const actions = {
  ...pubsubActions,
  ...jobsActions,
  ...kvActions,
  ...requestActions,
  ...adminActions,
  misuse,
  async advance(player: Player, { ms }: { readonly ms: number }) {
    const sum = (passed.get(player) ?? 0) + ms
    if (sum > LONGEST_TRACE_MS) return 'too long'
    passed.set(player, sum)
    if (ms > LONG_MS) await Promise.all(player.watches.map(({ watch }) => watch.close()))
    await player.advance(ms)
    return undefined
  },
  async closeBus(player: Player, { bus }: { readonly bus: number }) {
    return player.closeBus(bus)
  },
}

export interface RunOptions {
  /** What is known to differ. @default nothing */
  readonly terms?: Terms
  /** What stands between the trace and the buses in memory: tests put faults there. */
  readonly wrap?: (bus: AnyBus) => AnyBus
  /** So long what came in memory is waited for in the other. @default PATIENCE_MS, and what did not come is given a second chance */
  readonly patienceMs?: number
}

export class Difference extends Error {
  /** It is that something did not come, and might have come later. */
  readonly awaited: boolean

  constructor(message: string, awaited: boolean) {
    super(message)
    this.awaited = awaited
  }
}

/**
 * @param stages where it is played beside memory
 * @throws {@link Difference}
 */
export async function run(
  stages: Stage | readonly Stage[],
  trace: readonly Step[],
  options: RunOptions = {},
): Promise<'done' | 'too slow'> {
  const all = 'world' in stages ? [stages] : stages
  try {
    return await play(all, trace, options)
  } catch (error) {
    if (!(error instanceof Difference && error.awaited) || options.patienceMs !== undefined) throw error
    // A machine that is busy for once is not busy twice at the same place.
    await play(all, trace, options)
    return 'too slow'
  }
}

async function play(
  stages: readonly Stage[],
  whole: readonly Step[],
  { terms = ALIKE, wrap, patienceMs }: RunOptions,
): Promise<'done' | 'too slow'> {
  const memory = new Player(new MemoryWorld(), actions, { terms, ...(wrap === undefined ? {} : { wrap }) })
  const worlds = await Promise.all(stages.map((stage) => stage.world(patienceMs)))
  const others = worlds.map((world) => new Player(world, actions, { terms }))
  const pairs = pairsOf([memory, ...others])
  const history: string[] = []
  const startedAt = performance.now()
  try {
    for (const [n, step] of whole.flatMap((one) => terms.playable(one) ?? []).entries()) {
      if (performance.now() - startedAt > TRACE_MS) return 'too slow'
      history.push(`${n} ${JSON.stringify(step)}`)
      const looks = new Map<Player, Look>()
      const look = (player: Player, seen: Look) => {
        looks.set(player, seen)
        history.push(`    ${`${player.world.name}:`.padEnd(9)} ${shown(seen)}`)
      }
      look(memory, await memory.play(step, n))
      for (const other of others) look(other, await other.play(step, n, looks.get(memory)))
      for (const { a, b, comparison } of pairs) {
        const difference = comparison.difference(looks.get(a) as unknown as Seen, looks.get(b) as unknown as Seen)
        if (difference === undefined) continue
        if (performance.now() - startedAt > WHOLE_MS) return 'too slow'
        const message = `${a.world.name} and ${b.world.name} differ at step ${n}${difference}\n${history.join('\n')}`
        throw new Difference(
          message,
          worlds.some(({ gaveUp }) => gaveUp),
        )
      }
    }
    return 'done'
  } catch (error) {
    if (error instanceof TooSlow) return 'too slow'
    throw error
  } finally {
    await Promise.all([memory, ...others].map((player) => player.end()))
  }
}

function pairsOf(players: readonly Player[]) {
  return players.flatMap((a, index) => players.slice(index + 1).map((b) => ({ a, b, comparison: new Comparison() })))
}

function shown({ step, ended, changes, over, signals }: Look): string {
  return JSON.stringify({
    ...(step === null ? {} : { step }),
    ended,
    ...(changes.length === 0 ? {} : { changes, over }),
    ...(signals.includes(true) ? { signals } : {}),
  })
}
