/**
 * The examples of a document: its fenced blocks, and who checks each.
 *
 * What stands after the language says how a block is treated; a reader of the rendered page does not see it.
 *
 *   (nothing)             `ts`: a program; compiled, and run if it says what it prints. `sql`: run. `sh`: its commands exist.
 *   file=worker.ts        a program by that name, which others import or start
 *   continued             goes on where the last block of its language ended: one program
 *   of=pg-boss            another package's: compiled where the benchmark's packages are installed
 *   by=test/x.test.ts     that test runs it
 *   no-run: the reason    compiled, not run
 *
 * A line `<!-- examples: test/x.test.ts -->` says `by=` for all of a document's blocks.
 */

export interface Block {
  /** As `docs/outbox.md`. */
  readonly document: string
  /** Of its first line of code, from 1. */
  readonly line: number
  readonly language: string
  readonly code: string
  readonly file?: string
  readonly continued: boolean
  /** A package of somebody else's. */
  readonly of?: string
  /** The test that runs it. */
  readonly by?: string
  /** Why it is not run. */
  readonly notRun?: string
}

/** What a shell says, what a file holds. A block without a language is a mistake: one cannot tell whether it should have been checked. */
const NOT_CODE = new Set(['text'])
const CHECKED = new Set(['ts', 'sql', 'sh', 'json'])
const OPTION = /^(?:(file|of|by)=(\S+)|(continued)|no-run: (\S.*))(?:\s+|$)/

/** The fenced blocks of a document. @throws for one that is not closed, or whose first line says something that nobody understands */
export function blocksOf(document: string, text: string): Block[] {
  const claimed = /^<!-- examples: (\S+) -->$/m.exec(text)?.[1]
  const blocks: Block[] = []
  const lines = text.split('\n')
  for (let at = 0; at < lines.length; at++) {
    const fence = /^ *```(\S*) *(.*)$/.exec(lines[at]!)
    if (!fence) continue
    const first = at + 1
    while (++at < lines.length && !/^ *```$/.test(lines[at]!));
    if (at === lines.length) throw new Error(`${document}:${first}: the block is never closed`)
    const options = optionsOf(`${document}:${first}`, fence[2]!)
    blocks.push({
      document,
      line: first + 1,
      language: fence[1]!,
      code: lines.slice(first, at).join('\n'),
      continued: false,
      ...(claimed ? { by: claimed } : {}),
      ...options,
    })
  }
  return blocks
}

function optionsOf(where: string, text: string): Partial<Block> {
  let options: Partial<Block> = {}
  for (let rest = text; rest !== ''; ) {
    const found = OPTION.exec(rest)
    if (!found) throw new Error(`${where}: "${rest}" is nothing that test/docs/document.ts knows`)
    const [whole, name, value, continued, notRun] = found
    if (name) options = { ...options, [name]: value }
    if (continued) options = { ...options, continued: true }
    if (notRun) options = { ...options, notRun }
    rest = rest.slice(whole.length)
  }
  return options
}

/** What a block says that it prints: `// → text`, or `-- → text`, or `# → text`; `…` stands for whatever may differ. */
export function outputsOf({ code }: Pick<Block, 'code'>): string[] {
  return [...code.matchAll(/(?:\/\/|--|#) → (.*)$/gm)].map(([, text]) => text!.trimEnd())
}

export function isOutput(expected: string, actual: string): boolean {
  if (!expected.includes('…')) return expected === actual
  const pattern = expected
    .split('…')
    .map((part) => part.replaceAll(/[.*+?^${}()|[\]\\]/g, '\\$&'))
    .join('.*')
  return new RegExp(`^${pattern}$`).test(actual)
}

/** What a program imports: of packages their names, of files their paths. */
export function importsOf(code: string): string[] {
  const found = [...code.matchAll(/(?:\bfrom|\bimport) *\(? *'([^']+)'/g)].map(([, name]) => name!)
  return [...new Set(found.map((name) => (name.startsWith('.') ? name : packageOf(name))))].filter((name) => !name.startsWith('node:'))
}

function packageOf(specifier: string): string {
  return specifier
    .split('/')
    .slice(0, specifier.startsWith('@') ? 2 : 1)
    .join('/')
}

export interface Surroundings {
  /** Packages that a program may import. */
  readonly packages: ReadonlySet<string>
  /** Those of the benchmark. */
  readonly peers: ReadonlySet<string>
  /** The text of a file of the project; nothing where there is none. */
  read(path: string): string | undefined
  /** The texts of the tests of clients (test/clients), which compile and run what imports them. */
  readonly clients: readonly string[]
}

/** Packages of a program that are nobody's here. */
export function foreign(block: Block, { packages }: Pick<Surroundings, 'packages'>): string[] {
  return importsOf(block.code).filter((name) => !name.startsWith('.') && !packages.has(name))
}

/** Whether it is for the tests of clients to compile and run. */
export function isClients(block: Block, surroundings: Surroundings): boolean {
  return block.language === 'ts' && block.of === undefined && foreign(block, surroundings).length > 0
}

/** What is wrong with how a document's blocks say who checks them; each with its place. */
export function complaints(blocks: readonly Block[], surroundings: Surroundings): string[] {
  return blocks.flatMap((block, index) =>
    complaint(block, blocks, index, surroundings).map((text) => `${block.document}:${block.line}: ${text}`),
  )
}

function complaint(block: Block, all: readonly Block[], index: number, surroundings: Surroundings): string[] {
  const { document, language, by } = block
  const name = document.split('/').at(-1)!
  if (NOT_CODE.has(language)) return []
  if (by !== undefined) {
    const text = surroundings.read(by)
    if (text === undefined) return [`there is no ${by}`]
    return text.includes(name) ? [] : [`${by} says nothing of ${name}`]
  }
  if (block.of !== undefined) return surroundings.peers.has(block.of) ? [] : [`${block.of} is no package of the benchmark's`]
  if (!CHECKED.has(language)) {
    return block.notRun ? [] : [`nobody checks a block of "${language}": name a test with by=, or say no-run: and why`]
  }
  if (isClients(block, surroundings)) {
    if (surroundings.clients.some((text) => text.includes(name))) return []
    return [`it imports ${foreign(block, surroundings).join(', ')}, and no test of test/clients says ${name}`]
  }
  const before = all.slice(0, index).findLast((other) => other.language === language)
  if (block.continued && (before === undefined || before.by || before.of)) return [`before it is nothing of "${language}" to go on with`]
  if (language !== 'ts' || block.notRun || outputsOf(block).length > 0) return []
  if (all.slice(index + 1).find((other) => other.language === language)?.continued) return []
  if (block.file === undefined) return ['it says nothing of what it prints (// → …), nor why it is not run (no-run: …)']
  return isUsed(block, all) ? [] : [`nobody imports or starts ${block.file}`]
}

function isUsed({ file }: Block, all: readonly Block[]): boolean {
  if (file!.endsWith('.test.ts')) return true
  return all.some(
    (other) =>
      (other.language === 'ts' && importsOf(other.code).includes(`./${file}`)) ||
      (other.language === 'sh' && new RegExp(`\\bnode ${file!.replaceAll('.', '\\.')}\\b`).test(other.code)),
  )
}
