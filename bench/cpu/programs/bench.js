// JSON, sorting, maps, and loops that are compiled while they run.
const people = Array.from({ length: 6000 }, (_, i) => ({
  id: (i * 7919) % 6007,
  name: `person ${i}`,
  tags: [i % 7, 'x'],
}))
const copy = JSON.parse(JSON.stringify(people))
copy.sort((a, b) => a.id - b.id || a.name.localeCompare(b.name))
const counts = new Map()
for (const { tags } of copy) counts.set(tags[0], (counts.get(tags[0]) ?? 0) + 1)

const matrix = (n, f) => Array.from({ length: n }, (_, i) => Float64Array.from({ length: n }, (_, j) => f(i, j)))
function multiply(a, b) {
  const n = a.length
  return matrix(n, (i, j) => {
    let sum = 0
    for (let k = 0; k < n; k++) sum += a[i][k] * b[k][j]
    return sum
  })
}
const a = matrix(100, (i, j) => (i + j) % 10)
const trace = multiply(a, multiply(a, a)).reduce((sum, row, i) => sum + row[i], 0)

let hash = 0
for (let i = 0; i < 3_000_000; i++) hash = (Math.imul(hash, 31) + (i ^ (i >> 3))) | 0

const result = [copy[0].id, counts.get(3), trace, hash].join()
if (result !== '0,857,91000000,1701763584') throw new Error(`the result is ${result}`)
