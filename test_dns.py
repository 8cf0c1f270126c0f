"""DNS, the relay MX, MTA-STS and `check --connect`, against peers that speak the wire's own words."""

from __future__ import annotations

import base64
import contextlib
import errno
import itertools
import json
import os
import random
import re
import select
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

import haineko  # noqa: E402

SOURCE = os.path.join(HERE, "haineko.py")

# A certificate authority of the tests, and what it signed for mx.sts.example, mta-sts.sts.example and localhost.
TEST_CA = """\
-----BEGIN CERTIFICATE-----
MIIBVzCB/aADAgECAgEBMAoGCCqGSM49BAMCMBIxEDAOBgNVBAMMB1Rlc3QgQ0Ew
IBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBIxEDAOBgNVBAMMB1Rl
c3QgQ0EwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQ/HHxnRtJcnFxExsrv5c/P
//ri0Cp4SWHXSygQbyFQWc4vmWT8rt686qpWvjfO2Z5y9X6sfWF1eh5KHki0/xVD
o0IwQDAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIBBjAdBgNVHQ4EFgQU
vp1X/L8BMBsh/2ozSLl0YPaxePEwCgYIKoZIzj0EAwIDSQAwRgIhAOOnqgZM5CI8
2Ga7nXYm3ssrZ4fNdx3mqWknER3WanXyAiEAwtwsuXE0gKn0T/blGI0jdlN73o/a
Lq7ufHD4cVwf/Qc=
-----END CERTIFICATE-----
"""
TEST_CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgg1Z4tHh+RReEqgYH
1Nq/vxus2we9iEn+qRczRW4tUZ2hRANCAASgdwFUMvncMaSlAsd0dJCF8HFJk/lY
7imLBXZJNtp0rDLbQhafk/CNFeBjQk77//L84YFNGGcbs2qu05oHy/3g
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIB0jCCAXegAwIBAgIBAjAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAdUZXN0IENB
MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAZMRcwFQYDVQQDDA5t
eC5zdHMuZXhhbXBsZTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABKB3AVQy+dwx
pKUCx3R0kIXwcUmT+VjuKYsFdkk22nSsMttCFp+T8I0V4GNCTvv/8vzhgU0YZxuz
aq7TmgfL/eCjgbQwgbEwPwYDVR0RBDgwNoIObXguc3RzLmV4YW1wbGWCE210YS1z
dHMuc3RzLmV4YW1wbGWCCWxvY2FsaG9zdIcEfwAAATAJBgNVHRMEAjAAMBMGA1Ud
JQQMMAoGCCsGAQUFBwMBMA4GA1UdDwEB/wQEAwIHgDAfBgNVHSMEGDAWgBS+nVf8
vwEwGyH/ajNIuXRg9rF48TAdBgNVHQ4EFgQUfjxj6TwHJDS8FRpR8APLBM0kt98w
CgYIKoZIzj0EAwIDSQAwRgIhAKHoRao05+03hv6EKUfOVq2SnkqDHVf4bvD7mkJ0
NAKoAiEA6ObnnITXbvOOxAHEIjxyJBXm3TvjkV3Z8qPLB7EQjoQ=
-----END CERTIFICATE-----
"""


# -- peers


def wire_name(name: str) -> bytes:
    return b"".join(bytes((len(label),)) + label.encode() for label in name.split(".") if label) + b"\0"


def wire_record(name: str, kind: int, value, ttl: int = 60) -> bytes:
    if kind in (haineko.A, haineko.AAAA):
        data = socket.inet_pton(socket.AF_INET if kind == haineko.A else socket.AF_INET6, value)
    elif kind == haineko.MX:
        data = struct.pack(">H", value[0]) + wire_name(value[1])
    elif kind == haineko.CNAME:
        data = wire_name(value)
    elif kind == haineko.SOA:
        data = wire_name("ns." + name) + wire_name("root." + name) + struct.pack(">5I", 1, 2, 3, 4, value)
    elif kind == haineko.TXT:
        text = value.encode()
        data = b"".join(bytes((len(text[i : i + 255]),)) + text[i : i + 255] for i in range(0, len(text) or 1, 255))
    else:
        data = value
    return wire_name(name) + struct.pack(">HHIH", kind, 1, ttl, len(data)) + data


class Question:
    """A query as a name server reads it."""

    def __init__(self, octets: bytes) -> None:
        self.octets, at, labels = octets, 12, []
        self.number, self.flags, _, _, _, self.additional = struct.unpack_from(">6H", octets)
        while octets[at]:
            labels.append(octets[at + 1 : at + 1 + octets[at]].decode())
            at += 1 + octets[at]
        self.name, self.kind = ".".join(labels), struct.unpack_from(">H", octets, at + 1)[0]

    def answer(self, *records: bytes, code: int = 0, authority: tuple = (), **changes) -> bytes:
        """A response; `changes` make it another one: number, name, kind, flags."""
        flags = changes.get("flags", 0x8180) | code
        asked = wire_name(changes.get("name", self.name)) + struct.pack(">HH", changes.get("kind", self.kind), 1)
        head = struct.pack(">6H", changes.get("number", self.number), flags, 1, len(records), len(authority), 0)
        return head + asked + b"".join(records + authority)


class NameServer:
    """A name server on UDP and TCP that knows a zone {name: {kind: values}}. A function in place of the kinds answers
    in its own manner: (Question, whether by TCP) -> datagrams."""

    def __init__(self, zone: dict) -> None:
        self.zone, self.asked = zone, []
        while True:
            self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self.udp.bind(("127.0.0.1", 0))
            self.port = self.udp.getsockname()[1]
            try:
                self.tcp = socket.create_server(("127.0.0.1", self.port))
                break
            except OSError:
                self.udp.close()
        self.place = f"127.0.0.1:{self.port}"
        self.end, self.bell = socket.socketpair()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def __enter__(self) -> NameServer:
        return self

    def __exit__(self, *_) -> None:
        self.bell.send(b"x")
        self.thread.join(5)
        for sock in (self.udp, self.tcp, self.end, self.bell):
            sock.close()

    def names(self) -> list:
        """(name, kind) of what was asked."""
        return [(question.name, question.kind) for question, _, _ in self.asked]

    def _serve(self) -> None:
        while True:
            ready = select.select([self.udp, self.tcp, self.end], [], [])[0]
            if self.end in ready:
                return
            if self.udp in ready:
                octets, peer = self.udp.recvfrom(65535)
                for datagram in self._answers(octets, peer, False):
                    self.udp.sendto(datagram, peer)
            if self.tcp in ready:
                self._serve_tcp()

    def _serve_tcp(self) -> None:
        sock, peer = self.tcp.accept()
        with sock, contextlib.suppress(OSError):
            sock.settimeout(2)
            octets = sock.recv(65535)
            for datagram in self._answers(octets[2:], peer, True):
                sock.sendall(struct.pack(">H", len(datagram)))  # in two pieces: a length alone is no answer
                sock.sendall(datagram)

    def _answers(self, octets: bytes, peer: tuple, tcp: bool) -> list:
        question = Question(octets)
        self.asked.append((question, peer, tcp))
        kinds = self.zone.get(question.name)
        if callable(kinds):
            return kinds(question, tcp)
        soa = (wire_record("example", haineko.SOA, 30),)
        if kinds is None:
            return [question.answer(code=haineko.NXDOMAIN, authority=soa)]
        records, name = [], question.name
        while isinstance(kinds, dict) and haineko.CNAME in kinds and question.kind not in kinds:
            records.append(wire_record(name, haineko.CNAME, kinds[haineko.CNAME][0], kinds.get("ttl", 60)))
            name = kinds[haineko.CNAME][0]
            kinds = self.zone.get(name, {})
        records += [
            wire_record(name, question.kind, value, kinds.get("ttl", 60)) for value in kinds.get(question.kind, ())
        ]
        return [question.answer(*records, authority=() if kinds.get(question.kind) else soa)]


class MailHost:
    """An SMTP server on each of several addresses with one port; `manners` tells by address what is said to a verb, in
    place of the usual: a reply, None to hang up. `mails` are (address, TLS, recipients, text)."""

    def __init__(self, *places: str, tls: ssl.SSLContext | None = None) -> None:
        self.mails, self.manners, self.opened, self.tls = [], {}, [], tls
        self.listeners: dict = {}
        while len(self.listeners) < len(places):
            self._bind(places)
        self.threads, self.sockets = [], []
        for place, listener in self.listeners.items():
            threading.Thread(target=self._accept, args=(place, listener), daemon=True).start()

    def _bind(self, places: tuple) -> None:
        self.port, self.listeners = 0, {}
        for place in places:
            family = socket.AF_INET6 if ":" in place else socket.AF_INET
            try:
                self.listeners[place] = socket.create_server((place, self.port), family=family)
            except OSError as fault:
                for listener in self.listeners.values():
                    listener.close()
                if fault.errno == errno.EADDRNOTAVAIL:
                    raise unittest.SkipTest(f"{place} is no address of this machine") from None
                if fault.errno != errno.EADDRINUSE:
                    raise
                return
            self.port = self.listeners[place].getsockname()[1]

    def __enter__(self) -> MailHost:
        return self

    def __exit__(self, *_) -> None:
        for listener in self.listeners.values():
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for sock in self.sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(5)

    def _accept(self, place: str, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            self.opened.append(place)
            self.sockets.append(sock)
            self.threads.append(threading.Thread(target=self._converse, args=(place, sock), daemon=True))
            self.threads[-1].start()

    def _converse(self, place: str, sock: socket.socket) -> None:
        sock.settimeout(10)
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(OSError))
            stack.enter_context(sock)
            self._serve(place, sock, stack)

    def _serve(self, place: str, sock: socket.socket, stack: contextlib.ExitStack) -> None:
        manner, secure, tos = self.manners.get(place, {}), False, []
        stream = stack.enter_context(sock.makefile("rwb"))

        def say(verb: str, usual: str) -> bool:
            said = manner.get(verb, usual)
            if said is not None:
                stream.write(said.encode() + b"\r\n")
                stream.flush()
            return said is not None

        if not say("CONN", "220 mx ESMTP"):
            return
        while True:
            line = stream.readline()
            verb = re.split(rb"[ :\r]", line)[0].decode().upper()
            usual = {
                "EHLO": "250-mx\r\n250 " + ("STARTTLS" if self.tls and not secure else "SIZE"),
                "DATA": "354 go on",
            }
            if verb == "RCPT":
                tos.append(re.findall(r"<(.*?)>", line.decode())[0])
            if not line or not say(verb, usual.get(verb, "250 2.0.0 fine")) or verb == "QUIT":
                return
            if verb == "STARTTLS" and "TLS" in manner:
                sock.recv(65536)
                say("TLS", "")
                return
            if verb == "STARTTLS" and "STARTTLS" not in manner:
                sock = stack.enter_context(self.tls.wrap_socket(sock, server_side=True))
                stream, secure = stack.enter_context(sock.makefile("rwb")), True
            elif verb == "DATA" and "DATA" not in manner:
                text = b"".join(iter(stream.readline, b".\r\n"))
                self.mails.append((place, secure, tos, text))
                tos = []
                if not say("TEXT", "250 2.0.0 taken at " + place):
                    return


class PolicyServer:
    """An HTTPS server that gives one text, with any status, and counts."""

    def __init__(self, tls: ssl.SSLContext, text: str) -> None:
        self.tls, self.text, self.status, self.asked = tls, text, 200, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> PolicyServer:
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self.listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), plain:
                plain.settimeout(5)
                with self.tls.wrap_socket(plain, server_side=True) as sock:
                    self.asked.append(sock.recv(65536).decode())
                    body = self.text.encode()
                    head = f"HTTP/1.1 {self.status} X\r\nContent-Type: text/plain\r\nLocation: /x\r\n"
                    sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


class WithFiles(unittest.TestCase):
    """A test with the files of the tests' certificate authority, and peers that end with it."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="haineko-test-")
        self.addCleanup(folder.cleanup)
        self.ca, self.certificate = os.path.join(folder.name, "ca.pem"), os.path.join(folder.name, "certificate.pem")
        self.folder = folder.name
        for path, content in ((self.ca, TEST_CA), (self.certificate, TEST_CERTIFICATE)):
            with open(path, "w", encoding="ascii") as stream:
                stream.write(content)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(self.certificate)

    def enter(self, peer):
        """The peer, until the test is over."""
        value = peer.__enter__()
        self.addCleanup(peer.__exit__, None, None, None)
        return value


def mail_to(*recipients: str, hostname: str = "relay.example.org", **route) -> haineko.Job:
    """A shared message for MX by that route."""
    text = haineko.Message((b"Subject: Nyaaaa\r\n\r\nMeow.\r\n",))
    values = {"mailer": "MX", "private": True, "timeout": 2, **route}
    return haineko.Job(haineko.Route(**values), hostname, "queueid", "kijitora@example.org", recipients, text)


def brief(said: haineko.Reply) -> tuple:
    return said.code, said.dsn, said.command, said.host


# ======================================================================================================================
# 10. DNS
# ======================================================================================================================


class DnsMessages(unittest.TestCase):
    QUESTION = Question(haineko.build_query(7, "Neko.example", haineko.MX))

    def parse(self, octets: bytes, name: str = "neko.example", kind: int = haineko.MX, number: int = 7):
        return haineko.parse_response(octets, number, name, kind)

    def test_a_query_octet_for_octet(self):
        question = b"\x04neko\x07example\0\0\x0f\0\x01"
        self.assertEqual(
            haineko.build_query(0x1234, "neko.example", haineko.MX),
            b"\x12\x34\x01\0\0\x01\0\0\0\0\0\x01" + question + b"\0\0\x29\x04\xd0\0\0\0\0\0\0",
        )
        self.assertEqual(
            haineko.build_query(1, "neko.example", haineko.MX, edns=False), b"\0\x01\x01\0\0\x01\0\0\0\0\0\0" + question
        )
        self.assertEqual(haineko.build_query(1, "", haineko.A, edns=False)[12:], b"\0\0\x01\0\x01")

    def test_every_kind_of_record_is_read(self):
        long_text = "v=spf1 " + "x" * 300
        for kind, given, wanted in (
            (haineko.A, "192.0.2.7", "192.0.2.7"),
            (haineko.AAAA, "2001:db8::7", "2001:db8::7"),
            (haineko.MX, (10, "MX.Neko.example"), (10, "mx.neko.example")),
            (haineko.CNAME, "Else.example", "else.example"),
            (haineko.TXT, long_text, long_text),
            (haineko.TXT, "", ""),
            (haineko.SOA, 300, 300),
        ):
            with self.subTest(kind=kind, given=given):
                record = wire_record("Neko.Example", kind, given, 61)
                found = self.parse(self.QUESTION.answer(record)).answers
                self.assertEqual(found, [haineko.Record("neko.example", kind, 61, wanted)])

    def test_names_are_decompressed(self):
        # the answer points at the question's name, its host at "example" within that
        octets = self.QUESTION.answer() + b"\xc0\x0c\0\x0f\0\x01\0\0\0\x3c\0\x07\0\x05\x02mx\xc0\x11"
        octets = octets[:6] + b"\0\x01" + octets[8:]
        self.assertEqual(
            self.parse(octets).answers, [haineko.Record("neko.example", haineko.MX, 60, (5, "mx.example"))]
        )

    def test_what_is_no_answer(self):
        good = self.QUESTION.answer(wire_record("neko.example", haineko.MX, (10, "mx.example")))
        record = b"\xc0\x0c\0\x0f\0\x01\0\0\0\x3c"
        one = self.QUESTION.answer()[:6] + b"\0\x01" + self.QUESTION.answer()[8:]
        cases = [
            ("nothing", b""),
            ("a head alone", good[:12]),
            ("another number", self.QUESTION.answer(number=8)),
            ("another name", self.QUESTION.answer(name="inu.example")),
            ("another kind", self.QUESTION.answer(kind=haineko.A)),
            ("a query", self.QUESTION.answer(flags=0x0100)),
            ("two questions", good[:4] + b"\0\x02" + good[6:]),
            ("no question", struct.pack(">6H", 7, 0x8180, 0, 0, 0, 0)),
            ("a record cut off", good[:-3]),
            ("a record that isn't there", one),
            ("a name that points at itself", one + b"\xc0" + bytes((len(one),)) + record[2:] + b"\0\0"),
            ("a name that points ahead", one + b"\xc0\xff" + record[2:] + b"\0\0"),
            ("a length beyond the end", one + record + b"\xff\xff\0\x05"),
            ("a host that runs out", one + record + b"\0\x06\0\x05\x3fabc"),
            ("a label of no known kind", one + record + b"\0\x05\0\x05\x80\0\0"),
        ]
        for what, octets in cases:
            with self.subTest(what), self.assertRaises(ValueError):
                self.parse(octets)

    def test_a_refusal_of_edns_may_leave_the_question_out(self):
        self.assertEqual(self.parse(struct.pack(">6H", 7, 0x8181, 0, 0, 0, 0)).code, haineko.FORMERR)

    def test_a_dot_within_a_label_makes_no_other_name(self):
        octets = self.QUESTION.answer(wire_record("neko.example", haineko.MX, (1, "x"))[:-3] + b"\x04a.jp\0")
        octets = octets.replace(b"\0\x05\0\x01\x04a.jp", b"\0\x08\0\x01\x04a.jp")
        host = self.parse(octets).answers[0].value[1]
        self.assertEqual((host, haineko.DOMAIN.fullmatch(host)), ("a\\.jp", None))

    def test_rubbish_never_does_more_than_be_refused(self):
        dice = random.Random(7)
        records = [wire_record("neko.example", haineko.MX, (i, f"mx{i}.example")) for i in range(4)]
        good = self.QUESTION.answer(*records, wire_record("neko.example", haineko.TXT, "words"))
        for i in range(3000):
            octets = bytearray(good[: dice.randrange(len(good))] if i % 3 == 0 else good)
            for _ in range(dice.randrange(4)):
                octets[dice.randrange(12, len(octets)) if len(octets) > 12 else 0 : None][:0] = b""
                if len(octets) > 12:
                    octets[dice.randrange(12, len(octets))] = dice.choice((0, 0xC0, 0xC0, 0xFF, dice.randrange(256)))
            with contextlib.suppress(ValueError):
                self.parse(bytes(octets))

    def test_names_that_take_long_are_given_up(self):
        head = self.QUESTION.answer()
        chain = b"".join(struct.pack(">H", 0xC000 | (len(head) + 2 * i - 2)) for i in range(1, 4000))
        pointers = b"\0\0" + chain + struct.pack(">H", 0xC000 | (len(head) + 7996))
        record = b"\xc0\x0c\0\x01\0\x01\0\0\0\0\0\x04\x7f\0\0\x01"
        for what, count, tail in (("a chain of pointers", 1, pointers), ("far too many records", 4000, record * 4000)):
            octets = head[:6] + struct.pack(">H", count) + head[8:] + tail
            with self.subTest(what):
                began, code = time.process_time(), haineko.SERVFAIL
                with contextlib.suppress(ValueError):
                    code = self.parse(octets).code
                self.assertEqual(code, haineko.SERVFAIL)
                self.assertLess(time.process_time() - began, 0.2)
        with self.assertRaises(ValueError):
            haineko.read_name(b"\0" + chain.replace(chain[:2], b"\0\0"), len(chain) - 1)

    def test_aliases_are_followed_to_their_end(self):
        def alias(name: str, to: str) -> haineko.Record:
            return haineko.Record(name, haineko.CNAME, 60, to)

        end = haineko.Record("c", haineko.A, 60, "192.0.2.1")
        long = [alias(str(i), str(i + 1)) for i in range(20)]
        for what, answers, hops, values in (
            ("no answer", [], 0, 0),
            ("in any order", [end, alias("b", "c"), alias("a", "b")], 2, 1),
            ("a circle", [alias("a", "b"), alias("b", "a")], haineko.MAX_ALIASES + 1, 0),
            ("an end that isn't told", [alias("a", "b")], 1, 0),
        ):
            with self.subTest(what):
                chain, found = haineko.follow(answers, "a", haineko.A)
                self.assertEqual((len(chain), len(found)), (hops, values))
        self.assertEqual(len(haineko.follow(long, "0", haineko.A)[0]), haineko.MAX_ALIASES + 1)


class NameServers(WithFiles):
    def look_up(self, server, name: str, kind: int, seconds: float = 5.0, **options) -> haineko.Found:
        places = server if isinstance(server, tuple) else (server.place,)
        resolver = haineko.Resolver(places, **options)
        resolver.PATIENCE = 0.3
        return haineko.run(resolver.look_up(name, kind, time.monotonic() + seconds))

    def test_answers(self):
        zone = {
            "a.example": {haineko.A: ["192.0.2.1", "192.0.2.2"], haineko.AAAA: ["2001:db8::1"]},
            "m.example": {haineko.MX: [(20, "mx2.example"), (10, "mx1.example")]},
            "t.example": {haineko.TXT: ["v=STSv1; id=1;", "y" * 3000]},
            "alias.example": {haineko.CNAME: ["a.example"]},
            "alias8.example": {haineko.CNAME: ["c1.example"]},
            "alias9.example": {haineko.CNAME: ["alias8.example"]},
            "circle.example": {haineko.CNAME: ["elcric.example"]},
            "elcric.example": lambda q, _: [q.answer(wire_record("elcric.example", 5, "circle.example"))],
        }
        zone.update({f"c{i}.example": {haineko.CNAME: [f"c{i + 1}.example"]} for i in range(1, 8)})
        zone["c8.example"] = {haineko.A: ["192.0.2.8"]}
        zone["circle.example"] = lambda q, _: [q.answer(wire_record("circle.example", 5, "elcric.example"))]
        server = self.enter(NameServer(zone))
        for name, kind, code, values in (
            ("a.example", haineko.A, haineko.NOERROR, ("192.0.2.1", "192.0.2.2")),
            ("A.EXAMPLE.", haineko.A, haineko.NOERROR, ("192.0.2.1", "192.0.2.2")),
            ("a.example", haineko.AAAA, haineko.NOERROR, ("2001:db8::1",)),
            ("m.example", haineko.MX, haineko.NOERROR, ((20, "mx2.example"), (10, "mx1.example"))),
            ("t.example", haineko.TXT, haineko.NOERROR, ("v=STSv1; id=1;", "y" * 3000)),
            ("a.example", haineko.MX, haineko.NOERROR, ()),
            ("none.example", haineko.MX, haineko.NXDOMAIN, ()),
            ("alias.example", haineko.A, haineko.NOERROR, ("192.0.2.1", "192.0.2.2")),
            ("alias8.example", haineko.A, haineko.NOERROR, ("192.0.2.8",)),
            ("alias9.example", haineko.A, haineko.SERVFAIL, ()),
            ("circle.example", haineko.A, haineko.SERVFAIL, ()),
            ("x" * 63 + ("." + "y" * 63) * 4, haineko.A, haineko.NXDOMAIN, ()),
        ):
            with self.subTest(name, kind=kind):
                found = self.look_up(server, name, kind)
                self.assertEqual((found.code, found.values), (code, values))
                self.assertEqual(bool(found.why), code == haineko.SERVFAIL)

    def test_an_alias_whose_end_is_not_told_is_asked_for(self):
        alias = wire_record("a.example", haineko.CNAME, "b.example")
        server = self.enter(NameServer({"a.example": lambda q, _: [q.answer(alias)], "b.example": {1: ["192.0.2.2"]}}))
        self.assertEqual(self.look_up(server, "a.example", haineko.A).values, ("192.0.2.2",))
        self.assertEqual(server.names(), [("a.example", haineko.A), ("b.example", haineko.A)])

    def test_manners(self):
        good = wire_record("a.example", haineko.A, "192.0.2.1")
        bad = wire_record("a.example", haineko.A, "192.0.2.66")
        many = [wire_record("a.example", haineko.A, f"192.0.2.{i}") for i in range(250)]
        truncated = 0x8380
        cases = [
            (
                "a forged number first",
                lambda q, _: [q.answer(bad, number=q.number ^ 1), q.answer(good)],
                ("192.0.2.1",),
            ),
            ("a forged name first", lambda q, _: [q.answer(bad, name="b.example"), q.answer(good)], ("192.0.2.1",)),
            ("a forged kind first", lambda q, _: [q.answer(bad, kind=haineko.MX), q.answer(good)], ("192.0.2.1",)),
            ("a query first", lambda q, _: [q.octets, q.answer(good)], ("192.0.2.1",)),
            ("rubbish first", lambda q, _: [b"", b"\xff" * 600, q.answer()[:-2], q.answer(good)], ("192.0.2.1",)),
            ("another's records", lambda q, _: [q.answer(wire_record("b.example", 1, "192.0.2.66"))], ()),
            ("forgeries alone", lambda q, _: [q.answer(bad, number=q.number ^ 1)], None),
            ("a flood", lambda q, _: [b"x"] * 200, None),
            ("silence", lambda q, _: [], None),
            ("SERVFAIL", lambda q, _: [q.answer(code=2)], None),
            ("REFUSED", lambda q, _: [q.answer(code=5)], None),
            ("truncated", lambda q, tcp: [q.answer(good) if tcp else q.answer(flags=truncated)], ("192.0.2.1",)),
            (
                "truncated and then huge",
                lambda q, tcp: [q.answer(*(many if tcp else ()), flags=0x8180 if tcp else truncated)],
                tuple(f"192.0.2.{i}" for i in range(250)),
            ),
            ("truncated and then gone", lambda q, tcp: [] if tcp else [q.answer(flags=truncated)], None),
            (
                "truncated and then forged",
                lambda q, tcp: [q.answer(bad, number=q.number ^ 1) if tcp else q.answer(flags=truncated)],
                None,
            ),
            ("no EDNS known", lambda q, _: [q.answer(good) if not q.additional else q.answer(code=1)], ("192.0.2.1",)),
            (
                "a datagram larger than it should be",
                lambda q, _: [q.answer(*many)],
                tuple(f"192.0.2.{i}" for i in range(250)),
            ),
            (
                "a time to live over the top",
                lambda q, _: [q.answer(wire_record("a.example", 1, "192.0.2.1", 1 << 31))],
                ("192.0.2.1",),
            ),
        ]
        server = self.enter(NameServer({}))
        for what, manner, values in cases:
            server.zone = {"a.example": manner}
            with self.subTest(what):
                began = time.monotonic()
                found = self.look_up(server, "a.example", haineko.A, 1.0)
                self.assertLess(time.monotonic() - began, 2)
                self.assertEqual(found.values, values or ())
                self.assertEqual(found.code, haineko.NOERROR if values is not None else haineko.SERVFAIL)
                self.assertEqual(bool(found.why), values is None)

    def test_a_flood_ends(self):
        server = self.enter(NameServer({"a.example": lambda q, _: [b"x"] * 100}))
        self.assertIn("nobody asked for", self.look_up(server, "a.example", haineko.A).why)

    def test_the_next_server_is_asked(self):
        first, second = self.enter(NameServer({})), self.enter(NameServer({"a.example": {haineko.A: ["192.0.2.1"]}}))
        for what, manner in (("silence", lambda q, _: []), ("SERVFAIL", lambda q, _: [q.answer(code=2)])):
            first.zone = {"a.example": manner}
            with self.subTest(what):
                found = self.look_up((first.place, second.place), "a.example", haineko.A)
                self.assertEqual(found.values, ("192.0.2.1",))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
            closed.bind(("127.0.0.1", 0))
            nobody = f"127.0.0.1:{closed.getsockname()[1]}"
        self.assertEqual(self.look_up((nobody, second.place), "a.example", haineko.A).values, ("192.0.2.1",))
        found = self.look_up((nobody,), "a.example", haineko.A)
        self.assertEqual(found.code, haineko.SERVFAIL)
        self.assertIn("refused", found.why)

    def test_nobody_can_foresee_number_and_port(self):
        server = self.enter(NameServer({"a.example": {haineko.A: ["192.0.2.1"]}}))
        for _ in range(20):
            self.look_up(server, "a.example", haineko.A)
        self.assertGreater(len({question.number for question, _, _ in server.asked}), 15)
        self.assertGreater(len({peer[1] for _, peer, _ in server.asked}), 10)
        self.assertTrue(all(0 <= haineko.chance() < 1 for _ in range(100)))

    def test_answers_are_kept_as_long_as_they_say(self):
        clock = [0.0]
        zone = {
            "a.example": {haineko.A: ["192.0.2.1"], "ttl": 100},
            "zero.example": {haineko.A: ["192.0.2.1"], "ttl": 0},
            "alias.example": {haineko.CNAME: ["a.example"], "ttl": 50},
            "fails.example": lambda q, _: [q.answer(code=2)],
            "ages.example": {haineko.A: ["192.0.2.1"], "ttl": 1 << 31},
            "years.example": {haineko.A: ["192.0.2.1"], "ttl": (1 << 31) - 1},
        }
        server = self.enter(NameServer(zone))
        resolver = haineko.Resolver((server.place,), clock=lambda: clock[0])

        def asked(name: str, at: float) -> int:
            """Questions that a look-up at that time costs."""
            before, clock[0] = len(server.asked), at
            haineko.run(resolver.look_up(name, haineko.A, time.monotonic() + 5))
            return len(server.asked) - before

        for name, times in (
            ("a.example", [(0, 1), (1, 0), (99, 0), (101, 1), (150, 0)]),
            ("zero.example", [(0, 1), (0, 1)]),
            ("alias.example", [(0, 1), (49, 0), (51, 1)]),
            ("none.example", [(0, 1), (29, 0), (31, 1)]),  # as the SOA says
            ("fails.example", [(0, haineko.Resolver.ROUNDS)] * 2),
            ("ages.example", [(0, 1), (0, 1)]),  # RFC 2181 8
            ("years.example", [(0, 1), (86399, 0), (86401, 1)]),
        ):
            for at, wanted in times:
                with self.subTest(name, at=at):
                    self.assertEqual(asked(name, at), wanted)

    def test_what_is_kept_is_bounded(self):
        clock = [0.0]
        kept = haineko.Kept(3, lambda: clock[0])
        for key in "abc":
            kept.put(key, key.upper(), 10)
        self.assertEqual(kept.get("a"), "A")
        kept.put("d", "D", 10)
        self.assertEqual([kept.get(key) for key in "abcd"], ["A", None, "C", "D"])
        kept.put("e", "E", 0)
        self.assertEqual(kept.get("e"), None)
        clock[0] = 10
        self.assertEqual([kept.get(key) for key in "acd"], [None] * 3)
        self.assertEqual(len(kept.table), 0)

    def test_servers_of_resolv_conf(self):
        path = os.path.join(self.folder, "resolv.conf")
        text = "# nameserver 192.0.2.9\nsearch example.org\nnameserver 192.0.2.1\nnameserver\t2001:db8::53\noptions x\n"
        for content, wanted in (
            (text, (("192.0.2.1", 53), ("2001:db8::53", 53))),
            ("nameserver nonsense\n", (("127.0.0.1", 53),)),
            ("".join(f"nameserver 192.0.2.{i}\n" for i in range(1, 6)), tuple((f"192.0.2.{i}", 53) for i in (1, 2, 3))),
        ):
            with self.subTest(content):
                with open(path, "w", encoding="ascii") as stream:
                    stream.write(content)
                self.assertEqual(haineko.listed_servers(path, haineko.signature(path)), wanted)
        self.assertEqual(haineko.listed_servers(path + "x", None), (("127.0.0.1", 53),))

    def test_the_setting_resolver(self):
        for value, wanted in (
            ("127.0.0.1:5353", ("127.0.0.1", 5353)),
            ("192.0.2.1", ("192.0.2.1", 53)),
            ("[2001:db8::1]:5353", ("2001:db8::1", 5353)),
            ("2001:db8::1", ("2001:db8::1", 53)),
            ("ns.example.org", ()),
            ("127.0.0.1:0", ()),
            ("127.0.0.1:65536", ()),
            ("127.0.0.1:", ()),
        ):
            with self.subTest(value):
                faults: list = []
                found = haineko.read(haineko.Smtpd, {"resolver": value}, "smtpd", faults)
                self.assertEqual(haineko.name_server(value), wanted)
                self.assertEqual((found.resolver, bool(faults)), ((value,), not wanted))


class HostsOfADomain(unittest.TestCase):
    def test_order(self):
        values = ((20, "c"), (10, "a"), (10, "b"), (5, "mx.bad host"), (5, ""))
        for dice, wanted in (([0.1, 0.2, 0.9], ["b", "a", "c"]), ([0.9, 0.2, 0.1], ["a", "b", "c"])):
            with self.subTest(dice):
                throws = iter([dice[0], *[dice[2], dice[1]]])
                self.assertEqual(
                    haineko.by_preference(values, "relay.example", lambda throws=throws: next(throws)), wanted
                )

    def test_equal_ones_are_shuffled(self):
        values = tuple((10, f"mx{i}") for i in range(4))
        orders = {tuple(haineko.by_preference(values, "relay", haineko.chance)) for _ in range(300)}
        self.assertGreater(len(orders), 12)

    def test_this_host_and_those_behind_it_are_left_out(self):
        values = ((10, "a"), (20, "relay.example"), (20, "b"), (30, "c"))
        self.assertEqual(haineko.by_preference(values, "Relay.example", haineko.chance), ["a"])
        self.assertEqual(haineko.by_preference(values[1:], "relay.example", haineko.chance), [])

    def test_public_addresses(self):
        for text, public in (
            ("8.8.8.8", True),
            ("2606:4700::1111", True),
            ("127.0.0.1", False),
            ("10.1.2.3", False),
            ("172.31.0.1", False),
            ("192.168.1.1", False),
            ("169.254.169.254", False),
            ("100.64.0.1", False),
            ("0.0.0.0", False),
            ("255.255.255.255", False),
            ("224.0.0.1", False),
            ("::1", False),
            ("::", False),
            ("fe80::1", False),
            ("fd00::1", False),
            ("ff02::1", False),
            ("::ffff:127.0.0.1", False),
            ("::ffff:8.8.8.8", True),
            ("2002:7f00:1::", False),
        ):
            with self.subTest(text):
                self.assertEqual(haineko.is_public(text), public)


class PoliciesOfDomains(unittest.TestCase):
    def test_the_record(self):
        for texts, wanted in (
            (("v=STSv1; id=20160831085700Z;",), "20160831085700Z"),
            (("v=STSv1;id=1",), "1"),
            (("other", "v=STSv1; id=2;"), "2"),
            (("v=STSv1; x=y; id=3; z=1",), "3"),
            ((), ""),
            (("v=STSv1; id=1;", "v=STSv1; id=2;"), ""),
            (("v=STSv1; id=;",), ""),
            (("v=STSv1; id=a-b;",), ""),
            (("v=STSv1;",), ""),
            (("v=STSv2; id=1;",), ""),
            (("v=STSv10; id=1;",), ""),
        ):
            with self.subTest(texts):
                self.assertEqual(haineko.sts_id(texts), wanted)

    def test_the_text(self):
        good = "version: STSv1\r\nmode: enforce\r\nmx: MX1.example.\r\nmx: *.example.net\r\nmax_age: 604800\r\n"
        policy = haineko.Policy("enforce", ("mx1.example", "*.example.net"), 604800)
        for what, text, wanted in (
            ("whole", good, policy),
            ("LF", good.replace("\r\n", "\n") + "\n", policy),
            ("no end of line", good.rstrip(), policy),
            ("unknown keys", good + "nyan: 1\n", policy),
            ("a key twice: the first counts", good + "mode: none\n", policy),
            ("max_age over the top", good.replace("604800", "9999999999"), policy._replace(max_age=31557600)),
            ("none needs no host", "version:STSv1\nmode:none\nmax_age:1", haineko.Policy("none", (), 1)),
            ("no version", good.replace("version", "x"), None),
            ("another version", good.replace("STSv1", "STSv2"), None),
            ("no mode", good.replace("mode", "x"), None),
            ("an odd mode", good.replace("enforce", "perhaps"), None),
            ("no host", good.replace("mx:", "x:"), None),
            ("no max_age", good.replace("max_age", "x"), None),
            ("an odd max_age", good.replace("604800", "-1"), None),
            ("HTML", "<html>", None),
            ("nothing", "", None),
        ):
            with self.subTest(what):
                if wanted:
                    self.assertEqual(haineko.parse_policy(text), wanted)
                else:
                    self.assertRaises(ValueError, haineko.parse_policy, text)

    def test_hosts(self):
        for mode, host, admitted in (
            ("enforce", "mx1.example", True),
            ("enforce", "a.example.net", True),
            ("enforce", "example.net", False),
            ("enforce", "a.b.example.net", False),
            ("enforce", "mx2.example", False),
            ("testing", "mx2.example", True),
            ("none", "mx2.example", True),
        ):
            with self.subTest(mode, host=host):
                policy = haineko.Policy(mode, ("mx1.example", "*.example.net"), 60)
                self.assertEqual(policy.admits(host), admitted)


# ======================================================================================================================
# 12. Relays: MX
# ======================================================================================================================


class MxPeers(WithFiles):
    """A test with mail hosts on several addresses, and a name server that knows them as mx2.example and so on."""

    def setUp(self) -> None:
        super().setUp()
        self.host = self.enter(MailHost("127.0.0.2", "127.0.0.3", "127.0.0.4"))
        self.dns = self.enter(NameServer({f"mx{i}.example": {haineko.A: [f"127.0.0.{i}"]} for i in range(1, 6)}))

    def domain(self, *hosts, **kinds) -> None:
        """What DNS says of neko.example: MX hosts by number (preference, host), or other kinds of records."""
        mx = {haineko.MX: [(preference, f"mx{i}.example" if i else "") for preference, i in hosts]} if hosts else {}
        self.dns.zone["neko.example"] = {**mx, **{getattr(haineko, kind): values for kind, values in kinds.items()}}

    def relay(self, job: haineko.Job, sessions: haineko.Sessions | None = None) -> list:
        """Replies to the job, by sessions of its own unless some are given."""

        async def relayed() -> list:
            own = sessions or haineko.Sessions((self.dns.place,))
            said = await haineko.attempt(job, own)
            if not sessions:
                await own.sweep(everything=True)
            return said

        return haineko.run(relayed())

    def one(self, *recipients: str, **route) -> list:
        return self.relay(mail_to(*(recipients or ("mike@neko.example",)), port=self.host.port, **route))


class RelayMx(MxPeers):
    def test_which_host_answers(self):
        temporary, gone = {"CONN": "450 4.3.2 later"}, {"CONN": None}
        taken = ("250", "2.0.0", "DATA")
        cases = [
            ("the best", [(20, 3), (10, 2)], {}, (*taken, "mx2.example")),
            ("the next where nobody listens", [(10, 5), (20, 3)], {}, (*taken, "mx3.example")),
            ("the next after 4xx", [(10, 2), (20, 3)], {2: temporary}, (*taken, "mx3.example")),
            (
                "the next after 5xx to the connection",
                [(10, 2), (20, 3)],
                {2: {"CONN": "554 no"}},
                (*taken, "mx3.example"),
            ),
            ("the next after a hang-up", [(10, 2), (20, 3)], {2: gone}, (*taken, "mx3.example")),
            ("the next after 421 to MAIL", [(10, 2), (20, 3)], {2: {"MAIL": "421 bye"}}, (*taken, "mx3.example")),
            ("the next after a hang-up at RCPT", [(10, 2), (20, 3)], {2: {"RCPT": None}}, (*taken, "mx3.example")),
            ("the third", [(1, 2), (2, 3), (3, 4)], {2: temporary, 3: gone}, (*taken, "mx4.example")),
            ("a host without an address", [(10, 9), (20, 3)], {}, (*taken, "mx3.example")),
            (
                "5xx to RCPT is final",
                [(10, 2), (20, 3)],
                {2: {"RCPT": "550 5.1.1 who?"}},
                ("550", "5.1.1", "RCPT", "mx2.example"),
            ),
            (
                "4xx to RCPT is its word",
                [(10, 2), (20, 3)],
                {2: {"RCPT": "450 4.2.0 grey"}},
                ("450", "4.2.0", "RCPT", "mx2.example"),
            ),
            (
                "a hang-up after the text is not repeated",
                [(10, 2), (20, 3)],
                {2: {"TEXT": None}},
                ("421", "4.4.2", "DATA", "mx2.example"),
            ),
            (
                "nobody: the last word that is not final",
                [(10, 2), (20, 3)],
                {2: temporary, 3: {"CONN": "554 5.7.1 no"}},
                ("450", "4.3.2", "CONN", "mx2.example"),
            ),
            ("nobody at all", [(10, 5)], {}, ("421", "4.4.1", "CONN", "mx5.example")),
        ]
        for what, hosts, manners, wanted in cases:
            with self.subTest(what):
                self.host.manners = {f"127.0.0.{i}": manner for i, manner in manners.items()}
                self.domain(*hosts)
                said = self.one()[0]
                self.assertEqual(brief(said), wanted)
                self.assertEqual((said.mailer, said.port), ("MX", self.host.port))

    def test_what_dns_decides(self):
        self.dns.zone["fails.example"] = lambda q, _: [q.answer(code=2)]
        self.dns.zone["silent.example"] = lambda q, _: []
        self.dns.zone["a-fails.example"] = {haineko.MX: [(1, "fails.example")]}
        self.dns.zone["bare.example"] = {haineko.A: ["127.0.0.4"]}
        self.dns.zone["empty.example"] = {haineko.TXT: ["nothing here"]}
        self.dns.zone["null.example"] = {haineko.MX: [(0, "")]}
        self.dns.zone["own.example"] = {haineko.MX: [(10, "relay.example.org"), (20, "mx2.example")]}
        self.dns.zone["nowhere.example"] = {haineko.MX: [(10, "none.example")]}
        self.dns.zone["alias.example"] = {haineko.CNAME: ["bare.example"]}
        for to, wanted in (
            ("a@bare.example", ("250", "2.0.0", "DATA", "bare.example")),
            ("a@alias.example", ("250", "2.0.0", "DATA", "alias.example")),
            ("a@null.example", ("556", "5.1.10", "CONN", None)),
            ("a@none.example", ("550", "5.1.2", "CONN", None)),
            ("a@fails.example", ("451", "4.4.3", "CONN", None)),
            ("a@silent.example", ("451", "4.4.3", "CONN", None)),
            ("a@a-fails.example", ("451", "4.4.3", "CONN", None)),
            ("a@empty.example", ("550", "5.4.4", "CONN", None)),
            ("a@nowhere.example", ("550", "5.4.4", "CONN", None)),
            ("a@own.example", ("554", "5.4.6", "CONN", None)),
            ("a@[127.0.0.3]", ("250", "2.0.0", "DATA", "127.0.0.3")),
            ("a@[IPv6:::ffff:127.0.0.3]", ("250", "2.0.0", "DATA", "::ffff:127.0.0.3")),
        ):
            with self.subTest(to):
                said = self.one(to, timeout=1)[0]
                self.assertEqual((*brief(said)[:3], said.host and said.host.replace("7f00:3", "127.0.0.3")), wanted)
                self.assertTrue(all(said.message))
                self.assertEqual(said.mailer, "MX")

    def test_ipv6(self):
        six = self.enter(MailHost("::1"))
        self.dns.zone["six.example"] = {haineko.AAAA: ["::1"]}
        for to, host in (("a@six.example", "six.example"), ("a@[IPv6:::1]", "::1")):
            with self.subTest(to):
                said = self.relay(mail_to(to, port=six.port))[0]
                self.assertEqual((said.code, said.host), ("250", host))

    def test_private_addresses_are_out_of_reach(self):
        self.domain((10, 2), (20, 3))
        for what, to in (("a domain's host", "a@neko.example"), ("a literal", "a@[127.0.0.2]"), ("v6", "a@[IPv6:::1]")):
            with self.subTest(what):
                said = self.one(to, private=False)[0]
                self.assertEqual((said.code, said.dsn), ("550", "5.4.4"))
                self.assertIn("is not a public address", said.message[1])
        self.assertEqual(self.host.opened, [])

    def test_recipients_of_several_domains(self):
        self.domain((10, 2))
        self.dns.zone["inu.example"] = {haineko.MX: [(10, "mx3.example")]}
        self.host.manners = {"127.0.0.3": {"RCPT": "550 5.1.1 no dogs"}}
        to = ("a@neko.example", "x@none.example", "a@inu.example", "b@Neko.example")
        said = self.one(*to)
        self.assertEqual([item.code for item in said], ["250", "550", "550", "250"])
        self.assertEqual([item.host for item in said], ["mx2.example", None, "mx3.example", "mx2.example"])
        self.assertEqual([mail[2] for mail in self.host.mails], [["a@neko.example", "b@Neko.example"]])

    def test_a_recipient_that_is_refused_stays_refused_elsewhere(self):
        self.domain((10, 2), (20, 3))
        said_at = iter(("550 5.1.1 who?", "421 4.3.2 bye", "250 fine"))

        class Moods(dict):
            def get(self, verb, usual):
                return next(said_at) if verb == "RCPT" else usual

        self.host.manners = {"127.0.0.2": Moods({"RCPT": ""})}
        said = self.one("a@neko.example", "b@neko.example")
        self.assertEqual([brief(item) for item in said], [
            ("550", "5.1.1", "RCPT", "mx2.example"), ("250", "2.0.0", "DATA", "mx3.example")])  # fmt: skip
        self.assertEqual([mail[2] for mail in self.host.mails], [["b@neko.example"]])

    def test_no_more_hosts_are_tried_than_a_mail_is_worth(self):
        self.dns.zone["many.example"] = {haineko.MX: [(i, f"many{i}.example") for i in range(30)]}
        for i in range(30):
            self.dns.zone[f"many{i}.example"] = {haineko.A: ["127.0.0.2"]}
        self.host.manners = {"127.0.0.2": {"CONN": "450 later"}}
        self.assertEqual(self.one("a@many.example")[0].code, "450")
        self.assertEqual(len(self.host.opened), haineko.MAX_HOPS)

    def test_sessions_and_answers_are_used_again(self):
        self.domain((10, 2))
        sessions = haineko.Sessions((self.dns.place,))

        async def several() -> list:
            said = [await haineko.attempt(mail_to("a@neko.example", port=self.host.port), sessions) for _ in range(3)]
            await sessions.sweep(everything=True)
            return [item.code for replies in said for item in replies]

        self.assertEqual(haineko.run(several()), ["250"] * 3)
        self.assertEqual((self.host.opened, len(self.host.mails)), (["127.0.0.2"], 3))
        self.assertEqual(len(self.dns.names()), len(set(self.dns.names())))

    def test_credentials_are_not_for_strangers(self):
        faults: list = []
        routes = {"default": {"mailer": "MX", "auth": "relay"}}
        logins = {"relay": {"username": "u", "password": "p"}}
        found = haineko.read(haineko.Settings, {"mailertable": routes, "authinfo": logins}, "", faults)
        self.assertEqual(haineko.settled(found, faults)[1], ["mailertable.default.auth: MX logs in nowhere"])

    def test_the_name_servers_of_the_settings_are_asked(self):
        first, second = haineko.Smtpd(resolver=("127.0.0.1:1",)), haineko.Smtpd(resolver=("127.0.0.1:2",))
        service = haineko.Service(haineko.Settings(smtpd=first))
        before = service.sessions.resolver
        service.take(haineko.Settings(smtpd=first))
        self.assertIs(service.sessions.resolver, before)  # and what it knows
        service.take(haineko.Settings(smtpd=second))
        self.assertEqual(service.sessions.resolver.servers(), (("127.0.0.1", 2),))
        self.assertIs(service.sessions.policies.resolver, service.sessions.resolver)

    def test_a_message_for_several_domains_by_the_command_sendmail(self):
        self.domain((10, 2))
        self.dns.zone["inu.example"] = {haineko.MX: [(10, "mx3.example")]}
        path = os.path.join(self.folder, "haineko.json")
        route = {"mailer": "MX", "port": self.host.port, "private": 1, "timeout": 2}
        smtpd = {"hostname": "relay.example.org", "resolver": self.dns.place}
        with open(path, "w", encoding="utf-8") as stream:
            json.dump({"smtpd": smtpd, "recipients": {"open-relay": 1}, "mailertable": {"default": route}}, stream)
        to = ["a@neko.example", "b@inu.example", "c@none.example"]
        for tos, code in ((to[:2], haineko.EX_OK), (to, haineko.EX_UNAVAILABLE)):
            self.host.mails.clear()
            done = subprocess.run(
                [sys.executable, SOURCE, "sendmail", "-C", path, "-f", "k@example.org", *tos],
                input=b"Subject: Nyaaaa\n\nMeow.\n",
                capture_output=True,
                timeout=30,
                check=False,
            )
            self.assertEqual(done.returncode, code, done.stderr)
            self.assertEqual(sorted(mail[2] for mail in self.host.mails), [["a@neko.example"], ["b@inu.example"]])
        self.assertIn(b"<c@none.example>: 550 CONN: Domain does not exist", done.stderr)

    def test_tls(self):
        host = self.enter(MailHost("127.0.0.2", "127.0.0.3", tls=self.tls))
        self.dns.zone["neko.example"] = {haineko.MX: [(10, "mx2.example"), (20, "mx3.example")]}
        breaks, early = {"TLS": "this is no TLS"}, {"STARTTLS": "220 go\r\nand this came too early"}
        cases = [
            ("whoever it is", {}, {}, ("250", "DATA", "mx2.example"), True),
            (
                "refused in words: in clear text",
                {2: {"STARTTLS": "454 4.7.0 not now"}},
                {},
                ("250", "DATA", "mx2.example"),
                False,
            ),
            ("broken: in clear text", {2: breaks}, {}, ("250", "DATA", "mx2.example"), False),
            ("rubbish: in clear text", {2: early}, {}, ("250", "DATA", "mx2.example"), False),
            ("hung up: in clear text", {2: {"STARTTLS": None}}, {}, ("250", "DATA", "mx2.example"), False),
            ("insisted on", {}, {"starttls": True, "tls_verify": False}, ("250", "DATA", "mx2.example"), True),
            (
                "insisted on, with a name",
                {},
                {"starttls": True, "ca_file": self.ca},
                ("421", "STARTTLS", "mx3.example"),
                None,
            ),
            (
                "insisted on and broken",
                {2: breaks, 3: breaks},
                {"starttls": True},
                ("421", "STARTTLS", "mx3.example"),
                None,
            ),
            (
                "insisted on and not offered",
                {2: {"EHLO": "250 mx"}},
                {"starttls": True, "tls_verify": False},
                ("250", "DATA", "mx3.example"),
                True,
            ),
        ]
        for what, manners, route, wanted, secure in cases:
            with self.subTest(what):
                host.mails.clear()
                host.manners = {f"127.0.0.{i}": manner for i, manner in manners.items()}
                said = self.relay(mail_to("a@neko.example", port=host.port, **route))[0]
                self.assertEqual((said.code, said.command, said.host), wanted)
                self.assertEqual([mail[1] for mail in host.mails], [] if secure is None else [secure])


class RelayMxByPolicy(MxPeers):
    """MTA-STS. The domain is sts.example; its host is mx.sts.example, which has a certificate."""

    ENFORCE = "version: STSv1\nmode: enforce\nmx: mx.sts.example\nmax_age: 1000\n"

    def setUp(self) -> None:
        super().setUp()
        self.host = self.enter(MailHost("127.0.0.2", "127.0.0.3", tls=self.tls))
        self.web = self.enter(PolicyServer(self.tls, self.ENFORCE))
        self.clock = [0.0]
        self.dns.zone.update({
            "sts.example": {haineko.MX: [(10, "mx.sts.example")], "ttl": 0},
            "mx.sts.example": {haineko.A: ["127.0.0.2"]},
            "mta-sts.sts.example": {haineko.A: ["127.0.0.1"]},
            "_mta-sts.sts.example": {haineko.TXT: ["v=STSv1; id=1;"], "ttl": 0},
        })  # fmt: skip
        stderr = os.dup(2)
        self.addCleanup(os.close, stderr)
        self.addCleanup(os.dup2, stderr, 2)
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)

    def sessions(self) -> haineko.Sessions:
        found = haineko.Sessions((self.dns.place,))
        found.resolver = haineko.Resolver((self.dns.place,), clock=lambda: self.clock[0])
        found.policies = haineko.Policies(found.resolver, self.web.port, lambda: self.clock[0])
        return found

    def deliver(self, sessions: haineko.Sessions | None = None, ca: bool = True) -> tuple:
        sessions = sessions or self.sessions()
        job = mail_to("a@sts.example", port=self.host.port, ca_file=self.ca if ca else "")

        async def delivered() -> list:
            said = await haineko.attempt(job, sessions)
            await sessions.sweep(everything=True)
            return said

        return brief(haineko.run(delivered())[0])

    def test_enforced(self):
        loose, other = self.ENFORCE.replace("enforce", "testing"), self.ENFORCE.replace("mx.sts", "mail.sts")
        clear, taken = {"EHLO": "250 mx"}, ("250", "2.0.0", "DATA", "mx.sts.example")
        broken = {"TLS": "this is no TLS"}
        cases = [
            ("its host with its certificate", self.ENFORCE, {}, taken, True),
            ("its host by a pattern", self.ENFORCE.replace("mx.sts", "*.sts"), {}, taken, True),
            ("not its host", other, {}, ("451", "4.7.5", "STARTTLS", None), None),
            ("no TLS offered", self.ENFORCE, clear, ("454", "4.7.4", "STARTTLS", "mx.sts.example"), None),
            ("TLS that breaks", self.ENFORCE, broken, ("421", "4.7.5", "STARTTLS", "mx.sts.example"), None),
            ("testing: not its host", loose.replace("mx.sts", "mail.sts"), {}, taken, True),
            ("testing: no TLS offered", loose, clear, taken, False),
            ("mode none", "version: STSv1\nmode: none\nmax_age: 1000\n", clear, taken, False),
            ("no policy but a page", "<html>", clear, taken, False),
            ("a policy beyond all bounds", self.ENFORCE + "x" * 70000, clear, taken, False),
        ]
        for what, text, manner, wanted, secure in cases:
            with self.subTest(what):
                self.web.text = text
                self.host.mails.clear()
                self.host.manners = {"127.0.0.2": manner}
                self.assertEqual(self.deliver(), wanted)
                self.assertEqual([mail[1] for mail in self.host.mails], [] if secure is None else [secure])
        self.assertIn("GET /.well-known/mta-sts.txt HTTP/1.1\r\nHost: mta-sts.sts.example\r\n", self.web.asked[0])

    def test_a_certificate_for_another_name_is_none(self):
        self.dns.zone["sts.example"] = {haineko.MX: [(10, "mx2.sts.example"), (20, "mx.sts.example")]}
        self.dns.zone["mx2.sts.example"] = {haineko.A: ["127.0.0.3"]}
        self.web.text = self.ENFORCE.replace("mx.sts", "*.sts")
        self.assertEqual(self.deliver(), ("250", "2.0.0", "DATA", "mx.sts.example"))
        self.assertEqual([mail[0] for mail in self.host.mails], ["127.0.0.2"])
        self.dns.zone["sts.example"] = {haineko.MX: [(10, "mx2.sts.example")]}
        self.assertEqual(self.deliver()[:3], ("421", "4.7.5", "STARTTLS"))

    def test_a_web_server_that_is_not_the_domains_says_nothing(self):
        self.host.manners = {"127.0.0.2": {"EHLO": "250 mx"}}
        self.assertEqual(self.deliver(ca=False)[0], "250")
        self.assertEqual(self.web.asked, [])
        self.web.status = 301
        self.assertEqual(self.deliver()[0], "250")

    def test_policies_are_kept(self):
        sessions, strict = self.sessions(), "451"
        self.web.text = self.ENFORCE.replace("mx.sts", "mail.sts")  # shows by 451 whether it is in force
        soft = self.ENFORCE.replace("enforce", "testing")
        txt = self.dns.zone["_mta-sts.sts.example"]
        for what, at, changes, wanted, asked in (
            ("the first mail", 0, {}, strict, 1),
            ("the second", 10, {}, strict, 1),
            ("a new policy, the same number", 20, {"text": soft}, strict, 1),
            ("DNS fails", 30, {"txt": lambda q, _: [q.answer(code=2)]}, strict, 1),
            ("no record any more", 40, {"txt": None}, strict, 1),
            (
                "a new number, but the web fails",
                100,
                {"txt": {haineko.TXT: ["v=STSv1; id=2;"], "ttl": 0}, "status": 500},
                strict,
                2,
            ),
            ("it is not asked at every mail", 110, {}, strict, 2),
            ("later it is", 110 + haineko.Policies.AGAIN, {"status": 200}, "250", 3),
            ("and when its time is over", 2000, {}, "250", 4),
        ):
            with self.subTest(what):
                self.clock[0] = at
                self.web.text, self.web.status = (
                    changes.get("text", self.web.text),
                    changes.get("status", self.web.status),
                )
                self.dns.zone["_mta-sts.sts.example"] = txt = changes.get("txt", txt)
                self.assertEqual(self.deliver(sessions)[0], wanted)
                self.assertEqual(len(self.web.asked), asked)

    def test_a_web_server_that_drips_is_not_waited_for(self):
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        ended = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError), self.tls.wrap_socket(listener.accept()[0], server_side=True) as sock:
                sock.recv(65536)
                sock.sendall(b"HTTP/1.1 200 X\r\n")
                for i in itertools.count():
                    sock.sendall(b"X-%d: y\r\n" % i)
                    if ended.wait(0.1):
                        break

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        sessions = self.sessions()
        sessions.policies.port, sessions.policies.PATIENCE = listener.getsockname()[1], 0.6
        began = time.monotonic()
        self.assertEqual(self.deliver(sessions)[0], "250")
        self.assertLess(time.monotonic() - began, 3)
        ended.set()
        thread.join(5)


# ======================================================================================================================
# 16. Commands: check --connect
# ======================================================================================================================


class CheckConnect(WithFiles):
    def check(self, mailertable: dict, *flags: str, resolver: str = "127.0.0.1:1", **sections) -> tuple:
        """(exit code, lines) of `check` with these routes."""
        path = os.path.join(self.folder, "haineko.json")
        smtpd = {"hostname": "relay.example.org", "resolver": resolver}
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
            json.dump({"smtpd": smtpd, "mailertable": mailertable, **sections}, stream)
        line = [sys.executable, SOURCE, "check", "-c", path, *flags]
        done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
        self.assertEqual(done.stderr, "")
        return done.returncode, done.stdout.splitlines()[1:]

    def assert_lines(self, lines: list, *wanted: str) -> None:
        """Each line begins as wanted, or has that after the step."""
        self.assertEqual(len(lines), len(wanted), lines)
        for line, words in zip(lines, wanted):
            self.assertRegex(line, words)

    def test_esmtp(self):
        host = self.enter(MailHost("127.0.0.1", tls=self.tls))
        route = {"mailer": "ESMTP", "host": "localhost", "port": host.port, "timeout": 2}
        strict = {**route, "starttls": 1, "ca_file": self.ca}
        code, lines = self.check({"default": strict}, "--connect")
        self.assertEqual(code, 0, lines)
        self.assert_lines(
            lines,
            "^mailertable.default: DNS: localhost is .*127.0.0.1",
            "TCP: connected to 127.0.0.1:",
            "EHLO: ",
            r"TLS: TLSv1\.[23], certificate of commonName=mx.sts.example, until Jan  1 .* 2120 ",
        )
        code, lines = self.check({"default": {**strict, "ca_file": ""}}, "--connect")
        self.assertEqual(code, 1)
        self.assert_lines(lines, "DNS: ", "TCP: ", "EHLO: ", "TLS: FAILED: .*421 TLS handshake failed: .*certificate")
        code, lines = self.check({"default": route}, "--connect")
        self.assertEqual(code, 0)
        self.assert_lines(lines, "DNS: ", "TCP: ", "EHLO: STARTTLS", "TLS: none, though it is offered")
        self.assertEqual(host.mails, [])

    def test_esmtp_that_fails(self):
        host = self.enter(MailHost("127.0.0.1"))
        closed = socket.create_server(("127.0.0.1", 0))
        nobody = closed.getsockname()[1]
        closed.close()
        login = {"authinfo": {"relay": {"username": "neko", "password": "nyan"}}}
        route = {"host": "127.0.0.1", "port": host.port, "timeout": 2}
        offer = {"EHLO": "250-mx\r\n250 AUTH PLAIN"}
        cases = [
            (
                "nobody listens",
                {"port": nobody},
                {},
                "TCP: FAILED: .*421 Cannot connect SMTP Server: Connection refused",
            ),
            ("a name that is none", {"host": "nowhere.invalid"}, {}, "DNS: FAILED: nowhere.invalid: "),
            ("a greeting of 5xx", {}, {"CONN": "554 5.7.1 go away"}, "TCP: FAILED: .*554 5.7.1 go away"),
            ("EHLO refused", {}, {"EHLO": "550 no", "HELO": "550 no"}, "EHLO: FAILED: .*550 no"),
            ("no STARTTLS", {"starttls": 1}, {}, "TLS: FAILED: .*454 STARTTLS is required"),
            ("AUTH refused", {"auth": "relay"}, {**offer, "AUTH": "535 5.7.8 who?"}, "AUTH: FAILED: .*535 5.7.8 who"),
            ("AUTH not offered", {"auth": "relay"}, {}, "AUTH: FAILED: .*454 AUTH is required"),
            ("logged in", {"auth": "relay"}, {**offer, "AUTH": "235 2.7.0 fine"}, "AUTH: logged in as neko"),
        ]
        for what, changes, manner, words in cases:
            with self.subTest(what):
                host.manners = {"127.0.0.1": manner}
                code, lines = self.check({"default": {**route, **changes}}, "--connect", **login)
                self.assertEqual(
                    (code, len([line for line in lines if "FAILED" in line])), (int("FAILED" in words),) * 2
                )
                self.assertRegex(lines[-1], words)
                self.assertNotIn("nyan", "\n".join(lines))

    def test_mx(self):
        host = self.enter(MailHost("127.0.0.2", "127.0.0.3", tls=self.tls))
        zone = {
            "neko.example": {haineko.MX: [(10, "mx4.example"), (20, "mx2.example")]},
            "mx2.example": {haineko.A: ["127.0.0.2"]},
            "mx4.example": {haineko.A: ["127.0.0.4"]},
            "sts.example": {haineko.MX: [(10, "mx.sts.example")]},
            "mx.sts.example": {haineko.A: ["127.0.0.2"]},
            "null.example": {haineko.MX: [(0, "")]},
        }
        dns = self.enter(NameServer(zone))
        route = {"mailer": "MX", "port": host.port, "private": 1, "timeout": 2, "ca_file": self.ca}
        table = dict.fromkeys(("neko.example", "sts.example", "null.example", "default"), route)
        code, lines = self.check(table, "--connect", resolver=dns.place)
        self.assertEqual(code, 1)
        self.assert_lines(
            lines,
            "^mailertable.neko.example: DNS: neko.example takes mail at mx4.example, mx2.example",
            "TCP: FAILED: 127.0.0.4:.*Connection refused",
            "TCP: connected to 127.0.0.2",
            "EHLO: ",
            "TLS: TLSv1.[23], certificate not verified",
            "TLS: not verified: .*(ostname|doesn't match)",
            "^mailertable.sts.example: DNS: ",
            "TCP: connected",
            "EHLO: ",
            "TLS: TLSv1.[23], certificate of commonName=mx.sts.example",
            "^mailertable.null.example: DNS: FAILED: 556 Domain takes no mail",
            "^mailertable.default: DNS: name servers answer",
        )
        code, lines = self.check({"default": route}, "--connect", resolver="127.0.0.1:1")
        self.assertEqual(code, 1)
        self.assert_lines(lines, "^mailertable.default: DNS: FAILED: 127.0.0.1: ")

    def test_relays_that_connect_to_nothing(self):
        code, lines = self.check({"default": {"mailer": "Screen"}, "a.example": {"mailer": self.folder}}, "--connect")
        self.assertEqual(code, 0)
        self.assert_lines(lines, "^mailertable.default: NONE: nothing", f"^mailertable.a.example: FILE: {self.folder}$")

    def test_every_relay_can_be_tried(self):
        self.assertEqual(set(haineko.PROBES), set(haineko.RELAYS))

    def test_nothing_is_tried_unasked(self):
        self.assertEqual(self.check({"default": {"mailer": "MX"}}), (0, []))

    def test_records_of_a_sender(self):
        key = base64.b64encode(
            b"0\x5c0\x0d..\x03\x4b\x00\x30\x48\x02\x41\x00" + b"\xaa" * 64 + b"\x02\x03\x01\x00\x01"
        ).decode()
        dns = self.enter(NameServer({
            "good.example": {haineko.TXT: ["other", "v=spf1 mx include:spf.good.example -all"]},
            "spf.good.example": {haineko.TXT: ["v=spf1 ip4:192.0.2.0/24 ~all"]},
            "_dmarc.good.example": {haineko.TXT: ["v=DMARC1; p=reject"]},
            "s1._domainkey.good.example": {haineko.TXT: ["v=DKIM1; k=ed25519; p=" + "A" * 43 + "="]},
            "s1._domainkey.bad.example": {haineko.TXT: [f"p={key}"]},
            "bad.example": {haineko.TXT: ["nothing"]},
            "fails.example": lambda q, _: [q.answer(code=2)],
        }))  # fmt: skip
        fine = (
            "good.example: SPF: v=spf1 mx include",
            "good.example: DKIM: s1._domainkey.good.example: ed25519",
            "good.example: DMARC: _dmarc.good.example: v=DMARC1; p=reject",
        )
        for sender, flags, code, wanted in (
            ("a@good.example", ("--selector", "s1"), 0, fine),
            ("a@good.example", (), 0, (fine[0], "DKIM: not looked at; --selector", fine[2])),
            (
                "a@sub.good.example",
                (),
                1,
                ("SPF: FAILED: .*no SPF", "DKIM: not", fine[2].replace("good.example: DMARC", "DMARC")),
            ),
            (
                "a@bad.example",
                ("--selector", "s1"),
                1,
                ("SPF: FAILED: .*no SPF record", "DKIM: FAILED: .*RSA key of", "DMARC: FAILED: .*no DMARC record"),
            ),
            ("a@fails.example", (), 1, ("SPF: FAILED: DNS gives no answer", "DKIM: not", "DMARC: FAILED: .*no DMARC")),
        ):
            with self.subTest(sender, flags=flags):
                found, lines = self.check(
                    {"default": {"mailer": "Discard"}}, "--sender", sender, *flags, resolver=dns.place
                )
                self.assertEqual(found, code, lines)
                self.assert_lines(lines, *wanted)

    def test_what_the_readme_shows(self):
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as stream:
            shown = re.findall(
                r"(?s)```console connect\n\$ python3 haineko.py check (.*?)\n.*?\n(.*?)```", stream.read()
            )
        (flags, wanted), zone = shown[0], {haineko.TXT: ["v=spf1 include:spf.example.net -all"]}
        host = self.enter(MailHost("127.0.0.1", tls=self.tls))
        offers = ("PIPELINING", "SIZE 35882577", "STARTTLS")
        words = "".join(f"250-{word}\r\n" for word in ("mx", *offers)) + "250 AUTH PLAIN LOGIN"
        host.manners = {"127.0.0.1": {"EHLO": words, "AUTH": "235 2.7.0 fine"}}
        inner = {haineko.TXT: ["v=spf1 ip4:192.0.2.0/24 -all"]}
        dns = self.enter(NameServer({"example.org": zone, "spf.example.net": inner}))
        route = {"host": "localhost", "port": host.port, "starttls": 1, "ca_file": self.ca, "auth": "provider"}
        login = {"authinfo": {"provider": {"username": "kijitora", "password": "nyan"}}}
        code, lines = self.check({"default": route}, *flags.split(), resolver=dns.place, **login)

        def alike(line: str) -> str:
            """Without what is another server's."""
            line = re.sub(r"(localhost|smtp.example.net|mx.sts.example)\b", "HOST", re.sub(r"until .*", "until", line))
            return re.sub(r"(?<= to )\S+|(?<=HOST is ).*|TLSv1..", "", line)

        self.assertEqual((code, list(map(alike, lines))), (1, list(map(alike, wanted.splitlines()))))

    def test_wrong_usage(self):
        for flags in (
            ("--sender", "nobody"),
            ("--sender", "a@[127.0.0.1]"),
            ("--sender", "a@b.example", "--selector", "a b"),
        ):
            with self.subTest(flags):
                line = [sys.executable, SOURCE, "check", "-c", os.path.join(self.folder, "none.json"), *flags]
                done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
                self.assertEqual(done.returncode, 1)  # no such file
        options = haineko.parser().parse_args(["check", "--sender", "a@b.example", "--selector", "a b"])
        with self.assertRaises(haineko.Usage):
            haineko.tried(haineko.Settings(), options)


class RecordsOfASender(unittest.TestCase):
    """What is read in the records, without a name server."""

    def look(self, function, zone: dict, *values) -> tuple:
        async def texts(name: str) -> tuple:
            return zone.get(name, ())

        return haineko.run(function("a.example", *values, texts))

    def test_spf(self):
        chain = {f"i{i}.example": (f"v=spf1 include:i{i + 1}.example ~all",) for i in range(20)}
        cases = [
            ("v=spf1 -all", "sends no mail at all"),
            ("v=spf1 a mx -all", ""),
            ("V=SPF1 ip4:192.0.2.1 ip6:2001:db8::/32 ?all", ""),
            ("v=spf1 redirect=b.example", ""),
            ("v=spf1 exists:%{i}.x.example include:%{d}.example -all", ""),
            ("v=spf1 +all", "lets everybody"),
            ("v=spf1 all", "lets everybody"),
            ("v=spf1 ip4=192.0.2.1 -all", ""),  # an unknown modifier is no fault, RFC 7208 6
            ("v=spf1 ipv4:192.0.2.1 -all", '"ipv4:192.0.2.1" is no term'),
            ("v=spf1 include:none.example -all", "include:none.example: no SPF record"),
            ("v=spf1 include:i0.example -all", "more than 10 look-ups"),
            ("v=spf1 " + "a mx " * 6 + "-all", "more than 10 look-ups"),
            ("v=spf1 include:a.example -all", ""),
            ("v=spf10 -all", "no SPF record"),
        ]
        for record, words in cases:
            with self.subTest(record):
                zone = {"a.example": (record,), "b.example": ("v=spf1 mx -all",), **chain}
                fine, told = self.look(haineko.spf, zone)
                self.assertEqual(fine, not words, told)
                self.assertIn(words, told)
        self.assertIn("two SPF", self.look(haineko.spf, {"a.example": ("v=spf1 -all", "v=spf1 mx -all")})[1])
        self.assertIn(
            "(2 of 10", self.look(haineko.spf, {"a.example": ("v=spf1 a:b.example/24 mx//64 ip4:192.0.2.1 ~all",)})[1]
        )

    def test_dkim(self):
        def rsa(octets: int) -> str:
            modulus = b"\x02\x82" + struct.pack(">H", octets + 1) + b"\0" + b"\xaa" * octets + b"\x02\x03\x01\0\x01"
            return base64.b64encode(b"0\x82\0\0" + modulus).decode()

        for texts, words, fine in (
            ((f"v=DKIM1; k=rsa; p={rsa(256)}",), "RSA, 2048 bits", True),
            ((f"p={rsa(128)}",), "RSA, 1024 bits", True),
            ((f"p={rsa(256)[:80]} {rsa(256)[80:]}; t=y",), "under test", True),
            ((f"p={rsa(64)}",), "RSA key of", False),
            (("v=DKIM1; p=",), "revoked", False),
            (("v=DKIM2; p=AAAA",), "not a DKIM key", False),
            (("v=DKIM1; k=rsa",), "not a DKIM key", False),
            (("p=***",), "no base64", False),
            (("k=ed25519; p=AAAA",), "32 octets", False),
            (("p=AAAA", "p=BBBB"), "more than one", False),
            ((), "no key", False),
        ):
            with self.subTest(texts):
                found, told = self.look(haineko.dkim, {"s._domainkey.a.example": texts}, "s")
                self.assertEqual(found, fine, told)
                self.assertIn(words, told)

    def test_dmarc(self):
        for zone, fine, words in (
            ({"_dmarc.a.example": ("v=DMARC1; p=none",)}, True, "p=none"),
            ({"_dmarc.a.example": ("v=DMARC1;p=Quarantine; rua=mailto:a@a.example",)}, True, "Quarantine"),
            ({"_dmarc.a.example": ("v=DMARC1; p=all",)}, False, "names no policy"),
            ({"_dmarc.a.example": ("v=DMARC1; rua=x",)}, False, "names no policy"),
            ({"_dmarc.a.example": ("v=DMARC1; p=none", "v=DMARC1; p=none")}, False, "more than one"),
            ({"_dmarc.a.example": ("v=DMARC10; p=none",)}, False, "no DMARC record"),
            ({"_dmarc.example": ("v=DMARC1; p=none",)}, False, "no DMARC record"),
            ({}, False, "no DMARC record"),
        ):
            with self.subTest(zone):
                found, told = self.look(haineko.dmarc, zone)
                self.assertEqual(found, fine, told)
                self.assertIn(words, told)


if __name__ == "__main__":
    unittest.main()
