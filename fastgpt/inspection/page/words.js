"use strict";
/* Words, numbers and elements. Text from the data becomes text nodes and attributes, and is never read as HTML. */

const MARKS = { " ": "·", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽", "\u3000": "□" };
const SPOKEN = { " ": "space", "\n": "newline", "\t": "tab", "\r": "carriage return", "": "nothing" };
// Control and format characters, separators, and halves of surrogate pairs: they draw nothing, or turn text around.
const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Cn}\p{Co}\p{Z}\ufe0e\ufe0f]/u;
const JOINERS = "\u200d\ufe0e\ufe0f"; // inside an emoji they belong to its drawing
const LONE_MARK = /^\p{M}/u; // an accent without its letter is drawn on a dotted circle

/** An element with attributes and children; text among the children becomes text nodes. */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** Show a token's text in an element, with marks for what is not seen. */
function showText(node, text) {
  node.replaceChildren(...pieces(text));
  return node;
}

function pieces(text) {
  if (text === "") return [mark("∅")];
  const found = [];
  for (const character of LONE_MARK.test(text) ? `◌${text}` : text) {
    if (UNSEEN.test(character) && !(found.length && JOINERS.includes(character))) {
      found.push(character in MARKS ? mark(MARKS[character]) : make("span", {}, escaped(character)));
    } else if (typeof found.at(-1) === "string") {
      found.push(found.pop() + character); // one node, so that joined characters are drawn as one
    } else {
      found.push(character);
    }
  }
  return found;
}

function mark(text) {
  return make("span", { class: "mark" }, text);
}

function escaped(character) {
  const code = character.codePointAt(0);
  if (code < 32) return String.fromCodePoint(0x2400 + code); // such as ␀, made for this
  return code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u${code.toString(16).padStart(4, "0")}`;
}

/** A token's text for a screen reader, and where colours and marks cannot be drawn. */
function spoken(text) {
  return SPOKEN[text] ?? (/^ +\S/.test(text) ? `space ${text.trim()}` : plain(text));
}

/** A token's text as characters alone. */
function plain(text) {
  return pieces(text)
    .map((piece) => (typeof piece === "string" ? piece : piece.textContent))
    .join("");
}

function percent(p) {
  if (p === null || !Number.isFinite(p)) return "–";
  if (p > 0 && p < 0.001) return "<0.1%";
  return p > 0.999 && p < 1 ? ">99.9%" : `${(100 * p).toFixed(1)}%`;
}

function number(value, digits = 2, unit = "") {
  return value === null || value === undefined ? "–" : value.toFixed(digits) + unit;
}

/** A weight of the maps, which are rounded to 1/255. */
function share(w) {
  return w > 0 && w < 0.005 ? "<0.01" : w.toFixed(2);
}

function thousands(value) {
  return value === null || value === undefined ? "–" : value.toLocaleString("en-US");
}

/** "layer 2, head 3", by the model's own count. */
function headName(layer, head) {
  return `layer ${DATA.layers[layer]}, head ${head}`;
}

/** A list of tokens with a bar for each: items are { text, p, shown, note }. */
function barList(items, attributes) {
  const most = Math.max(...items.map((item) => item.p), 1e-9);
  const list = make("ol", { class: "bars", ...attributes });
  for (const { text, p, shown, note, kind } of items) {
    const fill = make("i");
    fill.style.width = `${(100 * p) / most}%`;
    list.append(
      make(
        "li",
        { class: kind ?? null },
        showText(make("span", { class: "piece" }), text),
        make("span", { class: "bar", "aria-hidden": "true" }, fill),
        make("span", { class: "figure" }, shown),
        ...(note ? [make("span", { class: "note" }, note)] : []),
      ),
    );
  }
  return list;
}
