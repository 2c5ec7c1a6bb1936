// uses: axes.js
// Calibration error against the agreement of entropy: one point per condition.

const KIND_COLOURS = { temperature: "c0", policy: "c1", difficulty: "c2" };

draw("conditions.js", (section, data) => {
  const choices = ["captured", "captured_spread", "spearman", "spearman_within"];
  let chosen = choices[0];
  const paint = (frame, width) => {
    const points = data.rows.filter((row) => defined(row.figures.ece.value) && defined(row.figures[chosen].value));
    const across = points.flatMap((row) => Object.values(row.figures.ece)), up = points.flatMap((row) => Object.values(row.figures[chosen]));
    const { x, y } = plane(frame, width, 340, spanOf(across, [0]), spanOf(up), { x: "calibration error (ECE)" });
    for (const row of points) {
      const a = row.figures.ece, b = row.figures[chosen];
      const mark = svg("g", { class: `mark ${KIND_COLOURS[row.kind] || "c3"}`, "data-label": row.label },
        svg("title", null, `${row.label}: error ${interval(a)}, ${data.names[chosen]} ${interval(b)}`));
      if (defined(a.low)) mark.append(svg("line", { x1: x(a.low), x2: x(a.high), y1: y(b.value), y2: y(b.value) }));
      if (defined(b.low)) mark.append(svg("line", { x1: x(a.value), x2: x(a.value), y1: y(b.low), y2: y(b.high) }));
      mark.append(svg("circle", { cx: x(a.value), cy: y(b.value), r: 4 }),
        svg("text", { class: "tick", x: x(a.value) + (x(a.value) > width * 0.7 ? -7 : 7), y: y(b.value) - 6, "text-anchor": x(a.value) > width * 0.7 ? "end" : "start" }, row.label));
      frame.append(mark);
    }
  };
  const plot = drawing("Calibration error against agreement; the table above holds the numbers", paint);
  const pick = select("Agreement", choices.map((name) => option(name, data.names[name])), (value) => { chosen = value; plot.again(); });
  const kinds = [...new Set(data.rows.map((row) => row.kind))];
  section.append(el("div", { class: "controls" }, pick.field),
    el("div", { class: "legend" }, kinds.map((kind) => el("span", { class: `key ${KIND_COLOURS[kind] || "c3"}` }, el("span", { class: "swatch" }), kind))), plot.holder);
  plot.start();
});
