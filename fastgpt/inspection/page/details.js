"use strict";
/* The active token: how well it was predicted, what comes next, and its strongest attention in the chosen head. */

const STRONGEST = 5; // tokens that are listed for the chosen head

function startDetails() {
  const keys = ["frame", "layer", "head", "token", "hover", "direction"];
  watch(keys, drawDetails);
  // Read out only what was chosen: a pointer that passes over the text would read a sentence for each token.
  watch(["frame", "token"], announce);
}

function drawDetails() {
  const index = activeToken();
  const token = DATA.tokens[index];
  const { losses, ranks } = state.frame;
  const name = make(
    "p",
    { class: "token-name" },
    showText(make("span", { class: "big piece" }), token.text),
    make("span", { class: "muted" }, `position ${index} of 0–${T - 1}, id\u00a0${token.id}`),
  );
  const numbers = facts([
    ["loss", number(losses[index], 2, " nats")],
    ["rank", thousands(ranks[index])],
    ["probability", probability(losses[index])],
  ]);
  const parts = [name, numbers];
  if (losses[index] === null && index === 0) parts.push(make("p", { class: "hint" }, "Nothing stands before it to predict it."));
  parts.push(make("h3", {}, "What comes next"), nextTokens(outputRow(state.frame), index, "next-tokens"), truth(index), make("h3", {}, attendsTitle()), strongest(index));
  document.getElementById("details-body").replaceChildren(...parts);
}

/** The probability that a loss stands for. */
function probability(loss) {
  return loss === null ? "–" : percent(Math.exp(-loss));
}

/** A line of names and values. */
function facts(pairs) {
  return make("dl", { class: "facts" }, ...pairs.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

/** The likeliest next tokens at a position after a row of the lens, as bars; the true next token is marked. */
function nextTokens(row, position, id) {
  const next = DATA.tokens[position + 1]?.id;
  const items = predictions(state.frame, row, position).map(({ id, p }) => {
    const mark = id === next ? { kind: "true", note: "next" } : {};
    return { text: textOf(id), p, shown: percent(p), ...mark };
  });
  return barList(items, { id, "aria-label": `The likeliest next tokens, ${state.frame.rows[row]}, token ${position}` });
}

/** The token that does come next: its rank and its loss. */
function truth(index) {
  const next = DATA.tokens[index + 1];
  if (!next) return make("p", { class: "hint truth" }, "The text ends here.");
  const loss = state.frame.losses[index + 1];
  const told = ` is next: rank ${thousands(state.frame.ranks[index + 1])}, ${probability(loss)}, loss ${number(loss)}`;
  return make("p", { class: "hint truth" }, showText(make("span", { class: "piece" }), next.text), told);
}

function attendsTitle() {
  const verb = state.direction === "to" ? "Attends to" : "Is attended by";
  return `${verb} (${headName(state.layer, state.head)})`;
}

/** The tokens with the largest weights in the chosen head and direction. */
function strongest(index) {
  const weights = weightsOf(activeMap(), index, state.direction);
  const order = Array.from(weights.keys()).filter((other) => weights[other] > 0);
  order.sort((a, b) => weights[b] - weights[a]);
  if (!order.length) return make("p", { class: "hint" }, "No token, by the weights as they are rounded here.");
  const items = order.slice(0, STRONGEST).map((other) => ({
    text: DATA.tokens[other].text,
    p: weights[other],
    shown: share(weights[other]),
    note: distance(other - index),
  }));
  return barList(items, { id: "strongest", class: "bars attention", "aria-label": attendsTitle() });
}

function distance(steps) {
  if (steps === 0) return "itself";
  return steps < 0 ? `${-steps} before` : `${steps} after`;
}

function announce() {
  const index = state.token;
  const loss = state.frame.losses[index];
  const [best] = predictions(state.frame, outputRow(state.frame), index);
  const how = loss === null ? "not predicted" : `loss ${number(loss)} nats, rank ${thousands(state.frame.ranks[index])}`;
  const next = best ? `Likeliest next: ${spoken(textOf(best.id))}, ${percent(best.p)}.` : "";
  document.getElementById("announcement").textContent =
    `Token ${index}, ${spoken(DATA.tokens[index].text)}: ${how}. ${next}`;
}
