// uses: browse.js pane.js shade.js
// The token view: choose a run, a step and a completion, choose what colours the tokens, and compare two runs on one prompt.

const FILTERS = { all: () => true, correct: (row) => row.success === true, incorrect: (row) => row.success === false };

function stepOf(data, place) {
  return data.runs[place.run].steps[place.step];
}

// Moves to another run or step and stays on the same step number and prompt where they are there.
function moveTo(data, place, run, stepNumber, prompt) {
  const steps = data.runs[run].steps;
  const found = steps.findIndex((each) => each.step === stepNumber);
  Object.assign(place, { run, step: found < 0 ? steps.length - 1 : found, index: 0, prompt });
}

function runOptions(data) {
  return data.runs.map((run, at) => option(at, run.label));
}

function stepOptions(data, place) {
  return data.runs[place.run].steps.map((step, at) => option(at, format(step.step)));
}

function heading(data, place) {
  const run = data.runs[place.run];
  return el("h3", { class: `c${run.colour}` }, el("span", { class: "swatch" }), `${run.label}, step ${format(stepOf(data, place).step)}`);
}

class View {
  constructor(section, data) {
    this.data = data;
    this.all = data.runs.flatMap((run) => run.steps.flatMap((step) => step.rows));
    this.left = { run: 0, step: data.runs[0].steps.length - 1, index: 0, prompt: null };
    this.right = { run: null, step: 0, index: 0, prompt: null };
    this.score = data.score || quantities(this.all)[0];
    this.filter = "all";
    this.shared = false;
    this.card = makeCard();
    this.legend = el("div");
    this.prompt = el("div");
    this.panes = el("div", { class: "panes" });
    section.append(this.controls(), this.legend, this.prompt, this.panes, this.card);
    this.draw();
  }

  controls() {
    const { data } = this;
    const number = (value) => Number(value);
    this.run = select("Run", runOptions(data), (value) => this.move(this.left, number(value)));
    this.step = select("Step", [], (value) => this.move(this.left, this.left.run, number(value)));
    const shown = select("Completions", Object.keys(FILTERS).map((name) => option(name, name)), (value) => { this.filter = value; this.draw(); });
    const colour = select("Colour by", quantities(this.all).map((name) => option(name, LABELS[name] || name)), (value) => { this.score = value; this.draw(); });
    const range = select("Scale", [option("own", "fitted to this view"), option("shared", "same for all runs")],
      (value) => { this.shared = value === "shared"; this.draw(); });
    colour.input.value = this.score;
    this.other = select("Compare with", [option("", "nothing"), ...runOptions(data)], (value) => this.compare(value));
    this.otherStep = select("Step of comparison", [], (value) => this.move(this.right, this.right.run, number(value)));
    return el("div", { class: "controls" }, [this.run, this.step, shown, colour, range, this.other, this.otherStep].map((each) => each.field));
  }

  move(place, run, step) {
    const wanted = step === undefined ? stepOf(this.data, place).step : this.data.runs[run].steps[step].step;
    moveTo(this.data, place, run, wanted, place.prompt);
    this.draw();
  }

  compare(value) {
    if (value === "") this.right.run = null;
    else moveTo(this.data, this.right, Number(value), stepOf(this.data, this.left).step, this.left.prompt);
    this.draw();
  }

  // The rows of a pane, and its place among them: where its prompt is, when it came from elsewhere.
  rows(place, keep) {
    const rows = stepOf(this.data, place).rows.filter(keep);
    if (rows[place.index]?.prompt !== place.prompt) place.index = Math.max(0, rows.findIndex((row) => row.prompt === place.prompt));
    if (rows.length) place.prompt = rows[place.index].prompt;
    return rows;
  }

  draw(focus) {
    const { data, left, right } = this;
    this.card.hidden = true;
    this.step.input.replaceChildren(...stepOptions(data, left));
    this.step.input.value = left.step;
    this.otherStep.field.hidden = right.run === null;
    const lists = [[left, this.rows(left, FILTERS[this.filter])]];
    if (right.run !== null) {
      this.otherStep.input.replaceChildren(...stepOptions(data, right));
      this.otherStep.input.value = right.step;
      right.prompt = left.prompt;
      lists.push([right, this.rows(right, (row) => row.prompt === left.prompt)]);
    }
    const current = lists.map(([place, rows]) => rows[place.index]).filter(Boolean);
    const scale = makeScale(this.score, this.shared ? this.all : current);
    this.legend.replaceChildren(scaleLegend(scale, data.roles), ...(current.some((row) => row.role) && this.score !== "role" ? [roleLegend(data.roles)] : []));
    this.prompt.replaceChildren(...(lists[0][1].length ? [asked(data.prompts[left.prompt])] : []));
    const panes = lists.map(([place, rows]) => this.pane(place, rows, current, scale));
    this.panes.replaceChildren(...panes.map((pane) => pane.whole));
    this.panes.classList.toggle("two", panes.length > 1);
    panes.forEach((pane) => pane.start());
    if (focus) this.panes.querySelector(`.${focus}`)?.focus();
  }

  pane(place, rows, current, scale) {
    const title = heading(this.data, place);
    if (!rows.length) {
      const why = place === this.right ? "Nothing embedded here answers this prompt at this step." : `No ${this.filter} completion is embedded here.`;
      return { whole: el("article", { class: "pane" }, title, el("p", { class: "note" }, why)), start: () => {} };
    }
    const shown = completion(rows[place.index], current, scale, this.data, this.card);
    const choose = (at, focus) => {
      Object.assign(place, { index: at, prompt: rows[at].prompt });
      this.draw(focus);
    };
    return { whole: el("article", { class: "pane" }, title, browser(rows, place.index, choose), shown.whole), start: shown.start };
  }
}

draw("tokens.js", (section, data) => new View(section, data));
