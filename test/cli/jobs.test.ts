import { existsSync } from 'node:fs'
import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import type { Exit } from '../support/child.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { build, complaint, directory, klieo, shell, start, text } from './command.ts'

const schema = freshSchema()
const env = { DATABASE_URL: databaseUrl(), KLIEO_SCHEMA: schema }
let bus: PostgresBus
let queues = 0
const freshQueue = () => `q${++queues}`

beforeAll(async () => {
  await build()
  bus = await PostgresBus.connect({ connectionString: databaseUrl(), schema, maintenance: false })
}, 60_000)

afterAll(() => bus.close())

async function payloads(queue: string): Promise<string[]> {
  const found: string[] = []
  for (;;) {
    const jobs = await bus.jobs.claimMany(queue, 'test', 60_000, { limit: 1_000 })
    if (jobs.length === 0) return found
    found.push(...jobs.map(({ payload }) => Buffer.from(payload).toString()))
    await Promise.all(jobs.map((job) => job.ack()))
  }
}

describe('enqueue', () => {
  test('J1 makes a job of each argument and prints their ids', async () => {
    const queue = freshQueue()
    const ran = await klieo(['enqueue', queue, 'one', 'two'], { env })
    expect(ran).toMatchObject({ code: 0, stderr: '' })
    expect(ran.stdout).toMatch(/^job \d+\njob \d+\n$/)
    expect(await payloads(queue)).toEqual(['one', 'two'])
  })

  test('--json is an object for each job', async () => {
    const queue = freshQueue()
    const { objects } = await klieo(['enqueue', queue, 'one', '--json'], { env })
    expect(objects).toEqual([{ queue, id: expect.any(String) }])
  })

  test('passes headers, priority, attempts and the time on', async () => {
    const queue = freshQueue()
    await klieo(['enqueue', queue, 'later', '--delay', '1h', '--priority', '-5', '--max-attempts', '2', '-H', 'to: ada', '-H', 'x:y'], {
      env,
    })
    await klieo(['enqueue', queue, 'now', '-H', 'to: ada', '-H', 'x:y:z', '--max-attempts', '2'], { env })
    const [job, none] = await bus.jobs.claimMany(queue, 'test', 30_000, { limit: 10 })
    expect(none).toBeUndefined()
    expect(job).toMatchObject({ headers: { to: 'ada', x: 'y:z' }, maxAttempts: 2 })
    await job?.ack()
  })

  test('J5 --dedup-key answers the first job', async () => {
    const queue = freshQueue()
    const first = await klieo(['enqueue', queue, 'a', '--dedup-key', 'k'], { env })
    expect((await klieo(['enqueue', queue, 'b', '--dedup-key', 'k'], { env })).stdout).toBe(first.stdout)
    expect(complaint(await klieo(['enqueue', queue, 'a', 'b', '--dedup-key', 'k'], { env }))).toContain('--dedup-key is for one payload')
    expect(await payloads(queue)).toEqual(['a'])
  })

  test('J1 makes a job of each line of standard input', async () => {
    const queue = freshQueue()
    const ran = await shell(`printf '%s\\n' a b c | klieo-bus enqueue ${queue}`, { env })
    expect(ran).toMatchObject({ code: 0, stdout: `3 jobs enqueued in "${queue}"\n`, stderr: '' })
    expect(await payloads(queue)).toEqual(['a', 'b', 'c'])
  })

  test.runIf(existsSync('/dev/full'))('J1 a standard output that takes nothing does not enqueue a line twice', async () => {
    const queue = freshQueue()
    const ran = await shell(`printf '%s\\n' a b c | klieo-bus enqueue ${queue} --json > /dev/full`, { env })
    expect(ran.code).toBe(1)
    expect(ran.stderr).toMatch(/^klieo-bus: 3 of the lines were enqueued; standard output cannot be written: ENOSPC/)
    expect(await payloads(queue)).toEqual(['a', 'b', 'c'])
  })

  test('J1 a reader of the ids that goes keeps no line from being enqueued', async () => {
    const queue = freshQueue()
    const ran = await shell(`seq 3000 | klieo-bus enqueue ${queue} --json | head -n 1; echo "\${PIPESTATUS[1]}"`, { env })
    expect(ran.stdout).toMatch(/^\{.*\}\n0\n$/)
    expect(await payloads(queue)).toHaveLength(3_000)
  })

  test('takes an empty line for an empty payload, and a carriage return before a newline for a part of it', async () => {
    const queue = freshQueue()
    expect((await klieo(['enqueue', queue], { env, input: 'a\r\n\nb\rc\n' })).code).toBe(0)
    expect(await payloads(queue)).toEqual(['a', '', 'b\rc'])
  })

  test('takes bytes that are no text as they are', async () => {
    const queue = freshQueue()
    const line = Buffer.from([0xff, 0x00, 0xc3, 0x0a])
    expect((await klieo(['enqueue', queue], { env, input: line })).code).toBe(0)
    const job = await bus.jobs.claim(queue, 'test', 30_000)
    expect([...(job?.payload ?? [])]).toEqual([0xff, 0x00, 0xc3])
  })

  test('enqueues in batches, in the order of the lines', async () => {
    const queue = freshQueue()
    const lines = Array.from({ length: 2_500 }, (_, at) => `line ${at}`)
    const { objects } = await klieo(['enqueue', queue, '--json'], { env, input: `${lines.join('\n')}\n` })
    expect(objects).toHaveLength(2_500)
    expect(await payloads(queue)).toEqual(lines)
  })

  test('nothing on standard input is no job and no error', async () => {
    expect(await klieo(['enqueue', freshQueue()], { env })).toMatchObject({ code: 0, stdout: expect.stringMatching(/^0 jobs/) })
  })

  test('refuses half a line at the end, says how much was enqueued, and --partial takes it', async () => {
    const queue = freshQueue()
    const ran = await klieo(['enqueue', queue], { env, input: 'a\nb\nhal' })
    expect(ran).toMatchObject({ code: 1, stdout: '' })
    expect(complaint(ran)).toBe(
      '2 of the lines were enqueued; line 3: it has no newline at its end, so it may be half a line; --partial takes it all the same',
    )
    expect(await payloads(queue)).toEqual(['a', 'b'])
    expect((await klieo(['enqueue', queue, '--partial'], { env, input: 'a\nhal' })).code).toBe(0)
    expect(await payloads(queue)).toEqual(['a', 'hal'])
    expect(complaint(await klieo(['enqueue', queue], { env, input: 'hal' }))).toMatch(/^nothing was enqueued; line 1: /)
  })

  test('stops at a line that is too large, in the middle of many, and says which', async () => {
    const queue = freshQueue()
    const before = Array.from({ length: 2_000 }, (_, at) => String(at))
    const input = `${before.join('\n')}\n${'x'.repeat(1_048_577)}\nafter\n`
    const ran = await klieo(['enqueue', queue], { env, input })
    expect(ran.code).toBe(1)
    expect(complaint(ran)).toMatch(/^2,000 of the lines were enqueued; line 2,001: it is larger than 1,048,576 bytes/)
    expect(await payloads(queue)).toEqual(before)
    expect((await klieo(['enqueue', queue, '--max-payload', '2000000'], { env, input })).code).toBe(0)
    expect((await payloads(queue)).at(-1)).toBe('after')
  })

  test('a line without end is refused before it fills the memory', async () => {
    const queue = freshQueue()
    const ran = await shell(`head -c 50000000 /dev/zero | klieo-bus enqueue ${queue}`, { env })
    expect(ran.code).toBe(1)
    expect(ran.stderr).toContain('nothing was enqueued; line 1: it is larger than')
  })

  test('standard input that is a directory is no empty file', async () => {
    const ran = await shell(`klieo-bus enqueue ${freshQueue()} < /tmp`, { env })
    expect(ran.code).toBe(2)
    expect(complaint(ran)).toBe('standard input is a directory')
  })

  test('a connection that is lost in the middle leaves one batch of which nobody knows, and the message says which lines', async () => {
    const queue = freshQueue()
    await using child = start(['enqueue', queue, '--batch', '2'], { env, input: 'a\nb\n' })
    await eventually(async () => (await peek(queue)) === 2)
    await using blocker = await session(databaseUrl())
    await blocker.query('begin')
    await blocker.query(`lock table "${schema}".jobs in share mode`)
    child.write('c\nd\n')
    await eventually(async () => {
      const { rows } = await blocker.query('select pg_terminate_backend(pid) from pg_stat_activity where $1 = any(pg_blocking_pids(pid))', [
        blocker.pid,
      ])
      return rows.length > 0
    })
    expect(await child.exited).toMatchObject({ code: 1 })
    await blocker.query('rollback')
    expect(child.stderr).toMatch(/^klieo-bus: 2 of the lines were enqueued; of lines 3 to 4 either all or none were: .*\[connection\]\n$/)
    expect(await payloads(queue)).toEqual(['a', 'b'])
  })

  test('Ctrl-C enqueues what was read and says how much that is', async () => {
    const queue = freshQueue()
    await using child = start(['enqueue', queue, '--batch', '2'], { env, input: 'a\nb\nc\n' })
    await eventually(async () => (await peek(queue)) === 2)
    child.interruptGroup()
    expect(await child.exited).toMatchObject({ code: 130 })
    expect(child.stderr).toBe('klieo-bus: interrupted; 3 of the lines were enqueued\n')
    expect(await payloads(queue)).toEqual(['a', 'b', 'c'])
  })
})

/** How many jobs there are, without claiming them. */
async function peek(queue: string): Promise<number> {
  const { default: pg } = await import('pg')
  const client = new pg.Client({ connectionString: databaseUrl() })
  await client.connect()
  try {
    const { rows } = await client.query<{ n: number }>(`select count(*)::int as n from "${schema}".job_details where queue = $1`, [queue])
    return rows[0]!.n
  } finally {
    await client.end()
  }
}

async function job(
  id: string,
): Promise<{ state: string; last_error: string | null; attempts: number; worker_id: string | null } | undefined> {
  const { default: pg } = await import('pg')
  const client = new pg.Client({ connectionString: databaseUrl() })
  await client.connect()
  try {
    const { rows } = await client.query(`select state, last_error, attempts, worker_id from "${schema}".job_details where id = $1`, [id])
    return rows[0]
  } finally {
    await client.end()
  }
}

describe('work', () => {
  test('runs a command for each job, with the payload on standard input, and acks what ends with 0', async () => {
    const queue = freshQueue()
    await bus.jobs.enqueueMany(queue, [{ payload: 'a\n' }, { payload: 'b\n' }])
    const ran = await shell(`klieo-bus work ${queue} --exec 'cat' --until-empty`, { env })
    expect(ran).toMatchObject({ code: 0, stdout: 'a\nb\n', stderr: '' })
    expect(await peek(queue)).toBe(0)
  })

  test('tells the command which job it is, and its headers', async () => {
    const queue = freshQueue()
    const id = await bus.jobs.enqueue(queue, {
      payload: '',
      headers: { 'trace-id': 'abc', 'Trace-Id': 'other', PATH: 'harmless' },
      maxAttempts: 3,
    })
    const line =
      'echo "$KLIEO_QUEUE $KLIEO_JOB_ID $KLIEO_ATTEMPT $KLIEO_MAX_ATTEMPTS $KLIEO_HEADER_PATH $KLIEO_HEADERS"; test "$KLIEO_FENCE" -gt 0'
    const { stdout } = await klieo(['work', queue, '--exec', line, '--until-empty'], { env })
    const [head, json] = [stdout.slice(0, stdout.indexOf('{')), stdout.slice(stdout.indexOf('{'))]
    expect(head).toBe(`${queue} ${id} 1 3 harmless `)
    expect(JSON.parse(json)).toEqual({ 'trace-id': 'abc', 'Trace-Id': 'other', PATH: 'harmless' })
  })

  test('keeps the end of what a failed command wrote on standard error, and gives the job back', async () => {
    const queue = freshQueue()
    const id = await bus.jobs.enqueue(queue, { payload: 'x' })
    const ran = await klieo(['work', queue, '--exec', 'echo no such customer >&2; exit 3', '--count', '1'], { env })
    expect(ran.code).toBe(0)
    expect(ran.stderr).toBe(`no such customer\nklieo-bus: job ${id}, attempt 1 of 5: exit code 3\n`)
    expect(await job(id)).toMatchObject({ state: 'scheduled', attempts: 1, last_error: 'exit code 3: no such customer' })
  })

  test('J4 a job whose command fails at the last attempt is dead', async () => {
    const queue = freshQueue()
    const id = await bus.jobs.enqueue(queue, { payload: 'x', maxAttempts: 1 })
    const { objects } = await klieo(['work', queue, '--exec', 'kill -9 $$', '--until-empty', '--json'], { env })
    expect(objects).toEqual([{ queue, id, attempt: 1, outcome: 'failed', exitCode: null, ms: expect.any(Number) }])
    expect(await job(id)).toMatchObject({ state: 'dead', last_error: 'ended by SIGKILL' })
  })

  test('--json is an object for each job, and what the command prints goes to standard error', async () => {
    const queue = freshQueue()
    const id = await bus.jobs.enqueue(queue, { payload: 'hello' })
    const ran = await klieo(['work', queue, '--exec', 'cat', '--until-empty', '--json'], { env })
    expect(ran.objects).toEqual([{ queue, id, attempt: 1, outcome: 'acked', exitCode: 0, ms: expect.any(Number) }])
    expect(ran.stderr).toBe('hello')
  })

  test('--concurrency runs so many at once', async () => {
    const queue = freshQueue()
    await using place = await directory()
    await bus.jobs.enqueueMany(
      queue,
      ['1', '2', '3'].map((payload) => ({ payload })),
    )
    // Each waits for the other two.
    const line = `touch ${place.path}/$KLIEO_JOB_ID; until [ $(ls ${place.path} | wc -l) -eq 3 ]; do sleep 0.02; done; cat`
    const ran = await klieo(['work', queue, '-c', '3', '--exec', line, '--until-empty'], { env })
    expect([...ran.stdout].sort()).toEqual(['1', '2', '3'])
  })

  test('J8 --count does so many with more places than that, and complains of nothing', async () => {
    const queue = freshQueue()
    await bus.jobs.enqueueMany(
      queue,
      Array.from({ length: 10 }, () => ({ payload: '' })),
    )
    const ran = await klieo(['work', queue, '--exec', 'echo done', '-c', '4', '--count', '6'], { env })
    expect(ran).toMatchObject({ code: 0, stdout: 'done\n'.repeat(6), stderr: '' })
    expect(await payloads(queue)).toHaveLength(4)
  })

  test('a command that reads nothing, and one that leaves a child behind, are done when they end', async () => {
    const queue = freshQueue()
    await bus.jobs.enqueue(queue, { payload: new Uint8Array(900_000) })
    const ran = await klieo(['work', queue, '--exec', 'sleep 30 & true', '--until-empty'], { env })
    expect(ran.code).toBe(0)
    expect(await peek(queue)).toBe(0)
  }, 15_000)

  test('J3 killed with SIGKILL in the middle of a job, the job comes back', async () => {
    const queue = freshQueue()
    const id = await bus.jobs.enqueue(queue, { payload: 'precious' })
    await using first = start(['work', queue, '--exec', 'echo begun; sleep 20', '--lease', '1s', '--worker-id', 'doomed'], { env })
    await first.next(text('begun'))
    expect(await job(id)).toMatchObject({ state: 'running', worker_id: 'doomed' })
    await first.kill('SIGKILL')
    const second = await klieo(['work', queue, '--exec', 'cat; echo " $KLIEO_ATTEMPT"', '--count', '1'], { env })
    expect(second.stdout).toBe('precious 2\n')
    expect(await job(id)).toBeUndefined()
  })

  test('the first Ctrl-C lets running commands end and claims no more', async () => {
    const queue = freshQueue()
    await using place = await directory()
    await bus.jobs.enqueueMany(queue, [{ payload: 'one' }, { payload: 'two' }])
    const line = `echo begun; until [ -e ${place.path}/go ]; do sleep 0.02; done; cat; echo`
    await using child = start(['work', queue, '--exec', line], { env })
    await child.next(text('begun'))
    child.interruptGroup()
    await writeFile(join(place.path, 'go'), '')
    await child.next(text('one'))
    expect(await child.exited).toEqual({ code: 0, signal: null })
    expect(child.unread()).toEqual([])
    expect(await payloads(queue)).toEqual(['two'])
  })

  test('the second Ctrl-C kills running commands, and their jobs go back at once', async () => {
    const queue = freshQueue()
    const id = await bus.jobs.enqueue(queue, { payload: 'one' })
    await using place = await directory()
    const line = `trap '' TERM INT; echo $$ > ${place.path}/pid; echo begun; while :; do sleep 0.05; done`
    await using child = start(['work', queue, '--exec', line], { env })
    await child.next(text('begun'))
    const pid = Number(await readFile(join(place.path, 'pid'), 'utf8'))
    child.interruptGroup()
    let exit: Exit | undefined
    void child.exited.then((value) => {
      exit = value
    })
    // Two that come close together may arrive as one.
    await eventually(
      () => {
        if (exit === undefined) child.interruptGroup()
        return exit !== undefined
      },
      { everyMs: 300 },
    )
    expect(exit).toEqual({ code: 130, signal: null })
    await eventually(() => expect(() => process.kill(pid, 0)).toThrow())
    expect(await job(id)).toMatchObject({ state: 'ready', attempts: 1 })
  })

  test('--grace ends the waiting: the commands are told to stop', async () => {
    const queue = freshQueue()
    const id = await bus.jobs.enqueue(queue, { payload: 'one' })
    const line = 'trap "echo told; exit 1" TERM; echo begun; while :; do sleep 0.02; done'
    await using child = start(['work', queue, '--exec', line, '--grace', '100ms'], { env })
    await child.next(text('begun'))
    child.signal('SIGTERM')
    await child.next(text('told'))
    expect(await child.exited).toMatchObject({ code: 0 })
    expect(await job(id)).toMatchObject({ state: expect.stringMatching(/ready|scheduled/) })
  })

  test('ends quietly when nobody reads what the commands print', async () => {
    const queue = freshQueue()
    await bus.jobs.enqueueMany(
      queue,
      Array.from({ length: 50 }, (_, at) => ({ payload: `${at}\n` })),
    )
    const ran = await shell(`klieo-bus work ${queue} --exec 'cat' --until-empty | head -n 1; echo "\${PIPESTATUS[0]}"`, { env })
    expect(ran).toMatchObject({ stdout: '0\n0\n', stderr: '' })
  })
})
