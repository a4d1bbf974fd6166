// What both figures share: shapes, axes, controls. `root` is the figure's element.
const BLUE = "#1f83c4", RED = "#d55e00", GREY = "#808080", GREEN = "#009e73";

function shape(parent, tag, attributes, text) {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  if (text !== undefined) e.textContent = text;
  parent.append(e);
  return e;
}

function axes(svg, box, {x, y, xs, ys, xname, yname}) {
  // x, y: value -> place; xs, ys: [value, label] of every tick
  const line = (x1, y1, x2, y2) => shape(svg, "line", {x1, y1, x2, y2, stroke: "currentColor", "stroke-opacity": .5});
  line(box.left, box.bottom, box.right, box.bottom); line(box.left, box.top, box.left, box.bottom);
  for (const [v, label] of xs) shape(svg, "text", {x: x(v), y: box.bottom + 15, "text-anchor": "middle"}, label);
  for (const [v, label] of ys) shape(svg, "text", {x: box.left - 5, y: y(v) + 4, "text-anchor": "end"}, label);
  shape(svg, "text", {x: (box.left + box.right) / 2, y: box.bottom + 30, "text-anchor": "middle"}, xname);
  shape(svg, "text", {x: 0, y: 0, "text-anchor": "middle", transform: `translate(13 ${(box.top + box.bottom) / 2}) rotate(-90)`}, yname);
}

function slider(form, name, label, {min, max, step, value}) {
  const l = document.createElement("label");
  l.append(label);
  const input = Object.assign(document.createElement("input"), {type: "range", name, min, max, step});
  input.value = value;
  const shown = document.createElement("output");
  l.append(input, shown); form.append(l);
  return {input, show: text => { shown.textContent = text; input.setAttribute("aria-valuetext", text); }};
}

function choice(form, name, legend, options, value) {
  const set = document.createElement("fieldset");
  set.append(Object.assign(document.createElement("legend"), {textContent: legend}));
  for (const [v, label] of options) {
    const l = document.createElement("label");
    l.append(Object.assign(document.createElement("input"), {type: "radio", name: `${form.dataset.id}-${name}`, value: v, checked: v === value}), label);
    set.append(l);
  }
  form.append(set);
  return () => set.querySelector("input:checked").value;
}

// A figure is as wide as its page, up to 680 pixels, and its text as large everywhere.
function stage(root, height, label) {
  const form = document.createElement("form");
  form.dataset.id = root.id;
  form.addEventListener("submit", e => e.preventDefault());
  const svg = shape(root, "svg", {role: "img", "aria-label": label});
  svg.before(form);
  const words = document.createElement("p");
  words.setAttribute("aria-live", "polite");
  root.append(words); root.classList.add("live");
  const wide = () => {
    const style = getComputedStyle(root), inner = root.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    const width = Math.max(240, Math.min(680, Math.floor(inner)));
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.style.maxWidth = `${width}px`;
    return width;
  };
  let before = root.clientWidth;
  new ResizeObserver(() => {
    if (root.clientWidth !== before) root.dispatchEvent(new Event("resized"));
    before = root.clientWidth;
  }).observe(root);
  return {form, svg, words, wide};
}
