// uses: axes.js
// A symmetric matrix of cosines as shaded cells, with lines between its blocks.

const CELL = { least: 5, most: 26, label: 11 };

function drawMatrix(frame, data, width, said) {
  const count = data.cosine.length;
  const named = (width - 90) / count >= CELL.label;
  const margin = named ? 90 : 8;
  const size = Math.max(CELL.least, Math.min(CELL.most, (width - margin - 8) / count));
  const side = margin + size * count + 8;
  frame.replaceChildren();
  for (const [name, value] of [["viewBox", `0 0 ${side} ${side}`], ["width", side], ["height", side]]) frame.setAttribute(name, value);
  data.cosine.forEach((row, i) => row.forEach((value, j) => {
    const label = `${data.names[i]} · ${data.names[j]}: ${format(value)}`;
    frame.append(svg("rect", { class: value < 0 ? "negative" : "positive", x: margin + j * size, y: margin + i * size, width: size, height: size,
      "fill-opacity": Math.min(1, Math.abs(value)).toFixed(3), onpointerenter: () => { said.textContent = label; } }));
    if (named && i === j) {
      const at = margin + (i + 0.5) * size;
      frame.append(svg("text", { class: "tick", x: margin - 5, y: at + 4, "text-anchor": "end" }, data.names[i]),
        svg("text", { class: "tick", x: 0, y: 0, transform: `translate(${at + 4},${margin - 5}) rotate(-90)` }, data.names[i]));
    }
  }));
  data.block.forEach((block, i) => {
    if (!i || block === data.block[i - 1]) return;
    const at = margin + i * size, end = margin + count * size;
    frame.append(svg("line", { class: "axis", x1: margin, x2: end, y1: at, y2: at }), svg("line", { class: "axis", x1: at, x2: at, y1: margin, y2: end }));
  });
}

draw("matrix.js", (section, data) => {
  const kinds = { tokens: "tokens of two rollouts", completions: "completions" };
  const state = { kind: data.tokens ? "tokens" : "completions" };
  const said = el("p", { class: "note", role: "status" }, "Point at a cell to read it.");
  const plot = drawing("Cosines", (frame, width) => drawMatrix(frame, data[state.kind], Math.min(width, 820), said));
  const kind = select("Between", Object.keys(data).map((name) => option(name, kinds[name])), (value) => {
    state.kind = value;
    plot.again();
  });
  kind.input.value = state.kind;
  plot.frame.classList.add("matrix");
  plot.holder.classList.add("scroll");
  section.append(el("div", { class: "controls" }, kind.field), said, plot.holder);
  plot.start();
});
