// Schedules: what comes next, and letting one rest, go on, run now; adding and removing them.

import { get, post, put, remove } from "./api.js";
import { h, show, table, tell, visit } from "./dom.js";
import { time } from "./format.js";

const attempt = async (ask, then) => {
  try {
    await ask();
    await then();
  } catch (error) {
    tell(error.message, "bad");
  }
};

export async function list(role) {
  const mine = visit();
  const again = () => list(role);
  const { items } = await get("/schedules");
  const button = (text, label, danger, ask) => h("button", { type: "button", class: danger ? "danger" : "", "aria-label": label, onclick: () => attempt(ask, again) }, text);
  const columns = [
    { head: "Schedule", cell: (each) => each.name },
    { head: "What", cell: ({ schedule }) => (schedule.verb === "verify" ? `verify${schedule.boot ? " by booting" : ""}` : schedule.mode) },
    { head: "When", cell: ({ schedule }) => [schedule.cron, schedule.timezone].filter(Boolean).join(" ") },
    { head: "VMs", cell: ({ schedule }) => schedule.vms.join(", ") },
    { head: "Keep", cell: ({ schedule }) => Object.entries(schedule.keep).map(([rule, count]) => `${count} ${rule}`).join(", ") || "all" },
    { head: "Next", cell: (each) => (each.paused ? h("span", { class: "warn" }, "rests") : time(each.next)) },
    { head: "", cell: (each) => role !== "read" && h("div", { class: "actions" },
      button("Run now", `Run ${each.name} now`, false, async () => {
        const { items: jobs } = await post(`/schedules/${each.name}/run`);
        tell(`${jobs.length} job${jobs.length === 1 ? "" : "s"} queued`);
      }),
      button(each.paused ? "Go on" : "Rest", `${each.paused ? "Let go on" : "Let rest"}: ${each.name}`, false,
        () => put(`/schedules/${each.name}/paused`, { paused: !each.paused })),
      role === "admin" && !each.configured ? button("Remove", `Remove ${each.name}`, true, () => remove(`/schedules/${each.name}`)) : null) },
  ];
  show(mine, h("h1", {}, "Schedules"), table("Schedules", columns, items), role === "admin" ? form(again) : null);
}

function form(again) {
  const input = (label, attributes) => h("label", {}, label, h("input", attributes));
  const made = h("form", {}, h("h2", {}, "Add a schedule"),
    input("Name", { name: "title", required: true, autocomplete: "off" }),
    input("When: minute, hour, day, month, day of the week", { name: "cron", required: true, value: "30 2 * * *" }),
    input("VMs: names or patterns, with spaces between", { name: "vms", required: true, value: "*" }),
    input("Keep daily (0: all are kept)", { name: "daily", type: "number", min: 0, value: 0 }),
    h("button", { class: "first" }, "Add"));
  made.addEventListener("submit", (event) => {
    event.preventDefault();
    const { title, cron, vms, daily } = made.elements;
    const keep = Number(daily.value) ? { daily: Number(daily.value) } : {};
    attempt(() => post("/schedules", { name: title.value, cron: cron.value, vms: vms.value.split(/\s+/).filter(Boolean), keep }), again);
  });
  return made;
}
