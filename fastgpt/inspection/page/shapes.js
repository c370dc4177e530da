"use strict";
/* The steps of one block: its code, and the shapes in letters and in numbers. */

function startShapes() {
  const titles = ["step", "code", "shape", "for this text"];
  const head = make("tr", {}, ...titles.map((title) => make("th", { scope: "col" }, title)));
  const rows = DATA.shapes.map((step) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, step.name),
      make("td", { class: "code" }, make("code", {}, step.code)),
      make("td", { class: "code shape" }, step.letters),
      make("td", { class: "code shape numbers" }, step.numbers),
    ),
  );
  const table = make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
  document.getElementById("steps").append(table);
}
