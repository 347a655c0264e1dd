import type { BucketInfo } from '../../index.ts'
import { command } from '../command.ts'
import { EXIT, Failure } from '../failure.ts'
import { Interrupts } from '../interrupts.ts'
import { MAX_PAYLOAD_OPTION, payloadOf, writeBytes } from '../payload.ts'
import { type Column, printRows } from '../table.ts'
import { bytes, number, payloadFields, shownPayload } from '../text.ts'
import { integerOf } from '../values.ts'
import { lease } from './lease.ts'

const BUCKET = { description: 'the name of the bucket' } as const
const KEY = { description: 'the key' } as const
const VALUE = { description: 'the value; - or none: standard input, all of it', optional: true } as const
const TTL = { type: 'duration', value: 'TIME', description: 'the key is absent after that; else never' } as const
const FILTER = { description: 'only keys that match: * is one token between dots, a last > the rest', optional: true } as const

const get = command({
  name: 'kv get',
  summary: 'print the value of a key',
  arguments: { bucket: BUCKET, key: KEY },
  options: { revision: { type: 'flag', description: 'print its revision instead' } },
  examples: [
    { line: 'klieo-bus kv get settings theme', says: 'the value, byte for byte; on a terminal control characters are shown' },
    { line: 'klieo-bus kv get settings theme --json', says: 'with revision and updatedAt' },
  ],
  exitCodes: { 3: 'the key is absent' },
  async run({ args, options }, session) {
    const { output } = session
    const bus = await session.connect()
    const entry = await bus.kv.get(args.bucket, args.key)
    if (entry === null) throw new Failure(EXIT.absent, `bucket "${args.bucket}" has no key "${args.key}"`)
    const { key, value, revision, updatedAt } = entry
    if (output.json) await output.object({ bucket: args.bucket, key, revision, updatedAt, ...payloadFields('value', value) })
    else if (options.revision) await output.line(String(revision))
    else await writeBytes(output, value)
    return EXIT.done
  },
})

const put = command({
  name: 'kv put',
  summary: 'write a key',
  arguments: { bucket: BUCKET, key: KEY, value: VALUE },
  options: { ttl: TTL, ...MAX_PAYLOAD_OPTION },
  examples: [{ line: 'klieo-bus kv put settings theme dark', says: 'prints the new revision' }],
  async run({ args, options }, session) {
    const maxPayloadBytes = options['max-payload']
    const value = await payloadOf(args.value, maxPayloadBytes)
    const bus = await session.connect({ maxPayloadBytes })
    const revision = await bus.kv.put(args.bucket, args.key, value, options.ttl === undefined ? {} : { ttlMs: options.ttl })
    await session.output.result({ bucket: args.bucket, key: args.key, revision }, `revision ${revision}`)
    return EXIT.done
  },
})

const cas = command({
  name: 'kv cas',
  summary: 'write a key if it is still as expected',
  arguments: { bucket: BUCKET, key: KEY, value: VALUE },
  options: {
    expected: { type: 'text', value: 'REVISION', description: 'the revision it must have; absent: it must not be there', required: true },
    ttl: TTL,
    ...MAX_PAYLOAD_OPTION,
  },
  examples: [
    { line: 'klieo-bus kv cas settings theme dark --expected absent', says: 'only if nobody has written it' },
    {
      line: 'klieo-bus kv cas settings theme light --expected "$(klieo-bus kv get settings theme --revision)"',
      says: 'only if nobody has changed it',
    },
  ],
  exitCodes: { 4: 'the key is at another revision' },
  async run({ args, options }, session) {
    const expected = options.expected === 'absent' ? null : integerOf('--expected (if not "absent")', options.expected, { least: 1 })
    const maxPayloadBytes = options['max-payload']
    const value = await payloadOf(args.value, maxPayloadBytes)
    const bus = await session.connect({ maxPayloadBytes })
    const ttl = options.ttl === undefined ? {} : { ttlMs: options.ttl }
    const revision = await bus.kv.cas(args.bucket, args.key, value, expected, ttl)
    await session.output.result({ bucket: args.bucket, key: args.key, revision }, `revision ${revision}`)
    return EXIT.done
  },
})

const remove = command({
  name: 'kv delete',
  summary: 'delete a key; an absent one is no error',
  arguments: { bucket: BUCKET, key: KEY },
  options: { expected: { type: 'integer', value: 'REVISION', description: 'only while the key is at this revision', least: 1 } },
  examples: [{ line: 'klieo-bus kv delete settings theme', says: 'the key is absent' }],
  exitCodes: { 4: 'the key is at another revision' },
  async run({ args, options }, session) {
    const bus = await session.connect()
    await bus.kv.delete(args.bucket, args.key, options.expected === undefined ? {} : { expected: options.expected })
    await session.output.result({ bucket: args.bucket, key: args.key, deleted: true }, `key "${args.key}" is absent`)
    return EXIT.done
  },
})

const BUCKETS: readonly Column<BucketInfo>[] = [
  { title: 'bucket', cell: ({ bucket }) => bucket },
  { title: 'keys', right: true, cell: ({ keys }) => number(keys) },
  { title: 'values', right: true, cell: ({ bytes: size }) => bytes(size) },
]

const list = command({
  name: 'kv ls',
  summary: 'show the buckets, or the keys of one',
  arguments: { bucket: { description: 'the name of the bucket; none: all of them', optional: true }, filter: FILTER },
  options: {},
  examples: [
    { line: 'klieo-bus kv ls', says: 'every bucket, how many keys it has, and how large their values are' },
    { line: "klieo-bus kv ls settings 'app.*'", says: 'a key a line' },
  ],
  async run({ args: { bucket, filter } }, session) {
    const { output } = session
    const bus = await session.connect()
    if (bucket === undefined) await printRows(output, BUCKETS, await bus.admin.buckets(), { none: 'no bucket has a key' })
    else for await (const key of bus.kv.keys(bucket, filter)) await output.result({ bucket, key }, key)
    return EXIT.done
  },
})

const watch = command({
  name: 'kv watch',
  summary: 'show the entries of a bucket, then every change, until Ctrl-C',
  arguments: { bucket: BUCKET, filter: FILTER },
  options: {
    'updates-only': { type: 'flag', description: 'leave out what is there already' },
    count: { type: 'integer', value: 'N', description: 'end after so many', least: 1 },
  },
  examples: [{ line: 'klieo-bus kv watch settings', says: 'a line for each entry and each change' }],
  async run({ args, options }, session) {
    const { output } = session
    const bus = await session.connect()
    using interrupts = new Interrupts()
    const { drain: signal } = interrupts
    const changes = await bus.kv.watch(args.bucket, args.filter, { signal, updatesOnly: options['updates-only'] })
    let left = options.count ?? Number.POSITIVE_INFINITY
    output.gone.catch(() => interrupts.end())
    for await (const change of changes) {
      if (change.operation === 'put') {
        const { key, value, revision, updatedAt } = change.entry
        await output.result(
          { operation: 'put', key, revision, updatedAt, ...payloadFields('value', value) },
          `${output.style('green', 'put')} ${key} ${output.style('dim', `@${revision}`)} ${shownPayload(value)}`,
        )
      } else {
        const { key, revision } = change
        await output.result(
          { operation: 'delete', key, revision },
          `${output.style('red', 'delete')} ${key} ${output.style('dim', `@${revision}`)}`,
        )
      }
      if (--left <= 0) break
    }
    await changes.close()
    return EXIT.done
  },
})

export const COMMANDS = [get, put, cas, remove, list, watch, lease]
