/** Asks and answers: in time, too late, with an error, or not at all. */

import { once } from 'node:events'
import { Member, text } from './member.ts'
import { now } from './record.ts'

const REQUESTERS = 3
const EVERY_MS = 250
const TIMEOUT_MS = 1_500
/** Beside what the two responders answer, what only the one with a wildcard does, and what nobody does. */
const SUBJECTS = { 'svc.sum': 10, 'svc.other': 5, 'nobody.there': 1 } as const
const RESPONDER_LIFE_MS = 15_000

const member = await Member.start()

for (const filter of ['svc.sum', 'svc.*']) {
  const dice = member.dice(`responder ${filter}`)
  member.takes(async () => {
    const { requestReply } = await member.bus()
    const responder = await requestReply.respond(filter, async ({ payload }) => {
      const id = text(payload)
      member.recorder.write({ kind: 'handling', at: now(), id })
      const how = dice.weighted({ once: 75, slowly: 15, late: 5, fails: 5 })
      if (how === 'fails') throw new Error(`no: ${id}`)
      if (how !== 'once') await member.hold(how === 'late' ? TIMEOUT_MS * 1.5 : dice.between(50, 500))
      return `re:${id}`
    })
    await untilClosed(dice.between(RESPONDER_LIFE_MS / 2, RESPONDER_LIFE_MS * 2))
    await responder.close()
  })
}

/** Until the bus closes, everything ends, or some time is over. */
async function untilClosed(ms: number): Promise<void> {
  const rejoining = Promise.withResolvers<void>()
  const onRejoin = async () => rejoining.resolve()
  member.onRejoin.add(onRejoin)
  await Promise.race([member.pause(ms), rejoining.promise, member.ended.aborted ? undefined : once(member.ended, 'abort')])
  member.onRejoin.delete(onRejoin)
}

for (let n = 1; n <= REQUESTERS; n++) {
  const dice = member.dice(`requester ${n}`)
  member.produces(EVERY_MS, async () => {
    const { requestReply } = await member.bus()
    const id = member.id()
    const subject = dice.weighted(SUBJECTS)
    await member.call(
      { do: 'request', id, subject, timeoutMs: TIMEOUT_MS },
      () => requestReply.request(subject, id, { timeoutMs: TIMEOUT_MS }),
      (reply) => ({ reply: text(reply) }),
    )
  })
}
