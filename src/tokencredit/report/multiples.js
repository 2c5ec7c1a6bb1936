// uses: curves.js plot.js
// Small multiples of one measure at a time: a panel per method, beside the baseline, all on one scale.

draw("multiples.js", (section, data) => {
  const names = Object.keys(data), grid = el("div", { class: "panels small" }), about = el("p", { class: "note", role: "status" });
  const show = (name) => {
    const range = extent(data[name].flatMap(panelValues)), figures = [];
    for (const panel of data[name]) Object.assign(panel, { hidden: new Set(), range, small: true });
    const shareStep = (step) => figures.forEach((each) => each.mark(step));
    figures.push(...data[name].map((panel) => figure(panel, shareStep)));
    grid.replaceChildren(...figures.map((each) => each.whole));
    about.textContent = `${name}: ${data[name][0].about}.`;
    figures.forEach((each) => each.start());
  };
  const measure = select("Measure", names.map((name) => option(name, name)), show);
  section.append(el("div", { class: "controls" }, measure.field), about, grid);
  show(names[0]);
});
