#!/usr/bin/env python3
"""Haineko, an HTTP API into ESMTP: take a mail as JSON, relay it, answer with a reply for every recipient.

    HTTP request -> parse_submission() -> Submission -> compose() -> Message -> resolve_route() per recipient
      -> Transaction per route or recipient -> RELAYS -> Reply per recipient -> HTTP response
                                                 |  deferred, or to be queued
                                                 +-> QueueDB -> QueueManager -> RELAYS -> bounce, webhook

submit() in section 17 runs it. CHECKS apply before the body is read, to the Submission and to the Message.

     1  Replies and transactions   11  HTTP client
     2  JSON into dataclasses      12  Signatures
     3  Settings                   13  OAuth2
     4  Log and metrics            14  SMTP sessions
     5  Submissions                15  Relays
     6  Policy                     16  Queue
     7  Messages                   17  Submission pipeline
     8  Routes                     18  Provider endpoints
     9  Event loop                 19  HTTP server
    10  DNS and connections        20  Commands

Sections 1, 5 to 8 and 15 to 18 are the pipeline; 2 to 4 and 9 to 14 are infrastructure; 19 and 20 are the two entries.

Rules of the file:
  - A section uses only the sections above it; inside a section callers stand above their helpers.
  - Errors of the other side are values (Reply); Rejected carries one up the stack; every recipient has a reply.
  - What is decided later stands in a named field; nothing is read out of a text that people read.
  - Parsing, policy, composing and routing take values and return values; the clock and chance are arguments.
  - Input of clients never gets unchecked into a header, command, log line or path; every regex is linear.
  - Standard library only; nothing is answered 2xx before it is on disk or the next hop has said 250.

To add a relay, write a function and a row of RELAYS (end of section 15); a check: a function, a row of REPLIES (1) and
one of CHECKS (6); a setting: a config_field() in section 3; an endpoint: a function and a row of ENDPOINTS (19); a
command: a function and a row of COMMANDS (20). HouseRules in test_haineko.py wants each of them in README.md.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import bisect
import codecs
import concurrent.futures
import contextlib
import contextvars
import errno
import fcntl
import functools
import gc
import getopt
import getpass
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import math
import mimetypes
import mmap
import os
import py_compile
import random
import re
import resource
import select
import selectors
import signal
import smtplib
import socket
import ssl
import stat
import struct
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import urllib.parse
import weakref
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from email.utils import formatdate, parsedate_to_datetime
from html import unescape
from html.parser import HTMLParser
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
from typing import Any, Callable, NamedTuple

__version__ = "1.0.0"

# ======================================================================================================================
# 1. Replies and transactions
#    The values that pass from section to section, and every reply that Haineko gives in its own name.
# ======================================================================================================================

DEFAULT_DSN = (" RET=FULL", " NOTIFY=FAILURE,DELAY")  # parameters of MAIL and of RCPT (RFC 3461)
LARGE = 65536  # octets; work on more than this takes milliseconds
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
RANDOM_DIGITS = bytes(ord(BASE62[i % 62]) for i in range(256))  # table for bytes.translate(): octet to digit


class Reply(NamedTuple):
    """Reply about one recipient: an SMTP reply, or one of Haineko's own."""

    code: str  # three digits, RFC 5321 4.2
    dsn: str | None  # enhanced status code, RFC 3463; None if there was none
    command: str  # the command that decided: CONN EHLO STARTTLS AUTH MAIL RCPT DATA, QUEUE, DRYRUN or HTTP
    message: tuple  # lines of text without the code
    mailer: str | None = None  # name of the relay; None for a refusal before delivery
    host: str | None = None
    port: int | None = None
    status: int = 0  # HTTP status of a refusal before delivery
    maybe_delivered: bool = False  # the end of the text was sent and no reply came
    retry_after: int = 0  # seconds after which to try again, if the other side named them
    origin: str = "relay"  # source: "relay" (the other side, or our part in talking to it), "policy", "queue"
    from_server: bool = False  # the code and the words are the next hop's own
    before_text: bool = False  # the text of the mail was not sent
    fallback: str | None = None  # relays of the route's list that failed earlier
    route_fault: bool = False  # the route's login or settings are at fault, not the mail, which is tried again
    slug: str = ""  # name in REPLIES of a refusal before delivery
    dialogue: tuple | None = None  # lines of the SMTP dialogue, if the client asked for it

    accepted = property(lambda self: self.code[0] == "2")
    temporary = property(lambda self: self.code[0] == "4" or self.route_fault)  # to be tried again
    relay = property(lambda self: f"{self.mailer}:{self.host}:{self.port}" if self.host else self.mailer)

    @property
    def log_status(self) -> str:
        if self.origin == "policy":
            return "rejected"
        return "sent" if self.accepted else "deferred" if self.temporary else "bounced"


class Rejected(Exception):  # noqa: N818 -- the word that postmasters use
    """Exception that carries a Reply, its one argument, up the call stack."""

    reply = property(lambda self: self.args[0])


class Message(NamedTuple):
    """Finished message (RFC 5322, CRLF); the recipient and the copy's number go between its parts."""

    parts: tuple  # (all of it,) or (up to "To: ", up to "Message-Id: <QUEUEID.", the rest) or (up to "To: ", the rest)
    needs_8bitmime: bool = False  # has octets over 127 (RFC 6152)
    needs_smtputf8: bool = False  # has them in its header (RFC 6531)
    dsn: tuple = DEFAULT_DSN

    def copy(self, recipient: str, number: int) -> bytes:
        if len(self.parts) == 3:
            return b"%b%b%b%d%b" % (self.parts[0], recipient.encode(), self.parts[1], number, self.parts[2])
        return recipient.encode().join(self.parts)


class Transaction(NamedTuple):
    """One message for some recipients by one route."""

    route: Any  # a Route
    hostname: str  # Haineko's name, for EHLO
    queueid: str
    sender: str  # "" is the null sender
    recipients: tuple
    message: Message
    number: int = 1  # of the copy
    dkim: Any = None  # {domain: DkimKey} with which it may be signed
    trace: bool = False  # replies are to have the SMTP dialogue
    signed: dict | None = None  # {"message": task that signs it}, of all transactions with one message

    def octets(self) -> bytes:
        return self.message.copy(self.recipients[0], self.number)


TransactionResult = namedtuple("TransactionResult", "transaction replies ms")  # with a Reply for each recipient


def make_reply(slug: str, *lines: str, word: str = "", **more: Any) -> Reply:
    """Return the reply REPLIES[slug], `word` for its "%s", followed by `lines`; `more`: fields, such as the mailer."""
    status, code, dsn, command, text = REPLIES[slug]
    origin = "queue" if command == "QUEUE" else "policy" if status and not more.get("mailer") else "relay"
    values = {"command": command, "status": status, "origin": origin, **more}
    shown = slug if origin == "policy" else ""
    return Reply(code, dsn, message=(text % word if "%s" in text else text, *lines), slug=shown, **values)


def reply_to_dict(recipient: str | None, reply: Reply) -> dict:
    """Return one recipient's item of the answer; `maybe_delivered` and `dialogue` are present only if there is one."""
    item = {"rcpt": recipient, "error": 0 if reply.accepted else 1}
    item.update([(key, getattr(reply, key)) for key in ("code", "dsn", "command", "message", "mailer", "host", "port")])
    item.update({} if reply.dialogue is None else {"dialogue": reply.dialogue})
    return {**item, "maybe_delivered": True} if reply.maybe_delivered else item


def cache_short(maxsize: int, limit: int = 512) -> Callable:
    """Decorate a function with an LRU cache for short first arguments: clients' long ones would fill the memory."""

    def decorate(function: Callable) -> Callable:
        cached = functools.lru_cache(maxsize)(function)
        return lambda first, *others: (cached if len(first) <= limit else function)(first, *others)

    return decorate


def new_queueid(now: float) -> str:
    """Return 16 letters and digits, unique across processes and restarts; they sort by time."""
    return _base62(int(now)) + os.urandom(10).translate(RANDOM_DIGITS).decode()


@functools.lru_cache(maxsize=2)
def _base62(second: int) -> str:
    return "".join(BASE62[second // 62**place % 62] for place in range(5, -1, -1))


REPLIES = {  # name: (HTTP status of a refusal before delivery, else 0; code, dsn, command, text)
    # HTTP itself
    "method": (405, "421", None, "HTTP", "%s method not supported"),
    "not-found": (404, "421", None, "HTTP", "Not found"),
    "forbidden": (403, "421", None, "HTTP", "Forbidden"),
    "origin": (403, "421", None, "HTTP", "Cross-origin request is not permitted"),
    "bad-request": (400, "421", None, "HTTP", "Bad request"),
    "request-timeout": (408, "421", None, "HTTP", "Request timeout"),
    "length-required": (411, "421", None, "HTTP", "Content-Length required"),
    "body-too-large": (413, "421", None, "HTTP", "Request body is too large"),
    "expectation": (417, "421", None, "HTTP", "Expectation failed"),
    "head-too-large": (431, "421", None, "HTTP", "Request header fields are too large"),
    "key-form": (400, "421", None, "HTTP", "Idempotency-Key is malformed"),
    "key-running": (409, "421", None, "HTTP", "The first request with this Idempotency-Key is still running"),
    "key-reused": (422, "421", None, "HTTP", "Idempotency-Key was used with another body"),
    "no-queue": (400, "421", None, "HTTP", 'No queue here: set "queue": {"path": "haineko.db"} in the settings'),
    "queue-sending": (409, "421", None, "HTTP", "The mail is being sent at this moment"),
    "not-implemented": (501, "421", None, "HTTP", "Transfer-Encoding not implemented"),
    "busy": (503, "421", None, "HTTP", "Too many connections"),
    "content-encoding": (415, "421", None, "HTTP", "Content-Encoding is not supported"),
    "overload": (503, "421", None, "HTTP", "Too many octets in flight"),
    "http-version": (505, "421", None, "HTTP", "HTTP version not supported"),
    # a submission against policy
    "login": (401, "535", "5.7.0", "AUTH", "authentication failed"),
    "client": (403, "500", "5.7.1", "AUTH", "Access denied"),
    "rate": (429, "450", "4.7.1", "AUTH", "Rate limit exceeded"),
    "json": (400, "421", None, "HTTP", "Malformed JSON string"),
    "invalid": (400, "554", "5.6.0", "HTTP", "Invalid submission"),
    "batch": (400, "554", "5.6.0", "HTTP", "Too many mails in one request"),
    "loop": (400, "421", "5.4.6", "CONN", "Detected message loop"),
    "ehlo": (400, "501", "5.0.0", "EHLO", "Invalid domain name"),
    "mail-empty": (400, "501", "5.5.2", "MAIL", 'Syntax error in parameters scanning "FROM"'),
    "mail-form": (400, "553", "5.5.4", "MAIL", "Domain name required for sender address"),
    "sender-policy": (403, "553", "5.7.1", "MAIL", "Sender address is not permitted"),
    "rcpt-none": (400, "553", "5.0.0", "RCPT", "User address required"),
    "rcpt-many": (403, "452", "4.5.3", "RCPT", "Too many recipients"),
    "rcpt-form": (400, "553", "5.1.5", "RCPT", "Recipient address is invalid"),
    "rcpt-policy": (400, "553", "5.7.1", "RCPT", "Recipient address is not permitted"),
    "line-length": (400, "554", "5.6.0", "DATA", "Message has a NUL, or a line longer than 998 octets"),
    "body-empty": (400, "500", "5.6.0", "DATA", "Message body is empty"),
    "too-big": (413, "552", "5.3.4", "DATA", "Message size exceeds fixed maximum message size"),
    "subject-empty": (400, "500", "5.6.0", "DATA", "Subject header is empty"),
    "our-fault": (500, "451", "4.3.0", "HTTP", "Internal Server Error"),
    # delivery
    "mail-ascii": (0, "553", "5.6.7", "MAIL", "non-ASCII address is not permitted"),
    "rcpt-ascii": (0, "553", "5.6.7", "RCPT", "non-ASCII address is not permitted"),
    "header-ascii": (0, "554", "5.6.9", "MAIL", "UTF-8 header, and SMTPUTF8 was not offered"),
    "connect": (0, "421", "4.4.1", "CONN", "Cannot connect SMTP Server"),
    "lost": (0, "421", "4.4.2", "", "Connection to SMTP Server lost"),
    "unsure": (0, "421", "4.4.2", "DATA", "Connection lost after the end of the message, which may have arrived"),
    "rubbish": (0, "421", "4.5.0", "", "SMTP Server broke the protocol"),
    "dns": (0, "451", "4.4.3", "CONN", "DNS gives no answer"),
    "no-domain": (0, "550", "5.1.2", "CONN", "Domain does not exist"),
    "null-mx": (0, "556", "5.1.10", "CONN", "Domain takes no mail"),
    "mx-loop": (0, "554", "5.4.6", "CONN", "Domain names this host as the one to bring its mail to"),
    "no-address": (0, "550", "5.4.4", "CONN", "Host of the domain can't be connected to"),
    "mta-sts": (0, "451", "4.7.5", "STARTTLS", "MTA-STS policy of the domain admits none of its hosts"),
    "no-starttls": (0, "454", "4.7.4", "STARTTLS", "STARTTLS is required, but was not offered"),
    "tls": (0, "421", "4.7.5", "STARTTLS", "TLS handshake failed"),
    "route-limit": (0, "451", "4.3.2", "CONN", "The route's limit is reached"),
    "no-auth": (0, "454", "4.7.0", "AUTH", "AUTH is required, but no mechanism known here was offered"),
    "token": (0, "454", "4.7.0", "AUTH", "No access token"),
    "clear-auth": (0, "454", "4.7.11", "AUTH", "Credentials are not sent over a connection without TLS"),
    "file": (0, "451", "4.3.0", "DATA", "Cannot save the message"),
    "store": (503, "451", "4.3.0", "QUEUE", "Cannot store the mail"),
    "dry-run": (0, "250", "2.0.0", "DRYRUN", "Not sent"),
    "queued": (0, "250", "2.0.0", "QUEUE", "Queued as %s"),
    "interrupted": (0, "421", "4.4.2", "DATA", "The process ended within the delivery; the message may have arrived"),
    "relay-fault": (0, "451", "4.3.0", "DATA", "Internal error of the relay"),
    "web-connect": (0, "451", "4.4.1", "CONN", "Cannot connect to HTTP server"),
    "web-tls": (0, "451", "4.7.5", "CONN", "TLS handshake with HTTP server failed"),
    "web-lost": (0, "451", "4.4.2", "DATA", "Connection to HTTP server lost before the request was sent"),
    "web-unsure": (0, "451", "4.4.2", "DATA", "No answer to a request that was sent; the mail may have arrived"),
    "web-rubbish": (0, "451", "4.5.0", "DATA", "The answer is not what the API promises"),
    "web-accepted": (0, "250", "2.0.0", "DATA", "%s"),
    "web-later": (0, "451", "4.3.0", "DATA", "%s"),
    "web-refused": (0, "550", "5.0.0", "DATA", "%s"),
    "inexpressible": (0, "550", "5.6.3", "DATA", "The API can't express this message"),
    "done": (0, "200", "2.0.0", "DATA", "%s"),
}

# ======================================================================================================================
# 2. JSON into dataclasses
#    A parser(value, json_path, errors) appends what is wrong to `errors`, and may then return None, for the default.
# ======================================================================================================================

MAX_HINTS = 50  # a hint takes some 50 us, and a hostile body has a million keys
MAX_ERRORS = 1000  # or a hostile body could yield 100 times its own size in messages
JSON_TYPES = {bool: "true or false", str: "a string", (int, float): "a number", list: "a list", dict: "an object"}


class JSONObject(dict):
    """JSON object that knows which of its keys were repeated."""

    duplicate_keys: tuple = ()

    def __init__(self, pairs: list) -> None:
        dict.__init__(self, pairs)
        if len(self) < len(pairs):
            self.duplicate_keys = tuple(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)


def parse_json(octets: bytes) -> Any:
    """Return the JSON value (RFC 8259) in UTF-8 octets; ValueError says what is wrong and where."""
    try:
        return DECODER.decode((octets[3:] if octets.startswith(codecs.BOM_UTF8) else octets).decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at octet {error.start}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(object_pairs_hook=JSONObject, parse_constant=_reject_constant)
ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False)


def encode_json(document: Any) -> bytes:
    return ENCODER.encode(document).encode("utf-8", "replace") + b"\n"


def config_field(default: Any, parse: Callable, doc: str = "", key: str = "", secret: str = "") -> Any:
    """Return a dataclass field for from_dict(): default, parser or class, meaning, keys in JSON ("a|b" are aliases),
    and how a secret is read: "line", "text" of several lines, or "later", each time that it is used."""
    parse = functools.partial(from_dict, parse) if isinstance(parse, type) else parse
    metadata = {"parse": parse, "doc": doc, "keys": tuple(key.split("|")) if key else (), "secret": secret}
    values: dict = {"default_factory": dict} if isinstance(default, dict) else {"default": default}
    return field(**values, metadata=metadata)


def from_dict(cls: type, raw: Any, json_path: str, errors: list, hint: Callable | None = None) -> Any:
    """Return a `cls` made from a JSON object; hint(key, known keys) says what an unknown key may mean."""
    if not isinstance(raw, dict):
        errors.append(f"{json_path or 'top level'}: expected an object, got {json_type_name(raw)}")
        return cls()
    known, values, prefix = key_table(cls), {}, json_path and json_path + "."
    errors.extend(f"{prefix}{sanitize(key)}: duplicate key" for key in getattr(raw, "duplicate_keys", ())[:MAX_ERRORS])
    for key, value in raw.items():
        name, parse = known.get(key, ("", None))
        if name and value is not None:
            if name in values:
                errors.append(f"{prefix}{key}: duplicate: an alias of this key is already set")
            values[name] = parse(value, prefix + key, errors)
        elif not name and len(errors) < MAX_ERRORS:
            meant = (hint or did_you_mean)(key, known) if len(errors) < MAX_HINTS else ""
            errors.append(f"{prefix}{sanitize(key)}: unknown key{meant}")
    return cls(**{name: value for name, value in values.items() if value is not None})


@functools.lru_cache(maxsize=None)
def key_table(cls: type) -> dict:
    """Return {key in JSON: (attribute, parser)} of a dataclass made of config_field()."""
    known = [item for item in fields(cls) if "parse" in item.metadata]
    return {key: (item.name, item.metadata["parse"]) for item in known for key in item.metadata["keys"] or (item.name,)}


def json_type_name(value: Any) -> str:
    return next((name for kind, name in JSON_TYPES.items() if isinstance(value, kind)), "null")


def did_you_mean(word: str, words: Any) -> str:
    """Return '; did you mean "..."?' if one of `words` is close, else ""."""
    import difflib

    spelling = {known.lower(): known for known in words}
    close = difflib.get_close_matches(word[:64].lower(), spelling, n=1, cutoff=0.6)
    return f'; did you mean "{spelling[close[0]]}"?' if close else ""


def sanitize(text: str, limit: int = 200, keep: str = "") -> str:
    """Return text fit for a log or a terminal: cut at `limit`, "?" for unprintable characters other than `keep`."""
    text = text if len(text) <= limit else text[:limit] + "..."
    return text if text.isprintable() else "".join(c if c.isprintable() or c in keep else "?" for c in text)


def mask_secrets(text: str, secrets: Any) -> str:
    """Return a text without the secrets, and without parts of 16 characters: servers cut and fold what they repeat."""
    marked = list(text)
    for secret in secrets:
        size = min(len(secret), 16)
        for start in range(len(text) - size + 1):
            if text[start : start + size] in secret:
                marked[start : start + size] = "\0" * size
    return re.sub("\0+", "********", "".join(marked))


def parse_text(value: Any, json_path: str, errors: list) -> str:
    """Parse a string without control characters; "" if it is none."""
    if type(value) is str and value.isprintable():
        return value
    fault = "has an unprintable character" if type(value) is str else f"expected a string, got {json_type_name(value)}"
    errors.append(f"{json_path}: {fault}")
    return ""


def matching(pattern: Any, expected: str, optional: bool = False, secret: bool = False, convert: Any = str) -> Callable:
    """Return a parser of strings that `pattern` accepts, a regex or a function; a `secret` is not shown in errors."""
    accepts = getattr(pattern, "fullmatch", pattern)

    def parse(value: Any, json_path: str, errors: list) -> Any:
        text = parse_text(value, json_path, errors)
        with contextlib.suppress(ValueError):
            if (optional and not text) or accepts(text):
                return convert(text) if text else text
        if text == value:  # else parse_text() has reported it
            errors.append(f"{json_path}: expected {expected}" + ("" if secret else f', got "{sanitize(text)}"'))
        return None

    return parse


def one_of(names: Any, kind: str, or_folder: bool = False) -> Callable:
    """Return a parser of names that compares without case and returns the name as it stands in `names`."""

    def parse(value: Any, json_path: str, errors: list) -> str | None:
        text, known = parse_text(value, json_path, errors), {name.lower(): name for name in names}
        if or_folder and text.startswith("/"):
            return text
        if text == value and text.lower() not in known:
            errors.append(f'{json_path}: unknown {kind} "{sanitize(text)}"{did_you_mean(text, names)}')
        return known.get(text.lower())

    return parse


def parse_boolean(value: Any, json_path: str, errors: list) -> bool | None:
    if value in (0, 1) and not isinstance(value, float):
        return bool(value)
    errors.append(f"{json_path}: expected true or false, got {json_type_name(value)}")
    return None


def integer(low: int, high: int) -> Callable:
    def parse(value: Any, json_path: str, errors: list) -> int | None:
        if type(value) is int and low <= value <= high:
            return value
        got = sanitize(str(value)) if isinstance(value, (int, float)) else json_type_name(value)
        errors.append(f"{json_path}: expected a whole number from {low} to {high}, got {got}")
        return None

    return parse


def list_of(parse: Callable, collect: Callable = tuple, required: bool = False) -> Callable:
    """Return a parser of lists, or of one value for a list of one; `collect` makes the result of the items."""

    def parse_all(value: Any, json_path: str, errors: list) -> Any:
        if type(value) is not list:
            return collect(item for item in (parse(value, json_path, errors),) if item is not None)
        if required and not value:
            errors.append(f"{json_path}: expected at least one value")
        items = (parse(item, f"{json_path}[{i}]", errors) for i, item in enumerate(value) if len(errors) < MAX_ERRORS)
        return collect(item for item in items if item is not None)

    return parse_all


def mapping_of(parse: Callable, fold: Callable = str, expected: str = "a name", collect: Callable = dict) -> Callable:
    """Return a parser of objects whose keys are names; `fold` returns a name's canonical form, or "" for none."""

    def parse_all(value: Any, json_path: str, errors: list) -> Any:
        if not isinstance(value, dict):
            errors.append(f"{json_path}: expected an object, got {json_type_name(value)}")
            return collect({})
        paths = {key: f"{json_path}.{sanitize(key)}" for key in value}
        errors.extend(f"{paths[key]}: duplicate key" for key in getattr(value, "duplicate_keys", ()))
        errors.extend(f"{paths[key]}: expected {expected}" for key in value if not fold(key))
        names = [name for name in map(fold, value) if name]
        if len(set(names)) < len(names):
            errors.append(f"{json_path}: two keys differ in case only")
        parsed = {fold(key): parse(item, paths[key], errors) for key, item in value.items()}
        return collect({key: item for key, item in parsed.items() if item is not None})

    return parse_all


# ======================================================================================================================
# 3. Settings
#    Takes the path of haineko.json, gives one frozen Settings, with all that can be computed once, and its errors.
# ======================================================================================================================

IPAddress = Any  # ipaddress.IPv4Address or IPv6Address
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
DOMAIN = re.compile(rf"(?=.{{1,255}}\Z){_LABEL}(?:\.{_LABEL})*")
_LDH = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"  # letters, digits, hyphens
HOSTNAME = re.compile(rf"(?=.{{1,255}}\Z)(?:{_LDH}\.)*(?=[0-9-]*[A-Za-z]){_LDH}")  # RFC 5321 4.1.2, and no number
LOCALDOMAIN = ".localdomain"
IDNA_DEVIATIONS = "ßς\u200c\u200d"  # IDNA 2003 and 2008 map them to different domains, RFC 5894 7.2
PORT = r"(?:[0-5]?[0-9]{1,4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_SITE = rf"(?P<base>https?://(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::{PORT})?)"
BASE_URL, WEBHOOK_URL = re.compile(_SITE + "(?:/[A-Za-z0-9/._~-]*)?"), re.compile(_SITE + "(?P<path>/[!-~]*)?")
ORIGIN = re.compile(r"https?://[A-Za-z0-9.\[\]:_-]+", re.IGNORECASE)
_FACILITIES = "kern user mail daemon auth syslog lpr news uucp cron"  # RFC 3164 4.1.1
FACILITIES = {**{name: i for i, name in enumerate(_FACILITIES.split())}, **{f"local{i}": 16 + i for i in range(8)}}
RATE = re.compile("[1-9][0-9]{0,8}/[1-9][0-9]{0,6}")
_BASE64 = r"((?:[A-Za-z0-9+/]{4})*[A-Za-z0-9+/]{2}(?:[A-Za-z0-9+/]{2}|[A-Za-z0-9+/]=|==))"
SCRYPT = re.compile(rf"\$scrypt\$ln=(1[0-9]),r=([1-9]|1[0-6]),p=([1-9])\${_BASE64}\${_BASE64}")  # 1 GiB at most
SSHA = re.compile(rf"{{SSHA}}(?=.{{27}}[^=]){_BASE64}")  # of 21 octets or more: SHA-1 of password and salt, salt
KEY_HASH = "$sha256$"
NEW_COST = 5  # OWASP's N=2**14, r=8, p=5: as hard as N=2**17, p=1 in an eighth of the memory, 16 MiB
RETRY_AFTER = (60, 300, 900, 1800, 3600, 7200, 14400)  # seconds, give or take a fifth; the last one repeats
SECRET_TIMEOUT = 10  # seconds
SECRET_FORMS = 'a string, {"file": path}, {"env": NAME}, {"command": [program, argument]} or {"credential": NAME}'
PROVIDERS = {  # of access tokens: (token_url, scope of an application's tokens, scope of a user's)
    "microsoft": ("https://login.microsoftonline.com/{tenant}/oauth2/v2.0/token",
                  "https://outlook.office365.com/.default", "https://outlook.office.com/SMTP.Send offline_access"),
    "google": ("https://oauth2.googleapis.com/token", *["https://mail.google.com/"] * 2),
}  # fmt: skip
LIBCRYPTO = {  # function: types of its result and arguments in ctypes
    "BIO_new_mem_buf": "void_p char_p int", "BIO_free": "int void_p", "ERR_clear_error": "", "EVP_sha256": "void_p",
    "PEM_read_bio_PrivateKey": "void_p void_p void_p void_p char_p", "EVP_PKEY_free": " void_p",
    "EVP_MD_CTX_new": "void_p", "EVP_MD_CTX_free": " void_p", "i2d_PUBKEY": "int void_p void_p",
    "EVP_DigestSignInit": "int" + 5 * " void_p", "EVP_DigestSign": "int void_p char_p void_p char_p size_t",
}  # fmt: skip


@cache_short(4096, 64)
def parse_ip(text: str) -> IPAddress:
    """Parse an IP address; an IPv4-mapped IPv6 address becomes IPv4. Raises ValueError."""
    found = ipaddress.ip_address(text.partition("%")[0])
    return getattr(found, "ipv4_mapped", None) or found


class Networks:
    """Set of IP networks; `address in networks` takes as long for 100,000 of them as for ten."""

    def __init__(self, texts: Any = ()) -> None:
        self.texts, self.prefixes = tuple(texts), defaultdict(set)  # {(IP version, bits after the prefix): {prefix}}
        for network in [ipaddress.ip_interface(text).network for text in self.texts]:
            shift = network.max_prefixlen - network.prefixlen
            self.prefixes[network.version, shift].add(int(network.network_address) >> shift)

    def __contains__(self, address: IPAddress) -> bool:
        number, prefixes = int(address), self.prefixes.items()
        return any(address.version == version and number >> shift in known for (version, shift), known in prefixes)


def name_server_endpoint(text: str) -> tuple:
    """Return (IP address, port) of "address", "address:port" or "[v6]:port"; () if it is none of them."""
    name, _, port = text.rpartition(":") if "]:" in text or text.count(":") == 1 else (text, "", "53")
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(name.strip("[]")) and re.fullmatch(PORT, port) and int(port):
            return name.strip("[]"), int(port)
    return ()


def url_parser(pattern: re.Pattern, example: str, **options: Any) -> Callable:
    """Return a parser of URLs, or "", that the pattern matches and whose host and port can be connected to."""

    def accepts(url: str) -> bool:
        parts = urllib.parse.urlsplit(url)
        name, port = parts.hostname or "", parts.port
        return bool(pattern.fullmatch(url) and port != 0 and (DOMAIN.fullmatch(name) or ipaddress.IPv6Address(name)))

    return matching(accepts, f'a URL like "{example}"', optional=True, **options)


def ascii_domain(name: str) -> str:
    """Return the domain in ASCII (IDNA 2003), or "" if it has none or if IDNA 2008 has another one."""
    if name.isascii():
        return name
    with contextlib.suppress(UnicodeError):
        return "" if any(c in name for c in IDNA_DEVIATIONS) else name.encode("idna").decode()
    return ""


def domain_key(name: str) -> str:
    """Return a domain in lower case and ASCII (RFC 5890); "" if it is none."""
    domain = ascii_domain(name).lower()
    return domain if DOMAIN.fullmatch(domain) or re.fullmatch(r"\[[0-9a-z:.]+\]", domain) else ""


def match_key(text: str) -> str:
    """Return a domain, ".domain" for those below it, or an address, likewise."""
    local, at, name = text.rpartition("@")
    dot = "." if name.startswith(".") and not at else ""
    key = domain_key(name[len(dot) :])
    return f"{local.lower()}{at}{dot}{key}" if key and bool(local) == bool(at) else ""


def lookup_keys(domain: str) -> list:
    """Return the keys that match a domain, the best first: itself, then ".parent" from the longest to the shortest."""
    return [domain, *(domain[dot.start() :] for dot in re.finditer(r"\.", domain))]


class Rate(str):
    """Limit such as "100/3600": so many in so many seconds."""

    limit = property(lambda self: int(self.partition("/")[0]))
    seconds = property(lambda self: int(self.partition("/")[2]))


def iso_time(text: str) -> float:
    """Return the seconds since the epoch of an ISO 8601 date or time, which is UTC unless it says otherwise."""
    moment = datetime.fromisoformat(re.sub("[Zz]$", "+00:00", text))
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


LOOPBACK = Networks(("127.0.0.0/8", "::1"))
parse_networks = list_of(matching(ipaddress.ip_interface, "an IP address or network"), Networks)
LISTEN_ADDRESS = re.compile(rf"(?:[^:]+|\[[^]]+\]):{PORT}|unix:/.*")
parse_listen = list_of(matching(LISTEN_ADDRESS, '"host:port", "[v6]:port" or "unix:/path"'), required=True)
parse_host = matching(  # or a folder, for the relay File
    lambda text: text[:1] == "/" or DOMAIN.fullmatch(text) or ipaddress.ip_address(text), "a host name or an IP address"
)
parse_hostname = matching(DOMAIN, "a host name", optional=True)
parse_resolver = matching(name_server_endpoint, '"address", "address:port" or "[v6]:port"', optional=True)
parse_origin = matching(ORIGIN, 'a web origin like "https://www.example.org"', convert=str.lower)
parse_base_url = url_parser(BASE_URL, "https://api.example.org", convert=lambda url: url.rstrip("/"))
parse_webhook_url = url_parser(WEBHOOK_URL, "https://www.example.org/hook", secret=True)
parse_token_url = url_parser(WEBHOOK_URL, "https://login.example.org/token")
parse_region = matching(re.compile("[a-z0-9-]{1,32}"), 'a region like "eu-west-1"', optional=True)
parse_rate = matching(RATE, '"RECIPIENTS/SECONDS", such as "100/3600"', optional=True, convert=Rate)
parse_file = matching(str, "the name of a file", optional=True, convert=lambda name: {"file": name})
parse_domain = matching(domain_key, "a domain", convert=domain_key)
PLAIN_ADDRESS = re.compile(rf"(?=.{{3,254}}\Z)[\w+-]+(?:\.[\w+-]+)*@{DOMAIN.pattern}", re.ASCII)
parse_recipient = matching(lambda text: "@" in text and match_key(text), "an address", convert=match_key)
parse_fence = list_of(matching(match_key, 'an address, "example.org" or ".example.org"', convert=match_key), frozenset)
parse_alias = list_of(matching(lambda text: "@" in text and match_key(text), "an address"), required=True)
parse_aliases = mapping_of(parse_alias, lambda name: "" if "@" in name else name.lower(), "a name without @")
PASSWORD_HASH = re.compile(rf"{SCRYPT.pattern}|{SSHA.pattern}|\$sha256\$[0-9a-f]{{64}}")
parse_password_hash = matching(PASSWORD_HASH, "a hash as `haineko.py pw` prints it, or {SSHA}", secret=True)


class Relay(NamedTuple):
    """All that is known of a relay. To add one is to write its functions and a row of RELAYS."""

    send: Callable | None  # (Transaction, TransportContext): awaited for a Reply for each recipient
    probe: Callable | None  # (Route, hostname, recipients' domain or "", TransportContext): awaited for CheckResults
    default_port: int = 25
    api_url: str = ""  # template of the base URL of a relay by HTTP
    needs: tuple = ()  # settings that its routes must have
    refuses: tuple = ()  # settings that its routes can't have
    login: tuple = ("username", "password")  # what a login for its API must have
    scopes: tuple = ()  # for its API, if not the provider's: of an application's tokens, of a user's
    destination: str = "{route.relay} {route.host}:{route.port}"  # template: mail with the same text shares a next hop
    into_folder: bool = False  # delivers into a folder of this machine
    keeps_octets: bool = False  # what it sends arrives unchanged, so that it can be signed
    # Of a relay by HTTP; a document is the JSON object in a response, LookupError or TypeError: not this API's
    request: Callable | None = None  # (Transaction): HTTPRequest; ValueError if the API can't express the message
    replies: Callable | None = None  # (Transaction, HTTPResponse): a Reply for each recipient
    errors: Callable = lambda document, headers: []  # the error messages
    ping: Callable | None = None  # (Route): HTTPRequest for the document that `account` reads
    account: Callable | None = None  # (document): what the account may do, "" if it can't send


UNKNOWN_RELAY = Relay(None, None)  # of a route made before RELAYS is filled
RELAYS: dict[str, Relay] = {}  # by name; filled at the end of section 15


def parse_secret(value: Any, json_path: str, errors: list) -> Any:
    """Parse a string, or an object with one key that names the source of the secret."""
    if not isinstance(value, dict):
        return value if type(value) is str else parse_text(value, json_path, errors)  # read_secret() checks it
    kind = next(iter(value), "")
    if len(value) != 1 or kind not in ("file", "env", "command", "credential"):
        errors.append(f"{json_path}: expected {SECRET_FORMS}")
        return None
    parse, count = list_of(parse_text, required=True) if kind == "command" else parse_text, len(errors)
    where = parse(value[kind], f"{json_path}.{kind}", errors)
    return {kind: where} if len(errors) == count else None  # a faulty command is not run


def read_secret(source: Any, base: str, multiline: bool = False) -> str:
    """Return a secret from where it is; ValueError tells why that fails, without octets of it. A command blocks."""
    secret = source if isinstance(source, str) else _read_source(*next(iter(source.items())), base, multiline)
    if not (multiline or secret.isprintable()):  # in an HTTP header or a command it would break the line
        raise ValueError(": has a line end, or another unprintable character")
    return secret


def _read_source(kind: str, where: Any, base: str, multiline: bool) -> str:
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "") if kind == "credential" else base
    if kind == "credential" and ("/" in where or not folder):
        raise ValueError(f".credential: no credential {where}: LoadCredential= of systemd gives it to a unit")
    try:
        if kind == "command":
            output = run_secret_command(where, base)
            octets = output if multiline else output.partition(b"\n")[0]
        elif kind == "env":
            octets = os.fsencode(os.environ[where])
        else:
            octets = read_regular(os.path.join(folder, where), 0o006)
        return octets.decode().rstrip("\r\n")
    except KeyError:
        raise ValueError(f".env: no environment variable {where}") from None
    except (OSError, UnicodeDecodeError) as error:
        name = where[0] if kind == "command" else where
        raise ValueError(f".{kind}: {name}: {getattr(error, 'strerror', 'not UTF-8')}") from None


def run_secret_command(command: tuple, base: str) -> bytes:
    """Return what a program prints, run without a shell in the folder of the settings."""
    with Popen(command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, cwd=base or None, start_new_session=True) as process:
        try:
            code = process.wait(SECRET_TIMEOUT)
        except TimeoutExpired:  # or it has written more than a pipe holds
            os.killpg(process.pid, signal.SIGKILL)
            raise ValueError(f".command: {command[0]}: did not end within {SECRET_TIMEOUT} s") from None
        for pipe in (process.stdout, process.stderr):  # a process that it started may hold them open
            os.set_blocking(pipe.fileno(), False)
        output, error = process.stdout.read() or b"", process.stderr.read() or b""
    if code or not output.strip():
        words = sanitize(error.decode("utf-8", "replace").strip().rpartition("\n")[2])
        raise ValueError(f".command: {command[0]}: {words or (f'exit code {code}' if code else 'printed nothing')}")
    return output


class Authenticator:
    """The section `password`: who may log in. Successful logins are cached for 600 s: scrypt is slow by design."""

    def __init__(self, logins: dict) -> None:
        self.logins = logins
        self.keys = {login.hash: name for name, login in logins.items() if login.hash.startswith(KEY_HASH)}
        self.cost = max([NEW_COST, *[scrypt_cost(login.hash) for login in logins.values()]])  # of every verification
        self.verified: dict = {}  # HMAC of the credentials: monotonic time until which they are not verified again
        self.key = os.urandom(32)  # so that memory holds no plain digest of a password
        self.semaphore = threading.Semaphore(2)  # scrypt takes 16 MiB and a core each

    def authenticate(self, credentials: str, cached: bool = False) -> str:
        """Return the login that an Authorization header (RFC 7617) proves, or ""; `cached`: without a run of scrypt."""
        scheme, _, token = credentials.partition(" ")
        user, colon, password = "", "", ""
        with contextlib.suppress(ValueError):
            if scheme.lower() == "basic":
                user, colon, password = base64.b64decode(token.strip(), validate=True).decode().partition(":")
        key = (password if colon else user).encode()
        if name := self.keys.get(KEY_HASH + hashlib.sha256(key).hexdigest()):  # a digest leaks no timing
            return name
        digest, now = hmac.digest(self.key, credentials.encode(), "sha256"), time.monotonic()
        known = self.verified.get(digest, 0) > now
        if known or cached or not colon:
            return user if known else ""
        line = self.logins[user].hash if user in self.logins else ""
        with self.semaphore:
            right = verify_password(line, password)
            if rest := self.cost - scrypt_cost(line):  # or the time would reveal which users exist
                scrypt(password, b"", parallel=rest)
        if right:
            current = {key: expires for key, expires in self.verified.items() if expires > now}
            self.verified = {**current, digest: now + 600}  # a new one: another thread may iterate over the old one
        return user if right else ""


def parse_login(value: Any, json_path: str, errors: list) -> Login:
    """Parse a hash, or an object that has one."""
    if not isinstance(value, dict):
        value = {"hash": parse_password_hash(value, json_path, errors)}
    elif not value.get("hash"):
        errors.append(f"{json_path}.hash: expected a hash")
    return from_dict(Login, value, json_path, errors)


def verify_password(line: str, password: str) -> bool:
    """Return whether `line` (scrypt or {SSHA}) is the hash of the password. Those of keys are looked up instead."""
    if line.startswith("{SSHA}"):
        octets = base64.b64decode(line[len("{SSHA}") :])
        return hmac.compare_digest(hashlib.sha1(password.encode() + octets[20:]).digest(), octets[:20])
    if not (found := SCRYPT.fullmatch(line)):
        return False
    cost, block, parallel = map(int, found.groups()[:3])
    salt, digest = map(base64.b64decode, found.groups()[3:])
    return hmac.compare_digest(scrypt(password, salt, cost, block, parallel), digest)


def scrypt(password: str, salt: bytes, cost: int = 14, block: int = 8, parallel: int = NEW_COST) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=1 << cost, r=block, p=parallel, maxmem=(1 << 31) - 1)


def scrypt_cost(line: str) -> int:
    """Return the time to verify a line, in units of N=2**14, r=8, p=1; 0 for {SSHA}."""
    found = SCRYPT.fullmatch(line)
    return (int(found[3]) * int(found[2]) << int(found[1])) >> 17 if found else 0


class PrivateKey:
    """Private key in PEM, RSA or Ed25519, held by OpenSSL's libcrypto, which Python has loaded already."""

    def __init__(self, pem: bytes) -> None:
        ctypes, crypto = libcrypto()
        source = crypto.BIO_new_mem_buf(pem, len(pem))
        self._key = crypto.PEM_read_bio_PrivateKey(source, None, None, b"")  # b"": OpenSSL asks for no passphrase
        crypto.BIO_free(source)
        crypto.ERR_clear_error()  # or this thread's next TLS call would find what was left
        if not self._key:
            raise ValueError("expected a PEM private key without a passphrase")
        weakref.finalize(self, crypto.EVP_PKEY_free, self._key)
        buffer = ctypes.create_string_buffer(max(crypto.i2d_PUBKEY(self._key, None), 1))
        crypto.i2d_PUBKEY(self._key, ctypes.byref(ctypes.cast(buffer, ctypes.c_void_p)))
        self.public = buffer.raw  # SubjectPublicKeyInfo (RFC 5280 4.1) in DER
        self.is_ed25519 = self.public.startswith(bytes.fromhex("302a300506032b6570032100"))  # RFC 8410 4
        if not self.is_ed25519 and rsa_bits(self.public) < 2048:
            raise ValueError("expected an Ed25519 key, or an RSA key of 2048 bits or more")

    def sign(self, data: bytes) -> bytes:
        """Return the signature: RSA PKCS #1 v1.5 with SHA-256, or Ed25519. Other threads run meanwhile."""
        ctypes, crypto = libcrypto()
        size, context = ctypes.c_size_t(16384), crypto.EVP_MD_CTX_new()
        signature = ctypes.create_string_buffer(size.value)
        digest = None if self.is_ed25519 else crypto.EVP_sha256()  # Ed25519 has its own
        ok = crypto.EVP_DigestSignInit(context, None, digest, None, self._key) == 1
        ok = ok and crypto.EVP_DigestSign(context, signature, ctypes.byref(size), data, len(data)) == 1
        crypto.EVP_MD_CTX_free(context)
        if not ok:
            raise OSError(errno.EIO, "libcrypto can't sign with this key")
        return signature.raw[: size.value]


def rsa_bits(public: bytes) -> int:
    """Return the length of an RSA modulus, the first long INTEGER in the key's DER (RFC 8017 A.1.1); 0 without one."""
    modulus = re.search(rb"\x02(?:\x82(..)|\x81(.))\x00", public, re.DOTALL)
    return (int.from_bytes(modulus[1] or modulus[2], "big") - 1) * 8 if modulus else 0


@functools.lru_cache(maxsize=1)
def libcrypto() -> tuple:
    """Return ctypes, and OpenSSL's libcrypto by it; raise OSError if this Python has none that can be used."""
    import ctypes

    for module in ("_hashlib", "_ssl"):  # are linked with libcrypto, or Python itself is (None)
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(getattr(sys.modules.get(module), "__file__", None))
            for name, prototype in LIBCRYPTO.items():
                result, *arguments = [kind and getattr(ctypes, f"c_{kind}") for kind in prototype.split(" ")]
                function = getattr(library, name)
                function.restype, function.argtypes = result or None, arguments
            return ctypes, library
    raise OSError(errno.ENOSYS, "this Python has no OpenSSL libcrypto that can be used")


@dataclass(frozen=True, repr=False, eq=False)
class Tls:
    certificate: str = config_field("", parse_text, "PEM file of the certificate chain")
    key: str = config_field("", parse_text, "PEM file of its private key")


@dataclass(frozen=True, repr=False, eq=False)
class Httpd:
    listen: tuple = config_field(("127.0.0.1:2794",), parse_listen, "host:port, [v6]:port or unix:/path, or a list")
    workers: int = config_field(0, integer(0, 256), "processes; 0 means one per core")
    max_connections: int = config_field(512, integer(1, 65536), "open connections per worker")
    timeout: int = config_field(30, integer(1, 3600), "seconds for a whole request, and for an idle connection")
    trusted_proxies: Networks = config_field(Networks(), parse_networks, "networks whose X-Forwarded-For is believed")
    monitors: Networks = config_field(LOOPBACK, parse_networks, "networks that may read /conf, /queue and /metrics")
    allowed_origins: tuple = config_field((), list_of(parse_origin), "web origins that may POST from a browser")
    tls: Tls | None = config_field(None, Tls, "certificate and key: serve HTTPS")


@dataclass(frozen=True, repr=False, eq=False)
class Syslog:
    disabled: bool = config_field(True, parse_boolean, "1: the log goes to stderr")
    facility: str = config_field("local2", one_of(FACILITIES, "syslog facility"), "syslog facility")


@dataclass(frozen=True, repr=False, eq=False)
class Smtpd:
    hostname: str = config_field("", parse_hostname, "name in EHLO, Received, Message-Id; empty means this machine's")
    max_message_size: int = config_field(4194304, integer(0, 1 << 40), "octets of the finished message; 0: no limit")
    max_rcpts_per_message: int = config_field(4, integer(0, 1 << 20), "recipients; 0 means no limit")
    max_workers: int = config_field(4, integer(1, 256), "deliveries of one request at a time")
    resolver: tuple = config_field((), list_of(parse_resolver), "name servers, address:port; none: resolv.conf's")
    aliases: dict = config_field({}, parse_aliases, "addresses for names without a domain")
    redirect: tuple = config_field((), list_of(matching(PLAIN_ADDRESS, "an address")), "staging: where all mail goes")
    subject_prefix: str = config_field("", parse_text, "staging: stands before every subject")
    log: str = config_field("text", one_of(("text", "json"), "form of the log"), "text, or json: one object a line")
    syslog: Syslog = config_field(Syslog(), Syslog, "the log")

    @property
    def staging(self) -> str:
        """Return a note for people on what staging does to all mail; "" if it is off."""
        notes = [f"all mail goes to {', '.join(self.redirect)} (smtpd.redirect)"] if self.redirect else []
        notes += [f'subjects begin with "{self.subject_prefix}"'] if self.subject_prefix else []
        return f"STAGING: {'; '.join(notes)}" if notes else ""


@dataclass(frozen=True)
class QueueSettings:
    path: str = config_field("", parse_text, "the file, relative to this one")
    lifetime: int = config_field(432000, integer(1, 31536000), "seconds until a mail is given up")
    retry_after: tuple = config_field(RETRY_AFTER, list_of(integer(0, 604800), required=True), "seconds between tries")
    min_free: int = config_field(100 << 20, integer(0, 1 << 50), "octets that must be free on its disk")
    webhook: str = config_field("", parse_webhook_url, "URL to which each result of the queue is POSTed", secret="line")
    webhook_secret: Any = config_field("", parse_secret, '"whsec_" and base64 of 24 to 64 octets', secret="line")
    secret: bytes = field(default=b"", repr=False)  # octets of webhook_secret, set by resolve_settings()


@dataclass(frozen=True, repr=False, eq=False)
class Relayhosts:
    open_relay: bool = config_field(False, parse_boolean, "1: everybody may POST", key="open-relay")
    relayhosts: Networks = config_field(Networks(("127.0.0.1", "::1")), parse_networks, "networks that may POST")


@dataclass(frozen=True, repr=False, eq=False)
class Recipients:
    open_relay: bool = config_field(False, parse_boolean, "1: mail may go to every address", key="open-relay")
    domainpart: frozenset = config_field(frozenset(), list_of(parse_domain, frozenset), "domains that may be mailed")
    recipients: frozenset = config_field(frozenset(), list_of(parse_recipient, frozenset), "addresses likewise")


@dataclass(frozen=True, repr=False)
class OAuth2:
    """Where access tokens come from (RFC 6749). resolve_settings() fills in what the provider has."""

    provider: str = config_field("", one_of(PROVIDERS, "provider"), "microsoft or google: known token_url and scope")
    tenant: str = config_field("", parse_hostname, "microsoft: the directory's id or domain")
    token_url: str = config_field("", parse_token_url, "where tokens are fetched")
    scope: str = config_field("", parse_text, "what a token is to permit")
    client_id: str = config_field("", parse_text, "the application's id")
    client_secret: Any = config_field("", parse_secret, SECRET_FORMS, secret="line")
    refresh_token: Any = config_field("", parse_secret, "of a user; else tokens are the application's", secret="later")
    service_account: Any = config_field("", parse_file, "JSON file of a Google service account", secret="text")
    access_token: Any = config_field("", parse_secret, "the token itself, usually by a command", secret="later")
    base: str = ""  # folder of the settings

    def __hash__(self) -> int:
        return hash((self.token_url, self.client_id))


@dataclass(frozen=True, repr=False, eq=False)
class Credentials:
    username: str = config_field("", parse_text, "name to log in with")
    password: Any = config_field("", parse_secret, SECRET_FORMS, secret="line")
    token: Any = config_field("", parse_secret, "session token of temporary credentials of Amazon", secret="line")
    oauth2: OAuth2 | None = config_field(None, OAuth2, "access tokens instead of a password")


@dataclass(frozen=True, repr=False)
class Login:
    """Who may log in, and what for. A fence that is absent (None) permits everything, an empty one nothing."""

    hash: str = config_field("", parse_password_hash, "of the password or the API key", secret="line")
    senders: frozenset | None = config_field(None, parse_fence, "addresses and domains that may be used as sender")
    recipients: frozenset | None = config_field(None, parse_fence, "the same of recipients")
    networks: Networks | None = config_field(None, parse_networks, "from where it may be used")
    rate: Rate | None = config_field(None, parse_rate, '"100/3600": recipients in seconds')
    expires: str = config_field("", matching(iso_time, "an ISO 8601 date or time", optional=True), "when it ends")
    sandbox: bool = config_field(False, parse_boolean, "1: nothing leaves")
    trace: bool = config_field(False, parse_boolean, "1: it may ask for the SMTP dialogue")

    def fault(self, client: IPAddress, now: float) -> str:
        """Return why this login must be refused although the password is right, or ""."""
        if self.networks is not None and client not in self.networks:
            return f"{client} is not in its networks"
        return f"expired at {self.expires}" if self.expires and iso_time(self.expires) <= now else ""


@dataclass(frozen=True, repr=False, eq=False)
class DkimKey:
    """What signs the mail of a domain (RFC 6376). resolve_settings() sets domain and private."""

    selector: str = config_field("", matching(DOMAIN, "a selector"), "the key is at SELECTOR._domainkey.DOMAIN in DNS")
    key: Any = config_field("", parse_secret, "PEM: Ed25519, or RSA of 2048 bits or more", secret="text")
    domain: str = ""
    private: PrivateKey | None = None


@dataclass(frozen=True, repr=False)
class Route:
    """Where mail goes. resolve_settings() sets credentials and token, the relay MX address and tls_if_offered."""

    mailer: str = config_field("ESMTP", one_of(RELAYS, "relay type", or_folder=True), "the relay, or a folder for File")
    host: str = config_field("127.0.0.1", parse_host, "name or address of the next server; the folder, for File")
    port: int = config_field(0, integer(1, 65535), "25, Haineko 2794; 465 means TLS from the first byte")
    auth: str = config_field("", parse_text, "a name in authinfo")
    starttls: bool = config_field(False, parse_boolean, "1: STARTTLS or no delivery")
    tls_verify: bool = config_field(True, parse_boolean, "check the server's certificate and name")
    ca_file: str = config_field("", parse_text, "PEM file of one more certificate authority")
    private: bool = config_field(False, parse_boolean, "MX: 1 allows hosts with loopback and private addresses")
    timeout: int = config_field(30, integer(1, 3600), "seconds for each step of the dialogue")
    retry: int = config_field(0, integer(0, 100), "more tries after a temporary failure while the client waits")
    sleep: int = config_field(5, integer(0, 3600), "seconds between them")
    sessions: int = config_field(0, integer(0, 10000), "ESMTP: at most so many SMTP sessions; 0 means no limit")
    rate: Rate | str = config_field("", parse_rate, '"30/60": at most so many recipients in seconds')
    disabled: bool = config_field(False, parse_boolean, "1: as if this route were not there")
    https: bool = config_field(False, parse_boolean, "Haineko: 1 means TLS")
    dkim: bool = config_field(True, parse_boolean, "ESMTP, MX: 0 means that its mail is not signed")
    provider_headers: bool = config_field(False, parse_boolean, "1: clients may set fields that are commands to relays")
    base_url: str = config_field("", parse_base_url, "relays by HTTP: where the API is, if not at its usual place")
    region: str = config_field("", parse_region, "AmazonSES: the region")
    credentials: tuple = field(default=(), repr=False)
    address: str = ""  # to connect to in place of a look-up; or several, divided by spaces
    tls_if_offered: bool = False  # STARTTLS where the server has it
    fallbacks: tuple = ()  # the Routes behind it in a list
    token: str = field(default="", repr=False)
    oauth2: OAuth2 | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "port", self.port or self.row.default_port)

    def __hash__(self) -> int:
        return hash((self.mailer, self.host, self.port, self.address))  # cheap: routes are keys of the session pools

    choices = property(lambda self: (self, *self.fallbacks))
    relay = property(lambda self: "File" if self.mailer.startswith("/") else self.mailer)
    row = property(lambda self: RELAYS.get(self.relay, UNKNOWN_RELAY))
    endpoint = property(lambda self: {"mailer": self.mailer, "host": self.host, "port": self.port})
    scheme = property(lambda self: "https" if self.https else "http")
    url_host = property(lambda self: f"[{self.host}]" if ":" in self.host else self.host)
    url = property(lambda self: self.base_url or self.row.api_url.format(route=self))  # of a relay's HTTP API, or ""
    folder = property(lambda self: next((p for p in (self.mailer, self.host) if p[:1] == "/"), tempfile.gettempdir()))
    # what `sessions` and `rate` limit: a server, or an account of it
    limit_key = property(lambda self: " ".join([self.mailer, self.host, str(self.port), *self.credentials[:1]]))


def parse_route(value: Any, json_path: str, errors: list) -> Route:
    """Parse a route, or a list of them; the first one holds the others."""
    first, *others = list_of(functools.partial(from_dict, Route), required=True)(value, json_path, errors) or (Route(),)
    return replace(first, fallbacks=tuple(others)) if others else first


ROUTE_KEYS = '"example.jp", ".example.jp" or "default"'
parse_routes = mapping_of(parse_route, lambda name: "" if "@" in name else match_key(name), ROUTE_KEYS)


@dataclass(frozen=True, repr=False, eq=False)
class Settings:
    httpd: Httpd = config_field(Httpd(), Httpd)
    smtpd: Smtpd = config_field(Smtpd(), Smtpd)
    relayhosts: Relayhosts = config_field(Relayhosts(), Relayhosts)
    recipients: Recipients | None = config_field(None, Recipients)
    mailertable: dict = config_field({}, parse_routes)
    sendermt: dict = config_field({}, parse_routes)
    authinfo: dict = config_field({}, mapping_of(functools.partial(from_dict, Credentials)))
    password: Authenticator = config_field(Authenticator({}), mapping_of(parse_login, collect=Authenticator))
    queue: QueueSettings | None = config_field(None, QueueSettings)
    dkim: dict = config_field({}, mapping_of(functools.partial(from_dict, DkimKey), domain_key, "a domain"))
    path: str | None = None
    files: tuple = ()  # (path, stat_key) of all that was read
    hostname = property(lambda self: self.smtpd.hostname)


def load_settings(path: str | None) -> tuple:
    """Return (Settings, errors) of a settings file; without one mail may go to everybody, and is printed."""
    if path is None:
        return resolve_settings(Settings(recipients=Recipients(True), mailertable={"default": Route("Screen")}), [])
    errors, base, aside, exposed, files = [], os.path.dirname(path), {}, set(), {path: stat_key(path)}
    raw = read_json_file(path, path, errors)
    for section, name in raw.items():
        if isinstance(name, str) and section in key_table(Settings):
            aside[section] = file = os.path.join(base, name)
            files[file] = stat_key(file)
            raw[section] = read_json_file(file, f"{section}: {file}", errors)
    settings = from_dict(Settings, raw, "", errors)
    # A faulty value was left out, so that resolve_settings() may find faults at the same place: those are dropped.
    causes = tuple(error.partition(": ")[0] + mark for error in errors for mark in ".:[")
    for json_path, source, how in resolve_secrets(settings, "", base, errors):
        if isinstance(source, str):
            exposed.add(aside.get(json_path.partition(".")[0], path))
        elif "file" in source and how != "later":
            name = os.path.join(base, source["file"])
            files[name] = stat_key(name)
    exposed = sorted(file for file in exposed if files[file] and files[file][3] & 0o004)
    errors += [f"{file}: holds secrets and can be read by everybody; chmod 600 {file}" for file in exposed]
    settings, dependent = resolve_settings(replace(settings, path=path, files=tuple(files.items())), [])
    dependent = [error for error in dependent if not ("authinfo:" in causes and "in authinfo" in error)]
    return settings, errors + [error for error in dependent if not error.startswith(causes)]


def stat_key(path: str) -> tuple | None:
    """Return values that change when a file is rewritten, None if there is none."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL in the name
        found = os.stat(path)
        return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode, found.st_uid
    return None


def read_json_file(path: str, label: str, errors: list) -> dict:
    """Return the JSON object in a file, {} and an error if there is none."""
    try:
        if isinstance(raw := parse_json(read_regular(path, 0o002)), dict):
            return raw
        errors.append(f"{label}: expected an object, got {json_type_name(raw)}")
    except (OSError, ValueError) as error:
        errors.append(f"{label}: {getattr(error, 'strerror', None) or error}")
    return {}


def read_regular(path: str, forbidden: int = 0) -> bytes:
    """Return a regular file's octets; OSError for others (a FIFO would block), and for one with a `forbidden` mode."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as stream:
        mode = os.fstat(stream.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "is not a regular file", path)
        if mode & forbidden:
            raise OSError(errno.EPERM, f"can be {'written' if mode & 2 else 'read'} by everybody; chmod 600 {path}")
        return stream.read()


def resolve_secrets(value: Any, json_path: str, base: str, errors: list) -> Any:
    """Put each secret in place of its source, if it can be read; yield (JSON path, source, how it is read) of each."""
    value = getattr(value, "logins", value)
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from resolve_secrets(item, f"{json_path}.{key}", base, errors)
    for item in fields(value) if hasattr(value, "__dataclass_fields__") else ():
        where, how = f"{json_path}.{item.name}".lstrip("."), item.metadata.get("secret")
        source = getattr(value, item.name)
        if not how:
            yield from resolve_secrets(source, where, base, errors)
        elif source:
            yield where, source, how
            try:
                secret = source if "command" in source and how == "later" else read_secret(source, base, how == "text")
                object.__setattr__(value, item.name, source if how == "later" else secret)
            except ValueError as error:
                errors.append(f"{where}{error}")


def resolve_settings(settings: Settings, errors: list) -> tuple:
    """Return (Settings, errors) with names, secrets and files looked up, so that a mail finds all of it ready."""
    base, tls, files = os.path.dirname(settings.path or ""), settings.httpd.tls, []
    logins = {key: _login(login, base, f"authinfo.{key}", errors) for key, login in settings.authinfo.items()}
    values: dict = {"mailertable": {}, "sendermt": {}}
    for table, routes in values.items():
        for key, first in getattr(settings, table).items():
            names = [f"{table}.{key}[{i}]" if first.fallbacks else f"{table}.{key}" for i in range(len(first.choices))]
            choices = [(name, route) for name, route in zip(names, first.choices) if not route.disabled]
            found = [_route(route, logins, base, name, errors) for name, route in choices]
            routes.update({key: replace(found[0], fallbacks=tuple(found[1:]))} if found else {})
            files += [route.ca_file for route in found if route.ca_file]
    missing = [key for key in ("certificate", "key") if tls and not getattr(tls, key)]
    errors.extend(f"httpd.tls.{key}: expected the name of a PEM file" for key in missing)
    if tls and not missing:
        files += [os.path.join(base, name) for name in (tls.certificate, tls.key)]
        try:
            server_context(tls, base)
        except OSError as error:
            errors.append(f"httpd.tls: {error.filename}: {error.strerror}")
    values["smtpd"] = smtpd = replace(settings.smtpd, hostname=settings.smtpd.hostname or local_hostname())
    values["recipients"] = settings.recipients or Recipients(domainpart=frozenset([smtpd.hostname.lower()]))
    values["queue"] = settings.queue and _queue_settings(settings.queue, base, errors)
    values["dkim"] = keys = {domain: replace(key, domain=domain) for domain, key in settings.dkim.items()}
    for domain, key in keys.items():
        if not key.selector:
            errors.append(f"dkim.{domain}.selector: expected a selector")
        try:
            keys[domain] = replace(key, private=PrivateKey(key.key.encode())) if isinstance(key.key, str) else key
        except (ValueError, OSError) as error:
            errors.append(f"dkim.{domain}.key: {getattr(error, 'strerror', None) or error}")
    return replace(settings, **values, files=(*settings.files, *[(path, stat_key(path)) for path in files])), errors


def _login(login: Credentials, base: str, json_path: str, errors: list) -> Credentials:
    """Return the login with its provider's values filled in, except for the scope, which depends on the relay."""
    if not (oauth2 := login.oauth2):
        return login
    provider, account = "google" if oauth2.service_account else oauth2.provider, oauth2.service_account
    url = oauth2.token_url or PROVIDERS.get(provider, ("",))[0].format(tenant=oauth2.tenant)
    needs = {"username": login.username}
    if not (account or oauth2.access_token):
        tenant = oauth2.token_url or provider != "microsoft" or oauth2.tenant
        needs.update({"oauth2.provider": url, "oauth2.tenant": tenant, "oauth2.client_id": oauth2.client_id})
        needs["oauth2.client_secret"] = oauth2.client_secret or oauth2.refresh_token
    errors.extend(f"{json_path}.{key}: oauth2 needs it" for key, value in needs.items() if not value)
    try:
        if account and isinstance(account, str):
            document = parse_json(account.encode())
            PrivateKey(document["private_key"].encode())
            if not document["client_email"]:
                raise ValueError("no client_email")
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        errors.append(f"{json_path}.oauth2.service_account: expected the JSON file of a Google service account")
    return replace(login, oauth2=replace(oauth2, base=base, provider=provider, token_url=url))


def _queue_settings(settings: QueueSettings, base: str, errors: list) -> QueueSettings:
    path, secret, octets = os.path.abspath(os.path.join(base, settings.path)), settings.webhook_secret, b""
    if not settings.path or os.path.isdir(path):
        errors.append("queue.path: expected the name of a file")
    elif not os.access(f"{os.path.dirname(path)}/", os.W_OK | os.X_OK):
        errors.append(f"queue.path: {os.path.dirname(path)} is not a folder that can be written")
    with contextlib.suppress(ValueError):
        octets = base64.b64decode(str(secret).partition("whsec_")[2], validate=True)
    if (settings.webhook or secret) and not 24 <= len(octets) <= 64:
        errors.append('queue.webhook_secret: expected "whsec_" and base64 of 24 to 64 octets')
    return replace(settings, path=path, secret=octets)


def _route(route: Route, logins: dict, base: str, json_path: str, errors: list) -> Route:
    """Return the route with its login, and the host and port of its API."""
    row, login, has_login = route.row, logins.get(route.auth, Credentials()), route.auth in logins
    if route.auth and not has_login:
        errors.append(f'{json_path}.auth: "{route.auth}" is not in authinfo{did_you_mean(route.auth, logins)}')
    elif route.auth and row.api_url and not all(getattr(login, key) for key in row.login):
        errors.append(f"{json_path}.auth: authinfo.{route.auth} needs {' and '.join(row.login)}")
    errors += [f"{json_path}.{key}: {route.relay} takes no such setting" for key in row.refuses if getattr(route, key)]
    errors += [f"{json_path}.{key}: {route.relay} needs it" for key in row.needs if not getattr(route, key)]
    if row.into_folder and not os.access(f"{route.folder}/", os.W_OK | os.X_OK):  # with the slash it must be a folder
        errors.append(f"{json_path}.mailer: {route.folder} is not a folder that can be written")
    if not row.into_folder and route.host.startswith("/"):
        errors.append(f'{json_path}.host: expected a host name, got "{route.host}"')
    ca_file = os.path.join(base, route.ca_file) if route.ca_file else ""
    try:
        if ca_file:
            client_context(route.tls_verify, ca_file, stat_key(ca_file))
    except OSError as error:
        errors.append(f"{json_path}.ca_file: {ca_file}: {error.strerror or error}")
    oauth2 = login.oauth2 if not row.api_url or "oauth2" in row.login else None
    oauth2 = oauth2 or (OAuth2(access_token=login.token) if login.token and not row.api_url else None)
    if oauth2 and not oauth2.scope:
        of_application, of_user = row.scopes or PROVIDERS.get(oauth2.provider, ("", "", ""))[1:]
        oauth2 = replace(oauth2, scope=of_user if oauth2.refresh_token else of_application)
    site = split_base_url(route.url) if row.api_url else route
    credentials = (login.username, login.password) if has_login else ()
    values = {"host": site.host, "port": site.port, "credentials": credentials, "token": login.token}
    return replace(route, ca_file=ca_file, oauth2=oauth2, **values)


BaseURL = namedtuple("BaseURL", "tls host port path host_header")


@functools.lru_cache(maxsize=1024)
def split_base_url(url: str) -> BaseURL:
    """Return a URL's parts: `path` stands before every path of the API, `host_header` is the Host of RFC 9110 7.2."""
    parts = urllib.parse.urlsplit(url)
    host, default_port = parts.hostname or "", 443 if parts.scheme == "https" else 80
    name, port = f"[{host}]" if ":" in host else host, parts.port or default_port
    return BaseURL(parts.scheme == "https", host, port, parts.path, name if port == default_port else f"{name}:{port}")


def local_hostname(name: str | None = None) -> str:
    """Return a machine's name (this one's), made legal; with ".localdomain", as Postfix does, if it has no domain."""
    name = socket.gethostname() if name is None else name
    if "." in name and HOSTNAME.fullmatch(name):
        return name
    return (re.sub("[^A-Za-z0-9]+", "-", name)[:63].strip("-") or "localhost") + LOCALDOMAIN


@functools.lru_cache(maxsize=64)
def ehlo_name(hostname: str, address: str) -> str:
    """Return the name for EHLO from a local address: `hostname` if that is legal, else by reverse DNS, else [IP]."""
    if HOSTNAME.fullmatch(hostname) and not hostname.endswith(LOCALDOMAIN):
        return hostname
    local = parse_ip(address)
    with contextlib.suppress(OSError):
        name = "" if local in LOOPBACK else socket.gethostbyaddr(address)[0]
        if "." in name and HOSTNAME.fullmatch(name) and not name.endswith(LOCALDOMAIN):
            return name
    return f"[IPv6:{local}]" if local.version == 6 else f"[{local}]"


def server_context(tls: Tls, base: str) -> ssl.SSLContext:
    """Return a context for TLS 1.2 and later with the certificate; OSError with the file's name if it can't be used."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    files = [os.path.join(base, name) for name in (tls.certificate, tls.key)]
    for name in files:
        read_regular(name)
    try:
        context.load_cert_chain(*files, password=lambda: "")  # or OpenSSL would ask the terminal for it
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise OSError(errno.EINVAL, f"not a certificate and its key ({reason})", ", ".join(files)) from None
    return context


@functools.lru_cache(maxsize=64)
def client_context(verify: bool, ca_file: str, _stat_key: tuple | None = None) -> ssl.SSLContext:
    """Return a context for connecting; cached, because loading certificate authorities takes tens of milliseconds."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file:
        read_regular(ca_file)
        context.load_verify_locations(ca_file)
    if not verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def redacted(value: Any, secret: str = "") -> Any:
    """Return settings as JSON values, each secret as ********; so is a login that has nothing but its hash."""
    if (secret and value) or (isinstance(value, Login) and value == Login(value.hash)):
        return "********"
    if isinstance(value, Route) and value.fallbacks:
        return [redacted(replace(choice, fallbacks=())) for choice in value.choices]
    if hasattr(value, "__dataclass_fields__"):
        known = {(item.metadata["keys"] or (item.name,))[0]: item for item in fields(value) if "parse" in item.metadata}
        return {key: redacted(getattr(value, item.name), item.metadata["secret"]) for key, item in known.items()}
    value = getattr(value, "logins", getattr(value, "texts", value))  # of an Authenticator, of Networks
    if isinstance(value, dict):
        return {key: redacted(item) for key, item in value.items()}
    return sorted(value) if isinstance(value, frozenset) else list(value) if isinstance(value, tuple) else value


def example_settings() -> dict:
    """Return the settings of the example file: complete, valid, and three lines short of a smart host."""
    settings = redacted(Settings(recipients=Recipients(open_relay=True), queue=QueueSettings(path="haineko.db")))
    route = {"mailer": "ESMTP", "host": "smtp.example.org", "port": 587, "starttls": True, "auth": "relay"}
    folder, discard = {"mailer": "/var/spool/haineko", "disabled": True}, {"mailer": "Discard", "disabled": True}
    settings["mailertable"] = {"default": route, "example.com": discard, ".example.net": folder}
    settings["sendermt"] = {"example.net": {"mailer": "Screen", "disabled": True}}
    return {**settings, "authinfo": {"relay": {"username": "", "password": ""}}}


# ======================================================================================================================
# 4. Log and metrics
#    A destination that does not read costs lines, never a mail. `log` and `metrics` are the only state that all share.
# ======================================================================================================================

MAX_TO = 8 * 257  # octets of recipients of a transaction in a line, so that a pipe takes it whole (PIPE_BUF)
LOG_FORMS = {"from": "<{}>".format, "delay": "{:.3f}".format, "to": lambda to: f"<{'>,<'.join(to)}>"}  # in text


class Log:
    """Writer of log lines. After start_buffering() they wait for flush(), which writes those of many mails at once."""

    FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    LEVELS = {"error": 3, "warning": 4, "info": 6}  # of syslog(3)  # noqa: RUF012
    SYSLOG = ("/dev/log", "/var/run/syslog", "/var/run/log")  # Linux, macOS, BSD
    LOST = "{} lines were lost, since nobody read them"
    PATIENCE = 0.1  # seconds for a reader that is slow; then lines are dropped and counted until it reads again
    devel = False  # SMTP dialogues are shown, too
    trace: Any = contextvars.ContextVar("trace", default=None)  # list of a task that collects its dialogue
    facility: int | None = None  # of syslog lines; None: they go to stderr
    is_json = is_journal = False  # a JSON object a line; to systemd's journal, which adds time and name
    syslog: socket.socket | None = None
    buffer: list | None = None  # texts that wait for flush()
    loop: Any = None  # event loop that calls flush()
    stderr = 2  # a file descriptor
    path = ""  # of the file that descriptors 1 and 2 are, if reopen() is to look for a new one
    quiet = False  # lines for stderr are dropped
    lost = lost_ever = 0  # lines, since the reader stopped; and in all that are not in the metrics yet

    def open(self, settings: Syslog, form: str = "text") -> None:
        self.facility = None if settings.disabled else FACILITIES[settings.facility] * 8
        self.is_json = form == "json"
        found = os.fstat(2)
        self.is_journal = os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"

    def event(self, level: str, event: str, message: str, **fields: Any) -> None:
        """Write a line about an event: QUEUEID: key=value ... (code message), or JSON; fields are left out if None."""
        fields = {key: value for key, value in fields.items() if value is not None}
        self._write(level, [json_line(level, event, message, fields) if self.is_json else text_line(message, **fields)])

    def lines(self, *lines: str, level: str = "info") -> None:
        """Write lines by one call, so that those of several processes don't mix."""
        self._write(level, [json_line(level, "server", line, {}) if self.is_json else line for line in lines])

    def banner(self, text: str) -> None:
        """Write a line to stderr, wherever the others go."""
        line = json_line("info", "server", text, {}) if self.is_json else text
        self._to_stderr(f"{'<6>' if self.is_journal else ''}{line}\n")

    def dialogue(self, peer: str, direction: str, line: str) -> None:
        """Show a line of an SMTP dialogue under -d, and keep it for a mail that is traced."""
        line, lines = f"{direction} {sanitize(line, 1000, keep=chr(9))}", self.trace.get()
        if self.devel:
            self.banner(f"{peer} {line}")
        if lines is not None:
            lines.append(line)

    def _write(self, level: str, lines: list) -> None:
        name = f"haineko[{os.getpid()}]: "
        if self.facility is not None:
            head = f"<{self.facility | self.LEVELS[level]}>{time.strftime('%b %e %H:%M:%S')} {name}"  # RFC 3164
            for line in lines:
                self._to_syslog(head, line)
        elif not self.quiet:
            head = "" if self.is_json else f"{timestamp(int(time.time()))} {name}"
            head = f"<{self.LEVELS[level]}>" if self.is_journal else head
            self._to_stderr("".join([f"{head}{line}\n" for line in lines]))

    def _to_stderr(self, text: str) -> None:
        if self.buffer is None:
            self.write_bytes(text.encode("utf-8", "backslashreplace"))
            return
        self.buffer.append(text)
        if self.loop and threading.current_thread() is not threading.main_thread():
            self.loop.call_soon_threadsafe(self.flush)
        elif self.loop and len(self.buffer) == 1:
            self.loop.call_soon(self.flush)

    def reopen(self) -> None:
        """Open the log file again if it was moved away, as logrotate does; count the lost lines in the metrics."""
        lost, self.lost_ever = self.lost_ever, 0
        metrics.add("haineko_log_lines_lost_total", by=lost)
        with contextlib.suppress(OSError):
            if self.path and not (os.path.exists(self.path) and os.path.samestat(os.stat(self.path), os.fstat(2))):
                number = os.open(self.path, self.FILE_FLAGS, 0o600)
                os.dup2(number, 1)
                os.dup2(number, 2)
                os.close(number)

    def start_buffering(self, loop: Any = None) -> None:
        """Let lines wait for flush(), which the event loop calls in its next iteration."""
        self.buffer, self.loop = [], loop
        with contextlib.suppress(OSError):  # reopened: in a shared pipe another process may take the room meanwhile
            if stat.S_ISFIFO(os.fstat(2).st_mode):
                self.stderr = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def flush(self) -> None:
        if self.buffer:
            texts = self.buffer[:]
            del self.buffer[: len(texts)]  # a thread may have added to them meanwhile
            self.write_bytes("".join(texts).encode("utf-8", "backslashreplace"))

    def write_bytes(self, octets: bytes) -> bool:
        """Write octets to stderr; False if it is closed, full, or a pipe that nobody reads."""
        start = 0
        with contextlib.suppress(OSError):
            while start < len(octets):
                if not select.select([], [self.stderr], [], 0 if self.lost else self.PATIENCE)[1]:
                    lines = octets.count(b"\n", start)
                    self.lost, self.lost_ever = self.lost + lines, self.lost_ever + lines
                    break
                with contextlib.suppress(BlockingIOError):  # another process was quicker
                    if self.lost:
                        os.write(self.stderr, f"\nhaineko[{os.getpid()}]: {self.LOST.format(self.lost)}\n".encode())
                        self.lost = 0
                        continue  # there may have been room for this only
                    end = octets.rfind(b"\n", start, start + select.PIPE_BUF) + 1  # so much never blocks
                    start += os.write(self.stderr, octets[start : end or start + select.PIPE_BUF])
        return start == len(octets)

    def _to_syslog(self, head: str, line: str) -> None:
        """Send a line to a daemon that may be absent, another one or stuck, where syslog.syslog() would block."""
        path = next(filter(os.path.exists, self.SYSLOG), self.SYSLOG[0])
        try:
            self.syslog = self.syslog or socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self.syslog.settimeout(0 if self.lost else self.PATIENCE)
            for text in (self.LOST.format(self.lost), line) if self.lost else (line,):
                self.syslog.sendto(f"{head}{text}".encode("utf-8", "backslashreplace"), path)
            self.lost = 0
        except OSError:
            self.lost, self.lost_ever = self.lost + 1, self.lost_ever + 1


@functools.lru_cache(maxsize=2)
def timestamp(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(second))


def log_exception(queueid: str | None) -> None:
    lines = traceback.format_exc().splitlines()
    log.lines(*[f"{queueid or '-'}: {sanitize(line, 500)}" for line in lines], level="error")


def json_line(level: str, event: str, message: str, fields: dict) -> str:
    """Return an event as a JSON object in a line."""
    moment = datetime.now().astimezone().isoformat(timespec="milliseconds")
    values = {"time": moment, "level": level, "event": event, **fields, "message": message}
    forms = {"to": lambda to: [sanitize(item, 254) for item in to], "code": int, "delay": lambda delay: round(delay, 3)}
    return ENCODER.encode({key: forms.get(key, lambda text: sanitize(text, 1000))(values[key]) for key in values})


def text_line(message: str, queueid: str | None = None, code: str = "", **fields: Any) -> str:
    """Return an event as people and log readers of mail servers read it."""
    fields.update({key: make(fields[key]) for key, make in LOG_FORMS.items() if key in fields})
    pairs = [f"{key}={log_value(value, MAX_TO if key == 'to' else 500)}" for key, value in fields.items()]
    words = sanitize(f"{code} {message}".lstrip(), 600)
    return " ".join([*([f"{queueid}:"] if queueid else []), *pairs, f"({words})" if pairs else words])


def log_value(value: Any, limit: int = 500) -> str:
    """Return a value for a log line, in quotes if it is empty or has blanks or quotes, "?" for unprintables."""
    value = sanitize(str(value), limit)
    return value if value and " " not in value and '"' not in value else ENCODER.encode(value)


class Metrics:
    """64-bit columns that all processes share: each adds to its own row, which workers inherit. Not for threads."""

    BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # seconds; one more cell has their sum
    columns: dict = {}  # noqa: RUF012 -- nothing is counted before allocate()

    def allocate(self, table: dict, rows: int) -> None:
        """Make room for metrics {name: (type, help, {label: its values})}; the last row is this process's."""
        self.table, self.columns, width = table, {}, 1  # the first cell is the heartbeat: time.monotonic_ns()
        for name, (kind, _, labels) in table.items():
            for values in itertools.product(*labels.values()):
                self.columns[(name, *values)] = width
                width += len(self.BUCKETS) + 2 if kind == "histogram" else 1
        cells = memoryview(mmap.mmap(-1, 8 * width * rows)).cast("q")
        self.rows = [cells[first : first + width] for first in range(0, width * rows, width)]
        self.cells = self.rows[-1]

    def add(self, *key: Any, by: int = 1) -> None:
        """Add to a counter; the key is its name and the values of its labels."""
        if key in self.columns:
            self.cells[self.columns[key]] += by

    def set(self, *key: Any, to: int) -> None:
        if key in self.columns:
            self.cells[self.columns[key]] = to

    def observe(self, *key: Any, seconds: float) -> None:
        if key in self.columns:
            column = self.columns[key]
            self.cells[column + bisect.bisect_left(self.BUCKETS, seconds)] += 1
            self.cells[column + len(self.BUCKETS) + 1] += round(seconds * 1e6)

    def text(self, current: dict) -> str:
        """Return all in Prometheus's text format; `current` are values by key that are no sums, None if unknown."""
        lines, totals = [], [sum(column) for column in zip(*self.rows)]
        for name, (kind, about, labels) in self.table.items():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
            for key in itertools.product((name,), *labels.values()):
                column, pairs = self.columns[key], [f'{label}="{value}"' for label, value in zip(labels, key[1:])]
                samples = [("", pairs, current.get(key, totals[column]))]
                if kind == "histogram":
                    counts = list(itertools.accumulate(totals[column : column + len(self.BUCKETS) + 1]))
                    bounds = [[*pairs, f'le="{bound}"'] for bound in (*self.BUCKETS, "+Inf")]
                    samples = [("_bucket", *sample) for sample in zip(bounds, counts)]
                    samples += [("_count", pairs, counts[-1]), ("_sum", pairs, totals[column + len(counts)] / 1e6)]
                samples = [(f"{name}{suffix}{{{','.join(pairs)}}}", value) for suffix, pairs, value in samples]
                lines += [f"{series} {value}".replace("{}", "") for series, value in samples if value is not None]
        return "\n".join(lines) + "\n"


log = Log()
metrics = Metrics()


# ======================================================================================================================
# 5. Submissions
#    Takes the body of a request, gives a Submission and the list of all faults. Every string of a Submission is
#    Unicode; strings for headers have no CR, LF or NUL; addresses in headers are parsed. Knows no settings.
# ======================================================================================================================

# JIS X 0201 has kana, and two characters that ASCII has not (RFC 1468).
JIS_TABLES = {"(J": str.maketrans("\\~", "¥‾"), "(I": {code: code + 0xFF40 for code in range(0x21, 0x60)}}

# Limits; a name or field over them is refused, and they are checked before the work.
MAX_PATH = 254  # octets of an address, RFC 5321 4.5.3.1.3 less the brackets
MAX_ADDRESSES = 2000  # of one field
MAX_FILE_NAME = MAX_MEDIA_TYPE = 255  # characters
MAX_ATTACHMENTS = MAX_FIELDS = 1000
MAX_HEADER = 102400  # octets of the header of a message or part
MAX_PARTS, MAX_NESTING = 2000, 100

_ATOM = r"[^\x00-\x20\x7f()<>@,;:\\\".\[\]]+"
MAILBOX = re.compile(  # characters beyond ASCII must be printable as well
    rf'({_ATOM}(?:\.{_ATOM})*|"(?:[^\x00-\x1f\x7f"\\]|\\[\x20-\x7e])*")'
    r"@([^\x00-\x20\x7f@<>\[\]]+|\[[0-9A-Za-z:.]+\])"
)
PHRASE = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~ -]{1,60}")  # of a mailbox or group, written without quotes
SIMPLE_MAILBOX = re.compile(r"([^<>\"\\]*)<([^<>\s]+)>\s*")  # a name, with commas or brackets or not, and one address
ADDRESS_TOKEN = re.compile(
    r'(?s)(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<angle><(?:[^<>"\\]|"(?:[^"\\]|\\.)*")*>)|(?P<literal>\[[^\[\]]*\])'
    r"|(?P<comment>\((?:[^()\\]|\\.|\((?:[^()\\]|\\.|\((?:[^()\\]|\\.)*\))*\))*\))"  # in two others at most
    r"|(?P<blank>\s+)|(?P<mark>[,;:]|\Z)|(?P<atom>[^\s\"<>()\[\],;:]+)|(?P<fault>.+)"
)
CFWS = ("blank", "comment")
MESSAGE_ID = r"<[!-;=?A-~]{1,400}@[!-;=?A-~]{1,400}>"
PLAIN = re.compile(r"[\x21-\x7e]{1,900}(?: [\x21-\x7e]{1,900})*")  # printable ASCII, words with one space between
DATE = re.compile(
    r"(?:(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun), )?[0-9]{1,2} (?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) [0-9]{4} "
    r"[0-9]{2}:[0-9]{2}(?::[0-9]{2})? (?:[+-][0-9]{4}|GMT|UT|UTC)(?: \([A-Za-z]{1,9}\))?"
)
RESERVED_FIELDS = re.compile(r"received|sender|returnpath|dkimsignature|mime.*|content.*")  # normalized; made here
_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`{|}~-]+"
MEDIA_PARAMETER = re.compile(rf';[ \t]*({_TOKEN})=({_TOKEN}|"(?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\[\x20-\x7e])*")[ \t]*')
MEDIA_TYPE = re.compile(rf"({_TOKEN}/{_TOKEN})[ \t]*((?:{MEDIA_PARAMETER.pattern})*)(?:;[ \t]*)?")
CONTENT_ID = re.compile(r"(<)?[A-Za-z0-9!#$%&'*+/=?^_`{|}~.@-]{1,200}(?(1)>)")  # of a link "cid:...", RFC 2392
HIGH_OCTETS = bytes(range(128, 256))
NOT_7BIT = re.compile(rb"[\0\x80-\xff]|\r(?!\n)|^[^\r\n]{999}", re.MULTILINE)  # RFC 2045 2.7
LONG_LINE = re.compile(rb"^[^\r\n]{999,}", re.MULTILINE)  # RFC 5322 2.1.1
LINE_PIECE = re.compile(rb".{1,998}(?=[ \t]|\Z)|.+")
RAW_FIELD = re.compile(rb"([!-9;-~]+)[ \t]*:[^\n]*(?:\n[ \t][^\n]*)*(?:\n|\Z)")
PARAMETER_FIELDS = ("content-type", "content-disposition")
MAILBOX_FIELDS = ("from", "sender", "to", "cc", "bcc", "reply-to", "resent-from", "resent-sender", "resent-to",
                  "resent-cc", "resent-reply-to", "disposition-notification-to", "return-receipt-to")  # fmt: skip
STRUCTURED_FIELDS = re.compile(  # in which only comments may be encoded
    r"(?:resent-)?(?:date|message-id)|received|received-spf|references|in-reply-to|return-path|mime-version|content-id"
    r"|content-transfer-encoding|(?:dkim|domainkey)-signature|arc-.*|authentication-results|auto-submitted|list-(?!id$).*"
)
CID_LINK = re.compile("[\"'(=]\\s*cid:([^\"'<>()\\s]{1,600})", re.IGNORECASE)  # RFC 2392
TRACEPARENT = "[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}"  # W3C Trace Context


@dataclass(repr=False, eq=False)  # made for each request, and creating a frozen one takes four times as long
class Request:
    method: str
    path: str
    headers: dict  # by name in lower case
    body: Any  # bytes or bytearray; it is read after the checks of the head
    client: IPAddress | None  # None if no head was read
    peer: IPAddress | None  # address of the connection: the client's or a proxy's
    port: int | None  # of the client
    now: float  # seconds since the epoch
    settings: Settings | None = None  # in force when it began
    login: str = ""  # name of the login that was verified
    rights: Login = Login()  # what it permits
    login_fault: str = ""  # why a login is refused, for the log
    limits: Any = None  # the server's SharedLimits
    rate: tuple = ()  # (the Rate that counts, its RateState), for the answer
    recipient_count: int = 0  # of those that passed the checks
    message_size: int = 0  # octets of the finished message
    forwarded: str = ""  # a header by which a proxy says that it forwarded the request
    dsn: tuple = DEFAULT_DSN  # what is asked of the next server
    is_http10: bool = False
    keep_alive: bool = False  # the client wants to go on using the connection

    def log_fields(self) -> dict:
        """Return the keys of its log lines that say whose it is, and the ids by which other programs know it."""
        whose = {"client": self.client and str(self.client), "login": self.login or None}
        ids = {"request_id": self.trace_id("x-request-id"), "traceparent": self.trace_id("traceparent", TRACEPARENT)}
        return {**whose, "reason": self.login_fault or None, **ids}

    def trace_id(self, header: str, form: str = r"[A-Za-z0-9._:/+=@-]{1,128}") -> str | None:
        value = self.headers.get(header)
        return value if value and re.fullmatch(form, value) else None


class Mailbox(NamedTuple):
    as_written: str
    domain: str  # in ASCII
    addr_spec: str  # local part, "@", domain
    key: tuple  # equal for equal mailboxes: domains compare without case (RFC 5321 2.4)


@cache_short(4096, limit=MAX_PATH)
def parse_address(text: str) -> Mailbox | None:
    """Return the mailbox that a bare address names, or None. The local part may be other than ASCII (RFC 6531)."""
    found = MAILBOX.fullmatch(text) if len(text) <= MAX_PATH else None
    if not found or not (text.isascii() or (text.isprintable() and len(text.encode()) <= MAX_PATH)):
        return None
    local, domain = found[1], ascii_domain(found[2])
    is_host: Any = DOMAIN.fullmatch(domain)
    if domain[:1] == "[":  # an address literal, RFC 5321 4.1.3
        with contextlib.suppress(ValueError):
            is_v6 = domain[1:6].lower() == "ipv6:"
            is_host = ipaddress.IPv6Address(domain[6:-1]) if is_v6 else ipaddress.IPv4Address(domain[1:-1])
    mailbox = Mailbox(text, domain, f"{local}@{domain}", (local, domain.lower()))
    return mailbox if is_host and len(mailbox.addr_spec.encode()) <= MAX_PATH else None


def idna_hint(text: str) -> tuple:
    """Return a line that says why a text is no bare address, or ()."""
    if found := re.search(f"@[^@ ,>]*([{IDNA_DEVIATIONS}])", text):
        return (
            f"U+{ord(found[1]):04X} has two readings in a domain (IDNA 2003 and 2008); write the domain as xn--...",
        )
    with contextlib.suppress(ValueError, IndexError):
        meant = parse_mailboxes(text[:1000])[0][1].as_written
        return (f'expected a bare address, got "{sanitize(text, 80)}"; did you mean "{meant}"?',)
    return ()


def parse_unicode_text(value: Any, json_path: str, errors: list) -> str:
    if type(value) is not str:
        errors.append(f"{json_path}: expected a string, got {json_type_name(value)}")
        return ""
    try:
        if not value.isascii():
            value.encode("utf-16")  # fails for lone surrogates, and is quicker than UTF-8
    except UnicodeEncodeError as error:
        errors.append(f"{json_path}: has half a surrogate pair at character {error.start}")
    return value


def parse_header_text(value: Any, json_path: str, errors: list) -> str:
    """Return a string for a header: no CR, LF, NUL or lone surrogate."""
    value = parse_unicode_text(value, json_path, errors)
    if not value.isprintable() and ("\r" in value or "\n" in value or "\0" in value):
        errors.append(f"{json_path}: has a CR, LF or NUL")
    return value


def parse_recipient_field(value: Any, json_path: str, errors: list, allow_group: bool = True) -> tuple:
    """Return ((display name, Mailbox), ...) of a field like To, ((name, NULL_SENDER),) of an empty group."""
    value, reason = parse_header_text(value, json_path, errors), ""
    try:
        found = parse_mailboxes(value)
        if found or not value:
            return found
        if ":" in value and allow_group:
            name = value.partition(":")[0].strip()
            return ((name if PHRASE.fullmatch(name) else "undisclosed-recipients", NULL_SENDER),)
    except ValueError as error:
        reason = "" if value.strip() in str(error) else f" ({error})"
    text = f'{json_path}: expected "name <address>", got "{sanitize(value, 80)}"{reason}'
    errors.append("; ".join([text, *idna_hint(value)]))
    return ()


def parse_recipient_list(value: Any, json_path: str, errors: list) -> tuple:
    if type(value) is list and len(value) > MAX_ADDRESSES:
        errors.append(f"{json_path}: {len(value)} addresses exceed the limit of {MAX_ADDRESSES}")
        return ()
    return tuple(itertools.chain.from_iterable(list_of(parse_recipient_field)(value, json_path, errors)))


@cache_short(512)
def parse_mailboxes(text: str) -> tuple:
    """Return ((display name, Mailbox), ...) of an address list (RFC 5322 3.4 and 4.4); ValueError if it is none.
    Groups are dissolved; ";" separates as "," does. email.utils.getaddresses() differs between versions of Python."""
    simple = SIMPLE_MAILBOX.fullmatch(text)
    if simple and not ("@" in simple[1] and re.search("[,;]", simple[1])):  # else the name holds another mailbox
        return tuple(_mailbox([("atom", simple[1]), ("angle", f"<{simple[2]}>")]))
    found, tokens, in_group = [], [], False
    for match in ADDRESS_TOKEN.finditer(text):
        kind, token = match.lastgroup, match[0]
        if kind == "fault":
            raise ValueError(f'"{token[0]}" out of place')
        if kind != "mark":
            tokens.append((kind, token))
            continue
        kinds = {kind for kind, _ in tokens if kind not in CFWS}
        if token != ":":
            found += _mailbox(tokens)
        if (token == ":" and (in_group or not kinds or kinds - {"atom", "quoted"})) or (in_group and not token):
            raise ValueError('":" out of place, or a group without ";"')
        if len(found) > MAX_ADDRESSES:
            raise ValueError(f"more than {MAX_ADDRESSES} addresses")
        tokens, in_group = [], token == ":" or (in_group and token == ",")
    return tuple(found)


def _mailbox(tokens: list) -> list:
    """Return [(display name, Mailbox)] of the tokens between two separators, [] if they are comments and blanks."""
    comments = " ".join(token[1:-1].strip() for kind, token in tokens if kind == "comment")
    words = [" " if kind == "comment" else token for kind, token in tokens if kind != "angle"]
    kinds = [kind for kind, _ in tokens if kind not in CFWS]
    if "angle" not in kinds:
        name, spec = comments, "".join(words).strip()
    elif kinds.index("angle") < len(kinds) - 1:
        raise ValueError("text after an address")
    else:
        name, spec = "".join(map(unquote, words)).strip(), dict(tokens)["angle"][1:-1]
        name = f"{name} ({comments})" if name and comments else name or comments
    mailbox = parse_address(spec.strip())
    if kinds and not mailbox:
        raise ValueError(f'"{sanitize(spec, 80)}" is no address')
    return [(name, mailbox)] if mailbox else []


def unquote(word: str) -> str:
    """Return what a quoted string says (RFC 5322 3.2.4), any other word as it is."""
    return re.sub(r'\\(.)|"', r"\1", word) if word[:1] == '"' else word


def parse_loop_names(value: Any, json_path: str, errors: list) -> tuple:
    """Return the names of the Hainekos that a mail has passed: from a list, or from one string with commas."""
    names = ",".join(list_of(parse_header_text)(value, json_path, errors)).split(",")
    names = tuple(name.strip() for name in names if name.strip())
    for name in names:
        if not DOMAIN.fullmatch(name) and len(errors) < MAX_ERRORS:
            errors.append(f'{json_path}: "{sanitize(name, 80)}" is no name of a Haineko')
    return names


@cache_short(64, limit=40)
def iana_charset(name: str) -> str:
    """Return IANA's preferred name of a charset, "" for one that Python or mail readers do not know."""
    with contextlib.suppress(LookupError, ValueError):
        if re.fullmatch(r"[A-Za-z0-9_.:()+-]{1,40}", name):
            return IANA_NAMES.get(codecs.lookup(codec_name(name)).name, "")
    return ""


def codec_name(charset: str) -> str:
    """Return Python's name of a charset; Python does not know all of IANA's names."""
    return CODECS.get(charset.lower(), charset.lower())


def one_of_words(*words: str) -> Callable:
    return matching(re.compile("|".join(words), re.IGNORECASE), " or ".join(words), optional=True)


def parse_send_at(value: Any, json_path: str, errors: list) -> float | None:
    """Return seconds since the epoch, from whole seconds or from a time of ISO 8601 with its zone."""
    if type(value) is int:
        return value
    for seconds in (":%S", ":%S.%f", "") if type(value) is str else ():
        with contextlib.suppress(ValueError):
            return datetime.strptime(value, f"%Y-%m-%dT%H:%M{seconds}%z").timestamp()
    errors.append(f'{json_path}: expected whole seconds since the epoch, or a time like "2026-12-24T18:00:00+01:00"')
    return None


def normalize_key(key: str) -> str:
    """Return the one spelling of a header's key: "replyto" for Reply-To, reply_to and replyTo."""
    return key.lower().replace("-", "").replace("_", "")


# Python's name of a codec: IANA's of the charset. Codecs without one are not used, since no mail reader knows them.
IANA_NAMES = {
    "ascii": "US-ASCII", "utf-8": "UTF-8", "iso2022_jp": "ISO-2022-JP", "iso2022_jp_2": "ISO-2022-JP-2",
    "iso2022_kr": "ISO-2022-KR", "shift_jis": "Shift_JIS", "cp932": "Windows-31J", "euc_jp": "EUC-JP",
    "euc_kr": "EUC-KR", "cp949": "KS_C_5601-1987", "cp950": "Big5", "big5": "Big5", "big5hkscs": "Big5-HKSCS",
    "gb2312": "GB2312", "gbk": "GBK", "gb18030": "GB18030", "koi8-r": "KOI8-R", "koi8-u": "KOI8-U",
    "mac-roman": "macintosh", "hp-roman8": "hp-roman8", "kz1048": "KZ-1048", "ptcp154": "PTCP154",
    "tis-620": "TIS-620", "cp874": "windows-874", "cp858": "IBM00858",
}  # fmt: skip
IANA_NAMES.update({f"cp{page}": f"windows-{page}" for page in range(1250, 1259)})
IANA_NAMES.update({f"cp{page}": f"IBM{page}" for page in (437, 775, 850, 852, 855, 857, *range(860, 867), 869)})
IANA_NAMES.update({f"iso8859-{part}": f"ISO-8859-{part}" for part in (*range(1, 11), *range(13, 17))})
CODECS = {name.lower(): codec for codec, name in IANA_NAMES.items()}

NULL_SENDER = Mailbox("", "", "", ("", ""))  # of bounces, RFC 5321 4.5.5; in a header: an empty group
parse_mailbox_field = functools.partial(parse_recipient_field, allow_group=False)  # a field like From
parse_charset = matching(iana_charset, 'a charset that mail readers know, like "UTF-8"', convert=iana_charset)
parse_message_id = matching(re.compile(MESSAGE_ID), '"<left@right>"', optional=True)  # RFC 5322 3.6.4
parse_ascii_text = matching(PLAIN, "printable ASCII in words of at most 900 characters", optional=True)
parse_texts = list_of(parse_header_text, list)
parse_message_ids = list_of(
    matching(re.compile(rf" *{MESSAGE_ID}(?: +{MESSAGE_ID})* *"), '"<left@right> <left@right>"', optional=True),
    lambda texts: " ".join(" ".join(texts).split()),
)
parse_content_id = matching(CONTENT_ID, "letters, digits and @._+-", optional=True, convert=lambda cid: cid.strip("<>"))
# Fields that a client may set beside those of Header and X-...
EXTRA_FIELDS = {
    "Message-Id": parse_message_id,
    **dict.fromkeys(("In-Reply-To", "References"), parse_message_ids),
    "Date": matching(
        lambda day: DATE.fullmatch(day) and parsedate_to_datetime(day), f'a date like "{formatdate(0)}"', optional=True
    ),
    "Disposition-Notification-To": parse_mailbox_field,  # RFC 8098
    "Importance": one_of_words("high", "normal", "low"),  # RFC 4021 2.1.44
    "Priority": one_of_words("urgent", "normal", "non-urgent"),
    "Sensitivity": one_of_words("personal", "private", "company-confidential"),
    **dict.fromkeys(("List-Id", "Organization", "Comments", "Keywords"), parse_header_text),
    **dict.fromkeys(("Auto-Submitted", "Precedence", "Feedback-Id"), parse_ascii_text),  # RFC 3834
    **dict.fromkeys(("List-Archive", "List-Help", "List-Owner", "List-Post"), parse_ascii_text),  # RFC 2369
    **dict.fromkeys(("List-Subscribe", "List-Unsubscribe", "List-Unsubscribe-Post"), parse_ascii_text),  # RFC 8058
}


@dataclass(repr=False, eq=False)  # made for each mail, and creating a frozen one takes four times as long
class Header:
    from_: tuple = config_field((), parse_mailbox_field, "From; absent: the envelope sender", key="from")
    subject: str = config_field("", parse_header_text, "required")
    replyto: tuple = config_field((), parse_mailbox_field, "Reply-To", key="replyto|reply-to")
    charset: str = config_field("UTF-8", parse_charset, "of headers and body")
    loop: tuple = config_field((), parse_loop_names, "names of the Hainekos it has passed", key="x-haineko-loop")
    to: tuple = config_field((), parse_recipient_list, "To; with it all recipients get the same message")
    cc: tuple = config_field((), parse_recipient_list, "Cc; the same")
    bcc: tuple = config_field((), parse_recipient_list, "more recipients, in no header")
    extra_fields: tuple = ()  # ((name, value), ...)


FIELD_BY_KEY = {normalize_key(name): name for name in EXTRA_FIELDS}
OTHER_NAMES = {  # of the keys outside of header, in other programs
    "body": "text textbody plain content message", "rcpt": "recipient recipients mailto rcptto", "html": "htmlbody",
    "mail": "sender mailfrom", "attachments": "files attachment", "send_at": "sendat", "dry_run": "dryrun",
    "ehlo": "", "helo": "", "recv": "", "raw": "", "async": "", "trace": "",
}  # fmt: skip
KEYS_BY_NAME = {name: key for key, names in OTHER_NAMES.items() for name in (key, *names.split())}
HEADER_HINTS = {name: f"{key}, outside of header" for name, key in KEYS_BY_NAME.items()}
SUBMISSION_HINTS = {
    **{normalize_key(key): f"header.{key.lower()}" for key in (*EXTRA_FIELDS, *reversed(key_table(Header)))},
    **KEYS_BY_NAME, "contenttype": "html or attachments[].type", "mimetype": "attachments[].type",
}  # fmt: skip
ATTACHMENT_HINTS = {"data": '"content"', "contentid": '"cid"', "disposition": '"inline"',
                    **dict.fromkeys(("contenttype", "mimetype", "mediatype"), '"type"')}  # fmt: skip


def hint_of(hints: dict, key: str, known: Any) -> str:
    """Return what an unknown key may mean, by a table of names that are keys elsewhere or by its spelling."""
    meant = hints.get(normalize_key(key))
    return f"; did you mean {meant}?" if meant else did_you_mean(key, known)


def parse_header(value: Any, json_path: str, errors: list) -> Header:
    own = key_table(Header)
    if not isinstance(value, dict) or value.keys() <= own.keys():  # the usual spelling
        return from_dict(Header, value, json_path, errors)
    rows = {normalize_key(key): row for key, row in own.items()}
    values, extra, seen = {}, [], {}
    twice = getattr(value, "duplicate_keys", ())[:MAX_ERRORS]
    errors += [f"{json_path}.{sanitize(key)}: duplicate key" for key in twice]
    for key, item in value.items():
        if len(errors) >= MAX_ERRORS or len(extra) > MAX_FIELDS:
            break
        normalized, item_path = normalize_key(key), f"{json_path}.{sanitize(key)}"
        if seen.setdefault(normalized, key) != key:
            errors.append(f"{item_path}: means the same as {sanitize(seen[normalized])}, which is set already")
        elif normalized in rows:
            attribute, parse = rows[normalized]
            values.update({} if item is None else {attribute: parse(item, item_path, errors)})
        elif name := field_name(key, isinstance(value, OpenHeader)):
            found = EXTRA_FIELDS.get(name, parse_texts)(item, item_path, errors) if item is not None else []
            extra += [(name, text) for text in (found if type(found) is list else [found]) if text]
        elif RESERVED_FIELDS.fullmatch(normalized):
            errors.append(f"{item_path}: Haineko makes this field itself")
        else:
            known = [*own, *map(str.lower, EXTRA_FIELDS)] if len(errors) < MAX_HINTS else []
            errors.append(f"{item_path}: unknown key{hint_of(HEADER_HINTS, key, known)}")
    if len(extra) > MAX_FIELDS or sum(len(text) for _, text in extra) > MAX_HEADER:
        errors.append(f"{json_path}: more than {MAX_FIELDS} fields or {MAX_HEADER} characters")
    return Header(**values, extra_fields=tuple(extra))


class OpenHeader(dict):
    """A header in which any field may be set that Haineko does not make itself."""


def field_name(key: str, any_name: bool) -> str:
    """Return the name of the field that a key means which is none of Header's own, "" if it means none."""
    if re.fullmatch(r"[Xx][-_][A-Za-z0-9](?:[A-Za-z0-9._-]{0,70}[A-Za-z0-9])?", key):
        return "-".join(word[:1].upper() + word[1:] for word in re.split("[-_]", key))
    normalized = normalize_key(key)
    is_open = any_name and re.fullmatch("[!-9;-~]{1,76}", key) and not RESERVED_FIELDS.fullmatch(normalized)
    return FIELD_BY_KEY.get(normalized, key if is_open else "")


def parse_base64(value: Any, json_path: str, errors: list) -> bytes:
    """Return the octets of a base64 string (RFC 4648 4); white space in it is ignored."""
    text = "".join(parse_unicode_text(value, json_path, errors).split())
    with contextlib.suppress(ValueError):
        octets = binascii.a2b_base64(text)
        # a2b_base64() skips characters that are not of its alphabet: the length shows whether there were any.
        if len(octets) == len(text) // 4 * 3 - text[-2:].count("=") and len(text) % 4 == 0:
            return octets
    errors.append(f"{json_path}: is not base64")
    return b""


def parse_file_name(value: Any, json_path: str, errors: list) -> str:
    value = parse_unicode_text(value, json_path, errors).strip()
    if re.search("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", value):  # bidi ones make fdp.exe look like exe.pdf
        errors.append(f"{json_path}: has a control character")
    elif "/" in value or "\\" in value or value in (".", ".."):
        errors.append(f'{json_path}: expected a name without a path, got "{sanitize(value, 80)}"')
    elif len(value) > MAX_FILE_NAME:
        errors.append(f"{json_path}: {len(value)} characters exceed the limit of {MAX_FILE_NAME}")
    return value


def parse_media_type(value: Any, json_path: str, errors: list) -> str:
    """Return a media type with its parameters (RFC 2045 5.1), folded as it is written in a message."""
    value = parse_header_text(value, json_path, errors)
    found = MEDIA_TYPE.fullmatch(value) if len(value) <= MAX_MEDIA_TYPE else None
    if value and not found:
        errors.append(f'{json_path}: expected a media type like "application/pdf", got "{sanitize(value, 80)}"')
    if not found:
        return ""
    name, parameters = found[1].lower(), MEDIA_PARAMETER.findall(found[2])
    if name.startswith(("multipart/", "message/")) and name != "message/rfc822":
        errors.append(f"{json_path}: {name} can't be attached; use application/octet-stream")
    return name + "".join(f";\r\n {key}={word}" for key, word in parameters if key.lower().rstrip("*") != "name")


@dataclass(frozen=True, repr=False, eq=False)
class Attachment:
    filename: str = config_field("", parse_file_name, "its name; absent: none")
    type: str = config_field("", parse_media_type, "media type; absent: guessed from the name")
    content: bytes | None = config_field(None, parse_base64, "base64; required")
    cid: str = config_field("", parse_content_id, 'shown in the HTML where that says "cid:..."')
    inline: bool = config_field(False, parse_boolean, "shown with the text, not offered as a file")


def parse_attachments(value: Any, json_path: str, errors: list) -> tuple:
    if type(value) is list and len(value) > MAX_ATTACHMENTS:
        errors.append(f"{json_path}: {len(value)} exceed the limit of {MAX_ATTACHMENTS}")
        return ()
    before, cids = len(errors), set()
    parse = functools.partial(from_dict, Attachment, hint=functools.partial(hint_of, ATTACHMENT_HINTS))
    attachments = list_of(parse)(value, json_path, errors)
    for i, item in enumerate(attachments if len(errors) == before else ()):
        if item.content is None:
            errors.append(f"{json_path}[{i}].content: is missing")
        elif item.type.startswith("message/") and NOT_7BIT.search(item.content):
            reason = "message/rfc822 must be ASCII in lines of at most 998 octets; use application/octet-stream"
            errors.append(f"{json_path}[{i}].type: {reason}")
        if item.cid and item.cid in cids:
            errors.append(f"{json_path}[{i}].cid: another attachment has it already")
        cids.add(item.cid)
    return attachments


class ParsedMessage(NamedTuple):
    fields: list  # of (name in lower case, octets of the field); lines end with LF
    body: bytes


@dataclass(frozen=True, repr=False, eq=False)
class Base64Message:
    base64: bytes = config_field(b"", parse_base64, "octets of a message")


def parse_raw(value: Any, json_path: str, errors: list) -> ParsedMessage:
    """Return a finished message (RFC 5322), from a string or {"base64": ...}."""
    if isinstance(value, dict):
        octets = from_dict(Base64Message, value, json_path, errors).base64
    else:
        octets = parse_unicode_text(value, json_path, errors).encode("utf-8", "replace")
    try:
        message = parse_message(octets, strict=True)
        if message.body and not message.fields:
            raise ValueError("has no header")
    except ValueError as error:
        errors.append(f"{json_path}: {error}")
        return ParsedMessage([], b"")
    return message


def parse_message(octets: bytes, strict: bool = False) -> ParsedMessage:
    """Parse a message with any line ends; ValueError says which field is wrong, or which limit is exceeded. A line that
    is no field ends the header, as for sendmail, unless `strict`."""
    found = re.match(rb">?From (?![ \t]*:)[^\n]*\n", octets)  # of an mbox
    octets = octets[found.end() :] if found else octets
    parts: list = []
    for part in mime_parts(octets):
        parts.append(part)
        for what, count, limit in (
            ("parts", len(parts), MAX_PARTS),
            ("levels of parts", part.depth, MAX_NESTING),
            ("fields in a header", len(part.header), MAX_FIELDS),
            ("octets of a header", part.body - part.start, MAX_HEADER),
        ):
            if count > limit:
                raise ValueError(f"{count} {what} exceed the limit of {limit}")
    if any(part.encoding == "binary" for part in parts):  # no SMTP path carries it, and its CR and LF are no line ends
        octets = rewrite_parts(octets, parts, _encode_binary)
    octets = octets.replace(b"\r\n", b"\n")
    header, body = read_header(octets, 0, len(octets))
    end = sum([len(field) for _, field in header])
    if strict and header and octets[end : end + 1] not in (b"\n", b""):
        line = sanitize(octets[end : end + 80].partition(b"\n")[0].decode("utf-8", "replace"))
        number = octets.count(b"\n", 0, end) + 1
        raise ValueError(f'line {number} is neither a header field nor the empty line behind them: "{line}"')
    return ParsedMessage([_clean_field(*item) for item in header], octets[body:].replace(b"\r", b"\n"))


def _clean_field(name: str, octets: bytes) -> tuple:
    """Return (name, octets) without blanks before the colon (RFC 5322 4.5) and in lines of at most 998 octets."""
    label, _, value = octets.partition(b":")
    octets = fold_long_lines(label.rstrip() + b":" + value + (b"" if value.endswith(b"\n") else b"\n"))
    fault = ""
    if b"\r" in value or b"\0" in value:
        fault = "has a CR or NUL"
    elif LONG_LINE.search(octets):
        fault = "has a line longer than 998 octets"
    elif (
        not is_utf8(octets) and STRUCTURED_FIELDS.fullmatch(name) and not re.sub(rb"\([^()]*\)", b"", octets).isascii()
    ):
        fault = "has octets that are neither ASCII nor UTF-8"
    if fault:
        raise ValueError(f"header {sanitize(label.decode().strip())}: {fault}")
    return name, octets


def fold_long_lines(octets: bytes) -> bytes:
    """Fold a field's lines of more than 998 octets at blanks; what follows a word longer than that stays."""
    return LONG_LINE.sub(lambda line: b"\r\n".join(LINE_PIECE.findall(line[0])), octets)


def is_utf8(octets: bytes) -> bool:
    with contextlib.suppress(UnicodeDecodeError):
        return octets.decode() is not None
    return False


class MIMEPart:
    """A part of a message: its header, and where it stands. A multipart or message within is a part of its own."""

    def __init__(self, octets: bytes, start: int, end: int, depth: int) -> None:
        self.header, self.body = read_header(octets, start, end)
        self.start, self.end, self.depth, self.is_leaf = start, end, depth, True
        values = {name: unfold(field) for name, field in reversed(self.header) if name.startswith("content-t")}
        self.content_type = values.get("content-type", "")
        self.media_type = self.content_type.partition(";")[0].strip().lower() or "text/plain"
        self.is_text = self.media_type.startswith("text/")
        self.encoding = values.get("content-transfer-encoding", "").partition("(")[0].strip().lower()

    def parameter(self, name: str) -> str:
        found = re.search(rf';\s*{name}\s*=\s*("(?:[^"\\]|\\.)*"|[^\s;"]+)', self.content_type, re.IGNORECASE)
        return unquote(found[1]) if found else ""


def mime_parts(octets: bytes, start: int = 0, end: int = -1, depth: int = 0) -> Any:
    """Yield the parts of a message (RFC 2046 5.1), each before those within it. A multipart without parts is a leaf."""
    part, inner = MIMEPart(octets, start, len(octets) if end < 0 else end, depth), []
    if part.media_type == "message/rfc822" and part.encoding not in ("base64", "quoted-printable"):
        inner = [(part.body, part.end)]
    elif part.media_type.startswith("multipart/") and (boundary := part.parameter("boundary").encode()):
        delimiter, start = re.compile(rb"\n--" + re.escape(boundary) + rb"(--)?[ \t]*\r?(?=\n|\Z)"), 0
        for found in delimiter.finditer(octets, part.body - 1, part.end):
            end = found.start() - (1 if octets.endswith(b"\r", start, found.start()) else 0)  # CR LF before a delimiter
            inner += [(start, max(start, end))] if start else []
            start = min(found.end() + 1, part.end)
            if found[1]:
                break
        else:  # the last delimiter is missing
            inner += [(start, part.end)] if start else []
    part.is_leaf = not inner
    yield part
    for start, end in inner:
        yield from mime_parts(octets, start, end, depth + 1)


def read_header(octets: bytes, start: int, end: int) -> tuple:
    """Return ([(name in lower case, octets of the field), ...], start of the body)."""
    header, at = [], start
    while len(header) < MAX_FIELDS + 100 and (found := RAW_FIELD.match(octets, at, end)):  # 100: compose() adds some
        header.append((found[1].decode().lower(), found[0]))
        at = found.end()
    empty_line = 2 if octets.startswith(b"\r\n", at, end) else 1 if octets.startswith(b"\n", at, end) else 0
    return header, at + empty_line


def rewrite_parts(octets: bytes, parts: list, rewrite: Callable, keep_8bit: bool = True) -> bytes:
    """Return the message with the (fields, body) that rewrite(part, body) gives for each part."""
    dropped = b"" if keep_8bit else HIGH_OCTETS  # of delimiters, and of text between parts that nobody reads
    out, at = [], 0
    for part in parts:
        header, body = rewrite(part, octets[part.body : part.end] if part.is_leaf else b"")
        blank_line = octets[part.start + sum(len(octets) for _, octets in part.header) : part.body]
        out += [octets[at : part.start].translate(None, dropped), *(field for _, field in header), blank_line, body]
        at = part.end if part.is_leaf else part.body
    return b"".join([*out, octets[at:].translate(None, dropped)])


def _encode_binary(part: MIMEPart, body: bytes) -> tuple:
    """Return (fields, body) of a part, in base64 if it is marked as binary and is not text in lines."""
    if part.encoding != "binary":
        return part.header, body
    if not part.is_leaf or (part.is_text and not part.parameter("charset").lower().startswith(("utf-16", "utf-32"))):
        return set_encoding(part.header, ""), body
    return set_encoding(part.header, "base64"), base64_lines(body)[:-2]


def set_encoding(header: list, encoding: str) -> list:
    """Return the fields of a part with another Content-Transfer-Encoding, "" for none."""
    name = "content-transfer-encoding"
    new = [(name, f"Content-Transfer-Encoding: {encoding}\r\n".encode())] if encoding else []
    return [item for item in header if item[0] != name] + new


def base64_lines(octets: bytes) -> bytes:
    """Return base64 in lines of 76 characters and CRLF (RFC 2045 6.8)."""
    blocks: list = []
    for at in range(0, len(octets), 57 * 4096):  # 57 octets make a line
        coded = binascii.b2a_base64(octets[at : at + 57 * 4096], newline=False)
        blocks += [b"\r\n".join(re.findall(rb"(?s).{1,76}", coded)), b"\r\n"]  # (?s): without a look at each octet
    return b"".join(blocks)


def unfold(octets: bytes) -> str:
    """Return the value of a header field on one line."""
    return re.sub(r"\r?\n", "", octets.decode("utf-8", "replace").partition(":")[2]).strip()


def header_recipients(header: list) -> list:
    """Return the addresses in To, Cc and Bcc. A field that is no address list stands for itself, to be refused."""
    found: list = []
    for text in [unfold(octets) for name, octets in header if name in ("to", "cc", "bcc")]:
        try:
            found += [mailbox.as_written for _, mailbox in parse_mailboxes(text)]
        except ValueError:
            found.append(text)
    return found


@dataclass(repr=False, eq=False)  # made for each mail, and creating a frozen one takes four times as long
class Submission:
    ehlo: str | None = config_field(None, parse_unicode_text, "the client's name", key="ehlo|helo")
    mail: str = config_field("", parse_unicode_text, "envelope sender", key="mail|send|from")
    rcpt: tuple | None = config_field(None, list_of(parse_unicode_text), "envelope recipients", key="rcpt|recv|to")
    header: Header = config_field(Header(), parse_header)
    body: str = config_field("", parse_unicode_text, "the text")
    async_: bool = config_field(False, parse_boolean, "true: answered at once, delivered from the queue", key="async")
    send_at: float | None = config_field(None, parse_send_at, "delivered then, ISO 8601 or seconds since the epoch")
    dry_run: bool = config_field(False, parse_boolean, "true: all but delivery; the answer has the message in `raw`")
    trace: bool = config_field(False, parse_boolean, "true: each item of the answer has the SMTP `dialogue`")
    html: str = config_field("", parse_unicode_text, "the same in HTML")
    attachments: tuple = config_field((), parse_attachments, "files")
    raw: ParsedMessage | None = config_field(None, parse_raw, "a finished message instead of header, body, html, files")

    @property
    def shared(self) -> bool:
        """Return whether all recipients get the same message."""
        return bool(self.raw or self.header.to or self.header.cc)


class SubmissionResult(NamedTuple):
    submission: Submission | None  # None if there are errors
    errors: list
    is_json: bool = True  # False: the one error is that of the JSON decoder


def parse_submission(body: Any) -> SubmissionResult:
    if b"\x1b" in body:  # old clients send ISO-2022-JP with its escape character as it is
        body = body.replace(b"\x1b", b"\\u001b")
    try:
        document = parse_json(body)
    except ValueError as error:
        start = bytes(body[:500]).strip()
        hint = "" if start else "; the body is empty"
        if re.match(rb"[\w.%+\[\]-]{1,200}=", start) or (start.startswith(b"--") and b"form-data" in start):
            hint = "; it looks like form data: send JSON"
        return SubmissionResult(None, [sanitize(str(error)) + hint], is_json=False)
    # Only keys and values have plain quotes in JSON.
    charset = re.search(rb'(?i)"char[-_]?set"\s*:\s*"([^"\\]*)"', body) if b"\\u001" in body else None
    try:
        if charset and iana_charset(charset[1].decode("latin-1")) == "ISO-2022-JP":
            decode_jis_strings(document)
    except ValueError as error:
        return SubmissionResult(None, [sanitize(str(error))])
    except RecursionError:
        return SubmissionResult(None, ["nested too deeply"], is_json=False)
    return parse_document(document)


def parse_document(document: Any) -> SubmissionResult:
    errors: list = []
    submission = from_dict(Submission, document, "", errors, functools.partial(hint_of, SUBMISSION_HINTS))
    header, raw = submission.header, submission.raw
    if submission.html and not any(error.startswith("attachments") for error in errors):
        links = content_id_links(submission.html)
        cids = {item.cid: i for i, item in enumerate(submission.attachments) if item.cid}
        unknown = sorted(links - cids.keys())[:MAX_HINTS]
        errors += [f'html: "cid:{sanitize(link, 80)}" has no attachment with this cid' for link in unknown]
        errors += [f'attachments[{i}].cid: the HTML has no "cid:{cid}"' for cid, i in cids.items() if cid not in links]
    if raw:
        both = [key for key in ("header", "body", "html", "attachments") if document.get(key) is not None]
        errors += [f"{key}: can't stand beside raw" for key in both]
        passed = ",".join(unfold(octets) for name, octets in raw.fields if name == "x-haineko-loop").split(",")
        submission.header = header = Header(
            loop=tuple(name for name in map(str.strip, passed) if DOMAIN.fullmatch(name))
        )
    if submission.rcpt is None:
        named = [mailbox.as_written for _, mailbox in header.to + header.cc if mailbox.as_written]
        submission.rcpt = tuple(header_recipients(raw.fields) if raw else named)
    submission.rcpt += tuple(mailbox.as_written for _, mailbox in header.bcc if mailbox.as_written)
    return SubmissionResult(None if errors else submission, errors)


def content_id_links(html: str) -> set:
    return {urllib.parse.unquote(unescape(link)) for link in CID_LINK.findall(html)}


def is_expensive(work: Any) -> bool:
    """Return whether to parse this body, or to compose this Submission, may take over 5 ms and belongs in a thread."""
    if isinstance(work, (bytes, bytearray)):
        per_octet = 0.4 if b'"raw"' in work or b"\\u00" in work else 0.01  # the key may be escaped
        return len(work) > 2048 and per_octet * len(work) + 1.5 * work.count(b'"') + 10 * work.count(b"@") > 5000
    if not isinstance(work, Submission):  # of a provider's client, perhaps one of many
        return True
    header, raw = work.header, work.raw or ParsedMessage([], b"")
    cost = (0.01 if raw.body.isascii() else 0.3) * len(raw.body)  # microseconds, estimated high
    cost += 10 * len(raw.fields) + 30 * raw.body.count(b"\n--")
    cost += (0.02 if header.charset in ("UTF-8", "US-ASCII") else 0.5) * len(work.body)
    cost += (0.1 if work.body else 0.5) * len(work.html)
    cost += sum(25 + 0.008 * len(item.content or b"") for item in work.attachments)
    cost += 0.6 * len(header.subject) + sum(5 + 0.6 * len(value) for _, value in header.extra_fields)
    mailboxes = header.from_ + header.replyto + header.to + header.cc
    return cost + sum(15 + 0.6 * len(name) for name, _ in mailboxes) > 5000


def decode_jis_strings(table: Any, json_path: str = "") -> None:
    """Decode the strings in an object or list that hold ISO-2022-JP itself."""
    for key, value in table.items() if isinstance(table, dict) else enumerate(table):
        item_path = f"{json_path}[{key}]" if isinstance(table, list) else f"{json_path}.{sanitize(key)}".lstrip(".")
        if type(value) is str:
            try:
                table[key] = jis_to_text(value)
            except ValueError as error:
                raise ValueError(f"{item_path}: {error}") from None
        elif isinstance(value, (dict, list)):
            decode_jis_strings(value, item_path)


def jis_to_text(text: str) -> str:
    """Decode the ISO-2022-JP (RFC 1468, and the rows and kana that CP50220 adds) that a string holds."""
    if "\x1b" not in text or not text.isascii():
        return text

    def decode(found: re.Match) -> str:
        escape, segment = found.groups()
        is_wide, table = escape[0] == "$", JIS_TABLES.get(escape, {})
        return jis_bytes_to_text(segment.encode()) if is_wide else segment.translate(table)

    text = re.sub(r"\x1b(\$[@B]|\([BJI])([^\x1b]*)", decode, text)
    if re.search(r"\x1b[$(]", text):
        raise ValueError("has an escape sequence that is not ISO-2022-JP's")
    return text


def jis_bytes_to_text(octets: bytes) -> str:
    """Decode JIS X 0208 with NEC's and IBM's rows, two octets a character; ValueError if it is not that."""
    if not re.fullmatch(rb"[!-~]*", octets):
        raise ValueError("claims to be ISO-2022-JP and isn't")
    if len(octets) % 2:
        raise ValueError("claims to be ISO-2022-JP and ends within a character")
    shifted = bytearray()
    for row, cell in zip(octets[::2], octets[1::2]):
        lead, trail = divmod((row - 0x21) * 94 + cell - 0x21, 188)  # code page 932 has two rows for each lead octet
        shifted += bytes((lead + (0x81 if lead < 31 else 0xC1), trail + (0x40 if trail < 63 else 0x41)))
    try:
        return shifted.decode("cp932")
    except UnicodeDecodeError:
        raise ValueError("has an unassigned character of ISO-2022-JP") from None


# ======================================================================================================================
# 6. Policy
#    Takes a request, its submission and the settings; a check gives the Reply that refuses the submission, or None.
#    check_login() sets request.login and rates are counted; otherwise checks have no side effects.
# ======================================================================================================================

WRONG_LOGINS = Rate("10/60")  # of one address, which is then blocked
SANDBOX_ROUTE = Route(mailer="Discard", host="sandbox")
MAX_SEND_AHEAD = 30 * 86400  # seconds
MAX_LOOP_NAMES = 25  # instances that one mail may pass; more is a loop through others' names


def check_login(request: Request, submission: Submission | None, settings: Settings) -> Reply | None:
    """Require a login if the section `password` has one. Wrong ones are counted for each address."""
    if not settings.password.logins or is_postmark_test(request):
        return None
    credentials = credentials_of(request)
    name = settings.password.authenticate(credentials)
    login = settings.password.logins.get(name, request.rights)
    fault = login.fault(request.client, request.now)
    if name and not fault:
        request.login, request.rights = name, login
        if login.sandbox:  # all mail is discarded
            request.settings = replace(settings, mailertable={"default": SANDBOX_ROUTE}, sendermt={})
        return None
    request.login_fault = f"{name}: {fault}" if fault else "no such name, password or key"
    source = int(request.client) >> (64 if request.client.version == 6 else 0)  # a client may have all of a /64
    state = request.limits.take(f"wrong {source}", 1, WRONG_LOGINS, block=60) if credentials else None
    if state and state.wait:
        return rate_reply(request, WRONG_LOGINS, state, "wrong logins of this address")
    return make_reply("login")


def credentials_of(request: Request) -> str:
    """Return the Authorization header of HTTP Basic (RFC 7617); a Bearer or Postmark token stands in it as it is."""
    credentials = request.headers.get("authorization", "")
    token = credentials[7:] if credentials[:7].lower() == "bearer " else ""
    if not credentials and not request.path.startswith(("/v3/", "/emails")):  # there, it may be a mail's header field
        token = request.headers.get("x-postmark-server-token", "")
    return "Basic " + base64.b64encode(token.strip().encode("latin-1")).decode() if token else credentials


def check_rate(request: Request, submission: Submission | None, settings: Settings) -> Reply | None:
    """Take the recipients from the login's budget; before they are known, require that some of it is left."""
    rate, count = request.rights.rate, request.recipient_count
    if not rate:
        return None
    state = request.limits.take(f"login {request.login}", count, rate)
    if not count and not state.remaining:
        state = state._replace(wait=state.reset - rate.seconds + rate.seconds / rate.limit)
    return rate_reply(request, rate, state, f"recipients of the login {request.login}")


def rate_reply(request: Request, rate: Rate, state: Any, counted: str) -> Reply | None:
    """Return the refusal if nothing was taken; the answer shows the state in either case."""
    request.rate = rate, state
    line = f"{rate.limit} {counted} in {rate.seconds} seconds"
    return make_reply("rate", line, retry_after=max(math.ceil(state.wait), 1)) if state.wait else None


def is_postmark_test(request: Request) -> bool:
    """Return whether a request is to be checked only; it needs no login, but an address in relayhosts."""
    is_test = request.headers.get("x-postmark-server-token") == "POSTMARK_API_TEST"
    return is_test and request.path in ("/email", "/email/batch")


def check_client(request: Request, submission: Submission | None, settings: Settings) -> Reply | None:
    """Require an address in relayhosts, unless the client has to log in."""
    if (settings.password.logins and not is_postmark_test(request)) or settings.relayhosts.open_relay:
        return None
    reason = proxied_client_error(request, settings)
    if request.client not in settings.relayhosts.relayhosts:
        reason = f"{request.client} is not in relayhosts.relayhosts"
    return make_reply("client", reason) if reason else None


def proxied_client_error(request: Request, settings: Settings) -> str:
    """Say why a request from a loopback address was not made by a program on this machine, "" if it may have been."""
    if not request.forwarded or request.client not in LOOPBACK:
        return ""
    proxy = f"{request.forwarded} from {request.peer}"
    if request.peer not in settings.httpd.trusted_proxies:
        return f"{proxy}, which is not in httpd.trusted_proxies"
    return "" if "x-forwarded-for" in request.headers else f"{proxy} without X-Forwarded-For"


def check_envelope(request: Request, submission: Submission, settings: Settings) -> Reply | None:
    """Refuse a submission that asks for what it may not, a mail in a loop, and a malformed EHLO name or sender."""
    names, ehlo, sender = submission.header.loop, submission.ehlo, submission.mail
    if (submission.send_at or 0) > request.now + MAX_SEND_AHEAD:
        return make_reply("invalid", f"send_at: expected a time at most {MAX_SEND_AHEAD // 86400} days ahead")
    is_local = request.client in LOOPBACK and not request.forwarded
    if submission.trace and not (is_local or request.rights.trace):
        return make_reply("forbidden", 'trace: only from this machine, or by a login with "trace": true')
    if len(names) > MAX_LOOP_NAMES or settings.hostname.lower() in map(str.lower, names):
        return make_reply("loop")
    if ehlo is not None and not DOMAIN.fullmatch(ehlo) and not (ehlo[:1] == "[" and parse_address(f"x@{ehlo}")):
        return make_reply("ehlo", 'ehlo: expected a domain or an address literal like "[192.0.2.1]"')
    if not sender and request.peer:  # the command sendmail, which has no peer, may send from <>
        return make_reply("mail-empty", "mail (the envelope sender) is required")
    if sender and not parse_address(sender):
        return make_reply("mail-form", *idna_hint(sender) or ('expected a bare address like "user@example.org"',))
    return None


def check_sender_fence(request: Request, submission: Submission, settings: Settings) -> Reply | None:
    """Require that the envelope sender and every author of the message are permitted to the login."""
    if request.rights.senders is None:
        return None
    authors = [parse_address(submission.mail), *(mailbox for _, mailbox in submission.header.from_)]
    for name, octets in submission.raw.fields if submission.raw else ():
        if name in ("from", "sender", "resent-from", "resent-sender"):
            try:
                authors += [mailbox for _, mailbox in parse_mailboxes(unfold(octets))] or [None]
            except ValueError:
                authors.append(None)
    for mailbox in authors:
        if not permits(request.rights.senders, mailbox):
            address = sanitize(mailbox.addr_spec) if mailbox else "a From or Sender without address"
            return make_reply("sender-policy", f"{address} is not in password.{request.login}.senders")
    return None


def permits(fence: frozenset | None, mailbox: Mailbox | None) -> bool:
    """Return True if a fence, of addresses, domains and ".domain", has the mailbox, or if there is none."""
    if fence is None or not mailbox:
        return fence is None
    return mailbox.addr_spec.lower() in fence or not fence.isdisjoint(lookup_keys(mailbox.domain.lower()))


def check_recipients(request: Request, submission: Submission, settings: Settings) -> tuple:
    """Return ({recipient as written: the Reply that refuses it, or None}, Mailboxes of those not refused), each once;
    raise Rejected if there are none or too many."""
    given, limit, unique = submission.rcpt, settings.smtpd.max_rcpts_per_message, {}
    if not given or given == ("",):
        raise Rejected(make_reply("rcpt-none", "rcpt is required, unless header has to, cc or bcc"))
    if not limit or len(given) <= 100 * limit + 1000:  # past that, comparing the addresses would take too long
        for as_written in given:
            mailbox = parse_address(as_written)
            unique.setdefault(mailbox.key if mailbox else as_written, (as_written, mailbox))
    count = len(unique) or len(given)
    if 0 < limit < count:
        raise Rejected(make_reply("rcpt-many", f"{count} recipients exceed smtpd.max_rcpts_per_message ({limit})"))
    replies, accepted = {}, []
    for as_written, mailbox in unique.values():
        reply = check_recipient(mailbox, settings, as_written)
        if not reply and not permits(request.rights.recipients, mailbox):
            reply = make_reply("rcpt-policy", f"it is not in password.{request.login}.recipients")
        replies[as_written] = reply
        accepted += [] if reply else [mailbox]
    return replies, accepted


def check_message(request: Request, submission: Submission, settings: Settings) -> Reply | None:
    raw, limit, size = submission.raw, settings.smtpd.max_message_size, request.message_size
    if not (submission.body or submission.html or (raw and raw.fields)):
        return make_reply("body-empty", "raw: it has no header fields" if raw else "body or html is required")
    if 0 < limit < size:
        return make_reply("too-big", f"{size} octets exceed smtpd.max_message_size ({limit})")
    if not submission.header.subject and not raw:
        return make_reply("subject-empty", "header.subject is required")
    return None


# The checks of each stage, in the order in which faults are reported.
CHECKS = {
    "head": (check_login, check_client, check_rate),  # before the body is read; there is no submission yet
    "submission": (check_envelope, check_sender_fence),  # then check_recipients()
    "message": (check_message, check_rate),  # if a recipient is left; a refused mail counts for nothing
}


def apply_checks(checks: tuple, request: Request, submission: Submission | None, settings: Settings) -> None:
    """Raise Rejected by the first check that refuses the submission."""
    for check in checks:
        if reply := check(request, submission, settings):
            raise Rejected(reply)


def check_recipient(mailbox: Mailbox | None, settings: Settings, as_written: str = "") -> Reply | None:
    if not mailbox:
        return make_reply("rcpt-form", *idna_hint(as_written))
    known, domain, address = settings.recipients, mailbox.domain.lower(), mailbox.addr_spec.lower()
    if known.open_relay or domain in known.domainpart or address in known.recipients:
        return None
    return make_reply("rcpt-policy", "neither recipients.domainpart nor recipients.recipients has it")


# ======================================================================================================================
# 7. Messages
#    Takes a Submission, gives a Message: header and body as octets, ready for every relay. Knows charsets, MIME and the
#    limits on lines; the recipients of a copy, the clock and the queue id are arguments.
# ======================================================================================================================

_OFFICE = "application/vnd.openxmlformats-officedocument."
EXTRA_MEDIA_TYPES = {  # that not every version of Python has
    ".ods": "application/vnd.oasis.opendocument.spreadsheet", ".odt": "application/vnd.oasis.opendocument.text",
    ".pptx": _OFFICE + "presentationml.presentation", ".docx": _OFFICE + "wordprocessingml.document",
    ".xlsx": _OFFICE + "spreadsheetml.sheet", ".webp": "image/webp", ".tgz": "application/gzip",
    ".gz": "application/gzip", ".rtf": "application/rtf", ".ics": "text/calendar", ".md": "text/markdown",
}  # fmt: skip

# Marks in the output of HTMLTextExtractor: table cell, line end, line of its own, paragraph. Words have no other white
# space than blanks; one that stays is a no-break space. BLOCK_MARKS stand at the start and at the end of an element.
CELL, BREAK, LINE, PARAGRAPH = "\t\n\v\r"
START_MARKS = {"br": BREAK, "hr": f"-----{LINE}", "li": "* ", "td": CELL, "th": CELL}
BLOCK_MARKS = dict.fromkeys(("address", "dd", "div", "dl", "dt", "figcaption", "footer", "form", "header", "hr", "li",
                             "main", "nav", "section", "tr"), LINE)  # fmt: skip
BLOCK_MARKS.update(dict.fromkeys(("article", "blockquote", "figure", "h1", "h2", "h3", "h4", "h5", "h6", "ol", "p",
                                  "pre", "table", "ul"), PARAGRAPH))  # fmt: skip
PREFORMATTED = str.maketrans({" ": "\xa0", "\t": "\xa0" * 8, "\v": "", "\r": ""})

PLAIN_NAME = re.compile("[ !#-;=-~]+")  # ASCII without the quotes and brackets that some readers remove twice
NEEDS_ENCODING = re.compile(rb"[^\x20-\x7e\t\r\n]|^[^\r\n]{79}", re.MULTILINE)
CP932_TO_JIS = str.maketrans("～∥－￠￡￢—", "〜‖−¢£¬―")  # Windows' names of JIS X 0208; those of Python's codec
UNSENDABLE = re.compile(rb"\0|^[^\r\n]{999}", re.MULTILINE)  # RFC 5321 2.3.8, RFC 5322 2.1.1
ENCODED_WORDS = re.compile(r"(=\?[!->@-~]+\?[BbQq]\?[!->@-~]*\?=)")
ENCODED_WORD_8BIT = re.compile(rb"=\?[!->@-~]{1,40}\?[Qq]\?[^?\s]*\?=")
PARAMETER = re.compile(r';[ \t]*([^\s;="]+)[ \t]*=[ \t]*("(?:[^"\\]|\\.)*"?|[^;"]*)')
COMMENT_8BIT = re.compile(r"\(([^()\\\x80-\U0010ffff]*[\x80-\U0010ffff][^()\\]*)\)")
rfc5322_date = functools.lru_cache(maxsize=4)(functools.partial(formatdate, localtime=True))


def compose(submission: Submission, queueid: str, client: IPAddress, hostname: str, now: float) -> Message:
    """Compose the message in the charset asked for, or in UTF-8 if that can't hold every character."""
    date, address = rfc5322_date(int(now)), str(client or "127.0.0.1")
    peer = f"[IPv6:{address}]" if ":" in address else f"[{address}]"  # as the trace field has it, RFC 5321 4.4
    trace = f"Received: from {submission.ehlo or peer} ({peer})\r\n\tby {hostname} with HTTP id {queueid};\r\n\t{date}"
    if submission.raw:
        return complete_raw_message(submission, trace, queueid, hostname, date)
    try:
        return _compose(submission, submission.header.charset, trace, queueid, hostname, date)
    except UnicodeEncodeError:
        return _compose(submission, "UTF-8", trace, queueid, hostname, date)


def _compose(submission: Submission, charset: str, trace: str, queueid: str, hostname: str, date: str) -> Message:
    header, sender = submission.header, parse_address(submission.mail)
    author = header.from_ or (("", sender),)
    lines = [trace, address_field("From", author, charset)]
    if len(author) > 1 or author[0][1].key != sender.key:
        lines.append(f"Sender: {sender.addr_spec}")
    # What differs from copy to copy is a NUL, which no field can have: the recipient and the number of the copy.
    lines += [] if submission.shared else ["To: \0"]
    number = "1" if submission.shared else "\0"
    for name, mailboxes in (("To", header.to), ("Cc", header.cc), ("Reply-To", header.replyto)):
        lines += [address_field(name, mailboxes, charset)] if mailboxes else []
    extra: dict = {}
    for name, value in header.extra_fields:
        make_field = address_field if type(value) is tuple else text_field
        extra.setdefault(name, []).append(make_field(name, value, charset))
    fields = {"Date": [f"Date: {date}"], "Message-Id": [f"Message-Id: <{queueid}.{number}@{hostname}>"], **extra}
    lines += [text_field("Subject", header.subject, charset), *itertools.chain(*fields.values())]
    lines += [fold("X-Haineko-Loop:", ", ".join([*header.loop, hostname]).split()), "MIME-Version: 1.0", ""]
    octets, html = "\r\n".join(lines).encode(), submission.html
    # The richest form of the text is the last (RFC 2046 5.1.4); then come the files.
    pictures = [file_part(item, charset) for item in submission.attachments if html and item.cid]
    files = [file_part(item, charset) for item in submission.attachments if not (html and item.cid)]
    whole = text_part("plain", submission.body or html_to_text(html), charset)
    if html:
        shown = multipart("related", queueid, text_part("html", html, charset), *pictures)
        whole = multipart("alternative", queueid, whole, shown)
    whole = multipart("mixed", queueid, whole, *files)
    *parts, last = octets.split(b"\0")  # where Message.copy() inserts what differs
    utf8 = not octets.isascii()  # only an address can be other than ASCII
    return Message((*parts, b"".join([last, *whole])), utf8, utf8)


def text_part(subtype: str, text: str, charset: str) -> list:
    """Return [header, body] of a part that is text, with CRLF and no line over 998 octets (RFC 5322 2.1.1)."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    encoding, body = "7bit", encode_text((text.removesuffix("\n") + "\n").replace("\n", "\r\n"), charset)
    if (NOT_7BIT if charset == "ISO-2022-JP" else NEEDS_ENCODING).search(body):
        coded, quoted = base64_lines(body), b""
        if 4 * len(body.translate(None, HIGH_OCTETS)) > 3 * len(body):  # else quoted-printable would be longer
            quoted = binascii.b2a_qp(body, istext=True)
        encoding, body = ("quoted-printable", quoted) if 0 < len(quoted) <= len(coded) else ("base64", coded)
    head = f"Content-Type: text/{subtype}; charset={charset}\r\nContent-Transfer-Encoding: {encoding}\r\n\r\n"
    return [head.encode(), body]


def multipart(subtype: str, queueid: str, *parts: Any) -> list:
    """Return the octets of a multipart, whose boundary occurs in no part; one part alone stays as it is."""
    if len(parts) == 1:
        return parts[0]
    boundary = f"=_{queueid}.{subtype}"  # the queue id is random
    root = '; type="text/html"' if subtype == "related" else ""  # RFC 2387 3.1
    pieces = [f'Content-Type: multipart/{subtype}{root};\r\n boundary="{boundary}"\r\n'.encode()]
    for part in parts:
        pieces += [f"\r\n--{boundary}\r\n".encode(), *part]
    return [*pieces, f"\r\n--{boundary}--\r\n".encode()]


def file_part(item: Attachment, charset: str) -> list:
    """Return [header, body] of an attachment, whose content arrives unchanged."""
    extension = os.path.splitext(item.filename)[1].lower()
    guess = EXTRA_MEDIA_TYPES.get(extension) or mimetypes.types_map.get(extension, "message/")  # alike on all systems
    media_type = item.type or ("application/octet-stream" if guess.startswith("message/") else guess)
    in_type = in_disposition = ""
    if PLAIN_NAME.fullmatch(item.filename) and "=?" not in item.filename:
        in_type, in_disposition = f';\r\n name="{item.filename}"', f';\r\n filename="{item.filename}"'
    elif item.filename:  # in encoded words for readers that do not know RFC 2231
        words = "\r\n ".join(encoded_words(item.filename, charset, 7))
        in_type, in_disposition = f';\r\n name="{words}"', rfc2231_parameter("filename", item.filename, charset)
    disposition = "inline" if item.cid or item.inline else "attachment"
    encoding, body = "base64", base64_lines(item.content)
    if media_type.startswith("message/"):  # RFC 2046 5.2.1 allows no encoding; parse_attachments() checks that
        encoding, body = "7bit", item.content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    head = f"Content-Type: {media_type}{in_type}\r\nContent-Transfer-Encoding: {encoding}\r\n"
    head += f"Content-Disposition: {disposition}{in_disposition}\r\n"
    return [(head + (f"Content-ID: <{item.cid}>\r\n\r\n" if item.cid else "\r\n")).encode(), body]


def rfc2231_parameter(name: str, text: str, charset: str) -> str:
    """Return a parameter with any characters, in lines of its own (RFC 2231 3)."""
    coded = f"{charset}''{urllib.parse.quote_from_bytes(encode_text(text, charset), safe='')}"
    if len(coded) <= 60:
        return f";\r\n {name}*={coded}"
    return "".join(f";\r\n {name}*{i}*={part}" for i, part in enumerate(re.findall("(?:%..|[^%]){1,20}", coded)))


def html_to_text(html: str) -> str:
    """Return the plain text of HTML: words and lines, targets of links, descriptions of pictures."""
    extractor = HTMLTextExtractor()
    # Some versions of the parser fail on sections like <![if ...]>. Without close(), what is unfinished is left out.
    extractor.feed(re.sub(r"<!\[(?:[^>-]|-(?!->))*>?", "<! >", html) + "\n")
    text = re.sub(r"[ \t]+", lambda run: CELL if CELL in run[0] else " ", "".join(extractor.out))
    # Marks in a row become one line end, two for a paragraph ("\r"), or as many as there are breaks ("\n").
    text = re.sub(r"[ \t]?[\n\v\r][ \t\n\v\r]*", lambda run: "\n" * max(1 + ("\r" in run[0]), run[0].count("\n")), text)
    return text.strip(" \t\n").replace(CELL, "  ").replace("\xa0", " ") + "\n"


class HTMLTextExtractor(HTMLParser):
    """Parser that writes down the text of HTML, with marks for its layout."""

    CDATA_CONTENT_ELEMENTS = ("script", "style", "title", "template")  # all within them is data, which is not shown

    def __init__(self) -> None:
        super().__init__()
        self.out: list = []
        self.pre_depth = 0  # of <pre>
        self.link, self.link_start = "", 0  # target of the open link, and the length of `out` at its start

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.out.append(BLOCK_MARKS.get(tag, "") + START_MARKS.get(tag, ""))
        if tag == "a":
            self.link, self.link_start = dict(attrs).get("href") or "", len(self.out)
        elif tag == "img":
            self.handle_data(dict(attrs).get("alt") or "")
        self.pre_depth += 1 if tag == "pre" else 0

    def handle_endtag(self, tag: str) -> None:
        self.out.append(BLOCK_MARKS.get(tag, ""))
        self.pre_depth -= 1 if tag == "pre" and self.pre_depth else 0
        if tag == "a" and self.link.startswith(("http:", "https:", "mailto:")):
            text = "".join(self.out[self.link_start :]).strip()
            if text and self.link not in (text, f"mailto:{text}"):
                self.handle_data(f" <{self.link}>")
            self.link = ""

    def handle_data(self, data: str) -> None:
        if self.cdata_elem not in self.CDATA_CONTENT_ELEMENTS:
            self.out.append(data.translate(PREFORMATTED) if self.pre_depth else re.sub(r"[ \t-\r]+", " ", data))


def address_field(name: str, mailboxes: tuple, charset: str) -> str:
    """Return a field of mailboxes; the addresses stay outside the encoded words (RFC 2047 5)."""
    tokens: list = []
    for display_name, mailbox in mailboxes:
        if mailbox is NULL_SENDER:
            tokens.append(f"{display_name}:;,")
        elif not display_name:
            tokens.append(f"{mailbox.addr_spec},")
        else:
            tokens += [*phrase_tokens(display_name, charset, len(name) + 2), f"<{mailbox.addr_spec}>,"]
    return fold(f"{name}:", tokens)[:-1]


@cache_short(512)
def phrase_tokens(text: str, charset: str, used: int) -> tuple:
    """Return a display name as atoms, as a quoted string or as encoded words."""
    if "=?" not in text and PHRASE.fullmatch(text) and "  " not in text:
        return tuple(text.split(" "))
    if "=?" not in text and re.fullmatch(r"[\x20-\x7e]{1,60}", text):
        return ('"' + re.sub(r'(["\\])', r"\\\1", text) + '"',)
    return tuple(encoded_words(text, charset, used))


def text_field(name: str, value: str, charset: str) -> str:
    """Return a field of text: as it is if a reader gets the same text back, else in encoded words, if it may be."""
    if (PLAIN.fullmatch(value) and "=?" not in value) or STRUCTURED_FIELDS.fullmatch(name.lower()):
        whole = f"{name}: {value}"
        return whole if len(whole) <= 78 else fold(f"{name}:", value.split(" "))
    if len(name) + len(charset) > 60:  # no room for a word in the first line
        return "\r\n ".join([f"{name}:", *encoded_words(value, charset, 1)])
    return fold(f"{name}:", encoded_words(value, charset, len(name) + 2))


def fold(line: str, tokens: Any) -> str:
    """Append tokens to a field's name, with a new line before each that would pass column 76 (RFC 2047 2)."""
    lines, column = [line], len(line)
    for token in tokens:
        separator = "\r\n " if column + 1 + len(token) > 76 and len(lines) > 1 else " "
        lines += [separator, token]
        column = (column if separator == " " else 0) + 1 + len(token)
    return "".join(lines)


def encoded_words(value: str, charset: str, used: int) -> list:
    """Return encoded words (RFC 2047) of whole characters, for lines of 76 columns; `used` of the first are taken."""
    words, room, start = [], max(76 - used, 1), 0
    value = wide_kana(value) if charset == "ISO-2022-JP" else value  # else a sound mark could be split off
    while start < len(value) or not words:
        size, limit = min(len(value) - start, room), (room - len(charset) - 7) // 4 * 3  # characters, octets
        while len(coded := encode_text(value[start : start + size], charset)) > limit and size > 1:
            size = max(1, min(size - 1, size * limit // len(coded) + 1))
        words.append(f"=?{charset}?B?{binascii.b2a_base64(coded, newline=False).decode()}?=")
        start, room = start + size, 75
    return words


def encode_text(text: str, charset: str) -> bytes:
    """Return the octets of a text; UnicodeEncodeError if the charset can't hold it."""
    if charset in CHARSETS:
        return CHARSETS[charset](text)
    octets = text.encode(codec_name(charset))
    if octets.decode(codec_name(charset), "replace") != text:  # EUC-JP turns a yen sign into a backslash
        raise UnicodeEncodeError(charset, text, 0, len(text), "no such character")
    return octets


def encode_jis(text: str) -> bytes:
    """Encode ISO-2022-JP as CP50220 does: half-width kana become full-width, NEC's and IBM's characters stay."""
    if "\x1b" in text:  # a reader would take it for the start of a sequence
        raise UnicodeEncodeError("iso2022_jp", text, text.index("\x1b"), text.index("\x1b") + 1, "no character")
    with contextlib.suppress(UnicodeEncodeError):  # as nearly always, in a third of the time
        return text.translate(CP932_TO_JIS).encode("iso2022_jp")
    table, out = jis_extensions(), []
    for i, run in enumerate(re.split(f"([{''.join(table)}]+)", wide_kana(text).translate(CP932_TO_JIS))):
        out.append(b"\x1b$B%b\x1b(B" % b"".join(map(table.get, run)) if i % 2 else run.encode("iso2022_jp"))
    return b"".join(out)


def wide_kana(text: str) -> str:
    marks = {0x3099: "゛", 0x309A: "゜"}  # those that stand alone
    return re.sub("[\uff61-\uff9f]+", lambda kana: unicodedata.normalize("NFKC", kana[0]).translate(marks), text)


@functools.lru_cache(maxsize=1)
def jis_extensions() -> dict:
    """Return {character: two octets} of NEC's row 13 and IBM's rows 89 to 92, as far as JIS X 0208 does not have it."""
    table: dict = {}
    for octets in map(bytes, itertools.product((0x2D, 0x79, 0x7A, 0x7B, 0x7C), range(0x21, 0x7F))):
        with contextlib.suppress(ValueError):  # unassigned
            character = jis_bytes_to_text(octets)
            if not character.encode("iso2022_jp", "ignore"):
                table.setdefault(character, octets)
    return table


# Others are encoded by Python's codecs. Octets of an unknown charset stand in a string as Latin-1.
CHARSETS = {"UTF-8": str.encode, "ISO-2022-JP": encode_jis, "unknown-8bit": lambda text: text.encode("latin-1")}


def complete_raw_message(submission: Submission, trace: str, queueid: str, hostname: str, date: str) -> Message:
    """Complete a finished message: add trace and loop fields and required ones that are missing, remove Bcc. Its other
    octets stay as they are, unless no path can carry them; raise Rejected if nothing can be done about that."""
    body, names = submission.raw.body, {name for name, _ in submission.raw.fields}
    dropped = ("bcc", "resent-bcc", "return-path", "x-haineko-loop")
    author = submission.mail or f"MAILER-DAEMON@{hostname}"
    missing = {"From": f"<{author}>", "Date": date, "Message-Id": f"<{queueid}.1@{hostname}>"}
    ours = [f"{name}: {value}" for name, value in missing.items() if name.lower() not in names]
    ours.append(fold("X-Haineko-Loop:", ", ".join([*submission.header.loop, hostname]).split()))
    without_mime = not names & {"mime-version", "content-type", "content-transfer-encoding"}
    if without_mime and not (body.isascii() and not UNSENDABLE.search(body)):
        charset = "unknown-8bit"  # RFC 1428
        if is_utf8(body):
            charset = "ISO-2022-JP" if b"\x1b$" in body else "US-ASCII" if body.isascii() else "UTF-8"
        ours += ["MIME-Version: 1.0", f"Content-Type: text/plain; charset={charset}", "Content-Transfer-Encoding: 8bit"]
    head = [trace.encode() + b"\n", *(octets for name, octets in submission.raw.fields if name not in dropped)]
    octets = b"".join([*head, "\n".join([*ours, "", ""]).encode(), body, b"" if body.endswith(b"\n") else b"\n"])
    octets = octets.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    if not octets.isascii() or UNSENDABLE.search(octets):
        octets = downgrade_8bit(octets, keep_8bit=True, keep_utf8=True)
        if UNSENDABLE.search(octets):
            raise Rejected(make_reply("line-length"))
    return Message((octets,), not octets.isascii(), bool(non_ascii_fields(octets)))


def non_ascii_fields(octets: bytes) -> list:
    """Return the names of the header fields, those of parts included, that need SMTPUTF8 (RFC 6532 3)."""
    parts = () if octets.isascii() else mime_parts(octets)
    return list(dict.fromkeys(name for part in parts for name, line in part.header if not line.isascii()))


def downgrade_8bit(octets: bytes, keep_8bit: bool = False, keep_utf8: bool = False) -> bytes:
    """Return the message with each part encoded where a path without 8BITMIME (RFC 6152 3) and SMTPUTF8 can't carry it;
    `keep_8bit` and `keep_utf8`: the path has them. What has no form in ASCII, such as an address, stays."""
    parts = list(mime_parts(octets))

    def convert(part: MIMEPart, body: bytes) -> tuple:
        header, charset = [], part.parameter("charset") or parts[0].parameter("charset")
        for name, line in part.header:
            sendable = line.isascii() or (keep_utf8 and is_utf8(line))
            header.append((name, fold_long_lines(line if sendable else encode_field(name, line, charset))))
        if not (part.is_leaf and (UNSENDABLE if keep_8bit else NOT_7BIT).search(body)):
            return (set_encoding(header, "") if part.encoding == "8bit" and not keep_8bit else header), body
        if part.encoding == "base64":
            with contextlib.suppress(binascii.Error):
                body = binascii.a2b_base64(body + b"===")
        elif part.encoding == "quoted-printable":
            body = binascii.a2b_qp(body)
        if part.is_text and part.encoding != "base64":
            # b2a_qp() writes line ends as the first line has them.
            return set_encoding(header, "quoted-printable"), binascii.b2a_qp(body + b"\r\n", istext=True)[:-2]
        return set_encoding(header, "base64"), base64_lines(body)[:-2]

    octets = rewrite_parts(octets, parts, convert, keep_8bit)
    return octets if octets.endswith(b"\r\n") else octets + b"\r\n"


def encode_field(name: str, octets: bytes, charset: str) -> bytes:
    """Return a field in ASCII, encoded as its grammar allows. Octets that are not UTF-8 are in the message's charset,
    or in an unknown one (RFC 1428). What can't be encoded, such as an address, stays."""
    label, _, value = octets.partition(b":")
    # Those within an encoded word are in the charset that it names.
    value = ENCODED_WORD_8BIT.sub(lambda word: re.sub(rb"[\x80-\xff]", lambda c: b"=%02X" % ord(c[0]), word[0]), value)
    if value.isascii():
        return label + b":" + value
    label, text, known = label.decode("ascii").strip(), value.decode("latin-1"), "unknown-8bit"
    for codec in (codec_name(iana_charset(charset)), "utf-8"):
        with contextlib.suppress(UnicodeDecodeError, LookupError):
            text, known = value.decode(codec), "UTF-8"
    encode = functools.partial(encoded_words, charset=known, used=len(label) + 3)
    text = " ".join(re.split(r"[\r\n]+[ \t]*", text.strip()))
    if name in PARAMETER_FIELDS:
        names = {found[1].lower() for found in PARAMETER.finditer(text)}
        text = PARAMETER.sub(functools.partial(_encode_parameter, names), text)
    elif name in MAILBOX_FIELDS:
        text = encode_phrases(text, encode)
    elif not STRUCTURED_FIELDS.fullmatch(name):
        pieces = enumerate(ENCODED_WORDS.split(text))
        words = [[piece] if i % 2 else encode(piece) for i, piece in pieces if piece.strip()]
        return fold(f"{label}:", itertools.chain(*words)).encode() + b"\r\n"
    text = COMMENT_8BIT.sub(lambda found: f"({' '.join(encode(found[1]))})", text)
    return fold(f"{label}:", text.split(" ") if name in MAILBOX_FIELDS else [text]).encode() + b"\r\n"


def encode_phrases(text: str, encode: Callable) -> str:
    """Return an address list with the names of mailboxes and groups in encoded words where they are not ASCII."""
    out, kinds = [], ("atom", "quoted", "blank")
    for is_phrase, run in itertools.groupby(ADDRESS_TOKEN.finditer(text), lambda found: found.lastgroup in kinds):
        tokens = [found[0] for found in run]
        phrase = "".join(tokens)
        if is_phrase and not phrase.isascii() and "@" not in phrase:
            phrase = " ".join(["", *encode("".join(map(unquote, tokens)).strip()), ""])  # blanks: RFC 2047 5
        out.append(phrase)
    return "".join(out).strip()


def _encode_parameter(names: set, found: re.Match) -> str:
    if found[0].isascii():
        return found[0]
    if not names.isdisjoint((f"{found[1].lower()}*", f"{found[1].lower()}*0*")):
        return ""  # the extended form says it already, and a name may come once
    if found[1].endswith("*") and found[2].lower().startswith("utf-8'"):
        return re.sub(r"[^\x00-\x7f]+", lambda octets: urllib.parse.quote(octets[0]), found[0])
    return rfc2231_parameter(found[1].rstrip("*"), unquote(found[2].strip()), "UTF-8")


# ======================================================================================================================
# 8. Routes
#    Takes domains of recipient and sender, gives the Route of the settings and the table row that it comes from.
# ======================================================================================================================

FALLBACK_ROUTE = Route(port=25)


def resolve_route(domain: str, sender_domain: str, settings: Settings) -> tuple:
    """Return (Route, reason) for mail to `domain`; the look-up costs as much as the domain has labels."""
    tables = (("mailertable", settings.mailertable, domain), ("sendermt", settings.sendermt, sender_domain))
    rows = [(name, table, row) for name, table, key in tables if table for row in lookup_keys(key.lower())]
    for name, table, row in (*rows, *((name, table, "default") for name, table, _ in tables)):
        if row in table:
            return table[row], f"{name}.default" if row == "default" else f'{name}["{row}"]'
    return FALLBACK_ROUTE, "no route matches"


# ======================================================================================================================
# 9. Event loop
#    asyncio's loop with sockets that may speak TLS (smtplib's, which asyncio refuses), and limits over all processes.
# ======================================================================================================================

TLS_WRITES = {ssl.SSLWantReadError: False, ssl.SSLWantWriteError: True}  # TLS may have to read in order to write
WOULD_BLOCK = (BlockingIOError, *TLS_WRITES)


def run(coroutine: Any) -> Any:
    """Return what a coroutine returns, run by an event loop of its own."""
    with contextlib.closing(EventLoop()) as loop:
        return loop.run_until_complete(coroutine)


class EventLoop(asyncio.SelectorEventLoop):
    """Event loop with threads of its own, which keeps its tasks and sends the data of one iteration together."""

    def __init__(self, selector: Any = None) -> None:
        super().__init__(selector)
        self.tasks: set = set()  # asyncio itself holds weak references only
        self.sends: list = []  # AsyncSockets with something to send
        self.set_default_executor(ThreadPoolExecutor(256))  # a dead host holds 32, while sessions to it are opened

    def create_task(self, coroutine: Any, **options: Any) -> asyncio.Task:
        task = super().create_task(coroutine, **options)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def default_exception_handler(self, context: dict) -> None:
        """Log the exception of a task that nobody awaits."""
        try:
            raise context.get("exception") or RuntimeError(context["message"])
        except BaseException:
            log_exception("loop")

    def flush_sends(self) -> None:
        """Send the data of one iteration, after the log lines about it."""
        log.flush()
        sends, self.sends = self.sends, []
        for sock in sends:
            sock.flush()


class RateState(NamedTuple):
    wait: float  # seconds, 0 if it was taken
    remaining: int
    reset: float  # seconds until all of it is back


class SharedLimits:
    """Limits over all processes of a server: rates (GCRA) and counts of open sessions. Made before the workers fork.
    A rate is one number in shared memory: the theoretical arrival time of the next unit. A session is a lock on one
    octet of a file without a name, so that the kernel gives back those of a process that died."""

    SLOTS, PROBES = 4096, 16  # places in the table; how many are looked at for one key
    MAX_SESSIONS = 1 << 16  # octets that one route may lock; the first octet is locked while the table is in use

    def __init__(self) -> None:
        self.fingerprints = memoryview(mmap.mmap(-1, 8 * self.SLOTS)).cast("q")  # of keys; 0: the place is free
        self.arrivals = memoryview(mmap.mmap(-1, 8 * self.SLOTS)).cast("d")  # monotonic times
        in_memory = functools.partial(os.memfd_create, "haineko") if hasattr(os, "memfd_create") else None
        self.file: Any = (in_memory or tempfile.TemporaryFile)()
        self.lock = threading.Lock()  # locks of files hold between processes only
        self.sessions: set = set()  # octets locked by this process; fcntl does not report a process's own locks

    def take(self, key: str, count: int, rate: Rate, block: int = 0) -> RateState:
        """Take `count` units, or none if there are not enough of them yet, and then none for `block` seconds more."""
        fingerprint = hash(key) | 1  # not 0; the same in all processes that are forked
        each, now = rate.seconds / rate.limit, time.monotonic()
        places = range(first := fingerprint % (self.SLOTS - self.PROBES), first + self.PROBES)
        with self.lock:
            fcntl.lockf(self.file, fcntl.LOCK_EX, 1)
            own = [place for place in places if self.fingerprints[place] == fingerprint]
            place = own[0] if own else min(places, key=self.arrivals.__getitem__)  # free, or due first
            arrival = max(self.arrivals[place], now) if own else now
            wait = arrival + each * min(count, rate.limit) - now - rate.seconds
            if wait < 1e-6:
                wait, arrival = 0.0, arrival + each * min(count, rate.limit)
            elif block and arrival <= now + rate.seconds:  # it was not blocked yet
                wait, arrival = float(block), now + rate.seconds + block - each
            self.fingerprints[place], self.arrivals[place] = fingerprint, arrival
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1)
        return RateState(wait, max(int((now + rate.seconds - arrival) / each + 1e-6), 0), arrival - now)

    def open_session(self, key: str, limit: int) -> int:
        """Lock one of the key's `limit` octets and return it; 0 where all are taken."""
        first = 1 + hash(key) % (1 << 44) * self.MAX_SESSIONS
        for octet in itertools.filterfalse(self.sessions.__contains__, range(first, first + limit)):
            with contextlib.suppress(OSError):
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, octet)
                self.sessions.add(octet)
                return octet
        return 0

    def close_session(self, octet: int) -> None:
        fcntl.lockf(self.file, fcntl.LOCK_UN, 1, octet)
        self.sessions.discard(octet)  # last: until then no other thread of this process locks it again


class AsyncSocket:
    """Non-blocking socket, plain or TLS, for which one task at a time waits; deadlines are monotonic times.
    It stays registered with the loop until an event finds nothing to do, and has one timer, set again when it fires:
    so a wait costs no system call, and an idle connection nothing. Release or close it before its number is reused."""

    def __init__(self, sock: Any) -> None:
        self.sock, self.loop = sock, asyncio.get_running_loop()
        self.future = self.operation = self.timer = None  # of the task that waits
        self.alarm, self.deadline, self.writing = math.inf, 0.0, False  # when the timer fires; what is waited for
        self.watched = [False, False]  # for reading, for writing
        self.outbox: list = []  # buffers to be sent
        self.flush_writing, self.send_error = True, None  # the event that flush() needs; why the last one failed

    def recv(self, most: int, deadline: float) -> Any:
        """Return octets as they come, b"" at the end; to be awaited. TLS may have some buffered, without an event."""
        operation = functools.partial(self.sock.recv, most)
        if isinstance(self.sock, ssl.SSLSocket):
            return self.call(operation, deadline)
        return self.wait_ready(deadline, operation=operation)

    async def sendall(self, octets: Any, deadline: float) -> None:
        """Send octets in the next iteration: peers wake once for many, which saves a fifth of the CPU time. Only much
        data is waited for: if little can't be sent, the next recv() tells why."""
        if not self.outbox:
            if not self.loop.sends:
                self.loop.call_soon(self.loop.flush_sends)
            self.loop.sends.append(self)
        self.outbox.append(octets)
        if len(octets) > LARGE or len(self.outbox) > 16:
            await self.drain(deadline)

    async def drain(self, deadline: float) -> None:
        """Wait until the kernel has all that is sent; raise OSError if it can't be sent."""
        await asyncio.sleep(0)
        while self.outbox:
            await self.wait_ready(deadline, self.flush_writing)
        if self.send_error:
            raise self.send_error

    def flush(self) -> None:
        """Send what waits, or what the kernel takes of it; the rest follows at the next event."""
        try:
            while self.outbox:
                sent = self.sock.send(self.outbox[0])
                self.outbox[:1] = [memoryview(self.outbox[0])[sent:]] if sent < len(self.outbox[0]) else []
        except WOULD_BLOCK as error:
            self.flush_writing = TLS_WRITES.get(type(error), True)
            self._watch(self.flush_writing)
        except (OSError, ValueError) as error:
            self.outbox, self.send_error = [], error

    async def call(self, operation: Callable, deadline: float) -> Any:
        """Return what an operation on the socket returns once it need not block; socket.timeout at the deadline."""
        try:
            if deadline <= time.monotonic():
                raise socket.timeout("timed out")
            result = operation()
        except WOULD_BLOCK as error:
            return await self.wait_ready(deadline, TLS_WRITES.get(type(error), False), operation)
        await asyncio.sleep(0)  # a peer that sends faster than it is read must not keep the others waiting
        return result

    def wait_ready(self, deadline: float, writing: bool = False, operation: Callable = bool) -> asyncio.Future:
        """Wait until the socket can be read (or written) and the operation does not block; to be awaited."""
        if deadline <= time.monotonic():
            raise socket.timeout("timed out")
        if not self.watched[writing]:
            self._watch(writing)
        self.future, self.operation = self.loop.create_future(), operation
        self.deadline, self.writing = deadline, writing
        if deadline < self.alarm:
            self._set_timer()
        return self.future

    def _watch(self, writing: bool, on: bool = True) -> None:
        if self.watched[writing] != on:
            name = ("add_" if on else "remove_") + ("writer" if writing else "reader")
            getattr(self.loop, name)(self.sock, *((self._ready, writing) if on else ()))
            self.watched[writing] = on

    def _ready(self, writing: bool) -> None:
        """Try the operation at once when an event comes: the next iteration would report the same event again."""
        flushes = bool(self.outbox) and self.flush_writing == writing
        if flushes:
            self.flush()
        if self.future and not self.future.done() and self.writing == writing:
            try:
                self.future.set_result(self.operation())
            except WOULD_BLOCK as error:
                self.writing = TLS_WRITES.get(type(error), writing)
                self._watch(self.writing)
            except Exception as error:
                self.future.set_exception(error)
        elif not flushes:
            self._watch(writing, on=False)

    def _set_timer(self) -> None:
        """End the wait if its deadline has passed; set the timer to the deadline of a wait that goes on."""
        if self.deadline <= time.monotonic():
            self.abort(socket.timeout("timed out"))
        if self.timer:
            self.timer.cancel()
        self.alarm = self.deadline if self.future and not self.future.done() else math.inf
        self.timer = self.loop.call_at(self.alarm, self._set_timer) if self.alarm < math.inf else None

    def abort(self, error: Exception) -> bool:
        """Raise an exception in the task that waits; False if none does."""
        waits = bool(self.future) and not self.future.done()
        if waits:
            self.future.set_exception(error)
        return waits

    def release(self) -> None:
        """Unregister; the socket itself stays open."""
        self.abort(ConnectionAbortedError("closed"))
        self._watch(False, on=False)
        self._watch(True, on=False)
        self._set_timer()

    def close(self) -> None:
        self.release()
        self.sock.close()


# ======================================================================================================================
# 10. DNS and connections
#     Takes a name and a record type, gives the answer of the name servers (RFC 1035); from that come a domain's mail
#     hosts (RFC 5321 5.1) and a host's addresses. A Connector connects to whichever address answers first.
# ======================================================================================================================

random_unit = random.SystemRandom().random  # an unpredictable number from 0 up to 1

A, CNAME, MX, TXT, AAAA = 1, 5, 15, 16, 28  # record types
NOERROR, SERVFAIL, NXDOMAIN, TRUNCATED = 0, 2, 3, 16  # RFC 1035 4.1.1; 16 is ours: incomplete, or too many records
RCODES = {1: "FORMERR", 2: "SERVFAIL", 4: "NOTIMP", 5: "REFUSED", TRUNCATED: "too much"}
MAX_ALIASES = 8  # CNAME records followed for one answer
NEGATIVE_TTL = 60  # seconds for which it is cached that there is no such record


class DNSAnswer(NamedTuple):
    code: int  # NOERROR, NXDOMAIN, or SERVFAIL if no name server gave an answer
    values: tuple = ()  # A, AAAA: address; MX: (preference, host); TXT: text. Empty if there is no such record
    why: str = ""  # the reason for SERVFAIL
    alias: str = ""  # the name to look up in place of this one
    ttl: int = 0  # seconds for which it may be cached


class TTLCache:
    """TTL cache with LRU eviction."""

    def __init__(self, limit: int, clock: Callable) -> None:
        self.limit, self.clock, self.table = limit, clock, {}

    def get(self, key: Any) -> Any:
        value, until = self.table.pop(key, (None, 0.0))
        if until <= self.clock():
            return None
        self.table[key] = value, until  # now the last to be evicted
        return value

    def put(self, key: Any, value: Any, seconds: float) -> None:
        if seconds > 0:
            self.table[key] = value, self.clock() + seconds
            if len(self.table) > self.limit:
                del self.table[next(iter(self.table))]


async def shared_call(calls: dict, key: Any, function: Callable, *values: Any) -> Any:
    """Return what function(*values) returns; concurrent calls with the same key, in `calls`, share one call."""
    if key not in calls:
        calls[key] = asyncio.get_running_loop().create_task(function(*values))
        calls[key].add_done_callback(lambda _: calls.pop(key))
    return await asyncio.shield(calls[key])


def error_text(error: Exception) -> str:
    return sanitize(getattr(error, "strerror", None) or str(error) or type(error).__name__)


class Resolver:
    """Caching DNS client of the given name servers, or of those in resolv.conf."""

    QUERY_TIMEOUT = 3.0  # seconds for one server to answer
    ATTEMPTS = 3  # rounds in which each server is asked
    MAX_TTL = 86400  # seconds

    def __init__(self, nameservers: tuple = (), clock: Callable = time.monotonic) -> None:
        self.nameservers, self.cache, self.calls = nameservers, TTLCache(4096, clock), {}

    async def lookup(self, name: str, rtype: int, deadline: float) -> DNSAnswer:
        """Return the records of a type, following aliases, by the deadline (monotonic)."""
        key = name.lower().rstrip("."), rtype
        return self.cache.get(key) or await shared_call(self.calls, key, self._lookup, *key, deadline)

    async def _lookup(self, name: str, rtype: int, deadline: float) -> DNSAnswer:
        """Ask for the name and for each alias: an answer counts for its own name alone."""
        key, ttl = (name, rtype), self.MAX_TTL
        for _ in range(MAX_ALIASES + 1):
            answer = await self._query(name, rtype, deadline)
            ttl, name = min(ttl, answer.ttl), answer.alias
            if not name:
                break
        else:
            answer, ttl = DNSAnswer(SERVFAIL, why=f"more than {MAX_ALIASES} aliases"), 0
        self.cache.put(key, answer, ttl)
        return answer

    async def _query(self, name: str, rtype: int, deadline: float) -> DNSAnswer:
        """Return the first positive or negative answer, or SERVFAIL if no server gives one."""
        if len(name) > 253:  # RFC 1035 2.3.4
            return DNSAnswer(NXDOMAIN)
        servers = tuple(map(name_server_endpoint, self.nameservers)) or resolv_conf_servers("/etc/resolv.conf")
        for server in servers * self.ATTEMPTS:
            try:
                answer = await query(server, name, rtype, min(deadline, time.monotonic() + self.QUERY_TIMEOUT))
                if answer.code in (NOERROR, NXDOMAIN):
                    return answer
                why = f"{server[0]} answers {RCODES.get(answer.code, answer.code)}"
            except (OSError, ValueError) as error:
                why = f"{server[0]}: {error_text(error)}"
            if time.monotonic() >= deadline:
                break
        return DNSAnswer(SERVFAIL, why=why)


def resolv_conf_servers(path: str) -> tuple:
    """Return (address, port) of the first three name servers in resolv.conf; this machine if it names none."""
    named: list = []
    with contextlib.suppress(OSError), open(path, encoding="ascii", errors="replace") as stream:
        named = re.findall(r"(?m)^nameserver[ \t]+(\S+)", stream.read())
    return tuple(filter(None, map(name_server_endpoint, named)))[:3] or (("127.0.0.1", 53),)


async def query(server: tuple, name: str, rtype: int, until: float) -> DNSAnswer:
    """Return a server's answer by UDP, or by TCP if that is truncated (RFC 7766 5)."""
    question, octets = (int(random_unit() * 65536), name, rtype), b""
    labels = [bytes((len(label),)) + label for label in name.encode("ascii").split(b".") if label]
    message = struct.pack(">6H", question[0], 0x0100, 1, 0, 0, 0) + b"".join(labels) + struct.pack(">BHH", 0, rtype, 1)
    # From a random port; the kernel drops datagrams of other senders.
    with contextlib.closing(AsyncSocket(start_connect(server, socket.SOCK_DGRAM))) as sock:
        await sock.sendall(message, until)
        for _ in range(64):  # a forger may not guess for as long as he likes
            with contextlib.suppress(ValueError):  # forged, late or garbled: the real answer may still come
                answer = parse_response(await sock.recv(65535, until), *question)
                break
        else:
            raise ValueError("too many datagrams that do not answer the query")
    if answer.code != TRUNCATED:
        return answer
    with contextlib.closing(AsyncSocket(start_connect(server))) as sock:
        await sock.wait_ready(until, writing=True)
        await sock.sendall(len(message).to_bytes(2, "big") + message, until)  # its length in front, RFC 1035 4.2.2
        while len(octets) < 2 + int.from_bytes(octets[:2], "big"):
            more = await sock.recv(65537 - len(octets), until)
            if not more:
                raise ConnectionError("closed within an answer")
            octets += more
    return parse_response(octets[2:], *question)


def start_connect(address: tuple, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """Return a non-blocking socket that is being connected to (IP address, port)."""
    sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, kind)
    sock.setblocking(False)
    code = sock.connect_ex(address)
    if code not in (0, errno.EINPROGRESS):
        sock.close()
        raise OSError(code, os.strerror(code))
    return sock


def parse_response(octets: bytes, number: int, name: str, rtype: int) -> DNSAnswer:
    """Parse the response to that query; ValueError if it answers another one or is none."""
    try:
        ident, flags, questions, answers = struct.unpack_from(">4H", octets)
        qname, at = read_name(octets, 12)
        question = (ident, flags >> 15, questions, qname, *struct.unpack_from(">HH", octets, at))
        if question != (number, 1, 1, name.lower(), rtype, 1):
            raise ValueError("not an answer to this query")
        if flags & 0x0200 or answers > 512:
            return DNSAnswer(TRUNCATED)
        values, ttls, at = {CNAME: [], rtype: []}, [], at + 4  # of the records of this name
        for _ in range(answers):
            owner, at = read_name(octets, at)
            kind, rclass, ttl, length = struct.unpack_from(">HHIH", octets, at)
            value = read_value(octets, at + 10, length, kind)
            if (owner, rclass) == (qname, 1) and kind in values and value is not None:
                values[kind].append(value)
                ttls.append(ttl if ttl < 1 << 31 else 0)  # RFC 2181 8
            at += 10 + length
    except (struct.error, IndexError):
        raise ValueError("incomplete message") from None
    alias = values[CNAME][0] if values[CNAME] and not values[rtype] else ""
    return DNSAnswer(flags & 15, tuple(values[rtype]), alias=alias, ttl=min(ttls, default=NEGATIVE_TTL))


def read_value(octets: bytes, at: int, length: int, rtype: int) -> Any:
    """Return the value of a record, None if it is malformed or of a type that is not used here."""
    data = octets[at : at + length]
    if len(data) < length:
        raise ValueError("incomplete record")
    if (rtype, length) in ((A, 4), (AAAA, 16)):
        return str(ipaddress.ip_address(data))
    if rtype == CNAME:
        return read_name(octets, at)[0]
    if rtype == MX:
        return int.from_bytes(data[:2], "big"), read_name(octets, at + 2)[0]
    if rtype == TXT:
        stream = io.BytesIO(data)
        strings = [stream.read(length) for (length,) in iter(lambda: stream.read(1), b"")]
        return b"".join(strings).decode("utf-8", "replace")  # RFC 7208 3.3
    return None


def read_name(octets: bytes, at: int) -> tuple:
    """Return (name in lower case without a final dot, offset behind it). RFC 1035 4.1.4"""
    labels, after = [], 0
    for _ in range(255):  # labels and pointers, which could make an endless loop
        length = octets[at]
        if not length:
            return ".".join(labels), after or at + 1
        if length >= 0xC0:
            after, at = after or at + 2, int.from_bytes(octets[at : at + 2], "big") & 0x3FFF
            continue
        label = octets[at + 1 : at + 1 + length]
        if length > 63 or len(label) < length:
            raise ValueError("bad label")
        labels.append(label.decode("latin-1").lower().replace(".", "\\."))
        at += 1 + length
    raise ValueError("name too long")


async def mx_hosts(domain: str, resolver: Resolver, hostname: str, deadline: float) -> list:
    """Return a domain's mail hosts, best first, none behind this host (RFC 5321 5.1); Rejected if there are none."""
    if domain.startswith("["):  # an address literal
        return [domain[1:-1].partition(":")[2] if domain[:6].lower() == "[ipv6:" else domain[1:-1]]
    answer = await resolver.lookup(domain, MX, deadline)
    own = min([preference for preference, host in answer.values if host == hostname.lower()], default=1 << 16)
    ranked = sorted((preference, random_unit(), host) for preference, host in answer.values if preference < own)
    hosts = list(dict.fromkeys(host for _, _, host in ranked if DOMAIN.fullmatch(host)))
    null = answer.values and not any(host for _, host in answer.values)
    slug = {SERVFAIL: "dns", NXDOMAIN: "no-domain"}.get(answer.code) or ("null-mx" if null else "mx-loop")
    if answer.code != NOERROR or (answer.values and not hosts):
        raise Rejected(make_reply(slug, f"{domain}: {answer.why}" if answer.why else domain, mailer="MX"))
    return hosts or [domain]


async def resolve_addresses(host: str, resolver: Resolver, private: bool, deadline: float) -> list:
    """Return a host's IP addresses, only public ones unless `private`; Rejected if it has none."""
    try:
        found, failure = [str(ipaddress.ip_address(host))], ""
    except ValueError:
        # IPv4 first: large receivers demand more of senders that use IPv6.
        both = [await resolver.lookup(host, rtype, deadline) for rtype in (A, AAAA)]
        found, failure = [*both[0].values, *both[1].values], both[0].why or both[1].why
    usable = [address for address in found if private or is_public(address)]
    if not usable:
        why = f"{found[0]} is not a public address" if found else failure or "no address"
        slug = "dns" if failure and not found else "no-address"
        raise Rejected(make_reply(slug, f"{host}: {why}", mailer="MX"))
    return usable


def is_public(text: str) -> bool:
    """Return whether an address is globally reachable; an IPv4 address embedded in it is judged in its place."""
    address = ipaddress.ip_address(text)
    address = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
    if address in ipaddress.ip_network("64:ff9b::/96"):  # NAT64, RFC 6052
        address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.is_global and not address.is_multicast and not getattr(address, "is_site_local", False)


class Connector:
    """Opener of TCP connections, in the caller's thread, that remembers which addresses did not answer."""

    DELAY = 0.25  # seconds until the next address is tried as well, RFC 8305 5
    FAILED_TTL = 300.0  # seconds for which an address that failed is tried last

    def __init__(self) -> None:
        self.failed: dict = {}  # (IP address, port): time until which it is tried last

    def connect(self, host: str, port: int, deadline: float) -> socket.socket:
        """Connect to the address that answers first, by the deadline (RFC 8305): families in turn, failed ones last."""
        addresses, turns = [(address, port) for address in self.look_up(host, deadline)], defaultdict(itertools.count)
        addresses.sort(key=lambda address: (self.failed_lately(address), next(turns[":" in address[0]])))
        selector, tried, error = selectors.PollSelector(), [], socket.timeout("timed out")
        try:
            while (addresses or selector.get_map()) and (seconds := deadline - time.monotonic()) > 0:
                if addresses:
                    tried.append(addresses.pop(0))
                    try:
                        selector.register(start_connect(tried[-1]), selectors.EVENT_WRITE, tried[-1])
                    except OSError as failure:  # as when this kernel has no IPv6
                        error = failure
                        continue
                for key, _ in selector.select(min(seconds, self.DELAY) if addresses else seconds):
                    selector.unregister(key.fileobj)
                    code = key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if not code:
                        tried.remove(key.data)
                        self.failed.pop(key.data, None)
                        key.fileobj.setblocking(True)
                        key.fileobj.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        return key.fileobj
                    key.fileobj.close()
                    error = OSError(code, os.strerror(code))
        finally:
            for key in selector.get_map().values():
                key.fileobj.close()
            if len(self.failed) > 1024:
                self.failed.clear()
            self.failed.update(dict.fromkeys(tried, time.monotonic() + self.FAILED_TTL))
        raise error

    def failed_lately(self, address: tuple) -> bool:
        return self.failed.get(address, 0.0) > time.monotonic()

    def look_up(self, host: str, deadline: float) -> list:
        """Return a host's IP addresses, or those that stand in its place, divided by spaces."""
        with contextlib.suppress(ValueError):
            return [str(ipaddress.ip_address(address)) for address in host.split()]
        future: concurrent.futures.Future = concurrent.futures.Future()
        threading.Thread(target=self._look_up, args=(host, future), daemon=True).start()  # it takes no deadline
        try:
            return future.result(max(deadline - time.monotonic(), 0))
        except concurrent.futures.TimeoutError:
            raise socket.timeout(f"looking up {host} timed out") from None

    def _look_up(self, host: str, future: concurrent.futures.Future) -> None:
        try:
            name = host.encode("ascii" if host.isascii() else "idna")  # a str would load half a megabyte of tables
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            future.set_result(list(dict.fromkeys(item[4][0] for item in found)))
        except Exception as error:
            future.set_exception(error)


connector = Connector()


# ======================================================================================================================
# 11. HTTP client
#     Takes a target and a request, gives the response, or raises Rejected if there is none. http.client speaks HTTP, in
#     threads, since it blocks; deadlines, limits and the question whether a request may have been acted upon are ours.
# ======================================================================================================================


class HTTPTarget(NamedTuple):
    url: str  # base URL
    timeout: float  # seconds for a whole exchange, connecting included
    mailer: str | None = None  # for replies
    tls_verify: bool = True
    ca_file: str = ""
    confidential: bool = False  # credentials are sent: over TLS or to this machine only
    address: str = ""  # IP address to connect to, so that the host is not looked up
    max_response: int = 1 << 20  # octets of a response, beyond its head

    @classmethod
    def of_route(cls, route: Route) -> HTTPTarget:
        confidential = bool(route.credentials)
        return cls(route.url, route.timeout, route.mailer, route.tls_verify, route.ca_file, confidential)

    @property
    def endpoint(self) -> dict:
        """Return the fields of a Reply that identify the server."""
        return {"mailer": self.mailer, "host": split_base_url(self.url).host, "port": split_base_url(self.url).port}


class HTTPRequest(NamedTuple):
    method: str
    path: str  # appended to the path of the base URL
    body: bytes = b""
    headers: tuple = ()  # of (name, value)
    type: str = "application/json"


class HTTPResponse(NamedTuple):
    status: int
    reason: str
    headers: Any  # .get(name) ignores case
    body: bytes  # b"" if it did not arrive as a whole, or was too large

    def document(self) -> Any:
        try:
            return parse_json(self.body)
        except ValueError:
            return None


class HTTPConnectionPool:
    """Idle connections of this process by target, the most recently used last."""

    IDLE = 15.0  # seconds after which an idle connection is closed; servers do so after 20 and more
    MAX_IDLE = 64  # connections to one target

    def __init__(self) -> None:
        self.idle: dict = {}

    async def request(self, target: HTTPTarget, request: HTTPRequest) -> HTTPResponse:
        idle = self.idle.get(target)
        connection = idle.pop() if idle else KeepAliveConnection(target)
        response = await connection.fetch(request)
        idle = self.idle.setdefault(target, [])
        if connection.sock and not connection.aborted and len(idle) < self.MAX_IDLE:
            connection.expires = time.monotonic() + self.IDLE
            idle.append(connection)
        else:
            connection.close()
        return response

    def sweep(self, everything: bool = False) -> None:
        """Close the connections that have expired, or all."""
        now = time.monotonic()
        for target, idle in list(self.idle.items()):
            while idle and (everything or idle[0].expires <= now):
                idle.pop(0).close()
            if not idle:
                del self.idle[target]


class FinalResponse(http.client.HTTPResponse):
    def _read_status(self) -> tuple:
        """Skip a few interim responses (RFC 9110 15.2); http.client knows 100 only, and any number of them."""
        for _ in range(16):
            found = super()._read_status()
            if not 100 <= found[1] < 200:
                return found
            http.client.parse_headers(self.fp)
        raise http.client.HTTPException("more than 16 interim responses")


class KeepAliveConnection(http.client.HTTPConnection):
    """Connection to a target. `sent`: a request was sent as a whole and may have been acted upon."""

    response_class = FinalResponse

    def __init__(self, target: HTTPTarget) -> None:
        self.url = split_base_url(target.url)
        super().__init__(self.url.host, self.url.port, target.timeout)
        self.target, self.sent, self.aborted, self.transport = target, False, False, None
        self.expires = 0.0  # when it is closed if it stays idle; not 0.0 if it was used before

    async def fetch(self, request: HTTPRequest) -> HTTPResponse:
        """Return the response; Rejected if there is none by the target's timeout."""
        watchdog = asyncio.get_running_loop().call_later(self.timeout, self.abort)
        try:
            return await asyncio.to_thread(self._exchange, request)
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            watchdog.cancel()

    def _exchange(self, request: HTTPRequest) -> HTTPResponse:
        if self.expires and self.sock and is_readable(self.sock):
            self.close()
        kept, self.sent = self.expires and self.sock, False
        if not self.sock:
            self.open()
        self.transport = self.sock  # which http.client forgets before a response is read to its end
        self.sock.settimeout(self.timeout)
        host, path = self.url.host_header, self.url.path + request.path
        log.dialogue(host, ">", f"{request.method} {path}, {len(request.body)} octets")
        headers = {"Host": host, "User-Agent": f"Haineko/{__version__}", "Accept": "application/json, */*;q=0.5"}
        headers.update({"Content-Type": request.type} if request.method == "POST" else {}, **dict(request.headers))
        headers = {name: value.encode() for name, value in headers.items()}  # of a string, http.client makes Latin-1
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server may have said why it hung up
                self.request(request.method, path, request.body or None, headers)
                self.sent = True
            response = self._read_response()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            if kept and not self.sent and not self.aborted:
                return self._exchange(request)  # once, by a new connection
            error = socket.timeout("timed out") if self.aborted else error
            slug = "web-lost" if not self.sent else "web-unsure" if isinstance(error, OSError) else "web-rubbish"
            reply = make_reply(slug, error_text(error), maybe_delivered=self.sent, **self.target.endpoint)
            raise Rejected(reply) from None
        if self.aborted or not self.sent:
            self.close()
        log.dialogue(host, "<", f"{response.status} {response.reason}, {len(response.body)} octets")
        return response

    def open(self) -> None:
        target, site, deadline = self.target, self.url, time.monotonic() + self.timeout
        try:
            self.sock = connector.connect(target.address or site.host, site.port, deadline)
            self.sock.settimeout(max(deadline - time.monotonic(), 0.001))  # of the whole handshake
            if site.tls:
                self.sock = wrap_tls(self.sock, site.host, target)
            elif target.confidential and parse_ip(self.sock.getpeername()[0]) not in LOOPBACK:
                self.close()
                raise Rejected(make_reply("clear-auth", **target.endpoint))
            if self.aborted:
                raise socket.timeout("timed out")
        except OSError as error:
            slug = "web-tls" if self.sock and site.tls else "web-connect"
            self.close()
            raise Rejected(make_reply(slug, error_text(error), **target.endpoint)) from None

    def abort(self) -> None:
        """Have a thread that is in _exchange() fail: the deadline has passed, however fast the peer still sends."""
        self.aborted = True
        with contextlib.suppress(OSError, TypeError):  # closed, or not open yet
            socket.socket.shutdown(self.transport, socket.SHUT_RDWR)

    def _read_response(self) -> HTTPResponse:
        body, whole = b"", False
        with contextlib.closing(self.getresponse()) as response:
            if self.aborted:  # http.client takes the end of a connection for the end of the header
                raise socket.timeout("timed out")
            with contextlib.suppress(OSError, http.client.HTTPException):  # the status may be all that is needed
                while len(body) <= self.target.max_response and not self.aborted and (chunk := response.read(65536)):
                    body += chunk
                whole = not (response.length or self.aborted) and len(body) <= self.target.max_response
        if not whole:
            self.close()
        reason = sanitize(response.reason, 100)
        return HTTPResponse(response.status, reason, response.headers, body if whole else b"")


def wrap_tls(sock: socket.socket, host: str, options: Any) -> ssl.SSLSocket:
    """Return the socket after a TLS handshake; `options`, a Route or an HTTPTarget, say what is verified."""
    context = client_context(options.tls_verify, options.ca_file, stat_key(options.ca_file))
    return context.wrap_socket(sock, server_hostname=host)


def is_readable(sock: Any) -> bool:
    """Return whether an idle connection was closed by the peer, or has data that nothing asked for."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def json_object(response: HTTPResponse) -> dict:
    document = response.document()
    return document if isinstance(document, dict) else {}


def status_text(response: HTTPResponse) -> str:
    return f"HTTP {response.status} {response.reason}".strip()


class MTASTSPolicy(NamedTuple):
    """MTA-STS: the hosts that a domain's mail may be delivered to (RFC 8461 3.2)."""

    mode: str  # enforce, testing or none
    hosts: tuple  # names; "*." stands for one label
    max_age: int  # seconds

    def allows(self, host: str) -> bool:
        return self.mode != "enforce" or host in self.hosts or "*." + host.partition(".")[2] in self.hosts


class MTASTSCache:
    """The MTA-STS policies of domains, cached as long as they say."""

    FETCH_TIMEOUT = 10.0  # seconds
    NEGATIVE_TTL = 300  # seconds until a policy that could not be fetched is tried again (RFC 8461 3.3)

    def __init__(self, resolver: Resolver, http: Any, port: int = 443, clock: Callable = time.monotonic) -> None:
        self.resolver, self.http, self.port, self.calls = resolver, http, port, {}
        self.cache = TTLCache(8192, clock)  # domain: (id, MTASTSPolicy); (domain, id): it could not be fetched

    async def policy_for(self, domain: str, route: Route) -> MTASTSPolicy | None:
        """Return the domain's policy; the cached one if DNS or the web server fails: an attacker could cause that."""
        deadline = time.monotonic() + min(route.timeout, self.FETCH_TIMEOUT)
        return await shared_call(self.calls, (domain, route), self._policy_for, domain, route, deadline)

    async def _policy_for(self, domain: str, route: Route, deadline: float) -> MTASTSPolicy | None:
        policy_id, (cached_id, cached) = "", self.cache.get(domain) or ("", None)
        if not domain.startswith("["):
            policy_id = mta_sts_id((await self.resolver.lookup(f"_mta-sts.{domain}", TXT, deadline)).values)
        if policy_id in ("", cached_id) or self.cache.get((domain, policy_id)):
            return cached
        host = f"mta-sts.{domain}"
        try:
            address = (await resolve_addresses(host, self.resolver, route.private, deadline))[0]
            url, seconds = f"https://{host}:{self.port}", deadline - time.monotonic()
            target = HTTPTarget(url, seconds, "MX", ca_file=route.ca_file, address=address, max_response=65536)
            response = await self.http.request(target, HTTPRequest("GET", "/.well-known/mta-sts.txt"))
            if response.status != 200:  # redirections are not followed (RFC 8461 3.3)
                raise ValueError(f"HTTP status {response.status}")
            policy = parse_mta_sts_policy(response.body.decode("utf-8", "replace"))
        except (OSError, ValueError, Rejected) as error:
            why = ": ".join(error.reply.message) if isinstance(error, Rejected) else str(error)
            log.lines(f"cannot fetch the MTA-STS policy of {domain}: {sanitize(why)}", level="warning")
            self.cache.put((domain, policy_id), True, self.NEGATIVE_TTL)
            return cached
        self.cache.put(domain, (policy_id, policy), policy.max_age)
        return policy


def mta_sts_id(texts: tuple) -> str:
    """Return the id of a domain's policy, "" unless there is exactly one record (RFC 8461 3.1)."""
    records = [text for text in texts if text.startswith("v=STSv1")]
    found = re.fullmatch(r"v=STSv1\s*;(?:.*;)?\s*id=([A-Za-z0-9]{1,32})\s*(?:;.*)?", records[0] if records else "")
    return found[1] if found and len(records) == 1 else ""


def parse_mta_sts_policy(text: str) -> MTASTSPolicy:
    """Parse a policy, lines of "key: value"; ValueError if it is none (RFC 8461 3.2)."""
    pairs = [[part.strip() for part in line.partition(":")[::2]] for line in text.splitlines() if line.strip()]
    values = dict(reversed(pairs))  # of a repeated key, the first counts
    hosts = tuple(value.lower().rstrip(".") for key, value in pairs if key == "mx")
    mode, age = values.get("mode", ""), values.get("max_age", "")
    valid = values.get("version") == "STSv1" and (mode == "none" or (mode in ("enforce", "testing") and hosts))
    if not (valid and re.fullmatch(r"[0-9]{1,10}", age)):
        raise ValueError("not an MTA-STS policy")
    return MTASTSPolicy(mode, hosts, min(int(age), 31557600))


# ======================================================================================================================
# 12. Signatures
#     Takes finished octets and a PrivateKey; gives DKIM-Signature (RFC 6376, 8463) or a JSON Web Token (RFC 7519).
# ======================================================================================================================


async def sign_transaction(transaction: Transaction) -> Transaction:
    """Return a transaction with its message signed, if its route permits that, there is a key and none has signed."""
    route = transaction.route
    if not (transaction.dkim and route.dkim and route.row.keeps_octets):
        return transaction
    if route.host.lower().rstrip(".").endswith(".amazonaws.com"):  # SES changes Date and Message-Id, then signs itself
        return transaction
    tasks = transaction.signed if transaction.signed is not None and len(transaction.message.parts) == 1 else {}
    if "message" not in tasks:
        signing = asyncio.to_thread(signed_message, transaction, int(time.time()))
        tasks["message"] = asyncio.get_running_loop().create_task(signing)
    return transaction._replace(message=await asyncio.shield(tasks["message"]))


def signed_message(transaction: Transaction, now: int) -> Message:
    """Return the message signed for the domain of From or the nearest one above it, unless that has signed already."""
    octets, message = transaction.octets(), transaction.message
    header, _ = read_header(octets, 0, octets.index(b"\r\n\r\n") + 2)  # parse_message() would apply clients' limits
    try:
        authors = parse_mailboxes(next((unfold(value) for name, value in header if name == "from"), ""))
    except ValueError:
        return message
    key = find_dkim_key(authors[0][1].domain, transaction.dkim) if authors else None
    signatures = [parse_tags(unfold(value)) for name, value in header if name == "dkim-signature"]
    if not key or key.domain in [tags.get("d", "").lower() for tags in signatures]:
        return message
    if message.needs_8bitmime:  # it would be converted after the signature for a server without 8BITMIME
        octets = downgrade_8bit(octets)
        message = Message((octets,), not octets.isascii(), not octets.partition(b"\r\n\r\n")[0].isascii())
    first, *others = message.parts
    return message._replace(parts=(dkim_signature(octets, key, now) + first, *others))


def find_dkim_key(domain: str, keys: dict) -> DkimKey | None:
    """Return the key of a domain or of the nearest domain above it."""
    names = (name.lstrip(".") for name in lookup_keys(domain_key(domain)))
    return next((keys[name] for name in names if name in keys), None)


def parse_tags(record: str) -> dict:
    """Return {tag: value} of a list "a=b; c=d" (RFC 6376 3.2)."""
    pairs = [part.partition("=")[::2] for part in record.split(";") if "=" in part]
    return {key.strip().lower(): value.strip() for key, value in pairs}


def dkim_signature(octets: bytes, key: DkimKey, now: int) -> bytes:
    """Return the field DKIM-Signature, ended by CRLF, of a message with CRLF line ends; relaxed/relaxed."""
    head, _, body = octets.partition(b"\r\n\r\n")
    by_name: dict = {}
    for line in map(_relaxed_field, re.split(rb"\r\n(?![ \t])", head)):
        by_name.setdefault(line.partition(b":")[0].decode("latin-1"), []).append(line)
    listed = [name for name in DKIM_OVERSIGNED for _ in range(len(by_name.get(name, ())) + 1)]
    listed += [name for name in by_name if DKIM_IF_PRESENT.fullmatch(name) for _ in by_name[name]]
    digest = base64.b64encode(hashlib.sha256(_relaxed_body(body)).digest()).decode()
    algorithm = "ed25519" if key.private.is_ed25519 else "rsa"
    tags = ["v=1;", f"a={algorithm}-sha256;", "c=relaxed/relaxed;", f"d={key.domain};", f"s={key.selector};"]
    tags += [f"t={now};", *f"h={': '.join(listed)};".split(" "), f"bh={digest};", "b="]
    unsigned = fold("DKIM-Signature:", tags)  # the field as it is signed, with an empty "b="
    signed = [by_name[name].pop() for name in listed if by_name.get(name)]  # the last first, RFC 6376 5.4.2
    data = b"\r\n".join([*signed, _relaxed_field(unsigned.encode())])
    data = hashlib.sha256(data).digest() if key.private.is_ed25519 else data  # RFC 8463 3
    signature = base64.b64encode(key.private.sign(data)).decode()
    return "\r\n ".join([unsigned, *re.findall(".{1,76}", signature)]).encode() + b"\r\n"


DKIM_OVERSIGNED = ("from", "to", "cc", "subject", "date", "message-id", "reply-to", "mime-version", "content-type")
DKIM_OVERSIGNED += ("content-transfer-encoding",)  # signed once more than present, so that none can be added
DKIM_IF_PRESENT = re.compile("in-reply-to|references|auto-submitted|list-[a-z-]+")


def _relaxed_field(line: bytes) -> bytes:
    """Return a header field in the canonical form of RFC 6376 3.4.2."""
    name, _, value = line.partition(b":")
    return name.strip().lower() + b":" + re.sub(rb"[ \t\r\n]+", b" ", value).strip(b" ")


def _relaxed_body(body: bytes) -> bytes:
    """Return a body in the canonical form of RFC 6376 3.4.4."""
    body = re.sub(rb"[ \t]{2,}|\t", b" ", body + b"\r\n").replace(b" \r\n", b"\r\n").rstrip(b"\r\n")
    return body + b"\r\n" if body else b""


def dkim_record(key: DkimKey) -> str:
    """Return the TXT record that publishes a key (RFC 6376 3.6.1, RFC 8463 4.2)."""
    kind, public = ("ed25519", key.private.public[-32:]) if key.private.is_ed25519 else ("rsa", key.private.public)
    return f"v=DKIM1; k={kind}; p={base64.b64encode(public).decode()}"


def sign_jwt(claims: dict, key: PrivateKey) -> str:
    """Return a JSON Web Token (RFC 7519) signed by RS256 (RFC 7518 3.3), for which the key must be RSA."""
    parts = [json.dumps(part, separators=(",", ":")).encode() for part in ({"alg": "RS256", "typ": "JWT"}, claims)]
    data = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    return b".".join((data, base64.urlsafe_b64encode(key.sign(data)).rstrip(b"="))).decode()


# ======================================================================================================================
# 13. OAuth2
#     Takes a route, gives it with an access token as password, or raises Rejected with the provider's words (RFC 6749).
# ======================================================================================================================

ASSUMED_LIFETIME = 600  # seconds, if the provider names none
RENEW_BEFORE = 600  # seconds before the end


class AccessToken(NamedTuple):
    text: str
    scope: str
    renew_at: float  # monotonic
    expires: float


class TokenCache:
    """Access tokens of logins, fetched once for all that wait."""

    DROP_INTERVAL = 60  # seconds between tokens that a server refuses

    def __init__(self, http: HTTPConnectionPool, clock: Callable = time.monotonic) -> None:
        self.http, self.clock = http, clock
        self.calls: dict = {}  # fetches under way
        self.tokens: dict = {}  # (OAuth2, username): AccessToken
        self.refresh_tokens: dict = {}  # the same: what the provider gave in place of refresh_token
        self.dropped = TTLCache(4096, clock)

    async def authorize(self, route: Route) -> Route:
        """Return the route with an access token as password if its login has oauth2."""
        if not route.oauth2:
            return route
        return replace(route, credentials=(route.credentials[0], (await self.token_for(route)).text))

    async def token_for(self, route: Route) -> AccessToken:
        """Return a token that is valid for a while, or at least now."""
        key = route.oauth2, route.credentials[0]
        token, now = self.tokens.get(key), self.clock()
        if token and now < token.renew_at:
            return token
        try:
            return await shared_call(self.calls, key, self._fetch, key, route)
        except ValueError as error:
            if token and now < token.expires:
                return token
            lines = [sanitize(line, 500) for line in str(error).splitlines()[:20]]
            raise Rejected(make_reply("token", *lines, route_fault=True, **route.endpoint)) from None

    async def _fetch(self, key: tuple, route: Route) -> AccessToken:
        """Return a new token; ValueError tells why there is none."""
        (oauth2, username), now = key, self.clock()
        try:
            old = self.refresh_tokens.get(key)
            old = old or await asyncio.to_thread(read_secret, oauth2.refresh_token, oauth2.base)
            if oauth2.access_token:
                document = {"access_token": await asyncio.to_thread(read_secret, oauth2.access_token, oauth2.base)}
            else:
                form = await asyncio.to_thread(token_form, oauth2, username, old, int(time.time()))
                document = await request_token(route, form, self.http)
            token = read_token(document, oauth2.scope, now)
        except ValueError:
            self.refresh_tokens.pop(key, None)  # the one in the settings may be newer
            metrics.add("haineko_token_errors_total")
            raise
        new = document.get("refresh_token")
        if isinstance(new, str) and new not in ("", old):
            if fault := await asyncio.to_thread(save_refresh_token, oauth2, new):
                self.refresh_tokens[key] = new
                text = f"warning: the provider replaced the refresh token of {log_value(username)}: {fault}"
                log.lines(text, level="warning")
        self.tokens[key] = token
        return token

    def drop(self, route: Route) -> bool:
        """Forget the route's token, which a server refused; return whether to try another one."""
        key = route.oauth2, route.credentials[0]
        if key in self.tokens and self.tokens[key].text == route.credentials[1]:  # or another one was fetched meanwhile
            if self.dropped.get(key):
                return False
            self.dropped.put(key, True, self.DROP_INTERVAL)
            del self.tokens[key]
        return True


def read_token(document: dict, scope: str, now: float) -> AccessToken:
    """Return the token in a provider's document, which need not name the scope; ValueError if it can't be used."""
    text, seconds = document["access_token"], document.get("expires_in")
    if not (isinstance(text, str) and re.fullmatch("[!-~]+", text)):  # or it would break the line that it is sent in
        raise ValueError("the access token is not one word of ASCII")
    found = re.match("[0-9]{1,9}", str(ASSUMED_LIFETIME if seconds is None else seconds))
    lifetime = min(int(found[0]), 86400) if found else 0
    scope = sanitize(str(document.get("scope") or scope))
    return AccessToken(text, scope, now + lifetime - min(RENEW_BEFORE, lifetime / 2), now + lifetime)


async def request_token(route: Route, form: dict, http: HTTPConnectionPool) -> dict:
    """Return the provider's document with a token (RFC 6749 5.1); ValueError with its words if it gives none (5.2)."""
    url, path = WEBHOOK_URL.fullmatch(route.oauth2.token_url).group("base", "path")
    target = HTTPTarget(url, route.timeout, route.mailer, ca_file=route.ca_file, confidential=True)
    body, kind = urllib.parse.urlencode(form).encode(), "application/x-www-form-urlencoded"
    try:
        response = await http.request(target, HTTPRequest("POST", path or "/", body, type=kind))
    except Rejected as refused:
        raise ValueError(f"{url}: {refused.reply.message[-1]}") from None
    document = json_object(response)
    if response.status == 200 and document.get("access_token"):
        return document
    words = ": ".join(str(document[key]) for key in ("error", "error_description") if document.get(key))
    secrets = [form.get(key, "") for key in ("client_secret", "refresh_token", "assertion")]
    raise ValueError(mask_secrets(words or f"{url}: {status_text(response)}, no access token in it", secrets))


def token_form(oauth2: OAuth2, username: str, refresh_token: str, now: int) -> dict:
    """Return the request: a service account's (RFC 7523 2.1), a user's (RFC 6749 6) or an application's (4.4)."""
    if oauth2.service_account:
        account = parse_json(oauth2.service_account.encode())
        claims = {"iss": account["client_email"], "sub": username, "scope": oauth2.scope, "aud": oauth2.token_url}
        assertion = sign_jwt({**claims, "iat": now, "exp": now + 3600}, PrivateKey(account["private_key"].encode()))
        return {"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer", "assertion": assertion}
    form = {"grant_type": "refresh_token" if refresh_token else "client_credentials", "refresh_token": refresh_token}
    form.update(client_id=oauth2.client_id, client_secret=oauth2.client_secret, scope=oauth2.scope)
    return {key: value for key, value in form.items() if value}


def save_refresh_token(oauth2: OAuth2, text: str) -> str:
    """Write the token to its {"file"}, complete or not at all, for its owner only; return what else must be done."""
    if not (isinstance(oauth2.refresh_token, dict) and "file" in oauth2.refresh_token):
        return "put the new one into the settings; the old one may stop working"
    path, aside = os.path.realpath(os.path.join(oauth2.base, oauth2.refresh_token["file"])), ""
    try:
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), delete=False) as stream:
            aside = stream.name
            stream.write(text.encode("utf-8", "replace") + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        return f"{path} can't be written ({error.strerror}), so the new one is lost when this process ends"
    return ""


# ======================================================================================================================
# 14. SMTP sessions
#     Takes a Transaction, gives a Reply for each of its recipients. smtplib opens a session, in a thread; log-in and
#     transaction are ours, since smtplib tries a password with each mechanism, does no pipelining, and cannot tell
#     whether the end of a message was lost. Sessions are pooled by route; if a server accepts no more, mails wait.
# ======================================================================================================================

REPLY_LINE = re.compile(rb"([2-5][0-9][0-9])(?:([ \t-])(.*)|\s*)")  # the code decides, whatever the text is
DSN = re.compile(r"([245]\.\d{1,3}\.\d{1,3})(?:\s|$)")
MAX_LINE = 8192  # octets of a line; RFC 5321 4.5.3.1.5 says 512
MAX_TEXT = 2048  # characters of a line that are reported
MAX_LINES = 128  # of a reply
SEND_BLOCK = 262144  # octets of a message sent in one step
PIPELINE_WINDOW = 100  # commands without a reply at a time, so that neither side's buffer fills up (RFC 2920 3.1)
SMTPS = 465  # RFC 8314: TLS from the first byte
PASSWORD_MECHANISMS = ("CRAM-MD5", "PLAIN", "LOGIN")  # of AUTH (RFC 4954), the strongest first
TOKEN_MECHANISMS = ("XOAUTH2", "OAUTHBEARER")
CLIENT_FIRST = ("PLAIN", *TOKEN_MECHANISMS)  # these have an initial response; with one to LOGIN, some servers fail
THROTTLED = ("432", "454")  # too many connections (Microsoft), throttling failure (Amazon)


class SMTPReply(NamedTuple):
    """One reply of a server (RFC 5321 4.2)."""

    code: str
    dsn: str | None
    lines: tuple


class ProtocolError(ConnectionError):
    """The server sent something that is no SMTP reply, or one that cannot stand there."""


@cache_short(256)  # servers repeat themselves
def parse_reply(octets: bytes) -> tuple:
    """Return (first reply or None if incomplete, what follows it); ProtocolError if it is malformed."""
    code, lines, start, more = None, [], 0, True
    while more:
        end = octets.find(b"\n", start)
        if (end if end >= 0 else len(octets)) - start > MAX_LINE:
            raise ProtocolError(f"a line longer than {MAX_LINE} octets")
        if end < 0:
            return None, octets
        line = octets[start:end].rstrip(b"\r")
        found = REPLY_LINE.fullmatch(line)
        if not found or found[1] != (code or found[1]):
            raise ProtocolError(f"unexpected: {sanitize(line[:200].decode('utf-8', 'replace'))}")
        if len(lines) == MAX_LINES:
            raise ProtocolError(f"a reply of more than {MAX_LINES} lines")
        lines.append(sanitize((found[3] or b"").decode("utf-8", "replace"), MAX_TEXT))
        code, start, more = found[1], end + 1, found[2] == b"-"
    dsn = DSN.match(lines[0])
    return SMTPReply(code.decode(), dsn and dsn[1], tuple(lines)), octets[start:]


class Session(smtplib.SMTP):
    """Connection to one next hop. `step` names the command under way; `alive`: it may be used again."""

    def __init__(self, route: Route, hostname: str) -> None:
        super().__init__(local_hostname=hostname, timeout=route.timeout)
        self.route, self.step, self.masked = route, "CONN", ""  # masked: what the log shows in place of what is sent
        self.pool: Any = None  # the SessionPool that it belongs to
        self.on_close = contextlib.ExitStack()  # gives back what it has, such as a place among the route's `sessions`
        self.stream: Any = None  # AsyncSocket of the open connection
        self.recv_buffer, self.maybe_complete = b"", False  # received but not asked for yet; whether it may be a reply
        self.last_reply: Any = None  # SMTPReply to a command of smtplib's
        self.alive = self.needs_rset = self.in_data = self.eod_sent = False
        self.created_at = self.last_used = time.monotonic()

    def open(self) -> None:
        """Get ready for transactions, or raise Rejected with the server's reply. Blocks."""
        try:
            for step in self.steps():
                step()
        except OSError as error:
            self.close()
            raise Rejected(self._broken(error)) from None
        except Exception:  # Rejected, or a bug: either way the route gets its session back
            self.quit()
            raise
        self.sock.setblocking(False)
        self.alive = not self.recv_buffer

    def steps(self) -> tuple:
        """Return the steps from nothing to a session that takes mail, in order; each blocks."""
        return self._greet, self._hello, self._starttls, self._log_in

    def _greet(self) -> None:
        route, deadline = self.route, time.monotonic() + self.timeout
        self.sock = connector.connect(route.address or route.host, route.port, deadline)
        self.sock.settimeout(self.timeout)  # of the whole handshake, if there is one
        self.sock = wrap_tls(self.sock, route.host, route) if route.port == SMTPS else self.sock
        self.getreply()
        self._expect_success()
        self.local_hostname = ehlo_name(self.local_hostname, self.sock.getsockname()[0])

    def _hello(self) -> None:
        self.step = "EHLO"
        if 500 <= self.ehlo()[0] <= 599:  # RFC 5321 3.2: an old server
            self.helo()
        self._expect_success()

    def _starttls(self) -> None:
        route, self.step, offered = self.route, "STARTTLS", self.has_extn("starttls")
        if route.port == SMTPS or not (route.starttls or (route.tls_if_offered and offered)):
            return
        if not offered:
            raise Rejected(make_reply("no-starttls", **route.endpoint))
        self.docmd("STARTTLS")
        self._expect_success()
        if self.recv_buffer:  # injected in clear text, to be taken for a reply under TLS
            raise ProtocolError("data behind the reply to STARTTLS")
        self.sock.settimeout(self.timeout)  # of the whole handshake
        self.sock = wrap_tls(self.sock, route.host, route)
        self.ehlo_resp, self.esmtp_features, self.does_esmtp = None, {}, False  # RFC 3207 4.2
        self._hello()

    def _log_in(self) -> None:
        """Use the strongest mechanism offered, once; the next one only if this one is not available after all."""
        if not self.route.auth:
            return
        self.step = "AUTH"
        if not isinstance(self.sock, ssl.SSLSocket) and parse_ip(self.sock.getpeername()[0]) not in LOOPBACK:
            raise Rejected(make_reply("clear-auth", **self.route.endpoint))
        known = TOKEN_MECHANISMS if self.route.oauth2 else PASSWORD_MECHANISMS
        offered = [name for name in known if name in self.esmtp_features.get("auth", "").upper().split()]
        if not offered:
            raise Rejected(make_reply("no-auth", f"{', '.join(known)} are known", **self.route.endpoint))
        for mechanism in offered:
            self._authenticate(mechanism)
            if self.last_reply.code not in ("504", "534"):  # RFC 4954 4: unknown mechanism, too weak
                break
        self._expect_success()

    def _authenticate(self, mechanism: str) -> None:
        """Send our credentials; `last_reply` is the server's verdict, with what it told in its challenges."""
        route, line, details, initial = self.route, f"AUTH {mechanism}".encode(), b"", b""
        if mechanism in CLIENT_FIRST:
            initial = b" " + base64.b64encode(auth_response(mechanism, route))
        inline = bool(initial) and len(line + initial) <= MAX_COMMAND
        self.masked = f"AUTH {mechanism} ******** as {route.credentials[0]}"
        try:
            self.send(line + (initial if inline else b"") + b"\r\n")
            self.masked = "********"
            code, text = self.getreply()
            for turn in range(1 if inline else 0, MAX_CHALLENGES):
                if code != 334:
                    break
                if route.oauth2 and turn:
                    details += b"\n" + decode_challenge(text)
                self.send(base64.b64encode(auth_response(mechanism, route, text, turn)) + b"\r\n")
                code, text = self.getreply()
        finally:
            self.masked = ""
        more = self._mask(sanitize(details.decode("utf-8", "replace"), MAX_TEXT, keep="\n")).split("\n")[1:]
        self.last_reply = self.last_reply._replace(lines=(*self.last_reply.lines, *more))

    def _expect_success(self) -> None:
        """Raise Rejected with the server's own words unless the code of the last reply is 2xx."""
        reply = self.last_reply
        if reply.code[0] == "3":
            raise ProtocolError(f"unexpected: {reply.code} {reply.lines[0]}")
        if reply.code[0] != "2":
            raise Rejected(self._to_reply(self.step, reply))

    # -- transaction

    async def transact(self, transaction: Transaction) -> list:
        """Return a Reply for every recipient, whatever happens (RFC 5321 3.3)."""
        envelope = "".join([transaction.sender, *transaction.recipients])
        utf8 = transaction.message.needs_smtputf8 or not envelope.isascii()
        if utf8 and not self.has_extn("smtputf8"):
            return await self._transact_in_ascii(transaction)
        self.in_data = self.eod_sent = False
        *head, last = transaction.message.parts
        if head and len(last) >= LARGE:  # apart, so that concurrent copies share its memory
            chunks: tuple = (transaction._replace(message=Message((*head, b""))).octets(), last)
        else:
            chunks = (transaction.octets(),)
        if transaction.message.needs_8bitmime and not self.has_extn("8bitmime"):
            chunks = (await asyncio.to_thread(downgrade_8bit, transaction.octets()),)
        script = envelope_commands(transaction, utf8, sum(map(len, chunks)), self.esmtp_features)
        replies: list = []
        result = lost = None
        try:
            await self._send_envelope(script, replies)
            if len(replies) == len(script) and replies[-1].code[0] == "3":
                result = await self._send_data(chunks if any_accepted(replies[:-1]) else ())
        except OSError as error:
            self.alive, lost = False, self._broken(error)
        self.last_used = time.monotonic()
        self.needs_rset = not (result and result.code[0] == "2")
        self.alive = self.alive and not self.recv_buffer  # or there is more than was asked for
        decided = recipient_replies(replies, result, lost, len(transaction.recipients))
        found = [item if isinstance(item, Reply) else self._to_reply(*item) for item in decided]
        found = found if self.in_data else [reply._replace(before_text=True) for reply in found]
        if self.alive and any(map(self.refused_before_data, found)):
            self.quit()  # it may have reached a limit of the server
        return found

    def refused_before_data(self, reply: Reply) -> bool:
        """Return whether a temporary failure of the last transaction came before the message was sent."""
        return reply.code[0] == "4" and (not self.in_data or reply.command == "RCPT")

    async def _transact_in_ascii(self, transaction: Transaction) -> list:
        """Transact without SMTPUTF8; addresses and header fields that need it are refused (RFC 6531 3.2)."""
        endpoint, message, recipients = self.route.endpoint, transaction.message, transaction.recipients
        if not transaction.sender.isascii():
            return [make_reply("mail-ascii", **endpoint)] * len(recipients)
        if message.needs_smtputf8:
            octets = await asyncio.to_thread(downgrade_8bit, transaction.octets(), self.has_extn("8bitmime"))
            message = Message((octets,), needs_8bitmime=not octets.isascii())
            if names := non_ascii_fields(octets):  # which have no form in ASCII, such as an address
                return [make_reply("header-ascii", f"in {', '.join(names)}", **endpoint)] * len(recipients)
        ascii_only = tuple(to for to in recipients if to.isascii())
        found = await self.transact(transaction._replace(recipients=ascii_only, message=message)) if ascii_only else []
        replies = dict(zip(ascii_only, found))
        return [replies.get(to) or make_reply("rcpt-ascii", **endpoint) for to in recipients]

    async def _send_envelope(self, script: list, replies: list) -> None:
        """Send the script and append each reply to `replies`, until it is over or going on makes no sense."""
        if self.needs_rset:
            self.step = "MAIL"
            await self._write(b"RSET\r\n")
            await self._read_reply()
            self.needs_rset = False
        size = PIPELINE_WINDOW if self.has_extn("pipelining") else 1
        for batch in [script[i : i + size] for i in range(0, len(script), size)]:
            if replies and (replies[0].code[0] != "2" or (batch[0][0] == "DATA" and not any_accepted(replies))):
                return
            self.step = batch[0][0]
            await self._write(b"".join([line for _, line in batch]))
            for self.step, _ in batch:
                reply = self._next_reply() or await self._read_reply()
                if reply.code[0] == ("2" if self.step == "DATA" else "3"):
                    raise ProtocolError(f"unexpected: {reply.code} to {self.step}")
                replies.append(reply)
                if reply.code == "421":  # the server closes; replies to the rest will not come
                    return

    async def _send_data(self, chunks: tuple) -> SMTPReply:
        """Return the reply to the end of the message; without a message, that to a lone dot (RFC 2920 3.1)."""
        if self.recv_buffer:  # an early refusal counts; anything else would be taken for the reply to the message
            self.alive, reply = False, await self._read_reply()
            if reply.code[0] in "45":
                return reply
            raise ProtocolError("a reply that nothing asked for")
        self.in_data, last = bool(chunks), b""
        try:
            for block in dot_stuff(chunks):
                if last:
                    await self._write(last)
                last = block
            self.eod_sent = self.in_data
            await self._write(last + b".\r\n")
        except (BrokenPipeError, ConnectionResetError):
            reply = await self._read_reply()  # the server may have said why it hung up
            if reply.code[0] not in "45":
                raise
            return reply
        reply = await self._read_reply()
        if reply.code[0] == "3":
            raise ProtocolError(f"unexpected: {reply.code} to the end of the message")
        return reply

    # -- input and output

    def _write(self, octets: bytes) -> Any:
        """Send all octets; to be awaited."""
        self._log_sent(b"(%d octets of the message)" % len(octets) if self.in_data and not log.devel else octets)
        return self.stream.sendall(octets, time.monotonic() + self.timeout)

    async def _read_reply(self) -> SMTPReply:
        """Return the next reply; one deadline holds for the whole of it."""
        deadline = time.monotonic() + self.timeout
        while not (reply := self._next_reply()):
            self._feed(await self.stream.recv(4096, deadline))
        return reply

    def send(self, s: Any) -> None:
        """Send a command; smtplib calls this."""
        octets = s.encode("ascii") if isinstance(s, str) else s
        self._log_sent(self.masked.encode() if self.masked else octets)
        self.sock.sendall(octets)

    def getreply(self) -> tuple:
        """Return a reply as (code, text), and keep it in `last_reply`; smtplib calls this."""
        deadline = time.monotonic() + self.timeout
        while not (reply := self._next_reply()):
            self.sock.settimeout(max(deadline - time.monotonic(), 0.001))
            self._feed(self.sock.recv(65536))
        self.last_reply = reply
        return int(reply.code), "\n".join(reply.lines).encode()

    def _next_reply(self) -> SMTPReply | None:
        """Take the first complete reply out of `recv_buffer`, None if there is none."""
        if not self.maybe_complete:
            return None
        reply, self.recv_buffer = parse_reply(self.recv_buffer)
        self.maybe_complete = bool(reply and self.recv_buffer)
        if reply and reply.code == "421":  # RFC 5321 3.8
            self.alive = False
        if reply and self.masked and reply.code != "334":  # the log-in goes on from a challenge
            reply = reply._replace(lines=tuple(map(self._mask, reply.lines)))
        if reply and (log.devel or log.trace.get() is not None):
            lines = ("********",) if reply.code == "334" and self.masked else reply.lines
            for i, line in enumerate(lines, 1):
                log.dialogue(self.route.host, "<", f"{reply.code}{' ' if i == len(lines) else '-'}{line}")
        return reply

    def _mask(self, text: str) -> str:
        """Mask our credentials, as they are and as AUTH sends them: some servers repeat what they do not understand."""
        secret = self.route.credentials[1]
        forms = [auth_response(mechanism, self.route) for mechanism in CLIENT_FIRST]
        secrets = [secret, *[base64.b64encode(octets).decode() for octets in (*forms, secret.encode())]]
        return mask_secrets(text, secrets if len(secret) > 3 else [])  # to mask a short one would hide nothing

    def _feed(self, octets: bytes) -> None:
        if not octets:
            raise ConnectionError("Connection closed by the other side")
        self.recv_buffer += octets
        self.maybe_complete = b"\n" in octets or len(self.recv_buffer) - self.recv_buffer.rfind(b"\n") > MAX_LINE

    def _log_sent(self, octets: bytes) -> None:
        if log.devel or log.trace.get() is not None:
            for line in octets.splitlines():
                log.dialogue(self.route.host, ">", line.decode("utf-8", "replace"))

    def close(self) -> None:
        """Close the connection, unregistered first: in the event loop's thread, or before it has a stream."""
        self.on_close.close()
        super().close()

    def quit(self) -> None:
        """Send QUIT and close, without waiting for the reply."""
        self.alive = False
        with contextlib.suppress(OSError, AttributeError):  # broken, or never connected
            self.sock.setblocking(False)
            self.send("QUIT\r\n")
        self.close()

    def _to_reply(self, step: str, reply: SMTPReply) -> Reply:
        """Return a server's reply as ours. A refusal of our log-in or the route's settings is no fault of the mail."""
        route, fault = self.route, False
        if reply.code[0] == "5" and route.mailer != "MX":
            our_login = step == "MAIL" and bool(route.auth) and (reply.code, reply.dsn) == ("550", "5.7.1")
            fault = our_login or step in ("EHLO", "STARTTLS", "AUTH") or reply.code[:2] == "53"  # RFC 4954 6
        more = {"from_server": True, "route_fault": fault}
        return Reply(reply.code, reply.dsn, step, reply.lines, route.mailer, route.host, route.port, **more)

    def _broken(self, error: OSError) -> Reply:
        """Return the reply for recipients that have none, since the connection broke."""
        if self.eod_sent:
            return make_reply("unsure", error_text(error), maybe_delivered=True, **self.route.endpoint)
        slug = {"CONN": "connect", "STARTTLS": "tls" if isinstance(error, ssl.SSLError) else "lost"}.get(
            self.step, "lost"
        )
        slug = "rubbish" if isinstance(error, ProtocolError) else slug
        return make_reply(slug, error_text(error), command=self.step, **self.route.endpoint)


def auth_response(mechanism: str, route: Route, challenge: bytes = b"", turn: int = 0) -> bytes:
    """Return the initial response of AUTH, or that to a challenge as it came; `turn` counts those before it."""
    user, secret = route.credentials
    if mechanism == "PLAIN":  # RFC 4616
        return f"\0{user}\0{secret}".encode()
    if mechanism == "LOGIN":  # no RFC has it: the words of its challenges differ
        return (secret if turn else user).encode()
    if mechanism == "CRAM-MD5":  # RFC 2195
        return f"{user} {hmac.new(secret.encode(), decode_challenge(challenge), 'md5').hexdigest()}".encode()
    if turn:  # the challenge is an error in JSON
        return b"\1" if mechanism == "OAUTHBEARER" else b""  # RFC 7628 3.2.3
    if mechanism == "XOAUTH2":  # https://developers.google.com/workspace/gmail/imap/xoauth2-protocol
        return f"user={user}\1auth=Bearer {secret}\1\1".encode()
    user = user.replace("=", "=3D").replace(",", "=2C")  # RFC 5801 4
    return f"n,a={user},\1host={route.host}\1port={route.port}\1auth=Bearer {secret}\1\1".encode()  # RFC 7628 3.1


def decode_challenge(challenge: bytes) -> bytes:
    """Decode base64, with or without padding."""
    try:
        return base64.b64decode(challenge + b"=" * (-len(challenge) % 4), validate=True)
    except binascii.Error as error:
        raise ProtocolError(f"unexpected challenge: {error}") from None


MAX_COMMAND = 510  # octets of a line without CRLF: beyond, the initial response waits to be asked for (RFC 4954 4)
MAX_CHALLENGES = 4


def envelope_commands(transaction: Transaction, utf8: bool, size: int, features: dict) -> list:
    """Return the script [(command, line)] up to DATA, with the parameters that the server offers."""
    mail, rcpt = f"MAIL FROM:<{transaction.sender}>", ""
    if "size" in features:
        mail += f" SIZE={size}"  # RFC 1870
    if "8bitmime" in features and (utf8 or transaction.message.needs_8bitmime):
        mail += " BODY=8BITMIME"  # RFC 6152
    if utf8:
        mail += " SMTPUTF8"  # RFC 6531
    if "dsn" in features:
        mail, rcpt = mail + transaction.message.dsn[0], transaction.message.dsn[1]
    rcpts = [("RCPT", f"RCPT TO:<{to}>{rcpt}\r\n".encode()) for to in transaction.recipients]
    return [("MAIL", f"{mail}\r\n".encode()), *rcpts, ("DATA", b"DATA\r\n")]


def dot_stuff(chunks: tuple) -> Any:
    """Yield a message in blocks, with a dot added to each line that begins with one (RFC 5321 4.5.2)."""
    end = b"\n"
    for chunk in chunks:
        for start in range(0, len(chunk), SEND_BLOCK):
            block = chunk[start : start + SEND_BLOCK]
            dot = b"." if end == b"\n" and block.startswith(b".") else b""
            yield dot + block.replace(b"\n.", b"\n..")
            end = block[-1:]


def any_accepted(replies: list) -> bool:
    """Return whether the sender and at least one recipient were accepted."""
    return replies[0].code[0] == "2" and "2" in [reply.code[0] for reply in replies[1:]]


def recipient_replies(replies: list, result: SMTPReply | None, lost: Reply | None, count: int) -> list:
    """Return (command, SMTPReply) or a Reply for each of `count` recipients. `replies` are those to the script as far
    as they came, `result` is the one to the message, `lost` the one for a connection that broke."""
    if replies and replies[0].code[0] != "2":
        return [("MAIL", replies[0])] * count
    rest = lost or ("DATA", result)
    if not (lost or result):  # it ended with a refusal of DATA, or of all recipients, or with a 421
        rest = "DATA" if len(replies) == count + 2 else "RCPT", replies[-1]
    found = [("RCPT", reply) if reply.code[0] in "45" else rest for reply in replies[1 : count + 1]]
    return found + [rest] * (count - len(found))


class SessionWaiter(NamedTuple):
    future: asyncio.Future  # of a Session, or None (open one)
    deadline: float
    reply: Reply | None  # the failure of its own attempt to open a session


class SessionPool:
    """Sessions of one route. If one cannot be opened while others work, the server accepts no more: the mail waits for
    one of those, until the deadline."""

    OPENING = 32  # sessions opened at a time, each in a thread
    BACKOFF = 5  # seconds until a server that took no more is asked for one more session

    def __init__(self) -> None:
        self.idle: list = []  # the most recently used last
        self.in_use = self.opening = 0
        self.waiters: deque = deque()  # of SessionWaiter, the longest first
        self.limit, self.ask_again = math.inf, 0.0  # sessions that the server takes; when to try whether it takes more
        self.refusal: Reply | None = None  # the last one
        self.gave_up = 0.0  # when a session was closed so that another process can open one

    def may_open(self) -> bool:
        one_more = not self.opening and time.monotonic() >= self.ask_again
        return self.opening < self.OPENING and (one_more or self.in_use + self.opening < self.limit)

    def wait(self, deadline: float, reply: Reply | None = None) -> asyncio.Future:
        """Wait for a session that is released, or for None: one may be opened."""
        future = asyncio.get_running_loop().create_future()
        self.waiters.append(SessionWaiter(future, deadline, reply))
        self.wake_waiters()
        return future

    def hand_over(self, session: Session | None) -> bool:
        """Give the session, or None (the right to open one), to the longest waiter; return whether there was one."""
        while self.waiters:
            future = self.waiters.popleft().future
            if not future.done():  # else its task was cancelled
                future.set_result(session)
                return True
        return False

    def wake_waiters(self) -> None:
        """Have waiters open sessions, as many as may be opened."""
        while self.may_open() and self.hand_over(None):
            self.opening += 1

    def opened(self) -> None:
        self.opening -= 1
        self.in_use += 1
        if self.in_use > self.limit:
            self.limit = 2 * self.in_use
        self.wake_waiters()

    def refused(self, reply: Reply | None) -> bool:
        """Count a session that was not opened; return True if it is worth waiting for another one. Without any, a
        temporary greeting fails only the waiters that got one themselves, any other failure all of them."""
        others = len(self.idle) + self.in_use + self.opening - 1
        if reply and others:
            self.slow_down(reply)
        elif not others:
            greeting = reply and reply.command == "CONN" and (reply.from_server or reply.retry_after)
            busy = not reply or (greeting and reply.temporary) or reply.code in THROTTLED
            self.fail_waiters([waiter for waiter in self.waiters if waiter.reply or not busy], reply)
        self.opening -= 1
        self.wake_waiters()
        return bool(reply and others)

    def slow_down(self, reply: Reply) -> None:
        """Make do with one session less than there are, since the server refused it."""
        self.limit = max(len(self.idle) + self.in_use + self.opening - 1, 1)
        self.refusal, self.ask_again = reply, time.monotonic() + self.BACKOFF

    def fail_waiters(self, waiters: list, reply: Reply | None = None) -> None:
        for waiter in waiters:
            self.waiters.remove(waiter)
            if not waiter.future.done():
                waiter.future.set_exception(Rejected(waiter.reply or reply or self.refusal))

    def sweep(self, now: float) -> None:
        """Give those that have waited too long the server's reply."""
        self.wake_waiters()
        if self.refusal:
            self.fail_waiters([waiter for waiter in self.waiters if waiter.deadline <= now])


class TransportContext:
    """What the deliveries of this process share: SMTP sessions, HTTP connections, the resolver, MTA-STS policies."""

    IDLE = 20  # seconds after which an idle session is closed; servers wait for minutes
    IDLE_WHEN_FULL = 1  # the same if the server limits sessions: other processes of ours may need one
    AGE = 300  # seconds after which a session is not used again
    SHARE = 5  # the same if the route's sessions are limited: another process may wait for its place

    def __init__(self, nameservers: tuple = (), limits: SharedLimits | None = None) -> None:
        self.limits = limits or SharedLimits()
        self.route_pauses: dict = {}  # Route that failed: monotonic time until which its list does without it
        self.pools: defaultdict = defaultdict(SessionPool)  # by (hostname, route)
        self.http = HTTPConnectionPool()
        self.tokens = TokenCache(self.http)
        self.set_nameservers(nameservers)

    def set_nameservers(self, nameservers: tuple) -> None:
        """Use these name servers from now on; () means those of resolv.conf."""
        self.resolver = Resolver(nameservers)
        self.mta_sts = MTASTSCache(self.resolver, self.http)

    def acquire_idle(self, route: Route, hostname: str) -> Session | None:
        """Return the idle session that was used last, None if there is none. To be released."""
        pool = self.pools[hostname, route]
        while pool.idle:
            session = pool.idle.pop()
            if not is_readable(session.sock):  # that would be taken for the reply to the next command
                pool.in_use += 1
                return session
            session.close()
        return None

    async def acquire(self, route: Route, hostname: str) -> tuple:
        """Return (Session, whether it was used before), a new one or one released meanwhile; or raise Rejected."""
        pool, deadline, reply = self.pools[hostname, route], time.monotonic() + route.timeout, None
        while True:
            if session := await pool.wait(deadline, reply):
                return session, True
            try:
                session = await self.connect(route, hostname)
            except BaseException as error:
                reply = error.reply if isinstance(error, Rejected) else None
                if not pool.refused(reply):
                    raise
                if session := self.acquire_idle(route, hostname):  # released before this server refused another
                    return session, True
            else:
                session.pool = pool
                pool.opened()
                return session, False

    async def connect(self, route: Route, hostname: str, again: bool = True) -> Session:
        """Open a session; an access token that the server refuses is replaced once."""
        session, pool = Session(await self.tokens.authorize(route), hostname), self.pools[hostname, route]
        deadline = time.monotonic() + route.timeout
        if route.sessions:
            if time.monotonic() - pool.gave_up < 0.2:
                await asyncio.sleep(0.2)  # a process that has waited longer takes it
            while not (octet := self.limits.open_session(route.limit_key, route.sessions)):
                if pool.idle or pool.in_use or time.monotonic() > deadline:  # acquire() waits for those of this process
                    line = f"other mails have all of its sessions ({route.sessions})"
                    raise Rejected(make_reply("route-limit", line, retry_after=route.timeout, **route.endpoint))
                await asyncio.sleep(0.05)  # there is no event when another process closes one
            session.on_close.callback(self.limits.close_session, octet)
        try:
            await asyncio.to_thread(session.open)  # smtplib blocks
        except Rejected as refused:
            if not (again and route.oauth2 and refused.reply.code == "535" and self.tokens.drop(session.route)):
                raise
            return await self.connect(route, hostname, again=False)
        session.stream = AsyncSocket(session.sock)
        session.on_close.callback(session.stream.release)
        return session

    async def await_rate(self, route: Route, count: int) -> None:
        """Wait until the route's rate admits so many recipients; raise Rejected if that takes too long."""
        deadline = time.monotonic() + route.timeout
        while wait := self.limits.take(route.limit_key, count, route.rate).wait:
            if time.monotonic() + wait > deadline:
                line = f"{route.rate.limit} recipients in {route.rate.seconds} seconds"
                raise Rejected(make_reply("route-limit", line, retry_after=math.ceil(wait), **route.endpoint))
            await asyncio.sleep(wait)

    def release(self, session: Session) -> None:
        """Hand the session over to a waiter, keep it, or close it if it cannot be used again."""
        pool, limited = session.pool, bool(session.route.sessions)
        is_old = session.last_used - session.created_at >= (self.SHARE if limited else self.AGE)
        if session.alive and not (limited and is_old) and pool.hand_over(session):
            return
        pool.in_use -= 1
        if session.alive and not is_old:
            pool.idle.append(session)
            return
        if session.alive:
            pool.gave_up = time.monotonic()
            session.quit()
        session.close()
        pool.wake_waiters()

    async def sweep(self, everything: bool = False) -> None:
        """Close the sessions and connections that have been idle too long, or all."""
        self.http.sweep(everything)
        now = time.monotonic()
        for key, pool in list(self.pools.items()):
            idle = self.IDLE_WHEN_FULL if pool.refusal or key[1].sessions else self.IDLE
            while pool.idle and (everything or pool.idle[0].last_used <= now - idle):
                pool.idle.pop(0).quit()
            pool.sweep(now)
            if not (pool.idle or pool.in_use or pool.opening or pool.waiters):
                del self.pools[key]


# ======================================================================================================================
# 15. Relays
#     A relay takes (transaction, transport) and gives one Reply for each recipient, in order. A probe takes
#     (route, hostname, domain, transport), sends no mail and gives one CheckResult for each step. Both may raise
#     Rejected or OSError. RELAYS, at the end, has one row for each relay with all that is known of it.
# ======================================================================================================================

ROUTE_PAUSE = 30  # seconds for which a list does without a route that failed
MAX_REPLACEMENTS = 8  # of one mail's session: the next one may have reached the server's limit of mails as well
MAX_MX_ATTEMPTS = 8  # addresses tried for one mail; each may take the route's timeout
SENDGRID_RESERVED = ("x-sg-id", "x-sg-eid", "dkim-signature", "bcc")
SENDGRID_OWN = ("received", "mime-version", "from", "to", "cc", "subject", "reply-to")  # made from the other keys
KNOWN_COMMANDS = ("HTTP", "CONN", "EHLO", "STARTTLS", "AUTH", "MAIL", "RCPT", "DATA", "QUEUE")
DECODERS = {"base64": binascii.a2b_base64, "quoted-printable": binascii.a2b_qp}  # RFC 2045 6
DECODERS.update(B=binascii.a2b_base64, Q=functools.partial(binascii.a2b_qp, header=True))  # RFC 2047 4
API_LIMIT = re.compile(r"(TooManyRequests|Throttling|SendingPaused|\w*LimitExceeded)(Exception)?")  # errors that pass
API_LOGIN = re.compile(r"SignatureDoesNotMatch|InvalidClientTokenId|\w*(Signature|Token|Client)(Exception)?")
ENCODED_WORD = re.compile(r"=\?([^?*\s]+)(?:\*[^?\s]*)?\?([BbQq])\?([^?\s]*)\?=")  # RFC 2047
SCREEN_UNSAFE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # all controls but the tab


async def attempt_transaction(transaction: Transaction, transport: TransportContext) -> TransactionResult:
    """Attempt a transaction once; every recipient has a reply."""
    began = time.monotonic()
    replies = await (attempt_route_list if transaction.route.fallbacks else attempt_route)(transaction, transport)
    for reply in dict.fromkeys([reply for reply in replies if reply.route_fault]):
        words = log_value(" ".join((reply.code, *reply.message)))
        text = f"{transaction.queueid}: warning: relay={reply.relay} {reply.command} failed, mail waits: {words}"
        log.lines(text, level="warning")
    seconds, relay = time.monotonic() - began, transaction.route.relay
    metrics.observe("haineko_delivery_seconds", relay, seconds=seconds)
    for reply in replies:
        metrics.add("haineko_replies_total", relay, reply.code[0])
    return TransactionResult(transaction, replies, seconds * 1000)


async def attempt_route_list(transaction: Transaction, transport: TransportContext) -> list:
    """Return a Reply for each recipient from the first route of a list that does not fail before the text is sent."""
    now, pauses, routes = time.monotonic(), transport.route_pauses, transaction.route.choices
    replies, waiting, tried = {}, transaction.recipients, None
    for route in [one for one in routes if pauses.get(one, 0) <= now] or routes:
        if route in pauses:
            pauses[route] = now + ROUTE_PAUSE  # this mail tries it; the others go on without it
        found = await attempt_route(transaction._replace(route=route, recipients=waiting), transport)
        replies.update({to: reply._replace(fallback=tried) for to, reply in zip(waiting, found)})
        failed = {to: reply for to, reply in zip(waiting, found) if try_next_route(reply)}
        if any(reply.command != "RCPT" or reply.code == "421" for reply in failed.values()):
            pauses[route] = time.monotonic() + ROUTE_PAUSE
        else:
            pauses.pop(route, None)
        if not failed:
            break
        for reply in dict.fromkeys(failed.values()):
            words = log_value(" ".join((reply.code, *reply.message)))
            log.lines(f"{transaction.queueid}: warning: relay={reply.relay} {reply.command} failed: {words}")
        waiting, tried = tuple(failed), " ".join(filter(None, (tried, next(iter(failed.values())).relay)))
    return [replies[to] for to in transaction.recipients]


def try_next_route(reply: Reply) -> bool:
    """Return True if the next route of a list may be tried: this one failed, not the recipient, and before the text."""
    failed = reply.temporary or (reply.from_server and reply.command == "CONN")
    return failed and not reply.maybe_delivered and (reply.before_text or reply.route_fault or reply.command != "DATA")


async def attempt_route(transaction: Transaction, transport: TransportContext) -> list:
    """Return a Reply for each recipient from the transaction's route, whatever its relay does; a bug is logged."""
    try:
        if transaction.route.rate:
            await transport.await_rate(transaction.route, len(transaction.recipients))
        if transaction.dkim:
            transaction = await sign_transaction(transaction)
        return await transaction.route.row.send(transaction, transport)
    except Exception as fault:
        return failure_replies(transaction, fault)


def failure_replies(transaction: Transaction, fault: Exception) -> list:
    """Return the reply that says why a delivery failed, for each recipient; a bug is logged."""
    endpoint = transaction.route.endpoint
    if isinstance(fault, Rejected):
        return [fault.reply] * len(transaction.recipients)
    if isinstance(fault, OSError):
        return [make_reply("lost", error_text(fault), command="CONN", **endpoint)] * len(transaction.recipients)
    log_exception(transaction.queueid)
    return [make_reply("relay-fault", **endpoint)] * len(transaction.recipients)


async def relay_esmtp(transaction: Transaction, transport: TransportContext) -> list:
    """Deliver by SMTP to the route's host. A reused session that dies or replies 4xx before the message is replaced."""
    recipients, replies = transaction.recipients, {}
    session, reused = transport.acquire_idle(transaction.route, transaction.hostname), True
    for _ in range(1 + MAX_REPLACEMENTS):
        try:
            if not session:
                session, reused = await transport.acquire(transaction.route, transaction.hostname)
        except Rejected as refused:
            replies.update(dict.fromkeys(transaction.recipients, refused.reply))
            break
        try:
            found = await session.transact(transaction)
            for reply in found:
                if reply.code in THROTTLED:
                    session.pool.slow_down(reply)
        except BaseException:
            session.alive = False
            raise
        finally:
            transport.release(session)
        replies.update(zip(transaction.recipients, found))
        again = reused and [to for to in transaction.recipients if session.refused_before_data(replies[to])]
        if not again:
            break
        transaction, session = transaction._replace(recipients=tuple(again)), None
    return [replies[to] for to in recipients]


async def relay_mx(transaction: Transaction, transport: TransportContext) -> list:
    """Deliver by SMTP to the hosts of each recipient's domain (RFC 5321 5.1); a shared message may have several."""
    by_domain, replies = defaultdict(list), {}
    for recipient in transaction.recipients:
        by_domain[recipient.rpartition("@")[2].lower()].append(recipient)
    for domain, recipients in by_domain.items():
        part = transaction._replace(recipients=tuple(recipients))
        try:
            replies.update(await deliver_to_domain(domain, part, transport))
        except Exception as fault:  # it must not change the replies of the domains before
            replies.update(zip(recipients, failure_replies(part, fault)))
    return [replies[recipient] for recipient in transaction.recipients]


async def deliver_to_domain(domain: str, transaction: Transaction, transport: TransportContext) -> dict:
    """Return {recipient: Reply} from the first host that works; raise Rejected if the domain has no host."""
    route, waiting, replies, attempts = transaction.route, transaction.recipients, {}, 0
    hosts, policy = await admitted_hosts(domain, route, transaction.hostname, transport)
    for host in hosts:
        for hop in await next_hops(host, route, policy, transport.resolver):
            answers = [hop] * len(waiting)
            if isinstance(hop, Route):
                part = transaction._replace(route=hop, recipients=waiting)
                answers = await relay_esmtp(part, transport)
                if hop.tls_if_offered and all(reply.command == "STARTTLS" for reply in answers):
                    answers = await relay_esmtp(part._replace(route=replace(hop, tls_if_offered=False)), transport)
            for recipient, reply in zip(waiting, answers):
                if recipient not in replies or reply.temporary or not try_next_host(reply):
                    replies[recipient] = reply
            waiting, attempts = tuple(to for to in waiting if try_next_host(replies[to])), attempts + 1
            if not waiting or attempts == MAX_MX_ATTEMPTS:
                return replies
    return replies


async def admitted_hosts(domain: str, route: Route, hostname: str, transport: TransportContext) -> tuple:
    """Return (hosts of a domain, its MTA-STS policy, which admits them); raise Rejected if there is none."""
    hosts = await mx_hosts(domain, transport.resolver, hostname, time.monotonic() + route.timeout)
    policy = await transport.mta_sts.policy_for(domain, route)
    admitted = [host for host in hosts if not policy or policy.allows(host)]
    if not admitted:
        raise Rejected(make_reply("mta-sts", *hosts, mailer="MX"))
    return admitted, policy


async def next_hops(host: str, route: Route, policy: MTASTSPolicy | None, resolver: Resolver) -> list:
    """Return a Route to each address of the host and, behind it, to the others; or the Reply that says why not."""
    try:
        addresses = await resolve_addresses(host, resolver, route.private, time.monotonic() + route.timeout)
    except Rejected as rejected:
        return [rejected.reply]
    tls = {} if route.starttls else {"tls_if_offered": True, "tls_verify": False}  # RFC 7435: better than clear text
    if policy and policy.mode == "enforce":
        tls = {"starttls": True, "tls_verify": True}
    addresses.sort(key=lambda address: connector.failed_lately((address, route.port)))
    return [replace(route, host=host, address=" ".join(addresses[i:]), **tls) for i in range(len(addresses))]


def try_next_host(reply: Reply) -> bool:
    """Return True if another host may be tried: this one has not answered for the mail, or left before the message."""
    return reply.command in ("CONN", "EHLO", "STARTTLS") or (reply.code == "421" and reply.command != "DATA")


async def relay_local(deliver: Callable, transaction: Transaction, transport: TransportContext) -> list:
    """Return the Reply of deliver(transaction), which blocks, for each recipient."""
    return [await asyncio.to_thread(deliver, transaction)] * len(transaction.recipients)


def save_message(transaction: Transaction) -> Reply:
    """Write the message aside, sync it, then rename it: it is there completely or not at all."""
    folder = transaction.route.folder
    name = f"haineko.{time.strftime('%Y-%m-%d-%H%M%S')}.{transaction.queueid}.{transaction.number}.eml"
    path, aside = os.path.join(folder, name), os.path.join(folder, f".{name}")
    try:
        with open(aside, "xb", opener=functools.partial(os.open, mode=0o600)) as stream:
            stream.write(transaction.octets())
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(aside, path)
        handle = os.open(folder, os.O_RDONLY)  # a renamed file survives a power cut only if its folder is synced
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        return make_reply("file", f"{folder}: {error.strerror or error}", mailer="File")
    return make_reply("done", word=path, mailer="File")


def print_on_screen(transaction: Transaction) -> Reply:
    """Print the message, with controls escaped, and marked so that no line of it can pass for one of the log."""
    people = f"from <{transaction.sender}> to <{'>, <'.join(transaction.recipients)}>"
    text = transaction.octets().decode("utf-8", "backslashreplace").replace("\r\n", "\n").rstrip("\n")
    lines = [f"--- {transaction.queueid}.{transaction.number} {people}", *(f"| {line}" for line in text.split("\n"))]
    lines = [SCREEN_UNSAFE.sub(lambda found: ascii(found[0])[1:-1], line) for line in lines]
    if not log.write_bytes("\n".join([*lines, "---\n"]).encode()):
        return make_reply("file", "stderr cannot be written", mailer="Screen")
    return make_reply("done", word="Printed", mailer="Screen")


async def relay_discard(transaction: Transaction, transport: TransportContext) -> list:
    return [make_reply("done", word="Discarded", mailer="Discard")] * len(transaction.recipients)


async def relay_http(transaction: Transaction, transport: TransportContext) -> list:
    """Deliver by the API in the route's row. An access token that is refused is replaced once."""
    row = transaction.route.row
    for again in (True, False):
        route = await transport.tokens.authorize(transaction.route)
        try:
            call = await asyncio.to_thread(row.request, transaction._replace(route=route))
        except (ValueError, LookupError, RecursionError) as error:  # LookupError: an unknown charset
            raise Rejected(make_reply("inexpressible", sanitize(str(error)), **route.endpoint)) from None
        response = await transport.http.request(HTTPTarget.of_route(route), call)
        token = route.credentials[1] if route.oauth2 else ""
        if not (again and token and response.status == 401 and transport.tokens.drop(route)):
            break
    if token:
        response = response._replace(body=response.body.replace(token.encode(), b"********"))
    return row.replies(transaction, response)


def haineko_request(transaction: Transaction) -> HTTPRequest:
    """Return the submission to another Haineko: header and body if compose() makes this message of them (the old one in
    Perl knows no more), else `raw`."""
    octets, document = transaction.octets(), {"mail": transaction.sender, "rcpt": transaction.recipients}
    try:
        fields, body = parse_message(octets)
        lines = {name: unfold(value) for name, value in fields}
        charset = lines["content-type"].rpartition("charset=")[2]
        text = decode_charset(DECODERS.get(lines["content-transfer-encoding"], bytes)(body), charset)
        *passed, hostname = [name.strip() for name in lines["x-haineko-loop"].split(",")]
        header = {"subject": decode_encoded_words(lines["subject"]), "charset": charset, "x-haineko-loop": passed}
        for key in [name for name in ("from", "reply-to") if name in lines]:
            header[key.replace("-", "")] = format_mailboxes(lines[key])
        plain = {**document, "header": header, "body": text.replace("\r\n", "\n")}
        submission = parse_submission(encode_json(plain)).submission
        if not (submission and transaction.sender):
            raise ValueError("compose() could not make it")
        now = parsedate_to_datetime(lines["date"]).timestamp()
        message = compose(submission, transaction.queueid, None, hostname, now)
        composed = message.copy(transaction.recipients[0], transaction.number)
        if composed.partition(b"\r\n\tby ")[2] != octets.partition(b"\r\n\tby ")[2]:  # in Received
            raise ValueError("compose() would make another message")
        document.update(plain, header={**header, "x-haineko-loop": [*passed, hostname]}, ehlo=hostname)
    except (ValueError, LookupError, TypeError):  # TypeError: of a Date that is none, before Python 3.10
        document["raw"] = octets.decode() if octets.isascii() else {"base64": base64.b64encode(octets).decode()}
    return HTTPRequest("POST", "/submit", encode_json(document), basic_auth_header(transaction.route.credentials))


def basic_auth_header(login: tuple) -> tuple:
    """Return the header fields for HTTP Basic (RFC 7617); none without a login."""
    return (("Authorization", "Basic " + base64.b64encode(":".join(login).encode()).decode()),) if login else ()


def haineko_replies(transaction: Transaction, response: HTTPResponse) -> list:
    """Return a Reply for each recipient from the far end's items; one without recipient is meant for all."""
    items = items_by_address(json_object(response).get("response"), "rcpt")
    found = [items.get(address_key(to)) or items.get(None, {}) for to in transaction.recipients]
    return [haineko_reply(transaction.route, response, item) for item in found]


def items_by_address(items: Any, key: str) -> dict:
    """Return {address_key: item} of the objects in a list that an API should have given."""
    items = items if isinstance(items, list) else []
    return {address_key(item.get(key)): item for item in items if isinstance(item, dict)}


def address_key(given: Any) -> Any:
    """Return a key that is equal for two spellings of one address; None for anything else."""
    mailbox = parse_address(given) if type(given) is str else None
    return mailbox and mailbox.key


def haineko_reply(route: Route, response: HTTPResponse, item: dict) -> Reply:
    """Return an item of the far end as a Reply; the Perl version reports a relayed mail with the reply to QUIT."""
    code, dsn, lines = str(item.get("code")), item.get("dsn"), item.get("message")
    if not re.fullmatch(r"[245][0-9][0-9]", code) or (code[0] == "2") == bool(item.get("error")):
        return http_failure(route, response)
    if code[0] == "2" and response.status not in (200, 202, 207):  # something on the way changed one of the two
        return http_failure(route, response)._replace(maybe_delivered=True)
    lines = [lines] if isinstance(lines, str) else lines if isinstance(lines, list) else []
    lines = [sanitize(str(line), 500) for line in lines][:20] or [status_text(response)]
    dsn = dsn if isinstance(dsn, str) and re.fullmatch(r"[245]\.[0-9]{1,3}\.[0-9]{1,3}", dsn) else None
    command = item.get("command") if item.get("command") in KNOWN_COMMANDS else "DATA"
    wait = 0 if code[0] == "2" else parse_retry_after(response)
    maybe_delivered = code[0] == "4" and item.get("maybe_delivered") is True
    reply = Reply(code, dsn, command, tuple(lines), **route.endpoint)
    return reply._replace(maybe_delivered=maybe_delivered, retry_after=wait, route_fault=response.status == 401)


def bearer_header(route: Route) -> tuple:
    return (("Authorization", f"Bearer {route.credentials[1]}"),)


def sendgrid_request(transaction: Transaction) -> HTTPRequest:
    """Return the message in pieces; raise ValueError if it would lose more of it than trace fields and charset."""
    # https://www.twilio.com/docs/sendgrid/api-reference/mail-send
    octets = transaction.octets()
    fields, headers = parse_message(octets).fields, {}  # headers go as they are, still encoded
    for name, line in fields:
        if name in SENDGRID_RESERVED:
            raise ValueError(f"the header {name} can't be set")
        if name not in SENDGRID_OWN and not name.startswith("content-"):
            headers[line.partition(b":")[0].decode()] = single_field(fields, name)
            if not line.isascii():
                raise ValueError(f"the header {name} is not ASCII")
    people = {"bcc": [{"email": recipient} for recipient in hidden_recipients(transaction, fields)]}
    for key in ("from", "to", "cc", "reply-to"):
        mailboxes = parse_mailboxes(single_field(fields, key))
        named = [(decode_encoded_words(name), mailbox.addr_spec) for name, mailbox in mailboxes]
        people[key] = [{"email": spec, "name": name} if name else {"email": spec} for name, spec in named]
    if len(people["from"]) != 1:
        raise ValueError("From has several addresses")
    # SendGrid shows every recipient but Bcc, and delivers to every one that it shows.
    document = {"personalizations": [{key: people[key] for key in ("to", "cc", "bcc") if people[key]}]}
    document.update({"from": people["from"][0], "reply_to_list": people["reply-to"], "headers": headers})
    if len(people["reply-to"]) == 1:
        document["reply_to"] = document.pop("reply_to_list")[0]
    document.update(sendgrid_parts(octets), subject=decode_encoded_words(single_field(fields, "subject")))
    body = encode_json({key: value for key, value in document.items() if value})
    return HTTPRequest("POST", "/v3/mail/send", body, bearer_header(transaction.route))


def hidden_recipients(transaction: Transaction, fields: list) -> list:
    """Return the recipients that To and Cc don't show; raise ValueError if they show anybody else."""
    hidden = {address_key(to): to for to in transaction.recipients}
    for name in ("to", "cc"):
        for _, mailbox in parse_mailboxes(single_field(fields, name)):
            if not hidden.pop(mailbox.key, None):
                raise ValueError(f"{name.title()} has {mailbox.addr_spec}, which gets this mail another way or twice")
    return list(hidden.values())


def sendgrid_parts(octets: bytes) -> dict:
    import email

    content, attachments, multiparts, parts = [], [], set(), [email.message_from_bytes(octets)]
    while parts:
        part = parts.pop(0)
        kind, named = part.get_content_subtype(), part.get_filename() or part["Content-ID"]
        if part.get_content_maintype() == "multipart":
            if kind not in ("mixed", "alternative", "related") or not part.is_multipart():
                raise ValueError(f"multipart/{kind} can't be kept")
            multiparts.add(kind)
            parts[:0] = part.get_payload()
        elif part.get_content_maintype() != "text" or named or part.get_content_disposition() == "attachment":
            attachments.append(sendgrid_attachment(part))
        else:
            text = decode_charset(part.get_payload(decode=True), part.get_content_charset("us-ascii"))
            content.append({"type": part.get_content_type(), "value": text.replace("\r\n", "\n")})
    types, both = [item["type"] for item in content], ["text/plain", "text/html"]
    if not (types == both and "alternative" in multiparts) and types not in (both[:1], both[1:]):
        raise ValueError(f"its texts are {', '.join(types) or 'none'}, not a plain one, an HTML one, or these two")
    return {"content": content, "attachments": attachments}


def sendgrid_attachment(part: Any) -> dict:
    content_id, disposition = (part["Content-ID"] or "").strip("<> "), part.get_content_disposition()
    octets, charset = part.get_payload(decode=True), part.get_content_charset("utf-8")
    if part.get_content_maintype() == "text" and charset not in ("utf-8", "us-ascii"):
        raise ValueError(f"an attachment has the charset {charset}, which can't be declared")
    if part.get_content_maintype() == "message":
        octets = part.as_bytes(policy=part.policy.clone(linesep="\r\n")).partition(b"\r\n\r\n")[2]
    name = decode_encoded_words(part.get_filename() or content_id)
    inline = disposition == "inline" or (content_id and not disposition)
    attachment = {"content": base64.b64encode(octets).decode(), "type": part.get_content_type(), "filename": name}
    attachment.update(disposition="inline" if inline else "attachment", content_id=content_id)
    return {key: value for key, value in attachment.items() if value}


async def relay_amazonses(transaction: Transaction, transport: TransportContext) -> list:
    """Deliver to 50 recipients at a time, Amazon's quota."""
    replies: list = []
    for start in range(0, len(transaction.recipients), 50):
        part = transaction._replace(recipients=transaction.recipients[start : start + 50])
        try:
            replies += await relay_http(part, transport)
        except Exception as fault:  # it must not change the replies before
            replies += failure_replies(part, fault)
    return replies


def amazonses_request(transaction: Transaction) -> HTTPRequest:
    octets = ascii_message(transaction)
    author = single_field(parse_message(octets).fields, "from")
    if not parse_mailboxes(author):
        raise ValueError("From has no address")
    content = {"Raw": {"Data": base64.b64encode(octets).decode()}}
    document = {"FromEmailAddress": author, "Destination": {"ToAddresses": transaction.recipients}, "Content": content}
    document.update({"FeedbackForwardingEmailAddress": transaction.sender} if transaction.sender else {})
    call = HTTPRequest("POST", "/v2/email/outbound-emails", encode_json(document))
    return sign_sigv4(call, transaction.route, time.time())


def sign_sigv4(call: HTTPRequest, route: Route, now: float) -> HTTPRequest:
    """Return the request with Amazon's signature, version 4, for the service `ses`."""
    # https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html
    site, moment = split_base_url(route.url), time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    scope = f"{moment[:8]}/{route.region}/ses/aws4_request"
    added = [("x-amz-date", moment), *([("x-amz-security-token", route.token)] if route.token else [])]
    content_type = [("content-type", call.type)] if call.method == "POST" else []
    signed = [*content_type, ("host", site.host_header), *added]
    names = ";".join(name for name, _ in signed)
    lines = [call.method, site.path + call.path, "", *(f"{name}:{value}" for name, value in signed), "", names]
    canonical = "\n".join([*lines, hashlib.sha256(call.body).hexdigest()])
    text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = b"AWS4" + route.credentials[1].encode()
    for part in (*scope.split("/"), text):
        key = hmac.digest(key, part.encode(), "sha256")
    value = f"AWS4-HMAC-SHA256 Credential={route.credentials[0]}/{scope}, SignedHeaders={names}, Signature={key.hex()}"
    return call._replace(headers=(*call.headers, *added, ("Authorization", value)))


def mandrill_request(transaction: Transaction) -> HTTPRequest:
    document = {"key": transaction.route.credentials[1], "raw_message": ascii_message(transaction).decode()}
    document.update({"from_email": transaction.sender or None, "to": transaction.recipients, "async": False})
    return HTTPRequest("POST", "/api/1.0/messages/send-raw.json", encode_json(document))


def mandrill_replies(transaction: Transaction, response: HTTPResponse) -> list:
    """Return a Reply for each recipient; a response that doesn't name one breaks the API's promise."""
    replies, route = [], transaction.route
    items = items_by_address(response.document() if response.status == 200 else None, "email")
    for item in [items.get(address_key(to), {}) for to in transaction.recipients]:
        status, lines = item.get("status"), [f"{key}: {item[key]}" for key in ("reject_reason", "_id") if item.get(key)]
        dsn = {"rejected": "5.7.1", "invalid": "5.1.3"}.get(str(status))
        if status in ("sent", "queued", "scheduled"):
            replies.append(http_reply("web-accepted", route, response, [status, *lines]))
        elif dsn:
            replies.append(http_reply("web-refused", route, response, lines, status)._replace(dsn=dsn))
        else:
            replies.append(http_failure(route, response))
    return replies


def msgraph_request(transaction: Transaction) -> HTTPRequest:
    # https://learn.microsoft.com/en-us/graph/api/user-sendmail
    path = f"/v1.0/users/{urllib.parse.quote(transaction.route.credentials[0], '@')}/sendMail"
    body = base64.b64encode(addressed_message(transaction))
    return HTTPRequest("POST", path, body, bearer_header(transaction.route), "text/plain")


def gmailapi_request(transaction: Transaction) -> HTTPRequest:
    # https://developers.google.com/workspace/gmail/api/reference/rest/v1/users.messages/send
    path, octets = "/gmail/v1/users/me/messages/send", addressed_message(transaction)
    header = bearer_header(transaction.route)
    if len(octets) > 1 << 20:  # a large one is uploaded
        return HTTPRequest("POST", f"/upload{path}?uploadType=media", octets, header, "message/rfc822")
    return HTTPRequest("POST", path, encode_json({"raw": base64.urlsafe_b64encode(octets).decode()}), header)


def addressed_message(transaction: Transaction) -> bytes:
    """Return the message with the envelope's recipients in its header, from which the API takes them."""
    octets = transaction.octets()
    fields = parse_message(octets).fields
    if single_field(fields, "bcc"):
        raise ValueError("the header bcc can't be set")
    hidden = ",\r\n ".join(hidden_recipients(transaction, fields))
    return f"Bcc: {hidden}\r\n".encode() + octets if hidden else octets


def api_replies(success: int, name: str, transaction: Transaction, response: HTTPResponse) -> list:
    """Return the replies of an API that takes the mail for all recipients, or not. Its id is in JSON, or for 202 in a
    header that may be absent."""
    ident = response.headers.get(name) if success == 202 else json_object(response).get(name)
    reply = http_reply("web-accepted", transaction.route, response, [f"{name}: {ident}"] if ident else [])
    if response.status != success or not (ident or success == 202):
        reply = http_failure(transaction.route, response)
    return [reply] * len(transaction.recipients)


def sendgrid_errors(document: dict, headers: Any) -> list:
    return [": ".join(str(item[key]) for key in ("field", "message") if item.get(key)) for item in document["errors"]]


def amazonses_errors(document: dict, headers: Any) -> list:
    name = str(headers.get("x-amzn-ErrorType") or document["__type"])  # may have a namespace in front, a URL behind
    messages = [str(document[key]) for key in ("message", "Message") if document.get(key)]
    return [name.partition(":")[0].rpartition("#")[2], *messages]


def graph_and_google_errors(document: dict, headers: Any) -> list:
    error = document["error"]
    return [f"{error['code']}: {error['message']}", *re.findall(r"'reason': '(\w+)'", str(error.get("errors")))]


def http_reply(slug: str, route: Route, response: HTTPResponse, lines: Any, word: str = "") -> Reply:
    """Return a reply with the response's status line or a word of it, followed by lines of the other side."""
    lines = [sanitize(str(line), 500) for line in lines][:20]
    return make_reply(slug, *lines, word=word or status_text(response), **route.endpoint)


def http_failure(route: Route, response: HTTPResponse) -> Reply:
    """Return the reply for a response that is no success. Without the API's own errors it may be of a proxy."""
    status, lines, wait = response.status, [], parse_retry_after(response)
    with contextlib.suppress(LookupError, TypeError, AttributeError):  # another form than the API's
        lines = route.row.errors(json_object(response), response.headers)
    if status == 413:  # the mail will not be smaller next time
        return http_reply("web-refused", route, response, lines)._replace(dsn="5.3.4")
    if not lines or status < 400:
        excerpt = sanitize(response.body[:400].decode("utf-8", "replace"), 100)
        reply = http_reply("web-rubbish", route, response, filter(None, (status_text(response), excerpt)))
        return reply._replace(maybe_delivered=200 <= status < 300, retry_after=wait)
    if status == 429 or status >= 500 or any(map(API_LIMIT.fullmatch, lines)):
        reply = http_reply("web-later", route, response, lines)
        return reply._replace(dsn="4.3.0" if status >= 500 else "4.4.5", retry_after=wait)
    reply = http_reply("web-refused", route, response, lines)
    route_fault = status == 401 or any(map(API_LOGIN.fullmatch, lines))
    return reply._replace(dsn={401: "5.7.8", 403: "5.7.1"}.get(status, reply.dsn), route_fault=route_fault)


def parse_retry_after(response: HTTPResponse) -> int:
    """Return the seconds after which to try again (RFC 9110 10.2.3), at most a day; 0 if the response has none."""
    reset = response.headers.get("X-RateLimit-Reset") if response.status == 429 else ""  # SendGrid: Unix time
    text, now = (response.headers.get("Retry-After") or reset or "").strip(), time.time()
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        wait = int(text) if re.fullmatch("[0-9]{1,10}", text) else parsedate_to_datetime(text).timestamp() - now
        return min(max(int(wait - now if wait > 1e9 else wait), 0), 86400)
    return 0


def ascii_message(transaction: Transaction) -> bytes:
    """Return the message in ASCII, which the APIs want; raise ValueError if that can't be."""
    octets = downgrade_8bit(transaction.octets()) if transaction.message.needs_8bitmime else transaction.octets()
    if not octets.isascii():
        raise ValueError("it has octets over 127")
    return octets


def single_field(fields: list, name: str) -> str:
    """Return the value of a header field, "" if it is absent; raise ValueError if it occurs more than once."""
    values = [unfold(octets) for key, octets in fields if key == name]
    if len(values) > 1:
        raise ValueError(f"the header {name} occurs more than once")
    return values[0] if values else ""


def decode_encoded_words(text: str) -> str:
    """Decode the encoded words (RFC 2047) in a text; raise ValueError or LookupError if one can't be."""
    text = re.sub(r"(?<=\?=)\s+(?==\?)", "", text)
    return ENCODED_WORD.sub(lambda word: decode_charset(DECODERS[word[2].upper()](word[3].encode()), word[1]), text)


def decode_charset(octets: bytes, charset: str) -> str:
    if charset.upper() == "ISO-2022-JP":
        return jis_to_text(octets.decode("ascii"))
    return octets.decode(codec_name(charset))


def format_mailboxes(text: str) -> str:
    people = []
    for coded, mailbox in parse_mailboxes(text):
        name, spec = decode_encoded_words(coded), mailbox.addr_spec
        quoted = '"' + re.sub(r'(["\\])', r"\\\1", name) + '"' if re.search(r'[()<>@,;:\\".\[\]]', name) else name
        people.append(f"{quoted} <{spec}>" if name else spec)
    return ", ".join(people)


class CheckResult(NamedTuple):
    step: str
    ok: bool
    text: str


async def probe_esmtp(route: Route, hostname: str, domain: str, transport: TransportContext) -> list:
    """Look the host up as a delivery would, then open a session."""
    try:
        found = await asyncio.to_thread(socket.getaddrinfo, route.host, route.port, type=socket.SOCK_STREAM)
    except OSError as error:
        return [CheckResult("DNS", False, f"{route.host}: {error.strerror}")]
    shown = f"{route.host} is {', '.join(dict.fromkeys(item[4][0] for item in found))}"
    return [CheckResult("DNS", True, shown), *await asyncio.to_thread(probe_session, route, hostname)]


def probe_session(route: Route, hostname: str) -> list:
    """Return every step to a session that could take a mail; the last one shows where it failed."""
    session, done, failed = Session(route, hostname), {}, []
    try:
        for step in session.steps():
            step()
            done["TCP"] = "connected to {}:{}".format(*session.sock.getpeername())
            if session.ehlo_resp:
                extensions = ", ".join(session.ehlo_resp.decode().split("\n")[1:])
                done["EHLO"] = sanitize(extensions or "no extensions", 500)
            if isinstance(session.sock, ssl.SSLSocket):
                done["TLS"] = describe_certificate(session.sock)
            elif session.step in ("STARTTLS", "AUTH"):
                done["TLS"] = "none, though it is offered" if session.has_extn("starttls") else "none"
        if route.auth:
            done["AUTH"] = f"logged in as {route.credentials[0]}"
    except (OSError, Rejected) as error:
        session.close()
        reply = error.reply if isinstance(error, Rejected) else session._broken(error)
        name = {"CONN": "TCP", "STARTTLS": "TLS"}.get(reply.command, reply.command)
        done.pop(name, None)
        text = f"{route.address or route.host}:{route.port}: {reply.code} {': '.join(reply.message)}"
        failed = [CheckResult(name, False, text)]
    else:
        session.quit()
    return [CheckResult(name, True, text) for name, text in done.items()] + failed


def describe_certificate(sock: ssl.SSLSocket) -> str:
    """Return TLS version, and subject and expiry of the server's certificate if it was verified."""
    certificate = sock.getpeercert()
    if not certificate:
        return f"{sock.version()}, certificate not verified"
    subject = ", ".join(f"{key}={value}" for item in certificate["subject"] for key, value in item)
    names, until = ", ".join(value for _, value in certificate.get("subjectAltName", ())), certificate["notAfter"]
    days = int((ssl.cert_time_to_seconds(until) - time.time()) // 86400)
    return sanitize(f"{sock.version()}, certificate of {subject or names}, until {until} ({days} days)", 500)


async def probe_mx(route: Route, hostname: str, domain: str, transport: TransportContext) -> list:
    """Query the name servers, then open a session to the first host of the domain that works."""
    if not domain:
        found = await transport.resolver.lookup(hostname, MX, time.monotonic() + route.timeout)
        return [CheckResult("DNS", found.code != SERVFAIL, found.why or "name servers answer")]
    hosts, policy = await admitted_hosts(domain, route, hostname, transport)
    results = [CheckResult("DNS", True, f"{domain} takes mail at {', '.join(hosts)}")]
    if policy:
        results.append(CheckResult("MTA-STS", True, f"mode {policy.mode}: {', '.join(policy.hosts)}"))
    for host in hosts:
        for hop in await next_hops(host, route, policy, transport.resolver):
            if not isinstance(hop, Route):
                results.append(CheckResult("DNS", False, ": ".join(hop.message)))
                continue
            results += await asyncio.to_thread(probe_session, hop, hostname)
            if results[-1].step == "TLS" and not results[-1].ok and hop.tls_if_offered:  # mail goes in clear text
                results += await asyncio.to_thread(probe_session, replace(hop, tls_if_offered=False), hostname)
            if results[-1].ok:
                return results
    return results


async def probe_local(route: Route, hostname: str, domain: str, transport: TransportContext) -> list:
    """Return the route's folder, if it has one; load_settings() has checked that it can be written."""
    folder = route.folder if route.row.into_folder else ""
    return [CheckResult("FILE" if folder else "NONE", True, folder or "nothing to connect to")]


async def probe_haineko(route: Route, hostname: str, domain: str, transport: TransportContext) -> list:
    """Post an empty submission, which is refused after the login."""
    call = HTTPRequest("POST", "/submit", b"{}", basic_auth_header(route.credentials))
    response = await transport.http.request(HTTPTarget.of_route(route), call)
    item = next(iter(items_by_address(json_object(response).get("response"), "rcpt").values()), {})
    if not item or item.get("command") == "AUTH" or response.status in (401, 403, 404):
        raise Rejected(haineko_reply(route, response, item))
    return [CheckResult("AUTH", True, f"a Haineko that {'takes our' if route.credentials else 'wants no'} login")]


async def probe_api(route: Route, hostname: str, domain: str, transport: TransportContext) -> list:
    """Ask the API in the route's row for the account, or for the permissions of the key."""
    response = await transport.http.request(HTTPTarget.of_route(route), route.row.ping(route))
    failure, text = http_failure(route, response), None
    if response.status == 403 and failure.dsn == "5.7.1" and not failure.route_fault:
        text = f"{failure.message[-1]}: the login is good; whether it may send is not known"
    elif response.status == 200:
        with contextlib.suppress(LookupError, TypeError):  # another form than the API's
            text = route.row.account(json_object(response))
    if text is None:
        raise Rejected(failure)
    return [CheckResult("AUTH", bool(text), text or "the login is good, but may not send mail")]


def amazonses_account(document: dict) -> str:
    people = "everybody" if document.get("ProductionAccessEnabled", True) else "verified recipients only"
    return f"the account may send, to {people}" if document["SendingEnabled"] else ""


def account_request(path: str, route: Route) -> HTTPRequest:
    path = path.format(user=urllib.parse.quote(route.credentials[0], "@"))
    return HTTPRequest("GET", path, headers=bearer_header(route))


GRAPH_SCOPES = "https://graph.microsoft.com/.default", "https://graph.microsoft.com/Mail.Send offline_access"
BY_TOKEN = {"needs": ("auth",), "login": ("username", "oauth2"), "errors": graph_and_google_errors}
RELAYS.update(
    ESMTP=Relay(relay_esmtp, probe_esmtp, keeps_octets=True),
    MX=Relay(relay_mx, probe_mx, destination="MX {domain}", refuses=("auth",), keeps_octets=True),
    Haineko=Relay(relay_http, probe_haineko, 2794, "{route.scheme}://{route.url_host}:{route.port}",
        request=haineko_request, replies=haineko_replies),
    SendGrid=Relay(relay_http, probe_api, api_url="https://api.sendgrid.com", needs=("auth",), login=("password",),
        request=sendgrid_request, replies=functools.partial(api_replies, 202, "X-Message-Id"), errors=sendgrid_errors,
        ping=functools.partial(account_request, "/v3/scopes"),
        account=lambda document: "the API key may send" if "mail.send" in document["scopes"] else ""),
    AmazonSES=Relay(relay_amazonses, probe_api, 25, "https://email.{route.region}.amazonaws.com", ("auth", "region"),
        request=amazonses_request, replies=functools.partial(api_replies, 200, "MessageId"), errors=amazonses_errors,
        ping=lambda route: sign_sigv4(HTTPRequest("GET", "/v2/email/account"), route, time.time()),
        account=amazonses_account),
    Mandrill=Relay(relay_http, probe_api, api_url="https://mandrillapp.com", needs=("auth",), login=("password",),
        request=mandrill_request, replies=mandrill_replies,
        errors=lambda document, _: [f"{document['name']}: {document['message']}"] * (document["status"] == "error"),
        ping=lambda route: HTTPRequest("POST", "/api/1.0/users/ping2.json", encode_json({"key": route.credentials[1]})),
        account=lambda document: {"PONG!": "the key is good"}[document["PING"]]),
    MSGraph=Relay(relay_http, probe_api, api_url="https://graph.microsoft.com", scopes=GRAPH_SCOPES, **BY_TOKEN,
        request=msgraph_request, replies=functools.partial(api_replies, 202, "request-id"),
        ping=functools.partial(account_request, "/v1.0/users/{user}"),
        account=lambda document: f"the token is good for {document['id']}"),
    GmailAPI=Relay(relay_http, probe_api, api_url="https://gmail.googleapis.com", **BY_TOKEN,
        request=gmailapi_request, replies=functools.partial(api_replies, 200, "id"),
        ping=functools.partial(account_request, "/gmail/v1/users/me/profile"),
        account=lambda document: f"the token is good for {document['emailAddress']}"),
    File=Relay(functools.partial(relay_local, save_message), probe_local,
        destination="File {route.folder}", into_folder=True),
    Screen=Relay(functools.partial(relay_local, print_on_screen), probe_local, destination="Screen"),
    Discard=Relay(relay_discard, probe_local, destination="Discard"),
)  # fmt: skip

# ======================================================================================================================
# 16. Queue
#     Keeps mail that waits in a file (SQLite) and delivers it, in one process. What follows a reply, bounces and events
#     are functions of values; QueueDB is the file, with its operations; QueueManager delivers.
# ======================================================================================================================

MIN_ATTEMPTS = 3  # before a mail is given up, however old: the clock may have been set forward by days
SCHEMA_VERSION = 2  # PRAGMA user_version of the file
RETENTION = 86400  # seconds for which completed mails and responses to an Idempotency-Key are kept
MAX_HISTORY = 50  # attempts kept of each recipient: the first one and the last ones
MAX_REPLY_LINES = 10  # lines kept of a reply
MAX_INTERRUPTIONS = 3  # in a row, after which a mail is held; before the last one no other suspect is in flight
SUSPECT_SQL = "SELECT count(*) FROM recipients WHERE owner IS NOT NULL AND interruptions>=?"
MAX_ACTIVE = 256  # deliveries under way
MAX_EXPIRED = 64  # mails given up at a time
MAX_BATCH = 256  # operations in one transaction; other processes wait for its end
NEXT_SQL = "SELECT min(destination) FROM recipients WHERE due IS NOT NULL AND destination>?"  # one index search
BOTH_TABLES = "recipients r JOIN messages m ON m.id=r.message"
WAITING_SQL = f"""SELECT r.*, queueid, kind, sender, login, parts, octets, %d AS expired FROM {BOTH_TABLES}
    WHERE destination=? AND due IS NOT NULL AND"""
DUE_SQL = f"{WAITING_SQL % 0} due<=? ORDER BY due LIMIT ?"
EXPIRED_SQL = f"{WAITING_SQL % 1} r.created_at<=? AND attempts>=? ORDER BY r.created_at LIMIT ?"
STATE_SQL = "CASE WHEN due IS NOT NULL THEN 'waiting' WHEN state='open' THEN 'sending' ELSE state END AS state"
WAITING_OF_MESSAGE = "(due IS NOT NULL OR state='held') AND message=(SELECT id FROM messages WHERE queueid=?)"

# Nothing is answered 2xx before it is committed to disk. After a process was killed,
#  - a mail that was not yet in the file is sent again by its client, who has no answer. With an Idempotency-Key it is
#    in the file before anything is sent, and is not sent twice.
#  - leases of the dead process are seen, since it no longer holds its lock. Their recipients are tried again, and the
#    log says that the mail may arrive twice.
#  - the result of an attempt is there together with the bounce and the event that report it, or not at all.


class AttemptResult(NamedTuple):
    """Result of an attempt, to be recorded, and what follows for its recipient."""

    reply: Reply | None  # None: the lifetime ended without another attempt
    state: str  # "open", "delivered", "failed", or "held" after too many interruptions
    pause: float = 0.0  # seconds until the next attempt, if open
    follow_ups: tuple = ()  # QueueItems that report it
    destination: str = ""  # by the settings now in force; "": as it was
    interruptions: int = 0  # in a row


def attempt_result(reply: Reply, attempts: int, age: float, jitter: float, settings: QueueSettings) -> AttemptResult:
    """Return what follows the reply to the latest of `attempts` for a mail `age` seconds old; jitter is 0 to 1."""
    if reply.accepted:
        return AttemptResult(reply, "delivered")
    expired = age >= settings.lifetime
    if not reply.temporary or (expired and attempts >= MIN_ATTEMPTS):
        return AttemptResult(reply, "failed")
    pause = settings.retry_after[min(attempts, len(settings.retry_after)) - 1] * (0.8 + 0.4 * jitter)
    left = settings.lifetime if expired else max(settings.lifetime - age, 1.0)  # the last attempt is at its end
    return AttemptResult(reply, "open", min(max(pause, reply.retry_after), left))


class NewRecipient(NamedTuple):
    as_written: str  # by the client
    recipient: str  # as passed to relays
    number: int  # of the copy
    destination: str  # see destination_key()


class QueueItem(NamedTuple):
    queueid: str
    kind: str  # "mail", or "event" for the webhook
    sender: str  # "" is the null sender
    login: str  # user name that sent it; "" if none was needed
    created_at: float
    message: Message
    recipients: tuple = ()  # of NewRecipient
    key: bytes | None = None  # digest of login, path and Idempotency-Key
    body_digest: bytes | None = None  # of the request's body
    send_at: float = 0.0  # no attempt is made before
    response: str | None = None  # to the request, for later ones with the same key
    others: tuple = ()  # QueueItems that are stored with it, or not at all


class LeasedRecipient(NamedTuple):
    id: int
    item: QueueItem  # without its recipients, created when its lifetime began
    to: NewRecipient
    attempts: int
    history: list = ()  # of (time, Reply), of each attempt
    expired: bool = False  # to be given up without another attempt


def destination_key(route: Route, domain: str) -> str:
    """Return the key of the next hop: an unreachable host delays mail to its own destination only."""
    row = route.row if route.relay in ("File", "MX") else UNKNOWN_RELAY
    return row.destination.format(route=route, domain=domain.lower())


def queued_reply(queueid: str, reply: Reply | None = None) -> Reply:
    """Return the reply for a recipient that waits, with the lines of its latest reply."""
    dialogue = reply and reply.dialogue
    return make_reply("queued", *(reply.message if reply else ()), word=queueid, mailer="Queue", dialogue=dialogue)


# -- Bounces and events


def notifications(leased: LeasedRecipient, reply: Reply, state: str, settings: Settings, now: float) -> tuple:
    """Return the items that report an attempt: an event for the webhook, a bounce for the sender; usually none."""
    item, url, items = leased.item, settings.queue.webhook, []
    event = "deferred" if state == "open" and leased.attempts == 1 else state
    if not item.sender:  # an event or a bounce
        return ()
    if event != "open" and url:  # in the form of Standard Webhooks; the queue id is the webhook-id
        data = {"queueid": item.queueid, "login": item.login or None, "addresser": item.sender}
        data = {**data, **reply_to_dict(leased.to.as_written, reply), "attempts": leased.attempts}
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        body = ENCODER.encode({"type": f"message.{event}", "timestamp": moment, "data": data}).encode()
        to = NewRecipient(url, url, 1, f"Webhook {WEBHOOK_URL.fullmatch(url)['host']}")
        items.append(QueueItem(new_queueid(now), "event", "", "", now, Message((body,)), (to,)))
    if state == "failed" and "FAILURE" in item.message.dsn[1]:
        if item.login or not check_recipient(parse_address(item.sender), settings):
            items.append(new_bounce(leased, reply, settings, now))  # others' addresses may be forged (backscatter)
    return tuple(items)


def new_bounce(leased: LeasedRecipient, reply: Reply, settings: Settings, now: float) -> QueueItem:
    """Return the delivery status notification (RFC 3464) that a recipient's mail has failed."""
    item, to, queueid = leased.item, leased.to.recipient, new_queueid(now)
    header = b""  # the fields by which a sender recognizes the message, as far as they are short
    for match in RETURNED_FIELD.finditer(item.message.copy(to, leased.to.number).partition(b"\r\n\r\n")[0] + b"\r\n"):
        header += match[0] if len(header) + len(match[0]) <= MAX_RETURNED else b""
    lines = [sanitize(line, 500).encode("ascii", "replace").decode() for line in reply.message[:MAX_REPLY_LINES]]
    text = BOUNCE_TEMPLATE.format(
        item=item, to=to, attempts=leased.attempts, hostname=settings.hostname, queueid=queueid,
        boundary=f"{queueid}/report", date=rfc5322_date(int(now)), arrival_date=rfc5322_date(int(item.created_at)),
        encoding="7bit" if (header + to.encode()).isascii() else "8bit",
        address_type="rfc822" if to.isascii() else "utf-8", server=f" ({reply.host})" if reply.host else "",
        reply="\r\n    ".join([f"{reply.code} {line}".rstrip() for line in lines or [""]]),
        remote_mta=f"Remote-MTA: dns; {reply.host}\r\n" if reply.host else "",
        status=reply.dsn or ("4.4.7" if reply.temporary else "5.0.0"),  # RFC 3463: delivery time expired; undefined
    )  # fmt: skip
    octets = text.encode() + header + f"\r\n--{queueid}/report--\r\n".encode()
    message, domain = Message((octets,), needs_8bitmime=not octets.isascii()), parse_address(item.sender).domain
    destination = destination_key(resolve_route(domain, "", settings)[0], domain)
    sender = NewRecipient(item.sender, item.sender, 1, destination)
    return QueueItem(queueid, "mail", "", item.login, now, message, (sender,))


RETURNED_FIELD = re.compile(rb"(?im)^(?:From|To|Subject|Date|Message-Id):[^\r\n]*\r\n(?:[ \t][^\r\n]*\r\n)*")
MAX_RETURNED = 4096  # octets

BOUNCE_TEMPLATE = """\
Received: by {hostname} (Haineko) id {queueid};
	{date}
From: Mail Delivery System <MAILER-DAEMON@{hostname}>
To: {item.sender}
Subject: Undelivered Mail Returned to Sender
Date: {date}
Message-Id: <{queueid}.1@{hostname}>
Auto-Submitted: auto-replied
X-Haineko-Loop: {hostname}
MIME-Version: 1.0
Content-Type: multipart/report; report-type=delivery-status;
 boundary="{boundary}"

--{boundary}
Content-Type: text/plain; charset=UTF-8
Content-Transfer-Encoding: {encoding}

This is the mail system at {hostname}. Your mail to <{to}> could not be delivered
and will not be tried again. The beginning of its header is attached.
After {attempts} attempt(s) since {arrival_date} the last reply{server} was:

    {reply}

--{boundary}
Content-Type: message/delivery-status

Reporting-MTA: dns; {hostname}
X-Haineko-Queueid: {item.queueid}
Arrival-Date: {arrival_date}

Final-Recipient: {address_type}; {to}
Action: failed
Status: {status}
{remote_mta}Diagnostic-Code: smtp; {reply}

--{boundary}
Content-Type: text/rfc822-headers
Content-Transfer-Encoding: {encoding}

""".replace("\n", "\r\n")


async def post_webhook(leased: LeasedRecipient, secret: bytes, now: float, pool: Any, timeout: float = 15.0) -> Reply:
    """POST an event to its webhook (Standard Webhooks 1.0); return a reply as a relay gives it."""
    if not secret:
        words = "the settings have no webhook any more"
        return make_reply("web-refused", word=words, mailer="Webhook", command="HTTP")
    base_url, path = WEBHOOK_URL.fullmatch(leased.to.recipient).group("base", "path")
    target, body = HTTPTarget(base_url, timeout, "Webhook"), leased.item.message.parts[0]
    event_id, moment = f"msg_{leased.item.queueid}", str(int(now))
    digest = hmac.digest(secret, f"{event_id}.{moment}.".encode() + body, "sha256")
    headers = {"webhook-id": event_id, "webhook-timestamp": moment}
    headers["webhook-signature"] = f"v1,{base64.b64encode(digest).decode()}"
    try:
        status = (await pool.request(target, HTTPRequest("POST", path or "/", body, tuple(headers.items())))).status
    except Rejected as refused:
        return refused.reply
    slug = "web-accepted" if 200 <= status <= 299 else "web-refused" if status == 410 else "web-later"  # 410 is Gone
    return make_reply(slug, word=str(status), command="HTTP", **target.endpoint)


# -- The file


class QueueDB:
    """The queue's file as one process uses it. One thread commits, and what comes meanwhile is the next transaction, so
    that many mails share one fsync."""

    def __init__(self, settings: QueueSettings, wake_socket: socket.socket | None = None) -> None:
        self.settings, self.wake_socket = settings, wake_socket
        self.timeout = 5.0  # seconds to wait for another program's lock
        self.waiting: list = []  # of (operation, values, future)
        self.committing: asyncio.Task | None = None
        self.thread = ThreadPoolExecutor(1)
        self.db: Any = None
        self.file_ids: list = []  # of the files as they were opened
        self.slot = 1 + int.from_bytes(os.urandom(4), "big")  # owner of this process's leases; no other has the number
        self.locks = 0  # the lock file
        self.fault = ""  # why the file can't be used
        self.is_other_version = False  # that is why: another Haineko wrote it

    async def do(self, operation: Callable, *values: Any) -> Any:
        """Return the result of operation(db, slot, *values) once it is on disk; raise Rejected if that fails."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self.waiting.append((operation, values, future))
        if not self.committing or self.committing.done():
            self.committing = loop.create_task(self._commit_waiting())
        result = await future
        if isinstance(result, Exception):
            raise result
        return result

    async def _commit_waiting(self) -> None:
        while self.waiting:
            batch, self.waiting = self.waiting[:MAX_BATCH], self.waiting[MAX_BATCH:]
            work = [(operation, values) for operation, values, _ in batch]
            try:
                results = await asyncio.get_running_loop().run_in_executor(self.thread, self.commit, work)
            except Exception as error:  # as when this Python has no sqlite3: nobody may wait for ever
                results = [error] * len(batch)
            for (_, _, future), result in zip(batch, results):
                if not future.done():  # its task was cancelled
                    future.set_result(result)

    async def add(self, operation: Callable, *values: Any) -> Any:
        """Return the result of an operation that stores mail; raise Rejected if the disk is too full."""
        if self.free_space() < self.settings.min_free:
            raise Rejected(make_reply("store", f"less than {self.settings.min_free} octets are free", mailer="Queue"))
        return await self.do(operation, *values)

    async def do_eventually(self, operation: Callable, *values: Any) -> None:
        """Record what has happened already: at once, or in a task of its own as soon as the file can be used again."""
        try:
            await self.do(operation, *values)
        except Rejected:
            loop = asyncio.get_running_loop()
            loop.call_later(1.0, lambda: loop.create_task(self.do_eventually(operation, *values)))

    def wake_manager(self) -> None:
        """Tell the queue manager that something is due."""
        if self.wake_socket:
            with contextlib.suppress(OSError):  # it has been woken often enough
                self.wake_socket.send(b"\0", socket.MSG_DONTWAIT)

    def free_space(self) -> int:
        """Return how many octets the disk has free, -1 if it can't be used."""
        with contextlib.suppress(OSError):
            disk = os.statvfs(os.path.dirname(self.settings.path))
            return disk.f_bavail * disk.f_frsize
        return -1

    def health_error(self) -> str:
        """Return what is wrong with the file or its disk, "" for nothing."""
        full = "disk full" if self.free_space() < self.settings.min_free else ""
        return "the queue can't be used" if self.fault else full

    def commit(self, work: list) -> list:
        """Return the results of operations, on disk in one transaction; a Rejected for each if that fails."""
        import sqlite3

        fault = ""
        try:
            self._lock()
            db = self._open()  # now, when no other process writes: the files may have been replaced
            db.execute("BEGIN IMMEDIATE")
            results = [operation(db, self.slot, *values) for operation, values in work]
            db.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            self.close()
            fault = f"{self.settings.path}: {error}"
            results = [Rejected(make_reply("store", mailer="Queue")) for _ in work]
        except Exception as error:  # a bug in one operation must not undo the others
            self.close()
            if len(work) > 1:
                return [self.commit([one])[0] for one in work]
            log_exception("queue")
            results = [error]
        finally:
            if self.locks:
                fcntl.lockf(self.locks, fcntl.LOCK_UN, 1, 0)
        if fault != self.fault:
            text = f"queue: {sanitize(fault)}; nothing is accepted into it" if fault else "queue: can be used again"
            log.lines(text, level="error" if fault else "info")
        self.fault = fault
        return results

    def close(self, for_good: bool = False) -> None:
        """Undo what isn't on disk yet; the next commit opens the file again."""
        if self.db:
            self.db.close()
        self.db = None
        if for_good and self.locks:
            os.close(self.locks)
            self.locks = 0

    def _lock(self) -> None:
        """Lock the lock file's first byte, for a transaction, and the one of this process's slot, for good. The kernel
        unlocks them when the process ends, so the owner of a lease is known to be alive. No process may open the file
        twice: closing one handle would unlock all."""
        path = self.settings.path + ".lock"
        if self.locks and file_id(path) != file_id(self.locks):  # it was replaced
            os.close(self.locks)
            self.locks = 0
        self.locks = self.locks or open_private(path, os.O_RDWR)
        for byte in (0, self.slot):
            fcntl.lockf(self.locks, fcntl.LOCK_EX, 1, byte)  # SQLite itself would wait by sleeping, sometimes long

    def _open(self) -> Any:
        """Return the connection; raise sqlite3.Error or OSError."""
        import sqlite3

        path, *logs = paths = [self.settings.path + suffix for suffix in ("", "-wal", "-shm")]
        if self.db and self.file_ids != list(map(file_id, paths)):  # they were moved or replaced
            if self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()["busy"]:  # another program reads them now
                return self.db
            log.lines(f"queue: {sanitize(path)} was moved or replaced; opening what is there now")
            for name, before in zip(logs, self.file_ids[1:]):  # all mail is in the file that was moved
                if before and file_id(name) == before:
                    os.unlink(name)  # or it would be read with the new one
            self.close()
        if self.db:
            return self.db
        for name in paths:
            if name == path or os.path.lexists(name):
                os.close(open_private(name, os.O_RDONLY))
        db = self.db = sqlite3.connect(path, timeout=self.timeout, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if not version:
            db.executescript(f"BEGIN IMMEDIATE; {SCHEMA}; PRAGMA user_version={SCHEMA_VERSION}; COMMIT")
        self.is_other_version = version not in (0, SCHEMA_VERSION)
        if self.is_other_version:
            way_out = "let the Haineko that wrote it deliver what waits, then delete it"
            raise OSError(f"is of version {version}, this Haineko's is {SCHEMA_VERSION}: {way_out}")
        self.file_ids = list(map(file_id, paths))
        return db


def file_id(file: str | int) -> tuple | None:
    """Return the device and inode of a path or an open file, None if there is none."""
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(file)
        return found.st_dev, found.st_ino
    return None


def open_private(path: str, flags: int) -> int:
    """Open or create a file that its owner alone may read; raise OSError for a link and for another user's file."""
    handle, user = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600), os.geteuid()
    found = os.fstat(handle)
    if stat.S_ISREG(found.st_mode) and (found.st_uid in (0, user) or not user):
        if found.st_uid == user and found.st_mode & 0o077:
            os.fchmod(handle, 0o600)
        return handle
    os.close(handle)
    raise OSError(errno.EPERM, "is not a regular file of this user", path)


# A new file; times are seconds since the epoch.
SCHEMA = """
    CREATE TABLE messages (
        id INTEGER PRIMARY KEY, queueid TEXT NOT NULL UNIQUE, kind TEXT NOT NULL,  -- mail, or event for the webhook
        sender TEXT NOT NULL, login TEXT NOT NULL, created_at REAL NOT NULL,
        open_recipients INTEGER NOT NULL, completed_at REAL,  -- recipients whose result is not final; since when none
        owner INTEGER,                     -- slot of the process that has yet to answer its client
        key BLOB UNIQUE, body_digest BLOB, response TEXT,  -- with Idempotency-Key; JSON of status, headers, body
        size INTEGER NOT NULL, parts TEXT NOT NULL,  -- JSON: flags (1: 8BITMIME, 2: SMTPUTF8), length of each part, DSN
        octets BLOB NOT NULL               -- the parts; empty once completed
    );
    CREATE INDEX messages_by_done ON messages(completed_at) WHERE completed_at IS NOT NULL;
    CREATE TABLE recipients (
        id INTEGER PRIMARY KEY, message INTEGER NOT NULL REFERENCES messages(id) ON DELETE CASCADE,
        as_written TEXT NOT NULL, recipient TEXT NOT NULL, number INTEGER NOT NULL, destination TEXT NOT NULL,
        state TEXT NOT NULL,               -- open, delivered, failed, dropped or held
        created_at REAL NOT NULL,          -- or send_at, from which the lifetime counts
        due REAL,                          -- open and not leased: time of the next attempt; 0: now, even if throttled
        owner INTEGER,                     -- leased: slot of the process that delivers it
        attempts INTEGER NOT NULL, history TEXT NOT NULL,  -- JSON, see add_attempt()
        interruptions INTEGER NOT NULL DEFAULT 0  -- in a row
    );
    CREATE INDEX recipients_by_message ON recipients(message);
    CREATE INDEX recipients_by_owner ON recipients(owner) WHERE owner IS NOT NULL;
    CREATE INDEX recipients_by_due ON recipients(destination, due) WHERE due IS NOT NULL;
    CREATE INDEX recipients_by_age ON recipients(destination, created_at) WHERE due IS NOT NULL;
    CREATE INDEX recipients_held ON recipients(destination) WHERE state='held'
"""


# -- Operations on the file, called as operation(db, slot, *values) within a transaction; rows are sqlite3.Row


def enqueue(db: Any, slot: int, item: QueueItem, results: list | None = None, leased: bool = False) -> Any:
    """Store an item and return None, or return the earlier message with the same key. Recipients are due at once or at
    send_at, leased to this process if `leased`, or as their first attempts say."""
    if item.key:
        expired = item.created_at - RETENTION
        db.execute("UPDATE messages SET key=NULL WHERE key=? AND created_at<=?", (item.key, expired))
        sql = "SELECT queueid, body_digest, owner, response FROM messages WHERE key=?"
        if earlier := db.execute(sql, (item.key,)).fetchone():
            return earlier
    octets, flags = b"".join(item.message.parts), item.message.needs_8bitmime + 2 * item.message.needs_smtputf8
    parts = json.dumps([flags, *map(len, item.message.parts), *item.message.dsn])
    owner = slot if leased or results else None
    message = db.execute(
        "INSERT INTO messages (queueid, kind, sender, login, created_at, open_recipients, owner, key, body_digest,"
        " response, size, parts, octets) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (item.queueid, item.kind, item.sender, item.login, item.created_at, len(item.recipients), owner, item.key,
         item.body_digest, item.response, len(octets), parts, octets),
    ).lastrowid  # fmt: skip
    starts_at = max(item.created_at, item.send_at)  # the lifetime counts from then
    due = starts_at if owner is None else None
    db.executemany(
        "INSERT INTO recipients (as_written, recipient, number, destination, message, state, created_at, due, owner,"
        " attempts, history) VALUES (?, ?, ?, ?, ?, 'open', ?, ?, ?, 0, '[]')",
        [(*recipient, message, starts_at, due, owner) for recipient in item.recipients],
    )
    if results:  # their attempts took a while
        finish_request(db, slot, item.queueid, results, None, max(time.time(), item.created_at))
    for other in item.others:
        enqueue(db, slot, other)
    return None


def finish_request(db: Any, slot: int, queueid: str, results: list, response: str | None, now: float) -> None:
    """Record the results of a mail's first attempts, and the response to its client."""
    sql = f"SELECT r.id FROM {BOTH_TABLES} WHERE queueid=? ORDER BY r.id"
    for row, result in zip(db.execute(sql, (queueid,)).fetchall(), results):
        finish_attempt(db, slot, row["id"], result, now)
    db.execute("UPDATE messages SET owner=NULL, response=? WHERE queueid=?", (response, queueid))


def finish_attempt(db: Any, slot: int, row_id: int, result: AttemptResult, now: float) -> None:
    """Record the result of an attempt and what reports it; ends the lease."""
    row = db.execute("SELECT * FROM recipients WHERE id=? AND owner=?", (row_id, slot)).fetchone()
    if not row:  # the file was replaced meanwhile
        return
    due = now + result.pause if result.state == "open" else None
    history = add_attempt(row["history"], now, result.reply) if result.reply else row["history"]
    attempts, destination = row["attempts"] + bool(result.reply), result.destination or row["destination"]
    db.execute(
        "UPDATE recipients SET state=?, due=?, owner=NULL, attempts=?, interruptions=?, history=?, destination=?"
        " WHERE id=?", (result.state, due, attempts, result.interruptions, history, destination, row_id)
    )  # fmt: skip
    if result.state in ("delivered", "failed"):
        close_recipients(db, row["message"], 1, now)
    for item in result.follow_ups:
        enqueue(db, slot, item)


def close_recipients(db: Any, message: int, count: int, now: float) -> None:
    """Count recipients that are done with; after the last one delete the octets; the result stays for a day."""
    db.execute("UPDATE messages SET open_recipients=open_recipients-? WHERE id=?", (count, message))
    db.execute("UPDATE messages SET completed_at=?, octets=x'' WHERE id=? AND open_recipients<=0", (now, message))


def add_attempt(history: str, now: float, reply: Reply) -> str:
    """Return the JSON of the attempts with one more; the ones in the middle go if there are too many."""
    lines = [sanitize(line, 500) for line in reply.message[:MAX_REPLY_LINES]]
    attempts: list = []
    with contextlib.suppress(ValueError, TypeError):  # of a damaged file
        attempts += json.loads(history)
    attempts.append([round(now, 3), reply.code, reply.dsn, reply.command, lines, reply.mailer, reply.host, reply.port])
    return ENCODER.encode(attempts[:1] + attempts[1:][1 - MAX_HISTORY :])


def parse_history(history: str) -> list:
    """Return (time, Reply) of each attempt that add_attempt() wrote."""
    attempts = json.loads(history)
    return [(at, Reply(code, dsn, step, tuple(lines), *host)) for at, code, dsn, step, lines, *host in attempts]


def lease_due(db: Any, slot: int, now: float, limit: int, in_flight: dict, throttled: dict, expired: float) -> list:
    """Lease what is due to this process: up to `limit` of each destination, less those in flight. `throttled` is
    {destination: failures}; of these only what flush_queue() made due, and what was created before `expired` and needs
    no more attempts."""
    free, leased, destination = MAX_ACTIVE - sum(in_flight.values()), [], ""
    suspect = db.execute(SUSPECT_SQL, (MAX_INTERRUPTIONS - 1,)).fetchone()[0]
    while destination := db.execute(NEXT_SQL, (destination,)).fetchone()[0]:
        count = min(limit - in_flight.get(destination, 0), free)
        if count <= 0:
            continue
        rows = db.execute(DUE_SQL, (destination, 0 if destination in throttled else now, count)).fetchall()
        if destination in throttled:
            attempts = MIN_ATTEMPTS - throttled[destination]
            rows += db.execute(EXPIRED_SQL, (destination, expired, attempts, MAX_EXPIRED)).fetchall()
        for row in {row["id"]: row for row in rows}.values():
            if row["interruptions"] >= MAX_INTERRUPTIONS - 1 and suspect:
                continue
            try:
                leased.append(leased_recipient(row))
                db.execute("UPDATE recipients SET due=NULL, owner=? WHERE id=?", (slot, row["id"]))
                suspect = suspect or row["interruptions"] >= MAX_INTERRUPTIONS - 1
            except (ValueError, TypeError):  # the file is damaged; the row would keep all others from being read
                log_exception(row["queueid"])
                db.execute("UPDATE recipients SET state='held', due=NULL WHERE id=?", (row["id"],))
        free -= len(rows)
    return leased


def leased_recipient(row: Any) -> LeasedRecipient:
    history, octets, parts = parse_history(row["history"]), io.BytesIO(row["octets"]), json.loads(row["parts"])
    flags, *lengths = [part for part in parts if type(part) is int]
    dsn = tuple([part for part in parts if type(part) is str]) or DEFAULT_DSN  # absent in files of older versions
    message = Message(tuple([octets.read(length) for length in lengths]), bool(flags & 1), flags > 1, dsn)
    item = QueueItem(row["queueid"], row["kind"], row["sender"], row["login"], row["created_at"], message)
    to = NewRecipient(*[row[name] for name in NewRecipient._fields])
    return LeasedRecipient(row["id"], item, to, row["attempts"], history, bool(row["expired"] and history))


def maintain(db: Any, slot: int, queue_db: QueueDB, now: float, set_back: bool = False) -> None:
    """Release the leases of processes that have ended (`queue_db` has the lock file); delete some of what is old. If
    the clock was set back, make due what would wait longer than any pause, but not what is to be sent later."""
    sql = "SELECT DISTINCT owner FROM recipients WHERE owner IS NOT NULL AND owner<>?"
    for (owner,) in db.execute(sql, (slot,)).fetchall():
        try:
            fcntl.lockf(queue_db.locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, owner)
        except OSError:  # it lives
            continue
        release_leases(db, owner, queue_db.settings, now)
        fcntl.lockf(queue_db.locks, fcntl.LOCK_UN, 1, owner)
    sql = "DELETE FROM messages WHERE id IN (SELECT id FROM messages WHERE completed_at<? LIMIT 500)"
    db.execute(sql, (now - RETENTION,))
    if set_back:
        latest = now + 1.2 * max(queue_db.settings.retry_after)
        created_at = "(SELECT created_at FROM messages WHERE id=message)"
        db.execute(f"UPDATE recipients SET due=? WHERE due>? AND (attempts>0 OR due<={created_at})", (now, latest))


def release_leases(db: Any, owner: int, settings: QueueSettings, now: float, where: str = "", *values: Any) -> None:
    """End the leases of a slot, or those that an SQL condition selects; their mail may have been sent."""
    reply = make_reply("interrupted", mailer="Queue")
    sql = f"SELECT r.*, m.queueid, m.kind FROM {BOTH_TABLES} WHERE r.owner=?{where}"
    for row in db.execute(sql, (owner, *values)).fetchall():
        count = row["interruptions"] + 1
        held = count >= MAX_INTERRUPTIONS
        what = f"held after {MAX_INTERRUPTIONS} times; see `queue retry`" if held else "to be tried again"
        text, status = f"delivery interrupted, the mail may arrive twice; {what}", "held" if held else "deferred"
        to = [row["destination" if row["kind"] == "event" else "recipient"]]  # a webhook's URL may be a secret
        log.event("warning", "interrupted", text, queueid=row["queueid"], to=to, status=status)
        pause = attempt_result(reply, row["attempts"] + 1, 0, random_unit(), settings).pause
        result = AttemptResult(reply, "held" if held else "open", pause, interruptions=count)
        finish_attempt(db, owner, row["id"], result, now)
        db.execute("UPDATE messages SET owner=NULL WHERE id=?", (row["message"],))


def message_status(db: Any, slot: int, queueid: str) -> dict | None:
    """Return the row of a mail with the rows of its "recipients", None if it is not in the file."""
    sql = "SELECT id, queueid, sender, login, created_at, size FROM messages WHERE queueid=? AND kind='mail'"
    message = db.execute(sql, (queueid,)).fetchone()
    sql = f"SELECT as_written, {STATE_SQL}, due, history FROM recipients WHERE message=? ORDER BY id"
    return message and {**dict(message), "recipients": db.execute(sql, (message["id"],)).fetchall()}


def queue_stats(db: Any, slot: int, now: float) -> dict:
    """Return how many recipients wait, are being sent or held, in all and by destination, and the age of the oldest."""
    routes: dict = {}
    columns = "SELECT destination, count(*), min(created_at) FROM recipients"
    conditions = {"waiting": "due IS NOT NULL", "sending": "owner IS NOT NULL", "held": "state='held'"}
    for state, condition in conditions.items():
        for destination, count, created_at in db.execute(f"{columns} WHERE {condition} GROUP BY destination"):
            stats = routes.setdefault(destination, {**dict.fromkeys(conditions, 0), "oldest": 0})
            stats.update({state: count, "oldest": max(stats["oldest"], round(now - created_at))})
    total = {state: sum(stats[state] for stats in routes.values()) for state in conditions}
    return {**total, "oldest": max([stats["oldest"] for stats in routes.values()], default=None), "routes": routes}


def open_recipients_after(db: Any, slot: int, row_id: int, limit: int) -> list:
    """Return rows of the next recipients that are open or held, in the order in which they came."""
    columns = f"r.id, queueid, size, m.created_at, due, sender, recipient, history, {STATE_SQL}"
    sql = f"SELECT {columns} FROM {BOTH_TABLES} WHERE r.id>? AND r.state IN ('open', 'held') ORDER BY r.id LIMIT ?"
    return db.execute(sql, (row_id, limit)).fetchall()


def flush_queue(db: Any, slot: int, queueid: str | None) -> int:
    """Make what waits (not for `send_at`), or waits or is held of one mail, due now; return how many recipients."""
    if not queueid:
        return db.execute("UPDATE recipients SET due=0 WHERE due>=0 AND created_at<=?", (time.time(),)).rowcount
    sql = f"UPDATE recipients SET due=0, state='open', interruptions=0 WHERE {WAITING_OF_MESSAGE}"
    return db.execute(sql, (queueid,)).rowcount


def drop_message(db: Any, slot: int, queueid: str, now: float) -> Any:
    """Give up what waits of a mail, without a bounce; return how many recipients, or Rejected if one is being sent."""
    message = message_status(db, slot, queueid)
    if message and any(row["state"] == "sending" for row in message["recipients"]):
        return Rejected(make_reply("queue-sending"))
    sql = f"UPDATE recipients SET state='dropped', due=NULL WHERE {WAITING_OF_MESSAGE}"
    if count := db.execute(sql, (queueid,)).rowcount:
        close_recipients(db, message["id"], count, now)
    return count


# -- The process that delivers


class QueueManager:
    """Delivers what is due: a few at a time to each destination, so that an unreachable host delays no other."""

    def __init__(self, app: Any, wake_socket: socket.socket) -> None:
        self.app, self.db, self.wake_socket = app, app.queue, wake_socket
        self.in_flight: Counter = Counter()  # deliveries by destination
        self.settings: Settings | None = None  # those of the latest _schedule()
        self.throttled: dict = {}  # destination: (time.monotonic() of its end, failures in a row)

    async def run(self) -> None:
        self.wake_socket.setblocking(False)
        wakeups, checked_at, clock_offset = AsyncSocket(self.wake_socket), 0.0, float("inf")
        while not self.app.stopping:
            now = time.time()
            try:
                if time.monotonic() - checked_at > 1:
                    checked_at = time.monotonic()
                    set_back = now - checked_at < clock_offset - 60  # at the start: perhaps while no process ran
                    await self.db.do(maintain, self.db, now, set_back)
                    clock_offset = now - checked_at  # from time.monotonic()
                await self._schedule(now)
                await wakeups.recv(65536, time.monotonic() + 1)
            except socket.timeout:
                pass
            except Rejected:  # the log says why
                await asyncio.sleep(1.0)

    async def _schedule(self, now: float) -> None:
        settings, monotonic = self.app.settings, time.monotonic()
        if settings is not self.settings:  # a destination may mean another host now
            self.settings, self.throttled = settings, {}
        throttled = {key: failures for key, (until, failures) in self.throttled.items() if until > monotonic}
        self.in_flight = +self.in_flight  # without those that have none
        limits = settings.smtpd.max_workers, self.in_flight.copy(), throttled, now - settings.queue.lifetime
        for leased in await self.db.do(lease_due, now, *limits):
            self.in_flight[leased.to.destination] += 1
            asyncio.get_running_loop().create_task(self._deliver(leased))

    async def _deliver(self, leased: LeasedRecipient) -> None:
        """Attempt a delivery; end the lease if its result can't be recorded because of a bug."""
        try:
            await self._attempt_and_record(leased)
        except Exception:  # nobody else would end the lease
            log_exception(leased.item.queueid)
            await self.db.do_eventually(release_leases, self.db.settings, time.time(), " AND r.id=?", leased.id)
        finally:
            self.in_flight[leased.to.destination] -= 1
        self.db.wake_manager()

    async def _attempt_and_record(self, leased: LeasedRecipient) -> None:
        """Make an attempt, log and record its result; if the mail has expired, that of the last attempt is final."""
        settings, item, destination = self.app.settings, leased.item, ""
        if leased.expired:
            (_, reply), result = leased.history[-1], AttemptResult(None, "failed")
        else:
            reply, destination = await self._attempt(leased, settings)
            leased, age = leased._replace(attempts=leased.attempts + 1), time.time() - item.created_at
            result = attempt_result(reply, leased.attempts, age, random_unit(), settings.queue)
        now, state, relay = time.time(), result.state, reply.mailer or ""
        note = f"; next attempt in {result.pause:.0f} s" if state == "open" else ""
        note += "; may arrive twice" if reply.maybe_delivered else ""
        waits = "unsure" if reply.maybe_delivered else "deferred"
        outcomes = {"delivered": ("sent", "accepted"), "failed": ("bounced", "failed"), "open": ("deferred", waits)}
        status, outcome = outcomes[state]
        to = leased.to.destination if item.kind == "event" else leased.to.recipient  # a webhook's URL may be a secret
        fields = {"queueid": item.queueid, "from": item.sender, "to": [to]}
        log_reply("attempt", reply, status, max(now - item.created_at, 0), note, **fields)
        if item.kind == "event":
            metrics.add("haineko_webhook_events_total", "deferred" if state == "open" else state)
        else:
            relay = "File" if relay.startswith("/") else relay if relay in RELAYS else "other"
            metrics.add("haineko_recipients_total", relay, outcome)
        follow_ups = notifications(leased, reply, state, settings, now)
        result = result._replace(destination=destination, follow_ups=follow_ups)
        await self.db.do_eventually(finish_attempt, leased.id, result, now)

    async def _attempt(self, leased: LeasedRecipient, settings: Settings) -> tuple:
        """Return the reply to an attempt and its destination, by the settings that are in force now. A failure to open
        a session throttles the destination, for the third pause at most: new mail waits too."""
        item, recipient, before = leased.item, leased.to.recipient, leased.to.destination
        if item.kind == "event":
            reply = await post_webhook(leased, settings.queue.secret, time.time(), self.app.transport.http)
            destination = before
        else:
            redirect, sender = settings.smtpd.redirect, parse_address(item.sender) or NULL_SENDER
            # Mail that was queued before smtpd.redirect was set is redirected, too.
            to = parse_address(redirect[0] if redirect and recipient not in redirect else recipient)
            sandbox = before == destination_key(SANDBOX_ROUTE, "")
            route = SANDBOX_ROUTE if sandbox else resolve_route(to.domain, sender.domain, settings)[0]
            envelope = item.queueid, item.sender, (to.addr_spec,), item.message, leased.to.number, settings.dkim
            result = await attempt_transaction(Transaction(route, settings.hostname, *envelope), self.app.transport)
            reply, destination = result.replies[0], destination_key(route, to.domain)
        (until, failures), now = self.throttled.get(before, (0.0, 0)), time.monotonic()
        if not (reply.temporary and reply.command in ("CONN", "EHLO", "STARTTLS", "AUTH")):  # before the first mail
            self.throttled.pop(before, None)
        elif until <= now:
            pause = attempt_result(reply, min(failures + 1, 3), 0, random_unit(), settings.queue).pause
            self.throttled[before] = now + pause, failures + 1
        return reply, destination


def log_reply(event: str, reply: Reply, status: str, delay: float | None, note: str = "", **fields: Any) -> None:
    """Log a reply with the keys of Postfix's; `fields` come first in the line."""
    refused = reply.origin == "policy"
    text = sanitize(("; " if refused else " ").join(reply.message), 500)
    text += "" if refused or reply.accepted else f" (in reply to {reply.command})"
    more = {"relay": reply.relay, "delay": delay, "fallback": reply.fallback, "code": reply.code, "dsn": reply.dsn}
    level = "warning" if status in ("deferred", "bounced") else "info"
    log.event(level, event, text + note, **fields, **more, status=status)


# ======================================================================================================================
# 17. Submission pipeline
#     submit() takes a request and calls every stage in order: parse, check, compose, plan, deliver or queue, answer.
# ======================================================================================================================

MAX_REPORTED_ERRORS = 10
# A string (RFC 8941 3.3.3), or a word without quotes, which most clients send.
IDEMPOTENCY_KEY = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\]){1,255})"|([!#-+\--~]{1,255})')
MAX_INLINE_WAIT = 60  # seconds that a cloud may ask for while the client waits
LEAST_RETRY_AFTER = {409: 2, 429: 1, 503: 60}  # seconds by HTTP status
ctime = functools.lru_cache(maxsize=2)(time.ctime)
MAX_ECHO = 200  # characters of a header that an answer repeats, and the queue stores


class App:
    """State of a process: the settings in force, SMTP sessions, the queue, and whether it is stopping."""

    def __init__(self, settings: Settings, wake_socket: Any = None, limits: SharedLimits | None = None) -> None:
        self.transport = TransportContext(limits=limits)
        self.stopping = False
        self.octets_in_flight = 0  # of bodies that arrived in parts
        self.queue = QueueDB(settings.queue, wake_socket) if settings.queue else None
        self.apply(settings)

    def apply(self, settings: Settings) -> None:
        """Use these settings from the next request on; the path of the queue stays what it was."""
        if self.queue:
            self.queue.settings = replace(settings.queue or self.queue.settings, path=self.queue.settings.path)
        settings = replace(settings, queue=self.queue and self.queue.settings)
        tls, base = settings.httpd.tls, os.path.dirname(settings.path or "")
        self.tls = server_context(tls, base) if tls else None
        log.open(settings.smtpd.syslog, settings.smtpd.log)
        if settings.smtpd.resolver != self.transport.resolver.nameservers:
            self.transport.set_nameservers(settings.smtpd.resolver)
        self.settings = settings


class Response(NamedTuple):
    status: int
    body: bytes
    headers: tuple = ()  # of (name, value)
    type: str = "application/json; charset=utf-8"

    serialized = property(lambda self: ENCODER.encode([self.status, self.headers, self.body.decode()]))  # for the queue


class Mail(NamedTuple):
    """A mail on its way from the request to the answer; without transactions it is refused."""

    queueid: str
    submission: Submission | None
    replies: dict  # {recipient: Reply, None if there is none yet}; {None: Reply} if the whole mail is refused
    accepted: list = ()  # of Mailbox: recipients that passed the checks, in the order of the transactions
    transactions: list = ()
    is_async: bool = False  # answer at once, deliver from the queue
    key: bytes | None = None  # digest of login, path and Idempotency-Key
    body_digest: bytes | None = None

    refused = property(lambda self: {to: reply for to, reply in self.replies.items() if reply and not reply.accepted})

    @property
    def error(self) -> Reply | None:
        """Return a reply if no recipient was accepted, else None; one of status 503 comes first."""
        if len(self.refused) < len(self.replies):
            return None
        to, reply = min(self.refused.items(), key=lambda item: http_status(item[1:]) != 503)
        return reply if to is None else reply._replace(message=(f"{to}: {reply.message[0]}", *reply.message[1:]))

    def add_replies(self, replies: list) -> None:
        """Give each accepted recipient its reply; all of a mail that was redirected get the first failure, if any."""
        found = dict(zip([mailbox.as_written for mailbox in self.accepted], replies))
        for to, reply in self.replies.items():
            if not reply:
                self.replies[to] = found.get(to) or min(replies, key=lambda reply: reply.accepted)


async def submit(request: Request, app: App) -> Response:
    """Answer POST /submit: take a mail from its JSON to the replies of the other side."""
    settings = request.settings = request.settings or app.settings
    mail = await prepare(request, parse_submission, request.body)
    if not mail.transactions:
        return respond(request, mail)
    if mail.submission.dry_run:
        return await answer_dry_run(request, mail, settings)
    try:
        if mail.is_async or mail.key:  # it is stored before anything is sent
            item = new_item(request, mail)
            if earlier := await app.queue.add(enqueue, item, None, not mail.is_async):
                return await replay_response(request, mail, earlier, app)
        if mail.is_async:
            announce_queued(request, [item], app)
            replies, results = [queued_reply(mail.queueid)] * len(mail.accepted), []
        else:
            replies = log_results(request, await deliver(mail.transactions, app.transport, settings))
            replies, results = await queue_deferred(request, mail, replies, app)
        count_recipients(mail.transactions, replies)
        mail.add_replies(replies)
        response = respond(request, mail)
        if mail.key:
            await app.queue.do_eventually(finish_request, mail.queueid, results, response.serialized, time.time())
        return response
    except Rejected as error:
        return respond(request, mail._replace(replies={None: error.reply}))
    except Exception:  # a bug: what this request has leased is left to the queue
        if app.queue:
            await app.queue.do_eventually(release_leases, settings.queue, time.time(), " AND m.queueid=?", mail.queueid)
        raise


async def prepare(request: Request, parse: Callable, body: Any) -> Mail:
    """Parse, check, compose and plan a mail, in a thread if it takes long; parse(body) returns a SubmissionResult."""
    submission, queueid = None, new_queueid(request.now)
    try:
        values = request, parse, body
        parsed = await asyncio.to_thread(parse_and_check, *values) if is_expensive(body) else parse_and_check(*values)
        submission, replies, accepted, digest = parsed
        is_async, key = queue_options(request, submission)
        if not accepted:
            return Mail(queueid, submission, replies)
        if body is request.body:
            request.body = body = b""  # its memory is needed for the message
        values = request, submission, queueid, accepted
        in_thread = is_expensive(submission)
        planned = await asyncio.to_thread(compose_and_plan, *values) if in_thread else compose_and_plan(*values)
        transactions, accepted = planned
    except Rejected as error:
        return Mail(queueid, submission, {None: error.reply})
    if submission.attachments or submission.raw:  # they only fill memory now
        raw = submission.raw and ParsedMessage([], b"")
        submission = replace(submission, body="", html="", attachments=(), raw=raw)
    return Mail(queueid, submission, replies, accepted, transactions, is_async, key, digest)


def count_recipients(transactions: list, replies: list) -> None:
    """Count the final replies to a request in the metrics."""
    relays = [transaction.route.relay for transaction in transactions for _ in transaction.recipients]
    for relay, reply in zip(relays, replies):
        outcome = {"sent": "accepted", "deferred": "deferred", "bounced": "refused"}[reply.log_status]
        outcome = "queued" if reply.origin == "queue" else "unsure" if reply.maybe_delivered else outcome
        metrics.add("haineko_recipients_total", relay, outcome)


def parse_and_check(request: Request, parse: Callable, body: Any) -> tuple:
    """Return (Submission, {recipient: the Reply that refuses it, or None}, Mailboxes of the others, digest of the
    document if there is an Idempotency-Key); raise Rejected with every error, or by the first check that fails."""
    submission, errors, is_json = parse(body)
    if errors:
        raise Rejected(make_reply("invalid" if is_json else "json", *errors[:MAX_REPORTED_ERRORS]))
    apply_checks(CHECKS["submission"], request, submission, request.settings)
    replies, accepted = check_recipients(request, submission, request.settings)
    digest = document_digest(body) if "idempotency-key" in request.headers and body is request.body else None
    return submission, replies, accepted, digest


def document_digest(body: Any) -> bytes:
    """Return a digest of the document in a body, whatever the order of its keys and its white space."""
    document = parse_json(body.replace(b"\x1b", b"\\u001b"))
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).digest()


def compose_and_plan(request: Request, submission: Submission, queueid: str, accepted: list) -> tuple:
    """Return (transactions, the mailboxes in their order): one each route if the recipients share the mail, by MX one
    each domain; else each. Raise Rejected if a check fails, and for commands of cloud relays that a route forbids."""
    settings, sender = request.settings, parse_address(submission.mail) or NULL_SENDER
    now = max(request.now, submission.send_at or 0)  # a Date weeks before the delivery would pass for a sign of spam
    shown = apply_staging(submission, accepted, settings.smtpd) if settings.smtpd.staging else submission
    message = compose(shown, queueid, request.client, settings.hostname, now)
    if request.dsn is not DEFAULT_DSN:
        message = message._replace(dsn=request.dsn)
    request.recipient_count, longest = len(accepted), max([len(mailbox.addr_spec) for mailbox in accepted])
    request.message_size = sum(map(len, message.parts)) + longest + len(str(len(accepted)))
    groups, transactions, signed = {}, [], {}
    for i, mailbox in enumerate([parse_address(to) for to in settings.smtpd.redirect] or accepted):
        route = resolve_route(mailbox.domain, sender.domain, settings)[0]
        key = (route, route.relay == "MX" and mailbox.domain.lower()) if submission.shared else i
        groups.setdefault(key, (route, []))[1].append(mailbox)
    given = (*submission.header.extra_fields, *(submission.raw.fields if submission.raw else ()))
    names = [name for name in dict(given) if re.fullmatch(r"(?i)X-(MC|SES|PM|MS-Exchange)-.*|X-SMTPAPI", name)]
    if names and not all(choice.provider_headers for route, _ in groups.values() for choice in route.choices):
        lines = [f"{sanitize(name)}: the route must have provider_headers to send it" for name in names]
        raise Rejected(make_reply("invalid", *lines[:MAX_REPORTED_ERRORS]))
    apply_checks(CHECKS["message"], request, submission, settings)  # last: what is refused takes nothing of a rate
    for number, (route, mailboxes) in enumerate(groups.values(), 1):
        envelope = settings.hostname, queueid, sender.addr_spec, tuple([mailbox.addr_spec for mailbox in mailboxes])
        transactions.append(Transaction(route, *envelope, message, number, settings.dkim, submission.trace, signed))
    return transactions, [mailbox for _, mailboxes in groups.values() for mailbox in mailboxes]


def apply_staging(submission: Submission, accepted: list, smtpd: Smtpd) -> Submission:
    """Return the submission with the prefix in its subject, and with a field that names whom redirected mail is for."""
    header, raw, prefix = submission.header, submission.raw, smtpd.subject_prefix.rstrip()
    more = [("X-Haineko-Recipients", ", ".join([to.addr_spec for to in accepted]))] if smtpd.redirect else []
    if raw:
        head = text_field("", prefix, "UTF-8").encode() if prefix else b":"  # ": prefix" in place of the colon
        found = [(name, octets.replace(b":", head, 1) if name == "subject" else octets) for name, octets in raw.fields]
        found += [(name.lower(), text_field(name, text, "UTF-8").encode() + b"\n") for name, text in more]
        return replace(submission, raw=raw._replace(fields=found))
    subject = f"{prefix} {header.subject}" if prefix else header.subject
    return replace(submission, header=replace(header, subject=subject, extra_fields=(*header.extra_fields, *more)))


async def answer_dry_run(request: Request, mail: Mail, settings: Settings) -> Response:
    """Return the response with the route of each recipient, and why, and the first copy of the message."""
    sender, replies = parse_address(mail.submission.mail) or NULL_SENDER, []
    for to in mail.accepted:
        route, why = resolve_route(to.domain, sender.domain, settings)
        where = route.endpoint if route.row.destination == UNKNOWN_RELAY.destination else {"mailer": route.relay}
        replies.append(make_reply("dry-run", f"{to.addr_spec}: {describe_route(route)} ({why})", **where))
    mail.add_replies(replies)
    octets = (await sign_transaction(mail.transactions[0])).octets()
    raw = octets.decode() if is_utf8(octets) else {"base64": base64.b64encode(octets).decode()}
    return respond(request, mail, message_octets=len(octets), raw=raw)


def describe_route(route: Route) -> str:
    """Return where a route's mail goes, for people."""
    if route.fallbacks:
        return ", else ".join(describe_route(replace(choice, fallbacks=())) for choice in route.choices)
    tls = ", TLS" if route.port == SMTPS else ", STARTTLS" if route.starttls else ""
    where = f"{route.relay} {route.url}" if route.url else route.row.destination.format(route=route, domain="").strip()
    return where + tls + (f", AUTH as {route.auth}" if route.auth else "")


def log_rejections(request: Request, mail: Mail, refused: dict) -> None:
    """Log one line for each refusal before delivery; `refused` is {recipient, None for all: Reply}."""
    for reply in refused.values():
        metrics.add("haineko_rejections_total", reply.slug)
    submission = mail.submission
    listed = [to for to in refused if to is not None] or list(submission.rcpt if submission else ())
    fields = {"queueid": mail.queueid or "-", **request.log_fields(), "from": submission and submission.mail}
    fields["to"] = listed[:20] or None  # the line is cut anyway
    for reply in dict.fromkeys(refused.values()):
        log_reply("rejection", reply, reply.log_status, None, **fields)


def queue_options(request: Request, submission: Submission) -> tuple:
    """Return (whether to answer at once, digest of login, path and Idempotency-Key or None). Both need a queue."""
    key, later = request.headers.get("idempotency-key"), submission.send_at is not None
    if not request.settings.queue:
        asked = {"Idempotency-Key": key is not None, "send_at": later, "async": submission.async_}
        if any(asked.values()):  # to ignore them would be unsafe; Prefer may be ignored
            raise Rejected(make_reply("no-queue", next(filter(asked.get, asked))))
        return False, None
    is_async = later or submission.async_ or prefers_async(request)
    if key is None:
        return is_async, None
    if not (found := IDEMPOTENCY_KEY.fullmatch(key)):
        raise Rejected(make_reply("key-form"))
    owner = request.login or f"[{request.client}]"  # nobody else may read the response
    return is_async, hashlib.sha256("\0".join((owner, request.path, found[1] or found[2])).encode()).digest()


def prefers_async(request: Request) -> bool:
    """Return True if a Prefer header asks for respond-async (RFC 7240 4.1)."""
    preferences = request.headers.get("prefer", "").split(",")
    return any(part.partition(";")[0].strip().lower() == "respond-async" for part in preferences)


def new_item(request: Request, mail: Mail) -> QueueItem:
    first, mailboxes, recipients = mail.transactions[0], iter(mail.accepted), []
    for transaction in mail.transactions:
        for to, mailbox in zip(transaction.recipients, mailboxes):  # both in the order of the transactions
            destination = destination_key(transaction.route, mailbox.domain)
            recipients.append(NewRecipient(mailbox.as_written, to, transaction.number, destination))
    envelope = first.queueid, "mail", first.sender, request.login, request.now, first.message
    return QueueItem(*envelope, tuple(recipients), mail.key, mail.body_digest, mail.submission.send_at or 0.0)


def announce_queued(request: Request, items: list, app: App) -> None:
    """Log new mails in the queue and have them delivered."""
    for item in items:
        fields = {"queueid": item.queueid, **request.log_fields(), "from": item.sender}
        when = timestamp(item.send_at) if item.send_at > item.created_at else "once"
        log.event("info", "queued", f"queued, to be delivered at {when}", **fields)
    app.queue.wake_manager()


async def queue_deferred(request: Request, mail: Mail, replies: list, app: App) -> tuple:
    """Return the replies after the first attempts, "queued" where there will be more, and their AttemptResults."""
    if not app.queue or not (mail.key or any(reply.temporary for reply in replies)):
        return replies, []
    item, settings, now = new_item(request, mail), request.settings, time.time()
    results = [attempt_result(reply, 1, 0.0, random_unit(), settings.queue) for reply in replies]
    waiting = [i for i, result in enumerate(results) if result.state == "open"]
    for i in waiting:  # only a delay is reported, since the response has the others
        leased = LeasedRecipient(0, item, item.recipients[i], attempts=1)
        results[i] = results[i]._replace(follow_ups=notifications(leased, replies[i], "open", settings, now))
    if not mail.key:  # with one it is in the file already
        part = item._replace(recipients=tuple([item.recipients[i] for i in waiting]))
        try:
            await app.queue.add(enqueue, part, [results[i] for i in waiting])
        except Rejected:  # the client reads that it failed for now, and that nobody will try again
            return replies, []
    for i in waiting:
        unsure = "; may arrive twice" if replies[i].maybe_delivered else ""
        text = f"queued; next attempt in {results[i].pause:.0f} s{unsure}"
        log.event("info", "queued", text, queueid=item.queueid, to=[item.recipients[i].recipient], status="deferred")
        replies[i] = queued_reply(item.queueid, replies[i])
    return replies, results


async def replay_response(request: Request, mail: Mail, earlier: Any, app: App) -> Response:
    """Return the response to the first request with this key; raise Rejected if there is none, or for another body."""
    queueid, stored = earlier["queueid"], earlier["response"]
    if earlier["body_digest"] != mail.body_digest:
        raise Rejected(make_reply("key-reused"))
    if stored is None and earlier["owner"] is not None:
        raise Rejected(make_reply("key-running"))
    if stored is None:  # its process ended before it could answer; the queue has taken the mail over
        rows = (await app.queue.do(message_status, queueid))["recipients"]
        found = {row["as_written"]: current_reply(queueid, row) for row in rows}
        mail.add_replies([found.get(mailbox.as_written) or queued_reply(queueid) for mailbox in mail.accepted])
        stored = respond(request, mail._replace(queueid=queueid)).serialized
        await app.queue.do(finish_request, queueid, [], stored, request.now)
    status, headers, body = json.loads(stored)
    return Response(status, body.encode(), (*map(tuple, headers), ("Idempotency-Replayed", "true")))


def current_reply(queueid: str, row: Any) -> Reply:
    """Return the reply for the state of a recipient in the queue."""
    history = parse_history(row["history"])
    _, reply = history[-1] if history else (0, None)
    return reply if reply and row["state"] in ("delivered", "failed", "dropped") else queued_reply(queueid, reply)


async def deliver(transactions: list, transport: TransportContext, settings: Settings) -> list:
    """Return a TransactionResult for each transaction, in order; up to `max_workers` are run side by side."""
    limit = asyncio.Semaphore(settings.smtpd.max_workers)
    runs = [run_transaction(transaction, transport, limit) for transaction in transactions]
    return [await runs[0]] if len(runs) == 1 else await asyncio.gather(*runs)


async def run_transaction(transaction: Transaction, transport: TransportContext, limit: Any) -> TransactionResult:
    """Attempt a transaction, and again as its route says for recipients that failed temporarily; trace it if asked."""
    async with limit:
        if transaction.trace:
            log.trace.set(lines := [])
        result, route = await attempt_transaction(transaction, transport), transaction.route
        replies, started = result.replies, time.monotonic() - result.ms / 1000
        for _ in range(route.retry):
            waiting = [i for i, reply in enumerate(replies) if reply.temporary and not reply.maybe_delivered]
            pause = max([route.sleep, *[replies[i].retry_after for i in waiting]])
            if not waiting or pause > max(route.sleep, MAX_INLINE_WAIT):
                break  # the client reads Retry-After
            await asyncio.sleep(pause)
            recipients = tuple([transaction.recipients[i] for i in waiting])
            again = await attempt_transaction(transaction._replace(recipients=recipients), transport)
            for i, reply in zip(waiting, again.replies):
                replies[i] = reply
        if transaction.trace:
            log.trace.set(None)
            replies = [reply._replace(dialogue=tuple(lines)) for reply in replies]
        return TransactionResult(transaction, replies, (time.monotonic() - started) * 1000)


def http_status(replies: Any) -> int:
    accepted = [reply.accepted for reply in replies]
    if all(accepted):
        return 202 if any(reply.origin == "queue" for reply in replies) else 200
    if any(accepted):
        return 207
    # 5.6.7 of our own: the address is at fault, even if it took the next server's EHLO to tell.
    statuses = {400 if reply.dsn == "5.6.7" and not reply.from_server else reply.status for reply in replies}
    if len(statuses) == 1 and statuses != {0}:
        return statuses.pop()
    return 503 if any(reply.temporary for reply in replies) else 502


def log_results(request: Request, results: list) -> list:
    """Return all replies; log one line for each different one, or more if its recipients don't fit into one line."""
    for transaction, replies, ms in results:
        by_reply: dict = {}
        for to, reply in zip(transaction.recipients, replies):
            by_reply.setdefault(reply, []).append(to)
        fields = {"queueid": transaction.queueid, **request.log_fields(), "from": transaction.sender}
        for reply, recipients in by_reply.items():
            step = 8 if len(recipients) <= 8 else MAX_TO // max([len(to.encode()) + 3 for to in recipients])
            for i in range(0, len(recipients), step):
                to = recipients[i : i + step]
                log_reply("delivery", reply, reply.log_status, ms / 1000, **fields, to=to)
    return [reply for result in results for reply in result.replies]


def respond(request: Request, mail: Mail, **more: Any) -> Response:
    """Return the response, with `more` keys; log each refusal before delivery."""
    refused = {to: reply for to, reply in mail.replies.items() if reply.origin == "policy"}
    if refused:
        log_rejections(request, mail, refused)
    submission, status = mail.submission, http_status(mail.replies.values())
    document = {
        "queueid": mail.queueid,
        "addresser": submission.mail if submission else None,
        "recipient": [to for to in mail.replies if to is not None and to not in refused] if submission else None,
        "response": [reply_to_dict(to, reply) for to, reply in mail.replies.items()],
        "remoteaddr": str(request.client) if request.client else None,
        "remoteport": request.port,
        "useragent": echoed_header(request, "user-agent"),
        "referer": echoed_header(request, "referer"),
        "timestamp": time_to_dict(request.now),
        **more,
    }
    return json_response(document, status, answer_headers(request, status, mail.queueid, mail.replies))


def answer_headers(request: Request, status: int, queueid: str | None, replies: dict) -> tuple:
    """Return header fields; of a rate those of draft-ietf-httpapi-ratelimit-headers-10 and those known before."""
    headers = {}
    if status == 202:
        headers["Location"] = f"/queue/{queueid}"
        if prefers_async(request):
            headers["Preference-Applied"] = "respond-async"
    elif status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="Haineko", charset="UTF-8"'
    elif status in LEAST_RETRY_AFTER:
        headers["Retry-After"] = str(max(LEAST_RETRY_AFTER[status], *[reply.retry_after for reply in replies.values()]))
    if request.rate:
        rate, state = request.rate
        left, reset = state.remaining, math.ceil(state.reset)
        headers["RateLimit-Policy"] = f'"default";q={rate.limit};w={rate.seconds}'
        headers["RateLimit"] = f'"default";r={left};t={reset}'
        older = {"ratelimit-limit": rate.limit, "ratelimit-remaining": left, "ratelimit-reset": reset}
        headers.update({name: str(value) for name, value in older.items()})
    return tuple(headers.items())


def time_to_dict(seconds: float | None) -> dict | None:
    return None if seconds is None else {"datetime": ctime(int(seconds)), "unixtime": str(int(seconds))}


def echoed_header(request: Request, name: str) -> str | None:
    """Return the start of a header's value, which was decoded as Latin-1, as the UTF-8 that it most often is."""
    value = request.headers.get(name)
    return value and value[: 4 * MAX_ECHO].encode("latin-1").decode("utf-8", "replace")[:MAX_ECHO]


def json_response(document: Any, status: int = 200, headers: tuple = ()) -> Response:
    return Response(status, encode_json(document), headers)


# ======================================================================================================================
# 18. Provider endpoints
#     Takes requests of SendGrid's, Postmark's and Resend's clients, passes each mail through the pipeline and answers
#     in the provider's form. All mails of a request are checked before the first one is stored.
# ======================================================================================================================

MAX_CALL = 64 << 20  # octets of all messages of a request
OWN_FIELDS = frozenset(("from", "to", "cc", "bcc", "subject", "replyto", "charset"))


class Provider(NamedTuple):
    names: dict  # {key of a submission, of its header or of an attachment: the provider's key}
    unsupported: tuple  # keys that would change the content
    answer: Callable  # ([Mail, ...], their JSON values, dry_run) -> Response or document
    errors: dict  # {name in REPLIES, "no-login", or HTTP status of POST /submit: (HTTP status, name of the error)}
    error: Callable  # (reply, name of the error, HTTP status) -> document
    read: Callable = lambda document: [document]  # returns the mails
    is_test: Callable = lambda document: False  # everything is checked, nothing sent; see is_postmark_test() as well
    is_permissive: Callable = lambda request: False  # a refused mail does not stop the others


async def answer_provider(request: Request, app: App) -> Response:
    """Take the mails of a request and answer in the form of the provider whose endpoint it is."""
    settings, provider, prepared, octets = request.settings, PROVIDER_ENDPOINTS[request.path], [], 0
    try:
        document = await asyncio.to_thread(parse_json, request.body)
    except ValueError as error:
        raise Rejected(make_reply("json", sanitize(str(error)))) from None
    mails, dry_run = provider.read(document), provider.is_test(document) or is_postmark_test(request)
    parse, permissive = functools.partial(parse_mail, provider), provider.is_permissive(request)
    for raw in mails:
        mail = await prepare(request, parse, raw)
        if mail.refused:
            log_rejections(request, mail, mail.refused)
        octets += request.message_size if mail.transactions else 0
        if octets > MAX_CALL:  # SendGrid's mails share their attachments
            raise Rejected(make_reply("too-big", f"{octets} octets of all mails exceed the limit of {MAX_CALL}"))
        prepared.append(mail)
    ready, sends_later = [mail for mail in prepared if mail.transactions], dry_run or app.queue  # or never
    failed = next((mail.error for mail in prepared if mail.error), None)
    if not sends_later and (permissive or not failed):
        results = iter(await deliver([one for mail in ready for one in mail.transactions], app.transport, settings))
        for mail in ready:
            replies = log_results(request, list(itertools.islice(results, len(mail.transactions))))
            count_recipients(mail.transactions, replies)
            mail.add_replies(replies)
        failed = prepared[0].error if all(mail.error for mail in prepared) else None
    if failed and not permissive:
        return provider_error(failed, request)
    for mail in ready if sends_later else ():
        mail.add_replies([queued_reply(mail.queueid)] * len(mail.accepted))
    answer = provider.answer(prepared, mails, dry_run)
    response = answer if isinstance(answer, Response) else json_response(answer)
    return await store_mails(request, ready, response, app) if ready and app.queue and not dry_run else response


async def store_mails(request: Request, mails: list, response: Response, app: App) -> Response:
    """Store mails and the reports of their refused recipients; return the response, or that to an earlier request."""
    key, items, reports = mails[0].key, [], []
    digest = await asyncio.to_thread(document_digest, request.body) if key else None
    for mail in mails:
        items.append(new_item(request, mail._replace(key=None if items else key, body_digest=digest)))
        for to, reply in mail.refused.items():
            leased = LeasedRecipient(0, items[-1], NewRecipient(to, to, 1, ""), attempts=1)
            reports += notifications(leased, reply, "failed", request.settings, request.now)
    first = items[0]._replace(response=response.serialized if key else None, others=(*items[1:], *reports))
    if earlier := await app.queue.add(enqueue, first):
        return await replay_response(request, mails[0]._replace(body_digest=digest), earlier, app)
    for mail in mails:
        count_recipients(mail.transactions, [queued_reply(mail.queueid)] * len(mail.accepted))
    announce_queued(request, items, app)
    return response


def parse_mail(provider: Provider, mail: Any) -> SubmissionResult:
    """Parse a mail of a provider's client; keys that are not known are ignored."""
    if not isinstance(mail, dict):
        return SubmissionResult(None, [f"expected an object, got {json_type_name(mail)}"])
    names, errors = provider.names, [f"{key}: is not supported" for key in provider.unsupported if mail.get(key)]
    header = OpenHeader(read_headers(mail.get(names["headers"]), names["headers"], errors))
    for key in ("from", "to", "cc", "bcc", "reply-to"):
        value, shared = mail.get(names[key]) or [], key in ("from", "reply-to")
        texts = value[: MAX_ADDRESSES + 1] if isinstance(value, list) else [value]
        for i, text in enumerate(texts):
            faults: list = []
            parse_recipient_field(text, "", faults)
            label = names[key] if shared else names["address"].format(names[key], i, part=mail.get("part"))
            errors += [f"Invalid '{label}' address: '{sanitize(str(text), 80)}'."] if faults else []
        if texts and not errors:
            header[key] = ", ".join(texts) if shared else texts
    header["subject"] = mail.get(names["subject"])
    document = {key: mail[names[key]] for key in ("body", "html", "send_at") if mail.get(names[key]) is not None}
    senders = parse_mailboxes(header.get("from", "")) if not errors else ()
    document.update(mail=senders[0][1].as_written if senders else "", header=header)
    document["attachments"] = read_attachments(mail, names, errors)
    return SubmissionResult(None, errors) if errors else parse_document(document)


def read_headers(value: Any, json_path: str, errors: list) -> dict:
    """Return fields from {name: value}, or from Postmark's [{"Name", "Value"}]."""
    header: dict = {}
    items = [{"Name": name, "Value": text} for name, text in value.items()] if isinstance(value, dict) else value
    for item in items if isinstance(items, list) else []:
        name = item.get("Name") if isinstance(item, dict) else None
        if not isinstance(name, str) or normalize_key(name) in OWN_FIELDS:
            errors.append(f"{json_path}: {sanitize(str(name))} can't be set here")
        else:
            header.setdefault(name, []).append(item.get("Value"))
    return {name: texts[0] if len(texts) == 1 else texts for name, texts in header.items()}


def read_attachments(mail: dict, names: dict, errors: list) -> list:
    """Return attachments as a submission has them; a content id that the HTML does not use is left out."""
    html, entries, found = mail.get(names["html"]), mail.get(names["attachments"]) or [], []
    links = content_id_links(html) if isinstance(html, str) else set()
    for i, entry in enumerate(entries[: MAX_ATTACHMENTS + 1] if isinstance(entries, list) else [entries]):
        if not isinstance(entry, dict) or entry.get("path"):
            errors.append(f"{names['attachments']}[{i}]{'.path: is not supported' if entry else ': is no object'}")
            continue
        item = {key: entry.get(names[key]) for key in ("filename", "type", "content")}
        cid = re.sub("^cid:|^<|>$", "", str(entry.get(names["cid"]) or entry.get("contentId") or ""))
        octets = item["content"].get("data") if isinstance(item["content"], dict) else item["content"]
        if isinstance(octets, list):  # of integers; within an object it is a Buffer of Node.js
            with contextlib.suppress(ValueError, TypeError):
                item["content"] = base64.b64encode(bytes(octets)).decode()
        found.append({**item, "cid": cid if cid in links else "", "inline": entry.get("disposition") == "inline"})
    return found


def read_batch(document: Any, limit: int, json_path: str = "top level") -> list:
    """Return the mails of a list; raise Rejected if there are too many."""
    if not isinstance(document, list):
        raise Rejected(make_reply("invalid", f"{json_path}: expected a list, got {json_type_name(document)}"))
    if not 0 < len(document) <= limit:
        raise Rejected(make_reply("batch", f"expected 1 to {limit}, got {len(document)}"))
    return document


def read_personalizations(document: Any) -> list:
    """Return one mail for each personalization, whose keys take the place of the document's."""
    whole = document if isinstance(document, dict) else {}
    content = whole.get("content") if isinstance(whole.get("content"), list) else []
    objects, mails = [item if isinstance(item, dict) else {} for item in content], []
    texts = {f"content.{str(item.get('type')).partition(';')[0]}": item.get("value") for item in objects}
    whole = {**whole, **texts, "content": texts.keys() - SENDGRID_KEYS.values()}  # what remains is not supported
    for i, part in enumerate(read_batch(whole.get("personalizations"), 1000, "personalizations")):
        mail = {**whole, **(part if isinstance(part, dict) else {}), "part": f"personalizations.{i}"}
        mail["reply_to"] = mail.get("reply_to_list") or mail.get("reply_to")
        for key in ("from", "reply_to", "to", "cc", "bcc"):
            items = mail.get(key) or []
            mail[key] = [mailbox_text(item) for item in (items if isinstance(items, list) else [items])]
        mails.append(mail)
    return mails


def mailbox_text(item: Any) -> Any:
    """Return {"email", "name"} as it is written in a header."""
    if not isinstance(item, dict):
        return item
    name = re.sub(r'(["\\])', r"\\\1", str(item.get("name") or ""))
    return f'"{name}" <{item.get("email")}>' if name else item.get("email")


def is_sandbox(document: dict) -> bool:
    with contextlib.suppress(LookupError, TypeError):
        return document["mail_settings"]["sandbox_mode"]["enable"] is True
    return False


def answer_sendgrid(prepared: list, mails: list, dry_run: bool) -> Response:
    accepted = [mail.queueid for mail in prepared if not mail.error]
    return Response(200 if dry_run else 202, b"", (("X-Message-Id", accepted[0]),))


def postmark_item(mail: Mail, raw: dict) -> dict:
    if mail.error:
        return error_document(POSTMARK, mail.error)[1]
    words = "; ".join(dict.fromkeys(map(reply_text, mail.refused.values())))
    refused = f"Message OK, but will not deliver to these inactive addresses: {', '.join(mail.refused)}"
    message = f"{refused}. Inactive recipients: {words}" if words else "OK"  # clients look for these words
    now = time.strftime("%Y-%m-%dT%H:%M:%S.0000000Z", time.gmtime())
    item = {"To": raw.get("To") or "", "SubmittedAt": now, "MessageID": mail.queueid}
    return {**item, "ErrorCode": 0, "Message": message}


def answer_resend_batch(prepared: list, mails: list, dry_run: bool) -> dict:
    failed = [(i, error_document(RESEND, mail.error)[1]) for i, mail in enumerate(prepared) if mail.error]
    errors = [{"index": i, "message": document["message"]} for i, document in failed]
    document = {"data": [{"id": mail.queueid} for mail in prepared if not mail.error]}
    return {**document, "errors": errors} if errors else document


def provider_error(reply: Reply, request: Request) -> Response:
    """Return the response to a request that is refused, in the form of its provider."""
    provider, has_login = PROVIDER_ENDPOINTS[request.path], "authorization" in request.headers
    status, document = error_document(provider, reply, "no-login" if reply.slug == "login" and not has_login else "")
    headers = answer_headers(request, reply.status or http_status((reply,)), None, {None: reply})
    return json_response(document, status, headers)


def error_document(provider: Provider, reply: Reply, slug: str = "") -> tuple:
    """Return (HTTP status, document); the provider's keys replace those of a submission at the start of lines."""

    def name(found: re.Match) -> str:
        key = {"rcpt": "to", "mail": "from", "replyto": "reply-to"}.get(found[2], found[2])
        return provider.names.get(key.lower()) or (f"{provider.names['headers']}.{key}" if found[1] else key)

    if reply.slug:  # the words are not the next hop's
        lines = [re.sub(r"^(header\.)?([A-Za-z_-]+)", name, line) for line in reply.message[1:]]
        reply = reply._replace(message=(reply.message[0], *lines))
    status, errors = reply.status or http_status((reply,)), provider.errors
    status, error = errors.get(slug or reply.slug) or errors.get(status) or (status, errors[None])
    return status, provider.error(reply, error, status)


def sendgrid_error(reply: Reply, words: str | None, status: int) -> dict:
    errors = []
    for line in reply.message[1:] if reply.slug == "invalid" else (words or reply_text(reply),):
        found = re.match(r"Invalid '([^']+)'|([a-z_][\w./\[\]-]*): ", line)
        field = re.sub(r"\[(\d+)\]", r".\1", found[1] or found[2]) if found else None
        errors.append({"message": line, "field": field, "help": None})
    return {"errors": errors}


def reply_text(reply: Reply) -> str:
    """Return the message of a reply on one line."""
    first, *lines = reply.message
    return "; ".join(lines) if lines and reply.slug == "invalid" else ": ".join((first, *lines))


SENDGRID_GRANT = "The provided authorization grant is invalid, expired, or revoked"
SENDGRID_ERRORS = {401: (401, SENDGRID_GRANT), 502: (400, None), None: None}
POSTMARK_ERRORS = {
    "json": (422, 402), "batch": (422, 410), "rcpt-many": (422, 300), 400: (422, 300), 401: (401, 10), 403: (422, 405),
    409: (422, 300), 422: (422, 300), 429: (429, 429), 500: (500, 500), 502: (422, 300), 503: (503, 100), None: 300,
}  # fmt: skip
RESEND_ERRORS = {
    **dict.fromkeys(("mail-empty", "rcpt-none", "subject-empty", "body-empty"), (422, "missing_required_field")),
    **dict.fromkeys(("rcpt-many", 400, 502), (422, "validation_error")), "json": (400, "validation_error"),
    "mail-form": (422, "invalid_from_address"), "key-form": (400, "invalid_idempotency_key"),
    "no-login": (401, "missing_api_key"), 401: (403, "invalid_api_key"), 403: (401, "restricted_api_key"),
    404: (404, "not_found"), 409: (409, "concurrent_idempotent_requests"), 413: (413, "validation_error"),
    422: (409, "invalid_idempotent_request"), 429: (429, "rate_limit_exceeded"), None: "application_error",
}  # fmt: skip

KEYS = ("from", "to", "cc", "bcc", "subject", "html", "headers", "attachments", "filename", "content")
RESEND_KEYS = {
    **{key: key for key in KEYS}, "reply-to": "reply_to", "body": "text", "type": "content_type",
    "cid": "content_id", "send_at": "scheduled_at", "address": "{}",
}  # fmt: skip
SENDGRID_KEYS = {
    **RESEND_KEYS, "body": "content.text/plain", "html": "content.text/html", "type": "type", "send_at": "send_at",
    "address": "{part}.{}.{}.email",
}  # fmt: skip
POSTMARK_KEYS = {
    **{key: key.title() for key in KEYS}, "reply-to": "ReplyTo", "body": "TextBody", "html": "HtmlBody",
    "filename": "Name", "type": "ContentType", "cid": "ContentID", "send_at": "", "address": "{}",
}  # fmt: skip
NOT_SENDGRID = ("template_id", "dynamic_template_data", "substitutions", "batch_id", "asm", "content")
SENDGRID = Provider(
    SENDGRID_KEYS, NOT_SENDGRID, answer_sendgrid, SENDGRID_ERRORS, sendgrid_error, read_personalizations, is_sandbox
)
POSTMARK = Provider(
    POSTMARK_KEYS, ("TemplateId", "TemplateAlias"), lambda mails, raw, _: postmark_item(mails[0], raw[0]),
    POSTMARK_ERRORS, lambda reply, code, _: {"ErrorCode": code, "Message": reply_text(reply)},
)  # fmt: skip
RESEND = Provider(
    RESEND_KEYS, ("template", "topic_id"), lambda mails, *_: {"id": mails[0].queueid}, RESEND_ERRORS,
    lambda reply, name, status: {"statusCode": status, "name": name, "message": reply_text(reply)},
)  # fmt: skip
PROVIDER_ENDPOINTS = {
    "/v3/mail/send": SENDGRID,
    "/email": POSTMARK,
    "/email/batch": POSTMARK._replace(
        answer=lambda mails, raw, _: [*map(postmark_item, mails, raw)],
        read=lambda document: read_batch(document, 500), is_permissive=lambda request: True,
    ),
    "/emails": RESEND,
    "/emails/batch": RESEND._replace(
        answer=answer_resend_batch, read=lambda document: read_batch(document, 100),
        is_permissive=lambda request: request.headers.get("x-batch-validation", "").lower() == "permissive",
    ),
}  # fmt: skip


# ======================================================================================================================
# 19. HTTP server
#     Takes octets from a socket, gives a Request to an endpoint and sends its Response (RFC 9110, 9112). The supervisor
#     binds and watches; workers, forked by it, accept. In a worker one event loop serves all connections.
# ======================================================================================================================

_TCHAR = r"[!#$%&'*+.^_`|~0-9A-Za-z-]"  # RFC 9110 5.6.2
REQUEST_LINE = re.compile(rf"({_TCHAR}{{1,32}}) ([\x21-\x7e\x80-\xff]+) HTTP/(\d)\.(\d)")
HEADER_LINE = re.compile(rf"({_TCHAR}+):([^\r\n\0]*)")
BARE_LF = re.compile(rb"\n\r?\n")  # an end of the head for some servers; looked for if there is no CR LF CR LF
NOT_IN_HOST = re.compile(r"[\s,/?#@\\]")
CHUNKED = -1
LENGTH = re.compile(r"([0-9]{1,18})(?:[ \t]*,[ \t]*\1)*")  # or the same one, repeated
FORWARDED_ADDRESS = re.compile(r"\[([^]]+)\](?::\d+)?|([^:]+):\d+|(.*)")  # some proxies add the port
FORWARDING_HEADERS = frozenset(
    ("via", "forwarded", "x-real-ip", "x-client-ip", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto")
)
SAMPLES = json.loads("""[
{"ehlo": "[127.0.0.1]", "mail": "kijitora@example.org", "rcpt": ["mikeneko@example.jp"], "header": {
  "from": "キジトラ <kijitora@example.com>", "subject": "謹賀新年", "replyto": "straycats@cat-ml.example.org",
  "charset": "UTF-8"}, "body": "あとでお年玉貰いに行きます"},
{"mail": "shop@example.org", "header": {
  "from": "ねこ屋 <shop@example.org>", "to": "三毛猫 <mikeneko@example.jp>", "subject": "領収書 42"},
  "html": "<p><img src=\\"cid:logo\\" alt=\\"ねこ屋\\"></p><p>合計 <b>1,980円</b></p>", "attachments": [
    {"filename": "logo.gif", "cid": "logo", "content": "R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"},
    {"filename": "領収書 42.csv", "content": "c3VtLDE5ODAK"}]}
]""")
CORS_HEADERS = {
    "Access-Control-Allow-Methods": "POST, GET, OPTIONS", "Access-Control-Max-Age": "600", "Vary": "Origin",
    "Access-Control-Allow-Headers": "Content-Type, Authorization, Idempotency-Key, Prefer",
}  # fmt: skip
QUEUE_PATH = re.compile(r"/queue/[0-9A-Za-z]{1,64}((?:/retry)?)")
HANG_TIMEOUT = 10.0  # seconds without a heartbeat
BACKLOG = 1024
MAX_HEAD = 65536  # octets of request line and headers
MAX_HEADERS = 100  # lines
MAX_BODY = 256 << 20  # octets of a body if max_message_size sets no limit
MAX_IN_FLIGHT = 64 << 20  # octets of all bodies of a worker, or of two if these may be larger
LINGER_TIMEOUT = 2.0  # seconds for a client to read the last answer before its connection is closed
MAX_VICTIMS = 64  # connections compared to find one to close for a new one: those that wait for their client longest
MAX_LINGERING_503 = 64  # connections over the limit that are answered and closed by lingering_close() at a time
SHUTDOWN_TIMEOUT = 30.0  # seconds for requests in flight to be answered
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # that a worker handles
http_date = functools.lru_cache(maxsize=2)(functools.partial(formatdate, usegmt=True))


def parse_head(octets: bytes) -> Request:
    """Parse the head of a request, without its last line end; raise Rejected for what RFC 9112 forbids."""
    first, *lines = octets.decode("latin-1").split("\r\n")
    if not (found := REQUEST_LINE.fullmatch(first)):
        raise Rejected(make_reply("bad-request", "request line"))
    method, target, major, minor = found.groups()
    if major != "1":
        raise Rejected(make_reply("http-version"))
    if target[0] != "/" and "://" in target:
        target = "/" + target.split("://", 1)[1].partition("/")[2]  # absolute form, RFC 9112 3.2.2
    if len(lines) > MAX_HEADERS:
        raise Rejected(make_reply("head-too-large"))
    headers: dict = {}
    for line in lines:
        if not (found := HEADER_LINE.fullmatch(line)):
            raise Rejected(make_reply("bad-request", "header line"))
        name, value = found[1].lower(), found[2].strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    connection, is_http10 = headers.get("connection", "").lower(), minor == "0"
    keep_alive = "keep-alive" in connection if is_http10 else "close" not in connection
    path, unknown = target.partition("?")[0], {"client": None, "peer": None, "port": None}  # Connection sets them
    return Request(method, path, headers, b"", now=time.time(), is_http10=is_http10, keep_alive=keep_alive, **unknown)


def body_length(request: Request) -> int:
    """Return the octets of the body, or CHUNKED; raise Rejected if two parsers could differ (RFC 9112 6.3)."""
    length, coding = request.headers.get("content-length"), request.headers.get("transfer-encoding")
    if coding is not None:
        if length is not None or request.is_http10:
            raise Rejected(make_reply("bad-request", "Transfer-Encoding"))
        if coding.lower() != "chunked":
            raise Rejected(make_reply("not-implemented"))
        return CHUNKED
    if length is None and request.method == "POST":
        raise Rejected(make_reply("length-required"))
    if not (found := LENGTH.fullmatch("0" if length is None else length)):
        raise Rejected(make_reply("bad-request", "Content-Length"))
    return int(found[1])


def client_address(peer: Any, port: int | None, headers: dict, settings: Settings) -> tuple:
    """Return (address, port) of the client: the peer, or the last untrusted one that trusted proxies name."""
    trusted, forwarded = settings.httpd.trusted_proxies, headers.get("x-forwarded-for")
    if forwarded is None or peer not in trusted:
        return peer, port
    for text in reversed(forwarded.split(",")):
        found = FORWARDED_ADDRESS.fullmatch(text.strip(" \t")[:100])
        try:
            peer, port = parse_ip(found[1] or found[2] or found[3]), None
        except ValueError:  # it must not pass for the proxy's own request
            raise Rejected(make_reply("bad-request", "X-Forwarded-For")) from None
        if peer not in trusted:
            break
    return peer, port


class Endpoint(NamedTuple):
    handler: Callable  # (request, app) -> Response, or an awaitable of one
    checks: tuple = ()  # before the body is read


def get_health(request: Request, app: App) -> Response:
    error = "stopping" if app.stopping else app.queue and app.queue.health_error()
    if error:
        return json_response({"status": error}, 503, (("Retry-After", "5"),))
    staging = app.settings.smtpd.staging
    return json_response({"status": "ok", **({"staging": staging} if staging else {})})


def check_monitor(request: Request, submission: None, settings: Settings) -> Reply | None:
    """Require an address in httpd.monitors, and no web page whose name was rebound in DNS."""
    host, reason = request.headers.get("host", "").lower(), proxied_client_error(request, settings)
    if request.client not in settings.httpd.monitors:
        reason = f"{request.client} is not in httpd.monitors"
    elif not reason and request.forwarded and request.client in LOOPBACK:  # a proxy can't know that it is this machine
        reason = f"{request.forwarded}: a forwarded request is not from this machine"
    elif not reason and not is_own_host(host, settings):
        reason = f"Host: expected an address or smtpd.hostname ({settings.hostname})"
    return make_reply("forbidden", reason) if reason else None


def is_own_host(host: str, settings: Settings) -> bool:
    """Return whether a host is an address, smtpd.hostname or a single label: no stranger can rebind these in DNS."""
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    return "." not in name or name == settings.hostname.lower() or bool(re.fullmatch(r"[\d.]+", name))


def check_queue_access(request: Request, submission: None, settings: Settings) -> Reply | None:
    refusal = check_monitor(request, None, settings)
    return check_login(request, None, settings) if refusal and settings.password.logins else refusal


async def get_queue(request: Request, app: App) -> Response:
    """Answer with what waits, in all and for each destination."""
    if not app.queue:
        raise Rejected(make_reply("not-found"))
    return json_response(await app.queue.do(queue_stats, request.now))


async def answer_queued_mail(request: Request, app: App) -> Response:
    """Show a mail in the queue to a monitor or the login that sent it; DELETE cancels it, POST makes it due now."""
    queueid, count = request.path.split("/")[2], {}
    found = app.queue and await app.queue.do(message_status, queueid)
    if not found:
        raise Rejected(make_reply("not-found"))
    if check_monitor(request, None, app.settings) and found["login"] != request.login:
        raise Rejected(make_reply("forbidden"))
    if request.method in ("DELETE", "POST"):
        is_retry = request.method == "POST"
        operation, verb = (flush_queue, "retried") if is_retry else (drop_message, "cancelled")
        count[verb] = await app.queue.do(operation, queueid, *(() if is_retry else (request.now,)))
        log.event("info", verb, f"{count[verb]} recipients {verb}", queueid=queueid, **request.log_fields())
        app.queue.wake_manager()
        found = await app.queue.do(message_status, queueid)
    return json_response({**count, **message_document(found)})


def message_document(message: dict) -> dict:
    """Return a mail in the queue: every recipient with its state, its reply, its next attempt and every earlier one."""
    response = []
    for row in message["recipients"]:
        to, attempts = row["as_written"], parse_history(row["history"])
        item = reply_to_dict(to, current_reply(message["queueid"], row))
        item.update(state=row["state"], next=time_to_dict(row["due"]))
        item["attempts"] = [{"time": time_to_dict(at), **reply_to_dict(to, reply)} for at, reply in attempts]
        response.append(item)
    recipients, timestamp = [item["rcpt"] for item in response], time_to_dict(message["created_at"])
    head = {"queueid": message["queueid"], "addresser": message["sender"], "recipient": recipients}
    return {**head, "response": response, "size": message["size"], "timestamp": timestamp}


async def get_metrics(request: Request, app: App) -> Response:
    """Answer with the metrics of all processes; process_... are the supervisor's, as far as /proc has them."""
    names = ("cpu_seconds_total", "virtual_memory_bytes", "resident_memory_bytes", "open_fds")
    values, folder = (None,) * 4, f"/proc/{os.getppid()}"
    with contextlib.suppress(OSError), open(f"{folder}/stat", "rb") as stream:
        words = stream.read().rpartition(b")")[2].split()  # from the third field of proc(5) on
        seconds, memory = (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK"), int(words[21]) * mmap.PAGESIZE
        values = seconds, int(words[20]), memory, len(os.listdir(f"{folder}/fd"))
    current: dict = {(f"process_{name}",): value for name, value in zip(names, values)}
    stats: dict = dict.fromkeys(("waiting", "sending", "oldest"), None if app.queue else 0)
    if app.queue:
        with contextlib.suppress(Rejected):  # the other metrics are needed then
            stats = await app.queue.do(queue_stats, request.now)
    current.update({("haineko_queue_recipients", state): stats[state] for state in ("waiting", "sending")})
    current[("haineko_queue_oldest_seconds",)] = stats["oldest"] or (stats["waiting"] and 0)
    current[("haineko_queue_disk_free_bytes",)] = app.queue and app.queue.free_space()
    return Response(200, metrics.text(current).encode(), type="text/plain; version=0.0.4; charset=utf-8")


def get_openapi(request: Request, app: App) -> Response:
    """Answer with the OpenAPI description of ENDPOINTS, made of the dataclasses and of an answer."""
    sample = respond(request, Mail("Q" * 16, None, {"a@example.jp": queued_reply("Q" * 16)}))
    paths: dict = {}
    for (method, path), endpoint in ENDPOINTS.items():
        summary = (endpoint.handler.__doc__ or f"{method} {path}").split("\n")[0]
        operation = {"summary": summary, "responses": {"default": {"description": "answer or refusal"}}}
        paths.setdefault(path.replace("ID", "{ID}"), {})[method.lower()] = operation
        if "ID" in path:
            operation["parameters"] = [{"name": "ID", "in": "path", "required": True, "schema": {"type": "string"}}]
        elif method == "POST":
            schema = {"$ref": SCHEMAS + "Submission"} if path == "/submit" else {"description": "the provider's"}
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    answer = paths["/submit"]["post"]["responses"]["default"]
    answer["content"] = {"application/json": {"schema": schema_of(json.loads(sample.body))}}
    schemas = {cls.__name__: class_schema(cls) for cls in (Submission, Header, Attachment)}
    logins: dict = {scheme: {"type": "http", "scheme": scheme} for scheme in ("basic", "bearer")}
    logins["token"] = {"type": "apiKey", "in": "header", "name": "X-Postmark-Server-Token"}
    return json_response({
        "openapi": "3.1.0", "info": {"title": "Haineko", "version": __version__}, "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": logins},
        "security": [{}, *({name: []} for name in logins)],
    })  # fmt: skip


SCHEMAS = "#/components/schemas/"
SCHEMA_TYPES = {  # of a field's default: the JSON types that its parser takes
    str: {"type": ["string", "array", "null"]}, bool: {"type": ["boolean", "integer", "null"]},
    tuple: {"type": ["string", "array", "object", "null"]},
}  # fmt: skip
REFERENCES = {"header": {"$ref": SCHEMAS + "Header"}, "attachments": {"items": {"$ref": SCHEMAS + "Attachment"}}}


def class_schema(cls: type) -> dict:
    """Return the schema of a dataclass made of config_field()."""
    items, properties = {item.name: item for item in fields(cls)}, {}
    for key, (name, _) in key_table(cls).items():
        kind = {**SCHEMA_TYPES.get(type(items[name].default), {}), **REFERENCES.get(name, {})}
        properties[key] = {**kind, "description": items[name].metadata["doc"]}
    return {"type": "object", "properties": properties, "additionalProperties": cls is Header}


def schema_of(value: Any) -> dict:
    """Return the schema of a value of an answer; null stands for any value."""
    if isinstance(value, dict):
        return {"type": "object", "properties": dict(zip(value, map(schema_of, value.values()))), "required": [*value]}
    if isinstance(value, list):
        return {"type": "array", "items": schema_of(value[0])}
    return {} if value is None else {"type": ["string" if isinstance(value, str) else "integer", "null"]}


ENDPOINTS = {
    ("POST", "/submit"): Endpoint(submit, CHECKS["head"]),
    **{("POST", path): Endpoint(answer_provider, CHECKS["head"]) for path in PROVIDER_ENDPOINTS},
    ("GET", "/"): Endpoint(lambda *_: json_response({"name": "Haineko", "version": __version__})),
    ("GET", "/health"): Endpoint(get_health),
    ("GET", "/conf"): Endpoint(lambda _, app: json_response(redacted(app.settings)), (check_monitor,)),
    ("GET", "/metrics"): Endpoint(get_metrics, (check_monitor,)),
    ("GET", "/queue"): Endpoint(get_queue, (check_monitor,)),
    ("GET", "/queue/ID"): Endpoint(answer_queued_mail, (check_queue_access,)),
    ("DELETE", "/queue/ID"): Endpoint(answer_queued_mail, (check_queue_access,)),
    ("POST", "/queue/ID/retry"): Endpoint(answer_queued_mail, (check_queue_access,)),
    ("GET", "/sample/mail"): Endpoint(lambda *_: json_response(SAMPLES)),
    ("GET", "/openapi.json"): Endpoint(get_openapi),
    ("GET", "/neko"): Endpoint(lambda *_: Response(200, b"Nyaaaaa", type="text/plain; charset=utf-8")),
}
STATUSES = tuple(sorted({200, 202, 204, 207, 502, *[row[0] for row in REPLIES.values() if row[0]]}))
PATHS, RELAY_KINDS = (*dict.fromkeys(path for _, path in ENDPOINTS), "other"), (*RELAYS, "other")
OUTCOMES = ("accepted", "queued", "refused", "deferred", "failed", "unsure")
REASONS = tuple(slug for slug in REPLIES if make_reply(slug).slug)
PROCESS_GAUGES = ("start_time_seconds", "virtual_memory_bytes", "resident_memory_bytes", "open_fds", "max_fds")
METRICS = {  # name: (type, help, {label: all its values})
    "haineko_http_requests_total": ("counter", "Requests answered.", {"endpoint": PATHS, "status": STATUSES}),
    "haineko_http_request_seconds": ("histogram", "Time from the start of a request to its response.", {}),
    "haineko_recipients_total": ("counter", "Results.", {"relay": RELAY_KINDS, "outcome": OUTCOMES}),
    "haineko_rejections_total": ("counter", "Refusals before delivery.", {"reason": REASONS}),
    "haineko_delivery_seconds": ("histogram", "Time of a transaction with the next hop.", {"relay": tuple(RELAYS)}),
    "haineko_replies_total": ("counter", "Replies of relays.", {"relay": tuple(RELAYS), "class": ("2", "4", "5")}),
    "haineko_queue_recipients": ("gauge", "Recipients in the queue.", {"state": ("waiting", "sending")}),
    "haineko_queue_oldest_seconds": ("gauge", "Age of the oldest recipient in the queue.", {}),
    "haineko_queue_disk_free_bytes": ("gauge", "Free space on the disk of the queue.", {}),
    "haineko_sessions": ("gauge", "SMTP sessions.", {"state": ("idle", "in_use", "opening")}),
    "haineko_connections": ("gauge", "Connections of clients.", {"state": ("idle", "busy")}),
    "haineko_log_lines_lost_total": ("counter", "Log lines that nobody read.", {}),
    "haineko_webhook_events_total": ("counter", "Posts.", {"outcome": ("delivered", "deferred", "failed")}),
    "haineko_token_errors_total": ("counter", "Failures to get an OAuth2 token.", {}),
    "haineko_workers_restarted_total": ("counter", "Processes that ended and were replaced.", {}),
    "haineko_reload_success": ("gauge", "1 if the settings had no fault when they were last read.", {}),
    "process_cpu_seconds_total": ("counter", "The supervisor's CPU time.", {}),
    **{f"process_{name}": ("gauge", f"The supervisor's {name}.", {}) for name in PROCESS_GAUGES},
    "haineko_build_info": ("gauge", "Versions.", {"version": (__version__,), "python": (sys.version.split()[0],)}),
}


def route_key(path: str) -> str:
    """Return the path as ENDPOINTS has it: with "ID" for a queue id."""
    found = QUEUE_PATH.fullmatch(path)
    return f"/queue/ID{found[1]}" if found else path


def allowed_methods(path: str) -> str:
    """Return the value of Allow, "" for an unknown path; "*" is the whole server (RFC 9110 9.3.7)."""
    methods = dict.fromkeys(method for method, known in ENDPOINTS if path == "*" or known == route_key(path))
    return ", ".join([*methods, *(["HEAD"] if "GET" in methods else []), *(["OPTIONS"] if methods else [])])


def cors_headers(request: Request, settings: Settings) -> tuple:
    """Return headers for a page of an allowed Origin; raise Rejected for what others may not do (Fetch standard)."""
    headers, origin = request.headers, request.headers.get("origin")
    if origin and origin.lower() in settings.httpd.allowed_origins:
        return (("Access-Control-Allow-Origin", origin), *CORS_HEADERS.items())
    if request.method in ("POST", "DELETE") or "access-control-request-method" in headers:
        host = origin.partition("://")[2].lower() if origin else ""
        is_ours = host == headers.get("host", "").lower() and is_own_host(host, settings)
        is_foreign = headers.get("sec-fetch-site", "").lower() == "cross-site" if origin is None else not is_ours
        if is_foreign:
            shown = "a cross-site request without Origin" if origin is None else sanitize(origin)
            raise Rejected(make_reply("origin", f"{shown} is not in httpd.allowed_origins"))
    return ()


class Connection(http.server.BaseHTTPRequestHandler):
    """One connection of a client. The base class writes responses; parse_head() is stricter and faster than it."""

    protocol_version = request_version = "HTTP/1.1"
    command, request, extra_headers, close_connection = "", None, (), True
    deadline = property(lambda self: self.begun + self.settings.httpd.timeout)  # of what the client is to do now

    def __init__(self, sock: socket.socket, peer: tuple | str, worker: Worker) -> None:
        self.connection, self.worker, self.app = AsyncSocket(sock), worker, worker.app
        self.settings, self.buffer, self.in_flight = worker.app.settings, b"", 0  # octets of a body that comes in parts
        self.begun, self.received = time.monotonic(), 0  # when the client's turn began, octets that it has brought
        address, self.port = peer[:2] if isinstance(peer, tuple) else ("127.0.0.1", None)  # Unix socket: this machine
        self.peer = parse_ip(address)

    async def handle(self) -> None:
        """Serve requests, one after the other, until one side closes."""
        self.worker.busy_counts[self.worker.slot] -= 1
        try:
            if self.app.tls:
                sock = self.app.tls.wrap_socket(self.connection.sock, server_side=True, do_handshake_on_connect=False)
                self.connection.sock = sock
                await self.connection.call(sock.do_handshake, self.deadline)
            while True:
                while not self.buffer.lstrip(b"\r\n"):  # line ends before a request are ignored (RFC 9112 2.2)
                    self.buffer = await self._receive()
                self.buffer = self.buffer.lstrip(b"\r\n")
                await self.connection.sendall(await self.handle_one_request(), self.deadline)
                if self.close_connection:
                    await self.connection.drain(self.deadline)
                    await lingering_close(self.connection)
                    break
        except (OSError, ValueError, Rejected):  # the client is gone, or silent
            pass
        finally:
            with contextlib.suppress(OSError, ValueError):
                close_notify(self.connection.sock)
            self.connection.close()
            self.worker.connections.pop(self)
            self.worker.per_address[self.peer] -= 1

    async def handle_one_request(self) -> bytes:
        """Return the octets of the response to the request that has begun; set `close_connection` and `deadline`."""
        self.settings = self.app.settings  # one set from beginning to end
        self.begun, self.received = time.monotonic(), len(self.buffer)
        self.request, self.command, self.unread, self.extra_headers = None, "", CHUNKED, ()
        self.worker.busy_counts[self.worker.slot] += 1
        try:
            response = await self._respond()
        except Rejected as error:
            response = self.rejection(error.reply)
        except OSError:
            raise
        except Exception:
            log_exception(None)
            response = self.rejection(make_reply("our-fault"))
        finally:
            self.worker.busy_counts[self.worker.slot] -= 1
            self.app.octets_in_flight -= self.in_flight
            self.in_flight = 0
        if 0 < self.unread <= len(self.buffer):  # a refused body that has arrived already
            self.buffer, self.unread = self.buffer[self.unread :], 0
        request = self.request
        self.close_connection = not (request and request.keep_alive and not self.unread and not self.app.stopping)
        path = route_key(request.path) if request else ""
        metrics.add("haineko_http_requests_total", path if path in PATHS else "other", response.status)
        metrics.observe("haineko_http_request_seconds", seconds=time.monotonic() - self.begun)
        octets, self.request = self.response_octets(response), None  # an idle connection keeps no body
        self.begun, self.received = time.monotonic(), 0  # its turn to take it, and for a new request
        self.worker.connections.move_to_end(self)
        return octets

    async def _respond(self) -> Response:
        """Return an endpoint's response; `unread` are the octets of the body that are unread, CHUNKED if unknown."""
        request = parse_head(await self._read_until(b"\r\n\r\n", MAX_HEAD, "head-too-large"))
        self.request, self.command, headers = request, request.method, request.headers
        request.client, request.peer, request.port = self.peer, self.peer, self.port
        request.settings, request.limits = self.settings, self.app.transport.limits
        if NOT_IN_HOST.search(headers.get("host", "" if request.is_http10 else ",")):  # RFC 9112 3.2
            raise Rejected(make_reply("bad-request", "Host"))
        self.unread = body_length(request)
        request.client, request.port = client_address(self.peer, self.port, headers, self.settings)
        if not FORWARDING_HEADERS.isdisjoint(headers):
            request.forwarded = ", ".join(sorted(FORWARDING_HEADERS.intersection(headers))).title()
        if request_id := request.trace_id("x-request-id"):
            self.extra_headers = (("X-Request-Id", request_id),)
        self.extra_headers += cors_headers(request, self.settings)
        endpoint = self._endpoint(request)
        if endpoint.checks:
            values, password = (endpoint.checks, request, None, self.settings), self.settings.password
            is_slow = password.logins and not password.authenticate(credentials_of(request), cached=True)
            if is_slow:  # a hash is computed
                await asyncio.to_thread(apply_checks, *values)
            else:
                apply_checks(*values)
        if self.unread and request.method != "POST":
            self.unread = CHUNKED  # it is not waited for: the connection is closed
            raise Rejected(make_reply("bad-request", f"{request.method} takes no body"))
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise Rejected(make_reply("content-encoding", "send the document as it is"))
        request.body = await self._read_body(request, self.unread)
        self.unread = 0
        try:
            response = endpoint.handler(request, self.app)
            return response if isinstance(response, Response) else await response
        except OSError as error:  # not this connection's, which would be closed without an answer
            raise RuntimeError("an endpoint failed") from error

    def _endpoint(self, request: Request) -> Endpoint:
        """Return the endpoint for a request; raise Rejected if there is none."""
        method = "GET" if request.method == "HEAD" else request.method
        if endpoint := ENDPOINTS.get((method, route_key(request.path))):
            return endpoint
        allowed = allowed_methods(request.path)
        if not allowed:
            hint = did_you_mean(request.path, {path for _, path in ENDPOINTS})
            raise Rejected(make_reply("not-found", *filter(None, [hint.lstrip("; ")])))
        if method != "OPTIONS":
            raise Rejected(make_reply("method", word=method))
        return Endpoint(lambda *_: Response(204, b"", (("Allow", allowed),)))

    def rejection(self, reply: Reply) -> Response:
        """Return the response for a Reply that refuses the request, and log it."""
        request = self.request or Request("", "", {}, b"", self.peer, self.peer, self.port, time.time())
        queueid = new_queueid(request.now) if reply.command != "HTTP" else None
        response = respond(request, Mail(queueid, None, {None: reply}))
        if reply.status == 405:
            return response._replace(headers=(("Allow", allowed_methods(request.path)),))
        is_of_provider = request.method == "POST" and request.path in PROVIDER_ENDPOINTS
        return provider_error(reply, request) if is_of_provider else response

    def response_octets(self, response: Response) -> bytes:
        self.wfile = io.BytesIO()
        self.send_response_only(response.status)
        headers = [("Server", "Haineko"), ("Date", http_date(int(time.time())))]
        if response.status != 204:
            headers += ("Content-Type", response.type), ("Content-Length", str(len(response.body)))
        if self.close_connection or self.request.is_http10:
            headers.append(("Connection", "close" if self.close_connection else "keep-alive"))
        for name, value in (*headers, *response.headers, *self.extra_headers):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)
        return self.wfile.getvalue()

    async def _read_until(self, mark: bytes, limit: int, slug: str, *lines: str) -> bytes:
        """Return the octets before a mark; raise Rejected by make_reply(slug, *lines) if they are more than `limit`."""
        searched = 0  # octets that need no search
        while True:
            end = self.buffer.find(mark, searched)
            if end > limit or (end < 0 and len(self.buffer) > limit):
                raise Rejected(make_reply(slug, *lines))
            if end >= 0:
                octets, self.buffer = self.buffer[:end], self.buffer[end + len(mark) :]
                return octets
            if BARE_LF.search(self.buffer, searched):
                raise Rejected(make_reply("bad-request", "line ends with LF alone"))
            searched = max(len(self.buffer) - 3, 0)
            self.buffer += await self._receive()

    async def _receive(self, limit: int = 16384) -> bytes:
        """Return octets from the client; raise Rejected at the deadline, ConnectionError at the end."""
        try:
            octets = await self.connection.recv(limit, self.deadline)
        except socket.timeout:
            raise Rejected(make_reply("request-timeout")) from None
        if not octets:
            raise ConnectionError("closed")
        self.received += len(octets)
        if self.request:  # these are of its body
            size = self.settings.smtpd.max_message_size
            self.in_flight += len(octets)
            self.app.octets_in_flight += len(octets)
            if self.app.octets_in_flight > max(MAX_IN_FLIGHT, 4 * size if size else 2 * MAX_BODY):
                raise Rejected(make_reply("overload"))
        return octets

    async def _read_body(self, request: Request, length: int) -> Any:
        self._check_length(length)
        expected = request.headers.get("expect", "").lower()
        if expected not in ("", "100-continue"):
            raise Rejected(make_reply("expectation"))
        if expected and not request.is_http10 and (length == CHUNKED or len(self.buffer) < length):
            await self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n", self.deadline)
        return await (self._read_chunks() if length == CHUNKED else self._read_exactly(length))

    def _check_length(self, length: int) -> None:
        """Raise Rejected if a body is longer than one that any message needs."""
        size = self.settings.smtpd.max_message_size
        limit = 2 * size + 65536 if size else MAX_BODY
        if length > limit:
            why = f": twice smtpd.max_message_size ({size}) and 65536" if size else ""
            raise Rejected(make_reply("body-too-large", f"more than {limit} octets{why}"))

    async def _read_exactly(self, length: int) -> Any:
        """Return `length` octets; a bytearray if they come in parts, because a copy would need the memory twice."""
        octets, self.buffer = self.buffer[:length], self.buffer[length:]
        if len(octets) == length:
            return octets
        whole = bytearray(octets)
        while len(whole) < length:
            whole += await self._receive(min(length - len(whole), 1 << 18))
        return whole

    async def _read_chunks(self) -> bytearray:
        """Return a chunked body (RFC 9112 7.1)."""
        body, total, size = bytearray(), 0, 1
        while size:
            line = await self._read_until(b"\r\n", 4096, "bad-request", "chunk line")
            if not (found := re.fullmatch(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;.*)?", line)):
                raise Rejected(make_reply("bad-request", "chunk size"))
            size = int(found[1], 16)
            total += len(line) + size  # a body of chunks of one octet costs by its lines
            self._check_length(total)
            body += await self._read_exactly(size)
            await asyncio.sleep(0)  # a chunk may be one octet, and thousands of them may have arrived
            if size and await self._read_exactly(2) != b"\r\n":
                raise Rejected(make_reply("bad-request", "end of chunk"))
        for _ in range(MAX_HEADERS):
            if not await self._read_until(b"\r\n", 4096, "bad-request", "chunk line"):
                return body
        raise Rejected(make_reply("head-too-large"))


async def lingering_close(sock: AsyncSocket) -> None:
    """End the stream and read what still arrives: else a reset could destroy the last response (RFC 9112 9.6)."""
    deadline = time.monotonic() + LINGER_TIMEOUT
    with contextlib.suppress(OSError):
        await sock.call(functools.partial(close_notify, sock.sock), deadline)
        sock.sock.shutdown(socket.SHUT_WR)
        while await sock.recv(1 << 18, deadline):
            pass


def close_notify(sock: Any) -> None:
    """Send the closure alert of TLS (RFC 9112 9.8); the client's own is not waited for."""
    if isinstance(sock, ssl.SSLSocket):
        with contextlib.suppress(ssl.SSLWantReadError):
            sock.unwrap()


class Worker:
    """Process that serves all its connections in one thread, or that delivers from the queue."""

    def __init__(self, supervisor: Supervisor, slot: int = 0) -> None:
        self.app = App(supervisor.settings, supervisor.wakeup_pair[1], supervisor.limits)
        self.listeners, self.parent = supervisor.listeners, supervisor.pid
        self.busy_counts, self.slot = supervisor.busy_counts, slot
        self.loop, is_of_queue = EventLoop(), slot == len(self.busy_counts)
        self.queue_manager = QueueManager(self.app, supervisor.wakeup_pair[0]) if is_of_queue else None
        self.connections: OrderedDict = OrderedDict()  # keys alone; first the one whose client's turn began first
        self.per_address: Counter = Counter()  # of the connections
        self.lingering_503s = 0  # connections over the limit that are being answered

    async def serve(self) -> None:
        """Serve until a signal to stop comes and all requests in flight are answered."""
        log.start_buffering(self.loop)
        sys.setswitchinterval(0.001)  # a thread at work on a large mail must not hold up the small ones for longer
        self.stopped, self.reloading = asyncio.Event(), asyncio.Lock()
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self.stopped.set)
        self.loop.add_signal_handler(signal.SIGHUP, lambda: self.loop.create_task(self._reread()))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # one that came since the fork is handled now
        for sock in self.listeners:
            sock.setblocking(False)
        listeners = list(map(AsyncSocket, self.listeners))
        work = [self.queue_manager.run()] if self.queue_manager else map(self._accept, listeners)
        for coroutine in (*work, self._housekeeping()):  # if one of them ends, the worker does, and is replaced
            self.loop.create_task(coroutine).add_done_callback(lambda _: self.stopped.set())
        await self.stopped.wait()
        self.app.stopping = True
        began = now = time.monotonic()
        await asyncio.sleep(0.01)  # requests that have come meanwhile are accepted
        for listener in listeners:
            listener.close()
        deliveries = self.queue_manager.in_flight if self.queue_manager else {}
        while now < began + SHUTDOWN_TIMEOUT and (self.connections or any(deliveries.values())):
            patient = now <= began + LINGER_TIMEOUT
            for one in self.connections:
                if not (one.request or one.connection.outbox or (patient and one.buffer)):
                    one.connection.abort(ConnectionAbortedError("stopping"))  # no request has begun, and all is sent
            await asyncio.sleep(0.02)
            now = time.monotonic()
        await asyncio.wait([self.loop.create_task(self.app.transport.sweep(everything=True))], timeout=LINGER_TIMEOUT)

    async def _accept(self, listener: AsyncSocket) -> None:
        while listener.sock.fileno() >= 0:
            least, limit = min(self.busy_counts), self.app.settings.httpd.max_connections
            if self.busy_counts[self.slot] > least + least // 4:  # of many, some more make no difference
                await asyncio.sleep(0.001)  # a worker that is less busy takes the connection
            try:
                sock, peer = listener.sock.accept()
            except BlockingIOError:
                with contextlib.suppress(ConnectionAbortedError):  # closed
                    await listener.wait_ready(float("inf"))
                continue
            except OSError as error:  # the client is gone, or no file is left
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    await asyncio.sleep(0 if self._close_one() else 0.05)
                continue
            sock.setblocking(False)
            with contextlib.suppress(OSError):  # a Unix socket, or macOS and the client is gone already
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(sock, peer, self)
            for attempt in range(5):
                if len(self.connections) < limit or (attempt > 1 and self._close_one()):
                    break
                await asyncio.sleep(0)  # until what has arrived is read, and the connections that ended are gone
            else:
                self.loop.create_task(self._reject_503(connection))
                continue
            self.connections[connection] = None
            self.per_address[connection.peer] += 1
            self.busy_counts[self.slot] += 1  # until its task begins
            self.loop.create_task(connection.handle())

    async def _reject_503(self, connection: Connection) -> None:
        """Answer 503 to a connection over the limit; close it at once if many are being answered so, or under TLS."""
        octets, sock = connection.response_octets(connection.rejection(make_reply("busy"))), connection.connection
        metrics.add("haineko_http_requests_total", "other", 503)
        self.lingering_503s += 1
        with contextlib.suppress(OSError):
            if not self.app.tls:
                await sock.sendall(octets, connection.deadline)
                await sock.drain(connection.deadline)
                if self.lingering_503s <= MAX_LINGERING_503:
                    await lingering_close(sock)
        self.lingering_503s -= 1
        sock.close()

    def _close_one(self) -> bool:
        """Close the connection that has brought least for its time, of those that wait for their clients; False if none
        does. Those of an address with more than a quarter of max_connections go first, except for a proxy's."""
        httpd, now = self.app.settings.httpd, time.monotonic()

        def precedence(one: Connection) -> tuple:
            is_crowded = self.per_address[one.peer] > httpd.max_connections // 4
            is_proxy = one.port is None or one.peer in httpd.trusted_proxies
            return is_proxy or not is_crowded, (one.received + 500) / max(now - one.begun, 1)  # octets a second

        waiting = (one for one in self.connections if one.connection.future and not one.connection.future.done())
        victims = sorted(itertools.islice(waiting, MAX_VICTIMS), key=precedence)
        return any(one.connection.abort(ConnectionAbortedError("closed for another")) for one in victims)

    async def _housekeeping(self) -> None:
        """Once a second, while the supervisor lives, show that this loop is not stuck, and do what is due."""
        while os.getppid() == self.parent:
            metrics.cells[0] = time.monotonic_ns()
            log.reopen()
            await self.app.transport.sweep()
            pools = self.app.transport.pools.values()
            metrics.set("haineko_sessions", "idle", to=sum([len(pool.idle) for pool in pools]))
            metrics.set("haineko_sessions", "in_use", to=sum([pool.in_use for pool in pools]))
            metrics.set("haineko_sessions", "opening", to=sum([pool.opening for pool in pools]))
            self.per_address = +self.per_address  # without those that have none left
            busy = sum([bool(one.request) for one in self.connections])
            metrics.set("haineko_connections", "idle", to=len(self.connections) - busy)
            metrics.set("haineko_connections", "busy", to=busy)
            await asyncio.sleep(1.0)

    async def _reread(self) -> None:
        """Apply settings that changed; the supervisor has logged their faults. The last ones win."""
        async with self.reloading:
            settings, errors = await asyncio.to_thread(load_settings, self.app.settings.path)
            if not errors:
                self.app.apply(settings)


class Supervisor:
    """Process that binds, forks workers, replaces those that die, and watches the settings."""

    def __init__(self, settings: Settings, listeners: list) -> None:
        self.settings, self.listeners, self.pid = settings, listeners, os.getpid()
        workers = settings.httpd.workers or os.cpu_count() or 1
        self.busy_counts = memoryview(mmap.mmap(-1, 4 * workers)).cast("i")  # busy connections of each; for all to see
        self.slots = range(workers + bool(settings.queue))  # indices in busy_counts; the last is the queue's process
        self.workers: dict = {}  # pid: (monotonic time of its start, slot)
        self.limits = SharedLimits()
        self.wakeup_pair = socket.socketpair() if settings.queue else (None, None)  # written to when something is due
        self.files = settings.files  # of the settings that were read last, faulty or not
        self.stopping, self.respawn_not_before = False, 0.0  # no worker is started before this time
        self.notify_path = os.environ.pop("NOTIFY_SOCKET", "")  # systemd's; no other process speaks to it
        is_ours = os.environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        microseconds = os.environ.pop("WATCHDOG_USEC", "0") if is_ours else "0"
        self.watchdog = int(microseconds) / 2e6  # seconds between messages to it, half of what it waits; 0: none
        self.checked_at = self.notified_at = 0.0  # time.monotonic() of the last look at the workers and message to it

    def run(self, ready: Callable) -> int:
        """Run until SIGTERM or SIGINT; return the exit code."""
        log.open(self.settings.smtpd.syslog, self.settings.smtpd.log)
        alarm, wake = socket.socketpair()
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        for number in (*SIGNALS, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)  # its number is written to `wake`
        metrics.allocate(METRICS, len(self.busy_counts) + 2)  # the last rows: the queue's process, the supervisor
        metrics.set("haineko_build_info", __version__, sys.version.split()[0], to=1)
        metrics.set("haineko_reload_success", to=1)
        metrics.set("process_start_time_seconds", to=int(time.time()))
        metrics.set("process_max_fds", to=resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        alarm.settimeout(min(self.watchdog or 1.0, 1.0))
        self._replace()
        ready()
        where = " ".join(url_of(listener, bool(self.settings.httpd.tls)) for listener in self.listeners)
        self._notify("READY=1", f"STATUS=listens at {where}")
        while not self.stopping:
            numbers = self._wait(alarm)
            log.reopen()
            if not self.stopping:
                self._check_heartbeats(time.monotonic())
                self._replace()
                self._watch(signal.SIGHUP in numbers)
        return self._stop(alarm)

    def _notify(self, *lines: str) -> None:
        """Tell systemd, if it asks for it (sd_notify(3))."""
        path = "\0" + self.notify_path[1:] if self.notify_path[:1] == "@" else self.notify_path
        if path:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(lines).encode(), path)

    def _check_heartbeats(self, now: float) -> None:
        """Kill the workers that hang; while none does, say so to systemd's watchdog."""
        beats = {pid: max(began, metrics.rows[slot][0] / 1e9) for pid, (began, slot) in self.workers.items()}
        was_late = now - self.checked_at > HANG_TIMEOUT / 2  # this process, or the machine, did not run either
        hanging = [pid for pid, beat in beats.items() if now - beat > HANG_TIMEOUT and not was_late]
        self.checked_at = now
        for pid in hanging:
            log.lines(f"worker {pid} hangs; killing it", level="error")
        self._signal(hanging, signal.SIGKILL)
        if self.watchdog and not hanging and now - self.notified_at > self.watchdog * 0.9:
            self.notified_at = now
            self._notify("WATCHDOG=1")

    def _replace(self) -> None:
        """Start the workers that are missing; one that died within a second is replaced a second later."""
        for slot in sorted(set(self.slots) - {slot for _, slot in self.workers.values()}):
            if time.monotonic() < self.respawn_not_before:
                return
            sys.stderr.flush()
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the worker handles them
            try:
                pid = os.fork()
            except OSError as error:  # no process is left: those that run must go on
                log.lines(f"cannot start a worker: {error.strerror}", level="error")
                pid, self.respawn_not_before = -1, time.monotonic() + 1
            if not pid:
                self._become_worker(slot)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            if pid > 0:
                self.workers[pid] = time.monotonic(), slot

    def _become_worker(self, slot: int) -> None:
        code = 1
        try:
            if slot < len(self.busy_counts):
                self.busy_counts[slot] = 0  # its predecessor has left a number there
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            gc.freeze()
            gc.set_threshold(20000, 50, 50)
            metrics.cells = metrics.rows[slot]
            worker = Worker(self, slot)
            worker.loop.run_until_complete(worker.serve())
            code = 0
        except BaseException:
            log_exception("worker")
        finally:
            log.flush()
            os._exit(code)  # without waiting for threads, and without the supervisor's cleanup

    def _wait(self, alarm: socket.socket) -> bytes:
        """Wait for signals, a second at most, and note which workers have ended; return the signals' numbers."""
        numbers = b""
        with contextlib.suppress(socket.timeout):
            numbers = alarm.recv(4096)
        self.stopping = self.stopping or signal.SIGTERM in numbers or signal.SIGINT in numbers
        while self.workers and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = ended
            started, slot = self.workers.pop(pid, (None, 0))
            if started is not None and not self.stopping:
                name = "worker" if slot < len(self.busy_counts) else "queue process"
                reason = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
                log.lines(f"{name} {pid} ended ({reason}); starting a new one", level="error")
                metrics.add("haineko_workers_restarted_total")
                if time.monotonic() - started < 1:
                    self.respawn_not_before = time.monotonic() + 1
        return numbers

    def _watch(self, is_requested: bool) -> None:
        """Apply settings that changed, or log their faults once; a reload may be requested by SIGHUP."""
        settings = self.settings
        is_changed = self.files != tuple((path, stat_key(path)) for path, _ in self.files)
        if not settings.path or not (is_requested or is_changed):
            return
        self._notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        fresh, errors = load_settings(settings.path)
        self._notify("READY=1", f"STATUS=reload failed: {len(errors)} errors" if errors else "STATUS=reloaded")
        metrics.set("haineko_reload_success", to=int(not errors))
        self.files = fresh.files
        if errors:
            lines = [f"  {sanitize(error)}" for error in errors]
            log.lines("reload failed; keeping the current settings:", *lines, level="error")
            return
        for part in ("listen", "workers"):
            if getattr(fresh.httpd, part) != getattr(settings.httpd, part):
                log.lines(f"httpd.{part}: takes effect at the next start")
        fresh = replace(fresh, httpd=replace(fresh.httpd, listen=settings.httpd.listen, workers=settings.httpd.workers))
        if (fresh.queue and fresh.queue.path) != (settings.queue and settings.queue.path):
            log.lines("queue.path: takes effect at the next start")
        queue = settings.queue and replace(fresh.queue or settings.queue, path=settings.queue.path)
        self.settings = fresh = replace(fresh, queue=queue)
        log.open(fresh.smtpd.syslog, fresh.smtpd.log)
        log.lines(f"reloaded {settings.path}", *filter(None, [fresh.smtpd.staging]))
        self._signal(self.workers, signal.SIGHUP)

    def _signal(self, pids: Any, number: int) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _stop(self, alarm: socket.socket) -> int:
        """Wait for the workers, which answer what is in flight; kill those that take too long."""
        self._notify("STOPPING=1", "STATUS=answering what is in flight")
        for listener in self.listeners:
            if listener.family == socket.AF_UNIX and not isinstance(listener, ActivatedSocket):
                with contextlib.suppress(OSError):
                    os.unlink(listener.getsockname())
            listener.close()
        self._signal(self.workers, signal.SIGTERM)
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT + 3
        while self.workers and time.monotonic() < deadline:
            self._wait(alarm)
        self._signal(self.workers, signal.SIGKILL)
        log.lines("stopped")
        return 0


def bind(listen: str) -> socket.socket:
    """Return a listening TCP or Unix socket, in place of one that a server left which is gone; raise OSError."""
    if not listen.startswith("unix:"):
        name, _, port = listen.rpartition(":")
        host = ascii_domain(name.strip("[]")).encode()
        family, *_, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family, backlog=BACKLOG)
    path = listen[5:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        if client.connect_ex(path) == errno.ECONNREFUSED and stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        os.chmod(path, 0o666)  # the folder's mode decides who may connect, as for other servers' sockets
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


class ActivatedSocket(socket.socket):
    """Listening socket that systemd has opened, and removes."""


def activated_sockets() -> list:
    """Return the sockets that systemd passes to this process, from descriptor 3 on (sd_listen_fds(3))."""
    pid, count, _ = [os.environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES")]
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    listeners = [ActivatedSocket(fileno=number) for number in range(3, 3 + int(count))]
    for listener in listeners:
        listener.set_inheritable(False)
        if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise OSError(errno.EINVAL, "expected a listening socket")
    return listeners


def url_of(listener: socket.socket, tls: bool) -> str:
    address = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{address}"
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"{'https' if tls else 'http'}://{host}:{address[1]}/"


# ======================================================================================================================
# 20. Commands
#     Takes the words of a command line and returns an exit code. Results go to stdout, messages for a person to stderr.
#     Commands stand in the order of COMMANDS, the table at the end; a new one is a function and a row there.
# ======================================================================================================================

LOCAL_HOST = r"(?:localhost|127\.[\d.]+|\[?::1\]?)"
SPF_TERM = (  # RFC 7208; `lookup`: what counts as one, `inner`: a domain whose record counts too
    r"[+?~-]?(?:all|ip4:[\d.]+(?:/\d+)?|ip6:[\da-f:.]+(?:/\d+)?|(?P<lookup>(?:include:|redirect=)(?P<inner>\S+)"
    r"|exists:\S+|(?:a|mx)(?::[^\s/]+)?(?:/\d+)?(?://\d+)?|ptr(?::\S+)?))|[a-z][\w.-]*=\S*"
)


class CommandError(Exception):
    """A command that cannot be carried out; the arguments are a message and the exit code."""


def main(argv: list) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 wrong usage or settings."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # closed: a socket would get the number, and what is printed
        name = ("stdin", "stdout", "stderr")[number]
        setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 -- kept for life
    os.close(number)
    try:
        if argv[:1] == ["sendmail"] and argv[1:] not in (["-h"], ["--help"]):
            return command_sendmail(argv[1:])  # its flags are older than argparse
        command, options = parse_arguments(argv)
        return command(options)
    except CommandError as error:
        return print_message(*error.args)
    except BrokenPipeError:  # of stdout: `queue | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        return 130


def parse_arguments(argv: list) -> tuple:
    """Return (function of the command, its options); help, the version and wrong usage end the program."""
    import argparse

    names = "\n".join(f"    {name:9} {command.__doc__}" for name, (command, _) in COMMANDS.items())
    top = argparse.ArgumentParser("haineko.py", "haineko.py COMMAND [options]", epilog=f"commands:\n{names}")
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    top.add_argument("--version", action="version", version=f"Haineko {__version__}")
    top.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    name = top.parse_args(argv[:1]).command
    command, arguments = COMMANDS[name]
    parser = argparse.ArgumentParser(f"haineko.py {name}", description=command.__doc__)
    for word in arguments.split():
        names, details = ARGUMENTS.get(word, (word, {}))
        parser.add_argument(*names.split(), **details)
    return command, parser.parse_intermixed_args(argv[1:])


def print_message(text: str, code: int) -> int:
    print(f"haineko: {text}", file=sys.stderr)
    return code


def settings_path(given: str | None) -> str | None:
    """Return the path of the settings: -c, else $HAINEKO_CONF, else haineko.json beside this file, else None."""
    beside = os.path.join(os.path.dirname(os.path.realpath(__file__)), "haineko.json")
    named = given or os.environ.get("HAINEKO_CONF")
    return os.path.abspath(named) if named else beside if os.path.exists(beside) else None


def usable_settings(given: str | None) -> Settings:
    """Load the settings; CommandError names every fault."""
    settings, errors = load_settings(settings_path(given))
    if errors:
        raise CommandError("\n".join(["the settings can't be used:", *[f"  {error}" for error in errors]]), 2)
    return settings


def command_serve(options: Any) -> int:
    """Run the server in the foreground."""
    settings, listeners = prepare_server(options)
    log.devel = options.devel
    return Supervisor(settings, listeners).run(lambda: announce(settings, listeners))


def prepare_server(options: Any) -> tuple:
    """Return a server's Settings and its listening sockets."""
    settings, errors, changes = usable_settings(options.config), [], {}
    for name, parse in (("listen", parse_listen), ("workers", integer(0, 256))):
        if getattr(options, name) is not None:
            changes[name] = parse(getattr(options, name), f"--{name}", errors)
    if errors:
        raise CommandError("; ".join(errors), 2)
    settings = replace(settings, httpd=replace(settings.httpd, **changes))
    with contextlib.suppress(OSError, ValueError):  # each client needs an open file, and each of its deliveries another
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    if settings.queue:
        database = QueueDB(settings.queue)
        database.commit([])
        database.close(for_good=True)
        if database.is_other_version:
            raise CommandError(f"the queue can't be used: {database.fault}", 2)
    address = "a socket of $LISTEN_FDS"
    try:
        listeners = activated_sockets()
        for address in () if listeners else settings.httpd.listen:
            listeners.append(bind(address))
    except (OSError, UnicodeError) as error:
        raise CommandError(f"can't listen at {address}: {getattr(error, 'strerror', None) or error}", 1) from None
    for text in risk_warnings(settings, [url_of(listener, False) for listener in listeners]):
        log.write_bytes(sanitize(f"haineko: warning: {text}", 500).encode() + b"\n")
    return settings, listeners


def announce(settings: Settings, listeners: list) -> str:
    """Write to the log where the server listens; return the URLs."""
    urls = " ".join(url_of(listener, bool(settings.httpd.tls)) for listener in listeners)
    if not settings.path:
        log.banner("haineko: NO SETTINGS FILE: for this machine only; all mail is printed here, not sent")
    if settings.smtpd.staging:
        log.banner(f"haineko: {settings.smtpd.staging}")
    log.banner(f"haineko {__version__} listens at {urls}")
    return urls


def command_start(options: Any) -> int:
    """Run the server as a daemon; return when it listens."""
    pid_file, log_file = daemon_files(options)
    if pid := running_daemon(pid_file)[0]:
        raise CommandError(f"runs already (pid {pid})", 1)
    os.environ.pop("NOTIFY_SOCKET", None)  # systemd waits for the process that it has started
    settings, listeners = prepare_server(options)
    try:
        output = os.open(log_file, log.FILE_FLAGS, 0o600)
        pid_fd = os.open(pid_file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        fcntl.flock(pid_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # kept for life: `status` asks for the lock, not for the pid
        os.ftruncate(pid_fd, 0)
    except OSError as error:
        raise CommandError(f"can't start: {error}", 1) from None
    if pid := os.fork():
        while not (urls := os.pread(pid_fd, 4096, 0).decode().partition("\n")[2].strip()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                raise CommandError(f"did not start; see {log_file}", 1)
            time.sleep(0.02)
        print(f"haineko {__version__} listens at {urls} (pid {pid}, log {log_file})", file=sys.stderr)
        return 0
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDONLY)
    for number, target in ((0, null), (1, output), (2, output)):
        os.dup2(target, number)
    os.close(null)
    os.close(output)  # or a log that was rotated and deleted would go on taking space on the disk
    log.path = log_file
    code = Supervisor(settings, listeners).run(
        lambda: os.write(pid_fd, f"{os.getpid()}\n{announce(settings, listeners)}\n".encode())
    )
    os.unlink(pid_file)
    return code


def daemon_files(options: Any) -> tuple:
    """Return the paths of the pid file, --pid-file or haineko.pid beside the settings or this file, and of the log."""
    beside = settings_path(options.config) or os.path.realpath(__file__)
    pid_file = os.path.abspath(options.pid_file or os.path.join(os.path.dirname(beside), "haineko.pid"))
    return pid_file, pid_file.removesuffix(".pid") + ".log"


def running_daemon(pid_file: str) -> tuple:
    """Return (pid, time of its start, URLs) of the daemon that has the file locked; (0, 0.0, "") if none has."""
    with contextlib.suppress(OSError, ValueError), open(pid_file, encoding="ascii") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)  # a shared lock needs no right to write
        except OSError:
            pid, *urls = stream.read().split()
            return int(pid), os.fstat(stream.fileno()).st_mtime, " ".join(urls)
    return 0, 0.0, ""


def command_stop(options: Any) -> int:
    """Stop the daemon when all mail in flight is answered."""
    pid, deadline = signal_daemon(options, signal.SIGTERM), time.monotonic() + SHUTDOWN_TIMEOUT + 10
    while running_daemon(daemon_files(options)[0])[0]:
        if time.monotonic() > deadline:
            raise CommandError(f"pid {pid} does not stop", 1)
        time.sleep(0.05)
    return print_message("stopped", 0)


def command_restart(options: Any) -> int:
    """Stop the daemon and start it."""
    usable_settings(options.config)  # a faulty file must not cost the server that runs
    if running_daemon(daemon_files(options)[0])[0]:
        command_stop(options)
    return command_start(options)


def command_status(options: Any) -> int:
    """Say whether the daemon runs, since when and where it listens."""
    pid_file, log_file = daemon_files(options)
    pid, since, urls = running_daemon(pid_file)
    where = f" (pid {pid}) since {timestamp(since)}, listens at {urls}, log {log_file}"
    print(f"haineko runs{where}" if pid else "haineko does not run")
    return int(not pid)


def command_reload(options: Any) -> int:
    """Have the daemon read its settings again."""
    usable_settings(options.config)
    signal_daemon(options, signal.SIGHUP)
    return 0


def signal_daemon(options: Any, number: int) -> int:
    """Send the daemon a signal; return its pid."""
    if not (pid := running_daemon(daemon_files(options)[0])[0]):
        raise CommandError("does not run", 1)
    try:
        os.kill(pid, number)
    except OSError as error:
        raise CommandError(f"pid {pid}: {error.strerror}", 1) from None
    return pid


def command_check(options: Any) -> int:
    """Print every fault of the settings, or where mail would go."""
    path = settings_path(options.config)
    settings, errors = load_settings(path)
    if errors:
        print(*errors, sep="\n")
        return 1
    route, why = resolve_route("", "", settings)
    staging, printed = settings.smtpd.staging and f"{settings.smtpd.staging}; ", "" if path else "; printed"
    to = settings.recipients
    names = [*sorted(f"@{domain}" for domain in to.domainpart), *sorted(to.recipients)]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    permitted = f"{', '.join(names[:8])}{more} only" if names else "nobody"
    permitted = "everybody" if to.open_relay else f"{permitted} (setting recipients)"
    where = f"{staging}mail goes to {describe_route(route)} ({why}){printed}; may be written to: {permitted}"
    root = "" if os.geteuid() else "; warning: the server needs no root"
    print(f"{path or 'no settings file'}: fine; {where}{root}")
    for text in dict.fromkeys([*risk_warnings(settings, settings.httpd.listen), *other_warnings(settings)]):
        print(sanitize(f"warning: {text}", 500), file=sys.stderr)
    return run(run_checks(settings, options))


async def run_checks(settings: Settings, options: Any) -> int:
    """Run the checks that the options ask for, print a line for each step, and return the exit code."""
    sender, selector, failed = parse_address(options.sender or ""), options.selector, False
    if options.sender and not (sender and sender.domain[0] != "["):
        raise CommandError(f'"{options.sender}" is no mail address of a domain', 2)
    if selector and not DOMAIN.fullmatch(selector):
        raise CommandError(f'"{selector}" is no selector', 2)
    domain, transport, checks = sender.domain if sender else "", TransportContext(settings.smtpd.resolver), []
    for name, route, only_domain in named_routes(settings) if options.connect else ():
        checks.append((name, run_probe(route, settings.hostname, only_domain or domain, transport)))
    if domain:
        checks.append((domain, check_sender_domain(domain.lower(), selector, transport.resolver, settings.dkim)))
    for name, check in checks:
        for step, ok, text in await check:
            failed = failed or not ok
            print(sanitize(f"{name}: {step}: {'' if ok else 'FAILED: '}{text}", 2000), flush=True)
    await transport.sweep(everything=True)
    return int(failed)


def named_routes(settings: Settings) -> Any:
    """Yield (path in the settings, Route, the one domain that it is for or "") of every route."""
    for table in ("mailertable", "sendermt"):
        for key, first in getattr(settings, table).items():
            domain = key if table == "mailertable" and key != "default" and not key.startswith(".") else ""
            for i, route in enumerate(first.choices):
                yield f"{table}.{key}[{i}]" if first.fallbacks else f"{table}.{key}", route, domain
    if "default" not in {**settings.mailertable, **settings.sendermt}:
        yield "no route", FALLBACK_ROUTE, ""


async def run_probe(route: Route, hostname: str, domain: str, transport: TransportContext) -> list:
    """Return the results of fetching a route's access token, and of its probe, whatever it raises."""
    results: list = []
    try:
        if route.oauth2:
            token = await transport.tokens.token_for(route)
            route = replace(route, credentials=(route.credentials[0], token.text))
            text = f"ends in {int(token.expires - time.monotonic())} s, scope {token.scope or 'not told'}"
            results.append(CheckResult("TOKEN", True, text))
        return results + await route.row.probe(route, hostname, domain, transport)
    except Rejected as rejected:
        step = "TOKEN" if route.oauth2 and not results else rejected.reply.command.replace("DATA", "AUTH")
        return [*results, CheckResult(step, False, f"{rejected.reply.code} {': '.join(rejected.reply.message)}")]
    except OSError as error:
        return [*results, CheckResult("CONN", False, error_text(error))]


async def check_sender_domain(domain: str, selector: str | None, resolver: Resolver, keys: dict) -> list:
    """Check what large receivers read in DNS of a sender's domain; a check describes a record or raises ValueError."""
    checks = (check_spf(domain, resolver), check_dkim(domain, selector, resolver, keys), check_dmarc(domain, resolver))
    results = []
    for step, check in zip(("SPF", "DKIM", "DMARC"), checks):
        try:
            results.append(CheckResult(step, True, await check))
        except ValueError as error:
            results.append(CheckResult(step, False, str(error)))
    return results


async def txt_record(name: str, pattern: str, resolver: Resolver) -> str:
    """Return the one TXT record of a name that the pattern matches, "" if there is none."""
    found = await resolver.lookup(name, TXT, time.monotonic() + Resolver.QUERY_TIMEOUT * Resolver.ATTEMPTS)
    if found.code == SERVFAIL:
        raise ValueError(f"{REPLIES['dns'][-1]}: {name}: {found.why}")
    records = [text for text in found.values if re.match(pattern, text)]
    if len(records) > 1:
        raise ValueError(f"{name}: more than one record: none counts")
    return records[0] if records else ""


async def check_spf(domain: str, resolver: Resolver) -> str:
    """Check the domain's SPF record and those that it includes (RFC 7208)."""
    shown, lookups, names = "", 0, [domain]
    for name in names:  # included ones are appended
        record = await txt_record(name, r"(?i)v=spf1(?:\s|$)", resolver)
        terms = record.lower().split()[1:]
        found = [re.fullmatch(SPF_TERM, term) for term in terms]
        unknown = next((term for term, match in zip(terms, found) if not match), "")
        lookups += len([match for match in found if match and match["lookup"]])
        for is_fault, words in (
            (not record, "no SPF record"),
            (name == domain and terms[:1] == ["-all"], "v=spf1 -all says that the domain sends no mail at all"),
            (unknown, f'"{sanitize(unknown, 80)}" is no term of SPF: the record does not count'),
            ({"all", "+all"}.intersection(terms), "+all lets everybody send in its name: receivers treat it as spam"),
            (lookups > 10, f"{domain} has more than 10 look-ups (RFC 7208 4.6.4): receivers refuse"),
        ):
            if is_fault:
                raise ValueError(f"{name}: {words}")
        inner = [match["inner"] for match in found if match["inner"] and "%" not in match["inner"]]  # %: of a mail
        names += [included for included in inner if included not in names]
        shown = shown or sanitize(record)
    return f"{shown} ({lookups} of 10 look-ups)"


async def check_dkim(domain: str, selector: str | None, resolver: Resolver, keys: dict) -> str:
    """Check the DKIM key of that selector, or of the one in the settings (RFC 6376)."""
    own = find_dkim_key(domain, keys)
    if not (own or selector):
        return "not looked at; --selector names the key"
    own = own if own and selector in (None, own.selector) else None
    name = f"{own.selector}._domainkey.{own.domain}" if own else f"{selector}._domainkey.{domain}"
    record = await txt_record(name, "", resolver)
    tags, key = parse_tags(record), b""
    public, is_ed25519 = re.sub(r"\s", "", tags.get("p", "")), tags.get("k", "rsa") == "ed25519"
    with contextlib.suppress(ValueError):
        key = base64.b64decode(public, validate=True)
    bits = rsa_bits(key)
    for is_fault, words in (
        (not record, "no key: signatures can't be verified"),
        (tags.get("v", "DKIM1") != "DKIM1" or "p" not in tags, "not a DKIM key"),
        (not public, "the key is revoked (p= is empty)"),
        (own and public != parse_tags(dkim_record(own))["p"], "not the key of the settings: see `haineko.py dkim`"),
        (not key, "the key is no base64"),
        (is_ed25519 and len(key) != 32, "an ed25519 key has 32 octets"),
        (not is_ed25519 and bits < 1024, f"RSA key of {bits or 'unknown'} bits: receivers want 1024 at least"),
    ):
        if is_fault:
            raise ValueError(f"{name}: {words}")
    under_test = "; t=y: under test, so a failure counts as no signature" if "y" in tags.get("t", "") else ""
    return f"{name}: {'ed25519' if is_ed25519 else f'RSA, {bits} bits'}{under_test}"


async def check_dmarc(domain: str, resolver: Resolver) -> str:
    """Check the DMARC policy of the domain or of one above it (RFC 7489)."""
    for parent in lookup_keys(domain)[:-1] or [domain]:
        name = f"_dmarc.{parent.lstrip('.')}"
        if record := await txt_record(name, r"v=DMARC1\s*(?:;|$)", resolver):
            tags = parse_tags(record)
            policy = tags.get("p", "") if parent == domain else tags.get("sp", tags.get("p", ""))
            if policy.lower() not in ("none", "quarantine", "reject"):
                raise ValueError(f"{name}: p= names no policy: it does not count")
            return f"{name}: {sanitize(record)}"
    raise ValueError(f"_dmarc.{domain}: no DMARC record: Gmail, Yahoo and Outlook refuse bulk mail without")


def risk_warnings(settings: Settings, addresses: Any) -> Any:
    """Yield warnings of what lets strangers use the server, which is to listen at the addresses, or learn a secret."""
    httpd, relayhosts = settings.httpd, settings.relayhosts
    for address in () if httpd.tls or httpd.trusted_proxies.texts else addresses:
        if not re.fullmatch(rf"unix:.*|(?:http://)?{LOCAL_HOST}:\d+/?", address):
            yield f"httpd.listen: {address} takes mail from other machines without TLS; set tls or trusted_proxies"
    networks = [ipaddress.ip_network(text, strict=False) for text in relayhosts.relayhosts.texts]
    from_outside = relayhosts.open_relay or not all(network.is_loopback for network in networks)
    if settings.recipients.open_relay and from_outside and not settings.password.logins:
        yield "recipients.open-relay: other machines (relayhosts) may write to everybody without a login"
    for text in [text for text in httpd.trusted_proxies.texts if text.endswith("/0")]:
        yield f"httpd.trusted_proxies: {text} lets every client say that it has any address"
    for name, route, _ in named_routes(settings):
        if route.auth and not route.tls_verify:
            yield f"{name}.tls_verify: whoever is in between can read the secret of authinfo.{route.auth}"


def other_warnings(settings: Settings) -> Any:
    """Yield warnings of values that are valid, but hardly meant, and of files that another user could change."""
    for name, route, _ in named_routes(settings):
        if re.search(r"(?:\A|\.)example(?:\.(?:com|net|org))?\Z", route.host):
            yield f"{name}.host: {route.host} is an example"
        is_safe = route.starttls or route.port == SMTPS or re.fullmatch(LOCAL_HOST, route.host)
        if route.relay == "ESMTP" and not is_safe:
            yield f"{name}.starttls: mail goes to {route.host} without TLS"
        for key, value in zip(("username", "password"), route.credentials if route.auth else ()):
            if not value and key in route.row.login and not (route.oauth2 and key == "password"):
                yield f"authinfo.{route.auth}.{key}: is empty"
    for user in sorted(name for name, login in settings.password.logins.items() if login.hash.startswith("{SSHA}")):
        yield f"password.{user}: {{SSHA}} is quick to guess; `haineko.py pw` prints a better line"
    to, is_local = settings.recipients, resolve_route("", "", settings)[0].row.probe is probe_local
    if not (to.open_relay or to.recipients or is_local) and to.domainpart == {settings.hostname.lower()}:
        yield f"recipients: only addresses at {settings.hostname} may be written to"
    files = [path for path, _ in settings.files]
    if settings.queue:
        files.append(settings.queue.path)
        with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as stream:
            disk = os.stat(os.path.dirname(settings.queue.path)).st_dev
            mount = (
                rf"(?m)^\d+ \d+ {os.major(disk)}:{os.minor(disk)} .* - (tmpfs|ramfs|nfs\d?|cifs|smb3|fuse\.sshfs|9p) "
            )
            if found := re.search(mount, stream.read()):
                yield f"queue.path: {found[1]} is no file system of a disk of this machine"
    for path in [*files, *map(os.path.dirname, files)]:
        with contextlib.suppress(OSError):
            about = os.stat(path)
            if about.st_mode & 0o022 and not about.st_mode & stat.S_ISVTX:
                yield f"{path} can be changed by other users; chmod go-w {path}"
            if os.geteuid() and about.st_uid not in (0, os.geteuid()):
                yield f"{path} belongs to another user"


def command_route(options: Any) -> int:
    """Say which relay a recipient would take and why."""
    return print_route(options.address, options.sender or "", usable_settings(options.config))


def print_route(address: str, sender_address: str, settings: Settings) -> int:
    """Print the route of a recipient; return 1 if the recipient is refused."""
    to, sender = parse_address(address), parse_address(sender_address)
    if not to or (sender_address and not sender):
        raise CommandError(f'"{sender_address if to else address}" is no mail address', 2)
    route, why = resolve_route(to.domain, sender.domain if sender else "", settings)
    print(f"{address}: {describe_route(route)} ({why})")
    if refusal := check_recipient(to, settings):
        print(f"{address}: would be refused: {refusal.code} {refusal.dsn} {refusal.message[0]}")
    return int(bool(refusal))


def command_dkim(options: Any) -> int:
    """Print the TXT record of a domain's key as a line of a zone file, in strings of at most 255 octets."""
    keys = usable_settings(options.config).dkim
    if not (key := keys.get(domain_key(options.domain))):
        raise CommandError(f'"{options.domain}" is not in dkim{did_you_mean(options.domain, keys)}', 1)
    strings = '" "'.join(re.findall(".{1,255}", dkim_record(key)))
    print(f'{key.selector}._domainkey.{key.domain}. IN TXT "{strings}"')
    return 0


def command_send(options: Any) -> int:
    """Post a mail to a running Haineko."""
    header = {key: getattr(options, key) for key in ("from", "reply_to", "subject", "charset")}
    flags = (options.to, options.sender, *header.values(), options.body, options.html, options.attach)
    if any(flags) and (options.file or not options.to):
        raise CommandError("flags that say what to send want --to, and no FILE, which says all of it", 2)
    from_stdin = options.body is None and not options.html
    attached = [(path, base64.b64encode(read_bytes(path)).decode()) for path in options.attach]
    mail = options.to and {
        "mail": options.sender or envelope_sender(None, local_hostname()),
        "rcpt": options.to,
        "header": header,
        "body": read_bytes("-").decode("utf-8", "replace") if from_stdin else options.body,
        "html": read_bytes(options.html).decode("utf-8", "replace") if options.html else None,
        "attachments": [{"filename": os.path.basename(path), "content": octets} for path, octets in attached],
    }
    body = encode_json(mail) if mail else read_bytes(options.file or "-")
    credentials: tuple = ()
    if options.user:
        remote = re.match(rf"(?i)http://(?!{LOCAL_HOST}(?:[:/]|\Z))", options.url)
        if remote and not options.insecure:
            raise CommandError(f"{options.url}: the password would go over the network in clear text (--insecure)", 2)
        credentials = options.user, os.environ.get("HAINEKO_PASSWORD") or ask_password(f"Password of {options.user}: ")
    answer = post_submission(options.url, body, credentials)[1]
    text = json.dumps(answer, ensure_ascii=False, indent=2)  # without what a terminal would obey or can't show
    print(re.sub(r"[^\n -~]", lambda c: c[0] if c[0].isprintable() else json.dumps(c[0])[1:-1], text))
    return int(not answer["response"] or any(item["error"] for item in answer["response"]))


def post_submission(url: str, body: bytes, credentials: tuple = ()) -> tuple:
    """Post a submission to a Haineko at an http, https or unix URL; return (HTTP status, document)."""
    base = "http://localhost" if url.startswith("unix:/") else re.sub(r"(/submit)?/?\Z", "", url, count=1)
    if not parse_base_url(base, "", []):
        raise CommandError(f'"{url}" is no URL of a Haineko', 2)
    connection = KeepAliveConnection(HTTPTarget(base, 300, max_response=MAX_BODY))
    try:
        with contextlib.closing(connection):
            if url.startswith("unix:"):
                connection.sock = socket.socket(socket.AF_UNIX)
                connection.sock.connect(url[5:])
            response = run(connection.fetch(HTTPRequest("POST", "/submit", body, basic_auth_header(credentials))))
    except (Rejected, OSError) as error:
        reason = ": ".join(error.reply.message) if isinstance(error, Rejected) else error_text(error)
        raise CommandError(f"{url}: {reason}", 1) from None
    document, keys = response.document(), {"rcpt", "error", "code", "dsn", "command", "message", "mailer"}
    with contextlib.suppress(KeyError, TypeError, AttributeError):  # of JSON in another form
        if all(keys <= item.keys() and isinstance(item["message"], list) for item in document["response"]):
            return response.status, document
    raise CommandError(f"{url}: not a Haineko's answer: {sanitize(response.body.decode('utf-8', 'replace'))}", 1)


def read_bytes(path: str) -> bytes:
    """Read a file; "-" is stdin."""
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as stream:
            return stream.read()
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}", 2) from None


def ask_password(prompt: str) -> str:
    """Ask for a password on the terminal: everybody can read a command line."""
    try:
        with open("/dev/tty"):  # without a terminal, getpass() would read the mail on stdin
            return getpass.getpass(prompt)
    except OSError:
        raise CommandError("there is no terminal to ask for the password", 1) from None
    except (EOFError, UnicodeError):
        raise CommandError("no password", 1) from None


def command_queue(options: Any) -> int:
    """List the mail that waits; show one, try it now, or drop it."""
    if not (settings := usable_settings(options.config).queue):
        raise CommandError('the settings have no "queue"', 2)
    action, queueid = options.action, options.id
    wanted = action in ("show", "drop") or (action == "retry" and not options.all)
    if wanted != bool(queueid):
        raise CommandError(f"queue {action}: a queue id is {'wanted' if wanted else 'not wanted'}", 2)
    if not os.path.exists(settings.path):
        raise CommandError(f"{settings.path}: does not exist; nothing was ever queued", 1)
    store = QueueDB(settings)  # the file itself is used, with the server running or not
    if action == "list":
        return queue_list(store, options.json)
    if action == "show":
        return queue_show(store, queueid, options.json)
    if action == "drop":
        count, done = run_operation(store, drop_message, queueid, time.time()), "dropped"
    else:
        count, done = run_operation(store, flush_queue, queueid), "to be tried at once"
    print(f"{count} recipient{'' if count == 1 else 's'} {done}")
    return int(not count and wanted)


def run_operation(store: QueueDB, operation: Callable, *values: Any) -> Any:
    """Return the result of an operation on the queue's file."""
    (result,) = store.commit([(operation, values)])
    if isinstance(result, Rejected):
        raise CommandError(store.fault or result.reply.message[0], 1)
    if isinstance(result, Exception):  # a bug
        raise result
    return result


def queue_list(store: QueueDB, as_json: bool = False) -> int:
    """Print every recipient in the queue as a line of a table, or of a JSON array."""
    count = last = 0
    heading = f"{'QUEUE ID':16}  {'SIZE':>9}  {'ARRIVED':24}  {'NEXT ATTEMPT':29}  SENDER -> RECIPIENT  LAST REPLY"
    print("[" if as_json else heading)
    while rows := run_operation(store, open_recipients_after, last, 500):  # in parts: the server works on meanwhile
        for row in rows:
            due, created_at, attempts = row["due"], row["created_at"], parse_history(row["history"])
            _, reply = attempts[-1] if attempts else (0, None)
            if as_json:
                values = {key: row[key] for key in ("queueid", "size", "state", "sender", "recipient")}
                values.update(arrived=time_to_dict(created_at), next=time_to_dict(due), attempts=len(attempts))
                values["response"] = reply and reply_to_dict(row["recipient"], reply)
                print(("," if count else "") + json.dumps(values, ensure_ascii=False))
            else:
                when = row["state"] if due is None else timestamp(max(due, created_at))
                head = f"{row['queueid']}  {row['size']:>9}  {timestamp(created_at)}  next {when:24}"
                words = sanitize(" ".join((reply.code, *reply.message)), 500) if reply else ""
                print(f"{head}  <{row['sender']}> -> <{row['recipient']}>  {words}")
            count += 1
        last = rows[-1]["id"]
    print("]" if as_json else f"{count} recipient{'' if count == 1 else 's'}")
    return 0


def queue_show(store: QueueDB, queueid: str, as_json: bool) -> int:
    if not (found := run_operation(store, message_status, queueid)):
        raise CommandError(f"{sanitize(queueid)}: not in the queue", 1)
    if as_json:
        print(json.dumps(message_document(found), ensure_ascii=False, indent=2))
        return 0
    print(f"{queueid}  {found['size']} octets  arrived {timestamp(found['created_at'])}\nfrom <{found['sender']}>")
    for row in found["recipients"]:
        when = "" if row["due"] is None else f", next attempt {timestamp(max(row['due'], found['created_at']))}"
        print(f"to <{sanitize(row['as_written'])}>: {row['state']}{when}")
        for moment, reply in parse_history(row["history"]):
            words = sanitize(" ".join((reply.code, *reply.message)), 500)
            print(f"   {timestamp(moment)}  {reply.relay}: {words}")
    return 0


def command_pw(options: Any) -> int:
    """Ask for a password and print its line for the section password."""
    if sys.stdin.isatty():
        password = ask_password("Password: ")
        if password != ask_password("Again: "):
            raise CommandError("the two passwords differ", 1)
    else:
        password = sys.stdin.buffer.readline().decode("utf-8", "replace").rstrip("\r\n")
    if not password:
        raise CommandError("no password", 1)
    salt = os.urandom(16)
    salt_and_digest = "$".join(base64.b64encode(octets).decode() for octets in (salt, scrypt(password, salt)))
    line = f"$scrypt$ln=14,r=8,p={NEW_COST}${salt_and_digest}"
    print(f"{json.dumps(options.user or user_name(), ensure_ascii=False)}: {json.dumps(line)}")
    return 0


def command_key(options: Any) -> int:
    """Make an API key: print it, and its line for the section `password`."""
    digits, errors = os.urandom(43).translate(RANDOM_DIGITS), []
    key = f"{options.prefix}{digits.decode()}{_base62(binascii.crc32(digits))}"  # so that scanners can recognize it
    fences = {name: getattr(options, name) for name in ("senders", "recipients", "rate", "expires")}
    login = {"hash": KEY_HASH + hashlib.sha256(key.encode()).hexdigest()}  # enough for what is random
    login.update({name: value for name, value in fences.items() if value})
    mapping_of(parse_login)({options.name: login}, "password", errors)
    matching(re.compile("[A-Za-z0-9_-]{1,20}"), "letters, digits, - and _")(options.prefix, "--prefix", errors)
    if errors:
        raise CommandError("; ".join(errors), 2)
    print(key)
    print(f"{json.dumps(options.name, ensure_ascii=False)}: {json.dumps(login, ensure_ascii=False)}")
    return 0


def user_name() -> str:
    """Return the name of the user who runs this; in a container there may be a number only."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid{os.getuid()}"


def command_setup(options: Any) -> int:
    """Write haineko.json, units for systemd and with --sendmail a program, never over an existing file."""
    program, folder, settings, code = os.path.realpath(__file__), os.path.abspath(options.dest), example_settings(), 0
    values = {"python": sys.executable, "program": os.path.dirname(program), "folder": folder}
    values["hardening"] = "\n".join(line if "=" in line else f"{line}=yes" for line in HARDENING.split())
    if f"{folder}/".startswith("/etc/"):  # which the server must not write to
        settings["queue"]["path"] = "/var/lib/haineko/haineko.db"
        values["writable"] = "# the queue is there: /var/lib/haineko\nStateDirectory=haineko\nStateDirectoryMode=0700"
    else:
        values["writable"] = f"# the queue is beside the settings: chown haineko {folder}\nReadWritePaths={folder}"
    files = [("haineko.json", 0o600, json.dumps(settings, indent=2) + "\n")]
    files += [("haineko.service", 0o644, SYSTEMD_UNIT.format(**values)), ("haineko.socket", 0o644, SYSTEMD_SOCKET)]
    if options.sendmail:
        files.append((os.path.abspath(options.sendmail), 0o755, SENDMAIL_LAUNCHER.format(**values)))
        with contextlib.suppress(OSError):  # other users can't write the bytecode, but use it
            py_compile.compile(program)
    for name, mode, content in files:
        path = os.path.join(folder, name)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as stream:
                stream.write(content)
            print(path)
        except OSError as error:
            code = print_message(f"{path}: {error.strerror}", 1)
    return code


SYSTEMD_UNIT = """\
[Unit]
Description=Haineko, HTTP API into ESMTP
After=network-online.target
Wants=network-online.target

[Service]
Type=notify
WatchdogSec=60
# useradd --system haineko; chown root:haineko {folder}/haineko.json; chmod 640 {folder}/haineko.json
User=haineko
{writable}
WorkingDirectory={program}
ExecStart={python} -m haineko serve -c {folder}/haineko.json
ExecReload=/bin/kill -HUP $MAINPID
Restart=on-failure
# for a secret {{"credential": "relay"}} in the settings: LoadCredential=relay:{folder}/relay.secret
UMask=0077
# for ports below 1024 this, and no PrivateUsers: AmbientCapabilities=CAP_NET_BIND_SERVICE
CapabilityBoundingSet=
{hardening}
SystemCallFilter=~@privileged @resources
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6

[Install]
WantedBy=multi-user.target
"""
HARDENING = (  # lines of the unit, "=yes" where they have no value; see systemd.exec(5)
    "PrivateUsers PrivateTmp PrivateDevices ProtectClock ProtectHostname ProtectKernelLogs ProtectKernelModules"
    " ProtectKernelTunables ProtectControlGroups RestrictNamespaces RestrictRealtime RestrictSUIDSGID LockPersonality"
    " MemoryDenyWriteExecute NoNewPrivileges RemoveIPC ProtectSystem=strict ProtectHome=read-only"
    " ProtectProc=invisible SystemCallArchitectures=native SystemCallFilter=@system-service SystemCallErrorNumber=EPERM"
)
SYSTEMD_SOCKET = """\
# optional: systemd listens, in place of httpd.listen, and no connection is refused during a restart
[Socket]
ListenStream=127.0.0.1:2794

[Install]
WantedBy=sockets.target
"""
SENDMAIL_LAUNCHER = """\
#!{python} -IS
import os, sys; sys.path.insert(0, {program!r}); os.environ.setdefault("HAINEKO_CONF", {folder!r} + "/haineko.json")
import haineko; sys.exit(haineko.main(["sendmail", *sys.argv[1:]]))
"""


def command_sendmail(argv: list) -> int:
    """Relay the message on stdin, like /usr/sbin/sendmail, with its flags (-t, -i, -f SENDER, -C FILE, ...)."""
    try:
        argv = [f"{word} " if word == "-q" else word for word in argv]  # getopt knows no optional value
        pairs, addresses = getopt.gnu_getopt(argv, "A:B:C:F:GIL:N:O:R:UV:X:ab:ce:f:h:imno:p:q:r:tvx")
        flags = {**dict(pairs), "-o": [value for flag, value in pairs if flag == "-o"]}
        sends = "-q" not in flags or "-t" in flags or addresses
        mode = "i" if "-I" in flags else flags.get("-b", "m" if sends else "flush")
        if mode == "m":
            return sendmail_deliver(flags, addresses)
        if mode in ("p", "flush"):
            queue = usable_settings(flags.get("-C")).queue
            if queue and os.path.exists(queue.path) and mode == "p":
                return queue_list(QueueDB(queue))
            if mode == "p":
                print("Mail queue is empty")
            elif queue and os.path.exists(queue.path):  # -q: all is due, or with -qIQUEUEID one mail
                which = flags.get("-q", "").strip()
                run_operation(QueueDB(queue), flush_queue, which[1:] if which[:1] == "I" else None)
            return os.EX_OK
        if mode == "v":
            settings, _ = sendmail_settings(flags)
            refused = [print_route(to, "", settings) for to in named_recipients(addresses, [], settings)]
            return os.EX_NOPERM if any(refused) else os.EX_OK
        if mode in ("i", "h", "H"):  # there is no database of aliases, and none of hosts
            return os.EX_OK
        raise CommandError(f"usage: -b{mode} is not served here; `haineko.py serve` runs the server", os.EX_USAGE)
    except getopt.GetoptError as error:
        return print_message(f"usage: {error}", os.EX_USAGE)
    except CommandError as error:
        text, code = error.args
        return print_message(text, {1: os.EX_TEMPFAIL, 2: os.EX_CONFIG}.get(code, code))


def sendmail_deliver(flags: dict, addresses: list) -> int:
    """Relay the message on stdin: by its own settings, or if it can't read them, by the server that runs."""
    settings, urls = sendmail_settings(flags)
    octets, hostname = read_bytes("-"), settings.hostname
    if "-i" not in flags and "i" not in flags["-o"]:
        octets = re.split(rb"(?m)^\.\r?$", octets, maxsplit=1)[0]
    sender = envelope_sender(flags.get("-f", flags.get("-r")), hostname)
    try:
        message = parse_message(octets)
    except ValueError as error:
        raise CommandError(str(error), os.EX_DATAERR) from None
    fields = []
    for name, octets in message.fields:
        listed = re.fullmatch(r"(?:resent-)?(?:from|sender|to|cc|bcc|reply-to)|errors-to|return-receipt-to", name)
        fields.append((name, qualified(octets.decode("latin-1"), hostname).encode("latin-1") if listed else octets))
    if not (rcpt := named_recipients(addresses, fields if "-t" in flags else [], settings)):
        raise CommandError("usage: no recipient", os.EX_USAGE)
    if "from" not in dict(fields):
        author = parse_address(sender or f"MAILER-DAEMON@{hostname}")
        name = " ".join(flags.get("-F", "").split())
        fields.append(("from", address_field("From", ((name, author),), "UTF-8").encode() + b"\n"))
    raw = b"".join([field for _, field in fields]) + b"\n" + message.body
    document = {"mail": sender, "rcpt": rcpt, "raw": {"base64": base64.b64encode(raw).decode()}}
    if urls:
        document["mail"] = sender or envelope_sender(None, hostname)  # the API takes no null sender
        return report_failures(*post_in_parts(urls, document))
    return report_failures(*run(submit_here(encode_json(document), settings, flags)))


def sendmail_settings(flags: dict) -> tuple:
    """Return (Settings, URLs where a server may listen: none if the settings and the queue can be used directly)."""
    path, url = settings_path(flags.get("-C")), os.environ.get("HAINEKO_URL")
    if not path and not url:  # without, `serve` prints mail, and so loses it
        raise CommandError("no settings file: name one with -C or in $HAINEKO_CONF", os.EX_CONFIG)
    settings, errors = load_settings(path)
    store = settings.queue.path if settings.queue else ""
    unwritable = store and not os.access(store if os.path.exists(store) else os.path.dirname(store), os.W_OK)
    if path and not unwritable and not any(os.strerror(errno.EACCES) in error for error in errors):
        if errors:
            raise CommandError("\n".join(errors), os.EX_CONFIG)
        return settings, ()
    if url:
        return settings, (url,)
    urls = running_daemon(os.path.join(os.path.dirname(path), "haineko.pid"))[2].split()
    scheme = "https" if settings.httpd.tls else "http"
    urls += [text if text.startswith("unix:") else f"{scheme}://{text}/" for text in settings.httpd.listen]
    return settings, urls


def post_in_parts(urls: list, document: dict) -> tuple:
    """Post a mail to the first server that answers, in parts if need be; return (status, items of the answers)."""
    for url in urls:
        try:
            status, answer = post_submission(url, encode_json(document))
        except CommandError as error:
            print_message(error.args[0], 0)
            continue
        rcpt, items = document["rcpt"], answer["response"]
        if items[0]["mailer"] or items[0]["dsn"] != "4.5.3" or len(rcpt) == 1:
            return status, items
        half = len(rcpt) // 2  # too many recipients for the server
        parts = [post_in_parts([url], {**document, "rcpt": part}) for part in (rcpt[:half], rcpt[half:])]
        return max(status for status, _ in parts), [item for _, items in parts for item in items]
    raise CommandError("the settings or the queue can't be read, and no server was reached", os.EX_TEMPFAIL)


async def submit_here(body: bytes, settings: Settings, flags: dict) -> tuple:
    """Submit a mail as POST /submit does; -R, -V and -N are for the next server (RFC 3461). Return (status, items)."""
    ret, notify = flags.get("-R", "full").upper(), flags.get("-N", "failure,delay").upper().replace(" ", "")
    if ret not in ("HDRS", "FULL"):
        raise CommandError(f"usage: -R {flags['-R']}: expected hdrs or full", os.EX_USAGE)
    if notify != "NEVER" and not set(notify.split(",")) <= {"SUCCESS", "FAILURE", "DELAY"}:
        raise CommandError(f"usage: -N {flags['-N']}: expected never, or some of success, failure, delay", os.EX_USAGE)
    envid = re.sub(r"[^!-*,-<>-~]", lambda c: "".join(f"+{b:02X}" for b in c[0].encode()), flags.get("-V", "")[:30])
    dsn = f" RET={ret}{' ENVID=' if envid else ''}{envid}", f" NOTIFY={notify}"
    owner = os.stat(settings.path)
    if not os.geteuid() and owner.st_uid:  # the server could not use a queue that belongs to root
        os.setgroups([])
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)
    smtpd, client = replace(settings.smtpd, max_rcpts_per_message=0), parse_ip("127.0.0.1")
    app = App(replace(settings, httpd=Httpd(), smtpd=smtpd, password=Authenticator({})))
    log.quiet = log.facility is None  # stderr is read by the calling program, which may mail it
    request = Request("POST", "/submit", {}, body, client, None, None, time.time(), login=f"uid{os.getuid()}", dsn=dsn)
    try:
        response = await submit(request, app)
        return response.status, json.loads(response.body)["response"]
    finally:
        await app.transport.sweep(everything=True)


def report_failures(status: int, items: list) -> int:
    """Print the recipients that failed; return the exit code (sysexits.h)."""
    codes, by_status = set(), {400: os.EX_DATAERR, 401: os.EX_NOPERM, 403: os.EX_NOPERM, 413: os.EX_DATAERR}
    for item in [item for item in items if item["error"]]:
        to = f"<{item['rcpt']}>: " if item["rcpt"] is not None else ""
        print_message(sanitize(f"{to}{item['code']} {item['command']}: {' '.join(item['message'])}", 1000), 0)
        if item["dsn"] == "5.4.6":  # a loop
            codes.add(os.EX_UNAVAILABLE)
        elif item["mailer"]:
            codes.add(os.EX_TEMPFAIL if item["code"][0] == "4" else os.EX_UNAVAILABLE)
        elif item["rcpt"] is not None:
            codes.add(os.EX_DATAERR if item["dsn"] == "5.1.5" else os.EX_NOPERM)  # 5.1.5: not an address
        else:  # a refusal of the whole mail
            codes.add(by_status.get(status, os.EX_TEMPFAIL))
    if os.EX_TEMPFAIL in codes and not all(item["error"] for item in items):
        return os.EX_UNAVAILABLE  # "try again" would send it twice to the others
    return min(codes, key=(os.EX_TEMPFAIL, os.EX_UNAVAILABLE, os.EX_NOPERM, os.EX_DATAERR).index, default=os.EX_OK)


def envelope_sender(given: str | None, hostname: str) -> str:
    """Return the envelope sender in -f, "" for the null sender, or without -f the user's address."""
    if given is not None:
        found = split_addresses(given, hostname)
        if given.strip() in ("", "<>"):
            return ""
        if len(found) != 1 or not parse_address(found[0]):
            raise CommandError(f'usage: "{given}" is no mail address', os.EX_USAGE)
        return found[0]
    if parse_address(name := user_name()):
        return name
    name = re.sub(r"[^A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]+", "_", name.rpartition("\\")[2])  # whatever $LOGNAME is
    name = re.sub(r"\.+", ".", name)[:64].strip("._") or f"uid{os.getuid()}"
    return f"{name}@{hostname}"


def named_recipients(addresses: list, fields: list, settings: Settings) -> list:
    """Return the recipients in arguments and in header fields (the last Resent- ones, if any), aliases expanded."""
    named = [address for text in addresses for address in split_addresses(text, settings.hostname)]
    here, resent_fields, found = f"@{settings.hostname.lower()}", {}, []
    for name, octets in fields:
        if name in resent_fields:  # of an earlier sending
            break
        if name.startswith("resent-"):
            resent_fields[name] = octets
    resent = header_recipients([(name.removeprefix("resent-"), octets) for name, octets in resent_fields.items()])
    for address in [*named, *(resent or header_recipients(fields))]:
        name = address[: -len(here)] if address.lower().endswith(here) else ""
        found += settings.smtpd.aliases.get(name.lower(), (address,))
    return found


def split_addresses(text: str, hostname: str) -> list:
    """Return the addresses in a list of them, separated by commas or blanks; text that is no list is returned whole."""
    if re.search(r'[<"(:]', text):
        return header_recipients([("to", b"To: " + qualified(text, hostname).encode("utf-8", "replace"))])
    return [qualified(word, hostname) for word in re.split(r"[\s,;]+", text) if word]


def qualified(text: str, hostname: str) -> str:
    """Return an address list, or a field with one, with "@hostname" appended to names that have no domain."""
    tokens = [(found.lastgroup, found[0]) for found in ADDRESS_TOKEN.finditer(text) if found[0]]
    if "fault" in dict(tokens):  # no list
        return text
    texts = [token for _, token in tokens]
    places = [i for i, (kind, _) in enumerate(tokens) if kind not in CFWS]
    words = [",", *[texts[i] for i in places], ","]
    for i, before, word, after in zip(places, words, words[1:], words[2:]):
        name, alone = word.strip("<> "), before in (",", ";", ":") and after in (",", ";")
        if re.fullmatch("[A-Za-z0-9._+-]+", name) and (alone or tokens[i][0] == "angle"):
            texts[i] = word.replace(name, f"{name}@{hostname}")
    return "".join(texts)


# Word in COMMANDS: (names, what else ArgumentParser.add_argument() takes). A word that is not here is the name itself.
ARGUMENTS = {
    "config": ("-c --config", {"metavar": "FILE", "help": "settings file"}),
    "listen": ("--listen", {"metavar": "ADDR", "help": "host:port, [v6]:port or unix:/path"}),
    "workers": ("--workers", {"metavar": "N", "type": int, "help": "processes; 0 means one per core"}),
    "devel": ("-d --devel", {"action": "store_true", "help": "print every SMTP dialogue, secrets masked"}),
    "connect": ("--connect", {"action": "store_true", "help": "try what each route would use; no mail is sent"}),
    "records-of": ("--sender", {"metavar": "A", "help": "read SPF, DKIM and DMARC records of its domain"}),
    "selector": ("--selector", {"metavar": "S", "help": "of the sender's DKIM key"}),
    "file": ("file", {"metavar": "FILE", "nargs": "?", "help": "JSON of a submission; - or nothing: stdin"}),
    "url": ("--url", {"default": "http://127.0.0.1:2794/", "help": "the server's root, or its /submit"}),
    "login": ("--user", {"help": "log in; the password is $HAINEKO_PASSWORD or asked for"}),
    "insecure": ("--insecure", {"action": "store_true", "help": "log in over http:// too"}),
    "mail": ("--mail --sender", {"dest": "sender", "metavar": "A", "help": "envelope sender"}),
    "to": ("--to", {"action": "append", "metavar": "A", "help": "recipient; again for more"}),
    "body": ("--body", {"metavar": "TEXT", "help": "absent, and no --html: stdin"}),
    "html": ("--html", {"metavar": "FILE", "help": "the mail in HTML, in UTF-8"}),
    "attach": ("--attach", {"action": "append", "default": [], "metavar": "FILE", "help": "a file; again for more"}),
    "action": ("action", {"nargs": "?", "choices": ("list", "show", "retry", "flush", "drop"), "default": "list"}),
    "id": ("id", {"metavar": "QUEUEID", "nargs": "?"}),
    "all": ("--all", {"action": "store_true", "help": "retry: all that waits, as flush does"}),
    "json": ("--json", {"action": "store_true", "help": "list, show: as JSON"}),
    "senders": ("--sender", {"dest": "senders", "action": "append", "metavar": "D", "help": "address or domain"}),
    "recipients": ("--recipient", {"dest": "recipients", "action": "append", "metavar": "D", "help": "the same"}),
    "rate": ("--rate", {"metavar": "R", "help": "recipients/seconds"}),
    "expires": ("--expires", {"metavar": "T", "help": "ISO 8601 date or time"}),
    "prefix": ("--prefix", {"metavar": "P", "default": "hk_"}),
    "user": ("-u --user", {"metavar": "USER"}),
    "dest": ("--dest", {"metavar": "DIR", "required": True}),
    "sendmail": ("--sendmail", {"metavar": "PATH", "help": "where a sendmail program is to be written"}),
}
COMMANDS = {  # name: (function that takes the options and returns the exit code; its docstring is the help, arguments)
    "serve": (command_serve, "config listen workers devel"),
    "start": (command_start, "config --pid-file listen workers"),
    "stop": (command_stop, "config --pid-file"),
    "restart": (command_restart, "config --pid-file listen workers"),
    "status": (command_status, "config --pid-file"),
    "reload": (command_reload, "config --pid-file"),
    "check": (command_check, "config connect records-of selector"),
    "route": (command_route, "config address --sender"),
    "dkim": (command_dkim, "config domain"),
    "send": (command_send, "file url login insecure mail to --from --reply-to --subject --charset body html attach"),
    "queue": (command_queue, "config action id all json"),
    "pw": (command_pw, "user"),
    "key": (command_key, "name senders recipients rate expires prefix"),
    "setup": (command_setup, "dest sendmail"),
    "sendmail": (command_sendmail, ""),
}

if __name__ == "__main__":
    link = ["sendmail"] if os.path.basename(sys.argv[0]) == "sendmail" else []
    sys.exit(main([*link, *sys.argv[1:]]))
