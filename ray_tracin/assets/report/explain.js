// Explain: a region of a query slice, and the train regions for, neither for nor against, and against it.

const CHOICE = { query: 0, classId: 1, card: null }; // The card by its key: where it is in the lists changes with the filters.
const LISTS = [
  { key: "proponents", title: "Proponents", text: "pushed the network toward this prediction" },
  { key: "neutral", title: "Neutral", text: `influence nearest to 0; ${DATA.wholeSlices ? "0 itself" : "low overlap"} left out` },
  { key: "opponents", title: "Opponents", text: "pushed it away" },
];
const restingPanes = []; // of cards that went
let cards = []; // what is shown, in order: {key, list, column, rank, influence, cosine, element, pane}

const currentSlice = () => DATA.queries[CHOICE.query].slice;

// Ranking

function scoresOf(query, classId, rows) {
  const columns = CLASSES * TRAIN;
  const influence = rows.subarray((classId - 1) * columns, classId * columns);
  const norm = normOf(query, classId);
  const cosine = new Float64Array(columns).fill(NaN);
  if (TRAIN_NORM && norm !== 0) {
    for (let i = 0; i < columns; i++) {
      if (TRAIN_NORM[i] !== 0) cosine[i] = Math.fround(influence[i] / norm / TRAIN_NORM[i]);
    }
  }
  return { influence, cosine };
}

// The columns of every train region that exists, without the query itself, in the order of each list.
function rankedRegions(query, classId, scores, by) {
  const values = by === "cosine" ? scores.cosine : scores.influence;
  const { slice } = DATA.queries[query];
  // Where every influence is 0 there is nothing to rank.
  const any = values.some((value) => value !== 0 && !Number.isNaN(value));
  const columns = Int32Array.from(any ? values.keys() : []).filter(
    (column) => !Number.isNaN(values[column]) && !(columnSlice(column) === slice && columnClass(column) === classId),
  );
  // Ties go to the lower column, as in the tables.
  const ordered = (chosen, size) => chosen.slice().sort((a, b) => size(a) - size(b) || a - b);
  // Who has hardly a gradient is nobody's neutral example: a region of low overlap, a whole slice without the class.
  const telling = columns.filter((column) => (DATA.wholeSlices ? values[column] !== 0
    : !isLowOverlap(columnSlice(column), columnClass(column))));
  return {
    // Who pushed toward a prediction is above 0, who pushed away below.
    proponents: ordered(columns.filter((column) => values[column] > 0), (column) => -values[column]),
    opponents: ordered(columns.filter((column) => values[column] < 0), (column) => values[column]),
    neutral: ordered(telling, (column) => Math.abs(values[column])),
  };
}

function filters() {
  return {
    trainClass: Number(byId("train-class").value),
    onePerPatient: byId("one-per-patient").checked,
    samePatient: byId("same-patient").checked,
    global: byId("global").checked,
    topK: Number(byId("top-k").value),
    score: byId("score").value,
  };
}

// The first of a list that pass, with their rank among all. localRank leaves global explainers out, and is 0 for them.
function filtered(columns, classId, patient, chosen) {
  const seen = new Set();
  const kept = [];
  let local = 0;
  for (const [place, column] of columns.entries()) {
    const name = SLICES.patient[columnSlice(column)];
    const localRank = isGlobal(classId, column) ? 0 : ++local;
    if (chosen.trainClass && columnClass(column) !== chosen.trainClass) continue;
    if (!chosen.samePatient && name === patient) continue;
    if (!chosen.global && !localRank) continue;
    if (chosen.onePerPatient && seen.has(name)) continue;
    seen.add(name);
    kept.push({ column, rank: place + 1, localRank });
    if (kept.length === chosen.topK) break;
  }
  return kept;
}

// The view

function buildExplain() {
  const patients = [...new Set(DATA.queries.map((query) => SLICES.patient[query.slice]))];
  byId("patient").replaceChildren(...patients.map((name) => option(name, name)));
  byId("train-class").append(option(0, "any"), ...classIds().map((c) => option(c, className(c))));
  const sizes = [...new Set([5, 10, 20, DATA.topK])].sort((a, b) => a - b);
  byId("top-k").append(...sizes.map((size) => option(size, `${size} each`)));
  byId("top-k").value = DATA.topK;
  byId("score").value = DATA.score;
  byId("score").disabled = !TRAIN_NORM;
  buildTools();
  const modalities = DATA.modalities.map((name, channel) => {
    const pane = new Pane({ sharp: Math.max(2, Math.round(480 / SIZE)), caption: name, onclick: chooseByClick });
    pane.modality = channel;
    pane.element.addEventListener("dblclick", () => chooseModality(channel));
    return pane;
  });
  byId("query-panes").append(...modalities.map((pane) => pane.element));
  byId("query-panes").style.setProperty("--columns", Math.min(2, modalities.length));
  document.querySelector(".looked-at").style.setProperty("--rows", modalities.length === 1 ? 2 : Math.ceil(modalities.length / 2));
  buildExplain.panes = modalities;
  makeNavigable(document.querySelector(".viewer"));
  byId("patient").addEventListener("change", (event) => choosePatient(event.target.value));
  byId("slice").addEventListener("input", (event) => chooseQuery(queriesOf(patientOf(CHOICE.query))[event.target.value]));
  byId("previous-slice").addEventListener("click", () => stepSlice(-1));
  byId("next-slice").addEventListener("click", () => stepSlice(1));
  byId("download").addEventListener("click", downloadRanking);
  for (const id of ["score", "train-class", "top-k", "one-per-patient", "same-patient", "global"]) {
    byId(id).addEventListener("change", showRankings);
  }
}

const patientOf = (query) => SLICES.patient[DATA.queries[query].slice];

function queriesOf(patient) {
  return [...DATA.queries.keys()].filter((query) => patientOf(query) === patient);
}

// How good a start a region is: its pixels, and if it has hardly a gradient, or none, only where there is no other.
function promise(query, classId) {
  const { slice } = DATA.queries[query];
  const pixels = REGIONS.pixels[regionPlace(slice, classId)];
  return normOf(query, classId) > 0 && !isLowOverlap(slice, classId) ? 1 + pixels : pixels / SIZE ** 2 / 2;
}

// A patient's slice with the largest region is a better start than the first.
function choosePatient(patient, classId = CHOICE.classId) {
  const mine = queriesOf(patient);
  return chooseQuery(mine.reduce((best, query) => (promise(query, classId) > promise(best, classId) ? query : best), mine[0]));
}

function stepSlice(step) {
  const mine = queriesOf(patientOf(CHOICE.query));
  const place = mine.indexOf(CHOICE.query) + step;
  if (place >= 0 && place < mine.length) chooseQuery(mine[place]);
}

function stepPatient(step) {
  const names = [...byId("patient").options].map((one) => one.value);
  const place = names.indexOf(patientOf(CHOICE.query)) + step;
  if (place >= 0 && place < names.length) choosePatient(names[place]);
}

function chooseQuery(query) {
  CHOICE.query = query;
  CHOICE.card = null;
  return showQuery();
}

function chooseClass(classId) {
  CHOICE.classId = classId;
  CHOICE.card = null;
  return showQuery();
}

function chooseByClick(event, pane) {
  const classId = wasDragged() ? 0 : pane.classAt(event);
  if (classId) chooseClass(classId);
}

function chooseModality(channel) {
  VIEW.modality = channel;
  showComparison();
  redrawPanes();
}

function showQuery() {
  const slice = currentSlice();
  const mine = queriesOf(SLICES.patient[slice]);
  byId("patient").value = SLICES.patient[slice];
  Object.assign(byId("slice"), { max: mine.length - 1, value: mine.indexOf(CHOICE.query) });
  byId("slice-name").textContent = `${examination(slice)}slice ${SLICES.index[slice]} (${mine.indexOf(CHOICE.query) + 1} of ${mine.length})`;
  const inChips = byId("classes").contains(document.activeElement);
  byId("classes").replaceChildren(...classIds().map(classChip));
  if (inChips) byId("classes").querySelector(".chosen").focus();
  for (const pane of buildExplain.panes) pane.show(slice, CHOICE.classId);
  byId("facts").replaceChildren(...queryFacts(slice, CHOICE.classId));
  return showRankings();
}

function classChip(classId) {
  const chosen = classId === CHOICE.classId;
  const there = regionExists(CHOICE.query, classId);
  return h(`button.chip${chosen ? ".chosen" : ""}${there ? "" : ".empty"}`, {
    role: "radio", "aria-checked": String(chosen), dataset: { class: classId },
    title: there ? `Explain ${className(classId)} (${classId})` : "no region of this class on this slice",
    onclick: () => chooseClass(classId),
  }, swatch(classId), className(classId));
}

function queryFacts(slice, classId) {
  const place = regionPlace(slice, classId);
  if (!regionExists(CHOICE.query, classId)) {
    const there = classIds().filter((other) => regionExists(CHOICE.query, other)).map(className).join(", ") || "none";
    return [message(`The network predicts no ${className(classId)} with more than ${percent(DATA.threshold)} confidence ` +
      `here: there is nothing to explain. Regions on this slice: ${there}.`)];
  }
  const facts = [h("span.whose", {}, "This region"), h("span", {}, `${REGIONS.pixels[place]} pixels`)];
  if (SLICES.labelled[slice]) {
    facts.push(
      h("span", { title: "Of the whole prediction of this class on this slice" }, "Dice ", h("b", { dataset: { testid: "dice" } }, fixed(sliceDice(slice, classId)))),
      h("span", { title: "Soft Dice of the region: the score that is differentiated" }, "region Dice ", h("b", {}, fixed(REGIONS.dice[place]))),
      h("span", { title: "Share of the region that is annotated as this class" }, "overlap ", h("b", { dataset: { testid: "overlap" } }, fixed(REGIONS.overlap[place]))),
    );
  } else {
    facts.push(h("span.warning", {}, "No ground truth: the network's own prediction stands in for it."));
  }
  if (SLICES.warnings[slice]) facts.push(h("span.warning", {}, `Read with a warning: ${SLICES.warnings[slice]}.`));
  const doubt = doubtOf(CHOICE.query, classId);
  if (doubt) facts.push(h("span.warning", {}, doubt));
  return facts;
}

// Why the ranking of a region that exists says little, or nothing.
function doubtOf(query, classId) {
  const { slice } = DATA.queries[query];
  const norm = normOf(query, classId);
  if (Number.isNaN(norm)) return "No influence: not every checkpoint predicts this region (regions.source=checkpoint), so there is nothing to rank.";
  if (norm === 0) return "No gradient: every influence on this region is 0, so there is nothing to rank.";
  if (isLowOverlap(slice, classId)) return "Low overlap: score and gradient are near 0, and the ranking says little.";
  if (DATA.wholeSlices || isPredicted(slice, classId)) return "";
  return "The checkpoints predict this region, the final network doesn't (regions.source=checkpoint): its influence is theirs, and there is no pixel to show.";
}

async function showRankings() {
  const { query, classId } = CHOICE;
  const slice = currentSlice();
  clearCards();
  if (!regionExists(query, classId)) {
    showNoRankings("Nothing to explain: this region does not exist.");
    return;
  }
  const rows = await loadInfluence(slice).catch((error) => error);
  if (query !== CHOICE.query || classId !== CHOICE.classId) return; // overtaken by another choice
  clearCards();
  if (rows instanceof Error) {
    showNoRankings(rows.message);
    return;
  }
  const chosen = filters();
  const scores = scoresOf(query, classId, rows);
  const ranked = rankedRegions(query, classId, scores, chosen.score);
  const there = [...ranked.proponents, ...ranked.opponents];
  byId("global-count").textContent = `global explainers (${there.filter((column) => isGlobal(classId, column)).length} of ${there.length})`;
  byId("rankings").replaceChildren(...LISTS.map(({ key, title, text }) => {
    const entries = filtered(ranked[key], classId, SLICES.patient[slice], chosen).map((entry) => ({
      ...entry, influence: scores.influence[entry.column], cosine: scores.cosine[entry.column],
    }));
    const row = h("ol.cards", { dataset: { testid: key } }, entries.map((entry) => buildCard(key, entry, chosen.score)));
    return h("section.ranking", {}, h("h2", {}, title, h("small", {}, text)),
      entries.length ? row : message(emptyListText(ranked[key], classId, SLICES.patient[slice], chosen)));
  }));
  showLinks();
  showComparison();
}

// What was there is another region's.
function showNoRankings(why) {
  byId("global-count").textContent = "global explainers";
  byId("rankings").replaceChildren(message(why));
  byId("links").replaceChildren();
  showComparison();
}

function emptyListText(columns, classId, patient, chosen) {
  if (!columns.length) return "Nothing to rank.";
  const hidden = filtered(columns, classId, patient, { ...chosen, global: true }).length > 0;
  return `No train region passes the filters${hidden ? ": those that would are global explainers, which are left out" : ""}.`;
}

function clearCards() {
  for (const card of cards) {
    card.pane.rest();
    restingPanes.push(card.pane);
  }
  cards = [];
}

function buildCard(list, entry, score) {
  const slice = columnSlice(entry.column);
  const classId = columnClass(entry.column);
  const pane = restingPanes.pop() || new Pane({ marks: false });
  const key = `${list} ${entry.column}`;
  const sign = { proponents: "+", neutral: "○", opponents: "−" }[list];
  const element = h("li.card", {
    tabindex: 0, title: cardTitle(entry),
    dataset: {
      testid: "card", list, rank: entry.rank, localRank: entry.localRank, influence: entry.influence, cosine: entry.cosine,
      slice: SLICES.row[slice], class: classId, patient: SLICES.patient[slice],
    },
    onclick: () => chooseCard(key),
    onkeydown: (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      chooseCard(key);
    },
  },
  pane.element,
  h("div.line", {}, h("b.score", {}, shown(score === "cosine" ? entry.cosine : entry.influence)),
    h("span.rank", {}, list === "neutral" ? sign : `${sign}${shownRank(entry)}`)),
  h("div.line", {}, withClass(classId)),
  h("div.line", {}, h("span.where", {}, `${shortName(SLICES.patient[slice])} · ${SLICES.index[slice]}`)),
  h("div.line", {}, h("small", {}, score === "cosine" ? `influence ${shown(entry.influence, 2)}` : `cosine ${fixed(entry.cosine)}`)),
  h("div.marks", {}, cardMarks(slice, classId, entry.column)));
  pane.show(slice, classId);
  cards.push({ ...entry, key, list, element, pane, slice, classId });
  return element;
}

// Among what may be shown: global explainers count only where they are.
const shownRank = (entry) => (byId("global").checked ? entry.rank : entry.localRank);

function cardTitle(entry) {
  const slice = columnSlice(entry.column);
  return `${SLICES.patient[slice]}, ${examination(slice)}slice ${SLICES.index[slice]}, ${className(columnClass(entry.column))}\n` +
    `influence ${shown(entry.influence, 5)}, cosine ${fixed(entry.cosine, 3)}\nrank ${entry.rank} with global explainers`;
}

function cardMarks(slice, classId, column) {
  const marks = [];
  if (isGlobal(CHOICE.classId, column)) {
    marks.push(h("span.mark", { title: `Global explainer: in ${percent(listShare(CHOICE.classId, column))} of the lists of ` +
      className(CHOICE.classId) }, "global"));
  }
  if (isLowOverlap(slice, classId)) {
    marks.push(h("span.mark", { title: "Little of this region is annotated as its class: its gradient is near 0" }, "low overlap"));
  }
  if (SLICES.patient[slice] === SLICES.patient[currentSlice()]) marks.push(h("span.mark", {}, "same patient"));
  return marks;
}

const chosenCard = () => cards.findIndex((card) => card.key === CHOICE.card);

function chooseCard(key) {
  CHOICE.card = CHOICE.card === key ? null : key;
  showComparison();
}

function stepCard(step) {
  const now = chosenCard();
  const next = now < 0 ? (step > 0 ? 0 : cards.length - 1) : now + step;
  if (next < 0 || next >= cards.length) return;
  CHOICE.card = cards[next].key;
  showComparison();
  cards[next].element.scrollIntoView({ block: "nearest", inline: "nearest" });
}

// Comparison: query and card side by side in one modality, and all modalities in small below.

function showComparison() {
  const chosen = chosenCard();
  const card = cards[chosen];
  for (const [number, one] of cards.entries()) one.element.classList.toggle("chosen", number === chosen);
  for (const [number, line] of linkLines().entries()) line.classList.toggle("chosen", number === chosen);
  const box = byId("comparison");
  box.hidden = !card;
  byId("query-panes").hidden = Boolean(card);
  for (const pane of showComparison.panes || []) pane.remove();
  showComparison.panes = [];
  if (!card) return;
  box.replaceChildren(
    comparedSide(currentSlice(), CHOICE.classId, "This patient", chooseByClick),
    comparedSide(card.slice, card.classId, cardName(card), null),
    comparedFacts(card),
  );
}

function cardName(card) {
  const names = { proponents: "Proponent", neutral: "Neutral", opponents: "Opponent" };
  return card.list === "neutral" ? "Neutral region" : `${names[card.list]} ${shownRank(card)}`;
}

function comparedSide(slice, classId, title, onclick) {
  const large = new Pane({ sharp: Math.max(2, Math.round(480 / SIZE)), caption: DATA.modalities[VIEW.modality], onclick });
  const small = DATA.modalities.map((name, channel) => {
    const pane = new Pane({ caption: name, marks: false, onclick: () => chooseModality(channel) });
    pane.modality = channel;
    pane.element.classList.toggle("chosen", channel === VIEW.modality);
    return pane;
  });
  showComparison.panes.push(large, ...small);
  for (const pane of [large, ...small]) pane.show(slice, classId);
  return h("figure", {}, h("figcaption", {}, h("b", {}, title), ` ${shortName(SLICES.patient[slice])} · ${SLICES.index[slice]} · `, withClass(classId)),
    large.element, h("div.strip", {}, small.map((pane) => pane.element)));
}

function comparedFacts(card) {
  const place = regionPlace(card.slice, card.classId);
  const links = orderedFeatures(CHOICE.classId)
    .filter((feature) => DATA.features.predictive[CHOICE.classId - 1].includes(feature))
    .map((feature) => [feature, similarity(currentSlice(), CHOICE.classId, card.slice, card.classId, feature)])
    .filter(([, value]) => !Number.isNaN(value)).sort((a, b) => b[1] - a[1]);
  const linked = links.slice(0, 3).map(([feature, value]) => `${feature} (${fixed(value)})`).join(", ");
  return h("p.facts.compared", {}, h("span.whose", {}, cardName(card)),
    h("span", {}, "influence ", h("b", {}, shown(card.influence))), h("span", {}, "cosine ", h("b", {}, fixed(card.cosine))),
    h("span", {}, "overlap ", h("b", {}, fixed(REGIONS.overlap[place]))),
    h("span", {}, "Dice ", h("b", {}, fixed(sliceDice(card.slice, card.classId)))),
    h("span", {}, linked ? `linked by features ${linked}` : "no predictive feature links the two"),
    h("button", { id: "close-comparison", title: "Esc", onclick: () => chooseCard(card.key) }, "Close"));
}

// CSV

const CSV_HEADER = ["query_patient", "query_case", "query_index", "query_slice", "query_class", "list", "rank", "local_rank",
  "train_patient", "train_case", "train_index", "train_slice", "train_class", "influence", "cosine", "overlap", "is_global", "ranked_by"];

function rankingRows() {
  const slice = currentSlice();
  const { score } = filters();
  return cards.map((card) => [SLICES.patient[slice], SLICES.case[slice], SLICES.index[slice], SLICES.row[slice], className(CHOICE.classId),
    card.list, card.rank, card.localRank, SLICES.patient[card.slice], SLICES.case[card.slice], SLICES.index[card.slice],
    SLICES.row[card.slice], className(card.classId), card.influence, card.cosine, REGIONS.overlap[regionPlace(card.slice, card.classId)],
    isGlobal(CHOICE.classId, card.column), score]);
}

function downloadRanking() {
  const slice = currentSlice();
  const name = `${SLICES.patient[slice]}_${SLICES.index[slice]}_${className(CHOICE.classId)}`.replace(/[^\w.-]+/g, "_");
  saveText(`${name}.csv`, csvText(CSV_HEADER, rankingRows()));
}
