// Elements without markup in texts: what comes from outside is only ever text.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
  return element;
}

export const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
export const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

// A table that turns into cards on a narrow screen. Columns: {head, number, cell: row => node or text}.
export function table(caption, columns, rows, empty = "none") {
  if (!rows.length) return h("p", { class: "faint" }, `${caption}: ${empty}.`);
  const of = (column) => (column.number ? { class: "number" } : {});
  return h("div", { class: "wide" }, h("table", { class: "cards" },
    h("caption", {}, caption),
    h("thead", {}, h("tr", {}, columns.map((column) => h("th", { scope: "col", ...of(column) }, column.head)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, columns.map((column) =>
      h("td", { "data-head": column.head, ...of(column) }, column.cell(row))))))));
}

export const facts = (pairs) => h("dl", {}, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
  .map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));

export const link = (path, text) => h("a", { href: path }, text);
export const vmLink = (vm) => link(`#/vms/${encodeURIComponent(vm)}`, vm);
export const backupLink = (backup) => link(`#/backups/${encodeURIComponent(backup)}`, backup);

// A page that was left while it waited for an answer must not draw over the next one.
let visits = 0;
export const visit = () => visits;
export const arrive = () => ++visits;

export function show(mine, ...children) {
  if (mine !== visits) return;
  document.getElementById("main").replaceChildren(...children.flat(Infinity).filter(Boolean));
}

export function tell(text, kind = "") {
  const line = h("p", { class: kind }, text);
  const news = document.getElementById("news");
  news.append(line);
  while (news.children.length > 4) news.firstChild.remove();
  setTimeout(() => line.remove(), 12000);
}
