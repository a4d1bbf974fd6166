// Time or memory of every method against length, from a benchmark file.
const NAMES = {plain: "plain attention", auto: "LaS (auto)", linear: "LaS (linear)", dense: "LaS by its matrix"};
const COLOURS = {plain: GREY, auto: BLUE, linear: GREEN, dense: RED}, DASHES = {plain: "6 4", linear: "2 3"};
const UNITS = {seconds: ["seconds", 1, 3], memory: ["MiB", 2 ** -20, 1]};

function cost(root, data) {
  const {form, svg, words, wide} = stage(root, 330, "Cost against sequence length, both axes logarithmic");
  const rates = [...new Set(data.cases.map(c => c.max_rate))].sort((a, b) => b - a), lengths = [...new Set(data.cases.map(c => c.L))].sort((a, b) => a - b);
  const rate = choice(form, "rate", "largest decay rate", rates.map(r => [`${r}`, `${r}`]), `${rates[0]}`);
  const unit = choice(form, "unit", "show", [["seconds", "time"], ["memory", "memory"]], "seconds");
  const at = slider(form, "length", "length", {min: 0, max: lengths.length - 1, step: 1, value: lengths.length - 1});

  function draw() {
    const [name, factor, digits] = UNITS[unit()], L = lengths[at.input.value];
    at.show(L.toLocaleString("en"));
    const cases = data.cases.filter(c => `${c.max_rate}` === rate()).sort((a, b) => a.L - b.L);
    const value = (c, way) => c.ways[way]?.[unit()] > 0 ? c.ways[way][unit()] * factor : null;
    const all = data.cases.flatMap(c => Object.keys(NAMES).map(w => value(c, w))).filter(v => v !== null);
    const low = Math.floor(Math.log10(Math.min(...all))), high = Math.ceil(Math.log10(Math.max(...all)));
    const right = wide() - 30, x = l => 70 + (right - 90) * Math.log2(l / lengths[0]) / Math.log2(lengths.at(-1) / lengths[0]);
    const y = v => 280 - 260 * (Math.log10(v) - low) / (high - low);
    svg.replaceChildren();
    const powers = Array.from({length: high - low + 1}, (_, k) => [10 ** (low + k), `${+(10 ** (low + k)).toPrecision(1)}`]);
    axes(svg, {left: 70, right, top: 20, bottom: 280}, {x, y, xs: lengths.filter((_, k) => k % (right < 400 ? 4 : 2) === 0).map(l => [l, l.toLocaleString("en")]), ys: powers, xname: "length (tokens)", yname: name});
    shape(svg, "line", {x1: x(L), x2: x(L), y1: 20, y2: 280, stroke: "currentColor", "stroke-dasharray": "2 4"});
    const here = cases.find(c => c.L === L), said = [];
    Object.keys(NAMES).forEach((way, k) => {
      const points = cases.map(c => [c.L, value(c, way)]).filter(p => p[1] !== null);
      shape(svg, "polyline", {points: points.map(([l, v]) => `${x(l)},${y(v)}`).join(" "), fill: "none", stroke: COLOURS[way], "stroke-width": 2.5, "stroke-dasharray": DASHES[way] ?? ""});
      for (const [l, v] of points) shape(svg, "circle", {cx: x(l), cy: y(v), r: l === L ? 6 : 3.5, fill: COLOURS[way]});
      shape(svg, "line", {x1: 85, x2: 115, y1: 32 + 17 * k, y2: 32 + 17 * k, stroke: COLOURS[way], "stroke-width": 2.5, "stroke-dasharray": DASHES[way] ?? ""});
      shape(svg, "text", {x: 122, y: 36 + 17 * k}, NAMES[way]);
      if (here && value(here, way) !== null) said.push(`${NAMES[way]} ${value(here, way).toFixed(digits)}`);
    });
    const [a, b] = here ? [value(here, "plain"), value(here, "auto")] : [null, null];
    const ratio = a && b ? ` LaS takes ${(b / a).toFixed(2)} times what plain attention takes.` : "";
    words.textContent = said.length ? `At ${L.toLocaleString("en")} tokens, ${name}: ${said.join(", ")}.${ratio}` : `Not measured at ${L.toLocaleString("en")} tokens with this rate.`;
    root.dataset.ratio = a && b ? b / a : "";
  }
  form.addEventListener("input", draw); root.addEventListener("resized", draw);
  draw();
}
