"use strict";
/* The enlarged head as lines between two columns of tokens: those that look, on the left, and those looked at. */

const ROW = 22; // CSS pixels from one token to the next, as in style.css
const FAINT = 26; // the weight, of 255, from which the lines of other tokens are drawn as well

const linesBox = document.getElementById("lines-box");
const linesCanvas = document.getElementById("lines-canvas");
const columns = { queries: [], keys: [] };

function startLines() {
  for (const [name, direction] of [["queries", "to"], ["keys", "by"]]) {
    const part = document.getElementById(name);
    columns[name] = DATA.tokens.map((token, index) => {
      const label = `token ${index}, ${spoken(token.text)}, ${direction === "to" ? "attends to" : "is attended by"}`;
      const glyph = showText(make("span", { class: token.bytes ? "glyph bytes" : "glyph" }), token.text);
      return make("button", { type: "button", class: "line-token", "aria-label": label }, glyph);
    });
    part.append(...columns[name]);
    const stops = rove(part, columns[name], columnKeys);
    const places = new Map(columns[name].map((button, index) => [button, index]));
    choosesTokens(part, (button) => places.get(button) ?? null, () => ({ direction }));
    watch(["token"], () => stops.to(state.token));
  }
  linesBox.addEventListener("scroll", drawLines);
  new ResizeObserver(drawLines).observe(linesBox);
  watch(["frame", "theme", "layer", "head", "token", "hover", "direction", "view"], drawLines);
  watch(["token", "view"], showChosenLine);
}

function columnKeys(key, index) {
  const places = { ArrowUp: Math.max(index - 1, 0), ArrowDown: Math.min(index + 1, T - 1), Home: 0, End: T - 1 };
  return places[key] ?? null;
}

/** Scroll to the chosen token, unless the pointer or the focus is in the columns and so knows where it is. */
function showChosenLine() {
  if (state.view !== "lines" || linesBox.matches(":hover, :focus-within")) return;
  const middle = state.token * ROW + ROW / 2;
  const [top, bottom] = [linesBox.scrollTop + ROW, linesBox.scrollTop + linesBox.clientHeight - ROW];
  if (middle < top || middle > bottom) linesBox.scrollTop = middle - linesBox.clientHeight / 2;
}

function drawLines() {
  document.getElementById("lines").hidden = state.view !== "lines";
  if (state.view !== "lines" || !state.frame) return;
  const context = clearedLines();
  const map = activeMap();
  const active = activeToken();
  const weights = weightsOf(map, active, state.direction);
  context.strokeStyle = css(cssColour("--line-faint"));
  drawFaintLines(context, map);
  context.strokeStyle = css(cssColour("--line-strong"));
  for (let other = 0; other < T; other++) {
    const [i, j] = state.direction === "to" ? [active, other] : [other, active];
    if (weights[other] > 0) drawLine(context, i, j, weights[other], 1);
  }
  paintColumns(active, weights);
}

/** The canvas over the box, as large as what is seen of it, with the origin at the top of the columns. */
function clearedLines() {
  const [width, height] = [linesBox.clientWidth, linesBox.clientHeight];
  linesCanvas.width = Math.round(width * devicePixelRatio);
  linesCanvas.height = Math.round(height * devicePixelRatio);
  linesCanvas.style.width = `${width}px`;
  linesCanvas.style.height = `${height}px`;
  const context = linesCanvas.getContext("2d");
  context.scale(devicePixelRatio, devicePixelRatio);
  context.translate(0, -linesBox.scrollTop);
  return context;
}

/** The stronger lines of all tokens, those that pass through what is seen. */
function drawFaintLines(context, map) {
  const first = Math.max(Math.floor(linesBox.scrollTop / ROW) - 1, 0);
  const last = Math.ceil((linesBox.scrollTop + linesBox.clientHeight) / ROW);
  for (let i = first; i < T; i++) {
    for (let j = 0; j <= Math.min(i, last); j++) {
      const w = weight(map, i, j);
      if (w >= FAINT) drawLine(context, i, j, w / 255, 0.5);
    }
  }
}

function drawLine(context, i, j, w, strength) {
  const left = columns.queries[0].offsetLeft + columns.queries[0].offsetWidth + 3;
  const right = columns.keys[0].offsetLeft - 3;
  const [from, to] = [(i + 0.5) * ROW, (j + 0.5) * ROW];
  const bend = (right - left) / 2;
  context.globalAlpha = strength * Math.sqrt(w);
  context.lineWidth = 0.75 + 3 * strength * w;
  context.beginPath();
  context.moveTo(left, from);
  context.bezierCurveTo(left + bend, from, right - bend, to, right, to);
  context.stroke();
}

/** Colour the tokens at the far end of the lines by their weight, and mark the active token at the near end. */
function paintColumns(active, weights) {
  const [near, far] = state.direction === "to" ? [columns.queries, columns.keys] : [columns.keys, columns.queries];
  near.forEach((button, index) => {
    button.style.backgroundColor = button.style.color = "";
    button.classList.toggle("active", index === active);
  });
  far.forEach((button, index) => {
    button.classList.remove("active");
    paint(button, "attention", Math.sqrt(weights[index]));
    if (!weights[index]) button.style.backgroundColor = button.style.color = "";
  });
}
