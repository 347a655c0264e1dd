/** docs/leader-election.md as it stands there, in two processes: one dies, one stands still and comes back too late. */

import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { type Child, startChild } from '../support/child.ts'
import { eventually } from '../support/wait.ts'
import { blocksOf } from './document.ts'
import { FreshDatabase, withClient } from './fresh-database.ts'
import { Project, programsOf, root, surroundings } from './programs.ts'

const document = 'docs/leader-election.md'
let database: FreshDatabase
let project: Project

beforeAll(async () => {
  const around = await surroundings()
  const programs = programsOf(blocksOf(document, await readFile(join(root, document), 'utf8')), around)
  project = await Project.create(programs, around)
  database = await FreshDatabase.make({ migrate: false })
})

afterAll(async () => {
  await project?.[Symbol.asyncDispose]()
  await database?.[Symbol.asyncDispose]()
})

const start = (name: string) => startChild(project.path('leader-election/leader.ts'), { args: [name], env: { DATABASE_URL: database.url } })
const hear = (child: Child, text: string) => child.next((line) => line.text === text)

test('K5 the leader of the guide is killed and the other one leads; stopped for longer than its lease, it changes nothing', async () => {
  await using first = start('1')
  await hear(first, 'process 1 leads')
  await using second = start('2')
  await first.kill()
  await hear(second, 'process 2 leads')

  const fence = await eventually(fenceOf)

  await using third = start('3')
  second.pause()
  await hear(third, 'process 3 leads')
  const later = await eventually(async () => {
    const now = await fenceOf()
    return now > fence && now
  })
  second.resume()
  await hear(second, 'process 2 leads no more')
  expect(await fenceOf()).toBe(later)

  expect(await third.kill('SIGTERM')).toEqual({ code: 0, signal: null })
  await hear(second, 'process 2 leads')
  expect(await second.kill('SIGTERM')).toEqual({ code: 0, signal: null })
}, 60_000)

/** Of whoever has worked last. */
function fenceOf(): Promise<number> {
  return withClient(database.url, async (client) => {
    const { rows } = await client.query<{ fence: string }>('select fence from reports')
    return Number(rows[0]!.fence)
  })
}
