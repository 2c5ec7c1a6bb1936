// uses: axes.js plot.js
// Every method a point: relative variance across, on a logarithmic scale, and the angle of its mean gradient up.

draw("variance_plane.js", (section, data) => {
  const state = { world: Object.keys(data.worlds)[0], axis: Object.keys(data.axes)[0] };
  const log = (value) => defined(value) && value > 0 ? Math.log10(value) : null;
  const paint = (frame, width) => {
    const found = data.worlds[state.world].filter((each) => defined(each.relative_variance.value) && defined(each[state.axis].value));
    const most = Math.max(...found.map((each) => log(each.relative_variance.value))) + 0.5;
    const across = spanOf(found.flatMap(({ relative_variance: v }) => [log(v.low), log(v.value), Math.min(log(v.high) ?? most, most)]));
    const up = spanOf(found.flatMap((each) => Object.values(each[state.axis])), [0]);
    const labels = width < 560 ? 0 : 150;
    const { x, y, box } = plane(frame, width, 440, across, up, { x: "tr Cov / |mean gradient|², prompts", xs: logTicks(...across), ofX: (tick) => format(10 ** tick) }, { right: width - 12 - labels });
    frame.append(svg("text", { class: "tick unit", x: box.left + 4, y: box.top + 8 }, data.axes[state.axis]));
    const named = found.map((each) => {
      const v = each.relative_variance, a = each[state.axis], centre = [x(log(v.value)), y(a.value)];
      const told = `${each.name}: relative variance ${interval(v)}, angle ${interval(a)}`;
      const mark = svg("g", { class: `mark c${each.colour}`, "data-method": each.name }, svg("title", null, told));
      const ends = Math.min(x(log(v.high) ?? across[1]), box.right);
      if (defined(v.low) && v.low !== v.high) mark.append(svg("line", { class: "faint", x1: x(log(v.low)), x2: ends, y1: centre[1], y2: centre[1] }));
      if (defined(a.low) && a.low !== a.high) mark.append(svg("line", { class: "faint", x1: centre[0], x2: centre[0], y1: y(a.low), y2: y(a.high) }));
      mark.append(svg("circle", { cx: centre[0], cy: centre[1], r: 4.5 }));
      frame.append(mark);
      return { name: each.name, colour: each.colour, centre, y: centre[1] };
    });
    for (const label of labels ? placeLabels(named, 14, box.top + 6, box.bottom) : []) {
      frame.append(svg("g", { class: `curve c${label.colour}` }, svg("path", { class: "leader", d: `M${label.centre[0] + 6},${label.centre[1]}L${box.right + 8},${label.at}` }),
        svg("text", { class: "label", x: box.right + 12, y: label.at + 4 }, label.name)));
    }
  };
  const plot = drawing("Methods: relative variance and angle; the table below holds the numbers", paint);
  const pick = (label, names, key) => select(label, names.map(([name, meaning]) => option(name, meaning)), (value) => { state[key] = value; plot.again(); });
  section.append(el("div", { class: "controls" }, pick("Checkpoint", Object.keys(data.worlds).map((name) => [name, name]), "world").field,
    pick("Bias", Object.entries(data.axes), "axis").field),
  el("div", { class: "legend" }, Object.entries(data.legend).map(([name, colour]) => el("span", { class: `key c${colour}` }, el("span", { class: "swatch" }), name))), plot.holder);
  plot.start();
});
