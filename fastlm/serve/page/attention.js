// (d) Where a head looks.

import { call } from "./api.js";
import { number, onLanguage, percent, t } from "./i18n.js";
import { by, debounced, element, labelled, reporting, visible } from "./show.js";

const SAMPLE = "The cat sat on the mat because it was tired.";
const FAINT = 0.05; // a cell that may be looked at is never quite empty

let layer, head, update;
let answer = null;

export async function start() {
  by("attention-text").value = SAMPLE;
  update = debounced(refresh, 120);
  layer = labelled("attention-layer", (value) => t("of", { index: value + 1, count: answer?.layers ?? 1 }), update);
  head = labelled("attention-head", (value) => t("of", { index: value + 1, count: answer?.heads ?? 1 }), update);
  by("attention-text").addEventListener("input", update);
  by("map").addEventListener("pointerover", (event) => point(event.target.closest("td")));
  by("map").parentElement.addEventListener("keydown", walk);
  onLanguage(() => {
    layer.show();
    head.show();
    by("attention-summary").textContent = answer ? t("attention-hint") : "";
  });
  await update.now();
}

async function refresh(signal) {
  const asked = { text: by("attention-text").value, layer: layer.value(), head: head.value() };
  await reporting(by("attention-error"), async () => {
    answer = await call("/attention", asked, signal);
    layer.input.max = answer.layers - 1;
    head.input.max = answer.heads - 1;
    layer.show();
    head.show();
    draw();
  });
}

function draw() {
  const names = answer.tokens.map(visible);
  const corner = element("td", { className: "never" });
  const top = names.map((name) => element("th", { scope: "col" }, element("span", { textContent: name })));
  const rows = answer.weights.map((weights, query) => {
    const cells = weights.map((weight, key) => {
      if (key > query) return element("td", { className: "never" });
      const shown = (FAINT + (1 - FAINT) * weight).toFixed(3);
      const cell = element("td", { "--w": shown });
      Object.assign(cell.dataset, { query, key, weight });
      return cell;
    });
    return element("tr", {}, element("th", { scope: "row", textContent: names[query] }), ...cells);
  });
  by("map").replaceChildren(
    element("thead", {}, element("tr", {}, corner, ...top)),
    element("tbody", {}, ...rows),
  );
  by("attention-summary").textContent = t("attention-hint");
}

function point(cell) {
  if (!cell?.dataset.key) return;
  by("map").querySelector(".active")?.classList.remove("active");
  cell.classList.add("active");
  const { query, key, weight } = cell.dataset;
  by("attention-summary").textContent = t("attention-cell", {
    query: `“${visible(answer.tokens[query])}”`,
    key: `“${visible(answer.tokens[key])}”`,
    percent: percent(Number(weight)),
  });
}

function walk(event) {
  const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
  if (!step || !answer) return;
  event.preventDefault();
  const active = by("map").querySelector(".active");
  const query = active ? Number(active.dataset.query) + step[0] : 0;
  const key = active ? Number(active.dataset.key) + step[1] : 0;
  const cell = by("map").querySelector(`td[data-query="${query}"][data-key="${key}"]`);
  point(cell);
  cell?.scrollIntoView({ block: "nearest", inline: "nearest" });
}
