import { conformanceWhereTheDefaultIs } from './support/server/isolation.ts'

await conformanceWhereTheDefaultIs('repeatable read')
