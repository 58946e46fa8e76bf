// The host as one pool: who has how much of it, and what is left.

import { amount, KINDS, make, short, TITLE } from "./format.js";

const FIELD = { cpu: "cpu_millicores", memory: "memory_bytes" };
const PARTS = [
  ["reserve", "host"],
  ["overhead", "overhead"],
  ["minimums", "minimums"],
  ["above", "above min"],
  ["free", "free"],
];

export class Pools {
  constructor(root) {
    this.pools = KINDS.map((kind) => new Pool(kind));
    root.append(...this.pools.map((pool) => pool.root));
  }

  update(host, totals) {
    for (const pool of this.pools) pool.update(host, totals[pool.kind]);
  }
}

class Pool {
  constructor(kind) {
    this.kind = kind;
    this.root = make("div", `pool ${kind}`);
    this.root.dataset.kind = kind;
    const head = make("div", "pool-head");
    this.figure = make("strong");
    this.of = make("span", "muted");
    this.asked = make("span", "asked");
    head.append(make("h2", "", TITLE[kind]), this.figure, make("span", "muted", "granted"), this.of, this.asked);
    this.bar = make("div", "stack");
    this.bar.setAttribute("role", "img");
    this.segments = PARTS.map(([name]) => make("i", `s-${name}`));
    this.mark = make("b", "s-mark");
    this.bar.append(...this.segments, this.mark);
    this.legend = make("dl", "legend");
    this.values = PARTS.map(([name, title]) => {
      const entry = make("div");
      const value = make("dd");
      value.dataset.part = name;
      const term = make("dt");
      term.append(make("i", `s-${name}`), title);
      entry.append(term, value);
      this.legend.append(entry);
      return value;
    });
    this.root.append(head, this.bar, this.legend);
  }

  update(host, totals) {
    const kind = this.kind;
    const of = (name) => host[name][FIELD[kind]];
    const rest = of("capacity") - of("reserve") - of("overhead") - of("free");
    const minimums = Math.min(of("minimums"), Math.max(0, rest));
    const shares = [of("reserve"), of("overhead"), minimums, Math.max(0, rest - minimums), of("free")];
    const whole = shares.reduce((sum, one) => sum + one, 0) || 1;
    const shown = [of("reserve"), of("overhead"), of("minimums"), shares[3], of("free")];
    shares.forEach((share, index) => {
      this.segments[index].style.width = `${((share / whole) * 100).toFixed(2)}%`;
      this.values[index].textContent = short(kind, shown[index]);
    });
    this.figure.textContent = amount(kind, of("committed"));
    this.of.textContent = `of ${amount(kind, of("capacity"))}`;
    this.asked.textContent = `needed ${amount(kind, totals.demand)}`;
    const before = shares[0] + shares[1];
    this.mark.style.left = `${Math.min(100, ((before + totals.demand) / whole) * 100).toFixed(2)}%`;
    this.bar.setAttribute("aria-label", `${TITLE[kind]}: ${PARTS.map(([, title], index) => `${title} ${amount(kind, shown[index])}`).join(", ")}`);
  }
}
