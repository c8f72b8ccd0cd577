// The timeline of all VMs: a row each, a dot for each backup; what has none for long is seen at a glance.

import { get } from "./api.js";
import { backupLink, h, s, show, visit, vmLink } from "./dom.js";
import { ago, pause, time } from "./format.js";
import * as live from "./live.js";

const DAYS = [1, 7, 30, 90];
const WIDE = 1000;
let days = 7;

function strip(row, since, until) {
  const x = (backup) => 8 + (WIDE - 16) * (Date.parse(backup.time) - since) / Math.max(1, until - since);
  const last = row.backups[0];
  const label = last ? `${row.backups.length} backups, the last ${ago(last.time)}` : "no backup in this time";
  return s("svg", { class: "strip", viewBox: `0 0 ${WIDE} 24`, preserveAspectRatio: "none", role: "img", "aria-label": `${row.vm}: ${label}` },
    s("line", { class: "axis", x1: 8, x2: WIDE - 8, y1: 12, y2: 12 }),
    row.backups.map((backup) => s("a", { href: `#/backups/${encodeURIComponent(backup.backup)}`, tabindex: -1 },
      s("line", { class: `dash ${backup.mode}`, x1: x(backup), x2: x(backup), y1: 3, y2: 21 },
        s("title", {}, `${row.vm}, ${time(backup.time)}, ${backup.mode}, pause ${pause(backup.pause_seconds)}`)))));
}

// By keyboard one goes from name to name; the newest backup of each has a link too.
const line = (row, since, until) => h("li", {},
  h("span", { class: "who" }, vmLink(row.vm)), strip(row, since, until),
  h("span", { class: "last" }, row.backups.length ? backupLink(row.backups[0].backup) : h("span", { class: "warn" }, "none")));

export async function page() {
  const mine = visit();
  const list = h("ul", { class: "timeline" });
  const span = h("p", { class: "faint" });
  const more = h("button", { type: "button" }, "More");
  const filter = h("input", { type: "search", "aria-label": "Find a VM by a part of its name", placeholder: "Find a VM" });
  const choice = h("select", { name: "days", "aria-label": "How many days" },
    DAYS.map((each) => h("option", { value: each, selected: each === days }, each === 1 ? "one day" : `${each} days`)));
  let next = "";
  const load = async (after) => {
    const found = await get("/timeline", { days, after, match: filter.value, limit: 50 });
    next = found.next;
    more.hidden = next === null;
    const [since, until] = [Date.parse(found.since), Date.parse(found.until)];
    const rows = found.items.map((row) => line(row, since, until));
    if (after) list.append(...rows);
    else list.replaceChildren(...rows);
    span.textContent = `From ${time(found.since)} to ${time(found.until)}. Of each VM the newest hundred are shown.`;
  };
  more.addEventListener("click", () => load(next));
  filter.addEventListener("input", () => load(""));
  choice.addEventListener("change", () => {
    days = Number(choice.value);
    load("");
  });
  await load("");
  live.onEnd(() => load("").catch(() => {}));
  show(mine, h("h1", {}, "Timeline"), h("div", { class: "actions" }, choice, filter), span, list, more);
}
