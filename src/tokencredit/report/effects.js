// uses: axes.js browse.js pane.js plot.js
// The token view: signed effects on the text, faded by uncertainty; on pointing, the interval and the alternatives; V along the way below.

const EFFECTS = ["before_after", "replace"];

function effectFacts(row, at, name) {
  const each = row[name], facts = [[name, defined(each.value[at]) ? interval({ value: each.value[at], low: each.low[at], high: each.high[at] }) : "undefined: no alternative"]];
  if (each.exact && defined(each.exact[at])) facts.push(["exact", format(each.exact[at])]);
  facts.push(["V before → after", `${format(row.value[at])} → ${format(row.value[at + 1])}`], ["probability", format(row.pi[at])]);
  for (const [proxy, values] of Object.entries(row.proxies)) facts.push([proxy, format(values[at])]);
  if (row.role) facts.push(["role", row.role[at]]);
  return [...facts, ["position", `${at + 1} of ${row.num_tokens}`]];
}

// What else could have been said, with the success rate of each, and its share of what else is likely where that is known.
function alternatives(others) {
  if (!others.length) return null;
  const shared = others.some((other) => defined(other.share));
  const heads = ["instead", "correct", "success", ...(shared ? ["share"] : [])];
  const rows = others.map((other) => el("tr", null, el("th", { scope: "row" }, visible(other.text)), el("td", null, `${format(other.correct)} of ${other.num}`),
    el("td", null, format(other.correct / other.num)), shared ? el("td", null, format(other.share)) : null));
  return el("table", { class: "alternatives" }, el("thead", null, el("tr", null, heads.map((head) => el("th", null, head)))), el("tbody", null, rows));
}

function paintEffect(span, row, at, name, threshold, most) {
  const value = row[name].value[at];
  span.classList.remove("positive", "negative", "undefined", "pivotal");
  if (!defined(value)) { span.classList.add("undefined"); span.style.setProperty("--strength", 0); return; }
  span.classList.add(value < 0 ? "negative" : "positive");
  span.style.setProperty("--strength", (Math.min(1, Math.abs(value) / most) * row[name].certainty[at]).toFixed(3));
  if (row.pivotal ? row.pivotal[name][at] : Math.abs(value) >= threshold && row[name].certainty[at] > 0.8) span.classList.add("pivotal");
}

function valueStrip(row, show) {
  let place = null, cursor = null;
  const paint = (frame, width) => {
    const steps = row.value.map((_, at) => at);
    const { x, y, box } = plane(frame, width, 190, [0, Math.max(1, steps.length - 1)], [0, 1], { x: "tokens written" });
    const curve = { step: steps, low: row.low, high: row.high };
    frame.append(svg("g", { class: "curve c0" }, svg("path", { class: "band", d: band(curve, x, y) }), svg("path", { class: "line", d: path(steps, row.value, x, y) })));
    cursor = svg("line", { class: "cross", y1: box.top, y2: box.bottom, visibility: "hidden" });
    frame.append(cursor);
    place = { x, at: (left) => Math.round((left - box.left) / (box.right - box.left) * (steps.length - 1)) - 1 };
  };
  const plot = drawing("Success probability after every token, with its 95 % band", paint);
  plot.frame.addEventListener("pointermove", (event) => {
    const at = place.at(event.clientX - plot.frame.getBoundingClientRect().left);
    show(at >= 0 && at < row.tokens.length ? at : null);
  });
  plot.frame.addEventListener("pointerleave", () => show(null));
  const mark = (at) => {
    if (!cursor) return;
    cursor.setAttribute("visibility", at === null ? "hidden" : "visible");
    if (at !== null) for (const end of ["x1", "x2"]) cursor.setAttribute(end, place.x(at + 1));
  };
  return { ...plot, mark };
}

draw("effects.js", (section, data) => {
  if (!data.rows.length) return;
  const state = { row: 0, name: EFFECTS[0] };
  const card = makeCard(), holder = el("div", null);
  const most = (name) => Math.max(0.05, ...data.rows.flatMap((row) => row[name].value.filter(defined).map(Math.abs)));
  const change = (focus) => {
    const row = data.rows[state.row], top = most(state.name);
    card.hidden = true;
    const line = tokenLine(row, (span, at) => paintEffect(span, row, at, state.name, data.threshold, top));
    const fill = (at) => fillCard(card, row.tokens[at], effectFacts(row, at, state.name), alternatives(row.alternatives[at]));
    const show = linked([line], card, fill, (at) => strip.mark(at));
    const strip = valueStrip(row, show);
    const choose = (at, focus) => { state.row = at; change(focus); };
    holder.replaceChildren(asked(row.prompt), browser(data.rows, state.row, choose), verdict(row), line.box,
      el("p", { class: "note" }, "Success probability V along the completion"), strip.holder);
    strip.start();
    if (focus) holder.querySelector(`.${focus}`)?.focus();
  };
  const effect = select("Effect", EFFECTS.map((name) => option(name, name)), (value) => { state.name = value; change(); });
  section.append(el("div", { class: "controls" }, effect.field), holder, card);
  change();
});
