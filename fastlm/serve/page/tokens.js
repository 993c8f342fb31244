// (a) One text as the tokens of several vocabularies.

import { call } from "./api.js";
import { number, onLanguage, t } from "./i18n.js";
import { by, bytesOf, debounced, element, listbox, reporting, textOf, visible } from "./show.js";

const SAMPLE = "The library by the river is old. 강가의 오래된 도서관을 좋아한다.";
const MOST_DRAWN = 500;
const GOLDEN_ANGLE = 137.508; // degrees: neighbouring ids get hues far apart

let cards = [];

export async function start() {
  by("tokens-text").value = SAMPLE;
  const { vocabularies } = await call("/vocabularies");
  cards = vocabularies.map((name, index) => card(name, index));
  by("vocabularies").replaceChildren(...cards.map(({ node }) => node));
  const update = debounced(refresh, 150);
  by("tokens-text").addEventListener("input", update);
  onLanguage(() => cards.forEach((each) => each.draw()));
  await update.now();
}

async function refresh(signal) {
  const text = by("tokens-text").value;
  await reporting(by("tokens-error"), () => Promise.all(cards.map((each) => each.load(text, signal))));
}

function card(name, index) {
  const count = element("span", { className: "count" });
  const rate = element("span", { className: "rate" });
  const strip = element("div", { className: "strip", role: "listbox", tabIndex: 0 });
  const detail = element("p", { className: "detail", "aria-live": "polite" });
  const head = element("header", {}, element("h2", { textContent: name }), count, rate);
  const node = element("article", { className: "vocabulary" }, head, strip, detail);
  let answer = null;

  listbox(strip, {
    active: (option) => {
      const bytes = option.dataset.bytes.match(/../g) ?? [];
      detail.replaceChildren(
        element("code", { textContent: option.dataset.shown }),
        ` ${t("tokens-detail", { id: option.dataset.id })} `,
        element("code", { textContent: bytes.join(" ").toUpperCase() }),
      );
    },
  });

  function draw() {
    if (!answer) return;
    const size = answer.pieces.reduce((sum, hex) => sum + hex.length / 2, 0);
    count.textContent = answer.count === 1 ? t("tokens-count-1") : t("tokens-count", { count: number(answer.count) });
    const bytes = answer.count ? number(size / answer.count, 2) : "0";
    rate.textContent = t("tokens-rate", { rate: bytes, size: number(answer.vocab_size) });
    detail.textContent = index === 0 ? t("tokens-hint") : "";
    strip.setAttribute("aria-label", t("tokens-strip", { name }));
    strip.hidden = answer.count === 0;
    const drawn = answer.tokens.slice(0, MOST_DRAWN).map((id, i) => token(id, answer.pieces[i], `t${index}-${i}`));
    strip.replaceChildren(...drawn);
    node.querySelector(".more")?.remove();
    if (answer.count > MOST_DRAWN) {
      const more = t("tokens-more", { count: number(answer.count - MOST_DRAWN) });
      strip.after(element("p", { className: "more", textContent: more }));
    }
  }

  async function load(text, signal) {
    answer = await call("/tokenize", { text, vocabulary: name, pieces: true }, signal);
    draw();
  }

  return { node, load, draw };
}

function token(id, hex, place) {
  const text = textOf(bytesOf(hex));
  const shown = text === null ? hex.toUpperCase() : visible(text);
  const word = element("span", { className: text === null ? "raw" : "word", textContent: shown });
  const properties = {
    className: "token",
    role: "option",
    id: place,
    "aria-selected": "false",
    "--h": (id * GOLDEN_ANGLE) % 360,
  };
  const node = element("span", properties, word, element("small", { textContent: id }));
  Object.assign(node.dataset, { id, bytes: hex, shown });
  return node;
}
