// One line plot: axes with units, interval bands, labels at the ends of the lines, values under the pointer.

function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 2.5, 5, 10].find((each) => each * power >= raw * 0.999);
  const found = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-6; tick += step) found.push(Math.abs(tick) < step * 1e-6 ? 0 : Number(tick.toPrecision(10)));
  return found;
}

function extent(values) {
  const numbers = values.filter(defined);
  if (!numbers.length) return [0, 1];
  const low = Math.min(...numbers), high = Math.max(...numbers);
  const pad = high > low ? (high - low) * 0.06 : Math.abs(high) * 0.1 || 0.5;
  return [low >= 0 ? Math.max(0, low - pad) : low - pad, high + pad];
}

function panelSteps(panel) {
  const all = panel.series.flatMap((each) => [...each.step, ...each.lines.flatMap((line) => line.step)]);
  return [...new Set(all)].sort((one, other) => one - other);
}

function panelValues(panel) {
  return panel.series.flatMap((each) => [
    ...(each.value || []), ...(each.low || []), ...(each.high || []), ...each.lines.flatMap((line) => line.value)]);
}

function path(steps, values, x, y) {
  let pen = "M";
  return steps.map((step, at) => {
    if (!defined(values[at])) { pen = "M"; return ""; }
    const part = `${pen}${x(step).toFixed(1)},${y(values[at]).toFixed(1)}`;
    pen = "L";
    return part;
  }).join("");
}

function band(curve, x, y) {
  const ends = curve.step.map((step, at) => [step, curve.low[at], curve.high[at]]).filter((end) => defined(end[1]) && defined(end[2]));
  const upper = ends.map(([step, , high]) => `${x(step).toFixed(1)},${y(high).toFixed(1)}`);
  const lower = ends.map(([step, low]) => `${x(step).toFixed(1)},${y(low).toFixed(1)}`).reverse();
  return ends.length ? `M${[...upper, ...lower].join("L")}Z` : "";
}

// Labels at the line ends, pushed apart until none overlaps and all are inside.
function placeLabels(labels, gap, top, bottom) {
  labels.sort((one, other) => one.y - other.y);
  let floor = top;
  for (const label of labels) floor = (label.at = Math.max(label.y, floor)) + gap;
  let ceiling = bottom;
  for (const label of [...labels].reverse()) ceiling = (label.at = Math.min(label.at, ceiling)) - gap;
  return labels;
}

function lastPoint(curve) {
  const lines = curve.value ? [{ step: curve.step, value: curve.value }] : curve.lines;
  const ends = lines.map((line) => {
    const at = line.value.findLastIndex(defined);
    return at < 0 ? null : [line.step[at], line.value[at]];
  }).filter(Boolean);
  return ends.length ? [Math.max(...ends.map((end) => end[0])), ends.reduce((sum, end) => sum + end[1], 0) / ends.length] : null;
}

function drawAxes(frame, panel, box, x, y, range, steps) {
  const ys = ticks(range[0], range[1], panel.small ? 3 : 4);
  const decimals = Math.max(0, ...ys.map((tick) => (String(tick).split(".")[1] || "").length));
  for (const tick of ys) {
    frame.append(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) }),
      svg("text", { class: "tick", x: box.left - 6, y: y(tick) + 4, "text-anchor": "end" }, tick.toFixed(decimals).replace("-", "−")));
  }
  const xs = ticks(steps[0], steps[steps.length - 1] || 1, box.right - box.left < 260 ? 3 : 5).filter(Number.isInteger);
  for (const tick of xs) {
    frame.append(svg("line", { class: "axis", x1: x(tick), x2: x(tick), y1: box.bottom, y2: box.bottom + 4 }),
      svg("text", { class: "tick", x: x(tick), y: box.bottom + 16, "text-anchor": "middle" }, format(tick)));
  }
  frame.append(svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
    svg("text", { class: "tick unit", x: (box.left + box.right) / 2, y: box.bottom + 31, "text-anchor": "middle" }, panel.x || "optimizer step"));
}

function curveClass(panel, curve) {
  return `curve c${curve.colour}${panel.hidden.has(curve.label) ? " hidden" : ""}`;
}

function drawCurve(panel, curve, x, y) {
  const group = svg("g", { class: curveClass(panel, curve), "data-label": curve.label });
  if (curve.low && curve.high) group.append(svg("path", { class: "band", d: band(curve, x, y) }));
  for (const line of curve.lines) group.append(svg("path", { class: curve.value ? "seed" : "seed only", d: path(line.step, line.value, x, y) }));
  if (curve.value) group.append(svg("path", { class: "line", d: path(curve.step, curve.value, x, y) }));
  return group;
}

function drawLabels(frame, panel, box, x, y) {
  const labels = panel.series.map((curve) => ({ curve, end: lastPoint(curve) })).filter((each) => each.end);
  for (const label of labels) label.y = y(label.end[1]);
  for (const { curve, end, at, y: own } of placeLabels(labels, 13, box.top + 6, box.bottom - 2)) {
    const group = svg("g", { class: curveClass(panel, curve), "data-label": curve.label });
    if (curve.value) group.append(svg("circle", { class: "dot", cx: x(end[0]), cy: own, r: 3 }));
    if (box.labels) {
      group.append(svg("path", { class: "leader", d: `M${x(end[0]) + 5},${own}L${box.right + 9},${at}` }),
        svg("text", { class: "label", x: box.right + 12, y: at + 4 }, curve.label));
    }
    frame.append(group);
  }
}

// What the series hold at one step, as [label, colour, text].
function valuesAt(panel, step) {
  return panel.series.flatMap((curve) => {
    const at = curve.value ? curve.step.indexOf(step) : -1;
    if (at >= 0) {
      const ends = curve.low && defined(curve.low[at]) ? ` [${format(curve.low[at])}, ${format(curve.high[at])}]` : "";
      return [[curve.label, curve.colour, format(curve.value[at]) + ends]];
    }
    const seen = curve.value ? [] : curve.lines.filter((line) => line.step.includes(step));
    return seen.map((line) => [`${curve.label}, seed ${line.seed}`, curve.colour, format(line.value[line.step.indexOf(step)])]);
  });
}

function readout(panel, step) {
  return [el("strong", null, panel.x ? `${format(step)} ${panel.x}` : `step ${format(step)}`), el("table", null, el("tbody", null, valuesAt(panel, step).map(([label, colour, value]) =>
    el("tr", { class: `c${colour}` }, el("th", { scope: "row" }, el("span", { class: "swatch" }), label), el("td", null, value)))))];
}

function longestLabel(frame, panel) {
  const probe = svg("text", { class: "probe" });
  frame.append(probe);
  const widths = panel.series.map((curve) => {
    probe.textContent = curve.label;
    return probe.getComputedTextLength();
  });
  probe.remove();
  return Math.max(0, ...widths);
}

// Draws the panel at a width; returns where the steps are, for the pointer.
function drawPanel(frame, panel, width) {
  frame.replaceChildren();
  const longest = panel.small ? Infinity : longestLabel(frame, panel);
  const labels = width >= 340 && longest < width * 0.36;
  const height = panel.small ? 180 : 230;
  const box = { left: 44, right: width - (labels ? 14 + longest : 12), top: 10, bottom: height - 38, height, labels };
  const steps = panelSteps(panel);
  const range = panel.range || extent(panelValues(panel));
  const span = steps[steps.length - 1] - steps[0] || 1;
  const x = (step) => box.left + (box.right - box.left) * (step - steps[0]) / span;
  const y = (value) => box.bottom - (box.bottom - box.top) * (value - range[0]) / (range[1] - range[0]);
  frame.setAttribute("viewBox", `0 0 ${width} ${height}`);
  frame.setAttribute("width", width);
  frame.setAttribute("height", height);
  drawAxes(frame, panel, box, x, y, range, steps);
  for (const curve of panel.series) frame.append(drawCurve(panel, curve, x, y));
  drawLabels(frame, panel, box, x, y);
  const cross = svg("line", { class: "cross", y1: box.top, y2: box.bottom, visibility: "hidden" });
  frame.append(cross);
  return { steps, x, cross, box };
}
