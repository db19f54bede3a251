// Curate: train regions, the most suspicious first, and a list of those to review.

const REVIEW = {
  slice: DATA.review.slice,
  class: unpack(DATA.review.class),
  pixels: unpack(DATA.review.pixels),
  truth: unpack(DATA.review.truth),
  overlap: unpack(DATA.review.overlap),
  loss: unpack(DATA.review.loss),
  selfInfluence: unpack(DATA.review.self_influence),
  percentile: unpack(DATA.review.percentile),
  signs: DATA.review.signs,
};
const PAGE_ROWS = 40;
const SORTS = {
  signs: ["signs", () => 0],
  selfInfluence: ["self-influence", (row) => -REVIEW.selfInfluence[row]],
  overlap: ["overlap, lowest", (row) => REVIEW.overlap[row]],
  loss: ["loss", (row) => -REVIEW.loss[row]],
};
const marked = new Set(restoreMarks());
let reviewShown = PAGE_ROWS;

// Not the row: another run of the same configuration may have other patients there.
const regionKey = (row) => `${SLICES.case[REVIEW.slice[row]]}/${SLICES.index[REVIEW.slice[row]]}/${REVIEW.class[row]}`;

// Browsers may refuse storage to pages from disk; marks then last as long as the page.
function restoreMarks() {
  try {
    return JSON.parse(localStorage.getItem(`ray_tracin ${DATA.fingerprint}`) || "[]");
  } catch {
    return [];
  }
}

function mark(row, on) {
  if (on) marked.add(regionKey(row));
  else marked.delete(regionKey(row));
  try {
    localStorage.setItem(`ray_tracin ${DATA.fingerprint}`, JSON.stringify([...marked]));
  } catch {
    // kept in memory
  }
  byId("review-count").textContent = `${marked.size} marked`;
}

function reviewRows() {
  const classId = Number(byId("review-class").value);
  const only = byId("review-signs").checked;
  const [, key] = SORTS[byId("review-sort").value];
  const last = (value) => (Number.isNaN(value) ? Infinity : value);
  return [...REVIEW.slice.keys()]
    .filter((row) => (!classId || REVIEW.class[row] === classId) && (!only || REVIEW.signs[row].length))
    .sort((a, b) => last(key(a)) - last(key(b)) || a - b);
}

function buildCurate() {
  const rerender = () => {
    reviewShown = PAGE_ROWS;
    showReview();
  };
  byId("curate").replaceChildren(
    h("div.review", {},
      h("div.filters", {},
        h("label", {}, "Class ", h("select", { id: "review-class", onchange: rerender }, option(0, "all"), classIds().map((c) => option(c, className(c))))),
        h("label", {}, "Order by ", h("select", { id: "review-sort", onchange: rerender }, Object.entries(SORTS).map(([value, [text]]) => option(value, text)))),
        h("label.check", {}, h("input", { type: "checkbox", id: "review-signs", checked: REVIEW.signs.some((s) => s.length), onchange: rerender }), "only with signs"),
        h("span.spacer"), h("span", { id: "review-count" }, `${marked.size} marked`),
        h("button", { id: "review-export", title: "The marked regions, or all that are listed where none is marked", onclick: exportReview }, "Export review list")),
      h("p.note", {}, "Train regions that may be annotated wrongly. Signs are reasons to look, not verdicts: a large self-influence (its bar: than how many of the class it is larger) says that little else in the training set supports a region; low overlap and a large loss say that network and annotation disagree."),
      !TRAIN_NORM && message("Self-influence is not known: this run has no train queries."),
      h("div", { id: "review-table" })),
    h("aside.preview", {}, h("div", { id: "review-preview" }), h("div.tools-place"), h("div", { id: "review-facts" })));
  makeNavigable(byId("review-preview"));
  showReview();
}

function showReview() {
  const rows = reviewRows();
  for (const pane of showReview.panes || []) pane.remove();
  showReview.panes = [];
  const heads = ["", "", "region", "self-influence", "overlap", "loss", "why"];
  const body = rows.slice(0, reviewShown).map(reviewLine);
  const more = rows.length > reviewShown && h("button", { onclick: () => {
    reviewShown += PAGE_ROWS;
    showReview();
  } }, `${Math.min(PAGE_ROWS, rows.length - reviewShown)} more of ${rows.length}`);
  byId("review-table").replaceChildren(...[
    h("table.review-list", {}, h("thead", {}, h("tr", {}, heads.map((text) => h("th", { scope: "col" }, text)))), h("tbody", {}, body)),
    rows.length ? null : message("No region has such a sign."), more || null,
  ].filter(Boolean));
  if (rows.length) previewRegion(rows[0]);
}

function reviewLine(row) {
  const slice = REVIEW.slice[row];
  const classId = REVIEW.class[row];
  const pane = new Pane({ marks: false });
  showReview.panes.push(pane);
  pane.show(slice, classId);
  pane.closeUp();
  return h("tr", { tabindex: 0, dataset: { testid: "review", slice: SLICES.row[slice], class: classId }, onclick: () => previewRegion(row), onfocus: () => previewRegion(row) },
    h("td", {}, h("input", { type: "checkbox", checked: marked.has(regionKey(row)), "aria-label": "review", onclick: (event) => event.stopPropagation(), onchange: (event) => mark(row, event.target.checked) })),
    h("td", {}, pane.element),
    h("td", {}, h("div", {}, withClass(classId)), h("div", { title: SLICES.patient[slice] }, shortName(SLICES.patient[slice])), h("small", {}, `${examination(slice)}slice ${SLICES.index[slice]}`)),
    h("td.number", {}, shown(REVIEW.selfInfluence[row]), bar(REVIEW.percentile[row])),
    h("td.number", {}, fixed(REVIEW.overlap[row])), h("td.number", {}, fixed(REVIEW.loss[row])),
    h("td.why", {}, REVIEW.signs[row].map((text) => h("div", {}, text))));
}

// The rows that are listed, and which of them the preview shows.
const reviewLines = () => [...document.querySelectorAll(".review-list tbody tr")];
const previewed = () => reviewLines().findIndex((line) => line.classList.contains("chosen"));

function stepReview(step) {
  reviewLines()[previewed() + step]?.focus();
}

function bar(share) {
  return h("div.bar", { title: Number.isNaN(share) ? "" : `as large as or larger than ${percent(share)} of its class` },
    h("div", { style: `width:${Number.isNaN(share) ? 0 : 100 * share}%` }));
}

function previewRegion(row) {
  const slice = REVIEW.slice[row];
  const classId = REVIEW.class[row];
  const name = String(SLICES.row[slice]);
  for (const line of reviewLines()) line.classList.toggle("chosen", line.dataset.slice === name && Number(line.dataset.class) === classId);
  for (const pane of previewRegion.panes || []) pane.remove();
  previewRegion.panes = DATA.modalities.map((caption, channel) => {
    const pane = new Pane({ sharp: 4, caption });
    pane.modality = channel;
    return pane;
  });
  for (const pane of previewRegion.panes) pane.show(slice, classId);
  byId("review-preview").replaceChildren(
    h("h2", {}, withClass(classId), h("small", {}, `${SLICES.patient[slice]}, ${examination(slice)}slice ${SLICES.index[slice]}`)),
    h("div.panes", {}, previewRegion.panes.map((pane) => pane.element)));
  byId("review-facts").replaceChildren(
    h("p.facts", {}, h("span", {}, `${REVIEW.pixels[row]} pixels in the region`), h("span", {}, `${REVIEW.truth[row]} annotated`),
      h("span", {}, "Dice ", h("b", {}, fixed(sliceDice(slice, classId))))),
    ...REVIEW.signs[row].map((text) => h("p.note", {}, text)),
    SLICES.warnings[slice] ? h("p.note", {}, `Read with a warning: ${SLICES.warnings[slice]}`) : "");
}

const REVIEW_HEADER = ["patient", "case", "index", "slice", "class", "self_influence", "overlap", "loss", "region_pixels", "annotated_pixels", "signs"];

function reviewList() {
  const every = [...REVIEW.slice.keys()];
  const rows = marked.size ? every.filter((row) => marked.has(regionKey(row))) : reviewRows();
  return rows.map((row) => [SLICES.patient[REVIEW.slice[row]], SLICES.case[REVIEW.slice[row]], SLICES.index[REVIEW.slice[row]],
    SLICES.row[REVIEW.slice[row]], className(REVIEW.class[row]), REVIEW.selfInfluence[row], REVIEW.overlap[row], REVIEW.loss[row], REVIEW.pixels[row],
    REVIEW.truth[row], REVIEW.signs[row].join("; ")]);
}

function exportReview() {
  saveText("review.csv", csvText(REVIEW_HEADER, reviewList()));
}
