// All VMs as a grid of which only the rows in view exist. Focus stays on the grid and points at a row
// (aria-activedescendant), so that it survives rows that come and go.

import { Bar, words } from "./bar.js";
import { KINDS, make, pair, printable } from "./format.js";
import { condition } from "./state.js";

const SPARE = 6; // rows beyond what is in view
const SORT_MS = 2000; // who is read must not jump about

const ORDER = {
  name: () => 0,
  cpu: (row) => -row.cpu.demand,
  memory: (row) => -row.memory.demand,
  state: (row) => -condition(row).rank,
};

export class List {
  constructor(state, onSelect) {
    this.state = state;
    this.onSelect = onSelect;
    this.root = document.getElementById("list");
    this.body = document.getElementById("rows");
    this.count = document.getElementById("count");
    this.none = document.getElementById("none");
    this.search = document.getElementById("search");
    this.names = [];
    this.shown = new Map(); // name -> Line, in the document
    this.spare = [];
    this.selected = "";
    this.sort = "name";
    this.sortedAt = 0;
    this.phone = matchMedia("(max-width: 699px)");
    this.root.addEventListener("scroll", () => this.later(), { passive: true });
    new ResizeObserver(() => this.later()).observe(this.root);
    this.root.addEventListener("click", (event) => {
      const line = event.target.closest("[role=row]");
      if (line) this.onSelect(line.dataset.name, true);
    });
    this.root.addEventListener("keydown", (event) => this.#key(event));
    this.search.addEventListener("input", () => this.arrange());
    this.search.addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown") this.root.focus();
      else if (event.key === "Enter" && this.names.length) this.onSelect(this.names[0], true);
      else return;
      event.preventDefault();
    });
    this.heads = [...document.querySelectorAll("#heads button")];
    for (const head of this.heads) {
      head.addEventListener("click", () => {
        this.sort = head.dataset.sort;
        this.arrange();
        this.root.scrollTop = 0;
      });
    }
  }

  get rowHeight() {
    return this.phone.matches ? 68 : 36;
  }

  /** After a change of the state. */
  update(changed) {
    const comes = this.state.rows.size !== this.known || [...changed].some((name) => !this.state.rows.has(name));
    if (comes || (this.sort !== "name" && performance.now() - this.sortedAt > SORT_MS)) this.arrange();
    for (const name of changed) this.shown.get(name)?.update(this.state.rows.get(name));
    this.later();
  }

  /** Filter and sort anew. */
  arrange() {
    const wanted = this.search.value.trim().toLowerCase();
    const rank = ORDER[this.sort];
    const rows = [...this.state.rows.values()].filter(
      (row) => !wanted || row.name.toLowerCase().includes(wanted) || row.hostname.toLowerCase().includes(wanted) || condition(row).text.includes(wanted),
    );
    const ranked = rows.map((row) => [rank(row), row.name]);
    ranked.sort((a, b) => a[0] - b[0] || compare(a[1], b[1]));
    this.names = ranked.map((one) => one[1]);
    this.known = this.state.rows.size;
    this.sortedAt = performance.now();
    for (const head of this.heads) {
      head.setAttribute("aria-pressed", String(head.dataset.sort === this.sort));
    }
    this.root.setAttribute("aria-rowcount", String(this.names.length));
    const all = this.state.rows.size;
    this.count.textContent = this.names.length === all ? `${all} VMs` : `${this.names.length} of ${all} VMs`;
    this.none.hidden = this.names.length > 0 || !this.state.host;
    this.none.textContent = all ? "No VM matches." : "No VMs yet: add one to broker.toml, or with guestctl.";
    this.later();
  }

  select(name, reveal) {
    this.selected = name;
    if (reveal) this.#reveal(this.names.indexOf(name));
    this.#draw();
  }

  later() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.#draw();
    });
  }

  #draw() {
    const height = this.rowHeight;
    this.body.style.height = `${this.names.length * height}px`;
    const first = Math.max(0, Math.floor(this.root.scrollTop / height) - SPARE);
    const last = Math.min(this.names.length, Math.ceil((this.root.scrollTop + this.root.clientHeight) / height) + SPARE);
    const wanted = new Map();
    for (let index = first; index < last; index += 1) wanted.set(this.names[index], index);
    for (const [name, line] of this.shown) {
      if (!wanted.has(name)) {
        this.shown.delete(name);
        this.spare.push(line);
      }
    }
    for (const [name, index] of wanted) {
      let line = this.shown.get(name);
      if (!line) {
        line = this.spare.pop() ?? new Line();
        line.become(this.state.rows.get(name));
        this.shown.set(name, line);
        if (!line.root.parentNode) this.body.append(line.root);
      }
      line.place(index, height, name === this.selected);
    }
    for (const line of this.spare) line.root.remove();
    this.spare.length = Math.min(this.spare.length, 20);
    const active = this.shown.get(this.selected);
    if (active) this.root.setAttribute("aria-activedescendant", active.root.id);
    else this.root.removeAttribute("aria-activedescendant");
  }

  #reveal(index) {
    if (index < 0) return;
    const [top, height] = [index * this.rowHeight, this.rowHeight];
    if (top < this.root.scrollTop) this.root.scrollTop = top;
    else if (top + height > this.root.scrollTop + this.root.clientHeight) this.root.scrollTop = top + height - this.root.clientHeight;
  }

  #key(event) {
    const page = Math.max(1, Math.floor(this.root.clientHeight / this.rowHeight) - 1);
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Enter" || event.key === " ") {
      if (this.selected) this.onSelect(this.selected, true);
    } else if (step !== undefined && this.names.length) {
      const now = this.names.indexOf(this.selected);
      const next = Math.min(this.names.length - 1, Math.max(0, now + step));
      this.onSelect(this.names[next], false);
    } else {
      return;
    }
    event.preventDefault();
  }
}

const compare = new Intl.Collator("en", { numeric: true }).compare;
let lines = 0;

class Line {
  constructor() {
    this.root = make("div", "row");
    this.root.setAttribute("role", "row");
    this.root.id = `row-${(lines += 1)}`;
    this.dot = make("i", "dot");
    this.name = make("span", "name");
    const title = this.#cell("c-name");
    title.append(this.dot, this.name);
    this.bars = {};
    this.figures = {};
    this.cells = {};
    for (const kind of KINDS) {
      const cell = (this.cells[kind] = this.#cell(`c-${kind}`));
      this.bars[kind] = new Bar(kind);
      this.figures[kind] = [make("b"), make("span", "muted")];
      const figure = make("span", "figure");
      figure.append(...this.figures[kind]);
      cell.append(this.bars[kind].root, figure);
    }
    this.state = this.#cell("c-state");
  }

  #cell(className) {
    const cell = make("div", className);
    cell.setAttribute("role", "gridcell");
    this.root.append(cell);
    return cell;
  }

  become(row) {
    this.root.classList.add("still");
    this.update(row);
    requestAnimationFrame(() => requestAnimationFrame(() => this.root.classList.remove("still")));
  }

  update(row) {
    if (!row) return;
    const { text, look } = condition(row);
    this.root.dataset.name = row.name;
    this.root.dataset.look = look;
    this.name.textContent = printable(row.name);
    this.name.title = row.hostname ? `${printable(row.name)} (calls itself ${printable(row.hostname, 80)})` : printable(row.name);
    for (const kind of KINDS) {
      const part = row[kind];
      this.bars[kind].update(part);
      const [has, most] = pair(kind, part.reserved, part.max);
      this.figures[kind][0].textContent = has;
      this.figures[kind][1].textContent = ` / ${most}`;
      this.cells[kind].title = words(kind, part);
    }
    this.state.textContent = text;
  }

  place(index, height, selected) {
    this.root.style.transform = `translateY(${index * height}px)`;
    this.root.setAttribute("aria-rowindex", String(index + 1));
    this.root.setAttribute("aria-selected", String(selected));
  }
}
