// Plots as SVG, drawn from the backups of one VM (newest first, as the API has them).

import { h, s } from "./dom.js";
import { pause, size, time } from "./format.js";

const LEFT = 70;
const RIGHT = 12;

// As wide as the page, so that letters keep their size on a phone.
const width = () => Math.max(280, Math.min(1100, document.getElementById("main").clientWidth - 32));

function scaleTime(backups) {
  const wide = width();
  const times = backups.map((backup) => Date.parse(backup.time));
  const first = Math.min(...times);
  const length = Math.max(...times) - first || 1;
  return (backup) => LEFT + 8 + ((Date.parse(backup.time) - first) / length) * (wide - LEFT - RIGHT - 16);
}

function frame(height, label, ...children) {
  return s("svg", { class: "plot", viewBox: `0 0 ${width()} ${height}`, role: "img", "aria-label": label }, ...children);
}

function edges(backups, y) {
  const wide = width();
  return [
    s("text", { x: LEFT, y }, time(backups.at(-1).time)),
    backups.length > 1 && s("text", { x: wide - RIGHT, y, "text-anchor": "end" }, time(backups[0].time)),
  ];
}

export function timeline(backups) {
  if (!backups.length) return null;
  const wide = width();
  const x = scaleTime(backups);
  return s("svg", { class: "plot", viewBox: `0 0 ${wide} 62`, role: "group", "aria-label": `Timeline of ${backups.length} backups` },
    s("line", { class: "axis", x1: LEFT, x2: wide - RIGHT, y1: 24, y2: 24 }),
    backups.map((backup) => s("a", { href: `#/backups/${encodeURIComponent(backup.backup)}`, "aria-label": `${backup.mode} backup of ${time(backup.time)}` },
      s("circle", { class: `dot ${backup.mode}`, cx: x(backup), cy: 24, r: 7 }, s("title", {}, `${time(backup.time)}, ${backup.mode}`)))),
    edges(backups, 54));
}

function plot(backups, label, value, format, bars) {
  const shown = backups.filter((backup) => value(backup) !== null && value(backup) !== undefined);
  if (!shown.length) return null;
  const wide = width();
  const x = scaleTime(shown);
  const most = Math.max(...shown.map(value)) || 1;
  const y = (backup) => 14 + (1 - value(backup) / most) * 120;
  const title = (backup) => s("title", {}, `${time(backup.time)}: ${format(value(backup))}`);
  const points = [...shown].reverse().map((backup) => `${x(backup).toFixed(1)},${y(backup).toFixed(1)}`).join(" ");
  return h("figure", {}, h("figcaption", {}, label), frame(168, `${label}: at most ${format(most)}, last ${format(value(shown[0]))}`,
    s("text", { x: LEFT - 6, y: 18, "text-anchor": "end" }, format(most)),
    s("text", { x: LEFT - 6, y: 138, "text-anchor": "end" }, format(0)),
    s("line", { class: "axis", x1: LEFT, x2: wide - RIGHT, y1: 134, y2: 134 }),
    bars
      ? shown.map((backup) => s("rect", { class: "bar", x: x(backup) - 4, width: 8, y: y(backup), height: 134 - y(backup) }, title(backup)))
      : [s("polyline", { class: "path", points }),
        shown.map((backup) => s("circle", { class: `dot ${backup.mode}`, cx: x(backup), cy: y(backup), r: 4 }, title(backup)))],
    edges(shown, 158)));
}

export const pauses = (backups) => plot(backups, "How long the guest stood still", (backup) => backup.pause_seconds, pause, false);
export const stored = (backups) => plot(backups, "What each backup added to the repository", (backup) => backup.stored_bytes, size, true);
