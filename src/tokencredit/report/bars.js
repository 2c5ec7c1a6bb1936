// uses: axes.js
// Bars from zero with intervals, one plot per quantity.

draw("bars.js", (section, data) => {
  const figures = Object.entries(data.bars).map(([title, bars]) => {
    const paint = (frame, width) => {
      const range = spanOf(bars.flatMap((bar) => [bar.value, bar.low, bar.high]), [0]);
      const { box, x } = plane(frame, width, bars.length * 24 + 56, range, [0, 1], { x: title, y: null }, { left: width < 420 ? 96 : 120 });
      bars.forEach((bar, at) => {
        const middle = box.top + 12 + at * 24, [left, right] = [x(0), x(bar.value)].sort((one, other) => one - other);
        const mark = svg("g", { class: `mark ${bar.value < 0 ? "c1" : "c0"}`, "data-bar": bar.name }, svg("title", null, `${bar.name}: ${interval(bar)}`),
          svg("rect", { class: "bar-fill", x: left, y: middle - 7, width: Math.max(right - left, 0.5), height: 14 }));
        if (defined(bar.low)) mark.append(svg("line", { class: "whisker", x1: x(bar.low), x2: x(bar.high), y1: middle, y2: middle }));
        frame.append(svg("text", { class: "tick", x: box.left - 8, y: middle + 4, "text-anchor": "end" }, bar.name), mark);
      });
      frame.append(svg("line", { class: "axis", x1: x(0), x2: x(0), y1: box.top, y2: box.bottom }));
    };
    const plot = drawing(`${title}: ${bars.map((bar) => `${bar.name} ${interval(bar)}`).join("; ")}`, paint);
    return { whole: el("figure", null, el("figcaption", null, el("strong", null, title)), plot.holder), plot };
  });
  section.append(el("div", { class: "panels" }, figures.map((figure) => figure.whole)));
  figures.forEach((figure) => figure.plot.start());
});
