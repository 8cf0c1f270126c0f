#!/usr/bin/env python3
"""For any strings in any fields: either a fault names the field, or the message says exactly what was put in.

    python3 .ci/prop.py          # 2,000 submissions
    python3 .ci/prop.py 50000

Needs hypothesis. What email is known to read wrongly is read here.
"""

from __future__ import annotations

import base64
import email
import email.policy
import email.utils
import json
import os
import re
import sys
import unicodedata
import urllib.parse

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(os.path.abspath(__file__))]

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import haineko  # noqa: E402

COUNT = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
ODD = st.sampled_from(
    ["\r\nBcc: evil@example.jp", "\0", "=?UTF-8?B?44Kt?=", "猫", "ｶﾞ", "①髙", "é", "😺", "\u202e", "\u2028", "\x85",
        "\x1b$B", "　",
     "--=_QQQQQQQQQQQQQQQQ.mixed", "<QQQQ/0>", "\n.\n", "\r", '"', "\\", ";", "%", "'", "  ", "\t", "ß", "\ud800", "/",
     "<a@b>",
     "a" * 80, "猫" * 80, "From "]
)  # fmt: skip
REFUSED = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
ANY = st.lists(st.one_of(ODD, st.text(max_size=20), st.text("abc XYZ,.-", max_size=30)), max_size=5).map("".join)
FINE = ANY.map(lambda text: REFUSED.sub("", text))
TEXT = st.integers(0, 60).flatmap(lambda dice: FINE if dice else ANY)
SOLE = st.sampled_from(["=?UTF-8?B?44Kt?=.pdf", '"', "<a>", "猫.pdf", "a b;c=d.pdf"])
NAME = st.one_of(SOLE, TEXT.map(lambda text: re.sub(r"[/\\]", "", text)[:255]), TEXT)
LINES = st.lists(TEXT, max_size=4).flatmap(
    lambda items: st.sampled_from(["\n", "\r\n", "\r"]).map(lambda end: end.join(items))
)
BOX = st.one_of(
    st.just("neko@example.jp"),
    FINE.map(lambda name: re.sub(r'[<>"\\\\]', "", name) + " <neko@example.jp>"),
    st.integers(0, 20).flatmap(lambda dice: st.just("ねこ@example.jp") if dice else TEXT),
)

FILE = st.fixed_dictionaries(
    {"content": st.one_of(st.binary(max_size=300).map(lambda octets: base64.b64encode(octets).decode()))},
    optional={"filename": NAME, "type": st.sampled_from(["text/plain", "image/png", 'a/b; c="d"', "", "x"]),
              "cid": st.sampled_from(["logo", "a@b", "<c>", "d", "e", "f", ""]), "inline": st.booleans()},
)  # fmt: skip
HEADER = st.fixed_dictionaries(
    {"subject": TEXT},
    optional={"from": BOX, "reply_to": BOX, "To": st.one_of(BOX, st.lists(BOX, max_size=3)), "cc": BOX, "bcc": BOX,
    "x-odd": TEXT,
              "X_list": st.lists(TEXT, max_size=3), "organization": TEXT, "comments": TEXT,
              "list-unsubscribe": st.sampled_from(["<https://x>", "猫", ""]),
              "Message-ID": st.sampled_from(["<a@b>", "<a>", ""]), "references": st.sampled_from(["<a@b> <c@d>",
              ["<a@b>"], "\0"]),
              "date": st.sampled_from(["Fri, 03 Jan 2014 18:35:58 +0900", "today", ""]),
              "charset": st.sampled_from(["UTF-8", "ISO-2022-JP", "ISO-8859-1", "US-ASCII", "Shift_JIS", "EUC-KR"])},
)  # fmt: skip
SUBMISSION = st.fixed_dictionaries(
    {"mail": st.just("kijitora@example.org"), "rcpt": st.just(["mikeneko@example.jp"]), "header": HEADER},
    optional={"body": LINES, "html": LINES, "attachments": st.lists(FILE, max_size=3)},
)
SEEN = {"composed": 0, "refused": 0}
EVIL = re.compile(rb"(?im)^bcc:|^X-Evil")


@settings(max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck))
@given(SUBMISSION)
def says_what_was_put_in(raw: dict) -> None:
    found, faults, _ = haineko.parse_submission(json.dumps(raw).encode())
    SEEN["refused" if faults else "composed"] += 1
    if faults:
        for fault in faults:
            name = re.split(r"[.\[:]", fault)
            assert name[0] in raw and not re.search(r"[\r\n\0]", fault), fault
            if name[0] == "header":
                assert name[1] in raw["header"], fault
        return
    message = haineko.compose(found, "R" * 16, haineko.parse_ip("127.0.0.1"), "relay.example.org", 1388741758.0)
    octets = message.copy("mikeneko@example.jp", 1)
    check_form(octets, message)
    head = octets.partition(b"\r\n\r\n")[0]
    assert not EVIL.search(head), head
    check_fields(raw["header"], head.decode())
    parts = [part for part in email.message_from_bytes(octets).walk() if not part.is_multipart()]
    modern = [
        part for part in email.message_from_bytes(octets, policy=email.policy.default).walk() if not part.is_multipart()
    ]
    check_texts(found, parts)
    check_files(found, parts)
    names = [part.get_filename() for part in modern if part["content-disposition"]]
    if found.header.charset == "UTF-8":
        given_ = sorted(found.attachments, key=lambda item: not (found.html and item.cid))
        assert [plain(name or "") for name in names] == [
            plain(email.utils.unquote(item.filename).strip()) for item in given_
        ], names  # email takes quotes off that are the name's own


def check_form(octets: bytes, message: haineko.Message) -> None:
    """Lines, CRLF, 7 bits."""
    assert octets.endswith(b"\r\n") and not re.search(rb"\r(?!\n)|(?<!\r)\n|\0", octets)
    assert max(map(len, octets.split(b"\r\n"))) <= 998
    assert octets.partition(b"\r\n\r\n")[2].isascii()
    assert octets.isascii() == (not message.needs_smtputf8)


def check_fields(header: dict, head: str) -> None:
    lines = [line.split(": ", 1) for line in re.split(r"\r\n(?![ \t])", head)]
    for key, name in (
        ("subject", "Subject"),
        ("x-odd", "X-Odd"),
        ("organization", "Organization"),
        ("comments", "Comments"),
    ):
        same(header.get(key, ""), [decoded(value) for label, value in lines if label == name])
    listed = [text for text in header.get("X_list", []) if text]
    shown = [decoded(value) for label, value in lines if label == "X-List"]
    assert len(listed) == len(shown)
    for text, value in zip(listed, shown):
        same(text, [value])


def same(meant: str, shown: list) -> None:
    if not meant:
        assert shown in ([], [""])
        return
    assert len(shown) == 1 and plain(shown[0]) == plain(meant), (meant, shown)


def plain(text: str) -> str:
    """Text without what ISO-2022-JP and Windows write differently."""
    text = unicodedata.normalize("NFKC", text.translate(haineko.CP932_TO_JIS))
    return text.replace(" \u3099", "\u3099").replace(" \u309a", "\u309a")


def decoded(field: str) -> str:
    """Text of a field as a reader shows it (RFC 2047)."""
    field = re.sub(r"\r\n(?=[ \t])", "", field)
    field = re.sub(r"(=\?[^?\s]+\?B\?[^?\s]*\?=)\s+(?==\?)", r"\1", field)
    return re.sub(r"=\?([^?\s]+)\?B\?([^?\s]*)\?=", lambda word: in_charset(base64.b64decode(word[2]), word[1]), field)


def in_charset(octets: bytes, charset: str) -> str:
    if charset.upper() != "ISO-2022-JP":
        return octets.decode(charset)
    return haineko.jis_to_text(octets.decode("ascii"))


def check_texts(found: haineko.Submission, parts: list) -> None:
    texts = [found.body or haineko.html_to_text(found.html), *([found.html] if found.html else [])]
    for text, part in zip(texts, parts):
        octets, charset = part.get_payload(decode=True), part.get_content_charset()
        meant = text.replace("\r\n", "\n").replace("\r", "\n")
        meant = (meant if meant.endswith("\n") else meant + "\n").replace("\n", "\r\n")
        assert plain(in_charset(octets, charset)) == plain(meant), (text, octets)
        assert part["content-disposition"] is None


def check_files(found: haineko.Submission, parts: list) -> None:
    shown = [part for part in parts if part["content-disposition"]]
    given_ = sorted(found.attachments, key=lambda item: not (found.html and item.cid))
    assert len(shown) == len(given_)
    for item, part in zip(given_, shown):
        assert part.get_payload(decode=True) == item.content
        assert (part["content-id"] or "<>")[1:-1] == item.cid
        assert part.get_content_disposition() == ("inline" if item.cid or item.inline else "attachment")
        name = part.get_filename()
        if item.filename:
            words = part.get_param("filename", header="content-disposition")
            if isinstance(words, tuple):
                raw = urllib.parse.unquote_to_bytes(urllib.parse.quote(words[2], encoding="latin-1"))
                name = in_charset(raw, words[0] or "UTF-8")
            assert plain(name) == plain(item.filename), (item.filename, name, words)
        else:
            assert name is None


if __name__ == "__main__":
    says_what_was_put_in()
    print(f"{COUNT} submissions: fine ({SEEN})")
    sys.exit(SEEN["composed"] < COUNT / 10)
