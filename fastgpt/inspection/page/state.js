"use strict";
/* What is chosen, and who draws it. A change is drawn once, in the next frame, by the parts that it concerns. */

const state = {
  frame: null, // the checkpoint that is shown, decoded
  theme: 0, // counts changes of the theme, after which every picture is drawn again
  layer: DATA.picked.layer, // the enlarged head: index into DATA.layers, and head
  head: DATA.picked.head,
  token: Math.floor((T - 1) / 2), // the token that was chosen by a click or the keyboard
  hover: null, // the token under the pointer, shown while it is there
  direction: "to", // "to": what the token attends to; "by": the tokens that attend to it
  view: "lines", // of the enlarged head: "lines" or "heat"
  row: null, // the chosen row of the lens
};

const watchers = []; // { keys, draw }
const changed = new Set();

/** Call `draw` in the frame after one of these keys has changed. */
function watch(keys, draw) {
  watchers.push({ keys, draw });
}

/** Change some keys of the state. */
function change(values) {
  for (const [key, value] of Object.entries(values)) {
    if (state[key] === value) continue;
    state[key] = value;
    if (!changed.size) requestAnimationFrame(drawChanged);
    changed.add(key);
  }
}

function drawChanged() {
  const keys = new Set(changed);
  changed.clear();
  for (const watcher of watchers) {
    if (watcher.keys.some((key) => keys.has(key))) watcher.draw();
  }
}

/** The token that is shown. */
function activeToken() {
  return state.hover ?? state.token;
}

/** The map of the enlarged head. */
function activeMap() {
  return triangle(state.frame, state.layer, state.head);
}

/** Let the pointer and the focus of a part's buttons choose tokens; `of` gives the token of an element, or null. */
function choosesTokens(part, of, also = () => ({})) {
  const found = (event) => of(event.target.closest("button"));
  part.addEventListener("pointerover", (event) => {
    // A finger has no place to leave: its touch chooses, by the click that follows.
    if (event.pointerType !== "touch" && found(event) !== null) change({ hover: found(event), ...also() });
  });
  part.addEventListener("pointerleave", () => change({ hover: null }));
  for (const kind of ["focusin", "click"]) {
    part.addEventListener(kind, (event) => {
      if (found(event) !== null) change({ token: found(event), hover: null, ...also() });
    });
  }
}

/** One tab stop for many buttons, and arrow keys among them. `next(key, index)` gives the index to go to, or null. */
function rove(part, buttons, next) {
  const move = { stop: 0 };
  move.to = (index) => {
    buttons[move.stop].tabIndex = -1;
    buttons[index].tabIndex = 0;
    move.stop = index;
  };
  const places = new Map(buttons.map((button, index) => [button, index]));
  for (const button of buttons) button.tabIndex = -1;
  if (buttons.length) move.to(0);
  part.addEventListener("focusin", (event) => {
    if (places.has(event.target)) move.to(places.get(event.target));
  });
  part.addEventListener("keydown", (event) => {
    const place = places.get(event.target);
    if (place === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    const index = next(event.key, place);
    if (index === null || index === undefined) return;
    event.preventDefault();
    if (buttons[index]) buttons[index].focus();
  });
  return move;
}

/** The way of the arrow keys in a grid of so many columns. */
function gridKeys(columns, count) {
  return (key, index) => {
    const column = index % columns;
    const steps = {
      ArrowLeft: column > 0 ? -1 : 0,
      ArrowRight: column < columns - 1 ? 1 : 0,
      ArrowUp: index >= columns ? -columns : 0,
      ArrowDown: index + columns < count ? columns : 0,
      Home: -column,
      End: columns - 1 - column,
    };
    return key in steps ? index + steps[key] : null;
  };
}

/** Scroll a box, and not the page, sideways until one of its elements is in the middle, if it is not seen. */
function scrollWithin(box, node, before) {
  const [outer, inner] = [box.getBoundingClientRect(), node.getBoundingClientRect()];
  if (inner.left >= outer.left + before && inner.right <= outer.right) return;
  box.scrollLeft += (inner.left + inner.right - outer.left - before - outer.right) / 2;
}
