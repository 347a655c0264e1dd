import type { Request } from '../../src/index.ts'
import { type Player, text } from './player.ts'
import { ANSWERED, ASKED, HEADERS, type Step } from './steps.ts'
import { GRAIN_MS } from './worlds.ts'

type Do<Name extends Step['do']> = Extract<Step, { do: Name }>

const TIMEOUT_MS = 3 * GRAIN_MS

export const requestActions = {
  async respond(player: Player, { bus, subject, concurrency }: Do<'respond'>, n: number) {
    const { requestReply } = await player.bus(bus)
    const responding = requestReply.respond(ANSWERED[subject] as string, (request) => handle(player, request), { concurrency })
    player.start(`${n} respond`, responding, (responder) => {
      player.responders.push({ responder, open: true })
      return 'responding'
    })
  },

  closeResponder(player: Player, { responder: back }: Do<'closeResponder'>, n: number) {
    const picked = player.pick(player.responders, back)
    if (!picked) return 'no responder'
    picked.open = false
    player.start(`${n} closeResponder`, picked.responder.close(), () => null)
    return undefined
  },

  async request(player: Player, { bus, subject, headers, kind, end }: Do<'request'>, n: number) {
    const { requestReply } = await player.bus(bus)
    const given = HEADERS[headers]
    const asked = requestReply.request(ASKED[subject] as string, `${kind} ${n}`, {
      timeoutMs: TIMEOUT_MS,
      ...(given === undefined ? {} : { headers: given }),
    })
    player.start(`${n} request`, asked, text)
    if (kind !== 'hang') return undefined
    let refused = false
    const before = player.handling
    asked.catch(() => {
      refused = true
    })
    await player.world.until(() => refused || player.handling > before, true)
    if (end === 'time') await player.advance(TIMEOUT_MS)
    else await Promise.all(player.responders.map(({ responder }) => responder.close()))
    return undefined
  },
}

/** What it does is in the request: which of several responders gets it is not promised. */
async function handle(player: Player, { payload, subject, headers, signal }: Request): Promise<string> {
  const asked = text(payload)
  const [kind] = asked.split(' ')
  if (kind === 'empty') return ''
  if (kind === 'throw') throw new Error(`no: ${asked}\nat all`)
  if (kind === 'wrong') return 5 as unknown as string
  if (kind !== 'hang') return `${asked} on ${subject} with ${JSON.stringify(Object.entries(headers).toSorted())}`
  player.handling++
  const aborted = Promise.withResolvers<never>()
  signal.addEventListener('abort', () => aborted.reject(new Error('told to stop')), { once: true })
  return aborted.promise
}
