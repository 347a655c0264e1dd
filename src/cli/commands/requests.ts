import { command } from '../command.ts'
import { exec, failureOf, headerVariables } from '../exec.ts'
import { EXIT, Failure, isBusFailure } from '../failure.ts'
import { aborted, Interrupts } from '../interrupts.ts'
import { HEADER_OPTION, MAX_PAYLOAD_OPTION, PAYLOAD_ARGUMENT, payloadOf, writeBytes } from '../payload.ts'
import { number, payloadFields } from '../text.ts'
import { headersOf } from '../values.ts'

const request = command({
  name: 'request',
  summary: 'ask a responder and print its reply',
  arguments: { subject: { description: 'what is asked: price.tea' }, payload: PAYLOAD_ARGUMENT },
  options: {
    timeout: { type: 'duration', short: 't', value: 'TIME', description: 'how long to wait for the reply', default: '5s' },
    ...HEADER_OPTION,
    ...MAX_PAYLOAD_OPTION,
  },
  examples: [{ line: "klieo-bus request price.tea '' --timeout 2s", says: 'prints the reply, byte for byte' }],
  exitCodes: { 3: 'no live responder', 6: 'responders are there, but no reply came in time' },
  async run({ args, options }, session) {
    const maxPayloadBytes = options['max-payload']
    const payload = await payloadOf(args.payload, maxPayloadBytes)
    const headers = headersOf(options.header)
    const bus = await session.connect({ maxPayloadBytes })
    const reply = await bus.requestReply.request(args.subject, payload, {
      timeoutMs: options.timeout,
      ...(headers === undefined ? {} : { headers }),
    })
    const { output } = session
    if (output.json) await output.object(payloadFields('reply', reply))
    else await writeBytes(output, reply)
    return EXIT.done
  },
})

const respond = command({
  name: 'respond',
  summary: 'answer requests with what a command prints',
  details:
    'The payload is on standard input of the command; what it prints is the reply. Another exit code than 0 fails the request, with what the command wrote last on standard error. A command is told to stop (SIGTERM) when nobody waits for its reply any more.',
  arguments: { filter: { description: "a subject; * is one token, a last > the rest: 'price.*'" } },
  options: {
    exec: {
      type: 'command',
      value: 'COMMAND',
      description: 'run for each request, with KLIEO_SUBJECT and headers in KLIEO_HEADER_*',
      required: true,
    },
    concurrency: { type: 'integer', value: 'N', description: 'commands at once', default: '16', least: 1, most: 1_000 },
    count: { type: 'integer', value: 'N', description: 'end after so many requests', least: 1 },
    ...MAX_PAYLOAD_OPTION,
  },
  examples: [{ line: "klieo-bus respond 'price.*' --exec 'grep \"$KLIEO_SUBJECT\" prices.txt'", says: 'answers until Ctrl-C' }],
  async run({ args, options }, session) {
    const { output } = session
    const maxPayloadBytes = options['max-payload']
    const bus = await session.connect({ maxPayloadBytes })
    using interrupts = new Interrupts()
    let left = options.count ?? Number.POSITIVE_INFINITY
    const responder = await bus.requestReply.respond(
      args.filter,
      async ({ subject, headers, payload, signal }) => {
        if (--left <= 0) interrupts.end()
        const unwanted = new AbortController()
        // It is aborted, too, when the responder closes: what runs then is let end.
        signal.addEventListener('abort', () => isBusFailure(signal.reason) && signal.reason.code === 'timeout' && unwanted.abort())
        const chunks: Buffer[] = []
        let size = 0
        const result = await exec({
          command: options.exec,
          input: payload,
          env: { KLIEO_SUBJECT: subject, ...headerVariables(headers) },
          stop: unwanted.signal,
          kill: interrupts.kill,
          async onOutput(chunk) {
            chunks.push(chunk)
            size += chunk.byteLength
            if (size > maxPayloadBytes) throw new Failure(EXIT.failed, `the reply is larger than ${number(maxPayloadBytes)} bytes`)
          },
          onError: (chunk) => void process.stderr.write(chunk),
        })
        const ok = result.code === 0
        if (output.json) await output.object({ subject, outcome: ok ? 'replied' : 'failed', exitCode: result.code })
        if (ok) return Buffer.concat(chunks)
        if (!unwanted.signal.aborted) output.warn(`request ${subject}: ${failureOf({ ...result, tail: '' })}`)
        throw new Failure(EXIT.failed, failureOf(result))
      },
      { concurrency: Math.min(options.concurrency, left) },
    )
    if (process.stderr.isTTY) output.note(output.styleError('dim', `answering ${args.filter}; Ctrl-C ends it`))
    await Promise.race([aborted(interrupts.drain), output.gone])
    await responder.close()
    return interrupts.kill.aborted ? EXIT.interrupted : EXIT.done
  },
})

export const COMMANDS = [request, respond]
