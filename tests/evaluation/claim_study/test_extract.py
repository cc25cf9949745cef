import gzip
import json
import struct
import zlib

import pytest

from phsa_megatron.config.errors import DataError
from phsa_megatron.evaluation.claim_study.extract import EXTRACTORS, clean, text_of_man_page, text_of_markup


def catalogue(pairs, order="<"):
    """A compiled catalogue: header, two tables of (length, start), and the strings."""
    texts = [text.encode() for column in zip(*pairs, strict=True) for text in column]
    start, entries = 28 + 16 * len(pairs), []
    for text in texts:
        entries.append(struct.pack(order + "2I", len(text), start))
        start += len(text) + 1
    header = struct.pack(order + "7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return header + b"".join(entries) + b"".join(text + b"\0" for text in texts)


def test_a_page_is_its_main_part_without_what_navigates():
    page = """<html><head><title>NAME</title><style>p {}</style></head><body>
    <div class="sphinxsidebar"><div>MENU</div> MENU</div><ul class="docnav top"><li>NEXT</li></ul>
    <div class="body" role="main"><h1>A&nbsp;heading<a class="headerlink" href="#x">¶</a></h1>
    <p>One <b>bold</b>   word &amp; a
    line.<p>Nobody closes this<br>here.<hr class="footer">
    <pre>a  = 1
      b</pre><script>var x = "<p>SCRIPT</p>"</script><nav/></div><p>OUTSIDE</p></body></html>"""
    expected = "A heading\n\nOne bold word & a line.\nNobody closes this\nhere.\n\na  = 1\n      b"
    assert text_of_markup(page) == expected


def test_a_page_without_a_main_part_is_all_of_its_text():
    page = "<div id='banner'>GET IT</div><div>One</div><div class='toc'><div>TOC</div>TOC</div>two"
    assert text_of_markup(page) == "One\ntwo"


def test_a_charset_is_read_where_the_page_is_not_utf8():
    page = '<meta charset="gb2312"><p>中文</p>'.encode("gb2312")
    assert list(EXTRACTORS["html"]({"a.html": page})) == ["中文"]
    with pytest.raises(DataError, match="a.html: unknown charset klingon"):
        list(EXTRACTORS["html"]({"a.html": b'<meta charset="klingon">\xff'}))


def test_a_manual_page_keeps_its_words_and_no_request():
    page = '.\\" comment\n.TH LS 1\n.SH NAME\nls \\- list\n.PP\n\\fBls\\fP lists\n.B \\-a\n.I "all files"\n'
    page += ".so man1/x.1\n.IP 2. 4\nit\\(aqs \\[lq]so\\[rq]\n"
    assert text_of_man_page(page) == 'NAME\nls - list\nls lists -a all files\n2. it\'s "so"'


@pytest.mark.parametrize("order", ["<", ">"])
def test_messages_with_placeholders_are_left_out(order):
    long = "This message is long enough to be read as a sentence of the game."
    pairs = [
        (f"context\4{long}", "这条消息的长度足够，可以当作一个句子来读。\0复数"),
        ("Too short.", "太短。"),
        (long + " <tag>", "这条消息的长度足够，但是里面有一个<tag>。"),
        (long + " %1$d", "这条消息的长度足够，但是里面有一个%1$d。"),
        (long + " {name}", "这条消息的长度足够，但是里面有一个{name}。"),
    ]
    files = {"zh_CN/x.mo": catalogue(pairs, order)}
    assert list(EXTRACTORS["messages"](files)) == [long]
    assert list(EXTRACTORS["translations"](files)) == ["这条消息的长度足够，可以当作一个句子来读。"]
    with pytest.raises(DataError, match="x.mo: no compiled catalogue"):
        list(EXTRACTORS["messages"]({"x.mo": b"not one at all"}))


def test_blocks_of_a_compressed_module_are_its_documents():
    blocks = [
        zlib.compress(text)
        for text in (b"<w>In</w> the <title>beginning</title>", b"<lb/>And<note>N</note>.")
    ]
    index = struct.pack("<3I", 0, len(blocks[0]), 0) + struct.pack("<3I", 0, 0, 0)
    index += struct.pack("<3I", len(blocks[0]), len(blocks[1]), 0)
    files = {"m/ot.bzs": index, "m/ot.bzz": b"".join(blocks)}
    assert list(EXTRACTORS["sword"](files)) == ["In the\nbeginning", "And."]
    with pytest.raises(DataError, match="ot.bzz is missing"):
        list(EXTRACTORS["sword"]({"m/ot.bzs": index}))
    with pytest.raises(DataError, match="a block is damaged"):
        list(EXTRACTORS["sword"](files | {"m/ot.bzz": b"".join(blocks)[1:] + b"x"}))


def test_fortunes_are_cut_at_percent_signs_and_have_no_colours():
    assert list(EXTRACTORS["fortunes"]({"f": b"\x1b[32mOne\x1b[m 5%\n%\nTwo\n"})) == ["One 5%", "Two"]


def test_poems_are_title_author_and_lines():
    poem = {
        "id": "ID",
        "title": "静夜思",
        "author": "李白",
        "paragraphs": ["床前明月光，", "疑是地上霜。"],
        "tags": ["TAG"],
    }
    for content in ([poem], poem):
        found = EXTRACTORS["poems"]({"p.json": json.dumps(content).encode()})
        assert list(found) == ["静夜思\n李白\n床前明月光，\n疑是地上霜。"]
    with pytest.raises(DataError, match="p.json: no JSON"):
        list(EXTRACTORS["poems"]({"p.json": b"{"}))


def test_compressed_files_are_read_and_damaged_ones_refused():
    packed = gzip.compress(b"plain  \r\ntext")
    assert list(EXTRACTORS["plain"]({"a.txt.gz": packed})) == ["plain\ntext"]
    with pytest.raises(DataError, match=r"a.txt.gz: damaged"):
        list(EXTRACTORS["plain"]({"a.txt.gz": packed[:-9]}))


def test_cleaning_keeps_indentation():
    assert clean("\ufeffa\u200b \n\n\n\n  b\xa0c¶\n") == "a\n\n  b c"
