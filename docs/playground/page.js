// The page: what is typed, chosen and turned, and what is shown.

import { load, readSafetensors } from "./files.js";
import { directions, lora, merge, times } from "./lora.js";
import { Model } from "./model.js";
import { drawAttention, drawMatrices } from "./pictures.js";
import { problem, Tokenizer } from "./tokens.js";

const $ = (id) => document.getElementById(id);
const SCRIPTS = [...document.querySelectorAll(".card")].map((card) => card.id);
const BASE = "cyrillic";

export let model, tokenizer;
const spellings = {}; // script → a map from towns to what is recorded
const adapters = {}; // script → scale: s = α / r; layers: path → the directions of B A

const settings = () => ({
  script: document.querySelector("[name=adapter]:checked").value,
  strength: Number($("strength").value),
  rank: Number($("rank").value),
  merged: $("merged").checked,
});

// --- the model, with an adapter or without ---

function readAdapter({ metadata, tensors }) {
  const { r, lora_alpha } = JSON.parse(metadata.config);
  const factor = (path, name) => tensors[`base_model.model.${path}.lora_${name}.weight`];
  const layers = mapLayers((_, path) => directions(factor(path, "A"), factor(path, "B"), r));
  return { scale: lora_alpha / r, layers };
}

const mapLayers = (make) =>
  Object.fromEntries(Object.entries(model.layers).map(([path, layer]) => [path, make(layer, path)]));

/** How the model is to compute its layers: `linear(path, x)`. */
export function linearFor({ script, strength, rank, merged }) {
  if (script === BASE) return (path, x) => times(model.layers[path], x);
  const { scale, layers } = adapters[script];
  if (!merged) return (path, x) => lora(model.layers[path], layers[path], strength * scale, rank, x);
  const sums = mapLayers((layer, path) => merge(layer, layers[path], strength * scale, rank));
  return (path, x) => times(sums[path], x);
}

const latest = {}; // script → its latest name: key (of its settings), linear, written, cache

function write(town, chosen) {
  const key = chosen.script === BASE ? BASE : JSON.stringify(chosen);
  let last = latest[chosen.script];
  if (last?.key !== key) last = latest[chosen.script] = { key, linear: linearFor(chosen) };
  Object.assign(last, model.write(tokenizer.prompt(town), last.linear, last.cache));
  return tokenizer.decode(last.written);
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
  const why = problem(town, tokenizer, model.config.max_len);
  $("problem").textContent = why;
  for (const script of new Set([chosen.script, ...SCRIPTS])) {
    showName($(script), why ? "" : write(town, { ...chosen, script }), spellings[script].get(town));
    if (await stale()) return;
    if (script === chosen.script) showMatrices(chosen);
  }
  const [written, note] = $(chosen.script).querySelectorAll(".written, .note");
  $("answer").innerHTML = why ? "" : `${town}: ${written.innerHTML} ${note.textContent}`;
  $("scripts").ariaBusy = "false";
  if (why) return;
  showAttention(latest[chosen.script]);
  const ways = {};
  for (const way of ["beside", "merged", "beside", "merged", "beside", "merged"]) {
    ways[way] ??= linearFor({ ...chosen, merged: way === "merged" });
    showTime(town, way, ways[way]);
    if (await stale()) return;
  }
}

function showName(card, name, recorded) {
  const [word, mark, note] = card.querySelectorAll("bdi, .mark, .note");
  const [marked, right] = [name && recorded, recorded?.includes(name)];
  word.textContent = name;
  mark.textContent = marked ? (right ? "✓" : "✗") : "";
  mark.dataset.right = right;
  note.textContent = marked ? (right ? "as recorded" : `recorded ${recorded[0]}`) : "";
}

// --- settings and what they cost ---

const total = (numbers) => numbers.reduce((sum, n) => sum + n, 0);

function showSettings({ script, strength, rank, merged }) {
  const { scale, layers } = adapters[script];
  const ofW = total(Object.values(model.layers).map(({ weight }) => weight.length));
  const ofAB = rank * total(Object.values(layers).map(([{ a, b }]) => a.length + b.length));
  const all = total(Object.values(model.tensors).map((tensor) => tensor.length));
  for (const [id, n] of Object.entries({ trained: ofAB, all })) {
    const kilobytes = Math.round((2 * n) / 1000); // in float16
    $(id).textContent = `${n.toLocaleString("en")} numbers, ${kilobytes.toLocaleString("en")} kB in float16`;
    $(id).style.setProperty("--share", n / all);
  }
  for (const [way, n] of Object.entries({ beside: ofW + ofAB, merged: ofW })) {
    $(`cost-${way}`).cells[1].textContent = n.toLocaleString("en");
    $(`cost-${way}`).classList.toggle("used", merged === (way === "merged"));
  }
  $("strength-value").textContent = strength.toFixed(2);
  $("rank-value").textContent = rank;
  const formula = merged ? "h = (W + λ s B A) x" : "h = W x + λ s B A x";
  $("formula").textContent = `${formula}, with s = α / r = ${scale}`;
  const code = (merged ? merge : lora).toString().replaceAll("<", "&lt;").replace(/\/\/.*/g, "<i>$&</i>");
  $("code").innerHTML = code.replace(/\b(const|for|function|let|of|return)\b/g, "<b>$&</b>");
}

const measured = { beside: [], merged: [] }; // milliseconds a letter

/** Of the last nine measurements the shortest: the others waited for something else. */
function showTime(town, way, linear) {
  const start = performance.now();
  const { cache } = model.write(tokenizer.prompt(town), linear);
  measured[way] = [(performance.now() - start) / cache.tokens.length, ...measured[way].slice(0, 8)];
  $(`cost-${way}`).cells[2].textContent = `${Math.min(...measured[way]).toFixed(2)} ms`;
}

// --- pictures ---

function showMatrices({ script, strength, rank }) {
  const [{ scale, layers }, path] = [adapters[script], $("layer").value];
  const said = drawMatrices($("matrices"), model.layers[path], layers[path], strength * scale, rank);
  $("matrices-say").textContent = said;
}

function showAttention({ written, cache }) {
  const [block, head] = $("head").value.split(" ");
  const width = cache.tokens.length - written.length; // BOS, what is read, SEP
  const letters = cache.tokens.map((id) => tokenizer.character(id));
  const read = ["BOS", ...letters.slice(1, width - 1), "SEP"];
  const weights = written.map((_, i) => cache.blocks[block].weights[width - 1 + i][head].slice(0, width));
  $("attention-say").textContent = drawAttention($("attention"), weights, read, letters.slice(width));
}

// --- the beginning ---

async function start() {
  if (!("DecompressionStream" in window)) throw new Error("this browser is too old; any since 2023 will do");
  const json = (buffer) => JSON.parse(new TextDecoder().decode(buffer));
  const sizes = json(await load("files.json"));
  Object.assign($("progress"), { max: total(Object.values(sizes)), value: 0 });
  const progress = (bytes) => ($("progress").value += bytes);
  const loading = Object.keys(sizes).map(async (name) => [name, await load(name, progress)]);
  const files = Object.fromEntries(await Promise.all(loading));
  const recorded = json(files["spellings.json.gz"]);
  for (const script of SCRIPTS) spellings[script] = new Map(Object.entries(recorded[script]));
  const read = (name) => readSafetensors(files[`${name}.safetensors.gz`]);
  const { metadata, tensors } = read("base");
  model = new Model(JSON.parse(metadata.config), tensors);
  tokenizer = new Tokenizer(metadata.characters);
  for (const script of SCRIPTS) if (script !== BASE) adapters[script] = readAdapter(read(script));

  const { n_layers, n_heads } = model.config;
  Object.keys(model.layers).forEach((path) => $("layer").add(new Option(path)));
  for (let i = 0; i < n_layers * n_heads; i++) {
    const [block, head] = [Math.floor(i / n_heads), i % n_heads];
    $("head").add(new Option(`block ${block}, head ${head}`, `${block} ${head}`));
  }
  [$("layer").value, $("head").value] = ["blocks.1.attention.W_v", "1 1"];
  $("unseen").addEventListener("click", () => {
    const towns = [...spellings[settings().script].keys()];
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
