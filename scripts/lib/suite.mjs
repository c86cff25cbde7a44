// Commands that run one after the other in one shell somewhere else, and whose ends are told apart by markers in the output.

/** ASCII's record separator: nothing that a test prints begins a line with it. */
const MARK = '\x1e'

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`

/**
 * A shell script that runs each command whatever became of the one before; all output on stdout.
 * @param {{ args: string[], cwd: string, env?: Record<string, string> }[]} commands
 */
export function script(commands) {
  return commands
    .map(({ args, cwd, env = {} }) => {
      const variables = Object.entries(env).map(([name, value]) => `${name}=${quoted(value)} `)
      const line = `cd ${quoted(cwd)} && ${variables.join('')}${args.map(quoted).join(' ')}`
      return `(${line}) 2>&1\nprintf '\\n\\036%d\\n' $?\n`
    })
    .join('')
}

/** Reads the markers out of the script's output again. */
export function markers() {
  const statuses = []
  return {
    /** Exit statuses of the commands that have ended. */
    statuses,
    /** True if the line was a marker. */
    take(line) {
      if (!line.startsWith(MARK)) return false
      statuses.push(Number(line.slice(MARK.length)))
      return true
    },
  }
}
