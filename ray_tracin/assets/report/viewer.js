// A pane shows a slice in one modality with its overlays. All panes share overlays, window and zoom.

const VIEW = {
  opacity: 0.45,
  window: 1, // width of the grey values that are told apart, of 1
  level: 0.5, // their middle
  prediction: true,
  truth: true,
  others: true,
  feature: null,
  modality: DATA.modalities.length - 1,
};
const PANES = new Set();
const SCRATCH = new OffscreenCanvas(SIZE, SIZE);
const PAINT = new Uint8ClampedArray(4 * SIZE * SIZE);
const ZOOM = { factor: 1, x: 0, y: 0 };
const ZOOM_STEP = 1.25;

function rgb(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

class Pane {
  // sharp: pixels of the overlay for one of the image, so that lines stay thin.
  constructor({ sharp = 2, caption = "", marks = true, onclick = null } = {}) {
    this.sharp = sharp;
    this.modality = null; // null: the one that is chosen for all
    this.image = h("canvas.image", { width: SIZE, height: SIZE });
    this.maps = h("canvas.maps", { width: SIZE, height: SIZE });
    this.overlay = h("canvas.overlay", { width: SIZE * sharp, height: SIZE * sharp });
    this.caption = h("span.caption", {}, caption);
    const sides = marks ? [h("span.side.right", {}, "R"), h("span.side.left", {}, "L")] : [];
    this.stage = h("div.stage", {}, this.image, this.maps, this.overlay);
    this.element = h("div.pane", {}, this.stage, this.caption, ...sides);
    if (!DATA.images) this.element.append(h("span.absent", {}, "images left out"));
    if (onclick) this.element.addEventListener("click", (event) => onclick(event, this));
  }

  // Out of sight, to be shown again.
  rest() {
    PANES.delete(this);
    this.element.remove();
  }

  // For good. A canvas that is only dropped keeps its pixels until the browser tidies up, which can be a gigabyte later.
  remove() {
    this.rest();
    this.slice = undefined;
    for (const canvas of [this.image, this.maps, this.overlay]) canvas.width = canvas.height = 0;
  }

  show(slice, classId) {
    PANES.add(this);
    const other = slice !== this.slice;
    this.slice = slice;
    this.classId = classId;
    if (other) this.image.getContext("2d").clearRect(0, 0, SIZE, SIZE);
    this.draw();
  }

  get channel() {
    return this.modality === null ? VIEW.modality : this.modality;
  }

  draw() {
    if (!DATA.images || this.slice === undefined) return;
    const { slice, channel } = this;
    loadPicture(slice, "image", channel).then((picture) => {
      if (slice !== this.slice || channel !== this.channel) return; // another one was asked for meanwhile
      this.image.getContext("2d").drawImage(picture, 0, 0);
      this.element.dataset.drawn = `${SLICES.row[slice]} ${DATA.modalities[channel]}`;
    }, reportError);
    this.drawMap();
    this.drawOverlay();
  }

  drawMap() {
    const { slice } = this;
    const place = DATA.features.mapped.indexOf(VIEW.feature);
    if (place < 0 && !this.mapped) return; // a canvas that nothing was drawn on needs no memory
    this.mapped = true;
    const context = this.maps.getContext("2d");
    context.clearRect(0, 0, SIZE, SIZE);
    if (place < 0) return;
    loadPicture(slice, "maps", place).then((picture) => {
      if (slice !== this.slice || DATA.features.mapped[place] !== VIEW.feature) return;
      context.clearRect(0, 0, SIZE, SIZE);
      context.drawImage(picture, 0, 0, SIZE, SIZE);
    }, reportError);
  }

  drawOverlay() {
    const context = this.overlay.getContext("2d");
    context.clearRect(0, 0, this.overlay.width, this.overlay.height);
    if (VIEW.prediction && VIEW.feature === null) this.fillPrediction(context);
    if (VIEW.prediction && VIEW.feature !== null) this.outlineRegion(context);
    if (VIEW.truth && SLICES.labelled[this.slice]) this.outlineTruth(context);
  }

  fillPrediction(context) {
    const labels = labelsOf(this.slice, "prediction");
    const pixels = PAINT.fill(0);
    for (let i = 0; i < labels.length; i++) {
      const classId = labels[i] >> 1;
      if (!classId || (classId !== this.classId && !VIEW.others)) continue;
      const strength = (labels[i] & 1 ? 1 : 0.45) * (classId === this.classId ? 1 : 0.6);
      const [r, g, b] = rgb(classColour(classId));
      pixels.set([r, g, b, Math.round(255 * VIEW.opacity * strength)], 4 * i);
    }
    SCRATCH.getContext("2d").putImageData(new ImageData(pixels, SIZE), 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(SCRATCH, 0, 0, this.overlay.width, this.overlay.height);
  }

  // A filled region would hide the feature map, whose maximum within it is what counts.
  outlineRegion(context) {
    context.lineWidth = this.sharp * 0.5;
    context.strokeStyle = classColour(this.classId);
    context.stroke(borders(labelsOf(this.slice, "prediction"), 2 * this.classId + 1, this.sharp));
  }

  // Magnifies the region and what is annotated as its class, in pictures too small to show them otherwise.
  closeUp() {
    const box = DATA.images && boxOf(this.slice, this.classId);
    if (!box) return;
    const side = Math.min(SIZE, Math.max(SIZE / 3, 1.5 * Math.max(box.right - box.left, box.bottom - box.top)));
    const start = (from, to) => Math.min(SIZE - side, Math.max(0, (from + to - side) / 2));
    const share = (from, to) => `${(-100 * start(from, to)) / side}%`;
    this.stage.style.transform = `translate(${share(box.left, box.right)}, ${share(box.top, box.bottom)}) scale(${SIZE / side})`;
  }

  outlineTruth(context) {
    const labels = labelsOf(this.slice, "truth");
    for (const classId of classIds()) {
      if (classId !== this.classId && !VIEW.others) continue;
      const outline = borders(labels, classId, this.sharp);
      const mine = classId === this.classId;
      if (mine) {
        context.lineWidth = this.sharp * 0.9; // white alone is lost on bright tumours
        context.strokeStyle = "rgba(0, 0, 0, 0.85)";
        context.stroke(outline);
      }
      context.lineWidth = this.sharp * (mine ? 0.5 : 0.4);
      context.strokeStyle = mine ? "#ffffff" : classColour(classId);
      context.stroke(outline);
    }
  }

  // The class of the prediction under a click, 0 for none.
  classAt(event) {
    if (!DATA.images) return 0;
    const box = this.overlay.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * SIZE);
    const row = Math.floor(((event.clientY - box.top) / box.height) * SIZE);
    if (column < 0 || row < 0 || column >= SIZE || row >= SIZE) return 0;
    return labelsOf(this.slice, "prediction")[row * SIZE + column] >> 1;
  }
}

// The smallest box around a region and what is annotated as its class; null where nothing is.
function boxOf(slice, classId) {
  const predicted = labelsOf(slice, "prediction");
  const truth = SLICES.labelled[slice] ? labelsOf(slice, "truth") : [];
  const box = { left: SIZE, top: SIZE, right: 0, bottom: 0 };
  for (let i = 0; i < predicted.length; i++) {
    if (predicted[i] !== 2 * classId + 1 && truth[i] !== classId) continue;
    const column = i % SIZE;
    const row = Math.floor(i / SIZE);
    box.left = Math.min(box.left, column);
    box.right = Math.max(box.right, column + 1);
    box.top = Math.min(box.top, row);
    box.bottom = Math.max(box.bottom, row + 1);
  }
  return box.right ? box : null;
}

// The edges between pixels of a class and others, as one path.
function borders(labels, classId, sharp) {
  const path = new Path2D();
  const is = (row, column) =>
    row >= 0 && column >= 0 && row < SIZE && column < SIZE && labels[row * SIZE + column] === classId;
  for (let row = 0; row <= SIZE; row++) {
    for (let column = 0; column <= SIZE; column++) {
      const here = is(row, column);
      if (here !== is(row - 1, column)) line(path, column, row, column + 1, row, sharp);
      if (here !== is(row, column - 1)) line(path, column, row, column, row + 1, sharp);
    }
  }
  return path;
}

function line(path, fromX, fromY, toX, toY, scale) {
  path.moveTo(fromX * scale, fromY * scale);
  path.lineTo(toX * scale, toY * scale);
}

function redrawPanes() {
  for (const pane of PANES) pane.draw();
}

function reportError(error) {
  byId("facts").replaceChildren(message(error.message));
}

// Window: grey values from level − window/2 to level + window/2 become black to white, in every picture at once.
function applyWindow() {
  const slope = 1 / VIEW.window;
  const intercept = 0.5 - VIEW.level * slope;
  for (const channel of document.querySelectorAll("#window feComponentTransfer > *")) {
    channel.setAttribute("slope", slope);
    channel.setAttribute("intercept", intercept);
  }
}

// Zoom and pan, as shares of a pane, the same in all panes of a view.
function applyZoom() {
  const limit = ZOOM.factor - 1;
  ZOOM.x = Math.min(0, Math.max(-limit, ZOOM.x));
  ZOOM.y = Math.min(0, Math.max(-limit, ZOOM.y));
  const style = document.documentElement.style;
  style.setProperty("--zoom", ZOOM.factor);
  style.setProperty("--pan-x", `${100 * ZOOM.x}%`);
  style.setProperty("--pan-y", `${100 * ZOOM.y}%`);
}

function resetView() {
  Object.assign(ZOOM, { factor: 1, x: 0, y: 0 });
  Object.assign(VIEW, { window: 1, level: 0.5, opacity: 0.45 });
  applyZoom();
  applyWindow();
  byId("tools").dispatchEvent(new Event("refresh"));
  redrawPanes();
}

// The wheel zooms about the pointer, a drag moves, a drag with Shift or the right button changes window and level.
function makeNavigable(element) {
  element.addEventListener("wheel", (event) => zoomAt(event), { passive: false });
  element.addEventListener("contextmenu", (event) => event.preventDefault());
  element.addEventListener("pointerdown", (event) => {
    if (event.target.closest(".pane")) startDrag(event);
  });
}

function zoomAt(event) {
  const pane = event.target.closest(".pane");
  if (!pane) return;
  event.preventDefault();
  const box = pane.getBoundingClientRect();
  zoomBy(1.0015 ** -event.deltaY, [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]);
}

function zoomBy(times, at = [0.5, 0.5]) {
  const before = ZOOM.factor;
  ZOOM.factor = Math.min(8, Math.max(1, before * times));
  const ratio = ZOOM.factor / before;
  ZOOM.x = at[0] - (at[0] - ZOOM.x) * ratio;
  ZOOM.y = at[1] - (at[1] - ZOOM.y) * ratio;
  applyZoom();
}

function startDrag(start) {
  const box = start.target.closest(".pane").getBoundingClientRect();
  const windowing = start.shiftKey || start.button === 2;
  const from = { ...ZOOM, window: VIEW.window, level: VIEW.level };
  const move = (event) => {
    const x = (event.clientX - start.clientX) / box.width;
    const y = (event.clientY - start.clientY) / box.height;
    if (Math.hypot(x, y) > 0.02) startDrag.moved = true;
    if (windowing) {
      VIEW.window = Math.min(2, Math.max(0.05, from.window + x));
      VIEW.level = Math.min(1, Math.max(0, from.level + y));
      applyWindow();
      byId("tools").dispatchEvent(new Event("refresh"));
    } else {
      Object.assign(ZOOM, { x: from.x + x, y: from.y + y });
      applyZoom();
    }
  };
  const stop = () => {
    window.removeEventListener("pointermove", move);
    window.removeEventListener("pointerup", stop);
  };
  startDrag.moved = false;
  window.addEventListener("pointermove", move);
  window.addEventListener("pointerup", stop);
}

// A click is what was no drag.
const wasDragged = () => startDrag.moved === true;

// The controls of all panes.
function buildTools() {
  const check = (id, text, key) =>
    h("label.check", { title: `${text} (${id[0]})` },
      h("input", { type: "checkbox", id: `overlay-${id}`, checked: VIEW[key], onchange: (event) => {
        VIEW[key] = event.target.checked;
        redrawPanes();
      } }), text);
  const slider = (key, text, low, high, apply) =>
    h("label.slider", {}, text, h("input", {
      type: "range", id: `view-${key}`, min: low, max: high, step: 0.01, value: VIEW[key],
      oninput: (event) => {
        VIEW[key] = Number(event.target.value);
        apply();
      },
    }));
  const tools = byId("tools");
  tools.replaceChildren(
    check("prediction", "Prediction", "prediction"), check("truth", "Ground truth", "truth"),
    check("others", "Other classes", "others"),
    slider("opacity", "Opacity", 0, 1, redrawPanes), slider("window", "Window", 0.05, 2, applyWindow),
    slider("level", "Level", 0, 1, applyWindow),
    h("label", { title: "A feature map over the image, from dark (weak) to bright (strong)" }, "Map ", h("select", { id: "feature-map", onchange: (event) => chooseFeature(event.target.value) },
      option("", "none"), DATA.features.mapped.map((feature) => option(feature, `feature ${feature}`)))),
    h("span.stepper", {}, h("button", { id: "zoom-out", title: "Zoom out (−)", "aria-label": "Zoom out", onclick: () => zoomBy(1 / ZOOM_STEP) }, "−"),
      h("button", { id: "zoom-in", title: "Zoom in (+)", "aria-label": "Zoom in", onclick: () => zoomBy(ZOOM_STEP) }, "+")),
    h("button", { id: "reset-view", title: "Zoom, window and opacity as at first (0)", onclick: resetView }, "Reset"),
  );
  tools.addEventListener("refresh", () => {
    for (const key of ["opacity", "window", "level"]) byId(`view-${key}`).value = VIEW[key];
    for (const key of ["prediction", "truth", "others"]) byId(`overlay-${key}`).checked = VIEW[key];
    byId("feature-map").value = VIEW.feature === null ? "" : VIEW.feature;
  });
  tools.hidden = !DATA.images;
}

function chooseFeature(feature) {
  VIEW.feature = feature === "" || feature === null ? null : Number(feature);
  byId("tools").dispatchEvent(new Event("refresh"));
  redrawPanes();
}
