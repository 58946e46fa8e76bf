// Amounts, times and other people's texts, for people.

export const KINDS = ["cpu", "memory"];
export const TITLE = { cpu: "CPU", memory: "Memory" };

const UNITS = [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]];

/** Millicores as CPUs: "2.5". */
export const cpus = (millicores) => String(Number((millicores / 1000).toFixed(2)));

/** Bytes: "3.5 GiB". */
export function size(bytes) {
  for (const [unit, factor] of UNITS) {
    if (Math.abs(bytes) >= factor) return `${Number((bytes / factor).toFixed(bytes / factor >= 100 ? 0 : 1))} ${unit}`;
  }
  return `${bytes} B`;
}

/** An amount of that kind, with its unit. */
export const amount = (kind, value) => (kind === "cpu" ? `${cpus(value)} CPU` : size(value));

/** The same where the unit is clear. */
export const short = (kind, value) => (kind === "cpu" ? cpus(value) : size(value));

/** `value of total`, with the unit once where it is the same. */
export function pair(kind, value, total) {
  const [left, right] = [short(kind, value), short(kind, total)];
  const [number, unit] = left.split(" ");
  return [unit && right.endsWith(` ${unit}`) ? number : left, right];
}

/** What was said by others: nothing that moves, hides or turns text around; cut to `limit`. */
export function printable(text, limit = 400) {
  const shown = String(text ?? "").slice(0, limit);
  const safe = shown.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (one) => `\\u{${one.codePointAt(0).toString(16)}}`);
  return shown.length < String(text ?? "").length ? `${safe}…` : safe;
}

/** "3 d 4 h", of milliseconds. */
export function span(ms) {
  const minutes = Math.max(0, Math.floor(ms / 60000));
  const [days, hours] = [Math.floor(minutes / 1440), Math.floor(minutes / 60) % 24];
  if (days) return `${days} d ${hours} h`;
  return hours ? `${hours} h ${minutes % 60} min` : `${minutes} min`;
}

const clockFormat = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });

/** "14:02:31", in the browser's time zone. */
export const clock = (date) => clockFormat.format(date);

/** An element with text and class. Text is only ever text. */
export function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}
