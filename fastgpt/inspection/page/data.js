"use strict";
/* The data of the page, and its large arrays, which are decoded when they are first shown.

   Letters: T tokens, L shown layers, H heads of a layer, K likeliest tokens of each prediction. */

const DATA = JSON.parse(document.getElementById("data").textContent);
const T = DATA.tokens.length;
const L = DATA.layers.length;
const H = DATA.H;
const K = DATA.K;
const TRIANGLE = (T * (T + 1)) / 2; // weights of a head: token i looks at tokens 0 to i

const decoded = new Map(); // index of a checkpoint -> promise of its arrays

/** The checkpoint with its arrays: maps (uint8), ids (int32) and probs (float32) of the lens. */
function load(index) {
  if (!decoded.has(index)) decoded.set(index, decode(DATA.checkpoints[index]));
  return decoded.get(index);
}

async function decode(checkpoint) {
  const parts = [checkpoint.maps, checkpoint.lens.ids, checkpoint.lens.probs];
  const [maps, ids, probs] = await Promise.all(parts.map(inflate));
  return {
    ...checkpoint,
    rows: checkpoint.lens.rows,
    maps: new Uint8Array(maps),
    ids: new Int32Array(ids),
    probs: new Float32Array(probs),
  };
}

/** The bytes of deflated, base64-coded text. */
async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

/** The triangle of one head, as a view of the checkpoint's maps. */
function triangle(frame, layer, head) {
  const start = (layer * H + head) * TRIANGLE;
  return frame.maps.subarray(start, start + TRIANGLE);
}

/** The weight, 0 to 255, that token i gives to token j; 0 for tokens still to come. */
function weight(map, i, j) {
  return j > i ? 0 : map[(i * (i + 1)) / 2 + j];
}

/** The weights, 0 to 1, between a token and all tokens: those that it gives ("to") or those that it gets ("by"). */
function weightsOf(map, token, direction) {
  const of = (other) => (direction === "to" ? weight(map, token, other) : weight(map, other, token));
  return Float64Array.from({ length: T }, (_, other) => of(other) / 255);
}

/** Whether attention between a token and another one is possible in this direction: no token looks ahead. */
function reaches(token, other, direction) {
  return direction === "to" ? other <= token : other >= token;
}

/** The likeliest next tokens at a position after a row of the lens, best first: [{ id, p }]. */
function predictions(frame, row, position) {
  const start = (row * T + position) * K;
  return Array.from({ length: K }, (_, k) => ({ id: frame.ids[start + k], p: frame.probs[start + k] }));
}

/** The row of the lens that is the model's own prediction. */
function outputRow(frame) {
  return frame.rows.length - 1;
}

/** The text of a token by its id: of the vocabulary, or of the text itself. */
function textOf(id) {
  return DATA.vocabulary[id] ?? TEXTS.get(id) ?? `token ${id}`;
}

const TEXTS = new Map(DATA.tokens.map((token) => [token.id, token.text]));
