/** Whether a bus keeps its process alive. */

import assert from 'node:assert/strict'
import { describe, test } from 'vitest'
import { startChild } from '../support/child.ts'
import { eventually } from '../support/wait.ts'

const FILE = new URL('./idle-bus.ts', import.meta.url)

describe('section 7', () => {
  test('a bus that is open and idle does not keep the process alive', async () => {
    await using child = startChild(FILE)
    await child.next(({ ready }) => ready === true)
    await child.next(({ idle }) => idle === true)
    assert.deepEqual(await child.exited, { code: 0, signal: null })
  })

  test.each(['message', 'change', 'job'])('somebody who waits for a %s keeps the process alive', async (what) => {
    await using child = startChild(FILE, { args: [what] })
    await child.next(({ ready }) => ready === true)
    // An event loop without work would say so at once.
    await assert.rejects(
      child.next(({ idle }) => idle === true, 500),
      /wrote no such line/,
    )
    await eventually(() => process.kill(child.pid, 0), { what: 'the process to be alive' })
  })

  test('close ends every wait, and nothing keeps the process alive', async () => {
    await using child = startChild(FILE, { args: ['close'] })
    const { ended, refused } = await child.next((line) => 'ended' in line)
    assert.deepEqual({ ended, refused }, { ended: [true, true], refused: 'closed' })
    assert.deepEqual(await child.exited, { code: 0, signal: null })
  })
})
