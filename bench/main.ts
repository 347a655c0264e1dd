/**
 * `npm run bench -- [options]`: measures klieo-bus, bare Postgres and the peers, in turn, on the same machine.
 *
 *   --quick               klieo-bus and bare Postgres only, short stretches, one run; under three minutes, nothing to set up
 *   --only a,b            these scenarios; see the names in bench/registry.ts
 *   --contenders a,b      those whose names contain one of these
 *   --runs N              default 3, quick 1
 *   --peers none|all      default all, quick none; they need bench/setup once
 *   --soak [minutes]      only the soak, default 10 minutes
 *   --pin                 the results become those of docs/performance.md; pin a soak before the rest
 *
 * With DATABASE_URL it runs on that server, in databases that it makes and drops; otherwise on an embedded one of its own.
 */

import { mkdir, readFile, writeFile } from 'node:fs/promises'
import { cpus } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import type { Contender } from './contenders.ts'
import { plots } from './plots.ts'
import { machine, type PostgresServer, startPostgres } from './postgres-server.ts'
import { entrants, loadPeers, noPeers, own, scenarios } from './registry.ts'
import { markdownReport, terminalReport, withGenerated } from './report.ts'
import { type ContenderInfo, type Results, toRows } from './results.ts'
import { Aborted, execute } from './runner.ts'
import { runSoak } from './soak.ts'
import { judge } from './targets.ts'

const DOCS = join(import.meta.dirname, '..', 'docs')
const RESULTS = join(import.meta.dirname, 'results')

const options = readOptions()
const stop = new AbortController()
for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.once(signal, () => {
    process.exitCode = 130
    stop.abort()
  })
}

try {
  await using postgres = await startPostgres()
  if (options.soak === undefined) await compareAll(postgres)
  else await soak(postgres, options.soak)
} catch (error) {
  if (!(error instanceof Aborted)) {
    process.stderr.write(`${error instanceof Error ? (error.stack ?? error.message) : String(error)}\n`)
    process.exitCode = 1
  }
}

function readOptions() {
  const args = process.argv.slice(2)
  // parseArgs knows no option whose value may be left out.
  const at = args.indexOf('--soak')
  if (at >= 0 && !/^[\d.]+$/.test(args[at + 1] ?? '')) args.splice(at + 1, 0, '10')
  const { values } = parseArgs({
    args,
    options: {
      quick: { type: 'boolean', default: false },
      only: { type: 'string' },
      contenders: { type: 'string' },
      runs: { type: 'string' },
      peers: { type: 'string' },
      soak: { type: 'string' },
      pin: { type: 'boolean', default: false },
    },
  })
  const runs = Number(values.runs ?? (values.quick ? 1 : 3))
  if (!Number.isInteger(runs) || runs < 1) throw new Error('--runs must be a positive integer')
  const peers = values.peers ?? (values.quick ? 'none' : 'all')
  if (peers !== 'all' && peers !== 'none') throw new Error('--peers must be none or all')
  const only = values.only?.split(',')
  for (const name of only ?? []) {
    if (!scenarios.some((scenario) => scenario.name === name)) {
      throw new Error(`--only: there is no "${name}"; there are ${scenarios.map((scenario) => scenario.name).join(', ')}`)
    }
  }
  return {
    quick: values.quick,
    runs,
    only,
    contenders: values.contenders?.split(','),
    peers: peers === 'all',
    soak: values.soak === undefined ? undefined : Number(values.soak),
    pin: values.pin,
  }
}

async function compareAll(postgres: PostgresServer): Promise<void> {
  const began = performance.now()
  const peerModule = options.peers ? await loadPeers() : undefined
  const peers = peerModule?.peers ?? noPeers
  await using servers = await peerModule?.startPeerServers()
  const missing = servers?.missing ?? []
  for (const line of missing) process.stderr.write(`${line}\n`)

  const byName = new Map<string, { contender: Contender<unknown>; peer: boolean }>()
  for (const [peer, contenders] of [
    [false, own],
    [true, peers],
  ] as const) {
    for (const contender of Object.values(contenders).flat() as Contender<unknown>[]) byName.set(contender.name, { contender, peer })
  }
  const available = (name: string) => {
    const server = byName.get(name)?.contender.server ?? 'postgres'
    return server === 'postgres' || (server === 'redis' ? servers?.redisUrl : servers?.natsUrl) !== undefined
  }
  const wanted = (name: string) => options.contenders?.some((part) => name.includes(part)) ?? true
  const all = {
    jobs: [...own.jobs, ...peers.jobs],
    log: [...own.log, ...peers.log],
    kv: [...own.kv, ...peers.kv],
    requests: [...own.requests, ...peers.requests],
  }
  const selected = scenarios
    .filter(({ name }) => options.only?.includes(name) ?? true)
    .map((scenario) => ({ scenario, entrants: entrants(scenario, all).filter((name) => available(name) && wanted(name)) }))

  const contenders: Record<string, ContenderInfo> = {}
  for (const name of new Set(selected.flatMap((each) => each.entrants))) {
    const known = byName.get(name)
    if (!known) continue
    const { contender, peer } = known
    const version = await contender.version().catch(() => 'of an unknown version')
    // One name may stand for several shapes: jobs, log and so on.
    const alike = (Object.values(all).flat() as Contender<unknown>[]).filter((each) => each.name === name)
    const settings = [...new Set(alike.map((each) => each.settings))].join('; ')
    contenders[name] = { version, settings, server: contender.server ?? 'postgres', peer }
  }

  const outcome = await execute(
    {
      scenarios: selected,
      runs: options.runs,
      quick: options.quick,
      peers: options.peers,
      postgres,
      redisUrl: servers?.redisUrl,
      natsUrl: servers?.natsUrl,
      serverPidOf(name) {
        const server = byName.get(name)?.contender.server ?? 'postgres'
        return server === 'postgres' ? postgres.pid : server === 'redis' ? servers?.redisPid : servers?.natsPid
      },
      isPeer: (name) => byName.get(name)?.peer ?? false,
      onProgress: (line) => process.stderr.write(`${line}\n`),
    },
    stop.signal,
  )
  const results: Results = {
    date: new Date().toISOString(),
    machine: `${machine()}, ${cpus()[0]?.model.trim() || 'unknown processor'}`,
    versions: { PostgreSQL: postgres.version, 'Node.js': process.versions.node, ...servers?.versions },
    serverSettings: { PostgreSQL: postgres.settings, ...servers?.settings },
    quick: options.quick,
    runs: options.runs,
    minutes: Math.round((performance.now() - began) / 6_000) / 10,
    contenders,
    rows: toRows(outcome.samples),
    failures: [...missing, ...outcome.failures],
  }
  const titles = new Map(scenarios.map(({ name, title }) => [name, title]))
  const verdicts = judge(results)
  await save(results, `${results.date.slice(0, 19).replaceAll(':', '')}${results.quick ? '-quick' : ''}`)
  process.stdout.write(`\n${terminalReport(results, verdicts, titles)}`)
  if (options.pin) {
    const drawn = plots(results)
    await mkdir(join(DOCS, 'performance'), { recursive: true })
    for (const [name, svg] of drawn) await writeFile(join(DOCS, 'performance', `${name}.svg`), svg)
    await writeFile(join(DOCS, 'performance', 'results.json'), json({ ...results, verdicts }))
    const paths = new Map([...drawn.keys()].map((name) => [name, `performance/${name}.svg`]))
    const soaked = await readFile(join(DOCS, 'performance', 'soak.json'), 'utf8').catch(() => undefined)
    const soak = soaked === undefined ? undefined : (JSON.parse(soaked) as { text: string }).text
    const generated = markdownReport(results, verdicts, { titles, betterAt: peerModule?.betterAt ?? {}, plots: paths, soak })
    const document = join(DOCS, 'performance.md')
    await writeFile(document, withGenerated(await readFile(document, 'utf8'), generated))
  }
}

async function save(results: Results, name: string): Promise<void> {
  const directory = join(RESULTS, name)
  await mkdir(directory, { recursive: true })
  await writeFile(join(directory, 'results.json'), json({ ...results, verdicts: judge(results) }))
  for (const [plot, svg] of plots(results)) await writeFile(join(directory, `${plot}.svg`), svg)
  process.stderr.write(`written to ${directory}\n`)
}

/** Rows on a line each, so that a difference can be read. */
function json(value: Results & { verdicts: unknown[] }): string {
  const { rows, verdicts, ...rest } = value
  const list = (items: readonly unknown[]) => `[\n${items.map((item) => `    ${JSON.stringify(item)}`).join(',\n')}\n  ]`
  return `${JSON.stringify(rest, null, 2).slice(0, -2)},\n  "verdicts": ${list(verdicts)},\n  "rows": ${list(rows)}\n}\n`
}

async function soak(postgres: PostgresServer, minutes: number): Promise<void> {
  const directory = options.pin
    ? join(DOCS, 'performance')
    : join(RESULTS, `${new Date().toISOString().slice(0, 19).replaceAll(':', '')}-soak`)
  await mkdir(directory, { recursive: true })
  const report = await runSoak(postgres, {
    minutes,
    directory,
    signal: stop.signal,
    onProgress: (line) => process.stderr.write(`${line}\n`),
  })
  process.stdout.write(report.text)
  if (!report.holds) process.exitCode = 1
}
