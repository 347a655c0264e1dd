/**
 * npm run mutants: the bus with its guarantees broken, one at a time, and which tests notice. A mutant that survives is a hole
 * in the tests, and the run fails.
 *
 *   --only id,id     these alone
 *   --list           what there is; runs nothing
 *   --all-tests      on each mutant the whole suite, to see everything that notices: takes long
 *   --parallel n     mutants at once (2)
 *
 * Runs on DATABASE_URL if it is set, else on an embedded server of its own. First the same tests run on the unmutated tree: where one
 * fails there, nothing can be said of the mutants that it was to catch, and the run fails, too.
 */

import { parseArgs } from 'node:util'
import { startEmbeddedPostgres } from '../../src/testing/index.ts'
import { mutants as all } from './catalogue/index.ts'
import { type Judgement, judge, type TestResult } from './judge.ts'
import { type Mutant, mutate } from './mutant.ts'
import { line, list, type Outcome, seconds, table } from './report.ts'
import { type RunOptions, runTests } from './run-tests.ts'
import { readSource, Tree } from './tree.ts'

/** A run takes seconds; this is for a busy machine. */
const MUTANT_TIMEOUT_MS = 5 * 60_000
const WHOLE_SUITE_TIMEOUT_MS = 30 * 60_000

const { values } = parseArgs({
  options: {
    only: { type: 'string' },
    list: { type: 'boolean', default: false },
    'all-tests': { type: 'boolean', default: false },
    parallel: { type: 'string', default: '2' },
  },
})
process.exitCode = await main()

async function main(): Promise<number> {
  const chosen = choose(values.only)
  if (values.list) {
    process.stdout.write(`${list(chosen)}\n`)
    return 0
  }
  const parallel = Number(values.parallel)
  if (!Number.isInteger(parallel) || parallel < 1) throw new Error('--parallel must be a whole number from 1')
  const aborted = new AbortController()
  for (const name of ['SIGINT', 'SIGTERM'] as const) process.once(name, () => aborted.abort())
  await using server = process.env.DATABASE_URL ? undefined : await startEmbeddedPostgres({ settings: { max_connections: '300' } })
  const databaseUrl = process.env.DATABASE_URL ?? (server?.connectionString as string)
  const startedAt = performance.now()
  const options = { databaseUrl, signal: aborted.signal }

  const before = await baseline(chosen, { ...options, timeoutMs: WHOLE_SUITE_TIMEOUT_MS, workers: parallel })
  const failed = before.filter(({ state }) => state === 'failed')
  for (const { file, name, failure } of failed) say(`the unmutated tree fails ${file}: ${name}\n  ${failure.split('\n', 1)[0]}`)
  say(
    `the unmutated tree passes ${before.filter(({ state }) => state === 'passed').length} tests (${seconds(performance.now() - startedAt)} s)`,
  )

  const outcomes: Outcome[] = []
  const waiting = [...chosen]
  await Promise.all(
    Array.from({ length: parallel }, async () => {
      for (let mutant = waiting.shift(); mutant && !aborted.signal.aborted; mutant = waiting.shift()) {
        const outcome = await tryMutant(mutant, before, options)
        outcomes.push(outcome)
        say(line(outcome))
      }
    }),
  )
  if (aborted.signal.aborted) return 130
  outcomes.sort((a, b) => chosen.indexOf(a.mutant) - chosen.indexOf(b.mutant))
  process.stdout.write(`${table(outcomes)}\n`)
  const count = (verdict: Judgement['verdict']) => outcomes.filter(({ judgement }) => judgement.verdict === verdict).length
  const [survived, broken, skipped] = [count('survived'), count('broken'), count('skipped')]
  say(
    `${outcomes.length} mutants: ${count('caught')} caught, ${survived} survived, ${broken} broken, ${skipped} skipped (${seconds(performance.now() - startedAt)} s)`,
  )
  return survived + broken > 0 ? 1 : 0
}

function choose(only: string | undefined): readonly Mutant[] {
  if (only === undefined) return all
  return only.split(',').map((id) => {
    const mutant = all.find((one) => one.id === id)
    if (!mutant) throw new Error(`there is no mutant "${id}"; --list names them`)
    return mutant
  })
}

/** What the tests of all mutants say while nothing is broken. */
async function baseline(mutants: readonly Mutant[], options: RunOptions): Promise<readonly TestResult[]> {
  await using tree = await Tree.make()
  const files = [...new Set(mutants.flatMap((mutant) => mutant.files))]
  const names = [...new Set(mutants.flatMap(({ caughtBy, beside }) => [...caughtBy, ...beside]))]
  const { results, trouble } = await runTests(tree.path, { files, names }, options)
  if (trouble !== '' || results.length === 0) throw new Error(`the tests could not be run on the unmutated tree: ${trouble}`)
  return results
}

async function tryMutant(mutant: Mutant, before: readonly TestResult[], options: Omit<RunOptions, 'timeoutMs'>): Promise<Outcome> {
  try {
    mutate(mutant, readSource)
  } catch (error) {
    const why = error instanceof Error ? error.message : String(error)
    return { mutant, judgement: { verdict: 'broken', by: [], also: [], why }, ms: 0 }
  }
  await using tree = await Tree.make(mutant)
  const whole = values['all-tests']
  const selection = whole ? { files: [], names: [] } : { files: mutant.files, names: [...mutant.caughtBy, ...mutant.beside] }
  const { results, ms, trouble } = await runTests(tree.path, selection, {
    ...options,
    timeoutMs: whole ? WHOLE_SUITE_TIMEOUT_MS : MUTANT_TIMEOUT_MS,
  })
  const judgement = judge(
    mutant,
    before.filter(({ file }) => mutant.files.includes(file)),
    results,
  )
  if (judgement.verdict !== 'broken' || trouble === '') return { mutant, judgement, ms }
  return { mutant, judgement: { ...judgement, why: `${judgement.why} ${trouble.split('\n').slice(-3).join(' ')}` }, ms }
}

function say(text: string): void {
  process.stderr.write(`${text}\n`)
}
