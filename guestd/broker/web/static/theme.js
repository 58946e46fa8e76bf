// Before the first paint: dark or light as chosen here before, else as the system has it.
"use strict";
(() => {
  try {
    const chosen = localStorage.getItem("theme");
    if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
  } catch { /* no storage here: the system's */ }
})();
