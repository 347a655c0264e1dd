/** Sessions of psql in the documents: what was typed after the prompt, and what psql prints when it is typed again. */

import { execFile, spawn } from 'node:child_process'
import { access, constants, readdir, readFile } from 'node:fs/promises'
import { delimiter, join } from 'node:path'
import { promisify } from 'node:util'

const DOCS = join(import.meta.dirname, '..', '..', 'docs')
/** The prompt of a statement, and of the lines it goes on with. */
const PROMPT = /^app[=\-$(][>#] ?/
const FIRST = /^app=[>#] ?/
const MARK = '@@ statement'

export interface Step {
  /** The line in the document, from 1. */
  readonly line: number
  readonly typed: string
  readonly printed: string
}

export function document(name: string): Promise<string> {
  return readFile(join(DOCS, name), 'utf8')
}

/** The fenced blocks of a language, with the line of their first line of code. */
export function blocksOf(text: string, language: string): { readonly line: number; readonly code: string }[] {
  return [...text.matchAll(new RegExp(`^\`\`\`${language}\\b.*\\n([\\s\\S]*?)^\`\`\`$`, 'gm'))].map((found) => ({
    line: text.slice(0, found.index).split('\n').length + 1,
    code: found[1] as string,
  }))
}

/** The statements of the blocks marked `psql`, in order. */
export function stepsOf(text: string): Step[] {
  return blocksOf(text, 'psql').flatMap(({ line, code }) => {
    const steps: { line: number; typed: string[]; printed: string[] }[] = []
    code.split('\n').forEach((content, at) => {
      if (FIRST.test(content)) steps.push({ line: line + at, typed: [content.replace(PROMPT, '')], printed: [] })
      else if (PROMPT.test(content)) steps.at(-1)!.typed.push(content.replace(PROMPT, ''))
      else steps.at(-1)!.printed.push(content)
    })
    return steps.map((step) => ({ line: step.line, typed: step.typed.join('\n'), printed: step.printed.join('\n').trimEnd() }))
  })
}

/** The newest psql: /usr/lib/postgresql/N/bin, then PATH; the embedded server comes without one. */
export async function findPsql(): Promise<string | undefined> {
  const root = '/usr/lib/postgresql'
  const versions = await readdir(root).catch(() => [])
  const numbered = versions.sort((a, b) => Number(b) - Number(a)).map((version) => join(root, version, 'bin'))
  for (const directory of [...numbered, ...(process.env.PATH ?? '').split(delimiter)]) {
    const path = join(directory, 'psql')
    if (
      await access(path, constants.X_OK).then(
        () => true,
        () => false,
      )
    )
      return path
  }
  return undefined
}

/** Types the statements into one psql. @returns what each printed */
export async function type(psql: string, url: string, typed: readonly string[]): Promise<string[]> {
  // One pipe for both, so that errors stand where they came; psql empties its buffer before it writes one.
  const child = spawn('sh', ['-c', 'exec "$0" -X "$1" 2>&1', psql, url], { env: { ...process.env, PGTZ: 'UTC', PSQL_PAGER: '' } })
  let output = ''
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    output += text
  })
  const ended = new Promise((resolve) => child.on('close', resolve))
  child.stdin.end(`\\set VERBOSITY terse\n${typed.map((text) => `\\echo '${MARK}'\n${text}\n`).join('')}`)
  await ended
  return output
    .split(`${MARK}\n`)
    .slice(1)
    .map((text) => text.trimEnd())
}

/** Without what differs each time, and the widths that come of it. */
export function comparable(printed: string): string {
  return printed
    .replaceAll(/\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b/g, '<uuid>')
    .replaceAll(/\b\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?\+00/g, '<time>')
    .split('\n')
    .map((line) => line.replaceAll(/-{2,}/g, '--').replaceAll(/ +/g, ' ').trim())
    .join('\n')
}

/** Types what a document says. @returns where psql prints something else, and what; empty: nowhere */
export async function differences(name: string, psql: string, url: string): Promise<string> {
  const steps = stepsOf(await document(name))
  const printed = await type(
    psql,
    url,
    steps.map(({ typed }) => typed),
  )
  return steps
    .flatMap((step, at) => {
      const actual = printed[at] ?? 'nothing: psql had ended'
      return comparable(actual) === comparable(step.printed)
        ? []
        : [`docs/${name}:${step.line}: ${step.typed}\n${actual}\n-- and not --\n${step.printed}`]
    })
    .join('\n\n')
}

/** A python3 that has psycopg 3. */
export async function findPython(): Promise<string | undefined> {
  for (const path of ['/usr/bin/python3', 'python3']) {
    const found = await promisify(execFile)(path, ['-c', 'import psycopg; assert psycopg.__version__ >= "3"']).then(
      () => true,
      () => false,
    )
    if (found) return path
  }
  return undefined
}
