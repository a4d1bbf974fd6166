// What a page shows that a reader cannot read: `wide()` and `faint()`, for the tests.
function scrolls(e) {
  for (; e; e = e.parentElement)
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX)) return true;
  return false;
}

// Elements that reach over the right edge of the window, or over the column of the text;
// a space at the end of a line hangs over it, with the padding of a word of code.
function wide() {
  const hangs = (e) => (getComputedStyle(e).display === "inline" ? 12 : 0);
  const edge = document.documentElement.clientWidth;
  const main = document.querySelector("main").getBoundingClientRect().right + 1;
  return [...document.body.querySelectorAll("*")]
    .filter((e) => {
      const right = e.getBoundingClientRect().right;
      const limit = e.closest("main") ? Math.min(main + hangs(e), edge) : edge;
      return right > limit && !scrolls(e.parentElement) && !e.closest("#quarto-sidebar");
    })
    .map((e) => `${e.tagName} ${e.className} ${e.textContent.trim().slice(0, 50)}`);
}

// Words and names in tables that break inside; after a hyphen, slash or bracket they may.
function broken() {
  const found = [];
  for (const table of document.querySelectorAll("main table")) {
    const walk = document.createTreeWalker(table, NodeFilter.SHOW_TEXT);
    while (walk.nextNode())
      for (const word of walk.currentNode.data.matchAll(/[^\s\-\/\[\](){}]+/g)) {
        const range = document.createRange();
        range.setStart(walk.currentNode, word.index);
        range.setEnd(walk.currentNode, word.index + word[0].length);
        const lines = new Set([...range.getClientRects()].map((r) => Math.round(r.top)));
        if (lines.size > 1) found.push(word[0]);
      }
  }
  return found;
}

// Cells of tables that are a tower of words: they need room, and the table a scroll bar.
function towers() {
  return [...document.querySelectorAll("main td")]
    .filter((e) => e.offsetHeight > 350 && e.offsetWidth < 140)
    .map((e) => e.textContent.trim().slice(0, 40));
}

function dress(mode) {
  for (const id of ["light", "dark"])
    document.getElementById(id).media = id === mode ? "all" : "not all";
  document.body.classList.remove("quarto-light", "quarto-dark");
  document.body.classList.add(`quarto-${mode}`);
}

function colour(text) {
  const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number);
  return { rgb: [r, g, b], a };
}

function over(top, ground, a) {
  return top.map((v, i) => a * v + (1 - a) * ground[i]);
}

// What lies behind an element, of the grounds that have a colour.
function ground(e) {
  if (!e) return [255, 255, 255];
  const c = colour(getComputedStyle(e).backgroundColor);
  return c.a === 1 ? c.rgb : over(c.rgb, ground(e.parentElement), c.a);
}

function opacity(e) {
  return e ? getComputedStyle(e).opacity * opacity(e.parentElement) : 1;
}

function luminance(rgb) {
  const parts = rgb.map((v) => {
    v /= 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
}

function contrast(a, b) {
  const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05);
}

// Text with a contrast under `least`, one line for each pair of colours.
function faint(least) {
  const found = new Map(), seen = new Set();
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || seen.has(e) || e.closest("script,style,svg")) continue;
    seen.add(e);
    if (!e.getClientRects().length) continue;
    const behind = ground(e), ink = colour(getComputedStyle(e).color);
    const ratio = contrast(over(ink.rgb, behind, ink.a * opacity(e)), behind);
    if (ratio < least)
      found.set(`${ink.rgb} on ${behind}`, `${ratio.toFixed(1)} ${e.parentElement.tagName}.${e.parentElement.className} > ${e.tagName}.${e.className} ${e.textContent.trim().slice(0, 30)}`);
  }
  return [...found].map((f) => f.join(": "));
}
