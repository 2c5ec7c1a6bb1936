// uses: axes.js
// Forest plot: one line per proxy, value and interval, by estimand and measure.

const SOURCES = [["exact", "c0", "exact"], ["sampled", "c1", "from rollouts"], ["noise alone", "c6", "noise alone"]];

draw("forest.js", (section, data) => {
  const state = { estimand: Object.keys(data.figures)[0], measure: "captured" };
  const note = el("p", { class: "note" });
  const table = el("details", null, el("summary", null, "Numbers"));
  const current = () => data.figures[state.estimand][state.measure] || {};
  const proxies = () => {
    const found = current(), main = found.exact || found.sampled || {};
    return Object.keys(main).sort((one, other) => (main[other].value ?? -9) - (main[one].value ?? -9));
  };
  const paint = (frame, width) => {
    const names = proxies(), all = Object.values(current()).flatMap((each) => Object.values(each));
    const range = spanOf(all.flatMap((each) => [each.value, each.low, each.high]), [0]);
    const height = names.length * 26 + 56;
    const { box, x } = plane(frame, width, height, range, [0, 1], { x: data.measures[state.measure], y: null }, { left: width < 420 ? 118 : 170 });
    frame.append(svg("line", { class: "axis", x1: x(0), x2: x(0), y1: box.top, y2: box.bottom }));
    names.forEach((name, at) => {
      const middle = box.top + 13 + at * 26;
      frame.append(svg("text", { class: "tick", x: box.left - 8, y: middle + 4, "text-anchor": "end" }, name));
      SOURCES.forEach(([source, colour], place) => {
        const found = (current()[source] || {})[name];
        if (!found || !defined(found.value)) return;
        const y = middle + (place - 1) * 5;
        const mark = svg("g", { class: `mark ${colour}`, "data-source": source, "data-proxy": name }, svg("title", null, `${name}, ${source}: ${interval(found)}`));
        if (defined(found.low)) mark.append(svg("line", { x1: x(found.low), x2: x(found.high), y1: y, y2: y }));
        mark.append(svg("circle", { cx: x(found.value), cy: y, r: 3.2 }));
        frame.append(mark);
      });
    });
  };
  const plot = drawing("Values and intervals of every proxy; a table follows", paint);
  const legend = el("div", { class: "legend" });
  const change = () => {
    if (!data.figures[state.estimand][state.measure]) state.measure = "captured";
    measure.input.replaceChildren(...Object.keys(data.measures).filter((name) => data.figures[state.estimand][name]).map((name) => option(name, data.measures[name])));
    measure.input.value = state.measure;
    note.textContent = `${state.estimand}: ${data.estimands[state.estimand]}. ${data.measures[state.measure]}: ${data.meanings[state.measure]}.`;
    const shown = SOURCES.filter(([source]) => current()[source]);
    legend.replaceChildren(...shown.map(([, colour, label]) => el("span", { class: `key ${colour}` }, el("span", { class: "swatch" }), label)));
    const rows = proxies().map((name) => el("tr", null, el("th", { scope: "row" }, name),
      shown.map(([source]) => el("td", null, current()[source][name] ? interval(current()[source][name]) : "–"))));
    table.replaceChildren(table.firstChild, el("table", null, el("thead", null, el("tr", null, el("th", null, "proxy"), shown.map(([, , label]) => el("th", null, label)))), el("tbody", null, rows)));
    plot.again();
  };
  const estimand = select("Effect", Object.keys(data.figures).map((name) => option(name, name)), (value) => { state.estimand = value; change(); });
  const measure = select("Measure", [], (value) => { state.measure = value; change(); });
  section.append(el("div", { class: "controls" }, estimand.field, measure.field), note, legend, plot.holder, table);
  change();
  plot.start();
});
