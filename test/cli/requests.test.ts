import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { isBusError, PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { eventually } from '../support/wait.ts'
import { build, complaint, klieo, start } from './command.ts'

const schema = freshSchema()
const env = { DATABASE_URL: databaseUrl(), KLIEO_SCHEMA: schema }
let bus: PostgresBus

beforeAll(async () => {
  await build()
  bus = await PostgresBus.connect({ connectionString: databaseUrl(), schema, maintenance: false })
}, 60_000)

afterAll(() => bus.close())

/** Asks until a responder is there. */
async function ask(subject: string, payload: string): Promise<string> {
  let reply: Promise<Uint8Array> | undefined
  await eventually(async () => {
    reply = bus.requestReply.request(subject, payload, { timeoutMs: 5_000 })
    return reply.then(
      () => true,
      (error: unknown) => !isBusError(error, 'not_found'),
    )
  })
  return Buffer.from(await reply!).toString()
}

describe('request', () => {
  test('prints the reply byte for byte, or as JSON', async () => {
    const responder = await bus.requestReply.respond(
      'echo',
      ({ payload, headers }) => `${Buffer.from(payload).toString()} ${headers.who ?? ''}`,
    )
    expect(await klieo(['request', 'echo', 'hello', '-H', 'who:ada'], { env })).toMatchObject({ code: 0, stdout: 'hello ada', stderr: '' })
    expect((await klieo(['request', 'echo', '--json'], { env, input: 'piped' })).objects).toEqual([{ reply: 'piped ' }])
    await responder.close()
  })

  test('R2 nobody there is exit code 3, no answer in time 6', async () => {
    const nobody = await klieo(['request', 'nobody', 'x'], { env })
    expect(nobody.code).toBe(3)
    expect(complaint(nobody)).toMatch(/\[not_found\]$/)
    const untilGone = (signal: AbortSignal) => new Promise<string>((resolve) => signal.addEventListener('abort', () => resolve('')))
    const responder = await bus.requestReply.respond('slow', ({ signal }) => untilGone(signal))
    const late = await klieo(['request', 'slow', 'x', '--timeout', '200ms'], { env })
    expect(late.code).toBe(6)
    expect(complaint(late)).toMatch(/\[timeout\]$/)
    await responder.close()
  })

  test('R3 a handler that failed is exit code 1, with what it said', async () => {
    const responder = await bus.requestReply.respond('bad', () => {
      throw new Error('out of tea')
    })
    const ran = await klieo(['request', 'bad', 'x'], { env })
    expect(ran.code).toBe(1)
    expect(complaint(ran)).toBe('out of tea [handler_failed]')
    await responder.close()
  })

  test('what a responder says of its failure does not reach the terminal raw', async () => {
    const responder = await bus.requestReply.respond('coloured', () => {
      throw new Error('out\u001b[2J of\n\u009btea\u0007')
    })
    const ran = await klieo(['request', 'coloured', ''], { env })
    expect(complaint(ran)).toBe('out\\u001b[2J of \\u009btea\\u0007 [handler_failed]')
    await responder.close()
  })
})

describe('respond', () => {
  test('R1 answers with what the command prints', async () => {
    await using child = start(['respond', 'price.*', '--exec', 'printf "%s for %s" "$(cat)" "$KLIEO_SUBJECT"'], { env })
    expect(await ask('price.tea', '999')).toBe('999 for price.tea')
    child.interruptGroup()
    expect(await child.exited).toEqual({ code: 0, signal: null })
    expect(child.stderr).toBe('')
  })

  test('R3 a command that fails fails the request, with the end of what it wrote on standard error', async () => {
    await using child = start(['respond', 'fails', '--exec', 'echo no tea >&2; exit 7', '--json'], { env })
    await expect(ask('fails', '')).rejects.toMatchObject({ code: 'handler_failed', message: 'exit code 7: no tea' })
    expect(await child.next()).toEqual({ subject: 'fails', outcome: 'failed', exitCode: 7 })
  })

  test('the first Ctrl-C lets a running command answer', async () => {
    await using child = start(['respond', 'drain', '--exec', 'echo begun >&2; sleep 0.5; echo answered'], { env })
    await ask('drain', '')
    const asked = bus.requestReply.request('drain', '', { timeoutMs: 5_000 })
    await eventually(() => child.stderr === 'begun\nbegun\n')
    child.interruptGroup()
    expect(Buffer.from(await asked).toString()).toBe('answered\n')
    expect(await child.exited).toEqual({ code: 0, signal: null })
  })

  test('R4 a command whose requester has gone is told to stop', async () => {
    const line = 'trap "echo told >&2; exit 1" TERM; for i in $(seq 200); do sleep 0.02; done; echo late'
    await using child = start(['respond', 'gone', '--exec', line], { env })
    await eventually(async () =>
      bus.requestReply.request('gone', '', { timeoutMs: 300 }).then(
        () => false,
        (error) => isBusError(error, 'timeout'),
      ),
    )
    await eventually(() => child.stderr.includes('told'))
  })

  test('--count ends after so many requests', async () => {
    await using child = start(['respond', 'twice', '--exec', 'cat', '--count', '2'], { env })
    expect(await ask('twice', 'a')).toBe('a')
    expect(await ask('twice', 'b')).toBe('b')
    expect(await child.exited).toEqual({ code: 0, signal: null })
  })
})
