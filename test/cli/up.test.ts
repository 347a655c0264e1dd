import { existsSync } from 'node:fs'
import { readFile, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { beforeAll, expect, test } from 'vitest'
import { PostgresBus } from '../../src/index.ts'
import { eventually } from '../support/wait.ts'
import { build, complaint, directory, klieo, shell, start } from './command.ts'

beforeAll(build, 60_000)

test('up keeps a server in .klieo that commands below find; a second one says so; Ctrl-C ends it and the data stay', async () => {
  await using place = await directory()
  const here = { cwd: place.path, env: {} }
  await using first = start(['up'], here)
  const { text: url } = await first.next<{ text: string }>((line) => String(line.text).startsWith('postgres://'), 90_000)
  await eventually(() => first.stderr.includes('Ctrl-C ends it'))
  expect((await stat(join(place.path, '.klieo', 'up.json'))).mode & 0o777).toBe(0o600)
  expect(await readFile(join(place.path, '.klieo', '.gitignore'), 'utf8')).toBe('*\n')

  const second = await klieo(['up'], here)
  expect(second.code).toBe(4)
  expect(complaint(second)).toContain(`a klieo-bus up is running in ${place.path} already (process ${first.pid})`)
  expect(second.stderr).not.toContain(new URL(url).password)

  const piped = await shell(
    "mkdir below; cd below; printf '%s\\n' a b c | klieo-bus enqueue q; klieo-bus work q --exec cat --count 1",
    here,
  )
  expect(piped).toMatchObject({ code: 0, stderr: '', stdout: '3 jobs enqueued in "q"\na' })
  await using bus = await PostgresBus.connect({ connectionString: url, migrate: false })
  await bus.close()

  first.interruptGroup()
  expect(await first.exited).toEqual({ code: 0, signal: null })
  expect(existsSync(join(place.path, '.klieo', 'up.json'))).toBe(false)
  expect((await klieo(['queues'], { cwd: place.path, env: { PGPORT: '1' } })).code).toBe(1)

  await using third = start(['up', '--json'], here)
  expect(await third.next((line) => typeof line.url === 'string', 90_000)).toMatchObject({ url, schema: 'klieo', migrations: [] })
  expect((await shell('klieo-bus work q --exec cat --until-empty', here)).stdout).toBe('bc')

  // Killed, it takes its server along, and the next one waits for that.
  await third.kill('SIGKILL')
  await using fourth = start(['up'], here)
  await fourth.next((line) => line.text === url, 90_000)
  fourth.interruptGroup()
  expect(await fourth.exited).toEqual({ code: 0, signal: null })
}, 300_000)

test('up ends with a sentence when its server ends by itself', async () => {
  await using place = await directory()
  await using up = start(['up', '--json'], { cwd: place.path, env: {} })
  const { pid } = await up.next<{ pid: number }>((line) => typeof line.pid === 'number', 90_000)
  process.kill(pid, 'SIGKILL')
  expect(await up.exited).toEqual({ code: 1, signal: null })
  expect(up.stderr.trim().split('\n').at(-1)).toMatch(/^klieo-bus: the server in .* has ended; start it anew$/)
  expect(existsSync(join(place.path, '.klieo', 'up.json'))).toBe(false)
}, 120_000)

test('nowhere to make .klieo is one sentence', async () => {
  await using place = await directory()
  await writeFile(join(place.path, '.klieo'), 'a file')
  for (const cwd of [place.path, '/proc']) {
    const ran = await klieo(['up'], { env: {}, cwd })
    expect(ran.code).toBe(1)
    expect(complaint(ran)).toContain('.klieo')
  }
})
