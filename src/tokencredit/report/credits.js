// uses: browse.js pane.js shade.js
// One completion under several kinds of credit, one line under the other; a token is marked in all of them.

function creditLine(kind, row, data) {
  const scale = makeScale(kind.name, [row], true);
  const line = tokenLine(row, (span, at) => paint(span, scale, row, at), `Tokens under ${kind.label}; arrow keys move`);
  const heading = el("div", { class: "kind" }, el("h3", null, kind.label), kind.about ? el("p", { class: "note" }, kind.about) : null, scaleLegend({ ...scale, score: "" }, data.roles));
  return { ...line, whole: el("article", { class: "credit-line" }, heading, line.box) };
}

draw("credits.js", (section, data) => {
  const card = makeCard(), holder = el("div", null);
  for (const { name, label } of data.kinds) LABELS[name] = label;
  const change = (index, focus) => {
    const row = { ...data.rows[index], prompt: data.prompts[data.rows[index].prompt] };
    const lines = data.kinds.filter((kind) => row.scores[kind.name]).map((kind) => creditLine(kind, row, data));
    linked(lines, card, (at) => fillCard(card, row.tokens[at], factsOf(row, at, data.roles)), () => {});
    for (const { box } of lines) box.addEventListener("scroll", () => { for (const other of lines) other.box.scrollTop = box.scrollTop; });
    card.hidden = true;
    holder.replaceChildren(...(data.rows.length > 1 ? [browser(data.rows, index, change)] : []), asked(row.prompt), verdict(row), ...lines.map((line) => line.whole));
    if (focus) holder.querySelector(`.${focus}`)?.focus();
  };
  section.append(holder, card);
  change(0);
});
