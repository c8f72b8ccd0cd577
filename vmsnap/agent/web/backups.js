// Backups: the table of them, and one with the evidence of its instant.

import { get } from "./api.js";
import * as dialogs from "./dialogs.js";
import { backupLink, facts, h, show, table, vmLink, visit } from "./dom.js";
import { pause, size, time } from "./format.js";
import * as live from "./live.js";

const columns = [
  { head: "Backup", cell: (each) => backupLink(each.backup) },
  { head: "VM", cell: (each) => vmLink(each.vm) },
  { head: "Time", cell: (each) => time(each.time) },
  { head: "Mode", cell: (each) => each.mode },
  { head: "Pause", number: true, cell: (each) => pause(each.pause_seconds) },
  { head: "Stored", number: true, cell: (each) => size(each.stored_bytes) },
];

export async function list(role) {
  const mine = visit();
  const place = h("div", {});
  const more = h("button", { type: "button" }, "Older ones");
  let rows = [];
  let next = null;
  const load = async (before) => {
    const page = await get("/backups", { before, limit: 100 });
    rows = before ? [...rows, ...page.items] : page.items;
    next = page.next;
    more.hidden = next === null;
    place.replaceChildren(table("Backups, the newest first", columns, rows));
  };
  more.addEventListener("click", () => load(next));
  await load("");
  live.onEnd(() => load("").catch(() => {}));
  show(mine, h("h1", {}, "Backups"),
    role === "admin" ? h("div", { class: "actions" },
      h("button", { type: "button", class: "danger", onclick: () => dialogs.prune("") }, "Remove old ones")) : null,
    place, more);
}

export async function one(name, role) {
  const mine = visit();
  const found = await get(`/backups/${encodeURIComponent(name)}`);
  const moments = found.moments ?? [];
  const first = moments[0]?.monotonic_ns ?? 0;
  // The lineage: the backups of the same VM right before and after it.
  const [before, after] = await neighbours(found);
  show(mine, h("h1", {}, found.backup),
    role === "read" ? null : h("div", { class: "actions" },
      h("button", { type: "button", class: "first", onclick: () => dialogs.restore(found) }, "Restore"),
      h("button", { type: "button", onclick: () => dialogs.verify(found) }, "Verify")),
    facts([["VM", vmLink(found.vm)], ["Time", time(found.time)], ["Mode", found.mode], ["Pause", pause(found.pause_seconds)],
      ["Memory", found.memory_bytes ? size(found.memory_bytes) : "none, disks alone"], ["Capture", found.capture],
      ["Hypervisor", [found.hypervisor, found.hypervisor_version].filter(Boolean).join(" ")], ["Read", size(found.read_bytes)],
      ["Stored", size(found.stored_bytes)], ["Tags", (found.tags ?? []).join(", ")], ["Remarks", (found.remarks ?? []).join("; ")],
      ["Lost", found.lost_bytes ? h("span", { class: "bad" }, size(found.lost_bytes)) : null], ["Repository", found.repository],
      ["Before it", before ? backupLink(before.backup) : null], ["After it", after ? backupLink(after.backup) : null]]),
    h("h2", {}, "Evidence of one instant"),
    table("When what happened, by whose clock", [
      { head: "Moment", cell: (each) => each.name },
      { head: "After", number: true, cell: (each) => `${((each.monotonic_ns - first) / 1e6).toFixed(3)} ms` },
      { head: "Seen by", cell: (each) => each.source },
    ], moments),
    h("h2", {}, "Disks"),
    table("Disks", [
      { head: "Disk", cell: (each) => each.device },
      { head: "Size", number: true, cell: (each) => size(each.size_bytes) },
      { head: "Mechanism", cell: (each) => each.mechanism ?? "read-only" },
      { head: "Was at", cell: (each) => each.address },
    ], [...(found.disks ?? []), ...(found.read_only_disks ?? [])]));
}

async function neighbours(found) {
  const older = await get("/backups", { vm: found.vm, before: `${found.time},${found.backup}`, limit: 1 });
  const page = await get("/backups", { vm: found.vm, limit: 500 });
  const at = page.items.findIndex((each) => each.backup === found.backup);
  return [older.items[0], at > 0 ? page.items[at - 1] : null];
}
