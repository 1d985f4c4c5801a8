// The state of a card is in its data-right and data-class; the CSV is put together from them and the ready-made rows.
"use strict";
const cards = [...document.querySelectorAll(".card")], sample = document.body.dataset.sample;
const place = "prgkit-audit-" + sample, message = document.querySelector(".status");
const plain = name => name.normalize("NFC").replaceAll("_", " ").trim().split(/\s+/).join(" ").toLowerCase();
const classes = new Map([...document.querySelectorAll("#classes option")].map(one => [plain(one.value), one.value]));
let current = 0, unsaved = false;  // unsaved: neither in a file nor kept by the browser

function remember() {
  const kept = {};
  for (const card of cards) if (card.dataset.right) kept[card.dataset.key] = [card.dataset.right, card.dataset.class];
  try { localStorage.setItem(place, JSON.stringify({base: document.body.dataset.base, kept})); }
  catch { unsaved = true; message.textContent = "This browser keeps nothing: save before you leave."; }
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
  message.textContent = "";
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
  message.textContent = `${index + 1}: ${input.title}.`;
  input.focus();
}

function save() {
  const bad = cards.findIndex(card => name(card) === null);
  if (bad >= 0) return refuse(bad);
  const cell = text => /[",\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  const guard = text => /^[=+@\t\r-]/.test(text) ? "'" + text : text;
  const rows = cards.map(card => `${card.dataset.row},${card.dataset.right},${cell(guard(name(card)))}\r\n`);
  const text = "\ufeff" + document.body.dataset.header + "\r\n" + rows.join("");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "text/csv;charset=utf-8"}));
  link.download = "ticks.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  unsaved = false;
  message.textContent = "Saved among your downloads.";
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
