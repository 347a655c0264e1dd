/**
 * An inventory of the packages under node_modules, as the story of one run. Read `run` from top to bottom; the two places
 * where the bus takes part in the app's own transactions are enqueue.ts and worker.ts.
 */

import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { decode, PostgresBus } from 'klieo-bus'
import { startAggregates } from './aggregates.ts'
import { type Options, readCommandLine, UsageError } from './command-line.ts'
import { Crewmate } from './crew.ts'
import { createTables, textOf } from './database.ts'
import { addAndRollBack, addPackage } from './enqueue.ts'
import { printAfterlife } from './keep.ts'
import { type LockedPackage, readLockFile } from './packages.ts'
import { findPlace, type Place } from './place.ts'
import { complaints, printReport, readFigures, readTopLists } from './report.ts'
import { megabytes, Screen } from './screen.ts'
import { BUCKET, PROGRESS, type Progress, type Result, STATS, type Stats } from './topics.ts'

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
async function run({ keep }: Options): Promise<number> {
  const { signal } = interrupted
  const listed = await readLockFile(project)

  screen.print(`${screen.bold('An inventory of the packages under node_modules')}\n`)
  if (!process.env.DATABASE_URL) screen.say('DATABASE_URL is not set: starting an embedded PostgreSQL')
  const place = await findPlace(process.env.DATABASE_URL)
  undo.push(() => place.leave(keep))
  const { pool, schemas } = place
  signal.throwIfAborted()

  const bus = await PostgresBus.connect({ pool, schema: schemas.bus })
  undo.push(() => bus.close())
  await createTables(pool, schemas)
  screen.say(place.description)
  screen.say(`tables in schema ${schemas.inventory}, the bus in schema ${schemas.bus}`)
  signal.throwIfAborted()

  let killed: { readonly path: string; readonly at: number } | undefined
  await startAggregates(bus, pool, schemas, ({ path, attempt, worker }: Result) => {
    if (attempt === 1) return
    const since = killed ? `, ${((performance.now() - killed.at) / 1000).toFixed(1)} s later` : ''
    screen.say(`${nameOf(path)} came back: attempt ${attempt} by ${worker}${since}`, screen.green)
  })
  const progress = await followProgress(bus, listed.length)

  const crew = WORKERS.map((name) => new Crewmate(name, place, (text) => screen.say(`${name}: ${text}`)))
  undo.push(async () => {
    await Promise.all(crew.map((mate) => mate.stop()))
  })
  await Promise.all(crew.map((mate) => mate.hear('ready', signal)))
  screen.say(`three workers started, processes ${crew.map(({ pid }) => pid).join(', ')}`)

  screen.say(`${listed.length} packages listed: for each a row and a job, in one transaction`)
  const addAll = async (packages: readonly LockedPackage[]) => {
    for (const found of packages) {
      await addPackage(bus, pool, schemas, found)
      signal.throwIfAborted()
    }
  }
  const half = Math.ceil(listed.length / 2)
  await addAll(listed.slice(0, half))
  await untilReported(progress, half)

  // Every worker is asked to stop before its next commit, so that the one to be killed is at work for certain, and at the
  // worst moment. Enough jobs are left for all of them: the second half is enqueued only now.
  const paused = crew.map((mate) => mate.hear('pausing', signal))
  const holding = crew.map((mate) => mate.hear('holding', signal))
  for (const mate of crew) mate.tell('pause')
  const addSecondHalf = Promise.all(paused).then(() => addAll(listed.slice(half)))
  const [held] = await Promise.all([Promise.all(holding), addSecondHalf])
  screen.say('half-way: every worker pauses before its next commit')

  await addAndRollBack(bus, pool, schemas)
  screen.say('a transaction with a row and a job is rolled back: neither may exist')

  const victim = crew.findIndex(({ name }) => name === progress.latest?.worker)
  const { name, pid } = crew[victim]!
  const { path } = held[victim]!
  await crew[victim]!.kill()
  killed = { path, at: performance.now() }
  screen.say(`kill -9 ${pid}: ${name}, in the middle of ${nameOf(path)}`, screen.red)
  screen.say('(result written, job acked, but the transaction was not committed)')
  for (const mate of crew) mate.tell('go on')

  const stats = await askForStats(bus)
  screen.say(`asked for "${STATS}", ${stats.worker} answers: ${stats.results} results`)

  const complete = await untilComplete(place, listed.length)
  // What is reported late must not come between the lines of the table.
  await progress.stop()
  screen.endProgress()
  if (complete) screen.say('all results are in and added up')
  else screen.say(`nothing new for ${PATIENCE_MS / 1000} s`, screen.red)

  const figures = await readFigures(pool, schemas)
  printReport(screen, listed.length, figures, await readTopLists(pool, schemas))
  const wrong = complaints(listed.length, figures)
  for (const complaint of wrong) screen.print(screen.red(`  does not add up: ${complaint}`))
  if (wrong.length === 0) screen.print(screen.green(`  Everything adds up, after ${screen.seconds} s.`))

  if (keep) {
    printAfterlife(screen, place)
    if (place.embedded) await new Promise<void>((resolve) => signal.addEventListener('abort', () => resolve()))
  }
  return wrong.length === 0 ? 0 : 1
}

interface Reported {
  latest: Progress | undefined
  at: number
  stop(): Promise<void>
}

/** Watches what the elected reporter writes, and shows it. */
async function followProgress(bus: PostgresBus, total: number): Promise<Reported> {
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

async function askForStats(bus: PostgresBus): Promise<Stats> {
  return decode<Stats>(await bus.requestReply.request(STATS, '', { timeoutMs: STATS_TIMEOUT_MS, signal: interrupted.signal }))
}

/** Waits for the last result and for both durables to have added it. @returns false when nothing moves any more */
async function untilComplete({ pool, schemas }: Place, total: number): Promise<boolean> {
  let seen = -1
  let movedAt = performance.now()
  for (;;) {
    const { results, lost, installed, licencesCounted, sizesCounted } = await readFigures(pool, schemas)
    if (lost === 0 && results >= total && licencesCounted >= installed && sizesCounted >= results) return true
    const sum = results + licencesCounted + sizesCounted
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
