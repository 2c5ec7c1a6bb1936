"use strict";
// Elements are made here and nowhere else: text goes in as text, so that no data can become markup.

const SVG = "http://www.w3.org/2000/svg";
const drawers = {};

function draw(script, drawer) {
  drawers[script] = drawer;
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) node.append(child); // append() makes text of anything that is not a node
  }
  return node;
}

function el(name, attributes, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function svg(name, attributes, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function defined(value) {
  return typeof value === "number" && Number.isFinite(value);
}

// At most three significant digits, all of a whole part; a true minus sign; a dash for what is not defined.
function format(value) {
  if (!defined(value)) return "–";
  const size = Math.abs(value);
  let shown;
  if (value === 0 || (Number.isInteger(value) && size < 1e6)) shown = String(value);
  else if (size < 1e-3 || size >= 1e6) shown = value.toExponential(1);
  else shown = size < 1000 ? String(Number(value.toPrecision(3))) : value.toFixed(0);
  return shown.replace("-", "−").replace(/^−0$/, "0");
}

// Calls back with the width of an element, now and whenever it changes.
function onWidth(element, callback) {
  let last = 0;
  const check = () => {
    const width = Math.floor(element.getBoundingClientRect().width);
    if (width > 0 && width !== last) callback(last = width);
  };
  new ResizeObserver(check).observe(element);
  check();
}

function option(value, label) {
  return el("option", { value }, label);
}

function select(label, options, onchange) {
  const input = el("select", { "aria-label": label, onchange: () => onchange(input.value) }, options);
  return { input, field: el("label", { class: "field" }, el("span", null, label), input) };
}
