// The page as a whole: what is selected, what a key does, and who is told of changes.

import { Detail } from "./detail.js";
import { List } from "./list.js";
import { Pools } from "./pool.js";
import { State } from "./state.js";
import { follow } from "./stream.js";

const LINK = { connecting: "connecting", live: "live", lost: "disconnected, trying again" };

const state = new State();
const pools = new Pools(document.getElementById("pools"));
const list = new List(state, select);
const detail = new Detail(state, select);
const link = document.getElementById("link");
const summary = document.getElementById("summary");
let events = -1;
let changed = new Set();
let frame = 0;

const chosen = () => {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {
    return "";
  }
};

/** @param open on a phone: show it, too. */
function select(name, open) {
  if (name !== chosen()) history.replaceState(null, "", name ? `#${encodeURIComponent(name)}` : location.pathname);
  list.select(name, Boolean(name));
  if (state.host) detail.show(name);
  if (open) document.body.dataset.view = "detail";
}

state.addEventListener("change", (event) => {
  for (const name of event.detail.changed) changed.add(name);
  if (event.detail.whole) detail.catchUp();
  frame ||= requestAnimationFrame(render);
});

function render() {
  frame = 0;
  const names = changed;
  changed = new Set();
  const { host } = state;
  pools.update(host, state.totals);
  const text = `${host.guests} VMs · ${host.guests_connected} connected`;
  if (summary.textContent !== text) summary.textContent = text;
  list.update(names);
  if (detail.name === null) select(chosen(), false);
  else detail.update(names, events !== state.eventCount);
  events = state.eventCount;
}

function onLink(now) {
  link.dataset.state = now;
  link.textContent = LINK[now];
  document.body.classList.toggle("stale", now !== "live");
  if (now === "live") list.arrange();
}

const dark = matchMedia("(prefers-color-scheme: dark)");
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const theme = (root.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark" ? "light" : "dark";
  root.dataset.theme = theme;
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // for this visit only
  }
  detail.redraw();
});
dark.addEventListener("change", () => detail.redraw());

document.getElementById("to-host").addEventListener("click", () => select("", true));
document.addEventListener("back", () => {
  document.body.dataset.view = "list";
  list.root.focus();
});
addEventListener("hashchange", () => select(chosen(), true));
addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== list.search && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    document.body.dataset.view = "list";
    list.search.focus();
    list.search.select();
  } else if (event.key === "Escape") {
    if (document.activeElement === list.search && list.search.value) {
      list.search.value = "";
      list.arrange();
      return;
    }
    document.body.dataset.view = "list";
    select("", false);
    list.root.focus();
  }
});

follow(state, onLink);
