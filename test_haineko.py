"""Tests of haineko.py: helpers first, then the house rules, then classes in the order of haineko.py's sections.

A test is a table of cases (description, input, expected) and one loop. Peers are real: sockets, processes, files. There
is one SMTP peer, one HTTP peer, one name server, one launcher and one function that waits. Processes run a copy of
haineko.py in a temporary folder. Run with `python3 -m unittest`; standard library only.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import binascii
import collections
import concurrent.futures
import contextlib
import datetime
import email
import email.header
import email.policy
import email.utils
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import importlib.util
import io
import itertools
import json
import os
import pty
import py_compile
import random
import re
import resource
import select
import selectors
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import statistics
import struct
import subprocess
import symtable
import sys
import sysconfig
import tempfile
import termios
import threading
import time
import tracemalloc
import unittest
import urllib.request
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

import haineko  # noqa: E402

parser = getattr(re, "_parser", None) or importlib.import_module("sre_parse")  # of patterns; its name since Python 3.11

SCRATCH = tempfile.TemporaryDirectory(prefix="haineko-test-")
# Processes run a copy: beside the original there may be settings of which no test may make use.
PROGRAM = shutil.copy(os.path.join(HERE, "haineko.py"), SCRATCH.name)
py_compile.compile(PROGRAM, doraise=True)  # once: a process that runs LAUNCHER takes the bytecode
LAUNCHER = os.path.join(SCRATCH.name, "run.py")
with open(LAUNCHER, "w", encoding="utf-8") as launcher:
    launcher.write("import sys, haineko; sys.exit(haineko.main(sys.argv[1:]))")
os.environ["HAINEKO_CONF"] = os.path.join(SCRATCH.name, "none.json")  # for what runs in this process
NOW = 1388741758.0
NAME = "relay.example.org"  # of the Haineko under test
DEFAULTS = {
    "smtpd": {"hostname": NAME},
    "recipients": {"open-relay": 1},
    "mailertable": {"default": {"mailer": "Discard"}},
}
with open(os.path.join(HERE, "README.md"), encoding="utf-8") as readme:
    README = readme.read()


# ======================================================================================================================
# Helpers: settings and mails, peers, a running server, base classes
# ======================================================================================================================
def settings(**sections) -> haineko.Settings:
    """Settings as from a file: everybody may be written to and nothing goes out, unless the sections say otherwise."""
    faults: list = []
    found = haineko.from_dict(haineko.Settings, json.loads(json.dumps({**DEFAULTS, **sections})), "", faults)
    found, faults = haineko.resolve_settings(found, faults)
    if faults:
        raise ValueError(faults)
    return found


def document(**changes) -> dict:
    """A submission as JSON, with changes; `header` is merged, None takes a key away."""
    header = {"from": "Kijitora <kijitora@example.org>", "subject": "Nyaaaa", **changes.pop("header", {})}
    whole = {"mail": "kijitora@example.org", "rcpt": ["mikeneko@example.jp"], "body": "Meow.\n", "header": header}
    whole.update(changes)
    header = {key: value for key, value in header.items() if value is not None}
    return {key: value for key, value in {**whole, "header": header}.items() if value is not None}


def as_body(submission) -> bytes:
    return submission if isinstance(submission, bytes) else json.dumps(submission).encode()


def request(body: bytes, client: str = "127.0.0.1", **headers: str) -> haineko.Request:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    place = haineko.parse_ip(client)
    return haineko.Request("POST", "/submit", headers, body, place, place, 50320, NOW)


async def and_closed(coroutine, sessions: haineko.TransportContext):
    """What the coroutine returns; then no session stays open."""
    try:
        return await coroutine
    finally:
        await sessions.sweep(everything=True)


async def together(*coroutines) -> None:
    await asyncio.gather(*coroutines)


def answered(asked: haineko.Request, service: haineko.App) -> haineko.Response:
    return haineko.run(and_closed(haineko.submit(asked, service), service.transport))


def posted(submission, force: haineko.Settings | None = None, client: str = "127.0.0.1") -> tuple:
    """(HTTP status, document) of a submission given to submit()."""
    answer = answered(request(as_body(submission), client), haineko.App(force or settings()))
    return answer.status, json.loads(answer.body)


def lone_worker(force: haineko.Settings) -> haineko.Worker:
    """A worker without a supervisor and listeners."""
    shared = {"busy_counts": [0], "wakeup_pair": (None, None), "limits": None}
    return haineko.Worker(SimpleNamespace(settings=force, listeners=[], pid=os.getpid(), **shared))


def over_http(octets: bytes, force: haineko.Settings, client: str = "127.0.0.1") -> tuple:
    """(HTTP status, document) of one request written to a connection of that client."""
    here, there = socket.socketpair()
    with here:
        here.sendall(octets)
        here.shutdown(socket.SHUT_WR)
        there.setblocking(False)
        worker = lone_worker(force)

        async def handled() -> None:
            connection = haineko.Connection(there, (client, 50320), worker)
            worker.connections[connection] = None
            await asyncio.wait_for(connection.handle(), 10)

        worker.loop.run_until_complete(handled())
        worker.loop.close()
        head, _, body = b"".join(iter(lambda: here.recv(65536), b"")).partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), json.loads(body) if body else None


def http_post(body: bytes, **headers: str) -> bytes:
    lines = [f"{name}: {value}\r\n" for name, value in {**headers, "Content-Length": str(len(body))}.items()]
    return f"POST /submit HTTP/1.1\r\nHost: x\r\n{''.join(lines)}\r\n".encode() + body


class Quiet(unittest.TestCase):
    """A test whose log lines go into a file, where it may read them."""

    def setUp(self) -> None:
        self._lines = tempfile.TemporaryFile()  # noqa: SIM115 -- closed behind the test
        self.addCleanup(self._lines.close)
        sys.stderr.flush()
        before = os.dup(2)
        os.dup2(self._lines.fileno(), 2)
        self.addCleanup(os.close, before)
        self.addCleanup(os.dup2, before, 2)

    def logged(self) -> list:
        """The lines since it was asked last."""
        self._lines.seek(0)
        lines = self._lines.read().decode().splitlines()
        self._lines.seek(0)
        self._lines.truncate()
        return lines


class Folder(unittest.TestCase):
    """A test with a folder for files."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="haineko-test-")
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def write(self, name: str, content, mode: int = 0o600) -> str:
        """Path of a new file; content other than text and octets is written as JSON."""
        path = os.path.join(self.folder, name)
        octets = content if isinstance(content, bytes) else content if isinstance(content, str) else json.dumps(content)
        with open(path, "wb") as stream:
            stream.write(octets if isinstance(octets, bytes) else octets.encode())
        os.chmod(path, mode)
        return path


PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII=")
ALL_OCTETS = bytes(range(256)) * 5


def file(filename: str | None = None, octets: bytes = b"%PDF-1.4 \0\r\n", **more) -> dict:
    """An attachment as JSON."""
    named = {} if filename is None else {"filename": filename}
    return {**named, "content": base64.b64encode(octets).decode(), **more}


def understood(submission) -> haineko.Submission:
    found, faults, _ = haineko.parse_submission(as_body(submission))
    if faults:
        raise ValueError(faults)
    return found


def parsed(octets: bytes) -> email.message.EmailMessage:
    return email.message_from_bytes(octets, policy=email.policy.default)


SILENCE, HANG_UP, LOST = "(says nothing more)", "(hangs up)", "(takes the mail, hangs up)"
CERTIFICATES: dict = {}  # name: path of a PEM file with certificate and key


def setUpModule() -> None:
    folder = tempfile.TemporaryDirectory(prefix="haineko-test-")
    unittest.addModuleCleanup(folder.cleanup)
    names = {"here": "DNS:localhost,IP:127.0.0.1,IP:127.0.0.46,IP:::1", "elsewhere": "DNS:elsewhere.example"}
    for name, alternatives in names.items() if shutil.which("openssl") else ():
        path = os.path.join(folder.name, f"{name}.pem")
        command = f"openssl req -x509 -nodes -days 2 -subj /CN={name} -newkey ec -pkeyopt ec_paramgen_curve:prime256v1"
        command += f" -addext subjectAltName={alternatives} -keyout {path}.key -out {path}.crt"
        if subprocess.run(command.split(), capture_output=True, check=False).returncode:
            return
        with open(path, "wb") as whole:
            for part in (".key", ".crt"):
                with open(path + part, "rb") as stream:
                    whole.write(stream.read())
        os.chmod(path, 0o600)
        CERTIFICATES[name] = path


def certificate(name: str = "here") -> str:
    """Path of a certificate with its key; skips the test where there is no openssl to make one."""
    if name not in CERTIFICATES:
        raise unittest.SkipTest("no openssl here that makes certificates")
    return CERTIFICATES[name]


def without_warnings(text: str) -> str:
    """What `check` says on stderr beside its warnings."""
    return "".join(line for line in text.splitlines(True) if not line.startswith("warning: "))


def eventually(condition, what: str = "", seconds: float = 10.0):
    """The first true thing that condition() gives; AssertionError where none comes in time."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"did not come in {seconds} s: {what or condition}")
        time.sleep(0.01)


USUAL = {
    "CONN": "220 peer.example ESMTP",
    "HELO": "250 peer.example",
    "STARTTLS": "220 2.0.0 go on",
    "MAIL": "250 2.1.0 sender fine",
    "RCPT": "250 2.1.5 recipient fine",
    "DATA": "354 go on",
    ".": "250 2.0.0 taken",
    "RSET": "250 2.0.0 forgotten",
    "QUIT": "221 2.0.0 bye",
}


class ReceivedMail(NamedTuple):
    """A text that an SmtpPeer got."""

    mail: str  # the MAIL line
    rcpt: list  # the RCPT lines that were answered with 2xx
    text: bytes
    connection: SmtpConnection

    @property
    def sender(self) -> str:
        return re.search("<(.*?)>", self.mail)[1]

    @property
    def recipients(self) -> list:
        return [re.search("<(.*?)>", line)[1] for line in self.rcpt]


class SmtpPeer:
    """An SMTP server on a free port, at one or several addresses, whose replies a test decides; it records what it got.

    says: {verb: what}. Verbs: CONN (the greeting), EHLO ... QUIT, TLS (the handshake), TEXT (after the first octets of
    a text) and "." (its end). What: a reply (its lines divided by LF), octets to be sent as they are, SILENCE, HANG_UP;
    LOST (takes the mail, then hangs up); a list of these, one for each time, the last one for ever; or a function
    (connection, line) -> one of them, or None for the usual. says_at: {address: says} goes before `says`.
    """

    def __init__(self, says=None, offers=(), tls="", smtps=False, logins=None, hosts=("127.0.0.1",), port=0) -> None:
        self.says, self.offers, self.smtps, self.logins = dict(says or {}), offers, smtps, logins or {}
        self.says_at: dict = {}
        self.context = tls
        if isinstance(tls, str) and tls:
            self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self.context.load_cert_chain(tls)
        self.connections: list = []  # one SmtpConnection for each connection
        self.mails: list = []  # a ReceivedMail for each text
        self.taken: list = []  # those that were answered with 2xx or LOST
        self.lost: list = []  # those that were answered with LOST
        self.tries: collections.Counter = collections.Counter()  # texts for each recipient
        self.lone = 0  # texts without a line
        self.answers: list = []  # what came after a token was refused
        self.lock = threading.Lock()
        self.now = self.most = 0  # texts that wait for their reply; the most at once
        self.listeners: list = []
        while len(self.listeners) < len(hosts):
            self._listen(hosts, port)
        self.host, self.port = self.listeners[0].getsockname()[:2]
        self.threads = [threading.Thread(target=self._accept, args=(item,), daemon=True) for item in self.listeners]
        for thread in self.threads[:]:
            thread.start()

    def _listen(self, hosts: tuple, port: int) -> None:
        """Listen at every address with one port, or with none of them where another process has that port."""
        self.listeners = []
        for host in hosts:
            try:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                self.listeners.append(socket.create_server((host, port), family=family, backlog=256))
            except OSError as fault:
                for listener in self.listeners:
                    listener.close()
                self.listeners = []
                if fault.errno == errno.EADDRNOTAVAIL:
                    raise unittest.SkipTest(f"{host} is no address of this machine") from None
                if fault.errno != errno.EADDRINUSE or len(hosts) == 1:
                    raise
                return
            port = self.listeners[0].getsockname()[1]

    def _accept(self, listener: socket.socket) -> None:
        host = listener.getsockname()[0]
        while True:
            sock, _ = listener.accept()
            if self.closing:
                sock.close()
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = SmtpConnection(self, sock, host)
            self.connections.append(connection)
            self.threads.append(threading.Thread(target=connection.run, daemon=True))
            self.threads[-1].start()

    closing = False

    def close(self) -> None:
        self.closing = True
        for listener in self.listeners:
            with contextlib.suppress(OSError):
                socket.create_connection(listener.getsockname()[:2], 1).close()
        for connection in self.connections:
            connection.cut()
        for thread in self.threads:
            thread.join(5)
        for listener in self.listeners:
            listener.close()

    def __enter__(self) -> SmtpPeer:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def lines(self) -> list:
        """Every line that came, of all connections."""
        return [line for connection in self.connections for line in connection.lines]

    def to(self, recipient: str) -> list:
        """The mails that were taken for that recipient."""
        return [mail for mail in list(self.taken) if recipient in mail.recipients]

    def what(self, verb: str, connection: SmtpConnection, line: str):
        with self.lock:
            found = {**self.says, **self.says_at.get(connection.host, {})}.get(verb)
            if isinstance(found, list):
                found = found.pop(0) if len(found) > 1 else found[0]
        return found(connection, line) if callable(found) else found


class SmtpConnection:
    """One connection to an SmtpPeer."""

    def __init__(self, peer: SmtpPeer, sock: socket.socket, host: str) -> None:
        self.peer, self.sock, self.host, self.unread = peer, sock, host, b""
        self.lines: list = []
        self.sender, self.recipients = "", []
        self.secure, self.user, self.mail = False, None, None

    def run(self) -> None:
        try:
            if self.peer.smtps:
                self.secured()
            self.say("CONN")
            while True:
                line = self.line()
                self.lines.append(line)
                self.hear(re.split("[ :]", line)[0].upper(), line)
        except (OSError, EOFError):
            pass
        finally:
            self.sock.close()

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def secured(self) -> None:
        if self.peer.what("TLS", self, ""):
            if self.peer.what("TLS", self, "") != SILENCE:
                self.more()
                self.say("TLS")
                raise EOFError
            self.silent()
        self.sock = self.peer.context.wrap_socket(self.sock, server_side=True)
        self.secure = True

    def hear(self, verb: str, line: str) -> None:
        said = self.say(verb, line)
        if verb == "STARTTLS" and said == "2":
            self.secured()
        elif verb in ("MAIL", "RSET"):
            self.sender, self.recipients = line, []
        elif verb == "RCPT" and said == "2":
            self.recipients.append(line)
        elif verb == "DATA" and said == "3":
            self.text()
        elif verb == "QUIT":
            raise EOFError

    def say(self, verb: str, line: str = "") -> str:
        """First digit of what was said."""
        what = self.peer.what(verb, self, line)
        if what is None and verb == "EHLO":
            offers = [offer for offer in self.peer.offers if not (self.secure and offer == "STARTTLS")]
            what = "\n".join(["250-peer.example", *[f"250-{offer}" for offer in offers], "250 HELP"])
        elif what is None and verb == "AUTH":
            what = self.authenticate(line)
        elif what is None:
            what = USUAL.get(verb, "500 5.5.2 what?")
        if verb == "." and self.mail and (what == LOST or what[:1] == "2"):
            self.peer.taken.append(self.mail)
            self.peer.lost += [self.mail] * (what == LOST)
        if what in (HANG_UP, LOST):
            raise EOFError
        if what == SILENCE:
            self.silent()
        self.sock.sendall(what if isinstance(what, bytes) else what.replace("\n", "\r\n").encode() + b"\r\n")
        if what[:3] == "421":
            self.sock.shutdown(socket.SHUT_WR)
            self.silent()
        return what[:1] if isinstance(what, str) else what[:1].decode()

    def silent(self) -> None:
        while self.sock.recv(65536):
            pass
        raise EOFError

    def more(self) -> None:
        octets = self.sock.recv(65536)
        if not octets:
            raise EOFError
        self.unread += octets

    def line(self) -> str:
        while b"\r\n" not in self.unread:
            self.more()
        line, _, self.unread = self.unread.partition(b"\r\n")
        return line.decode("utf-8", "replace")

    def text(self) -> None:
        octets = bytearray()
        if "TEXT" in self.peer.says:
            self.more()
            self.say("TEXT")
        while not (octets.startswith(b".\r\n") or octets.find(b"\r\n.\r\n", max(len(octets) - 65540, 0)) >= 0):
            if not self.unread:
                self.more()
            octets += self.unread
            self.unread = b""
        end = 0 if octets.startswith(b".\r\n") else octets.find(b"\r\n.\r\n") + 2
        octets, self.unread = bytes(octets[:end]), bytes(octets[end + 3 :])
        with self.peer.lock:
            self.peer.now += 1
            self.peer.most = max(self.peer.most, self.peer.now)
            self.mail = ReceivedMail(self.sender, self.recipients, octets, self) if octets else None
            if octets:
                self.peer.mails.append(self.mail)
                self.peer.tries.update(self.mail.recipients)
            else:
                self.peer.lone += 1
        try:
            self.say(".")
        finally:
            with self.peer.lock:
                self.peer.now -= 1

    def authenticate(self, line: str) -> str:
        mechanism, _, first = line[5:].partition(" ")
        if mechanism == "PLAIN":
            _, user, word = base64.b64decode(first or self.asked(b"")).decode().split("\0")
            right = self.peer.logins.get(user) == word
        elif mechanism == "LOGIN":
            user = base64.b64decode(first or self.asked(b"Username:")).decode()
            right = self.peer.logins.get(user) == base64.b64decode(self.asked(b"Password:")).decode()
        elif mechanism in ("XOAUTH2", "OAUTHBEARER"):
            fields = base64.b64decode(first or self.asked(b"")).decode().split("\1")
            user = fields[0].partition("=")[2].rstrip(",").replace("=2C", ",").replace("=3D", "=")
            token = next(item[12:] for item in fields if item.startswith("auth=Bearer "))
            right = self.peer.logins.get(user) == token
            if not right:
                self.peer.answers.append(self.asked(json.dumps({"status": "401", "told": token}).encode()))
        else:
            challenge = b"<17.1@peer.example>"
            user, digest = base64.b64decode(self.asked(challenge)).decode().split(" ")
            word = self.peer.logins.get(user, "").encode()
            right = hmac.new(word, challenge, hashlib.md5).hexdigest() == digest
        self.user = user if right else None
        return "235 2.7.0 welcome" if right else "535 5.7.8 who are you?"

    def asked(self, challenge: bytes) -> str:
        self.sock.sendall(b"334 " + base64.b64encode(challenge) + b"\r\n")
        return self.line()


class HttpClient:
    """A client's connection to an HTTP server: octets out, answers in."""

    def __init__(self, place, context: ssl.SSLContext | None = None) -> None:
        family = socket.AF_UNIX if isinstance(place, str) else socket.AF_INET6 if ":" in place[0] else socket.AF_INET
        self.sock = socket.socket(family)
        self.sock.settimeout(20)
        try:
            self.sock.connect(place)
        except OSError:
            self.sock.close()
            raise
        if context:
            self.sock = context.wrap_socket(self.sock, server_hostname="localhost")
        self.unread = b""

    def send(self, octets) -> HttpClient:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the answer may still be read
            self.sock.sendall(octets if isinstance(octets, bytes) else octets.encode())
        return self

    def more(self) -> bool:
        octets = self.sock.recv(65536)
        self.unread += octets
        return bool(octets)

    def head(self) -> tuple:
        """(status, headers) of the next answer."""
        while b"\r\n\r\n" not in self.unread:
            if not self.more():
                raise EOFError(self.unread)
        head, _, self.unread = self.unread.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        return int(first.split(" ")[1]), dict(line.split(": ", 1) for line in lines)

    def answer(self, method: str = "") -> tuple:
        """(status, headers, body as JSON or text) of the next answer."""
        status, headers = self.head()
        length = 0 if method == "HEAD" or status in (100, 204) else int(headers["Content-Length"])
        while len(self.unread) < length:
            if not self.more():
                raise EOFError(self.unread)
        body, self.unread = self.unread[:length].decode(), self.unread[length:]
        return status, headers, json.loads(body) if "json" in headers.get("Content-Type", "") and body else body

    def ask(self, octets, method: str = "") -> tuple:
        return self.send(octets).answer(method)

    def ended(self) -> bool:
        """True when the server has closed and nothing is unread; waits for it."""
        try:
            return not self.more() and not self.unread
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def post(submission=None, *headers: str, path: str = "/submit", version: str = "1.1") -> bytes:
    """The octets of a POST."""
    body = as_body(document() if submission is None else submission)
    lines = [f"POST {path} HTTP/{version}", "Host: x", *headers, f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def get(path: str, *headers: str, method: str = "GET", version: str = "1.1", host: str = "x") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", f"Host: {host}", *headers]).encode("latin-1") + b"\r\n\r\n"


def environment(**changes: str) -> dict:
    """For a process: as here, without what would lead it to other settings."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("HAINEKO")}
    return {**found, "PYTHONDONTWRITEBYTECODE": "1", **changes}


def run_program(*words: str, given=None, **more) -> subprocess.CompletedProcess:
    """Run haineko.py with these words and wait for it; `more` goes to subprocess.run."""
    more = {"env": environment(), "capture_output": True, "timeout": 30, **more}
    more.update({"stdin": subprocess.DEVNULL} if given is None else {"input": given})
    return subprocess.run([sys.executable, LAUNCHER, *words], check=False, **more)


def run_here(*words: str, given: bytes | str = b"", **variables: str) -> tuple:
    """(exit code, stdout, stderr) of a command, run in this process: many times faster."""
    out, err, before, quiet = io.StringIO(), io.StringIO(), dict(os.environ), haineko.log.quiet
    with tempfile.TemporaryFile() as file, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        file.write(given if isinstance(given, bytes) else given.encode())
        file.seek(0)
        stdin = os.dup(0)
        os.dup2(file.fileno(), 0)
        os.environ.update(variables)
        try:
            code = haineko.main(list(words))
        except SystemExit as ended:  # of argparse
            code = ended.code
        finally:
            os.dup2(stdin, 0)
            os.close(stdin)
            os.environ.clear()
            os.environ.update(before)
            haineko.log.quiet = quiet
    return code, out.getvalue(), err.getvalue()


def scrypt_line(password: str) -> str:
    """The line that `haineko.py pw` prints for a password."""
    return json.loads("{" + run_here("pw", given=f"{password}\n")[1] + "}").popitem()[1]


def can_run(program: str, **more) -> bool:
    """Whether a program starts, as another user, for instance."""
    try:
        return subprocess.run([program, "-c", ""], check=False, **more).returncode == 0
    except OSError:
        return False


class Server:
    """A real `haineko.py serve` with settings in a folder of its own; without settings where they are None."""

    COMMAND = (LAUNCHER,)

    def __init__(self, force: dict | None, *options: str, before=None) -> None:
        self.temporary = tempfile.TemporaryDirectory(prefix="haineko-test-")
        self.folder = self.temporary.name
        self.path = os.path.join(self.folder, "haineko.json")
        if force is not None:
            self.write(force)
            options = ("-c", self.path, *options)
        self.output = open(os.path.join(self.folder, "log"), "w+b")  # noqa: SIM115 -- as long as the server runs
        self.options, self.before = options, before  # `before` is called in the new process
        self.start()

    def start(self) -> None:
        seen = len(self.log())
        self.process = subprocess.Popen(
            [sys.executable, *self.COMMAND, "serve", *self.options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.output,
            cwd=self.folder,
            env=environment(),
            preexec_fn=self.before,  # noqa: PLW1509 -- no thread runs yet
            start_new_session=True,
        )
        try:
            ready = re.compile(r" listens at .*\n")  # the whole line
            eventually(lambda: self.process.poll() is not None or ready.search(self.log()[seen:]), "a server", 20)
        except AssertionError:
            self.close()
            raise
        found = re.search(r" listens at (.*)\n", self.log()[seen:])
        self.urls = found[1].split() if found else []
        self.places = [place_of(url) for url in self.urls]

    def write(self, force: dict) -> None:
        """New settings, put there whole as careful administrators do."""
        sections = {**DEFAULTS, **{name: section for name, section in force.items() if section is not None}}
        sections["httpd"] = {"listen": "127.0.0.1:0", "workers": 1, "timeout": 5, **force.get("httpd", {})}
        aside = self.path + ".new"
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
            json.dump(sections, stream)
        os.rename(aside, self.path)

    def log(self) -> str:
        return os.pread(self.output.fileno(), 1 << 24, 0).decode()

    def wire(self, i: int = 0, context: ssl.SSLContext | None = None) -> HttpClient:
        return HttpClient(self.places[i], context)

    def ask(self, octets, method: str = "", i: int = 0) -> tuple:
        """The answer to one request on a connection of its own."""
        with self.wire(i) as wire:
            return wire.ask(octets, method)

    def workers(self) -> set:
        """Process ids of its workers."""
        table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        pairs = [line.split() for line in table.splitlines()]
        return {int(pid) for pid, parent in pairs if parent == str(self.process.pid)}

    def stop(self) -> int:
        """Exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(10)

    def submit(self, *recipients, headers=None, sender="kijitora@example.org", **more) -> tuple:
        """(status, headers, document) of a mail without header fields of its own."""
        whole = {"mail": sender, "rcpt": list(recipients), "header": {"subject": "cats"}, "body": "Nyaa", **more}
        return self.ask(post(whole, *(f"{name}: {value}" for name, value in (headers or {}).items())))

    def get(self, path: str, *headers: str) -> tuple:
        """(status, document) of a page."""
        return self.ask(get(path, *headers))[::2]

    def fate(self, queueid: str) -> dict:
        """{recipient: its item} of a mail in the queue."""
        status, found = self.get(f"/queue/{queueid}")
        return {item["rcpt"]: item for item in found["response"]} if status == 200 else {}

    def idle(self) -> bool:
        """Whether the queue is empty."""
        found = self.get("/queue")[1]  # one look: between two, what was sent may have come to wait
        return found["waiting"] == found["sending"] == 0

    def queue(self, *words: str) -> subprocess.CompletedProcess:
        """The command `queue` with these settings."""
        return run_program("queue", *words, "-c", self.path, text=True)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        self.stop()
        self.kill()
        self.output.close()
        self.temporary.cleanup()


def served(test: unittest.TestCase, *values, kind=Server, **more) -> Server:
    """A Server that ends with the test."""
    server = kind(*values, **more)
    test.addCleanup(server.close)
    return server


def served_after(test: unittest.TestCase, setup: str, *values) -> Server:
    """The same, whose process runs these statements first."""
    script = f"import os, sys; sys.path.insert(0, os.path.dirname(sys.argv[1]))\n{setup}\n"
    script += "import haineko; sys.exit(haineko.main(sys.argv[2:]))"
    return served(test, *values, kind=type("ServerAfter", (Server,), {"COMMAND": ("-c", script, LAUNCHER)}))


def place_of(url: str):
    """Where to connect to."""
    if url.startswith("unix:"):
        return url[5:]
    host, _, port = url.split("/")[2].rpartition(":")
    return host.strip("[]"), int(port)


class Peers(Quiet):
    """A test with next hops."""

    def peer(self, says: dict | None = None, *offers: str, **more) -> SmtpPeer:
        found = SmtpPeer(says, **{"offers": offers, **more})
        self.addCleanup(found.close)
        return found


TEXT = b"From: kijitora@example.org\r\nTo: a@example.jp, b@example.jp, c@example.jp\r\nSubject: Nya\r\n\r\nMeow.\r\n"
TO = ("a@example.jp", "b@example.jp", "c@example.jp")


def job(
    hop: SmtpPeer | haineko.Route, to: tuple = TO[:1], text=TEXT, eight: bool = False, hostname: str = NAME, **route
) -> haineko.Transaction:
    """Mail for a peer, where the timeout is that of a step, or by a route; the text is octets or a Message."""
    if isinstance(hop, SmtpPeer):
        hop = haineko.Route(**{"host": hop.host, "port": hop.port, "timeout": 1.0, **route})
    message = text if isinstance(text, haineko.Message) else haineko.Message((text,), eight)
    return haineko.Transaction(hop, hostname, "Q" * 16, "kijitora@example.org", tuple(to), message)


def carried(*jobs: haineko.Transaction) -> list:
    """The replies to each job, one after the other with the same sessions, which are closed at the end."""
    return side_by_side(jobs)[0][0]


def side_by_side(*groups: tuple) -> list:
    """For each group of jobs, of which one follows the other: (their replies, seconds until they were there)."""
    found: dict = {}

    async def one(i: int, jobs: tuple) -> None:
        began, sessions = time.monotonic(), haineko.TransportContext(("127.0.0.1:9",))  # where no name server is
        replies = [(await haineko.attempt_transaction(item, sessions)).replies for item in jobs]
        found[i] = replies, time.monotonic() - began
        await sessions.sweep(everything=True)

    haineko.run(together(*[one(i, jobs) for i, jobs in enumerate(groups)]))
    return [found[i] for i in range(len(groups))]


def refuses(**by_name: str):
    """What an SmtpPeer says to RCPT: the reply of the recipient's local part, else a 250."""
    return lambda connection, line: by_name.get(line[9:10], USUAL["RCPT"])


def held(gate: threading.Event | threading.Barrier):
    """What an SmtpPeer says to the end of a text: a 250, when the gate opens."""

    def say(connection: SmtpConnection, line: str) -> str:
        gate.wait(8)
        return USUAL["."]

    return say


def sockets_open() -> int:
    """Number of this process's sockets; 0 where the system has no list."""
    gc.collect()
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        return 0
    return sum(_links_to_socket(name) for name in names)


def _links_to_socket(name: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    except OSError:
        return False


# ======================================================================================================================
# 9. Event loop
# ======================================================================================================================


class CountingSelector(selectors.SelectSelector):
    """Selector that counts how often it was asked to do something."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter = collections.Counter()

    def register(self, *values):
        self.calls["register"] += 1
        return super().register(*values)

    def modify(self, *values):
        self.calls["modify"] += 1
        return super().modify(*values)

    def unregister(self, *values):
        self.calls["unregister"] += 1
        return super().unregister(*values)

    def select(self, *values):
        self.calls["select"] += 1
        return super().select(*values)


class AsyncSockets(Quiet):
    """AsyncSocket and EventLoop, with the selector of the system and with select()."""

    def on_each(self, story) -> None:
        """Runs the coroutine function with each selector; it may take 20 seconds."""
        for selector in (selectors.DefaultSelector, selectors.SelectSelector):
            with self.subTest(selector.__name__):
                loop = haineko.EventLoop(selector())
                try:
                    loop.run_until_complete(asyncio.wait_for(story(), 20))
                finally:
                    loop.close()

    def pair(self) -> tuple:
        """(AsyncSocket, a non-blocking socket at its other end)."""
        here, there = socket.socketpair()
        for sock in (here, there):
            sock.setblocking(False)
            self.addCleanup(sock.close)
        return haineko.AsyncSocket(here), there

    def test_a_wait_ends_at_its_deadline_and_the_socket_is_waited_for_again(self) -> None:
        async def one(here, there, seconds: float) -> float:
            began = time.monotonic()
            with self.assertRaises(socket.timeout):
                await here.recv(1, began + seconds)
            late = time.monotonic() - began - seconds
            there.send(b"x")
            self.assertEqual(await here.recv(1, time.monotonic() + 1), b"x")
            return late

        async def story() -> None:
            lates = [1.0]
            while len(lates) < 9 and min(lates) >= 0.03:  # a busy machine may be late
                found = await asyncio.gather(*[one(*self.pair(), seconds) for seconds in (0.1, 0.03, 0.06)])
                self.assertGreaterEqual(min(found), -0.002)
                lates.append(max(found))
            self.assertLess(min(lates), 0.03)

        self.on_each(story)

    def test_a_later_wait_may_have_a_sooner_or_a_later_deadline(self) -> None:
        async def story() -> None:
            here, there = self.pair()
            for first, second in ((2, 0.05), (0.3, 0.4), (float("inf"), 0.05)):
                with self.assertRaises(socket.timeout):
                    await here.recv(1, time.monotonic() - 1)
                asyncio.get_running_loop().call_later(0.01, there.send, b"y")
                self.assertEqual(await here.recv(1, time.monotonic() + first), b"y")
                began = time.monotonic()
                with self.assertRaises(socket.timeout):
                    await here.recv(1, began + second)
                self.assertTrue(second - 0.002 <= time.monotonic() - began < 1.5, (first, second))

        self.on_each(story)

    def test_waits_leave_the_selector_alone_and_idle_ones_cost_nothing(self) -> None:
        selector = CountingSelector()
        loop = haineko.EventLoop(selector)

        async def story() -> None:
            pairs = [self.pair() for _ in range(100)]
            before = dict(selector.calls)
            idle = [asyncio.ensure_future(here.recv(1, time.monotonic() + 60)) for here, _ in pairs[1:]]
            here, there = pairs[0]
            for _ in range(50):
                loop.call_soon(there.send, b"x")
                await here.recv(1, time.monotonic() + 60)
            self.assertEqual(selector.calls["register"] - before.get("register", 0), 100)
            self.assertEqual((selector.calls["modify"], selector.calls["unregister"]), (0, 0))
            turns = selector.calls["select"]
            await asyncio.sleep(0.2)
            self.assertLess(selector.calls["select"] - turns, 5)
            for each in [here for here, _ in pairs]:
                each.close()
            await asyncio.wait(idle)
            self.assertEqual(selector.calls["unregister"], 100)
            self.assertEqual({type(each.exception()) for each in idle}, {ConnectionAbortedError})

        loop.run_until_complete(asyncio.wait_for(story(), 5))
        loop.close()

    def test_what_comes_while_nobody_waits_is_not_lost_and_does_not_spin(self) -> None:
        selector = CountingSelector()
        loop = haineko.EventLoop(selector)

        async def story() -> None:
            here, there = self.pair()
            loop.call_soon(there.send, b"a")
            self.assertEqual(await here.recv(1, time.monotonic() + 1), b"a")
            there.send(b"bc")
            turns = selector.calls["select"]
            await asyncio.sleep(0.1)
            self.assertLess(selector.calls["select"] - turns, 5)
            self.assertEqual(await here.recv(1, time.monotonic() + 1), b"b")
            self.assertEqual(await here.recv(1, time.monotonic() + 1), b"c")
            loop.call_later(0.01, there.send, b"d")
            self.assertEqual(await here.recv(1, time.monotonic() + 1), b"d")

        loop.run_until_complete(asyncio.wait_for(story(), 5))
        loop.close()

    def test_cancelled_or_closed(self) -> None:
        async def story() -> None:
            here, there = self.pair()
            task = asyncio.ensure_future(here.recv(1, time.monotonic() + 9))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            there.send(b"x")
            self.assertEqual(await here.recv(1, time.monotonic() + 9), b"x")  # a wait that was cancelled took nothing
            self.assertFalse(here.abort(ConnectionAbortedError("nobody waits")))
            task = asyncio.ensure_future(here.recv(1, time.monotonic() + 9))
            await asyncio.sleep(0)
            number = here.sock.fileno()
            here.close()
            here.close()
            with self.assertRaises(ConnectionAbortedError):
                await task
            with self.assertRaises((OSError, ValueError)):
                await here.wait_ready(time.monotonic() + 9)
            again, there = self.pair()  # the same file descriptor is another connection
            self.assertEqual(again.sock.fileno(), number)
            asyncio.get_running_loop().call_later(0.01, there.send, b"y")
            self.assertEqual(await again.recv(1, time.monotonic() + 9), b"y")

        self.on_each(story)

    def test_more_than_a_buffer_is_sent_while_the_other_side_talks(self) -> None:
        octets = os.urandom(1 << 16) * 64

        async def story() -> None:
            here, there = self.pair()
            far, found = haineko.AsyncSocket(there), bytearray()
            there.send(b"not read yet")
            task = asyncio.ensure_future(here.sendall(octets, time.monotonic() + 5))
            while len(found) < len(octets):
                found += await far.recv(1 << 18, time.monotonic() + 5)
                await asyncio.sleep(0.001)
            await task
            self.assertEqual(found, octets)
            with self.assertRaises(socket.timeout):
                await here.sendall(octets, time.monotonic() + 0.05)
            far.close()
            with self.assertRaises(ConnectionError):
                await here.sendall(octets, time.monotonic() + 1)

        self.on_each(story)

    def test_sends_of_one_iteration_leave_together_behind_the_log(self) -> None:
        async def story() -> None:
            for count in (1, 40):
                pairs = [self.pair() for _ in range(count)]
                haineko.log.start_buffering()
                haineko.log.lines("told before")
                tasks = [asyncio.ensure_future(here.sendall(b"x", time.monotonic() + 1)) for here, _ in pairs]
                await asyncio.sleep(0)
                left = sum(bool(select.select([there], [], [], 0)[0]) for _, there in pairs)
                self.assertEqual((left, len(haineko.log.buffer)), (0, 1))
                await asyncio.wait(tasks)
                self.assertEqual([there.recv(9) for _, there in pairs], [b"x"] * count)
                self.assertFalse(haineko.log.buffer)

        self.addCleanup(setattr, haineko.log, "held", None)
        self.on_each(story)

    def test_lines_are_written_without_a_send_from_any_thread(self) -> None:
        async def story() -> None:
            haineko.log.start_buffering(asyncio.get_running_loop())
            haineko.log.lines("from the loop")
            await asyncio.sleep(0.01)
            self.assertEqual(haineko.log.buffer, [])
            await asyncio.to_thread(haineko.log.lines, "from a thread")
            await asyncio.sleep(0.01)
            self.assertEqual(haineko.log.buffer, [])

        self.addCleanup(setattr, haineko.log, "loop", None)
        self.addCleanup(setattr, haineko.log, "held", None)
        self.on_each(story)
        self.assertEqual([line.rpartition(": ")[2] for line in self.logged()], ["from the loop", "from a thread"] * 2)

    def test_tls(self) -> None:
        pem, octets = certificate(), os.urandom(1 << 16) * 16
        server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=pem)
        server.load_cert_chain(pem)

        async def story() -> None:
            (here, there), deadline = self.pair(), time.monotonic() + 5
            here.sock = client.wrap_socket(here.sock, server_hostname="localhost", do_handshake_on_connect=False)
            far = haineko.AsyncSocket(server.wrap_socket(there, server_side=True, do_handshake_on_connect=False))
            await asyncio.gather(*[each.call(each.sock.do_handshake, deadline) for each in (here, far)])
            task, found = asyncio.ensure_future(far.sendall(octets, deadline)), bytearray()
            while len(found) < len(octets):
                found += await here.recv(5000, deadline)
            await task
            self.assertEqual(found, octets)
            with self.assertRaises(socket.timeout):
                await here.recv(1, time.monotonic() + 0.02)
            here.close()
            far.close()

        self.on_each(story)

    def test_a_thread_s_exception_is_raised_and_a_task_s_is_logged(self) -> None:
        async def fails() -> None:
            raise KeyError("a fault of our own")

        async def story() -> None:
            with self.assertRaises(ValueError):
                await asyncio.gather(asyncio.to_thread(int, "no number"), asyncio.sleep(0.01))
            asyncio.get_running_loop().create_task(fails())
            await asyncio.sleep(0.01)
            gc.collect()
            self.assertIn("a fault of our own", self.logged()[-1])

        self.on_each(story)

    def test_run_leaves_no_file_open(self) -> None:
        before = sockets_open()
        self.assertEqual(haineko.run(asyncio.sleep(0, "result")), "result")
        with self.assertRaises(ZeroDivisionError):
            haineko.run(asyncio.to_thread(divmod, 1, 0))
        self.assertEqual(sockets_open(), before)


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


def wire_name(name: str) -> bytes:
    return b"".join(bytes((len(label),)) + label.encode() for label in name.split(".") if label) + b"\0"


def wire_record(name: str, kind: int, value, ttl: int = 60) -> bytes:
    if kind in (haineko.A, haineko.AAAA):
        data = socket.inet_pton(socket.AF_INET if kind == haineko.A else socket.AF_INET6, value)
    elif kind == haineko.MX:
        data = struct.pack(">H", value[0]) + wire_name(value[1])
    elif kind == haineko.CNAME:
        data = wire_name(value)
    elif kind == 6:
        data = wire_name("ns." + name) + wire_name("root." + name) + struct.pack(">5I", 1, 2, 3, 4, value)
    elif kind == haineko.TXT:
        text = value.encode()
        data = b"".join(bytes((len(text[i : i + 255]),)) + text[i : i + 255] for i in range(0, len(text) or 1, 255))
    else:
        data = value
    return wire_name(name) + struct.pack(">HHIH", kind, 1, ttl, len(data)) + data


TEST_RSA_KEY = """\
-----BEGIN PRIVATE KEY-----
MIIEvAIBADANBgkqhkiG9w0BAQEFAASCBKYwggSiAgEAAoIBAQC8JWN5ilPbe05M
vMesW1bbm7V3SuZiEpLpktz6Hc2wKXVy2xPzSGi8DvaJ4hsFoQsy5VUXl9GGNNml
oyVRmjn2k1fLt0J2C4gt+jPtRc2vdkD7Kt5kFfj8gEhTXgnLl+TJGb9E0NoAl1JU
V6jy0oJeIK/x6qFi3Db+UEs14RWI+Uxeg+gs1ujbi2+M47wcP+zPDS50ylZKf0xW
l4/KbsN/c/rLTilYkF1iPJaf/KMJ+aII0/4nH09W9QYUOkVRkHYIWMeDdy3pME2z
I9m3k1QiQja1ek2/HjNkz7ZS/5PO5HakOziNetUhG/fi9GPOMr0oTsxhWNFrqFhs
bLlSPgjLAgMBAAECggEAD7L8+GzK74L79xo/fQnIFx4Ih9I3pBJRsOzAxJwNCDiF
ZNaT9RZjKuICv2GfCJq2AQKy1XulD5JEYPZajFMWqBUGW+jIQmpW7CM3BwLulUgE
RxD+KpLMymD36ADuR08+12rvE1JsBmWaCJCh99UJ7MnEdKaz3bhrXFAd3nqQHfQu
gw+qhPyNLq+VWGRAAH+ref7+VrNF/0p1uEMHmUC82g8gezE3LXIUpz7aI87q6XBT
fQqtJuW5z2XE8DotOH3sQ/qy16IC581vz8dyinoJ5XiPwzT0A7VBcPBM24M49bWO
S58iPrpUxJ1Zc54a0KgPocnPseTl63vVZOmEFkr31QKBgQD2vxUI5WwBOD9PzSJr
m3Ujr6mlLMPCxwlzxtFBQ7GOvy7Sj4Nee/s0nEnbl3//YYTUss5hfDI35cw2kl2Z
edYmO5ZhfSrqxiV/WH+gQMyHJxOCO7SrAE8MKJuaaXTCJPZffqQCiWhdrYrY82+K
+pZeoMOqSk6zyST1VMBbZZEkpwKBgQDDM7Tsxw0tGR1bFh8oQVQLTynYpQn7/5ap
aPRauz+HttaU5XVvGXma17ayk2dIMOgbeVvDZwdeH+8k2TvwdqczIZBW+1+wJqd8
WZl3PO9G6BueFhKKQRokQN+ku9M3rHsLvUsZL2r9wxj+ftAIYICGa/MVXtjgaH/V
wDTUF0XrPQKBgBkuJtdhkkQNmWhrZrfUhX++zXEtwEyAQ1atU211mwkWOZEDVESw
IlKcIG1oaIeHTCbomGcaZYWOzehDx4mCBXihXBdWzqpmzizQuzV/Z1/jfPotXaKV
xXtYKYj4ehHV886K/fHEVAI7U5AQR7HHINFHVrBqJN30CPGAVKD/HHDBAoGAJx9i
4J3YbzR8ZLgfUIMfZBDeszQItz/3o0aMyu6CgiHMChWfHsA9ViJr1Iikh5x9uJvv
H0+z81J1LK55S+2L/zx34GcLO5PTt6GBl5tX3Z9BgcKsvpbjtWZnLG4UnDDujGDI
/2g4ilmi1cb2zOcCe26BTsQutXNcQ6v9KpDri4UCgYBRDLW2pufyguBzuB2kovtA
Ix/pQgRr3opUf1fq/j3ruOIZJizWcr0GvKnG26pRLfI2FVK2KoxtB0zOUV/DfghU
5W/jr6kcqWifx9gzNXI3eg6kALJtgbbi6G4juSHozKPlXFfP/aWm37nIRizhvOl7
olOJQv2bJyX/du1Pd5qPVg==
-----END PRIVATE KEY-----
"""
RFC8463_KEY = """-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g
-----END PRIVATE KEY-----
"""


class Question:
    """A query as a name server reads it."""

    def __init__(self, octets: bytes) -> None:
        self.octets, at, labels = octets, 12, []
        self.number, self.flags, *_ = struct.unpack_from(">6H", octets)
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
        soa = (wire_record("example", 6, 30),)
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


class WithCertificates(unittest.TestCase):
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


def mail_to(*recipients: str, hostname: str = "relay.example.org", **route) -> haineko.Transaction:
    """A shared message for MX by that route."""
    found = haineko.Route(**{"mailer": "MX", "private": True, "timeout": 2, **route})
    return job(found, recipients, b"Subject: Nyaaaa\r\n\r\nMeow.\r\n", hostname=hostname)


def brief(said: haineko.Reply) -> tuple:
    return said.code, said.dsn, said.command, said.host


def outside_address() -> str:
    """An address of this machine that is not loopback, "" where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))
            found = sock.getsockname()[0]
        except OSError:
            return ""
    return "" if found.startswith(("127.", "0.")) else found


class Asked:
    """One request as a web peer got it."""

    def __init__(self, head: bytes, body: bytes, line: int) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        self.method, self.path, _ = first.split(" ")
        self.headers = {name.lower(): value.strip() for name, _, value in (text.partition(":") for text in lines)}
        self.names = [text.partition(":")[0].lower() for text in lines]
        self.body, self.line = body, line  # line: number of the connection

    def json(self) -> dict:
        return json.loads(self.body)


class HttpPeer:
    """An HTTP server on a free port. `answer(asked)` gives (status, document or octets, headers), octets for the
    wire, or a word: "hang" says nothing, "close" hangs up, "drip" sends an octet now and then."""

    def __init__(self, answer, tls: ssl.SSLContext | None = None) -> None:
        self.answer, self.tls, self.asked, self.lines = answer, tls, [], 0
        self.open: set = set()
        self.over = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.hang_up()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(5)

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def hang_up(self) -> None:
        for sock in list(self.open):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.lines += 1
            threading.Thread(target=self._serve, args=(sock, self.lines), daemon=True).start()

    def _serve(self, sock, number: int) -> None:
        self.open.add(sock)
        try:
            if self.tls:
                self.open.discard(sock)
                sock = self.tls.wrap_socket(sock, server_side=True)
                self.open.add(sock)
            stream = sock.makefile("rb")
            while self._one(sock, stream, number):
                pass
        except (OSError, ValueError):
            pass
        finally:
            self.open.discard(sock)
            sock.close()

    def _one(self, sock, stream, number: int) -> bool:
        head = b"".join(iter(lambda: self._line(stream), b""))
        if not head:
            return False
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        asked = Asked(head.rstrip(b"\r\n"), stream.read(int(length[1]) if length else 0), number)
        self.asked.append(asked)
        said = self.answer(asked)
        if said == "hang":
            self.over.wait(10)
            return False
        if said == "drip":
            sock.sendall(b"HTTP/1.1 200 OK\r\n")
            while not self.over.wait(0.2):
                sock.sendall(b"X: ")
            return False
        if isinstance(said, tuple):
            said = on_the_wire(*said)
        if said == "close":
            return False
        sock.sendall(said)
        return b"connection: close" not in said.lower() and asked.headers.get("connection") != "close"

    @staticmethod
    def _line(stream) -> bytes:
        line = stream.readline()
        return b"" if line == b"\r\n" else line


def on_the_wire(status: int, document=b"", headers=()) -> bytes:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    lines = [f"HTTP/1.1 {status} {'OK' if status < 300 else 'Because'}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def web_settings(route: dict, **sections) -> haineko.Settings:
    """Settings with that route for everything, and the login `key`."""
    logins = {"key": {"username": KEY, "password": SECRET, "oauth2": {"access_token": SECRET}}}
    table = {"default": route}
    return settings(**{"smtpd": {"hostname": "here.example"}, "authinfo": logins, "mailertable": table, **sections})


def web_route(mailer: str, url: str = "", **more) -> haineko.Route:
    more = {
        "base_url": url,
        "auth": "key",
        "timeout": 1,
        **({"region": "eu-west-1"} if mailer == "AmazonSES" else {}),
        **more,
    }
    return web_settings(
        {"mailer": mailer, **{key: value for key, value in more.items() if value not in ("", None)}}
    ).mailertable["default"]


def with_wrong_login(route: haineko.Route) -> haineko.Route:
    oauth2 = route.oauth2 and replace(route.oauth2, access_token="wrong")
    return replace(route, credentials=(KEY, "wrong"), oauth2=oauth2)


def web_submission(**changes) -> dict:
    header = {
        "from": "キジトラ <kijitora@example.com>",
        "subject": "謹賀新年",
        "replyto": "straycats@cat-ml.example.org",
    }
    header.update(changes.pop("header", {}))
    whole = {
        "ehlo": "cat.example",
        "mail": "kijitora@example.org",
        "rcpt": ["mikeneko@example.jp"],
        "body": "にゃあ\nNyaa\n",
    }
    return {**whole, "header": header, **changes}


def composed_job(route: haineko.Route, document: dict | None = None, number: int = 1) -> haineko.Transaction:
    """The job of a submission's first recipient."""
    submission, faults, _ = haineko.parse_submission(json.dumps(document or web_submission()).encode())
    assert not faults, faults
    client = haineko.parse_ip("192.0.2.9")
    message = haineko.compose(submission, "Q" * 16, client, "here.example", 1700000000.0)
    return haineko.Transaction(route, "here.example", "Q" * 16, submission.mail, (submission.rcpt[0],), message, number)


def raw_job(route: haineko.Route, octets, to=("mikeneko@example.jp",), eight: bool = False) -> haineko.Transaction:
    """A finished message, with LF or CRLF, by that route."""
    octets = octets.encode() if isinstance(octets, str) else octets
    octets = octets.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    return job(route, to, octets, eight, hostname="here.example")


def relayed(job: haineko.Transaction, times: int = 1, between=lambda: None) -> list:
    """The replies of each time, by one pool of sessions."""

    async def all_times() -> list:
        sessions, outcomes = haineko.TransportContext(), []
        for i in range(times):
            if i:
                between()
            outcomes.append((await haineko.attempt_transaction(job, sessions)).replies)
        await sessions.sweep(everything=True)
        assert not sessions.http.idle
        return outcomes

    return haineko.run(all_times())


def first_reply(job: haineko.Transaction) -> haineko.Reply:
    return relayed(job)[0][0]


KEY, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
HOOK_SECRET = b"0123456789abcdef0123456789abcdef"
WHSEC = "whsec_" + base64.b64encode(HOOK_SECRET).decode()


def queue_settings(peer: SmtpPeer, **queue) -> dict:
    """Settings with a queue in the folder of the server, mail for that peer and for a host that is dead."""
    return {
        "smtpd": {"hostname": "mx.example.org", "max_rcpts_per_message": 0},
        "mailertable": {"default": {"port": peer.port, "timeout": 10}, "dead.example": {"port": 1}},
        "queue": {"path": "haineko.db", "retry_after": [1], "min_free": 0, **queue},
    }


def queue_peer(script=None) -> SmtpPeer:
    """A next hop that refuses never@...; script(recipient, count of its tries) says the reply to a text."""

    def reply(connection: SmtpConnection, line: str):
        if not connection.recipients:
            return "554 5.5.1 no recipient"
        (to,) = connection.mail.recipients
        found = (script or by_name)(to, connection.peer.tries[to])
        if isinstance(found, threading.Event):
            found.wait(20)
            return "250 2.0.0 Ok at last"
        return found

    refusal = "550 5.1.1 no such cat"
    return SmtpPeer(
        {".": reply, "RCPT": lambda connection, line: refusal if "<never" in line else None}, ("PIPELINING",)
    )


def webhook() -> HttpPeer:
    """A webhook; its first request gets a 500."""
    hook = HttpPeer(lambda asked: (500 if asked is hook.asked[0] else 204, b""))
    return hook


def by_name(recipient, count):
    """later3@... is refused for now three times; slow@... is left to wait."""
    found = re.match(r"later(\d+)", recipient)
    return f"451 4.2.0 not now, {count}" if found and count <= int(found[1]) else "250 2.0.0 Ok"


def esmtp(peer: SmtpPeer, **more) -> dict:
    """A route to that peer, as settings have it."""
    return {"mailer": "ESMTP", "host": peer.host, "port": peer.port, "timeout": 2, **more}


TOP = {"queueid", "addresser", "recipient", "response", "remoteaddr", "remoteport", "useragent", "referer", "timestamp"}


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def memory(pid: int, what: str) -> int:
    """Octets, by the kernel's count."""
    with open(f"/proc/{pid}/status", encoding="ascii") as stream:
        return int(re.search(rf"{what}:\s+(\d+) kB", stream.read())[1]) * 1024


# ======================================================================================================================
# House rules
# ======================================================================================================================


class House:
    """haineko.py, or another source, as its rules see it."""

    BANNER = re.compile(r"(?m)^# (\d+)\. (.+)\n((?:# .*\n)+)# ={10,}$")

    def __init__(self, source: str) -> None:
        self.source = source
        self.tree = ast.parse(source)
        self.symbols = symtable.symtable(source, "haineko.py", "exec")
        self.sections = [
            (source.count("\n", 0, found.start()) + 1, int(found[1]), found[2])
            for found in self.BANNER.finditer(source)
        ]
        self.names = {name: self.section(node.lineno) for node in self.tree.body for name in self._defined(node)}

    def section(self, line: int) -> int:
        """The number of the section in which the line stands; 0 is the front page."""
        return max((number for start, number, _ in self.sections if start <= line), default=0)

    @staticmethod
    def _defined(node: ast.AST) -> list:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            return [node.name]
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        return []

    def scopes(self) -> list:
        """Every symbol table below the module's."""
        found, waiting = [], list(self.symbols.get_children())
        while waiting:
            found.append(waiting.pop())
            waiting.extend(found[-1].get_children())
        return found

    def downward(self) -> list:
        """References from a section to a name that a later one defines."""
        return [
            f"section {self.section(scope.get_lineno())}: {scope.get_name()} refers to {name} of section {place}"
            for scope in self.scopes()
            for name in [symbol.get_name() for symbol in scope.get_symbols() if symbol.is_global()]
            for place in [self.names.get(name, 0)]
            if place > self.section(scope.get_lineno())
        ]

    def functions(self) -> list:
        return [node for node in ast.walk(self.tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]

    def lengths(self) -> dict:
        """{function: lines without its docstring}."""
        table = {}
        for node in self.functions():
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(getattr(first, "value", None), ast.Constant)
            doc = first.end_lineno - first.lineno + 1 if documented and isinstance(first.value.value, str) else 0
            table[f"{node.name}:{node.lineno}"] = node.end_lineno - node.lineno + 1 - doc
        return table

    def mutations(self) -> list:
        """Places in functions that change a value which a module-level name holds."""
        found = []
        values = {name for node in self.tree.body if not hasattr(node, "name") for name in self._defined(node)}
        for function in self.functions():
            local = {item.id for item in ast.walk(function) if isinstance(item, ast.Name) and not _loads(item)}
            local |= {item.arg for item in ast.walk(function) if isinstance(item, ast.arg)}
            for name, line in _changed(function):
                if name in values - local:
                    found.append(f"{function.name} changes {name} in line {line}")
        return found


def _loads(node: ast.AST) -> bool:
    return isinstance(node.ctx, ast.Load)


MUTATORS = {"append", "add", "insert", "extend", "update", "pop", "popitem", "clear", "remove", "discard", "setdefault"}


def _changed(function: ast.AST):
    """(name, line) of what is stored into, or told by a method to change."""
    for node in ast.walk(function):
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            yield from ((name, node.lineno) for name in node.names)
        place = node if isinstance(node, (ast.Attribute, ast.Subscript)) and not _loads(node) else None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            place = node.func
        while isinstance(place, (ast.Attribute, ast.Subscript)):
            place = place.value
        if isinstance(place, ast.Name):
            yield place.id, node.lineno


def superlinear(patterns: dict, uses: set) -> list:
    """The uses of patterns whose time grows faster than their input: strings of a pattern's own alphabet, and the
    starts of a match with one character behind, many times."""
    found = []
    for name, method in sorted(uses):
        pattern = patterns[name]
        source = pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode("latin-1")
        marks = re.sub(r"\\x..|[A-Za-z0-9\[\](){}|?*+^$]", "", source)[:12]
        alphabet = dict.fromkeys(marks + re.sub(r"\\.|[^A-Za-z]", "", source)[:4] + 'a0 \t\r\n"\\(<é')
        match = a_match(parser.parse(source, pattern.flags & ~re.UNICODE))
        shapes = [(a, b) for a in alphabet for b in alphabet]
        shapes += [(match[:i], b) for i in range(2, min(len(match), 40) + 1) for b in alphabet]
        if callable(getattr(pattern, method)) and any(_grows(pattern, method, *shape) for shape in shapes):
            found.append(f"{name}.{method}")
    return found


def a_match(tree) -> str:
    """A short string that the parsed pattern matches, or nearly."""
    text = ""
    for operator, value in tree:
        kind = str(operator)
        if kind in ("LITERAL", "NOT_LITERAL", "ANY"):
            text += chr(value) if kind == "LITERAL" else "a"
        elif kind == "IN":
            name, first = value[0]
            kinds = {
                "LITERAL": chr,
                "RANGE": lambda c: chr(c[0]),
                "CATEGORY": lambda c: " " if "SPACE" in str(c) else "0",
            }
            text += kinds.get(str(name), lambda _: "a")(first)
        elif "REPEAT" in kind:
            text += a_match(value[2]) * max(1, min(value[0], 40))
        elif kind in ("SUBPATTERN", "ATOMIC_GROUP"):
            text += a_match(value[-1] if kind == "SUBPATTERN" else value)
        elif kind == "BRANCH":
            text += a_match(value[1][0])
    return text


def _grows(pattern, method: str, first: str, second: str) -> bool:
    for text in (
        lambda n: (first + second) * (n // (len(first) + 1)) + first,
        *(lambda n, end=end: first + second * n + end for end in ("", "!", "\0")),
    ):
        if _seconds(pattern, method, text(2000)) > 0.002:
            once, more = (min(_seconds(pattern, method, text(size)) for _ in range(3)) for size in (2000, 8000))
            if more > 9 * once:
                return True
    return False


def _seconds(pattern, method: str, text: str) -> float:
    subject = text if isinstance(pattern.pattern, str) else text.encode("latin-1", "replace")
    began = time.process_time()
    result = getattr(pattern, method)(*((subject[:0], subject) if method == "sub" else (subject,)))
    collections.deque(result if method == "finditer" else (), 0)
    return time.process_time() - began


class HouseRules(unittest.TestCase):
    """The rules that the front page of haineko.py gives itself."""

    @classmethod
    def setUpClass(cls) -> None:
        with open(PROGRAM, encoding="utf-8") as stream:
            cls.house = House(stream.read())

    def test_sections_are_the_front_pages(self):
        found = re.findall(
            r"(?m)(?:^ {4,5}|  +)(\d+)  ([A-Z][\w ]+?)(?=  |$)", ast.get_docstring(self.house.tree, False)
        )
        listed = [title for _, title in sorted((int(number), title) for number, title in found)]
        self.assertEqual(listed, [title for _, _, title in self.house.sections])
        self.assertEqual([number for _, number, _ in self.house.sections], list(range(1, len(listed) + 1)))

    def test_sections_refer_up_only(self):
        self.assertEqual(self.house.downward(), [])
        self.assertGreater(len(self.house.names), 200)

    def test_the_rule_on_sections_sees_a_breach(self):
        banner = "# {}\n# {}. {}\n#    About.\n# {}\n".format("=" * 20, "{}", "{}", "=" * 20)
        for inner in ("return late()", "return [late(x) for x in y]", "late = 1\n    return late"):
            source = f"{banner.format(1, 'Up')}def early(y=()):\n    {inner}\n{banner.format(2, 'Down')}def late(): 1\n"
            with self.subTest(inner):
                self.assertEqual(len(House(source).downward()), 0 if "late = 1" in inner else 1)

    def test_functions_fit_a_screen(self):
        lengths = self.house.lengths()
        self.assertEqual({name: lines for name, lines in lengths.items() if lines > 40}, {})
        ranked = sorted(lengths.values())
        self.assertLess(ranked[len(ranked) * 9 // 10], 25)
        self.assertLessEqual(statistics.median(ranked), 10)

    def test_no_closure_deeper_than_a_decorators(self):
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)

        def depth(node):
            inner = max(map(depth, ast.iter_child_nodes(node)), default=0)
            return inner + isinstance(node, functions)

        deep = [node.name for node in self.house.tree.body if isinstance(node, functions) and depth(node) > 3]
        self.assertEqual(deep, [])

    def test_no_class_has_another_of_this_file_above_it(self):
        classes = [node for node in ast.walk(self.house.tree) if isinstance(node, ast.ClassDef)]
        bases = [(node.name, ast.unparse(base)) for node in classes for base in node.bases]
        self.assertEqual([(name, base) for name, base in bases if base in self.house.names], [])

    def test_nothing_changes_module_state_but_the_log_and_the_metrics(self):
        allowed = re.compile(" changes (?:log|metrics) ")
        self.assertEqual([line for line in self.house.mutations() if not allowed.search(line)], [])

    def test_the_rule_on_state_sees_a_breach(self):
        for line in ("T['a'] = 1", "T.update(a=1)", "T['a'].b = 1", "del T['a']", "global T"):
            with self.subTest(line):
                self.assertEqual(len(House(f"T = {{}}\ndef f():\n    {line}\n").mutations()), 1)

    def test_every_reply_is_given_and_every_given_reply_exists(self):
        [table] = [node for node in self.house.tree.body if "REPLIES" in self.house._defined(node)]
        rows = {id(node) for node in ast.walk(table)}
        given = {
            node.value for node in ast.walk(self.house.tree) if isinstance(node, ast.Constant) and id(node) not in rows
        }
        called = [
            node for node in ast.walk(self.house.tree) if getattr(getattr(node, "func", None), "id", "") == "make_reply"
        ]
        named = {node.args[0].value for node in called if isinstance(node.args[0], ast.Constant)}
        self.assertEqual((sorted(set(haineko.REPLIES) - given), sorted(named - set(haineko.REPLIES))), ([], []))

    def test_every_name_is_used(self):
        used = {node.id for node in ast.walk(self.house.tree) if isinstance(node, ast.Name) and _loads(node)}
        used |= {node.attr for node in ast.walk(self.house.tree) if isinstance(node, ast.Attribute)}
        noted = {
            word
            for node in ast.walk(self.house.tree)
            if isinstance(node, (ast.arg, ast.AnnAssign))
            for word in re.findall(r"\w+", ast.unparse(node.annotation) if node.annotation else "")
        }
        self.assertEqual(sorted(name for name in self.house.names if name not in used | noted | {"sign_jwt"}), [])

    def test_every_pattern_takes_linear_time(self):
        """Feed each pattern, as the file uses it, long strings of its own alphabet."""
        self.assertEqual(superlinear({"BAD": re.compile(r"b?[ ]*[ \t]*=")}, {("BAD", "match")}), ["BAD.match"])
        patterns = {name: item for name, item in vars(haineko).items() if isinstance(item, re.Pattern)}
        self.assertGreater(len(patterns), 20)
        uses = {
            (node.value.id, node.attr)
            for node in ast.walk(self.house.tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in patterns
        }
        self.assertEqual(superlinear(patterns, uses), [])

    def test_only_the_standard_library_is_imported(self):
        names = set()
        for node in ast.walk(self.house.tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.partition(".")[0])
        library = os.path.realpath(sysconfig.get_paths()["stdlib"])
        for name in sorted(names):
            origin = importlib.util.find_spec(name).origin or "built-in"
            with self.subTest(name, origin=origin):
                ours = os.path.realpath(origin).startswith(library + os.sep) and "-packages" not in origin
                self.assertTrue(origin in ("built-in", "frozen") or ours)

    def test_the_example_file_is_complete_and_valid(self):
        path = os.path.join(HERE, "haineko.json.example")
        with open(path, encoding="utf-8") as stream:
            written = stream.read()
        self.assertEqual(written, json.dumps(haineko.example_settings(), indent=2) + "\n")
        found, faults = haineko.load_settings(path)
        self.assertEqual(faults, [])
        self.assertEqual(set(json.loads(written)), set(haineko.key_table(haineko.Settings)))
        self.assertEqual(found.mailertable["default"].host, "smtp.example.org")
        self.assertEqual(list(found.mailertable), ["default"])

    def test_everything_stands_in_the_readme(self):
        readme = README
        sections = [haineko.Httpd, haineko.Tls, haineko.Smtpd, haineko.Syslog, haineko.Relayhosts, haineko.Recipients]
        sections += [haineko.Credentials, haineko.OAuth2, haineko.Route, haineko.Header, haineko.Submission]
        wanted = [f"`{name}" for name in (*haineko.COMMANDS, *haineko.RELAYS)]
        wanted += [f"`{method} {path}`" for method, path in haineko.ENDPOINTS]
        wanted += [text for _, _, _, _, text in haineko.REPLIES.values() if "%s" not in text]
        for cls in sections:
            prefix = "header." if cls is haineko.Header else ""
            for item in fields(cls):
                if "parse" in item.metadata:
                    first, *aliases = item.metadata["keys"] or (item.name,)
                    wanted += [f"`{prefix}{first}`" if first != "header" else "`header."]
                    wanted += [f"`{alias}`" for alias in aliases]
        for words in wanted:
            with self.subTest(words):
                self.assertIn(words, readme)
        for name in haineko.key_table(haineko.Settings):
            with self.subTest(section=name):
                self.assertRegex(readme, rf"(?m)^### .*\b{name}\b")


# ======================================================================================================================
# 1. Replies and jobs
# ======================================================================================================================


class RepliesAndJobs(unittest.TestCase):
    def test_every_row_of_replies_has_its_form(self):
        for slug, (status, code, dsn, command, text) in haineko.REPLIES.items():
            with self.subTest(slug):
                self.assertTrue(status == 0 or 400 <= status < 600)
                self.assertRegex(code, r"\A[245]\d\d\Z")
                self.assertRegex(dsn or "0.0.0", r"\A[0245]\.\d{1,3}\.\d{1,3}\Z")
                self.assertIn(
                    command, ("CONN", "EHLO", "STARTTLS", "AUTH", "MAIL", "RCPT", "DATA", "DRYRUN", "QUEUE", "HTTP", "")
                )
                self.assertTrue(text)
                said = haineko.make_reply(slug, "more", word="50% of it")
                self.assertEqual(said.message, (text.replace("%s", "50% of it"), "more"))

    def test_a_copy_has_its_recipient_and_number(self):
        message = haineko.Message((b"To: ", b"\r\nMessage-Id: <x.", b"@y>\r\n\r\n"))
        self.assertEqual(message.copy("a@example.jp", 12), b"To: a@example.jp\r\nMessage-Id: <x.12@y>\r\n\r\n")
        self.assertEqual(haineko.Message((b"%b whole",)).copy("a@example.jp", 1), b"%b whole")


# ======================================================================================================================
# 2. JSON into dataclasses
# ======================================================================================================================


class JsonIntoDataclasses(unittest.TestCase):
    def test_what_is_not_json(self):
        cases = [
            ("nothing", b"", "Expecting value"),
            ("an open brace", b"{", "Expecting property name"),
            ("something behind it", b"{} {}", "Extra data"),
            ("a trailing comma", b'{"a": 1,}', ""),
            ("single quotes", b"{'a': 1}", "Expecting property name"),
            ("NaN", b'{"a": NaN}', "NaN is not JSON"),
            ("Infinity", b"[Infinity]", "Infinity is not JSON"),
            ("-Infinity", b"[-Infinity]", "-Infinity is not JSON"),
            ("Latin-1", b'{"a": "\xe9"}', "not UTF-8 at octet 7"),
            ("a surrogate in UTF-8", b'"\xed\xa0\x80"', "not UTF-8 at octet 1"),
            ("UTF-16", "{}".encode("utf-16"), "not UTF-8 at octet 0"),
            ("a line end in a string", b'"a\nb"', "Invalid control character"),
            ("a bad escape", rb'"\x41"', "Invalid \\escape"),
            ("lists too deep", b"[" * 200000 + b"]" * 200000, "nested too deeply"),
            ("objects too deep", b'{"a":' * 200000 + b"1" + b"}" * 200000, "nested too deeply"),
        ]
        for what, octets, words in cases:
            with self.subTest(what):
                with self.assertRaises(ValueError) as caught:
                    haineko.parse_json(octets)
                self.assertIn(words, str(caught.exception))

    def test_what_is_json(self):
        cases = [(b"\xef\xbb\xbf{}", {}), ('"ねこ"'.encode(), "ねこ"), (rb'"\u306d"', "ね"), (b" [1] ", [1])]
        for octets, value in cases:
            with self.subTest(octets):
                self.assertEqual(haineko.parse_json(octets), value)

    def test_keys_that_stand_twice_are_named(self):
        cases = [
            ('{"workers": 1, "workers": 2}', ["httpd.workers: duplicate key"]),
            ('{"workers": 1, "timeout": 9, "workers": 1, "workers": 1}', ["httpd.workers: duplicate key"]),
            ('{"workers": 1, "timeout": 9}', []),
            ('{"tls": {"key": "a", "key": "a"}}', ["httpd.tls.key: duplicate key"]),
        ]
        for text, wanted in cases:
            with self.subTest(text):
                faults: list = []
                haineko.from_dict(haineko.Httpd, haineko.parse_json(text.encode()), "httpd", faults)
                self.assertEqual(faults, wanted)

    def test_every_fault_is_told_with_its_path(self):
        raw = {"listn": 1, "timeout": 0, "workers": "2", "tls": {"key": 5, "crtificate": "a"}, "max_connections": None}
        faults: list = []
        haineko.from_dict(haineko.Httpd, raw, "httpd", faults)
        self.assertEqual(
            faults,
            [
                'httpd.listn: unknown key; did you mean "listen"?',
                "httpd.timeout: expected a whole number from 1 to 3600, got 0",
                "httpd.workers: expected a whole number from 0 to 256, got a string",
                "httpd.tls.key: expected a string, got a number",
                'httpd.tls.crtificate: unknown key; did you mean "certificate"?',
            ],
        )

    def test_an_object_is_wanted(self):
        for raw, kind in [([], "a list"), ("x", "a string"), (1, "a number"), (True, "true or false"), (None, "null")]:
            with self.subTest(kind):
                faults: list = []
                self.assertEqual(haineko.from_dict(haineko.Tls, raw, "", faults).key, "")
                self.assertEqual(faults, [f"top level: expected an object, got {kind}"])

    def test_two_keys_that_say_the_same(self):
        faults: list = []
        haineko.from_dict(haineko.Submission, {"rcpt": ["a"], "to": ["b"]}, "", faults)
        self.assertEqual(faults, ["to: duplicate: an alias of this key is already set"])
        faults = []
        self.assertEqual(haineko.from_dict(haineko.Submission, {"rcpt": None, "to": "b"}, "", faults).rcpt, ("b",))
        self.assertEqual(faults, [])

    def test_parsers(self):
        number, upper = haineko.integer(1, 5), haineko.mapping_of(haineko.parse_boolean, str.upper)
        texts = haineko.list_of(haineko.parse_text)
        wants_flag, wants_number = "w: expected true or false, got ", "w: expected a whole number from 1 to 5, got "
        cases = [
            (haineko.parse_text, "ねこ", "ねこ", []),
            (haineko.parse_text, "", "", []),
            (haineko.parse_text, 1, None, ["w: expected a string, got a number"]),
            (haineko.parse_text, ["a"], None, ["w: expected a string, got a list"]),
            (haineko.parse_text, "a\nb", None, ["w: has an unprintable character"]),
            (haineko.parse_text, "a\x1b[2J", None, ["w: has an unprintable character"]),
            (haineko.parse_text, "\ud800", None, ["w: has an unprintable character"]),
            (haineko.parse_boolean, True, True, []),
            (haineko.parse_boolean, False, False, []),
            (haineko.parse_boolean, 1, True, []),
            (haineko.parse_boolean, 0, False, []),
            (haineko.parse_boolean, 2, None, [wants_flag + "a number"]),
            (haineko.parse_boolean, 1.0, None, [wants_flag + "a number"]),
            (haineko.parse_boolean, "true", None, [wants_flag + "a string"]),
            (haineko.parse_boolean, [], None, [wants_flag + "a list"]),
            (haineko.parse_boolean, {}, None, [wants_flag + "an object"]),
            (number, 1, 1, []),
            (number, 5, 5, []),
            (number, 0, None, [wants_number + "0"]),
            (number, 6, None, [wants_number + "6"]),
            (number, 2.0, None, [wants_number + "2.0"]),
            (number, True, None, [wants_number + "True"]),
            (number, "3", None, [wants_number + "a string"]),
            (number, "\n" * 300, None, [wants_number + "a string"]),
            (number, [1], None, [wants_number + "a list"]),
            (texts, "a", ("a",), []),
            (texts, ["a", "b"], ("a", "b"), []),
            (texts, [], (), []),
            (
                texts,
                ["a", 1, None],
                None,
                ["w[1]: expected a string, got a number", "w[2]: expected a string, got null"],
            ),
            (texts, {}, None, ["w: expected a string, got an object"]),
            (upper, {"a": 1, "b": 0}, {"A": True, "B": False}, []),
            (upper, {"a": 2}, None, ["w.a: expected true or false, got a number"]),
            (upper, {"a": 1, "A": 1}, None, ["w: two keys differ in case only"]),
            (upper, [], None, ["w: expected an object, got a list"]),
        ]
        for parse, value, wanted, faults_wanted in cases:
            with self.subTest(value=value, wanted=wanted):
                faults: list = []
                found = parse(value, "w", faults)
                self.assertEqual(faults, faults_wanted)
                if not faults_wanted:
                    self.assertEqual(found, wanted)
                    self.assertIs(type(found), type(wanted))

    def test_did_you_mean(self):
        close = [("Subjct", "subject"), ("replayto", "replyto"), ("CHARSET", "charset")]
        known = haineko.key_table(haineko.Header)
        for word, wanted in [*close, ("x", None), ("", None), ("subject" * 100000, None)]:
            with self.subTest(word[:20]):
                self.assertEqual(haineko.did_you_mean(word, known), f'; did you mean "{wanted}"?' if wanted else "")

    def test_hostile_bodies_cost_little(self):
        many = ",".join(f'"k{i}":1' for i in range(100000))
        cases = [
            ("100,000 unknown keys", f"{{{many}}}", haineko.MAX_ERRORS),
            ("a key that stands twice among 100,000", f'{{{many},"k7":1}}', haineko.MAX_ERRORS),
            ("100,000 recipients that are no strings", f'{{"rcpt": [{"1," * 99999}1]}}', haineko.MAX_ERRORS),
            (
                "100,000 names that it has passed",
                json.dumps({"header": {"x-haineko-loop": "!," * 100000}}),
                haineko.MAX_ERRORS,
            ),
            ("100,000 spaces where a mailbox is wanted", json.dumps({"header": {"from": " " * 100000}}), 1),
            ("30,000 spaces where a mailbox is wanted", json.dumps({"header": {"from": " " * 30000}}), 1),
            ("comments within comments", json.dumps({"header": {"from": "(" * 30000}}), 1),
            ("quotes without end", json.dumps({"header": {"from": '"' * 30001}}), 1),
            ("a charset of 100,000 letters", json.dumps({"header": {"charset": "x" * 100000}}), 1),
        ]
        for what, text, count in cases:
            with self.subTest(what):
                began = time.process_time()
                self.assertEqual(len(haineko.parse_submission(text.encode())[1]), count)
                self.assertLess(time.process_time() - began, 2)

    def test_printable(self):
        for text, wanted in [("ねこ", "ねこ"), ("a\r\nb\0\x1b[2J\u2028", "a??b??[2J?"), ("x" * 11, "x" * 10 + "...")]:
            self.assertEqual(haineko.sanitize(text, 10), wanted)


# ======================================================================================================================
# 3. Settings
# ======================================================================================================================


class SettingsFile(Folder):
    KIJITORA = "{SSHA}9p2euyteR33mp0TYKjmYhTlIt1ctxuRn"

    def faults(self, content, mode: int = 0o600) -> list:
        return haineko.load_settings(self.write("haineko.json", content, mode))[1]

    def test_without_a_file_all_mail_is_printed(self):
        found, faults = haineko.load_settings(None)
        self.assertEqual(faults, [])
        self.assertEqual(found.httpd.listen, ("127.0.0.1:2794",))
        self.assertEqual(haineko.resolve_route("example.jp", "example.org", found)[0].mailer, "Screen")
        self.assertTrue(found.recipients.open_relay)
        self.assertIn(haineko.parse_ip("127.0.0.1"), found.relayhosts.relayhosts)
        self.assertNotIn(haineko.parse_ip("192.0.2.1"), found.relayhosts.relayhosts)

    def test_defaults(self):
        found, faults = haineko.load_settings(self.write("haineko.json", {}))
        self.assertEqual(faults, [])
        httpd, smtpd = found.httpd, found.smtpd
        self.assertEqual((httpd.workers, httpd.max_connections, httpd.timeout, httpd.tls), (0, 512, 30, None))
        limits = smtpd.max_message_size, smtpd.max_rcpts_per_message, smtpd.max_workers
        self.assertEqual((limits, smtpd.syslog.disabled, smtpd.syslog.facility), ((4194304, 4, 4), True, "local2"))
        self.assertEqual(found.recipients.domainpart, {found.hostname.lower()})
        self.assertFalse(found.recipients.open_relay)
        route = haineko.resolve_route("example.jp", "example.org", found)[0]
        self.assertEqual((route.mailer, route.host, route.port, route.starttls), ("ESMTP", "127.0.0.1", 25, False))
        self.assertEqual((route.tls_verify, route.timeout, route.retry, route.sleep), (True, 30, 0, 5))

    def test_entries_that_can_match_nothing_are_faults(self):
        domains = [
            ({"recipients": {"domainpart": [name]}}, f'recipients.domainpart[0]: expected a domain, got "{name}"')
            for name in ("*.example.jp", "@example.jp", ".example.jp", "a@example.jp")
        ]
        address = 'recipients.recipients[0]: expected an address, got "example.jp"'
        key = 'mailertable.*.example.jp: expected "example.jp", ".example.jp" or "default"'
        for content, fault in (
            *domains,
            ({"httpd": {"listen": []}}, "httpd.listen: expected at least one value"),
            ({"recipients": {"recipients": ["example.jp"]}}, address),
            ({"mailertable": {"*.example.jp": {}}}, key),
        ):
            with self.subTest(content=content):
                self.assertEqual(self.faults(content), [fault])

    def test_all_faults_are_told_at_once(self):
        content = {
            "htpd": {},
            "httpd": {"listen": "2794", "worker": 2, "timeout": 3601, "allowed_origins": ["example.org"]},
            "smtpd": {"hostname": "a b", "max_message_size": -1, "syslog": {"disabled": 3, "facility": "locl2"}},
            "relayhosts": {"open-relay": "no", "relayhosts": ["127.0.0.1", "192.0.2.0/33", "::g"]},
            "recipients": {"domainparts": ["example.jp"]},
            "mailertable": {"default": {"mailer": "SMTP", "port": 0}, "example.jp": {"host": "a b", "retry": 1.5}},
            "sendermt": [],
            "authinfo": {"a": {"user": "x"}, "b": {"password": {"file": "x", "env": "Y"}}, "c": {"password": 5}},
            "password": {"u": "plain"},
        }
        self.assertEqual(
            self.faults(content),
            [
                'htpd: unknown key; did you mean "httpd"?',
                'httpd.listen: expected "host:port", "[v6]:port" or "unix:/path", got "2794"',
                'httpd.worker: unknown key; did you mean "workers"?',
                "httpd.timeout: expected a whole number from 1 to 3600, got 3601",
                'httpd.allowed_origins[0]: expected a web origin like "https://www.example.org", got "example.org"',
                'smtpd.hostname: expected a host name, got "a b"',
                f"smtpd.max_message_size: expected a whole number from 0 to {1 << 40}, got -1",
                "smtpd.syslog.disabled: expected true or false, got a number",
                'smtpd.syslog.facility: unknown syslog facility "locl2"; did you mean "local2"?',
                "relayhosts.open-relay: expected true or false, got a string",
                'relayhosts.relayhosts[1]: expected an IP address or network, got "192.0.2.0/33"',
                'relayhosts.relayhosts[2]: expected an IP address or network, got "::g"',
                'recipients.domainparts: unknown key; did you mean "domainpart"?',
                'mailertable.default.mailer: unknown relay type "SMTP"; did you mean "ESMTP"?',
                "mailertable.default.port: expected a whole number from 1 to 65535, got 0",
                'mailertable.example.jp.host: expected a host name or an IP address, got "a b"',
                "mailertable.example.jp.retry: expected a whole number from 0 to 100, got 1.5",
                "sendermt: expected an object, got a list",
                'authinfo.a.user: unknown key; did you mean "username"?',
                f"authinfo.b.password: expected {haineko.SECRET_FORMS}",
                "authinfo.c.password: expected a string, got a number",
                "password.u: expected a hash as `haineko.py pw` prints it, or {SSHA}",
            ],
        )

    def test_faults_of_what_the_settings_name(self):
        gone, closed = os.path.join(self.folder, "gone"), self.write("closed", "x")
        tls = {"certificate": "gone.pem", "key": "gone.pem"}
        cases = [
            ("auth", {"mailertable": {"default": {"auth": "relai"}}, "authinfo": {"relay": {}}},
             'mailertable.default.auth: "relai" is not in authinfo; did you mean "relay"?'),
            ("auth of sendermt", {"sendermt": {"example.org": {"auth": "x"}}},
             'sendermt.example.org.auth: "x" is not in authinfo'),
            ("folder", {"mailertable": {"default": {"mailer": gone}}},
             f"mailertable.default.mailer: {gone} is not a folder that can be written"),
            ("a file as folder", {"mailertable": {"default": {"mailer": closed}}},
             f"mailertable.default.mailer: {closed} is not a folder that can be written"),
            ("folder as host", {"mailertable": {"default": {"host": "/tmp"}}},
             'mailertable.default.host: expected a host name, got "/tmp"'),
            ("ca_file", {"mailertable": {"default": {"ca_file": "gone"}}},
             f"mailertable.default.ca_file: {gone}: No such file or directory"),
            ("ca_file that is none", {"mailertable": {"default": {"ca_file": "closed"}}},
             f"mailertable.default.ca_file: {closed}: "),
            ("tls", {"httpd": {"tls": tls}}, "httpd.tls: "),
            ("env", {"authinfo": {"a": {"password": {"env": "HAINEKO_TEST_UNSET"}}}},
             "authinfo.a.password.env: no environment variable HAINEKO_TEST_UNSET"),
            ("file", {"authinfo": {"a": {"password": {"file": "gone"}}}},
             "authinfo.a.password.file: gone: No such file or directory"),
        ]  # fmt: skip
        for what, content, wanted in cases:
            with self.subTest(what):
                faults = self.faults(content)
                self.assertEqual(len(faults), 1, faults)
                self.assertTrue(faults[0].startswith(wanted), faults)

    def test_a_disabled_route_may_name_what_is_not_there(self):
        content = {"mailertable": {"default": {"mailer": "/gone/for/good", "auth": "nobody", "disabled": 1}}}
        self.assertEqual(self.faults(content), [])

    def test_a_file_that_can_not_be_read(self):
        path = os.path.join(self.folder, "haineko.json")
        cases = [
            ("not JSON", b"{", f"{path}: Expecting property name"),
            ("not UTF-8", b'{"a": "\xff"}', f"{path}: not UTF-8 at octet 7"),
            ("a list", [], f"{path}: expected an object, got a list"),
            ("NaN", b'{"httpd": {"timeout": NaN}}', f"{path}: NaN is not JSON"),
            ("twice", b'{"httpd": {"timeout": 1, "timeout": 1}}', "httpd.timeout: duplicate key"),
        ]
        for what, content, wanted in cases:
            with self.subTest(what):
                faults = self.faults(content)
                self.assertTrue(len(faults) == 1 and faults[0].startswith(wanted), faults)
        os.unlink(path)
        self.assertEqual(haineko.load_settings(path)[1], [f"{path}: No such file or directory"])
        self.assertEqual(haineko.load_settings(self.folder)[1], [f"{self.folder}: Is a directory"])

    def test_a_section_in_a_file_of_its_own(self):
        self.write("authinfo", {"relay": {"username": "u", "password": "p"}})
        self.write("aside.json", {"default": {"host": "192.0.2.1", "auth": "relay"}}, 0o644)
        path = self.write("haineko.json", {"authinfo": "authinfo", "mailertable": "aside.json"}, 0o644)
        found, faults = haineko.load_settings(path)
        self.assertEqual(faults, [])
        self.assertEqual(found.mailertable["default"].credentials, ("u", "p"))
        names = {os.path.basename(name) for name, _ in found.files}
        self.assertEqual(names, {"haineko.json", "authinfo", "aside.json"})
        self.assertTrue(all(haineko.stat_key(name) == was for name, was in found.files))
        self.write("aside.json", {"default": {"hst": "192.0.2.1"}}, 0o644)
        self.assertEqual(haineko.load_settings(path)[1], ['mailertable.default.hst: unknown key; did you mean "host"?'])
        os.unlink(os.path.join(self.folder, "aside.json"))
        gone = os.path.join(self.folder, "aside.json")
        self.assertEqual(haineko.load_settings(path)[1], [f"mailertable: {gone}: No such file or directory"])

    def test_secrets_that_everybody_can_read_are_refused(self):
        login, hashes = {"relay": {"username": "u", "password": "p"}}, {"kijitora": self.KIJITORA}
        by_env = {"relay": {"username": "u", "password": {"env": "PATH"}}}
        cases = [
            ("a password", {"authinfo": login}, {}, True),
            ("a hash", {"password": hashes}, {}, True),
            ("no secret", {"authinfo": by_env, "password": {}}, {}, False),
            ("an empty password", {"authinfo": {"relay": {"username": "", "password": ""}}}, {}, False),
            ("a password aside", {"authinfo": "aside"}, login, True),
            ("hashes aside", {"password": "aside"}, hashes, True),
            ("no secret aside", {"authinfo": "aside"}, by_env, False),
            ("a word aside", {"authinfo": {"relay": {"password": {"file": "aside"}}}}, "word", True),
        ]
        for what, content, aside, refused in cases:
            for mode, wanted in ((0o644, refused), (0o604, refused), (0o640, False), (0o600, False)):
                with self.subTest(what, mode=oct(mode)):
                    self.write("aside", aside, mode if aside else 0o600)
                    faults = self.faults(content, 0o600 if aside else mode)
                    told = [fault for fault in faults if "can be read by everybody; chmod 600" in fault]
                    self.assertEqual((len(faults), len(told)), (wanted, wanted), faults)

    def test_passwords_from_a_file_and_the_environment(self):
        self.write("word", "ねko\r\n".replace("ね", "ne"))
        os.environ["HAINEKO_TEST_WORD"] = "from env\n"
        self.addCleanup(os.environ.pop, "HAINEKO_TEST_WORD")
        logins = {
            "f": {"username": "u", "password": {"file": "word"}},
            "e": {"username": "v", "password": {"env": "HAINEKO_TEST_WORD"}},
        }
        path = self.write("haineko.json", {"authinfo": logins, "mailertable": {k: {"auth": k} for k in logins}}, 0o644)
        found, faults = haineko.load_settings(path)
        self.assertEqual(faults, [])
        self.assertEqual(found.mailertable["f"].credentials, ("u", "neko"))
        self.assertEqual(found.mailertable["e"].credentials, ("v", "from env"))
        self.assertIn(os.path.join(self.folder, "word"), [name for name, _ in found.files])
        os.environ["HAINEKO_TEST_WORD"] = "n-y-a-a\nn-y-a-a"
        _, faults = haineko.load_settings(path)
        self.assertEqual([fault.partition(": ")[0] for fault in faults], ["authinfo.e.password"])
        self.assertNotIn("n-y-a-a", faults[0])

    def test_password_hashes(self):
        digest, salt = hashlib.scrypt(b"neko", salt=b"s" * 16, n=1024, r=8, p=1), base64.b64encode(b"s" * 16).decode()
        line = f"$scrypt$ln=10,r=8,p=1${salt}${base64.b64encode(digest).decode()}"
        cases = [
            (self.KIJITORA, "kijitora", True),
            (self.KIJITORA, "Kijitora", False),
            (self.KIJITORA, "", False),
            (line, "neko", True),
            (line, "neko ", False),
            (scrypt_line("neko"), "neko", True),
            (scrypt_line("neko"), "Neko", False),
        ]
        for hashed, word, right in cases:
            with self.subTest(hashed[:20], word=word):
                self.assertEqual(haineko.verify_password(hashed, word), right)
                faults: list = []
                haineko.parse_password_hash(hashed, "w", faults)
                self.assertEqual(faults, [])

    def test_hashes_that_are_none(self):
        salt = "c2FsdHNhbHRzYWx0c2FsdA=="
        for line in (
            "",
            "kijitora",
            "{SSHA}",
            "{SSHA}!",
            "{SSHA}" + base64.b64encode(b"x" * 20).decode(),
            "{SSHA512}" + "A" * 88,
            "$scrypt$ln=9,r=8,p=1$" + salt + "$" + salt,
            "$scrypt$ln=20,r=8,p=1$" + salt + "$" + salt,
            "$scrypt$ln=14,r=8,p=1$A$" + salt,
            "$scrypt$ln=14,r=8,p=1$" + salt + "$",
            "$2b$12$abcdefghijklmnopqrstuv",
        ):
            with self.subTest(line):
                faults: list = []
                haineko.parse_password_hash(line, "password.u", faults)
                self.assertEqual(faults, ["password.u: expected a hash as `haineko.py pw` prints it, or {SSHA}"])

    def test_who_may_log_in(self):
        gate = settings(password={"kijitora": self.KIJITORA, "ねこ": self.KIJITORA}).password
        cases = [
            ("right", "Basic " + base64.b64encode(b"kijitora:kijitora").decode(), True),
            ("right, in small letters", "basic " + base64.b64encode(b"kijitora:kijitora").decode(), True),
            ("UTF-8", "Basic " + base64.b64encode("ねこ:kijitora".encode()).decode(), True),
            ("wrong", "Basic " + base64.b64encode(b"kijitora:kijitor").decode(), False),
            ("nobody", "Basic " + base64.b64encode(b"nobody:kijitora").decode(), False),
            ("no colon", "Basic " + base64.b64encode(b"kijitora").decode(), False),
            ("not base64", "Basic !!!!", False),
            ("not UTF-8", "Basic " + base64.b64encode(b"\xff:\xff").decode(), False),
            ("not Latin", "Basic ねこ", False),
            ("Bearer", "Bearer " + base64.b64encode(b"kijitora:kijitora").decode(), False),
            ("nothing", "", False),
        ]
        for what, credentials, right in cases:
            with self.subTest(what):
                self.assertFalse(gate.authenticate(credentials, cached=True))
                self.assertEqual(bool(gate.authenticate(credentials)), right)
                self.assertEqual(bool(gate.authenticate(credentials, cached=True)), right)

    def test_who_was_right_is_remembered(self):
        gate = settings(password={"u": scrypt_line("neko")}).password
        credentials = "Basic " + base64.b64encode(b"u:neko").decode()
        began = time.process_time()
        self.assertTrue(gate.authenticate(credentials))
        slow, began = time.process_time() - began, time.process_time()
        self.assertTrue(all(gate.authenticate(credentials) for _ in range(10)))
        self.assertLess((time.process_time() - began) / 10, slow / 10)

    def test_networks(self):
        found = haineko.Networks(("192.0.2.0/24", "198.51.100.7", "10.1.2.3/8", "2001:db8::/32", "::1"))
        cases = [
            ("192.0.2.0", True), ("192.0.2.255", True), ("192.0.3.0", False), ("198.51.100.7", True),
            ("198.51.100.8", False), ("10.255.0.1", True), ("11.0.0.1", False), ("2001:db8::", True),
            ("2001:db8:ffff::1", True), ("2001:db9::", False), ("::1", True), ("::2", False),
            ("0.0.0.1", False), ("::ffff:192.0.2.1", True), ("::ffff:192.0.3.1", False),
        ]  # fmt: skip
        for address, inside in cases:
            with self.subTest(address):
                self.assertEqual(haineko.parse_ip(address) in found, inside)
        everything = haineko.Networks(("0.0.0.0/0",))
        self.assertIn(haineko.parse_ip("203.0.113.9"), everything)
        self.assertNotIn(haineko.parse_ip("2001:db8::1"), everything)
        self.assertNotIn(haineko.parse_ip("127.0.0.1"), haineko.Networks())

    def test_listen_addresses(self):
        cases = [
            ("127.0.0.1:0", True), ("[::1]:2794", True), ("unix:/run/haineko.sock", True), ("localhost:65535", True),
            ("127.0.0.1", False), (":2794", False), ("::1:2794", False), ("127.0.0.1:65536", False),
            ("127.0.0.1:-1", False), ("unix:relative", False), ("127.0.0.1:２７", False), ("", False), (5, False),
        ]  # fmt: skip
        for value, good in cases:
            with self.subTest(value):
                faults: list = []
                haineko.parse_listen(value, "w", faults)
                self.assertEqual(not faults, good, faults)

    def test_names_of_relays(self):
        names = [("esmtp", "ESMTP", "ESMTP"), ("SCREEN", "Screen", "Screen"), ("File", "File", "File")]
        for given, mailer, relay in [*names, (self.folder, self.folder, "File")]:
            with self.subTest(given):
                route = settings(mailertable={"default": {"mailer": given}}).mailertable["default"]
                self.assertEqual((route.mailer, route.relay), (mailer, relay))

    def test_keys_of_mailertable_and_recipients_compare_without_case_and_in_ascii(self):
        found = settings(
            mailertable={"Example.JP": {"mailer": "Screen"}, ".例え.jp": {"mailer": "Screen"}},
            recipients={
                "domainpart": ["Example.COM", "例え.jp"],
                "recipients": ["Neko@Example.net", "neko@例え.テスト"],
            },
        )
        self.assertEqual(list(found.mailertable), ["example.jp", ".xn--r8jz45g.jp"])
        right = ["a@EXAMPLE.com", "a@例え.jp", "a@xn--r8jz45g.jp", "NEKO@example.NET", "neko@例え.テスト"]
        for text in [*right, "inu@example.net", "a@sub.example.com"]:
            with self.subTest(text):
                permitted = text in right
                self.assertEqual(haineko.check_recipient(haineko.parse_address(text), found) is None, permitted)

    def test_domains_in_ascii(self):
        names = {"example.jp": "example.jp", "例え.jp": "xn--r8jz45g.jp", "bücher.example": "xn--bcher-kva.example"}
        none = dict.fromkeys(("faß.de", "βόλος.com", "a\u200db.example", "a\u200cb.example", "あ" * 64 + ".jp"), "")
        for name, wanted in {**names, **none}.items():
            with self.subTest(name):
                self.assertEqual(haineko.ascii_domain(name), wanted)

    def test_shown_settings_hold_no_secret(self):
        content = {
            "authinfo": {"relay": {"username": "mikeneko", "password": "hush-1"}, "none": {"username": "sabineko"}},
            "password": {"kijitora": self.KIJITORA},
            "mailertable": {"default": {"auth": "relay", "starttls": 1}},
            "relayhosts": {"relayhosts": ["192.0.2.0/24"]},
            "recipients": {"domainpart": ["b.example", "a.example"]},
        }
        found, faults = haineko.load_settings(self.write("haineko.json", content))
        self.assertEqual(faults, [])
        text = json.dumps(haineko.redacted(found))
        for word in ("hush-1", self.KIJITORA, self.KIJITORA[6:]):
            self.assertNotIn(word, text)
        shown = json.loads(text)
        self.assertEqual(
            shown["authinfo"]["relay"], {"username": "mikeneko", "password": "********", "token": "", "oauth2": None}
        )
        self.assertEqual(shown["authinfo"]["none"]["password"], "")
        self.assertEqual(shown["password"], {"kijitora": "********"})
        self.assertEqual(shown["relayhosts"], {"open-relay": False, "relayhosts": ["192.0.2.0/24"]})
        self.assertEqual(shown["recipients"]["domainpart"], ["a.example", "b.example"])
        self.assertEqual(shown["mailertable"]["default"]["starttls"], True)
        self.assertNotIn("login", shown["mailertable"]["default"])
        self.assertEqual(shown["httpd"]["listen"], ["127.0.0.1:2794"])
        self.assertEqual(set(shown), set(haineko.key_table(haineko.Settings)))
        self.assertNotIn("hush-1", repr(found) + repr(found.mailertable))

    def test_shown_defaults_can_be_read_again(self):
        shown = haineko.redacted(settings(mailertable={}, sendermt={}))
        faults: list = []
        haineko.from_dict(haineko.Settings, json.loads(json.dumps(shown)), "", faults)
        self.assertEqual(faults, [])

    def test_errors_that_depend_on_other_sections_are_told_with_the_others(self):
        cases = [
            ({"smtpd": {"x": 1}, "mailertable": {"default": {"auth": "x", "prot": 25}, ".example.jp": {"auth": "y"}}},
             ["smtpd.x", "mailertable.default.prot", "mailertable.default.auth", "mailertable..example.jp.auth"]),
            ({"queue": {"path": "gone/x.db", "lifetime": 0}}, ["queue.lifetime", "queue.path"]),
            ({"httpd": {"tls": {"certificate": "gone", "key": "gone"}, "timeout": 0}}, ["httpd.timeout", "httpd.tls"]),
            ({"authinfo": {"a": {"password": {"file": "gone"}}}, "smtpd": 1}, ["smtpd", "authinfo.a.password.file"]),
            ({"authinfo": "gone", "mailertable": {"default": {"auth": "x"}}}, ["authinfo"]),
            ({"mailertable": {"a.jp": {"mailer": 1, "auth": "x"}, "a.jp.example": {"auth": "x"}, "a.j": 5}},
             ["mailertable.a.jp.mailer", "mailertable.a.j", "mailertable.a.jp.auth", "mailertable.a.jp.example.auth"]),
            ({"authinfo": {"x": 5}, "mailertable": {"default": {"auth": "x"}}}, ["authinfo.x"]),
            ({"authinfo": {"x": {"password": {"file": 5}}, "y": {"token": {"env": []}}}},
             ["authinfo.x.password.file", "authinfo.y.token.env"]),
            ({"httpd": {"tls": 5}, "queue": []}, ["httpd.tls", "queue"]),
            ({"mailertable": {"default": 5, "example.jp": {"mailer": "AmazonSES", "region": "A B"}}},
             ["mailertable.default", "mailertable.example.jp.region", "mailertable.example.jp.auth"]),
        ]  # fmt: skip
        for content, wanted in cases:
            with self.subTest(content=content):
                self.assertEqual([error.partition(": ")[0] for error in self.faults(content)], wanted)

    def test_files_of_tls_are_named_and_must_be_files(self):
        os.mkfifo(os.path.join(self.folder, "fifo"))
        self.write("file.pem", "x")
        good, bad = "file.pem", ("gone", "fifo")
        pairs = [(name, good) for name in bad] + [(good, name) for name in bad] + [("/dev/zero",) * 2]
        for certificate, key in [*pairs, (good, good)]:
            wrong = os.path.join(self.folder, key if certificate == "file.pem" else certificate)
            with self.subTest(certificate=certificate, key=key):
                (error,) = self.faults({"httpd": {"tls": {"certificate": certificate, "key": key}}})
                self.assertTrue(error.startswith("httpd.tls: ") and wrong in error, error)
        for ca_file in ("fifo", "/dev/zero", "gone"):
            with self.subTest(ca_file=ca_file):
                (error,) = self.faults({"mailertable": {"default": {"ca_file": ca_file}}})
                self.assertTrue(error.startswith("mailertable.default.ca_file: "), error)
        for tls, wanted in (
            ({}, ["httpd.tls.certificate", "httpd.tls.key"]),
            ({"certificate": "x"}, ["httpd.tls.key"]),
        ):
            with self.subTest(tls=tls):
                self.assertEqual([error.partition(": ")[0] for error in self.faults({"httpd": {"tls": tls}})], wanted)

    def test_settings_that_everybody_can_write_are_refused(self):
        (error,) = self.faults({"mailertable": "aside"} if self.write("aside", {}, 0o602) else {})
        self.assertIn("can be written by everybody", error)
        self.assertIn("can be written by everybody", " ".join(self.faults({}, 0o602)))

    def test_every_login_costs_the_same(self):
        digest = hashlib.scrypt(b"neko", salt=b"s" * 16, n=1 << 14, r=8, p=1)
        old = "$scrypt$ln=14,r=8,p=1$" + "$".join(base64.b64encode(octets).decode() for octets in (b"s" * 16, digest))
        gate = settings(password={"old": old, "ssha": self.KIJITORA, "new": scrypt_line("neko")}).password
        costs = {}
        for user in ("old", "ssha", "new", "nobody"):
            for word in ("1", "2", "3"):
                began = time.process_time()
                self.assertFalse(gate.authenticate("Basic " + base64.b64encode(f"{user}:{word}".encode()).decode()))
                costs[user] = min(time.process_time() - began, costs.get(user, 9))
        self.assertLess(max(costs.values()), 1.5 * min(costs.values()), costs)
        self.assertTrue(gate.authenticate("Basic " + base64.b64encode(b"old:neko").decode()))
        self.assertIn("$scrypt$ln=14,r=8,p=5$", scrypt_line("neko"))

    def test_the_name_of_a_machine(self):
        for name, wanted in (
            ("mail.example.org", "mail.example.org"), ("a-b.example.org", "a-b.example.org"),
            ("3f2a9c0d1e2b", "3f2a9c0d1e2b.localdomain"), ("my_container", "my-container.localdomain"),
            ("192.168.1.5", "192-168-1-5.localdomain"), ("localhost", "localhost.localdomain"),
            ("a.1", "a-1.localdomain"),
            ("my_container.example.org", "my-container-example-org.localdomain"), ("", "localhost.localdomain"),
            ("-a.example.org", "a-example-org.localdomain"), ("ねこ", "localhost.localdomain"),
            ("a" * 64 + ".jp", "a" * 63 + ".localdomain"),
        ):  # fmt: skip
            with self.subTest(name):
                self.assertEqual(haineko.local_hostname(name), wanted)
        for hostname, address, wanted in (
            ("mail.example.org", "127.0.0.1", "mail.example.org"), ("mail", "::1", "mail"),
            ("box.localdomain", "127.0.0.1", "[127.0.0.1]"), ("box.localdomain", "::1", "[IPv6:::1]"),
            ("box.localdomain", "::ffff:127.0.0.1", "[127.0.0.1]"), ("my_host.example.org", "127.0.0.1", "[127.0.0.1]"),
            ("192.168.1.5", "127.0.0.1", "[127.0.0.1]"), ("3", "127.0.0.1", "[127.0.0.1]"),
        ):  # fmt: skip
            with self.subTest(hostname, address=address):
                self.assertEqual(haineko.ehlo_name(hostname, address), wanted)

    def test_aliases_monitors_and_provider_headers(self):
        aliases = {"root": "ops@example.org", "Cron": ["a@example.org", "b@example.org"]}
        found = settings(smtpd={"aliases": aliases}, httpd={"monitors": "192.0.2.0/24"}, mailertable={"default": {}})
        self.assertEqual(
            found.smtpd.aliases, {"root": ("ops@example.org",), "cron": ("a@example.org", "b@example.org")}
        )
        self.assertIn(haineko.parse_ip("192.0.2.1"), found.httpd.monitors)
        self.assertIn(haineko.parse_ip("127.0.0.9"), haineko.Httpd().monitors)
        self.assertIs(found.mailertable["default"].provider_headers, False)
        address = "x@y.example"
        for aliases in ({"a@b.example": address}, {"root": "ops"}, {"root": []}, {"root": [1]}, {"": address}, 5):
            with self.subTest(aliases=aliases):
                self.assertEqual(len(self.faults({"smtpd": {"aliases": aliases}})), 1)


# ======================================================================================================================
# 4. Log
# ======================================================================================================================


class Secrets(Folder):
    """Where a secret may stand."""

    def read(self, source) -> tuple:
        """(the password, faults) of settings with that password."""
        logins = {"key": {"username": "u", "password": source}}
        route = {"host": "mx.example", "auth": "key"}
        found, faults = haineko.load_settings(
            self.write("haineko.json", {"authinfo": logins, "mailertable": {"default": route}})
        )
        return found.mailertable["default"].credentials[1], faults

    def shell(self, script: str) -> dict:
        return {"command": ["sh", "-c", script]}

    def test_what_is_read(self):
        self.write("secret", "from a file\n")
        self.write("program", "#!/bin/sh\necho from $1 in $(basename $PWD)\n", 0o700)
        os.environ["CREDENTIALS_DIRECTORY"] = self.folder
        self.addCleanup(os.environ.pop, "CREDENTIALS_DIRECTORY")
        for source, wanted in (
            ("a string", "a string"),
            ({"file": "secret"}, "from a file"),
            ({"credential": "secret"}, "from a file"),
            (
                {"command": ["./program", "here; echo no shell"]},
                f"from here; echo no shell in {os.path.basename(self.folder)}",
            ),
            (self.shell("echo one; echo two"), "one"),
            (self.shell("printf 'no line end'"), "no line end"),
            (self.shell("printf 'crlf\\r\\n'"), "crlf"),
            (self.shell("echo starts another; sleep 60 & exit 0"), "starts another"),
        ):
            with self.subTest(source):
                self.assertEqual(self.read(source), (wanted, []))

    def test_what_can_not_be_read(self):
        self.write("secret", "word", 0o644)
        self.write("latin", b"geheim\xff")
        with patched(haineko, SECRET_TIMEOUT=0.3):
            for source, fault in (
                ({"file": "none"}, ".file: none: No such file or directory"),
                ({"file": "secret"}, f".file: secret: can be read by everybody; chmod 600 {self.folder}/secret"),
                ({"file": "latin"}, ".file: latin: not UTF-8"),
                ({"env": "HAINEKO_NONE"}, ".env: no environment variable HAINEKO_NONE"),
                ({"credential": "x"}, ".credential: no credential x: LoadCredential= of systemd gives it to a unit"),
                ({"command": ["/nowhere/x"]}, ".command: /nowhere/x: No such file or directory"),
                ({"command": []}, ".command: expected at least one value"),
                ({"command": ["touch", 5, "ran"]}, ".command[1]: expected a string, got a number"),
                ({"file": ""}, ".file: : Is a directory"),
                ({"env": ""}, ".env: no environment variable "),
                ({"command": "x", "file": "x"}, f": expected {haineko.SECRET_FORMS}"),
                ({"comand": "x"}, f": expected {haineko.SECRET_FORMS}"),
                ({}, f": expected {haineko.SECRET_FORMS}"),
                (
                    self.shell("echo geheim; echo first >&2; echo vault is sealed >&2; exit 3"),
                    ".command: sh: vault is sealed",
                ),
                (self.shell("exit 3"), ".command: sh: exit code 3"),
                (self.shell("true"), ".command: sh: printed nothing"),
                (self.shell("sleep 60; echo late"), ".command: sh: did not end within 0.3 s"),
                (self.shell("yes geheim"), ".command: sh: did not end within 0.3 s"),
                (self.shell("printf 'geheim\\377'"), ".command: sh: not UTF-8"),
                (self.shell("printf 'geheim\\001'"), ": has a line end, or another unprintable character"),
            ):
                with self.subTest(source):
                    began = time.monotonic()
                    _, faults = self.read(source)
                    self.assertEqual(faults, [f"authinfo.key.password{fault}"])
                    self.assertNotIn("ran", os.listdir(self.folder))
                    self.assertLess(time.monotonic() - began, 5)

    def test_all_of_them_are_masked(self):
        names = ("client_secret", "refresh_token", "access_token")
        oauth2 = {"provider": "google", "client_id": "app", **dict.fromkeys(names, "geheim")}
        force = settings(
            authinfo={"key": {"username": "u", "oauth2": oauth2}}, mailertable={"default": {"auth": "key"}}
        )
        route = force.mailertable["default"]
        self.assertEqual(route.oauth2.access_token, "geheim")
        self.assertNotIn("geheim", json.dumps(haineko.redacted(force)) + repr(route) + repr(force))
        for name in names:
            content = {"authinfo": {"key": {"username": "u", "oauth2": {"access_token": {"env": "PATH"}, name: "x"}}}}
            faults = haineko.load_settings(self.write("haineko.json", content, 0o644))[1]
            self.assertIn("holds secrets and can be read by everybody", " ".join(faults))


@contextlib.contextmanager
def patched(where, **values):
    """Other values for names of a module or class, meanwhile."""
    before = {name: getattr(where, name) for name in values}
    try:
        for name, value in values.items():
            setattr(where, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(where, name, value)


class LogLines(Quiet):
    def test_a_line_is_a_line(self):
        haineko.log.lines("one", "two ねこ", "half \ud800")
        lines = self.logged()
        self.assertEqual(len(lines), 3)
        for line, wanted in zip(lines, ("one", "two ねこ", "half \\ud800")):
            self.assertRegex(line, rf"\A\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{{4}} haineko\[{os.getpid()}\]: ")
            self.assertTrue(line.endswith(": " + wanted), line)

    def test_lines_that_are_held_are_written_by_flush_in_their_order(self):
        self.addCleanup(setattr, haineko.log, "buffer", None)
        haineko.log.start_buffering()
        writers = [threading.Thread(target=self._write, args=(name,)) for name in "ab"]
        for writer in writers:
            writer.start()
        haineko.log.lines("first", "second")
        self.assertEqual(self.logged(), [])
        lines: list = []
        while any(writer.is_alive() for writer in writers):
            haineko.log.flush()
            lines += self.logged()
        haineko.log.flush()
        lines = [line.rpartition(": ")[2] for line in lines + self.logged()]
        self.assertEqual([line for line in lines if line.isalpha()], ["first", "second"])
        for name in "ab":
            self.assertEqual([line for line in lines if line[0] == name], [f"{name}{i}" for i in range(300)])
        haineko.log.flush()
        self.assertEqual(self.logged(), [])

    def syslogd(self, folder: str) -> socket.socket:
        path = os.path.join(folder, "log")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        daemon = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(daemon.close)
        daemon.bind(path)
        daemon.setblocking(False)
        return daemon

    def read(self, daemon: socket.socket) -> list:
        lines = []
        with contextlib.suppress(BlockingIOError):
            while True:
                lines.append(daemon.recv(4096).decode())
        return lines

    def test_syslog_may_come_go_and_stop_reading(self):
        with tempfile.TemporaryDirectory(prefix="haineko.") as folder:
            log, path = haineko.Log(), os.path.join(folder, "log")
            log.SYSLOG = (path + "not", path)
            log.open(haineko.Syslog(disabled=False, facility="mail"))
            log.lines("nobody is there")
            daemon = self.syslogd(folder)
            log.lines("a: one", "b: two ねこ \ud800")
            lines = self.read(daemon)
            self.assertEqual(
                [line.partition("]: ")[2] for line in lines],
                ["1 lines were lost, since nobody read them", "a: one", "b: two ねこ \\ud800"],
            )
            self.assertRegex(
                lines[1], rf"\A<22>[A-Z][a-z]{{2}} [ \d]\d \d\d:\d\d:\d\d haineko\[{os.getpid()}\]: a: one\Z"
            )
            log.lines(*["unread"] * 3000)
            count = len(self.read(daemon))
            self.assertEqual((count > 0, log.lost), (True, 3000 - count))
            log.lines("read again")
            self.assertEqual(
                [line.partition("]: ")[2] for line in self.read(daemon)],
                [f"{3000 - count} lines were lost, since nobody read them", "read again"],
            )
            daemon.close()
            again = self.syslogd(folder)
            log.lines("another daemon")
            self.assertEqual([line.partition("]: ")[2] for line in self.read(again)], ["another daemon"])
            log.syslog.close()

    @unittest.skipUnless(os.path.exists("/proc/self/fd"), "a pipe can't be opened again here")
    def test_a_pipe_is_written_without_waiting_for_others_that_write_into_it(self):
        reading, writing = os.pipe()
        self.addCleanup(os.close, reading)
        os.dup2(writing, 2)
        os.close(writing)
        log = haineko.Log()
        log.start_buffering()
        self.addCleanup(os.close, log.stderr)
        self.assertEqual([os.get_blocking(number) for number in (log.stderr, 2)], [False, True])
        log.lines("one")
        log.flush()
        self.assertTrue(os.read(reading, 4096).endswith(b": one\n"))

    def test_lines_that_nobody_reads_are_counted(self):
        reading, writing = os.pipe()
        self.addCleanup(os.close, reading)
        os.dup2(writing, 2)
        os.close(writing)
        self.addCleanup(setattr, haineko.log, "buffer", None)
        haineko.log.buffer = []
        os.set_blocking(2, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(2, b"." * 4096)
        os.set_blocking(2, True)
        for count in (1, 30, 60):
            haineko.log.lines(*["x"] * count)
            haineko.log.flush()
        os.set_blocking(reading, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.read(reading, 65536)
        haineko.log.lines("here again")
        haineko.log.flush()
        found = os.read(reading, 65536).decode()
        self.assertIn(": 91 lines were lost", found)
        self.assertTrue(found.endswith(": here again\n"), found)

    def _write(self, name: str):
        for i in range(300):
            haineko.log.lines(f"{name}{i}")

    def test_lines_of_fields(self):
        cases = [
            ({"login": "b", "queueid": "Q", "code": "250", "dsn": "2.0.0"}, "Q: login=b dsn=2.0.0 (250 nyaa)"),
            ({"a": ""}, 'a="" (nyaa)'),
            ({"a": 'say "x y"'}, r'a="say \"x y\"" (nyaa)'),
            ({"a": "x\r\ny\x1b[2J"}, "a=x??y?[2J (nyaa)"),
            ({"a": "x" * 501}, "a=" + "x" * 500 + "... (nyaa)"),
            ({"from": "", "to": ["a@x.jp", "b@x.jp"], "delay": 0.5}, "from=<> to=<a@x.jp>,<b@x.jp> delay=0.500 (nyaa)"),
            ({}, "nyaa"),
        ]
        for values, wanted in cases:
            with self.subTest(wanted):
                self.assertEqual(haineko.text_line("nyaa", **values), wanted)

    def test_lines_of_json(self):
        self.addCleanup(haineko.log.open, haineko.Syslog())
        haineko.log.open(haineko.Syslog(), "json")
        haineko.log.lines("half \ud800", "two\r\nねこ")
        fields = {"queueid": "Q", "from": "", "to": ["a\x1b@x.jp"], "delay": 0.12345, "code": "250", "dsn": None}
        haineko.log.event("warning", "delivery", "nyaa", **fields)
        found = [json.loads(line) for line in self.logged()]
        for line in found:
            at = datetime.datetime.fromisoformat(line.pop("time"))
            self.assertLess(abs(time.time() - at.timestamp()), 60)
        plain = {"level": "info", "event": "server"}
        fields = {"queueid": "Q", "from": "", "to": ["a?@x.jp"], "delay": 0.123, "code": 250, "message": "nyaa"}
        wanted = [{**plain, "message": "half ?"}, {**plain, "message": "two??ねこ"}]
        self.assertEqual(found, [*wanted, {"level": "warning", "event": "delivery", **fields}])

    def test_tabs_of_a_dialogue_are_kept(self):
        self.addCleanup(setattr, haineko.log, "devel", False)
        haineko.log.devel = True
        haineko.log.dialogue("mx.example.jp", "<", "250 a\tb\x1b[2J")
        self.assertEqual(self.logged(), ["mx.example.jp < 250 a\tb?[2J"])

    def test_a_full_stderr_costs_no_mail(self):
        with open("/dev/full", "wb") as full:
            os.dup2(full.fileno(), 2)
        self.assertEqual(posted(document())[0], 200)


# ======================================================================================================================
# 5. Submissions
# ======================================================================================================================


class MetricsTable(unittest.TestCase):
    def test_processes_add_to_rows_of_their_own_and_nothing_is_lost(self):
        metrics = haineko.Metrics()
        metrics.add("cats_total", "a")  # before allocate(): nothing
        table = {
            "cats_total": ("counter", "Cats.", {"kind": ("a", "b")}),
            "naps_seconds": ("histogram", "Naps.", {}),
            "food_bytes": ("gauge", "Food.", {}),
        }
        metrics.allocate(table, 4)
        metrics.set("food_bytes", to=7)
        pids = []
        for row in range(3):
            pid = os.fork()
            if not pid:
                metrics.cells = metrics.rows[row]
                for _ in range(2000):
                    metrics.add("cats_total", "a")
                    metrics.add("cats_total", "unknown")
                metrics.observe("naps_seconds", seconds=(0.005, 0.3, 99)[row])
                os._exit(0)
            pids.append(pid)
        self.assertEqual([os.waitpid(pid, 0)[1] for pid in pids], [0, 0, 0])
        lines = metrics.text({}).splitlines()
        self.assertEqual(
            [line for line in lines if line.startswith("cats")], ['cats_total{kind="a"} 6000', 'cats_total{kind="b"} 0']
        )
        for line in (
            "# HELP naps_seconds Naps.",
            "# TYPE naps_seconds histogram",
            'naps_seconds_bucket{le="0.005"} 1',
            'naps_seconds_bucket{le="0.25"} 1',
            'naps_seconds_bucket{le="0.5"} 2',
            'naps_seconds_bucket{le="30"} 2',
            'naps_seconds_bucket{le="+Inf"} 3',
            "naps_seconds_count 3",
            "naps_seconds_sum 99.305",
            "food_bytes 7",
        ):
            self.assertIn(line, lines)
        self.assertNotIn("\nfood_bytes ", metrics.text({("food_bytes",): None}))


class Submissions(Quiet):
    def understood(self, submission) -> haineko.Submission:
        found, faults, _ = haineko.parse_submission(as_body(submission))
        self.assertEqual(faults, [])
        return found

    def faults(self, submission) -> list:
        return haineko.parse_submission(as_body(submission))[1]

    def test_every_key(self):
        found = self.understood(
            {
                "ehlo": "[127.0.0.1]",
                "mail": "kijitora@example.org",
                "rcpt": ["mikeneko@example.jp", "sabineko@example.jp"],
                "header": {
                    "from": "キジトラ <kijitora@example.com>",
                    "subject": "謹賀新年",
                    "replyto": "straycats@cat-ml.example.org",
                    "charset": "utf8",
                    "x-haineko-loop": ["a.example", "b.example"],
                },
                "body": "あとでお年玉貰いに行きます",
            }
        )
        self.assertEqual((found.ehlo, found.mail), ("[127.0.0.1]", "kijitora@example.org"))
        self.assertEqual(found.rcpt, ("mikeneko@example.jp", "sabineko@example.jp"))
        self.assertEqual(
            [(name, item.addr_spec) for name, item in found.header.from_], [("キジトラ", "kijitora@example.com")]
        )
        self.assertEqual([item.addr_spec for _, item in found.header.replyto], ["straycats@cat-ml.example.org"])
        self.assertEqual((found.header.subject, found.header.charset), ("謹賀新年", "UTF-8"))
        self.assertEqual(found.header.loop, ("a.example", "b.example"))
        self.assertEqual(found.body, "あとでお年玉貰いに行きます")

    def test_aliases(self):
        cases = [
            ({"helo": "a"}, "ehlo", "a"),
            ({"send": "a@example.jp"}, "mail", "a@example.jp"),
            ({"from": "a@example.jp"}, "mail", "a@example.jp"),
            ({"recv": ["a@example.jp"]}, "rcpt", ("a@example.jp",)),
            ({"to": "a@example.jp"}, "rcpt", ("a@example.jp",)),
            ({"rcpt": "a@example.jp"}, "rcpt", ("a@example.jp",)),
        ]
        for submission, name, wanted in cases:
            with self.subTest(submission):
                self.assertEqual(getattr(self.understood(submission), name), wanted)
        for key in ("replyto", "reply-to"):
            with self.subTest(key):
                found = self.understood({"header": {key: "a@example.jp"}}).header.replyto
                self.assertEqual(found[0][1].addr_spec, "a@example.jp")

    def test_null_is_as_if_absent_and_empty_is_empty(self):
        names = dict.fromkeys(["ehlo", "helo", "mail", "send", "from", "rcpt", "recv", "to", "header", "body"])
        found, absent = self.understood(names), haineko.Submission(rcpt=())
        absent.header = found.header
        self.assertEqual(
            [getattr(found, item.name) for item in fields(found)],
            [getattr(absent, item.name) for item in fields(found)],
        )
        self.assertIsNone(found.ehlo)
        self.assertEqual(self.understood({"header": {"charset": None}}).header.charset, "UTF-8")
        self.assertEqual(self.understood({"ehlo": ""}).ehlo, "")
        self.assertEqual(self.understood({"header": {"from": "", "replyto": ""}}).header.from_, ())

    def test_faults(self):
        wanted = 'expected "name <address>", got '
        cases = [
            ([], ["top level: expected an object, got a list"]),
            ("x", ["top level: expected an object, got a string"]),
            (b"null", ["top level: expected an object, got null"]),
            ({"header": []}, ["header: expected an object, got a list"]),
            ({"header": "x"}, ["header: expected an object, got a string"]),
            ({"rcptt": "a"}, ['rcptt: unknown key; did you mean "rcpt"?']),
            ({"subject": "a"}, ["subject: unknown key; did you mean header.subject?"]),
            *[({key: "a"}, [f"{key}: unknown key; did you mean {meant}?"]) for key, meant in (
                ("cc", "header.cc"), ("reply_to", "header.replyto"), ("replyTo", "header.replyto"), ("text", "body"),
                ("List-Unsubscribe", "header.list-unsubscribe"), ("contentType", "html or attachments[].type"),
            )],
            ({"header": {"html": "a"}}, ["header.html: unknown key; did you mean html, outside of header?"]),
            ({"header": {"reply_too": "a"}}, ['header.reply_too: unknown key; did you mean "replyto"?']),
            ({"header": {"reply_to": "a"}}, [f'header.reply_to: {wanted}"a"']),
            ({"header": {"Subjekt": "a"}}, ['header.Subjekt: unknown key; did you mean "subject"?']),
            ({"a\r\nb": 1}, ["a??b: unknown key"]),
            ({"mail": 1}, ["mail: expected a string, got a number"]),
            ({"mail": ["a@example.jp"]}, ["mail: expected a string, got a list"]),
            ({"ehlo": False}, ["ehlo: expected a string, got true or false"]),
            ({"body": {}}, ["body: expected a string, got an object"]),
            ({"rcpt": 5}, ["rcpt: expected a string, got a number"]),
            ({"rcpt": {"a": 1}}, ["rcpt: expected a string, got an object"]),
            ({"rcpt": ["a", None]}, ["rcpt[1]: expected a string, got null"]),
            ({"rcpt": [["a"]]}, ["rcpt[0]: expected a string, got a list"]),
            ({"header": {"subject": 1}}, ["header.subject: expected a string, got a number"]),
            ({"header": {"subject": "a\nb"}}, ["header.subject: has a CR, LF or NUL"]),
            ({"header": {"from": "nobody"}}, ["header.from: " + wanted + '"nobody"']),
            ({"header": {"replyto": "a b c"}}, ["header.replyto: " + wanted + '"a b c"']),
            ({"header": {"charset": "UTF-9"}},
             ['header.charset: expected a charset that mail readers know, like "UTF-8", got "UTF-9"']),
            ({"header": {"x-haineko-loop": "a b"}}, ['header.x-haineko-loop: "a b" is no name of a Haineko']),
            ({"header": {"x-haineko-loop": [1]}}, ["header.x-haineko-loop[0]: expected a string, got a number"]),
            (b'{"body": "a", "body": "b"}', ["body: duplicate key"]),
            (b'{"header": {"subject": "a", "subject": "a"}}', ["header.subject: duplicate key"]),
            (b'{"body": "\\ud800"}', ["body: has half a surrogate pair at character 0"]),
            (b'{"rcpt": ["a", "b\\udc00"]}', ["rcpt[1]: has half a surrogate pair at character 1"]),
            (b'{"header": {"subject": "\\ud83d"}}', ["header.subject: has half a surrogate pair at character 0"]),
            (b'{"\\ud800": 1}', ["?: unknown key"]),
            ({"rcpt": 1, "body": 2, "x": 3}, [
                "rcpt: expected a string, got a number", "body: expected a string, got a number", "x: unknown key",
            ]),
        ]  # fmt: skip
        for submission, faults in cases:
            with self.subTest(submission):
                self.assertEqual(self.faults(submission), faults)
        self.assertEqual(self.understood(b'{"body": "\\ud83d\\ude3a"}').body, "😺")

    def test_addresses(self):
        cases = [
            ("a@example.jp", "a", "example.jp"),
            ("A.b+c=d@Example.JP", "A.b+c=d", "Example.JP"),
            ("a@localhost", "a", "localhost"),
            ("!#$%&'*+-/=?^_`{|}~@example.jp", "!#$%&'*+-/=?^_`{|}~", "example.jp"),
            ('"a b"@example.jp', '"a b"', "example.jp"),
            (r'"a\"\\b"@example.jp', r'"a\"\\b"', "example.jp"),
            ('"a@b"@example.jp', '"a@b"', "example.jp"),
            ("a@[192.0.2.1]", "a", "[192.0.2.1]"),
            ("a@[IPv6:2001:db8::1]", "a", "[IPv6:2001:db8::1]"),
            ("a@例え.jp", "a", "xn--r8jz45g.jp"),
            ("ねこ@example.jp", "ねこ", "example.jp"),
            ("a" * 64 + "@" + "b" * 63 + ".jp", "a" * 64, "b" * 63 + ".jp"),
        ]
        for text, local, domain in cases:
            with self.subTest(text):
                found = haineko.parse_address(text)
                self.assertEqual((found.as_written, found.domain), (text, domain))
                self.assertEqual(found.addr_spec, f"{local}@{domain}")

    def test_what_is_no_json(self):
        for body, words in (
            (b"", ("line 1 column 1", "the body is empty")), (b'{\n "a": }', ("line 2 column 7",)),
            (b"mail=a%40x&rcpt=b", ("line 1", "form data")),
            (b'--b\r\nContent-Disposition: form-data; name="a"', ("form data",)),
            (b"\xff", ("UTF-8",)), (b"[" * 100000, ("deep",)), (b'{"a": NaN}', ("NaN",)),
        ):  # fmt: skip
            with self.subTest(body[:20]):
                found = haineko.parse_submission(body)
                self.assertEqual((found.submission, found.is_json, len(found.errors)), (None, False, 1))
                for word in words:
                    self.assertIn(word, found.errors[0])
        for body in (b"[]", b'{"a": 1}', b'{"a": 1, "a": 1}', as_body({"mail": 1, "rcpt": 2})):
            self.assertTrue(haineko.parse_submission(body).is_json)
        self.assertEqual(haineko.idna_hint("A <a@x>"), ('expected a bare address, got "A <a@x>"; did you mean "a@x"?',))

    def test_address_lists(self):
        a, b = ("", "a@x"), ("", "b@y")
        for text, wanted in (
            ("a@x,", [a]), (",a@x,,b@y", [a, b]), ("a@x; b@y", [a, b]), ("a@x (Doe, J), b@y", [("Doe, J", "a@x"), b]),
            ("unlisted-recipients:; (no To-header on input)", []), ("undisclosed-recipients:;", []),
            ("(Empty list)(start)Hidden recipients  :(nobody(that I know))  ;", []), ("(a (b) \\) c)", []),
            ("A Group:Ed Jones <a@x>, b@y; , c@z", [("Ed Jones", "a@x"), b, ("", "c@z")]),
            ('"Doe, J" <a@x> (work), B <b@y>', [("Doe, J (work)", "a@x"), ("B", "b@y")]), ("", []), (" ,; ", []),
            ("< a@x >, b@y", [a, b]), ("a@[IPv6:2001:db8::1]; b@y", [("", "a@[IPv6:2001:db8::1]"), b]),
        ):  # fmt: skip
            with self.subTest(text):
                found = haineko.parse_mailboxes(text)
                self.assertEqual([(name, mailbox.addr_spec) for name, mailbox in found], wanted)
        for text in (
            "foo-[redacted]victim@example.net", "<foo>bar@example.net", "a@x b@y", "a:b@x", "x: a@x, y: b@y;;", "(a",
            "a@x)",
            '"a', "<a@x", "a@x <b@y>, c", "a@x>", "<a@x> <b@y>", "<a@x> b", "g:;a", "[a@x]", ":;", "a@x, (",
            "a@x,b@" + "," * 9,
            "a@x," * 2001,
        ):  # fmt: skip
            with self.subTest(text), self.assertRaises(ValueError):
                haineko.parse_mailboxes(text)
        raw = "From: x@example.org\nTo: foo-[redacted]victim@example.net\nSubject: x\n\nMeow\n"
        found = understood({"mail": "x@example.org", "raw": raw}).rcpt
        self.assertEqual(found, ("foo-[redacted]victim@example.net",))
        found = understood(document(rcpt=None, header={"to": "undisclosed-recipients:;", "bcc": "a@x"}))
        self.assertEqual(found.rcpt, ("a@x",))
        message = haineko.compose(found, "Q" * 16, None, NAME, NOW)
        self.assertIn(b"\r\nTo: undisclosed-recipients:;\r\n", message.copy("a@x", 1))

    def test_what_is_expensive(self):
        raw = {"mail": "a@example.org", "rcpt": "b@example.jp"}
        for what, form, parse, make in (
            ("a text", document(body="a mail of lines\n" * 4000), False, False),
            ("a text in Japanese", document(body="猫" * 9000), False, False),
            ("HTML alone", document(body=None, html="<b>x</b>" * 2000), False, True),
            ("a long subject", document(header={"subject": "猫" * 20000}), False, True),
            ("many addresses", document(header={"to": ["猫 <a@b.jp>"] * 1500}), True, True),
            ("many fields", document(header={"x-a": ["é@" * 40] * 999}), True, True),
            ("many files", document(attachments=[file()] * 900), True, True),
            ("a small message", {**raw, "raw": "A: b\n\n" + "x\n" * 2000}, False, False),
            (
                "many parts",
                {**raw, "raw": "Content-Type: multipart/mixed; boundary=b\n\n" + "--b\n\né\n" * 1900},
                True,
                True,
            ),
        ):
            with self.subTest(what):
                self.assertEqual(haineko.is_expensive(as_body(form)), parse)
                self.assertEqual(haineko.is_expensive(understood(form)), make)

    def test_header_fields_that_relays_take_for_commands(self):
        names = ["X-MC-Tags", "x-ses-tenant", "X-SMTPAPI", "X-PM-Tag", "X-MS-Exchange-Foo"]
        given = document(header={**dict.fromkeys(names, "a"), "X-Mailer": "b", "X-MCX": "c"})
        raw = "".join(f"{name} : a\n" for name in names) + "X-MCX: c\n\nx"
        for form in (given, {"mail": "a@example.org", "rcpt": "b@example.jp", "raw": raw}):
            _, *lines = posted(form)[1]["response"][0]["message"]
            wanted = [f"{name.lower()}: the route must have provider_headers to send it" for name in names]
            self.assertEqual([line.lower() for line in lines], wanted)

    def test_what_is_no_address(self):
        for text in (
            "", " ", "a", "@", "a@", "@example.jp", "<a@example.jp>", "A <a@example.jp>", " a@example.jp",
            "a@example.jp ",
            "a b@example.jp", "a@b@example.jp", ".a@example.jp", "a.@example.jp", "a..b@example.jp", "a@.example.jp",
            "a@example..jp", "a@example.jp.", "a@-example.jp", "a@exam ple.jp", "a@example.jp,b@example.jp",
            "a@[1.2.3]",
            "a@[2001:db8::1]", "a@[IPv6:zz]", "a@[IPv6:fe80::1%eth0]", "a@[example.jp]", "a,b@example.jp",
            "a:b@example.jp",
            'a"b@example.jp', '"a"b"@example.jp', '"a@example.jp', '"a\tb"@example.jp', "a@example.jp\r\n",
            "a\0@example.jp",
            "a@exa\nmple.jp", "a\x7f@example.jp", "a\x85@example.jp", "a@faß.de", "a@" + "b" * 64 + ".jp",
            "a" * 250 + "@example.jp", "a@ex(c)ample.jp", "\ud800@example.jp", "a@ｅ ｘ.jp", "a@example.jp\u2028",
        ):  # fmt: skip
            with self.subTest(text):
                self.assertIsNone(haineko.parse_address(text))

    def test_mailboxes_of_a_header(self):
        neko = ("", "neko@example.jp")
        cases = [
            ("neko@example.jp", [neko]),
            ("<neko@example.jp>", [neko]),
            ("Neko<neko@example.jp>", [("Neko", "neko@example.jp")]),
            ("Neko  <neko@example.jp> ", [("Neko", "neko@example.jp")]),
            ("キジトラ <kijitora@example.com>", [("キジトラ", "kijitora@example.com")]),
            ("山田, 太郎 <taro@example.jp>", [("山田, 太郎", "taro@example.jp")]),
            ("Yamada, Taro <taro@example.jp>", [("Yamada, Taro", "taro@example.jp")]),
            ("Dr. N. Eko (vet) <neko@example.jp>", [("Dr. N. Eko (vet)", "neko@example.jp")]),
            ('"Yamada, Taro" <taro@example.jp>', [("Yamada, Taro", "taro@example.jp")]),
            (r'"the \"cat\"" <neko@example.jp>', [('the "cat"', "neko@example.jp")]),
            ('"山田, 太郎" <taro@example.jp>', [("山田, 太郎", "taro@example.jp")]),
            ("neko@example.jp (the cat)", [("the cat", "neko@example.jp")]),
            ("a@example.jp, b@example.jp", [("", "a@example.jp"), ("", "b@example.jp")]),
            ("A <a@example.jp>, B <b@example.jp>", [("A", "a@example.jp"), ("B", "b@example.jp")]),
            ('あ <a@example.jp>, "い, う" <b@example.jp>', [("あ", "a@example.jp"), ("い, う", "b@example.jp")]),
            ("neko@例え.jp", [("", "neko@xn--r8jz45g.jp")]),
            ("neko@[192.0.2.1]", [("", "neko@[192.0.2.1]")]),
            ("Neko <neko@[192.0.2.1]>", [("Neko", "neko@[192.0.2.1]")]),
            ('"ne ko"@example.jp', [("", '"ne ko"@example.jp')]),
            ('Neko <"ne ko"@example.jp>', [("Neko", '"ne ko"@example.jp')]),
            ("=?UTF-8?B?44Kt?= <neko@example.jp>", [("=?UTF-8?B?44Kt?=", "neko@example.jp")]),
            ("", []),
        ]
        for text, wanted in cases:
            for key, name in (("from", "from_"), ("replyto", "replyto")):
                with self.subTest(text, key=key):
                    found = getattr(self.understood({"header": {key: text}}).header, name)
                    self.assertEqual([(shown, item.addr_spec) for shown, item in found], wanted)

    def test_headers_that_hold_no_mailbox(self):
        for text in (
            " ", "Neko", "Neko <>", "Neko <neko>", "neko at example.jp", "Neko neko@example.jp>",
            "<neko@example.jp> Neko", "ね\u202eこ@example.jp", "ねこ <ね\u2028こ@example.jp>",
            "a@example.jp b@example.jp",
            "a@b@c.jp",
            "A <a@example.jp>, B", '"Neko <neko@example.jp>', "Neko <a b@example.jp>", "neko@faß.de", "()", ",",
            "a" * 99999,
            "N\0 <neko@example.jp>", "N\r\nX: y <neko@example.jp>", "Neko <neko@example.jp\n>",
            "Neko <neko@ex\0ample.jp>",
        ):  # fmt: skip
            with self.subTest(text):
                self.assertEqual(
                    len(self.faults({"header": {"from": text}})),
                    2 if re.search("[\n\0]", text) and "<neko@example.jp" not in text else 1,
                )

    def test_names_of_charsets(self):
        cases = [
            ("UTF-8", "UTF-8"), ("utf8", "UTF-8"), ("U8", "UTF-8"), ("iso-2022-jp", "ISO-2022-JP"),
            ("csISO2022JP", "ISO-2022-JP"), ("ISO-8859-1", "ISO-8859-1"), ("latin1", "ISO-8859-1"), ("us-ascii",
            "US-ASCII"),
            ("ASCII", "US-ASCII"), ("ISO-8859-15", "ISO-8859-15"), ("windows-1252", "windows-1252"), ("cp1252",
            "windows-1252"),
            ("Shift_JIS", "Shift_JIS"), ("cp932", "Windows-31J"), ("EUC-JP", "EUC-JP"), ("gb18030", "GB18030"),
            ("Big5", "Big5"), ("KOI8-R", "KOI8-R"), ("EUC-KR", "EUC-KR"), ("big5-hkscs", "Big5-HKSCS"),
            ("iso2022_kr", "ISO-2022-KR"), ("macintosh", "macintosh"), ("mac_roman", "macintosh"),
            ("kz_1048", "KZ-1048"),
            ("iso-2022-jp-2", "ISO-2022-JP-2"), ("cp437", "IBM437"), ("latin9", "ISO-8859-15"), ("cp950", "Big5"),
        ]  # fmt: skip
        for name, wanted in cases:
            with self.subTest(name):
                self.assertEqual(haineko.iana_charset(name), wanted)
                self.assertTrue(wanted.encode("ascii").decode().replace("-", "").replace("_", "").isalnum())
        for name in ("", "x", "UTF-16", "utf-7", "utf-8-sig", "idna", "punycode", "rot13", "iso-2022-jp-1",
                     "iso-2022-jp-3",
                     "iso-2022-jp-ext", "mac_greek", "johab", "cp1125", "koi8-t", "shift_jis_2004",
                     "base64", "hex", "zlib",
                     "hz",
                     "cp037", "undefined", "unicode_escape", "raw_unicode_escape", "mbcs", "utf-8\r\nX: y", "utf-8\0",
                     "utf 8", "ねこ", "../utf8", "a" * 1000):  # fmt: skip
            with self.subTest(name):
                self.assertEqual(haineko.iana_charset(name), "")

    def test_every_charset_of_python_that_is_taken_can_be_written(self):
        import encodings.aliases

        names = {
            haineko.iana_charset(name) for name in {*encodings.aliases.aliases, *encodings.aliases.aliases.values()}
        }
        self.assertGreater(len(names), 50)
        for name in names - {""}:
            with self.subTest(name):
                form = document(header={"subject": "é 日本", "charset": name}, body="Meow\n")
                form["header"]["from"] = "kijitora@example.org"
                self.assertIn(b"charset=", composed(form))
                self.assertEqual(haineko.decode_charset(b"Meow", name), "Meow")
        for name in ("ISO-2022-JP-2", "ISO-2022-KR"):
            octets = composed(document(header={"subject": "\x1b\x0e", "charset": name}, body="\x1b$A\x1b.A\x0e"))
            self.assertIn(b"charset=UTF-8", octets)
        for name in ("EUC-JP", "Shift_JIS"):  # whose codecs write a backslash for it
            octets = composed(document(header={"subject": "x", "charset": name}, body="¥1,980\n"))
            self.assertIn(b"charset=UTF-8", octets)

    def test_a_list_of_mailboxes_loses_none(self):
        for text, wanted in (
            ("a@example.jp, B <b@example.jp>", ["a@example.jp", "b@example.jp"]),
            ("B <b@example.jp>, a@example.jp", ["b@example.jp", "a@example.jp"]),
            ("b@example.jp <c@example.jp>", ["c@example.jp"]),
            ("Yamada, Taro <taro@example.jp>", ["taro@example.jp"]),
        ):
            with self.subTest(text):
                found = understood(document(rcpt=None, header={"subject": "x", "to": text}))
                self.assertEqual(list(found.rcpt), wanted)
                raw = f"From: x@example.org\nTo: {text}\nCc: undisclosed-recipients:;\nSubject: x\n\nMeow\n"
                self.assertEqual(list(understood({"mail": "x@example.org", "raw": raw}).rcpt), wanted)
        raw = "From: x@example.org\nTo: a@example.jp\nCc: c@example.jp <d@example.jp> e\nSubject: x\n\nMeow\n"
        rcpt = understood({"mail": "x@example.org", "raw": raw}).rcpt  # versions of Python read this Cc in several ways
        self.assertEqual(rcpt[0], "a@example.jp")
        self.assertGreater(len(rcpt), 1)

    def test_a_field_of_comments_in_comments_is_refused_and_not_lost(self):
        deep = "\n ".join(["(" * 900] * 20)
        rcpt = understood({"mail": "x@example.org", "raw": f"To: a@example.jp\nCc: {deep}\nSubject: x\n\nMeow\n"}).rcpt
        self.assertEqual((rcpt[0], len(rcpt)), ("a@example.jp", 2))

    def test_what_is_too_long_in_ascii_is_no_address(self):
        self.assertIsNone(haineko.parse_address("a" * 150 + "@" + "é." * 20 + "jp"))
        found = haineko.parse_address("a" * 50 + "@" + "é." * 15 + "jp")
        self.assertEqual(haineko.parse_address(found.addr_spec).addr_spec, found.addr_spec)

    def test_jis_in_lists_without_end_is_refused(self):
        form = document(header={"subject": "x", "charset": "ISO-2022-JP"}, body="\x1b")
        form["header"]["x-haineko-loop"] = []
        deep = json.dumps(form).replace("[]", "[" * 3000 + "]" * 3000)
        self.assertEqual(haineko.parse_submission(deep.encode())[1], ["nested too deeply"])

    def test_long_names_of_what_a_message_passed_are_not_remembered(self):
        raw = f"From: x@example.org\nX-Haineko-Loop: {'x' * 900}\n {'x' * 900},\n a.example\nSubject: x\n\nMeow\n"
        self.assertEqual(
            understood({"mail": "x@example.org", "rcpt": "a@b.jp", "raw": raw}).header.loop, ("a.example",)
        )

    def test_a_long_name_and_an_encoded_word_are_two_lines(self):
        for name in ("X-" + "a" * 72, "X-" + "a" * 52):
            lines = haineko.text_field(name, "猫" * 40, "ISO-2022-JP").split("\r\n")
            self.assertLess(max(map(len, lines)), 77)
            self.assertNotIn("?B??=", "".join(lines))

    def test_names_that_a_mail_has_passed(self):
        cases = [
            ("a.example", ("a.example",)),
            ("a.example, b.example", ("a.example", "b.example")),
            ([], ()),
            ("", ()),
            (["a.example", "b.example,c.example"], ("a.example", "b.example", "c.example")),
            ([" a "], ("a",)),
        ]
        for value, wanted in cases:
            with self.subTest(value):
                self.assertEqual(self.understood({"header": {"x-haineko-loop": value}}).header.loop, wanted)

    JIS = (
        ("\x1b$B$M$3\x1b(B", "ねこ"),
        ("\x1b$@$M$3\x1b(J", "ねこ"),
        ("cat \x1b$B$M$3\x1b(B cat \x1b$B$M$3\x1b(B", "cat ねこ cat ねこ"),
        ("\x1b(I6^\x1b(B", "ｶﾞ"),
        ("\x1b$B-!\x1b(B", "①"),
        ("\x1b$B|b\x1b(B", "髙"),
        ("\x1b$B-j\x1b(B", "㈱"),
        ("\x1b$B!A\x1b(B", "～"),
        ("a\x1b(Jb\x1b(Bc", "abc"),
        ("\x1b(J\\100~\x1b(B\\", "¥100‾\\"),
        ("plain", "plain"),
    )

    def test_strings_that_hold_iso_2022_jp(self):
        for held, meant in self.JIS:
            escaped = document(body=held, header={"subject": held, "charset": "ISO-2022-JP"})
            spelt = json.dumps(escaped, ensure_ascii=False).encode().replace(b"\\u001b", b"\x1b")
            for form, octets in (("escaped", as_body(escaped)), ("raw", spelt)):
                with self.subTest(held, form=form):
                    found = self.understood(octets)
                    self.assertEqual((found.header.subject, found.body), (meant, meant))

    def test_names_that_hold_iso_2022_jp(self):
        held = "\x1b$B%-%8%H%i\x1b(B <kijitora@example.com>"
        header = {"from": held, "replyto": held, "charset": "iso-2022-jp"}
        found = self.understood(as_body(document(header=header)).replace(b"\\u001b", b"\x1b")).header
        self.assertEqual([(name, item.addr_spec) for name, item in found.from_], [("キジトラ", "kijitora@example.com")])
        self.assertEqual(found.replyto, found.from_)

    def test_strings_that_say_so_and_are_not(self):
        cases = [
            ("\x1b$B$\x1b(B", "ends within a character"),
            ("\x1b$B$M\nx\x1b(B", "isn't"),
            ("\x1b$B \x1b(B", ""),
            ("\x1b$B~~\x1b(B", "unassigned"),
            ("\x1b$(D0!\x1b(B", "not ISO-2022-JP's"),
        ]
        for held, words in cases:
            for key, change in (("body", {"body": held}), ("header.subject", {"header": {"subject": held}})):
                with self.subTest(held, key=key):
                    submission = document(**change)
                    submission["header"]["charset"] = "ISO-2022-JP"
                    faults = self.faults(submission)
                    self.assertEqual(len(faults), 1, faults)
                    self.assertTrue(faults[0].startswith(f"{key}: ") and words in faults[0], faults)

    def test_escapes_mean_nothing_in_other_charsets(self):
        found = self.understood(document(body="\x1b$B$M$3\x1b(B"))
        self.assertEqual(found.body, "\x1b$B$M$3\x1b(B")
        found = self.understood(document(body="ね\x1b$B$M$3\x1b(B", header={"charset": "ISO-2022-JP"}))
        self.assertEqual(found.body, "ね\x1b$B$M$3\x1b(B")


FAULTS = [
    ({"html": 1}, "html: expected a string, got a number"),
    ({"attachments": "x"}, "attachments: expected an object, got a string"),
    ({"attachments": [file(), "x"]}, "attachments[1]: expected an object, got a string"),
    ({"attachments": [{"filename": "a"}]}, "attachments[0].content: is missing"),
    ({"attachments": [{"content": None}]}, "attachments[0].content: is missing"),
    ({"attachments": [file(), file(), {"content": "a*b="}]}, "attachments[2].content: is not base64"),
    ({"attachments": [{"content": 1}]}, "attachments[0].content: expected a string, got a number"),
    *[({"attachments": [{"content": text}]}, "attachments[0].content: is not base64") for text in
      ("a", "ab", "abc", "ab=c", "a===", "====", "abcd=", "ab==cdef", "YWJj-_==", "猫猫猫猫", "abcd!!!!", "=abc",
       "ab\0c")],
    ({"attachments": [file(name="a.pdf")]}, 'attachments[0].name: unknown key; did you mean "filename"?'),
    *[({"attachments": [file(name)]}, f'attachments[0].filename: expected a name without a path, got "{name}"')
      for name in ("a/b", "../x", "C:\\x", "..", ".", "/")],
    *[({"attachments": [file(f"a{odd}b")]}, "attachments[0].filename: has a control character")
      for odd in "\0\r\n\t\x1b\x7f\x85\u2028\u202e\u2066"],
    ({"attachments": [file("a\r\nBcc: x@example.jp")]}, "attachments[0].filename: has a control character"),
    ({"attachments": [file("x" * 256)]}, "attachments[0].filename: 256 characters exceed the limit of 255"),
    *[({"attachments": [file(type=kind)]}, "attachments[0].type: expected a media type like")
      for kind in ("pdf", "a/b/c", "a/b; c", "a/b; c=é", "text/plain; a=\"", "a /b", "a/", "/b", "猫/b", "a/b;c=d e",
          "a/b" * 99)],
    ({"attachments": [file(type="a/b\r\nBcc: x@example.jp")]}, "attachments[0].type: has a CR, LF or NUL"),
    ({"attachments": [file(type="multipart/mixed; boundary=x")]},
     "attachments[0].type: multipart/mixed can't be attached"),
    ({"attachments": [file(type="message/partial")]}, "attachments[0].type: message/partial can't be attached"),
    ({"attachments": [file(octets="猫".encode(), type="message/rfc822")]},
     "attachments[0].type: message/rfc822 must be ASCII"),
    ({"attachments": [file(octets=b"x" * 999, type="message/rfc822")]},
     "attachments[0].type: message/rfc822 must be ASCII"),
    ({"attachments": [file(octets=b"x\ry", type="message/rfc822")]},
     "attachments[0].type: message/rfc822 must be ASCII"),
    *[({"attachments": [file(cid=cid)]}, "attachments[0].cid: ") for cid in ("a b", "a>b", "猫", "<a", "a\r\nBcc: x",
      "x" * 201, 1)],
    ({"html": "<img src='cid:logo'>"}, 'html: "cid:logo" has no attachment with this cid'),
    ({"html": "x", "attachments": [file(cid="logo")]}, 'attachments[0].cid: the HTML has no "cid:logo"'),
    ({"attachments": [file(contentType="a/b")]}, 'attachments[0].contentType: unknown key; did you mean "type"?'),
    ({"attachments": [file(cid="a"), file(cid="<a>")]}, "attachments[1].cid: another attachment has it already"),
    ({"attachments": [file(inline="yes")]}, "attachments[0].inline: expected true or false, got a string"),
    ({"attachments": [file()] * 1001}, "attachments: 1001 exceed the limit of 1000"),
    *[({"header": {key.partition("[")[0]: value}}, f"header.{key}: {said}") for key, value, said in [
        ("to", "a", 'expected "name <address>"'), ("cc[1]", ["a@example.jp", 1], "expected a string"),
        ("to", "a@straße.de", 'expected "name <address>", got "a@straße.de"; U+00DF has two readings in a domain'),
        ("from", "A <a@x>\r\nBcc: b@x", "has a CR, LF or NUL"),
        ("bcc", {"a": 1}, "expected a string, got an object"), ("message-id", "a@b", 'expected "<left@right>"'),
        ("Message_ID", "<a b@c>", 'expected "<left@right>"'), ("message-id", "<a@b> <c@d>",
         'expected "<left@right>"'),
        ("references[1]", ["<a@b>", "c"], 'expected "<left@right>'), ("in-reply-to", 1, "expected a string"),
        ("date", "2014-01-03", "expected a date like"),
        ("date", "Fri, 31 Feb 2014 18:35:58 +0900", "expected a date like"),
        ("date", "Fri, 03 Jan 2014 18:35:58 +0900\n", "has an unprintable character"), ("importance", "urgent",
         "expected high or normal or low"),
        ("auto-submitted", "猫", "expected printable ASCII"), ("List-Unsubscribe", "<https://x/猫>",
         "expected printable ASCII"),
        ("precedence", "bulk\0", "has an unprintable character"), ("organization", "a\nb", "has a CR, LF or NUL"),
        ("x-a", 1, "expected a string, got a number"), ("x-a[1]", ["a", "b\r\nBcc: c"], "has a CR, LF or NUL"),
        ("x-a", {"b": 1}, "expected a string, got an object"), ("disposition-notification-to", "a",
         'expected "name <address>"'),
        ("resent-to", "a@example.jp", "unknown key"), ("x-", "a", "unknown key"), ("x-a b", "a", "unknown key"),
        ("x-a:", "a", "unknown key"), ("x-" + "a" * 73, "a", "unknown key"), ("X-猫", "a", "unknown key"),
        ("mail", "a", "unknown key"), ("organisation", "a", 'unknown key; did you mean "organization"?'),
        *[(key, "a", "Haineko makes this field itself") for key in (
            "received", "Sender", "Return-Path", "return_path", "MIME-Version", "Content-Type", "content_disposition",
            "Content-Transfer-Encoding", "DKIM-Signature", "Content-猫")],
    ]],
    ({"header": {"x-a\r\nbcc": "a"}}, "header.x-a??bcc: unknown key"),
    ({"header": {"x-a": ["a"] * 1001}}, "header: more than 1000 fields or 102400 characters"),
    ({"header": {f"x-{i}": "a" for i in range(1001)}}, "header: more than 1000 fields or 102400 characters"),
    ({"header": {"x-a": ["a" * 1000] * 103}}, "header: more than 1000 fields or 102400 characters"),
    ({"header": {"to": ["a@b"] * 2001}}, "header.to: 2001 addresses exceed the limit of 2000"),
    ({"header": {"to": "a@b," * 2001}}, 'header.to: expected "name <address>"'),
    ({"header": {"replyto": "a@example.jp", "Reply-To": "b@example.jp"}},
     "header.Reply-To: means the same as replyto, which is set already"),
    ({"header": {"x-a": "1", "X_A": "1"}}, "header.X_A: means the same as x-a, which is set already"),
    ({"raw": "From: a@example.jp\n\nx", "header": {"subject": "x"}}, "header: can't stand beside raw"),
    *[({"raw": "A: b\n\nx", key: value}, f"{key}: can't stand beside raw")
      for key, value in (("body", "x"), ("html", "x"), ("attachments", []))],
    *[({"raw": raw}, said) for raw, said in [
        (1, "raw: expected a string, got a number"), ({"base64": "*"}, "raw.base64: is not base64"),
        ({"base64": 1}, "raw.base64: expected a string"), ({"bas64": ""},
         'raw.bas64: unknown key; did you mean "base64"?'),
        ("A: b\nhello\nC: d\n\nx", 'raw: line 2 is neither a header field nor the empty line behind them: "hello"'),
        ("no header\n", "raw: has no header"), ("A: b\rBcc: c\n\nx", "raw: header A: has a CR or NUL"),
        ("A: b\0\n\nx", "raw: header A: has a CR or NUL"), ("A: " + "x" * 998 + "\n\nx",
         "raw: header A: has a line longer than 998"),
        ("\ud800", "raw: has half a surrogate pair at character 0")]],
]  # fmt: skip


class Later(Quiet):
    def test_send_at(self):
        cases = (
            (1798113600, 1798113600),
            (0, 0),
            (-5, -5),
            ("2026-12-24T12:00:00Z", 1798113600),
            ("2026-12-24T21:00:00+09:00", 1798113600),
            ("2026-12-24T21:00+0900", 1798113600),
            ("2026-12-24T07:30:00.250-04:30", 1798113600.25),
            ("2026-12-24T12:00:00", None),
            ("2026-12-24", None),
            ("2026-02-30T12:00:00Z", None),
            ("2026-12-24T12:00:00Z ", None),
            ("tomorrow", None),
            ("", None),
            (1798113600.5, None),
            (True, None),
            ([], None),
        )
        for value, wanted in cases:
            with self.subTest(value):
                found, errors, _ = haineko.parse_submission(as_body(document(send_at=value)))
                self.assertEqual(found and found.send_at, wanted)
                self.assertEqual([error.partition(":")[0] for error in errors], [] if found else ["send_at"])

    def test_send_at_needs_a_queue_and_30_days(self):
        days = 30 * 86400
        for value, why in ((int(NOW), "send_at"), (0, "send_at"), (int(NOW) + days + 2, "send_at: expected a time at")):
            with self.subTest(value):
                status, found = posted(document(send_at=value))
                self.assertEqual(status, 400)
                self.assertIn(why, found["response"][0]["message"][1])


class PartsRefused(Quiet):
    def test_faults(self):
        for changes, wanted in FAULTS:
            submission = document() if "raw" not in changes else {"mail": "a@example.org", "rcpt": "b@example.jp"}
            submission = {
                **submission,
                **changes,
                "header": {**submission.get("header", {}), **(changes.get("header") or {})},
            }
            submission["header"] = submission["header"] or None
            with self.subTest(str(changes)[:100]):
                _, faults, _ = haineko.parse_submission(as_body(submission))
                self.assertTrue(faults)
                self.assertIn(wanted, faults[0])
                self.assertEqual({fault.partition(":")[0] for fault in faults}, {faults[0].partition(":")[0]})
                self.assertNotRegex("".join(faults), r"[\r\n\0]")

    def test_a_key_twice_and_a_key_unknown_are_both_named(self):
        body = b'{"mail": "a@b", "rcpt": ["c@d"], "header": {"subject": "1", "subject": "2", "Foo": 1, "X-a": "1"}}'
        self.assertEqual(
            haineko.parse_submission(body)[1], ["header.subject: duplicate key", "header.Foo: unknown key"]
        )

    def test_what_is_empty(self):
        for changes, wanted in [
            ({"body": None, "html": ""}, "Message body is empty"), ({"body": None, "attachments": [file()]},
             "Message body is empty"),
            ({"html": "x", "header": {"subject": ""}}, "Subject header is empty"), ({"rcpt": [],
             "header": {"to": "a@b.jp"}},
             "User address required"), ({"rcpt": None}, "User address required"),
            ({"rcpt": None, "header": {"bcc": "a@straße.de"}}, "Invalid submission"),
        ]:  # fmt: skip
            with self.subTest(wanted):
                status, answer = posted(document(**changes))
                self.assertEqual((status, answer["response"][0]["message"][0]), (400, wanted))
        status, answer = posted({"mail": "a@example.org", "rcpt": "b@example.jp", "raw": ""})
        wanted = ["Message body is empty", "raw: it has no header fields"]
        self.assertEqual((status, answer["response"][0]["message"]), (400, wanted))

    def test_the_size_is_that_of_the_finished_message(self):
        submission = document(attachments=[file("a.bin", b"x" * 30000)])
        size = len(composed(submission))
        for limit, status in ((size, 200), (size - 1, 413)):
            force = settings(smtpd={"hostname": NAME, "max_message_size": limit})
            self.assertEqual(posted(submission, force)[0], status)


class RawMessages(Quiet):
    HEAD = (
        "From: a@example.org\nTo: A <a@example.jp>,\n b@example.jp\nCc: c@example.jp\nBcc: d@example.jp\nSubject: Nya\n"
    )

    def raw(self, message, **more) -> dict:
        return {"mail": "kijitora@example.org", "raw": message, **more}

    def test_what_is_put_on_and_what_is_taken_off(self):
        octets = composed(
            self.raw(self.HEAD + "Return-Path: <x>\nX-Haineko-Loop: r1,\n r2\n\nMeow.\n.\n", rcpt="z@example.jp")
        )
        names = [line.partition(b":")[0] for line in re.split(rb"\r\n(?![ \t])", octets.partition(b"\r\n\r\n")[0])]
        self.assertEqual(names, [b"Received", b"From", b"To", b"Cc", b"Subject", b"Date", b"Message-Id",
                                 b"X-Haineko-Loop"])  # fmt: skip
        self.assertIn(f"\r\nX-Haineko-Loop: r1, r2, {NAME}\r\n".encode(), octets)
        self.assertIn(b" with HTTP id QQQQQQQQQQQQQQQQ;", octets)
        self.assertTrue(octets.endswith(b"\r\n\r\nMeow.\r\n.\r\n"))

    def test_what_it_says_itself_stays(self):
        head = (
            "Received: x\nMessage-ID: <a@b>\nDate: Fri, 3 Jan 2014 18:35:58 +0900\nFrom: a@example.org\nX-Odd:  y  \n"
        )
        head += "Subject: " + "s " * 60 + "\nMIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=XX\n\n"
        body = "--XX\nContent-Type: text/plain\n\nFrom a\n\n--XX--\n"
        for form in (
            head + body,
            (head + body).replace("\n", "\r\n"),
            {"base64": base64.b64encode((head + body).encode()).decode()},
        ):
            octets = composed(self.raw(form, rcpt="z@example.jp"))
            for line in head.split("\n")[:-2]:
                self.assertIn(f"\r\n{line}\r\n".encode(), octets)
            self.assertTrue(octets.endswith(b"\r\n\r\n" + body.replace("\n", "\r\n").encode()))
            self.assertEqual((octets.lower().count(b"\r\nmessage-id:"), octets.count(b"\r\nDate:")), (1, 1))

    def test_bodies_that_no_line_can_hold(self):
        kinds = ["text/html; charset=UTF-8", "text/plain", "application/x-cat", "text/html; charset=bogus"]
        for kind in kinds:
            for coding in ("", "Content-Transfer-Encoding: 8bit\n", "Content-Transfer-Encoding: binary\n"):
                for body in ("x" * 2000 + "\n", "猫\n" + "y" * 999 + "\n", "a\0b\n"):
                    with self.subTest(kind, coding=coding, body=body[:3]):
                        octets = composed(self.raw(f"{self.HEAD}Content-Type: {kind}\n{coding}\n{body}"))
                        self.assertLessEqual(max(map(len, octets.split(b"\r\n"))), 998)
                        self.assertNotIn(b"\0", octets)
                        found = email.message_from_bytes(octets)
                        lines = body if "binary" in coding and "x-cat" in kind else body.replace("\n", "\r\n")
                        self.assertEqual(found.get_payload(decode=True), lines.encode())
                        self.assertEqual((found["subject"], found.get_content_type()), ("Nya", kind.partition(";")[0]))

    def test_a_line_that_nothing_can_shorten_is_refused(self):
        body = "--XX\nContent-Type: text/plain\nX-Long: " + "x" * 999 + "\n\na\n--XX--\n"
        status, answer = posted(self.raw(f"{self.HEAD}Content-Type: multipart/mixed; boundary=XX\n\n{body}"))
        self.assertEqual((status, answer["response"][0]["code"], answer["response"][0]["message"]),
                         (400, "554", ["Message has a NUL, or a line longer than 998 octets"]))  # fmt: skip

    def test_recipients_and_loops(self):
        found = understood(self.raw(self.HEAD + "\nx"))
        self.assertEqual(found.rcpt, ("a@example.jp", "b@example.jp", "c@example.jp", "d@example.jp"))
        self.assertEqual(understood(self.raw(self.HEAD + "\nx", rcpt=["z@example.jp"])).rcpt, ("z@example.jp",))
        for value, status in ((NAME, 400), (", ".join(f"r{i}" for i in range(26)), 400), ("r1", 200)):
            self.assertEqual(posted(self.raw(f"A: b\nX-Haineko-Loop: {value}\n\nx", rcpt="a@example.jp"))[0], status)

    def test_in_seven_bits(self):
        """What is said to a server that knows ASCII only is what was given."""
        head = "From: 猫 <a@example.org>\nTo: =?UTF-8?B?54yr?= <b@example.jp>\nSubject: 謹賀新年\nX-A: b\n"
        head += "MIME-Version: 1.0\n"
        part = (
            'Content-Type: application/pdf; name="猫.pdf"\nContent-Disposition: attachment; filename="猫.pdf"\n\n%PDF\n'
        )
        text = "Content-Type: text/plain; charset=UTF-8\nContent-Transfer-Encoding: 8bit\n\n猫\n"
        body = f"--XX\n{text}--XX\n{part}--XX--\n"
        octets = (head + "Content-Type: multipart/mixed; boundary=XX\n\n" + body).replace("\n", "\r\n").encode()
        found = haineko.downgrade_8bit(octets)
        self.assertTrue(found.isascii())
        message = parsed(found)
        self.assertEqual((message["from"], message["to"], message["subject"], message["x-a"]),
                         ("猫 <a@example.org>", "猫 <b@example.jp>", "謹賀新年", "b"))  # fmt: skip
        self.assertEqual(text_in(message.get_payload(0)), "猫")
        self.assertEqual(message.get_payload(1).get_filename(), "猫.pdf")
        self.assertEqual(message.get_payload(1).get_payload(decode=True), b"%PDF")
        for field in ("From: 猫@example.org", "Cc: A <猫@example.org>, b@example.jp"):
            self.assertFalse(haineko.downgrade_8bit(f"{field}\r\n\r\nx\r\n".encode()).isascii())

    def sent(self, octets: bytes, downgraded: tuple = ()) -> bytes:
        """A finished message as it leaves, to a path without SMTPUTF8 and 8BITMIME where `downgraded` says so."""
        found = composed(self.raw({"base64": base64.b64encode(octets).decode()}, rcpt="a@example.jp"))
        return haineko.downgrade_8bit(found, *downgraded) if downgraded else found

    HEAD_ALONE = (
        b"From: a@example.org\r\nTo: b@example.jp\r\nDate: Fri, 3 Jan 2014 18:35:58 +0900\r\nMessage-ID: <a@b>\r\n"
    )

    def test_what_a_path_can_carry_stays(self):
        mime = (
            b"MIME-Version: 1.0\r\nContent-Type: text/plain; charset=iso-8859-1\r\nContent-Transfer-Encoding: 8bit\r\n"
        )
        parts = b"MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n"
        parts += b"for nobody\r\n--b\r\n\r\nx  \r\n--b \r\n"
        for what, message in (
            ("a line of 79", b"\r\n" + b"a" * 79 + b"\r\n"),
            ("a line of 998 and a form feed", b"\r\n\f" + b"a" * 997 + b"\r\n"),
            ("ISO-2022-JP", b'\r\n\x1b$B$"$$\x1b(B\r\n'),
            ("8 bits", mime + b"\r\nGr\xfc\xdfe\r\n"),
            ("parts", parts + b"Content-Type : image/png\r\n\r\n\x89\r\n--b--\r\n\r\n"),
            ("a quoted boundary", parts.replace(b"=b", b'="b"') + b"\r\nx\r\n--b--"),
        ):
            with self.subTest(what):
                octets = b"Subject:  x\r\n" + message
                found = self.sent(self.HEAD_ALONE + octets)
                head, _, body = octets.partition(b"\r\n\r\n")
                self.assertIn(b"\r\n" + self.HEAD_ALONE + head + b"\r\nX-Haineko-Loop", found)
                self.assertTrue(found.endswith(b"\r\n\r\n" + body + (b"" if body.endswith(b"\r\n") else b"\r\n")))

    def test_blanks_before_a_colon(self):
        found = self.sent(b"From : A <a@example.org>\r\nSubject\t : x\r\nX-A: b\r\n\r\n\xc3\xa9\r\n")
        self.assertIn(b"\r\nFrom: A <a@example.org>\r\nSubject: x\r\nX-A: b\r\n", found)
        self.assertEqual(found.count(b"From"), 1)

    def test_octets_in_a_header(self):
        for what, field, wanted in (
            ("a parameter", "Content-Type: text/plain; name=café.txt; x=y",
             "text/plain;\r\n name*=UTF-8''caf%C3%A9.txt; x=y"),
            ("a quoted one", 'Content-Disposition: attachment; filename="é\\".txt"; size=1',
             "attachment;\r\n filename*=UTF-8''%C3%A9%22.txt; size=1"),
            ("two", "Content-Type: a/b; x=é; y=é", "a/b;\r\n x*=UTF-8''%C3%A9;\r\n y*=UTF-8''%C3%A9"),
            ("an extended one", "Content-Type: a/b; x*=UTF-8''a%20é; y=z", "a/b; x*=UTF-8''a%20%C3%A9; y=z"),
            ("one in both forms", "Content-Disposition: a; filename=\"é\"; Filename*=UTF-8''%C3%A9; x=y",
             "a; Filename*=UTF-8''%C3%A9; x=y"),
            ("a comment", "Date: Sat, 28 Nov 2026 12:00:00 +0200 (Mitteleuropäische Zeit)",
             "Sat, 28 Nov 2026 12:00:00 +0200 (=?UTF-8?B?TWl0dGVsZXVyb3DDpGlzY2hlIFplaXQ=?=)"),
            ("Received", "Received: from a (é [192.0.2.1]) by b; x",
             "from a (=?UTF-8?B?w6kgWzE5Mi4wLjIuMV0=?=) by b; x"),
            ("words beside words", "Subject: =?UTF-8?Q?a?= é =?UTF-8?Q?b?=",
             "=?UTF-8?Q?a?= =?UTF-8?B?IMOpIA==?= =?UTF-8?Q?b?="),
            ("an empty group", "Cc: é:;", "=?UTF-8?B?w6k=?= :;"),
            ("a group", 'Cc: "é ü": a@x.jp, ö <b@x.jp> (ä), c@x.jp;',
             "=?UTF-8?B?w6kgw7w=?= : a@x.jp, =?UTF-8?B?w7Y=?= <b@x.jp>\r\n (=?UTF-8?B?w6Q=?=), c@x.jp;"),
            ("a name", "Reply-To: é <a@example.jp>", "=?UTF-8?B?w6k=?= <a@example.jp>"),
            ("octets of an unknown charset", "X-A: a é".encode("latin-1"), "=?unknown-8bit?B?YSDp?="),
            ("these in a name", "Cc: é <b@x.jp> (ü)".encode("latin-1"),
             "=?unknown-8bit?B?6Q==?= <b@x.jp> (=?unknown-8bit?B?/A==?=)"),
            ("an encoded word", b"Subject: =?iso-8859-1?Q?Gr\xfc=DFe?=", "=?iso-8859-1?Q?Gr=FC=DFe?="),
            ("one beside octets", "Subject: =?UTF-8?Q?ü=C3=BC?= ä",
             "=?UTF-8?Q?=C3=BC=C3=BC?= =?UTF-8?B?IMOk?="),
        ):  # fmt: skip
            with self.subTest(what):
                octets = field if isinstance(field, bytes) else field.encode()
                found = self.sent(b"From: a@example.org\r\n" + octets + b"\r\n\r\nx\r\n", (True,))
                self.assertTrue(found.isascii())
                self.assertIn(f"\r\n{octets.partition(b':')[0].decode()}: {wanted}\r\n".encode(), found)

    def test_fields_take_time_by_their_length_only(self):
        for shape in ("é,", "é ", '"é",', "é:a@b,", "(é)", "<é>"):
            seconds = []
            for count in (4000, 32000):
                octets = b"To: " + (shape * count).encode() + b"\r\n"
                began = time.process_time()
                haineko.encode_field("to", octets, "")
                seconds.append(time.process_time() - began)
            with self.subTest(shape, seconds=seconds):
                self.assertLess(seconds[1], 24 * max(seconds[0], 0.01))  # 8 times as long, not 64

    def test_octets_in_a_header_that_have_no_form_in_ascii(self):
        for field in ("Message-ID: <ü@example.org>", "References: <é@b>", "From: é@example.org", "Content-ID: <é>"):
            with self.subTest(field):
                octets = f"X-A: é\r\n{field}\r\n\r\nx\r\n".encode()
                found = haineko.downgrade_8bit(octets)
                self.assertEqual(haineko.non_ascii_fields(found), [field.partition(":")[0].lower()])
                if not field.startswith("From"):
                    octets = {"base64": base64.b64encode(field.encode("latin-1") + b"\n\nx").decode()}
                    faults = haineko.parse_submission(as_body(self.raw(octets))).errors
                    self.assertEqual(len(faults), 1)
                    self.assertIn(f"header {field.partition(':')[0]}: ", faults[0])

    def test_header_and_body_are_changed_each_on_its_own(self):
        head = b"MIME-Version: 1.0\r\nContent-Type: text/plain; charset=gb2312\r\nContent-Transfer-Encoding: 8bit\r\n"
        body = "\r\n中文\r\n".encode("gb2312")
        for downgraded in ((), (True,)):
            found = self.sent(self.HEAD_ALONE + "Subject: 中文\r\n".encode("gb2312") + head + body, downgraded)
            self.assertIn(b"\r\nSubject: =?UTF-8?B?5Lit5paH?=\r\n" + head, found)
            self.assertTrue(found.endswith(b"\r\n" + body))
        found = self.sent(self.HEAD_ALONE + "Subject: 中文\r\n".encode() + head + body)
        self.assertIn("\r\nSubject: 中文\r\n".encode(), found)
        self.assertTrue(haineko.downgrade_8bit(found).isascii())
        self.assertEqual(haineko.downgrade_8bit(found, True).partition(b"\r\n\r\n")[2], body[2:])

    def test_binary(self):
        picture = b"\x89PNG\r\n\x1a\n\r\r\n\0--b"
        kind = b"Content-Type: image/png\r\nContent-Transfer-Encoding: Binary\r\n\r\n" + picture
        alone = parsed(self.sent(self.HEAD_ALONE + b"MIME-Version: 1.0\r\n" + kind))
        self.assertEqual(alone.get_payload(decode=True), picture)
        mixed = b"MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=b\r\n"
        mixed += b"Content-Transfer-Encoding: binary\r\n\r\n"
        octets = self.sent(self.HEAD_ALONE + mixed + b"--b\r\n\r\nx\r\n--b\r\n" + kind + b"\r\n--b--\r\n")
        self.assertNotIn(b"inary", octets)
        text, image = parsed(octets).get_payload()
        self.assertEqual((text.get_payload(), image.get_payload(decode=True)), ("x", picture))

    def test_what_cannot_be_parsed_is_sent_or_refused(self):
        deep = b"Content-Type: message/rfc822\n\n"
        nested = b"".join(b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (i, i) for i in range(200))
        for what, octets, refused in (
            ("base64 with NUL", b"MIME-Version: 1.0\nContent-Transfer-Encoding: base64\n\nAAA\0A", None),
            ("a multipart without parts", b"Content-Type: multipart/mixed; boundary=b\n\n\xe9", None),
            ("half a parameter", b"Content-Type: text/plain; a*\n\n" + b"x" * 2000, None),
            ("a charset unheard of", b'Subject: \xe9\nContent-Type: text/plain; charset="x\n\n' + b"\xe9" * 999, None),
            ("messages in messages", deep * 3000 + b"x", "levels of parts exceed the limit of 100"),
            ("multiparts in multiparts", nested, "levels of parts exceed the limit of 100"),
            (
                "parts",
                b"Content-Type: multipart/mixed; boundary=b\n\n" + b"--b\n\n" * 2001,
                "parts exceed the limit of 2000",
            ),
            ("fields", b"a:\n" * 1001, "fields in a header exceed the limit of 1000"),
            ("a large header", b"a: " + b"x\n " * 40000, "octets of a header exceed the limit of 102400"),
            ("parameters", b"Content-Type: a/b" + b";\n a=b" * 10001, None),
        ):
            with self.subTest(what):
                form = self.raw({"base64": base64.b64encode(octets).decode()}, rcpt="a@example.jp")
                faults = haineko.parse_submission(as_body(form)).errors
                if refused:
                    self.assertEqual(len(faults), 1)
                    self.assertIn(refused, faults[0])
                    continue
                made = composed(form)
                for found in (made, haineko.downgrade_8bit(made), haineko.downgrade_8bit(made, True)):
                    self.assertTrue(found.endswith(b"\r\n"))
                    self.assertIsNone(re.search(rb"\0|[^\r\n]{999}", found))
                self.assertTrue(haineko.downgrade_8bit(made).isascii())


# ======================================================================================================================
# 6. Policy
# ======================================================================================================================


class Row:
    """A row of the table of refusals: a fault made in a submission, in what carries it or in the settings."""

    def __init__(
        self, what: str, status: int, code: str, dsn, command: str, message: str, http=None, force=None, **change
    ):
        self.what, self.wanted = what, (status, code, dsn, command, message)
        self.http, self.force, self.change = http, force or {}, change

    def with_(self, later: Row) -> Row:
        """Both faults at once; this one is told."""
        both = Row(f"{self.what} + {later.what}", *self.wanted)
        if self.http is not None or later.http is not None:
            both.http = {**(later.http or {}), **(self.http or {})}
        both.force, both.change = {**later.force, **self.force}, {**later.change, **self.change}
        headers = [row.change.get("header", {}) for row in (later, self)]
        if "raw" not in both.change and any(headers):
            both.change["header"] = {**headers[0], **headers[1]}
        return both

    def agrees_with(self, later: Row) -> bool:
        """False where the two can't be made in one request."""
        mine, other = dict(self.change), dict(later.change)
        headers = mine.pop("header", {}), other.pop("header", {})
        pairs = ((mine, other), headers, (self.force, later.force), (self.http or {}, later.http or {}))
        return not any(one.keys() & two.keys() for one, two in pairs) and not (
            {*mine, *other} & {"raw"} and mine and other
        )

    def answered(self) -> tuple:
        """(HTTP status, document)."""
        change = dict(self.change)
        body = change.pop("raw", None) or as_body(document(**change))
        force = dict(self.force)
        if "smtpd" in force:
            force["smtpd"] = {"hostname": NAME, **force["smtpd"]}
        if self.http is None:
            return posted(body, settings(**force))
        http = {"method": "POST", "path": "/submit", "client": "127.0.0.1", **self.http}
        head = f"{http['method']} {http['path']} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        return over_http(head.encode() + body, settings(**force), http["client"])


MALFORMED = (400, "421", None, "HTTP", "Malformed JSON string")
INVALID = (400, "554", "5.6.0", "HTTP", "Invalid submission")
LOOP = (400, "421", "5.4.6", "CONN", "Detected message loop")
EHLO = (400, "501", "5.0.0", "EHLO", "Invalid domain name")
MAIL_EMPTY = (400, "501", "5.5.2", "MAIL", 'Syntax error in parameters scanning "FROM"')
MAIL_FORM = (400, "553", "5.5.4", "MAIL", "Domain name required for sender address")
RCPT_NONE = (400, "553", "5.0.0", "RCPT", "User address required")
RCPT_MANY = (403, "452", "4.5.3", "RCPT", "Too many recipients")
RCPT_FORM = (400, "553", "5.1.5", "RCPT", "Recipient address is invalid")
RCPT_POLICY = (400, "553", "5.7.1", "RCPT", "Recipient address is not permitted")
BODY_EMPTY = (400, "500", "5.6.0", "DATA", "Message body is empty")
TOO_BIG = (413, "552", "5.3.4", "DATA", "Message size exceeds fixed maximum message size")
SUBJECT_EMPTY = (400, "500", "5.6.0", "DATA", "Subject header is empty")
# In the order in which faults are told; of one fault, several forms.
REFUSALS = [
    [Row("unknown path", 404, "421", None, "HTTP", "Not found", http={"path": "/submitt"})],
    [
        Row(f"method {method}", 405, "421", None, "HTTP", f"{method} method not supported", http={"method": method})
        for method in ("GET", "PUT", "DELETE", "PATCH", "TRACE", "post")
    ],
    [
        Row("no login", 401, "535", "5.7.0", "AUTH", "authentication failed", http={},
            force={"password": {"kijitora": SettingsFile.KIJITORA}}),
    ],
    [Row("client", 403, "500", "5.7.1", "AUTH", "Access denied", http={"client": "192.0.2.1"})],
    [
        Row("not JSON", *MALFORMED, raw=b"mail=a@example.jp"),
        Row("nothing", *MALFORMED, raw=b" "),
        Row("a list", *INVALID, raw=b"[]"),
        Row("not UTF-8", *MALFORMED, raw=b'{"body": "\xff"}'),
        Row("too deep", *MALFORMED, raw=b"[" * 100000),
        Row("NaN", *MALFORMED, raw=b'{"body": NaN}'),
        Row("a key twice", *INVALID, raw=b'{"body": "a", "body": "a"}'),
        Row("half a surrogate pair", *INVALID, raw=b'{"body": "\\ud800"}'),
        Row("an unknown key", *INVALID, replyto="a@example.jp"),
        Row("an unknown key of header", *INVALID, header={"xmailer": "a"}),
        Row("a wrong type", *INVALID, body=1),
        Row("an unknown charset", *INVALID, header={"charset": "klingon"}),
        Row("LF in the subject", *INVALID, header={"subject": "a\nX-Evil: b"}),
        Row("NUL in From", *INVALID, header={"from": "a\0 <a@example.jp>"}),
        Row("CR in Reply-To", *INVALID, header={"replyto": "a\r <a@example.jp>"}),
    ],
    [
        Row("own name in the loop", *LOOP, header={"x-haineko-loop": ["a.example", "RELAY.example.org"]}),
        Row("26 names in the loop", *LOOP, header={"x-haineko-loop": [f"r{i}.example" for i in range(26)]}),
    ],
    [
        Row(f"ehlo {name!r}", *EHLO, ehlo=name)
        for name in ("", "a b", "-a", "a_é", "a..b", "[127.0.0.1", "[1.2.3]", "[IPv6:g]", "[::1]", "::1", "a\r\nb",
                     "a.",
                     "[IPv6:fe80::1%\r\nX-Evil: 1]", "[IPv6:fe80::1%eth0]", "a" * 256, "x\0")
    ],
    [Row("mail empty", *MAIL_EMPTY, mail=""), Row("mail null", *MAIL_EMPTY, mail=None)],
    [
        Row(f"mail {text!r}", *MAIL_FORM, mail=text)
        for text in ("kijitora", "<a@example.jp>", "A <a@example.jp>", "a@example.jp,b@example.jp", "a b@example.jp",
                     " ",
                     "a@example.jp\r\nRCPT TO:<b@example.jp>", "a@example.jp> SIZE=1", "a@faß.de", "a\0@example.jp")
    ],
    [Row(f"rcpt {value!r}", *RCPT_NONE, rcpt=value) for value in ([], "", [""], None)],
    [
        Row("five recipients", *RCPT_MANY, rcpt=[f"r{i}@example.jp" for i in range(5)]),
        Row("five that are none", *RCPT_MANY, rcpt=["a", "b", "c", "d", "e"]),
        Row("two of one", *RCPT_MANY, rcpt=["a@a.jp", "b@a.jp"], force={"smtpd": {"max_rcpts_per_message": 1}}),
    ],
    [
        Row(f"rcpt {text!r}", *RCPT_FORM, rcpt=[text])
        for text in ("mikeneko", "<a@example.jp>", "a@example.jp,b@example.jp", "a@example.jp\nX: y", "a@ex ample.jp",
                     "a\0")
    ],
    [
        Row("rcpt not permitted", *RCPT_POLICY, rcpt=["a@example.jp"], force={"recipients": {"domainpart": ["a.jp"]}}),
        Row("rcpt elsewhere", *RCPT_POLICY, rcpt=["neko@a.jp"], force={"recipients": {"recipients": ["a@a.jp"]}}),
        Row("no section recipients", *RCPT_POLICY, rcpt=["neko@example.jp"], force={"recipients": None}),
    ],
    [Row("body empty", *BODY_EMPTY, body=""), Row("body null", *BODY_EMPTY, body=None)],
    [
        Row("a body too big", *TOO_BIG, body="x" * 2000, force={"smtpd": {"max_message_size": 1000}}),
        Row("a message too big", *TOO_BIG, force={"smtpd": {"max_message_size": 100}}),
    ],
    [Row("subject empty", *SUBJECT_EMPTY, header={"subject": ""}),
     Row("subject null", *SUBJECT_EMPTY, header={"subject": None})],
]  # fmt: skip
ITEM = {"rcpt", "error", "code", "dsn", "command", "message", "mailer", "host", "port"}


class Policy(Quiet):
    KEYS = (
        "queueid",
        "addresser",
        "recipient",
        "response",
        "remoteaddr",
        "remoteport",
        "useragent",
        "referer",
        "timestamp",
    )
    ITEM = ("rcpt", "error", "code", "dsn", "command", "message", "mailer", "host", "port")

    def check(self, row: Row) -> None:
        """The row's refusal, in the form of every answer, with one line in the log."""
        self.logged()
        status, found = row.answered()
        lines = self.logged()
        self.assertEqual(tuple(found), self.KEYS)
        self.assertEqual(len(found["response"]), 1)
        item = found["response"][0]
        self.assertEqual(tuple(item), self.ITEM)
        self.assertEqual((status, item["code"], item["dsn"], item["command"], item["message"][0]), row.wanted)
        self.assertEqual((item["error"], item["mailer"], item["host"], item["port"]), (1, None, None, None))
        self.assertEqual(len(lines), 1, lines)
        self.assertIn(f"{found['queueid'] or '-'}: client=", lines[0])
        self.assertIn(f" status=rejected ({item['code']} {item['message'][0]}", lines[0])

    def test_every_refusal(self):
        for row in itertools.chain(*REFUSALS):
            with self.subTest(row.what):
                self.check(row)

    def test_our_own_fault(self):
        broken = haineko.replace(settings(), recipients=None)  # which settled() never leaves
        status, found = over_http(http_post(as_body(document())), broken)
        item = found["response"][0]
        wanted = (500, "451", "4.3.0", "HTTP", ["Internal Server Error"])
        self.assertEqual((status, item["code"], item["dsn"], item["command"], item["message"]), wanted)
        self.assertNotIn("Traceback", json.dumps(found))
        lines = self.logged()
        self.assertIn("Traceback", lines[0])
        self.assertIn("status=rejected ", lines[-1])

    def test_of_two_faults_the_earlier_is_told(self):
        count = 0
        for earlier, later in itertools.combinations(REFUSALS, 2):
            pairs = [(one, two) for one in earlier for two in later if one.agrees_with(two)]
            for one, two in pairs[:1] + pairs[-1:]:
                with self.subTest(one.what, and_=two.what):
                    count += 1
                    self.check(one.with_(two))
        self.assertGreater(count, 150)

    def test_a_malformed_submission_is_told_what_and_where(self):
        cases = [
            (b"{", ["Expecting property name"]),
            (
                as_body(document(bdy="x", header={"sbject": "x"})),
                ["bdy: unknown key; did you", "header.sbject: unknown key"],
            ),
            (as_body({f"k{i}": 1 for i in range(99)}), [f"k{i}: unknown key" for i in range(10)]),
        ]
        for octets, wanted in cases:
            with self.subTest(octets[:30]):
                found = posted(octets)[1]
                lines = found["response"][0]["message"][1:]
                self.assertEqual(len(lines), len(wanted), lines)
                for line, start in zip(sorted(lines), wanted):
                    self.assertTrue(line.startswith(start), line)
                self.assertIsNone(found["addresser"])
                self.assertIsNone(found["recipient"])
                self.assertRegex(found["queueid"], r"\A[0-9A-Za-z]{16}\Z")

    def test_an_answer_says_what_it_is_about(self):
        status, found = posted(document(), settings())
        self.assertEqual(status, 200)
        self.assertEqual(tuple(found), self.KEYS)
        self.assertEqual((found["addresser"], found["recipient"]), ("kijitora@example.org", ["mikeneko@example.jp"]))
        self.assertEqual((found["remoteaddr"], found["remoteport"]), ("127.0.0.1", 50320))
        self.assertEqual(found["timestamp"], {"datetime": time.ctime(NOW), "unixtime": "1388741758"})
        self.assertEqual([found["useragent"], found["referer"]], [None, None])
        self.assertEqual(len(self.logged()), 1)
        status, found = posted(document(body=""), settings())
        self.assertEqual((found["addresser"], found["response"][0]["rcpt"]), ("kijitora@example.org", None))

    def test_refused_recipients_do_not_stop_the_others(self):
        force = settings(recipients={"domainpart": ["example.jp"]})
        given = ["no", "a@example.jp", "ねこ@faß.de", "b@example.org"]
        status, found = posted(document(rcpt=given), force)
        self.assertEqual(status, 207)
        self.assertEqual(found["recipient"], ["a@example.jp"])
        wanted = [
            ("no", 1, "5.1.5"),
            ("a@example.jp", 0, "2.0.0"),
            ("ねこ@faß.de", 1, "5.1.5"),
            ("b@example.org", 1, "5.7.1"),
        ]
        self.assertEqual([(item["rcpt"], item["error"], item["dsn"]) for item in found["response"]], wanted)
        self.assertEqual([item["mailer"] for item in found["response"]], [None, "Discard", None, None])
        status, found = posted(document(rcpt=given[2:]), force)
        self.assertEqual((status, found["recipient"], len(found["response"])), (400, [], 2))
        status, found = posted(document(rcpt=given, body=""), force)
        self.assertEqual((status, len(found["response"]), found["response"][0]["dsn"]), (400, 1, "5.6.0"))

    def test_the_same_recipient_counts_once(self):
        cases = [
            (["a@example.jp"] * 9, ["a@example.jp"]),
            (["a@example.jp", "a@EXAMPLE.JP", "b@example.jp"], ["a@example.jp", "b@example.jp"]),
            (["a@example.jp", "A@example.jp"], ["a@example.jp", "A@example.jp"]),
            (["a@例え.jp", "a@xn--r8jz45g.jp"], ["a@例え.jp"]),
        ]
        for given, wanted in cases:
            with self.subTest(given):
                status, found = posted(document(rcpt=given))
                self.assertEqual((status, found["recipient"]), (200, wanted))
                self.assertEqual([item["rcpt"] for item in found["response"]], wanted)

    def test_what_passes(self):
        cases = [
            ("one label", {"ehlo": "localhost"}, {}),
            ("an address literal", {"ehlo": "[192.0.2.1]"}, {}),
            ("a v6 literal", {"ehlo": "[IPv6:2001:db8::1]"}, {}),
            ("a bare address", {"ehlo": "192.0.2.1"}, {}),
            ("null", {"ehlo": None}, {}),
            ("25 names in the loop", {"header": {"x-haineko-loop": [f"r{i}.example" for i in range(25)]}}, {}),
            ("no limit of recipients", {"rcpt": [f"r{i}@example.jp" for i in range(40)]}, {"max_rcpts_per_message": 0}),
            ("as many as may be", {"rcpt": [f"r{i}@example.jp" for i in range(4)]}, {}),
            ("no limit of size", {"body": "x" * 100000}, {"max_message_size": 0}),
            ("a quoted local part", {"mail": '"a b"@example.jp', "rcpt": ['"c\\"d"@example.jp']}, {}),
            ("a domain that isn't ASCII", {"mail": "a@例え.jp", "rcpt": ["b@例え.jp"]}, {}),
            ("a body of one line end", {"body": "\n"}, {}),
        ]
        for what, change, smtpd in cases:
            with self.subTest(what):
                self.assertEqual(posted(document(**change), settings(smtpd={"hostname": NAME, **smtpd}))[0], 200)

    def test_who_may_post(self):
        login = {"kijitora": SettingsFile.KIJITORA}
        right = {"Authorization": "Basic " + base64.b64encode(b"kijitora:kijitora").decode()}
        wrong = {"Authorization": "Basic " + base64.b64encode(b"kijitora:neko").decode()}
        networks = {"relayhosts": ["192.0.2.0/24", "2001:db8::/32"]}
        cases = [
            ("this machine", {}, "127.0.0.1", {}, 200),
            ("this machine by v6", {}, "::1", {}, 200),
            ("v4 in v6", {}, "::ffff:127.0.0.1", {}, 200),
            ("another", {}, "192.0.2.1", {}, 403),
            ("loopback, but not that one", {}, "127.0.0.2", {}, 403),
            ("in a network", {"relayhosts": networks}, "192.0.2.200", {}, 200),
            ("in a v6 network", {"relayhosts": networks}, "2001:db8:1::1", {}, 200),
            ("in none", {"relayhosts": networks}, "127.0.0.1", {}, 403),
            ("open relay", {"relayhosts": {"open-relay": 1}}, "203.0.113.1", {}, 200),
            ("login", {"password": login}, "203.0.113.1", right, 200),
            ("wrong login", {"password": login}, "127.0.0.1", wrong, 401),
            ("no login", {"password": login}, "127.0.0.1", {}, 401),
            ("no login at an open relay", {"password": login, "relayhosts": {"open-relay": 1}}, "127.0.0.1", {}, 401),
            ("an empty section", {"password": {}}, "127.0.0.1", {}, 200),
            ("login, but not that recipient", {"password": login, "recipients": {}}, "127.0.0.1", right, 400),
        ]
        for what, force, client, headers, status in cases:
            with self.subTest(what):
                found = over_http(http_post(as_body(document()), **headers), settings(**force), client)
                self.assertEqual(found[0], status)

    def test_a_refusal_names_the_limit_or_the_setting(self):
        many = [f"r{i}@example.jp" for i in range(5)]
        cases = (
            (document(rcpt=many), {}, "5 recipients exceed smtpd.max_rcpts_per_message (4)"),
            (document(rcpt=["a@example.jp"] * 3 + many), {}, "6 recipients exceed smtpd.max_rcpts_per_message (4)"),
            (document(rcpt=many * 3000), {}, "15000 recipients exceed smtpd.max_rcpts_per_message (4)"),
            (document(mail=None), {}, "mail (the envelope sender) is required"),
            (document(mail=""), {}, "mail (the envelope sender) is required"),
            (document(mail="A <a@x.jp>"), {}, 'expected a bare address, got "A <a@x.jp>"; did you mean "a@x.jp"?'),
            (document(mail="a"), {}, 'expected a bare address like "user@example.org"'),
            (document(header={"x-mc-tags": "a"}), {}, "X-Mc-Tags: the route must have provider_headers to send it"),
            (document(rcpt=None), {}, "rcpt is required"),
            (document(ehlo="a b"), {}, "ehlo: expected a domain or an address literal"),
            (document(), {"recipients": {}}, "neither recipients.domainpart nor recipients.recipients has it"),
            (document(body=""), {}, "body or html is required"),
            (document(header={"subject": ""}), {}, "header.subject is required"),
            (
                document(),
                {"smtpd": {"hostname": NAME, "max_message_size": 99}},
                " octets exceed smtpd.max_message_size (99)",
            ),
        )
        for submission, force, line in cases:
            with self.subTest(line):
                self.logged()
                self.assertIn(line, posted(submission, settings(**force))[1]["response"][0]["message"][1])
                self.assertIn(f"; {line}" if line[0] != " " else line, self.logged()[0])

    def test_a_client_behind_an_unknown_proxy_is_not_on_this_machine(self):
        trusting = {"httpd": {"trusted_proxies": ["127.0.0.1"]}}
        monitors = {"httpd": {"trusted_proxies": ["127.0.0.1"], "monitors": ["192.0.2.0/24", "127.0.0.1"]}}
        for_ = {"X-Forwarded-For": "192.0.2.7"}
        untrusted, unlisted = (
            "from 127.0.0.1, which is not in httpd.trusted_proxies",
            "192.0.2.7 is not in httpd.monitors",
        )
        this = "a forwarded request is not from this machine"
        cases = (
            # path, settings, headers, status, second line
            ("/submit", {}, for_, 403, untrusted),
            ("/submit", {}, {"Forwarded": "for=127.0.0.1"}, 403, untrusted),
            ("/submit", {}, {"via": "1.1 nginx"}, 403, untrusted),
            ("/submit", {}, {"X-Real-IP": "127.0.0.1"}, 403, untrusted),
            ("/submit", {"relayhosts": {"relayhosts": ["192.0.2.0/24"]}}, for_, 403, "127.0.0.1 is not in relayhosts"),
            ("/submit", {"relayhosts": {"open-relay": 1}}, for_, 200, ""),
            ("/submit", trusting, {"Via": "1.1 nginx"}, 403, "Via from 127.0.0.1 without X-Forwarded-For"),
            ("/submit", trusting, for_, 403, "192.0.2.7 is not in relayhosts.relayhosts"),
            ("/conf", {}, {}, 200, ""),
            ("/conf", {}, for_, 403, untrusted),
            ("/conf", {}, {"X-Forwarded-For": "127.0.0.1"}, 403, untrusted),
            ("/conf", trusting, {"X-Forwarded-For": "127.0.0.1"}, 403, this),
            ("/conf", trusting, {"X-Forwarded-For": "127.0.0.1", "Host": "evil.example"}, 403, this),
            ("/conf", trusting, for_, 403, unlisted),
            ("/conf", monitors, for_, 200, ""),
            ("/conf", monitors, {**for_, "Host": "evil.example"}, 403, "Host: expected an address or smtpd.hostname"),
            ("/queue", {}, for_, 403, untrusted),
            ("/queue/abc", {}, for_, 403, untrusted),
        )
        for path, force, headers, status, line in cases:
            with self.subTest(path, **headers, force=force):
                self.logged()
                method = "POST" if path == "/submit" else "GET"
                body = as_body(document()) if path == "/submit" else b""
                lines = [f"{name}: {value}\r\n" for name, value in {"Host": "x", **headers}.items()]
                head = f"{method} {path} HTTP/1.1\r\n{''.join(lines)}Content-Length: {len(body)}\r\n\r\n"
                found, document_ = over_http(head.encode() + body, settings(**force))
                self.assertEqual(found, status)
                if line:
                    self.assertIn(line, document_["response"][0]["message"][1])
                    self.assertIn(line, self.logged()[-1])

    def test_the_size_is_that_of_the_finished_message(self):
        octets = composed(document())
        for limit, status in ((len(octets), 200), (len(octets) - 1, 413)):
            with self.subTest(limit):
                force = settings(smtpd={"hostname": NAME, "max_message_size": limit})
                self.assertEqual(posted(document(), force)[0], status)


# ======================================================================================================================
# 7. Messages
# ======================================================================================================================


def refusal_of(request_: haineko.Request, submission: haineko.Submission) -> haineko.Reply | None:
    """The Reply by which a check of a submission refuses it, or one of its recipients."""
    try:
        haineko.apply_checks(haineko.CHECKS["submission"], request_, submission, settings())
        replies, _ = haineko.check_recipients(request_, submission, settings())
        return next(filter(None, replies.values()), None)
    except haineko.Rejected as error:
        return error.reply


def composed(submission, client: str = "127.0.0.1", to: str = "mikeneko@example.jp") -> bytes:
    """The octets of the message of a submission."""
    found, faults, _ = haineko.parse_submission(as_body(submission))
    if faults:
        raise ValueError(faults)
    message = haineko.compose(found, "Q" * 16, haineko.parse_ip(client), NAME, NOW)
    return message.copy(to, 1)


def as_in_jis(octets: bytes) -> str:
    """Text of ISO-2022-JP octets, by way of code page 932; what such a reader can't know is an error."""
    text, state = [], "(B"
    for segment in re.split(rb"(\x1b..)", octets):
        if segment[:1] == b"\x1b":
            state = segment[1:].decode()
        elif state == "$B":
            text += [CELLS[segment[i] - 0x21, segment[i + 1] - 0x21] for i in range(0, len(segment), 2)]
        else:
            text.append(segment.decode("ascii").translate({"(B": {}, "(J": str.maketrans("\\~", "¥‾")}[state]))
    if state != "(B":
        raise ValueError("does not end in ASCII")
    return "".join(text)


def _cells() -> dict:
    """{(row, cell): character} of the 94 rows of 94 cells, in the order in which code page 932 counts them."""
    leads, trails = [*range(0x81, 0xA0), *range(0xE0, 0xF0)], [*range(0x40, 0x7F), *range(0x80, 0xFD)]
    codes = itertools.product(leads, trails)
    found = {divmod(i, 94): bytes(code).decode("cp932", "replace") for i, code in enumerate(codes)}
    return {place: text for place, text in found.items() if "\ufffd" not in text}


CELLS = _cells()


def unfolded(field: str) -> str:
    """Text of a header field as a reader shows it: RFC 2047 decoded, each word by itself."""
    field = re.sub(r"\r\n(?=[ \t])", "", field)
    field = re.sub(r"(=\?[^?\s]+\?[BbQq]\?[^?\s]*\?=)\s+(?==\?)", r"\1", field)

    def word(found: re.Match) -> str:
        octets = base64.b64decode(found[2], validate=True)
        return as_in_jis(octets) if found[1] == "ISO-2022-JP" else octets.decode(found[1])

    return re.sub(r"=\?([^?\s]+)\?B\?([^?\s]*)\?=", word, field)


def raw_fields(octets: bytes) -> list:
    """[(name, value with its folds)] of the header."""
    head = octets.partition(b"\r\n\r\n")[0].decode("ascii")
    return [tuple(line.split(": ", 1)) for line in re.split(r"\r\n(?![ \t])", head)]


def decoded_body(octets: bytes) -> str:
    """The text as a reader shows it, by email's reading of the transfer encoding."""
    parsed = email.message_from_bytes(octets)
    raw, charset = parsed.get_payload(decode=True), parsed.get_content_charset()
    return as_in_jis(raw) if charset == "iso-2022-jp" else raw.decode(charset)


JAPANESE = [
    ("kana and kanji", "謹賀新年、あとでお年玉を貰いに行きます", None),
    ("half-width kana", "ﾊﾝｶｸｶﾅ", "ハンカクカナ"),
    ("half-width kana with marks", "ｶﾞｷﾞｸﾞﾊﾟﾋﾟﾌﾟｳﾞ", "ガギグパピプヴ"),
    ("a mark alone", "ﾞﾟ", "゛゜"),
    ("half-width punctuation", "｡｢｣､･ｰ", "。「」、・ー"),
    ("NEC", "①②⑳ⅠⅩ㍉㌔㈱№℡㍻", None),
    ("IBM", "髙﨑ⅰⅹ￤＂纊", None),
    ("wave and others", "～∥－￠￡￢―", None),
    ("the same as others write them", "〜‖−¢£¬—", "～∥－￠￡￢―"),
    ("mixed with ASCII", "Re: [neko:123] 髙橋様 (ｶｯｺ) ～①～", "Re: [neko:123] 髙橋様 (カッコ) ～①～"),
    ("backslash and yen", "＼￥\\ ~", None),
]
EVERYWHERE = [
    ("ASCII", "Nyaaaa"),
    ("like an encoded word", "=?UTF-8?B?44Kt?="),
    ("quotes and backslashes", 'say "x\\y", (or) <not>; a@b'),
    ("spaces", "  two  before, three   within, one after "),
    ("a tab", "a\tb"),
    ("Latin", "Grüße, señor Müller"),
    ("Greek", "Γάτα"),
    ("a cat", "😺 and a family 👨‍👩‍👧"),
    ("combining", "か\u3099 e\u0301"),
    ("control characters", "a\x01\x1b[2J\x7f\x85b"),
    ("line separators", "a\u2028b\u2029c\x0bd\x0ce"),
    ("not in Japanese", "①ü"),
    ("long ASCII", "meow " * 100 + "end"),
    ("one long word", "m" * 900),
    ("one longer word", "m" * 3000),
    ("long Japanese", "猫" * 500),
    ("long cats", "😺" * 300),
]
CHARSETS = [
    "UTF-8",
    "ISO-2022-JP",
    "ISO-8859-1",
    "US-ASCII",
    "Shift_JIS",
    "EUC-JP",
    "windows-1252",
    "gb18030",
    "KOI8-R",
]


class Messages(unittest.TestCase):
    maxDiff = None
    ORDER = ("Received", "From", "Sender", "To", "Reply-To", "Subject", "Date", "Message-Id", "X-Haineko-Loop",
             "MIME-Version", "Content-Type", "Content-Transfer-Encoding")  # fmt: skip

    def check_form(self, octets: bytes) -> None:
        """What holds for every message, whatever is in it."""
        self.assertTrue(octets.endswith(b"\r\n"))
        self.assertFalse(re.search(rb"\r(?!\n)|(?<!\r)\n|\0", octets))
        self.assertTrue(octets.isascii())
        self.assertLessEqual(max(map(len, octets.split(b"\r\n"))), 998)
        head = octets.partition(b"\r\n\r\n")[0]
        for line in head.split(b"\r\n"):
            self.assertTrue(line.strip(), "a line of white space alone, RFC 5322 3.2.2")
            self.assertFalse(re.search(rb"[^\t\x20-\x7e]", line))
            if len(line) > 78:  # only what can't be folded
                self.assertLessEqual(len(line.split()), 2, line)
            for word in re.findall(rb"=\?[^?\s]+\?[BQ]\?[^?\s]*\?=", line):
                self.assertLessEqual(len(word), 75)
                self.assertLessEqual(len(line), max(76, len(word) + 1))
        names = [name for name, _ in raw_fields(octets)]
        self.assertEqual(names, [name for name in self.ORDER if name in names])
        self.assertEqual(set(self.ORDER) - set(names) - {"Sender", "Reply-To"}, set())

    def test_headers_and_their_order(self):
        octets = composed(
            document(
                ehlo="client.example",
                header={"from": "A <a@example.com>", "replyto": "B <b@example.com>", "x-haineko-loop": ["r1.example"]},
            ),
            "192.0.2.1",
        )
        self.check_form(octets)
        date = haineko.rfc5322_date(int(NOW))
        self.assertEqual(
            raw_fields(octets),
            [
                ("Received", f"from client.example ([192.0.2.1])\r\n\tby {NAME} with HTTP id {'Q' * 16};\r\n\t{date}"),
                ("From", "A <a@example.com>"),
                ("Sender", "kijitora@example.org"),
                ("To", "mikeneko@example.jp"),
                ("Reply-To", "B <b@example.com>"),
                ("Subject", "Nyaaaa"),
                ("Date", date),
                ("Message-Id", f"<{'Q' * 16}.1@{NAME}>"),
                ("X-Haineko-Loop", f"r1.example, {NAME}"),
                ("MIME-Version", "1.0"),
                ("Content-Type", "text/plain; charset=UTF-8"),
                ("Content-Transfer-Encoding", "7bit"),
            ],
        )
        self.assertEqual(octets.partition(b"\r\n\r\n")[2], b"Meow.\r\n")
        self.assertEqual(email.utils.parsedate_to_datetime(date).timestamp(), NOW)

    def test_received_names_the_client(self):
        cases = [
            (None, "192.0.2.1", "from [192.0.2.1] ([192.0.2.1])"),
            (None, "2001:db8::1", "from [IPv6:2001:db8::1] ([IPv6:2001:db8::1])"),
            ("[127.0.0.1]", "127.0.0.1", "from [127.0.0.1] ([127.0.0.1])"),
            ("neko", "::ffff:192.0.2.1", "from neko ([192.0.2.1])"),
        ]
        for ehlo, client, wanted in cases:
            with self.subTest(wanted):
                octets = composed(document(ehlo=ehlo), client)
                self.check_form(octets)
                self.assertTrue(raw_fields(octets)[0][1].startswith(wanted + "\r\n"))

    def test_sender_only_where_from_is_another(self):
        cases = [
            (None, "kijitora@example.org", None),
            ("K <kijitora@example.org>", "K <kijitora@example.org>", None),
            ("K <kijitora@EXAMPLE.org>", "K <kijitora@EXAMPLE.org>", None),
            ("K <Kijitora@example.org>", "K <Kijitora@example.org>", "kijitora@example.org"),
            ("k@example.com", "k@example.com", "kijitora@example.org"),
            ("kijitora@example.org, b@example.com", "kijitora@example.org, b@example.com", "kijitora@example.org"),
        ]
        for given, author, sender in cases:
            with self.subTest(given):
                found = dict(raw_fields(composed(document(header={"from": given}))))
                self.assertEqual((found["From"], found.get("Sender")), (author, sender))

    def test_addresses_stay_outside_of_encoded_words(self):
        for charset in ("UTF-8", "ISO-2022-JP"):
            with self.subTest(charset):
                octets = composed(document(header={"from": "キジトラ <kijitora@example.com>", "charset": charset}))
                self.check_form(octets)
                field = dict(raw_fields(octets))["From"]
                self.assertRegex(field, rf"\A=\?{charset}\?B\?[A-Za-z0-9+/=]+\?= <kijitora@example\.com>\Z")
                self.assertEqual(email.utils.parseaddr(field)[1], "kijitora@example.com")
                self.assertEqual(unfolded(field), "キジトラ <kijitora@example.com>")

    def names(self, octets: bytes, name: str) -> list:
        """[(display name, address)] as email reads the structure, and as a reader shows the words."""
        value = re.sub(r"\r\n(?=[ \t])", "", dict(raw_fields(octets))[name])
        return [(unfolded(shown), spec) for shown, spec in email.utils.getaddresses([value])]

    def test_names_come_out_as_they_were_meant(self):
        for (what, text), charset in itertools.product(EVERYWHERE, ("UTF-8", "ISO-2022-JP", "ISO-8859-1")):
            with self.subTest(what, charset=charset):
                quoted = '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
                mailboxes = f"{quoted} <a@example.jp>, b@example.jp, {quoted} <c@example.jp>"
                octets = composed(document(header={"from": mailboxes, "replyto": mailboxes, "charset": charset}))
                self.check_form(octets)
                meant = text.strip()
                wanted = [(meant, "a@example.jp"), ("", "b@example.jp"), (meant, "c@example.jp")]
                self.assertEqual(self.names(octets, "From"), wanted)
                self.assertEqual(self.names(octets, "Reply-To"), wanted)

    def test_subjects_come_out_as_they_were_meant(self):
        for (what, text), charset in itertools.product(EVERYWHERE, CHARSETS):
            with self.subTest(what, charset=charset):
                octets = composed(document(header={"subject": text, "charset": charset}))
                self.check_form(octets)
                self.assertEqual(unfolded(dict(raw_fields(octets))["Subject"]), text)

    def test_email_reads_the_same_in_utf_8(self):
        for what, text in EVERYWHERE + [(what, text) for what, text, _ in JAPANESE]:
            if re.search(r"[\x00-\x1f\x7f\x85\u2028\u2029]", text) or "=?" in text or text != text.strip():
                continue  # email has its own mind about these
            with self.subTest(what):
                submission = document(body=text + "\n", header={"subject": text, "from": None})
                parsed = email.message_from_bytes(composed(submission), policy=email.policy.default)
                self.assertEqual(parsed["Subject"], text)
                self.assertEqual(parsed.get_content().replace("\r\n", "\n"), text + "\n")
                self.assertEqual(parsed.defects, [])

    def test_japanese_in_iso_2022_jp(self):
        for what, text, shown in JAPANESE:
            with self.subTest(what):
                header = {
                    "subject": text,
                    "from": f"{text.replace(chr(92), '')} <a@example.jp>",
                    "charset": "ISO-2022-JP",
                }
                octets = composed(document(body=text + "\n" + text, header=header))
                self.check_form(octets)
                found = dict(raw_fields(octets))
                self.assertEqual(found["Content-Type"], "text/plain; charset=ISO-2022-JP")
                self.assertEqual(found["Content-Transfer-Encoding"], "7bit")
                self.assertEqual(unfolded(found["Subject"]), shown or text)
                name = (shown or text).replace("\\", "")
                self.assertEqual(unfolded(found["From"]), f"{name} <a@example.jp>")
                self.assertEqual(decoded_body(octets), f"{shown or text}\r\n{shown or text}\r\n")
                for line in octets.partition(b"\r\n\r\n")[2].split(b"\r\n"):
                    as_in_jis(line)  # each line begins and ends in ASCII, RFC 1468

    def test_strings_that_hold_iso_2022_jp_already(self):
        for held, meant in Submissions.JIS:
            with self.subTest(held):
                octets = composed(document(body=held, header={"subject": held, "charset": "ISO-2022-JP"}))
                self.check_form(octets)
                self.assertEqual(unfolded(dict(raw_fields(octets))["Subject"]), meant.replace("ｶﾞ", "ガ"))
                self.assertEqual(decoded_body(octets), meant.replace("ｶﾞ", "ガ") + "\r\n")

    def test_every_character_of_code_page_932(self):
        self.assertGreater(len(CELLS), 7000)
        for character in CELLS.values():
            self.assertEqual(as_in_jis(haineko.encode_jis(character)), character, hex(ord(character)))

    def test_words_are_of_whole_characters(self):
        for start in range(40):
            for charset, text in (("ISO-2022-JP", "ｶﾞﾊﾟ" * 60), ("UTF-8", "猫😺é" * 60), ("ISO-2022-JP", "①猫a" * 60)):
                with self.subTest(start, charset=charset):
                    octets = composed(document(header={"subject": "x" * start + text, "charset": charset}))
                    self.check_form(octets)
                    meant = "x" * start + text.replace("ｶﾞ", "ガ").replace("ﾊﾟ", "パ")
                    self.assertEqual(unfolded(dict(raw_fields(octets))["Subject"]), meant)

    def test_what_a_charset_can_not_hold_goes_as_utf_8(self):
        cases = [
            ("ISO-2022-JP", "한국어"),
            ("ISO-2022-JP", "ü"),
            ("ISO-2022-JP", "😺"),
            ("ISO-2022-JP", "か\u3099"),
            ("ISO-2022-JP", "猫\x1b$B"),
            ("ISO-8859-1", "€"),
            ("US-ASCII", "é"),
            ("Shift_JIS", "ü"),
            ("KOI8-R", "猫"),
        ]
        for charset, text in cases:
            for change in (
                {"body": text},
                {"header": {"subject": text}},
                {"header": {"from": f"{text} <a@example.jp>"}},
            ):
                with self.subTest(charset, text=text, change=change):
                    submission = document(**change)
                    submission["header"]["charset"] = charset
                    octets = composed(submission)
                    self.check_form(octets)
                    found = dict(raw_fields(octets))
                    self.assertEqual(found["Content-Type"], "text/plain; charset=UTF-8")
                    self.assertNotIn(f"=?{charset}?", octets.decode())
                    whole = unfolded(found["Subject"]) + unfolded(found["From"]) + decoded_body(octets)
                    self.assertIn(text, whole)

    def test_bodies_come_out_as_they_were_meant(self):
        bodies = [
            ("no line end", "a"), ("one", "a\n"), ("CRLF", "a\r\nb\r\n"), ("CR", "a\rb\r"), ("mixed", "a\r\r\nb\n\rc"),
            ("empty lines", "\n\n\n"), ("dots", ".\n..\n.a\n"), ("From", "From here\n>From there\n"), ("spaces",
            "a \n \n\tb\t\n"),
            ("equals", "a=b=20=\n"), ("NUL", "a\0b\n"), ("long", "x" * 5000), ("many long", ("y" * 998 + "\n") * 3),
            ("78 and 79", "a" * 78 + "\n" + "b" * 79), ("like a header", "Subject: x\n\n"), ("mostly not ASCII",
            "猫" * 3000),
        ]  # fmt: skip
        bodies += EVERYWHERE + [(what, text) for what, text, shown in JAPANESE if not shown]
        for (what, text), charset in itertools.product(bodies, CHARSETS):
            with self.subTest(what, charset=charset):
                octets = composed(document(body=text, header={"charset": charset}))
                self.check_form(octets)
                meant = text.replace("\r\n", "\n").replace("\r", "\n")
                meant += "" if meant.endswith("\n") else "\n"
                self.assertEqual(decoded_body(octets).replace("\r\n", "\n"), meant)
                self.assertLessEqual(max(map(len, octets.partition(b"\r\n\r\n")[2].split(b"\r\n"))), 998)

    def test_transfer_encodings(self):
        cases = [
            ("ASCII", "Meow.\n", "UTF-8", "7bit"),
            ("78 columns", "a" * 78, "UTF-8", "7bit"),
            ("79 columns", "a" * 79, "UTF-8", "quoted-printable"),
            ("78 after a line", "b\n" + "a" * 78 + "\n", "US-ASCII", "7bit"),
            ("79 after a line", "b\n" + "a" * 79 + "\n", "US-ASCII", "quoted-printable"),
            ("tabs", "a\tb", "UTF-8", "7bit"),
            ("a control character", "a\x01b", "UTF-8", "quoted-printable"),
            ("a little", "Grüße, " + "meow " * 9, "UTF-8", "quoted-printable"),
            ("a lot", "猫の手も借りたい", "UTF-8", "base64"),
            ("Latin", "Grüße an alle Katzen", "ISO-8859-1", "quoted-printable"),
            ("Japanese", "猫の手も借りたい", "ISO-2022-JP", "7bit"),
            ("long Japanese", "猫" * 400, "ISO-2022-JP", "7bit"),
            ("longer Japanese", "猫" * 500, "ISO-2022-JP", "quoted-printable"),
            ("Shift_JIS", "猫の手も借りたい", "Shift_JIS", "base64"),
        ]
        for what, text, charset, wanted in cases:
            with self.subTest(what):
                octets = composed(document(body=text, header={"charset": charset}))
                self.check_form(octets)
                encoding = dict(raw_fields(octets))["Content-Transfer-Encoding"]
                if what != "longer Japanese":
                    self.assertEqual(encoding, wanted)
                self.assertNotEqual((what, encoding), ("longer Japanese", "7bit"))

    def test_the_shorter_encoding_is_taken(self):
        for share in range(0, 101, 5):
            text = "\n".join(("é" * (share * 60 // 100)).ljust(60, "e") for _ in range(20)) + "\n"
            head, octets = haineko.text_part("plain", text, "UTF-8")
            encoding = head.decode().split()[-1]
            plain = text.replace("\n", "\r\n").encode()
            qp, b64 = len(haineko.binascii.b2a_qp(plain)), len(haineko.base64_lines(plain))
            with self.subTest(share, encoding=encoding, qp=qp, b64=b64):
                if encoding != "7bit":
                    self.assertLess(len(octets), min(qp, b64) * 1.15)

    def test_large_messages_take_time_in_proportion(self):
        texts = [
            ("lines of 900", ("a" * 900 + "\n") * 4000, "ISO-2022-JP"),
            ("one line", "a" * 4000000, "UTF-8"),
            ("not ASCII", "é" * 2000000, "UTF-8"),
            ("a subject", "é" * 1000000, None),
        ]
        for what, text, charset in texts:
            with self.subTest(what):
                change = {"body": text} if charset else {"header": {"subject": text}}
                submission = document(**change)
                submission["header"]["charset"] = charset or "UTF-8"
                began = time.process_time()
                composed(submission)
                self.assertLess(time.process_time() - began, 2)

    def test_nothing_reaches_a_header_that_was_not_meant_to(self):
        evil = [
            "\r\nX-Evil: 1",
            "\nX-Evil: 1",
            "\rX-Evil: 1",
            "\r\n\r\nX-Evil: 1",
            "\0X-Evil: 1",
            "\r\n X-Evil: 1",
            "\x0bX-Evil: 1",
            "\x0c\x1c\x1d\x1e\x85\u2028\u2029X-Evil: 1",
            "\r\n.\r\nMAIL FROM:<x-evil@x>",
        ]
        places = [
            ("ehlo", lambda text: document(ehlo=text), "client.example"),
            ("ehlo literal", lambda text: document(ehlo=f"[IPv6:{text}]"), "fe80::1%a"),
            ("mail", lambda text: document(mail=text), "kijitora@example.org"),
            ("mail quoted", lambda text: document(mail=f'"{text}"@example.org'), "kiji tora"),
            ("from", lambda text: document(header={"from": text}), "K <kijitora@example.org>"),
            ("name in from", lambda text: document(header={"from": f'"{text}" <kijitora@example.org>'}), "Kijitora"),
            ("replyto", lambda text: document(header={"replyto": text}), "K <kijitora@example.org>"),
            ("subject", lambda text: document(header={"subject": text}), "Nyaaaa"),
            ("Japanese subject", lambda text: document(header={"subject": text, "charset": "ISO-2022-JP"}), "ﾆｬｱ"),
            ("charset", lambda text: document(header={"charset": text}), "UTF-8"),
            ("loop", lambda text: document(header={"x-haineko-loop": [text]}), "r1.example"),
            ("loop as string", lambda text: document(header={"x-haineko-loop": text}), "r1.example"),
            ("body", lambda text: document(body=text), "Meow."),
        ]
        plain = [name for name, _ in raw_fields(composed(document(header={"replyto": "a@example.jp"})))]
        for (what, make, good), payload in itertools.product(places, evil):
            for text in (payload + good, good[:3] + payload + good[3:], good + payload):
                with self.subTest(what, text=text):
                    submission = make(text)
                    found, faults, _ = haineko.parse_submission(as_body(submission))
                    request_ = request(as_body(submission))
                    if faults or refusal_of(request_, found):
                        continue
                    octets = composed(submission)
                    self.check_form(octets)
                    names = [name for name, _ in raw_fields(octets)]
                    self.assertLessEqual(set(names), {*plain, "Sender"})
                    self.assertEqual(len(names), len(set(names)))
                    self.assertIsNone(email.message_from_bytes(octets)["X-Evil"])

    def test_recipients_do_not_reach_the_header_unchecked(self):
        for text in (
            "a@example.jp\r\nX: y",
            "a@example.jp\0",
            "\na@example.jp",
            '"a\nb"@example.jp',
            "a@[IPv6:fe80::1%\n]",
        ):
            with self.subTest(text):
                self.assertIsNone(haineko.parse_address(text))

    def test_a_finished_message_is_taken_apart(self):
        cases = [
            (b"A: 1\nB: 2\n\nbody\n", [("a", b"A: 1\n"), ("b", b"B: 2\n")], b"body\n"),
            (b"A: 1\r\n 2\r\nB:3\r\n\r\nx\r\ny", [("a", b"A: 1\n 2\n"), ("b", b"B:3\n")], b"x\ny"),
            (b"From x Mon\nA: 1\n\nb\n", [("a", b"A: 1\n")], b"b\n"),
            (b"A: 1\n", [("a", b"A: 1\n")], b""),
            (b"A: 1", [("a", b"A: 1\n")], b""),
            (b"\nbody", [], b"body"),
            (b"no header here\n", [], b"no header here\n"),
            (b"A: 1\n\na\rb\r\nc", [("a", b"A: 1\n")], b"a\nb\nc"),
            (b"", [], b""),
        ]
        for octets, fields_, body in cases:
            with self.subTest(octets):
                self.assertEqual(haineko.parse_message(octets), (fields_, body))
        for octets in (b"A: 1\rB: 2\n\nx", b"A: 1\0\n\nx", b"A: 1\n 2\r3\n\n"):
            with self.subTest(octets), self.assertRaises(ValueError):
                haineko.parse_message(octets)

    def test_recipients_of_a_finished_message(self):
        octets = b'To: A <a@example.jp>,\n "B, C" <b@example.jp>\nCc: c@example.jp\nBCC: d@example.jp\n'
        found = haineko.header_recipients(haineko.parse_message(octets)[0])
        self.assertEqual(found, ["a@example.jp", "b@example.jp", "c@example.jp", "d@example.jp"])

    def finish(self, octets: bytes, loop: tuple = ()) -> haineko.Message:
        trace = f"Received: by {NAME} id {'Q' * 16}"
        raw, header = haineko.parse_message(octets), haineko.Header(loop=tuple(loop))
        submission = haineko.Submission(mail="s@example.org", header=header, raw=raw)
        return haineko.complete_raw_message(submission, trace, "Q" * 16, NAME, haineko.rfc5322_date(int(NOW)))

    def test_a_finished_message_is_made_ready(self):
        message = self.finish(
            b"To: a@example.jp\nBcc: secret@example.jp\nReturn-Path: <x>\nSubject: a\n b\nX-Haineko-Loop: r1\n"
            b"\nMeow.\n.\n",
            ("r1",),
        )
        octets = message.copy("", 1)
        self.assertFalse(message.needs_8bitmime)
        self.assertFalse(re.search(rb"\r(?!\n)|(?<!\r)\n", octets))
        found = raw_fields(octets)
        self.assertEqual(
            [name for name, _ in found],
            ["Received", "To", "Subject", "From", "Date", "Message-Id", "X-Haineko-Loop"],
        )
        table = dict(found)
        self.assertEqual((table["Subject"], table["From"]), ("a\r\n b", "<s@example.org>"))
        self.assertEqual(table["X-Haineko-Loop"], f"r1, {NAME}")
        self.assertTrue(table["Received"].startswith(f"by {NAME} ") and "Q" * 16 in table["Received"])
        self.assertEqual(octets.partition(b"\r\n\r\n")[2], b"Meow.\r\n.\r\n")
        self.assertNotIn(b"secret", octets)

    def test_what_a_finished_message_says_itself_stays(self):
        head = b"From: A <a@example.jp>\nDate: Fri, 03 Jan 2014 18:35:58 +0900\nMessage-ID: <x@y>\nMIME-Version: 1.0\n"
        head += b"Content-Type: text/html; charset=UTF-8\nContent-Transfer-Encoding: 8bit\n"
        message = self.finish(head + "\nねこ\n".encode())
        octets = message.copy("", 1)
        self.assertTrue(message.needs_8bitmime)
        self.assertEqual([name for name, _ in haineko.parse_message(octets)[0]].count("message-id"), 1)
        for line in head.splitlines():
            self.assertIn(line + b"\r\n", octets)
        self.assertTrue(octets.endswith("\r\n\r\nねこ\r\n".encode()))

    def test_a_finished_message_without_mime(self):
        long = b"x" * 2000 + b"\n"
        for body, charset in (
            ("ねこ\n".encode(), "utf-8"), (b"\xe9\n", "unknown-8bit"), (long, "us-ascii"),
            (b"x" * 998 + b"\n\f\n", None), (b"\x1b$B$M$3\x1b(B\n", None), (b"\x1b$B$M$3\x1b(B" + long, "iso-2022-jp"),
        ):  # fmt: skip
            with self.subTest(body[:20]):
                message = self.finish(b"To: a@example.jp\n\n" + body)
                self.assertEqual(message.needs_8bitmime, not body.isascii())
                found = email.message_from_bytes(message.copy("", 1))
                self.assertEqual(found.get_content_charset(), charset)
                self.assertEqual(found.get_payload(decode=True), body.replace(b"\n", b"\r\n"))

    def test_lines_too_long_of_a_finished_message(self):
        with self.assertRaises(ValueError):
            self.finish(b"A: " + b"x" * 998 + b"\n\nb\n")
        self.assertIn(b"\r\nA: " + b"x" * 995 + b"\r\n", self.finish(b"A: " + b"x" * 995 + b"\n\nb\n").copy("", 1))
        for line in (
            b"A: " + b"x" * 997,
            b"A: " + b"x " * 5000,
            b"A:" + b" " * 900 + b"x\t" * 5000 + b"\n " + b"y" * 997,
        ):
            octets = self.finish(line + b"\n\nb\n").copy("", 1)
            self.assertLess(max(map(len, octets.split(b"\r\n"))), 999)
            self.assertIn(line.replace(b"\n", b""), octets.replace(b"\r\n", b""))
        octets = self.finish(b"MIME-Version: 1.0\n\n" + b"x" * 999 + b"\n").copy("", 1)
        self.assertEqual(email.message_from_bytes(octets).get_payload(decode=True), b"x" * 999 + b"\r\n")

    def test_a_message_in_seven_bits(self):
        text = "ねこ\r\nFrom here\r\n.\r\n" + "x" * 200 + "\r\n"
        head = b"From: a@example.jp\r\nSubject: " + b"s " * 60 + b"\r\nMIME-Version: 1.0\r\n"
        kind = b"Content-Type: text/plain; charset=UTF-8\r\nContent-Transfer-Encoding: 8bit\r\n"
        parts = b"Content-Type: multipart/mixed; boundary=XX\r\n\r\n--XX\r\n" + kind + b"\r\n" + text.encode()
        parts += b"\r\n--XX\r\nContent-Type: image/png\r\nContent-Transfer-Encoding: base64\r\n\r\nAAAA\r\n--XX--\r\n"
        for what, octets in (("one part", head + kind + b"\r\n" + text.encode()), ("two parts", head + parts)):
            with self.subTest(what):
                found = haineko.downgrade_8bit(octets)
                self.assertTrue(found.isascii())
                self.assertFalse(re.search(rb"\r(?!\n)|(?<!\r)\n", found))
                parsed = email.message_from_bytes(found)
                part = parsed.get_payload(0) if parsed.is_multipart() else parsed
                self.assertEqual(part.get_payload(decode=True).decode().splitlines(), text.splitlines())
                self.assertIn(b"Subject: " + b"s " * 59 + b"s", re.sub(rb"\r\n(?=[ \t])", b"", found))
                if parsed.is_multipart():
                    self.assertEqual(parsed.get_payload(1).get_payload(decode=True), b"\0\0\0")

    def test_octets_of_no_known_charset_in_seven_bits(self):
        for kind in (b"text/plain", b"text/plain; charset=bogus", b"image/png", b"text/plain; charset=latin1"):
            for coding in (b"", b"Content-Transfer-Encoding: 8bit\r\n", b"Content-Transfer-Encoding: binary\r\n"):
                with self.subTest(kind, coding=coding):
                    head = b"From: a@example.jp\r\nMIME-Version: 1.0\r\nContent-Type: " + kind + b"\r\n" + coding
                    found = haineko.downgrade_8bit(head + b"\r\nFrom caf\xe9 \xff\r\n")
                    self.assertTrue(found.isascii())
                    self.assertEqual(email.message_from_bytes(found).get_payload(decode=True), b"From caf\xe9 \xff\r\n")

    def test_parts_of_seven_bits_stay_as_they_are(self):
        part = b"Content-Type: text/plain\r\n\r\nFrom here\r\n.\r\n--XX\r\n"
        octets = (
            b"MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=XX\r\nContent-Transfer-Encoding: 8bit\r\n"
        )
        octets += b"\r\n--XX\r\n" + part + b"Content-Type: text/plain; charset=UTF-8\r\n\r\n\xe7\x8c\xab\r\n--XX--\r\n"
        found = haineko.downgrade_8bit(octets)
        self.assertIn(part, found)
        self.assertTrue(found.isascii())
        self.assertNotIn(b"8bit", found)


PDF, OCTETS = "application/pdf", "application/octet-stream"
HTML = '<p>Gr&uuml;&szlig;e <b>猫</b></p><img src="cid:logo">'
OF_HTML = "Grüße 猫\n"
CATS = "猫" * 90 + ".pdf"


def shape(part) -> str:
    """A message's structure in a line: alternative(plain, related(html, png))."""
    inner = ", ".join(shape(item) for item in part.iter_parts()) if part.is_multipart() else ""
    return part.get_content_subtype() + (f"({inner})" if inner else "")


def text_in(part) -> str:
    """What a part of text says, with LF."""
    octets, charset = part.get_payload(decode=True), part.get_content_charset()
    text = as_in_jis(octets) if charset == "iso-2022-jp" else octets.decode(charset)
    return text.replace("\r\n", "\n")


def files_in(message) -> list:
    """[(name, type, octets, disposition, content id)] of the parts that are files."""
    return [
        (
            part.get_filename(),
            part.get_content_type(),
            part.get_payload(decode=True) if not part.is_multipart() else part.get_payload(0).as_bytes(),
            part.get_content_disposition(),
            part.get("content-id"),
        )
        for part in message.walk()
        if part.get_content_disposition()
    ]


def ends(text: str) -> str:
    """Text as it comes out: LF, one behind the last line."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text if text.endswith("\n") else text + "\n"


class Mail:
    """A row of the corpus: what it is, changes to a submission, and what a reader finds beyond them."""

    def __init__(
        self, what: str, shape_: str = "plain", plain: str | None = None, files: tuple = (), **changes
    ) -> None:
        self.what, self.shape, self.changes = what, shape_, changes
        self.submission = document(**changes)
        self.plain = ends(self.submission.get("body", "")) if plain is None else plain
        self.files = files  # of (type, disposition) for each file


NAMED = {"a b.pdf": PDF, 'say "x".pdf': PDF, "a;b=c.pdf": PDF, "100%.pdf": PDF, "it's.pdf": PDF,
    "=?UTF-8?B?44Kt?=.pdf": PDF,
         "請求書.pdf": PDF, "請求書　2024年.pdf": PDF, "Rechnung für Müller.pdf": PDF, "😺.png": "image/png", CATS: PDF,
         "x" * 251 + ".pdf": PDF, "ｶﾞ①.pdf": PDF, "README": OCTETS, "a.unheard-of": OCTETS,
         "a.tar.gz": "application/gzip",
         "a.TXT": "text/plain", "b.csv": "text/csv", "a.docx": haineko.EXTRA_MEDIA_TYPES[".docx"], "mail.eml": OCTETS,
         "data:text,x.png": "image/png", ".profile": OCTETS, "a.pdf ": PDF, "👨‍👩‍👧.jpg": "image/jpeg"}  # fmt: skip
ATTACHED = [("attachment",)]
CORPUS = [
    Mail("text"),
    Mail("text in Japanese", body="あとで\r\nお年玉\n"),
    Mail("HTML beside text", "alternative(plain, html)", html="<p>x</p>", body="other words"),
    Mail("HTML alone", "alternative(plain, html)", OF_HTML, html=HTML.replace("cid:", "https://x/"), body=None),
    Mail("HTML alone, body empty", "alternative(plain, html)", OF_HTML,
         html=HTML.replace("cid:", "https://x/"), body=""),
    Mail("HTML that says nothing", "alternative(plain, html)", "\n", html="<p></p>", body=None),
    Mail("HTML with long lines", "alternative(plain, html)", html="<p>" + "x" * 5000 + "</p>"),
    Mail("HTML in ISO-2022-JP", "alternative(plain, html)", html="<p>髙①ガ～</p>", header={"charset": "ISO-2022-JP"}),
    Mail("HTML in ISO-8859-1", "alternative(plain, html)", html="<p>für</p>", header={"charset": "ISO-8859-1"}),
    Mail("HTML that the charset can't hold", "alternative(plain, html)", html="猫", header={"charset": "ISO-8859-1"}),
    Mail("lines with dots and From", "alternative(plain, html)", body=".\n..\nFrom me\n.", html=".\nFrom me\n.\n--x"),
    Mail("HTML with every line end", "alternative(plain, html)", html="a\rb\nc\r\nd\n\n", body="a\rb\nc\r\nd\n\n"),
    Mail("text and a file", "mixed(plain, pdf)", attachments=[file("a.pdf")], files=((PDF, "attachment"),)),
    Mail("one attachment, not in a list", "mixed(plain, pdf)", attachments=file("a.pdf"), files=((PDF, "attachment"),)),
    Mail("no attachments", attachments=[]),
    Mail("null for attachments", attachments=None),
    Mail("an empty file", "mixed(plain, pdf)", attachments=[file("a.pdf", b"")], files=((PDF, "attachment"),)),
    Mail("all octets", "mixed(plain, octet-stream)", attachments=[file("a", ALL_OCTETS)], files=((OCTETS,
    "attachment"),)),
    Mail("a file of many lines", "mixed(plain, plain)", attachments=[file("a.txt", b"a\nb\r\nc\rd\0 \t\n.\n" * 9999)],
         files=(("text/plain", "attachment"),)),
    Mail("a file in Latin-1", "mixed(plain, csv)", attachments=[file("a.csv", "Grüße\n".encode("latin-1"))],
         files=(("text/csv", "attachment"),)),
    Mail("three files", "mixed(plain, pdf, pdf, png)", attachments=[file("a.pdf"), file("a.pdf"), file("b.png", PNG)],
         files=((PDF, "attachment"), (PDF, "attachment"), ("image/png", "attachment"))),
    Mail("a file without a name", "mixed(plain, octet-stream)", attachments=[file()], files=((OCTETS, "attachment"),)),
    Mail("a file with a type", "mixed(plain, x-cat)", attachments=[file("a.pdf", type="Application/X-Cat")],
         files=(("application/x-cat", "attachment"),)),
    Mail("a type with parameters", "mixed(plain, calendar)", attachments=[
        file("a.ics", type='text/calendar; charset=utf-8; method="REQUEST" ;name=x.ics')],
        files=(("text/calendar", "attachment"),)),
    Mail("a file shown in line", "mixed(plain, png)", attachments=[file("a.png", PNG, inline=True)],
         files=(("image/png", "inline"),)),
    Mail("inline as a number", "mixed(plain, png)", attachments=[file("a.png", PNG, inline=0)],
         files=(("image/png", "attachment"),)),
    Mail("base64 in lines", "mixed(plain, pdf)", attachments=[
        {"filename": "a.pdf", "content": "JVBE\r\nRi0x\nLjQg AA0K"}], files=((PDF, "attachment"),)),
    Mail("a picture in HTML", "alternative(plain, related(html, png))", html=HTML, attachments=[
        file("l.png", PNG, cid="logo")], files=(("image/png", "inline"),)),
    Mail("a cid in brackets", "alternative(plain, related(html, png))",
         html=HTML.replace("cid:logo", "cid:logo%40x"), attachments=[
        file("l.png", PNG, cid="<logo@x>")], files=(("image/png", "inline"),)),
    Mail("a cid without HTML", "mixed(plain, png)", attachments=[file("l.png", PNG, cid="logo")],
         files=(("image/png", "inline"),)),
    Mail("two pictures in HTML", "alternative(plain, related(html, png, png))",
         html=HTML + '<i style="background: url( CID:LOGO)">', attachments=[
        file("l.png", PNG, cid="logo"), file("m.png", PNG, cid="LOGO")],
        files=(("image/png", "inline"), ("image/png", "inline"))),
    Mail("a receipt", "mixed(alternative(plain, related(html, png)), pdf)", html=HTML, attachments=[
        file("領収書.pdf"), file("logo.png", PNG, cid="logo")], files=(("image/png", "inline"), (PDF, "attachment"))),
    Mail("a receipt, HTML alone", "mixed(alternative(plain, related(html, png)), pdf)", OF_HTML, body=None, html=HTML,
         attachments=[file("logo.png", PNG, cid="logo"), file("a.pdf")], files=(("image/png", "inline"), (PDF,
         "attachment"))),
    Mail("HTML and a file", "mixed(alternative(plain, html), pdf)",
         html=HTML.replace("cid:", "https://x/"), attachments=[file("a.pdf")],
         files=((PDF, "attachment"),)),
    Mail("a receipt in ISO-2022-JP", "mixed(alternative(plain, related(html, png)), pdf)",
         html="<p>領収書<img src=cid:logo></p>",
    attachments=[
        file("領収書.pdf"), file("logo.png", PNG, cid="logo")], header={"charset": "iso-2022-jp", "subject": "領収書"},
        files=(("image/png", "inline"), (PDF, "attachment"))),
    Mail("a forwarded message", "mixed(plain, rfc822(plain))", attachments=[
        file("a.eml", b"From: a@b.example\nSubject: x\n\nMeow.\n", type="message/rfc822")],
        files=(("message/rfc822", "attachment"),)),
    *[Mail(f"a file called {name[:30]}", f"mixed(plain, {kind.partition('/')[2]})", attachments=[file(name)],
           files=((kind, "attachment"),)) for name, kind in NAMED.items()],
    Mail("shown recipients", header={"to": "A <a@example.jp>, b@example.jp", "cc": ["c@example.jp"]}),
    Mail("shown recipients in Japanese", header={"to": ["猫 <a@example.jp>", '"B, C" <b@example.jp>'], "cc": None}),
    Mail("further fields", header={
        "Message-ID": "<1@example.org>", "in-reply-to": "<2@example.org>", "references": ["<2@x>", "<3@y>"],
        "date": "Fri, 03 Jan 2014 18:35:58 +0900", "organization": "猫の会", "X-Campaign": "spring",
        "x_long": "meow " * 99}),
    Mail("a comment like an encoded word", header={"comments": "=?UTF-8?B?44Kt?=", "Keywords": "a, b"}),
]  # fmt: skip


class Parts(unittest.TestCase):
    maxDiff = None

    def check_form(self, octets: bytes) -> None:
        """What holds for every message, whatever is in it."""
        self.assertTrue(octets.endswith(b"\r\n"))
        self.assertIsNone(re.search(rb"\r(?!\n)|(?<!\r)\n|\0", octets))
        self.assertTrue(octets.isascii())
        self.assertLessEqual(max(map(len, octets.split(b"\r\n"))), 998)

    def test_the_corpus(self):
        self.assertGreaterEqual(len(CORPUS), 60)
        for mail in CORPUS:
            with self.subTest(mail.what):
                octets = composed(mail.submission)
                self.check_form(octets)
                found = parsed(octets)
                self.assertEqual([part.defects for part in found.walk() if part.defects], [])
                self.assertEqual(shape(found), mail.shape)
                self.check_texts(mail, found)
                self.check_files(mail, found)
                self.check_fields(mail, found)

    def check_texts(self, mail: Mail, found) -> None:
        texts = [part for part in found.walk() if part.get_content_maintype() == "text"]
        texts = [part for part in texts if not part.get_content_disposition()][: 2 if "html" in mail.shape else 1]
        self.assertEqual(text_in(texts[0]), mail.plain)
        if "html" in mail.shape:
            self.assertEqual(text_in(texts[1]), ends(mail.submission["html"]))
        asked = mail.submission["header"].get("charset", "UTF-8").lower()
        held = "can't hold" not in mail.what
        self.assertEqual({part.get_content_charset() for part in texts}, {asked if held else "utf-8"})

    def check_files(self, mail: Mail, found) -> None:
        given = mail.submission.get("attachments", [])
        given = [given] if isinstance(given, dict) else given
        given = sorted(given, key=lambda item: not ("html" in mail.shape and item.get("cid")))
        wanted = []
        for item, (kind, disposition) in zip(given, mail.files):
            name = item.get("filename", "").strip().replace("ｶﾞ", "ガ" if "2022" in str(mail.submission) else "ｶﾞ")
            cid = item.get("cid")
            wanted.append(
                (name or None, kind, base64.b64decode(item["content"]), disposition, cid and f"<{cid.strip('<>')}>")
            )
        self.assertEqual(len(given), len(mail.files))
        self.assertEqual(files_in(found), wanted)

    def check_fields(self, mail: Mail, found) -> None:
        header = mail.submission["header"]
        self.assertEqual(found["subject"], header["subject"])
        self.assertEqual(found["mime-version"], "1.0")
        for key, value in header.items():
            if key not in ("from", "subject", "charset", "to", "cc"):
                given = " ".join(value) if isinstance(value, list) else value
                self.assertEqual(str(found[key.replace("_", "-")]), given)
        for name in ("to", "cc") if "to" in header else ():
            given = header.get(name)
            texts = given if isinstance(given, list) else [given] if given else []
            wanted = [pair for text in texts for pair in email.utils.getaddresses([text])]
            shown = [(item.display_name, item.addr_spec) for item in (found[name].addresses if found[name] else ())]
            self.assertEqual(shown, wanted)

    def test_email_is_not_imported(self):
        code = "import sys, haineko; s = haineko.parse_submission(sys.stdin.buffer.read()).submission;"
        code += " haineko.compose(s, 'Q' * 16, None, 'x', 0.0); print('email.policy' in sys.modules)"
        for changes, wanted in (
            ({}, b"False"),
            ({"header": {"to": "a@example.jp", "x-a": "猫"}}, b"False"),
            ({"html": "x"}, b"False"),
        ):
            found = subprocess.run([sys.executable, "-c", code], input=as_body(document(**changes)),
                capture_output=True,
                                   check=True, cwd=os.path.dirname(PROGRAM), env=environment())  # fmt: skip
            self.assertEqual(found.stdout.strip(), wanted, found.stderr)

    def test_order_of_the_header(self):
        submission = document(
            mail="other@example.org",
            html="x",
            header={
                "X-b": ["1", "2"],
                "references": "<r@x>",
                "in_reply_to": "<i@x>",
                "ListId": "cats <l.example.org>",
                "ORGANIZATION": "Cats",
                "to": "a@example.jp",
                "cc": "b@example.jp",
                "reply-to": "c@example.jp",
            },
        )
        head = composed(submission).partition(b"\r\n\r\n")[0].decode()
        names = [line.partition(":")[0] for line in re.split("\r\n(?![ \t])", head)]
        self.assertEqual(names, [
            "Received", "From", "Sender", "To", "Cc", "Reply-To", "Subject", "Date", "Message-Id", "X-B", "X-B",
                "References",
            "In-Reply-To", "List-Id", "Organization", "X-Haineko-Loop", "MIME-Version", "Content-Type"])  # fmt: skip

    def test_keys_of_a_header_in_any_spelling(self):
        for key in ("replyto", "reply-to", "Reply_To", "REPLY-TO", "replyTo", "Reply-to"):
            with self.subTest(key):
                found = understood(document(header={key: "a@example.jp"}))
                self.assertEqual(found.header.replyto[0][1].addr_spec, "a@example.jp")
        for key, name in (
            ("X_Mailer", "X-Mailer"),
            ("x-ses-configuration-set", "X-Ses-Configuration-Set"),
            ("X-SMTPAPI", "X-SMTPAPI"),
            ("list_unsubscribe_post", "List-Unsubscribe-Post"),
            ("inReplyTo", "In-Reply-To"),
            ("FEEDBACK-ID", "Feedback-Id"),
        ):
            with self.subTest(key):
                value = "<a@b>" if key == "inReplyTo" else "a"
                self.assertIn(f"\r\n{name}: {value}\r\n".encode(), composed(document(header={key: value})))
        found = understood(document(header={"Charset": "iso-2022-jp", "SUBJECT": "\x1b$BG-\x1b(B", "subject": None}))
        self.assertEqual((found.header.charset, found.header.subject), ("ISO-2022-JP", "猫"))

    def test_a_message_id_of_the_client_is_that_of_every_copy(self):
        found = understood(document(header={"message-id": "<a@b>"}))
        message = haineko.compose(found, "Q" * 16, None, NAME, NOW)
        for number, to in enumerate(("x@example.jp", "猫@example.jp"), 1):
            head = parsed(message.copy(to, number))
            self.assertEqual((head["message-id"], head.get_all("to")), ("<a@b>", [to]))

    def test_nothing_null_or_empty_makes_a_field(self):
        header = {
            "to": "",
            "cc": [],
            "bcc": None,
            "x-a": "",
            "x-b": None,
            "date": "",
            "organization": None,
            "references": [],
        }
        octets = composed(document(header=header))
        self.assertEqual(octets, composed(document()))


DERIVED = [
    ("words", "a  <b>b</b>\n c", "a b c"),
    ("nothing", "", ""),
    ("entities", "&lt;a&gt; &amp; &nbsp;&eacute;&#29483;", "<a> &  é猫"),
    ("lines", "a<br>b<br/>c<br><br>d", "a\nb\nc\n\nd"),
    ("paragraphs", "<p>a</p><p>b</p>c<div>d</div>e", "a\n\nb\n\nc\nd\ne"),
    ("a heading", "<h1>A</h1>b", "A\n\nb"),
    ("a list", "<ul><li>a</li><li> b</ul>c", "* a\n* b\n\nc"),
    ("a table", "<table><tr><td>Cat</td><td> 1 </td></tr><tr><th>Sum<th>2</table>", "Cat  1\nSum  2"),
    ("a link", '<a href="https://x/y">here</a>.', "here <https://x/y>."),
    ("a link that says where", '<a href="https://x/y">https://x/y</a> <a href="mailto:a@b">a@b</a>', "https://x/y a@b"),
    ("links to nowhere", '<a href="#x">a</a> <a>b</a> <a href="javascript:x">c</a></a>', "a b c"),
    ("a link to write", '<a href="mailto:a@b">Write</a>', "Write <mailto:a@b>"),
    ("pictures", 'a <img src="cid:x" alt="Logo"> <img src="y"><img alt>', "a Logo"),
    (
        "what is not shown",
        "<head><title>T</title><style>p {}</style></head><script>x<p></script><template>y</template>b",
        "b",
    ),
    ("a comment", "a<!-- b <p> -->c", "ac"),
    (
        "a comment for Outlook",
        "a<!--[if mso]><p>b</p><![endif]-->c<![if !mso]>d<![endif]>e<!--[if !mso]><!-->f<!--<![endif]-->g",
        "acdefg",
    ),
    ("text as it is", "<pre>a\n  b\n</pre>c", "a\n  b\n\nc"),
    ("a rule", "a<hr>b", "a\n-----\nb"),
    ("what never ends", "a<b>c<p", "ac"),
    ("a lone angle", "1 < 2 and 3 > 2 & so on", "1 < 2 and 3 > 2 & so on"),
    ("full-width spaces", "<p>　猫　猫</p>", "　猫　猫"),
    ("a declaration", "<!DOCTYPE html><html><body>a</body></html>", "a"),
    ("sections that html.parser trips over", "a<![CDATA[b]]>c<![x[y]]>d<![", "acd"),
]


class DerivedText(unittest.TestCase):
    def test_text_of_html(self):
        for what, html, wanted in DERIVED:
            with self.subTest(what):
                self.assertEqual(haineko.html_to_text(html), wanted + "\n")

    def test_what_costs_much(self):
        for piece in ("<a ", "<", "<!--", "<![", "</", "&", "<a a='", "<p>", "<!", "<?", "<a href='https://x'>",
            "</a>", "<pre>", "<title>", "<template>",
                      "<script>", "<![if]", "<a b=", "<a/", "<textarea>", "&#x", " "):  # fmt: skip
            with self.subTest(piece):
                began = time.process_time()
                haineko.html_to_text(piece * (200000 // len(piece)))
                self.assertLess(time.process_time() - began, 2)


# ======================================================================================================================
# 8. Routes
# ======================================================================================================================


class Routes(unittest.TestCase):
    def route(self, recipient: str, sender: str, **tables) -> tuple:
        """(host, why) of the route chosen by tables of {key: host}."""
        tables = {name: {key: {"host": host} for key, host in table.items()} for name, table in tables.items()}
        found, why = haineko.resolve_route(recipient, sender, settings(**{"mailertable": {}, **tables}))
        return found.host, why

    def test_the_order_of_the_tables(self):
        both = {
            "mailertable": {
                "example.jp": "m1",
                ".example.jp": "m2",
                ".jp": "m3",
                "a.b.example.jp": "m4",
                "default": "m5",
            },
            "sendermt": {"example.org": "s1", ".example.org": "s2", "default": "s3"},
        }
        cases = [
            ("itself", "example.jp", "example.org", both, "m1", 'mailertable["example.jp"]'),
            ("without case", "EXAMPLE.JP", "example.org", both, "m1", 'mailertable["example.jp"]'),
            ("a subdomain", "b.example.jp", "example.org", both, "m2", 'mailertable[".example.jp"]'),
            ("one below", "x.a.b.example.jp", "example.org", both, "m2", 'mailertable[".example.jp"]'),
            ("the longest", "a.b.example.jp", "example.org", both, "m4", 'mailertable["a.b.example.jp"]'),
            ("the top", "other.jp", "example.org", both, "m3", 'mailertable[".jp"]'),
            ("not the end of a label", "notexample.com", "x.example", both, "m5", "mailertable.default"),
            ("the sender's", "example.com", "example.org", both, "s1", 'sendermt["example.org"]'),
            ("the sender's without case", "example.com", "Example.ORG", both, "s1", 'sendermt["example.org"]'),
            ("the sender's parent", "example.com", "a.b.example.org", both, "s2", 'sendermt[".example.org"]'),
            ("default", "example.com", "example.net", both, "m5", "mailertable.default"),
            ("the sender's default", "example.com", "a.net", {"sendermt": {"default": "s3"}}, "s3", "sendermt.default"),
            ("none", "example.com", "example.net", {}, "127.0.0.1", "no route matches"),
            ("a literal", "[192.0.2.1]", "x.example", {"mailertable": {"default": "m5"}}, "m5", "mailertable.default"),
            ("a domain named default", "default", "x.example", {"mailertable": {"default": "d"}}, "d", None),
        ]
        for what, recipient, sender, tables, host, why in cases:
            with self.subTest(what):
                found = self.route(recipient, sender, **tables)
                self.assertEqual(found[0], host)
                self.assertIn(why or "", found[1])

    def test_a_disabled_route_is_as_if_absent(self):
        table = {
            "example.jp": {"host": "m1", "disabled": 1},
            ".jp": {"host": "m2"},
            "default": {"host": "m3", "disabled": True},
        }
        found = settings(mailertable=table, sendermt={"example.org": {"host": "s1"}})
        for recipient, sender, host in [
            ("example.jp", "example.org", "m2"),
            ("example.com", "example.org", "s1"),
            ("example.com", "x.example", "127.0.0.1"),
        ]:
            with self.subTest(recipient, sender=sender):
                self.assertEqual(haineko.resolve_route(recipient, sender, found)[0].host, host)

    def test_entries(self):
        cases = [
            ("a.b.c", ["a.b.c", ".b.c", ".c"]),
            ("a", ["a"]),
            ("[192.0.2.1]", ["[192.0.2.1]", ".0.2.1]", ".2.1]", ".1]"]),
        ]
        for domain, wanted in cases:
            with self.subTest(domain):
                self.assertEqual(list(haineko.lookup_keys(domain)), wanted)

    def test_a_look_up_costs_the_same_in_a_large_table(self):
        route = haineko.Route(host="m1")
        small = haineko.Settings(mailertable={"example.jp": route})
        large = haineko.Settings(mailertable={**{f"d{i}.example": route for i in range(100000)}, "example.jp": route})

        def cost(table: haineko.Settings) -> float:
            began = time.process_time()
            for _ in range(2000):
                haineko.resolve_route("a.b.example.jp", "example.org", table)
            return time.process_time() - began

        self.assertLess(min(cost(large) for _ in range(3)), 5 * min(cost(small) for _ in range(3)))


# ======================================================================================================================
# 9. Waiting
# ======================================================================================================================


# ======================================================================================================================
# 10. DNS
# ======================================================================================================================


class DnsMessages(unittest.TestCase):
    QUESTION = Question(struct.pack(">6H", 7, 0x0100, 1, 0, 0, 0) + wire_name("Neko.example") + b"\0\x0f\0\x01")

    def parse(self, octets: bytes, name: str = "neko.example", kind: int = haineko.MX, number: int = 7):
        return haineko.parse_response(octets, number, name, kind)

    def test_every_kind_of_record_is_read(self):
        long_text = "v=spf1 " + "x" * 300
        for kind, given, wanted in (
            (haineko.A, "192.0.2.7", "192.0.2.7"),
            (haineko.AAAA, "2001:db8::7", "2001:db8::7"),
            (haineko.MX, (10, "MX.Neko.example"), (10, "mx.neko.example")),
            (haineko.CNAME, "Else.example", "else.example"),
            (haineko.TXT, long_text, long_text),
            (haineko.TXT, "", ""),
        ):
            with self.subTest(kind=kind, given=given):
                record = wire_record("Neko.Example", kind, given, 61)
                found = self.parse(self.QUESTION.answer(record, kind=kind), kind=kind)
                self.assertEqual(found, haineko.DNSAnswer(haineko.NOERROR, (wanted,), ttl=61))
                found = self.parse(self.QUESTION.answer(record, kind=99), kind=99)
                alias = wanted if kind == haineko.CNAME else ""
                self.assertEqual(found, haineko.DNSAnswer(haineko.NOERROR, (), "", alias, 61 if alias else 60))

    def test_names_are_decompressed(self):
        # the answer points at the question's name, its host at "example" within that
        octets = self.QUESTION.answer() + b"\xc0\x0c\0\x0f\0\x01\0\0\0\x3c\0\x07\0\x05\x02mx\xc0\x11"
        octets = octets[:6] + b"\0\x01" + octets[8:]
        self.assertEqual(self.parse(octets), haineko.DNSAnswer(haineko.NOERROR, ((5, "mx.example"),), ttl=60))

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

    def test_a_dot_within_a_label_makes_no_other_name(self):
        octets = self.QUESTION.answer(wire_record("neko.example", haineko.MX, (1, "x"))[:-3] + b"\x04a.jp\0")
        octets = octets.replace(b"\0\x05\0\x01\x04a.jp", b"\0\x08\0\x01\x04a.jp")
        host = self.parse(octets).values[0][1]
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
                began, code = time.process_time(), haineko.TRUNCATED
                with contextlib.suppress(ValueError):
                    code = self.parse(octets).code
                self.assertEqual(code, haineko.TRUNCATED)
                self.assertLess(time.process_time() - began, 0.2)
        with self.assertRaises(ValueError):
            haineko.read_name(b"\0\0" + b"".join(struct.pack(">H", 0xC000 | 2 * i) for i in range(4000)), 8000)


class NameServers(WithCertificates):
    def look_up(self, server, name: str, kind: int, seconds: float = 5.0, **options) -> haineko.DNSAnswer:
        places = server if isinstance(server, tuple) else (server.place,)
        resolver = haineko.Resolver(places, **options)
        resolver.QUERY_TIMEOUT = 0.3
        return haineko.run(resolver.lookup(name, kind, time.monotonic() + seconds))

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

    def test_a_query_octet_for_octet(self):
        server = self.enter(NameServer({"neko.example": {haineko.MX: [(1, "a.example")]}}))
        for name, question in (("neko.example", b"\x04neko\x07example\0\0\x0f\0\x01"), ("", b"\0\0\x0f\0\x01")):
            server.asked.clear()
            self.look_up(server, name, haineko.MX)
            self.assertEqual(server.asked[0][0].octets[2:], b"\x01\0\0\x01\0\0\0\0\0\0" + question)

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
            ("SERVFAIL with records", lambda q, _: [q.answer(good, code=2)], None),
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
        self.assertIn("do not answer the query", self.look_up(server, "a.example", haineko.A).why)

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
        self.assertTrue(all(0 <= haineko.random_unit() < 1 for _ in range(100)))

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
            haineko.run(resolver.lookup(name, haineko.A, time.monotonic() + 5))
            return len(server.asked) - before

        for name, times in (
            ("a.example", [(0, 1), (1, 0), (99, 0), (101, 1), (150, 0)]),
            ("zero.example", [(0, 1), (0, 1)]),
            ("alias.example", [(0, 2), (49, 0), (51, 2)]),
            ("none.example", [(0, 1), (59, 0), (61, 1)]),
            ("fails.example", [(0, haineko.Resolver.ATTEMPTS)] * 2),
            ("ages.example", [(0, 1), (0, 1)]),  # RFC 2181 8
            ("years.example", [(0, 1), (86399, 0), (86401, 1)]),
        ):
            for at, wanted in times:
                with self.subTest(name, at=at):
                    self.assertEqual(asked(name, at), wanted)

    def test_what_is_kept_is_bounded(self):
        clock = [0.0]
        kept = haineko.TTLCache(3, lambda: clock[0])
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
                self.assertEqual(haineko.resolv_conf_servers(path), wanted)
        self.assertEqual(haineko.resolv_conf_servers(path + "x"), (("127.0.0.1", 53),))

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
                found = haineko.from_dict(haineko.Smtpd, {"resolver": value}, "smtpd", faults)
                self.assertEqual(haineko.name_server_endpoint(value), wanted)
                self.assertEqual((found.resolver, bool(faults)), ((value,) if wanted else (), not wanted))

    def test_look_ups_under_way_are_shared(self):
        server = self.enter(NameServer({"a.example": {haineko.A: ["192.0.2.1"], "ttl": 0}}))
        resolver = haineko.Resolver((server.place,))
        for zone, values, asked in (
            ({haineko.A: ["192.0.2.1"], "ttl": 0}, ("192.0.2.1",), 1),
            (lambda q, _: [q.answer(code=2)], (), haineko.Resolver.ATTEMPTS),
        ):
            server.zone, found = {"a.example": zone}, []
            server.asked.clear()

            async def one(found=found) -> None:
                found.append(await resolver.lookup("a.example", haineko.A, time.monotonic() + 5))

            haineko.run(together(*[one() for _ in range(64)]))
            self.assertEqual([answer.values for answer in found], [values] * 64)
            self.assertEqual(len(server.asked), asked)
        self.assertEqual(resolver.calls, {})


class Names(haineko.Connector):
    """Connects to hosts whose addresses it is told, as late as it is told."""

    def __init__(self, addresses: list | None) -> None:
        super().__init__()
        self.addresses, self.gate = addresses, threading.Event()

    def _look_up(self, host: str, future) -> None:
        if self.addresses is None:
            self.gate.wait(9)
        future.set_result(self.addresses or ["127.0.0.1"])


def swallow(test: unittest.TestCase, address: str, port: int) -> str:
    """The address, which from now on answers no attempt to connect to that port: its queue is full."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family)
    test.addCleanup(listener.close)
    listener.bind((address, port))
    listener.listen(0)
    for _ in range(4):
        sock = socket.socket(family)
        test.addCleanup(sock.close)
        sock.setblocking(False)
        sock.connect_ex((address, port))
    return address


class Connections(unittest.TestCase):
    def test_an_address_that_is_silent_is_tried_last_for_a_while(self):
        with socket.create_server(("127.0.0.1", 0)) as good:
            port = good.getsockname()[1]
            connector = Names([swallow(self, "::1", port), "127.0.0.1"])
            for limits in ((0.2, 2.0), (0.0, 0.2)):  # what failed is tried last for a while
                began = time.monotonic()
                with connector.connect("host.example", port, began + 9) as sock:
                    self.assertEqual(sock.getpeername(), ("127.0.0.1", port))
                self.assertTrue(limits[0] <= time.monotonic() - began < limits[1])
            self.assertTrue(connector.failed_lately(("::1", port)))
            connector.failed["::1", port] -= connector.FAILED_TTL
            self.assertFalse(connector.failed_lately(("::1", port)))

    def test_none_answers(self):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            port = sock.getsockname()[1]
        with self.assertRaises(ConnectionRefusedError):
            Names(["::1", "127.0.0.1"]).connect("host.example", port, time.monotonic() + 9)
        began, host = time.monotonic(), swallow(self, "::1", port)
        with self.assertRaises(socket.timeout):
            Names([host]).connect("host.example", port, began + 0.4)
        self.assertLess(time.monotonic() - began, 2)

    def test_a_slow_look_up_ends_at_the_deadline(self):
        connector, began = Names(None), time.monotonic()
        for _ in range(3):
            with self.assertRaises(socket.timeout):
                connector.connect("host.example", 25, time.monotonic() + 0.1)
        self.assertLess(time.monotonic() - began, 3)
        connector.gate.set()
        self.assertRaises(OSError, haineko.Connector().connect, "no.such.host.invalid", 25, time.monotonic() + 9)


class HostsOfADomain(unittest.TestCase):
    def hosts(self, values: tuple, hostname: str = "relay.example") -> list:
        """The hosts of a domain with these MX records."""

        class Resolver:
            async def lookup(self, *_) -> haineko.DNSAnswer:
                return haineko.DNSAnswer(haineko.NOERROR, values)

        return haineko.run(haineko.mx_hosts("neko.example", Resolver(), hostname, float("inf")))

    def test_order(self):
        values = ((20, "c"), (10, "a"), (10, "b"), (5, "mx.bad host"), (5, ""))
        orders = {tuple(self.hosts(values)) for _ in range(100)}
        self.assertEqual(orders, {("a", "b", "c"), ("b", "a", "c")})

    def test_equal_ones_are_shuffled(self):
        values = tuple((10, f"mx{i}") for i in range(4))
        orders = {tuple(self.hosts(values)) for _ in range(300)}
        self.assertGreater(len(orders), 12)

    def test_this_host_and_those_behind_it_are_left_out(self):
        values = ((10, "a"), (20, "relay.example"), (20, "b"), (30, "c"))
        self.assertEqual(self.hosts(values, "Relay.example"), ["a"])
        with self.assertRaises(haineko.Rejected) as caught:
            self.hosts(values[1:])
        self.assertEqual(caught.exception.reply.dsn, "5.4.6")

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
                self.assertEqual(haineko.mta_sts_id(texts), wanted)

    def test_the_text(self):
        good = "version: STSv1\r\nmode: enforce\r\nmx: MX1.example.\r\nmx: *.example.net\r\nmax_age: 604800\r\n"
        policy = haineko.MTASTSPolicy("enforce", ("mx1.example", "*.example.net"), 604800)
        for what, text, wanted in (
            ("whole", good, policy),
            ("LF", good.replace("\r\n", "\n") + "\n", policy),
            ("no end of line", good.rstrip(), policy),
            ("unknown keys", good + "nyan: 1\n", policy),
            ("a key twice: the first counts", good + "mode: none\n", policy),
            ("max_age over the top", good.replace("604800", "9999999999"), policy._replace(max_age=31557600)),
            ("none needs no host", "version:STSv1\nmode:none\nmax_age:1", haineko.MTASTSPolicy("none", (), 1)),
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
                    self.assertEqual(haineko.parse_mta_sts_policy(text), wanted)
                else:
                    self.assertRaises(ValueError, haineko.parse_mta_sts_policy, text)

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
                policy = haineko.MTASTSPolicy(mode, ("mx1.example", "*.example.net"), 60)
                self.assertEqual(policy.allows(host), admitted)


# ======================================================================================================================
# 11. Web sessions
# ======================================================================================================================


class WebSessions(unittest.TestCase):
    """Connections that are used again."""

    def test_one_connection_serves_many_mails(self):
        for mailer, answer in PEERS.items():
            with self.subTest(mailer), HttpPeer(answer) as peer:
                relayed(composed_job(web_route(mailer, peer.url)), times=4)
                self.assertEqual([asked.line for asked in peer.asked], [1, 1, 1, 1])

    def test_chunked_and_closing_answers(self):
        body = b'{"MessageId": "1"}'
        chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"%x\r\n%b\r\n0\r\n\r\n" % (
            len(body),
            body,
        )
        closing = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body
        for what, wire, lines in (("chunked", chunked, [1, 1]), ("closing", closing, [1, 2])):
            with self.subTest(what), HttpPeer(lambda asked, wire=wire: wire) as peer:
                replies = relayed(composed_job(web_route("AmazonSES", peer.url)), times=2)
                self.assertEqual([said.code for (said,) in replies], ["250", "250"])
                self.assertEqual([asked.line for asked in peer.asked], lines)

    def test_a_kept_connection_that_was_closed_is_replaced(self):
        with HttpPeer(as_mandrill) as peer:
            job = composed_job(web_route("Mandrill", peer.url))

            def hang_up() -> None:
                peer.hang_up()
                eventually(lambda: not peer.open)

            replies = relayed(job, times=3, between=hang_up)
            self.assertEqual([said.code for (said,) in replies], ["250"] * 3)
            self.assertEqual([asked.line for asked in peer.asked], [1, 2, 3])

    def test_a_kept_connection_is_not_replaced_once_the_request_was_sent(self):
        def answer(asked):
            return as_mandrill(asked) if len(peer.asked) == 1 else "close"

        with HttpPeer(answer) as peer:
            (first,), (second,) = relayed(composed_job(web_route("Mandrill", peer.url)), times=2)
            self.assertEqual((first.code, second.code, second.maybe_delivered), ("250", "451", True))
            self.assertEqual(len(peer.asked), 2)

    def test_idle_connections_are_closed_and_bounded(self):
        async def story(route, peer) -> None:
            web = haineko.HTTPConnectionPool()
            call = haineko.HTTPRequest("GET", "/v3/scopes", headers=haineko.bearer_header(route))
            target = haineko.HTTPTarget.of_route(route)
            await asyncio.gather(*[web.request(target, call) for _ in range(5)])
            self.assertEqual((peer.lines, len(web.idle[target])), (5, 5))
            web.MAX_IDLE = 2
            web.sweep(everything=True)
            await asyncio.gather(*[web.request(target, call) for _ in range(5)])
            self.assertEqual(len(web.idle[target]), 2)
            for line in web.idle[target]:
                line.expires = 0.0
            web.sweep()
            self.assertEqual(web.idle, {})

        with HttpPeer(as_sendgrid) as peer:
            haineko.run(story(web_route("SendGrid", peer.url), peer))

    def test_messages_by_others_go_to_another_haineko_as_they_are(self):
        head = "From: a@example.org\nTo: b@example.jp\nSubject: x\nMIME-Version: 1.0\n"
        for more in (
            'Content-Type: text/plain; charset="utf-8"\nContent-Transfer-Encoding: 7bit\n',
            "Content-Type: text/plain; charset=utf-8\n",
            "Content-Type: text/plain; charset=UTF-8\nSubject: =?x-nyaa?B?bnlhYQ==?=\n",
        ):
            form = {"mail": "a@example.org", "rcpt": "b@example.jp", "raw": f"{head}{more}\nMeow\n"}
            call = haineko.haineko_request(composed_job(web_route("Haineko", "http://127.0.0.1:1"), form))
            self.assertIn("raw", json.loads(call.body), more)
            self.assertEqual(haineko.parse_submission(call.body)[1], [])

    def test_two_authors_or_none_are_more_than_amazon_takes(self):
        for head in ("From: a@example.org\nFrom: b@example.org\n", "From:\n"):
            form = {"mail": "a@example.org", "rcpt": "b@example.jp", "raw": f"{head}Subject: x\n\nMeow\n"}
            with HttpPeer(lambda asked: (200, {"MessageId": "x"}, ())) as peer:
                ((said,),) = relayed(composed_job(web_route("AmazonSES", peer.url), form))
            self.assertEqual((said.code, said.dsn, len(peer.asked)), ("550", "5.6.3", 0), said)

    def test_a_slow_cloud_delays_nobody_else(self):
        async def story(slow, quick) -> float:
            sessions, began = haineko.TransportContext(), time.monotonic()
            took: list = []

            async def timed(job) -> None:
                await haineko.attempt_transaction(job, sessions)
                took.append(time.monotonic() - began)

            await and_closed(asyncio.gather(timed(slow), *[timed(quick) for _ in range(5)]), sessions)
            return sorted(took)[4]

        with HttpPeer(lambda asked: "hang") as hanging, HttpPeer(as_mandrill) as peer:
            jobs = composed_job(web_route("Mandrill", hanging.url)), composed_job(web_route("Mandrill", peer.url))
            self.assertLess(haineko.run(story(*jobs)), 0.9)

    def test_retries_wait_as_long_as_the_cloud_says(self):
        def answer(asked):
            if len(peer.asked) == 1:
                return 429, {"errors": [{"message": "slow"}]}, (("Retry-After", wait),)
            return as_sendgrid(asked)

        for wait, code, least in (("1", "250", 1.0), ("120", "451", 0.0)):
            with self.subTest(wait), HttpPeer(answer) as peer:
                began = time.monotonic()
                route = web_route("SendGrid", peer.url, retry=1, sleep=0)
                sessions = haineko.TransportContext()
                (outcome,) = haineko.run(
                    and_closed(haineko.deliver([composed_job(route)], sessions, settings()), sessions)
                )
                self.assertEqual(outcome.replies[0].code, code)
                self.assertTrue(least <= time.monotonic() - began < least + 3)

    def test_a_kept_connection_that_dies_while_the_request_is_sent_is_replaced_once(self):
        seen = []

        def serve(listener) -> None:
            for number in range(2):
                sock, _ = listener.accept()
                stream = sock.makefile("rb")
                for turn in range(2):
                    head = b"".join(iter(lambda stream=stream: HttpPeer._line(stream), b""))
                    if number == 0 and turn == 1:
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                        break  # in the middle of the body, with a reset
                    if not head:
                        break
                    stream.read(int(re.search(rb"(?i)content-length: *(\d+)", head)[1]))
                    seen.append(number)
                    sock.sendall(on_the_wire(200, [{"email": "mikeneko@example.jp", "status": "sent", "_id": "x"}]))
                stream.close()
                sock.close()

        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVBUF, 65536
            )  # so that the request does not fit into buffers
            threading.Thread(target=serve, args=(listener,), daemon=True).start()
            route = web_route("Mandrill", f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=5)
            replies = relayed(composed_job(route, web_submission(body="y" * (8 << 20))), times=2)
        self.assertEqual([said.code for (said,) in replies], ["250", "250"], replies)
        self.assertEqual(seen, [0, 1])

    def test_interim_responses_are_skipped(self):
        body = b'{"MessageId": "1"}'
        final = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        for interim in (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"):
            with HttpPeer(lambda asked, interim=interim: interim * 3 + final) as peer:
                replies = relayed(composed_job(web_route("AmazonSES", peer.url)), times=2)
                self.assertEqual([said.code for (said,) in replies], ["250", "250"])

    def test_answers_without_end_end_at_the_limit_or_the_deadline(self):
        head, chunked = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"
        long = b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"
        for what, first, more, status in (
            ("100 Continue", b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0),
            ("103 Early Hints", b"", b"HTTP/1.1 103 x\r\nA: b\r\n\r\n", 0),
            ("header fields", head, b"X: y\r\n", 0),
            ("one header field", head + b"X: ", b"y", 0),
            ("body", long, b"y", 200),
            ("chunks", chunked, b"1\r\ny\r\n", 200),
            ("trailers", chunked + b"0\r\n", b"X: y\r\n", 200),
        ):
            for pause, count in ((0.05, 1), (0.0, 4096)):
                with self.subTest(what, pause=pause), Endless(first, more * count, pause) as peer:
                    target, pool = haineko.HTTPTarget(peer.url, 0.6, "Webhook"), haineko.HTTPConnectionPool()
                    began = time.monotonic()
                    try:
                        response = haineko.run(pool.request(target, haineko.HTTPRequest("POST", "/", b"{}")))
                        self.assertEqual((response.status, response.body), (status, b""))
                    except haineko.Rejected as refused:
                        self.assertEqual((refused.reply.code, refused.reply.maybe_delivered, status), ("451", True, 0))
                    self.assertLess(time.monotonic() - began, 3)

    def test_a_webhook_that_drips_is_given_up(self):
        with Endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.05) as peer, HttpPeer(lambda asked: (204, "", ())) as good:
            for url, limit, wanted in ((peer.url, 0.5, ("451", "Webhook")), (good.url, 5.0, ("250", "Webhook"))):
                message, pool = haineko.Message((b"{}",)), haineko.HTTPConnectionPool()
                item = haineko.QueueItem("Q" * 16, "event", "", "", 0.0, message)
                leased = haineko.LeasedRecipient(1, item, haineko.NewRecipient(url, f"{url}/x?y=1", 1, ""), 0)
                began = time.monotonic()
                reply = haineko.run(haineko.post_webhook(leased, b"secret", 0.0, pool, limit))
                pool.sweep(everything=True)
                self.assertEqual((reply.code, reply.mailer), wanted)
                self.assertLess(time.monotonic() - began, 3)
            self.assertEqual([(asked.method, asked.path) for asked in good.asked], [("POST", "/x?y=1")])


class Endless:
    """An HTTP server that never comes to an end: `first`, then `more` again and again."""

    def __init__(self, first: bytes, more: bytes, pause: float) -> None:
        self.first, self.more, self.pause, self.over = first, more, pause, threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        with contextlib.suppress(OSError), self.listener.accept()[0] as sock:
            sock.recv(65536)
            sock.sendall(self.first)
            while not self.over.wait(self.pause):
                sock.sendall(self.more)

    def __enter__(self) -> Endless:
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.thread.join(5)
        self.listener.close()


@unittest.skipUnless(shutil.which("openssl"), "needs openssl for certificates")
class WebTls(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.certificate, cls.key = (os.path.join(folder.name, name) for name in ("cert.pem", "key.pem"))
        words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
        words += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", cls.key, "-out", cls.certificate]
        subprocess.run(words, check=True, capture_output=True)
        cls.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        cls.context.load_cert_chain(cls.certificate, cls.key)

    def test_the_certificate_is_checked(self):
        for what, more, code, dsn in (
            ("unknown authority", {}, "451", "4.7.5"),
            ("known authority", {"ca_file": self.certificate}, "250", "2.0.0"),
            ("not checked", {"tls_verify": False}, "250", "2.0.0"),
        ):
            with self.subTest(what), HttpPeer(as_amazonses, self.context) as peer:
                route = web_route("AmazonSES", peer.url, timeout=5, **more)
                replies = relayed(composed_job(route), times=2)
                self.assertEqual([(said.code, said.dsn) for (said,) in replies], [(code, dsn)] * 2, replies)
                self.assertEqual([asked.line for asked in peer.asked], [1, 1] if code == "250" else [])

    def test_https_of_a_haineko(self):
        with HttpPeer(as_haineko, self.context) as peer:
            route = web_route("Haineko", host="127.0.0.1", port=peer.port, https=1, ca_file=self.certificate, timeout=5)
            self.assertEqual(first_reply(composed_job(route)).code, "250")

    def test_no_tls_there(self):
        with HttpPeer(as_haineko) as peer:
            route = web_route("Haineko", host="127.0.0.1", port=peer.port, https=1)
            self.assertEqual(first_reply(composed_job(route))[:3], ("451", "4.7.5", "CONN"))


# ======================================================================================================================
# 12. Signatures
# ======================================================================================================================


RFC8463_MESSAGE = b"""\
From: Joe SixPack <joe@football.example.com>
To: Suzie Q <suzie@shopping.example.net>
Subject: Is dinner ready?
Date: Fri, 11 Jul 2003 21:00:37 -0700 (PDT)
Message-ID: <20030712040037.46341.5F8J@football.example.com>

Hi.

We lost the game.  Are you hungry yet?

Joe.
""".replace(b"\n", b"\r\n")


def dkim_keys(*domains: str, key: str = RFC8463_KEY, selector: str = "s1") -> dict:
    """The section `dkim` with one key for all these domains."""
    return {domain: {"selector": selector, "key": key} for domain in domains}


def signatures_of(octets: bytes) -> list:
    """The tags of each DKIM-Signature in a message."""
    header = haineko.parse_message(octets).fields
    return [haineko.parse_tags(haineko.unfold(field)) for name, field in header if name == "dkim-signature"]


class Signatures(Folder, Peers):
    def setUp(self) -> None:
        Folder.setUp(self)
        Peers.setUp(self)

    def test_vector_of_rfc_8463(self) -> None:
        """Appendix A: the public key, the body hash, and the signature of the canonical header."""
        key = haineko.PrivateKey(RFC8463_KEY.encode())
        self.assertEqual(base64.b64encode(key.public[-32:]), b"11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=")
        head, _, body = RFC8463_MESSAGE.partition(b"\r\n\r\n")
        digest = base64.b64encode(hashlib.sha256(haineko._relaxed_body(body)).digest())
        self.assertEqual(digest, b"2jUSOH9NhtVGCQWNr9BrIAPreKQjO6Sn7XIkfJVOzv8=")
        field = (
            b"DKIM-Signature: v=1; a=ed25519-sha256; c=relaxed/relaxed;\r\n d=football.example.com; "
            b"i=@football.example.com;\r\n q=dns/txt; s=brisbane; t=1528637909; h=from : to :\r\n subject : date : "
            b"message-id : from : subject : date;\r\n bh=2jUSOH9NhtVGCQWNr9BrIAPreKQjO6Sn7XIkfJVOzv8=;\r\n b="
        )
        data = b"\r\n".join(map(haineko._relaxed_field, [*head.split(b"\r\n"), field]))
        self.assertEqual(
            base64.b64encode(key.sign(hashlib.sha256(data).digest())).decode(),
            "/gCrinpcQOoIfuHNQIbq4pgh9kyIK3AQUdt9OdqQehSwhEIug4D11BusFa3bT3FY5OsU7ZbnKELq+eXdp1Q1Dw==",
        )

    def test_known_answers(self) -> None:
        """RSA: what `openssl dgst -sha256 -sign` makes of it; fields: at a fixed time, as dkimpy found them good."""
        key = haineko.PrivateKey(TEST_RSA_KEY.encode())
        self.assertEqual(haineko.rsa_bits(key.public), 2048)
        self.assertEqual(
            hashlib.sha256(key.sign(b"Nyaa")).hexdigest(),
            "2ffccef5897eb56e4ffdef2dcab77d31fad83edefcace4782529f8716d18f872",
        )
        for pem, wanted in (
            (RFC8463_KEY, "5862b82f0deb2a2fbac216f404f5d0aa5d27dcdb4c376970ffe4e96f3bde5daa"),
            (TEST_RSA_KEY, "6fba1db93f938f37f541202226ce628062a30820db8a62b408ddb35e43932b0c"),
        ):
            private = haineko.PrivateKey(pem.encode())
            key = haineko.DkimKey("s1", "", "football.example.com", private)
            field = haineko.dkim_signature(RFC8463_MESSAGE, key, 1528637909)
            with self.subTest(wanted):
                self.assertEqual(hashlib.sha256(field).hexdigest(), wanted)
                self.assertTrue(all(len(line) <= 78 for line in field.split(b"\r\n")))

    def test_canonical_forms(self) -> None:
        for body, wanted in (
            (b"", b""),
            (b"\r\n\r\n", b""),
            (b" \t\r\n \r\n", b""),
            (b" C \r\nD \t E\r\n\r\n\r\n", b" C\r\nD E\r\n"),  # RFC 6376 3.4.5
            (b"no end", b"no end\r\n"),
            (b"end \t", b"end\r\n"),
            (b".\r\n..\r\n", b".\r\n..\r\n"),
        ):
            with self.subTest(body):
                self.assertEqual(haineko._relaxed_body(body), wanted)
        for line, wanted in ((b"A: X", b"a:X"), (b"B : Y\t\r\n\tZ  ", b"b:Y Z"), (b"C:", b"c:")):
            self.assertEqual(haineko._relaxed_field(line), wanted)

    def test_keys_that_cannot_be_used(self) -> None:
        small = subprocess.run(["openssl", "genrsa", "1024"], capture_output=True, check=True).stdout
        locked = b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIG7\n-----END ENCRYPTED PRIVATE KEY-----\n"
        for pem, words in (
            (small, "RSA key of 2048 bits or more"),
            (b"", "expected a PEM private key"),
            (b"n-y-a-a", "expected a PEM private key"),
            (locked, "expected a PEM private key"),
            (TEST_CERTIFICATE.encode(), "expected an Ed25519 key, or an RSA key"),
        ):
            with self.subTest(words), self.assertRaisesRegex(ValueError, words):
                haineko.PrivateKey(pem)

    def test_settings(self) -> None:
        self.write("s1.pem", RFC8463_KEY.encode())
        by_file = {"selector": "s1", "key": {"file": "s1.pem"}}
        path = self.write("haineko.json", {"dkim": {"Example.ORG": by_file}}, 0o644)
        found, faults = haineko.load_settings(path)
        self.assertEqual(faults, [])
        key = found.dkim["example.org"]
        self.assertEqual((key.selector, key.domain, key.private.is_ed25519), ("s1", "example.org", True))
        self.assertIn(os.path.join(self.folder, "s1.pem"), [name for name, _ in found.files])
        self.assertEqual(haineko.redacted(found)["dkim"], {"example.org": {"selector": "s1", "key": "********"}})
        for section, mode, wanted in (
            ({".example.org": by_file}, 0o600, ["dkim..example.org: expected a domain"]),
            ({"a.jp": {"key": by_file["key"]}}, 0o600, ["dkim.a.jp.selector: expected a selector"]),
            ({"a.jp": {**by_file, "selector": "a b"}}, 0o600, ['dkim.a.jp.selector: expected a selector, got "a b"']),
            ({"a.jp": {"selector": "s"}}, 0o600, ["dkim.a.jp.key: expected a PEM private key without a passphrase"]),
            ({"a.jp": {**by_file, "key": {"file": "no.pem"}}}, 0o600, ["dkim.a.jp.key.file: no.pem: No such file"]),
            ({"a.jp": {**by_file, "key": {"env": "NYAA_"}}}, 0o600, ["dkim.a.jp.key.env: no environment variable"]),
            ({"a.jp": {**by_file, "key": 1}}, 0o600, ["dkim.a.jp.key: expected a string, got a number"]),
            (dkim_keys("a.jp"), 0o644, [f"{path}: holds secrets and can be read by everybody"]),
            (dkim_keys("a.jp"), 0o600, []),
        ):
            with self.subTest(section, mode=oct(mode)):
                faults = haineko.load_settings(self.write("haineko.json", {"dkim": section}, mode))[1]
                self.assertEqual(len(faults), len(wanted), faults)
                for fault, words in zip(faults, wanted):
                    self.assertTrue(fault.startswith(words), fault)

    def test_a_python_without_libcrypto_says_so(self) -> None:
        haineko.libcrypto.cache_clear()
        self.addCleanup(haineko.libcrypto.cache_clear)
        path = self.write("haineko.json", {"dkim": dkim_keys("example.org")})
        words = "dkim.example.org.key: this Python has no OpenSSL libcrypto that can be used"
        with patched(haineko, LIBCRYPTO=("nyaa_no_such_function",)):
            self.assertEqual(haineko.load_settings(path)[1], [words])

    def test_a_shared_message_is_signed_once(self) -> None:
        class CountingKey(haineko.PrivateKey):
            count = 0

            def sign(self, data: bytes) -> bytes:
                CountingKey.count += 1
                return super().sign(data)

        with SmtpPeer() as one, SmtpPeer() as two:
            force = settings(
                mailertable={"a.example": esmtp(one), "b.example": esmtp(two)}, dkim=dkim_keys("example.org")
            )
            key = haineko.replace(force.dkim["example.org"], private=CountingKey(RFC8463_KEY.encode()))
            mail = document(header={"to": "a@a.example, b@b.example"}, rcpt=None)
            self.assertEqual(posted(mail, haineko.replace(force, dkim={"example.org": key}))[0], 200)
            signatures = [signatures_of(peer.mails[0].text)[0]["b"] for peer in (one, two)]
        self.assertEqual((CountingKey.count, len(set(signatures))), (1, 1))

    def test_who_signs(self) -> None:
        """By the domain of From, then those above it; one signature of a domain is enough."""
        keys = settings(dkim={**dkim_keys("example.org"), **dkim_keys("b.example.org", selector="s2")}).dkim
        old = b"DKIM-Signature: v=1; d=%b;\r\n s=x; b=AAAA\r\n"
        for author, more, wanted in (
            (b"a@example.org", b"", ("example.org", "s1")),
            (b"A <a@EXAMPLE.org>", b"", ("example.org", "s1")),
            (b"a@b.example.org", b"", ("b.example.org", "s2")),
            (b"a@c.b.example.org", b"", ("b.example.org", "s2")),
            (b"a@bexample.org", b"", None),
            (b"a@org", b"", None),
            (b"a@[127.0.0.1]", b"", None),
            (b"nobody", b"", None),
            (b"a@example.org", old % b"Example.org", None),
            (b"a@example.org", old % b"example.com", ("example.org", "s1")),
            (b"a@b.example.org", old % b"example.org", ("b.example.org", "s2")),
        ):
            with self.subTest(author, more=more):
                octets = more + b"From: " + author + b"\r\nSubject: x\r\n\r\nNyaa\r\n"
                mail = job(haineko.Route(), text=octets)._replace(dkim=keys)
                found = signatures_of(haineko.run(haineko.sign_transaction(mail)).octets())
                fresh = [(tags["d"], tags["s"]) for tags in found if tags["s"] != "x"]
                self.assertEqual(fresh, [wanted] if wanted else [])

    def test_which_routes_sign(self) -> None:
        keys = settings(dkim=dkim_keys("example.org")).dkim
        for route, wanted in (
            ({}, 1),
            ({"mailer": "MX"}, 1),
            ({"dkim": False}, 0),
            ({"host": "email-smtp.eu-west-1.amazonaws.com"}, 0),
            ({"host": "EMAIL.AmazonAWS.com."}, 0),
            ({"host": "amazonaws.com.example.jp"}, 1),
            *(({"mailer": name}, 0) for name in haineko.RELAYS if name not in ("ESMTP", "MX")),
        ):
            with self.subTest(route):
                mail = job(haineko.Route(**route))._replace(dkim=keys)
                signed = haineko.run(haineko.sign_transaction(mail))
                self.assertEqual(len(signatures_of(signed.octets())), wanted)
        self.assertEqual(signatures_of(haineko.run(haineko.sign_transaction(job(haineko.Route()))).octets()), [])

    def test_what_arrives(self) -> None:
        raw = "From: a@example.org\nSubject: 猫\nContent-Type: text/plain; charset=UTF-8\n\nにゃあ  \n.\nNyaa"
        peer = self.peer(None, "8BITMIME", "PIPELINING")
        for changes, recipients in (
            ({}, 2),
            ({"header": {"list-id": "<a.example.org>", "list-unsubscribe": "<https://example.org/>"}}, 2),
            ({"header": {"to": "a@example.jp, b@example.jp"}, "rcpt": None, "html": "<p>猫</p>"}, 1),
            ({"raw": raw}, 1),
        ):
            for pem in (RFC8463_KEY, TEST_RSA_KEY):
                with self.subTest(changes, key=pem[:40]):
                    peer.mails.clear()
                    force = settings(
                        mailertable={"default": esmtp(peer)}, dkim=dkim_keys("example.org", key=pem), smtpd=FOUR
                    )
                    whole = document(**{"rcpt": ["a@example.jp", "b@example.jp"], **changes})
                    if "raw" in whole:
                        del whole["header"], whole["body"]
                    self.assertEqual(posted(whole, force)[0], 200)
                    self.assertEqual(len(peer.mails), recipients)
                    for mail in peer.mails:
                        self.see_signature(mail.text, "rsa" if pem is TEST_RSA_KEY else "ed25519")

    def see_signature(self, octets: bytes, algorithm: str) -> None:
        self.assertTrue(octets.startswith(b"DKIM-Signature: v=1; "), octets[:80])
        self.assertTrue(octets.isascii())
        head, _, body = octets.partition(b"\r\n\r\n")
        [tags] = signatures_of(octets)
        digest = base64.b64encode(hashlib.sha256(haineko._relaxed_body(body)).digest()).decode()
        self.assertEqual((tags["a"], tags["bh"], tags["c"]), (f"{algorithm}-sha256", digest, "relaxed/relaxed"))
        self.assertLess(abs(int(tags["t"]) - time.time()), 60)
        self.assertNotIn("l", tags)
        names = collections.Counter(tags["h"].replace(" ", "").split(":"))
        present = collections.Counter(re.findall(r"(?m)^([\w-]+):", head.decode().lower()))
        for name in ("from", "to", "cc", "subject", "date", "message-id", "reply-to", "content-type"):
            self.assertEqual(names[name], present[name] + 1, name)
        for name in ("list-id", "list-unsubscribe", "received", "x-haineko-loop", "sender"):
            self.assertEqual(names[name], present[name] if name.startswith("list") else 0, name)

    def test_mail_that_waits_is_signed_by_the_key_of_the_day(self) -> None:
        """So are bounces, which come from MAILER-DAEMON@mx.example.org."""
        fates = {"later": ["451 4.2.0 not now", None], "gone": ["451 4.2.0 not now", "554 5.7.1 no"]}
        peer = queue_peer(lambda to, count: fates.get(to.partition("@")[0], [None])[min(count, 2) - 1])
        self.addCleanup(peer.close)
        force = {**queue_settings(peer, retry_after=[3600]), "dkim": dkim_keys("example.org")}
        server = served(self, force)
        queueid = server.submit("later@example.jp", "gone@example.jp")[2]["queueid"]
        server.write({**force, "dkim": dkim_keys("example.org", selector="s2")})
        eventually(lambda: '"s2"' in json.dumps(server.get("/conf")[1]), "the new settings")
        server.queue("retry", queueid)
        eventually(lambda: peer.to("later@example.jp") and peer.to("kijitora@example.org"), "a mail and a bounce", 15)
        seen = sorted((mail.recipients[0].partition("@")[0], signatures_of(mail.text)[0]["s"]) for mail in peer.mails)
        wanted = [("gone", "s1"), ("gone", "s2"), ("kijitora", "s2"), ("later", "s1"), ("later", "s2")]
        self.assertEqual(seen, wanted)
        self.assertNotIn("PRIVATE", server.log() + json.dumps(server.get("/conf")[1]))

    def test_json_web_token(self) -> None:
        key = haineko.PrivateKey(TEST_RSA_KEY.encode())
        claims = {"iss": "cat@example.org", "iat": 1700000000, "exp": 1700003600}
        token = haineko.sign_jwt(claims, key)
        head, payload, signature = [base64.urlsafe_b64decode(part + "==") for part in token.split(".")]
        self.assertNotRegex(token, r"[^A-Za-z0-9_.-]")
        self.assertEqual((json.loads(head), json.loads(payload)), ({"alg": "RS256", "typ": "JWT"}, claims))
        self.assertEqual(signature, key.sign(token.rpartition(".")[0].encode()))
        self.assertEqual(
            hashlib.sha256(token.encode()).hexdigest(),
            "14cb0e0e5449a75f6cb688be34be2f235338cf754967725c7bcf3ecbe96bb9a1",
        )


FOUR = {"hostname": NAME, "max_rcpts_per_message": 4}


# ======================================================================================================================
# 13. OAuth2
# ======================================================================================================================


class OAuth2Settings(Folder):
    """`oauth2` of a login, and what follows from it."""

    def test_faults(self):
        self.write("account.json", {"client_email": "x", "private_key": "none"})
        self.write("open.json", {}, 0o644)
        for oauth2, fault in (
            ({"provider": "microsft"}, '.provider: unknown provider "microsft"; did you mean "microsoft"?'),
            ({"provider": "microsoft", "client_id": "i", "client_secret": "s"}, ".tenant: oauth2 needs it"),
            ({"provider": "google", "client_secret": "s"}, ".client_id: oauth2 needs it"),
            ({"provider": "google", "client_id": "i"}, ".client_secret: oauth2 needs it"),
            ({"client_id": "i", "client_secret": "s"}, ".provider: oauth2 needs it"),
            ({"token_url": "ftp://x", "access_token": "t"}, ".token_url: expected a URL"),
            ({"provider": "microsoft", "tenant": "a/b", "access_token": "t"}, ".tenant: expected a host name"),
            (
                {"provider": "google", "client_id": "i", "refresh_token": {"file": "none"}},
                ".refresh_token.file: none: No such",
            ),
            ({"access_token": {"env": "HAINEKO_NONE"}}, ".access_token.env: no environment variable"),
            ({"service_account": "none"}, ".service_account.file: none: No such file"),
            ({"service_account": "open.json"}, ".service_account.file: open.json: can be read by everybody"),
            ({"service_account": "account.json"}, ".service_account: expected the JSON file of a Google"),
            ({"client": "x"}, ".client: unknown key"),
        ):
            with self.subTest(oauth2):
                login = {"key": {"username": "u", "oauth2": oauth2}}
                faults = haineko.load_settings(self.write("haineko.json", {"authinfo": login}))[1]
                self.assertTrue(faults[0].startswith(f"authinfo.key.oauth2{fault}"), faults)
        faults = haineko.load_settings(
            self.write("haineko.json", {"authinfo": {"key": {"oauth2": {"access_token": "t"}}}})
        )[1]
        self.assertEqual(faults, ["authinfo.key.username: oauth2 needs it"])

    def test_what_the_provider_fills_in(self):
        microsoft = {"provider": "microsoft", "tenant": "example.org", "client_id": "i", "client_secret": "s"}
        google = {"provider": "google", "client_id": "i", "client_secret": "s", "refresh_token": "r"}
        url = "https://login.microsoftonline.com/example.org/oauth2/v2.0/token"
        for oauth2, mailer, wanted in (
            (microsoft, "ESMTP", (url, "https://outlook.office365.com/.default")),
            (
                {**microsoft, "refresh_token": "r"},
                "ESMTP",
                (url, "https://outlook.office.com/SMTP.Send offline_access"),
            ),
            ({**microsoft, "scope": "x", "token_url": "http://127.0.0.1/t?a"}, "ESMTP", ("http://127.0.0.1/t?a", "x")),
            (microsoft, "MSGraph", (url, "https://graph.microsoft.com/.default")),
            (google, "ESMTP", ("https://oauth2.googleapis.com/token", "https://mail.google.com/")),
            (google, "GmailAPI", ("https://oauth2.googleapis.com/token", "https://mail.google.com/")),
        ):
            with self.subTest(oauth2, mailer=mailer):
                login = {"key": {"username": "u", "oauth2": oauth2}}
                found = settings(authinfo=login, mailertable={"default": {"mailer": mailer, "auth": "key"}})
                resolved = found.mailertable["default"].oauth2
                self.assertEqual((resolved.token_url, resolved.scope), wanted)


class TokenPeers(Folder, Peers):
    """A test with token endpoints."""

    def setUp(self) -> None:
        Peers.setUp(self)
        Folder.setUp(self)

    def route(self, provider, hop: SmtpPeer | None = None, user: str = "neko", **oauth2) -> haineko.Route:
        hop = hop or self.peer({}, "AUTH XOAUTH2", logins={user: "ya29.token"})
        url = getattr(provider, "url", provider) + "/token?x=1"
        oauth2 = {"token_url": url, "client_id": "app", "client_secret": "geheim-1", "scope": "s", **oauth2}
        login = {"key": {"username": user, "oauth2": {key: value for key, value in oauth2.items() if value}}}
        route = {"host": hop.host, "port": hop.port, "auth": "key", "timeout": 1}
        content = {"authinfo": login, "mailertable": {"default": route}}
        found, faults = haineko.load_settings(self.write("haineko.json", content))
        self.assertEqual(faults, [])
        return found.mailertable["default"]

    def provider(self, *said) -> HttpPeer:
        """A token endpoint; the last answer holds for ever."""
        said = list(said or [(200, {"access_token": "ya29.token", "expires_in": 3600})])
        peer = HttpPeer(lambda asked: said.pop(0) if len(said) > 1 else said[0])
        peer.__enter__()
        self.addCleanup(peer.__exit__)
        return peer

    def cache(self, *clock) -> haineko.TokenCache:
        pool = haineko.HTTPConnectionPool()
        self.addCleanup(pool.sweep, everything=True)
        return haineko.TokenCache(pool, *clock)

    def asked(self, peer: HttpPeer) -> list:
        return [dict(urllib.parse.parse_qsl(item.body.decode())) for item in peer.asked]


class AccessTokens(TokenPeers):
    """Tokens: fetched, kept, renewed."""

    def test_one_fetch_for_all_who_wait(self):
        provider = self.provider()
        route = self.route(provider)
        tokens, found = self.cache(), []

        async def one() -> None:
            found.append((await tokens.authorize(route)).credentials)

        haineko.run(together(*[one() for _ in range(20)]))
        self.assertEqual(found, [("neko", "ya29.token")] * 20)
        tokens, provider.answer, hops = self.cache(), lambda _: (400, {}), []

        async def refused(host: str) -> None:
            try:
                await tokens.authorize(replace(route, host=host))
            except haineko.Rejected as rejected:
                hops.append(rejected.reply.host)

        haineko.run(together(refused("a.example"), refused("b.example")))
        self.assertEqual((hops, len(provider.asked)), (["a.example", "b.example"], 2))
        form = {"grant_type": "client_credentials", "client_id": "app", "client_secret": "geheim-1", "scope": "s"}
        self.assertEqual(self.asked(provider), [form] * 2)
        self.assertEqual(provider.asked[0].path, "/token?x=1")
        self.assertEqual(provider.asked[0].headers["content-type"], "application/x-www-form-urlencoded")

    def test_when_it_is_renewed(self):
        date = (("Date", "Mon, 01 Jan 2001 00:00:00 GMT"),)  # a clock that is wrong
        for lifetime, fresh, renewed in (
            ({"expires_in": 3600}, 2999, 3001),
            ({"expires_in": "3600"}, 2999, 3001),
            ({"expires_in": 600}, 299, 301),
            ({}, 299, 301),
            ({"expires_in": None}, 299, 301),
            ({"expires_in": 3600.5}, 2999, 3001),
            ({"expires_in": 10}, 4.9, 5.1),
            ({"expires_in": 0}, -1, 0),
            ({"expires_in": -5}, -1, 0),
            ({"expires_in": [1]}, -1, 0),
        ):
            with self.subTest(lifetime):
                provider, clock = self.provider((200, {"access_token": "ya29.token", **lifetime}, date)), [0.0]
                route, tokens = (
                    self.route(provider),
                    self.cache(lambda clock=clock: clock[0]),
                )

                async def at(now: float, tokens=tokens, route=route, clock=clock) -> None:
                    clock[0] = now
                    self.assertEqual((await tokens.token_for(route)).text, "ya29.token")

                for now, count in ((0.0, 1), (fresh, 1), (renewed, 2)) if fresh > 0 else ((0.0, 1), (renewed, 2)):
                    haineko.run(at(now))
                    self.assertEqual(len(provider.asked), count)

    def test_one_that_still_holds_is_used_while_the_provider_fails(self):
        provider = self.provider((200, {"access_token": "a", "expires_in": 3600}), (503, b"later"))
        route, clock = self.route(provider), [0.0]
        tokens = self.cache(lambda: clock[0])
        for now, wanted in ((0.0, "a"), (3599.0, "a"), (3601.0, None)):
            clock[0] = now
            try:
                found = haineko.run(tokens.token_for(route)).text
            except haineko.Rejected as rejected:
                found = None
                self.assertIn("HTTP 503", rejected.reply.message[1])
            self.assertEqual(found, wanted)

    def test_what_a_provider_may_say(self):
        long = "AADSTS7000215: Invalid client secret provided.\r\nTrace ID: 1\r\nTimestamp: 2026"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            nobody = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for what, said, words in (
            (
                "wrong tenant",
                (400, {"error": "invalid_request", "error_description": "AADSTS90002: Tenant not found"}),
                "invalid_request: AADSTS90002: Tenant not found",
            ),
            (
                "expired secret",
                (401, {"error": "invalid_client", "error_description": long}),
                "invalid_client: AADSTS7000215: Invalid client secret provided.",
            ),
            ("revoked grant", (400, {"error": "invalid_grant"}), "invalid_grant"),
            (
                "repeats the secret",
                (400, {"error": "invalid_client", "error_description": "geheim-1 is wrong"}),
                "invalid_client: ******** is wrong",
            ),
            ("HTML", (200, b"<html>Log in"), "HTTP 200 OK, no access token in it"),
            ("no token", (200, {"token_type": "Bearer"}), "HTTP 200 OK, no access token in it"),
            ("an error with 200", (200, {"error": "slow_down"}), "slow_down"),
            ("a list", (200, [1]), "HTTP 200 OK, no access token in it"),
            ("a token with a line end", (200, {"access_token": "a\r\nb"}), "the access token is not one word of ASCII"),
            ("a token that is a number", (200, {"access_token": 5}), "the access token is not one word of ASCII"),
            (
                "a redirection",
                (302, b"", (("Location", "http://127.0.0.1/"),)),
                "HTTP 302 Because, no access token in it",
            ),
            ("hangs", "hang", "timed out"),
            ("drips", "drip", "timed out"),
            ("hangs up", "close", "Remote end closed connection"),
            ("nobody there", None, "Connection refused"),
        ):
            with self.subTest(what):
                provider = nobody if said is None else self.provider(said)
                hop = self.peer({}, "AUTH XOAUTH2")
                began = time.monotonic()
                ((reply,),) = carried(job(self.route(provider, hop, timeout=None)))
                self.assertLess(time.monotonic() - began, 3)
                self.assertEqual(
                    (reply.code, reply.dsn, reply.command, reply.message[0]),
                    ("454", "4.7.0", "AUTH", "No access token"),
                )
                self.assertTrue(reply.route_fault and reply.temporary and not reply.maybe_delivered)
                self.assertEqual((reply.mailer, reply.host, reply.port), ("ESMTP", hop.host, hop.port))
                self.assertIn(words, reply.message[1])
                (line,) = self.logged()
                self.assertIn("AUTH failed, mail waits", line)
                self.assertNotIn("geheim-1", line + " ".join(reply.message))
                self.assertEqual(hop.connections, [])

    def test_a_mail_without_a_token_is_answered_503(self):
        provider, hop = self.provider((400, {"error": "invalid_grant"})), self.peer({}, "AUTH XOAUTH2")
        oauth2 = {"token_url": f"{provider.url}/t", "client_id": "i", "client_secret": "s"}
        login = {"key": {"username": "u", "oauth2": oauth2}}
        status, answer = posted(document(), settings(authinfo=login, mailertable={"default": esmtp(hop, auth="key")}))
        self.assertEqual((status, answer["response"][0]["message"]), (503, ["No access token", "invalid_grant"]))

    def test_refresh_tokens(self):
        fine = {"access_token": "ya29.token", "expires_in": 0}
        provider = self.provider((200, {**fine, "refresh_token": "new"}), (200, fine))
        link, kept = os.path.join(self.folder, "link"), self.write("refresh", "old\n")
        os.symlink(kept, link)
        for source, told in (
            ({"file": "link"}, ""),
            ("old", "put the new one into the settings, ours may end"),
        ):
            with self.subTest(source):
                provider = self.provider(
                    (200, {**fine, "refresh_token": "new"}), (200, fine), (400, {"error": "invalid_grant"}), (200, fine)
                )
                route, tokens = (
                    self.route(provider, refresh_token=source),
                    self.cache(),
                )
                for _ in range(4):
                    with contextlib.suppress(haineko.Rejected):
                        haineko.run(tokens.token_for(route))
                used = [form["refresh_token"] for form in self.asked(provider)]
                self.assertEqual(used, ["old", "new", "new", "new" if isinstance(source, dict) else "old"])
                self.assertEqual(self.asked(provider)[0]["grant_type"], "refresh_token")
                lines = "".join(self.logged())
                self.assertEqual("the provider replaced the refresh token of neko" in lines, bool(told))
                self.assertIn(told, lines)
        with open(kept) as stream:
            self.assertEqual(stream.read(), "new\n")
        self.assertEqual((os.stat(kept).st_mode & 0o777, os.path.islink(link)), (0o600, True))
        self.assertEqual(sorted(os.listdir(self.folder)), ["haineko.json", "link", "refresh"])
        self.assertIn(
            "can't be written", haineko.save_refresh_token(haineko.OAuth2(refresh_token={"file": "/nowhere/x"}), "new")
        )

    def test_a_service_account(self):
        account = {"client_email": "bot@example.iam", "private_key": TEST_RSA_KEY, "type": "service_account"}
        self.write("account.json", account)
        provider = self.provider()
        route = self.route(provider, service_account="account.json", client_id="", client_secret="", scope="")
        self.assertEqual(haineko.run(self.cache().token_for(route)).text, "ya29.token")
        (form,) = self.asked(provider)
        self.assertEqual(form["grant_type"], "urn:ietf:params:oauth:grant-type:jwt-bearer")
        head, claims, signature = (base64.urlsafe_b64decode(part + "==") for part in form["assertion"].split("."))
        claims = json.loads(claims)
        self.assertEqual((json.loads(head)["alg"], len(signature)), ("RS256", 256))
        self.assertEqual(
            (claims["iss"], claims["sub"], claims["aud"]), ("bot@example.iam", "neko", route.oauth2.token_url)
        )
        self.assertEqual((claims["exp"] - claims["iat"], claims["scope"]), (3600, "https://mail.google.com/"))
        self.assertLess(abs(claims["iat"] - time.time()), 60)

    def test_a_token_by_a_command(self):
        self.write(
            "program", "#!/bin/sh\ntest -e sealed && { echo vault is sealed >&2; exit 1; }\necho ya29.token\n", 0o700
        )
        route = self.route("http://127.0.0.1", access_token={"command": ["./program"]})
        sealed = replace(
            route, oauth2=replace(route.oauth2, access_token={"command": ["sh", "-c", "echo sealed >&2; exit 1"]})
        )
        self.assertEqual(carried(job(route))[0][0].code, "250")
        self.assertEqual(carried(job(sealed))[0][0].message, ("No access token", ".command: sh: sealed"))


class TokenLogins(TokenPeers):
    """XOAUTH2 and OAUTHBEARER."""

    def test_both_mechanisms(self):
        for offer, length, inline, user in (
            ("AUTH LOGIN XOAUTH2", 20, True, "neko@example.org"),
            ("AUTH OAUTHBEARER PLAIN", 20, True, "ne,k=o"),
            ("AUTH OAUTHBEARER XOAUTH2", 20, True, "neko"),
            ("AUTH XOAUTH2", 4096, False, "neko"),
            ("AUTH OAUTHBEARER", 4096, False, "neko"),
        ):
            with self.subTest(offer, length=length):
                token = "t" * length
                hop = self.peer({}, offer, logins={user: token})
                provider = self.provider((200, {"access_token": token, "expires_in": 3600}))
                replies = carried(*[job(self.route(provider, hop, user))] * 2)
                self.assertEqual([reply.code for (reply,) in replies], ["250", "250"])
                command = next(line for line in hop.lines if line.startswith("AUTH"))
                self.assertEqual(command.split()[1], "XOAUTH2" if "XOAUTH2" in offer else "OAUTHBEARER")
                self.assertEqual(len(command.split()) == 3, inline)
                self.assertEqual((len(hop.connections), len(provider.asked)), (1, 1))

    def test_the_line_is_at_most_512_octets(self):
        for length, inline in ((333, True), (348, True), (349, False)):  # 5 + 7 + 1 + 4 * ceil((length + 24) / 3) + 2
            hop = self.peer({}, "AUTH XOAUTH2", logins={"neko": "t" * length})
            with self.subTest(length):
                provider = self.provider((200, {"access_token": "t" * length, "expires_in": 3600}))
                self.assertEqual(carried(job(self.route(provider, hop)))[0][0].code, "250")
                command = next(line for line in hop.lines if line.startswith("AUTH"))
                self.assertEqual(" " in command[5:], inline)
                self.assertLessEqual(len(command) + 2, 512)

    def test_a_token_that_is_refused_is_replaced_once_a_minute(self):
        for offer, answer in (("AUTH XOAUTH2", ""), ("AUTH OAUTHBEARER", "AQ==")):
            with self.subTest(offer):
                hop = self.peer({}, offer, logins={"neko": "good"})
                said = [(200, {"access_token": word, "expires_in": 3600}) for word in ("bad.token", "good")]
                provider = self.provider(*said)
                route = self.route(provider, hop)
                self.assertEqual([reply.code for (reply,) in carried(job(route), job(route))], ["250", "250"])
                self.assertEqual((hop.answers, len(provider.asked)), ([answer], 2))
                self.assertEqual(len(hop.connections), 2)
                hop = self.peer({}, offer, logins={"neko": "good"})
                provider = self.provider((200, {"access_token": "still.bad", "expires_in": 3600}))
                route = self.route(provider, hop)
                for (reply,) in carried(job(route), job(route)):
                    self.assertEqual((reply.code, reply.dsn, reply.command), ("535", "5.7.8", "AUTH"))
                    self.assertEqual(reply.message, ("5.7.8 who are you?", '{"status": "401", "told": "********"}'))
                    self.assertTrue(reply.route_fault)
                self.assertEqual((len(provider.asked), len(hop.connections)), (2, 3))

    def test_a_challenge_that_has_a_part_in_common_with_the_token(self):
        challenge = base64.b64encode(b'{"status": "401", "scope": "mail"}')
        hop = self.peer({"AUTH": b"334 " + challenge + b"\r\n", "": b"535 5.7.8 no\r\n"}, "AUTH XOAUTH2")
        provider = self.provider((200, {"access_token": challenge.decode().rstrip("=") + ".x", "expires_in": 3600}))
        ((reply,),) = carried(job(self.route(provider, hop)))
        self.assertEqual((reply.code, reply.message), ("535", ("5.7.8 no", '{"status": "401", "scope": "mail"}')))

    def test_never_by_password(self):
        hop = self.peer({}, "AUTH LOGIN PLAIN CRAM-MD5", logins={"neko": "ya29.token"})
        ((reply,),) = carried(job(self.route(self.provider(), hop)))
        self.assertEqual((reply.code, reply.dsn, reply.command), ("454", "4.7.0", "AUTH"))
        self.assertIn("XOAUTH2, OAUTHBEARER", reply.message[1])
        self.assertFalse([line for line in hop.lines if line.startswith("AUTH")])

    def test_a_server_that_hangs_up_after_its_challenge(self):
        hop = self.peer({"AUTH": b"334 eyJzdGF0dXMiOiI0MDEifQ==\r\n", "": HANG_UP}, "AUTH XOAUTH2")
        ((reply,),) = carried(job(self.route(self.provider(), hop)))
        self.assertEqual((reply.code, reply.command, reply.route_fault), ("421", "AUTH", False))

    def test_no_token_without_tls(self):
        outside = outside_address()
        if not outside:
            self.skipTest("this machine has no address but loopback")
        hop = self.enter_peer(SmtpPeer({}, ("AUTH XOAUTH2",), logins={"neko": "ya29.token"}, hosts=(outside,)))
        ((reply,),) = carried(job(self.route(self.provider(), hop)))
        self.assertEqual(reply.dsn, "4.7.11")
        eventually(lambda: hop.lines[1:] == ["QUIT"])
        reply = first_reply(job(self.route(f"http://{outside}:{hop.port}")))
        self.assertIn("Credentials are not sent over a connection without TLS", reply.message[1])

    def enter_peer(self, peer: SmtpPeer) -> SmtpPeer:
        self.addCleanup(peer.close)
        return peer

    def test_the_log_shows_mechanism_and_user_and_no_secret(self):
        haineko.log.devel = True
        self.addCleanup(setattr, haineko.log, "devel", False)
        token = "".join(chr(65 + i * 7 % 26) for i in range(4096))
        for says in (
            {},
            {"AUTH": lambda _, line: f"535 5.7.8 {line}"},
            {"AUTH": lambda _, line: f"535-5.7.8 {line[600:900]}\n535 {token[:3000]}"},
        ):
            for offer in ("AUTH XOAUTH2", "AUTH OAUTHBEARER"):
                hop = self.peer(says, offer, logins={"neko": "other"})
                ((reply,),) = carried(
                    job(self.route(self.provider((200, {"access_token": token, "expires_in": 9})), hop))
                )
                lines = self.logged()
                self.assertIn(f"127.0.0.1 > {offer} ******** as neko", lines)
                told = "\n".join(lines) + "\n".join(reply.message)
                forms = [
                    base64.b64encode(item).decode()
                    for item in (
                        token.encode(),
                        f"user=neko\1auth=Bearer {token}\1\1".encode(),
                        f"n,a=neko,\1host={hop.host}\1port={hop.port}\1auth=Bearer {token}\1\1".encode(),
                    )
                ]
                for form in (token, *forms, "geheim-1"):
                    for start in range(0, len(form) - 8, 97):
                        self.assertNotIn(form[start : start + 40], told)

    def test_check_connect(self):
        for said, words, ok in (
            (
                (200, {"access_token": "ya29.token", "expires_in": 3600, "scope": "a b"}),
                "ends in 3[56]\\d\\d s, scope a b",
                True,
            ),
            (
                (400, {"error": "invalid_grant", "error_description": "AADSTS700082: expired"}),
                "454 No access token: invalid_grant: AADSTS700082: expired",
                False,
            ),
        ):
            with self.subTest(ok):
                route, sessions = self.route(self.provider(said)), haineko.TransportContext()
                found = haineko.run(and_closed(haineko.run_probe(route, NAME, "", sessions), sessions))
                steps = ["TOKEN", "DNS", "TCP", "EHLO", "TLS", "AUTH"] if ok else ["TOKEN"]
                self.assertEqual([item.step for item in found], steps)
                token = next(item for item in found if item.step == "TOKEN")
                self.assertEqual(token.ok, ok)
                self.assertRegex(token.text, words)


# ======================================================================================================================
# 14. SMTP sessions
# ======================================================================================================================


FINE = ("250", "2.0.0", "DATA")
# what the server says, to three recipients (what it says, what each is told); the same with PIPELINING and without
DIALOGUES = {
    "well": ({}, [FINE] * 3),
    "one of three refused": (
        {"RCPT": refuses(b="550 5.1.1 nobody of that name")},
        [FINE, ("550", "5.1.1", "RCPT"), FINE],
    ),
    "two for now": (
        {"RCPT": refuses(a="452 4.2.2 full", c="450 later")},
        [("452", "4.2.2", "RCPT"), FINE, ("450", None, "RCPT")],
    ),
    "all refused": ({"RCPT": "550 5.1.1 nobody"}, [("550", "5.1.1", "RCPT")] * 3),
    "all refused, and DATA too": (
        {"RCPT": "550 5.1.1 nobody", "DATA": "503 5.5.1 no recipient"},
        [("550", "5.1.1", "RCPT")] * 3,
    ),
    "421 on the first RCPT": ({"RCPT": "421 4.3.2 closing"}, [("421", "4.3.2", "RCPT")] * 3),
    "421 on the second": ({"RCPT": refuses(b="421 4.3.2 closing")}, [("421", "4.3.2", "RCPT")] * 3),
    "refused, then 421": (
        {"RCPT": refuses(a="550 5.1.1 no", b="421 4.3.2 closing")},
        [("550", "5.1.1", "RCPT"), ("421", "4.3.2", "RCPT"), ("421", "4.3.2", "RCPT")],
    ),
    "252 to RCPT": ({"RCPT": "252 2.5.2 cannot verify"}, [FINE] * 3),
    "251 to RCPT": ({"RCPT": "251 2.1.5 will forward"}, [FINE] * 3),
    "251 after the dot": ({".": "251 2.6.0 forwarded"}, [("251", "2.6.0", "DATA")] * 3),
    "no enhanced code": ({".": "250 ok"}, [("250", None, "DATA")] * 3),
    "MAIL refused": ({"MAIL": "550 5.7.1 not you"}, [("550", "5.7.1", "MAIL")] * 3),
    "MAIL refused for now": ({"MAIL": "452 4.3.1 no space"}, [("452", "4.3.1", "MAIL")] * 3),
    "MAIL 421": ({"MAIL": "421 4.3.2 closing"}, [("421", "4.3.2", "MAIL")] * 3),
    "DATA refused": (
        {"RCPT": refuses(b="550 5.1.1 no"), "DATA": "554 5.5.1 no valid recipients"},
        [("554", "5.5.1", "DATA"), ("550", "5.1.1", "RCPT"), ("554", "5.5.1", "DATA")],
    ),
    "DATA 421": ({"DATA": "421 4.3.2 closing"}, [("421", "4.3.2", "DATA")] * 3),
    "text refused": (
        {"RCPT": refuses(c="550 5.1.1 no"), ".": "552 5.3.4 too big"},
        [("552", "5.3.4", "DATA"), ("552", "5.3.4", "DATA"), ("550", "5.1.1", "RCPT")],
    ),
    "text refused for now": ({".": "451 4.7.1 greylisted"}, [("451", "4.7.1", "DATA")] * 3),
    "421 after the dot": ({".": "421 4.3.2 closing"}, [("421", "4.3.2", "DATA")] * 3),
    "greeting 554": ({"CONN": "554 5.3.2 not today"}, [("554", "5.3.2", "CONN")] * 3),
    "greeting 421": ({"CONN": "421 4.3.2 too busy"}, [("421", "4.3.2", "CONN")] * 3),
    "EHLO 421": ({"EHLO": "421 4.3.2 too busy"}, [("421", "4.3.2", "EHLO")] * 3),
    "EHLO and HELO refused": ({"EHLO": "502 what", "HELO": "550 5.7.1 no"}, [("550", "5.7.1", "EHLO")] * 3),
    "a 3xx to RCPT": ({"RCPT": "354 go on"}, [("421", "4.5.0", "RCPT")] * 3),
    "a 2xx to DATA": ({"DATA": "250 2.0.0 ok"}, [("421", "4.5.0", "DATA")] * 3),
    "a 3xx after the dot": ({".": "354 more"}, [("421", "4.4.2", "DATA")] * 3),
    "two codes in one reply": ({"MAIL": "250-one\n251 two"}, [("421", "4.5.0", "MAIL")] * 3),
    "a code out of range": ({"MAIL": "650 6.0.0 no such code"}, [("421", "4.5.0", "MAIL")] * 3),
}


class SmtpSessions(Peers):
    def told(self, replies: list) -> list:
        return [(item.code, item.dsn, item.command) for item in replies]

    def test_every_recipient_is_told_what_the_server_said(self) -> None:
        for offers in ((), ("PIPELINING", "SIZE 1000000", "DSN")):
            for name, (says, wanted) in DIALOGUES.items():
                with self.subTest(name, offers=offers), SmtpPeer(says, offers) as peer:
                    [replies] = carried(job(peer, TO))
                    self.assertEqual(self.told(replies), wanted)
                    self.assertEqual({(r.mailer, r.host, r.port) for r in replies}, {("ESMTP", "127.0.0.1", peer.port)})
                    self.assertEqual(len(peer.connections), 1)
                    some = "DATA" in {command for _, _, command in wanted} and says.get("DATA", "354")[0] == "3"
                    self.assertEqual(len(peer.mails), some)

    def test_replies_that_came_together(self) -> None:
        ok, go = haineko.SMTPReply("250", "2.1.0", ("2.1.0 ok",)), haineko.SMTPReply("354", None, ("go on",))
        bye = haineko.SMTPReply("421", "4.3.2", ("4.3.2 bye", "see you"))
        cases = [
            (b"250 2.1.0 ok\r\n", (ok,), b""),
            (b"250 2.1.0 ok\r\n250 2.1.0 ok\n354 go on\r\n", (ok, ok, go), b""),
            (b"250 2.1.0 ok\r\n354 go", (ok,), b"354 go"),
            (b"250 2.1.0 ok\r\n421-4.3.2 bye\r\n421 see you\r\n", (ok, bye), b""),
            (b"250 2.1.0 ok\r\n421-4.3.2 bye\r\n", (ok,), b"421-4.3.2 bye\r\n"),
            (b"250 2.1.0 ok\r\n" * 99, (ok,) * 99, b""),
            (b"25", (), b"25"),
        ]
        for octets, wanted, rest in cases:
            with self.subTest(octets):
                session = haineko.Session(haineko.Route(), "here.example")
                session._feed(octets)
                self.assertEqual(tuple(iter(session._next_reply, None)), wanted)
                self.assertEqual((session.recv_buffer, session.alive), (rest, False))
        self.assertEqual(haineko.parse_reply(b"250 2.1.0 ok\r\nrubbish\r\n"), (ok, b"rubbish\r\n"))
        for octets in (b"rubbish\r\n250 ok\r\n", b"250-a\r\n251 b\r\n", b"x" * (haineko.MAX_LINE + 1)):
            with self.subTest(octets[:30]), self.assertRaises(haineko.ProtocolError):
                haineko.parse_reply(octets)

    def test_the_code_of_a_reply_decides_whatever_its_text_is(self) -> None:
        for octets in (b"250\tok", b"250 a\rb", b"250 ok\r", b"250", b"250 \xff\x00", b"250 " + b"x" * 6000):
            with self.subTest(octets[:30]):
                (code, _, [line]), rest = haineko.parse_reply(octets + b"\r\n")
                self.assertEqual((code, rest), ("250", b""))
                self.assertTrue(line.isprintable() and len(line) <= haineko.MAX_TEXT + len("..."))

    def test_a_reply_that_comes_in_single_octets_is_read_once(self) -> None:
        session, octets = haineko.Session(haineko.Route(), "here.example"), b"250 2.0.0 once and for all\r\n"
        found = [session._feed(octets[i : i + 1]) or session._next_reply() for i in range(len(octets))]
        self.assertEqual(found, [None] * (len(octets) - 1) + [haineko.parse_reply(octets)[0]])
        session._feed(b"2" * (haineko.MAX_LINE + 1))
        self.assertRaises(haineko.ProtocolError, session._next_reply)

    def test_what_was_said_before_rubbish_counts(self) -> None:
        peer = self.peer({"RCPT": refuses(a="550 5.1.1 no"), "DATA": "rubbish"}, "PIPELINING")
        [replies] = carried(job(peer, TO))
        self.assertEqual([(item.code, item.command) for item in replies], [("550", "RCPT"), *[("421", "DATA")] * 2])

    def test_who_was_refused_does_not_stop_the_others(self) -> None:
        for offers in ((), ("PIPELINING",)):
            peer = self.peer({"RCPT": refuses(b="550 5.1.1 no")}, *offers)
            carried(job(peer, TO))
            [(_, recipients, octets, _)] = peer.mails
            self.assertEqual(recipients, ["RCPT TO:<a@example.jp>", "RCPT TO:<c@example.jp>"])
            self.assertEqual(octets, TEXT)

    def test_a_go_ahead_with_no_valid_recipient_gets_a_lone_dot(self) -> None:
        for says in ({"RCPT": "550 5.1.1 no"}, {"MAIL": "550 5.7.1 not you"}):
            with self.subTest(says=says):
                peer = self.peer(says, "PIPELINING")
                first, _ = carried(job(peer, TO), job(peer, TO))
                self.assertEqual({item.code for item in first}, {"550"})
                self.assertEqual((peer.lone, peer.mails, len(peer.connections)), (2, [], 1))

    def test_without_pipelining_no_text_is_begun_for_nobody(self) -> None:
        peer = self.peer({"RCPT": "550 5.1.1 no"})
        carried(job(peer, TO))
        self.assertNotIn("DATA", peer.lines)

    def test_the_text_waits_for_its_go_ahead(self) -> None:
        def early(connection, line) -> str:
            hasty.append(bool(connection.unread or select.select([connection.sock], [], [], 0.05)[0]))
            return "354 go on"

        for offers in ((), ("PIPELINING",)):
            hasty: list = []
            peer = self.peer({"DATA": early}, *offers)
            carried(job(peer))
            self.assertEqual(hasty, [False])
            self.assertEqual(len(peer.mails), 1)

    def test_with_pipelining_the_envelope_is_one_flight(self) -> None:
        def together(connection, line) -> str:
            flights.append(connection.unread.count(b"\r\n"))
            return "250 2.1.0 ok"

        for offers, wanted in (((), 0), (("PIPELINING",), 4)):
            flights: list = []
            carried(job(self.peer({"MAIL": together}, *offers), TO))
            self.assertEqual(flights, [wanted])

    def test_many_recipients_are_cut_into_flights_that_fill_no_buffer(self) -> None:
        to = tuple(f"{name}{i}@example.jp" for i, name in enumerate("ab" * 400))
        peer = self.peer({"RCPT": refuses(b="550 5.1.1 no")}, "PIPELINING")
        [replies] = carried(job(peer, to))
        self.assertEqual([item.code for item in replies], ["250", "550"] * 400)
        self.assertEqual(len(peer.mails[0][1]), 400)

    def test_all_lines_of_a_reply_are_handed_on(self) -> None:
        peer = self.peer({".": "250-2.0.0 one\n250-2.0.0 two\x1b[1m\n250 2.0.0 ok \N{SNOWMAN}"})
        [[said]] = carried(job(peer))
        self.assertEqual(said.message, ("2.0.0 one", "2.0.0 two?[1m", "2.0.0 ok \N{SNOWMAN}"))

    def test_an_old_server_is_greeted_with_helo(self) -> None:
        peer = self.peer({"EHLO": "502 5.5.1 what?"})
        [[said]] = carried(job(peer))
        self.assertEqual(said.code, "250")
        self.assertEqual(peer.lines[:2], [f"ehlo {NAME}", f"helo {NAME}"])

    def test_a_machine_without_a_domain_greets_with_its_address(self) -> None:
        peer = self.peer({"EHLO": "502 5.5.1 what?"})
        carried(job(peer)._replace(hostname=haineko.local_hostname("my_container")))
        self.assertEqual(peer.lines[:2], ["ehlo [127.0.0.1]", "helo [127.0.0.1]"])

    def test_parameters_are_those_that_are_offered(self) -> None:
        mail, rcpt, size = "MAIL FROM:<kijitora@example.org>", "RCPT TO:<a@example.jp>", f" SIZE={len(TEXT)}"
        cases = (
            ((), mail, rcpt),
            (("SIZE",), mail + size, rcpt),
            (("DSN", "SIZE 5000000"), mail + size + " RET=FULL", rcpt + " NOTIFY=FAILURE,DELAY"),
            (("8BITMIME",), mail, rcpt),
        )
        for offers, *wanted in cases:
            with self.subTest(offers=offers):
                peer = self.peer({}, *offers)
                carried(job(peer))
                self.assertEqual([peer.mails[0][0], *peer.mails[0][1]], wanted)

    def test_eight_bit_text_goes_as_it_is_where_offered_and_is_encoded_elsewhere(self) -> None:
        head = b"Content-Type: text/plain; charset=UTF-8\r\nContent-Transfer-Encoding: 8bit\r\nMIME-Version: 1.0\r\n"
        text = head + "Subject: Nya\r\n\r\nにゃあ\r\n".encode()
        for offers in (("8BITMIME",), ()):
            peer = self.peer({}, *offers)
            [[said]] = carried(job(peer, text=text, eight=True))
            self.assertEqual(said.code, "250")
            sender, _, octets, _ = peer.mails[0]
            self.assertEqual("BODY=8BITMIME" in sender, bool(offers))
            self.assertEqual(octets == text, bool(offers))
            self.assertEqual(octets.isascii(), not offers)
            parsed = email.message_from_bytes(octets)
            self.assertEqual(parsed.get_payload(decode=True).decode().rstrip(), "にゃあ")

    def test_dots_are_stuffed(self) -> None:
        text = b".first\r\n.\r\n..two\r\nin.side\r\n.\r\n"
        peer = self.peer()
        carried(job(peer, text=text))
        self.assertEqual(peer.mails[0][2], b"..first\r\n..\r\n...two\r\nin.side\r\n..\r\n")

    def test_a_large_text_arrives_octet_for_octet(self) -> None:
        text = b"Subject: large\r\n\r\n" + b"".join(b".%d\r\n" % i * 9 for i in range(30000))
        peer = self.peer({}, "PIPELINING")
        [[said]] = carried(job(peer, text=text))
        self.assertEqual(said.code, "250")
        self.assertTrue(re.sub(rb"(?m)^\.", b"", peer.mails[0][2]) == text)

    def test_a_next_hop_by_ipv6(self) -> None:
        try:
            peer = self.peer({}, "AUTH PLAIN", hosts=("::1",), logins={"a": "b"})
        except OSError as fault:
            self.skipTest(f"no IPv6 here: {fault}")
        self.assertEqual(self.told(carried(job(peer, auth="x", credentials=("a", "b")))[0]), [FINE])

    # -- what goes wrong

    def test_nobody_listens(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        route = haineko.Route(host="127.0.0.1", port=port)
        [replies] = carried(haineko.Transaction(route, NAME, "Q", "a@example.org", TO, haineko.Message((TEXT,))))
        self.assertEqual(self.told(replies), [("421", "4.4.1", "CONN")] * 3)
        self.assertEqual(replies[0].message, ("Cannot connect SMTP Server", "Connection refused"))

    def test_a_peer_that_ends_each_step_badly(self) -> None:
        steps = {"CONN": "CONN", "EHLO": "EHLO", "MAIL": "MAIL", "RCPT": "RCPT", "DATA": "DATA", ".": "DATA"}
        rubbish = (b"what?\r\n", b"\0\xff\xfe\r\n", b"x" * 9000, b"".join(b"250-%d\r\n" % i for i in range(9999)))
        peers = [self.peer({step: says}, "PIPELINING") for step in steps for says in (HANG_UP, SILENCE, *rubbish)]
        results = side_by_side(*[(job(peer, TO, timeout=0.7),) for peer in peers])
        for peer, ([replies], seconds) in zip(peers, results):
            [(step, says)] = peer.says.items()
            with self.subTest(step=step, says=says[:20]):
                self.assertLess(seconds, 2.5)
                self.assertEqual({(item.code, item.command) for item in replies}, {("421", steps[step])})
                self.assertEqual(replies[0].maybe_delivered, step == ".")
                if step == ".":
                    self.assertIn("may have arrived", replies[0].message[0])
                    self.assertEqual(len(peer.mails), 1)

    def test_nothing_is_waited_for_after_a_421(self) -> None:
        for offers in ((), ("PIPELINING",)):
            peer = self.peer({"RCPT": [b"421 4.3.2 closing, and does not\r\n", SILENCE]}, *offers)
            [([replies], seconds)] = side_by_side((job(peer, TO, timeout=4),))
            self.assertEqual(self.told(replies), [("421", "4.3.2", "RCPT")] * 3)
            self.assertLess(seconds, 3)

    def test_octet_by_octet_is_no_way_around_a_deadline(self) -> None:
        def dribble(connection, line):
            with contextlib.suppress(OSError):
                for octet in b"250-" + b"x" * 100:
                    connection.sock.sendall(bytes([octet]))
                    time.sleep(0.05)
            return HANG_UP

        peers = [self.peer({step: dribble}) for step in ("CONN", "EHLO", "MAIL", ".")]
        for peer, ([[said]], seconds) in zip(peers, side_by_side(*[(job(peer, timeout=0.5),) for peer in peers])):
            with self.subTest(says=peer.says):
                self.assertEqual(said.code, "421")
                self.assertLess(seconds, 2.5)

    def test_lost_before_the_end_of_the_text_is_certain(self) -> None:
        text = b"Subject: large\r\n\r\n" + (b"y" * 998 + b"\r\n") * 30000
        released = threading.Event()
        ends = (
            lambda connection, line: HANG_UP,
            lambda connection, line: released.wait(8) and HANG_UP,  # reads nothing more
            lambda connection, line: connection.sock.sendall(b"452 4.3.1 disk full\r\n") or HANG_UP,
        )
        peers = [self.peer({"TEXT": end}) for end in ends]
        results = side_by_side(*[(job(peer, text=text, timeout=1),) for peer in peers])
        released.set()
        for i, ([[said]], _) in enumerate(results):
            with self.subTest(i):
                self.assertFalse(said.maybe_delivered, said)
                self.assertEqual((said.code[0], said.command), ("4", "DATA"))

    # -- TLS

    def test_starttls_is_done_and_verified_or_nothing_is_sent(self) -> None:
        here, elsewhere = certificate("here"), certificate("elsewhere")
        done, refused = FINE, ("421", "4.7.5", "STARTTLS")
        cases = (
            # what it is, certificate, more of the peer, more of the route, what is told
            ("verified", here, {}, {"ca_file": here}, done),
            ("nobody knows who made it", here, {}, {}, refused),
            ("another's name", elsewhere, {}, {"ca_file": elsewhere}, refused),
            ("another's name, not checked", elsewhere, {}, {"tls_verify": False}, done),
            ("not offered", here, {"offers": ()}, {"ca_file": here}, ("454", "4.7.4", "STARTTLS")),
            ("refused", here, {"says": {"STARTTLS": "454 4.7.0 later"}}, {}, ("454", "4.7.0", "STARTTLS")),
            ("hangs up", here, {"says": {"STARTTLS": HANG_UP}}, {}, ("421", "4.4.2", "STARTTLS")),
            ("says nothing", here, {"says": {"STARTTLS": SILENCE}}, {}, ("421", "4.4.2", "STARTTLS")),
            ("no handshake", here, {"says": {"TLS": SILENCE}}, {}, ("421", "4.4.2", "STARTTLS")),
            (
                "words in clear behind the reply",
                here,
                {"says": {"STARTTLS": b"220 go\r\n250-peer\r\n250 AUTH PLAIN\r\n"}},
                {"ca_file": here},
                ("421", "4.5.0", "STARTTLS"),
            ),
            (
                "refused under TLS",
                here,
                {"says": {"EHLO": [None, "550 5.7.1 no"], "HELO": "550 5.7.1 no"}},
                {"ca_file": here},
                ("550", "5.7.1", "EHLO"),
            ),
        )
        peers = [self.peer(**{"offers": ("STARTTLS", "SIZE"), "tls": pem, **more}) for _, pem, more, *_ in cases]
        jobs = [(job(peer, starttls=True, timeout=0.7, **case[3]),) for peer, case in zip(peers, cases)]
        for (name, *_, wanted), peer, ([[said]], _) in zip(cases, peers, side_by_side(*jobs)):
            with self.subTest(name):
                self.assertEqual((said.code, said.dsn, said.command), wanted)
                self.assertEqual(any(line.startswith("MAIL") for line in peer.lines), wanted == done)
                if wanted == done:
                    self.assertTrue(peer.connections[0].secure)
                    self.assertEqual([line[:8] for line in peer.lines[:3]], ["ehlo rel", "STARTTLS", "ehlo rel"])

    def test_what_was_offered_in_clear_does_not_count_under_tls(self) -> None:
        pem = certificate()
        peer = self.peer({"EHLO": ["250-peer\n250-STARTTLS\n250 DSN", "250 peer"]}, tls=pem)
        carried(job(peer, starttls=True, ca_file=pem))
        self.assertEqual(peer.mails[0][0], "MAIL FROM:<kijitora@example.org>")

    def test_no_starttls_where_nobody_asked(self) -> None:
        peer = self.peer({}, "STARTTLS", tls=certificate())
        self.assertEqual(self.told(carried(job(peer))[0]), [FINE])
        self.assertNotIn("STARTTLS", peer.lines)

    def test_port_465_is_tls_from_the_first_octet(self) -> None:
        pem, place = certificate(), "127.0.0.46"
        try:
            peer = self.peer({}, "SIZE", tls=pem, smtps=True, hosts=(place,), port=haineko.SMTPS)
        except OSError as fault:
            self.skipTest(f"port 465 of {place}: {fault}")
        self.assertEqual(self.told(carried(job(peer, ca_file=pem))[0]), [FINE])
        self.assertEqual(self.told(carried(job(peer))[0]), [("421", "4.4.1", "CONN")])
        peer.says["TLS"] = SILENCE
        self.assertEqual(self.told(carried(job(peer, ca_file=pem, timeout=0.3))[0]), [("421", "4.4.1", "CONN")])
        self.assertEqual(len(peer.mails), 1)

    # -- AUTH

    def test_the_strongest_mechanism_that_is_offered_logs_in(self) -> None:
        wrong, none = ("535", "5.7.8", "AUTH"), ("454", "4.7.0", "AUTH")
        cases = (
            ("AUTH PLAIN LOGIN CRAM-MD5", "nyaa", {}, "AUTH CRAM-MD5", FINE),
            ("AUTH LOGIN PLAIN", "nyaa", {}, "AUTH PLAIN", FINE),
            ("AUTH=LOGIN", "nyaa", {}, "AUTH LOGIN", FINE),
            ("AUTH LOGIN", "nyaa", {}, "AUTH LOGIN", FINE),
            ("AUTH CRAM-MD5", "wrong", {}, "AUTH CRAM-MD5", wrong),
            ("AUTH PLAIN", "wrong", {}, "AUTH PLAIN", wrong),
            ("AUTH LOGIN", "wrong", {}, "AUTH LOGIN", wrong),
            ("AUTH PLAIN", "nyaa", {"AUTH": "454 4.7.0 no answer"}, "AUTH PLAIN", none),
            ("AUTH PLAIN", "nyaa", {"AUTH": HANG_UP}, "AUTH PLAIN", ("421", "4.4.2", "AUTH")),
            ("AUTH PLAIN", "nyaa", {"AUTH": SILENCE}, "AUTH PLAIN", ("421", "4.4.2", "AUTH")),
            ("AUTH PLAIN", "nyaa", {"AUTH": b"welcome!\r\n"}, "AUTH PLAIN", ("421", "4.5.0", "AUTH")),
            ("AUTH CRAM-MD5", "nyaa", {"AUTH": b"334 a\r\n"}, "AUTH CRAM-MD5", ("421", "4.5.0", "AUTH")),
            ("AUTH LOGIN", "nyaa", {"AUTH": b"334 \r\n" * 50}, "AUTH LOGIN", None),
            ("AUTH GSSAPI NTLM", "nyaa", {}, None, none),
            ("SIZE", "nyaa", {}, None, none),
        )
        peers = [self.peer(says, offer, logins={"kijitora": "nyaa"}) for offer, _, says, *_ in cases]
        words = [word for _, word, *_ in cases]
        jobs = [(job(peer, auth="x", credentials=("kijitora", word), timeout=0.7),) for peer, word in zip(peers, words)]
        for (offer, _, says, first, wanted), peer, ([[said]], _) in zip(cases, peers, side_by_side(*jobs)):
            with self.subTest(offer, says=says):
                told = (said.code, said.dsn, said.command)
                self.assertEqual(told, wanted or told)
                self.assertEqual(told == FINE, wanted == FINE)
                auth = [line for line in peer.lines if line.startswith("AUTH")]
                self.assertEqual(" ".join(auth[0].split()[:2]) if auth else None, first)
                self.assertEqual(len(peer.mails), wanted == FINE)
                self.assertNotIn("nyaa", str(said))
        self.assertEqual([line for line in self.logged() if "Traceback" in line], [])

    def test_credentials_do_not_cross_a_network_in_clear(self) -> None:
        with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
            try:
                sock.connect(("192.0.2.1", 9))  # sends nothing
                place = sock.getsockname()[0]
                peer = self.peer({}, "STARTTLS", "AUTH PLAIN", hosts=(place,), logins={"a": "b"}, tls=certificate())
            except OSError:
                place = "127.0.0.1"
        if place.startswith("127."):
            self.skipTest("this machine has no address but loopback")
        login = {"auth": "x", "credentials": ("a", "b")}
        self.assertEqual(self.told(carried(job(peer, **login))[0]), [("454", "4.7.11", "AUTH")])
        eventually(lambda: [line[:4] for line in peer.lines] == ["ehlo", "QUIT"])
        self.assertEqual(self.told(carried(job(peer, **login, starttls=True, tls_verify=False))[0]), [FINE])

    def test_the_log_of_a_dialogue_shows_no_secret(self) -> None:
        haineko.log.devel = True
        self.addCleanup(setattr, haineko.log, "devel", False)
        for offer in ("AUTH CRAM-MD5", "AUTH PLAIN", "AUTH LOGIN"):
            carried(
                job(self.peer({}, offer, logins={"kijitora": "n-y-a-a"}), auth="x", credentials=("kijitora", "n-y-a-a"))
            )
        lines = self.logged()
        self.assertIn("127.0.0.1 > MAIL FROM:<kijitora@example.org>", lines)
        self.assertIn("127.0.0.1 < 250 2.0.0 taken", lines)
        self.assertIn("127.0.0.1 > ********", lines)
        secrets = {"n-y-a-a", *[base64.b64encode(x).decode() for x in (b"n-y-a-a", b"\0kijitora\0n-y-a-a")]}
        for line in lines:
            self.assertFalse([secret for secret in secrets if secret in line], line)

    # -- sessions kept

    def test_a_session_is_kept_and_used_again_until_quit(self) -> None:
        for offers in ((), ("PIPELINING",)):
            peer = self.peer({}, *offers)
            replies = carried(*[job(peer)] * 3)
            self.assertEqual([said.code for [said] in replies], ["250"] * 3)
            self.assertEqual((len(peer.connections), len(peer.mails)), (1, 3))
            eventually(lambda peer=peer: peer.lines[-1] == "QUIT")
            self.assertNotIn("RSET", peer.lines)

    def test_after_a_refusal_the_session_is_cleared_first(self) -> None:
        peer = self.peer({"RCPT": ["550 5.1.1 no", "250 2.1.5 yes"]})
        replies = carried(job(peer), job(peer))
        self.assertEqual([said.code for [said] in replies], ["550", "250"])
        eventually(lambda: peer.lines[-1] == "QUIT")
        verbs = " ".join(line[:4] for line in peer.lines[1:])
        self.assertEqual(verbs, "MAIL RCPT RSET MAIL RCPT DATA QUIT")

    def test_a_kept_session_that_died_is_replaced_once_and_never_after_the_text(self) -> None:
        well, goodbye = None, "421 4.4.2 idle for too long"
        twice = [well, HANG_UP, HANG_UP, well]
        cases = (
            # what it says, what the second of two mails is told, connections, mails that came
            ({"MAIL": [well, HANG_UP, well]}, FINE, 2, 2),
            ({"MAIL": [well, goodbye, well]}, FINE, 2, 2),
            ({"RCPT": [well, goodbye, well]}, FINE, 2, 2),
            ({"DATA": [well, goodbye, well]}, FINE, 2, 2),
            ({"DATA": [well, b"rubbish\r\n", well]}, FINE, 2, 2),
            ({"DATA": [well, SILENCE, well]}, FINE, 2, 2),
            ({"MAIL": twice}, ("421", "4.4.2", "MAIL"), 2, 1),
            ({"MAIL": [well, HANG_UP], "CONN": [well, "554 5.3.2 no"]}, ("554", "5.3.2", "CONN"), 2, 1),
            ({".": [well, goodbye, well]}, ("421", "4.4.2", "DATA"), 1, 2),
            ({".": [well, HANG_UP, well]}, ("421", "4.4.2", "DATA"), 1, 2),
            ({".": [well, SILENCE, well]}, ("421", "4.4.2", "DATA"), 1, 2),
        )
        table = [(offers, *case) for offers in ((), ("PIPELINING",)) for case in cases]
        peers = []
        for offers, says, *_ in table:
            whole = {verb: [item or USUAL[verb] for item in said] for verb, said in says.items()}
            peers.append(self.peer(whole, *offers))
        results = side_by_side(*[(job(peer, timeout=0.7), job(peer, timeout=0.7)) for peer in peers])
        for (offers, says, wanted, connections, mails), peer, ([[first], [second]], _) in zip(table, peers, results):
            with self.subTest(says=says, offers=offers):
                self.assertEqual(first.code, "250")
                self.assertEqual((second.code, second.dsn, second.command), wanted)
                self.assertEqual((len(peer.connections), len(peer.mails)), (connections, mails))

    def test_a_new_session_that_dies_is_not_replaced(self) -> None:
        peer = self.peer({"MAIL": [HANG_UP, USUAL["MAIL"]]})
        self.assertEqual(self.told(carried(job(peer))[0]), [("421", "4.4.2", "MAIL")])
        self.assertEqual(len(peer.connections), 1)

    def at_once(self, peer: SmtpPeer, count: int, timeout: float = 9.0, **more) -> collections.Counter:
        """How often each (code, command) was said to so many mails that come at the same moment."""
        sessions, found = haineko.TransportContext(), collections.Counter()

        async def one(i: int) -> None:
            outcome = await haineko.attempt_transaction(
                job(peer, (f"r{i}@example.jp",), timeout=timeout, **more), sessions
            )
            found.update((item.code, item.command) for item in outcome.replies)

        async def all_() -> None:
            await asyncio.gather(*[one(i) for i in range(count)])
            await sessions.sweep(everything=True)

        haineko.run(all_())
        self.assertEqual(sessions.pools, {})
        return found

    def test_a_few_sessions_are_opened_at_a_time(self) -> None:
        most, count = haineko.SessionPool.OPENING, haineko.SessionPool.OPENING * 2 + 8
        greeted = threading.Barrier(most)

        def greet(connection: SmtpConnection, line: str) -> str:
            if len(peer.connections) <= most:
                greeted.wait(9)  # for all that may come
                early.append(len(peer.connections))
            return "220 here"

        early: list = []
        peer = self.peer({"CONN": greet})
        self.assertEqual(self.at_once(peer, count), {("250", "DATA"): count})
        self.assertEqual(early[:1], [most])
        self.assertEqual(len(peer.mails), count)

    def test_who_waits_to_open_a_session_gets_one_that_is_given_back(self) -> None:
        most = haineko.SessionPool.OPENING
        count, gate = most * 3, threading.Event()
        self.addCleanup(gate.set)

        def greet(connection: SmtpConnection, line: str) -> str:
            if peer.connections.index(connection) >= most:
                gate.wait(9)
            return "220 here"

        def taken(connection: SmtpConnection, line: str) -> str:
            if len(peer.mails) + 1 >= count - most:  # all but those whose sessions are being opened
                gate.set()
            return USUAL["."]

        peer = self.peer({"CONN": greet, ".": taken})
        self.assertEqual(self.at_once(peer, count), {("250", "DATA"): count})
        self.assertLessEqual(len(peer.connections), 2 * most)

    def crowded(self, places: int, ends: bool = False, mails: int = 99) -> SmtpPeer:
        """A peer that takes so many sessions at a time, and ends each after a mail or not, or instead of one more."""
        lock, taken = threading.Lock(), []

        def greet(connection: SmtpConnection, line: str) -> str:
            with lock:
                if len(taken) >= places:
                    return "421 4.7.0 too many of you"
                taken.append(connection)
                return "220 here"

        def end(connection: SmtpConnection, line: str) -> bytes:
            with lock:
                taken.remove(connection)
                return b"250 2.0.0 taken\r\n421 4.3.2 one mail a session\r\n"

        def begin(connection: SmtpConnection, line: str) -> str:
            if sum(old.startswith("MAIL") for old in connection.lines) <= mails:
                return USUAL["MAIL"]
            with lock:
                taken.remove(connection)
                return "421 4.7.0 too many mails"

        return self.peer({"CONN": greet, "MAIL": begin, ".": end if ends else None})

    def test_a_server_that_takes_few_sessions_gets_all_mail(self) -> None:
        for places, ends in ((1, False), (3, False), (1, True), (3, True)):
            with self.subTest(places=places, ends=ends):
                peer, count = self.crowded(places, ends), 40
                self.assertEqual(self.at_once(peer, count), {("250", "DATA"): count})
                self.assertEqual(len(peer.mails), count)
                self.assertLessEqual(len(peer.connections), haineko.SessionPool.OPENING + (count if ends else places))

    def test_a_server_that_takes_few_sessions_of_few_mails_gets_all_mail(self) -> None:
        peer = self.crowded(3, mails=3)
        self.assertEqual(self.at_once(peer, 40), {("250", "DATA"): 40})
        self.assertEqual(len(peer.mails), 40)

    def test_who_is_refused_takes_a_session_that_was_given_back_meanwhile(self) -> None:
        gate, codes = threading.Event(), []
        self.addCleanup(gate.set)

        def greet(connection: SmtpConnection, line: str) -> str:
            if connection is peer.connections[0]:
                return "220 here"
            gate.wait(9)
            return "421 4.7.0 too many of you"

        async def one(sessions: haineko.TransportContext) -> None:
            codes.extend(item.code for item in (await haineko.attempt_transaction(job(peer), sessions)).replies)
            gate.set()

        async def both() -> None:
            sessions = haineko.TransportContext()
            await asyncio.gather(*[one(sessions), one(sessions)])
            await sessions.sweep(everything=True)

        peer = self.peer({"CONN": greet})
        haineko.run(both())
        self.assertEqual(codes, ["250", "250"])
        self.assertEqual([len(peer.connections), len(peer.mails)], [2, 2])

    WORDS = haineko.Reply("421", "4.7.0", "CONN", ("4.7.0 too many",), "ESMTP", "peer.example", 25)

    @staticmethod
    def results(futures: list) -> list:
        """What those that are done were given."""
        return [future.exception() or future.result() for future in futures if future.done()]

    def test_who_waits_for_a_session_in_use_waits_until_the_deadline(self) -> None:
        async def story() -> None:
            pool = haineko.SessionPool()
            pool.opening = 2
            pool.opened()
            self.assertTrue(pool.refused(self.WORDS))
            self.assertFalse(pool.may_open())
            futures = [pool.wait(10.0, self.WORDS), pool.wait(11.0, None)]  # one came later, and was not refused itself
            for now, count in ((9.9, 0), (10.0, 1), (11.0, 2)):
                pool.sweep(now)
                self.assertEqual([fault.reply for fault in self.results(futures)], [self.WORDS] * count)

        haineko.run(story())

    def test_where_a_session_ends_one_who_waits_opens_another(self) -> None:
        async def story() -> None:
            sessions, route, futures = haineko.TransportContext(), haineko.Route(), []
            pool, session = sessions.pools["here.example", route], haineko.Session(route, "here.example")
            session.pool, pool.opening = pool, 4
            pool.opened()
            pool.opened()
            for _ in range(2):
                self.assertTrue(pool.refused(self.WORDS))
                futures.append(pool.wait(float("inf"), self.WORDS))
            sessions.release(session)  # it was never connected
            self.assertEqual((self.results(futures), pool.opening, pool.in_use), ([None], 1, 1))

        haineko.run(story())

    def test_a_server_that_had_enough_is_asked_again_by_one_after_a_while(self) -> None:
        async def story() -> None:
            pool, futures = haineko.SessionPool(), []
            pool.opening = 4
            pool.opened()
            for _ in range(3):
                self.assertTrue(pool.refused(self.WORDS))
                futures.append(pool.wait(float("inf"), self.WORDS))
            pool.sweep(0.0)
            self.assertEqual(self.results(futures), [])
            pool.ask_again = 0.0
            pool.sweep(0.0)
            self.assertEqual((self.results(futures), pool.opening), ([None], 1))
            pool.opened()
            self.assertEqual((self.results(futures), pool.opening), ([None] * 3, 2))

        haineko.run(story())

    def test_where_a_session_can_not_be_opened_nobody_waits_on(self) -> None:
        most = haineko.SessionPool.OPENING
        count = most * 2 + 8
        busy = ["421 4.3.2 busy"] * most + ["220 here"]
        for says, wanted in (
            ({"CONN": busy}, {("421", "CONN"): most, ("250", "DATA"): count - most}),
            ({"CONN": HANG_UP}, {("421", "CONN"): count}),
            ({"EHLO": "421 4.3.2 closing"}, {("421", "EHLO"): count}),
            ({".": "421 4.3.2 one mail a session"}, {("421", "DATA"): count}),
            (
                {"CONN": ["421 4.4.1 busy"] * most + ["220 here"]},
                {("421", "CONN"): most, ("250", "DATA"): count - most},
            ),
        ):
            with self.subTest(says):
                self.assertEqual(self.at_once(self.peer(says), count), wanted)

    def test_a_host_that_is_silent_costs_its_timeout_once(self) -> None:
        most = haineko.SessionPool.OPENING
        for verb in ("CONN", "EHLO"):
            took = []
            for _ in range(3):  # a busy machine may be late once
                peer, began = self.peer({verb: SILENCE}), time.monotonic()
                self.assertEqual(self.at_once(peer, most * 3, timeout=0.5), {("421", verb): most * 3})
                took.append(time.monotonic() - began)
                self.assertLessEqual(len(peer.connections), most)
            self.assertLess(min(took), 0.95)

    def test_what_a_server_says_to_a_kept_session_is_no_reply_to_the_next_mail(self) -> None:
        for goodbye in (b"554 5.4.7 idle for too long\r\n", b"451 4.7.0 timeout\r\n", b""):
            with self.subTest(goodbye):
                peer, sessions = self.peer(), haineko.TransportContext()

                async def twice(peer: SmtpPeer = peer, sessions=sessions, goodbye: bytes = goodbye) -> list:
                    first = await haineko.attempt_transaction(job(peer), sessions)
                    if goodbye:
                        peer.connections[0].sock.sendall(goodbye)
                    else:
                        peer.connections[0].cut()
                    [[kept]] = [pool.idle for pool in sessions.pools.values()]
                    await kept.stream.wait_ready(time.monotonic() + 5)
                    second = await haineko.attempt_transaction(job(peer), sessions)
                    await sessions.sweep(everything=True)
                    return [item.code for outcome in (first, second) for item in outcome.replies]

                self.assertEqual(haineko.run(twice()), ["250", "250"])
                self.assertEqual(len(peer.connections), 2)

    def test_who_says_goodbye_while_a_session_is_opened_is_not_kept(self) -> None:
        peer = self.peer({"EHLO": b"250-here\r\n250 PIPELINING\r\n421 4.3.2 closing\r\n"})
        sessions = haineko.TransportContext()
        outcome = haineko.run(haineko.attempt_transaction(job(peer), sessions))
        self.assertEqual(self.told(outcome.replies), [("421", "4.3.2", "MAIL")])
        self.assertEqual([pool.idle for pool in sessions.pools.values()], [[]])

    def test_sessions_of_other_credentials_are_others(self) -> None:
        peer = self.peer({}, "AUTH PLAIN", logins={"a": "1", "b": "2"})
        carried(job(peer, auth="x", credentials=("a", "1")), job(peer, auth="x", credentials=("b", "2")))
        self.assertEqual([connection.user for connection in peer.connections], ["a", "b"])

    def test_sessions_that_nobody_uses_are_left(self) -> None:
        class Short(haineko.TransportContext):
            IDLE, IDLE_WHEN_FULL = 9, 9

        async def idle_for_a_while(limit: str, refusal: haineko.Reply | None) -> None:
            sessions = Short()
            await haineko.attempt_transaction(job(peer), sessions)
            for pool in sessions.pools.values():
                pool.refusal = refusal
            await sessions.sweep()
            self.assertEqual(len(peer.connections[0].lines), 4)
            setattr(sessions, limit, 0.05)
            await asyncio.sleep(0.1)
            await sessions.sweep()
            self.assertEqual(sessions.pools, {})

        for limit, refusal in (("IDLE", None), ("IDLE_WHEN_FULL", self.WORDS)):
            with self.subTest(limit):
                peer = self.peer()
                haineko.run(idle_for_a_while(limit, refusal))
                eventually(lambda peer=peer: peer.lines[-1] == "QUIT")

    def test_a_session_that_reached_a_limit_is_replaced_once(self) -> None:
        for verb, no in (
            ("MAIL", "452 4.4.5 too many mails"),
            ("MAIL", "421 4.7.0 too many mails"),
            ("RCPT", "451 4.7.1 too many recipients"),
            ("RCPT", "452 4.5.3 Too many recipients: Too many messages sent"),
            ("DATA", "451 4.3.0 too many mails"),
        ):
            for offers in ((), ("PIPELINING",)):
                with self.subTest(no, offers=offers):

                    def say(talk: SmtpConnection, line: str, verb: str = verb, no: str = no) -> str:
                        mails = sum(old.startswith("MAIL") for old in talk.lines)
                        return no if mails > 2 else USUAL[verb]

                    peer = self.peer({verb: say}, *offers)
                    replies = carried(*[job(peer)] * 6)
                    self.assertEqual([reply.code for [reply] in replies], ["250"] * 6)
                    self.assertEqual((len(peer.connections), len(peer.mails)), (3, 6))
                    self.assertEqual("QUIT" in peer.connections[0].lines, no[:3] != "421")

    def test_only_who_was_refused_for_now_is_tried_again(self) -> None:
        for offers in ((), ("PIPELINING",)):
            peer = self.peer({}, *offers)
            peer.says["RCPT"] = lambda talk, line, peer=peer: (
                "450 4.2.0 later" if line[9:10] == "b" and peer.mails and talk is peer.connections[0] else USUAL["RCPT"]
            )
            _, replies = carried(job(peer), job(peer, TO))
            self.assertEqual([reply.code for reply in replies], ["250"] * 3)
            sent = [[line[9:10] for line in recipients] for _, recipients, *_ in peer.mails]
            self.assertEqual(sent, [["a"], ["a", "c"], ["b"]])
        peer = self.peer({"RCPT": refuses(b="450 4.2.0 later")})
        replies = carried(job(peer, TO), job(peer, TO))
        self.assertEqual([[reply.code for reply in its] for its in replies], [["250", "450", "250"]] * 2)
        self.assertEqual((len(peer.connections), len(peer.mails)), (2, 2))

    def test_nobody_is_tried_again_after_the_text_however_many_sessions_are_replaced(self) -> None:
        class Reusing(haineko.TransportContext):
            """As where the server takes no more sessions and others are given back."""

            async def acquire(self, route: haineko.Route, hostname: str) -> tuple:
                session = self.acquire_idle(route, hostname)
                return (session, True) if session else await super().acquire(route, hostname)

        async def four() -> list:
            sessions = Reusing()
            await asyncio.gather(*[haineko.attempt_transaction(job(peer), sessions) for _ in range(3)])
            found = await haineko.attempt_transaction(job(peer, TO), sessions)
            await sessions.sweep(everything=True)
            return [(reply.code, reply.command) for reply in found.replies]

        peer = self.peer({"RCPT": refuses(b="450 4.2.0 later"), ".": [*[USUAL["."]] * 3, "451 4.3.0 later"]})
        self.assertEqual(haineko.run(four()), [("451", "DATA"), ("450", "RCPT"), ("451", "DATA")])
        self.assertEqual((len(peer.connections), len(peer.mails)), (4, 4))
        self.assertEqual(sum(line.startswith("RCPT TO:<b@") for line in peer.lines), 4)

    def test_a_fault_of_the_route_is_no_verdict_on_the_mail(self) -> None:
        login = {"auth": "x", "credentials": ("kijitora", "nyaa")}
        pem = certificate()
        for says, offers, more, wanted, fault in (
            ({"AUTH": "535 5.7.8 wrong"}, ("AUTH PLAIN",), login, ("535", "5.7.8", "AUTH"), True),
            ({"AUTH": "504 5.5.4 what"}, ("AUTH PLAIN LOGIN",), login, ("504", "5.5.4", "AUTH"), True),
            ({"EHLO": "550 5.7.1 no", "HELO": "550 5.7.1 no"}, (), {}, ("550", "5.7.1", "EHLO"), True),
            ({"STARTTLS": "554 no"}, ("STARTTLS",), {"starttls": True}, ("554", None, "STARTTLS"), True),
            ({"MAIL": "530 5.7.0 log in first"}, (), {}, ("530", "5.7.0", "MAIL"), True),
            ({"RCPT": "530 5.7.0 log in first"}, (), {}, ("530", "5.7.0", "RCPT"), True),
            ({"MAIL": "550 5.7.1 not with this login"}, ("AUTH PLAIN",), login, ("550", "5.7.1", "MAIL"), True),
            ({"MAIL": "550 5.7.1 not you"}, (), {}, ("550", "5.7.1", "MAIL"), False),
            ({"RCPT": "550 5.7.1 no relaying"}, ("AUTH PLAIN",), login, ("550", "5.7.1", "RCPT"), False),
            ({"CONN": "554 5.7.1 no"}, (), {}, ("554", "5.7.1", "CONN"), False),
        ):
            with self.subTest(says):
                peer = self.peer(says, *offers, logins={"kijitora": "nyaa"}, tls=pem if "STARTTLS" in offers else "")
                [[reply]] = carried(job(peer, **more))
                self.assertEqual((reply.code, reply.dsn, reply.command), wanted)
                self.assertEqual((reply.route_fault, reply.temporary, reply.from_server), (fault, fault, True))
        logged = [line for line in self.logged() if "warning: " in line]
        self.assertEqual((len(logged), "535 5.7.8 wrong" in logged[0]), (7, True))

    def login_words(self, *turns: bytes):
        """What a server that offers LOGIN says: these challenges; user and password are those of its words."""

        def say(talk: SmtpConnection, line: str) -> str:
            if line != "AUTH LOGIN":
                return "501 5.5.4 no initial response here"
            answers = []
            for challenge in turns:
                talk.sock.sendall(b"334" + challenge + b"\r\n")
                answers.append(base64.b64decode(talk.line()).decode())
            return "235 2.7.0 welcome" if answers[-2:] == ["kijitora", "nyaa"] else f"535 5.7.8 {len(answers)}"

        return say

    def test_login_is_asked_in_many_ways(self) -> None:
        for turns in (
            (b" VXNlcm5hbWU6", b" UGFzc3dvcmQ6"),  # Username: Password:
            (b" VXNlciBOYW1lAA==", b" UGFzc3dvcmQA"),
            (b" VXNlciBOYW1lAA", b" UGFzc3dvcmQA"),  # without padding
            (b" Username:", b" Password:"),
            (b" please send your user name", b" and the password, please"),
            (b" go on", b" go on"),
            (b" ", b" "),
            (b"", b""),
        ):
            with self.subTest(turns):
                peer = self.peer({"AUTH": self.login_words(*turns)}, "AUTH LOGIN")
                [[reply]] = carried(job(peer, auth="x", credentials=("kijitora", "nyaa")))
                self.assertEqual(reply.code, "250", reply)

    def test_one_mechanism_is_tried_once(self) -> None:
        every = "AUTH LOGIN PLAIN CRAM-MD5"
        for says, offer, wanted, tried in (
            ({"AUTH": "535 5.7.8 wrong"}, every, ("535", "5.7.8", "AUTH"), ["CRAM-MD5"]),
            (
                {"AUTH": b"535 5.7.8 wrong\r\n421 4.7.0 too many errors\r\n"},
                every,
                ("535", "5.7.8", "AUTH"),
                ["CRAM-MD5"],
            ),
            ({"AUTH": "454 4.7.0 later"}, every, ("454", "4.7.0", "AUTH"), ["CRAM-MD5"]),
            ({"AUTH": ["504 5.5.4 unknown", None]}, every, FINE, ["CRAM-MD5", "PLAIN"]),
            ({"AUTH": ["534 5.7.9 too weak", "504 no", None]}, every, FINE, ["CRAM-MD5", "PLAIN", "LOGIN"]),
            ({"AUTH": "534 5.7.9 too weak"}, every, ("534", "5.7.9", "AUTH"), ["CRAM-MD5", "PLAIN", "LOGIN"]),
            ({"AUTH": "501 5.5.2 what"}, "AUTH PLAIN LOGIN", ("501", "5.5.2", "AUTH"), ["PLAIN"]),
        ):
            with self.subTest(says):
                peer = self.peer(says, offer, logins={"kijitora": "nyaa"})
                [[reply]] = carried(job(peer, auth="x", credentials=("kijitora", "nyaa")))
                self.assertEqual((reply.code, reply.dsn, reply.command), wanted)
                self.assertEqual([line.split()[1] for line in peer.lines if line.startswith("AUTH")], tried)

    def test_passwords_beyond_ascii_and_long_ones(self) -> None:
        for password in ("nyaa-\u306b\u3083\u3042-\xe9", "x" * 600):
            for offer in ("AUTH CRAM-MD5", "AUTH PLAIN", "AUTH LOGIN"):
                with self.subTest(offer, password=password):
                    peer = self.peer({}, offer, logins={"kijitora": password})
                    [[reply]] = carried(job(peer, auth="x", credentials=("kijitora", password)))
                    self.assertEqual(reply.code, "250")
                    self.assertLessEqual(max(len(line) for line in peer.lines if line.startswith("AUTH")), 510)

    def test_names_in_ehlo(self) -> None:
        for hostname, wanted in (
            ("relay.example.org", "relay.example.org"),
            ("3f2a9c0d1e2b.localdomain", "[127.0.0.1]"),
        ):
            with self.subTest(hostname):
                peer = self.peer()
                carried(job(peer)._replace(hostname=hostname))
                self.assertEqual(peer.lines[0].lower(), f"ehlo {wanted}".lower())

    def test_whatever_ends_an_opening_while_others_work_is_a_limit(self) -> None:
        reset = socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
        for name in ("close", "reset", "554", "EHLO", "AUTH"):
            places, lock, taken, count = 3, threading.Lock(), [], 16

            def greet(talk: SmtpConnection, line: str, name=name, lock=lock, taken=taken, places=places):
                with lock:
                    if len(taken) < places:
                        taken.append(talk)
                    elif name not in ("EHLO", "AUTH"):
                        if name == "reset":
                            talk.sock.setsockopt(socket.SOL_SOCKET, *reset)
                        return "554 5.7.0 too many" if name == "554" else HANG_UP
                return "220 here"

            def later(talk: SmtpConnection, line: str, taken=taken):
                return None if talk in taken else "421 4.7.0 too many"

            with self.subTest(name):
                says = {"CONN": greet, **({name: later} if name in ("EHLO", "AUTH") else {})}
                peer = self.peer(says, "AUTH PLAIN", logins={"kijitora": "nyaa"})
                login = {"auth": "x", "credentials": ("kijitora", "nyaa")} if name == "AUTH" else {}
                self.assertEqual(self.at_once(peer, count, **login), {("250", "DATA"): count})

    def test_replies_are_read_in_linear_time(self) -> None:
        def seconds(octets: bytes) -> float:
            began = time.perf_counter()
            for start in range(0, len(octets), 4096):
                try:
                    haineko.parse_reply(octets[: start + 4096])
                except haineko.ProtocolError:
                    break
            return time.perf_counter() - began

        for shape in (b"250-" + b"\r" * 65536 + b"x\n", b"250-" + b"\r" * 65536, b"250" + b"\t" * 65536 + b"x\n"):
            self.assertLess(seconds(shape), 0.5)
        for line in (b"250 " + b"x" * haineko.MAX_LINE + b"\r\n", b"250 " + b"\r" * haineko.MAX_LINE + b"\r\n"):
            self.assertRaises(haineko.ProtocolError, haineko.parse_reply, line)


class BeyondAscii(Peers):
    """Addresses, 8-bit octets and large files through a real process to a next hop."""

    NEKO, PLAIN = "ねこ@example.jp", "a@example.jp"

    def sent(self, submission, *offers: str) -> tuple:
        """(HTTP status, replies, mails, MAIL and RCPT lines) of a submission; the next hop offers so much."""
        peer = self.peer(None, *offers)
        force = {"mailertable": {"default": {"host": peer.host, "port": peer.port, "timeout": 2}}}
        server = served(self, {**force, "smtpd": {"hostname": NAME, "max_rcpts_per_message": 9}})
        status, _, answer = server.ask(post(submission))
        found = answer["response"]
        lines = [line for line in peer.lines if line[:4] in ("MAIL", "RCPT")]
        return status, [(item["code"], item["dsn"], item["command"]) for item in found], peer.mails, lines

    FINE, NO_RCPT = ("250", "2.0.0", "DATA"), ("553", "5.6.7", "RCPT")
    UTF8 = ("8BITMIME", "SMTPUTF8", "PIPELINING")

    def test_a_recipient(self):
        submission = document(rcpt=[self.NEKO, self.PLAIN])
        status, said, mails, lines = self.sent(submission, *self.UTF8)
        self.assertEqual((status, said), (200, [self.FINE] * 2))
        self.assertEqual(
            sorted(lines),
            sorted(
                [
                    "MAIL FROM:<kijitora@example.org> BODY=8BITMIME SMTPUTF8",
                    f"RCPT TO:<{self.NEKO}>",
                    "MAIL FROM:<kijitora@example.org>",
                    f"RCPT TO:<{self.PLAIN}>",
                ]
            ),
        )
        self.assertEqual(
            {text.decode().partition("\r\nTo: ")[2].partition("\r\n")[0] for _, _, text, _ in mails},
            {self.NEKO, self.PLAIN},
        )
        status, said, mails, lines = self.sent(submission, "8BITMIME")
        self.assertEqual((status, said, len(mails)), (207, [self.NO_RCPT, self.FINE], 1))
        status, said, mails, lines = self.sent(document(rcpt=[self.NEKO]), "8BITMIME")
        self.assertEqual((status, said, mails, lines), (400, [self.NO_RCPT], [], []))

    def test_recipients_of_one_message(self):
        header = {"to": self.PLAIN, "bcc": [self.NEKO, "b@example.jp"]}
        submission = document(rcpt=None, header=header)
        self.assertEqual(self.sent(submission, *self.UTF8)[1], [self.FINE] * 3)
        status, said, mails, _ = self.sent(submission)
        self.assertEqual((status, said), (207, [self.FINE, self.NO_RCPT, self.FINE]))
        self.assertEqual(mails[0][1], [f"RCPT TO:<{self.PLAIN}>", "RCPT TO:<b@example.jp>"])

    def test_a_sender(self):
        submission = document(mail=self.NEKO, header={"from": None})
        status, said, mails, lines = self.sent(submission, *self.UTF8)
        self.assertEqual(
            (status, said, lines[0]), (200, [self.FINE], f"MAIL FROM:<{self.NEKO}> BODY=8BITMIME SMTPUTF8")
        )
        self.assertIn(f"\r\nFrom: {self.NEKO}\r\n".encode(), mails[0][2])
        status, said, mails, lines = self.sent(submission, "8BITMIME")
        self.assertEqual((status, said, lines), (400, [("553", "5.6.7", "MAIL")], []))

    def test_an_address_in_the_header(self):
        submission = document(header={"replyto": f"ねこ <{self.NEKO}>", "subject": "猫"})
        status, said, mails, _ = self.sent(submission, *self.UTF8)
        self.assertEqual((status, said), (200, [self.FINE]))
        self.assertIn(f" <{self.NEKO}>\r\n".encode(), mails[0][2])
        self.assertNotIn("猫".encode(), mails[0][2])
        self.assertEqual(self.sent(submission)[:2], (502, [("554", "5.6.9", "MAIL")]))

    def test_domains(self):
        status, said, _, lines = self.sent(
            document(mail="a@例え.jp", rcpt=["b@日本語.jp", "c@straße.de"], header={"from": None})
        )
        self.assertEqual((status, said), (207, [self.FINE, ("553", "5.1.5", "RCPT")]))
        self.assertEqual(lines, ["MAIL FROM:<a@xn--r8jz45g.jp>", "RCPT TO:<b@xn--wgv71a119e.jp>"])
        for given, slug in (({"mail": "a@faß.de"}, "5.5.4"), ({"rcpt": ["a@faß.de"]}, "5.1.5")):
            _, answer = posted(document(**given))
            self.assertEqual(answer["response"][0]["dsn"], slug)
            self.assertIn("U+00DF has two readings in a domain", answer["response"][0]["message"][1])

    def test_a_header_beside_a_body_with_octets_over_127(self):
        text = (
            "Subject: 猫\nMIME-Version: 1.0\nContent-Type: text/plain; charset=UTF-8\nContent-Transfer-Encoding: 8bit\n"
        )
        submission = {"mail": "a@example.org", "rcpt": [self.PLAIN], "raw": f"From: a@example.org\n{text}\n猫\n"}
        status, said, mails, lines = self.sent(submission, "8BITMIME")
        self.assertEqual((status, said, lines[0]), (200, [self.FINE], "MAIL FROM:<a@example.org> BODY=8BITMIME"))
        self.assertIn(b"\r\nSubject: =?UTF-8?B?54yr?=\r\n", mails[0][2])
        self.assertTrue(mails[0][2].endswith("\r\n\r\n猫\r\n".encode()))
        self.assertTrue(self.sent(submission)[2][0][2].isascii())
        submission["raw"] = "Message-ID: <ü@example.org>\n" + submission["raw"]
        peer = self.peer(None, "8BITMIME")
        force = settings(mailertable={"default": {"host": peer.host, "port": peer.port, "timeout": 2}})
        reply = posted(submission, force)[1]["response"][0]
        self.assertEqual((reply["code"], reply["message"][1:]), ("554", ["in message-id"]))

    def test_a_finished_message_with_octets_over_127(self):
        text = "MIME-Version: 1.0\nContent-Type: text/plain; charset=UTF-8\nContent-Transfer-Encoding: 8bit\n"
        submission = {"mail": "a@example.org", "rcpt": [self.PLAIN], "raw": f"From: a@example.org\n{text}\n猫\n"}
        for offers, parameters, coding in [
            (self.UTF8, " BODY=8BITMIME", "8bit"),
            (("8BITMIME",), " BODY=8BITMIME", "8bit"),
            ((), "", "quoted-printable"),
        ]:
            with self.subTest(offers):
                status, said, mails, lines = self.sent(submission, *offers)
                self.assertEqual((status, said, lines[0]), (200, [self.FINE], f"MAIL FROM:<a@example.org>{parameters}"))
                found = parsed(mails[0][2])
                self.assertEqual((found["content-transfer-encoding"], text_in(found)), (coding, "猫\n"))
                self.assertEqual(mails[0][2].isascii(), not parameters)

    def test_a_finished_message_with_a_header_in_utf8(self):
        submission = {
            "mail": "a@example.org",
            "rcpt": [self.PLAIN],
            "raw": "From: ねこ <a@example.org>\nSubject: 猫\n\nx\n",
        }
        for offers in (self.UTF8, ("8BITMIME",), ()):
            with self.subTest(offers):
                status, said, mails, lines = self.sent(submission, *offers)
                self.assertEqual((status, said), (200, [self.FINE]))
                self.assertEqual(lines[0].endswith(" BODY=8BITMIME SMTPUTF8"), "SMTPUTF8" in offers)
                self.assertEqual("Subject: 猫\r\n".encode() in mails[0][2], "SMTPUTF8" in offers)
                self.assertEqual(mails[0][2].isascii(), "SMTPUTF8" not in offers)
                self.assertEqual(parsed(mails[0][2])["subject"], "猫")

    @unittest.skipUnless(os.path.exists("/proc/self/clear_refs"), "needs Linux")
    def test_a_large_file(self):
        """25 MB: four times the size of the message in memory at most, and others are served meanwhile."""
        peer = self.peer(None, "SIZE")
        route = {"host": peer.host, "port": peer.port, "timeout": 10}
        server = Server(
            {
                "mailertable": {"default": route, "small.example": {"mailer": "Discard"}},
                "smtpd": {"hostname": NAME, "max_message_size": 40 << 20},
            }
        )
        self.addCleanup(server.close)
        octets = os.urandom(1 << 20) * 25
        large, small = post(document(attachments=[file("a.bin", octets)])), post(document(rcpt="a@small.example"))
        self.assertEqual(server.ask(post(document(html="x", attachments=[file("b")])))[0], 200)
        (worker,) = server.workers()
        before = memory(worker, "VmRSS")
        with server.wire() as big, server.wire() as wire:
            big.send(large)
            slowest, start = 0.0, time.monotonic()
            while len(peer.mails) < 2:
                began = time.monotonic()
                self.assertEqual(wire.ask(small)[0], 200)
                slowest = max(slowest, time.monotonic() - began)
            self.assertEqual(big.answer()[0], 200)
            whole = time.monotonic() - start
        size = len(peer.mails[-1][2])
        self.assertEqual(files_in(parsed(peer.mails[-1][2]))[0][2], octets)
        self.assertLess(memory(worker, "VmHWM") - before, 4 * size)
        self.assertLess(slowest, max(1.0, whole / 2))  # seconds


# ======================================================================================================================
# 15. Relays
# ======================================================================================================================


SITUATIONS = [{}] + [
    {verb: says}
    for verb in ("CONN", "EHLO", "MAIL", "RCPT", "DATA", ".", "QUIT")
    for says in ("550 5.0.0 no", "421 4.3.2 closing", HANG_UP, SILENCE, b"\0rubbish\xff\r\n", b"x" * 5000)
]


class Relays(Folder, Peers):
    def setUp(self) -> None:
        Folder.setUp(self)
        Peers.setUp(self)

    def test_every_relay_has_a_reply_for_every_recipient_whatever_the_peer_does(self) -> None:
        sockets, threads = sockets_open(), threading.active_count()
        peers = [SmtpPeer(says, offers) for offers in ((), ("PIPELINING",)) for says in SITUATIONS]
        count = {"ESMTP": 2 * len(SITUATIONS), "File": 1, "Screen": 1, "Discard": 1}
        cases = [(name, peer) for name in haineko.RELAYS for peer in peers[: count.get(name, len(SITUATIONS))]]
        groups = [(self.to_relay(name, peer, timeout=0.8),) for name, peer in cases]
        results: list = []
        while len(results) < len(groups):
            results += side_by_side(*groups[len(results) : len(results) + 110])
        for peer in peers:
            peer.close()
        for (name, peer), ([replies], seconds) in zip(cases, results):
            with self.subTest(name, says=peer.says, offers=peer.offers):
                self.assertEqual(len(replies), len(TO))
                for said in replies:
                    self.assertRegex(said.code, r"\A[245]\d\d\Z")
                    self.assertIn(said.command, ("CONN", "EHLO", "STARTTLS", "AUTH", "MAIL", "RCPT", "DATA"))
                    self.assertTrue(all(type(line) is str and line.isprintable() for line in said.message))
                    self.assertEqual(said.mailer, name)
                self.assertLess(seconds, 5)
        self.assertEqual([line for line in self.logged() if "Traceback" in line], [])
        self.assertEqual(sockets_open(), sockets)
        eventually(lambda: threading.active_count() <= threads, "an end of all threads")

    def to_relay(self, name: str, peer: SmtpPeer, **more) -> haineko.Transaction:
        """Mail by that relay to the peer."""
        web = {
            "base_url": f"http://127.0.0.1:{peer.port}",
            "auth": "x",
            "credentials": ("a", "b"),
            "region": "eu-west-1",
        }
        places = {"File": {"host": self.folder}, "MX": {"private": True}, "SendGrid": web, "Mandrill": web}
        by_token = {**web, "oauth2": haineko.OAuth2(access_token="b")}
        places.update(MSGraph=by_token, GmailAPI=by_token)
        to = [item.replace("example.jp", "[127.0.0.1]") for item in TO] if name == "MX" else TO
        return job(peer, to, mailer=name, **{"AmazonSES": web, **places}.get(name, {}), **more)

    def test_the_well_meaning_peer_is_believed(self) -> None:
        for name, code in (("ESMTP", "250"), ("MX", "250"), ("File", "200"), ("Screen", "200"), ("Discard", "200")):
            with self.subTest(name), SmtpPeer() as peer:
                [replies] = carried(self.to_relay(name, peer))
                self.assertEqual({(said.code, said.dsn, said.command) for said in replies}, {(code, "2.0.0", "DATA")})
                self.assertEqual(len(peer.mails), code == "250")

    def test_a_fault_of_our_own_is_a_reply_too(self) -> None:
        peer = self.peer()
        [[said]] = carried(job(peer)._replace(message=None))
        self.assertEqual((said.code, said.dsn, said.command), ("451", "4.3.0", "DATA"))
        self.assertIn("Traceback", "\n".join(self.logged()))

    # -- File

    def saved(self, to: tuple = TO[:1], **more) -> list:
        route = haineko.Route(**{"mailer": self.folder, **more})
        return carried(haineko.Transaction(route, NAME, "Q" * 16, "a@example.org", to, haineko.Message((TEXT,)), 7))[0]

    def test_a_file_is_complete_and_its_owners_alone(self) -> None:
        for more in ({}, {"mailer": "File", "host": self.folder}):
            with self.subTest(more=more):
                [said] = self.saved(**more)
                self.assertEqual((said.code, said.dsn, said.command, said.mailer), ("200", "2.0.0", "DATA", "File"))
                [path] = said.message
                self.assertEqual([os.path.basename(path)], os.listdir(self.folder))
                self.assertRegex(os.path.basename(path), r"\Ahaineko\.\d{4}-\d\d-\d\d-\d{6}\.Q{16}\.7\.eml\Z")
                self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
                with open(path, "rb") as stream:
                    self.assertEqual(stream.read(), TEXT)
                os.unlink(path)

    def test_a_folder_that_is_gone_is_a_reply(self) -> None:
        gone = os.path.join(self.folder, "gone")
        with open(os.path.join(self.folder, "file"), "w"):
            pass
        for folder, reason in ((gone, "No such file or directory"), (self.folder + "/file", "Not a directory")):
            replies = self.saved(TO, mailer=folder)
            self.assertEqual([(r.code, r.dsn, r.command) for r in replies], [("451", "4.3.0", "DATA")] * 3)
            self.assertEqual(replies[0].message, ("Cannot save the message", f"{folder}: {reason}"))

    def test_no_room_for_the_whole_leaves_nothing(self) -> None:
        force = self.write(
            "haineko.json",
            {"recipients": {"open-relay": 1}, "mailertable": {"default": {"mailer": os.path.join(self.folder, "out")}}},
        )
        os.mkdir(os.path.join(self.folder, "out"))
        program = (
            "import resource, sys, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (999, 999)); "
            f"sys.argv = ['haineko.py', 'sendmail', '-C', {force!r}, 'a@example.jp']; "
            f"runpy.run_path({PROGRAM!r}, run_name='__main__')"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=b"Subject: x\n\n" + b"much\n" * 999,
            capture_output=True,
            env=environment(),
            check=False,
        )
        self.assertEqual((done.returncode, os.listdir(os.path.join(self.folder, "out"))), (75, []))
        self.assertIn(b"Cannot save the message", done.stderr)

    def test_copies_do_not_overwrite_each_other(self) -> None:
        force = settings(mailertable={"default": {"mailer": self.folder}})
        address = haineko.parse_ip("127.0.0.1")
        request = haineko.Request("POST", "/submit", {}, as_body(document(rcpt=list(TO))), address, address, None, 1e9)
        answer = answered(request, haineko.App(force))
        paths = [item["message"][0] for item in json.loads(answer.body)["response"]]
        self.assertEqual(sorted(map(os.path.basename, paths)), sorted(os.listdir(self.folder)))
        found = []
        for path in paths:
            with open(path, "rb") as stream:
                found.append(email.message_from_bytes(stream.read())["To"])
        self.assertEqual(found, list(TO))

    # -- Screen, Discard

    def test_a_message_is_shown_and_nothing_is_not(self) -> None:
        for name, word in (("Screen", "Printed"), ("Discard", "Discarded")):
            route = haineko.Route(mailer=name)
            carried_job = haineko.Transaction(route, NAME, "Q" * 16, "a@example.org", TO, haineko.Message((TEXT,)))
            [replies] = carried(carried_job)
            self.assertEqual(replies, [haineko.Reply("200", "2.0.0", "DATA", (word,), name)] * 3)
            shown = "\n".join(self.logged())
            self.assertEqual("Meow." in shown, name == "Screen")

    def test_what_is_shown_can_not_pass_for_the_log_or_reach_the_terminal(self) -> None:
        forged = "2026-11-29T00:00:00+0000 haineko[1]: Q: status=sent"
        for octets, shown in (
            (b"a\x1b]0;x\x07b\x9b2J", "a\\x1b]0;x\\x07b\\x9b2J"),
            ("\x9b2J \u2028 \u202e \x7f".encode(), "\\x9b2J \\u2028 \\u202e \\x7f"),
            (b"a\r" + forged.encode(), "a\\r" + forged),
            (b"a\r\n" + forged.encode(), forged),
            (b"a\n--- x", "--- x"),
            ("ニャー\u3000é\ttab \\x1b".encode(), "ニャー\u3000é\ttab \\x1b"),
            (b"\x00\xff\xfe", "\\x00\\xff\\xfe"),
        ):
            with self.subTest(octets):
                message = haineko.Message((b"Subject: x\r\n\r\n" + octets + b"\r\n",))
                carried(haineko.Transaction(haineko.Route(mailer="Screen"), NAME, "Q", "a@b.example", TO[:1], message))
                head, *lines, last = [line for line in self.logged() if "attempt" not in line]
                self.assertEqual((head, last), (f"--- Q.1 from <a@b.example> to <{TO[0]}>", "---"))
                self.assertTrue(all(line.startswith("| ") for line in lines), lines)
                self.assertIn("| " + shown, lines)


class RouteLimits(Peers):
    def test_sessions_are_counted_over_all_workers(self):
        most = [0]

        def greet(connection: SmtpConnection, line: str) -> None:
            others = [one for one in peer.connections if one.sock.fileno() >= 0 and "QUIT" not in one.lines]
            most[0] = max(most[0], len(others))

        peer = self.peer({"CONN": greet}, "PIPELINING")
        route = {"port": peer.port, "sessions": 3, "timeout": 20}
        server = served(self, {"httpd": {"workers": 2}, "mailertable": {"default": route}})
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            found = list(pool.map(lambda i: server.submit(f"a{i}@example.jp")[0], range(200)))
        self.assertEqual((collections.Counter(found), len(peer.taken)), ({200: 200}, 200))
        self.assertLessEqual(most[0], 3)
        self.assertGreater(most[0], 1)

    def test_a_mail_waits_for_a_session_of_another_process_up_to_the_timeout(self):
        peer = self.peer()

        async def sent(seconds: float) -> haineko.Reply:
            transport = haineko.TransportContext()
            route = haineko.Route(port=peer.port, sessions=1, timeout=0.5)
            octet = transport.limits.open_session(route.limit_key, 1)
            asyncio.get_running_loop().call_later(seconds, transport.limits.close_session, octet)
            result = await haineko.attempt_transaction(job(route), transport)
            await transport.sweep(everything=True)
            return result.replies[0]

        self.assertEqual(haineko.run(sent(0.1)).code, "250")
        reply = haineko.run(sent(9))
        self.assertEqual(brief(reply)[:3], ("451", "4.3.2", "CONN"))
        self.assertEqual((reply.message[0], reply.temporary, reply.port), (ROUTE_LIMIT, True, peer.port))

    def test_a_busy_process_gives_its_session_up(self):
        class Sharing(haineko.TransportContext):
            SHARE = 0.2

        async def story() -> haineko.Reply:
            limits, route = haineko.SharedLimits(), haineko.Route(port=self.peer().port, sessions=1, timeout=5)
            busy, other = Sharing(limits=limits), Sharing(limits=limits)

            async def mail_after_mail() -> None:
                while True:
                    await haineko.attempt_transaction(job(route), busy)

            tasks = [asyncio.ensure_future(mail_after_mail()) for _ in range(3)]
            await asyncio.sleep(0.1)
            result = await haineko.attempt_transaction(job(route), other)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for transport in (busy, other):
                await transport.sweep(everything=True)
            return result.replies[0]

        self.assertEqual(haineko.run(story()).code, "250")

    def test_a_rate_is_waited_for_up_to_the_timeout(self):
        peer = self.peer()
        cases = [({"rate": "2/1", "timeout": 5}, 200), ({"rate": "2/600", "timeout": 1}, 503)]
        for route, wanted in cases:
            with self.subTest(**route):
                force = {"httpd": {"workers": 2}, "mailertable": {"default": {"port": peer.port, **route}}}
                server, began = served(self, force), time.monotonic()
                found = [server.submit("a@example.jp") for _ in range(4)]
                self.assertEqual([status for status, *_ in found], [200, 200, wanted, wanted])
                if wanted == 200:
                    self.assertGreater(time.monotonic() - began, 0.9)
                    continue
                _, headers, document = found[-1]
                item = document["response"][0]
                self.assertEqual((item["code"], item["dsn"], item["message"][0]), ("451", "4.3.2", ROUTE_LIMIT))
                self.assertTrue(250 < int(headers["Retry-After"]) <= 300, headers)

    def test_a_throttling_server_is_given_no_more_sessions(self):
        for words in ("432 4.3.2 Concurrent connections limit exceeded", "454 Throttling failure"):
            with self.subTest(words):
                pool = haineko.SessionPool()
                pool.in_use = 1
                self.assertTrue(pool.may_open())
                peer = self.peer({"MAIL": [None, words, None]})
                replies = carried(*[job(peer) for _ in range(3)])
                self.assertEqual([reply.code for (reply,) in replies], ["250", "250", "250"])


ROUTE_LIMIT = "The route's limit is reached"


class RouteLists(Peers):
    def lists(self, first: dict, *others: dict, **sections) -> haineko.Settings:
        return settings(mailertable={"default": [first, *others]}, **sections)

    def test_when_the_next_route_is_tried(self):
        login = {"me": {"username": "neko", "password": "nyaa"}}
        cases = [
            ("connection", None, {}, True), ("greeting 421", {"CONN": "421 busy"}, {}, True),
            ("greeting 554", {"CONN": "554 no"}, {}, True), ("EHLO", {"EHLO": "421 bye"}, {}, True),
            ("TLS", {}, {"starttls": True}, True), ("AUTH", {}, {"auth": "me"}, True),
            ("MAIL 4xx", {"MAIL": "451 later"}, {}, True), ("MAIL 5xx", {"MAIL": "550 no"}, {}, False),
            ("RCPT 4xx", {"RCPT": "451 later"}, {}, True), ("RCPT 5xx", {"RCPT": "550 no"}, {}, False),
            ("RCPT 421", {"RCPT": "421 bye"}, {}, True), ("DATA 4xx", {"DATA": "451 later"}, {}, True),
            ("DATA 5xx", {"DATA": "554 no"}, {}, False), ("text 4xx", {".": "451 later"}, {}, False),
            ("text 5xx", {".": "554 no"}, {}, False), ("in doubt", {".": HANG_UP}, {}, False),
            ("taken", {}, {}, False),
        ]  # fmt: skip
        for what, says, route, tried in cases:
            with self.subTest(what):
                first, second = self.peer(says, "AUTH PLAIN"), self.peer()
                place = {"port": 1} if says is None else esmtp(first)
                self.logged()
                status, found = posted(document(), self.lists({**place, **route}, esmtp(second), authinfo=login))
                item, lines = found["response"][0], self.logged()
                self.assertEqual(item["port"], second.port if tried else first.port)
                self.assertEqual(len(second.taken), int(tried))
                shown = f" fallback=ESMTP:127.0.0.1:{place['port']} "
                self.assertEqual(any(shown in line and " status=sent " in line for line in lines), tried)
                self.assertEqual(any("warning: relay=ESMTP:127.0.0.1:" in line for line in lines), tried)
                self.assertEqual(status == 200, tried or what == "taken")

    def test_each_recipient_by_itself(self):
        first, second = self.peer({"RCPT": refuses(b="451 later", c="550 no")}), self.peer()
        force = self.lists(esmtp(first), esmtp(second))
        _, found = posted(document(header={"to": ", ".join(TO)}, rcpt=None), force)
        self.assertEqual([item["port"] for item in found["response"]], [first.port, second.port, first.port])
        self.assertEqual([item["code"] for item in found["response"]], ["250", "250", "550"])

    def test_a_route_that_failed_is_left_out_for_a_while(self):
        first, second = self.peer({"CONN": ["421 busy", "421 busy", None]}), self.peer()
        transport, route = None, haineko.Route(port=first.port, fallbacks=(haineko.Route(port=second.port),))

        async def sent() -> list:
            nonlocal transport
            transport, ports = haineko.TransportContext(), []
            for step in range(5):
                if step in (2, 4):  # the pause is over
                    transport.route_pauses = dict.fromkeys(transport.route_pauses, 0.0)
                ports.append((await haineko.attempt_transaction(job(route), transport)).replies[0].port)
            await transport.sweep(everything=True)
            return ports

        self.assertEqual(haineko.run(sent()), [second.port] * 4 + [first.port])
        self.assertEqual(len(first.connections), 3)
        self.assertEqual(transport.route_pauses, {})

    def test_all_fail(self):
        status, found = posted(document(), self.lists({"port": 1}, {"port": 2}))
        self.assertEqual((status, found["response"][0]["port"]), (503, 2))

    def test_settings_with_lists(self):
        errors: list = []
        table = {"default": [{"host": "a", "disabled": 1}, {"host": "b"}, {"host": "c", "auth": "x"}], "x.jp": []}
        found = haineko.from_dict(haineko.Settings, {"mailertable": table}, "", errors)
        self.assertEqual(errors, ["mailertable.x.jp: expected at least one value"])
        found, errors = haineko.resolve_settings(found, [])
        self.assertEqual(errors, ['mailertable.default[2].auth: "x" is not in authinfo'])
        self.assertEqual([route.host for route in found.mailertable["default"].choices], ["b", "c"])
        shown = haineko.redacted(found)["mailertable"]["default"]
        self.assertEqual([route["host"] for route in shown], ["b", "c"])
        self.assertEqual(haineko.destination_key(found.mailertable["default"], "x"), "ESMTP b:25")

    def test_commands_show_all(self):
        peer = self.peer()
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "haineko.json")
            table = {"default": [{"port": 1}, {"port": peer.port}]}
            with open(path, "w", encoding="utf-8") as stream:
                json.dump({"mailertable": table, "recipients": {"open-relay": True}}, stream)
            for command in (("check",), ("route", "a@example.jp")):
                shown = run_program(*command, "-c", path, text=True).stdout
                self.assertIn(f"ESMTP 127.0.0.1:1, else ESMTP 127.0.0.1:{peer.port} (", shown)
            shown = run_program("check", "--connect", "-c", path, text=True)
            self.assertIn("mailertable.default[0]: TCP: FAILED", shown.stdout)
            self.assertIn("mailertable.default[1]: TCP: connected", shown.stdout)
            self.assertEqual(shown.returncode, 1)


class MxPeers(WithCertificates):
    """A test with mail hosts on several addresses, and a name server that knows them as mx2.example and so on."""

    def setUp(self) -> None:
        super().setUp()
        self.host = self.enter(SmtpPeer(hosts=("127.0.0.2", "127.0.0.3", "127.0.0.4")))
        self.dns = self.enter(NameServer({f"mx{i}.example": {haineko.A: [f"127.0.0.{i}"]} for i in range(1, 6)}))

    def domain(self, *hosts, **kinds) -> None:
        """What DNS says of neko.example: MX hosts by number (preference, host), or other kinds of records."""
        mx = {haineko.MX: [(preference, f"mx{i}.example" if i else "") for preference, i in hosts]} if hosts else {}
        self.dns.zone["neko.example"] = {**mx, **{getattr(haineko, kind): values for kind, values in kinds.items()}}

    def relay(self, job: haineko.Transaction, sessions: haineko.TransportContext | None = None) -> list:
        """Replies to the job, by sessions of its own unless some are given."""

        async def relayed() -> list:
            own = sessions or haineko.TransportContext((self.dns.place,))
            said = (await haineko.attempt_transaction(job, own)).replies
            if not sessions:
                await own.sweep(everything=True)
            return said

        return haineko.run(relayed())

    def one(self, *recipients: str, **route) -> list:
        return self.relay(mail_to(*(recipients or ("mike@neko.example",)), port=self.host.port, **route))


class RelayMx(MxPeers):
    def test_which_host_answers(self):
        temporary, gone = {"CONN": "450 4.3.2 later"}, {"CONN": HANG_UP}
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
            ("the next after a hang-up at RCPT", [(10, 2), (20, 3)], {2: {"RCPT": HANG_UP}}, (*taken, "mx3.example")),
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
                {2: {".": HANG_UP}},
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
                self.host.says_at = {f"127.0.0.{i}": manner for i, manner in manners.items()}
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
        six = self.enter(SmtpPeer(hosts=("::1",)))
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
        self.assertEqual([connection.host for connection in self.host.connections], [])

    def test_recipients_of_several_domains(self):
        self.domain((10, 2))
        self.dns.zone["inu.example"] = {haineko.MX: [(10, "mx3.example")]}
        self.host.says_at = {"127.0.0.3": {"RCPT": "550 5.1.1 no dogs"}}
        to = ("a@neko.example", "x@none.example", "a@inu.example", "b@Neko.example")
        said = self.one(*to)
        self.assertEqual([item.code for item in said], ["250", "550", "550", "250"])
        self.assertEqual([item.host for item in said], ["mx2.example", None, "mx3.example", "mx2.example"])
        self.assertEqual([mail.recipients for mail in self.host.mails], [["a@neko.example", "b@Neko.example"]])

    def test_a_recipient_that_is_refused_stays_refused_elsewhere(self):
        self.domain((10, 2), (20, 3))
        self.host.says_at = {"127.0.0.2": {"RCPT": ["550 5.1.1 who?", "421 4.3.2 bye"]}}
        said = self.one("a@neko.example", "b@neko.example")
        self.assertEqual(
            [brief(item) for item in said],
            [("550", "5.1.1", "RCPT", "mx2.example"), ("250", "2.0.0", "DATA", "mx3.example")],
        )
        self.assertEqual([mail.recipients for mail in self.host.mails], [["b@neko.example"]])

    def test_no_more_hosts_are_tried_than_a_mail_is_worth(self):
        self.dns.zone["many.example"] = {haineko.MX: [(i, f"many{i}.example") for i in range(30)]}
        for i in range(30):
            self.dns.zone[f"many{i}.example"] = {haineko.A: ["127.0.0.2"]}
        self.host.says_at = {"127.0.0.2": {"CONN": "450 later"}}
        self.assertEqual(self.one("a@many.example")[0].code, "450")
        self.assertEqual(len([connection.host for connection in self.host.connections]), haineko.MAX_MX_ATTEMPTS)

    def test_sessions_and_answers_are_used_again(self):
        self.domain((10, 2))
        sessions = haineko.TransportContext((self.dns.place,))

        async def several() -> list:
            said = [
                await haineko.attempt_transaction(mail_to("a@neko.example", port=self.host.port), sessions)
                for _ in range(3)
            ]
            await sessions.sweep(everything=True)
            return [item.code for outcome in said for item in outcome.replies]

        self.assertEqual(haineko.run(several()), ["250"] * 3)
        self.assertEqual(
            ([connection.host for connection in self.host.connections], len(self.host.mails)), (["127.0.0.2"], 3)
        )
        self.assertEqual(len(self.dns.names()), len(set(self.dns.names())))

    def test_credentials_are_not_for_strangers(self):
        faults: list = []
        routes = {"default": {"mailer": "MX", "auth": "relay"}}
        logins = {"relay": {"username": "u", "password": "p"}}
        found = haineko.from_dict(haineko.Settings, {"mailertable": routes, "authinfo": logins}, "", faults)
        self.assertEqual(
            haineko.resolve_settings(found, faults)[1], ["mailertable.default.auth: MX takes no such setting"]
        )

    def test_the_name_servers_of_the_settings_are_asked(self):
        first, second = haineko.Smtpd(resolver=("127.0.0.1:1",)), haineko.Smtpd(resolver=("127.0.0.1:2",))
        service = haineko.App(haineko.Settings(smtpd=first))
        before = service.transport.resolver
        service.apply(haineko.Settings(smtpd=first))
        self.assertIs(service.transport.resolver, before)  # and what it knows
        service.apply(haineko.Settings(smtpd=second))
        self.assertEqual(service.transport.resolver.nameservers, ("127.0.0.1:2",))
        self.assertIs(service.transport.mta_sts.resolver, service.transport.resolver)

    def test_a_message_for_several_domains_by_the_command_sendmail(self):
        self.domain((10, 2))
        self.dns.zone["inu.example"] = {haineko.MX: [(10, "mx3.example")]}
        path = os.path.join(self.folder, "haineko.json")
        route = {"mailer": "MX", "port": self.host.port, "private": 1, "timeout": 2}
        smtpd = {"hostname": "relay.example.org", "resolver": self.dns.place}
        with open(path, "w", encoding="utf-8") as stream:
            json.dump({"smtpd": smtpd, "recipients": {"open-relay": 1}, "mailertable": {"default": route}}, stream)
        to = ["a@neko.example", "b@inu.example", "c@none.example"]
        for tos, code in ((to[:2], os.EX_OK), (to, os.EX_UNAVAILABLE)):
            self.host.mails.clear()
            done = run_program("sendmail", "-C", path, "-f", "k@example.org", *tos, given=b"Subject: Nyaaaa\n\nMeow.\n")
            self.assertEqual(done.returncode, code, done.stderr)
            self.assertEqual(
                sorted(mail.recipients for mail in self.host.mails), [["a@neko.example"], ["b@inu.example"]]
            )
        self.assertIn(b"<c@none.example>: 550 CONN: Domain does not exist", done.stderr)

    def test_tls(self):
        host = self.enter(SmtpPeer(None, ("STARTTLS",), self.tls, hosts=("127.0.0.2", "127.0.0.3")))
        self.dns.zone["neko.example"] = {haineko.MX: [(10, "mx2.example"), (20, "mx3.example")]}
        breaks, early = {"TLS": "this is no TLS"}, {"STARTTLS": "220 go\nand this came too early"}
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
            ("hung up: in clear text", {2: {"STARTTLS": HANG_UP}}, {}, ("250", "DATA", "mx2.example"), False),
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
                host.says_at = {f"127.0.0.{i}": manner for i, manner in manners.items()}
                said = self.relay(mail_to("a@neko.example", port=host.port, **route))[0]
                self.assertEqual((said.code, said.command, said.host), wanted)
                self.assertEqual([mail.connection.secure for mail in host.mails], [] if secure is None else [secure])

    def test_an_address_that_answers_nothing_costs_a_moment_once(self):
        swallow(self, "127.0.0.5", self.host.port)
        self.dns.zone["mx9.example"] = {haineko.A: ["127.0.0.5", "127.0.0.3"]}
        self.domain((10, 9))
        for least, most in ((0.2, 4.0), (0.0, 0.2)):
            began = time.monotonic()
            self.assertEqual(self.one(private=True, timeout=9)[0].code, "250")
            self.assertTrue(least <= time.monotonic() - began < most)
        self.assertEqual([connection.host for connection in self.host.connections], ["127.0.0.3"] * 2)


class RelayMxByPolicy(MxPeers):
    """MTA-STS. The domain is sts.example; its host is mx.sts.example, which has a certificate."""

    ENFORCE = "version: STSv1\nmode: enforce\nmx: mx.sts.example\nmax_age: 1000\n"

    def setUp(self) -> None:
        super().setUp()
        self.host = self.enter(SmtpPeer(None, ("STARTTLS",), self.tls, hosts=("127.0.0.2", "127.0.0.3")))
        self.web = self.enter(HttpPeer(self.policy, self.tls))
        self.status, self.text = 200, self.ENFORCE
        self.clock = [0.0]
        self.dns.zone.update(
            {
                "sts.example": {haineko.MX: [(10, "mx.sts.example")], "ttl": 0},
                "mx.sts.example": {haineko.A: ["127.0.0.2"]},
                "mta-sts.sts.example": {haineko.A: ["127.0.0.1"]},
                "_mta-sts.sts.example": {haineko.TXT: ["v=STSv1; id=1;"], "ttl": 0},
            }
        )
        stderr = os.dup(2)
        self.addCleanup(os.close, stderr)
        self.addCleanup(os.dup2, stderr, 2)
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)

    def policy(self, asked: Asked) -> tuple:
        """What the web server answers."""
        return self.status, self.text.encode(), (("Content-Type", "text/plain"), ("Location", "/x"))

    def sessions(self) -> haineko.TransportContext:
        found = haineko.TransportContext((self.dns.place,))
        found.resolver = haineko.Resolver((self.dns.place,), clock=lambda: self.clock[0])
        found.mta_sts = haineko.MTASTSCache(found.resolver, found.http, self.web.port, lambda: self.clock[0])
        return found

    def deliver(self, sessions: haineko.TransportContext | None = None, ca: bool = True) -> tuple:
        sessions = sessions or self.sessions()
        job = mail_to("a@sts.example", port=self.host.port, ca_file=self.ca if ca else "")

        async def delivered() -> list:
            said = (await haineko.attempt_transaction(job, sessions)).replies
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
                self.text = text
                self.host.mails.clear()
                self.host.says_at = {"127.0.0.2": manner}
                self.assertEqual(self.deliver(), wanted)
                self.assertEqual(
                    [mail.connection.secure for mail in self.host.mails], [] if secure is None else [secure]
                )
        asked = self.web.asked[0]
        self.assertEqual((asked.method, asked.path), ("GET", "/.well-known/mta-sts.txt"))
        self.assertEqual(asked.headers["host"], f"mta-sts.sts.example:{self.web.port}")

    def test_a_certificate_for_another_name_is_none(self):
        self.dns.zone["sts.example"] = {haineko.MX: [(10, "mx2.sts.example"), (20, "mx.sts.example")]}
        self.dns.zone["mx2.sts.example"] = {haineko.A: ["127.0.0.3"]}
        self.text = self.ENFORCE.replace("mx.sts", "*.sts")
        self.assertEqual(self.deliver(), ("250", "2.0.0", "DATA", "mx.sts.example"))
        self.assertEqual([mail.connection.host for mail in self.host.mails], ["127.0.0.2"])
        self.dns.zone["sts.example"] = {haineko.MX: [(10, "mx2.sts.example")]}
        self.assertEqual(self.deliver()[:3], ("421", "4.7.5", "STARTTLS"))

    def test_a_web_server_that_is_not_the_domains_says_nothing(self):
        self.host.says_at = {"127.0.0.2": {"EHLO": "250 mx"}}
        self.assertEqual(self.deliver(ca=False)[0], "250")
        self.assertEqual(self.web.asked, [])
        self.status = 301
        self.assertEqual(self.deliver()[0], "250")

    def test_policies_are_kept(self):
        sessions, strict = self.sessions(), "451"
        self.text = self.ENFORCE.replace("mx.sts", "mail.sts")  # shows by 451 whether it is in force
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
            ("later it is", 110 + haineko.MTASTSCache.NEGATIVE_TTL, {"status": 200}, "250", 3),
            ("and when its time is over", 2000, {}, "250", 4),
        ):
            with self.subTest(what):
                self.clock[0] = at
                self.text, self.status = (
                    changes.get("text", self.text),
                    changes.get("status", self.status),
                )
                self.dns.zone["_mta-sts.sts.example"] = txt = changes.get("txt", txt)
                self.assertEqual(self.deliver(sessions)[0], wanted)
                self.assertEqual(len(self.web.asked), asked)

    def test_look_ups_and_fetches_under_way_are_shared(self):
        sessions, found = self.sessions(), []
        route = mail_to("a@sts.example", port=self.host.port, ca_file=self.ca).route

        async def one() -> None:
            found.append(await sessions.mta_sts.policy_for("sts.example", route))

        haineko.run(together(*[one() for _ in range(64)]))
        self.assertEqual({policy.hosts for policy in found}, {("mx.sts.example",)})
        self.assertEqual((len(found), len(self.web.asked)), (64, 1))
        self.assertEqual(len(self.dns.asked), 3)  # the TXT record, and both kinds of address

    def test_a_web_server_that_drips_is_not_waited_for(self):
        web = self.enter(HttpPeer(lambda asked: "drip", self.tls))
        sessions = self.sessions()
        sessions.mta_sts.port, sessions.mta_sts.FETCH_TIMEOUT = web.port, 0.6
        began = time.monotonic()
        self.assertEqual(self.deliver(sessions)[0], "250")
        self.assertLess(time.monotonic() - began, 3)


def sigv4_is_right(asked: Asked, key: str, secret: str, region: str) -> bool:
    """As Amazon checks it, from what came over the wire; written after its documentation, not after haineko.py."""
    found = re.fullmatch(
        r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([^/]+)/ses/aws4_request, "
        r"SignedHeaders=([a-z0-9;-]+), Signature=([0-9a-f]{64})",
        asked.headers.get("authorization", ""),
    )
    if not found or found[1] != key or found[3] != region:
        return False
    names = found[4].split(";")
    if (
        not {"host", "x-amz-date"} <= set(names)
        or names != sorted(names)
        or not asked.headers["x-amz-date"].startswith(found[2])
    ):
        return False
    if any(name.startswith("x-amz-") and name not in names for name in asked.headers):
        return False
    listed = "".join(f"{name}:{' '.join(asked.headers[name].split())}\n" for name in names)
    request = f"{asked.method}\n{asked.path}\n\n{listed}\n{found[4]}\n{hashlib.sha256(asked.body).hexdigest()}"
    to_sign = f"AWS4-HMAC-SHA256\n{asked.headers['x-amz-date']}\n{found[2]}/{region}/ses/aws4_request\n"
    to_sign += hashlib.sha256(request.encode()).hexdigest()

    def mac(with_key: bytes, text: str) -> bytes:
        return hmac.new(with_key, text.encode(), hashlib.sha256).digest()

    signing = mac(mac(mac(mac(b"AWS4" + secret.encode(), found[2]), region), "ses"), "aws4_request")
    return hmac.compare_digest(hmac.new(signing, to_sign.encode(), hashlib.sha256).hexdigest(), found[5])


def fits(value, schema: dict, where: str = "") -> list:
    """What of the value doesn't fit a JSON schema (the words that the vendors use)."""
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}
    if not isinstance(value, kinds[schema["type"]]):
        return [f"{where}: no {schema['type']}"]
    wrong = []
    if isinstance(value, dict):
        known = schema.get("properties", {})
        wrong += [f"{where}: lacks {key}" for key in schema.get("required", ()) if key not in value]
        wrong += [f"{where}: knows no {key}" for key in value if known and key not in known]
        wrong += [line for key in value if key in known for line in fits(value[key], known[key], f"{where}.{key}")]
    if isinstance(value, list):
        wrong += [line for i, item in enumerate(value) for line in fits(item, schema["items"], f"{where}[{i}]")]
        wrong += [f"{where}: too few"] * (len(value) < schema.get("minItems", 0))
    if isinstance(value, str):
        wrong += [f"{where}: too short"] * (len(value) < schema.get("minLength", 0))
        wrong += [f"{where}: {value} is not allowed"] * (value not in schema.get("enum", [value]))
    return wrong


STRING, FILLED = {"type": "string"}, {"type": "string", "minLength": 1}
PERSON = {"type": "object", "properties": {"email": FILLED, "name": STRING}, "required": ["email"]}
PEOPLE = {"type": "array", "items": PERSON, "minItems": 1}
SENDGRID_SCHEMA = {  # after spec/json/tsg_mail_v3.json of github.com/twilio/sendgrid-oai
    "type": "object",
    "required": ["personalizations", "from", "subject", "content"],
    "properties": {
        "personalizations": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "object", "required": ["to"], "properties": {"to": PEOPLE, "cc": PEOPLE, "bcc": PEOPLE}},
        },
        "from": PERSON,
        "reply_to": PERSON,
        "reply_to_list": PEOPLE,
        "subject": FILLED,
        "headers": {"type": "object"},
        "content": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "object", "required": ["type", "value"], "properties": {"type": FILLED, "value": FILLED}},
        },
        "attachments": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["content", "filename"],
                "properties": {
                    "content": FILLED,
                    "type": FILLED,
                    "filename": FILLED,
                    "disposition": {"type": "string", "enum": ["inline", "attachment"]},
                    "content_id": FILLED,
                },
            },
        },
    },
}
ADDRESSES = {"type": "array", "items": FILLED, "minItems": 1}
AMAZONSES_SCHEMA = {  # after SendEmailRequest in botocore's data/sesv2/2019-09-27/service-2.json
    "type": "object",
    "required": ["Content"],
    "properties": {
        "FromEmailAddress": STRING,
        "FeedbackForwardingEmailAddress": STRING,
        "Destination": {"type": "object", "properties": {"ToAddresses": ADDRESSES}},
        "Content": {
            "type": "object",
            "required": ["Raw"],
            "properties": {"Raw": {"type": "object", "required": ["Data"], "properties": {"Data": FILLED}}},
        },
    },
}
MANDRILL_SCHEMA = {  # after the parameters of messages/send-raw in Mandrill's API reference
    "type": "object",
    "required": ["key", "raw_message"],
    "properties": {
        "key": FILLED,
        "raw_message": FILLED,
        "from_email": STRING,
        "to": ADDRESSES,
        "async": {"type": "boolean"},
    },
}


def as_sendgrid(asked: Asked):
    if asked.headers.get("authorization") != f"Bearer {SECRET}":
        return 401, {"errors": [{"message": "authorization required", "field": None, "help": None}]}
    if (asked.method, asked.path) == ("GET", "/v3/scopes"):
        return 200, {"scopes": ["mail.send", "alerts.read"]}
    if (asked.method, asked.path) != ("POST", "/v3/mail/send"):
        return 404, {"errors": [{"message": "not found"}]}
    if asked.headers.get("content-type") != "application/json":
        return 415, {"errors": [{"message": "Content-Type should be application/json."}]}
    wrong = fits(asked.json(), SENDGRID_SCHEMA)
    reserved = {"x-sg-id", "x-sg-eid", "received", "dkim-signature", "content-type", "content-transfer-encoding"}
    reserved |= {"to", "from", "subject", "reply-to", "cc", "bcc"}
    wrong += [f"headers.{name}: reserved" for name in asked.json().get("headers", {}) if name.lower() in reserved]
    wrong += [f"type {item['type']}" for item in asked.json().get("attachments", ()) if ";" in item["type"]]
    if wrong:
        return 400, {"errors": [{"message": line, "field": "body"} for line in wrong]}
    return 202, b"", (("X-Message-Id", "14c5d75ce93.dfd.64b469"),)


def as_amazonses(asked: Asked):
    if not sigv4_is_right(asked, KEY, SECRET, "eu-west-1"):
        said = {"message": "The request signature we calculated does not match the signature you provided."}
        return 403, said, (("x-amzn-ErrorType", "SignatureDoesNotMatch:http://internal.amazon.com/"),)
    if (asked.method, asked.path) == ("GET", "/v2/email/account"):
        return 200, {"SendingEnabled": True, "ProductionAccessEnabled": False}
    if (asked.method, asked.path) != ("POST", "/v2/email/outbound-emails"):
        return 404, {"message": "no such operation"}, (("x-amzn-ErrorType", "UnknownOperationException"),)
    wrong = fits(asked.json(), AMAZONSES_SCHEMA)
    if wrong:
        return 400, {"message": "; ".join(wrong)}, (("x-amzn-ErrorType", "BadRequestException"),)
    base64.b64decode(asked.json()["Content"]["Raw"]["Data"], validate=True).decode("ascii")
    return 200, {"MessageId": "010001864-aaaa-000000"}


def as_mandrill(asked: Asked):
    if asked.json().get("key") != SECRET:
        return 500, {"status": "error", "code": -1, "name": "Invalid_Key", "message": "Invalid API key"}
    if asked.path == "/api/1.0/users/ping2.json":
        return 200, {"PING": "PONG!"}
    wrong = fits(asked.json(), MANDRILL_SCHEMA) + [asked.path] * (asked.path != "/api/1.0/messages/send-raw.json")
    if wrong:
        return 500, {"status": "error", "code": -2, "name": "ValidationError", "message": "; ".join(wrong)}
    fates = {"hard": ("rejected", "hard-bounce"), "odd": ("invalid", None), "later": ("queued", None)}
    items = []
    for to in asked.json()["to"]:
        status, reason = fates.get(to.partition("@")[0], ("sent", None))
        items.append({"email": to.lower(), "status": status, "reject_reason": reason, "_id": "abc" + to[0]})
    return 200, items[::-1]


def as_haineko(asked: Asked):
    """A far end that takes everything, if the login is right."""
    wanted = "Basic " + base64.b64encode(f"{KEY}:{SECRET}".encode()).decode()
    item = {
        "rcpt": None,
        "error": 1,
        "code": "535",
        "dsn": "5.7.0",
        "command": "AUTH",
        "message": ["authentication failed"],
    }
    if asked.headers.get("authorization") != wanted:
        return 401, {"response": [item]}
    if "mail" not in asked.json():
        return 400, {"response": [{**item, "code": "501", "dsn": "5.5.2", "command": "MAIL"}]}
    good = {
        "error": 0,
        "code": "250",
        "dsn": "2.0.0",
        "command": "DATA",
        "message": ["2.0.0 Ok: queued as 4F"],
        "mailer": "ESMTP",
    }
    return 200, {"response": [{**good, "rcpt": to} for to in asked.json()["rcpt"]]}


def as_graph(asked: Asked):
    """Graph, for a token that may send and nothing else."""
    if asked.headers.get("authorization") != f"Bearer {SECRET}":
        return 401, {"error": {"code": "InvalidAuthenticationToken", "message": "Access token is empty."}}
    if asked.method == "GET":
        return 403, {"error": {"code": "Authorization_RequestDenied", "message": "Insufficient privileges"}}
    if asked.path != f"/v1.0/users/{KEY}/sendMail" or asked.headers["content-type"] != "text/plain":
        return 400, {"error": {"code": "ErrorMimeContentInvalid", "message": asked.path}}
    header_of(base64.b64decode(asked.body, validate=True))
    return 202, b"", (("request-id", "5d9f-graph"),)


def as_gmail(asked: Asked):
    if asked.headers.get("authorization") != f"Bearer {SECRET}":
        return 401, {"error": {"code": 401, "message": "Invalid Credentials", "status": "UNAUTHENTICATED"}}
    if asked.path == "/gmail/v1/users/me/profile":
        return 200, {"emailAddress": KEY, "messagesTotal": 1}
    if asked.path == "/gmail/v1/users/me/messages/send":
        header_of(base64.b64decode(asked.json()["raw"], b"-_", validate=True))
    elif (asked.path, asked.headers["content-type"]) == (
        "/upload/gmail/v1/users/me/messages/send?uploadType=media",
        "message/rfc822",
    ):
        header_of(asked.body)
    else:
        return 404, {"error": {"code": 404, "message": "Not found"}}
    return 200, {"id": "18c2f0", "threadId": "18c2f0", "labelIds": ["SENT"]}


def header_of(octets: bytes) -> email.message.Message:
    """The header of a message for an API that takes recipients from it."""
    found = email.message_from_bytes(octets)
    assert found["From"] and (found["To"] or found["Bcc"]), octets[:200]
    return found


PEERS = {"Haineko": as_haineko, "SendGrid": as_sendgrid, "AmazonSES": as_amazonses, "Mandrill": as_mandrill}
PEERS.update(MSGraph=as_graph, GmailAPI=as_gmail)


class WebRelays(Quiet):
    """What holds for each of them."""

    def test_a_mail_is_taken_by_a_peer_that_checks_the_request(self):
        for mailer, answer in PEERS.items():
            with self.subTest(mailer), HttpPeer(answer) as peer:
                said = first_reply(composed_job(web_route(mailer, peer.url)))
                self.assertEqual(
                    (said.code, said.dsn, said.command, said.mailer), ("250", "2.0.0", "DATA", mailer), said
                )
                self.assertEqual((said.host, said.port), ("127.0.0.1", peer.port))

    def test_the_number_that_the_cloud_gave_is_in_the_reply(self):
        for mailer, line in (
            ("SendGrid", "X-Message-Id: 14c5d75ce93.dfd.64b469"),
            ("AmazonSES", "MessageId: 010001864-aaaa-000000"),
            ("Mandrill", "_id: abcm"),
            ("Haineko", "2.0.0 Ok: queued as 4F"),
            ("MSGraph", "request-id: 5d9f-graph"),
            ("GmailAPI", "id: 18c2f0"),
        ):
            with self.subTest(mailer), HttpPeer(PEERS[mailer]) as peer:
                self.assertIn(line, first_reply(composed_job(web_route(mailer, peer.url))).message)

    def test_wrong_credentials(self):
        for mailer, code, dsn in (
            ("Haineko", "535", "5.7.0"),
            ("SendGrid", "550", "5.7.8"),
            ("AmazonSES", "550", "5.7.1"),
            ("Mandrill", "451", "4.3.0"),  # which says 500 to that
            ("MSGraph", "550", "5.7.8"),
            ("GmailAPI", "550", "5.7.8"),
        ):
            with self.subTest(mailer), HttpPeer(PEERS[mailer]) as peer:
                said = first_reply(composed_job(with_wrong_login(web_route(mailer, peer.url))))
                self.assertEqual((said.code, said.dsn), (code, dsn), said)
                self.assertEqual(said.route_fault, mailer != "Mandrill")
                self.assertNotIn("wrong", " ".join(said.message))

    def test_answers_that_are_no_success(self):
        page = b"<html>Bad gateway</html>"
        cases = (  # status, body, headers, code, unsure, wait
            (
                "429",
                429,
                {"message": "slow", "errors": [{"message": "slow"}]},
                (("Retry-After", "77"),),
                "451",
                False,
                77,
            ),
            ("500", 500, {"message": "oops", "errors": [{"message": "oops"}]}, (), "451", False, 0),
            ("503 of a proxy", 503, page, (("Retry-After", "5"),), "451", False, 5),
            ("403 of a proxy", 403, page, (), "451", False, 0),
            ("413 of a proxy", 413, page, (), "550", False, 0),
            ("302", 302, b"", (("Location", "http://127.0.0.1/"),), "451", False, 0),
            ("a page", 200, b"<html>Log in to our hotel</html>", (), "451", True, 0),
            ("other JSON", 200, {"hello": "world"}, (), "451", True, 0),
            ("a list of it", 200, [1, None], (), "451", True, 0),
            ("deep JSON", 200, b"[" * 100000, (), "451", True, 0),
            ("not UTF-8", 200, b'{"a": "\xff"}', (), "451", True, 0),
            ("huge", 200, b" " * (2 << 20) + b"{}", (), "451", True, 0),
        )
        for mailer in PEERS:
            for what, status, body, headers, code, unsure, wait in cases:
                with (
                    self.subTest(mailer, what=what),
                    HttpPeer(lambda asked, said=(status, body, headers): said) as peer,
                ):
                    replies = relayed(composed_job(web_route(mailer, peer.url)), times=2)
                    for (said,) in replies:
                        self.assertEqual(
                            (said.code, said.maybe_delivered, said.retry_after), (code, unsure, wait), said
                        )
                        self.assertEqual(len(peer.asked), 2)

    def test_an_error_in_the_form_of_another_api_may_be_of_a_proxy(self):
        forms = {
            "SendGrid": {"errors": [{"message": "no"}]},
            "AmazonSES": {"__type": "MessageRejected", "message": "no"},
            "Mandrill": {"status": "error", "name": "x", "message": "no"},
            "MSGraph": {"error": {"code": "x", "message": "no"}},
            "GmailAPI": {"error": {"code": "x", "message": "no"}},
        }
        for mailer in PEERS:
            for said in [*forms.values(), {"message": "no"}, {"errors": "no", "error": "no", "status": "error"}]:
                with self.subTest(mailer, said=said), HttpPeer(lambda asked, said=said: (403, said)) as peer:
                    reply = first_reply(composed_job(web_route(mailer, peer.url)))
                    self.assertEqual(reply.code, "550" if forms.get(mailer) == said else "451")

    def test_final_and_temporary_words_of_the_clouds(self):
        cases = (
            (
                "SendGrid",
                400,
                {"errors": [{"message": "Bad from", "field": "from.email"}]},
                (),
                "550",
                "from.email: Bad from",
            ),
            ("SendGrid", 403, {"errors": [{"message": "access forbidden"}]}, (), "550", "access forbidden"),
            (
                "AmazonSES",
                400,
                {"message": "Email address is not verified."},
                (("x-amzn-errortype", "MessageRejected"),),
                "550",
                "MessageRejected",
            ),
            (
                "AmazonSES",
                400,
                {"message": "Maximum sending rate exceeded."},
                (("x-amzn-errortype", "ThrottlingException"),),
                "451",
                "ThrottlingException",
            ),
            (
                "AmazonSES",
                400,
                {"__type": "com.amazon#LimitExceededException", "Message": "Daily"},
                (),
                "451",
                "LimitExceededException",
            ),
            (
                "AmazonSES",
                429,
                {},
                (("x-amzn-errortype", "TooManyRequestsException:http://x/"),),
                "451",
                "TooManyRequestsException",
            ),
            ("AmazonSES", 404, {"message": "none"}, (("x-amzn-errortype", "NotFoundException"),), "550", "none"),
            (
                "Mandrill",
                401,
                {"status": "error", "name": "Invalid_Key", "message": "Invalid API key"},
                (),
                "550",
                "Invalid_Key: Invalid API key",
            ),
            (
                "Mandrill",
                500,
                {"status": "error", "name": "GeneralError", "message": "An error"},
                (),
                "451",
                "GeneralError: An error",
            ),
        )
        for mailer, status, body, headers, code, line in cases:
            with self.subTest(mailer, line=line), HttpPeer(lambda asked, said=(status, body, headers): said) as peer:
                said = first_reply(composed_job(web_route(mailer, peer.url)))
                self.assertEqual((said.code, said.dsn[0], said.maybe_delivered), (code, code[0], False))
                self.assertIn(line, said.message)

    def test_retry_after(self):
        now = time.time()
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now + 100))
        cases = (
            ((("Retry-After", "30"),), 30, 30),
            ((("Retry-After", date),), 90, 101),
            ((("Retry-After", "-3"),), 0, 0),
            ((("Retry-After", "soon"),), 0, 0),
            ((("Retry-After", "9" * 9),), 86400, 86400),
            ((("X-RateLimit-Reset", str(int(now + 50))),), 40, 51),
            ((), 0, 0),
        )
        for headers, low, high in cases:
            wire = io.BytesIO("".join(f"{name}: {value}\r\n" for name, value in headers).encode() + b"\r\n")
            said = haineko.HTTPResponse(429, "", haineko.http.client.parse_headers(wire), b"")
            with self.subTest(headers):
                self.assertTrue(low <= haineko.parse_retry_after(said) <= high, haineko.parse_retry_after(said))

    def test_peers_that_break_off(self):
        cases = (  # what it does, code, unsure, command
            ("silence", "hang", "451", True),
            ("an octet now and then", "drip", "451", True),
            ("hangs up after reading", "close", "451", True),
            ("rubbish", b"220 mail.example ESMTP\r\n", "451", True),
            ("rubbish without end", b"x" * 200000, "451", True),
            ("headers without end", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\n", "451", True),
            (
                "hangs up in the answer",
                b'HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 99\r\n\r\n[{"',
                "451",
                True,
            ),
            (
                "hangs up in a refusal",
                b"HTTP/1.1 413 No\r\nConnection: close\r\nContent-Length: 99\r\n\r\n{",
                "550",
                False,
            ),
        )
        for what, action, code, unsure in cases:
            with self.subTest(what), HttpPeer(lambda asked, said=action: said) as peer:
                replies: list = []

                async def one(mailer: str, peer=peer, replies=replies) -> None:
                    job, sessions = composed_job(web_route(mailer, peer.url)), haineko.TransportContext()
                    replies.extend((await and_closed(haineko.attempt_transaction(job, sessions), sessions)).replies)

                began = time.monotonic()
                haineko.run(together(*[one(mailer) for mailer in PEERS]))
                self.assertLess(time.monotonic() - began, 2.5)
                self.assertEqual({said.mailer for said in replies}, set(PEERS))
                self.assertEqual(
                    [(said.code, said.maybe_delivered) for said in replies], [(code, unsure)] * len(PEERS), replies
                )
                self.assertEqual(len(peer.asked), len(PEERS))

    def test_nobody_there(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        for mailer in PEERS:
            with self.subTest(mailer):
                said = first_reply(composed_job(web_route(mailer, f"http://127.0.0.1:{port}")))
                self.assertEqual(
                    (said.code, said.dsn, said.command, said.maybe_delivered), ("451", "4.4.1", "CONN", False)
                )
                self.assertEqual((said.mailer, said.host, said.port), (mailer, "127.0.0.1", port))
                self.assertIn("refused", said.message[1])

    def test_a_peer_that_never_reads(self):
        with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            job = composed_job(web_route("SendGrid", url), web_submission(body="x" * 70 + "\n" + "y" * (12 << 20)))
            began = time.monotonic()
            said = first_reply(job)
        self.assertEqual((said.code, said.maybe_delivered, said.dsn), ("451", False, "4.4.2"), said)
        self.assertLess(time.monotonic() - began, 15)

    def test_a_refusal_told_before_all_was_read(self):
        def serve(listener) -> None:
            sock, _ = listener.accept()
            sock.recv(100)
            sock.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            sock.shutdown(socket.SHUT_WR)
            time.sleep(0.3)  # as servers do, so that the client gets to read it before the reset
            sock.close()

        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=serve, args=(listener,), daemon=True).start()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            said = first_reply(composed_job(web_route("Mandrill", url), web_submission(body="y" * (20 << 20))))
        self.assertEqual((said.code, said.dsn), ("550", "5.3.4"), said)

    def test_credentials_stay_within_this_machine_or_tls(self):
        outside = outside_address()
        if not outside:
            self.skipTest("this machine has no address but loopback")
        with socket.create_server((outside, 0)) as listener:
            listener.settimeout(0.2)
            for mailer in PEERS:
                url = f"http://{outside}:{listener.getsockname()[1]}"
                with self.subTest(mailer):
                    said = first_reply(composed_job(web_route(mailer, url)))
                    self.assertEqual((said.command, said.dsn), ("AUTH", "4.7.11"))
                    sock, _ = listener.accept()
                    with sock:
                        self.assertEqual(sock.recv(100), b"")


class WebRoutes(unittest.TestCase):
    """Settings of the relays by HTTP."""

    def test_faults_are_told_at_start(self):
        cases = (
            ({"mailer": "SendGrid"}, "mailertable.default.auth: SendGrid needs it"),
            ({"mailer": "Mandrill"}, "mailertable.default.auth: Mandrill needs it"),
            ({"mailer": "AmazonSES", "auth": "key"}, "mailertable.default.region: AmazonSES needs it"),
            ({"mailer": "AmazonSES", "region": "eu-west-1"}, "mailertable.default.auth: AmazonSES needs it"),
            (
                {"mailer": "AmazonSES", "auth": "none", "region": "eu"},
                'mailertable.default.auth: "none" is not in authinfo',
            ),
            (
                {"mailer": "SendGrid", "auth": "empty"},
                "mailertable.default.auth: authinfo.empty needs password",
            ),
            ({"mailer": "AmazonSES", "auth": "half", "region": "eu"}, "authinfo.half needs username and password"),
            ({"mailer": "SendGrd", "auth": "key"}, 'did you mean "SendGrid"?'),
        )
        logins = {"key": {"username": "a", "password": "b"}, "empty": {}, "half": {"password": "file"}}
        for route, wanted in cases:
            with self.subTest(route):
                faults: list = []
                raw = {"authinfo": logins, "mailertable": {"default": route}}
                settings = haineko.from_dict(haineko.Settings, raw, "", faults)
                if not faults:
                    _, faults = haineko.resolve_settings(settings, faults)
                self.assertIn(wanted, "\n".join(faults))

    def test_values_that_are_refused(self):
        urls = "ftp://x", "https://", "https://a b", "http://x:0", "http://x:70000", "http://x/?a", "https://u@x"
        for key, bad in (
            ("base_url", (*urls, "https://[::::]", "https://a..b", "x", 5)),
            ("region", ("EU", "eu west", "eu/../", 1)),
            ("https", ("yes", 2)),
        ):
            for value in bad:
                with self.subTest(key, value=value):
                    faults: list = []
                    haineko.from_dict(haineko.Route, {"mailer": "SendGrid", key: value}, "", faults)
                    self.assertEqual(len(faults), 1, faults)

    def test_where_each_goes(self):
        for more, url, place in (
            ({"mailer": "SendGrid"}, "https://api.sendgrid.com", ("api.sendgrid.com", 443)),
            (
                {"mailer": "sendgrid", "base_url": "https://api.eu.sendgrid.com/"},
                "https://api.eu.sendgrid.com",
                ("api.eu.sendgrid.com", 443),
            ),
            (
                {"mailer": "AmazonSES", "region": "ap-northeast-1"},
                "https://email.ap-northeast-1.amazonaws.com",
                ("email.ap-northeast-1.amazonaws.com", 443),
            ),
            ({"mailer": "Mandrill"}, "https://mandrillapp.com", ("mandrillapp.com", 443)),
            ({"mailer": "Haineko", "host": "::1"}, "http://[::1]:2794", ("::1", 2794)),
            ({"mailer": "Haineko", "host": "mx.example", "https": 1}, "https://mx.example:2794", ("mx.example", 2794)),
            ({"mailer": "Haineko", "host": "mx.example", "port": 25}, "http://mx.example:25", ("mx.example", 25)),
            (
                {"mailer": "Haineko", "base_url": "https://mx.example/post"},
                "https://mx.example/post",
                ("mx.example", 443),
            ),
            ({"mailer": "ESMTP", "host": "mx.example"}, "", ("mx.example", 25)),
        ):
            with self.subTest(more):
                route = web_settings({"auth": "key", **more}).mailertable["default"]
                self.assertEqual((route.url, (route.host, route.port)), (url, place))

    def test_secrets_stay_secret(self):
        logins = {"key": {"username": "AKID", "password": "geheim", "token": "auch-geheim"}}
        route = {"mailer": "AmazonSES", "auth": "key", "region": "eu-west-1"}
        settings = web_settings(route, authinfo=logins)
        self.assertEqual(settings.mailertable["default"].token, "auch-geheim")
        self.assertNotIn("geheim", json.dumps(haineko.redacted(settings)) + repr(settings.mailertable["default"].url))

    def test_a_password_with_the_word_file_in_it_is_no_file(self):
        logins = {"key": {"username": "AKID", "password": "my profile"}}
        self.assertEqual(web_settings({"mailer": "SendGrid", "auth": "key"}, authinfo=logins).files, ())


class TokenRelays(Quiet):
    """MSGraph and GmailAPI, which take recipients from the header."""

    def test_the_envelope_is_in_the_header(self):
        shown = b"From: a@example.org\r\nTo: B <b@example.jp>\r\nCc: c@example.jp\r\nSubject: Nya\r\n\r\nMeow.\r\n"
        for what, octets, to, bcc, words in (
            ("shown", shown, ("b@example.jp", "c@example.jp"), None, ""),
            ("one hidden", shown, ("b@example.jp", "c@example.jp", "d@example.jp"), "d@example.jp", ""),
            (
                "nobody shown",
                shown.replace(b"To:", b"X-To:").replace(b"Cc:", b"X-Cc:"),
                ("d@example.jp", "e@example.jp"),
                "d@example.jp, e@example.jp",
                "",
            ),
            ("somebody else shown", shown, ("b@example.jp",), None, "Cc has c@example.jp"),
            ("Bcc is set", b"Bcc: x@example.jp\r\n" + shown, ("b@example.jp", "c@example.jp"), None, "the header bcc"),
        ):
            for mailer in ("MSGraph", "GmailAPI"):
                with self.subTest(what, mailer=mailer), HttpPeer(PEERS[mailer]) as peer:
                    reply = first_reply(raw_job(web_route(mailer, peer.url), octets, to))
                    if words:
                        self.assertEqual((reply.code, reply.dsn, len(peer.asked)), ("550", "5.6.3", 0))
                        self.assertIn(words, reply.message[1])
                        continue
                    self.assertEqual(reply.code, "250", reply)
                    body = peer.asked[0].body
                    sent = (
                        base64.b64decode(body)
                        if mailer == "MSGraph"
                        else base64.urlsafe_b64decode(json.loads(body)["raw"])
                    )
                    self.assertEqual(re.sub("\\s+", " ", str(header_of(sent)["Bcc"])), str(bcc))
                    self.assertTrue(sent.endswith(b"Meow.\r\n"))

    def test_a_large_message_is_uploaded(self):
        with HttpPeer(as_gmail) as peer:
            self.assertEqual(
                first_reply(
                    composed_job(web_route("GmailAPI", peer.url, timeout=60), web_submission(body="x\n" * (1 << 20)))
                ).code,
                "250",
            )
            self.assertIn("uploadType=media", peer.asked[0].path)

    def test_a_refused_token_is_fetched_anew_once(self):
        tokens, said = (
            ["old", SECRET],
            {"error": {"code": "InvalidAuthenticationToken", "message": f"old and {SECRET}"}},
        )
        with (
            HttpPeer(lambda _: (200, {"access_token": tokens.pop(0) if len(tokens) > 1 else tokens[0]})) as provider,
            HttpPeer(as_graph) as peer,
        ):
            oauth2 = haineko.OAuth2(token_url=f"{provider.url}/t", client_id="i", client_secret="s")
            route = replace(web_route("MSGraph", peer.url), oauth2=oauth2)
            self.assertEqual(first_reply(composed_job(route)).code, "250")
            peer.answer = lambda _: (401, said)
            reply = first_reply(composed_job(route))
            self.assertEqual(
                (reply.route_fault, reply.message[1]), (True, "InvalidAuthenticationToken: old and ********")
            )
            self.assertEqual((len(provider.asked), len(peer.asked)), (4, 4))

    def test_words_of_the_apis(self):
        for mailer, status, error, headers, code, words in (
            (
                "MSGraph",
                403,
                {"code": "ErrorAccessDenied", "message": "Access is denied."},
                (),
                "550",
                "ErrorAccessDenied: Access is denied.",
            ),
            (
                "MSGraph",
                429,
                {"code": "ApplicationThrottled", "message": "slow"},
                (("Retry-After", "9"),),
                "451",
                "ApplicationThrottled: slow",
            ),
            (
                "GmailAPI",
                403,
                {"code": 403, "message": "slow", "errors": [{"reason": "userRateLimitExceeded"}]},
                (),
                "451",
                "403: slow",
            ),
            ("GmailAPI", 403, {"code": 403, "message": "no", "errors": [5]}, (), "550", "403: no"),
            ("GmailAPI", 403, {"code": 403, "message": "no", "errors": 5}, (), "550", "403: no"),
            ("GmailAPI", 403, {"code": 403, "message": "Delegation denied"}, (), "550", "403: Delegation denied"),
        ):
            with self.subTest(words), HttpPeer(lambda _, said=(status, {"error": error}, headers): said) as peer:
                reply = first_reply(composed_job(web_route(mailer, peer.url)))
                self.assertEqual((reply.code, reply.message[1], reply.retry_after), (code, words, 9 if headers else 0))


class FarHaineko(Quiet):
    """The relay Haineko: what it sends, and what it makes of the answers."""

    def sent(self, job: haineko.Transaction) -> dict:
        return json.loads(haineko.haineko_request(job).body)

    def test_plain_text_goes_as_header_and_body_and_comes_out_the_same(self):
        route = web_route("Haineko")
        words = (
            "キジトラ",
            "ｶﾀｶﾅ①髙～㈱",
            "Zürich",
            'A "quoted" name',
            "Doe, John",
            "x" * 200,
            "=?UTF-8?B?eA==?=",
            "a\\b",
            "O'Hara (Bob)",
        )
        bodies = (
            "Nyaa",
            "にゃあ\n",
            "x" * 2000,
            "a\r\nb\n\n",
            " .\n..\n",
            "é" * 500,
            "trailing \n",
            "tab\t\n=3D\n",
            "①ｱ\n",
        )
        for charset in ("UTF-8", "ISO-2022-JP", "ISO-8859-1", "US-ASCII", "EUC-JP"):
            for i, word in enumerate(words):
                header = {
                    "subject": word,
                    "from": f"{json.dumps(word, ensure_ascii=False)} <a@example.com>",
                    "charset": charset,
                }
                header["x-haineko-loop"] = ["far.example", "farther.example"]
                document = web_submission(header=header, body=bodies[i % len(bodies)])
                job = composed_job(route, document, number=i + 1)
                with self.subTest(charset, word=word):
                    sent = self.sent(job)
                    self.assertEqual(set(sent), {"ehlo", "mail", "rcpt", "header", "body"})
                    self.assertEqual(
                        sent["header"]["x-haineko-loop"], ["far.example", "farther.example", "here.example"]
                    )
                    again, original = composed_job(route, sent, number=i + 1).octets(), job.octets()
                    for field in (rb"From", rb"Sender", rb"Reply-To", rb"Subject", rb"Content-[\w-]+", rb"To"):
                        pattern = rb"(?ms)^" + field + rb":.*?(?=^\S)"
                        self.assertEqual(re.findall(pattern, again), re.findall(pattern, original))
                    self.assertEqual(again.partition(b"\r\n\r\n")[2], original.partition(b"\r\n\r\n")[2])

    def test_other_messages_go_whole(self):
        route = web_route("Haineko")
        octets = composed_job(route).octets().decode()
        for what, text in (
            ("another header", octets.replace("Date:", "In-Reply-To: <a@b>\r\nDate:")),
            ("its own Message-Id", octets.replace("<" + "Q" * 16, "<mine")),
            ("its own Date", re.sub("\r\nDate: .*", "\r\nDate: Thu, 1 Jan 1970 00:00:00 +0000", octets)),
            ("HTML", octets.replace("text/plain", "text/html")),
            (
                "several parts",
                "From: a@b.example\r\nTo: x@y.example\r\nContent-Type: multipart/mixed; boundary=x\r\n\r\n--x--\r\n",
            ),
            ("a header twice", octets.replace("Subject:", "Subject: x\r\nSubject:")),
            ("no header at all", "\r\nbody\r\n"),
        ):
            with self.subTest(what):
                job = raw_job(route, text)
                self.assertEqual(
                    self.sent(job),
                    {"mail": "kijitora@example.org", "rcpt": ["mikeneko@example.jp"], "raw": job.octets().decode()},
                )
        job = raw_job(route, b"Subject: \xff\n\nx\n", eight=True)
        self.assertEqual(base64.b64decode(self.sent(job)["raw"]["base64"]), job.octets())

    def test_a_message_for_several_recipients_goes_whole_and_once(self):
        with HttpPeer(as_haineko) as peer:
            job = raw_job(
                web_route("Haineko", peer.url),
                "From: a@b.example\nTo: x@y.example, z@y.example\n\nx\n",
                to=("x@y.example", "z@y.example"),
            )
            self.assertEqual([said.code for said in relayed(job)[0]], ["250", "250"])
            self.assertEqual([asked.json()["rcpt"] for asked in peer.asked], [["x@y.example", "z@y.example"]])

    def test_what_the_old_one_answers(self):
        """As recorded from it: HTTP 200 for failures too, and QUIT's reply for a relayed mail."""

        def item(rcpt, command, code, dsn, *message, **more) -> dict:
            error = int(str(code)[0] != "2")
            place = {"mailer": "ESMTP", "host": "127.0.0.1", "port": 2605, **more}
            return {
                "rcpt": rcpt,
                "command": command,
                "code": code,
                "dsn": dsn,
                "message": message,
                "error": error,
                **place,
            }

        nowhere = {"mailer": None, "host": None, "port": None}
        relayed_ = item("a@example.jp", "QUIT", "221", "2.0.0", "2.0.0 closing connection")
        unknown = item("b@rej.example.jp", "RCPT", "550", "5.1.1", "5.1.1 User unknown")
        policy = item("x@example.net", "RCPT", 553, "5.7.1", "Recipient address is not permitted", **nowhere)
        down = item("a@none.example.jp", "CONN", 421, None, "Cannot connect SMTP Server", mailer=None)
        auth = item("a@authbad.example.jp", "AUTH", "535", "5.7.8", "5.7.8 bad credentials")
        discard = item("a@discard.example.jp", "DATA", 200, None, "Discard", **{**nowhere, "mailer": "Discard"})
        malformed = item(None, "HTTP", 421, None, "Malformed JSON string", **nowhere)
        cases = (  # recipients, HTTP status, items, (code, dsn, command, first line) of each
            (["a@example.jp"], 200, [relayed_], [("221", "2.0.0", "DATA", "2.0.0 closing connection")]),
            (
                ["a@example.jp", "b@rej.example.jp"],
                200,
                [relayed_, unknown],
                [("221", "2.0.0", "DATA", "2.0.0 closing connection"), ("550", "5.1.1", "RCPT", "5.1.1 User unknown")],
            ),
            (
                ["a@example.jp", "x@example.net"],
                200,
                [policy, relayed_],
                [
                    ("221", "2.0.0", "DATA", "2.0.0 closing connection"),
                    ("553", "5.7.1", "RCPT", "Recipient address is not permitted"),
                ],
            ),
            (["a@none.example.jp"], 200, [down], [("421", None, "CONN", "Cannot connect SMTP Server")]),
            (["a@authbad.example.jp"], 200, [auth], [("535", "5.7.8", "AUTH", "5.7.8 bad credentials")]),
            (["a@discard.example.jp"], 200, [discard], [("200", None, "DATA", "Discard")]),
            (["x@example.net"], 400, [policy], [("553", "5.7.1", "RCPT", "Recipient address is not permitted")]),
            (["a@example.jp", "b@example.jp"], 400, [malformed], [("421", None, "HTTP", "Malformed JSON string")] * 2),
        )
        for to, status, items, wanted in cases:
            body = {"queueid": "6AN8", "response": items, "referer": None}
            with self.subTest(items), HttpPeer(lambda asked, said=(status, body): said) as peer:
                job = raw_job(web_route("Haineko", peer.url), "From: a@b.example\n\nx\n", to=to)
                (replies,) = relayed(job)
                self.assertEqual([(said.code, said.dsn, said.command, said.message[0]) for said in replies], wanted)
                self.assertEqual(
                    {(said.mailer, said.port, said.maybe_delivered) for said in replies},
                    {("Haineko", peer.port, False)},
                )

    def test_items_that_say_nothing(self):
        good = {
            "rcpt": "mikeneko@example.jp",
            "error": 0,
            "code": "250",
            "dsn": "2.0.0",
            "command": "DATA",
            "message": ["OK"],
        }
        for what, items in (
            ("none", []),
            ("no list", {}),
            ("no objects", [None]),
            ("of another recipient", [{**good, "rcpt": "other@example.jp"}]),
            ("a code that is none", [{**good, "code": "hello"}]),
            ("a code of nobody", [{**good, "code": 354}]),
            ("no code", [{**good, "code": None}]),
            ("accepted with an error", [{**good, "error": 1}]),
            ("refused without", [{**good, "code": "550"}]),
        ):
            with self.subTest(what), HttpPeer(lambda asked, items=items: (200, {"response": items})) as peer:
                said = first_reply(composed_job(web_route("Haineko", peer.url)))
                self.assertEqual((said.code, said.maybe_delivered), ("451", True))
                self.assertIn("not what the API promises", said.message[0])

    def test_odd_items(self):
        good = {
            "rcpt": "MIKENEKO@Example.JP",
            "error": 0,
            "code": 250,
            "dsn": "x",
            "command": "rm -rf",
            "message": "a\r\nb\x1b[0m",
        }
        for to, code in ((["mikeneko@example.jp"], "451"), (["MIKENEKO@example.jp"], "250")):  # local parts have case
            with HttpPeer(lambda asked: (200, {"response": [good]})) as peer:
                said = relayed(raw_job(web_route("Haineko", peer.url), "From: a@b.example\n\nx\n", to=to))[0][0]
                self.assertEqual(said.code, code)
        self.assertEqual((said.dsn, said.command, said.message), (None, "DATA", ("a??b?[0m",)))

    def test_a_far_end_that_does_not_know_whether_it_arrived(self):
        item = {"rcpt": None, "error": 1, "code": "451", "dsn": "4.5.0", "command": "DATA"}
        unsure = haineko.REPLIES["unsure"][-1]
        for message, more, posts in (
            ("No more words", {"maybe_delivered": True}, 1),
            ("The answer is not what the API promises", {"maybe_delivered": True}, 1),
            (unsure, {"maybe_delivered": True}, 1),
            (unsure, {}, 3),  # words are no promise
            (unsure, {"maybe_delivered": False}, 3),
            (unsure, {"maybe_delivered": "no"}, 3),
        ):
            said = 503, {"response": [{**item, "message": [message], **more}]}, (("Retry-After", "0"),)
            with self.subTest(message, more=more), HttpPeer(lambda asked, said=said: said) as peer:
                route = haineko.redacted(web_route("Haineko", peer.url, retry=2, sleep=0))
                self.assertEqual(self.relayed_by_another(route, peer), (503, [posts == 1]))
                self.assertEqual(len(peer.asked), posts)

    def two_in_a_loop(self, folder: str) -> list:
        """Two servers that relay to each other by HTTP with a login; the second saves mail for end.example there."""
        with contextlib.ExitStack() as stack:
            listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
            ports = [listener.getsockname()[1] for listener in listeners]
        users = json.loads("{" + run_program("pw", "-u", "cat", given="nyaa\n", text=True).stdout + "}")
        servers = []
        for i, name in enumerate(("one.example", "two.example")):
            route = {"mailer": "Haineko", "host": "127.0.0.1", "port": ports[1 - i], "auth": "other", "timeout": 10}
            servers.append(
                Server(
                    {
                        "httpd": {"listen": f"127.0.0.1:{ports[i]}"},
                        "smtpd": {"hostname": name},
                        "mailertable": {"default": route, **({"end.example": {"mailer": folder}} if i else {})},
                        "authinfo": {"other": {"username": "cat", "password": "nyaa"}},
                        "password": users,
                    }
                )
            )
            self.addCleanup(servers[-1].close)
        return servers

    def test_a_far_end_that_answers_something_else(self):
        for said, maybe in (((200, b"<html>"), True), ((503, b"<html>"), False)):
            with self.subTest(said), HttpPeer(lambda asked, said=said: said) as peer:
                self.assertEqual(
                    self.relayed_by_another(haineko.redacted(web_route("Haineko", peer.url)), peer), (503, [maybe])
                )

    def relayed_by_another(self, route: dict, peer: HttpPeer) -> tuple:
        """(HTTP status, whether each item is in doubt) of a Haineko that relays by the route."""
        force = settings(mailertable={"default": {"mailer": "Haineko", **{
            key: route[key] for key in ("base_url", "retry", "sleep")}}})  # fmt: skip
        near = haineko.parse_ip("127.0.0.1")
        request = haineko.Request("POST", "/submit", {}, as_body(document()), near, near, None, 1e9)
        answer = answered(request, haineko.App(force))
        items = json.loads(answer.body)["response"]
        self.assertTrue(all(item.get("maybe_delivered", True) is True for item in items))
        return answer.status, ["maybe_delivered" in item for item in items]

    def test_success_is_believed_only_with_an_http_status_of_success(self):
        good = {"rcpt": None, "error": 0, "code": "250", "dsn": "2.0.0", "command": "DATA", "message": ["OK"]}
        refused = {**good, "error": 1, "code": "550"}
        for status in (200, 202, 207, 201, 204, 302, 400, 401, 403, 413, 422, 429, 500, 502, 503):
            believed = status in (200, 202, 207)
            for item, code in ((good, "250"), ({**good, "code": 221}, "221"), (refused, "550")):
                body = b"" if status == 204 else {"response": [item]}
                with self.subTest(status, code=code), HttpPeer(lambda asked, said=(status, body): said) as peer:
                    said = first_reply(composed_job(web_route("Haineko", peer.url)))
                    if code == "550" and status != 204:
                        self.assertEqual(said.code, "550")
                    else:
                        self.assertEqual(said.code[0] == "2", believed)
                        self.assertEqual(said.maybe_delivered, not believed)

    def test_the_loop_of_two_real_ones_stops(self):
        with tempfile.TemporaryDirectory() as folder:
            one, two = self.two_in_a_loop(folder)
            credentials = "Authorization: Basic " + base64.b64encode(b"cat:nyaa").decode()
            document = web_submission(rcpt=["mikeneko@example.jp"])
            status, _, said = one.ask(post(document, credentials))
            self.assertEqual(status, 503)
            (item,) = said["response"]
            self.assertEqual((item["code"], item["dsn"], item["command"]), ("421", "5.4.6", "CONN"))
            self.assertEqual(item["message"], ["Detected message loop"])
            self.assertEqual((item["mailer"], item["port"]), ("Haineko", two.places[0][1]))
            document["rcpt"] = ["mikeneko@end.example"]  # which the second one prints
            status, _, said = one.ask(post(document, credentials))
            self.assertEqual(
                (status, said["response"][0]["code"], said["response"][0]["mailer"]), (200, "200", "Haineko")
            )
            (saved,) = os.listdir(folder)
            with open(os.path.join(folder, saved), "rb") as stream:
                message = email.message_from_binary_file(stream, policy=email.policy.default)
            self.assertEqual(message["Subject"], "謹賀新年")
            self.assertEqual(message.get_content().replace("\r\n", "\n"), "にゃあ\nNyaa\n")
            self.assertEqual(str(message["From"]), "キジトラ <kijitora@example.com>")
            self.assertEqual(message["X-Haineko-Loop"], "one.example, two.example")


TWO_TEXTS = """\
From: =?UTF-8?B?44Kt44K444OI44Op?= <kijitora@example.com>
To: =?UTF-8?Q?Mike_N=C3=A9ko?= <mikeneko@example.jp>, Tama <tama@example.jp>
Cc: shiro@example.jp
Reply-To: a@example.com, B <b@example.com>
Subject: =?ISO-2022-JP?B?GyRCNmAybD83Ry8bKEI=?=
Date: Thu, 23 Nov 2023 10:00:00 +0900
Message-Id: <mine@example.com>
In-Reply-To: <before@example.com>
X-Haineko-Loop: a.example, here.example
X-Long: one
 two
Received: from x by y
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary=m

--m
Content-Type: multipart/related; boundary=r

--r
Content-Type: multipart/alternative; boundary=a

--a
Content-Type: text/plain; charset=ISO-2022-JP

\x1b$B$K$c$"\x1b(B
--a
Content-Type: text/html; charset=UTF-8
Content-Transfer-Encoding: base64

PHA+44Gr44KD44GCPC9wPg==
--a--
--r
Content-Type: image/png
Content-Transfer-Encoding: base64
Content-ID: <logo@x>
Content-Disposition: inline; filename=logo.png

iVBORw==
--r--
--m
Content-Type: text/csv
Content-Disposition: attachment; filename*=UTF-8''%E7%8C%AB.csv

1,2
--m--
"""


class SendGridBody(unittest.TestCase):
    """The message in pieces."""

    TO = ("mikeneko@example.jp", "tama@example.jp", "shiro@example.jp", "kuro@example.jp")

    def body(self, octets, to=TO) -> dict:
        return json.loads(haineko.sendgrid_request(raw_job(web_route("SendGrid"), octets, to)).body)

    def test_plain_text(self):
        job = composed_job(
            web_route("SendGrid"),
            web_submission(header={"x-haineko-loop": ["far.example"], "charset": "ISO-2022-JP"}, body="①ｱ\nにゃあ\n"),
        )
        document = json.loads(haineko.sendgrid_request(job).body)
        date = email.message_from_bytes(job.octets())["Date"]
        self.assertEqual(
            document,
            {
                "personalizations": [{"to": [{"email": "mikeneko@example.jp"}]}],
                "from": {"email": "kijitora@example.com", "name": "キジトラ"},
                "reply_to": {"email": "straycats@cat-ml.example.org"},
                "subject": "謹賀新年",
                "headers": {
                    "Sender": "kijitora@example.org",
                    "Date": date,
                    "Message-Id": f"<{'Q' * 16}.1@here.example>",
                    "X-Haineko-Loop": "far.example, here.example",
                },
                "content": [{"type": "text/plain", "value": "①ア\nにゃあ\n"}],
            },
        )

    def test_parts_people_and_headers(self):
        document = self.body(TWO_TEXTS)
        (people,) = document["personalizations"]
        self.assertEqual(
            people["to"],
            [{"email": "mikeneko@example.jp", "name": "Mike Néko"}, {"email": "tama@example.jp", "name": "Tama"}],
        )
        self.assertEqual(
            (people["cc"], people["bcc"]), ([{"email": "shiro@example.jp"}], [{"email": "kuro@example.jp"}])
        )
        self.assertEqual(document["from"], {"email": "kijitora@example.com", "name": "キジトラ"})
        self.assertEqual(document["subject"], "謹賀新年")
        self.assertEqual(
            document["reply_to_list"], [{"email": "a@example.com"}, {"email": "b@example.com", "name": "B"}]
        )
        self.assertEqual(
            document["headers"],
            {
                "Date": "Thu, 23 Nov 2023 10:00:00 +0900",
                "Message-Id": "<mine@example.com>",
                "In-Reply-To": "<before@example.com>",
                "X-Haineko-Loop": "a.example, here.example",
                "X-Long": "one two",
            },
        )
        self.assertEqual(
            document["content"],
            [{"type": "text/plain", "value": "にゃあ"}, {"type": "text/html", "value": "<p>にゃあ</p>"}],
        )
        logo = {
            "content": "iVBORw==",
            "type": "image/png",
            "filename": "logo.png",
            "disposition": "inline",
            "content_id": "logo@x",
        }
        table = {
            "content": base64.b64encode(b"1,2").decode(),
            "type": "text/csv",
            "filename": "猫.csv",
            "disposition": "attachment",
        }
        self.assertEqual(document["attachments"], [logo, table])
        self.assertEqual(fits(document, SENDGRID_SCHEMA), [])

    def test_what_it_can_not_express_is_refused_in_words(self):
        kinds = ("related", "alternative") * 1500
        nest = [f"Content-Type: multipart/{kind}; boundary=b{i}\n\n--b{i}\n" for i, kind in enumerate(kinds)]
        text = "From: a@b.example\nTo: mikeneko@example.jp\nSubject: x\n"
        one = ("mikeneko@example.jp",)
        cases = (
            ("several authors", text.replace("From: ", "From: z@b.example, "), one, "From has several addresses"),
            ("no author", text.replace("From: a@b.example\n", ""), one, "From"),
            ("no subject", text.replace("Subject: x", "Subject:"), one, ""),
            (
                "another recipient is shown",
                text.replace("To: ", "To: x@y.example, "),
                one,
                "x@y.example, which gets this mail another way",
            ),
            (
                "no recipient is shown",
                text.replace("To: mikeneko@example.jp\n", ""),
                one,
                "",
            ),
            ("a signature", text + "DKIM-Signature: v=1\n", one, "dkim-signature can't be set"),
            ("a header twice", text + "X-A: 1\nx-a: 2\n", one, "x-a occurs more than once"),
            ("a header of octets", (text + "X-A: é\n").encode(), one, "x-a is not ASCII"),
            ("unknown charset", text + "Content-Type: text/plain; charset=klingon\n\nx\n", one, "klingon"),
            ("a deep nest", text + "".join(nest) + "Content-Type: text/plain\n\nx\n", one, "levels"),
            (
                "not in its charset",
                (text + "Content-Type: text/plain; charset=utf-8\n\n").encode() + b"\xff\n",
                one,
                "decode",
            ),
            (
                "no text",
                text + "Content-Type: image/png\nContent-Disposition: inline; filename=a\n\nx\n",
                one,
                "its texts are none",
            ),
            (
                "two texts",
                text + "Content-Type: multipart/mixed; boundary=m\n\n--m\n\na\n--m\n\nb\n--m--\n",
                one,
                "its texts are text/plain, text/plain",
            ),
            ("a calendar", text + "Content-Type: text/calendar\n\na\n", one, "its texts are text/calendar"),
            (
                "a report",
                text + "Content-Type: multipart/report; boundary=m\n\n--m\n\na\n--m--\n",
                one,
                "multipart/report can't be kept",
            ),
            (
                "signed",
                text + "Content-Type: multipart/signed; boundary=m\n\n--m\n\na\n--m--\n",
                one,
                "multipart/signed can't be kept",
            ),
            (
                "an attachment without a name",
                text
                + "Content-Type: multipart/mixed; boundary=m\n\n--m\n\na\n--m\nContent-Type: image/png\n\nb\n--m--\n",
                one,
                "",
            ),
            (
                "an empty attachment",
                text
                + "Content-Type: multipart/mixed; boundary=m\n\n--m\n\na\n--m\n"
                + "Content-Disposition: attachment; filename=a.txt\n\n--m--\n",
                one,
                "",
            ),
            ("an empty text", text + "\n", one, ""),
            (
                "a text file in a charset that can't be told",
                text
                + "Content-Type: multipart/mixed; boundary=m\n\n--m\n\na\n--m\n"
                + "Content-Type: text/csv; charset=Shift_JIS; name=a.csv\n\nb\n--m--\n",
                one,
                "charset shift_jis",
            ),
        )
        for what, written, to, words in cases:
            with self.subTest(what), HttpPeer(as_sendgrid) as peer:
                octets = written if isinstance(written, bytes) else written.encode()
                octets += b"" if b"\n\n" in octets else b"\nx\n"
                said = first_reply(raw_job(web_route("SendGrid", peer.url), octets, to))
                if not words:  # SendGrid says so
                    self.assertEqual((said.code, said.command, len(peer.asked)), ("550", "DATA", 1))
                    continue
                self.assertEqual(
                    (said.code, said.dsn, said.message[0]),
                    ("550", "5.6.3", "The API can't express this message"),
                )
                self.assertIn(words, said.message[1])
                self.assertEqual(peer.asked, [])

    def test_only_202_is_success(self):
        for status in (200, 201, 204):
            with self.subTest(status), HttpPeer(lambda asked, status=status: (status, {}, ())) as peer:
                self.assertEqual(first_reply(composed_job(web_route("SendGrid", peer.url))).code, "451")


class AmazonSignature(unittest.TestCase):
    def test_session_token(self):
        with HttpPeer(as_amazonses) as peer:
            route = replace(web_route("AmazonSES", peer.url), token="AQoDYXdzEJr//token=")
            self.assertEqual(first_reply(composed_job(route)).code, "250")
            self.assertEqual(peer.asked[0].headers["x-amz-security-token"], "AQoDYXdzEJr//token=")

    def test_a_path_before_the_api(self):
        def answer(asked):
            right = sigv4_is_right(asked, KEY, SECRET, "eu-west-1") and asked.path == "/front/v2/email/outbound-emails"
            return (200, {"MessageId": "1"}) if right else (403, {"message": "no"})

        with HttpPeer(answer) as peer:
            self.assertEqual(first_reply(composed_job(web_route("AmazonSES", peer.url + "/front"))).code, "250")

    def test_the_message_goes_as_it_is(self):
        with HttpPeer(as_amazonses) as peer:
            job = composed_job(web_route("AmazonSES", peer.url))
            relayed(job)
            document = peer.asked[0].json()
            self.assertEqual(base64.b64decode(document["Content"]["Raw"]["Data"]), job.octets())
            self.assertEqual(document["Destination"], {"ToAddresses": ["mikeneko@example.jp"]})
            self.assertEqual(document["FeedbackForwardingEmailAddress"], "kijitora@example.org")

    def test_octets_over_127_are_encoded(self):
        with HttpPeer(as_amazonses) as peer:
            octets = "From: a@b.example\nMIME-Version: 1.0\nContent-Type: text/plain; charset=utf-8\n"
            octets += "Content-Transfer-Encoding: 8bit\n\nにゃあ\n"
            said = first_reply(raw_job(web_route("AmazonSES", peer.url), octets.encode(), eight=True))
            self.assertEqual(said.code, "250")
            message = email.message_from_bytes(
                base64.b64decode(peer.asked[0].json()["Content"]["Raw"]["Data"]), policy=email.policy.default
            )
            self.assertEqual(message.get_content().strip(), "にゃあ")

    def test_fifty_recipients_at_a_time(self):
        def answer(asked):
            return as_amazonses(asked) if len(peer.asked) != 2 else "close"

        with HttpPeer(answer) as peer:
            to = [f"cat{i}@example.jp" for i in range(120)]
            (replies,) = relayed(raw_job(web_route("AmazonSES", peer.url), "From: a@b.example\n\nx\n", to))
            self.assertEqual([said.code for said in replies], ["250"] * 50 + ["451"] * 50 + ["250"] * 20)
            self.assertEqual([len(asked.json()["Destination"]["ToAddresses"]) for asked in peer.asked], [50, 50, 20])


class MandrillReplies(unittest.TestCase):
    def test_each_recipient_has_its_own(self):
        with HttpPeer(as_mandrill) as peer:
            to = ("hard@example.jp", "odd@example.jp", "later@example.jp", "tama@Example.JP")
            job = raw_job(web_route("Mandrill", peer.url), "From: a@b.example\n\nx\n", to)
            (replies,) = relayed(job)
            told = [(said.code, said.dsn, said.message[0]) for said in replies]
            self.assertEqual(told[:2], [("550", "5.7.1", "rejected"), ("550", "5.1.3", "invalid")])
            self.assertEqual([said.code for said in replies[2:]], ["250", "250"])
            self.assertIn("reject_reason: hard-bounce", replies[0].message)
            self.assertEqual(peer.asked[0].json()["raw_message"], job.octets().decode())
            self.assertEqual(peer.asked[0].json()["from_email"], "kijitora@example.org")

    def test_a_recipient_that_is_missing(self):
        with HttpPeer(lambda asked: (200, [{"email": "a@x.example", "status": "sent", "_id": "1"}, 5, {}])) as peer:
            job = raw_job(web_route("Mandrill", peer.url), "From: a@b.example\n\nx\n", ("a@x.example", "b@x.example"))
            (replies,) = relayed(job)
            self.assertEqual([(said.code, said.maybe_delivered) for said in replies], [("250", False), ("451", True)])


class WebProbes(unittest.TestCase):
    """Their probes."""

    def findings(self, route: haineko.Route) -> list:
        sessions = haineko.TransportContext()
        return haineko.run(and_closed(haineko.run_probe(route, "here.example", "", sessions), sessions))

    def test_good_credentials(self):
        for mailer, words in (
            ("Haineko", "a Haineko that takes our login"),
            ("SendGrid", "the API key may send"),
            ("AmazonSES", "to verified recipients only"),
            ("Mandrill", "the key is good"),
            ("MSGraph", "Insufficient privileges: the login is good; whether it may send is not known"),
            ("GmailAPI", "the token is good"),
        ):
            with self.subTest(mailer), HttpPeer(PEERS[mailer]) as peer:
                findings = self.findings(web_route(mailer, peer.url))
                token = ["TOKEN"] if mailer in ("MSGraph", "GmailAPI") else []
                self.assertEqual([item.step for item in findings], [*token, "AUTH"])
                self.assertTrue(all(item.ok and item.text.isprintable() for item in findings), findings)
                self.assertIn(words, findings[-1].text)
                self.assertFalse(any(b"rcpt" in asked.body or b"raw" in asked.body for asked in peer.asked))

    def test_wrong_credentials_and_other_servers(self):
        for mailer, answer in PEERS.items():
            for what, peer_answer in (
                ("wrong", answer),
                ("a page", lambda asked: (200, b"<html>")),
                ("other JSON", lambda asked: (200, {"scopes": ["alerts.read"], "SendingEnabled": False})),
                ("silence", lambda asked: "close"),
            ):
                with self.subTest(mailer, what=what), HttpPeer(peer_answer) as peer:
                    route = web_route(mailer, peer.url)
                    route = with_wrong_login(route) if what == "wrong" else route
                    findings = self.findings(route)
                    self.assertEqual([(item.step, item.ok) for item in findings][-1], ("AUTH", False))
                    self.assertNotIn("wrong", findings[-1].text)

    def test_a_key_that_may_only_send(self):
        said = {"message": "User is not authorized"}
        refusal = 403, said, (("x-amzn-ErrorType", "AccessDeniedException"),)
        with HttpPeer(lambda asked: refusal) as peer:
            self.assertTrue(self.findings(web_route("AmazonSES", peer.url))[-1].ok)

    def test_nobody_there(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for mailer in PEERS:
            with self.subTest(mailer):
                findings = self.findings(web_route(mailer, url))
                findings = [(item.step, item.ok) for item in findings if item.step != "TOKEN"]
                self.assertEqual(findings, [("CONN", False)])


# ======================================================================================================================
# 16. Queue
# ======================================================================================================================


def entry(queueid="Q" * 16, to=("a@example.jp",), lane="ESMTP x:25", born=None, **more):
    rows = tuple(haineko.NewRecipient(rcpt, rcpt, number, lane) for number, rcpt in enumerate(to, 1))
    message = haineko.Message((b"Subject: x\r\nTo: ", b"\r\nMessage-Id: <Q.", b"@x>\r\n\r\nNyaa\r\n"))
    return haineko.QueueItem(queueid, "mail", "s@example.org", "", born or time.time(), message, rows, **more)


class QueuePure(unittest.TestCase):
    """What follows from a reply, bounces, events: values in, values out."""

    policy = haineko.QueueSettings(path="x", lifetime=1000, retry_after=(10, 20, 40))

    def test_next_step(self):
        ok, later, never = (haineko.Reply(code, None, "DATA", ("x",)) for code in ("250", "451", "550"))
        wait = later._replace(retry_after=300)
        table = (
            ("accepted", ok, 1, 0, 0.5, "delivered", 0),
            ("accepted after its life", ok, 9, 2000, 0.5, "delivered", 0),
            ("refused for good", never, 1, 0, 0.5, "failed", 0),
            ("first pause", later, 1, 0, 0.5, "open", 10),
            ("a fifth less", later, 1, 0, 0.0, "open", 8),
            ("a fifth more", later, 1, 0, 1.0, "open", 12),
            ("second pause", later, 2, 0, 0.5, "open", 20),
            ("the last one repeats", later, 30, 0, 0.5, "open", 40),
            ("the other side knows better", wait, 1, 0, 0.5, "open", 300),
            ("the last one is at the end of its life", wait, 1, 900, 0.5, "open", 100),
            ("a second at least", later, 1, 999.9, 0.5, "open", 1),
            ("its life is over", later, 3, 1000, 0.5, "failed", 0),
            ("the clock was set forward after one attempt", later, 1, 9e6, 0.5, "open", 10),
            ("and after two", later, 2, 9e6, 0.5, "open", 20),
            ("a long pause even so ends", wait._replace(retry_after=9999), 2, 9e6, 0.5, "open", 1000),
            ("refused for good, however few attempts", never, 1, 9e6, 0.5, "failed", 0),
        )
        for what, said, attempts, age, dice, state, pause in table:
            with self.subTest(what):
                step = haineko.attempt_result(said, attempts, age, dice, self.policy)
                self.assertEqual((step.state, round(step.pause, 6)), (state, pause))

    def test_default_pauses(self):
        policy = haineko.QueueSettings()
        later = haineko.Reply("421", None, "CONN", ("x",))
        pauses = [haineko.attempt_result(later, n, 0, 0.5, policy).pause / 60 for n in range(1, 10)]
        self.assertEqual(pauses, [1, 5, 15, 30, 60, 120, 240, 240, 240])

    def parcel(self, attempts=3, recipient="A@example.jp", **more):
        message = haineko.Message(
            ("Subject: ねこ\r\nTo: ".encode(), b"\r\nMessage-Id: <Q.", b"@x>\r\n\r\nNyaa\r\n"), True
        )
        values = {"queueid": "Q" * 16, "kind": "mail", "sender": "s@example.org", "login": "", "created_at": 1e9}
        item = haineko.QueueItem(**{**values, "message": message, **more})
        return haineko.LeasedRecipient(1, item, haineko.NewRecipient(recipient, recipient, 1, "x"), attempts)

    def bounce(self, parcel, said):
        return haineko.new_bounce(parcel, said, settings(smtpd={"hostname": "mx.example.org"}), 1e9 + 7200).message

    def test_bounce(self):
        said = haineko.Reply(
            "550", "5.1.1", "RCPT", ("5.1.1 no such cat", "ねこ\r\nEvil: x"), "ESMTP", "mx.example.jp", 25
        )
        octets = self.bounce(self.parcel(), said).copy("", 1)
        self.assertNotRegex(octets, rb"(?<!\r)\n|\r(?!\n)|\nEvil")
        report = email.message_from_bytes(octets, policy=email.policy.default)
        self.assertEqual(report.get_content_type(), "multipart/report")
        self.assertEqual(report["content-type"].params["report-type"], "delivery-status")
        self.assertEqual((report["to"], report["auto-submitted"]), ("s@example.org", "auto-replied"))
        words, status, headers = report.iter_parts()
        self.assertIn("no such cat", words.get_content())
        whole, one = status.get_payload()
        self.assertEqual(whole["Reporting-MTA"], "dns; mx.example.org")
        self.assertEqual((one["Action"], one["Status"]), ("failed", "5.1.1"))
        self.assertEqual(one["Final-Recipient"], "rfc822; A@example.jp")
        self.assertEqual(one["Remote-MTA"], "dns; mx.example.jp")
        self.assertIn("550 5.1.1 no such cat", one["Diagnostic-Code"])
        self.assertEqual(headers.get_content_type(), "text/rfc822-headers")
        self.assertIn(b"Message-Id: <Q.1@x>", headers.get_payload(decode=True))
        self.assertNotIn(b"Nyaa", octets)

    def test_bounce_says_how_its_text_is_coded(self):
        said, plain = haineko.Reply("550", "5.1.1", "RCPT", ("no",)), b"Subject: x\r\nTo: All\r\n\r\nNyaa\r\n"
        for to, coding in (("tama@example.jp", "7bit"), ("たま@example.jp", "8bit")):
            with self.subTest(to):
                parcel = self.parcel(message=haineko.Message((plain,)), recipient=to)
                octets = self.bounce(parcel, said).copy("", 1)
                words, *_ = email.message_from_bytes(octets).get_payload()
                self.assertEqual(words["Content-Transfer-Encoding"], coding)
                self.assertIn(to, words.get_payload(decode=True).decode())

    def test_reports(self):
        settings = haineko.Settings(
            queue=haineko.QueueSettings(path="x", webhook="http://h/"),
            recipients=haineko.Recipients(domainpart=frozenset(("example.org",))),
        )
        said = haineko.Reply("451", "4.0.0", "DATA", ("x",))
        table = (
            ("delivered", self.parcel(), "delivered", ["message.delivered"]),
            ("first delay", self.parcel(attempts=1), "open", ["message.deferred"]),
            ("second delay", self.parcel(attempts=2), "open", []),
            ("failed", self.parcel(), "failed", ["message.failed", "bounce"]),
            ("a bounce failed", self.parcel(sender=""), "failed", []),
            ("an event failed", self.parcel(kind="event", sender=""), "failed", []),
            ("a sender that may not be written to", self.parcel(sender="a@example.net"), "failed", ["message.failed"]),
            ("its login", self.parcel(sender="a@example.net", login="tama"), "failed", ["message.failed", "bounce"]),
        )
        for what, parcel, state, wanted in table:
            with self.subTest(what):
                found = haineko.notifications(parcel, said, state, settings, 1e9)
                kinds = [json.loads(e.message.parts[0])["type"] if e.kind == "event" else "bounce" for e in found]
                self.assertEqual(kinds, wanted)

    def test_history_is_bounded(self):
        history, long = "[]", haineko.Reply("451", None, "DATA", ("x" * 5000,) * 100)
        for n in range(70):
            history = haineko.add_attempt(history, n, long)
        found = haineko.parse_history(history)
        self.assertEqual((len(found), found[0][0], found[-1][0]), (haineko.MAX_HISTORY, 0, 69))
        self.assertLess(len(history), haineko.MAX_HISTORY * haineko.MAX_REPLY_LINES * 600)

    def test_keys(self):
        table = (
            ("a word", "8e03978e", "8e03978e"),
            ("a string", '"8e03978e"', "8e03978e"),
            ("a string with a space", '"a b"', "a b"),
            ("empty", "", None),
            ("an empty string", '""', None),
            ("two headers", "a, b", None),
            ("an open string", '"a', None),
            ("too long", "x" * 256, None),
            ("not ASCII", "ねこ", None),
        )
        for what, value, wanted in table:
            with self.subTest(what):
                found = haineko.IDEMPOTENCY_KEY.fullmatch(value)
                self.assertEqual(found and (found[1] or found[2]), wanted)

    def test_settings(self):
        with tempfile.TemporaryDirectory() as folder:
            table = (
                ("fine", {"path": "q.db"}, None),
                ("no path", {}, "queue.path"),
                ("no folder", {"path": "nowhere/q.db"}, "queue.path"),
                ("misspelt", {"path": "q.db", "lifetme": 3}, "lifetime"),
                ("webhook without secret", {"path": "q.db", "webhook": "https://example.org/"}, "webhook_secret"),
                ("webhook that is none", {"path": "q.db", "webhook": "ftp://x"}, "queue.webhook"),
                ("webhook without host", {"path": "q.db", "webhook": "https://a..b/h"}, "queue.webhook"),
                ("webhook at no port", {"path": "q.db", "webhook": "https://x.example:99999/h"}, "queue.webhook"),
                ("short secret", {"path": "q.db", "webhook_secret": "whsec_AAAA"}, "webhook_secret"),
                ("no pauses", {"path": "q.db", "retry_after": []}, "retry_after"),
                ("all", {"path": "q.db", "webhook": "https://example.org/x", "webhook_secret": WHSEC}, None),
            )
            path = os.path.join(folder, "haineko.json")
            for what, section, wanted in table:
                with self.subTest(what):
                    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
                        json.dump({"queue": section}, stream)
                    settings, faults = haineko.load_settings(path)
                    self.assertEqual(bool(faults), wanted is not None, faults)
                    self.assertIn(wanted or "", " ".join(faults))
                    self.assertNotIn("MDEy", json.dumps(haineko.redacted(settings)))
            os.chmod(path, 0o644)
            self.assertIn("can be read by everybody", " ".join(haineko.load_settings(path)[1]))

    def test_bounces_return_few_fields(self):
        header = (
            b"Received: x\r\nFrom: f@x\r\nTo: t@x\r\nSubject: a\r\n b\r\nX-Spam: x\r\nDate: d\r\nMessage-Id: <1@x>\r\n"
        )
        table = (
            ("folded", header, b"From: f@x\r\nTo: t@x\r\nSubject: a\r\n b\r\nDate: d\r\nMessage-Id: <1@x>\r\n"),
            ("a field of the body", b"Date: d\r\n\r\nSubject: body\r\n", b"Date: d\r\n"),
            ("long", b"To: t\r\nSubject:%b\r\n" % (b" x" * 9999), b"To: t\r\n"),
            ("many", b"Subject: x\r\n" * 9999, b"Subject: x\r\n" * (haineko.MAX_RETURNED // 12)),
            ("none", b"", b""),
        )
        for what, octets, wanted in table:
            with self.subTest(what):
                said = haineko.Reply("550", "5.1.1", "RCPT", ("no",))
                bounce = self.bounce(self.parcel(message=haineko.Message((octets,))), said).copy("", 1)
                _, _, returned = email.message_from_bytes(bounce).get_payload()
                self.assertEqual(returned.get_payload(), wanted.decode())


class QueueStore(Quiet):
    """The file."""

    def setUp(self):
        super().setUp()
        self.folder = tempfile.mkdtemp(prefix="haineko.")
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.policy = haineko.QueueSettings(path=os.path.join(self.folder, "q.db"), min_free=0)
        self.store = self.open()

    def open(self):
        store = haineko.QueueDB(self.policy)
        store.timeout = 0.1
        self.addCleanup(store.close, True)
        return store

    def do(self, operation, *values):
        (result,) = self.store.commit([(operation, values)])
        if isinstance(result, Exception):
            raise result
        return result

    def test_only_the_owner_reads_it(self):
        self.do(haineko.enqueue, entry(), None)
        for name in os.listdir(self.folder):
            self.assertEqual(os.stat(os.path.join(self.folder, name)).st_mode & 0o077, 0, name)

    def test_durable_settings(self):
        self.do(haineko.queue_stats, 0)
        self.assertEqual(self.store.db.execute("PRAGMA journal_mode").fetchone()[0], "wal")
        self.assertEqual(self.store.db.execute("PRAGMA synchronous").fetchone()[0], 2)

    def test_take_by_lane(self):
        now = time.time()
        for n in range(6):
            self.do(haineko.enqueue, entry(f"slow{n}", lane="slow"), None)
        self.do(haineko.enqueue, entry("fast", lane="fast"), None)
        self.do(haineko.enqueue, entry("later", lane="fast", born=now + 100), None)
        table = (
            ("two of each lane at most", {}, {}, ["fast", "slow0", "slow1"]),
            ("less those under way", {"slow": 1, "fast": 2}, {}, ["slow2"]),
            ("none of a lane that sleeps", {}, {"slow": now + 50}, []),
        )
        for what, busy, asleep, wanted in table:
            with self.subTest(what):
                found = self.do(haineko.lease_due, time.time(), 2, busy, asleep, 0)
                self.assertEqual([parcel.item.queueid for parcel in found], wanted)
                self.assertTrue(all(parcel.item.message == entry().message for parcel in found))
        with self.subTest("what is wanted at once goes where its lane sleeps, too"):
            self.assertEqual(self.do(haineko.flush_queue, "slow3"), 1)
            found = self.do(haineko.lease_due, time.time(), 2, {}, {"slow": now + 50}, 0)
            self.assertEqual([parcel.item.queueid for parcel in found], ["slow3"])
        with self.subTest("and what is at the end of its life"):
            found = self.do(haineko.lease_due, time.time(), 2, {}, {"slow": now + 50}, time.time() + 1)
            self.assertEqual([parcel.item.queueid for parcel in found], ["slow4", "slow5"])

    def test_the_next_one_is_found_in_constant_time(self):
        for sql in (haineko.DUE_SQL, haineko.EXPIRED_SQL):
            self.do(haineko.queue_stats, 0)
            values = ("x", 0, 1, 1)[: sql.count("?")]
            plan = str([row[-1] for row in self.store.db.execute("EXPLAIN QUERY PLAN " + sql, values)])
            self.assertIn("USING", plan)
            self.assertNotIn("SCAN", plan)
            self.assertNotIn("TEMP", plan)

    def test_leases_of_the_dead(self):
        self.do(haineko.enqueue, entry(to=("a@example.jp", "b@example.jp")), None, True)
        self.assertEqual(self.do(haineko.lease_due, time.time(), 9, {}, {}, 0), [])
        code = (
            f"import haineko, time; s = haineko.QueueDB(haineko.QueueSettings(path={self.policy.path!r}, min_free=0));"
            "s.commit([(haineko.maintain, (s, time.time()))]);"
            "print(len(s.commit([(haineko.lease_due, (time.time() + 999, 9, {}, {}, 0))])[0]))"
        )

        def other():
            words = [sys.executable, "-c", code]
            return subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                cwd=HERE,
                env=environment(),
                timeout=20,
                check=False,
            )

        self.assertEqual(other().stdout, "0\n")  # we live
        self.store.close(for_good=True)
        found = other()
        self.assertEqual(found.stdout, "2\n")
        self.assertEqual(found.stderr.count("may arrive twice"), 2)

    def test_files_of_other_versions_are_refused(self):
        self.do(haineko.enqueue, entry(), None)
        for version in (1, 99):
            with self.subTest(version):
                with contextlib.closing(sqlite3.connect(self.policy.path)) as db:
                    db.execute(f"PRAGMA user_version={version}")
                self.store.close()
                with self.assertRaises(haineko.Rejected):
                    self.do(haineko.queue_stats, 0)
                self.assertIn(
                    f"is of version {version}, this Haineko's is 2: let the Haineko that wrote", self.store.fault
                )

    def test_what_cannot_be_read_is_held_and_stops_no_other(self):
        table = (("history", "{"), ("history", "[5]"), ("history", "[[1]]"), ("parts", "[]"), ("parts", "7"))
        for number, (column, value) in enumerate(table):
            with self.subTest(column, value=value):
                bad, good = f"bad{number}", f"good{number}"
                self.do(haineko.enqueue, entry(bad), None)
                self.do(haineko.enqueue, entry(good), None)
                ours = "message=" if column == "history" else "id="
                self.store.db.execute(
                    f"UPDATE {'recipients' if column == 'history' else 'messages'} SET {column}=?"
                    f" WHERE {ours}(SELECT id FROM messages WHERE queueid=?)",
                    (value, bad),
                )
                self.assertEqual([leased.item.queueid for leased in self.lease()], [good])
                self.assertEqual(self.states(bad), ["held"])
                self.assertEqual(self.do(haineko.drop_message, bad, 0), 1)

    def test_a_fault_accepts_nothing_and_heals(self):
        table = (("locked", self.lock), ("corrupt", self.spoil), ("taken away", self.take_away))
        for what, hurt in table:
            with self.subTest(what):
                self.do(haineko.queue_stats, 0)
                heal = hurt()
                if heal:
                    with self.assertRaises(haineko.Rejected) as caught:
                        self.do(haineko.enqueue, entry(what), None)
                    self.assertEqual((caught.exception.reply.status, caught.exception.reply.code), (503, "451"))
                    self.assertTrue(self.store.health_error())
                    heal()
                self.do(haineko.enqueue, entry(what), None)
                self.assertEqual(self.store.health_error(), "")
                with sqlite3.connect(self.policy.path) as db:  # it is in the file that has this name
                    self.assertEqual(
                        db.execute("SELECT count(*) FROM messages WHERE queueid=?", (what,)).fetchone(), (1,)
                    )
                db.close()

    def lock(self):
        other = sqlite3.connect(self.policy.path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        return other.close

    def spoil(self):
        self.store.close()
        with open(self.policy.path, "rb") as stream:
            octets = stream.read()
        with open(self.policy.path, "wb") as stream:
            stream.write(b"This is no queue" * 999)

        def heal():
            with open(self.policy.path, "wb") as stream:
                stream.write(octets)

        return heal

    def take_away(self):
        for name in os.listdir(self.folder):
            if not name.endswith(".lock"):
                os.unlink(os.path.join(self.folder, name))

    def test_read_only(self):
        self.do(haineko.queue_stats, 0)
        self.store.close(for_good=True)
        os.chmod(self.folder, 0o555)
        os.chmod(self.policy.path, 0o444)
        code = (
            "import os, sys, fcntl, sqlite3, traceback, haineko, test_haineko;"
            "os.getuid() or os.setuid(65534);"
            f"store = haineko.QueueDB(haineko.QueueSettings(path={self.policy.path!r}, min_free=0));"
            "(result,) = store.commit([(haineko.enqueue, (test_haineko.entry(), None))]);"
            "sys.exit(0 if isinstance(result, haineko.Rejected) else 1)"
        )
        found = subprocess.run(
            [sys.executable, "-c", code],
            cwd=HERE,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        self.assertEqual((found.returncode, found.stderr.count("nothing is accepted into it")), (0, 1), found.stderr)

    def test_a_bug_costs_its_own_work_only(self):
        def bug(db, slot):
            haineko.enqueue(db, slot, entry("bug"), None)
            raise KeyError("cat")

        results = self.store.commit(
            [(haineko.enqueue, (entry("one"), None)), (bug, ()), (haineko.enqueue, (entry("two"), None))]
        )
        self.assertEqual([results[0], type(results[1]), results[2]], [None, KeyError, None])
        rows = self.store.db.execute("SELECT queueid FROM messages ORDER BY id").fetchall()
        self.assertEqual([row["queueid"] for row in rows], ["one", "two"])

    def test_forgotten_after_a_day(self):
        said = haineko.Reply("250", None, "DATA", ("x",))
        self.do(haineko.enqueue, entry(key=b"k"), [haineko.AttemptResult(said, "delivered")])
        row = self.store.db.execute("SELECT length(octets), completed_at IS NULL FROM messages").fetchone()
        self.assertEqual(tuple(row), (0, 0))
        for hours, left in ((23, 1), (25, 0)):
            self.do(haineko.maintain, self.store, time.time() + hours * 3600)
            self.assertEqual(self.store.db.execute("SELECT count(*) FROM messages").fetchone()[0], left)
        self.assertEqual(self.store.db.execute("SELECT count(*) FROM recipients").fetchone()[0], 0)

    def lease(self, now=None, limit=9):
        return self.do(haineko.lease_due, now or time.time(), limit, {}, {}, 0)

    def states(self, queueid):
        return [row["state"] for row in self.do(haineko.message_status, queueid)["recipients"]]

    def interrupt(self, now):
        """What another process does when one has died."""
        self.do(haineko.release_leases, self.policy, now)

    def test_a_mail_that_kills_its_process_is_held(self):
        self.do(haineko.enqueue, entry("calm"), None)
        self.do(haineko.enqueue, entry("killer"), None)
        now, later = time.time(), haineko.Reply("451", None, "DATA", ("x",))
        for _ in range(3):
            now += 99999
            calm, killer = self.lease(now)
            self.assertEqual((calm.item.queueid, killer.item.queueid), ("calm", "killer"))
            result = haineko.AttemptResult(later, "open", -99)
            self.do(haineko.finish_attempt, calm.id, result, now)
            self.interrupt(now)
        self.do(haineko.drop_message, "calm", now)
        self.assertEqual((self.states("killer"), self.lease(now + 99999)), (["held"], []))
        stats = self.do(haineko.queue_stats, now)
        self.assertEqual((stats["held"], stats["sending"]), (1, 0))
        self.assertIn("held", [row["state"] for row in self.do(haineko.open_recipients_after, 0, 9)])
        with self.subTest("a retry of all leaves it alone"):
            self.do(haineko.flush_queue, None)
            self.assertEqual(self.states("killer"), ["held"])
        with self.subTest("its own retry does not"):
            self.assertEqual(self.do(haineko.flush_queue, "killer"), 1)
            self.assertEqual(self.states("killer"), ["waiting"])

    def test_an_attempt_that_ends_well_clears_the_count(self):
        self.do(haineko.enqueue, entry(), None)
        now, later = time.time(), haineko.Reply("451", None, "DATA", ("x",))
        for _ in range(4):
            for _ in range(2):
                now += 99999
                self.assertEqual(len(self.lease(now)), 1)
                self.interrupt(now)
            now += 99999
            (leased,) = self.lease(now)
            self.do(haineko.finish_attempt, leased.id, haineko.AttemptResult(later, "open"), now)
        self.assertEqual(self.states("Q" * 16), ["waiting"])

    def test_suspects_are_tried_one_at_a_time(self):
        """Mails that were in flight beside a killer are not in flight beside it a third time."""
        for name in ("one", "two", "three"):
            self.do(haineko.enqueue, entry(name), None)
        now = time.time()
        for count in (3, 3, 1):
            now += 99999
            self.assertEqual(len(self.lease(now)), count)
            self.assertEqual(self.lease(now), [])
            self.interrupt(now)
        self.assertEqual(self.do(haineko.queue_stats, now)["held"], 1)

    def test_a_bug_ends_no_lease_never(self):
        """What can't be recorded because of a bug is tried again, and held at the third time."""
        self.do(haineko.enqueue, entry(to=("a@example.jp", "b@example.jp")), None)
        self.store.close(for_good=True)
        queue = {"path": self.policy.path, "min_free": 0}
        service = haineko.App(settings(queue=queue, mailertable={"default": {"mailer": "Discard"}}))
        self.store, manager = service.queue, haineko.QueueManager(service, None)
        self.addCleanup(self.store.close, True)
        now = time.time()
        for states in (["waiting"] * 2, ["waiting"] * 2, ["waiting", "held"], ["held"] * 2):  # the third time alone
            now += 99999
            for leased in self.lease(now):
                haineko.run(manager._deliver(leased._replace(attempts=None)))
            self.assertEqual(sorted(self.states("Q" * 16), reverse=True), states)
            self.assertFalse(+manager.in_flight)

    def test_drop_is_refused_while_sending(self):
        self.do(haineko.enqueue, entry(to=("a@example.jp", "b@example.jp")), None)
        (leased,) = self.lease(limit=1)
        with self.assertRaises(haineko.Rejected) as caught:
            self.do(haineko.drop_message, "Q" * 16, 0)
        self.assertEqual(caught.exception.reply.status, 409)
        with self.assertRaisesRegex(haineko.CommandError, "being sent"):
            haineko.run_operation(self.store, haineko.drop_message, "Q" * 16, 0)
        self.assertEqual(self.states("Q" * 16), ["sending", "waiting"])
        self.do(haineko.finish_attempt, leased.id, haineko.AttemptResult(None, "delivered"), 0)
        self.assertEqual(self.do(haineko.drop_message, "Q" * 16, 0), 1)
        self.assertEqual(self.states("Q" * 16), ["delivered", "dropped"])
        self.assertEqual([self.do(haineko.drop_message, name, 0) for name in ("Q" * 16, "unknown")], [0, 0])
        row = self.store.db.execute("SELECT completed_at, length(octets) FROM messages").fetchone()
        self.assertEqual(tuple(row), (0, 0))

    def test_a_clock_that_was_set_back(self):
        now = time.time()
        past, days = now - 9e5, 9e5
        later = haineko.AttemptResult(haineko.Reply("451", None, "DATA", ("x",)), "open", 60)
        self.do(haineko.enqueue, entry("tried", lane="a"), [later])
        self.do(haineko.enqueue, entry("fresh", lane="b"), None)
        self.do(haineko.enqueue, entry("for later", lane="c"), None)
        self.store.db.execute("UPDATE recipients SET due=created_at+? WHERE destination='c'", (days,))
        self.assertEqual(self.lease(past), [])
        self.do(haineko.maintain, self.store, past, True)
        self.assertEqual([leased.item.queueid for leased in self.lease(past)], ["tried", "fresh"])

    def test_mail_for_later(self):
        """Its lifetime begins when it is due, and a clock that was set back does not send it at once."""
        now = time.time()
        for at, queueid in ((now + 99, "later"), (now - 99, "past")):
            self.do(haineko.enqueue, entry(queueid, born=now, send_at=at), None)
        self.assertEqual([(leased.item.queueid, leased.item.created_at) for leased in self.lease(now)], [("past", now)])
        self.do(haineko.maintain, self.store, now - 9e5, True)
        self.assertEqual(self.do(haineko.flush_queue, None), 0)
        self.assertEqual(self.lease(now + 98), [])
        ((queueid, created_at),) = [(leased.item.queueid, leased.item.created_at) for leased in self.lease(now + 100)]
        self.assertEqual((queueid, created_at), ("later", now + 99))

    def test_expired_mail_of_a_throttled_destination(self):
        """It is leased to be given up once it, or others to that destination, had three attempts."""
        later = haineko.AttemptResult(haineko.Reply("421", None, "CONN", ("x",)), "open", 999)
        self.do(haineko.enqueue, entry(), [later])
        now = time.time()
        for failures, count in ((1, 0), (2, 1)):
            with self.subTest(failures=failures):
                found = self.do(haineko.lease_due, now, 9, {}, {"ESMTP x:25": failures}, now + 9)
                self.assertEqual(len(found), count)

    def test_files_that_are_moved_away(self):
        elsewhere = tempfile.mkdtemp(dir=self.folder)
        table = (("",), ("-wal",), ("-shm",), (".lock",), ("-wal", "-shm"), ("", "-wal", "-shm", ".lock"))
        for number, suffixes in enumerate(table):
            with self.subTest(suffixes):
                before, after = entry(f"before{number}"), entry(f"after{number}")
                self.do(haineko.enqueue, before, None)
                for suffix in suffixes:
                    os.rename(self.policy.path + suffix, os.path.join(elsewhere, f"{number}{suffix}"))
                self.do(haineko.enqueue, after, None)
                self.assertEqual(self.store.health_error(), "")
                self.store.close()
                moved = os.path.join(elsewhere, str(number))
                for path, item in ((moved if "" in suffixes else self.policy.path, before), (self.policy.path, after)):
                    with contextlib.closing(sqlite3.connect(path)) as db:
                        count = db.execute("SELECT count(*) FROM messages WHERE queueid=?", (item.queueid,)).fetchone()
                    self.assertEqual(count, (1,), path)

    def test_leases_outlive_the_lock_file(self):
        self.do(haineko.enqueue, entry(), None, True)
        os.unlink(self.policy.path + ".lock")
        self.do(haineko.queue_stats, 0)
        code = (
            f"import haineko, time; s = haineko.QueueDB(haineko.QueueSettings(path={self.policy.path!r}, min_free=0));"
            "s.commit([]); s.commit([(haineko.maintain, (s, time.time()))]);"
            "print(len(s.commit([(haineko.lease_due, (time.time() + 999, 9, {}, {}, 0))])[0]))"
        )
        words = [sys.executable, "-c", code]
        found = subprocess.run(words, capture_output=True, text=True, cwd=HERE, timeout=20, check=False)
        self.assertEqual(found.stdout, "0\n", found.stderr)

    def test_files_of_others_are_refused(self):
        self.do(haineko.queue_stats, 0)
        self.store.close(for_good=True)
        target = os.path.join(self.folder, "target")
        with open(target, "w") as stream:
            stream.write("of somebody else")
        for suffix in ("", "-wal", "-shm", ".lock"):
            for what, make in (("link", lambda path: os.symlink(target, path)), ("FIFO", os.mkfifo)):
                with self.subTest(suffix, what=what):
                    self.policy = haineko.QueueSettings(path=os.path.join(self.folder, f"{what}{suffix}"), min_free=0)
                    make(self.policy.path + suffix)
                    self.store = self.open()
                    with self.assertRaises(haineko.Rejected):
                        self.do(haineko.enqueue, entry(), None)
                    with open(target) as stream:
                        self.assertEqual(stream.read(), "of somebody else")

    def test_files_that_others_could_read(self):
        self.do(haineko.enqueue, entry(), None)
        keep = sqlite3.connect(self.policy.path)  # so that -wal and -shm stay
        self.addCleanup(keep.close)
        keep.execute("SELECT count(*) FROM messages").fetchone()
        self.store.close(for_good=True)
        names = [name for name in os.listdir(self.folder) if name.startswith("q.db")]
        self.assertEqual(len(names), 4)
        for name in names:
            os.chmod(os.path.join(self.folder, name), 0o644)
        self.do(haineko.queue_stats, 0)
        for name in names:
            self.assertEqual(os.stat(os.path.join(self.folder, name)).st_mode & 0o777, 0o600, name)

    def test_a_bug_of_a_request_ends_its_lease(self):
        """The answer can't be written: the mail with a key, which was sent, is not leased for ever."""
        with tempfile.TemporaryDirectory() as folder:
            service = haineko.App(settings(queue={"path": os.path.join(folder, "q.db"), "min_free": 0}))
            self.addCleanup(service.queue.close, True)
            asked = request(as_body(document()), user_agent="\ud800", idempotency_key="k")
            with self.assertRaises(UnicodeError):
                answered(asked, service)
            row = service.queue.db.execute("SELECT due, owner, history FROM recipients").fetchone()
            self.assertEqual((row["due"] > NOW, row["owner"]), (True, None))
            self.assertIn("may have arrived", row["history"])
            service.queue.close(for_good=True)

    @unittest.skipIf(os.geteuid(), "takes root")
    def test_files_of_another_user(self):
        path = os.path.join(self.folder, "other")
        with open(path, "w"):
            os.chmod(self.folder, 0o777)
        os.chown(path, 12345, -1)
        os.seteuid(65534)
        try:
            with self.assertRaisesRegex(OSError, "is not a regular file of this user"):
                haineko.open_private(path, os.O_RDONLY)
        finally:
            os.seteuid(0)


class QueueServed(unittest.TestCase):
    """A real server, a peer that fails, a webhook."""

    @classmethod
    def setUpClass(cls):
        cls.gate = threading.Event()
        cls.peer = queue_peer(
            lambda to, count: cls.gate if to.startswith("slow") and count == 1 else by_name(to, count)
        )
        cls.hook = webhook()
        cls.server = Server(
            queue_settings(cls.peer, webhook=cls.hook.url + "/hook?cat=1", webhook_secret=WHSEC, lifetime=7)
        )
        for _ in range(3):  # their life ends while the other tests run
            cls.server.submit("y@dead.example", sender="patient@example.org")

    @classmethod
    def tearDownClass(cls):
        cls.gate.set()
        cls.server.kill()
        cls.server.close()
        cls.peer.close()
        cls.hook.__exit__()

    def events(self, queueid):
        found = [asked.json() for asked in self.hook.asked[1:]]
        return [item["type"] for item in found if item["data"]["queueid"] == queueid]

    def test_deferred_then_delivered(self):
        status, fields, answer = self.server.submit("later2@example.jp")
        queueid, item = answer["queueid"], answer["response"][0]
        self.assertEqual((status, fields["Location"]), (202, f"/queue/{queueid}"))
        self.assertEqual(set(item), {"rcpt", "error", "code", "dsn", "command", "message", "mailer", "host", "port"})
        self.assertEqual((item["error"], item["code"], item["dsn"]), (0, "250", "2.0.0"))
        self.assertEqual((item["command"], item["mailer"]), ("QUEUE", "Queue"))
        self.assertEqual(item["message"], [f"Queued as {queueid}", "4.2.0 not now, 1"])
        waiting = self.server.fate(queueid)["later2@example.jp"]
        self.assertEqual((waiting["state"], len(waiting["attempts"])), ("waiting", 1))
        self.assertGreaterEqual(int(waiting["next"]["unixtime"]), int(answer["timestamp"]["unixtime"]))
        eventually(lambda: self.server.fate(queueid)["later2@example.jp"]["state"] == "delivered")
        done = self.server.fate(queueid)["later2@example.jp"]
        self.assertEqual([item["code"] for item in done["attempts"]], ["451", "451", "250"])
        self.assertEqual((done["command"], done["next"]), ("DATA", None))
        (mail,) = self.peer.to("later2@example.jp")
        self.assertEqual((mail.sender, b"Nyaa" in mail.text), ("kijitora@example.org", True))
        eventually(lambda: self.events(queueid) == ["message.deferred", "message.delivered"], what="events")

    def test_sent_later(self):
        now = int(time.time())
        status, fields, answer = self.server.submit("at@example.jp", send_at=now + 3)
        queueid, (item,) = answer["queueid"], answer["response"]
        self.assertEqual((status, fields["Location"], item["command"]), (202, f"/queue/{queueid}", "QUEUE"))
        self.assertEqual(self.server.fate(queueid)["at@example.jp"]["next"]["unixtime"], str(now + 3))
        far = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now + 86400))
        cancelled = self.server.submit("never2@example.jp", send_at=far)[2]["queueid"]
        self.assertIn(
            f"{cancelled}: client=127.0.0.1 from=<kijitora@example.org> (queued, to be delivered at 2",
            self.server.log(),
        )
        self.assertEqual(self.server.queue("flush").returncode, 0)  # which is for what was tried
        self.assertEqual(self.server.fate(cancelled)["never2@example.jp"]["state"], "waiting")
        status, found = self.server.ask(get(f"/queue/{cancelled}", method="DELETE"))[::2]
        self.assertEqual((status, found["cancelled"], found["response"][0]["state"]), (200, 1, "dropped"))
        past = self.server.submit("past@example.jp", send_at="2001-02-03T04:05:06.7+09:00")
        self.assertEqual(past[0], 202)
        eventually(lambda: self.peer.to("past@example.jp"))
        eventually(lambda: self.peer.to("at@example.jp"))
        self.assertGreaterEqual(time.time(), now + 3)
        sent = email.message_from_bytes(self.peer.to("at@example.jp")[0].text)
        self.assertEqual(email.utils.parsedate_to_datetime(sent["Date"]).timestamp(), now + 3)
        status, _, answer = self.server.submit("at@example.jp", send_at=now + 31 * 86400)
        self.assertEqual((status, answer["response"][0]["message"][0]), (400, "Invalid submission"))
        self.assertIn("send_at: ", answer["response"][0]["message"][1])

    def test_cancelled_and_retried_by_http(self):
        queueid = self.server.submit("later9@example.jp")[2]["queueid"]
        drop = lambda: self.server.ask(get(f"/queue/{queueid}", method="DELETE"))[::2]  # noqa: E731
        status, found = self.server.ask(get(f"/queue/{queueid}/retry", "Content-Length: 0", method="POST"))[::2]
        self.assertEqual((status, found["retried"]), (200, 1))
        for count in (1, 0):
            status, found = drop()
            if status == 409:  # it is being tried
                eventually(lambda: self.server.fate(queueid)["later9@example.jp"]["state"] == "waiting")
                status, found = drop()
            self.assertEqual((found["queueid"], found["cancelled"]), (queueid, count))
            self.assertEqual(found["response"][0]["state"], "dropped")
        self.assertRegex(self.server.log(), f"{queueid}: client=127.0.0.1 .*1 recipients cancelled")
        cases = (
            ("DELETE", "/queue/nosuchmail", (), 404),
            ("POST", "/queue/nosuchmail/retry", ("Content-Length: 0",), 404),
            ("DELETE", f"/queue/{queueid}", ("X-Forwarded-For: 127.0.0.1",), 403),
            ("DELETE", f"/queue/{queueid}", ("Origin: https://evil.example",), 403),
            ("POST", f"/queue/{queueid}/retry", ("Content-Length: 0", "Origin: https://evil.example"), 403),
            ("DELETE", "/queue", (), 405),
            ("DELETE", f"/queue/{queueid}/retry", (), 405),
            ("GET", f"/queue/{queueid}/x", (), 404),
        )
        for method, path, headers, wanted in cases:
            with self.subTest(method, path=path, headers=headers):
                self.assertEqual(self.server.ask(get(path, *headers, method=method))[0], wanted)

    def test_what_is_being_sent_is_not_cancelled(self):
        gate = threading.Event()
        peer = queue_peer(lambda to, count: gate)
        self.addCleanup(peer.close)
        server = Server(queue_settings(peer))
        self.addCleanup(server.close)
        self.addCleanup(gate.set)
        queueid = server.submit("a@example.jp", **{"async": True})[2]["queueid"]
        eventually(lambda: server.fate(queueid)["a@example.jp"]["state"] == "sending")
        self.assertEqual(server.ask(get(f"/queue/{queueid}", method="DELETE"))[0], 409)

    def test_statuses(self):
        table = (
            ("all now", ("a@example.jp", "b@example.jp"), 200, ["DATA", "DATA"]),
            ("one later", ("c@example.jp", "later1a@example.jp"), 202, ["DATA", "QUEUE"]),
            ("one later, one never", ("later1b@example.jp", "never@example.jp"), 207, ["QUEUE", "RCPT"]),
            ("never", ("never@example.jp",), 502, ["RCPT"]),
            ("no connection", ("x@dead.example",), 202, ["QUEUE"]),
        )
        for what, recipients, status, commands in table:
            with self.subTest(what):
                found = self.server.submit(*recipients, sender="nobody@example.net")
                self.assertEqual((found[0], [item["command"] for item in found[2]["response"]]), (status, commands))

    def test_later(self):
        table = (
            ("Prefer", {"headers": {"Prefer": "wait=9, Respond-Async"}}, True),
            ("async", {"async": True}, False),
        )
        for what, more, preference in table:
            with self.subTest(what):
                to = f"{what.lower()}@example.jp"
                began = time.monotonic()
                status, fields, answer = self.server.submit(to, **more)
                self.assertEqual((status, fields["Location"]), (202, "/queue/" + answer["queueid"]))
                self.assertEqual(fields.get("Preference-Applied"), "respond-async" if preference else None)
                self.assertEqual(answer["response"][0]["message"], ["Queued as " + answer["queueid"]])
                eventually(lambda to=to: self.peer.to(to))
                self.assertLess(time.monotonic() - began, 0.9)  # it was rung for, not found by chance

    def test_bounces(self):
        sender = "sender@example.org"
        _, _, answer = self.server.submit("never@example.jp", sender=sender, **{"async": True})
        eventually(lambda: self.peer.to(sender), what="bounce")
        (mail,) = self.peer.to(sender)
        report = email.message_from_bytes(mail.text, policy=email.policy.default)
        one = list(report.iter_parts())[1].get_payload()[1]
        self.assertEqual(
            (mail.sender, one["Final-Recipient"], one["Status"]), ("", "rfc822; never@example.jp", "5.1.1")
        )
        self.assertEqual(self.server.fate(answer["queueid"])["never@example.jp"]["state"], "failed")
        eventually(lambda: self.events(answer["queueid"]) == ["message.failed"], what="event")
        with self.subTest("none for a bounce that bounces"):
            self.server.submit("never@example.jp", sender="never2@example.jp", **{"async": True})
            eventually(
                lambda: re.search("from=<> to=<never2@example.jp>.* status=bounced", self.server.log()), what="its end"
            )
            self.assertNotIn("to=<>", self.server.log())

    def test_zz_end_of_life(self):
        """Those that wait for a dead host are given up when their life ends, with the host's last words."""
        sender = "patient@example.org"
        eventually(lambda: len(self.peer.to(sender)) == 3, "bounces", 15)
        self.assertIn(b"421 Connection refused", self.peer.to(sender)[0].text)

    def test_webhook_is_signed(self):
        self.server.submit("hooked@example.jp", **{"async": True})
        eventually(lambda: len(self.hook.asked) >= 2, what="event")
        for asked in list(self.hook.asked):
            head, body = asked.headers, asked.body
            signed = f"{head['webhook-id']}.{head['webhook-timestamp']}.".encode() + body
            wanted = base64.b64encode(hmac.new(HOOK_SECRET, signed, hashlib.sha256).digest()).decode()
            self.assertIn("v1," + wanted, head["webhook-signature"].split(" "))
            self.assertLess(abs(time.time() - int(head["webhook-timestamp"])), 60)
            document = json.loads(body)
            self.assertEqual(set(document), {"type", "timestamp", "data"})
        with self.subTest("the one that failed is tried again under the same id"):
            first = self.hook.asked[0].headers["webhook-id"]
            again = lambda: first in [asked.headers["webhook-id"] for asked in self.hook.asked[1:]]  # noqa: E731
            eventually(again, "the second try")

    def test_idempotency(self):
        post, key = self.server.submit, {"Idempotency-Key": '"first"'}
        first = post("later1k@example.jp", headers=key)
        table = (
            ("same key, same body", "later1k@example.jp", key, 202, True),
            ("without quotes", "later1k@example.jp", {"Idempotency-Key": "first"}, 202, True),
            ("other body", "other@example.jp", key, 422, False),
            ("other key", "other@example.jp", {"Idempotency-Key": "second"}, 200, False),
            ("malformed", "other@example.jp", {"Idempotency-Key": "a b"}, 400, False),
            ("later", "later@example.jp", {"Idempotency-Key": "third", "Prefer": "respond-async"}, 202, False),
            ("later again", "later@example.jp", {"Idempotency-Key": "third", "Prefer": "respond-async"}, 202, True),
            ("refused for good", "never@example.jp", {"Idempotency-Key": "fourth"}, 502, False),
            ("refused for good again", "never@example.jp", {"Idempotency-Key": "fourth"}, 502, True),
        )
        for what, to, headers, status, replayed in table:
            with self.subTest(what):
                found = post(to, headers=headers)
                self.assertEqual(
                    (found[0], found[1].get("Idempotency-Replayed")), (status, "true" if replayed else None)
                )
                if headers.get("Idempotency-Key", "").strip('"') == "first" and replayed:
                    self.assertEqual((found[2], found[1]["Location"]), (first[2], first[1]["Location"]))
        eventually(lambda: self.peer.to("later1k@example.jp") and self.peer.to("later@example.jp"))
        eventually(lambda: self.server.fate(first[2]["queueid"])["later1k@example.jp"]["state"] == "delivered")
        with self.subTest("after it was delivered, too"):
            self.assertEqual(post("later1k@example.jp", headers=key)[2], first[2])
            self.assertEqual(len(self.peer.to("later1k@example.jp")), 1)
            self.assertEqual(len(self.peer.to("later@example.jp")), 1)

    def test_who_may_look(self):
        _, _, answer = self.server.submit("a@example.jp", **{"async": True})
        table = (
            ("unknown", "GET", "/queue/nothing", 404),
            ("no name", "GET", "/queue/", 404),
            ("too deep", "GET", f"/queue/{answer['queueid']}/x", 404),
            ("wrong method", "POST", f"/queue/{answer['queueid']}", 405),
            ("head", "HEAD", f"/queue/{answer['queueid']}", 200),
            ("all", "GET", "/queue", 200),
        )
        for what, method, path, status in table:
            with self.subTest(what):
                self.assertEqual(
                    self.server.ask(get(path, *["Content-Length: 0"] * (method == "POST"), method=method), method)[0],
                    status,
                )

    def test_dead_lane_delays_nobody(self):
        for _ in range(30):
            self.server.submit("z@dead.example", sender="none@example.org", **{"async": True})
        began = time.monotonic()
        self.server.submit("lively@example.jp", **{"async": True})
        eventually(lambda: self.peer.to("lively@example.jp"))
        self.assertLess(time.monotonic() - began, 1.0)


class QueueAlone(unittest.TestCase):
    """Servers of their own: crashes, faults, logins, commands."""

    def served(self, force, before=None):
        return served(self, force, before=before)

    def peer(self, script=None):
        peer = queue_peer(script)
        self.addCleanup(peer.close)
        return peer

    def test_without_the_section(self):
        peer = self.peer()
        server = self.served({**queue_settings(peer), "queue": None})
        table = (
            ("temporary", "later1@example.jp", {}, 503),
            ("key", "a@example.jp", {"headers": {"Idempotency-Key": "x"}}, 400),
            ("async", "a@example.jp", {"async": True}, 400),
            ("Prefer may be ignored", "a@example.jp", {"headers": {"Prefer": "respond-async"}}, 200),
        )
        for what, to, more, status in table:
            with self.subTest(what):
                found = server.submit(to, **more)
                self.assertEqual(found[0], status)
                if status == 400:
                    self.assertIn('"queue": {"path": "haineko.db"}', found[2]["response"][0]["message"][0])
        self.assertEqual((server.get("/queue")[0], server.get("/queue/" + "x" * 16)[0]), (404, 404))
        self.assertEqual(len(server.workers()), 1)
        self.assertEqual(server.queue("list").returncode, 2)

    def test_logins(self):
        peer = self.peer()
        hashes = {"tama": "{SSHA}9p2euyteR33mp0TYKjmYhTlIt1ctxuRn", "mike": "{SSHA}9p2euyteR33mp0TYKjmYhTlIt1ctxuRn"}
        server = self.served({**queue_settings(peer), "password": hashes, "httpd": {"trusted_proxies": ["127.0.0.1"]}})
        tama, mike = (
            {"Authorization": "Basic " + base64.b64encode(f"{user}:kijitora".encode()).decode()} for user in hashes
        )
        queueid = server.submit("later9@example.jp", headers={**tama, "Idempotency-Key": "k"})[2]["queueid"]
        far = {"X-Forwarded-For": "192.0.2.1"}
        table = (
            ("who sent it", {**tama, **far}, f"/queue/{queueid}", 200),
            ("another", {**mike, **far}, f"/queue/{queueid}", 403),
            ("nobody", far, f"/queue/{queueid}", 401),
            ("this machine", {}, f"/queue/{queueid}", 200),
            ("counts from afar", {**tama, **far}, "/queue", 403),
            ("counts from here", {}, "/queue", 200),
        )
        for what, headers, path, status in table:
            with self.subTest(what):
                self.assertEqual(server.get(path, *(f"{name}: {value}" for name, value in headers.items()))[0], status)
        with self.subTest("keys of two logins are two keys"):
            self.assertEqual(server.submit("b@example.jp", headers={**mike, "Idempotency-Key": "k"})[0], 200)

    def test_crash_in_between(self):
        """A worker dies while the peer has the mail of a request with a key: 409 before, then the queue finishes it."""
        gate = threading.Event()
        self.addCleanup(gate.set)
        peer = self.peer(lambda to, count: gate if count == 1 else "250 2.0.0 Ok")
        slow = {"default": {"port": peer.port, "timeout": 60}}
        server = self.served({**queue_settings(peer), "mailertable": slow, "httpd": {"workers": 2, "timeout": 60}})
        key = {"Idempotency-Key": "k"}
        caught = []

        def first():
            try:
                server.submit("cut@example.jp", headers=key)
            except (OSError, EOFError) as fault:
                caught.append(fault)

        thread = threading.Thread(target=first)
        thread.start()
        eventually(lambda: peer.tries)
        status, fields, _ = server.submit("cut@example.jp", headers=key)
        self.assertEqual((status, "Retry-After" in fields), (409, True))
        for pid in server.workers():
            os.kill(pid, signal.SIGKILL)
        thread.join()
        self.assertTrue(caught)

        def again():
            try:
                found = server.submit("cut@example.jp", headers=key)
            except (OSError, EOFError):
                return None
            return found if found[0] != 409 else None

        status, fields, answer = eventually(again)
        self.assertEqual((status, fields["Idempotency-Replayed"]), (202, "true"))
        self.assertEqual(answer["response"][0]["command"], "QUEUE")
        eventually(lambda: peer.to("cut@example.jp"))
        eventually(server.idle)
        self.assertEqual(len(peer.to("cut@example.jp")), 1)
        self.assertEqual(server.submit("cut@example.jp", headers=key)[2], answer)
        self.assertIn("may arrive twice", server.log())

    def test_full_disk(self):
        """The file can't grow: what was answered 202 is in it, all else was 503, and nothing that waits is lost."""
        limit = 400_000
        peer = self.peer()
        server = self.served(
            queue_settings(peer, retry_after=[600]),
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
        )
        taken, statuses = [], set()
        for n in range(12):
            status, _, answer = server.submit(f"x{n}@dead.example", body="x" * 70_000)
            statuses.add(status)
            taken += [answer["queueid"]] if status == 202 else []
        self.assertEqual(statuses, {202, 503})
        self.assertEqual(server.submit("x@dead.example", body="x" * 70_000, **{"async": True})[0], 503)
        self.assertEqual(server.get("/health")[0], 503)
        self.assertIn("nothing is accepted into it", server.log())
        self.assertEqual(server.submit("direct@example.jp", body="fits")[0], 200)
        server.kill()
        with sqlite3.connect(os.path.join(server.folder, "haineko.db")) as db:
            found = [row[0] for row in db.execute("SELECT queueid FROM messages ORDER BY id")]
        db.close()
        self.assertEqual(found, taken)

    def test_little_room(self):
        peer = self.peer()
        server = self.served(queue_settings(peer, min_free=1 << 50))
        self.assertEqual(server.get("/health")[0], 503)
        self.assertEqual(server.submit("later1@example.jp")[0], 503)
        self.assertEqual(server.submit("a@example.jp", **{"async": True})[0], 503)
        self.assertEqual(server.submit("b@example.jp")[0], 200)

    def test_commands(self):
        peer = self.peer()
        server = self.served(queue_settings(peer, retry_after=[600]))
        one, two, three = (server.submit(f"later1{name}@example.jp")[2]["queueid"] for name in "abc")
        table = (
            ("list", ("list",), 0, one),
            ("bare", (), 0, three),
            ("as a table", ("list",), 0, "\n3 recipients\n"),
            ("show", ("show", one), 0, "to <later1a@example.jp>: waiting, next attempt "),
            ("for programs", ("--json", "show", one), 0, '"state": "waiting"'),
            ("show nothing", ("show", "nothing"), 1, ""),
            ("show what", ("show",), 2, ""),
            ("drop", ("drop", two), 0, "1 recipient dropped"),
            ("drop again", ("drop", two), 1, "0 recipients dropped"),
            ("retry", ("retry", one), 0, "1 recipient to be tried at once"),
            ("flush", ("flush",), 0, "to be tried at once"),
            ("unknown", ("pet",), 2, ""),
        )
        rows = json.loads(server.queue("--json").stdout)
        self.assertEqual([row["queueid"] for row in rows], [one, two, three])
        self.assertEqual((rows[0]["state"], rows[0]["response"]["code"][0], rows[0]["attempts"]), ("waiting", "4", 1))
        for what, words, code, wanted in table:
            with self.subTest(what):
                found = server.queue(*words)
                self.assertEqual(found.returncode, code, found.stderr)
                self.assertIn(wanted, found.stdout)
        eventually(server.idle)
        self.assertEqual(
            sorted(mail.recipients[0] for mail in peer.taken), ["later1a@example.jp", "later1c@example.jp"]
        )
        self.assertEqual(json.loads(server.queue("list", "--json").stdout), [])
        server.kill()
        self.assertEqual(server.queue("retry", "--all").stdout, "0 recipients to be tried at once\n")
        self.assertIn(": dropped\n", server.queue("show", two).stdout)

    def test_readme(self):
        """What it says of the queue is so."""
        text = README
        commands = re.findall(r"(?ms)^```sh queue\n(.*?)^```$", text)
        (shown,) = re.findall(r"(?ms)^```json event\n(.*?)^```$", text)
        peer, hook = self.peer(), webhook()
        self.addCleanup(hook.__exit__)
        server = self.served(queue_settings(peer, webhook=hook.url + "/hook?cat=1", webhook_secret=WHSEC))
        document = {"mail": "a@example.org", "rcpt": ["cat@example.jp"], "header": {"subject": "x"}, "body": "Nyaa"}
        with open(os.path.join(server.folder, "mail.json"), "w") as stream:
            json.dump(document, stream)
        answers = []
        for line in [*commands, commands[-1]]:
            command = line.replace("127.0.0.1:2794", f"127.0.0.1:{server.places[0][1]}")
            found = subprocess.run(
                ["sh", "-eu", "-c", command],
                cwd=server.folder,
                env=environment(),
                capture_output=True,
                timeout=20,
                check=False,
            )
            answers.append(json.loads(found.stdout))
        self.assertEqual([item["response"][0]["command"] for item in answers], ["QUEUE", "DATA", "DATA"])
        self.assertEqual(answers[1], answers[2])
        eventually(lambda: hook.asked)
        event = hook.asked[0].json()
        self.assertEqual([set(event), set(event["data"])], [set(json.loads(shown)), set(json.loads(shown)["data"])])

    def test_a_mail_that_kills_its_process_is_held(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        peer = self.peer(lambda to, count: gate if to.startswith("killer") else "250 2.0.0 Ok")
        server = self.served(queue_settings(peer))
        queueid = server.submit("killer@example.jp", **{"async": True})[2]["queueid"]
        for count in (1, 2, 3):
            eventually(lambda count=count: peer.tries.get("killer@example.jp") == count, "an attempt")
            for pid in server.workers():
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: self.state(server, queueid) == "held", "held")
        eventually(lambda: server.submit("calm@example.jp", **{"async": True})[0] == 202)
        eventually(lambda: peer.to("calm@example.jp"))
        self.assertRegex(server.log(), "to=<killer@example.jp> status=held")
        self.assertIn("next held", server.queue("list").stdout)
        gate.set()
        self.assertEqual(server.queue("retry", queueid).stdout, "1 recipient to be tried at once\n")
        eventually(lambda: self.state(server, queueid) == "delivered", "delivery")

    def test_a_fault_of_the_route_is_no_verdict_on_the_mail(self):
        peer, replies = self.peer(), ["530 5.7.0 Authentication required"] * 4
        peer.says["DATA"] = lambda connection, line: replies.pop() if replies else None
        server = self.served(queue_settings(peer))
        answers = [server.submit("a@example.jp"), server.submit("b@example.jp", **{"async": True})]
        self.assertEqual([status for status, _, _ in answers], [202, 202])
        for _, _, answer in answers:
            eventually(lambda answer=answer: self.state(server, answer["queueid"]) == "delivered", "delivery")
        found = server.fate(answers[0][2]["queueid"])["a@example.jp"]["attempts"]
        self.assertEqual((found[0]["code"], found[-1]["code"]), ("530", "250"))

    def state(self, server, queueid):
        """The state of the mail's first recipient, None while nobody answers."""
        try:
            return next(iter(server.fate(queueid).values()))["state"]
        except (OSError, EOFError, StopIteration):
            return None

    def test_newer_file(self):
        with tempfile.TemporaryDirectory() as folder:
            db = sqlite3.connect(os.path.join(folder, "haineko.db"))
            db.execute("PRAGMA user_version=99")
            db.close()
            config = os.path.join(folder, "haineko.json")
            with open(config, "w") as stream:
                json.dump({"queue": {"path": "haineko.db"}}, stream)
            found = run_program("serve", "-c", config, "--listen", "127.0.0.1:0", text=True)
            self.assertEqual(found.returncode, 2)
            self.assertIn("is of version 99, this Haineko's is 2", found.stderr)


class QueueCrash(unittest.TestCase):
    """Load, peers that fail by chance, SIGKILL to a process by chance, again and again; then everything is counted.
    HAINEKO_CRASH_ROUNDS says how often."""

    def setUp(self):
        self.rounds = int(os.environ.get("HAINEKO_CRASH_ROUNDS", "4"))
        self.dice = random.Random(os.environ.get("HAINEKO_CRASH_SEED", "neko"))
        self.peer = queue_peer(self.by_chance)
        self.addCleanup(self.peer.close)
        self.server = Server({**queue_settings(self.peer, lifetime=100000), "httpd": {"workers": 2}})
        self.addCleanup(self.server.close)
        self.accepted, self.refused, self.number = set(), set(), 0
        self.lock, self.over = threading.Lock(), False

    def by_chance(self, recipient, count):
        if recipient == "sender@example.org":
            return "250 2.0.0 Ok"
        said = ["250 2.0.0 Ok"] * 14 + ["451 4.2.0 not now"] * 3 + ["554 5.0.0 never", HANG_UP, LOST]
        return self.dice.choice(said)

    def client(self):
        """Posts one mail after the other; with a key it asks until it is told, without one it gives up."""
        while not self.over:
            with self.lock:
                self.number += 1
                to, way = f"r{self.number}@example.jp", self.dice.choice(("plain", "key", "async", "both"))
            headers = {"Idempotency-Key": to} if way in ("key", "both") else {}
            while True:
                try:
                    more = {"async": True} if way in ("async", "both") else {}
                    status, _, answer = self.server.submit(to, headers=headers, sender="sender@example.org", **more)
                except (OSError, EOFError, ValueError):
                    status = 0
                if status in (200, 202):
                    self.accepted.add(to)
                elif status and status != 409 and answer["response"][0]["rcpt"]:
                    self.refused.add(to)
                if way in ("plain", "async") or status not in (0, 409):
                    break
                time.sleep(0.05)

    def test_nothing_lost_nothing_twice(self):
        clients = [threading.Thread(target=self.client) for _ in range(6)]
        for client in clients:
            client.start()
        for turn in range(self.rounds):
            time.sleep(self.dice.uniform(0.02, 0.3))
            victims = [*self.server.workers(), self.server.process.pid]
            victim = victims[turn % len(victims)] if turn % 4 != 3 else 0
            if not victim:
                self.server.kill()
            else:
                try:
                    os.kill(victim, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if victim in (0, self.server.process.pid):
                self.server.process.wait()
                self.server.start()
        self.over = True
        for client in clients:
            client.join()
        eventually(self.settled, "an empty queue", 60)
        self.count()

    def settled(self):
        """True once nothing waits; mail that is held, since it was in flight at three kills in a row, is released."""
        for line in self.server.queue("list").stdout.splitlines():
            if "next held" in line:
                self.server.queue("retry", line.split()[0])
        found = self.server.get("/queue")[1]
        return found["waiting"] == found["sending"] == found["held"] == 0

    def count(self):
        reports = [mail.text for mail in self.peer.to("sender@example.org")]
        bounced = {re.search(rb"Final-Recipient: rfc822; (\S+)", text)[1].decode() for text in reports}
        arrived = collections.Counter(to for mail in self.peer.taken for to in mail.recipients)
        unsure = {to for mail in self.peer.lost for to in mail.recipients} | set(
            re.findall(r"to=<([^>]+)>[^\n]*(?:may|might) arrive", self.server.log())
        )
        twice = {to for to, count in arrived.items() if count > 1 and to != "sender@example.org"}
        self.assertEqual(self.accepted - set(arrived) - bounced, set(), "lost")
        self.assertEqual(twice - unsure, set(), "twice without a word")
        self.assertGreater(len(self.accepted), 2 * self.rounds)


# ======================================================================================================================
# 17. The way of a mail
# ======================================================================================================================


class SubmittingByWeb(Quiet):
    def test_submit_by_each(self):
        for mailer, answer in PEERS.items():
            with self.subTest(mailer), HttpPeer(answer) as peer:
                raw = {"mailer": mailer, "base_url": peer.url, "auth": "key", "timeout": 2}
                service = haineko.App(
                    web_settings({**raw, **({"region": "eu-west-1"} if mailer == "AmazonSES" else {})})
                )
                client = haineko.parse_ip("127.0.0.1")
                body = json.dumps(web_submission(rcpt=["mikeneko@example.jp", "tama@example.jp"])).encode()
                request = haineko.Request("POST", "/submit", {}, body, client, client, 5, 1700000000.0)
                answer_ = answered(request, service)
                document = json.loads(answer_.body)
                self.assertEqual(answer_.status, 200, document)
                self.assertEqual([item["mailer"] for item in document["response"]], [mailer] * 2)
                self.assertEqual(len(peer.asked), 2)
                self.assertNotIn(SECRET, answer_.body.decode())


class Submitting(Peers):
    def submitted(self, table: dict, rcpt: list, **sections) -> tuple:
        """(HTTP status, headers, document) of one mail to those recipients, by those routes."""
        service = haineko.App(settings(mailertable=table, **sections))
        client = haineko.parse_ip("192.0.2.7")
        request = haineko.Request(
            "POST", "/submit", {"user-agent": "test/1"}, as_body(document(rcpt=rcpt)), client, client, 50320, 1e9
        )

        async def one() -> haineko.Response:
            answer = await haineko.submit(request, service)
            await service.transport.sweep(everything=True)
            return answer

        answer = haineko.run(one())
        return answer.status, dict(answer.headers), json.loads(answer.body)

    def test_several_are_delivered_side_by_side_up_to_max_workers(self) -> None:
        for most, count in ((1, 3), (2, 6), (3, 6)):
            with self.subTest(max_workers=most):
                barrier = threading.Barrier(most)
                peer = self.peer({".": held(barrier)})
                rcpt = [f"r{i}@example.jp" for i in range(count)]
                smtpd = {"hostname": NAME, "max_workers": most, "max_rcpts_per_message": 0}
                status, _, found = self.submitted({"default": esmtp(peer)}, rcpt, smtpd=smtpd)
                self.assertEqual((status, [item["rcpt"] for item in found["response"]]), (200, rcpt))
                self.assertEqual((peer.most, len(peer.mails)), (most, count))
                self.assertLessEqual(len(peer.connections), most)

    def test_each_copy_has_its_own_recipient(self) -> None:
        peer = self.peer()
        rcpt = [f"r{i}@example.jp" for i in range(4)]
        self.submitted({"default": esmtp(peer)}, rcpt)
        found = {lines[0]: email.message_from_bytes(octets) for _, lines, octets, _ in peer.mails}
        self.assertEqual({f"RCPT TO:<{to}>" for to in rcpt}, set(found))
        self.assertEqual([found[f"RCPT TO:<{to}>"]["To"] for to in rcpt], rcpt)
        self.assertEqual(len({message["Message-Id"] for message in found.values()}), 4)

    def test_replies_stand_in_the_order_of_the_request(self) -> None:
        def in_reverse(connection, line) -> str:
            number = int(connection.recipients[0][10])
            eventually(lambda: number == 3 or events[number + 1].is_set(), "the one after it", 3)
            events[number].set()
            return f"250 2.0.0 number {number}"

        events = [threading.Event() for _ in range(4)]
        peer = self.peer({".": in_reverse})
        rcpt = ["r0@example.jp", "x@bad@", "r1@example.jp", "r2@example.jp", "r3@example.jp"]
        most = {"hostname": NAME, "max_rcpts_per_message": 9}
        _, _, found = self.submitted({"default": esmtp(peer)}, rcpt, smtpd=most)
        self.assertEqual([item["rcpt"] for item in found["response"]], rcpt)
        self.assertEqual(found["recipient"], [to for to in rcpt if to != "x@bad@"])
        told = [item["message"] for item in found["response"]]
        self.assertEqual(told[:1] + told[2:], [[f"2.0.0 number {i}"] for i in range(4)])
        self.assertEqual(told[1], ["Recipient address is invalid"])

    def test_the_status_sums_up(self) -> None:
        good, later, never = self.peer(), self.peer({"RCPT": "450 4.2.0 later"}), self.peer({"RCPT": "550 5.1.1 no"})
        lost = self.peer({"CONN": HANG_UP})
        table = {"good": esmtp(good), "later": esmtp(later), "never": esmtp(never), "lost": esmtp(lost)}
        cases = (
            (["a@good"], 200),
            (["a@good", "b@good"], 200),
            (["a@good", "a@later"], 207),
            (["a@never", "a@good"], 207),
            (["a@good", "no address"], 207),
            (["a@never"], 502),
            (["a@never", "b@never", "no address"], 502),
            (["a@never", "a@later"], 503),
            (["a@lost"], 503),
            (["no address"], 400),
        )
        for rcpt, wanted in cases:
            with self.subTest(rcpt):
                status, headers, found = self.submitted(table, rcpt)
                self.assertEqual(status, wanted)
                self.assertEqual("Retry-After" in headers, wanted == 503)
                self.assertEqual([item["rcpt"] for item in found["response"]], rcpt)
                errors = [item["error"] for item in found["response"]]
                self.assertEqual(wanted == 200, not any(errors))
        self.assertRegex(self.submitted(table, ["a@lost"])[1]["Retry-After"], r"\A[1-9]\d*\Z")

    def test_tries_again_after_a_temporary_failure_only(self) -> None:
        later, well = "450 4.2.0 later", USUAL["RCPT"]
        cases = (
            # what it says, retry, code, transactions
            ({"RCPT": [later, well]}, 0, "450", 1),
            ({"RCPT": [later, well]}, 1, "250", 2),
            ({"RCPT": [later, later, well]}, 1, "450", 2),
            ({"RCPT": [later, later, well]}, 5, "250", 3),
            ({"RCPT": "550 5.1.1 no"}, 5, "550", 1),
            ({"CONN": ["421 4.3.2 busy", USUAL["CONN"]]}, 1, "250", 1),
            ({".": ["451 4.3.0 oops", "250 2.0.0 ok"]}, 1, "250", 2),
            ({".": HANG_UP}, 5, "421", 1),
        )
        for says, retry, code, transactions in cases:
            with self.subTest(says=says, retry=retry):
                peer = self.peer({verb: list(said) if isinstance(said, list) else said for verb, said in says.items()})
                _, _, found = self.submitted({"default": esmtp(peer, retry=retry, sleep=0)}, ["a@example.jp"])
                self.assertEqual(found["response"][0]["code"], code)
                self.assertEqual(sum(line.startswith("MAIL") for line in peer.lines), transactions)

    def test_sleeps_between_tries_while_others_go_on(self) -> None:
        lost = self.peer({"CONN": ["421 4.3.2 busy", USUAL["CONN"]]})
        well, force = self.peer(), settings(smtpd={"hostname": NAME, "max_workers": 2})
        jobs = [job(lost, retry=1, sleep=0.4), *[job(well)] * 9]
        began = time.monotonic()
        sessions = haineko.TransportContext()
        outcomes = haineko.run(and_closed(haineko.deliver(jobs, sessions, force), sessions))
        self.assertTrue(0.4 <= time.monotonic() - began < 2)
        self.assertEqual([item.replies[0].code for item in outcomes], ["250"] * 10)
        self.assertGreaterEqual(outcomes[0].ms, 400)
        self.assertLess(max(item.ms for item in outcomes[1:]), 400)

    def test_a_line_for_each_transaction_and_refusal_without_body_or_secret(self) -> None:
        peer = self.peer({"RCPT": refuses(b="550 5.1.1 no\x07body")}, "AUTH PLAIN", logins={"kijitora": "n-y-a-a"})
        authinfo = {"x": {"username": "kijitora", "password": "n-y-a-a"}}
        rcpt = ["a@example.jp", "b@example.jp", "line\nfeed@example.jp"]
        _, _, found = self.submitted({"default": esmtp(peer, auth="x")}, rcpt, authinfo=authinfo)
        queueid = found["queueid"]
        self.assertRegex(queueid, r"\A[0-9A-Za-z]{16}\Z")
        lines = [line.partition("]: ")[2] for line in self.logged()]
        self.assertEqual(len(lines), 3, lines)
        self.assertRegex(lines[2], r" to=<line\?feed@example.jp> dsn=5.1.5 status=rejected \(553 ")
        for line, to, code, word in ((lines[0], "a", "250", "sent"), (lines[1], "b", "550", "bounced")):
            for part in (queueid, "client=192.0.2.7", "from=<kijitora@example.org>", f"to=<{to}@example.jp>"):
                self.assertIn(part, line)
            self.assertRegex(
                line, rf" relay=ESMTP:127\.0\.0\.1:{peer.port} delay=[\d.]+ dsn=\S+ status={word} \({code} "
            )
        self.assertNotRegex("\n".join(lines), "Meow|n-y-a-a|\x07")
        self.submitted({}, ["line\nfeed@example.jp", "evil\x1b[2J@example.jp"])
        lines = self.logged()
        self.assertTrue(lines)
        self.assertTrue(all("status=rejected" in line and line.isprintable() for line in lines), lines)
        self.assertNotIn("Meow", "\n".join(lines))

    def test_queue_id_is_the_same_in_answer_log_and_message(self) -> None:
        peer = self.peer()
        _, _, found = self.submitted({"default": esmtp(peer)}, ["a@example.jp"])
        message = email.message_from_bytes(peer.mails[0][2])
        self.assertIn(f" id {found['queueid']};", message["Received"])
        self.assertTrue(message["Message-Id"].startswith(f"<{found['queueid']}."))
        self.assertIn(f" {found['queueid']}: ", self.logged()[0])

    def test_a_client_that_says_odd_things_of_itself_reads_them_again(self) -> None:
        service = haineko.App(settings())
        for word in ('a "quote" \\', "100% %s {x}", "y" * 3000, "Ã¤"):
            asked = request(as_body(document()), **{"user-agent": word, "referer": word})
            found = json.loads(answered(asked, service).body)
            wanted = "ä" if word == "Ã¤" else word[:200]
            self.assertEqual((set(found), found["useragent"], found["referer"]), (TOP, wanted, wanted))

    def test_queue_ids_are_unique(self) -> None:
        found = {haineko.new_queueid(1388741758.0) for _ in range(20000)}
        self.assertEqual(len(found), 20000)
        self.assertTrue(all(re.fullmatch("[0-9A-Za-z]{16}", item) for item in found))


class DryRun(Quiet):
    def test_routes(self):
        table = {
            "default": {"host": "smtp.example.org", "port": 587, "starttls": True},
            "mx.example": {"mailer": "MX"},
            "file.example": {"mailer": "/tmp"},
            "far.example": {"mailer": "Haineko", "host": "haineko.example.org"},
        }
        force = settings(mailertable=table, smtpd={"hostname": NAME, "max_rcpts_per_message": 0})
        cases = {
            "a@example.jp": (
                "ESMTP", "smtp.example.org", 587, "ESMTP smtp.example.org:587, STARTTLS (mailertable.default)",
            ),
            "a@mx.example": ("MX", None, None, 'MX (mailertable["mx.example"])'),
            "a@file.example": ("File", None, None, 'File /tmp (mailertable["file.example"])'),
            "a@far.example": (
                "Haineko", "haineko.example.org", 2794,
                'Haineko http://haineko.example.org:2794 (mailertable["far.example"])',
            ),
        }  # fmt: skip
        status, found = posted(document(rcpt=list(cases), dry_run=True), force)
        self.assertEqual((status, found["recipient"], set(found) - TOP), (200, list(cases), {"message_octets", "raw"}))
        for item in found["response"]:
            mailer, host, port, line = cases[item["rcpt"]]
            with self.subTest(item["rcpt"]):
                self.assertEqual((item["mailer"], item["host"], item["port"]), (mailer, host, port))
                self.assertEqual(
                    (item["error"], item["code"], item["dsn"], item["command"]), (0, "250", "2.0.0", "DRYRUN")
                )
                self.assertEqual(item["message"], ["Not sent", f"{item['rcpt']}: {line}"])
        message = email.message_from_string(found["raw"])
        self.assertEqual((message["To"], message["Subject"]), ("a@example.jp", "Nyaaaa"))
        self.assertEqual(found["message_octets"], len(found["raw"].encode()))
        self.assertIn(found["queueid"], message["Message-Id"])

    def test_refusals_are_the_usual_ones(self):
        force = settings(smtpd={"hostname": NAME, "max_message_size": 2000})
        for change, status, codes in (
            ({"rcpt": ["no address"]}, 400, ["553"]),
            ({"rcpt": ["a@example.jp", "no address"]}, 207, ["250", "553"]),
            ({"body": "x" * 3000}, 413, ["552"]),
            ({"header": {"x-mc-tags": "a"}}, 400, ["554"]),
            ({"dry_run": "yes"}, 400, ["554"]),
        ):
            with self.subTest(change):
                answer = posted(document(**{"dry_run": True, **change}), force)
                self.assertEqual((answer[0], [item["code"] for item in answer[1]["response"]]), (status, codes))

    def test_a_message_that_is_not_utf_8(self):
        octets = b"Subject: x\r\nContent-Type: text/plain; charset=iso-8859-1\r\n\r\ncaf\xe9\r\n"
        raw = {"base64": base64.b64encode(octets).decode()}
        found = posted({"mail": "a@example.org", "rcpt": "b@example.jp", "raw": raw, "dry_run": True})[1]
        message = base64.b64decode(found["raw"]["base64"])
        self.assertTrue(message.endswith(b"caf\xe9\r\n"))
        self.assertEqual(found["message_octets"], len(message))

    def test_nothing_is_kept(self):
        with tempfile.TemporaryDirectory(prefix="haineko-test.") as folder:
            path = os.path.join(folder, "haineko.db")
            service = haineko.App(settings(queue={"path": path, "min_free": 0}))
            asked = request(as_body(document(dry_run=True, **{"async": True})), idempotency_key="once")
            self.assertEqual(answered(asked, service).status, 200)
            self.assertEqual(os.listdir(folder), [])


class Staging(Peers):
    def sent(self, submission: dict, **smtpd) -> tuple:
        """(status, document, [(recipients, message)]) of a mail, by those settings."""
        peer = self.peer()
        force = settings(mailertable={"dev.example": esmtp(peer)}, smtpd={"hostname": NAME, **smtpd})
        status, found = posted(submission, force)
        mails = [
            ([line[9:-1] for line in lines], email.message_from_bytes(octets)) for _, lines, octets, _ in peer.mails
        ]
        return status, found, mails

    def test_all_mail_goes_elsewhere(self):
        raw = "From: a@example.org\nSubject: =?utf-8?q?n=C3=BA?=\nTo: r0@example.jp\n\nx\n"
        rcpt = ["r0@example.jp", "no address", "r1@example.jp"]
        dev, ops = "dev@dev.example", "ops@dev.example"
        cases = (
            ("one", document(rcpt=rcpt), dev, [[dev]], dev, "Nyaaaa"),
            ("a list", document(rcpt=rcpt), [dev, ops], [[dev], [ops]], dev, "Nyaaaa"),
            ("shown", document(rcpt=rcpt, header={"to": rcpt[0]}), [dev, ops], [[dev, ops]], rcpt[0], "Nyaaaa"),
            ("raw", {"mail": "a@example.org", "rcpt": rcpt, "raw": raw}, dev, [[dev]], rcpt[0], "nú"),
        )
        for what, submission, redirect, envelopes, shown, subject in cases:
            for prefix in ("", "[TEST]", "[試し] "):
                with self.subTest(what, prefix=prefix):
                    status, found, mails = self.sent(submission, redirect=redirect, subject_prefix=prefix)
                    self.assertEqual((status, [item["error"] for item in found["response"]]), (207, [0, 1, 0]))
                    self.assertEqual([item["rcpt"] for item in found["response"]], rcpt)
                    self.assertEqual(found["recipient"], [rcpt[0], rcpt[2]])
                    self.assertEqual(sorted(to for to, _ in mails), envelopes)
                    for _, message in mails:
                        self.assertEqual(message["X-Haineko-Recipients"], "r0@example.jp, r1@example.jp")
                        self.assertIn(message["To"], (shown, ops))
                        words = str(email.header.make_header(email.header.decode_header(message["Subject"])))
                        wanted = f"{prefix.strip()} {subject}".strip()
                        self.assertEqual(words.replace(" ", ""), wanted.replace(" ", ""))

    def test_the_first_failure_is_told(self):
        peer = self.peer({"RCPT": lambda connection, line: "550 5.1.1 no" if "ops" in line else None})
        smtpd = {"hostname": NAME, "redirect": ["dev@dev.example", "ops@dev.example"]}
        status, found = posted(document(), settings(mailertable={"default": esmtp(peer)}, smtpd=smtpd))
        (item,) = found["response"]
        self.assertEqual((status, item["rcpt"], item["code"]), (502, "mikeneko@example.jp", "550"))

    def test_only_the_subject(self):
        status, _, mails = self.sent(document(rcpt=["a@dev.example"]), subject_prefix="[TEST]")
        ((to, message),) = mails
        self.assertEqual((status, to, message["Subject"]), (200, ["a@dev.example"], "[TEST] Nyaaaa"))
        self.assertIsNone(message["X-Haineko-Recipients"])

    def test_settings(self):
        for value, good in (
            ("dev@example.org", True),
            (["dev@example.org", "ops+test@xn--r8jz45g.jp"], True),
            ([], True),
            ("dev", False),
            ("a b@example.org", False),
            ("a..b@example.org", False),
            ("x" * 250 + "@example.org", False),
            ("x" * 64 + "@" + "a." * 100 + "org", False),
            ("dev@example.org\r\nX: y", False),
        ):
            with self.subTest(value):
                errors: list = []
                found = haineko.from_dict(haineko.Settings, {"smtpd": {"redirect": value}}, "", errors)
                self.assertEqual(not errors, good, errors)
                for to in found.smtpd.redirect:
                    self.assertEqual(haineko.parse_address(to).addr_spec, to)

    def test_people_are_told(self):
        peer = self.peer()
        force = {
            "smtpd": {"hostname": NAME, "redirect": "dev@dev.example", "subject_prefix": "[TEST]"},
            "mailertable": {"dev.example": {"port": peer.port}, "example.org": {"port": 1}, "example.jp": {"port": 1}},
            "queue": {"path": "haineko.db", "retry_after": [1], "min_free": 0},
        }
        server = served(self, force)
        told = 'STAGING: all mail goes to dev@dev.example (smtpd.redirect); subjects begin with "[TEST]"'
        self.assertIn(f"haineko: {told}\n", server.log())
        self.assertEqual(server.get("/health"), (200, {"status": "ok", "staging": told}))
        self.assertIn(f"fine; {told}; mail goes to", run_program("check", "-c", server.path, text=True).stdout)
        queueid = server.submit("a@example.jp", **{"async": True})[2]["queueid"]
        store = haineko.QueueDB(haineko.QueueSettings(path=os.path.join(os.path.dirname(server.path), "haineko.db")))
        older = entry("Q" * 16, to=("b@example.jp",), lane="ESMTP 127.0.0.1:1")  # from before
        self.assertEqual(store.commit([(haineko.enqueue, (older, None))]), [None])
        store.close(for_good=True)
        eventually(lambda: len(peer.mails) == 2)
        self.assertEqual({tuple(lines) for _, lines, _, _ in peer.mails}, {("RCPT TO:<dev@dev.example>",)})
        eventually(lambda: server.fate(queueid)["dev@dev.example"]["state"] == "delivered")


class Traces(Peers):
    def traced(self, says: dict, offers=(), rcpt=("a@example.jp",), **more) -> dict:
        """The items of a traced mail's answer."""
        peer = self.peer(says, *offers, logins={"neko": "sesame-open"})
        table = {"default": esmtp(peer, **more), "off.example": {"mailer": "Discard"}}
        authinfo = {"relay": {"username": "neko", "password": "sesame-open"}}
        force = settings(mailertable=table, authinfo=authinfo, smtpd={"hostname": NAME})
        found = posted(document(rcpt=list(rcpt), trace=True), force)[1]
        self.assertTrue(all(set(item) >= ITEM for item in found["response"]))
        return {item["rcpt"]: item for item in found["response"]}

    def test_the_dialogue(self):
        items = self.traced({}, ["AUTH PLAIN"], ["a@example.jp", "b@off.example", "no address"], auth="relay")
        dialogue = items["a@example.jp"]["dialogue"]
        wanted = [
            r"< 220 .*", f"> (?i:ehlo) {re.escape(NAME)}", "< 250-peer.example", "< 250-AUTH PLAIN", "< 250 HELP",
            r"> AUTH PLAIN \*+ as neko", "< 235 .*", "> MAIL FROM:<kijitora@example.org>", "< 250 .*",
            "> RCPT TO:<a@example.jp>", "< 250 .*", "> DATA", "< 354 .*", r"> \(\d+ octets of the message\)",
            "< 250 .*",
        ]  # fmt: skip
        self.assertEqual(len(dialogue), len(wanted), dialogue)
        for line, pattern in zip(dialogue, wanted):
            self.assertRegex(line, f"^{pattern}$")
        self.assertEqual(items["b@off.example"]["dialogue"], [])
        self.assertNotIn("dialogue", items["no address"])

    def test_failures_have_it_too_and_no_secret(self):
        def repeats(connection, line) -> str:
            return f"535 5.7.8 wrong: {line} {base64.b64decode(line.split()[-1]).decode()[6:]}"

        (item,) = self.traced({"AUTH": repeats}, ["AUTH PLAIN"], auth="relay").values()
        self.assertEqual((item["code"], item["command"]), ("535", "AUTH"))
        self.assertRegex(item["dialogue"][-2], "^< 535 5.7.8 wrong: ")
        self.assertEqual(item["dialogue"][-1], "> QUIT")
        for secret in ("sesame", base64.b64encode(b"\0neko\0sesame-open").decode()):
            self.assertNotIn(secret, json.dumps(item))
        (item,) = self.traced({"RCPT": ["450 4.2.0 later", "250 2.1.5 now"]}, retry=1, sleep=0).values()
        self.assertEqual((item["code"], "< 450 4.2.0 later" in item["dialogue"]), ("250", True))

    def test_each_mail_has_its_own(self):
        peer = self.peer({}, ("PIPELINING",))
        force = settings(mailertable={"default": esmtp(peer)}, smtpd={"hostname": NAME, "max_rcpts_per_message": 0})
        rcpt = [f"r{i}@example.jp" for i in range(20)]
        service = haineko.App(force)
        for trace in (True, False):
            answer = answered(request(as_body(document(rcpt=rcpt, trace=trace))), service)
            for item in json.loads(answer.body)["response"]:
                lines = [line for line in item.get("dialogue", ()) if line.startswith("> RCPT")]
                self.assertEqual(lines, [f"> RCPT TO:<{item['rcpt']}>"] if trace else [])

    def test_a_queued_mail_has_that_of_the_first_attempt(self):
        peer = self.peer({"MAIL": "451 4.3.0 later"})
        with tempfile.TemporaryDirectory(prefix="haineko-test.") as folder:
            queue = {"path": os.path.join(folder, "haineko.db"), "min_free": 0}
            status, found = posted(document(trace=True), settings(mailertable={"default": esmtp(peer)}, queue=queue))
        (item,) = found["response"]
        self.assertEqual((status, item["command"]), (202, "QUEUE"))
        self.assertEqual(item["dialogue"][-2:], ["< 451 4.3.0 later", "> QUIT"])

    def test_who_may(self):
        anybody = settings(relayhosts={"open-relay": True})
        scrypt = {
            name: {"hash": SettingsFile.KIJITORA, "trace": name == "kijitora"} for name in ("kijitora", "mikeneko")
        }
        by_login = settings(password=scrypt)
        basic = {
            name: f"Authorization: Basic {base64.b64encode(f'{name}:kijitora'.encode()).decode()}\r\n"
            for name in scrypt
        }
        for force, client, header, status in (
            (anybody, "127.0.0.1", "", 200),
            (anybody, "192.0.2.1", "", 403),
            (anybody, "127.0.0.1", "Via: 1.1 proxy\r\n", 403),
            (by_login, "192.0.2.1", basic["kijitora"], 200),
            (by_login, "192.0.2.1", basic["mikeneko"], 403),
        ):
            with self.subTest(client, header=header):
                octets = http_post(as_body(document(trace=True))).replace(
                    b"Host: x\r\n", f"Host: x\r\n{header}".encode()
                )
                found = over_http(octets, force, client)
                self.assertEqual(found[0], status, found)


class SharedTransactions(Peers):
    """Recipients in the header, end to end."""

    def route(self, peer: SmtpPeer, **more) -> dict:
        return {"host": peer.host, "port": peer.port, "timeout": 2, **more}

    def test_recipients_of_one_route_share_a_transaction(self):
        one, two = (
            self.peer(None, "PIPELINING"),
            self.peer({"RCPT": lambda connection, line: "550 5.1.1 who?" if "b@" in line else None}),
        )
        one.says, two.says = {"RCPT": "250 2.1.5 fine"}, {"RCPT": ["250 2.1.5 fine", "550 5.1.1 who?"]}
        force = settings(mailertable={"one.example": self.route(one), "default": self.route(two)})
        header = {"to": "A <a@one.example>, a@two.example", "cc": "b@two.example", "bcc": "猫 <c@one.example>"}
        status, answer = posted(document(rcpt=None, header=header, html="<p>x</p>"), force)
        self.assertEqual(
            (status, answer["recipient"]), (207, ["a@one.example", "a@two.example", "b@two.example", "c@one.example"])
        )
        self.assertEqual([item["rcpt"] for item in answer["response"]], answer["recipient"])
        self.assertEqual([item["code"] for item in answer["response"]], ["250", "250", "550", "250"])
        self.assertEqual([len(peer.mails) for peer in (one, two)], [1, 1])
        self.assertEqual(one.mails[0][1], ["RCPT TO:<a@one.example>", "RCPT TO:<c@one.example>"])
        self.assertEqual(one.mails[0][2], two.mails[0][2])
        message = parsed(one.mails[0][2])
        self.assertEqual(
            (message["to"], message["cc"], message["bcc"]), ("A <a@one.example>, a@two.example", "b@two.example", None)
        )
        self.assertNotIn(b"c@one.example", one.mails[0][2])

    def test_who_gets_it(self):
        for rcpt, header, wanted in [
            (["a@x.jp"], {"to": "b@x.jp"}, "a"),
            (["a@x.jp"], {"bcc": "b@x.jp"}, "ab"),
            (None, {"cc": "c@x.jp"}, "c"),
            (None, {"to": "a@x.jp", "cc": "A@x.jp, a@X.JP", "bcc": ["b@x.jp", "a@x.jp"]}, "aAb"),
            (None, {"bcc": "b@x.jp"}, "b"),
        ]:
            with self.subTest(header):
                _, answer = posted(document(rcpt=rcpt, header=header))
                self.assertEqual("".join(to[0] for to in answer["recipient"]), wanted)

    def test_separate_copies_without_to(self):
        peer = self.peer()
        posted(
            document(rcpt=["a@x.jp", "b@x.jp"], header={"bcc": "c@x.jp"}),
            settings(mailertable={"default": self.route(peer)}),
        )
        found = sorted((rcpt, parsed(text)["to"]) for _, (rcpt,), text, _ in peer.mails)
        self.assertEqual(found, [(f"RCPT TO:<{name}@x.jp>", f"{name}@x.jp") for name in "abc"])


# ======================================================================================================================
# 16. Provider endpoints
# ======================================================================================================================


# A mail as the clients of each provider send it; called with changes.
sendgrid = functools.partial(dict, {
    "from": {"email": "kijitora@example.org", "name": 'Kiji "K", tora'}, "subject": "Nyaaa ☃",
    "personalizations": [{"to": [{"email": "mike@example.jp", "name": "三毛, 猫"}, {"email": "kuro@example.jp"}],
                          "cc": [{"email": "cc@example.jp"}], "bcc": [{"email": "bcc@example.jp"}]}],
    "reply_to_list": [{"email": "r1@example.org"}, {"email": "r2@example.org", "name": "R"}],
    "content": [{"type": "text/plain", "value": "Meow."}, {"type": "text/html", "value": "<img src=cid:logo>"}],
    "attachments": [file("a.txt", b"nya\n", type="text/plain; charset=utf-8"),
                    file("logo.png", PNG, type="image/png", disposition="inline", contentId="logo")],
    "headers": {"x-cat": "1", "Foo-Bar": "2"}, "categories": ["a"], "custom_args": {"b": "c"},
    "tracking_settings": {"click_tracking": {"enable": False}},
})  # fmt: skip
postmark = functools.partial(dict, {
    "From": '"Kiji \\"K\\", tora" <kijitora@example.org>', "To": '"三毛, 猫" <mike@example.jp>,kuro@example.jp',
    "Cc": "cc@example.jp", "Bcc": "bcc@example.jp", "ReplyTo": "r1@example.org, R <r2@example.org>",
    "Subject": "Nyaaa ☃", "TextBody": "Meow.", "HtmlBody": "<img src=cid:logo>",
    "Headers": [{"Name": "X-Cat", "Value": "1"}, {"Name": "Foo-Bar", "Value": "2"}],
    "Attachments": [{"Name": "a.txt", "Content": "bnlhCg==", "ContentType": "text/plain"},
                    {"Name": "logo.png", "ContentType": "image/png", "ContentID": "cid:logo",
                     "Content": base64.encodebytes(PNG).decode().replace("\n", "\r\n")}],
    "Tag": None, "TrackOpens": None, "TrackLinks": "None", "Metadata": {}, "MessageStream": "outbound",
})  # fmt: skip
resend = functools.partial(dict, {
    "from": '"Kiji \\"K\\", tora" <kijitora@example.org>', "cc": "cc@example.jp", "bcc": ["bcc@example.jp"],
    "to": ['"三毛, 猫" <mike@example.jp>', "kuro@example.jp"], "reply_to": ["r1@example.org", "R <r2@example.org>"],
    "subject": "Nyaaa ☃", "text": "Meow.", "html": "<img src=cid:logo>", "headers": {"X-Cat": "1", "Foo-Bar": "2"},
    "attachments": [
        {"filename": "a.txt", "content": list(b"nya\n"), "content_type": "text/plain", "content_id": "unused"},
        {"filename": "logo.png", "content": {"type": "Buffer", "data": list(PNG)}, "content_id": "<logo>"}],
    "tags": [{"name": "a", "value": "b"}],
})  # fmt: skip
ALL_RECIPIENTS = ["bcc@example.jp", "cc@example.jp", "kuro@example.jp", "mike@example.jp"]
MAILS = {"/v3/mail/send": sendgrid(), "/email": postmark(), "/emails": resend()}
BATCHES = {"/email/batch": [postmark()] * 2, "/emails/batch": [resend()] * 2}
QUEUE = {"path": "q.db", "min_free": 0}


def said_by(found: dict) -> tuple:
    """(words, what the provider calls it) of an error."""
    error = found.get("errors", [found])[0]
    return tuple(error[key] for key in ("message", "Message", "field", "ErrorCode", "name") if key in error)


class ProviderEndpoints(Peers):
    def serve(self, peer: SmtpPeer, **sections) -> Server:
        smtpd = {"hostname": NAME, "max_rcpts_per_message": 8}
        return served(self, {"smtpd": smtpd, "mailertable": {"default": {"port": peer.port}}, **sections})

    def check_arrived(self, peer: SmtpPeer, queueid: str) -> None:
        """Check that a mail arrived at every recipient and that the first copy is what the client sent."""
        copies = lambda: [mail for mail in peer.taken if queueid.encode() in mail.text]  # noqa: E731
        eventually(lambda: sorted(to for mail in copies() for to in mail.recipients) == ALL_RECIPIENTS, "a mail")
        self.assertEqual(copies()[0].sender, "kijitora@example.org")
        message = parsed(copies()[0].text)
        shown = {name: [one.display_name for one in message[name].addresses] for name in ("from", "to")}
        self.assertEqual(shown, {"from": ['Kiji "K", tora'], "to": ["三毛, 猫", ""]})
        self.assertEqual([a.addr_spec for a in message["reply-to"].addresses], ["r1@example.org", "r2@example.org"])
        names = ("cc", "bcc", "subject", "x-cat", "foo-bar")
        self.assertEqual([message[name] for name in names], ["cc@example.jp", None, "Nyaaa ☃", "1", "2"])
        self.assertEqual(message.get_body(("plain",)).get_content().strip(), "Meow.")
        self.assertIn("cid:logo", message.get_body(("html",)).get_content())
        files = {part.get_filename(): part for part in message.walk() if part.get_filename()}
        self.assertEqual(files["a.txt"].get_payload(decode=True).split(), [b"nya"])
        self.assertEqual(files["logo.png"].get_payload(decode=True), PNG)
        self.assertEqual((files["logo.png"]["content-id"], files["a.txt"]["content-id"]), ("<logo>", None))

    def test_mails_and_batches_of_their_clients(self):
        for queue in ({}, {"queue": QUEUE}):
            peer = self.peer()
            server = self.serve(peer, **queue)
            for path, mail in {**MAILS, **BATCHES}.items():
                with self.subTest(path, queue=bool(queue)):
                    status, headers, sent = server.ask(post(mail, path=path))
                    if path == "/v3/mail/send":
                        self.assertEqual((status, headers["Content-Length"], sent), (202, "0", ""))
                        status, sent = 200, {"id": headers["X-Message-Id"]}
                    self.assertEqual(status, 200)
                    items = sent if path == "/email/batch" else sent.get("data", [sent])
                    queueids = {item.get("id") or item["MessageID"] for item in items}
                    self.assertEqual(len(queueids), 1 + (path in BATCHES))
                    for queueid in queueids:
                        self.assertRegex(queueid, r"\A[0-9A-Za-z]{16}\Z")
                        self.check_arrived(peer, queueid)
                    if path == "/email":
                        self.assertRegex(sent.pop("SubmittedAt"), r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.0000000Z\Z")
                        self.assertEqual(
                            sent, {"To": mail["To"], "MessageID": queueid, "ErrorCode": 0, "Message": "OK"}
                        )
            before = len(peer.taken)
            parts = [{"to": [{"email": f"{name}@example.jp"}], "subject": name} for name in "ab"]
            self.assertEqual(server.ask(post(sendgrid(personalizations=parts), path="/v3/mail/send"))[0], 202)
            eventually(lambda: len(peer.taken) == before + 2, "two more mails")  # noqa: B023 -- called here
            found = sorted((mail.recipients, parsed(mail.text)["subject"]) for mail in peer.taken[before:])
            self.assertEqual(found, [(["a@example.jp"], "a"), (["b@example.jp"], "b")])

    def test_a_batch_with_a_fault(self):
        peer = self.peer()
        server = self.serve(peer, queue=QUEUE)
        status, _, found = server.ask(post([resend(), resend(to="@")], path="/emails/batch"))
        self.assertEqual((status, found["name"]), (422, "validation_error"))
        self.assertEqual(server.get("/queue")[1]["waiting"] + len(peer.taken), 0)
        mails, permissive = [resend(), resend(to="@"), resend()], "x-batch-validation: permissive"
        status, _, found = server.ask(post(mails, permissive, path="/emails/batch"))
        self.assertEqual((status, len(found["data"])), (200, 2))
        self.assertEqual(found["errors"], [{"index": 1, "message": "Invalid 'to' address: '@'."}])
        status, _, (first, second) = server.ask(post([postmark(), postmark(To="@")], path="/email/batch"))
        self.assertEqual((status, first["ErrorCode"]), (200, 0))
        self.assertEqual(second, {"ErrorCode": 300, "Message": "Invalid 'To' address: '@'."})
        self.assertEqual(server.ask(post(sendgrid(personalizations=[{}]), path="/v3/mail/send"))[0], 400)
        eventually(lambda: len(peer.taken) == 3 * len(ALL_RECIPIENTS) and server.idle(), "the good ones")

    def test_refusals(self):
        domains, smtpd = {"domainpart": ["example.jp"]}, {"hostname": NAME}
        server = self.serve(self.peer(), recipients=domains, smtpd=smtpd, queue=QUEUE)
        to = lambda *names: {"to": [{"email": name} for name in names]}  # noqa: E731
        wrong, one, far = "validation_error", "a@example.jp", "a@far.example"
        large = {"attachments": [file("a", bytes(1 << 20))], "content": [{"type": "text/plain", "value": "x"}]}
        for path, status, cases in (
            ("/v3/mail/send", 400, [
                (b"{", None, "Malformed JSON"), ([], "personalizations", "expected a list"),
                (sendgrid(personalizations=[]), None, "Too many mails in one request: expected 1 to"),
                (sendgrid(personalizations=[to(one)] * 1001), None, "got 1001"),
                (sendgrid(personalizations=[to(one, "@")]),
                 "personalizations.0.to.1.email", "Invalid 'personalizations.0.to.1.email' address: '@'."),
                (sendgrid(template_id="d-1"), "template_id", ""), (sendgrid(asm={"group_id": 1}), "asm", ""),
                (sendgrid(content=[{"type": "text/x-amp-html", "value": "x"}]), "content", ""),
                (sendgrid(headers={"Subject": "x"}), "headers", "Subject can't be set here"),
                (sendgrid(headers={"Content-Type": "x"}), "headers.Content-Type", ""),
                (sendgrid(headers={"Foo": "a\r\nBcc: x@y.jp"}), "headers.Foo", "CR, LF or NUL"),
                (sendgrid(headers={"Foo:": "a"}), None, "headers.Foo:: unknown key"),
                (sendgrid(attachments=[{"content": "!"}]), "attachments.0.content", "is not base64"),
                (sendgrid(subject=""), None, "subject is required"),
                (sendgrid(personalizations=[to(far)]), None, f"{far}: Recip")]),
            ("/v3/mail/send", 413, [
                (sendgrid(personalizations=[to(one)] * 1000, **large), None, "exceed the limit of 67108864")]),
            ("/email", 422, [
                (b"{", 402, "Malformed JSON"), (postmark(To="x"), 300, "Invalid 'To' address: 'x'."),
                (postmark(TextBody="", HtmlBody=None), 300, "TextBody or html is required"),
                (postmark(TemplateId=1), 300, "TemplateId: is not supported"),
                (postmark(To=",".join(f"{i}@example.jp" for i in range(9))), 300, "Too many")]),
            ("/emails", 422, [
                (resend(to=[one, 5]), wrong, "Invalid 'to' address: '5'."),
                (resend(subject=None), "missing_required_field", "subject is required"),
                (resend(template={"id": 1}), wrong, "template: is not supported"),
                (resend(attachments=[{"path": "http://x/"}]), wrong, "attachments[0].path"),
                (resend(attachments=[{"content": [256]}]), wrong, "attachments[0].content"),
                (resend(to=far, cc=None, bcc=None), wrong, f"{far}: Recip")]),
            ("/emails", 400, [(b"{", wrong, "Malformed JSON")]),
            ("/email/batch", 422, [([postmark()] * 501, 410, "got 501"), ({}, 300, "expected a list")]),
            ("/emails/batch", 422, [([resend()] * 101, wrong, "got 101"), ([5], wrong, "an object, got a number")]),
        ):  # fmt: skip
            for mail, name, words in cases:
                with self.subTest(path, name=name, words=words):
                    got, _, found = server.ask(post(mail, path=path))
                    self.assertEqual((got, said_by(found)[1]), (status, name))
                    self.assertIn(words, said_by(found)[0])
            self.assertEqual(server.ask(get(path))[0], 405)

    def test_answers_of_the_next_hop_and_of_a_full_queue(self):
        replies = {"RCPT": lambda _, line: "550 5.1.1 no such cat" if "kuro" in line else None}
        status, _, found = self.serve(self.peer(replies)).ask(post(postmark(), path="/email"))
        text = "Message OK, but will not deliver to these inactive addresses: kuro@example.jp. Inactive recipients: "
        self.assertEqual((status, found["ErrorCode"], found["Message"]), (200, 0, text + "5.1.1 no such cat"))
        for reply, queue, statuses, words in (
            ("550 5.7.1 no cats", {}, (400, 422, 422), "cats"),
            ("450 4.7.1 sleeping cats", {}, (503, 503, 503), "cats"),
            ("250 2.1.0 fine", {"queue": {**QUEUE, "min_free": 1 << 50}}, (503, 503, 503), "Cannot store the mail"),
        ):
            server = self.serve(self.peer({"MAIL": reply}), **queue)
            for (path, mail), status in zip(MAILS.items(), statuses):
                with self.subTest(path, reply=reply):
                    got, headers, found = server.ask(post(mail, path=path))
                    self.assertEqual((got, "Retry-After" in headers), (status, status == 503))
                    self.assertIn(words, said_by(found)[0])

    def test_refused_recipients_are_reported(self):
        peer, hook = self.peer(), HttpPeer(lambda asked: (204, b"", ())).__enter__()
        self.addCleanup(hook.__exit__)
        queue = {**QUEUE, "webhook": hook.url + "/hook", "webhook_secret": WHSEC}
        server = self.serve(peer, queue=queue, recipients={"domainpart": ["example.jp", "example.org"]})
        self.assertEqual(server.ask(post(resend(cc="far@far.example"), path="/emails"))[0], 200)
        eventually(lambda: len(peer.taken) == 4 and len(hook.asked) == 4, "mails, bounce, events")
        bounce = next(mail for mail in peer.taken if not mail.sender)
        self.assertEqual(bounce.recipients, ["kijitora@example.org"])
        self.assertIn(b"far@far.example", bounce.text)

    def test_logins_and_tests(self):
        peer = self.peer()
        server = self.serve(peer, queue=QUEUE, password={"kijitora": SettingsFile.KIJITORA})
        sandbox = sendgrid(mail_settings={"sandbox_mode": {"enable": True}})
        grant = "The provided authorization grant is invalid, expired, or revoked"
        right, basic = "Authorization: Bearer kijitora:kijitora", "Authorization: Basic a2lqaXRvcmE6a2lqaXRvcmE="
        token = "X-Postmark-Server-Token: "
        test = token + "POSTMARK_API_TEST"
        for path, mail, line, status, words in (
            ("/v3/mail/send", sandbox, "X: y", 401, grant), ("/v3/mail/send", sandbox, right, 200, ""),
            ("/v3/mail/send", sandbox, "Authorization: Bearer SG.x", 401, grant),
            ("/v3/mail/send", sandbox, token + "kijitora:kijitora", 401, grant),
            ("/v3/mail/send", sandbox, basic, 200, ""), ("/submit", None, test, 401, ""),
            ("/v3/mail/send", {**sandbox, "subject": ""}, basic, 400, "Subject header is empty"),
            ("/email", postmark(), "X: y", 401, "authentication failed"), ("/email", postmark(), test, 200, "OK"),
            ("/email", postmark(), token + "kijitora:neko", 401, "authentication failed"),
            ("/email", postmark(To="@"), test, 422, "Invalid 'To' address: '@'."),
            ("/email/batch", [postmark()], test, 200, ""), ("/emails", resend(), "X: y", 401, "missing_api_key"),
            ("/emails", resend(), "Authorization: Bearer kijitora:x", 403, "invalid_api_key"),
        ):  # fmt: skip
            with self.subTest(path, line=line):
                got, _, found = server.ask(post(mail, line, path=path))
                self.assertEqual(got, status)
                self.assertIn(words, json.dumps(found))
        self.assertEqual((peer.taken, server.get("/queue")[1]["waiting"]), ([], 0))
        for path, mail in MAILS.items():
            line = token + "kijitora:kijitora" if path == "/email" else right
            self.assertIn(server.ask(post(mail, line, path=path))[0], (200, 202))
        eventually(lambda: len(peer.taken) == 3 * len(ALL_RECIPIENTS), "all mails")
        closed = self.serve(peer, password={"kijitora": SettingsFile.KIJITORA}, relayhosts={"relayhosts": []})
        self.assertEqual(closed.ask(post(postmark(), test, path="/email"))[0], 422)

    def test_idempotency_keys(self):
        peer = self.peer()
        server = self.serve(peer, queue=QUEUE)
        for path, mail in (*MAILS.items(), ("/emails/batch", [resend(), resend()])):
            with self.subTest(path):
                both = [server.ask(post(mail, "Idempotency-Key: k-1", path=path)) for _ in range(2)]
                first, again = [(status, found, headers.get("X-Message-Id")) for status, headers, found in both]
                self.assertEqual(first, again)
                self.assertEqual([found[1].get("Idempotency-Replayed") for found in both], [None, "true"])
        for path, mail, key, status, words in (
            ("/emails", resend(subject="x"), "k-1", 409, "invalid_idempotent_request"),
            ("/emails", resend(), '"', 400, "invalid_idempotency_key"),
            ("/v3/mail/send", sendgrid(subject="x"), "k-1", 422, "another body"),
            ("/email", postmark(Subject="x"), "k-1", 422, "another body"),
        ):
            with self.subTest(path, key=key):
                got, _, found = server.ask(post(mail, f"Idempotency-Key: {key}", path=path))
                self.assertEqual(got, status)
                self.assertIn(words, json.dumps(found))
        eventually(lambda: len(peer.taken) == 5 * len(ALL_RECIPIENTS) and server.idle(), "each mail once")
        self.assertEqual(self.serve(peer).ask(post(resend(), "Idempotency-Key: k", path="/emails"))[0], 422)

    def test_openapi(self):
        status, found = served(self, {}).get("/openapi.json")
        self.assertEqual((status, found["openapi"]), (200, "3.1.0"))
        rows = {(method.upper(), path) for path, item in found["paths"].items() for method in item}
        self.assertEqual({(method, path.replace("{ID}", "ID")) for method, path in rows}, set(haineko.ENDPOINTS))
        schemas = found["components"]["schemas"]
        for cls in (haineko.Submission, haineko.Header, haineko.Attachment):
            self.assertEqual(set(schemas[cls.__name__]["properties"]), set(haineko.key_table(cls)))
        self.assertEqual(set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(found))), set(schemas))
        answer = found["paths"]["/submit"]["post"]["responses"]["default"]["content"]["application/json"]["schema"]
        self.assertEqual(set(answer["required"]), TOP)
        self.assertEqual(set(answer["properties"]["response"]["items"]["required"]), ITEM)


# ======================================================================================================================
# 18. HTTP
# ======================================================================================================================


CHUNKS = "POST /submit HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def in_chunks(octets: bytes, size: int = 7, tail: str = "0\r\n\r\n", extra: str = "") -> bytes:
    """A POST with a body in chunks."""
    parts = [octets[i : i + size] for i in range(0, len(octets), size)]
    chunks = [b"%x%b\r\n%b\r\n" % (len(part), extra.encode(), part) for part in parts]
    return CHUNKS.encode() + b"".join(chunks) + tail.encode()


def posting(*lines: str, body: str = "") -> bytes:
    """A POST with these header lines and nothing added."""
    return "\r\n".join(["POST /submit HTTP/1.1", "Host: x", *lines, "", body]).encode("latin-1")


REQUESTS = {  # (status, whether the connection goes on, words of the answer): requests
    (200, True, ""): [
        get("/neko", method="HEAD"), get("/neko", "Content-Length: 0"), get("/neko", host=""),
        b"\r\n\r\n" + get("/neko"), get("/neko", *["X: y"] * 99), get("/neko", "Connection: Keep-Alive", version="1.0"),
        get("/conf", host="127.0.0.1:2794"), post(None, "Origin: http://127.0.0.1").replace(b"x", b"127.0.0.1", 1),
        *[post(None, f"Content-Type: {kind}") for kind in ("application/x-www-form-urlencoded", "x; charset=x")],
        *[post(None, line) for line in ("Content-Encoding: identity", "Sec-Fetch-Site: same-origin")],
        in_chunks(as_body(document())), in_chunks(as_body(document()), extra=" ;a=b"),
        in_chunks(as_body(document()), tail="0\r\nX-Sum: 1\r\nY: 2\r\n\r\n"),
        in_chunks(as_body(document())).replace(b"chunked", b"CHUNKED")],
    (200, False, ""): [b"GET /neko HTTP/1.0\r\n\r\n", get("/neko", version="1.0"), get("/neko", "Connection: close")],
    (204, True, ""): [get(path, method="OPTIONS") for path in ("/submit", "/neko", "*")],
    (400, True, "Malformed JSON string"): [post(body) for body in (b"nyaa", b"", b"[" * 50000, b"9" * 9000)],
    (400, False, "GET takes no body"): [get("/neko", line) for line in (
        "Content-Length: 3\r\n\r\nabc", "Content-Length: 3000", "Transfer-Encoding: chunked")],
    (400, False, "Host"): [b"GET /neko HTTP/1.1\r\n\r\n", post().replace(b"Host: x\r\n", b""),
                           get("/neko", host="a b"), get("/neko", "Host: b.example")],
    (400, False, "chunk"): [(CHUNKS + text).encode() for text in (
        *[f"{size}\r\n{{}}\r\n0\r\n\r\n" for size in ("zz", "-2", "0x2", "000000002")],
        "2\r\n{}0\r\n\r\n", "2;" + "x" * 9000)],  # no end of a chunk, of its line
    (400, False, "Transfer-Encoding"): [CHUNKS.replace("1.1", "1.0").encode() + b"0\r\n\r\n"],
    (400, False, ""): [posting(*lines, body="{}") for lines in (
        ("Content-Length: 2", "Transfer-Encoding: chunked"), ("Transfer-Encoding: chunked", "Content-Length: 2"))],
    (400, False, "Content-Length"): [posting(f"Content-Length: {length}", body="{}") for length in (
        "2, 3", "2\r\nContent-Length: 3", "+2", "-2", "0x2", "two", "\xb2", "")],
    (400, False, "header line"): [get("/neko", line) for line in (
        "X: a\rb", "X: a\r", "X: a\0b", "X\0: a", "nothing", "Content-Length : 2", ": x", "X: a\r\n b", "X: y\nY:")],
    (400, False, "LF alone"): [b"GET /neko HTTP/1.1\nHost: x\n\n"],
    (400, False, "request line"): [get("/ne\0ko"), *[b"%b\r\n\r\n" % line for line in (
        b"nyaa", b"GET  /neko HTTP/1.1", b"GET /neko", b"GET /neko http/1.1")]],
    (403, True, "Cross-origin"): [post(None, "Sec-Fetch-Site: cross-site"), post(None, "Origin: null")],
    (403, True, ""): [get("/conf", host="rebound.example")],  # a web page whose name is now that of this machine
    (404, True, "Not found"): [get("/nothing"), post(path="/nothing")],
    (404, True, 'mean "/submit"?'): [post(path="/submit/")], (404, True, 'mean "/health"?'): [get("/helth")],
    (405, True, "GET method not supported"): [get("/submit"), get("/submit", method="HEAD")],
    (405, True, "NYAA method not supported"): [get("/", method="NYAA"), get("/submit", method="NYAA")],
    (405, True, "POST method not supported"): [post(path="/"), post(path="/neko")],
    (413, False, "too large"): [posting("Content-Length: 105537"), posting(f"Content-Length: {10**17}"),
                                CHUNKS.encode() + b"fffffff\r\n", in_chunks(bytes(200000), 50000)],
    (415, True, "Content-Encoding"): [post(None, "Content-Encoding: gzip")],
    (411, False, "Content-Length required"): [posting()], (417, True, "Expectation"): [post(None, "Expect: nyaa")],
    (431, False, "too large"): [
        CHUNKS.encode() + b"0\r\n" + b"X: y\r\n" * 200, get("/neko", *["X: y"] * 101), get("/" + "y" * 70000),
        get("/neko", "X: " + "y" * 70000), b"GET /neko HTTP/1.1\r\n" + b"X: y\r\n" * 20000],
    (501, False, "not implemented"): [
        posting(f"Transfer-Encoding: {coding}", body="{}") for coding in ("gzip, chunked", "gzip", "chunked, chunked")],
    (505, False, "version"): [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
}  # fmt: skip


class Http(Peers):
    @classmethod
    def setUpClass(cls) -> None:
        cls.gate = threading.Event()  # set: the next hop "gated" takes mail
        cls.next_hop = SmtpPeer({".": held(cls.gate)})
        cls.addClassCleanup(cls.next_hop.close)
        folder = tempfile.TemporaryDirectory(prefix="haineko-test-")
        cls.addClassCleanup(folder.cleanup)
        listen = ["127.0.0.1:0", f"unix:{folder.name}/socket", *(["[::1]:0"] if has_ipv6() else [])]
        more = {"trusted_proxies": ["::1", "10.0.0.0/8"], "allowed_origins": ["https://www.example.org"]}
        cls.server = Server({
            "httpd": {"listen": listen, "timeout": 1, **more}, "smtpd": {"hostname": NAME, "max_message_size": 20000},
            "relayhosts": {"relayhosts": ["127.0.0.1", "::1", "198.51.100.7"]},
            "mailertable": {**DEFAULTS["mailertable"], "gated.example.jp": esmtp(cls.next_hop, timeout=9)},
        })  # fmt: skip
        cls.addClassCleanup(cls.server.close)

    def tearDown(self) -> None:
        self.assertNotIn("Traceback", self.server.log())
        self.assertEqual(self.server.process.poll(), None)

    def has_form(self, found: dict, **wanted) -> None:
        """The form of every answer: nine keys at the top, nine in each item."""
        self.assertEqual((set(found), set(found["timestamp"])), (TOP, {"datetime", "unixtime"}))
        self.assertIsInstance(found["timestamp"]["unixtime"], str)
        for item in found["response"]:
            self.assertEqual((set(item), item["error"] in (0, 1)), (ITEM, True))
            self.assertRegex(item["code"], r"\A[245]\d\d\Z")
            self.assertTrue(item["message"] and all(type(line) is str for line in item["message"]))
        self.assertEqual({key: found["response"][0][key] for key in wanted}, wanted)

    def test_a_submission_is_answered_in_full(self) -> None:
        for i, agent in enumerate(("test/1", "n\xffy\xe7a")):  # by TCP, by a socket in the file system
            lines = f"User-Agent: {agent}", "Referer: \xe3\x81\xab"
            status, headers, found = self.server.ask(post(None, *lines), i=i)
            self.assertEqual((status, headers.pop("Content-Type")), (200, "application/json; charset=utf-8"))
            self.assertEqual(set(headers), {"Server", "Date", "Content-Length"})
            self.has_form(found, code="200", dsn="2.0.0", error=0, mailer="Discard", host=None, port=None)
            self.assertRegex(found["queueid"], r"\A[0-9A-Za-z]{16}\Z")
            self.assertEqual((found["remoteaddr"], found["referer"]), ("127.0.0.1", "に"))
            self.assertEqual((type(found["remoteport"]) is int, found["useragent"] == agent), (i == 0, i == 0))
            self.assertEqual((found["addresser"], found["recipient"]), (document()["mail"], document()["rcpt"]))

    def test_pages_and_samples_that_are_valid_submissions(self) -> None:
        pages = {"/": {"name": "Haineko", "version": haineko.__version__}, "/health": {"status": "ok"}}
        for path in (*pages, "/neko", "/neko?a=b", "http://x.example/neko"):
            wanted = pages.get(path, "Nyaaaaa")
            for method, body in (("GET", wanted), ("HEAD", "")):
                with self.subTest(path, method=method):
                    status, headers, found = self.server.ask(get(path, method=method), method)
                    self.assertEqual((status, found), (200, body))
                    kind, text = ("json", json.dumps(wanted) + "\n") if path in pages else ("text/plain", wanted)
                    self.assertIn(kind, headers["Content-Type"])
                    self.assertEqual(headers["Content-Length"], str(len(text)))
        _, _, samples = self.server.ask(get("/sample/mail"))
        self.assertTrue(any("html" in sample and "attachments" in sample for sample in samples))
        self.assertEqual({self.server.ask(post(sample))[0] for sample in samples}, {200})

    def test_the_last_answer_is_read_to_its_end_whatever_was_sent_behind(self) -> None:
        for first in (get("/neko", "Connection: close"), get("/neko", version="1.0"), b"x\r\n\r\n"):
            with self.subTest(first), self.server.wire() as wire:
                self.assertEqual(wire.ask(first + b"x" * 300000)[0], 400 if first[:1] == b"x" else 200)
                wire.sock.shutdown(socket.SHUT_WR)
                self.assertEqual(wire.sock.recv(1), b"")  # and no reset

    def test_an_end_of_lf_alone_is_told_wherever_the_packets_part(self) -> None:
        for end in (b"\n\n", b"\n\r\n"):
            octets = b"GET /neko HTTP/1.1\r\nHost: x" + end
            for at in range(len(octets) - 4, len(octets)):
                with self.subTest((end, at)), self.server.wire() as wire:
                    wire.send(octets[:at])
                    self.assertEqual(self.server.ask(get("/neko"))[0], 200)  # so these octets were read
                    status, _, found = wire.ask(octets[at:])
                    self.assertEqual((status, found["response"][0]["message"][1]), (400, "line ends with LF alone"))

    def test_requests_are_answered_and_the_connection_kept_or_closed(self) -> None:
        for (status, goes_on, words), octets in ((row, octets) for row, many in REQUESTS.items() for octets in many):
            with self.subTest(octets[:99], status=status), self.server.wire() as wire:
                method = "HEAD" if octets[:4] == b"HEAD" else ""
                found, headers, body = wire.ask(octets, method)
                self.assertEqual(found, status, body)
                if status >= 400 and not method:
                    self.has_form(body, command="HTTP", code="421")
                    self.assertIn(words, "\n".join(body["response"][0]["message"]))
                self.assertEqual(headers.get("Connection") != "close", goes_on)
                if status in (204, 405) and b" * " not in octets:
                    self.assertEqual(headers["Allow"], f"{'POST' if b' /submit ' in octets else 'GET, HEAD'}, OPTIONS")
                if goes_on:
                    self.assertEqual(wire.ask(get("/neko"))[2], "Nyaaaaa")
                else:
                    wire.sock.shutdown(socket.SHUT_WR)
                    self.assertTrue(wire.ended())

    def test_a_browsers_page_may_post_from_an_allowed_origin_only(self) -> None:
        line = "https://evil.example is not in httpd.allowed_origins"
        before = self.server.log().count(line)
        for origin, wanted in (("https://www.example.org", "https://www.example.org"), ("https://evil.example", None)):
            header = f"Origin: {origin}"
            asking = get("/submit", header, "Access-Control-Request-Method: POST", method="OPTIONS")
            for octets, status in ((asking, 204), (post(None, header), 200), (post(b"{", header), 400)):
                got, headers, found = self.server.ask(octets)
                self.assertEqual((got, headers.get("Access-Control-Allow-Origin")), (status if wanted else 403, wanted))
                self.assertEqual("POST" in headers.get("Access-Control-Allow-Methods", ""), bool(wanted))
                if not wanted:
                    self.assertEqual(found["response"][0]["message"][1:], [line])
        self.assertEqual(self.server.log().count(line), before + 3)

    def test_no_header_line_is_kept_in_memory(self) -> None:
        caches = [item for item in vars(haineko).values() if hasattr(item, "cache_info")]
        before = [item.cache_info() for item in caches]
        for name in ("Authorization", "Cookie", "X-Api-Key", "Proxy-Authorization"):
            haineko.parse_head(f"GET / HTTP/1.1\r\nHost: x\r\n{name}: Basic c2VjcmV0".encode())
        self.assertEqual([item.cache_info() for item in caches], before)

    def test_keep_alive_and_pipelining_and_the_log_has_what_a_client_has_been_told(self) -> None:
        queueids = set()
        with self.server.wire() as wire:
            for octet in post({"body": "x"}):
                wire.send(bytes([octet]))
            self.assertEqual(wire.answer()[0], 400)
            for submission in [document(), document(rcpt=["nobody"]), document()] * 5:
                queueids.add(wire.ask(post(submission))[2]["queueid"])
                self.assertTrue(all(f" {queueid}: " in self.server.log() for queueid in queueids))
            self.assertEqual(len(queueids), 15)
            wire.send(get("/neko") + post() + get("/nothing") + post(None, "Connection: close") + get("/neko"))
            answers = [wire.answer() for _ in range(4)]
            self.assertEqual([status for status, *_ in answers], [200, 200, 404, 200])
            self.assertEqual(answers[3][1]["Connection"], "close")
            self.assertTrue(wire.ended())

    def test_go_on_is_said_to_who_waits_for_it(self) -> None:
        head, _, body = post(None, "Expect: 100-continue").partition(b"\r\n\r\n")
        with self.server.wire() as wire:
            self.assertEqual(wire.ask(head + b"\r\n\r\n")[0], 100)
            self.assertEqual(wire.ask(body)[0], 200)
        for more in ("Content-Length: 999999", "Content-Length: 2, 3"):  # refused without a go-ahead
            self.assertIn(self.server.ask(posting("Expect: 100-continue", more))[0], (400, 413))

    def test_who_is_slow_or_idle_keeps_nobody_waiting_and_is_let_go_by_the_deadline(self) -> None:
        half = [b"GET /neko HT", posting("Content-Length: 100", body="{"), CHUNKS + "20\r\n{"]
        half += [b"POST /submit HTTP/1.1\r\n"] * 100
        wires = [(octets, self.server.wire().send(octets)) for octets in (get("/neko"), b"", *half)]
        wires[0][1].answer()
        with self.server.wire() as dribbling:
            began = time.monotonic()
            self.assertEqual(self.server.ask(post())[0], 200)
            self.assertLess(time.monotonic() - began, 0.9)
            for octet in get("/neko"):
                dribbling.send(bytes([octet]))
                if select.select([dribbling.sock], [], [], 0.1)[0]:
                    break
            self.assertLess(time.monotonic() - began, 3)
            self.assertEqual(dribbling.answer()[0], 408)
        for octets, wire in wires:
            with self.subTest(octets), wire:
                if octets in half:
                    status, _, found = wire.answer()
                    self.has_form(found, code="421", command="HTTP", message=["Request timeout"])
                    self.assertEqual(status, 408)
                self.assertTrue(wire.ended())
        self.assertLess(time.monotonic() - began, 5)

    def test_a_slow_next_hop_keeps_nobody_waiting_and_a_client_that_disappears_has_its_mail_delivered(self) -> None:
        self.addCleanup(self.gate.set)
        for count, linger in enumerate((None, b"\0" * 8, b"\1" + b"\0" * 7), 1):  # it stays; an end, a reset
            self.gate.clear()
            with self.server.wire() as wire:
                wire.send(post(document(rcpt=["a@gated.example.jp"])))
                eventually(lambda: self.next_hop.now, "the mail at its next hop")
                self.assertEqual(self.server.ask(post())[0], 200)
                if linger:
                    wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                else:
                    self.gate.set()
                    self.assertEqual(wire.answer()[0], 200)
            self.gate.set()
            eventually(lambda: not self.next_hop.now, "its reply")
            self.assertEqual(len(self.next_hop.mails), count)

    def test_the_client_behind_trusted_proxies_is_the_first_untrusted_from_the_right(self) -> None:
        if len(self.server.places) < 3:
            self.skipTest("no IPv6 here")
        good, bad = "198.51.100.7", "192.0.2.9"
        for i, forwarded, client, wanted in (  # 2: through ::1, which is trusted
            (2, good, good, 200), (2, bad, bad, 403), (2, f"{bad}, {good}", good, 200), (2, f"{good}, {bad}", bad, 403),
            (2, f"{bad}, {good}, 10.1.2.3", good, 200), (2, "10.1.2.3", "10.1.2.3", 403),
            (2, "127.0.0.1", "127.0.0.1", 200), (2, "nonsense", "::1", 400),  # must not pass for the proxy's own
            (2, f"{good}, nonsense, 10.1.2.3", "::1", 400), (2, f"nonsense, {good}", good, 200),
            (2, f"{good}:1234", good, 200), (2, "[2001:db8::1]:1234", "2001:db8::1", 403),
            (2, f"::ffff:{good}", good, 200), (2, None, "::1", 200),
            (0, bad, "127.0.0.1", 403), (0, "127.0.0.1", "127.0.0.1", 403),  # 127.0.0.1 is no trusted proxy
        ):  # fmt: skip
            with self.subTest(forwarded, i=i):
                lines = [f"X-Forwarded-For: {forwarded}"] if forwarded else []
                status, _, found = self.server.ask(post(None, *lines), i=i)
                self.assertEqual((status, found["remoteaddr"]), (wanted, client))
                if wanted == 403:
                    self.has_form(found, code="500", dsn="5.7.1", command="AUTH")
                    self.assertEqual(found["response"][0]["message"][0], "Access denied")

    def test_line_ends_behind_a_body_are_no_request(self) -> None:
        before, wires = self.server.log().count("Request timeout"), []
        for ends in (b"\r\n", b"\n", b"\r\n\r\n\r\n"):
            for together in (ends, b""):
                wires.append(self.server.wire().send(post() + together))
                self.assertEqual(wires[-1].answer()[0], 200)
                self.assertEqual(wires[-1].send(ends).ask(post())[0], 200)
                wires[-1].send(ends)
        for wire in wires:
            with wire:
                self.assertTrue(wire.ended())  # without a word
        self.assertEqual(self.server.log().count("Request timeout"), before)

    def test_line_ends_without_end_end_and_keep_nobody_waiting(self) -> None:
        def flood(sock) -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock.sendall(b"\r\n" * 32768)

        with self.server.wire() as wire:
            began, slowest = time.monotonic(), 0.0
            flooding = threading.Thread(target=flood, args=(wire.sock,))
            flooding.start()
            while flooding.is_alive() and time.monotonic() - began < 20:
                asked = time.monotonic()
                self.assertEqual(self.server.ask(get("/neko"))[0], 200)
                slowest = max(slowest, time.monotonic() - asked)
            self.assertFalse(flooding.is_alive(), "it goes on and on")
            flooding.join()
            self.assertLess(slowest, 1.0)


class HttpLogin(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        made = run_program("pw", "-u", "sabatora", given="sk\xf8yt\n".encode()).stdout.decode()
        hashes = {"kijitora": "{SSHA}9p2euyteR33mp0TYKjmYhTlIt1ctxuRn", **json.loads("{" + made + "}")}
        relayhosts, recipients = {"relayhosts": []}, {"domainpart": ["example.jp"]}
        cls.server = Server({"password": hashes, "relayhosts": relayhosts, "recipients": recipients})
        cls.addClassCleanup(cls.server.close)

    def test_who_logs_in_may_post(self) -> None:
        cases = (
            (None, 401),
            ("Basic", 401),
            ("Basic !!!", 401),
            ("Basic " + base64.b64encode(b"nocolon").decode(), 401),
            ("Bearer abc", 401),
            ("kijitora:wrong", 401),
            ("nobody:kijitora", 401),
            (":", 401),
            ("kijitora:", 401),
            ("sabatora:sk\xf8yt", 200),
            ("sabatora:skoyt", 401),
            ("kijitora:kijitora", 200),
            ("kijitora:kijitora", 200),
            ("kijitora:kijitora2", 401),
        )
        for credentials, wanted in cases:
            with self.subTest(credentials):
                basic = "Basic " + base64.b64encode((credentials or "").encode()).decode()
                line = f"Authorization: {basic if ':' in (credentials or '') else credentials}"
                lines = [line] if credentials else []
                status, headers, found = self.server.ask(post(None, *lines))
                self.assertEqual(status, wanted)
                self.assertEqual(headers.get("WWW-Authenticate", "").startswith("Basic realm="), wanted == 401)
                if wanted == 401:
                    [item] = found["response"]
                    self.assertEqual((item["code"], item["dsn"], item["command"]), ("535", "5.7.0", "AUTH"))
                    self.assertEqual((set(found), set(item)), (TOP, ITEM))
        self.assertNotIn("kijitora2", self.server.log())

    def test_the_second_time_costs_little(self) -> None:
        line = "Authorization: Basic " + base64.b64encode("sabatora:sk\xf8yt".encode()).decode()
        with self.server.wire() as wire:
            wire.ask(post(None, line))
            times = []
            for _ in range(5):
                began = time.monotonic()
                self.assertEqual(wire.ask(post(None, line))[0], 200)
                times.append(time.monotonic() - began)
        self.assertLess(min(times), 0.015)

    def test_a_login_opens_no_other_recipients(self) -> None:
        line = "Authorization: Basic " + base64.b64encode(b"kijitora:kijitora").decode()
        status, _, found = self.server.ask(post(document(rcpt=["a@example.net"]), line))
        self.assertEqual((status, found["response"][0]["dsn"]), (400, "5.7.1"))

    def test_other_pages_need_none_and_conf_masks_all(self) -> None:
        self.assertEqual(self.server.ask(get("/health"))[0], 200)
        status, _, found = self.server.ask(get("/conf", host="localhost"))
        self.assertEqual((status, set(found["password"].values())), (200, {"********"}))


def key_login(key: str, **fences) -> dict:
    return {"hash": "$sha256$" + hashlib.sha256(key.encode()).hexdigest(), **fences}


def bearer(key: str) -> str:
    return f"Authorization: Bearer {key}"


class KeysAndFences(Quiet):
    """Who may send as whom. A section or fence is absent, empty, or permits everything."""

    EMPTY, OPEN, ABSENT = (), "open", None

    def answer(self, force: haineko.Settings, *lines: str, client: str = "127.0.0.1", **changes) -> tuple:
        status, found = over_http(post(document(**changes), *lines), force, client)
        item = found["response"][0]
        return status, item["code"], item["message"][0]

    def test_relayhosts_password_fences_and_recipients(self):
        relayhosts = {self.ABSENT: None, self.EMPTY: {"relayhosts": []}, self.OPEN: {"open-relay": True}}
        recipients = {self.ABSENT: None, self.EMPTY: {}, self.OPEN: {"open-relay": True}}
        fences = {self.ABSENT: None, self.EMPTY: [], self.OPEN: ["example.org", "example.jp"]}
        for hosts, rcpt, password, senders, to, client in itertools.product(
            relayhosts, recipients, ("absent", "empty", "wrong", "right"), fences, fences, ("127.0.0.1", "192.0.2.1")
        ):
            login = {"senders": fences[senders], "recipients": fences[to]}
            sections = {"relayhosts": relayhosts[hosts], "recipients": recipients[rcpt]}
            sections["password"] = {"absent": None, "empty": {}}.get(password, {"k": key_login("hk_1", **login)})
            with self.subTest(hosts=hosts, rcpt=rcpt, password=password, senders=senders, to=to, client=client):
                known = client == "127.0.0.1" if hosts is self.ABSENT else hosts is self.OPEN
                logged_in = password in ("wrong", "right")
                wanted = 200 if rcpt is self.OPEN else 400
                if logged_in and to is self.EMPTY:
                    wanted = 400
                if logged_in and senders is self.EMPTY:
                    wanted = 403
                if password == "wrong":
                    wanted = 401
                elif not logged_in and not known:
                    wanted = 403
                line = bearer("hk_2" if password == "wrong" else "hk_1")
                self.assertEqual(self.answer(settings(**sections), line, client=client)[0], wanted)

    def test_how_a_key_is_given(self):
        key = run_here("key", "cron", "--prefix", "hk_")[1].split()[0]
        self.assertRegex(key, "^hk_[0-9A-Za-z]{49}$")
        self.assertEqual(key[-6:], haineko._base62(binascii.crc32(key[3:-6].encode())))
        force = settings(password={"cron": key_login(key), "neko": SettingsFile.KIJITORA})
        basic = "Authorization: Basic {}".format
        cases = [
            (bearer(key), True), (f"Authorization: bearer  {key}", True), (f"X-Postmark-Server-Token: {key}", True),
            (basic(base64.b64encode(f"cron:{key}".encode()).decode()), True),
            (basic(base64.b64encode(f"apikey:{key}".encode()).decode()), True),
            (basic(base64.b64encode(f"{key}:".encode()).decode()), False),
            (bearer(key[:-1]), False), (bearer(""), False), (f"Authorization: Token {key}", False),
            (bearer(key_login(key)["hash"]), False), (bearer("kijitora"), False),
            (basic(base64.b64encode(b"cron:").decode()), False),
        ]  # fmt: skip
        for line, right in cases:
            with self.subTest(line):
                self.logged()
                self.assertEqual(self.answer(force, line)[0], 200 if right else 401)
                self.assertIn("login=cron" if right else "reason=", self.logged()[-1])

    def test_senders(self):
        fence = ["a@example.org", "Example.JP", ".example.net"]
        force = settings(password={"k": key_login("hk_1", senders=fence)})
        raw = "From: {}\nTo: b@example.jp\nSubject: x\n\nx\n".format
        cases = [
            ("a@example.org", None, None, ""), ("A@Example.org", None, None, ""), ("b@example.org", None, None, "b@"),
            ("x@example.jp", None, None, ""), ("x@sub.example.jp", None, None, "x@"),
            ("x@a.b.example.net", None, None, ""),
            ("x@example.net", None, None, "x@"), ("x@notexample.jp", None, None, "x@"),
            ("x@example.jp", "A <a@example.org>", None, ""), ("x@example.jp", "B <b@example.org>", None, "b@"),
            ("x@example.jp", "a@example.org, b@example.org", None, "b@"),
            ("b@example.org", "a@example.org", None, "b@"),
            ("x@example.jp", "a@example.org <b@example.org>", None, "b@"),
            ("x@example.jp", None, raw("a@example.org"), ""), ("x@example.jp", None, raw("B <b@example.org>"), "b@"),
            ("x@example.jp", None, raw("a@example.org\nSender: b@example.org"), "b@"),
            ("x@example.jp", None, raw("a@example.org\nFrom: b@example.org"), "b@"),
            ("x@example.jp", None, raw("a@example.org,\n b@example.org"), "b@"),
            ("x@example.jp", None, raw("nobody"), "a From or Sender"),
            ("x@example.jp", None, raw("g:;"), "a From or Sender"),
            ("x@example.jp", None, "To: b@example.jp\n\nx\n", ""),
        ]  # fmt: skip
        for mail, author, raw_message, refused in cases:
            with self.subTest(mail=mail, author=author, raw=raw_message):
                if raw_message:
                    given = {"mail": mail, "rcpt": ["m@example.jp"], "raw": raw_message}
                else:
                    given = document(mail=mail, header={"from": author})
                status, found = over_http(post(given, bearer("hk_1")), force)
                item = found["response"][0]
                if not refused:
                    self.assertEqual(status, 200)
                    continue
                self.assertEqual((status, item["code"], item["dsn"], item["command"]), (403, "553", "5.7.1", "MAIL"))
                self.assertEqual(item["message"][0], "Sender address is not permitted")
                self.assertTrue(item["message"][1].startswith(refused), item)
                self.assertIn("password.k.senders", item["message"][1])

    def test_recipients_one_by_one(self):
        force = settings(password={"k": key_login("hk_1", recipients=["ops@example.jp"])})
        given = document(rcpt=["ops@example.jp", "other@example.jp"])
        status, found = over_http(post(given, bearer("hk_1")), force)
        self.assertEqual((status, found["recipient"]), (207, ["ops@example.jp"]))
        refused = found["response"][1]
        self.assertEqual((refused["code"], refused["dsn"], refused["command"]), ("553", "5.7.1", "RCPT"))
        self.assertIn("password.k.recipients", refused["message"][1])

    def test_expiry_and_networks_are_told_to_the_log_only(self):
        cases = [
            ({"expires": "2001-01-31"}, "expired"), ({"expires": "2999-01-31T12:00:00Z"}, ""),
            ({"expires": "2001-01-31T12:00:00+09:00"}, "expired"), ({"networks": ["192.0.2.0/24"]}, "networks"),
            ({"networks": []}, "networks"), ({"networks": ["127.0.0.1"]}, ""),
        ]  # fmt: skip
        for fences, reason in cases:
            with self.subTest(fences):
                force = settings(password={"k": key_login("hk_1", **fences)})
                self.logged()
                status, found = over_http(post(None, bearer("hk_1")), force)
                self.assertEqual(status, 401 if reason else 200)
                if reason:
                    self.assertEqual(found["response"][0]["message"], ["authentication failed"])
                    self.assertIn(reason, self.logged()[-1])

    def test_settings_of_a_login(self):
        hashed = key_login("hk_1")["hash"]
        cases = [
            ({"k": {"hash": hashed, "senders": "example.org", "rate": "1/60"}}, None),
            ({"k": {"senders": []}}, "password.k.hash: expected"), ({"k": {"hash": "x"}}, "password.k.hash: expected"),
            ({"k": {"hash": hashed, "sender": []}}, "password.k.sender: unknown"),
            ({"k": {"hash": hashed, "senders": ["@"]}}, "password.k.senders[0]: expected an address"),
            ({"k": {"hash": hashed, "rate": "0/60"}}, "password.k.rate: expected"),
            ({"k": {"hash": hashed, "rate": 60}}, "password.k.rate: expected"),
            ({"k": {"hash": hashed, "expires": "soon"}}, "password.k.expires: expected"),
            ({"k": 5}, "password.k: expected a string"),
        ]  # fmt: skip
        for section, wanted in cases:
            with self.subTest(section):
                errors: list = []
                haineko.from_dict(haineko.Settings, {"password": section}, "", errors)
                self.assertTrue(errors[0].startswith(wanted) if wanted else not errors, errors)
                self.assertEqual(len(errors), int(bool(wanted)), errors)
        shown = haineko.redacted(settings(password=cases[0][0]).password)
        self.assertEqual(
            {key: shown["k"][key] for key in ("hash", "senders", "rate")},
            {"hash": "********", "senders": ["example.org"], "rate": "1/60"},
        )
        self.assertEqual(haineko.redacted(settings(password={"k": hashed}).password), {"k": "********"})

    def test_the_command_key(self):
        done = run_program(
            "key", "cron", "--sender", "example.org", "--rate", "2/60", "--prefix", "sk_live_", text=True
        )
        key, line = done.stdout.splitlines()
        self.assertTrue(key.startswith("sk_live_"))
        section = json.loads("{" + line + "}")
        self.assertEqual(section, {"cron": key_login(key, senders=["example.org"], rate="2/60")})
        self.assertEqual(self.answer(settings(password=section), bearer(key))[0], 200)
        for flags in (("--rate", "x"), ("--sender", "@"), ("--expires", "soon"), ("--prefix", "a b"), ("--prefix", "")):
            self.assertEqual(run_program("key", "cron", *flags).returncode, 2, flags)

    def test_nothing_leaves_the_sandbox(self):
        with tempfile.TemporaryDirectory() as folder:
            force = settings(
                password={"k": key_login("hk_1", sandbox=True)}, mailertable={"default": {"mailer": folder}}
            )
            status, found = over_http(post(None, bearer("hk_1")), force)
            self.assertEqual((status, found["response"][0]["mailer"]), (200, "Discard"))
            self.assertEqual(self.answer(force, bearer("hk_1"), mail="")[0], 400)
            self.assertEqual(os.listdir(folder), [])


class KeysServed(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.peer = SmtpPeer()
        cls.addClassCleanup(cls.peer.close)
        fences = {"a": {}, "b": {}, "slow": {"rate": "3/3600"}, "box": {"sandbox": True}}
        force = queue_settings(cls.peer)
        force["password"] = {name: key_login(f"hk_{name}", **fence) for name, fence in fences.items()}
        force["password"]["neko"] = SettingsFile.KIJITORA
        force["httpd"] = {"workers": 2, "monitors": ["192.0.2.1"]}
        cls.server = Server(force)
        cls.addClassCleanup(cls.server.close)

    def submit(self, key: str, *to: str, **headers: str) -> tuple:
        headers = {"Authorization": f"Bearer hk_{key}", **headers}
        return self.server.submit(*(to or ("m@example.jp",)), headers=headers)

    def test_a_login_sees_its_own_mail_only(self):
        _, headers, _ = self.submit("a", Prefer="respond-async")
        for line, wanted in ((bearer("hk_a"), 200), (bearer("hk_b"), 403), (bearer("hk_c"), 401), ("X: y", 401)):
            with self.subTest(line):
                self.assertEqual(self.server.get(headers["Location"], line)[0], wanted)

    def test_an_idempotency_key_counts_for_its_login(self):
        first, again, other = (self.submit(key, **{"Idempotency-Key": "k1"}) for key in ("a", "a", "b"))
        self.assertEqual(first[2]["queueid"], again[2]["queueid"])
        self.assertNotEqual(first[2]["queueid"], other[2]["queueid"])
        self.assertEqual([found[0] for found in (first, again, other)], [200, 200, 200])

    def test_a_rate_counts_recipients_over_all_workers(self):
        status, headers, _ = self.submit("slow", "a@example.jp", "b@example.jp")
        self.assertEqual((status, headers["ratelimit-remaining"]), (200, "1"))
        self.assertEqual(self.server.submit(headers={"Authorization": "Bearer hk_slow"}, sender="")[0], 400)
        self.assertEqual(self.submit("slow", "a@example.jp", "b@example.jp")[0], 429)
        self.assertEqual(self.submit("slow", "a@example.jp")[0], 200)
        status, headers, found = self.submit("slow", "a@example.jp")
        item = found["response"][0]
        self.assertEqual((status, item["code"], item["dsn"], item["command"]), (429, "450", "4.7.1", "AUTH"))
        self.assertEqual(item["message"][0], "Rate limit exceeded")
        self.assertEqual(headers["RateLimit-Policy"], '"default";q=3;w=3600')
        self.assertRegex(headers["RateLimit"], '^"default";r=0;t=3[56][0-9][0-9]$')
        self.assertEqual((headers["ratelimit-limit"], headers["ratelimit-remaining"]), ("3", "0"))
        self.assertTrue(1100 < int(headers["Retry-After"]) <= 1200, headers)

    def test_wrong_logins_are_slowed(self):
        force = {"password": {"k": key_login("hk_k"), "neko": SettingsFile.KIJITORA}, "httpd": {"workers": 2}}
        server = served(self, force)
        found = [server.ask(post(None, bearer("hk_x")))[0] for _ in range(12)]
        self.assertEqual(found, [401] * 10 + [429] * 2)
        status, headers, _ = server.ask(post(None, bearer("hk_x")))
        self.assertTrue(status == 429 and 50 < int(headers["Retry-After"]) <= 60, headers)
        right = "Authorization: Basic " + base64.b64encode(b"neko:kijitora").decode()
        for line, wanted in ((bearer("hk_k"), 200), (right, 200), ("X: y", 401), (bearer("hk_y"), 429)):
            self.assertEqual(server.ask(post(None, line))[0], wanted, line)

    def test_queued_mail_of_a_sandbox_stays_there(self):
        _, headers, _ = self.submit("box", "box@example.jp", Prefer="respond-async")
        own = bearer("hk_box")
        eventually(lambda: self.server.get(headers["Location"], own)[1]["response"][0]["state"] == "delivered")
        self.assertNotIn("box@example.jp", [to for mail in self.peer.mails for to in mail.recipients])

    def test_a_warning_of_logins_in_clear_text(self):
        for listen, more, warned in (
            ("0.0.0.0:0", {}, True), ("127.0.0.1:0", {}, False),
            ("0.0.0.0:0", {"trusted_proxies": ["10.0.0.0/8"]}, False),
        ):  # fmt: skip
            with self.subTest(listen, **more):
                server = served(self, {"password": {"k": key_login("hk_k")}, "httpd": {"listen": listen, **more}})
                self.assertEqual("without TLS" in server.log(), warned)
                server.close()

    def test_the_start_warns_of_what_lets_strangers_in(self):
        server = served(self, {"httpd": {"listen": "127.0.0.1:0", "trusted_proxies": ["0.0.0.0/0"]}})
        self.assertIn("haineko: warning: httpd.trusted_proxies: 0.0.0.0/0 lets every client", server.log())
        server.close()


class HttpOverTls(unittest.TestCase):
    def start(self, timeout: int = 1) -> tuple:
        """(a server, what its clients trust)."""
        pem = certificate()
        server = served(self, {"httpd": {"tls": {"certificate": pem, "key": pem}, "timeout": timeout}})
        self.addCleanup(lambda: self.assertNotIn("Traceback", server.log()))
        return server, ssl.create_default_context(cafile=pem)

    def test_the_same_over_tls_and_nothing_without(self) -> None:
        server, context = self.start()
        self.assertTrue(server.urls[0].startswith("https://"))
        silent = server.wire()
        with server.wire() as clear, contextlib.suppress(ConnectionResetError):
            self.assertNotIn(b"HTTP/1.1 200", clear.send(get("/neko")).sock.recv(100))
        with server.wire(0, context) as wire:
            self.assertEqual(wire.ask(post())[0], 200)
            wire.send(post() + post(document(body="x" * 100000)))
            self.assertEqual([wire.answer()[0] for _ in range(2)], [200, 200])
            self.assertIn(wire.sock.version(), ("TLSv1.2", "TLSv1.3"))
        with silent:
            self.assertTrue(silent.ended())

    def test_every_connection_ends_with_the_closure_alert_of_tls(self) -> None:
        for timeout, octets in (  # closed behind an answer, refused, closed with a body unread, idle; stopped
            (1, get("/neko", "Connection: close")), (1, b"rubbish\r\n\r\n"),
            (1, get("/neko", "Connection: close") + b"x" * 9000), (1, b""), (30, get("/neko")),
        ):  # fmt: skip
            if octets in (get("/neko", "Connection: close"), get("/neko")):
                server, context = self.start(timeout)
            with self.subTest(octets[:99]), server.wire(), server.wire() as wire:  # a silent one delays no end
                wire.sock = context.wrap_socket(wire.sock, server_hostname="localhost", suppress_ragged_eofs=False)
                if octets:
                    wire.ask(octets)
                if timeout == 30:
                    server.process.terminate()
                self.assertTrue(wire.ended())  # or an SSLEOFError
                if timeout == 30:
                    self.assertEqual(server.process.wait(9), 0)


class Workers(Peers):
    def gated(self, setup: str = "", **httpd) -> tuple:
        """(an event, a next hop that takes mail when it is set, a server with that next hop)."""
        gate = threading.Event()
        peer = self.peer({".": held(gate)})
        routes = {"default": esmtp(peer, timeout=9), "example.net": {"mailer": "Discard"}}
        server = served_after(self, setup, {"httpd": httpd, "mailertable": routes})
        self.addCleanup(gate.set)
        return gate, peer, server

    def test_of_settings_that_are_read_at_once_the_last_ones_count(self) -> None:
        server = served(self, {})
        worker = lone_worker(haineko.load_settings(server.path)[0])
        self.addCleanup(worker.loop.close)
        server.write({"mailertable": {f"{i}.example": {"mailer": "Discard"} for i in range(5000)}})

        async def story() -> None:
            worker.reloading = asyncio.Lock()
            first = asyncio.ensure_future(worker._reread())
            await asyncio.sleep(0)  # its thread reads the large ones
            server.write({"mailertable": {"default": {"mailer": "Screen"}}})
            await asyncio.gather(worker._reread(), first)
            self.assertEqual(list(worker.app.settings.mailertable), ["default"])
            worker.app = None  # a fault of our own: the next one is not the last
            with self.assertRaises(AttributeError):
                await worker._reread()
            self.assertFalse(worker.reloading.locked())

        worker.loop.run_until_complete(story())

    def test_past_max_connections_the_idlest_goes_or_each_is_told_so_and_the_log_too(self) -> None:
        gate, peer, server = self.gated(max_connections=3)
        with contextlib.ExitStack() as stack:
            busy = [stack.enter_context(server.wire()) for _ in range(3)]
            for wire in (*busy, busy[0]):  # now the second is the idlest
                self.assertEqual(wire.ask(get("/neko"))[0], 200)
            self.assertEqual(server.ask(get("/neko"))[0], 200)
            self.assertTrue(busy[1].ended())
            self.assertEqual(busy[2].ask(get("/neko"))[0], 200)
            busy[1] = stack.enter_context(server.wire())
            for wire in busy:
                wire.send(post())
            eventually(lambda: peer.now == 3, "three mails at their next hop")
            crowd = [stack.enter_context(server.wire()) for _ in range(haineko.MAX_LINGERING_503 + 6)]
            for wire in crowd:
                status, headers, found = wire.answer()
                self.assertEqual((status, set(found), "Retry-After" in headers), (503, TOP, True))
                self.assertEqual(found["response"][0]["message"], ["Too many connections"])
            for wire in crowd:
                wire.close()
            self.assertEqual(server.log().count("status=rejected (421 Too many connections)"), len(crowd))
            eventually(lambda: server.ask(get("/neko"))[0] == 503, "room for words")
            gate.set()
            self.assertEqual([wire.answer()[0] for wire in busy], [200] * 3)
            self.assertEqual(server.ask(get("/neko"))[0], 200)

    def test_half_open_connections_make_room_and_half_a_head_delays_no_end(self) -> None:
        half, body = get("/neko")[:-1], posting("Content-Length: 100", body="{")
        for octets in (b"", half, body, CHUNKS + "20\r\n{", get("/neko", "Content-Length: 99")):
            server = served(self, {"httpd": {"max_connections": 20, "timeout": 30 if octets == half else 5}})
            with self.subTest(octets), contextlib.ExitStack() as stack:
                for _ in range(91):
                    stack.enter_context(server.wire()).send(octets)
                self.assertEqual(server.ask(post())[0], 200)
                self.assertNotRegex(server.log(), "Traceback|starting a new one")
                server.process.terminate()
                self.assertEqual(server.process.wait(9), 0)

    def test_who_sends_gives_way_after_who_does_not(self) -> None:
        server = served(self, {"httpd": {"max_connections": 4}})
        body = as_body(document(body="x" * 4000))
        with contextlib.ExitStack() as stack:
            wires = [stack.enter_context(server.wire()) for _ in range(4)]
            for wire, part in zip(wires, (body[:3000].decode(), "{", "{", "{")):
                wire.send(posting(f"Content-Length: {len(body)}", "Expect: 100-continue", body=part))
                self.assertIn(b"100 Continue", wire.sock.recv(100))  # the server has read the part
            self.assertEqual([server.ask(get("/neko"))[0] for _ in range(12)], [200] * 12)
            self.assertEqual(wires[0].ask(body[3000:])[0], 200)

    def test_connections_of_one_address_give_way_first(self) -> None:
        worker = lone_worker(settings(httpd={"max_connections": 8}))
        self.addCleanup(worker.loop.close)
        cases = (  # address, port (None: Unix socket), octets, seconds; in the order in which they give way
            ("192.0.2.2", 5, 8000, 9), ("", None, 0, 9), ("192.0.2.1", 5, 10, 9), ("", None, 0, 8),
            ("", None, 8000, 9), ("192.0.2.2", 5, 9000, 9), ("192.0.2.2", 5, 9000, 1),
        )  # fmt: skip

        async def story() -> None:
            tasks = []
            for address, port, octets, seconds in cases:
                here, there = socket.socketpair()
                self.addCleanup(here.close)
                there.setblocking(False)
                one = haineko.Connection(there, (address, port) if port else address, worker)
                one.received, one.begun = octets, time.monotonic() - seconds
                worker.connections[one] = None
                worker.per_address[one.peer] += 1
                tasks.append(asyncio.ensure_future(one.handle()))
            for i in range(len(cases)):
                await asyncio.sleep(0.01)
                self.assertEqual([task.done() for task in tasks], [done < i for done in range(len(cases))])
                self.assertTrue(worker._close_one())
            await asyncio.wait(tasks)
            self.assertFalse(worker._close_one())

        worker.loop.run_until_complete(story())

    def test_octets_in_flight_are_bounded(self) -> None:
        server = served(self, {"httpd": {"timeout": 20}})
        part = posting("Content-Length: 8000000", body="{") + b" " * 7990000
        with contextlib.ExitStack() as stack:
            wires, statuses = [stack.enter_context(server.wire()).send(part) for _ in range(9)], set()
            for wire in wires:
                wire.sock.settimeout(1)
                with contextlib.suppress(OSError):
                    statuses.add(wire.answer()[0])
            self.assertEqual(statuses, {503})
            self.assertEqual(server.ask(post())[0], 200)
        eventually(lambda: "Too many octets in flight" in server.log())

    def test_a_worker_that_dies_is_replaced_and_the_other_goes_on(self) -> None:
        gate, peer, server = self.gated(workers=2)
        before = eventually(lambda: len(server.workers()) == 2 and server.workers(), "two workers")
        elsewhere = post(document(rcpt=["a@example.net"]))
        with server.wire() as wire:
            queueid = wire.ask(elsewhere)[2]["queueid"]
            [other] = before - {int(re.search(rf"haineko\[(\d+)\]: {queueid}", server.log())[1])}
            wire.send(post())
            eventually(lambda: peer.now, "the mail at its next hop")
            os.kill(other, signal.SIGKILL)
            eventually(lambda: len(server.workers() - before) == 1, "a new worker")
            self.assertEqual(len(server.workers() - {other}), 2)
            self.assertEqual([server.ask(elsewhere)[0] for _ in range(8)], [200] * 8)
            gate.set()
            self.assertEqual(wire.answer()[0], 200)
        self.assertIn(f"worker {other} ended (signal 9)", server.log())

    def test_a_stopping_server_answers_what_is_in_flight(self) -> None:
        select = "import selectors; selectors.DefaultSelector = selectors.SelectSelector"  # a system without epoll
        for number, setup in ((signal.SIGTERM, ""), (signal.SIGINT, ""), (signal.SIGTERM, select)):
            with self.subTest(number, setup=setup), contextlib.ExitStack() as stack:
                gate, peer, server = self.gated(setup, workers=2)
                idle, half, wire = [stack.enter_context(server.wire()) for _ in range(3)]
                half.send(get("/health")[:-1])
                self.assertEqual(idle.ask(get("/health"))[0], 200)
                wire.send(post())
                eventually(lambda: peer.now, "the mail at its next hop")  # noqa: B023 -- called here
                server.process.send_signal(number)
                self.assertTrue(idle.ended())
                self.assertEqual(half.ask("\n")[::2], (503, {"status": "stopping"}))
                self.assertRaises(OSError, eventually, lambda: server.wire().close())  # noqa: B023
                self.assertIsNone(server.process.poll())
                gate.set()
                status, headers, _ = wire.answer()
                self.assertEqual((status, headers["Connection"]), (200, "close"))
                self.assertEqual(server.process.wait(15), 0)
                eventually(lambda: peer.lines[-1] == "QUIT")  # noqa: B023

    def test_a_log_that_nobody_reads_costs_no_mail(self) -> None:
        command = [sys.executable, LAUNCHER, "serve", "-c", served(self, {}).path]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment())
        for cleanup in (server.stderr.close, server.wait, server.kill):
            self.addCleanup(cleanup)
        seen, slow = b"", 0
        while b" listens at " not in seen:
            seen += os.read(server.stderr.fileno(), 4096)
        with HttpClient(place_of(re.search(rb"http://\S+", seen)[0].decode())) as wire:
            for _ in range(900):  # more than a pipe holds
                began = time.monotonic()
                self.assertEqual(wire.ask(post())[0], 200)
                slow += time.monotonic() - began > 0.5
            self.assertLess(slow, 3)
            os.set_blocking(server.stderr.fileno(), False)
            while b"lines were lost" not in seen:
                self.assertEqual(wire.ask(post())[0], 200)
                with contextlib.suppress(BlockingIOError):
                    seen = seen[-99:] + os.read(server.stderr.fileno(), 65536)
            server.terminate()
            self.assertEqual(server.wait(9), 0)

    def test_a_signal_right_after_the_start_is_not_overheard_and_workers_do_not_outlive_their_master(self) -> None:
        for _ in range(3):
            server = served(self, {"httpd": {"workers": 4}})
            server.process.terminate()
            self.assertEqual(server.process.wait(15), 0)
            self.assertNotIn("Traceback", server.log())
        server.start()
        workers = eventually(lambda: len(server.workers()) == 4 and server.workers())
        server.process.kill()
        running = f"ps -o stat= -p {','.join(map(str, workers))} | grep -q '^[^Z]'"
        eventually(lambda: subprocess.run(running, shell=True, check=False).returncode == 1, "an end of the workers")

    def test_settings_are_read_again_when_they_change_or_on_sighup(self) -> None:
        server = served(self, {"httpd": {"workers": 2, "timeout": 20}})
        whole, wires, found = post(document(rcpt=["a@example.net"])), [], set()
        begun = server.wire().send(whole[:-20])
        self.addCleanup(begun.close)
        workers = eventually(lambda: len(server.workers()) == 2 and server.workers())
        while found != workers:  # a connection to each of them
            self.assertLess(len(wires), 300)
            wires.append(server.wire())
            self.addCleanup(wires[-1].close)
            queueid = wires[-1].ask(post())[2]["queueid"]
            found.add(int(re.search(rf"haineko\[(\d+)\]: {queueid}", server.log())[1]))
        codes = lambda: {wire.ask(whole)[2]["response"][0]["code"] for wire in wires}  # noqa: E731
        self.assertEqual(codes(), {"200"})
        closed = {"httpd": {"workers": 2, "timeout": 20}, "recipients": {"domainpart": ["example.jp"]}}
        server.write(closed)
        eventually(lambda: codes() == {"553"}, "the new settings in all workers")
        self.assertEqual(begun.ask(whole[-20:])[0], 200, "a request that began before uses one set to its end")
        server.write({"recipients": {"domainparts": ["x"]}, "mailertable": {"default": {"mailer": "ESNTP"}}})
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: "reload failed" in server.log(), "a word about the faults")
        self.assertIn('recipients.domainparts: unknown key; did you mean "domainpart"?', server.log())
        self.assertIn('mailertable.default.mailer: unknown relay type "ESNTP"; did you mean "ESMTP"?', server.log())
        self.assertEqual(codes(), {"553"})
        server.write({**closed, "recipients": {"open-relay": 1}})
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: codes() == {"200"}, "the newest settings in all workers")
        self.assertIn("reloaded ", server.log())
        aside = os.path.join(server.folder, "login.json")
        server.write({**closed, "authinfo": "login.json"})
        eventually(lambda: "No such file" in server.log(), "a fault")
        with open(aside, "w") as stream:
            os.chmod(aside, 0o644)
            stream.write('{"x": {"username": "u", "password": "n-y-a-a"}}')
        eventually(lambda: "chmod 600" in server.log(), "a fault: everybody can read it")
        self.assertEqual(codes(), {"200"})
        os.chmod(aside, 0o600)
        eventually(lambda: codes() == {"553"}, "the settings that are mended")
        self.assertNotRegex(server.log(), "n-y-a-a|starting a new one")


# ======================================================================================================================
# 19. Commands
# ======================================================================================================================


class MetricsServed(Peers):
    def metrics(self, server: Server) -> dict:
        """{series: value}"""
        status, headers, text = server.ask(get("/metrics"))
        self.assertEqual((status, headers["Content-Type"]), (200, "text/plain; version=0.0.4; charset=utf-8"))
        series = r"[a-z_]+(?:\{[a-z_]+=\"[^\"]*\"(?:,[a-z_]+=\"[^\"]*\")*\})?"
        comment = r"# (?:HELP [a-z_]+ .+|TYPE [a-z_]+ (?:counter|gauge|histogram))"
        self.assertRegex(text, rf"\A(?:(?:{series} -?[\d.]+(?:e[+-]\d+)?|{comment})\n)+\Z")
        pairs = [line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#"]
        self.assertEqual(len({name for name, _ in pairs}), len(pairs))
        return {name: float(value) for name, value in pairs}

    def test_all_of_it(self) -> None:
        replies = {"no": "550 5.1.1 no", "later": "451 4.0.0 later"}
        peer = self.peer({"RCPT": lambda _, line: replies.get(line[9:].split("@")[0])})
        force = {"mailertable": {"default": esmtp(peer)}, "smtpd": {"max_rcpts_per_message": 4}}
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        server = served(self, force, before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard)))
        names = {
            **{f'http_requests_total{{endpoint="/submit",status="{status}"}}': 1 for status in (200, 207, 400)},
            'http_requests_total{endpoint="other",status="404"}': 1,
            **{f'rejections_total{{reason="{reason}"}}': 1 for reason in ("invalid", "not-found")},
            **{f'replies_total{{relay="ESMTP",class="{digit}"}}': 2 if digit == 2 else 1 for digit in (2, 4, 5)},
            **{f'recipients_total{{relay="ESMTP",outcome="{outcome}"}}': 2 if outcome == "accepted" else 1
               for outcome in ("accepted", "refused", "deferred")},
        }  # fmt: skip
        counted = lambda found: {name: found.get(f"haineko_{name}") for name in names}  # noqa: E731
        first = self.metrics(server)
        self.assertEqual(counted(first), dict.fromkeys(names, 0))
        for relay in haineko.RELAYS:
            self.assertEqual(first[f'haineko_delivery_seconds_bucket{{relay="{relay}",le="+Inf"}}'], 0)
        self.assertEqual((first["haineko_reload_success"], first["haineko_workers_restarted_total"]), (1, 0))
        for name in ("cpu_seconds_total", "start_time_seconds", "virtual_memory_bytes", "resident_memory_bytes"):
            self.assertGreater(first[f"process_{name}"], 0)
        self.assertEqual(first["process_max_fds"], max(64, min(hard, 65536)))
        self.assertEqual(first["process_open_fds"], len(os.listdir(f"/proc/{server.process.pid}/fd")))
        self.assertEqual(first[f'haineko_build_info{{version="1.0.0",python="{sys.version.split()[0]}"}}'], 1)
        server.submit("a@example.jp")
        server.submit("a@example.jp", "no@example.jp", "later@example.jp")
        server.ask(post("{"))
        server.ask(get("/nowhere"))
        found = self.metrics(server)
        self.assertEqual(counted(found), names)
        self.assertEqual(found["haineko_http_request_seconds_count"], 5)
        self.assertIn('haineko_connections{state="busy"}', found)
        os.kill(*server.workers(), signal.SIGKILL)
        eventually(lambda: "starting a new one" in server.log())
        again = self.metrics(server)
        self.assertEqual((counted(again), again["haineko_workers_restarted_total"]), (names, 1))
        server.write({"smtpd": {"max_workers": -1}})
        eventually(lambda: "reload failed" in server.log())
        self.assertEqual(self.metrics(server)["haineko_reload_success"], 0)
        server = served(self, {**force, "queue": {"path": "q.db"}})
        self.assertEqual(server.submit("later@example.jp")[0], 202)
        found = self.metrics(server)
        for name in ('queue_recipients{state="waiting"}', 'recipients_total{relay="ESMTP",outcome="queued"}'):
            self.assertEqual(found[f"haineko_{name}"], 1)
        self.assertGreaterEqual(found["haineko_queue_oldest_seconds"], 0)
        self.assertGreater(found["haineko_queue_disk_free_bytes"], 0)


class LogServed(Peers):
    def test_without_environment(self) -> None:
        server = served_after(self, "os.environ.clear()", None, "--listen", "127.0.0.1:0")
        self.assertEqual(server.submit("a@example.jp")[0], 200)

    def test_json(self) -> None:
        server = served(self, {"smtpd": {"log": "json"}})
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        status, headers, answer = server.ask(post(None, "X-Request-Id: cat-1", f"traceparent: {trace}"))
        self.assertEqual((status, headers["X-Request-Id"]), (200, "cat-1"))
        status, headers, refused = server.ask(post("{", "X-Request-Id: cat 2", "traceparent: 00-cat"))
        self.assertEqual((status, "X-Request-Id" in headers), (400, False))
        self.assertEqual(server.ask(get("/nowhere", "X-Request-Id: cat-3"))[1]["X-Request-Id"], "cat-3")
        server.stop()
        lines = [json.loads(line) for line in server.log().splitlines()]
        wanted = {"level": "info", "event": "delivery", "queueid": answer["queueid"], "client": "127.0.0.1"}
        wanted.update(
            code=200, dsn="2.0.0", status="sent", to=document()["rcpt"], request_id="cat-1", traceparent=trace
        )
        for line in lines:
            self.assertRegex(line["time"], r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d\Z")
        [sent, said] = [line for line in lines if line.get("queueid") in (answer["queueid"], refused["queueid"])]
        self.assertEqual(({key: sent[key] for key in wanted}, type(sent["delay"])), (wanted, float))
        self.assertEqual((said["event"], said["status"], "request_id" in said), ("rejection", "rejected", False))
        self.assertEqual(lines[-1]["message"], "stopped")


class UnderSystemd(Folder, Peers):
    """Servers that are started as systemd starts them."""

    def setUp(self) -> None:
        Folder.setUp(self)
        Peers.setUp(self)
        self.path = os.path.join(self.folder, "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(self.socket.close)
        self.socket.bind(self.path)
        self.socket.settimeout(10)

    def heard(self, wanted: str) -> list:
        """The lines of the first message that has a line."""
        return next(lines for lines in iter(lambda: self.socket.recv(4096).decode().split("\n"), "") if wanted in lines)

    def server(self, setup: str, **sections) -> Server:
        return served_after(self, f"os.environ['NOTIFY_SOCKET'] = {self.path!r}\n{setup}", sections)

    def test_states_and_its_own_socket(self) -> None:
        force = {"httpd": {"listen": f"unix:{self.path}.own"}}
        server = self.server("", **force)
        self.assertEqual(self.heard("READY=1")[1], f"STATUS=listens at {server.urls[0]}")
        server.write({"httpd": {"nyaa": 1}, "smtpd": {"nyaa": 1}})
        self.assertRegex(self.heard("RELOADING=1")[1], r"\AMONOTONIC_USEC=\d+\Z")
        self.assertEqual(self.heard("READY=1")[1], "STATUS=reload failed: 2 errors")
        server.write(force)
        self.heard("RELOADING=1")
        self.assertEqual(self.heard("READY=1")[1], "STATUS=reloaded")
        self.assertTrue(os.path.exists(self.path + ".own"))
        server.stop()
        self.heard("STOPPING=1")
        self.assertFalse(os.path.exists(self.path + ".own"))

    def test_a_worker_that_hangs_is_replaced_and_lines_for_the_journal_have_a_level_and_no_time(self) -> None:
        setup = "f = os.fstat(2); os.environ.update(JOURNAL_STREAM=f'{f.st_dev}:{f.st_ino}', WATCHDOG_USEC='200000')"
        server = self.server(f"{setup}; import haineko; haineko.HANG_TIMEOUT = 2.5")
        self.heard("WATCHDOG=1")
        (pid,) = server.workers()
        os.kill(pid, signal.SIGSTOP)
        eventually(lambda: f"\n<3>worker {pid} hangs; killing it" in server.log(), "a kill", 15)
        eventually(lambda: pid not in server.workers() and server.workers())
        status, _, found = server.submit("a@example.jp")
        self.assertEqual(status, 200)
        self.heard("WATCHDOG=1")
        server.stop()
        lines = rf"\A<6>haineko \S+ listens at (?:.*\n<[643]>)+{found['queueid']}: client=127\.0\.0\.1 (?:.*\n<[643]>)+"
        self.assertRegex(server.log(), lines + r"stopped\n\Z")

    def test_sockets_of_systemd(self) -> None:
        setup = (
            f"import socket; a = socket.create_server(('0.0.0.0', 0)); b = socket.socket(socket.AF_UNIX)\n"
            f"b.bind({self.path + '.http'!r}); b.listen(); c, d = a.detach(), os.dup(b.detach())\n"
            "os.dup2(d, 99); os.dup2(c, 3); os.dup2(99, 4)\n"
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='2')"
        )
        server = self.server(setup)
        self.assertEqual(len(server.urls), 2)
        self.assertIn(f"warning: httpd.listen: {server.urls[0]} takes mail from other machines", server.log())
        self.assertEqual([server.ask(post(), i=i)[0] for i in (0, 1)], [200, 200])
        server.stop()
        self.assertTrue(os.path.exists(self.path + ".http"))  # systemd's


class Commands(Folder, Peers):
    def setUp(self) -> None:
        Folder.setUp(self)
        Peers.setUp(self)

    def haineko(self, *words: str, given: bytes | str = b"", **variables: str) -> tuple:
        """(exit code, stdout, stderr) of a command."""
        done = run_program(
            *words,
            given=given if isinstance(given, bytes) else given.encode(),
            cwd=self.folder,
            env=environment(**variables),
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    called = staticmethod(run_here)

    def each(self, *cases: tuple, given: tuple = (), **variables: str) -> list:
        """The results of several commands."""
        pairs = itertools.zip_longest(cases, given, fillvalue="")
        return [self.called(*words, given=text, **variables) for words, text in pairs]

    def settings(self, **sections) -> str:
        """Path of a settings file."""
        return self.write("haineko.json", {**DEFAULTS, **sections})

    def test_usage(self) -> None:
        self.assertEqual(self.haineko("--version"), (0, f"Haineko {haineko.__version__}\n", ""))
        cases = ((), ("nyaa",), ("serve", "--nyaa"), ("route",))
        for words, (code, out, err) in zip(cases, self.each(*cases)):
            with self.subTest(words):
                self.assertEqual((code, out), (2, ""))
                self.assertIn("usage:", err)
        code, out, _ = self.called("-h")
        self.assertEqual(code, 0)
        for name in haineko.COMMANDS:
            self.assertIn(f"    {name} ", out)
            self.assertEqual(self.called(name, "-h")[0], 0)

    def test_serve_without_settings_harms_nobody_and_says_so(self) -> None:
        server = served(self, None, "--listen", "127.0.0.1:0", "--workers", "1", "-d")
        self.assertRegex(server.urls[0], r"\Ahttp://127\.0\.0\.1:[1-9]\d*/\Z")
        self.assertRegex(server.log(), "(?m)^haineko: NO SETTINGS FILE")
        status, _, found = server.ask(post(document(rcpt=["anybody@anywhere.example"])))
        self.assertEqual((status, found["response"][0]["mailer"]), (200, "Screen"))
        self.assertIn("Subject: Nyaaaa\n", server.log())
        self.assertEqual(server.stop(), 0)

    def test_settings_beside_the_program_are_not_used_by_the_tests(self) -> None:
        peer = self.peer()
        for name in ("haineko.py", "test_haineko.py", "haineko.json.example", "README.md"):
            shutil.copy(os.path.join(HERE, name), self.folder)
        path = self.settings(mailertable={"default": esmtp(peer)})
        before = os.stat(path)
        only = [
            f"test_haineko.Commands.test_{name}"
            for name in (
                "serve_without_settings_harms_nobody_and_says_so",
                "serve_says_why_it_does_not_start",
                "sendmail",
                "usage",
            )
        ]
        done = subprocess.run(
            [sys.executable, "-m", "unittest", "-q", *only],
            cwd=self.folder,
            capture_output=True,
            env={**environment(), "HAINEKO_CONF": path},
            timeout=60,
            check=False,
        )
        self.assertEqual((done.returncode, peer.connections), (0, []), done.stderr.decode())
        after = os.stat(path)
        self.assertEqual((after.st_mtime_ns, after.st_ino), (before.st_mtime_ns, before.st_ino))
        names = {"haineko.py", "test_haineko.py", "haineko.json.example", "haineko.json", "README.md"}
        self.assertEqual(set(os.listdir(self.folder)), names)

    def test_dialogues_of_many_sessions_cost_no_mail(self) -> None:
        peer = self.peer({".": "421 2.0.0 no, but see you again"})
        server = served(self, {"mailertable": {"default": esmtp(peer)}}, "-d")
        before = server.workers()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: server.ask(post(document())), range(64)))
        said = collections.Counter(item["message"][0] for _, _, found in answers for item in found["response"])
        self.assertEqual(said, {"2.0.0 no, but see you again": 64})
        self.assertEqual(server.workers(), before)
        eventually(lambda: server.log().count(" < 421 2.0.0 no") == 64, "the dialogues")

    def test_serve_shows_dialogues_without_secrets(self) -> None:
        peer = self.peer({}, "AUTH PLAIN", logins={"kijitora": "n-y-a-a"})
        route = esmtp(peer, auth="x")
        force = {"authinfo": {"x": {"username": "kijitora", "password": "n-y-a-a"}}, "mailertable": {"default": route}}
        server = served(self, force, "--devel")
        self.assertEqual(server.ask(post())[0], 200)
        self.assertIn("127.0.0.1 > RCPT TO:<mikeneko@example.jp>\n127.0.0.1 < 250 2.1.5 recipient fine\n", server.log())
        self.assertNotRegex(server.log(), "n-y-a-a|" + base64.b64encode(b"\0kijitora\0n-y-a-a").decode())

    def test_serve_says_why_it_does_not_start(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            place = f"127.0.0.1:{taken.getsockname()[1]}"
            fine = self.settings()
            bad = self.write("bad.json", {"httpd": {"lissen": "x"}, "mailertable": {"default": {"mailer": "ESNTP"}}})
            cases = (
                (("serve", "--listen", place, "-c", fine), 1, f"can't listen at {place}: Address already in use"),
                (("serve", "-c", fine, "--listen", "nonsense"), 2, 'expected "host:port", "[v6]:port" or "unix:/path"'),
                (("serve", "-c", fine, "--workers", "-1"), 2, "a whole number from 0 to 256"),
                (("serve", "--workers", "x"), 2, "invalid int value"),
                (("serve", "-c", bad), 2, 'httpd.lissen: unknown key; did you mean "listen"?'),
                (("serve", "-c", "/nowhere.json"), 2, "/nowhere.json: No such file or directory"),
            )
            results = [self.haineko(*cases[0][0]), *self.each(*[words for words, *_ in cases[1:]])]
            for (words, wanted, reason), (code, out, err) in zip(cases, results):
                with self.subTest(words):
                    self.assertEqual((code, out), (wanted, ""))
                    self.assertIn(reason, err)
                    self.assertNotIn("Traceback", err)
            code, _, err = self.called("serve", HAINEKO_CONF=bad)
            self.assertEqual(code, 2)
            self.assertIn('mailertable.default.mailer: unknown relay type "ESNTP"', err)

    def test_the_daemon_starts_stops_restarts_and_says_how_it_is(self) -> None:
        gate = threading.Event()
        self.addCleanup(gate.set)
        peer = self.peer({".": held(gate)})
        force = self.settings(
            httpd={"listen": "127.0.0.1:0", "workers": 1}, mailertable={"default": esmtp(peer, timeout=9)}
        )
        options = ("-c", force, "--pid-file", os.path.join(self.folder, "x.pid"))
        self.addCleanup(self.called, "stop", *options)
        self.addCleanup(gate.set)

        def placed(err: str):
            return place_of(re.search(r"http://\S+", err)[0])

        for command in ("status", "stop", "reload"):
            self.assertEqual(self.called(command, *options)[0], 1, command)
        systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(systemd.close)
        systemd.bind(os.path.join(self.folder, "notify"))
        code, out, err = self.haineko("start", *options, NOTIFY_SOCKET=systemd.getsockname())
        self.assertEqual((code, out), (0, ""), err)
        said = rf"\Ahaineko {haineko.__version__} listens at http://127\.0\.0\.1:\d+/ \(pid \d+, log /.*/x\.log\)\n\Z"
        self.assertRegex(err, said)
        self.assertEqual(self.called("start", *options)[0], 1)
        code, out, _ = self.called("status", *options)
        self.assertEqual((code, int(re.search(r"pid (\d+)", out)[1])), (0, int(re.search(r"pid (\d+)", err)[1])))
        self.assertRegex(
            out, r" since \d{4}-\d\d-\d\dT[\d:]+[+-]\d{4}, listens at http://127\.0\.0\.1:\d+/, log /.*/x\.log\n"
        )
        logs = [os.path.join(self.folder, name) for name in ("x.log.1", "x.log")]
        os.rename(logs[1], logs[0])  # as logrotate does
        self.assertEqual(self.called("reload", *options)[0], 0)
        eventually(lambda: os.path.exists(logs[1]), "a new log file")
        with HttpClient(placed(err)) as wire:
            wire.send(post())
            eventually(lambda: peer.now, "the mail at its next hop")
            stopping = threading.Thread(target=lambda: found.append(self.haineko("restart", *options)))
            found: list = []
            stopping.start()
            self.assertRaises(OSError, eventually, lambda: HttpClient(placed(err)).close(), "no connection")
            self.assertEqual(found, [])
            gate.set()
            self.assertEqual(wire.answer()[0], 200)
            stopping.join()
        [(code, _, err)] = found
        self.assertEqual(code, 0)
        with HttpClient(placed(err)) as wire:
            self.assertEqual(wire.ask(post())[0], 200)
        self.write("haineko.json", {"httpd": {"lissen": 1}})
        for command in ("reload", "restart"):  # rather the old one than none
            self.assertEqual(self.called(command, *options)[0], 2, command)
        self.assertEqual(self.called("stop", *options)[0], 0)
        self.assertEqual(select.select([systemd], [], [], 0)[0], [])  # it waits for the process that it has started
        self.assertEqual(self.called("status", *options)[:2], (1, "haineko does not run\n"))
        self.assertFalse(os.path.exists(os.path.join(self.folder, "x.pid")))
        text = ""
        for path in logs:
            with open(path, encoding="utf-8") as stream:
                text += stream.read()
        self.assertIn(" client=127.0.0.1 ", text)
        self.assertIn("reloaded ", text)
        self.assertNotIn("Traceback", text)

    def test_start_says_why_it_does_not(self) -> None:
        bad, log = self.write("bad.json", {"x": 1}), os.path.join(self.folder, "x.log")
        fine = self.settings(httpd={"listen": "127.0.0.1:0"})
        with socket.create_server(("127.0.0.1", 0)) as taken:
            place = f"127.0.0.1:{taken.getsockname()[1]}"
            cases = (
                (("-c", fine, "--listen", place), "", 1, f"can't listen at {place}: Address already in use"),
                (("-c", bad), "", 2, "x: unknown key"),
                (("-c", fine), "os.mkdir(sys.argv[-1])", 1, f"can't start: [Errno 21] Is a directory: '{log}'"),
                (("-c", fine), "haineko.SIGNALS = None", 1, f"did not start; see {log}\n"),
            )
            for words, before, wanted, reason in cases:
                script = f"import os, sys, haineko; {before}\nsys.exit(haineko.main(sys.argv[1:-1]))"
                command = [sys.executable, "-c", script, "start", *words, "--pid-file", log[:-3] + "pid", log]
                env = environment(PYTHONPATH=os.path.dirname(PROGRAM))
                done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=30, check=False)
                with self.subTest(words, before=before):
                    self.assertEqual((done.returncode, done.stdout), (wanted, ""), done.stderr)
                    self.assertIn(reason, done.stderr)
                    self.assertNotIn("Traceback", done.stderr)
                if os.path.isdir(log):
                    os.rmdir(log)

    def test_check_prints_every_fault_or_where_mail_would_go(self) -> None:
        smart = {"host": "smtp.example.org", "port": 587, "starttls": 1, "auth": "relay"}
        login = {"relay": {"username": "a", "password": "b"}}
        cases = (
            ({"mailertable": {"default": smart}, "authinfo": login}, "smtp.example.org:587, STARTTLS, AUTH as relay"),
            ({"mailertable": {"default": {"mailer": "Discard"}}}, "Discard"),
            ({"mailertable": {"default": {"mailer": self.folder}}}, f"File {self.folder}"),
            ({}, "ESMTP 127.0.0.1:25"),
        )
        paths = [self.write(f"{i}.json", sections) for i, (sections, _) in enumerate(cases)]
        results = [self.called("check", "-c", path) for path in paths]
        for (sections, wanted), (code, out, err) in zip(cases, results):
            with self.subTest(sections):
                self.assertEqual((code, without_warnings(err), out.count("\n")), (0, "", 1))
                self.assertIn(wanted, out)
        faulty = {
            "htpd": {},
            "smtpd": {"max_workers": 0, "max_message_sise": 1},
            "mailertable": {"default": {"auth": "relai"}, "example.jp": {"port": "25"}},
            "authinfo": login,
        }
        code, out, err = self.called("check", HAINEKO_CONF=self.write("haineko.json", faulty))
        self.assertEqual((code, err), (1, ""))
        for path, hint in (
            ("htpd", '"httpd"'),
            ("smtpd.max_workers", "1 to 256"),
            ("smtpd.max_message_sise", '"max_message_size"'),
            ("mailertable.example.jp.port", "1 to 65535"),
        ):
            self.assertRegex(out, rf"(?m)^{re.escape(path)}: .*{re.escape(hint)}")
        code, out, _ = self.called("check", "-c", self.write("haineko.json", {"authinfo": login}, mode=0o644))
        self.assertEqual(code, 1)
        self.assertIn("chmod 600", out)
        self.assertEqual(self.called("check", "-c", os.path.join(self.folder, "none"))[0], 1)

    def test_a_log_or_pid_file_that_is_a_link_is_not_followed(self) -> None:
        path, victim = self.settings(httpd={"listen": "127.0.0.1:0"}), self.write("victim", "precious")
        for name in ("x.log", "x.pid"):
            os.symlink(victim, os.path.join(self.folder, name))
            with self.subTest(name):
                code, _, err = self.haineko("start", "-c", path, "--pid-file", os.path.join(self.folder, "x.pid"))
                self.assertEqual((code, "symbolic links" in err), (1, True), err)
            os.unlink(os.path.join(self.folder, name))
        with open(victim) as stream:
            self.assertEqual(stream.read(), "precious")

    def test_serve_with_closed_descriptors(self) -> None:
        place = os.path.join(self.folder, "s")
        command = f'exec "{sys.executable}" "{PROGRAM}" serve --workers 1 --listen "unix:{place}" <&- 2>&-'
        server = subprocess.Popen(command, shell=True, env=environment())
        self.addCleanup(server.wait)
        self.addCleanup(server.terminate)

        def connected():
            with contextlib.suppress(OSError):  # it is not bound, or does not listen yet
                return HttpClient(place)
            return None

        with eventually(connected, "a server", 20) as wire:
            self.assertEqual(wire.ask(post(document()))[0], 200)

    def test_options_stand_before_or_after_words(self) -> None:
        path = self.settings(queue={"path": "q.db"})
        for words in (("show", "-c", path, "x"), ("-c", path, "show", "x"), ("show", "x", "-c", path)):
            with self.subTest(words):
                code, _, err = self.called("queue", *words)
                self.assertEqual(
                    (code, err), (1, f"haineko: {self.folder}/q.db: does not exist; nothing was ever queued\n")
                )
        self.assertEqual(self.called("route", "-c", path, "a@b.jp", "--sender", "c@d.jp")[0], 0)

    def test_a_prompt_that_gets_no_answer(self) -> None:
        for words, prompt in (
            (("pw",), b"Password: "),
            (("send", "--user", "x", "--to", "a@b.jp", "--body", "x"), b": "),
        ):
            with self.subTest(words, terminal=True):
                ours, theirs = pty.openpty()
                running = subprocess.Popen(
                    [sys.executable, LAUNCHER, *words],
                    stdin=theirs,
                    stderr=subprocess.PIPE,
                    env=environment(),
                    start_new_session=True,
                    preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 -- no thread runs yet
                )
                os.close(theirs)
                seen = b""
                while not seen.endswith(prompt):
                    seen += os.read(ours, 100)
                os.write(ours, b"\x04")
                err = running.communicate(timeout=20)[1]
                os.close(ours)
                self.assertEqual((running.returncode, err), (1, b"haineko: no password\n"))
        done = run_program("send", "--user", "x", given=b"{}", start_new_session=True)
        self.assertEqual(
            (done.returncode, done.stderr), (1, b"haineko: there is no terminal to ask for the password\n")
        )

    def test_a_password_is_not_sent_in_clear_text(self) -> None:
        mail = ("--user", "x", "--to", "a@b.jp", "--body", "x")
        for url in (
            "http://mail.example.org/",
            "HTTP://192.0.2.1:2794/",
            "http://localhost.example.org/",
            "http://127.0.0.1@h/",
        ):
            with self.subTest(url):
                code, _, err = self.called("send", "--url", url, *mail)
                self.assertEqual((code, "in clear text" in err), (2, True), err)

    def test_check_says_who_may_be_written_to(self) -> None:
        cases = (
            ({"open-relay": 1}, "everybody"),
            (None, f"@{NAME} only (setting recipients)"),
            (
                {"domainpart": ["b.jp", "a.jp"], "recipients": ["x@y.jp"]},
                "@a.jp, @b.jp, x@y.jp only (setting recipients)",
            ),
            ({}, "nobody (setting recipients)"),
        )
        for recipients, wanted in cases:
            with self.subTest(recipients):
                sections = {
                    "smtpd": {"hostname": NAME},
                    **({"recipients": recipients} if recipients is not None else {}),
                }
                code, out, err = self.called("check", "-c", self.write("haineko.json", sections))
                self.assertEqual((code, without_warnings(err)), (0, ""))
                self.assertIn(f"; may be written to: {wanted}", out)
                self.assertEqual("root" in out, os.geteuid() == 0)
        path = self.settings()
        os.chmod(self.folder, 0o777)
        self.assertIn(f"warning: {self.folder} can be changed by other users", self.called("check", "-c", path)[2])

    def test_the_example_is_fine(self) -> None:
        example = os.path.join(HERE, "haineko.json.example")
        code, out, _ = self.called("check", "-c", example)
        self.assertEqual((code, out.count("\n")), (0, 1), out)

    def test_route_says_which_and_why(self) -> None:
        force = self.settings(
            recipients={"domainpart": ["example.jp", "a.example.jp", "example.net"]},
            mailertable={"example.jp": {"mailer": "Screen"}, ".example.jp": {"host": "192.0.2.1", "port": 465}},
            sendermt={"example.org": {"mailer": "Discard"}},
        )
        cases = (
            (("a@example.jp",), 0, 'Screen (mailertable["example.jp"])'),
            (("a@A.Example.JP",), 0, 'ESMTP 192.0.2.1:465, TLS (mailertable[".example.jp"])'),
            (("a@example.net", "--sender", "b@example.org"), 0, 'Discard (sendermt["example.org"])'),
            (("a@example.net",), 0, "ESMTP 127.0.0.1:25 (no route matches)"),
            (("a@example.com",), 1, "would be refused: 553 5.7.1"),
            (("nonsense",), 2, "is no mail address"),
            (("a@example.jp", "--sender", "nonsense"), 2, "is no mail address"),
        )
        results = [self.called("route", *words, "-c", force) for words, *_ in cases]
        for (words, wanted, part), (code, out, err) in zip(cases, results):
            with self.subTest(words):
                self.assertEqual(code, wanted)
                self.assertIn(part, out + err)

    def test_send_posts_and_says_whether_all_was_accepted(self) -> None:
        peer = self.peer({"RCPT": refuses(b="550 5.1.1 no")})
        hashed = {"kijitora": "{SSHA}9p2euyteR33mp0TYKjmYhTlIt1ctxuRn"}
        server = served(self, {"mailertable": {"default": esmtp(peer)}, "password": hashed})
        root = server.urls[0]
        login, flags = ("--user", "kijitora"), ("--subject", "謹賀新年", "--body", "にゃあ", "--mail", "a@example.org")
        whole, some = json.dumps(document()), json.dumps(document(rcpt=["a@example.jp", "b@example.jp"]))
        path = self.write("mail.json", whole)
        page, paper = self.write("page.html", "<p>にゃあ</p>"), self.write("領収書.csv", "1,2\n")
        files = ("--html", page, "--attach", paper, "--attach", path)
        cases = (
            # words, on stdin, exit code, codes of the recipients
            ((path, "--url", root, *login), "", 0, ["250"]),
            ((path, "--url", root + "submit", *login), "", 0, ["250"]),
            (("--url", root.rstrip("/"), *login), whole, 0, ["250"]),
            (("-", "--url", root, *login), some, 1, ["250", "550"]),
            (("--url", root), whole, 1, ["535"]),
            (("-", "--url", root, *login), "{", 1, ["421"]),
            (("--url", root, *login, "--to", "a@example.jp", *flags), "", 0, ["250"]),
            (("--url", root, *login, "--to", "a@example.jp", "--to", "b@example.jp", *flags), "", 1, ["250", "550"]),
            (("--url", root, *login, "--to", "a@example.jp", "--subject", "x"), "from stdin\n", 0, ["250"]),
            (("--url", root, *login, "--to", "h@example.jp", "--subject", "x", *files), "", 0, ["250"]),
            (("--url", root, *login, "--to", "a@example.jp", "--attach", "/nowhere.pdf"), "x", 2, None),
            ((path, "--url", root, *login, *files), "", 2, None),
            (("--url", "http://127.0.0.1:1/", *login), whole, 1, None),
            (("--url", "nonsense", *login), whole, 2, None),
            (("/nowhere.json", "--url", root, *login), "", 2, None),
        )
        commands = [("send", *words) for words, *_ in cases]
        results = self.each(*commands, given=[text for _, text, *_ in cases], HAINEKO_PASSWORD="kijitora")
        for (words, _, wanted, codes), (code, out, err) in zip(cases, results):
            with self.subTest(words):
                self.assertEqual(code, wanted, err)
                self.assertEqual([item["code"] for item in json.loads(out)["response"]] if out else None, codes)
                self.assertEqual(bool(err), codes is None)
                self.assertNotIn("Traceback", err)
        [found] = [
            message
            for message in map(email.message_from_bytes, [mail.text for mail in peer.mails])
            if message["To"] == "a@example.jp" and "=?" in message["Subject"]
        ][:1]
        self.assertEqual(email.header.make_header(email.header.decode_header(found["Subject"])), "謹賀新年")
        self.assertEqual(found.get_payload(decode=True).decode(), "にゃあ\r\n")
        mails = [email.message_from_bytes(mail.text, policy=email.policy.default) for mail in peer.mails]
        [rich] = [message for message in mails if message["To"] == "h@example.jp"]
        self.assertEqual(rich.get_body(("html",)).get_content().strip(), "<p>にゃあ</p>")
        attached = {part.get_filename(): part.get_payload(decode=True) for part in rich.iter_attachments()}
        self.assertEqual(attached, {"領収書.csv": b"1,2\n", "mail.json": whole.encode()})

    def test_sendmail(self) -> None:
        peer = self.peer({"RCPT": refuses(n="550 5.1.1 no", l="450 4.2.0 later")})
        force = self.settings(
            recipients={"domainpart": ["example.jp"]}, mailertable={"default": esmtp(peer), "x": {"mailer": "Discard"}}
        )
        text = "From: a@example.org\nTo: One <1@example.jp>,\n 2@example.jp\nCc: 3@example.jp\nBcc: 4@example.jp\n"
        text += "Subject: Nya\n\nMeow.\n.\nmore\n"
        to = lambda *names: [f"RCPT TO:<{name}@example.jp>" for name in names]  # noqa: E731
        cases = (
            # words, message, exit code, envelope recipients that were taken
            (("a@example.jp",), text, 0, to("a")),
            (("a@example.jp", "b@example.jp"), text, 0, to("a", "b")),
            (("-i", "-t"), text, 0, to("1", "2", "3", "4")),
            (("-oi", "-f", "b@example.org", "--", "a@example.jp"), text, 0, to("a")),
            (("-i", "-f", "", "a@example.jp"), text, 0, to("a")),
            (("-t",), "Subject: x\n\nx\n", 64, None),
            ((), text, 64, None),
            (("-Z", "a@example.jp"), text, 64, None),
            (("-bs",), text, 64, None),
            (("-f", "non sense", "a@example.jp"), text, 64, None),
            (("a@example.jp",), "Subject: bare\rCR\n\nx\n", 65, None),
            (("n@example.jp",), text, 69, None),
            (("-f", "root", "-FCronDaemon", "-i", "-B8BITMIME", "-oem", "a@example.jp"), text, 0, to("a")),
            (("root",), text, 77, None),  # at this host, which the settings don't permit
            (("l@example.jp",), text, 75, None),
            (("n@example.jp", "a@example.jp"), text, 69, to("a")),
            (("n@example.jp", "l@example.jp"), text, 75, None),
            (("a@example.net",), text, 77, None),
            (("a@example.net", "a@example.jp"), text, 77, to("a")),
            (("a@example.jp",), f"X-Haineko-Loop: {NAME}\n" + text, 69, None),
        )
        commands = [("sendmail", "-C", force, *words) for words, *_ in cases]
        results = self.each(*commands, given=[f"X-Case: {i}\n{case[1]}" for i, case in enumerate(cases)])
        mails = {int(email.message_from_bytes(mail[2])["X-Case"]): mail for mail in peer.mails}
        for i, ((words, given, wanted, recipients), (code, out, err)) in enumerate(zip(cases, results)):
            with self.subTest(words=words, given=given[:30]):
                self.assertEqual((code, out), (wanted, ""), err)
                self.assertEqual(bool(err), bool(wanted))
                self.assertNotIn("Traceback", err)
                self.assertEqual(mails[i][1] if i in mails else None, recipients)
        self.assertEqual(mails[3][0], "MAIL FROM:<b@example.org>")
        self.assertEqual(mails[4][0], "MAIL FROM:<>")
        for octets, dots in ((mails[0][2], False), (mails[2][2], True)):
            found = email.message_from_bytes(octets)
            self.assertEqual((found["Bcc"], found["Subject"], found["X-Haineko-Loop"]), (None, "Nya", NAME))
            self.assertEqual(b"\r\n..\r\nmore\r\n" in octets, dots)
            self.assertTrue(found["Received"] and found["Date"] and found["Message-Id"])
        bad = self.write("bad.json", {"x": 1})
        self.assertEqual(self.called("sendmail", "-C", bad, "a@example.jp", given=text)[0], 78)
        code, _, err = self.haineko("sendmail", "a@example.jp", given=text)
        self.assertEqual((code, "no settings file" in err), (78, True), "it must not be lost on a screen")

    def test_sendmail_as_programs_call_it(self) -> None:
        peer = self.peer({}, "DSN")
        path = self.settings(
            smtpd={"hostname": NAME, "aliases": {"root": ["ops@example.jp"]}}, mailertable={"default": esmtp(peer)}
        )
        text = "Subject: x\n\nNya\n"
        to = "a@example.jp"
        fails, full, rets = " NOTIFY=FAILURE,DELAY", " RET=FULL", " RET=HDRS"
        cases = (
            # words, message, RCPT lines, what MAIL ends with or the header holds
            (("a@example.jp,b@example.jp",), text, ("a", "b"), ""),
            (("a@example.jp b@example.jp",), text, ("a", "b"), ""),
            (("<a@example.jp>", "Neko <b@example.jp>"), text, ("a", "b"), ""),
            (('"Doe, J" <a@example.jp>, b@example.jp (x)',), text, ("a", "b"), ""),
            (("-h", "5", "-i", to), text, ("a",), ""),
            (("-e", "m", to), text, ("a",), ""),
            (("-em", "-odb", "-O", "x=y", "-Ac", "-Am", "-x", "-n", "-m", "-v", "-G", "-U", to), text, ("a",), ""),
            (("-L", "label", "-pESMTP", "-X", "log", "-B", "8BITMIME", "-q", to), text, ("a",), ""),
            (("-N", "failure,delay", "-R", "hdrs", to), text, ("a",), rets),
            (("-N", "never", "-V", "a b+", to), text, ("a",), full + " ENVID=a+20b+2B"),
            (("-F", "Cron Daemon", to), text, ("a",), "From: Cron Daemon <cron@"),
            (("-F", "Cron\nBcc: z@example.jp", to), text, ("a",), "<cron@"),
            (("-F", "x", to), "From: root (Cron Daemon)\n" + text, ("a",), f"From: root@{NAME} (Cron Daemon)"),
            (("root",), "To: root\n" + text, ("ops",), f"To: root@{NAME}"),
            (("Root <root>, b@example.jp",), text, ("ops", "b"), ""),
            (("-t",), "To: root, neko@example.jp\n" + text, ("ops", "neko"), f"To: root@{NAME}, neko@example.jp"),
            (("-t",), "Resent-To: r@example.jp\nResent-Bcc: s@example.jp\nResent-From: x\nTo: a@example.jp\n" + text,
             ("r", "s"), f"Resent-From: x@{NAME}"),
            (("-t",), "To: x a@example.jp\nCc: b@example.jp\n" + text, None, ""),
            (("-t",), "Resent-To: r@example.jp\nReceived: x\nResent-To: old@example.jp\n" + text, ("r",), ""),
            (("-t",), "Resent-From: x@y.jp\nTo: a@example.jp\nResent-To: r@example.jp\n" + text, ("r",), ""),
            (("-t",), "To: unlisted-recipients:; (no To-header on input)\nBcc: b@example.jp\n" + text, ("b",), ""),
            (("-t",), "To: a@example.jp,\nCc: b@example.jp (Doe, J), c@example.jp\n" + text, ("a", "b", "c"), ""),
            (("-t",), "To: a@example.jp; b@example.jp\n" + text, ("a", "b"), ""),
            (("-t", "c@example.jp"), "To: a@example.jp\n" + text, ("c", "a"), ""),
            ((to,), "no header at all\n", ("a",), "From: cron@"),
        )  # fmt: skip
        commands = [("sendmail", "-C", path, *words) for words, *_ in cases]
        given = [f"X-Case: {i}\n{case[1]}" for i, case in enumerate(cases)]
        results = self.each(*commands, given=given, LOGNAME="cron")
        mails = {int(email.message_from_bytes(mail[2])["X-Case"]): mail for mail in peer.mails}
        for i, ((words, _, names, wanted), result) in enumerate(zip(cases, results)):
            with self.subTest(words):
                if names is None:  # a field that is no list is never searched for addresses
                    self.assertEqual((result[0], [mails[i][1]]), (65, [[f"RCPT TO:<b@example.jp>{fails}"]]), result)
                    continue
                self.assertEqual(result, (0, "", ""))
                mail, rcpt, octets = mails[i][:3]
                notify = " NOTIFY=NEVER" if "never" in words else fails
                self.assertEqual(rcpt, [f"RCPT TO:<{name}@example.jp>{notify}" for name in names])
                self.assertRegex(mail, f"^MAIL FROM:<cron@{NAME}>")
                self.assertIn(wanted, mail + octets.partition(b"\r\n\r\n")[0].decode())
                self.assertNotIn(b"bcc:", octets.lower().partition(b"\r\n\r\n")[0].replace(b"cron bcc:", b""))

    def test_sendmail_that_sends_nothing(self) -> None:
        path = self.settings(queue={"path": "q.db"}, mailertable={"default": {"mailer": "Discard"}})
        cases = (
            # words, exit code, stdout, stderr
            (("-bp",), 0, "Mail queue is empty\n", ""),
            (("-q",), 0, "", ""),
            (("-q30m",), 0, "", ""),
            (("-bi",), 0, "", ""),
            (("-I",), 0, "", ""),
            (("-bv", "a@example.jp"), 0, "a@example.jp: Discard (mailertable.default)\n", ""),
            (("-bs",), 64, "", "haineko: usage: -bs is not served here; `haineko.py serve` runs the server\n"),
            (("-bd",), 64, "", "haineko: usage: -bd is not served here; `haineko.py serve` runs the server\n"),
            (("-R", "x", "a@example.jp"), 64, "", "haineko: usage: -R x: expected hdrs or full\n"),
        )
        results = self.each(*[("sendmail", "-C", path, *words) for words, *_ in cases], given=("x",) * len(cases))
        for (words, *wanted), result in zip(cases, results):
            with self.subTest(words):
                self.assertEqual(result, tuple(wanted))

    def test_sendmail_has_a_valid_sender(self) -> None:
        names = {
            "alice@corp.example.org": "alice@corp.example.org",
            "CORP\\alice": "alice@h.example",
            "alice smith": "alice_smith@h.example",
            "猫": f"uid{os.getuid()}@h.example",
            "..a..b..": "a.b@h.example",
        }
        before = os.environ.get("LOGNAME")
        self.addCleanup(
            os.environ.update if before else os.environ.pop, *([{"LOGNAME": before}] if before else ["LOGNAME"])
        )
        for name, wanted in names.items():
            with self.subTest(name):
                os.environ["LOGNAME"] = name
                self.assertEqual(haineko.envelope_sender(None, "h.example"), wanted)
                self.assertTrue(haineko.parse_address(wanted))

    def test_sendmail_queues(self) -> None:
        peer = self.peer({"RCPT": refuses(l="450 4.2.0 later")})
        path = self.settings(queue={"path": "q.db", "min_free": 0}, mailertable={"default": esmtp(peer)})
        code, out, err = self.called(
            "sendmail", "-C", path, "-N", "never", "l@example.jp", "a@example.jp", given="\nx\n"
        )
        self.assertEqual((code, out, err), (0, "", ""))
        self.assertEqual([mail[1] for mail in peer.mails], [["RCPT TO:<a@example.jp>"]])
        code, out, err = self.called("sendmail", "-C", path, "-bp")
        self.assertEqual((code, err), (0, ""))
        self.assertRegex(out, "l@example.jp[^\0]*450 4.2.0 later")
        path = self.settings(mailertable={"default": esmtp(peer)})
        code, out, err = self.called("sendmail", "-C", path, "l@example.jp", "a@example.jp", given="\nx\n")
        self.assertEqual((code, "<l@example.jp>: 450 RCPT" in err), (69, True), err)  # not 75: a@ would get it twice

    def test_the_sendmail_program_of_setup(self) -> None:
        launcher = os.path.join(self.folder, "bin", "sendmail")
        os.chmod(self.folder, 0o755)
        program = shutil.copy(PROGRAM, self.folder)
        user = {"user": 65534} if os.getuid() == 0 else {}  # one who can't read the settings
        python = sys.executable
        if not can_run(python, **user) and can_run("/usr/bin/python3", **user):
            python = "/usr/bin/python3"
        words = [python, program, "setup", "--dest", self.folder, "--sendmail", launcher]
        done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=30, check=True)
        self.assertEqual((done.stdout.splitlines()[-1], done.stderr), (launcher, ""))
        with open(launcher) as stream:
            self.assertEqual(len(stream.readlines()), 3)
        os.symlink(program, os.path.join(self.folder, "sendmail"))
        for path in (launcher, os.path.join(self.folder, "sendmail")):
            done = subprocess.run([python, path, "-h"], capture_output=True, env=environment(), timeout=30, check=False)
            self.assertIn(b"usage: haineko.py sendmail", done.stdout)
        peer = self.peer()
        server = served(self, {"recipients": {"open-relay": 1}, "mailertable": {"default": esmtp(peer)}})
        os.unlink(os.path.join(self.folder, "haineko.json"))
        self.settings(mailertable={"default": esmtp(peer)})
        for who in ({}, user) if can_run(python, **user) else ({},):
            done = subprocess.run(
                [launcher, "-i", "-f", "cron@example.org", *(f"{i}@example.jp" for i in range(6))],
                input=b"Subject: x\n\nx\n",
                capture_output=True,
                env=environment(HAINEKO_URL=server.urls[0]),
                timeout=30,
                check=False,
                **who,
            )
            self.assertEqual((done.returncode, done.stdout, done.stderr), (0, b"", b""))
            self.assertEqual({mail[0] for mail in peer.mails}, {"MAIL FROM:<cron@example.org>"})
            self.assertEqual(sum(len(mail[1]) for mail in peer.mails), 6)
            peer.mails.clear()

    def test_a_password_through_a_pipe_logs_in(self) -> None:
        code, out, err = self.haineko("pw", "-u", 'kiji"tora', given="にゃあ secret\n")
        self.assertEqual((code, err), (0, ""))
        [(user, line)] = json.loads("{" + out + "}").items()
        self.assertEqual(user, 'kiji"tora')
        self.assertTrue(haineko.verify_password(line, "にゃあ secret"))
        self.assertFalse(haineko.verify_password(line, "にゃあ secret\n"))
        server = served(self, {"password": {"kiji": line}})
        for word, wanted in (("にゃあ secret", 200), ("nyaa", 401)):
            credentials = base64.b64encode(f"kiji:{word}".encode()).decode()
            self.assertEqual(server.ask(post(None, f"Authorization: Basic {credentials}"))[0], wanted)
        self.assertEqual(self.haineko("pw", given="")[0], 1)

    def test_check_warns_of_what_careful_postmasters_would_not_run(self) -> None:
        def route(**more) -> dict:
            return {"mailertable": {"default": {"mailer": "ESMTP", "host": "mx.test", "starttls": True, **more}}}

        open_to_all = {"recipients": {"open-relay": 1}}
        outside, login = {"relayhosts": {"relayhosts": ["192.0.2.0/24"]}}, {"password": {"neko": "{SSHA}" + "A" * 40}}
        cases = (
            (route(), []),
            (route(host="127.0.0.1", starttls=False), []),
            (route(port=465, starttls=False), []),
            (route(starttls=False), ["mailertable.default.starttls: mail goes to mx.test without TLS"]),
            (route(host="smtp.example.org"), ["mailertable.default.host: smtp.example.org is an example"]),
            (
                {**route(auth="a"), "authinfo": {"a": {"username": "", "password": ""}}},
                ["authinfo.a.username: is empty", "authinfo.a.password: is empty"],
            ),
            (outside, ["recipients.open-relay: other machines (relayhosts) may write to everybody without a login"]),
            ({**outside, **login}, ["password.neko: {SSHA} is quick to guess; `haineko.py pw` prints a better line"]),
            ({"httpd": {"listen": ["127.0.0.1:1", "[::1]:1", "localhost:1", "unix:/x"]}}, []),
            ({"httpd": {"listen": "0.0.0.0:1", "trusted_proxies": ["192.0.2.1"]}}, []),
            (
                {"httpd": {"trusted_proxies": ["0.0.0.0/0", "::/0", "10.0.0.0/8"]}},
                [
                    f"httpd.trusted_proxies: {one} lets every client say that it has any address"
                    for one in ("0.0.0.0/0", "::/0")
                ],
            ),
            (
                {**route(auth="a", tls_verify=0), "authinfo": {"a": {"username": "u", "password": "p"}}},
                ["mailertable.default.tls_verify: whoever is in between can read the secret of authinfo.a"],
            ),
            (
                {"httpd": {"listen": "0.0.0.0:1"}},
                ["httpd.listen: 0.0.0.0:1 takes mail from other machines without TLS; set tls or trusted_proxies"],
            ),
            (
                {**route(), "recipients": None, "smtpd": {"hostname": "here.test"}},
                ["recipients: only addresses at here.test may be written to"],
            ),
            ({"mailertable": {"default": {"mailer": "Discard"}}, "recipients": None}, []),
        )
        for sections, wanted in cases:
            with self.subTest(sections):
                whole = {key: value for key, value in {**open_to_all, **sections}.items() if value is not None}
                path = self.write("warned.json", whole)
                code, out, err = self.called("check", "-c", path)
                self.assertEqual((code, err.splitlines()), (0, [f"warning: {line}" for line in wanted]), out)
        example = os.path.join(HERE, "haineko.json.example")
        wanted = ["mailertable.default.host: smtp.example.org is an example"]
        wanted += ["authinfo.relay.username: is empty", "authinfo.relay.password: is empty"]
        lines = [line for line in self.called("check", "-c", example)[2].splitlines() if "chmod" not in line]
        self.assertEqual([line for line in lines if "queue.path" not in line], [f"warning: {line}" for line in wanted])

    def test_check_warns_of_a_queue_in_memory(self) -> None:
        if not (os.path.isdir("/dev/shm") and os.path.exists("/proc/self/mountinfo") and shutil.which("stat")):
            self.skipTest("no tmpfs on this machine")
        for place in ("/dev/shm", None):
            with tempfile.TemporaryDirectory(dir=place) as folder, self.subTest(folder):
                kind = subprocess.run(["stat", "-fc%T", folder], capture_output=True, text=True, check=True).stdout
                path = self.settings(queue={"path": os.path.join(folder, "q.db")})
                told = "warning: queue.path: tmpfs is no file system of a disk of this machine\n"
                self.assertEqual(told in self.called("check", "-c", path)[2], kind == "tmpfs\n")

    def test_setup_writes_what_is_not_there(self) -> None:
        folder = os.path.join(self.folder, "new", "folder")
        code, out, err = self.haineko("setup", "--dest", folder)
        names = [os.path.join(folder, name) for name in ("haineko.json", "haineko.service", "haineko.socket")]
        self.assertEqual((code, out.splitlines(), err), (0, names, ""))
        self.assertEqual(stat.S_IMODE(os.stat(names[0]).st_mode), 0o600)
        self.assertEqual(self.called("check", "-c", names[0])[0], 0)
        with open(names[1], encoding="utf-8") as stream:
            unit = stream.read()
        self.assertIn(f"\nWorkingDirectory={os.path.dirname(PROGRAM)}\n", unit)
        self.assertIn(f"\nExecStart={sys.executable} -m haineko serve -c {folder}/haineko.json\n", unit)
        with open(names[0], "w") as stream:
            stream.write("mine")
        os.unlink(names[1])
        os.unlink(names[2])
        code, out, err = self.haineko("setup", "--dest", folder)
        self.assertEqual((code, out.splitlines()), (1, names[1:]))
        self.assertIn("File exists", err)
        with open(names[0]) as stream:
            self.assertEqual(stream.read(), "mine")
        self.assertEqual(self.haineko("setup")[0], 2)

    def test_dkim_prints_a_line_of_a_zone_file(self) -> None:
        keys = {**dkim_keys("Example.ORG"), **dkim_keys("例え.jp", key=TEST_RSA_KEY, selector="s2")}
        path = self.settings(dkim=keys)
        for domain, name, octets in (("example.org", "s1._domainkey.example.org.", 32),
                                     ("例え.jp", "s2._domainkey.xn--r8jz45g.jp.", 294)):  # fmt: skip
            code, out, err = self.called("dkim", domain, "-c", path)
            self.assertEqual((code, err), (0, ""))
            found = re.fullmatch(rf'{name} IN TXT ("[^"]*"(?: "[^"]*")*)\n', out)
            strings = re.findall('"([^"]*)"', found[1])
            self.assertTrue(all(len(text) <= 255 for text in strings))
            self.assertEqual(len(base64.b64decode(haineko.parse_tags("".join(strings))["p"])), octets)
        code, out, err = self.called("dkim", "exmple.org", "-c", path)
        self.assertEqual((code, out), (1, ""))
        self.assertIn('"exmple.org" is not in dkim; did you mean "example.org"?', err)


class CheckConnect(WithCertificates):
    def check(self, mailertable: dict, *flags: str, resolver: str = "127.0.0.1:1", **sections) -> tuple:
        """(exit code, lines) of `check` with these routes."""
        path = os.path.join(self.folder, "haineko.json")
        smtpd = {"hostname": "relay.example.org", "resolver": resolver}
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
            json.dump({"smtpd": smtpd, "mailertable": mailertable, **sections}, stream)
        code, out, err = run_here("check", "-c", path, *flags)
        self.assertEqual(without_warnings(err), "")
        return code, out.splitlines()[1:]

    def assert_lines(self, lines: list, *wanted: str) -> None:
        """Each line begins as wanted, or has that after the step."""
        self.assertEqual(len(lines), len(wanted), lines)
        for line, words in zip(lines, wanted):
            self.assertRegex(line, words)

    def test_esmtp(self):
        host = self.enter(SmtpPeer(None, ("STARTTLS",), self.tls, hosts=("127.0.0.1",)))
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
        host = self.enter(SmtpPeer(hosts=("127.0.0.1",)))
        closed = socket.create_server(("127.0.0.1", 0))
        nobody = closed.getsockname()[1]
        closed.close()
        login = {"authinfo": {"relay": {"username": "neko", "password": "nyan"}}}
        route = {"host": "127.0.0.1", "port": host.port, "timeout": 2}
        offer = {"EHLO": "250-mx\n250 AUTH PLAIN"}
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
                host.says_at = {"127.0.0.1": manner}
                code, lines = self.check({"default": {**route, **changes}}, "--connect", **login)
                self.assertEqual(
                    (code, len([line for line in lines if "FAILED" in line])), (int("FAILED" in words),) * 2
                )
                self.assertRegex(lines[-1], words)
                self.assertNotIn("nyan", "\n".join(lines))

    def test_mx(self):
        host = self.enter(SmtpPeer(None, ("STARTTLS",), self.tls, hosts=("127.0.0.2", "127.0.0.3")))
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
            "^mailertable.sts.example: DNS: ",
            "TCP: connected",
            "EHLO: ",
            "TLS: TLSv1.[23], certificate not verified",
            "^mailertable.null.example: CONN: FAILED: 556 Domain takes no mail",
            "^mailertable.default: DNS: name servers answer",
        )
        code, lines = self.check({"default": route}, "--connect", resolver="127.0.0.1:1")
        self.assertEqual(code, 1)
        self.assert_lines(lines, "^mailertable.default: DNS: FAILED: 127.0.0.1: ")

    def test_relays_that_connect_to_nothing(self):
        code, lines = self.check({"default": {"mailer": "Screen"}, "a.example": {"mailer": self.folder}}, "--connect")
        self.assertEqual(code, 0)
        self.assert_lines(lines, "^mailertable.default: NONE: nothing", f"^mailertable.a.example: FILE: {self.folder}$")

    def test_nothing_is_tried_unasked(self):
        self.assertEqual(self.check({"default": {"mailer": "MX"}}), (0, []))

    def test_records_of_a_sender(self):
        key = base64.b64encode(
            b"0\x5c0\x0d..\x03\x4b\x00\x30\x48\x02\x41\x00" + b"\xaa" * 64 + b"\x02\x03\x01\x00\x01"
        ).decode()
        dns = self.enter(
            NameServer(
                {
                    "good.example": {haineko.TXT: ["other", "v=spf1 mx include:spf.good.example -all"]},
                    "spf.good.example": {haineko.TXT: ["v=spf1 ip4:192.0.2.0/24 ~all"]},
                    "_dmarc.good.example": {haineko.TXT: ["v=DMARC1; p=reject"]},
                    "s1._domainkey.good.example": {haineko.TXT: ["v=DKIM1; k=ed25519; p=" + "A" * 43 + "="]},
                    "s1._domainkey.bad.example": {haineko.TXT: [f"p={key}"]},
                    "bad.example": {haineko.TXT: ["nothing"]},
                    "fails.example": lambda q, _: [q.answer(code=2)],
                }
            )
        )
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

    def test_nothing_that_another_says_reaches_the_terminal(self):
        esc = "\x1b]0;x\x07\u202e\x9b"
        dns = self.enter(NameServer({
            "a.example": {haineko.TXT: [f"v=spf1 include:{esc}.example -all"]},
            "b.example": {haineko.TXT: [f"v=spf1 {esc} -all"]},
            "c.example": {haineko.TXT: ["v=spf1 -all"], haineko.MX: []},
            "_dmarc.a.example": {haineko.TXT: [f"v=DMARC1; p={esc}"]},
            "_dmarc.b.example": {haineko.TXT: [f"v=DMARC1; p=none; rua={esc}"]},
            "s._domainkey.a.example": {haineko.TXT: [f"v=DKIM1; k={esc}; p={'A' * 400}"]},
            "s._domainkey.b.example": {haineko.TXT: [f"v={esc}; p=A"]},
        }))  # fmt: skip
        host = self.enter(SmtpPeer(tls=self.tls))
        for manners in ({"EHLO": "250-mx\x1b[2J\r\n250 SIZE \x1b[2J"}, {"EHLO": "550 \x1b[2J no"}):
            host.says_at = {"127.0.0.1": manners}
            for sender in ("a@a.example", "a@b.example", "a@c.example"):
                with self.subTest(sender, manners=manners):
                    flags = ("--connect", "--sender", sender, "--selector", "s")
                    route = {"host": "127.0.0.1", "port": host.port, "timeout": 2}
                    _, lines = self.check({"default": route}, *flags, resolver=dns.place)
                    self.assertGreater(len(lines), 3)
                    self.assertTrue(all(line.isprintable() for line in lines), lines)

    def test_what_the_readme_shows(self):
        shown = re.findall(r"(?s)```console connect\n\$ python3 haineko.py check (.*?)\n.*?\n(.*?)```", README)
        (flags, wanted), zone = shown[0], {haineko.TXT: ["v=spf1 include:spf.example.net -all"]}
        host = self.enter(SmtpPeer(None, ("STARTTLS",), self.tls, hosts=("127.0.0.1",)))
        offers = ("PIPELINING", "SIZE 35882577", "STARTTLS")
        words = "".join(f"250-{word}\r\n" for word in ("mx", *offers)) + "250 AUTH PLAIN LOGIN"
        host.says_at = {"127.0.0.1": {"EHLO": words, "AUTH": "235 2.7.0 fine"}}
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
        path = os.path.join(self.folder, "haineko.json")
        with open(path, "w") as stream:
            stream.write("{}")
        for flags in (
            ("--sender", "nobody"),
            ("--sender", "a@[127.0.0.1]"),
            ("--sender", "a@b.example", "--selector", "a b"),
        ):
            with self.subTest(flags):
                self.assertEqual(run_here("check", "-c", path, *flags)[0], 2)
                self.assertEqual(run_here("check", "-c", path + ".none", *flags)[0], 1)  # no such file


class RecordsOfASender(unittest.TestCase):
    """What is read in the records, without a name server."""

    def look(self, step: str, zone: dict, selector: str | None = None, keys: dict | None = None) -> tuple:
        """(whether all is well, what is told) of a step of the check of a.example, with these TXT records in DNS."""

        class Zone:
            async def lookup(self, name: str, *_) -> haineko.DNSAnswer:
                return haineko.DNSAnswer(0, zone.get(name, ()))

        results = haineko.run(haineko.check_sender_domain("a.example", selector, Zone(), keys or {}))
        return next((ok, text) for name, ok, text in results if name == step)

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
            ("v=spf1 include:none.example -all", "none.example: no SPF record"),
            ("v=spf1 include:i0.example -all", "more than 10 look-ups"),
            ("v=spf1 " + "a mx " * 6 + "-all", "more than 10 look-ups"),
            ("v=spf1 include:a.example -all", ""),
            ("v=spf10 -all", "no SPF record"),
        ]
        for record, words in cases:
            with self.subTest(record):
                zone = {"a.example": (record,), "b.example": ("v=spf1 mx -all",), **chain}
                fine, told = self.look("SPF", zone)
                self.assertEqual(fine, not words, told)
                self.assertIn(words, told)
        self.assertIn("more than one", self.look("SPF", {"a.example": ("v=spf1 -all", "v=spf1 mx -all")})[1])
        self.assertIn(
            "(2 of 10",
            self.look("SPF", {"a.example": ("v=spf1 a:b.example/24 mx//64 ip4:192.0.2.1 ~all",)})[1],
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
                found, told = self.look("DKIM", {"s._domainkey.a.example": texts}, "s")
                self.assertEqual(found, fine, told)
                self.assertIn(words, told)

    def test_dkim_key_of_the_settings(self):
        keys = settings(dkim=dkim_keys("example", key=TEST_RSA_KEY)).dkim
        ours, other = (haineko.dkim_record(settings(dkim=dkim_keys("x.jp", key=key)).dkim["x.jp"])
                       for key in (TEST_RSA_KEY, RFC8463_KEY))  # fmt: skip
        for selector, texts, fine, words in (
            (None, (ours,), True, "s1._domainkey.example: RSA, 2048 bits"),
            ("s1", (ours[:100] + " " + ours[100:],), True, "s1._domainkey.example: RSA, 2048 bits"),
            (None, (other,), False, "not the key of the settings"),
            (None, (), False, "no key"),
            ("s2", (other,), True, "s2._domainkey.a.example: ed25519"),
        ):
            with self.subTest(selector, texts=texts):
                zone = {"s1._domainkey.example": texts, "s2._domainkey.a.example": texts}
                found, told = self.look("DKIM", zone, selector, keys)
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
                found, told = self.look("DMARC", zone)
                self.assertEqual(found, fine, told)
                self.assertIn(words, told)


class SendmailShares(Folder, Peers):
    """`sendmail` and `raw` make the same of a finished message."""

    def setUp(self) -> None:
        Folder.setUp(self)
        Peers.setUp(self)

    def test_the_same_message(self):
        peer = self.peer(None, "8BITMIME")
        force = {
            "smtpd": {"hostname": NAME},
            "recipients": {"open-relay": 1},
            "mailertable": {"default": {"host": peer.host, "port": peer.port, "timeout": 2}},
        }
        path = self.write("haineko.json", force)
        text = "From: a@example.org\nTo: b@example.jp, d@example.jp\nBcc: ねこ <c@日本語.jp>\n"
        text += (
            "Date: Fri, 3 Jan 2014 18:35:58 +0900\nMessage-ID: <a@b>\nSubject: x\nContent-Type: text/html\n\n猫\n"
            + "y" * 1200
            + "\n"
        )
        ended = run_here("sendmail", "-C", path, "-t", "-i", "-f", "a@example.org", given=text)
        self.assertEqual(ended, (0, "", ""))
        status, _ = posted({"mail": "a@example.org", "raw": text}, settings(**force))
        self.assertEqual(status, 200)
        (_, rcpt, one, _), (_, rcpt_too, two, _) = peer.mails
        self.assertEqual((rcpt, len(rcpt)), (rcpt_too, 3))
        self.assertIn("RCPT TO:<c@xn--wgv71a119e.jp>", rcpt)
        self.assertEqual(*[re.sub(rb"\AReceived: .*(?:\r\n[ \t].*)*\r\n", b"", octets) for octets in (one, two)])
        self.assertNotIn(b"Bcc", one)

    def test_the_null_sender_and_a_recipient_refused(self):
        peer = self.peer({"RCPT": "550 5.1.1 who?"})
        path = self.write(
            "haineko.json",
            {
                "recipients": {"open-relay": 1},
                "smtpd": {"hostname": NAME},
                "mailertable": {"default": {"host": peer.host, "port": peer.port, "timeout": 2}},
            },
        )
        code, _, err = run_here("sendmail", "-C", path, "-f", "<>", "c@日本語.jp", given="Subject: x\n\ny\n")
        self.assertEqual(code, 69)
        self.assertIn("<c@日本語.jp>: 550 RCPT", err)
        self.assertIn("MAIL FROM:<>", peer.lines)


# ======================================================================================================================
# The whole: attacks, README.md
# ======================================================================================================================


class Attacks(Quiet):
    """What a hostile client, server or machine does, with a bound on what it may cost."""

    def test_patterns_take_time_by_length_only(self):
        spaces = b" " * 60000
        head = b"GET / HTTP/1.1\r\n"

        def length_of(value: bytes) -> int:
            return haineko.body_length(haineko.parse_head(b"POST / HTTP/1.1\r\nContent-Length: " + value))

        for what, function, octets in (
            ("spaces in a length", length_of, b"1" + spaces + b",1" + spaces + b"x"),
            ("a length again and again", length_of, b"111111111111111111" + b",111111111111111111" * 3000 + b",1"),
            ("spaces within a value", haineko.parse_head, head + b"A: x" + spaces + b"y"),
            ("spaces and a NUL", haineko.parse_head, head + b"A:" + spaces + b"\0"),
            ("spaces in a reply", haineko.parse_reply, b"250 " + spaces + b"\rx\n"),
            ("white space in a reply", haineko.parse_reply, b"250" + b"\t" * 60000 + b"x\n"),
        ):
            with self.subTest(what):
                began = time.process_time()
                with contextlib.suppress(haineko.Rejected, haineko.ProtocolError):
                    function(octets)
                self.assertLess(time.process_time() - began, 0.2)

    def test_white_space_around_values(self):
        found = haineko.parse_head(b"GET / HTTP/1.1\r\nA: \t b \t\r\nB:\r\nC:\xa0c\x0b").headers
        self.assertEqual(found, {"a": "b", "b": "", "c": "\xa0c\x0b"})
        for line, wanted in ((b"250 a b \r", "a b "), (b"250\t\r", ""), (b"250", ""), (b"250 \r\r", "")):
            self.assertEqual(haineko.parse_reply(line + b"\n")[0].lines[0], wanted)
        odd = haineko.parse_head(b"POST / HTTP/1.1\r\nContent-Length: 5\xa0")
        with self.assertRaises(haineko.Rejected):
            haineko.body_length(odd)

    def test_a_subject_of_voice_marks(self):
        for charset in ("UTF-8", "ISO-2022-JP"):
            began = time.process_time()
            field = haineko.text_field("Subject", "ﾞ" * 4000, charset)
            self.assertLess(time.process_time() - began, 0.5, charset)
            self.assertLess(max(map(len, field.split("\r\n"))), 77)

    def test_chunks_of_one_octet_count_by_their_lines(self):
        body = json.dumps(document()).encode()
        for lead, status in ((b"", 200), (b";" + b"x" * 600, 413)):
            chunks = b"".join(b"1%b\r\n%c\r\n" % (lead, octet) for octet in body)
            octets = b"POST /submit HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
            with self.subTest(status):
                small = settings(smtpd={"hostname": "relay.example.org", "max_message_size": 2000})
                self.assertEqual(over_http(octets, small)[0], status)

    def test_what_is_remembered_is_short(self):
        long = "a" * 500000
        many = ", ".join(f"a{i}@example.jp" for i in range(2000))
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for i in range(12):
            for submission in (
                document(mail=f"{i}{long}"),
                document(rcpt=[f"{i}{long}"]),
                document(ehlo=f"[{i}{long}]"),
                document(header={"charset": f"{i}{long}"}),
                document(header={"from": f"b{i}@example.jp, {many}"}),
                document(header={"replyto": f"c{i}@example.jp, {many}"}),
            ):
                posted(submission)
        self.assertLess(tracemalloc.get_traced_memory()[0], 3 << 20)

    def test_faults_behind_which_nobody_reads_on(self):
        many = range(20000)
        for body in (
            {"header": {"subject": "x", **{f"odd{i}": 1 for i in many}}},
            {"header": {"references": ["x" for _ in many]}},
            {"rcpt": [1 for _ in many]},
        ):
            self.assertEqual(len(haineko.parse_submission(json.dumps(body).encode())[1]), haineko.MAX_ERRORS)

    def test_the_client_behind_a_proxy(self):
        behind = settings(
            httpd={"trusted_proxies": ["127.0.0.1"]}, relayhosts={"relayhosts": ["127.0.0.1", "192.0.2.9"]}
        )
        for forwarded, status in (
            ("192.0.2.9", 200),
            ("192.0.2.9:4711", 200),
            ("198.51.100.1:4711", 403),
            ("[2001:db8::1]:4711", 403),
            ("127.0.0.1, 198.51.100.1", 403),
            ("unknown", 400),  # must not pass for the proxy's own
            ("", 400),
            ("192.0.2.9, nonsense", 400),
        ):
            with self.subTest(forwarded):
                octets = http_post(json.dumps(document()).encode(), **{"X-Forwarded-For": forwarded})
                self.assertEqual(over_http(octets, behind)[0], status)

    def test_the_digest_of_a_document_is_that_of_its_values(self):
        text = b'{"mail": "a@example.org", "header": {"subject": "\xe7\x8c\xab", "from": "a@example.org"}, "body": "x"}'
        same = (
            b'{"body":"x","header":{"from":"a@example.org","subject":"\\u732b"},\n"mail":"\\u0061@example.org"}',
            b"\xef\xbb\xbf" + text,
        )
        others = (text.replace(b'"x"', b'"X"'), text.replace(b'"x"', b'["x"]'), text.replace(b"header", b"headers"))
        self.assertEqual({haineko.document_digest(octets) for octets in same}, {haineko.document_digest(text)})
        self.assertEqual(len({haineko.document_digest(octets) for octets in (text, *others)}), 4)

    def test_a_key_without_login_is_that_of_its_client(self):
        force = haineko.replace(settings(), queue=True)  # any
        found = set()
        for client, login in (("192.0.2.1", ""), ("192.0.2.2", ""), ("192.0.2.1", "neko"), ("192.0.2.2", "neko")):
            asked = request(b"{}", client, **{"idempotency-key": "k"})
            asked.login, asked.settings = login, force
            found.add(haineko.queue_options(asked, haineko.Submission())[1])
        self.assertEqual(len(found), 3)

    def test_settings_are_not_for_a_page_whose_name_was_rebound(self):
        for host, status in (
            ("Host: evil.example:2794\r\n", 403),
            ("Host: 127.0.0.1.evil.example\r\n", 403),
            ("Host: localhost:2794\r\n", 200),
            ("Host: 127.0.0.1:2794\r\n", 200),
            ("Host: [::1]:2794\r\n", 200),
            ("Host: relay.example.org\r\n", 200),
            ("", 400),
        ):
            with self.subTest(host):
                octets = f"GET /conf HTTP/1.1\r\n{host}\r\n".encode()
                self.assertEqual(over_http(octets, settings())[0], status)

    def test_a_long_list_of_recipients_makes_lines_that_a_pipe_takes_whole(self):
        said = haineko.Reply("250", "2.0.0", "DATA", ("ok " * 300,), "ESMTP", "127.0.0.1", 25)
        for name, domain, counts in (
            ("x" * 200, "y" * 40, [8, 8, 4]),
            ("x", "y", [20]),
            ("x" + "猫" * 78, "y", [8, 8, 4]),
        ):
            to = [f"{name}{i}@{domain}.example" for i in range(20)]
            mail = haineko.Transaction(
                haineko.Route(), NAME, "Q" * 16, "a@example.org", tuple(to), haineko.Message((b"",))
            )
            haineko.log_results(request(b""), [haineko.TransactionResult(mail, [said] * 20, 1.0)])
            lines = self.logged()
            with self.subTest(name[:3]):
                self.assertEqual([line.count("@") - 1 for line in lines], counts)
                self.assertLess(max(len(line.encode()) for line in lines), select.PIPE_BUF)
                self.assertEqual(re.findall("<(x[^>]*)>", "".join(lines)), to)

    def test_an_address_can_not_forge_a_field_of_the_log(self):
        route = haineko.Route(mailer="Discard")
        job = haineko.Transaction(
            route, NAME, "q", '"a> code=250"@x.jp', ('"b> dsn=2.0.0"@x.jp',), haineko.Message((b"",))
        )
        asked = haineko.Request("", "", {}, b"", haineko.parse_ip("127.0.0.1"), None, None, NOW, settings())
        said = haineko.make_reply("done", word="Discarded", mailer="Discard")
        haineko.log_results(asked, [haineko.TransactionResult(job, [said], 1.0)])
        lines = self.logged()
        self.assertIn(
            r'from="<\"a> code=250\"@x.jp>" to="<\"b> dsn=2.0.0\"@x.jp>" relay=Discard delay=0.001 dsn=2.0.0 ', lines[0]
        )

    def test_a_server_that_repeats_our_password(self):
        plain = base64.b64encode(b"\0neko\0hunter2secret").decode()
        word = base64.b64encode(b"hunter2secret").decode()
        route = haineko.Route(credentials=("neko", "hunter2secret"))
        session = haineko.Session(route, "relay.example.org")
        session.masked = "********"
        session._feed(f"500 unknown: {plain} {word} hunter2secret\r\n".encode())
        self.assertEqual(session._next_reply().lines, ("unknown: ******** ******** ********",))


class AttacksOnFiles(Folder):
    """What stands where a file should be."""

    def test_no_file_there(self):
        path = os.path.join(self.folder, "haineko.json")
        for what, make in (
            ("is not a regular file", lambda: os.mkfifo(path)),  # would be waited for
            ("is not a regular file", lambda: os.symlink("/dev/zero", path)),  # has no end
            ("Is a directory", lambda: os.mkdir(path)),
            ("symbolic links", lambda: os.symlink(path, path)),
        ):
            make()
            with self.subTest(what):
                self.assertIn(what, haineko.load_settings(path)[1][0])
            (os.rmdir if os.path.isdir(path) else os.unlink)(path)

    def test_a_listening_socket_takes_no_file_s_place(self):
        path = self.write("precious", "neko")
        with self.assertRaises(OSError):
            haineko.bind(f"unix:{path}")
        with open(path) as stream:
            self.assertEqual(stream.read(), "neko")
        place = os.path.join(self.folder, "left-over")
        with socket.socket(socket.AF_UNIX) as old:
            old.bind(place)
        haineko.bind(f"unix:{place}").close()

    def test_send_to_a_place_that_is_none(self):
        for url in (
            "http://127.0.0.1:99999/",
            "http://[::1",
            "http://127.0.0.1:9/ねこ",
            "ftp://127.0.0.1/",
            "http://a..b/",
            "neko",
        ):
            with self.subTest(url):
                code, out, err = run_here("send", "--url", url, given=b"{}")
                self.assertEqual((code, out), (2, ""))
                self.assertIn("is no URL of a Haineko", err)

    def test_send_by_a_file_and_by_flags_at_once(self):
        for words in (["mail.json", "--to", "a@b.jp"], ["mail.json", "--subject", "x"], ["--sender", "a@b.jp"]):
            code, _, err = run_here("send", *words)
            self.assertEqual((code, "want --to, and no FILE" in err), (2, True), err)

    def test_an_answer_with_what_a_terminal_would_obey(self):
        item = dict.fromkeys(("rcpt", "error", "code", "dsn", "command", "mailer"), 0)
        item["message"] = ["\ud800\x9b2J\u202e\x1b", "ねこ🐈"]
        with HttpPeer(lambda asked: (200, json.dumps({"response": [item]}).encode())) as peer:
            shown = run_here("send", "--url", peer.url, given=b"{}")[1]
        self.assertIn(r'"\ud800\u009b2J\u202e\u001b"', shown)
        self.assertIn('"ねこ🐈"', shown)
        self.assertTrue(shown.replace("\n", "").isprintable())

    def test_sendmail_without_stdin(self):
        config = self.write(
            "c.json", {"recipients": {"open-relay": 1}, "mailertable": {"default": {"mailer": "Discard"}}}
        )
        words = f'exec "{sys.executable}" "{PROGRAM}" sendmail -C "{config}" -f neko@example.org a@example.jp <&-'
        done = subprocess.run(words, shell=True, env=environment(), stderr=subprocess.PIPE, timeout=20, check=False)
        self.assertEqual((done.returncode, done.stderr), (0, b""))


class Readme(unittest.TestCase):
    """What README.md says is so: each fenced block is run, and each name that a reader may need stands in a table."""

    URL = "http://127.0.0.1:2794/"  # as README.md has it; replaced by a test's own
    ALL = os.environ.get("HAINEKO_ALL") == "1"  # what takes seconds to start, too

    @classmethod
    def setUpClass(cls):
        cls.text = README
        cls.blocks = re.findall(r"^```(\w+) ?([\w ]*)\n(.*?)^```$", cls.text, re.MULTILINE | re.DOTALL)
        cls.folder = tempfile.mkdtemp(prefix="haineko-readme.")
        cls.addClassCleanup(shutil.rmtree, cls.folder, True)
        for name in ("haineko.py", "haineko.json.example"):
            shutil.copy(os.path.join(HERE, name), cls.folder)
        for language, mark, name in (("json", "settings", "settings.json"), ("json", "faulty", "faulty.json")):
            cls.write(name, cls.marked(language, mark)[0])
        cls.logs = []
        cls.url = cls.serve()
        nobody = {"httpd": {"listen": "127.0.0.1:0", "workers": 1}, "recipients": {}}
        flags = ("-c", cls.write("nobody.json", json.dumps(nobody)))
        cls.refusing = cls.serve(*flags, program=("-m", "haineko"))  # as in production

    @classmethod
    def marked(cls, language, mark):
        """The blocks of that language and mark."""
        return [text for word, words, text in cls.blocks if (word, words) == (language, mark)]

    @classmethod
    def write(cls, name, text):
        """A file in the folder, readable by its owner only; gives its path."""
        path = os.path.join(cls.folder, name)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
            stream.write(text)
        return path

    @classmethod
    def environment(cls, url=None):
        path = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
        return environment(PATH=path, no_proxy="*", **({"HAINEKO_URL": url} if url else {}))

    @classmethod
    def serve(cls, *flags, program=("haineko.py",)):
        """Starts a server until the class is done; gives its URL."""
        command = [sys.executable, *program, "serve", *(flags or ("--listen", "127.0.0.1:0", "--workers", "1"))]
        cls.logs.append(os.path.join(cls.folder, f"log{len(cls.logs)}"))
        with open(cls.logs[-1], "w+b") as log:
            server = subprocess.Popen(command, cwd=cls.folder, env=cls.environment(), stderr=log)
            cls.addClassCleanup(server.wait)
            cls.addClassCleanup(server.send_signal, signal.SIGTERM)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                log.seek(0)
                found = re.search(rb"listens at (\S+)", log.read())
                if found:
                    return found[1].decode()
                if server.poll() is not None:
                    break
                time.sleep(0.01)
            raise AssertionError(f"the server did not start: {command}")

    def printed(self):
        """What the server without settings has printed."""
        with open(self.logs[0], encoding="utf-8") as stream:
            return stream.read()

    def run_it(self, command, url=None, stdin="", expect=0, **variables):
        """Output of a command, in the folder, with the server's URL in place of README's."""
        command = [word.replace(self.URL, url or self.url) for word in command]
        done = subprocess.run(
            command,
            input=stdin.encode(),
            cwd=self.folder,
            env={**self.environment((url or self.url) + "submit"), **variables},
            check=False,
            capture_output=True,
            timeout=120,
        )
        output = done.stdout.decode() + done.stderr.decode()
        self.assertEqual(done.returncode, expect, f"{command}\n{output}")
        return done.stdout.decode() + (done.stderr.decode() if expect else "")

    def test_every_block_is_tested(self):
        known = {
            *[("sh", mark) for mark in ("first", "curl", "smarthost", "client", "root", "queue", "")],
            *[("json", mark) for mark in ("answer", "faulty", "settings", "submission", "event")],
            *[(name, "client") for name in ("python", "javascript", "php", "ruby", "perl", "go", "java", "html")],
            ("yaml", ""),
            ("dockerfile", ""),
            ("console", ""),
            ("console", "connect"),
            ("nginx", ""),
            ("nginx", "two"),
        }
        self.assertEqual({(language, mark) for language, mark, _ in self.blocks}, known)
        self.assertEqual(len(self.blocks) * 2, len(re.findall(r"^```", self.text, re.MULTILINE)))

    def test_the_first_minute(self):
        (first,), (curl,), (shown,) = (self.marked(*at) for at in (("sh", "first"), ("sh", "curl"), ("json", "answer")))
        commands = [line.partition("#")[0].split() for line in first.splitlines()]
        self.assertEqual(commands, [["python3", "haineko.py", "serve"], ["python3", "-m", "unittest"]])
        self.assertIn(self.URL, first)
        told, meant = json.loads(self.run_it(["sh", "-euc", curl])), json.loads(shown)
        self.assertEqual(list(told), list(meant))
        for key in ("addresser", "recipient", "response", "remoteaddr", "referer"):
            self.assertEqual(told[key], meant[key])
        self.assertIn("Subject: Nyaaaa", self.printed())

    def test_the_smart_host(self):
        (commands,) = self.marked("sh", "smarthost")
        lines = (("host", "smtp.example.org", "smtp.example.net"), ("username", "", "me"), ("password", "", "nyan"))
        edits = " ".join(f'-e \'s/"{key}": "{old}"/"{key}": "{new}"/\'' for key, old, new in lines)
        editor = self.write("editor", f'#!/bin/sh\nsed {edits} "$1" >"$1.new" && cat "$1.new" >"$1"\n')
        os.chmod(editor, 0o700)
        self.addCleanup(lambda: os.unlink(os.path.join(self.folder, "haineko.json")))
        output = self.run_it(["sh", "-euc", commands], EDITOR=editor)
        self.assertIn("fine; mail goes to ESMTP smtp.example.net:587, STARTTLS, AUTH as relay", output)
        settings, faults = haineko.load_settings(os.path.join(self.folder, "haineko.json"))
        self.assertEqual((faults, settings.mailertable["default"].credentials), ([], ("me", "nyan")))
        self.assertEqual(os.stat(os.path.join(self.folder, "haineko.json")).st_mode & 0o777, 0o600)

    def test_shell_commands(self):
        for commands in self.marked("sh", ""):
            with self.subTest(commands):
                self.run_it(["sh", "-euc", commands])
        for commands in self.marked("sh", "root"):  # not on this machine, but each must be a command
            self.run_it(["sh", "-n"], stdin=commands)

    def test_what_commands_print(self):
        for session in self.marked("console", ""):
            command, _, wanted = session[2:].partition("\n")
            with self.subTest(command):
                self.assertEqual(self.run_it(["sh", "-c", f"{command} || true"]), wanted)

    def test_settings(self):
        for i, text in enumerate(self.marked("json", "settings")):
            with self.subTest(text):
                for name in re.findall(r'"env": "(\w+)"', text):
                    os.environ[name] = "nyan"
                    self.addCleanup(os.environ.pop, name, None)
                self.assertEqual(haineko.load_settings(self.write(f"settings{i}.json", text))[1], [])
        for text in self.marked("json", "faulty"):
            self.assertNotEqual(haineko.load_settings(self.write("faulty.json", text))[1], [])

    def test_submissions(self):
        for text in self.marked("json", "submission"):
            request = urllib.request.Request(self.url + "submit", text.encode())
            with urllib.request.urlopen(request, timeout=10) as response:
                self.assertEqual((response.status, json.load(response)["response"][0]["error"]), (200, 0))

    CLIENTS = (  # (language, file, command, whether it is slow to start)
        ("sh", "client.sh", ["sh", "-eu"], False),
        ("python", "client.py", ["python3"], False),
        ("javascript", "client.mjs", ["node"], False),
        ("php", "client.php", ["php"], False),
        ("ruby", "client.rb", ["ruby"], False),
        ("perl", "client.pl", ["perl"], False),
        ("go", "client.go", ["go", "run"], True),
        ("java", "Mail.java", ["java"], True),
    )

    def test_clients(self):
        for language, name, command, slow in self.CLIENTS:
            with self.subTest(language):
                if slow and not self.ALL:
                    self.skipTest("slow to start; HAINEKO_ALL=1 runs it")
                tools = [command[0], "curl"] if language == "sh" else command[:1]
                missing = [tool for tool in tools if not shutil.which(tool, path=self.environment()["PATH"])]
                if missing:
                    self.skipTest(f"no {missing[0]} on this machine")
                (text,) = self.marked(language, "client")
                subject = re.search(r"Hello from \w+", text)[0]
                program = [*command, self.write(name, text)]
                accepted = self.run_it(program)
                self.assertIn("mikeneko@example.jp", accepted)
                self.assertIn("200", accepted)
                self.assertIn(f"Subject: {subject}\n", self.printed())
                refused = self.run_it(program, self.refusing, expect=1)
                self.assertIn("553", refused)
                self.assertIn("Recipient address is not permitted", refused)

    def test_web_page(self):
        browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if not (browser and self.ALL):
            self.skipTest("slow to start; HAINEKO_ALL=1 runs it" if browser else "no Chromium on this machine")
        (page,) = self.marked("html", "client")
        folder = os.path.join(self.folder, "pages")
        os.mkdir(folder)
        port = self.web_server(folder)
        origin = f"http://127.0.0.1:{port}"
        settings = {"httpd": {"listen": "127.0.0.1:0", "workers": 1, "allowed_origins": [origin]}}
        settings.update(recipients={"open-relay": True}, mailertable={"default": {"mailer": "Discard"}})
        welcome = self.serve("-c", self.write("web.json", json.dumps(settings)), "--workers", "1")
        for url, wanted in ((welcome, "Sent."), (self.url, "No connection.")):  # the latter allows no origin
            with self.subTest(wanted):
                submit = "<script>document.forms[0].requestSubmit()</script>\n"
                self.write("pages/page.html", page.replace(self.URL, url) + submit)
                flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
                flags += ["--virtual-time-budget=5000", "--dump-dom"]
                self.assertIn(f"<output>{wanted}</output>", self.run_it([browser, *flags, f"{origin}/page.html"]))

    def web_server(self, folder):
        """The port of a web server for the folder, until the test is done."""
        command = [sys.executable, "-um", "http.server", "--bind", "127.0.0.1", "--directory", folder, "0"]
        web = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.addCleanup(web.stdout.close)
        self.addCleanup(web.wait)
        self.addCleanup(web.terminate)
        return int(re.search(rb"port (\d+)", web.stdout.readline())[1])

    def test_nginx(self):
        if not (shutil.which("nginx") and shutil.which("openssl")):
            self.skipTest("no nginx or openssl on this machine")
        certificate, key = (os.path.join(self.folder, name) for name in ("tls.pem", "tls.key"))
        new = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
        ]
        self.run_it([*new, "-subj", "/CN=mail.example.org", "-keyout", key, "-out", certificate])
        for shown in [text for language, _, text in self.blocks if language == "nginx"]:
            block = shown.replace("listen 443", f"listen unix:{self.folder}/nginx.sock")  # -t binds it for a moment
            for word, path in (("ssl_certificate", certificate), ("ssl_certificate_key", key)):
                block = re.sub(rf"({word} +)[^;]+", rf"\1{path}", block)
            place = f"access_log off; client_body_temp_path {self.folder}/body; proxy_temp_path {self.folder}/proxy;"
            place += "".join(f"{name}_temp_path {self.folder}/{name};" for name in ("fastcgi", "uwsgi", "scgi"))
            path = self.write("nginx.conf", f"pid {self.folder}/pid; events {{}} http {{ {place}\n{block} }}")
            self.run_it(["nginx", "-t", "-q", "-e", "stderr", "-p", self.folder, "-c", path])

    def test_rules_of_alerts(self):
        if not shutil.which("promtool"):
            self.skipTest("no promtool on this machine")
        (rules,) = re.findall(r"(?ms)^```yaml\n(.*?)^```$", self.text)
        path = os.path.join(self.folder, "rules.yml")
        with open(path, "w") as stream:
            stream.write(rules)
        self.assertIn("SUCCESS: 5 rules found", self.run_it(["promtool", "check", "rules", path]))
        for name in re.findall(r"haineko_\w+", rules):
            self.assertIn(name, haineko.METRICS)

    def test_systemd(self):
        output = self.run_it(["python3", "haineko.py", "setup", "--dest", "etc"])
        paths = [
            os.path.join(self.folder, "etc", name) for name in ("haineko.json", "haineko.service", "haineko.socket")
        ]
        self.assertEqual(output.split(), paths)
        self.assertEqual(haineko.load_settings(paths[0])[1], [])
        if not shutil.which("systemd-analyze"):
            self.skipTest("no systemd-analyze on this machine")
        self.assertEqual(self.run_it(["systemd-analyze", "verify", "--man=no", *paths[1:]]), "")
        found = self.run_it(["systemd-analyze", "security", "--offline=yes", paths[1]])
        self.assertLessEqual(float(re.search(r"exposure level for haineko.service: ([\d.]+)", found)[1]), 1.5)

    def test_every_setting_stands_in_a_table(self):
        """With its default."""
        classes = (haineko.Httpd, haineko.Tls, haineko.Smtpd, haineko.Syslog, haineko.Relayhosts, haineko.Recipients)
        for cls in (*classes, haineko.Route, haineko.Credentials, haineko.OAuth2):
            for key, default in haineko.redacted(cls()).items():
                wanted = default[0] if key == "listen" else default
                wanted = "see below" if key == "syslog" else f"`{json.dumps(wanted)}`"
                with self.subTest(key, section=cls.__name__):
                    self.assertIn(f"`{key}` | {wanted} |", self.rows_of_section(cls))
        for name in haineko.key_table(haineko.Settings):
            with self.subTest(name):
                self.assertRegex(self.text, rf"(?m)^### .*\b{name}\b")

    def rows_of_section(self, cls):
        """The rows of a table of settings from that of the section's name to that of the next one."""
        names = {haineko.Tls: "`httpd.tls`", haineko.Syslog: "`smtpd.syslog`"}
        names.update({haineko.Route: "a route", haineko.Credentials: "`authinfo`, a name", haineko.OAuth2: "`oauth2`"})
        name = names.get(cls, f"`{cls.__name__.lower()}`")
        (found,) = re.findall(rf"(?m)^\| {re.escape(name)} \|.*\n(?:\| \| .*\n)*", self.text)
        return found

    def test_the_table_of_relays_follows_from_their_rows(self):
        rows = re.findall(r"(?m)^\| `(\w+)` \| (.*) \|.*\|$", self.text[self.text.index("\n## Relays\n") :])
        described = dict(rows[: len(haineko.RELAYS)])
        self.assertEqual(sorted(described), sorted(haineko.RELAYS))
        for name, relay in haineko.RELAYS.items():
            keys = [key for key in relay.needs if key != "auth"]
            keys += relay.login if "auth" in relay.needs else ()
            for text in (
                *(f"`{key}`" for key in keys),
                *([str(relay.default_port)] if relay.default_port != 25 else []),
            ):
                with self.subTest(name, text=text):
                    self.assertIn(text, described[name])

    def test_every_row_of_a_table_stands_in_a_table(self):
        for name in haineko.COMMANDS:
            self.assertRegex(self.text, rf"(?m)^\|.*`{name}[ `].*\|", name)
        for method, path in haineko.ENDPOINTS:
            self.assertIn(f"`{method} {path}`", self.text)
        for slug, (status, code, dsn, command, line) in haineko.REPLIES.items():
            with self.subTest(slug):
                words = re.escape(line).replace("%s", "GET" if slug == "method" else r"\w+")
                if line != "%s" and code != "200":
                    head = rf"[^|]*\b{status}\b[^|]*\|.*" if status else ".*"  # a refusal: the row of its status
                    said = " ".join(re.escape(word) for word in (code, dsn, command) if word)
                    self.assertRegex(self.text, rf"(?m)^\|{head}(?:\| |<br>){said} {words}(?: \||<br>| \()")
        for key in (
            *haineko.key_table(haineko.Submission),
            *(f"header.{key}" for key in haineko.key_table(haineko.Header)),
        ):
            if key not in ("header", "header.reply-to"):
                self.assertRegex(self.text, rf"(?m)^\|.*`{re.escape(key)}`.*\|", key)


class SideBySide(unittest.TestSuite):
    """Runs each class of tests in a process of its own, several at a time: most of them wait for deadlines."""

    AT_ONCE = 6
    KINDS = ("failures", "errors", "skipped")

    def run(self, result, debug=False):
        waiting, running = list(self), {}
        while waiting or running:
            while waiting and len(running) < self.AT_ONCE:
                suite, output = waiting.pop(0), tempfile.TemporaryFile()  # noqa: SIM115 -- closed below
                running[self.start(suite, output)] = suite, output
            pid, status = os.wait()
            suite, output = running.pop(pid)
            with output:
                output.seek(0)
                lost = {
                    "run": 0,
                    "failures": [],
                    "skipped": [],
                    "errors": [(str(suite), f"its process ended: {status}")],
                }
                self.add(result, json.loads(output.read() or json.dumps(lost)))
        return result

    def start(self, suite, output) -> int:
        """Process id of a process that runs the suite and writes what came of it."""
        pid = os.fork()
        if pid:
            return pid
        try:
            result = unittest.TestResult()
            suite.run(result)
            found = {kind: [(str(test), text) for test, text in getattr(result, kind)] for kind in self.KINDS}
            output.write(json.dumps({"run": result.testsRun, **found}).encode())
            output.flush()
        finally:
            os._exit(0)

    def add(self, result, found: dict) -> None:
        result.testsRun += found["run"]
        others = 0
        for kind, letter in zip(self.KINDS, "FEs"):
            items = [(unittest.FunctionTestCase(print, description=name), text) for name, text in found[kind]]
            getattr(result, kind).extend(items)
            result.stream.write(letter * len(items))
            others += len(items)
        result.stream.write("." * max(0, found["run"] - others))
        result.stream.flush()


def load_tests(loader, classes, pattern):
    """The whole module: its classes side by side, those that take longest first."""
    suites = [suite for suite in classes if suite.countTestCases()]
    return SideBySide(sorted(suites, key=lambda suite: -suite.countTestCases()))


if __name__ == "__main__":
    unittest.main()
