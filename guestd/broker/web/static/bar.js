// One resource of one VM as a bar from nothing to the most that it may ever hold.

import { amount, make } from "./format.js";
import { ceiling } from "./state.js";

export class Bar {
  constructor(kind) {
    this.kind = kind;
    this.root = make("div", `bar ${kind}`);
    this.root.setAttribute("aria-hidden", "true");
    this.parts = {};
    for (const part of ["above", "reserved", "usable", "min", "max", "demand"]) {
      this.parts[part] = make("i", `b-${part}`);
      this.root.append(this.parts[part]);
    }
  }

  update(part) {
    const top = ceiling(part) || 1;
    const percent = (value) => `${Math.min(100, (value / top) * 100).toFixed(2)}%`;
    const { above, reserved, usable, min, max, demand } = this.parts;
    above.hidden = part.burst <= part.max;
    above.style.left = percent(part.max);
    reserved.style.width = percent(part.reserved);
    usable.style.width = percent(Math.min(part.usable, part.reserved));
    min.style.left = percent(part.min);
    max.style.left = percent(part.max);
    demand.hidden = !part.demand;
    demand.style.left = percent(part.demand);
    demand.classList.toggle("unmet", part.demand > part.reserved);
    demand.classList.toggle("beyond", part.demand > top);
  }
}

/** All numbers of the bar in words. */
export function words(kind, part) {
  const burst = part.burst > part.max ? `, burst ${amount(kind, part.burst)}` : "";
  return `needs ${amount(kind, part.demand)}, has ${amount(kind, part.reserved)}, usable ${amount(kind, part.usable)}; min ${amount(kind, part.min)}, max ${amount(kind, part.max)}${burst}`;
}
