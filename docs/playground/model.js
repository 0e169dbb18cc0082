// SmallTransformer, as lora_lib/model.py has it, one token at a time with a key-value cache.

import { add, dot } from "./lora.js";
import { EOS } from "./tokens.js";

export class Model {
  /** From a safetensors file: `config` and `tensors`, name → Float32Array. */
  constructor(config, tensors) {
    Object.assign(this, { config, tensors });
    this.layers = {}; // path → { weight, bias }, of every linear layer
    for (const name of Object.keys(tensors).filter((name) => /(W_.|linear.|classifier)\.weight$/.test(name))) {
      const path = name.replace(".weight", "");
      this.layers[path] = { weight: tensors[name], bias: tensors[`${path}.bias`] };
    }
  }

  /**
   * The greedy continuation of the ids `prompt` up to EOS, as lora_lib/scores.py writes it, and the
   * cache that was filled on the way. `linear(path, x)` computes a layer: there LoRA goes in.
   * The cache of an earlier call with the same `linear` saves what both prompts begin with.
   */
  write(prompt, linear, cache = this.emptyCache(), maxNew = 48) {
    const differs = prompt.findIndex((token, i) => token !== cache.tokens[i]);
    const kept = differs < 0 ? prompt.length - 1 : differs; // the last one is always read anew
    const lists = [cache.tokens, ...cache.blocks.flatMap(Object.values)];
    for (const list of lists) list.length = Math.min(kept, list.length);
    const [written, room] = [[], Math.min(maxNew, this.config.max_len - prompt.length)];
    let x;
    for (const token of prompt.slice(kept)) x = this.step(token, cache, linear);
    while (written.length < room) {
      const token = largest(this.logits(x, linear));
      if (token === EOS) break;
      written.push(token);
      x = this.step(token, cache, linear);
    }
    return { written, cache };
  }

  emptyCache() {
    const block = () => ({ keys: [], values: [], weights: [] });
    return { tokens: [], blocks: Array.from({ length: this.config.n_layers }, block) };
  }

  /** `token` through all blocks; in each, the cache grows by its key and its value. */
  step(token, cache, linear) {
    const position = cache.tokens.push(token) - 1;
    const x = this.row("token_embedding", token).slice();
    add(x, this.row("position_embedding", position));
    cache.blocks.forEach((past, block) => {
      const path = (name) => `blocks.${block}.${name}`;
      const y = this.norm(path("norm1"), x);
      past.keys.push(linear(path("attention.W_k"), y));
      past.values.push(linear(path("attention.W_v"), y));
      const seen = attend(linear(path("attention.W_q"), y), past, this.config.n_heads);
      add(x, linear(path("attention.W_o"), seen));
      const z = linear(path("feed_forward.linear1"), this.norm(path("norm2"), x));
      for (let i = 0; i < z.length; i++) z[i] = gelu(z[i]);
      add(x, linear(path("feed_forward.linear2"), z));
    });
    return x;
  }

  logits(x, linear) {
    return linear("classifier", this.norm("final_norm", x));
  }

  row(name, i) {
    const d = this.config.d_model;
    return this.tensors[`${name}.weight`].subarray(i * d, (i + 1) * d);
  }

  /** LayerNorm: mean 0, variance 1 (divided by n; ε = 1e-5), then weight and bias. */
  norm(path, x) {
    const [weight, bias] = [this.tensors[`${path}.weight`], this.tensors[`${path}.bias`]];
    const mean = x.reduce((total, v) => total + v, 0) / x.length;
    const y = x.map((v) => v - mean);
    const scale = 1 / Math.sqrt(dot(y, y) / y.length + 1e-5);
    return y.map((v, i) => v * scale * weight[i] + bias[i]);
  }
}

/** What each head sees of all that came before; its weights are kept for the picture. */
function attend(q, { keys, values, weights }, heads) {
  const [y, width] = [new Float32Array(q.length), q.length / heads];
  const ofHeads = Array.from({ length: heads }, (_, head) => {
    const [from, to] = [head * width, (head + 1) * width];
    const shares = softmax(keys.map((k) => dot(q, k, from, to) / Math.sqrt(width)));
    shares.forEach((share, t) => add(y, values[t], share, from, to));
    return shares;
  });
  weights.push(ofHeads);
  return y;
}

function softmax(scores) {
  const most = Math.max(...scores);
  const powers = scores.map((score) => Math.exp(score - most));
  const total = powers.reduce((sum, p) => sum + p, 0);
  return powers.map((p) => p / total);
}

const gelu = (x) => 0.5 * x * (1 + erf(x / Math.SQRT2));

/** The error function, as PyTorch's GELU uses it, to 3e-7: Abramowitz and Stegun, 7.1.28. */
export function erf(x) {
  const z = Math.abs(x);
  let y = 0.0001520143 + z * (0.0002765672 + z * 0.0000430638);
  y = 1 + z * (0.0705230784 + z * (0.0422820123 + z * (0.0092705272 + z * y)));
  return Math.sign(x) * (1 - 1 / y ** 16);
}

const largest = (x) => x.reduce((best, v, i) => (v > x[best] ? i : best), 0);
