// VMs: the table of them, and one with its timeline and plots.

import { get } from "./api.js";
import * as dialogs from "./dialogs.js";
import { backupLink, facts, h, show, table, vmLink, visit } from "./dom.js";
import { ago, pause, size, time } from "./format.js";
import { progressOf, stateOf } from "./jobs.js";
import * as live from "./live.js";
import { pauses, stored, timeline } from "./plots.js";

const work = (vm) => {
  const job = live.ofVm(vm);
  return job ? h("span", {}, `${job.verb} `, stateOf(job), " ", progressOf(job)) : null;
};

const columns = [
  { head: "VM", cell: (row) => vmLink(row.vm) },
  { head: "State", cell: (row) => row.state },
  { head: "Last backup", cell: (row) => (row.last_backup ? ago(row.last_backup.time) : h("span", { class: "warn" }, "never")) },
  { head: "Pause", number: true, cell: (row) => pause(row.last_backup?.pause_seconds) },
  { head: "Backups", number: true, cell: (row) => row.backups },
  { head: "Now", cell: (row) => h("span", { "data-vm": row.vm }, work(row.vm)) },
  { head: "", cell: (row) => row.kind === "working"
    && h("button", { type: "button", "aria-label": `Back up ${row.vm}`, onclick: () => dialogs.backup(row.vm) }, "Back up") },
];

export async function list(role) {
  const mine = visit();
  const place = h("div", {});
  const more = h("button", { type: "button" }, "More");
  const filter = h("input", { type: "search", "aria-label": "Find a VM by a part of its name", placeholder: "Find a VM" });
  const shown = role === "read" ? columns.slice(0, -1) : columns;
  let rows = [];
  let next = null;
  const load = async (after) => {
    const page = await get("/vms", { match: filter.value, after, limit: 100 });
    rows = after ? [...rows, ...page.items] : page.items;
    next = page.next;
    more.hidden = next === null;
    place.replaceChildren(table("Registered VMs, as they were when last seen", shown, rows));
  };
  more.addEventListener("click", () => load(next));
  filter.addEventListener("input", () => load(""));
  const summary = await get("/summary");
  await load("");
  live.onChange(() => place.querySelectorAll("[data-vm]").forEach((cell) => cell.replaceChildren(...[work(cell.dataset.vm)].filter(Boolean))));
  live.onEnd(() => load("").catch(() => {}));
  show(mine, h("h1", {}, "VMs"),
    h("p", { class: "faint" }, `${summary.vms} VMs, ${summary.backups} backups, ${summary.failed_jobs_today} failed jobs in the last day`),
    filter, place, more);
}

export async function one(name, role) {
  const mine = visit();
  const now = h("span", {});
  const draw = async () => {
    const path = `/vms/${encodeURIComponent(name)}`;
    const [vm, page] = await Promise.all([get(path), get("/backups", { vm: name, limit: 200 })]);
    const backups = page.items;
    now.replaceChildren(work(name) ?? "–");
    const may = role !== "read" && vm.kind === "working";
    show(mine, h("h1", {}, vm.vm),
      may ? h("div", { class: "actions" },
        h("button", { type: "button", class: "first", onclick: () => dialogs.backup(vm.vm) }, "Back up"),
        backups.length ? h("button", { type: "button", onclick: () => dialogs.restore(backups[0]) }, "Restore the newest") : null,
        role === "admin" && vm.held_duplicate ? h("button", { type: "button", class: "danger", onclick: () => dialogs.failover(vm) }, "Fail over") : null,
        role === "admin" && backups.length ? h("button", { type: "button", class: "danger", onclick: () => dialogs.prune(vm.vm) }, "Remove old ones") : null) : null,
      facts([["State", vm.state], ["Now", now], ["Hypervisor", vm.hypervisor], ["Last backup", vm.last_backup ? `${ago(vm.last_backup.time)} (${time(vm.last_backup.time)})` : "never"],
        ["Held duplicate", vm.held_duplicate], ["Made from", vm.duplicate_of], ["Disks", vm.disks.map((disk) => h("div", {}, `${disk.device} at ${disk.address}`))]]),
      h("h2", {}, "Backups"), timeline(backups), pauses(backups), stored(backups),
      table(page.next ? "The newest 200 backups" : "Backups", [
        { head: "Backup", cell: (each) => backupLink(each.backup) },
        { head: "Time", cell: (each) => time(each.time) },
        { head: "Mode", cell: (each) => each.mode },
        { head: "Pause", number: true, cell: (each) => pause(each.pause_seconds) },
        { head: "Read", number: true, cell: (each) => size(each.read_bytes) },
        { head: "Stored", number: true, cell: (each) => size(each.stored_bytes) },
        { head: "Tags", cell: (each) => (each.tags ?? []).join(", ") },
      ], backups));
  };
  await draw();
  live.onChange(() => now.replaceChildren(work(name) ?? "–"));
  live.onEnd(() => draw().catch(() => {}));
}
