// One VM, or the host: over time, why, and what happened.

import { Bar } from "./bar.js";
import { Chart, FIELDS } from "./chart.js";
import { showEvents } from "./events.js";
import { amount, KINDS, make, printable, short, span, TITLE } from "./format.js";
import { condition } from "./state.js";

const RANGES = [[300, "5 min"], [3600, "1 h"], [86400, "24 h"]];
const WHY_MS = 1000; // why is asked for at most so often
const LEAST_SECONDS = 30; // of the host, whose past begins when the page is opened
const AMOUNTS = [["demand", "needed"], ["used", "in use"], ["reserved", "granted"], ["plugged", "plugged"], ["usable", "usable"]];

export class Detail {
  constructor(state, onSelect) {
    this.state = state;
    this.onSelect = onSelect;
    this.root = document.getElementById("detail");
    this.seconds = 300;
    this.name = null; // nothing shown yet
    this.charts = [];
    setInterval(() => document.hidden || this.#plot(), 1000);
  }

  /** @param name whose; empty: the host's. */
  show(name) {
    if (this.name === name) return;
    this.name = name;
    this.past = { cpu: [], memory: [] };
    this.live = [];
    this.why = null;
    this.askedAt = 0;
    for (const chart of this.charts) chart.destroy();
    this.#build();
    this.update(null);
    this.#ask();
  }

  /** After a change of the state; `changed` are names, null for all. */
  update(changed, events = true) {
    if (this.name === null || !this.state.host) return;
    if (this.name && (!changed || changed.has(this.name))) {
      const row = this.state.rows.get(this.name);
      if (row) this.live.push([this.state.now() / 1000, row]);
      if (this.live.length > 2000) {
        this.live.splice(0, 500);
        this.#ask();
      }
      this.#fill(row);
      if (row) this.#explain();
      this.#plot();
    }
    if (!this.name) {
      this.#fillHost();
      if (!changed) this.#plot();
    }
    if (events || !changed) {
      showEvents(this.list, this.state.events, this.name, this.onSelect);
      this.noEvents.hidden = this.list.childElementCount > 0;
      this.missed.hidden = !this.state.missed;
      this.missed.textContent = `${this.state.missed} more came too fast to be shown; guestctl events lists them.`;
    }
  }

  /** The stream was lost for a while: what happened meanwhile is past. */
  catchUp() {
    if (!this.name || !this.state.rows.has(this.name)) return;
    this.live = [];
    this.#ask();
  }

  redraw() {
    for (const chart of this.charts) chart.redraw();
  }

  #build() {
    const name = this.name;
    const head = make("div", "detail-head");
    const back = make("button", "back phone", "‹ VMs");
    back.type = "button";
    back.addEventListener("click", () => document.dispatchEvent(new CustomEvent("back")));
    this.title = make("h2", "", name ? printable(name) : "Host");
    this.chip = make("span", "chip");
    this.chip.hidden = !name;
    const close = make("button", "close", "×");
    close.type = "button";
    close.title = "Back to the host (Esc)";
    close.setAttribute("aria-label", "Back to the host");
    close.hidden = !name;
    close.addEventListener("click", () => this.onSelect("", true));
    head.append(back, this.title, this.chip, this.#ranges(), close);
    this.facts = make("p", "facts muted");
    this.notes = make("p", "note");
    this.notes.hidden = true;
    this.parts = {};
    const blocks = KINDS.map((kind) => this.#block(kind));
    this.list = make("ol", "events");
    this.list.setAttribute("aria-label", "Events, newest first");
    this.noEvents = make("p", "muted", "Nothing happened yet.");
    this.missed = make("p", "muted");
    this.root.replaceChildren(head, this.facts, this.notes, ...blocks, make("h3", "", "Events"), this.missed, this.noEvents, this.list);
    this.root.scrollTop = 0;
  }

  #ranges() {
    const group = make("div", "ranges");
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", "Time shown");
    const buttons = RANGES.map(([seconds, title]) => {
      const button = make("button", "", title);
      button.type = "button";
      button.addEventListener("click", () => {
        this.seconds = seconds;
        mark();
        this.#ask();
        this.#plot();
      });
      group.append(button);
      return [button, seconds];
    });
    const mark = () => buttons.forEach(([button, seconds]) => button.setAttribute("aria-pressed", String(seconds === this.seconds)));
    mark();
    return group;
  }

  #block(kind) {
    const block = make("section", `block ${kind}`);
    block.dataset.kind = kind;
    const head = make("div", "block-head");
    const figure = make("strong");
    const of = make("span", "muted");
    head.append(make("h3", "", TITLE[kind]), figure, of);
    const why = make("p", "why");
    const bar = new Bar(kind);
    const canvas = make("div", "chart");
    const table = make("dl", "amounts");
    const more = make("div", "more");
    more.hidden = true;
    block.append(head);
    if (this.name) block.append(bar.root, why);
    block.append(canvas);
    if (this.name) block.append(table, more);
    this.parts[kind] = { figure, of, why, bar, table, more, values: {} };
    const fields = [...AMOUNTS, ["min", "min"], ["max", "max"], ["burst", "burst"], ["weight", "weight"]];
    for (const [field, title] of this.name ? fields : []) {
      const entry = make("div");
      const value = make("dd");
      value.dataset.field = field;
      entry.append(make("dt", "", title), value);
      table.append(entry);
      this.parts[kind].values[field] = value;
    }
    const chart = new Chart(kind, canvas);
    if (kind === KINDS[0]) this.charts = [];
    this.charts.push(chart);
    return block;
  }

  #fill(row) {
    if (!row) {
      this.chip.textContent = "gone";
      this.chip.dataset.look = "off";
      return;
    }
    const { text, look } = condition(row);
    this.chip.textContent = text;
    this.chip.dataset.look = look;
    this.notes.hidden = !row.degraded && !row.observed && !row.paused;
    const notes = [row.degraded && printable(row.degraded), row.observed && "Observed: decided about and shown, never touched.", row.paused && "Held by an operator: nothing is changed until it is resumed."];
    this.notes.textContent = notes.filter(Boolean).join(" ");
    for (const kind of KINDS) {
      const [part, { figure, of, bar, values }] = [row[kind], this.parts[kind]];
      figure.textContent = amount(kind, part.reserved);
      of.textContent = `granted of at most ${amount(kind, Math.max(part.max, part.burst))}`;
      bar.update(part);
      for (const [field, value] of Object.entries(values)) {
        if (field === "weight") value.textContent = part.weight;
        else value.textContent = field === "burst" && !part.burst ? "–" : short(kind, part[field]);
      }
      values.demand.classList.toggle("unmet", part.demand > part.reserved);
    }
  }

  #fillHost() {
    const { host, totals } = this.state;
    const up = span(this.state.now() - Date.parse(host.started_at));
    this.facts.textContent = `${host.guests} VMs, ${host.guests_connected} with guestd connected · broker ${printable(host.version)}, up ${up}, epoch ${host.epoch}`;
    for (const kind of KINDS) {
      this.parts[kind].figure.textContent = amount(kind, totals[kind].demand);
      this.parts[kind].of.textContent = `needed by all, ${amount(kind, totals[kind].reserved)} granted`;
    }
  }

  async #get(path) {
    const reply = await fetch(path);
    if (!reply.ok) throw new Error(String(reply.status));
    return reply.json();
  }

  /** The past: of another VM or range, or of what was not seen or is not kept here. */
  async #ask() {
    const [name, seconds] = [this.name, this.seconds];
    if (!name) return;
    try {
      const history = await this.#get(`/api/history?guest=${encodeURIComponent(name)}&seconds=${seconds}`);
      if (this.name !== name || this.seconds !== seconds) return;
      this.past = { cpu: [], memory: [] };
      for (const point of history.points) {
        const at = Date.parse(point.at) / 1000;
        for (const one of point.resources) this.past[one.kind]?.push([at, one]);
      }
      this.#plot();
    } catch {
      // without a history there is what was seen since the page was opened
    }
  }

  /** Why it is as it is, asked for when it changed. */
  async #explain() {
    const name = this.name;
    if (this.asking) return;
    this.asking = true;
    await new Promise((done) => setTimeout(done, Math.max(0, this.askedAt + WHY_MS - performance.now())));
    this.askedAt = performance.now();
    this.asking = false;
    if (this.name !== name) return this.name ? this.#explain() : undefined;
    if (!this.state.rows.has(name)) return undefined;
    try {
      const why = await this.#get(`/api/explain?guest=${encodeURIComponent(name)}`);
      if (this.name === name) this.#tell(why);
    } catch {
      // the next change asks again
    }
  }

  #tell(why) {
    const { guest } = why;
    const facts = [];
    if (guest.hostname) facts.push(`calls itself ${printable(guest.hostname, 80)}`);
    if (guest.kernel) facts.push(`Linux ${printable(guest.kernel, 60)}`);
    if (guest.agent_version) facts.push(`guestd ${printable(guest.agent_version, 40)}`);
    if (guest.channel) facts.push(printable(guest.channel, 60));
    if (guest.limits_origin_detail) facts.push(`limits from ${printable(guest.limits_origin_detail, 120)}`);
    this.facts.textContent = facts.join(" · ");
    for (const one of why.resources) {
      const part = this.parts[one.kind];
      if (!part) continue;
      part.why.textContent = printable(one.summary || one.reason.text);
      const items = one.demand_reasons.map((reason) => make("li", "", printable(reason.text)));
      if (items.length) {
        const list = make("ul", "reasons");
        list.append(...items);
        part.why.append(list);
      }
      part.more.hidden = !one.to_get_more.length;
      const list = make("ol");
      list.append(...one.to_get_more.map((reason) => make("li", "", printable(reason.text))));
      part.more.replaceChildren(make("h4", "", "To get more"), list);
    }
  }

  #plot() {
    if (this.name === null) return;
    const now = this.state.now() / 1000;
    const seen = this.name ? -Infinity : Math.min(now - LEAST_SECONDS, this.state.samples[0]?.[0] / 1000);
    const from = Math.max(now - this.seconds, seen);
    KINDS.forEach((kind, index) => {
      const points = this.name ? this.#points(kind) : this.state.samples.map(([at, totals]) => [at / 1000, totals[kind]]);
      const data = [[], [], [], [], []];
      let before = null;
      const put = (at, one) => {
        data[0].push(at);
        FIELDS.forEach((field, column) => data[column + 1].push(one[field]));
      };
      for (const point of points) {
        if (point[0] < from) before = point;
        else {
          if (before) put(from, before[1]);
          before = null;
          put(...point);
        }
      }
      if (before) put(from, before[1]);
      if (points.length) put(now, points.at(-1)[1]);
      this.charts[index]?.update(data, [from, now]);
    });
  }

  /** The past up to when this page saw it itself. */
  #points(kind) {
    const seen = this.live.map(([at, row]) => [at, row[kind]]);
    const past = seen.length ? this.past[kind].filter(([at]) => at < seen[0][0]) : this.past[kind];
    return [...past, ...seen];
  }
}
