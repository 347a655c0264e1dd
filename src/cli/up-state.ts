/** What `klieo-bus up` leaves in `.klieo/` for those who look for it: where its server is, as long as it runs. */

import { mkdirSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { dirname, join, resolve } from 'node:path'

export const FOLDER = '.klieo'
const STATE_FILE = 'up.json'
const PORT_FILE = 'port'

export interface UpState {
  readonly url: string
  readonly schema: string
  /** Of the `klieo-bus up`. */
  readonly pid: number
}

export interface RunningUp extends UpState {
  /** The one that holds `.klieo`. */
  readonly directory: string
}

/** The nearest one, from the directory upwards. */
export function findRunning(from: string): RunningUp | undefined {
  for (let directory = resolve(from); ; directory = dirname(directory)) {
    const running = runningIn(directory)
    if (running) return running
    if (dirname(directory) === directory) return undefined
  }
}

export function runningIn(directory: string): RunningUp | undefined {
  const file = join(directory, FOLDER, STATE_FILE)
  try {
    // A file that somebody else has put into a directory above would send what is published here to him.
    if (process.getuid && statSync(file).uid !== process.getuid()) return undefined
    const { url, schema, pid } = JSON.parse(readFileSync(file, 'utf8')) as Partial<UpState>
    if (typeof url !== 'string' || typeof schema !== 'string' || !Number.isInteger(pid) || !isAlive(pid!)) return undefined
    return { url, schema, pid: pid!, directory }
  } catch {
    return undefined
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

/** @returns the folder, which git does not see */
export function makeFolder(directory: string): string {
  const folder = join(directory, FOLDER)
  // Not recursive: in a directory that takes none, Node tries for ever.
  if (!statSync(folder, { throwIfNoEntry: false })?.isDirectory()) mkdirSync(folder)
  writeFileSync(join(folder, '.gitignore'), '*\n')
  return folder
}

/** It holds a password: nobody else may read it, and nobody sees half of it. */
export function writeState(folder: string, state: UpState): void {
  const file = join(folder, STATE_FILE)
  writeFileSync(`${file}.new`, `${JSON.stringify(state)}\n`, { mode: 0o600 })
  renameSync(`${file}.new`, file)
}

export function removeState(folder: string): void {
  rmSync(join(folder, STATE_FILE), { force: true })
}

/** The port of the last time, so that an address once written down goes on to be right. */
export function lastPort(folder: string): number | undefined {
  try {
    const port = Number(readFileSync(join(folder, PORT_FILE), 'utf8'))
    return Number.isInteger(port) && port > 0 && port < 65_536 ? port : undefined
  } catch {
    return undefined
  }
}

export function keepPort(folder: string, port: number): void {
  writeFileSync(join(folder, PORT_FILE), `${port}\n`)
}
