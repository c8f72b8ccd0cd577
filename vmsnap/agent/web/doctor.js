// The doctor: what works on the agent's host, and the cure for what does not.

import { post } from "./api.js";
import { finished } from "./dialogs.js";
import { h, show, table, visit } from "./dom.js";

const KINDS = { ok: "good", note: "warn", missing: "bad" };

export async function page(role) {
  const mine = visit();
  const place = h("div", { "aria-live": "polite" });
  const ask = async () => {
    place.replaceChildren(h("p", {}, "Looking …"));
    try {
      const job = await post("/jobs/doctor");
      const found = await finished(job.job);
      place.replaceChildren(table("What was found", [
        { head: "", cell: (each) => h("span", { class: KINDS[each.severity] }, each.severity) },
        { head: "Driver", cell: (each) => each.driver },
        { head: "Subject", cell: (each) => each.subject },
        { head: "Message", cell: (each) => each.message },
        { head: "Cure", cell: (each) => each.cure },
      ], found));
    } catch (error) {
      place.replaceChildren(h("p", { class: "bad" }, error.message));
    }
  };
  show(mine, h("h1", {}, "Doctor"), h("p", {}, "Looks at the host and its drivers. Changes nothing."),
    role === "read" ? h("p", { class: "faint" }, "This needs the role operate.")
      : h("div", { class: "actions" }, h("button", { type: "button", class: "first", onclick: ask }, "Look")), place);
}
