/** Copies of the clone to be mutated. */

import { readFileSync } from 'node:fs'
import { cp, mkdtemp, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type Mutant, mutate } from './mutant.ts'

export const ROOT = join(import.meta.dirname, '..', '..')
/** What the tests need; the packages are linked. */
const COPIED = ['src', 'sql', 'test', 'scripts', 'package.json', 'tsconfig.json', 'tsconfig.build.json', 'vitest.config.ts']

export function readSource(file: string): string {
  return readFileSync(join(ROOT, file), 'utf8')
}

/** A copy with the mutant's edits; without a mutant, as it is. */
export class Tree implements AsyncDisposable {
  readonly path: string

  private constructor(path: string) {
    this.path = path
  }

  static async make(mutant?: Mutant): Promise<Tree> {
    const changed = mutant ? mutate(mutant, readSource) : new Map<string, string>()
    const tree = new Tree(await mkdtemp(join(tmpdir(), 'klieo-mutant-')))
    await Promise.all(COPIED.map((name) => cp(join(ROOT, name), join(tree.path, name), { recursive: true })))
    await symlink(join(ROOT, 'node_modules'), join(tree.path, 'node_modules'), 'dir')
    for (const [file, text] of changed) await writeFile(join(tree.path, file), text)
    return tree
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await rm(this.path, { recursive: true, force: true })
  }
}
