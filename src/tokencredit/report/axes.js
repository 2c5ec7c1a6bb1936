// uses: plot.js
// A plane with two axes: ticks, names, and where a value lies. For plots of anything against anything.

function plane(frame, width, height, xRange, yRange, names, margin) {
  const box = { left: 46, right: width - 12, top: 12, bottom: height - 38, ...margin };
  const x = (value) => box.left + (box.right - box.left) * (value - xRange[0]) / (xRange[1] - xRange[0]);
  const y = (value) => box.bottom - (box.bottom - box.top) * (value - yRange[0]) / (yRange[1] - yRange[0]);
  frame.replaceChildren();
  for (const [name, value] of [["viewBox", `0 0 ${width} ${height}`], ["width", width], ["height", height]]) frame.setAttribute(name, value);
  for (const tick of names.xs || ticks(xRange[0], xRange[1], width < 340 ? 3 : 5)) {
    frame.append(svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: box.top, y2: box.bottom }),
      svg("text", { class: "tick", x: x(tick), y: box.bottom + 16, "text-anchor": "middle" }, (names.ofX || format)(tick)));
  }
  for (const tick of names.y === null ? [] : names.ys || ticks(yRange[0], yRange[1], 4)) {
    frame.append(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) }),
      svg("text", { class: "tick", x: box.left - 6, y: y(tick) + 4, "text-anchor": "end" }, (names.ofY || format)(tick)));
  }
  frame.append(svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
    svg("text", { class: "tick unit", x: (box.left + box.right) / 2, y: box.bottom + 31, "text-anchor": "middle" }, names.x));
  return { box, x, y };
}

// Round values on a logarithmic axis, as the logarithms where they lie.
function logTicks(low, high) {
  const all = [];
  for (let power = Math.floor(low); power <= high; power++) for (let digit = 1; digit < 10; digit++) all.push([digit, power + Math.log10(digit)]);
  const within = (digits) => all.filter(([digit, at]) => digits.includes(digit) && at >= low && at <= high).map(([, at]) => at);
  return [[1], [1, 3], [1, 2, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9]].map(within).find((found) => found.length > 3) || within([1, 2, 3, 4, 5, 6, 7, 8, 9]);
}

function spanOf(values, around) {
  const [low, high] = extent([...values, ...(around || [])]);
  return high > low ? [low, high] : [low - 1, high + 1];
}

function interval(estimate) {
  const ends = defined(estimate.low) && defined(estimate.high) ? ` [${format(estimate.low)}, ${format(estimate.high)}]` : "";
  return format(estimate.value) + ends;
}

// A figure that is drawn anew at every width; `paint(frame, width)` draws it.
function drawing(label, paint) {
  const frame = svg("svg", { role: "img", "aria-label": label });
  const holder = el("div", { class: "plot" }, frame);
  return { holder, frame, again: () => { const width = Math.floor(holder.getBoundingClientRect().width); if (width) paint(frame, width); },
    start: () => onWidth(holder, (width) => paint(frame, width)) };
}
