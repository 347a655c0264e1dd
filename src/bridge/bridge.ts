/**
 * Relays the messages of a durable from one bus to another.
 *
 * The promises, and what keeps them:
 *   none lost      a message is acked where it comes from once the other bus has stored it
 *   none twice     it is published with an id made of where it comes from; who dies in between publishes it again, and within the duplicate
 *                  window (P12) that stores nothing. What this process has published it remembers beyond that.
 *   in order       of a subject one message at a time is under way, or, where the other bus stores a batch whole and in its order, one batch
 *   one at a time  a lease. Whoever gets it first lets come back what an earlier holder of it had in hand (relay.ts)
 *
 *   waiting      for the lease
 *   recovering   what was in the hands of an earlier one comes back, and is put in order
 *   relaying
 *   ended
 */

import {
  type Bus,
  checkDurable,
  checkDuration,
  checkFilter,
  checkFunction,
  checkInteger,
  checkStart,
  isBusError,
  type Lease,
  optionsOf,
  type SubscribeOptions,
} from '../core/index.ts'
import { reconnectDelayMs } from '../runtime/backoff.ts'
import { Guard } from './guard.ts'
import { idOf, longestAckWait } from './kept.ts'
import { passes } from './passes.ts'
import { Published } from './published.ts'
import { Relay } from './relay.ts'
import { pause, within } from './within.ts'

/** What a bridge uses of a bus. */
export type BridgedBus = Pick<Bus, 'pubsub' | 'kv' | 'admin' | 'supports'>

export interface BridgeOptions {
  /** On the bus it reads from; the bridge's alone. Bridges with the same one are one at a time, and the others wait to take over. */
  readonly durable: string
  /** Where a durable that does not exist yet begins. @default 'all' */
  readonly start?: SubscribeOptions['start']
  /** Messages read and not yet relayed and acked: 1 to 10,000. @default 256 */
  readonly maxInFlight?: number
  /** After a crash the next one goes on once this is over, and in the worst case twice this; at least 1,000. @default 10_000 */
  readonly ackWaitMs?: number
  /** Told of everything that goes wrong and is tried again, and of each message that was refused. @default a process warning */
  readonly onError?: (error: unknown) => void
}

export interface BridgeStats {
  readonly state: 'waiting' | 'recovering' | 'relaying' | 'ended'
  /** Stored by the bus it writes to. */
  readonly relayed: number
  /** Stored there before, by a bridge that did not come to ack them. */
  readonly duplicates: number
  /** They came from there, through another bridge. */
  readonly skipped: number
  /** The bus it writes to does not take them, too large for it as a rule: each is on `<durable>.dlq` with the reason. */
  readonly refused: number
  /** Read, and not yet acked. */
  readonly held: number
  /** When the oldest of these was published. */
  readonly oldestHeldAt?: Date
}

export interface BridgeStopOptions {
  /** How long what was read may take to be relayed; what is left goes back. @default 10_000 */
  readonly graceMs?: number
}

const LEASE_BUCKET = 'klieo-bridge'
const LEASE_WAIT_MS = 20_000
const RELEASE_MS = 2_000
/**
 * Starts at once and relays until it is stopped, one of its buses closes, or something fails that trying again does not mend; `ended` says
 * which. Messages keep their subject, payload and headers; `bridge_id` and `bridge_path` are added, the message's id and the buses it came through.
 *
 * @throws invalid_argument from the constructor
 */
export class Bridge implements AsyncDisposable {
  readonly #from: BridgedBus
  readonly #to: BridgedBus
  readonly #subject: string
  readonly #options: Required<Omit<BridgeOptions, 'onError'>>
  readonly #onError: (error: unknown) => void
  readonly #counts = { relayed: 0, duplicates: 0, skipped: 0, refused: 0 }
  readonly #published = new Published()
  readonly #stopping = new AbortController()
  #state: BridgeStats['state'] = 'waiting'
  #relay: Relay | undefined
  #graceMs = 0
  /** The durable: one that there is no more was deleted, and is not to begin anew. */
  #wasThere = false
  /** Resolves when it was stopped or one of its buses was closed. Rejects with what trying again does not mend. */
  readonly ended: Promise<void>

  constructor(from: BridgedBus, to: BridgedBus, subject: string, options: BridgeOptions) {
    const { onError, ...given } = optionsOf(options, ['durable', 'start', 'maxInFlight', 'ackWaitMs', 'onError'])
    const { durable, start = 'all', maxInFlight = 256, ackWaitMs = 10_000 } = given
    checkFilter(subject)
    checkDurable(durable)
    checkInteger('maxInFlight', maxInFlight, 1, 10_000)
    checkDuration('ackWaitMs', ackWaitMs, 1_000)
    if (onError !== undefined) checkFunction('onError', onError)
    this.#from = from
    this.#to = to
    this.#subject = subject
    this.#options = { durable, start: checkStart(start), maxInFlight, ackWaitMs }
    this.#onError = onError ?? ((error) => process.emitWarning(error instanceof Error ? error : String(error), { code: 'KLIEO_BRIDGE' }))
    this.ended = this.#run().finally(() => {
      this.#state = 'ended'
    })
    // Whoever does not ask learns of it by `stop`.
    this.ended.catch(() => {})
  }

  get stats(): BridgeStats {
    const oldest = this.#relay?.oldest
    return {
      state: this.#state,
      ...this.#counts,
      held: this.#relay?.held ?? 0,
      ...(oldest === undefined ? {} : { oldestHeldAt: oldest }),
    }
  }

  /** Reads no more, relays what it has read, and hands back the rest. @throws what `ended` rejects with */
  async stop(options: BridgeStopOptions = {}): Promise<void> {
    const { graceMs = 10_000 } = optionsOf(options, ['graceMs'])
    checkDuration('graceMs', graceMs)
    this.#graceMs = graceMs
    this.#stopping.abort()
    await this.ended
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.stop()
  }

  async #run(): Promise<void> {
    const { signal } = this.#stopping
    try {
      const [fromId, toId] = await this.#patiently(async () => [await idOf(this.#from.kv), await idOf(this.#to.kv)] as const)
      while (!signal.aborted) {
        this.#state = 'waiting'
        this.#wasThere ||= await this.#patiently(() => this.#isThere())
        const lease = await this.#patiently(() => this.#lease())
        if (lease) await this.#hold(lease, fromId, toId)
      }
    } catch (error) {
      if (isBusError(error, 'closed') || (signal.aborted && passes(error))) return
      throw error
    }
  }

  async #isThere(): Promise<boolean> {
    return (await this.#from.admin.durables()).some(({ durable }) => durable === this.#options.durable)
  }

  /** @returns null when somebody else holds it all the time, or the bridge is stopped */
  async #lease(): Promise<Lease | null> {
    const { durable, ackWaitMs } = this.#options
    try {
      return await this.#from.kv.lease(LEASE_BUCKET, durable, ackWaitMs, { waitMs: LEASE_WAIT_MS, signal: this.#stopping.signal })
    } catch (error) {
      if (isBusError(error, 'lease_held') || this.#stopping.signal.aborted) return null
      throw error
    }
  }

  /** Relays as long as the lease is ours. Each time it is not known what a fetch has brought, the reading begins anew. */
  async #hold(lease: Lease, fromId: string, toId: string): Promise<void> {
    const guard = new Guard(lease, this.#options.ackWaitMs, this.#stopping.signal)
    const { signal } = this.#stopping
    let afterFailure = false
    try {
      const longestAckWaitMs = await this.#patiently(() => longestAckWait(this.#from.kv, this.#options.durable, this.#options.ackWaitMs))
      while (!signal.aborted && (await guard.begin())) {
        const relay = new Relay({
          ...this.#options,
          longestAckWaitMs,
          from: this.#from,
          to: this.#to,
          subject: this.#subject,
          fromId,
          toId,
          counts: this.#counts,
          published: this.#published,
          afterFailure,
          wasThere: this.#wasThere,
          mayPublish: () => guard.holds,
          lost: lease.signal,
          onState: (state) => {
            this.#state = state
            if (state === 'relaying') this.#wasThere = true
          },
          onError: (error) => this.#tell(error),
        })
        this.#relay = relay
        const onStop = () => relay.finish(this.#graceMs)
        signal.addEventListener('abort', onStop, { once: true })
        // In the moment since it was looked at.
        if (signal.aborted) onStop()
        try {
          afterFailure = await relay.run()
        } catch (error) {
          if (!passes(error)) throw error
          this.#tell(error)
          afterFailure = true
        } finally {
          signal.removeEventListener('abort', onStop)
          this.#relay = undefined
        }
      }
    } finally {
      guard.end()
      // It ends by itself where the server is away.
      await within(RELEASE_MS, lease.release())
    }
  }

  /** Until it succeeds, fails for good, or the bridge is stopped. */
  async #patiently<T>(act: () => Promise<T>): Promise<T> {
    for (let failures = 1; ; failures++) {
      try {
        return await act()
      } catch (error) {
        if (!passes(error) || this.#stopping.signal.aborted) throw error
        this.#tell(error)
        await pause(reconnectDelayMs(failures), this.#stopping.signal)
      }
    }
  }

  /** What the callback throws is thrown where nobody catches it. */
  #tell(error: unknown): void {
    try {
      this.#onError(error)
    } catch (thrown) {
      queueMicrotask(() => {
        throw thrown
      })
    }
  }
}
