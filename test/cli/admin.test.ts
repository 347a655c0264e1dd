/** queues, jobs, dead and consumers, in the form for people and in the one for scripts. */

import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { build, complaint, klieo } from './command.ts'

const schema = freshSchema()
const env = { DATABASE_URL: databaseUrl(), KLIEO_SCHEMA: schema }
let bus: PostgresBus
let names = 0
const fresh = (what: string) => `${what}${++names}`
const run = (...args: string[]) => klieo(args, { env })

beforeAll(async () => {
  await build()
  bus = await PostgresBus.connect({ connectionString: databaseUrl(), schema, maintenance: false })
}, 60_000)

afterAll(() => bus.close())

/** A dead job and its id. */
async function bury(queue: string, error = 'no such address'): Promise<string> {
  const id = await bus.jobs.enqueue(queue, { payload: 'x', maxAttempts: 1, priority: 100, headers: { to: 'ada' } })
  const job = await bus.jobs.claim(queue, 'w', 30_000)
  await job?.nak(0, { error })
  return id
}

describe('queues', () => {
  test('A1 shows what each holds, as a table and as objects', async () => {
    const queue = fresh('queue')
    await bus.jobs.enqueueMany(queue, [{ payload: 'a' }, { payload: 'b', delayMs: 60_000 }])
    await bury(queue)
    const { stdout } = await run('queues')
    const [head, ...rows] = stdout.trim().split('\n')
    expect(head).toMatch(/^queue +ready +scheduled +running +dead +oldest ready +paused$/)
    expect(rows.find((row) => row.startsWith(queue))).toMatch(/ +1 +1 +0 +1 +\d+s ago$/)
    expect((await run('queues', '--json')).objects).toContainEqual(
      expect.objectContaining({ queue, ready: 1, scheduled: 1, running: 0, dead: 1, oldestReadyAt: expect.stringMatching(/Z$/) }),
    )
  })

  test('A3 pause and resume', async () => {
    const queue = fresh('queue')
    await bus.jobs.enqueue(queue, { payload: 'a' })
    expect(await run('queues', 'pause', queue)).toMatchObject({ code: 0, stdout: `queue "${queue}" is paused\n` })
    expect(await bus.jobs.claim(queue, 'w', 1_000)).toBeNull()
    expect((await run('queues', 'resume', queue, '--json')).objects).toEqual([{ queue, paused: false }])
    expect(await bus.jobs.claim(queue, 'w', 1_000)).not.toBeNull()
  })

  test('A2 purge removes what is not running, and asks somebody first', async () => {
    const queue = fresh('queue')
    await bus.jobs.enqueueMany(queue, [{ payload: 'a' }, { payload: 'b' }])
    await bury(queue)
    const refused = await run('queues', 'purge', queue)
    expect(refused.code).toBe(2)
    expect(complaint(refused)).toMatch(
      /^Remove the ready, scheduled, dead jobs of queue "queue\d+" for good\? Nobody can be asked here: say --yes$/,
    )
    expect((await run('queues', 'purge', queue, '--state', 'dead', '--yes')).stdout).toBe(`1 job removed from "${queue}"\n`)
    expect((await run('queues', 'purge', queue, '-y', '--json')).objects).toEqual([{ queue, removed: 2 }])
    expect(complaint(await run('queues', 'purge', queue, '--state', 'running', '-y'))).toContain('--state is one of ready, scheduled, dead')
  })
})

describe('jobs', () => {
  test('A1 ls shows jobs of a queue and state, so many of them', async () => {
    const queue = fresh('queue')
    const ids = await bus.jobs.enqueueMany(
      queue,
      ['a', 'bb', 'ccc'].map((payload) => ({ payload })),
    )
    const ran = await run('jobs', 'ls', queue, '--limit', '2')
    expect(ran.stdout.split('\n')[0]).toMatch(/^ *id +queue +state +attempts +priority +enqueued +size/)
    expect(ran.stdout.trim().split('\n')).toHaveLength(3)
    expect(ran.stderr).toBe(`there are more: --limit 0 shows all, --after ${ids[1]} the next\n`)
    expect((await run('jobs', 'ls', queue, '--after', ids[1]!, '--json')).objects).toMatchObject([
      { id: ids[2], state: 'ready', payloadBytes: 3 },
    ])
    expect(await run('jobs', 'ls', queue, '--state', 'dead')).toMatchObject({ code: 0, stdout: '', stderr: 'no such job\n' })
  })

  test('show has headers and payload; a job that is not there is exit code 3', async () => {
    const id = await bury(fresh('queue'), 'a\x1b[31m\nb')
    const { stdout } = await run('jobs', 'show', id)
    expect(stdout).toMatch(/^state +dead$/m)
    expect(stdout).toMatch(/^header to +ada$/m)
    expect(stdout).toMatch(/^payload +x$/m)
    expect(stdout).toMatch(/^last error +a\\u001b\[31m\\nb$/m)
    expect((await run('jobs', 'show', id, '--json')).objects).toMatchObject([{ id, state: 'dead', headers: { to: 'ada' }, payload: 'x' }])
    const absent = await run('jobs', 'show', '999999999')
    expect(absent.code).toBe(3)
    expect(complaint(absent)).toBe('there is no job "999999999" (any more)')
  })

  test('A2 retry, cancel and rm; what cannot be done to one does not keep the others from it', async () => {
    const queue = fresh('queue')
    const dead = await bury(queue)
    const [waiting, running] = await bus.jobs.enqueueMany(queue, [
      { payload: 'a', delayMs: 60_000 },
      { payload: 'b', priority: 9 },
    ])
    await bus.jobs.claim(queue, 'w', 30_000)
    const retried = await run('jobs', 'retry', dead, running!, waiting!)
    expect(retried).toMatchObject({ code: 1, stdout: `job ${dead} ready\njob ${waiting} ready\n` })
    expect(retried.stderr).toMatch(
      new RegExp(`^klieo-bus: job ${running}: .*\\[conflict\\]\nklieo-bus: some of the jobs were left as they are\n$`),
    )
    expect((await run('jobs', 'retry', running!)).code).toBe(4)
    expect((await run('jobs', 'cancel', running!, '--reason', 'wrong address', '--json')).objects).toEqual([
      { id: running, cancelled: true },
    ])
    expect(await bus.admin.job(running!)).toMatchObject({ state: 'dead', lastError: 'wrong address' })
    expect((await run('jobs', 'rm', waiting!)).stdout).toBe(`job ${waiting} removed\n`)
    const gone = await run('jobs', 'rm', waiting!)
    expect(gone.code).toBe(3)
    expect(complaint(gone)).toMatch(/\[not_found\]$/)
  })
})

describe('dead', () => {
  test('A2 ls shows why they died, retry puts one or all of them back', async () => {
    const queue = fresh('queue')
    const ids = [await bury(queue), await bury(queue), await bury(queue)]
    const { stdout } = await run('dead', 'ls', queue)
    expect(stdout.split('\n')[0]).toMatch(/^ *id +queue +attempts +died +size +error$/)
    expect(stdout).toContain('no such address')
    expect((await run('dead', 'ls', queue, '--json')).objects.map(({ id }) => id)).toEqual(ids)
    expect((await run('dead', 'retry', queue, ids[0]!)).stdout).toBe(`job ${ids[0]} ready\n`)
    expect((await run('dead', 'retry', queue)).stdout).toBe(`2 jobs of "${queue}" put back\n`)
    expect((await run('dead', 'retry', queue, '--json')).objects).toEqual([{ queue, retried: 0 }])
  })
})

describe('consumers', () => {
  test('A4 ls, seek and rm', async () => {
    const durable = fresh('durable')
    const subject = fresh('subject')
    await (await bus.pubsub.subscribe(subject, durable)).close()
    const acks = await bus.pubsub.publishMany(['a', 'b', 'c'].map((payload) => ({ subject, payload })))
    const { stdout } = await run('consumers', 'ls')
    expect(stdout.split('\n')[0]).toMatch(/^durable +filter +pending +in flight +redelivering +last active$/)
    expect(stdout).toMatch(new RegExp(`^${durable} +${subject} +3 +0 +0 +\\d+s ago$`, 'm'))
    expect((await run('consumers', 'seek', durable, String(acks[1]!.seq))).stdout).toBe(`durable "${durable}" begins at ${acks[1]!.seq}\n`)
    expect((await run('subscribe', subject, '--durable', durable, '--count', '2', '--raw')).stdout).toBe('b\nc\n')
    for (const where of ['all', 'new', new Date().toISOString()]) expect((await run('consumers', 'seek', durable, where)).code).toBe(0)
    expect(complaint(await run('consumers', 'seek', durable, 'yesterday'))).toContain(
      'WHERE is all, new, the number of a message, or a time',
    )
    expect((await run('consumers', 'rm', durable, '--json')).objects).toEqual([{ durable, removed: true }])
    expect((await run('consumers', 'rm', durable)).code).toBe(3)
    expect((await run('consumers', 'seek', durable, 'all')).code).toBe(3)
  })
})
