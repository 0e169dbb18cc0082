// From a file to arrays: gzip, safetensors, float16.

import { rows } from "./lora.js";

/** The content of a gzipped file; the <progress> `bar` shows how much of it has come. */
export async function load(name, bar) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  bar.max = response.headers.get("Content-Length") ?? 3e6; // not every host says how much comes
  const count = (chunk, controller) => {
    bar.value += chunk.length;
    controller.enqueue(chunk);
  };
  const counted = response.body.pipeThrough(new TransformStream({ transform: count }));
  return new Response(counted.pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

/** The metadata of a safetensors file, and its tensors in float16: name → an array, or one of rows. */
export function readSafetensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true)); // of the header, in bytes
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const { __metadata__: metadata, ...tensors } = header;
  for (const [name, { shape, data_offsets: [begin, end] }] of Object.entries(tensors)) {
    const halves = new Uint16Array(buffer, 8 + length + begin, (end - begin) / 2);
    const numbers = new Float32Array(halves).map((bits) => HALF[bits]);
    tensors[name] = shape.length === 1 ? numbers : rows(numbers, shape[0]);
  }
  return { metadata, tensors };
}

/** What 16 bits mean: a sign, 5 bits of exponent, 10 of fraction. */
const HALF = Float32Array.from({ length: 2 ** 16 }, (_, bits) => {
  const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  return sign * (exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction);
});
