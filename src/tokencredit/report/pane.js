// uses: shade.js strip.js
// One completion: what was asked, its verdict, its tokens, its strip; and the card of the token that is pointed at or focused.

function makeCard() {
  const card = el("div", { class: "card", role: "status", hidden: true });
  window.addEventListener("scroll", () => { card.hidden = true; }, { passive: true });
  return card;
}

// What is known of a token: its text, named facts, and what stands below them.
function fillCard(card, token, facts, more) {
  card.replaceChildren(el("div", { class: "token-text" }, visible(token)),
    el("dl", null, facts.map(([name, value]) => el("div", null, el("dt", null, name), el("dd", null, value)))), more || "");
}

function factsOf(row, at, roles) {
  const facts = quantities([row]).filter((score) => score !== "role").map((score) => {
    const value = valueOf(row, score, at), unit = UNITS[score] && defined(value) ? ` ${UNITS[score]}` : "";
    return [LABELS[score] || score, defined(value) ? format(value) + unit : "not defined"];
  });
  if (row.role) facts.push(["role", roles[row.role[at]]]);
  return [...facts, ["position", `${at + 1} of ${row.num_tokens}`]];
}

function placeCard(card, box) {
  card.hidden = false;
  const { width, height } = card.getBoundingClientRect();
  const below = box.bottom + 8 + height <= window.innerHeight;
  card.style.setProperty("left", `${Math.max(8, Math.min(box.left, document.documentElement.clientWidth - width - 8))}px`);
  card.style.setProperty("top", `${below ? box.bottom + 8 : Math.max(8, box.top - height - 8)}px`);
}

// A prompt: text, or messages, each under who says it.
function asked(prompt) {
  const text = (content) => el("div", { class: "text", dir: "auto" }, visible(content));
  const said = typeof prompt === "string" ? text(prompt)
    : prompt.map((message) => el("div", { class: "message" }, el("span", { class: "who" }, message.role), text(message.content)));
  return el("div", { class: "prompt" }, el("h3", null, "Prompt"), said);
}

function verdict(row) {
  const [kind, sign, word] = row.success === null ? ["open", "?", "not judged"] : row.success ? ["yes", "✓", "correct"] : ["no", "✕", "incorrect"];
  const length = `${row.num_tokens} tokens${row.tokens.length < row.num_tokens ? `, the first ${row.tokens.length} shown` : ""}`;
  return el("p", { class: "judged" }, el("span", { class: `verdict ${kind}` }, `${sign} ${word}`),
    defined(row.reward) ? el("span", null, `reward ${format(row.reward)}`) : null,
    row.reason ? el("span", null, row.reason) : null, el("span", null, length));
}

// The tokens of a row as they are read; `colour(span, at)` colours one.
function tokenLine(row, colour, label) {
  const spans = row.tokens.map((token, at) => {
    const span = el("span", { class: "token", role: "option", tabindex: at ? -1 : 0, "data-at": at }, visible(token));
    colour(span, at);
    return span;
  });
  return { spans, box: el("div", { class: "completion", role: "listbox", dir: "auto", "aria-label": label || "Tokens; arrow keys move" }, spans) };
}

// Lines that show the same tokens: what is pointed at in one is marked in all, `fill(at)` fills its card, and `tell(at)` hears of it (null: of none).
function linked(lines, card, fill, tell) {
  let current = null;
  const show = (at, line = lines[0]) => {
    for (const { spans } of lines) {
      if (current !== null) spans[current].classList.remove("current");
      if (at !== null) spans[at].classList.add("current");
    }
    current = at;
    tell(at);
    if (at === null) { card.hidden = true; return; }
    fill(at);
    placeCard(card, line.spans[at].getBoundingClientRect());
  };
  for (const line of lines) listen(line, (at) => show(at, line), () => current);
  return show;
}

// Shows a row; `rows` are all that are shown side by side, so that their bars share an axis.
function completion(row, rows, scale, data, card) {
  const scores = ["credit", "entropy", scale.score].filter((score, place, all) =>
    score !== "role" && all.indexOf(score) === place && valuesOf(row, score).some(defined));
  const frame = svg("svg", { class: "strip", role: "img", "aria-label": `${scores.join(" and ")} along the token positions` });
  const holder = el("div", { class: "strip-holder" }, frame);
  const line = tokenLine(row, (span, at) => paint(span, scale, row, at));
  let strip;
  const show = linked([line], card, (at) => fillCard(card, row.tokens[at], factsOf(row, at, data.roles)), (at) => strip?.mark(at));
  frame.addEventListener("pointermove", (event) => show(strip.at(event.clientX - frame.getBoundingClientRect().left)));
  frame.addEventListener("pointerleave", () => show(null));
  const whole = el("div", null, verdict(row), line.box, holder);
  return { whole, start: () => onWidth(holder, (width) => { strip = drawStrip(frame, row, scores, rows, width); }) };
}

function listen({ box, spans }, show, current) {
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
