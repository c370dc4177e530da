"use strict";
/* Colours of numbers. A ramp has four colours in style.css, which differ between light and dark, and is read from there. */

const RAMPS = {}; // name -> 256 colours [r, g, b], for the theme that is shown

/** Read the ramps again: the theme has changed. */
function readRamps() {
  for (const name of ["loss", "attention", "lens"]) {
    const stops = [0, 1, 2, 3].map((stop) => cssColour(`--${name}-${stop}`));
    RAMPS[name] = Array.from({ length: 256 }, (_, n) => between(stops, (3 * n) / 255));
  }
}

/** A colour of style.css as [r, g, b]. The browser resolves variables and themes where they are used, so use one. */
function cssColour(variable) {
  const probe = make("i");
  probe.style.color = `var(${variable})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color.match(/[\d.]+/g).map(Number);
  probe.remove();
  return found.slice(0, 3);
}

function between(stops, place) {
  const from = Math.min(Math.floor(place), stops.length - 2);
  return stops[from].map((value, channel) => Math.round(value + (place - from) * (stops[from + 1][channel] - value)));
}

/** The colour of a value from 0 to 1. */
function ramp(name, value) {
  return RAMPS[name][Math.round(255 * Math.min(Math.max(value, 0), 1))];
}

/** The colour of an attention weight. By its square root, so that weights of some hundredths are told from none. */
function heatColour(w) {
  return ramp("attention", Math.sqrt(w));
}

function css([r, g, b]) {
  return `rgb(${r}, ${g}, ${b})`;
}

/** Black or white, the one that is read better on a colour: the contrast is 4.5 or more on every colour. */
function ink(colour) {
  const [r, g, b] = colour.map((value) => (value / 255 <= 0.04045 ? value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

/** Paint an element, its text included, by a value from 0 to 1. */
function paint(node, name, value) {
  const colour = ramp(name, value);
  node.style.backgroundColor = css(colour);
  node.style.color = ink(colour);
}

/** A ramp as the background of its legend. */
function paintScale(node, name, shape = (value) => value) {
  const stops = Array.from({ length: 17 }, (_, n) => css(ramp(name, shape(n / 16))));
  node.style.backgroundImage = `linear-gradient(to right, ${stops.join(", ")})`;
}
