// (b) What may come next, under temperature and filters.

import { call } from "./api.js";
import { drawBars } from "./bars.js";
import { number, onLanguage, t } from "./i18n.js";
import { by, debounced, labelled, reporting } from "./show.js";

const SAMPLE = "The capital of France is";
const BARS = 12;

let temperature, topK, topP, update;

export async function start() {
  by("next-text").value = SAMPLE;
  update = debounced(refresh, 60);
  temperature = labelled("next-temperature", (value) => (value === 0 ? t("greedy") : number(value, 2)), update);
  topK = labelled("next-top-k", (value) => (value === 0 ? t("off") : number(value)), update);
  topP = labelled("next-top-p", (value) => (value === 1 ? t("off") : number(value, 2)), update);
  by("next-text").addEventListener("input", update);
  onLanguage(() => {
    [temperature, topK, topP].forEach((control) => control.show());
    update();
  });
  await update.now();
}

async function refresh(signal) {
  const asked = { prompt: by("next-text").value, temperature: temperature.value(), count: BARS };
  if (topK.value() > 0) asked.top_k = topK.value();
  if (topP.value() < 1) asked.top_p = topP.value();
  await reporting(by("next-error"), async () => {
    const answer = await call("/next_token", asked, signal);
    const rows = answer.tokens.map((token) => ({ ...token, raw: Math.exp(token.logprob) }));
    drawBars(by("bars"), rows, "append", (row) => {
      by("next-text").value += row.text;
      update();
    });
    by("next-summary").textContent = t("next-summary", {
      kept: number(answer.kept),
      size: number(answer.vocab_size),
      entropy: number(answer.entropy, 2),
    });
  });
}
