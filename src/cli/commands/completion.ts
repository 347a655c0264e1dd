import { command } from '../command.ts'
import { EXIT } from '../failure.ts'

const completion = command({
  name: 'completion',
  summary: 'print a script that completes commands and options',
  arguments: { shell: { description: 'bash or zsh', choices: ['bash', 'zsh'] } },
  options: {},
  examples: [
    { line: 'source <(klieo-bus completion bash)', says: 'in ~/.bashrc' },
    { line: 'source <(klieo-bus completion zsh)', says: 'in ~/.zshrc, after compinit' },
  ],
  connects: false,
  async run({ args }, { output }) {
    const { completionScript } = await import('../completion.ts')
    const { allCommands } = await import('../registry.ts')
    await output.write(completionScript(args.shell, await allCommands()))
    return EXIT.done
  },
})

export const COMMANDS = [completion]
