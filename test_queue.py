"""Tests of the queue: functions of values by tables, the store on real files, real servers with peers that fail."""

from __future__ import annotations

import base64
import email
import email.policy
import hashlib
import hmac
import http.client
import http.server
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import haineko

HERE = os.path.dirname(os.path.abspath(haineko.__file__))
PROGRAM = os.path.join(HERE, "haineko.py")
SECRET = b"0123456789abcdef0123456789abcdef"
WHSEC = "whsec_" + base64.b64encode(SECRET).decode()


def until(condition, seconds=10.0, what="it"):
    """What the condition gives once it is true; fails at the deadline."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen in {seconds} s")


class MailPeer:
    """A threaded SMTP peer. `script(recipient, count)` gives the reply to the end of the text for the count-th try of a
    recipient; "hangup" closes before it, "lost" takes the mail and closes without a word, an Event is waited for."""

    def __init__(self, script=lambda recipient, count: "250 2.0.0 Ok"):
        self.script, self.mails, self.tries, self.lost = script, [], {}, []
        self.lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        with sock, sock.makefile("rb") as lines:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                self._converse(sock, lines)
            except OSError:
                pass

    def _converse(self, sock, lines):
        sender = recipient = ""

        def say(words):
            sock.sendall(words.encode() + b"\r\n")

        say("220 peer")
        for line in lines:
            verb = line[:4].upper()
            if verb == b"EHLO":
                say("250-peer\r\n250 PIPELINING")
            elif verb == b"MAIL":
                sender = re.search(rb"<(.*?)>", line)[1].decode()
                say("250 ok")
            elif verb == b"RCPT":
                recipient = re.search(rb"<(.*?)>", line)[1].decode()
                say("550 5.1.1 no such cat" if recipient.startswith("never") else "250 ok")
            elif verb == b"DATA":
                if recipient.startswith("never"):
                    say("554 5.5.1 no recipient")
                    continue
                say("354 go on")
                text = b""
                for text_line in lines:
                    if text_line == b".\r\n":
                        break
                    text += text_line
                else:
                    return
                with self.lock:
                    self.tries[recipient] = count = self.tries.get(recipient, 0) + 1
                words = self.script(recipient, count)
                if not isinstance(words, str):
                    words.wait(20)
                    words = "250 2.0.0 Ok at last"
                if words == "hangup":
                    return
                if words == "lost" or words[0] == "2":
                    with self.lock:
                        self.mails.append((sender, recipient, text))
                        if words == "lost":
                            self.lost.append(recipient)
                            return
                say(words)
            else:
                say("221 bye" if verb == b"QUIT" else "250 ok")
                if verb == b"QUIT":
                    return

    def to(self, recipient):
        with self.lock:
            return [mail for mail in self.mails if mail[1] == recipient]

    def close(self):
        self.listener.close()


def by_name(recipient, count):
    """later3@... is refused for now three times; slow@... is left to wait."""
    found = re.match(r"later(\d+)", recipient)
    return f"451 4.2.0 not now, {count}" if found and count <= int(found[1]) else "250 2.0.0 Ok"


class HookPeer:
    """A webhook; the first request of each path with "fail" in it gets a 500."""

    def __init__(self):
        self.events, hook = [], self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.events.append((dict(self.headers.items()), body))
                self.send_response(500 if len(hook.events) == 1 else 204)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?cat=1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Served:
    """A running `haineko.py serve` with a queue, its settings, log and clients."""

    def __init__(self, port, queue=None, workers=2, limit=None, **sections):
        self.folder = tempfile.mkdtemp(prefix="haineko.")
        self.log_path, self.config = os.path.join(self.folder, "log"), os.path.join(self.folder, "haineko.json")
        policy = {"path": "haineko.db", "retry_after": [1], "min_free": 0, **(queue or {})}
        settings = {
            "smtpd": {"hostname": "mx.example.org", "max_rcpts_per_message": 0},
            "recipients": {"open-relay": 1},
            "mailertable": {"default": {"port": port, "timeout": 10}, "dead.example": {"port": 1}},
            **({"queue": policy} if queue is not False else {}),
            **sections,
        }
        self.db = os.path.join(self.folder, "haineko.db")
        with open(os.open(self.config, os.O_WRONLY | os.O_CREAT, 0o600), "w") as stream:
            json.dump(settings, stream)
        self.workers, self.limit = workers, limit
        self.start()

    def start(self):
        words = [sys.executable, PROGRAM, "serve", "-c", self.config, "--listen", "127.0.0.1:0"]
        before = len(self.log())
        with open(self.log_path, "a") as stream:
            self.process = subprocess.Popen(
                [*words, "--workers", str(self.workers)],
                stderr=stream,
                preexec_fn=self.limit,
                start_new_session=True,
            )
        pattern = re.compile(r"listens at http://127.0.0.1:(\d+)/")
        found = until(lambda: pattern.search(self.log()[before:]) or self.process.poll() is not None, what="start")
        if found is True:
            raise AssertionError(self.log())
        self.port = int(found[1])

    def log(self):
        try:
            with open(self.log_path, encoding="utf-8") as stream:
                return stream.read()
        except FileNotFoundError:
            return ""

    def children(self):
        """{pid: whether it is the queue process}: that one has no listening socket."""
        pids = subprocess.run(
            ["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False
        ).stdout.split()
        return [int(pid) for pid in pids]

    def request(self, method, path, body=None, headers=None, timeout=20):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            octets = response.read()
            return response.status, dict(response.getheaders()), octets
        finally:
            connection.close()

    def post(self, *recipients, body="Nyaa", headers=None, sender="kijitora@example.org", **more):
        document = {"mail": sender, "rcpt": list(recipients), "header": {"subject": "cats"}, "body": body, **more}
        status, fields, octets = self.request("POST", "/submit", json.dumps(document), headers)
        return status, fields, json.loads(octets)

    def get(self, path):
        status, _, octets = self.request("GET", path)
        return status, json.loads(octets)

    def fate(self, queueid):
        status, document = self.get(f"/queue/{queueid}")
        return {item["rcpt"]: item for item in document["response"]} if status == 200 else {}

    def command(self, *words):
        return subprocess.run(
            [sys.executable, PROGRAM, "queue", *words, "-c", self.config],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    def idle(self):
        return self.get("/queue")[1]["waiting"] == self.get("/queue")[1]["sending"] == 0

    def kill(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def close(self):
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def entry(queueid="Q" * 16, to=("a@example.jp",), lane="ESMTP x:25", born=None, **more):
    rows = tuple((rcpt, rcpt, number, lane) for number, rcpt in enumerate(to, 1))
    message = haineko.Message((b"Subject: x\r\nTo: ", b"\r\nMessage-Id: <Q.", b"@x>\r\n\r\nNyaa\r\n"))
    return haineko.Entry(queueid, "mail", "s@example.org", "", born or time.time(), message, rows, **more)


class QueuePure(unittest.TestCase):
    """What follows from a reply, bounces, events: values in, values out."""

    policy = haineko.Queue(path="x", lifetime=1000, retry_after=(10, 20, 40))

    def test_next_step(self):
        ok, later, never = (haineko.Reply(code, None, "DATA", ("x",)) for code in ("250", "451", "550"))
        wait = later._replace(wait=300)
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
        )
        for what, said, attempts, age, dice, state, pause in table:
            with self.subTest(what):
                step = haineko.next_step(said, attempts, age, dice, self.policy)
                self.assertEqual((step.state, round(step.pause, 6)), (state, pause))

    def test_default_pauses(self):
        policy = haineko.Queue()
        later = haineko.Reply("421", None, "CONN", ("x",))
        pauses = [haineko.next_step(later, n, 0, 0.5, policy).pause / 60 for n in range(1, 10)]
        self.assertEqual(pauses, [1, 5, 15, 30, 60, 120, 240, 240, 240])

    def parcel(self, **more):
        message = haineko.Message(
            ("Subject: ねこ\r\nTo: ".encode(), b"\r\nMessage-Id: <Q.", b"@x>\r\n\r\nNyaa\r\n"), True
        )
        values = {"id": 1, "queueid": "Q" * 16, "kind": "mail", "sender": "s@example.org", "login": "", "born": 1e9}
        values.update(message=message, given="A@example.jp", recipient="A@example.jp", number=1, lane="x", attempts=2)
        return haineko.Parcel(**{**values, "history": (), **more})

    def test_bounce(self):
        said = haineko.Reply(
            "550", "5.1.1", "RCPT", ("5.1.1 no such cat", "ねこ\r\nEvil: x"), "ESMTP", "mx.example.jp", 25
        )
        octets = haineko.bounce(self.parcel(), said, "mx.example.org", "B" * 16, 1e9 + 7200).copy("", 1)
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

    def test_reports(self):
        settings = haineko.Settings(queue=haineko.Queue(path="x", webhook="http://h/"))
        said = haineko.Reply("451", "4.0.0", "DATA", ("x",))
        table = (
            ("delivered", self.parcel(), "delivered", ["message.delivered"]),
            ("first delay", self.parcel(attempts=0), "open", ["message.deferred"]),
            ("second delay", self.parcel(attempts=1), "open", []),
            ("failed", self.parcel(), "failed", ["message.failed", "bounce"]),
            ("a bounce failed", self.parcel(sender=""), "failed", ["message.failed"]),
            ("an event failed", self.parcel(kind="event", sender=""), "failed", []),
        )
        for what, parcel, state, wanted in table:
            with self.subTest(what):
                found = haineko.reports(parcel, said, haineko.Step(state), settings, 1e9)
                kinds = [json.loads(e.message.parts[0])["type"] if e.kind == "event" else "bounce" for e in found]
                self.assertEqual(kinds, wanted)

    def test_history_is_bounded(self):
        history, long = "[]", haineko.Reply("451", None, "DATA", ("x" * 5000,) * 100)
        for n in range(70):
            history = haineko.add_attempt(history, n, long)
        found = haineko.attempts_of(history)
        self.assertEqual((len(found), found[0][0], found[-1][0]), (haineko.HISTORY, 0, 69))
        self.assertLess(len(history), haineko.HISTORY * haineko.MAX_WORDS * 600)

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
                ("short secret", {"path": "q.db", "webhook_secret": "whsec_AAAA"}, "webhook_secret"),
                ("no pauses", {"path": "q.db", "retry_after": []}, "retry_after"),
                ("all", {"path": "q.db", "webhook": "https://example.org/x", "webhook_secret": WHSEC}, None),
            )
            path = os.path.join(folder, "haineko.json")
            for what, section, wanted in table:
                with self.subTest(what):
                    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
                        json.dump({"queue": section}, stream)
                    settings, faults = haineko.load(path)
                    self.assertEqual(bool(faults), wanted is not None, faults)
                    self.assertIn(wanted or "", " ".join(faults))
                    self.assertNotIn("MDEy", json.dumps(haineko.shown(settings)))
            os.chmod(path, 0o644)
            self.assertIn("can be read by everybody", " ".join(haineko.load(path)[1]))


class QueueStore(unittest.TestCase):
    """The file."""

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="haineko.")
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.policy = haineko.Queue(path=os.path.join(self.folder, "q.db"), min_free=0)
        self.store = self.open()

    def open(self):
        store = haineko.Store(self.policy)
        store.BUSY = 0.1
        self.addCleanup(store.close, True)
        return store

    def do(self, operation, *values):
        (result,) = self.store.commit([(operation, values)])
        if isinstance(result, Exception):
            raise result
        return result

    def test_only_the_owner_reads_it(self):
        self.do(haineko.put, entry(), None)
        for name in os.listdir(self.folder):
            self.assertEqual(os.stat(os.path.join(self.folder, name)).st_mode & 0o077, 0, name)

    def test_durable_settings(self):
        self.do(haineko.census, 0)
        self.assertEqual(self.store.db.execute("PRAGMA journal_mode").fetchone()[0], "wal")
        self.assertEqual(self.store.db.execute("PRAGMA synchronous").fetchone()[0], 2)

    def test_take_by_lane(self):
        now = time.time()
        for n in range(6):
            self.do(haineko.put, entry(f"slow{n}", lane="slow"), None)
        self.do(haineko.put, entry("fast", lane="fast"), None)
        self.do(haineko.put, entry("later", lane="fast", born=now + 100), None)
        table = (
            ("two of each lane at most", {}, {}, ["fast", "slow0", "slow1"]),
            ("less those under way", {"slow": 1, "fast": 2}, {}, ["slow2"]),
            ("none of a lane that sleeps", {}, {"slow": now + 50}, []),
        )
        for what, busy, asleep, wanted in table:
            with self.subTest(what):
                found = self.do(haineko.take, time.time(), 2, busy, asleep, 0)
                self.assertEqual([parcel.queueid for parcel in found], wanted)
                self.assertTrue(all(parcel.message == entry().message for parcel in found))
        with self.subTest("what is wanted at once goes where its lane sleeps, too"):
            self.assertEqual(self.do(haineko.hurry, "slow3"), 1)
            found = self.do(haineko.take, time.time(), 2, {}, {"slow": now + 50}, 0)
            self.assertEqual([parcel.queueid for parcel in found], ["slow3"])
        with self.subTest("and what is at the end of its life"):
            found = self.do(haineko.take, time.time(), 2, {}, {"slow": now + 50}, time.time() + 1)
            self.assertEqual([parcel.queueid for parcel in found], ["slow4", "slow5"])

    def test_the_next_one_is_found_in_constant_time(self):
        for sql in (haineko.DUE, haineko.OVERDUE):
            self.do(haineko.census, 0)
            plan = str([row[-1] for row in self.store.db.execute("EXPLAIN QUERY PLAN " + sql, ("x", 0, 1))])
            self.assertIn("USING", plan)
            self.assertNotIn("SCAN", plan)
            self.assertNotIn("TEMP", plan)

    def test_leases_of_the_dead(self):
        self.do(haineko.put, entry(to=("a@example.jp", "b@example.jp")), None, True)
        self.assertEqual(self.do(haineko.take, time.time(), 9, {}, {}, 0), [])
        code = (
            f"import haineko, time; s = haineko.Store(haineko.Queue(path={self.policy.path!r}, min_free=0));"
            "s.commit([(haineko.recover, (s.locks, s.policy, time.time()))]);"
            "s.commit([(haineko.recover, (s.locks, s.policy, time.time()))]);"
            "print(s.slot, len(s.commit([(haineko.take, (time.time() + 999, 9, {}, {}, 0))])[0]))"
        )

        def other():
            words = [sys.executable, "-c", code]
            return subprocess.run(words, capture_output=True, text=True, cwd=HERE, timeout=20, check=False)

        self.assertEqual(other().stdout, "2 0\n")  # we live
        self.store.close(for_good=True)
        found = other()
        self.assertEqual(found.stdout, "1 2\n")
        self.assertEqual(found.stderr.count("may arrive twice"), 2)

    def test_versions(self):
        self.do(haineko.put, entry(), None)
        db = self.store.db
        two = (*haineko.VERSIONS, "CREATE TABLE cats (name TEXT); INSERT INTO cats VALUES ('tama')")
        with self.subTest("a step that fails changes nothing"):
            with self.assertRaises(sqlite3.Error):
                haineko.upgrade(db, (*two, "CREATE TABLE dogs (x); CREATE TABLE dogs (x)"))
            db.execute("ROLLBACK")
            self.assertEqual(db.execute("PRAGMA user_version").fetchone(), (1,))
        with self.subTest("an older file is upgraded"):
            haineko.upgrade(db, two)
            self.assertEqual(db.execute("SELECT * FROM cats").fetchall(), [("tama",)])
        with self.subTest("a newer one is refused"):
            self.store.close()
            with self.assertRaises(haineko.Refused):
                self.do(haineko.census, 0)
            self.assertIn("newer version", self.store.fault)

    def test_a_fault_accepts_nothing_and_heals(self):
        table = (("locked", self.lock), ("corrupt", self.spoil), ("taken away", self.take_away))
        for what, hurt in table:
            with self.subTest(what):
                self.do(haineko.census, 0)
                heal = hurt()
                if heal:
                    with self.assertRaises(haineko.Refused) as caught:
                        self.do(haineko.put, entry(what), None)
                    self.assertEqual((caught.exception.reply.status, caught.exception.reply.code), (503, "451"))
                    self.assertTrue(self.store.trouble())
                    heal()
                self.do(haineko.put, entry(what), None)
                self.assertEqual(self.store.trouble(), "")
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
        self.do(haineko.census, 0)
        self.store.close(for_good=True)
        os.chmod(self.folder, 0o555)
        os.chmod(self.policy.path, 0o444)
        code = (
            "import os, sys, fcntl, sqlite3, traceback, haineko, test_queue;"
            "os.getuid() or os.setuid(65534);"
            f"store = haineko.Store(haineko.Queue(path={self.policy.path!r}, min_free=0));"
            "(result,) = store.commit([(haineko.put, (test_queue.entry(), None))]);"
            "sys.exit(0 if isinstance(result, haineko.Refused) else 1)"
        )
        found = subprocess.run(
            [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=20, check=False
        )
        self.assertEqual((found.returncode, found.stderr.count("readonly database")), (0, 1), found.stderr)

    def test_a_bug_costs_its_own_work_only(self):
        def bug(db, slot):
            haineko.put(db, slot, entry("bug"), None)
            raise KeyError("cat")

        results = self.store.commit(
            [(haineko.put, (entry("one"), None)), (bug, ()), (haineko.put, (entry("two"), None))]
        )
        self.assertEqual([results[0], type(results[1]), results[2]], [None, KeyError, None])
        rows = self.store.db.execute("SELECT queueid FROM messages ORDER BY id").fetchall()
        self.assertEqual(rows, [("one",), ("two",)])

    def test_forgotten_after_a_day(self):
        said = haineko.Reply("250", None, "DATA", ("x",))
        self.do(haineko.put, entry(key=b"k"), [(said, haineko.Step("delivered"), [])])
        size = self.store.db.execute("SELECT length(octets), done IS NULL FROM messages").fetchone()
        self.assertEqual(size, (0, 0))
        for hours, left in ((23, 1), (25, 0)):
            self.do(haineko.purge, time.time() + hours * 3600)
            self.assertEqual(self.store.db.execute("SELECT count(*) FROM messages").fetchone(), (left,))
        self.assertEqual(self.store.db.execute("SELECT count(*) FROM recipients").fetchone(), (0,))


class QueueServed(unittest.TestCase):
    """A real server, a peer that fails, a webhook."""

    @classmethod
    def setUpClass(cls):
        cls.gate = threading.Event()
        cls.peer = MailPeer(lambda to, count: cls.gate if to.startswith("slow") and count == 1 else by_name(to, count))
        cls.hook = HookPeer()
        cls.server = Served(cls.peer.port, {"webhook": cls.hook.url, "webhook_secret": WHSEC, "lifetime": 7})
        for _ in range(3):  # their life ends while the other tests run
            cls.server.post("y@dead.example", sender="patient@example.org")

    @classmethod
    def tearDownClass(cls):
        cls.gate.set()
        cls.server.close()
        cls.peer.close()
        cls.hook.close()

    def events(self, queueid):
        found = [json.loads(body) for _, body in self.hook.events[1:]]
        return [item["type"] for item in found if item["data"]["queueid"] == queueid]

    def test_deferred_then_delivered(self):
        status, fields, answer = self.server.post("later2@example.jp")
        queueid, item = answer["queueid"], answer["response"][0]
        self.assertEqual((status, fields["Location"]), (202, f"/queue/{queueid}"))
        self.assertEqual(set(item), {"rcpt", "error", "code", "dsn", "command", "message", "mailer", "host", "port"})
        self.assertEqual((item["error"], item["code"], item["dsn"]), (0, "250", "2.0.0"))
        self.assertEqual((item["command"], item["mailer"]), ("QUEUE", "Queue"))
        self.assertEqual(item["message"], [f"Queued as {queueid}", "4.2.0 not now, 1"])
        waiting = self.server.fate(queueid)["later2@example.jp"]
        self.assertEqual((waiting["state"], len(waiting["attempts"])), ("waiting", 1))
        self.assertGreaterEqual(int(waiting["next"]["unixtime"]), int(answer["timestamp"]["unixtime"]))
        until(lambda: self.server.fate(queueid)["later2@example.jp"]["state"] == "delivered")
        done = self.server.fate(queueid)["later2@example.jp"]
        self.assertEqual([item["code"] for item in done["attempts"]], ["451", "451", "250"])
        self.assertEqual((done["command"], done["next"]), ("DATA", None))
        ((sender, _, text),) = self.peer.to("later2@example.jp")
        self.assertEqual((sender, b"Nyaa" in text), ("kijitora@example.org", True))
        until(lambda: self.events(queueid) == ["message.deferred", "message.delivered"], what="events")

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
                found = self.server.post(*recipients, sender="nobody@example.net")
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
                status, fields, answer = self.server.post(to, **more)
                self.assertEqual((status, fields["Location"]), (202, "/queue/" + answer["queueid"]))
                self.assertEqual(fields.get("Preference-Applied"), "respond-async" if preference else None)
                self.assertEqual(answer["response"][0]["message"], ["Queued as " + answer["queueid"]])
                until(lambda to=to: self.peer.to(to))
                self.assertLess(time.monotonic() - began, 0.9)  # it was rung for, not found by chance

    def test_bounces(self):
        sender = "sender@example.org"
        _, _, answer = self.server.post("never@example.jp", sender=sender, **{"async": True})
        until(lambda: self.peer.to(sender), what="bounce")
        ((null, _, text),) = self.peer.to(sender)
        report = email.message_from_bytes(text, policy=email.policy.default)
        one = list(report.iter_parts())[1].get_payload()[1]
        self.assertEqual((null, one["Final-Recipient"], one["Status"]), ("", "rfc822; never@example.jp", "5.1.1"))
        self.assertEqual(self.server.fate(answer["queueid"])["never@example.jp"]["state"], "failed")
        until(lambda: self.events(answer["queueid"]) == ["message.failed"], what="event")
        with self.subTest("none for a bounce that bounces"):
            self.server.post("never@example.jp", sender="never2@example.jp", **{"async": True})
            until(lambda: re.search("from=<> to=<never2@example.jp>.* failed", self.server.log()), what="its end")
            self.assertNotIn("to=<>", self.server.log())

    def test_zz_end_of_life(self):
        """Those that wait for a dead host are given up when their life ends, with the host's last words."""
        sender = "patient@example.org"
        until(lambda: len(self.peer.to(sender)) == 3, 15, "bounces")
        self.assertIn(b"421 Connection refused", self.peer.to(sender)[0][2])

    def test_webhook_is_signed(self):
        self.server.post("hooked@example.jp", **{"async": True})
        until(lambda: len(self.hook.events) >= 2, what="event")
        for fields, body in self.hook.events:
            fields = {name.lower(): value for name, value in fields.items()}
            signed = f"{fields['webhook-id']}.{fields['webhook-timestamp']}.".encode() + body
            wanted = base64.b64encode(hmac.new(SECRET, signed, hashlib.sha256).digest()).decode()
            self.assertIn("v1," + wanted, fields["webhook-signature"].split(" "))
            self.assertLess(abs(time.time() - int(fields["webhook-timestamp"])), 60)
            document = json.loads(body)
            self.assertEqual(set(document), {"type", "timestamp", "data"})
        with self.subTest("the one that failed is tried again under the same id"):
            first = {name.lower(): value for name, value in self.hook.events[0][0].items()}["webhook-id"]
            ids = [{k.lower(): v for k, v in fields.items()}["webhook-id"] for fields, _ in self.hook.events]
            until(lambda: [e for e in self.hook.events[1:] if first in e[0].values()], what="the second try")
            self.assertGreaterEqual(len(ids), 2)

    def test_idempotency(self):
        post, key = self.server.post, {"Idempotency-Key": '"first"'}
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
        until(lambda: self.peer.to("later1k@example.jp") and self.peer.to("later@example.jp"))
        until(lambda: self.server.fate(first[2]["queueid"])["later1k@example.jp"]["state"] == "delivered")
        with self.subTest("after it was delivered, too"):
            self.assertEqual(post("later1k@example.jp", headers=key)[2], first[2])
            self.assertEqual(len(self.peer.to("later1k@example.jp")), 1)
            self.assertEqual(len(self.peer.to("later@example.jp")), 1)

    def test_who_may_look(self):
        _, _, answer = self.server.post("a@example.jp", **{"async": True})
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
                self.assertEqual(self.server.request(method, path, b"" if method == "POST" else None)[0], status)

    def test_dead_lane_delays_nobody(self):
        for _ in range(30):
            self.server.post("z@dead.example", sender="none@example.org", **{"async": True})
        began = time.monotonic()
        self.server.post("lively@example.jp", **{"async": True})
        until(lambda: self.peer.to("lively@example.jp"))
        self.assertLess(time.monotonic() - began, 1.0)


class QueueAlone(unittest.TestCase):
    """Servers of their own: crashes, faults, logins, commands."""

    def served(self, *values, **more):
        server = Served(*values, **more)
        self.addCleanup(server.close)
        return server

    def peer(self, script=by_name):
        peer = MailPeer(script)
        self.addCleanup(peer.close)
        return peer

    def test_without_the_section(self):
        peer = self.peer()
        server = self.served(peer.port, queue=False, workers=1)
        table = (
            ("temporary", "later1@example.jp", {}, 503),
            ("key", "a@example.jp", {"headers": {"Idempotency-Key": "x"}}, 400),
            ("async", "a@example.jp", {"async": True}, 400),
            ("Prefer may be ignored", "a@example.jp", {"headers": {"Prefer": "respond-async"}}, 200),
        )
        for what, to, more, status in table:
            with self.subTest(what):
                found = server.post(to, **more)
                self.assertEqual(found[0], status)
                if status == 400:
                    self.assertIn('"queue": {"path": "haineko.db"}', found[2]["response"][0]["message"][0])
        self.assertEqual((server.get("/queue")[0], server.get("/queue/" + "x" * 16)[0]), (404, 404))
        self.assertEqual(len(server.children()), 1)
        self.assertEqual(server.command("list").returncode, 2)

    def test_logins(self):
        peer = self.peer()
        hashes = {"tama": "{SSHA}9p2euyteR33mp0TYKjmYhTlIt1ctxuRn", "mike": "{SSHA}9p2euyteR33mp0TYKjmYhTlIt1ctxuRn"}
        server = self.served(peer.port, workers=1, password=hashes, httpd={"trusted_proxies": ["127.0.0.1"]})
        tama, mike = (
            {"Authorization": "Basic " + base64.b64encode(f"{user}:kijitora".encode()).decode()} for user in hashes
        )
        queueid = server.post("later9@example.jp", headers={**tama, "Idempotency-Key": "k"})[2]["queueid"]
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
                self.assertEqual(server.request("GET", path, headers=headers)[0], status)
        with self.subTest("keys of two logins are two keys"):
            self.assertEqual(server.post("b@example.jp", headers={**mike, "Idempotency-Key": "k"})[0], 200)

    def test_crash_in_between(self):
        """A worker dies while the peer has the mail of a request with a key: 409 before, then the queue finishes it."""
        gate = threading.Event()
        self.addCleanup(gate.set)
        peer = self.peer(lambda to, count: gate if count == 1 else "250 2.0.0 Ok")
        server = self.served(peer.port, workers=2)
        key = {"Idempotency-Key": "k"}
        caught = []

        def first():
            try:
                server.post("cut@example.jp", headers=key)
            except (OSError, http.client.HTTPException) as fault:
                caught.append(fault)

        thread = threading.Thread(target=first)
        thread.start()
        until(lambda: peer.tries)
        status, fields, _ = server.post("cut@example.jp", headers=key)
        self.assertEqual((status, "Retry-After" in fields), (409, True))
        for pid in server.children():
            os.kill(pid, signal.SIGKILL)
        thread.join()
        self.assertTrue(caught)

        def again():
            try:
                found = server.post("cut@example.jp", headers=key)
            except (OSError, http.client.HTTPException):
                return None
            return found if found[0] != 409 else None

        status, fields, answer = until(again)
        self.assertEqual((status, fields["Idempotency-Replayed"]), (202, "true"))
        self.assertEqual(answer["response"][0]["command"], "QUEUE")
        until(lambda: peer.to("cut@example.jp"))
        until(server.idle)
        self.assertEqual(len(peer.to("cut@example.jp")), 1)
        self.assertEqual(server.post("cut@example.jp", headers=key)[2], answer)
        self.assertIn("may arrive twice", server.log())

    def test_full_disk(self):
        """The file can't grow: what was answered 202 is in it, all else was 503, and nothing that waits is lost."""
        limit = 400_000
        peer = self.peer()
        server = self.served(
            peer.port,
            {"retry_after": [600]},
            workers=1,
            limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
        )
        taken, statuses = [], set()
        for n in range(12):
            status, _, answer = server.post(f"x{n}@dead.example", body="x" * 70_000)
            statuses.add(status)
            taken += [answer["queueid"]] if status == 202 else []
        self.assertEqual(statuses, {202, 503})
        self.assertEqual(server.post("x@dead.example", body="x" * 70_000, **{"async": True})[0], 503)
        self.assertEqual(server.request("GET", "/health")[0], 503)
        self.assertIn("nothing is accepted into it", server.log())
        self.assertEqual(server.post("direct@example.jp", body="fits")[0], 200)
        server.kill()
        with sqlite3.connect(server.db) as db:
            found = [row[0] for row in db.execute("SELECT queueid FROM messages ORDER BY id")]
        db.close()
        self.assertEqual(found, taken)

    def test_little_room(self):
        peer = self.peer()
        server = self.served(peer.port, {"min_free": 1 << 50}, workers=1)
        self.assertEqual(server.get("/health")[0], 503)
        self.assertEqual(server.post("later1@example.jp")[0], 503)
        self.assertEqual(server.post("a@example.jp", **{"async": True})[0], 503)
        self.assertEqual(server.post("b@example.jp")[0], 200)

    def test_commands(self):
        peer = self.peer()
        server = self.served(peer.port, {"retry_after": [600]}, workers=1)
        one, two, three = (server.post(f"later1{name}@example.jp")[2]["queueid"] for name in "abc")
        table = (
            ("list", ("list",), 0, one),
            ("bare", (), 0, three),
            ("show", ("show", one), 0, '"state": "waiting"'),
            ("show nothing", ("show", "nothing"), 1, ""),
            ("show what", ("show",), 2, ""),
            ("drop", ("drop", two), 0, "1 recipient dropped"),
            ("drop again", ("drop", two), 1, "0 recipients dropped"),
            ("retry", ("retry", one), 0, "1 recipient to be tried at once"),
            ("flush", ("flush",), 0, "to be tried at once"),
            ("unknown", ("pet",), 2, ""),
        )
        for what, words, code, wanted in table:
            with self.subTest(what):
                found = server.command(*words)
                self.assertEqual(found.returncode, code, found.stderr)
                self.assertIn(wanted, found.stdout)
        until(server.idle)
        self.assertEqual(sorted(mail[1] for mail in peer.mails), ["later1a@example.jp", "later1c@example.jp"])
        server.kill()
        self.assertEqual(server.command("retry", "--all").stdout, "0 recipients to be tried at once\n")
        self.assertIn('"dropped"', server.command("show", two).stdout)

    def test_readme(self):
        """What it says of the queue is so."""
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as stream:
            text = stream.read()
        commands = re.findall(r"(?ms)^```sh queue\n(.*?)^```$", text)
        (shown,) = re.findall(r"(?ms)^```json event\n(.*?)^```$", text)
        peer, hook = self.peer(), HookPeer()
        self.addCleanup(hook.close)
        server = self.served(peer.port, {"webhook": hook.url, "webhook_secret": WHSEC}, workers=1)
        document = {"mail": "a@example.org", "rcpt": ["cat@example.jp"], "header": {"subject": "x"}, "body": "Nyaa"}
        with open(os.path.join(server.folder, "mail.json"), "w") as stream:
            json.dump(document, stream)
        answers = []
        for command in [*commands, commands[-1]]:
            command = command.replace("127.0.0.1:2794", f"127.0.0.1:{server.port}")
            found = subprocess.run(
                ["sh", "-eu", "-c", command], cwd=server.folder, capture_output=True, timeout=20, check=False
            )
            answers.append(json.loads(found.stdout))
        self.assertEqual([item["response"][0]["command"] for item in answers], ["QUEUE", "DATA", "DATA"])
        self.assertEqual(answers[1], answers[2])
        until(lambda: hook.events)
        event = json.loads(hook.events[0][1])
        self.assertEqual([set(event), set(event["data"])], [set(json.loads(shown)), set(json.loads(shown)["data"])])

    def test_newer_file(self):
        with tempfile.TemporaryDirectory() as folder:
            db = sqlite3.connect(os.path.join(folder, "haineko.db"))
            db.execute("PRAGMA user_version=99")
            db.close()
            config = os.path.join(folder, "haineko.json")
            with open(config, "w") as stream:
                json.dump({"queue": {"path": "haineko.db"}}, stream)
            words = [sys.executable, PROGRAM, "serve", "-c", config, "--listen", "127.0.0.1:0"]
            found = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
            self.assertEqual(found.returncode, 2)
            self.assertIn("newer version", found.stderr)


class QueueCrash(unittest.TestCase):
    """Load, peers that fail by chance, SIGKILL to a process by chance, again and again; then everything is counted.
    HAINEKO_CRASH_ROUNDS says how often."""

    def setUp(self):
        self.rounds = int(os.environ.get("HAINEKO_CRASH_ROUNDS", "4"))
        self.dice = random.Random(os.environ.get("HAINEKO_CRASH_SEED", "neko"))
        self.peer = MailPeer(self.by_chance)
        self.addCleanup(self.peer.close)
        self.server = Served(self.peer.port, {"lifetime": 100000})
        self.addCleanup(self.server.close)
        self.accepted, self.refused, self.number = set(), set(), 0
        self.lock, self.over = threading.Lock(), False

    def by_chance(self, recipient, count):
        if recipient == "sender@example.org":
            return "250 2.0.0 Ok"
        said = ["250 2.0.0 Ok"] * 14 + ["451 4.2.0 not now"] * 3 + ["554 5.0.0 never", "hangup", "lost"]
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
                    status, _, answer = self.server.post(to, headers=headers, sender="sender@example.org", **more)
                except (OSError, http.client.HTTPException, ValueError):
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
            victims = [*self.server.children(), self.server.process.pid]
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
        until(self.server.idle, 60, "an empty queue")
        self.count()

    def count(self):
        reports = [text for _, to, text in self.peer.mails if to == "sender@example.org"]
        bounced = {re.search(rb"Final-Recipient: rfc822; (\S+)", text)[1].decode() for text in reports}
        arrived: dict = {}
        for _, to, _ in self.peer.mails:
            arrived[to] = arrived.get(to, 0) + 1
        unsure = set(self.peer.lost) | set(re.findall(r"to=<([^>]+)>[^\n]*(?:may|might) arrive", self.server.log()))
        twice = {to for to, count in arrived.items() if count > 1 and to != "sender@example.org"}
        print(
            f"\n{self.rounds} kills: {self.number} mails, {len(self.accepted)} accepted, {len(self.refused)} refused, "
            f"{len(bounced)} bounced, {len(twice)} twice, all of {len(unsure)} that were told as unsure",
            file=sys.stderr,
        )
        self.assertEqual(self.accepted - set(arrived) - bounced, set(), "lost")
        self.assertEqual(twice - unsure, set(), "twice without a word")
        self.assertGreater(len(self.accepted), 2 * self.rounds)


if __name__ == "__main__":
    unittest.main()
