"""The sheet: complete, well-formed, self-contained, safe from what it shows; and ticked in a real browser, if any."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prgkit.annotation.sheet import Card, sheet
from prgkit.data.ticks import Tick, read_ticks, write_ticks

EVIL = "=1+1,\"><script>document.title = 'evil'</script>\n'&.jpg"
CLASSES = ("cat", 'a "dog", <b>big</b>', "-fox", "Löwe")
VOID = {"meta", "img", "input", "option"}


def ticks(count: int = 5) -> list[Tick]:
    return [Tick(n, EVIL if n == 2 else f"{n}.jpg", f"{n:032x}", CLASSES[n % 4], "91.2") for n in range(1, count + 1)]


def made(given: list[Tick], **changes: Any) -> str:
    cards = [Card(tick, Image.new("RGB", (8 + 200 * (tick.number % 2), 8)), [("cat", "5.0")]) for tick in given]
    facts = {"title": "Right?", "about": "5 of 90", "classes": CLASSES, "ticks_file": "runs/a/audit/ticks.csv",
             "made_from": "0123", "base": "4567", **changes}  # fmt: skip
    return sheet(cards, **facts)


class Reader(HTMLParser):
    """Every element closed in order; collects tags, references and the cards' attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.cards: list[dict[str, str | None]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.cards += [dict(attrs)] if ("class", "card") in attrs else []
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_image_is_there_and_the_page_needs_nothing_else() -> None:
    page = made(ticks())
    read = Reader(page)
    assert [card["data-key"] for card in read.cards] == [tick.key for tick in ticks()]
    assert read.tags.count("img") == 5
    assert all(link.startswith("data:image/") for link in read.links)
    assert page.count("data:image/png") == 2  # small ones are exact, and drawn with crisp pixels
    assert page.count('<img class="small"') == 2
    assert "http" not in page
    assert "url(" not in page
    assert "@import" not in page


def test_a_heat_map_stands_beside_its_picture() -> None:
    heat_map = np.zeros((224, 224, 3), np.uint8)
    cards = [Card(tick, Image.new("RGB", (8, 8)), [], heat_map if tick.number == 2 else None) for tick in ticks(3)]
    facts = {"title": "Right?", "about": "", "classes": CLASSES, "ticks_file": "t", "made_from": "0", "base": "1"}
    page = sheet(cards, **facts)
    assert Reader(page).tags.count("img") == 4
    assert page.count('<div class="beside">') == 1
    assert '<ol class="sheet wide">' in page
    assert '<img alt="where the student finds -fox in picture 2" src="data:image/jpeg' in page
    assert '<ol class="sheet">' in made(ticks())


def test_a_class_named_like_a_script_is_shown_as_text() -> None:
    name = "<script>alert(1)</script>"
    page = made([Tick(1, "1.jpg", "0" * 32, name, "91.2")], classes=[name])
    assert Reader(page).tags.count("script") == 1  # its own
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4  # its row, its answer, the text, and the classes
    assert "<b>&lt;script&gt;alert(1)&lt;/script&gt;</b>" in page


def test_what_came_from_outside_is_escaped_everywhere() -> None:
    hostile = [Tick(1, EVIL, "0" * 32, EVIL, EVIL, right=False, named=EVIL)]
    page = made(hostile, title=EVIL, about=EVIL, classes=[EVIL], ticks_file=EVIL, made_from=EVIL, base=EVIL)
    read = Reader(page)
    assert read.tags.count("script") == 1  # its own
    assert "<script>document" not in page
    assert read.cards[0]["data-teacher"] == EVIL


def test_without_a_script_it_is_a_list_to_tick_beside_the_csv() -> None:
    page = made(ticks())
    for part in re.findall(r'<[^>]*class="[^"]*scripted[^>]*>', page):
        assert part.endswith(" hidden>")
    said = page[page.index("<noscript>") : page.index("</noscript>")]
    assert "tick in <code>runs/a/audit/ticks.csv</code>: in the row with a picture's number, write y or n" in said
    assert "<span>3</span> 3.jpg</p>" in page


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PLAY = """<script>
const pressed = (key, where = document) => where.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const counted = () => document.querySelector(".count").textContent;
const out = {before: counted(), title: document.title};
let text = "";
URL.createObjectURL = blob => {
  blob.arrayBuffer().then(bytes => { text = [...new Uint8Array(bytes)]; });
  return "#";
};
pressed("y");                                              // 1: right
pressed("n");                                              // 2: wrong, and its name
const input = document.activeElement;
out.asks = input.tagName;
input.value = "nothing"; input.oninput();
document.querySelector(".save").click();
out.refused = document.querySelector(".status").textContent;
input.value = "LÖWE"; input.oninput();
pressed("Enter", input);
pressed("n"); pressed("Escape", document.activeElement);   // 3: wrong, nobody knows
pressed("ArrowRight"); pressed("Y");                       // 4: right
pressed("y"); pressed("Delete");                           // 5: right, no, not ticked
out.after = counted();
document.querySelector(".save").click();
out.kept = JSON.parse(localStorage.getItem(place));
const state = () => cards.map(card => card.dataset.right || "-").join("");
const blank = () => cards.forEach(card => { card.dataset.right = card.dataset.class = ""; });
blank(); cards[4].dataset.right = "y"; recall();
out.same = state();                                        // what the browser keeps is the latest
blank(); cards[0].dataset.right = "n"; document.body.dataset.base = "other"; recall();
out.other = state();                                       // the CSV was ticked since: it goes first
setTimeout(() => {
  out.csv = text;
  document.body.innerHTML = "<pre id=out></pre>";
  document.querySelector("#out").textContent = JSON.stringify(out);
}, 200);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_ticks_keeps_and_saves_what_the_csv_reader_reads(tmp_path: Path) -> None:
    page = tmp_path / "sheet.html"
    page.write_text(made(ticks()).replace("</body>", f"{PLAY}</body>"), encoding="utf-8")
    found = browsed(page, tmp_path / "profile")
    assert (found["before"], found["after"], found["asks"]) == ("0 of 5", "4 of 5", "INPUT")
    assert found["title"] == "Right?"
    assert found["refused"] == "2: no class has this name."
    assert found["kept"]["base"] == "4567"
    assert found["kept"]["kept"][f"{2:032x}"] == ["n", "LÖWE"]
    assert (found["same"], found["other"]) == ("ynny-", "nnny-")
    saved = tmp_path / "ticks.csv"
    saved.write_bytes(bytes(found["csv"]))
    read = read_ticks(saved, CLASSES)
    assert [(tick.right, tick.named) for tick in read] == [
        *((True, None), (False, "Löwe"), (False, None), (True, None), (None, None)),
    ]
    write_ticks(tmp_path / "ours.csv", read)
    assert saved.read_bytes() == (tmp_path / "ours.csv").read_bytes()  # the same file, whoever wrote it


def browsed(page: Path, profile: Path) -> Any:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command = [str(CHROMIUM), *options, f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, check=True, timeout=60)
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:]
    return json.loads(html.unescape(found[1]))
