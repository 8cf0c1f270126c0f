"""Haineko against servers and readers that nobody here wrote: aiosmtpd, smtp-sink, postfix, dovecot, npm's smtp-server,
exim4, OpenSMTPD, nginx, email.policy.

Run as `python .ci/foreign.py` where aiosmtpd and hypothesis are installed; what else a class needs stands at its top.
All of it talks to 127.0.0.1 only and ends what it started.
"""

import contextlib
import email
import email.policy
import http.client
import json
import logging
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import warnings

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, LoginPassword
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import signed  # noqa: E402

import haineko  # noqa: E402

FOLDER = tempfile.mkdtemp(prefix="haineko-foreign.")


def setUpModule():
    logging.getLogger("mail.log").disabled = True  # aiosmtpd's: failed handshakes are meant here
    warnings.simplefilter("ignore", DeprecationWarning)  # aiosmtpd's
    unittest.addModuleCleanup(shutil.rmtree, FOLDER, True)
    os.chmod(FOLDER, 0o755)  # postfix and smtp-sink give up root
    certificate("tls")
    certificate("other", "DNS:somewhere.else.example")


def certificate(name, names="IP:127.0.0.1,DNS:localhost"):
    """A certificate that signed itself, FOLDER/NAME.pem and .key."""
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    new += ["-subj", "/CN=foreign", "-addext", f"subjectAltName={names}"]
    new += ["-addext", "keyUsage=critical,digitalSignature,keyCertSign", "-addext", "extendedKeyUsage=serverAuth"]
    subprocess.run([*new, "-keyout", at(f"{name}.key"), "-out", at(f"{name}.pem")], check=True, capture_output=True)


def at(name):
    return os.path.join(FOLDER, name)


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_for(condition, what, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.01)


def listens(port):
    with contextlib.closing(socket.socket()) as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


class Server:
    """A running Haineko; `settings` are its routes and what else differs from: everybody may be written to."""

    def __init__(self, test, mailertable, environment=(), **sections):
        path = at(f"haineko.{id(self)}.json")
        document = {"httpd": {"workers": 1}, "recipients": {"open-relay": True}, "mailertable": mailertable, **sections}
        document.setdefault("smtpd", {"hostname": "haineko.example.org", "max_rcpts_per_message": 0})
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as stream:
            json.dump(document, stream)
        self.log = path + ".log"
        command = [sys.executable, os.path.join(ROOT, "haineko.py"), "serve", "-c", path, "--listen", "127.0.0.1:0"]
        with open(self.log, "wb") as log:
            process = subprocess.Popen(command, stderr=log, env={**os.environ, **dict(environment)})
        test.addClassCleanup(process.wait)
        test.addClassCleanup(process.terminate)
        wait_for(lambda: "listens at" in self.said() or process.poll() is not None, "haineko listens")
        found = re.search(r"listens at http://127.0.0.1:(\d+)/", self.said())
        if not found:
            raise AssertionError(self.said())
        self.port = int(found[1])

    def said(self):
        with open(self.log, encoding="utf-8") as stream:
            return stream.read()

    def post(self, rcpt, body="Meow.\n", mail="kijitora@example.org", subject="Nyaaaa", **header):
        """(HTTP status, answer)."""
        header.setdefault("subject", subject)
        document = {"mail": mail, "rcpt": rcpt, "header": header, "body": body}
        return request(self.port, "POST", "/submit", json.dumps(document).encode())


def request(port, method, path, body=None, source="127.0.0.1", context=None, **headers):
    """(HTTP status, JSON) of one request."""
    kind = http.client.HTTPSConnection if context else http.client.HTTPConnection
    more = {"context": context} if context else {}
    connection = kind("127.0.0.1", port, timeout=30, source_address=(source, 0), **more)
    with contextlib.closing(connection):
        connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
        response = connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if text[:1] in b"{[" else text


def outcome(answer):
    """[(recipient, code, command)] of an answer; true of the contract in all its items."""
    for item in answer["response"]:
        keys = ["rcpt", "error", "code", "dsn", "command", "message", "mailer", "host", "port"]
        doubt = ["maybe_delivered"] if "may have arrived" in item["message"][0] else []
        assert list(item) == keys + doubt, item
        assert item["error"] == (item["code"][0] != "2"), item
        assert item["message"], item
    return [(item["rcpt"], item["code"], item["command"]) for item in answer["response"]]


CATS = ["mikeneko@example.jp", "kuroneko@example.jp", "sabineko@example.jp"]


class Mailbox:
    """What aiosmtpd asks at each command."""

    def __init__(self):
        self.mails = []

    async def handle_RCPT(self, server, session, envelope, address, options):  # noqa: N802
        words = {"nobody": "550 5.1.1 User unknown", "later": "450 4.2.1 Try again", "cannot": "252 Cannot VRFY"}
        answer = words.get(address.partition("@")[0], "250 2.1.5 OK")
        if answer[0] == "2":
            envelope.rcpt_tos.append(address)
        return answer

    async def handle_DATA(self, server, session, envelope):  # noqa: N802
        self.mails.append((envelope.mail_from, envelope.rcpt_tos, envelope.content, session.ssl is not None))
        return "250 2.0.0 Taken"


class Aiosmtpd(unittest.TestCase):
    """STARTTLS, TLS from the first byte, AUTH, and refusals of single recipients."""

    LOGINS = (("kijitora", "nyan nyan"),)

    @classmethod
    def setUpClass(cls):
        cls.box = Mailbox()
        secure = {"require_starttls": True, "auth_required": True}
        ports = {
            "plain": cls.start("tls", auth_exclude_mechanism=["LOGIN"], **secure),
            "login": cls.start("tls", auth_exclude_mechanism=["PLAIN"], **secure),
            "other": cls.start("other", **secure),
            "clear": cls.start(),
        }
        route = {"starttls": True, "auth": "right", "ca_file": at("tls.pem"), "timeout": 5}
        table = {f"{name}.example": {**route, "port": port} for name, port in ports.items()}
        table["other.example"]["ca_file"] = at("other.pem")
        table["wrong.example"] = {**table["plain.example"], "auth": "wrong"}
        table["wronglogin.example"] = {**table["login.example"], "auth": "wrong"}
        table["noauth.example"] = {**table["plain.example"], "auth": ""}
        table["unknown.example"] = {**table["plain.example"], "ca_file": ""}
        table["unchecked.example"] = {**table["unknown.example"], "tls_verify": False}
        table["open.example"] = {"port": ports["clear"], "timeout": 5}
        cls.smtps = not listens(465) and os.getuid() == 0
        if cls.smtps:
            cls.start("tls", 465, implicit=True)
            table["smtps.example"] = {"port": 465, "ca_file": at("tls.pem")}
            table["smtpsauth.example"] = {**table["smtps.example"], "auth": "right"}
        word = dict(cls.LOGINS)["kijitora"]
        logins = {
            name: {"username": "kijitora", "password": text} for name, text in (("right", word), ("wrong", "wan"))
        }
        cls.server = Server(cls, table, authinfo=logins)

    @classmethod
    def start(cls, name=None, port=None, implicit=False, **options):
        """The port of a server with that certificate."""
        port = port or free_port()
        context = None
        if name:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(at(f"{name}.pem"), at(f"{name}.key"))
        options["ssl_context" if implicit else "tls_context"] = context
        if implicit:
            options["auth_require_tls"] = False  # aiosmtpd takes only STARTTLS for TLS
        controller = Controller(
            cls.box,
            hostname="127.0.0.1",
            port=port,
            server_hostname="aiosmtpd.example",
            authenticator=cls.knows,
            **options,
        )
        controller.start()
        cls.addClassCleanup(controller.stop)
        return port

    @classmethod
    def knows(cls, server, session, envelope, mechanism, login):
        right = isinstance(login, LoginPassword) and (login.login.decode(), login.password.decode()) in cls.LOGINS
        return AuthResult(success=right, handled=right)

    def test_secured_and_logged_in(self):
        names = ["plain", "login", "unchecked"] + (["smtps", "smtpsauth"] if self.smtps else [])
        for name in names * 2:  # the second one over the kept session
            with self.subTest(name):
                self.box.mails.clear()
                status, answer = self.server.post([f"neko@{name}.example"], "Miau.\n.dot\n", subject="吾輩は猫である")
                self.assertEqual((status, outcome(answer)), (200, [(f"neko@{name}.example", "250", "DATA")]))
                self.assertEqual(answer["response"][0]["message"], ["2.0.0 Taken"])
                ((sender, tos, content, secured),) = self.box.mails
                self.assertEqual((sender, tos), ("kijitora@example.org", [f"neko@{name}.example"]))
                self.assertTrue(secured or name.startswith("smtps"))
                message = email.message_from_bytes(content, policy=email.policy.default)
                self.assertEqual(message["subject"], "吾輩は猫である")
                self.assertEqual(message.get_content().replace("\r\n", "\n"), "Miau.\n.dot\n")

    def test_the_example_with_three_lines_edited(self):
        if os.getuid() or listens(587):
            self.skipTest("port 587 can't be had")
        self.start("tls", 587, require_starttls=True, auth_required=True)
        with open(os.path.join(ROOT, "haineko.json.example"), encoding="utf-8") as stream:
            sections = json.load(stream)
        sections["mailertable"]["default"]["host"] = "localhost"
        sections["authinfo"]["relay"] = dict(zip(("username", "password"), self.LOGINS[0]))
        server = Server(self.__class__, environment={"SSL_CERT_FILE": at("tls.pem")}, **sections)
        self.box.mails.clear()
        status, answer = server.post(CATS)
        self.assertEqual((status, outcome(answer)), (200, [(to, "250", "DATA") for to in CATS]))
        self.assertEqual([secured for *_, secured in self.box.mails], [True] * 3)

    def test_refused(self):
        for name, code, command in (
            ("wrong", "535", "AUTH"),
            ("wronglogin", "535", "AUTH"),
            ("noauth", "530", "MAIL"),
            ("unknown", "421", "STARTTLS"),
            ("other", "421", "STARTTLS"),
            ("clear", "454", "STARTTLS"),
        ):
            with self.subTest(name):
                self.box.mails.clear()
                status, answer = self.server.post([f"neko@{name}.example"])
                self.assertEqual(outcome(answer), [(f"neko@{name}.example", code, command)])
                self.assertEqual((status, self.box.mails), (503, []))  # the route's fault, not the mail's
        self.assertNotIn(dict(self.LOGINS)["kijitora"], self.server.said())

    def test_single_recipients(self):
        rcpt = [f"{name}@open.example" for name in ("mikeneko", "nobody", "later", "cannot", "kuroneko")]
        for _ in range(3):
            self.box.mails.clear()
            status, answer = self.server.post(rcpt)
            told = list(zip(rcpt, ("250", "550", "450", "250", "250"), ("DATA", "RCPT", "RCPT", "DATA", "DATA")))
            self.assertEqual((status, outcome(answer)), (207, told))
            self.assertEqual(sorted(to for _, tos, _, _ in self.box.mails for to in tos), sorted(rcpt[:1] + rcpt[3:]))


@unittest.skipUnless(shutil.which("smtp-sink"), "no smtp-sink on this machine")
class SmtpSink(unittest.TestCase):
    """Every switch of smtp-sink that changes what it says."""

    FINE = ("250", "DATA")
    CASES = (  # (switches, (code, command) of each recipient)
        ((), FINE),
        (("-8",), FINE),
        (("-a",), FINE),
        (("-e",), FINE),
        (("-E",), FINE),
        (("-N",), FINE),
        (("-p",), FINE),
        (("-P",), FINE),
        (("-8", "-a", "-E", "-N", "-p"), FINE),
        (("-w", "1"), FINE),
        (("-p", "-W", "RCPT:1"), FINE),  # with pipelining it mixes up its own replies
        (("-s", "CONNECT,EHLO,MAIL,RCPT,DATA,QUIT"), FINE),
        (("-T", "1024"), FINE),
        (("-f", "EHLO"), FINE),  # then HELO is tried
        (("-f", "HELO"), FINE),
        (("-f", "EHLO,HELO"), ("500", "EHLO")),
        (("-f", "RSET,QUIT"), FINE),
        (("-q", "RSET,QUIT"), FINE),
        (("-q", "."), ("421", "DATA")),
        (("-A", "0"), ("550", "DATA")),
        *[(("-f", verb), ("500", command)) for verb, command in (("CONNECT", "CONN"), ("MAIL", "MAIL"))],
        *[(("-f", verb), ("500", command)) for verb, command in (("RCPT", "RCPT"), ("DATA", "DATA"), (".", "DATA"))],
        *[
            ((switch, verb), (code, {"CONNECT": "CONN", ".": "DATA"}.get(verb, verb)))
            for switch, code in (("-r", "450"), ("-Q", "421"))
            for verb in ("CONNECT", "EHLO", "MAIL", "RCPT", "DATA", ".")
        ],
        *[(("-q", verb), ("421", verb)) for verb in ("EHLO", "MAIL", "RCPT", "DATA")],
        (("-q", "CONNECT"), ("421", "CONN")),
        (("-p", "-q", "RCPT"), ("421", "RCPT")),
        (("-p", "-Q", "RCPT"), ("421", "RCPT")),
    )

    @classmethod
    def setUpClass(cls):
        table = {}
        for i, (switches, _) in enumerate(cls.CASES):
            port = cls.sink(*switches)
            table[f"c{i}.example"] = {"port": port, "timeout": 5}
        os.mkdir(at("dump"))
        os.chmod(at("dump"), 0o777)
        table["dump.example"] = {"port": cls.sink("-d", at("dump/mail.")), "timeout": 5}
        cls.server = Server(cls, table)

    @classmethod
    def sink(cls, *switches):
        """The port of a sink."""
        port = free_port()
        user = ["-u", "nobody"] if os.getuid() == 0 else []
        process = subprocess.Popen(
            ["smtp-sink", "-4", *user, *switches, f"127.0.0.1:{port}", "100"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        cls.addClassCleanup(process.wait)
        cls.addClassCleanup(process.terminate)
        wait_for(lambda: listens(port) or process.poll() is not None, f"smtp-sink {switches}")
        return port

    def test_every_recipient_has_a_true_reply(self):
        for i, (switches, wanted) in enumerate(self.CASES):
            rcpt = [f"{name}@c{i}.example" for name in ("a", "b", "c")]
            for body in ("Meow.\n", "Meow meow meow.\n" * 20000):
                with self.subTest(" ".join(switches), size=len(body)):
                    status, answer = self.server.post(rcpt, body)
                    self.assertEqual(outcome(answer), [(to, *wanted) for to in rcpt])
                    final = wanted[0][0] == "5" and wanted[1] != "EHLO"  # a greeting refused is the route's fault
                    self.assertEqual(status, 200 if wanted[0][0] == "2" else 502 if final else 503)

    def test_lost_after_the_dot_is_said_to_be_unsure(self):
        i = next(i for i, (switches, _) in enumerate(self.CASES) if switches == ("-q", "."))
        _, answer = self.server.post([f"a@c{i}.example"])
        self.assertIn("may have arrived", answer["response"][0]["message"][0])
        self.assertIs(answer["response"][0]["maybe_delivered"], True)

    def test_octets_arrive_as_they_are(self):
        lines = [".", "..", ".dot", "plain", "x" * 78, "x" * 79, "x" * 2000, "日本語", "\ttab ", "trailing ", ".\r."]
        for body in [*lines, "\n\n".join(lines), "\r\n".join(lines), ".\n" * 40000]:
            with self.subTest(body[:20], size=len(body)):
                status, _ = self.server.post(["neko@dump.example"], body)
                (name,) = os.listdir(at("dump"))
                with open(at(f"dump/{name}"), "rb") as stream:
                    text = stream.read().partition(b"\n\tby ")[2].partition(b"\n\t")[2].partition(b"\n")[2]
                os.unlink(at(f"dump/{name}"))
                message = email.message_from_bytes(text, policy=email.policy.default)
                wanted = body.replace("\r\n", "\n").replace("\r", "\n")
                got = message.get_content().replace("\r\n", "\n")
                self.assertEqual((status, got.rstrip("\n")), (200, wanted.rstrip("\n")))


MASTER_CF = """\
{clear} inet n - n - - smtpd
{submission} inet n - n - - smtpd
  -o smtpd_tls_security_level=encrypt
{small} inet n - n - - smtpd
  -o message_size_limit=2000
{strict} inet n - n - - smtpd
  -o smtpd_end_of_data_restrictions=reject
{greylist} inet n - n - - smtpd
  -o smtpd_recipient_restrictions=defer
{oneatatime} inet n - n - - smtpd
  -o smtpd_discard_ehlo_keywords=pipelining,dsn,8bitmime,size,enhancedstatuscodes
{few} inet n - n - - smtpd
  -o smtpd_client_connection_count_limit=3
  -o smtpd_client_event_limit_exceptions=
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
virtual unix - n n - - virtual
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
"""

MAIN_CF = """\
compatibility_level = 3.6
queue_directory = {folder}/queue
data_directory = {folder}/data
maillog_file = {folder}/log/mail.log
maillog_file_prefixes = {folder}
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
myhostname = postfix.example
mydestination =
mynetworks =
alias_maps =
alias_database =
default_transport = error:no way out
virtual_mailbox_domains = example.jp
virtual_mailbox_base = {folder}/mail
virtual_mailbox_maps = inline:{{ {{mikeneko@example.jp = mikeneko/}}, {{sabineko@example.jp = sabineko/}} }}
virtual_uid_maps = static:65534
virtual_gid_maps = static:65534
smtpd_relay_restrictions = reject_unauth_destination
smtpd_data_restrictions = reject_unauth_pipelining
smtpd_tls_security_level = may
smtpd_tls_cert_file = {tls}.pem
smtpd_tls_key_file = {tls}.key
smtpd_tls_session_cache_database =
smtpd_soft_error_limit = 1000
smtpd_hard_error_limit = 2000
smtpd_client_connection_count_limit = 0
smtpd_peername_lookup = no
strict_rfc821_envelopes = yes
disable_vrfy_command = yes
message_size_limit = 20000000
mailbox_size_limit = 0
virtual_mailbox_limit = 0
"""


@unittest.skipUnless(shutil.which("postfix") and os.getuid() == 0, "no postfix on this machine, or not root")
class Postfix(unittest.TestCase):
    """A postfix of its own, with Maildirs at the end."""

    @classmethod
    def setUpClass(cls):
        cls.folder = at("postfix")
        for name in ("etc", "queue", "data", "log", "mail"):
            os.makedirs(os.path.join(cls.folder, name))
        shutil.chown(os.path.join(cls.folder, "data"), "postfix")
        shutil.chown(os.path.join(cls.folder, "mail"), "nobody")
        names = re.findall(r"^\{(\w+)\}", MASTER_CF, re.MULTILINE)
        ports = {name: free_port() for name in names}
        cls.write("master.cf", MASTER_CF.format(**{name: f"127.0.0.1:{port}" for name, port in ports.items()}))
        cls.write("main.cf", MAIN_CF.format(folder=cls.folder, tls=at("tls")))
        cls.postfix("start")
        cls.addClassCleanup(cls.postfix, "stop")
        wait_for(lambda: all(map(listens, ports.values())), "postfix listens")
        routes = {name: {"port": port, "timeout": 10} for name, port in ports.items()}
        routes["submission"].update(starttls=True, ca_file=at("tls.pem"))
        table = {f"{name}.test": route for name, route in routes.items()}
        cls.server = Server(cls, {"default": routes["submission"]}, sendermt=table)
        signing = {"mailertable": {"default": routes["clear"]}, "dkim": signed.dkim_keys("example.org")}
        cls.signing_server = Server(cls, **signing)

    @classmethod
    def write(cls, name, text):
        with open(os.path.join(cls.folder, "etc", name), "w") as stream:
            stream.write(text)

    @classmethod
    def postfix(cls, word):
        done = subprocess.run(
            ["postfix", "-c", os.path.join(cls.folder, "etc"), word],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise AssertionError(f"postfix {word}: {done.stdout}{done.stderr}")

    def delivered(self, queueid, copies):
        """The messages of a transaction, when they have arrived."""
        found = {}

        def look():
            for folder, _, names in os.walk(os.path.join(self.folder, "mail")):
                for name in names if os.path.basename(folder) == "new" else ():  # what is in tmp may move away
                    with open(os.path.join(folder, name), "rb") as stream:
                        octets = stream.read()
                    if queueid.encode() in octets:
                        found[os.path.join(folder, name)] = octets
            return len(found) >= copies

        wait_for(look, f"{copies} copies of {queueid}", 20)
        return list(found.values())

    def test_what_is_accepted_arrives(self):
        for name in ("submission", "clear", "oneatatime"):
            for charset in ("UTF-8", "ISO-2022-JP"):
                for _ in range(2):
                    with self.subTest(name, charset=charset):
                        self.accepted(name, charset)

    def accepted(self, name, charset):
        subject, body = "謹賀新年", "あとで\n.お年玉\n\n貰いに行きます\n"
        rcpt = [CATS[0], CATS[2]]
        status, answer = self.server.post(rcpt, body, f"kijitora@{name}.test", subject, charset=charset)
        self.assertEqual((status, outcome(answer)), (200, [(to, "250", "DATA") for to in rcpt]))
        for item in answer["response"]:
            self.assertRegex(item["message"][0], r"(2\.0\.0 )?Ok: queued as \w+")
        for octets in self.delivered(answer["queueid"], 2):
            message = email.message_from_bytes(octets, policy=email.policy.default)
            self.assertEqual((message["subject"], message.get_content().replace("\r\n", "\n")), (subject, body))
            self.assertEqual(message.get_content_charset(), charset.lower())
            self.assertIn(message["delivered-to"], rcpt)
            self.assertEqual(message["to"], message["delivered-to"])
            trace = message.get_all("received")[0]
            self.assertIn("with ESMTPS id" if name == "submission" else "with ESMTP id", trace)

    def test_signatures_survive(self):
        record = signed.haineko.dkim_record(signed.settings(dkim=signed.dkim_keys("example.org")).dkim["example.org"])
        arrived = {}
        for name, document in signed.mails().items():
            is_shared = (document.get("header") or {}).get("to")
            body = json.dumps(document if is_shared else {**document, "rcpt": CATS[:1]}).encode()
            status, answer = request(self.signing_server.port, "POST", "/submit", body)
            if status in (200, 207):
                octets = self.delivered(answer["queueid"], 1)[0].replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
                arrived[name] = octets
                self.assertTrue(signed.dkim.verify(octets, dnsfunc=lambda *_, **__: record.encode()), name)
        self.assertGreater(len(arrived), 60)
        if signed.has_mailauth():
            self.assertEqual({*signed.mailauth_verdicts(list(arrived.values()), record)}, {"pass"})

    def test_refusals(self):
        large = "Meow.\n" * 1000
        for name, code, command, body in (
            ("small", "552", "MAIL", large),
            ("strict", "554", "DATA", "Meow."),
            ("strict", "554", "DATA", large * 100),
            ("greylist", "450", "RCPT", "Meow."),
        ):
            with self.subTest(name, size=len(body)):
                _, answer = self.server.post([CATS[0], CATS[2]], body, f"kijitora@{name}.test")
                told = [(to, code, command) for to in (CATS[0], CATS[2])]
                self.assertEqual(outcome(answer)[0][1:], told[0][1:])
                self.assertEqual(outcome(answer), told)

    def test_it_takes_three_sessions_at_a_time(self):
        told, count = [], 40

        def post():
            told.append(self.server.post([CATS[0]], mail="kijitora@few.test"))

        threads = [threading.Thread(target=post) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([status for status, _ in told], [200] * count, told)
        with open(os.path.join(self.folder, "log", "mail.log"), encoding="utf-8") as log:
            self.assertIn("Connection concurrency limit exceeded: 4 from", log.read())

    def test_one_recipient_is_unknown(self):
        rcpt = [*CATS, "neko@elsewhere.example"]
        for name in ("submission", "oneatatime"):
            with self.subTest(name):
                status, answer = self.server.post(rcpt, mail=f"kijitora@{name}.test")
                told = [("250", "DATA"), ("550", "RCPT"), ("250", "DATA"), ("554", "RCPT")]
                self.assertEqual((status, outcome(answer)), (207, [(to, *what) for to, what in zip(rcpt, told)]))

    def test_sendmail(self):
        """The command, with several recipients in one transaction."""
        path = at("sendmail.json")
        port = self.server_port("oneatatime")
        with open(path, "w") as stream:
            json.dump({"recipients": {"open-relay": True}, "mailertable": {"default": {"port": port}}}, stream)
        text = f"To: {', '.join(CATS)}\nBcc: {CATS[2]}\nSubject: Nyan\n\nMeow\n..\n.x\n"
        done = subprocess.run(
            [
                sys.executable,
                os.path.join(ROOT, "haineko.py"),
                "sendmail",
                "-C",
                path,
                "-t",
                "-i",
                "-f",
                "a@clear.test",
            ],
            input=text.encode(),
            check=False,
            capture_output=True,
            timeout=30,
        )
        self.assertEqual(done.returncode, 69)
        self.assertIn(f"<{CATS[1]}>: 550 RCPT:".encode(), done.stderr)
        self.assertNotIn(CATS[0].encode(), done.stderr)
        wait_for(lambda: len(self.mailed("Subject: Nyan")) == 2, "two copies")
        for octets in self.mailed("Subject: Nyan"):
            self.assertTrue(octets.endswith(b"\n\nMeow\n..\n.x\n"), octets)
            self.assertNotIn(b"Bcc", octets)

    def server_port(self, name):
        with open(os.path.join(self.folder, "etc", "master.cf")) as stream:
            index = re.findall(r"^\{(\w+)\}", MASTER_CF, re.MULTILINE).index(name)
            return int(re.findall(r"^127\.0\.0\.1:(\d+)", stream.read(), re.MULTILINE)[index])

    def mailed(self, words):
        found = []
        for folder, _, names in os.walk(os.path.join(self.folder, "mail")):
            for name in names if os.path.basename(folder) == "new" else ():
                with open(os.path.join(folder, name), "rb") as stream:
                    found.append(stream.read())
        return [octets for octets in found if words.encode() in octets]


class LimitedServer:
    """Tests of a server with few sessions at once or few mails in each, and as a rule with STARTTLS and a login."""

    SECURE, UNKNOWN = True, "550"

    @classmethod
    def setUpClass(cls):
        cls.folder = at(cls.__name__)
        for name in ("mail", "spool", "log"):
            os.makedirs(os.path.join(cls.folder, name))
            if os.getuid() == 0:
                shutil.chown(os.path.join(cls.folder, name), "nobody", "nogroup")
        port = free_port()
        with open(os.path.join(cls.folder, "output"), "wb") as output:
            process = subprocess.Popen(cls.command(port), stdout=output, stderr=output, start_new_session=True)
        cls.addClassCleanup(process.wait)
        cls.addClassCleanup(os.killpg, process.pid, signal.SIGTERM)
        wait_for(lambda: listens(port) or process.poll() is not None, f"{cls.__name__} listens")
        if process.poll() is not None:
            with open(os.path.join(cls.folder, "output"), encoding="utf-8") as output:
                raise unittest.SkipTest(output.read())
        route = {"port": port, "timeout": 10}
        if cls.SECURE:
            route.update(starttls=True, auth="right", ca_file=at("tls.pem"))
        logins = {name: {"username": "kijitora", "password": name} for name in ("right", "wrong")}
        table = {"default": route, "wrong.example": {**route, "auth": "wrong"}}
        cls.server = Server(cls, table, authinfo=logins)

    @classmethod
    def write(cls, name, text, **values):
        """The path of a file with the text, its @names@ replaced."""
        path = os.path.join(cls.folder, name)
        values = {"folder": cls.folder, "tls": at("tls"), **values}
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(re.sub(r"@(\w+)@", lambda found: str(values[found[1]]), text))
        return path

    def mailed(self, word):
        """The messages that arrived and have that word."""
        found = []
        for folder, _, names in os.walk(os.path.join(self.folder, "mail")):
            for name in names if os.path.basename(folder) == "new" else ():
                with open(os.path.join(folder, name), "rb") as stream:
                    found.append(stream.read().replace(b"\r\n", b"\n"))
        return [octets for octets in found if f"Subject: {word}\n".encode() in octets]

    def test_mails_one_after_the_other(self):
        for i in range(12):
            with self.subTest(i):
                status, answer = self.server.post(CATS[:1], "Meow\n..\n.x\n", subject=f"one{i}")
                self.assertEqual((status, outcome(answer)), (200, [(CATS[0], "250", "DATA")]))
        for i in range(12):
            wait_for(lambda i=i: self.mailed(f"one{i}"), f"mail {i}")
            (octets,) = self.mailed(f"one{i}")
            self.assertTrue(octets.rstrip(b"\n").endswith(b"\n\nMeow\n..\n.x"), octets)

    def test_wrong_password(self):
        if not self.SECURE:
            self.skipTest("no login")
        to, told = "mikeneko@wrong.example", []

        def has_room():  # the sessions of another test rest for a while
            told[:] = self.server.post([to])
            return told[1]["response"][0]["command"] != "CONN"

        wait_for(has_room, "a session", 30)  # idle ones of another test are kept for 20
        self.assertEqual((told[0], outcome(told[1])), (503, [(to, "535", "AUTH")]))
        self.assertEqual(self.server.post(CATS[:1])[0], 200)

    def test_one_recipient_is_unknown(self):
        status, answer = self.server.post(CATS)
        told = [("250", "DATA"), (self.UNKNOWN, "RCPT"), ("250", "DATA")]
        self.assertEqual((status, outcome(answer)), (207, [(to, *what) for to, what in zip(CATS, told)]))

    def test_more_clients_than_sessions(self):
        told = []
        threads = [
            threading.Thread(target=lambda i=i: told.append((i, *self.server.post(CATS[:1], subject=f"many{i}"))))
            for i in range(24)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([status for _, status, _ in told], [200] * 24, told)
        for i in range(24):
            wait_for(lambda i=i: self.mailed(f"many{i}"), f"mail {i}")
            self.assertEqual(len(self.mailed(f"many{i}")), 1)


SMTP_SERVER_JS = """\
const fs = require("fs"), {SMTPServer} = require("smtp-server");
let count = 0;
const refused = (code, text) => Object.assign(new Error(text), {responseCode: code});
fs.mkdirSync("@folder@/mail/new");
new SMTPServer({
  key: fs.readFileSync("@tls@.key"), cert: fs.readFileSync("@tls@.pem"), maxClients: 3, logger: false,
  onAuth: (auth, session, done) => done(auth.password == "right" ? null : refused(535, "no"), {user: auth.username}),
  onRcptTo: (to, session, done) => done(/^(mikeneko|sabineko)@/.test(to.address) ? null : refused(550, "unknown")),
  onData: (stream, session, done) => {
    const file = fs.createWriteStream("@folder@/mail/" + ++count), name = "@folder@/mail/new/" + count;
    file.on("finish", () => { fs.renameSync(file.path, name); done(); });
    stream.pipe(file);
  },
}).listen(@port@, "127.0.0.1");
"""


def has_node_packages(*names):
    """Whether these packages of npm are in NODE_PATH."""
    code = "".join(f"require.resolve('{name}');" for name in names)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return bool(shutil.which("node")) and not subprocess.call(["node", "-e", code], **quiet)


@unittest.skipUnless(has_node_packages("smtp-server"), "no smtp-server of npm in NODE_PATH")
class SmtpServerOfNpm(LimitedServer, unittest.TestCase):
    """Three sessions at once."""

    @classmethod
    def command(cls, port):
        os.chmod(os.path.join(cls.folder, "mail"), 0o777)
        return ["node", cls.write("server.js", SMTP_SERVER_JS, port=port)]


TOKEN_JS = """\
const {OAuth2Server} = require("oauth2-mock-server"), server = new OAuth2Server(), revoked = new Set();
let count = 0;
server.service.on("beforeTokenSigning", token => { token.payload.jti = String(++count); });
server.service.on("beforeResponse", (response, request) => {
  if (request.body.client_secret !== "purr" && request.body.refresh_token !== "kibble") {
    response.statusCode = 401;
    response.body = {error: "invalid_client", error_description: "AADSTS7000222: the secret has expired"};
  }
});
const words = token => JSON.parse(Buffer.from(token.split(".")[1], "base64url"));
const good = token => { try { return words(token).jti !== "1"; } catch { return false; } };  // the first one is refused
server.service.on("beforeUserinfo", (response, request) => {
  response.body = {active: good(request.headers.authorization.split(" ")[1]), email: "kijitora"};
});
module.exports = good;
server.issuer.keys.generate("RS256").then(() => server.start(@token_port@, "127.0.0.1"));
"""
OAUTH2_SMTP_SERVER_JS = """\
const fs = require("fs"), {SMTPServer} = require("smtp-server"), good = require("@folder@/token.js");
new SMTPServer({
  key: fs.readFileSync("@tls@.key"), cert: fs.readFileSync("@tls@.pem"), logger: false, authMethods: ["XOAUTH2"],
  onAuth: (auth, session, done) => done(null, good(auth.accessToken) && auth.username == "kijitora"
    ? {user: auth.username} : {data: {status: "401", schemes: "bearer", scope: "mail"}}),
  onData: (stream, session, done) => { stream.on("end", done); stream.resume(); },
}).listen(@port@, "127.0.0.1");
"""


class OAuth2Peer:
    """Tests of a server that takes access tokens only, those of oauth2-mock-server."""

    TOKEN_SCRIPT = "token.js"  # what runs beside the mail server

    @classmethod
    def setUpClass(cls):
        cls.folder = at(cls.__name__)
        os.mkdir(cls.folder)
        cls.ports = {"port": free_port(), "token_port": free_port()}
        cls.write("token.js", TOKEN_JS)
        cls.run_peers()
        wait_for(lambda: all(map(listens, cls.ports.values())), f"{cls.__name__} listens", 20)
        secret = {"token_url": f"http://127.0.0.1:{cls.ports['token_port']}/token", "client_id": "cat"}
        logins = {
            "application": {**secret, "client_secret": "purr", "scope": "mail"},
            "user": {**secret, "refresh_token": "kibble"},
            "expired": {**secret, "client_secret": "hiss"},
        }
        logins = {name: {"username": "kijitora", "oauth2": oauth2} for name, oauth2 in logins.items()}
        logins["password"] = {"username": "kijitora", "password": "right"}
        route = {"port": cls.ports["port"], "starttls": True, "ca_file": at("tls.pem"), "timeout": 30}
        table = {f"{name}.example": {**route, "auth": name} for name in logins}
        cls.server = Server(cls, table, authinfo=logins)

    @classmethod
    def write(cls, name, text):
        """The path of a file with the text, its @names@ replaced."""
        path, values = os.path.join(cls.folder, name), {"folder": cls.folder, "tls": at("tls"), **cls.ports}
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(re.sub(r"@(\w+)@", lambda found: str(values[found[1]]), text))
        return path

    @classmethod
    def start(cls, *command):
        with open(os.path.join(cls.folder, "output"), "ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        cls.addClassCleanup(process.wait)
        cls.addClassCleanup(os.killpg, process.pid, signal.SIGTERM)

    def test_tokens(self):
        for name, status, code, words in (
            ("application", 200, "250", ""),  # the server refuses the first token, and another one is fetched
            ("application", 200, "250", ""),
            ("user", 200, "250", ""),
            ("expired", 503, "454", "AADSTS7000222: the secret has expired"),
            ("password", 503, "454", "no mechanism known here was offered"),
        ):
            with self.subTest(name):
                to = f"mikeneko@{name}.example"
                got, answer = self.server.post([to])
                self.assertEqual((got, outcome(answer)), (status, [(to, code, "DATA" if code == "250" else "AUTH")]))
                self.assertIn(words, " ".join(answer["response"][0]["message"]))
        said = self.server.said()
        for secret in ("purr", "hiss", "kibble", "Bearer", "eyJ"):
            self.assertNotIn(secret, said)


@unittest.skipUnless(
    has_node_packages("smtp-server", "oauth2-mock-server"), "no smtp-server, oauth2-mock-server of npm"
)
class OAuth2AtSmtpServer(OAuth2Peer, unittest.TestCase):
    """XOAUTH2."""

    @classmethod
    def run_peers(cls):
        cls.start("node", cls.write("server.js", OAUTH2_SMTP_SERVER_JS))


DOVECOT_CONF = """\
protocols = submission
listen = 127.0.0.1
base_dir = @folder@/run
state_dir = @folder@/state
log_path = @folder@/log
hostname = dovecot.example
ssl = required
ssl_cert = <@tls@.pem
ssl_key = <@tls@.key
auth_mechanisms = @mechanism@
mail_location = maildir:@folder@/mail
first_valid_uid = 1
passdb {
  driver = oauth2
  mechanisms = xoauth2 oauthbearer
  args = @folder@/introspection.conf
}
userdb {
  driver = static
  args = uid=nobody gid=nogroup home=@folder@/mail
}
submission_relay_host = 127.0.0.1
submission_relay_port = @relay_port@
service submission-login {
  inet_listener submission {
    port = @port@
  }
}
"""
INTROSPECTION_CONF = """\
introspection_mode = auth
introspection_url = http://127.0.0.1:@token_port@/userinfo
username_attribute = email
active_attribute = active
active_value = true
"""


@unittest.skipUnless(has_node_packages("oauth2-mock-server"), "no oauth2-mock-server of npm")
@unittest.skipUnless(
    os.path.exists("/usr/lib/dovecot/submission") and os.getuid() == 0, "no dovecot-submissiond, or not root"
)
class OAuth2AtDovecot(OAuth2Peer, unittest.TestCase):
    """XOAUTH2, the tokens looked up at the provider; the mail goes on to aiosmtpd."""

    MECHANISM = "xoauth2"

    @classmethod
    def run_peers(cls):
        box = Controller(Mailbox(), hostname="127.0.0.1", port=free_port())
        box.start()
        cls.addClassCleanup(box.stop)
        cls.ports.update(relay_port=box.port, mechanism=cls.MECHANISM)
        mail = os.path.join(cls.folder, "mail")
        os.mkdir(mail)
        shutil.chown(mail, "nobody", "nogroup")
        cls.write("introspection.conf", INTROSPECTION_CONF)
        cls.start("node", os.path.join(cls.folder, "token.js"))
        cls.start("dovecot", "-F", "-c", cls.write("dovecot.conf", DOVECOT_CONF))
        cls.ports.pop("mechanism")


class OAuthBearerAtDovecot(OAuth2AtDovecot):
    """OAUTHBEARER."""

    MECHANISM = "oauthbearer"


EXIM_CONF = """\
exim_user = nobody
exim_group = nogroup
deliver_drop_privilege = true
primary_hostname = exim.example
spool_directory = @folder@/spool
log_file_path = @folder@/log/%s
daemon_smtp_ports = @port@
local_interfaces = 127.0.0.1
host_lookup =
rfc1413_hosts =
tls_advertise_hosts = *
tls_certificate = @tls@.pem
tls_privatekey = @folder@/key
auth_advertise_hosts = ${if eq{$tls_in_cipher}{}{}{*}}
smtp_accept_max = 3
smtp_accept_max_per_connection = 5
smtp_accept_queue = 0
smtp_accept_queue_per_connection = 0
acl_smtp_rcpt = rcpt
begin acl
rcpt:
  deny !authenticated = *
  accept local_parts = mikeneko : sabineko
  deny message = User unknown
begin routers
all:
  driver = accept
  transport = maildir
begin transports
maildir:
  driver = appendfile
  directory = @folder@/mail
  maildir_format
begin authenticators
plain:
  driver = plaintext
  public_name = PLAIN
  server_prompts = :
  server_condition = ${if eq{$auth3}{right}}
  server_set_id = $auth2
"""


@unittest.skipUnless(shutil.which("exim4") and os.getuid() == 0, "no exim4 on this machine, or not root")
class Exim(LimitedServer, unittest.TestCase):
    """Three sessions at once, of five mails each."""

    @classmethod
    def command(cls, port):
        key = shutil.copy(at("tls.key"), os.path.join(cls.folder, "key"))
        shutil.chown(key, "nobody")
        path = cls.write("exim.conf", EXIM_CONF, port=port)
        return [shutil.which("exim4"), "-C", path, "-bdf", "-oP", os.path.join(cls.folder, "spool", "pid")]


SMTPD_CONF = """\
table people { "mikeneko@example.jp" = nobody, "sabineko@example.jp" = nobody }
smtp limit max-mails 5
listen on 127.0.0.1 port @port@ hostname opensmtpd.example
action "in" maildir "@folder@/mail" virtual <people>
match from any for domain "example.jp" action "in"
"""


@unittest.skipUnless(shutil.which("smtpctl") and os.getuid() == 0, "no OpenSMTPD on this machine, or not root")
class OpenSmtpd(LimitedServer, unittest.TestCase):
    """Five mails in a session. Its queue is that of the machine: the program knows no other."""

    SECURE, UNKNOWN = False, "524"  # release 6.8 fails to sign by OpenSSL 3

    @classmethod
    def command(cls, port):
        return [shutil.which("smtpd"), "-d", "-f", cls.write("smtpd.conf", SMTPD_CONF, port=port)]


@unittest.skipUnless(shutil.which("nginx"), "no nginx on this machine")
class Nginx(unittest.TestCase):
    """In front of Haineko, as README.md has it."""

    @classmethod
    def setUpClass(cls):
        with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as stream:
            readme = stream.read()
        behind = readme[readme.index("### Behind nginx") :]
        sections = json.loads(re.search(r"^```json settings\n(.*?)^```$", behind, re.MULTILINE | re.DOTALL)[1])
        block = re.search(r"^```nginx\n(.*?)^```$", behind, re.MULTILINE | re.DOTALL)[1]
        discard = {"default": {"mailer": "Discard"}}
        cls.server = Server(cls, discard, **{**sections, "httpd": {**sections["httpd"], "workers": 1}})
        careless = {**sections, "httpd": {"workers": 1}, "relayhosts": {}}
        cls.careless = Server(cls, discard, **careless)
        cls.port, cls.careless_port = cls.front(block, cls.server.port), cls.front(block, cls.careless.port)
        cls.trust = ssl.create_default_context(cafile=at("tls.pem"))

    @classmethod
    def front(cls, block, behind):
        """The port of an nginx in front of that one."""
        port = free_port()
        folder = at(f"nginx{port}")
        os.mkdir(folder)
        block = block.replace("127.0.0.1:2794", f"127.0.0.1:{behind}").replace("listen 443", f"listen 127.0.0.1:{port}")
        block = re.sub(r"(ssl_certificate +)[^;]+", rf"\1{at('tls.pem')}", block)
        block = re.sub(r"(ssl_certificate_key +)[^;]+", rf"\1{at('tls.key')}", block)
        places = "".join(
            f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        with open(os.path.join(folder, "nginx.conf"), "w") as stream:
            stream.write(f"daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;\n")
            stream.write(f"events {{}}\nhttp {{ access_log off; {places}\n{block}\n}}\n")
        process = subprocess.Popen(
            ["nginx", "-e", f"{folder}/error.log", "-p", folder, "-c", f"{folder}/nginx.conf"],
            stderr=subprocess.DEVNULL,
        )
        cls.addClassCleanup(process.wait)
        cls.addClassCleanup(process.terminate)
        wait_for(lambda: listens(port) or process.poll() is not None, "nginx listens")
        return port

    def ask(self, method="POST", path="/submit", port=None, body="Meow.", **more):
        document = {"mail": "a@example.org", "rcpt": ["neko@example.org"], "header": {"subject": "Nyan"}, "body": body}
        octets = json.dumps(document).encode() if method == "POST" else None
        return request(port or self.port, method, path, octets, context=self.trust, **more)

    def test_the_client_is_the_one_that_nginx_saw(self):
        for source, forwarded, status, client in (
            ("127.0.0.1", "192.0.2.9", 200, "192.0.2.9"),  # 127.0.0.1 is trusted: its word counts
            ("127.0.0.1", "198.51.100.1", 403, "198.51.100.1"),
            ("127.0.0.1", "192.0.2.9, 198.51.100.1", 403, "198.51.100.1"),  # from right to left
            ("127.0.0.2", "192.0.2.9", 403, "127.0.0.2"),  # not trusted: what it says of others doesn't count
            ("127.0.0.2", "127.0.0.1", 403, "127.0.0.2"),
            ("127.0.0.1", "nonsense", 400, "127.0.0.1"),
        ):
            with self.subTest(source=source, forwarded=forwarded):
                got, answer = self.ask(source=source, X_Forwarded_For=forwarded)
                self.assertEqual((got, answer["remoteaddr"]), (status, client))

    def test_conf_is_not_for_strangers(self):
        self.assertEqual(self.ask("GET", "/conf", X_Forwarded_For="198.51.100.1")[0], 403)
        self.assertEqual(self.ask("GET", "/health", X_Forwarded_For="198.51.100.1"), (200, {"status": "ok"}))

    def test_without_trusted_proxies_nobody_is_loopback(self):
        for client in ("198.51.100.1", "127.0.0.1"):
            stranger = {"port": self.careless_port, "X_Forwarded_For": client}
            self.assertEqual(self.ask(**stranger)[0], 403)
            self.assertEqual(self.ask("GET", "/conf", **stranger)[0], 403)
        self.assertIn("is not in httpd.trusted_proxies", self.careless.said())

    def test_many_requests_over_kept_connections(self):
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=self.trust)
        document = {
            "mail": "a@example.org",
            "rcpt": ["neko@example.org"],
            "header": {"subject": "Nyan"},
            "body": "Meow.",
        }
        with contextlib.closing(connection):
            for i in range(300):
                document["body"] = "Meow.\n" * (i % 7) * 500 or "Meow."
                connection.request("POST", "/submit", json.dumps(document), {"X-Forwarded-For": "192.0.2.9"})
                response = connection.getresponse()
                self.assertEqual((response.status, json.load(response)["response"][0]["code"]), (200, "200"))

    def test_sizes(self):
        for octets, status in ((4_000_000, 200), (4_300_000, 413), (12_000_000, 413)):
            with self.subTest(octets=octets):
                try:
                    got = self.ask(body=("Meow " * 12 + "\n") * (octets // 61), X_Forwarded_For="192.0.2.9")[0]
                except (BrokenPipeError, ConnectionResetError, ssl.SSLError):  # nginx answers and hangs up
                    got = 413 if octets > 9_000_000 else None
                self.assertEqual(got, status)


CHARSETS = ("UTF-8", "ISO-2022-JP", "ISO-8859-1", "US-ASCII", "Shift_JIS", "EUC-JP", "KOI8-R", "windows-1252", "GB2312")
ALPHABETS = st.one_of(
    st.characters(min_codepoint=32, max_codepoint=126),
    st.sampled_from('"\\<>@,;:=?_ \t().\r\n\0\x1b\x0b\x0c\x1c\x7f\x85\u2028\u3000\ufeff\ud83d\ude00'),
    st.sampled_from("あいう漢字カナｶﾅﾞ①髙～㈱é ÄßЖ猫🐱"),
    st.characters(),
)
TRAPS = '=?UTF-8?B?QQ==?=|a"b\\\\c|a  b| first|last |=?|.|From x|' + "x" * 1100 + "|" + "猫" * 400
TEXT = st.one_of(
    st.text(ALPHABETS, max_size=120),
    st.lists(st.sampled_from(TRAPS.split("|")), min_size=1, max_size=3).map("".join),
)
LONG = st.one_of(TEXT, st.builds(lambda text, n: text * n, TEXT, st.integers(1, 400)))
BAD = set("\r\n\0")  # in a header


def quoted(name):
    return '"' + re.sub(r'(["\\])', r"\\\1", name) + '" <a@example.org>'


# (a header of one mailbox, the display name that is meant; None where there may be a fault)
MAILBOX = st.one_of(
    st.builds(lambda name: (quoted(name), name), TEXT),
    st.builds(lambda name: (f"{name} <a@example.org>", None if set(name) & set('"\\<>@,;:()') else name), TEXT),
    st.builds(lambda text: (text, None), TEXT),
    st.just(("a@example.org", "")),
)
# the same character in the tables of Windows, which Haineko writes, and in those of Python's codec
ALIKE = str.maketrans("〜‖−¢£¬—", "～∥－￠￡￢―")


class Reader(unittest.TestCase):
    """Any strings in any fields: a fault names the field, or the message says exactly what was put in."""

    @settings(
        max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    @given(LONG, MAILBOX, MAILBOX, LONG, st.sampled_from(CHARSETS))
    def test_compose(self, subject, author, replyto, body, charset):
        header = {"subject": subject, "from": author[0], "replyto": replyto[0], "charset": charset}
        raw = {"mail": "sender@example.org", "rcpt": ["neko@example.jp"], "header": header, "body": body}
        submission, faults, _ = haineko.parse_submission(json.dumps(raw).encode())
        if charset == "ISO-2022-JP" and "\x1b" in "".join((subject, author[0], replyto[0], body)):
            return  # such strings may be that encoding itself; they are another test's
        self.faults(faults, header, body, author, replyto)
        if not faults:
            client = haineko.parse_ip("192.0.2.1")
            message = haineko.compose(submission, "0" * 16, client, "haineko.example.org", 1388741758.0)
            octets = message.copy("neko@example.jp", 1)
            self.form(octets)
            self.content(octets, subject, body, author[1], replyto[1])

    def faults(self, faults, header, body, *mailboxes):
        """A fault names its field, and is there only where the field has one."""
        told = {fault.partition(":")[0] for fault in faults}
        must, may = set(), set()
        for name, value in ((f"header.{key}", value) for key, value in header.items()):
            if set(value) & BAD or has_surrogate(value):
                must.add(name)
        if has_surrogate(body):
            must.add("body")
        for name, (_, meant) in zip(("header.from", "header.replyto"), mailboxes):
            if meant is None:
                may.add(name)
        self.assertLessEqual(must, told)
        self.assertLessEqual(told, must | may, faults)

    def form(self, octets):
        octets.decode("ascii")
        self.assertNotIn(b"\0", octets)
        self.assertTrue(octets.endswith(b"\r\n"))
        for line in octets.split(b"\r\n"):
            self.assertLessEqual(len(line), 998)
            self.assertFalse(set(line) & {10, 13})
        head = octets.partition(b"\r\n\r\n")[0].decode()
        names = [line.partition(":")[0] for line in head.split("\r\n") if line[:1] not in (" ", "\t")]
        order = "Received From Sender To Reply-To Subject Date Message-Id X-Haineko-Loop MIME-Version Content-Type"
        order = [*order.split(), "Content-Transfer-Encoding"]
        optional = {name for name in ("Sender", "Reply-To") if name not in names}
        self.assertEqual(names, [name for name in order if name not in optional])
        for line in head.split("\r\n"):
            self.assertTrue(line.strip(), "a line of blanks in the header ends it for some")

    def content(self, octets, subject, body, author, replyto):
        message = email.message_from_bytes(octets, policy=email.policy.default)
        self.assertEqual(alike(header_text(message, "subject")), alike(subject))
        for name, meant in (("from", author), ("reply-to", replyto)):
            if meant is not None:
                self.assertEqual(
                    [(alike(shown), spec) for shown, spec in addresses(message, name)],
                    [(alike(meant.strip()), "a@example.org")],
                )
        body = body.replace("\r\n", "\n").replace("\r", "\n")
        got = decoded(message.get_payload(decode=True), message.get_content_charset()).replace("\r\n", "\n")
        self.assertEqual(alike(got), alike(body if body.endswith("\n") else body + "\n"))


def has_surrogate(text):
    return any("\ud800" <= c <= "\udfff" for c in text)


def alike(text):
    """Text without the differences that a charset of Japanese mail has no room for."""
    import unicodedata

    text = re.sub("[\uff61-\uff9f]+", lambda kana: unicodedata.normalize("NFKC", kana[0]), text)
    return text.replace("\u3099", "゛").replace("\u309a", "゜").translate(ALIKE)


def decoded(octets, charset):
    """ISO-2022-JP as mail readers know it: with the rows that Python's codec lacks."""
    if charset.lower() != "iso-2022-jp":
        return octets.decode(charset)
    return haineko.jis_to_text(octets.decode("ascii"))


def header_text(message, name):
    """An unstructured field, its encoded words decoded by the book (RFC 2047 6.2) and nothing else changed."""
    raw = {key.lower(): value for key, value in message.raw_items()}[name]
    return words(re.sub(r"\r\n(?=[ \t])", "", str(raw)))


def words(text):
    word = r"=\?([^?\s]+)\?([bBqQ])\?([^?\s]*)\?="
    text = re.sub(rf"({word})\s+(?={word})", r"\1", text)

    def one(found):
        import base64
        import quopri

        coded = found[3].encode()
        octets = base64.b64decode(coded) if found[2] in "bB" else quopri.decodestring(coded, header=True)
        return decoded(octets, found[1])

    return re.sub(word, one, text)


def addresses(message, name):
    """[(display name, address)] as email's own parser finds them; names decoded by the book."""
    raw = re.sub(r"\r\n(?=[ \t])", "", str({key.lower(): value for key, value in message.raw_items()}[name]))
    return [(words(shown), spec) for shown, spec in email.utils.getaddresses([raw])]


if __name__ == "__main__":
    unittest.main()
