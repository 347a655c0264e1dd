/** The processes of a chaos run: started, killed, stopped, replaced, and watched for what they must not do. */

import { appendFileSync } from 'node:fs'
import { join } from 'node:path'
import { Relay } from '../postgres/support/relay.ts'
import { type Child, startChild } from '../support/child.ts'
import type { Assignment, Order, Post, Word } from './world.ts'

const FOREVER_MS = 2 ** 31 - 1
const STARTED_WITHIN_MS = 90_000

export interface CrewOptions {
  readonly seed: string
  readonly connectionString: string
  readonly directory: string
  readonly rate: number
  /** What no fault explains: a process that ended by itself, a call without an answer. */
  readonly onViolation: (text: string) => void
}

/** One post and whoever fills it. */
export class Mate {
  readonly post: Post
  readonly relay: Relay
  readonly #options: CrewOptions
  readonly #guard: Child
  #child: Child | undefined
  #ready = Promise.withResolvers<void>()
  #calm = Promise.withResolvers<void>()
  #ended = false
  #killed = false
  #incarnation = 0
  #earlier = { calls: 0, delivered: 0 }
  #now = { calls: 0, delivered: 0 }
  stopped = false

  static async start(post: Post, guard: Child, options: CrewOptions): Promise<Mate> {
    const mate = new Mate(post, guard, options, await Relay.start(options.connectionString))
    mate.spawn()
    return mate
  }

  private constructor(post: Post, guard: Child, options: CrewOptions, relay: Relay) {
    this.post = post
    this.relay = relay
    this.#guard = guard
    this.#options = options
  }

  get name(): string {
    return `${this.post.name}.${this.#incarnation}`
  }

  get alive(): boolean {
    return this.#child !== undefined && !this.#killed
  }

  /** Over all who filled the post. */
  get counts(): { calls: number; delivered: number } {
    return { calls: this.#earlier.calls + this.#now.calls, delivered: this.#earlier.delivered + this.#now.delivered }
  }

  ready(): Promise<void> {
    return within(STARTED_WITHIN_MS, this.#ready.promise, `${this.name} did not connect`)
  }

  calm(): Promise<void> {
    return this.#calm.promise
  }

  spawn(): void {
    const { seed, directory, rate } = this.#options
    const incarnation = ++this.#incarnation
    const assignment: Assignment = { ...this.post, incarnation, seed, directory, rate, connectionString: this.relay.connectionString }
    this.#earlier = this.counts
    this.#now = { calls: 0, delivered: 0 }
    this.#ready = Promise.withResolvers()
    this.#calm = Promise.withResolvers()
    this.#killed = false
    this.stopped = false
    // In a group of its own: Ctrl-C is for the runner, which ends the others.
    const child = startChild(new URL(`./${this.post.role}-child.ts`, import.meta.url), { args: [JSON.stringify(assignment)], group: true })
    this.#child = child
    const { pid } = child
    this.#guard.send(pid)
    void this.#listen(child)
    void child.exited.then(({ code, signal }) => {
      this.#guard.send(-pid)
      if (child.stderr !== '') appendFileSync(join(directory, `${this.post.name}.${incarnation}.stderr`), child.stderr)
      const asked = this.#killed || (this.#ended && code === 0)
      if (!asked)
        this.#options.onViolation(`${this.post.name}.${incarnation} ended by itself (${signal ?? code}): ${child.stderr.slice(-2_000)}`)
      if (this.#child === child) this.#child = undefined
    })
  }

  async kill(): Promise<void> {
    this.#killed = true
    await this.#child?.kill('SIGKILL')
  }

  stop(): void {
    this.stopped = true
    this.#child?.pause()
  }

  resume(): void {
    this.stopped = false
    this.#child?.resume()
  }

  order(order: Order): void {
    this.#child?.send(order)
  }

  /** In order, and by itself. */
  async end(withinMs: number): Promise<void> {
    const child = this.#child
    if (!child) return
    this.#ended = true
    this.order({ do: 'end' })
    const timer = setTimeout(() => {
      this.#options.onViolation(`${this.name} did not end within ${withinMs} ms after it was asked to close everything`)
      void this.kill()
    }, withinMs)
    await child.exited
    clearTimeout(timer)
  }

  async #listen(child: Child): Promise<void> {
    try {
      for (;;) {
        const word = await child.next<Word & Record<string, unknown>>(() => true, FOREVER_MS)
        if (word.calls !== undefined) this.#now = { calls: word.calls, delivered: word.delivered! }
        if (word.ready) this.#ready.resolve()
        if (word.calm) this.#calm.resolve()
        // Nothing but its input keeps it alive from here on.
        if (word.ended) child.endInput()
        if (word.hung) this.#options.onViolation(`${this.name} got no answer within 60 s to ${JSON.stringify(word.hung)}`)
      }
    } catch {
      // It has ended: see `exited`.
    }
  }
}

export class Crew implements AsyncDisposable {
  readonly mates: readonly Mate[]
  readonly #guard: Child

  static async start(posts: readonly Post[], options: CrewOptions): Promise<Crew> {
    const guard = startChild(new URL('./guard-child.ts', import.meta.url), { group: true })
    const mates = await Promise.all(posts.map((post) => Mate.start(post, guard, options)))
    return new Crew(mates, guard)
  }

  private constructor(mates: readonly Mate[], guard: Child) {
    this.mates = mates
    this.#guard = guard
  }

  /** The one that a fault is meant for, or the next that is there to be hit. */
  pick(target: number): Mate | undefined {
    const first = Math.floor(target * this.mates.length)
    const inTurn = [...this.mates.slice(first), ...this.mates.slice(0, first)]
    return inTurn.find((mate) => mate.alive && !mate.stopped)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all(this.mates.map((mate) => mate.kill()))
    await Promise.all(this.mates.map(({ relay }) => relay[Symbol.asyncDispose]()))
    this.#guard.endInput()
    await this.#guard.exited
  }
}

export async function within<T>(ms: number, work: Promise<T>, what: string): Promise<T> {
  const late = Promise.withResolvers<never>()
  const timer = setTimeout(() => late.reject(new Error(`${what} within ${ms} ms`)), ms)
  try {
    return await Promise.race([work, late.promise])
  } finally {
    clearTimeout(timer)
  }
}
