"""The tests of the relays by HTTP: against local peers that check what the real ones check, and that misbehave."""

from __future__ import annotations

import base64
import email
import email.policy
import hashlib
import hmac
import io
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from dataclasses import replace

import haineko

HAINEKO = os.path.abspath(haineko.__file__)


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


class WebPeer:
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
        if isinstance(said, tuple):
            said = on_the_wire(*said)
        if said == "close":
            return False
        sock.sendall(said)
        return b"connection: close" not in said.lower()

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
    """Settings with that route for everything, settled; the faults as an assertion."""
    faults: list = []
    raw = {
        "smtpd": {"hostname": "here.example"},
        "recipients": {"open-relay": True},
        "authinfo": {"key": {"username": "AKIDEXAMPLE", "password": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"}},
        "mailertable": {"default": route},
        **sections,
    }
    settings = haineko.read(haineko.Settings, raw, "", faults)
    settings, faults = haineko.settled(settings, faults)
    assert not faults, faults
    return settings


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


def composed_job(route: haineko.Route, document: dict | None = None, number: int = 1) -> haineko.Job:
    """The job of a submission's first recipient."""
    submission, faults = haineko.understand(json.dumps(document or web_submission()).encode())
    assert not faults, faults
    client = haineko.plain_address("192.0.2.9")
    message = haineko.compose(submission, "Q" * 16, client, "here.example", 1700000000.0)
    return haineko.Job(route, "here.example", "Q" * 16, submission.mail, (submission.rcpt[0],), message, number)


def raw_job(route: haineko.Route, octets, to=("mikeneko@example.jp",), eight: bool = False) -> haineko.Job:
    octets = octets.encode() if isinstance(octets, str) else octets
    octets = octets.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    return haineko.Job(
        route, "here.example", "Q" * 16, "kijitora@example.org", tuple(to), haineko.Message((octets,), eight)
    )


def relayed(job: haineko.Job, times: int = 1, between=lambda: None) -> list:
    """The replies of each time, by one pool of sessions."""

    async def all_times() -> list:
        sessions, outcomes = haineko.Sessions(), []
        for i in range(times):
            if i:
                between()
            outcomes.append(await haineko.attempt(job, sessions))
        await sessions.sweep(everything=True)
        assert not sessions.web.idle
        return outcomes

    return haineko.run(all_times())


def first_reply(job: haineko.Job) -> haineko.Reply:
    return relayed(job)[0][0]


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


KEY, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


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


PEERS = {"Haineko": as_haineko, "SendGrid": as_sendgrid, "AmazonSES": as_amazonses, "Mandrill": as_mandrill}


class WebRelays(unittest.TestCase):
    """What holds for each of them."""

    def test_a_mail_is_taken_by_a_peer_that_checks_the_request(self):
        for mailer, answer in PEERS.items():
            with self.subTest(mailer), WebPeer(answer) as peer:
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
        ):
            with self.subTest(mailer), WebPeer(PEERS[mailer]) as peer:
                self.assertIn(line, first_reply(composed_job(web_route(mailer, peer.url))).message)

    def test_wrong_credentials(self):
        for mailer, code, dsn in (
            ("Haineko", "535", "5.7.0"),
            ("SendGrid", "550", "5.7.8"),
            ("AmazonSES", "550", "5.7.1"),
            ("Mandrill", "451", "4.3.0"),  # which says 500 to that
        ):
            with self.subTest(mailer), WebPeer(PEERS[mailer]) as peer:
                route = replace(web_route(mailer, peer.url), login=(KEY, "wrong"))
                said = first_reply(composed_job(route))
                self.assertEqual((said.code, said.dsn), (code, dsn), said)
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
                with self.subTest(mailer, what=what), WebPeer(lambda asked, said=(status, body, headers): said) as peer:
                    replies = relayed(composed_job(web_route(mailer, peer.url)), times=2)
                    for (said,) in replies:
                        self.assertEqual((said.code, said.unsure, said.wait), (code, unsure, wait), said)
                        self.assertEqual(len(peer.asked), 2)

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
            with self.subTest(mailer, line=line), WebPeer(lambda asked, said=(status, body, headers): said) as peer:
                said = first_reply(composed_job(web_route(mailer, peer.url)))
                self.assertEqual((said.code, said.dsn[0], said.unsure), (code, code[0], False))
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
            said = haineko.Said(429, "", haineko.http.client.parse_headers(wire), b"")
            with self.subTest(headers):
                self.assertTrue(low <= haineko.retry_after(said) <= high, haineko.retry_after(said))

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
            with self.subTest(what), WebPeer(lambda asked, said=action: said) as peer:
                replies: list = []

                async def one(mailer: str, peer=peer, replies=replies) -> None:
                    job = composed_job(web_route(mailer, peer.url))
                    replies.extend(await haineko.attempt(job, haineko.Sessions()))

                began = time.monotonic()
                haineko.run(haineko.all_of([one(mailer) for mailer in PEERS]))
                self.assertLess(time.monotonic() - began, 2.5)
                self.assertEqual({said.mailer for said in replies}, set(PEERS))
                self.assertEqual([(said.code, said.unsure) for said in replies], [(code, unsure)] * 4, replies)
                self.assertEqual(len(peer.asked), 4)

    def test_nobody_there(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        for mailer in PEERS:
            with self.subTest(mailer):
                said = first_reply(composed_job(web_route(mailer, f"http://127.0.0.1:{port}")))
                self.assertEqual((said.code, said.dsn, said.command, said.unsure), ("451", "4.4.1", "CONN", False))
                self.assertEqual((said.mailer, said.host, said.port), (mailer, "127.0.0.1", port))
                self.assertIn("refused", said.message[1])

    def test_a_peer_that_never_reads(self):
        with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            job = composed_job(web_route("SendGrid", url), web_submission(body="x" * 70 + "\n" + "y" * (12 << 20)))
            began = time.monotonic()
            said = first_reply(job)
        self.assertEqual((said.code, said.unsure, said.dsn), ("451", False, "4.4.2"), said)
        self.assertLess(time.monotonic() - began, 5)

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


def outside_address() -> str:
    """An address of this machine that is not loopback, "" where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))
            found = sock.getsockname()[0]
        except OSError:
            return ""
    return "" if found.startswith(("127.", "0.")) else found


class KeptLines(unittest.TestCase):
    """Connections that are used again."""

    def test_one_connection_serves_many_mails(self):
        for mailer, answer in PEERS.items():
            with self.subTest(mailer), WebPeer(answer) as peer:
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
            with self.subTest(what), WebPeer(lambda asked, wire=wire: wire) as peer:
                replies = relayed(composed_job(web_route("AmazonSES", peer.url)), times=2)
                self.assertEqual([said.code for (said,) in replies], ["250", "250"])
                self.assertEqual([asked.line for asked in peer.asked], lines)

    def test_a_kept_connection_that_was_closed_is_replaced(self):
        with WebPeer(as_mandrill) as peer:
            job = composed_job(web_route("Mandrill", peer.url))

            def hang_up() -> None:
                peer.hang_up()
                wait_for(lambda: not peer.open)

            replies = relayed(job, times=3, between=hang_up)
            self.assertEqual([said.code for (said,) in replies], ["250"] * 3)
            self.assertEqual([asked.line for asked in peer.asked], [1, 2, 3])

    def test_a_kept_connection_is_not_replaced_once_the_request_was_sent(self):
        def answer(asked):
            return as_mandrill(asked) if len(peer.asked) == 1 else "close"

        with WebPeer(answer) as peer:
            (first,), (second,) = relayed(composed_job(web_route("Mandrill", peer.url)), times=2)
            self.assertEqual((first.code, second.code, second.unsure), ("250", "451", True))
            self.assertEqual(len(peer.asked), 2)

    def test_a_kept_connection_that_dies_while_the_request_is_sent_is_replaced_once(self):
        seen = []

        def serve(listener) -> None:
            for number in range(3):
                sock, _ = listener.accept()
                stream = sock.makefile("rb")
                for turn in range(2):
                    head = b"".join(iter(lambda stream=stream: WebPeer._line(stream), b""))
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
            threading.Thread(target=serve, args=(listener,), daemon=True).start()
            route = web_route("Mandrill", f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=5)
            replies = relayed(composed_job(route, web_submission(body="y" * (8 << 20))), times=2)
        self.assertEqual([said.code for (said,) in replies], ["250", "250"], replies)
        self.assertEqual(seen, [0, 1])

    def test_idle_connections_are_closed_and_bounded(self):
        async def story(route, peer) -> None:
            web = haineko.Web()
            call = haineko.Call("GET", "/v3/scopes", headers=haineko.bearer(route))
            await haineko.all_of([web.call(route, call) for _ in range(5)])
            self.assertEqual((peer.lines, len(web.idle[route])), (5, 5))
            web.KEPT = 2
            web.idle.clear()
            await haineko.all_of([web.call(route, call) for _ in range(5)])
            self.assertEqual(len(web.idle[route]), 2)
            for line in web.idle[route]:
                line.until = 0.0
            web.sweep()
            self.assertEqual(web.idle, {})

        with WebPeer(as_sendgrid) as peer:
            haineko.run(story(web_route("SendGrid", peer.url), peer))

    def test_a_server_says_how_long_it_keeps(self):
        def answer(asked):
            return 200, {"MessageId": "1"}, (("Keep-Alive", "timeout=1"),)

        with WebPeer(answer) as peer:
            relayed(composed_job(web_route("AmazonSES", peer.url)), times=2)
            self.assertEqual([asked.line for asked in peer.asked], [1, 2])

    def test_a_slow_cloud_delays_nobody_else(self):
        async def story(slow, quick) -> float:
            sessions, began = haineko.Sessions(), time.monotonic()
            took: list = []

            async def timed(job) -> None:
                await haineko.attempt(job, sessions)
                took.append(time.monotonic() - began)

            await haineko.all_of([timed(slow), *[timed(quick) for _ in range(5)]])
            return sorted(took)[4]

        with WebPeer(lambda asked: "hang") as hanging, WebPeer(as_mandrill) as peer:
            jobs = composed_job(web_route("Mandrill", hanging.url)), composed_job(web_route("Mandrill", peer.url))
            self.assertLess(haineko.run(story(*jobs)), 0.9)

    def test_retries_wait_as_long_as_the_cloud_says(self):
        def answer(asked):
            if len(peer.asked) == 1:
                return 429, {"errors": [{"message": "slow"}]}, (("Retry-After", wait),)
            return as_sendgrid(asked)

        for wait, code, least in (("1", "250", 1.0), ("120", "451", 0.0)):
            with self.subTest(wait), WebPeer(answer) as peer:
                began = time.monotonic()
                route = web_route("SendGrid", peer.url, retry=1, sleep=0)
                outcome = haineko.run(haineko.carry_out(composed_job(route), haineko.Sessions()))
                self.assertEqual(outcome.replies[0].code, code)
                self.assertTrue(least <= time.monotonic() - began < least + 3)


def wait_for(condition, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("waited in vain")
        time.sleep(0.005)


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
            with self.subTest(what), WebPeer(as_amazonses, self.context) as peer:
                route = web_route("AmazonSES", peer.url, timeout=5, **more)
                replies = relayed(composed_job(route), times=2)
                self.assertEqual([(said.code, said.dsn) for (said,) in replies], [(code, dsn)] * 2, replies)
                self.assertEqual([asked.line for asked in peer.asked], [1, 1] if code == "250" else [])

    def test_https_of_a_haineko(self):
        with WebPeer(as_haineko, self.context) as peer:
            route = web_route("Haineko", host="127.0.0.1", port=peer.port, https=1, ca_file=self.certificate, timeout=5)
            self.assertEqual(first_reply(composed_job(route)).code, "250")

    def test_no_tls_there(self):
        with WebPeer(as_haineko) as peer:
            route = web_route("Haineko", host="127.0.0.1", port=peer.port, https=1)
            self.assertEqual(first_reply(composed_job(route))[:3], ("451", "4.7.5", "CONN"))


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
                "mailertable.default.auth: authinfo.empty needs a username and a password",
            ),
            ({"mailer": "AmazonSES", "auth": "half", "region": "eu"}, "authinfo.half needs a username and a password"),
            ({"mailer": "SendGrd", "auth": "key"}, 'did you mean "SendGrid"?'),
        )
        logins = {"key": {"username": "a", "password": "b"}, "empty": {}, "half": {"password": "file"}}
        for route, wanted in cases:
            with self.subTest(route):
                faults: list = []
                raw = {"authinfo": logins, "mailertable": {"default": route}}
                settings = haineko.read(haineko.Settings, raw, "", faults)
                if not faults:
                    _, faults = haineko.settled(settings, faults)
                self.assertIn(wanted, "\n".join(faults))

    def test_values_that_are_refused(self):
        for key, bad in (
            (
                "base_url",
                (
                    "ftp://x",
                    "https://",
                    "https://a b",
                    "http://x:0",
                    "http://x:70000",
                    "http://x/?a",
                    "https://u@x",
                    "x",
                    5,
                ),
            ),
            ("region", ("EU", "eu west", "eu/../", 1)),
            ("https", ("yes", 2)),
        ):
            for value in bad:
                with self.subTest(key, value=value):
                    faults: list = []
                    haineko.read(haineko.Route, {"mailer": "SendGrid", key: value}, "", faults)
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
        self.assertNotIn("geheim", json.dumps(haineko.shown(settings)) + repr(settings.mailertable["default"].url))
        self.assertTrue(haineko.holds_secrets({"authinfo": {"key": {"token": "x"}}}))

    def test_a_password_with_the_word_file_in_it_is_no_file(self):
        logins = {"key": {"username": "AKID", "password": "my profile"}}
        self.assertEqual(haineko.aside_files(web_settings({"mailer": "SendGrid", "auth": "key"}, authinfo=logins)), [])


class FarHaineko(unittest.TestCase):
    """The relay Haineko: what it sends, and what it makes of the answers."""

    def sent(self, job: haineko.Job) -> dict:
        return json.loads(haineko.haineko_call(job).body)

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
        with WebPeer(as_haineko) as peer:
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
            with self.subTest(items), WebPeer(lambda asked, said=(status, body): said) as peer:
                job = raw_job(web_route("Haineko", peer.url), "From: a@b.example\n\nx\n", to=to)
                (replies,) = relayed(job)
                self.assertEqual([(said.code, said.dsn, said.command, said.message[0]) for said in replies], wanted)
                self.assertEqual(
                    {(said.mailer, said.port, said.unsure) for said in replies}, {("Haineko", peer.port, False)}
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
            with self.subTest(what), WebPeer(lambda asked, items=items: (200, {"response": items})) as peer:
                said = first_reply(composed_job(web_route("Haineko", peer.url)))
                self.assertEqual((said.code, said.unsure), ("451", True))
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
            with WebPeer(lambda asked: (200, {"response": [good]})) as peer:
                said = relayed(raw_job(web_route("Haineko", peer.url), "From: a@b.example\n\nx\n", to=to))[0][0]
                self.assertEqual(said.code, code)
        self.assertEqual((said.dsn, said.command, said.message), (None, "DATA", ("a??b?[0m",)))

    def test_a_far_end_that_does_not_know_whether_it_arrived(self):
        item = {
            "rcpt": None,
            "error": 1,
            "code": "421",
            "dsn": "4.4.2",
            "command": "DATA",
            "message": [haineko.REPLIES["unsure"][-1]],
        }
        with WebPeer(lambda asked: (503, {"response": [item]}, (("Retry-After", "60"),))) as peer:
            said = first_reply(composed_job(web_route("Haineko", peer.url, retry=3, sleep=0)))
            self.assertEqual((said.code, said.unsure, said.wait), ("421", True, 60))

    def test_the_loop_of_two_real_ones_stops(self):
        with tempfile.TemporaryDirectory() as folder, two_in_a_loop(folder) as ports:
            document = web_submission(rcpt=["mikeneko@example.jp"])
            status, said = submitted(ports[0], document)
            self.assertEqual(status, 503)
            (item,) = said["response"]
            self.assertEqual((item["code"], item["dsn"], item["command"]), ("421", "5.4.6", "CONN"))
            self.assertEqual(item["message"], ["Detected message loop"])
            self.assertEqual((item["mailer"], item["port"]), ("Haineko", ports[1]))
            document["rcpt"] = ["mikeneko@end.example"]  # which the second one prints
            status, said = submitted(ports[0], document)
            self.assertEqual(
                (status, said["response"][0]["code"], said["response"][0]["mailer"]), (200, "200", "Haineko")
            )
            (saved,) = os.listdir(os.path.join(folder, "out"))
            with open(os.path.join(folder, "out", saved), "rb") as stream:
                message = email.message_from_binary_file(stream, policy=email.policy.default)
            self.assertEqual(message["Subject"], "謹賀新年")
            self.assertEqual(message.get_content().replace("\r\n", "\n"), "にゃあ\nNyaa\n")
            self.assertEqual(str(message["From"]), "キジトラ <kijitora@example.com>")
            self.assertEqual(message["X-Haineko-Loop"], "one.example, two.example")


class two_in_a_loop:  # noqa: N801
    """Two processes of `serve` that relay to each other by HTTP with a login; the second saves mail for end.example."""

    def __init__(self, folder: str) -> None:
        self.folder, self.running = folder, []

    def __enter__(self) -> list:
        os.mkdir(os.path.join(self.folder, "out"))
        listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        ports = [listener.getsockname()[1] for listener in listeners]
        for listener in listeners:
            listener.close()
        hashed = subprocess.run(
            [sys.executable, HAINEKO, "pw", "-u", "cat"], input=b"nyaa\n", capture_output=True, check=True
        )
        users = json.loads(b"{" + hashed.stdout + b"}")
        for i, name in enumerate(("one.example", "two.example")):
            route = {"mailer": "Haineko", "host": "127.0.0.1", "port": ports[1 - i], "auth": "other", "timeout": 10}
            table = {"default": route, **({"end.example": {"mailer": os.path.join(self.folder, "out")}} if i else {})}
            document = {
                "httpd": {"listen": f"127.0.0.1:{ports[i]}", "workers": 1},
                "smtpd": {"hostname": name},
                "recipients": {"open-relay": 1},
                "mailertable": table,
                "authinfo": {"other": {"username": "cat", "password": "nyaa"}},
                "password": users,
            }
            path = os.path.join(self.folder, f"{name}.json")
            with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="utf-8") as stream:
                json.dump(document, stream)
            words = [sys.executable, HAINEKO, "serve", "-c", path]
            self.running.append(subprocess.Popen(words, stderr=subprocess.PIPE))
            self.running[-1].stderr.readline()
        return ports

    def __exit__(self, *_) -> None:
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.communicate(timeout=20)


def submitted(port: int, document: dict) -> tuple:
    """(HTTP status, document) of a submission to a running Haineko."""
    connection = haineko.http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {"Authorization": "Basic " + base64.b64encode(b"cat:nyaa").decode()}
    connection.request("POST", "/submit", json.dumps(document).encode(), headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, json.loads(body)


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
        return json.loads(haineko.sendgrid_body(raw_job(web_route("SendGrid"), octets, to)))

    def test_plain_text(self):
        job = composed_job(
            web_route("SendGrid"),
            web_submission(header={"x-haineko-loop": ["far.example"], "charset": "ISO-2022-JP"}, body="①ｱ\nにゃあ\n"),
        )
        document = json.loads(haineko.sendgrid_body(job))
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
        text = "From: a@b.example\nTo: mikeneko@example.jp\nSubject: x\n"
        one = ("mikeneko@example.jp",)
        cases = (
            ("several authors", text.replace("From: ", "From: z@b.example, "), one, "From has several addresses"),
            ("no author", text.replace("From: a@b.example\n", ""), one, "From"),
            ("no subject", text.replace("Subject: x", "Subject:"), one, "subject is empty"),
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
                "To has none of the recipients",
            ),
            ("a signature", text + "DKIM-Signature: v=1\n", one, "dkim-signature can't be set"),
            ("a header twice", text + "X-A: 1\nx-a: 2\n", one, "x-a stands more than once"),
            ("a header of octets", (text + "X-A: é\n").encode(), one, "x-a is not ASCII"),
            ("unknown charset", text + "Content-Type: text/plain; charset=klingon\n\nx\n", one, "klingon"),
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
                "an attachment has no name",
            ),
            (
                "an empty attachment",
                text
                + "Content-Type: multipart/mixed; boundary=m\n\n--m\n\na\n--m\n"
                + "Content-Disposition: attachment; filename=a.txt\n\n--m--\n",
                one,
                "the attachment a.txt is empty",
            ),
            ("an empty text", text + "\n", one, "a text is empty"),
        )
        for what, written, to, words in cases:
            with self.subTest(what), WebPeer(as_sendgrid) as peer:
                octets = written if isinstance(written, bytes) else written.encode()
                octets += b"" if b"\n\n" in octets else b"\nx\n"
                said = first_reply(raw_job(web_route("SendGrid", peer.url), octets, to))
                self.assertEqual(
                    (said.code, said.dsn, said.message[0]),
                    ("550", "5.6.3", "The API can't express this message"),
                )
                self.assertIn(words, said.message[1])
                self.assertEqual(peer.asked, [])

    def test_only_202_is_success(self):
        for status in (200, 201, 204):
            with self.subTest(status), WebPeer(lambda asked, status=status: (status, {}, ())) as peer:
                self.assertEqual(first_reply(composed_job(web_route("SendGrid", peer.url))).code, "451")


class AmazonSignature(unittest.TestCase):
    def test_session_token(self):
        with WebPeer(as_amazonses) as peer:
            route = replace(web_route("AmazonSES", peer.url), token="AQoDYXdzEJr//token=")
            self.assertEqual(first_reply(composed_job(route)).code, "250")
            self.assertEqual(peer.asked[0].headers["x-amz-security-token"], "AQoDYXdzEJr//token=")

    def test_a_path_before_the_api(self):
        def answer(asked):
            right = sigv4_is_right(asked, KEY, SECRET, "eu-west-1") and asked.path == "/front/v2/email/outbound-emails"
            return (200, {"MessageId": "1"}) if right else (403, {"message": "no"})

        with WebPeer(answer) as peer:
            self.assertEqual(first_reply(composed_job(web_route("AmazonSES", peer.url + "/front"))).code, "250")

    def test_the_message_goes_as_it_is(self):
        with WebPeer(as_amazonses) as peer:
            job = composed_job(web_route("AmazonSES", peer.url))
            relayed(job)
            document = peer.asked[0].json()
            self.assertEqual(base64.b64decode(document["Content"]["Raw"]["Data"]), job.octets())
            self.assertEqual(document["Destination"], {"ToAddresses": ["mikeneko@example.jp"]})
            self.assertEqual(document["FeedbackForwardingEmailAddress"], "kijitora@example.org")

    def test_octets_over_127_are_encoded(self):
        with WebPeer(as_amazonses) as peer:
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

        with WebPeer(answer) as peer:
            to = [f"cat{i}@example.jp" for i in range(120)]
            (replies,) = relayed(raw_job(web_route("AmazonSES", peer.url), "From: a@b.example\n\nx\n", to))
            self.assertEqual([said.code for said in replies], ["250"] * 50 + ["451"] * 50 + ["250"] * 20)
            self.assertEqual([len(asked.json()["Destination"]["ToAddresses"]) for asked in peer.asked], [50, 50, 20])


class MandrillReplies(unittest.TestCase):
    def test_each_recipient_has_its_own(self):
        with WebPeer(as_mandrill) as peer:
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
        with WebPeer(lambda asked: (200, [{"email": "a@x.example", "status": "sent", "_id": "1"}, 5, {}])) as peer:
            job = raw_job(web_route("Mandrill", peer.url), "From: a@b.example\n\nx\n", ("a@x.example", "b@x.example"))
            (replies,) = relayed(job)
            self.assertEqual([(said.code, said.unsure) for said in replies], [("250", False), ("451", True)])


class WebProbes(unittest.TestCase):
    """Their rows of PROBES."""

    def findings(self, route: haineko.Route) -> list:
        probe = haineko.Probe(route, "here.example")
        return haineko.run(haineko.PROBES[route.mailer](probe, haineko.Sessions()))

    def test_good_credentials(self):
        for mailer, words in (
            ("Haineko", "a Haineko that takes our login"),
            ("SendGrid", "the API key may send"),
            ("AmazonSES", "to verified recipients only"),
            ("Mandrill", "the key is good"),
        ):
            with self.subTest(mailer), WebPeer(PEERS[mailer]) as peer:
                findings = self.findings(web_route(mailer, peer.url))
                self.assertEqual([item.step for item in findings], ["DNS", "TCP", "TLS", "AUTH"])
                self.assertTrue(all(item.fine and item.words.isprintable() for item in findings), findings)
                self.assertIn(words, findings[-1].words)
                self.assertFalse(any(b"rcpt" in asked.body or b"raw" in asked.body for asked in peer.asked))

    def test_wrong_credentials_and_other_servers(self):
        for mailer, answer in PEERS.items():
            for what, peer_answer in (
                ("wrong", answer),
                ("a page", lambda asked: (200, b"<html>")),
                ("other JSON", lambda asked: (200, {"scopes": ["alerts.read"], "SendingEnabled": False})),
                ("silence", lambda asked: "close"),
            ):
                with self.subTest(mailer, what=what), WebPeer(peer_answer) as peer:
                    route = replace(web_route(mailer, peer.url), login=(KEY, "wrong" if what == "wrong" else SECRET))
                    findings = self.findings(route)
                    self.assertEqual([(item.step, item.fine) for item in findings][-1], ("AUTH", False))
                    self.assertNotIn("wrong", findings[-1].words)

    def test_a_key_that_may_only_send(self):
        said = {"message": "User is not authorized"}
        refusal = 403, said, (("x-amzn-ErrorType", "AccessDeniedException"),)
        with WebPeer(lambda asked: refusal) as peer:
            self.assertTrue(self.findings(web_route("AmazonSES", peer.url))[-1].fine)

    def test_nobody_there(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for mailer in PEERS:
            with self.subTest(mailer):
                findings = self.findings(web_route(mailer, url))
                self.assertEqual([(item.step, item.fine) for item in findings], [("DNS", True), ("TCP", False)])


class WholeWay(unittest.TestCase):
    def test_submit_by_each(self):
        for mailer, answer in PEERS.items():
            with self.subTest(mailer), WebPeer(answer) as peer:
                raw = {"mailer": mailer, "base_url": peer.url, "auth": "key", "timeout": 2}
                service = haineko.Service(
                    web_settings({**raw, **({"region": "eu-west-1"} if mailer == "AmazonSES" else {})})
                )
                client = haineko.plain_address("127.0.0.1")
                body = json.dumps(web_submission(rcpt=["mikeneko@example.jp", "tama@example.jp"])).encode()
                request = haineko.Request("POST", "/submit", {}, body, client, client, 5, 1700000000.0)
                answer_ = haineko.run(haineko.submit(request, service))
                document = json.loads(answer_.body)
                self.assertEqual(answer_.status, 200, document)
                self.assertEqual([item["mailer"] for item in document["response"]], [mailer] * 2)
                self.assertEqual(len(peer.asked), 2)
                self.assertNotIn(SECRET, answer_.body.decode())


if __name__ == "__main__":
    unittest.main()
