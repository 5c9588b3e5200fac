"""English text to calibrate and to evaluate language models with: articles of Wikipedia.

They come from the test data that the package gensim bundles (a shortened dump of 2014, licence CC BY-SA). The two
texts share no article, so data that a method was calibrated with never judges it.
"""

from __future__ import annotations

import bz2
import html
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from graphopt.errors import ModelError
from graphopt.models.packages import Notify, PackagedFile, bring

Split = Literal["evaluation", "calibration"]

PACKAGE = ("gensim", "4.4.0")
DUMP = PackagedFile(
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    1695871,
)
LENGTHS = {"evaluation": 180_000, "calibration": 450_000}
"""Characters of each text."""
SHORTEST_ARTICLE = 3_500
LONGEST_ARTICLE = 12_000
"""Characters; shorter articles are left out, longer ones cut, so that no subject outweighs the others."""

_INNERMOST = re.compile(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}")
_INNERMOST_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_REMOVED = re.compile(
    r"<!--.*?-->|<ref[^>/]*/>|<(ref|math|gallery|table|timeline|code|source|imagemap|div)\b[^>]*>.*?</\1>|<[^<>]*>",
    re.DOTALL | re.IGNORECASE,
)


def wikipedia(split: Split, cache: Path | str | None = None, progress: Notify | None = None) -> str:
    """Paragraphs of Wikipedia articles, an empty line between two; every second article is the other split's.

    Args:
        split: "evaluation" (180,000 characters) or "calibration" (450,000 characters).
        cache: The cache folder; see `graphopt.cache.cache_folder`.
        progress: Called with a line of text before a download.

    Raises:
        UsageError: The package can't be fetched.
        ModelError: What it holds isn't what is expected.
    """
    root = bring(*PACKAGE, [DUMP], cache=cache, progress=progress)
    try:
        dump = bz2.decompress((root / DUMP.path).read_bytes()).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{root / DUMP.path} can't be read ({error}); delete it and fetch it again") from error
    chosen = [text for index, text in enumerate(articles(dump)) if index % 2 == (split == "calibration")]
    return "\n\n".join(chosen)[: LENGTHS[split]]


def articles(dump: str) -> Iterator[str]:
    """The plain text of each article of a MediaWiki XML dump that is long enough, cut to `LONGEST_ARTICLE`."""
    for match in re.finditer(r"<text[^>]*>(.*?)</text>", dump, re.DOTALL):
        text = plain_text(html.unescape(match.group(1)))
        if len(text) >= SHORTEST_ARTICLE:
            yield text[:LONGEST_ARTICLE]


def plain_text(markup: str) -> str:
    """The paragraphs of a page in MediaWiki markup; templates, tables, lists, headings and references are dropped."""
    text = _REMOVED.sub("", html.unescape(markup))
    text = _repeat(_INNERMOST, lambda _: "", text)
    text = _repeat(_INNERMOST_LINK, _link, text)
    text = re.sub(r"\[https?://\S*\s*([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}", "", text)
    paragraphs = (" ".join(line.split(" ")).strip() for line in text.splitlines())
    return "\n\n".join(p for p in paragraphs if p and p[0] not in "=*#:;|!{}<[" and len(p) > 40)


def _repeat(pattern: re.Pattern[str], replacement: Callable[[re.Match[str]], str], text: str) -> str:
    """Replace until nothing matches: what nests is taken from the inside."""
    count = 1
    while count:
        text, count = pattern.subn(replacement, text)
    return text


def _link(match: re.Match[str]) -> str:
    """What a link shows; nothing for images, categories and other languages."""
    target, _, shown = match.group(1).partition("|")
    if re.match(r"(file|image|category):", target.strip(), re.IGNORECASE):
        return ""
    if not shown and re.match(r"[a-z]{2,3}(-[a-z-]+)?:", target):
        return ""
    return (shown or target).replace("|", " ")
