import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import type { Exit } from '../support/child.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { build, complaint, directory, klieo, start, text } from './command.ts'

const schema = freshSchema()
const env = { DATABASE_URL: databaseUrl(), KLIEO_SCHEMA: schema }
let bus: PostgresBus
let names = 0
const fresh = (what: string) => `${what}${++names}`

beforeAll(async () => {
  await build()
  bus = await PostgresBus.connect({ connectionString: databaseUrl(), schema, maintenance: false })
}, 60_000)

afterAll(() => bus.close())

describe('kv', () => {
  test('K1 put, get and delete', async () => {
    const bucket = fresh('bucket')
    const put = await klieo(['kv', 'put', bucket, 'a.b', 'dark'], { env })
    expect(put).toMatchObject({ code: 0, stderr: '', stdout: expect.stringMatching(/^revision \d+\n$/) })
    expect(await klieo(['kv', 'get', bucket, 'a.b'], { env })).toMatchObject({ code: 0, stdout: 'dark', stderr: '' })
    expect((await klieo(['kv', 'get', bucket, 'a.b', '--revision'], { env })).stdout).toBe(put.stdout.replace('revision ', ''))
    expect((await klieo(['kv', 'get', bucket, 'a.b', '--json'], { env })).objects).toEqual([
      { bucket, key: 'a.b', revision: Number(put.stdout.slice(9)), updatedAt: expect.stringMatching(/Z$/), value: 'dark' },
    ])
    expect((await klieo(['kv', 'delete', bucket, 'a.b'], { env })).stdout).toBe('key "a.b" is absent\n')
    const absent = await klieo(['kv', 'get', bucket, 'a.b'], { env })
    expect(absent).toMatchObject({ code: 3, stdout: '' })
    expect(complaint(absent)).toBe(`bucket "${bucket}" has no key "a.b"`)
  })

  test('a value comes from standard input byte for byte, and ends with its ttl', async () => {
    const bucket = fresh('bucket')
    const bytes = Buffer.from([0, 255, 10])
    const { objects } = await klieo(['kv', 'put', bucket, 'k', '--ttl', '500ms', '--json'], { env, input: bytes })
    expect(objects).toEqual([{ bucket, key: 'k', revision: expect.any(Number) }])
    await eventually(async () => (await bus.kv.get(bucket, 'k')) === null)
    await klieo(['kv', 'put', bucket, 'k', '-'], { env, input: bytes })
    expect((await klieo(['kv', 'get', bucket, 'k', '--json'], { env })).objects[0]).toMatchObject({ valueBase64: bytes.toString('base64') })
  })

  test('K2 cas writes only what is as expected; else exit code 4', async () => {
    const bucket = fresh('bucket')
    const cas = (value: string, expected: string) => klieo(['kv', 'cas', bucket, 'k', value, '--expected', expected], { env })
    const first = await cas('one', 'absent')
    expect(first.code).toBe(0)
    const lost = await cas('two', 'absent')
    expect(lost.code).toBe(4)
    expect(complaint(lost)).toMatch(/^key "k" was expected to be absent, but it is at revision \d+.*\[cas_conflict\]$/)
    expect((await cas('two', first.stdout.slice(9).trim())).code).toBe(0)
    expect(complaint(await cas('three', 'latest'))).toContain('--expected (if not "absent") is an integer')
    const stale = await klieo(['kv', 'delete', bucket, 'k', '--expected', '1'], { env })
    expect(stale.code).toBe(4)
    expect((await klieo(['kv', 'get', bucket, 'k'], { env })).stdout).toBe('two')
  })

  test('ls shows the buckets, and the keys of one', async () => {
    const bucket = fresh('bucket')
    for (const key of ['a.one', 'a.two', 'b']) await bus.kv.put(bucket, key, '12345')
    expect((await klieo(['kv', 'ls', bucket, 'a.*'], { env })).stdout.split('\n').sort()).toEqual(['', 'a.one', 'a.two'])
    expect((await klieo(['kv', 'ls', bucket, '--json'], { env })).objects).toHaveLength(3)
    const { stdout } = await klieo(['kv', 'ls'], { env })
    expect(stdout).toMatch(new RegExp(`^${bucket} +3 +15 B$`, 'm'))
    expect((await klieo(['kv', 'ls', '--json'], { env })).objects).toContainEqual({ bucket, keys: 3, bytes: 15 })
  })

  test('K6 watch shows what is there, then every change, until Ctrl-C', async () => {
    const bucket = fresh('bucket')
    await bus.kv.put(bucket, 'a', 'one')
    await using child = start(['kv', 'watch', bucket, '--json'], { env })
    expect(await child.next()).toMatchObject({ operation: 'put', key: 'a', value: 'one' })
    await bus.kv.delete(bucket, 'a')
    expect(await child.next()).toEqual({ operation: 'delete', key: 'a', revision: expect.any(Number) })
    child.interruptGroup()
    expect(await child.exited).toEqual({ code: 0, signal: null })
    await bus.kv.put(bucket, 'b', 'two')
    expect((await klieo(['kv', 'watch', bucket, '--count', '1'], { env })).stdout).toMatch(/^put b @\d+ two\n$/)
  })
})

describe('kv lease', () => {
  const leaseArgs = (key: string, exec: string) => ['kv', 'lease', 'locks', key, '--exec', exec]

  test('K5 runs the command with the fence, and ends with its exit code', async () => {
    const key = fresh('key')
    const first = await klieo(leaseArgs(key, 'echo $KLIEO_FENCE $KLIEO_BUCKET $KLIEO_KEY; exit 7'), { env })
    const second = await klieo(leaseArgs(key, 'cat; echo $KLIEO_FENCE'), { env, input: 'in ' })
    expect(first).toMatchObject({ code: 7, stderr: '', stdout: expect.stringMatching(new RegExp(`^\\d+ locks ${key}\n$`)) })
    expect(second.code).toBe(0)
    expect(Number(second.stdout.replace('in ', ''))).toBeGreaterThan(Number(first.stdout.split(' ')[0]))
    expect((await klieo(leaseArgs(key, 'kill -9 $$'), { env })).code).toBe(137)
  })

  test('K5 keeps the lease while the command runs, and somebody else is refused with 123', async () => {
    const key = fresh('key')
    await using place = await directory()
    const line = `echo begun; until [ -e ${place.path}/go ]; do sleep 0.05; done`
    await using holder = start([...leaseArgs(key, line), '--ttl', '1s'], { env })
    await holder.next(text('begun'))
    await new Promise((resolve) => setTimeout(resolve, 1_500))
    const refused = await klieo(leaseArgs(key, 'echo never'), { env })
    expect(refused).toMatchObject({ code: 123, stdout: '' })
    expect(complaint(refused)).toMatch(/\[lease_held\]$/)
    await using waiting = start([...leaseArgs(key, 'echo at last'), '--wait', '20s'], { env })
    holder.signal('SIGKILL')
    await waiting.next(text('at last'))
    expect(await waiting.exited).toEqual({ code: 0, signal: null })
    // What the dead holder ran goes on by itself, until it learns of it.
    await writeFile(join(place.path, 'go'), '')
  })

  test('K5 when the lease is lost the command is told, and the exit code is 124', async () => {
    const key = fresh('key')
    const line = 'trap "echo told; exit 0" TERM; echo begun; while :; do sleep 0.05; done'
    await using holder = start([...leaseArgs(key, line), '--ttl', '1s'], { env })
    await holder.next(text('begun'))
    await using server = await session(databaseUrl())
    // As if the server had been out of reach for longer than the ttl.
    await server.query(`update "${schema}".kv_leases set expires_at = clock_timestamp() - interval '1 s' where key = $1`, [key])
    await holder.next(text('told'))
    expect(await holder.exited).toEqual({ code: 124, signal: null })
    expect(holder.stderr).toMatch(/klieo-bus: the lease on "key\d+" was lost while the command ran \[lease_lost\]\n$/)
  })

  test('Ctrl-C and SIGTERM go to the command, and the lease is released when it has ended', async () => {
    const key = fresh('key')
    for (const signal of ['SIGINT', 'SIGTERM'] as const) {
      await using holder = start(leaseArgs(key, `trap "echo told; exit 3" ${signal.slice(3)}; echo begun; while :; do sleep 0.05; done`), {
        env,
      })
      await holder.next(text('begun'))
      holder.signal(signal)
      await holder.next(text('told'))
      expect(await holder.exited).toEqual({ code: 3, signal: null })
    }
    expect((await klieo(leaseArgs(key, 'true'), { env })).code).toBe(0)
  })

  test('K5 a lost lease and SIGTERM reach what a shell of the command has started', async () => {
    const key = fresh('key')
    for (const lost of [true, false]) {
      // The shell ends with the signal; its child, left alone, would work on without a lease.
      const line = `bash -c 'trap "echo told; exit 0" TERM; echo begun; while :; do sleep 0.05; done'; true`
      await using holder = start([...leaseArgs(key, line), '--ttl', '1s'], { env })
      await holder.next(text('begun'))
      await using server = await session(databaseUrl())
      if (lost) {
        await server.query(`update "${schema}".kv_leases set expires_at = clock_timestamp() - interval '1 s' where key = $1`, [key])
      } else holder.signal('SIGTERM')
      await holder.next(text('told'))
      await holder.exited
    }
  })

  test('the second Ctrl-C ends it, too, where the release waits for a server that does not answer', async () => {
    const key = fresh('key')
    await using place = await directory()
    await using holder = start(leaseArgs(key, `echo begun; until [ -e ${place.path}/go ]; do sleep 0.05; done; echo ended`), { env })
    await holder.next(text('begun'))
    await using server = await session(databaseUrl())
    await server.query('begin')
    await server.query(`select from "${schema}".kv_leases where key = $1 for update`, [key])
    await writeFile(join(place.path, 'go'), '')
    await holder.next(text('ended'))
    let end: Exit | undefined
    void holder.exited.then((exit) => {
      end = exit
    })
    // The first ones may come while the shell is still ending.
    await eventually(() => {
      if (end === undefined) holder.signal('SIGINT')
      return end !== undefined
    })
    expect(end?.code).toBe(130)
  })

  test('--json is an object, and what the command prints goes to standard error', async () => {
    const key = fresh('key')
    const ran = await klieo([...leaseArgs(key, 'echo hello; exit 7'), '--json'], { env })
    expect(ran.objects).toEqual([{ bucket: 'locks', key, fence: expect.any(Number), exitCode: 7 }])
    expect(ran).toMatchObject({ code: 7, stderr: 'hello\n' })
  })

  test('no lease for another reason is 125, wrong usage 2', async () => {
    const unreachable = await klieo(leaseArgs('k', 'true'), { env: { DATABASE_URL: 'postgres://127.0.0.1:1/none' } })
    expect(unreachable.code).toBe(125)
    expect(complaint(unreachable)).toContain('[connection]')
    expect((await klieo(['kv', 'lease', 'locks', 'no key', '--exec', 'true'], { env })).code).toBe(2)
  })
})
