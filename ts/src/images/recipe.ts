/** What an image is made of: recipes by name, and the files of the guest that the project writes itself. */
import type { Abortable } from '../signal.js'
import type { FetchedPackage, Progress } from './apt.js'

/** What a recipe makes of a folder of its own. */
export interface Recipe {
  /** One line for a person. */
  readonly about: string
  /** Whatever decides what comes out but the versions of packages: a change makes another image. */
  readonly ingredients: readonly string[]
  /** Kernel command line to boot with. */
  readonly cmdline: string
  /** What the guest prints when it waits for a command. */
  readonly prompt: string
  /** Writes `kernel` and `initrd` into `folder`; says which packages they are of. */
  make(
    folder: string,
    options: Abortable & { refresh?: boolean | undefined; onProgress?: ((progress: Progress) => void) | undefined },
  ): Promise<FetchedPackage[]>
}
