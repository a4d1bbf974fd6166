// Two small transformers that read a digit pixel by pixel, LaS and plain attention, run
// here, on weights in half precision that stand in the page.
function halves(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0)), out = new Float32Array(bytes.length / 2);
  for (let i = 0; i < out.length; i++) {
    const h = bytes[2 * i] | bytes[2 * i + 1] << 8, power = h >> 10 & 31, rest = h & 1023;
    out[i] = (h >> 15 ? -1 : 1) * (power ? 2 ** (power - 15) * (1 + rest / 1024) : 2 ** -24 * rest);
  }
  return out;
}

function parameters(text, shapes) {
  const all = halves(text), named = {};
  let at = 0;
  for (const [name, size] of shapes) named[name] = all.subarray(at, at += size);
  return named;
}

const linear = (rows, p, name) => {
  const W = p[`${name}.weight`], b = p[`${name}.bias`], n = W.length / b.length;
  return rows.map(x => Float32Array.from(b, (start, o) => {
    let sum = start;
    for (let i = 0; i < n; i++) sum += W[o * n + i] * x[i];
    return sum;
  }));
};

const norm = (rows, p, name) => rows.map(x => {
  const mean = x.reduce((a, b) => a + b) / x.length;
  const root = Math.sqrt(x.reduce((a, b) => a + (b - mean) ** 2, 0) / x.length + 1e-5);
  return x.map((v, i) => (v - mean) / root * p[`${name}.weight`][i] + p[`${name}.bias`][i]);
});

const add = (a, b) => a.map((x, i) => x.map((v, j) => v + b[i][j]));

function gelu(v) {  // with the error function of Abramowitz and Stegun, 7.1.26
  const z = Math.abs(v) / Math.SQRT2, t = 1 / (1 + .3275911 * z);
  const tail = t * (.254829592 + t * (-.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  const erf = Math.sign(v) * (1 - tail * Math.exp(-z * z));
  return v * (1 + erf) / 2;
}

// One layer of causal LaS: what it adds to every step, and its weights [head][query][key].
function lasLayer(rows, p, name, {rates, window: W}) {
  const qkv = linear(rows, p, `${name}.qkv`), L = rows.length, dim = rows[0].length, D = dim / rates.length;
  const maps = rates.map((alpha, h) => qkv.map((x, i) => {
    const e = [];
    for (let j = 0; j <= i; j++) {
      let s = 0;
      for (let d = 0; d < D; d++) s += x[h * D + d] * qkv[j][dim + h * D + d];
      e.push(s / Math.sqrt(D) * Math.exp(-alpha * (i - j)));
    }
    const pooled = e.map((_, j) => {
      const part = e.slice(Math.max(0, j - W + 1), j + 1);
      return part.reduce((a, b) => a + b) / part.length;
    });
    const top = Math.max(...pooled), w = pooled.map(s => Math.exp(s - top)), sum = w.reduce((a, b) => a + b);
    return w.map(s => s / sum);
  }));
  const heads = rows.map((_, i) => {
    const out = new Float32Array(dim);
    maps.forEach((map, h) => map[i].forEach((w, j) => {
      for (let d = 0; d < D; d++) out[h * D + d] += w * qkv[j][2 * dim + h * D + d];
    }));
    return out;
  });
  return [linear(heads, p, `${name}.out`), maps];
}

function readDigit(pixels, p, kind, {mean, std}) {  // grey values 0 to 16 -> 10 logits, maps [block][head][query][key]
  let x = linear([...pixels].map(v => [(v - mean) / std]), p, "embed");
  const maps = [];
  for (let b = 0; p[`blocks.${b}.norm1.weight`]; b++) {
    const [mixed, weights] = lasLayer(norm(x, p, `blocks.${b}.norm1`), p, `blocks.${b}.mixer`, kind);
    maps.push(weights);
    x = add(x, mixed);
    const inner = linear(norm(x, p, `blocks.${b}.norm2`), p, `blocks.${b}.feedforward.0`);
    x = add(x, linear(inner.map(row => row.map(gelu)), p, `blocks.${b}.feedforward.2`));
  }
  const rows = norm(x, p, "norm");
  const mean64 = rows[0].map((_, i) => rows.reduce((sum, row) => sum + row[i], 0) / rows.length);
  return {logits: [...linear([mean64], p, "head")[0]], maps};
}

function digits(root, data) {
  const {form, svg, words, wide} = stage(root, 330, "What both models answer, and where the chosen pixel looks");
  const nets = Object.entries(data.nets).map(([name, net]) => ({name, ...net, p: parameters(net.weights, data.shapes)}));
  const which = slider(form, "digit", "digit", {min: 0, max: 9, step: 1, value: 3});
  const block = slider(form, "block", "block", {min: 1, max: 4, step: 1, value: 3});
  const head = slider(form, "head", "head", {min: 0, max: 3, step: 1, value: 1});
  const query = slider(form, "query", "pixel that looks", {min: 0, max: 63, step: 1, value: 44});
  const clear = Object.assign(document.createElement("button"), {type: "button", name: "clear", textContent: "empty picture"});
  form.append(clear);
  const picture = shape(root, "svg", {viewBox: "0 0 8 8", class: "picture", tabindex: 0, role: "application", "aria-label": "Picture of 8 by 8 pixels: draw with the pointer, or move with the arrows and darken with the space bar"});
  form.after(picture);
  let pixels = [], drawn = false, cursor = 0, answers = [];

  function think() {
    answers = nets.map(net => ({name: net.name, ...readDigit(pixels, net.p, net, data)}));
    draw();
  }
  function pick() {
    pixels = [...data.digits[which.input.value]]; drawn = false;
    think();
  }
  function ink(i, amount) {
    if (i < 0 || i > 63) return;
    pixels[i] = Math.min(16, pixels[i] + amount); drawn = true; cursor = i;
    think();
  }

  function draw() {
    const W = wide(), i = +query.input.value, b = block.input.value - 1, h = +head.input.value;
    which.show(drawn ? "drawn" : which.input.value); block.show(block.input.value); head.show(head.input.value); query.show(`${i}`);
    picture.replaceChildren();
    pixels.forEach((v, j) => shape(picture, "rect", {x: j % 8, y: Math.floor(j / 8), width: 1, height: 1, fill: GREY, "fill-opacity": .06 + .94 * v / 16}));
    shape(picture, "rect", {x: i % 8 + .04, y: Math.floor(i / 8) + .04, width: .92, height: .92, fill: "none", stroke: RED, "stroke-width": .12});
    if (document.activeElement === picture) shape(picture, "circle", {cx: cursor % 8 + .5, cy: Math.floor(cursor / 8) + .5, r: .2, fill: BLUE});
    svg.replaceChildren();
    const side = Math.min(150, (W - 30) / 2), cell = side / 8, said = [];
    answers.forEach(({name, logits, maps}, k) => {
      const weights = maps[b][h][i], label = k ? "plain attention" : name, top = Math.max(...weights), left = k * (side + 30);
      shape(svg, "text", {x: left, y: 12}, `${label} looks here`);
      for (let j = 0; j < 64; j++)
        shape(svg, "rect", {x: left + j % 8 * cell, y: 20 + Math.floor(j / 8) * cell, width: cell - 1, height: cell - 1, fill: k ? GREY : BLUE, "fill-opacity": j > i ? 0 : .05 + .95 * Math.sqrt(weights[j] / top), stroke: j === i ? RED : "currentColor", "stroke-opacity": j === i ? 1 : .15, "stroke-width": j === i ? 2 : 1});
      const best = logits.indexOf(Math.max(...logits)), odds = logits.map(l => Math.exp(l - logits[best])), sum = odds.reduce((a, c) => a + c);
      const step = (W - 50) / 10, bar = step * .36;
      odds.forEach((o, d) => shape(svg, "rect", {x: 44 + d * step + k * bar, y: 290 - 90 * o / sum, width: bar, height: 90 * o / sum, fill: k ? GREY : BLUE}));
      said.push(`${label} reads a ${best} (${(100 / sum).toFixed(0)} %)`);
      root.dataset[k ? "plain" : "las"] = JSON.stringify({logits, weights});
    });
    axes(svg, {left: 36, right: W - 4, top: 195, bottom: 290}, {x: d => 44 + (d + .36) * (W - 50) / 10, y: v => 290 - 90 * v, xs: [...Array(10).keys()].map(d => [d, `${d}`]), ys: [[0, "0"], [1, "1"]], xname: "answer: LaS blue, plain attention grey", yname: ""});
    const truth = drawn ? "" : ` It is a ${which.input.value}.`;
    words.textContent = `${said.join(", ")}.${truth} Pixel ${i}, framed in red, sees those before it: the darker, the more weight.`;
  }

  form.addEventListener("input", e => e.target === which.input ? pick() : draw());
  clear.addEventListener("click", () => { pixels = Array(64).fill(0); drawn = true; think(); });
  const under = e => {
    const box = picture.getBoundingClientRect();
    const [x, y] = [(e.clientX - box.left) / box.width * 8, (e.clientY - box.top) / box.height * 8].map(Math.floor);
    return x < 0 || x > 7 || y < 0 || y > 7 ? -1 : 8 * y + x;
  };
  let last = -1;
  const paint = e => {
    if (!(e.buttons & 1) || under(e) === last) return;
    last = under(e); e.preventDefault(); ink(last, 12);
  };
  picture.addEventListener("pointerdown", e => { last = -1; paint(e); });
  picture.addEventListener("pointermove", paint);
  picture.addEventListener("keydown", e => {
    const move = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -8, ArrowDown: 8}[e.key];
    if (move === undefined && e.key !== " ") return;
    e.preventDefault();
    if (e.key === " ") ink(cursor, 8);
    else { cursor = Math.min(63, Math.max(0, cursor + move)); draw(); }
  });
  for (const kind of ["focus", "blur"]) picture.addEventListener(kind, draw);
  root.addEventListener("resized", draw);
  pick();
}
