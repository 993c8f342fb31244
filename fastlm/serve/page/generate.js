// (c) Text as the model writes it, shaded by surprise; any token can be exchanged for another.

import { call, stream } from "./api.js";
import { drawBars } from "./bars.js";
import { number, onLanguage, percent, t } from "./i18n.js";
import { by, element, labelled, listbox, reporting, visible } from "./show.js";

const SAMPLE = "Once upon a time, in a small village by the river,";
const ALTERNATIVES = 10;
const MOST_NATS = 6; // of surprise, e^-6 = 0.25 %: the darkest shade

let temperature, topP, length;
let prompt = []; // ids
let written = []; // {id, text, logprob, top: [{id, token, logprob}…]}
let controller = null;
let move;
let summary = () => "";

export async function start() {
  by("generate-text").value = SAMPLE;
  temperature = labelled("generate-temperature", (value) => (value === 0 ? t("greedy") : number(value, 2)));
  topP = labelled("generate-top-p", (value) => (value === 1 ? t("off") : number(value, 2)));
  length = labelled("generate-length", (value) => number(value));
  by("generate-start").addEventListener("click", begin);
  by("generate-stop").addEventListener("click", () => controller?.abort());
  by("alternatives-close").addEventListener("click", close);
  by("alternatives").addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
  });
  move = listbox(by("written-tokens"), { choose: (option) => open(Number(option.dataset.place)) });
  onLanguage(() => {
    [temperature, topP, length].forEach((control) => control.show());
    by("generate-summary").textContent = summary();
  });
}

async function begin() {
  const text = by("generate-text").value;
  await reporting(by("generate-error"), async () => {
    const answer = await call("/tokenize", { text, add_special_tokens: true });
    prompt = answer.tokens;
    written = [];
    by("written-prompt").textContent = text;
    by("written-tokens").replaceChildren();
    await write();
  });
}

// Lets the model go on behind what is written.
async function write() {
  controller?.abort();
  const mine = new AbortController();
  controller = mine;
  by("alternatives").hidden = true;
  by("written-empty").hidden = true;
  by("generate-stop").hidden = false;
  const began = performance.now();
  const before = written.length;
  const asked = {
    prompt: [...prompt, ...written.map((piece) => piece.id)],
    max_tokens: length.value(),
    temperature: temperature.value(),
    seed: Math.max(0, Math.floor(Number(by("generate-seed").value) || 0)),
    logprobs: ALTERNATIVES,
    return_token_ids: true,
    stream: true,
  };
  if (topP.value() < 1) asked.top_p = topP.value();
  try {
    await stream("/v1/completions", asked, mine.signal, ({ choices }) => {
      const entries = choices[0].logprobs;
      entries.token_ids.forEach((id, i) =>
        add({
          id,
          text: entries.tokens[i],
          logprob: entries.token_logprobs[i],
          top: entries.top_tokens[i],
        }),
      );
    });
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  } finally {
    if (controller === mine) {
      by("generate-stop").hidden = true;
      const count = written.length - before;
      const speed = count / ((performance.now() - began) / 1000);
      summary = () => t("written-summary", { count: number(count), speed: number(speed, 1) });
      by("generate-summary").textContent = summary();
    }
  }
}

function add(piece, chosen = false) {
  const place = written.length;
  written.push(piece);
  const surprise = Math.min(1, -piece.logprob / MOST_NATS);
  const shown = piece.text.startsWith("bytes:") ? "▯" : piece.text;
  const node = element("span", {
    className: chosen ? "piece chosen" : "piece",
    role: "option",
    id: `w${place}`,
    "aria-selected": "false",
    "aria-label": `${visible(piece.text)} ${percent(Math.exp(piece.logprob))}`,
    title: percent(Math.exp(piece.logprob)),
    textContent: shown,
    "--s": surprise.toFixed(3),
  });
  node.dataset.place = place;
  node.dataset.probability = Math.exp(piece.logprob);
  by("written-tokens").hidden = false;
  by("written-tokens").append(node);
}

function open(place) {
  const piece = written[place];
  const rows = piece.top.map(({ id, token, logprob }) => ({ id, logprob, text: token, probability: Math.exp(logprob) }));
  if (!rows.some((row) => row.id === piece.id)) rows.push({ ...piece, probability: Math.exp(piece.logprob) });
  by("alternatives-title").textContent = t("alternatives", { token: `“${visible(piece.text)}”` });
  by("alternatives").hidden = false;
  drawBars(by("alternatives-list"), rows, "choose", (row) => exchange(place, row));
  by("alternatives-list").querySelector("button").focus();
}

function close() {
  by("alternatives").hidden = true;
  by("written-tokens").focus();
}

function exchange(place, row) {
  const piece = written[place];
  written.length = place;
  while (by("written-tokens").children.length > place) by("written-tokens").lastChild.remove();
  add({ ...row, top: piece.top }, true);
  move(null);
  by("written-tokens").focus();
  reporting(by("generate-error"), write);
}
