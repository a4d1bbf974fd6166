// What Quarto's search says, without Quarto: `indexed()` is what it keeps of the page that
// is open (its website-search.ts), `found(docs, words)` the addresses of its answers
// (quarto-search.js), with the same library, fields and weights.
function indexed(href) {
  const page = document.cloneNode(true), docs = [];
  const title = page.querySelector("h1.title").textContent;
  const add = (href, section, text) =>
    text.trim() && docs.push({ href, title, section, text: text.trim() });
  for (const e of page.querySelectorAll("#title-block-header, nav[role=doc-toc], script, style"))
    e.remove();
  const main = page.querySelector("main");
  const sections = [...page.querySelectorAll("section.level2, section.footnotes")];
  if (!sections.length) add(href, "", main.textContent);
  else {
    const texts = [];
    const first = main.firstElementChild;
    for (const h of first.querySelectorAll("h1, h2, h3, h4, h5, h6")) h.remove();
    for (const e of [first, ...main.querySelectorAll(":scope > p, :scope > div.cell")]) {
      texts.push(e.textContent.trim());
      e.remove();
    }
    add(href, "", texts.join("\n"));
  }
  for (const e of sections) {
    const h2 = e.querySelector("h2"), text = e.textContent;
    add(`${href}#${e.id}`, h2 ? h2.textContent : "", text);
  }
  return docs;
}

function found(docs, words) {
  const keys = [
    { name: "title", weight: 20 },
    { name: "section", weight: 20 },
    { name: "text", weight: 10 },
  ];
  const fuse = new Fuse([], { keys, ignoreLocation: true, threshold: 0.1 });
  docs.forEach((d) => fuse.add(d));
  const options = { isCaseSensitive: false, shouldSort: true, minMatchCharLength: 2, limit: 50 };
  return fuse.search(words, options).map((r) => r.item.href);
}
