/** pgbench, where there is one: on the PATH or where Debian puts it. */

import { execFile } from 'node:child_process'
import { access, mkdtemp, readdir, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { delimiter, join } from 'node:path'
import { promisify } from 'node:util'
import { type Cpu, Stopwatch } from './measure.ts'

const DEBIAN = '/usr/lib/postgresql'

export async function findPgbench(): Promise<string | undefined> {
  const versions = await readdir(DEBIAN).catch(() => [])
  const places = [
    ...(process.env.PATH ?? '').split(delimiter),
    ...versions.sort((a, b) => Number(b) - Number(a)).map((version) => join(DEBIAN, version, 'bin')),
  ]
  for (const place of places) {
    const path = join(place, 'pgbench')
    if (
      await access(path).then(
        () => true,
        () => false,
      )
    )
      return path
  }
  return undefined
}

/** @throws Error saying what to install */
export async function pgbench(
  url: string,
  script: string,
  options: { readonly clients: number; readonly seconds: number; readonly serverPid?: number | undefined },
): Promise<{ perSecond: number; cpu: Cpu }> {
  const program = await findPgbench()
  if (program === undefined) throw new Error('there is no pgbench: on Debian it comes with the package postgresql-contrib or postgresql-15')
  const directory = await mkdtemp(join(tmpdir(), 'klieo-bench-'))
  try {
    const file = join(directory, 'script.sql')
    await writeFile(file, script)
    const threads = Math.min(2, options.clients)
    const watch = new Stopwatch(options.serverPid)
    const { stdout } = await promisify(execFile)(program, [
      ...['-n', '-M', 'prepared', '-f', file],
      ...['-c', String(options.clients), '-j', String(threads), '-T', String(options.seconds), url],
    ])
    const { cpu } = watch.stop()
    const perSecond = Number(/^tps = ([\d.]+)/m.exec(stdout)?.[1])
    if (!(perSecond > 0)) throw new Error(`pgbench said:\n${stdout}`)
    // Our own process only waited: its CPU would say nothing.
    return { perSecond, cpu: { client: Number.NaN, ...(cpu.server === undefined ? {} : { server: cpu.server }) } }
  } finally {
    await rm(directory, { recursive: true, force: true })
  }
}
