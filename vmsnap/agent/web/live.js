// The jobs as they go, from one stream for the whole page.

import { stream } from "./api.js";
import { tell } from "./dom.js";

const OPEN = ["queued", "starting", "running"];
const jobs = new Map();
const listeners = new Set();
const enders = new Set();
let first = true;

export const all = () => [...jobs.values()].sort((a, b) => b.job - a.job);
export const ofVm = (vm) => all().find((job) => job.vm === vm && OPEN.includes(job.state));
export const isOpen = (job) => OPEN.includes(job.state);

// Each page listens while it is shown; `clear` is called when another one is.
export const onChange = (listener) => listeners.add(listener);
export const onEnd = (listener) => enders.add(listener);
export function clear() {
  listeners.clear();
  enders.clear();
}

function take(list) {
  const ended = [];
  for (const job of list) {
    const before = jobs.get(job.job);
    if (!first && !isOpen(job) && (!before || isOpen(before))) ended.push(job);
    jobs.set(job.job, job);
  }
  first = false;
  for (const number of [...jobs.keys()].sort((a, b) => b - a).slice(500)) jobs.delete(number);
  for (const job of ended) {
    // What a dialog asks for itself it shows itself.
    const asked = job.requester === "agent" || job.verb === "doctor" || job.arguments.includes("--dry-run");
    if (!asked || job.state !== "done") announce(job);
  }
  listeners.forEach((listener) => listener());
  if (ended.length) enders.forEach((ender) => ender(ended));
}

function announce(job) {
  const what = `${job.verb}${job.vm ? ` of ${job.vm}` : ""}`;
  tell(job.state === "done" ? `${what} is done` : `${what}: ${job.state}. ${job.message}`, job.state === "done" ? "good" : "bad");
}

export async function follow() {
  for (;;) {
    try {
      await stream("/events", take);
    } catch (error) {
      if (error.status === 401 || error.status === 403) return;
    }
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}
