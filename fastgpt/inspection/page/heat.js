"use strict";
/* The enlarged head as a map: a row for each token that looks, a column for each token that it looks at. */

const LABELLED = 40; // tokens up to which their texts fit beside the map
const LONGEST = Math.max(...DATA.tokens.map((token) => plain(token.text).length)); // characters of a label

const heatCanvas = document.getElementById("heat-canvas");
let heatPicture = null; // the map in one pixel a weight, kept while only the token changes
let heatPoint = null; // the cell under the pointer: { i, j }

function startHeat() {
  watch(["frame", "theme", "layer", "head"], () => (heatPicture = null));
  watch(["frame", "theme", "layer", "head", "token", "hover", "direction", "view"], drawHeat);
  new ResizeObserver(drawHeat).observe(document.getElementById("heat"));
  heatCanvas.addEventListener("pointermove", (event) => {
    heatPoint = cellAt(event);
    if (event.pointerType !== "touch") change({ hover: shownToken(heatPoint) });
    drawHeat();
  });
  heatCanvas.addEventListener("pointerleave", () => {
    heatPoint = null;
    change({ hover: null });
    drawHeat();
  });
  heatCanvas.addEventListener("click", (event) => {
    heatPoint = cellAt(event);
    change({ token: shownToken(heatPoint) ?? state.token });
    drawHeat();
  });
}

/** The token whose row ("attends to") or column ("is attended by") a cell lies in. */
function shownToken(cell) {
  return cell && (state.direction === "to" ? cell.i : cell.j);
}

/** The margin for the labels, and the pixels of a cell, for a map that is so wide. */
function heatLayout(width) {
  const margin = T <= LABELLED ? Math.min(12 + 8 * LONGEST, 0.2 * width) : 0;
  return { margin, cell: (width - margin) / T };
}

function cellAt(event) {
  const { margin, cell } = heatLayout(heatCanvas.clientWidth);
  const [j, i] = [event.offsetX, event.offsetY].map((place) => Math.floor((place - margin) / cell));
  return i >= 0 && j >= 0 && i < T && j <= i ? { i, j } : null;
}

function drawHeat() {
  document.getElementById("heat").hidden = state.view !== "heat";
  if (state.view !== "heat" || !state.frame) return;
  const width = heatCanvas.clientWidth;
  const pixels = Math.round(width * devicePixelRatio);
  heatCanvas.width = heatCanvas.height = pixels;
  const context = heatCanvas.getContext("2d");
  context.scale(pixels / width, pixels / width);
  const { margin, cell } = heatLayout(width);
  context.imageSmoothingEnabled = cell * devicePixelRatio < 1;
  context.imageSmoothingQuality = "high";
  context.drawImage(picture(), margin, margin, cell * T, cell * T);
  drawCross(context, margin, cell);
  if (margin) drawLabels(context, margin, cell);
  tellCell();
}

function picture() {
  if (!heatPicture) {
    const map = activeMap();
    heatPicture = make("canvas");
    drawSquare(heatPicture, T, (i, j) => (j > i ? null : weight(map, i, j)));
  }
  return heatPicture;
}

/** Frame the row or the column of the active token. */
function drawCross(context, margin, cell) {
  const active = activeToken();
  const start = margin + active * cell;
  const thick = Math.max(cell, 3);
  const middle = start + (cell - thick) / 2;
  context.strokeStyle = css(cssColour("--accent"));
  context.lineWidth = 1.5;
  if (state.direction === "to") context.strokeRect(margin, middle, (active + 1) * cell, thick);
  else context.strokeRect(middle, start, thick, (T - active) * cell);
}

function drawLabels(context, margin, cell) {
  context.fillStyle = css(cssColour("--ink"));
  context.font = `${Math.min(13, cell * 0.8)}px ${getComputedStyle(document.getElementById("tokens")).fontFamily}`;
  context.textBaseline = "middle";
  DATA.tokens.forEach((token, index) => {
    const middle = margin + (index + 0.5) * cell;
    const text = plain(token.text);
    context.textAlign = "right";
    context.fillText(text, margin - 5, middle, margin - 6);
    context.save();
    context.translate(middle, margin - 5);
    context.rotate(-Math.PI / 2);
    context.textAlign = "left";
    context.fillText(text, 0, 0, margin - 6);
    context.restore();
  });
}

/** Tell the weight under the pointer, or the largest of the active token. */
function tellCell() {
  const map = activeMap();
  const name = (index) => `${plain(DATA.tokens[index].text)} (${index})`;
  let { i, j } = heatPoint ?? {};
  if (i === undefined) {
    const weights = weightsOf(map, activeToken(), state.direction);
    const best = weights.indexOf(Math.max(...weights));
    [i, j] = state.direction === "to" ? [activeToken(), best] : [best, activeToken()];
  }
  const told = `${name(i)} attends to ${name(j)}: ${share(weight(map, i, j) / 255)}`;
  document.getElementById("heat-cell").textContent = told;
  heatCanvas.setAttribute("aria-label", `Map of ${headName(state.layer, state.head)}, ${T} by ${T} tokens. ${told}`);
}
