"""sheet.html: the audit's pictures with the teacher's answers, to be ticked in a browser or beside the CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from prgkit.evaluate.gallery import PIXELATED_SIDE, data_uri
from prgkit.evaluate.style import CSS
from prgkit.ticks import COLUMNS, Tick, csv_row

LARGEST_SIDE = 320


@dataclass(frozen=True)
class Card:
    """One picture of the sheet."""

    tick: Tick
    picture: Image.Image
    others: Sequence[tuple[str, str]]  # the next answers, each with its confidence in percent


def sheet(
    cards: Sequence[Card], *, title: str, about: str, classes: Sequence[str], ticks_file: str, made_from: str, base: str
) -> str:
    """Return the whole page; everything that came from outside is escaped, and it needs no network.

    ``made_from`` names the sample and ``base`` the ticks that are in ``cards``: the browser remembers what is ticked
    under the first, and the page's own ticks go before what it remembers where the second has changed since.
    """
    names = "".join(f'<option value="{escape(name)}">' for name in classes)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}{MORE_CSS}</style></head>"
        f'<body data-sample="{escape(made_from)}" data-base="{escape(base)}" data-header="{",".join(COLUMNS)}">'
        f'<header><p class="eyebrow">prgkit audit</p><h1>{escape(title)}</h1><p class="lead">{escape(about)}</p>'
        f"{how(ticks_file)}</header>{BAR}"
        f'<main><ol class="sheet">{"".join(map(card, cards))}</ol></main>'
        f'<datalist id="classes">{names}</datalist><script>{SCRIPT}</script></body></html>\n'
    )


def how(ticks_file: str) -> str:
    """Return what to do, with a script and without."""
    file = f"<code>{escape(ticks_file)}</code>"
    return (
        f'<p class="how scripted" hidden>Is the answer in bold right? Save when you are done, or tired, and put the '
        f"file in the place of {file}; then <code>prgkit bench</code> says how right teacher and student are. "
        "The browser keeps what you have ticked. The order is drawn by chance: where you cannot tell, leave a picture "
        "blank, but do not choose the easy ones.</p>"
        f"<noscript><p class=how>Without JavaScript, tick in {file}: in the row with a picture's number, write y or n "
        "under <b>right</b> and, if you know it, the right name under <b>class</b>.</p></noscript>"
    )


def card(one: Card) -> str:
    """Return one picture with the answers, and the buttons that a script brings to life."""
    tick, pixels = one.tick, np.asarray(one.picture)
    small = ' class="small"' if max(one.picture.size) <= PIXELATED_SIDE else ""
    others = " · ".join(f"{escape(name)} {share(percent)}" for name, percent in one.others)
    right = "" if tick.right is None else "y" if tick.right else "n"
    return (
        f'<li class="card" tabindex="-1" data-row="{escape(csv_row(tick))}" data-teacher="{escape(tick.teacher)}" '
        f'data-key="{escape(tick.key)}" data-right="{right}" data-class="{escape(tick.named or "")}">'
        f'<img{small} alt="picture {tick.number}" src="{data_uri(pixels, largest_side=LARGEST_SIDE)}">'
        f'<div class="words"><p class="said"><b>{escape(tick.teacher)}</b> {share(tick.confidence)}</p>'
        f'<p class="others">{others}</p>'
        '<div class="ask scripted" hidden><button class="yes" type="button">Right</button>'
        '<button class="no" type="button">Wrong</button>'
        '<input list="classes" aria-label="its right name" placeholder="its name, if known" autocomplete="off" '
        'spellcheck="false" hidden></div>'
        f'<p class="file"><span>{tick.number}</span> {escape(tick.file)}</p></div></li>'
    )


def share(percent: str) -> str:
    """Return a confidence that no line break can part from its unit."""
    return f"{escape(percent)}&nbsp;%"


BAR = (
    '<div class="bar scripted" hidden><div><progress value="0" max="1"></progress><b class="count"></b>'
    '<span class="keys"><kbd>y</kbd> right &nbsp;<kbd>n</kbd> wrong, then a name or nothing and <kbd>Enter</kbd> '
    "&nbsp;<kbd>←</kbd> <kbd>→</kbd> move &nbsp;<kbd>Del</kbd> clear</span>"
    '<span class="told" role="status"></span><button class="save" type="button">Save ticks.csv</button></div></div>'
)

MORE_CSS = """
[hidden] { display: none !important; }
code, kbd { font: 0.88em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { overflow-wrap: anywhere; color: var(--ink); }
kbd { padding: 0 5px; border: 1px solid var(--rule); border-radius: 4px; background: var(--soft); color: var(--ink); }
.how { margin: 10px 0 8px; max-width: 50em; color: var(--muted); }
.bar { position: sticky; top: 0; z-index: 1; background: var(--card); border-block: 1px solid var(--rule); }
.bar > div { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 16px; max-width: 1120px; margin: 0 auto;
  padding: 9px 24px; }
.bar .count { font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar .keys { color: var(--muted); font-size: 13px; }
.bar .told { color: var(--warn); font-size: 13px; }
progress { width: 130px; height: 8px; appearance: none; border: 0; border-radius: 4px; overflow: hidden;
  background: var(--rule); }
progress::-webkit-progress-bar { background: var(--rule); }
progress::-webkit-progress-value { background: var(--accent); }
progress::-moz-progress-bar { background: var(--accent); }
button, .ask input { font: inherit; font-size: 14px; padding: 5px 12px; border: 1px solid var(--rule);
  border-radius: 7px; background: var(--card); color: var(--ink); }
button { cursor: pointer; }
button:hover { background: var(--soft); }
.save { margin-left: auto; font-weight: 600; border-color: var(--accent); color: var(--accent); }
main { padding-top: 20px; padding-bottom: 60px; }
.sheet { grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 14px; }
.sheet .card { display: flex; flex-direction: column; scroll-margin: 64px 0 12px; outline: none; }
.sheet .words { display: flex; flex-direction: column; flex: 1; padding: 10px 12px 12px; }
.words p { margin: 0; overflow-wrap: anywhere; }
.said { font-size: 13px; color: var(--muted); line-height: 1.35; }
.said b { font-size: 15px; font-weight: 650; color: var(--ink); }
.others { margin-top: 2px; color: var(--muted); font-size: 12px; }
.words .file { padding-top: 9px; color: var(--muted); font-size: 11.5px; line-height: 1.35; }
.file span { display: inline-block; min-width: 1.6em; font-weight: 600; color: var(--ink); }
.ask { display: grid; grid-template-columns: 1fr 1fr; gap: 7px; margin-top: auto; padding-top: 10px; }
.ask input { grid-column: 1 / -1; min-width: 0; width: 100%; cursor: text; }
.ask input.bad { border-color: var(--bad); outline-color: var(--bad); color: var(--bad); }
.card[data-right="y"] .yes { border-color: var(--good); background: var(--good-soft); color: var(--good); }
.card[data-right="n"] .no { border-color: var(--bad); background: var(--bad-soft); color: var(--bad); }
.card.current { border-color: var(--accent); box-shadow: 0 0 0 1px var(--accent); }
@media (max-width: 760px) {
  .bar > div { padding: 8px 16px; } .bar .keys { display: none; }
  progress { flex: 1; min-width: 40px; }
  .sheet { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; }
  .ask button { padding-inline: 4px; }
}
@media print { .bar, .ask { display: none !important; } }
"""

# The state of a card is in its data-right and data-class; the CSV is put together from them and the ready-made rows.
SCRIPT = """
"use strict";
const cards = [...document.querySelectorAll(".card")], sample = document.body.dataset.sample;
const place = "prgkit-audit-" + sample, told = document.querySelector(".told");
const plain = name => name.normalize("NFC").replaceAll("_", " ").trim().split(/\\s+/).join(" ").toLowerCase();
const classes = new Map([...document.querySelectorAll("#classes option")].map(one => [plain(one.value), one.value]));
let current = 0, unsaved = false;  // unsaved: neither in a file nor kept by the browser

function remember() {
  const kept = {};
  for (const card of cards) if (card.dataset.right) kept[card.dataset.key] = [card.dataset.right, card.dataset.class];
  try { localStorage.setItem(place, JSON.stringify({base: document.body.dataset.base, kept})); }
  catch { unsaved = true; told.textContent = "This browser keeps nothing: save before you leave."; }
}

function recall() {
  let saved = null;
  try { saved = JSON.parse(localStorage.getItem(place)); } catch { return; }
  if (!saved || !saved.kept) return;
  const same = saved.base === document.body.dataset.base;
  if (same) for (const card of cards) card.dataset.right = card.dataset.class = "";
  for (const card of cards) {
    const kept = saved.kept[card.dataset.key];
    if (kept && !card.dataset.right) [card.dataset.right, card.dataset.class] = kept;
  }
}

function name(card) {  // the class that was typed, "" for none, null for one that is none
  const typed = card.dataset.class;
  if (card.dataset.right !== "n" || !typed.trim()) return "";
  const found = classes.get(plain(typed));
  return found === undefined || found === card.dataset.teacher ? null : found;
}

function show(card) {
  const input = card.querySelector("input"), wrong = card.dataset.right === "n", bad = name(card) === null;
  input.hidden = !wrong;
  if (input.value !== card.dataset.class) input.value = card.dataset.class;
  input.classList.toggle("bad", bad);
  const why = classes.has(plain(input.value)) ? "that is the teacher's answer" : "no class has this name";
  input.title = bad ? why : "";
  card.querySelector(".yes").ariaPressed = card.dataset.right === "y";
  card.querySelector(".no").ariaPressed = wrong;
}

function count() {
  const done = cards.filter(card => card.dataset.right).length;
  document.querySelector(".count").textContent = `${done} of ${cards.length}`;
  Object.assign(document.querySelector("progress"), {max: cards.length, value: done});
}

function tick(card, right, named = "") {
  [card.dataset.right, card.dataset.class] = [right, named];
  told.textContent = "";
  show(card); count(); remember();
}

function go(to, {scroll = true} = {}) {
  cards[current].classList.remove("current");
  current = Math.max(0, Math.min(cards.length - 1, to));
  cards[current].classList.add("current");
  if (!scroll) return;
  cards[current].focus({preventScroll: true});
  cards[current].scrollIntoView({block: "nearest"});
}

function row(step) {  // the card above or below: the nearest in the next row
  const here = cards[current].getBoundingClientRect();
  const there = cards.map((card, index) => [card.getBoundingClientRect(), index]);
  const beyond = there.filter(([box]) => step * (box.top - here.top) > 1);
  const cost = ([box]) => Math.abs(box.top - here.top) * 1e4 + Math.abs(box.left - here.left);
  if (beyond.length) go(beyond.reduce((best, one) => cost(one) < cost(best) ? one : best)[1]);
}

function refuse(index) {
  go(index);
  const input = cards[index].querySelector("input");
  told.textContent = `${index + 1}: ${input.title}.`;
  input.focus();
}

function save() {
  const bad = cards.findIndex(card => name(card) === null);
  if (bad >= 0) return refuse(bad);
  const cell = text => /[",\\r\\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  const guard = text => /^[=+@\\t\\r-]/.test(text) ? "'" + text : text;
  const rows = cards.map(card => `${card.dataset.row},${card.dataset.right},${cell(guard(name(card)))}\\r\\n`);
  const text = "\\ufeff" + document.body.dataset.header + "\\r\\n" + rows.join("");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "text/csv;charset=utf-8"}));
  link.download = "ticks.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  unsaved = false;
  told.textContent = "Saved among your downloads.";
}

cards.forEach((card, index) => {
  const input = card.querySelector("input");
  card.addEventListener("pointerdown", () => go(index, {scroll: false}));
  card.querySelector(".yes").onclick = () => tick(card, card.dataset.right === "y" ? "" : "y");
  card.querySelector(".no").onclick = () => {
    tick(card, card.dataset.right === "n" ? "" : "n");
    if (card.dataset.right === "n") input.focus();
  };
  input.onfocus = () => go(index, {scroll: false});
  input.oninput = () => tick(card, "n", input.value);
  input.onkeydown = event => {
    event.stopPropagation();
    if (event.key === "Enter") name(card) === null ? refuse(index) : go(index + 1);
    if (event.key === "Escape") go(index);
  };
  show(card);
});

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const card = cards[current], moves = {ArrowLeft: () => go(current - 1), ArrowRight: () => go(current + 1),
    ArrowUp: () => row(-1), ArrowDown: () => row(1), y: () => { tick(card, "y"); go(current + 1); },
    n: () => { tick(card, "n", card.dataset.class); go(current); card.querySelector("input").focus(); },
    Delete: () => tick(card, ""), Backspace: () => tick(card, "")};
  const move = moves[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (move) { event.preventDefault(); move(); }
});
document.querySelector(".save").onclick = save;
addEventListener("beforeunload", event => { if (unsaved) event.preventDefault(); });
document.querySelectorAll(".scripted").forEach(part => { part.hidden = false; });
recall();
cards.forEach(show);
count();
const first = cards.findIndex(card => !card.dataset.right);
go(first > 0 ? first : 0, {scroll: first > 0});
"""
