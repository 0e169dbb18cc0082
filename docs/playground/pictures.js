// Heat maps of the matrices of one layer, and a table of what one head of attention looks at.

import { dot, largest, merge, sum } from "./lora.js";

/** Draws a matrix: the farther a number is from 0, up to `most`, the more colour. */
function heatMap(canvas, matrix, most) {
  const [height, width] = [matrix.length, matrix[0]?.length ?? 0];
  Object.assign(canvas, { height, width });
  canvas.style.cssText = `--columns: ${width}; --rows: ${height}`;
  if (!height || !width) return; // rank 0
  const [context, image] = [canvas.getContext("2d"), new ImageData(width, height)];
  const values = matrix.flatMap((row) => [...row]);
  values.forEach((v, i) => (image.data[4 * i + 3] = (255 * Math.abs(v)) / most)); // how opaque
  context.putImageData(image, 0, 0);
  context.globalCompositeOperation = "source-in"; // colour where something is
  context.fillStyle = getComputedStyle(canvas).color; // from the style sheet
  context.fillRect(0, 0, width, height);
}

/** Draws W, A, B and ΔW, `scale` times the first `rank` directions, and says how large ΔW is. */
export function drawMatrices(figure, { weight: W }, directions, scale, rank) {
  const [{ a, b }, kept] = [directions[0], directions.slice(0, rank)];
  const change = merge({ weight: W.map((row) => row.map(() => 0)) }, directions, scale, rank).weight;
  const draw = (name, matrix, usual) => heatMap(figure.querySelector(name), matrix, 3 * usual);
  figure.style.cssText = `--most-columns: ${a.length}; --most-rows: ${b.length}`;
  draw(".W", W, typical(W));
  draw(".A", kept.map((one) => one.a), typical([a]));
  draw(".B", [...b].map((_, i) => kept.map((one) => one.b[i])), typical([b]));
  draw(".change", change, typical(W));
  figure.querySelector(".sizes").textContent = `W is ${b.length} × ${a.length}. Above ΔW lies A,
    ${rank} × ${a.length}; left of it stands B, ${b.length} × ${rank}.`;
  figure.querySelector(".ratio").textContent = (typical(change) / typical(W)).toFixed(2);
}

/** The root of the mean square. */
const typical = (matrix) => Math.sqrt(sum(matrix.map((row) => dot(row, row) / row.length)) / matrix.length);

/** A row for each letter written, a column for each that was read: `shares[row][column]`. */
export function drawAttention(figure, shares, read, written) {
  const heading = (letter, scope) => `<th scope="${scope}"><bdi>${visible(letter)}</bdi></th>`;
  const cell = (share) => `<td style="--share: ${share}" title="${share.toFixed(2)}"></td>`;
  const row = (letter, i) => `<tr>${heading(letter, "row")}${shares[i].map(cell).join("")}</tr>`;
  const columns = read.map((letter) => heading(letter, "col")).join("");
  figure.querySelector("thead").innerHTML = `<tr><td></td>${columns}</tr>`;
  figure.querySelector("tbody").innerHTML = written.map(row).join("");
  const pairs = written.map((letter, i) => `${visible(letter)} at ${visible(read[largest(shares[i])])}`);
  figure.querySelector(".pairs").textContent = pairs.join(", ");
}

/** An accent or a vowel sign needs something to stand on. */
const visible = (letter) => (/\p{M}/u.test(letter) ? `◌${letter}` : letter);
