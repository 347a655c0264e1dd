import { readdirSync, readFileSync } from 'node:fs'
import { dirname, join, relative } from 'node:path'
import { expect, test } from 'vitest'

const root = join(import.meta.dirname, '..', '..')
const src = join(root, 'src')

/** What a part of the source may import besides itself, and why. */
const ALLOWED: Readonly<Record<string, readonly string[]>> = {
  // The contract knows nobody, so that every backend can be measured by it.
  core: [],
  // Written once for all backends: it may know the contract and no backend.
  runtime: ['core'],
  // What is typed works on every backend.
  contracts: ['core', 'runtime'],
  // Between any two backends.
  bridge: ['core', 'runtime'],
  // Backends never import one another: to take one away is to delete its folder.
  postgres: ['core', 'runtime'],
  memory: ['core', 'runtime'],
  nats: ['core', 'runtime'],
  // A client's transaction is what it is, whatever the bus makes of it.
  adapters: ['core'],
  // The suite and the embedded server are for everybody's backend.
  testing: ['core', 'runtime'],
  // What a user could write himself; testing for the embedded server of `up`.
  cli: ['index.ts', 'nats', 'testing'],
  'index.ts': ['core', 'runtime', 'contracts', 'bridge', 'postgres'],
}

function imports(file: string): string[] {
  const text = readFileSync(file, 'utf8').replaceAll(/\/\*[\s\S]*?\*\//g, '')
  return [...text.matchAll(/(?:from|import)\s*\(?\s*'([^']+)'/g)].map(([, specifier]) => specifier as string)
}

const files = readdirSync(src, { recursive: true, encoding: 'utf8' }).filter((file) => file.endsWith('.ts'))

test('the parts of the source import in one direction', () => {
  const wrong: string[] = []
  for (const file of files) {
    const part = file.split('/')[0] as string
    for (const specifier of imports(join(src, file))) {
      if (!specifier.startsWith('.')) continue
      const target = relative(src, join(src, dirname(file), specifier)).split('/')[0] as string
      if (target !== part && !ALLOWED[part]?.includes(target)) wrong.push(`${file} imports ${specifier}`)
    }
  }
  expect(wrong).toEqual([])
})

test('each driver has one home', () => {
  const users = (name: string) =>
    files.filter((file) => imports(join(src, file)).some((specifier) => specifier === name || specifier.startsWith(`${name}/`)))
  expect(users('pg-listen')).toEqual(['postgres/listener.ts'])
  expect(users('pg').every((file) => file.startsWith('postgres/') || file.startsWith('testing/'))).toBe(true)
  for (const client of ['transport-node', 'jetstream', 'kv'])
    expect(users(`@nats-io/${client}`).every((file) => file.startsWith('nats/'))).toBe(true)
  expect(users('vitest')).toEqual([])
})
