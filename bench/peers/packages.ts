/**
 * The peers' packages live in bench/node_modules and are not there in a fresh clone. So they are imported when a contender is
 * opened and typed by the few members that the bench uses.
 */

import { existsSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'

const MODULES = join(import.meta.dirname, '..', 'node_modules')

export function isInstalled(name: string): boolean {
  return existsSync(join(MODULES, name, 'package.json'))
}

/** @typeParam T what the bench uses of it; the compiler cannot check it */
export async function load<T>(name: string): Promise<T> {
  return (await import(name)) as T
}

export async function versionOf(name: string): Promise<string> {
  const { version } = JSON.parse(await readFile(join(MODULES, name, 'package.json'), 'utf8')) as { version: string }
  return version
}

/** Payloads of the scenarios are ASCII. All peers here but NATS store JSON, for which a string is the cheapest form. */
export interface Stored {
  readonly bytes: string
}

export function toStored(payload: Buffer): Stored {
  return { bytes: payload.toString('latin1') }
}

export function fromStored({ bytes }: Stored): Buffer {
  return Buffer.from(bytes, 'latin1')
}
