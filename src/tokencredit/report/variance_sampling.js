// uses: axes.js plot.js
// What keeping only some tokens costs, over the fraction that is kept: a line per way of choosing them.

draw("variance_sampling.js", (section, data) => {
  const state = { world: Object.keys(data.worlds)[0], measure: "cost" };
  const names = { cost: "tokens for equal variance, against all", added: "variance added, share of the gradient's" };
  const legend = el("div", { class: "legend" }), table = el("details", null, el("summary", null, "Numbers"));
  const floor = 1e-4;
  const shown = (value) => defined(value) ? (state.measure === "added" ? Math.log10(Math.max(value, floor)) : value) : null;
  const paint = (frame, width) => {
    const series = data.worlds[state.world][state.measure];
    const range = spanOf(series.flatMap((each) => each.points.flatMap((point) => [shown(point.value), shown(point.low), shown(point.high)])), state.measure === "cost" ? [0, 1] : []);
    const up = state.measure === "added" ? { ys: logTicks(...range), ofY: (tick) => format(10 ** tick) } : {};
    const { x, y, box } = plane(frame, width, 340, [0, 1], range, { x: "fraction of the tokens kept", ...up });
    if (state.measure === "cost") frame.append(svg("line", { class: "cross", x1: box.left, x2: box.right, y1: y(1), y2: y(1) }));
    for (const each of series) {
      const curve = { step: data.fractions, low: each.points.map((p) => shown(p.low)), high: each.points.map((p) => shown(p.high)) };
      frame.append(svg("g", { class: `curve c${each.colour}`, "data-scheme": each.label }, svg("title", null, each.label),
        svg("path", { class: "band", d: band(curve, x, y) }), svg("path", { class: "line", d: path(data.fractions, each.points.map((p) => shown(p.value)), x, y) })));
    }
  };
  const plot = drawing("Fraction of the tokens kept against its cost; a table follows", paint);
  const change = () => {
    const series = data.worlds[state.world][state.measure];
    legend.replaceChildren(...series.map((each) => el("span", { class: `key c${each.colour}` }, el("span", { class: "swatch" }), each.label)));
    const rows = series.map((each) => el("tr", null, el("th", { scope: "row" }, each.label), each.points.map((point) => el("td", null, interval(point)))));
    table.replaceChildren(table.firstChild, el("div", { class: "scroll" }, el("table", null,
      el("thead", null, el("tr", null, el("th", null, "kept"), data.fractions.map((fraction) => el("th", null, format(fraction))))), el("tbody", null, rows))));
    plot.again();
  };
  const worlds = select("Checkpoint", Object.keys(data.worlds).map((name) => option(name, name)), (value) => { state.world = value; change(); });
  const measure = select("Measure", Object.entries(names).map(([name, label]) => option(name, label)), (value) => { state.measure = value; change(); });
  section.append(el("div", { class: "controls" }, worlds.field, measure.field), legend, plot.holder, table);
  change();
  plot.start();
});
