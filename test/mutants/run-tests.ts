/** Runs vitest in a tree and reads what became of each test. */

import { spawn } from 'node:child_process'
import { readFile, rm } from 'node:fs/promises'
import { join, relative } from 'node:path'
import type { TestResult } from './judge.ts'

export interface Selection {
  readonly files: readonly string[]
  /** Parts of names; none: every test of the files. */
  readonly names: readonly string[]
}

export interface RunOptions {
  readonly databaseUrl: string
  readonly timeoutMs: number
  readonly signal: AbortSignal
  /** Files at once. @default 1 */
  readonly workers?: number
}

export interface Run {
  readonly results: readonly TestResult[]
  readonly ms: number
  /** Why there is no result, or not all. */
  readonly trouble: string
}

interface JsonReport {
  readonly testResults: readonly {
    readonly name: string
    readonly message?: string
    readonly assertionResults: readonly {
      readonly fullName: string
      readonly status: string
      readonly duration?: number
      readonly failureMessages?: readonly string[]
    }[]
  }[]
}

const REPORT = 'report.json'

export async function runTests(tree: string, { files, names }: Selection, options: RunOptions): Promise<Run> {
  const startedAt = performance.now()
  const report = join(tree, REPORT)
  const pattern = names.length === 0 ? [] : ['-t', names.map(escapeForPattern).join('|')]
  const vitest = join(tree, 'node_modules', 'vitest', 'vitest.mjs')
  const args = [
    vitest,
    'run',
    ...files,
    ...pattern,
    '--reporter=json',
    `--outputFile=${report}`,
    `--maxWorkers=${options.workers ?? 1}`,
    '--passWithNoTests',
  ]
  const output = await execute(tree, args, options)
  const json = await readFile(report, 'utf8').catch(() => undefined)
  await rm(report, { force: true })
  const ms = performance.now() - startedAt
  if (json === undefined) return { results: [], ms, trouble: output.trim().slice(-2_000) }
  const { testResults } = JSON.parse(json) as JsonReport
  const results = testResults.flatMap(({ name, assertionResults }) =>
    assertionResults.map(
      ({ fullName, status, duration, failureMessages }): TestResult => ({
        file: relative(tree, name),
        name: fullName.trim(),
        state: status === 'passed' || status === 'failed' ? status : 'skipped',
        ms: duration ?? 0,
        failure: (failureMessages ?? []).join('\n'),
      }),
    ),
  )
  const unloaded = testResults.filter(({ message, assertionResults }) => message && assertionResults.length === 0)
  return { results, ms, trouble: unloaded.map(({ message }) => message).join('\n') }
}

/** @returns what it printed; a run that is late or called off is ended with all its children */
async function execute(cwd: string, args: readonly string[], { databaseUrl, timeoutMs, signal }: RunOptions): Promise<string> {
  const child = spawn(process.execPath, args, {
    cwd,
    env: { ...process.env, DATABASE_URL: databaseUrl, NO_COLOR: '1' },
    stdio: ['ignore', 'pipe', 'pipe'],
    detached: true,
  })
  let output = ''
  for (const stream of [child.stdout, child.stderr]) stream.setEncoding('utf8').on('data', (text: string) => (output += text))
  const end = () => {
    try {
      if (child.pid !== undefined) process.kill(-child.pid, 'SIGKILL')
    } catch {
      // It has just ended.
    }
  }
  const timer = setTimeout(() => {
    output += `\nnot done within ${timeoutMs} ms`
    end()
  }, timeoutMs)
  signal.addEventListener('abort', end, { once: true })
  if (signal.aborted) end()
  await new Promise<void>((resolve) => {
    child.on('close', () => resolve())
    child.on('error', () => resolve())
  })
  clearTimeout(timer)
  signal.removeEventListener('abort', end)
  return output
}

function escapeForPattern(text: string): string {
  return text.replace(/[.*+?^${}()|[\]\\]/g, '\\$&')
}
