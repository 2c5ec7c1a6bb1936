// uses: axes.js
// Every point a rollout: what it adds to the change of entropy and of reward.

function central(values) {
  const sorted = values.filter(defined).sort((one, other) => one - other);
  const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
  return sorted.length ? [at(0.025), at(0.975)] : [];
}

draw("contributions.js", (section, data) => {
  const state = { zoom: "central" };
  const said = el("p", { class: "note", role: "status" });
  const hint = "Point at a rollout for its prompt and length.";
  const paint = (frame, width) => {
    const pick = (values) => spanOf(state.zoom === "all" ? values : central(values), [0]);
    const ranges = [pick(data.x), pick(data.y)];
    const { x, y, box } = plane(frame, width, 360, ...ranges, { x: "adds to entropy, 10⁻³ nats" });
    frame.append(svg("text", { class: "tick unit", x: box.left + 4, y: box.top + 8 }, "adds to reward, 10⁻³"),
      svg("line", { class: "axis", x1: box.left, x2: box.right, y1: y(0), y2: y(0) }),
      svg("line", { class: "axis", x1: x(0), x2: x(0), y1: box.top, y2: box.bottom }));
    const inside = (value, [low, high]) => value >= low && value <= high;
    let beyond = 0;
    data.x.forEach((value, at) => {
      if (!inside(value, ranges[0]) || !inside(data.y[at], ranges[1])) { beyond += 1; return; }
      const label = `${data.success[at] ? "correct" : "incorrect"}, prompt ${data.prompt[at] + 1}, ${data.length[at]} tokens: entropy ${format(value)}, reward ${format(data.y[at])}`;
      frame.append(svg("circle", { class: `point ${data.success[at] ? "c0" : "c1"}`, cx: x(value), cy: y(data.y[at]), r: 3.2,
        onpointerenter: () => { said.textContent = label; } }, svg("title", null, label)));
    });
    said.textContent = (beyond ? `${beyond} of ${data.x.length} rollouts lie outside. ` : "") + hint;
  };
  const plot = drawing("Rollouts: what they add to the change of entropy and of reward", paint);
  const zoom = select("Show", [option("central", "the middle 95 %"), option("all", "all")], (value) => { state.zoom = value; plot.again(); });
  const legend = el("div", { class: "legend" }, [["c0", "correct"], ["c1", "incorrect"]].map(([colour, name]) =>
    el("span", { class: `key ${colour}` }, el("span", { class: "swatch" }), name)));
  section.append(el("div", { class: "controls" }, zoom.field), legend, plot.holder, said);
  plot.start();
});
