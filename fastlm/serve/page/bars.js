// Tokens with their probabilities, as buttons with bars.

import { percent, t } from "./i18n.js";
import { element, visible } from "./show.js";

// rows: {text, probability, raw}; raw, the model's own probability, may be missing.
export function drawBars(list, rows, label, choose) {
  while (list.children.length > rows.length) list.lastChild.remove();
  while (list.children.length < rows.length) list.append(bar());
  rows.forEach((row, i) => {
    const button = list.children[i].firstChild;
    const out = row.probability === 0;
    const word = button.querySelector(".word");
    word.textContent = visible(row.text);
    word.classList.toggle("out", out);
    button.querySelector(".fill").style.width = `${100 * row.probability}%`;
    const raw = button.querySelector(".raw");
    raw.hidden = row.raw === undefined;
    raw.style.width = `${100 * (row.raw ?? 0)}%`;
    const number = button.querySelector(".number");
    number.textContent = out ? t("never") : percent(row.probability);
    number.classList.toggle("out", out);
    button.setAttribute("aria-label", t(label, { token: visible(row.text), percent: number.textContent }));
    button.onclick = () => choose(row);
  });
}

function bar() {
  const track = element("span", { className: "track" });
  track.append(element("span", { className: "fill" }), element("span", { className: "raw" }));
  const word = element("span", { className: "word" });
  return element("li", {}, element("button", { type: "button" }, word, track, element("span", { className: "number" })));
}
