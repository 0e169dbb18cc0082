// LoRA, as lora_lib/lora.py has it: h = W x + λ s B A x, with s = α / r.
//
// A vector is a Float32Array, a matrix an array of its rows. B A is a sum of r directions, each a
// column b of B times a row a of A. docs/make_playground.py has turned them, by an SVD, so that the
// strongest comes first: B A is the same, and the first few are the nearest to it of a lower rank.

/** A linear layer: its weight W times x, plus its bias, if it has one. */
export function times({ weight, bias }, x) {
  const y = new Float32Array(weight.length);
  for (let row = 0; row < y.length; row += 4) {
    const i = Math.min(row, y.length - 4); // four rows at a time: x is read once for all of them
    const [w0, w1, w2, w3] = [weight[i], weight[i + 1], weight[i + 2], weight[i + 3]];
    let [s0, s1, s2, s3] = [0, 0, 0, 0];
    for (let j = 0; j < x.length; j++) {
      s0 += w0[j] * x[j];
      s1 += w1[j] * x[j];
      s2 += w2[j] * x[j];
      s3 += w3[j] * x[j];
    }
    [y[i], y[i + 1], y[i + 2], y[i + 3]] = [s0, s1, s2, s3];
  }
  if (bias) add(y, bias);
  return y;
}

/** W x and, beside it, the first `rank` directions; `scale` is λ s. */
export function lora(layer, directions, scale, rank, x) {
  const h = times(layer, x); // W x: the base, frozen
  for (const { a, b } of directions.slice(0, rank)) {
    const heard = scale * dot(a, x); // A listens
    for (let i = 0; i < h.length; i++) {
      h[i] += heard * b[i]; // B speaks
    }
  }
  return h;
}

/** The layer whose weight is W + λ s B A: the same answers, and nothing beside it. */
export function merge(layer, directions, scale, rank) {
  // W stays as it is: the sum is another matrix
  const weight = layer.weight.map((row) => row.slice());
  for (const { a, b } of directions.slice(0, rank)) {
    // a direction adds b[i] a to row i
    weight.forEach((row, i) => add(row, a, scale * b[i]));
  }
  return { ...layer, weight };
}

/** A vector cut into `count` rows of equal length, which share its memory. */
export function rows(vector, count) {
  const width = vector.length / count;
  return Array.from({ length: count }, (_, i) => vector.subarray(i * width, (i + 1) * width));
}

/** u · v */
export function dot(u, v) {
  let sum = 0;
  for (let i = 0; i < u.length; i++) sum += u[i] * v[i];
  return sum;
}

/** Adds `factor` times y to x itself. */
export function add(x, y, factor = 1) {
  for (let i = 0; i < x.length; i++) x[i] += factor * y[i];
}

export const sum = (x) => x.reduce((total, v) => total + v, 0);

/** The place of the largest number. */
export const largest = (x) => x.indexOf(Math.max(...x));
