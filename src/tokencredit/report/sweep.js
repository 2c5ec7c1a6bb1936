// uses: axes.js plot.js
// |ΔH| over learning rates on two logarithmic axes: truths by kind, lines for what is predicted.

const TRUTHS = [["same", "c3", "same rollouts, reweighted"], ["independent", "c0", "independent rollouts, reweighted"], ["fresh", "c1", "fresh samples"]];
const FORMS = { odd: "odd half-difference", whole: "the step itself" };

draw("sweep.js", (section, data) => {
  const state = { update: 0, form: "odd" };
  const said = el("p", { class: "note", role: "status" });
  const log = (value) => value > 0 ? Math.log10(value) : NaN;
  const paint = (frame, width) => {
    const each = data[state.update], predicted = (rate, order) => {
      const f = rate / each.lr;
      return Math.abs(each.linear * f + (order > 1 ? each.quadratic * f * f : 0));
    };
    const rates = each.rates, top = Math.max(...rates), bottom = Math.min(each.floor, ...rates) / 1.5;
    const xRange = [log(bottom), log(Math.max(top, Math.min(each.reach.value || top, top * 4)) * 1.4)];
    const values = rates.flatMap((rate) => [predicted(rate, 1), predicted(rate, 2)]);
    const yRange = [log(Math.min(...values, predicted(bottom, 1))) - 0.25, log(Math.max(...values)) + 0.35];
    const { x, y, box } = plane(frame, width, 380, xRange, yRange, { x: "log₁₀ of the learning rate; up: log₁₀ of |ΔH| in nats" });
    const inside = (value) => Math.max(box.top, Math.min(box.bottom, y(log(value))));
    const floor = Math.min(x(log(each.floor)), box.right);
    frame.append(svg("g", { class: "curve c7" }, svg("rect", { class: "band", x: box.left, width: Math.max(0, floor - box.left), y: box.top,
      height: box.bottom - box.top }, svg("title", null, `rounding in float32 hides changes below a learning rate of ${format(each.floor)}`))));
    if (defined(each.reach.value) && log(each.reach.value) < xRange[1]) frame.append(svg("line", { class: "cross", x1: x(log(each.reach.value)),
      x2: x(log(each.reach.value)), y1: box.top, y2: box.bottom }, svg("title", null, `linear range: ${interval(each.reach)}`)));
    const steps = Array.from({ length: 90 }, (_, at) => 10 ** (xRange[0] + (xRange[1] - xRange[0]) * at / 89));
    for (const [order, colour] of state.form === "odd" ? [[1, "c2"]] : [[1, "c2"], [2, "c5"]]) {
      frame.append(svg("g", { class: `curve ${colour}`, "data-order": order }, svg("path", { class: "line",
        d: path(steps, steps.map((rate) => predicted(rate, order)), (rate) => x(log(rate)), inside) })));
    }
    TRUTHS.forEach(([kind, colour, label], place) => rates.forEach((rate, at) => {
      const point = each.sweep[kind][at][state.form], size = Math.abs(point.value), half = 1.96 * point.error;
      if (!(size > 0)) return;
      const at_x = x(log(rate)) + (place - 1) * 5, text = `${label}, learning rate ${format(rate)}: ${format(point.value)} ± ${format(half)}`;
      const mark = svg("g", { class: `mark ${colour}`, "data-kind": kind }, svg("title", null, text));
      mark.append(svg("line", { x1: at_x, x2: at_x, y1: inside(size + half), y2: size > half ? inside(size - half) : box.bottom }));
      if (log(size) > yRange[0] && log(size) < yRange[1]) mark.append(svg("circle", { cx: at_x, cy: y(log(size)), r: 3.4 }));
      frame.append(mark);
    }));
    said.textContent = `Update ${Number(state.update) + 1}, ${FORMS[state.form]}: linear ${format(each.linear)}, quadratic ${format(each.quadratic)} ` +
      `at the optimizer's own rate ${format(each.lr)}; linear range up to ${interval(each.reach)}.`;
  };
  const plot = drawing("Size of the change of entropy over learning rates; tables hold the numbers", paint);
  const update = select("Update", data.map((_, at) => option(at, at + 1)), (value) => { state.update = value; plot.again(); });
  const form = select("Change", Object.entries(FORMS).map(([name, label]) => option(name, label)), (value) => { state.form = value; plot.again(); });
  const keys = [...TRUTHS.map(([, colour, label]) => [colour, label]), ["c2", "linear"], ["c5", "linear + quadratic"]];
  section.append(el("div", { class: "controls" }, update.field, form.field), el("div", { class: "legend" },
    keys.map(([colour, label]) => el("span", { class: `key ${colour}` }, el("span", { class: "swatch" }), label))), plot.holder, said);
  plot.start();
});
