"use strict";
/* The text: a button for each token, coloured by its loss, with a bar below for its attention to the active token. */

const tokenButtons = [];
const tokenBars = [];
let lossScale = 1; // nats at the end of the ramp, the same for every checkpoint

function startTokens() {
  const part = document.getElementById("tokens");
  DATA.tokens.forEach((token, index) => {
    const bar = make("span", { class: "heat-bar" });
    const glyph = showText(make("span", { class: token.bytes ? "glyph bytes" : "glyph" }), token.text);
    tokenButtons.push(make("button", { type: "button", class: "token" }, glyph, bar));
    tokenBars.push(bar);
    tokenButtons[index].dataset.token = index;
  });
  part.append(...laidOut());
  const stops = rove(part, tokenButtons, (key, index) => textKeys(key, index));
  choosesTokens(part, (button) => (button ? Number(button.dataset.token) : null));
  lossScale = niceScale();
  document.getElementById("loss-most").textContent = `${lossScale} nats and more`;
  watch(["frame", "theme"], drawLosses);
  watch(["frame", "theme", "layer", "head", "token", "hover", "direction"], drawBars);
  watch(["token"], () => stops.to(state.token));
  watch(["token"], () => showChosenToken(part));
}

/** The buttons in the order of the text. Lines end where the text's do; bytes of one character stand under it. */
function laidOut() {
  const parts = [];
  for (let index = 0; index < T; index++) {
    const whole = characterFrom(index);
    if (whole) {
      const under = tokenButtons.slice(index, index + whole.count);
      const above = make("span", { class: "whole", "aria-hidden": "true" }, whole.text);
      parts.push(make("span", { class: "run" }, above, ...under));
      index += whole.count - 1;
    } else {
      parts.push(tokenButtons[index]);
    }
    if (DATA.tokens[index].text.endsWith("\n")) parts.push(make("br"));
  }
  return parts;
}

/** The character that begins with the bytes of this token and takes several tokens, or null. */
function characterFrom(index) {
  let hex = "";
  for (let end = index; end < Math.min(index + 4, T) && DATA.tokens[end].bytes; end++) {
    hex += DATA.tokens[end].bytes;
    const bytes = Uint8Array.from(hex.match(/../g), (pair) => parseInt(pair, 16));
    try {
      return { text: plain(new TextDecoder("utf-8", { fatal: true }).decode(bytes)), count: end - index + 1 };
    } catch {
      // Its bytes go on in the next token, or are none of a character.
    }
  }
  return null;
}

/** Left and right go through the text, up and down to the line above and below. */
function textKeys(key, index) {
  if (key === "Home") return 0;
  if (key === "End") return T - 1;
  if (key === "ArrowLeft") return Math.max(index - 1, 0);
  if (key === "ArrowRight") return Math.min(index + 1, T - 1);
  if (key === "ArrowUp" || key === "ArrowDown") return nearestInNextLine(index, key === "ArrowUp" ? -1 : 1);
  return null;
}

function nearestInNextLine(index, step) {
  const place = (other) => tokenButtons[other].getBoundingClientRect();
  const from = place(index);
  const differs = (rectangle) => Math.abs(rectangle.bottom - from.bottom) > from.height / 2;
  let other = index;
  while (other >= 0 && other < T && !differs(place(other))) other += step;
  if (other < 0 || other >= T) return index;
  const line = place(other).bottom;
  let best = other;
  for (; other >= 0 && other < T && Math.abs(place(other).bottom - line) < from.height / 2; other += step) {
    if (Math.abs(place(other).left - from.left) < Math.abs(place(best).left - from.left)) best = other;
  }
  return best;
}

/** All but the largest losses fit: one of a hundred that is far above would make the others pale. */
function niceScale() {
  const losses = DATA.checkpoints.flatMap((checkpoint) => checkpoint.losses).filter((loss) => loss !== null);
  losses.sort((a, b) => a - b);
  return Math.max(1, Math.ceil(losses[Math.floor(0.98 * (losses.length - 1))] ?? 1));
}

/** Scroll the box of a long text to a token that was chosen elsewhere. */
function showChosenToken(part) {
  const [outer, inner] = [part.getBoundingClientRect(), tokenButtons[state.token].getBoundingClientRect()];
  if (inner.top < outer.top || inner.bottom > outer.bottom) part.scrollTop += inner.top - outer.top - outer.height / 2;
}

function drawLosses() {
  const { losses, ranks } = state.frame;
  tokenButtons.forEach((button, index) => {
    const loss = losses[index];
    button.classList.toggle("unpredicted", loss === null);
    paint(button.firstChild, "loss", (loss ?? 0) / lossScale);
    const told = loss === null ? "not predicted" : `loss ${number(loss)}, rank ${thousands(ranks[index])}`;
    button.setAttribute("aria-label", `token ${index}, ${spoken(DATA.tokens[index].text)}, ${told}`);
  });
  paintScale(document.getElementById("loss-scale"), "loss");
}

function drawBars() {
  const active = activeToken();
  const weights = weightsOf(activeMap(), active, state.direction);
  const most = Math.max(...weights);
  tokenBars.forEach((bar, other) => {
    const reached = reaches(active, other, state.direction);
    bar.style.backgroundColor = reached ? css(ramp("attention", weights[other] / (most || 1))) : "transparent";
    bar.dataset.weight = weights[other].toFixed(4);
    tokenButtons[other].classList.toggle("active", other === active);
    tokenButtons[other].classList.toggle("chosen", other === state.token);
  });
  document.getElementById("bars-of").textContent = `attention of ${headName(state.layer, state.head)}`;
  document.getElementById("bars-most").textContent = share(most);
  paintScale(document.getElementById("bars-scale"), "attention");
}
