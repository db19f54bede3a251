// The model: how well it does, what influences what, and which features carry that.

function buildModel() {
  const model = DATA.model;
  byId("model").replaceChildren(h("div.board", {},
    panel("What this run finds", "Are the proponents of the query's own class? Does masking predictive features cost more Dice than masking others (difference of the means; p: how often chance does as much)?", h("ul", {}, model.findings.map((text) => h("li", {}, text)))),
    influenceMatrix(model.matrix), diceOverEpochs(model.epochs), proponentClasses(model), randomSets(model)),
  featureTable(model));
}

function diceOverEpochs(epochs) {
  const x = scale(1, epochs.length, CHART.left, CHART.width - CHART.right);
  const y = scale(0, 1, CHART.height - CHART.bottom, CHART.top);
  const line = (kind, c, dashed) => polyline(epochs.map((e) => [x(e.epoch), e[kind][c] === null ? NaN : y(e[kind][c])]),
    { stroke: DATA.classes[c].colour, "stroke-width": 2, "stroke-dasharray": dashed ? "3 3" : "none" });
  const used = epochs.filter((e) => e.influence);
  const bands = used.map((e) => svg("rect", { x: x(e.epoch) - 4, width: 8, y: CHART.top, height: CHART.height - CHART.top - CHART.bottom, class: "band" }));
  const ticks = niceTicks(1, epochs.length, Math.min(8, epochs.length)).filter(Number.isInteger);
  const hint = "Point at an epoch to read it.";
  const read = h("p.readout", { dataset: { testid: "dice-value" } }, hint);
  const values = (e, kind) => classIds().map((c) => `${className(c)} ${fixed(e[kind][c - 1], 4)}`).join(", ");
  const tell = (place) => {
    const e = epochs[place];
    read.textContent = place === null ? hint
      : `Epoch ${e.epoch} (${e.optimizer}, learning rate ${e.rate}): validation ${values(e, "validation")}; training ${values(e, "train")}`;
  };
  return panel("Dice by epoch and class", "Solid: validation. Dashed: training. Shaded: the checkpoints that the influence is summed over.",
    readable(chart(CHART, bands, axes({ x, y, xTicks: ticks, yTicks: [0, 0.25, 0.5, 0.75, 1], xLabel: "epoch", yLabel: "Dice" }),
      classIds().map((c) => [line("validation", c - 1, false), line("train", c - 1, true)])), CHART, epochs.map((e) => x(e.epoch)), tell),
    legend(DATA.classes.map(({ name, colour }) => [colour, name])), read);
}

// PuOr: purple against, orange for, nearly white for 0; nothing, as in figure 4, where no pair of regions is.
const ABSENT = [0, 0, 0, 0];
const DIVERGING = ["#2d004b", "#8073ac", "#f7f7f7", "#e08214", "#7f3b08"].map(rgb);

function diverging(value) {
  const at = ((Math.min(1, Math.max(-1, value)) + 1) / 2) * (DIVERGING.length - 1);
  const low = Math.min(Math.floor(at), DIVERGING.length - 2);
  return DIVERGING[low].map((from, channel) => from + (DIVERGING[low + 1][channel] - from) * (at - low));
}

function influenceMatrix(matrix) {
  if (!matrix) return panel("Influence of train regions on one another", "", message("This run has no train queries."));
  const [mean, low, high, pairs] = ["mean", "low", "high", "pairs"].map((key) => unpack(matrix[key]));
  const side = matrix.mean.shape[0];
  const sizes = Array.from(mean).filter((v) => !Number.isNaN(v)).map(Math.abs).sort((a, b) => a - b);
  const end = sizes[Math.floor(0.99 * (sizes.length - 1))] || 1;
  const canvas = h("canvas.matrix", { width: side, height: side, dataset: { testid: "matrix" } });
  const pixels = new ImageData(side, side);
  for (let i = 0; i < mean.length; i++) {
    // The root of the size shows small values beside large ones.
    const value = Math.sign(mean[i]) * Math.sqrt(Math.abs(mean[i]) / end);
    pixels.data.set(Number.isNaN(mean[i]) ? ABSENT : [...diverging(value), 255], 4 * i);
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  const read = h("p.readout", { dataset: { testid: "matrix-value" } }, "Point at a cell to read it.");
  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    const row = Math.min(side - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * side)));
    const column = Math.min(side - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * side)));
    const at = row * side + column;
    const value = pairs[at] === 0 ? "no such pair of regions"
      : pairs[at] === 1 ? `influence ${shown(mean[at], 6)}`
        : `mean influence ${shown(mean[at], 6)}, ${shown(low[at], 4)} to ${shown(high[at], 4)}, of ${pairs[at]} pairs`;
    read.textContent = `${cellName(matrix, row)} ← ${cellName(matrix, column)}: ${value}`;
  });
  const names = classIds().map((c) => h("span", {}, className(c)));
  return panel("Influence of train regions on one another",
    `Rows: explained; columns: explaining. Orange: for, purple: against, empty: no such region. ${matrix.block > 1 ? `A cell is a block of ${matrix.block} × ${matrix.block} slices.` : "A cell is a pair of regions."}`,
    h("div.matrix-frame", {}, h("div.columns", {}, names), h("div.rows", {}, names.map((n) => n.cloneNode(true))), canvas), read);
}

function cellName(matrix, cell) {
  const classId = Math.floor(cell / matrix.perClass) + 1;
  const first = (cell % matrix.perClass) * matrix.block;
  const last = Math.min(first + matrix.block, TRAIN) - 1;
  const name = (position) => {
    const slice = DATA.train.slices[position];
    return `${shortName(SLICES.patient[slice])} · ${SLICES.index[slice]}`;
  };
  return `${className(classId)} ${name(first)}${last > first ? ` to ${name(last)}` : ""}`;
}

function proponentClasses(model) {
  const sets = [...new Set(model.proponentClasses.map((line) => line.query_set))];
  const rows = sets.flatMap((set) => classIds().map((classId) => {
    const lines = model.proponentClasses.filter((line) => line.query_set === set && line.query_class === classId);
    const parts = lines.filter((line) => line.share).map((line) => h("div", {
      style: `width:${100 * line.share}%;background:${classColour(line.train_class)}`,
      title: `${className(line.train_class)}: ${line.count} places, ${(100 * line.share).toFixed(2)} %`,
    }, line.share > 0.08 ? percent(line.share) : ""));
    return h("tr", {}, h("th", { scope: "row" }, `${set} · ${className(classId)}`),
      h("td", {}, parts.length ? h("div.stacked", {}, parts) : h("span.note", {}, "no query of this class has proponents")));
  }));
  return panel(`Classes of the top ${model.classList} proponents`, "Of the queries of each class; global explainers are left out.",
    h("table.stack", {}, h("tbody", {}, rows)), legend(DATA.classes.map(({ name, colour }) => [colour, name])));
}

function randomSets(model) {
  const note = "Mean loss of Dice where a set of features is masked together: the predictive ones, all others, and random sets as large as the predictive, which may be among them. What this run finds, above, is of features that are masked alone.";
  if (!model.sets.length) return panel("Does masking predictive features hurt more?", note, message("No feature is predictive in this run, or no validation slice has ground truth: there is nothing to compare."));
  const longest = Math.max(...classIds().map((c) => className(c).length));
  const box = { ...CHART, left: Math.min(CHART.width / 2, 20 + 6.5 * Math.max(9, longest)), height: 60 + 46 * CLASSES };
  const values = model.sets.map((line) => line.impact).filter((value) => value !== null);
  const x = scale(Math.min(0, ...values), Math.max(0.01, ...values), box.left, box.width - 20);
  const rows = classIds().map((classId, place) => {
    const mine = model.sets.filter((line) => line.class === classId && line.impact !== null);
    const y = box.top + 22 + 46 * place;
    const dot = (line, attributes) => svg("circle", { cx: x(line.impact), cy: y, ...attributes },
      svg("title", {}, `${line.set}, ${line.size} features: ${fixed(line.impact, 4)}`));
    const find = (name) => mine.filter((line) => line.set === name);
    const [predictive, others] = ["predictive", "others"].map(find);
    const sizes = predictive.length ? `${predictive[0].size} of ${predictive[0].size + (others[0]?.size ?? 0)}` : "";
    // Sets of few features are often equal: those beside one another are spread, so that each is seen.
    const spread = (number) => y + 2.2 * ((number * 4) % 9 - 4);
    return svg("g", {}, svg("text", { x: box.left - 10, y: y + 1, "text-anchor": "end" }, className(classId)),
      svg("text", { x: box.left - 10, y: y + 15, "text-anchor": "end", class: "label" }, sizes),
      svg("line", { x1: box.left, x2: box.width - 20, y1: y, y2: y, class: "grid" }),
      mine.length ? [others.map((line) => dot(line, { r: 5, class: "others" })), predictive.map((line) => dot(line, { r: 6, class: "predictive" })),
        mine.filter((line) => line.set.startsWith("random")).map((line, number) => dot(line, { r: 3, cy: spread(number), class: "random" }))]
        : svg("text", { x: box.left + 8, y: y - 6, class: "label" }, "no predictive feature"));
  });
  const ticks = niceTicks(Math.min(0, ...values), Math.max(0.01, ...values));
  return panel("Does masking predictive features hurt more?", note,
    chart(box, axes({ x, y: () => 0, xTicks: ticks, yTicks: [], xLabel: "loss of Dice", yLabel: "", box }), rows),
    h("p.legend", {}, h("span", {}, h("span.dot.predictive"), "predictive"), h("span", {}, h("span.dot.others"), "all others"), h("span", {}, h("span.dot.random"), "random sets")));
}

const TRENDS = { u_shaped: "U-shaped", inverted_u: "inverted U", linear: "linear", flat: "flat", dead: "dead" };

function featureTable(model) {
  const title = "Features of the last hidden layer";
  if (!model.trends.length) return panel(title, "", message("This run has no test queries: how important features are was not measured."));
  const select = h("select", { id: "feature-class", onchange: () => show() }, classIds().map((c) => option(c, className(c))));
  const body = h("div.features");
  const show = () => {
    const classId = Number(select.value);
    const lines = model.trends.filter((line) => line.query_class === classId)
      .sort((a, b) => b.predictive - a.predictive || (b.importance_first ?? -1) - (a.importance_first ?? -1));
    // Where no feature has a curve no regions were compared; where some have, the others are silent.
    const measured = model.curves.some((curve) => curve.class === classId);
    const none = !lines.some((line) => line.predictive);
    body.replaceChildren(none ? message(measured ? `No feature is predictive for ${className(classId)}.` : notMeasured(classId)) : "",
      h("div.feature-grid", {}, lines.map((line) => featureCard(model, line, classId, measured))));
  };
  show();
  return panel(title, `How similar query and train region are in a feature (eq. 8), from the first proponent to the last opponent. Predictive: U-shaped, or falling, and above ${DATA.features.threshold} at the first proponent. Impact: loss of Dice where the feature is masked (eq. 9).`,
    h("label", {}, "Class of the query ", select), body);
}

const notMeasured = (classId) => `How important features are for ${className(classId)} was not measured: there is no test query ` +
  "of this class with a gradient, or no train region left to compare with it (global explainers are left out).";

function featureCard(model, line, classId, measured) {
  const curve = model.curves.find((one) => one.class === classId && one.feature === line.feature);
  const impact = model.impact.find((one) => one.class === classId && one.feature === line.feature);
  const fitted = line.trend === "linear" ? (line.slope < 0 ? "falling" : "rising") : TRENDS[line.trend];
  const trend = measured ? fitted : "";
  const about = line.predictive ? "predictive" : "";
  const corner = h("span", { dataset: { testid: "curve-value" } }, about);
  const tell = (place) => {
    corner.textContent = place === null ? about : `rank ${Math.round(curve.rank[place])}: ${fixed(curve.importance[place], 3)}`;
  };
  return h(`div.feature${line.predictive ? ".predictive" : ""}`, { dataset: { feature: line.feature } },
    h("div.line", {}, h("b", {}, `feature ${line.feature}`), corner),
    curve ? sparkline(curve, tell) : message(measured ? "silent in all compared regions" : "not measured"),
    h("div.line", {}, h("span", {}, trend), h("span", { title: "importance at the first proponent" }, `first ${fixed(line.importance_first)}`)),
    h("div.line", {}, impact ? `impact ${fixed(impact.impact, 3)}` : ""));
}

function sparkline(curve, tell) {
  const box = { width: 180, height: 56 };
  const x = scale(curve.rank[0], curve.rank.at(-1), 2, box.width - 2);
  const y = scale(0, 1, box.height - 3, 3);
  const drawing = chart(box, svg("line", { x1: 2, x2: box.width - 2, y1: y(DATA.features.threshold), y2: y(DATA.features.threshold), class: "grid" }),
    polyline(curve.rank.map((rank, place) => [x(rank), y(curve.importance[place])]), { class: "curve" }));
  return readable(drawing, box, curve.rank.map(x), tell);
}
