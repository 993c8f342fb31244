// (e) The loss curve of a training run.

import { call } from "./api.js";
import { number, onLanguage, t } from "./i18n.js";
import { by, element } from "./show.js";

const WIDTH = 720;
const HEIGHT = 360;
const LEFT = 52;
const RIGHT = 12;
const TOP = 34;
const BOTTOM = 44;

let run = null;

export async function start() {
  run = await call("/run");
  onLanguage(draw);
  draw();
}

function svg(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function ticks(low, high, most) {
  const raw = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(value);
  return found;
}

function smoothed(points) {
  const width = Math.max(1, Math.floor(points.length / 40));
  return points.map(([step], i) => {
    const part = points.slice(Math.max(0, i - width + 1), i + 1);
    return [step, part.reduce((sum, [, loss]) => sum + loss, 0) / part.length];
  });
}

function draw() {
  const { train, valid } = run;
  const all = [...train, ...valid];
  drawFacts();
  if (all.length === 0) return;
  const losses = all.map(([, loss]) => loss);
  const lastStep = Math.max(1, ...all.map(([step]) => step));
  const low = Math.min(...losses);
  const high = Math.max(...losses);
  const pad = (high - low || 1) * 0.06;
  const x = (step) => LEFT + (step / lastStep) * (WIDTH - LEFT - RIGHT);
  const y = (loss) => TOP + ((high + pad - loss) / (high - low + 2 * pad)) * (HEIGHT - TOP - BOTTOM);
  const path = (points) => points.map(([step, loss], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(loss).toFixed(1)}`).join("");
  const parts = [];
  for (const loss of ticks(low - pad, high + pad, 6)) {
    parts.push(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(loss), y2: y(loss) }));
    parts.push(svg("text", { x: LEFT - 8, y: y(loss) + 4, "text-anchor": "end" }, number(loss, high - low < 2 ? 2 : 1)));
  }
  for (const step of ticks(0, lastStep, 7)) {
    parts.push(svg("text", { x: x(step), y: HEIGHT - BOTTOM + 20, "text-anchor": "middle" }, number(step)));
  }
  parts.push(svg("text", { x: WIDTH - RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, t("step")));
  parts.push(svg("text", { x: 4, y: 14 }, t("loss")));
  parts.push(svg("path", { class: "train", d: path(train) }));
  parts.push(svg("path", { class: "smooth", d: path(smoothed(train)) }));
  parts.push(svg("path", { class: "valid", d: path(valid) }));
  for (const [step, loss] of valid) parts.push(svg("circle", { class: "valid-dot", cx: x(step), cy: y(loss), r: 3 }));
  const cursor = svg("line", { class: "cursor", x1: 0, x2: 0, y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  parts.push(cursor);
  by("curve").replaceChildren(...parts);
  by("curve").onpointermove = (event) => {
    const box = by("curve").getBoundingClientRect();
    const step = (((event.clientX - box.left) * WIDTH) / box.width - LEFT) / ((WIDTH - LEFT - RIGHT) / lastStep);
    const near = (points) => points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
    if (train.length === 0) return;
    const [at, loss] = near(train);
    cursor.setAttribute("visibility", "visible");
    cursor.setAttribute("x1", x(at));
    cursor.setAttribute("x2", x(at));
    const values = { step: number(at), train: number(loss, 3) };
    if (valid.length) values.valid = number(near(valid)[1], 3);
    by("curve-readout").textContent = t(valid.length ? "readout-valid" : "readout", values);
  };
  const legend = [element("span", { textContent: t("train") })];
  if (valid.length) legend.push(element("span", { className: "of-valid", textContent: t("valid") }));
  by("curve-legend").replaceChildren(...legend);
}

function drawFacts() {
  const last = (points) => points[points.length - 1];
  const facts = [[t("run"), run.name]];
  if (run.train.length) {
    facts.push([t("steps"), number(last(run.train)[0])], [t("last-train"), number(last(smoothed(run.train))[1], 3)]);
  }
  if (run.valid.length) {
    const loss = last(run.valid)[1];
    facts.push([t("last-valid"), number(loss, 3)], [t("perplexity"), number(Math.exp(loss), 1)]);
  }
  const pairs = facts.map(([name, value]) =>
    element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value })),
  );
  by("training-facts").replaceChildren(...pairs);
}
