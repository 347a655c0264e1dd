import { existsSync, readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'

const read = (path: string) => readFileSync(fileURLToPath(new URL(`../../${path}`, import.meta.url)), 'utf8')
const page = read('docs/guarantees.md')
const cited = [...page.matchAll(/^- `([^`]+)` › (.+)$/gm)].map(([, file, title]) => ({ file: file!, title: title! }))

test('docs/guarantees.md cites tests that exist', () => {
  expect(cited.length).toBeGreaterThan(50)
  const missing = cited.filter(
    ({ file, title }) => !existsSync(fileURLToPath(new URL(`../../${file}`, import.meta.url))) || !read(file).includes(title),
  )
  expect(missing).toEqual([])
})

test('docs/guarantees.md has every rule of the contract, each with a test of it', () => {
  const rules = [...read('docs/contract.md').matchAll(/^- \*\*([PRKJATB]\d+)\*\*/gm)].map(([, rule]) => rule!)
  expect(rules.length).toBe(14 + 4 + 6 + 8 + 6 + 10 + 8)
  const sections = page.split(/^### /m).slice(1)
  for (const rule of rules) {
    const section = sections.find((text) => text.startsWith(`${rule} `))
    expect(section, rule).toBeDefined()
    expect(section).toMatch(new RegExp(`^- \`[^\`]+\` › .*\\b${rule}\\b|^- \`[^\`]+\` › `, 'm'))
  }
})
