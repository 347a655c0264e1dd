import {
  type Bus,
  BusError,
  checkBucket,
  type KvChange,
  type KvDeleteOptions,
  type KvEntry,
  type KvPutOptions,
  type KvWatch,
  type KvWatchOptions,
  type Revision,
} from '../core/index.ts'
import { partOf } from './calls.ts'
import { Form, type Format, type FormatOptions, type InputOf, type OutputOf } from './format.ts'

export interface TypedEntry<Data> extends KvEntry {
  /** What the schema made of the value. */
  readonly data: Data
}

export type TypedChange<Data> =
  | { readonly operation: 'put'; readonly entry: TypedEntry<Data> }
  | { readonly operation: 'delete'; readonly key: string; readonly revision: Revision }
  /** A put of what cannot be decoded or does not match, as it is, and why. */
  | { readonly operation: 'invalid'; readonly entry: KvEntry; readonly reason: string }

export interface TypedWatch<Data> extends AsyncIterable<TypedChange<Data>>, AsyncDisposable {
  close(): Promise<void>
}

/** A bucket and what its values hold. */
export interface BucketContract<In, Out = In> {
  readonly bucket: string
  /**
   * As `kv.get`, and the entry has its `data`.
   * @throws conflict when what is there does not match: read it with `kv.get`, overwrite it or delete it
   */
  get<Tx>(bus: Pick<Bus<Tx>, 'kv'>, key: string): Promise<TypedEntry<Out> | null>
  /** As `kv.put`, of data. @throws invalid_argument when the data does not match, and then nothing was written */
  put<Tx>(bus: Pick<Bus<Tx>, 'kv'>, key: string, data: In, options?: KvPutOptions<NoInfer<Tx>>): Promise<Revision>
  /** As `kv.cas`, of data. @throws invalid_argument as `put`; cas_conflict */
  cas<Tx>(
    bus: Pick<Bus<Tx>, 'kv'>,
    key: string,
    data: In,
    expected: Revision | null,
    options?: KvPutOptions<NoInfer<Tx>>,
  ): Promise<Revision>
  delete<Tx>(bus: Pick<Bus<Tx>, 'kv'>, key: string, options?: KvDeleteOptions<NoInfer<Tx>>): Promise<void>
  keys<Tx>(bus: Pick<Bus<Tx>, 'kv'>, filter?: string): AsyncIterable<string>
  /** As `kv.watch`. What does not match comes as `invalid`, and the watch goes on: no change is skipped (K6). */
  watch<Tx>(bus: Pick<Bus<Tx>, 'kv'>, filter?: string, options?: KvWatchOptions): Promise<TypedWatch<Out>>
}

/**
 * What the values of a bucket hold, said once for those who write and those who read.
 *
 * @param format a schema or a codec: `format.ts`. Without one the data is JSON of the type `T` and is not validated; what is not JSON does not match
 * @throws invalid_argument
 */
export function defineBucket<F extends Format>(bucket: string, format: F, options?: FormatOptions): BucketContract<InputOf<F>, OutputOf<F>>
export function defineBucket<T = unknown>(bucket: string): BucketContract<T>
export function defineBucket(bucket: string, format?: Format, options?: FormatOptions): BucketContract<unknown> {
  checkBucket(bucket, 'read')
  return new DefinedBucket(bucket, Form.of(format, options))
}

class DefinedBucket<In, Out> implements BucketContract<In, Out> {
  readonly bucket: string
  readonly #form: Form<In, Out>

  constructor(bucket: string, form: Form<In, Out>) {
    this.bucket = bucket
    this.#form = form
  }

  async get<Tx>(bus: Pick<Bus<Tx>, 'kv'>, key: string): Promise<TypedEntry<Out> | null> {
    const entry = await partOf(bus, 'kv').get(this.bucket, key)
    if (!entry) return null
    const reading = await this.#form.read(entry.value)
    if (reading.matches) return { ...entry, data: reading.data }
    throw new BusError(
      'conflict',
      `key "${key}" of bucket "${this.bucket}", at revision ${entry.revision}, does not match: ${reading.reason}; read it with kv.get, overwrite it or delete it`,
    )
  }

  async put<Tx>(bus: Pick<Bus<Tx>, 'kv'>, key: string, data: In, options?: KvPutOptions<Tx>): Promise<Revision> {
    const kv = partOf(bus, 'kv')
    const written = this.#form.write(data)
    return await kv.put(this.bucket, key, written instanceof Promise ? await written : written, options)
  }

  async cas<Tx>(bus: Pick<Bus<Tx>, 'kv'>, key: string, data: In, expected: Revision | null, options?: KvPutOptions<Tx>): Promise<Revision> {
    const kv = partOf(bus, 'kv')
    const written = this.#form.write(data)
    return await kv.cas(this.bucket, key, written instanceof Promise ? await written : written, expected, options)
  }

  async delete<Tx>(bus: Pick<Bus<Tx>, 'kv'>, key: string, options?: KvDeleteOptions<Tx>): Promise<void> {
    await partOf(bus, 'kv').delete(this.bucket, key, options)
  }

  async *keys<Tx>(bus: Pick<Bus<Tx>, 'kv'>, filter?: string): AsyncGenerator<string, void, undefined> {
    yield* partOf(bus, 'kv').keys(this.bucket, filter)
  }

  async watch<Tx>(bus: Pick<Bus<Tx>, 'kv'>, filter?: string, options?: KvWatchOptions): Promise<TypedWatch<Out>> {
    return new ReadingWatch(await partOf(bus, 'kv').watch(this.bucket, filter, options), this.#form)
  }
}

class ReadingWatch<Out> implements TypedWatch<Out> {
  readonly #watch: KvWatch
  readonly #form: Form<never, Out>

  constructor(watch: KvWatch, form: Form<never, Out>) {
    this.#watch = watch
    this.#form = form
  }

  [Symbol.asyncIterator](): AsyncIterator<TypedChange<Out>, undefined> {
    const changes = this.#watch[Symbol.asyncIterator]()
    return {
      next: async () => {
        const { done, value } = await changes.next()
        return done ? { done, value: undefined } : { done: false, value: await this.#read(value) }
      },
    }
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  close(): Promise<void> {
    return this.#watch.close()
  }

  async #read(change: KvChange): Promise<TypedChange<Out>> {
    if (change.operation === 'delete') return change
    const { entry } = change
    const reading = await this.#form.read(entry.value)
    if (reading.matches) return { operation: 'put', entry: { ...entry, data: reading.data } }
    return { operation: 'invalid', entry, reason: reading.reason }
  }
}
