// What happened, newest first.

import { amount, clock, make, printable } from "./format.js";

const SHOWN = 100;
const LOUD = new Set(["refused", "ended-short", "overdue", "failed"]);

/** The events of that VM, or all, into `list`. */
export function showEvents(list, events, guest, onSelect) {
  const wanted = (guest ? events.filter((event) => event.guest === guest) : events).slice(-SHOWN).reverse();
  const known = new Map([...list.children].map((item) => [item.dataset.id, item]));
  list.replaceChildren(...wanted.map((event) => known.get(String(event.id)) ?? item(event, guest, onSelect)));
}

function item(event, guest, onSelect) {
  const root = make("li", "event");
  root.dataset.id = event.id;
  root.dataset.look = LOUD.has(event.code) ? "warn" : event.code === "would" ? "off" : "";
  const at = new Date(event.at);
  const time = make("time", "muted", clock(at));
  time.dateTime = event.at;
  time.title = at.toLocaleString();
  const text = make("span", "text");
  if (event.guest && !guest) {
    const name = make("button", "who", printable(event.guest));
    name.type = "button";
    name.addEventListener("click", () => onSelect(event.guest, true));
    text.append(name, " ");
  }
  text.append(make("span", "code", printable(event.code)), " ", printable(event.text));
  root.append(time, text);
  if (event.kind && event.before !== event.after) {
    root.title = `${amount(event.kind, event.before)} → ${amount(event.kind, event.after)}`;
  }
  return root;
}
