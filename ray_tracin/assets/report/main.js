// Views, keys, and the start.

const VIEWS = { explain: null, curate: buildCurate, model: buildModel, run: buildRun };
const KEYS = [
  ["↑ ↓", "slice above, below"], ["← →", "previous, next train region"], ["Page ↑ ↓", "previous, next patient"],
  ["1 – 9", "class"], ["m", "next modality"], ["p t o", "prediction, ground truth, other classes"], ["0", "reset zoom and window"],
  ["Esc", "close the comparison"], ["wheel, drag", "zoom, move"], ["right drag", "window and level"],
];

function showView(name) {
  for (const view of Object.keys(VIEWS)) {
    byId(view).hidden = view !== name;
    byId(`tab-${view}`).setAttribute("aria-selected", String(view === name));
  }
  const build = VIEWS[name];
  VIEWS[name] = null; // built when it is first looked at
  if (build) build();
  if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
}

function toggleOverlay(key) {
  VIEW[key] = !VIEW[key];
  byId("tools").dispatchEvent(new Event("refresh"));
  redrawPanes();
}

const ACTIONS = {
  ArrowUp: () => stepSlice(1),
  ArrowDown: () => stepSlice(-1),
  ArrowLeft: () => stepCard(-1),
  ArrowRight: () => stepCard(1),
  PageUp: () => stepPatient(-1),
  PageDown: () => stepPatient(1),
  Escape: () => CHOICE.card !== null && chooseCard(CHOICE.card),
  m: () => chooseModality((VIEW.modality + 1) % DATA.modalities.length),
  p: () => toggleOverlay("prediction"),
  t: () => toggleOverlay("truth"),
  o: () => toggleOverlay("others"),
  0: resetView,
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input:not([type=checkbox]), select, dialog")) return;
  if (event.key === "?") {
    byId("help").showModal();
    return;
  }
  if (byId("explain").hidden) return;
  const classId = Number(event.key);
  if (classId >= 1 && classId <= CLASSES) chooseClass(classId);
  else if (ACTIONS[event.key]) ACTIONS[event.key]();
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
  // A class that the first patient has is a better start than the first class.
  const patient = patientOf(0);
  const first = classIds().find((classId) => queriesOf(patient).some((query) => regionExists(DATA.queries[query].slice, classId)));
  CHOICE.classId = first || 1;
  const wanted = location.hash.slice(1);
  showView(wanted in VIEWS ? wanted : "explain");
  return choosePatient(patient);
}

start().then(() => {
  document.body.dataset.ready = "true";
});
