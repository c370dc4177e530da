"use strict";
/* Layers x heads as small maps, and the numbers of the one that is enlarged. */

const BADGES = { "previous token": "prev", "first token": "first", induction: "ind" };
const MEANINGS = {
  "previous token": "looks at the token just before",
  "first token": "rests on the first token, which often means that it has nothing to say",
  induction: "looks at the token after an earlier occurrence of the same token",
};
const THUMBNAIL = 96; // pixels of a small map; a larger triangle is reduced to so many

const headButtons = [];

function startHeads() {
  const part = document.getElementById("thumbnails");
  part.style.setProperty("--heads", H);
  part.closest(".heads").classList.toggle("many", H > 8);
  for (let layer = 0; layer < L; layer++) {
    part.append(make("span", { class: "layer-name", "aria-hidden": "true" }, `${DATA.layers[layer]}`));
    for (let head = 0; head < H; head++) {
      const canvas = make("canvas", { "aria-hidden": "true" });
      const button = make("button", { type: "button", class: "thumbnail" }, canvas, make("span", { class: "badges" }));
      headButtons.push(button);
      part.append(button);
    }
  }
  part.append(make("span"), ...Array.from({ length: H }, (_, head) => make("span", { class: "head-name", "aria-hidden": "true" }, `${head}`)));
  const stops = rove(part, headButtons, gridKeys(H, L * H));
  const choose = (event) => {
    const index = headButtons.indexOf(event.target.closest("button"));
    if (index >= 0) change({ layer: Math.floor(index / H), head: index % H });
  };
  part.addEventListener("click", choose);
  part.addEventListener("focusin", choose);
  watch(["frame", "theme"], drawThumbnails);
  watch(["frame", "layer", "head"], drawHeadNumbers);
  watch(["layer", "head"], () => stops.to(state.layer * H + state.head));
}

function drawThumbnails() {
  const shown = new Set();
  headButtons.forEach((button, index) => {
    const [layer, head] = [Math.floor(index / H), index % H];
    const about = state.frame.heads[layer][head];
    drawSmall(button.querySelector("canvas"), triangle(state.frame, layer, head));
    button.querySelector(".badges").replaceChildren(...about.labels.map(badge));
    const labels = about.labels.map((label) => `${label.name} ${number(label.score)}`).join(", ");
    const numbers = `entropy ${number(about.entropy, 1, " nats")}`;
    button.setAttribute("aria-label", `${headName(layer, head)}: ${labels ? `${labels}, ` : ""}${numbers}`);
    for (const label of about.labels) shown.add(label.name);
  });
  drawLegend(shown);
}

function badge(label) {
  return make("span", { class: `badge ${label.name.replaceAll(" ", "-")}` }, BADGES[label.name] ?? label.name);
}

/** The meaning of the labels that are seen. */
function drawLegend(names) {
  const rows = [...names].sort().map((name) => [
    make("dt", {}, badge({ name })),
    make("dd", {}, `${name}: ${MEANINGS[name] ?? ""}`),
  ]);
  document.getElementById("labels").replaceChildren(...rows.flat());
}

/** A map in few pixels. Of the weights that share a pixel the largest counts, so that a thin diagonal stays. */
function drawSmall(canvas, map) {
  const size = Math.min(T, THUMBNAIL);
  const largest = new Uint8Array(size * size);
  for (let i = 0, at = 0; i < T; i++) {
    const row = Math.floor((i * size) / T) * size;
    for (let j = 0; j <= i; j++, at++) {
      const place = row + Math.floor((j * size) / T);
      if (map[at] > largest[place]) largest[place] = map[at];
    }
  }
  canvas.classList.toggle("coarse", T < THUMBNAIL / 2);
  drawSquare(canvas, size, (i, j) => (j > i ? null : largest[i * size + j]));
}

/** A square picture of weights from 0 to 255; null leaves a pixel empty. */
function drawSquare(canvas, size, valueAt) {
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  const image = context.createImageData(size, size);
  const colours = Array.from({ length: 256 }, (_, value) => heatColour(value / 255));
  for (let i = 0, at = 0; i < size; i++) {
    for (let j = 0; j < size; j++, at += 4) {
      const value = valueAt(i, j);
      if (value === null) continue;
      image.data.set(colours[value], at);
      image.data[at + 3] = 255;
    }
  }
  context.putImageData(image, 0, 0);
}

function drawHeadNumbers() {
  headButtons.forEach((button, index) => button.setAttribute("aria-pressed", index === state.layer * H + state.head));
  const about = state.frame.heads[state.layer][state.head];
  const title = headName(state.layer, state.head);
  document.getElementById("head-title").replaceChildren(title[0].toUpperCase() + title.slice(1), ...about.labels.map(badge));
  const pairs = [
    ["entropy", number(about.entropy, 2, " nats")],
    ["mean distance", number(about.distance, 1, " tokens")],
    ...Object.entries(about.scores).map(([name, score]) => [name, number(score)]),
  ];
  document.getElementById("head-numbers").replaceChildren(...facts(pairs).children);
}
