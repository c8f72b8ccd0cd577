// Begins: who asks, which page, and the stream of jobs.

import { get, signIn } from "./api.js";
import * as backups from "./backups.js";
import * as doctor from "./doctor.js";
import { arrive, h, show, visit } from "./dom.js";
import * as jobs from "./jobs.js";
import * as live from "./live.js";
import * as schedules from "./schedules.js";
import * as timeline from "./timeline.js";
import * as vms from "./vms.js";

const PAGES = {
  vms: (name, role) => (name ? vms.one(name, role) : vms.list(role)),
  backups: (name, role) => (name ? backups.one(name, role) : backups.list(role)),
  timeline: () => timeline.page(),
  jobs: (name) => (name ? jobs.one(Number(name)) : jobs.list()),
  schedules: (_, role) => schedules.list(role),
  doctor: (_, role) => doctor.page(role),
};
let role = "read";

async function go() {
  const [page, name] = location.hash.replace(/^#\/?/, "").split("/");
  const shown = Object.hasOwn(PAGES, page) ? page : "vms";
  const mine = arrive();
  live.clear();
  for (const each of document.querySelectorAll("nav a")) {
    if (each.getAttribute("href") === `#/${shown}`) each.setAttribute("aria-current", "page");
    else each.removeAttribute("aria-current");
  }
  try {
    await PAGES[shown](name ? decodeURIComponent(name) : "", role);
    document.title = `${name ? decodeURIComponent(name) : shown} – vmsnap`;
  } catch (error) {
    if (error.status === 401) askWho(error.message);
    else show(mine, h("h1", {}, "That did not work"), h("p", { class: "bad", role: "alert" }, error.message));
  }
}

function askWho(message) {
  const field = h("input", { type: "password", name: "token", required: true, autocomplete: "off" });
  const form = h("form", {}, h("h1", {}, "Who are you?"), h("p", {}, "Make a token on the agent's host: ", h("code", {}, "vmsnap agent token add NAME --role operate")),
    h("label", {}, "Token", field), h("p", { class: "bad", role: "alert" }, message), h("button", { class: "first" }, "Go in"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    signIn(field.value.trim());
    begin();
  });
  show(visit(), form);
  field.focus();
}

async function begin() {
  let summary;
  try {
    summary = await get("/summary");
  } catch (error) {
    if (error.status === 401) {
      signIn("");
      askWho(error.message === "a token is needed" ? "" : error.message);
    } else {
      show(visit(), h("p", { class: "bad", role: "alert" }, error.message));
    }
    return;
  }
  role = summary.role;
  const out = h("button", { type: "button", onclick: () => { signIn(""); location.reload(); } }, "Go out");
  document.getElementById("who").replaceChildren(`${summary.who} (${summary.role}) `, ...(summary.who === "socket" ? [] : [out]));
  live.follow();
  await go();
}

window.addEventListener("hashchange", async () => {
  await go();
  document.getElementById("main").focus();
});
begin();
