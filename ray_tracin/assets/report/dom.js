// Elements, numbers as text, downloads. Text from data only ever becomes a text node or an attribute.

function h(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  return fill(element, attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "dataset") Object.assign(element.dataset, value);
    else if (key === "style") element.style.cssText = value;
    else if (typeof value === "boolean") element.toggleAttribute(key, value);
    else if (value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const byId = (id) => document.getElementById(id);
const option = (value, text) => h("option", { value }, text);

function swatch(classId) {
  return h("span.swatch", { style: `background:${classColour(classId)}` });
}

function withClass(classId, text = className(classId)) {
  return h("span.class-name", {}, swatch(classId), text);
}

// Numbers

function shown(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  const text = size && size < 1e-3 ? Number(value).toExponential(digits - 1) : Number(value).toPrecision(digits);
  return text.replaceAll("-", "−");
}

function fixed(value, digits = 2) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  return Number(value).toFixed(digits).replace(/^-(?=[0.]*$)/, "").replace("-", "−");
}

const percent = (value) => (Number.isNaN(value) ? "–" : `${Math.round(100 * value)} %`);

function bytesText(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = bytes > 0 ? Math.min(Math.floor(Math.log10(bytes) / 3), units.length - 1) : 0;
  return `${(bytes / 1000 ** power).toFixed(power ? 1 : 0)} ${units[power]}`;
}

function secondsText(seconds) {
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  if (seconds < 3600) return `${(seconds / 60).toFixed(1)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

// What tells patients apart: their names without the words that all of them begin and end with.
const NAME_PARTS = (() => {
  const names = [...new Set(DATA.slices.patient)];
  if (names.length < 2) return [0, 0];
  const words = names.map((name) => name.split(/(?<=[_\-. ])/));
  const common = (same) => {
    let count = 0;
    while (words.every((one) => count < one.length - 1 && same(one, count) === same(words[0], count))) count++;
    return count;
  };
  const head = common((one, count) => one[count]);
  const tail = common((one, count) => one.at(-1 - count));
  const length = (parts) => parts.join("").length;
  return [length(words[0].slice(0, head)), tail ? length(words[0].slice(-tail)) : 0];
})();

function shortName(name) {
  const cut = name.slice(NAME_PARTS[0], name.length - NAME_PARTS[1]).replace(/[_\-. ]+$/, "");
  if (!cut) return name;
  return cut.length <= 14 ? cut : `…${cut.slice(-13)}`;
}

// Files

function csvText(header, rows) {
  const field = (value) => {
    const text = value === null || value === undefined || Number.isNaN(value) ? "" : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [header, ...rows].map((row) => row.map(field).join(",")).join("\r\n") + "\r\n";
}

function saveText(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
  const link = h("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

// The first column is text, the others are numbers unless there are only two.
function table(headings, rows) {
  const number = (place) => (place && headings.length > 2 ? ".number" : "");
  const head = h("thead", {}, h("tr", {}, headings.map((text, place) => h(`th${number(place)}`, { scope: "col" }, text))));
  const body = rows.map((row) => h("tr", {}, row.map((cell, place) => h(`td${number(place)}`, {}, String(cell)))));
  return h("table", {}, head, h("tbody", {}, body));
}

function message(text) {
  return h("p.message", {}, text);
}
