"use strict";
/* The start of the page: its head, its theme, the slider, the switches. */

const THEMES = ["auto", "light", "dark"];
const PLAY_EVERY = 900; // milliseconds that a checkpoint is shown

function startHeading() {
  document.getElementById("title").textContent = DATA.title;
  document.getElementById("model").textContent = [DATA.model, DATA.source].filter((part) => !DATA.title.includes(part)).join(" · ");
  document.getElementById("notes").append(...DATA.notes.map((note) => make("li", {}, note)));
}

/** A button goes through the themes; "auto" follows the system. */
function startTheme() {
  const button = document.getElementById("theme");
  let chosen = 0;
  const show = () => {
    document.documentElement.dataset.theme = THEMES[chosen];
    button.textContent = `Theme: ${THEMES[chosen]}`;
    readRamps();
    change({ theme: state.theme + 1 });
  };
  button.addEventListener("click", () => {
    chosen = (chosen + 1) % THEMES.length;
    show();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  show();
}

/** Radio buttons that hold one key of the state, and follow it. */
function startSwitch(name) {
  const buttons = [...document.querySelectorAll(`input[name="${name}"]`)];
  for (const button of buttons) button.addEventListener("change", () => change({ [name]: button.value }));
  watch([name], () => buttons.forEach((button) => (button.checked = button.value === state[name])));
}

function startSlider() {
  const slider = document.getElementById("checkpoint");
  const count = DATA.checkpoints.length;
  slider.max = count - 1;
  slider.value = count - 1;
  document.getElementById("training").hidden = count < 2;
  slider.addEventListener("input", () => showCheckpoint(Number(slider.value)));
  const button = document.getElementById("play");
  let timer = null;
  const stop = () => {
    clearInterval(timer);
    timer = null;
    button.textContent = "Play";
    button.setAttribute("aria-pressed", "false");
  };
  const step = () => {
    slider.value = (Number(slider.value) + 1) % count;
    showCheckpoint(Number(slider.value));
    if (Number(slider.value) === count - 1) stop();
  };
  button.addEventListener("click", () => {
    if (timer) return stop();
    button.textContent = "Stop";
    button.setAttribute("aria-pressed", "true");
    timer = setInterval(step, PLAY_EVERY);
    step();
  });
}

/** Decode a checkpoint and show it, unless the slider has moved on meanwhile. */
async function showCheckpoint(index) {
  const checkpoint = DATA.checkpoints[index];
  const name = checkpoint.val_loss === null ? checkpoint.name : `${checkpoint.name}, val loss ${number(checkpoint.val_loss, 3)}`;
  const slider = document.getElementById("checkpoint");
  document.getElementById("checkpoint-name").textContent = name;
  slider.setAttribute("aria-valuetext", name);
  const frame = await load(index);
  if (Number(slider.value) === index) change({ frame });
}

async function start() {
  startHeading();
  startSlider();
  await showCheckpoint(DATA.checkpoints.length - 1);
  startTokens();
  startDetails();
  startHeads();
  startHeat();
  startLines();
  startLens();
  startShapes();
  startSwitch("direction");
  startSwitch("view");
  startTheme(); // last: it is the change after which everything is drawn
  for (const key of Object.keys(state)) changed.add(key);
  document.body.classList.add("ready");
}

start().catch((error) => {
  document.getElementById("main").prepend(make("p", { class: "card" }, `This page could not be drawn: ${error.message}`));
  throw error;
});
