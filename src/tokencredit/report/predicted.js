// uses: axes.js
// Predicted against true, one point per update, and the errors of small predictions.

draw("predicted.js", (section, data) => {
  const paint = (frame, width) => {
    const all = Object.values(data.points).flat().flatMap((point) => [point.predicted, point.true]).flatMap((each) => [each.value, each.low, each.high]);
    const range = spanOf(all, [0]);
    const { x, y, box } = plane(frame, width, 360, range, range, { x: "predicted, nats; up: true, nats" }, { left: 64 });
    frame.append(svg("line", { class: "cross", x1: x(range[0]), y1: y(range[0]), x2: x(range[1]), y2: y(range[1]) }));
    Object.entries(data.points).forEach(([kind, points], place) => points.forEach((point, at) => {
      const { predicted, true: found } = point;
      const mark = svg("g", { class: `mark c${place}`, "data-kind": kind }, svg("title", null,
        `update ${at + 1}, ${kind}: predicted ${interval(predicted)}, true ${interval(found)}`));
      mark.append(svg("line", { x1: x(predicted.low), x2: x(predicted.high), y1: y(found.value), y2: y(found.value) }),
        svg("line", { x1: x(predicted.value), x2: x(predicted.value), y1: y(found.low), y2: y(found.high) }),
        svg("circle", { cx: x(predicted.value), cy: y(found.value), r: 3.6 }));
      frame.append(mark);
    }));
  };
  const spread = (frame, width) => {
    const most = Math.max(...data.errors.map(Math.abs), 0.5), bins = 24, counts = Array(bins).fill(0);
    for (const error of data.errors) counts[Math.min(bins - 1, Math.floor((error + most) / (2 * most) * bins))] += 1;
    const { x, y, box } = plane(frame, width, 220, [-most, most], [0, Math.max(...counts) * 1.05], { x: `relative error from ${data.size} rollouts` });
    frame.append(svg("g", { class: "heat" }, counts.map((count, at) => svg("rect", { x: x(-most + 2 * most * at / bins) + 1, y: y(count),
      width: (box.right - box.left) / bins - 2, height: box.bottom - y(count) }, svg("title", null, `${count} of ${data.errors.length}`)))));
    frame.append(svg("line", { class: "cross", x1: x(0), x2: x(0), y1: box.top, y2: box.bottom }));
  };
  const plots = [drawing("Predicted against true change of entropy; a table follows", paint), drawing("Distribution of relative errors", spread)];
  const legend = el("div", { class: "legend" }, Object.keys(data.points).map((kind, place) => el("span", { class: `key c${place}` }, el("span", { class: "swatch" }), kind)));
  section.append(legend, el("div", { class: "panels" }, plots.map((plot) => plot.holder)));
  plots.forEach((plot) => plot.start());
});
