// uses: axes.js plot.js
// |ΔH| at ever smaller learning rates in two precisions, and the expansion that they leave.

draw("rounding.js", (section, data) => {
  const series = [["float32_changes", "c1", "float32"], ["float64_changes", "c0", "float64"]].filter(([name]) => data[name]);
  const log = (value) => Math.log10(Math.abs(value) || 1e-16);
  const paint = (frame, width) => {
    const xs = data.factors.map((factor) => Math.log10(factor * data.lr));
    const all = [...series.flatMap(([name]) => data[name]), ...data.expansion].map(log);
    const { x, y } = plane(frame, width, 300, spanOf(xs), [Math.min(...all) - 0.2, Math.max(...all) + 0.2], { x: "log₁₀ of the learning rate; up: log₁₀ of |ΔH| in nats" });
    frame.append(svg("g", { class: "curve c2" }, svg("path", { class: "line", d: path(xs, data.expansion.map(log), x, y) })));
    for (const [name, colour, label] of series) xs.forEach((at, place) => frame.append(svg("g", { class: `mark ${colour}` },
      svg("title", null, `${label}, learning rate ${format(10 ** at)}: ${format(data[name][place])}`), svg("circle", { cx: x(at), cy: y(log(data[name][place])), r: 3.6 }))));
  };
  const plot = drawing("Changes of entropy at ever smaller rates against their expansion", paint);
  const keys = [...series.map(([, colour, label]) => [colour, label]), ["c2", "expansion"]];
  section.append(el("div", { class: "legend" }, keys.map(([colour, label]) => el("span", { class: `key ${colour}` }, el("span", { class: "swatch" }), label))), plot.holder);
  plot.start();
});
