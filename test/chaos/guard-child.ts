/**
 * Outlives the runner by a moment: kills the processes that it left behind, stopped ones too, which cannot end by themselves.
 * A line of stdin is a process id, with a minus in front once that process is gone.
 */

import { createInterface } from 'node:readline'

const pids = new Set<number>()
for await (const line of createInterface({ input: process.stdin })) {
  const pid = Number(line)
  if (pid < 0) pids.delete(-pid)
  else pids.add(pid)
}
for (const pid of pids) {
  try {
    process.kill(pid, 'SIGKILL')
  } catch {
    // It has ended by itself.
  }
}
