// uses: axes.js plot.js
// Every method a point: what its step does to entropy and to reward, with intervals; arrows from the first method.

draw("methods_plane.js", (section, data) => {
  const first = (names) => Object.keys(names)[0];
  const state = { shown: first(data.shown), step: first(data.steps), over: first(data.over) };
  const paint = (frame, width) => {
    const found = data.methods.map((method) => {
      const all = method.steps[state.step][state.over];
      return { name: method.name, entropy: all.entropy[state.shown], reward: all.reward[state.shown] };
    });
    const ends = (goal) => spanOf(found.flatMap((each) => [each[goal].low, each[goal].high, each[goal].value]), [0]);
    const { x, y, box } = plane(frame, width, 420, ends("entropy"), ends("reward"), { x: "change of entropy, 10⁻³ nats" }, { right: width - 150 });
    frame.append(svg("text", { class: "tick unit", x: box.left + 4, y: box.top + 8 }, "change of reward, 10⁻³"),
      svg("line", { class: "axis", x1: x(0), x2: x(0), y1: box.top, y2: box.bottom }),
      svg("line", { class: "axis", x1: box.left, x2: box.right, y1: y(0), y2: y(0) }));
    const start = [x(found[0].entropy.value), y(found[0].reward.value)];
    const labels = found.map((each, at) => {
      const colour = at ? `c${(at - 1) % 8}` : "plain", centre = [x(each.entropy.value), y(each.reward.value)];
      const told = `${each.name}: entropy ${interval(each.entropy)}, reward ${interval(each.reward)}`;
      const mark = svg("g", { class: `mark ${colour}`, "data-method": each.name }, svg("title", null, told));
      if (defined(each.entropy.low)) mark.append(svg("line", { class: "faint", x1: x(each.entropy.low), x2: x(each.entropy.high), y1: centre[1], y2: centre[1] }));
      if (defined(each.reward.low)) mark.append(svg("line", { class: "faint", x1: centre[0], x2: centre[0], y1: y(each.reward.low), y2: y(each.reward.high) }));
      if (at) mark.append(svg("line", { class: "arrow", x1: start[0], y1: start[1], x2: centre[0], y2: centre[1] }));
      mark.append(svg("circle", { cx: centre[0], cy: centre[1], r: at ? 4 : 6 }));
      frame.append(mark);
      return { at, colour, name: each.name, centre, y: centre[1] };
    });
    for (const label of placeLabels(labels, 14, box.top + 18, box.bottom - 6)) {
      frame.append(svg("g", { class: `curve ${label.colour}` }, svg("path", { class: "leader", d: `M${label.centre[0] + 6},${label.centre[1]}L${box.right + 9},${label.at}` }),
        svg("text", { class: "label", x: box.right + 12, y: label.at + 4 }, label.name)));
    }
  };
  const plot = drawing("Methods: change of entropy and of reward; a table follows", paint);
  const pick = (label, names, key) => select(label, Object.entries(names).map(([name, meaning]) => option(name, meaning)), (value) => { state[key] = value; plot.again(); });
  section.append(el("div", { class: "controls" }, pick("Show", data.shown, "shown").field, pick("Step", data.steps, "step").field, pick("Intervals", data.over, "over").field), plot.holder);
  plot.start();
});
