// SmallTransformer, as lora_lib/model.py has it, one token at a time with a key-value cache.

import { add, dot, largest, rows, sum } from "./lora.js";
import { EOS } from "./tokens.js";

export class Model {
  /** `tensors`: name → array; `linear(path, x)` computes a linear layer: there LoRA goes in. */
  constructor({ config, tensors }, linear) {
    Object.assign(this, { config, tensors, linear });
    const head = () => ({ keys: [], values: [], weights: [] }); // what it has of every token so far
    const block = () => Array.from({ length: config.n_heads }, head);
    this.heads = Array.from({ length: config.n_layers }, block);
    this.tokens = [];
  }

  /**
   * The greedy continuation of the ids `prompt` up to EOS, as lora_lib/scores.py writes it.
   * What it shares with the beginning of the tokens before is not computed anew.
   */
  write(prompt) {
    const last = prompt.length - 1; // is always computed
    const kept = prompt.findIndex((token, i) => token !== this.tokens[i] || i === last);
    for (const list of [this.tokens, ...this.heads.flat().flatMap(Object.values)]) list.splice(kept);
    let x;
    for (const token of prompt.slice(kept)) x = this.step(token);
    while (this.tokens.length < Math.min(prompt.length + 48, this.config.max_len)) {
      const token = largest(this.logits(x));
      if (token === EOS) break;
      x = this.step(token);
    }
    return this.tokens.slice(prompt.length);
  }

  /** `token` through all blocks. */
  step(token) {
    const x = this.tensors["token_embedding.weight"][token].slice();
    add(x, this.tensors["position_embedding.weight"][this.tokens.push(token) - 1]);
    this.heads.forEach((heads, block) => {
      const path = `blocks.${block}`;
      add(x, this.attention(`${path}.attention`, this.norm(`${path}.norm1`, x), heads));
      const z = this.linear(`${path}.feed_forward.linear1`, this.norm(`${path}.norm2`, x));
      add(x, this.linear(`${path}.feed_forward.linear2`, z.map(gelu)));
    });
    return x;
  }

  logits(x) {
    return this.linear("classifier", this.norm("final_norm", x));
  }

  /** What each head sees of all tokens so far; its weights are kept for the picture. */
  attention(path, x, heads) {
    const parts = (vector) => rows(vector, heads.length);
    const [q, k, v] = ["W_q", "W_k", "W_v"].map((name) => parts(this.linear(`${path}.${name}`, x)));
    const seen = new Float32Array(x.length);
    parts(seen).forEach((part, head) => {
      const { keys, values, weights } = heads[head];
      keys.push(k[head]);
      values.push(v[head]);
      const shares = softmax(keys.map((key) => dot(q[head], key) / Math.sqrt(part.length)));
      shares.forEach((share, i) => add(part, values[i], share));
      weights.push(shares);
    });
    return this.linear(`${path}.W_o`, seen);
  }

  /** LayerNorm: mean 0, variance 1 (divided by n; ε = 1e-5), then weight and bias. */
  norm(path, x) {
    const [weight, bias] = [this.tensors[`${path}.weight`], this.tensors[`${path}.bias`]];
    const mean = sum(x) / x.length;
    const y = x.map((v) => v - mean);
    const scale = 1 / Math.sqrt(dot(y, y) / y.length + 1e-5);
    return y.map((v, i) => v * scale * weight[i] + bias[i]);
  }
}

function softmax(scores) {
  const most = Math.max(...scores);
  const powers = scores.map((score) => Math.exp(score - most));
  const total = sum(powers);
  return powers.map((power) => power / total);
}

const gelu = (x) => 0.5 * x * (1 + erf(x / Math.SQRT2));

/** The error function, as PyTorch's GELU uses it, to 3e-7: Abramowitz and Stegun, 7.1.28. */
function erf(x) {
  const z = Math.abs(x);
  let y = 0.0001520143 + z * (0.0002765672 + z * 0.0000430638);
  y = 1 + z * (0.0705230784 + z * (0.0422820123 + z * (0.0092705272 + z * y)));
  return Math.sign(x) * (1 - 1 / y ** 16);
}
