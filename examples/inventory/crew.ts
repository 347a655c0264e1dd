/** The worker processes, as main.ts sees them. */

import { type ChildProcess, fork } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import type { BusAddress } from './backend.ts'
import type { Place } from './place.ts'

/** What a worker is told, over the channel between the two processes. */
export type Order = 'pause' | 'go on' | 'stop'

export type News =
  | { readonly news: 'ready' }
  /** It will stop before its next commit, or ack … */
  | { readonly news: 'pausing' }
  /** … and there it is. */
  | { readonly news: 'holding'; readonly path: string }
  /** A job that somebody had before. */
  | { readonly news: 'came back'; readonly path: string; readonly attempt: number }
  /** Something went wrong and is tried again. */
  | { readonly news: 'trouble'; readonly text: string }

export type NewsOf<K extends News['news']> = Extract<News, { news: K }>

const STOP_WITHIN_MS = 5_000

export class Crewmate {
  readonly name: string
  readonly pid: number
  readonly #process: ChildProcess
  readonly #exited: Promise<unknown>
  #expected = false

  /**
   * @param onTrouble told of what a worker could not do, and of its death unless it was asked for
   * @param onComeback told when it gets a job that somebody had before
   */
  constructor(
    name: string,
    { url, schemas }: Place,
    bus: BusAddress,
    onTrouble: (text: string) => void,
    onComeback: (job: NewsOf<'came back'>) => void,
  ) {
    this.name = name
    this.#process = fork(fileURLToPath(new URL('./worker.ts', import.meta.url)), [name, schemas.inventory], {
      // Not as an argument: everybody on the machine can read those.
      env: { ...process.env, DATABASE_URL: url, INVENTORY_BUS: JSON.stringify(bus) },
    })
    this.pid = this.#process.pid ?? 0
    this.#exited = once(this.#process, 'exit').catch(() => {})
    this.#process.on('error', (error) => onTrouble(error.message))
    this.#process.on('message', (news: News) => {
      if (news.news === 'trouble') onTrouble(news.text)
      if (news.news === 'came back') onComeback(news)
    })
    this.#process.on('exit', (code, signal) => {
      if (!this.#expected) onTrouble(`it ended unasked (${signal ?? `exit code ${code}`})`)
    })
  }

  get alive(): boolean {
    return this.#process.exitCode === null && this.#process.signalCode === null && this.pid !== 0
  }

  tell(order: Order): void {
    // One that is gone hears nothing; its exit has been told.
    if (this.#process.connected) this.#process.send(order, () => {})
  }

  /** The next news of a kind. @throws when the process ends first, or `signal` is aborted */
  async hear<K extends News['news']>(kind: K, signal: AbortSignal): Promise<NewsOf<K>> {
    const { promise, resolve, reject } = Promise.withResolvers<NewsOf<K>>()
    const onMessage = (news: News) => {
      if (news.news === kind) resolve(news as NewsOf<K>)
    }
    const onExit = () => reject(new Error(`${this.name} ended`))
    const onAbort = () => reject(signal.reason)
    this.#process.on('message', onMessage).on('exit', onExit)
    signal.addEventListener('abort', onAbort)
    if (signal.aborted) onAbort()
    else if (!this.alive) onExit()
    try {
      return await promise
    } finally {
      this.#process.off('message', onMessage).off('exit', onExit)
      signal.removeEventListener('abort', onAbort)
    }
  }

  async kill(): Promise<void> {
    this.#expected = true
    if (this.alive) this.#process.kill('SIGKILL')
    await this.#exited
  }

  async stop(): Promise<void> {
    this.#expected = true
    this.tell('stop')
    const timer = setTimeout(() => this.#process.kill('SIGKILL'), STOP_WITHIN_MS)
    await this.#exited
    clearTimeout(timer)
  }
}
