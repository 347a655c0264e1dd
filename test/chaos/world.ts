/** What there is in a chaos run: subjects, durables, queues, keys, and the processes that use them. */

export const SCHEMA = 'klieo'
export const BUCKET = 'chaos'

export const SUBJECTS: readonly string[] = ['orders.eu', 'orders.us', 'orders.asia.north', 'stock.eu', 'stock.us', 'capped.x', 'capped.y']

export interface Durable {
  readonly name: string
  readonly filter: string
  readonly ackWaitMs: number
  readonly maxDeliver?: number
  /** The processes with a member; one name more than once: several members in it. */
  readonly members: readonly string[]
  /** How its members settle: see consumer-child.ts. */
  readonly manner: 'prompt' | 'careful' | 'rough' | 'transactional' | 'failing'
  /** What a stream of it holds at once. @default 8 */
  readonly maxInFlight?: number
  /** It comes into being while messages are published. */
  readonly late?: boolean
}

export const DURABLES: readonly Durable[] = [
  { name: 'everything', filter: '>', ackWaitMs: 3_000, members: ['consumer-1', 'consumer-2', 'consumer-3'], manner: 'careful' },
  { name: 'solo', filter: 'orders.>', ackWaitMs: 20_000, members: ['consumer-1'], manner: 'prompt' },
  { name: 'regions', filter: '*.eu', ackWaitMs: 1_500, members: ['consumer-1', 'consumer-2', 'consumer-2', 'consumer-3'], manner: 'rough' },
  { name: 'exact', filter: 'stock.*', ackWaitMs: 2_000, members: ['consumer-2', 'consumer-3'], manner: 'transactional' },
  { name: 'capped', filter: 'capped.>', ackWaitMs: 1_000, maxDeliver: 3, members: ['consumer-1', 'consumer-3'], manner: 'failing' },
  // One message at a time: when each was handed out is known.
  {
    name: 'single',
    filter: 'capped.x',
    ackWaitMs: 1_200,
    maxInFlight: 1,
    members: ['consumer-2', 'consumer-2', 'consumer-3'],
    manner: 'rough',
  },
  { name: 'letters', filter: '*.dlq', ackWaitMs: 2_000, members: ['consumer-2'], manner: 'careful' },
  { name: 'late', filter: 'orders.asia.*', ackWaitMs: 2_000, members: ['consumer-3'], manner: 'rough', late: true },
]

/** `work` is for Workers, the others for loops that claim. */
export const QUEUES = ['work', 'claims', 'brittle'] as const
export const MAX_ATTEMPTS: Readonly<Record<string, number>> = { work: 5, claims: 4, brittle: 2 }

/** Few, so that everybody meets. */
export const KEYS = ['k0', 'k1', 'k2', 'k3'] as const
export const LEASES = ['l0', 'l1'] as const

export type Role = 'publisher' | 'consumer' | 'worker' | 'keys' | 'caller'

export interface Post {
  readonly name: string
  readonly role: Role
  /** Whether it may be the one process that reaps and prunes: few, so that a kill often hits it. */
  readonly maintenance: boolean
}

export const POSTS: readonly Post[] = [
  { name: 'publisher-1', role: 'publisher', maintenance: false },
  { name: 'publisher-2', role: 'publisher', maintenance: false },
  { name: 'consumer-1', role: 'consumer', maintenance: false },
  { name: 'consumer-2', role: 'consumer', maintenance: true },
  { name: 'consumer-3', role: 'consumer', maintenance: false },
  { name: 'worker-1', role: 'worker', maintenance: true },
  { name: 'worker-2', role: 'worker', maintenance: true },
  { name: 'keys-1', role: 'keys', maintenance: false },
  { name: 'keys-2', role: 'keys', maintenance: false },
  { name: 'caller-1', role: 'caller', maintenance: false },
  { name: 'caller-2', role: 'caller', maintenance: false },
]

/** What a child is told when it starts. */
export interface Assignment extends Post {
  readonly incarnation: number
  readonly seed: string
  readonly connectionString: string
  /** Of the record. */
  readonly directory: string
  /** Pauses are divided by it. */
  readonly rate: number
}

/**
 * What a child is told later, a JSON line each.
 *
 * `rejoin`: close the bus in order and open another. `gentle`: settle everything at once, begin nothing. `end`: close everything.
 */
export type Order = { readonly do: 'rejoin' | 'gentle' | 'end' }

/** What a child says, a JSON line each. */
export interface Word {
  readonly ready?: true
  /** Nothing that it began is under way any more. */
  readonly calm?: true
  readonly ended?: true
  /** A call that got no answer for a minute. */
  readonly hung?: unknown
  readonly calls?: number
  readonly delivered?: number
}
