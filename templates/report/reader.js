/** The reader: predictions beside questions and references, one row at a time. Text is never inserted as markup. */

const PAGE = 8;
const MOST_LINES = 300;
const MOST_CHARACTERS = 4000;
/** Characters that are invisible or change the direction of text. */
const MARKS = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]|\udb40[\udc00-\udc7f]/g;

/** Put text into an element, with invisible characters as code points, and the rest of long texts behind a button. */
function show(place, text, most = MOST_CHARACTERS) {
  let start = 0;
  const head = text.slice(0, most);
  for (const match of head.matchAll(MARKS)) {
    place.append(head.slice(start, match.index));
    const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    place.append(element("span", "mark", `U+${code}`));
    start = match.index + match[0].length;
  }
  place.append(head.slice(start));
  if (head.length < text.length) {
    const rest = text.slice(most);
    const more = element("button", "more", `… ${rest.length.toLocaleString("en")} more characters`);
    more.type = "button";
    more.addEventListener("click", () => { more.remove(); show(place, rest, 10 * most); });
    place.append(more);
  }
  return place;
}

/** Where the diff in a text begins, at a hunk's head or a tag; -1 if it holds none. */
const TAGGED = /^<(?:add|del|keep)>/;
const diffStart = (text) => (TAGGED.test(text) ? 0 : text.search(/^@@ -\d+(?:,\d+)? \+\d+(?:,\d+)? @@/m));

/** Lines of a diff; a diff on one line, with tags, is split. */
function linesOf(diff) {
  if (!TAGGED.test(diff)) return diff.split("\n");
  const signs = { add: "+", del: "-", keep: " " };
  return diff.split(/(?=<(?:add|del|keep)>)/).map((part) => {
    const [, tag, rest] = /^<(add|del|keep)>(.*)$/s.exec(part);
    return signs[tag] + rest;
  });
}

function showDiff(place, diff, from = 0) {
  const lines = linesOf(diff);
  for (const line of lines.slice(from, from + MOST_LINES)) {
    const sign = "+-".includes(line[0] ?? " ") ? line[0] : " ";
    const isHunk = line.startsWith("@@");
    const row = element(sign === "+" ? "ins" : sign === "-" ? "del" : "div", isHunk ? "hunk" : "");
    row.append(element("span", "sign", sign), show(element("span", "code"), isHunk ? line : line.slice(1)));
    place.append(row);
  }
  if (lines.length > from + MOST_LINES) {
    const more = element("button", "more", `… ${lines.length - from - MOST_LINES} more lines`);
    more.type = "button";
    more.addEventListener("click", () => { more.remove(); showDiff(place, diff, from + MOST_LINES); });
    place.append(more);
  }
}

function number(value) {
  return value === null || value === undefined ? "–" : value.toFixed(Math.abs(value) >= 1 ? 2 : 4);
}

class Reader {
  constructor(sets) {
    this.sets = sets;
    $("set").replaceChildren(...sets.map((set, i) => new Option(set.data, i)));
    $("set").closest("label").hidden = sets.length < 2;
    $("set").addEventListener("change", () => this.take(this.sets[$("set").value]));
    for (const id of ["query", "language", "low", "high", "order"]) $(id).addEventListener("input", () => this.filter());
    $("score").addEventListener("input", () => { this.scale(); this.filter(); });
    $("filters").addEventListener("submit", (event) => event.preventDefault());
    $("clear").addEventListener("click", () => this.take(this.set));
    $("before").addEventListener("click", () => this.step(-1));
    $("after").addEventListener("click", () => this.step(1));
    document.addEventListener("keydown", (event) => this.press(event));
    this.take(sets[0]);
  }

  /** Show the rows of one data file, with the predictions of every model. */
  take(set) {
    this.set = set;
    this.texts ??= new Map();
    const languages = [...new Set(set.language.filter(Boolean))].sort();
    $("language").replaceChildren(new Option("all", ""), ...languages.map((name) => new Option(name, name)));
    $("language").closest("label").hidden = !languages.length;
    this.columns = set.models.flatMap((model) => Object.entries(model.scores).map(([name, values]) => ({
      label: set.models.length > 1 ? `${name}, ${model.label}` : name, values,
    })));
    $("score").replaceChildren(...this.columns.map((column, i) => new Option(column.label, i)));
    for (const id of ["query", "low", "high"]) $(id).value = "";
    $("order").value = "row";
    for (const id of ["score", "low", "high", "order"]) $(id).closest("label").hidden = !this.columns.length;
    const hasDiffs = set.prompt?.some((parts) => parts.some(([, text]) => diffStart(text) >= 0));
    $("searched").textContent = `Search in ${hasDiffs ? "diffs" : "questions"}, references and predictions`;
    this.scale();
    this.filter();
  }

  /** Values of the selected score by row; none if no score belongs to single rows. */
  get values() {
    return this.columns[$("score").value]?.values ?? [];
  }

  scale() {
    const known = this.values.filter((value) => value !== null);
    $("low").placeholder = number(known.reduce((a, b) => Math.min(a, b), Infinity));
    $("high").placeholder = number(known.reduce((a, b) => Math.max(a, b), -Infinity));
  }

  /** All text of each row in lower case, cached at the first search. */
  searched() {
    const { set } = this;
    if (!this.texts.has(set)) {
      this.texts.set(set, set.reference.map((reference, i) => (
        [reference, ...set.models.map((model) => model.predictions[i] ?? ""), ...(set.prompt?.[i] ?? []).map(([, text]) => text)].join("\n").toLowerCase()
      )));
    }
    return this.texts.get(set);
  }

  filter() {
    const { set, values } = this;
    const query = $("query").value.toLowerCase();
    const language = $("language").value;
    const low = $("low").value === "" ? null : $("low").valueAsNumber;
    const high = $("high").value === "" ? null : $("high").valueAsNumber;
    const texts = query ? this.searched() : null;
    const found = [];
    for (let i = 0; i < set.reference.length; i++) {
      if (language && set.language[i] !== language) continue;
      if (low !== null && !(values[i] !== null && values[i] >= low)) continue;
      if (high !== null && !(values[i] !== null && values[i] <= high)) continue;
      if (texts && !texts[i].includes(query)) continue;
      found.push(i);
    }
    const order = $("order").value;
    if (order !== "row") {
      const sign = order === "up" ? 1 : -1;
      found.sort((a, b) => sign * ((values[a] ?? -1) - (values[b] ?? -1)) || a - b);
    }
    this.found = found;
    const [some, all] = [found.length, set.reference.length].map((count) => count.toLocaleString("en"));
    $("count").textContent = some === all ? `${all} rows` : `${some} of ${all} rows match`;
    this.go(0);
  }

  step(by) {
    this.go(Math.min(Math.max(this.at + by, 0), this.found.length - 1));
  }

  go(at) {
    this.at = at;
    const row = this.found[at];
    $("before").disabled = at <= 0;
    $("after").disabled = at >= this.found.length - 1;
    $("position").textContent = row === undefined ? "" : `${[at + 1, this.found.length].map((count) => count.toLocaleString("en")).join(" of ")}`;
    this.list();
    this.read(row);
    this.highlight();
  }

  /** Show the page of matches that contains the current row. */
  list() {
    const start = this.at - (this.at % PAGE);
    const { columns, values } = this;
    const model = this.set.models[0];
    $("matches").replaceChildren(...this.found.slice(start, start + PAGE).map((i, offset) => {
      const item = element("li");
      const button = element("button");
      button.type = "button";
      const head = element("span", "head");
      head.append(element("span", "", `row ${this.set.row[i]}${this.set.language[i] ? ` · ${this.set.language[i]}` : ""}`));
      if (columns.length) head.append(element("span", "", number(values[i])));
      const text = (model.predictions[i] ?? "").slice(0, 90).replace(/\s+/g, " ");
      button.append(head, show(element("bdi", "start"), text || "(empty)"));
      if (start + offset === this.at) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => { this.go(start + offset); this.focus(); });
      item.append(button);
      return item;
    }));
  }

  /** Keep the keyboard focus on the current row of the recreated list. */
  focus() {
    $("matches").querySelector("[aria-current]")?.focus();
  }

  read(i) {
    const place = $("row");
    place.replaceChildren();
    if (i === undefined) {
      place.append(element("p", "quiet", "No row matches. Clear the filters to see them all."));
      return;
    }
    const { set } = this;
    const facts = [`Row ${set.row[i]}`, set.language[i], set.idx[i] === null ? "" : `position ${set.idx[i]} in the test file`];
    place.append(element("h3", "", facts.filter(Boolean).join(" · ")));
    if (!set.prompt) {
      place.append(element("p", "note", `The questions are not shown: ${set.data} is missing or has changed since the evaluation.`));
    }
    for (const [name, text] of set.prompt?.[i] ?? []) this.ask(place, name[0].toUpperCase() + name.slice(1), text);
    const texts = element("div", "texts");
    texts.append(this.said("Reference", "", set.reference[i]));
    for (const model of set.models) {
      const scores = Object.entries(model.scores).filter(([, values]) => values[i] !== null);
      const values = scores.map(([name, of]) => `${name} ${number(of[i])}`).join(" · ");
      const name = set.models.length > 1 ? `Prediction of ${model.label}` : "Prediction";
      texts.append(this.said(name, values, model.predictions[i]));
    }
    place.append(texts);
  }

  /** Show a part of the prompt; a diff in it by lines. */
  ask(place, title, text) {
    const start = diffStart(text);
    const before = start < 0 ? text : text.slice(0, start).trimEnd();
    if (before) place.append(this.said(title, "", before));
    if (start < 0) return;
    const diff = element("div", "diff");
    diff.tabIndex = 0;
    diff.setAttribute("role", "region");
    diff.setAttribute("aria-label", "Diff");
    showDiff(diff, text.slice(start));
    place.append(element("h4", "", "Diff"), diff);
  }

  said(title, values, text) {
    const part = element("div");
    const head = element("h4", "", title);
    const said = element("div", "said");
    said.dir = "auto";
    said.tabIndex = 0;
    said.setAttribute("role", "region");
    said.setAttribute("aria-label", title);
    if (text) show(said, text);
    else said.append(element("span", "quiet", text === "" ? "(empty)" : "(no prediction)"));
    part.append(head, said);
    if (values) part.append(element("p", "values", values));
    return part;
  }

  /** Mark matches of the search, if the browser can do so without changing the page's elements. */
  highlight() {
    if (!window.Highlight) return;
    CSS.highlights.delete("found");
    const query = $("query").value.toLowerCase();
    if (!query) return;
    const marked = new Highlight();
    const walk = document.createTreeWalker($("row"), NodeFilter.SHOW_TEXT);
    while (walk.nextNode() && marked.size < 200) {
      const text = walk.currentNode.data.toLowerCase();
      if (text.length !== walk.currentNode.data.length) continue; // lower case changes the length in some scripts
      for (let at = text.indexOf(query); at >= 0 && marked.size < 200; at = text.indexOf(query, at + query.length)) {
        const range = new Range();
        range.setStart(walk.currentNode, at);
        range.setEnd(walk.currentNode, at + query.length);
        marked.add(range);
      }
    }
    CSS.highlights.set("found", marked);
  }

  press(event) {
    const inReader = document.activeElement === document.body || $("predictions").contains(document.activeElement);
    const typing = event.target.closest?.("input:not([type=checkbox]), select, textarea");
    if (!inReader || !$("keys").checked || event.ctrlKey || event.metaKey || event.altKey) return;
    if (typing) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const by = { j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1 }[event.key];
    const inList = $("matches").contains(document.activeElement);
    if (by) this.step(by);
    else if (event.key === "Home" && inList) this.go(0);
    else if (event.key === "End" && inList) this.go(this.found.length - 1);
    else if (event.key === "/") $("query").focus();
    else return;
    event.preventDefault();
    if (inList) this.focus();
  }
}

if ($("reader-data")) {
  unpack("reader-data").then((text) => {
    window.reader = new Reader(JSON.parse(text));
    $("reading").hidden = false;
    document.documentElement.dataset.reader = "ready";
  });
}
