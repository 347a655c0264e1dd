import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { eventually } from '../support/wait.ts'
import { build, complaint, klieo, shell, start, text } from './command.ts'

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

describe('publish', () => {
  test('P1 publishes an argument, with headers', async () => {
    const subject = fresh('subject')
    const ran = await klieo(['publish', subject, 'hello', '-H', 'trace:abc'], { env })
    expect(ran).toMatchObject({ code: 0, stderr: '', stdout: expect.stringMatching(/^published message \d+\n$/) })
    await using stream = await bus.pubsub.subscribe(subject, fresh('d'))
    for await (const message of stream) {
      expect(Buffer.from(message.payload).toString()).toBe('hello')
      expect(message.headers).toEqual({ trace: 'abc' })
      break
    }
  })

  test('publishes standard input byte for byte, where there is no argument or it is -', async () => {
    const subject = fresh('subject')
    const bytes = new Uint8Array([0, 255, 10, 13, 10])
    for (const args of [[], ['-']]) expect((await klieo(['publish', subject, ...args], { env, input: bytes })).code).toBe(0)
    await using stream = await bus.pubsub.subscribe(subject, fresh('d'))
    let seen = 0
    for await (const message of stream) {
      expect([...message.payload]).toEqual([...bytes])
      if (++seen === 2) break
    }
  })

  test('P12 --msg-id stores a second one once, and --json says so', async () => {
    const subject = fresh('subject')
    const args = ['publish', subject, 'x', '--msg-id', fresh('id'), '--json']
    const [first] = (await klieo(args, { env })).objects
    expect(first).toEqual({ seq: expect.any(Number), duplicate: false })
    expect((await klieo(args, { env })).objects).toEqual([{ ...first, duplicate: true }])
  })

  test('a subject that is none, and too much on standard input, are told in a sentence', async () => {
    const wrong = await klieo(['publish', 'a..b', 'x'], { env })
    expect(wrong.code).toBe(2)
    expect(complaint(wrong)).toMatch(/^subject .*\[invalid_argument\]$/)
    const large = await shell('head -c 2000000 /dev/zero | klieo-bus publish a', { env })
    expect(large.code).toBe(1)
    expect(large.stderr).toMatch(/^klieo-bus: standard input holds more than 1,048,576 bytes.*\n$/)
  })
})

describe('subscribe', () => {
  test('P4 with a durable shows what came before, acknowledges it, and goes on from there', async () => {
    const subject = fresh('subject')
    const durable = fresh('durable')
    await bus.pubsub.publish(subject, 'one', { headers: { trace: 'abc' } })
    await bus.pubsub.publish(subject, 'two\nlines')
    const first = await klieo(['subscribe', subject, '--durable', durable, '--count', '1'], { env })
    expect(first).toMatchObject({
      code: 0,
      stderr: '',
      stdout: expect.stringMatching(new RegExp(`^#\\d+ ${subject} \\(trace:abc\\) one\\n$`)),
    })
    const second = await klieo(['subscribe', subject, '--durable', durable, '--count', '1', '--json'], { env })
    expect(second.objects).toEqual([
      { seq: expect.any(Number), subject, attempt: 1, publishedAt: expect.stringMatching(/Z$/), headers: {}, payload: 'two\nlines' },
    ])
  })

  test('without one begins with what is new, and leaves nothing behind', async () => {
    const subject = fresh('subject')
    await bus.pubsub.publish(subject, 'old')
    await using child = start(['subscribe', subject, '--raw'], { env })
    await eventually(async () => (await durables()).length === 1)
    await bus.pubsub.publish(subject, 'new')
    await child.next(text('new'))
    child.interruptGroup()
    expect(await child.exited).toEqual({ code: 0, signal: null })
    expect(child.unread()).toEqual([])
    expect(await durables()).toEqual([])
  })

  test('bytes that are no text are base64 in JSON, and told apart from text for people', async () => {
    const subject = fresh('subject')
    await bus.pubsub.publish(subject, new Uint8Array([0xff, 0xfe]))
    await bus.pubsub.publish(subject, 'a\x1b[31mred')
    const args = ['subscribe', subject, '--count', '2']
    expect((await klieo([...args, '--durable', fresh('d'), '--json'], { env })).objects[0]).toMatchObject({ payloadBase64: '//4=' })
    const { stdout } = await klieo([...args, '--durable', fresh('d')], { env })
    expect(stdout).toContain('(2 bytes that are no text)')
    expect(stdout).toContain('a\\u001b[31mred')
  })

  test('P5 --exec acks what ends with 0 and has the rest delivered again', async () => {
    const subject = fresh('subject')
    await bus.pubsub.publish(subject, 'payload', { headers: { 'x-y': 'z' } })
    const line = 'echo "$KLIEO_SUBJECT $KLIEO_ATTEMPT $KLIEO_DURABLE $KLIEO_HEADER_X_Y $(cat)"; test $KLIEO_ATTEMPT -gt 1'
    const durable = fresh('durable')
    const args = ['subscribe', subject, '--durable', durable, '--exec', line, '--retry-delay', '10ms', '--count', '2']
    const ran = await klieo(args, { env })
    expect(ran.code).toBe(0)
    expect(ran.stdout).toBe(`${subject} 1 ${durable} z payload\n${subject} 2 ${durable} z payload\n`)
    expect(ran.stderr).toMatch(/^klieo-bus: message \d+, attempt 1: exit code 1; it is delivered again\n$/)
    expect((await klieo(['subscribe', subject, '--durable', durable, '--idle', '300ms'], { env })).stdout).toBe('')
  })

  test('headers that are larger as JSON than a variable can be do not keep the command from running', async () => {
    const subject = fresh('subject')
    const durable = fresh('durable')
    // A control character takes six bytes there, the other one three anyway.
    await bus.pubsub.publish(subject, 'x', { headers: { big: '\u0001'.repeat(13_700) + '€'.repeat(17_200), small: 'y' } })
    const line = 'echo "$KLIEO_HEADER_SMALL $(printenv KLIEO_HEADERS || echo none)"'
    const ran = await klieo(['subscribe', subject, '--durable', durable, '--exec', line, '--count', '1'], { env })
    expect(ran).toMatchObject({ code: 0, stdout: 'y none\n', stderr: '' })
  })

  test('P7 a command that takes longer than the ack wait keeps its message', async () => {
    const subject = fresh('subject')
    await bus.pubsub.publish(subject, 'slow')
    const args = ['subscribe', subject, '--durable', fresh('d'), '--ack-wait', '300ms', '--exec', 'sleep 1; cat; echo " $KLIEO_ATTEMPT"']
    expect((await klieo([...args, '--idle', '3s'], { env })).stdout).toBe('slow 1\n')
  })

  test('the first Ctrl-C lets a running command end and acknowledges its message', async () => {
    const subject = fresh('subject')
    const durable = fresh('durable')
    await bus.pubsub.publish(subject, 'one')
    await bus.pubsub.publish(subject, 'two')
    await using child = start(['subscribe', subject, '--durable', durable, '--exec', 'echo begun; sleep 0.5; cat; echo'], { env })
    await child.next(text('begun'))
    child.interruptGroup()
    await child.next(text('one'))
    expect(await child.exited).toEqual({ code: 0, signal: null })
    expect((await klieo(['subscribe', subject, '--durable', durable, '--count', '1', '--raw'], { env })).stdout).toBe('two\n')
  })

  test('ends quietly when nobody reads it any more', async () => {
    const subject = fresh('subject')
    await bus.pubsub.publishMany(Array.from({ length: 200 }, (_, at) => ({ subject, payload: `${at} ${'x'.repeat(1_000)}` })))
    const line = `klieo-bus subscribe ${subject} --durable ${fresh('d')} --raw | head -n 1 | cut -c 1-3; echo "\${PIPESTATUS[0]}"`
    expect(await shell(line, { env })).toMatchObject({ stdout: '0 x\n0\n', stderr: '' })
  })

  test('P11 another filter for a durable that exists is refused', async () => {
    const durable = fresh('durable')
    await klieo(['subscribe', 'one.*', '--durable', durable, '--idle', '1ms'], { env })
    const ran = await klieo(['subscribe', 'other.*', '--durable', durable], { env })
    expect(ran.code).toBe(4)
    expect(complaint(ran)).toMatch(/\[conflict\]$/)
  })
})

async function durables(): Promise<string[]> {
  const { default: pg } = await import('pg')
  const client = new pg.Client({ connectionString: databaseUrl() })
  await client.connect()
  try {
    const { rows } = await client.query<{ durable: string }>(`select durable from "${schema}".consumer_stats where durable like 'cli-%'`)
    return rows.map(({ durable }) => durable)
  } finally {
    await client.end()
  }
}
