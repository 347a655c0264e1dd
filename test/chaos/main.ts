/**
 * `npm run chaos`: many processes use the bus while processes, connections and the server fail, and every call is written down.
 * Then all that was left is consumed, and the record is checked against the rules.
 *
 * Ends with 0 when no rule was broken, with 1 when one was; then the record stays.
 */

import { mkdir, mkdtemp, readdir, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { PostgresBus } from '../../src/index.ts'
import { session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { check } from './checker/index.ts'
import { Crew, within } from './crew.ts'
import { Dice } from './dice.ts'
import { Faults } from './faults.ts'
import { nothingIsLeft, readFinalState, whatIsLeft } from './final-state.ts'
import { commandOf, type Options, readOptions, USAGE } from './options.ts'
import { now, Recorder } from './record.ts'
import { schedule } from './schedule.ts'
import { type ChaosServer, startChaosServer } from './server.ts'
import { describe, tally } from './tally.ts'
import { resolveOne } from './transaction.ts'
import { DURABLES, POSTS, SCHEMA } from './world.ts'

const TELL_EVERY_MS = 30_000
/** Longer than the longest call, so that one that hangs is told by whom it hangs. */
const CALM_WITHIN_MS = 90_000
/** All that waits is due within a backoff or an ack wait. */
const DRAINED_WITHIN_MS = 120_000
const ENDED_WITHIN_MS = 30_000

const interrupted = new AbortController()
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.once(signal, () => interrupted.abort())

let options: Options
try {
  options = readOptions(process.argv.slice(2))
} catch (error) {
  process.stderr.write(`${(error as Error).message}\n${USAGE}\n`)
  process.exit(2)
}
process.exitCode = await main(options)

async function main(options: Options): Promise<number> {
  const directory = options.keep ?? (await mkdtemp(join(tmpdir(), 'klieo-chaos-')))
  await mkdir(directory, { recursive: true })
  say(`chaos: seed ${options.seed}, ${options.minutes} min; the record is in ${directory}`)
  let violations = 0
  const onViolation = (text: string) => {
    violations++
    say(`VIOLATION: ${text}`)
  }
  try {
    await run(options, directory, onViolation)
  } catch (error) {
    if (interrupted.signal.aborted) {
      say('interrupted; everything is stopped')
      if (options.keep === undefined) await rm(directory, { recursive: true, force: true })
      return 130
    }
    throw error
  }
  say(describe(await tally(directory)))
  for (const file of await readdir(directory)) if (file.endsWith('.stderr')) say(`said on stderr: ${join(directory, file)}`)
  violations += await checkRecord(directory)
  say(`violations: ${violations}`)
  say(`the same schedule again: ${commandOf(options)}`)
  if (violations > 0) say(`the record is in ${directory}`)
  else if (options.keep === undefined) await rm(directory, { recursive: true, force: true })
  return violations > 0 ? 1 : 0
}

/** @returns how often a rule was broken */
async function checkRecord(directory: string): Promise<number> {
  const begun = performance.now()
  const { entries, checked, broken, violations } = await check(directory)
  say(`checked ${entries.toLocaleString('en')} entries in ${Math.round((performance.now() - begun) / 1_000)} s`)
  for (const [what, times] of Object.entries(checked)) say(`  ${what.padEnd(60)}${times.toLocaleString('en').padStart(9)}`)
  // Of each rule only the first cases are kept.
  for (const { rule, text, evidence } of violations) say(`VIOLATION ${rule}: ${text}\n${evidence.map((line) => `    ${line}`).join('\n')}`)
  for (const [rule, times] of Object.entries(broken)) say(`broken: ${rule}, ${times} times`)
  return Object.values(broken).reduce((sum, times) => sum + times, 0)
}

/** From the start of the server to its end; the record is complete when it resolves. */
async function run(options: Options, directory: string, onViolation: (text: string) => void): Promise<void> {
  const { seed, rate } = options
  const runMs = options.minutes * 60_000
  const server = await startChaosServer(options.postgres, directory)
  await using _ = { [Symbol.asyncDispose]: () => server.stop() }
  interrupted.signal.throwIfAborted()
  say(`PostgreSQL ${server.version}, ${POSTS.length} processes`)
  const solo = DURABLES.filter(({ members }) => members.length === 1).map(({ name }) => name)
  await writeFile(join(directory, 'meta.json'), JSON.stringify({ seed, minutes: options.minutes, version: server.version, solo }))
  const recorder = new Recorder(join(directory, 'main.jsonl'))
  recorder.write({ kind: 'process', at: now(), name: 'main', role: 'runner', pid: process.pid })
  await makeDurables(server)

  await using crew = await Crew.start(POSTS, { seed, rate, directory, connectionString: server.connectionString, onViolation })
  await interruptible(Promise.all(crew.mates.map((mate) => mate.ready())))
  const faults = new Faults(crew, server, recorder)
  const begun = performance.now()
  const ticker = setInterval(() => say(progress(begun, crew, faults)), TELL_EVERY_MS)
  try {
    await faults.run(schedule(seed, runMs), runMs, interrupted.signal)
    await faults.heal()
    await interruptible(finish(crew, server, recorder, directory, onViolation))
  } finally {
    clearInterval(ticker)
  }
  say(`faults: ${[...faults.counts].map(([kind, times]) => `${kind} ${times}`).join(', ')}`)
}

async function makeDurables(server: ChaosServer): Promise<void> {
  await using bus = await PostgresBus.connect({ connectionString: server.connectionString, schema: SCHEMA, maintenance: false })
  for (const { name, filter, late } of DURABLES) {
    if (!late) await (await bus.pubsub.subscribe(filter, name)).close()
  }
}

/** No more faults: what is under way ends, what waits is consumed, everybody leaves, and the tables are read. */
async function finish(
  crew: Crew,
  server: ChaosServer,
  recorder: Recorder,
  directory: string,
  onViolation: (text: string) => void,
): Promise<void> {
  const { mates } = crew
  await Promise.all(mates.map((mate) => mate.ready().catch((error: Error) => onViolation(error.message))))
  for (const mate of mates) mate.order({ do: 'gentle' })
  await Promise.all(
    mates.map((mate) =>
      within(CALM_WITHIN_MS, mate.calm(), `${mate.name} did not end what it had begun`).catch((error: Error) => onViolation(error.message)),
    ),
  )
  await using client = await session(server.connectionString, { applicationName: 'chaos runner' })
  const dice = new Dice('leftovers')
  const member = { call: recorder.call.bind(recorder) }
  while (await resolveOne(member, client, dice, 0)) {
    // Until there is none.
  }
  await eventually(async () => nothingIsLeft(await whatIsLeft(client)), {
    timeoutMs: DRAINED_WITHIN_MS,
    everyMs: 250,
  }).catch(async () => onViolation(`not everything was consumed: ${JSON.stringify(await whatIsLeft(client))} is left`))
  await Promise.all(mates.map((mate) => mate.end(ENDED_WITHIN_MS)))
  await writeFile(join(directory, 'final.json'), JSON.stringify(await readFinalState(client)))
}

async function interruptible<T>(work: Promise<T>): Promise<T> {
  const { signal } = interrupted
  work.catch(() => {})
  const broken = Promise.withResolvers<never>()
  const onAbort = () => broken.reject(signal.reason)
  signal.addEventListener('abort', onAbort, { once: true })
  if (signal.aborted) onAbort()
  try {
    return await Promise.race([work, broken.promise])
  } finally {
    signal.removeEventListener('abort', onAbort)
  }
}

function progress(begun: number, crew: Crew, faults: Faults): string {
  const seconds = Math.round((performance.now() - begun) / 1_000)
  const calls = crew.mates.reduce((sum, { counts }) => sum + counts.calls, 0)
  const delivered = crew.mates.reduce((sum, { counts }) => sum + counts.delivered, 0)
  const injected = [...faults.counts.values()].reduce((sum, times) => sum + times, 0)
  return `${seconds} s: ${calls.toLocaleString('en')} calls, ${delivered.toLocaleString('en')} deliveries, ${injected} faults`
}

function say(text: string): void {
  process.stdout.write(`${text}\n`)
}
