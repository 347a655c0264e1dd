/** The story of docs/getting-started.md, with its files as they stand there: the embedded server, a killed worker, another one. */

import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { startChild } from '../support/child.ts'
import { blocksOf } from './document.ts'
import { Project, programsOf, root, surroundings } from './programs.ts'

const document = 'docs/getting-started.md'

test('J3 the worker of the guide is killed in the middle, and the job comes back to the next one', async () => {
  const around = await surroundings()
  const programs = programsOf(blocksOf(document, await readFile(join(root, document), 'utf8')), around)
  await using project = await Project.create(programs, around)
  const cwd = project.path('getting-started')
  const command = join(root, 'dist', 'cli', 'main.js')
  const klieo = (args: readonly string[], url?: string) => startChild(command, { args, cwd, env: { DATABASE_URL: url } })
  const start = (file: string, url: string) => startChild(join(cwd, file), { env: { DATABASE_URL: url } })
  const says = (text: string) => (line: object) => 'text' in line && line.text === text
  const ended = { code: 0, signal: null }

  await using server = klieo(['up'])
  const { text: url } = await server.next<{ text: string }>(({ text }) => /^postgres:/.test(String(text)), 60_000)

  await using enqueue = start('enqueue.ts', url)
  expect(await enqueue.exited).toEqual(ended)
  await using first = start('worker.ts', url)
  await first.next(says('receipt for order 7: done'), 30_000)

  await using another = klieo(['enqueue', 'receipts', '{"order": 8}'], url)
  expect(await another.exited).toEqual(ended)
  await first.next(says('receipt for order 8: attempt 1'))
  await first.kill()
  await using second = start('worker.ts', url)
  await second.next(says('receipt for order 8: attempt 2'), 30_000)
  await second.next(says('receipt for order 8: done'))
  expect(await second.kill('SIGTERM')).toEqual(ended)
  expect(await server.kill('SIGINT')).toMatchObject({ signal: null })
}, 120_000)
