// uses: axes.js plot.js
// Eigenvalues as shares of their sum, largest first.

draw("spectrum.js", (section, data) => {
  const names = Object.keys(data), most = Math.max(...names.map((name) => data[name].length));
  const plot = drawing("Spectrum", (frame, width) => {
    const { x, y } = plane(frame, Math.min(width, 720), 260, [0.5, most + 0.5], spanOf(names.flatMap((name) => data[name]), [0]), { x: "eigenvalue" });
    names.forEach((name, colour) => {
      const group = svg("g", { class: `curve c${colour}` });
      group.append(svg("path", { class: "line", d: path(data[name].map((_, at) => at + 1), data[name], x, y) }));
      data[name].forEach((value, at) => group.append(svg("circle", { class: "dot", cx: x(at + 1), cy: y(value), r: 3 },
        svg("title", null, `${name}, eigenvalue ${at + 1}: ${format(value)}`))));
      frame.append(group);
    });
  });
  const legend = names.map((name, colour) => el("span", { class: `key c${colour}` }, el("span", { class: "swatch" }), name));
  section.append(el("div", { class: "legend" }, legend), plot.holder);
  plot.start();
});
