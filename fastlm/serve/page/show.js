// Small helpers to draw with.

export const by = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("--")) node.style.setProperty(name, value);
    else if (name in node && name !== "role") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// Spaces and line ends are drawn, or they could not be seen.
export function visible(text) {
  return text.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍");
}

export function bytesOf(hex) {
  return Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));
}

// A token's text, or null when its bytes are only a part of a character.
export function textOf(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return null;
  }
}

// A function that runs `action` when `delay` ms have passed without another call, and `now` that does so at once. A new
// run aborts the one before it, so that no late answer is drawn over a newer one.
export function debounced(action, delay) {
  let timer;
  let controller;
  const now = async () => {
    clearTimeout(timer);
    controller?.abort();
    controller = new AbortController();
    try {
      await action(controller.signal);
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    }
  };
  const later = () => {
    clearTimeout(timer);
    timer = setTimeout(now, delay);
  };
  return Object.assign(later, { now });
}

// Runs `action`, and writes into `place` what goes wrong.
export async function reporting(place, action) {
  try {
    await action();
    place.textContent = "";
  } catch (error) {
    if (error.name === "AbortError") throw error;
    place.textContent = error.message;
  }
}

// Arrow keys move through the options of a listbox; Enter, Space and a click choose one.
export function listbox(container, { active, choose }) {
  const options = () => [...container.querySelectorAll("[role=option]")];
  function move(option) {
    for (const old of container.querySelectorAll(".active")) {
      old.classList.remove("active");
      old.setAttribute("aria-selected", "false");
    }
    if (!option) return;
    option.classList.add("active");
    option.setAttribute("aria-selected", "true");
    container.setAttribute("aria-activedescendant", option.id);
    option.scrollIntoView({ block: "nearest", inline: "nearest" });
    active?.(option);
  }
  container.addEventListener("keydown", (event) => {
    const all = options();
    const at = all.findIndex((option) => option.classList.contains("active"));
    const target = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 };
    if (event.key in target) {
      move(all[Math.max(0, Math.min(all.length - 1, target[event.key]))]);
    } else if ((event.key === "Enter" || event.key === " ") && at >= 0) {
      choose?.(all[at]);
    } else {
      return;
    }
    event.preventDefault();
  });
  container.addEventListener("click", (event) => {
    const option = event.target.closest("[role=option]");
    if (option) {
      move(option);
      choose?.(option);
    }
  });
  container.addEventListener("pointerover", (event) => {
    const option = event.target.closest("[role=option]");
    if (option) active?.(option);
  });
  return move;
}

// Shows a range's value beside it, as `format` words it.
export function labelled(id, format, changed) {
  const input = by(id);
  const output = by(`${id}-value`);
  const show = () => {
    output.textContent = format(Number(input.value));
  };
  input.addEventListener("input", () => {
    show();
    changed?.();
  });
  show();
  return { value: () => Number(input.value), show, input };
}
