// Calls of the server that this page came from, with its key where it asks for one.

import { t } from "./i18n.js";

const KEY = "fastlm-key";

export function useKey(key) {
  sessionStorage.setItem(KEY, key); // for this tab alone
}

async function request(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = { headers, signal };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    headers["Content-Type"] = "application/json";
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(t("unreachable"));
  }
  if (!answer.ok) {
    if (answer.status === 401) document.dispatchEvent(new Event("key-needed"));
    const told = await answer.json().catch(() => null);
    const error = new Error(told?.error?.message ?? `${answer.status} ${answer.statusText}`);
    error.status = answer.status;
    throw error;
  }
  return answer;
}

export async function call(path, body, signal) {
  return (await request(path, body, signal)).json();
}

// Calls `receive` with each event of a stream, until it ends or `signal` aborts it.
export async function stream(path, body, signal, receive) {
  const answer = await request(path, body, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const content = JSON.parse(data);
      if (content.error) throw new Error(content.error.message);
      receive(content);
    }
  }
}
