// Going through completions: one before, one after, and a dot for each.

// One dot per completion, filled when correct, hollow when not, with a gap between prompts.
function dots(rows, index, choose) {
  return el("span", { class: "dots" }, rows.map((row, at) => el("button", {
    type: "button", class: `pick ${row.success ? "yes" : "no"}${at && rows[at - 1].prompt !== row.prompt ? " apart" : ""}`,
    "aria-current": at === index ? "true" : null, onclick: () => choose(at),
    "aria-label": `completion ${at + 1}, ${row.success === null ? "not judged" : row.success ? "correct" : "incorrect"}` })));
}

// Calls `choose(index, class of the button that keeps the focus)`.
function browser(rows, index, choose) {
  const go = (at, focus) => choose((at + rows.length) % rows.length, focus);
  const button = (name, label, sign, move) => el("button", { type: "button", class: name, "aria-label": label,
    onclick: () => go(index + move, name) }, sign);
  return el("div", { class: "browse" }, button("previous", "previous completion", "‹", -1),
    el("span", { class: "count" }, `${index + 1} of ${rows.length}`), button("next", "next completion", "›", 1), dots(rows, index, go));
}
