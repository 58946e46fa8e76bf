// Demand against grant over time, of one kind.

import { short, TITLE } from "./format.js";

const HEIGHT = 132;
const STEPS = [1, 2, 3, 4, 5, 6].flatMap((power) => [1, 2, 5].map((one) => one * 10 ** power)); // millicores

let library = null;
const load = () => (library ??= import("/static/vendor/uplot/uPlot.esm.js").then((module) => module.default));

/** Points of a series: seconds since 1970, and the four amounts. */
export const FIELDS = ["used", "usable", "reserved", "demand"];
const NAMES = { used: "in use", usable: "usable", reserved: "granted", demand: "needed" };

export class Chart {
  constructor(kind, root) {
    this.kind = kind;
    this.root = root;
    this.root.setAttribute("role", "img");
    this.data = [[], [], [], [], []];
    this.range = [0, 1];
    this.size = new ResizeObserver(() => this.#fit());
    this.size.observe(root);
    this.#make();
  }

  async #make() {
    const uPlot = await load();
    if (this.gone) return;
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => probe(style.getPropertyValue(name));
    const tone = colour(`--${this.kind}`);
    const grid = { stroke: colour("--line"), width: 1 };
    const font = `11px ${style.getPropertyValue("--font")}`;
    const axis = { stroke: colour("--muted"), grid, ticks: { show: false }, font };
    const step = uPlot.paths.stepped({ align: 1 });
    const value = (_, one) => (one == null ? "–" : short(this.kind, one));
    this.plot?.destroy();
    this.plot = new uPlot(
      {
        width: this.root.clientWidth || 300,
        height: HEIGHT,
        padding: [8, 4, 0, 0],
        cursor: { y: false, drag: { x: false, y: false }, points: { size: 5 } },
        legend: { markers: { dash: (_, index) => (index === 2 ? "dashed" : "solid") } },
        scales: { x: { time: true, auto: false, range: () => this.range }, y: { range: (_, low, high) => [0, (high || 1) * 1.12] } },
        axes: [
          { ...axis, size: 24, space: 46, values: (plot, ticks) => ticks.map((one) => time(one, this.range)) },
          { ...axis, size: 56, space: 18, ...(this.kind === "cpu" ? { incrs: STEPS } : { splits: binary }), values: (_, ticks) => ticks.map((one) => short(this.kind, one)) },
        ],
        series: [
          { value: (_, one) => (one == null ? "" : time(one, [0, 1])) },
          { label: NAMES.used, value, stroke: colour("--faint"), width: 1, points: { show: false } },
          { label: NAMES.usable, value, stroke: tone, width: 1, dash: [3, 3], paths: step, points: { show: false } },
          { label: NAMES.reserved, value, stroke: tone, fill: colour(`--${this.kind}-wash`), width: 1.5, paths: step, points: { show: false } },
          { label: NAMES.demand, value, stroke: colour("--need"), width: 1.5, points: { show: false } },
        ],
      },
      this.data,
      this.root,
    );
    this.plot.over.addEventListener("mouseleave", () => setTimeout(() => this.#show()));
    this.#show();
  }

  /** @param data columns: seconds, then FIELDS. @param range seconds, from and to. */
  update(data, range) {
    this.data = data;
    this.range = range;
    this.#show();
    const last = FIELDS.map((field, index) => `${NAMES[field]} ${short(this.kind, data[index + 1].at(-1) ?? 0)}`);
    this.root.setAttribute("aria-label", `${TITLE[this.kind]} over time; now ${last.join(", ")}`);
  }

  #show() {
    if (!this.plot) return;
    this.plot.setData(this.data, true);
    if (this.plot.cursor.idx == null && this.data[0].length) this.plot.setLegend({ idx: this.data[0].length - 1 });
  }

  /** Other colours. */
  redraw() {
    this.#make();
  }

  #fit() {
    const width = this.root.clientWidth;
    if (this.plot && width && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }

  destroy() {
    this.gone = true;
    this.size.disconnect();
    this.plot?.destroy();
  }
}

const two = (number) => String(number).padStart(2, "0");

function time(seconds, [from, to]) {
  const at = new Date(seconds * 1000);
  const clock = `${two(at.getHours())}:${two(at.getMinutes())}`;
  return to - from < 600 && at.getSeconds() ? `${clock}:${two(at.getSeconds())}` : clock;
}

/** Round numbers of bytes. */
function binary(_, __, low, high) {
  let step = 2 ** 20;
  while (high / step > 4) step *= 2;
  const ticks = [];
  for (let tick = 0; tick <= high; tick += step) ticks.push(tick);
  return ticks;
}

/** A colour as a canvas takes it. */
function probe(colour) {
  const element = document.createElement("i");
  element.style.color = colour;
  document.body.append(element);
  const shown = getComputedStyle(element).color;
  element.remove();
  return shown;
}
