// Whole lines out of chunks of UTF-8.

/** A function that takes chunks and gives `onLine` each line, without its end. */
export function lines(onLine) {
  let rest = ''
  const decoder = new TextDecoder()
  return (chunk) => {
    const parts = (rest + decoder.decode(chunk, { stream: true })).split(/\r?\n/)
    rest = parts.pop() ?? ''
    for (const line of parts) onLine(line)
  }
}
