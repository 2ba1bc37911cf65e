#!/usr/bin/env python3
"""Draws what the laboratory and the gradient step have measured: one page to look at, and to play
with.

    tests/lab model.bin trip -i "..." -V 1 -o trip.csv
    tests/lab model.bin explore -i "..." -o explore.csv
    tests/lab model.bin probe -i "..." -V .5 -o probe.csv
    train_step model.bin -t words.csv -a losses.csv
    python3 tests/laboratory/page.py trip.csv explore.csv probe.csv words.csv losses.csv -o lab.html

or `make page`, which does all of it. Any of these files will do, in any order and number: what a
table is, its first line says. The page is one file that stands alone. It needs no network and no
library, and any browser opens it from the disk.

The way of a number:

    CSV -> read_table -> tables of text -> trip_of, ... -> plain data -> JSON in the page -> script

Nothing is computed on this way. The JSON has every number as the CSV has it, and what is drawn is
drawn by the script at the end of this file, in the browser, each time a slider moves.

What comes out of a language model is any text at all, and some of it looks like HTML. So no text
is ever put together with markup: in the page it is a string of the JSON, without a single `<`, and
the script hands it to the browser as text.

    1  reading       tables, and what goes wrong with them
    2  recognising   trip, explore, probe, words, losses
    3  the page      its parts, and how they are joined
    4  the look      CSS
    5  the drawing   JavaScript
"""

import argparse
import csv
import json
import math
import os
import sys

# =================================================================================================
# 1  Reading


class Wrong(Exception):
    """Something that the user has to know; its text is the one line that is shown."""


def read_table(path):
    """The first line of a CSV file and all others, each a list of texts.

    A model may write half a character: a few bytes that are no UTF-8. They become U+FFFD, the sign
    for what cannot be read, as on a terminal. A zero byte would end the reading in older Pythons,
    and becomes the same sign.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as stream:
            lines = [line.replace("\0", "\ufffd") for line in stream]
    except OSError as error:
        raise Wrong("%s cannot be read: %s" % (path, error.strerror))
    csv.field_size_limit(1 << 30)       # a text may be long
    try:
        rows = list(csv.reader(lines, strict=True))
    except csv.Error as error:
        raise Wrong("%s is not a CSV file: %s" % (path, error))
    if len(rows) < 2:
        raise Wrong("%s has no rows" % path)
    header = rows.pop(0)
    if len(header) == 1 and ";" in header[0]:
        raise Wrong("%s has semicolons between its cells, as spreadsheets may: save it with "
                    "commas, and with a point as the decimal sign" % path)
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise Wrong("%s: row %d has %d cells, the first line has %d; is it whole?"
                        % (path, i + 1, len(row), len(header)))
    return header, rows


def number(text):
    """The number in a cell. Whole ones lose their ".0", to keep the page small."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 1 << 53 else value


def finite(text):
    """A number in a cell that must have one."""
    value = number(text)
    if not math.isfinite(value):
        raise ValueError("%s is no number" % text)
    return value


def check(condition):
    """A table that is not as the programs write it is not drawn: it would look like a result."""
    if not condition:
        raise ValueError("something is missing or in the wrong order")


# =================================================================================================
# 2  Recognising
#
# Each function takes the first line and the rows of a table, and returns what the script draws.
# All of them are strict. A ValueError says that the table is none of theirs after all.

TRIP = "site kind place theta level distance token sober drugged".split()
EXPLORE = "method strength seed distinct prefix angle diversity log-probability text".split()
PROBE = "position token agreement probability".split()
LOSSES = ["step size", "lesson", "first order", "its sequel", "other text"]


def trip_of(header, rows):
    """A trip, in long lists in which the level (or the token) runs fastest, then theta, then place.

    A model of 30 layers has some 60,000 distances; without names around them they are 700 KB.
    """
    injections = {}                     # (kind, place, theta) -> distances, tokens
    tokens = []                         # (text, sober probability), the same for all
    for site, kind, place, theta, level, distance, token, sober, drugged in rows:
        levels, chances = injections.setdefault((kind, int(place), finite(theta)), ([], []))
        if level:
            check(int(level) == len(levels))
            levels.append(finite(distance))
        else:
            one = (token, finite(sober))
            if len(chances) == len(tokens) and len(injections) == 1:
                tokens.append(one)
            check(tokens[len(chances):][:1] == [one])
            chances.append(finite(drugged))
    n_levels = len(next(iter(injections.values()))[0])
    thetas = sorted({theta for _, _, theta in injections})
    trip = {"site": site, "layers": n_levels - 1, "thetas": thetas, "distance": {}, "drugged": {},
            "tokens": [token for token, _ in tokens], "sober": [sober for _, sober in tokens]}
    check(n_levels > 1 and len(injections) == 2 * (n_levels - 1) * len(thetas))
    for kind in "window", "stack":
        distance = trip["distance"][kind] = []
        drugged = trip["drugged"][kind] = []
        for place in range(n_levels - 1):
            for theta in thetas:
                check((kind, place, theta) in injections)
                levels, chances = injections[kind, place, theta]
                check(len(levels) == n_levels and len(chances) == len(tokens))
                distance += levels
                drugged += chances
    return trip


def explore_of(header, rows):
    """The methods with their cells. Many texts are the same, so each is kept once, with a number.

    A seed is a name, not an amount: it stays text.
    """
    texts = {}                          # text -> its number
    methods = {}                        # name -> {strength: cell}
    for name, strength, seed, distinct, prefix, angle, diversity, log_p, text in rows:
        cell = methods.setdefault(name, {}).setdefault(finite(strength), {
            "strength": finite(strength), "distinct": finite(distinct), "prefix": finite(prefix),
            "angle": finite(angle), "diversity": finite(diversity), "likelihood": finite(log_p),
            "seeds": [], "texts": []})
        cell["seeds"].append(seed)
        cell["texts"].append(texts.setdefault(text, len(texts)))
    sober = list(methods.pop("sober", {}).values())
    check(len(sober) == 1 and methods)
    seeds = sober[0]["seeds"]
    cells = [cell for method in methods.values() for cell in method.values()] + sober
    for cell in cells:
        check(cell.pop("seeds") == seeds)
    return {"seeds": seeds, "texts": list(texts), "sober": sober[0],
            "methods": [{"name": name, "cells": list(method.values())}
                        for name, method in methods.items()]}


def probe_of(header, rows):
    """A text, token by token."""
    return {"position": [int(row[0]) for row in rows],
            "tokens": [row[1] for row in rows],
            "agreement": [finite(row[2]) for row in rows],
            "probability": [finite(row[3]) for row in rows]}


def losses_of(header, rows):
    """A column of losses for each text. Where there is nothing to measure stands null; ruin may be
    infinite, which JSON cannot say but by a word."""
    def loss(text):
        value = number(text)
        if math.isnan(value):
            return None
        return value if math.isfinite(value) else "infinite"
    return {"sizes": [finite(row[0]) for row in rows],
            "losses": [[loss(row[i]) for row in rows] for i in range(1, len(header))]}


def words_of(header, rows):
    """The words after each step size. Short columns end in empty cells, which are no words."""
    return {"sizes": [finite(size) for size in header],
            "words": [[row[i] for row in rows if row[i]] for i in range(len(header))]}


def recognise(path):
    """What a file is, and its data. The first line says it: a table of words has step sizes there,
    all others have names."""
    header, rows = read_table(path)
    kinds = [(TRIP, "trip", trip_of), (EXPLORE, "explore", explore_of),
             (PROBE, "probe", probe_of), (LOSSES, "losses", losses_of)]
    try:
        for names, kind, convert in kinds:
            if header == names:
                return kind, convert(header, rows)
        data = words_of(header, rows)
    except (ValueError, OverflowError) as error:
        known = header in [names for names, _, _ in kinds]
        why = str(error) if known else "it is no table of tests/lab or train_step"
        raise Wrong("%s cannot be drawn: %s" % (path, why))
    return "words", data


def sections_of(paths):
    """(kind, names of the files, data) of each section, in the order of the page.

    Words and losses of the same step sizes tell one story, and become one section.
    """
    found = [(kind, os.path.basename(path), data)
             for path in paths for kind, data in [recognise(path)]]
    sections = [(kind, [name], data) for kind, name, data in found
                if kind not in ("words", "losses")]
    losses = [(name, data) for kind, name, data in found if kind == "losses"]
    for kind, name, data in found:
        if kind != "words":
            continue
        names = [name]
        for other in losses[:]:
            if other[1]["sizes"] == data["sizes"] and "losses" not in data:
                data = dict(data, **other[1])
                names.append(other[0])
                losses.remove(other)
        sections.append(("step", names, data))
    sections += [("step", [name], data) for name, data in losses]
    order = ["trip", "explore", "probe", "step"]
    return sorted(sections, key=lambda section: order.index(section[0]))


# =================================================================================================
# 3  The page
#
# Words in capitals between two @ are holes. They are filled with other parts of the page, or with
# what text_in_html has made harmless.

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>A model on DRµGS</title>
<style>@STYLE@</style>
</head>
<body>
<svg class="patterns" width="0" height="0" aria-hidden="true">
<pattern id="kept" width="7" height="14" patternUnits="userSpaceOnUse">
<path d="M3.5 1V13"></path></pattern>
<pattern id="lost" width="7" height="14" patternUnits="userSpaceOnUse">
<path d="M1 7H6"></path></pattern>
<pattern id="won" width="7" height="14" patternUnits="userSpaceOnUse">
<path d="M.5 7H6.5M3.5 4V10"></path></pattern>
</svg>
<header>
<h1>A model on DRµGS</h1>
<p>What random turns of hidden vectors, and one gradient step, do to a Llama. Everything on this
page was measured; move the sliders to look at it.</p>
@NOTE@
<nav aria-label="Experiments">@LINKS@</nav>
<noscript><p>The pictures are drawn by a script in this file. Please allow it.</p></noscript>
</header>
<main>
@SECTIONS@
</main>
<script>@SCRIPT@</script>
</body>
</html>
"""

SECTION = """<section class="@KIND@" id="@ID@" aria-labelledby="@ID@-title">
<h2 id="@ID@-title">@TITLE@</h2>
<p class="file">@FILES@</p>
@BODY@
<script type="application/json">@DATA@</script>
</section>
"""

# A slider with its name and what it stands at. The script knows how far it goes.
SLIDER = """<label class="slider" data-control="@NAME@"><span>@LABEL@</span>
<input type="range" min="0" step="1" autocomplete="off"><output></output></label>"""

TITLES = {
    "trip": "The trip: how far does a glitch carry?",
    "explore": "The explorer: what does a dose do to whole texts?",
    "probe": "The probe: does the answer survive the noise?",
    "step": "The step: what does one lesson teach, and what does it cost?",
}

BODIES = {
    "trip": """\
<p>One site, <b class="site"></b>, is dosed in a few layers; everything else is computed as
always. At every level the hidden state of the last token is compared with that of a sober twin: 1
− cosine is 0 where nothing has arrived, and about half the square of the angle. Level 0 is the
embedding, level l + 1 is what leaves layer l. Look for a peak behind the dosed layers, and
whether the layers above calm it down.</p>
<div class="controls">
@place@
@theta@
<fieldset data-control="kind"><legend>dosed are</legend></fieldset>
<fieldset data-control="scale"><legend>full shade is the largest</legend></fieldset>
</div>
<div class="figures">
<figure class="by-theta"><figcaption></figcaption></figure>
<figure class="by-place"><figcaption></figcaption></figure>
<figure class="profile"><figcaption></figcaption></figure>
<figure class="next"><figcaption></figcaption></figure>
</div>
<p class="readout" aria-live="polite"></p>""",

    "explore": """\
<p>Each method makes texts different: a dose at one of the sites of the network, temperature, or
plain noise on the logits. Every strength was tried with the same seeds.</p>
<div class="controls">
<fieldset data-control="method"><legend>method</legend></fieldset>
@strength@
@seed@
</div>
<div class="texts">
<figure><figcaption>sober</figcaption><blockquote class="before"></blockquote></figure>
<figure><figcaption class="what"></figcaption><blockquote class="after"></blockquote></figure>
</div>
<p class="key"><del>struck out</del>: only in the sober text. <ins>Underlined</ins>: only in the
other one.</p>
<p class="readout" aria-live="polite"></p>
<figure class="curves"><figcaption>What makes texts more various makes them less likely. The
honest comparison: at the same diversity, whose texts does the sober model find likelier? Higher
is better. Each line is a method, each mark on it a strength.</figcaption></figure>""",

    "probe": """\
<p>The sober model wrote this text. Drugged twins read it, too, and were asked at every token what
they would have written. The stronger its shade, the fewer agree. Point at one, or walk through
the text with the arrow keys.</p>
<div class="controls">@token@</div>
<blockquote class="tokens"></blockquote>
<p class="readout" aria-live="polite"></p>
<figure class="scatter"><figcaption>Agreement is not the same as probability: a token may be a
close decision that no twin doubts. Each mark is a token.</figcaption></figure>""",

    "step": """\
<p>The model has seen one sentence, once, and took a single step down its gradient. How far a step
goes is the step size: too small, and nothing is learned; too large, and nothing is left.</p>
<div class="controls">@size@</div>
<div class="texts">
<figure><figcaption class="base"></figcaption><blockquote class="before"></blockquote></figure>
<figure><figcaption class="what"></figcaption><blockquote class="after"></blockquote></figure>
</div>
<p class="key"><del>struck out</del>: only in the text on the left or above.
<ins>Underlined</ins>: only in the other one.</p>
<table class="readout" aria-live="polite"></table>
<figure class="losses"><figcaption>Plasticity and stability. The lesson's loss should fall while
the others stay where they are. The first order is what the slope had promised; it leaves the
picture where it promises less than nothing.</figcaption></figure>""",
}

SLIDERS = {"place": "layer", "theta": "angle θ, radians", "strength": "strength", "seed": "seed",
           "token": "token", "size": "step size"}


def text_in_html(text):
    """Text that means itself, also between quotes."""
    for sign, name in ("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;"):
        text = text.replace(sign, name)
    return text


def json_in_html(data):
    """JSON that no text can break out of.

    A script element ends at `</script`, wherever that stands, and `<!--` changes what is inside.
    So there is no `<` at all: a string may spell it as a number. All that is not ASCII is spelt so,
    too.
    """
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, "\\u%04x" % ord(sign))
    return text


def fill(template, **parts):
    """A template with its holes filled. What was filled in is not searched for holes again."""
    pieces = template.split("@")
    for i in range(1, len(pieces), 2):
        pieces[i] = parts[pieces[i]]
    return "".join(pieces)


def body_of(kind):
    """What stands in a section before the script has drawn."""
    sliders = {name: fill(SLIDER, NAME=name, LABEL=label) for name, label in SLIDERS.items()}
    return fill(BODIES[kind], **sliders)


def page_of(sections, note):
    """The whole page, as text."""
    links = []
    parts = []
    for i, (kind, files, data) in enumerate(sections):
        name = "%s-%d" % (kind, i + 1)
        links.append('<a href="#%s">%s</a>' % (name, TITLES[kind].split(":")[0]))
        parts.append(fill(SECTION, KIND=kind, ID=name, TITLE=TITLES[kind],
                          FILES=text_in_html(", ".join(files)), BODY=body_of(kind),
                          DATA=json_in_html(data)))
    return fill(PAGE, STYLE=STYLE, SCRIPT=SCRIPT, LINKS="\n".join(links),
                SECTIONS="\n".join(parts),
                NOTE='<p class="note">%s</p>' % text_in_html(note) if note else "")


def write_page(path, text):
    """Writes the page. A half character in the name of a file becomes a question mark."""
    try:
        with open(path, "w", encoding="utf-8", errors="replace") as stream:
            stream.write(text)
    except OSError as error:
        raise Wrong("%s cannot be written: %s" % (path, error.strerror))


def main():
    parser = argparse.ArgumentParser(
        description="One page out of the tables that tests/lab and train_step write.")
    parser.add_argument("tables", nargs="+", metavar="table.csv")
    parser.add_argument("-o", dest="out", required=True, metavar="page.html")
    parser.add_argument("-n", dest="note", default="", metavar="note",
                        help="a sentence for the top of the page: which model, which prompt")
    options = parser.parse_args()
    if not options.out.endswith(".html"):
        parser.error("-o takes a file that ends in .html; got '%s'" % options.out)
    try:
        write_page(options.out, page_of(sections_of(options.tables), options.note))
    except Wrong as wrong:
        print("page: " + " ".join(str(wrong).split()), file=sys.stderr)
        return 1
    return 0


# =================================================================================================
# 4  The look
#
# Two inks on one paper, and for dark rooms the same the other way round; in print both are black.
# Shades are the second ink, more or less transparent: so they are right on any paper, and stronger
# is always more. Nothing is said by colour alone: lines differ in their dashes and marks, words in
# the lines under or through them.

STYLE = """
/* paper and ink */
:root {
    --paper: #fdfcf9;
    --panel: #ffffff;
    --ink: #1d1c1a;
    --soft: #66625a;
    --line: #d8d3c8;
    --strong: #0a4a86;
    --strong-rgb: 10, 74, 134;
}
@media (prefers-color-scheme: dark) {
    :root {
        --paper: #15171a;
        --panel: #1c1f23;
        --ink: #eae6dd;
        --soft: #a49e92;
        --line: #3d4047;
        --strong: #ffc35c;
        --strong-rgb: 255, 195, 92;
    }
}
@media print {
    :root {
        --paper: #fff;
        --panel: #fff;
        --ink: #000;
        --soft: #333;
        --line: #aaa;
        --strong: #000;
        --strong-rgb: 0, 0, 0;
    }
}

/* the page and its sections */
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body {
    margin: 0 auto;
    max-width: 70rem;
    padding: 1.5rem 1.25rem 4rem;
    background: var(--paper);
    color: var(--ink);
    font: 1rem/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif;
}
h1 {
    font-size: 2rem;
    line-height: 1.2;
    margin: .5rem 0;
    letter-spacing: -.01em;
}
h2 {
    font-size: 1.35rem;
    line-height: 1.25;
    margin: 0;
}
p { max-width: 44rem; margin: .6rem 0; }
nav {
    display: flex;
    flex-wrap: wrap;
    gap: .25rem 1.25rem;
}
a { color: var(--strong); }
.note, .file, .key { color: var(--soft); font-size: .875rem; }
.file {
    margin: 0;
    font-family: ui-monospace, "DejaVu Sans Mono", monospace;
    font-size: .8rem;
}
.patterns { position: absolute; }
section {
    background: var(--panel);
    border: 1px solid var(--line);
    border-radius: .5rem;
    margin: 1.5rem 0;
    padding: 1.25rem 1.5rem;
}
:focus-visible {
    outline: 3px solid var(--strong);
    outline-offset: 2px;
    border-radius: 2px;
}

/* what can be moved */
.controls {
    display: flex;
    flex-wrap: wrap;
    gap: .5rem 2rem;
    align-items: flex-start;
    margin: 1rem 0;
}
fieldset {
    border: 0;
    margin: 0;
    padding: 0;
    display: flex;
    flex-wrap: wrap;
    gap: .1rem .9rem;
    align-items: center;
}
legend { padding: 0; }
legend, .slider span { font-size: .8rem; color: var(--soft); }
fieldset label {
    display: inline-flex;
    gap: .3rem;
    align-items: center;
    white-space: nowrap;
}
.slider {
    display: grid;
    grid-template-columns: 1fr auto;
    gap: 0 .75rem;
    flex: 1 1 14rem;
    max-width: 24rem;
    align-items: center;
}
.slider span { grid-column: 1 / 3; }
.slider input { width: 100%; margin: .3rem 0; }
input { accent-color: var(--strong); }
output {
    min-width: 4.5rem;
    font-variant-numeric: tabular-nums;
    font-weight: 600;
}

/* pictures */
.figures, .texts {
    display: grid;
    grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
    gap: 1.25rem 2rem;
}
figure { margin: 0; min-width: 0; }
figcaption {
    font-size: .875rem;
    margin-bottom: .25rem;
    max-width: 44rem;
}
figure svg {
    display: block;
    width: 100%;
    height: auto;
    overflow: visible;
}
svg text {
    fill: var(--ink);
    font-size: 12px;
    font-variant-numeric: tabular-nums;
}
svg .soft { fill: var(--soft); }
svg .axis { stroke: var(--line); fill: none; }
svg .cell { fill: var(--strong); }
svg .frame { stroke: var(--soft); fill: none; }
svg .chosen {
    stroke: var(--ink);
    stroke-width: 2;
    fill: none;
}
svg .halo {
    stroke: var(--panel);
    stroke-width: 4;
    fill: none;
}
svg .dosed { fill: var(--ink); fill-opacity: .09; }
svg .curve {
    fill: none;
    stroke: var(--soft);
    stroke-width: 1.25;
}
svg .mark {
    fill: var(--panel);
    stroke: var(--soft);
    stroke-width: 1.25;
}
svg .here.curve { stroke: var(--strong); stroke-width: 2.75; }
svg .here.mark { stroke: var(--strong); stroke-width: 2; }
svg .base { stroke: var(--ink); }
svg .solid { fill: var(--strong); stroke: none; }
.pickable { cursor: pointer; touch-action: manipulation; }
.patterns path {
    stroke: var(--ink);
    stroke-width: 1.6;
    fill: none;
}
#kept path, #won path { stroke: var(--strong); }
#kept path { stroke-width: 3; }
.sample {
    width: 2.2rem;
    height: 1rem;
    flex: none;
}
.lines {
    display: flex;
    flex-wrap: wrap;
    gap: .1rem 1.25rem;
    font-size: .875rem;
    margin: .4rem 0;
}
.lines span {
    display: inline-flex;
    gap: .4rem;
    align-items: center;
}

/* texts */
blockquote {
    margin: 0;
    padding: .6rem .8rem;
    border-left: 3px solid var(--line);
    white-space: pre-wrap;
    overflow-wrap: anywhere;
    unicode-bidi: isolate;
    font-family: Georgia, "DejaVu Serif", serif;
}
.texts figcaption { font-weight: 600; }
del { color: var(--soft); text-decoration: line-through; }
ins {
    text-decoration: underline;
    text-decoration-thickness: 2px;
    text-underline-offset: 3px;
    color: var(--strong);
    font-weight: 600;
}
.readout { font-variant-numeric: tabular-nums; min-height: 1.5em; }
table.readout { border-collapse: collapse; margin: .6rem 0; }
.readout th, .readout td {
    text-align: right;
    padding: .1rem .75rem;
    border-bottom: 1px solid var(--line);
}
.readout th { font-weight: 400; color: var(--soft); }
.readout th:first-child { text-align: left; padding-left: 0; }
.tokens { font-size: 1.1rem; line-height: 2; }
.tokens span {
    position: relative;
    padding: .15em 0;
    cursor: default;
    border-radius: 2px;
    --doubt: 0;
    background: rgba(var(--strong-rgb), calc(.62 * var(--doubt)));
}
.tokens .chosen { outline: 2px solid var(--ink); outline-offset: 1px; }

/* telephones and paper */
@media (max-width: 40rem) {
    body { padding: .75rem .5rem 3rem; }
    section { padding: 1rem .75rem; }
    h1 { font-size: 1.6rem; }
    .slider { flex-basis: 100%; max-width: none; }
}
@media print {
    body {
        max-width: none;
        padding: 0;
        font-size: 10pt;
    }
    nav { display: none; }
    section { border: 0; padding: 0; }
    section + section { break-before: page; }
    .slider input { display: none; }
    figure, table { break-inside: avoid; }
    * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

# =================================================================================================
# 5  The drawing
#
# One function for each kind of section reads its JSON, sets up its controls, and draws. Whatever
# moves, the whole section is drawn anew, but for maps that are there already: so what is shown can
# only be what the controls say. The controls are the only memory there is.

SCRIPT = r"""
"use strict";

// ---- elements

// Where SVG elements come from is known by the one that stands in the page.
const SVG = document.querySelector("svg").namespaceURI;

function dress(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes))
        node.setAttribute(name, value);
    node.append(...children);       // strings become text, never markup
    return node;
}

function html(name, attributes = {}, ...children) {
    return dress(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
    return dress(document.createElementNS(SVG, name), attributes, children);
}

// Text as it can be shown: for a control character stands the small picture that Unicode has of it.
function visible(text) {
    return text.replace(/[\0-\x09\x0b-\x1f\x7f]/g, sign =>
        String.fromCharCode(sign === "\x7f" ? 0x2421 : 0x2400 + sign.charCodeAt(0)));
}

// A token in a list: the space that many begin with is shown, too.
function tokenName(token) {
    return visible(token).replace(/ /g, "␣").replace(/\n/g, "␊") || "(nothing)";
}

// A number with three digits.
function short(x) {
    if (x === null)
        return "–";
    if (typeof x !== "number")
        return x;
    const size = Math.abs(x);
    if (size > 0 && size < .001 || size >= 1e6)
        return x.toExponential(1).replace("-", "−").replace("e-", "e−");
    return String(Number(x.toPrecision(3))).replace("-", "−");
}

const percent = p => (100 * p).toFixed(1) + " %";

// ---- controls

// A slider with n stops, each of which has a name. Returns its input, whose valueAsNumber is the
// number of a stop; say() writes the name beside it.
function slider(section, name, n, nameOf, first, changed) {
    const label = section.querySelector(`[data-control="${name}"]`);
    const input = label.querySelector("input");
    input.max = n - 1;
    input.value = first;
    input.say = () => {
        const stop = nameOf(input.valueAsNumber);
        label.querySelector("output").textContent = stop;
        input.setAttribute("aria-valuetext", stop);
    };
    input.addEventListener("input", changed);
    return input;
}

// A group of buttons of which one is pressed. Each may have a drawing before its name.
function choice(section, name, labels, first, changed, sample = () => "") {
    const field = section.querySelector(`[data-control="${name}"]`);
    labels.forEach((label, i) => {
        const input = html("input", {type: "radio", name: `${section.id}-${name}`, value: i,
                                     autocomplete: "off"});
        input.checked = i === first;
        input.addEventListener("change", changed);
        field.append(html("label", {}, input, sample(i), label));
    });
    return {get value() { return Number(field.querySelector(":checked").value); },
            set value(i) { field.querySelectorAll("input")[i].checked = true; }};
}

function moveTo(input, value) {
    input.value = value;
    input.dispatchEvent(new Event("input"));
}

// ---- charts

// A scale is where a value stands, from 0 to 1, and the values that are written at the axis.
function bands(n, name) {           // n fields of one width
    const step = Math.max(1, Math.ceil(n / 8));
    const ticks = [...Array(n).keys()].filter(i => i % step === 0);
    return {at: i => (i + .5) / n, ticks: ticks.map(i => [i, name(i)])};
}

function straight(low, high) {
    const raw = (high - low) / 5;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find(x => x * power >= raw);
    const ticks = [];
    for (let i = Math.ceil(low / step); i * step <= high * 1.0001; i++)
        ticks.push([i * step, short(i * step)]);
    return {at: x => (x - low) / (high - low), ticks};
}

// Equal steps are equal factors; low and high are more than 0. As many ticks as there is room for.
function logarithmic(low, high) {
    const decades = Math.log10(high / low);
    const digits = decades > 3 ? [1] : decades > 1 ? [1, 2, 5] : [1, 2, 3, 5, 7];
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
        for (const digit of digits) {
            const value = Number((digit * 10 ** power).toPrecision(1));
            if (value >= low && value <= high)
                ticks.push([value, String(value)]);
        }
    return {at: x => Math.log10(x / low) / decades, ticks};
}

function downward(scale) {          // 0 at the bottom
    return {at: x => 1 - scale.at(x), ticks: scale.ticks};
}

// An empty chart in a figure, as wide as that is, between two axes; what was there before goes. It
// comes with two functions that say where on the paper a value stands.
function chart(figure, height, x, y, xTitle, yTitle) {
    const width = Math.max(280, figure.clientWidth || 480);
    const box = {left: 54, top: 8, right: width - 10, bottom: height - 40};
    const wide = box.right - box.left, high = box.bottom - box.top;
    const node = svg("svg", {class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img",
                             "aria-label": `${yTitle} over ${xTitle}`});
    const X = value => box.left + wide * x.at(value);
    const Y = value => box.top + high * y.at(value);
    const c = {node, box, wide, high, X, Y};
    axes(c, x, y, xTitle, yTitle);
    c.clip = clipped(c);
    figure.querySelector(".chart")?.remove();
    figure.append(node);
    return c;
}

function axes({node, box, wide, high, X, Y}, x, y, xTitle, yTitle) {
    for (const [value, name] of x.ticks)
        node.append(svg("path", {class: "axis", d: `M${X(value)} ${box.bottom}v5`}),
            svg("text", {x: X(value), y: box.bottom + 18, "text-anchor": "middle"}, name));
    for (const [value, name] of y.ticks)
        node.append(svg("path", {class: "axis", d: `M${box.left} ${Y(value)}h-5`}),
            svg("text", {x: box.left - 8, y: Y(value) + 4, "text-anchor": "end"}, name));
    node.append(
        svg("text", {class: "soft", "text-anchor": "end", x: box.right, y: box.bottom + 34},
            xTitle),
        svg("text", {class: "soft", "text-anchor": "end",
                     transform: `translate(12 ${box.top}) rotate(-90)`}, yTitle),
        svg("rect", {class: "frame", x: box.left, y: box.top, width: wide, height: high}));
}

// What is added to the group that comes back is cut off at the frame.
let nClips = 0;
function clipped({node, box, wide, high}) {
    const id = `clip-${++nClips}`;
    const group = svg("g", {"clip-path": `url(#${id})`});
    node.append(svg("clipPath", {id}, svg("rect", {x: box.left, y: box.top, width: wide,
                                                   height: high})), group);
    return group;
}

// A line through points; a gap where one of them is nowhere.
function path(points) {
    let pen = "M";
    return points.map(([x, y]) => {
        const there = isFinite(x) && isFinite(y);
        const piece = there ? `${pen}${x.toFixed(1)} ${y.toFixed(1)}` : "";
        pen = there ? "L" : "M";
        return piece;
    }).join("");
}

// Eight shapes that can be told apart without colours, around a point.
const SHAPES = [
    r => `M${-r} ${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
    r => `M0 ${-r}L${r} ${r}H${-r}z`,
    r => `M0 ${r}L${r} ${-r}H${-r}z`,
    r => `M0 ${-1.3 * r}L${1.3 * r} 0 0 ${1.3 * r} ${-1.3 * r} 0z`,
    r => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
    r => `M${-r} 0H${r}M0 ${-r}V${r}`,
    r => `M${-r} ${-r}L${r} ${r}M${r} ${-r}L${-r} ${r}`,
    r => `M${-r} ${-r}H${r}L${-r} ${r}H${r}z`,
];
const DASHES = ["none", "7 3", "2 3", "9 3 2 3", "5 2", "none", "1 4", "12 4"];

function mark(shape, x, y, size, kind) {
    return svg("path", {class: kind, d: SHAPES[shape % 8](size),
                        transform: `translate(${x} ${y})`});
}

// A short piece of line number i, for a legend.
function sample(i, kind) {
    return svg("svg", {class: "sample", viewBox: "0 0 36 16", "aria-hidden": "true"},
        svg("path", {class: kind + " curve", d: "M0 8H36", "stroke-dasharray": DASHES[i % 8]}),
        mark(i, 18, 8, 4, kind + " mark"));
}

// A map of shades, columns across and rows down, one of them chosen. Shade is the square root of
// value / peak: as 1 - cosine is about angle² / 2, twice as strong is twice the angle. Exactly 0
// has no shade. A map with the same key as the last one, in a figure of the same width, is still
// there, and only another row is chosen.
function shades(figure, map) {
    const {rows, chosen} = map;
    const key = `${map.key} ${figure.clientWidth}`;
    if (figure.map?.key !== key)
        figure.map = {key, c: fillShades(figure, map)};
    const c = figure.map.c, h = c.high / rows.length;
    c.node.querySelectorAll(".halo, .chosen").forEach(line => line.remove());
    for (const line of ["halo", "chosen"])      // the halo parts it from strong shades
        c.node.append(svg("rect", {class: line, x: c.box.left - 1, width: c.wide + 2,
                                   y: c.box.top + chosen * h - 1, height: h + 2}));
}

function fillShades(figure, map) {
    const {rows, columns, value, peak} = map;
    const c = chart(figure, 300, bands(columns, String), bands(rows.length, i => rows[i]),
                    "level", map.title);
    const w = c.wide / columns, h = c.high / rows.length;
    for (let row = 0; row < rows.length; row++)
        for (let column = 0; column < columns; column++) {
            const x = value(row, column);
            if (x > 0)
                c.clip.append(svg("rect", {class: "cell", "shape-rendering": "crispEdges",
                    x: (c.box.left + column * w).toFixed(2), y: (c.box.top + row * h).toFixed(2),
                    width: w.toFixed(2), height: h.toFixed(2),
                    "fill-opacity": Math.min(1, Math.sqrt(x / peak)).toFixed(3)}));
        }
    shadeKey(c, peak);
    listen(c, map);
    return c;
}

// A click on a map picks a row; where the pointer is, the map's owner says the number.
function listen(c, {rows, columns, pick, point}) {
    c.node.classList.add("pickable");
    const where = event => {
        const frame = c.node.getBoundingClientRect();
        const scale = c.node.viewBox.baseVal.width / frame.width;
        const x = ((event.clientX - frame.left) * scale - c.box.left) / c.wide;
        const y = ((event.clientY - frame.top) * scale - c.box.top) / c.high;
        return [Math.floor(y * rows.length), Math.floor(x * columns)];
    };
    c.node.addEventListener("click", event => {
        const [row] = where(event);
        if (row >= 0 && row < rows.length)
            pick(row);
    });
    c.node.addEventListener("pointermove", event => {
        const [row, column] = where(event);
        if (row >= 0 && row < rows.length && column >= 0 && column < columns)
            point(row, column);
    });
}

// What the shades mean, below a map: some of them with their values.
function shadeKey(c, peak) {
    const n = c.wide > 330 ? 5 : 3;
    for (let i = 1; i <= n; i++) {
        const x = c.box.left + (i - 1) * (c.wide - 40) / n, y = c.box.bottom + 25;
        c.node.append(
            svg("rect", {class: "cell", x, y, width: 14, height: 11, "fill-opacity": i / n}),
            svg("rect", {class: "frame", x, y, width: 14, height: 11}),
            svg("text", {class: "soft", x: x + 19, y: y + 10}, short(peak * (i / n) ** 2)));
    }
}

// ---- the trip

const SITES = {H: "H, the input of attention", Q: "Q, the queries", K: "K, the keys",
               V: "V, the values that attention reads", A: "A, the output of attention"};
const WINDOW = 0, STACK = 1;

// Where the numbers of a trip are in its long lists.
function tripNumbers(data) {
    const kinds = ["window", "stack"];
    const levels = data.layers + 1, thetas = data.thetas.length, tokens = data.tokens.length;
    const largest = list => list.reduce((a, b) => Math.max(a, b), 1e-30);   // shades divide by it
    return {
        distance: (kind, place, theta, level) =>
            data.distance[kinds[kind]][(place * thetas + theta) * levels + level],
        drugged: (kind, place, theta, token) =>
            data.drugged[kinds[kind]][(place * thetas + theta) * tokens + token],
        peakAt: (kind, place, theta) => {
            const first = (place * thetas + theta) * levels;
            return largest(data.distance[kinds[kind]].slice(first, first + levels));
        },
        peaks: kinds.map(kind => largest(data.distance[kind])),
        highest: largest([...data.sober, ...data.drugged.window, ...data.drugged.stack]),
    };
}

// One bar of signs, as the terminal shows it: what both have is kept, the rest is lost or won.
// wide() is the width of a probability.
function nextBar(token, sober, drugged, wide, left, right, top, weight) {
    const kept = wide(Math.min(sober, drugged));
    const rest = wide(Math.max(sober, drugged)) - kept;
    const bar = (x, width, pattern) => svg("rect", {width, height: 14, fill: `url(#${pattern})`,
                                                    transform: `translate(${x} ${top})`});
    const text = (x, words) => svg("text", {x, y: top + 11, "text-anchor": "end",
                                            "font-weight": weight}, words);
    const name = tokenName(token);
    const row = svg("g", {class: "token"},
        text(left - 8, name.length > 16 ? name.slice(0, 15) + "…" : name),
        bar(left, kept, "kept"),
        bar(left + kept, rest, drugged > sober ? "won" : "lost"),
        text(right, `${percent(sober)} → ${percent(drugged)}`));
    Object.assign(row.dataset, {token, sober, drugged});
    return row;
}

function trip(section, data) {
    const levels = data.layers + 1;
    const thetas = data.thetas.map(short);
    const places = [...Array(data.layers).keys()].map(String);
    const find = name => section.querySelector(name);
    const {distance, drugged, peakAt, peaks, highest} = tripNumbers(data);

    // Begin where there is most to see: the best window at two thirds of the largest angle.
    const first = Math.round((thetas.length - 1) * 2 / 3);
    let best = 0;
    for (let place = 1; place < data.layers; place++)
        if (peakAt(WINDOW, place, first) > peakAt(WINDOW, best, first))
            best = place;

    find(".site").textContent = SITES[data.site] || data.site;
    const dosed = ["it and its neighbours", "all layers up to it"];
    const kind = choice(section, "kind", dosed, WINDOW, draw);
    const place = slider(section, "place", data.layers, String, best, draw);
    const theta = slider(section, "theta", thetas.length, i => thetas[i], first, draw);
    const scale = choice(section, "scale", ["of the whole trip", "of each picture"], 0, draw);

    const isDosed = (k, p, layer) => k === STACK ? layer <= p : Math.abs(layer - p) <= 1;
    const say = (p, t, level) => {
        const x = distance(kind.value, p, t, level);
        find("p.readout").textContent = `Around layer ${p}, θ = ${thetas[t]}, level ${level}: ` +
            (x ? `1 − cosine = ${short(x)}` : "exactly the sober twin");
    };

    function draw() {
        const k = kind.value, p = place.valueAsNumber, t = theta.valueAsNumber;
        const whole = scale.value === 0;
        const around = k === WINDOW ? `the window around layer ${p}` : `layers 0 to ${p}`;
        place.say();
        theta.say();
        const here = whole ? peaks[k] : Math.max(...thetas.map((_, i) => peakAt(k, p, i)));
        const all = whole ? peaks[k] : Math.max(...places.map((_, i) => peakAt(k, i, t)));
        find(".by-theta figcaption").textContent = `All angles in ${around}.`;
        shades(find(".by-theta"), {
            rows: thetas, columns: levels, title: "angle θ", chosen: t, peak: here,
            key: `${k} ${p} ${here}`,
            value: (i, level) => distance(k, p, i, level),
            pick: i => moveTo(theta, i),
            point: (i, level) => say(p, i, level)});
        find(".by-place figcaption").textContent = `All places at θ = ${thetas[t]}.`;
        shades(find(".by-place"), {
            rows: places, columns: levels, chosen: p, peak: all, key: `${k} ${t} ${all}`,
            title: k === WINDOW ? "around layer" : "layers up to",
            value: (i, level) => distance(k, i, t, level),
            pick: i => moveTo(place, i),
            point: (i, level) => say(i, t, level)});
        drawProfile(k, p, t, here, around);
        drawNext(k, p, t);
        find("p.readout").textContent = "";
    }

    // The chosen line of both maps, as a curve. The layers that are dosed are shaded: layer l
    // lies between levels l and l + 1.
    function drawProfile(k, p, t, peak, around) {
        const figure = find(".profile");
        const x = {at: level => (level + .25) / (levels - .5), ticks: bands(levels, String).ticks};
        const y = downward(straight(0, peak * 1.05));
        const c = chart(figure, 250, x, y, "level", "1 − cosine");
        figure.querySelector("figcaption").textContent =
            `The chosen line: ${around} at θ = ${thetas[t]}. Shaded are the dosed layers.`;
        for (let layer = 0; layer < data.layers; layer++)
            if (isDosed(k, p, layer))
                c.clip.append(svg("rect", {class: "dosed", x: c.X(layer), y: c.box.top,
                                           width: c.X(1) - c.X(0), height: c.high}));
        const points = [...Array(levels).keys()].map(level => distance(k, p, t, level));
        c.node.append(svg("path", {class: "here curve", d: path(points.map((y, level) =>
            [c.X(level), c.Y(y)]))}));
        points.forEach((y, level) => {
            const dot = mark(4, c.X(level), c.Y(y), 3.5, "here mark point");
            dot.dataset.value = y;
            dot.append(svg("title", {}, `level ${level}: ${y}`));
            c.node.append(dot);
        });
    }

    // The next tokens, a bar of signs for each.
    function drawNext(k, p, t) {
        const figure = find(".next");
        const width = Math.max(280, figure.clientWidth || 480);
        const left = 118, sign = 7;
        const room = Math.floor((width - left - 108) / sign);   // signs for the highest
        const wide = p => sign * Math.round(room * p / highest);
        const chances = data.tokens.map((_, i) => drugged(k, p, t, i));
        const winner = chances.indexOf(Math.max(...chances));
        const node = svg("svg", {class: "chart", role: "img",
            viewBox: `0 0 ${width} ${22 * chances.length + 4}`,
            "aria-label": "probabilities of the next token"},
            ...chances.map((q, i) => nextBar(data.tokens[i], data.sober[i], q, wide, left, width,
                                             22 * i + 4, i === winner ? 700 : 400)));
        figure.querySelector(".chart")?.remove();
        figure.append(node);
        figure.querySelector("figcaption").textContent = "The next token, sober → drugged: " +
            "| kept, - lost, + won. The most probable one is bold.";
    }
    return draw;
}

// ---- texts side by side

// Which words (any list of strings) of a and b are in both, in the same order: the longest such
// list, found from the end. length[i][j] is how long it is for what is left of a from i and of b
// from j.
function common(a, b) {
    const length = Array.from({length: a.length + 1}, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i--)
        for (let j = b.length - 1; j >= 0; j--)
            length[i][j] = a[i] === b[j] ? length[i + 1][j + 1] + 1
                                         : Math.max(length[i + 1][j], length[i][j + 1]);
    const inA = a.map(() => false), inB = b.map(() => false);
    for (let i = 0, j = 0; i < a.length && j < b.length;) {
        if (a[i] === b[j])
            inA[i++] = inB[j++] = true;
        else if (length[i + 1][j] >= length[i][j + 1])
            i++;
        else
            j++;
    }
    return [inA, inB];
}

// Shows two texts with their differences marked. White space is kept and never compared.
function compare(before, after, a, b) {
    const wordsOf = text => text.match(/\S+/g) || [];
    const same = common(wordsOf(a), wordsOf(b));
    [[before, a, "del"], [after, b, "ins"]].forEach(([node, text, tag], side) => {
        let word = 0;
        const pieces = (text.match(/\S+|\s+/g) || []).map(piece => {
            const marked = /\S/.test(piece) && !same[side][word++];
            return marked ? html(tag, {}, visible(piece)) : visible(piece);
        });
        node.replaceChildren(...pieces);
    });
}

// ---- the explorer

function explore(section, data) {
    const find = name => section.querySelector(name);
    const names = data.methods.map(method => method.name);
    const start = Math.max(0, names.indexOf("V"));
    // Begin with the lightest dose that makes all texts different.
    const doses = data.methods[start].cells;
    const several = doses.findIndex(cell => cell.distinct === data.seeds.length);
    const first = several < 0 ? doses.length - 1 : several;
    const method = choice(section, "method", names, start, draw, 
        i => sample(i, names[i] === "temperature" ? "base" : ""));
    const cellOf = i => data.methods[method.value].cells[i];
    const strength = slider(section, "strength", doses.length, i => cellOf(i).strength, first,
                            draw);
    const seed = slider(section, "seed", data.seeds.length, i => data.seeds[i], 0, draw);

    // What a token costs in nats; a logarithm wants more than 0.
    const cost = cell => Math.max(1e-5, -cell.likelihood);

    function draw() {
        const one = data.methods[method.value];
        strength.max = one.cells.length - 1;
        strength.say();
        seed.say();
        const cell = cellOf(strength.valueAsNumber);
        const i = seed.valueAsNumber;
        compare(find(".before"), find(".after"), data.texts[data.sober.texts[i]],
                data.texts[cell.texts[i]]);
        find(".what").textContent = `${one.name} ${cell.strength}, seed ${data.seeds[i]}`;
        find("p.readout").textContent = `${one.name} ${cell.strength}: ${cell.distinct} of ` +
            `${data.seeds.length} texts differ. They follow the sober one for ` +
            `${short(cell.prefix)} bytes, their diversity is ${short(cell.diversity)}, and the ` +
            `sober model gives them ${short(cell.likelihood)} nats a token. What left the layers ` +
            `had been turned by ${short(cell.angle)} radians.`;
        drawCurves(one, cell);
    }

    // Overdoses lie far below, so the axis is logarithmic: it shows the light doses well. What
    // falls on the dotted line has the diversity of the chosen cell.
    function drawCurves(chosen, chosenCell) {
        const cells = data.methods.flatMap(one => one.cells);
        const range = (values, least) => [Math.min(...values, 1e9), Math.max(...values, least)];
        const [few, many] = range(cells.map(cell => cell.diversity), .01);
        const [likely, unlikely] = range(cells.map(cell => cost(cell)), 1e-4);
        const x = straight(few - .03 * many, many * 1.03);
        const y = logarithmic(likely / 1.15, unlikely * 1.15);
        y.ticks = y.ticks.map(([value, name]) => [value, "−" + name]);
        const c = chart(find(".curves"), 380, x, y, "diversity: share of different pairs of tokens",
                        "nats a token, logarithmic");
        c.node.append(svg("path", {class: "chosen", "stroke-dasharray": "1 4",
            d: `M${c.X(chosenCell.diversity)} ${c.box.top}V${c.box.bottom}`}));
        const order = data.methods.filter(one => one !== chosen).concat(chosen);
        for (const one of order) {
            const i = data.methods.indexOf(one);
            const here = one === chosen ? "here " : one.name === "temperature" ? "base " : "";
            const points = one.cells.map(cell => [c.X(cell.diversity), c.Y(cost(cell))]);
            c.node.append(svg("path", {class: here + "curve", d: path(points),
                                       "stroke-dasharray": DASHES[i % 8]}));
            points.forEach(([px, py], j) => {
                const cell = one.cells[j];
                const dot = mark(i, px, py, one === chosen ? 5 : 3.5, here + "mark pickable");
                dot.append(svg("title", {}, `${one.name} ${cell.strength}: diversity ` +
                    `${short(cell.diversity)}, ${short(cell.likelihood)} nats a token`));
                dot.addEventListener("click", () => {
                    method.value = i;
                    moveTo(strength, j);
                });
                c.node.append(dot);
            });
        }
        c.node.append(svg("circle", {class: "chosen", cx: c.X(chosenCell.diversity), r: 10,
                                     cy: c.Y(cost(chosenCell))}));
    }
    return draw;
}

// ---- the probe

function probe(section, data) {
    const find = name => section.querySelector(name);
    const names = data.tokens.map(tokenName);
    const first = Math.max(0, data.agreement.indexOf(Math.min(...data.agreement)));
    const token = slider(section, "token", names.length, i => names[i], first, draw);
    const spans = data.tokens.map((one, i) => {
        const text = visible(one.replace(/\\n/g, "\n"));    // as tests/lab spells a new line
        const span = html("span", {style: `--doubt: ${1 - data.agreement[i]}`, tabindex: -1}, text);
        for (const event of ["pointerenter", "focus", "click"])
            span.addEventListener(event, () => moveTo(token, i));
        return span;
    });
    find(".tokens").append(...spans);
    find(".tokens").addEventListener("keydown", event => {
        const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
        if (step) {
            spans[Math.min(spans.length - 1, Math.max(0, token.valueAsNumber + step))].focus();
            event.preventDefault();
        }
    });

    function draw() {
        const i = token.valueAsNumber;
        token.say();
        spans.forEach((span, j) => {
            span.classList.toggle("chosen", i === j);
            span.tabIndex = i === j ? 0 : -1;
        });
        find("p.readout").textContent = `${names[i]} at position ${data.position[i]}: ` +
            `${percent(data.agreement[i])} of the twins would have written it; the sober model ` +
            `gave it a probability of ${short(data.probability[i])}.`;
        const c = chart(find(".scatter"), 300, straight(0, 1.04), downward(straight(0, 1.04)),
                        "probability", "agreement");
        data.tokens.forEach((_, j) => {
            const dot = mark(4, c.X(data.probability[j]), c.Y(data.agreement[j]), i === j ? 6 : 4,
                             i === j ? "solid" : "mark pickable");
            dot.append(svg("title", {}, names[j]));
            dot.addEventListener("click", () => moveTo(token, j));
            c.node.append(dot);
        });
        const near = data.probability[i] > .7;
        c.node.append(svg("text", {x: c.X(data.probability[i]) + (near ? -10 : 10),
            y: c.Y(data.agreement[i]) + 18, "text-anchor": near ? "end" : "start"}, names[i]));
    }
    return draw;
}

// ---- the step

const LOSSES = ["lesson", "first order", "its sequel", "other text"];

function step(section, data) {
    const find = name => section.querySelector(name);
    const names = data.sizes.map(String);
    const middle = Math.floor((names.length - 1) / 2);
    const size = slider(section, "size", names.length, i => names[i], middle, draw);
    const zero = Math.max(0, data.sizes.indexOf(0));    // what all others are compared with
    if (!data.words)
        for (const part of section.querySelectorAll(".texts, .key"))
            part.remove();
    if (!data.losses)
        for (const part of section.querySelectorAll(".losses, .readout"))
            part.remove();
    else
        find(".losses").append(html("div", {class: "lines"}, ...LOSSES.map((name, i) =>
            html("span", {}, sample(i, i === 0 ? "here" : ""), name))));

    function draw() {
        const i = size.valueAsNumber;
        size.say();
        if (data.words) {
            compare(find(".before"), find(".after"), data.words[zero].join(" "),
                    data.words[i].join(" "));
            find(".base").textContent = `step size ${names[zero]}`;
            find(".what").textContent = `step size ${names[i]}`;
        }
        if (data.losses) {
            fillTable(i);
            drawLosses(i);
        }
    }

    // Losses before the step and after it.
    function fillTable(i) {
        const cell = x => {
            const node = html("td", {}, short(x));
            node.dataset.value = x;
            return node;
        };
        const heads = ["nats a token", names[zero], names[i]];
        find(".readout").replaceChildren(
            html("thead", {}, html("tr", {}, ...heads.map(name =>
                html("th", {scope: "col"}, name)))),
            html("tbody", {}, ...LOSSES.map((name, j) => html("tr", {},
                html("th", {scope: "row"}, name),
                cell(data.losses[j][zero]), cell(data.losses[j][i])))));
    }

    // Both axes are logarithmic. A step of 0 has no logarithm: it stands by itself, at the left.
    function drawLosses(chosen) {
        const steps = data.sizes.filter(x => x > 0);
        const low = Math.log10(Math.min(...steps, 1)), high = Math.log10(Math.max(...steps, 1e-9));
        const place = v => v > 0 ? .2 + .74 * (Math.log10(v) - low) / (high - low || 1) : .05;
        const ticks = [...new Set(data.sizes)].filter(v => v === 0 || powerOfTen(v));
        const x = {at: place, ticks: ticks.map(v => [v, String(v)])};

        const seen = [0, 2, 3].flatMap(i => data.losses[i]).filter(v => v > 0);
        const bottom = Math.min(...seen) / 2;
        const scale = downward(logarithmic(bottom, Math.max(...seen) * 1.5));
        const y = {at: v => v > 0 ? scale.at(v) : 2, ticks: scale.ticks};  // 2: far below
        const c = chart(find(".losses"), 340, x, y, "step size", "loss, nats a token");
        c.node.append(svg("path", {class: "chosen", "stroke-dasharray": "1 3",
            d: `M${c.X(data.sizes[chosen])} ${c.box.top}V${c.box.bottom}`}));

        const order = data.sizes.map((_, i) => i).sort((a, b) => data.sizes[a] - data.sizes[b]);
        data.losses.forEach((column, i) => {
            const here = i === 0 ? "here " : "";
            const numeric = order.filter(j => typeof column[j] === "number");
            const points = i === 1 ? slope(column, low, high)
                                   : numeric.map(j => [data.sizes[j], column[j]]);
            c.clip.append(svg("path", {class: here + "curve", "stroke-dasharray": DASHES[i],
                d: path(points.map(([a, b]) => [c.X(a), c.Y(b)]))}));
            for (const j of numeric)
                c.clip.append(mark(i, c.X(data.sizes[j]), c.Y(column[j]), j === chosen ? 6 : 4,
                                   here + "mark"));
        });
    }

    function powerOfTen(v) {
        return Math.abs(Math.log10(v) - Math.round(Math.log10(v))) < 1e-9;
    }

    // The first order is a straight line in the step size. On these axes it is bent, so it needs
    // more points than were measured.
    function slope(column, low, high) {
        const first = data.sizes.indexOf(Math.min(...data.sizes));
        const last = data.sizes.indexOf(Math.max(...data.sizes));
        const rise = (column[last] - column[first]) / (data.sizes[last] - data.sizes[first]);
        const points = data.sizes.includes(0) ? [[0, column[first]]] : [];
        for (let i = 0; i <= 200; i++) {
            const v = 10 ** (low + (high - low) * i / 200);
            points.push([v, column[first] + rise * (v - data.sizes[first])]);
        }
        return points;
    }
    return draw;
}

// ---- all of them

const KINDS = {trip, explore, probe, step};
const draws = [];
for (const section of document.querySelectorAll("section")) {
    const data = JSON.parse(section.querySelector("script").textContent);
    draws.push(KINDS[section.className](section, data));
}
const drawAll = () => draws.forEach(draw => draw());
drawAll();

// Charts are as wide as their figures, so another window means another drawing.
let width = innerWidth;
addEventListener("resize", () => {
    if (innerWidth !== width)
        requestAnimationFrame(drawAll);
    width = innerWidth;
});
"""


if __name__ == "__main__":
    sys.exit(main())
