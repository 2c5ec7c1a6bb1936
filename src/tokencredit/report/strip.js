// uses: plot.js shade.js
// Bars of the scores along the positions of one completion, under its text; a ribbon of roles where they are known.

const ROW = 46, GAP = 20, LEFT = 52, RIGHT = 8, RIBBON = 8;

function bars(values, x, wide, zero, scale) {
  const parts = { positive: "", negative: "" };
  values.forEach((value, at) => {
    if (!defined(value) || value === 0) return;
    const height = value * scale;
    parts[value < 0 ? "negative" : "positive"] += `M${x(at).toFixed(2)},${zero}h${wide.toFixed(2)}v${(-height).toFixed(2)}h${(-wide).toFixed(2)}z`;
  });
  return parts;
}

function stripRow(frame, row, score, most, top, x, wide, right) {
  const values = valuesOf(row, score);
  const signed = score === "credit" || values.some((value) => value < 0);
  const zero = signed ? top + ROW / 2 : top + ROW;
  const parts = bars(values, x, wide, zero, (signed ? ROW / 2 : ROW) / most);
  const unit = UNITS[score] ? `, ${UNITS[score]}` : "";
  frame.append(svg("text", { class: "name", x: LEFT, y: top - 4 }, (LABELS[score] || score) + unit),
    svg("text", { class: "tick", x: LEFT - 5, y: top + 6, "text-anchor": "end" }, (signed ? "+" : "") + format(most)),
    svg("text", { class: "tick", x: LEFT - 5, y: top + ROW, "text-anchor": "end" }, signed ? format(-most) : "0"),
    svg("path", { class: signed ? "positive" : "sequential", d: parts.positive }), svg("path", { class: "negative", d: parts.negative }),
    svg("line", { class: "axis", x1: LEFT, x2: right, y1: zero, y2: zero }));
}

function ribbon(frame, row, top, x, step) {
  let from = 0;
  row.role.forEach((role, at) => {
    if (at + 1 < row.role.length && row.role[at + 1] === role) return;
    frame.append(svg("rect", { class: `role r${role % 8}`, x: x(from), y: top, width: Math.max(0.5, (at + 1 - from) * step - (step > 4 ? 1 : 0)), height: RIBBON }));
    from = at + 1;
  });
}

// The largest size of a score over all the rows shown, so that bars compare across panes.
function mostOf(rows, score) {
  return Math.max(...rows.flatMap((row) => valuesOf(row, score).filter(defined).map(Math.abs)), 0) || 1;
}

function drawStrip(frame, row, scores, rows, width) {
  const step = (width - LEFT - RIGHT) / Math.max(1, row.tokens.length);
  const wide = step > 3 ? step - 1 : step;
  const x = (at) => LEFT + at * step;
  const roles = row.role ? RIBBON + 6 : 0;
  const bottom = scores.length * (ROW + GAP) + roles;
  frame.setAttribute("viewBox", `0 0 ${width} ${bottom + 34}`);
  frame.setAttribute("width", width);
  frame.setAttribute("height", bottom + 34);
  const cursor = svg("rect", { class: "cursor", y: 0, height: bottom, width: Math.max(2, step), visibility: "hidden" });
  frame.replaceChildren(cursor);
  scores.forEach((score, place) => stripRow(frame, row, score, mostOf(rows, score), place * (ROW + GAP) + GAP, x, wide, width - RIGHT));
  if (row.role) ribbon(frame, row, bottom - RIBBON, x, step);
  const marks = ticks(1, Math.max(2, row.tokens.length), width < 400 ? 4 : 8).filter((tick) => Number.isInteger(tick) && tick >= 1);
  for (const tick of new Set([1, ...marks])) {
    const at = x(tick - 1) + step / 2, last = at > width - RIGHT - 12;
    frame.append(svg("text", { class: "tick", x: last ? width - RIGHT : at, y: bottom + 14, "text-anchor": last ? "end" : "middle" }, String(tick)));
  }
  frame.append(svg("text", { class: "tick", x: (LEFT + width - RIGHT) / 2, y: bottom + 29, "text-anchor": "middle" }, "token position"));
  return {
    at: (place) => Math.max(0, Math.min(row.tokens.length - 1, Math.floor((place - LEFT) / step))),
    mark: (at) => {
      cursor.setAttribute("visibility", at === null ? "hidden" : "visible");
      if (at !== null) cursor.setAttribute("x", x(at) - (wide < step ? 0.5 : 0));
    },
  };
}
