// The page: what is typed, chosen and turned, and what is shown.

import { load, readSafetensors } from "./files.js";
import { lora, merge, times } from "./lora.js";
import { Model } from "./model.js";
import { drawAttention, drawMatrices } from "./pictures.js";
import { problem, SEP, Tokenizer } from "./tokens.js";

const $ = (id) => document.getElementById(id);

export let base, tokenizer; // base: tensors, name → array, and what docs/make_playground.py says of it
const layers = {}; // path → { weight, bias }, of every linear layer of the base
const adapters = {}; // script → scale s; directions, path → [{ a, b }, …]; recorded spellings; model

const settings = () => ({
  script: document.querySelector("[name=adapter]:checked").value,
  strength: $("strength").valueAsNumber,
  rank: $("rank").valueAsNumber,
  merged: $("merged").checked,
});

// --- the base with an adapter, or with none: that is one without directions ---

/** How the model is to compute its layers: `linear(path, x)`. */
export function linearFor({ script, strength, rank, merged }) {
  const { scale, directions } = adapters[script];
  if (!merged) return (path, x) => lora(layers[path], directions[path], strength * scale, rank, x);
  const sums = {};
  for (const path in layers) sums[path] = merge(layers[path], directions[path], strength * scale, rank);
  return (path, x) => times(sums[path], x);
}

function write(town, chosen) {
  const [adapter, key] = [adapters[chosen.script], JSON.stringify(chosen)];
  if (adapter.key !== key) Object.assign(adapter, { key, model: new Model(base, linearFor(chosen)) });
  return tokenizer.decode(adapter.model.write(tokenizer.prompt(town)));
}

// --- answers ---

let answers = 0; // a newer one stops those before it

/** Writes the town that is typed: first in the chosen script, then in the others. */
async function answer() {
  const [mine, chosen] = [++answers, settings()];
  const town = $("town").value.trim().split(/\s+/).join(" ");
  const stale = async () => {
    await new Promise((next) => setTimeout(next)); // keys and painting come first
    return mine !== answers;
  };
  $("scripts").ariaBusy = "true";
  showSettings(chosen);
  const why = problem(town, base);
  $("problem").textContent = why;
  for (const script of new Set([chosen.script, ...Object.keys(adapters)])) {
    showName(script, why ? "" : write(town, { ...chosen, script }), town);
    if (await stale()) return;
    if (script === chosen.script) showMatrices(chosen);
  }
  const [word, verdict] = $(chosen.script).querySelectorAll("bdi, .verdict");
  $("answer").innerHTML = why ? "" : `${town}: ${word.outerHTML} ${verdict.textContent}`;
  $("scripts").ariaBusy = "false";
  if (why) return;
  showAttention(adapters[chosen.script].model);
  await showTimes(town, chosen, stale);
}

function showName(script, name, town) {
  const [word, verdict] = $(script).querySelectorAll("bdi, .verdict");
  const recorded = adapters[script].recorded.get(town);
  const right = recorded?.includes(name);
  word.textContent = name;
  verdict.textContent = right ? "✓ as recorded" : name && recorded ? `✗ recorded ${recorded[0]}` : "";
  verdict.dataset.right = right;
}

// --- settings and what they cost ---

function showSettings({ script, strength, rank, merged }) {
  const { all, linear, direction } = base.counts;
  const trained = rank * direction; // the numbers that a direction has in all layers together
  for (const [id, n] of Object.entries({ trained, all })) {
    const kilobytes = Math.round((2 * n) / 1000); // in float16
    $(id).textContent = `${n.toLocaleString("en")} numbers, ${kilobytes.toLocaleString("en")} kB in float16`;
    $(id).style.setProperty("--share", n / all);
  }
  $("cost-beside").cells[1].textContent = (linear + trained).toLocaleString("en");
  $("cost-merged").cells[1].textContent = linear.toLocaleString("en");
  $("strength-value").textContent = strength.toFixed(2);
  $("rank-value").textContent = rank;
  $("scale").textContent = adapters[script].scale;
  const code = (merged ? merge : lora).toString().replaceAll("<", "&lt;").replace(/\/\/.*/g, "<i>$&</i>");
  $("code").innerHTML = code.replace(/\b(const|for|function|let|of|return)\b/g, "<b>$&</b>");
}

const measured = { beside: [], merged: [] }; // milliseconds a letter

/** The time both ways: of the last nine the shortest, since the others waited for something else. */
async function showTimes(town, chosen, stale) {
  for (const way of ["beside", "merged"]) {
    const linear = linearFor({ ...chosen, merged: way === "merged" });
    for (let i = 0; i < 3; i++) {
      if (await stale()) return;
      const [model, start] = [new Model(base, linear), performance.now()];
      model.write(tokenizer.prompt(town));
      measured[way].push((performance.now() - start) / model.tokens.length);
    }
    $(`cost-${way}`).cells[2].textContent = `${Math.min(...measured[way].slice(-9)).toFixed(2)} ms`;
  }
}

// --- pictures ---

function showMatrices({ script, strength, rank }) {
  const [{ scale, directions }, path] = [adapters[script], $("layer").value];
  drawMatrices($("matrices"), layers[path], directions[path], strength * scale, rank);
}

function showAttention({ tokens, heads }) {
  const { weights } = heads.flat()[$("head").selectedIndex];
  const sep = tokens.indexOf(SEP);
  const letters = tokens.map((id) => tokenizer.character(id));
  const read = ["BOS", ...letters.slice(1, sep), "SEP"];
  const shares = weights.slice(sep).map((row) => row.slice(0, read.length));
  drawAttention($("attention"), shares, read, letters.slice(sep + 1));
}

// --- the beginning ---

async function start() {
  if (!("DecompressionStream" in window)) throw new Error("this browser is too old; any since 2023 will do");
  const { metadata, tensors } = readSafetensors(await load("model.safetensors.gzip", $("progress")));
  const { paths, scales, spellings, characters, ...known } = JSON.parse(metadata.page);
  base = { tensors, ...known };
  tokenizer = new Tokenizer(characters);
  for (const path of paths) {
    layers[path] = { weight: tensors[`${path}.weight`], bias: tensors[`${path}.bias`] };
    $("layer").add(new Option(path));
  }
  for (const [script, scale] of Object.entries(scales)) {
    const factor = (path, name) => tensors[`${script}.${path}.${name}`] ?? []; // the base has none
    const pairs = (path) => factor(path, "A").map((a, k) => ({ a, b: factor(path, "B")[k] }));
    const directions = Object.fromEntries(paths.map((path) => [path, pairs(path)]));
    adapters[script] = { scale, directions, recorded: new Map(Object.entries(spellings[script])) };
  }
  const { n_layers, n_heads } = base.config;
  for (let i = 0; i < n_layers * n_heads; i++) {
    $("head").add(new Option(`block ${Math.floor(i / n_heads)}, head ${i % n_heads}`));
  }
  [$("layer").value, $("head").value] = ["blocks.1.attention.W_v", "block 1, head 1"];
  $("unseen").addEventListener("click", () => {
    const towns = [...adapters[settings().script].recorded.keys()];
    $("town").value = towns[Math.floor(Math.random() * towns.length)];
    answer();
  });
  $("course").addEventListener("input", answer);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", answer);
  [$("loading").hidden, $("course").hidden] = [true, false];
  await answer();
}

start().catch(({ message }) =>
  say(`The model could not be loaded (${message}). Check the network, and reload the page.`),
);
