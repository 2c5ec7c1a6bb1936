// How a token is written and coloured: visible whitespace, and a scale from a value to a shade.

const UNITS = { entropy: "nats", logprob: "nats", "log-probability": "nats" };
const LABELS = { logprob: "log-probability", share: "part of the predicted change" };
const WHITE = /([ \u00a0]+|\t|\r?\n|\r|[\p{Cc}\p{Cs}\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2064\u2066-\u2069\ufeff])/u;
const JOINERS = /^[\u200c\u200d\ufe00-\ufe0f]+$/u; // invisible where they stand alone

// Whitespace and invisible characters as marks: a space keeps its place, what would reorder or hide text is written as its code point.
// A single space before a word stays a space; a token without text of its own is a part of a character, which the token that completes it shows.
function visible(token) {
  if (token === "") return [el("span", { class: "code part", title: "a part of a character, which the token that completes it shows" }, "…")];
  if (JOINERS.test(token)) return [...token].map(codePoint);
  return token.split(WHITE).filter((part) => part !== "").map((part, at, all) => {
    if (part === " " && at + 1 < all.length && !WHITE.test(all[at + 1])) return part;
    if (/^[ \u00a0]+$/.test(part)) return el("span", { class: "space" }, [...part].map((space) => el("span", { class: "blank" }, space)));
    if (/^(\r?\n|\r)$/.test(part)) return el("span", { class: "newline" }, part);
    if (part === "\t") return el("span", { class: "tab" }, part);
    return WHITE.test(part) ? codePoint(part) : part;
  });
}

function codePoint(letter) {
  return el("span", { class: "code" }, `U+${letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`);
}

function valueOf(row, score, at) {
  if (score !== "probability") return row.scores[score] ? row.scores[score][at] : null;
  const logprob = row.scores.logprob ? row.scores.logprob[at] : null;
  return defined(logprob) ? Math.exp(logprob) : null;
}

function valuesOf(row, score) {
  return row.tokens.map((_, at) => valueOf(row, score, at));
}

// The quantities that the rows hold, in the order a reader wants them.
function quantities(rows) {
  const names = new Set(rows.flatMap((row) => Object.keys(row.scores)));
  const first = ["credit", "entropy"].filter((name) => names.has(name));
  const rest = [...names].filter((name) => !["credit", "entropy", "logprob"].includes(name)).sort();
  const last = names.has("logprob") ? ["logprob"] : [];
  return [...first, ...(last.length ? ["probability"] : []), ...rest, ...last, ...(rows.some((row) => row.role) ? ["role"] : [])];
}

// A scale is symmetric about zero where values are signed; its end is where all but one in fifty values lie within, so that one outlier does not whiten the rest.
function makeScale(score, rows, signed = score === "credit") {
  if (score === "role") return { score };
  if (score === "probability") return { score, end: 1, beyond: false, kind: "falling" };
  const values = rows.flatMap((row) => valuesOf(row, score)).filter(defined);
  const sizes = values.map(Math.abs).sort((one, other) => one - other);
  const most = sizes[sizes.length - 1] || 1;
  const end = sizes[Math.ceil((sizes.length - 1) * 0.98)] || most;
  const negative = values.some((value) => value < 0), positive = values.some((value) => value > 0);
  const kind = signed || (negative && positive) ? "diverging" : negative ? "negative" : "rising";
  return { score, end, beyond: most > end * 1.001, kind };
}

// Class and strength (0 to 1) of a value.
function shade(scale, value) {
  if (!defined(value)) return ["undefined", 0];
  const strength = Math.min(1, (scale.kind === "falling" ? 1 - value : Math.abs(value)) / scale.end);
  if (scale.kind !== "diverging") return ["sequential", strength];
  return [value < 0 ? "negative" : "positive", strength];
}

function paint(node, scale, row, at) {
  node.classList.remove("undefined", "sequential", "negative", "positive", ...Array.from({ length: 8 }, (_, index) => `r${index}`));
  if (scale.score === "role") {
    if (row.role) node.classList.add(`r${row.role[at] % 8}`);
    return;
  }
  const [kind, strength] = shade(scale, valueOf(row, scale.score, at));
  node.classList.add(kind);
  node.style.setProperty("--strength", strength.toFixed(3));
}

function roleLegend(roles) {
  return el("div", { class: "shades" }, el("span", null, "role"), roles.map((role, index) => el("span", { class: `chip r${index % 8}` }, role)));
}

function scaleLegend(scale, roles) {
  if (scale.score === "role") return roleLegend(roles);
  const name = LABELS[scale.score] || scale.score, unit = UNITS[scale.score] ? ` (${UNITS[scale.score]})` : "";
  const end = format(scale.end), more = scale.beyond ? "≥ " : "", less = scale.beyond ? "≤ " : "";
  const marks = {
    diverging: [`${less}${format(-scale.end)}`, "0", `${more}+${end}`], rising: ["0", `${more}${end}`],
    negative: ["0", `${less}${format(-scale.end)}`], falling: ["1", "0"],
  }[scale.kind];
  return el("div", { class: "shades" }, el("span", null, name + unit), el("span", { class: "ramp" },
    el("span", { class: `bar ${scale.kind === "diverging" ? "diverging" : "sequential"}`, "aria-hidden": "true" }),
    el("span", { class: "marks" }, marks.map((mark) => el("span", null, mark)))));
}
