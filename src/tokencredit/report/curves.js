// uses: plot.js
// Small multiples of line plots that share a legend and a step under the pointer.

function figure(panel, shareStep) {
  const frame = svg("svg", { role: "img", tabindex: 0, "aria-label":
    `${panel.title}${panel.unit ? `, ${panel.unit}` : ""}, over ${panel.x || "optimizer steps"}. Arrow keys read the values; a table follows.` });
  const card = el("div", { class: "readout", role: "status", hidden: true });
  const plot = el("div", { class: "plot" }, frame, card);
  const heading = el("figcaption", null, el("strong", null, panel.title), panel.meaning ? `${panel.meaning}, ` : null,
    panel.unit ? el("span", { class: "unit" }, panel.unit) : null);
  const whole = el("figure", { class: "panel" }, heading, plot, numbers(panel));
  let drawn, at = null;
  const mark = (step) => {
    const shown = step !== null && drawn && drawn.steps.includes(step);
    drawn.cross.setAttribute("visibility", shown ? "visible" : "hidden");
    if (shown) for (const end of ["x1", "x2"]) drawn.cross.setAttribute(end, drawn.x(step));
  };
  const read = (step) => {
    at = step;
    card.hidden = step === null;
    shareStep(step);
    if (step === null) return;
    card.replaceChildren(...readout(panel, step));
    const { width } = card.getBoundingClientRect();
    const place = drawn.x(step), start = plot.getBoundingClientRect().left, room = document.documentElement.clientWidth - start - 8;
    const left = place + 14 + width <= room ? place + 14 : place - 14 - width;
    card.style.setProperty("left", `${Math.max(8 - start, Math.min(left, room - width))}px`);
  };
  frame.addEventListener("pointermove", (event) => {
    const place = event.clientX - frame.getBoundingClientRect().left;
    const near = drawn.steps.reduce((best, step) => Math.abs(drawn.x(step) - place) < Math.abs(drawn.x(best) - place) ? step : best);
    if (near !== at) read(near);
  });
  frame.addEventListener("pointerleave", () => read(null));
  frame.addEventListener("blur", () => read(null));
  frame.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") read(null);
    if (!move) return;
    event.preventDefault();
    const place = at === null ? (move > 0 ? -1 : drawn.steps.length) : drawn.steps.indexOf(at);
    read(drawn.steps[Math.max(0, Math.min(drawn.steps.length - 1, place + move))]);
  });
  return { whole, mark, start: () => onWidth(plot, (width) => { drawn = drawPanel(frame, panel, width); }) };
}

// The same values as a table, made when it is opened.
function numbers(panel) {
  const details = el("details", null, el("summary", null, "Numbers"));
  details.addEventListener("toggle", () => {
    if (!details.open || details.childElementCount > 1) return;
    const steps = panelSteps(panel);
    const columns = valuesAt(panel, steps[steps.length - 1]).map(([label]) => label);
    const rows = steps.map((step) => {
      const values = new Map(valuesAt(panel, step).map(([label, , value]) => [label, value]));
      return el("tr", null, el("th", { scope: "row" }, format(step)), columns.map((label) => el("td", null, values.get(label) || "–")));
    });
    details.append(el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `${panel.title}, numbers` }, el("table", null,
      el("thead", null, el("tr", null, el("th", null, panel.x || "step"), columns.map((label) => el("th", null, label)))), el("tbody", null, rows))));
  });
  return details;
}

// One button per method: pointing at it brings its lines forward, pressing it hides or shows them.
function legend(panels, root, hidden) {
  const entries = new Map(panels.flatMap((panel) => panel.series.map((curve) => [curve.label, curve.colour])));
  const curves = (label) => [...root.querySelectorAll(".curve")].filter((curve) => curve.dataset.label === label);
  const forward = (label) => {
    root.classList.toggle("dimmed", label !== null);
    for (const curve of root.querySelectorAll(".curve")) curve.classList.toggle("forward", curve.dataset.label === label);
  };
  const buttons = [...entries].map(([label, colour]) => {
    const button = el("button", { type: "button", class: `key c${colour}`, "aria-pressed": "true" }, el("span", { class: "swatch" }), label);
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", shown);
      hidden[shown ? "delete" : "add"](label);
      for (const curve of curves(label)) curve.classList.toggle("hidden", !shown);
    });
    for (const event of ["pointerenter", "focus"]) button.addEventListener(event, () => forward(label));
    for (const event of ["pointerleave", "blur"]) button.addEventListener(event, () => forward(null));
    return button;
  });
  return el("div", { class: "legend", role: "group", "aria-label": "Methods shown" }, buttons);
}

draw("curves.js", (section, data) => {
  const hidden = new Set();
  const range = data.shared ? extent(data.panels.flatMap(panelValues)) : null;
  for (const panel of data.panels) Object.assign(panel, { hidden, range, small: data.shared });
  const figures = [];
  const shareStep = (step) => figures.forEach((each) => each.mark(step));
  figures.push(...data.panels.map((panel) => figure(panel, shareStep)));
  const grid = el("div", { class: data.shared ? "panels small" : "panels" }, figures.map((each) => each.whole));
  section.append(legend(data.panels, grid, hidden), grid);
  figures.forEach((each) => each.start());
});
