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
import importlib
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
import struct
import subprocess
import symtable
import sys
import tempfile
import termios
import textwrap
import threading
import time
import tracemalloc
import unittest
import urllib.request
from dataclasses import replace
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
DEFAULTS = {"smtpd": {"hostname": NAME}, "recipients": {"open-relay": 1}}
DEFAULTS["mailertable"] = {"default": {"mailer": "Discard"}}
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
    return post(body, *[f"{name}: {value}" for name, value in headers.items()])


class Quiet(unittest.TestCase):
    """A test whose log lines go into a file, where it may read them."""

    def setUp(self) -> None:
        self._lines = tempfile.TemporaryFile()  # noqa: SIM115 -- closed behind the test
        self.addCleanup(self._lines.close)
        self.addCleanup(vars(haineko.log).clear)  # back to the defaults of its class
        sys.stderr.flush()
        before = os.dup(2)
        os.dup2(self._lines.fileno(), 2)
        self.addCleanup(os.close, before)
        self.addCleanup(os.dup2, before, 2)

    def logged(self) -> list:
        """The lines since it was asked last."""
        self._lines.seek(0)
        lines = self._lines.read().decode().splitlines()
        self._lines.truncate(self._lines.seek(0))
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
        command += f" -addext subjectAltName={alternatives} -keyout {path} -out {path}"
        if subprocess.run(command.split(), capture_output=True, check=False).returncode:
            return
        os.chmod(path, 0o600)
        CERTIFICATES[name] = path


def certificate(name: str = "here") -> str:
    """Path of a certificate with its key; skips the test where there is no openssl to make one."""
    if name not in CERTIFICATES:
        raise unittest.SkipTest("no openssl here that makes certificates")
    return CERTIFICATES[name]


def eventually(condition, what: str = "", seconds: float = 10.0):
    """The first true thing that condition() gives; AssertionError where none comes in time."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"did not come in {seconds} s: {what or condition}")
        time.sleep(0.01)
    return found


USUAL = {
    "CONN": "220 peer.example ESMTP", "HELO": "250 peer.example", "STARTTLS": "220 2.0.0 go on",
    "MAIL": "250 2.1.0 sender fine", "RCPT": "250 2.1.5 recipient fine", "DATA": "354 go on", ".": "250 2.0.0 taken",
    "RSET": "250 2.0.0 forgotten", "QUIT": "221 2.0.0 bye",
}  # fmt: skip


class Closing:
    """What is closed at the end of a with statement."""

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


class ReceivedMail(NamedTuple):
    """A text that an SmtpPeer got."""

    mail: str  # the MAIL line
    rcpt: list  # the RCPT lines that were answered with 2xx
    text: bytes
    connection: SmtpConnection

    sender = property(lambda self: re.search("<(.*?)>", self.mail)[1])
    recipients = property(lambda self: [re.search("<(.*?)>", line)[1] for line in self.rcpt])


class SmtpPeer(Closing):
    """An SMTP server on a free port, at one or several addresses, whose replies a test decides; it records what it got.

    says: {verb: what}. Verbs: CONN (the greeting), EHLO ... QUIT, TLS (the handshake), TEXT (after the first octets of
    a text) and "." (its end). What: a reply (its lines divided by LF), octets to be sent as they are, SILENCE, HANG_UP;
    LOST (takes the mail, then hangs up); a list of these, one for each time, the last one for ever; or a function
    (connection, line) -> one of them, or None for the usual. says_at: {address: says} goes before `says`.
    """

    def __init__(self, says=None, offers=(), tls="", smtps=False, logins=None, hosts=("127.0.0.1",), port=0) -> None:
        self.says, self.offers, self.smtps, self.logins = dict(says or {}), offers, smtps, logins or {}
        self.says_at, self.context, self.closing = {}, tls, False
        if isinstance(tls, str) and tls:
            self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self.context.load_cert_chain(tls)
        self.connections, self.answers = [], []  # SmtpConnections; what came after a token was refused
        self.mails, self.taken, self.lost = [], [], []  # ReceivedMails: all; answered with 2xx or LOST; with LOST
        self.tries: collections.Counter = collections.Counter()  # texts for each recipient
        self.lock = threading.Lock()
        self.lone = self.now = self.most = 0  # texts without a line; those that wait for their reply; the most at once
        self.listeners: list = []
        while not self.listeners:
            self._listen(hosts, port)
        self.host, self.port = self.listeners[0].getsockname()[:2]
        self.threads = [threading.Thread(target=self._accept, args=(item,), daemon=True) for item in self.listeners]
        for thread in self.threads[:]:
            thread.start()

    def _listen(self, hosts: tuple, port: int) -> None:
        """Listen at every address with one port, or with none of them where another process has that port."""
        listeners: list = []
        with contextlib.ExitStack() as opened:
            for host in hosts:
                try:
                    family = socket.AF_INET6 if ":" in host else socket.AF_INET
                    listeners.append(socket.create_server((host, port), family=family, backlog=256))
                except OSError as fault:
                    if fault.errno == errno.EADDRNOTAVAIL:
                        raise unittest.SkipTest(f"{host} is no address of this machine") from None
                    if fault.errno != errno.EADDRINUSE or len(hosts) == 1:
                        raise
                    return
                opened.enter_context(listeners[-1])
                port = listeners[0].getsockname()[1]
            opened.pop_all()
        self.listeners = listeners

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
        self.lines, self.sender, self.recipients = [], "", []
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
        while True:
            self.more()

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
            self.peer.lone += not octets
            if octets:
                self.peer.mails.append(self.mail)
                self.peer.tries.update(self.mail.recipients)
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


class HttpClient(Closing):
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

    def more(self, must: bool = False) -> bool:
        octets = self.sock.recv(65536)
        self.unread += octets
        if must and not octets:
            raise EOFError(self.unread)
        return bool(octets)

    def head(self) -> tuple:
        """(status, headers) of the next answer."""
        while b"\r\n\r\n" not in self.unread:
            self.more(must=True)
        head, _, self.unread = self.unread.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        return int(first.split(" ")[1]), dict(line.split(": ", 1) for line in lines)

    def answer(self, method: str = "") -> tuple:
        """(status, headers, body as JSON or text) of the next answer."""
        status, headers = self.head()
        length = 0 if method == "HEAD" or status in (100, 204) else int(headers["Content-Length"])
        while len(self.unread) < length:
            self.more(must=True)
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


def can_run(program: str, **more) -> bool:
    """Whether a program starts, as another user, for instance."""
    with contextlib.suppress(OSError):
        return subprocess.run([program, "-c", ""], check=False, **more).returncode == 0
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
        how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": self.output, "cwd": self.folder}
        how.update(env=environment(), preexec_fn=self.before, start_new_session=True)
        self.process = subprocess.Popen([sys.executable, *self.COMMAND, "serve", *self.options], **how)
        listens = re.compile(r" listens at (.*)\n")  # the whole line
        try:
            eventually(lambda: self.process.poll() is not None or listens.search(self.log()[seen:]), "a server", 20)
        except AssertionError:
            self.close()
            raise
        found = listens.search(self.log()[seen:])
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

    return lambda connection, line: (gate.wait(8), USUAL["."])[1]


def sockets_open() -> int:
    """Number of this process's sockets; 0 where the system has no list."""
    gc.collect()
    found = 0
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):  # the folder itself, which was open
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return found


# ======================================================================================================================
# 9. Event loop
# ======================================================================================================================
class CountingSelector(selectors.SelectSelector):
    """Selector that counts how often it was asked to do something."""

    calls: collections.Counter = collections.Counter()  # noqa: RUF012

    def __getattribute__(self, name: str):
        if name in ("register", "modify", "unregister", "select"):
            self.calls[name] += 1
        return super().__getattribute__(name)


class AsyncSockets(Quiet):
    """AsyncSocket and EventLoop, with the selector of the system and with select()."""

    def on_each(self, story, *kinds) -> None:
        """Runs the coroutine function with each selector; it may take 20 seconds."""
        for selector in kinds or (selectors.DefaultSelector, selectors.SelectSelector):
            with self.subTest(selector.__name__), contextlib.closing(haineko.EventLoop(selector())) as loop:
                loop.run_until_complete(asyncio.wait_for(story(), 20))

    def pair(self) -> tuple:
        """(AsyncSocket, a non-blocking socket at its other end)."""
        here, there = socket.socketpair()
        for sock in (here, there):
            sock.setblocking(False)
            self.addCleanup(sock.close)
        return haineko.AsyncSocket(here), there

    @staticmethod
    async def recv(here: haineko.AsyncSocket, seconds: float = 9.0):
        """The next octet, or the type of the exception."""
        try:
            return await here.recv(1, time.monotonic() + seconds)
        except (OSError, ValueError) as fault:
            return type(fault)

    def test_a_wait_ends_at_its_deadline_and_the_socket_is_waited_for_again(self) -> None:
        async def one(here, there, seconds: float) -> float:
            began = time.monotonic()
            self.assertEqual(await self.recv(here, seconds), socket.timeout)
            late = time.monotonic() - began - seconds
            there.send(b"x")
            self.assertEqual(await self.recv(here), b"x")
            return late

        async def story() -> None:
            lates = [1.0]
            while len(lates) < 9 and min(lates) >= 0.03:  # a busy machine may be late
                found = await asyncio.gather(*[one(*self.pair(), seconds) for seconds in (0.1, 0.03, 0.06)])
                self.assertGreaterEqual(min(found), -0.002)
                lates.append(max(found))
            self.assertLess(min(lates), 0.03)
            here, there = self.pair()
            for first, second in ((2, 0.05), (0.3, 0.4), (float("inf"), 0.05)):  # a sooner and a later deadline
                self.assertEqual(await self.recv(here, -1), socket.timeout)
                asyncio.get_running_loop().call_later(0.01, there.send, b"y")
                self.assertEqual(await self.recv(here, first), b"y")
                began = time.monotonic()
                self.assertEqual(await self.recv(here, second), socket.timeout)
                self.assertTrue(second - 0.002 <= time.monotonic() - began < 1.5, (first, second))

        self.on_each(story)

    def test_waits_leave_the_selector_alone_and_idle_ones_cost_nothing(self) -> None:
        async def story() -> None:
            pairs, calls, loop = [self.pair() for _ in range(100)], CountingSelector.calls, asyncio.get_running_loop()
            calls.clear()
            idle = [asyncio.ensure_future(self.recv(here, 60)) for here, _ in pairs[1:]]
            here, there = pairs[0]
            for _ in range(50):
                loop.call_soon(there.send, b"x")
                self.assertEqual(await self.recv(here), b"x")
            self.assertEqual((calls["register"], calls["modify"], calls["unregister"]), (100, 0, 0))
            there.send(b"bc")  # while nobody waits for it
            turns = calls["select"]
            await asyncio.sleep(0.2)
            self.assertLess(calls["select"] - turns, 5)
            self.assertEqual((await self.recv(here), await self.recv(here)), (b"b", b"c"))
            loop.call_later(0.01, there.send, b"d")
            self.assertEqual(await self.recv(here), b"d")
            for here, _ in pairs:
                here.close()
            self.assertEqual(set(await asyncio.gather(*idle)), {ConnectionAbortedError})
            self.assertEqual(calls["unregister"], calls["register"])

        self.on_each(story, CountingSelector)

    def test_cancelled_or_closed(self) -> None:
        async def story() -> None:
            here, there = self.pair()
            task = asyncio.ensure_future(self.recv(here))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            there.send(b"x")
            self.assertEqual(await self.recv(here), b"x")  # a wait that was cancelled took nothing
            self.assertFalse(here.abort(ConnectionAbortedError("nobody waits")))
            task = asyncio.ensure_future(self.recv(here))
            await asyncio.sleep(0)
            number = here.sock.fileno()
            here.close()
            here.close()
            self.assertEqual(await task, ConnectionAbortedError)
            self.assertTrue(issubclass(await self.recv(here), (OSError, ValueError)))
            again, there = self.pair()  # the same file descriptor is another connection
            self.assertEqual(again.sock.fileno(), number)
            asyncio.get_running_loop().call_later(0.01, there.send, b"y")
            self.assertEqual(await self.recv(again), b"y")

        self.on_each(story)

    def test_more_than_a_buffer_is_sent_while_the_other_side_talks_and_by_tls(self) -> None:
        octets = os.urandom(1 << 16) * 64

        async def story() -> None:
            for secure in (False, True):
                (here, there), found, deadline = self.pair(), bytearray(), time.monotonic() + 8
                far = haineko.AsyncSocket(there)
                if secure:
                    pem, server = certificate(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                    server.load_cert_chain(pem)
                    options = {"server_hostname": "localhost", "do_handshake_on_connect": False}
                    here.sock = ssl.create_default_context(cafile=pem).wrap_socket(here.sock, **options)
                    far.sock = server.wrap_socket(there, server_side=True, do_handshake_on_connect=False)
                    await asyncio.gather(*[each.call(each.sock.do_handshake, deadline) for each in (here, far)])
                far.sock.send(b"not read yet")
                task = asyncio.ensure_future(here.sendall(octets, deadline))
                while len(found) < len(octets):
                    found += await far.recv(5000 if secure else 1 << 18, deadline)  # of a record TLS keeps the rest
                    await asyncio.sleep(0 if secure else 0.001)
                await task
                self.assertEqual(found, octets)
                self.assertEqual(await self.recv(far, 0.02), socket.timeout)
                with self.assertRaises(socket.timeout):
                    await here.sendall(octets, time.monotonic() + 0.05)
                far.close()
                with self.assertRaises(OSError if secure else ConnectionError):
                    await here.sendall(octets, time.monotonic() + 1)
                here.close()

        self.on_each(story)

    def test_sends_of_one_iteration_leave_together_behind_the_log_and_lines_without_one_from_any_thread(self) -> None:
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
            self.logged()
            haineko.log.start_buffering(asyncio.get_running_loop())
            haineko.log.lines("from the loop")
            await asyncio.sleep(0.01)
            self.assertEqual(haineko.log.buffer, [])
            await asyncio.to_thread(haineko.log.lines, "from a thread")
            await asyncio.sleep(0.01)
            self.assertEqual(haineko.log.buffer, [])
            told = [line.rpartition(": ")[2] for line in self.logged()]
            self.assertEqual(told, ["from the loop", "from a thread"])

        self.on_each(story)

    def test_a_thread_s_exception_is_raised_and_a_task_s_is_logged_and_no_file_stays_open(self) -> None:
        async def fails() -> None:
            raise KeyError("a fault of our own")

        async def story() -> None:
            with self.assertRaises(ValueError):
                await asyncio.gather(asyncio.to_thread(int, "no number"), asyncio.sleep(0.01))
            asyncio.get_running_loop().create_task(fails())
            await asyncio.sleep(0.01)
            gc.collect()
            self.assertIn("a fault of our own", self.logged()[-1])

        before = sockets_open()
        self.on_each(story)
        self.assertEqual(haineko.run(asyncio.sleep(0, "result")), "result")
        with self.assertRaises(ZeroDivisionError):
            haineko.run(asyncio.to_thread(divmod, 1, 0))
        self.assertEqual(sockets_open(), before)


def pem(text: str) -> str:
    """A PEM block of its label and its base64, in lines of any length."""
    label, *lines = text.split("\n")
    return f"-----BEGIN {label}-----\n{textwrap.fill(''.join(lines), 64)}\n-----END {label}-----\n"


# A certificate authority of the tests, and what it signed for mx.sts.example, mta-sts.sts.example and localhost.
TEST_CA = pem("""CERTIFICATE
MIIBVzCB/aADAgECAgEBMAoGCCqGSM49BAMCMBIxEDAOBgNVBAMMB1Rlc3QgQ0EwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBIxEDAOBgNV
BAMMB1Rlc3QgQ0EwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQ/HHxnRtJcnFxExsrv5c/P//ri0Cp4SWHXSygQbyFQWc4vmWT8rt686qpWvjfO2Z5y9X6s
fWF1eh5KHki0/xVDo0IwQDAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIBBjAdBgNVHQ4EFgQUvp1X/L8BMBsh/2ozSLl0YPaxePEwCgYIKoZIzj0E
AwIDSQAwRgIhAOOnqgZM5CI82Ga7nXYm3ssrZ4fNdx3mqWknER3WanXyAiEAwtwsuXE0gKn0T/blGI0jdlN73o/aLq7ufHD4cVwf/Qc=""")
TEST_CERTIFICATE = pem("""PRIVATE KEY
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgg1Z4tHh+RReEqgYH1Nq/vxus2we9iEn+qRczRW4tUZ2hRANCAASgdwFUMvncMaSlAsd0dJCF
8HFJk/lY7imLBXZJNtp0rDLbQhafk/CNFeBjQk77//L84YFNGGcbs2qu05oHy/3g""") + pem("""CERTIFICATE
MIIB0jCCAXegAwIBAgIBAjAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAdUZXN0IENBMCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAZMRcwFQYD
VQQDDA5teC5zdHMuZXhhbXBsZTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABKB3AVQy+dwxpKUCx3R0kIXwcUmT+VjuKYsFdkk22nSsMttCFp+T8I0V4GNC
Tvv/8vzhgU0YZxuzaq7TmgfL/eCjgbQwgbEwPwYDVR0RBDgwNoIObXguc3RzLmV4YW1wbGWCE210YS1zdHMuc3RzLmV4YW1wbGWCCWxvY2FsaG9zdIcEfwAA
ATAJBgNVHRMEAjAAMBMGA1UdJQQMMAoGCCsGAQUFBwMBMA4GA1UdDwEB/wQEAwIHgDAfBgNVHSMEGDAWgBS+nVf8vwEwGyH/ajNIuXRg9rF48TAdBgNVHQ4E
FgQUfjxj6TwHJDS8FRpR8APLBM0kt98wCgYIKoZIzj0EAwIDSQAwRgIhAKHoRao05+03hv6EKUfOVq2SnkqDHVf4bvD7mkJ0NAKoAiEA6ObnnITXbvOOxAHE
IjxyJBXm3TvjkV3Z8qPLB7EQjoQ=""")


def wire_name(name: str) -> bytes:
    return b"".join(bytes((len(label),)) + label.encode() for label in name.split(".") if label) + b"\0"


def wire_record(name: str, kind: int, value, ttl: int = 60) -> bytes:
    data = value
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
    return wire_name(name) + struct.pack(">HHIH", kind, 1, ttl, len(data)) + data


TEST_RSA_KEY = pem("""PRIVATE KEY
MIIEvAIBADANBgkqhkiG9w0BAQEFAASCBKYwggSiAgEAAoIBAQC8JWN5ilPbe05MvMesW1bbm7V3SuZiEpLpktz6Hc2wKXVy2xPzSGi8DvaJ4hsFoQsy5VUX
l9GGNNmloyVRmjn2k1fLt0J2C4gt+jPtRc2vdkD7Kt5kFfj8gEhTXgnLl+TJGb9E0NoAl1JUV6jy0oJeIK/x6qFi3Db+UEs14RWI+Uxeg+gs1ujbi2+M47wc
P+zPDS50ylZKf0xWl4/KbsN/c/rLTilYkF1iPJaf/KMJ+aII0/4nH09W9QYUOkVRkHYIWMeDdy3pME2zI9m3k1QiQja1ek2/HjNkz7ZS/5PO5HakOziNetUh
G/fi9GPOMr0oTsxhWNFrqFhsbLlSPgjLAgMBAAECggEAD7L8+GzK74L79xo/fQnIFx4Ih9I3pBJRsOzAxJwNCDiFZNaT9RZjKuICv2GfCJq2AQKy1XulD5JE
YPZajFMWqBUGW+jIQmpW7CM3BwLulUgERxD+KpLMymD36ADuR08+12rvE1JsBmWaCJCh99UJ7MnEdKaz3bhrXFAd3nqQHfQugw+qhPyNLq+VWGRAAH+ref7+
VrNF/0p1uEMHmUC82g8gezE3LXIUpz7aI87q6XBTfQqtJuW5z2XE8DotOH3sQ/qy16IC581vz8dyinoJ5XiPwzT0A7VBcPBM24M49bWOS58iPrpUxJ1Zc54a
0KgPocnPseTl63vVZOmEFkr31QKBgQD2vxUI5WwBOD9PzSJrm3Ujr6mlLMPCxwlzxtFBQ7GOvy7Sj4Nee/s0nEnbl3//YYTUss5hfDI35cw2kl2ZedYmO5Zh
fSrqxiV/WH+gQMyHJxOCO7SrAE8MKJuaaXTCJPZffqQCiWhdrYrY82+K+pZeoMOqSk6zyST1VMBbZZEkpwKBgQDDM7Tsxw0tGR1bFh8oQVQLTynYpQn7/5ap
aPRauz+HttaU5XVvGXma17ayk2dIMOgbeVvDZwdeH+8k2TvwdqczIZBW+1+wJqd8WZl3PO9G6BueFhKKQRokQN+ku9M3rHsLvUsZL2r9wxj+ftAIYICGa/MV
XtjgaH/VwDTUF0XrPQKBgBkuJtdhkkQNmWhrZrfUhX++zXEtwEyAQ1atU211mwkWOZEDVESwIlKcIG1oaIeHTCbomGcaZYWOzehDx4mCBXihXBdWzqpmzizQ
uzV/Z1/jfPotXaKVxXtYKYj4ehHV886K/fHEVAI7U5AQR7HHINFHVrBqJN30CPGAVKD/HHDBAoGAJx9i4J3YbzR8ZLgfUIMfZBDeszQItz/3o0aMyu6CgiHM
ChWfHsA9ViJr1Iikh5x9uJvvH0+z81J1LK55S+2L/zx34GcLO5PTt6GBl5tX3Z9BgcKsvpbjtWZnLG4UnDDujGDI/2g4ilmi1cb2zOcCe26BTsQutXNcQ6v9
KpDri4UCgYBRDLW2pufyguBzuB2kovtAIx/pQgRr3opUf1fq/j3ruOIZJizWcr0GvKnG26pRLfI2FVK2KoxtB0zOUV/DfghU5W/jr6kcqWifx9gzNXI3eg6k
ALJtgbbi6G4juSHozKPlXFfP/aWm37nIRizhvOl7olOJQv2bJyX/du1Pd5qPVg==""")
RFC8463_KEY = pem("PRIVATE KEY\nMC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g")


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


class NameServer(Closing):
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

    def close(self) -> None:
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
                sock, peer = self.tcp.accept()
                with sock, contextlib.suppress(OSError):
                    sock.settimeout(2)
                    for datagram in self._answers(sock.recv(65535)[2:], peer, True):
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
        values = kinds.get(question.kind, ())
        records += [wire_record(name, question.kind, value, kinds.get("ttl", 60)) for value in values]
        return [question.answer(*records, authority=() if values else soa)]


class WithCertificates(Folder):
    """A test with the files of the tests' certificate authority, and peers that end with it."""

    def setUp(self) -> None:
        super().setUp()
        self.ca, self.certificate = self.write("ca.pem", TEST_CA), self.write("certificate.pem", TEST_CERTIFICATE)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(self.certificate)

    def enter(self, peer):
        """The peer, until the test is over."""
        self.addCleanup(peer.close)
        return peer


def mail_to(*recipients: str, **route) -> haineko.Transaction:
    """A shared message for MX by that route."""
    found = haineko.Route(**{"mailer": "MX", "private": True, "timeout": 2, **route})
    return job(found, recipients, b"Subject: Nyaaaa\r\n\r\nMeow.\r\n")


def brief(said: haineko.Reply) -> tuple:
    return said.code, said.dsn, said.command, said.host


def outside_address() -> str:
    """An address of this machine that is not loopback, "" where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.connect(("192.0.2.1", 9))
        found = sock.getsockname()[0]
        return "" if found.startswith(("127.", "0.")) else found
    return ""


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


class HttpPeer(Closing):
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

    def close(self) -> None:
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
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                self.lines += 1
                threading.Thread(target=self._serve, args=(sock, self.lines), daemon=True).start()

    def _serve(self, sock, number: int) -> None:
        self.open.add(sock)
        try:
            if self.tls:
                sock = self.tls.wrap_socket(sock, server_side=True)  # what it was is closed
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
        elif said == "drip":
            sock.sendall(b"HTTP/1.1 200 OK\r\n")
            while not self.over.wait(0.2):
                sock.sendall(b"X: ")
        if said in ("hang", "drip", "close"):
            return False
        said = on_the_wire(*said) if isinstance(said, tuple) else said
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
    region = {"region": "eu-west-1"} if mailer == "AmazonSES" else {}
    values = {"mailer": mailer, "base_url": url, "auth": "key", "timeout": 1, **region, **more}
    route = {key: value for key, value in values.items() if value not in ("", None)}
    return web_settings(route).mailertable["default"]


def with_wrong_login(route: haineko.Route) -> haineko.Route:
    oauth2 = route.oauth2 and replace(route.oauth2, access_token="wrong")
    return replace(route, credentials=(KEY, "wrong"), oauth2=oauth2)


def web_submission(**changes) -> dict:
    header = {"from": "キジトラ <kijitora@example.com>", "subject": "謹賀新年", **changes.pop("header", {})}
    header = {"replyto": "straycats@cat-ml.example.org", **header}
    return document(**{"ehlo": "cat.example", "body": "にゃあ\nNyaa\n", **changes, "header": header})


def composed_job(route: haineko.Route, document: dict | None = None, number: int = 1) -> haineko.Transaction:
    """The job of a submission's first recipient."""
    submission = understood(document or web_submission())
    message = haineko.compose(submission, "Q" * 16, haineko.parse_ip("192.0.2.9"), "here.example", 1700000000.0)
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
            between() if i else None
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
    """A next hop that refuses never@..., and later3@... three times for now; script(recipient, count of its tries) says
    another reply to a text, or gives an event to wait for."""

    def by_name(recipient: str, count: int) -> str:
        found = re.match(r"later(\d+)", recipient)
        return f"451 4.2.0 not now, {count}" if found and count <= int(found[1]) else "250 2.0.0 Ok"

    def reply(connection: SmtpConnection, line: str):
        if not connection.recipients:
            return "554 5.5.1 no recipient"
        (to,) = connection.mail.recipients
        found = (script or by_name)(to, connection.peer.tries[to])
        if isinstance(found, threading.Event):
            found.wait(20)
            return "250 2.0.0 Ok at last"
        return found

    refuse = {"RCPT": lambda connection, line: "550 5.1.1 no such cat" if "<never" in line else None}
    return SmtpPeer({".": reply, **refuse}, ("PIPELINING",))


def webhook() -> HttpPeer:
    """A webhook; its first request gets a 500."""
    hook = HttpPeer(lambda asked: (500 if asked is hook.asked[0] else 204, b""))
    return hook


def esmtp(peer: SmtpPeer, **more) -> dict:
    """A route to that peer, as settings have it."""
    return {"mailer": "ESMTP", "host": peer.host, "port": peer.port, "timeout": 2, **more}


TOP = {"queueid", "addresser", "recipient", "response", "remoteaddr", "remoteport", "useragent", "referer", "timestamp"}


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


def memory(pid: int, what: str) -> int:
    """Octets, by the kernel's count."""
    with open(f"/proc/{pid}/status", encoding="ascii") as stream:
        return int(re.search(rf"{what}:\s+(\d+) kB", stream.read())[1]) * 1024


# ======================================================================================================================
# House rules
# ======================================================================================================================
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MUTATORS = {"append", "add", "insert", "extend", "update", "pop", "popitem", "clear", "remove", "discard", "setdefault"}


class House:
    """haineko.py, or another source, as its rules see it."""

    BANNER = re.compile(r"(?m)^# (\d+)\. (.+)\n((?:# .*\n)+)# ={10,}$")

    def __init__(self, source: str) -> None:
        self.tree = ast.parse(source)
        self.nodes = list(ast.walk(self.tree))
        self.functions = [node for node in self.nodes if isinstance(node, FUNCTIONS)]
        self.symbols = symtable.symtable(source, "haineko.py", "exec")
        found = self.BANNER.finditer(source)
        self.sections = [(source.count("\n", 0, item.start()) + 1, int(item[1]), item[2]) for item in found]
        self.names = {name: self.section(node.lineno) for node in self.tree.body for name in self.defined(node)}

    def section(self, line: int) -> int:
        """The number of the section in which the line stands; 0 is the front page."""
        return max((number for start, number, _ in self.sections if start <= line), default=0)

    @staticmethod
    def defined(node: ast.AST) -> list:
        """The names that a statement of the module defines."""
        targets = [getattr(node, "target", None), *getattr(node, "targets", ())]
        found = [item.id for target in targets if target for item in ast.walk(target) if isinstance(item, ast.Name)]
        return [*found, node.name] if hasattr(node, "name") else found

    def downward(self) -> list:
        """References from a section to a name that a later one defines."""
        found, scopes = [], list(self.symbols.get_children())
        for scope in scopes:
            scopes += scope.get_children()
            names, here = [item.get_name() for item in scope.get_symbols() if item.is_global()], scope.get_lineno()
            late = [name for name in names if self.names.get(name, 0) > self.section(here)]
            found += [f"{scope.get_name()} in line {here} refers to {name}" for name in late]
        return found

    def lengths(self) -> dict:
        """{function: lines without its docstring}."""
        documented = [(node, (ast.get_docstring(node, False) or "").splitlines()) for node in self.functions]
        return {f"{node.name}:{node.lineno}": node.end_lineno - node.lineno + 1 - len(doc) for node, doc in documented}

    def mutations(self) -> list:
        """Places in functions that change a value which a module-level name holds."""
        found = []
        values = {name for node in self.tree.body if not hasattr(node, "name") for name in self.defined(node)}
        for function in self.functions:
            local = {
                item.id
                for item in ast.walk(function)
                if isinstance(item, ast.Name) and not isinstance(item.ctx, ast.Load)
            }
            local |= {item.arg for item in ast.walk(function) if isinstance(item, ast.arg)}
            changed = [(name, line) for name, line in _changed(function) if name in values - local]
            found += [f"{function.name} changes {name} in line {line}" for name, line in changed]
        return found


def _changed(function: ast.AST):
    """(name, line) of what is stored into, or told by a method to change."""
    for node in ast.walk(function):
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            yield from ((name, node.lineno) for name in node.names)
        place = node if isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)) else None
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
    kinds = {"LITERAL": chr, "RANGE": lambda c: chr(c[0]), "CATEGORY": lambda c: " " if "SPACE" in str(c) else "0"}
    text = ""
    for operator, value in tree:
        kind = str(operator)
        if kind in ("LITERAL", "NOT_LITERAL", "ANY"):
            text += chr(value) if kind == "LITERAL" else "a"
        elif kind == "IN":
            name, first = value[0]
            text += kinds.get(str(name), lambda _: "a")(first)
        elif "REPEAT" in kind:
            text += a_match(value[2]) * max(1, min(value[0], 40))
        elif kind in ("SUBPATTERN", "ATOMIC_GROUP", "BRANCH"):
            text += a_match(value if kind == "ATOMIC_GROUP" else value[-1] if kind == "SUBPATTERN" else value[1][0])
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

    def test_sections_are_the_front_pages_and_refer_up_only(self):
        pattern = r"(?m)(?:^ {4,5}|  +)(\d+)  ([A-Z][\w ]+?)(?=  |$)"
        front = re.findall(pattern, ast.get_docstring(self.house.tree, False))
        listed = [title for _, title in sorted((int(number), title) for number, title in front)]
        self.assertEqual([item[1:] for item in self.house.sections], list(enumerate(listed, 1)))
        self.assertEqual(self.house.downward(), [])
        self.assertGreater(len(self.house.names), 200)
        banner = "# {}\n# {}. {}\n#    About.\n# {}\n".format("=" * 20, "{}", "{}", "=" * 20)
        for inner in ("return late()", "return [late(x) for x in y]", "late = 1\n    return late"):  # the rule sees it
            source = f"{banner.format(1, 'Up')}def early(y=()):\n    {inner}\n{banner.format(2, 'Down')}def late(): 1\n"
            self.assertEqual(len(House(source).downward()), 0 if "late = 1" in inner else 1, inner)

    def test_functions_fit_a_screen_and_classes_have_none_of_this_file_above_them(self):
        def depth(node):
            return max(map(depth, ast.iter_child_nodes(node)), default=0) + isinstance(node, FUNCTIONS)

        lengths = self.house.lengths()
        self.assertEqual({name: lines for name, lines in lengths.items() if lines > 40}, {})
        ranked = sorted(lengths.values())
        self.assertLess(ranked[len(ranked) * 9 // 10], 25)
        self.assertLessEqual(ranked[len(ranked) // 2], 10)
        functions = [node for node in self.house.tree.body if isinstance(node, FUNCTIONS)]
        self.assertEqual([node.name for node in functions if depth(node) > 3], [])
        classes = [node for node in self.house.nodes if isinstance(node, ast.ClassDef)]
        bases = [(node.name, ast.unparse(base)) for node in classes for base in node.bases]
        self.assertEqual([(name, base) for name, base in bases if base in self.house.names], [])

    def test_nothing_changes_module_state_but_the_log_and_the_metrics(self):
        allowed = re.compile(" changes (?:log|metrics) ")
        self.assertEqual([line for line in self.house.mutations() if not allowed.search(line)], [])
        for line in ("T['a'] = 1", "T.update(a=1)", "T['a'].b = 1", "del T['a']", "global T"):  # the rule sees it
            self.assertEqual(len(House(f"T = {{}}\ndef f():\n    {line}\n").mutations()), 1, line)

    def test_every_reply_is_given_and_every_given_reply_exists(self):
        [table] = [node for node in self.house.tree.body if "REPLIES" in self.house.defined(node)]
        rows = {id(node) for node in ast.walk(table)}
        given = {node.value for node in self.house.nodes if isinstance(node, ast.Constant) and id(node) not in rows}
        called = [node for node in self.house.nodes if getattr(getattr(node, "func", 0), "id", "") == "make_reply"]
        named = {node.args[0].value for node in called if isinstance(node.args[0], ast.Constant)}
        self.assertEqual((sorted(set(haineko.REPLIES) - given), sorted(named - set(haineko.REPLIES))), ([], []))

    def test_every_name_is_used(self):
        loaded = [node for node in self.house.nodes if isinstance(getattr(node, "ctx", None), ast.Load)]
        used = {getattr(node, "id", getattr(node, "attr", "")) for node in loaded} | {"sign_jwt"}
        notes = [node.annotation for node in self.house.nodes if getattr(node, "annotation", None)]
        used |= {word for note in notes for word in re.findall(r"\w+", ast.unparse(note))}
        self.assertEqual(sorted(set(self.house.names) - used), [])

    def test_every_pattern_takes_linear_time(self):
        """Feed each pattern, as the file uses it, long strings of its own alphabet."""
        self.assertEqual(superlinear({"BAD": re.compile(r"b?[ ]*[ \t]*=")}, {("BAD", "match")}), ["BAD.match"])
        patterns = {name: item for name, item in vars(haineko).items() if isinstance(item, re.Pattern)}
        self.assertGreater(len(patterns), 20)
        places = [node for node in self.house.nodes if isinstance(node, ast.Attribute)]
        uses = {(node.value.id, node.attr) for node in places if getattr(node.value, "id", "") in patterns}
        self.assertEqual(superlinear(patterns, uses), [])

    def test_only_the_standard_library_is_imported(self):
        imports = [node for node in self.house.nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {getattr(node, "module", alias.name).partition(".")[0] for node in imports for alias in node.names}
        self.assertEqual(
            names - set(getattr(sys, "stdlib_module_names", names)), set()
        )  # it is there since Python 3.10

    def test_the_example_file_is_complete_and_valid(self):
        path = os.path.join(HERE, "haineko.json.example")
        with open(path, encoding="utf-8") as stream:
            written = stream.read()
        self.assertEqual(written, json.dumps(haineko.example_settings(), indent=2) + "\n")
        found, faults = haineko.load_settings(path)
        self.assertEqual((faults, set(json.loads(written))), ([], set(haineko.key_table(haineko.Settings))))
        hosts = {key: route.host for key, route in found.mailertable.items()}
        self.assertEqual(hosts, {"default": "smtp.example.org"})


# ======================================================================================================================
# 1. Replies and jobs, 2. JSON into dataclasses, 3. Settings, 4. Log and metrics
# ======================================================================================================================
class RepliesAndJobs(unittest.TestCase):
    def test_a_reply_has_the_word_and_a_copy_has_its_recipient_and_number(self):
        for slug, (*_, text) in haineko.REPLIES.items():
            said = haineko.make_reply(slug, "more", word="50% of it")
            self.assertEqual(said.message, (text.replace("%s", "50% of it"), "more"))
        message = haineko.Message((b"To: ", b"\r\nMessage-Id: <x.", b"@y>\r\n\r\n"))
        self.assertEqual(message.copy("a@example.jp", 12), b"To: a@example.jp\r\nMessage-Id: <x.12@y>\r\n\r\n")
        self.assertEqual(haineko.Message((b"%b whole",)).copy("a@example.jp", 1), b"%b whole")


class JsonIntoDataclasses(unittest.TestCase):
    def test_what_is_json_and_what_is_not(self):
        good = [(b"\xef\xbb\xbf{}", {}), ('"ねこ"'.encode(), "ねこ"), (rb'"\u306d"', "ね"), (b" [1] ", [1])]
        for octets, value in good:
            self.assertEqual(haineko.parse_json(octets), value)
        faults = [
            (b"", "Expecting value"), (b"{", "Expecting property name"), (b"{} {}", "Extra data"), (b'{"a": 1,}', ""),
            (b"{'a': 1}", "Expecting property name"), (b'{"a": NaN}', "NaN is not JSON"),
            (b"[Infinity]", "Infinity is not JSON"), (b"[-Infinity]", "-Infinity is not JSON"),
            (b'{"a": "\xe9"}', "not UTF-8 at octet 7"), (b'"\xed\xa0\x80"', "not UTF-8 at octet 1"),  # a surrogate
            ("{}".encode("utf-16"), "not UTF-8 at octet 0"), (b'"a\nb"', "Invalid control character"),
            (rb'"\x41"', "Invalid \\escape"), (b"[" * 200000 + b"]" * 200000, "nested too deeply"),
            (b'{"a":' * 200000 + b"1" + b"}" * 200000, "nested too deeply"),
        ]  # fmt: skip
        for octets, words in faults:
            with self.subTest(octets[:20]):
                with self.assertRaises(ValueError) as caught:
                    haineko.parse_json(octets)
                self.assertIn(words, str(caught.exception))

    def test_two_keys_that_say_the_same(self):
        faults = haineko.parse_submission(as_body(document(to="b@example.jp")))[1]
        self.assertEqual(faults, ["to: duplicate: an alias of this key is already set"])
        self.assertEqual(understood({**document(to="b@example.jp"), "rcpt": None}).rcpt, ("b@example.jp",))

    def test_parsers(self):
        text, flag, number = haineko.parse_text, haineko.parse_boolean, haineko.integer(1, 5)
        texts, upper = haineko.list_of(text), haineko.mapping_of(flag, str.upper)
        good = [
            (text, "ねこ", "ねこ"), (text, "", ""), (flag, True, True), (flag, False, False), (flag, 1, True),
            (flag, 0, False), (number, 1, 1), (number, 5, 5), (texts, "a", ("a",)), (texts, ["a", "b"], ("a", "b")),
            (texts, [], ()), (upper, {"a": 1, "b": 0}, {"A": True, "B": False}),
        ]  # fmt: skip
        unprintable, a_number = "w: has an unprintable character", "w: expected a whole number from 1 to 5, got "
        a_text, a_flag = "w: expected a string, got ", "w: expected true or false, got "
        bad = [
            (text, 1, a_text + "a number"), (text, ["a"], a_text + "a list"), (text, "a\nb", unprintable),
            (text, "a\x1b[2J", unprintable), (text, "\ud800", unprintable), (flag, 2, a_flag + "a number"),
            (flag, 1.0, a_flag + "a number"), (flag, "true", a_flag + "a string"), (flag, [], a_flag + "a list"),
            (flag, {}, a_flag + "an object"), (number, 0, a_number + "0"), (number, 6, a_number + "6"),
            (number, 2.0, a_number + "2.0"), (number, True, a_number + "True"), (number, "3", a_number + "a string"),
            (number, "\n" * 300, a_number + "a string"), (number, [1], a_number + "a list"),
            (texts, ["a", 1, None], "w[1]: expected a string, got a number", "w[2]: expected a string, got null"),
            (texts, {}, a_text + "an object"), (upper, {"a": 2}, "w.a: expected true or false, got a number"),
            (upper, {"a": 1, "A": 1}, "w: two keys differ in case only"),
            (upper, [], "w: expected an object, got a list"),
        ]  # fmt: skip
        for parse, value, *wanted in good + bad:
            with self.subTest(value=value, wanted=wanted):
                faults: list = []
                parsed_value = parse(value, "w", faults)
                found = faults or [parsed_value]
                self.assertEqual((found, type(found[0])), (wanted, type(wanted[0])))

    def test_hostile_bodies_cost_little(self):
        many, most = ",".join(f'"k{i}":1' for i in range(100000)), haineko.MAX_ERRORS
        headers = [
            ("x-haineko-loop", "!," * 100000, most), ("from", " " * 100000, 1), ("from", " " * 30000, 1),
            ("from", "(" * 30000, 1), ("from", '"' * 30001, 1), ("charset", "x" * 100000, 1),
            ("subject" * 100000, 1, 1),
        ]  # fmt: skip
        bodies = [(json.dumps({"header": {name: value}}), count) for name, value, count in headers]
        bodies += [(f"{{{many}}}", most), (f'{{{many},"k7":1}}', most), (f'{{"rcpt": [{"1," * 99999}1]}}', most)]
        for text, count in bodies:
            with self.subTest(text[:40]):
                began = time.process_time()
                self.assertEqual(len(haineko.parse_submission(text.encode())[1]), count)
                self.assertLess(time.process_time() - began, 2)


class SettingsFile(Folder):
    KIJITORA = "{SSHA}9p2euyteR33mp0TYKjmYhTlIt1ctxuRn"

    def faults(self, content, mode: int = 0o600) -> list:
        return haineko.load_settings(self.write("haineko.json", content, mode))[1]

    def told(self, *cases) -> None:
        """Each case: settings and their faults; of a fault that ends with a colon only so much is compared."""
        for content, *wanted in cases:
            pairs = itertools.zip_longest(self.faults(content), wanted, fillvalue="")
            found = [start if start[-1:] == ":" and fault.startswith(start) else fault for fault, start in pairs]
            with self.subTest(content=content):
                self.assertEqual(found, wanted)

    def test_all_faults_are_told_at_once(self):
        self.told(({
            "htpd": {},
            "httpd": {"listen": "2794", "workers": "2", "timeout": 3601, "max_connections": None,
                      "allowed_origins": ["example.org"], "tls": {"key": 5, "crtificate": "a"}, "x": 1},
            "smtpd": {"hostname": "a b", "max_message_size": -1, "syslog": {"disabled": 3, "facility": "locl2"}},
            "relayhosts": {"open-relay": "no", "relayhosts": ["127.0.0.1", "192.0.2.0/33", "::g"]},
            "mailertable": {"default": {"port": 0}, "example.jp": {"host": "a b", "retry": 1.5}},
            "authinfo": {"a": {"user": "x"}, "b": {"password": {"file": "x", "env": "Y"}}, "c": {"password": 5}},
            "password": {"u": "plain"}, "sendermt": [],
            },
            'htpd: unknown key; did you mean "httpd"?',
            'httpd.listen: expected "host:port", "[v6]:port" or "unix:/path", got "2794"',
            "httpd.workers: expected a whole number from 0 to 256, got a string",
            "httpd.timeout: expected a whole number from 1 to 3600, got 3601",
            'httpd.allowed_origins[0]: expected a web origin like "https://www.example.org", got "example.org"',
            "httpd.tls.key: expected a string, got a number",
            'httpd.tls.crtificate: unknown key; did you mean "certificate"?',
            "httpd.x: unknown key", 'smtpd.hostname: expected a host name, got "a b"',
            f"smtpd.max_message_size: expected a whole number from 0 to {1 << 40}, got -1",
            "smtpd.syslog.disabled: expected true or false, got a number",
            'smtpd.syslog.facility: unknown syslog facility "locl2"; did you mean "local2"?',
            "relayhosts.open-relay: expected true or false, got a string",
            'relayhosts.relayhosts[1]: expected an IP address or network, got "192.0.2.0/33"',
            'relayhosts.relayhosts[2]: expected an IP address or network, got "::g"',
            "mailertable.default.port: expected a whole number from 1 to 65535, got 0",
            'mailertable.example.jp.host: expected a host name or an IP address, got "a b"',
            "mailertable.example.jp.retry: expected a whole number from 0 to 100, got 1.5",
            'authinfo.a.user: unknown key; did you mean "username"?',
            f"authinfo.b.password: expected {haineko.SECRET_FORMS}",
            "authinfo.c.password: expected a string, got a number",
            "password.u: expected a hash as `haineko.py pw` prints it, or {SSHA}",
            "sendermt: expected an object, got a list", "httpd.tls.certificate: expected the name of a PEM file",
        ))  # fmt: skip

    def test_faults(self):
        gone, fifo, path = (os.path.join(self.folder, name) for name in ("gone", "fifo", "haineko.json"))
        closed = self.write("closed", "x")
        os.mkfifo(fifo)
        aside = self.write("aside", {}, 0o602)
        address, names, table = "x@y.example", ("*.a.jp", "@a.jp", ".a.jp", "a@a.jp"), "mailertable"
        a_folder = "mailertable.default.mailer: {} is not a folder that can be written".format
        self.told(
            *[({"recipients": {"domainpart": [name]}}, f'recipients.domainpart[0]: expected a domain, got "{name}"')
              for name in names],  # it can match nothing
            ({"recipients": {"recipients": ["a.jp"]}}, 'recipients.recipients[0]: expected an address, got "a.jp"'),
            ({"mailertable": {"*.a.jp": {}}}, 'mailertable.*.a.jp: expected "example.jp", ".example.jp" or "default"'),
            ({"httpd": {"listen": []}}, "httpd.listen: expected at least one value"),
            ({"mailertable": {"default": {"auth": "relai"}}, "authinfo": {"relay": {}}},
             'mailertable.default.auth: "relai" is not in authinfo; did you mean "relay"?'),
            ({"sendermt": {"a.org": {"auth": "x"}}}, 'sendermt.a.org.auth: "x" is not in authinfo'),
            *[({table: {"default": {"mailer": name}}}, a_folder(name)) for name in (gone, closed)],
            ({table: {"default": {"host": "/tmp"}}}, f'{table}.default.host: expected a host name, got "/tmp"'),
            ({table: {"default": {"ca_file": "gone"}}}, f"{table}.default.ca_file: {gone}: No such file or directory"),
            *[({table: {"default": {"ca_file": name}}}, f"{table}.default.ca_file: {os.path.join(self.folder, name)}:")
              for name in ("closed", "fifo", "/dev/zero")],
            ({"mailertable": {"default": {"mailer": "/gone/for/good", "auth": "nobody", "disabled": 1}}},),
            *[({"httpd": {"tls": {"certificate": one, "key": two}}}, f"httpd.tls: {wrong}:") for one, two, wrong in (
                ("gone", "closed", gone), ("closed", "gone", gone), ("fifo", "closed", fifo), ("closed", "fifo", fifo),
                ("/dev/zero", "/dev/zero", "/dev/zero"), ("closed", "closed", f"{closed}, {closed}"))],
            # of the file
            (b"{", f"{path}: Expecting property name enclosed in double quotes:"),
            ([], f"{path}: expected an object, got a list"),
            (b'{"httpd": {"workers": 1, "timeout": 1, "workers": 2, "workers": 1, "tls": {"key": "a", "key": "a"}}}',
             "httpd.workers: duplicate key", "httpd.tls.key: duplicate key", "httpd.tls.certificate:"),
            ({table: "aside"}, f"{table}: {aside}: can be written by everybody; chmod 600 {aside}"),
            # those of what depends on other sections stand behind the others, and none follows from another
            ({"smtpd": {"x": 1}, "mailertable": {"default": {"auth": "x", "prot": 25}, ".example.jp": {"auth": "y"}}},
             "smtpd.x:", "mailertable.default.prot:", "mailertable.default.auth:", "mailertable..example.jp.auth:"),
            ({"queue": {"path": "gone/x.db", "lifetime": 0}}, "queue.lifetime:", "queue.path:"),
            ({"httpd": {"tls": {"certificate": "gone", "key": "gone"}, "timeout": 0}}, "httpd.timeout:", "httpd.tls:"),
            ({"authinfo": {"a": {"password": {"file": "gone"}}}, "smtpd": 1}, "smtpd:", "authinfo.a.password.file:"),
            ({"authinfo": "gone", table: {"default": {"auth": "x"}}}, f"authinfo: {gone}: No such file or directory"),
            ({"mailertable": {"a.jp": {"mailer": 1, "auth": "x"}, "a.jp.example": {"auth": "x"}, "a.j": 5}},
             "mailertable.a.jp.mailer:", "mailertable.a.j:", "mailertable.a.jp.auth:",
             "mailertable.a.jp.example.auth:"),
            ({"authinfo": {"x": 5}, "mailertable": {"default": {"auth": "x"}}}, "authinfo.x:"),
            ({"authinfo": {"x": {"password": {"file": 5}}, "y": {"token": {"env": []}}}},
             "authinfo.x.password.file:", "authinfo.y.token.env:"),
            ({"httpd": {"tls": 5}, "queue": []}, "httpd.tls:", "queue:"),
            ({"mailertable": {"default": 5, "example.jp": {"mailer": "AmazonSES", "region": "A B"}}},
             "mailertable.default:", "mailertable.example.jp.region:", "mailertable.example.jp.auth:"),
            ({"httpd": {"tls": {}}}, "httpd.tls.certificate:", "httpd.tls.key:"),
            ({"httpd": {"tls": {"certificate": "x"}}}, "httpd.tls.key:"),
            *[({"smtpd": {"aliases": value}}, f"smtpd.aliases{key}:") for value, key in (
                ({"a@b.example": address}, ".a@b.example"), ({"root": "ops"}, ".root"), ({"root": []}, ".root"),
                ({"root": [1]}, ".root[0]"), ({"": address}, "."), (5, ""))],
        )  # fmt: skip
        self.assertEqual(self.faults({}, 0o602), [f"{path}: can be written by everybody; chmod 600 {path}"])
        os.unlink(path)
        self.assertEqual(haineko.load_settings(path)[1], [f"{path}: No such file or directory"])

    def test_a_section_in_a_file_of_its_own(self):
        self.write("authinfo", {"relay": {"username": "u", "password": "p"}})
        self.write("aside.json", {"default": {"host": "192.0.2.1", "auth": "relay"}}, 0o644)
        path = self.write("haineko.json", {"authinfo": "authinfo", "mailertable": "aside.json"}, 0o644)
        found, faults = haineko.load_settings(path)
        self.assertEqual((faults, found.mailertable["default"].credentials), ([], ("u", "p")))
        recipients = found.recipients  # without that section only the host itself gets mail
        self.assertEqual((recipients.open_relay, recipients.domainpart), (False, {found.hostname.lower()}))
        names = {os.path.basename(name) for name, _ in found.files}
        self.assertEqual(names, {"haineko.json", "authinfo", "aside.json"})
        self.assertTrue(all(haineko.stat_key(name) == was for name, was in found.files))
        self.write("aside.json", {"default": {"hst": "192.0.2.1"}}, 0o644)
        self.assertEqual(haineko.load_settings(path)[1], ['mailertable.default.hst: unknown key; did you mean "host"?'])

    def test_secrets_that_everybody_can_read_are_refused(self):
        login, hashes = {"relay": {"username": "u", "password": "p"}}, {"kijitora": self.KIJITORA}
        by_env, tokens = {"relay": {"username": "u", "password": {"env": "PATH"}}}, {"access_token": {"env": "PATH"}}
        cases = [
            ({"authinfo": login}, {}, True), ({"password": hashes}, {}, True),
            ({"authinfo": by_env, "password": {}}, {}, False),
            ({"authinfo": {"relay": {"username": "", "password": ""}}}, {}, False),
            ({"authinfo": "aside"}, login, True), ({"password": "aside"}, hashes, True),
            ({"authinfo": "aside"}, by_env, False),
            ({"authinfo": {"relay": {"password": {"file": "aside"}}}}, "word", True),
            *[({"authinfo": {"relay": {"username": "u", "oauth2": {**tokens, name: "x"}}}}, {}, True)
              for name in ("client_secret", "refresh_token", "access_token")],
        ]  # fmt: skip
        for content, aside, refused in cases:
            for mode, wanted in ((0o644, refused), (0o604, refused), (0o640, False), (0o600, False)):
                with self.subTest(content, mode=oct(mode)):
                    self.write("aside", aside, mode if aside else 0o600)
                    faults = self.faults(content, 0o600 if aside else mode)
                    told = [fault for fault in faults if "can be read by everybody; chmod 600" in fault]
                    self.assertEqual((len(faults), len(told)), (wanted, wanted), faults)

    def test_hashes_that_are_none(self):
        salt, twenty = "c2FsdHNhbHRzYWx0c2FsdA==", base64.b64encode(b"x" * 20).decode()
        lines = ["", "kijitora", "{SSHA}", "{SSHA}!", "{SSHA}" + twenty, "{SSHA512}" + "A" * 88]
        lines += [f"$scrypt$ln={cost},r=8,p=1${salt}${salt}" for cost in (9, 20)]
        lines += [f"$scrypt$ln=14,r=8,p=1$A${salt}", f"$scrypt$ln=14,r=8,p=1${salt}$", "$2b$12$abcdefghijklmnopqrstuv"]
        for line in lines:
            with self.subTest(line):
                faults: list = []
                haineko.parse_password_hash(line, "password.u", faults)
                self.assertEqual(faults, ["password.u: expected a hash as `haineko.py pw` prints it, or {SSHA}"])

    def test_who_may_log_in(self):
        gate = settings(password={"kijitora": self.KIJITORA, "ねこ": self.KIJITORA}).password
        right = base64.b64encode(b"kijitora:kijitora").decode()
        cases = [
            (f"Basic {right}", True), (f"basic {right}", True), (f"Bearer {right}", False), ("Basic ねこ", False),
            ("Basic " + base64.b64encode("ねこ:kijitora".encode()).decode(), True), ("", False),
            ("Basic " + base64.b64encode(b"\xff:\xff").decode(), False),
        ]  # fmt: skip
        for credentials, wanted in cases:
            with self.subTest(credentials):
                self.assertFalse(gate.authenticate(credentials, cached=True))
                self.assertEqual(bool(gate.authenticate(credentials)), wanted)
                self.assertEqual(bool(gate.authenticate(credentials, cached=True)), wanted)

    def test_every_login_costs_the_same(self):
        digest = hashlib.scrypt(b"neko", salt=b"s" * 16, n=1 << 14, r=8, p=1)
        old = "$scrypt$ln=14,r=8,p=1$" + "$".join(base64.b64encode(octets).decode() for octets in (b"s" * 16, digest))
        new, costs = json.loads("{" + run_here("pw", given="neko\n")[1] + "}").popitem()[1], {}
        gate = settings(password={"old": old, "ssha": self.KIJITORA, "new": new}).password
        for user in ("old", "ssha", "new", "nobody"):
            for word in ("1", "2", "3"):
                began = time.process_time()
                self.assertFalse(gate.authenticate("Basic " + base64.b64encode(f"{user}:{word}".encode()).decode()))
                costs[user] = min(time.process_time() - began, costs.get(user, 9))
        self.assertLess(max(costs.values()), 1.5 * min(costs.values()), costs)
        self.assertTrue(gate.authenticate("Basic " + base64.b64encode(b"old:neko").decode()))
        self.assertIn("$scrypt$ln=14,r=8,p=5$", new)

    def test_networks(self):
        found = haineko.Networks(("192.0.2.0/24", "198.51.100.7", "10.1.2.3/8", "2001:db8::/32", "::1"))
        inside = "192.0.2.0 192.0.2.255 198.51.100.7 10.255.0.1 2001:db8:: 2001:db8:ffff::1 ::1 ::ffff:192.0.2.1"
        outside = "192.0.3.0 198.51.100.8 11.0.0.1 2001:db9:: ::2 0.0.0.1 ::ffff:192.0.3.1"
        for address in f"{inside} {outside}".split():
            self.assertEqual(haineko.parse_ip(address) in found, address in inside.split(), address)
        everything = haineko.Networks(("0.0.0.0/0",))
        self.assertIn(haineko.parse_ip("203.0.113.9"), everything)
        self.assertNotIn(haineko.parse_ip("2001:db8::1"), everything)
        self.assertNotIn(haineko.parse_ip("127.0.0.1"), haineko.Networks())

    def test_listen_addresses(self):
        good = ("127.0.0.1:0", "[::1]:2794", "unix:/run/haineko.sock", "localhost:65535")
        bad = ("127.0.0.1", ":2794", "::1:2794", "127.0.0.1:65536", "127.0.0.1:-1", "unix:relative", "127.0.0.1:２７")
        for value in (*good, *bad, "", 5):
            faults: list = []
            haineko.parse_listen(value, "w", faults)
            self.assertEqual(not faults, value in good, (value, faults))

    def test_names_compare_without_case_and_domains_in_ascii(self):
        for given, mailer in {"esmtp": "ESMTP", "SCREEN": "Screen", "File": "File", self.folder: self.folder}.items():
            route = settings(mailertable={"default": {"mailer": given}}).mailertable["default"]
            self.assertEqual((route.mailer, route.relay), (mailer, "File" if given == self.folder else mailer))
        aliases = {"root": "ops@example.org", "Cron": ["a@example.org", "b@example.org"]}
        wanted = {"root": ("ops@example.org",), "cron": ("a@example.org", "b@example.org")}
        self.assertEqual(settings(smtpd={"aliases": aliases}).smtpd.aliases, wanted)
        domains, addresses = ["Example.COM", "例え.jp"], ["Neko@Example.net", "neko@例え.テスト"]
        table = {"Example.JP": {"mailer": "Screen"}, ".例え.jp": {"mailer": "Screen"}}
        found = settings(mailertable=table, recipients={"domainpart": domains, "recipients": addresses})
        self.assertEqual(list(found.mailertable), ["example.jp", ".xn--r8jz45g.jp"])
        right = ["a@EXAMPLE.com", "a@例え.jp", "a@xn--r8jz45g.jp", "NEKO@example.NET", "neko@例え.テスト"]
        for text in [*right, "inu@example.net", "a@sub.example.com"]:
            refused = haineko.check_recipient(haineko.parse_address(text), found)
            self.assertEqual(refused is None, text in right, text)
        names = {"example.jp": "example.jp", "例え.jp": "xn--r8jz45g.jp", "bücher.example": "xn--bcher-kva.example"}
        none = dict.fromkeys(("faß.de", "βόλος.com", "a\u200db.example", "a\u200cb.example", "あ" * 64 + ".jp"), "")
        for name, wanted in {**names, **none}.items():
            self.assertEqual(haineko.ascii_domain(name), wanted, name)

    def test_shown_settings_hold_no_secret(self):
        tokens = dict.fromkeys(("client_secret", "refresh_token", "access_token"), "hush-2")
        oauth2 = {"provider": "google", "client_id": "a", **tokens}
        login = {"username": "mikeneko", "password": "hush-1", "oauth2": oauth2}
        content = {
            "authinfo": {"relay": login, "none": {"username": "sabineko"}},
            "password": {"kijitora": self.KIJITORA},
            "mailertable": {"default": {"auth": "relay", "starttls": 1}},
            "relayhosts": {"relayhosts": ["192.0.2.0/24"]},
            "recipients": {"domainpart": ["b.example", "a.example"]},
        }
        found, faults = haineko.load_settings(self.write("haineko.json", content))
        self.assertEqual((faults, found.mailertable["default"].oauth2.access_token), ([], "hush-2"))
        text = json.dumps(haineko.redacted(found))
        for word in ("hush", self.KIJITORA[6:]):
            self.assertNotIn(word, text + repr(found) + repr(found.mailertable))
        shown, mask = json.loads(text), "********"
        relay = shown["authinfo"]["relay"]
        self.assertEqual((relay["username"], relay["password"], relay["token"]), ("mikeneko", mask, ""))
        self.assertEqual([relay["oauth2"][name] for name in tokens], [mask] * 3)
        self.assertEqual((shown["authinfo"]["none"]["password"], shown["password"]), ("", {"kijitora": mask}))
        self.assertEqual(shown["relayhosts"], {"open-relay": False, "relayhosts": ["192.0.2.0/24"]})
        self.assertEqual(shown["recipients"]["domainpart"], ["a.example", "b.example"])
        default = shown["mailertable"]["default"]
        self.assertEqual((default["starttls"], shown["httpd"]["listen"]), (True, ["127.0.0.1:2794"]))
        self.assertEqual(set(shown), set(haineko.key_table(haineko.Settings)))
        defaults = json.dumps(haineko.redacted(settings(mailertable={}, sendermt={})))
        haineko.from_dict(haineko.Settings, json.loads(defaults), "", faults)
        self.assertEqual(faults, [], "they can be read again")

    def test_the_name_of_a_machine(self):
        for name in ("mail.example.org", "a-b.example.org"):
            self.assertEqual(haineko.local_hostname(name), name)
        for name, wanted in (
            ("3f2a9c0d1e2b", "3f2a9c0d1e2b"), ("my_container", "my-container"), ("192.168.1.5", "192-168-1-5"),
            ("localhost", "localhost"), ("a.1", "a-1"), ("", "localhost"), ("ねこ", "localhost"),
            ("my_container.example.org", "my-container-example-org"), ("-a.example.org", "a-example-org"),
            ("a" * 64 + ".jp", "a" * 63),
        ):  # fmt: skip
            self.assertEqual(haineko.local_hostname(name), wanted + ".localdomain")
        for hostname, address, wanted in (
            ("mail.example.org", "127.0.0.1", "mail.example.org"), ("mail", "::1", "mail"),
            ("box.localdomain", "127.0.0.1", "[127.0.0.1]"), ("box.localdomain", "::1", "[IPv6:::1]"),
            ("box.localdomain", "::ffff:127.0.0.1", "[127.0.0.1]"), ("my_host.example.org", "127.0.0.1", "[127.0.0.1]"),
            ("192.168.1.5", "127.0.0.1", "[127.0.0.1]"), ("3", "127.0.0.1", "[127.0.0.1]"),
        ):  # fmt: skip
            self.assertEqual(haineko.ehlo_name(hostname, address), wanted, (hostname, address))


class Secrets(Folder):
    """Where a secret may stand."""

    def read(self, source) -> tuple:
        """(the password, faults) of settings with that password; then the names of the files that were read."""
        content = {"authinfo": {"k": {"username": "u", "password": source}}, "mailertable": {"default": {"auth": "k"}}}
        found, faults = haineko.load_settings(self.write("haineko.json", content))
        self.names = [os.path.basename(name) for name, _ in found.files]
        return found.mailertable["default"].credentials[1], faults

    def shell(self, script: str) -> dict:
        return {"command": ["sh", "-c", script]}

    def setUp(self) -> None:
        super().setUp()
        words = {"CREDENTIALS_DIRECTORY": self.folder, "HAINEKO_WORD": "from env\n", "HAINEKO_LINES": "geheim\ngeheim"}
        for name, word in words.items():
            os.environ[name] = word
            self.addCleanup(os.environ.pop, name, None)

    def test_what_is_read(self):
        self.write("secret", "from a file\r\n")
        self.write("program", "#!/bin/sh\necho from $1 in $(basename $PWD)\n", 0o700)
        here = f"from here; echo no shell in {os.path.basename(self.folder)}"
        for source, wanted in (
            ("a string", "a string"), ({"file": "secret"}, "from a file"), ({"credential": "secret"}, "from a file"),
            ({"env": "HAINEKO_WORD"}, "from env"), ({"command": ["./program", "here; echo no shell"]}, here),
            (self.shell("echo one; echo two"), "one"), (self.shell("printf 'no line end'"), "no line end"),
            (self.shell("printf 'crlf\\r\\n'"), "crlf"),
            (self.shell("echo starts another; sleep 60 & exit 0"), "starts another"),
        ):  # fmt: skip
            with self.subTest(source):
                self.assertEqual(self.read(source), (wanted, []))
                self.assertEqual("secret" in self.names, source == {"file": "secret"})

    def test_what_can_not_be_read(self):
        self.write("secret", "word", 0o644)
        self.write("latin", b"geheim\xff")
        del os.environ["CREDENTIALS_DIRECTORY"]
        late, forms = ".command: sh: did not end within 0.3 s", f": expected {haineko.SECRET_FORMS}"
        unprintable = ": has a line end, or another unprintable character"
        cases = [
            ({"file": "none"}, ".file: none: No such file or directory"), ({"file": ""}, ".file: : Is a directory"),
            ({"file": "secret"}, f".file: secret: can be read by everybody; chmod 600 {self.folder}/secret"),
            ({"env": "HAINEKO_NONE"}, ".env: no environment variable HAINEKO_NONE"),
            ({"credential": "x"}, ".credential: no credential x: LoadCredential= of systemd gives it to a unit"),
            ({"command": ["/nowhere/x"]}, ".command: /nowhere/x: No such file or directory"),
            ({"command": []}, ".command: expected at least one value"), ({"env": "HAINEKO_LINES"}, unprintable),
            ({"command": ["touch", 5, "ran"]}, ".command[1]: expected a string, got a number"),
            ({"env": ""}, ".env: no environment variable "), ({"command": "x", "file": "x"}, forms),
            ({"comand": "x"}, forms), ({}, forms), (self.shell("exit 3"), ".command: sh: exit code 3"),
            (self.shell("echo geheim; echo 1 >&2; echo vault is sealed >&2; exit 3"), ".command: sh: vault is sealed"),
            (self.shell("true"), ".command: sh: printed nothing"), (self.shell("sleep 60; echo late"), late),
            ({"file": "latin"}, ".file: latin: not UTF-8"),
            (self.shell("yes geheim"), late), (self.shell("printf 'geheim\\377'"), ".command: sh: not UTF-8"),
            (self.shell("printf 'geheim\\001'"), unprintable), ("geheim\n", unprintable), ("geheim\n", unprintable),
        ]  # fmt: skip
        with patched(haineko, SECRET_TIMEOUT=0.3):
            for source, fault in cases:
                with self.subTest(source):
                    began = time.monotonic()
                    self.assertEqual(self.read(source)[1], [f"authinfo.k.password{fault}"])
                    self.assertNotIn("ran", os.listdir(self.folder))
                    self.assertLess(time.monotonic() - began, 5)


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
    def pipe(self) -> int:
        """Makes stderr a pipe; gives the end to be read."""
        reading, writing = os.pipe()
        self.addCleanup(os.close, reading)
        os.dup2(writing, 2)
        os.close(writing)
        return reading

    @staticmethod
    def all_of(call, *values) -> list:
        """What the call gives until it would block."""
        found: list = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(call(*values))
        return found

    def test_a_line_is_a_line(self):
        haineko.log.lines("one", "two ねこ", "half \ud800")
        head = rf"\A\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{{4}} haineko\[{os.getpid()}\]: "
        self.assertEqual([re.sub(head, "", line) for line in self.logged()], ["one", "two ねこ", "half \\ud800"])
        haineko.log.devel = True
        haineko.log.dialogue("mx.example.jp", "<", "250 a\tb\x1b[2J")
        self.assertEqual(self.logged(), ["mx.example.jp < 250 a\tb?[2J"])

    def test_lines_that_are_held_are_written_by_flush_in_their_order(self):
        haineko.log.start_buffering()
        write = haineko.log.lines
        writers = [threading.Thread(target=lambda c=c: [write(f"{c}{i}") for i in range(300)]) for c in "ab"]
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

    def syslogd(self, path: str) -> socket.socket:
        daemon = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(daemon.close)
        daemon.bind(path)
        daemon.setblocking(False)
        return daemon

    def test_syslog_may_come_go_and_stop_reading(self):
        def said(daemon: socket.socket) -> list:
            self.lines = [octets.decode() for octets in self.all_of(daemon.recv, 4096)]
            return [line.partition("]: ")[2] for line in self.lines]

        with tempfile.TemporaryDirectory(prefix="haineko.") as folder:
            log, path = haineko.Log(), os.path.join(folder, "log")
            log.SYSLOG = (path + "not", path)
            log.open(haineko.Syslog(disabled=False, facility="mail"))
            log.lines("nobody is there")
            daemon = self.syslogd(path)
            log.lines("a: one", "b: two ねこ \ud800")
            wanted = ["1 lines were lost, since nobody read them", "a: one", "b: two ねこ \\ud800"]
            self.assertEqual(said(daemon), wanted)
            time_and_name = rf"[A-Z][a-z]{{2}} [ \d]\d \d\d:\d\d:\d\d haineko\[{os.getpid()}\]"
            self.assertRegex(self.lines[1], rf"\A<22>{time_and_name}: a: one\Z")
            log.lines(*["unread"] * 3000)
            count = len(said(daemon))
            self.assertEqual((count > 0, log.lost), (True, 3000 - count))
            log.lines("read again")
            self.assertEqual(said(daemon), [f"{3000 - count} lines were lost, since nobody read them", "read again"])
            daemon.close()
            os.unlink(path)
            again = self.syslogd(path)
            log.lines("another daemon")
            self.assertEqual(said(again), ["another daemon"])
            log.syslog.close()

    @unittest.skipUnless(os.path.exists("/proc/self/fd"), "a pipe can't be opened again here")
    def test_a_pipe_is_written_without_waiting_for_others_that_write_into_it(self):
        reading, log = self.pipe(), haineko.Log()
        log.start_buffering()
        self.addCleanup(os.close, log.stderr)
        self.assertEqual([os.get_blocking(number) for number in (log.stderr, 2)], [False, True])
        log.lines("one")
        log.flush()
        self.assertTrue(os.read(reading, 4096).endswith(b": one\n"))

    def test_lines_that_nobody_reads_are_counted(self):
        reading, haineko.log.buffer = self.pipe(), []
        os.set_blocking(2, False)
        self.all_of(os.write, 2, b"." * 4096)
        os.set_blocking(2, True)
        for count in (1, 30, 60):
            haineko.log.lines(*["x"] * count)
            haineko.log.flush()
        os.set_blocking(reading, False)
        self.all_of(os.read, reading, 65536)
        haineko.log.lines("here again")
        haineko.log.flush()
        found = os.read(reading, 65536).decode()
        self.assertIn(": 91 lines were lost", found)
        self.assertTrue(found.endswith(": here again\n"), found)

    def test_lines_of_fields(self):
        cases = [
            ({"login": "b", "queueid": "Q", "code": "250", "dsn": "2.0.0"}, "Q: login=b dsn=2.0.0 (250 nyaa)"),
            ({"a": ""}, 'a="" (nyaa)'), ({"a": 'say "x y"'}, r'a="say \"x y\"" (nyaa)'), ({}, "nyaa"),
            ({"a": "x\r\ny\x1b[2J\0\u2028ねこ"}, "a=x??y?[2J??ねこ (nyaa)"),
            ({"a": "x" * 501}, "a=" + "x" * 500 + "... (nyaa)"),
            ({"from": "", "to": ["a@x.jp", "b@x.jp"], "delay": 0.5}, "from=<> to=<a@x.jp>,<b@x.jp> delay=0.500 (nyaa)"),
        ]  # fmt: skip
        for values, wanted in cases:
            self.assertEqual(haineko.text_line("nyaa", **values), wanted)

    def test_lines_of_json(self):
        haineko.log.open(haineko.Syslog(), "json")
        haineko.log.lines("half \ud800", "two\r\nねこ")
        fields = {"queueid": "Q", "from": "", "to": ["a\x1b@x.jp"], "delay": 0.12345, "code": "250", "dsn": None}
        haineko.log.event("warning", "delivery", "nyaa", **fields)
        found = [json.loads(line) for line in self.logged()]
        self.assertLess(abs(time.time() - datetime.datetime.fromisoformat(found[0]["time"]).timestamp()), 60)
        wanted = [{"level": "info", "event": "server", "message": text} for text in ("half ?", "two??ねこ")]
        wanted += [{"level": "warning", "event": "delivery", "queueid": "Q", "from": "", "to": ["a?@x.jp"]}]
        wanted[2].update(delay=0.123, code=250, message="nyaa")
        self.assertEqual(found, [{"time": line["time"], **each} for line, each in zip(found, wanted)])

    def test_a_full_stderr_costs_no_mail(self):
        with open("/dev/full", "wb") as full:
            os.dup2(full.fileno(), 2)
        self.assertEqual(posted(document())[0], 200)


class MetricsTable(unittest.TestCase):
    def test_processes_add_to_rows_of_their_own_and_nothing_is_lost(self):
        metrics, pids = haineko.Metrics(), []
        metrics.add("cats_total", "a")  # before allocate(): nothing
        table = {"cats_total": ("counter", "Cats.", {"kind": ("a", "b")}), "naps_seconds": ("histogram", "Naps.", {})}
        metrics.allocate({**table, "food_bytes": ("gauge", "Food.", {})}, 4)
        metrics.set("food_bytes", to=7)
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
        text = metrics.text({})
        self.assertNotIn("unknown", text)
        naps = {"0.005": 1, "0.25": 1, "0.5": 2, "30": 2, "+Inf": 3}
        wanted = [f'naps_seconds_bucket{{le="{bound}"}} {count}' for bound, count in naps.items()]
        wanted += ["# HELP naps_seconds Naps.", "# TYPE naps_seconds histogram", "naps_seconds_count 3"]
        wanted += ["naps_seconds_sum 99.305", "food_bytes 7", 'cats_total{kind="a"} 6000', 'cats_total{kind="b"} 0']
        self.assertEqual(set(wanted) - set(text.splitlines()), set())
        self.assertNotIn("\nfood_bytes ", metrics.text({("food_bytes",): None}))


# ======================================================================================================================
# 5. Submissions
# ======================================================================================================================


def errors_in(submission) -> list:
    return haineko.parse_submission(as_body(submission)).errors


def addresses(mailboxes) -> list:
    return [(name, mailbox.addr_spec) for name, mailbox in mailboxes]


def finished(message, **more) -> dict:
    """A submission of a finished message, of text or octets."""
    raw = {"base64": base64.b64encode(message).decode()} if isinstance(message, bytes) else message
    return {"mail": "kijitora@example.org", "raw": raw, **more}


FIELD_FAULTS = [
    *[(key, 1, "expected a string, got a number") for key in ("subject", "x-a", "in-reply-to")],
    ("x-haineko-loop[0]", [1], "expected a string, got a number"), ("cc[1]", ["a@x", 1], "expected a string"),
    *[(key, {"a": 1}, "expected a string, got an object") for key in ("x-a", "bcc")],
    *[(key, text, "has a CR, LF or NUL") for key, text in (
        ("subject", "a\nb"), ("replyto", "a\r <a@x>"), ("from", "a\0 <a@x>"), ("from", "A <a@x>\r\nBcc: b@x"),
        ("organization", "a\nb"))],
    ("x-a[1]", ["a", "b\r\nBcc: c"], "has a CR, LF or NUL"), ("precedence", "bulk\0", "has an unprintable character"),
    *[(key, text, f'expected "name <address>", got "{text}"') for key, text in (
        ("from", "nobody"), ("from", "undisclosed-recipients:;"), ("replyto", "a b c"), ("reply_to", "a"), ("to", "a"),
        ("disposition-notification-to", "a"))],
    ("to", "a@straße.de", 'expected "name <address>", got "a@straße.de"; U+00DF has two readings in a domain'),
    ("charset", "UTF-9", 'expected a charset that mail readers know, like "UTF-8", got "UTF-9"'),
    ("x-haineko-loop", "a b", '"a b" is no name of a Haineko'),
    *[(key, "a", f"unknown key; did you mean {meant}?") for key, meant in (
        ("html", "html, outside of header"), ("reply_too", '"replyto"'), ("Subjekt", '"subject"'),
        ("organisation", '"organization"'))],
    *[(key, text, 'expected "<left@right>"') for key, text in (
        ("message-id", "a@b"), ("Message_ID", "<a b@c>"), ("message-id", "<a@b> <c@d>"))],
    ("references[1]", ["<a@b>", "c"], 'expected "<left@right>'),
    *[("date", text, "expected a date like") for text in ("2014-01-03", "Fri, 31 Feb 2014 18:35:58 +0900")],
    ("date", "Fri, 03 Jan 2014 18:35:58 +0900\n", "has an unprintable character"),
    ("importance", "urgent", "expected high or normal or low"),
    *[(key, "猫", "expected printable ASCII") for key in ("auto-submitted", "List-Unsubscribe")],
    *[(key, "a", "unknown key") for key in ("x-", "x-a b", "x-a:", "x-" + "a" * 73, "X-猫", "mail", "resent-to")],
    *[(key, "a", "Haineko makes this field itself") for key in (
        "received", "Sender", "Return-Path", "return_path", "MIME-Version", "Content-Type", "content_disposition",
        "Content-Transfer-Encoding", "DKIM-Signature", "Content-猫")],
]  # fmt: skip
FILE_FAULTS = [
    ({"filename": "a"}, "content: is missing"), ({"content": None}, "content: is missing"),
    ({"content": 1}, "content: expected a string, got a number"),
    *[({"content": text}, "content: is not base64") for text in (
        "a", "ab", "abc", "ab=c", "a===", "====", "abcd=", "ab==cdef", "YWJj-_==", "猫猫猫猫", "abcd!!!!", "=abc",
        "ab\0c")],
    (file(name="a.pdf"), 'name: unknown key; did you mean "filename"?'),
    (file(contentType="a/b"), 'contentType: unknown key; did you mean "type"?'),
    *[(file(name), f'filename: expected a name without a path, got "{name}"') for name in (
        "a/b", "../x", "C:\\x", "..", ".", "/")],
    *[(file(f"a{odd}b"), "filename: has a control character") for odd in (
        *"\0\r\n\t\x1b\x7f\x85\u2028\u202e\u2066", "\r\nBcc: x@example.jp")],
    (file("x" * 256), "filename: 256 characters exceed the limit of 255"),
    *[(file(type=kind), "type: expected a media type like") for kind in (
        "pdf", "a/b/c", "a/b; c", "a/b; c=é", 'text/plain; a="', "a /b", "a/", "/b", "猫/b", "a/b;c=d e", "a/b" * 99)],
    (file(type="a/b\r\nBcc: x@example.jp"), "type: has a CR, LF or NUL"),
    *[(file(type=f"{kind}; a=b"), f"type: {kind} can't be attached") for kind in (
        "multipart/mixed", "message/partial")],
    *[(file(octets=octets, type="message/rfc822"), "type: message/rfc822 must be ASCII") for octets in (
        "猫".encode(), b"x" * 999, b"x\ry")],
    *[(file(cid=cid), "cid: ") for cid in ("a b", "a>b", "猫", "<a", "a\r\nBcc: x", "x" * 201, 1)],
    (file(inline="yes"), "inline: expected true or false, got a string"),
]  # fmt: skip
RAW_FAULTS = [
    (1, ": expected a string, got a number"), ({"base64": "*"}, ".base64: is not base64"),
    ({"base64": 1}, ".base64: expected a string"), ({"bas64": ""}, '.bas64: unknown key; did you mean "base64"?'),
    ("A: b\nhello\nC: d\n\nx", ': line 2 is neither a header field nor the empty line behind them: "hello"'),
    ("no header\n", ": has no header"), ("A: b\rBcc: c\n\nx", ": header A: has a CR or NUL"),
    ("A: b\0\n\nx", ": header A: has a CR or NUL"),
    ("A: " + "x" * 998 + "\n\nx", ": header A: has a line longer than 998"),
    ("\ud800", ": has half a surrogate pair at character 0"),
]  # fmt: skip
# (submission, its errors); a string: how the first begins, and all are at that place.
FAULTS = [
    ([], ["top level: expected an object, got a list"]), ("x", ["top level: expected an object, got a string"]),
    (b"null", ["top level: expected an object, got null"]),
    ({"header": []}, ["header: expected an object, got a list"]),
    ({"header": "x"}, ["header: expected an object, got a string"]),
    ({"rcptt": "a"}, ['rcptt: unknown key; did you mean "rcpt"?']),
    ({"subject": "a"}, ["subject: unknown key; did you mean header.subject?"]),
    *[({key: "a"}, [f"{key}: unknown key; did you mean {meant}?"]) for key, meant in (
        ("cc", "header.cc"), ("reply_to", "header.replyto"), ("replyTo", "header.replyto"), ("text", "body"),
        ("List-Unsubscribe", "header.list-unsubscribe"), ("contentType", "html or attachments[].type"))],
    ({"a\r\nb": 1}, ["a??b: unknown key"]),
    *[({path.partition("[")[0]: value}, [f"{path}: expected a string, got {kind}"]) for path, value, kind in (
        ("mail", 1, "a number"), ("mail", ["a@x.jp"], "a list"), ("ehlo", False, "true or false"),
        ("body", {}, "an object"), ("rcpt", 5, "a number"), ("rcpt", {"a": 1}, "an object"),
        ("rcpt[1]", ["a", None], "null"), ("rcpt[0]", [["a"]], "a list"))],
    (b'{"body": "a", "body": "b"}', ["body: duplicate key"]),
    (b'{"header": {"subject": "a", "subject": "a", "Foo": 1, "X-a": "1"}}',
        ["header.subject: duplicate key", "header.Foo: unknown key"]),
    (b'{"body": "\\ud800"}', ["body: has half a surrogate pair at character 0"]),
    (b'{"rcpt": ["a", "b\\udc00"]}', ["rcpt[1]: has half a surrogate pair at character 1"]),
    (b'{"header": {"subject": "\\ud83d"}}', ["header.subject: has half a surrogate pair at character 0"]),
    (b'{"\\ud800": 1}', ["?: unknown key"]),
    ({"rcpt": 1, "body": 2, "x": 3},
        ["rcpt: expected a string, got a number", "body: expected a string, got a number", "x: unknown key"]),
    (b'{"body": "\\u001b", "header": {"charset": "ISO-2022-JP", "x-haineko-loop": %b%b}}' % (b"[" * 3000, b"]" * 3000),
        ["nested too deeply"]),
    *[(document(**change, header={"charset": "ISO-2022-JP", **header}), f"{path}: {said}") for held, said in (
        ("\x1b$B$\x1b(B", "claims to be ISO-2022-JP and ends within a character"),
        ("\x1b$B$M\nx\x1b(B", "claims to be ISO-2022-JP and isn't"),
        ("\x1b$B \x1b(B", "claims to be ISO-2022-JP and isn't"), ("\x1b$B~~\x1b(B", "has an unassigned character"),
        ("\x1b$(D0!\x1b(B", "has an escape sequence that is not ISO-2022-JP's")) for path, change, header in (
        ("body", {"body": held}, {}), ("header.subject", {}, {"subject": held}))],
    *[(document(send_at=value), "send_at: expected whole seconds") for value in (
        "2026-12-24T12:00:00", "2026-12-24", "2026-02-30T12:00:00Z", "2026-12-24T12:00:00Z ", "tomorrow", "",
        1798113600.5, True, [])],
    ({"html": 1}, "html: expected a string, got a number"),
    ({"attachments": "x"}, "attachments: expected an object, got a string"),
    ({"attachments": [file(), "x"]}, "attachments[1]: expected an object, got a string"),
    ({"attachments": [file(), file(), {"content": "a*b="}]}, "attachments[2].content: is not base64"),
    *[({"attachments": [item]}, f"attachments[0].{said}") for item, said in FILE_FAULTS],
    ({"html": "<img src='cid:logo'>"}, 'html: "cid:logo" has no attachment with this cid'),
    ({"html": "x", "attachments": [file(cid="logo")]}, 'attachments[0].cid: the HTML has no "cid:logo"'),
    ({"attachments": [file(cid="a"), file(cid="<a>")]}, "attachments[1].cid: another attachment has it already"),
    ({"attachments": [file()] * 1001}, "attachments: 1001 exceed the limit of 1000"),
    *[({"header": {key.partition("[")[0]: value}}, f"header.{key}: {said}") for key, value, said in FIELD_FAULTS],
    ({"header": {"x-a\r\nbcc": "a"}}, "header.x-a??bcc: unknown key"),
    *[({"header": header}, "header: more than 1000 fields or 102400 characters") for header in (
        {"x-a": ["a"] * 1001}, {f"x-{i}": "a" for i in range(1001)}, {"x-a": ["a" * 1000] * 103})],
    ({"header": {"to": ["a@b"] * 2001}}, "header.to: 2001 addresses exceed the limit of 2000"),
    ({"header": {"to": "a@b," * 2001}}, 'header.to: expected "name <address>"'),
    ({"header": {"replyto": "a@example.jp", "Reply-To": "b@example.jp"}},
        "header.Reply-To: means the same as replyto, which is set already"),
    ({"header": {"x-a": "1", "X_A": "1"}}, "header.X_A: means the same as x-a, which is set already"),
    *[({"raw": "A: b\n\nx", key: value}, f"{key}: can't stand beside raw") for key, value in (
        ("header", {"subject": "x"}), ("body", "x"), ("html", "x"), ("attachments", []))],
    *[({"raw": raw}, f"raw{said}") for raw, said in RAW_FAULTS],
]  # fmt: skip


class Submissions(Quiet):
    JIS = (
        ("\x1b$B$M$3\x1b(B", "ねこ"), ("\x1b$@$M$3\x1b(J", "ねこ"),
        ("cat \x1b$B$M$3\x1b(B cat \x1b$B$M$3\x1b(B", "cat ねこ cat ねこ"), ("\x1b(I6^\x1b(B", "ｶﾞ"),
        ("\x1b$B-!\x1b(B", "①"), ("\x1b$B|b\x1b(B", "髙"), ("\x1b$B-j\x1b(B", "㈱"), ("\x1b$B!A\x1b(B", "～"),
        ("a\x1b(Jb\x1b(Bc", "abc"), ("\x1b(J\\100~\x1b(B\\", "¥100‾\\"), ("plain", "plain"),
    )  # fmt: skip

    def test_keys_and_their_aliases(self):
        raw = "From: x@example.org\nTo: a@example.jp\n{}\nSubject: x\n\nMeow\n".format
        long = "X-Haineko-Loop: " + "x" * 900 + "\n " + "x" * 900 + ",\n a.example"  # is not remembered
        deep = "\n ".join(["(" * 900] * 20)  # refused, not lost
        hidden = document(rcpt=None, header={"to": "undisclosed-recipients:;", "bcc": "a@x"})
        lists = [("a@x.jp, B <b@x.jp>", ("a@x.jp", "b@x.jp")), ("B <b@x.jp>, a@x.jp", ("b@x.jp", "a@x.jp"))]
        lists += [("b@x.jp <c@x.jp>", ("c@x.jp",)), ("Yamada, Taro <taro@x.jp>", ("taro@x.jp",))]
        for submission, path, wanted in (
            ({"ehlo": "[127.0.0.1]"}, "ehlo", "[127.0.0.1]"), ({"helo": "a"}, "ehlo", "a"), ({"ehlo": ""}, "ehlo", ""),
            ({"ehlo": None}, "ehlo", None), *[({key: "a@x.jp"}, "mail", "a@x.jp") for key in ("mail", "send", "from")],
            ({"rcpt": ["a@x.jp", "b@x.jp"]}, "rcpt", ("a@x.jp", "b@x.jp")),
            *[({key: "a@x.jp"}, "rcpt", ("a@x.jp",)) for key in ("rcpt", "recv", "to")],
            ({"header": {"subject": "謹賀新年"}}, "header.subject", "謹賀新年"), ({"body": "お年玉"}, "body", "お年玉"),
            (b'{"body": "\\ud83d\\ude3a"}', "body", "😺"),
            (document(body="\x1b$B$M$3\x1b(B"), "body", "\x1b$B$M$3\x1b(B"),
            (document(body="ね\x1b$B$M$3\x1b(B", header={"charset": "ISO-2022-JP"}), "body", "ね\x1b$B$M$3\x1b(B"),
            *[({"header": {"charset": name}}, "header.charset", "UTF-8") for name in ("utf8", None)],
            *[({"header": {"x-haineko-loop": given}}, "header.loop", wanted) for given, wanted in (
                ("a.example", ("a.example",)), ("a.example, b.example", ("a.example", "b.example")), ([" a "], ("a",)),
                (["a.example", "b.example,c.example"], ("a.example", "b.example", "c.example")), ("", ()), ([], ()))],
            (finished(raw(long)), "header.loop", ("a.example",)),
            *[({"send_at": given}, "send_at", given) for given in (1798113600, 0, -5)],
            *[({"send_at": f"2026-12-24T{text}"}, "send_at", 1798113600) for text in (
                "12:00:00Z", "21:00:00+09:00", "21:00+0900")],
            ({"send_at": "2026-12-24T07:30:00.250-04:30"}, "send_at", 1798113600.25), (hidden, "rcpt", ("a@x",)),
            (finished(raw("X: y"), rcpt=["z@x.jp"]), "rcpt", ("z@x.jp",)),
            *[(finished(raw(f"Cc: {text}\nBcc: undisclosed-recipients:;")), "rcpt", ("a@example.jp", *wanted))
                for text, wanted in (
                *lists, ("c@x.jp,\n d@x.jp\nBcc: e@x.jp", ("c@x.jp", "d@x.jp", "e@x.jp")),
                (deep, (deep.replace("\n", ""),)),
                *[(text, (text,)) for text in ("foo-[redacted]victim@example.net", "c@x.jp <d@x.jp> e")])],
            *[(document(rcpt=None, header={"to": text}), "rcpt", wanted) for text, wanted in lists],
        ):  # fmt: skip
            with self.subTest(submission):
                found = understood(submission)
                for name in path.split("."):
                    found = getattr(found, name)
                self.assertEqual(found, wanted)
        self.assertIn(b"\r\nTo: undisclosed-recipients:;\r\n", composed(hidden))

    def test_null_is_as_if_absent(self):
        names = dict.fromkeys(["ehlo", "helo", "mail", "send", "from", "rcpt", "recv", "to", "header", "body"])
        found = understood(names)
        self.assertEqual(vars(found), vars(haineko.Submission(rcpt=(), header=found.header)))

    def test_faults(self):
        for submission, wanted in FAULTS:
            with self.subTest(str(submission)[:100]):
                found = errors_in(submission)
                self.assertNotRegex("".join(found), r"[\r\n\0]")
                if isinstance(wanted, list):
                    self.assertEqual(found, wanted)
                else:
                    self.assertEqual({error.partition(":")[0] for error in found}, {wanted.partition(":")[0]})
                    self.assertTrue(found[0].startswith(wanted), found)

    def test_what_is_no_json(self):
        for body, words in (
            (b"", "line 1 column 1|the body is empty"), (b'{\n "a": }', "line 2 column 7"), (b"\xff", "UTF-8"),
            (b"mail=a%40x&rcpt=b", "line 1|form data"),
            (b'--b\r\nContent-Disposition: form-data; name="a"', "form data"), (b"[" * 100000, "deep"),
            (b'{"a": NaN}', "NaN"),
        ):  # fmt: skip
            with self.subTest(body[:20]):
                found = haineko.parse_submission(body)
                self.assertEqual((found.submission, found.is_json, len(found.errors)), (None, False, 1))
                for word in words.split("|"):
                    self.assertIn(word, found.errors[0])
        for body in (b"[]", b'{"a": 1}', b'{"a": 1, "a": 1}', as_body({"mail": 1, "rcpt": 2})):
            self.assertTrue(haineko.parse_submission(body).is_json)

    def test_addresses(self):
        for text, local, domain in (
            ("a@example.jp", "a", "example.jp"), ("A.b+c=d@Example.JP", "A.b+c=d", "Example.JP"),
            ("a@localhost", "a", "localhost"), ("!#$%&'*+-/=?^_`{|}~@example.jp", "!#$%&'*+-/=?^_`{|}~", "example.jp"),
            ('"a b"@example.jp', '"a b"', "example.jp"), (r'"a\"\\b"@example.jp', r'"a\"\\b"', "example.jp"),
            ('"a@b"@example.jp', '"a@b"', "example.jp"), ("a@[192.0.2.1]", "a", "[192.0.2.1]"),
            ("a@[IPv6:2001:db8::1]", "a", "[IPv6:2001:db8::1]"), ("a@例え.jp", "a", "xn--r8jz45g.jp"),
            ("ねこ@example.jp", "ねこ", "example.jp"), ("a" * 64 + "@" + "b" * 63 + ".jp", "a" * 64, "b" * 63 + ".jp"),
            ("a" * 50 + "@" + "é." * 15 + "jp", "a" * 50, "xn--9ca." * 15 + "jp"),
        ):  # fmt: skip
            with self.subTest(text):
                found = haineko.parse_address(text)
                self.assertEqual((found.as_written, found.domain), (text, domain))
                self.assertEqual(found.addr_spec, f"{local}@{domain}")
                self.assertEqual(haineko.parse_address(found.addr_spec).addr_spec, found.addr_spec)
        for text in (
            "", " ", "a", "@", "a@", "@example.jp", "<a@example.jp>", "A <a@example.jp>", " a@example.jp",
            "a@example.jp ", "a b@example.jp", "a@b@example.jp", ".a@example.jp", "a.@example.jp", "a..b@example.jp",
            "a@.example.jp", "a@example..jp", "a@example.jp.", "a@-example.jp", "a@exam ple.jp",
            "a@example.jp,b@example.jp", "a@[1.2.3]", "a@[2001:db8::1]", "a@[IPv6:zz]", "a@[IPv6:fe80::1%eth0]",
            "a@[example.jp]", "a,b@example.jp", "a:b@example.jp", 'a"b@example.jp', '"a"b"@example.jp', '"a@example.jp',
            '"a\tb"@example.jp', "a@example.jp\r\n", "a\0@example.jp", "a@exa\nmple.jp", "a\x7f@example.jp",
            "a\x85@example.jp", "a@faß.de", "a@" + "b" * 64 + ".jp", "a" * 250 + "@example.jp", "a@ex(c)ample.jp",
            "\ud800@example.jp", "a@ｅ ｘ.jp", "a@example.jp\u2028", "a" * 150 + "@" + "é." * 20 + "jp",
            "a@example.jp> SIZE=1", "a@example.jp\r\nRCPT TO:<b@example.jp>",
        ):  # fmt: skip
            with self.subTest(text):
                self.assertIsNone(haineko.parse_address(text))
        self.assertEqual(haineko.idna_hint("A <a@x>"), ('expected a bare address, got "A <a@x>"; did you mean "a@x"?',))

    def test_address_lists(self):
        a, b = ("", "a@x"), ("", "b@y")
        for text, wanted in (
            ("a@x,", [a]), (",a@x,,b@y", [a, b]), ("a@x; b@y", [a, b]), ("a@x (Doe, J), b@y", [("Doe, J", "a@x"), b]),
            ("unlisted-recipients:; (no To-header on input)", []), ("undisclosed-recipients:;", []),
            ("(Empty list)(start)Hidden recipients  :(nobody(that I know))  ;", []), ("(a (b) \\) c)", []),
            ("A Group:Ed Jones <a@x>, b@y; , c@z", [("Ed Jones", "a@x"), b, ("", "c@z")]), ("", []), (" ,; ", []),
            ('"Doe, J" <a@x> (work), B <b@y>', [("Doe, J (work)", "a@x"), ("B", "b@y")]), ("< a@x >, b@y", [a, b]),
            ("a@[IPv6:2001:db8::1]; b@y", [("", "a@[IPv6:2001:db8::1]"), b]), ("a@x", [a]), ("<a@x>", [a]),
            ("a@x, b@y", [a, b]), ("A <a@x>, B <b@y>", [("A", "a@x"), ("B", "b@y")]),
            ('あ <a@x>, "い, う" <b@y>', [("あ", "a@x"), ("い, う", "b@y")]),
            ("Neko <a@[192.0.2.1]>", [("Neko", "a@[192.0.2.1]")]), ('Neko <"ne ko"@x>', [("Neko", '"ne ko"@x')]),
            ("a@例え.jp", [("", "a@xn--r8jz45g.jp")]),
            *[(text, [("", text)]) for text in ("a@[192.0.2.1]", '"ne ko"@x')],
            *[(text, [(name, "a@x")]) for text, name in (
                ("Neko<a@x>", "Neko"), ("Neko  <a@x> ", "Neko"), ("Dr. N. Eko (vet) <a@x>", "Dr. N. Eko (vet)"),
                ("a@x (the cat)", "the cat"), ('"Yamada, Taro" <a@x>', "Yamada, Taro"),
                ('"山田, 太郎" <a@x>', "山田, 太郎"), (r'"the \"cat\"" <a@x>', 'the "cat"'),
                *[(f"{name} <a@x>", name) for name in ("キジトラ", "山田, 太郎", "Yamada, Taro", "=?UTF-8?B?44Kt?=")])],
        ):  # fmt: skip
            with self.subTest(text):
                self.assertEqual(addresses(haineko.parse_mailboxes(text)), wanted)
                if wanted or not text:
                    header = understood({"header": {"from": text, "replyto": text}}).header
                    self.assertEqual((addresses(header.from_), addresses(header.replyto)), (wanted, wanted))
        for text in (
            "foo-[redacted]victim@example.net", "<foo>bar@example.net", "a@x b@y", "a:b@x", "x: a@x, y: b@y;;", "(a",
            "a@x)", '"a', "<a@x", "a@x <b@y>, c", "a@x>", "<a@x> <b@y>", "<a@x> b", "g:;a", "[a@x]", ":;", "a@x, (",
            "a@x,b@" + "," * 9, "a@x," * 2001, " ", "Neko", "Neko <>", "Neko <neko>", "neko at example.jp",
            "Neko neko@example.jp>", "ね\u202eこ@example.jp", "ねこ <ね\u2028こ@example.jp>", "a@b@c.jp",
            "A <a@example.jp>, B", '"Neko <neko@example.jp>', "Neko <a b@example.jp>", "neko@faß.de", "()", ",",
            "a" * 99999, "N\0 <neko@example.jp>", "N\r\nX: y <neko@example.jp>", "Neko <neko@example.jp\n>",
            "Neko <neko@ex\0ample.jp>",
        ):  # fmt: skip
            for key in ("from", "to"):  # of which To may be an empty group
                with self.subTest(text, key=key):
                    self.assertEqual(len(errors_in({"header": {key: text}})), 2 if "ex\0" in text else 1)

    def test_what_is_expensive(self):
        parts = finished("Content-Type: multipart/mixed; boundary=b\n\n" + "--b\n\né\n" * 1900, rcpt="b@example.jp")
        for parse, make, form in (
            (False, False, document(body="a mail of lines\n" * 4000)), (False, False, document(body="猫" * 9000)),
            (False, True, document(body=None, html="<b>x</b>" * 2000)),
            (False, True, document(header={"subject": "猫" * 20000})),
            (False, True, document(header={"from": "猫" * 20000 + " <a@example.org>"})),
            (True, True, document(header={"to": ["猫 <a@b.jp>"] * 1500})),
            (True, True, document(header={"x-a": ["é@" * 40] * 999})),
            (True, True, document(attachments=[file()] * 900)),
            (False, False, finished("A: b\n\n" + "x\n" * 2000, rcpt="b@example.jp")), (True, True, parts),
        ):  # fmt: skip
            with self.subTest(str(form)[100:250]):
                found = haineko.is_expensive(as_body(form)), haineko.is_expensive(understood(form))
                self.assertEqual(found, (parse, make))

    def test_header_fields_that_relays_take_for_commands(self):
        names = ["X-MC-Tags", "x-ses-tenant", "X-SMTPAPI", "X-PM-Tag", "X-MS-Exchange-Foo"]
        given = document(header={**dict.fromkeys(names, "a"), "X-Mailer": "b", "X-MCX": "c"})
        raw = "".join(f"{name} : a\n" for name in names) + "X-MCX: c\n\nx"
        for form in (given, finished(raw, rcpt="b@example.jp")):
            _, *lines = posted(form)[1]["response"][0]["message"]
            said = [f"{name.lower()}: the route must have provider_headers to send it" for name in names]
            self.assertEqual([line.lower() for line in lines], said)

    def test_names_of_charsets(self):
        for wanted, names in (
            ("UTF-8", "UTF-8|utf8|U8"), ("ISO-2022-JP", "iso-2022-jp|csISO2022JP"), ("ISO-8859-1", "ISO-8859-1|latin1"),
            ("US-ASCII", "us-ascii|ASCII"), ("ISO-8859-15", "ISO-8859-15|latin9"),
            ("windows-1252", "windows-1252|cp1252"), ("Shift_JIS", "Shift_JIS"), ("Windows-31J", "cp932"),
            ("EUC-JP", "EUC-JP"), ("GB18030", "gb18030"), ("Big5", "Big5|cp950"), ("KOI8-R", "KOI8-R"),
            ("EUC-KR", "EUC-KR"), ("Big5-HKSCS", "big5-hkscs"), ("ISO-2022-KR", "iso2022_kr"),
            ("macintosh", "macintosh|mac_roman"), ("KZ-1048", "kz_1048"), ("ISO-2022-JP-2", "iso-2022-jp-2"),
            ("IBM437", "cp437"),
            ("", "|x|UTF-16|utf-7|utf-8-sig|idna|punycode|rot13|iso-2022-jp-1|iso-2022-jp-3|iso-2022-jp-ext|mac_greek"),
            ("", "johab|cp1125|koi8-t|shift_jis_2004|base64|hex|zlib|hz|cp037|undefined|unicode_escape"),
            ("", "raw_unicode_escape|mbcs|utf-8\r\nX: y|utf-8\0|utf 8|ねこ|../utf8|" + "a" * 1000),
        ):  # fmt: skip
            for name in names.split("|"):
                with self.subTest(name):
                    self.assertEqual(haineko.iana_charset(name), wanted)

    def test_every_charset_of_python_that_is_taken_can_be_written(self):
        import encodings.aliases

        aliases = {*encodings.aliases.aliases, *encodings.aliases.aliases.values()}
        names = {haineko.iana_charset(name) for name in aliases} - {""}
        self.assertGreater(len(names), 50)
        for name in names:
            with self.subTest(name):
                self.assertRegex(name, r"\A[A-Za-z0-9_-]+\Z")
                form = document(header={"subject": "é 日本", "charset": name, "from": "kijitora@example.org"})
                self.assertIn(b"charset=", composed(form))
                self.assertEqual(haineko.decode_charset(b"Meow", name), "Meow")
        jis, yen = "\x1b$A\x1b.A\x0e", "¥1,980\n"  # yen: the codecs write a backslash
        for name, body in {"ISO-2022-JP-2": jis, "ISO-2022-KR": jis, "EUC-JP": yen, "Shift_JIS": yen}.items():
            octets = composed(document(header={"subject": body[:-1], "charset": name}, body=body))
            self.assertIn(b"charset=UTF-8", octets)

    def test_a_long_name_and_an_encoded_word_are_two_lines(self):
        for name in ("X-" + "a" * 72, "X-" + "a" * 52):
            lines = haineko.text_field(name, "猫" * 40, "ISO-2022-JP").split("\r\n")
            self.assertLess(max(map(len, lines)), 77)
            self.assertNotIn("?B??=", "".join(lines))

    def test_strings_that_hold_iso_2022_jp(self):
        for held, meant in self.JIS:
            octets = as_body(document(body=held, header={"subject": held, "charset": "ISO-2022-JP"}))
            for form in (octets, octets.replace(b"\\u001b", b"\x1b")):
                with self.subTest(form):
                    found = understood(form)
                    self.assertEqual((found.header.subject, found.body), (meant, meant))
        held = "\x1b$B%-%8%H%i\x1b(B <kijitora@example.com>"
        found = understood(document(header={"from": held, "replyto": held, "charset": "iso-2022-jp"})).header
        self.assertEqual(addresses(found.from_), [("キジトラ", "kijitora@example.com")])
        self.assertEqual(found.replyto, found.from_)


class RawMessages(Quiet):
    HEAD = "From: a@x.org\nTo: A <a@x.jp>,\n b@x.jp\nCc: c@x.jp\nBcc: d@x.jp\nSubject: Nya\n"
    HEAD_ALONE = b"From: a@x.org\r\nTo: b@x.jp\r\nDate: Fri, 3 Jan 2014 18:35:58 +0900\r\nMessage-ID: <a@b>\r\n"
    MIXED = "MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=b\n\n"

    def sent(self, message, *downgraded) -> bytes:
        """A finished message as it leaves, to a path without SMTPUTF8 and 8BITMIME where `downgraded` says so."""
        found = composed(finished(message, rcpt="z@example.jp"))
        return haineko.downgrade_8bit(found, *downgraded) if downgraded else found

    def test_what_is_put_on_and_what_is_taken_off(self):
        octets = self.sent(self.HEAD + "Return-Path: <x>\nX-Haineko-Loop: r1,\n r2\n\nMeow.\n.\n")
        names = "Received From To Cc Subject Date Message-Id X-Haineko-Loop"
        self.assertEqual(" ".join(name for name, _ in raw_fields(octets)), names)
        self.assertIn(f"\r\nX-Haineko-Loop: r1, r2, {NAME}\r\n".encode(), octets)
        self.assertIn(b" with HTTP id QQQQQQQQQQQQQQQQ;", octets)
        self.assertTrue(octets.endswith(b"\r\n\r\nMeow.\r\n.\r\n"))

    def test_what_it_says_itself_stays(self):
        head = "Received: x\nMessage-ID: <a@b>\nDate: Fri, 3 Jan 2014 18:35:58 +0900\nFrom: a@example.org\n"
        head += "X-Odd:  y  \nSubject: " + "s " * 60 + "\n" + self.MIXED
        body = "--b\nContent-Type: text/plain\n\nFrom a\n\n--b--\n"
        for form in (head + body, (head + body).replace("\n", "\r\n"), (head + body).encode()):
            octets = self.sent(form)
            for line in head.split("\n")[:-2]:
                self.assertIn(f"\r\n{line}\r\n".encode(), octets)
            self.assertTrue(octets.endswith(b"\r\n\r\n" + body.replace("\n", "\r\n").encode()))
            self.assertEqual((octets.lower().count(b"\r\nmessage-id:"), octets.count(b"\r\nDate:")), (1, 1))

    def test_bodies_that_no_line_can_hold(self):
        kinds = ("text/html; charset=UTF-8", "text/plain", "application/x-cat", "text/html; charset=bogus")
        codings = ("", "Content-Transfer-Encoding: 8bit\n", "Content-Transfer-Encoding: binary\n")
        bodies = ("x" * 2000 + "\n", "猫\n" + "y" * 999 + "\n", "a\0b\n")
        for kind, coding, body in itertools.product(kinds, codings, bodies):
            with self.subTest(kind, coding=coding, body=body[:3]):
                octets = self.sent(f"{self.HEAD}Content-Type: {kind}\n{coding}\n{body}")
                self.assertLessEqual(max(map(len, octets.split(b"\r\n"))), 998)
                self.assertNotIn(b"\0", octets)
                found = email.message_from_bytes(octets)
                lines = body if "binary" in coding and "x-cat" in kind else body.replace("\n", "\r\n")
                self.assertEqual(found.get_payload(decode=True), lines.encode())
                self.assertEqual((found["subject"], found.get_content_type()), ("Nya", kind.partition(";")[0]))

    def test_in_seven_bits(self):
        """What is said to a server that knows ASCII only is what was given."""
        head = "From: 猫 <a@example.org>\nTo: =?UTF-8?B?54yr?= <b@example.jp>\nSubject: 謹賀新年\nX-A: b\n"
        text = "Content-Type: text/plain; charset=UTF-8\nContent-Transfer-Encoding: 8bit\n\n猫\n"
        part = 'Content-Type: a/pdf; name="猫.pdf"\nContent-Disposition: attachment; filename="猫.pdf"\n\n%PDF\n'
        octets = f"{head}{self.MIXED}--b\n{text}--b\n{part}--b--\n".replace("\n", "\r\n").encode()
        found = haineko.downgrade_8bit(octets)
        self.assertTrue(found.isascii())
        message = parsed(found)
        shown = [message[name] for name in ("from", "to", "subject", "x-a")]
        self.assertEqual(shown, ["猫 <a@example.org>", "猫 <b@example.jp>", "謹賀新年", "b"])
        self.assertEqual(text_in(message.get_payload(0)), "猫")
        self.assertEqual(message.get_payload(1).get_filename(), "猫.pdf")
        self.assertEqual(message.get_payload(1).get_payload(decode=True), b"%PDF")
        for field in ("From: 猫@example.org", "Cc: A <猫@example.org>, b@example.jp"):
            self.assertFalse(haineko.downgrade_8bit(f"{field}\r\n\r\nx\r\n".encode()).isascii())

    def test_what_a_path_can_carry_stays(self):
        mime = b"Content-Type: text/plain; charset=iso-8859-1\r\nContent-Transfer-Encoding: 8bit\r\n"
        parts = (self.MIXED + "for nobody\n--b\n\nx  \n--b \n").replace("\n", "\r\n").encode()
        for message in (
            b"\r\n" + b"a" * 79 + b"\r\n", b"\r\n\f" + b"a" * 997 + b"\r\n", b'\r\n\x1b$B$"$$\x1b(B\r\n',
            mime + b"\r\nGr\xfc\xdfe\r\n", parts + b"Content-Type : image/png\r\n\r\n\x89\r\n--b--\r\n\r\n",
            parts.replace(b"=b", b'="b"') + b"\r\nx\r\n--b--",
        ):  # fmt: skip
            with self.subTest(message):
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
        for field, wanted in (
            ("Content-Type: text/plain; name=café.txt; x=y", "text/plain;\r\n name*=UTF-8''caf%C3%A9.txt; x=y"),
            ('Content-Disposition: attachment; filename="é\\".txt"; size=1',
                "attachment;\r\n filename*=UTF-8''%C3%A9%22.txt; size=1"),
            ("Content-Type: a/b; x=é; y=é", "a/b;\r\n x*=UTF-8''%C3%A9;\r\n y*=UTF-8''%C3%A9"),
            ("Content-Type: a/b; x*=UTF-8''a%20é; y=z", "a/b; x*=UTF-8''a%20%C3%A9; y=z"),
            ("Date: Sat, 28 Nov 2026 12:00:00 +0200 (Mitteleuropäische Zeit)",
                "Sat, 28 Nov 2026 12:00:00 +0200 (=?UTF-8?B?TWl0dGVsZXVyb3DDpGlzY2hlIFplaXQ=?=)"),
            ("Received: from a (é [192.0.2.1]) by b; x", "from a (=?UTF-8?B?w6kgWzE5Mi4wLjIuMV0=?=) by b; x"),
            ("Subject: =?UTF-8?Q?a?= é =?UTF-8?Q?b?=", "=?UTF-8?Q?a?= =?UTF-8?B?IMOpIA==?= =?UTF-8?Q?b?="),
            ("Cc: é:;", "=?UTF-8?B?w6k=?= :;"),
            ('Cc: "é ü": a@x.jp, ö <b@x.jp> (ä), c@x.jp;',
                "=?UTF-8?B?w6kgw7w=?= : a@x.jp, =?UTF-8?B?w7Y=?= <b@x.jp>\r\n (=?UTF-8?B?w6Q=?=), c@x.jp;"),
            ("Reply-To: é <a@example.jp>", "=?UTF-8?B?w6k=?= <a@example.jp>"),
            ("X-A: a é".encode("latin-1"), "=?unknown-8bit?B?YSDp?="),
            ("Cc: é <b@x.jp> (ü)".encode("latin-1"), "=?unknown-8bit?B?6Q==?= <b@x.jp> (=?unknown-8bit?B?/A==?=)"),
            ("Content-Disposition: a; filename=\"é\"; Filename*=UTF-8''%C3%A9; x=y", "a; Filename*=UTF-8''%C3%A9; x=y"),
            (b"Subject: =?iso-8859-1?Q?Gr\xfc=DFe?=", "=?iso-8859-1?Q?Gr=FC=DFe?="),
            ("Subject: =?UTF-8?Q?ü=C3=BC?= ä", "=?UTF-8?Q?=C3=BC=C3=BC?= =?UTF-8?B?IMOk?="),
        ):  # fmt: skip
            with self.subTest(field):
                octets = field if isinstance(field, bytes) else field.encode()
                found = self.sent(b"From: a@example.org\r\n" + octets + b"\r\n\r\nx\r\n", True)
                self.assertTrue(found.isascii())
                self.assertIn(f"\r\n{octets.partition(b':')[0].decode()}: {wanted}\r\n".encode(), found)

    def test_fields_take_time_by_their_length_only(self):
        for shape in ("é,", "é ", '"é",', "é:a@b,", "(é)", "<é>"):
            seconds = []
            for count in (4000, 32000):
                began = time.process_time()
                haineko.encode_field("to", b"To: " + (shape * count).encode() + b"\r\n", "")
                seconds.append(time.process_time() - began)
            with self.subTest(shape, seconds=seconds):
                self.assertLess(seconds[1], 24 * max(seconds[0], 0.01))  # 8 times as long, not 64

    def test_octets_in_a_header_that_have_no_form_in_ascii(self):
        for field in ("Message-ID: <ü@example.org>", "References: <é@b>", "From: é@example.org", "Content-ID: <é>"):
            with self.subTest(field):
                name = field.partition(":")[0]
                found = haineko.downgrade_8bit(f"X-A: é\r\n{field}\r\n\r\nx\r\n".encode())
                self.assertEqual(haineko.non_ascii_fields(found), [name.lower()])
                if name != "From":
                    (error,) = errors_in(finished(field.encode("latin-1") + b"\n\nx"))
                    self.assertIn(f"header {name}: ", error)

    def test_a_field_with_a_long_name_keeps_its_text(self):
        octets = b"x" * 80 + ": {}\r\n".format("é" * 100).encode()
        text = haineko.unfold(haineko.encode_field("x" * 80, octets, ""))
        self.assertEqual(haineko.decode_encoded_words(text), "é" * 100)

    def test_header_and_body_are_changed_each_on_its_own(self):
        head = b"MIME-Version: 1.0\r\nContent-Type: text/plain; charset=gb2312\r\nContent-Transfer-Encoding: 8bit\r\n"
        body = "\r\n中文\r\n".encode("gb2312")
        for downgraded in ((), (True,)):
            found = self.sent(self.HEAD_ALONE + "Subject: 中文\r\n".encode("gb2312") + head + body, *downgraded)
            self.assertIn(b"\r\nSubject: =?UTF-8?B?5Lit5paH?=\r\n" + head, found)
            self.assertTrue(found.endswith(b"\r\n" + body))
        found = self.sent(self.HEAD_ALONE + "Subject: 中文\r\n".encode() + head + body)
        self.assertIn("\r\nSubject: 中文\r\n".encode(), found)
        self.assertTrue(haineko.downgrade_8bit(found).isascii())
        self.assertEqual(haineko.downgrade_8bit(found, True).partition(b"\r\n\r\n")[2], body[2:])

    def test_binary(self):
        picture, head = b"\x89PNG\r\n\x1a\n\r\r\n\0--b", self.HEAD_ALONE + b"MIME-Version: 1.0\r\n"
        kind = b"Content-Type: image/png\r\nContent-Transfer-Encoding: Binary\r\n\r\n" + picture
        self.assertEqual(parsed(self.sent(head + kind)).get_payload(decode=True), picture)
        mixed = b"Content-Type: multipart/mixed; boundary=b\r\nContent-Transfer-Encoding: binary\r\n\r\n"
        octets = self.sent(head + mixed + b"--b\r\n\r\nx\r\n--b\r\n" + kind + b"\r\n--b--\r\n")
        self.assertNotIn(b"inary", octets)
        text, image = parsed(octets).get_payload()
        self.assertEqual((text.get_payload(), image.get_payload(decode=True)), ("x", picture))

    def test_what_cannot_be_parsed_is_sent_or_refused(self):
        nested = b"".join(b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (i, i) for i in range(200))
        mixed = b"Content-Type: multipart/mixed; boundary=b\n\n"
        for octets, refused in (
            (b"MIME-Version: 1.0\nContent-Transfer-Encoding: base64\n\nAAA\0A", None), (mixed + b"\xe9", None),
            (b"Content-Type: text/plain; a*\n\n" + b"x" * 2000, None),
            (b'Subject: \xe9\nContent-Type: text/plain; charset="x\n\n' + b"\xe9" * 999, None),
            (b"Content-Type: message/rfc822\n\n" * 3000 + b"x", "levels of parts exceed the limit of 100"),
            (nested, "levels of parts exceed the limit of 100"),
            (mixed + b"--b\n\n" * 2001, "parts exceed the limit of 2000"),
            (b"a:\n" * 1001, "fields in a header exceed the limit of 1000"),
            (b"a: " + b"x\n " * 40000, "octets of a header exceed the limit of 102400"),
            (b"Content-Type: a/b" + b";\n a=b" * 10001, None),
        ):  # fmt: skip
            with self.subTest(octets[:70]):
                if refused:
                    (error,) = errors_in(finished(octets))
                    self.assertIn(refused, error)
                    continue
                made = self.sent(octets)
                for found in (made, haineko.downgrade_8bit(made), haineko.downgrade_8bit(made, True)):
                    self.assertTrue(found.endswith(b"\r\n"))
                    self.assertIsNone(re.search(rb"\0|[^\r\n]{999}", found))
                self.assertTrue(haineko.downgrade_8bit(made).isascii())


# ======================================================================================================================
# 6. Policy
# ======================================================================================================================


class Row:
    """A row of the table of refusals: a fault made in a submission, in what carries it or in the settings."""

    def __init__(self, wanted: tuple, http=None, force=None, **change):
        self.wanted = wanted
        self.parts = [change, change.pop("header", {}), force or {}, http or {}]

    def with_(self, later: Row) -> Row | None:
        """Both faults at once, of which this one is told; None where one request can't have both."""
        mine, other = ({**row.parts[0], **row.parts[1]} for row in (self, later))
        twice = any(one.keys() & two.keys() for one, two in zip(self.parts, later.parts))
        both = Row(self.wanted)
        both.parts = [{**theirs, **own} for own, theirs in zip(self.parts, later.parts)]
        return None if twice or ("raw" in {*mine, *other} and mine and other) else both


NO_LOGIN = (401, "535", "5.7.0", "AUTH", "authentication failed")
NO_ACCESS = (403, "500", "5.7.1", "AUTH", "Access denied")
MALFORMED = (400, "421", None, "HTTP", "Malformed JSON string")
INVALID = (400, "554", "5.6.0", "HTTP", "Invalid submission")
NO_QUEUE = (400, "421", None, "HTTP", 'No queue here: set "queue": {"path": "haineko.db"} in the settings')
LOOP = (400, "421", "5.4.6", "CONN", "Detected message loop")
EHLO = (400, "501", "5.0.0", "EHLO", "Invalid domain name")
MAIL_EMPTY = (400, "501", "5.5.2", "MAIL", 'Syntax error in parameters scanning "FROM"')
MAIL_FORM = (400, "553", "5.5.4", "MAIL", "Domain name required for sender address")
RCPT_NONE = (400, "553", "5.0.0", "RCPT", "User address required")
RCPT_MANY = (403, "452", "4.5.3", "RCPT", "Too many recipients")
RCPT_FORM = (400, "553", "5.1.5", "RCPT", "Recipient address is invalid")
RCPT_POLICY = (400, "553", "5.7.1", "RCPT", "Recipient address is not permitted")
BODY_EMPTY = (400, "500", "5.6.0", "DATA", "Message body is empty")
LINE_LONG = (400, "554", "5.6.0", "DATA", "Message has a NUL, or a line longer than 998 octets")
TOO_BIG = (413, "552", "5.3.4", "DATA", "Message size exceeds fixed maximum message size")
SUBJECT_EMPTY = (400, "500", "5.6.0", "DATA", "Subject header is empty")
LONG_LINE = "Content-Type: multipart/mixed; boundary=XX\n\n--XX\nX-Long: " + "x" * 999 + "\n\na\n--XX--\n"
PASSED = [f"r{i}.example" for i in range(26)]
# In the order in which faults are told; of one fault, several forms.
REFUSALS = [
    [Row((404, "421", None, "HTTP", "Not found"), http={"path": "/submitt"})],
    [Row((405, "421", None, "HTTP", f"{method} method not supported"), http={"method": method})
     for method in ("GET", "PUT", "DELETE", "PATCH", "TRACE", "post")],
    [Row(NO_LOGIN, force={"password": {"a": SettingsFile.KIJITORA}, **force})
     for force in ({}, {"relayhosts": {"open-relay": 1}})],
    [*[Row(NO_ACCESS, http={"client": client}) for client in ("192.0.2.1", "127.0.0.2")],
     Row(NO_ACCESS, force={"relayhosts": {"relayhosts": ["192.0.2.0/24"]}})],
    [
        Row(MALFORMED, raw=b"mail=a@example.jp"), Row(MALFORMED, raw=b"[" * 100000), Row(INVALID, raw=b"[]"),
        Row(INVALID, raw=b'{"body": "\\ud800"}'), Row(INVALID, replyto="a@example.jp"), Row(INVALID, body=1),
        Row(INVALID, rcpt=None, header={"bcc": "a@straße.de"}), *[Row(NO_QUEUE, send_at=at) for at in (int(NOW), 0)],
        Row(INVALID, header={"replyto": "a\r <a@example.jp>"}),
    ],
    [
        Row(LOOP, header={"x-haineko-loop": ["a.example", "RELAY.example.org"]}),
        *[Row(LOOP, raw=as_body(finished(f"X-Haineko-Loop: {names}\n\nx", rcpt="a@b.jp")))
          for names in (NAME, ", ".join(PASSED))],
        Row(LOOP, header={"x-haineko-loop": PASSED}),
    ],
    [Row(EHLO, ehlo=name)
     for name in ("", "a b", "-a", "a_é", "a..b", "[127.0.0.1", "[1.2.3]", "[IPv6:g]", "[::1]", "::1", "a\r\nb", "a.",
                  "[IPv6:fe80::1%\r\nX-Evil: 1]", "[IPv6:fe80::1%eth0]", "a" * 256, "x\0")],
    [Row(MAIL_EMPTY, mail=""), Row(MAIL_EMPTY, mail=None)],
    [Row(MAIL_FORM, mail=text)
     for text in ("kijitora", " ", "a@example.jp\r\nRCPT TO:<b@example.jp>", "a@faß.de", "A <a@example.jp>")],
    [*[Row(RCPT_NONE, rcpt=value) for value in ([], "", [""])], Row(RCPT_NONE, rcpt=[], header={"to": "a@b.jp"}),
     Row(RCPT_NONE, rcpt=None)],
    [*[Row(RCPT_MANY, rcpt=list(names)) for names in ([f"r{i}@example.jp" for i in range(5)], "abcde")],
     Row(RCPT_MANY, rcpt=["a@a.jp", "b@a.jp"], force={"smtpd": {"max_rcpts_per_message": 1}})],
    [Row(RCPT_FORM, rcpt=[text])
     for text in ("mikeneko", "a@example.jp,b@example.jp", "a@example.jp\nX: y", "a\0", "<a@example.jp>")],
    [Row(RCPT_POLICY, rcpt=["neko@a.jp"], force={"recipients": section})
     for section in ({"domainpart": ["b.jp"]}, {"recipients": ["a@a.jp"]}, None)],
    [Row(BODY_EMPTY, body=""), Row(BODY_EMPTY, body=None, html=""), Row(BODY_EMPTY, body=None, attachments=[file()]),
     Row(BODY_EMPTY, body=None)],
    [Row(LINE_LONG, raw=as_body(finished(LONG_LINE, rcpt="a@example.jp")))],
    [Row(TOO_BIG, body="x" * 2000, force={"smtpd": {"hostname": NAME, "max_message_size": 1000}}),
     Row(TOO_BIG, force={"smtpd": {"hostname": NAME, "max_message_size": 100}})],
    [Row(SUBJECT_EMPTY, header={"subject": ""}), Row(SUBJECT_EMPTY, html="x", header={"subject": ""}),
     Row(SUBJECT_EMPTY, header={"subject": None})],
]  # fmt: skip
ITEM = {"rcpt", "error", "code", "dsn", "command", "message", "mailer", "host", "port"}


class Policy(Quiet):
    KEYS = (
        "queueid", "addresser", "recipient", "response", "remoteaddr", "remoteport", "useragent", "referer",
        "timestamp",
    )  # fmt: skip
    ITEM = ("rcpt", "error", "code", "dsn", "command", "message", "mailer", "host", "port")

    def check(self, row: Row) -> None:
        """The row's refusal, in the form of every answer, with one line in the log."""
        change, header, force, http = row.parts
        body = change.get("raw") or as_body(document(**change, header=header))
        http = {"method": "POST", "path": "/submit", "client": "127.0.0.1", **http}
        head = f"{http['method']} {http['path']} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        self.logged()
        status, found = over_http(head.encode() + body, settings(**force), http["client"])
        (line,) = self.logged()
        self.assertEqual(tuple(found), self.KEYS)
        (item,) = found["response"]
        self.assertEqual(tuple(item), self.ITEM)
        self.assertEqual((status, item["code"], item["dsn"], item["command"], item["message"][0]), row.wanted)
        self.assertEqual((item["error"], item["mailer"], item["host"], item["port"]), (1, None, None, None))
        self.assertIn(f"{found['queueid'] or '-'}: client=", line)
        self.assertIn(f" status=rejected ({item['code']} {item['message'][0]}", line)

    def test_every_refusal(self):
        for row in itertools.chain(*REFUSALS):
            with self.subTest(str(row.parts)[:300]):
                self.check(row)

    def test_our_own_fault(self):
        broken = haineko.replace(settings(), recipients=None)  # which settled() never leaves
        status, found = over_http(post(), broken)
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
            pairs = [both for one in earlier for two in later if (both := one.with_(two))]
            for row in pairs[:1] + pairs[-1:]:
                with self.subTest(str(row.parts)[:300]):
                    count += 1
                    self.check(row)
        self.assertGreater(count, 150)

    def test_a_malformed_submission_is_told_what_and_where(self):
        two = as_body(document(bdy="x", header={"sbject": "x"}))
        for octets, wanted in (
            (b"{", ["Expecting property name"]), (two, ["bdy: unknown key; did you", "header.sbject: unknown key"]),
            (as_body({f"k{i}": 1 for i in range(99)}), [f"k{i}: unknown key" for i in range(10)]),
        ):  # fmt: skip
            with self.subTest(octets[:30]):
                found = posted(octets)[1]
                lines = sorted(found["response"][0]["message"][1:])
                self.assertEqual([line[: len(start)] for line, start in zip(lines, wanted)], wanted)
                self.assertEqual((len(lines), found["addresser"], found["recipient"]), (len(wanted), None, None))
                self.assertRegex(found["queueid"], r"\A[0-9A-Za-z]{16}\Z")

    def test_an_answer_says_what_it_is_about(self):
        status, found = posted(document())
        self.assertEqual((status, tuple(found)), (200, self.KEYS))
        wanted = {"addresser": "kijitora@example.org", "recipient": ["mikeneko@example.jp"], "remoteaddr": "127.0.0.1"}
        wanted.update(remoteport=50320, useragent=None, referer=None)
        wanted["timestamp"] = {"datetime": time.ctime(NOW), "unixtime": "1388741758"}
        self.assertEqual({key: found[key] for key in wanted}, wanted)
        self.assertEqual(len(self.logged()), 1)
        found = posted(document(body=""))[1]
        self.assertEqual((found["addresser"], found["response"][0]["rcpt"]), ("kijitora@example.org", None))

    def test_refused_recipients_do_not_stop_the_others(self):
        force = settings(recipients={"domainpart": ["example.jp"]})
        given = ["no", "a@example.jp", "ねこ@faß.de", "b@example.org"]
        status, found = posted(document(rcpt=given), force)
        self.assertEqual((status, found["recipient"]), (207, ["a@example.jp"]))
        self.assertEqual([item["rcpt"] for item in found["response"]], given)
        wanted = [(1, "5.1.5", None), (0, "2.0.0", "Discard"), (1, "5.1.5", None), (1, "5.7.1", None)]
        self.assertEqual([(item["error"], item["dsn"], item["mailer"]) for item in found["response"]], wanted)
        status, found = posted(document(rcpt=given[2:]), force)
        self.assertEqual((status, found["recipient"], len(found["response"])), (400, [], 2))
        status, found = posted(document(rcpt=given, body=""), force)
        self.assertEqual((status, len(found["response"]), found["response"][0]["dsn"]), (400, 1, "5.6.0"))

    def test_the_same_recipient_counts_once(self):
        for given, wanted in (
            (["a@example.jp"] * 9, ["a@example.jp"]),
            (["a@example.jp", "a@EXAMPLE.JP", "b@example.jp"], ["a@example.jp", "b@example.jp"]),
            (["a@example.jp", "A@example.jp"], ["a@example.jp", "A@example.jp"]),
            (["a@例え.jp", "a@xn--r8jz45g.jp"], ["a@例え.jp"]),
        ):
            with self.subTest(given):
                status, found = posted(document(rcpt=given))
                self.assertEqual((status, found["recipient"]), (200, wanted))
                self.assertEqual([item["rcpt"] for item in found["response"]], wanted)

    def test_what_passes(self):
        many = [f"r{i}@example.jp" for i in range(40)]
        networks = {"relayhosts": {"relayhosts": ["192.0.2.0/24", "2001:db8::/32"]}}
        for submission, force, *client in (
            *[(document(ehlo=name), {}) for name in (
                "localhost", "[192.0.2.1]", "[IPv6:2001:db8::1]", "192.0.2.1", None)],
            (document(header={"x-haineko-loop": PASSED[:25]}), {}),
            (finished("X-Haineko-Loop: r1\n\nx", rcpt="a@b.jp"), {}),
            (document(rcpt=many), {"smtpd": {"hostname": NAME, "max_rcpts_per_message": 0}}),
            (document(rcpt=many[:4]), {}),
            (document(body="x" * 100000), {"smtpd": {"hostname": NAME, "max_message_size": 0}}),
            (document(body="\n"), {}), (document(mail='"a b"@example.jp', rcpt=['"c\\"d"@example.jp']), {}),
            (document(mail="a@例え.jp", rcpt=["b@例え.jp"]), {}), (document(), {}, "::1"),
            (document(), {}, "::ffff:127.0.0.1"), (document(), networks, "192.0.2.200"),
            (document(), networks, "2001:db8:1::1"),
        ):  # fmt: skip
            with self.subTest(str(submission)[:200], force=force, client=client):
                self.assertEqual(posted(submission, settings(**force), *client)[0], 200)

    def test_a_refusal_names_the_limit_or_the_setting(self):
        many = [f"r{i}@example.jp" for i in range(5)]
        for submission, force, line in (
            (document(rcpt=many), {}, "5 recipients exceed smtpd.max_rcpts_per_message (4)"),
            (document(rcpt=["a@example.jp"] * 3 + many), {}, "6 recipients exceed smtpd.max_rcpts_per_message (4)"),
            (document(rcpt=many * 3000), {}, "15000 recipients exceed smtpd.max_rcpts_per_message (4)"),
            (document(mail=""), {}, "mail (the envelope sender) is required"),
            (document(mail="A <a@x.jp>"), {}, 'expected a bare address, got "A <a@x.jp>"; did you mean "a@x.jp"?'),
            (document(mail="a"), {}, 'expected a bare address like "user@example.org"'),
            (document(header={"x-mc-tags": "a"}), {}, "X-Mc-Tags: the route must have provider_headers to send it"),
            (document(send_at=int(NOW) + 30 * 86400 + 2), {}, "send_at: expected a time at most 30 days ahead"),
            (document(rcpt=None), {}, "rcpt is required"),
            (document(ehlo="a b"), {}, "ehlo: expected a domain or an address literal"),
            (document(), {"recipients": {}}, "neither recipients.domainpart nor recipients.recipients has it"),
            (document(body=""), {}, "body or html is required"),
            (finished("", rcpt="b@example.jp"), {}, "raw: it has no header fields"),
            (document(header={"subject": ""}), {}, "header.subject is required"),
            (document(), {"smtpd": {"hostname": NAME, "max_message_size": 99}},
                " octets exceed smtpd.max_message_size (99)"),
        ):  # fmt: skip
            with self.subTest(line):
                self.logged()
                self.assertIn(line, posted(submission, settings(**force))[1]["response"][0]["message"][1])
                self.assertIn(f"; {line}" if line[0] != " " else line, self.logged()[0])

    def test_a_client_behind_an_unknown_proxy_is_not_on_this_machine(self):
        trusting = {"httpd": {"trusted_proxies": ["127.0.0.1"]}}
        monitors = {"httpd": {"trusted_proxies": ["127.0.0.1"], "monitors": ["192.0.2.0/24", "127.0.0.1"]}}
        client, this_one = {"X-Forwarded-For": "192.0.2.7"}, {"X-Forwarded-For": "127.0.0.1"}
        untrusted = "from 127.0.0.1, which is not in httpd.trusted_proxies"
        this = "a forwarded request is not from this machine"
        for path, force, headers, status, line in (
            ("/submit", {}, client, 403, untrusted), ("/submit", {}, {"Forwarded": "for=127.0.0.1"}, 403, untrusted),
            ("/submit", {}, {"via": "1.1 nginx"}, 403, untrusted),
            ("/submit", {}, {"X-Real-IP": "127.0.0.1"}, 403, untrusted),
            ("/submit", {"relayhosts": {"relayhosts": ["192.0.2.0/24"]}}, client, 403,
                "127.0.0.1 is not in relayhosts"),
            ("/submit", {"relayhosts": {"open-relay": 1}}, client, 200, ""),
            ("/submit", trusting, {"Via": "1.1 nginx"}, 403, "Via from 127.0.0.1 without X-Forwarded-For"),
            ("/submit", trusting, client, 403, "192.0.2.7 is not in relayhosts.relayhosts"), ("/conf", {}, {}, 200, ""),
            ("/conf", {}, client, 403, untrusted), ("/conf", {}, this_one, 403, untrusted),
            ("/conf", trusting, this_one, 403, this),
            ("/conf", trusting, {**this_one, "Host": "evil.example"}, 403, this),
            ("/conf", trusting, client, 403, "192.0.2.7 is not in httpd.monitors"),
            ("/conf", monitors, client, 200, ""),
            ("/conf", monitors, {**client, "Host": "evil.example"}, 403, "Host: expected an address or smtpd.hostname"),
            ("/queue", {}, client, 403, untrusted), ("/queue/abc", {}, client, 403, untrusted),
        ):  # fmt: skip
            with self.subTest(path, **headers, force=force):
                self.logged()
                host, *lines = [f"{name}: {value}" for name, value in {"Host": "x", **headers}.items()]
                octets = post(None, *lines) if path == "/submit" else get(path, *lines, host=host[6:])
                found, answer = over_http(octets, settings(**force))
                self.assertEqual(found, status)
                if line:
                    self.assertIn(line, answer["response"][0]["message"][1])
                    self.assertIn(line, self.logged()[-1])

    def test_the_size_is_that_of_the_finished_message(self):
        for submission in (document(), document(attachments=[file("a.bin", b"x" * 30000)])):
            size = len(composed(submission))
            for limit, status in ((size, 200), (size - 1, 413)):
                with self.subTest(limit):
                    force = settings(smtpd={"hostname": NAME, "max_message_size": limit})
                    self.assertEqual(posted(submission, force)[0], status)


# ======================================================================================================================
# 7. Messages
# ======================================================================================================================


def composed(submission, client: str = "127.0.0.1", to: str = "mikeneko@example.jp") -> bytes:
    """The octets of the message of a submission."""
    return haineko.compose(understood(submission), "Q" * 16, haineko.parse_ip(client), NAME, NOW).copy(to, 1)


# {(row, cell): character} of the 94 rows of 94 cells, in the order in which code page 932 counts them
CELLS = itertools.product([*range(0x81, 0xA0), *range(0xE0, 0xF0)], [*range(0x40, 0x7F), *range(0x80, 0xFD)])
CELLS = {divmod(i, 94): bytes(code).decode("cp932", "replace") for i, code in enumerate(CELLS)}
CELLS = {place: text for place, text in CELLS.items() if "\ufffd" not in text}


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


def text_in(part) -> str:
    """What a part of text says as a reader shows it, by email's reading of the transfer encoding; with LF."""
    octets, charset = part.get_payload(decode=True), part.get_content_charset()
    return (as_in_jis(octets) if charset == "iso-2022-jp" else octets.decode(charset)).replace("\r\n", "\n")


def files_in(message) -> list:
    """[(name, type, octets, disposition, content id)] of the parts that are files."""
    parts = [part for part in message.walk() if part.get_content_disposition()]
    octets = [p.get_payload(0).as_bytes() if p.is_multipart() else p.get_payload(decode=True) for p in parts]
    return [
        (part.get_filename(), part.get_content_type(), found, part.get_content_disposition(), part.get("content-id"))
        for part, found in zip(parts, octets)
    ]


def ends(text: str) -> str:
    """Text as it comes out: LF, one behind the last line."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text if text.endswith("\n") else text + "\n"


# {text: what it becomes in ISO-2022-JP where that is another}
JAPANESE = {
    "謹賀新年、あとでお年玉を貰いに行きます": "", "ﾊﾝｶｸｶﾅ": "ハンカクカナ", "ｶﾞｷﾞｸﾞﾊﾟﾋﾟﾌﾟｳﾞ": "ガギグパピプヴ", "ﾞﾟ": "゛゜",
    "｡｢｣､･ｰ": "。「」、・ー", "①②⑳ⅠⅩ㍉㌔㈱№℡㍻": "", "髙﨑ⅰⅹ￤＂纊": "", "～∥－￠￡￢―": "", "〜‖−¢£¬—": "～∥－￠￡￢―",
    "Re: [neko:123] 髙橋様 (ｶｯｺ) ～①～": "Re: [neko:123] 髙橋様 (カッコ) ～①～", "＼￥\\ ~": "",
}  # fmt: skip
EVERYWHERE = [
    "Nyaaaa", "=?UTF-8?B?44Kt?=", 'say "x\\y", (or) <not>; a@b', "  two  before, three   within, one after ", "a\tb",
    "Grüße, señor Müller", "Γάτα", "😺 and a family 👨‍👩‍👧", "か\u3099 e\u0301", "a\x01\x1b[2J\x7f\x85b",
    "a\u2028b\u2029c\x0bd\x0ce", "①ü", "meow " * 100 + "end", "m" * 900, "m" * 3000, "猫" * 500, "😺" * 300,
]  # fmt: skip
BODIES = [
    "a", "a\n", "a\r\nb\r\n", "a\rb\r", "a\r\r\nb\n\rc", "\n\n\n", ".\n..\n.a\n", "From here\n>From there\n",
    "a \n \n\tb\t\n", "a=b=20=\n", "a\0b\n", "x" * 5000, ("y" * 998 + "\n") * 3, "a" * 78 + "\n" + "b" * 79,
    "Subject: x\n\n", "猫" * 3000,
]  # fmt: skip
CHARSETS = [
    "UTF-8", "ISO-2022-JP", "ISO-8859-1", "US-ASCII", "Shift_JIS", "EUC-JP", "windows-1252", "gb18030", "KOI8-R",
]  # fmt: skip


class Composed(Quiet):
    ORDER = ("Received", "From", "Sender", "To", "Reply-To", "Subject", "Date", "Message-Id", "X-Haineko-Loop",
             "MIME-Version", "Content-Type", "Content-Transfer-Encoding")  # fmt: skip

    def check_form(self, octets: bytes, order: bool = True) -> None:
        """What holds for every message, whatever is in it."""
        self.assertTrue(octets.endswith(b"\r\n"))
        self.assertFalse(re.search(rb"\r(?!\n)|(?<!\r)\n|\0", octets))
        self.assertTrue(octets.isascii())
        self.assertLessEqual(max(map(len, octets.split(b"\r\n"))), 998)
        for line in octets.partition(b"\r\n\r\n")[0].split(b"\r\n"):
            self.assertTrue(line.strip(), "a line of white space alone, RFC 5322 3.2.2")
            self.assertFalse(re.search(rb"[^\t\x20-\x7e]", line))
            if len(line) > 78:  # only what can't be folded
                self.assertLessEqual(len(line.split()), 2, line)
            for word in re.findall(rb"=\?[^?\s]+\?[BQ]\?[^?\s]*\?=", line):
                self.assertLessEqual(len(word), 75)
                self.assertLessEqual(len(line), max(76, len(word) + 1))
        names = [name for name, _ in raw_fields(octets)]
        if order:
            self.assertEqual(names, [name for name in self.ORDER if name in names])
            self.assertEqual(set(self.ORDER) - set(names) - {"Sender", "Reply-To"}, set())


class Messages(Composed):
    maxDiff = None

    def test_headers_and_their_order(self):
        header = {"from": "A <a@example.com>", "replyto": "B <b@example.com>", "x-haineko-loop": ["r1.example"]}
        octets = composed(document(ehlo="client.example", header=header), "192.0.2.1")
        self.check_form(octets)
        date = haineko.rfc5322_date(int(NOW))
        self.assertEqual(raw_fields(octets), [
            ("Received", f"from client.example ([192.0.2.1])\r\n\tby {NAME} with HTTP id {'Q' * 16};\r\n\t{date}"),
            ("From", "A <a@example.com>"), ("Sender", "kijitora@example.org"), ("To", "mikeneko@example.jp"),
            ("Reply-To", "B <b@example.com>"), ("Subject", "Nyaaaa"), ("Date", date),
            ("Message-Id", f"<{'Q' * 16}.1@{NAME}>"), ("X-Haineko-Loop", f"r1.example, {NAME}"),
            ("MIME-Version", "1.0"), ("Content-Type", "text/plain; charset=UTF-8"),
            ("Content-Transfer-Encoding", "7bit"),
        ])  # fmt: skip
        self.assertEqual(octets.partition(b"\r\n\r\n")[2], b"Meow.\r\n")
        self.assertEqual(email.utils.parsedate_to_datetime(date).timestamp(), NOW)
        header = {
            "X-b": ["1", "2"], "references": "<r@x>", "in_reply_to": "<i@x>", "ListId": "cats <l.example.org>",
            "ORGANIZATION": "Cats", "to": "a@example.jp", "cc": "b@example.jp", "reply-to": "c@example.jp",
        }  # fmt: skip
        octets = composed(document(mail="other@example.org", html="x", header=header))
        names = "Received From Sender To Cc Reply-To Subject Date Message-Id X-B X-B References In-Reply-To List-Id"
        names += " Organization X-Haineko-Loop MIME-Version Content-Type"
        self.assertEqual(" ".join(name for name, _ in raw_fields(octets)), names)

    def test_received_names_the_client(self):
        for ehlo, client, wanted in (
            (None, "192.0.2.1", "from [192.0.2.1] ([192.0.2.1])"),
            (None, "2001:db8::1", "from [IPv6:2001:db8::1] ([IPv6:2001:db8::1])"),
            ("[127.0.0.1]", "127.0.0.1", "from [127.0.0.1] ([127.0.0.1])"),
            ("neko", "::ffff:192.0.2.1", "from neko ([192.0.2.1])"),
        ):
            with self.subTest(wanted):
                octets = composed(document(ehlo=ehlo), client)
                self.check_form(octets)
                self.assertTrue(raw_fields(octets)[0][1].startswith(wanted + "\r\n"))

    def test_from_and_sender_only_where_that_is_another(self):
        sender = "kijitora@example.org"
        for charset, given, author, wanted in (
            ("UTF-8", None, sender, None),
            ("UTF-8", f"K <{sender}>", f"K <{sender}>", None),
            ("UTF-8", "K <kijitora@EXAMPLE.org>", "K <kijitora@EXAMPLE.org>", None),
            ("UTF-8", "K <Kijitora@example.org>", "K <Kijitora@example.org>", sender),
            ("UTF-8", "k@example.com", "k@example.com", sender),
            ("UTF-8", f"{sender}, b@example.com", f"{sender}, b@example.com", sender),
            ("UTF-8", f"キジトラ <{sender}>", f"=?UTF-8?B?44Kt44K444OI44Op?= <{sender}>", None),
            ("ISO-2022-JP", "[a:1] ｶ <a@b.jp>", "=?ISO-2022-JP?B?W2E6MV0gGyRCJSsbKEI=?= <a@b.jp>", sender),
        ):
            with self.subTest(given):
                octets = composed(document(header={"from": given, "charset": charset}))
                self.check_form(octets)
                found = dict(raw_fields(octets))
                self.assertEqual((found["From"], found.get("Sender")), (author, wanted))

    def test_texts_come_out_as_they_were_meant(self):
        """In a subject, in names and in a body, as a reader shows them and as email does."""
        for text, charset in itertools.product([*BODIES, *EVERYWHERE, *JAPANESE], CHARSETS):
            with self.subTest(text[:40], charset=charset):
                japanese, header = charset == "ISO-2022-JP" and text in JAPANESE, {"charset": charset}
                meant, body = (japanese and JAPANESE[text]) or text, f"{text}\n{text}" if text in JAPANESE else text
                if not re.search("[\r\n\0]", text):
                    quoted = '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
                    mailboxes = f"{quoted} <a@example.jp>, b@example.jp, {quoted} <c@example.jp>"
                    header.update({"from": mailboxes, "replyto": mailboxes, "subject": text})
                octets = composed(document(body=body, header=header))
                self.check_form(octets)
                found, seen = dict(raw_fields(octets)), parsed(octets)
                self.assertEqual(text_in(seen), ends(body.replace(text, meant)))
                if "subject" in header:
                    self.assertEqual(unfolded(found["Subject"]), meant)
                    wanted = [(meant.strip(), "a@example.jp"), ("", "b@example.jp"), (meant.strip(), "c@example.jp")]
                    for name in ("From", "Reply-To"):
                        names = email.utils.getaddresses([re.sub(r"\r\n(?=[ \t])", "", found[name])])
                        self.assertEqual([(unfolded(shown), address) for shown, address in names], wanted)
                    # email has its own mind about the others
                    if charset == "UTF-8" and not re.search("[\0-\x1f\x7f\x85\u2028\u2029]|=[?]|^ | $", text):
                        self.assertEqual((seen["Subject"], seen.defects), (text, []))
                if japanese:
                    self.assertEqual(found["Content-Type"], "text/plain; charset=ISO-2022-JP")
                    self.assertEqual(found["Content-Transfer-Encoding"], "7bit")
                    for line in octets.partition(b"\r\n\r\n")[2].split(b"\r\n"):
                        as_in_jis(line)  # each line begins and ends in ASCII, RFC 1468

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
        for charset, text in (
            ("ISO-2022-JP", "한국어"), ("ISO-2022-JP", "ü"), ("ISO-2022-JP", "😺"), ("ISO-2022-JP", "か\u3099"),
            ("ISO-2022-JP", "猫\x1b$B"), ("ISO-8859-1", "€"), ("US-ASCII", "é"), ("Shift_JIS", "ü"), ("KOI8-R", "猫"),
        ):  # fmt: skip
            for change in ({"body": text}, {"header": {"subject": text}}, {"header": {"from": f"{text} <a@b.jp>"}}):
                with self.subTest(charset, text=text, change=change):
                    submission = document(**change)
                    submission["header"]["charset"] = charset
                    octets = composed(submission)
                    self.check_form(octets)
                    found = dict(raw_fields(octets))
                    self.assertEqual(found["Content-Type"], "text/plain; charset=UTF-8")
                    self.assertNotIn(f"=?{charset}?", octets.decode())
                    self.assertIn(text, unfolded(found["Subject"]) + unfolded(found["From"]) + text_in(parsed(octets)))

    def test_transfer_encodings(self):
        for text, charset, wanted in (
            ("Meow.\n", "UTF-8", "7bit"), ("a" * 78, "UTF-8", "7bit"), ("a" * 79, "UTF-8", "quoted-printable"),
            ("b\n" + "a" * 78 + "\n", "US-ASCII", "7bit"), ("b\n" + "a" * 79 + "\n", "US-ASCII", "quoted-printable"),
            ("a\tb", "UTF-8", "7bit"), ("a\x01b", "UTF-8", "quoted-printable"),
            ("Grüße, " + "meow " * 9, "UTF-8", "quoted-printable"), ("猫の手も借りたい", "UTF-8", "base64"),
            ("Grüße an alle Katzen", "ISO-8859-1", "quoted-printable"), ("猫の手も借りたい", "ISO-2022-JP", "7bit"),
            ("猫" * 400, "ISO-2022-JP", "7bit"), ("猫" * 500, "ISO-2022-JP", "quoted-printable"),
            ("猫の手も借りたい", "Shift_JIS", "base64"),
        ):  # fmt: skip
            with self.subTest(text[:20], charset=charset):
                octets = composed(document(body=text, header={"charset": charset}))
                self.check_form(octets)
                self.assertEqual(dict(raw_fields(octets))["Content-Transfer-Encoding"], wanted)

    def test_the_shorter_encoding_is_taken(self):
        for share in range(3, 61, 3):
            text = ("é" * share + "e" * (60 - share) + "\r\n") * 20
            body = composed(document(body=text)).partition(b"\r\n\r\n")[2]
            quoted, base = len(binascii.b2a_qp(text.encode())), len(base64.encodebytes(text.encode())) * 78 // 77
            with self.subTest(share, quoted=quoted, base64=base):
                self.assertLess(len(body), min(quoted, base) * 1.15)

    def test_large_messages_take_time_in_proportion(self):
        for submission in (
            document(body=("a" * 900 + "\n") * 4000, header={"charset": "ISO-2022-JP"}), document(body="a" * 4000000),
            document(body="é" * 2000000), document(header={"subject": "é" * 1000000}),
        ):  # fmt: skip
            with self.subTest(body=submission["body"][:9]):
                began = time.process_time()
                composed(submission)
                self.assertLess(time.process_time() - began, 2)

    def test_nothing_reaches_a_header_that_was_not_meant_to(self):
        evil = [
            "\r\nX-Evil: 1", "\nX-Evil: 1", "\rX-Evil: 1", "\r\n\r\nX-Evil: 1", "\0X-Evil: 1", "\r\n X-Evil: 1",
            "\x0bX-Evil: 1", "\x0c\x1c\x1d\x1e\x85\u2028\u2029X-Evil: 1", "\r\n.\r\nMAIL FROM:<x-evil@x>",
        ]  # fmt: skip
        places = [
            (lambda text: document(ehlo=text), "client.example"),
            (lambda text: document(ehlo=f"[IPv6:{text}]"), "fe80::1%a"),
            (lambda text: document(mail=text), "kijitora@example.org"),
            (lambda text: document(mail=f'"{text}"@example.org'), "kiji tora"),
            (lambda text: document(rcpt=[text]), "mikeneko@example.jp"),
            (lambda text: document(rcpt=[f'"{text}"@example.jp']), "mike neko"),
            (lambda text: document(rcpt=[f"a@[IPv6:{text}]"]), "fe80::1%a"),
            (lambda text: document(header={"from": text}), "K <kijitora@example.org>"),
            (lambda text: document(header={"from": f'"{text}" <kijitora@example.org>'}), "Kijitora"),
            (lambda text: document(header={"replyto": text}), "K <kijitora@example.org>"),
            (lambda text: document(header={"subject": text}), "Nyaaaa"),
            (lambda text: document(header={"subject": text, "charset": "ISO-2022-JP"}), "ﾆｬｱ"),
            (lambda text: document(header={"charset": text}), "UTF-8"),
            (lambda text: document(header={"x-haineko-loop": [text]}), "r1.example"),
            (lambda text: document(header={"x-haineko-loop": text}), "r1.example"),
            (lambda text: document(body=text), "Meow."),
        ]
        force, accepted = settings(), 0
        for (make, good), payload in itertools.product(places, evil):
            for text in (payload + good, good[:3] + payload + good[3:], good + payload):
                submission = make(text)
                with self.subTest(submission):
                    status, _ = posted(submission, force)
                    self.assertIn(status, (200, 400))
                    if status == 400:
                        continue
                    accepted += 1
                    octets = composed(submission, to=submission["rcpt"][0])
                    self.check_form(octets)
                    self.assertIsNone(email.message_from_bytes(octets)["X-Evil"])
        self.assertGreater(accepted, 40)  # not the bodies alone

    def test_a_finished_message_is_taken_apart(self):
        for octets, fields_, body in (
            (b"A: 1\nB: 2\n\nbody\n", [("a", b"A: 1\n"), ("b", b"B: 2\n")], b"body\n"),
            (b"A: 1\r\n 2\r\nB:3\r\n\r\nx\r\ny", [("a", b"A: 1\n 2\n"), ("b", b"B:3\n")], b"x\ny"),
            (b"From x Mon\nA: 1\n\nb\n", [("a", b"A: 1\n")], b"b\n"),
            (b"A: 1\n", [("a", b"A: 1\n")], b""),
            (b"A: 1", [("a", b"A: 1\n")], b""),
            (b"\nbody", [], b"body"),
            (b"no header here\n", [], b"no header here\n"),
            (b"A: 1\n\na\rb\r\nc", [("a", b"A: 1\n")], b"a\nb\nc"),
            (b"", [], b""),
        ):
            with self.subTest(octets):
                self.assertEqual(haineko.parse_message(octets), (fields_, body))
        for octets in (b"A: 1\rB: 2\n\nx", b"A: 1\0\n\nx", b"A: 1\n 2\r3\n\n"):
            with self.subTest(octets), self.assertRaises(ValueError):
                haineko.parse_message(octets)

    def finished(self, octets: bytes, **more) -> dict:
        """A submission of a finished message."""
        return {"mail": "s@example.org", "raw": {"base64": base64.b64encode(octets).decode()}, **more}

    def test_recipients_of_a_finished_message(self):
        octets = b'To: A <a@example.jp>,\n "B, C" <b@example.jp>\nCc: c@example.jp\nBCC: d@example.jp\n'
        found = understood(self.finished(octets)).rcpt
        self.assertEqual(found, ("a@example.jp", "b@example.jp", "c@example.jp", "d@example.jp"))

    def test_a_finished_message_gets_what_it_lacks(self):
        found = dict(raw_fields(composed(self.finished(b"To: a@b.jp\nBcc: c@b.jp\nSubject: a\n b\n\nx"))))
        self.assertEqual(" ".join(found), "Received To Subject From Date Message-Id X-Haineko-Loop")
        self.assertEqual((found["Subject"], found["From"]), ("a\r\n b", "<s@example.org>"))

    def test_a_finished_message_without_mime(self):
        long = b"x" * 2000 + b"\n"
        for body, charset in (
            ("ねこ\n".encode(), "utf-8"), (b"\xe9\n", "unknown-8bit"), (long, "us-ascii"),
            (b"x" * 998 + b"\n\f\n", None), (b"\x1b$B$M$3\x1b(B\n", None), (b"\x1b$B$M$3\x1b(B" + long, "iso-2022-jp"),
        ):  # fmt: skip
            with self.subTest(body[:20]):
                octets = composed(self.finished(b"To: a@example.jp\n\n" + body))
                self.assertEqual(octets.isascii(), body.isascii())
                found = email.message_from_bytes(octets)
                self.assertEqual(found.get_content_charset(), charset)
                self.assertEqual(found.get_payload(decode=True), body.replace(b"\n", b"\r\n"))

    def test_lines_too_long_of_a_finished_message(self):
        with self.assertRaisesRegex(ValueError, "998"):
            composed(self.finished(b"To: a@b.jp\nA: " + b"x" * 998 + b"\n\nb\n"))
        for line in (
            b"A: " + b"x" * 995, b"A: " + b"x" * 997, b"A: " + b"x " * 5000,
            b"A:" + b" " * 900 + b"x\t" * 5000 + b"\n " + b"y" * 997,
        ):  # fmt: skip
            octets = composed(self.finished(b"To: a@b.jp\n" + line + b"\n\nb\n"))
            self.assertLess(max(map(len, octets.split(b"\r\n"))), 999)
            self.assertIn(line.replace(b"\n", b""), octets.replace(b"\r\n", b""))
            self.assertEqual(b"\r\n" + line + b"\r\n" in octets, len(line) == 998)

    def test_a_message_in_seven_bits(self):
        text = "ねこ\r\nFrom here\r\n.\r\n" + "x" * 200 + "\r\n"
        head = b"From: a@example.jp\r\nSubject: " + b"s " * 60 + b"\r\nMIME-Version: 1.0\r\n"
        one = b"Content-Type: text/plain; charset=UTF-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\n" + text.encode()
        same = b"Content-Type: text/plain\r\n\r\nFrom here\r\n.\r\n--XX\r\n"
        image = b"Content-Type: image/png\r\nContent-Transfer-Encoding: base64\r\n\r\nAAAA\r\n--XX--\r\n"
        two = b"Content-Type: multipart/mixed; boundary=XX\r\nContent-Transfer-Encoding: 8bit\r\n\r\n--XX\r\n" + same
        two += one + b"\r\n--XX\r\n" + image
        for octets, kept in ((head + one, b""), (head + two, same), (head + two, image)):
            with self.subTest(kept):
                found = haineko.downgrade_8bit(octets)
                self.assertFalse(re.search(rb"\r(?!\n)|(?<!\r)\n|[\x80-\xff]|8bit", found))
                self.assertIn(b"Subject: " + b"s " * 59 + b"s", re.sub(rb"\r\n(?=[ \t])", b"", found))
                part = email.message_from_bytes(found)
                part = part.get_payload(1) if part.is_multipart() else part
                self.assertEqual(part.get_payload(decode=True).decode().splitlines(), text.splitlines())
                self.assertIn(kept, found)  # a part of seven bits stays as it is

    def test_octets_of_no_known_charset_in_seven_bits(self):
        codings = (b"", b"Content-Transfer-Encoding: 8bit\r\n", b"Content-Transfer-Encoding: binary\r\n")
        kinds = (b"text/plain", b"text/plain; charset=bogus", b"image/png", b"text/plain; charset=latin1")
        for kind, coding in itertools.product(kinds, codings):
            with self.subTest(kind, coding=coding):
                head = b"From: a@example.jp\r\nMIME-Version: 1.0\r\nContent-Type: " + kind + b"\r\n" + coding
                found = haineko.downgrade_8bit(head + b"\r\nFrom caf\xe9 \xff\r\n")
                self.assertTrue(found.isascii())
                self.assertEqual(email.message_from_bytes(found).get_payload(decode=True), b"From caf\xe9 \xff\r\n")


PDF, OCTETS = "application/pdf", "application/octet-stream"
HTML = '<p>Gr&uuml;&szlig;e <b>猫</b></p><img src="cid:logo">'
LINKED, OF_HTML = HTML.replace("cid:", "https://x/"), "Grüße 猫\n"


def shape(part) -> str:
    """A message's structure in a line: alternative(plain, related(html, png))."""
    inner = ", ".join(shape(item) for item in part.iter_parts()) if part.is_multipart() else ""
    return part.get_content_subtype() + (f"({inner})" if inner else "")


class Mail:
    """A row of the corpus: what it is, changes to a submission, and what a reader finds beyond them."""

    def __init__(self, what: str, shape_: str = "plain", plain: str | None = None, files: str = "", **changes) -> None:
        self.what, self.shape, self.submission = what, shape_, document(**changes)
        self.plain = ends(self.submission.get("body", "")) if plain is None else plain
        self.files = [tuple(text.split(" ")) for text in files.split(", ") if text]  # (type, disposition) of each file


NAMED = {
    "a b.pdf": PDF, 'say "x".pdf': PDF, "a;b=c.pdf": PDF, "100%.pdf": PDF, "it's.pdf": PDF, "=?UTF-8?B?44Kt?=.pdf": PDF,
    "請求書.pdf": PDF, "請求書　2024年.pdf": PDF, "Rechnung für Müller.pdf": PDF, "😺.png": "image/png",
    "猫" * 90 + ".pdf": PDF, "x" * 251 + ".pdf": PDF, "ｶﾞ①.pdf": PDF, "README": OCTETS, "a.unheard-of": OCTETS,
    "a.tar.gz": "application/gzip", "a.TXT": "text/plain", "b.csv": "text/csv", ".profile": OCTETS, "mail.eml": OCTETS,
    "a.docx": haineko.EXTRA_MEDIA_TYPES[".docx"], "data:text,x.png": "image/png", "a.pdf ": PDF,
    "👨‍👩‍👧.jpg": "image/jpeg",
}  # fmt: skip
BOTH, PICTURE = "alternative(plain, html)", "alternative(plain, related(html, png))"
AS_PDF, RECEIPT = f"{PDF} attachment", f"image/png inline, {PDF} attachment"
CORPUS = [
    Mail("text"),
    Mail("text in Japanese", body="あとで\r\nお年玉\n"),
    Mail("HTML beside text", BOTH, html="<p>x</p>", body="other words"),
    Mail("HTML alone", BOTH, OF_HTML, html=LINKED, body=None),
    Mail("HTML alone, body empty", BOTH, OF_HTML, html=LINKED, body=""),
    Mail("HTML that says nothing", BOTH, "\n", html="<p></p>", body=None),
    Mail("HTML with long lines", BOTH, html="<p>" + "x" * 5000 + "</p>"),
    Mail("HTML in ISO-2022-JP", BOTH, html="<p>髙①ガ～</p>", header={"charset": "ISO-2022-JP"}),
    Mail("HTML in ISO-8859-1", BOTH, html="<p>für</p>", header={"charset": "ISO-8859-1"}),
    Mail("HTML that the charset can't hold", BOTH, html="猫", header={"charset": "ISO-8859-1"}),
    Mail("lines with dots and From", BOTH, body=".\n..\nFrom me\n.", html=".\nFrom me\n.\n--x"),
    Mail("HTML with every line end", BOTH, html="a\rb\nc\r\nd\n\n", body="a\rb\nc\r\nd\n\n"),
    Mail("one attachment, not in a list", "mixed(plain, pdf)", None, AS_PDF, attachments=file("a.pdf")),
    Mail("no attachments", attachments=[]),
    Mail("an empty file", "mixed(plain, pdf)", None, AS_PDF, attachments=[file("a.pdf", b"")]),
    Mail("all octets", "mixed(plain, octet-stream)", None, f"{OCTETS} attachment", attachments=[file("a", ALL_OCTETS)]),
    Mail("a file of many lines", "mixed(plain, plain)", None, "text/plain attachment",
         attachments=[file("a.txt", b"a\nb\r\nc\rd\0 \t\n.\n" * 9999)]),
    Mail("a file in Latin-1", "mixed(plain, csv)", None, "text/csv attachment",
         attachments=[file("a.csv", "Grüße\n".encode("latin-1"))]),
    Mail("three files", "mixed(plain, pdf, pdf, png)", None, f"{AS_PDF}, {AS_PDF}, image/png attachment",
         attachments=[file("a.pdf"), file("a.pdf"), file("b.png", PNG)]),
    Mail("a file without a name", "mixed(plain, octet-stream)", None, f"{OCTETS} attachment", attachments=[file()]),
    Mail("a file with a type", "mixed(plain, x-cat)", None, "application/x-cat attachment",
         attachments=[file("a.pdf", type="Application/X-Cat")]),
    Mail("a type with parameters", "mixed(plain, calendar)", None, "text/calendar attachment",
         attachments=[file("a.ics", type='text/calendar; charset=utf-8; method="REQUEST" ;name=x.ics')]),
    Mail("shown in line or not", "mixed(plain, png, png)", None, "image/png inline, image/png attachment",
         attachments=[file("a.png", PNG, inline=True), file("a.png", PNG, inline=0)]),
    Mail("base64 in lines", "mixed(plain, pdf)", None, AS_PDF,
         attachments=[{"filename": "a.pdf", "content": "JVBE\r\nRi0x\nLjQg AA0K"}]),
    Mail("a picture in HTML", PICTURE, None, "image/png inline", html=HTML,
         attachments=[file("l.png", PNG, cid="logo")]),
    Mail("a cid in brackets", PICTURE, None, "image/png inline", html=HTML.replace("cid:logo", "cid:logo%40x"),
         attachments=[file("l.png", PNG, cid="<logo@x>")]),
    Mail("a cid without HTML", "mixed(plain, png)", None, "image/png inline",
         attachments=[file("l.png", PNG, cid="logo")]),
    Mail("two pictures in HTML", "alternative(plain, related(html, png, png))", None,
         "image/png inline, image/png inline", html=HTML + '<i style="background: url( CID:LOGO)">',
         attachments=[file("l.png", PNG, cid="logo"), file("m.png", PNG, cid="LOGO")]),
    Mail("a receipt", f"mixed({PICTURE}, pdf)", None, RECEIPT, html=HTML,
         attachments=[file("領収書.pdf"), file("logo.png", PNG, cid="logo")]),
    Mail("a receipt, HTML alone", f"mixed({PICTURE}, pdf)", OF_HTML, RECEIPT, body=None, html=HTML,
         attachments=[file("logo.png", PNG, cid="logo"), file("a.pdf")]),
    Mail("HTML and a file", f"mixed({BOTH}, pdf)", None, AS_PDF, html=LINKED, attachments=[file("a.pdf")]),
    Mail("a receipt in ISO-2022-JP", f"mixed({PICTURE}, pdf)", None, RECEIPT, html="<p>領収書<img src=cid:logo></p>",
         attachments=[file("領収書.pdf"), file("logo.png", PNG, cid="logo")],
         header={"charset": "iso-2022-jp", "subject": "領収書"}),
    Mail("a forwarded message", "mixed(plain, rfc822(plain))", None, "message/rfc822 attachment",
         attachments=[file("a.eml", b"From: a@b.example\nSubject: x\n\nMeow.\n", type="message/rfc822")]),
    *[Mail(f"a file called {name[:30]}", f"mixed(plain, {kind.partition('/')[2]})", None, f"{kind} attachment",
           attachments=[file(name)]) for name, kind in NAMED.items()],
    Mail("shown recipients", header={"to": "A <a@example.jp>, b@example.jp", "cc": ["c@example.jp"]}),
    Mail("shown recipients in Japanese", header={"to": ["猫 <a@example.jp>", '"B, C" <b@example.jp>'], "cc": None}),
    Mail("further fields", header={
        "Message-ID": "<1@example.org>", "in-reply-to": "<2@example.org>", "references": ["<2@x>", "<3@y>"],
        "date": "Fri, 03 Jan 2014 18:35:58 +0900", "organization": "猫の会", "X-Campaign": "spring",
        "x_long": "meow " * 99}),
    Mail("a comment like an encoded word", header={"comments": "=?UTF-8?B?44Kt?=", "Keywords": "a, b"}),
]  # fmt: skip


class Parts(Composed):
    maxDiff = None

    def test_the_corpus(self):
        for mail in CORPUS:
            with self.subTest(mail.what):
                octets = composed(mail.submission)
                self.check_form(octets, order=False)
                found = parsed(octets)
                self.assertEqual([part.defects for part in found.walk() if part.defects], [])
                self.assertEqual(shape(found), mail.shape)
                self.check_texts(mail, found)
                self.check_files(mail, found)
                self.check_fields(mail.submission["header"], found)

    def check_texts(self, mail: Mail, found) -> None:
        texts = [part for part in found.walk() if part.get_content_maintype() == "text"]
        texts = [part for part in texts if not part.get_content_disposition()][: 2 if "html" in mail.shape else 1]
        html = [ends(mail.submission["html"])] if "html" in mail.shape else []
        self.assertEqual([text_in(part) for part in texts], [mail.plain, *html])
        charset = mail.submission["header"].get("charset", "UTF-8").lower()
        self.assertEqual({p.get_content_charset() for p in texts}, {"utf-8" if "can't hold" in mail.what else charset})

    def check_files(self, mail: Mail, found) -> None:
        given = mail.submission.get("attachments", [])
        given = [given] if isinstance(given, dict) else given
        given = sorted(given, key=lambda item: not ("html" in mail.shape and item.get("cid")))
        self.assertEqual(len(given), len(mail.files))
        wanted = []
        for item, (kind, disposition) in zip(given, mail.files):
            name, cid = item.get("filename", "").strip() or None, item.get("cid") and f"<{item['cid'].strip('<>')}>"
            wanted.append((name, kind, base64.b64decode(item["content"]), disposition, cid))
        self.assertEqual(files_in(found), wanted)

    def check_fields(self, header: dict, found) -> None:
        self.assertEqual((found["subject"], found["mime-version"]), (header["subject"], "1.0"))
        for key in header.keys() - {"from", "subject", "charset", "to", "cc"}:
            given = " ".join(header[key]) if isinstance(header[key], list) else header[key]
            self.assertEqual(str(found[key.replace("_", "-")]), given)
        for name in ("to", "cc") if "to" in header else ():
            given = header.get(name) or []
            wanted = email.utils.getaddresses(given if isinstance(given, list) else [given])
            shown = [(item.display_name, item.addr_spec) for item in (found[name].addresses if found[name] else ())]
            self.assertEqual(shown, wanted)

    def test_email_is_not_imported(self):
        code = "import sys, haineko; s = haineko.parse_submission(sys.stdin.buffer.read()).submission;"
        code += " haineko.compose(s, 'Q' * 16, None, 'x', 0.0); print('email.policy' in sys.modules)"
        given = as_body(document(html="x", header={"to": "a@example.jp", "x-a": "猫"}))
        more = {"cwd": os.path.dirname(PROGRAM), "env": environment(), "capture_output": True}
        found = subprocess.run([sys.executable, "-c", code], input=given, check=True, **more)
        self.assertEqual(found.stdout.strip(), b"False", found.stderr)

    def test_keys_of_a_header_in_any_spelling(self):
        for key in ("replyto", "reply-to", "Reply_To", "REPLY-TO", "replyTo", "Reply-to"):
            with self.subTest(key):
                found = understood(document(header={key: "a@example.jp"}))
                self.assertEqual(found.header.replyto[0][1].addr_spec, "a@example.jp")
        for key, field in (
            ("X_Mailer", "X-Mailer: a"), ("x-ses-configuration-set", "X-Ses-Configuration-Set: a"),
            ("X-SMTPAPI", "X-SMTPAPI: a"), ("list_unsubscribe_post", "List-Unsubscribe-Post: a"),
            ("inReplyTo", "In-Reply-To: <a@b>"), ("FEEDBACK-ID", "Feedback-Id: a"),
        ):  # fmt: skip
            with self.subTest(key):
                octets = composed(document(header={key: field.split(": ")[1]}))
                self.assertIn(f"\r\n{field}\r\n".encode(), octets)
        found = understood(document(header={"Charset": "iso-2022-jp", "SUBJECT": "\x1b$BG-\x1b(B", "subject": None}))
        self.assertEqual((found.header.charset, found.header.subject), ("ISO-2022-JP", "猫"))

    def test_a_message_id_of_the_client_is_that_of_every_copy(self):
        message = haineko.compose(understood(document(header={"message-id": "<a@b>"})), "Q" * 16, None, NAME, NOW)
        for number, to in enumerate(("x@example.jp", "猫@example.jp"), 1):
            head = parsed(message.copy(to, number))
            self.assertEqual((head["message-id"], head.get_all("to")), ("<a@b>", [to]))

    def test_nothing_null_or_empty_makes_a_field(self):
        empty = {"to": "", "cc": [], "x-a": "", "date": "", "references": []}
        null = dict.fromkeys(("bcc", "x-b", "organization"))
        submission = document()
        submission["header"].update({**empty, **null})
        self.assertEqual(composed({**submission, "attachments": None}), composed(document()))


class DerivedText(unittest.TestCase):
    def test_text_of_html(self):
        for html, wanted in (
            ("a  <b>b</b>\n c", "a b c"), ("", ""), ("&lt;a&gt; &amp; &nbsp;&eacute;&#29483;", "<a> &  é猫"),
            ("a<br>b<br/>c<br><br>d", "a\nb\nc\n\nd"), ("<p>a</p><p>b</p>c<div>d</div>e", "a\n\nb\n\nc\nd\ne"),
            ("<h1>A</h1>b", "A\n\nb"), ("<ul><li>a</li><li> b</ul>c", "* a\n* b\n\nc"), ("a<hr>b", "a\n-----\nb"),
            ("<table><tr><td>Cat</td><td> 1 </td></tr><tr><th>Sum<th>2</table>", "Cat  1\nSum  2"),
            ('<a href="https://x/y">here</a>.', "here <https://x/y>."),
            ('<a href="https://x/y">https://x/y</a> <a href="mailto:a@b">a@b</a>', "https://x/y a@b"),
            ('<a href="#x">a</a> <a>b</a> <a href="javascript:x">c</a></a>', "a b c"),
            ('<a href="mailto:a@b">Write</a>', "Write <mailto:a@b>"),
            ('a <img src="cid:x" alt="Logo"> <img src="y"><img alt>', "a Logo"),
            ("<head><title>T</title><style>p {}</style></head><script>x<p></script><template>y</template>b", "b"),
            ("a<!-- b <p> -->c", "ac"), ("<pre>a\n  b\n</pre>c", "a\n  b\n\nc"), ("a<b>c<p", "ac"),
            ("a<!--[if mso]><p>b</p><![endif]-->c<![if !mso]>d<![endif]>e<!--[if !mso]><!-->f<!--<![endif]-->g",
             "acdefg"),  # for Outlook
            ("1 < 2 and 3 > 2 & so on", "1 < 2 and 3 > 2 & so on"), ("<p>　猫　猫</p>", "　猫　猫"),
            ("<!DOCTYPE html><html><body>a</body></html>", "a"),
            ("a<![CDATA[b]]>c<![x[y]]>d<![", "acd"),  # html.parser trips over these
        ):  # fmt: skip
            with self.subTest(html):
                self.assertEqual(haineko.html_to_text(html), wanted + "\n")

    def test_what_costs_much(self):
        for piece in (
            "<a ", "<", "<!--", "<![", "</", "&", "<a a='", "<p>", "<!", "<?", "<a href='https://x'>", "</a>", "<pre>",
            "<title>", "<template>", "<script>", "<![if]", "<a b=", "<a/", "<textarea>", "&#x", " ",
        ):  # fmt: skip
            with self.subTest(piece):
                began = time.process_time()
                haineko.html_to_text(piece * (200000 // len(piece)))
                self.assertLess(time.process_time() - began, 2)


# ======================================================================================================================
# 8. Routes
# ======================================================================================================================


class Routes(unittest.TestCase):
    def test_the_order_of_the_tables(self):
        m = {"example.jp": "m1", ".example.jp": "m2", ".jp": "m3", "a.b.example.jp": "m4", "default": "m5"}
        s = {"example.org": "s1", ".example.org": "s2", "default": "s3"}
        off = {"example.jp": "off", ".jp": "m2", "default": "off"}
        for recipient, sender, mailertable, sendermt, host, why in (
            ("example.jp", "example.org", m, s, "m1", 'mailertable["example.jp"]'),
            ("EXAMPLE.JP", "example.org", m, s, "m1", 'mailertable["example.jp"]'),
            ("b.example.jp", "example.org", m, s, "m2", 'mailertable[".example.jp"]'),
            ("x.a.b.example.jp", "example.org", m, s, "m2", 'mailertable[".example.jp"]'),
            ("a.b.example.jp", "example.org", m, s, "m4", 'mailertable["a.b.example.jp"]'),
            ("other.jp", "example.org", m, s, "m3", 'mailertable[".jp"]'),
            ("notexample.com", "x.example", m, s, "m5", "mailertable.default"),
            ("example.com", "example.org", m, s, "s1", 'sendermt["example.org"]'),
            ("example.com", "Example.ORG", m, s, "s1", 'sendermt["example.org"]'),
            ("example.com", "a.b.example.org", m, s, "s2", 'sendermt[".example.org"]'),
            ("example.com", "example.net", m, s, "m5", "mailertable.default"),
            ("example.com", "a.net", {}, {"default": "s3"}, "s3", "sendermt.default"),
            ("example.com", "example.net", {}, {}, "127.0.0.1", "no route matches"),
            ("[192.0.2.1]", "x.example", {"default": "m5"}, {}, "m5", "mailertable.default"),
            ("default", "x.example", {"default": "d"}, {}, "d", ""),  # a domain of that name
            ("example.jp", "example.org", off, {"example.org": "s1"}, "m2", 'mailertable[".jp"]'),
            ("example.com", "example.org", off, {"example.org": "s1"}, "s1", 'sendermt["example.org"]'),
            ("example.com", "x.example", off, {"example.org": "s1"}, "127.0.0.1", "no route matches"),
        ):
            with self.subTest(recipient, sender=sender, why=why):
                tables = {
                    name: {key: {"host": host, "disabled": int(host == "off")} for key, host in table.items()}
                    for name, table in (("mailertable", mailertable), ("sendermt", sendermt))
                }
                found, told = haineko.resolve_route(recipient, sender, settings(**tables))
                self.assertEqual(found.host, host)
                self.assertIn(why, told)

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
# 10. DNS
# ======================================================================================================================


class DnsMessages(unittest.TestCase):
    QUESTION = Question(struct.pack(">6H", 7, 0x0100, 1, 0, 0, 0) + wire_name("Neko.example") + b"\0\x0f\0\x01")

    def parse(self, octets: bytes, kind: int = haineko.MX) -> haineko.DNSAnswer:
        return haineko.parse_response(octets, 7, "neko.example", kind)

    def test_every_kind_of_record_is_read(self):
        long_text = "v=spf1 " + "x" * 300
        for kind, given, wanted in (
            (haineko.A, "192.0.2.7", "192.0.2.7"), (haineko.AAAA, "2001:db8::7", "2001:db8::7"),
            (haineko.MX, (10, "MX.Neko.example"), (10, "mx.neko.example")), (haineko.TXT, long_text, long_text),
            (haineko.CNAME, "Else.example", "else.example"), (haineko.TXT, "", ""),
        ):  # fmt: skip
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
        for what, octets in (
            ("nothing", b""), ("a head alone", good[:12]), ("another number", self.QUESTION.answer(number=8)),
            ("another name", self.QUESTION.answer(name="inu.example")),
            ("another kind", self.QUESTION.answer(kind=haineko.A)), ("a query", self.QUESTION.answer(flags=0x0100)),
            ("two questions", good[:4] + b"\0\x02" + good[6:]), ("a record cut off", good[:-3]),
            ("no question", struct.pack(">6H", 7, 0x8180, 0, 0, 0, 0)), ("a record that isn't there", one),
            ("a name that points at itself", one + b"\xc0" + bytes((len(one),)) + record[2:] + b"\0\0"),
            ("a name that points ahead", one + b"\xc0\xff" + record[2:] + b"\0\0"),
            ("a length beyond the end", one + record + b"\xff\xff\0\x05"),
            ("a host that runs out", one + record + b"\0\x06\0\x05\x3fabc"),
            ("a label of no known kind", one + record + b"\0\x05\0\x05\x80\0\0"),
        ):  # fmt: skip
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
            for _ in range(dice.randrange(4) if len(octets) > 12 else 0):
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
    def look_up(self, name: str, kind: int, *places: str, seconds: float = 5.0) -> haineko.DNSAnswer:
        resolver = haineko.Resolver(places)
        resolver.QUERY_TIMEOUT = 0.3
        return haineko.run(resolver.lookup(name, kind, time.monotonic() + seconds))

    def test_answers(self):
        def alias(to: str):
            """Its end isn't told and must be asked for."""
            return lambda q, _: [q.answer(wire_record(q.name, haineko.CNAME, to))]

        zone = {
            "a.example": {haineko.A: ["192.0.2.1", "192.0.2.2"], haineko.AAAA: ["2001:db8::1"]},
            "m.example": {haineko.MX: [(20, "mx2.example"), (10, "mx1.example")]},
            "t.example": {haineko.TXT: ["v=STSv1; id=1;", "y" * 3000]},
            "alias.example": {haineko.CNAME: ["a.example"]},
            "alias8.example": {haineko.CNAME: ["c1.example"]},
            "alias9.example": {haineko.CNAME: ["alias8.example"]},
            **{f"c{i}.example": {haineko.CNAME: [f"c{i + 1}.example"]} for i in range(1, 8)},
            "c8.example": {haineko.A: ["192.0.2.8"]},
            "half.example": alias("a.example"),
            "circle.example": alias("elcric.example"),
            "elcric.example": alias("circle.example"),
        }
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
            ("half.example", haineko.A, haineko.NOERROR, ("192.0.2.1", "192.0.2.2")),
            ("alias8.example", haineko.A, haineko.NOERROR, ("192.0.2.8",)),
            ("alias9.example", haineko.A, haineko.SERVFAIL, ()),
            ("circle.example", haineko.A, haineko.SERVFAIL, ()),
            ("x" * 63 + ("." + "y" * 63) * 4, haineko.A, haineko.NXDOMAIN, ()),
        ):
            with self.subTest(name, kind=kind):
                found = self.look_up(name, kind, server.place)
                self.assertEqual((found.code, found.values), (code, values))
                self.assertEqual(bool(found.why), code == haineko.SERVFAIL)

    def test_a_query_octet_for_octet(self):
        server = self.enter(NameServer({"neko.example": {haineko.MX: [(1, "a.example")]}}))
        for name, question in (("neko.example", b"\x04neko\x07example\0\0\x0f\0\x01"), ("", b"\0\0\x0f\0\x01")):
            server.asked.clear()
            self.look_up(name, haineko.MX, server.place)
            self.assertEqual(server.asked[0][0].octets[2:], b"\x01\0\0\x01\0\0\0\0\0\0" + question)

    def test_manners(self):
        def a(end: int, ttl: int = 60) -> bytes:
            return wire_record("a.example", haineko.A, f"192.0.2.{end}", ttl)

        many, truncated = [a(i) for i in range(250)], 0x8380
        server = self.enter(NameServer({}))
        for what, manner, wanted in (  # wanted: last numbers of the addresses, or words in the reason of the failure
            ("a forged number first", lambda q, _: [q.answer(a(66), number=q.number ^ 1), q.answer(a(1))], [1]),
            ("a forged name first", lambda q, _: [q.answer(a(66), name="b.example"), q.answer(a(1))], [1]),
            ("a forged kind first", lambda q, _: [q.answer(a(66), kind=haineko.MX), q.answer(a(1))], [1]),
            ("a query first", lambda q, _: [q.octets, q.answer(a(1))], [1]),
            ("rubbish first", lambda q, _: [b"", b"\xff" * 600, q.answer()[:-2], q.answer(a(1))], [1]),
            ("another's records", lambda q, _: [q.answer(wire_record("b.example", 1, "192.0.2.66"))], []),
            ("forgeries alone", lambda q, _: [q.answer(a(66), number=q.number ^ 1)], " "),
            ("a flood", lambda q, _: [b"x"] * 200, "do not answer the query"),
            ("silence", lambda q, _: [], " "),
            ("SERVFAIL", lambda q, _: [q.answer(code=2)], " "),
            ("SERVFAIL with records", lambda q, _: [q.answer(a(1), code=2)], " "),
            ("REFUSED", lambda q, _: [q.answer(code=5)], " "),
            ("truncated", lambda q, tcp: [q.answer(a(1)) if tcp else q.answer(flags=truncated)], [1]),
            ("truncated and then huge", lambda q, tcp: [q.answer(*many) if tcp else q.answer(flags=truncated)],
             range(250)),
            ("truncated and then gone", lambda q, tcp: [] if tcp else [q.answer(flags=truncated)], " "),
            ("truncated and then forged",
             lambda q, tcp: [q.answer(a(66), number=q.number ^ 1) if tcp else q.answer(flags=truncated)], " "),
            ("a datagram larger than it should be", lambda q, _: [q.answer(*many)], range(250)),
            ("a time to live over the top", lambda q, _: [q.answer(a(1, 1 << 31))], [1]),
        ):  # fmt: skip
            server.zone = {"a.example": manner}
            with self.subTest(what):
                began = time.monotonic()
                found = self.look_up("a.example", haineko.A, server.place, seconds=1.0)
                self.assertLess(time.monotonic() - began, 2)
                if isinstance(wanted, str):
                    self.assertEqual((found.code, found.values), (haineko.SERVFAIL, ()))
                    self.assertIn(wanted, found.why)
                else:
                    values = tuple(f"192.0.2.{i}" for i in wanted)
                    self.assertEqual((found.code, found.values, found.why), (haineko.NOERROR, values, ""))

    def test_the_next_server_is_asked(self):
        first, second = self.enter(NameServer({})), self.enter(NameServer({"a.example": {haineko.A: ["192.0.2.1"]}}))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
            closed.bind(("127.0.0.1", 0))
            nobody = f"127.0.0.1:{closed.getsockname()[1]}"
        for place, manner in (
            (first.place, lambda q, _: []), (first.place, lambda q, _: [q.answer(code=2)]), (nobody, None),
        ):  # fmt: skip
            first.zone = {"a.example": manner}
            self.assertEqual(self.look_up("a.example", haineko.A, place, second.place).values, ("192.0.2.1",))
        found = self.look_up("a.example", haineko.A, nobody)
        self.assertEqual(found.code, haineko.SERVFAIL)
        self.assertIn("refused", found.why)

    def test_nobody_can_foresee_number_and_port(self):
        server = self.enter(NameServer({"a.example": {haineko.A: ["192.0.2.1"]}}))
        for _ in range(20):
            self.look_up("a.example", haineko.A, server.place)
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
        for name, *times in (  # (time, questions that a look-up costs then)
            ("a.example", (0, 1), (1, 0), (99, 0), (101, 1), (150, 0)),
            ("zero.example", (0, 1), (0, 1)),
            ("alias.example", (0, 2), (49, 0), (51, 2)),
            ("none.example", (0, 1), (59, 0), (61, 1)),
            ("fails.example", *[(0, haineko.Resolver.ATTEMPTS)] * 2),
            ("ages.example", (0, 1), (0, 1)),  # RFC 2181 8
            ("years.example", (0, 1), (86399, 0), (86401, 1)),
        ):
            for at, wanted in times:
                with self.subTest(name, at=at):
                    server.asked.clear()
                    clock[0] = at
                    haineko.run(resolver.lookup(name, haineko.A, time.monotonic() + 5))
                    self.assertEqual(len(server.asked), wanted)

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
        many = "".join(f"nameserver 192.0.2.{i}\n" for i in range(1, 6))
        for content, *wanted in (
            (None, "127.0.0.1"), (text, "192.0.2.1", "2001:db8::53"), ("nameserver nonsense\n", "127.0.0.1"),
            (many, "192.0.2.1", "192.0.2.2", "192.0.2.3"),
        ):  # fmt: skip
            with self.subTest(content):
                if content:
                    with open(path, "w", encoding="ascii") as stream:
                        stream.write(content)
                self.assertEqual(haineko.resolv_conf_servers(path), tuple((address, 53) for address in wanted))

    def test_the_setting_resolver(self):
        for value, wanted in (
            ("127.0.0.1:5353", ("127.0.0.1", 5353)), ("192.0.2.1", ("192.0.2.1", 53)),
            ("[2001:db8::1]:5353", ("2001:db8::1", 5353)), ("2001:db8::1", ("2001:db8::1", 53)),
            ("ns.example.org", ()), ("127.0.0.1:0", ()), ("127.0.0.1:65536", ()), ("127.0.0.1:", ()),
        ):  # fmt: skip
            with self.subTest(value):
                faults: list = []
                found = haineko.from_dict(haineko.Smtpd, {"resolver": value}, "smtpd", faults)
                self.assertEqual(haineko.name_server_endpoint(value), wanted)
                self.assertEqual((found.resolver, bool(faults)), ((value,) if wanted else (), not wanted))

    def test_look_ups_under_way_are_shared(self):
        server = self.enter(NameServer({}))
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

    def __init__(self, *addresses: str) -> None:
        super().__init__()
        self.addresses, self.gate = addresses, threading.Event()

    def _look_up(self, host: str, future) -> None:
        if not self.addresses:
            self.gate.wait(9)
        future.set_result(self.addresses or ["127.0.0.1"])


def swallow(test: unittest.TestCase, address: str, port: int) -> str:
    """The address, which from now on answers no attempt to connect to that port: its queue is full."""
    listener, *others = [socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) for _ in range(5)]
    listener.bind((address, port))
    listener.listen(0)
    for sock in (listener, *others):
        test.addCleanup(sock.close)
    for sock in others:
        sock.setblocking(False)
        sock.connect_ex((address, port))
    return address


class Connections(unittest.TestCase):
    def test_an_address_that_is_silent_is_tried_last_for_a_while(self):
        with socket.create_server(("127.0.0.1", 0)) as good:
            port = good.getsockname()[1]
            connector = Names(swallow(self, "::1", port), "127.0.0.1")
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
            Names("::1", "127.0.0.1").connect("host.example", port, time.monotonic() + 9)
        began, host = time.monotonic(), swallow(self, "::1", port)
        with self.assertRaises(socket.timeout):
            Names(host).connect("host.example", port, began + 0.4)
        self.assertLess(time.monotonic() - began, 2)

    def test_a_slow_look_up_ends_at_the_deadline(self):
        connector, began = Names(), time.monotonic()
        for _ in range(3):
            with self.assertRaises(socket.timeout):
                connector.connect("host.example", 25, time.monotonic() + 0.1)
        self.assertLess(time.monotonic() - began, 3)
        connector.gate.set()
        self.assertRaises(OSError, haineko.Connector().connect, "no.such.host.invalid", 25, time.monotonic() + 9)


class HostsOfADomain(unittest.TestCase):
    def hosts(self, *values: tuple, hostname: str = "relay.example") -> tuple:
        """The hosts of a domain with these MX records."""

        class Resolver:
            async def lookup(self, *_) -> haineko.DNSAnswer:
                return haineko.DNSAnswer(haineko.NOERROR, values)

        return tuple(haineko.run(haineko.mx_hosts("neko.example", Resolver(), hostname, float("inf"))))

    def test_order(self):
        orders = {self.hosts((20, "c"), (10, "a"), (10, "b"), (5, "mx.bad host"), (5, "")) for _ in range(100)}
        self.assertEqual(orders, {("a", "b", "c"), ("b", "a", "c")})
        orders = {self.hosts(*[(10, f"mx{i}") for i in range(4)]) for _ in range(300)}
        self.assertGreater(len(orders), 12)

    def test_this_host_and_those_behind_it_are_left_out(self):
        values = ((20, "relay.example"), (20, "b"), (30, "c"), (40, "relay.example"))
        self.assertEqual(self.hosts((10, "a"), *values, hostname="Relay.example"), ("a",))
        with self.assertRaises(haineko.Rejected) as caught:
            self.hosts(*values)
        self.assertEqual(caught.exception.reply.dsn, "5.4.6")

    def test_public_addresses(self):
        private = "127.0.0.1 10.1.2.3 172.31.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 255.255.255.255"
        private += " 224.0.0.1 ::1 :: fe80::1 fd00::1 ff02::1 ::ffff:127.0.0.1 2002:7f00:1::"
        for texts, public in (("8.8.8.8 2606:4700::1111 ::ffff:8.8.8.8", True), (private, False)):
            for text in texts.split():
                self.assertEqual(haineko.is_public(text), public, text)


class PoliciesOfDomains(unittest.TestCase):
    def test_the_record(self):
        for wanted, *texts in (
            ("20160831085700Z", "v=STSv1; id=20160831085700Z;"), ("1", "v=STSv1;id=1"),
            ("2", "other", "v=STSv1; id=2;"), ("3", "v=STSv1; x=y; id=3; z=1"),
            ("",), ("", "v=STSv1; id=1;", "v=STSv1; id=2;"), ("", "v=STSv1; id=;"), ("", "v=STSv1; id=a-b;"),
            ("", "v=STSv1;"), ("", "v=STSv2; id=1;"), ("", "v=STSv10; id=1;"),
        ):  # fmt: skip
            with self.subTest(texts):
                self.assertEqual(haineko.mta_sts_id(tuple(texts)), wanted)

    def test_the_text(self):
        good = "version: STSv1\r\nmode: enforce\r\nmx: MX1.example.\r\nmx: *.example.net\r\nmax_age: 604800\r\n"
        policy = haineko.MTASTSPolicy("enforce", ("mx1.example", "*.example.net"), 604800)
        for text, wanted in (
            (good, policy), (good.replace("\r\n", "\n") + "\n", policy), (good.rstrip(), policy),
            (good + "nyan: 1\n", policy), (good + "mode: none\n", policy),  # of a key twice, the first counts
            (good.replace("604800", "9999999999"), policy._replace(max_age=31557600)),
            ("version:STSv1\nmode:none\nmax_age:1", haineko.MTASTSPolicy("none", (), 1)),
        ):  # fmt: skip
            with self.subTest(text):
                self.assertEqual(haineko.parse_mta_sts_policy(text), wanted)
        for old, new in (
            ("version", "x"), ("STSv1", "STSv2"), ("mode", "x"), ("enforce", "perhaps"), ("mx:", "x:"),
            ("max_age", "x"), ("604800", "-1"), (good, "<html>"), (good, ""),
        ):  # fmt: skip
            with self.subTest(old, new=new):
                self.assertRaises(ValueError, haineko.parse_mta_sts_policy, good.replace(old, new))
        for mode, host, admitted in (
            ("enforce", "mx1.example", True), ("enforce", "a.example.net", True), ("enforce", "example.net", False),
            ("enforce", "a.b.example.net", False), ("enforce", "mx2.example", False), ("testing", "mx2.example", True),
            ("none", "mx2.example", True),
        ):  # fmt: skip
            with self.subTest(mode, host=host):
                self.assertEqual(policy._replace(mode=mode).allows(host), admitted)


# ======================================================================================================================
# 11. Web sessions
# ======================================================================================================================


def endless(first: bytes, more: bytes, pause: float) -> HttpPeer:
    """An HTTP server whose answer never comes to an end: `first`, then `more` again and again."""

    def answer(asked: Asked) -> str:
        [sock] = peer.open
        sock.sendall(first)
        while not peer.over.wait(pause):
            sock.sendall(more)
        return "close"

    peer = HttpPeer(answer)
    return peer


class WebSessions(unittest.TestCase):
    """Connections that are used again."""

    def test_one_connection_serves_many_mails(self):
        for mailer, answer in PEERS.items():
            with self.subTest(mailer), HttpPeer(answer) as peer:
                relayed(composed_job(web_route(mailer, peer.url)), times=4)
                self.assertEqual([asked.line for asked in peer.asked], [1, 1, 1, 1])

    def test_forms_of_answers(self):
        body, head = b'{"MessageId": "1"}', b"HTTP/1.1 200 OK\r\n"
        final = on_the_wire(200, body)
        for wire, lines in (
            (head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body), [1, 1]),
            (head + b"Connection: close\r\n\r\n" + body, [1, 2]),
            (b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + final, [1, 1]),
            (b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 3 + final, [1, 1]),
        ):
            with self.subTest(wire), HttpPeer(lambda asked, wire=wire: wire) as peer:
                replies = relayed(composed_job(web_route("AmazonSES", peer.url)), times=2)
                self.assertEqual([said.code for (said,) in replies], ["250", "250"])
                self.assertEqual([asked.line for asked in peer.asked], lines)

    def test_a_kept_connection_that_was_closed_is_replaced_but_not_once_the_request_was_sent(self):
        def hang_up() -> None:
            peer.hang_up()
            eventually(lambda: not peer.open)

        with HttpPeer(as_mandrill) as peer:
            replies = relayed(composed_job(web_route("Mandrill", peer.url)), times=3, between=hang_up)
            self.assertEqual([said.code for (said,) in replies], ["250"] * 3)
            self.assertEqual([asked.line for asked in peer.asked], [1, 2, 3])
        with HttpPeer(lambda asked: "close" if peer.asked[1:] else as_mandrill(asked)) as peer:
            (first,), (second,) = relayed(composed_job(web_route("Mandrill", peer.url)), times=2)
            self.assertEqual((first.code, second.code, second.maybe_delivered), ("250", "451", True))
            self.assertEqual(len(peer.asked), 2)

    def test_idle_connections_are_closed_and_bounded(self):
        async def story(route) -> None:
            web, target = haineko.HTTPConnectionPool(), haineko.HTTPTarget.of_route(route)
            call = haineko.HTTPRequest("GET", "/v3/scopes", headers=haineko.bearer_header(route))
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
            haineko.run(story(web_route("SendGrid", peer.url)))

    def test_messages_by_others_go_to_another_haineko_as_they_are(self):
        head = "From: a@example.org\nTo: b@example.jp\nSubject: x\nMIME-Version: 1.0\nContent-Type: text/plain"
        for more in ('"utf-8"\nContent-Transfer-Encoding: 7bit', "utf-8", "UTF-8\nSubject: =?x-nyaa?B?bnlhYQ==?="):
            raw = f"{head}; charset={more}\n\nMeow\n"
            form = {"mail": "a@example.org", "rcpt": "b@example.jp", "raw": raw}
            call = haineko.haineko_request(composed_job(web_route("Haineko", "http://127.0.0.1:1"), form))
            self.assertIn("raw", json.loads(call.body), more)
            self.assertEqual(haineko.parse_submission(call.body)[1], [])

    def test_two_authors_or_none_are_more_than_amazon_takes(self):
        for head in ("From: a@example.org\nFrom: b@example.org\n", "From:\n"):
            form = {"mail": "a@example.org", "rcpt": "b@example.jp", "raw": f"{head}Subject: x\n\nMeow\n"}
            with HttpPeer(lambda asked: (200, {"MessageId": "x"}, ())) as peer:
                said = first_reply(composed_job(web_route("AmazonSES", peer.url), form))
            self.assertEqual((said.code, said.dsn, len(peer.asked)), ("550", "5.6.3", 0), said)

    def test_retries_wait_as_long_as_the_cloud_says(self):
        def answer(asked):
            slow = 429, {"errors": [{"message": "slow"}]}, (("Retry-After", wait),)
            return as_sendgrid(asked) if peer.asked[1:] else slow

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
        class Resets(HttpPeer):
            def _one(self, sock, stream, number: int) -> bool:
                if number > 1 or not self.asked:
                    return super()._one(sock, stream, number)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                return not self._line(stream)  # with a reset, in the middle of the body

        with Resets(as_mandrill) as peer:
            peer.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # the body does not fit into buffers
            job = composed_job(web_route("Mandrill", peer.url, timeout=5), web_submission(body="y" * (8 << 20)))
            replies = relayed(job, times=2)
            self.assertEqual([said.code for (said,) in replies], ["250", "250"], replies)
            self.assertEqual([asked.line for asked in peer.asked], [1, 2])

    def test_answers_without_end_end_at_the_limit_or_the_deadline(self):
        head, chunked = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"
        for first, more, status in (
            (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0), (b"", b"HTTP/1.1 103 x\r\nA: b\r\n\r\n", 0),
            (head, b"X: y\r\n", 0), (head + b"X: ", b"y", 0),
            (head + b"Content-Length: 99999999999\r\n\r\n", b"y", 200), (chunked, b"1\r\ny\r\n", 200),
            (chunked + b"0\r\n", b"X: y\r\n", 200),  # trailers
        ):  # fmt: skip
            for pause, count in ((0.05, 1), (0.0, 4096)):
                with self.subTest(first, more=more, pause=pause), endless(first, more * count, pause) as peer:
                    target, pool = haineko.HTTPTarget(peer.url, 0.6, "Webhook"), haineko.HTTPConnectionPool()
                    began = time.monotonic()
                    try:
                        response = haineko.run(pool.request(target, haineko.HTTPRequest("POST", "/", b"{}")))
                        self.assertEqual((response.status, response.body), (status, b""))
                    except haineko.Rejected as refused:
                        self.assertEqual((refused.reply.code, refused.reply.maybe_delivered, status), ("451", True, 0))
                    self.assertLess(time.monotonic() - began, 3)

    def test_a_webhook_that_drips_is_given_up(self):
        with endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.05) as peer, HttpPeer(lambda asked: (204, "", ())) as good:
            for url, limit, code in ((peer.url, 0.5, "451"), (good.url, 5.0, "250")):
                began, pool = time.monotonic(), haineko.HTTPConnectionPool()
                item = haineko.QueueItem("Q" * 16, "event", "", "", 0.0, haineko.Message((b"{}",)))
                leased = haineko.LeasedRecipient(1, item, haineko.NewRecipient(url, f"{url}/x?y=1", 1, ""), 0)
                reply = haineko.run(haineko.post_webhook(leased, b"secret", 0.0, pool, limit))
                pool.sweep(everything=True)
                self.assertEqual((reply.code, reply.mailer), (code, "Webhook"))
                self.assertLess(time.monotonic() - began, 3)
            self.assertEqual([(asked.method, asked.path) for asked in good.asked], [("POST", "/x?y=1")])

    def test_the_certificate_is_checked(self):
        pem, tls = certificate(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(pem)
        for mailer, context, options, good in (
            ("AmazonSES", tls, {}, False), ("AmazonSES", tls, {"ca_file": pem}, True),
            ("AmazonSES", tls, {"tls_verify": False}, True), ("Haineko", tls, {"ca_file": pem}, True),
            ("Haineko", None, {"timeout": 1}, False),
        ):  # fmt: skip
            with self.subTest(mailer, options=options), HttpPeer(PEERS[mailer], context) as peer:
                by_port = {"host": "127.0.0.1", "port": peer.port, "https": 1}
                more = {**({"url": peer.url} if mailer == "AmazonSES" else by_port), "timeout": 5, **options}
                replies = relayed(composed_job(web_route(mailer, **more)), times=2)
                wanted = ("250", "2.0.0", "DATA") if good else ("451", "4.7.5", "CONN")
                self.assertEqual([said[:3] for (said,) in replies], [wanted] * 2)
                lines = [asked.line for asked in peer.asked if asked.method == "POST"]  # a client's hello is no request
                self.assertEqual(lines, [1, 1] if good else [])


# ======================================================================================================================
# 12. Signatures
# ======================================================================================================================

RFC8463_MESSAGE = (
    b"From: Joe SixPack <joe@football.example.com>\r\nTo: Suzie Q <suzie@shopping.example.net>\r\n"
    b"Subject: Is dinner ready?\r\nDate: Fri, 11 Jul 2003 21:00:37 -0700 (PDT)\r\n"
    b"Message-ID: <20030712040037.46341.5F8J@football.example.com>\r\n\r\n"
    b"Hi.\r\n\r\nWe lost the game.  Are you hungry yet?\r\n\r\nJoe.\r\n"
)


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
        data = hashlib.sha256(b"\r\n".join(map(haineko._relaxed_field, [*head.split(b"\r\n"), field]))).digest()
        wanted = b"/gCrinpcQOoIfuHNQIbq4pgh9kyIK3AQUdt9OdqQehSwhEIug4D11BusFa3bT3FY5OsU7ZbnKELq+eXdp1Q1Dw=="
        self.assertEqual(base64.b64encode(key.sign(data)), wanted)

    def test_known_answers(self) -> None:
        """RSA: what `openssl dgst -sha256 -sign` makes of it; fields: at a fixed time, as dkimpy found them good."""
        key = haineko.PrivateKey(TEST_RSA_KEY.encode())
        digest = hashlib.sha256(key.sign(b"Nyaa")).hexdigest()
        wanted = 2048, "2ffccef5897eb56e4ffdef2dcab77d31fad83edefcace4782529f8716d18f872"
        self.assertEqual((haineko.rsa_bits(key.public), digest), wanted)
        for pem, wanted in (
            (RFC8463_KEY, "5862b82f0deb2a2fbac216f404f5d0aa5d27dcdb4c376970ffe4e96f3bde5daa"),
            (TEST_RSA_KEY, "6fba1db93f938f37f541202226ce628062a30820db8a62b408ddb35e43932b0c"),
        ):
            key = haineko.DkimKey("s1", "", "football.example.com", haineko.PrivateKey(pem.encode()))
            field = haineko.dkim_signature(RFC8463_MESSAGE, key, 1528637909)
            self.assertEqual(hashlib.sha256(field).hexdigest(), wanted)
            self.assertTrue(all(len(line) <= 78 for line in field.split(b"\r\n")))

    def test_canonical_forms(self) -> None:
        for body, wanted in (
            (b"", b""), (b"\r\n\r\n", b""), (b" \t\r\n \r\n", b""),
            (b" C \r\nD \t E\r\n\r\n\r\n", b" C\r\nD E\r\n"),  # RFC 6376 3.4.5
            (b"no end", b"no end\r\n"), (b"end \t", b"end\r\n"), (b".\r\n..\r\n", b".\r\n..\r\n"),
        ):  # fmt: skip
            with self.subTest(body):
                self.assertEqual(haineko._relaxed_body(body), wanted)
        for line, wanted in ((b"A: X", b"a:X"), (b"B : Y\t\r\n\tZ  ", b"b:Y Z"), (b"C:", b"c:")):
            self.assertEqual(haineko._relaxed_field(line), wanted)

    def test_keys_that_cannot_be_used(self) -> None:
        small = subprocess.run(["openssl", "genrsa", "1024"], capture_output=True, check=True).stdout
        locked = b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIG7\n-----END ENCRYPTED PRIVATE KEY-----\n"
        for pem, words in (
            (small, "RSA key of 2048 bits or more"),
            *((octets, "expected a PEM private key") for octets in (b"", b"n-y-a-a", locked)),
            (TEST_CERTIFICATE.encode(), "expected an Ed25519 key, or an RSA key"),
        ):
            with self.subTest(pem), self.assertRaisesRegex(ValueError, words):
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
        for section, words, *mode in (
            ({".example.org": by_file}, "dkim..example.org: expected a domain"),
            ({"a.jp": {"key": by_file["key"]}}, "dkim.a.jp.selector: expected a selector"),
            ({"a.jp": {**by_file, "selector": "a b"}}, 'dkim.a.jp.selector: expected a selector, got "a b"'),
            ({"a.jp": {"selector": "s"}}, "dkim.a.jp.key: expected a PEM private key without a passphrase"),
            ({"a.jp": {**by_file, "key": {"file": "no.pem"}}}, "dkim.a.jp.key.file: no.pem: No such file"),
            ({"a.jp": {**by_file, "key": {"env": "NYAA_"}}}, "dkim.a.jp.key.env: no environment variable"),
            ({"a.jp": {**by_file, "key": 1}}, "dkim.a.jp.key: expected a string, got a number"),
            (dkim_keys("a.jp"), f"{path}: holds secrets and can be read by everybody", 0o644),
            (dkim_keys("a.jp"), ""),
        ):
            with self.subTest(section, mode=mode):
                faults = haineko.load_settings(self.write("haineko.json", {"dkim": section}, *mode))[1]
                self.assertEqual(len(faults), bool(words), faults)
                self.assertTrue("".join(faults).startswith(words), faults)

    def test_a_python_without_libcrypto_says_so(self) -> None:
        haineko.libcrypto.cache_clear()
        self.addCleanup(haineko.libcrypto.cache_clear)
        path = self.write("haineko.json", {"dkim": dkim_keys("example.org")})
        words = "dkim.example.org.key: this Python has no OpenSSL libcrypto that can be used"
        with patched(haineko, LIBCRYPTO=("nyaa_no_such_function",)):
            self.assertEqual(haineko.load_settings(path)[1], [words])

    def test_who_signs(self) -> None:
        """By the domain of From, then those above it; one signature of a domain is enough."""
        keys = settings(dkim={**dkim_keys("example.org"), **dkim_keys("b.example.org", selector="s2")}).dkim
        old = b"DKIM-Signature: v=1; d=%b;\r\n s=x; b=AAAA\r\n"
        for author, more, *wanted in (
            (b"a@example.org", b"", ("example.org", "s1")), (b"A <a@EXAMPLE.org>", b"", ("example.org", "s1")),
            (b"a@b.example.org", b"", ("b.example.org", "s2")), (b"a@c.b.example.org", b"", ("b.example.org", "s2")),
            (b"a@bexample.org", b""), (b"a@org", b""), (b"a@[127.0.0.1]", b""), (b"nobody", b""),
            (b"a@example.org", old % b"Example.org"),
            (b"a@example.org", old % b"example.com", ("example.org", "s1")),
            (b"a@b.example.org", old % b"example.org", ("b.example.org", "s2")),
        ):  # fmt: skip
            with self.subTest(author, more=more):
                octets = more + b"From: " + author + b"\r\nSubject: x\r\n\r\nNyaa\r\n"
                mail = job(haineko.Route(), text=octets)._replace(dkim=keys)
                found = signatures_of(haineko.run(haineko.sign_transaction(mail)).octets())
                self.assertEqual([(tags["d"], tags["s"]) for tags in found if tags["s"] != "x"], wanted)

    def test_a_header_of_more_fields_than_a_client_may_send_is_signed(self) -> None:
        octets = b"From: a@example.org\r\n" + b"X-A: x\r\n" * 1005 + b"\r\nNyaa\r\n"
        mail = job(haineko.Route(), text=octets)._replace(dkim=settings(dkim=dkim_keys("example.org")).dkim)
        signed = haineko.run(haineko.sign_transaction(mail)).octets()
        self.assertTrue(signed.startswith(b"DKIM-Signature: ") and signed.endswith(octets))

    def test_which_routes_sign(self) -> None:
        keys = settings(dkim=dkim_keys("example.org")).dkim
        for route, dkim, wanted in (
            ({}, None, 0), ({}, keys, 1), ({"mailer": "MX"}, keys, 1), ({"dkim": False}, keys, 0),
            ({"host": "email-smtp.eu-west-1.amazonaws.com"}, keys, 0), ({"host": "EMAIL.AmazonAWS.com."}, keys, 0),
            ({"host": "amazonaws.com.example.jp"}, keys, 1),
            *(({"mailer": name}, keys, 0) for name in haineko.RELAYS if name not in ("ESMTP", "MX")),
        ):  # fmt: skip
            with self.subTest(route):
                signed = haineko.run(haineko.sign_transaction(job(haineko.Route(**route))._replace(dkim=dkim)))
                self.assertEqual(len(signatures_of(signed.octets())), wanted)

    def test_what_arrives(self) -> None:
        raw = "From: a@example.org\nSubject: 猫\nContent-Type: text/plain; charset=UTF-8\n\nにゃあ  \n.\nNyaa"
        peer = self.peer(None, "8BITMIME", "PIPELINING")
        for changes, recipients in (
            ({}, 2),
            ({"header": {"list-id": "<a.example.org>", "list-unsubscribe": "<https://example.org/>"}}, 2),
            ({"header": {"to": "a@example.jp, b@b.example"}, "rcpt": None, "html": "<p>猫</p>"}, 2),
            ({"raw": raw}, 1),
        ):
            for algorithm, pem in (("ed25519", RFC8463_KEY), ("rsa", TEST_RSA_KEY)):
                with self.subTest(changes, algorithm=algorithm):
                    peer.mails.clear()
                    table = {"default": esmtp(peer), "b.example": esmtp(peer, retry=1)}  # two transactions share one
                    force = settings(mailertable=table, dkim=dkim_keys("example.org", key=pem))
                    whole = document(**{"rcpt": ["a@example.jp", "b@example.jp"], **changes})
                    if "raw" in whole:
                        del whole["header"], whole["body"]
                    self.assertEqual(posted(whole, force)[0], 200)
                    self.assertEqual(len(peer.mails), recipients)
                    for mail in peer.mails:
                        self.see_signature(mail.text, algorithm)

    def see_signature(self, octets: bytes, algorithm: str) -> None:
        self.assertTrue(octets.startswith(b"DKIM-Signature: v=1; ") and octets.isascii(), octets[:80])
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


# ======================================================================================================================
# 13. OAuth2
# ======================================================================================================================


class OAuth2(Folder, Peers):
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
        """A token endpoint; a text stands for an answer with that token, and the last answer holds for ever."""
        said = [(200, {"access_token": item, "expires_in": 3600}) if type(item) is str else item for item in said]
        peer = HttpPeer(lambda asked: said.pop(0) if len(said) > 1 else said[0])
        self.addCleanup(peer.__exit__)
        return peer

    def cache(self, *clock) -> haineko.TokenCache:
        pool = haineko.HTTPConnectionPool()
        self.addCleanup(pool.sweep, everything=True)
        return haineko.TokenCache(pool, *clock)

    def asked(self, peer: HttpPeer) -> list:
        return [dict(urllib.parse.parse_qsl(item.body.decode())) for item in peer.asked]

    def test_faults(self):
        self.write("account.json", {"client_email": "x", "private_key": "none"})
        self.write("open.json", {}, 0o644)
        google = {"provider": "google", "client_id": "i"}
        for oauth2, fault in (
            ({"provider": "microsft"}, 'provider: unknown provider "microsft"; did you mean "microsoft"?'),
            ({"provider": "microsoft", "client_id": "i", "client_secret": "s"}, "tenant: oauth2 needs it"),
            ({"provider": "google", "client_secret": "s"}, "client_id: oauth2 needs it"),
            (google, "client_secret: oauth2 needs it"),
            ({"client_id": "i", "client_secret": "s"}, "provider: oauth2 needs it"),
            ({"token_url": "ftp://x", "access_token": "t"}, "token_url: expected a URL"),
            ({"provider": "microsoft", "tenant": "a/b", "access_token": "t"}, "tenant: expected a host name"),
            ({**google, "refresh_token": {"file": "none"}}, "refresh_token.file: none: No such"),
            ({"access_token": {"env": "HAINEKO_NONE"}}, "access_token.env: no environment variable"),
            ({"service_account": "none"}, "service_account.file: none: No such file"),
            ({"service_account": "open.json"}, "service_account.file: open.json: can be read by everybody"),
            ({"service_account": "account.json"}, "service_account: expected the JSON file of a Google"),
            ({"client": "x"}, "client: unknown key"),
        ):
            with self.subTest(oauth2):
                login = {"key": {"username": "u", "oauth2": oauth2}}
                faults = haineko.load_settings(self.write("haineko.json", {"authinfo": login}))[1]
                self.assertTrue(faults[0].startswith(f"authinfo.key.oauth2.{fault}"), faults)
        path = self.write("haineko.json", {"authinfo": {"key": {"oauth2": {"access_token": "t"}}}})
        self.assertEqual(haineko.load_settings(path)[1], ["authinfo.key.username: oauth2 needs it"])

    def test_what_the_provider_fills_in(self):
        microsoft = {"provider": "microsoft", "tenant": "example.org", "client_id": "i", "client_secret": "s"}
        google = {"provider": "google", "client_id": "i", "client_secret": "s", "refresh_token": "r"}
        url, outlook = "https://login.microsoftonline.com/example.org/oauth2/v2.0/token", "https://outlook.office"
        google_url, here = "https://oauth2.googleapis.com/token", "http://127.0.0.1/t?a"
        for oauth2, mailer, *wanted in (
            (microsoft, "ESMTP", url, f"{outlook}365.com/.default"),
            ({**microsoft, "refresh_token": "r"}, "ESMTP", url, f"{outlook}.com/SMTP.Send offline_access"),
            ({**microsoft, "scope": "x", "token_url": here}, "ESMTP", here, "x"),
            (microsoft, "MSGraph", url, "https://graph.microsoft.com/.default"),
            (google, "ESMTP", google_url, "https://mail.google.com/"),
            (google, "GmailAPI", google_url, "https://mail.google.com/"),
        ):
            with self.subTest(oauth2, mailer=mailer):
                login = {"key": {"username": "u", "oauth2": oauth2}}
                found = settings(authinfo=login, mailertable={"default": {"mailer": mailer, "auth": "key"}})
                resolved = found.mailertable["default"].oauth2
                self.assertEqual([resolved.token_url, resolved.scope], wanted)

    # -- tokens: fetched, kept, renewed

    def test_one_fetch_for_all_who_wait(self):
        provider = self.provider("ya29.token")
        route, tokens, found, hops = self.route(provider), self.cache(), [], []

        async def one() -> None:
            found.append((await tokens.authorize(route)).credentials)

        async def refused(host: str) -> None:
            try:
                await tokens.authorize(replace(route, host=host))
            except haineko.Rejected as rejected:
                hops.append(rejected.reply.host)

        haineko.run(together(*[one() for _ in range(20)]))
        self.assertEqual(found, [("neko", "ya29.token")] * 20)
        tokens, provider.answer = self.cache(), lambda _: (400, {})
        haineko.run(together(refused("a.example"), refused("b.example")))
        self.assertEqual((hops, len(provider.asked)), (["a.example", "b.example"], 2))
        form = {"grant_type": "client_credentials", "client_id": "app", "client_secret": "geheim-1", "scope": "s"}
        self.assertEqual(self.asked(provider), [form] * 2)
        self.assertEqual(provider.asked[0].path, "/token?x=1")
        self.assertEqual(provider.asked[0].headers["content-type"], "application/x-www-form-urlencoded")

    def test_when_it_is_renewed(self):
        date = (("Date", "Mon, 01 Jan 2001 00:00:00 GMT"),)  # a clock that is wrong

        async def at(now: float) -> None:
            clock[0] = now
            self.assertEqual((await tokens.token_for(route)).text, "ya29.token")

        for lifetime, *times in (
            ({"expires_in": 3600}, 2999, 3001), ({"expires_in": "3600"}, 2999, 3001), ({"expires_in": 600}, 299, 301),
            ({}, 299, 301), ({"expires_in": None}, 299, 301), ({"expires_in": 3600.5}, 2999, 3001),
            ({"expires_in": 10}, 4.9, 5.1), ({"expires_in": 0}, 0), ({"expires_in": -5}, 0), ({"expires_in": [1]}, 0),
        ):  # fmt: skip
            with self.subTest(lifetime):
                provider, clock = self.provider((200, {"access_token": "ya29.token", **lifetime}, date)), [0.0]
                route, tokens = self.route(provider), self.cache(lambda clock=clock: clock[0])
                for now, count in zip((0, *times), (1, 1, 2) if times[1:] else (1, 2)):  # fresh, then renewed
                    haineko.run(at(now))
                    self.assertEqual(len(provider.asked), count)

    def test_one_that_still_holds_is_used_while_the_provider_fails(self):
        route, clock = self.route(self.provider("a", (503, b"later"))), [0.0]
        tokens = self.cache(lambda: clock[0])
        for now in (0.0, 3599.0):
            clock[0] = now
            self.assertEqual(haineko.run(tokens.token_for(route)).text, "a")
        clock[0] = 3601.0
        with self.assertRaises(haineko.Rejected) as caught:
            haineko.run(tokens.token_for(route))
        self.assertIn("HTTP 503", caught.exception.reply.message[1])

    def test_what_a_provider_may_say(self):
        bad, secret = {"error": "invalid_client"}, "AADSTS7000215: Invalid client secret provided."
        with socket.create_server(("127.0.0.1", 0)) as listener:
            nobody = f"http://127.0.0.1:{listener.getsockname()[1]}"
        no_token, no_word = "HTTP 200 OK, no access token in it", "the access token is not one word of ASCII"
        for said, words in (
            ((401, {**bad, "error_description": f"{secret}\r\nTrace ID: 1"}), f"invalid_client: {secret}"),
            ((400, {**bad, "error_description": "geheim-1 is wrong"}), "invalid_client: ******** is wrong"),
            ((400, {"error": "invalid_grant"}), "invalid_grant"), ((200, {"error": "slow_down"}), "slow_down"),
            ((200, b"<html>Log in"), no_token), ((200, {"token_type": "Bearer"}), no_token), ((200, [1]), no_token),
            ((200, {"access_token": "a\r\nb"}), no_word), ((200, {"access_token": 5}), no_word),
            ((302, b"", (("Location", "http://127.0.0.1/"),)), "HTTP 302 Because, no access token in it"),
            ("hang", "timed out"), ("drip", "timed out"), ("close", "Remote end closed connection"),
            (None, "Connection refused"),
        ):  # fmt: skip
            with self.subTest(said):
                peer, hop = HttpPeer(lambda _, said=said: said), self.peer({}, "AUTH XOAUTH2")
                began, provider = time.monotonic(), peer if said else nobody
                with peer:
                    ((reply,),) = carried(job(self.route(provider, hop)))
                self.assertLess(time.monotonic() - began, 3)
                self.assertEqual((*told([reply]), reply.message[0]), ("454 4.7.0 AUTH", "No access token"))
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
        fine, kept = {"access_token": "t", "expires_in": 0}, self.write("refresh", "old\n")
        os.symlink(kept, link := os.path.join(self.folder, "link"))
        said = (200, {**fine, "refresh_token": "new"}), (200, fine), (400, {"error": "invalid_grant"}), (200, fine)
        for source, last, words in (
            ({"file": "link"}, "new", ""),
            ("old", "old", "put the new one into the settings; the old one may stop working"),
        ):
            with self.subTest(source):
                provider, tokens = self.provider(*said), self.cache()
                route = self.route(provider, refresh_token=source)
                for _ in range(4):
                    with contextlib.suppress(haineko.Rejected):
                        haineko.run(tokens.token_for(route))
                forms, lines = self.asked(provider), "".join(self.logged())
                self.assertEqual([form["refresh_token"] for form in forms], ["old", "new", "new", last])
                self.assertEqual(forms[0]["grant_type"], "refresh_token")
                self.assertEqual("the provider replaced the refresh token of neko" in lines, bool(words))
                self.assertIn(words, lines)
        with open(kept) as stream:
            self.assertEqual(stream.read(), "new\n")
        self.assertEqual((os.stat(kept).st_mode & 0o777, os.path.islink(link)), (0o600, True))
        self.assertEqual(sorted(os.listdir(self.folder)), ["haineko.json", "link", "refresh"])
        nowhere = haineko.OAuth2(refresh_token={"file": "/nowhere/x"})
        self.assertIn("can't be written", haineko.save_refresh_token(nowhere, "new"))
        os.makedirs(os.path.join(self.folder, "full", "inner"))
        full = haineko.OAuth2(refresh_token={"file": "full"}, base=self.folder)
        self.assertIn("can't be written", haineko.save_refresh_token(full, "new"))
        self.assertEqual(sorted(os.listdir(self.folder)), ["full", "haineko.json", "link", "refresh"])

    def test_a_service_account(self):
        account = {"client_email": "bot@example.iam", "private_key": TEST_RSA_KEY, "type": "service_account"}
        self.write("account.json", account)
        provider, key = self.provider("ya29.token"), haineko.PrivateKey(TEST_RSA_KEY.encode())
        route = self.route(provider, service_account="account.json", client_id="", client_secret="", scope="")
        self.assertEqual(haineko.run(self.cache().token_for(route)).text, "ya29.token")
        (form,) = self.asked(provider)
        self.assertEqual(form["grant_type"], "urn:ietf:params:oauth:grant-type:jwt-bearer")
        token = form["assertion"]
        self.assertNotRegex(token, r"[^A-Za-z0-9_.-]")
        head, claims, signature = (base64.urlsafe_b64decode(part + "==") for part in token.split("."))
        self.assertEqual(json.loads(head), {"alg": "RS256", "typ": "JWT"})
        self.assertEqual(signature, key.sign(token.rpartition(".")[0].encode()))
        began = json.loads(claims)["iat"]
        self.assertLess(abs(began - time.time()), 60)
        wanted = {"iss": "bot@example.iam", "sub": "neko", "aud": route.oauth2.token_url, "iat": began}
        wanted.update(scope="https://mail.google.com/", exp=began + 3600)
        self.assertEqual(json.loads(claims), wanted)

    def test_a_token_by_a_command(self):
        self.write("program", "#!/bin/sh\necho ya29.token\n", 0o700)
        route = self.route("http://127.0.0.1", access_token={"command": ["./program"]})
        sealed = replace(route.oauth2, access_token={"command": ["sh", "-c", "echo sealed >&2; exit 1"]})
        self.assertEqual(carried(job(route))[0][0].code, "250")
        message = carried(job(replace(route, oauth2=sealed)))[0][0].message
        self.assertEqual(message, ("No access token", ".command: sh: sealed"))

    # -- XOAUTH2 and OAUTHBEARER

    def test_both_mechanisms(self):
        """A line is at most 512 octets, of 5 + 7 + 1 + 4 * ceil((length + 24) / 3) + 2; a longer token is asked for."""
        for offer, length, inline, user in (
            ("AUTH LOGIN XOAUTH2", 20, True, "neko@example.org"), ("AUTH OAUTHBEARER PLAIN", 20, True, "ne,k=o"),
            ("AUTH OAUTHBEARER XOAUTH2", 20, True, "neko"), ("AUTH OAUTHBEARER", 4096, False, "neko"),
            *(("AUTH XOAUTH2", length, length < 349, "neko") for length in (333, 348, 349, 4096)),
        ):  # fmt: skip
            with self.subTest(offer, length=length):
                hop, provider = self.peer({}, offer, logins={user: "t" * length}), self.provider("t" * length)
                replies = carried(*[job(self.route(provider, hop, user))] * 2)
                self.assertEqual([reply.code for (reply,) in replies], ["250", "250"])
                [command] = [line for line in hop.lines if line.startswith("AUTH")]
                self.assertEqual(command.split()[1], "XOAUTH2" if "XOAUTH2" in offer else "OAUTHBEARER")
                self.assertEqual(len(command.split()) == 3, inline)
                self.assertLessEqual(len(command) + 2, 512)
                self.assertEqual((len(hop.connections), len(provider.asked)), (1, 1))

    def test_a_token_that_is_refused_is_replaced_once_a_minute(self):
        for offer, answer in (("AUTH XOAUTH2", ""), ("AUTH OAUTHBEARER", "AQ==")):
            with self.subTest(offer):
                hop, provider = self.peer({}, offer, logins={"neko": "good"}), self.provider("bad.token", "good")
                route = self.route(provider, hop)
                self.assertEqual([reply.code for (reply,) in carried(job(route), job(route))], ["250", "250"])
                self.assertEqual((hop.answers, len(provider.asked), len(hop.connections)), ([answer], 2, 2))
                hop, provider = self.peer({}, offer, logins={"neko": "good"}), self.provider("still.bad")
                route = self.route(provider, hop)
                for replies in carried(job(route), job(route)):
                    self.assertEqual((told(replies), replies[0].route_fault), (["535 5.7.8 AUTH"], True))
                    words = "5.7.8 who are you?", '{"status": "401", "told": "********"}'
                    self.assertEqual(replies[0].message, words)
                self.assertEqual((len(provider.asked), len(hop.connections)), (2, 3))

    def test_servers_that_take_no_token(self):
        challenge = base64.b64encode(b'{"status": "401", "scope": "mail"}')
        alike = challenge.decode().rstrip("=") + ".x"  # a token that has a part in common with the challenge
        for offer, last, wanted, fault, words in (
            ("XOAUTH2", b"535 5.7.8 no\r\n", "535 5.7.8 AUTH", True, '{"status": "401", "scope": "mail"}'),
            ("XOAUTH2", HANG_UP, "421 4.4.2 AUTH", False, "closed"),
            ("LOGIN PLAIN CRAM-MD5", "", "454 4.7.0 AUTH", False, "XOAUTH2, OAUTHBEARER"),  # never by password
        ):
            with self.subTest(offer, last=last):
                says = {"AUTH": b"334 " + challenge + b"\r\n", "": last} if last else {}
                hop = self.peer(says, f"AUTH {offer}", logins={"neko": alike})
                ((reply,),) = carried(job(self.route(self.provider(alike), hop)))
                self.assertEqual((told([reply]), reply.route_fault), ([wanted], fault))
                self.assertIn(words, reply.message[1])
                self.assertEqual(any(line.startswith("AUTH") for line in hop.lines), bool(last))

    def test_no_secret_goes_to_a_provider_without_tls(self):
        outside = outside_address()
        if not outside:
            self.skipTest("this machine has no address but loopback")
        with socket.create_server((outside, 0)) as listener:
            reply = first_reply(job(self.route(f"http://{outside}:{listener.getsockname()[1]}")))
        self.assertIn("Credentials are not sent over a connection without TLS", reply.message[1])

    def test_the_log_shows_mechanism_and_user_and_no_secret(self):
        haineko.log.devel = True
        self.addCleanup(setattr, haineko.log, "devel", False)
        token = "".join(chr(65 + i * 7 % 26) for i in range(4096))
        provider = self.provider(token)
        for says in (
            None,
            lambda _, line: f"535 5.7.8 {line}",
            lambda _, line: f"535-5.7.8 {line[600:900]}\n535 {token[:3000]}",
        ):
            for offer in ("AUTH XOAUTH2", "AUTH OAUTHBEARER"):
                hop = self.peer({"AUTH": says}, offer, logins={"neko": "other"})
                ((reply,),) = carried(job(self.route(provider, hop)))
                lines, bearer = self.logged(), f"auth=Bearer {token}\1\1"
                self.assertIn(f"127.0.0.1 > {offer} ******** as neko", lines)
                whole = "\n".join((*lines, *reply.message))
                forms = token, f"user=neko\1{bearer}", f"n,a=neko,\1host={hop.host}\1port={hop.port}\1{bearer}"
                for form in (token, "geheim-1", *(base64.b64encode(item.encode()).decode() for item in forms)):
                    for start in range(0, len(form) - 8, 97):
                        self.assertNotIn(form[start : start + 40], whole)

    def test_check_connect(self):
        well = 200, {"access_token": "ya29.token", "expires_in": 3600, "scope": "a b"}
        expired = 400, {"error": "invalid_grant", "error_description": "AADSTS700082: expired"}
        for said, words, *steps in (
            (well, "ends in 3[56]\\d\\d s, scope a b", "TOKEN", "DNS", "TCP", "EHLO", "TLS", "AUTH"),
            (expired, "454 No access token: invalid_grant: AADSTS700082: expired", "TOKEN"),
        ):
            with self.subTest(said):
                route, sessions = self.route(self.provider(said)), haineko.TransportContext()
                found = haineko.run(and_closed(haineko.run_probe(route, NAME, "", sessions), sessions))
                self.assertEqual([item.step for item in found], steps)
                self.assertEqual(found[0].ok, said is well)
                self.assertRegex(found[0].text, words)


# ======================================================================================================================
# 14. SMTP sessions
# ======================================================================================================================


FINE = "250 2.0.0 DATA"
LOGIN = {"auth": "x", "credentials": ("kijitora", "nyaa")}  # of a route
LOGINS = {"kijitora": "nyaa"}  # of a peer
# what the server says, and what each of three recipients is told, or all; the same with PIPELINING and without
DIALOGUES = (
    ({}, FINE),
    ({"RCPT": refuses(b="550 5.1.1 nobody of that name")}, FINE, "550 5.1.1 RCPT", FINE),
    ({"RCPT": refuses(a="452 4.2.2 full", c="450 later")}, "452 4.2.2 RCPT", FINE, "450 None RCPT"),
    ({"RCPT": "550 5.1.1 nobody"}, "550 5.1.1 RCPT"),
    ({"RCPT": "550 5.1.1 nobody", "DATA": "503 5.5.1 no recipient"}, "550 5.1.1 RCPT"),
    ({"RCPT": "421 4.3.2 closing"}, "421 4.3.2 RCPT"), ({"RCPT": refuses(b="421 4.3.2 closing")}, "421 4.3.2 RCPT"),
    ({"RCPT": refuses(a="550 5.1.1 no", b="421 4.3.2 bye")}, "550 5.1.1 RCPT", "421 4.3.2 RCPT", "421 4.3.2 RCPT"),
    ({"RCPT": "252 2.5.2 cannot verify"}, FINE), ({"RCPT": "251 2.1.5 will forward"}, FINE),
    ({".": "251 2.6.0 forwarded"}, "251 2.6.0 DATA"), ({".": "250 ok"}, "250 None DATA"),
    ({"MAIL": "550 5.7.1 not you"}, "550 5.7.1 MAIL"), ({"MAIL": "452 4.3.1 no space"}, "452 4.3.1 MAIL"),
    ({"MAIL": "421 4.3.2 closing"}, "421 4.3.2 MAIL"), ({"DATA": "421 4.3.2 closing"}, "421 4.3.2 DATA"),
    ({"RCPT": refuses(b="550 5.1.1 no"), "DATA": "554 5.5.1 no valid recipients"},
     "554 5.5.1 DATA", "550 5.1.1 RCPT", "554 5.5.1 DATA"),
    ({"RCPT": refuses(c="550 5.1.1 no"), ".": "552 5.3.4 big"}, "552 5.3.4 DATA", "552 5.3.4 DATA", "550 5.1.1 RCPT"),
    ({"RCPT": refuses(a="550 5.1.1 no"), "DATA": "rubbish"}, "550 5.1.1 RCPT", "421 4.5.0 DATA", "421 4.5.0 DATA"),
    ({".": "451 4.7.1 greylisted"}, "451 4.7.1 DATA"), ({".": "421 4.3.2 closing"}, "421 4.3.2 DATA"),
    ({"CONN": "554 5.3.2 not today"}, "554 5.3.2 CONN"), ({"CONN": "421 4.3.2 too busy"}, "421 4.3.2 CONN"),
    ({"EHLO": "421 4.3.2 too busy"}, "421 4.3.2 EHLO"),
    ({"EHLO": "502 what", "HELO": "550 5.7.1 no"}, "550 5.7.1 EHLO"),
    ({"RCPT": "354 go on"}, "421 4.5.0 RCPT"), ({"DATA": "250 2.0.0 ok"}, "421 4.5.0 DATA"),
    ({".": "354 more"}, "421 4.4.2 DATA"), ({"MAIL": "250-one\n251 two"}, "421 4.5.0 MAIL"),
    ({"MAIL": "650 6.0.0 no such code"}, "421 4.5.0 MAIL"),
    ({"MAIL": HANG_UP}, "421 4.4.2 MAIL"),  # a new session that dies is not replaced
)  # fmt: skip


def told(replies: list) -> list:
    return [f"{item.code} {item.dsn} {item.command}" for item in replies]


class SmtpSessions(Peers):
    def test_every_recipient_is_told_what_the_server_said(self) -> None:
        for offers in ((), ("PIPELINING", "SIZE 1000000", "DSN")):
            for says, *wanted in DIALOGUES:
                with self.subTest(says, offers=offers), SmtpPeer(says, offers) as peer:
                    [replies] = carried(job(peer, TO))
                    self.assertEqual(told(replies), wanted if wanted[1:] else wanted * 3)
                    self.assertEqual({(r.mailer, r.host, r.port) for r in replies}, {("ESMTP", "127.0.0.1", peer.port)})
                    self.assertEqual(len(peer.connections), 1)
                    accepted = [to for to, item in zip(TO, replies) if item.command == "DATA"]
                    self.assertTrue(offers or ("DATA" in peer.lines) == bool(accepted))
                    sent = [(accepted, TEXT)] if accepted and says.get("DATA", "354")[0] == "3" else []
                    self.assertEqual([(mail.recipients, mail.text) for mail in peer.mails], sent)

    def test_replies_that_came_together(self) -> None:
        ok, go = haineko.SMTPReply("250", "2.1.0", ("2.1.0 ok",)), haineko.SMTPReply("354", None, ("go on",))
        bye = haineko.SMTPReply("421", "4.3.2", ("4.3.2 bye", "see you"))
        for octets, wanted, rest in (
            (b"250 2.1.0 ok\r\n", (ok,), b""), (b"250 2.1.0 ok\r\n250 2.1.0 ok\n354 go on\r\n", (ok, ok, go), b""),
            (b"250 2.1.0 ok\r\n354 go", (ok,), b"354 go"), (b"250 2.1.0 ok\r\n" * 99, (ok,) * 99, b""),
            (b"250 2.1.0 ok\r\n421-4.3.2 bye\r\n421 see you\r\n", (ok, bye), b""),
            (b"250 2.1.0 ok\r\n421-4.3.2 bye\r\n", (ok,), b"421-4.3.2 bye\r\n"), (b"25", (), b"25"),
        ):  # fmt: skip
            with self.subTest(octets):
                session = haineko.Session(haineko.Route(), "here.example")
                session._feed(octets)
                self.assertEqual(tuple(iter(session._next_reply, None)), wanted)
                self.assertEqual((session.recv_buffer, session.alive), (rest, False))
        self.assertEqual(haineko.parse_reply(b"250 2.1.0 ok\r\nrubbish\r\n"), (ok, b"rubbish\r\n"))
        for octets in (b"rubbish\r\n250 ok\r\n", b"250-a\r\n251 b\r\n", b"x" * (haineko.MAX_LINE + 1)):
            with self.subTest(octets[:30]), self.assertRaises(haineko.ProtocolError):
                haineko.parse_reply(octets)
        session, octets = haineko.Session(haineko.Route(), "here.example"), b"250 2.0.0 once and for all\r\n"
        found = [session._feed(octets[i : i + 1]) or session._next_reply() for i in range(len(octets))]
        self.assertEqual(found, [None] * (len(octets) - 1) + [haineko.parse_reply(octets)[0]])
        session._feed(b"2" * (haineko.MAX_LINE + 1))
        self.assertRaises(haineko.ProtocolError, session._next_reply)

    def test_the_code_of_a_reply_decides_whatever_its_text_is(self) -> None:
        for octets in (b"250\tok", b"250 a\rb", b"250 ok\r", b"250", b"250 \xff\x00", b"250 " + b"x" * 6000):
            with self.subTest(octets[:30]):
                (code, _, [line]), rest = haineko.parse_reply(octets + b"\r\n")
                self.assertEqual((code, rest), ("250", b""))
                self.assertTrue(line.isprintable() and len(line) <= haineko.MAX_TEXT + len("..."))

    def test_replies_are_read_in_linear_time(self) -> None:
        for octets in (b"250-" + b"\r" * 65536 + b"x\n", b"250-" + b"\r" * 65536, b"250" + b"\t" * 65536 + b"x\n"):
            began = time.perf_counter()
            with contextlib.suppress(haineko.ProtocolError):
                for end in range(4096, len(octets) + 4096, 4096):
                    haineko.parse_reply(octets[:end])
            self.assertLess(time.perf_counter() - began, 0.5)
        for octet in (b"x", b"\r"):
            line = b"250 " + octet * haineko.MAX_LINE + b"\r\n"
            self.assertRaises(haineko.ProtocolError, haineko.parse_reply, line)

    def test_a_go_ahead_with_no_valid_recipient_gets_a_lone_dot(self) -> None:
        for says in ({"RCPT": "550 5.1.1 no"}, {"MAIL": "550 5.7.1 not you"}):
            with self.subTest(says=says):
                peer = self.peer(says, "PIPELINING")
                first, _ = carried(job(peer, TO), job(peer, TO))
                self.assertEqual({item.code for item in first}, {"550"})
                self.assertEqual((peer.lone, peer.mails, len(peer.connections)), (2, [], 1))

    def test_with_pipelining_the_envelope_is_one_flight_and_the_text_waits_for_its_go_ahead(self) -> None:
        def together(connection, line) -> None:
            seen.append(connection.unread.count(b"\r\n"))

        def early(connection, line) -> None:
            seen.append(bool(connection.unread or select.select([connection.sock], [], [], 0.05)[0]))

        for offers, wanted in (((), 0), (("PIPELINING",), 4)):
            seen: list = []
            peer = self.peer({"MAIL": together, "DATA": early}, *offers)
            carried(job(peer, TO))
            self.assertEqual((seen, len(peer.mails)), ([wanted, False], 1))

    def test_many_recipients_are_cut_into_flights_that_fill_no_buffer(self) -> None:
        to = tuple(f"{name}{i}@example.jp" for i, name in enumerate("ab" * 400))
        peer = self.peer({"RCPT": refuses(b="550 5.1.1 no")}, "PIPELINING")
        [replies] = carried(job(peer, to))
        self.assertEqual([item.code for item in replies], ["250", "550"] * 400)
        self.assertEqual(len(peer.mails[0].rcpt), 400)

    def test_all_lines_of_a_reply_are_handed_on(self) -> None:
        peer = self.peer({".": "250-2.0.0 one\n250-2.0.0 two\x1b[1m\n250 2.0.0 ok \N{SNOWMAN}"})
        [[said]] = carried(job(peer))
        self.assertEqual(said.message, ("2.0.0 one", "2.0.0 two?[1m", "2.0.0 ok \N{SNOWMAN}"))

    def test_names_in_ehlo_and_in_helo_to_an_old_server(self) -> None:
        container, address = haineko.local_hostname("my_container"), "[127.0.0.1]"  # that of one without a domain
        for hostname, name in ((NAME, NAME), (container, address), ("3f2a9c0d1e2b.localdomain", address)):
            peer = self.peer({"EHLO": "502 5.5.1 what?"})
            [[said]] = carried(job(peer, hostname=hostname))
            self.assertEqual((said.code, peer.lines[:2]), ("250", [f"ehlo {name}", f"helo {name}"]))

    def test_parameters_are_those_that_are_offered(self) -> None:
        size = f" SIZE={len(TEXT)}"
        for mail, rcpt, *offers in (
            ("", ""), ("", "", "8BITMIME"), (size, "", "SIZE"),
            (f"{size} RET=FULL", " NOTIFY=FAILURE,DELAY", "DSN", "SIZE 5000000"),
        ):  # fmt: skip
            peer = self.peer({}, *offers)
            carried(job(peer))
            wanted = f"MAIL FROM:<kijitora@example.org>{mail}", [f"RCPT TO:<a@example.jp>{rcpt}"]
            self.assertEqual(peer.mails[0][:2], wanted)

    def test_dots_are_stuffed_and_a_large_text_arrives_octet_for_octet(self) -> None:
        large = b"Subject: large\r\n\r\n" + b"".join(b".%d\r\n" % i * 9 for i in range(30000))
        for text in (b".first\r\n.\r\n..two\r\nin.side\r\n.\r\n", large):
            peer = self.peer({}, "PIPELINING")
            self.assertEqual(told(carried(job(peer, text=text))[0]), [FINE])
            self.assertTrue(peer.mails[0].text == re.sub(rb"(?m)^\.", b"..", text))

    @unittest.skipUnless(has_ipv6(), "no IPv6 here")
    def test_a_next_hop_by_ipv6(self) -> None:
        peer = self.peer({}, "AUTH PLAIN", hosts=("::1",), logins=LOGINS)
        self.assertEqual(told(carried(job(peer, **LOGIN))[0]), [FINE])

    # -- what goes wrong

    def test_nobody_listens(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        [replies] = carried(job(haineko.Route(port=port), TO))
        self.assertEqual(told(replies), ["421 4.4.1 CONN"] * 3)
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
            self.assertEqual(told(replies), ["421 4.3.2 RCPT"] * 3)
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
        full = b"452 4.3.1 disk full\r\n"  # the second one reads nothing more
        ends = HANG_UP, lambda *_: released.wait(8) and HANG_UP, lambda talk, _: talk.sock.sendall(full) or HANG_UP
        results = side_by_side(*[(job(self.peer({"TEXT": end}), text=text, timeout=1),) for end in ends])
        released.set()
        for i, ([[said]], _) in enumerate(results):
            with self.subTest(i):
                self.assertFalse(said.maybe_delivered, said)
                self.assertEqual((said.code[0], said.command), ("4", "DATA"))

    # -- TLS

    def test_starttls_is_done_and_verified_or_nothing_is_sent(self) -> None:
        here, elsewhere = certificate("here"), certificate("elsewhere")
        trusted, clear = {"ca_file": here}, b"220 go\r\n250-peer\r\n250 AUTH PLAIN\r\n"
        twice_no = {"EHLO": [None, "550 5.7.1 no"], "HELO": "550 5.7.1 no"}
        cases = (  # certificate, what the peer says, more of the route, what is told
            (here, {}, trusted, FINE), (here, {}, {}, "421 4.7.5 STARTTLS"),  # nobody knows who made it
            (elsewhere, {}, {"ca_file": elsewhere}, "421 4.7.5 STARTTLS"), (elsewhere, {}, {"tls_verify": False}, FINE),
            (here, {"EHLO": ["250-in clear\n250-STARTTLS\n250 DSN", "250 under TLS"]}, trusted, FINE),
            (here, {}, {"starttls": False}, FINE), (here, {"EHLO": "250 none"}, trusted, "454 4.7.4 STARTTLS"),
            (here, {"STARTTLS": "454 4.7.0 later"}, {}, "454 4.7.0 STARTTLS"),
            (here, {"STARTTLS": HANG_UP}, {}, "421 4.4.2 STARTTLS"),
            *((here, {verb: SILENCE}, {}, "421 4.4.2 STARTTLS") for verb in ("STARTTLS", "TLS")),
            (here, {"STARTTLS": clear}, trusted, "421 4.5.0 STARTTLS"),  # words in clear behind the reply
            (here, twice_no, trusted, "550 5.7.1 EHLO"),
        )  # fmt: skip
        peers = [self.peer(says, "STARTTLS", "SIZE", tls=pem) for pem, says, *_ in cases]
        jobs = [(job(peer, **{"starttls": True, "timeout": 0.7, **case[2]}),) for peer, case in zip(peers, cases)]
        for (pem, says, more, wanted), peer, ([replies], _) in zip(cases, peers, side_by_side(*jobs)):
            with self.subTest(says, more=more, pem=pem):
                self.assertEqual(told(replies), [wanted])
                self.assertEqual(any(line.startswith("MAIL") for line in peer.lines), wanted == FINE)
                if wanted == FINE:
                    secure = more.get("starttls", True)
                    self.assertEqual(peer.connections[0].secure, secure)
                    verbs = ["ehlo", "STAR", "ehlo", "MAIL"] if secure else ["ehlo", "MAIL"]
                    self.assertEqual([line[:4] for line in peer.lines][: len(verbs)], verbs)
                    self.assertNotIn("RET=", peer.mails[0].mail)

    def test_port_465_is_tls_from_the_first_octet(self) -> None:
        pem, place = certificate(), "127.0.0.46"
        try:
            peer = self.peer({}, "SIZE", tls=pem, smtps=True, hosts=(place,), port=haineko.SMTPS)
        except OSError as fault:
            self.skipTest(f"port 465 of {place}: {fault}")
        for says, more, wanted in (
            (None, {"ca_file": pem}, FINE), (None, {}, "421 4.4.1 CONN"),
            (SILENCE, {"ca_file": pem, "timeout": 0.3}, "421 4.4.1 CONN"),
        ):  # fmt: skip
            peer.says["TLS"] = says
            self.assertEqual(told(carried(job(peer, **more))[0]), [wanted])
        self.assertEqual(len(peer.mails), 1)

    # -- AUTH

    def test_the_strongest_mechanism_that_is_offered_logs_in_and_the_log_shows_no_secret(self) -> None:
        haineko.log.devel = True
        self.addCleanup(setattr, haineko.log, "devel", False)

        def asks(*turns: bytes):
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

        wrong, none, every = "535 5.7.8 AUTH", "454 4.7.0 AUTH", "LOGIN PLAIN CRAM-MD5"
        names, too_many = every.split(), b"535 5.7.8 wrong\r\n421 4.7.0 too many errors\r\n"
        cases = (  # offered, what the peer says, the mechanisms tried, what is told, another password
            ("PLAIN LOGIN CRAM-MD5", None, "CRAM-MD5", FINE), ("LOGIN PLAIN", None, "PLAIN", FINE),
            ("=LOGIN", None, "LOGIN", FINE), ("GSSAPI NTLM", None, "", none), ("", None, "", none),
            *((name, None, name, FINE, word) for name in names for word in ("nyaa", "nyaa-にゃあ-é", "x" * 600)),
            *((name, None, name, wrong, "wrong") for name in names),
            *(("PLAIN", says, "PLAIN", "421 4.4.2 AUTH") for says in (HANG_UP, SILENCE)),
            ("PLAIN", b"welcome!\r\n", "PLAIN", "421 4.5.0 AUTH"),
            ("CRAM-MD5", b"334 a\r\n", "CRAM-MD5", "421 4.5.0 AUTH"),
            ("LOGIN", b"334 \r\n" * 50, "LOGIN", "421 4.5.0 AUTH"),
            (every, "535 5.7.8 wrong", "CRAM-MD5", wrong), (every, too_many, "CRAM-MD5", wrong),
            (every, "454 4.7.0 later", "CRAM-MD5", none), (every, ["504 5.5.4 unknown", None], "CRAM-MD5 PLAIN", FINE),
            (every, ["534 5.7.9 too weak", "504 no", None], "CRAM-MD5 PLAIN LOGIN", FINE),
            (every, "534 5.7.9 too weak", "CRAM-MD5 PLAIN LOGIN", "534 5.7.9 AUTH"),
            ("PLAIN LOGIN", "501 5.5.2 what", "PLAIN", "501 5.5.2 AUTH"),
            *(("LOGIN", asks(*turns), "LOGIN", FINE) for turns in (
                (b" VXNlcm5hbWU6", b" UGFzc3dvcmQ6"),  # Username: Password:
                (b" VXNlciBOYW1lAA==", b" UGFzc3dvcmQA"), (b" VXNlciBOYW1lAA", b" UGFzc3dvcmQA"),  # without padding
                (b" Username:", b" Password:"), (b" please send your user name", b" and the password, please"),
                (b" go on", b" go on"), (b" ", b" "), (b"", b""),
            )),
        )  # fmt: skip
        peers, jobs, secrets = [], [], {"Traceback"}
        for offer, says, _, _, *words in cases:
            word = words[0] if words else "nyaa"
            logins = {"kijitora": "nyaa" if word == "wrong" else word}
            peers.append(self.peer({"AUTH": says}, f"AUTH {offer}".replace(" =", "="), logins=logins))
            jobs.append((job(peers[-1], auth="x", credentials=("kijitora", word), timeout=0.7),))
            forms = (base64.b64encode(text.encode()).decode() for text in (word, f"\0kijitora\0{word}"))
            secrets.update((word, *forms) if word != "wrong" else forms)  # the servers say that word
        for (offer, says, tried, wanted, *words), peer, ([replies], _) in zip(cases, peers, side_by_side(*jobs)):
            with self.subTest(offer, says=says, words=words):
                self.assertEqual(told(replies), [wanted])
                commands = [line for line in peer.lines if line.startswith("AUTH")]
                self.assertEqual(" ".join(line.split()[1] for line in commands), tried)
                self.assertLessEqual(max(map(len, commands), default=0), 510)
                self.assertEqual(len(peer.mails), wanted == FINE)
                self.assertFalse([secret for secret in secrets if secret in str(replies)])
        lines = self.logged()
        for line in ("> MAIL FROM:<kijitora@example.org>", "< 250 2.0.0 taken", "> ********"):
            self.assertIn(f"127.0.0.1 {line}", lines)
        self.assertEqual([line for line in lines if any(secret in line for secret in secrets)], [])

    def test_credentials_do_not_cross_a_network_in_clear(self) -> None:
        place = outside_address()
        if not place:
            self.skipTest("this machine has no address but loopback")
        peer = self.peer({}, "STARTTLS", "AUTH PLAIN", hosts=(place,), logins=LOGINS, tls=certificate())
        self.assertEqual(told(carried(job(peer, **LOGIN))[0]), ["454 4.7.11 AUTH"])
        eventually(lambda: [line[:4] for line in peer.lines] == ["ehlo", "QUIT"])
        self.assertEqual(told(carried(job(peer, **LOGIN, starttls=True, tls_verify=False))[0]), [FINE])

    def test_a_fault_of_the_route_is_no_verdict_on_the_mail(self) -> None:
        pem = certificate()
        for says, offer, more, wanted, fault in (
            ({"AUTH": "535 5.7.8 wrong"}, "AUTH PLAIN", LOGIN, "535 5.7.8 AUTH", True),
            ({"AUTH": "504 5.5.4 what"}, "AUTH PLAIN LOGIN", LOGIN, "504 5.5.4 AUTH", True),
            ({"EHLO": "550 5.7.1 no", "HELO": "550 5.7.1 no"}, "", {}, "550 5.7.1 EHLO", True),
            ({"STARTTLS": "554 no"}, "STARTTLS", {"starttls": True}, "554 None STARTTLS", True),
            *(({verb: "530 5.7.0 log in first"}, "", {}, f"530 5.7.0 {verb}", True) for verb in ("MAIL", "RCPT")),
            ({"MAIL": "550 5.7.1 not with this login"}, "AUTH PLAIN", LOGIN, "550 5.7.1 MAIL", True),
            ({"MAIL": "550 5.7.1 not you"}, "", {}, "550 5.7.1 MAIL", False),
            ({"RCPT": "550 5.7.1 no relaying"}, "AUTH PLAIN", LOGIN, "550 5.7.1 RCPT", False),
            ({"CONN": "554 5.7.1 no"}, "", {}, "554 5.7.1 CONN", False),
        ):
            with self.subTest(says):
                [[reply]] = carried(job(self.peer(says, offer, logins=LOGINS, tls=pem), **more))
                self.assertEqual(told([reply]), [wanted])
                self.assertEqual((reply.route_fault, reply.temporary, reply.from_server), (fault, fault, True))
        logged = [line for line in self.logged() if "warning: " in line]
        self.assertEqual((len(logged), "535 5.7.8 wrong" in logged[0]), (7, True))

    # -- sessions kept

    def test_a_session_is_kept_and_used_again_until_quit(self) -> None:
        """After a refusal it is cleared first."""
        for says, offers, codes, verbs in (
            *(({}, offers, ["250"] * 3, "MAIL RCPT DATA " * 3 + "QUIT") for offers in ((), ("PIPELINING",))),
            ({"RCPT": ["550 5.1.1 no", "250 yes"]}, (), ["550", "250"], "MAIL RCPT RSET MAIL RCPT DATA QUIT"),
        ):
            peer = self.peer(says, *offers)
            self.assertEqual([said.code for [said] in carried(*[job(peer) for _ in codes])], codes)
            self.assertEqual((len(peer.connections), len(peer.mails)), (1, codes.count("250")))
            eventually(lambda peer=peer: peer.lines[-1] == "QUIT")
            self.assertEqual(" ".join(line[:4] for line in peer.lines[1:]), verbs)

    def test_a_kept_session_that_died_is_replaced_once_and_never_after_the_text(self) -> None:
        well, goodbye = None, "421 4.4.2 idle for too long"
        cases = (  # what it says, what the second of two mails is told, connections, mails that came
            *(({verb: [well, said, well]}, FINE, 2, 2) for verb, said in (
                ("MAIL", HANG_UP), ("MAIL", goodbye), ("RCPT", goodbye), ("DATA", goodbye), ("DATA", b"rubbish\r\n"),
                ("DATA", SILENCE),
            )),
            *(({".": [well, said, well]}, "421 4.4.2 DATA", 1, 2) for said in (goodbye, HANG_UP, SILENCE)),
            ({"MAIL": [well, HANG_UP, HANG_UP, well]}, "421 4.4.2 MAIL", 2, 1),
            ({"MAIL": [well, HANG_UP], "CONN": [well, "554 5.3.2 no"]}, "554 5.3.2 CONN", 2, 1),
        )  # fmt: skip
        table = [(offers, *case) for offers in ((), ("PIPELINING",)) for case in cases]
        peers = [self.peer({verb: said[:] for verb, said in says.items()}, *offers) for offers, says, *_ in table]
        results = side_by_side(*[(job(peer, timeout=0.7), job(peer, timeout=0.7)) for peer in peers])
        for (offers, says, wanted, connections, mails), peer, ([first, second], _) in zip(table, peers, results):
            with self.subTest(says=says, offers=offers):
                self.assertEqual((first[0].code, told(second)), ("250", [wanted]))
                self.assertEqual((len(peer.connections), len(peer.mails)), (connections, mails))

    def at_once(self, peer: SmtpPeer, count: int, timeout: float = 9.0, after=lambda: None, **more) -> dict:
        """How often each (code, command) was said to so many mails that come at the same moment."""
        sessions, found = haineko.TransportContext(), collections.Counter()

        async def one(i: int) -> None:
            mail = job(peer, (f"r{i}@example.jp",), timeout=timeout, **more)
            outcome = await haineko.attempt_transaction(mail, sessions)
            found.update((item.code, item.command) for item in outcome.replies)
            after()

        haineko.run(and_closed(together(*[one(i) for i in range(count)]), sessions))
        self.assertEqual(sessions.pools, {})
        return found

    def test_a_few_sessions_are_opened_at_a_time(self) -> None:
        most, count = haineko.SessionPool.OPENING, haineko.SessionPool.OPENING * 2 + 8
        greeted, early = threading.Barrier(most), []

        def greet(connection: SmtpConnection, line: str) -> None:
            if len(peer.connections) <= most:
                greeted.wait(9)  # for all that may come
                early.append(len(peer.connections))

        peer = self.peer({"CONN": greet})
        self.assertEqual(self.at_once(peer, count), {("250", "DATA"): count})
        self.assertEqual((early[:1], len(peer.mails)), ([most], count))

    def test_who_waits_to_open_a_session_gets_one_that_is_given_back(self) -> None:
        most, gate = haineko.SessionPool.OPENING, threading.Event()
        count = most * 3
        self.addCleanup(gate.set)

        def greet(connection: SmtpConnection, line: str) -> None:
            if peer.connections.index(connection) >= most:
                gate.wait(9)

        def taken(connection: SmtpConnection, line: str) -> None:
            if len(peer.mails) + 1 >= count - most:  # all but those whose sessions are being opened
                gate.set()

        peer = self.peer({"CONN": greet, ".": taken})
        self.assertEqual(self.at_once(peer, count), {("250", "DATA"): count})
        self.assertLessEqual(len(peer.connections), 2 * most)

    def crowded(self, places: int, ends: bool, mails: int, verb: str, no: str) -> SmtpPeer:
        """A peer that takes so many sessions at a time, and ends each after a mail or not, or instead of one more;
        what it says to one more session at that verb."""
        lock, taken = threading.Lock(), []

        def greet(connection: SmtpConnection, line: str):
            with lock:
                if len(taken) < places:
                    taken.append(connection)
            return refuse(connection, line) if verb == "CONN" else None

        def refuse(connection: SmtpConnection, line: str):
            if connection in taken:
                return None
            if no == LOST:  # with a reset
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            return no

        def end(connection: SmtpConnection, line: str) -> bytes:
            with lock:
                taken.remove(connection)
                return b"250 2.0.0 taken\r\n421 4.3.2 one mail a session\r\n"

        def begin(connection: SmtpConnection, line: str):
            if sum(old.startswith("MAIL") for old in connection.lines) <= mails:
                return None
            with lock:
                taken.remove(connection)
                return "421 4.7.0 too many mails"

        says = {"MAIL": begin, ".": end if ends else None, verb: refuse, "CONN": greet}
        return self.peer(says, "AUTH PLAIN", logins=LOGINS)

    def test_a_server_that_takes_few_sessions_gets_all_mail(self) -> None:
        """Whatever ends an opening while others work is a limit."""
        count, busy = 40, "421 4.7.0 too many of you"
        for places, ends, mails, verb, no in (
            *((places, ends, 99, "CONN", busy) for places in (1, 3) for ends in (False, True)),
            (3, False, 3, "CONN", busy),
            *((3, False, 99, "CONN", no) for no in (HANG_UP, LOST, "554 5.7.0 too many")),
            *((3, False, 99, verb, busy) for verb in ("EHLO", "AUTH")),
        ):
            with self.subTest(places=places, ends=ends, mails=mails, verb=verb, no=no):
                peer = self.crowded(places, ends, mails, verb, no)
                found = self.at_once(peer, count, **LOGIN if verb == "AUTH" else {})
                self.assertEqual((found, len(peer.mails)), ({("250", "DATA"): count}, count))
                if mails == 99 and no == busy and verb == "CONN":
                    most = haineko.SessionPool.OPENING + (count if ends else places)
                    self.assertLessEqual(len(peer.connections), most)

    def test_who_is_refused_takes_a_session_that_was_given_back_meanwhile(self) -> None:
        gate = threading.Event()
        self.addCleanup(gate.set)

        def greet(connection: SmtpConnection, line: str):
            if connection is peer.connections[0]:
                return None
            gate.wait(9)
            return "421 4.7.0 too many of you"

        peer = self.peer({"CONN": greet})
        self.assertEqual(self.at_once(peer, 2, after=gate.set), {("250", "DATA"): 2})
        self.assertEqual((len(peer.connections), len(peer.mails)), (2, 2))

    WORDS = haineko.Reply("421", "4.7.0", "CONN", ("4.7.0 too many",), "ESMTP", "peer.example", 25)

    def test_who_waits_for_a_session_in_use_waits_until_the_deadline(self) -> None:
        """After a while, one of them asks the server that had enough again."""

        async def story() -> None:
            pool = haineko.SessionPool()
            pool.opening = 4
            pool.opened()
            self.assertEqual([pool.refused(self.WORDS) for _ in range(3)], [True] * 3)
            self.assertFalse(pool.may_open())
            later = 11.0, None  # came later, and was not refused itself
            futures = [pool.wait(*values) for values in ((10.0, self.WORDS), later, *[(9e9, self.WORDS)] * 3)]

            def found() -> list:
                done = [future.exception() or future.result() for future in futures if future.done()]
                return [fault and fault.reply for fault in done]

            for now, count in ((9.9, 0), (10.0, 1), (11.0, 2)):
                pool.sweep(now)
                self.assertEqual(found(), [self.WORDS] * count)
            pool.ask_again = 0.0
            pool.sweep(0.0)
            self.assertEqual((found()[2:], pool.opening), ([None], 1))
            pool.opened()
            self.assertEqual((found()[2:], pool.opening), ([None] * 3, 2))

        haineko.run(story())

    def test_where_a_session_can_not_be_opened_nobody_waits_on(self) -> None:
        most = haineko.SessionPool.OPENING
        count = most * 2 + 8
        some = {("421", "CONN"): most, ("250", "DATA"): count - most}
        for says, wanted in (
            *(({"CONN": [f"421 {dsn} busy"] * most + ["220 here"]}, some) for dsn in ("4.3.2", "4.4.1")),
            ({"CONN": HANG_UP}, {("421", "CONN"): count}),
            ({"EHLO": "421 4.3.2 closing"}, {("421", "EHLO"): count}),
            ({".": "421 4.3.2 one mail a session"}, {("421", "DATA"): count}),
        ):
            with self.subTest(wanted):
                self.assertEqual(self.at_once(self.peer(says), count), wanted)

    def test_a_host_that_is_silent_costs_its_timeout_once(self) -> None:
        most = haineko.SessionPool.OPENING
        for verb in ("CONN", "EHLO"):
            took = []
            while len(took) < 3 and min(took, default=1) >= 0.95:  # a busy machine may be late once
                peer, began = self.peer({verb: SILENCE}), time.monotonic()
                self.assertEqual(self.at_once(peer, most * 3, timeout=0.5), {("421", verb): most * 3})
                took.append(time.monotonic() - began)
                self.assertLessEqual(len(peer.connections), most)
            self.assertLess(min(took), 0.95)

    def test_what_a_server_says_to_a_kept_session_is_no_reply_to_the_next_mail(self) -> None:
        async def twice(goodbye: bytes) -> list:
            first = await haineko.attempt_transaction(job(peer), sessions)
            peer.connections[0].sock.sendall(goodbye) if goodbye else peer.connections[0].cut()
            [[kept]] = [pool.idle for pool in sessions.pools.values()]
            await kept.stream.wait_ready(time.monotonic() + 5)
            second = await haineko.attempt_transaction(job(peer), sessions)
            return [item.code for outcome in (first, second) for item in outcome.replies]

        for goodbye in (b"554 5.4.7 idle for too long\r\n", b"451 4.7.0 timeout\r\n", b""):
            with self.subTest(goodbye):
                peer, sessions = self.peer(), haineko.TransportContext()
                self.assertEqual(haineko.run(and_closed(twice(goodbye), sessions)), ["250", "250"])
                self.assertEqual(len(peer.connections), 2)

    def test_who_says_goodbye_while_a_session_is_opened_is_not_kept(self) -> None:
        peer = self.peer({"EHLO": b"250-here\r\n250 PIPELINING\r\n421 4.3.2 closing\r\n"})
        sessions = haineko.TransportContext()
        outcome = haineko.run(haineko.attempt_transaction(job(peer), sessions))
        self.assertEqual(told(outcome.replies), ["421 4.3.2 MAIL"])
        self.assertEqual([pool.idle for pool in sessions.pools.values()], [[]])

    def test_sessions_of_other_credentials_are_others(self) -> None:
        peer = self.peer({}, "AUTH PLAIN", logins={"a": "1", "b": "2"})
        carried(job(peer, auth="x", credentials=("a", "1")), job(peer, auth="x", credentials=("b", "2")))
        self.assertEqual([connection.user for connection in peer.connections], ["a", "b"])

    def test_sessions_that_nobody_uses_are_left(self) -> None:
        async def idle_for_a_while(limit: str, refusal: haineko.Reply | None) -> None:
            sessions = haineko.TransportContext()
            await haineko.attempt_transaction(job(peer), sessions)
            [pool] = sessions.pools.values()
            pool.refusal = refusal
            for seconds, count in ((9, 1), (-1, 0)):
                setattr(sessions, limit, seconds)
                await sessions.sweep()
                self.assertEqual(len(sessions.pools), count)

        for limit, refusal in (("IDLE", None), ("IDLE_WHEN_FULL", self.WORDS)):
            with self.subTest(limit):
                peer = self.peer()
                haineko.run(idle_for_a_while(limit, refusal))
                eventually(lambda peer=peer: peer.lines[4:] == ["QUIT"])

    def test_a_session_that_reached_a_limit_is_replaced_once(self) -> None:
        def say(talk: SmtpConnection, line: str) -> str | None:
            return no if sum(old.startswith("MAIL") for old in talk.lines) > 2 else None

        for verb, no in (
            ("MAIL", "452 4.4.5 too many mails"), ("MAIL", "421 4.7.0 too many mails"),
            ("RCPT", "451 4.7.1 too many recipients"), ("DATA", "451 4.3.0 too many mails"),
            ("RCPT", "452 4.5.3 Too many recipients: Too many messages sent"),
        ):  # fmt: skip
            for offers in ((), ("PIPELINING",)):
                with self.subTest(no, offers=offers):
                    peer = self.peer({verb: say}, *offers)
                    replies = carried(*[job(peer)] * 6)
                    self.assertEqual([reply.code for [reply] in replies], ["250"] * 6)
                    self.assertEqual((len(peer.connections), len(peer.mails)), (3, 6))
                    if no[:3] != "421":
                        eventually(lambda lines=peer.connections[0].lines: "QUIT" in lines)

    def test_only_who_was_refused_for_now_is_tried_again(self) -> None:
        def say(talk: SmtpConnection, line: str) -> str | None:
            return "450 4.2.0 later" if line[9:10] == "b" and peer.mails and talk is peer.connections[0] else None

        for offers in ((), ("PIPELINING",)):
            peer = self.peer({"RCPT": say}, *offers)
            _, replies = carried(job(peer), job(peer, TO))
            self.assertEqual([reply.code for reply in replies], ["250"] * 3)
            self.assertEqual([mail.recipients for mail in peer.mails], [[TO[0]], [TO[0], TO[2]], [TO[1]]])
        peer = self.peer({"RCPT": refuses(b="450 4.2.0 later")})
        replies = carried(job(peer, TO), job(peer, TO))
        self.assertEqual([[reply.code for reply in its] for its in replies], [["250", "450", "250"]] * 2)
        self.assertEqual((len(peer.connections), len(peer.mails)), (2, 2))

    def test_a_session_that_fails_by_a_bug_gives_back_what_it_has(self) -> None:
        session, given_back = haineko.Session(haineko.Route(), "x"), []
        session.on_close.callback(given_back.append, 1)
        session.steps = lambda: (lambda: int("bug"),)
        self.assertRaises(ValueError, session.open)
        self.assertEqual(given_back, [1])

    def test_nobody_is_tried_again_after_the_text_however_many_sessions_are_replaced(self) -> None:
        class Reusing(haineko.TransportContext):
            """As where the server takes no more sessions and others are given back."""

            async def acquire(self, route: haineko.Route, hostname: str) -> tuple:
                session = self.acquire_idle(route, hostname)
                return (session, True) if session else await super().acquire(route, hostname)

        async def four() -> list:
            await asyncio.gather(*[haineko.attempt_transaction(job(peer), sessions) for _ in range(3)])
            return told((await haineko.attempt_transaction(job(peer, TO), sessions)).replies)

        peer = self.peer({"RCPT": refuses(b="450 4.2.0 later"), ".": [None, None, None, "451 4.3.0 later"]})
        sessions = Reusing()
        wanted = ["451 4.3.0 DATA", "450 4.2.0 RCPT", "451 4.3.0 DATA"]
        self.assertEqual(haineko.run(and_closed(four(), sessions)), wanted)
        self.assertEqual((len(peer.connections), len(peer.mails)), (4, 4))
        self.assertEqual(sum(line.startswith("RCPT TO:<b@") for line in peer.lines), 4)


class BeyondAscii(Peers):
    """Addresses, 8-bit octets and large files, to a next hop."""

    def test_what_is_sent_and_what_is_refused(self) -> None:
        neko, plain, own = "ねこ@example.jp", "a@example.jp", "MAIL FROM:<kijitora@example.org>"
        eight, utf8 = ("8BITMIME",), ("8BITMIME", "SMTPUTF8", "PIPELINING")
        as_8bit, as_utf8, word = " BODY=8BITMIME", " BODY=8BITMIME SMTPUTF8", "=?UTF-8?B?54yr?="
        to_neko, to_plain, to_b = (f"RCPT TO:<{to}>" for to in (neko, plain, "b@example.jp"))
        refused, bad, ess = "553 5.6.7 RCPT", "553 5.1.5 RCPT", "U+00DF has two readings in a domain"
        both, alone = document(rcpt=[neko, plain]), document(rcpt=[neko])
        shown = document(rcpt=None, header={"to": plain, "bcc": [neko, "b@example.jp"]})
        by_neko = document(mail=neko, header={"from": None})
        reply_to = document(header={"replyto": f"ねこ <{neko}>", "subject": "猫"})
        mikeneko, from_a = "RCPT TO:<mikeneko@example.jp>", "MAIL FROM:<a@example.org>"
        domains = document(mail="a@例え.jp", rcpt=["b@日本語.jp", "c@straße.de"], header={"from": None})
        in_ascii = ["MAIL FROM:<a@xn--r8jz45g.jp>", "RCPT TO:<b@xn--wgv71a119e.jp>"]
        mime = "MIME-Version: 1.0\nContent-Type: text/plain; charset=UTF-8\nContent-Transfer-Encoding: 8bit\n"
        octets, subject, name, number = (
            {"mail": "a@example.org", "rcpt": [plain], "raw": raw}
            for raw in (
                f"From: a@example.org\n{mime}\n猫\n",
                f"From: a@example.org\nSubject: 猫\n{mime}\n猫\n",
                "From: ねこ <a@example.org>\nSubject: 猫\n\nx\n",
                f"Message-ID: <ü@example.org>\nFrom: a@example.org\nSubject: 猫\n{mime}\n猫\n",
            )
        )
        for submission, offers, status, told_, lines, *words in (
            (both, utf8, 200, FINE, [own, own + as_utf8, to_plain, to_neko], f"\nTo: {neko}\r", f"\nTo: {plain}\r"),
            (both, eight, 207, [refused, FINE], [own, to_plain]),
            (alone, eight, 400, refused, []),
            (shown, utf8, 200, FINE, [own + as_utf8, to_plain, to_b, to_neko]),
            (shown, (), 207, [FINE, refused, FINE], [own, to_plain, to_b]),
            (by_neko, utf8, 200, FINE, [f"MAIL FROM:<{neko}>{as_utf8}", mikeneko], f"\r\nFrom: {neko}\r\n"),
            (by_neko, eight, 400, "553 5.6.7 MAIL", []),
            (reply_to, utf8, 200, FINE, [own + as_utf8, mikeneko], f" <{neko}>\r\n", f"\nSubject: {word}\r\n"),
            (reply_to, (), 502, "554 5.6.9 MAIL", []),
            (domains, (), 207, [FINE, bad], in_ascii, ess),
            (document(mail="a@faß.de"), (), 400, "553 5.5.4 MAIL", [], ess),
            (document(rcpt="a@faß.de"), (), 400, bad, [], ess),
            (subject, eight, 200, FINE, [from_a + as_8bit, to_plain], f"\r\nSubject: {word}\r\n", "\r\n\r\n猫\r\n"),
            (subject, (), 200, FINE, [from_a, to_plain]),
            (number, eight, 502, "554 5.6.9 MAIL", [], "in message-id"),
            (octets, utf8, 200, FINE, [from_a + as_8bit, to_plain], "-Encoding: 8bit\r"),
            (octets, eight, 200, FINE, [from_a + as_8bit, to_plain], "-Encoding: 8bit\r"),
            (octets, (), 200, FINE, [from_a, to_plain], "-Encoding: quoted-printable\r"),
            (name, utf8, 200, FINE, [from_a + as_utf8, to_plain], "Subject: 猫\r\n"),
            (name, eight, 200, FINE, [from_a, to_plain], f"Subject: {word}\r\n"),
            (name, (), 200, FINE, [from_a, to_plain], f"Subject: {word}\r\n"),
        ):
            with self.subTest(submission, offers=offers):
                peer = self.peer(None, *offers)
                force = settings(mailertable={"default": esmtp(peer)}, smtpd={"hostname": NAME})
                found, answer = posted(submission, force)
                items = answer["response"]
                self.assertEqual(found, status)
                wanted = told_ if isinstance(told_, list) else [told_] * len(items)
                self.assertEqual([f"{item['code']} {item['dsn']} {item['command']}" for item in items], wanted)
                self.assertEqual(sorted(line for line in peer.lines if line[:4] in ("MAIL", "RCPT")), sorted(lines))
                self.assertEqual(len(peer.mails), sum(line.startswith("MAIL") for line in lines))
                texts = [mail.text.decode() for mail in peer.mails]
                for piece in words:
                    self.assertIn(piece, "".join((*texts, *("\n".join(item["message"]) for item in items))))
                for mail in peer.mails:
                    self.assertTrue(as_8bit in mail.mail or mail.text.isascii())
                    body = submission.get("body") or submission["raw"].partition("\n\n")[2]
                    self.assertEqual(parsed(mail.text).get_content().replace("\r\n", "\n"), body)

    @unittest.skipUnless(os.path.exists("/proc/self/clear_refs"), "needs Linux")
    def test_a_large_file(self):
        """25 MB: four times the size of the message in memory at most, and others are served meanwhile."""
        peer = self.peer(None, "SIZE")
        table = {"default": esmtp(peer, timeout=10), "small.example": {"mailer": "Discard"}}
        smtpd = {"hostname": NAME, "max_message_size": 40 << 20}
        server = served(self, {"mailertable": table, "smtpd": smtpd})
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
        size = len(peer.mails[-1].text)
        self.assertEqual(files_in(parsed(peer.mails[-1].text))[0][2], octets)
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
        url = f"http://127.0.0.1:{peer.port}"
        web = {"base_url": url, "auth": "x", "credentials": ("a", "b"), "region": "eu-west-1"}
        token = {**web, "oauth2": haineko.OAuth2(access_token="b")}
        places = {**dict.fromkeys(PEERS, web), "Haineko": {}, "MSGraph": token, "GmailAPI": token}
        places.update({"File": {"host": self.folder}, "MX": {"private": True}})
        to = [item.replace("example.jp", "[127.0.0.1]") for item in TO] if name == "MX" else TO
        return job(peer, to, mailer=name, **places.get(name, {}), **more)

    def test_a_fault_of_our_own_is_a_reply_too(self) -> None:
        [[said]] = carried(job(self.peer())._replace(message=None))
        self.assertEqual(said[:3], ("451", "4.3.0", "DATA"))
        self.assertIn("Traceback", "\n".join(self.logged()))

    # -- File

    def saved(self, to: tuple = TO[:1], **more) -> list:
        return carried(job(haineko.Route(**{"mailer": self.folder, **more}), to)._replace(number=7))[0]

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
        gone, no_folder = os.path.join(self.folder, "gone"), self.write("file", "")
        for folder, reason in ((gone, "No such file or directory"), (no_folder, "Not a directory")):
            replies = self.saved(TO, mailer=folder)
            self.assertEqual([said[:3] for said in replies], [("451", "4.3.0", "DATA")] * 3)
            self.assertEqual(replies[0].message, ("Cannot save the message", f"{folder}: {reason}"))

    def test_no_room_for_the_whole_leaves_nothing(self) -> None:
        out = os.path.join(self.folder, "out")
        os.mkdir(out)
        table = {"default": {"mailer": out}}
        force = self.write("haineko.json", {"recipients": {"open-relay": 1}, "mailertable": table})
        limits = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (999, 999))  # noqa: E731
        words, much = ("sendmail", "-C", force, "a@example.jp"), b"Subject: x\n\n" + b"much\n" * 999
        done = run_program(*words, given=much, preexec_fn=limits)
        self.assertEqual((done.returncode, os.listdir(out)), (75, []))
        self.assertIn(b"Cannot save the message", done.stderr)

    def test_copies_do_not_overwrite_each_other(self) -> None:
        _, found = posted(document(rcpt=list(TO)), settings(mailertable={"default": {"mailer": self.folder}}))
        paths = [item["message"][0] for item in found["response"]]
        self.assertEqual(sorted(map(os.path.basename, paths)), sorted(os.listdir(self.folder)))
        for path, to in zip(paths, TO):
            with open(path, "rb") as stream:
                self.assertEqual(email.message_from_bytes(stream.read())["To"], to)

    # -- Screen, Discard

    def test_a_message_is_shown_and_nothing_is_not(self) -> None:
        for name, word in (("Screen", "Printed"), ("Discard", "Discarded")):
            [replies] = carried(job(haineko.Route(mailer=name), TO))
            self.assertEqual(replies, [haineko.Reply("200", "2.0.0", "DATA", (word,), name)] * 3)
            self.assertEqual("Meow." in "\n".join(self.logged()), name == "Screen")

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
                carried(job(haineko.Route(mailer="Screen"), text=b"Subject: x\r\n\r\n" + octets + b"\r\n"))
                head, *lines, last = [line for line in self.logged() if "attempt" not in line]
                wanted = f"--- {'Q' * 16}.1 from <kijitora@example.org> to <{TO[0]}>"
                self.assertEqual((head, last), (wanted, "---"))
                self.assertTrue(all(line.startswith("| ") for line in lines), lines)
                self.assertIn("| " + shown, lines)


ROUTE_LIMIT = "The route's limit is reached"


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
        self.assertTrue(1 < most[0] <= 3, most)

    def test_a_mail_waits_for_a_session_of_another_process_up_to_the_timeout(self):
        peer = self.peer()

        async def sent(seconds: float) -> haineko.Reply:
            transport = haineko.TransportContext()
            route = haineko.Route(port=peer.port, sessions=1, timeout=0.5)
            octet = transport.limits.open_session(route.limit_key, 1)
            asyncio.get_running_loop().call_later(seconds, transport.limits.close_session, octet)
            return (await and_closed(haineko.attempt_transaction(job(route), transport), transport)).replies[0]

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
            result = await and_closed(haineko.attempt_transaction(job(route), other), other)
            for task in tasks:
                task.cancel()
            await and_closed(asyncio.wait(tasks), busy)
            return result.replies[0]

        self.assertEqual(haineko.run(story()).code, "250")

    def test_a_rate_is_waited_for_up_to_the_timeout(self):
        peer = self.peer()
        for route, wanted in (({"rate": "2/1", "timeout": 5}, 200), ({"rate": "2/600", "timeout": 1}, 503)):
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
                peer, sessions = self.peer({"MAIL": [words, None]}), haineko.TransportContext()

                async def story(peer=peer, sessions=sessions) -> list:
                    first = [await haineko.attempt_transaction(job(peer), sessions)]
                    rest = await asyncio.gather(*[haineko.attempt_transaction(job(peer), sessions) for _ in range(6)])
                    return [result.replies[0].code for result in first + rest]

                self.assertEqual(haineko.run(and_closed(story(), sessions)), [words[:3]] + ["250"] * 6)
                self.assertLessEqual(len(peer.connections), 2)  # the first one is left after the refusal


class RouteLists(Peers):
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
                table = {"default": [{**place, **route}, esmtp(second)]}
                status, found = posted(document(), settings(mailertable=table, authinfo=login))
                item, lines = found["response"][0], self.logged()
                self.assertEqual(item["port"], second.port if tried else first.port)
                self.assertEqual(len(second.taken), int(tried))
                shown = f" fallback=ESMTP:127.0.0.1:{place['port']} "
                self.assertEqual(any(shown in line and " status=sent " in line for line in lines), tried)
                self.assertEqual(any("warning: relay=ESMTP:127.0.0.1:" in line for line in lines), tried)
                self.assertEqual(status == 200, tried or what == "taken")

    def test_each_recipient_by_itself(self):
        first, second = self.peer({"RCPT": refuses(b="451 later", c="550 no")}), self.peer()
        force = settings(mailertable={"default": [esmtp(first), esmtp(second)]})
        _, found = posted(document(header={"to": ", ".join(TO)}, rcpt=None), force)
        told = [(item["port"], item["code"]) for item in found["response"]]
        self.assertEqual(told, [(first.port, "250"), (second.port, "250"), (first.port, "550")])

    def test_a_route_that_failed_is_left_out_for_a_while(self):
        first, second = self.peer({"CONN": ["421 busy", "421 busy", None]}), self.peer()
        route = haineko.Route(port=first.port, fallbacks=(haineko.Route(port=second.port),))

        async def story() -> None:
            transport, ports = haineko.TransportContext(), []
            for step in range(5):
                if step in (2, 4):  # the pause is over
                    transport.route_pauses = dict.fromkeys(transport.route_pauses, 0.0)
                ports.append((await haineko.attempt_transaction(job(route), transport)).replies[0].port)
            await transport.sweep(everything=True)
            self.assertEqual(ports, [second.port] * 4 + [first.port])
            self.assertEqual((len(first.connections), transport.route_pauses), (3, {}))

        haineko.run(story())

    def test_all_fail(self):
        status, found = posted(document(), settings(mailertable={"default": [{"port": 1}, {"port": 2}]}))
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
        with tempfile.NamedTemporaryFile("w", suffix=".json") as force:
            table = {"default": [{"port": 1}, {"port": peer.port}]}
            json.dump({"mailertable": table, "recipients": {"open-relay": True}}, force)
            force.flush()
            for command in (("check",), ("route", "a@example.jp")):
                shown = run_here(*command, "-c", force.name)[1]
                self.assertIn(f"ESMTP 127.0.0.1:1, else ESMTP 127.0.0.1:{peer.port} (", shown)
            code, shown, _ = run_here("check", "--connect", "-c", force.name)
        self.assertIn("mailertable.default[0]: TCP: FAILED", shown)
        self.assertIn("mailertable.default[1]: TCP: connected", shown)
        self.assertEqual(code, 1)


class MxPeers(Quiet, WithCertificates):
    """A test with mail hosts on several addresses, and a name server that knows them as mx2.example and so on."""

    def setUp(self) -> None:
        Quiet.setUp(self)
        WithCertificates.setUp(self)
        self.host = self.enter(SmtpPeer(hosts=("127.0.0.2", "127.0.0.3", "127.0.0.4")))
        self.dns = self.enter(NameServer({f"mx{i}.example": {haineko.A: [f"127.0.0.{i}"]} for i in range(1, 6)}))

    def domain(self, *hosts, name: str = "neko.example") -> None:
        """What DNS says of it: MX hosts by number (preference, host)."""
        self.dns.zone[name] = {haineko.MX: [(preference, f"mx{i}.example") for preference, i in hosts]}

    def manners(self, host: SmtpPeer, manners: dict) -> None:
        """What the hosts say, by number, to mail from now on."""
        host.says_at = {f"127.0.0.{i}": says for i, says in manners.items()}
        host.mails.clear()

    def relay(self, job: haineko.Transaction, sessions: haineko.TransportContext | None = None, times: int = 1) -> list:
        """Replies to the job, each time, by sessions of its own unless some are given."""
        sessions = sessions or haineko.TransportContext((self.dns.place,))

        async def relayed() -> list:
            return [said for _ in range(times) for said in (await haineko.attempt_transaction(job, sessions)).replies]

        return haineko.run(and_closed(relayed(), sessions))

    def one(self, *recipients: str, **route) -> list:
        return self.relay(mail_to(*(recipients or ("mike@neko.example",)), **{"port": self.host.port, **route}))


class RelayMx(MxPeers):
    def test_which_host_answers(self):
        temporary, gone, two = {"CONN": "450 4.3.2 later"}, {"CONN": HANG_UP}, [(10, 2), (20, 3)]
        cases = [
            ("the best", [(20, 3), (10, 2)], {}, "250 2.0.0 DATA mx2"),
            ("the next where nobody listens", [(10, 5), (20, 3)], {}, "250 2.0.0 DATA mx3"),
            ("the next after 4xx", two, {2: temporary}, "250 2.0.0 DATA mx3"),
            ("the next after 5xx to the connection", two, {2: {"CONN": "554 no"}}, "250 2.0.0 DATA mx3"),
            ("the next after a hang-up", two, {2: gone}, "250 2.0.0 DATA mx3"),
            ("the next after 421 to MAIL", two, {2: {"MAIL": "421 bye"}}, "250 2.0.0 DATA mx3"),
            ("the next after a hang-up at RCPT", two, {2: {"RCPT": HANG_UP}}, "250 2.0.0 DATA mx3"),
            ("the third", [(1, 2), (2, 3), (3, 4)], {2: temporary, 3: gone}, "250 2.0.0 DATA mx4"),
            ("a host without an address", [(10, 9), (20, 3)], {}, "250 2.0.0 DATA mx3"),
            ("5xx to RCPT is final", two, {2: {"RCPT": "550 5.1.1 who?"}}, "550 5.1.1 RCPT mx2"),
            ("4xx to RCPT is its word", two, {2: {"RCPT": "450 4.2.0 grey"}}, "450 4.2.0 RCPT mx2"),
            ("a hang-up after the text is not repeated", two, {2: {".": HANG_UP}}, "421 4.4.2 DATA mx2"),
            ("nobody: the last word that is not final", two, {2: temporary, 3: {"CONN": "554 5.7.1 no"}},
             "450 4.3.2 CONN mx2"),
            ("nobody at all", [(10, 5)], {}, "421 4.4.1 CONN mx5"),
        ]  # fmt: skip
        for what, hosts, manners, wanted in cases:
            with self.subTest(what):
                self.manners(self.host, manners)
                self.domain(*hosts)
                [said] = self.one()
                self.assertEqual(" ".join(brief(said)), wanted + ".example")
                self.assertEqual((said.mailer, said.port), ("MX", self.host.port))

    def test_what_dns_decides(self):
        self.dns.zone.update({
            "fails.example": lambda q, _: [q.answer(code=2)], "silent.example": lambda q, _: [],
            "a-fails.example": {haineko.MX: [(1, "fails.example")]}, "bare.example": {haineko.A: ["127.0.0.4"]},
            "empty.example": {haineko.TXT: ["nothing here"]}, "null.example": {haineko.MX: [(0, "")]},
            "own.example": {haineko.MX: [(10, "relay.example.org"), (20, "mx2.example")]},
            "nowhere.example": {haineko.MX: [(10, "none.example")]},
            "alias.example": {haineko.CNAME: ["bare.example"]},
        })  # fmt: skip
        for to, code, dsn, host in (
            ("bare.example", "250", "2.0.0", "bare.example"), ("alias.example", "250", "2.0.0", "alias.example"),
            ("null.example", "556", "5.1.10", None), ("none.example", "550", "5.1.2", None),
            ("fails.example", "451", "4.4.3", None), ("silent.example", "451", "4.4.3", None),
            ("a-fails.example", "451", "4.4.3", None), ("empty.example", "550", "5.4.4", None),
            ("nowhere.example", "550", "5.4.4", None), ("own.example", "554", "5.4.6", None),
            ("[127.0.0.3]", "250", "2.0.0", "127.0.0.3"),
            ("[IPv6:::ffff:127.0.0.3]", "250", "2.0.0", "::ffff:127.0.0.3"),
        ):  # fmt: skip
            with self.subTest(to):
                [said] = self.one("a@" + to, timeout=1)
                self.assertEqual(said[:3], (code, dsn, "DATA" if host else "CONN"))
                self.assertEqual(said.host and said.host.replace("7f00:3", "127.0.0.3"), host)
                self.assertTrue(all(said.message))
                self.assertEqual(said.mailer, "MX")

    def test_ipv6(self):
        six = self.enter(SmtpPeer(hosts=("::1",)))
        self.dns.zone["six.example"] = {haineko.AAAA: ["::1"]}
        for to, host in (("a@six.example", "six.example"), ("a@[IPv6:::1]", "::1")):
            with self.subTest(to):
                [said] = self.one(to, port=six.port)
                self.assertEqual((said.code, said.host), ("250", host))

    def test_private_addresses_are_out_of_reach(self):
        self.domain((10, 2), (20, 3))
        for to in ("a@neko.example", "a@[127.0.0.2]", "a@[IPv6:::1]"):
            with self.subTest(to):
                [said] = self.one(to, private=False)
                self.assertEqual((said.code, said.dsn), ("550", "5.4.4"))
                self.assertIn("is not a public address", said.message[1])
        self.assertEqual(self.host.connections, [])

    def test_recipients_of_several_domains_by_the_command_sendmail(self):
        self.domain((10, 2))
        self.domain((10, 3), name="inu.example")
        self.manners(self.host, {3: {"RCPT": refuses(x="550 5.1.1 no dogs")}})
        route = {"mailer": "MX", "port": self.host.port, "private": 1, "timeout": 2}
        smtpd = {"hostname": "relay.example.org", "resolver": self.dns.place}
        path = os.path.join(self.folder, "haineko.json")
        with open(path, "w", encoding="utf-8") as stream:
            json.dump({"smtpd": smtpd, "recipients": {"open-relay": 1}, "mailertable": {"default": route}}, stream)
        to = ["a@neko.example", "x@none.example", "x@inu.example", "b@Neko.example", "b@inu.example"]
        code, _, err = run_here("sendmail", "-C", path, "-f", "k@example.org", *to, given="Subject: Nyaaaa\n\nMeow.\n")
        self.assertEqual(code, os.EX_UNAVAILABLE)
        self.assertIn("<x@none.example>: 550 CONN: Domain does not exist", err)
        self.assertIn("<x@inu.example>: 550 RCPT: 5.1.1 no dogs", err)
        found = sorted((mail.connection.host, mail.recipients) for mail in self.host.mails)
        self.assertEqual(found, [("127.0.0.2", ["a@neko.example", "b@Neko.example"]), ("127.0.0.3", ["b@inu.example"])])

    def test_a_bug_at_one_domain_leaves_the_replies_of_the_others(self):
        self.domain((10, 2))
        self.domain((10, 9), name="bug.example")  # a host without an address
        resolve = haineko.resolve_addresses

        async def fault(host, *values):
            return await resolve(host, *values) if host == "mx2.example" else {}["bug"]

        with patched(haineko, resolve_addresses=fault):
            replies = self.one("mike@neko.example", "tama@bug.example")
        self.assertEqual([(said.code, said.command) for said in replies], [("250", "DATA"), ("451", "DATA")])
        self.assertEqual(len(self.host.taken), 1)

    def test_a_recipient_that_is_refused_stays_refused_elsewhere(self):
        self.domain((10, 2), (20, 3))
        self.manners(self.host, {2: {"RCPT": ["550 5.1.1 who?", "421 4.3.2 bye"]}})
        refused, taken = self.one("a@neko.example", "b@neko.example")
        self.assertEqual(brief(refused), ("550", "5.1.1", "RCPT", "mx2.example"))
        self.assertEqual(brief(taken), ("250", "2.0.0", "DATA", "mx3.example"))
        self.assertEqual([mail.recipients for mail in self.host.mails], [["b@neko.example"]])

    def test_no_more_hosts_are_tried_than_a_mail_is_worth(self):
        self.dns.zone.update({f"many{i}.example": {haineko.A: ["127.0.0.2"]} for i in range(30)})
        self.dns.zone["many.example"] = {haineko.MX: [(i, f"many{i}.example") for i in range(30)]}
        self.manners(self.host, {2: {"CONN": "450 later"}})
        self.assertEqual(self.one("a@many.example")[0].code, "450")
        self.assertEqual(len(self.host.connections), haineko.MAX_MX_ATTEMPTS)

    def test_sessions_and_answers_are_used_again(self):
        self.domain((10, 2))
        said = self.relay(mail_to("a@neko.example", port=self.host.port), times=3)
        self.assertEqual([item.code for item in said], ["250"] * 3)
        self.assertEqual([connection.host for connection in self.host.connections], ["127.0.0.2"])
        self.assertEqual(len(self.host.mails), 3)
        self.assertEqual(len(self.dns.names()), len(set(self.dns.names())))

    def test_the_name_servers_of_the_settings_are_asked(self):
        first, second = haineko.Smtpd(resolver=("127.0.0.1:1",)), haineko.Smtpd(resolver=("127.0.0.1:2",))
        service = haineko.App(haineko.Settings(smtpd=first))
        before = service.transport.resolver
        service.apply(haineko.Settings(smtpd=first))
        self.assertIs(service.transport.resolver, before)  # and what it knows
        service.apply(haineko.Settings(smtpd=second))
        self.assertEqual(service.transport.resolver.nameservers, ("127.0.0.1:2",))
        self.assertIs(service.transport.mta_sts.resolver, service.transport.resolver)

    def test_tls(self):
        host = self.enter(SmtpPeer(None, ("STARTTLS",), self.tls, hosts=("127.0.0.2", "127.0.0.3")))
        self.domain((10, 2), (20, 3))
        breaks, early = {"TLS": "this is no TLS"}, {"STARTTLS": "220 go\nand this came too early"}
        unnamed, taken = {"starttls": True, "tls_verify": False}, ("250", "DATA", "mx2.example")
        broken = ("421", "STARTTLS", "mx3.example")
        cases = [
            ("whoever it is", {}, {}, taken, [True]),
            ("refused in words: in clear text", {2: {"STARTTLS": "454 4.7.0 not now"}}, {}, taken, [False]),
            ("broken: in clear text", {2: breaks}, {}, taken, [False]),
            ("rubbish: in clear text", {2: early}, {}, taken, [False]),
            ("hung up: in clear text", {2: {"STARTTLS": HANG_UP}}, {}, taken, [False]),
            ("insisted on", {}, unnamed, taken, [True]),
            ("insisted on, with a name", {}, {"starttls": True, "ca_file": self.ca}, broken, []),
            ("insisted on and broken", {2: breaks, 3: breaks}, {"starttls": True}, broken, []),
            ("not offered", {2: {"EHLO": "250 mx"}}, unnamed, ("250", "DATA", "mx3.example"), [True]),
        ]
        for what, manners, route, wanted, secure in cases:
            with self.subTest(what):
                self.manners(host, manners)
                [said] = self.one(port=host.port, **route)
                self.assertEqual((said.code, said.command, said.host), wanted)
                self.assertEqual([mail.connection.secure for mail in host.mails], secure)

    def test_an_address_that_answers_nothing_costs_a_moment_once(self):
        swallow(self, "127.0.0.5", self.host.port)
        self.dns.zone["mx9.example"] = {haineko.A: ["127.0.0.5", "127.0.0.3"]}
        self.domain((10, 9))
        for least, most in ((0.2, 4.0), (0.0, 0.2)):
            began = time.monotonic()
            self.assertEqual(self.one(timeout=9)[0].code, "250")
            self.assertTrue(least <= time.monotonic() - began < most)
        self.assertEqual([connection.host for connection in self.host.connections], ["127.0.0.3"] * 2)


class RelayMxByPolicy(MxPeers):
    """MTA-STS. The domain is sts.example; its host is mx.sts.example, which has a certificate."""

    ENFORCE = "version: STSv1\nmode: enforce\nmx: mx.sts.example\nmax_age: 1000\n"

    def setUp(self) -> None:
        super().setUp()
        self.host = self.enter(SmtpPeer(None, ("STARTTLS",), self.tls, hosts=("127.0.0.2", "127.0.0.3")))
        self.web = self.enter(HttpPeer(self.policy, self.tls))
        self.status, self.text, self.clock = 200, self.ENFORCE, 0.0
        text = {haineko.TXT: ["v=STSv1; id=1;"], "ttl": 0}
        self.dns.zone["sts.example"] = {haineko.MX: [(10, "mx.sts.example")], "ttl": 0}
        self.dns.zone.update({"mx.sts.example": {haineko.A: ["127.0.0.2"]}, "_mta-sts.sts.example": text})
        self.dns.zone["mta-sts.sts.example"] = {haineko.A: ["127.0.0.1"]}

    def policy(self, asked: Asked) -> tuple:
        """What the web server answers."""
        return self.status, self.text.encode(), (("Content-Type", "text/plain"), ("Location", "/x"))

    def sessions(self) -> haineko.TransportContext:
        found = haineko.TransportContext((self.dns.place,))
        found.resolver = haineko.Resolver((self.dns.place,), clock=lambda: self.clock)
        found.mta_sts = haineko.MTASTSCache(found.resolver, found.http, self.web.port, lambda: self.clock)
        return found

    def deliver(self, sessions: haineko.TransportContext | None = None, ca: bool = True) -> tuple:
        job = mail_to("a@sts.example", port=self.host.port, ca_file=self.ca if ca else "")
        return brief(self.relay(job, sessions or self.sessions())[0])

    def test_enforced(self):
        loose, other = self.ENFORCE.replace("enforce", "testing"), self.ENFORCE.replace("mx.sts", "mail.sts")
        clear, taken = {"EHLO": "250 mx"}, ("250", "2.0.0", "DATA", "mx.sts.example")
        broken = {"TLS": "this is no TLS"}
        cases = [
            ("its host with its certificate", self.ENFORCE, {}, taken, [True]),
            ("its host by a pattern", self.ENFORCE.replace("mx.sts", "*.sts"), {}, taken, [True]),
            ("not its host", other, {}, ("451", "4.7.5", "STARTTLS", None), []),
            ("no TLS offered", self.ENFORCE, clear, ("454", "4.7.4", "STARTTLS", "mx.sts.example"), []),
            ("TLS that breaks", self.ENFORCE, broken, ("421", "4.7.5", "STARTTLS", "mx.sts.example"), []),
            ("testing: not its host", loose.replace("mx.sts", "mail.sts"), {}, taken, [True]),
            ("testing: no TLS offered", loose, clear, taken, [False]),
            ("mode none", "version: STSv1\nmode: none\nmax_age: 1000\n", clear, taken, [False]),
            ("no policy but a page", "<html>", clear, taken, [False]),
            ("a policy beyond all bounds", self.ENFORCE + "x" * 70000, clear, taken, [False]),
        ]
        for what, text, manner, wanted, secure in cases:
            with self.subTest(what):
                self.text = text
                self.manners(self.host, {2: manner})
                self.assertEqual(self.deliver(), wanted)
                self.assertEqual([mail.connection.secure for mail in self.host.mails], secure)
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
        self.manners(self.host, {2: {"EHLO": "250 mx"}})
        self.assertEqual(self.deliver(ca=False)[0], "250")
        self.assertEqual(self.web.asked, [])
        self.status = 301
        self.assertEqual(self.deliver()[0], "250")

    def test_policies_are_kept(self):
        sessions, strict = self.sessions(), "451"
        self.text = self.ENFORCE.replace("mx.sts", "mail.sts")  # shows by 451 whether it is in force
        soft, later = self.ENFORCE.replace("enforce", "testing"), 110 + haineko.MTASTSCache.NEGATIVE_TTL
        name, new = "_mta-sts.sts.example", {haineko.TXT: ["v=STSv1; id=2;"], "ttl": 0}
        for what, at, zone, changes, wanted, asked in (
            ("the first mail", 0, {}, {}, strict, 1),
            ("the second", 10, {}, {}, strict, 1),
            ("a new policy, the same number", 20, {}, {"text": soft}, strict, 1),
            ("DNS fails", 30, {name: lambda q, _: [q.answer(code=2)]}, {}, strict, 1),
            ("no record any more", 40, {name: None}, {}, strict, 1),
            ("a new number, but the web fails", 100, {name: new}, {"status": 500}, strict, 2),
            ("it is not asked at every mail", 110, {}, {}, strict, 2),
            ("later it is", later, {}, {"status": 200}, "250", 3),
            ("and when its time is over", 2000, {}, {}, "250", 4),
        ):
            with self.subTest(what):
                vars(self).update(changes, clock=at)
                self.dns.zone.update(zone)
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
        self.web.answer = lambda asked: "drip"
        sessions, began = self.sessions(), time.monotonic()
        sessions.mta_sts.FETCH_TIMEOUT = 0.6
        self.assertEqual(self.deliver(sessions)[0], "250")
        self.assertLess(time.monotonic() - began, 3)


def sigv4_is_right(asked: Asked) -> bool:
    """As Amazon checks it, from what came over the wire; written after its documentation, not after haineko.py."""
    pattern = rf"AWS4-HMAC-SHA256 Credential={KEY}/((\d{{8}})/eu-west-1/ses/aws4_request), "
    pattern += "SignedHeaders=([a-z0-9;-]+), Signature=([0-9a-f]{64})"
    found, date = re.fullmatch(pattern, asked.headers.get("authorization", "")), asked.headers.get("x-amz-date", "")
    if not found:
        return False
    scope, day, signed, signature = found.groups()
    names = signed.split(";")
    if not {"host", "x-amz-date"} <= set(names) or names != sorted(names) or not date.startswith(day):
        return False
    if any(name.startswith("x-amz-") and name not in names for name in asked.headers):
        return False
    listed = "".join(f"{name}:{' '.join(asked.headers[name].split())}\n" for name in names)
    request = f"{asked.method}\n{asked.path}\n\n{listed}\n{signed}\n{hashlib.sha256(asked.body).hexdigest()}"
    mac = b"AWS4" + SECRET.encode()
    to_sign = f"AWS4-HMAC-SHA256\n{date}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    for text in (*scope.split("/"), to_sign):
        mac = hmac.new(mac, text.encode(), hashlib.sha256).digest()
    return hmac.compare_digest(mac.hex(), signature)


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


def schema_of(required: str = "", **properties: dict) -> dict:
    """The schema of an object."""
    return {"type": "object", "required": required.split(), "properties": properties}


def list_of(items: dict) -> dict:
    return {"type": "array", "items": items, "minItems": 1}


STRING, FILLED = {"type": "string"}, {"type": "string", "minLength": 1}
PERSON = schema_of("email", email=FILLED, name=STRING)
PEOPLE, ADDRESSES = list_of(PERSON), list_of(FILLED)
SENDGRID_SCHEMA = schema_of(  # after spec/json/tsg_mail_v3.json of github.com/twilio/sendgrid-oai
    "personalizations from subject content",
    personalizations=list_of(schema_of("to", to=PEOPLE, cc=PEOPLE, bcc=PEOPLE)),
    **{"from": PERSON, "reply_to": PERSON, "reply_to_list": PEOPLE, "subject": FILLED, "headers": {"type": "object"}},
    content=list_of(schema_of("type value", type=FILLED, value=FILLED)),
    attachments=list_of(schema_of("content filename", content=FILLED, type=FILLED, filename=FILLED, content_id=FILLED,
                                  disposition={"type": "string", "enum": ["inline", "attachment"]})),
)  # fmt: skip
AMAZONSES_SCHEMA = schema_of(  # after SendEmailRequest in botocore's data/sesv2/2019-09-27/service-2.json
    "Content", FromEmailAddress=STRING, FeedbackForwardingEmailAddress=STRING,
    Destination=schema_of(ToAddresses=ADDRESSES), Content=schema_of("Raw", Raw=schema_of("Data", Data=FILLED)),
)  # fmt: skip
MANDRILL_SCHEMA = schema_of(  # after the parameters of messages/send-raw in Mandrill's API reference
    "key raw_message", key=FILLED, raw_message=FILLED, from_email=STRING, to=ADDRESSES, **{"async": {"type": "boolean"}}
)


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
    reserved = "x-sg-id x-sg-eid received dkim-signature content-type content-transfer-encoding to from subject"
    reserved = [*reserved.split(), "reply-to", "cc", "bcc"]
    wrong += [f"headers.{name}: reserved" for name in asked.json().get("headers", {}) if name.lower() in reserved]
    wrong += [f"type {item['type']}" for item in asked.json().get("attachments", ()) if ";" in item["type"]]
    if wrong:
        return 400, {"errors": [{"message": line, "field": "body"} for line in wrong]}
    return 202, b"", (("X-Message-Id", "14c5d75ce93.dfd.64b469"),)


def as_amazonses(asked: Asked):
    if not sigv4_is_right(asked):
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


def far_item(**changes) -> dict:
    """What a far Haineko says of a recipient that it took."""
    good = {"error": 0, "code": "250", "dsn": "2.0.0", "command": "DATA", "message": ["2.0.0 Ok: queued as 4F"]}
    return {"rcpt": None, **good, **changes}


def as_haineko(asked: Asked):
    """A far end that takes everything, if the login is right."""
    wanted = "Basic " + base64.b64encode(f"{KEY}:{SECRET}".encode()).decode()
    if asked.headers.get("authorization") != wanted:
        return 401, {"response": [far_item(error=1, code="535", dsn="5.7.0", command="AUTH", message=["who?"])]}
    if "mail" not in asked.json():
        return 400, {"response": [far_item(error=1, code="501", dsn="5.5.2", command="MAIL", message=["who?"])]}
    return 200, {"response": [far_item(rcpt=to, mailer="ESMTP") for to in asked.json()["rcpt"]]}


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
    upload = "/upload/gmail/v1/users/me/messages/send?uploadType=media"
    if asked.path == "/gmail/v1/users/me/profile":
        return 200, {"emailAddress": KEY, "messagesTotal": 1}
    if asked.path == "/gmail/v1/users/me/messages/send":
        header_of(base64.b64decode(asked.json()["raw"], b"-_", validate=True))
    elif (asked.path, asked.headers["content-type"]) == (upload, "message/rfc822"):
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
ONE_LINE = "From: a@b.example\n\nx\n"


def by_web(mailer: str, answer, mail=None, path: str = "", times: int = 1, **route) -> tuple:
    """(replies, the peer, which is closed) of a mail by that relay to a peer: it says `answer`, a function or what is
    said to each. mail: route -> Transaction, or (octets, recipients), or a document."""
    with HttpPeer(answer if callable(answer) else lambda asked: answer) as peer:
        way = web_route(mailer, peer.url + path, **route)
        if callable(mail):
            found = mail(way)
        else:
            found = raw_job(way, *mail) if isinstance(mail, tuple) else composed_job(way, mail)
        return [said for replies in relayed(found, times) for said in replies], peer


class WebRelays(Quiet):
    """What holds for each of them."""

    def probed(self, route: haineko.Route) -> list:
        sessions = haineko.TransportContext()
        return haineko.run(and_closed(haineko.run_probe(route, "here.example", "", sessions), sessions))

    def test_peers_that_check_requests_take_mail_with_the_right_login_and_a_probe_tells_whether_it_is(self):
        for mailer, code, dsn, line, words in (  # of a wrong login; words of the reply to a right one, of its probe
            ("Haineko", "535", "5.7.0", "2.0.0 Ok: queued as 4F", "a Haineko that takes our login"),
            ("SendGrid", "550", "5.7.8", "X-Message-Id: 14c5d75ce93.dfd.64b469", "the API key may send"),
            ("AmazonSES", "550", "5.7.1", "MessageId: 010001864-aaaa-000000", "to verified recipients only"),
            ("Mandrill", "451", "4.3.0", "_id: abcm", "the key is good"),  # which says 500 to a wrong login
            ("MSGraph", "550", "5.7.8", "request-id: 5d9f-graph",
             "Insufficient privileges: the login is good; whether it may send is not known"),
            ("GmailAPI", "550", "5.7.8", "id: 18c2f0", "the token is good"),
        ):  # fmt: skip
            with self.subTest(mailer), HttpPeer(PEERS[mailer]) as peer:
                route = web_route(mailer, peer.url)
                findings = self.probed(route)
                token = ["TOKEN"] if mailer in ("MSGraph", "GmailAPI") else []
                self.assertEqual([item.step for item in findings], [*token, "AUTH"])
                self.assertTrue(all(item.ok and item.text.isprintable() for item in findings), findings)
                self.assertIn(words, findings[-1].text)
                self.assertFalse(any(b"rcpt" in asked.body or b"raw" in asked.body for asked in peer.asked))
                said, refused = (first_reply(composed_job(way)) for way in (route, with_wrong_login(route)))
                self.assertEqual((said[:3], said.mailer), (("250", "2.0.0", "DATA"), mailer), said)
                self.assertEqual((said.host, said.port), ("127.0.0.1", peer.port))
                self.assertIn(line, said.message)
                self.assertEqual((refused.code, refused.dsn, refused.route_fault), (code, dsn, mailer != "Mandrill"))
                self.assertNotIn("wrong", " ".join(refused.message))

    def test_a_probe_of_wrong_credentials_and_of_other_servers(self):
        others = (200, b"<html>"), (200, {"scopes": ["alerts.read"], "SendingEnabled": False}), "close"
        for mailer, said in itertools.product(PEERS, (None, *others)):
            answer = (lambda asked, said=said: said) if said else PEERS[mailer]
            with self.subTest(mailer, said=said), HttpPeer(answer) as peer:
                route = web_route(mailer, peer.url)
                finding = self.probed(route if said else with_wrong_login(route))[-1]
                self.assertEqual((finding.step, finding.ok), ("AUTH", False))
                self.assertNotIn("wrong", finding.text)

    def test_a_probe_of_a_key_that_may_only_send(self):
        refusal = 403, {"message": "User is not authorized"}, (("x-amzn-ErrorType", "AccessDeniedException"),)
        with HttpPeer(lambda asked: refusal) as peer:
            self.assertTrue(self.probed(web_route("AmazonSES", peer.url))[-1].ok)

    def test_answers_that_are_no_success(self):
        page = b"<html>Bad gateway</html>"
        cases = (  # status, body, headers, code, unsure, wait
            (429, {"message": "slow", "errors": [{"message": "slow"}]}, (("Retry-After", "77"),), "451", False, 77),
            (500, {"message": "oops", "errors": [{"message": "oops"}]}, (), "451", False, 0),
            (503, page, (("Retry-After", "5"),), "451", False, 5),
            (403, page, (), "451", False, 0), (413, page, (), "550", False, 0),
            (302, b"", (("Location", "http://127.0.0.1/"),), "451", False, 0),
            (200, b"<html>Log in to our hotel</html>", (), "451", True, 0),
            (200, {"hello": "world"}, (), "451", True, 0), (200, [1, None], (), "451", True, 0),
            (200, b"[" * 100000, (), "451", True, 0), (200, b'{"a": "\xff"}', (), "451", True, 0),
            (200, b" " * (2 << 20) + b"{}", (), "451", True, 0),
        )  # fmt: skip
        for mailer in PEERS:
            for *answer, code, unsure, wait in cases:
                with self.subTest(mailer, answer=str(answer)[:80]):
                    replies, peer = by_web(mailer, tuple(answer), times=2)
                    told = [(said.code, said.maybe_delivered, said.retry_after) for said in replies]
                    self.assertEqual(told, [(code, unsure, wait)] * 2, replies)
                    self.assertEqual(len(peer.asked), 2)

    def test_an_error_in_the_form_of_another_api_may_be_of_a_proxy(self):
        forms = {
            "SendGrid": {"errors": [{"message": "no"}]},
            "AmazonSES": {"__type": "MessageRejected", "message": "no"},
            "Mandrill": {"status": "error", "name": "x", "message": "no"},
        }
        forms["MSGraph"] = forms["GmailAPI"] = {"error": {"code": "x", "message": "no"}}
        others = {"message": "no"}, {"errors": "no", "error": "no", "status": "error"}
        for mailer, form in itertools.product(PEERS, (*forms.values(), *others)):
            with self.subTest(mailer, form=form):
                [said], _ = by_web(mailer, (403, form))
                self.assertEqual(said.code, "550" if forms.get(mailer) == form else "451")

    def test_final_and_temporary_words_of_the_clouds(self):
        def amazon(word: str) -> tuple:
            return (("x-amzn-errortype", word),)

        def error(code, message: str, **more) -> dict:
            return {"error": {"code": code, "message": message, **more}}

        no_key = {"status": "error", "name": "Invalid_Key", "message": "Invalid API key"}
        wait, limit = (("Retry-After", "9"),), "LimitExceededException"
        cases = (
            ("SendGrid", 400, {"errors": [{"message": "Bad", "field": "from.email"}]}, (), "550", "from.email: Bad"),
            ("SendGrid", 403, {"errors": [{"message": "access forbidden"}]}, (), "550", "access forbidden"),
            *[("SendGrid", status, {}, (), "451", "") for status in (201, 204)],
            ("AmazonSES", 400, {"message": "Not verified."}, amazon("MessageRejected"), "550", "MessageRejected"),
            ("AmazonSES", 400, {"message": "Slow"}, amazon("ThrottlingException"), "451", "ThrottlingException"),
            ("AmazonSES", 400, {"__type": f"com.amazon#{limit}", "Message": "Daily"}, (), "451", limit),
            ("AmazonSES", 429, {}, amazon("TooManyRequestsException:http://x/"), "451", "TooManyRequestsException"),
            ("AmazonSES", 404, {"message": "none"}, amazon("NotFoundException"), "550", "none"),
            ("Mandrill", 401, no_key, (), "550", "Invalid_Key: Invalid API key"),
            ("Mandrill", 500, {**no_key, "name": "GeneralError"}, (), "451", "GeneralError: Invalid API key"),
            ("MSGraph", 403, error("ErrorAccessDenied", "No"), (), "550", "ErrorAccessDenied: No"),
            ("MSGraph", 429, error("ApplicationThrottled", "no"), wait, "451", "ApplicationThrottled: no"),
            ("GmailAPI", 403, error(403, "slow", errors=[{"reason": "userRateLimitExceeded"}]), (), "451", "403: slow"),
            *[("GmailAPI", 403, error(403, "no", errors=odd), (), "550", "403: no") for odd in ([5], 5)],
            ("GmailAPI", 403, error(403, "Delegation denied"), (), "550", "403: Delegation denied"),
        )  # fmt: skip
        for mailer, *answer, code, line in cases:
            with self.subTest(mailer, answer=answer):
                [said], _ = by_web(mailer, tuple(answer))
                self.assertEqual((said.code, said.dsn[0]), (code, code[0]))
                self.assertEqual(said.maybe_delivered, not line)
                self.assertIn(line, (*said.message, ""))
                self.assertEqual(said.retry_after, 9 if wait in answer else 0)

    def test_retry_after(self):
        now = time.time()
        date = email.utils.formatdate(now + 100, usegmt=True)
        cases = (
            ("Retry-After: 30\r\n", 30, 30), (f"Retry-After: {date}\r\n", 90, 101), ("Retry-After: -3\r\n", 0, 0),
            ("Retry-After: soon\r\n", 0, 0), (f"Retry-After: {'9' * 9}\r\n", 86400, 86400),
            (f"X-RateLimit-Reset: {int(now + 50)}\r\n", 40, 51), ("", 0, 0),
        )  # fmt: skip
        for headers, low, high in cases:
            wire = io.BytesIO(headers.encode() + b"\r\n")
            said = haineko.HTTPResponse(429, "", haineko.http.client.parse_headers(wire), b"")
            found = haineko.parse_retry_after(said)
            self.assertTrue(low <= found <= high, (headers, found))

    def test_peers_that_break_off(self):
        cut = b"HTTP/1.1 %b\r\nConnection: close\r\nContent-Length: 99\r\n\r\n[{"
        cases = (  # what it does, code, unsure
            ("silence", "hang", "451", True),
            ("an octet now and then", "drip", "451", True),
            ("hangs up after reading", "close", "451", True),
            ("rubbish", b"220 mail.example ESMTP\r\n", "451", True),
            ("rubbish without end", b"x" * 200000, "451", True),
            ("headers without end", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\n", "451", True),
            ("hangs up in the answer", cut % b"200 OK", "451", True),
            ("hangs up in a refusal", cut % b"413 No", "550", False),
        )
        for what, action, *wanted in cases:
            with self.subTest(what), HttpPeer(lambda asked, said=action: said) as peer:
                found = side_by_side(*[(composed_job(web_route(mailer, peer.url)),) for mailer in PEERS])
                told = [[said.mailer, said.code, said.maybe_delivered] for [[said]], _ in found]
                self.assertEqual(told, [[mailer, *wanted] for mailer in PEERS])
                self.assertLess(max(seconds for _, seconds in found), 2.5)
                self.assertEqual(len(peer.asked), len(PEERS))

    def test_nobody_there(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        for mailer in PEERS:
            with self.subTest(mailer):
                route = web_route(mailer, f"http://127.0.0.1:{port}")
                said = first_reply(composed_job(route))
                self.assertEqual((said[:3], said.maybe_delivered), (("451", "4.4.1", "CONN"), False))
                self.assertEqual((said.mailer, said.host, said.port), (mailer, "127.0.0.1", port))
                self.assertIn("refused", said.message[1])
                findings = [(item.step, item.ok) for item in self.probed(route) if item.step != "TOKEN"]
                self.assertEqual(findings, [("CONN", False)])

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
                with self.subTest(mailer):
                    url = f"http://{outside}:{listener.getsockname()[1]}"
                    said = first_reply(composed_job(web_route(mailer, url)))
                    self.assertEqual((said.command, said.dsn), ("AUTH", "4.7.11"))
                    sock, _ = listener.accept()
                    with sock:
                        self.assertEqual(sock.recv(100), b"")


class WebRoutes(unittest.TestCase):
    """Settings of the relays by HTTP."""

    def test_faults_are_told_at_start(self):
        place = "mailertable.default"
        cases = (
            ({"mailer": "SendGrid"}, f"{place}.auth: SendGrid needs it"),
            ({"mailer": "Mandrill"}, f"{place}.auth: Mandrill needs it"),
            ({"mailer": "AmazonSES", "auth": "key"}, f"{place}.region: AmazonSES needs it"),
            ({"mailer": "AmazonSES", "region": "eu-west-1"}, f"{place}.auth: AmazonSES needs it"),
            ({"mailer": "AmazonSES", "auth": "none", "region": "eu"}, f'{place}.auth: "none" is not in authinfo'),
            ({"mailer": "SendGrid", "auth": "empty"}, f"{place}.auth: authinfo.empty needs password"),
            ({"mailer": "AmazonSES", "auth": "half", "region": "eu"}, "authinfo.half needs username and password"),
            ({"mailer": "SendGrd", "auth": "key"}, 'did you mean "SendGrid"?'),
            ({"mailer": "MX", "auth": "key"}, f"{place}.auth: MX takes no such setting"),  # not for strangers
        )
        logins = {"key": {"username": "a", "password": "b"}, "empty": {}, "half": {"password": "file"}}
        for route, wanted in cases:
            with self.subTest(route):
                faults: list = []
                raw = {"authinfo": logins, "mailertable": {"default": route}}
                found = haineko.from_dict(haineko.Settings, raw, "", faults)
                if not faults:
                    _, faults = haineko.resolve_settings(found, faults)
                self.assertIn(wanted, "\n".join(faults))

    def test_values_that_are_refused(self):
        urls = "ftp://x", "https://", "https://a b", "http://x:0", "http://x:70000", "http://x/?a", "https://u@x"
        bad = {"base_url": (*urls, "https://[::::]", "https://a..b", "x", 5), "https": ("yes", 2)}
        bad["region"] = "EU", "eu west", "eu/../", 1
        for key, value in [(name, value) for name, values in bad.items() for value in values]:
            with self.subTest(key, value=value):
                faults: list = []
                haineko.from_dict(haineko.Route, {"mailer": "SendGrid", key: value}, "", faults)
                self.assertEqual(len(faults), 1, faults)

    def test_where_each_goes(self):
        eu, mx = "https://api.eu.sendgrid.com", "https://mx.example/post"
        for mailer, more, url, *place in (
            ("SendGrid", {}, "https://api.sendgrid.com", "api.sendgrid.com", 443),
            ("sendgrid", {"base_url": eu + "/"}, eu, eu[8:], 443),
            ("AmazonSES", {"region": "a-1"}, "https://email.a-1.amazonaws.com", "email.a-1.amazonaws.com", 443),
            ("Mandrill", {}, "https://mandrillapp.com", "mandrillapp.com", 443),
            ("Haineko", {"host": "::1"}, "http://[::1]:2794", "::1", 2794),
            ("Haineko", {"host": "mx.example", "https": 1}, "https://mx.example:2794", "mx.example", 2794),
            ("Haineko", {"host": "mx.example", "port": 25}, "http://mx.example:25", "mx.example", 25),
            ("Haineko", {"base_url": mx}, mx, "mx.example", 443),
            ("ESMTP", {"host": "mx.example"}, "", "mx.example", 25),
        ):
            with self.subTest(mailer, more=more):
                route = web_settings({"auth": "key", "mailer": mailer, **more}).mailertable["default"]
                self.assertEqual((route.url, [route.host, route.port]), (url, place))

    def test_secrets_stay_secret_and_a_password_with_the_word_file_in_it_is_no_file(self):
        route = {"mailer": "AmazonSES", "auth": "key", "region": "eu-west-1"}
        logins = {"key": {"username": "AKID", "password": "geheim", "token": "auch-geheim"}}
        found = web_settings(route, authinfo=logins)
        self.assertEqual(found.mailertable["default"].token, "auch-geheim")
        self.assertNotIn("geheim", json.dumps(haineko.redacted(found)) + repr(found.mailertable["default"].url))
        logins = {"key": {"username": "AKID", "password": "my profile"}}
        self.assertEqual(web_settings({"mailer": "SendGrid", "auth": "key"}, authinfo=logins).files, ())


class TokenRelays(Quiet):
    """MSGraph and GmailAPI, which take recipients from the header."""

    def test_the_envelope_is_in_the_header(self):
        shown = b"From: a@example.org\r\nTo: B <b@example.jp>\r\nCc: c@example.jp\r\nSubject: Nya\r\n\r\nMeow.\r\n"
        hidden = shown.replace(b"To:", b"X-To:").replace(b"Cc:", b"X-Cc:")
        b, c, d, e = [f"{name}@example.jp" for name in "bcde"]
        for what, octets, to, bcc, words in (
            ("shown", shown, (b, c), None, ""),
            ("one hidden", shown, (b, c, d), d, ""),
            ("nobody shown", hidden, (d, e), f"{d}, {e}", ""),
            ("somebody else shown", shown, (b,), None, "Cc has c@example.jp"),
            ("Bcc is set", b"Bcc: x@example.jp\r\n" + shown, (b, c), None, "the header bcc"),
        ):
            for mailer in ("MSGraph", "GmailAPI"):
                with self.subTest(what, mailer=mailer):
                    [reply, *_], peer = by_web(mailer, PEERS[mailer], (octets, to))
                    if words:
                        self.assertEqual((reply.code, reply.dsn, peer.asked), ("550", "5.6.3", []))
                        self.assertIn(words, reply.message[1])
                        continue
                    self.assertEqual(reply.code, "250", reply)
                    body = peer.asked[0].body
                    sent = base64.urlsafe_b64decode(body if mailer == "MSGraph" else json.loads(body)["raw"])
                    self.assertEqual(re.sub("\\s+", " ", str(header_of(sent)["Bcc"])), str(bcc))
                    self.assertTrue(sent.endswith(b"Meow.\r\n"))

    def test_a_large_message_is_uploaded(self):
        [said], peer = by_web("GmailAPI", as_gmail, web_submission(body="x\n" * (1 << 20)), timeout=60)
        self.assertEqual(said.code, "250")
        self.assertIn("uploadType=media", peer.asked[0].path)

    def test_a_refused_token_is_fetched_anew_once(self):
        tokens = ["old", SECRET]
        said = {"error": {"code": "InvalidAuthenticationToken", "message": f"old and {SECRET}"}}
        with (
            HttpPeer(lambda _: (200, {"access_token": tokens.pop(0) if len(tokens) > 1 else tokens[0]})) as provider,
            HttpPeer(as_graph) as peer,
        ):
            oauth2 = haineko.OAuth2(token_url=f"{provider.url}/t", client_id="i", client_secret="s")
            route = replace(web_route("MSGraph", peer.url), oauth2=oauth2)
            self.assertEqual(first_reply(composed_job(route)).code, "250")
            peer.answer = lambda _: (401, said)
            reply = first_reply(composed_job(route))
            self.assertTrue(reply.route_fault)
            self.assertEqual(reply.message[1], "InvalidAuthenticationToken: old and ********")
            self.assertEqual((len(provider.asked), len(peer.asked)), (4, 4))


class FarHaineko(Quiet):
    """The relay Haineko: what it sends, and what it makes of the answers."""

    def sent(self, job: haineko.Transaction) -> dict:
        return json.loads(haineko.haineko_request(job).body)

    def test_plain_text_goes_as_header_and_body_and_comes_out_the_same(self):
        words = ("キジトラ", "ｶﾀｶﾅ①髙～㈱", "Zürich", 'A "quoted" name', "Doe, John", "x" * 200, "=?UTF-8?B?eA==?=",
                 "a\\b", "O'Hara (Bob)")  # fmt: skip
        bodies = ("Nyaa", "にゃあ\n", "x" * 2000, "a\r\nb\n\n", " .\n..\n", "é" * 500, "trailing \n", "tab\t\n=3D\n",
                  "①ｱ\n")  # fmt: skip
        route, far = web_route("Haineko"), ["far.example", "farther.example"]
        for charset in ("UTF-8", "ISO-2022-JP", "ISO-8859-1", "US-ASCII", "EUC-JP"):
            for number, (word, body) in enumerate(zip(words, bodies), 1):
                author = f"{json.dumps(word, ensure_ascii=False)} <a@example.com>"
                header = {"subject": word, "from": author, "charset": charset, "x-haineko-loop": far}
                job = composed_job(route, web_submission(header=header, body=body), number=number)
                with self.subTest(charset, word=word):
                    sent = self.sent(job)
                    self.assertEqual(set(sent), {"ehlo", "mail", "rcpt", "header", "body"})
                    self.assertEqual(sent["header"]["x-haineko-loop"], [*far, "here.example"])
                    again, original = composed_job(route, sent, number=number).octets(), job.octets()
                    for field in (rb"From", rb"Sender", rb"Reply-To", rb"Subject", rb"Content-[\w-]+", rb"To"):
                        pattern = rb"(?ms)^" + field + rb":.*?(?=^\S)"
                        self.assertEqual(re.findall(pattern, again), re.findall(pattern, original))
                    self.assertEqual(again.partition(b"\r\n\r\n")[2], original.partition(b"\r\n\r\n")[2])

    def test_other_messages_go_whole(self):
        route = web_route("Haineko")
        octets = composed_job(route).octets().decode()
        parts = "From: a@b.example\r\nTo: x@y.example\r\nContent-Type: multipart/mixed; boundary=x\r\n\r\n--x--\r\n"
        for what, text in (
            ("another header", octets.replace("Date:", "In-Reply-To: <a@b>\r\nDate:")),
            ("its own Message-Id", octets.replace("<" + "Q" * 16, "<mine")),
            ("its own Date", re.sub("\r\nDate: .*", "\r\nDate: Thu, 1 Jan 1970 00:00:00 +0000", octets)),
            ("HTML", octets.replace("text/plain", "text/html")),
            ("several parts", parts),
            ("a header twice", octets.replace("Subject:", "Subject: x\r\nSubject:")),
            ("no header at all", "\r\nbody\r\n"),
        ):
            with self.subTest(what):
                job = raw_job(route, text)
                whole = {"mail": job.sender, "rcpt": ["mikeneko@example.jp"], "raw": job.octets().decode()}
                self.assertEqual(self.sent(job), whole)
        job = raw_job(route, b"Subject: \xff\n\nx\n", eight=True)
        self.assertEqual(base64.b64decode(self.sent(job)["raw"]["base64"]), job.octets())

    def test_a_message_for_several_recipients_goes_whole_and_once(self):
        to = ["x@y.example", "z@y.example"]
        replies, peer = by_web("Haineko", as_haineko, (f"From: a@b.example\nTo: {', '.join(to)}\n\nx\n", to))
        self.assertEqual([said.code for said in replies], ["250", "250"])
        self.assertEqual([asked.json()["rcpt"] for asked in peer.asked], [to])

    def test_what_the_old_one_answers(self):
        """As recorded from it: HTTP 200 for failures too, and QUIT's reply for a relayed mail."""

        def item(rcpt, command, code, dsn, *message, mailer="ESMTP", host="127.0.0.1", port=2605) -> dict:
            more = {"message": message, "error": int(str(code)[0] != "2")}
            place = {"mailer": mailer, "host": host, "port": port}
            return {"rcpt": rcpt, "command": command, "code": code, "dsn": dsn, **more, **place}

        nowhere = {"mailer": None, "host": None, "port": None}
        taken = item("a@example.jp", "QUIT", "221", "2.0.0", "2.0.0 closing connection")
        unknown = item("b@rej.example.jp", "RCPT", "550", "5.1.1", "5.1.1 User unknown")
        policy = item("x@example.net", "RCPT", 553, "5.7.1", "Recipient address is not permitted", **nowhere)
        down = item("a@none.example.jp", "CONN", 421, None, "Cannot connect SMTP Server", mailer=None)
        auth = item("a@authbad.example.jp", "AUTH", "535", "5.7.8", "5.7.8 bad credentials")
        discard = item("a@discard.example.jp", "DATA", 200, None, "Discard", **{**nowhere, "mailer": "Discard"})
        malformed = item(None, "HTTP", 421, None, "Malformed JSON string", **nowhere)
        cases = (  # recipients, HTTP status, items, the one of each recipient
            (["a@example.jp"], 200, [taken], [taken]),
            (["a@example.jp", "b@rej.example.jp"], 200, [taken, unknown], [taken, unknown]),
            (["a@example.jp", "x@example.net"], 200, [policy, taken], [taken, policy]),
            (["a@none.example.jp"], 200, [down], [down]),
            (["a@authbad.example.jp"], 200, [auth], [auth]),
            (["a@discard.example.jp"], 200, [discard], [discard]),
            (["x@example.net"], 400, [policy], [policy]),
            (["a@example.jp", "b@example.jp"], 400, [malformed], [malformed] * 2),
        )
        for to, status, items, wanted in cases:
            with self.subTest(items):
                body = {"queueid": "6AN8", "response": items, "referer": None}
                replies, peer = by_web("Haineko", (status, body), (ONE_LINE, to))
                self.assertEqual(len(replies), len(wanted))
                for said, it in zip(replies, wanted):
                    command = {"QUIT": "DATA"}.get(it["command"], it["command"])
                    self.assertEqual(said[:4], (str(it["code"]), it["dsn"], command, it["message"]))
                told = {(said.mailer, said.port, said.maybe_delivered) for said in replies}
                self.assertEqual(told, {("Haineko", peer.port, False)})

    def test_items_that_say_nothing_and_an_odd_one(self):
        good = far_item(rcpt="mikeneko@example.jp")
        odd = [{"rcpt": "other@example.jp"}, {"rcpt": "MIKENEKO@example.jp"}]  # the case of a local part counts
        odd += [*[{"code": code} for code in ("hello", 354, None, "550")], {"error": 1}]
        for items in ([], {}, [None], *[[{**good, **change}] for change in odd]):
            with self.subTest(items):
                [said], _ = by_web("Haineko", (200, {"response": items}))
                self.assertEqual((said.code, said.maybe_delivered), ("451", True))
                self.assertIn("not what the API promises", said.message[0])
        odd = far_item(rcpt="mikeneko@Example.JP", code=250, dsn="x", command="rm -rf", message="a\r\nb\x1b[0m")
        [said], _ = by_web("Haineko", (200, {"response": [odd]}))
        self.assertEqual(said[:4], ("250", None, "DATA", ("a??b?[0m",)))

    def test_a_far_end_that_does_not_know_whether_it_arrived(self):
        def in_doubt(message: str = haineko.REPLIES["unsure"][-1], **more) -> tuple:
            item = far_item(error=1, code="451", dsn="4.5.0", message=[message], **more)
            return 503, {"response": [item]}, (("Retry-After", "0"),)

        for said, posts in (
            (in_doubt("No more words", maybe_delivered=True), 1),
            (in_doubt("The answer is not what the API promises", maybe_delivered=True), 1),
            (in_doubt(maybe_delivered=True), 1),
            (in_doubt(), 3),  # words are no promise
            (in_doubt(maybe_delivered=False), 3),
            (in_doubt(maybe_delivered="no"), 3),
            ((200, b"<html>"), 1),
            ((503, b"<html>", (("Retry-After", "0"),)), 3),
        ):
            with self.subTest(said), HttpPeer(lambda asked, said=said: said) as peer:
                route = {"mailer": "Haineko", "base_url": peer.url, "retry": 2, "sleep": 0}
                status, answer = posted(document(), settings(mailertable={"default": route}))
                [item] = answer["response"]
                self.assertEqual((status, item.get("maybe_delivered")), (503, True if posts == 1 else None))
                self.assertEqual(len(peer.asked), posts)

    def test_success_is_believed_only_with_an_http_status_of_success(self):
        good, refused = far_item(), far_item(error=1, code="550")
        for status in (200, 202, 207, 201, 204, 302, 400, 401, 403, 413, 422, 429, 500, 502, 503):
            believed = status in (200, 202, 207)
            for item, code in ((good, "250"), ({**good, "code": 221}, "221"), (refused, "550")):
                with self.subTest(status, code=code):
                    [said], _ = by_web("Haineko", (status, b"" if status == 204 else {"response": [item]}))
                    if code == "550" and status != 204:
                        self.assertEqual(said.code, "550")
                    else:
                        self.assertEqual((said.code[0] == "2", said.maybe_delivered), (believed, not believed))

    def test_the_loop_of_two_real_ones_stops(self):
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
            ports = [listener.getsockname()[1] for listener in (one, two)]
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        users = json.loads("{" + run_here("pw", "-u", "cat", given="nyaa\n")[1] + "}")
        logins = {"other": {"username": "cat", "password": "nyaa"}}
        for i in (1, 0):
            route = {"mailer": "Haineko", "host": "127.0.0.1", "port": ports[1 - i], "auth": "other", "timeout": 10}
            table = {"default": route, **({"end.example": {"mailer": folder.name}} if i else {})}
            sections = {"smtpd": {"hostname": f"{'two' if i else 'one'}.example"}, "mailertable": table}
            sections.update(httpd={"listen": f"127.0.0.1:{ports[i]}"}, authinfo=logins, password=users)
            server = served(self, sections)
        credentials = "Authorization: Basic " + base64.b64encode(b"cat:nyaa").decode()
        status, _, said = server.ask(post(web_submission(), credentials))
        [item] = said["response"]
        self.assertEqual((status, item["code"], item["dsn"], item["command"]), (503, "421", "5.4.6", "CONN"))
        self.assertEqual(item["message"], ["Detected message loop"])
        self.assertEqual((item["mailer"], item["port"]), ("Haineko", ports[1]))
        status, _, said = server.ask(post(web_submission(rcpt=["mikeneko@end.example"]), credentials))
        [item] = said["response"]
        self.assertEqual((status, item["code"], item["mailer"]), (200, "200", "Haineko"))
        [saved] = os.listdir(folder.name)
        with open(os.path.join(folder.name, saved), "rb") as stream:
            message = parsed(stream.read())
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

    def test_plain_text(self):
        header = {"x-haineko-loop": ["far.example"], "charset": "ISO-2022-JP"}
        job = composed_job(web_route("SendGrid"), web_submission(header=header, body="①ｱ\nにゃあ\n"))
        headers = {"Sender": "kijitora@example.org", "X-Haineko-Loop": "far.example, here.example"}
        headers.update({"Date": parsed(job.octets())["Date"], "Message-Id": f"<{'Q' * 16}.1@here.example>"})
        wanted = {
            "personalizations": [{"to": [{"email": "mikeneko@example.jp"}]}],
            "from": {"email": "kijitora@example.com", "name": "キジトラ"},
            "reply_to": {"email": "straycats@cat-ml.example.org"},
            "subject": "謹賀新年",
            "headers": headers,
            "content": [{"type": "text/plain", "value": "①ア\nにゃあ\n"}],
        }
        self.assertEqual(json.loads(haineko.sendgrid_request(job).body), wanted)

    def test_parts_people_and_headers(self):
        mike, tama, shiro, kuro = [{"email": f"{name}@example.jp"} for name in ("mikeneko", "tama", "shiro", "kuro")]
        job = raw_job(web_route("SendGrid"), TWO_TEXTS, [person["email"] for person in (mike, tama, shiro, kuro)])
        found = json.loads(haineko.sendgrid_request(job).body)
        self.assertEqual(fits(found, SENDGRID_SCHEMA), [])
        people = {"to": [{**mike, "name": "Mike Néko"}, {**tama, "name": "Tama"}], "cc": [shiro], "bcc": [kuro]}
        self.assertEqual(found["personalizations"], [people])
        self.assertEqual(found["from"], {"email": "kijitora@example.com", "name": "キジトラ"})
        self.assertEqual(found["subject"], "謹賀新年")
        self.assertEqual(found["reply_to_list"], [{"email": "a@example.com"}, {"email": "b@example.com", "name": "B"}])
        headers = {"Date": "Thu, 23 Nov 2023 10:00:00 +0900", "Message-Id": "<mine@example.com>", "X-Long": "one two"}
        headers.update({"In-Reply-To": "<before@example.com>", "X-Haineko-Loop": "a.example, here.example"})
        self.assertEqual(found["headers"], headers)
        texts = [("text/plain", "にゃあ"), ("text/html", "<p>にゃあ</p>")]
        self.assertEqual([(part["type"], part["value"]) for part in found["content"]], texts)
        logo = {"content": "iVBORw==", "type": "image/png", "filename": "logo.png", "disposition": "inline"}
        table = {"content": "MSwy", "type": "text/csv", "filename": "猫.csv", "disposition": "attachment"}
        self.assertEqual(found["attachments"], [{**logo, "content_id": "logo@x"}, table])

    def test_what_it_can_not_express_is_refused_in_words(self):
        text = "From: a@b.example\nTo: mikeneko@example.jp\nSubject: x\n"

        def several(*parts: str, kind: str = "mixed") -> str:
            inner = "".join(f"--m\n{part}\n" for part in parts)
            return f"{text}Content-Type: multipart/{kind}; boundary=m\n\n{inner}--m--\n"

        kinds = ("related", "alternative") * 1500
        nest = [f"Content-Type: multipart/{kind}; boundary=b{i}\n\n--b{i}\n" for i, kind in enumerate(kinds)]
        cases = (
            ("several authors", text.replace("From: ", "From: z@b.example, "), "From has several addresses"),
            ("no author", text.replace("From: a@b.example\n", ""), "From"),
            ("no subject", text.replace("Subject: x", "Subject:"), ""),
            ("another recipient is shown", text.replace("To: ", "To: x@y.example, "), "x@y.example, which gets this"),
            ("no recipient is shown", text.replace("To: mikeneko@example.jp\n", ""), ""),
            ("a signature", text + "DKIM-Signature: v=1\n", "dkim-signature can't be set"),
            ("a header twice", text + "X-A: 1\nx-a: 2\n", "x-a occurs more than once"),
            ("a header of octets", text + "X-A: é\n", "x-a is not ASCII"),
            ("unknown charset", text + "Content-Type: text/plain; charset=klingon\n\nx\n", "klingon"),
            ("a deep nest", text + "".join(nest) + "Content-Type: text/plain\n\nx\n", "levels"),
            ("not in its charset", text.encode() + b"Content-Type: text/plain; charset=utf-8\n\n\xff\n", "decode"),
            ("no text", text + "Content-Type: image/png\nContent-Disposition: inline; filename=a\n\nx\n", "are none"),
            ("two texts", several("\na", "\nb"), "its texts are text/plain, text/plain"),
            ("a calendar", text + "Content-Type: text/calendar\n\na\n", "its texts are text/calendar"),
            ("a report", several("\na", kind="report"), "multipart/report can't be kept"),
            ("signed", several("\na", kind="signed"), "multipart/signed can't be kept"),
            ("an attachment without a name", several("\na", "Content-Type: image/png\n\nb"), ""),
            ("an empty attachment", several("\na", "Content-Disposition: attachment; filename=a.txt\n"), ""),
            ("an empty text", text + "\n", ""),
            ("a charset", several("\na", "Content-Type: text/csv; charset=Shift_JIS; name=a.csv\n\nb"), "shift_jis"),
        )  # fmt: skip
        for what, written, words in cases:
            with self.subTest(what):
                octets = written if isinstance(written, bytes) else written.encode()
                octets += b"" if b"\n\n" in octets else b"\nx\n"
                [said], peer = by_web("SendGrid", as_sendgrid, (octets,))
                if not words:  # SendGrid says so
                    self.assertEqual((said.code, said.command, len(peer.asked)), ("550", "DATA", 1))
                    continue
                wanted = ("550", "5.6.3", "The API can't express this message")
                self.assertEqual((said.code, said.dsn, said.message[0], peer.asked), (*wanted, []))
                self.assertIn(words, said.message[1])


class AmazonAndMandrill(unittest.TestCase):
    def test_a_session_token_and_a_path_before_the_api_are_signed(self):
        token = "AQoDYXdzEJr//token="
        mail = lambda route: composed_job(replace(route, token=token))  # noqa: E731
        [said], peer = by_web("AmazonSES", (200, {"MessageId": "1"}), mail, path="/front")
        [asked] = peer.asked
        self.assertEqual((said.code, asked.path), ("250", "/front/v2/email/outbound-emails"))
        self.assertEqual(asked.headers["x-amz-security-token"], token)
        self.assertTrue(sigv4_is_right(asked))

    def test_the_message_goes_as_it_is_or_encoded_where_it_has_octets_over_127(self):
        octets = "From: a@b.example\nMIME-Version: 1.0\nContent-Type: text/plain; charset=utf-8\n"
        octets += "Content-Transfer-Encoding: 8bit\n\nにゃあ\n"
        for mail in (composed_job, lambda route: raw_job(route, octets, eight=True)):
            [said], peer = by_web("AmazonSES", as_amazonses, mail)
            found = peer.asked[0].json()
            sent = base64.b64decode(found["Content"]["Raw"]["Data"])
            self.assertEqual((said.code, parsed(sent).get_content().split()[0]), ("250", "にゃあ"))
            self.assertEqual(sent == composed_job(web_route("AmazonSES")).octets(), mail is composed_job)
            self.assertEqual(found["Destination"], {"ToAddresses": ["mikeneko@example.jp"]})
            self.assertEqual(found["FeedbackForwardingEmailAddress"], "kijitora@example.org")

    def test_fifty_recipients_at_a_time(self):
        says, to = ["", "close", ""], [f"cat{i}@example.jp" for i in range(120)]
        replies, peer = by_web("AmazonSES", lambda asked: says.pop() or as_amazonses(asked), (ONE_LINE, to))
        self.assertEqual([said.code for said in replies], ["250"] * 50 + ["451"] * 50 + ["250"] * 20)
        self.assertEqual([len(asked.json()["Destination"]["ToAddresses"]) for asked in peer.asked], [50, 50, 20])

    def test_each_recipient_has_its_own_reply_of_mandrill(self):
        to = ("hard@example.jp", "odd@example.jp", "later@example.jp", "tama@Example.JP")
        replies, peer = by_web("Mandrill", as_mandrill, (ONE_LINE, to))
        told = [(said.code, said.dsn, said.message[0]) for said in replies[:2]]
        self.assertEqual(told, [("550", "5.7.1", "rejected"), ("550", "5.1.3", "invalid")])
        self.assertEqual([said.code for said in replies[2:]], ["250", "250"])
        self.assertIn("reject_reason: hard-bounce", replies[0].message)
        sent = peer.asked[0].json()
        self.assertEqual(sent["raw_message"], ONE_LINE.replace("\n", "\r\n"))
        self.assertEqual(sent["from_email"], "kijitora@example.org")

    def test_a_recipient_that_mandrill_leaves_out(self):
        said = [{"email": "a@x.example", "status": "sent", "_id": "1"}, 5, {}]
        replies, _ = by_web("Mandrill", (200, said), (ONE_LINE, ("a@x.example", "b@x.example")))
        self.assertEqual([(said.code, said.maybe_delivered) for said in replies], [("250", False), ("451", True)])


# ======================================================================================================================
# 16. Queue
# ======================================================================================================================


ACCEPTED, LATER, NEVER = [haineko.Reply(code, None, "DATA", ("x",)) for code in ("250", "451", "550")]


def entry(queueid="Q" * 16, to=("a@example.jp",), lane="ESMTP x:25", born=None, **more):
    rows = tuple(haineko.NewRecipient(rcpt, rcpt, number, lane) for number, rcpt in enumerate(to, 1))
    message = haineko.Message((b"Subject: x\r\nTo: ", b"\r\nMessage-Id: <Q.", b"@x>\r\n\r\nNyaa\r\n"))
    return haineko.QueueItem(queueid, "mail", "s@example.org", "", born or time.time(), message, rows, **more)


class QueuePure(Folder):
    """What follows from a reply, bounces, events: values in, values out."""

    def test_next_step(self):
        policy, wait = haineko.QueueSettings(lifetime=1000, retry_after=(10, 20, 40)), LATER._replace(retry_after=300)
        table = (  # reply, attempts, age, dice, state, pause
            (ACCEPTED, 1, 0, 0.5, "delivered", 0), (ACCEPTED, 9, 2000, 0.5, "delivered", 0),
            (NEVER, 1, 0, 0.5, "failed", 0), (NEVER, 1, 9e6, 0.5, "failed", 0), (LATER, 3, 1000, 0.5, "failed", 0),
            (LATER, 1, 0, 0.5, "open", 10), (LATER, 1, 0, 0.0, "open", 8), (LATER, 1, 0, 1.0, "open", 12),
            (LATER, 2, 0, 0.5, "open", 20), (LATER, 30, 0, 0.5, "open", 40), (wait, 1, 0, 0.5, "open", 300),
            (wait, 1, 900, 0.5, "open", 100), (LATER, 1, 999.9, 0.5, "open", 1),  # the last one at the end of its life
            (LATER, 1, 9e6, 0.5, "open", 10), (LATER, 2, 9e6, 0.5, "open", 20),  # the clock was set forward
            (wait._replace(retry_after=9999), 2, 9e6, 0.5, "open", 1000),
        )  # fmt: skip
        for *values, state, pause in table:
            with self.subTest(values):
                step = haineko.attempt_result(*values, policy)
                self.assertEqual((step.state, round(step.pause, 6)), (state, pause))
        steps = [haineko.attempt_result(LATER, n, 0, 0.5, haineko.QueueSettings()) for n in range(1, 10)]
        self.assertEqual([step.pause / 60 for step in steps], [1, 5, 15, 30, 60, 120, 240, 240, 240])

    def parcel(self, attempts=3, to="A@example.jp", **more):
        item = entry(born=1e9)._replace(**more)
        return haineko.LeasedRecipient(1, item, haineko.NewRecipient(to, to, 1, "x"), attempts)

    def bounce(self, said=NEVER, **more):
        force = settings(smtpd={"hostname": "mx.example.org"})
        return haineko.new_bounce(self.parcel(**more), said, force, 1e9 + 7200).message.copy("", 1)

    def test_bounce(self):
        words = "5.1.1 no such cat", "ねこ\r\nEvil: x"
        said = haineko.Reply("550", "5.1.1", "RCPT", words, "ESMTP", "mx.example.jp", 25)
        parts = "Subject: ねこ\r\nTo: ".encode(), b"\r\nMessage-Id: <Q.", b"@x>\r\n\r\nNyaa\r\n"
        octets = self.bounce(said, message=haineko.Message(parts, True))
        self.assertNotRegex(octets, rb"(?<!\r)\n|\r(?!\n)|\nEvil|Nyaa")
        report = parsed(octets)
        words, status, headers = report.iter_parts()
        kinds = [part.get_content_type() for part in (report, words, status, headers)]
        wanted = ["multipart/report", "text/plain", "message/delivery-status", "text/rfc822-headers"]
        self.assertEqual((kinds, report["content-type"].params["report-type"]), (wanted, "delivery-status"))
        self.assertEqual((report["to"], report["auto-submitted"]), ("s@example.org", "auto-replied"))
        self.assertIn("no such cat", words.get_content())
        whole, one = status.get_payload()
        told = whole["Reporting-MTA"], one["Remote-MTA"], one["Final-Recipient"], one["Action"], one["Status"]
        self.assertEqual(told, ("dns; mx.example.org", "dns; mx.example.jp", "rfc822; A@example.jp", "failed", "5.1.1"))
        self.assertIn("550 5.1.1 no such cat", one["Diagnostic-Code"])
        self.assertIn(b"Message-Id: <Q.1@x>", headers.get_payload(decode=True))

    def test_bounces_return_few_fields_and_say_how_they_are_coded(self):
        kept = b"From: f@x\r\nTo: t@x\r\nSubject: a\r\n b\r\n", b"Date: d\r\nMessage-Id: <1@x>\r\n"
        table = (
            (b"Received: x\r\n%bX-Spam: x\r\n%b" % kept, "tama", b"".join(kept)),
            (b"Date: d\r\n\r\nSubject: body\r\n", "たま", b"Date: d\r\n"), (b"", "tama", b""),
            (b"To: t\r\nSubject:%b\r\n" % (b" x" * 9999), "tama", b"To: t\r\n"),
            (b"Subject: x\r\n" * 9999, "tama", b"Subject: x\r\n" * (haineko.MAX_RETURNED // 12)),
        )  # fmt: skip
        for octets, to, wanted in table:
            with self.subTest(octets[:40]):
                bounce = self.bounce(to=f"{to}@example.jp", message=haineko.Message((octets,)))
                words, _, returned = email.message_from_bytes(bounce).get_payload()
                self.assertEqual(words["Content-Transfer-Encoding"], "7bit" if to.isascii() else "8bit")
                self.assertIn(f"{to}@example.jp", words.get_payload(decode=True).decode())
                self.assertEqual(returned.get_payload(), wanted.decode())

    def test_reports(self):
        queue = haineko.QueueSettings(path="x", webhook="http://h/")
        force = haineko.Settings(queue=queue, recipients=haineko.Recipients(domainpart=frozenset(("example.org",))))
        table = (
            ({"attempts": 1}, "open", ["message.deferred"]), ({"attempts": 2}, "open", []),
            ({}, "delivered", ["message.delivered"]), ({}, "failed", ["message.failed", "bounce"]),
            ({"sender": ""}, "failed", []), ({"sender": "", "kind": "event"}, "failed", []),  # a bounce, an event
            ({"sender": "a@example.net"}, "failed", ["message.failed"]),  # who may not be written to
            ({"sender": "a@example.net", "login": "tama"}, "failed", ["message.failed", "bounce"]),
        )  # fmt: skip
        for more, state, wanted in table:
            found = haineko.notifications(self.parcel(**more), LATER, state, force, 1e9)
            kinds = [json.loads(e.message.parts[0])["type"] if e.kind == "event" else "bounce" for e in found]
            self.assertEqual(kinds, wanted, (state, more))

    def test_history_is_bounded(self):
        history, long = "[]", haineko.Reply("451", None, "DATA", ("x" * 5000,) * 100)
        for n in range(70):
            history = haineko.add_attempt(history, n, long)
        found = haineko.parse_history(history)
        self.assertEqual((len(found), found[0][0], found[-1][0]), (haineko.MAX_HISTORY, 0, 69))
        self.assertLess(len(history), haineko.MAX_HISTORY * haineko.MAX_REPLY_LINES * 600)

    def test_settings(self):
        hook = "https://example.org/x"
        table = (
            ({}, None), ({"path": ""}, "queue.path"), ({"path": "nowhere/q.db"}, "queue.path"),
            ({"lifetme": 3}, "lifetime"), ({"retry_after": []}, "retry_after"),
            ({"webhook": hook}, "webhook_secret"), ({"webhook_secret": "whsec_AAAA"}, "webhook_secret"),
            ({"webhook": "ftp://x"}, "queue.webhook"), ({"webhook": "https://a..b/h"}, "queue.webhook"),
            ({"webhook": "https://x.example:99999/h"}, "queue.webhook"),
            ({"webhook": hook, "webhook_secret": WHSEC}, None),
        )  # fmt: skip
        for more, wanted in table:
            with self.subTest(more):
                path = self.write("haineko.json", {"queue": {"path": "q.db", **more}})
                force, faults = haineko.load_settings(path)
                self.assertEqual(bool(faults), wanted is not None, faults)
                self.assertIn(wanted or "", " ".join(faults))
                self.assertNotIn("MDEy", json.dumps(haineko.redacted(force)))
        os.chmod(path, 0o644)
        self.assertIn("can be read by everybody", " ".join(haineko.load_settings(path)[1]))


class QueueStore(Folder, Quiet):
    """The file."""

    def setUp(self):
        Quiet.setUp(self)
        Folder.setUp(self)
        self.policy = haineko.QueueSettings(path=os.path.join(self.folder, "q.db"), min_free=0)
        self.use(haineko.QueueDB(self.policy))

    def use(self, store):
        self.store, store.timeout = store, 0.1
        self.addCleanup(store.close, True)

    def do(self, operation, *values):
        (result,) = self.store.commit([(operation, values)])
        if isinstance(result, Exception):
            raise result
        return result

    def add(self, *names, results=None, **more):
        for name in names:
            self.do(haineko.enqueue, entry(name, **more), results)

    def parcels(self, now=None, limit=9):
        return self.do(haineko.lease_due, now or time.time(), limit, {}, {}, 0)

    def lease(self, now=None):
        return [parcel.item.queueid for parcel in self.parcels(now)]

    def states(self, queueid="Q" * 16):
        return [row["state"] for row in self.do(haineko.message_status, queueid)["recipients"]]

    def row(self, sql, *values):
        return tuple(self.store.db.execute(sql, values).fetchone())

    def stored(self, queueid, path=None):
        """How many mails of that name are in the file."""
        with contextlib.closing(sqlite3.connect(path or self.policy.path)) as db:
            return db.execute("SELECT count(*) FROM messages WHERE queueid=?", (queueid,)).fetchone()[0]

    def other(self, code):
        """What another process does that has the file as `s`."""
        store = f"haineko.QueueDB(haineko.QueueSettings(path={self.policy.path!r}, min_free=0))"
        words = [sys.executable, "-c", f"import haineko, os, sys, time, fcntl, sqlite3, traceback; s = {store}; {code}"]
        more = {"cwd": HERE, "env": environment(), "capture_output": True, "text": True, "timeout": 20}
        return subprocess.run(words, stdin=subprocess.DEVNULL, check=False, **more)

    def test_it_is_durable_and_only_the_owner_reads_it(self):
        self.add("a")
        self.assertEqual((self.row("PRAGMA journal_mode"), self.row("PRAGMA synchronous")), (("wal",), (2,)))
        paths = [self.policy.path + suffix for suffix in ("", "-wal", "-shm", ".lock")]
        modes = lambda: {path: os.stat(path).st_mode & 0o777 for path in paths}  # noqa: E731
        self.assertEqual(modes(), dict.fromkeys(paths, 0o600))
        for path in paths:
            os.chmod(path, 0o644)
        with contextlib.closing(sqlite3.connect(self.policy.path)) as keep:  # so that -wal and -shm stay
            keep.execute("SELECT count(*) FROM messages").fetchone()
            self.store.close(for_good=True)
            self.do(haineko.queue_stats, 0)
            self.assertEqual(modes(), dict.fromkeys(paths, 0o600))

    def test_take_by_lane(self):
        now = time.time()
        self.add(*[f"slow{n}" for n in range(6)], lane="slow")
        self.add("fast", lane="fast")
        self.add("later", lane="fast", born=now + 100)
        self.add("tried", lane="tried", results=[haineko.AttemptResult(LATER, "open", 999)])
        table = (  # what is wanted at once, busy, asleep, born before, leased
            (None, {}, {}, 0, ["fast", "slow0", "slow1"]),  # two of each lane at most
            (None, {"slow": 1, "fast": 2}, {}, 0, ["slow2"]),  # less those under way
            (None, {}, {"slow": 9}, 0, []),
            ("slow3", {}, {"slow": 9}, 0, ["slow3"]),
            (None, {}, {"slow": 9}, now + 9, ["slow4", "slow5"]),  # at the end of its life
            (None, {}, {"tried": 1}, now + 9, []),  # to be given up once it, or others there, had three attempts
            (None, {}, {"tried": 2}, now + 9, ["tried"]),
        )
        for wanted, *values, names in table:
            with self.subTest(wanted=wanted, values=values):
                self.assertEqual(wanted and self.do(haineko.flush_queue, wanted), wanted and 1)
                found = self.do(haineko.lease_due, time.time(), 2, *values)
                self.assertEqual([parcel.item.queueid for parcel in found], names)
                self.assertTrue(all(parcel.item.message == entry().message for parcel in found))

    def test_the_next_one_is_found_in_constant_time(self):
        self.do(haineko.queue_stats, 0)
        for sql in (haineko.DUE_SQL, haineko.EXPIRED_SQL):
            values = ("x", 0, 1, 1)[: sql.count("?")]
            plan = str([row[-1] for row in self.store.db.execute("EXPLAIN QUERY PLAN " + sql, values)])
            self.assertRegex(plan, "^(?!.*(SCAN|TEMP)).*USING")

    def test_leases_of_the_dead(self):
        self.do(haineko.enqueue, entry(to=("a@example.jp", "b@example.jp")), None, True)
        self.assertEqual(self.lease(), [])
        code = (
            "s.commit([]); s.commit([(haineko.maintain, (s, time.time()))]);"
            "print(len(s.commit([(haineko.lease_due, (time.time() + 999, 9, {}, {}, 0))])[0]))"
        )
        self.assertEqual(self.other(code).stdout, "0\n")  # we live
        os.unlink(self.policy.path + ".lock")
        self.do(haineko.queue_stats, 0)
        self.assertEqual(self.other(code).stdout, "0\n")
        self.store.close(for_good=True)
        found = self.other(code)
        self.assertEqual((found.stdout, found.stderr.count("may arrive twice")), ("2\n", 2))

    def test_files_of_other_versions_are_refused(self):
        self.add("a")
        path = self.write("haineko.json", {"queue": {"path": "q.db"}})
        for version in (1, 99):
            with self.subTest(version):
                with contextlib.closing(sqlite3.connect(self.policy.path)) as db:
                    db.execute(f"PRAGMA user_version={version}")
                told = f"is of version {version}, this Haineko's is 2: let the Haineko that wrote"
                found = run_program("serve", "-c", path, "--listen", "127.0.0.1:0", text=True)
                self.assertEqual((found.returncode, told in found.stderr), (2, True), found.stderr)

    def test_what_cannot_be_read_is_held_and_stops_no_other(self):
        history, parts = "recipients SET history=? WHERE message=", "messages SET parts=? WHERE id="
        for what, value in ((history, "{"), (history, "[5]"), (history, "[[1]]"), (parts, "[]"), (parts, "7")):
            with self.subTest(what, value=value):
                bad, good = "bad" + value, "good" + value
                self.add(bad, good)
                self.store.db.execute(f"UPDATE {what}(SELECT id FROM messages WHERE queueid=?)", (value, bad))
                self.assertEqual((self.lease(), self.states(bad)), ([good], ["held"]))
                self.assertEqual(self.do(haineko.drop_message, bad, 0), 1)

    def test_a_fault_accepts_nothing_and_heals(self):
        def locked():
            other = sqlite3.connect(self.policy.path, isolation_level=None)
            other.execute("BEGIN EXCLUSIVE")
            return other.close

        def corrupt():
            self.store.close()
            sound = shutil.copy(self.policy.path, os.path.join(self.folder, "sound"))
            self.write("q.db", b"This is no queue" * 999)
            return lambda: shutil.copy(sound, self.policy.path)

        for hurt in (locked, corrupt):
            with self.subTest(hurt):
                self.do(haineko.queue_stats, 0)
                heal = hurt()
                with self.assertRaises(haineko.Rejected) as caught:
                    self.add("a")
                told = caught.exception.reply.status, caught.exception.reply.code, self.store.health_error()
                self.assertEqual(told, (503, "451", "the queue can't be used"))
                heal()
                self.add(hurt.__name__)
                self.assertEqual((self.store.health_error(), self.stored(hurt.__name__)), ("", 1))

    def test_files_that_are_moved_away(self):
        elsewhere, names = tempfile.mkdtemp(dir=self.folder), ("", "-wal", "-shm", ".lock")
        for number, suffixes in enumerate((*[(name,) for name in names], names[1:3], names[:3], names)):
            with self.subTest(suffixes):
                before, after, moved = f"before{number}", f"after{number}", os.path.join(elsewhere, str(number))
                self.add(before)
                for suffix in suffixes:
                    os.rename(self.policy.path + suffix, moved + suffix)
                self.add(after)
                self.assertEqual(self.store.health_error(), "")
                self.store.close()
                self.assertEqual((self.stored(before, moved if "" in suffixes else None), self.stored(after)), (1, 1))

    def test_read_only(self):
        self.do(haineko.queue_stats, 0)
        self.store.close(for_good=True)
        os.chmod(self.folder, 0o555)
        os.chmod(self.policy.path, 0o444)
        found = self.other(
            "import test_haineko; os.getuid() or os.setuid(65534); item = test_haineko.entry();"
            "sys.exit(not isinstance(s.commit([(haineko.enqueue, (item, None))])[0], haineko.Rejected))"
        )
        self.assertEqual((found.returncode, found.stderr.count("nothing is accepted into it")), (0, 1), found.stderr)

    def test_a_bug_costs_its_own_work_only(self):
        def bug(db, slot):
            haineko.enqueue(db, slot, entry("bug"), None)
            raise KeyError("cat")

        work = [(haineko.enqueue, (entry("one"), None)), (bug, ()), (haineko.enqueue, (entry("two"), None))]
        one, fault, two = self.store.commit(work)
        self.assertEqual([one, type(fault), two], [None, KeyError, None])
        self.assertEqual([self.stored(name) for name in ("one", "bug", "two")], [1, 0, 1])

    def test_forgotten_after_a_day(self):
        self.add("a", key=b"k", results=[haineko.AttemptResult(ACCEPTED, "delivered")])
        self.assertEqual(self.row("SELECT length(octets), completed_at IS NULL FROM messages"), (0, 0))
        for hours, left in ((23, 1), (25, 0)):
            self.do(haineko.maintain, self.store, time.time() + hours * 3600)
            self.assertEqual(self.row("SELECT count(*) FROM messages"), (left,))
        self.assertEqual(self.row("SELECT count(*) FROM recipients"), (0,))

    def test_an_attempt_that_ends_well_clears_the_count(self):
        self.add("a")
        now = time.time()
        for _ in range(4):
            for _ in range(2):
                now += 99999
                self.assertEqual(self.lease(now), ["a"])
                self.do(haineko.release_leases, self.policy, now)  # what another process does when one has died
            now += 99999
            (leased,) = self.parcels(now)
            self.do(haineko.finish_attempt, leased.id, haineko.AttemptResult(LATER, "open"), now)
        self.assertEqual(self.states("a"), ["waiting"])

    def test_suspects_are_tried_one_at_a_time(self):
        """Mails that were in flight beside a killer are not in flight beside it a third time; it is held alone."""
        self.add("killer", "one", "two")
        now = time.time()
        for count in (3, 3, 1):
            now += 99999
            self.assertEqual(len(self.lease(now)), count)
            self.assertEqual(self.lease(now), [])
            self.do(haineko.release_leases, self.policy, now)
        stats = self.do(haineko.queue_stats, now)
        self.assertEqual((stats["held"], stats["sending"], stats["waiting"]), (1, 0, 2))

    def test_a_bug_ends_no_lease_never(self):
        """What can't be recorded because of a bug is tried again, and held at the third time."""
        service = haineko.App(settings(queue={"path": self.policy.path, "min_free": 0}))
        self.use(service.queue)
        manager = haineko.QueueManager(service, None)
        self.do(haineko.enqueue, entry(to=("a@example.jp", "b@example.jp")), None)
        now = time.time()
        for states in (["waiting"] * 2, ["waiting"] * 2, ["waiting", "held"], ["held"] * 2):  # the third time alone
            now += 99999
            for leased in self.parcels(now):
                haineko.run(manager._deliver(leased._replace(attempts=None)))
            self.assertEqual(sorted(self.states(), reverse=True), states)
            self.assertFalse(+manager.in_flight)

    def test_a_bug_of_a_request_ends_its_lease(self):
        """The answer can't be written: the mail with a key, which was sent, is not leased for ever."""
        service = haineko.App(settings(queue={"path": self.policy.path, "min_free": 0}))
        self.use(service.queue)
        with self.assertRaises(UnicodeError):
            answered(request(as_body(document()), user_agent="\ud800", idempotency_key="k"), service)
        due, owner, history = self.row("SELECT due, owner, history FROM recipients")
        self.assertEqual((due > NOW, owner, "may have arrived" in history), (True, None, True), history)

    def test_a_commit_that_fails_by_a_bug_leaves_nobody_waiting(self):
        with patched(haineko.QueueDB, commit=lambda *_: {}["bug"]):
            self.assertRaises(KeyError, haineko.run, asyncio.wait_for(self.store.do(haineko.queue_stats, 0), 5))

    def test_drop_is_refused_while_sending(self):
        self.do(haineko.enqueue, entry(to=("a@example.jp", "b@example.jp")), None)
        (leased,) = self.parcels(limit=1)
        with self.assertRaisesRegex(haineko.CommandError, "being sent"):
            haineko.run_operation(self.store, haineko.drop_message, "Q" * 16, 0)
        self.assertRaises(ZeroDivisionError, haineko.run_operation, self.store, lambda *_: 1 // 0)
        self.assertEqual(self.states(), ["sending", "waiting"])
        self.do(haineko.finish_attempt, leased.id, haineko.AttemptResult(None, "delivered"), 0)
        counts = [self.do(haineko.drop_message, name, 0) for name in ("Q" * 16, "Q" * 16, "unknown")]
        self.assertEqual((counts, self.states()), ([1, 0, 0], ["delivered", "dropped"]))
        self.assertEqual(self.row("SELECT completed_at, length(octets) FROM messages"), (0, 0))

    def test_a_clock_that_was_set_back(self):
        now = time.time()
        self.add("tried", lane="a", results=[haineko.AttemptResult(LATER, "open", 60)])
        self.add("fresh", lane="b")
        self.add("for later", lane="c")
        self.store.db.execute("UPDATE recipients SET due=created_at+9e5 WHERE destination='c'")
        self.assertEqual(self.lease(now - 9e5), [])
        self.do(haineko.maintain, self.store, now - 9e5, True)
        self.assertEqual(self.lease(now - 9e5), ["tried", "fresh"])

    def test_mail_for_later(self):
        """Its lifetime begins when it is due, and a clock that was set back does not send it at once."""
        now = time.time()
        self.add("later", born=now, send_at=now + 99)
        self.add("past", born=now, send_at=now - 99)
        born = lambda at: [(leased.item.queueid, leased.item.created_at) for leased in self.parcels(at)]  # noqa: E731
        self.assertEqual(born(now), [("past", now)])
        self.do(haineko.maintain, self.store, now - 9e5, True)
        self.assertEqual(self.do(haineko.flush_queue, None), 0)
        self.assertEqual((born(now + 98), born(now + 100)), ([], [("later", now + 99)]))

    def test_files_of_others_are_refused(self):
        target = self.write("target", "of somebody else")
        for suffix in ("", "-wal", "-shm", ".lock"):
            for what, make in (("link", lambda path: os.symlink(target, path)), ("FIFO", os.mkfifo)):
                with self.subTest(suffix, what=what):
                    self.policy = replace(self.policy, path=os.path.join(self.folder, f"{what}{suffix}"))
                    make(self.policy.path + suffix)
                    self.use(haineko.QueueDB(self.policy))
                    with self.assertRaises(haineko.Rejected):
                        self.add("a")
                    with open(target) as stream:
                        self.assertEqual(stream.read(), "of somebody else")

    @unittest.skipIf(os.geteuid(), "takes root")
    def test_files_of_another_user(self):
        path = self.write("other", "", 0o644)
        os.chmod(self.folder, 0o777)
        os.chown(path, 12345, -1)
        os.seteuid(65534)
        self.addCleanup(os.seteuid, 0)
        with self.assertRaisesRegex(OSError, "is not a regular file of this user"):
            haineko.open_private(path, os.O_RDONLY)


class QueueServed(unittest.TestCase):
    """A real server, a peer that fails, a webhook."""

    @classmethod
    def setUpClass(cls):
        cls.peer, cls.hook = queue_peer(), webhook()
        hook = {"webhook": cls.hook.url + "/hook?cat=1", "webhook_secret": WHSEC}
        cls.server = Server(queue_settings(cls.peer, lifetime=7, **hook))
        for close in (cls.hook.__exit__, cls.peer.close, cls.server.close, cls.server.kill):
            cls.addClassCleanup(close)
        for _ in range(3):  # their life ends while the other tests run
            cls.server.submit("y@dead.example", sender="patient@example.org")

    def events(self, queueid):
        found = [asked.json() for asked in self.hook.asked[1:]]
        return [item["type"] for item in found if item["data"]["queueid"] == queueid]

    def test_deferred_then_delivered(self):
        to = "later2@example.jp"
        status, fields, answer = self.server.submit(to)
        queueid, (item,) = answer["queueid"], answer["response"]
        self.assertEqual((status, fields["Location"]), (202, f"/queue/{queueid}"))
        said = {"error": 0, "code": "250", "dsn": "2.0.0", "command": "QUEUE", "mailer": "Queue"}
        lines = [f"Queued as {queueid}", "4.2.0 not now, 1"]
        self.assertEqual(item, {"rcpt": to, **said, "message": lines, "host": None, "port": None})
        waiting = self.server.fate(queueid)[to]
        self.assertEqual((waiting["state"], len(waiting["attempts"])), ("waiting", 1))
        self.assertGreaterEqual(int(waiting["next"]["unixtime"]), int(answer["timestamp"]["unixtime"]))
        eventually(lambda: self.server.fate(queueid)[to]["state"] == "delivered")
        done = self.server.fate(queueid)[to]
        told = [item["code"] for item in done["attempts"]], done["command"], done["next"]
        self.assertEqual(told, (["451", "451", "250"], "DATA", None))
        (mail,) = self.peer.to(to)
        self.assertEqual((mail.sender, b"Nyaa" in mail.text), ("kijitora@example.org", True))
        eventually(lambda: self.events(queueid) == ["message.deferred", "message.delivered"], what="events")

    def test_sent_later(self):
        now = int(time.time())
        status, fields, answer = self.server.submit("at@example.jp", send_at=now + 3)
        queueid, (item,) = answer["queueid"], answer["response"]
        self.assertEqual((status, fields["Location"], item["command"]), (202, f"/queue/{queueid}", "QUEUE"))
        self.assertEqual(self.server.fate(queueid)["at@example.jp"]["next"]["unixtime"], str(now + 3))
        far = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now + 86400))
        waits = self.server.submit("never2@example.jp", send_at=far)[2]["queueid"]
        line = f"{waits}: client=127.0.0.1 from=<kijitora@example.org> (queued, to be delivered at 2"
        self.assertIn(line, self.server.log())
        self.assertEqual(self.server.queue("flush").returncode, 0)  # which is for what was tried
        self.assertEqual(self.server.fate(waits)["never2@example.jp"]["state"], "waiting")
        self.assertEqual(self.server.submit("past@example.jp", send_at="2001-02-03T04:05:06.7+09:00")[0], 202)
        eventually(lambda: self.peer.to("past@example.jp") and self.peer.to("at@example.jp"))
        self.assertGreaterEqual(time.time(), now + 3)
        sent = email.message_from_bytes(self.peer.to("at@example.jp")[0].text)
        self.assertEqual(email.utils.parsedate_to_datetime(sent["Date"]).timestamp(), now + 3)

    def test_seen_cancelled_and_retried_by_http(self):
        queueid = self.server.submit("later9@example.jp")[2]["queueid"]
        mail, evil = f"/queue/{queueid}", "Origin: https://evil.example"
        drop = lambda: self.server.ask(get(mail, method="DELETE"))[::2]  # noqa: E731
        status, found = self.server.ask(get(f"{mail}/retry", "Content-Length: 0", method="POST"))[::2]
        self.assertEqual((status, found["retried"]), (200, 1))
        answers = []
        eventually(lambda: answers.append(drop()) or answers[-1][0] != 409)  # once it is not being tried
        for count, (_, found) in ((1, answers[-1]), (0, drop())):
            told = found["queueid"], found["cancelled"], found["response"][0]["state"]
            self.assertEqual(told, (queueid, count, "dropped"))
        self.assertRegex(self.server.log(), f"{queueid}: client=127.0.0.1 .*1 recipients cancelled")
        cases = (
            ("GET", "/queue", (), 200), ("HEAD", mail, (), 200), ("GET", "/queue/", (), 404),
            ("GET", "/queue/nothing", (), 404), ("GET", f"{mail}/x", (), 404), ("POST", mail, (), 405),
            ("DELETE", "/queue/nosuchmail", (), 404), ("POST", "/queue/nosuchmail/retry", (), 404),
            ("DELETE", mail, ("X-Forwarded-For: 127.0.0.1",), 403), ("DELETE", mail, (evil,), 403),
            ("POST", f"{mail}/retry", (evil,), 403), ("DELETE", "/queue", (), 405),
            ("DELETE", f"{mail}/retry", (), 405),
        )  # fmt: skip
        for method, path, lines, wanted in cases:
            with self.subTest(method, path=path, lines=lines):
                more = ("Content-Length: 0",) * (method == "POST")
                self.assertEqual(self.server.ask(get(path, *lines, *more, method=method), method)[0], wanted)

    def test_statuses(self):
        table = (("a", "b", 200, "DATA", "DATA"), ("c", "later1a", 202, "DATA", "QUEUE"))
        for one, two, status, *commands in (*table, ("later1b", "never", 207, "QUEUE", "RCPT")):
            found = self.server.submit(f"{one}@example.jp", f"{two}@example.jp", sender="nobody@example.net")
            self.assertEqual((found[0], [item["command"] for item in found[2]["response"]]), (status, commands))

    def test_queued_at_once(self):
        preferred = {"headers": {"Prefer": "wait=9, Respond-Async"}}
        for to, more, told in (("p@example.jp", preferred, "respond-async"), ("q@example.jp", {"async": True}, None)):
            with self.subTest(**more):
                began = time.monotonic()
                status, fields, answer = self.server.submit(to, **more)
                self.assertEqual((status, fields.get("Preference-Applied")), (202, told))
                self.assertEqual(fields["Location"], "/queue/" + answer["queueid"])
                self.assertEqual(answer["response"][0]["message"], ["Queued as " + answer["queueid"]])
                eventually(lambda to=to: self.peer.to(to))
                self.assertLess(time.monotonic() - began, 0.9)  # it was rung for, not found by chance

    def test_bounces(self):
        sender = "sender@example.org"
        _, _, answer = self.server.submit("never@example.jp", sender=sender, **{"async": True})
        (mail,) = eventually(lambda: self.peer.to(sender), "bounce")
        told = b"\r\nFinal-Recipient: rfc822; never@example.jp\r\nAction: failed\r\nStatus: 5.1.1\r\n"
        self.assertEqual((mail.sender, told in mail.text), ("", True))
        self.assertEqual(self.server.fate(answer["queueid"])["never@example.jp"]["state"], "failed")
        eventually(lambda: self.events(answer["queueid"]) == ["message.failed"], what="event")
        self.server.submit("never@example.jp", sender="never2@example.jp", **{"async": True})
        line = "from=<> to=<never2@example.jp>.* status=bounced"
        eventually(lambda: re.search(line, self.server.log()), "the end of a bounce that bounces")
        self.assertNotIn("to=<>", self.server.log())

    def test_zz_end_of_life(self):
        """Those that wait for a dead host are given up when their life ends, with the host's last words."""
        eventually(lambda: len(self.peer.to("patient@example.org")) == 3, "bounces", 15)
        self.assertIn(b"421 Connection refused", self.peer.to("patient@example.org")[0].text)

    def test_webhook_is_signed(self):
        self.server.submit("hooked@example.jp", **{"async": True})
        eventually(lambda: len(self.hook.asked) >= 2, what="event")
        for asked in list(self.hook.asked):
            head = asked.headers
            signed = f"{head['webhook-id']}.{head['webhook-timestamp']}.".encode() + asked.body
            wanted = base64.b64encode(hmac.new(HOOK_SECRET, signed, hashlib.sha256).digest()).decode()
            self.assertIn("v1," + wanted, head["webhook-signature"].split(" "))
            self.assertLess(abs(time.time() - int(head["webhook-timestamp"])), 60)
            self.assertEqual(set(asked.json()), {"type", "timestamp", "data"})
        first = self.hook.asked[0].headers["webhook-id"]  # which failed
        eventually(lambda: first in [asked.headers["webhook-id"] for asked in self.hook.asked[1:]], "its second try")
        self.assertNotIn("cat=1", self.server.log() + json.dumps(self.server.get("/conf")[1]))  # it may be a secret

    def test_idempotency(self):
        def ask(name, key):
            more = {"Prefer": "respond-async"} if name == "later" else {}
            return self.server.submit(f"{name}@example.jp", headers={"Idempotency-Key": key, **more})

        first, to = ask("later1k", '"first"'), "later1k@example.jp"
        table = (
            ("later1k", '"first"', 202, True), ("later1k", "first", 202, True), ("other", '"first"', 422, False),
            ("other", "second", 200, False), ("other", '"a b"', 200, False), ("other", '"a b"', 200, True),
            ("later", "third", 202, False), ("later", "third", 202, True),
            ("never", "fourth", 502, False), ("never", "fourth", 502, True),
            *[("other", bad, 400, False) for bad in ("", '""', '"a', "a b", "a, b", "x" * 256, "n\xe4ko")],
        )  # fmt: skip
        for name, key, status, replayed in table:
            with self.subTest(name, key=key, replayed=replayed):
                found = ask(name, key)
                told = found[0], found[1].get("Idempotency-Replayed")
                self.assertEqual(told, (status, "true" if replayed else None))
                if name == "later1k":
                    self.assertEqual((found[2], found[1]["Location"]), (first[2], first[1]["Location"]))
        mails = lambda: (len(self.peer.to(to)), len(self.peer.to("later@example.jp")))  # noqa: E731
        eventually(lambda: all(mails()) and self.server.fate(first[2]["queueid"])[to]["state"] == "delivered")
        self.assertEqual((ask("later1k", '"first"')[2], mails()), (first[2], (1, 1)))  # after it was delivered, too

    def test_readme(self):
        """What it says of the queue is so."""
        commands = re.findall(r"(?ms)^```sh queue\n(.*?)^```$", README)
        (shown,) = map(json.loads, re.findall(r"(?ms)^```json event\n(.*?)^```$", README))
        with open(os.path.join(self.server.folder, "mail.json"), "wb") as stream:
            stream.write(as_body(document(mail="a@example.org", rcpt=["cat@example.jp"])))
        more, answers = {"cwd": self.server.folder, "env": environment(), "capture_output": True, "timeout": 20}, []
        for line in [*commands, commands[-1]]:
            command = line.replace("127.0.0.1:2794", f"127.0.0.1:{self.server.places[0][1]}")
            answers.append(json.loads(subprocess.run(["sh", "-eu", "-c", command], check=False, **more).stdout))
        self.assertEqual([item["response"][0]["command"] for item in answers], ["QUEUE", "DATA", "DATA"])
        self.assertEqual(answers[1], answers[2])
        event = eventually(lambda: self.hook.asked)[0].json()
        self.assertEqual((set(event), set(event["data"])), (set(shown), set(shown["data"])))

    def test_dead_lane_delays_nobody(self):
        for _ in range(30):
            self.server.submit("z@dead.example", sender="none@example.org", **{"async": True})
        began = time.monotonic()
        self.server.submit("lively@example.jp", **{"async": True})
        eventually(lambda: self.peer.to("lively@example.jp"))
        self.assertLess(time.monotonic() - began, 1.0)


class QueueAlone(unittest.TestCase):
    """Servers of their own: crashes, faults, logins, commands."""

    def peer(self, script=None):
        peer = queue_peer(script)
        self.addCleanup(peer.close)
        return peer

    def test_without_the_section(self):
        server = served(self, {**queue_settings(self.peer()), "queue": None})
        key, prefer = {"Idempotency-Key": "x"}, {"Prefer": "respond-async"}  # which may be ignored
        for more, wanted in (({}, 503), ({"headers": key}, 400), ({"async": True}, 400), ({"headers": prefer}, 200)):
            status, _, answer = server.submit("a@example.jp" if more else "later1@example.jp", **more)
            self.assertEqual(status, wanted, more)
            if status == 400:
                self.assertIn('"queue": {"path": "haineko.db"}', answer["response"][0]["message"][0])
        self.assertEqual((server.get("/queue")[0], server.get("/queue/" + "x" * 16)[0]), (404, 404))
        self.assertEqual((len(server.workers()), server.queue("list").returncode), (1, 2))

    def test_logins(self):
        force = {"password": {"tama": SettingsFile.KIJITORA}, "httpd": {"trusted_proxies": ["127.0.0.1"]}}
        server = served(self, {**queue_settings(self.peer()), **force})
        tama = {"Authorization": "Basic " + base64.b64encode(b"tama:kijitora").decode()}
        mail = server.submit("later9@example.jp", headers=tama)[1]["Location"]
        afar = [f"Authorization: {tama['Authorization']}", "X-Forwarded-For: 192.0.2.1"]
        asked = (mail, *afar), (mail,), ("/queue", *afar), ("/queue",)
        self.assertEqual([server.get(*words)[0] for words in asked], [200, 200, 403, 200])

    def test_crash_in_between(self):
        """A worker dies while the peer has the mail of a request with a key: 409 before, then the queue finishes it."""

        def ask():
            try:
                return server.submit("cut@example.jp", headers={"Idempotency-Key": "k"})
            except (OSError, EOFError):
                return (0,)

        gate = threading.Event()
        peer = self.peer(lambda to, count: gate if count == 1 else "250 2.0.0 Ok")
        self.addCleanup(gate.set)
        slow = {"default": {"port": peer.port, "timeout": 60}}
        server = served(self, {**queue_settings(peer), "mailertable": slow, "httpd": {"workers": 2, "timeout": 60}})
        answers = []
        thread = threading.Thread(target=lambda: answers.append(ask()))
        thread.start()
        eventually(lambda: peer.tries)
        status, fields, _ = ask()
        self.assertEqual((status, "Retry-After" in fields), (409, True))
        for pid in server.workers():
            os.kill(pid, signal.SIGKILL)
        thread.join()
        self.assertEqual(answers, [(0,)])
        eventually(lambda: answers.append(ask()) or answers[-1][0] not in (0, 409))
        status, fields, answer = answers[-1]
        told = status, fields["Idempotency-Replayed"], answer["response"][0]["command"]
        self.assertEqual(told, (202, "true", "QUEUE"))
        eventually(lambda: peer.to("cut@example.jp") and server.idle())
        self.assertEqual((len(peer.to("cut@example.jp")), ask()[2]), (1, answer))
        self.assertIn("may arrive twice", server.log())

    def test_full_disk(self):
        """The file can't grow: what was answered 202 is in it, all else was 503, and nothing that waits is lost."""
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))  # noqa: E731
        server = served(self, queue_settings(self.peer(), retry_after=[600]), before=limit)
        answers = [server.submit(f"x{n}@dead.example", body="x" * 70_000) for n in range(12)]
        self.assertEqual({status for status, _, _ in answers}, {202, 503})
        more = server.submit("x@dead.example", body="x" * 70_000, **{"async": True})
        self.assertEqual((more[0], server.get("/health")[0]), (503, 503))
        self.assertIn("nothing is accepted into it", server.log())
        self.assertEqual(server.submit("direct@example.jp", body="fits")[0], 200)
        server.kill()
        with contextlib.closing(sqlite3.connect(os.path.join(server.folder, "haineko.db"))) as db:
            found = [row[0] for row in db.execute("SELECT queueid FROM messages ORDER BY id")]
        self.assertEqual(found, [answer["queueid"] for status, _, answer in answers if status == 202])

    def test_little_room(self):
        server = served(self, queue_settings(self.peer(), min_free=1 << 50))
        asked = server.submit("later1@example.jp"), server.submit("a@example.jp", **{"async": True})
        self.assertEqual([server.get("/health")[0], *[status for status, _, _ in asked]], [503] * 3)
        self.assertEqual(server.submit("b@example.jp")[0], 200)

    def test_commands(self):
        peer = self.peer()
        server = served(self, queue_settings(peer, retry_after=[600]))
        one, two, three = (server.submit(f"later1{name}@example.jp")[2]["queueid"] for name in "abc")
        rows = json.loads(server.queue("--json").stdout)
        self.assertEqual([row["queueid"] for row in rows], [one, two, three])
        self.assertEqual((rows[0]["state"], rows[0]["response"]["code"][0], rows[0]["attempts"]), ("waiting", "4", 1))
        table = (
            (("list",), 0, one), ((), 0, three), (("list",), 0, "\n3 recipients\n"), (("pet",), 2, ""),
            (("show", one), 0, "to <later1a@example.jp>: waiting, next attempt "),
            (("--json", "show", one), 0, '"state": "waiting"'), (("show", "nothing"), 1, ""), (("show",), 2, ""),
            (("drop", two), 0, "1 recipient dropped"), (("drop", two), 1, "0 recipients dropped"),
            (("retry", one), 0, "1 recipient to be tried at once"), (("flush",), 0, "to be tried at once"),
        )  # fmt: skip
        for words, code, wanted in table:
            with self.subTest(words):
                found = server.queue(*words)
                self.assertEqual(found.returncode, code, found.stderr)
                self.assertIn(wanted, found.stdout)
        eventually(server.idle)
        taken = sorted(mail.recipients[0] for mail in peer.taken)
        self.assertEqual(taken, ["later1a@example.jp", "later1c@example.jp"])
        self.assertEqual(json.loads(server.queue("list", "--json").stdout), [])
        server.kill()
        self.assertEqual(server.queue("retry", "--all").stdout, "0 recipients to be tried at once\n")
        self.assertIn(": dropped\n", server.queue("show", two).stdout)

    def state(self, server, queueid):
        """The state of the mail's first recipient, None while nobody answers."""
        with contextlib.suppress(OSError, EOFError, StopIteration):
            return next(iter(server.fate(queueid).values()))["state"]
        return None

    def test_a_mail_that_kills_its_process_is_held(self):
        gate = threading.Event()
        peer = self.peer(lambda to, count: gate if to.startswith("killer") else "250 2.0.0 Ok")
        self.addCleanup(gate.set)
        server = served(self, queue_settings(peer))
        queueid = server.submit("killer@example.jp", **{"async": True})[2]["queueid"]
        eventually(lambda: peer.tries and self.state(server, queueid) == "sending")
        self.assertEqual(server.ask(get(f"/queue/{queueid}", method="DELETE"))[0], 409)
        for count in (1, 2, 3):
            eventually(lambda count=count: peer.tries.get("killer@example.jp") == count, "an attempt")
            for pid in server.workers():
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: self.state(server, queueid) == "held", "held")
        self.assertEqual(server.submit("calm@example.jp", **{"async": True})[0], 202)
        eventually(lambda: peer.to("calm@example.jp"))
        self.assertRegex(server.log(), "to=<killer@example.jp> status=held")
        self.assertIn("next held", server.queue("list").stdout)
        gate.set()
        for which, told in (("--all", "0 recipients"), (queueid, "1 recipient")):
            self.assertEqual(server.queue("retry", which).stdout, f"{told} to be tried at once\n")
        eventually(lambda: self.state(server, queueid) == "delivered", "delivery")

    def test_a_fault_of_the_route_is_no_verdict_on_the_mail(self):
        peer, replies = self.peer(), ["530 5.7.0 Authentication required", None] * 2
        peer.says["DATA"] = lambda connection, line: replies.pop(0) if replies else None
        server = served(self, queue_settings(peer))
        for more in ({}, {"async": True}):
            status, _, answer = server.submit("a@example.jp", **more)
            self.assertEqual(status, 202)
            eventually(lambda queueid=answer["queueid"]: self.state(server, queueid) == "delivered", "delivery")
            found = [item["code"] for item in server.fate(answer["queueid"])["a@example.jp"]["attempts"]]
            self.assertEqual((found[0], found[-1]), ("530", "250"))


class QueueCrash(unittest.TestCase):
    """Load, peers that fail by chance, SIGKILL to a process by chance, again and again; then everything is counted.
    HAINEKO_CRASH_ROUNDS says how often."""

    def setUp(self):
        self.rounds = int(os.environ.get("HAINEKO_CRASH_ROUNDS", "4"))
        self.dice = random.Random(os.environ.get("HAINEKO_CRASH_SEED", "neko"))
        self.peer = queue_peer(self.by_chance)
        self.addCleanup(self.peer.close)
        self.server = served(self, {**queue_settings(self.peer, lifetime=100000), "httpd": {"workers": 2}})
        self.accepted, self.number, self.lock, self.over = set(), 0, threading.Lock(), False

    def by_chance(self, recipient, count):
        said = ["250 2.0.0 Ok"] * 14 + ["451 4.2.0 not now"] * 3 + ["554 5.0.0 never", HANG_UP, LOST]
        return said[0] if recipient == "sender@example.org" else self.dice.choice(said)

    def client(self):
        """Posts one mail after the other; with a key it asks until it is told, without one it gives up."""
        while not self.over:
            with self.lock:
                self.number += 1
                to, keyed, later = f"r{self.number}@example.jp", *self.dice.choices((True, False), k=2)
            more = {"headers": {"Idempotency-Key": to} if keyed else {}, "async": later}
            while True:
                try:
                    status = self.server.submit(to, sender="sender@example.org", **more)[0]
                except (OSError, EOFError, ValueError):
                    status = 0
                if status in (200, 202):
                    self.accepted.add(to)
                if not keyed or status not in (0, 409):
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
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL) if victim else self.server.kill()
            if victim in (0, self.server.process.pid):
                self.server.process.wait()
                self.server.start()
        self.over = True
        for client in clients:
            client.join()
        eventually(self.settled, "an empty queue", 60)
        reports = [mail.text for mail in self.peer.to("sender@example.org")]
        bounced = {re.search(rb"Final-Recipient: rfc822; (\S+)", text)[1].decode() for text in reports}
        arrived = collections.Counter(to for mail in self.peer.taken for to in mail.recipients)
        unsure = {to for mail in self.peer.lost for to in mail.recipients}
        unsure |= set(re.findall(r"to=<([^>]+)>[^\n]*(?:may|might) arrive", self.server.log()))
        twice = {to for to, count in arrived.items() if count > 1 and to != "sender@example.org"}
        self.assertEqual(self.accepted - set(arrived) - bounced, set(), "lost")
        self.assertEqual(twice - unsure, set(), "twice without a word")
        self.assertGreater(len(self.accepted), 2 * self.rounds)

    def settled(self):
        """True once nothing waits; mail that is held, since it was in flight at three kills in a row, is released."""
        for line in self.server.queue("list").stdout.splitlines():
            if "next held" in line:
                self.server.queue("retry", line.split()[0])
        found = self.server.get("/queue")[1]
        return found["waiting"] == found["sending"] == found["held"] == 0


# ======================================================================================================================
# 17. The way of a mail
# ======================================================================================================================


class Submitting(Peers):
    """From the request to the answer: ways, statuses, log; dry runs, staging, traces, recipients in the header."""

    def submitted(self, table: dict, rcpt: list, **sections) -> tuple:
        """(HTTP status, headers, document) of one mail to those recipients, by those routes."""
        service = haineko.App(settings(mailertable=table, **sections))
        answer = answered(request(as_body(document(rcpt=rcpt)), "192.0.2.7"), service)
        return answer.status, dict(answer.headers), json.loads(answer.body)

    def test_by_each_cloud(self) -> None:
        for mailer, answer in PEERS.items():
            with self.subTest(mailer), HttpPeer(answer) as peer:
                more = {"region": "eu-west-1"} if mailer == "AmazonSES" else {}
                force = web_settings({"mailer": mailer, "base_url": peer.url, "auth": "key", "timeout": 2, **more})
                status, found = posted(web_submission(rcpt=["mikeneko@example.jp", "tama@example.jp"]), force)
                told = status, len(peer.asked), [item["mailer"] for item in found["response"]]
                self.assertEqual(told, (200, 2, [mailer] * 2), found)
                self.assertNotIn(SECRET, json.dumps(found))

    def test_several_are_delivered_side_by_side_up_to_max_workers(self) -> None:
        for most, count in ((1, 3), (2, 6), (3, 6)):
            with self.subTest(max_workers=most):
                peer = self.peer({".": held(threading.Barrier(most))})
                rcpt = [f"r{i}@example.jp" for i in range(count)]
                smtpd = {"hostname": NAME, "max_workers": most, "max_rcpts_per_message": 0}
                status, _, found = self.submitted({"default": esmtp(peer)}, rcpt, smtpd=smtpd)
                told = status, [item["rcpt"] for item in found["response"]], peer.most, len(peer.mails)
                self.assertEqual(told, (200, rcpt, most, count))
                self.assertLessEqual(len(peer.connections), most)

    def test_replies_stand_in_the_order_of_the_request(self) -> None:
        def in_reverse(connection, line) -> str:
            number = int(connection.recipients[0][10])
            eventually(lambda: number == 3 or events[number + 1].is_set(), "the one after it", 3)
            events[number].set()
            return f"250 2.0.0 number {number}"

        events = [threading.Event() for _ in range(4)]
        rcpt = ["r0@example.jp", "x@bad@", "r1@example.jp", "r2@example.jp", "r3@example.jp"]
        most, table = {"hostname": NAME, "max_rcpts_per_message": 9}, {"default": esmtp(self.peer({".": in_reverse}))}
        _, _, found = self.submitted(table, rcpt, smtpd=most)
        told = [(item["rcpt"], item["message"]) for item in found["response"]]
        numbers = [[f"2.0.0 number {i}"] for i in range(4)]
        self.assertEqual(told, list(zip(rcpt, [numbers[0], ["Recipient address is invalid"], *numbers[1:]])))
        self.assertEqual(found["recipient"], [to for to in rcpt if to != "x@bad@"])

    def test_the_status_sums_up(self) -> None:
        says = {"good": {}, "later": {"RCPT": "450 4.2.0 later"}, "never": {"RCPT": "550 5.1.1 no"}}
        says["lost"] = {"CONN": HANG_UP}
        table = {name: esmtp(self.peer(said)) for name, said in says.items()}
        cases = (
            (["a@good"], 200), (["a@good", "b@good"], 200), (["a@good", "a@later"], 207), (["a@never", "a@good"], 207),
            (["a@good", "no address"], 207), (["a@never"], 502), (["a@never", "b@never", "no address"], 502),
            (["a@never", "a@later"], 503), (["a@lost"], 503), (["no address"], 400),
        )  # fmt: skip
        for rcpt, wanted in cases:
            with self.subTest(rcpt):
                status, headers, found = self.submitted(table, rcpt)
                self.assertEqual([item["rcpt"] for item in found["response"]], rcpt)
                fine = not any(item["error"] for item in found["response"])
                self.assertEqual((status, fine), (wanted, wanted == 200))
                self.assertRegex(headers.get("Retry-After", ""), r"\A[1-9]\d*\Z" if wanted == 503 else r"\A\Z")

    def test_tries_again_after_a_temporary_failure_only(self) -> None:
        later, well = "450 4.2.0 later", USUAL["RCPT"]
        cases = (  # what it says, retry, code, transactions
            ({"RCPT": [later, well]}, 0, "450", 1), ({"RCPT": [later, well]}, 1, "250", 2),
            ({"RCPT": [later, later, well]}, 1, "450", 2), ({"RCPT": [later, later, well]}, 5, "250", 3),
            ({"RCPT": "550 5.1.1 no"}, 5, "550", 1), ({"CONN": ["421 4.3.2 busy", USUAL["CONN"]]}, 1, "250", 1),
            ({".": ["451 4.3.0 oops", "250 2.0.0 ok"]}, 1, "250", 2), ({".": HANG_UP}, 5, "421", 1),
        )  # fmt: skip
        for says, retry, code, transactions in cases:
            with self.subTest(says=str(says), retry=retry):
                peer = self.peer(says)
                _, _, found = self.submitted({"default": esmtp(peer, retry=retry, sleep=0)}, ["a@example.jp"])
                self.assertEqual(found["response"][0]["code"], code)
                self.assertEqual(sum(line.startswith("MAIL") for line in peer.lines), transactions)

    def test_sleeps_between_tries_while_others_go_on(self) -> None:
        lost = self.peer({"CONN": ["421 4.3.2 busy", USUAL["CONN"]]})
        jobs = [job(lost, retry=1, sleep=0.4), *[job(self.peer())] * 9]
        sessions, force = haineko.TransportContext(), settings(smtpd={"hostname": NAME, "max_workers": 2})
        began = time.monotonic()
        outcomes = haineko.run(and_closed(haineko.deliver(jobs, sessions, force), sessions))
        self.assertTrue(0.4 <= time.monotonic() - began < 2)
        told = [(item.replies[0].code, item.ms < 400) for item in outcomes]
        self.assertEqual(told, [("250", False), *[("250", True)] * 9])

    def test_a_line_for_each_transaction_and_refusal_without_body_or_secret(self) -> None:
        peer = self.peer({"RCPT": refuses(b="550 5.1.1 no\x07body")}, "AUTH PLAIN", logins={"kijitora": "n-y-a-a"})
        authinfo = {"x": {"username": "kijitora", "password": "n-y-a-a"}}
        rcpt = ["a@example.jp", "b@example.jp", "line\nfeed@example.jp", "evil\x1b[2J@example.jp"]
        _, _, found = self.submitted({"default": esmtp(peer, auth="x")}, rcpt, authinfo=authinfo)
        queueid, message = found["queueid"], parsed(peer.mails[0].text)
        self.assertRegex(queueid, r"\A[0-9A-Za-z]{16}\Z")
        self.assertRegex(message["Received"] + message["Message-Id"], f" id {queueid};.*<{queueid}\\.")
        lines = [line.partition("]: ")[2] for line in self.logged()]
        self.assertEqual((len(lines), all(map(str.isprintable, lines))), (3, True), lines)
        refused = "to=<line?feed@example.jp>,<evil?[2J@example.jp> dsn=5.1.5 status=rejected (553 "
        self.assertIn(refused, lines[2])
        for line, to, code, word in ((lines[0], "a", "250", "sent"), (lines[1], "b", "550", "bounced")):
            start = f"{queueid}: client=192.0.2.7 from=<kijitora@example.org> to=<{to}@example.jp> relay=ESMTP:"
            self.assertRegex(line, rf"^{start}{peer.host}:{peer.port} delay=[\d.]+ dsn=\S+ status={word} \({code} ")
        self.assertNotRegex("\n".join(lines), "Meow|n-y-a-a|\x07")

    def test_a_client_that_says_odd_things_of_itself_reads_them_again(self) -> None:
        for word in ('a "quote" \\', "100% %s {x}", "y" * 3000, "Ã¤"):
            asked = request(as_body(document()), **{"user-agent": word, "referer": word})
            found = json.loads(answered(asked, haineko.App(settings())).body)
            wanted = "ä" if word == "Ã¤" else word[:200]
            self.assertEqual((set(found), found["useragent"], found["referer"]), (TOP, wanted, wanted))

    def test_queue_ids_are_unique(self) -> None:
        found = {haineko.new_queueid(NOW) for _ in range(20000)}
        self.assertEqual(sum(bool(re.fullmatch("[0-9A-Za-z]{16}", item)) for item in found), 20000)

    def test_a_dry_run_tells_the_routes(self):
        far = {"mailer": "Haineko", "host": "far.example.org"}
        table = {"mx.example": {"mailer": "MX"}, "file.example": {"mailer": "/tmp"}, "far.example": far}
        table["default"] = {"host": "smtp.example.org", "port": 587, "starttls": True}
        force = settings(mailertable=table, smtpd={"hostname": NAME, "max_rcpts_per_message": 0})
        where = 'http://far.example.org:2794 (mailertable["far.example"])'
        cases = {
            "a@example.jp": ("ESMTP", "smtp.example.org", 587, "smtp.example.org:587, STARTTLS (mailertable.default)"),
            "a@mx.example": ("MX", None, None, '(mailertable["mx.example"])'),
            "a@file.example": ("File", None, None, '/tmp (mailertable["file.example"])'),
            "a@far.example": ("Haineko", "far.example.org", 2794, where),
        }
        status, found = posted(document(rcpt=list(cases), dry_run=True), force)
        self.assertEqual((status, found["recipient"], set(found) - TOP), (200, list(cases), {"message_octets", "raw"}))
        said = {"error": 0, "code": "250", "dsn": "2.0.0", "command": "DRYRUN"}
        for item, (to, (mailer, host, port, line)) in zip(found["response"], cases.items()):
            told = {"message": ["Not sent", f"{to}: {mailer} {line}"], "mailer": mailer, "host": host, "port": port}
            self.assertEqual(item, {"rcpt": to, **said, **told})
        message = email.message_from_string(found["raw"])
        told = message["To"], message["Subject"], found["message_octets"]
        self.assertEqual(told, ("a@example.jp", "Nyaaaa", len(found["raw"].encode())))
        self.assertIn(found["queueid"], message["Message-Id"])

    def test_refusals_of_a_dry_run_are_the_usual_ones(self):
        force = settings(smtpd={"hostname": NAME, "max_message_size": 2000})
        table = (
            ({"rcpt": ["no address"]}, 400, "553"), ({"rcpt": ["a@example.jp", "no address"]}, 207, "250 553"),
            ({"body": "x" * 3000}, 413, "552"), ({"header": {"x-mc-tags": "a"}}, 400, "554"),
            ({"dry_run": "yes"}, 400, "554"),
        )  # fmt: skip
        for change, status, codes in table:
            got, found = posted(document(**{"dry_run": True, **change}), force)
            self.assertEqual((got, " ".join(item["code"] for item in found["response"])), (status, codes), change)

    def test_a_dry_run_shows_a_message_that_is_not_utf_8(self):
        octets = b"Subject: x\r\nContent-Type: text/plain; charset=iso-8859-1\r\n\r\ncaf\xe9\r\n"
        raw = {"base64": base64.b64encode(octets).decode()}
        found = posted({"mail": "a@example.org", "rcpt": "b@example.jp", "raw": raw, "dry_run": True})[1]
        message = base64.b64decode(found["raw"]["base64"])
        self.assertEqual((message[-6:], found["message_octets"]), (b"caf\xe9\r\n", len(message)))

    def test_a_dry_run_keeps_nothing(self):
        asked = request(as_body(document(dry_run=True, **{"async": True})), idempotency_key="once")
        with tempfile.TemporaryDirectory(prefix="haineko-test.") as folder:
            service = haineko.App(settings(queue={"path": os.path.join(folder, "haineko.db"), "min_free": 0}))
            self.assertEqual((answered(asked, service).status, os.listdir(folder)), (200, []))

    def staged(self, submission: dict, says=None, **smtpd) -> tuple:
        """(status, document, [(recipients, message)]) of a mail, by those settings."""
        peer = self.peer(says)
        force = settings(mailertable={"dev.example": esmtp(peer)}, smtpd={"hostname": NAME, **smtpd})
        status, found = posted(submission, force)
        return status, found, [(mail.recipients, email.message_from_bytes(mail.text)) for mail in peer.mails]

    def test_staged_mail_goes_elsewhere(self):
        raw = "From: a@example.org\nSubject: =?utf-8?q?n=C3=BA?=\nTo: r0@example.jp\n\nx\n"
        rcpt = ["r0@example.jp", "no address", "r1@example.jp"]
        dev, ops = "dev@dev.example", "ops@dev.example"
        cases = (
            (document(rcpt=rcpt), dev, [[dev]], dev, "Nyaaaa"),
            (document(rcpt=rcpt), [dev, ops], [[dev], [ops]], dev, "Nyaaaa"),
            (document(rcpt=rcpt, header={"to": rcpt[0]}), [dev, ops], [[dev, ops]], rcpt[0], "Nyaaaa"),
            ({"mail": "a@example.org", "rcpt": rcpt, "raw": raw}, dev, [[dev]], rcpt[0], "nú"),
        )
        for case, prefix in itertools.product(cases, ("", "[TEST]", "[試し] ")):
            with self.subTest(case, prefix=prefix):
                submission, redirect, envelopes, shown, subject = case
                status, found, mails = self.staged(submission, redirect=redirect, subject_prefix=prefix)
                told = [(item["rcpt"], item["error"]) for item in found["response"]]
                self.assertEqual((status, told), (207, list(zip(rcpt, (0, 1, 0)))))
                self.assertEqual((found["recipient"], sorted(to for to, _ in mails)), (rcpt[::2], envelopes))
                for _, message in mails:
                    self.assertIn(message["To"], (shown, ops))
                    self.assertEqual(message["X-Haineko-Recipients"], "r0@example.jp, r1@example.jp")
                    words = str(email.header.make_header(email.header.decode_header(message["Subject"])))
                    self.assertEqual(words.replace(" ", ""), prefix.strip() + subject)

    def test_the_first_failure_of_a_staged_mail_is_told(self):
        says = {"RCPT": lambda connection, line: "550 5.1.1 no" if "ops" in line else None}
        status, found, _ = self.staged(document(), says, redirect=["dev@dev.example", "ops@dev.example"])
        told = [(item["rcpt"], item["code"]) for item in found["response"]]
        self.assertEqual((status, told), (502, [("mikeneko@example.jp", "550")]))

    def test_staging_of_the_subject_only(self):
        status, _, ((to, message),) = self.staged(document(rcpt=["a@dev.example"]), subject_prefix="[TEST]")
        told = status, to, message["Subject"], message["X-Haineko-Recipients"]
        self.assertEqual(told, (200, ["a@dev.example"], "[TEST] Nyaaaa", None))

    def test_settings_of_staging(self):
        long = "x" * 64 + "@" + "a." * 100 + "org"
        bad = ("dev", "a b@example.org", "a..b@example.org", "x" * 250 + "@example.org", long, "dev@x.org\r\nX: y")
        for value in ("dev@example.org", ["dev@example.org", "ops+test@xn--r8jz45g.jp"], [], *bad):
            with self.subTest(value):
                errors: list = []
                found = haineko.from_dict(haineko.Settings, {"smtpd": {"redirect": value}}, "", errors)
                self.assertEqual(bool(errors), value in bad, errors)
                for to in found.smtpd.redirect:
                    self.assertEqual(haineko.parse_address(to).addr_spec, to)

    def test_people_are_told_of_staging(self):
        peer = self.peer()
        smtpd = {"hostname": NAME, "redirect": "dev@dev.example", "subject_prefix": "[TEST]"}
        table = {"dev.example": {"port": peer.port}, "example.org": {"port": 1}, "example.jp": {"port": 1}}
        server = served(self, {**queue_settings(peer), "smtpd": smtpd, "mailertable": table})
        told = 'STAGING: all mail goes to dev@dev.example (smtpd.redirect); subjects begin with "[TEST]"'
        self.assertIn(f"haineko: {told}\n", server.log())
        self.assertEqual(server.get("/health"), (200, {"status": "ok", "staging": told}))
        self.assertIn(f"fine; {told}; mail goes to", run_program("check", "-c", server.path, text=True).stdout)
        queueid = server.submit("a@example.jp", **{"async": True})[2]["queueid"]
        store = haineko.QueueDB(haineko.QueueSettings(path=os.path.join(server.folder, "haineko.db")))
        haineko.run_operation(store, haineko.enqueue, entry(to=("b@example.jp",), lane="ESMTP 127.0.0.1:1"))  # older
        store.close(for_good=True)
        eventually(lambda: len(peer.mails) == 2)
        self.assertEqual([mail.recipients for mail in peer.mails], [["dev@dev.example"]] * 2)
        eventually(lambda: server.fate(queueid)["dev@dev.example"]["state"] == "delivered")

    def traced(self, says: dict, offers=(), rcpt=("a@example.jp",), **more) -> dict:
        """The items of a traced mail's answer."""
        peer = self.peer(says, *offers, logins={"neko": "sesame-open"})
        table = {"default": esmtp(peer, **more), "off.example": {"mailer": "Discard"}}
        authinfo = {"relay": {"username": "neko", "password": "sesame-open"}}
        force = settings(mailertable=table, authinfo=authinfo, smtpd={"hostname": NAME})
        found = posted(document(rcpt=list(rcpt), trace=True), force)[1]
        self.assertTrue(all(set(item) >= ITEM for item in found["response"]))
        return {item["rcpt"]: item for item in found["response"]}

    def test_a_trace_has_the_dialogue(self):
        items = self.traced({}, ["AUTH PLAIN"], ["a@example.jp", "b@off.example", "no address"], auth="relay")
        wanted = [
            r"< 220 .*", f"> (?i:ehlo) {re.escape(NAME)}", "< 250-peer.example", "< 250-AUTH PLAIN", "< 250 HELP",
            r"> AUTH PLAIN \*+ as neko", "< 235 .*", "> MAIL FROM:<kijitora@example.org>", "< 250 .*",
            "> RCPT TO:<a@example.jp>", "< 250 .*", "> DATA", "< 354 .*", r"> \(\d+ octets of the message\)",
            "< 250 .*",
        ]  # fmt: skip
        self.assertRegex("\n".join(items["a@example.jp"]["dialogue"]), r"\A" + "\n".join(wanted) + r"\Z")
        self.assertEqual((items["b@off.example"]["dialogue"], "dialogue" in items["no address"]), ([], False))

    def test_traces_of_failures_have_no_secret(self):
        def repeats(connection, line) -> str:
            return f"535 5.7.8 wrong: {line} {base64.b64decode(line.split()[-1]).decode()[6:]}"

        (item,) = self.traced({"AUTH": repeats}, ["AUTH PLAIN"], auth="relay").values()
        self.assertEqual((item["code"], item["command"]), ("535", "AUTH"))
        self.assertRegex("\n".join(item["dialogue"][-2:]), r"\A< 535 5.7.8 wrong: .*\n> QUIT\Z")
        for secret in ("sesame", base64.b64encode(b"\0neko\0sesame-open").decode()):
            self.assertNotIn(secret, json.dumps(item))
        (item,) = self.traced({"RCPT": ["450 4.2.0 later", "250 2.1.5 now"]}, retry=1, sleep=0).values()
        self.assertEqual((item["code"], "< 450 4.2.0 later" in item["dialogue"]), ("250", True))

    def test_each_mail_has_its_own_trace(self):
        table, smtpd = {"default": esmtp(self.peer({}, "PIPELINING"))}, {"hostname": NAME, "max_rcpts_per_message": 0}
        service = haineko.App(settings(mailertable=table, smtpd=smtpd))
        rcpt = [f"r{i}@example.jp" for i in range(20)]
        for trace in (True, False):
            answer = answered(request(as_body(document(rcpt=rcpt, trace=trace))), service)
            for item in json.loads(answer.body)["response"]:
                lines = [line for line in item.get("dialogue", ()) if line.startswith("> RCPT")]
                self.assertEqual(lines, [f"> RCPT TO:<{item['rcpt']}>"] if trace else [])

    def test_a_queued_mail_has_the_trace_of_the_first_attempt(self):
        table = {"default": esmtp(self.peer({"MAIL": "451 4.3.0 later"}))}
        with tempfile.TemporaryDirectory(prefix="haineko-test.") as folder:
            queue = {"path": os.path.join(folder, "haineko.db"), "min_free": 0}
            status, found = posted(document(trace=True), settings(mailertable=table, queue=queue))
        told = [(item["command"], item["dialogue"][-2:]) for item in found["response"]]
        self.assertEqual((status, told), (202, [("QUEUE", ["< 451 4.3.0 later", "> QUIT"])]))

    def test_who_may_trace(self):
        logins = {name: {"hash": SettingsFile.KIJITORA, "trace": name == "neko"} for name in ("neko", "mike")}
        anybody, by_login = settings(relayhosts={"open-relay": True}), settings(password=logins)
        neko, mike = (f"Basic {base64.b64encode(f'{name}:kijitora'.encode()).decode()}" for name in logins)
        table = (
            (anybody, "127.0.0.1", {}, 200), (anybody, "192.0.2.1", {}, 403),
            (anybody, "127.0.0.1", {"Via": "1.1 proxy"}, 403),
            (by_login, "192.0.2.1", {"Authorization": neko}, 200),
            (by_login, "192.0.2.1", {"Authorization": mike}, 403),
        )  # fmt: skip
        for force, client, headers, status in table:
            found = over_http(http_post(as_body(document(trace=True)), **headers), force, client)
            self.assertEqual(found[0], status, (client, headers, found))

    def test_recipients_of_one_route_share_a_transaction(self):
        one, two = self.peer({}, "PIPELINING"), self.peer({"RCPT": ["250 2.1.5 fine", "550 5.1.1 who?"]})
        force = settings(mailertable={"one.example": esmtp(one), "default": esmtp(two)})
        header = {"to": "A <a@one.example>, a@two.example", "cc": "b@two.example", "bcc": "猫 <c@one.example>"}
        status, answer = posted(document(rcpt=None, header=header, html="<p>x</p>"), force)
        recipients = ["a@one.example", "a@two.example", "b@two.example", "c@one.example"]
        self.assertEqual((status, answer["recipient"]), (207, recipients))
        told = [(item["rcpt"], item["code"]) for item in answer["response"]]
        self.assertEqual(told, list(zip(recipients, ["250", "250", "550", "250"])))
        (first,), (second,) = one.mails, two.mails
        self.assertEqual((first.recipients, first.text), (["a@one.example", "c@one.example"], second.text))
        shown = [parsed(first.text)[name] for name in ("to", "cc", "bcc")]
        self.assertEqual((shown, b"c@one.example" in first.text), ([header["to"], header["cc"], None], False))

    def test_who_gets_mail_by_its_header(self):
        table = (
            (["a@x.jp"], {"to": "b@x.jp"}, "a"), (["a@x.jp"], {"bcc": "b@x.jp"}, "ab"),
            (None, {"cc": "c@x.jp"}, "c"), (None, {"bcc": "b@x.jp"}, "b"),
            (None, {"to": "a@x.jp", "cc": "A@x.jp, a@X.JP", "bcc": ["b@x.jp", "a@x.jp"]}, "aAb"),
        )  # fmt: skip
        for rcpt, header, wanted in table:
            _, answer = posted(document(rcpt=rcpt, header=header))
            self.assertEqual("".join(to[0] for to in answer["recipient"]), wanted, header)

    def test_separate_copies_without_to(self):
        peer = self.peer()
        more = {"rcpt": ["a@x.jp", "b@x.jp"], "header": {"bcc": "c@x.jp"}}
        posted(document(**more), settings(mailertable={"default": esmtp(peer)}))
        found = sorted((mail.recipients, parsed(mail.text)["To"]) for mail in peer.mails)
        self.assertEqual(found, [([f"{name}@x.jp"], f"{name}@x.jp") for name in "abc"])
        self.assertEqual(len({parsed(mail.text)["Message-Id"] for mail in peer.mails}), 3)


# ======================================================================================================================
# 18. Provider endpoints
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
# 19. HTTP server
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

    def test_an_oserror_that_is_not_of_the_connection_is_answered(self):
        mail, keys = document(dry_run=True), dkim_keys("example.org")
        with patched(haineko.PrivateKey, sign=lambda *_: os.stat("/nowhere")):
            status, answer = over_http(http_post(as_body(mail)), settings(mailertable={"default": {}}, dkim=keys))
        self.assertEqual((status, answer["response"][0]["code"]), (500, "451"))
        self.assertIn("/nowhere", "".join(self.logged()))

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


def key_login(key: str, **fences) -> dict:
    return {"hash": "$sha256$" + hashlib.sha256(key.encode()).hexdigest(), **fences}


def bearer(key: str) -> str:
    return f"Authorization: Bearer {key}"


def basic(login: str) -> str:
    return f"Authorization: Basic {base64.b64encode(login.encode()).decode()}"


class KeysAndFences(Quiet):
    """Who may send as whom. A section or fence is absent, empty, or permits everything."""

    def answer(self, force: haineko.Settings, *lines: str, client: str = "127.0.0.1", **changes) -> tuple:
        """(status, first item of the response)."""
        status, found = over_http(post(document(**changes), *lines), force, client)
        return status, found["response"][0]

    def test_relayhosts_password_fences_and_recipients(self):
        opened, fence = {"open-relay": True}, ["example.org", "example.jp"]
        for hosts, rcpt, password, senders, to, client in itertools.product(
            (None, {"relayhosts": []}, opened), (None, {}, opened), ("absent", "empty", "wrong", "right"),
            (None, [], fence), (None, [], fence), ("127.0.0.1", "192.0.2.1"),
        ):  # fmt: skip
            login = {"k": key_login("hk_1", senders=senders, recipients=to)}
            sections = {"relayhosts": hosts, "recipients": rcpt}
            sections["password"] = {"absent": None, "empty": {}}.get(password, login)
            with self.subTest(hosts=hosts, rcpt=rcpt, password=password, senders=senders, to=to, client=client):
                known = hosts is opened if hosts else client == "127.0.0.1"
                logged_in = password in ("wrong", "right")
                wanted = [status for refused, status in (
                    (password == "wrong", 401), (not logged_in and not known, 403), (logged_in and senders == [], 403),
                    (rcpt is not opened or (logged_in and to == []), 400), (True, 200)) if refused]  # fmt: skip
                line = bearer("hk_2" if password == "wrong" else "hk_1")
                self.assertEqual(self.answer(settings(**sections), line, client=client)[0], wanted[0])

    def test_how_a_login_is_given(self):
        key = run_here("key", "cron", "--prefix", "hk_")[1].split()[0]
        self.assertRegex(key, "^hk_[0-9A-Za-z]{49}$")
        self.assertEqual(key[-6:], haineko._base62(binascii.crc32(key[3:-6].encode())))
        line = run_here("pw", "-u", "sabatora", given="sk\xf8yt\n")[1]
        hashes = json.loads(f"{{{line}}}")
        force = settings(password={"cron": key_login(key), "neko": SettingsFile.KIJITORA, **hashes})
        for line, login in (
            (bearer(key), "cron"), (f"Authorization: bearer  {key}", "cron"),
            (f"X-Postmark-Server-Token: {key}", "cron"), (basic(f"cron:{key}"), "cron"),
            (basic(f"apikey:{key}"), "cron"), (basic(f"{key}:"), ""), (bearer(key[:-1]), ""), (bearer(""), ""),
            (f"Authorization: Token {key}", ""), (bearer(key_login(key)["hash"]), ""), (bearer("kijitora"), ""),
            (basic("cron:"), ""), ("Authorization: Basic", ""), ("Authorization: Basic !!!", ""),
            (basic("nocolon"), ""), (basic("neko:wrong"), ""), (basic("nobody:kijitora"), ""), (basic(":"), ""),
            (basic("neko:"), ""), (basic("sabatora:sk\xf8yt"), "sabatora"), (basic("sabatora:skoyt"), ""),
            (basic("neko:kijitora"), "neko"), (basic("neko:kijitora2"), ""),
        ):  # fmt: skip
            with self.subTest(line):
                self.logged()
                self.assertEqual(self.answer(force, line)[0], 200 if login else 401)
                log = " ".join(self.logged())
                self.assertIn(f"login={login} " if login else "reason=", log)
                self.assertNotRegex(log, f"{key[3:-1]}|kijitora2|skoyt|sk\xf8yt")
        self.assertEqual(over_http(get("/health"), force)[0], 200)
        shown = over_http(get("/conf", host="localhost"), settings(password=hashes))[1]["password"]
        self.assertEqual(shown, dict.fromkeys(hashes, "********"))

    def test_senders(self):
        force = settings(password={"k": key_login("hk_1", senders=["a@example.org", "Example.JP", ".example.net"])})
        for given, refused in (
            *[(document(mail=mail, header={"from": None}), refused) for mail, refused in (
                ("a@example.org", ""), ("A@Example.org", ""), ("b@example.org", "b@"), ("x@example.jp", ""),
                ("x@sub.example.jp", "x@"), ("x@a.b.example.net", ""), ("x@example.net", "x@"),
                ("x@notexample.jp", "x@"))],
            *[(document(mail=mail, header={"from": author}), refused) for mail, author, refused in (
                ("x@example.jp", "A <a@example.org>", ""), ("x@example.jp", "B <b@example.org>", "b@"),
                ("x@example.jp", "a@example.org, b@example.org", "b@"), ("b@example.org", "a@example.org", "b@"),
                ("x@example.jp", "a@example.org <b@example.org>", "b@"))],
            *[({"mail": "x@example.jp", "rcpt": ["m@example.jp"], "raw": f"{author}To: b@example.jp\n\nx\n"}, refused)
                for author, refused in (
                ("From: a@example.org\n", ""), ("From: B <b@example.org>\n", "b@"),
                ("From: a@example.org\nSender: b@example.org\n", "b@"),
                ("From: a@example.org\nFrom: b@example.org\n", "b@"), ("From: a@example.org,\n b@example.org\n", "b@"),
                ("From: nobody\n", "a From or Sender"), ("From: g:;\n", "a From or Sender"), ("", ""))],
        ):  # fmt: skip
            with self.subTest(given):
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
        for fences, reason in (
            ({"expires": "2001-01-31"}, "expired"), ({"expires": "2999-01-31T12:00:00Z"}, ""),
            ({"expires": "2001-01-31T12:00:00+09:00"}, "expired"), ({"networks": ["192.0.2.0/24"]}, "networks"),
            ({"networks": []}, "networks"), ({"networks": ["127.0.0.1"]}, ""),
        ):  # fmt: skip
            with self.subTest(fences):
                self.logged()
                status, item = self.answer(settings(password={"k": key_login("hk_1", **fences)}), bearer("hk_1"))
                self.assertEqual(status, 401 if reason else 200)
                if reason:
                    self.assertEqual(item["message"], ["authentication failed"])
                    self.assertIn(reason, self.logged()[-1])

    def test_settings_of_a_login(self):
        hashed = key_login("hk_1")["hash"]
        good = {"hash": hashed, "senders": "example.org", "rate": "1/60"}
        for login, wanted in (
            (good, None), ({"senders": []}, ".hash: expected"), ({"hash": "x"}, ".hash: expected"),
            ({"hash": hashed, "sender": []}, ".sender: unknown"),
            ({"hash": hashed, "senders": ["@"]}, ".senders[0]: expected an address"),
            ({"hash": hashed, "rate": "0/60"}, ".rate: expected"), ({"hash": hashed, "rate": 60}, ".rate: expected"),
            ({"hash": hashed, "expires": "soon"}, ".expires: expected"), (5, ": expected a string"),
        ):  # fmt: skip
            with self.subTest(login):
                errors: list = []
                haineko.from_dict(haineko.Settings, {"password": {"k": login}}, "", errors)
                self.assertEqual([error.startswith(f"password.k{wanted}") for error in errors], [True] * bool(wanted))
        shown = haineko.redacted(settings(password={"k": good}).password)["k"]
        self.assertEqual({key: shown[key] for key in good}, {**good, "hash": "********", "senders": ["example.org"]})
        self.assertEqual(haineko.redacted(settings(password={"k": hashed}).password), {"k": "********"})

    def test_the_command_key(self):
        words = "key cron --sender example.org --rate 2/60 --prefix sk_live_"
        key, line = run_program(*words.split(), text=True).stdout.splitlines()
        self.assertTrue(key.startswith("sk_live_"))
        section = json.loads("{" + line + "}")
        self.assertEqual(section, {"cron": key_login(key, senders=["example.org"], rate="2/60")})
        self.assertEqual(self.answer(settings(password=section), bearer(key))[0], 200)
        for flags in (("--rate", "x"), ("--sender", "@"), ("--expires", "soon"), ("--prefix", "a b"), ("--prefix", "")):
            self.assertEqual(run_here("key", "cron", *flags)[0], 2, flags)

    def test_nothing_leaves_the_sandbox(self):
        with tempfile.TemporaryDirectory(prefix="haineko-test-") as folder:
            password, table = {"k": key_login("hk_1", sandbox=True)}, {"default": {"mailer": folder}}
            force = settings(password=password, mailertable=table)
            status, item = self.answer(force, bearer("hk_1"))
            self.assertEqual((status, item["mailer"]), (200, "Discard"))
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
        return self.server.submit(*(to or ["m@example.jp"]), headers={"Authorization": f"Bearer hk_{key}", **headers})

    def test_a_client_is_asked_for_its_login_and_its_second_time_costs_little(self):
        status, headers, _ = self.server.ask(post())
        self.assertEqual((status, headers["WWW-Authenticate"][:13]), (401, 'Basic realm="'))
        with self.server.wire() as wire:
            times = []
            for _ in range(6):
                began = time.monotonic()
                status, headers, _ = wire.ask(post(None, basic("neko:kijitora")))
                self.assertEqual((status, headers.get("WWW-Authenticate")), (200, None))
                times.append(time.monotonic() - began)
        self.assertLess(min(times[1:]), 0.015)

    def test_a_login_sees_its_own_mail_only(self):
        _, headers, _ = self.submit("a", Prefer="respond-async")
        for line, wanted in ((bearer("hk_a"), 200), (bearer("hk_b"), 403), (bearer("hk_c"), 401), ("X: y", 401)):
            with self.subTest(line):
                self.assertEqual(self.server.get(headers["Location"], line)[0], wanted)

    def test_an_idempotency_key_counts_for_its_login(self):
        first, again, other = (self.submit(key, **{"Idempotency-Key": "k1"}) for key in ("a", "a", "b"))
        self.assertEqual((first[0], again[0], other[0]), (200, 200, 200))
        self.assertEqual(first[2]["queueid"], again[2]["queueid"])
        self.assertNotEqual(first[2]["queueid"], other[2]["queueid"])

    def test_a_rate_counts_recipients_over_all_workers(self):
        status, headers, _ = self.submit("slow", "a@example.jp", "b@example.jp")
        self.assertEqual((status, headers["ratelimit-remaining"]), (200, "1"))
        for fault in (
            {"sender": ""},
            {"header": {"subject": "x", "x-mc-tags": "a"}},
        ):  # refused mail counts for nothing
            found = self.server.submit("a@example.jp", headers={"Authorization": "Bearer hk_slow"}, **fault)
            self.assertEqual(found[0], 400)
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
        for line, wanted in (
            (bearer("hk_k"), 200),
            (basic("neko:kijitora"), 200),
            ("X: y", 401),
            (bearer("hk_y"), 429),
        ):
            self.assertEqual(server.ask(post(None, line))[0], wanted, line)

    def test_queued_mail_of_a_sandbox_stays_there(self):
        _, headers, _ = self.submit("box", "box@example.jp", Prefer="respond-async")
        own = bearer("hk_box")
        eventually(lambda: self.server.get(headers["Location"], own)[1]["response"][0]["state"] == "delivered")
        self.assertNotIn("box@example.jp", [to for mail in self.peer.mails for to in mail.recipients])

    def test_the_start_warns_of_what_lets_strangers_in_or_shows_logins(self):
        self.assertNotIn("warning", self.server.log())  # at 127.0.0.1
        open_, any_ = {"listen": "0.0.0.0:0"}, "httpd.trusted_proxies: 0.0.0.0/0 lets every client"
        for httpd, warned in (
            (open_, "without TLS"), ({**open_, "trusted_proxies": ["10.0.0.0/8"]}, ""),
            ({"trusted_proxies": ["0.0.0.0/0"]}, any_),
        ):  # fmt: skip
            with self.subTest(**httpd):
                server = served(self, {"password": {"k": key_login("hk_k")}, "httpd": httpd})
                found = re.findall("haineko: warning: .*", server.log())
                self.assertEqual([warned in line for line in found], [True] * bool(warned))
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
        while found != workers:  # a connection to each of them: one that is busier leaves new ones to the other
            self.assertLess(len(wires), 300)
            some = [server.wire().send(whole[:-20]) for _ in range(8)]
            for wire in some:
                self.addCleanup(wire.close)
                queueid = wire.ask(whole[-20:])[2]["queueid"]
                found.add(int(re.search(rf"haineko\[(\d+)\]: {queueid}", server.log())[1]))
            wires += some
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
# 20. Commands
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
        self.assertEqual((said["event"], said["status"]), ("rejection", "rejected"))
        self.assertFalse({"request_id", "traceparent"} & said.keys())  # of another form
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

    def settings(self, **sections) -> str:
        """Path of a settings file."""
        return self.write("haineko.json", {**DEFAULTS, **sections})

    def test_usage(self) -> None:
        words = [sys.executable, "-m", "haineko", "--version"]  # as in production
        done = subprocess.run(words, cwd=SCRATCH.name, env=environment(), capture_output=True, text=True, check=False)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, f"Haineko {haineko.__version__}\n", ""))
        code, out, _ = run_here("-h")
        self.assertEqual(code, 0)
        for name in haineko.COMMANDS:
            self.assertIn(f"    {name} ", out)
            self.assertEqual(run_here(name, "-h")[0], 0)

    def test_what_failed_is_printed_without_controls(self) -> None:
        item = {"rcpt": "a\x1b[2J", "error": 1, "code": "553", "command": "RCPT", "message": ["no"], "mailer": None}
        self.assertEqual(haineko.report_failures(400, [{**item, "dsn": "5.1.5"}]), os.EX_DATAERR)
        self.assertEqual(self.logged(), ["haineko: <a?[2J>: 553 RCPT: no"])

    def test_wrong_usage_and_routes(self) -> None:
        bad = self.write("bad.json", {"httpd": {"lissen": "x"}, "mailertable": {"default": {"mailer": "ESNTP"}}})
        path = self.settings(
            recipients={"domainpart": ["example.jp", "a.example.jp", "example.net"]},
            mailertable={"example.jp": {"mailer": "Screen"}, ".example.jp": {"host": "192.0.2.1", "port": 465}},
            sendermt={"example.org": {"mailer": "Discard"}},
            queue={"path": "q.db"},
        )
        never = f"haineko: {self.folder}/q.db: does not exist; nothing was ever queued\n"
        anywhere = f"show -c {path} x", f"-c {path} show x", f"show x -c {path}"
        clear = "HTTP://192.0.2.1:2794/", "http://localhost.example.org/", "http://127.0.0.1@h/", "http://mail.example/"
        none = "http://127.0.0.1:99999/", "http://[::1", "http://127.0.0.1:9/ねこ", "ftp://h/", "http://a..b/", "neko"
        twice = "mail.json --to a@b.jp", "mail.json --subject x", "--sender a@b.jp"
        cases = (
            # words, exit code, what it says
            *((words, 2, "usage:") for words in ("", "nyaa", "serve --nyaa", "route", "setup")),
            ("serve --listen nonsense", 2, 'expected "host:port", "[v6]:port" or "unix:/path"'),
            ("serve --workers -1", 2, "a whole number from 0 to 256"),
            ("serve --workers x", 2, "invalid int value"),
            (f"serve -c {bad}", 2, 'httpd.lissen: unknown key; did you mean "listen"?'),
            (f"serve -c {bad}", 2, 'mailertable.default.mailer: unknown relay type "ESNTP"'),
            ("serve -c /nowhere.json", 2, "/nowhere.json: No such file or directory"),
            ("check --sender nobody", 2, "is no mail address of a domain"),
            ("check --sender a@[127.0.0.1]", 2, "is no mail address of a domain"),
            ("check --sender a@b.example --selector a\tb", 2, "is no selector"),
            ("check --sender nobody -c /nowhere.json", 1, "No such file"),
            *((f"send --user x --to a@b.jp --body x --url {url}", 2, "in clear text") for url in clear),
            *((f"send --url {url}", 2, "is no URL of a Haineko") for url in none),
            (f"send --url unix:/{'x' * 200}", 1, ": AF_UNIX path too long"),
            *((f"send {words}", 2, "want --to, and no FILE") for words in twice),
            ("send --to a@b.jp --attach /nowhere.pdf", 2, "/nowhere.pdf: No such file"),
            ("send /nowhere.json", 2, "/nowhere.json: No such file"),
            ("send --url http://127.0.0.1:1/", 1, "Connection refused"),
            ("route a@example.jp", 0, 'Screen (mailertable["example.jp"])'),
            ("route a@A.Example.JP", 0, 'ESMTP 192.0.2.1:465, TLS (mailertable[".example.jp"])'),
            ("route a@example.net --sender b@example.org", 0, 'Discard (sendermt["example.org"])'),
            (f"route -c {path} a@example.net --sender c@d.jp", 0, "ESMTP 127.0.0.1:25 (no route matches)"),
            ("route a@example.com", 1, "would be refused: 553 5.7.1"),
            ("route nonsense", 2, "is no mail address"),
            ("route a@example.jp --sender nonsense", 2, "is no mail address"),
            *((f"queue {words}", 1, never) for words in anywhere),
        )
        for words, wanted, part in cases:
            with self.subTest(words):
                code, out, err = run_here(*words.split(" ") if words else (), HAINEKO_CONF=path)
                self.assertEqual((code, out if wanted == 2 and words[:5] != "check" else ""), (wanted, ""))
                self.assertIn(part, out + err)
                self.assertNotIn("Traceback", err)

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
        before, names = os.stat(path), set(os.listdir(self.folder))
        some = "serve_without_settings_harms_nobody_and_says_so", "sendmail", "usage", "wrong_usage_and_routes"
        words = [sys.executable, "-m", "unittest", "-q", *(f"test_haineko.Commands.test_{name}" for name in some)]
        env = {**environment(), "HAINEKO_CONF": path}
        done = subprocess.run(words, cwd=self.folder, capture_output=True, env=env, timeout=60, check=False)
        self.assertEqual((done.returncode, peer.connections), (0, []), done.stderr.decode())
        after = os.stat(path)
        self.assertEqual((after.st_mtime_ns, after.st_ino), (before.st_mtime_ns, before.st_ino))
        self.assertEqual(set(os.listdir(self.folder)), names)

    def test_serve_shows_dialogues_without_secrets_and_many_cost_no_mail(self) -> None:
        peer = self.peer({".": "421 2.0.0 no, but see you again"}, "AUTH PLAIN", logins={"kijitora": "n-y-a-a"})
        login = {"x": {"username": "kijitora", "password": "n-y-a-a"}}
        server = served(self, {"authinfo": login, "mailertable": {"default": esmtp(peer, auth="x")}}, "--devel")
        server.ask(post())
        self.assertIn("127.0.0.1 > RCPT TO:<mikeneko@example.jp>\n127.0.0.1 < 250 2.1.5 recipient fine\n", server.log())
        before = server.workers()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: server.ask(post()), range(64)))
        said = collections.Counter(item["message"][0] for _, _, found in answers for item in found["response"])
        self.assertEqual(said, {"2.0.0 no, but see you again": 64})
        self.assertEqual(server.workers(), before)
        eventually(lambda: server.log().count(" < 421 2.0.0 no") == 65, "the dialogues")
        self.assertNotRegex(server.log(), "n-y-a-a|" + base64.b64encode(b"\0kijitora\0n-y-a-a").decode())

    def test_serve_and_start_say_why_not(self) -> None:
        victim, log, pid = self.write("victim", "precious"), f"{self.folder}/x.log", f"{self.folder}/x.pid"
        bad, fine = self.write("bad.json", {"x": 1}), self.settings(httpd={"listen": "127.0.0.1:0"})
        start, env = f"start --pid-file {pid} -c {fine}", environment(PYTHONPATH=os.path.dirname(PROGRAM))
        more = {"capture_output": True, "text": True, "env": env, "timeout": 30}
        with socket.create_server(("127.0.0.1", 0)) as taken:
            place = f"127.0.0.1:{taken.getsockname()[1]}"
            cases = (
                # words, what was done before, exit code, why not
                (f"serve -c {fine} --listen {place}", "", 1, f"can't listen at {place}: Address already in use"),
                (f"{start} --listen {place}", "", 1, f"can't listen at {place}: Address already in use"),
                (f"start --pid-file {pid} -c {bad}", "", 2, "x: unknown key"),
                (start, f"os.mkdir({log!r})", 1, f"can't start: [Errno 21] Is a directory: '{log}'"),
                (start, "haineko.SIGNALS = None", 1, f"did not start; see {log}\n"),
                *((start, f"os.symlink({victim!r}, {path!r})", 1, "symbolic links") for path in (log, pid)),
            )
            for words, before, wanted, reason in cases:
                script = f"import os, haineko; {before}\nraise SystemExit(haineko.main({words.split()}))"
                done = subprocess.run([sys.executable, "-c", script], check=False, **more)
                with self.subTest(words, before=before):
                    self.assertEqual((done.returncode, done.stdout), (wanted, ""), done.stderr)
                    self.assertIn(reason, done.stderr)
                    self.assertNotIn("Traceback", done.stderr)
                for path in filter(os.path.lexists, (log, pid)):
                    (os.rmdir if os.path.isdir(path) else os.unlink)(path)
        with open(victim) as stream:
            self.assertEqual(stream.read(), "precious")

    def test_the_daemon_starts_stops_restarts_and_says_how_it_is(self) -> None:
        gate, found = threading.Event(), []
        peer = self.peer({".": held(gate)})
        pid, log, old = (os.path.join(self.folder, name) for name in ("x.pid", "x.log", "x.log.1"))
        httpd, route = {"listen": "127.0.0.1:0", "workers": 1}, esmtp(peer, timeout=9)
        options = ("-c", self.settings(httpd=httpd, mailertable={"default": route}), "--pid-file", pid)
        self.addCleanup(run_here, "stop", *options)
        self.addCleanup(gate.set)
        place = lambda err: place_of(re.search(r"http://\S+", err)[0])  # noqa: E731
        for command in ("status", "stop", "reload"):
            self.assertEqual(run_here(command, *options)[0], 1, command)
        systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(systemd.close)
        systemd.bind(os.path.join(self.folder, "notify"))
        done = run_program("start", *options, text=True, env=environment(NOTIFY_SOCKET=systemd.getsockname()))
        self.assertEqual((done.returncode, done.stdout), (0, ""), done.stderr)
        said = rf"\Ahaineko {haineko.__version__} listens at http://127\.0\.0\.1:\d+/ \(pid (\d+), log /.*/x\.log\)\n\Z"
        (number,) = re.findall(said, done.stderr)
        self.assertEqual(run_here("start", *options)[0], 1)
        code, out, _ = run_here("status", *options)
        since = r"since \d{4}-\d\d-\d\dT[\d:]+[+-]\d{4}"
        self.assertRegex(out, rf"pid {number}\b.* {since}, listens at http://127\.0\.0\.1:\d+/, log /.*/x\.log\n")
        self.assertEqual(code, 0)
        os.rename(log, old)  # as logrotate does
        self.assertEqual(run_here("reload", *options)[0], 0)
        eventually(lambda: os.path.exists(log), "a new log file")
        fds = f"/proc/{number}/fd"
        if os.path.isdir(fds):  # nothing holds the old one open
            eventually(lambda: old not in [os.readlink(os.path.join(fds, fd)) for fd in os.listdir(fds)], "release", 5)
        with HttpClient(place(done.stderr)) as wire:
            wire.send(post())
            eventually(lambda: peer.now, "the mail at its next hop")
            stopping = threading.Thread(target=lambda: found.append(run_program("restart", *options, text=True)))
            stopping.start()
            self.assertRaises(OSError, eventually, lambda: HttpClient(place(done.stderr)).close(), "no connection")
            self.assertEqual(found, [])
            gate.set()
            self.assertEqual(wire.answer()[0], 200)
            stopping.join()
        self.assertEqual(found[0].returncode, 0)
        with HttpClient(place(found[0].stderr)) as wire:
            self.assertEqual(wire.ask(post())[0], 200)
        self.write("haineko.json", {"httpd": {"lissen": 1}})
        for command in ("reload", "restart"):  # rather the old one than none
            self.assertEqual(run_here(command, *options)[0], 2, command)
        self.assertEqual(run_here("stop", *options)[0], 0)
        self.assertEqual(select.select([systemd], [], [], 0)[0], [])  # it waits for the process that it has started
        self.assertEqual(run_here("status", *options)[:2], (1, "haineko does not run\n"))
        self.assertFalse(os.path.exists(pid))
        with open(old, encoding="utf-8") as first, open(log, encoding="utf-8") as second:
            text = first.read() + second.read()
        self.assertIn(" client=127.0.0.1 ", text)
        self.assertIn("reloaded ", text)
        self.assertNotIn("Traceback", text)

    def test_check_prints_where_mail_would_go_and_who_may_be_written_to_or_every_fault(self) -> None:
        smart = {"host": "smtp.example.org", "port": 587, "starttls": 1, "auth": "relay"}
        login = {"relay": {"username": "a", "password": "b"}}
        to, named = "; may be written to: ", {"domainpart": ["b.jp", "a.jp"], "recipients": ["x@y.jp"]}
        cases = (
            ({"mailertable": {"default": smart}, "authinfo": login}, "smtp.example.org:587, STARTTLS, AUTH as relay"),
            ({"mailertable": {"default": {"mailer": "Discard"}}}, "Discard"),
            ({"mailertable": {"default": {"mailer": self.folder}}}, f"File {self.folder}"),
            ({}, "ESMTP 127.0.0.1:25"),
            ({}, f"{to}@{NAME} only (setting recipients)"),
            ({"recipients": {}}, f"{to}nobody (setting recipients)"),
            ({"recipients": {"open-relay": 1}}, f"{to}everybody"),
            ({"recipients": named}, f"{to}@a.jp, @b.jp, x@y.jp only (setting recipients)"),
        )
        for sections, wanted in cases:
            with self.subTest(sections):
                path = self.write("haineko.json", {"smtpd": {"hostname": NAME}, **sections})
                code, out, err = run_here("check", "-c", path)
                self.assertEqual((code, out.count("\n"), "root" in out), (0, 1, os.geteuid() == 0))
                self.assertIn(wanted, out)
                self.assertNotRegex(err, "(?m)^(?!warning: ).")
        table = {"default": {"auth": "relai"}, "example.jp": {"port": "25"}}
        smtpd = {"max_workers": 0, "max_message_sise": 1}
        faulty = {"htpd": {}, "smtpd": smtpd, "mailertable": table, "authinfo": login}
        code, out, err = run_here("check", HAINEKO_CONF=self.write("haineko.json", faulty))
        self.assertEqual((code, err), (1, ""))
        for line in ('htpd: .*"httpd"', "smtpd.max_workers: .*1 to 256", 'smtpd.max_message_sise: .*"max_message_size"',
                     "mailertable.example.jp.port: .*1 to 65535"):  # fmt: skip
            self.assertRegex(out, f"(?m)^{line}")
        code, out, _ = run_here("check", "-c", self.write("haineko.json", {"authinfo": login}, mode=0o644))
        self.assertEqual((code, "chmod 600" in out), (1, True))
        path = self.settings()
        os.chmod(self.folder, 0o777)
        self.assertIn(f"warning: {self.folder} can be changed by other users", run_here("check", "-c", path)[2])

    def test_serve_with_closed_descriptors(self) -> None:
        place = os.path.join(self.folder, "s")
        command = f'exec "{sys.executable}" "{PROGRAM}" serve --workers 1 --listen "unix:{place}" <&- 2>&-'
        server = subprocess.Popen(command, shell=True, env=environment())
        self.addCleanup(server.wait)
        self.addCleanup(server.terminate)

        def connected():
            with contextlib.suppress(OSError):  # it is not bound, or does not listen yet
                return HttpClient(place)

        with eventually(connected, "a server", 20) as wire:
            self.assertEqual(wire.ask(post())[0], 200)

    def test_a_prompt_that_gets_no_answer(self) -> None:
        for words, prompt in (("pw", b"Password: "), ("send --user x --to a@b.jp --body x", b": ")):
            with self.subTest(words, terminal=True):
                ours, theirs = pty.openpty()
                more = {"stdin": theirs, "stderr": subprocess.PIPE, "env": environment(), "start_new_session": True}
                more["preexec_fn"] = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)
                running = subprocess.Popen([sys.executable, LAUNCHER, *words.split()], **more)
                os.close(theirs)
                seen = b""
                while not seen.endswith(prompt):
                    seen += os.read(ours, 100)
                os.write(ours, b"\x04")
                err = running.communicate(timeout=20)[1]
                os.close(ours)
                self.assertEqual((running.returncode, err), (1, b"haineko: no password\n"))
        done = run_program("send", "--user", "x", given=b"{}", start_new_session=True)
        said = b"haineko: there is no terminal to ask for the password\n"
        self.assertEqual((done.returncode, done.stderr), (1, said))

    def test_send_posts_and_says_whether_all_was_accepted(self) -> None:
        peer = self.peer({"RCPT": refuses(b="550 5.1.1 no")})
        hashed = {"kijitora": "{SSHA}9p2euyteR33mp0TYKjmYhTlIt1ctxuRn"}
        url = served(self, {"mailertable": {"default": esmtp(peer)}, "password": hashed}).urls[0]
        whole, some = json.dumps(document()), json.dumps(document(rcpt=["a@example.jp", "b@example.jp"]))
        path, page = self.write("mail.json", whole), self.write("page.html", "<p>にゃあ</p>")
        files = f"--html {page} --attach {self.write('領収書.csv', '1,2')} --attach {path}"
        login, flags = f"--url {url} --user kijitora", "--subject 謹賀新年 --body にゃあ --mail a@example.org"
        cases = (
            # words, on stdin, exit code, codes of the recipients
            (f"{login} {path}", "", 0, ["250"]),
            (f"{path} --url {url}submit --user kijitora", "", 0, ["250"]),
            (f"--url {url.rstrip('/')} --user kijitora", whole, 0, ["250"]),
            (f"- {login}", some, 1, ["250", "550"]),
            (f"--url {url}", whole, 1, ["535"]),
            (f"- {login}", "{", 1, ["421"]),
            (f"{login} --to a@example.jp {flags}", "", 0, ["250"]),
            (f"{login} --to a@example.jp --to b@example.jp {flags}", "", 1, ["250", "550"]),
            (f"{login} --to c@example.jp --subject x", "from stdin\n", 0, ["250"]),
            (f"{login} --to h@example.jp --subject x {files}", "", 0, ["250"]),
        )
        for words, given, wanted, codes in cases:
            with self.subTest(words):
                code, out, err = run_here("send", *words.split(), given=given, HAINEKO_PASSWORD="kijitora")
                self.assertEqual((code, err), (wanted, ""))
                self.assertEqual([item["code"] for item in json.loads(out)["response"]], codes)
        mails = {mail["To"]: mail for mail in (parsed(mail.text) for mail in peer.mails)}
        found = mails["a@example.jp"]
        self.assertEqual((found["Subject"], found.get_content()), ("謹賀新年", "にゃあ\r\n"))
        self.assertEqual(mails["c@example.jp"].get_content(), "from stdin\r\n")
        rich = mails["h@example.jp"]
        self.assertEqual(rich.get_body(("html",)).get_content().strip(), "<p>にゃあ</p>")
        attached = {part.get_filename(): part.get_payload(decode=True) for part in rich.iter_attachments()}
        self.assertEqual(attached, {"領収書.csv": b"1,2", "mail.json": whole.encode()})

    def test_an_answer_with_what_a_terminal_would_obey(self):
        item = dict.fromkeys(("rcpt", "error", "code", "dsn", "command", "mailer"), 0)
        item["message"] = ["\ud800\x9b2J\u202e\x1b", "ねこ🐈"]
        with HttpPeer(lambda asked: (200, json.dumps({"response": [item]}).encode())) as peer:
            shown = run_here("send", "--url", peer.url, given=b"{}")[1]
        self.assertIn(r'"\ud800\u009b2J\u202e\u001b"', shown)
        self.assertIn('"ねこ🐈"', shown)
        self.assertTrue(shown.replace("\n", "").isprintable())

    def test_sendmail(self) -> None:
        peer = self.peer({"RCPT": refuses(n="550 5.1.1 no", l="450 4.2.0 later")})
        table = {"default": esmtp(peer), "x": {"mailer": "Discard"}}
        force = self.settings(recipients={"domainpart": ["example.jp", "日本語.jp"]}, mailertable=table)
        text = "From: a@example.org\nTo: One <1@example.jp>,\n 2@example.jp\nCc: 3@example.jp\nBcc: 4@example.jp\n"
        text += "Subject: Nya\n\nMeow.\n.\nmore\n"
        cases = (
            # words, message, exit code, envelope recipients that were taken
            ("a@example.jp", text, 0, "a"), ("a@example.jp|b@example.jp", text, 0, "ab"), ("-i|-t", text, 0, "1234"),
            ("-oi|-f|b@example.org|--|a@example.jp", text, 0, "a"), ("-i|-f||a@example.jp", text, 0, "a"),
            ("-f|root|-FCronDaemon|-i|-B8BITMIME|-oem|a@example.jp", text, 0, "a"),
            ("-t", "Subject: x\n\nx\n", 64, ""), ("", text, 64, ""), ("-Z|a@example.jp", text, 64, ""),
            ("-f|non sense|a@example.jp", text, 64, ""), ("a@example.jp", "Subject: bare\rCR\n\nx\n", 65, ""),
            ("n@example.jp", text, 69, ""), ("-f|<>|n@日本語.jp", text, 69, ""), ("l@example.jp", text, 75, ""),
            ("root", text, 77, ""),  # at this host, which the settings don't permit
            ("n@example.jp|a@example.jp", text, 69, "a"), ("n@example.jp|l@example.jp", text, 75, ""),
            ("a@example.net", text, 77, ""), ("a@example.net|a@example.jp", text, 77, "a"),
            ("a@example.jp", f"X-Haineko-Loop: {NAME}\n" + text, 69, ""),
        )  # fmt: skip
        for words, given, wanted, names in cases:
            with self.subTest(words=words, given=given[:30]):
                peer.mails.clear()
                code, out, err = run_here("sendmail", "-C", force, *words.split("|") if words else (), given=given)
                self.assertEqual((code, out, bool(err)), (wanted, "", bool(wanted)), err)
                self.assertNotIn("Traceback", err)
                self.assertIn("<n@日本語.jp>: 550 RCPT" if "日" in words else "", err)
                to = [f"RCPT TO:<{name}@example.jp>" for name in names]
                self.assertEqual([mail.rcpt for mail in peer.mails], [to] if to else [])
                sender = re.search(r"-f\|(\w+@[^|]+|)\|", words)
                for mail in peer.mails:
                    self.assertEqual(mail.sender, sender[1] if sender else mail.sender)
                    found = email.message_from_bytes(mail.text)
                    self.assertEqual((found["Bcc"], found["Subject"], found["X-Haineko-Loop"]), (None, "Nya", NAME))
                    self.assertEqual(b"\r\n..\r\nmore\r\n" in mail.text, bool(re.search(r"-o?i\b", words)))
                    self.assertTrue(found["Received"] and found["Date"] and found["Message-Id"])
        self.assertEqual([line for line in peer.lines if line == "MAIL FROM:<>"], ["MAIL FROM:<>"] * 2)
        bad = self.write("bad.json", {"x": 1})
        self.assertEqual(run_here("sendmail", "-C", bad, "a@example.jp", given=text)[0], 78)
        done = run_program("sendmail", "a@example.jp", given=text, text=True)
        self.assertEqual((done.returncode, "no settings file" in done.stderr), (78, True), "it'd be lost on a screen")

    def test_sendmail_as_programs_call_it(self) -> None:
        peer = self.peer({}, "DSN")
        smtpd = {"hostname": NAME, "aliases": {"root": ["ops@example.jp"]}}
        path = self.settings(smtpd=smtpd, mailertable={"default": esmtp(peer)})
        text, to, fails = "Subject: x\n\nNya\n", "|a@example.jp", " NOTIFY=FAILURE,DELAY"
        cases = (
            # words, header fields, local parts in the RCPT lines, what MAIL ends with or the header holds
            ("a@example.jp,b@example.jp", "", "a b", ""), ("a@example.jp b@example.jp", "", "a b", ""),
            ("<a@example.jp>|Neko <b@example.jp>", "", "a b", ""),
            ('"Doe, J" <a@example.jp>, b@example.jp (x)', "", "a b", ""),
            ("-h|5|-i" + to, "", "a", ""), ("-e|m" + to, "", "a", ""),
            ("-em|-odb|-O|x=y|-Ac|-Am|-x|-n|-m|-v|-G|-U" + to, "", "a", ""),
            ("-L|label|-pESMTP|-X|log|-B|8BITMIME|-q" + to, "", "a", ""),
            ("-N|failure,delay|-R|hdrs" + to, "", "a", " RET=HDRS"),
            ("-N|never|-V|a b+" + to, "", "a", " RET=FULL ENVID=a+20b+2B"),
            ("-F|Cron Daemon" + to, "", "a", "From: Cron Daemon <cron@"),
            ("-F|Cron\nBcc: z@example.jp" + to, "", "a", "<cron@"),
            ("-F|x" + to, "From: root (Cron Daemon)\n", "a", f"From: root@{NAME} (Cron Daemon)"),
            ("root", "To: root\n", "ops", f"To: root@{NAME}"), ("Root <root>, b@example.jp", "", "ops b", ""),
            ("-t", "To: root, neko@example.jp\n", "ops neko", f"To: root@{NAME}, neko@example.jp"),
            ("-t", "Resent-To: r@example.jp\nResent-Bcc: s@example.jp\nResent-From: x\nTo: a@example.jp\n", "r s",
             f"Resent-From: x@{NAME}"),
            ("-t", "To: x a@example.jp\nCc: b@example.jp\n", None, ""),
            ("-t", "Resent-To: r@example.jp\nReceived: x\nResent-To: old@example.jp\n", "r", ""),
            ("-t", "Resent-From: x@y.jp\nTo: a@example.jp\nResent-To: r@example.jp\n", "r", ""),
            ("-t", "To: unlisted-recipients:; (no To-header on input)\nBcc: b@example.jp\n", "b", ""),
            ("-t", "To: a@example.jp,\nCc: b@example.jp (Doe, J), c@example.jp\n", "a b c", ""),
            ("-t", "To: a@example.jp; b@example.jp\n", "a b", ""), ("-t|c@example.jp", "To: a@example.jp\n", "c a", ""),
            (to[1:], "no header at all\n", "a", "From: cron@"),
        )  # fmt: skip
        for words, head, names, wanted in cases:
            with self.subTest(words, head=head):
                peer.mails.clear()
                given = head if head.startswith("no ") else head + text
                result = run_here("sendmail", "-C", path, *words.split("|"), given=given, LOGNAME="cron")
                [(mail, rcpt, octets, _)] = peer.mails
                if names is None:  # a field that is no list is never searched for addresses
                    self.assertEqual((result[0], rcpt), (65, [f"RCPT TO:<b@example.jp>{fails}"]), result)
                    continue
                self.assertEqual(result, (0, "", ""))
                notify = " NOTIFY=NEVER" if "never" in words else fails
                self.assertEqual(rcpt, [f"RCPT TO:<{name}@example.jp>{notify}" for name in names.split()])
                self.assertRegex(mail, f"^MAIL FROM:<cron@{NAME}>")
                header = octets.partition(b"\r\n\r\n")[0].decode()
                self.assertIn(wanted, mail + header)
                self.assertNotIn("bcc:", header.lower().replace("cron bcc:", ""))
        for name, wanted in (
            ("alice@corp.example.org", "alice@corp.example.org"), ("CORP\\alice", f"alice@{NAME}"),
            ("alice smith", f"alice_smith@{NAME}"), ("猫", f"uid{os.getuid()}@{NAME}"), ("..a..b..", f"a.b@{NAME}"),
        ):  # fmt: skip
            with self.subTest(name):
                result = run_here("sendmail", "-C", path, "a@example.jp", given=text, LOGNAME=name)
                self.assertEqual((*result, peer.mails[-1].sender), (0, "", "", wanted))

    def test_sendmail_that_sends_nothing(self) -> None:
        path = self.settings(queue={"path": "q.db"})
        no = "haineko: usage: -b{} is not served here; `haineko.py serve` runs the server\n"
        for words, *wanted in (
            # words, exit code, stdout, stderr
            ("-bp", 0, "Mail queue is empty\n", ""),
            ("-q", 0, "", ""), ("-q30m", 0, "", ""), ("-bi", 0, "", ""), ("-I", 0, "", ""),
            ("-bv|a@example.jp", 0, "a@example.jp: Discard (mailertable.default)\n", ""),
            ("-bs", 64, "", no.format("s")), ("-bd", 64, "", no.format("d")),
            ("-R|x|a@example.jp", 64, "", "haineko: usage: -R x: expected hdrs or full\n"),
        ):  # fmt: skip
            with self.subTest(words):
                self.assertEqual(run_here("sendmail", "-C", path, *words.split("|"), given="x"), tuple(wanted))

    def test_sendmail_queues(self) -> None:
        peer = self.peer({"RCPT": refuses(l="450 4.2.0 later")})
        path = self.settings(queue={"path": "q.db", "min_free": 0}, mailertable={"default": esmtp(peer)})
        words = ("sendmail", "-C", path, "-N", "never", "l@example.jp", "a@example.jp")
        self.assertEqual(run_here(*words, given="\nx\n"), (0, "", ""))
        self.assertEqual([mail.rcpt for mail in peer.mails], [["RCPT TO:<a@example.jp>"]])
        code, out, err = run_here("sendmail", "-C", path, "-bp")
        self.assertEqual((code, err), (0, ""))
        self.assertRegex(out, "l@example.jp[^\0]*450 4.2.0 later")
        self.settings(mailertable={"default": esmtp(peer)})
        code, out, err = run_here(*words, given="\nx\n")
        self.assertEqual((code, "<l@example.jp>: 450 RCPT" in err), (69, True), err)  # not 75: a@ would get it twice

    def test_sendmail_and_raw_make_the_same_of_a_finished_message(self):
        peer = self.peer(None, "8BITMIME")
        force = {"mailertable": {"default": esmtp(peer)}}
        text = "From: a@example.org\nTo: b@example.jp, d@example.jp\nBcc: ねこ <c@日本語.jp>\n"
        text += "Date: Fri, 3 Jan 2014 18:35:58 +0900\nMessage-ID: <a@b>\nSubject: x\nContent-Type: text/html\n\n猫\n"
        text += "y" * 1200 + "\n"
        words = ("sendmail", "-C", self.settings(**force), "-t", "-i", "-f", "a@example.org")
        self.assertEqual(run_here(*words, given=text), (0, "", ""))
        self.assertEqual(posted({"mail": "a@example.org", "raw": text}, settings(**force))[0], 200)
        (_, rcpt, one, _), (_, rcpt_too, two, _) = peer.mails
        self.assertEqual((rcpt, len(rcpt)), (rcpt_too, 3))
        self.assertIn("RCPT TO:<c@xn--wgv71a119e.jp>", rcpt)
        self.assertEqual(*[re.sub(rb"\AReceived: .*(?:\r\n[ \t].*)*\r\n", b"", octets) for octets in (one, two)])
        self.assertNotIn(b"Bcc", one)

    def test_sendmail_without_stdin(self):
        words = f'exec "{sys.executable}" "{PROGRAM}" sendmail -C "{self.settings()}" -f a@example.org a@example.jp <&-'
        done = subprocess.run(words, shell=True, env=environment(), stderr=subprocess.PIPE, timeout=20, check=False)
        self.assertEqual((done.returncode, done.stderr), (0, b""))

    def test_the_sendmail_program_of_setup(self) -> None:
        os.chmod(self.folder, 0o755)
        program, launcher = shutil.copy(PROGRAM, self.folder), os.path.join(self.folder, "bin", "sendmail")
        user = {"user": 65534} if os.getuid() == 0 else {}  # one who can't read the settings
        fit = [path for path in (sys.executable, "/usr/bin/python3") if can_run(path, **user)]
        python, more = (*fit, sys.executable)[0], {"capture_output": True, "timeout": 30}
        words = [python, program, "setup", "--dest", self.folder, "--sendmail", launcher]
        done = subprocess.run(words, text=True, env=environment(), check=True, **more)
        self.assertEqual((done.stdout.splitlines()[-1], done.stderr), (launcher, ""))
        with open(launcher) as stream:
            self.assertEqual(len(stream.readlines()), 3)
        os.symlink(program, os.path.join(self.folder, "sendmail"))
        for path in (launcher, os.path.join(self.folder, "sendmail")):
            done = subprocess.run([python, path, "-h"], env=environment(), check=False, **more)
            self.assertIn(b"usage: haineko.py sendmail", done.stdout)
        peer = self.peer()
        server = served(self, {"mailertable": {"default": esmtp(peer)}})
        os.unlink(os.path.join(self.folder, "haineko.json"))
        self.settings(mailertable={"default": esmtp(peer)})
        words = [launcher, "-i", "-f", "cron@example.org", *(f"{i}@example.jp" for i in range(6))]
        env = environment(HAINEKO_URL=server.urls[0])
        for who in ({}, user) if fit else ({},):
            done = subprocess.run(words, input=b"Subject: x\n\nx\n", env=env, check=False, **more, **who)
            self.assertEqual((done.returncode, done.stdout, done.stderr), (0, b"", b""))
            self.assertEqual({mail.mail for mail in peer.mails}, {"MAIL FROM:<cron@example.org>"})
            self.assertEqual(sum(len(mail.rcpt) for mail in peer.mails), 6)
            peer.mails.clear()

    def test_a_password_through_a_pipe(self) -> None:
        code, out, err = run_here("pw", "-u", 'kiji"tora', given="にゃあ secret\n")
        self.assertEqual((code, err), (0, ""))
        [(user, line)] = json.loads("{" + out + "}").items()
        self.assertEqual(user, 'kiji"tora')
        self.assertTrue(haineko.verify_password(line, "にゃあ secret"))
        self.assertFalse(haineko.verify_password(line, "にゃあ secret\n"))
        self.assertEqual(run_here("pw")[0], 1)

    def test_check_warns_of_what_careful_postmasters_would_not_run(self) -> None:
        def route(**more) -> dict:
            return {"mailertable": {"default": {"mailer": "ESMTP", "host": "mx.test", "starttls": True, **more}}}

        def login(user: str, word: str) -> dict:
            return {"authinfo": {"a": {"username": user, "password": word}}}

        outside, weak = {"relayhosts": {"relayhosts": ["192.0.2.0/24"]}}, {"password": {"neko": "{SSHA}" + "A" * 40}}
        proxies, any_address = ["0.0.0.0/0", "::/0", "10.0.0.0/8"], "lets every client say that it has any address"
        here = ["127.0.0.1:1", "[::1]:1", "localhost:1", "unix:/x"]
        empty = ["{}.username: is empty", "{}.password: is empty"]
        cases = (
            (route(), []),
            (route(host="127.0.0.1", starttls=False), []),
            (route(port=465, starttls=False), []),
            (route(starttls=False), ["mailertable.default.starttls: mail goes to mx.test without TLS"]),
            (route(host="smtp.example.org"), ["mailertable.default.host: smtp.example.org is an example"]),
            ({**route(auth="a"), **login("", "")}, [line.format("authinfo.a") for line in empty]),
            (outside, ["recipients.open-relay: other machines (relayhosts) may write to everybody without a login"]),
            ({**outside, **weak}, ["password.neko: {SSHA} is quick to guess; `haineko.py pw` prints a better line"]),
            ({"httpd": {"listen": here}}, []),
            ({"httpd": {"listen": "0.0.0.0:1", "trusted_proxies": ["192.0.2.1"]}}, []),
            ({"httpd": {"trusted_proxies": proxies}},
             [f"httpd.trusted_proxies: {one} {any_address}" for one in proxies[:2]]),
            ({**route(auth="a", tls_verify=0), **login("u", "p")},
             ["mailertable.default.tls_verify: whoever is in between can read the secret of authinfo.a"]),
            ({"httpd": {"listen": "0.0.0.0:1"}},
             ["httpd.listen: 0.0.0.0:1 takes mail from other machines without TLS; set tls or trusted_proxies"]),
            ({**route(), "recipients": None, "smtpd": {"hostname": "here.test"}},
             ["recipients: only addresses at here.test may be written to"]),
            ({"mailertable": {"default": {"mailer": "Discard"}}, "recipients": None}, []),
        )  # fmt: skip
        for sections, wanted in cases:
            with self.subTest(sections):
                force = {"recipients": {"open-relay": 1}, **sections}
                path = self.write("warned.json", {key: value for key, value in force.items() if value is not None})
                code, out, err = run_here("check", "-c", path)
                self.assertEqual((code, err.splitlines()), (0, [f"warning: {line}" for line in wanted]), out)
        code, out, err = run_here("check", "-c", os.path.join(HERE, "haineko.json.example"))
        self.assertEqual((code, out.count("\n")), (0, 1), out)
        lines = [line for line in err.splitlines() if "chmod" not in line and "queue.path" not in line]
        wanted = ["mailertable.default.host: smtp.example.org is an example"]
        wanted += [line.format("authinfo.relay") for line in empty]
        self.assertEqual(lines, [f"warning: {line}" for line in wanted])

    def test_check_warns_of_a_queue_in_memory(self) -> None:
        if not (os.path.isdir("/dev/shm") and os.path.exists("/proc/self/mountinfo") and shutil.which("stat")):
            self.skipTest("no tmpfs on this machine")
        for place in ("/dev/shm", None):
            with tempfile.TemporaryDirectory(dir=place) as folder, self.subTest(folder):
                kind = subprocess.run(["stat", "-fc%T", folder], capture_output=True, text=True, check=True).stdout
                path = self.settings(queue={"path": os.path.join(folder, "q.db")})
                told = "warning: queue.path: tmpfs is no file system of a disk of this machine\n"
                self.assertEqual(told in run_here("check", "-c", path)[2], kind == "tmpfs\n")

    def test_setup_writes_what_is_not_there(self) -> None:
        folder = os.path.join(self.folder, "new", "folder")
        names = [os.path.join(folder, name) for name in ("haineko.json", "haineko.service", "haineko.socket")]
        said = "".join(f"{name}\n" for name in names)
        self.assertEqual(run_here("setup", "--dest", folder), (0, said, ""))
        self.assertEqual(stat.S_IMODE(os.stat(names[0]).st_mode), 0o600)
        self.assertEqual(run_here("check", "-c", names[0])[0], 0)
        with open(names[1], encoding="utf-8") as stream:
            unit = stream.read()
        self.assertIn(f"\nWorkingDirectory={os.path.realpath(HERE)}\n", unit)
        self.assertIn(f"\nExecStart={sys.executable} -m haineko serve -c {folder}/haineko.json\n", unit)
        if shutil.which("systemd-analyze"):
            analyze = lambda *words: subprocess.check_output(["systemd-analyze", *words], text=True, timeout=60)  # noqa: E731
            self.assertEqual(analyze("verify", "--man=no", *names[1:]), "")
            found = analyze("security", "--offline=yes", names[1])
            self.assertLessEqual(float(re.search(r"exposure level for haineko.service: ([\d.]+)", found)[1]), 1.5)
        self.write(names[0], "mine")
        os.unlink(names[1])
        os.unlink(names[2])
        code, out, err = run_here("setup", "--dest", folder)
        self.assertEqual((code, out.splitlines(), "File exists" in err), (1, names[1:], True), err)
        with open(names[0]) as stream:
            self.assertEqual(stream.read(), "mine")

    def test_dkim_prints_a_line_of_a_zone_file(self) -> None:
        path = self.settings(dkim={**dkim_keys("Example.ORG"), **dkim_keys("例え.jp", key=TEST_RSA_KEY, selector="s2")})
        for domain, name, octets in (("example.org", "s1._domainkey.example.org.", 32),
                                     ("例え.jp", "s2._domainkey.xn--r8jz45g.jp.", 294)):  # fmt: skip
            code, out, err = run_here("dkim", domain, "-c", path)
            self.assertEqual((code, err), (0, ""))
            found = re.fullmatch(rf'{name} IN TXT ("[^"]*"(?: "[^"]*")*)\n', out)
            strings = re.findall('"([^"]*)"', found[1])
            self.assertTrue(all(len(text) <= 255 for text in strings))
            self.assertEqual(len(base64.b64decode(haineko.parse_tags("".join(strings))["p"])), octets)
        code, out, err = run_here("dkim", "exmple.org", "-c", path)
        self.assertEqual((code, out), (1, ""))
        self.assertIn('"exmple.org" is not in dkim; did you mean "example.org"?', err)

    def test_settings_that_are_no_file(self):
        path = os.path.join(self.folder, "haineko.json")
        for what, make in (
            ("is not a regular file", lambda: os.mkfifo(path)),  # would be waited for
            ("is not a regular file", lambda: os.symlink("/dev/zero", path)),  # has no end
            ("Is a directory", lambda: os.mkdir(path)),
            ("symbolic links", lambda: os.symlink(path, path)),
        ):
            make()
            with self.subTest(what):
                self.assertIn(what, run_here("check", "-c", path)[1])
            (os.rmdir if os.path.isdir(path) else os.unlink)(path)

    def test_a_listening_socket_takes_no_file_s_place(self):
        path, place = self.write("precious", "neko"), os.path.join(self.folder, "left-over")
        self.assertRaises(OSError, haineko.bind, f"unix:{path}")
        with open(path) as stream:
            self.assertEqual(stream.read(), "neko")
        with socket.socket(socket.AF_UNIX) as old:
            old.bind(place)
        haineko.bind(f"unix:{place}").close()


class CheckConnect(WithCertificates):
    def check(self, mailertable: dict, *flags: str, resolver: str = "127.0.0.1:1", **sections) -> tuple:
        """(exit code, lines) of `check` with these routes."""
        force = {"smtpd": {"hostname": NAME, "resolver": resolver}, "mailertable": mailertable, **sections}
        path = Folder.write(self, "haineko.json", force)
        code, out, err = run_here("check", "-c", path, *flags)
        self.assertNotRegex(err, "(?m)^(?!warning: ).")
        return code, out.splitlines()[1:]

    def assert_lines(self, lines: list, *wanted: str) -> None:
        """Each line begins as wanted, or has that after the step."""
        self.assertEqual(len(lines), len(wanted), lines)
        for line, words in zip(lines, wanted):
            self.assertRegex(line, words)

    def test_esmtp(self):
        host = self.enter(SmtpPeer(None, ("STARTTLS",), self.tls))
        with socket.create_server(("127.0.0.1", 0)) as closed:
            nobody = closed.getsockname()[1]
        login = {"authinfo": {"relay": {"username": "neko", "password": "nyan"}}}
        strict, auth = {"host": "localhost", "starttls": 1, "ca_file": self.ca}, {"auth": "relay"}
        plain, offer = {"EHLO": "250 mx"}, {"EHLO": "250-mx\n250 AUTH PLAIN"}
        fine = ("^mailertable.default: DNS: localhost is .*127.0.0.1", "TCP: connected to 127.0.0.1:", "EHLO: ")
        cases = (
            # changes of the route, what the host says, the last lines
            (strict, {}, *fine, r"TLS: TLSv1\.[23], certificate of commonName=mx.sts.example, until Jan  1 .* 2120 "),
            ({**strict, "ca_file": ""}, {}, *fine, "TLS: FAILED: .*421 TLS handshake failed: .*certificate"),
            ({"host": "localhost"}, {}, *fine[:2], "EHLO: STARTTLS", "TLS: none, though it is offered"),
            ({"port": nobody}, {}, "TCP: FAILED: .*421 Cannot connect SMTP Server: Connection refused"),
            ({"host": "nowhere.invalid"}, {}, "DNS: FAILED: nowhere.invalid: "),
            ({}, {"CONN": "554 5.7.1 go away"}, "TCP: FAILED: .*554 5.7.1 go away"),
            ({}, {"EHLO": "550 no", "HELO": "550 no"}, "EHLO: FAILED: .*550 no"),
            ({"starttls": 1}, plain, "TLS: FAILED: .*454 STARTTLS is required"),
            (auth, {**offer, "AUTH": "535 5.7.8 who?"}, "AUTH: FAILED: .*535 5.7.8 who"),
            (auth, plain, "AUTH: FAILED: .*454 AUTH is required"),
            (auth, {**offer, "AUTH": "235 2.7.0 fine"}, "AUTH: logged in as neko"),
        )
        for changes, manners, *wanted in cases:
            with self.subTest(changes, manners=manners):
                host.says_at = {"127.0.0.1": manners}
                route = {"host": "127.0.0.1", "port": host.port, "timeout": 2, **changes}
                code, lines = self.check({"default": route}, "--connect", **login)
                failed = int("FAILED" in wanted[-1])
                self.assertEqual((code, len([line for line in lines if "FAILED" in line])), (failed, failed), lines)
                self.assert_lines(lines if len(wanted) > 1 else lines[-1:], *wanted)
                self.assertNotIn("nyan", "\n".join(lines))
        self.assertEqual(host.mails, [])

    def test_mx(self):
        host = self.enter(SmtpPeer(None, ("STARTTLS",), self.tls, hosts=("127.0.0.2", "127.0.0.3")))
        mx = {"neko": [(10, "mx4.example"), (20, "mx2.example")], "sts": [(10, "mx.sts.example")], "null": [(0, "")]}
        zone = {f"{name}.example": {haineko.MX: hosts} for name, hosts in mx.items()}
        for name, address in (("mx2", "127.0.0.2"), ("mx4", "127.0.0.4"), ("mx.sts", "127.0.0.2")):
            zone[f"{name}.example"] = {haineko.A: [address]}
        dns = self.enter(NameServer(zone))
        route = {"mailer": "MX", "port": host.port, "private": 1, "timeout": 2, "ca_file": self.ca}
        table = dict.fromkeys(("neko.example", "sts.example", "null.example", "default"), route)
        code, lines = self.check(table, "--connect", resolver=dns.place)
        self.assertEqual(code, 1)
        reached = ("TCP: connected to 127.0.0.2", "EHLO: ", "TLS: TLSv1.[23], certificate not verified")
        self.assert_lines(
            lines,
            "^mailertable.neko.example: DNS: neko.example takes mail at mx4.example, mx2.example",
            "TCP: FAILED: 127.0.0.4:.*Connection refused",
            *reached,
            "^mailertable.sts.example: DNS: ",
            *reached,
            "^mailertable.null.example: CONN: FAILED: 556 Domain takes no mail",
            "^mailertable.default: DNS: name servers answer",
        )
        code, lines = self.check({"default": route}, "--connect")
        self.assertEqual(code, 1)
        self.assert_lines(lines, "^mailertable.default: DNS: FAILED: 127.0.0.1: ")

    def test_relays_that_connect_to_nothing_and_nothing_is_tried_unasked(self):
        code, lines = self.check({"default": {"mailer": "Screen"}, "a.example": {"mailer": self.folder}}, "--connect")
        self.assertEqual(code, 0)
        self.assert_lines(lines, "^mailertable.default: NONE: nothing", f"^mailertable.a.example: FILE: {self.folder}$")
        self.assertEqual(self.check({"default": {"mailer": "MX"}}), (0, []))

    def test_records_of_a_sender(self):
        rsa = b"0\x5c0\x0d..\x03\x4b\x00\x30\x48\x02\x41\x00" + b"\xaa" * 64 + b"\x02\x03\x01\x00\x01"
        texts = {
            "good.example": ["other", "v=spf1 mx include:spf.good.example -all"],
            "spf.good.example": ["v=spf1 ip4:192.0.2.0/24 ~all"],
            "_dmarc.good.example": ["v=DMARC1; p=reject"],
            "s1._domainkey.good.example": ["v=DKIM1; k=ed25519; p=" + "A" * 43 + "="],
            "s1._domainkey.bad.example": [f"p={base64.b64encode(rsa).decode()}"],
            "bad.example": ["nothing"],
        }
        zone = {name: {haineko.TXT: values} for name, values in texts.items()}
        dns = self.enter(NameServer({**zone, "fails.example": lambda q, _: [q.answer(code=2)]}))
        key, spf = ("--selector", "s1"), "good.example: SPF: v=spf1 mx include"
        dmarc, no_dmarc = "_dmarc.good.example: v=DMARC1; p=reject", "DMARC: FAILED: .*no DMARC record"
        no_spf = "SPF: FAILED: .*no SPF record"
        for sender, flags, code, *wanted in (
            ("good", key, 0, spf, "good.example: DKIM: s1._domainkey.good.example: ed25519", f"^good.*DMARC: {dmarc}"),
            ("good", (), 0, spf, "DKIM: not looked at; --selector", f"good.example: DMARC: {dmarc}"),
            ("sub.good", (), 1, no_spf, "DKIM: not", f"DMARC: {dmarc}"),
            ("bad", key, 1, no_spf, "DKIM: FAILED: .*RSA key of", no_dmarc),
            ("fails", (), 1, "SPF: FAILED: DNS gives no answer", "DKIM: not", no_dmarc),
        ):
            with self.subTest(sender, flags=flags):
                words = ("--sender", f"a@{sender}.example", *flags)
                found, lines = self.check({"default": {"mailer": "Discard"}}, *words, resolver=dns.place)
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
        route = {"host": "127.0.0.1", "port": host.port, "timeout": 2}
        for manners in ({"EHLO": "250-mx\x1b[2J\r\n250 SIZE \x1b[2J"}, {"EHLO": "550 \x1b[2J no"}):
            host.says_at = {"127.0.0.1": manners}
            for sender in ("a@a.example", "a@b.example", "a@c.example"):
                with self.subTest(sender, manners=manners):
                    flags = ("--connect", "--sender", sender, "--selector", "s")
                    _, lines = self.check({"default": route}, *flags, resolver=dns.place)
                    self.assertGreater(len(lines), 3)
                    self.assertTrue(all(line.isprintable() for line in lines), lines)

    def test_what_the_readme_shows(self):
        shown = re.findall(r"(?s)```console connect\n\$ python3 haineko.py check (.*?)\n.*?\n(.*?)```", README)
        (flags, wanted), zone = shown[0], {haineko.TXT: ["v=spf1 include:spf.example.net -all"]}
        host = self.enter(SmtpPeer(None, ("STARTTLS",), self.tls))
        ehlo = "\n".join(f"250-{word}" for word in ("mx", "PIPELINING", "SIZE 35882577", "STARTTLS"))
        host.says_at = {"127.0.0.1": {"EHLO": f"{ehlo}\n250 AUTH PLAIN LOGIN", "AUTH": "235 2.7.0 fine"}}
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


class RecordsOfASender(unittest.TestCase):
    """What is read in the records, without a name server."""

    def look(self, step: str, zone: dict, fine: bool, words: str, selector=None, keys=None) -> None:
        """A step of the check of a.example, with these TXT records in DNS, is fine or not, and tells these words."""

        class Zone:
            async def lookup(self, name: str, *_) -> haineko.DNSAnswer:
                return haineko.DNSAnswer(0, zone.get(name, ()))

        with self.subTest(step, zone=zone, selector=selector):
            results = haineko.run(haineko.check_sender_domain("a.example", selector, Zone(), keys or {}))
            [(ok, told)] = [(ok, text) for name, ok, text in results if name == step]
            self.assertEqual(ok, fine, told)
            self.assertIn(words, told)

    def test_spf(self):
        chain = {f"i{i}.example": (f"v=spf1 include:i{i + 1}.example ~all",) for i in range(20)}
        for record, words in (
            # record, what is wrong with it
            ("v=spf1 -all", "sends no mail at all"), ("v=spf1 a mx -all", ""),
            ("V=SPF1 ip4:192.0.2.1 ip6:2001:db8::/32 ?all", ""), ("v=spf1 redirect=b.example", ""),
            ("v=spf1 exists:%{i}.x.example include:%{d}.example -all", ""),
            ("v=spf1 +all", "lets everybody"), ("v=spf1 all", "lets everybody"),
            ("v=spf1 ip4=192.0.2.1 -all", ""),  # an unknown modifier is no fault, RFC 7208 6
            ("v=spf1 ipv4:192.0.2.1 -all", '"ipv4:192.0.2.1" is no term'),
            ("v=spf1 include:none.example -all", "none.example: no SPF record"),
            ("v=spf1 include:i0.example -all", "more than 10 look-ups"),
            ("v=spf1 " + "a mx " * 6 + "-all", "more than 10 look-ups"),
            ("v=spf1 include:a.example -all", ""), ("v=spf10 -all", "no SPF record"),
        ):  # fmt: skip
            self.look("SPF", {"a.example": (record,), "b.example": ("v=spf1 mx -all",), **chain}, not words, words)
        self.look("SPF", {"a.example": ("v=spf1 -all", "v=spf1 mx -all")}, False, "more than one")
        self.look("SPF", {"a.example": ("v=spf1 a:b.example/24 mx//64 ip4:192.0.2.1 ~all",)}, True, "(2 of 10")

    def test_dkim(self):
        def rsa(octets: int) -> str:
            modulus = b"\x02\x82" + struct.pack(">H", octets + 1) + b"\0" + b"\xaa" * octets + b"\x02\x03\x01\0\x01"
            return base64.b64encode(b"0\x82\0\0" + modulus).decode()

        for texts, fine, words in (
            ((f"v=DKIM1; k=rsa; p={rsa(256)}",), True, "RSA, 2048 bits"),
            ((f"p={rsa(128)}",), True, "RSA, 1024 bits"),
            ((f"p={rsa(256)[:80]} {rsa(256)[80:]}; t=y",), True, "under test"),
            ((f"p={rsa(64)}",), False, "RSA key of"), (("v=DKIM1; p=",), False, "revoked"),
            (("v=DKIM2; p=AAAA",), False, "not a DKIM key"), (("v=DKIM1; k=rsa",), False, "not a DKIM key"),
            (("p=***",), False, "no base64"), (("k=ed25519; p=AAAA",), False, "32 octets"),
            (("p=AAAA", "p=BBBB"), False, "more than one"), ((), False, "no key"),
        ):  # fmt: skip
            self.look("DKIM", {"s._domainkey.a.example": texts}, fine, words, "s")

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
            zone = {"s1._domainkey.example": texts, "s2._domainkey.a.example": texts}
            self.look("DKIM", zone, fine, words, selector, keys)

    def test_dmarc(self):
        for name, texts, fine, words in (
            ("a.example", ["v=DMARC1; p=none"], True, "p=none"), ("a.example", [], False, "no DMARC record"),
            ("a.example", ["v=DMARC1;p=Quarantine; rua=mailto:a@a.example"], True, "Quarantine"),
            ("a.example", ["v=DMARC1; p=all"], False, "names no policy"),
            ("a.example", ["v=DMARC1; rua=x"], False, "names no policy"),
            ("a.example", ["v=DMARC1; p=none"] * 2, False, "more than one"),
            ("a.example", ["v=DMARC10; p=none"], False, "no DMARC record"),
            ("example", ["v=DMARC1; p=none"], False, "no DMARC record"),
        ):  # fmt: skip
            self.look("DMARC", {f"_dmarc.{name}": texts}, fine, words)


# ======================================================================================================================
# The whole: attacks, README.md
# ======================================================================================================================


class Attacks(Peers):
    """What a hostile client, server or machine does, with a bound on what it may cost."""

    def test_texts_take_time_by_length_only(self):
        spaces, length = b" " * 60000, b"POST / HTTP/1.1\r\nContent-Length: "
        body_length = lambda head: haineko.body_length(haineko.parse_head(head))  # noqa: E731
        for what, function, given in (
            ("spaces in a length", body_length, length + b"1" + spaces + b",1" + spaces + b"x"),
            ("a length again and again", body_length, length + b"1" * 18 + b",111111111111111111" * 3000 + b",1"),
            ("spaces within a value", haineko.parse_head, b"GET / HTTP/1.1\r\nA: x" + spaces + b"y"),
            ("spaces and a NUL", haineko.parse_head, b"GET / HTTP/1.1\r\nA:" + spaces + b"\0"),
            ("spaces in a reply", haineko.parse_reply, b"250 " + spaces + b"\rx\n"),
            ("white space in a reply", haineko.parse_reply, b"250" + b"\t" * 60000 + b"x\n"),
        ):
            with self.subTest(what):
                began = time.process_time()
                with contextlib.suppress(haineko.Rejected, haineko.ProtocolError):
                    function(given)
                self.assertLess(time.process_time() - began, 0.2)
        for charset in ("UTF-8", "ISO-2022-JP"):
            began = time.process_time()
            field = haineko.text_field("Subject", "ﾞ" * 4000, charset)
            self.assertLess(time.process_time() - began, 0.5, charset)
            self.assertLess(max(map(len, field.split("\r\n"))), 77)

    def test_white_space_around_values(self):
        found = haineko.parse_head(b"GET / HTTP/1.1\r\nA: \t b \t\r\nB:\r\nC:\xa0c\x0b").headers
        self.assertEqual(found, {"a": "b", "b": "", "c": "\xa0c\x0b"})
        for line, wanted in ((b"250 a b \r", "a b "), (b"250\t\r", ""), (b"250", ""), (b"250 \r\r", "")):
            self.assertEqual(haineko.parse_reply(line + b"\n")[0].lines[0], wanted)
        odd = haineko.parse_head(b"POST / HTTP/1.1\r\nContent-Length: 5\xa0")
        self.assertRaises(haineko.Rejected, haineko.body_length, odd)

    def test_requests_that_are_not_what_they_seem(self):
        body = json.dumps(document()).encode()
        small = settings(smtpd={"hostname": NAME, "max_message_size": 2000})
        own = {"httpd": {"trusted_proxies": ["127.0.0.1"]}, "relayhosts": {"relayhosts": ["127.0.0.1", "192.0.2.9"]}}
        behind = settings(**own)

        def chunks(lead: bytes) -> bytes:
            octets = b"".join(b"1%b\r\n%c\r\n" % (lead, octet) for octet in body) + b"0\r\n\r\n"
            return b"POST /submit HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + octets

        forwarded = (
            ("192.0.2.9", 200), ("192.0.2.9:4711", 200), ("198.51.100.1:4711", 403), ("[2001:db8::1]:4711", 403),
            ("127.0.0.1, 198.51.100.1", 403), ("unknown", 400), ("", 400), ("192.0.2.9, nonsense", 400),
        )  # fmt: skip
        for octets, force, status in (
            # chunks of one octet count by their lines
            (chunks(b""), small, 200),
            (chunks(b";" + b"x" * 600), small, 413),
            # a client behind a proxy must not pass for the proxy's own
            *((post(None, f"X-Forwarded-For: {value}"), behind, status) for value, status in forwarded),
            # settings are not for a page whose name was rebound; hosts that may see them: Http
            (get("/conf", host="localhost:2794"), settings(), 200),
            (get("/conf", host="evil.example:2794"), settings(), 403),
            (get("/conf", host="127.0.0.1.evil.example"), settings(), 403),
        ):
            with self.subTest(octets[:150], status=status):
                self.assertEqual(over_http(octets, force)[0], status)

    def test_what_is_remembered_is_short(self):
        long, many = "a" * 500000, ", ".join(f"a{i}@example.jp" for i in range(2000))
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for i in range(12):
            for changes in (
                {"mail": f"{i}{long}"}, {"rcpt": [f"{i}{long}"]}, {"ehlo": f"[{i}{long}]"},
                {"header": {"charset": f"{i}{long}"}}, {"header": {"from": f"b{i}@example.jp, {many}"}},
                {"header": {"replyto": f"c{i}@example.jp, {many}"}},
            ):  # fmt: skip
                posted(document(**changes))
        self.assertLess(tracemalloc.get_traced_memory()[0], 3 << 20)

    def test_faults_behind_which_nobody_reads_on(self):
        for header in ({"subject": "x", **{f"odd{i}": 1 for i in range(20000)}}, {"references": ["x"] * 20000}):
            body = json.dumps({"header": header}).encode()
            self.assertEqual(len(haineko.parse_submission(body)[1]), haineko.MAX_ERRORS)

    def test_the_digest_of_a_document_is_that_of_its_values(self):
        text = b'{"mail": "a@example.org", "header": {"subject": "\xe7\x8c\xab", "from": "a@example.org"}, "body": "x"}'
        again = b'{"body":"x","header":{"from":"a@example.org","subject":"\\u732b"},\n"mail":"\\u0061@example.org"}'
        others = (text.replace(b'"x"', b'"X"'), text.replace(b'"x"', b'["x"]'), text.replace(b"header", b"headers"))
        same = {haineko.document_digest(octets) for octets in (text, again, b"\xef\xbb\xbf" + text)}
        self.assertEqual((len(same), len({*same, *map(haineko.document_digest, others)})), (1, 4))

    def test_a_key_without_login_is_that_of_its_client(self):
        force, found = haineko.replace(settings(), queue=True), set()  # any queue
        for client, login in (("192.0.2.1", ""), ("192.0.2.2", ""), ("192.0.2.1", "neko"), ("192.0.2.2", "neko")):
            asked = request(b"{}", client, idempotency_key="k")
            asked.login, asked.settings = login, force
            found.add(haineko.queue_options(asked, haineko.Submission())[1])
        self.assertEqual(len(found), 3)

    def test_a_long_list_of_recipients_makes_lines_that_a_pipe_takes_whole(self):
        said = haineko.Reply("250", "2.0.0", "DATA", ("ok " * 300,), "ESMTP", "127.0.0.1", 25)
        for name, counts in (("x" * 240, [8, 8, 4]), ("x", [20]), ("x" + "猫" * 78, [8, 8, 4])):
            to = [f"{name}{i}@y.example" for i in range(20)]
            haineko.log_results(request(b""), [haineko.TransactionResult(job(haineko.Route(), to), [said] * 20, 1.0)])
            lines = self.logged()
            with self.subTest(name[:3]):
                self.assertEqual([line.count("@") - 1 for line in lines], counts)
                self.assertLess(max(len(line.encode()) for line in lines), select.PIPE_BUF)
                self.assertEqual(re.findall("<(x[^>]*)>", "".join(lines)), to)

    def test_an_address_can_not_forge_a_field_of_the_log(self):
        posted(document(mail='"a> code=250"@x.jp', rcpt=['"b> dsn=2.0.0"@x.jp']))
        said = r'from="<\"a> code=250\"@x\.jp>" to="<\"b> dsn=2\.0\.0\"@x\.jp>" relay=Discard delay=[\d.]+ dsn=2\.0\.0 '
        self.assertRegex(self.logged()[0], said.replace('\\"', r"\\\""))

    def test_a_server_that_repeats_our_password(self):
        forms = (base64.b64encode(octets).decode() for octets in (b"\0neko\0hunter2secret", b"hunter2secret"))
        peer = self.peer({"AUTH": f"535 5.7.8 unknown: {' '.join(forms)} hunter2secret"}, "AUTH PLAIN")
        [reply] = carried(job(peer, auth="x", credentials=("neko", "hunter2secret")))[0]
        self.assertEqual(reply.message, ("5.7.8 unknown: ******** ******** ********",))


class Readme(unittest.TestCase):
    """What README.md says is so: each fenced block is run, and each name that a reader may need stands in a table."""

    URL = "http://127.0.0.1:2794/"  # as README.md has it; replaced by a test's own
    ALL = os.environ.get("HAINEKO_ALL") == "1"  # what takes seconds to start, too
    PATH = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    write = classmethod(Folder.write)

    @classmethod
    def setUpClass(cls):
        cls.blocks = re.findall(r"^```(\w+) ?([\w ]*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
        cls.folder = tempfile.mkdtemp(prefix="haineko-readme.")
        cls.addClassCleanup(shutil.rmtree, cls.folder, True)
        for name in ("haineko.py", "haineko.json.example"):
            shutil.copy(os.path.join(HERE, name), cls.folder)
        cls.write("settings.json", cls.marked("json", "settings")[0])
        cls.write("faulty.json", cls.marked("json", "faulty")[0])
        cls.server = Server(None, "--listen", "127.0.0.1:0", "--workers", "1")
        cls.addClassCleanup(cls.server.close)
        refusing = Server({"recipients": {}})
        cls.addClassCleanup(refusing.close)
        cls.url, cls.refusing = cls.server.urls[0], refusing.urls[0]

    @classmethod
    def marked(cls, language, mark):
        """The blocks of that language and mark."""
        return [text for word, words, text in cls.blocks if (word, words) == (language, mark)]

    def run_it(self, command, url=None, stdin="", expect=0, **variables):
        """Output of a command, in the folder, with the server's URL in place of README's."""
        url = url or self.url
        command = [word.replace(self.URL, url) for word in command]
        env = {**environment(PATH=self.PATH, no_proxy="*", HAINEKO_URL=f"{url}submit"), **variables}
        more = {"input": stdin, "cwd": self.folder, "env": env, "capture_output": True, "text": True, "timeout": 120}
        done = subprocess.run(command, check=False, **more)
        self.assertEqual(done.returncode, expect, f"{command}\n{done.stdout}{done.stderr}")
        return done.stdout + (done.stderr if expect else "")

    def test_every_block_is_tested(self):
        marks = {
            "sh": "first curl smarthost client root queue", "json": "answer faulty settings submission event",
            "console": "connect", "nginx": "two", "html": "client",
        }  # fmt: skip
        known = {(language, mark) for language, words in marks.items() for mark in words.split()}
        known |= {(name, "") for name in ("sh", "yaml", "dockerfile", "console", "nginx")}
        known |= {(language, "client") for language, *_ in self.CLIENTS}
        self.assertEqual({(language, mark) for language, mark, _ in self.blocks}, known)
        self.assertEqual(len(self.blocks) * 2, len(re.findall(r"^```", README, re.MULTILINE)))

    def test_the_first_minute(self):
        (first,), (curl,), (shown,) = (self.marked(*at) for at in (("sh", "first"), ("sh", "curl"), ("json", "answer")))
        commands = [line.partition("#")[0].split() for line in first.splitlines()]
        self.assertEqual(commands, [["python3", "haineko.py", "serve"], ["python3", "-m", "unittest"]])
        self.assertIn(self.URL, first)
        told, meant = json.loads(self.run_it(["sh", "-euc", curl])), json.loads(shown)
        self.assertEqual(list(told), list(meant))
        for key in ("addresser", "recipient", "response", "remoteaddr", "referer"):
            self.assertEqual(told[key], meant[key])
        self.assertIn("Subject: Nyaaaa", self.server.log())

    def test_the_smart_host(self):
        (commands,) = self.marked("sh", "smarthost")
        lines = (("host", "smtp.example.org", "smtp.example.net"), ("username", "", "me"), ("password", "", "nyan"))
        edits = " ".join(f'-e \'s/"{key}": "{old}"/"{key}": "{new}"/\'' for key, old, new in lines)
        editor = self.write("editor", f'#!/bin/sh\nsed {edits} "$1" >"$1.new" && cat "$1.new" >"$1"\n')
        os.chmod(editor, 0o700)
        path = os.path.join(self.folder, "haineko.json")
        self.addCleanup(os.unlink, path)
        output = self.run_it(["sh", "-euc", commands], EDITOR=editor)
        self.assertIn("fine; mail goes to ESMTP smtp.example.net:587, STARTTLS, AUTH as relay", output)
        settings, faults = haineko.load_settings(path)
        self.assertEqual((faults, settings.mailertable["default"].credentials), ([], ("me", "nyan")))
        self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)

    def test_commands_and_what_they_print(self):
        for commands in self.marked("sh", ""):
            with self.subTest(commands):
                self.run_it(["sh", "-euc", commands])
        for commands in self.marked("sh", "root"):  # not on this machine, but each must be a command
            self.run_it(["sh", "-n"], stdin=commands)
        for session in self.marked("console", ""):
            command, _, wanted = session[2:].partition("\n")
            with self.subTest(command):
                self.assertEqual(self.run_it(["sh", "-c", f"{command} || true"]), wanted)

    def test_settings_and_submissions(self):
        for i, text in enumerate(self.marked("json", "settings")):
            with self.subTest(text):
                for name in re.findall(r'"env": "(\w+)"', text):
                    os.environ[name] = "nyan"
                    self.addCleanup(os.environ.pop, name, None)
                self.assertEqual(haineko.load_settings(self.write(f"settings{i}.json", text))[1], [])
        for text in self.marked("json", "faulty"):
            self.assertNotEqual(haineko.load_settings(self.write("faulty.json", text))[1], [])
        for text in self.marked("json", "submission"):
            status, _, found = self.server.ask(post(text.encode()))
            self.assertEqual((status, found["response"][0]["error"]), (200, 0))

    CLIENTS = (  # (language, file, command, whether it is slow to start)
        ("sh", "client.sh", ["sh", "-eu"], False), ("python", "client.py", ["python3"], False),
        ("javascript", "client.mjs", ["node"], False), ("php", "client.php", ["php"], False),
        ("ruby", "client.rb", ["ruby"], False), ("perl", "client.pl", ["perl"], False),
        ("go", "client.go", ["go", "run"], True), ("java", "Mail.java", ["java"], True),
    )  # fmt: skip

    def test_clients(self):
        for language, name, command, slow in self.CLIENTS:
            with self.subTest(language):
                if slow and not self.ALL:
                    self.skipTest("slow to start; HAINEKO_ALL=1 runs it")
                tools = [command[0], "curl"] if language == "sh" else command[:1]
                missing = [tool for tool in tools if not shutil.which(tool, path=self.PATH)]
                if missing:
                    self.skipTest(f"no {missing[0]} on this machine")
                (text,) = self.marked(language, "client")
                subject = re.search(r"Hello from \w+", text)[0]
                program = [*command, self.write(name, text)]
                accepted = self.run_it(program)
                self.assertIn("mikeneko@example.jp", accepted)
                self.assertIn("200", accepted)
                self.assertIn(f"Subject: {subject}\n", self.server.log())
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
        command = [sys.executable, "-um", "http.server", "--bind", "127.0.0.1", "--directory", folder, "0"]
        web = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for cleanup in (web.stdout.close, web.wait, web.terminate):
            self.addCleanup(cleanup)
        origin = "http://127.0.0.1:" + re.search(r"port (\d+)", web.stdout.readline().decode())[1]
        welcome = served(self, {"httpd": {"allowed_origins": [origin]}}).urls[0]
        for url, wanted in ((welcome, "Sent."), (self.url, "No connection.")):  # the latter allows no origin
            with self.subTest(wanted):
                submit = "<script>document.forms[0].requestSubmit()</script>\n"
                self.write("pages/page.html", page.replace(self.URL, url) + submit)
                flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
                flags += ["--virtual-time-budget=5000", "--dump-dom"]
                self.assertIn(f"<output>{wanted}</output>", self.run_it([browser, *flags, f"{origin}/page.html"]))

    def test_nginx(self):
        if not shutil.which("nginx"):
            self.skipTest("no nginx on this machine")
        pem = certificate()
        for shown in [text for language, _, text in self.blocks if language == "nginx"]:
            block = shown.replace("listen 443", f"listen unix:{self.folder}/nginx.sock")  # -t binds it for a moment
            block = re.sub(r"(ssl_certificate(?:_key)? +)[^;]+", rf"\1{pem}", block)
            place = f"access_log off; client_body_temp_path {self.folder}/body; proxy_temp_path {self.folder}/proxy;"
            place += "".join(f"{name}_temp_path {self.folder}/{name};" for name in ("fastcgi", "uwsgi", "scgi"))
            path = self.write("nginx.conf", f"pid {self.folder}/pid; events {{}} http {{ {place}\n{block} }}")
            self.run_it(["nginx", "-t", "-q", "-e", "stderr", "-p", self.folder, "-c", path])

    def test_rules_of_alerts(self):
        (rules,) = self.marked("yaml", "")
        for name in re.findall(r"haineko_\w+", rules):
            self.assertIn(name, haineko.METRICS)
        if not shutil.which("promtool"):
            self.skipTest("no promtool on this machine")
        found = self.run_it(["promtool", "check", "rules", self.write("rules.yml", rules)])
        self.assertIn("SUCCESS: 5 rules found", found)

    def test_every_setting_stands_in_a_table_with_its_default(self):
        names = {haineko.Tls: "`httpd.tls`", haineko.Syslog: "`smtpd.syslog`"}
        names.update({haineko.Route: "a route", haineko.Credentials: "`authinfo`, a name", haineko.OAuth2: "`oauth2`"})
        plain = (haineko.Httpd, haineko.Smtpd, haineko.Relayhosts, haineko.Recipients)
        names.update({cls: f"`{cls.__name__.lower()}`" for cls in plain})
        for cls, section in names.items():  # the rows from that of the section's name to that of the next one
            (rows,) = re.findall(rf"(?m)^\| {re.escape(section)} \|.*\n(?:\| \| .*\n)*", README)
            for key, default in haineko.redacted(cls()).items():
                wanted = default[0] if key == "listen" else default
                wanted = "see below" if key == "syslog" else f"`{json.dumps(wanted)}`"
                with self.subTest(key, section=section):
                    self.assertIn(f"`{key}` | {wanted} |", rows)
        for name in haineko.key_table(haineko.Settings):
            with self.subTest(name):
                self.assertRegex(README, rf"(?m)^### .*\b{name}\b")

    def test_the_table_of_relays_follows_from_their_rows(self):
        rows = re.findall(r"(?m)^\| `(\w+)` \| (.*) \|.*\|$", README[README.index("\n## Relays\n") :])
        described = dict(rows[: len(haineko.RELAYS)])
        self.assertEqual(sorted(described), sorted(haineko.RELAYS))
        for name, relay in haineko.RELAYS.items():
            keys = [key for key in relay.needs if key != "auth"]
            keys += relay.login if "auth" in relay.needs else ()
            port = [str(relay.default_port)] if relay.default_port != 25 else []
            for text in (*(f"`{key}`" for key in keys), *port):
                with self.subTest(name, text=text):
                    self.assertIn(text, described[name])

    def test_every_row_of_a_table_stands_in_a_table(self):
        for name in haineko.COMMANDS:
            self.assertRegex(README, rf"(?m)^\|.*`{name}[ `].*\|", name)
        for method, path in haineko.ENDPOINTS:
            self.assertIn(f"`{method} {path}`", README)
        for slug, (status, code, dsn, command, line) in haineko.REPLIES.items():
            with self.subTest(slug):
                words = re.escape(line).replace("%s", "GET" if slug == "method" else r"\w+")
                if line != "%s" and code != "200":
                    head = rf"[^|]*\b{status}\b[^|]*\|.*" if status else ".*"  # a refusal: the row of its status
                    said = " ".join(re.escape(word) for word in (code, dsn, command) if word)
                    self.assertRegex(README, rf"(?m)^\|{head}(?:\| |<br>){said} {words}(?: \||<br>| \()")
        keys = [*haineko.key_table(haineko.Submission), *(f"header.{key}" for key in haineko.key_table(haineko.Header))]
        for key in set(keys) - {"header", "header.reply-to"}:
            self.assertRegex(README, rf"(?m)^\|.*`{re.escape(key)}`.*\|", key)


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
                lost = {"failures": [], "skipped": [], "errors": [(str(suite), f"its process ended: {status}")]}
                self.add(result, json.loads(output.read() or json.dumps({"run": 0, **lost})))
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
        letters = ""
        for kind, letter in zip(self.KINDS, "FEs"):
            items = [(unittest.FunctionTestCase(print, description=name), text) for name, text in found[kind]]
            getattr(result, kind).extend(items)
            letters += letter * len(items)
        result.stream.write(letters + "." * max(0, found["run"] - len(letters)))
        result.stream.flush()


def load_tests(loader, classes, pattern):
    """The whole module: its classes side by side, those that take longest first."""
    suites = [suite for suite in classes if suite.countTestCases()]
    return SideBySide(sorted(suites, key=lambda suite: -suite.countTestCases()))


if __name__ == "__main__":
    unittest.main()
