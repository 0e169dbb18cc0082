// Heat maps of the matrices of one layer, and a table of what one head of attention looks at.

import { merge } from "./lora.js";

/** Draws values, rows of `columns` numbers: the farther from 0, up to `most`, the more colour. */
function heatMap(canvas, values, columns, most) {
  Object.assign(canvas, { width: columns, height: columns && values.length / columns });
  canvas.style.cssText = `--columns: ${canvas.width}; --rows: ${canvas.height}`;
  if (!values.length) return; // rank 0
  const [context, image] = [canvas.getContext("2d"), new ImageData(columns, canvas.height)];
  values.forEach((v, i) => (image.data[4 * i + 3] = (255 * Math.abs(v)) / most)); // how opaque
  context.putImageData(image, 0, 0);
  context.globalCompositeOperation = "source-in"; // colour where something is
  context.fillStyle = getComputedStyle(canvas).color; // from the style sheet
  context.fillRect(0, 0, canvas.width, canvas.height);
}

/** Draws W, A, B and ΔW, `scale` times the first `rank` directions; returns what to say of them. */
export function drawMatrices(figure, layer, directions, scale, rank) {
  const [{ a, b }, kept, W] = [directions[0], directions.slice(0, rank), layer.weight];
  const change = merge({ weight: new Float32Array(W.length) }, directions, scale, rank).weight;
  const draw = (name, ...picture) => heatMap(figure.querySelector(name), ...picture);
  figure.style.cssText = `--most-columns: ${a.length}; --most-rows: ${b.length}`;
  draw(".W", W, a.length, 3 * typical(W));
  draw(".A", kept.flatMap((one) => [...one.a]), a.length, 3 * typical(a));
  draw(".B", [...b].flatMap((_, i) => kept.map((one) => one.b[i])), rank, 3 * typical(b));
  draw(".change", change, a.length, 3 * typical(W));
  return `W is ${b.length} × ${a.length}. Above ΔW lies A, ${rank} × ${a.length}; left of it stands B, ${b.length} × ${rank}.
    The stronger the colour, the farther from 0. W and ΔW share one scale: ΔW is
    ${(typical(change) / typical(W)).toFixed(2)} times as large as W.`;
}

const typical = (values) => Math.sqrt(values.reduce((sum, v) => sum + v * v, 0) / values.length);

/** A row for each letter written, a column for each that was read; returns what to say of them. */
export function drawAttention(table, weights, read, written) {
  const heading = (letter, scope) => `<th scope="${scope}"><bdi>${visible(letter)}</bdi></th>`;
  const cell = (share) => `<td style="--share: ${share}" title="${share.toFixed(2)}"></td>`;
  const rows = written.map((letter, i) => `<tr>${heading(letter, "row")}${weights[i].map(cell).join("")}</tr>`);
  const columns = read.map((letter) => heading(letter, "col")).join("");
  table.innerHTML = `<thead><tr><td></td>${columns}</tr></thead><tbody>${rows.join("")}</tbody>`;
  const most = weights.map((row) => row.indexOf(Math.max(...row)));
  const pairs = written.map((letter, i) => `${visible(letter)} at ${visible(read[most[i]])}`);
  return `A row for each letter that is written; the stronger the colour, the more this head looks at the letter
    above. Most of all ${pairs.join(", ")}.`;
}

/** An accent or a vowel sign needs something to stand on. */
const visible = (letter) => (/\p{M}/u.test(letter) ? `◌${letter}` : letter);
