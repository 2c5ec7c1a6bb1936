// uses: axes.js
// Rows of values with intervals on one scale: differences between methods, or several settings of each.

draw("dots.js", (section, data) => {
  let view = data.views[0];
  const note = el("p", { class: "note" }), legend = el("div", { class: "legend" }), table = el("details", null, el("summary", null, "Numbers"));
  const paint = (frame, width) => {
    const marks = view.rows.flatMap((row) => row.marks);
    const range = spanOf(marks.flatMap((mark) => [mark.value, mark.low, mark.high]), view.zero ? [0] : []);
    const step = 24, height = view.rows.length * step + 56;
    const { box, x } = plane(frame, width, height, range, [0, 1], { x: view.x, y: null }, { left: width < 420 ? 124 : 170 });
    if (view.zero) frame.append(svg("line", { class: "axis", x1: x(0), x2: x(0), y1: box.top, y2: box.bottom }));
    view.rows.forEach((row, at) => {
      const middle = box.top + step / 2 + at * step;
      frame.append(svg("text", { class: "tick", x: box.left - 8, y: middle + 4, "text-anchor": "end" }, row.label));
      row.marks.forEach((mark, place) => {
        if (!defined(mark.value)) return;
        const y = middle + (place - (row.marks.length - 1) / 2) * 6;
        const said = `${row.label}, ${mark.title}: ${interval(mark)}`;
        const drawn = svg("g", { class: `mark c${mark.colour}`, "data-row": row.label }, svg("title", null, said));
        if (defined(mark.low)) drawn.append(svg("line", { x1: x(mark.low), x2: x(mark.high), y1: y, y2: y }));
        drawn.append(svg("circle", { cx: x(mark.value), cy: y, r: 3.4 }));
        if (mark.ring) drawn.append(svg("circle", { class: "ring", cx: x(mark.value), cy: y, r: 6 }));
        frame.append(drawn);
      });
    });
  };
  const plot = drawing("Values and intervals; a table follows", paint);
  const change = () => {
    note.textContent = view.note;
    legend.replaceChildren(...(view.legend || []).map((key) => el("span", { class: `key c${key.colour}` }, el("span", { class: "swatch" }), key.label)));
    const rows = view.rows.flatMap((row) => row.marks.map((mark) => el("tr", null, el("th", { scope: "row" }, row.label),
      el("td", null, mark.title + (mark.ring ? " (taken)" : "")), el("td", null, interval(mark)))));
    table.replaceChildren(table.firstChild, el("div", { class: "scroll" }, el("table", null, el("tbody", null, rows))));
    plot.again();
  };
  const measure = select(data.select || "", data.views.map((each, at) => option(at, each.label)), (at) => { view = data.views[at]; change(); });
  section.append(data.views.length > 1 ? el("div", { class: "controls" }, measure.field) : "", note, legend, plot.holder, table);
  change();
  plot.start();
});
