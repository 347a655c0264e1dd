export { type BucketContract, defineBucket, type TypedChange, type TypedEntry, type TypedWatch } from './bucket.ts'
export { bytes, type Codec, type Format, type FormatOptions, type InputOf, json, type OutputOf } from './format.ts'
export {
  defineQueue,
  type QueueContract,
  type TypedEnqueueOptions,
  type TypedJob,
  type TypedJobHandler,
  type TypedJobOptions,
  type TypedNewJob,
} from './queue.ts'
export type { Explain } from './reason.ts'
export { defineRequest, type Exchange, type RequestContract, type RequestFilterContract, type RequestFormats } from './request.ts'
export type { TypedMsg, TypedMsgStream, TypedSubscribeOptions } from './stream.ts'
export { defineSubject, type FilterContract, type SubjectContract, type SubjectIn, type TypedMessage } from './subject.ts'
