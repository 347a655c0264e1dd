/** docs/bridge.md, its commands typed into a shell and its programs started there, on servers of its own. */

import { spawnSync } from 'node:child_process'
import { chmod, mkdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { examplesOf, runInOrder } from '../cli/shell.ts'
import { NODE } from '../support/child.ts'
import { freePort } from '../support/nats-server.ts'
import { blocksOf } from './document.ts'
import { Project, programsOf, root, surroundings } from './programs.ts'

const document = 'docs/bridge.md'
const missing = spawnSync('nats-server', ['--version']).status === 0 ? undefined : 'no nats-server is installed'

test.skipIf(missing !== undefined)(
  `the guide of the bridge prints what it says${missing === undefined ? '' : ` (${missing})`}`,
  async () => {
    const text = await readFile(join(root, document), 'utf8')
    const around = await surroundings()
    await using project = await Project.create(programsOf(blocksOf(document, text), around), around)
    const cwd = project.path('bridge')
    // The server of the guide, on a port that is free here.
    const port = await freePort()
    await mkdir(project.path('bin'))
    const script = async (name: string, line: string) => {
      await writeFile(project.path(`bin/${name}`), `#!/bin/sh\nexec ${line} "$@"\n`)
      await chmod(project.path(`bin/${name}`), 0o755)
    }
    await script('nats-server', `/usr/bin/env PATH="${process.env.PATH}" nats-server -p ${port}`)
    await script('klieo-bus', `"${NODE}" "${join(root, 'dist', 'cli', 'main.js')}"`)
    await script('node', `"${NODE}"`)
    const { HOME, TMPDIR, PATH } = process.env
    const examples = examplesOf(text, /^sh$/)
    expect(examples.length).toBeGreaterThanOrEqual(6)
    await runInOrder(examples, { cwd, env: { HOME, TMPDIR, PATH: `${project.path('bin')}:${PATH}`, NATS_URL: `127.0.0.1:${port}` } })
  },
  180_000,
)
