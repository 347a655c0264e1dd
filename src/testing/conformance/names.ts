/** Names: what is refused before anything is sent, and what is just allowed (P2, section 7). */

import assert from 'node:assert/strict'
import { type Suite, sameBytes, unique } from './kit.ts'
import { drain, refuses, unharmed } from './refusals.ts'

const LONG_TTL_MS = 60_000

/** Values of the wrong type, for whatever argument; `undefined` and `null` where they have no meaning of their own. */
const NO_STRINGS: unknown[] = [undefined, null, 1, {}, [], true, Symbol('s'), new String('x')]

const NO_SUBJECTS = [
  '',
  '.',
  '..',
  '.a',
  'a.',
  'a..b',
  'a b',
  ' a',
  'a ',
  'a\tb',
  'a\nb',
  'a\n',
  'a\0',
  'a\x7f',
  'a\u0085b',
  'ü',
  'a.ü',
  '漢',
  'a\u00a0b',
  '\ud800',
  'x'.repeat(1_025),
  '$a',
  '$JS.API',
  '_INBOX',
  '_INBOX.a',
  '_INBOXa',
]
const WILD_SUBJECTS = ['*', '>', 'a.*', 'a.>', '*.a', 'a.*.b']
/** Wildcards that are no tokens of their own, or not where they may be. */
const NO_FILTERS = ['a*', '*a', 'a.b*', 'a>', '>a', '>.a', 'a.>.b', '**', '>>', '*>', 'a.*b.c']

const NO_DURABLES = ['', 'x'.repeat(129), 'a.b', '.', 'a b', 'a/b', 'a:b', 'ä', 'a\n', '\na', 'a\0', '*', '>', '$a', "'", '"', '\\']
const NO_DOTTED = [
  '',
  'x'.repeat(129),
  '.',
  '.a',
  'a.',
  'a..b',
  'a b',
  'a/b',
  'a:b',
  'a=b',
  'ä',
  'a\n',
  'a.\n',
  'a\0',
  '*',
  'a.*',
  '>',
  '$a',
  "'; drop table x; --",
  '"',
  '\\',
]
const NO_KEYS = ['', 'x'.repeat(513), '.', '.a', 'a.', 'a..b', 'a b', 'a:b', 'ä', 'a\n', '\n', 'a\0', '*', 'a.*', '>', "'", '"', '\\', '$a']
const NO_IDS = ['', 'x'.repeat(513), 'a\0b', '\0', 'a\ud800', '\udc00a', '\ud83d']

export function nameTests<Tx>(suite: Suite<Tx>): void {
  suite.group('names', () => {
    suite.test('P2 what is no subject is refused, by every call that takes one', async (stage) => {
      const bus = await stage.open()
      const bad = [...NO_STRINGS, ...NO_SUBJECTS, ...NO_FILTERS]
      await refuses('subject', [...bad, ...WILD_SUBJECTS], (subject) => bus.pubsub.publish(subject, 'x'))
      await refuses('subject', [...bad, ...WILD_SUBJECTS], (subject) =>
        bus.pubsub.publishMany([
          { subject: 'fine', payload: 'x' },
          { subject, payload: 'x' },
        ]),
      )
      await refuses('subject', [...bad, ...WILD_SUBJECTS], (subject) => bus.requestReply.request(subject, 'x', { timeoutMs: 1_000 }))
      await refuses('subject', bad, (subject) => bus.pubsub.subscribe(subject, unique('d')))
      await refuses('subject', bad, (subject) => bus.requestReply.respond(subject, () => ''))
      const { reader } = await stage.subscribe(bus, 'fine', unique('d'), { start: 'new' })
      await reader.nothing(100)
    })

    suite.test('section 7: what is no durable is refused', async (stage) => {
      const bus = await stage.open()
      await refuses('durable', [...NO_STRINGS, ...NO_DURABLES], (durable) => bus.pubsub.subscribe('a', durable))
      await refuses('durable', [...NO_STRINGS, ...NO_DURABLES], (durable) => bus.pubsub.deleteDurable(durable))
      for (const durable of [unique('d').padEnd(128, 'x'), `_${unique('d')}`, `-${unique('D')}`]) {
        await (await bus.pubsub.subscribe('a', durable)).close()
        await bus.pubsub.deleteDurable(durable)
      }
    })

    suite.test('section 7: what is no queue is refused', async (stage) => {
      const bus = await stage.open()
      const bad = [...NO_STRINGS, ...NO_DOTTED]
      await refuses('queue', bad, (queue) => bus.jobs.enqueue(queue, { payload: 'x' }))
      await refuses('queue', bad, (queue) => bus.jobs.enqueueMany(queue, [{ payload: 'x' }]))
      await refuses('queue', bad, (queue) => bus.jobs.claim(queue, 'w', LONG_TTL_MS))
      await refuses('queue', bad, (queue) => bus.jobs.claimMany(queue, 'w', LONG_TTL_MS, { limit: 1 }))
      for (const queue of [unique('q').padEnd(128, 'x'), `${unique('q')}.a.b-c_D.0`]) await unharmed(bus, queue)
    })

    suite.test('section 7: what is no bucket is refused', async (stage) => {
      const bus = await stage.open()
      const bad = [...NO_STRINGS, ...NO_DOTTED]
      await refuses('bucket', bad, (bucket) => bus.kv.get(bucket, 'k'))
      await refuses('bucket', bad, (bucket) => bus.kv.put(bucket, 'k', 'x'))
      await refuses('bucket', bad, (bucket) => bus.kv.cas(bucket, 'k', 'x', null))
      await refuses('bucket', bad, (bucket) => bus.kv.delete(bucket, 'k'))
      await refuses('bucket', bad, (bucket) => drain(bus.kv.keys(bucket)))
      await refuses('bucket', bad, (bucket) => bus.kv.lease(bucket, 'k', LONG_TTL_MS))
      if (bus.supports.watch) await refuses('bucket', bad, (bucket) => bus.kv.watch(bucket))
      for (const bucket of [unique('b').padEnd(128, 'x'), `${unique('b')}.a.b-c_D.0`]) {
        await bus.kv.put(bucket, 'k', 'x')
        sameBytes((await bus.kv.get(bucket, 'k'))!.value, 'x')
      }
    })

    suite.test('section 7: what is no key is refused', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const bad = [...NO_STRINGS, ...NO_KEYS]
      await refuses('key', bad, (key) => bus.kv.get(bucket, key))
      await refuses('key', bad, (key) => bus.kv.put(bucket, key, 'x'))
      await refuses('key', bad, (key) => bus.kv.cas(bucket, key, 'x', null))
      await refuses('key', bad, (key) => bus.kv.delete(bucket, key))
      await refuses('key', bad, (key) => bus.kv.lease(bucket, key, LONG_TTL_MS))
      for await (const key of bus.kv.keys(bucket)) assert.fail(`nothing was written, but ${key} is there`)
    })

    suite.test('section 7: what is no filter of keys is refused', async (stage) => {
      const bus = await stage.open()
      const bucket = unique('b')
      const bad = [1, {}, null, 'a..b', '.a', 'a.', 'a b', '>.a', 'a.>.b', 'a*', 'ä', 'a\0']
      await refuses('filter', bad, (filter) => drain(bus.kv.keys(bucket, filter)))
      if (bus.supports.watch) await refuses('filter', bad, (filter) => bus.kv.watch(bucket, filter))
    })

    suite.test('section 7: ids are 1 to 512 characters without NUL and lone surrogates', async (stage) => {
      const bus = await stage.open()
      const queue = unique('q')
      const subject = unique('p')
      const bad = [...NO_STRINGS.slice(1), ...NO_IDS]
      await refuses('dedupKey', bad, (dedupKey) => bus.jobs.enqueue(queue, { payload: 'x', dedupKey }))
      await refuses('dedupKey', bad, (dedupKey) => bus.jobs.enqueueMany(queue, [{ payload: 'x' }, { payload: 'x', dedupKey }]))
      await refuses('msgId', bad, (msgId) => bus.pubsub.publish(subject, 'x', { msgId }))
      await refuses('msgId', bad, (msgId) => bus.pubsub.publishMany([{ subject, payload: 'x', msgId }]))
      await refuses('workerId', [undefined, ...bad], (workerId) => bus.jobs.claim(queue, workerId, LONG_TTL_MS))
      await refuses('workerId', [undefined, ...bad], (workerId) => bus.jobs.claimMany(queue, workerId, LONG_TTL_MS, { limit: 1 }))
      await refuses('key', [undefined, ...bad], (key) => bus.kv.get(`dedup.${queue}`, key))
      await unharmed(bus, queue)
      const long = `${unique('id')} \u{1f600} \n`.padEnd(512, 'x')
      await bus.jobs.enqueue(queue, { payload: 'x', dedupKey: long })
      await bus.pubsub.publish(subject, 'x', { msgId: long })
      assert.ok(await bus.jobs.claim(queue, long, LONG_TTL_MS))
      const { next, nothing } = await stage.subscribe(bus, subject, unique('d'))
      await next()
      await nothing(100)
    })
  })
}
