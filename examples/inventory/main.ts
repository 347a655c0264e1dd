/**
 * An inventory of the packages under node_modules, as the story of one run. Read `run` from top to bottom; the places
 * where the bus takes part in the app's own transactions are enqueue.ts, worker.ts and aggregates.ts.
 */

import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { type Bus, decode, isBusError } from 'klieo-bus'
import { startAggregates } from './aggregates.ts'
import { type BusAddress, openBus } from './backend.ts'
import { type Options, readCommandLine, UsageError } from './command-line.ts'
import { Crewmate, type NewsOf } from './crew.ts'
import { createKeys, createTables, textOf } from './database.ts'
import { addAndRollBack, addHalf, addPackage, sweep } from './enqueue.ts'
import { printAfterlife } from './keep.ts'
import type { NatsPlace } from './nats.ts'
import { type LockedPackage, readLockFile } from './packages.ts'
import { findPlace, type Place } from './place.ts'
import {
  askBusCounts,
  type BusCounts,
  complaints,
  type Figures,
  printReport,
  readBusCounts,
  readCounts,
  readKeyCounts,
  readTopLists,
} from './report.ts'
import { megabytes, Screen } from './screen.ts'
import { BUCKET, PROGRESS, type Progress, STATS, type Stats } from './topics.ts'
import { WORDS } from './words.ts'

const WORKERS = ['worker-1', 'worker-2', 'worker-3']
const STATS_TIMEOUT_MS = 5_000
/** When nothing moves for so long, the run is over. */
const PATIENCE_MS = 30_000

const project = fileURLToPath(new URL('../../', import.meta.url))
const screen = new Screen()
const interrupted = new AbortController()
/** What to undo at the end, last first. */
const undo: (() => Promise<void>)[] = []

/** @returns the exit code */
async function run({ backend, keep }: Options): Promise<number> {
  const { signal } = interrupted
  const words = WORDS[backend]
  const listed = await readLockFile(project)

  screen.print(`${screen.bold('An inventory of the packages under node_modules')}\n`)
  const nats = backend === 'nats' ? await findNats() : undefined
  if (nats) undo.push(() => nats.leave(keep))
  signal.throwIfAborted()
  if (!process.env.DATABASE_URL) screen.say('DATABASE_URL is not set: starting an embedded PostgreSQL')
  const place = await findPlace(process.env.DATABASE_URL)
  undo.push(() => place.leave(keep))
  const { pool, schemas } = place
  signal.throwIfAborted()

  const address: BusAddress = nats?.address ?? { backend: 'postgres', schema: schemas.bus }
  const bus = await openBus(address, pool, true)
  undo.push(() => bus.close())
  await createTables(pool, schemas)
  if (nats) await createKeys(pool, schemas)
  screen.say(place.description)
  if (nats) screen.say(nats.description)
  screen.say(`tables in schema ${schemas.inventory}, the bus ${nats ? `on NATS as ${nats.address.prefix}` : `in schema ${schemas.bus}`}`)
  signal.throwIfAborted()

  let killed: { readonly path: string; readonly at: number } | undefined
  await startAggregates(bus, pool, schemas)
  const progress = await followProgress(bus, listed.length)

  const onComeback = (name: string, { path, attempt }: NewsOf<'came back'>) => {
    const since = killed ? `, ${((performance.now() - killed.at) / 1000).toFixed(1)} s later` : ''
    screen.say(`${nameOf(path)} came back: attempt ${attempt} by ${name}${since}`, screen.green)
  }
  const crew = WORKERS.map(
    (name) =>
      new Crewmate(
        name,
        place,
        address,
        (text) => screen.say(`${name}: ${text}`),
        (job) => onComeback(name, job),
      ),
  )
  undo.push(async () => {
    await Promise.all(crew.map((mate) => mate.stop()))
  })
  await Promise.all(crew.map((mate) => mate.hear('ready', signal)))
  screen.say(`three workers started, processes ${crew.map(({ pid }) => pid).join(', ')}`)

  screen.say(`${listed.length} packages listed: for each ${words.rowAndJob}`)
  const addAll = async (packages: readonly LockedPackage[]) => {
    for (const found of packages) {
      await addPackage(bus, pool, schemas, found)
      signal.throwIfAborted()
    }
  }
  const half = Math.ceil(listed.length / 2)
  await addAll(listed.slice(0, half))
  await untilReported(progress, half)

  // Every worker is asked to stop before its next commit, or ack, so that the one to be killed is at work for certain, and
  // at the worst moment. Enough jobs are left for all of them: the second half is enqueued only now.
  const paused = crew.map((mate) => mate.hear('pausing', signal))
  const holding = crew.map((mate) => mate.hear('holding', signal))
  for (const mate of crew) mate.tell('pause')
  const addSecondHalf = Promise.all(paused).then(() => addAll(listed.slice(half, nats ? -2 : undefined)))
  const [held] = await Promise.all([Promise.all(holding), addSecondHalf])
  screen.say(`half-way: every worker pauses before its next ${words.pausesBefore}`)

  await addAndRollBack(bus, pool, schemas)
  screen.say(words.rollBack)
  if (nats) {
    // Where rows and jobs are two steps, somebody may die between them.
    await addHalf(bus, pool, schemas, listed.at(-2)!, listed.at(-1)!)
    screen.say('two rows are left as by a crash: before the enqueue, and right after it')
    screen.say(`a sweep finds ${await sweep(bus, pool, schemas)} rows whose job is not known, and enqueues them`)
  }

  const victim = crew.findIndex(({ name }) => name === progress.latest?.worker)
  const { name, pid } = crew[victim]!
  const { path } = held[victim]!
  await crew[victim]!.kill()
  killed = { path, at: performance.now() }
  screen.say(`kill -9 ${pid}: ${name}, in the middle of ${nameOf(path)}`, screen.red)
  screen.say(`(${words.half})`)
  for (const mate of crew) mate.tell('go on')

  const stats = await askForStats(bus)
  screen.say(`asked for "${STATS}", ${stats.worker} answers: ${stats.results} results`)

  const countBus = () => (nats ? askBusCounts(bus, nats) : readBusCounts(pool, schemas))
  const complete = await untilComplete(place, listed.length, countBus)
  // What is reported late must not come between the lines of the table.
  await progress.stop()
  screen.endProgress()
  if (complete) screen.say('all results are in and added up')
  else screen.say(`nothing new for ${PATIENCE_MS / 1000} s`, screen.red)

  const figures: Figures = {
    ...(await readCounts(pool, schemas)),
    ...(await countBus()),
    ...(nats ? { keys: await readKeyCounts(pool, schemas) } : {}),
  }
  printReport(screen, listed.length, figures, await readTopLists(pool, schemas), words)
  const wrong = complaints(listed.length, figures)
  for (const complaint of wrong) screen.print(screen.red(`  does not add up: ${complaint}`))
  if (wrong.length === 0) screen.print(screen.green(`  Everything adds up, after ${screen.seconds} s.`))

  if (keep) {
    printAfterlife(screen, place, nats)
    if (place.embedded || nats?.own) await new Promise<void>((resolve) => signal.addEventListener('abort', () => resolve()))
  }
  return wrong.length === 0 ? 0 : 1
}

/** It is asked for before anything else is set up: it may be missing. The clients of NATS are loaded only where they are used. */
async function findNats(): Promise<NatsPlace> {
  if (!process.env.NATS_URL) screen.say('NATS_URL is not set: starting a nats-server')
  const { findNats } = await import('./nats.ts')
  return findNats(process.env.NATS_URL)
}

interface Reported {
  latest: Progress | undefined
  at: number
  stop(): Promise<void>
}

/** Watches what the elected reporter writes, and shows it. */
async function followProgress(bus: Bus, total: number): Promise<Reported> {
  const watch = await bus.kv.watch(BUCKET, PROGRESS)
  const reported: Reported = { latest: undefined, at: performance.now(), stop: () => watch.close() }
  const follow = async () => {
    for await (const change of watch) {
      if (change.operation !== 'put') continue
      const progress = decode<Progress>(change.entry.value)
      const { latest } = reported
      // A holder that lost its lease without noticing may still write; its fence gives it away.
      if (latest && progress.fence < latest.fence) continue
      if (progress.fence !== latest?.fence) {
        screen.say(`${progress.worker} is elected to report progress (lease with fence ${progress.fence})`)
      }
      reported.latest = progress
      reported.at = performance.now()
      screen.progress(progress.results, total, megabytes(progress.bytes))
    }
  }
  follow().catch((error) => screen.say(`the progress is not shown any more: ${textOf(error)}`))
  return reported
}

async function untilReported(reported: Reported, results: number): Promise<void> {
  while ((reported.latest?.results ?? 0) < results) {
    if (performance.now() - reported.at > PATIENCE_MS) throw new Error(`no worker has reported anything for ${PATIENCE_MS / 1000} s`)
    await sleep(20, undefined, { signal: interrupted.signal })
  }
}

/** A request is not durable: one whose responder dies, as one has just done, is asked again. */
async function askForStats(bus: Bus): Promise<Stats> {
  for (let last = false; ; last = true) {
    try {
      return decode<Stats>(await bus.requestReply.request(STATS, '', { timeoutMs: STATS_TIMEOUT_MS, signal: interrupted.signal }))
    } catch (error) {
      if (last || !isBusError(error, 'timeout')) throw error
    }
  }
}

/** Waits for the last result, for both durables to have added it, and for the end of its job. @returns false when nothing moves any more */
async function untilComplete({ pool, schemas }: Place, total: number, countBus: () => Promise<BusCounts>): Promise<boolean> {
  let seen = -1
  let movedAt = performance.now()
  for (;;) {
    const { results, lost, installed, licencesCounted, sizesCounted } = await readCounts(pool, schemas)
    const added = lost === 0 && results >= total && licencesCounted >= installed && sizesCounted >= results
    const jobsLeft = added ? (await countBus()).jobsLeft : total
    if (jobsLeft === 0) return true
    const sum = results + licencesCounted + sizesCounted - jobsLeft
    if (sum !== seen) movedAt = performance.now()
    else if (performance.now() - movedAt > PATIENCE_MS) return false
    seen = sum
    await sleep(100, undefined, { signal: interrupted.signal })
  }
}

function nameOf(path: string): string {
  return path.slice(path.lastIndexOf('node_modules/') + 'node_modules/'.length)
}

/** Takes down what was set up; one step that fails does not keep the others from being done. */
async function cleanUp(): Promise<void> {
  for (const step of undo.reverse()) {
    await step().catch((error) => process.stderr.write(`inventory: while cleaning up: ${textOf(error)}\n`))
  }
}

const INTERRUPTED = 130
/** A server that does not answer must not keep Ctrl-C from ending this. */
const GIVE_UP_MS = 10_000

function interrupt(): void {
  // npm passes on a Ctrl-C that the terminal has sent to everybody already: the second one is no other wish.
  if (interrupted.signal.aborted) return
  screen.print(screen.dim('  stopping'))
  screen.close()
  interrupted.abort()
  setTimeout(() => process.exit(INTERRUPTED), GIVE_UP_MS).unref()
}

for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, interrupt)
// Nobody reads any more: `npm start | head`.
process.stdout.on('error', interrupt)

async function main(): Promise<number> {
  const options = readCommandLine(process.argv.slice(2))
  if (typeof options === 'string') {
    process.stdout.write(options)
    return 0
  }
  try {
    return await run(options)
  } finally {
    screen.close()
    await cleanUp()
  }
}

main().then(
  (code) => {
    process.exitCode = code
  },
  (error: unknown) => {
    if (interrupted.signal.aborted) {
      process.exitCode = INTERRUPTED
    } else {
      const usage = error instanceof UsageError
      process.stderr.write(`inventory: ${textOf(error)}${usage ? '; see npm start -- --help' : ''}\n`)
      process.exitCode = usage ? 2 : 1
    }
  },
)
