// uses: axes.js shade.js
// Every point a token: a proxy's rank against an effect.

draw("scatter.js", (section, data) => {
  const state = { proxy: Object.keys(data.ranks)[0], estimand: "before_after" };
  const said = el("p", { class: "note", role: "status" });
  const paint = (frame, width) => {
    const xs = data.ranks[state.proxy], ys = data.effects[state.estimand];
    const { x, y, box } = plane(frame, width, 320, [0, 1], spanOf(ys, [0]), { x: `rank of ${state.proxy}, from least to most` });
    frame.append(svg("line", { class: "axis", x1: box.left, x2: box.right, y1: y(0), y2: y(0) }));
    xs.forEach((value, at) => {
      if (!defined(value) || !defined(ys[at])) return;
      const role = data.role ? data.roles[data.role[at]] : null;
      const label = `${role ? `${role}: ` : ""}${state.estimand} ${format(ys[at])}, rank ${format(value)}`;
      frame.append(svg("circle", { class: `point ${data.role ? `r${data.role[at] % 8}` : "c0"}`, cx: x(value), cy: y(ys[at]), r: 3.4,
        onpointerenter: () => { said.textContent = label; } }, svg("title", null, label)));
    });
  };
  const plot = drawing("Tokens: rank of a proxy against an effect", paint);
  const proxy = select("Proxy", Object.keys(data.ranks).map((name) => option(name, name)), (value) => { state.proxy = value; plot.again(); });
  const estimand = select("Effect", Object.keys(data.effects).map((name) => option(name, name)), (value) => { state.estimand = value; plot.again(); });
  estimand.input.value = state.estimand;
  said.textContent = `Effects ${data.source}.`;
  section.append(el("div", { class: "controls" }, proxy.field, estimand.field), data.role ? roleLegend(data.roles) : "", plot.holder, said);
  plot.start();
});
