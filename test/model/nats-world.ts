/** The world of NATS. */

import { randomBytes } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { jetstreamManager } from '@nats-io/jetstream'
import { connect, type NatsConnection } from '@nats-io/transport-node'
import { NatsBus } from '../../src/nats/index.ts'
import { type AnyBus, PATIENCE_MS, type Stage, type World } from './worlds.ts'

/** Nothing tells what is under way at the server. What should come is waited for; so long what should not come has time to. */
const QUIET_MS = 30

export class NatsStage implements Stage {
  readonly #servers: string
  readonly #nc: NatsConnection
  readonly #run = `m${randomBytes(3).toString('hex')}`
  #worlds = 0

  private constructor(servers: string, nc: NatsConnection) {
    this.#servers = servers
    this.#nc = nc
  }

  static async open(servers: string): Promise<NatsStage> {
    return new NatsStage(servers, await connect({ servers }))
  }

  /** With streams of its own; those of the one before it go. */
  async world(patienceMs = PATIENCE_MS): Promise<NatsWorld> {
    const jsm = await jetstreamManager(this.#nc)
    for await (const { config } of jsm.streams.list())
      if (config.name.startsWith(this.#run) || config.name.startsWith(`KV_${this.#run}`)) await jsm.streams.delete(config.name)
    return new NatsWorld(this.#servers, `${this.#run}_${this.#worlds++}`, patienceMs)
  }

  async close(): Promise<void> {
    await this.#nc.close()
  }
}

export class NatsWorld implements World {
  readonly name = 'nats'
  readonly #servers: string
  readonly #prefix: string
  readonly #patienceMs: number
  gaveUp = false

  constructor(servers: string, prefix: string, patienceMs: number) {
    this.#servers = servers
    this.#prefix = prefix
    this.#patienceMs = patienceMs
  }

  open(): Promise<AnyBus> {
    return NatsBus.connect({ servers: this.#servers, prefix: this.#prefix })
  }

  async close(bus: AnyBus): Promise<void> {
    await bus.close()
  }

  now(): number {
    return Date.now()
  }

  async advance(): Promise<void> {
    throw new Error('the time of a server of NATS is its own')
  }

  /** J3: a job whose last lease is over is buried by whoever has to do with it next. */
  async maintain(): Promise<void> {
    const bus = await this.open()
    for await (const { id } of bus.admin.jobs({ state: 'dead' })) await bus.admin.cancelJob(id)
    await bus.close()
  }

  async rest(): Promise<void> {
    await sleep(QUIET_MS)
  }

  async until(condition: () => boolean, expected: boolean): Promise<boolean> {
    const waits = expected && !this.gaveUp
    if (!waits) await this.rest()
    for (const end = performance.now() + this.#patienceMs; waits && !condition() && performance.now() < end; ) await sleep(1)
    if (expected && !condition()) this.gaveUp = true
    return condition()
  }
}
