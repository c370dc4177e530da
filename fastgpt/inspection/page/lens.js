"use strict";
/* The logit lens: a row for each layer, a column for each token, and in each cell the likeliest next token there. */

const lensCells = []; // row by row
const lensBox = document.getElementById("lens-box");

function startLens() {
  const rows = DATA.checkpoints[0].lens.rows;
  const table = make("table", { "aria-label": "The likeliest next token, by layer and position" });
  table.append(make("thead", {}, lensRow("token", "the token at this position", (index) => DATA.tokens[index].text)));
  const body = make("tbody");
  rows.forEach((name, row) => {
    const cells = DATA.tokens.map((_, index) => {
      const cell = make("button", { type: "button", class: "cell" });
      lensCells.push(cell);
      return make("td", {}, cell);
    });
    body.append(make("tr", {}, make("th", { scope: "row" }, name), ...cells));
  });
  const foot = lensRow("next", "the token that comes next", (index) => DATA.tokens[index + 1]?.text);
  table.append(body, make("tfoot", {}, foot));
  lensBox.append(table);
  startLensChoice(rows.length);
  state.row = rows.length - 1;
  watch(["frame", "theme"], drawLens);
  watch(["frame", "row", "token"], drawLensPanel);
  watch(["token", "hover"], markColumn);
}

/** A row of tokens of the text: those that are read, or those to be predicted. */
function lensRow(name, title, textAt) {
  const cells = DATA.tokens.map((_, index) => {
    const text = textAt(index);
    return make("td", {}, text === undefined ? "" : showText(make("span", { class: "cell" }), text));
  });
  return make("tr", {}, make("th", { scope: "row", title }, name), ...cells);
}

function startLensChoice(rows) {
  const places = new Map(lensCells.map((cell, index) => [cell, index]));
  const stops = rove(lensBox, lensCells, gridKeys(T, rows * T));
  stops.to((rows - 1) * T + state.token);
  const choose = (event) => {
    const place = places.get(event.target.closest("button"));
    if (place === undefined) return;
    scrollToCell(place);
    change({ row: Math.floor(place / T), token: place % T, hover: null });
  };
  lensBox.addEventListener("click", choose);
  lensBox.addEventListener("focusin", choose);
}

function drawLens() {
  const { rows } = state.frame;
  rows.forEach((name, row) => {
    for (let position = 0; position < T; position++) {
      const [best] = predictions(state.frame, row, position);
      const cell = lensCells[row * T + position];
      showText(cell, textOf(best.id));
      paint(cell, "lens", best.p);
      const right = best.id === DATA.tokens[position + 1]?.id;
      cell.classList.toggle("right", right);
      const token = `token ${position}, ${spoken(DATA.tokens[position].text)}`;
      const told = `${spoken(textOf(best.id))} ${percent(best.p)}${right ? ", which comes next" : ""}`;
      cell.setAttribute("aria-label", `${name}, ${token}: ${told}`);
    }
  });
  paintScale(document.getElementById("lens-scale"), "lens");
}

/** The likeliest tokens of the chosen cell: the one of the chosen row at the chosen token. */
function drawLensPanel() {
  const [row, position] = [state.row, state.token];
  lensBox.querySelector(".chosen")?.classList.remove("chosen");
  lensCells[row * T + position].classList.add("chosen");
  const name = state.frame.rows[row];
  const at = make("p", { class: "hint" }, "at ", showText(make("span", { class: "piece" }), DATA.tokens[position].text), `, token ${position}`);
  const title = make("h3", {}, name[0].toUpperCase() + name.slice(1));
  document.getElementById("lens-panel").replaceChildren(title, at, nextTokens(row, position, "lens-tokens"));
}

/** Mark the active token in the first and the last row, and bring the chosen one into view. */
function markColumn() {
  for (const row of lensBox.querySelectorAll("thead tr, tfoot tr")) {
    row.querySelector("td.active")?.classList.remove("active");
    row.cells[activeToken() + 1].classList.add("active");
  }
  if (state.hover === null && !lensBox.matches(":hover, :focus-within")) scrollToCell(state.token);
}

/** Bring a cell out from under the first column, or from beyond the edge. */
function scrollToCell(place) {
  scrollWithin(lensBox, lensCells[place], lensBox.querySelector("th").offsetWidth);
}
