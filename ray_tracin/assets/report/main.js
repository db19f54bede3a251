// Views, keys, and the start.

const VIEWS = { explain: null, curate: buildCurate, model: buildModel, run: buildRun };
const KEYS = [
  ["↑ ↓", "slice above, below"], ["← →", "previous, next train region"], ["Page ↑ ↓", "previous, next patient"],
  ["1 – 9", "class"], ["m", "next modality"], ["p t o", "prediction, ground truth, other classes"], ["+ −", "zoom in, out"],
  ["0", "reset zoom and window"], ["Esc", "close the comparison"], ["wheel, drag", "zoom, move"], ["right drag", "window and level"],
  ["Curate: ↑ ↓", "previous, next region"], ["Curate: x", "mark it for review, or not"],
];

function showView(name) {
  for (const view of Object.keys(VIEWS)) {
    byId(view).hidden = view !== name;
    byId(`tab-${view}`).setAttribute("aria-selected", String(view === name));
  }
  const build = VIEWS[name];
  VIEWS[name] = null; // built when it is first looked at
  if (build) build();
  byId(name).querySelector(".tools-place")?.append(byId("tools")); // one set of controls, for the pictures of either view
  if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
}

function toggleOverlay(key) {
  VIEW[key] = !VIEW[key];
  byId("tools").dispatchEvent(new Event("refresh"));
  redrawPanes();
}

const OVERLAYS = {
  p: () => toggleOverlay("prediction"),
  t: () => toggleOverlay("truth"),
  o: () => toggleOverlay("others"),
  "+": () => zoomBy(ZOOM_STEP),
  "-": () => zoomBy(1 / ZOOM_STEP),
  0: resetView,
};
const EXPLAIN = {
  ...OVERLAYS,
  ArrowUp: () => stepSlice(1),
  ArrowDown: () => stepSlice(-1),
  ArrowLeft: () => stepCard(-1),
  ArrowRight: () => stepCard(1),
  PageUp: () => stepPatient(-1),
  PageDown: () => stepPatient(1),
  Escape: () => CHOICE.card !== null && chooseCard(CHOICE.card),
  m: () => chooseModality((VIEW.modality + 1) % DATA.modalities.length),
};
const CURATE = {
  ...OVERLAYS,
  ArrowUp: () => stepReview(-1),
  ArrowDown: () => stepReview(1),
  x: () => reviewLines()[previewed()]?.querySelector("input").click(),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input:not([type=checkbox]), select, dialog")) return;
  if (event.key === "?") {
    byId("help").showModal();
    return;
  }
  const explains = !byId("explain").hidden;
  const classId = Number(event.key);
  const actions = explains ? EXPLAIN : byId("curate").hidden ? {} : CURATE;
  if (explains && classId >= 1 && classId <= CLASSES) chooseClass(classId);
  else if (actions[event.key]) actions[event.key]();
  else return;
  event.preventDefault();
}

function start() {
  byId("help").append(h("h2", {}, "Keys"), h("dl.keys", {}, KEYS.map(([key, text]) => [h("dt", {}, key), h("dd", {}, text)])),
    h("form", { method: "dialog" }, h("button", {}, "Close")));
  byId("help-button").addEventListener("click", () => byId("help").showModal());
  for (const tab of document.querySelectorAll("[role=tab]")) tab.addEventListener("click", () => showView(tab.dataset.view));
  document.addEventListener("keydown", onKey);
  applyWindow();
  applyZoom();
  buildExplain();
  // A class that the first patient has, with a gradient, is a better start than the first class.
  const patient = patientOf(0);
  const best = (classId) => Math.max(...queriesOf(patient).map((query) => promise(query, classId)));
  CHOICE.classId = classIds().find((classId) => best(classId) >= 1) || classIds().find((classId) => best(classId) > 0) || 1;
  const wanted = location.hash.slice(1);
  showView(wanted in VIEWS ? wanted : "explain");
  return choosePatient(patient);
}

start().then(() => {
  document.body.dataset.ready = "true";
});
