// Links: eq. 7 of every feature, query against each card.

function showLinks() {
  const features = orderedFeatures(CHOICE.classId);
  const shape = [CHOICE.classId, ...cards.map((card) => card.list)].join();
  if (shape !== showLinks.shape || linkLines().length !== cards.length) buildLinks(features);
  showLinks.shape = shape;
  for (const [number, line] of linkLines().entries()) fillLinks(line, cards[number], features);
}

// The table with empty cells. It stays while the lists are as long: a query has thousands of cells, and one follows the other.
function buildLinks(features) {
  const predictive = new Set(DATA.features.predictive[CHOICE.classId - 1]);
  const isFirst = (number) => number > 0 && cards[number - 1].list !== cards[number].list;
  const rows = cards.map((_, number) => h(`tr${isFirst(number) ? ".first" : ""}`, { onclick: () => chooseCard(cards[number]?.key) },
    h("th", { scope: "row" }), features.map(() => h("td"))));
  const note = DATA.features.known
    ? predictive.size ? "Predictive features of this class come first, underlined." : "No feature is predictive for this class."
    : "Which features are predictive is not known: this run has no test queries.";
  byId("links").replaceChildren(h("section", {}, h("h2", {}, "Features that link query and train region",
    h("small", {}, "similarity of their maxima (eq. 7), 0 dark to 1 bright; a number in the head shows the feature's map")),
  h("p.note", {}, note), h("div.scroll", {}, h("table.links", { dataset: { testid: "links" }, style: `--cell:${Math.max(9, Math.min(30, Math.floor(560 / FEATURES)))}px` },
    h("thead", {}, h("tr", {}, h("th"), features.map((feature) => linkHead(feature, predictive.has(feature))))), h("tbody", {}, rows)))));
}

function linkHead(feature, predictive) {
  const mapped = DATA.images && DATA.features.mapped.includes(feature);
  const about = `feature ${feature}${predictive ? ", predictive" : ""}${mapped ? ": show its map" : ""}`;
  return h(`th${predictive ? ".predictive" : ""}`, { scope: "col", title: about }, mapped
    ? h("button", { dataset: { feature }, onclick: () => chooseFeature(VIEW.feature === feature ? null : feature) }, String(feature))
    : String(feature));
}

const linkLines = () => [...document.querySelectorAll(".links tbody tr")];

function fillLinks(line, card, features) {
  const [head, ...cells] = line.children;
  const sign = { proponents: "+", neutral: "○", opponents: "−" }[card.list];
  head.textContent = `${sign} ${shortName(SLICES.patient[card.slice])} · ${SLICES.index[card.slice]}`;
  for (const [place, feature] of features.entries()) {
    const value = similarity(currentSlice(), CHOICE.classId, card.slice, card.classId, feature);
    const silent = Number.isNaN(value);
    const there = isPredicted(currentSlice(), CHOICE.classId) && isPredicted(card.slice, card.classId);
    fill(cells[place], { style: silent ? "" : `background:${heat(value)}`, dataset: { value },
      title: `feature ${feature}: ${there ? (silent ? "silent in both" : fixed(value, 3)) : "no region"}` }, []);
  }
}

// Cividis in five stops: readable for colour-blind eyes, and in grey.
const HEAT = ["#00224e", "#434e6c", "#7d7c78", "#bcaf6f", "#fee838"].map(rgb);

function heat(value) {
  const at = Math.min(1, Math.max(0, value)) * (HEAT.length - 1);
  const low = Math.min(Math.floor(at), HEAT.length - 2);
  const mixed = HEAT[low].map((from, channel) => Math.round(from + (HEAT[low + 1][channel] - from) * (at - low)));
  return `rgb(${mixed.join(",")})`;
}
