/** The programs of docs/moving-from-pg-boss.md and docs/moving-from-graphile-worker.md, with the real packages where the benchmark has them (bench/setup). */

import { existsSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import type pg from 'pg'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { decode, PostgresBus } from '../../src/index.ts'
import { startChild } from '../support/child.ts'
import { blocksOf } from './document.ts'
import { FreshDatabase, withClient } from './fresh-database.ts'
import { Project, programsOf, root, surroundings } from './programs.ts'

interface Boss {
  on(event: 'error', listener: (error: unknown) => void): void
  start(): Promise<unknown>
  stop(): Promise<void>
  createQueue(name: string): Promise<void>
  send(name: string, data: object, options?: object): Promise<string | null>
  fetch(name: string): Promise<{ id: string }[]>
  findJobs(name: string): Promise<{ id: string }[]>
}

interface Utils {
  migrate(): Promise<void>
  addJob(task: string, payload: object, spec?: object): Promise<unknown>
  withPgClient<T>(use: (client: pg.PoolClient) => Promise<T>): Promise<T>
  release(): Promise<void>
}

const installed = existsSync(join(root, 'bench', 'node_modules'))
const inAnHour = new Date(Date.now() + 3_600_000)

describe.skipIf(!installed)('with the other package installed', () => {
  let database: FreshDatabase
  let url: string
  let project: Project

  beforeAll(async () => {
    const around = await surroundings()
    const texts = ['docs/moving-from-pg-boss.md', 'docs/moving-from-graphile-worker.md'].map(
      async (name) => [name, await readFile(join(root, name), 'utf8')] as const,
    )
    const programs = (await Promise.all(texts)).flatMap(([name, text]) => programsOf(blocksOf(name, text), around))
    project = await Project.create(programs, around)
    await project.linkPeers(around)
    database = await FreshDatabase.make()
    url = database.url
  })

  afterAll(async () => {
    await project?.[Symbol.asyncDispose]()
    await database?.[Symbol.asyncDispose]()
  })

  const move = async (guide: string, queue: string) => {
    await using child = startChild(project.path(join(guide, 'move.ts')), { args: [queue], env: { DATABASE_URL: url } })
    expect(await child.exited, child.stderr).toEqual({ code: 0, signal: null })
  }

  test('what waits in pg-boss moves, delayed jobs too; what is being worked on stays', async () => {
    const { PgBoss } = (await import(peer('pg-boss/dist/index.js'))) as { PgBoss: new (url: string) => Boss }
    const boss = new PgBoss(url)
    boss.on('error', () => {})
    await boss.start()
    await boss.createQueue('boss-mail')
    await boss.send('boss-mail', { to: 'worked on' })
    const [active] = await boss.fetch('boss-mail')
    for (let at = 0; at < 150; at++) await boss.send('boss-mail', { to: `waiting ${at}` }, { priority: at === 149 ? 1_000 : 0 })
    await boss.send('boss-mail', { to: 'later' }, { startAfter: inAnHour, retryLimit: 6 })

    await move('moving-from-pg-boss', 'boss-mail')
    expect((await boss.findJobs('boss-mail')).map(({ id }) => id)).toEqual([active?.id])
    await boss.stop()
    await check('boss-mail', { waiting: 150, first: 'waiting 149', laterAttempts: 7 })
  }, 60_000)

  test('what waits in graphile-worker moves, delayed jobs too; what is being worked on stays', async () => {
    const { makeWorkerUtils } = (await import(peer('graphile-worker/dist/index.js'))) as {
      makeWorkerUtils(options: object): Promise<Utils>
    }
    const utils = await makeWorkerUtils({ connectionString: url })
    await utils.migrate()
    const task = 'graphile-mail'
    for (let at = 0; at < 150; at++) await utils.addJob(task, { to: `waiting ${at}` }, { priority: at === 149 ? -5 : 0 })
    await utils.addJob(task, { to: 'later' }, { runAt: inAnHour, maxAttempts: 7 })
    await utils.addJob('another-task', { to: 'nobody' })
    await utils.addJob(task, { to: 'worked on' }, { jobKey: 'busy' })
    await utils.withPgClient((client) =>
      client.query("update graphile_worker._private_jobs set locked_at = now(), locked_by = 'w' where key = 'busy'"),
    )

    await move('moving-from-graphile-worker', task)
    const left = await utils.withPgClient(async (client) => (await client.query('select key from graphile_worker.jobs order by id')).rows)
    expect(left).toEqual([{ key: null }, { key: 'busy' }])
    await utils.release()
    await check(task, { waiting: 150, first: 'waiting 149', laterAttempts: 7 })
  }, 60_000)

  async function check(queue: string, expected: { waiting: number; first: string; laterAttempts: number }): Promise<void> {
    await using bus = await PostgresBus.connect({ connectionString: url })
    const jobs = await bus.jobs.claimMany(queue, 'test', 60_000, { limit: 1_000 })
    expect(new Set(jobs.map(({ payload }) => decode<{ to: string }>(payload).to)).size).toBe(expected.waiting)
    expect(jobs).toHaveLength(expected.waiting)
    expect(decode(jobs[0]!.payload)).toEqual({ to: expected.first })
    const { rows } = await withClient(url, (client) =>
      client.query("select payload_text, max_attempts, run_at from klieo.job_details where queue = $1 and state = 'scheduled'", [queue]),
    )
    expect(rows).toEqual([{ payload_text: '{"to":"later"}', max_attempts: expected.laterAttempts, run_at: inAnHour }])
  }
})

function peer(path: string): string {
  return join(root, 'bench', 'node_modules', path)
}
