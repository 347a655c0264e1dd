/**
 * How data becomes bytes and bytes become data again: a schema (any Standard Schema validator, over JSON), or a codec.
 *
 * What is sent is the data as the sender gave it, encoded. The schema runs at both ends on the same thing, what the bytes say: the sender decodes
 * what he is about to send and validates that, only to refuse it; the receiver validates what he got, and what the schema makes of it counts
 * (transforms, defaults, coercions). So whatever was sent is accepted again by the same schema, and a transform is never applied twice. A schema of values
 * that JSON cannot hold (`z.date()`) refuses at the sender, the first time: `z.coerce.date()` and `z.iso.datetime()` are what JSON can hold.
 */

import type { StandardSchemaV1 } from '@standard-schema/spec'
import { BusError, decode, encode, invalid, isBusError, optionsOf, type Payload, toBytes } from '../core/index.ts'
import { type Explain, reasonOf } from './reason.ts'

/**
 * What turns values into payloads and back. What it throws refuses the value: at the sender, who decodes again what he is about to send, the call; at
 * the receiver the payload.
 */
export interface Codec<In = unknown, Out = In> {
  readonly encode: (value: In) => Payload
  /** @param payload may be kept */
  readonly decode: (payload: Uint8Array) => Out
}

/** A Standard Schema validator (zod, valibot, arktype, …), or a codec. */
export type Format = StandardSchemaV1 | Codec<never, unknown>

/** What the sender of such data gives. */
export type InputOf<F extends Format> = F extends StandardSchemaV1
  ? StandardSchemaV1.InferInput<F>
  : F extends Codec<infer In, unknown>
    ? In
    : never

/** What its receiver gets. */
export type OutputOf<F extends Format> = F extends StandardSchemaV1
  ? StandardSchemaV1.InferOutput<F>
  : F extends Codec<never, infer Out>
    ? Out
    : never

export interface FormatOptions {
  /** What the schema's values are encoded with. Not together with a codec in the schema's place. @default JSON */
  readonly codec?: Codec
  /**
   * What to say of an issue of the schema's, beside its path, in errors and in `dlq_reason`. `(issue) => issue.message` is right where the schema's
   * messages quote nothing secret: those of many validators repeat the value.
   * @default what the schema expected there, as far as it says so without quoting a value
   */
  readonly explain?: Explain
}

export type Reading<Out> = { readonly matches: true; readonly data: Out } | { readonly matches: false; readonly reason: string }
export type Maybe<T> = T | Promise<T>

const JSON_CODEC: Codec = Object.freeze({ encode, decode: (payload: Uint8Array) => decode(payload) })
const BYTES: Codec<Payload, Uint8Array> = Object.freeze({ encode: (value: Payload) => value, decode: (payload: Uint8Array) => payload })

/** JSON that is not validated, for a type alone: nobody looks whether the receiver gets a `T`. JSON knows no Date and no undefined. */
export function json<T>(): Codec<T> {
  return JSON_CODEC as Codec<T>
}

/** Payloads as they are: the sender gives bytes or a string, the receiver gets bytes. Nothing fails to match. */
export function bytes(): Codec<Payload, Uint8Array> {
  return BYTES
}

/** One side of a contract: writes what is sent, reads what was received. */
export class Form<In, Out> {
  readonly #codec: Codec
  readonly #schema: StandardSchemaV1 | undefined
  readonly #explain: Explain | undefined

  private constructor(codec: Codec, schema: StandardSchemaV1 | undefined, explain: Explain | undefined) {
    this.#codec = codec
    this.#schema = schema
    this.#explain = explain
  }

  /** @throws invalid_argument */
  static of<In, Out>(format: Format | undefined, options: FormatOptions | undefined, argument = 'format'): Form<In, Out> {
    const { codec, explain } = optionsOf(options, ['codec', 'explain'])
    if (codec !== undefined && !isCodec(codec)) throw invalid('codec', codec, 'must have the functions encode and decode')
    if (explain !== undefined && typeof explain !== 'function') throw invalid('explain', explain, 'must be a function')
    if (format === undefined) return new Form(codec ?? JSON_CODEC, undefined, explain)
    if (isSchema(format)) return new Form(codec ?? JSON_CODEC, format, explain)
    if (!isCodec(format)) throw invalid(argument, format, 'must be a Standard Schema validator, or a codec: { encode, decode }')
    if (codec !== undefined) throw invalid('codec', codec, `must not be given together with a codec as the ${argument}`)
    return new Form(format, undefined, explain)
  }

  /**
   * At once where the schema answers at once, so that calls of one moment are still sent together.
   * @param name what is written, for the message
   * @throws invalid_argument
   */
  write(data: In, name = 'data'): Maybe<Uint8Array> {
    const payload = this.#encode(data, name)
    // What these two encode they decode.
    if (!this.#schema && (this.#codec === JSON_CODEC || this.#codec === BYTES)) return payload
    const reading = this.read(payload)
    const judged = (verdict: Reading<Out>) => {
      if (!verdict.matches) throw new BusError('invalid_argument', `${name} does not match: ${verdict.reason}; nothing was sent`)
      return payload
    }
    return reading instanceof Promise ? reading.then(judged) : judged(reading)
  }

  /** Never throws and never rejects. */
  read(payload: Uint8Array): Maybe<Reading<Out>> {
    let decoded: unknown
    try {
      decoded = this.#codec.decode(payload)
    } catch {
      return refused(this.#codec === JSON_CODEC ? 'not JSON in UTF-8' : 'the codec refused it')
    }
    if (!this.#schema) return { matches: true, data: decoded as Out }
    try {
      const result = this.#schema['~standard'].validate(decoded)
      if (!isThenable(result)) return this.#judge(result)
      return Promise.resolve(result)
        .then((later) => this.#judge(later))
        .catch(() => refused(THREW))
    } catch {
      return refused(THREW)
    }
  }

  #judge(result: StandardSchemaV1.Result<unknown>): Reading<Out> {
    if (result.issues) return refused(reasonOf(result.issues, this.#explain))
    return { matches: true, data: result.value as Out }
  }

  /** Bytes of our own: the caller may change what he gave while a schema takes its time. */
  #encode(data: In, name: string): Uint8Array {
    try {
      const payload = this.#codec.encode(data)
      if (typeof payload === 'string' && !payload.isWellFormed()) throw invalid(name, payload, 'must not hold lone surrogates')
      return toBytes(name, payload)
    } catch (cause) {
      if (isBusError(cause, 'invalid_argument'))
        throw new BusError('invalid_argument', cause.message.startsWith(name) ? cause.message : `${name}: ${cause.message}`, {
          cause: cause.cause,
        })
      throw new BusError('invalid_argument', `${name} cannot be encoded: the codec threw`, { cause })
    }
  }
}

/** A schema that throws instead of answering has refused as well: tried again it would throw again. */
const THREW = 'the schema threw'

function refused(reason: string): { readonly matches: false; readonly reason: string } {
  return { matches: false, reason }
}

/** A promise of another realm or library, taken for an answer, would be one without issues. */
function isThenable<T>(value: Maybe<T>): value is Promise<T> {
  return typeof (value as { readonly then?: unknown }).then === 'function'
}

function isSchema(value: unknown): value is StandardSchemaV1 {
  // Those of arktype are functions.
  if ((typeof value !== 'object' && typeof value !== 'function') || value === null || !('~standard' in value)) return false
  const standard: unknown = value['~standard']
  return typeof standard === 'object' && standard !== null && 'validate' in standard && typeof standard.validate === 'function'
}

function isCodec(value: unknown): value is Codec {
  if (typeof value !== 'object' || value === null || !('encode' in value) || !('decode' in value)) return false
  return typeof value.encode === 'function' && typeof value.decode === 'function'
}
