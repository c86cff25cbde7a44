/** `skep completion`: completions of shells, made from the tree of commands. */
import type { Command, Option } from 'commander'
import { cpuModels } from '../../config/cpu.js'

/** The shells there are completions for. */
export const shells = ['bash', 'zsh', 'fish'] as const
/** One of them. */
export type Shell = (typeof shells)[number]

/** What completions offer for the value of an option or an operand. */
export type Completion = 'file' | 'image' | 'cpu' | 'shell' | 'none'

/** What is completed how; the tree of commands does not say it. */
export type Completer = (command: string, item: string) => Completion

interface Node {
  /** Words from the name of the program. */
  path: string[]
  about: string
  children: { name: string; about: string }[]
  options: { names: string[]; about: string; value: boolean; choices: string[]; complete: Completion }[]
  operand: { choices: string[]; complete: Completion }
}

/** The script for a shell. */
export function completionScript(
  shell: Shell,
  program: Command,
  completer: Completer,
  images: readonly string[],
): string {
  const nodes = [...walk(program, [program.name()], completer)]
  const words = (complete: Completion, choices: readonly string[]): readonly string[] =>
    complete === 'image' ? images : complete === 'cpu' ? cpuModels : complete === 'shell' ? shells : choices
  if (shell === 'bash') return bash(program.name(), nodes, words)
  if (shell === 'zsh') return zsh(program.name(), nodes, words)
  return fish(program.name(), nodes, words)
}

type Words = (complete: Completion, choices: readonly string[]) => readonly string[]

function* walk(command: Command, path: string[], completer: Completer): Generator<Node> {
  const key = path.slice(1).join(' ')
  const help = command.createHelp()
  const children = command.commands.map((child) => ({ name: child.name(), about: child.description() }))
  const argument = command.registeredArguments[0]
  yield {
    path,
    about: command.description(),
    children,
    options: help.visibleOptions(command).map((option: Option) => ({
      names: [option.short, option.long].filter((name) => name != null),
      about: option.description,
      value: option.required || option.optional,
      choices: option.argChoices ?? [],
      complete: completer(key, option.long ?? ''),
    })),
    operand: {
      choices: argument?.argChoices ?? [],
      complete: argument ? completer(key, argument.name()) : 'none',
    },
  }
  for (const child of command.commands) yield* walk(child, [...path, child.name()], completer)
}

function bash(name: string, nodes: readonly Node[], words: Words): string {
  const cases = nodes.map((node) => {
    const options = node.options.flatMap((option) => option.names)
    const offered = [...node.children.map((child) => child.name), ...words(node.operand.complete, node.operand.choices)]
    const values = node.options
      .filter((option) => option.value)
      .map((option) => {
        const list = words(option.complete, option.choices)
        const reply =
          list.length > 0
            ? `COMPREPLY=($(compgen -W ${quote(list.join(' '))} -- "$cur"))`
            : option.complete === 'file'
              ? files
              : ':'
        return `        ${option.names.join('|')}) ${reply}; return ;;`
      })
    return `    ${quote(node.path.join(' '))})
      case $prev in
${values.join('\n')}
      esac
      if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W ${quote(options.join(' '))} -- "$cur")); return; fi
      COMPREPLY=($(compgen -W ${quote(offered.join(' '))} -- "$cur"))
      ${node.operand.complete === 'file' ? 'COMPREPLY+=($(compgen -f -- "$cur"))' : ':'}
      ;;`
  })
  const known = nodes.map((node) => quote(node.path.join(' '))).join('|')
  return `# bash completion for ${name}; source it, or put it into ~/.local/share/bash-completion/completions/${name}
_${name}() {
  local cur prev path word
  cur=\${COMP_WORDS[COMP_CWORD]}
  prev=\${COMP_WORDS[COMP_CWORD-1]}
  path=${name}
  for word in "\${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
    case "$path $word" in
      ${known}) path="$path $word" ;;
    esac
  done
  COMPREPLY=()
  case $path in
${cases.join('\n')}
  esac
}
complete -o filenames -o bashdefault -F _${name} ${name}
`
}

const files = 'COMPREPLY=($(compgen -f -- "$cur"))'

function zsh(name: string, nodes: readonly Node[], words: Words): string {
  const literal = (text: string): string => text.replace(/[\\:[\]]/g, '\\$&')
  const action = (complete: Completion, choices: readonly string[]): string => {
    const list = words(complete, choices)
    return list.length > 0 ? `(${list.join(' ')})` : complete === 'file' ? '_files' : ' '
  }
  const functions = nodes.map((node) => {
    const specs = node.options.map((option) => {
      const names = option.names.length > 1 ? `{${option.names.join(',')}}` : (option.names[0] ?? '')
      const value = option.value ? `:value:${action(option.complete, option.choices)}` : ''
      return `    ${names}${quote(`[${literal(option.about)}]${value}`)}`
    })
    const children = node.children.map((child) => `      ${quote(`${child.name}:${literal(child.about)}`)}`)
    const rest =
      node.children.length > 0
        ? [`    '1:command:->command'`, `    '*::argument:->argument'`]
        : [`    ${quote(`*:operand:${action(node.operand.complete, node.operand.choices)}`)}`]
    const dispatch =
      node.children.length > 0
        ? `
  case $state in
    command)
      local -a commands=(
${children.join('\n')}
      )
      _describe command commands ;;
    argument)
      case $words[1] in
${node.children.map((child) => `        ${child.name}) ${functionName([...node.path, child.name])} ;;`).join('\n')}
      esac ;;
  esac`
        : ''
    return `${functionName(node.path)}() {
  local state
  local -a line
  _arguments -C -S \\
${[...specs, ...rest].join(' \\\n')}${dispatch}
}`
  })
  return `#compdef ${name}
# zsh completion for ${name}; put it into a folder of $fpath as _${name}
${functions.join('\n')}
${functionName([name])} "$@"
`
}

function functionName(path: readonly string[]): string {
  return `_${path.join('_').replace(/-/g, '_')}`
}

function fish(name: string, nodes: readonly Node[], words: Words): string {
  const lines: string[] = []
  for (const node of nodes) {
    const inside = node.path.slice(1)
    const siblings = node.children.map((child) => child.name)
    const conditions = inside.map((word) => `__fish_seen_subcommand_from ${word}`)
    const here = [
      ...conditions,
      ...(siblings.length > 0 ? [`not __fish_seen_subcommand_from ${siblings.join(' ')}`] : []),
    ]
    const when = here.length > 0 ? ` -n ${quote(here.join('; and '))}` : ''
    for (const child of node.children)
      lines.push(`complete -c ${name} -f${when} -a ${child.name} -d ${quote(child.about)}`)
    for (const option of node.options) {
      const flags = option.names.map((flag) => (flag.startsWith('--') ? `-l ${flag.slice(2)}` : `-s ${flag.slice(1)}`))
      const list = words(option.complete, option.choices)
      const value = !option.value
        ? ''
        : list.length > 0
          ? ` -x -a ${quote(list.join(' '))}`
          : option.complete === 'file'
            ? ' -r -F'
            : ' -x'
      lines.push(`complete -c ${name}${when} ${flags.join(' ')}${value} -d ${quote(option.about)}`)
    }
    const list = words(node.operand.complete, node.operand.choices)
    if (list.length > 0) lines.push(`complete -c ${name} -f${when} -a ${quote(list.join(' '))}`)
    else if (node.operand.complete === 'file') lines.push(`complete -c ${name} -F${when}`)
  }
  return `# fish completion for ${name}; put it into ~/.config/fish/completions/${name}.fish\n${lines.join('\n')}\n`
}

function quote(text: string): string {
  return `'${text.replace(/'/g, `'\\''`)}'`
}
