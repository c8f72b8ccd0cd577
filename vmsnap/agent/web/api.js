// The agent's API. The token is kept for this tab alone, and goes into a header: no cookie that another site could use.

const ROOT = "/api/v1";
const PLACE = "vmsnap-token";
let token = sessionStorage.getItem(PLACE) ?? "";

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function signIn(given) {
  token = given;
  if (given) sessionStorage.setItem(PLACE, given);
  else sessionStorage.removeItem(PLACE);
}

function headers(more) {
  return token ? { ...more, Authorization: `Bearer ${token}` } : more;
}

async function ask(method, path, body, more = {}) {
  const options = { method, headers: headers(more), cache: "no-store", credentials: "omit" };
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(ROOT + path, options);
  } catch {
    throw new Refused(0, "the agent cannot be reached");
  }
  if (answer.status === 204) return null;
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(answer.status, [found.error ?? answer.statusText, found.cure].filter(Boolean).join(" – "));
  return found;
}

export const get = (path, query = {}) => {
  const given = Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  return ask("GET", given.length ? `${path}?${new URLSearchParams(given)}` : path);
};
export const post = (path, body = {}) => ask("POST", path, body, { "Idempotency-Key": key() });
export const put = (path, body) => ask("PUT", path, body);
export const remove = (path) => ask("DELETE", path);

function key() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Calls `seen` with each event's data; returns when the stream ends. EventSource cannot send a token.
export async function stream(path, seen, signal) {
  const answer = await fetch(ROOT + path, { headers: headers({ Accept: "text/event-stream" }), signal, credentials: "omit" });
  if (!answer.ok) throw new Refused(answer.status, answer.statusText);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.split("\n").find((line) => line.startsWith("data: "));
      if (data) seen(JSON.parse(data.slice(6)));
    }
  }
}
