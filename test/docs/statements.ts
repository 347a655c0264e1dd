/** The blocks of SQL: statement by statement, each with what it answers. */

import type pg from 'pg'
import { expect } from 'vitest'
import { type Block, isOutput } from './document.ts'

interface Statement {
  readonly text: string
  /** In the document. */
  readonly line: number
  /** What the lines `-- → a | b` after it say, a row each. */
  readonly rows: readonly string[]
}

/** Whether it makes roles or settings, which all databases of a server share. */
export function concernsCluster({ code }: Pick<Block, 'code'>): boolean {
  return /\b(create role|create_roles|alter system|alter role|create database)\b/i.test(code)
}

/**
 * A statement ends at a `;` that ends its line, comments apart, outside of a body in dollars.
 * What stands after `-- →` belongs to the statement before it, on its line or below.
 */
export function statementsOf({ code, line }: Pick<Block, 'code' | 'line'>): Statement[] {
  const statements: { text: string; line: number; rows: string[] }[] = []
  let text = ''
  let began = line
  let body: string | undefined
  for (const [index, whole] of code.split('\n').entries()) {
    const [, sql, output] = /^(.*?)(?:-- → (.*))?$/.exec(whole)!
    if (text.trim() === '') began = line + index
    text += `${sql}\n`
    for (const [tag] of sql!.matchAll(/\$\w*\$/g)) body = body === undefined ? tag : body === tag ? undefined : body
    if (body === undefined && /;\s*(--.*)?$/.test(sql!)) {
      statements.push({ text: text.trim(), line: began, rows: [] })
      text = ''
    }
    if (output !== undefined) statements.at(-1)?.rows.push(output.trimEnd())
  }
  if (text.replaceAll(/--.*$/gm, '').trim() !== '') statements.push({ text: text.trim(), line: began, rows: [] })
  return statements
}

/** @throws where one fails, answers something else than it says, or finds nothing and does not say so (`-- → (no rows)`) */
export async function runStatements(client: pg.ClientBase, block: Block): Promise<void> {
  for (const { text, line, rows } of statementsOf(block)) {
    const where = `${block.document}:${line}: ${text}`
    const result = await client.query<unknown[]>({ text, rowMode: 'array' }).catch((error: Error) => {
      throw new Error(`${where}\n${error.message}`, { cause: error })
    })
    const found = result.rows.map((row) => row.map(show).join(' | '))
    if (rows.length === 1 && rows[0] === '(no rows)') expect(found, where).toEqual([])
    else if (rows.length > 0)
      expect(rows.length === found.length && rows.every((row, at) => isOutput(row, found[at]!)), `${where}\n${found.join('\n')}`).toBe(true)
    else if (result.fields.length > 0) expect(found.length, `${where}: finds nothing`).toBeGreaterThan(0)
  }
}

function show(value: unknown): string {
  if (value === null) return ''
  if (value instanceof Date) return value.toISOString()
  if (Buffer.isBuffer(value)) return `\\x${value.toString('hex')}`
  if (typeof value === 'boolean') return value ? 't' : 'f'
  return typeof value === 'object' ? JSON.stringify(value) : String(value)
}
