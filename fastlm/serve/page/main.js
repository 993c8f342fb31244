// The frame of the page: tabs, language, theme, key; each tab begins when it is first shown.

import * as attention from "./attention.js";
import { call, useKey } from "./api.js";
import * as generate from "./generate.js";
import { currentLanguage, number, onLanguage, setLanguage, t } from "./i18n.js";
import * as next from "./next.js";
import { by } from "./show.js";
import * as tokens from "./tokens.js";
import * as training from "./training.js";

const THEMES = ["auto", "light", "dark"];
const VIEWS = { tokens, next, generate, attention, training };
const begun = new Map();

let theme = THEMES.includes(localStorage.getItem("fastlm-theme")) ? localStorage.getItem("fastlm-theme") : "auto";
let model = null;

function applyTheme() {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  by("theme-name").textContent = t(`theme-${theme}`);
}

function tabs() {
  return [...document.querySelectorAll("[role=tab]")].filter((tab) => !tab.hidden);
}

async function show(name) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const chosen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    by(tab.getAttribute("aria-controls")).hidden = !chosen;
    if (chosen) tab.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  history.replaceState(null, "", `#${name}`);
  if (begun.get(name)) return;
  begun.set(name, true);
  try {
    await VIEWS[name].start();
    by(`${name}-error`).textContent = "";
  } catch (error) {
    begun.set(name, false);
    by(`${name}-error`).textContent = error.message;
  }
}

function drawModel() {
  if (!model) return;
  const size = model.max_model_len;
  by("model").textContent = size ? t("context", { model: model.id, tokens: number(size) }) : model.id;
}

async function begin() {
  try {
    model = (await call("/v1/models")).data[0];
  } catch (error) {
    by("tokens-error").textContent = error.message;
    return;
  }
  by("key-form").hidden = true;
  drawModel();
  by("tab-training").hidden = !model.is_training_run;
  const wanted = location.hash.slice(1);
  await show(tabs().some((tab) => tab.id === `tab-${wanted}`) ? wanted : "tokens");
}

document.querySelector("[role=tablist]").addEventListener("click", (event) => {
  const tab = event.target.closest("[role=tab]");
  if (tab) show(tab.id.slice("tab-".length));
});
document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
  const all = tabs();
  const at = all.indexOf(document.activeElement);
  const target = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (target === undefined) return;
  event.preventDefault();
  const tab = all[(target + all.length) % all.length];
  tab.focus();
  show(tab.id.slice("tab-".length));
});
by("language").addEventListener("click", () => {
  const wanted = currentLanguage() === "en" ? "ko" : "en";
  localStorage.setItem("fastlm-language", wanted);
  setLanguage(wanted);
});
by("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  localStorage.setItem("fastlm-theme", theme);
  applyTheme();
});
document.addEventListener("key-needed", () => {
  by("key-form").hidden = false;
});
by("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(by("key").value);
  begin();
});
onLanguage(() => {
  const other = currentLanguage() === "en" ? "ko" : "en";
  by("language").textContent = other === "ko" ? "한국어" : "English";
  by("language").lang = other;
  applyTheme();
  drawModel();
});

const kept = localStorage.getItem("fastlm-language");
setLanguage(kept === "ko" || kept === "en" ? kept : navigator.language.startsWith("ko") ? "ko" : "en");
begin();
