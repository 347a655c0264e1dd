/** Request/reply: R1 to R4. */

import assert from 'node:assert/strict'
import type { Request } from '../../core/types.ts'
import {
  eventually,
  fastest,
  ODD_HEADERS,
  oddPayloads,
  pause,
  QUIET_MS,
  rejects,
  type Suite,
  sameBytes,
  sameHeaders,
  TICK_MS,
  text,
  timed,
  unique,
  withinASecond,
} from './kit.ts'

/** Long enough that only a failure uses it up. */
const AMPLE = { timeoutMs: 8_000 }

/** A promise one opens from outside: what a handler waits behind. */
function gate(): { readonly open: () => void; readonly opened: Promise<void> } {
  const { promise, resolve } = Promise.withResolvers<void>()
  return { open: () => resolve(), opened: promise }
}

export function requestReplyTests<Tx>(suite: Suite<Tx>): void {
  suite.group('request/reply', () => {
    suite.test('R1 a live responder answers, and sees subject, payload and headers of the request', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = `${unique('r')}.x`
      let seen: Request | undefined
      await bus.requestReply.respond(subject, async (request) => {
        seen = request
        return `${text(request.payload)}!`
      })
      for (const requester of [bus, other]) {
        const reply = await requester.requestReply.request(subject, 'hello', { ...AMPLE, headers: ODD_HEADERS })
        sameBytes(reply, 'hello!')
        assert.equal(seen?.subject, subject)
        sameBytes(seen!.payload, 'hello')
        sameHeaders(seen!.headers, ODD_HEADERS)
        assert.ok(seen!.signal instanceof AbortSignal)
      }
    })

    suite.test('R1 payloads go and come back byte for byte; an empty reply is legal', async (stage) => {
      const bus = await stage.open()
      const subject = unique('r')
      await bus.requestReply.respond(subject, ({ payload }) => payload)
      for (const { payload, bytes } of oddPayloads()) sameBytes(await bus.requestReply.request(subject, payload, AMPLE), bytes)
    })

    suite.test('R1 replies of every kind arrive, from handlers of every kind', async (stage) => {
      const bus = await stage.open()
      const subject = unique('r')
      const replies = oddPayloads()
      await bus.requestReply.respond(`${subject}.now`, ({ payload }) => replies[Number(text(payload))]!.payload)
      await bus.requestReply.respond(`${subject}.later`, async ({ payload }) => {
        await pause(5)
        return replies[Number(text(payload))]!.payload
      })
      for (const [index, { bytes }] of replies.entries()) {
        sameBytes(await bus.requestReply.request(`${subject}.now`, `${index}`, AMPLE), bytes)
        sameBytes(await bus.requestReply.request(`${subject}.later`, `${index}`, AMPLE), bytes)
      }
    })

    suite.test('R1 a buffer may be reused as soon as request has returned its promise', async (stage) => {
      const bus = await stage.open()
      const subject = unique('r')
      await bus.requestReply.respond(subject, ({ payload }) => payload)
      const buffer = Uint8Array.of(1, 2, 3)
      const reply = bus.requestReply.request(subject, buffer, AMPLE)
      buffer.fill(0)
      sameBytes(await reply, Uint8Array.of(1, 2, 3))
    })

    suite.test('R1 responders may have wildcards', async (stage) => {
      const bus = await stage.open()
      const root = unique('r')
      await bus.requestReply.respond(`${root}.*.x`, () => 'star')
      await bus.requestReply.respond(`${root}.deep.>`, () => 'rest')
      sameBytes(await bus.requestReply.request(`${root}.a.x`, '', AMPLE), 'star')
      sameBytes(await bus.requestReply.request(`${root}.deep.a.b.c`, '', AMPLE), 'rest')
      for (const subject of [root, `${root}.a.y`, `${root}.a.x.x`, `${root}.deep`]) {
        await rejects(bus.requestReply.request(subject, '', AMPLE), 'not_found')
      }
    })

    suite.test('R1 of several responders one handles each request, and they share the load', async (stage) => {
      const buses = [await stage.open(), await stage.open()]
      const root = unique('r')
      const handled = new Map<string, number>()
      const counts = [0, 0, 0]
      const filters = [`${root}.x`, `${root}.*`, `${root}.>`]
      for (const [index, filter] of filters.entries()) {
        await buses[index % 2]!.requestReply.respond(
          filter,
          async ({ payload }) => {
            const name = text(payload)
            handled.set(name, (handled.get(name) ?? 0) + 1)
            counts[index]!++
            await pause(3)
            return name
          },
          { concurrency: 2 },
        )
      }
      const replies = await Promise.all(
        Array.from({ length: 90 }, async (_, index) => text(await buses[index % 2]!.requestReply.request(`${root}.x`, `${index}`, AMPLE))),
      )
      assert.deepEqual(
        replies,
        Array.from({ length: 90 }, (_, index) => `${index}`),
        'everyone got his own answer',
      )
      assert.ok([...handled.values()].every((times) => times === 1) && handled.size === 90)
      assert.ok(
        counts.every((count) => count > 0),
        `every responder had some: ${counts.join(', ')}`,
      )
    })

    suite.test('R1 a responder handles as many requests at once as its concurrency says', async (stage) => {
      const bus = await stage.open()
      const subject = unique('r')
      let [running, most] = [0, 0]
      const barrier = gate()
      await bus.requestReply.respond(
        subject,
        async () => {
          most = Math.max(most, ++running)
          await barrier.opened
          running--
          return ''
        },
        { concurrency: 3 },
      )
      const replies = Promise.all(Array.from({ length: 9 }, () => bus.requestReply.request(subject, '', AMPLE)))
      await eventually(async () => running === 3, 'three at once')
      await pause(150)
      barrier.open()
      await replies
      assert.equal(most, 3)
    })

    suite.test('R2 without a live responder the answer is not_found', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('r')
      await rejects(bus.requestReply.request(subject, '', AMPLE), 'not_found')
      const responder = await other.requestReply.respond(subject, () => 'here')
      sameBytes(await bus.requestReply.request(subject, '', AMPLE), 'here')
      await responder.close()
      await responder.close()
      await rejects(bus.requestReply.request(subject, '', AMPLE), 'not_found')
      await rejects(other.requestReply.request(subject, '', AMPLE), 'not_found')
    })

    suite.test('R2 a responder whose bus closed, or that was disposed of, is not live', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('r')
      {
        await using _responder = await bus.requestReply.respond(subject, () => 'here')
        sameBytes(await bus.requestReply.request(subject, '', AMPLE), 'here')
      }
      await rejects(bus.requestReply.request(subject, '', AMPLE), 'not_found')
      await other.requestReply.respond(subject, () => 'there')
      sameBytes(await bus.requestReply.request(subject, '', AMPLE), 'there')
      await other.close()
      await rejects(bus.requestReply.request(subject, '', AMPLE), 'not_found')
    })

    suite.test('R2 a durable on the subject is no responder', async (stage) => {
      const bus = await stage.open()
      const subject = unique('r')
      const { nothing } = await stage.subscribe(bus, subject, unique('d'))
      await rejects(bus.requestReply.request(subject, '', AMPLE), 'not_found')
      await nothing()
    })

    suite.test('R2 a responder that does not answer in time: timeout, after timeoutMs', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('r')
      const barrier = gate()
      stage.defer(barrier.open)
      await other.requestReply.respond(subject, async () => {
        await barrier.opened
        return 'late'
      })
      const ms = await timed(() => rejects(bus.requestReply.request(subject, '', { timeoutMs: 400 }), 'timeout'))
      assert.ok(ms >= 400 - TICK_MS && ms < 3_000, `took ${ms} ms`)
    })

    suite.test('R3 a handler that throws: handler_failed with its message, and no stack', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('r')
      const failures: Record<string, () => never | Promise<never>> = {
        sync: () => {
          throw new TypeError('sync: no such thing')
        },
        async: async () => {
          throw new Error('async: "quoted" 漢字')
        },
        text: () => {
          throw 'just text'
        },
      }
      await other.requestReply.respond(`${subject}.*`, (request) => failures[request.subject.slice(subject.length + 1)]!())
      for (const [kind, message] of [
        ['sync', 'sync: no such thing'],
        ['async', 'async: "quoted" 漢字'],
        ['text', 'just text'],
      ] as const) {
        const error = await rejects(bus.requestReply.request(`${subject}.${kind}`, '', AMPLE), 'handler_failed')
        assert.ok(error.message.includes(message), `"${error.message}" says "${message}"`)
        assert.ok(!/\n\s+at |request-reply/.test(error.message), 'no stack in the message')
        assert.ok(!/\n\s+at /.test(String(error.cause ?? '')), 'no stack in the cause')
      }
    })

    suite.test('R3 a responder goes on after a handler threw, whatever was thrown', async (stage) => {
      const bus = await stage.open()
      const subject = unique('r')
      const thrown: unknown[] = [new Error('one'), undefined, null, 0, {}, Object.create(null), Symbol('s')]
      await bus.requestReply.respond(
        subject,
        ({ payload }) => {
          if (payload.length === 0) return 'well'
          throw thrown[Number(text(payload))]
        },
        { concurrency: 1 },
      )
      for (const index of thrown.keys()) await rejects(bus.requestReply.request(subject, `${index}`, AMPLE), 'handler_failed')
      sameBytes(await bus.requestReply.request(subject, '', AMPLE), 'well')
    })

    suite.test('R3 a handler that returns no payload failed', async (stage) => {
      const bus = await stage.open()
      const subject = unique('r')
      await bus.requestReply.respond(subject, () => undefined as unknown as string)
      await rejects(bus.requestReply.request(subject, '', AMPLE), 'handler_failed')
    })

    suite.test('R4 a late reply is dropped and never reaches another request', async (stage) => {
      const bus = await stage.open()
      const subject = unique('r')
      const first = gate()
      let started = 0
      await bus.requestReply.respond(subject, async ({ payload }) => {
        started++
        if (text(payload) === 'first') await first.opened
        return `reply to ${text(payload)}`
      })
      // Long enough for it to have been started, on a busy machine too.
      await rejects(bus.requestReply.request(subject, 'first', { timeoutMs: 2_000 }), 'timeout')
      const second = bus.requestReply.request(subject, 'second', AMPLE)
      first.open()
      sameBytes(await second, 'reply to second')
      for (let count = 0; count < 5; count++) sameBytes(await bus.requestReply.request(subject, `${count}`, AMPLE), `reply to ${count}`)
      assert.equal(started, 7)
    })

    suite.test('R4 a request past its deadline is not started', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('r')
      const barrier = gate()
      const started: string[] = []
      await other.requestReply.respond(
        subject,
        async ({ payload }) => {
          started.push(text(payload))
          await barrier.opened
          return ''
        },
        { concurrency: 1 },
      )
      const first = bus.requestReply.request(subject, 'first', AMPLE)
      await eventually(async () => started.length === 1, 'the first request started')
      const beside = unique('r')
      await other.requestReply.respond(beside, () => '')
      const late = rejects(bus.requestReply.request(subject, 'late', { timeoutMs: 300 }), 'timeout')
      // Where the deadline is not counted from here but from the arrival, it is over so long after a later request has been answered.
      await bus.requestReply.request(beside, '', AMPLE)
      await Promise.all([late, pause(300 + QUIET_MS)])
      barrier.open()
      await first
      await bus.requestReply.request(subject, 'third', AMPLE)
      assert.deepEqual(started, ['first', 'third'])
    })

    suite.test('R4 the signal of the request is aborted at its deadline', async (stage) => {
      const bus = await stage.open()
      const subject = unique('r')
      const seen = Promise.withResolvers<AbortSignal>()
      await bus.requestReply.respond(subject, async ({ signal }) => {
        seen.resolve(signal)
        await new Promise<void>((resolve) => signal.addEventListener('abort', () => resolve(), { once: true }))
        return ''
      })
      const asked = performance.now()
      await rejects(bus.requestReply.request(subject, '', { timeoutMs: 400 }), 'timeout')
      const signal = await seen.promise
      await eventually(async () => signal.aborted, 'the abort', 3_000)
      assert.ok(performance.now() - asked >= 400 - TICK_MS)
    })

    suite.test('R4 the signal of a request answered in time was not aborted meanwhile', async (stage) => {
      const bus = await stage.open()
      const subject = unique('r')
      let aborted = true
      await bus.requestReply.respond(subject, async ({ signal }) => {
        await pause(50)
        aborted = signal.aborted
        return ''
      })
      await bus.requestReply.request(subject, '', AMPLE)
      assert.equal(aborted, false)
    })

    suite.test('R4 aborting a request ends it at once; the responder serves the next', async (stage) => {
      const bus = await stage.open()
      const subject = unique('r')
      const barrier = gate()
      stage.defer(barrier.open)
      let started = 0
      await bus.requestReply.respond(subject, async ({ payload }) => {
        started++
        if (text(payload) === 'wait') await barrier.opened
        return 'done'
      })
      const controller = new AbortController()
      const request = bus.requestReply.request(subject, 'wait', { ...AMPLE, signal: controller.signal })
      request.catch(() => {})
      await eventually(async () => started === 1, 'the request started')
      controller.abort()
      await withinASecond(assert.rejects(request), bus, 'the end of the aborted request')
      await withinASecond(
        assert.rejects(bus.requestReply.request(subject, 'x', { ...AMPLE, signal: AbortSignal.abort() })),
        bus,
        'the refusal',
      )
      sameBytes(await bus.requestReply.request(subject, 'go', AMPLE), 'done')
    })

    suite.test('R4 requests of many at once each get their own answer, in whatever order the answers come', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('r')
      await other.requestReply.respond(
        subject,
        async ({ payload }) => {
          await pause(Math.random() * 20)
          return `re ${text(payload)}`
        },
        { concurrency: 50 },
      )
      await Promise.all(
        Array.from({ length: 100 }, async (_, index) => {
          sameBytes(await bus.requestReply.request(subject, `${index}`, AMPLE), `re ${index}`)
        }),
      )
    })

    suite.test('R4 the responder may send requests of its own', async (stage) => {
      const bus = await stage.open()
      const root = unique('r')
      await bus.requestReply.respond(`${root}.inner`, ({ payload }) => `<${text(payload)}>`)
      await bus.requestReply.respond(`${root}.outer`, ({ payload }) => bus.requestReply.request(`${root}.inner`, payload, AMPLE), {
        concurrency: 1,
      })
      sameBytes(await bus.requestReply.request(`${root}.outer`, 'x', AMPLE), '<x>')
    })
  })

  suite.alone('request/reply times', () => {
    suite.test('R2 not_found comes within 100 ms', async (stage) => {
      const [bus, other] = [await stage.open(), await stage.open()]
      const subject = unique('r')
      await fastest(100, 8, () => timed(() => rejects(bus.requestReply.request(subject, '', { timeoutMs: 5_000 }), 'not_found')))
      const responder = await other.requestReply.respond(subject, () => '')
      await bus.requestReply.request(subject, '', AMPLE)
      await responder.close()
      await fastest(100, 8, () => timed(() => rejects(bus.requestReply.request(subject, '', { timeoutMs: 5_000 }), 'not_found')))
    })
  })
}
