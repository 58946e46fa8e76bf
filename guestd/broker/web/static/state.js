// What the broker said last: the host, all VMs, the newest events.

const EVENTS = 200;
const SAMPLES = 3600;

const FILL = { burst: 0, demand: 0, reserved: 0, plugged: 0, usable: 0, used: 0, lent: 0, quota: 0, throttled: 0, phase: "idle", overdue: false };

const FULL = (row) => ({ vm: "", connected: false, paused: false, observed: false, hostname: "", degraded: "", ...row, cpu: { ...FILL, ...row.cpu }, memory: { ...FILL, ...row.memory } });

/** The most that the VM may ever hold. */
export const ceiling = (part) => Math.max(part.max, part.burst);

/** What it needs, may have, and does not have. */
export const unmet = (part) => Math.max(0, Math.min(part.demand, ceiling(part)) - part.reserved);

/** A VM in a word, how it looks, and how much it deserves a look (more is worse). */
export function condition(row) {
  const phases = [row.cpu.phase, row.memory.phase];
  if (row.vm === "unreachable") return { text: "unreachable", look: "bad", rank: 90 };
  if (row.cpu.overdue || row.memory.overdue) return { text: "overdue", look: "bad", rank: 80 };
  if (row.vm === "gone") return { text: "off", look: "off", rank: 5 };
  if (row.vm === "frozen") return { text: "frozen", look: "off", rank: 40 };
  if (row.paused) return { text: "held", look: "warn", rank: 50 };
  if (!row.connected) return { text: "silent", look: "warn", rank: 60 };
  if (row.degraded) return { text: "degraded", look: "warn", rank: 65 };
  if (row.observed) return { text: "observed", look: "off", rank: 30 };
  if (phases.includes("plugging")) return { text: "growing", look: "move", rank: 35 };
  if (phases.includes("asking") || phases.includes("unplugging")) return { text: "shrinking", look: "move", rank: 34 };
  if (unmet(row.cpu) || unmet(row.memory)) return { text: "short", look: "warn", rank: 70 };
  if (row.cpu.lent || row.memory.lent) return { text: "bursting", look: "move", rank: 33 };
  if (row.cpu.demand > ceiling(row.cpu) || row.memory.demand > ceiling(row.memory)) return { text: "at max", look: "warn", rank: 45 };
  return { text: "steady", look: "ok", rank: 10 };
}

export class State extends EventTarget {
  host = null;
  rows = new Map();
  events = [];
  eventCount = 0; // ever
  missed = 0;
  totals = { cpu: { demand: 0, reserved: 0 }, memory: { demand: 0, reserved: 0 } };
  samples = []; // of the totals: [ms, totals]
  skew = 0; // the broker's clock is so many ms ahead

  now() {
    return Date.now() + this.skew;
  }

  snapshot(message) {
    this.skew = message.at - Date.now();
    if (this.host && this.host.epoch !== message.host?.epoch) this.samples = [];
    const before = new Set(this.rows.keys());
    this.rows = new Map();
    this.events = [];
    this.eventCount += 1; // whoever shows them shows them anew
    this.missed = 0;
    this.#take(message, before, true);
  }

  change(message) {
    this.#take(message, new Set(message.gone));
  }

  #take(message, changed, whole = false) {
    for (const name of message.gone) this.rows.delete(name);
    for (const row of message.guests) {
      this.rows.set(row.name, FULL(row));
      changed.add(row.name);
    }
    if (message.host) this.host = message.host;
    this.missed += message.missed;
    if (message.events.length) {
      this.eventCount += message.events.length;
      this.events = [...this.events, ...message.events].slice(-EVENTS);
    }
    this.#add();
    this.dispatchEvent(new CustomEvent("change", { detail: { changed, whole } }));
  }

  #add() {
    const totals = { cpu: { demand: 0, reserved: 0, usable: 0, used: 0 }, memory: { demand: 0, reserved: 0, usable: 0, used: 0 } };
    for (const row of this.rows.values()) {
      for (const kind of ["cpu", "memory"]) {
        for (const field of ["demand", "reserved", "usable", "used"]) totals[kind][field] += row[kind][field];
      }
    }
    this.totals = totals;
    const now = this.now();
    if (this.samples.length > 1 && now - this.samples.at(-2)[0] < 1000) this.samples.pop(); // one a second, and the newest
    this.samples.push([now, totals]);
    if (this.samples.length > SAMPLES) this.samples.splice(0, SAMPLES / 10);
  }
}
