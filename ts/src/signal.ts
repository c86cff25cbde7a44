/** Waiting that can be broken off. */
import { addAbortListener } from 'node:events'

/** What every call that waits takes. */
export interface Abortable {
  /** Breaks off the wait: the promise is rejected with the signal's reason. */
  signal?: AbortSignal | undefined
}

/** `promise`, or a rejection with the reason of `signal` if that comes first. */
export async function abortable<T>(promise: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (!signal) return await promise
  // Whoever stops waiting must not leave an unhandled rejection behind.
  promise.catch(() => {})
  signal.throwIfAborted()
  let abort: Disposable | undefined
  try {
    return await Promise.race([
      promise,
      new Promise<never>((_, reject) => {
        abort = addAbortListener(signal, () => reject(signal.reason))
      }),
    ])
  } finally {
    abort?.[Symbol.dispose]()
  }
}
