/** The bridge: none lost, none twice, in order, one at a time. Their tests need a nats-server; without one these are skipped. */

import type { Mutant } from '../mutant.ts'

const BRIDGE = 'src/bridge/bridge.ts'
const RELAY = 'src/bridge/relay.ts'
const TESTS = 'test/bridge/bridge.test.ts'
const ORDER = 'test/bridge/order.test.ts'
const CIRCLE = 'B6 two bridges in a circle'
const FOLLOWS = 'B4 one that dies is followed within twice the ack wait'

export const bridgeMutants: readonly Mutant[] = [
  {
    id: 'bridge-acks-first',
    rule: 'B1',
    guarantee: 'a message is acked at the source once the target has stored it',
    broken: 'it is acked when it is read',
    edits: [
      {
        file: RELAY,
        find: 'else if (!this.#recovering) this.#push(held)',
        replace: 'else if (!this.#recovering) { msg.ack().catch(() => {}); this.#push(held) }',
      },
    ],
    files: [TESTS],
    caughtBy: ['B1 B3 while the target is away nothing is acked'],
    beside: [CIRCLE],
  },
  {
    id: 'bridge-ids-of-no-meaning',
    rule: 'B2',
    guarantee: 'a message that is published again is stored once',
    broken: 'each publish has an id of its own',
    edits: [{ file: RELAY, find: '      msgId: id,\n', replace: '      msgId: crypto.randomUUID(),\n' }],
    files: [TESTS],
    caughtBy: ['B2 what a bridge published and did not come to ack is stored once'],
    beside: [CIRCLE],
  },
  {
    id: 'bridge-forgets',
    rule: 'B2',
    guarantee: 'what a process has published it does not publish again',
    broken: 'it remembers nothing',
    edits: [{ file: RELAY, find: 'published.add(held.id)', replace: 'published.has(held.id)' }],
    files: [TESTS],
    caughtBy: ['B2 B8 the source is away for longer than the ack wait', 'B2 what the target stored while the reading ended'],
    beside: [CIRCLE],
  },
  {
    id: 'bridge-waits-for-nobody',
    rule: 'B3',
    guarantee: 'what a dead bridge had in hand is stored before what came later',
    broken: 'it relays what comes, as it comes',
    edits: [{ file: RELAY, find: 'this.#recovering = out > 0 ?', replace: 'this.#recovering = out < 0 ?' }],
    files: [ORDER],
    caughtBy: ['B3 A and B in the hands of a dead one and C published later'],
    beside: [FOLLOWS],
  },
  {
    id: 'bridge-overtakes',
    rule: 'B3',
    guarantee: 'of a subject one message at a time is under way to NATS',
    broken: 'each goes by itself',
    edits: [{ file: RELAY, find: 'this.#isWhole ? ALL : held.msg.subject', replace: 'this.#isWhole ? ALL : held.id' }],
    files: [TESTS],
    caughtBy: ['B1 B3 while the target is away nothing is acked'],
    beside: [CIRCLE],
  },
  {
    id: 'bridge-goes-on-after-a-lost-fetch',
    rule: 'B3',
    guarantee: 'after a fetch whose answer was lost, what it was handed comes first',
    broken: 'the reading goes on',
    edits: [
      {
        file: RELAY,
        find: 'this.#isInterrupted = true\n          this.#trouble(error)\n          this.#end()',
        replace: 'this.#trouble(error)',
      },
    ],
    files: [ORDER],
    caughtBy: ['B3 a fetch whose answer is lost between two messages of a subject'],
    beside: [FOLLOWS],
  },
  {
    id: 'bridge-holds-a-lease-of-its-own',
    rule: 'B4',
    guarantee: 'of bridges with one durable one relays',
    broken: 'each holds another lease',
    edits: [{ file: BRIDGE, find: 'kv.lease(LEASE_BUCKET, durable,', replace: 'kv.lease(LEASE_BUCKET, crypto.randomUUID(),' }],
    files: [ORDER],
    caughtBy: ['B4 the second waits'],
    beside: ['B3 A and B in the hands of a dead one'],
  },
  {
    id: 'bridge-drops-what-is-refused',
    rule: 'B5',
    guarantee: 'what the target does not take is on the dead-letter subject',
    broken: 'it is acked and gone',
    edits: [{ file: RELAY, find: 'if (!isDeadLetter(msg)) await', replace: 'if (isDeadLetter(msg)) await' }],
    files: [TESTS],
    caughtBy: ['B5 what the target does not take gets a letter'],
    beside: [CIRCLE],
  },
  {
    id: 'bridge-in-a-circle',
    rule: 'B6',
    guarantee: 'what came from the target is not sent back',
    broken: 'it is',
    edits: [{ file: RELAY, find: '.includes(toId) === true', replace: ".includes('nobody') === true" }],
    files: [TESTS],
    caughtBy: [CIRCLE],
    beside: ['B7 stop relays what was read'],
  },
]
