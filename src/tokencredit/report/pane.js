// uses: shade.js strip.js
// One completion: its verdict, its tokens, its strip; and the card of the token that is pointed at or focused.

function makeCard() {
  return el("div", { class: "card", role: "status", hidden: true });
}

function fillCard(card, row, at, roles) {
  const facts = quantities([row]).filter((score) => score !== "role").map((score) => {
    const value = valueOf(row, score, at), unit = UNITS[score] && defined(value) ? ` ${UNITS[score]}` : "";
    return [LABELS[score] || score, defined(value) ? format(value) + unit : "not defined"];
  });
  if (row.role) facts.push(["role", roles[row.role[at]]]);
  facts.push(["position", `${at + 1} of ${row.num_tokens}`]);
  card.replaceChildren(el("div", { class: "token-text" }, visible(row.tokens[at])),
    el("dl", null, facts.map(([name, value]) => el("div", null, el("dt", null, name), el("dd", null, value)))));
}

function placeCard(card, box) {
  card.hidden = false;
  const { width, height } = card.getBoundingClientRect();
  const below = box.bottom + 8 + height <= window.innerHeight;
  card.style.setProperty("left", `${Math.max(8, Math.min(box.left, document.documentElement.clientWidth - width - 8))}px`);
  card.style.setProperty("top", `${below ? box.bottom + 8 : Math.max(8, box.top - height - 8)}px`);
}

function verdict(row) {
  const [kind, sign, word] = row.success === null ? ["open", "?", "not judged"] : row.success ? ["yes", "✓", "correct"] : ["no", "✕", "incorrect"];
  const length = `${row.num_tokens} tokens${row.tokens.length < row.num_tokens ? `, the first ${row.tokens.length} shown` : ""}`;
  return el("p", { class: "judged" }, el("span", { class: `verdict ${kind}` }, `${sign} ${word}`), el("span", null, `reward ${format(row.reward)}`),
    row.reason ? el("span", null, row.reason) : null, el("span", null, length));
}

// Shows a row; `rows` are all that are shown side by side, so that their bars share an axis.
function completion(row, rows, scale, data, card) {
  const scores = ["credit", "entropy", scale.score].filter((score, place, all) =>
    score !== "role" && all.indexOf(score) === place && valuesOf(row, score).some(defined));
  const frame = svg("svg", { class: "strip", role: "img", "aria-label": `${scores.join(" and ")} along the token positions` });
  const holder = el("div", { class: "strip-holder" }, frame);
  const spans = row.tokens.map((token, at) => {
    const span = el("span", { class: "token", role: "option", tabindex: at ? -1 : 0, "data-at": at }, visible(token));
    paint(span, scale, row, at);
    return span;
  });
  const box = el("div", { class: "completion", role: "listbox", dir: "auto", "aria-label": "Tokens; arrow keys move" }, spans);
  let strip, current = null;
  const show = (at) => {
    if (current !== null) spans[current].classList.remove("current");
    current = at;
    if (strip) strip.mark(at);
    if (at === null) { card.hidden = true; return; }
    spans[at].classList.add("current");
    fillCard(card, row, at, data.roles);
    placeCard(card, spans[at].getBoundingClientRect());
  };
  listen(box, spans, show, () => current);
  frame.addEventListener("pointermove", (event) => show(strip.at(event.clientX - frame.getBoundingClientRect().left)));
  frame.addEventListener("pointerleave", () => show(null));
  const whole = el("div", null, verdict(row), box, holder);
  return { whole, start: () => onWidth(holder, (width) => { strip = drawStrip(frame, row, scores, rows, width); }) };
}

function listen(box, spans, show, current) {
  const tokenOf = (target) => target.closest && target.closest(".token");
  box.addEventListener("pointerover", (event) => { const token = tokenOf(event.target); if (token) show(Number(token.dataset.at)); });
  box.addEventListener("pointerleave", () => {
    const focused = box.contains(document.activeElement) && tokenOf(document.activeElement);
    show(focused && focused.matches(":focus-visible") ? Number(focused.dataset.at) : null);
  });
  box.addEventListener("focusin", (event) => show(Number(tokenOf(event.target).dataset.at)));
  box.addEventListener("focusout", () => show(null));
  box.addEventListener("click", (event) => { const token = tokenOf(event.target); if (token) token.focus(); });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return show(null);
    const at = current() ?? 0, last = spans.length - 1;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = spans[Math.max(0, Math.min(last, to))];
    for (const span of spans) span.tabIndex = span === next ? 0 : -1;
    next.focus();
  });
}
