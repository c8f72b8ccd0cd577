// Jobs: the table of them, and one.

import { get, post } from "./api.js";
import { backupLink, facts, h, link, show, table, tell, vmLink, visit } from "./dom.js";
import { size, time } from "./format.js";
import * as live from "./live.js";

const KINDS = { done: "good", failed: "bad", "broken off": "bad", cancelled: "warn" };

export const stateOf = (job) => h("span", { class: KINDS[job.state] ?? "" }, job.state);

export function progressOf(job) {
  const found = job.progress;
  if (!live.isOpen(job) || !found) return null;
  const amount = found.total_bytes ? `${size(found.done_bytes)} of ${size(found.total_bytes)}` : size(found.done_bytes);
  return h("span", {}, `${found.phase} `, found.total_bytes
    ? h("progress", { max: found.total_bytes, value: found.done_bytes, "aria-label": found.phase }) : null, ` ${amount}`);
}

const columns = [
  { head: "Job", number: true, cell: (job) => link(`#/jobs/${job.job}`, job.job) },
  { head: "Verb", cell: (job) => job.verb },
  { head: "VM", cell: (job) => (job.vm ? vmLink(job.vm) : "–") },
  { head: "State", cell: (job) => [stateOf(job), " ", progressOf(job)] },
  { head: "Since", cell: (job) => time(job.begun ?? job.created) },
  { head: "By", cell: (job) => (job.schedule ? `schedule ${job.schedule}` : job.requester) },
  { head: "Message", cell: (job) => job.message },
];

export async function list() {
  const mine = visit();
  const place = h("div", {});
  const older = h("div", {});
  const more = h("button", { type: "button" }, "Older ones");
  let oldest = null;
  more.addEventListener("click", async () => {
    const page = await get("/jobs", { before: oldest, limit: 50 });
    older.append(table("Older jobs", columns, page.items));
    oldest = page.next;
    more.hidden = page.next === null;
  });
  const page = await get("/jobs", { limit: 50 });
  oldest = page.next;
  more.hidden = page.next === null;
  const draw = () => {
    const known = new Map(page.items.map((job) => [job.job, job]));
    live.all().forEach((job) => known.set(job.job, job));
    place.replaceChildren(table("The newest jobs", columns, [...known.values()].sort((a, b) => b.job - a.job).slice(0, 60)));
  };
  draw();
  live.onChange(draw);
  show(mine, h("h1", {}, "Jobs"), place, older, more);
}

export async function one(number) {
  const mine = visit();
  const draw = async () => {
    const job = await get(`/jobs/${number}`);
    const made = job.result?.backup;
    const cancel = h("button", { type: "button", class: "danger", onclick: async () => {
      try {
        await post(`/jobs/${number}/cancel`);
        tell("it was asked to stop");
      } catch (error) {
        tell(error.message, "bad");
      }
    } }, "Stop it");
    show(mine, h("h1", {}, `Job ${number}: ${job.verb}${job.vm ? ` of ${job.vm}` : ""}`),
      facts([["State", stateOf(job)], ["Progress", progressOf(job)], ["Message", job.message], ["VM", job.vm ? vmLink(job.vm) : null],
        ["Backup", made && job.verb === "backup" ? backupLink(made) : null], ["Repository", job.repository], ["Asked by", job.requester],
        ["Schedule", job.schedule], ["Try", job.attempt > 1 ? job.attempt : null], ["Created", time(job.created)],
        ["Begun", time(job.begun)], ["Ended", time(job.ended)], ["Exit code", job.exit_code],
        ["Command", h("code", {}, ["vmsnap", ...job.arguments].join(" "))]]),
      live.isOpen(job) ? h("div", { class: "actions" }, cancel) : null,
      job.result ? h("details", {}, h("summary", {}, "What it reported"), h("pre", { class: "wide" }, JSON.stringify(job.result, null, 2))) : null);
  };
  await draw();
  live.onChange(() => draw().catch(() => {}));
}
