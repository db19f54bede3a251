// Small charts as SVG. Axes are plain; what a colour means is written beside it.

const CHART = { width: 460, height: 230, left: 44, right: 10, top: 12, bottom: 34 };

function scale(low, high, from, to) {
  const span = high - low || 1;
  return (value) => from + ((value - low) / span) * (to - from);
}

function niceTicks(low, high, count = 5) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= raw);
  const ticks = [];
  for (let value = Math.ceil(low / step) * step; value <= high + 1e-9 * step; value += step) ticks.push(value);
  return ticks;
}

function axes({ x, y, xTicks, yTicks, xLabel, yLabel, box = CHART, yText = String }) {
  const { width, height, left, right, top, bottom } = box;
  return svg("g", { class: "axes" },
    yTicks.map((value) => [
      svg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "grid" }),
      svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, yText(Number(value.toPrecision(6)))),
    ]),
    xTicks.map((value) => svg("text", { x: x(value), y: height - bottom + 16, "text-anchor": "middle" }, String(Number(value.toPrecision(6))))),
    svg("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle", class: "label" }, xLabel),
    svg("text", { x: 12, y: (top + height - bottom) / 2, "text-anchor": "middle", class: "label",
      transform: `rotate(-90 12 ${(top + height - bottom) / 2})` }, yLabel));
}

function polyline(points, attributes) {
  const there = points.filter(([, value]) => value !== null && !Number.isNaN(value));
  return svg("polyline", { points: there.map((point) => point.map((v) => v.toFixed(1)).join(",")).join(" "), fill: "none", ...attributes });
}

function chart(box, ...children) {
  return svg("svg", { viewBox: `0 0 ${box.width} ${box.height}`, role: "img" }, ...children);
}

// Under the pointer a line at the nearest place, and its number to `tell`; null when the pointer leaves.
function readable(drawing, box, places, tell) {
  const cursor = svg("line", { class: "cursor", y1: 0, y2: box.height - (box.bottom || 0), visibility: "hidden" });
  drawing.append(cursor);
  drawing.addEventListener("mousemove", (event) => {
    const frame = drawing.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width) * box.width;
    const nearest = places.reduce((best, place, number) => (Math.abs(place - x) < Math.abs(places[best] - x) ? number : best), 0);
    fill(cursor, { x1: places[nearest], x2: places[nearest], visibility: "visible" }, []);
    tell(nearest);
  });
  drawing.addEventListener("mouseleave", () => {
    cursor.setAttribute("visibility", "hidden");
    tell(null);
  });
  return drawing;
}

function legend(entries) {
  return h("p.legend", {}, entries.map(([colour, text, dashed]) =>
    h("span", {}, h(`span.key${dashed ? ".dashed" : ""}`, { style: `border-color:${colour}` }), text)));
}

function panel(title, note, ...content) {
  return h("section.panel", {}, h("h2", {}, title), note ? h("p.note", {}, note) : "", ...content);
}
