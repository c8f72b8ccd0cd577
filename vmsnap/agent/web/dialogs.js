// Guided dialogs: each says what will happen, what it may overwrite, and asks.

import { get, post } from "./api.js";
import { h, table, tell } from "./dom.js";
import { ago, time } from "./format.js";

const place = () => document.getElementById("dialog");

// `ask` gets the form's values and returns what is said afterwards; an error stays in the dialog.
function open(title, fields, what, danger, button, ask) {
  const dialog = place();
  const problem = h("p", { class: "bad", role: "alert" });
  const go = h("button", { class: danger ? "danger" : "first", type: "submit" }, button);
  const form = h("form", { method: "dialog" },
    h("h2", { id: "dialog-title" }, title), fields,
    h("div", { class: danger ? "happens danger" : "happens" }, what), problem,
    h("div", { class: "actions" }, go, h("button", { type: "button", onclick: () => dialog.close() }, "Cancel")));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    go.disabled = true;
    problem.textContent = "";
    try {
      const said = await ask(form.elements);
      if (dialog.open && dialog.contains(form)) dialog.close();
      if (said) tell(said);
    } catch (error) {
      problem.textContent = error.message;
    }
    go.disabled = false;
  });
  dialog.setAttribute("aria-labelledby", "dialog-title");
  dialog.replaceChildren(form);
  if (!dialog.open) dialog.showModal();
  return form;
}

const field = (label, attributes) => h("label", {}, label, h("input", attributes));
const tick = (label, name, checked) => h("label", { class: "tick" }, h("input", { type: "checkbox", name, checked }), h("span", {}, label));
const choice = (label, name, values) => h("label", {}, label,
  h("select", { name }, values.map(([value, text]) => h("option", { value }, text))));

export function backup(vm) {
  open(`Back up ${vm}`, [
    choice("Mode", "mode", [["live", "live: memory and disks of one instant"],
      ["consistent", "consistent: disks alone, after an orderly shutdown of the copy"]]),
    field("Tag (may be empty)", { name: "tag", maxlength: 200 }),
    tick("Hold the duplicate in memory, for a failover", "keep", false),
  ], [h("p", {}, `The guest of ${vm} stands still for milliseconds and goes on. A new backup is stored; no other one changes.`)],
  false, "Back up", async (values) => {
    const job = await post("/jobs/backup", {
      vm, mode: values.mode.value, tags: values.tag.value ? [values.tag.value] : [], keep_duplicate: values.keep.checked,
    });
    return `backup of ${vm} is queued as job ${job.job}`;
  });
}

export function restore(found) {
  const suggestion = `${found.vm}-copy`.slice(0, 64);
  const what = h("p", {});
  const form = open(`Restore ${found.backup}`, [
    field("Name of the new VM", { name: "name", required: true, value: suggestion, pattern: "[A-Za-z0-9][A-Za-z0-9._\\-]{0,63}", autocomplete: "off" }),
    tick("Let it execute, from the captured instant on", "run", true),
    tick("Cut its network", "isolated", true),
  ], [what, h("p", {}, `Nothing is overwritten: if a VM or a file of that name exists, nothing is done. ${found.vm} is not touched.`)],
  false, "Restore", async (values) => {
    const name = values.name.value;
    const job = await post("/jobs/restore", {
      backup: found.backup, name, run: values.run.checked, isolated: values.isolated.checked, repository: found.repository,
    });
    return `restore as ${name} is queued as job ${job.job}`;
  });
  const say = () => {
    const { name, run, isolated } = form.elements;
    what.textContent = `A new VM ${name.value} is made with the state of ${time(found.time)}, on disks of its own. `
      + (run.checked ? "It executes at once" : "It is left stopped")
      + (isolated.checked ? ", and nothing can reach it." : ", with its network: two machines with the same addresses may meet.");
  };
  form.addEventListener("input", say);
  say();
}

export function verify(found) {
  open(`Verify ${found.backup}`, [tick("Bring it up too, apart from everything, and shut it down", "boot", false)],
    [h("p", {}, "Every byte of it is read and authenticated. Nothing is changed; what is brought up is removed again.")],
    false, "Verify", async (values) => {
      const job = await post("/jobs/verify", { backup: found.backup, boot: values.boot.checked, repository: found.repository });
      return `verification is queued as job ${job.job}`;
    });
}

export function failover(vm) {
  const last = vm.last_backup;
  open(`Fail ${vm.vm} over`, [
    tick(`Kill ${vm.vm} first if it lives; without this, one that lives is left alone`, "fence", false),
    field(`Type ${vm.vm} to confirm`, { name: "sure", required: true, autocomplete: "off" }),
  ], [h("p", {}, `The duplicate ${vm.held_duplicate} goes on in the place of ${vm.vm}, under its name, with its network.`),
    h("p", {}, `What ${vm.vm} did since the duplicate was captured${last ? ` (last backup ${ago(last.time)})` : ""} is lost to it; it stays on the old disks, which are not removed.`)],
  true, "Fail over", async (values) => {
    if (values.sure.value !== vm.vm) throw new Error(`that is not ${vm.vm}`);
    const job = await post("/jobs/failover", { vm: vm.vm, fence: values.fence.checked });
    return `failover of ${vm.vm} is queued as job ${job.job}`;
  });
}

const RULES = ["last", "hourly", "daily", "weekly", "monthly", "yearly"];

export function prune(vm) {
  open(`Remove old backups${vm ? ` of ${vm}` : ""}`, [
    h("p", {}, "How many to keep; the newest of each VM always stays."),
    RULES.map((rule) => field(`Keep ${rule}`, { name: rule, type: "number", min: 0, max: 100000, value: rule === "last" ? 7 : 0 })),
  ], [h("p", {}, "First it is only shown what would be removed.")], false, "Show what would go", async (values) => {
    const rules = Object.fromEntries(RULES.map((rule) => [`keep_${rule}`, Number(values[rule].value)]));
    const job = await post("/jobs/prune", { ...rules, vm: vm || null, dry_run: true });
    const report = await finished(job.job);
    confirmPrune(vm, rules, report);
    return "";
  });
}

function confirmPrune(vm, rules, report) {
  const columns = [{ head: "Backup", cell: (each) => each.backup }, { head: "Time", cell: (each) => time(each.time) }];
  const count = report.removed.length;
  if (!count) {
    place().close();
    tell("nothing would be removed");
    return;
  }
  open(`Remove ${count} backup${count === 1 ? "" : "s"}`, [table("These would be removed", columns, report.removed.slice(0, 100))],
    [h("p", {}, `They cannot be brought back. ${report.kept.length} are kept. The room is free after the next gc.`)],
    true, `Remove ${count}`, async () => {
      const job = await post("/jobs/prune", { ...rules, vm: vm || null, dry_run: false });
      return `prune is queued as job ${job.job}`;
    });
}

// The result of a job that is short, once it has ended.
export async function finished(number) {
  for (;;) {
    const job = await get(`/jobs/${number}`);
    if (job.state === "done" || (job.ended && job.result)) return job.result;
    if (job.ended) throw new Error(job.message || `the job is ${job.state}`);
    await new Promise((resolve) => setTimeout(resolve, 300));
  }
}
