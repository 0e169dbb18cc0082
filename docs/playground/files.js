// From files to arrays: gzip, safetensors, float16.

/** The content of a gzipped file; `progress(n)` is told of every n bytes that have come. */
export async function load(name, progress = () => {}) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  const count = (chunk, controller) => {
    progress(chunk.length);
    controller.enqueue(chunk);
  };
  const counted = response.body.pipeThrough(new TransformStream({ transform: count }));
  const bytes = new Uint8Array(await new Response(counted).arrayBuffer());
  if (bytes[0] !== 0x1f) return bytes.buffer; // some servers unzip what ends in .gz
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(plain).arrayBuffer();
}

/** `metadata`, and `tensors`, name → Float32Array, of a safetensors file in float16. */
export function readSafetensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true)); // of the header, in bytes
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const { __metadata__: metadata, ...entries } = header;
  const tensors = {};
  for (const [name, { data_offsets: [begin, end] }] of Object.entries(entries)) {
    const halves = new Uint16Array(buffer, 8 + length + begin, (end - begin) / 2);
    tensors[name] = new Float32Array(halves).map((bits) => HALF[bits]);
  }
  return { metadata, tensors };
}

/** What 16 bits mean: a sign, 5 bits of exponent, 10 of fraction. */
const HALF = Float32Array.from({ length: 2 ** 16 }, (_, bits) => {
  const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  return sign * (exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction);
});
