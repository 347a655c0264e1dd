import { expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { channelOf } from '../../src/postgres/schema-name.ts'
import { databaseUrl, freshSchema } from '../support/server.ts'
import { session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'
import { outcome } from './support/outcome.ts'

test('section 7 an idle connection that is terminated while close waits for a call under way is no event of the process', async () => {
  const schema = freshSchema()
  const name = `closing ${schema}`.slice(0, 60)
  const url = new URL(databaseUrl())
  url.searchParams.set('application_name', name)
  await using observer = await session(databaseUrl())
  await using holder = await session(databaseUrl())
  const bus = await PostgresBus.connect({ connectionString: url.href, schema, maintenance: false })
  const listener = await eventually(
    async () => {
      const { rows } = await observer.query('select pid from pg_stat_activity where query = $1', [`LISTEN ${channelOf(schema)}`])
      return (rows[0] as { pid: number } | undefined)?.pid ?? 0
    },
    { everyMs: 2, what: 'the listener' },
  )
  const backends = async (where: string): Promise<number[]> => {
    const { rows } = await observer.query(`select pid from pg_stat_activity where application_name = $1 and ${where}`, [name])
    return (rows as { pid: number }[]).map(({ pid }) => pid)
  }

  const uncaught: unknown[] = []
  const onUncaught = (error: unknown) => void uncaught.push(error)
  process.on('uncaughtException', onUncaught)
  try {
    await holder.query('begin')
    await holder.query(`lock table ${schema}.jobs in access exclusive mode`)
    const enqueued = outcome(bus.jobs.enqueue('q', { payload: 'x' }))
    await eventually(async () => (await backends(`wait_event_type = 'Lock'`)).length === 1, { what: 'the enqueue waiting for the lock' })
    await bus.kv.get('b', 'k')
    const idle = await eventually(async () => (await backends(`state = 'idle'`)).find((pid) => pid !== listener) ?? 0, {
      what: 'an idle connection',
    })
    const closing = bus.close()
    // It hands back first; once it has left the listener, the pool itself is being closed.
    await eventually(async () => (await observer.query('select from pg_stat_activity where pid = $1', [listener])).rowCount === 0, {
      everyMs: 2,
      what: 'the end of the listener',
    })
    await observer.query('select pg_terminate_backend($1)', [idle])
    await eventually(async () => !(await backends('true')).includes(idle), { what: 'the end of the idle connection' })
    await holder.query('rollback')
    await closing
    await enqueued
    expect(uncaught).toEqual([])
  } finally {
    process.off('uncaughtException', onUncaught)
  }
})
