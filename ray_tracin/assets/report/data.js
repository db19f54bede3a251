// What the page knows: the report's JSON, arrays in base64, pictures and rows of the tensor on demand.

// The JSON of a script element, which then goes: its text would stay in memory as long as the page.
function embedded(id) {
  const element = document.getElementById(id);
  element.remove();
  return JSON.parse(element.textContent);
}

const DATA = embedded("data");
const CLASSES = DATA.classes.length;
const TRAIN = DATA.train.slices.length;
const SIZE = DATA.size;

const ARRAYS = { float32: Float32Array, float64: Float64Array, int32: Int32Array, uint8: Uint8Array };

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

function unpack(packed) {
  return packed && new ARRAYS[packed.dtype](bytesOf(packed.data).buffer);
}

// Slices are numbered by their place in DATA.slices; regions are (slice, class) with classes from 1.
const SLICES = {
  ...DATA.slices,
  truth: unpack(DATA.slices.truth),
  predicted: unpack(DATA.slices.predicted),
  agreed: unpack(DATA.slices.agreed),
};
const REGIONS = {
  pixels: unpack(DATA.regions.pixels),
  overlap: unpack(DATA.regions.overlap),
  dice: unpack(DATA.regions.dice),
};
const TRAIN_NORM = unpack(DATA.train.norm);
const GLOBAL = unpack(DATA.train.global);
const LIST_SHARE = unpack(DATA.train.share);
const MAXIMA = unpack(DATA.features.maxima);
const FEATURES = DATA.features.maxima.shape[2];

const className = (classId) => DATA.classes[classId - 1].name;
const classColour = (classId) => DATA.classes[classId - 1].colour;
const classIds = () => DATA.classes.map((_, position) => position + 1);
const regionPlace = (slice, classId) => slice * CLASSES + classId - 1;
const isPredicted = (slice, classId) => REGIONS.pixels[regionPlace(slice, classId)] > 0;
// The norm of a query's gradients; NaN where it is not in the tensor.
const normOf = (query, classId) => unpack(DATA.queries[query].norm)[classId - 1];
// Whole slices, and regions that checkpoints have of their own, have influence without a pixel of the final network's.
const regionExists = (query, classId) => isPredicted(DATA.queries[query].slice, classId) || !Number.isNaN(normOf(query, classId));

// Dice of the whole prediction of a class on a slice; NaN where the class is nowhere, or nothing is known of it.
function sliceDice(slice, classId) {
  const place = regionPlace(slice, classId);
  if (!SLICES.labelled[slice]) return NaN;
  return (2 * SLICES.agreed[place]) / (SLICES.predicted[place] + SLICES.truth[place]);
}

// Of the score of a whole slice the overlap of its region says nothing.
function isLowOverlap(slice, classId) {
  return !DATA.wholeSlices && SLICES.labelled[slice] && REGIONS.overlap[regionPlace(slice, classId)] < DATA.lowOverlap;
}

const EXAMINATIONS = new Map();
for (const [slice, patient] of SLICES.patient.entries()) {
  EXAMINATIONS.set(patient, (EXAMINATIONS.get(patient) || new Set()).add(SLICES.case[slice]));
}
// Which examination a slice is of, in front of its number; only where its patient has several.
const examination = (slice) => (EXAMINATIONS.get(SLICES.patient[slice]).size > 1 ? `${SLICES.case[slice]}, ` : "");

// Train columns of the tensor: class by class, each with all train slices.
const columnSlice = (column) => DATA.train.slices[column % TRAIN];
const columnClass = (column) => Math.floor(column / TRAIN) + 1;
const isGlobal = (classId, column) => GLOBAL[(classId - 1) * CLASSES * TRAIN + column] === 1;
const listShare = (classId, column) => LIST_SHARE[(classId - 1) * CLASSES * TRAIN + column];

// Influence on a query: in the page, or in a script of its own that calls receiveInfluence.
const influenceRows = new Map();
const waitingForInfluence = new Map();
const KEPT_ROWS = 24;

function receiveInfluence(row, packed) {
  const values = unpack(packed);
  influenceRows.set(row, values);
  if (influenceRows.size > KEPT_ROWS && !DATA.inline) influenceRows.delete(influenceRows.keys().next().value);
  const wait = waitingForInfluence.get(row);
  waitingForInfluence.delete(row);
  if (wait) wait.resolve(values);
}

if (DATA.inline) {
  for (const [row, packed] of Object.entries(embedded("influence"))) receiveInfluence(Number(row), packed);
}

function loadInfluence(slice) {
  const row = SLICES.row[slice];
  if (influenceRows.has(row)) return Promise.resolve(influenceRows.get(row));
  if (waitingForInfluence.has(row)) return waitingForInfluence.get(row).promise;
  const wait = {};
  wait.promise = new Promise((resolve, reject) => Object.assign(wait, { resolve, reject }));
  waitingForInfluence.set(row, wait);
  const script = document.createElement("script");
  script.src = `assets/influence_${String(row).padStart(6, "0")}.js`;
  script.onload = () => script.remove();
  script.onerror = () => {
    waitingForInfluence.delete(row);
    wait.reject(new Error(`${script.getAttribute("src")} is missing: the folder assets belongs beside this page`));
  };
  document.head.append(script);
  return wait.promise;
}

// Pictures: of each only the modality or the map that is shown, as bitmaps, which can be closed. Browsers keep what they
// decode for an image element, and for those of a few dozen patients that is more than everything else.
const inlinePictures = embedded("pictures");
const keptPictures = new Map();
const KEPT_PICTURES = 80;

// kind: "image", place: a modality; or "maps" and a map.
function loadPicture(slice, kind, place) {
  const row = SLICES.row[slice];
  const key = `${kind} ${row} ${place}`;
  const kept = keptPictures.get(key);
  keptPictures.delete(key); // and back at the end: the one that waited longest goes first
  const loading = kept || decodedSquare(pictureAddress(row, kind), place, kind === "image" ? SIZE : DATA.features.mapSize);
  keptPictures.set(key, loading);
  if (keptPictures.size > KEPT_PICTURES) dropPicture(keptPictures.keys().next().value);
  return loading;
}

function dropPicture(key) {
  keptPictures.get(key).then((bitmap) => bitmap.close(), () => {}); // after all who asked for it have drawn it
  keptPictures.delete(key);
}

function pictureAddress(row, kind) {
  if (DATA.inline) return `data:image/webp;base64,${inlinePictures[row][kind]}`;
  const name = kind === "image" ? "slice" : "maps";
  return `assets/${name}_${String(row).padStart(6, "0")}.webp`;
}

async function decodedSquare(address, place, side) {
  const image = new Image();
  await new Promise((resolve, reject) => {
    image.onload = resolve;
    image.onerror = () => reject(new Error("a picture is missing: the folder assets belongs beside this page"));
    image.src = address;
  });
  const bitmap = await createImageBitmap(image, place * side, 0, side, side);
  image.removeAttribute("src");
  return bitmap;
}

// Label maps: runs of (value, length) in LEB128. What is returned is to be read at once: later calls overwrite it.
const keptLabels = new Map();
const KEPT_LABELS = 128;

function labelsOf(slice, kind) {
  const key = `${kind} ${slice}`;
  let labels = keptLabels.get(key);
  if (!labels) {
    const [oldest] = keptLabels.keys();
    labels = keptLabels.size < KEPT_LABELS ? new Uint16Array(SIZE * SIZE) : keptLabels.get(oldest);
    if (keptLabels.size >= KEPT_LABELS) keptLabels.delete(oldest);
    decodeRuns(bytesOf(SLICES.outlines[kind][slice]), labels);
  }
  keptLabels.delete(key); // and back at the end: what the next call overwrites is not the one that was asked for last
  keptLabels.set(key, labels);
  return labels;
}

function decodeRuns(bytes, labels) {
  let at = 0;
  let place = 0;
  const number = () => {
    let value = 0;
    for (let shift = 0; ; shift += 7) {
      const byte = bytes[at++];
      value |= (byte & 0x7f) << shift;
      if (byte < 0x80) return value;
    }
  };
  while (at < bytes.length) {
    const value = number();
    const length = number();
    labels.fill(value, place, place + length);
    place += length;
  }
  return labels;
}

// Eq. 7: how far two maxima of a feature agree; NaN where both are 0 or a region is absent.
function similarity(slice, classId, otherSlice, otherClass, feature) {
  const a = MAXIMA[regionPlace(slice, classId) * FEATURES + feature];
  const b = MAXIMA[regionPlace(otherSlice, otherClass) * FEATURES + feature];
  const largest = Math.max(Math.abs(a), Math.abs(b));
  return (a / largest) * (b / largest);
}

// Features as a reader wants them for a class: predictive ones first.
function orderedFeatures(classId) {
  const predictive = new Set(DATA.features.predictive[classId - 1]);
  const others = Array.from({ length: FEATURES }, (_, feature) => feature).filter((f) => !predictive.has(f));
  return [...predictive, ...others];
}
