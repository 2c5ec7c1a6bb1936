// uses: axes.js
// Predicted against real changes, one point per token or completion, at a learning rate that can be chosen.

draw("influence.js", (section, data) => {
  const state = { at: Math.max(0, data.factors.indexOf(1)) };
  const said = el("p", { class: "note", role: "status" }, "Point at a dot to read it.");
  const paint = (frame, width) => {
    const factor = data.factors[state.at];
    const xs = data.predicted.map((value) => value * factor), ys = data.real[state.at];
    const range = spanOf([...xs, ...ys], [0]);
    const { box, x, y } = plane(frame, Math.min(width, 560), 400, range, range, { x: "predicted change of log-probability (nats); real change upwards" });
    frame.append(svg("line", { class: "cross", x1: box.left, y1: y(range[0]), x2: box.right, y2: y(range[1]) }));
    xs.forEach((value, at) => {
      const label = `predicted ${format(value)}, real ${format(ys[at])}`;
      frame.append(svg("circle", { class: "point c0", cx: x(value), cy: y(ys[at]), r: 3.2, onpointerenter: () => { said.textContent = label; } },
        svg("title", null, label)));
    });
  };
  const plot = drawing("Predicted and real changes", paint);
  const rate = select("Learning rate", data.factors.map((factor, at) => option(at, `${format(factor)} of the rate`)), (value) => {
    state.at = Number(value);
    plot.again();
  });
  rate.input.value = String(state.at);
  section.append(el("div", { class: "controls" }, rate.field), plot.holder, said);
  plot.start();
});
