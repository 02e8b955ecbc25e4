"use strict";

const $ = (id) => document.getElementById(id);

/** Create an element with a class and plain text, never markup. */
function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

/** Unpack the text in a block of the page: gzip in base64. */
async function unpack(id) {
  const bytes = Uint8Array.from(atob($(id).textContent.trim()), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

function save(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const THEMES = ["auto", "light", "dark"];
const stored = (() => { try { return localStorage.getItem("recipe-report-theme"); } catch { return null; } })();

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = `Theme: ${name}`;
  try { localStorage.setItem("recipe-report-theme", name); } catch { /* without storage, the choice is lost */ }
}

$("theme").hidden = false;
setTheme(THEMES.includes(stored) ? stored : "auto");
$("theme").addEventListener("click", () => {
  setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
});

/** Open folded sections for printing. */
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details.printed:not([open])")];
  for (const one of opened) one.open = true;
});
addEventListener("afterprint", () => opened.forEach((one) => { one.open = false; }));
