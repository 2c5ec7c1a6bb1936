// uses: axes.js plot.js
// The naive correlation at thinned budgets, its fitted limit, and the exact value.

draw("budget.js", (section, data) => {
  const state = { estimand: Object.keys(data)[0], proxy: "entropy" };
  const said = el("p", { class: "note", role: "status" });
  const paint = (frame, width) => {
    const curve = data[state.estimand][state.proxy];
    const most = Math.max(...curve.rollouts), fit = (n) => curve.limit / Math.sqrt(1 + curve.constant / n);
    const values = curve.points.flatMap((each) => [each.value, each.low, each.high]);
    const { x, y, box } = plane(frame, width, 250, [0, most * 2], spanOf([...values, curve.limit, curve.exact], [0]), { x: "rollouts per token" });
    const steps = Array.from({ length: 80 }, (_, at) => 1 + (most * 2 - 1) * at / 79);
    frame.append(svg("g", { class: "curve c1" }, svg("path", { class: "line", d: path(steps, steps.map(fit), x, y) })));
    if (defined(curve.exact)) frame.append(svg("line", { class: "cross", x1: box.left, x2: box.right, y1: y(curve.exact), y2: y(curve.exact) }),
      svg("text", { class: "tick", x: box.right, y: y(curve.exact) - 5, "text-anchor": "end" }, "exact"));
    curve.rollouts.forEach((n, at) => {
      const each = curve.points[at], mark = svg("g", { class: "mark c1" }, svg("title", null, `${n} rollouts: ${interval(each)}`));
      if (defined(each.low)) mark.append(svg("line", { x1: x(n), x2: x(n), y1: y(each.low), y2: y(each.high) }));
      mark.append(svg("circle", { cx: x(n), cy: y(each.value), r: 3.6 }));
      frame.append(mark);
    });
    said.textContent = `Limit ${format(curve.limit)}${defined(curve.exact) ? `, exact ${format(curve.exact)}` : ""}; ` +
      curve.rollouts.map((n, at) => `${n} rollouts ${format(curve.points[at].value)}`).join(", ") + ".";
  };
  const plot = drawing("Naive correlation by rollouts per token", paint);
  const names = Object.keys(data[state.estimand]);
  if (!names.includes(state.proxy)) state.proxy = names[0];
  const proxy = select("Proxy", names.map((name) => option(name, name)), (value) => { state.proxy = value; plot.again(); });
  proxy.input.value = state.proxy;
  const estimand = select("Effect", Object.keys(data).map((name) => option(name, name)), (value) => { state.estimand = value; plot.again(); });
  section.append(el("div", { class: "controls" }, estimand.field, proxy.field), plot.holder, said);
  plot.start();
});
