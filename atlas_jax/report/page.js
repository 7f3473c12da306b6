"use strict";
// The data: `curves` [{title, x, y, lines: [[label, steps, values]]}], `texts`, and `sources`: steps, and
// evaluations, which do not train. Each has `samples`, whose texts are numbers in `texts`, and `groups` [id, [[member, reward, before, after,
// faults, number in samples or -1]]]. Every text gets into the page as text, never as HTML.

const LEFT = 46, RIGHT = 352, TOP = 8, BOTTOM = 164, WIDTH = 360;
const PAGE = 20; // cards that are added at a time
const MAX_WORDS = 700; // longest texts of which the changed words are marked

async function read(element) {
  const text = element.textContent;
  if (element.dataset.encoding === "plain") return JSON.parse(text);
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

const show = (value) => (typeof value === "number" ? String(+value.toPrecision(4)) : String(value ?? "-"));

// Curves

function addValues(figure, curve) {
  const svg = figure.querySelector("svg");
  const tip = make("div", { class: "tip", hidden: "" });
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cursor.setAttribute("class", "cursor");
  svg.append(cursor);
  figure.append(tip);
  const steps = [...new Set(curve.lines.flatMap((line) => line[1]))].sort((a, b) => a - b);
  const [low, high] = curve.x;
  const place = (step) => LEFT + (high > low ? (step - low) / (high - low) : 0.5) * (RIGHT - LEFT);
  const leave = () => { tip.hidden = true; cursor.setAttribute("d", ""); };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * WIDTH;
    const step = steps.reduce((a, b) => (Math.abs(place(b) - x) < Math.abs(place(a) - x) ? b : a));
    cursor.setAttribute("d", `M${place(step)} ${TOP}V${BOTTOM}`);
    const lines = curve.lines.map(([label, at, values]) => [label, values[at.indexOf(step)]]);
    const known = lines.filter(([, value]) => value !== undefined);
    tip.replaceChildren(`step ${step}`, ...known.map(([label, value]) => make("div", {}, `${label}: ${show(value)}`)));
    tip.hidden = false;
    const left = (place(step) / WIDTH) * box.width;
    tip.style.top = `${box.top - figure.getBoundingClientRect().top + 4}px`;
    tip.style.left = place(step) < WIDTH / 2 ? `${left + 8}px` : "";
    tip.style.right = place(step) < WIDTH / 2 ? "" : `${box.width - left + 8}px`;
  });
  const details = figure.querySelector("details");
  details.addEventListener("toggle", () => {
    const box = details.querySelector(".scroll");
    if (!details.open || box.childElementCount) return;
    const head = make("tr", {}, ...["step", ...curve.lines.map((line) => line[0])].map((t) => make("th", { scope: "col" }, t)));
    const rows = steps.map((step) => {
      const cells = curve.lines.map(([, at, values]) => make("td", { class: "number" }, show(values[at.indexOf(step)])));
      return make("tr", {}, make("th", { scope: "row" }, String(step)), ...cells);
    });
    box.append(make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
  });
}

// Texts with the changed words marked

const words = (text) => text.match(/\s+|[\p{L}\p{N}]+|[^\s\p{L}\p{N}]/gu) || [];

// The longest common subsequence of words: [kind, text] with kind 0 in both, -1 in `a` only, 1 in `b`.
function compare(a, b) {
  const old = words(a), now = words(b);
  if (old.length > MAX_WORDS || now.length > MAX_WORDS) return [[-1, a], [1, b]];
  const common = Array.from({ length: old.length + 1 }, () => new Uint16Array(now.length + 1));
  for (let i = old.length - 1; i >= 0; i--)
    for (let j = now.length - 1; j >= 0; j--)
      common[i][j] = old[i] === now[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
  const parts = [];
  const add = (kind, word) => {
    if (parts.length && parts.at(-1)[0] === kind) parts.at(-1)[1] += word;
    else parts.push([kind, word]);
  };
  let i = 0, j = 0;
  while (i < old.length || j < now.length) {
    if (i < old.length && j < now.length && old[i] === now[j]) { add(0, old[i++]); j++; }
    else if (j === now.length || (i < old.length && common[i + 1][j] >= common[i][j + 1])) add(-1, old[i++]);
    else add(1, now[j++]);
  }
  return parts;
}

function marked(parts, side) {
  const tag = side < 0 ? "del" : "ins";
  return parts.filter(([kind]) => kind === 0 || kind === side).map(([kind, text]) => (kind ? make(tag, {}, text) : text));
}

function block(title, content, extra = "") {
  const body = make("div", { dir: "auto" }, ...(Array.isArray(content) ? content : [content]));
  return make("div", { class: `text ${extra}` }, make("h4", {}, title), body);
}

// Samples

const KINDS = [
  ["wrong → right", (s) => s.before === false && s.after === true],
  ["right → wrong", (s) => s.before === true && s.after === false],
  ["leak", (s) => s.leaks],
  ["gamed", (s) => s.faults.length > 0],
  ["unscored", (s) => s.reward === null && s.source.trains],
  ["largest advantage", (s) => s.isLargest],
];

class Samples {
  constructor(data) {
    this.texts = data.texts;
    this.sources = data.sources;
    this.all = data.sources.flatMap((source) => source.samples.map((sample, place) => ({ ...sample, source, place })));
    for (const source of data.sources) this.markLargest(source);
    this.kind = -1;
    this.question = null;
    this.group = null;
    this.addControls();
    this.update();
  }

  markLargest(source) {
    const own = this.all.filter((sample) => sample.source === source && sample.advantage !== null);
    const sizes = own.map((sample) => Math.abs(sample.advantage));
    const limit = sizes.sort((a, b) => b - a)[Math.min(2, sizes.length - 1)];
    for (const sample of own) sample.isLargest = sample.advantage !== 0 && Math.abs(sample.advantage) >= limit;
  }

  addControls() {
    const box = document.getElementById("kinds");
    this.buttons = KINDS.map(([name, test], number) => {
      const button = make("button", { type: "button", "aria-pressed": "false" }, `${name} (${this.all.filter(test).length})`);
      button.addEventListener("click", () => { this.kind = this.kind === number ? -1 : number; this.reset(); });
      return button;
    });
    box.append(...this.buttons);
    this.select = document.getElementById("source");
    this.sources.forEach((source, number) => {
      const run = new Set(this.sources.map((s) => s.run)).size > 1 ? `run ${source.run + 1}, ` : "";
      const count = `${source.samples.length} of ${source.count}`;
      this.select.append(make("option", { value: number }, `${run}${source.label} (${count})`));
    });
    this.select.addEventListener("change", () => this.reset());
    this.search = document.getElementById("search");
    this.search.addEventListener("input", () => this.reset());
    document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
    this.more = document.getElementById("more");
    this.more.addEventListener("click", () => this.add());
  }

  reset() {
    this.question = null;
    this.group = null;
    this.update();
  }

  matches(sample) {
    if (this.group) return this.group.includes(sample);
    if (this.question !== null) return sample.id === this.question;
    if (this.kind >= 0 && !KINDS[this.kind][1](sample)) return false;
    if (this.select.value !== "" && sample.source !== this.sources[this.select.value]) return false;
    const wanted = this.search.value.trim().toLowerCase();
    return !wanted || ["question", "id", "truth", "approach", "wrote", "alone", "taught"].some(
      (name) => this.texts[sample[name]].toLowerCase().includes(wanted));
  }

  update() {
    this.found = this.all.filter((sample) => this.matches(sample));
    // The newest step comes first, with its most telling sample; the lessons of one question are read in order.
    if (this.question === null && !this.group) {
      const order = new Map(this.sources.map((source, number) => [source, number]));
      this.found.sort((a, b) => order.get(b.source) - order.get(a.source) || a.place - b.place);
    }
    this.buttons.forEach((button, number) => button.setAttribute("aria-pressed", String(number === this.kind && this.question === null && !this.group)));
    const status = document.getElementById("found");
    status.textContent = `${this.found.length} of ${this.all.length} samples`;
    if (this.question !== null) status.textContent += `: the lessons of one question over the steps, changed words marked`;
    if (this.group) status.textContent += `: those of one group`;
    if (this.question !== null || this.group) {
      const back = make("button", { type: "button" }, "back to all");
      back.addEventListener("click", () => this.reset());
      status.append(" ", back);
    }
    document.getElementById("list").replaceChildren();
    this.shown = 0;
    this.add();
  }

  add() {
    const next = this.found.slice(this.shown, this.shown + PAGE);
    const cards = next.map((sample, i) => this.card(sample, this.question === null ? null : this.found[this.shown + i - 1]));
    document.getElementById("list").append(...cards);
    this.shown += next.length;
    this.more.hidden = this.shown >= this.found.length;
    this.more.textContent = `more (${this.found.length - this.shown})`;
  }

  card(sample, earlier) {
    const text = (name) => this.texts[sample[name]];
    const changed = text("alone") && text("taught") ? compare(text("alone"), text("taught")) : null;
    const lesson = earlier ? marked(compare(this.texts[earlier.lesson], text("lesson")), 1) : text("lesson");
    const verdict = (right) => (right === null ? "" : right ? ", ✓ right" : ", ✕ wrong");
    const [before, wrote, after] = sample.tokens.map((n) => (n === null ? "" : `, ${n} tokens`));
    const sides = changed
      ? make("div", { class: "sides" },
          block(`alone${verdict(sample.before)}${before}`, marked(changed, -1)),
          block(`taught${verdict(sample.after)}${after}`, marked(changed, 1)))
      : null;
    const own = text("lesson") ? "lesson" : `text without a lesson${text("alone") ? "" : verdict(sample.after)}`;
    return make("article", { class: "card" },
      make("h3", { dir: "auto" }, text("question") || text("id")),
      this.tags(sample, text("truth")),
      make("div", { class: "sides" },
        text("approach") ? block("approach of the student", text("approach")) : null,
        block(`${own}${wrote}`, text("lesson") ? lesson : text("wrote"), "lesson")),
      sides,
      this.more_of(sample));
  }

  tags(sample, truth) {
    const tags = [[`${sample.source.label}, member ${sample.member}`], [`truth: ${truth || "-"}`]];
    if (sample.source.trains) tags.push([`reward ${show(sample.reward)}`], [`advantage ${show(sample.advantage)}`]);
    if (sample.before === false && sample.after === true) tags.push(["✓ wrong → right", "good"]);
    if (sample.before === true && sample.after === false) tags.push(["✕ right → wrong", "bad"]);
    for (const fault of sample.faults) tags.push([`! ${fault}`, "bad"]);
    if (sample.unscored && sample.source.trains) tags.push([`! unscored: ${sample.unscored}`, "bad"]);
    for (const [name, value] of sample.parts) tags.push([`${name}: ${show(value)}`]);
    if (!sample.trains && sample.source.trains) tags.push(["does not train"]);
    return make("ul", { class: "tags" }, ...tags.map(([text, kind]) => make("li", { class: kind || "", dir: "auto" }, text)));
  }

  // Everything else of a sample: the whole text of the teacher, judges, its group, its question.
  more_of(sample) {
    const judges = sample.judges.map((judge) =>
      block(`judge ${judge.name}: ${show(judge.score)}, uncertainty ${show(judge.uncertainty)}` +
        (judge.escalation ? `, asked the large model: ${judge.escalation}` : ""),
      judge.rationale || (judge.failures || []).join("; ") || "-"));
    const [id, members] = this.groupOf(sample);
    const group = members.map(([member, reward, before, after, faults, place]) => {
      const change = before === false && after ? " ✓" : before && after === false ? " ✕" : "";
      const label = `${member}: ${show(reward)}${change}${faults ? " !" : ""}`;
      return make("span", place === sample.place ? { class: "here" } : {}, label);
    });
    const kept = members.filter((member) => member[5] >= 0).map((member) => this.all.find((s) => s.source === sample.source && s.place === member[5])).filter(Boolean);
    const buttons = [];
    if (kept.length > 1) {
      const button = make("button", { type: "button" }, `its group (${kept.length} of ${members.length})`);
      button.addEventListener("click", () => { this.reset(); this.group = kept; this.update(); });
      buttons.push(button);
    }
    const same = this.all.filter((other) => other.id === sample.id);
    if (this.texts[id] && same.length > 1) {
      const button = make("button", { type: "button" }, `this question over the steps (${same.length})`);
      button.addEventListener("click", () => { this.reset(); this.question = sample.id; this.update(); });
      buttons.push(button);
    }
    const details = make("details", {}, make("summary", {}, "all texts, judges and the group"));
    details.addEventListener("toggle", () => {
      if (details.childElementCount > 1) return;
      details.append(block(`teacher's whole text, weights of step ${show(sample.version)}`, this.texts[sample.wrote]),
        ...sample.further.map(([who, text]) => block(`further answer ${who}`, this.texts[text])), ...judges,
        make("h4", {}, "rewards of the group"), make("div", { class: "group" }, ...group));
    });
    return make("div", {}, details, make("div", { class: "group" }, ...buttons));
  }

  groupOf(sample) {
    const own = sample.source.groups.find(([, members]) => members.some((member) => member[5] === sample.place));
    return own || [0, []];
  }
}

async function start() {
  const data = await read(document.getElementById("data"));
  for (const figure of document.querySelectorAll("[data-curve]")) addValues(figure, data.curves[figure.dataset.curve]);
  if (document.getElementById("filters")) new Samples(data);
  document.documentElement.dataset.ready = "yes";
}

start();
