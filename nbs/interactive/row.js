// One row of the attention matrix of a causal LaS layer, in both orders and with both windows.
function lasRow(scores, i, alpha, W, order, centred) {
  const L = scores.length, past = centred ? W - 1 - Math.floor(W / 2) : W - 1, future = centred ? Math.floor(W / 2) : 0;
  const keys = j => { const k = []; for (let t = Math.max(0, j - past); t <= Math.min(L - 1, j + future); t++) k.push(t); return k; };
  const softmax = e => {  // over the keys a causal query may see
    const top = Math.max(...e.slice(0, i + 1)), w = e.map((s, j) => j <= i ? Math.exp(s - top) : 0), sum = w.reduce((a, b) => a + b);
    return w.map(s => s / sum);
  };
  const e = scores.map((s, j) => s * Math.exp(-alpha * Math.abs(i - j)));
  if (order === "scores") return softmax(scores.map((_, j) => keys(j).reduce((sum, t) => sum + e[t], 0) / keys(j).length));
  const out = scores.map(() => 0);
  softmax(e).forEach((w, k) => keys(k).forEach(j => out[j] += w / keys(k).length));
  return out;
}

function row(root, data) {
  const {form, svg, words, wide} = stage(root, 330, "The locality kernel above, one row of attention weights below");
  const alpha = slider(form, "alpha", "decay rate α", {min: 0, max: 1, step: .02, value: .2});
  const mean = slider(form, "mean", "mean score", {min: -6, max: 6, step: .5, value: 0});
  const W = slider(form, "window", "window W", {min: 1, max: 9, step: 1, value: 3});
  const order = choice(form, "order", "average", [["scores", "scores"], ["weights", "weights"]], "scores");
  const centred = choice(form, "side", "window", [["back", "looks back"], ["centred", "centred"]], "back");
  const {scores, other, query: i} = data, L = scores.length;

  function draw() {
    const a = +alpha.input.value, w = +W.input.value, middle = centred() === "centred";
    const c = +mean.input.value, raised = list => list.map(s => s + c);
    const right = wide() - 10, step = (right - 50) / L, bar = .8 * step, x = j => 50 + (j + .5) * step;
    alpha.show(a.toFixed(2)); mean.show(c.toFixed(1)); W.show(`${w}`);
    const weights = lasRow(raised(scores), i, a, w, order(), middle), plain = lasRow(scores, i, 0, 1, "scores", false);
    const moved = lasRow(raised(other), i, a, w, order(), middle).reduce((sum, v, j) => sum + Math.abs(v - weights[j]), 0) / 2;
    const ahead = weights.slice(i + 1).reduce((sum, v) => sum + v, 0), leaks = moved > 1e-9 || ahead > 1e-9;
    svg.replaceChildren();
    const ticks = [0, 8, 16, 24, L - 1].map(j => [j, `${j}`]);
    const up = v => 90 - 80 * v;
    axes(svg, {left: 50, right, top: 10, bottom: 90}, {x, y: up, xs: [], ys: [[0, "0"], [1, "1"]], xname: "", yname: "decay"});
    shape(svg, "polyline", {points: scores.map((_, j) => `${x(j)},${up(Math.exp(-a * Math.abs(i - j)))}`).join(" "), fill: "none", stroke: BLUE, "stroke-width": 2});
    const top = Math.max(.35, ...weights), y = v => 288 - 168 * v / top;
    axes(svg, {left: 50, right, top: 120, bottom: 288}, {x, y, xs: ticks, ys: [[0, "0"], [top, top.toFixed(2)]], xname: "key", yname: "weight"});
    shape(svg, "rect", {x: x(i) + step / 2, y: 100, width: right - x(i) - step / 2, height: 188, fill: RED, "fill-opacity": leaks ? .15 : .04});
    shape(svg, "text", {x: x(i) + step / 2 + 6, y: 114}, "the future");
    weights.forEach((v, j) => {
      shape(svg, "rect", {x: x(j) - bar / 2, y: y(v), width: bar, height: 288 - y(v), fill: j > i ? RED : BLUE});
      if (j <= i) shape(svg, "line", {x1: x(j) - bar / 2, x2: x(j) + bar / 2, y1: y(plain[j]), y2: y(plain[j]), stroke: GREY, "stroke-width": 3});
    });
    root.dataset.weights = JSON.stringify(weights); root.dataset.moved = moved;
    const half = a > 0 ? `scores halve every ${(Math.LN2 / a).toFixed(1)} steps` : "no decay";
    words.textContent = `Query ${i}: ${half}; W = ${w}. ` + (leaks
      ? `The centred window LEAKS: ${(100 * ahead).toFixed(1)} % of the row lies on later keys; higher scores there would move ${(100 * moved).toFixed(1)} % of it.`
      : "Nothing leaks: whatever later keys hold, this row stays. Grey marks: plain attention.");
  }
  form.addEventListener("input", draw); root.addEventListener("resized", draw);
  draw();
}
