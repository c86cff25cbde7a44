import { defineConfig } from 'vitest/config'

// Each file in a process of its own: the addon runs threads, and Node's worker threads do not go well with those.
const pool = 'forks'

/** In L1, as in test/helpers/accel.ts. */
const patience = process.env['SKEP_L1'] === undefined ? 1 : 5

export default defineConfig({
  test: {
    teardownTimeout: 10_000 * patience,
    projects: [
      {
        // What these expect is what happens without a variable that changes it.
        test: {
          name: 'unit',
          include: ['test/unit/**/*.test.ts'],
          pool,
          testTimeout: 60_000,
          env: { SKEP_ENGINE: '' },
        },
      },
      // Fetches and builds: what needs the network, by itself.
      { test: { name: 'guests', include: ['test/guests/**/*.test.ts'], pool, testTimeout: 600_000 } },
      {
        test: {
          name: 'boot',
          include: ['test/boot/**/*.test.ts'],
          pool,
          testTimeout: 300_000 * patience,
          hookTimeout: 300_000 * patience,
          // Guests use the processors for themselves: one file at a time.
          fileParallelism: false,
        },
      },
    ],
  },
})
