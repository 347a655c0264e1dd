import type { Msg, MsgStream, PublishOptions, SubscribeOptions } from '../../src/index.ts'
import { Ref, type Seen } from './compare.ts'
import { type HeldStream, type Player, text } from './player.ts'
import { DURABLES, FILTERS, HEADERS, IDS, type Start, type Step, SUBJECTS } from './steps.ts'

type Do<Name extends Step['do']> = Extract<Step, { do: Name }>

interface Letter {
  readonly ok: { readonly subject: string; readonly payload: string }
}

/** By whom they are read. */
const LETTERS: Readonly<Record<string, string>> = { '*.dlq': 'letters', '*.*.dlq': 'letters-too' }

const filterOf = (subject: string) => (subject.split('.').length === 2 ? '*.dlq' : '*.*.dlq')

export const pubsubActions = {
  async publish(player: Player, { bus, subject, headers, msgId }: Do<'publish'>, n: number) {
    const { pubsub } = await player.bus(bus)
    player.start(`${n} publish`, pubsub.publish(SUBJECTS[subject] as string, `m${n}`, options(headers, msgId)), (ack) =>
      ackSeen(player, ack),
    )
  },

  async publishMany(player: Player, { bus, messages }: Do<'publishMany'>, n: number) {
    const { pubsub } = await player.bus(bus)
    const published = pubsub.publishMany(
      messages.map(({ subject, headers, msgId }, index) => ({
        subject: SUBJECTS[subject] as string,
        payload: `m${n}.${index}`,
        ...options(headers, msgId),
      })),
    )
    player.start(`${n} publishMany`, published, (acks) => acks.map((ack) => ackSeen(player, ack)))
  },

  async subscribe(player: Player, { bus: which, durable: name, filter, start, ...rest }: Do<'subscribe'>, n: number) {
    const bus = await player.bus(which)
    const durable = DURABLES[name] as string
    // Each member has one at a time: which member gets which of those that are fetched together is not promised.
    const subscription = bus.pubsub.subscribe(FILTERS[filter] as string, durable, {
      start: startOf(player, start),
      maxInFlight: 1,
      ...rest,
    })
    player.start(`${n} subscribe`, subscription, (stream) => {
      player.streams.push({ bus, durable, stream, iterator: stream[Symbol.asyncIterator](), asking: false, over: false })
      return 'subscribed'
    })
  },

  read(player: Player, { stream: back }: Do<'read'>, n: number) {
    const picked = player.pickOpen(player.streams, back, ({ over }) => over)
    if (!picked) return 'no stream'
    // Two members that wait: which one gets it is not promised.
    if (player.streams.some(({ durable, asking }) => asking && durable === picked.durable)) return 'somebody waits'
    picked.asking = true
    const asked = picked.iterator.next()
    asked.then(
      ({ done }) => {
        picked.asking = false
        picked.over = done === true
      },
      () => {
        picked.asking = false
        picked.over = true
      },
    )
    player.start(`${n} read`, asked, (result) => (result.done ? 'the end' : yielded(player, picked, result.value)))
    return undefined
  },

  settle(player: Player, { delivery: back, how, delayMs }: Do<'settle'>, n: number) {
    const picked = player.pickOpen(player.deliveries, back, ({ settled }) => settled)
    if (!picked) return 'no delivery'
    const { msg } = picked
    const settled = { ack: () => msg.ack(), nak: () => msg.nak(delayMs), term: () => msg.term('done with'), extend: () => msg.extend() }[
      how
    ]()
    player.start(`${n} ${how} of ${text(msg.payload)} (${msg.attempt})`, settled, () => {
      if (how !== 'extend') picked.settled = true
      return null
    })
    return undefined
  },

  closeStream(player: Player, { stream: back }: Do<'closeStream'>, n: number) {
    const picked = player.pick(player.streams, back)
    if (!picked) return 'no stream'
    picked.over = true
    player.start(`${n} closeStream`, picked.stream.close(), () => null)
    return undefined
  },

  async deleteDurable(player: Player, { bus, durable }: Do<'deleteDurable'>, n: number) {
    const { pubsub } = await player.bus(bus)
    player.start(`${n} deleteDurable`, pubsub.deleteDurable(DURABLES[durable] as string), () => null)
  },

  /** Reads what there is, in batches and ahead, and acks it. */
  async consume(player: Player, { bus, durable: name, filter }: Do<'consume'>, _n: number, hint: Seen) {
    const durable = DURABLES[name] as string
    if (player.streams.some((stream) => stream.asking && stream.durable === durable)) return 'somebody waits'
    const { pubsub } = await player.bus(bus)
    return drain(player, pubsub.subscribe(FILTERS[filter] as string, durable), hint)
  },

  async letters(player: Player, { bus }: Do<'letters'>, _n: number, hint: Seen) {
    const { pubsub } = await player.bus(bus)
    await player.world.maintain()
    const seen: Letter[] = []
    // Names of queues have one token or two.
    for (const [filter, durable] of Object.entries(LETTERS)) {
      const expected = Array.isArray(hint) ? (hint as Letter[]).filter(({ ok }) => filterOf(ok.subject) === filter) : undefined
      const some = await drain(player, pubsub.subscribe(filter, durable, { maxInFlight: 20 } satisfies SubscribeOptions), expected as Seen)
      if (!Array.isArray(some)) return some
      seen.push(...(some as Letter[]))
    }
    // What ends at the same time ends in no promised order.
    const key = (letter: Letter) => `${letter.ok.subject} ${letter.ok.payload}`
    return seen.toSorted((a, b) => (key(a) < key(b) ? -1 : 1))
  },
}

async function drain(player: Player, subscription: Promise<MsgStream>, hint: Seen): Promise<Seen> {
  const expected = Array.isArray(hint) ? hint.length : undefined
  let stream: MsgStream | undefined
  const subscribed = await player.soFar(
    subscription,
    (opened) => {
      stream = opened
      return 'subscribed'
    },
    false,
  )
  if (!stream) return subscribed
  const iterator = stream[Symbol.asyncIterator]()
  const seen: Seen[] = []
  for (;;) {
    let msg: Msg | undefined
    const one = await player.soFar(
      iterator.next(),
      (result) => {
        if (result.done) return 'the end'
        msg = result.value
        return messageSeen(msg)
      },
      seen.length === expected,
    )
    if (!msg) {
      await stream.close()
      return one === 'nothing yet' ? seen : { seen, end: one }
    }
    seen.push(one)
    await msg.ack()
  }
}

function yielded(player: Player, { bus, durable }: HeldStream, msg: Msg): Seen {
  player.deliveries.push({ bus, of: durable, msg, settled: false })
  if (!player.seqs.includes(msg.seq)) player.seqs.push(msg.seq)
  return messageSeen(msg)
}

const LETTER_REFS: ReadonlyMap<string, string> = new Map([
  ['dlq_seq', 'seq'],
  ['dlq_job_id', 'job'],
])

function messageSeen(msg: Msg): Seen {
  const letter = msg.subject.endsWith('.dlq')
  const headers = Object.entries(msg.headers).map(([name, value]): [string, Seen] => {
    const scope = letter ? LETTER_REFS.get(name) : undefined
    return [name, scope === undefined ? value : new Ref(scope, scope === 'seq' ? Number(value) : value, scope === 'seq')]
  })
  return {
    subject: msg.subject,
    payload: text(msg.payload),
    attempt: msg.attempt,
    headers: Object.fromEntries(headers),
    seq: new Ref('seq', msg.seq, !letter),
  }
}

function ackSeen(player: Player, { seq, duplicate }: { seq: number; duplicate: boolean }): Seen {
  if (!player.seqs.includes(seq)) player.seqs.push(seq)
  return { seq: new Ref('seq', seq), duplicate }
}

function options(headers: number, msgId: number | undefined): PublishOptions<never> {
  const given = HEADERS[headers]
  return { ...(given === undefined ? {} : { headers: given }), ...(msgId === undefined ? {} : { msgId: IDS[msgId] as string }) }
}

export function startOf(player: Player, start: Start): NonNullable<SubscribeOptions['start']> {
  if (typeof start === 'string') return start
  if ('agoMs' in start) player.ahead ||= start.agoMs < 0
  if ('agoMs' in start) return { time: new Date(player.world.now() - start.agoMs) }
  return { seq: player.pick(player.seqs, start.seq) ?? 0 }
}
