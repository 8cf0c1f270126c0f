"""DKIM signatures against verifiers that nobody here wrote (for CI): dkimpy and pynacl from PyPI, mailauth of npm, and
opendkim-testkey.

Mails of many forms are submitted, signed, sent by SMTP to a peer that offers more or less, or through a postfix (see
foreign.py), and verified as they arrived, RSA and Ed25519. As root, `signed.py DOMAIN SELECTOR KEY RECORD` runs
opendkim-testkey in a network of its own, whose name server has that record.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import unittest

import dkim

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import haineko
from test_haineko import (
    RFC8463_KEY,
    TEST_RSA_KEY,
    Question,
    Quiet,
    SmtpPeer,
    dkim_keys,
    document,
    esmtp,
    posted,
    settings,
    wire_record,
)

BODIES = {
    "plain": "Meow.\n",
    "no line end": "Meow",
    "one space": " ",
    "blank lines at the end": "Meow.\n\n\n\n",
    "blanks at the end of lines": "Meow. \t\nNyaa   \n \n\t\n",
    "runs of blanks": "a  b\t\tc \t d\n",
    "blank lines first": "\n\n \n\tMeow.\n",
    "dots": ".\n..\n.a\n. \n...\n",
    "long lines": "Meow " * 400 + "\n",
    "Japanese": "あとでお年玉貰いに行きます。髙①㈱ｶﾞ～\n" * 9,
    "Latin": "Größe, naïve, café=20 \n",
    "From and line ends": "From here\rto\r\nthere\n\rFrom \n",
    "control characters": "a\x0bb\x0cc\x07\n",
}
HEADERS = {
    "usual": {},
    "Japanese": {"subject": "謹賀新年", "from": "キジトラ <kijitora@example.org>", "charset": "ISO-2022-JP"},
    "long": {"subject": "ねこ" * 120, "references": " ".join(f"<{i:040}@example.org>" for i in range(9))},
    "shared": {"to": ", ".join(f"猫{i} <c{i}@example.jp>" for i in range(3)), "cc": "d@x.jp", "replyto": "e@x.jp"},
    "list": {"list-id": "<a.example.org>", "list-unsubscribe": "<https://example.org/u>",
             "list-unsubscribe-post": "List-Unsubscribe=One-Click", "x-nyaa": ["  two  ", "of them"]},
}  # fmt: skip
RAW_HEAD = b"From: A <a@sub.example.org>\nTo: b@example.jp\nSubject:  two \n\tlines \nX-Empty:\nMIME-Version: 1.0\n"
CODED = b"Content-Type: text/plain; charset=ISO-8859-1\nContent-Transfer-Encoding: 8bit\n\n"
LATIN = "Größe \n.\n\nend ".encode("latin-1")
RAW = {
    "8 bits": RAW_HEAD + "Content-Type: text/plain; charset=UTF-8\n\nにゃあ \n.\n".encode(),
    "8 bits said": RAW_HEAD
    + b"Content-Type: text/plain; charset=ISO-8859-1\nContent-Transfer-Encoding: 8bit\n\n"
    + LATIN,
    "no body": b"From: a@example.org\nSubject: x\n\n",
    "blank body": b"From: a@example.org\nSubject: x\nContent-Type: text/plain\n\n \n\t\n\n",
    "no line end": b"From: a@example.org\nSubject: x\nContent-Type: text/plain\n\nNyaa \t",
    "UTF-8 in the header": "From: ねこ <a@example.org>\nSubject: 猫\nTo: 三毛 <b@example.jp>\n\nnyaa\n".encode(),
    "long lines": b"From: a@example.org\nSubject: x\nContent-Type: text/plain\n\n" + b"nyaa " * 900 + b"\n",
    "multipart": RAW_HEAD + b'Content-Type: multipart/mixed; boundary="=b"\n\npreamble \n--=b\n\nNyaa\n--=b\n'
    b"Content-Type: text/html; charset=UTF-8\nContent-Transfer-Encoding: 8bit\n\n<p>\xe7\x8c\xab</p>\n--=b--\nend \n",
    "signed by another": b"DKIM-Signature: v=1; d=example.net; s=x; b=AA==\nFrom: a@example.org\nSubject: x\n\nnyaa\n",
    "fields twice": b"From: a@example.org\nSubject: x\nList-Id: a\nList-Id: b\nReferences: <a@b>\n\nnyaa\n",
    "sender beyond ASCII": "From: 猫 <猫@example.org>\nSubject: 猫\n\nnyaa\n".encode(),
}


def mails() -> dict:
    """{description: submission}"""
    file = {"filename": "請求書.pdf", "content": "JVBERi0xLjQK" * 99}
    table = {}
    for head, header in HEADERS.items():
        for name, body in BODIES.items():
            rcpt = None if "to" in header else ["b@example.jp"]
            table[f"{head}: {name}"] = document(header=header, body=body, rcpt=rcpt)
        table[f"{head}: HTML"] = document(header=header, html="<p>猫 <b>x</b></p>  \n", body=None)
        table[f"{head}: attachments"] = document(header=header, html="<p>猫</p>", attachments=[file, file])
    for name, octets in RAW.items():
        table[f"raw: {name}"] = {
            "mail": "a@example.org",
            "rcpt": ["b@example.jp"],
            "raw": {"base64": base64.b64encode(octets).decode()},
        }
    return table


MAILAUTH_JS = """
const {dkimVerify} = require("mailauth/lib/dkim/verify"), {record, mails} = JSON.parse(require("fs").readFileSync(0));
const verdict = async octets => {
  const {results} = await dkimVerify(Buffer.from(octets, "base64"), {resolver: async () => [[record]]});
  return results.filter(one => one.signingDomain === "example.org").map(one => one.status.result).join();
};
Promise.all(mails.map(verdict)).then(all => console.log(JSON.stringify(all)));
"""


def has_mailauth() -> bool:
    command = ["node", "-e", "require('mailauth')"]
    return bool(shutil.which("node")) and not subprocess.run(command, capture_output=True, check=False).returncode


def mailauth_verdicts(mails: list, record: str) -> list:
    """Return "pass" or what is wrong for each mail, as octets."""
    document = {"record": record, "mails": [base64.b64encode(octets).decode() for octets in mails]}
    command = ["node", "-e", MAILAUTH_JS]
    done = subprocess.run(command, input=json.dumps(document).encode(), capture_output=True, check=True, timeout=60)
    return json.loads(done.stdout)


class Verified(Quiet):
    def verify_all(self, pem: str, *offers: str) -> None:
        with SmtpPeer(None, offers) as peer:
            keys = dkim_keys("example.org", key=pem)
            force = settings(mailertable={"default": esmtp(peer)}, dkim=keys, smtpd={"max_rcpts_per_message": 0})
            record, arrived = haineko.dkim_record(force.dkim["example.org"]).encode(), {}
            for name, submission in mails().items():
                with self.subTest(name, offers=offers):
                    peer.mails.clear()
                    status, answer = posted(submission, force)
                    if "beyond ASCII" in name and "SMTPUTF8" not in offers:
                        self.assertEqual(answer["response"][0]["dsn"], "5.6.9")
                        continue
                    self.assertEqual((status, len(peer.mails)), (200, 1), answer)
                    octets = re.sub(rb"(?m)^\.", b"", peer.mails[0].text)  # RFC 5321 4.5.2
                    arrived[name] = octets
                    self.assertTrue(dkim.verify(octets, dnsfunc=lambda *_, **__: record))
                    changed = octets.replace(b"Subject:", b"Subject: more", 1)
                    self.assertFalse(dkim.verify(changed, dnsfunc=lambda *_, **__: record))
            if has_mailauth():
                verdicts = mailauth_verdicts(list(arrived.values()), record.decode())
                self.assertEqual({name: word for name, word in zip(arrived, verdicts) if word != "pass"}, {})

    def test_rsa(self) -> None:
        self.verify_all(TEST_RSA_KEY)

    def test_ed25519(self) -> None:
        self.verify_all(RFC8463_KEY)

    def test_rsa_to_a_server_with_extensions(self) -> None:
        self.verify_all(TEST_RSA_KEY, "8BITMIME", "SMTPUTF8", "PIPELINING")

    @unittest.skipUnless(shutil.which("opendkim-testkey") and os.getuid() == 0, "no opendkim-testkey, or not root")
    def test_opendkim_testkey(self) -> None:
        record = haineko.dkim_record(settings(dkim=dkim_keys("example.org", key=TEST_RSA_KEY)).dkim["example.org"])
        with tempfile.NamedTemporaryFile("w") as key:  # mode 0600
            key.write(TEST_RSA_KEY)
            key.flush()
            for published, code in ((record, 0), (record.replace("p=MII", "p=MIJ"), 65)):
                with self.subTest(code):
                    command = [sys.executable, __file__, "example.org", "s1", key.name, published]
                    done = subprocess.run(["unshare", "-n", *command], capture_output=True, check=False, timeout=60)
                    self.assertEqual(done.returncode, code, done.stderr)


def run_testkey(domain: str, selector: str, key: str, record: str) -> int:
    """Return the exit code of opendkim-testkey, which asks a name server on port 53 of this network."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with tempfile.NamedTemporaryFile("w") as conf:
        conf.write("Nameservers 127.0.0.1\n")
        conf.flush()
        with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as server:
            server.bind(("127.0.0.1", 53))
            threading.Thread(target=serve_record, args=(server, record), daemon=True).start()
            command = ["opendkim-testkey", "-d", domain, "-s", selector, "-k", key, "-x", conf.name, "-vvv"]
            return subprocess.run(command, check=False, timeout=40).returncode


def serve_record(server: socket.socket, record: str) -> None:
    while True:
        octets, peer = server.recvfrom(65535)
        question = Question(octets)
        records = [wire_record(question.name, haineko.TXT, record)] if question.kind == haineko.TXT else []
        server.sendto(question.answer(*records), peer)


if __name__ == "__main__":
    if len(sys.argv) == 5:
        sys.exit(run_testkey(*sys.argv[1:]))
    unittest.main()
