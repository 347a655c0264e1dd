import { type } from 'arktype'
import pg from 'pg'
import * as v from 'valibot'
import { beforeAll, describe, expect, test } from 'vitest'
import { z } from 'zod'
import { type BucketContract, type Bus, bytes, defineBucket, encode, PostgresBus } from '../../src/index.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { fresh, onEachBackend } from './support/backends.ts'

type Theme = { dark: boolean }

onEachBackend((backend) => {
  let bus: Bus<never>
  beforeAll(async () => {
    bus = (await backend.connect()) as Bus<never>
  })

  const contracts: Readonly<Record<string, (bucket: string) => BucketContract<Theme>>> = {
    zod: (bucket) => defineBucket(bucket, z.object({ dark: z.boolean() })) as BucketContract<Theme>,
    valibot: (bucket) => defineBucket(bucket, v.object({ dark: v.boolean() })) as BucketContract<Theme>,
    arktype: (bucket) => defineBucket(bucket, type({ dark: 'boolean' })) as BucketContract<Theme>,
  }

  describe.each(Object.entries(contracts))('a schema of %s', (_name, define) => {
    test('T1 T9 what matches is written and read as data; what does not is not written', async () => {
      const settings = define(fresh())
      expect(await settings.get(bus, 'theme')).toBeNull()
      const first = await settings.put(bus, 'theme', { dark: true })
      expect(await settings.get(bus, 'theme')).toEqual({
        key: 'theme',
        value: encode({ dark: true }),
        data: { dark: true },
        revision: first,
        updatedAt: expect.any(Date),
      })
      await expect(settings.put(bus, 'theme', { dark: 'yes' } as never)).rejects.toMatchObject({ code: 'invalid_argument' })
      await expect(settings.cas(bus, 'theme', {} as never, first)).rejects.toMatchObject({ code: 'invalid_argument' })
      const second = await settings.cas(bus, 'theme', { dark: false }, first)
      await expect(settings.cas(bus, 'theme', { dark: true }, first)).rejects.toMatchObject({ code: 'cas_conflict', actual: second })
      expect((await settings.get(bus, 'theme'))?.data).toEqual({ dark: false })
      await settings.put(bus, 'other', { dark: true }, { ttlMs: 60_000 })
      const keys: string[] = []
      for await (const key of settings.keys(bus)) keys.push(key)
      expect(keys.sort()).toEqual(['other', 'theme'])
      for await (const key of settings.keys(bus, 'other')) keys.push(key)
      expect(keys).toEqual(['other', 'theme', 'other'])
      await expect(settings.delete(bus, 'theme', { expected: first })).rejects.toMatchObject({ code: 'cas_conflict' })
      await settings.delete(bus, 'theme', { expected: second })
      expect(await settings.get(bus, 'theme')).toBeNull()
    })
  })

  test('T9 what is there and does not match: get rejects with conflict and says where, and it can be overwritten', async () => {
    const settings = defineBucket(fresh(), z.object({ dark: z.boolean() }))
    const revision = await bus.kv.put(settings.bucket, 'theme', encode({ dark: 'hunter2' }))
    const error = await settings.get(bus, 'theme').catch((thrown: Error) => thrown)
    expect(error).toMatchObject({ code: 'conflict', retryable: false, message: expect.stringContaining('dark: expected boolean') })
    expect((error as Error).message).not.toContain('hunter2')
    expect((error as Error).message).toContain(String(revision))
    await settings.cas(bus, 'theme', { dark: true }, revision)
    expect((await settings.get(bus, 'theme'))?.data).toEqual({ dark: true })
  })

  test('T9 a watch yields what does not match as invalid, skips nothing and goes on', async () => {
    const settings = defineBucket(
      fresh(),
      z.object({ dark: z.boolean().default(false) }).refine(async () => true),
    )
    await settings.put(bus, 'a', {})
    const watch = await settings.watch(bus)
    const changes = watch[Symbol.asyncIterator]()
    const next = async () => (await changes.next()).value
    expect(await next()).toMatchObject({ operation: 'put', entry: { key: 'a', data: { dark: false }, value: encode({}) } })
    await bus.kv.put(settings.bucket, 'a', 'no JSON')
    expect(await next()).toMatchObject({
      operation: 'invalid',
      reason: 'not JSON in UTF-8',
      entry: { key: 'a', value: new Uint8Array(Buffer.from('no JSON')) },
    })
    await settings.delete(bus, 'a')
    expect(await next()).toMatchObject({ operation: 'delete', key: 'a' })
    await settings.put(bus, 'b', { dark: true })
    expect(await next()).toMatchObject({ operation: 'put', entry: { data: { dark: true } } })
    const ended = changes.next()
    await watch.close()
    expect(await ended).toEqual({ done: true, value: undefined })
  })

  test('T9 a watch takes a filter and options, and bytes stay bytes', async () => {
    const blobs = defineBucket(fresh(), bytes())
    await blobs.put(bus, 'a.x', new Uint8Array([0, 255]))
    await blobs.put(bus, 'b.x', 'text')
    expect((await blobs.get(bus, 'a.x'))?.data).toEqual(new Uint8Array([0, 255]))
    const controller = new AbortController()
    await using watch = await blobs.watch(bus, 'a.*', { updatesOnly: true, signal: controller.signal })
    await blobs.put(bus, 'b.y', '1')
    await blobs.put(bus, 'a.y', '2')
    const seen: string[] = []
    for await (const change of watch) {
      if (change.operation === 'put') seen.push(`${change.entry.key} ${Buffer.from(change.entry.data)}`)
      controller.abort()
    }
    expect(seen).toEqual(['a.y 2'])
  })

  test('T9 what the bus refuses it still refuses', async () => {
    const settings = defineBucket<Theme>(fresh())
    await expect(settings.put(bus, '', { dark: true })).rejects.toMatchObject({ code: 'invalid_argument' })
    await expect(settings.put(bus, 'k', undefined as never)).rejects.toMatchObject({ code: 'invalid_argument' })
    await expect(settings.get({} as never, 'k')).rejects.toMatchObject({ code: 'invalid_argument' })
    await expect(settings.watch(undefined as never)).rejects.toMatchObject({ code: 'invalid_argument' })
    expect(() => defineBucket('no bucket')).toThrow(expect.objectContaining({ code: 'invalid_argument' }))
    await expect(defineBucket<string>('dedup.q').put(bus, 'k', 'v')).rejects.toMatchObject({ code: 'invalid_argument' })
  })
})

test('T1 T9 in the caller’s transaction a typed write is there if that commits', async () => {
  const bus = await PostgresBus.connect({ connectionString: databaseUrl(), schema: freshSchema() })
  const settings = defineBucket('settings', z.object({ dark: z.boolean() }))
  const client = new pg.Client({ connectionString: databaseUrl() })
  await client.connect()
  for (const how of ['rollback', 'commit']) {
    await client.query('begin')
    await settings.put(bus, 'put', { dark: true }, { tx: client })
    await settings.cas(bus, 'cas', { dark: true }, null, { tx: client })
    await settings.delete(bus, 'none', { tx: client })
    await client.query(how)
    for (const key of ['put', 'cas']) expect((await settings.get(bus, key))?.data).toEqual(how === 'commit' ? { dark: true } : undefined)
  }
  await client.end()
  await bus.close()
})
