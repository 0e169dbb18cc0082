// LoRA, as lora_lib/lora.py has it: h = W x + λ s B A x, with s = α / r.
//
// B A is a sum of r directions, each a column b of B times a row a of A. docs/make_playground.py has
// turned them, by an SVD, so that the strongest comes first: B A is the same, and the first few
// directions are the nearest to it of a lower rank.

/** A linear layer: its weight W (rows of x.length numbers) times x, plus its bias, if it has one. */
export function times({ weight, bias }, x) {
  const [n, y] = [x.length, new Float32Array(weight.length / x.length)];
  for (let row = 0; row < y.length; row += 4) {
    const i = Math.min(row, y.length - 4); // four rows at a time: x is read once for all of them
    let [w, s0, s1, s2, s3] = [i * n, 0, 0, 0, 0];
    for (let j = 0; j < n; j++, w++) {
      s0 += weight[w] * x[j];
      s1 += weight[w + n] * x[j];
      s2 += weight[w + 2 * n] * x[j];
      s3 += weight[w + 3 * n] * x[j];
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
  const weight = layer.weight.slice(); // W stays as it is
  for (const { a, b } of directions.slice(0, rank)) {
    for (let i = 0, w = 0; i < b.length; i++) {
      for (let j = 0; j < a.length; j++, w++) {
        weight[w] += scale * b[i] * a[j];
      }
    }
  }
  return { ...layer, weight };
}

/** The `rank` directions of B A, for flat A (rank × d_in) and B (d_out × rank), strongest first. */
export function directions(A, B, rank) {
  const width = A.length / rank;
  return Array.from({ length: rank }, (_, k) => ({
    a: A.subarray(k * width, (k + 1) * width),
    b: B.filter((_, i) => i % rank === k),
  }));
}

/** u · v, of the places from one up to another. */
export function dot(u, v, from = 0, to = u.length) {
  let sum = 0;
  for (let i = from; i < to; i++) sum += u[i] * v[i];
  return sum;
}

/** Adds `factor` times y to x itself, in the places from one up to another. */
export function add(x, y, factor = 1, from = 0, to = x.length) {
  for (let i = from; i < to; i++) x[i] += factor * y[i];
}
