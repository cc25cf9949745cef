"""Running text out of the files of a package: one function for each kind of file.

Each takes {path: content} of the files of one source and yields documents, in the order of the paths. Rules:

- HTML and SWORD markup through the standard library's parser: what navigates (menus, tables of contents,
  headers, footers), scripts and styles are left out; of a page that marks its main part (main, article,
  role=main, class=body), only that. White space runs together except in <pre>.
- Manual pages: requests (lines that begin with a dot) and comments are left out, their words kept.
- Messages of a translation that hold a placeholder (<tag>, {name}, %s) are left out: they are no sentences.
- Poems: title, author and lines.
- Everywhere: no carriage returns, zero-width spaces, blanks at line ends, and more than one empty line.
"""

from __future__ import annotations

import gzip
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from html.parser import HTMLParser
from typing import Any

from phsa_megatron.config.errors import DataError

Files = Mapping[str, bytes]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BREAKS = _words(
    "p div h1 h2 h3 h4 h5 h6 li dt dd tr pre blockquote section article main table ul ol dl br hr title "
    "caption figure lb l lg verse chapter milestone"
)
_LEFT_OUT = _words("head script style nav aside header footer svg form button noscript iframe object note")
_LEFT_OUT_CLASSES = _words(
    "navheader navfooter docnav toc sphinxsidebar related footer breadcrumb headerlink sidebar nav-wrapper "
    "mobile-nav searchbox"
)
_EMPTY = _words("area base br col embed hr img input link meta source track wbr")
_LEFT_OUT_IDS = frozenset({"banner"})
_LEAST_MESSAGE_CHARS = 60
_LEAST_TRANSLATION_CHARS = 15
_PLACEHOLDER = re.compile(r"<[^<>]+>|\{[^{}]*\}|%[-+0-9.$]*[a-zA-Z]")
_POEM_KEYS = ("title", "rhythmic", "chapter", "author", "paragraphs", "content")
_ROFF_WORDS = _words("B I BR IR RB RI BI IB SM SB")
_ROFF_HEADINGS = _words("SH SS Sh Ss")
_ROFF_BREAKS = _words("PP P LP TP IP HP Pp RS RE br sp nf fi EX EE")
_ROFF_GLYPHS = {"aq": "'", "lq": '"', "rq": '"', "en": "-", "em": "--", "co": "(c)", "bu": "*", "dq": '"'}
_ROFF_ESCAPE = re.compile(
    r"\\(?:f(?:\(..|\[[^]]*\]|.)|s[-+]?\d|\*?\((?P<two>..)|\*?\[(?P<name>[^]]*)\]|(?P<one>.))"
)


def clean(text: str) -> str:
    """Return a text without what is invisible, blanks at line ends and more than one empty line."""
    text = text.replace("\r", "").replace("\xa0", " ").replace("\u200b", "").replace("\ufeff", "")
    text = text.replace("¶", "")  # Sphinx's links to headings
    lines = (line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


class _Markup(HTMLParser):
    """Collects the text of a page: all of it, and apart what its main part holds."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.whole: list[str] = []
        self.main: list[str] = []
        # The element that is left out, or is the main part, and how many of its name are open: only equal
        # names are counted, so that elements that nobody closes do no harm.
        self._skipped: tuple[str, int] | None = None
        self._chosen: tuple[str, int] | None = None
        self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skipped, self._chosen = _opened(self._skipped, tag), _opened(self._chosen, tag)
        if self._skipped:
            return
        attributes = dict(attrs)
        classes = set((attributes.get("class") or "").split())
        if tag in _EMPTY:
            self.handle_startendtag(tag, attrs)
            return
        if tag in _LEFT_OUT or classes & _LEFT_OUT_CLASSES or attributes.get("id") in _LEFT_OUT_IDS:
            self._skipped = tag, 1
            return
        is_main = tag in ("main", "article") or attributes.get("role") == "main" or "body" in classes
        if is_main and not self._chosen:
            self._chosen = tag, 1
        if tag in _BREAKS:
            self._add("\n")
        self._preformatted += tag == "pre"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if not self._skipped and tag in _BREAKS:
            self._add("\n")

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            self._skipped = _closed(self._skipped, tag)
        elif tag in _BREAKS:
            self._add("\n")
            self._preformatted = max(0, self._preformatted - (tag == "pre"))
        self._chosen = _closed(self._chosen, tag)

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self._add(data if self._preformatted else re.sub(r"\s+", " ", data))

    def _add(self, text: str) -> None:
        for parts in (self.whole, self.main) if self._chosen else (self.whole,):
            at_start = not parts or parts[-1].endswith(("\n", " "))
            parts.append(text[1:] if text.startswith(" ") and at_start and not self._preformatted else text)


def _opened(element: tuple[str, int] | None, tag: str) -> tuple[str, int] | None:
    return (tag, element[1] + 1) if element and element[0] == tag else element


def _closed(element: tuple[str, int] | None, tag: str) -> tuple[str, int] | None:
    if not element or element[0] != tag:
        return element
    return (tag, element[1] - 1) if element[1] > 1 else None


def text_of_markup(page: str) -> str:
    """Return the running text of HTML, XHTML, or the markup of SWORD modules (OSIS, ThML)."""
    parser = _Markup()
    parser.feed(page)
    parser.close()
    return clean("".join(parser.main)) or clean("".join(parser.whole))


def text_of_man_page(source: str) -> str:
    """Return the running text of a manual page (roff with the macros of man or mdoc)."""
    out: list[str] = []
    for line in source.split("\n"):
        if not line.startswith((".", "'")):
            out.append(line + " ")
            continue
        name, _, words = line[1:].strip().partition(" ")
        words = words.replace('"', "").strip()
        if name in _ROFF_HEADINGS:
            out.append(f"\n\n{words}\n")
        elif name in _ROFF_WORDS:
            out.append(words + " ")
        elif name in _ROFF_BREAKS:
            out.append("\n" + (words.split(" ")[0] + " " if name == "IP" and words else ""))
    text = _ROFF_ESCAPE.sub(_roff_glyph, "".join(out))
    return clean(re.sub(r"[ \t]+", " ", text))


def _roff_glyph(escape: re.Match[str]) -> str:
    name = escape["two"] or escape["name"]
    if name:
        return _ROFF_GLYPHS.get(name, " ")
    return {"-": "-", "e": "\\", " ": " ", "\\": "\\"}.get(escape["one"] or "", "")


def messages(content: bytes, path: str) -> Iterator[tuple[str, str]]:
    """Yield (message, translation) of a compiled catalogue (GNU gettext manual, section 10.3).

    Raises:
        DataError: it is none, or damaged.
    """
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(content[:4])
    if order is None:
        raise DataError(f"{path}: no compiled catalogue of translations (.mo); download the package again")
    count, originals, translations = struct.unpack_from(order + "3I", content, 8)
    for number in range(count):
        pair = []
        for table in (originals, translations):
            length, start = struct.unpack_from(order + "2I", content, table + 8 * number)
            text = content[start : start + length].decode("utf-8", "replace")
            pair.append(text.split("\4")[-1].split("\0")[0])  # without its context and its plurals
        yield pair[0], pair[1]


def _html(files: Files) -> Iterator[str]:
    for path, content in files.items():
        yield text_of_markup(_decoded(content, path))


def _plain(files: Files) -> Iterator[str]:
    for path, content in files.items():
        yield clean(_decoded(content, path))


def _man(files: Files) -> Iterator[str]:
    for path, content in files.items():
        yield text_of_man_page(_decoded(content, path))


def _fortunes(files: Files) -> Iterator[str]:
    for path, content in files.items():
        without_colours = re.sub(r"\x1b\[[0-9;]*m", "", _decoded(content, path))
        yield from map(clean, without_colours.split("\n%\n"))


def _sword(files: Files) -> Iterator[str]:
    """Books or chapters of a compressed module: *zs has (offset, size, size unpacked) of each in *zz."""
    for path, index in files.items():
        if not path.endswith("zs"):
            continue
        data = files.get(path[:-1] + "z")
        if data is None:
            raise DataError(
                f"{path[:-1]}z is missing, which {path} is the index of: download the package again"
            )
        for offset, size, _ in struct.iter_unpack("<3I", index[: len(index) // 12 * 12]):
            if size:
                try:
                    block = zlib.decompress(data[offset : offset + size])
                except zlib.error as error:
                    raise DataError(
                        f"{path[:-1]}z: a block is damaged ({error}); download it again"
                    ) from error
                yield text_of_markup(block.decode("utf-8", "replace"))


def _messages(files: Files) -> Iterator[str]:
    return _sentences((pair[0] for pair in _pairs(files)), _LEAST_MESSAGE_CHARS)


def _translations(files: Files) -> Iterator[str]:
    return _sentences((pair[1] for pair in _pairs(files)), _LEAST_TRANSLATION_CHARS)


def _pairs(files: Files) -> Iterator[tuple[str, str]]:
    for path, content in files.items():
        yield from messages(content, path)


def _sentences(texts: Iterable[str], least_chars: int) -> Iterator[str]:
    for text in texts:
        if len(text) >= least_chars and not _PLACEHOLDER.search(text):
            yield clean(text)


def _poems(files: Files) -> Iterator[str]:
    for path, content in files.items():
        try:
            poems = json.loads(_decoded(content, path))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: no JSON ({error}); download the package again") from error
        for poem in poems if isinstance(poems, list) else [poems]:
            yield clean("\n".join(_lines(poem)))


def _lines(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _lines(item)
    elif isinstance(value, dict):
        for key in _POEM_KEYS:
            yield from _lines(value.get(key))


def _decoded(content: bytes, path: str) -> str:
    if path.endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: damaged ({error}); download the package again") from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        declared = re.search(rb"charset=[\"']?([\w-]+)", content[:3000])
        name = declared[1].decode() if declared else "latin-1"
        try:
            return content.decode(name, "replace")
        except LookupError as error:
            raise DataError(f"{path}: unknown charset {name}") from error


EXTRACTORS: dict[str, Callable[[Files], Iterator[str]]] = {
    "html": _html,
    "plain": _plain,
    "man": _man,
    "fortunes": _fortunes,
    "sword": _sword,
    "messages": _messages,
    "translations": _translations,
    "poems": _poems,
}
"""By kind of file."""
