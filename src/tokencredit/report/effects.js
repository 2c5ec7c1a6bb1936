// uses: axes.js plot.js shade.js
// The token view: signed effects on the text, faded by uncertainty; on pointing, the interval and the alternatives; V along the way below.

const EFFECTS = ["before_after", "replace"];

function effectCard(card, row, at, name) {
  const each = row[name], facts = [[name, defined(each.value[at]) ? `${interval({ value: each.value[at], low: each.low[at], high: each.high[at] })}` : "undefined: no alternative"]];
  if (each.exact && defined(each.exact[at])) facts.push(["exact", format(each.exact[at])]);
  facts.push(["V before → after", `${format(row.value[at])} → ${format(row.value[at + 1])}`], ["probability", format(row.pi[at])]);
  for (const [proxy, values] of Object.entries(row.proxies)) facts.push([proxy, format(values[at])]);
  if (row.role) facts.push(["role", row.role[at]]);
  facts.push(["position", `${at + 1} of ${row.num_tokens}`]);
  const others = row.alternatives[at].map((other) => el("tr", null, el("th", { scope: "row" }, visible(other.text)),
    el("td", null, `${other.correct} of ${other.num}`), el("td", null, format(other.correct / other.num)), el("td", null, format(other.share))));
  card.replaceChildren(el("div", { class: "token-text" }, visible(row.tokens[at])),
    el("dl", null, facts.map(([label, value]) => el("div", null, el("dt", null, label), el("dd", null, value)))),
    others.length ? el("table", { class: "alternatives" }, el("thead", null, el("tr", null, ["instead", "correct", "success", "share"].map((head) => el("th", null, head)))),
      el("tbody", null, others)) : "");
}

function paintEffect(span, row, at, name, threshold, most) {
  const value = row[name].value[at];
  span.classList.remove("positive", "negative", "undefined", "pivotal");
  if (!defined(value)) { span.classList.add("undefined"); span.style.setProperty("--strength", 0); return; }
  span.classList.add(value < 0 ? "negative" : "positive");
  span.style.setProperty("--strength", (Math.min(1, Math.abs(value) / most) * row[name].certainty[at]).toFixed(3));
  if (Math.abs(value) >= threshold && row[name].certainty[at] > 0.8) span.classList.add("pivotal");
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
  const state = { row: 0, name: "before_after" };
  const card = el("div", { class: "card", role: "status", hidden: true });
  const holder = el("div", null);
  const most = (name) => Math.max(0.05, ...data.rows.flatMap((row) => row[name].value.filter(defined).map(Math.abs)));
  const change = () => {
    const row = data.rows[state.row], top = most(state.name);
    card.hidden = true;
    const spans = row.tokens.map((token, at) => {
      const span = el("span", { class: "token", role: "option", tabindex: at ? -1 : 0, "data-at": at }, visible(token), row.role ? " " : null);
      paintEffect(span, row, at, state.name, data.threshold, top);
      return span;
    });
    let current = null;
    const show = (at) => {
      if (current !== null) spans[current].classList.remove("current");
      current = at;
      strip.mark(at);
      card.hidden = at === null;
      if (at === null) return;
      spans[at].classList.add("current");
      effectCard(card, row, at, state.name);
      const box = spans[at].getBoundingClientRect(), size = card.getBoundingClientRect();
      const below = box.bottom + 8 + size.height <= window.innerHeight;
      card.style.setProperty("left", `${Math.max(8, Math.min(box.left, document.documentElement.clientWidth - size.width - 8))}px`);
      card.style.setProperty("top", `${below ? box.bottom + 8 : Math.max(8, box.top - size.height - 8)}px`);
    };
    const strip = valueStrip(row, show);
    const text = el("div", { class: "completion", role: "listbox", dir: "auto", "aria-label": "Tokens; arrow keys move" }, spans);
    const tokenOf = (target) => target.closest && target.closest(".token");
    text.addEventListener("pointerover", (event) => { const token = tokenOf(event.target); if (token) show(Number(token.dataset.at)); });
    text.addEventListener("pointerleave", () => show(null));
    text.addEventListener("focusin", (event) => show(Number(tokenOf(event.target).dataset.at)));
    text.addEventListener("focusout", () => show(null));
    text.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return show(null);
      const at = current ?? 0, to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const next = spans[Math.max(0, Math.min(spans.length - 1, to))];
      for (const span of spans) span.tabIndex = span === next ? 0 : -1;
      next.focus();
    });
    const cut = row.tokens.length < row.num_tokens ? `, the first ${row.tokens.length} shown` : "";
    holder.replaceChildren(el("p", { class: "judged" }, el("span", { class: `verdict ${row.correct ? "yes" : "no"}` }, row.correct ? "✓ correct" : "✕ incorrect"),
      el("span", null, row.reason), el("span", null, `${row.num_tokens} tokens${cut}`)),
    el("div", { class: "prompt" }, el("div", { class: "text", dir: "auto" }, visible(row.prompt))), text,
    el("p", { class: "note" }, "Success probability V along the completion"), strip.holder);
    strip.start();
  };
  const pick = select("Completion", data.rows.map((row, at) => option(at, `${at + 1}, ${row.correct ? "correct" : "incorrect"}`)), (value) => { state.row = Number(value); change(); });
  const effect = select("Effect", EFFECTS.map((name) => option(name, name)), (value) => { state.name = value; change(); });
  section.append(el("div", { class: "controls" }, pick.field, effect.field), holder, card);
  change();
});
