import { chmod, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { startEmbeddedPostgres } from '../../src/testing/embedded-postgres.ts'
import { session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'

test('K6 a watch goes on after a restart of its server, and after a failover ends with connection instead of skipping', async () => {
  await using server = await startEmbeddedPostgres()
  await using bus = await PostgresBus.connect({ connectionString: server.connectionString, pollIntervalMs: 50 })
  const watch = await bus.kv.watch('b', undefined, { updatesOnly: true })
  const changes = watch[Symbol.asyncIterator]()
  await bus.kv.put('b', 'k', 'before')
  expect((await changes.next()).value).toMatchObject({ operation: 'put' })

  await server.kill()
  await server.restart()
  await eventually(async () => void (await bus.kv.put('b', 'k', 'restarted')))
  expect((await changes.next()).value).toMatchObject({ operation: 'put' })

  const ended = expect(
    (async () => {
      // Whatever was written meanwhile may still come.
      while (!(await changes.next()).done);
    })(),
  ).rejects.toMatchObject({ code: 'connection', message: expect.stringContaining('watch again') })
  await server.kill()
  const standby = join(server.dataDir, 'standby.signal')
  await writeFile(standby, '')
  await chmod(standby, 0o666)
  await server.restart()
  {
    await using client = await session(server.connectionString)
    await client.query('select pg_promote()')
  }
  await ended
  await using again = await PostgresBus.connect({ connectionString: server.connectionString })
  expect((await again.kv.get('b', 'k'))?.revision).toBeGreaterThan(1)
}, 60_000)
