#!/usr/bin/env python3
"""Draws what the laboratory and the gradient step have measured: one page to look at, and to play
with.

    tests/lab model.bin trip -i "..." -V 1 -o trip.csv
    tests/lab model.bin explore -i "..." -o explore.csv
    tests/lab model.bin probe -i "..." -V .5 -o probe.csv
    tests/lab model.bin shower -i "..." -H .8 -o shower.csv
    train_step model.bin -t words.csv -a losses.csv
    python3 tests/laboratory/page.py trip.csv explore.csv probe.csv shower.csv words.csv \
        losses.csv -o lab.html

or `make page`, which does all of it. Any of these files will do, in any order and number: what a
table is, its first line says. The page is one file that stands alone. It needs no network and no
library, and any browser opens it from the disk.

The way of a number:

    CSV -> read_table -> tables of text -> trip_of, ... -> plain data -> JSON in the page -> script

Nothing is computed on this way. The JSON has every number as the CSV has it, and what is drawn is
drawn by the script at the end of this file, in the browser, each time something is chosen. Of many
texts a page shows a few, to stay small.

What comes out of a language model is any text at all, and some of it looks like HTML. So no text
is ever put together with markup: in the page it is a string of the JSON, without a single `<`, and
the script hands it to the browser as text.

    1  reading       tables, and what goes wrong with them
    2  recognising   trip, explore, probe, shower, words, losses
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
EXPLORE = ("method strength seed differ prefix angle diversity log-probability error gain ended "
           "text").split()
PROBE = "position token agreement probability said share".split()
SHOWER = ["every", "seed", "cost", "mean", "error", "gain", "gain error", "better", "sober",
          "typical", "ended", "text"]
LOSSES = ["step size", "lesson", "first order", "its sequel", "other text"]
SOURCES = ["lesson", "its sequel", "other text"]        # of words, after the step sizes
READ = 5                                # of this many seeds the texts of explore can be read


def or_nothing(text):
    """A number in a cell, or None where there is nothing to measure: nan for the programs."""
    value = number(text)
    return None if math.isnan(value) else finite(text)


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
    """The methods with their cells. Many texts are the same, so each is kept once, with a number;
    of the first seeds only. All seeds count in the numbers.

    A seed is a name, not an amount: it stays text.
    """
    texts = {}                          # text -> its number
    methods = {}                        # name -> {strength: cell}
    gains = {}                          # name -> over temperature
    for row in rows:
        (name, strength, seed, differ, prefix, angle, diversity, log_p, error, gain, ended,
         text) = row
        cell = methods.setdefault(name, {}).setdefault(finite(strength), {
            "strength": finite(strength), "differ": finite(differ), "prefix": finite(prefix),
            "angle": finite(angle), "diversity": finite(diversity), "likelihood": finite(log_p),
            "error": or_nothing(error), "ended": [], "seeds": [], "texts": []})
        gains[name] = or_nothing(gain)
        cell["seeds"].append(seed)
        cell["ended"].append(finite(ended))
        if len(cell["texts"]) < READ:
            cell["texts"].append(texts.setdefault(text, len(texts)))
    sober = list(methods.pop("sober", {}).values())
    check(len(sober) == 1 and methods)
    seeds = sober[0]["seeds"]
    cells = [cell for method in methods.values() for cell in method.values()] + sober
    for cell in cells:
        check(cell.pop("seeds") == seeds)
    return {"seeds": seeds, "texts": list(texts), "sober": sober[0],
            "methods": [{"name": name, "gain": gains[name], "cells": list(method.values())}
                        for name, method in methods.items()]}


def probe_of(header, rows):
    """A text, token by token, and what the twins said in each place: [word, share], most first."""
    tokens = {}                         # position -> what is known of it
    for position, token, agreement, probability, said, share in rows:
        one = tokens.setdefault(int(position), {
            "position": int(position), "token": token, "agreement": finite(agreement),
            "probability": finite(probability), "said": []})
        check(one["token"] == token)
        one["said"].append([said, finite(share)])
    return list(tokens.values())


def shower_of(header, rows):
    """What each frequency of showers costs, and one text of each: that of the typical seed."""
    cells = {}                          # every -> cell
    for row in rows:
        every, seed, cost, mean, error, gain, gain_error, better, sober, typical, ended, text = row
        cell = cells.setdefault(finite(every), {
            "every": finite(every), "mean": finite(mean), "error": or_nothing(error),
            "gain": finite(gain), "gainError": or_nothing(gain_error), "better": finite(better),
            "costs": [], "seeds": []})
        cell["costs"].append(finite(cost))
        cell["seeds"].append(seed)
        if finite(typical):
            cell.update(seed=seed, text=text, cost=finite(cost), ended=finite(ended))
    cells = list(cells.values())
    seeds = cells[0]["seeds"]
    for cell in cells:
        check("text" in cell and cell.pop("seeds") == seeds)
    return {"sober": finite(rows[0][8]), "first": seeds[0], "cells": cells}


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
    """The words after each step size, and those of the texts that they may come from. Short columns
    end in empty cells, which are no words."""
    words = [[row[i] for row in rows if row[i]] for i in range(len(header))]
    n = len(header) - len(SOURCES)
    check(n > 0 and header[n:] == SOURCES)
    return {"sizes": [finite(size) for size in header[:n]],
            "words": words[:n], "sources": words[n:]}


def recognise(path):
    """What a file is, and its data. The first line says it: a table of words has step sizes there,
    all others have names."""
    header, rows = read_table(path)
    kinds = [(TRIP, "trip", trip_of), (EXPLORE, "explore", explore_of),
             (PROBE, "probe", probe_of), (SHOWER, "shower", shower_of),
             (LOSSES, "losses", losses_of)]
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
    order = list(TITLES)
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
<noscript><style>.controls, figure { display: none; }</style></noscript>
</head>
<body>
<header>
<h1>A model on DRµGS</h1>
<p>What random turns of hidden vectors, and one gradient step, do to a Llama. Everything on this
page was measured. Rows, marks and sliders can be chosen.</p>
<p>A <b>glitch</b> turns a vector inside the network by a random angle of at most θ, the <b>dose</b>, in
radians. Five <b>sites</b> can be dosed: H, what attention reads; Q, queries; K, keys; V, values; A,
what attention gives. A model without a dose is <b>sober</b>, and a <b>twin</b> is the same model with a
dose. A <b>nat</b> measures surprise: −log of a probability; .69 nats are one half, 2.3 one tenth.</p>
@NOTE@
<nav aria-label="Questions">@LINKS@</nav>
<noscript><p>The pictures are drawn by a script in this file. Please allow it.</p></noscript>
</header>
<main>
@SECTIONS@
</main>
<p class="status" role="status" aria-live="polite"></p>
<svg width="0" height="0" aria-hidden="true"></svg>
<script>@SCRIPT@</script>
</body>
</html>
"""

SECTION = """<section class="@KIND@" id="@ID@" aria-labelledby="@ID@-title">
<h2 id="@ID@-title">@TITLE@</h2>
<p class="answer"></p>
@BODY@
<p class="file">@FILES@</p>
<script type="application/json">@DATA@</script>
</section>
"""

# A slider with its name and what it stands at. The script knows how far it goes.
SLIDER = """<label class="slider" data-control="@NAME@"><span>@LABEL@</span>
<input type="range" min="0" step="1" autocomplete="off"><output></output></label>"""

# The questions, in the order of the page: one pass, one text that is read, texts that are written,
# a text that is remembered, a model that is changed.
TITLES = {
    "trip": "How far does a glitch carry?",
    "probe": "Which words survive the noise?",
    "explore": "What does a dose do to whole texts?",
    "shower": "What is a cold shower worth?",
    "step": "What does one lesson teach, and what does it cost?",
}

BODIES = {
    "trip": """\
<p>One site, <b class="site">H, Q, K, V or A</b>, is dosed in a few layers; everything else is
computed as always. At every level the last token's hidden state is compared with that of a sober
twin: 1 − cosine is 0 where nothing has arrived, and about half the square of the angle between the two.
Level 0 is the embedding, level l + 1 is what leaves layer l.</p>
<div class="controls">@theta@
<fieldset data-control="kind"><legend>dosed are</legend></fieldset></div>
<div class="beside">
<figure class="model"><figcaption>Where the dose acts</figcaption></figure>
<figure class="wide"><figcaption>Each row is a dose around another layer, each column a level. A row has
shades of its own peak, the largest distance in it. Outlined: what leaves a dosed layer. Last: how much
of the peak remains at the last level.</figcaption>
<table class="stairs"></table></figure>
</div>
<div class="figures">
<figure class="profile"><figcaption></figcaption></figure>
<figure><figcaption>The next token, <span class="swatch kept"></span> kept, <span
class="swatch lost"></span> lost, <span class="swatch won"></span> won. The most probable one is
bold.</figcaption><table class="next"></table></figure>
</div>""",

    "probe": """\
<p>The sober model wrote this text. Drugged twins, each with a seed of its own, read it, too, and were
asked at every token what they would have written. The stronger its shade, the fewer agree; the table
has the words of those who do not. Agreement is not the same as probability: twins may all choose a
token that has a small one.</p>
<figure><blockquote class="tokens"></blockquote></figure>
<figure><table class="doubts"></table></figure>""",

    "explore": """\
<p>Each method makes texts different: a dose at one of the sites of the network, temperature, or
plain noise on the logits. Every strength was tried with the same <span
class="seeds">seeds</span>.</p>
<div class="controls">
<fieldset data-control="method"><legend>method</legend></fieldset>
@seed@
</div>
<figure><figcaption>The sober text:</figcaption><blockquote class="before"></blockquote></figure>
<figure><figcaption>All doses, each text from the first word that is not the sober one’s.
<ins>Underlined</ins>: what is not as in the sober text, read side by side.</figcaption>
<table class="ladder"></table></figure>
<div class="beside">
<figure class="curves wide"><figcaption>What makes texts more various makes them less likely. A method is
better than another if its texts are likelier at the same diversity: if its line lies higher. Each mark
on a line is a strength, with its standard error; † some of its texts ended early.</figcaption></figure>
<figure><figcaption>Nats a token by which a method’s texts are likelier (−: less likely) than those of
temperature at the same diversity, mean over the strengths that temperature matches.</figcaption><table
class="gains"></table></figure>
</div>""",

    "shower": """\
<p>Where a model is drugged, its memory of the text is drugged, too: later words read it. A cold shower
computes that memory once more, soberly; what was written stays written. Cost is how surprised the
sober model is by the text, in nats a token: the less, the better. († The text ended before the
others; its cost is the mean over fewer tokens.)</p>
<div class="beside">
<figure class="curve"><figcaption>Cost over how often a shower comes: each dot is a seed, the bars
are the mean and its standard error.</figcaption></figure>
<figure class="wide"><figcaption></figcaption><table class="ladder"></table></figure>
</div>""",

    "step": """\
<p>The trained model is shown one more sentence, the lesson, once, and takes a single step down its
gradient. It knows the sequel by heart, but before the step it does not begin with it. A loss is how
surprised the model is by a text, in nats a token.</p>
<dl class="sources"></dl>
<figure class="texts"><figcaption>After each step size. Words with their neighbours <b
class="lesson">from the lesson</b>, <b class="sequel">from its sequel</b>, and all
others.</figcaption>
<table class="ladder"></table></figure>
<figure class="losses"><figcaption>The lesson’s loss should fall while the others stay where they
are. First order: what the lesson’s loss would be if it fell along a straight line, which for large
steps ends below 0 and leaves the picture. A size of 0 has no place on this axis and stands before
the break.</figcaption></figure>""",
}

SLIDERS = {"theta": "angle θ, radians", "seed": "seed of the texts"}


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


def page_of(sections, note, commands):
    """The whole page, as text. commands: with which a kind was measured, if that is known."""
    links = []
    parts = []
    for i, (kind, files, data) in enumerate(sections):
        name = "%s-%d" % (kind, i + 1)
        links.append('<a href="#%s">%s</a>' % (name, TITLES[kind]))
        body = body_of(kind)
        if kind in commands:
            body = '<p class="command">Measured with <code>%s</code></p>\n%s' % (
                text_in_html(commands[kind]), body)
        parts.append(fill(SECTION, KIND=kind, ID=name, TITLE=TITLES[kind],
                          FILES=text_in_html(", ".join(files)), BODY=body,
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
                        help="a sentence for the top of the page: which model")
    parser.add_argument("-c", dest="commands", default=[], action="append", metavar="kind=command",
                        help="with what a trip, explore, probe, shower or step was measured")
    options = parser.parse_args()
    commands = dict(one.split("=", 1) for one in options.commands if "=" in one)
    if len(commands) < len(options.commands) or set(commands) - set(TITLES):
        parser.error("-c takes trip, explore, probe, shower or step, =, and a command; got %s"
                     % " ".join(options.commands))
    if not options.out.endswith(".html"):
        parser.error("-o takes a file that ends in .html; got '%s'" % options.out)
    try:
        write_page(options.out, page_of(sections_of(options.tables), options.note, commands))
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
# the lines under them.

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
    max-width: 76rem;
    padding: 1.5rem 1.25rem 2rem;
    background: var(--paper);
    color: var(--ink);
    font: 1rem/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif;
}
h1 { font-size: 2rem; line-height: 1.2; margin: .5rem 0; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 0; }
p { max-width: 46rem; margin: .6rem 0; }
.answer { font-size: 1.1rem; font-weight: 600; margin: .4rem 0; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; }
nav a { padding: .2rem 0; }
a { color: var(--strong); }
.note, .file, .command { color: var(--soft); font-size: .875rem; }
.file { margin: 1rem 0 0; font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
section {
    background: var(--panel);
    border: 1px solid var(--line);
    border-radius: .5rem;
    margin: 1.5rem 0;
    padding: 1.25rem 1.5rem;
}
:focus-visible { outline: 3px solid var(--strong); outline-offset: 2px; border-radius: 2px; }
.status {
    position: sticky;
    bottom: 0;
    margin: 0;
    max-width: none;
    padding: .35rem .75rem;
    background: var(--ink);
    color: var(--paper);
    font-variant-numeric: tabular-nums;
}
.status:empty { visibility: hidden; }

/* what can be moved */
.controls {
    position: sticky;
    top: 0;
    z-index: 1;
    display: flex;
    flex-wrap: wrap;
    gap: .25rem 2rem;
    align-items: flex-start;
    margin: .5rem 0;
    padding: .4rem 0;
    background: var(--panel);
    border-bottom: 1px solid var(--line);
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
fieldset label { display: inline-flex; gap: .3rem; align-items: center; white-space: nowrap; }
.slider {
    display: grid;
    grid-template-columns: 1fr auto;
    gap: 0 .75rem;
    flex: 1 1 14rem;
    max-width: 24rem;
    align-items: center;
}
.slider span { grid-column: 1 / 3; }
.slider input, .rows { width: 100%; margin: .3rem 0; }
input { accent-color: var(--strong); }
[type=radio] { width: 1.1rem; height: 1.1rem; margin: 0; flex: none; }
output { min-width: 3.5rem; font-variant-numeric: tabular-nums; font-weight: 600; }

/* pictures */
.figures {
    display: grid;
    grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
    gap: 1.25rem 2rem;
}
.beside { display: flex; flex-wrap: wrap; gap: 1.25rem 2rem; }
.beside figure { flex: 1 1 14rem; }
.beside .wide { flex: 4 1 32rem; }
.beside .curve { flex: 1 1 22rem; }
figure { margin: .5rem 0; min-width: 0; }
figcaption { font-size: .875rem; margin-bottom: .25rem; max-width: 46rem; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
.model svg { max-width: 15rem; }
svg text { fill: var(--ink); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .soft { fill: var(--soft); }
svg .axis { stroke: var(--line); fill: none; }
svg .frame { stroke: var(--soft); fill: none; }
svg .paper { fill: var(--panel); }
svg .chosen { stroke: var(--ink); stroke-width: 2; fill: none; }
svg .dosed { fill: var(--ink); fill-opacity: .09; }
svg .curve { fill: none; stroke: var(--soft); stroke-width: 1.25; }
svg .mark { fill: var(--panel); stroke: var(--soft); stroke-width: 1.25; }
svg .here.curve { stroke: var(--strong); stroke-width: 2.75; }
svg .here.mark { stroke: var(--strong); stroke-width: 2; }
svg .base { stroke: var(--ink); }
svg .seed { fill: var(--soft); fill-opacity: .45; }
svg .hit { fill: transparent; stroke: none; cursor: pointer; }
svg .lit { fill: var(--strong); stroke: var(--strong); }
svg .lit + text { fill: var(--panel); font-weight: 700; }
.sample { width: 2.2rem; height: 1rem; flex: none; }
.lines { display: flex; flex-wrap: wrap; gap: .1rem 1.25rem; font-size: .875rem; margin: .4rem 0; }
.lines span { display: inline-flex; gap: .4rem; align-items: center; }

/* tables */
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .15rem .5rem; border-bottom: 1px solid var(--line); }
th { font-weight: 400; color: var(--soft); }
th:first-child { text-align: left; padding-left: 0; }
.ladder th:first-child, .stairs th:first-child { white-space: nowrap; }
th label { display: inline-flex; gap: .4rem; align-items: center; cursor: pointer; }
.chosen > th { color: var(--ink); font-weight: 700; }
.stairs { width: 100%; table-layout: fixed; border-spacing: 0; }
.stairs th:first-child { width: 4.2rem; }
.stairs th:last-child, .stairs td:last-child { width: 4rem; padding-right: 0; }
.stairs th, .stairs td { border: 0; }
.stairs th { text-align: center; padding: .1rem 0; }
.stairs th:last-child { text-align: right; }
.stairs .cell {
    padding: 0;
    height: 1.7rem;
    border-bottom: 2px solid var(--panel);
    --shade: 0;
    background: rgba(var(--strong-rgb), var(--shade));
}
.stairs .dosed { box-shadow: inset 0 2px var(--ink), inset 0 -2px var(--ink); }
.stairs .dosed.first { box-shadow: inset 2px 2px var(--ink), inset 0 -2px var(--ink); }
.stairs .dosed.last { box-shadow: inset 0 2px var(--ink), inset -2px -2px var(--ink); }
.stairs .dosed.first.last { box-shadow: inset 2px 2px var(--ink), inset -2px -2px var(--ink); }
.stairs .chosen td:last-child { font-weight: 700; }
.stairs span {
    position: absolute;
    width: 1px;
    height: 1px;
    overflow: hidden;
    clip-path: inset(50%);
}
.next { width: 100%; }
.next td { white-space: nowrap; }
.next td:last-child { width: 45%; text-align: left; }
.doubts td:last-child, .doubts th:last-child { text-align: left; overflow-wrap: anywhere; }
.doubts tbody th, .next tbody th { overflow-wrap: anywhere; }
.next .winner { font-weight: 700; }
.bar, .swatch { display: inline-block; height: .8rem; vertical-align: middle; }
.swatch { width: 1.2rem; }
.kept { background: var(--strong); }
.lost { border: 1.5px dashed var(--ink); }
.won { background: repeating-linear-gradient(135deg, var(--strong) 0 2px, transparent 2px 5px); }
.ladder { width: 100%; }
.ladder th, .ladder td { vertical-align: top; padding-top: .3rem; padding-bottom: .3rem; }
.ladder td { white-space: nowrap; }
.ladder td:last-child {
    width: 100%;
    text-align: left;
    white-space: pre-wrap;
    overflow-wrap: anywhere;
    unicode-bidi: isolate;
    font-family: Georgia, "DejaVu Serif", serif;
    padding-right: 0;
}
.ladder th:last-child { text-align: left; }
.ladder .chosen td, .ladder .chosen th { background: rgba(var(--strong-rgb), .08); }
.ladder small { display: block; color: var(--soft); font: .8rem system-ui, sans-serif; }

/* texts */
blockquote {
    margin: 0;
    padding: .4rem .8rem;
    border-left: 3px solid var(--line);
    white-space: pre-wrap;
    overflow-wrap: anywhere;
    unicode-bidi: isolate;
    font-family: Georgia, "DejaVu Serif", serif;
}
ins {
    text-decoration: underline;
    text-decoration-thickness: 2px;
    text-underline-offset: 3px;
    color: var(--strong);
}
b.lesson { color: var(--strong); }
b.sequel {
    font-weight: 400;
    color: var(--strong);
    text-decoration: underline;
    text-underline-offset: 3px;
}
dl { display: grid; grid-template-columns: auto 1fr; gap: .2rem 1rem; margin: .5rem 0; }
dt { color: var(--soft); font-size: .875rem; }
dd { margin: 0; font-family: Georgia, "DejaVu Serif", serif; max-width: 46rem; }
.tokens { font-size: 1.1rem; line-height: 2; }
.tokens span {
    padding: .15em 0;
    --doubt: 0;
}
.tokens .torn {
    border-bottom: 2px solid var(--strong);
    background: rgba(var(--strong-rgb), calc(.1 + .65 * var(--doubt)));
}

/* telephones and paper */
@media (max-width: 40rem) {
    body { padding: .75rem .5rem 2rem; }
    section { padding: 1rem .75rem; }
    h1 { font-size: 1.6rem; }
    .slider { flex-basis: 100%; max-width: none; }
    .slider span, legend { display: none; }
    .ladder td, .ladder th, .doubts td, .doubts th, .next td, .next th { padding-left: .2rem; }
    .next td:last-child { width: 25%; }
    .stairs th label input { display: none; }
    .stairs th:first-child { width: 2.4rem; }
    thead th { font-size: .75rem; }
    dl { display: block; }
}
@media print {
    body { max-width: none; padding: 0; font-size: 10pt; }
    nav, .status, .slider input, .rows { display: none; }
    .controls { position: static; border: 0; }
    section { border: 0; padding: 0; }
    figure, tr, dl { break-inside: avoid; }
    figure:has(.ladder) { break-inside: auto; }
    h2, .answer { break-after: avoid; }
    * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

# =================================================================================================
# 5  The drawing
#
# One function for each kind of section reads its JSON, sets up its controls, and draws. Whatever is
# chosen, the whole section is drawn anew: so what is shown can only be what the controls say. The
# controls are the only memory there is.

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
const whole = p => Math.round(100 * p) + " %";
const withError = (x, error) => x.toFixed(2).replace("-", "−") +
    (error === null ? "" : " ± " + error.toFixed(2));
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

// The line at the bottom of the window: what is read where the pointer or the keyboard is, as long
// as it is there.
const say = text => { document.querySelector(".status").textContent = text; };
function readable(node, reading) {
    for (const event of ["pointerenter", "focus", "click"])
        node.addEventListener(event, () => say(reading()));
    for (const event of ["pointerleave", "blur"])
        node.addEventListener(event, () => say(""));
    return node;
}

// A cell of a table that shows a number, and knows it whole.
function numberCell(x, shown = short(x)) {
    const node = html("td", {}, shown);
    node.dataset.value = x;
    return node;
}

function heading(table, names) {
    table.replaceChildren(html("thead", {}, html("tr", {}, ...names.map(name =>
        html("th", {scope: "col"}, name)))), html("tbody"));
    return table.lastChild;
}

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
let nGroups = 0;
function buttons(n, first, changed) {
    const name = `group-${++nGroups}`;
    return Array.from({length: n}, (_, i) => {
        const input = html("input", {type: "radio", name, value: i, autocomplete: "off"});
        input.checked = i === first;
        input.addEventListener("change", changed);
        return input;
    });
}

function choice(section, name, labels, first, changed, sample = () => "") {
    const inputs = buttons(labels.length, first, changed);
    section.querySelector(`[data-control="${name}"]`).append(...labels.map((label, i) =>
        html("label", {}, inputs[i], sample(i), label)));
    return {get value() { return inputs.findIndex(input => input.checked); },
            set value(i) { inputs[i].checked = true; }};
}

// A table of n rows of which one is chosen, by the button in its first cell or by a click anywhere
// in it. Where there are more than `most`, those around the chosen one are shown, and a slider
// above the table moves through all.
function rowsOf(table, heads, n, first, changed, most = 12) {
    const inputs = buttons(n, first, changed);
    const rows = inputs.map(input => html("tr", {}, html("th", {scope: "row"},
        html("label", {}, input, ""))));
    heading(table, heads).append(...rows);
    const range = n > most && html("input", {type: "range", min: 0, max: n - 1, class: "rows",
                                             "aria-label": heads[0], autocomplete: "off"});
    const chosen = {
        get value() { return inputs.findIndex(input => input.checked); },
        set value(i) {
            inputs[i].checked = true;
            changed();
        },
        // The name of row i, and its other cells.
        fill(i, name, ...cells) {
            const [head, ...others] = rows[i].children;
            others.forEach(cell => cell.remove());
            head.firstChild.lastChild.data = name;
            rows[i].append(...cells);
        },
        // Shows which row is chosen.
        show() {
            const from = Math.max(0, Math.min(this.value - most / 2, n - most));
            rows.forEach((row, i) => {
                row.classList.toggle("chosen", i === this.value);
                row.hidden = n > most && (i < from || i >= from + most);
            });
            range && (range.value = this.value);
        },
    };
    rows.forEach((row, i) => row.addEventListener("click", event => {
        if (!event.target.closest("label"))
            chosen.value = i;
    }));
    if (range) {
        range.addEventListener("input", () => { chosen.value = range.valueAsNumber; });
        table.before(range);
    }
    return chosen;
}

// ---- charts

// A scale is where a value stands, from 0 to 1, and the values that are written at the axis.
function bands(n, name) {           // n fields of one width
    const step = Math.max(1, Math.ceil(n / 12));
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
    const box = {left: 62, top: 8, right: width - 14, bottom: height - 40};
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

// A wide, invisible disc around a mark, for pointers and fingers: it is read, and may be picked.
function hit(x, y, reading, pick) {
    const disc = readable(svg("circle", {class: "hit", cx: x, cy: y, r: 11},
                              svg("title", {}, reading)), () => reading);
    if (pick)
        disc.addEventListener("click", pick);
    return disc;
}

// A mean with its error, from below to above.
function errorBar(c, x, low, high, kind) {
    return svg("path", {class: kind + " curve",
                        d: `M${x - 4} ${c.Y(low)}h8m-4 0V${c.Y(high)}m-4 0h8`});
}

// A short piece of line number i, for a legend.
function sample(i, kind) {
    return svg("svg", {class: "sample", viewBox: "0 0 36 16", "aria-hidden": "true"},
        svg("path", {class: kind + " curve", d: "M0 8H36", "stroke-dasharray": DASHES[i % 8]}),
        mark(i, 18, 8, 4, kind + " mark"));
}

// ---- the trip

const SITES = {H: "H, the input of attention", Q: "Q, the queries", K: "K, the keys",
               V: "V, the values that attention reads", A: "A, the output of attention"};
const WINDOW = 0, STACK = 1;

// The drawing of section 1 of drugs.c: the layers, and what happens in one of them. Lit are the
// site that is dosed and the layers it is dosed in.
function drawModel(figure, layers, site, isDosed) {
    const box = (x, y, width, text) => [svg("rect", {class: "frame", x, y, width, height: 18}),
        svg("text", {x: x + width / 2, y: y + 13, "text-anchor": "middle"}, text)];
    const place = (name, x, y) => [
        svg("circle", {class: name === site ? "mark lit" : "mark", cx: x, cy: y, r: 9}),
        svg("text", {x, y: y + 4, "text-anchor": "middle"}, name)];
    const all = [...Array(layers).keys()];
    const high = 300 / layers;
    const node = svg("svg", {class: "drawing", viewBox: "0 0 240 316", role: "img", "aria-label":
            `A layer. Dosed is ${site}, in the layers ${all.filter(isDosed).join(", ")}.`},
        ...all.map(l => svg("rect", {class: isDosed(l) ? "frame lit" : "frame", x: 2,
            y: 8 + l * high, width: 24, height: Math.max(1, high - 2)})),
        svg("path", {class: "curve", d: "M52 8V308M52 26h38M120 35v24M80 66h115M80 66v10m56-10v10" +
            "m56-10v10M80 94v62M136 94v62M192 94v96M110 174v16M136 208v26M120 234v28H52" +
            "M52 282h14M142 291v11H52"}),
        svg("text", {x: 56, y: 12}, "x"),
        ...box(90, 17, 70, "RMSNorm"), ...place("H", 120, 50),
        ...box(66, 76, 28, "wq"), ...box(122, 76, 28, "wk"), ...box(178, 76, 28, "wv"),
        ...place("Q", 80, 112), ...box(120, 104, 88, "cache"),
        ...place("K", 136, 140), ...place("V", 192, 140),
        ...box(66, 156, 84, "q·k, softmax"), ...box(90, 190, 116, "weighted sum"),
        ...place("A", 136, 222), ...box(100, 238, 44, "wo"),
        svg("text", {x: 40, y: 266}, "+"), ...box(66, 273, 152, "norm, w1 w3, silu, w2"),
        svg("text", {x: 40, y: 306}, "+"));
    node.querySelectorAll("rect.frame:not(.lit)").forEach(one => one.classList.add("paper"));
    figure.querySelector(".drawing")?.remove();
    figure.append(node);
}

// Where the numbers of a trip are in its long lists.
function tripNumbers(data) {
    const kinds = ["window", "stack"];
    const levels = data.layers + 1, thetas = data.thetas.length, tokens = data.tokens.length;
    const part = (list, kind, place, theta, n) => {
        const first = (place * thetas + theta) * n;
        return list[kinds[kind]].slice(first, first + n);
    };
    return {distances: (kind, place, theta) => part(data.distance, kind, place, theta, levels),
            drugged: (kind, place, theta) => part(data.drugged, kind, place, theta, tokens)};
}

function trip(section, data) {
    const levels = data.layers + 1;
    const thetas = data.thetas.map(short);
    const find = name => section.querySelector(name);
    const {distances, drugged} = tripNumbers(data);
    find(".site").textContent = SITES[data.site] || data.site;

    // Begin at two thirds of the largest angle, and with a window that has layers below and above.
    const theta = slider(section, "theta", thetas.length, i => thetas[i],
                         Math.round((thetas.length - 1) * 2 / 3), draw);
    const kind = choice(section, "kind", ["a layer and its neighbours", "all layers up to it"],
                        WINDOW, draw);
    const every = Math.ceil(levels / 16);
    const heads = [...Array(levels).keys()].map(level => level % every ? "" : level);
    const table = find(".stairs");
    const place = rowsOf(table, ["layer", ...heads, "left"], data.layers,
                         Math.floor(data.layers / 3), draw, Infinity);
    const isDosed = (p, layer) => kind.value === STACK ? layer <= p : Math.abs(layer - p) <= 1;
    const around = p => kind.value === WINDOW ? `around layer ${p}` : `in layers 0 to ${p}`;

    // The cells stay, so that the keyboard may stand on one; each draw gives them other shades.
    const cells = Array.from({length: data.layers}, (_, p) =>
        Array.from({length: levels}, (_, level) => {
            const cell = readable(
                html("td", {class: "cell", tabindex: p || level ? -1 : 0}, html("span")),
                () => `Dosed ${around(p)}, level ${level}: ${cell.textContent}`);
            cell.addEventListener("keydown", event => {
                const [down, right] = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1],
                                       ArrowRight: [0, 1]}[event.key] || [0, 0];
                const next = cells[p + down]?.[level + right];
                if (next && next !== cell) {
                    event.preventDefault();
                    cell.tabIndex = -1;
                    next.tabIndex = 0;
                    next.focus();
                }
            });
            return cell;
        }));
    cells.forEach((row, p) => place.fill(p, String(p), ...row, html("td")));

    // How much of a row's peak is left at the end; nothing where there is no peak.
    const leftOf = x => Math.max(...x) ? x[x.length - 1] / Math.max(...x) : null;

    function draw() {
        const p = place.value, t = theta.valueAsNumber;
        theta.say();
        place.show();
        cells.forEach((row, q) => drawRow(row, q, distances(kind.value, q, t)));
        const [first, last] = [0, data.layers - 1].map(q => leftOf(distances(kind.value, q, t)));
        find(".answer").textContent = first === null || last === null
            ? "Without a dose the twins are the same to the last bit."
            : `At θ = ${thetas[t]}, ${whole(first)} of the peak is left at the end when the dose is ` +
              `${around(0)}, and ${whole(last)} when it is ${around(data.layers - 1)}: ` +
              (first < last * .75 ? "early glitches fade, late ones have no layers left to fade in."
                                  : "here early glitches do not fade.");
        drawModel(find(".model"), data.layers, data.site, layer => isDosed(p, layer));
        drawProfile(p, t);
        drawNext(drugged(kind.value, p, t));
    }

    // Shade is the square root of value / peak: as 1 - cosine is about angle² / 2, twice as strong
    // is twice the angle. Exactly 0 has no shade. Column l + 1 is what left layer l.
    function drawRow(row, p, x) {
        const peak = Math.max(...x);
        row.forEach((cell, level) => {
            const dosed = l => l >= 0 && l < data.layers && isDosed(p, l);
            cell.style.setProperty("--shade", peak ? Math.sqrt(x[level] / peak).toFixed(3) : 0);
            cell.classList.toggle("dosed", dosed(level - 1));
            cell.classList.toggle("first", !dosed(level - 2));
            cell.classList.toggle("last", !dosed(level));
            cell.firstChild.textContent = x[level]
                ? `1 − cosine = ${short(x[level])}, ${whole(x[level] / peak)} of the peak`
                : "exactly the sober twin";
        });
        const left = leftOf(x);
        const end = row[0].parentNode.lastChild;
        end.textContent = left === null ? "–" : whole(left);
        end.title = `peak ${short(peak)}`;
    }

    // The chosen row, as a curve. The layers that are dosed are shaded: layer l lies between levels
    // l and l + 1. The axis is the same for all angles.
    function drawProfile(p, t) {
        const figure = find(".profile");
        const points = distances(kind.value, p, t);
        const highest = Math.max(...distances(kind.value, p, thetas.length - 1), ...points, 1e-30);
        const x = {at: level => (level + .25) / (levels - .5), ticks: bands(levels, String).ticks};
        const y = downward(straight(0, highest * 1.05));
        const c = chart(figure, 280, x, y, "level", "1 − cosine");
        figure.querySelector("figcaption").textContent =
            `The chosen row in numbers: dosed ${around(p)}, shaded, at θ = ${thetas[t]}.`;
        for (let layer = 0; layer < data.layers; layer++)
            if (isDosed(p, layer))
                c.clip.append(svg("rect", {class: "dosed", x: c.X(layer), y: c.box.top,
                                           width: c.X(1) - c.X(0), height: c.high}));
        c.node.append(svg("path", {class: "here curve", d: path(points.map((y, level) =>
            [c.X(level), c.Y(y)]))}));
        points.forEach((y, level) => {
            const dot = mark(4, c.X(level), c.Y(y), 3.5, "here mark point");
            dot.dataset.value = y;
            c.node.append(dot, hit(c.X(level), c.Y(y), `level ${level}: 1 − cosine = ${short(y)}`));
        });
    }

    // The next tokens: a row for each, and a bar of what it keeps, loses or wins.
    function drawNext(chances) {
        const body = heading(find(".next"), ["token", "sober", "drugged", ""]);
        const highest = Math.max(...data.sober, ...chances);
        const winner = chances.indexOf(Math.max(...chances));
        chances.forEach((q, i) => {
            const p = data.sober[i];
            const bar = (kind, share) => html("span", {class: "bar " + kind,
                style: `width: ${(100 * share / highest).toFixed(1)}%`});
            body.append(html("tr", {class: i === winner ? "winner" : ""},
                html("th", {scope: "row"}, tokenName(data.tokens[i])),
                numberCell(p, percent(p)), numberCell(q, percent(q)),
                html("td", {"aria-hidden": "true"}, bar("kept", Math.min(p, q)),
                     bar(q > p ? "won" : "lost", Math.abs(q - p)))));
        });
    }
    return draw;
}

// ---- texts

// Which words (any list of strings) of b are in a as well, in the same order: the longest such
// list, found from the end. length[i][j] is how long it is for what is left of a from i and of b
// from j.
function common(a, b) {
    const length = Array.from({length: a.length + 1}, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i--)
        for (let j = b.length - 1; j >= 0; j--)
            length[i][j] = a[i] === b[j] ? length[i + 1][j + 1] + 1
                                         : Math.max(length[i + 1][j], length[i][j + 1]);
    const inB = b.map(() => false);
    for (let i = 0, j = 0; i < a.length && j < b.length;) {
        if (a[i] === b[j]) {
            inB[j++] = true;
            i++;
        } else if (length[i + 1][j] >= length[i][j + 1]) {
            i++;
        } else {
            j++;
        }
    }
    return inB;
}

// The cell of a text in a ladder, from the first word on that is not that of `base`; words that
// base does not have, or not in this order, are marked. White space is kept and never compared.
function textCell(text, base, ended) {
    const wordsOf = one => one.match(/\S+/g) || [];
    const cell = html("td", {});
    cell.dataset.text = text;
    if (text === base) {
        cell.append("the same");
        return cell;
    }
    const words = wordsOf(text), others = wordsOf(base);
    const same = common(others, words);
    let first = 0;
    while (first < words.length && words[first] === others[first])
        first++;
    if (first)
        cell.append("… ");
    let word = 0;
    for (const piece of text.match(/\S+|\s+/g) || []) {
        const i = /\S/.test(piece) ? word++ : word - 1;
        if (i >= first)
            cell.append(/\S/.test(piece) && !same[i] ? html("ins", {}, visible(piece))
                                                     : visible(piece));
    }
    if (ended)
        cell.append(" † it ended here");
    return cell;
}

// ---- the probe

function probe(section, data) {
    const find = name => section.querySelector(name);
    // tests/lab spells a new line so
    const plain = token => visible(token.replace(/\\n/g, "\n"));
    const torn = data.filter(one => one.agreement < 1);
    find(".tokens").append(...data.map(one => html("span", {
        style: `--doubt: ${1 - one.agreement}`, class: one.agreement < 1 ? "torn" : ""},
        plain(one.token))));
    const least = torn.reduce((a, b) => b.agreement < a.agreement ? b : a, torn[0]);
    find(".answer").textContent = !torn.length
        ? `All ${data.length} tokens: no twin says anything else.`
        : `All twins would have written ${data.length - torn.length} of ${data.length} tokens, ` +
          `too; they waver most at “${plain(least.token).trim()}”, which ` +
          `${whole(least.agreement)} would have written.`;
    const body = heading(find(".doubts"), ["token", "position", "probability", "twins that agree",
                                           "the others said"]);
    for (const one of torn)
        body.append(html("tr", {}, html("th", {scope: "row"}, tokenName(one.token)),
            numberCell(one.position), numberCell(one.probability),
            numberCell(one.agreement, whole(one.agreement)),
            html("td", {}, one.said.filter(([word]) => word !== one.token).map(([word, share]) =>
                `${tokenName(word)} ${whole(share)}`).join(", "))));
    return () => {};
}

// ---- the explorer

function explore(section, data) {
    const find = name => section.querySelector(name);
    const names = data.methods.map(method => method.name);
    const start = Math.max(0, names.indexOf("V"));
    // Begin with the lightest dose of which most texts are other ones.
    const doses = data.methods[start].cells;
    const several = doses.findIndex(cell => 2 * cell.differ > data.seeds.length);
    const first = several < 0 ? doses.length - 1 : several;
    const method = choice(section, "method", names, start, draw,
        i => sample(i, names[i] === "temperature" ? "base" : ""));
    const seed = slider(section, "seed", data.sober.texts.length, i => data.seeds[i], 0, draw);
    const most = Math.max(...data.methods.map(one => one.cells.length));
    const strength = rowsOf(find(".ladder"), ["dose", "differ", "text"], most, first, draw);
    const endings = cell => cell.ended.reduce((a, b) => a + b, 0);
    const label = cell => cell.strength + (endings(cell) ? "†" : "");
    const share = cell => `${cell.differ} of ${data.seeds.length}`;
    find(".seeds").textContent = plural(data.seeds.length, "seed");

    // What a method is worth against temperature, in a table of all.
    const body = heading(find(".gains"), ["method", "nats a token"]);
    for (const one of data.methods)
        if (one.gain !== null)
            body.append(html("tr", {}, html("th", {scope: "row"}, one.name),
                             numberCell(one.gain, one.gain.toFixed(2).replace("-", "−"))));

    // What a token costs in nats; a logarithm wants more than 0.
    const cost = cell => Math.max(1e-5, -cell.likelihood);
    const reading = (one, cell) => `${one.name} ${cell.strength}: ${share(cell)} texts differ ` +
        `from the sober one, diversity ${short(cell.diversity)}, ` +
        `${withError(cell.likelihood, cell.error)} nats a token, ` +
        `turned by ${short(cell.angle)} radians, ${endings(cell)} ended early`;

    function draw() {
        const one = data.methods[method.value], i = seed.valueAsNumber;
        const sober = data.texts[data.sober.texts[i]];
        seed.say();
        find(".before").textContent = visible(sober);
        one.cells.forEach((cell, j) => strength.fill(j, label(cell),
            numberCell(cell.differ, share(cell)),
            textCell(data.texts[cell.texts[i]], sober, cell.ended[i])));
        strength.show();
        const cell = one.cells[strength.value];
        const gain = one.gain === null ? "." : "; at the same diversity the sober model finds " +
            `${one.name}’s texts of all strengths ` +
            `${short(Math.abs(Number(one.gain.toFixed(2))))} nats a token ` +
            `${one.gain < 0 ? "less likely" : "likelier"} than those of temperature.`;
        find(".answer").textContent =
            `${one.name} ${cell.strength}: ${share(cell)} texts differ from the sober one` + gain;
        drawCurves(one, cell);
    }

    // Overdoses lie far below, so the axis is logarithmic: it shows the light doses well. What
    // falls on the dotted line has the diversity of the chosen cell.
    function drawCurves(chosen, chosenCell) {
        const cells = data.methods.flatMap(one => one.cells);
        const range = (values, least) => [Math.min(...values, 1e9), Math.max(...values, least)];
        const [few, many] = range(cells.map(cell => cell.diversity), .01);
        const [likely, unlikely] = range(cells.map(cell => cost(cell)), 1e-4);
        const x = straight(few - .03 * many, many * 1.06);
        const y = logarithmic(likely / 1.15, unlikely * 1.15);
        y.ticks = y.ticks.map(([value, name]) => [value, "−" + name]);
        const c = chart(find(".curves"), 420, x, y, "diversity: share of different pairs of tokens",
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
                if (one === chosen && cell.error)
                    c.clip.append(errorBar(c, px, Math.max(likely / 2, cost(cell) - cell.error),
                                           cost(cell) + cell.error, here));
                c.node.append(mark(i, px, py, one === chosen ? 5 : 3.5, here + "mark"));
                if (one === chosen && !points.slice(0, j).some(([a, b]) =>
                        Math.hypot(a - px, b - py) < 14))
                    c.node.append(svg("text", {class: "dose", x: px + 8, y: py - 7}, label(cell)));
                c.node.append(hit(px, py, reading(one, cell), () => {
                    method.value = i;
                    strength.value = j;
                }));
            });
        }
        c.node.append(svg("circle", {class: "chosen", cx: c.X(chosenCell.diversity), r: 10,
                                     cy: c.Y(cost(chosenCell)), "pointer-events": "none"}));
    }
    return draw;
}

// ---- the shower

function shower(section, data) {
    const find = name => section.querySelector(name);
    const cells = data.cells;
    const name = cell => cell.every ? `every ${cell.every}` : "never";
    const n = cells[0].costs.length;
    const gains = cells.filter(cell => cell.every).map(cell => `every ${cell.every} tokens it gains ` +
        `${withError(cell.gain, cell.gainError)}, in ${cell.better} of ${n} seeds`);
    find(".answer").textContent = `In nats a token, ${gains.join("; ")}.`;
    find(".wide figcaption").textContent = `The texts of seed ${cells[0].seed}, whose gain is nearest ` +
        "to the mean, each from the first word that differs. Underlined: words that the first one " +
        "has not.";
    const row = rowsOf(find(".ladder"), ["showers", "cost", "text"], cells.length,
                       Math.min(2, cells.length - 1), draw);
    cells.forEach((cell, i) => row.fill(i, name(cell), numberCell(cell.cost, cell.cost.toFixed(2)),
        i ? textCell(cell.text, cells[0].text, cell.ended)
          : html("td", {}, visible(cell.text), cell.ended ? " † it ended here" : "")));

    function draw() {
        row.show();
        const most = Math.max(...cells.flatMap(cell => cell.costs));
        const x = bands(cells.length, i => name(cells[i]));
        const c = chart(find(".curve"), 380, x, downward(straight(0, most * 1.04)),
                        `a shower after this many tokens; ${plural(n, "seed")}`, "cost, nats a token");
        c.node.append(svg("path", {class: "base curve", "stroke-dasharray": "1 4",
                                   d: `M${c.box.left} ${c.Y(data.sober)}H${c.box.right}`}),
            svg("text", {class: "soft", x: c.box.left + 6, y: c.Y(data.sober) - 5},
                `the sober text, ${data.sober.toFixed(2)}`));
        cells.forEach((cell, i) => {
            // dots stand side by side, so that each can be seen: a place for each seed
            cell.costs.forEach((cost, k) => c.node.append(svg("circle", {class: "seed", r: 2,
                cx: c.X(i) + (k * 7 % n / n - .5) * .6 * c.wide / cells.length, cy: c.Y(cost)})));
        });
        c.node.append(svg("path", {class: "here curve",
            d: path(cells.map((cell, i) => [c.X(i), c.Y(cell.mean)]))}));
        cells.forEach((cell, i) => {
            const dot = mark(4, c.X(i), c.Y(cell.mean), i === row.value ? 6 : 4, "here mark point");
            Object.assign(dot.dataset, {value: cell.mean, error: cell.error});
            if (cell.error)
                c.node.append(errorBar(c, c.X(i), cell.mean - cell.error, cell.mean + cell.error,
                                       "here"));
            c.node.append(dot, svg("text", {x: c.X(i) + 10, y: c.Y(cell.mean) - 8},
                                   cell.mean.toFixed(2)),
                hit(c.X(i), c.Y(cell.mean), `showers ${name(cell)}: ` +
                    `${withError(cell.mean, cell.error)} nats a token`, () => { row.value = i; }));
        });
    }
    return draw;
}

// ---- the step

const LOSSES = ["lesson", "first order", "its sequel", "other text"];

// Where each word comes from: number i if it stands, with two words beside it, in sources[i] just
// so;
// -1 if in none. Single words and pairs are everywhere.
function origins(words, sources) {
    const runs = (list, n) => list.slice(n - 1).map((_, i) => list.slice(i, i + n).join(" "));
    const from = words.map(() => -1);
    sources.forEach((source, i) => {
        const n = Math.min(3, source.length);
        const known = new Set(runs(source, n));
        if (n)
            runs(words, n).forEach((run, j) => {
                for (let k = j; known.has(run) && k < j + n; k++)
                    from[k] = from[k] < 0 ? i : from[k];
            });
    });
    return from;
}

function step(section, data) {
    const find = name => section.querySelector(name);
    const zero = Math.max(0, data.sizes.indexOf(0));    // what all others are compared with
    // Begin with the size after which lesson, sequel and other text together are expected best.
    const total = i => [0, 2, 3].reduce((sum, j) => sum + (Number(data.losses[j][i]) || 0), 0);
    const best = data.losses ? data.sizes.reduce((a, _, i) => total(i) < total(a) ? i : a, 0)
                             : Math.floor((data.sizes.length - 1) / 2);
    const size = rowsOf(find(".ladder"), ["step size", "text and losses"], data.sizes.length,
                        best, draw);
    if (data.words) {
        ["the lesson", "its sequel, not taught", "other text, not taught"].forEach((name, i) => {
            if (data.sources[i].length)
                find(".sources").append(html("dt", {}, name),
                                        html("dd", {}, visible(data.sources[i].join(" "))));
        });
    } else {
        find(".texts figcaption").textContent = "After each step size.";
    }
    if (!data.losses)
        find(".losses").remove();
    else
        find(".losses").append(html("div", {class: "lines"}, ...LOSSES.map((name, i) =>
            html("span", {}, sample(i, i === 0 ? "here" : ""), name))));
    data.sizes.forEach((one, i) => size.fill(i, String(one),
                                             html("td", {}, ...wordsOf(i), lossesOf(i))));

    // The words of a column, those of the lesson and of its sequel marked.
    function wordsOf(i) {
        if (!data.words)
            return [];
        const words = data.words[i];
        const from = origins(words, data.sources.slice(0, 2));
        return words.flatMap((word, j) => [from[j] < 0 ? visible(word) :
            html("b", {class: ["lesson", "sequel"][from[j]]}, visible(word)), " "]);
    }

    // The losses of a size, in one line.
    function lossesOf(i) {
        const line = html("small");
        (data.losses ? LOSSES : []).forEach((name, j) => {
            const one = html("span", {class: "loss"}, short(data.losses[j][i]));
            one.dataset.value = data.losses[j][i];
            line.append(j ? ", " : "", name + " ", one);
        });
        return line;
    }

    function draw() {
        const i = size.value;
        size.show();
        find(".answer").textContent = !data.losses ? "" :
            `With a step of ${data.sizes[i]} the lesson’s loss goes from ` +
            `${short(data.losses[0][zero])} to ${short(data.losses[0][i])} nats a token, that of other ` +
            `text from ${short(data.losses[3][zero])} to ${short(data.losses[3][i])}.`;
        if (data.losses)
            drawLosses(i);
    }

    // Both axes are logarithmic. A step of 0 has no logarithm: it stands before the break, and no
    // line leads there.
    function drawLosses(chosen) {
        const steps = data.sizes.filter(x => x > 0);
        const low = Math.log10(Math.min(...steps, 1)), high = Math.log10(Math.max(...steps, 1e-9));
        const place = v => v > 0 ? .16 + .8 * (Math.log10(v) - low) / (high - low || 1) : .05;
        const ticks = [...new Set(data.sizes)].filter(v => v === 0 || powerOfTen(v));
        const x = {at: place, ticks: ticks.map(v => [v, String(v)])};

        const seen = [0, 2, 3].flatMap(i => data.losses[i]).filter(v => v > 0);
        const bottom = Math.min(...seen) / 2;
        const scale = downward(logarithmic(bottom, Math.max(...seen) * 1.5));
        const y = {at: v => v > 0 ? scale.at(v) : 2, ticks: scale.ticks};  // 2: far below
        const c = chart(find(".losses"), 340, x, y, "step size", "loss, nats a token");
        c.node.append(svg("path", {class: "chosen", "stroke-dasharray": "1 3",
            d: `M${c.X(data.sizes[chosen])} ${c.box.top}V${c.box.bottom}`}));
        if (data.sizes.includes(0)) {       // the break, through both sides of the frame
            const at = c.box.left + .1 * c.wide;
            for (const side of [c.box.top, c.box.bottom])
                c.node.append(
                    svg("rect", {class: "paper", x: at - 3, y: side - 5, width: 6, height: 10}),
                    svg("path", {class: "frame", d: `M${at - 6} ${side + 6}l6 -12m0 12l6 -12`}));
        }
        const order = data.sizes.map((_, i) => i).sort((a, b) => data.sizes[a] - data.sizes[b]);
        data.losses.forEach((column, i) => {
            const here = i === 0 ? "here " : "";
            const numeric = order.filter(j => typeof column[j] === "number");
            const points = i === 1 ? slope(column, low, high)
                : numeric.filter(j => data.sizes[j] > 0).map(j => [data.sizes[j], column[j]]);
            c.clip.append(svg("path", {class: here + "curve", "stroke-dasharray": DASHES[i],
                d: path(points.map(([a, b]) => [c.X(a), c.Y(b)]))}));
            for (const j of numeric) {
                const at = [c.X(data.sizes[j]), c.Y(column[j])];
                c.clip.append(mark(i, ...at, j === chosen ? 6 : 4, here + "mark"),
                    hit(...at, `step size ${data.sizes[j]}, ${LOSSES[i]}: ${short(column[j])} ` +
                        "nats a token", () => { size.value = j; }));
            }
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
        return Array.from({length: 201}, (_, i) => {
            const v = 10 ** (low + (high - low) * i / 200);
            return [v, column[first] + rise * (v - data.sizes[first])];
        });
    }
    return draw;
}

// ---- all of them

const KINDS = {trip, probe, explore, shower, step};
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
