#!/usr/bin/env python3
"""Haineko, an HTTP API into ESMTP: take a mail as JSON, relay it, answer with a reply for every recipient.

    HTTP request -> parse_submission() -> Submission -> CHECKS -> compose() -> Message -> resolve_route() per recipient
      -> Transaction per route -> RELAYS -> Reply per recipient -> HTTP response
                                               |  deferred, or to be queued
                                               +-> QueueDB -> QueueManager -> RELAYS -> bounce, webhook

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

To add: a relay is a function and a row of RELAYS; a check a function, a row of REPLIES and one of CHECKS; a setting a
config_field() in section 3; an endpoint a function and a row of ENDPOINTS; a command a function and a row of COMMANDS.

RFCs: 5321 (SMTP), 5322 (messages), 2045-2047 (MIME), 1870 (SIZE), 2920 (PIPELINING), 3207 (STARTTLS), 3461 (DSN), 3463
(status codes), 3464 (bounces), 4954 (AUTH), 6152 (8BITMIME), 6531 (SMTPUTF8), 8314 (TLS on 465), 2183, 2231, 2387, 2392
(attachments), 1035 (DNS), 7505 (null MX), 8461 (MTA-STS), 9110, 9112 (HTTP/1.1), 7617 (Basic), 6376, 8463 (DKIM), 6749
(OAuth 2.0), 7519 (JWT), 7628 (OAUTHBEARER).
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
import hashlib
import hmac
import http.client
import http.server
import importlib
import io
import ipaddress
import itertools
import json
import math
import mmap
import os
import random
import re
import select
import signal
import smtplib
import socket
import ssl
import stat
import struct
import sys
import threading
import time
import urllib.parse
from collections import Counter, OrderedDict, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from email.utils import formatdate, parsedate_to_datetime
from html import unescape
from html.parser import HTMLParser
from typing import Any, Callable, NamedTuple

__version__ = "1.0.0"

# ======================================================================================================================
# 1. Replies and transactions
#    The values that pass from section to section, and every reply that Haineko gives in its own name.
# ======================================================================================================================

DEFAULT_DSN = (" RET=FULL", " NOTIFY=FAILURE,DELAY")  # parameters of MAIL and of RCPT (RFC 3461)
LARGE = 65536  # octets; work on more than this takes milliseconds
ANSWER_KEYS = ("code", "dsn", "command", "message", "mailer", "host", "port")
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
RANDOM_DIGITS = bytes(ord(BASE62[i % 62]) for i in range(256))


class Reply(NamedTuple):
    """Reply about one recipient: an SMTP reply, or one of Haineko's own, with the command that decided."""

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
    fallback: str | None = None  # relays of the route's list that failed before
    route_fault: bool = False  # log-in or settings of the route are at fault, not the mail, which is tried again
    slug: str = ""  # name in REPLIES of a refusal before delivery
    dialogue: tuple | None = None  # lines of the SMTP dialogue, if the client asked for it

    @property
    def accepted(self) -> bool:
        return self.code[0] == "2"

    @property
    def temporary(self) -> bool:
        """Return whether to try again: 4yz, or 5yz that only the administrator can fix."""
        return self.code[0] == "4" or self.route_fault

    @property
    def relay(self) -> str | None:
        return f"{self.mailer}:{self.host}:{self.port}" if self.host else self.mailer

    @property
    def log_status(self) -> str:
        if self.origin == "policy":
            return "rejected"
        return "sent" if self.accepted else "deferred" if self.temporary else "bounced"


class Rejected(Exception):  # noqa: N818 -- the word that postmasters use
    """Exception that carries a Reply, its one argument, up the call stack."""

    reply = property(lambda self: self.args[0])


class Message(NamedTuple):
    """Finished message (RFC 5322, CRLF); the recipient and the copy's number are inserted between its parts."""

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

    def chunks(self) -> tuple:
        """Return the octets with a large last part by itself, so that concurrent copies share its memory."""
        *head, last = self.message.parts
        if len(last) < LARGE or not head:
            return (self.octets(),)
        return (self._replace(message=Message((*head, b""))).octets(), last)

    @property
    def needs_smtputf8(self) -> bool:
        """Return whether the envelope or the header has characters beyond ASCII (RFC 6531)."""
        return self.message.needs_smtputf8 or not (self.sender.isascii() and all(map(str.isascii, self.recipients)))


class TransactionResult(NamedTuple):
    transaction: Transaction
    replies: list  # of Reply, one for each recipient
    ms: float


def make_reply(slug: str, *lines: str, word: str = "", **endpoint) -> Reply:
    """Return the reply REPLIES[slug], `word` for its "%s", followed by `lines`; `endpoint`: mailer, host, port."""
    status, code, dsn, command, text = REPLIES[slug]
    origin = "queue" if command == "QUEUE" else "policy" if status and not endpoint.get("mailer") else "relay"
    values = {"command": command, "status": status, "origin": origin, **endpoint}
    values["slug"] = slug if origin == "policy" else ""
    return Reply(code, dsn, message=(text % word if "%s" in text else text, *lines), **values)


def reply_to_dict(recipient: str | None, reply: Reply) -> dict:
    """Return one recipient's item of the answer; `maybe_delivered` and `dialogue` are present only if there is one."""
    item = {"rcpt": recipient, "error": 0 if reply.accepted else 1}
    item.update([(key, getattr(reply, key)) for key in ANSWER_KEYS])
    item.update({} if reply.dialogue is None else {"dialogue": reply.dialogue})
    return {**item, "maybe_delivered": True} if reply.maybe_delivered else item


def cache_short(maxsize: int, limit: int = 512) -> Callable:
    """Decorate a function with an LRU cache for short first arguments: clients' long ones would fill the memory."""

    def decorate(function: Callable) -> Callable:
        cached = functools.lru_cache(maxsize)(function)

        def call(first: Any, *others: Any) -> Any:
            return (cached if len(first) <= limit else function)(first, *others)

        return functools.wraps(function)(call)

    return decorate


def new_queueid(now: float) -> str:
    """Return 16 letters and digits, unique across processes and restarts; they sort by time."""
    return _base62(int(now)) + os.urandom(10).translate(RANDOM_DIGITS).decode()


@functools.lru_cache(maxsize=2)
def _base62(second: int) -> str:
    return "".join(BASE62[second // 62**place % 62] for place in range(5, -1, -1))


# name: (HTTP status of a refusal, code, dsn, command, text)
REPLIES = {
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
    "webhook": (0, "250", None, "HTTP", "%s"),
    "webhook-later": (0, "451", None, "HTTP", "%s"),
    "webhook-never": (0, "550", None, "HTTP", "%s"),
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
#    Takes JSON, gives frozen dataclasses and a list of all errors with JSON paths. A parser(value, json_path, errors)
#    appends what is wrong to `errors`, and may then return None, which keeps the default.
# ======================================================================================================================

MAX_HINTS = 50  # a hint takes some 50 us, and a hostile body has a million keys
MAX_ERRORS = 1000  # or a hostile body could yield 100 times its own size in messages
JSON_TYPES = {bool: "true or false", str: "a string", (int, float): "a number", list: "a list", dict: "an object"}


class DuplicateKeyDict(dict):
    """JSON object with repeated keys."""

    duplicate_keys: tuple = ()


def parse_json(octets: bytes) -> Any:
    """Return the JSON value (RFC 8259) in UTF-8 octets; ValueError says what is wrong and where."""
    try:
        return DECODER.decode((octets[3:] if octets.startswith(codecs.BOM_UTF8) else octets).decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at octet {error.start}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object_from_pairs(pairs: list) -> dict:
    if len(result := dict(pairs)) < len(pairs):
        result = DuplicateKeyDict(result)
        result.duplicate_keys = tuple(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    return result


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_object_from_pairs, parse_constant=_reject_constant)
ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False)


def encode_json(document: Any) -> bytes:
    return ENCODER.encode(document).encode("utf-8", "replace") + b"\n"


def config_field(default: Any, parse: Callable, doc: str = "", key: str = "", secret: str = "") -> Any:
    """Return a dataclass field for from_dict(): default, parser, meaning, keys in JSON ("a|b" are aliases), and how a
    secret is read: "line", "text" of several lines, or "later", each time that it is used."""
    metadata = {"parse": parse, "doc": doc, "keys": tuple(key.split("|")) if key else (), "secret": secret}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def from_dict(cls: type, raw: Any, json_path: str, errors: list, hint: Callable | None = None) -> Any:
    """Return a `cls` made from a JSON object; hint(key, known keys) says what an unknown key may mean."""
    if not isinstance(raw, dict):
        errors.append(f"{json_path or 'top level'}: expected an object, got {json_type_name(raw)}")
        return cls()
    known, values, prefix = key_table(cls), {}, json_path and json_path + "."
    if type(raw) is DuplicateKeyDict:
        errors.extend(f"{prefix}{sanitize(key)}: duplicate key" for key in raw.duplicate_keys[:MAX_ERRORS])
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
    return {key: (i.name, i.metadata["parse"]) for i in known for key in i.metadata["keys"] or (i.name,)}


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
    hidden: set = set()
    for secret in secrets:
        size = min(len(secret), 16)
        parts = {secret[i : i + size] for i in range(len(secret) - size + 1)}
        starts = [i for i in range(len(text) - size + 1) if text[i : i + size] in parts]
        hidden.update(i for start in starts for i in range(start, start + size))
    marked = "".join("\0" if i in hidden else c for i, c in enumerate(text))
    return re.sub("\0+", "********", marked) if hidden else text


def parse_text(value: Any, json_path: str, errors: list) -> str:
    """Parse a string without control characters; "" if it is none."""
    if type(value) is not str:
        errors.append(f"{json_path}: expected a string, got {json_type_name(value)}")
    elif not value.isprintable():
        errors.append(f"{json_path}: has an unprintable character")
    else:
        return value
    return ""


def matching(pattern: Any, expected: str, optional: bool = False, secret: bool = False, convert: Any = str) -> Callable:
    """Return a parser of strings that `pattern` accepts, a regex or a function; a `secret` is not shown in errors."""
    accepts = getattr(pattern, "fullmatch", pattern)

    def parse(value: Any, json_path: str, errors: list) -> Any:
        text = parse_text(value, json_path, errors)
        with contextlib.suppress(ValueError):
            if accepts(text) or (optional and not text):
                return convert(text)
        if text == value:  # else parse_text() has reported it
            errors.append(f"{json_path}: expected {expected}" + ("" if secret else f', got "{sanitize(text)}"'))
        return None

    return parse


def one_of(names: Any, kind: str) -> Callable:
    """Return a parser of names that compares without case and returns the name as it stands in `names`."""

    def parse(value: Any, json_path: str, errors: list) -> str | None:
        text, known = parse_text(value, json_path, errors), {name.lower(): name for name in names}
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


def nested(cls: type) -> Callable:
    return functools.partial(from_dict, cls)


# ======================================================================================================================
# 3. Settings
#    Takes the path of haineko.json, gives one frozen Settings, with all that can be computed once, and its errors.
#    Each field states its default, limits and meaning; the example file is made from them.
# ======================================================================================================================

IPAddress = Any  # ipaddress.IPv4Address or IPv6Address
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
DOMAIN = re.compile(rf"(?=.{{1,255}}\Z){_LABEL}(?:\.{_LABEL})*")
_LDH = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"  # letters, digits, hyphens
HOSTNAME = re.compile(rf"(?=.{{1,255}}\Z)(?:{_LDH}\.)*(?=[0-9-]*[A-Za-z]){_LDH}")  # RFC 5321 4.1.2, and no number
LOCALDOMAIN = ".localdomain"
IDNA_DEVIATIONS = "ßς\u200c\u200d"  # IDNA 2003 and 2008 map them to different domains, RFC 5894 7.2
DOMAIN_KEYS = '"example.jp", ".example.jp" or "default"'
LISTEN_ADDRESS = re.compile(r"(?:[^:]+|\[[^]]+\]):([0-9]{1,5})|unix:/.*")
NAME_SERVER = re.compile(r"\[([^]]+)\]:(\d{1,5})|([^:]+):(\d{1,5})|(\S+)")
BASE_URL = re.compile(r"https?://(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?(?:/[A-Za-z0-9/._~-]*)?")
WEBHOOK_URL = re.compile(
    r"(?P<base>https?://(?P<host>[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?)(?P<path>/[!-~]*)?"
)
ORIGIN = re.compile(r"https?://[A-Za-z0-9.\[\]:_-]+", re.IGNORECASE)
FACILITIES = (
    "kern user mail daemon auth syslog lpr news uucp cron - - - - - - local0 local1 local2 local3 local4 local5"
)
FACILITIES = {name: i for i, name in enumerate(f"{FACILITIES} local6 local7".split()) if name != "-"}  # RFC 3164 4.1.1
RATE = re.compile("[1-9][0-9]{0,8}/[1-9][0-9]{0,6}")
_BASE64 = r"((?:[A-Za-z0-9+/]{4})*[A-Za-z0-9+/]{2}(?:[A-Za-z0-9+/]{2}|[A-Za-z0-9+/]=|==))"
SCRYPT = re.compile(rf"\$scrypt\$ln=(1[0-9]),r=([1-9]|1[0-6]),p=([1-9])\${_BASE64}\${_BASE64}")  # 1 GiB at most
SSHA = re.compile(rf"{{SSHA}}(?=.{{27}}[^=]){_BASE64}")  # of 21 octets or more: SHA-1 of password and salt, salt
MAX_MEMORY = (1 << 31) - 1  # of scrypt: more than what SCRYPT admits takes
KEY_HASH = "$sha256$"
NEW_COST = 5  # OWASP's N=2**14, r=8, p=5: as hard as N=2**17, p=1 in an eighth of the memory, 16 MiB
SECRET_TIMEOUT = 10  # seconds
SECRET_FORMS = 'a string, {"file": path}, {"env": NAME}, {"command": [program, argument]} or {"credential": NAME}'
MICROSOFT, MAIL = "https://login.microsoftonline.com/{tenant}/oauth2/v2.0/token", "https://mail.google.com/"
OUTLOOK = "https://outlook.office365.com/.default", "https://outlook.office.com/SMTP.Send offline_access"
PROVIDERS = {  # of access tokens: (token_url, scope of an application's tokens, scope of a user's)
    "microsoft": (MICROSOFT, *OUTLOOK),
    "google": ("https://oauth2.googleapis.com/token", MAIL, MAIL),
}
LIBCRYPTO = {  # function: types of its result and arguments in ctypes
    "BIO_new_mem_buf": "void_p char_p int", "BIO_free": "int void_p", "ERR_clear_error": "",
    "PEM_read_bio_PrivateKey": "void_p void_p void_p void_p char_p", "EVP_PKEY_free": " void_p",
    "EVP_MD_CTX_new": "void_p", "EVP_MD_CTX_free": " void_p", "EVP_sha256": "void_p",
    "EVP_DigestSignInit": "int void_p void_p void_p void_p void_p",
    "EVP_DigestSign": "int void_p char_p void_p char_p size_t", "i2d_PUBKEY": "int void_p void_p",
    "EVP_DigestVerifyInit": "int void_p void_p void_p void_p void_p",
    "EVP_DigestVerify": "int void_p char_p size_t char_p size_t", "d2i_PUBKEY": "void_p void_p void_p long",
}  # fmt: skip


@cache_short(4096, 64)
def parse_ip(text: str) -> IPAddress:
    """Parse an IP address; an IPv4-mapped IPv6 address becomes IPv4. Raises ValueError."""
    found = ipaddress.ip_address(text.partition("%")[0])
    return getattr(found, "ipv4_mapped", None) or found


class Networks:
    """Set of IP networks; `address in networks` takes as long for 100,000 of them as for ten."""

    def __init__(self, texts: tuple = ()) -> None:
        self.texts, groups = texts, defaultdict(set)
        for network in map(functools.partial(ipaddress.ip_network, strict=False), texts):
            shift = network.max_prefixlen - network.prefixlen
            groups[network.version, shift].add(int(network.network_address) >> shift)
        self.groups = tuple((version, shift, members) for (version, shift), members in groups.items())

    def __contains__(self, address: IPAddress) -> bool:
        version, number = address.version, int(address)
        return any(version == of and number >> shift in members for of, shift, members in self.groups)


def is_ip(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(text))
    return False


def name_server_endpoint(text: str) -> tuple:
    """Return (IP address, port) of "address", "address:port" or "[v6]:port"; () if it is none of them."""
    found = NAME_SERVER.fullmatch(text)
    name, port = (found[1] or found[3] or found[5], int(found[2] or found[4] or 53)) if found else ("", 0)
    return (name, port) if is_ip(name) and 0 < port < 65536 else ()


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


def table_key(name: str) -> str:
    """Return a domain, or ".domain" for those below it, likewise."""
    key = domain_key(name[1:] if name.startswith(".") else name)
    return f".{key}" if key and name.startswith(".") else key


def recipient_key(text: str) -> str:
    """Return an address in lower case and ASCII as policy compares it, "" if it is none."""
    local, _, domain = text.rpartition("@")
    return f"{local.lower()}@{key}" if local and (key := domain_key(domain)) else ""


def fence_key(text: str) -> str:
    return recipient_key(text) if "@" in text else table_key(text)


def lookup_keys(domain: str) -> list:
    """Return the keys that match a domain, the best first: itself, then ".parent" from the longest to the shortest."""
    return [domain, *(domain[dot.start() :] for dot in re.finditer(r"\.", domain))]


class Rate(NamedTuple):
    """A limit such as "100/3600": so many in so many seconds."""

    limit: int
    seconds: int


def iso_time(text: str) -> float:
    """Return the seconds since the epoch of an ISO 8601 date or time, which is UTC unless it says otherwise."""
    moment = datetime.fromisoformat(re.sub("[Zz]$", "+00:00", text))
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def parse_mailer(value: Any, json_path: str, errors: list) -> str:
    is_folder = isinstance(value, str) and value.startswith("/")
    return (parse_text if is_folder else one_of(RELAYS, "relay type"))(value, json_path, errors)


LOOPBACK = Networks(("127.0.0.0/8", "::1"))
parse_network = matching(functools.partial(ipaddress.ip_network, strict=False), "an IP address or network")
parse_networks = list_of(parse_network, lambda texts: Networks(tuple(texts)))
parse_listen_address = matching(
    lambda text: (found := LISTEN_ADDRESS.fullmatch(text)) and int(found[1] or 0) < 65536,
    '"host:port", "[v6]:port" or "unix:/path"',
)
parse_listen = list_of(parse_listen_address, required=True)
parse_host = matching(  # or a folder, for the relay File
    lambda text: text.startswith("/") or DOMAIN.fullmatch(text) or is_ip(text), "a host name or an IP address"
)
parse_hostname = matching(DOMAIN, "a host name", optional=True)
parse_resolver = matching(name_server_endpoint, '"address", "address:port" or "[v6]:port"', optional=True)
parse_origin = matching(ORIGIN, 'a web origin like "https://www.example.org"', convert=str.lower)
parse_base_url = url_parser(BASE_URL, "https://api.example.org", convert=lambda url: url.rstrip("/"))
parse_webhook_url = url_parser(WEBHOOK_URL, "https://www.example.org/hook", secret=True)
parse_token_url = url_parser(WEBHOOK_URL, "https://login.example.org/token")
parse_region = matching(re.compile("[a-z0-9-]{1,32}"), 'a region like "eu-west-1"', optional=True)
parse_rate = matching(
    RATE,
    '"RECIPIENTS/SECONDS", such as "100/3600"',
    optional=True,
    convert=lambda text: Rate(*map(int, text.split("/"))) if text else None,
)
parse_file = matching(str, "the name of a file", optional=True, convert=lambda name: name and {"file": name})
parse_domain = matching(domain_key, "a domain", convert=domain_key)
PLAIN_ADDRESS = re.compile(rf"(?=.{{3,254}}\Z)[\w+-]+(?:\.[\w+-]+)*@{DOMAIN.pattern}", re.ASCII)
parse_plain_address = matching(PLAIN_ADDRESS, "an address")
parse_recipient = matching(recipient_key, "an address", convert=recipient_key)
parse_fence = list_of(matching(fence_key, 'an address, "example.org" or ".example.org"', convert=fence_key), frozenset)
parse_alias = list_of(matching(recipient_key, "an address"), required=True)
parse_aliases = mapping_of(parse_alias, lambda name: "" if "@" in name else name.lower(), "a name without @")
PASSWORD_HASH = re.compile(rf"{SCRYPT.pattern}|{SSHA.pattern}|\$sha256\$[0-9a-f]{{64}}")
parse_password_hash = matching(PASSWORD_HASH, "a hash as `haineko.py pw` prints it, or {SSHA}", secret=True)


class Relay(NamedTuple):
    """All that is known of a relay. To add one is to write its functions and a row of RELAYS."""

    send: Callable | None  # (Transaction, TransportContext): awaited for a Reply for each recipient
    probe: Callable | None  # (ConnectivityProbe, TransportContext): awaited for CheckResults; sends no mail
    default_port: int = 25
    api_url: str = ""  # template of the base URL of a relay by HTTP
    needs: tuple = ()  # settings that its routes must have
    refuses: tuple = ()  # settings that its routes can't have
    login: tuple = ("username", "password")  # what a login for its API must have
    scopes: tuple = ()  # for its API, if not the provider's: of an application's tokens, of a user's
    destination: str = "{route.relay} {route.host}:{route.port}"  # template: mail with the same text shares a next hop
    into_folder: bool = False  # delivers into a folder of this machine
    keeps_octets: bool = False  # what it sends arrives unchanged, so that it can be signed


UNKNOWN_RELAY = Relay(None, None)  # of a route made before RELAYS is filled
RELAYS: dict[str, Relay] = {}  # by name; filled at the end of section 15


def parse_secret(value: Any, json_path: str, errors: list) -> Any:
    """Parse a string, or an object with one key that names the source of the secret."""
    if not isinstance(value, dict):
        return value if type(value) is str else parse_text(value, json_path, errors)  # _secret() reads its characters
    kind = next(iter(value), "")
    if len(value) != 1 or kind not in ("file", "env", "command", "credential"):
        errors.append(f"{json_path}: expected {SECRET_FORMS}")
        return None
    parse, count = list_of(parse_text, required=True) if kind == "command" else parse_text, len(errors)
    where = parse(value[kind], f"{json_path}.{kind}", errors)
    return {kind: where} if len(errors) == count else None  # a faulty command is not run


def read_secret(source: Any, base: str, multiline: bool = False) -> str:
    """Return a secret from where it is; ValueError tells why that fails, without octets of it. A command blocks."""
    if isinstance(source, str):
        return source
    ((kind, where),) = source.items()
    name = where[0] if kind == "command" else where
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "") if kind == "credential" else base
    if kind == "credential" and ("/" in where or not folder):
        raise ValueError(f".credential: no credential {where}: LoadCredential= of systemd gives it to a unit")
    if kind == "env" and where not in os.environ:
        raise ValueError(f".env: no environment variable {where}")
    try:
        if kind == "command":
            octets = run_secret_command(where, base)
        elif kind == "env":
            octets = os.fsencode(os.environ[where])
        else:
            with open_regular(os.path.join(folder, where)) as stream:
                octets = stream.read()
                if os.fstat(stream.fileno()).st_mode & 0o006:
                    raise ValueError(f".{kind}: can be read by everybody; chmod 600 {where}")
        secret = octets.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise ValueError(f".{kind}: {name}: not UTF-8") from None
    except OSError as error:
        raise ValueError(f".{kind}: {name}: {error.strerror}") from None
    secret = secret.partition("\n")[0].rstrip("\r") if kind == "command" and not multiline else secret
    if not (multiline or secret.isprintable()):
        raise ValueError(": has a line end, or another unprintable character")
    return secret


def run_secret_command(command: tuple, base: str) -> bytes:
    """Return what a program prints, run without a shell in the folder of the settings."""
    from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired

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
    """The section `password`: who may log in. Successful logins are cached, because scrypt is slow by design."""

    CACHE_TTL = 600  # seconds

    def __init__(self, logins: dict) -> None:
        self.logins = logins
        self.keys = {login.hash: name for name, login in logins.items() if login.hash.startswith(KEY_HASH)}
        self.cost = max([NEW_COST, *[scrypt_cost(login.hash) for login in logins.values()]])  # of every verification
        self.verified: dict = {}  # HMAC of the credentials: monotonic time until which they are taken for right
        self.key = os.urandom(32)  # so that memory holds no plain digest of a password
        self.semaphore = threading.Semaphore(2)  # scrypt takes 16 MiB and a core each

    def cached_login(self, credentials: str) -> str:
        """Return the login of an API key, or of a password that was verified lately, "" for none."""
        user, colon, password = decode_basic(credentials)
        if self.keys and (name := self.keys.get(key_hash(password if colon else user))):  # a digest leaks no timing
            return name
        known = self.verified and self.verified.get(hmac.digest(self.key, credentials.encode(), "sha256"), 0)
        return user if known and known > time.monotonic() else ""

    def authenticate(self, credentials: str) -> str:
        """Return the login that an Authorization header proves, "" for none; a password takes a tenth of a second."""
        name, (user, colon, password) = self.cached_login(credentials), decode_basic(credentials)
        if name or not colon:
            return name
        line = self.logins[user].hash if user in self.logins else ""
        with self.semaphore:
            right = bool(line) and verify_password(line, password)
            if rest := self.cost - scrypt_cost(line):  # or the time would reveal which users exist
                scrypt(password, b"", parallel=rest)
        if right:
            now = time.monotonic()
            self.verified = {key: expires for key, expires in self.verified.items() if expires > now}
            self.verified[hmac.digest(self.key, credentials.encode(), "sha256")] = now + self.CACHE_TTL
        return user if right else ""


def decode_basic(credentials: str) -> tuple:
    """Return (user, ":", password) of an Authorization header (RFC 7617), empty strings if it is malformed."""
    scheme, _, token = credentials.partition(" ")
    text = ""
    with contextlib.suppress(ValueError):
        text = base64.b64decode(token.strip(), validate=True).decode() if scheme.lower() == "basic" else ""
    return text.partition(":")


def parse_login(value: Any, json_path: str, errors: list) -> Login | None:
    """Parse a hash, or an object that has one; without it there is no login."""
    if not isinstance(value, dict):
        value = {"hash": parse_password_hash(value, json_path, errors)}
    elif not value.get("hash"):
        errors.append(f"{json_path}.hash: expected a hash")
    login = from_dict(Login, value, json_path, errors)
    return login if login.hash else None


def verify_password(line: str, password: str) -> bool:
    """Return whether `line` (scrypt or {SSHA}) is the hash of the password. Those of keys are looked up instead."""
    if line.startswith(KEY_HASH):
        return False
    found = SCRYPT.fullmatch(line)
    if not found:
        octets = base64.b64decode(line[len("{SSHA}") :])
        return hmac.compare_digest(hashlib.sha1(password.encode() + octets[20:]).digest(), octets[:20])
    cost, block, parallel = (int(n) for n in found.groups()[:3])
    salt, digest = (base64.b64decode(item) for item in found.groups()[3:])
    return hmac.compare_digest(scrypt(password, salt, cost, block, parallel), digest)


def new_key(prefix: str) -> str:
    """Return a new API key: 43 random digits, and 6 by which scanners for leaked secrets recognize it."""
    digits = os.urandom(43).translate(RANDOM_DIGITS)
    return f"{prefix}{digits.decode()}{_base62(binascii.crc32(digits))}"


def key_hash(key: str) -> str:
    """Return the hash of an API key; the key is random, so that a plain digest is enough."""
    return KEY_HASH + hashlib.sha256(key.encode()).hexdigest()


def hash_password(password: str) -> str:
    salt = os.urandom(16)
    parts = (base64.b64encode(octets).decode() for octets in (salt, scrypt(password, salt)))
    return f"$scrypt$ln=14,r=8,p={NEW_COST}$" + "$".join(parts)


def scrypt(password: str, salt: bytes, cost: int = 14, block: int = 8, parallel: int = NEW_COST) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=1 << cost, r=block, p=parallel, maxmem=MAX_MEMORY)


def scrypt_cost(line: str) -> int:
    """Return the time to verify a line, in units of N=2**14, r=8, p=1; 0 for {SSHA}."""
    found = SCRYPT.fullmatch(line)
    cost, block, parallel = (int(n) for n in found.groups()[:3]) if found else (0, 0, 0)
    return (parallel * block << cost) >> 17


class PrivateKey:
    """Private key in PEM, RSA or Ed25519, held by OpenSSL's libcrypto, which Python has loaded already."""

    ED25519_INFO = bytes.fromhex("302a300506032b6570032100")  # stands before the 32 octets of the key, RFC 8410 4

    def __init__(self, pem: bytes) -> None:
        import ctypes

        crypto, buffer = libcrypto(), ctypes.create_string_buffer(16384)
        self._free, source = crypto.EVP_PKEY_free, crypto.BIO_new_mem_buf(pem, len(pem))
        self._key = crypto.PEM_read_bio_PrivateKey(source, None, None, b"")  # b"": OpenSSL asks for no passphrase
        crypto.BIO_free(source)
        crypto.ERR_clear_error()  # or this thread's next TLS call would find what was left
        if not self._key:
            raise ValueError("expected a PEM private key without a passphrase")
        fits = 0 < crypto.i2d_PUBKEY(self._key, None) <= len(buffer)
        size = crypto.i2d_PUBKEY(self._key, ctypes.byref(ctypes.cast(buffer, ctypes.c_void_p))) if fits else 0
        self.public = buffer.raw[:size]  # SubjectPublicKeyInfo (RFC 5280 4.1) in DER
        self.is_ed25519 = self.public.startswith(self.ED25519_INFO)
        if not self.is_ed25519 and rsa_bits(self.public) < 2048:
            raise ValueError("expected an Ed25519 key, or an RSA key of 2048 bits or more")

    def sign(self, data: bytes) -> bytes:
        """Return the signature: RSA PKCS #1 v1.5 with SHA-256, or Ed25519. Other threads run meanwhile."""
        import ctypes

        crypto, size = libcrypto(), ctypes.c_size_t(16384)
        signature, context = ctypes.create_string_buffer(size.value), crypto.EVP_MD_CTX_new()
        digest = None if self.is_ed25519 else crypto.EVP_sha256()  # Ed25519 has its own
        ok = crypto.EVP_DigestSignInit(context, None, digest, None, self._key) == 1
        ok = ok and crypto.EVP_DigestSign(context, signature, ctypes.byref(size), data, len(data)) == 1
        crypto.EVP_MD_CTX_free(context)
        if not ok:
            raise OSError(errno.EIO, "libcrypto can't sign with this key")
        return signature.raw[: size.value]

    @classmethod
    def verify(cls, public: bytes, data: bytes, signature: bytes) -> bool:
        """Return whether a signature is valid by a public key, a SubjectPublicKeyInfo in DER."""
        import ctypes

        crypto, context = libcrypto(), libcrypto().EVP_MD_CTX_new()
        key = crypto.d2i_PUBKEY(None, ctypes.byref(ctypes.c_char_p(public)), len(public))
        digest = None if public.startswith(cls.ED25519_INFO) else crypto.EVP_sha256()
        valid = bool(key) and crypto.EVP_DigestVerifyInit(context, None, digest, None, key) == 1
        valid = valid and crypto.EVP_DigestVerify(context, signature, len(signature), data, len(data)) == 1
        crypto.EVP_MD_CTX_free(context)
        crypto.EVP_PKEY_free(key)
        crypto.ERR_clear_error()
        return valid

    def __del__(self) -> None:
        if getattr(self, "_key", None):
            self._free(self._key)


def rsa_bits(public: bytes) -> int:
    """Return the length of an RSA modulus, the first long INTEGER in the key's DER (RFC 8017 A.1.1); 0 without one."""
    modulus = re.search(rb"\x02(?:\x82(..)|\x81(.))\x00", public, re.DOTALL)
    return (int.from_bytes(modulus[1] or modulus[2], "big") - 1) * 8 if modulus else 0


@functools.lru_cache(maxsize=1)
def libcrypto() -> Any:
    """Return OpenSSL's libcrypto by ctypes; raise OSError if this Python has none that can be used."""
    import ctypes

    for module in ("_hashlib", "_ssl", ""):  # linked with libcrypto; "": Python itself is
        try:
            library = ctypes.CDLL(importlib.import_module(module).__file__ if module else None)
            for name, prototype in LIBCRYPTO.items():
                result, *arguments = [kind and getattr(ctypes, f"c_{kind}") for kind in prototype.split(" ")]
                function = getattr(library, name)
                function.restype, function.argtypes = result or None, arguments
        except (ImportError, OSError, AttributeError):
            continue
        return library
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
    tls: Tls | None = config_field(None, nested(Tls), "certificate and key: serve HTTPS")


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
    redirect: tuple = config_field((), list_of(parse_plain_address), "staging: all mail goes there instead")
    subject_prefix: str = config_field("", parse_text, "staging: stands before every subject")
    log: str = config_field("text", one_of(("text", "json"), "form of the log"), "text, or json: one object a line")
    syslog: Syslog = config_field(Syslog(), nested(Syslog), "the log")

    @property
    def staging(self) -> str:
        """Tell people what staging does to all mail; "" if it is off."""
        notes = [f"all mail goes to {', '.join(self.redirect)} (smtpd.redirect)"] if self.redirect else []
        notes += [f'subjects begin with "{self.subject_prefix}"'] if self.subject_prefix else []
        return f"STAGING: {'; '.join(notes)}" if notes else ""


@dataclass(frozen=True)
class QueueSettings:
    path: str = config_field("", parse_text, "the file, relative to this one")
    lifetime: int = config_field(432000, integer(1, 31536000), "seconds until a mail is given up")
    retry_after: tuple = config_field(
        (60, 300, 900, 1800, 3600, 7200, 14400),
        list_of(integer(0, 604800), required=True),
        "seconds between attempts, give or take a fifth; the last one repeats",
    )
    min_free: int = config_field(100 << 20, integer(0, 1 << 50), "octets that must be free on its disk")
    webhook: str = config_field("", parse_webhook_url, "URL to which the result of each queued recipient is POSTed")
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
    refresh_token: Any = config_field(
        "", parse_secret, "of a user, else tokens are the application's own", secret="later"
    )
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
    oauth2: OAuth2 | None = config_field(None, nested(OAuth2), "access tokens instead of a password")


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
        """Say why a right password is of no use here and now, "" if it is."""
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

    mailer: str = config_field("ESMTP", parse_mailer, "the relay, or a folder for File")
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
        if not self.port:
            object.__setattr__(self, "port", self.row.default_port)

    def __hash__(self) -> int:
        return hash((self.mailer, self.host, self.port, self.address))  # cheap: routes are keys of the session pools

    @property
    def choices(self) -> tuple:
        return (self, *self.fallbacks)

    @property
    def limit_key(self) -> str:
        """Return the name of what `sessions` and `rate` limit: a server, or an account of it."""
        return " ".join([self.mailer, self.host, str(self.port), *self.credentials[:1]])

    @property
    def relay(self) -> str:
        return "File" if self.mailer.startswith("/") else self.mailer

    @property
    def row(self) -> Relay:
        return RELAYS.get(self.relay, UNKNOWN_RELAY)

    @property
    def endpoint(self) -> dict:
        return {"mailer": self.mailer, "host": self.host, "port": self.port}

    @property
    def url(self) -> str:
        """Return the base URL of a relay's HTTP API; "" for the other relays."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        values = {"scheme": "https" if self.https else "http", "host": name, "port": self.port, "region": self.region}
        return self.base_url or self.row.api_url.format(**values)

    @property
    def folder(self) -> str:
        import tempfile

        return next((p for p in (self.mailer, self.host) if p.startswith("/")), "") or tempfile.gettempdir()


def parse_route(value: Any, json_path: str, errors: list) -> Route:
    """Parse a route, or a list of them; the first one holds the others."""
    first, *others = list_of(nested(Route), required=True)(value, json_path, errors) or (Route(),)
    return replace(first, fallbacks=tuple(others)) if others else first


@dataclass(frozen=True, repr=False, eq=False)
class Settings:
    httpd: Httpd = config_field(Httpd(), nested(Httpd))
    smtpd: Smtpd = config_field(Smtpd(), nested(Smtpd))
    relayhosts: Relayhosts = config_field(Relayhosts(), nested(Relayhosts))
    recipients: Recipients | None = config_field(None, nested(Recipients))
    mailertable: dict = config_field({}, mapping_of(parse_route, table_key, DOMAIN_KEYS))
    sendermt: dict = config_field({}, mapping_of(parse_route, table_key, DOMAIN_KEYS))
    authinfo: dict = config_field({}, mapping_of(nested(Credentials)))
    password: Authenticator = config_field(Authenticator({}), mapping_of(parse_login, collect=Authenticator))
    queue: QueueSettings | None = config_field(None, nested(QueueSettings))
    dkim: dict = config_field({}, mapping_of(nested(DkimKey), domain_key, "a domain"))
    path: str | None = None
    files: tuple = ()  # (path, stat_key) of all that was read

    @property
    def hostname(self) -> str:
        return self.smtpd.hostname


def load_settings(path: str | None) -> tuple:
    """Return (Settings, errors) of a settings file; without one all mail is printed."""
    if path is None:
        screen = {"default": Route(mailer="Screen")}
        return resolve_settings(Settings(recipients=Recipients(open_relay=True), mailertable=screen), [])
    errors, public, aside, files = [], [], {}, {path: stat_key(path)}
    raw = read_json_file(path, errors, public)
    for section, name in raw.items():
        if isinstance(name, str) and section in key_table(Settings):
            aside[section] = file = os.path.join(os.path.dirname(path), name)
            files[file] = stat_key(file)
            raw[section] = read_json_file(file, errors, public, section)
    settings = replace(from_dict(Settings, raw, "", errors), path=path, files=tuple(files.items()))
    plain = [where for where, holder, name, _ in secret_fields(settings) if isinstance(getattr(holder, name), str)]
    found = {aside.get(where.partition(".")[0], path) for where in plain}.intersection(public)
    errors += [f"{name}: holds secrets and can be read by everybody; chmod 600 {name}" for name in sorted(found)]
    paths = {error.partition(": ")[0] for error in errors}
    causes = tuple(f"{json_path}{mark}" for json_path in paths for mark in ".:[")
    settings, dependent = resolve_settings(settings, [])
    for error in dependent:  # without those that only follow from others
        if not (error.startswith(causes) or ("authinfo" in paths and "in authinfo" in error)):
            errors.append(error)
    return settings, errors


def stat_key(path: str) -> tuple | None:
    """Return values that change when a file is rewritten, None if there is none."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL in the name
        found = os.stat(path)
        return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode, found.st_uid
    return None


def read_json_file(path: str, errors: list, public: list, section: str = "") -> dict:
    """Return the JSON object in a file, {} and an error if there is none; `public` gets those that all can read."""
    label = f"{section}: {path}" if section else path
    try:
        with open_regular(path) as stream:
            mode = os.fstat(stream.fileno()).st_mode
            raw = parse_json(stream.read())
    except (OSError, ValueError) as error:
        errors.append(f"{label}: {getattr(error, 'strerror', None) or error}")
        return {}
    public += [path] if mode & 0o004 else []
    if mode & 0o002:
        errors.append(f"{label}: can be written by everybody; chmod 600 {path}")
    if not isinstance(raw, dict):
        errors.append(f"{label}: expected an object, got {json_type_name(raw)}")
    return raw if isinstance(raw, dict) else {}


def open_regular(path: str) -> Any:
    """Open a regular file for reading; OSError for others: a FIFO would block, a device has no end."""
    stream = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, "is not a regular file", path)
    return stream


def secret_fields(value: Any, json_path: str = "") -> Any:
    """Yield (JSON path, the dataclass that holds it, its name, how it is read) of each secret in settings."""
    value = getattr(value, "logins", value)
    if isinstance(value, dict):
        for key, item in value.items():
            yield from secret_fields(item, f"{json_path}.{key}")
    for item in fields(value) if hasattr(value, "__dataclass_fields__") else ():
        where, secret = f"{json_path}.{item.name}".lstrip("."), item.metadata.get("secret")
        if secret and getattr(value, item.name):
            yield where, value, item.name, secret
        elif not secret:
            yield from secret_fields(getattr(value, item.name), where)


def resolve_secrets(settings: Settings, base: str, errors: list) -> list:
    """Put each secret in place of its source, which stays where that fails; return the names of the files read."""
    names = []
    for json_path, holder, name, how in secret_fields(settings):
        source = getattr(holder, name)
        if isinstance(source, str) or (how == "later" and "command" in source):  # a command may need the network
            continue
        try:
            secret = read_secret(source, base, how == "text")
        except ValueError as error:
            errors.append(f"{json_path}{error}")
            continue
        if how != "later":
            object.__setattr__(holder, name, secret)
            names += [source["file"]] if "file" in source else []
    return names


def resolve_settings(settings: Settings, errors: list) -> tuple:
    """Return (Settings, errors) with names, secrets and files looked up, so that a mail finds all of it ready."""
    base, tls = os.path.dirname(settings.path or ""), settings.httpd.tls
    files = resolve_secrets(settings, base, errors)
    logins = {key: _login(login, base, f"authinfo.{key}", errors) for key, login in settings.authinfo.items()}
    tables: dict = {"mailertable": {}, "sendermt": {}}
    for table, routes in tables.items():
        for key, first in getattr(settings, table).items():
            names = [f"{table}.{key}[{i}]" if first.fallbacks else f"{table}.{key}" for i in range(len(first.choices))]
            choices = [(name, route) for name, route in zip(names, first.choices) if not route.disabled]
            found = [_route(replace(route, fallbacks=()), logins, base, name, errors) for name, route in choices]
            routes.update({key: replace(found[0], fallbacks=tuple(found[1:]))} if found else {})
            files += [route.ca_file for route in found]
    if tls:
        files += [tls.certificate, tls.key]
        missing = [key for key in ("certificate", "key") if not getattr(tls, key)]
        errors.extend(f"httpd.tls.{key}: expected the name of a PEM file" for key in missing)
        try:
            server_context(tls, base) if not missing else None
        except OSError as error:
            errors.append(f"httpd.tls: {error.filename}: {error.strerror}")
    smtpd = replace(settings.smtpd, hostname=settings.smtpd.hostname or local_hostname())
    recipients = settings.recipients or Recipients(domainpart=frozenset([smtpd.hostname.lower()]))
    queue_settings = settings.queue and _queue_settings(settings.queue, base, errors)
    keys = {domain: replace(key, domain=domain) for domain, key in settings.dkim.items()}
    for domain, key in keys.items():
        if not key.selector:
            errors.append(f"dkim.{domain}.selector: expected a selector")
        try:
            keys[domain] = replace(key, private=PrivateKey(key.key.encode())) if isinstance(key.key, str) else key
        except (ValueError, OSError) as error:
            errors.append(f"dkim.{domain}.key: {getattr(error, 'strerror', None) or error}")
    paths = [os.path.join(base, name) for name in files if name]
    values = {"smtpd": smtpd, "recipients": recipients, "queue": queue_settings, "dkim": keys, **tables}
    return replace(settings, **values, files=(*settings.files, *[(path, stat_key(path)) for path in paths])), errors


def _login(login: Credentials, base: str, json_path: str, errors: list) -> Credentials:
    """Return the login with what tokens are fetched with; scope as in the settings."""
    oauth2 = login.oauth2
    if not oauth2:
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
        document = parse_json(account.encode()) if account and isinstance(account, str) else None
        document and (document["client_email"], PrivateKey(document["private_key"].encode()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        errors.append(f"{json_path}.oauth2.service_account: expected the JSON file of a Google service account")
    return replace(login, oauth2=replace(oauth2, base=base, provider=provider, token_url=url))


def _queue_settings(settings: QueueSettings, base: str, errors: list) -> QueueSettings:
    path, secret, octets = os.path.abspath(os.path.join(base, settings.path)), settings.webhook_secret, b""
    if not settings.path or os.path.isdir(path):
        errors.append("queue.path: expected the name of a file")
    elif not is_writable_folder(os.path.dirname(path)):
        errors.append(f"queue.path: {os.path.dirname(path)} is not a folder that can be written")
    with contextlib.suppress(ValueError):
        octets = base64.b64decode(str(secret).partition("whsec_")[2], validate=True)
    if (settings.webhook or secret) and not 24 <= len(octets) <= 64:
        errors.append('queue.webhook_secret: expected "whsec_" and base64 of 24 to 64 octets')
    return replace(settings, path=path, secret=octets)


def is_writable_folder(path: str) -> bool:
    return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def _route(route: Route, logins: dict, base: str, json_path: str, errors: list) -> Route:
    """Return the route with its login, and the host and port of its API."""
    row, login, has_login = route.row, logins.get(route.auth, Credentials()), route.auth in logins
    if route.auth and not has_login:
        errors.append(f'{json_path}.auth: "{route.auth}" is not in authinfo{did_you_mean(route.auth, logins)}')
    elif route.auth and row.api_url and not all(getattr(login, key) for key in row.login):
        errors.append(f"{json_path}.auth: authinfo.{route.auth} needs {' and '.join(row.login)}")
    errors += [f"{json_path}.{key}: {route.relay} takes no such setting" for key in row.refuses if getattr(route, key)]
    errors += [f"{json_path}.{key}: {route.relay} needs it" for key in row.needs if not getattr(route, key)]
    if row.into_folder and not is_writable_folder(route.folder):
        errors.append(f"{json_path}.mailer: {route.folder} is not a folder that can be written")
    if not row.into_folder and route.host.startswith("/"):
        errors.append(f'{json_path}.host: expected a host name, got "{route.host}"')
    ca_file = os.path.join(base, route.ca_file) if route.ca_file else ""
    try:
        client_context(route.tls_verify, ca_file, stat_key(ca_file)) if ca_file else None
    except OSError as error:
        errors.append(f"{json_path}.ca_file: {ca_file}: {error.strerror or error}")
    oauth2 = login.oauth2 if not row.api_url or "oauth2" in row.login else None
    if login.token and not row.api_url:
        oauth2 = oauth2 or OAuth2(access_token=login.token)
    if oauth2 and not oauth2.scope:
        scopes = row.scopes or PROVIDERS.get(oauth2.provider, ("", "", ""))[1:]
        oauth2 = replace(oauth2, scope=scopes[bool(oauth2.refresh_token)])
    site = split_base_url(route.url) if row.api_url else route
    credentials = (login.username, login.password) if has_login else ()
    values = {"host": site.host, "port": site.port, "credentials": credentials, "token": login.token}
    return replace(route, ca_file=ca_file, oauth2=oauth2, **values)


class BaseURL(NamedTuple):
    tls: bool
    host: str
    port: int
    path: str  # stands before every path of the API
    host_header: str  # value of the header Host, RFC 9110 7.2


@functools.lru_cache(maxsize=1024)
def split_base_url(url: str) -> BaseURL:
    parts = urllib.parse.urlsplit(url)
    host, default_port = parts.hostname or "", 443 if parts.scheme == "https" else 80
    name, port = f"[{host}]" if ":" in host else host, parts.port or default_port
    return BaseURL(parts.scheme == "https", host, port, parts.path, name if port == default_port else f"{name}:{port}")


def pin_queue_path(fresh: Settings, queue_settings: QueueSettings | None) -> Settings:
    """Return reloaded settings with the queue's present file: another one takes effect at the next start."""
    return replace(fresh, queue=queue_settings and replace(fresh.queue or queue_settings, path=queue_settings.path))


def local_hostname(name: str | None = None) -> str:
    """Return a machine's name (this one's), made legal; with ".localdomain", as Postfix does, if it has no domain."""
    name = socket.gethostname() if name is None else name
    if "." in name and HOSTNAME.fullmatch(name):
        return name
    return (re.sub("[^A-Za-z0-9]+", "-", name)[:63].strip("-") or "localhost") + LOCALDOMAIN


@functools.lru_cache(maxsize=64)
def ehlo_name(hostname: str, address: str) -> str:
    """Return the name for EHLO from a local address: `hostname`, or if that is illegal or made by local_hostname(),
    what reverse DNS says, else the address literal (RFC 5321 4.1.4)."""
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
        open_regular(name).close()
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
        open_regular(ca_file).close()
        context.load_verify_locations(ca_file)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def redacted(value: Any, secret: str = "") -> Any:
    """Return settings as JSON values, each secret as ********."""
    if (secret and value) or (isinstance(value, Login) and value == Login(value.hash)):
        return "********"
    if isinstance(value, Rate):
        return f"{value.limit}/{value.seconds}"
    if isinstance(value, Route) and value.fallbacks:
        return [redacted(replace(choice, fallbacks=())) for choice in value.choices]
    if hasattr(value, "__dataclass_fields__"):
        known = {(i.metadata["keys"] or (i.name,))[0]: i for i in fields(value) if "parse" in i.metadata}
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
    settings["authinfo"] = {"relay": {"username": "", "password": ""}}
    return settings


# ======================================================================================================================
# 4. Log and metrics
#    One line for each event, on stderr or to syslog. A destination that does not read costs lines, never a mail. `log`
#    and `metrics` are the only state that all sections share.
# ======================================================================================================================

MAX_TO = 8 * 257  # octets of recipients of a transaction in a line, so that a pipe takes it whole (PIPE_BUF)
LOG_FORMS = {"from": "<{}>".format, "delay": "{:.3f}".format, "to": lambda to: f"<{'>,<'.join(to)}>"}  # in text


class Log:
    """Writer of log lines. After start_buffering() they wait for flush(), which writes those of many mails at once. A
    reader that is slow is waited for PATIENCE seconds; then lines are dropped and counted until it reads again."""

    FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    LEVELS = {"error": 3, "warning": 4, "info": 6}  # of syslog(3)  # noqa: RUF012
    SYSLOG = ("/dev/log", "/var/run/syslog", "/var/run/log")  # Linux, macOS, BSD
    LOST = "{} lines were lost, since nobody read them"
    PATIENCE = 0.1

    def __init__(self) -> None:
        self.devel = False  # SMTP dialogues are shown, too
        self.trace: Any = contextvars.ContextVar("trace", default=None)  # list of a task that collects its dialogue
        self.facility: int | None = None  # of syslog lines; None: they go to stderr
        self.is_json = self.is_journal = False  # a JSON object a line; to systemd's journal, which adds time and name
        self.syslog: socket.socket | None = None
        self.buffer: list | None = None  # texts that wait for flush()
        self.loop: Any = None  # event loop that calls flush()
        self.stderr = 2  # a file descriptor
        self.path = ""  # of the file that descriptors 1 and 2 are, if reopen() is to look for a new one
        self.quiet = False  # lines for stderr are dropped
        self.lost = self.lost_ever = 0  # lines, since the reader stopped; and in all that are not in the metrics yet

    def open(self, settings: Syslog, form: str = "text") -> None:
        """Send lines from now on where the settings say."""
        self.facility = None if settings.disabled else FACILITIES[settings.facility] * 8
        self.is_json = form == "json"
        with contextlib.suppress(OSError):
            found = os.fstat(2)
            self.is_journal = os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"

    def event(self, level: str, event: str, message: str, **fields: Any) -> None:
        """Write a line about an event: QUEUEID: key=value ... (code message), or JSON; fields are left out if None."""
        fields = {key: value for key, value in fields.items() if value is not None}
        self._write(level, json_line(level, event, message, fields) if self.is_json else text_line(message, **fields))

    def lines(self, *lines: str, level: str = "info") -> None:
        """Write lines by one call, so that those of several processes don't mix."""
        self._write(level, *([json_line(level, "server", line, {}) for line in lines] if self.is_json else lines))

    def banner(self, text: str) -> None:
        """Write a line to stderr, wherever the others go."""
        line = json_line("info", "server", text, {}) if self.is_json else text
        self.write_bytes(f"{'<6>' if self.is_journal else ''}{line}\n".encode())

    def dialogue(self, peer: str, direction: str, line: str) -> None:
        """Show a line of an SMTP dialogue under -d, and keep it for a mail that is traced."""
        line, lines = f"{direction} {sanitize(line, 1000, keep=chr(9))}", self.trace.get()
        if self.devel:
            self.lines(f"{peer} {line}") if self.is_json else self._add(f"{peer} {line}\n")
        if lines is not None:
            lines.append(line)

    def _write(self, level: str, *lines: str) -> None:
        if self.facility is not None:
            for line in lines:
                self._to_syslog(line, self.facility | self.LEVELS[level])
        elif not self.quiet:
            head = "" if self.is_json else f"{timestamp(int(time.time()))} haineko[{os.getpid()}]: "
            head = f"<{self.LEVELS[level]}>" if self.is_journal else head
            self._add("".join([f"{head}{line}\n" for line in lines]))

    def _add(self, text: str) -> None:
        if self.buffer is None:
            self.write_bytes(text.encode("utf-8", "backslashreplace"))
            return
        self.buffer.append(text)
        if self.loop and threading.current_thread() is not threading.main_thread():
            self.loop.call_soon_threadsafe(self.flush)
        elif self.loop and len(self.buffer) == 1:
            self.loop.call_soon(self.flush)

    def reopen(self) -> None:
        """Open the log file again if it was moved away, as logrotate does."""
        with contextlib.suppress(OSError):
            if self.path and not (os.path.exists(self.path) and os.path.samestat(os.stat(self.path), os.fstat(2))):
                number = os.open(self.path, self.FILE_FLAGS, 0o600)
                os.dup2(number, 1)
                os.dup2(number, 2)
                os.close(number)

    def start_buffering(self, loop: Any = None) -> None:
        """Let lines wait for flush(), which the event loop calls in its next iteration. A process that is killed loses
        those of the current one, of which no request was answered yet."""
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
                    self.lost += octets.count(b"\n", start)
                    self.lost_ever += octets.count(b"\n", start)
                    return False
                with contextlib.suppress(BlockingIOError):  # another process was quicker
                    if self.lost:
                        os.write(self.stderr, f"\nhaineko[{os.getpid()}]: {self.LOST.format(self.lost)}\n".encode())
                        self.lost = 0
                        continue  # there may have been room for this only
                    end = octets.rfind(b"\n", start, start + select.PIPE_BUF) + 1  # so much never blocks
                    start += os.write(self.stderr, octets[start : end or start + select.PIPE_BUF])
            return True
        return False

    def _to_syslog(self, line: str, priority: int) -> None:
        """Send a line (RFC 3164) to a daemon that may be absent or stuck, where syslog.syslog() would block."""
        head = f"<{priority}>{time.strftime('%b %e %H:%M:%S')} haineko[{os.getpid()}]: "
        for _ in range(2):
            try:
                if not self.syslog:
                    self.syslog = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                    self.syslog.connect(next(filter(os.path.exists, self.SYSLOG), self.SYSLOG[0]))
                self.syslog.settimeout(0 if self.lost else self.PATIENCE)
                for text in (self.LOST.format(self.lost), line) if self.lost else (line,):
                    self.syslog.send((head + text).encode("utf-8", "backslashreplace"))
                self.lost = 0
                return
            except (BlockingIOError, socket.timeout):
                break
            except OSError:  # the daemon went; another one may be there
                if self.syslog:
                    self.syslog.close()
                self.syslog = None
        self.lost, self.lost_ever = self.lost + 1, self.lost_ever + 1


@functools.lru_cache(maxsize=2)
def timestamp(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(second))


def log_exception(queueid: str | None) -> None:
    import traceback

    lines = traceback.format_exc().splitlines()
    log.lines(*[f"{queueid or '-'}: {sanitize(line, 500)}" for line in lines], level="error")


def json_line(level: str, event: str, message: str, fields: dict) -> str:
    """Return an event as a JSON object in a line."""
    now = time.time()
    zoned = timestamp(int(now))
    values = {"time": f"{zoned[:19]}.{int(now % 1 * 1000):03d}{zoned[19:22]}:{zoned[22:]}", "level": level}
    values.update({"event": event, **fields, "message": message})
    forms = {"to": lambda to: [sanitize(item, 254) for item in to], "code": int, "delay": lambda delay: round(delay, 3)}
    return ENCODER.encode({key: forms.get(key, lambda text: sanitize(text, 1000))(values[key]) for key in values})


def text_line(message: str, queueid: str | None = None, code: str = "", **fields: Any) -> str:
    """Return an event as people and log readers of mail servers read it."""
    pairs = []
    for key, value in fields.items():
        text = LOG_FORMS[key](value) if key in LOG_FORMS else value
        pairs.append(f"{key}={log_value(text, MAX_TO if key == 'to' and 'relay' in fields else 500)}")
    words = sanitize(f"{code} {message}".lstrip(), 600)
    return " ".join([*([f"{queueid}:"] if queueid else []), *pairs, f"({words})" if pairs else words])


def log_value(value: Any, limit: int = 500) -> str:
    """Return a value for a log line, in quotes if it is empty or has blanks or quotes, "?" for unprintables."""
    value = sanitize(str(value), limit)
    if value and " " not in value and '"' not in value:
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


class Metrics:
    """64-bit columns that all processes share: each adds to its own row, and a scrape sums them. Not for threads. The
    row of a worker is kept when it is replaced, so that no counter goes back."""

    BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # seconds; one more cell has their sum

    def __init__(self) -> None:
        self.table: dict = {}  # {name: (type, help, {label: its values})}
        self.columns: dict = {}  # {(name, *label values): column}; nothing is counted before allocate()
        self.cells: Any = None
        self.width = self.first = 0  # columns; index of the first cell of this process

    def allocate(self, table: dict, rows: int) -> None:
        """Make room for the metrics of a table in so many rows; this process gets the last one."""
        self.table, self.columns, width = table, {}, 1  # the first cell is the heartbeat
        for name, (kind, _, labels) in table.items():
            for values in itertools.product(*labels.values()):
                self.columns[(name, *values)] = width
                width += len(self.BUCKETS) + 2 if kind == "histogram" else 1
        self.cells, self.width = memoryview(mmap.mmap(-1, 8 * width * rows)).cast("q"), width
        self.use_row(rows - 1)

    def use_row(self, row: int) -> None:
        self.first = row * self.width

    def add(self, *key: Any, by: int = 1) -> None:
        """Add to a counter; the key is its name and the values of its labels."""
        if key in self.columns:
            self.cells[self.first + self.columns[key]] += by

    def set(self, *key: Any, to: int) -> None:
        if key in self.columns:
            self.cells[self.first + self.columns[key]] = to

    def observe(self, *key: Any, seconds: float) -> None:
        """Count a duration in a histogram."""
        if key in self.columns:
            column = self.first + self.columns[key]
            self.cells[column + bisect.bisect_left(self.BUCKETS, seconds)] += 1
            self.cells[column + len(self.BUCKETS) + 1] += round(seconds * 1e6)

    def beat(self) -> None:
        self.cells[self.first] = time.monotonic_ns()

    def last_beat(self, row: int) -> float:
        """Return when the process with that row was not stuck, in seconds of time.monotonic()."""
        return self.cells[row * self.width] / 1e9

    def total(self, column: int) -> int:
        return sum(self.cells[column :: self.width])

    def text(self, current: dict) -> str:
        """Return all in Prometheus's text format; `current` are values by key that are no sums, None if unknown."""
        lines, bounds = [], [*self.BUCKETS, "+Inf"]
        for name, (kind, about, labels) in self.table.items():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
            for values in itertools.product(*labels.values()):
                column, samples = self.columns[(name, *values)], {}
                pairs = "".join([f'{label}="{value}",' for label, value in zip(labels, values)])
                if kind == "histogram":
                    counts = itertools.accumulate([self.total(column + i) for i in range(len(bounds))])
                    samples = {f'_bucket{{{pairs}le="{bound}",': count for bound, count in zip(bounds, counts)}
                    samples[f"_count{{{pairs}"] = samples[f'_bucket{{{pairs}le="+Inf",']
                    samples[f"_sum{{{pairs}"] = self.total(column + len(bounds)) / 1e6
                elif (value := current.get((name, *values), self.total(column))) is not None:
                    samples = {f"{{{pairs}": value}
                lines += [
                    f"{name}{head}}} {value}".replace(",}", "}").replace("{}", "") for head, value in samples.items()
                ]
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

    def log_fields(self) -> dict:
        """Return the keys of its log lines that say whose it is, and the ids by which other programs know it."""
        whose = {"client": self.client and str(self.client), "login": self.login or None}
        ids = {"request_id": self.trace_id("x-request-id"), "traceparent": self.trace_id("traceparent")}
        return {**whose, "reason": self.login_fault or None, **ids}

    def trace_id(self, header: str) -> str | None:
        value = self.headers.get(header)
        return value if value and re.fullmatch(r"[A-Za-z0-9._:/+=@-]{1,128}", value) else None


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
    if not value.isascii() and (found := re.search("[\ud800-\udfff]", value)):
        errors.append(f"{json_path}: has half a surrogate pair at character {found.start()}")
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
    if re.search("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", value):  # one can make fdp.exe look like exe.pdf
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
            end = found.start() - octets.endswith(b"\r", start, found.start())
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
    return header, at + (2 if octets.startswith(b"\r\n", at, end) else octets.startswith(b"\n", at, end))


def rewrite_parts(octets: bytes, parts: list, rewrite: Callable, keep_8bit: bool = True) -> bytes:
    """Return the message with the (fields, body) that rewrite(part, body) gives for each part."""
    dropped = b"" if keep_8bit else bytes(range(128, 256))  # of delimiters, and of text between parts that nobody reads
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
    cost = (0.01 if raw.body.isascii() else 0.3) * len(raw.body)  # microseconds, from above
    cost += 10 * len(raw.fields) + 30 * raw.body.count(b"\n--")
    cost += (0.02 if header.charset in ("UTF-8", "US-ASCII") else 0.5) * len(work.body)
    cost += (0.1 if work.body else 0.5) * len(work.html)
    cost += sum(25 + 0.008 * len(item.content or b"") for item in work.attachments)
    cost += 0.6 * len(header.subject) + sum(5 + 0.6 * len(value) for _, value in header.extra_fields)
    return cost + 15 * len(header.to + header.cc) > 5000


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

WRONG_LOGINS = Rate(10, 60)
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
    source = int(request.client) >> (64 if request.client.version == 6 else 0)
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
    """Refuse a submission that asks for what it may not, that went in a loop, or whose EHLO or MAIL is no command."""
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
    ".docx": _OFFICE + "wordprocessingml.document", ".xlsx": _OFFICE + "spreadsheetml.sheet",
    ".pptx": _OFFICE + "presentationml.presentation", ".ics": "text/calendar", ".md": "text/markdown",
    ".webp": "image/webp", ".zip": "application/zip", ".gz": "application/gzip", ".tgz": "application/gzip",
    ".odt": "application/vnd.oasis.opendocument.text", ".ods": "application/vnd.oasis.opendocument.spreadsheet",
    ".rtf": "application/rtf", ".7z": "application/x-7z-compressed",
}  # fmt: skip

PLAIN_NAME = re.compile("[ !#-;=-~]+")  # ASCII without the quotes and brackets that some readers remove twice
RFC2231_SEGMENT = 60  # characters of a parameter in one line
NEEDS_ENCODING = re.compile(rb"[^\x20-\x7e\t\r\n]|^[^\r\n]{79}", re.MULTILINE)
JIS_OCTETS = bytes([0x09, 0x0A, 0x0D, 0x1B, *range(0x20, 0x7F)])
QUOTED_AS_IS = bytes(c for c in (0x09, 0x0A, 0x0D, *range(0x20, 0x7F)) if c != ord("="))
# Names that Windows and Unicode's own tables give differently to some characters of JIS X 0208; Python's codec knows
# the latter.
CP932_TO_JIS = str.maketrans("～∥－￠￡￢—", "〜‖−¢£¬―")
UNSENDABLE = re.compile(rb"\0|^[^\r\n]{999}", re.MULTILINE)  # RFC 5321 2.3.8, RFC 5322 2.1.1
ENCODED_WORDS = re.compile(r"(=\?[!->@-~]+\?[BbQq]\?[!->@-~]*\?=)")
ENCODED_WORD_8BIT = re.compile(rb"=\?[!->@-~]{1,40}\?[Qq]\?[^?\s]*\?=")
PARAMETER = re.compile(r';[ \t]*([^\s;="]+)[ \t]*=[ \t]*("(?:[^"\\]|\\.)*"?|[^;"]*)')
COMMENT_8BIT = re.compile(r"\(([^()\\\x80-\U0010ffff]*[\x80-\U0010ffff][^()\\]*)\)")
NOT_BASE64 = bytes({*range(256)} - {*b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"})


def compose(submission: Submission, queueid: str, client: IPAddress, hostname: str, now: float) -> Message:
    """Compose the message in the charset asked for, or in UTF-8 if that can't hold every character."""
    if submission.raw:
        trace = received_field(submission.ehlo, client, hostname, queueid, rfc5322_date(int(now)))
        loop = submission.header.loop
        return complete_raw_message(submission.raw, submission.mail, loop, trace, queueid, hostname, now)
    try:
        return _compose(submission, submission.header.charset, queueid, client, hostname, now)
    except UnicodeEncodeError:
        return _compose(submission, "UTF-8", queueid, client, hostname, now)


def _compose(submission: Submission, charset: str, queueid: str, client: Any, hostname: str, now: float) -> Message:
    header, sender, date = submission.header, parse_address(submission.mail), rfc5322_date(int(now))
    author = header.from_ or (("", sender),)
    top = [received_field(submission.ehlo, client, hostname, queueid, date), address_field("From", author, charset)]
    if len(author) > 1 or author[0][1].key != sender.key:
        top.append(f"Sender: {sender.addr_spec}")
    extra: dict = {}
    for name, value in header.extra_fields:
        extra.setdefault(name, []).append(header_field(name, value, charset))
    middle = [address_field("Reply-To", header.replyto, charset)] if header.replyto else []
    middle += [text_field("Subject", header.subject, charset), *extra.pop("Date", (f"Date: {date}",))]
    identity = extra.pop("Message-Id", ())
    end = [line for lines in extra.values() for line in lines]
    end += loop_field(header.loop, hostname), "MIME-Version: 1.0", ""
    if submission.shared:
        shown = [address_field(name, item, charset) for name, item in (("To", header.to), ("Cc", header.cc)) if item]
        heads = [[*top, *shown, *middle, *(identity or (f"Message-Id: <{queueid}.1@{hostname}>",)), *end]]
    elif identity:
        heads = [[*top, "To: "], ["", *middle, *identity, *end]]
    else:
        heads = [[*top, "To: "], ["", *middle, f"Message-Id: <{queueid}."], [f"@{hostname}>", *end]]
    *parts, last = ["\r\n".join(lines).encode() for lines in heads]
    utf8 = not (last.isascii() and all(map(bytes.isascii, parts)))  # only an address can be other than ASCII
    return Message((*parts, b"".join([last, *content_pieces(submission, charset, queueid)])), utf8, utf8)


@functools.lru_cache(maxsize=64)
def loop_field(names: tuple, hostname: str) -> str:
    return fold("X-Haineko-Loop:", [name + "," for name in names] + [hostname])


def header_field(name: str, value: Any, charset: str) -> str:
    """Return a field of mailboxes or text, encoded as its grammar allows."""
    if type(value) is tuple:
        return address_field(name, value, charset)
    if STRUCTURED_FIELDS.fullmatch(name.lower()):
        return fold(f"{name}:", value.split(" "))
    return text_field(name, value, charset)


def text_part(subtype: str, text: str, charset: str) -> list:
    """Return [header, body] of a part that is text."""
    encoding, body = encode_body(text, charset)
    head = f"Content-Type: text/{subtype}; charset={charset}\r\nContent-Transfer-Encoding: {encoding}\r\n\r\n"
    return [head.encode(), body]


def content_pieces(submission: Submission, charset: str, queueid: str) -> list:
    """Return the octets of text, HTML and attachments: the richest form last (RFC 2046 5.1.4), then the files."""
    html, attachments = submission.html, submission.attachments
    pictures = [file_part(item, charset) for item in attachments if html and item.cid]
    files = [file_part(item, charset) for item in attachments if not (html and item.cid)]
    whole = text_part("plain", submission.body or html_to_text(html), charset)
    if html:
        shown = text_part("html", html, charset)
        if pictures:
            shown = multipart("related", queueid, shown, *pictures)
        whole = multipart("alternative", queueid, whole, shown)
    return multipart("mixed", queueid, whole, *files) if files else whole


def multipart(subtype: str, queueid: str, *parts: Any) -> list:
    """Return the octets of a multipart; the random queue id makes a boundary that occurs in none of the parts."""
    boundary = f"=_{queueid}.{subtype}"
    root = '; type="text/html"' if subtype == "related" else ""  # RFC 2387 3.1
    pieces = [f'Content-Type: multipart/{subtype}{root};\r\n boundary="{boundary}"\r\n'.encode()]
    for part in parts:
        pieces += [f"\r\n--{boundary}\r\n".encode(), *part]
    return [*pieces, f"\r\n--{boundary}--\r\n".encode()]


def file_part(item: Attachment, charset: str) -> list:
    """Return [header, body] of an attachment, whose content arrives unchanged."""
    media_type = item.type or guess_media_type(item.filename)
    in_type, in_disposition = name_parameters(item.filename, charset) if item.filename else ("", "")
    disposition = "inline" if item.cid or item.inline else "attachment"
    if media_type.startswith("message/"):  # RFC 2046 5.2.1 allows no encoding; parse_attachments() checks that
        encoding, body = "7bit", item.content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    else:
        encoding, body = "base64", base64_lines(item.content)
    head = f"Content-Type: {media_type}{in_type}\r\nContent-Transfer-Encoding: {encoding}\r\n"
    head += f"Content-Disposition: {disposition}{in_disposition}\r\n"
    return [(head + (f"Content-ID: <{item.cid}>\r\n\r\n" if item.cid else "\r\n")).encode(), body]


def name_parameters(name: str, charset: str) -> tuple:
    """Return the parameters for a file's name in Content-Type and Content-Disposition. If the name isn't plain, the
    latter is for readers that know RFC 2231, the former (encoded words) for those that do not."""
    if PLAIN_NAME.fullmatch(name) and "=?" not in name:
        return f';\r\n name="{name}"', f';\r\n filename="{name}"'
    words = "\r\n ".join(encoded_words(name, charset, 7))
    return f';\r\n name="{words}"', rfc2231_parameter("filename", name, charset)


def rfc2231_parameter(name: str, text: str, charset: str) -> str:
    """Return a parameter with any characters, in lines of its own."""
    coded = f"{charset}''{urllib.parse.quote_from_bytes(charset_encoder(charset)(text), safe='')}"
    if len(coded) <= RFC2231_SEGMENT:
        return f";\r\n {name}*={coded}"
    segments = re.findall(f"(?:%..|[^%]){{1,{RFC2231_SEGMENT // 3}}}", coded)
    return "".join(f";\r\n {name}*{i}*={segment}" for i, segment in enumerate(segments))  # RFC 2231 3


def guess_media_type(name: str) -> str:
    """Return the media type for the extension of a file's name, by tables that are the same on every system."""
    import mimetypes

    extension = os.path.splitext(name)[1].lower()
    media_type = EXTRA_MEDIA_TYPES.get(extension) or mimetypes.types_map.get(extension, "message/")
    return "application/octet-stream" if media_type.startswith("message/") else media_type


def html_to_text(html: str) -> str:
    """Return the plain text of HTML: words and lines, targets of links, descriptions of pictures."""
    extractor = HTMLTextExtractor()
    # Sections like <![if ...]> hold no text, and some versions of the parser fail on them. Without close(), what is
    # unfinished at the end is left out, as browsers do.
    extractor.feed(re.sub(r"<!\[(?:[^>-]|-(?!->))*>?", "<! >", html) + "\n")
    return "".join(extractor.out).strip("\n") + "\n"


class HTMLTextExtractor(HTMLParser):
    """Parser that writes down the text of HTML."""

    HIDDEN = ("script", "style", "title", "template")
    LINES = ("address", "dd", "div", "dl", "dt", "figcaption", "footer", "form", "header", "li", "main", "nav",
             "section", "tr")  # fmt: skip
    PARAGRAPHS = ("article", "blockquote", "figure", "h1", "h2", "h3", "h4", "h5", "h6", "ol", "p", "pre", "table",
                  "ul")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.out: list = []
        self.gap = 2  # line ends after the last word
        self.space = ""  # to be written before the next word
        self.hidden, self.pre_depth = "", 0  # the tag that hides; depth of <pre>
        self.link, self.link_start = "", 0  # target of the open link, and the length of `out` at its start

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if self.hidden:
            return
        if tag in self.HIDDEN:
            self.hidden = tag
        self._break(tag)
        values = dict(attrs)
        if tag == "br":
            self._line(self.gap + 1)
        elif tag == "li":
            self.handle_data("* ")
        elif tag == "hr":
            self._line(1)
            self.handle_data("-----")
            self._line(1)
        elif tag in ("td", "th") and not self.gap:
            self.space = "  "
        elif tag == "img":
            self.handle_data(values.get("alt") or "")
        elif tag == "a":
            self.link, self.link_start = values.get("href") or "", len(self.out)
        self.pre_depth += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self.hidden:
            self.hidden = "" if tag == self.hidden else self.hidden
            return
        self._break(tag)
        self.pre_depth -= tag == "pre" and self.pre_depth > 0
        if tag == "a":
            link, self.link = self.link, ""
            text = "".join(self.out[self.link_start :]).strip() if link else ""
            if link.startswith(("http:", "https:", "mailto:")) and link.partition("mailto:")[2] != text != link:
                self.handle_data(f" <{link}>")

    def handle_data(self, data: str) -> None:
        """Add text, with white space collapsed as browsers do."""
        if self.hidden:
            return
        if self.pre_depth:
            self.out.append(data)
            self.gap = int(data.endswith("\n")) if data else self.gap
            return
        words = re.sub(r"[ \t\r\n\f]+", " ", data).strip(" ").replace("\xa0", " ")
        if data[:1].isspace():
            self.space = self.space or " "
        if words:
            self.out.append((self.space if not self.gap else "") + words)
            self.gap, self.space = 0, " " if data[-1:].isspace() else ""

    def _break(self, tag: str) -> None:
        if tag in self.LINES or tag in self.PARAGRAPHS:
            self._line(2 if tag in self.PARAGRAPHS else 1)

    def _line(self, ends: int) -> None:
        """Make at least this many line ends follow the last word."""
        if self.gap < ends:
            self.out.append("\n" * (ends - self.gap))
            self.gap = ends
        self.space = ""


@functools.lru_cache(maxsize=4)
def rfc5322_date(second: int) -> str:
    return formatdate(second, localtime=True)


def received_field(ehlo: str | None, client: IPAddress | None, hostname: str, queueid: str, date: str) -> str:
    """Return the trace field (RFC 5321 4.4)."""
    address = str(client or "127.0.0.1")
    literal = f"[IPv6:{address}]" if ":" in address else f"[{address}]"
    return f"Received: from {ehlo or literal} ({literal})\r\n\tby {hostname} with HTTP id {queueid};\r\n\t{date}"


def address_field(name: str, mailboxes: tuple, charset: str) -> str:
    """Return a field of mailboxes; the addresses stay outside the encoded words (RFC 2047 5)."""
    tokens: list = []
    for i, (display_name, mailbox) in enumerate(mailboxes):
        comma = "," if i < len(mailboxes) - 1 else ""
        if mailbox is NULL_SENDER:
            tokens.append(f"{display_name}:;{comma}")
        elif not display_name:
            tokens.append(mailbox.addr_spec + comma)
        else:
            tokens += phrase_tokens(display_name, charset, len(name) + 2)
            tokens.append(f"<{mailbox.addr_spec}>{comma}")
    return fold(f"{name}:", tokens)


@cache_short(512)
def phrase_tokens(text: str, charset: str, used: int) -> tuple:
    """Return a display name as atoms, as a quoted string or as encoded words."""
    if "=?" not in text and PHRASE.fullmatch(text) and "  " not in text:
        return tuple(text.split(" "))
    if "=?" not in text and re.fullmatch(r"[\x20-\x7e]{1,60}", text):
        return ('"' + re.sub(r'(["\\])', r"\\\1", text) + '"',)
    return tuple(encoded_words(text, charset, used))


def text_field(name: str, value: str, charset: str) -> str:
    """Return an unstructured field: as it is if a reader gets the same text back, else in encoded words."""
    if PLAIN.fullmatch(value) and "=?" not in value:
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
    """Return encoded words (RFC 2047) of whole characters and at most 75 columns; `used` columns of the first line are
    taken already."""
    encode, words, room, start = charset_encoder(charset), [], 76 - used, 0
    value = wide_kana(value) if charset == "ISO-2022-JP" else value  # else a sound mark could be split off
    overhead = len(charset) + 7
    while start < len(value) or not words:
        size = min(len(value) - start, room)
        coded = encode(value[start : start + size])
        while size > 1 and overhead + (len(coded) + 2) // 3 * 4 > room:
            size = max(1, min(size - 1, size * (room - overhead) * 3 // (4 * len(coded)) + 1))
            coded = encode(value[start : start + size])
        words.append(f"=?{charset}?B?{binascii.b2a_base64(coded, newline=False).decode()}?=")
        start, room = start + size, 75
    return words


def encode_body(text: str, charset: str) -> tuple:
    """Return (Content-Transfer-Encoding, octets) with CRLF and no line over 998 octets (RFC 5322 2.1.1)."""
    text = text if "\r" not in text else text.replace("\r\n", "\n").replace("\r", "\n")
    text = (text if text.endswith("\n") else text + "\n").replace("\n", "\r\n")
    octets = charset_encoder(charset)(text)
    if not NEEDS_ENCODING.search(octets):
        return "7bit", octets
    if charset == "ISO-2022-JP" and not octets.translate(None, JIS_OCTETS) and not LONG_LINE.search(octets):
        return "7bit", octets
    if charset != "UTF-8" or len(octets) < 2 * len(text):  # else most characters are other than ASCII
        quoted = len(octets) + 2 * len(octets.translate(None, QUOTED_AS_IS))
        if quoted * 77 // 74 < (len(octets) + 2) // 3 * 4 + (len(octets) + 56) // 57 * 2:
            return "quoted-printable", binascii.b2a_qp(octets, istext=True)
    return "base64", base64_lines(octets)


@functools.lru_cache(maxsize=64)
def charset_encoder(charset: str) -> Callable:
    """Return a function from text to octets, which raises UnicodeEncodeError if the charset can't hold the text."""
    return CHARSETS.get(charset) or functools.partial(_encode, codec_name(charset))


def _encode(codec: str, text: str) -> bytes:
    octets = text.encode(codec)
    with contextlib.suppress(UnicodeDecodeError):  # text with the control characters of ISO-2022-JP-2 or ISO-2022-KR
        if octets.decode(codec) == text:
            return octets
    raise UnicodeEncodeError(codec, text, 0, len(text), "no such character")  # EUC-JP turns a yen sign into a backslash


def encode_jis(text: str) -> bytes:
    """Encode ISO-2022-JP as CP50220 does: half-width kana become full-width, NEC's and IBM's characters stay."""
    if "\x1b" in text:  # a reader would take it for the start of a sequence
        raise UnicodeEncodeError("iso2022_jp", text, text.index("\x1b"), text.index("\x1b") + 1, "no character")
    with contextlib.suppress(UnicodeEncodeError):
        return text.translate(CP932_TO_JIS).encode("iso2022_jp")
    table, pattern = jis_extensions()
    runs = pattern.split(wide_kana(text).translate(CP932_TO_JIS))
    kanji = {run: b"\x1b$B%b\x1b(B" % b"".join(map(table.get, run)) for run in runs if run[:1] in table}
    return b"".join(kanji.get(run) or run.encode("iso2022_jp") for run in runs)


def wide_kana(text: str) -> str:
    """Return text with full-width kana for half-width ones."""
    import unicodedata

    marks = {0x3099: "゛", 0x309A: "゜"}  # those that stand alone
    return re.sub("[\uff61-\uff9f]+", lambda kana: unicodedata.normalize("NFKC", kana[0]).translate(marks), text)


@functools.lru_cache(maxsize=1)
def jis_extensions() -> tuple:
    """Return ({character: its two octets}, pattern that splits a text into runs of these and others) of NEC's row 13
    and IBM's characters in rows 89 to 92, which JIS X 0208 does not have."""
    table: dict = {}
    for row in (13, 89, 90, 91, 92):
        for cell in range(1, 95):
            octets = bytes((row + 0x20, cell + 0x20))
            with contextlib.suppress(ValueError):  # unassigned
                character = jis_bytes_to_text(octets)
                if not character.encode("iso2022_jp", "ignore"):
                    table.setdefault(character, octets)
    return table, re.compile(f"([{''.join(table)}]+)")


CHARSETS = {"UTF-8": str.encode, "ISO-2022-JP": encode_jis}  # others by Python's codecs


def complete_raw_message(
    raw: ParsedMessage, sender: str, loop: tuple, trace: str, queueid: str, hostname: str, now: float
) -> Message:
    """Complete a finished message: add trace and loop fields and required ones that are missing, remove Bcc. Its other
    octets stay as they are, unless no path can carry them; raise Rejected if nothing can be done about that."""
    names = {name for name, _ in raw.fields}
    dropped = ("bcc", "resent-bcc", "return-path", "x-haineko-loop")
    head = [trace.encode() + b"\n", *(octets for name, octets in raw.fields if name not in dropped)]
    author = sender or f"MAILER-DAEMON@{hostname}"
    missing = {"From": f"<{author}>", "Date": rfc5322_date(int(now)), "Message-Id": f"<{queueid}.1@{hostname}>"}
    head += [f"{name}: {value}\n".encode() for name, value in missing.items() if name.lower() not in names]
    head.append(loop_field(loop, hostname).encode() + b"\n")
    if not names & {"mime-version", "content-type", "content-transfer-encoding"}:
        head.append(mime_label(raw.body))
    octets = b"".join([*head, b"\n", raw.body, b"" if raw.body.endswith(b"\n") else b"\n"])
    octets = octets.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    if not octets.isascii() or UNSENDABLE.search(octets):
        octets = downgrade_8bit(octets, keep_8bit=True, keep_utf8=True)
        if UNSENDABLE.search(octets):
            raise Rejected(make_reply("line-length"))
    return Message((octets,), not octets.isascii(), bool(non_ascii_fields(octets)))


def mime_label(body: bytes) -> bytes:
    """Return the MIME fields for a body that came without; none if it is ASCII that every path can carry."""
    if body.isascii() and not UNSENDABLE.search(body):
        return b""
    charset = "unknown-8bit"  # RFC 1428
    if is_utf8(body):
        charset = "ISO-2022-JP" if b"\x1b$" in body else "US-ASCII" if body.isascii() else "UTF-8"
    return f"MIME-Version: 1.0\nContent-Type: text/plain; charset={charset}\nContent-Transfer-Encoding: 8bit\n".encode()


def non_ascii_fields(octets: bytes) -> list:
    """Return the names of the header fields, those of parts included, that need SMTPUTF8 (RFC 6532 3)."""
    parts = () if octets.isascii() else mime_parts(octets)
    return list(dict.fromkeys(name for part in parts for name, line in part.header if not line.isascii()))


def downgrade_8bit(octets: bytes, keep_8bit: bool = False, keep_utf8: bool = False) -> bytes:
    """Return the message with each part encoded where a path without 8BITMIME (RFC 6152 3) and SMTPUTF8 can't carry it;
    `keep_8bit` and `keep_utf8`: the path has them. What has no form in ASCII, such as an address, stays."""
    parts = list(mime_parts(octets))
    octets = rewrite_parts(octets, parts, functools.partial(_convert_part, parts[0], keep_8bit, keep_utf8), keep_8bit)
    return octets if octets.endswith(b"\r\n") else octets + b"\r\n"


def _convert_part(top: MIMEPart, keep_8bit: bool, keep_utf8: bool, part: MIMEPart, body: bytes) -> tuple:
    """Return (fields, body) of a part as the path can carry it."""
    header = []
    charset = part.parameter("charset") or top.parameter("charset")
    for name, octets in part.header:
        sendable = octets.isascii() or (keep_utf8 and is_utf8(octets))
        header.append((name, fold_long_lines(octets if sendable else encode_field(name, octets, charset))))
    if part.is_leaf and (UNSENDABLE if keep_8bit else NOT_7BIT).search(body):
        return encode_leaf(part, header, body)
    if not keep_8bit and part.encoding == "8bit":
        header = [item for item in header if item[0] != "content-transfer-encoding"]
    return header, body


def encode_field(name: str, octets: bytes, charset: str) -> bytes:
    """Return a field in ASCII, encoded as its grammar allows. Octets that are not UTF-8 are in the message's charset,
    or in an unknown one (RFC 1428). What can't be encoded, such as an address, stays."""
    label, _, value = octets.partition(b":")
    value = ENCODED_WORD_8BIT.sub(lambda word: re.sub(rb"[\x80-\xff]", lambda c: b"=%02X" % ord(c[0]), word[0]), value)
    if value.isascii():
        return label + b":" + value
    label, known, tokens = label.decode("ascii").strip(), decode_octets(value, charset), []
    encode = unknown_words if known is None else lambda piece: encoded_words(piece, "UTF-8", len(label) + 3)
    text = " ".join(re.split(r"[\r\n]+[ \t]*", (known or value.decode("latin-1")).strip()))
    if name in (*PARAMETER_FIELDS, *MAILBOX_FIELDS) or STRUCTURED_FIELDS.fullmatch(name):
        if name in PARAMETER_FIELDS:
            names = {found[1].lower() for found in PARAMETER.finditer(text)}
            text = PARAMETER.sub(functools.partial(_encode_parameter, names), text)
        text = encode_phrases(text, encode) if name in MAILBOX_FIELDS else text
        text = COMMENT_8BIT.sub(lambda found: f"({' '.join(encode(found[1]))})", text)
        tokens = text.split(" ") if name in MAILBOX_FIELDS else [text]
    else:
        for i, piece in enumerate(ENCODED_WORDS.split(text)):
            tokens += [piece] if i % 2 else encode(piece) if piece.strip() else []
    return fold(f"{label}:", tokens).encode() + b"\r\n"


def unknown_words(text: str) -> list:
    """Return encoded words for octets of an unknown charset (RFC 1428), which stand in a string as Latin-1."""
    pieces = re.findall(".{1,18}", text)
    coded = [re.sub("[^A-Za-z0-9]", lambda found: f"={ord(found[0]):02X}", piece) for piece in pieces]
    return [f"=?unknown-8bit?Q?{piece}?=" for piece in coded]


def encode_phrases(text: str, encode: Callable) -> str:
    """Return an address list with the names of mailboxes and groups in encoded words where they are not ASCII."""
    out, phrase = [], []  # phrase: the tokens since the last mark, address or comment
    for found in ADDRESS_TOKEN.finditer(text):
        if found.lastgroup in ("atom", "quoted", "blank"):
            phrase.append(found[0])
            continue
        name = "".join(phrase)
        if not name.isascii() and "@" not in name:
            blank = " " * name[:1].isspace()
            name = blank + " ".join(encode("".join(map(unquote, phrase)).strip()))
            name += " " * (found[0][:1] in ("<", "("))
        out += [name, found[0]]
        phrase = []
    return "".join(out)


def decode_octets(octets: bytes, charset: str) -> str | None:
    """Decode octets of a header: UTF-8, else the charset; None if they are neither."""
    for codec in ("utf-8", codec_name(iana_charset(charset))):
        with contextlib.suppress(UnicodeDecodeError, LookupError):
            return octets.decode(codec)
    return None


def _encode_parameter(names: set, found: re.Match) -> str:
    if found[0].isascii():
        return found[0]
    if names & {f"{found[1].lower()}*", f"{found[1].lower()}*0*"}:
        return ""  # the extended form says it already, and a name may come once
    if found[1].endswith("*") and found[2].lower().startswith("utf-8'"):
        return re.sub(r"[^\x00-\x7f]+", lambda octets: urllib.parse.quote(octets[0]), found[0])
    return rfc2231_parameter(found[1].rstrip("*"), unquote(found[2].strip()), "UTF-8")


def encode_leaf(part: MIMEPart, header: list, body: bytes) -> tuple:
    """Return (fields, body) of a part in base64, or in quoted-printable if it is text (RFC 2045 6)."""
    if part.encoding == "base64":
        data = body.translate(None, NOT_BASE64)
        data = data[: len(data) - (len(data) % 4 == 1)]
        body = binascii.a2b_base64(data + b"=" * (-len(data) % 4))
    elif part.encoding == "quoted-printable":
        body = binascii.a2b_qp(body)
    if part.is_text and part.encoding != "base64":
        # b2a_qp() writes line ends as the first line has them.
        return set_encoding(header, "quoted-printable"), binascii.b2a_qp(body + b"\r\n", istext=True)[:-2]
    return set_encoding(header, "base64"), base64_lines(body)[:-2]


# ======================================================================================================================
# 8. Routes
#    Takes domains of recipient and sender, gives the Route of the settings and the table row that it comes from.
# ======================================================================================================================

FALLBACK_ROUTE = Route(port=25)


def resolve_route(domain: str, sender_domain: str, settings: Settings) -> tuple:
    """Return (Route, reason) for mail to `domain`; the look-up costs as much as the domain has labels."""
    tables = (("mailertable", settings.mailertable, domain), ("sendermt", settings.sendermt, sender_domain))
    for name, table, key in tables:
        for row in lookup_keys(key.lower()) if table else ():
            if row in table:
                return table[row], f'{name}["{row}"]'
    for name, table, _ in tables:
        if "default" in table:
            return table["default"], f"{name}.default"
    return FALLBACK_ROUTE, "no route matches"


# ======================================================================================================================
# 9. Event loop
#    asyncio's loop, with sockets that may speak TLS (smtplib's, which asyncio refuses), and data that leaves when the
#    log has the lines about it.
# ======================================================================================================================

MAX_THREADS = 256  # one dead host can hold 32 of them, while sessions to it are opened
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
        self.set_default_executor(ThreadPoolExecutor(MAX_THREADS))
        self.set_exception_handler(log_task_fault)

    def create_task(self, coroutine: Any, **options: Any) -> asyncio.Task:
        task = super().create_task(coroutine, **options)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def flush_sends(self) -> None:
        """Send the data of one iteration, after the log lines about it."""
        log.flush()
        sends, self.sends = self.sends, []
        for sock in sends:
            sock.flush()


# -- Limits shared by all processes of a server


class RateState(NamedTuple):
    """What a limiter answers: how long to wait (0: taken), what is left, and when all of it is back, in seconds."""

    wait: float
    remaining: int
    reset: float


class SharedLimits:
    """Limits over all processes of a server: rates (GCRA) and counts of open sessions. Made before the workers fork.

    A rate is one number in shared memory: the theoretical arrival time of the next unit. A session is a lock on one
    octet of a file without a name, so that the kernel gives back those of a process that died.
    """

    SLOTS, PROBES = 4096, 16  # cells of the table; how many are looked at for one key
    MAX_SESSIONS = 1 << 16  # octets that one route may lock
    TABLE_LOCK = 0  # octet locked while the table is read and written; the sessions' octets follow

    def __init__(self) -> None:
        self.cells = memoryview(mmap.mmap(-1, 16 * self.SLOTS)).cast("q")  # (fingerprint, arrival time in us)
        import tempfile

        in_memory = functools.partial(os.memfd_create, "haineko") if hasattr(os, "memfd_create") else None
        self.file: Any = (in_memory or tempfile.TemporaryFile)()
        self.lock = threading.Lock()  # locks of files hold between processes only
        self.sessions: set = set()  # octets locked by this process; fcntl does not report a process's own locks

    def take(self, key: str, count: int, rate: Rate, block: int = 0) -> RateState:
        """Take `count` units from the key's budget, or none if there are not enough of them yet, and then none for
        another `block` seconds."""
        with self.lock:
            return self._take(key, count, rate, block, time.monotonic())

    def _take(self, key: str, count: int, rate: Rate, block: int, now: float) -> RateState:
        fingerprint, each = _fingerprint(key), rate.seconds / rate.limit
        fcntl.lockf(self.file, fcntl.LOCK_EX, 1, self.TABLE_LOCK)
        try:
            cell = self._cell(fingerprint, now)
            before = max(self.cells[cell + 1] / 1e6, now) if self.cells[cell] == fingerprint else now
            after = before + each * min(count, rate.limit)
            wait = max(after - now - rate.seconds, 0.0)
            wait = 0.0 if wait < 1e-6 else wait
            if block and wait and before <= now + rate.seconds:  # it was not blocked yet
                before, wait = now + rate.seconds + block - each, float(block)
                self.cells[cell + 1] = int(before * 1e6)
            if not wait:
                self.cells[cell], self.cells[cell + 1] = fingerprint, int(after * 1e6)
        finally:
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, self.TABLE_LOCK)
        used = (before if wait else after) - now
        return RateState(wait, max(int((rate.seconds - used) / each + 1e-6), 0), used)

    def _cell(self, fingerprint: int, now: float) -> int:
        """Return the index of the key's cell: its own, else the one among its places that is free or due first."""
        places = [2 * ((fingerprint + i) % self.SLOTS) for i in range(self.PROBES)]
        own = [place for place in places if self.cells[place] == fingerprint]
        return own[0] if own else min(places, key=lambda place: self.cells[place + 1])

    def open_session(self, key: str, limit: int) -> int:
        """Lock one of the key's `limit` octets and return it; 0 where all are taken."""
        first = 1 + _fingerprint(key) % (1 << 44) * self.MAX_SESSIONS
        for octet in range(first, first + limit):
            if octet not in self.sessions:
                try:
                    fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, octet)
                except OSError:
                    continue
                self.sessions.add(octet)
                return octet
        return 0

    def close_session(self, octet: int) -> None:
        """Give back what open_session() gave."""
        self.sessions.discard(octet)
        fcntl.lockf(self.file, fcntl.LOCK_UN, 1, octet)

    def __del__(self) -> None:
        os.close(self.file) if isinstance(self.file, int) else self.file.close()


@functools.lru_cache(maxsize=4096)
def _fingerprint(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big") | 1


# -- Tasks and sockets


def log_task_fault(_: Any, context: dict) -> None:
    """Log the exception of a task that nobody awaits."""
    try:
        raise context.get("exception") or RuntimeError(context["message"])
    except BaseException:
        log_exception("loop")


class AsyncSocket:
    """Non-blocking socket, plain or TLS, for which one task at a time waits; deadlines are monotonic times.

    It stays registered with the loop until an event finds nothing to do, and has one timer, set again when it fires:
    so a wait costs no system call, and an idle connection nothing. Release or close it before its number is reused.
    """

    HIGH_WATER = 16  # buffers that may wait to be sent while the task goes on

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
        """Send octets in the next iteration: peers wake once for many, which saves a fifth of the CPU time.

        Only much data is waited for: if little can't be sent, the next recv() tells why.
        """
        if not self.outbox:
            if not self.loop.sends:
                self.loop.call_soon(self.loop.flush_sends)
            self.loop.sends.append(self)
        self.outbox.append(octets)
        if len(octets) > LARGE or len(self.outbox) > self.HIGH_WATER:
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
                octets = self.outbox[0]
                sent = self.sock.send(octets)
                self.outbox[:1] = [memoryview(octets)[sent:]] if sent < len(octets) else []
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
        if self.future and not self.future.done():
            raise RuntimeError("two tasks wait for one socket")
        if deadline <= time.monotonic():
            raise socket.timeout("timed out")
        if not self.watched[writing]:
            self._watch(writing)
        self.future, self.operation = self.loop.create_future(), operation
        self.deadline, self.writing = deadline, writing
        if deadline < self.alarm:
            self._set_timer(deadline)
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

    def _set_timer(self, alarm: float) -> None:
        if self.timer:
            self.timer.cancel()
        self.alarm, self.timer = alarm, self.loop.call_at(alarm, self._expire) if alarm < math.inf else None

    def _expire(self) -> None:
        late = self.deadline <= time.monotonic()  # or it was set for an earlier wait
        waiting = self.future and not self.future.done()
        self._set_timer(self.deadline if waiting and not late else math.inf)
        if late:
            self.abort(socket.timeout("timed out"))

    def abort(self, error: Exception) -> bool:
        """Raise an exception in the task that waits; False if none does."""
        if not self.future or self.future.done():
            return False
        self.future.set_exception(error)
        return True

    def release(self) -> None:
        """Unregister; the socket itself stays open."""
        self.abort(ConnectionAbortedError("closed"))
        self._watch(False, on=False)
        self._watch(True, on=False)
        self._set_timer(math.inf)

    def close(self) -> None:
        self.release()
        self.sock.close()


# ======================================================================================================================
# 10. DNS and connections
#     Takes a name and a record type, gives the answer of the name servers (RFC 1035); from that come a domain's mail
#     hosts (RFC 5321 5.1) and a host's addresses. A Connector connects to whichever address answers first. DNS
#     messages are built and parsed by functions that know no socket. Everything received is checked before use.
# ======================================================================================================================

random_unit = random.SystemRandom().random  # an unpredictable number from 0 up to 1
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052

A, CNAME, SOA, MX, TXT, AAAA = 1, 5, 6, 15, 16, 28  # record types
NOERROR, SERVFAIL, NXDOMAIN = 0, 2, 3  # RFC 1035 4.1.1, "RCODE"
RCODES = {1: "FORMERR", 2: "SERVFAIL", 4: "NOTIMP", 5: "REFUSED"}
RESOLV_CONF = "/etc/resolv.conf"
MAX_NAME = 253  # characters
MAX_POINTERS = 127  # of a compressed name; as many as it can have labels
MAX_RECORDS = 512  # of one message
MAX_ALIASES = 8  # CNAME records followed for one answer
MAX_STRAY_DATAGRAMS = 64  # datagrams received that do not answer the query


class DNSAnswer(NamedTuple):
    """The values of a name's records of one type."""

    code: int  # NOERROR, NXDOMAIN, or SERVFAIL if no name server gave an answer
    values: tuple = ()  # A, AAAA: address; MX: (preference, host); TXT: text. Empty if there is no such record
    why: str = ""  # the reason for SERVFAIL


class ResourceRecord(NamedTuple):
    name: str
    rtype: int  # 0 if malformed or of another class
    ttl: int  # seconds
    value: Any  # as in DNSAnswer; CNAME: name; SOA: seconds for which a negative answer may be cached


class DNSMessage(NamedTuple):
    """One response of a name server."""

    code: int
    truncated: bool = False
    answers: Any = ()  # of ResourceRecord
    authority: Any = ()


class TTLCache:
    """TTL cache with LRU eviction."""

    def __init__(self, limit: int, clock: Callable) -> None:
        self.limit, self.clock, self.table = limit, clock, OrderedDict()

    def get(self, key: Any) -> Any:
        """Return the value, None if there is none or it has expired."""
        value, until = self.table.get(key, (None, 0.0))
        if until <= self.clock():
            self.table.pop(key, None)
            return None
        self.table.move_to_end(key)
        return value

    def put(self, key: Any, value: Any, seconds: float) -> None:
        if seconds > 0:
            self.table[key] = value, self.clock() + seconds
            if len(self.table) > self.limit:
                self.table.popitem(last=False)


async def shared_call(calls: dict, key: Any, function: Callable, *values: Any) -> Any:
    """Return what function(*values) returns; concurrent calls with the same key, in `calls`, share one call."""
    if key not in calls:
        calls[key] = asyncio.get_running_loop().create_task(function(*values))
        calls[key].add_done_callback(lambda _: calls.pop(key))
    return await asyncio.shield(calls[key])


def error_text(error: Exception) -> str:
    """Describe an exception, for a reply."""
    return sanitize(getattr(error, "strerror", None) or str(error) or type(error).__name__)


class Resolver:
    """Caching DNS client of the given name servers, or of those in resolv.conf."""

    QUERY_TIMEOUT = 3.0  # seconds for one server to answer
    ATTEMPTS = 3  # rounds in which each server is asked
    MAX_TTL = 86400  # seconds

    def __init__(self, nameservers: tuple = (), clock: Callable = time.monotonic) -> None:
        self.nameservers = nameservers
        self.cache, self.calls = TTLCache(4096, clock), {}

    async def lookup(self, name: str, rtype: int, deadline: float) -> DNSAnswer:
        """Return the records of a type, following aliases, by the deadline (monotonic)."""
        key = name.lower().rstrip("."), rtype
        answer = self.cache.get(key)
        if not answer:
            answer, ttl = await shared_call(self.calls, key, self._lookup, *key, deadline)
            self.cache.put(key, answer, ttl)
        return answer

    def servers(self) -> tuple:
        """Return (address, port) of each name server in the order in which they are asked."""
        return tuple(map(name_server_endpoint, self.nameservers)) or resolv_conf_servers(RESOLV_CONF)

    async def _lookup(self, name: str, rtype: int, deadline: float) -> tuple:
        """Return (DNSAnswer, TTL). Each alias is asked for: an answer counts for its own name alone."""
        ttl = self.MAX_TTL
        for _ in range(MAX_ALIASES + 1):
            response = await self._query(name, rtype, deadline)
            if isinstance(response, str):
                return DNSAnswer(SERVFAIL, (), response), 0
            own = [record for record in response.answers if record.name == name and record.rtype in (rtype, CNAME)]
            found = tuple(record.value for record in own if record.rtype == rtype)
            if not own:
                negative = [min(record.ttl, record.value) for record in response.authority if record.rtype == SOA]
                return DNSAnswer(response.code), min([ttl, *negative]) if negative else 0  # RFC 2308 5
            ttl = min([ttl, *[record.ttl for record in own]])
            if found:
                return DNSAnswer(NOERROR, found), ttl
            name = own[0].value
        return DNSAnswer(SERVFAIL, (), f"more than {MAX_ALIASES} aliases"), 0

    async def _query(self, name: str, rtype: int, deadline: float) -> DNSMessage | str:
        """Return the first positive or negative answer, or the reason why there is none."""
        if len(name) > MAX_NAME:
            return DNSMessage(NXDOMAIN)
        why = "no name server is known"
        for server in self.servers() * self.ATTEMPTS:
            until = min(deadline, time.monotonic() + self.QUERY_TIMEOUT)
            question = int(random_unit() * 65536), name, rtype
            try:
                response = await query_udp(server, question, until)
                if response.truncated:  # RFC 7766 5
                    response = await query_tcp(server, question, until)
                if response.code in (NOERROR, NXDOMAIN):
                    return response
                why = f"{server[0]} answers {RCODES.get(response.code, response.code)}"
            except (OSError, ValueError) as error:
                why = f"{server[0]}: {error_text(error)}"
            if time.monotonic() >= deadline:
                break
        return why


def resolv_conf_servers(path: str) -> tuple:
    """Return (address, port) of the first three name servers in resolv.conf; this machine if it names none."""
    try:
        with open(path, encoding="ascii", errors="replace") as stream:
            named = re.findall(r"(?m)^nameserver[ \t]+(\S+)", stream.read())
    except OSError:
        named = []
    endpoints = [endpoint for endpoint in map(name_server_endpoint, named) if endpoint]
    return tuple(endpoints[:3]) or (("127.0.0.1", 53),)


async def query_udp(server: tuple, question: tuple, until: float) -> DNSMessage:
    """Return the response to (number, name, type); datagrams that do not match it are ignored (RFC 5452 9.1)."""
    sock = start_connect(server, socket.SOCK_DGRAM)  # from a random port; the kernel drops datagrams of other senders
    with contextlib.closing(AsyncSocket(sock)) as sock:
        await sock.sendall(build_query(*question), until)
        for _ in range(MAX_STRAY_DATAGRAMS):
            octets = await sock.recv(65535, until)
            try:
                return parse_response(octets, *question)
            except ValueError:  # forged, late or garbled: the real answer may still come
                pass
        raise ValueError("too many datagrams that do not answer the query")


async def query_tcp(server: tuple, question: tuple, until: float) -> DNSMessage:
    """Return the response to (number, name, type); each message has its length in front (RFC 1035 4.2.2)."""
    query = build_query(*question)
    with contextlib.closing(AsyncSocket(start_connect(server))) as sock:
        await sock.wait_ready(until, writing=True)
        await sock.sendall(len(query).to_bytes(2, "big") + query, until)
        octets = b""
        while len(octets) < 2 or len(octets) < 2 + int.from_bytes(octets[:2], "big"):
            more = await sock.recv(65537 - len(octets), until)
            if not more:
                raise ConnectionError("closed within an answer")
            octets += more
        return parse_response(octets[2:], *question)


def start_connect(address: tuple, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """Return a non-blocking socket that is being connected to (IP address, port)."""
    sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, kind)
    try:
        sock.setblocking(False)
        sock.connect(address)
    except BlockingIOError:
        pass
    except OSError:
        sock.close()
        raise
    return sock


def build_query(number: int, name: str, rtype: int) -> bytes:
    """Return a query to a recursive server (RFC 1035 4.1)."""
    labels = [label.encode("ascii") for label in name.split(".")] if name else []
    qname = b"".join([bytes((len(label),)) + label for label in labels])
    return struct.pack(">6H", number, 0x0100, 1, 0, 0, 0) + qname + b"\0" + struct.pack(">HH", rtype, 1)


def parse_response(octets: bytes, number: int, name: str, rtype: int) -> DNSMessage:
    """Parse the response to that query; ValueError if it answers another one or is malformed."""
    try:
        found, flags, questions, answers, authority, _ = struct.unpack_from(">6H", octets)
        code, (qname, at) = flags & 15, read_name(octets, 12)
        if (found, flags >> 15, questions, qname) != (number, 1, 1, name.lower()):
            raise ValueError("not an answer to this query")
        if struct.unpack_from(">HH", octets, at) != (rtype, 1):
            raise ValueError("an answer to another query")
        truncated = bool(flags & 0x0200)
        if truncated or answers + authority > MAX_RECORDS:
            return DNSMessage(code if truncated else SERVFAIL, truncated)
        records, at = [], at + 4
        for _ in range(answers + authority):
            record, at = read_record(octets, at)
            records.append(record)
    except (struct.error, IndexError):
        raise ValueError("incomplete message") from None
    return DNSMessage(code, False, records[:answers], records[answers:])


def read_record(octets: bytes, at: int) -> tuple:
    """Return (ResourceRecord, offset behind it)."""
    name, at = read_name(octets, at)
    rtype, rclass, ttl, length = struct.unpack_from(">HHIH", octets, at)
    at += 10
    data, after = octets[at : at + length], at + length
    if len(data) < length:
        raise ValueError("incomplete record")
    value: Any = None
    if (rtype, length) in ((A, 4), (AAAA, 16)):
        value = str(ipaddress.ip_address(data))
    elif rtype == CNAME:
        value = read_name(octets, at)[0]
    elif rtype == MX:
        value = int.from_bytes(data[:2], "big"), read_name(octets, at + 2)[0]
    elif rtype == TXT:
        value = read_text(data)
    elif rtype == SOA:
        value = int.from_bytes(data[-4:], "big")
    if rclass != 1 or value is None:
        rtype = 0
    return ResourceRecord(name, rtype, ttl if ttl < 1 << 31 else 0, value), after  # RFC 2181 8


def read_name(octets: bytes, at: int) -> tuple:
    """Return (name in lower case without a final dot, offset behind it). RFC 1035 4.1.4"""
    labels, after, jumps = [], 0, 0
    while octets[at]:
        length = octets[at]
        if length >= 0xC0:
            after, jumps = after or at + 2, jumps + 1
            target = int.from_bytes(octets[at : at + 2], "big") & 0x3FFF
            if target >= at or jumps > MAX_POINTERS:  # a pointer goes back, so there is no endless loop
                raise ValueError("bad compression pointer")
            at = target
            continue
        label = octets[at + 1 : at + 1 + length]
        if length > 63 or len(label) < length:
            raise ValueError("bad label")
        labels.append(label.decode("latin-1").lower().replace(".", "\\."))
        at += 1 + length
        if len(labels) > MAX_POINTERS:
            raise ValueError("name too long")
    return ".".join(labels), after or at + 1


def read_text(data: bytes) -> str:
    """Return the strings of a TXT record, concatenated (RFC 7208 3.3)."""
    parts, at = [], 0
    while at < len(data):
        parts.append(data[at + 1 : at + 1 + data[at]])
        at += 1 + data[at]
    return b"".join(parts).decode("utf-8", "replace")


async def mx_hosts(domain: str, resolver: Resolver, hostname: str, deadline: float) -> list:
    """Return a domain's mail hosts, best first (RFC 5321 5.1); Rejected if it has none."""
    if domain.startswith("["):  # an address literal
        return [domain[1:-1].partition(":")[2] if domain[:6].lower() == "[ipv6:" else domain[1:-1]]
    answer = await resolver.lookup(domain, MX, deadline)
    hosts = by_preference(answer.values, hostname, random_unit) if answer.values else [domain]
    null = answer.values and not any(host for _, host in answer.values)
    slug = {SERVFAIL: "dns", NXDOMAIN: "no-domain"}.get(answer.code) or ("null-mx" if null else "mx-loop")
    if answer.code != NOERROR or not hosts:
        raise Rejected(make_reply(slug, f"{domain}: {answer.why}" if answer.why else domain, mailer="MX"))
    return hosts


def by_preference(values: tuple, hostname: str, rng: Callable) -> list:
    """Return host names, equal ones in random order, without this host and those behind it (RFC 5321 5.1)."""
    own = min([preference for preference, host in values if host == hostname.lower()], default=1 << 16)
    usable = [(preference, rng(), host) for preference, host in values if preference < own and DOMAIN.fullmatch(host)]
    return list(dict.fromkeys(host for _, _, host in sorted(usable)))


async def resolve_addresses(host: str, resolver: Resolver, private: bool, deadline: float) -> list:
    """Return a host's IP addresses, only public ones unless `private`; Rejected if it has none."""
    try:
        found = [str(ipaddress.ip_address(host))]
    except ValueError:
        # IPv4 first: large receivers demand more of senders that use IPv6.
        both = [await resolver.lookup(host, rtype, deadline) for rtype in (A, AAAA)]
        found = [value for answer in both for value in answer.values]
        if not found and SERVFAIL in (both[0].code, both[1].code):
            why = both[0].why or both[1].why
            raise Rejected(make_reply("dns", f"{host}: {why}", mailer="MX")) from None
    usable = [address for address in found if private or is_public(address)]
    if not usable:
        why = f"{host}: {found[0]} is not a public address" if found else f"{host}: no address"
        raise Rejected(make_reply("no-address", why, mailer="MX"))
    return usable


def is_public(text: str) -> bool:
    """Return whether an address is globally reachable; of an embedded IPv4 address, that one counts."""
    address = ipaddress.ip_address(text)
    address = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
    if address in NAT64:
        address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.is_global and not address.is_multicast and not getattr(address, "is_site_local", False)


class Connector:
    """Opens TCP connections, in the caller's thread, and remembers which addresses did not answer."""

    DELAY = 0.25  # seconds until the next address is tried as well, RFC 8305 5
    FAILED_TTL = 300.0  # seconds for which an address that failed is tried last

    def __init__(self) -> None:
        self.failed: dict = {}  # (IP address, port): time until which it is tried last

    def connect(self, host: str, port: int, deadline: float) -> socket.socket:
        """Connect to the address of a host that answers first, by the deadline (RFC 8305)."""
        addresses = self.in_order([(address, port) for address in self.look_up(host, deadline)])
        attempts: dict = {}  # file descriptor: (socket, address)
        poll, error = select.poll(), socket.timeout("timed out")
        try:
            while (addresses or attempts) and (seconds := deadline - time.monotonic()) > 0:
                if addresses and (failure := self._start(addresses.pop(0), attempts, poll)):
                    error = failure
                    continue
                for descriptor, _ in poll.poll(1000 * (min(seconds, self.DELAY) if addresses else seconds)):
                    poll.unregister(descriptor)
                    sock, address = attempts.pop(descriptor)
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if not code:
                        self.failed.pop(address, None)
                        sock.setblocking(True)
                        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        return sock
                    sock.close()
                    error = self._failed(address, OSError(code, os.strerror(code)))
        finally:
            for sock, address in attempts.values():
                sock.close()
                self._failed(address)
        raise error

    def in_order(self, addresses: list) -> list:
        """Return the addresses with their families in turn, those that failed lately last."""
        families: dict = {4: 0, 6: 0}
        ranked = []
        for address in addresses:
            version = ipaddress.ip_address(address[0]).version
            families[version] += 1
            ranked.append((self.failed_lately(address), families[version], len(ranked), address))
        return [address for *_, address in sorted(ranked)]

    def _start(self, address: tuple, attempts: dict, poll: Any) -> OSError | None:
        """Begin to connect; return why that cannot be."""
        try:
            sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
            sock.setblocking(False)
            code = sock.connect_ex(address)
        except OSError as failure:  # this kernel has no IPv6
            return self._failed(address, failure)
        if code not in (0, errno.EINPROGRESS):
            sock.close()
            return self._failed(address, OSError(code, os.strerror(code)))
        attempts[sock.fileno()] = sock, address
        poll.register(sock, select.POLLOUT)
        return None

    def _failed(self, address: tuple, failure: Any = None) -> Any:
        """Have an address tried last for a while; return the failure."""
        if len(self.failed) > 1024:
            self.failed.clear()
        self.failed[address] = time.monotonic() + self.FAILED_TTL
        return failure

    def failed_lately(self, address: tuple) -> bool:
        return self.failed.get(address, 0.0) > time.monotonic()

    def look_up(self, host: str, deadline: float) -> list:
        """Return a host's IP addresses, or those that stand in its place, divided by spaces. getaddrinfo() runs in a
        thread of its own, as it takes no deadline."""
        with contextlib.suppress(ValueError):
            return [str(ipaddress.ip_address(address)) for address in host.split()]
        future: concurrent.futures.Future = concurrent.futures.Future()
        threading.Thread(target=self._look_up, args=(host, future), daemon=True).start()
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
#     MTA-STS policies (RFC 8461) are fetched by it; otherwise it knows nothing of mail.
# ======================================================================================================================

CHUNK = 65536  # octets sent or read in one step
MAX_RESPONSE_HEAD = 65536  # octets, interim responses and trailers included
MAX_POLICY = 65536  # octets


class HTTPTarget(NamedTuple):
    """A web server and how to talk to it."""

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
        """Return the JSON value in the body, None if it is not JSON."""
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
        """Return the response. A kept connection that died before the request was sent is replaced once."""
        connection = self._acquire(target)
        try:
            response = await asyncio.to_thread(connection.exchange, request)
        except Rejected:
            if connection.sent or not connection.expires:
                raise
            connection = KeepAliveConnection(target)
            response = await asyncio.to_thread(connection.exchange, request)
        self._release(connection)
        return response

    def _acquire(self, target: HTTPTarget) -> KeepAliveConnection:
        """Return an idle connection that the server has not closed, or a new one."""
        idle, now = self.idle.get(target, []), time.monotonic()
        while idle:
            connection = idle.pop()
            if now < connection.expires and not is_readable(connection.sock):
                return connection
            connection.close()
        return KeepAliveConnection(target)

    def _release(self, connection: KeepAliveConnection) -> None:
        """Keep the connection, or close it if it cannot be used again."""
        idle = self.idle.setdefault(connection.target, [])
        if connection.sock and len(idle) < self.MAX_IDLE:
            connection.expires = time.monotonic() + self.IDLE
            idle.append(connection)
        else:
            connection.close()

    def sweep(self, everything: bool = False) -> None:
        """Close the connections that have expired, or all."""
        now = time.monotonic()
        for target, idle in list(self.idle.items()):
            for connection in [item for item in idle if everything or now >= item.expires]:
                idle.remove(connection)
                connection.close()
            if not idle:
                del self.idle[target]


class KeepAliveConnection(http.client.HTTPConnection):
    """Connection to a target. `sent`: a request was sent as a whole and may have been acted upon."""

    def __init__(self, target: HTTPTarget) -> None:
        self.url = split_base_url(target.url)
        super().__init__(self.url.host, self.url.port)
        self.target, self.sent = target, False
        self.deadline, self.expires = time.monotonic() + target.timeout, 0.0  # when an idle connection is closed

    def exchange(self, request: HTTPRequest) -> HTTPResponse:
        """Return the response; Rejected if there is none. Blocks."""
        self.deadline, self.sent, response = time.monotonic() + self.target.timeout, False, None
        if not self.sock:
            self.open()
        try:
            self._send_request(request)
            response = self._read_response()
        except (OSError, http.client.HTTPException) as error:
            slug = "web-lost" if not self.sent else "web-unsure" if isinstance(error, OSError) else "web-rubbish"
            reply = make_reply(slug, error_text(error), maybe_delivered=self.sent, **self.target.endpoint)
            raise Rejected(reply) from None
        finally:
            if not (response and self.sent):
                self.close()
        log.dialogue(self.url.host_header, "<", f"{response.status} {response.reason}, {len(response.body)} octets")
        return response

    def open(self) -> None:
        """Connect, with TLS if the URL says so."""
        target, site = self.target, self.url
        try:
            self.sock = connector.connect(target.address or site.host, site.port, self.deadline)
            self.sock.settimeout(self.seconds_left())  # of the whole handshake
            if site.tls:
                context = client_context(target.tls_verify, target.ca_file, stat_key(target.ca_file))
                self.sock = context.wrap_socket(self.sock, server_hostname=site.host)
            elif target.confidential and parse_ip(self.sock.getpeername()[0]) not in LOOPBACK:
                self.close()
                raise Rejected(make_reply("clear-auth", **target.endpoint))
        except OSError as error:
            slug = "web-tls" if self.sock and site.tls else "web-connect"
            self.close()
            raise Rejected(make_reply(slug, error_text(error), **target.endpoint)) from None

    def seconds_left(self) -> float:
        """Return the time until the deadline; socket.timeout if it has passed, however fast the peer still sends."""
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise socket.timeout("timed out")
        return seconds

    def _send_request(self, request: HTTPRequest) -> None:
        path = self.url.path + request.path
        log.dialogue(self.url.host_header, ">", f"{request.method} {path}, {len(request.body)} octets")
        self.putrequest(request.method, path, skip_host=True, skip_accept_encoding=True)
        headers = {"Host": self.url.host_header, "User-Agent": f"Haineko/{__version__}"}
        headers.update({"Accept": "application/json, */*;q=0.5", **dict(request.headers)})
        if request.method == "POST":
            headers.update({"Content-Type": request.type, "Content-Length": str(len(request.body))})
        for name, value in headers.items():
            self.putheader(name, value.encode())  # of a string, http.client would make Latin-1
        try:
            self.endheaders(request.body or None)
            self.sent = True
        except (BrokenPipeError, ConnectionResetError):  # the server may have said why it hung up
            pass

    def send(self, octets: bytes) -> None:
        """Send data; http.client calls this."""
        for start in range(0, len(octets), CHUNK):
            self.sock.settimeout(self.seconds_left())
            self.sock.sendall(octets[start : start + CHUNK])

    def _read_response(self) -> HTTPResponse:
        response, body, whole = self.getresponse(), b"", False
        try:
            while chunk := response.read(CHUNK):
                body += chunk
            whole = not response.length and len(body) <= self.target.max_response
        except (OSError, http.client.HTTPException):  # the status has come, and may be all that is needed
            pass
        if not whole:
            response.close()
            self.close()
        reason = sanitize(response.reason, 100)
        return HTTPResponse(response.status, reason, response.headers, body if whole else b"")

    def response_class(self, sock: Any, *args: Any, **options: Any) -> LimitedResponse:
        """Make the object that reads the response; http.client calls this."""
        response = LimitedResponse(sock, *args, **options)
        response.fp = io.BufferedReader(LimitedReader(self, response.fp.detach()))
        return response


class LimitedResponse(http.client.HTTPResponse):
    def _read_status(self) -> tuple:
        """Skip interim responses (RFC 9110 15.2), of which http.client knows 100 only."""
        found = super()._read_status()
        while 100 <= found[1] < 200:
            http.client.parse_headers(self.fp)
            found = super()._read_status()
        return found


class LimitedReader(io.RawIOBase):
    """Reads by the connection's deadline, and no more octets than a response may have: interim responses, trailers and
    a body that never end are cut off."""

    def __init__(self, connection: KeepAliveConnection, raw: Any) -> None:
        self.connection, self.raw, self.sock = connection, raw, connection.sock
        self.limit = connection.target.max_response + MAX_RESPONSE_HEAD

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.sock.settimeout(self.connection.seconds_left())
        count = self.raw.readinto(buffer)
        self.limit -= count
        if self.limit < 0:
            raise http.client.HTTPException(f"more than {self.connection.target.max_response} octets")
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


def is_readable(sock: Any) -> bool:
    """Return whether an idle connection was closed by the peer, or has data that nothing asked for."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def json_object(response: HTTPResponse) -> dict:
    """Return the JSON object in a response; {} if it has none."""
    document = response.document()
    return document if isinstance(document, dict) else {}


def status_text(response: HTTPResponse) -> str:
    """Return the response's status line for people."""
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

    def __init__(self, resolver: Resolver, port: int = 443, clock: Callable = time.monotonic) -> None:
        self.resolver, self.port, self.calls = resolver, port, {}
        self.cache, self.failed = TTLCache(4096, clock), TTLCache(4096, clock)

    async def policy_for(self, domain: str, route: Route) -> MTASTSPolicy | None:
        """Return the domain's policy; the cached one if DNS or the web server fails: an attacker could cause that."""
        deadline = time.monotonic() + min(route.timeout, self.FETCH_TIMEOUT)
        return await shared_call(self.calls, (domain, route), self._policy_for, domain, route, deadline)

    async def _policy_for(self, domain: str, route: Route, deadline: float) -> MTASTSPolicy | None:
        policy_id, (cached_id, cached) = "", self.cache.get(domain) or ("", None)
        if not domain.startswith("["):
            policy_id = mta_sts_id((await self.resolver.lookup(f"_mta-sts.{domain}", TXT, deadline)).values)
        if policy_id in ("", cached_id) or self.failed.get((domain, policy_id)):
            return cached
        try:
            policy = await self._fetch(f"mta-sts.{domain}", route, deadline)
        except (OSError, ValueError, Rejected) as error:
            why = ": ".join(error.reply.message) if isinstance(error, Rejected) else str(error)
            log.lines(f"cannot fetch the MTA-STS policy of {domain}: {sanitize(why)}", level="warning")
            self.failed.put((domain, policy_id), True, self.NEGATIVE_TTL)
            return cached
        self.cache.put(domain, (policy_id, policy), policy.max_age)
        return policy

    async def _fetch(self, host: str, route: Route, deadline: float) -> MTASTSPolicy:
        """Fetch a policy; redirections are not followed (RFC 8461 3.3)."""
        address = (await resolve_addresses(host, self.resolver, route.private, deadline))[0]
        url, seconds = f"https://{host}:{self.port}", deadline - time.monotonic()
        target = HTTPTarget(url, seconds, "MX", True, route.ca_file, False, address, MAX_POLICY)
        request = HTTPRequest("GET", "/.well-known/mta-sts.txt")
        with contextlib.closing(KeepAliveConnection(target)) as connection:
            response = await asyncio.to_thread(connection.exchange, request)
        if response.status != 200:
            raise ValueError(f"HTTP status {response.status}")
        return parse_mta_sts_policy(response.body.decode("utf-8", "replace"))


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
    if values.get("version") != "STSv1" or mode not in ("enforce", "testing", "none") or (mode != "none" and not hosts):
        raise ValueError("not an MTA-STS policy")
    if not re.fullmatch(r"[0-9]{1,10}", age):
        raise ValueError("max_age is not a number")
    return MTASTSPolicy(mode, hosts, min(int(age), 31557600))


# ======================================================================================================================
# 12. Signatures
#     Takes finished octets and a PrivateKey; gives DKIM-Signature (RFC 6376, 8463) or a JSON Web Token (RFC 7519).
# ======================================================================================================================


async def sign_transaction(transaction: Transaction) -> Transaction:
    """Return a transaction with its message signed, unless its route, its domain or a signature that it has forbid."""
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
    octets, message = transaction.octets(), transaction.message
    key = signing_key(parse_message(octets[: octets.index(b"\r\n\r\n") + 2]).fields, transaction.dkim)
    if not key:
        return message
    if message.needs_8bitmime:  # it would be converted after the signature for a server without 8BITMIME
        octets = downgrade_8bit(octets)
        message = Message((octets,), not octets.isascii(), not octets.partition(b"\r\n\r\n")[0].isascii())
    first, *others = message.parts
    return message._replace(parts=(dkim_signature(octets, key, now) + first, *others))


def signing_key(header: list, keys: dict) -> DkimKey | None:
    """Return the key for the domain of From or a parent of it; None if there is none or that domain has signed."""
    try:
        author = parse_mailboxes(next((unfold(octets) for name, octets in header if name == "from"), ""))
    except ValueError:
        return None
    key = find_dkim_key(author[0][1].domain, keys) if author else None
    signatures = [parse_tags(unfold(octets)) for name, octets in header if name == "dkim-signature"]
    return None if key and key.domain in [tags.get("d", "").lower() for tags in signatures] else key


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
    field_ = fold("DKIM-Signature:", tags)
    signed = [by_name[name].pop() for name in listed if by_name.get(name)]  # the last first, RFC 6376 5.4.2
    data = b"\r\n".join([*signed, _relaxed_field(field_.encode())])
    data = hashlib.sha256(data).digest() if key.private.is_ed25519 else data  # RFC 8463 3
    signature = base64.b64encode(key.private.sign(data)).decode()
    return "\r\n ".join([field_, *re.findall(".{1,76}", signature)]).encode() + b"\r\n"


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
#     Each process keeps tokens until shortly before they end.
# ======================================================================================================================

ASSUMED_LIFETIME = 600  # seconds, if the provider names none
RENEW_BEFORE = 600  # seconds before the end


class AccessToken(NamedTuple):
    """Access token; the times are monotonic."""

    text: str
    scope: str
    renew_at: float
    expires: float


class TokenCache:
    """Access tokens of logins, fetched once for all that wait."""

    DROP_INTERVAL = 60  # seconds between tokens that a server refuses

    def __init__(self, clock: Callable = time.monotonic) -> None:
        self.clock = clock
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
        try:
            token, new = await asyncio.to_thread(fetch_token, route, self.refresh_tokens.get(key), self.clock)
        except ValueError:
            self.refresh_tokens.pop(key, None)  # the one in the settings may be newer
            metrics.add("haineko_token_errors_total")
            raise
        if new and (fault := await asyncio.to_thread(save_refresh_token, route.oauth2, new)):
            self.refresh_tokens[key] = new
            text = f"warning: the provider replaced the refresh token of {log_value(key[1])}: {fault}"
            log.lines(text, level="warning")
        self.tokens[key] = token
        return token

    def drop(self, route: Route, text: str) -> bool:
        """Forget a token that a server refused; return whether to try another one."""
        key = route.oauth2, route.credentials[0]
        if key in self.tokens and self.tokens[key].text == text:  # or another one was fetched meanwhile
            if self.dropped.get(key):
                return False
            self.dropped.put(key, True, self.DROP_INTERVAL)
            del self.tokens[key]
        return True


def fetch_token(route: Route, refresh_token: str | None, clock: Callable) -> tuple:
    """Return (AccessToken, the refresh token that replaces ours or ""); ValueError tells why there is none. Blocks."""
    oauth2, now, new = route.oauth2, clock(), ""
    if oauth2.access_token:
        document = {"access_token": read_secret(oauth2.access_token, oauth2.base)}
    else:
        refresh_token = refresh_token or read_secret(oauth2.refresh_token, oauth2.base)
        document = request_token(route, token_form(oauth2, route.credentials[0], refresh_token, int(time.time())))
        new = document.get("refresh_token")
    text, seconds = document["access_token"], document.get("expires_in")
    if not (isinstance(text, str) and re.fullmatch("[!-~]+", text)):  # or it would break the line that it is sent in
        raise ValueError("the access token is not one word of ASCII")
    found = re.match("[0-9]{1,9}", str(ASSUMED_LIFETIME if seconds is None else seconds))
    lifetime = min(int(found[0]), 86400) if found else 0
    scope = sanitize(str(document.get("scope") or oauth2.scope))
    token = AccessToken(text, scope, now + lifetime - min(RENEW_BEFORE, lifetime / 2), now + lifetime)
    return token, new if isinstance(new, str) and new != refresh_token else ""


def request_token(route: Route, form: dict) -> dict:
    """Return the provider's document with a token (RFC 6749 5.1); ValueError with its words if it gives none (5.2)."""
    url, path = WEBHOOK_URL.fullmatch(route.oauth2.token_url).group("base", "path")
    target = HTTPTarget(url, route.timeout, route.mailer, ca_file=route.ca_file, confidential=True)
    body, kind = urllib.parse.urlencode(form).encode(), "application/x-www-form-urlencoded"
    try:
        with contextlib.closing(KeepAliveConnection(target)) as connection:
            response = connection.exchange(HTTPRequest("POST", path or "/", body, type=kind))
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
    import tempfile

    if not (isinstance(oauth2.refresh_token, dict) and "file" in oauth2.refresh_token):
        return "put the new one into the settings, ours may end"
    path = os.path.realpath(os.path.join(oauth2.base, oauth2.refresh_token["file"]))
    try:
        handle, aside = tempfile.mkstemp(dir=os.path.dirname(path))
        with open(handle, "w", encoding="utf-8", errors="replace") as stream:
            stream.write(text + "\n")
            stream.flush()
            os.fsync(handle)
        os.replace(aside, path)
    except OSError as error:
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
THROTTLED = ("432", "454")  # too many connections (Microsoft), throttling failure (Amazon)


class SMTPReply(NamedTuple):
    """One reply of a server, RFC 5321 4.2."""

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
    return smtp_reply(found[1].decode(), tuple(lines)), octets[start:]


def smtp_reply(code: str, lines: tuple) -> SMTPReply:
    found = DSN.match(lines[0])
    return SMTPReply(code, found[1] if found else None, lines)


class Session(smtplib.SMTP):
    """Connection to one next hop. `step` names the command under way; `alive`: it may be used again."""

    def __init__(self, route: Route, hostname: str) -> None:
        super().__init__(local_hostname=hostname, timeout=route.timeout)
        self._host = route.host  # the name that smtplib has the certificate checked for
        self.route, self.step, self.masked = route, "CONN", ""  # masked: what the log shows in place of what is sent
        self.pool: Any = None  # the SessionPool that it belongs to
        self.release_place = lambda: None  # its place among the route's `sessions`
        self.stream: Any = None  # AsyncSocket of the open connection
        self.recv_buffer = b""  # received but not asked for yet
        self.maybe_complete = False  # recv_buffer may hold a complete reply
        self.alive = self.needs_rset = self.in_data = self.eod_sent = False
        self.created_at = self.last_used = time.monotonic()

    # -- opening

    def open(self) -> None:
        """Get ready for transactions, or raise Rejected with the server's reply. Blocks."""
        try:
            for step in self.steps():
                step()
        except OSError as error:
            self.close()
            raise Rejected(self._broken(error)) from None
        except Rejected:
            self.quit()
            raise
        self.sock.setblocking(False)
        self.alive = not self.recv_buffer

    def steps(self) -> tuple:
        """Return the steps of open(), in order."""
        return self._greet, self._hello, self._starttls, self._log_in

    def _greet(self) -> None:
        self._expect("CONN", self.connect(self.route.address or self.route.host, self.route.port))
        self.local_hostname = ehlo_name(self.local_hostname, self.sock.getsockname()[0])

    def _hello(self) -> None:
        self.step = "EHLO"
        code, text = self.ehlo()
        if 500 <= code <= 599:  # RFC 5321 3.2: an old server
            code, text = self.helo()
        self._expect("EHLO", (code, text))

    def _starttls(self) -> None:
        route, self.step = self.route, "STARTTLS"
        wanted = route.starttls or (route.tls_if_offered and self.has_extn("starttls"))
        if not wanted or route.port == SMTPS:
            return
        if not self.has_extn("starttls"):
            raise Rejected(make_reply("no-starttls", **route.endpoint))
        self._expect("STARTTLS", self.docmd("STARTTLS"))
        if self.recv_buffer:  # injected in clear text, to be taken for a reply under TLS
            raise ProtocolError("data behind the reply to STARTTLS")
        self.sock.settimeout(self.timeout)  # of the whole handshake
        self.sock = self._wrap(self.sock)
        self.ehlo_resp, self.esmtp_features, self.does_esmtp = None, {}, False  # RFC 3207 4.2
        self._hello()

    def _wrap(self, sock: socket.socket) -> ssl.SSLSocket:
        route = self.route
        context = client_context(route.tls_verify, route.ca_file, stat_key(route.ca_file))
        return context.wrap_socket(sock, server_hostname=route.host)

    def _log_in(self) -> None:
        """Use the strongest mechanism offered, once; the next one only if this one is not available after all."""
        if not self.route.auth:
            return
        self.step, result = "AUTH", None
        if not isinstance(self.sock, ssl.SSLSocket) and parse_ip(self.sock.getpeername()[0]) not in LOOPBACK:
            raise Rejected(make_reply("clear-auth", **self.route.endpoint))
        offered = self.esmtp_features.get("auth", "").upper().split()
        known = [name for name, row in AUTH_MECHANISMS.items() if row.by_token == bool(self.route.oauth2)]
        for mechanism in [name for name in known if name in offered]:
            result = self._authenticate(mechanism)
            if result[0] not in (504, 534):  # RFC 4954 4: unknown mechanism, too weak
                break
        if not result:
            raise Rejected(make_reply("no-auth", f"{', '.join(known)} are known", **self.route.endpoint))
        self._expect("AUTH", result)

    def _authenticate(self, mechanism: str) -> tuple:
        """Return (code, text) of the server's verdict on our credentials."""
        row, line, details = AUTH_MECHANISMS[mechanism], f"AUTH {mechanism}".encode(), b""
        initial = b" " + base64.b64encode(row.respond(self.route, b"", 0)) if row.has_initial else b""
        inline = bool(initial) and len(line + initial) <= MAX_COMMAND
        self.masked = f"AUTH {mechanism} ******** as {self.route.credentials[0]}"
        try:
            self.send(line + initial * inline + b"\r\n")
            self.masked = "********"
            code, text = self.getreply()
            for turn in range(inline, MAX_CHALLENGES):
                if code != 334:
                    break
                if row.by_token and turn:
                    details += b"\n" + decode_challenge(text)
                self.send(base64.b64encode(row.respond(self.route, text, turn)) + b"\r\n")
                code, text = self.getreply()
        finally:
            self.masked = ""
        return code, text + sanitize(details.decode("utf-8", "replace"), MAX_TEXT, keep="\n").encode()

    def _expect(self, step: str, result: tuple) -> None:
        """Raise Rejected with the server's own words unless the code is 2xx."""
        self.step, (code, text) = step, result
        if not 200 <= code <= 299:
            lines = tuple(text.decode().split("\n"))
            if not 400 <= code <= 599:
                raise ProtocolError(f"unexpected: {code} {lines[0]}")
            raise Rejected(self._to_reply(step, smtp_reply(str(code), lines)))

    # -- transaction

    async def transact(self, transaction: Transaction) -> list:
        """Return a Reply for every recipient, whatever happens (RFC 5321 3.3)."""
        utf8 = transaction.needs_smtputf8
        if utf8 and not self.has_extn("smtputf8"):
            return await self._transact_in_ascii(transaction)
        self.in_data = self.eod_sent = False
        chunks = transaction.chunks()
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
        if self.recv_buffer:  # more than was asked for
            self.alive = False
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
        endpoint, message = self.route.endpoint, transaction.message
        if not transaction.sender.isascii():
            return [make_reply("mail-ascii", **endpoint)] * len(transaction.recipients)
        if message.needs_smtputf8:
            octets = await asyncio.to_thread(downgrade_8bit, transaction.octets(), self.has_extn("8bitmime"))
            message = Message((octets,), needs_8bitmime=not octets.isascii())
            names = non_ascii_fields(octets)
            if names:  # which have no form in ASCII, such as an address
                return [make_reply("header-ascii", f"in {', '.join(names)}", **endpoint)] * len(transaction.recipients)
        ascii_only = tuple(to for to in transaction.recipients if to.isascii())
        found = await self.transact(transaction._replace(recipients=ascii_only, message=message)) if ascii_only else []
        replies = dict(zip(ascii_only, found))
        return [replies.get(to) or make_reply("rcpt-ascii", **endpoint) for to in transaction.recipients]

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

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        """Connect; smtplib calls this."""
        sock = connector.connect(host, port, time.monotonic() + timeout)
        sock.settimeout(timeout)
        return self._wrap(sock) if port == SMTPS else sock

    def send(self, s: Any) -> None:
        """Send a command; smtplib calls this."""
        octets = s.encode("ascii") if isinstance(s, str) else s
        self._log_sent(self.masked.encode() if self.masked else octets)
        self.sock.sendall(octets)

    def getreply(self) -> tuple:
        """Return a reply as (code, text); smtplib calls this."""
        deadline = time.monotonic() + self.timeout
        while not (reply := self._next_reply()):
            self.sock.settimeout(max(deadline - time.monotonic(), 0.001))
            self._feed(self.sock.recv(65536))
        return int(reply.code), "\n".join(reply.lines).encode()

    def _next_reply(self) -> SMTPReply | None:
        """Take the first complete reply out of `recv_buffer`, None if there is none."""
        if not self.maybe_complete:
            return None
        reply, self.recv_buffer = parse_reply(self.recv_buffer)
        self.maybe_complete = bool(reply and self.recv_buffer)
        if reply and reply.code == "421":  # RFC 5321 3.8
            self.alive = False
        if reply and self.masked:
            reply = reply._replace(lines=tuple(map(self._mask_credentials, reply.lines)))
        if reply and (log.devel or log.trace.get() is not None):
            for i, line in enumerate(reply.lines, 1):
                log.dialogue(self.route.host, "<", f"{reply.code}{' ' if i == len(reply.lines) else '-'}{line}")
        return reply

    def _mask_credentials(self, line: str) -> str:
        """Mask our credentials in a line, in base64 too: some servers repeat a command that they do not understand.

        A challenge stays as it is: it may share a part with a token, and the log-in goes on from it."""
        secrets = secret_forms(self.route)
        with contextlib.suppress(ProtocolError, UnicodeDecodeError):
            decoded = decode_challenge(line.rstrip(".").encode()).decode()
            if (masked := mask_secrets(decoded, secrets)) != decoded:
                return base64.b64encode(masked.encode()).decode()
            if not any(secret in line for secret in secrets):
                return line
        return mask_secrets(line, secrets)

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
        """Close the connection, unregistered first: by the event loop's thread, or before it has a stream."""
        if self.stream:
            self.stream.release()
        super().close()
        release_place, self.release_place = self.release_place, lambda: None
        release_place()

    def quit(self) -> None:
        """Send QUIT and close, without waiting for the reply."""
        self.alive = False
        with contextlib.suppress(OSError, AttributeError):  # broken, or never connected
            self.sock.setblocking(False)
            self.send("QUIT\r\n")
        self.close()

    # -- replies

    def _to_reply(self, step: str, reply: SMTPReply) -> Reply:
        route = self.route
        more = {"from_server": True, "route_fault": is_route_fault(route, step, reply)}
        return Reply(reply.code, reply.dsn, step, reply.lines, route.mailer, route.host, route.port, **more)

    def _broken(self, error: OSError) -> Reply:
        """Return the reply for recipients that have none, since the connection broke."""
        reason, endpoint = error_text(error), self.route.endpoint
        if self.eod_sent:
            return make_reply("unsure", reason, maybe_delivered=True, **endpoint)
        if isinstance(error, ProtocolError):
            return make_reply("rubbish", reason, command=self.step, **endpoint)
        if self.step == "CONN":
            return make_reply("connect", reason, **endpoint)
        if isinstance(error, ssl.SSLError) and self.step == "STARTTLS":
            return make_reply("tls", reason, **endpoint)
        return make_reply("lost", reason, command=self.step, **endpoint)


def is_route_fault(route: Route, step: str, reply: SMTPReply) -> bool:
    """Return whether a refusal is due to our log-in or the route's settings. The mail is not at fault then."""
    if reply.code[0] != "5" or route.mailer == "MX":
        return False
    our_login = step == "MAIL" and route.auth and (reply.code, reply.dsn) == ("550", "5.7.1")
    return step in ("EHLO", "STARTTLS", "AUTH") or reply.code[:2] == "53" or bool(our_login)  # RFC 4954 6


# -- AUTH (RFC 4954)


class Mechanism(NamedTuple):
    """Way to log in."""

    has_initial: bool  # whether the client speaks first
    respond: Callable  # (route, challenge as it came, number of responses before): gives the response
    by_token: bool = False  # with an access token as password


def auth_cram_md5(route: Route, challenge: bytes, turn: int) -> bytes:
    user, password = route.credentials  # RFC 2195
    digest = hmac.new(password.encode(), decode_challenge(challenge), "md5").hexdigest()
    return f"{user} {digest}".encode()


def auth_plain(route: Route, challenge: bytes, turn: int) -> bytes:
    return "\0{}\0{}".format(*route.credentials).encode()  # RFC 4616


def auth_xoauth2(route: Route, challenge: bytes, turn: int) -> bytes:
    """Answer with the token, then with an empty line to a further challenge, which is an error in JSON."""
    # https://developers.google.com/workspace/gmail/imap/xoauth2-protocol
    return b"" if turn else "user={}\1auth=Bearer {}\1\1".format(*route.credentials).encode()


def auth_oauthbearer(route: Route, challenge: bytes, turn: int) -> bytes:
    user, token = route.credentials[0].replace("=", "=3D").replace(",", "=2C"), route.credentials[1]  # RFC 5801 4
    text = f"n,a={user},\1host={route.host}\1port={route.port}\1auth=Bearer {token}\1\1"
    return b"\1" if turn else text.encode()  # RFC 7628 3.1, 3.2.3


def auth_login(route: Route, challenge: bytes, turn: int) -> bytes:
    """Answer with user name or password, by the words of the challenge, else by its turn: no RFC defines the words."""
    text = challenge.lower()
    with contextlib.suppress(ProtocolError):
        text += decode_challenge(challenge).lower()
    asked = 1 if b"pass" in text else 0 if b"user" in text or b"name" in text else min(turn, 1)
    return route.credentials[asked].encode()


def decode_challenge(challenge: bytes) -> bytes:
    """Decode base64, with or without padding."""
    try:
        return base64.b64decode(challenge + b"=" * (-len(challenge) % 4), validate=True)
    except binascii.Error as error:
        raise ProtocolError(f"unexpected challenge: {error}") from None


AUTH_MECHANISMS = {  # the strongest first
    "CRAM-MD5": Mechanism(False, auth_cram_md5),
    "PLAIN": Mechanism(True, auth_plain),
    "LOGIN": Mechanism(False, auth_login),  # with an initial response, some servers fail
    "XOAUTH2": Mechanism(True, auth_xoauth2, by_token=True),
    "OAUTHBEARER": Mechanism(True, auth_oauthbearer, by_token=True),
}
MAX_COMMAND = 510  # octets of a line without CRLF: beyond, the initial response waits to be asked for (RFC 4954 4)
MAX_CHALLENGES = 4


def secret_forms(route: Route) -> list:
    """Return a password or token as AUTH sends it and as it is; masking short ones would hide nothing."""
    forms = [row.respond(route, b"", 0) for row in AUTH_MECHANISMS.values() if row.has_initial]
    secret = route.credentials[1]
    forms = [base64.b64encode(octets).decode() for octets in (*forms, secret.encode())]
    return [*forms, secret] if len(secret) > 3 else []


# -- a transaction's script, and what its replies mean


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
    """A mail that waits for a session."""

    future: asyncio.Future  # of a Session, or None (open one)
    deadline: float
    reply: Reply | None  # the failure of its own attempt to open a session


class SessionPool:
    """Sessions of one route. If one cannot be opened while others work, the server accepts no more: the mail waits for
    one of those, until the deadline."""

    OPENING = 32  # sessions opened at a time, each in a thread
    FULL_BACKOFF = 5  # seconds until another session is opened after the server took no more

    def __init__(self) -> None:
        self.idle: list = []  # the most recently used last
        self.in_use = self.opening = 0
        self.waiters: deque = deque()  # of SessionWaiter, the longest first
        self.open_limit, self.full_until = self.OPENING, 0.0  # may be opened at a time; but none until then
        self.refusal: Reply | None = None  # the last one
        self.gave_up = 0.0  # when a session was closed so that another process can open one

    @property
    def full(self) -> bool:
        """Return whether the server accepts no more for now, and there is a session to wait for."""
        return self.in_use + self.opening > 0 and time.monotonic() < self.full_until

    def may_open(self, has_room: bool = False) -> bool:
        """Return whether another session may be opened now; `has_room` means that the server has just lost one."""
        return self.opening < self.OPENING if has_room else self.opening < self.open_limit and not self.full

    def wait(self, deadline: float, reply: Reply | None) -> asyncio.Future:
        future = asyncio.get_running_loop().create_future()
        self.waiters.append(SessionWaiter(future, deadline, reply))
        return future

    def next_waiter(self) -> asyncio.Future | None:
        """Take the one that has waited longest, if any; one that was cancelled waits no more."""
        while self.waiters:
            future = self.waiters.popleft().future
            if not future.done():
                return future
        return None

    def wake_waiters(self, has_room: bool = False) -> None:
        """Have waiters open sessions, as many as may be opened."""
        while self.may_open(has_room) and (future := self.next_waiter()):
            self.opening += 1
            future.set_result(None)
            has_room = False

    def opened(self) -> None:
        """Count a session that was opened, and is in use."""
        self.opening -= 1
        self.in_use += 1
        self.open_limit = min(self.open_limit * 2, self.OPENING)
        self.wake_waiters()

    def refused(self, reply: Reply | None) -> bool:
        """Count a session that was not opened; return True if it is worth waiting for another one. Without any, a
        temporary greeting fails only the waiters that got one themselves, any other failure all of them."""
        self.opening -= 1
        none_left = not (self.idle or self.in_use or self.opening)
        full = bool(reply) and not none_left
        if full:
            self.slow_down(reply)
        elif none_left:
            only_this = not reply or (
                reply.temporary and reply.command == "CONN" and (reply.from_server or reply.retry_after)
            )
            busy = only_this or reply.code in THROTTLED
            self.fail_waiters([waiter for waiter in self.waiters if waiter.reply or not busy], None if busy else reply)
        self.wake_waiters()
        return full

    def slow_down(self, reply: Reply) -> None:
        """Open no session for a while, as long as there is one, since the server accepts no more."""
        self.refusal, self.open_limit, self.full_until = reply, 1, time.monotonic() + self.FULL_BACKOFF

    def fail_waiters(self, waiters: list, reply: Reply | None = None) -> None:
        for waiter in waiters:
            self.waiters.remove(waiter)
            waiter.future.set_exception(Rejected(waiter.reply or reply or self.refusal))

    def sweep(self, now: float) -> None:
        """Give those that have waited too long the server's reply."""
        if self.full:
            self.fail_waiters([waiter for waiter in self.waiters if waiter.deadline <= now])
        self.wake_waiters()


class TransportContext:
    """What the deliveries of this process share: SMTP sessions, HTTP connections, the resolver, MTA-STS policies."""

    IDLE = 20  # seconds after which an idle session is closed; servers wait for minutes
    IDLE_WHEN_FULL = 1  # the same if the server limits sessions: other processes of ours may need one
    AGE = 300  # seconds after which a session is not used again
    SHARE = 5  # the same if the route's sessions are limited: another process may wait for its place
    MAX_IDLE = 256  # sessions of one route

    def __init__(self, nameservers: tuple = (), limits: SharedLimits | None = None) -> None:
        self.limits = limits or SharedLimits()
        self.route_pauses: dict = {}  # Route that failed: monotonic time until which its list does without it
        self.pools: defaultdict = defaultdict(SessionPool)  # by (hostname, route)
        self.http, self.tokens = HTTPConnectionPool(), TokenCache()
        self.set_nameservers(nameservers)

    def set_nameservers(self, nameservers: tuple) -> None:
        """Use these name servers from now on; () means those of resolv.conf."""
        self.resolver = Resolver(nameservers)
        self.mta_sts = MTASTSCache(self.resolver)

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
        pool, deadline, reply = self.pools[hostname, route], 0.0, None
        while True:
            if pool.may_open():
                pool.opening += 1
            else:
                deadline = deadline or time.monotonic() + route.timeout
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
        session = Session(await self.tokens.authorize(route), hostname)
        if route.sessions:
            session.release_place = await self._await_place(route, self.pools[hostname, route])
        try:
            await asyncio.to_thread(session.open)  # smtplib blocks
        except Rejected as refused:
            again = again and bool(route.oauth2) and refused.reply.code == "535"
            if not (again and self.tokens.drop(route, session.route.credentials[1])):
                raise
            return await self.connect(route, hostname, again=False)
        session.stream = AsyncSocket(session.sock)
        return session

    async def _await_place(self, route: Route, pool: SessionPool) -> Callable:
        """Take a place among the route's sessions of all processes, and return what gives it back. Raises Rejected if
        this process has all of them, which are waited for elsewhere, or if that takes too long."""
        deadline = time.monotonic() + route.timeout
        if time.monotonic() - pool.gave_up < 0.2:
            await asyncio.sleep(0.2)  # one that has waited longer takes it
        while not (octet := self.limits.open_session(route.limit_key, route.sessions)):
            if pool.idle or pool.in_use or time.monotonic() > deadline:
                line = f"other mails have all of its sessions ({route.sessions})"
                raise Rejected(make_reply("route-limit", line, retry_after=route.timeout, **route.endpoint))
            await asyncio.sleep(0.05)  # there is no event when another process releases one
        return functools.partial(self.limits.close_session, octet)

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
        if session.alive and not (limited and is_old) and (future := pool.next_waiter()):
            future.set_result(session)
            return
        pool.in_use -= 1
        if session.alive and not is_old and len(pool.idle) < self.MAX_IDLE:
            pool.idle.append(session)
            return
        if session.alive:
            pool.gave_up = time.monotonic()
            session.quit()
        session.close()
        pool.wake_waiters(has_room=True)

    async def sweep(self, everything: bool = False) -> None:
        """Close the sessions and connections that have been idle too long, or all."""
        self.http.sweep(everything)
        now = time.monotonic()
        for key, pool in list(self.pools.items()):
            limited = pool.open_limit < pool.OPENING or key[1].sessions
            idle = self.IDLE_WHEN_FULL if limited else self.IDLE
            while pool.idle and (everything or pool.idle[0].last_used <= now - idle):
                pool.idle.pop(0).quit()
            pool.sweep(now)
            if not (pool.idle or pool.in_use or pool.opening or pool.waiters):
                del self.pools[key]


# ======================================================================================================================
# 15. Relays
#     A relay takes (transaction, transport) and gives one Reply for each recipient, in order. A probe takes
#     (ConnectivityProbe, transport), sends no mail and gives one CheckResult for each step. Both may raise Rejected or
#     OSError. RELAYS, at the end, has one row for each relay with all that is known of it.
# ======================================================================================================================

ROUTE_PAUSE = 30  # seconds for which a list does without a route that failed
MAX_REPLACEMENTS = 8  # of one mail's session; where sessions are few, the next one may be at its limit of mails as well
MAX_MX_ATTEMPTS = 8  # addresses tried for one mail; each may take the route's timeout
KNOWN_COMMANDS = ("HTTP", "CONN", "EHLO", "STARTTLS", "AUTH", "MAIL", "RCPT", "DATA", "QUEUE")
TRANSFER_DECODERS = {"base64": binascii.a2b_base64, "quoted-printable": binascii.a2b_qp}  # RFC 2045 6
GMAILAPI_UPLOAD = 1 << 20  # octets from which on a message is uploaded
GOOGLE_LIMIT = re.compile("'reason': '[A-Za-z]*LimitExceeded'")  # with status 403
DSN_BY_STATUS = {401: "5.7.8", 403: "5.7.1"}
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
    now, pauses, waiting = time.monotonic(), transport.route_pauses, list(range(len(transaction.recipients)))
    replies: list = [None] * len(waiting)
    routes = transaction.route.choices
    for route in [one for one in routes if pauses.get(one, 0) <= now] or routes:
        if route in pauses:
            pauses[route] = now + ROUTE_PAUSE  # this mail tries it; the others go on without it
        recipients, failed = tuple(transaction.recipients[i] for i in waiting), {}
        part = transaction._replace(route=route, recipients=recipients)
        for i, reply in zip(waiting, await attempt_route(part, transport)):
            failed.update({i: reply} if try_next_route(reply) else {})
            before = replies[i] and " ".join(filter(None, (replies[i].fallback, replies[i].relay)))
            replies[i] = reply._replace(fallback=before)
        if any(reply.command != "RCPT" or reply.code == "421" for reply in failed.values()):
            pauses[route] = time.monotonic() + ROUTE_PAUSE
        else:
            pauses.pop(route, None)
        waiting = list(failed)
        if not waiting:
            break
        for reply in dict.fromkeys(failed.values()):
            words = log_value(" ".join((reply.code, *reply.message)))
            log.lines(f"{transaction.queueid}: warning: relay={reply.relay} {reply.command} failed: {words}")
    return replies


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
    except Rejected as rejected:
        reply = rejected.reply
    except OSError as error:
        reply = make_reply("lost", error_text(error), command="CONN", **transaction.route.endpoint)
    except Exception:
        log_exception(transaction.queueid)
        reply = make_reply("relay-fault", **transaction.route.endpoint)
    return [reply] * len(transaction.recipients)


async def relay_esmtp(transaction: Transaction, transport: TransportContext) -> list:
    """Deliver by SMTP to the route's host. A reused session that dies or replies 4xx before the message is replaced, by
    a new one if the server takes another."""
    session, reused = transport.acquire_idle(transaction.route, transaction.hostname), True
    if not session:
        session, reused = await transport.acquire(transaction.route, transaction.hostname)
    replies = await transact_by(session, transaction, transport)
    again = list(range(len(replies)))
    for _ in range(MAX_REPLACEMENTS):
        again = [i for i in again if reused and session.refused_before_data(replies[i])]
        if not again:
            break
        recipients = tuple(transaction.recipients[i] for i in again)
        try:
            session, reused = await transport.acquire(transaction.route, transaction.hostname)
            found = await transact_by(session, transaction._replace(recipients=recipients), transport)
        except Rejected as refused:
            found, reused = [refused.reply] * len(again), False
        for i, reply in zip(again, found):
            replies[i] = reply
    return replies


async def transact_by(session: Session, transaction: Transaction, transport: TransportContext) -> list:
    try:
        replies = await session.transact(transaction)
        for reply in replies:
            if reply.code in THROTTLED:
                session.pool.slow_down(reply)
        return replies
    except BaseException:
        session.alive = False
        raise
    finally:
        transport.release(session)


async def relay_mx(transaction: Transaction, transport: TransportContext) -> list:
    """Deliver by SMTP to the hosts of each recipient's domain (RFC 5321 5.1); a shared message may have several."""
    by_domain: dict = {}
    for recipient in transaction.recipients:
        by_domain.setdefault(recipient.rpartition("@")[2].lower(), []).append(recipient)
    replies: dict = {}
    for domain, recipients in by_domain.items():
        try:
            part = transaction._replace(recipients=tuple(recipients))
            replies.update(await deliver_to_domain(domain, part, transport))
        except Rejected as rejected:
            replies.update(dict.fromkeys(recipients, rejected.reply))
    return [replies[recipient] for recipient in transaction.recipients]


async def deliver_to_domain(domain: str, transaction: Transaction, transport: TransportContext) -> dict:
    """Return {recipient: Reply} from the first host that works; raise Rejected if the domain has no host."""
    route, waiting, attempts = transaction.route, transaction.recipients, 0
    hosts = await mx_hosts(domain, transport.resolver, transaction.hostname, time.monotonic() + route.timeout)
    policy = await transport.mta_sts.policy_for(domain, route)
    replies: dict = {}
    for host in admitted_hosts(hosts, policy):
        for hop in await next_hops(host, route, policy, transport.resolver):
            answers = [hop] * len(waiting)
            if isinstance(hop, Route):
                answers = await deliver_to_host(transaction._replace(route=hop, recipients=waiting), transport)
            for recipient, reply in zip(waiting, answers):
                if recipient not in replies or reply.temporary or not try_next_host(reply):
                    replies[recipient] = reply
            waiting, attempts = tuple(to for to in waiting if try_next_host(replies[to])), attempts + 1
            if not waiting or attempts == MAX_MX_ATTEMPTS:
                return replies
    return replies


def admitted_hosts(hosts: list, policy: MTASTSPolicy | None) -> list:
    """Return the hosts that the domain's MTA-STS policy allows; raise Rejected if there is none."""
    admitted = [host for host in hosts if not policy or policy.allows(host)]
    if not admitted:
        raise Rejected(make_reply("mta-sts", *hosts, mailer="MX"))
    return admitted


async def next_hops(host: str, route: Route, policy: MTASTSPolicy | None, resolver: Resolver) -> list:
    """Return a Route to each address of the host, and to those behind it if it does not answer; or the one Reply that
    says why there is none."""
    try:
        addresses = await resolve_addresses(host, resolver, route.private, time.monotonic() + route.timeout)
    except Rejected as rejected:
        return [rejected.reply]
    hop = replace(route, host=host)
    if policy and policy.mode == "enforce":
        hop = replace(hop, starttls=True, tls_verify=True)
    elif not route.starttls:
        hop = replace(hop, tls_if_offered=True, tls_verify=False)  # RFC 7435: encrypted by anybody is better than clear
    addresses.sort(key=lambda address: connector.failed_lately((address, route.port)))
    return [replace(hop, address=" ".join(addresses[i:])) for i in range(len(addresses))]


async def deliver_to_host(transaction: Transaction, transport: TransportContext) -> list:
    """Return a Reply for each recipient from one address; falls back to clear text if opportunistic TLS fails."""
    try:
        return await relay_esmtp(transaction, transport)
    except Rejected as rejected:
        reply = rejected.reply
    if reply.command == "STARTTLS" and transaction.route.tls_if_offered:
        clear = replace(transaction.route, tls_if_offered=False)
        return await deliver_to_host(transaction._replace(route=clear), transport)
    return [reply] * len(transaction.recipients)


def try_next_host(reply: Reply) -> bool:
    """Return True if another host may be tried: this one has not answered for the mail, or left before the message."""
    return reply.command in ("CONN", "EHLO", "STARTTLS") or (reply.code == "421" and reply.command != "DATA")


async def relay_file(transaction: Transaction, transport: TransportContext) -> list:
    """Save the message in the route's folder."""
    return [await asyncio.to_thread(save_message, transaction)] * len(transaction.recipients)


def save_message(transaction: Transaction) -> Reply:
    """Write the message aside, sync it, then rename it: it is there completely or not at all."""
    import tempfile

    folder = transaction.route.folder
    name = f"haineko.{time.strftime('%Y-%m-%d-%H%M%S')}.{transaction.queueid}.{transaction.number}.eml"
    path = os.path.join(folder, name)
    try:
        handle, aside = tempfile.mkstemp(prefix=".haineko.", dir=folder)  # mode 0600
        try:
            with open(handle, "wb") as stream:
                stream.write(transaction.octets())
                stream.flush()
                os.fsync(handle)
            os.rename(aside, path)
        except BaseException:
            os.unlink(aside)
            raise
        handle = os.open(folder, os.O_RDONLY)  # a renamed file survives a power cut only if its folder is synced
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        return make_reply("file", f"{folder}: {error.strerror or error}", mailer="File")
    return make_reply("done", word=path, mailer="File")


async def relay_screen(transaction: Transaction, transport: TransportContext) -> list:
    """Print the message on stderr."""
    printed = log.write_bytes(await asyncio.to_thread(screen_text, transaction))
    reply = make_reply("done", word="Printed") if printed else make_reply("file", "stderr cannot be written")
    return [reply._replace(mailer="Screen")] * len(transaction.recipients)


def screen_text(transaction: Transaction) -> bytes:
    """Return the message with controls escaped, and marked so that no line of it can pass for one of the log."""
    rule = f"{transaction.queueid}.{transaction.number} from <{transaction.sender}> to"
    rule = f"--- {rule} <{'>, <'.join(transaction.recipients)}>"
    text = transaction.octets().decode("utf-8", "backslashreplace").replace("\r\n", "\n").rstrip("\n")
    escape = functools.partial(SCREEN_UNSAFE.sub, lambda found: ascii(found[0])[1:-1])
    return "\n".join([escape(rule), *[f"| {escape(line)}" for line in text.split("\n")], "---\n"]).encode()


async def relay_discard(transaction: Transaction, transport: TransportContext) -> list:
    """Deliver to nobody."""
    return [make_reply("done", word="Discarded", mailer="Discard")] * len(transaction.recipients)


# -- Relays by HTTP. http_accepted() and http_failure() hold what the responses of their APIs have in common.


def http_relay(make_request: Callable, read_replies: Callable, max_recipients: int = 1 << 30) -> Callable:
    """Return a relay that posts make_request(transaction), an HTTPRequest, for so many recipients at a time;
    read_replies(transaction, response) returns one Reply or a list of one for each. Both may raise Rejected."""

    async def relay(transaction: Transaction, transport: TransportContext) -> list:
        replies: list = []
        for start in range(0, len(transaction.recipients), max_recipients):
            part = transaction._replace(recipients=transaction.recipients[start : start + max_recipients])
            try:
                call = await asyncio.to_thread(make_request, part)
                found = read_replies(part, await transport.http.request(HTTPTarget.of_route(part.route), call))
            except Rejected as refused:
                found = refused.reply
            replies += found if isinstance(found, list) else [found] * len(part.recipients)
        return replies

    return relay


def haineko_request(transaction: Transaction) -> HTTPRequest:
    """Return the submission to another Haineko: header and body if they express all of the message (the old one in
    Perl knows no more), else `raw`."""
    octets = transaction.octets()
    try:
        document = as_plain_submission(transaction, octets)
    except (ValueError, LookupError, TypeError):  # TypeError: of a Date that is none, before Python 3.10
        raw = octets.decode() if octets.isascii() else {"base64": base64.b64encode(octets).decode()}
        document = {"mail": transaction.sender, "rcpt": transaction.recipients, "raw": raw}
    return HTTPRequest("POST", "/submit", encode_json(document), basic_auth_header(transaction.route.credentials))


def basic_auth_header(login: tuple) -> tuple:
    """Return the header fields for HTTP Basic (RFC 7617); none without a login."""
    return (("Authorization", "Basic " + base64.b64encode(":".join(login).encode()).decode()),) if login else ()


def as_plain_submission(transaction: Transaction, octets: bytes) -> dict:
    """Return the submission of plain text from which compose() made these octets, else raise ValueError."""
    listed, body = parse_message(octets)
    lines = {name: unfold(value) for name, value in listed}
    charset = lines["content-type"].rpartition("charset=")[2]
    header = {"from": format_mailboxes(lines["from"]), "subject": decode_encoded_words(lines["subject"])}
    if "reply-to" in lines:
        header["replyto"] = format_mailboxes(lines["reply-to"])
    *passed, hostname = [name.strip() for name in lines["x-haineko-loop"].split(",")]
    text = decode_charset(TRANSFER_DECODERS.get(lines["content-transfer-encoding"], bytes)(body), charset)
    document = {"mail": transaction.sender, "rcpt": transaction.recipients, "body": text.replace("\r\n", "\n")}
    document["header"] = {**header, "charset": charset, "x-haineko-loop": passed}
    submission = parse_submission(encode_json(document)).submission
    now = parsedate_to_datetime(lines["date"]).timestamp()
    again = submission and transaction.sender and compose(submission, transaction.queueid, None, hostname, now)
    composed = again.copy(transaction.recipients[0], transaction.number) if again else b""
    if not composed or composed.partition(b"\r\n\tby ")[2] != octets.partition(b"\r\n\tby ")[2]:  # in Received
        raise ValueError("compose() would make another message")
    document["header"]["x-haineko-loop"] = [*passed, hostname]
    return {**document, "ehlo": hostname}


def haineko_replies(transaction: Transaction, response: HTTPResponse) -> list:
    """Return a Reply for each recipient from the far end's items; one without recipient is meant for all."""
    route = transaction.route
    replies = {address_key(item.get("rcpt")): haineko_reply(route, response, item) for item in haineko_items(response)}
    missing = replies.get(None) or http_failure(route, response, None)
    return [replies.get(address_key(to), missing) for to in transaction.recipients]


def haineko_items(response: HTTPResponse) -> list:
    """Return the items of the far end's answer; none if it has another form."""
    items = json_object(response).get("response")
    return items if isinstance(items, list) and all(isinstance(item, dict) for item in items) else []


def address_key(given: Any) -> Any:
    """Return a key that is equal for two spellings of one address; None for anything else."""
    mailbox = parse_address(given) if type(given) is str else None
    return mailbox and mailbox.key


def haineko_reply(route: Route, response: HTTPResponse, item: dict) -> Reply:
    """Return an item of the far end as a Reply; the Perl version reports a relayed mail with the reply to QUIT."""
    code, dsn, lines = str(item.get("code")), item.get("dsn"), item.get("message")
    lines = [lines] if isinstance(lines, str) else lines if isinstance(lines, list) else []
    if not re.fullmatch(r"[245][0-9][0-9]", code) or (code[0] == "2") == bool(item.get("error")):
        return http_failure(route, response, None)
    if code[0] == "2" and response.status not in (200, 202, 207):  # something on the way changed one of the two
        return http_failure(route, response, None)._replace(maybe_delivered=True)
    dsn = dsn if isinstance(dsn, str) and re.fullmatch(r"[245]\.[0-9]{1,3}\.[0-9]{1,3}", dsn) else None
    command = item.get("command") if item.get("command") in KNOWN_COMMANDS else "DATA"
    message = sanitize_lines(lines) or (status_text(response),)
    maybe_delivered = code[0] == "4" and item.get("maybe_delivered") is True
    more = {"maybe_delivered": maybe_delivered, "route_fault": response.status == 401}
    more["retry_after"] = 0 if code[0] == "2" else parse_retry_after(response)
    return Reply(code, dsn, command, message, **route.endpoint, **more)


def bearer_header(route: Route) -> tuple:
    """Return the header fields that carry the route's API key."""
    return (("Authorization", f"Bearer {route.credentials[1]}"),)


def sendgrid_errors(response: HTTPResponse) -> list | None:
    """Return the error messages in a response; None if it has none."""
    errors = json_object(response).get("errors")
    if not (isinstance(errors, list) and errors and all(isinstance(error, dict) for error in errors)):
        return None
    return [": ".join(str(error[key]) for key in ("field", "message") if error.get(key)) for error in errors]


def sendgrid_request(transaction: Transaction) -> HTTPRequest:
    """Return the message in pieces; raise Rejected if it would lose more of it than trace fields and charset."""
    # https://www.twilio.com/docs/sendgrid/api-reference/mail-send
    octets = transaction.octets()
    try:
        fields, _ = parse_message(octets)
        document = sendgrid_addresses(transaction, fields)
        document["subject"] = decode_encoded_words(single_field(fields, "subject"))
        document["headers"] = sendgrid_headers(fields)
        document.update(sendgrid_parts(octets))
        if not document["subject"]:
            raise ValueError("the subject is empty")
    except (ValueError, LookupError, RecursionError) as error:
        raise Rejected(make_reply("inexpressible", sanitize(str(error)), **transaction.route.endpoint)) from None
    body = encode_json({key: value for key, value in document.items() if value})
    return HTTPRequest("POST", "/v3/mail/send", body, bearer_header(transaction.route))


def sendgrid_reply(transaction: Transaction, response: HTTPResponse) -> Reply:
    if response.status != 202:  # 200: valid, but will not be sent
        return http_failure(transaction.route, response, sendgrid_errors(response))
    message_id = response.headers.get("X-Message-Id")
    return http_accepted(transaction.route, response, *([f"X-Message-Id: {message_id}"] if message_id else []))


def sendgrid_addresses(transaction: Transaction, fields: list) -> dict:
    """Return author and recipients; SendGrid shows every recipient but Bcc, and delivers to every one that it shows."""
    shown = {name: sendgrid_mailboxes(single_field(fields, name)) for name in ("from", "to", "cc", "reply-to")}
    author, reply_to = shown["from"], shown["reply-to"]
    if len(author) != 1:
        raise ValueError("From has several addresses")
    if not shown["to"]:
        raise ValueError("To has none of the recipients")
    hidden = [{"email": recipient} for recipient in hidden_recipients(transaction, fields)]
    people = {"to": shown["to"], "cc": shown["cc"], "bcc": hidden}
    document = {"personalizations": [{key: value for key, value in people.items() if value}], "from": author[0]}
    if len(reply_to) > 1:
        return {**document, "reply_to_list": reply_to}
    return {**document, "reply_to": reply_to and reply_to[0]}


def hidden_recipients(transaction: Transaction, fields: list) -> list:
    """Return the recipients that To and Cc don't show; raise ValueError if they show anybody else."""
    hidden = {address_key(to): to for to in transaction.recipients}
    for name in ("to", "cc"):
        for _, mailbox in parse_mailboxes(single_field(fields, name)):
            if not hidden.pop(mailbox.key, None):
                raise ValueError(f"{name.title()} has {mailbox.addr_spec}, which gets this mail another way or twice")
    return list(hidden.values())


def sendgrid_mailboxes(text: str) -> list:
    named = [(decode_encoded_words(name), mailbox.addr_spec) for name, mailbox in parse_mailboxes(text)]
    return [{"email": spec, "name": name} if name else {"email": spec} for name, spec in named]


def sendgrid_headers(fields: list) -> dict:
    """Return the fields that SendGrid takes as they are, still encoded."""
    headers: dict = {}
    for name, octets in fields:
        if name in SENDGRID_RESERVED:
            raise ValueError(f"the header {name} can't be set")
        if name in SENDGRID_OWN or name.startswith("content-"):
            continue
        if name in map(str.lower, headers):
            raise ValueError(f"the header {name} occurs more than once")
        if not octets.isascii():
            raise ValueError(f"the header {name} is not ASCII")
        headers[octets.partition(b":")[0].decode().strip()] = unfold(octets)
    return headers


SENDGRID_RESERVED = ("x-sg-id", "x-sg-eid", "dkim-signature", "bcc")
SENDGRID_OWN = ("received", "mime-version", "from", "to", "cc", "subject", "reply-to")  # made from the other keys
SENDGRID_NESTING = ["mixed", "alternative", "related"]  # subtypes of a multipart, and of one in another
SENDGRID_NESTING += ["mixed/alternative", "mixed/related", "alternative/related", "related/alternative"]


def sendgrid_parts(octets: bytes) -> dict:
    """Return content and attachments."""
    import email

    message = email.message_from_bytes(octets)
    content: list = []
    attachments: list = []
    for part in leaf_parts(message):
        named = part.get_content_disposition() == "attachment" or part.get_filename() or part["Content-ID"]
        if part.get_content_maintype() == "text" and not named:
            text = decode_charset(part.get_payload(decode=True), part.get_content_charset("us-ascii"))
            content.append({"type": part.get_content_type(), "value": text.replace("\r\n", "\n")})
        else:
            attachments.append(sendgrid_attachment(part))
    alternative = any(part.get_content_subtype() == "alternative" for part in message.walk())
    types = [item["type"] for item in content]
    if types not in (["text/plain"], ["text/html"]) and not (alternative and types == ["text/plain", "text/html"]):
        raise ValueError(f"its texts are {', '.join(types) or 'none'}, not a plain one, an HTML one, or these two")
    if not all(item["value"] for item in content):
        raise ValueError("a text is empty")
    return {"content": content, "attachments": attachments}


def leaf_parts(part: Any, outer: str = "") -> list:
    """Return the parts that are no multipart; raise ValueError for a nesting whose meaning would be lost."""
    if part.get_content_maintype() != "multipart":
        return [part]
    nesting = f"{outer}/{part.get_content_subtype()}".strip("/")
    if nesting not in SENDGRID_NESTING or not part.is_multipart():
        raise ValueError(f"multipart/{nesting.replace('/', ' with multipart/')} can't be kept")
    return [leaf for inner in part.get_payload() for leaf in leaf_parts(inner, part.get_content_subtype())]


def sendgrid_attachment(part: Any) -> dict:
    """Return a part as an attachment."""
    charset, content_id = part.get_content_charset("utf-8"), (part["Content-ID"] or "").strip("<> ")
    if part.get_content_maintype() == "message":
        octets = part.as_bytes(policy=part.policy.clone(linesep="\r\n")).partition(b"\r\n\r\n")[2]
    else:
        octets = part.get_payload(decode=True)
    name = decode_encoded_words(part.get_filename() or content_id)
    if not (name and octets):
        raise ValueError("an attachment has no name" if octets else f"the attachment {name} is empty")
    if part.get_content_maintype() == "text" and charset not in ("utf-8", "us-ascii"):
        raise ValueError(f"the attachment {name} has the charset {charset}, which can't be declared")
    attachment = {"content": base64.b64encode(octets).decode(), "type": part.get_content_type(), "filename": name}
    inline = part.get_content_disposition() == "inline" or (content_id and not part.get_content_disposition())
    attachment["disposition"] = "inline" if inline else "attachment"
    return {**attachment, "content_id": content_id} if content_id else attachment


AMAZONSES_TEMPORARY = ["TooManyRequestsException", "ThrottlingException", "Throttling"]  # errors 400 that pass
AMAZONSES_TEMPORARY += ["LimitExceededException", "SendingPausedException"]


def amazonses_request(transaction: Transaction) -> HTTPRequest:
    """Return the signed request, with the message as it is; raise Rejected for a message without exactly one From."""
    octets = ascii_message(transaction)
    try:
        author = single_field(parse_message(octets)[0], "from")
        spec = parse_mailboxes(author)[0][1].addr_spec
    except (ValueError, IndexError):
        raise Rejected(make_reply("inexpressible", "one header From is wanted", **transaction.route.endpoint)) from None
    document = {
        "FromEmailAddress": author,
        "Destination": {"ToAddresses": transaction.recipients},
        "Content": {"Raw": {"Data": base64.b64encode(octets).decode()}},
    }
    if transaction.sender and address_key(spec) != address_key(transaction.sender):
        document["FeedbackForwardingEmailAddress"] = transaction.sender
    call = HTTPRequest("POST", "/v2/email/outbound-emails", encode_json(document))
    return sign_sigv4(call, transaction.route, time.time())


def amazonses_reply(route: Route, response: HTTPResponse) -> Reply:
    """Return the reply for a response of Amazon SES."""
    document = json_object(response)
    if response.status == 200 and isinstance(document.get("MessageId"), str):
        return http_accepted(route, response, f"MessageId: {document['MessageId']}")
    name = str(response.headers.get("x-amzn-ErrorType") or document.get("__type") or "")
    name = name.partition(":")[0].rpartition("#")[2]  # some have a namespace in front, or a URL behind
    lines = [str(value) for value in (name, document.get("message") or document.get("Message")) if value]
    reply = http_failure(route, response, lines or None, temporary=name in AMAZONSES_TEMPORARY)
    return reply._replace(route_fault=bool(re.search("Signature|Token|UnrecognizedClient", name)))


def sign_sigv4(call: HTTPRequest, route: Route, now: float) -> HTTPRequest:
    """Return the request with Amazon's signature, version 4, for the service `ses`."""
    # https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html
    site, moment = split_base_url(route.url), time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    scope = f"{moment[:8]}/{route.region}/ses/aws4_request"
    headers = {"host": site.host_header, "x-amz-date": moment}
    if call.method == "POST":
        headers["content-type"] = call.type
    if route.token:
        headers["x-amz-security-token"] = route.token
    names = ";".join(sorted(headers))
    lines = [f"{name}:{headers[name]}" for name in sorted(headers)]
    lines = [call.method, site.path + call.path, "", *lines, "", names]
    canonical = "\n".join([*lines, hashlib.sha256(call.body).hexdigest()])
    text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = b"AWS4" + route.credentials[1].encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.new(key, text.encode(), "sha256").hexdigest()
    value = f"AWS4-HMAC-SHA256 Credential={route.credentials[0]}/{scope}, SignedHeaders={names}, Signature={signature}"
    added = [(name, headers[name]) for name in ("x-amz-date", "x-amz-security-token") if name in headers]
    return call._replace(headers=(*call.headers, *added, ("Authorization", value)))


def mandrill_request(transaction: Transaction) -> HTTPRequest:
    """Return the message as it is."""
    envelope = {"from_email": transaction.sender or None, "to": transaction.recipients}
    content = {"key": transaction.route.credentials[1], "raw_message": ascii_message(transaction).decode()}
    body = encode_json({**content, **envelope, "async": False})
    return HTTPRequest("POST", "/api/1.0/messages/send-raw.json", body)


def mandrill_replies(transaction: Transaction, response: HTTPResponse) -> list:
    """Return a Reply for each recipient; a response that doesn't name one breaks the API's promise."""
    route, errors, document = transaction.route, mandrill_errors(response), response.document()
    if errors:
        return [http_failure(route, response, errors)] * len(transaction.recipients)
    listed = document if response.status == 200 and isinstance(document, list) else []
    items = {address_key(item.get("email")): item for item in listed if isinstance(item, dict)}
    return [mandrill_reply(route, response, items.get(address_key(to), {})) for to in transaction.recipients]


def mandrill_errors(response: HTTPResponse) -> list | None:
    """Return the error message in a response; None if it has none."""
    document = json_object(response)
    return [f"{document.get('name')}: {document.get('message')}"] if document.get("status") == "error" else None


def mandrill_reply(route: Route, response: HTTPResponse, item: dict) -> Reply:
    """Return one recipient's item as a Reply."""
    status, lines = item.get("status"), [f"{key}: {item[key]}" for key in ("reject_reason", "_id") if item.get(key)]
    if status in ("sent", "queued", "scheduled"):
        return http_accepted(route, response, status, *lines)
    if status in ("rejected", "invalid"):
        dsn = "5.1.3" if status == "invalid" else "5.7.1"
        return make_reply("web-refused", *sanitize_lines(lines), word=status, **route.endpoint)._replace(dsn=dsn)
    return http_failure(route, response, None)


async def relay_by_token(make_request: Callable, success: int, transaction: Transaction, transport: Any) -> list:
    """Deliver by an API that takes an access token, and a message as it is with its recipients."""
    route, call = transaction.route, await asyncio.to_thread(make_request, transaction)
    for again in (True, False):  # a token that is refused is replaced once
        login = await transport.tokens.authorize(route)
        token = login.credentials[1]
        response = await transport.http.request(HTTPTarget.of_route(route), call._replace(headers=bearer_header(login)))
        if response.status != 401 or not (again and transport.tokens.drop(route, token)):
            break
    response = response._replace(body=response.body.replace(token.encode(), b"********"))
    ident = response.headers.get("request-id", "none") if success == 202 else json_object(response).get("id")
    accepted = response.status == success and ident
    reply = http_accepted(route, response, f"id: {ident}") if accepted else token_api_failure(route, response)
    return [reply] * len(transaction.recipients)


def msgraph_request(transaction: Transaction) -> HTTPRequest:
    # https://learn.microsoft.com/en-us/graph/api/user-sendmail
    path = f"/v1.0/users/{urllib.parse.quote(transaction.route.credentials[0], '@')}/sendMail"
    return HTTPRequest("POST", path, base64.b64encode(addressed_message(transaction)), type="text/plain")


def gmailapi_request(transaction: Transaction) -> HTTPRequest:
    # https://developers.google.com/workspace/gmail/api/reference/rest/v1/users.messages/send
    path, octets = "/gmail/v1/users/me/messages/send", addressed_message(transaction)
    if len(octets) > GMAILAPI_UPLOAD:
        return HTTPRequest("POST", f"/upload{path}?uploadType=media", octets, type="message/rfc822")
    return HTTPRequest("POST", path, encode_json({"raw": base64.urlsafe_b64encode(octets).decode()}))


def addressed_message(transaction: Transaction) -> bytes:
    """Return the message with the envelope's recipients in its header, from which the API takes them."""
    octets = transaction.octets()
    try:
        fields = parse_message(octets).fields
        if single_field(fields, "bcc"):
            raise ValueError("the header bcc can't be set")
        hidden = ",\r\n ".join(hidden_recipients(transaction, fields))
    except ValueError as error:
        raise Rejected(make_reply("inexpressible", sanitize(str(error)), **transaction.route.endpoint)) from None
    return f"Bcc: {hidden}\r\n".encode() + octets if hidden else octets


def token_api_failure(route: Route, response: HTTPResponse) -> Reply:
    """Return the reply for an error of Graph or Google; a refused token is no verdict on the mail."""
    error = json_object(response).get("error")
    lines = [f"{error.get('code')}: {error.get('message')}"] if isinstance(error, dict) else None
    temporary = bool(lines and GOOGLE_LIMIT.search(str(error.get("errors"))))
    return http_failure(route, response, lines, temporary)


def http_accepted(route: Route, response: HTTPResponse, *lines: str) -> Reply:
    """Return the reply for a mail that the API has taken."""
    return make_reply("web-accepted", *sanitize_lines(lines), word=status_text(response), **route.endpoint)


def http_failure(route: Route, response: HTTPResponse, lines: list | None, temporary: bool = False) -> Reply:
    """Return the reply for a response that is no success; `lines` are the API's error messages, None if it has none."""
    status, text, endpoint = response.status, status_text(response), route.endpoint
    temporary = temporary or status == 429 or status >= 500
    if status == 413:  # from a proxy too, without the API's error messages; the mail will not be smaller next time
        return make_reply("web-refused", *sanitize_lines(lines or []), word=text, **endpoint)._replace(dsn="5.3.4")
    if lines is None or not (temporary or status >= 400):
        excerpt = sanitize(response.body[:400].decode("utf-8", "replace"), 100)
        endpoint.update(maybe_delivered=200 <= status < 300, retry_after=parse_retry_after(response))
        return make_reply("web-rubbish", text, *([excerpt] if excerpt else []), **endpoint)
    reply = make_reply("web-later" if temporary else "web-refused", *sanitize_lines(lines), word=text, **endpoint)
    if temporary:
        return reply._replace(dsn="4.3.0" if status >= 500 else "4.4.5", retry_after=parse_retry_after(response))
    return reply._replace(dsn=DSN_BY_STATUS.get(status, reply.dsn), route_fault=status == 401)


def parse_retry_after(response: HTTPResponse) -> int:
    """Return the seconds after which to try again (RFC 9110 10.2.3), at most a day; 0 if the response has none."""
    reset = response.headers.get("X-RateLimit-Reset") if response.status == 429 else ""  # SendGrid: Unix time
    text, now = (response.headers.get("Retry-After") or reset or "").strip(), time.time()
    try:
        wait = int(text) if re.fullmatch("[0-9]{1,10}", text) else parsedate_to_datetime(text).timestamp() - now
    except (TypeError, ValueError, OverflowError):
        return 0
    return min(max(int(wait - now if wait > 1e9 else wait), 0), 86400)


def sanitize_lines(lines: Any) -> tuple:
    """Return lines of the other side as a reply may carry them."""
    return tuple(sanitize(str(line), 500) for line in lines)[:20]


def ascii_message(transaction: Transaction) -> bytes:
    """Return the message in ASCII, which the APIs want; raise Rejected if that can't be."""
    octets = downgrade_8bit(transaction.octets()) if transaction.message.needs_8bitmime else transaction.octets()
    if not octets.isascii():
        raise Rejected(make_reply("inexpressible", "it has octets over 127", **transaction.route.endpoint))
    return octets


def single_field(fields: list, name: str) -> str:
    """Return the value of a header field, "" if it is absent; raise ValueError if it occurs more than once."""
    values = [unfold(octets) for key, octets in fields if key == name]
    if len(values) > 1:
        raise ValueError(f"the header {name} occurs more than once")
    return values[0] if values else ""


def decode_encoded_words(text: str) -> str:
    """Decode the encoded words (RFC 2047) in a text; raise ValueError or LookupError if one can't be."""
    return ENCODED_WORD.sub(_decode_encoded_word, re.sub(r"(?<=\?=)\s+(?==\?)", "", text))


def _decode_encoded_word(found: Any) -> str:
    charset, encoding, octets = found[1], found[2].upper(), found[3].encode()
    decoded = binascii.a2b_base64(octets) if encoding == "B" else binascii.a2b_qp(octets, header=True)
    return decode_charset(decoded, charset)


def decode_charset(octets: bytes, charset: str) -> str:
    """Decode text in a MIME charset."""
    if charset.upper() == "ISO-2022-JP":
        return jis_to_text(octets.decode("ascii"))
    return octets.decode(codec_name(charset))


def format_mailboxes(text: str) -> str:
    """Return an address field as a submission has it."""
    people = []
    for coded, mailbox in parse_mailboxes(text):
        name, spec = decode_encoded_words(coded), mailbox.addr_spec
        quoted = '"' + re.sub(r'(["\\])', r"\\\1", name) + '"' if re.search(r'[()<>@,;:\\".\[\]]', name) else name
        people.append(f"{quoted} <{spec}>" if name else spec)
    return ", ".join(people)


# -- Probes, for `check --connect`


class ConnectivityProbe(NamedTuple):
    """A route to try, and for MX the domain of a recipient."""

    route: Route
    hostname: str  # our own name, for EHLO
    domain: str = ""  # "" if the route is for many domains


class CheckResult(NamedTuple):
    """The result of one step of a check."""

    step: str
    ok: bool
    text: str


def failed_step(step: str, reply: Reply, endpoint: str = "") -> CheckResult:
    """Return the result of a step that a Reply ended."""
    return CheckResult(step, False, f"{endpoint and endpoint + ': '}{reply.code} {': '.join(reply.message)}")


async def probe_esmtp(probe: ConnectivityProbe, transport: TransportContext) -> list:
    """Look the host up as a delivery would, then open a session."""
    results = await asyncio.to_thread(probe_dns, probe.route)
    return results + (await asyncio.to_thread(probe_session, probe.route, probe.hostname) if results[-1].ok else [])


def probe_dns(route: Route) -> list:
    """Look up the route's host."""
    try:
        found = socket.getaddrinfo(route.host, route.port, type=socket.SOCK_STREAM)
    except OSError as error:
        return [CheckResult("DNS", False, f"{route.host}: {error.strerror}")]
    return [CheckResult("DNS", True, f"{route.host} is {', '.join(dict.fromkeys(item[4][0] for item in found))}")]


def probe_session(route: Route, hostname: str) -> list:
    """Return every step to a session that could take a mail; the last one shows where it failed."""
    session, results = Session(route, hostname), []
    try:
        for step in session.steps():
            step()
            results = session_results(session)
    except (OSError, Rejected) as error:
        session.close()
        reply = error.reply if isinstance(error, Rejected) else session._broken(error)
        name = {"CONN": "TCP", "STARTTLS": "TLS"}.get(reply.command, reply.command)
        failed = failed_step(name, reply, f"{route.address or route.host}:{route.port}")
        return [*(result for result in results if result.step != name), failed]
    session.quit()
    return results + ([CheckResult("AUTH", True, f"logged in as {route.credentials[0]}")] if route.auth else [])


def session_results(session: Session) -> list:
    """Return the steps that a session has done so far."""
    peer = session.sock.getpeername()
    results = [CheckResult("TCP", True, f"connected to {peer[0]}:{peer[1]}")]
    if session.ehlo_resp:
        extensions = [" ".join([name.upper(), *value.split()]) for name, value in session.esmtp_features.items()]
        results.append(CheckResult("EHLO", True, sanitize(", ".join(extensions) or "no extensions", 500)))
    if isinstance(session.sock, ssl.SSLSocket):
        results.append(CheckResult("TLS", True, describe_certificate(session.sock)))
    elif session.step in ("STARTTLS", "AUTH"):
        results.append(CheckResult("TLS", True, "none" + ", though it is offered" * session.has_extn("starttls")))
    return results


def describe_certificate(sock: ssl.SSLSocket) -> str:
    """Return TLS version, and subject and expiry of the server's certificate if it was verified."""
    certificate = sock.getpeercert()
    if not certificate:
        return f"{sock.version()}, certificate not verified"
    subject = ", ".join(f"{key}={value}" for item in certificate["subject"] for key, value in item)
    names = ", ".join(value for _, value in certificate.get("subjectAltName", ()))
    left = int((ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()) // 86400)
    until = f"until {certificate['notAfter']} ({left} days)"
    return sanitize(f"{sock.version()}, certificate of {subject or names}, {until}", 500)


async def probe_mx(probe: ConnectivityProbe, transport: TransportContext) -> list:
    """Query the name servers, then open a session to the first host of the domain that works."""
    route, deadline = probe.route, time.monotonic() + probe.route.timeout
    if not probe.domain:
        found = await transport.resolver.lookup(probe.hostname, MX, deadline)
        return [CheckResult("DNS", found.code != SERVFAIL, found.why or "name servers answer")]
    try:
        hosts = await mx_hosts(probe.domain, transport.resolver, probe.hostname, deadline)
        results = [CheckResult("DNS", True, f"{probe.domain} takes mail at {', '.join(hosts)}")]
        policy = await transport.mta_sts.policy_for(probe.domain, route)
        if policy:
            results.append(CheckResult("MTA-STS", True, f"mode {policy.mode}: {', '.join(policy.hosts)}"))
        for host in admitted_hosts(hosts, policy):
            for hop in await next_hops(host, route, policy, transport.resolver):
                if not isinstance(hop, Route):
                    results.append(CheckResult("DNS", False, ": ".join(hop.message)))
                    continue
                results += await asyncio.to_thread(probe_mx_host, hop, probe.hostname)
                if results[-1].ok:
                    return results
    except Rejected as rejected:
        return [failed_step("DNS", rejected.reply)]
    return results


def probe_mx_host(route: Route, hostname: str) -> list:
    """Open a session to one host; if TLS is opportunistic, find out whether the certificate is accepted."""
    clear, why = replace(route, tls_if_offered=False), ""
    variants = {"": replace(route, tls_verify=True), "not verified": route, "mail goes in clear text": clear}
    for note, hop in variants.items():
        results = probe_session(hop, hostname)
        if results[-1].ok:
            return results + ([CheckResult("TLS", True, f"{note}: {why}")] if note else [])
        if results[-1].step != "TLS" or not route.tls_if_offered:
            break
        why = results[-1].text
    return results


async def probe_local(probe: ConnectivityProbe, transport: TransportContext) -> list:
    """Return whether files can be made in the route's folder, if it has one."""
    if not probe.route.row.into_folder:
        return [CheckResult("NONE", True, "nothing to connect to")]
    folder = probe.route.folder
    ok = is_writable_folder(folder)
    return [CheckResult("FILE", ok, folder if ok else f"{folder} is no folder that can be written")]


def http_probe(ask: Callable) -> Callable:
    """Make a probe of ask(route, request), which returns a line of text if the login is good or raises Rejected."""

    def steps(route: Route) -> list:
        results = probe_dns(route)
        if not results[-1].ok:
            return results
        line, place = KeepAliveConnection(HTTPTarget.of_route(route)), f"{route.host}:{route.port}"
        try:
            line.open()
            results.append(CheckResult("TCP", True, f"connected to {place}"))
            results.append(CheckResult("TLS", True, describe_certificate(line.sock) if line.url.tls else "none"))
            results.append(CheckResult("AUTH", True, ask(route, line.exchange)))
        except Rejected as rejected:
            step = {"CONN": "TLS" if rejected.reply.dsn == "4.7.5" else "TCP"}.get(rejected.reply.command, "AUTH")
            results.append(failed_step(step, rejected.reply, place))
        finally:
            line.close()
        return results

    return lambda probe, transport: asyncio.to_thread(steps, probe.route)


@http_probe
def probe_haineko(route: Route, request: Callable) -> str:
    """Post an empty submission, which is refused after the login."""
    response = request(HTTPRequest("POST", "/submit", b"{}", basic_auth_header(route.credentials)))
    items = haineko_items(response)
    if not items:
        raise Rejected(http_failure(route, response, None))
    if items[0].get("command") == "AUTH" or response.status in (401, 403, 404):
        raise Rejected(haineko_reply(route, response, items[0]))
    return "a Haineko that takes our login" if route.credentials else "a Haineko that wants no login"


@http_probe
def probe_sendgrid(route: Route, request: Callable) -> str:
    """Ask for the permissions of the API key."""
    response = request(HTTPRequest("GET", "/v3/scopes", headers=bearer_header(route)))
    scopes = json_object(response).get("scopes") if response.status == 200 else None
    if not isinstance(scopes, list):
        raise Rejected(http_failure(route, response, sendgrid_errors(response)))
    if "mail.send" not in scopes:
        raise Rejected(make_reply("web-refused", word="the API key lacks the permission mail.send", **route.endpoint))
    return "the API key may send"


@http_probe
def probe_amazonses(route: Route, request: Callable) -> str:
    """Ask for the state of the account."""
    response = request(sign_sigv4(HTTPRequest("GET", "/v2/email/account"), route, time.time()))
    document, failure = json_object(response), amazonses_reply(route, response)
    if response.status == 403 and any("AccessDenied" in line for line in failure.message):
        return "the key is good; it may not read the account, so whether it may send is not known"
    if response.status != 200 or "SendingEnabled" not in document:
        raise Rejected(failure)
    if not document["SendingEnabled"]:
        raise Rejected(make_reply("web-refused", word="sending is switched off for this account", **route.endpoint))
    sandbox = "" if document.get("ProductionAccessEnabled", True) else ", in the sandbox: to verified recipients only"
    return f"the key is good, the account may send{sandbox}"


@http_probe
def probe_mandrill(route: Route, request: Callable) -> str:
    """Ping with the API key."""
    response = request(HTTPRequest("POST", "/api/1.0/users/ping2.json", encode_json({"key": route.credentials[1]})))
    if response.status == 200 and json_object(response).get("PING") == "PONG!":
        return "the key is good"
    raise Rejected(http_failure(route, response, mandrill_errors(response)))


def probe_account(path: str, route: Route, request: Callable) -> str:
    """Read the user's account."""
    path = path.format(user=urllib.parse.quote(route.credentials[0], "@"))
    response = request(HTTPRequest("GET", path, headers=bearer_header(route)))
    document = json_object(response)
    if response.status == 200 and {"id", "emailAddress"} & set(document):
        return "the token is good"
    if response.status == 403 and "error" in document:
        return "the token is good; it may not read the account, so whether it may send is not known"
    raise Rejected(token_api_failure(route, response))


probe_msgraph = http_probe(functools.partial(probe_account, "/v1.0/users/{user}"))
probe_gmail = http_probe(functools.partial(probe_account, "/gmail/v1/users/me/profile"))
send_msgraph = functools.partial(relay_by_token, msgraph_request, 202)
send_gmail = functools.partial(relay_by_token, gmailapi_request, 200)
GRAPH_SCOPES = "https://graph.microsoft.com/.default", "https://graph.microsoft.com/Mail.Send offline_access"
BY_TOKEN = {"needs": ("auth",), "login": ("username", "oauth2")}


relay_haineko = http_relay(haineko_request, haineko_replies)
relay_sendgrid = http_relay(sendgrid_request, sendgrid_reply)
relay_amazonses = http_relay(  # at most 50 recipients: Amazon's quota
    amazonses_request, lambda transaction, response: amazonses_reply(transaction.route, response), 50
)
relay_mandrill = http_relay(mandrill_request, mandrill_replies)
RELAYS.update(
    ESMTP=Relay(relay_esmtp, probe_esmtp, keeps_octets=True),
    MX=Relay(relay_mx, probe_mx, destination="MX {domain}", refuses=("auth",), keeps_octets=True),
    Haineko=Relay(relay_haineko, probe_haineko, default_port=2794, api_url="{scheme}://{host}:{port}"),
    SendGrid=Relay(relay_sendgrid, probe_sendgrid, 25, "https://api.sendgrid.com", ("auth",), login=("password",)),
    AmazonSES=Relay(relay_amazonses, probe_amazonses, 25, "https://email.{region}.amazonaws.com", ("auth", "region")),
    Mandrill=Relay(relay_mandrill, probe_mandrill, 25, "https://mandrillapp.com", ("auth",), login=("password",)),
    MSGraph=Relay(send_msgraph, probe_msgraph, 25, "https://graph.microsoft.com", scopes=GRAPH_SCOPES, **BY_TOKEN),
    GmailAPI=Relay(send_gmail, probe_gmail, 25, "https://gmail.googleapis.com", **BY_TOKEN),
    File=Relay(relay_file, probe_local, destination="File {route.folder}", into_folder=True),
    Screen=Relay(relay_screen, probe_local, destination="Screen"),
    Discard=Relay(relay_discard, probe_local, destination="Discard"),
)

# ======================================================================================================================
# 16. Queue
#     Keeps mail that waits in a file (SQLite) and delivers it, in one process. What follows a reply, bounces and events
#     are functions of values; QueueDB is the file, with its operations; QueueManager delivers.
# ======================================================================================================================

MIN_ATTEMPTS = 3  # before a mail is given up, however old: the clock may have been set forward by days
MAX_SLOTS = 4096  # processes
NEWER_VERSION = "is of a newer version,"
RETENTION = 86400  # seconds for which completed mails and responses to an Idempotency-Key are kept
MAX_HISTORY = 50  # attempts kept of each recipient: the first one and the last ones
MAX_REPLY_LINES = 10  # lines kept of a reply
MAX_INTERRUPTIONS = 3  # in a row, after which a mail is held; before the last one no other suspect is in flight
SUSPECT_SQL = "SELECT count(*) FROM recipients WHERE owner IS NOT NULL AND interruptions>=?"
MAX_ACTIVE = 256  # deliveries under way
MAX_EXPIRED = 64  # mails given up at a time
DESTINATIONS_SQL = """
    WITH RECURSIVE found(destination) AS (
        SELECT min(destination) FROM recipients WHERE due IS NOT NULL
        UNION ALL SELECT (SELECT min(destination) FROM recipients WHERE due IS NOT NULL
                          AND destination > found.destination)
                  FROM found WHERE destination IS NOT NULL)
    SELECT destination FROM found WHERE destination IS NOT NULL"""  # one index search each, however many wait
WAITING_SQL = "SELECT id, interruptions FROM recipients WHERE destination=? AND due IS NOT NULL AND"
DUE_SQL = f"{WAITING_SQL} due<=? ORDER BY due LIMIT ?"
EXPIRED_SQL = f"{WAITING_SQL} created_at<=? AND attempts>=? ORDER BY created_at LIMIT ?"
STATE_SQL = "CASE WHEN due IS NOT NULL THEN 'waiting' WHEN state='open' THEN 'sending' ELSE state END AS state"
WAITING_OF_MESSAGE = "(due IS NOT NULL OR state='held') AND message=(SELECT id FROM messages WHERE queueid=?)"

# Nothing is answered 2xx before it is committed to disk. After a process was killed,
#  - a mail that was not yet in the file is sent again by its client, who has no answer. With an Idempotency-Key it is
#    in the file before anything is sent, and is not sent twice.
#  - leases of the dead process are seen, since it no longer holds its lock. Their recipients are tried again, and the
#    log says that the mail may arrive twice.
#  - the result of an attempt is there together with the bounce and the event that report it, or not at all.


class Disposition(NamedTuple):
    """What follows for a recipient after an attempt."""

    state: str  # "open", "delivered" or "failed"
    pause: float = 0.0  # seconds until the next attempt, if open


def next_disposition(reply: Reply, attempts: int, age: float, jitter: float, settings: QueueSettings) -> Disposition:
    """Return what follows the reply to the latest of `attempts` for a mail `age` seconds old; jitter is 0 to 1."""
    if reply.accepted:
        return Disposition("delivered")
    expired = age >= settings.lifetime
    if not reply.temporary or (expired and attempts >= MIN_ATTEMPTS):
        return Disposition("failed")
    pause = settings.retry_after[min(attempts, len(settings.retry_after)) - 1] * (0.8 + 0.4 * jitter)
    left = settings.lifetime if expired else max(settings.lifetime - age, 1.0)  # the last attempt is at its end
    return Disposition("open", min(max(pause, reply.retry_after), left))


class AttemptResult(NamedTuple):
    """Result of an attempt, to be recorded."""

    reply: Reply | None  # None: the lifetime ended without another attempt
    disposition: Disposition
    follow_ups: tuple = ()  # NewQueueItems that report it
    destination: str = ""  # by the settings now in force; "": as it was


class Attempt(NamedTuple):
    """Earlier attempt to deliver to a recipient."""

    time: float
    reply: Reply


class NewRecipient(NamedTuple):
    """Recipient of a new item."""

    as_written: str  # by the client
    recipient: str  # as passed to relays
    number: int  # of the copy
    destination: str  # see destination_key()


class NewQueueItem(NamedTuple):
    """Mail, or event for the webhook, to be stored."""

    queueid: str
    kind: str  # "mail" or "event"
    sender: str  # "" is the null sender
    login: str  # user name that sent it; "" if none was needed
    created_at: float
    message: Message
    recipients: tuple  # of NewRecipient
    key: bytes | None = None  # digest of login, path and Idempotency-Key
    body_digest: bytes | None = None  # of the request's body
    send_at: float = 0.0  # no attempt is made before


class LeasedRecipient(NamedTuple):
    """Recipient leased to this process, with all that its delivery needs."""

    id: int
    queueid: str
    kind: str
    sender: str
    login: str
    created_at: float
    message: Message
    as_written: str
    recipient: str
    number: int
    destination: str
    attempts: int
    history: tuple = ()  # of Attempt


def destination_key(route: Route, domain: str) -> str:
    """Return the key of the next hop: an unreachable host delays mail to its own destination only."""
    if route.relay == "File":
        return f"File {route.folder}"
    return f"MX {domain.lower()}" if route.relay == "MX" else f"{route.relay} {route.host}:{route.port}"


def queued_reply(queueid: str, reply: Reply | None = None) -> Reply:
    """Return the reply for a recipient that waits, with the lines of its latest reply."""
    dialogue = reply and reply.dialogue
    return make_reply("queued", *(reply.message if reply else ()), word=queueid, mailer="Queue", dialogue=dialogue)


# -- Bounces and events


def notifications(leased: LeasedRecipient, reply: Reply, state: str, settings: Settings, now: float) -> tuple:
    """Return the items that report an attempt: an event for the webhook, a bounce for the sender; usually none."""
    items, event = [], "deferred" if state == "open" and leased.attempts == 1 else state
    if leased.kind == "mail" and leased.sender and event != "open" and settings.queue.webhook:  # not of bounces
        items.append(webhook_event(f"message.{event}", leased, reply, settings.queue.webhook, now))
    if state == "failed" and may_bounce(leased, settings):
        items.append(new_bounce(leased, reply, settings, now))
    return tuple(items)


def webhook_event(name: str, leased: LeasedRecipient, reply: Reply, url: str, now: float) -> NewQueueItem:
    """Return an event in the form of Standard Webhooks; its queue id is the webhook-id."""
    data = {"queueid": leased.queueid, "login": leased.login or None, "addresser": leased.sender}
    data.update(reply_to_dict(leased.as_written, reply))
    timestamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    event = {"type": name, "timestamp": timestamp, "data": {**data, "attempts": leased.attempts}}
    message = Message((ENCODER.encode(event).encode(),))
    recipient = NewRecipient(url, url, 1, f"Webhook {WEBHOOK_URL.fullmatch(url)['host']}")
    return NewQueueItem(new_queueid(now), "event", "", "", now, message, (recipient,))


def may_bounce(leased: LeasedRecipient, settings: Settings) -> bool:
    """Return whether the sender gets a bounce: only if known, since others' addresses may be forged (backscatter)."""
    known = leased.login or not check_recipient(parse_address(leased.sender), settings)
    return leased.kind == "mail" and bool(leased.sender and known) and "FAILURE" in leased.message.dsn[1]


def new_bounce(leased: LeasedRecipient, reply: Reply, settings: Settings, now: float) -> NewQueueItem:
    queueid, domain = new_queueid(now), parse_address(leased.sender).domain
    message = bounce_message(leased, reply, settings.hostname, queueid, now)
    destination = destination_key(resolve_route(domain, "", settings)[0], domain)
    recipient = NewRecipient(leased.sender, leased.sender, 1, destination)
    return NewQueueItem(queueid, "mail", "", leased.login, now, message, (recipient,))


def bounce_message(leased: LeasedRecipient, reply: Reply, hostname: str, queueid: str, now: float) -> Message:
    """Return the delivery status notification (RFC 3464) that a recipient's mail has failed."""
    header = returned_header(leased.message.copy(leased.recipient, leased.number))
    lines = [sanitize(line, 500).encode("ascii", "replace").decode() for line in reply.message[:MAX_REPLY_LINES]]
    lines, is_ascii = [f"{reply.code} {line}".rstrip() for line in lines or [""]], leased.recipient.isascii()
    text = BOUNCE_TEMPLATE.format(
        leased=leased, hostname=hostname, queueid=queueid, boundary=f"{queueid}/report", date=rfc5322_date(int(now)),
        encoding="7bit" if header.isascii() and is_ascii else "8bit", address_type="rfc822" if is_ascii else "utf-8",
        arrival_date=rfc5322_date(int(leased.created_at)),
        server=f" ({reply.host})" if reply.host else "", reply="\r\n    ".join(lines),
        remote_mta=f"Remote-MTA: dns; {reply.host}\r\n" if reply.host else "",
        status=reply.dsn or ("4.4.7" if reply.temporary else "5.0.0"),  # RFC 3463: delivery time expired; undefined
    )  # fmt: skip
    octets = text.encode() + header + f"\r\n--{queueid}/report--\r\n".encode()
    return Message((octets,), needs_8bitmime=not octets.isascii())


def returned_header(octets: bytes) -> bytes:
    """Return the fields by which a sender recognizes the message, as far as they are short."""
    found, size = [], 0
    for match in RETURNED_FIELD.finditer(octets.partition(b"\r\n\r\n")[0] + b"\r\n"):
        size += len(match[0])
        found += [match[0]] if size <= MAX_RETURNED else []
    return b"".join(found)


RETURNED_FIELD = re.compile(rb"(?im)^(?:From|To|Subject|Date|Message-Id):[^\r\n]*\r\n(?:[ \t][^\r\n]*\r\n)*")
MAX_RETURNED = 4096  # octets

BOUNCE_TEMPLATE = """\
Received: by {hostname} (Haineko) id {queueid};
	{date}
From: Mail Delivery System <MAILER-DAEMON@{hostname}>
To: {leased.sender}
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

This is the mail system at {hostname}. Your mail to

    {leased.recipient}

could not be delivered. After {leased.attempts} attempt(s) since {arrival_date} the last reply{server} was:

    {reply}

It will not be tried again. The beginning of its header is attached.

--{boundary}
Content-Type: message/delivery-status

Reporting-MTA: dns; {hostname}
X-Haineko-Queueid: {leased.queueid}
Arrival-Date: {arrival_date}

Final-Recipient: {address_type}; {leased.recipient}
Action: failed
Status: {status}
{remote_mta}Diagnostic-Code: smtp; {reply}

--{boundary}
Content-Type: text/rfc822-headers
Content-Transfer-Encoding: {encoding}

""".replace("\n", "\r\n")


async def post_webhook(
    leased: LeasedRecipient, secret: bytes, now: float, http_pool: HTTPConnectionPool, timeout: float = 15.0
) -> Reply:
    """POST an event to its webhook; return a reply as a relay gives it."""
    if not secret:
        return make_reply("webhook-never", word="the settings have no webhook any more", mailer="Webhook")
    base_url, path = WEBHOOK_URL.fullmatch(leased.recipient).group("base", "path")
    target = HTTPTarget(base_url, timeout, "Webhook")
    body, event_id = leased.message.parts[0], f"msg_{leased.queueid}"
    digest = hmac.digest(secret, b"%b.%d.%b" % (event_id.encode(), int(now), body), "sha256")
    headers = (  # Standard Webhooks 1.0
        ("webhook-id", event_id),
        ("webhook-timestamp", str(int(now))),
        ("webhook-signature", f"v1,{base64.b64encode(digest).decode()}"),
    )
    try:
        status = (await http_pool.request(target, HTTPRequest("POST", path or "/", body, headers))).status
    except Rejected as refused:
        reply = refused.reply
        unreachable = {"command": "CONN"} if reply.command == "CONN" else {}
        return make_reply("webhook-later", word=": ".join(reply.message), **target.endpoint, **unreachable)
    slug = "webhook" if 200 <= status <= 299 else "webhook-never" if status == 410 else "webhook-later"  # 410 is Gone
    return make_reply(slug, word=str(status), **target.endpoint)


# -- The file


class QueueDB:
    """The queue's file as one process uses it.

    One thread commits, and what comes meanwhile is the next transaction, so that many mails share one fsync.
    """

    BUSY = 5.0  # seconds to wait for another process's lock
    BATCH = 256  # operations in one transaction

    def __init__(self, settings: QueueSettings, wake_socket: socket.socket | None = None) -> None:
        self.settings, self.wake_socket = settings, wake_socket
        if wake_socket:
            wake_socket.setblocking(False)
        self.waiting: list = []  # of (operation, values, future)
        self.committing: asyncio.Task | None = None
        self.thread = ThreadPoolExecutor(1)
        self.db: Any = None
        self.file_ids: dict = {}  # of the files as they were opened
        self.slot = self.locks = 0  # number of the byte that this process has locked; the lock file
        self.fault = ""  # why the file can't be used
        self.woken = False  # since the last commit

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
            batch, self.waiting = self.waiting[: self.BATCH], self.waiting[self.BATCH :]
            work = [(operation, values) for operation, values, _ in batch]
            try:
                results = await asyncio.get_running_loop().run_in_executor(self.thread, self.commit, work)
            except Exception:  # callers wait for results
                log_exception("queue")
                results = [Rejected(make_reply("store", mailer="Queue"))] * len(work)
            self.woken = False
            for (_, _, future), result in zip(batch, results):
                if not future.done():  # its task was cancelled
                    future.set_result(result)

    async def add(self, item: NewQueueItem, results: list | None = None, leased: bool = False) -> Any:
        """Store an item, see enqueue(); raise Rejected if the disk is too full."""
        return await self.add_by(enqueue, item, results, leased)

    async def add_by(self, operation: Callable, *values: Any) -> Any:
        if not self.has_free_space():
            raise Rejected(make_reply("store", f"less than {self.settings.min_free} octets are free", mailer="Queue"))
        return await self.do(operation, *values)

    async def do_eventually(self, operation: Callable, *values: Any) -> None:
        """Record what has happened already: at once, or in a task of its own as soon as the file can be used again."""
        try:
            await self.do(operation, *values)
        except Rejected:
            asyncio.get_running_loop().create_task(self._repeat(operation, *values))

    async def _repeat(self, operation: Callable, *values: Any) -> None:
        await asyncio.sleep(1.0)
        await self.do_eventually(operation, *values)

    async def release(self, operation: Callable, lease: Any) -> None:
        """End the lease whose result the operation failed to record because of a bug: the delivery is tried again."""
        await self.do_eventually(release_leases, self.settings, time.time(), LEASE_CONDITIONS[operation], lease)

    def wake_manager(self) -> None:
        """Tell the queue manager that something is due; once after each commit is enough."""
        if self.wake_socket and not self.woken:
            self.woken = True
            with contextlib.suppress(OSError):  # it has been woken often enough
                self.wake_socket.send(b"\0")

    def has_free_space(self) -> bool:
        """Return whether the disk has as much free space as it should."""
        return self.free_space() >= self.settings.min_free

    def free_space(self) -> int:
        """Return how many octets the disk has free, -1 if it can't be used."""
        try:
            disk = os.statvfs(os.path.dirname(self.settings.path))
        except OSError:
            return -1
        return disk.f_bavail * disk.f_frsize

    def health_error(self) -> str:
        """Return what is wrong with the file or its disk, "" for nothing."""
        return "the queue can't be used" if self.fault else "" if self.has_free_space() else "disk full"

    def commit(self, work: list) -> list:
        """Return the results of operations, on disk in one transaction; a Rejected for each if that fails."""
        import sqlite3

        try:
            if not self.db:
                self._open()
            fcntl.lockf(self.locks, fcntl.LOCK_EX, 1, 0)  # SQLite itself would wait by sleeping, sometimes long
            db = self._open()  # now, when no other process writes: the files may have been replaced
            db.execute("BEGIN IMMEDIATE")
            results = [operation(db, self.slot, *values) for operation, values in work]
            db.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            self.close()
            self._log_fault(f"{self.settings.path}: {error}")
            return [Rejected(make_reply("store", mailer="Queue")) for _ in work]
        except Exception as error:  # a bug in one operation must not undo the others
            self.close()
            if len(work) > 1:
                return [self.commit([one])[0] for one in work]
            log_exception("queue")
            ((operation, values),) = work
            if operation not in LEASE_CONDITIONS:
                return [error]
            values = self.settings, time.time(), LEASE_CONDITIONS[operation], values[0]
            return self.commit([(release_leases, values)])  # they must not outlast it
        finally:
            if self.locks:
                fcntl.lockf(self.locks, fcntl.LOCK_UN, 1, 0)
        self._log_fault("")
        return results

    def close(self, for_good: bool = False) -> None:
        """Undo what isn't on disk yet; the next commit opens the file again."""
        if self.db:
            self.db.close()
        self.db = None
        if for_good and self.slot:
            os.close(self.locks)
            self.slot = self.locks = 0

    def _log_fault(self, error: str) -> None:
        if error != self.fault:
            text = f"queue: {sanitize(error)}; nothing is accepted into it" if error else "queue: can be used again"
            log.lines(text, level="error" if error else "info")
        self.fault = error

    def _open(self) -> Any:
        """Return the connection; raise sqlite3.Error or OSError."""
        import sqlite3

        if self.db and (self.file_ids == self._file_ids() or not self._leave_files()):
            self._lock_slot(self.db)
            return self.db
        path = self.settings.path
        for suffix in ("", "-wal", "-shm"):
            if not suffix or os.path.lexists(path + suffix):
                os.close(open_private(path + suffix, os.O_RDONLY))
        db = self.db = sqlite3.connect(path, timeout=self.BUSY, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            db.execute(f"PRAGMA {pragma}")
        migrate(db)
        self._lock_slot(db)
        self.file_ids = self._file_ids()
        return db

    def _file_ids(self) -> dict:
        return {path: file_id(path) for path in [self.settings.path + suffix for suffix in ("", "-wal", "-shm")]}

    def _leave_files(self) -> bool:
        """Close files that were moved or replaced while in use; return False if another program reads them just now.

        All mail must be in the file that was moved, and what remains here of its log must not be read with a new one.
        """
        if self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()["busy"]:
            return False
        log.lines(f"queue: {sanitize(self.settings.path)} was moved or replaced; opening what is there now")
        for path, before in self.file_ids.items():
            if path != self.settings.path and before and file_id(path) == before:
                os.unlink(path)
        self.close()
        return True

    def _lock_slot(self, db: Any) -> None:
        """Lock a slot, the same again if the lock file was replaced; what its last process had leased is released."""
        path, before = self.settings.path + ".lock", self.slot
        if before and file_id(path) == file_id(self.locks):
            return
        if before:
            os.close(self.locks)
        self.slot = self.locks = 0
        locks, slot = lock_slot(path, before)
        if slot != before:
            try:
                db.execute("BEGIN IMMEDIATE")
                release_leases(db, slot, self.settings, time.time())
                db.execute("COMMIT")
            except BaseException:
                os.close(locks)
                raise
        self.locks, self.slot = locks, slot


def file_id(file: str | int) -> tuple | None:
    """Return the device and inode of a path or an open file, None if there is none."""
    try:
        found = os.fstat(file) if isinstance(file, int) else os.lstat(file)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def lock_slot(path: str, preferred: int) -> tuple:
    """Return the open lock file and the number of a byte in it, now locked.

    The kernel unlocks it when the process ends, so the owner of a lease is known to be alive. No process may open the
    file twice: closing one handle would unlock all.
    """
    handle = open_private(path, os.O_RDWR)
    for slot in (preferred or 1, *range(1, MAX_SLOTS)):
        if lock_byte(handle, slot):
            return handle, slot
    os.close(handle)
    raise OSError(errno.EAGAIN, "too many processes use it")


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


def lock_byte(handle: int, offset: int) -> bool:
    """Lock one byte of the file; return False if another process has it."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
    except OSError:
        return False
    return True


# A new file; times are seconds since the epoch.
SCHEMA = """
    CREATE TABLE messages (
        id INTEGER PRIMARY KEY, queueid TEXT NOT NULL UNIQUE,
        kind TEXT NOT NULL,                -- mail, or event for the webhook
        sender TEXT NOT NULL, login TEXT NOT NULL, created_at REAL NOT NULL,
        open_recipients INTEGER NOT NULL,  -- how many are neither delivered nor given up
        completed_at REAL,                 -- when none was left
        owner INTEGER,                     -- slot of the process that has yet to answer its client
        key BLOB UNIQUE,                   -- with Idempotency-Key: digest of login, path and key
        body_digest BLOB,                  -- of the request
        response TEXT,                     -- to the client: JSON of status, headers, body
        size INTEGER NOT NULL,             -- octets of the message
        parts TEXT NOT NULL,               -- JSON: flags (1: 8BITMIME, 2: SMTPUTF8), then the length of each part
        octets BLOB NOT NULL               -- the parts; empty once completed
    );
    CREATE INDEX messages_by_done ON messages(completed_at) WHERE completed_at IS NOT NULL;
    CREATE TABLE recipients (
        id INTEGER PRIMARY KEY, message INTEGER NOT NULL REFERENCES messages(id) ON DELETE CASCADE,
        as_written TEXT NOT NULL,          -- by the client
        recipient TEXT NOT NULL,           -- as relays are told
        number INTEGER NOT NULL, destination TEXT NOT NULL,
        state TEXT NOT NULL, created_at REAL NOT NULL,  -- open, delivered, failed, dropped or held; or its send_at
        due REAL,                          -- open and not leased: time of the next attempt; 0: now, even if throttled
        owner INTEGER,                     -- leased: slot of the process that delivers it
        attempts INTEGER NOT NULL,
        history TEXT NOT NULL,             -- JSON, see add_attempt()
        interruptions INTEGER NOT NULL DEFAULT 0  -- in a row
    );
    CREATE INDEX recipients_by_message ON recipients(message);
    CREATE INDEX recipients_by_owner ON recipients(owner) WHERE owner IS NOT NULL;
    CREATE INDEX recipients_by_due ON recipients(destination, due) WHERE due IS NOT NULL;
    CREATE INDEX recipients_by_age ON recipients(destination, created_at) WHERE due IS NOT NULL;
    CREATE INDEX recipients_held ON recipients(destination) WHERE state='held'
"""
# Each upgrades a file from the version before (PRAGMA user_version), the first one from version 1 to 2.
MIGRATIONS = (
    """
    ALTER TABLE messages RENAME COLUMN born TO created_at;
    ALTER TABLE messages RENAME COLUMN open TO open_recipients;
    ALTER TABLE messages RENAME COLUMN done TO completed_at;
    ALTER TABLE messages RENAME COLUMN body TO body_digest;
    ALTER TABLE messages RENAME COLUMN answer TO response;
    ALTER TABLE recipients RENAME COLUMN given TO as_written;
    ALTER TABLE recipients RENAME COLUMN lane TO destination;
    ALTER TABLE recipients RENAME COLUMN born TO created_at;
    ALTER TABLE recipients ADD COLUMN interruptions INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX recipients_held ON recipients(destination) WHERE state='held';
    DROP INDEX messages_by_owner
    """,
)


def migrate(db: Any, migrations: tuple = MIGRATIONS) -> None:
    """Bring the file to the newest version in one transaction; refuse a newer one."""
    newest = 1 + len(migrations)
    if db.execute("PRAGMA user_version").fetchone()[0] == newest:
        return
    db.execute("BEGIN IMMEDIATE")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > newest:
        raise OSError(f"{NEWER_VERSION} {version}; this Haineko knows {newest}")
    for script in migrations[version - 1 :] if version else (SCHEMA,):
        for statement in re.sub(r" *--[^\n]*", "", script).split(";"):
            db.execute(statement)
    db.execute(f"PRAGMA user_version={newest}")
    db.execute("COMMIT")


# -- Operations on the file, called as operation(db, slot, *values) within a transaction; rows are sqlite3.Row


def enqueue(db: Any, slot: int, item: NewQueueItem, results: list | None, leased: bool = False) -> Any:
    """Store an item and return None, or return the earlier message with the same key.

    Recipients are due at once or at send_at, leased to this process if `leased`, or as their first attempts say.
    """
    if item.key:
        expired = item.created_at - RETENTION
        db.execute("UPDATE messages SET key=NULL WHERE key=? AND created_at<=?", (item.key, expired))
        earlier = "SELECT queueid, body_digest, owner, response FROM messages WHERE key=?"
        found = db.execute(earlier, (item.key,)).fetchone()
        if found:
            return found
    octets, flags = b"".join(item.message.parts), item.message.needs_8bitmime + 2 * item.message.needs_smtputf8
    owner, created_at = slot if leased or results else None, item.created_at
    message = insert(
        db, "messages", queueid=item.queueid, kind=item.kind, sender=item.sender, login=item.login,
        created_at=created_at, open_recipients=len(item.recipients), owner=owner, key=item.key,
        body_digest=item.body_digest, size=len(octets), octets=octets,
        parts=json.dumps([flags, *map(len, item.message.parts), *item.message.dsn]),
    )  # fmt: skip
    starts_at = max(created_at, item.send_at)  # the lifetime counts from then
    due = starts_at if owner is None else None
    state = {"message": message, "state": "open", "created_at": starts_at, "due": due, "owner": owner}
    for recipient in item.recipients:
        insert(db, "recipients", **recipient._asdict(), **state, attempts=0, history="[]")
    if results:  # their attempts took a while
        finish_request(db, slot, item.queueid, results, None, max(time.time(), created_at))
    return None


def enqueue_all(db: Any, slot: int, items: list, response: str | None) -> Any:
    """Store the mails of a request and its response; or return the earlier mail with the key of the first."""
    earlier = enqueue(db, slot, items[0], None)
    if not earlier:
        for item in items[1:]:
            enqueue(db, slot, item, None)
        finish_request(db, slot, items[0].queueid, [], response, items[0].created_at)
    return earlier


def insert(db: Any, table: str, **values: Any) -> int:
    """Insert a row and return its id."""
    places = ",".join("?" * len(values))
    return db.execute(f"INSERT INTO {table} ({','.join(values)}) VALUES ({places})", (*values.values(),)).lastrowid


def finish_request(db: Any, slot: int, queueid: str, results: list, response: str | None, now: float) -> None:
    """Record the results of a mail's first attempts, and the response to its client."""
    message = db.execute("SELECT id FROM messages WHERE queueid=?", (queueid,)).fetchone()
    if not message:  # the file was replaced meanwhile
        return
    rows = db.execute("SELECT id FROM recipients WHERE message=? ORDER BY id", (message["id"],)).fetchall()
    for row, result in zip(rows, results):
        finish_attempt(db, slot, row["id"], result, now)
    db.execute("UPDATE messages SET owner=NULL, response=? WHERE id=?", (response, message["id"]))


def finish_attempt(db: Any, slot: int, row_id: int, result: AttemptResult, now: float) -> None:
    """Record the result of an attempt and what reports it; ends the lease."""
    sql = "SELECT message, destination, history FROM recipients WHERE id=? AND owner=?"
    row = db.execute(sql, (row_id, slot)).fetchone()
    if not row:  # the file was replaced meanwhile
        return
    state, pause = result.disposition
    history = add_attempt(row["history"], now, result.reply) if result.reply else row["history"]
    db.execute(
        "UPDATE recipients SET destination=?, state=?, due=?, owner=NULL, attempts=attempts+?, interruptions=0,"
        " history=? WHERE id=?",
        (result.destination or row["destination"], state, now + pause if state == "open" else None,
         result.reply is not None, history, row_id),
    )  # fmt: skip
    if state != "open":
        close_recipients(db, row["message"], 1, now)
    for item in result.follow_ups:
        enqueue(db, slot, item, None)


def close_recipients(db: Any, message: int, count: int, now: float) -> None:
    """Count recipients that are done with; after the last one delete the octets; the result stays until purge()."""
    db.execute("UPDATE messages SET open_recipients=open_recipients-? WHERE id=?", (count, message))
    db.execute("UPDATE messages SET completed_at=?, octets=x'' WHERE id=? AND open_recipients<=0", (now, message))


def add_attempt(history: str, now: float, reply: Reply) -> str:
    """Return the JSON of the attempts with one more; the ones in the middle go if there are too many."""
    lines = [sanitize(line, 500) for line in reply.message[:MAX_REPLY_LINES]]
    attempts = json.loads(history)
    attempts.append([round(now, 3), reply.code, reply.dsn, reply.command, lines, reply.mailer, reply.host, reply.port])
    return ENCODER.encode(attempts[:1] + attempts[1:][1 - MAX_HISTORY :])


def parse_history(history: str) -> tuple:
    """Return the Attempts that add_attempt() wrote."""
    return tuple([
        Attempt(when, Reply(code, dsn, command, tuple(lines), *place))
        for when, code, dsn, command, lines, *place in json.loads(history)
    ])  # fmt: skip


def lease_due(
    db: Any, slot: int, now: float, limit: int, in_flight: dict, throttled: dict, expired_before: float
) -> list:
    """Lease what is due to this process: up to `limit` of each destination, less those in flight.

    `throttled` is {destination: failures}; of these only what flush_queue() made due, and what was created before
    `expired_before` and needs no more attempts.
    """
    free, leased = MAX_ACTIVE - sum(in_flight.values()), []
    suspect = db.execute(SUSPECT_SQL, (MAX_INTERRUPTIONS - 1,)).fetchone()[0]
    for (destination,) in db.execute(DESTINATIONS_SQL).fetchall():
        count = min(limit - in_flight.get(destination, 0), free)
        if count <= 0:
            continue
        rows = db.execute(DUE_SQL, (destination, 0 if destination in throttled else now, count)).fetchall()
        if destination in throttled:
            attempts = MIN_ATTEMPTS - throttled[destination]
            rows += db.execute(EXPIRED_SQL, (destination, expired_before, attempts, MAX_EXPIRED)).fetchall()
        for row_id, interruptions in dict(map(tuple, rows)).items():
            if interruptions < MAX_INTERRUPTIONS - 1 or not suspect:
                suspect = suspect or interruptions >= MAX_INTERRUPTIONS - 1
                leased += lease(db, slot, row_id)
        free -= len(rows)
    return leased


def lease(db: Any, slot: int, row_id: int) -> list:
    """Lease one recipient; one that can't be read is held, or it would keep all others from being read."""
    row = db.execute(
        "SELECT r.id, queueid, kind, sender, login, r.created_at, parts, as_written, recipient, number, destination,"
        " attempts, history, octets FROM recipients r JOIN messages m ON m.id=r.message WHERE r.id=?", (row_id,)
    ).fetchone()  # fmt: skip
    try:
        history, parts = parse_history(row["history"]), json.loads(row["parts"])
        flags, *lengths = [part for part in parts if type(part) is int]
    except (ValueError, TypeError):
        log_exception(row["queueid"])
        db.execute("UPDATE recipients SET state='held', due=NULL WHERE id=?", (row_id,))
        return []
    db.execute("UPDATE recipients SET due=NULL, owner=? WHERE id=?", (slot, row_id))
    octets = io.BytesIO(row["octets"])
    dsn = tuple([part for part in parts if type(part) is str])  # absent in files of older versions
    message = Message(
        tuple([octets.read(length) for length in lengths]), bool(flags & 1), flags > 1, dsn or DEFAULT_DSN
    )
    return [LeasedRecipient(*row[:-1])._replace(message=message, history=history)]


def reclaim_dead_leases(db: Any, slot: int, queue_db: QueueDB, now: float) -> None:
    """Release the leases of processes that have ended; `queue_db` opens its lock file with its first transaction."""
    locks = queue_db.locks
    sql = "SELECT DISTINCT owner FROM recipients WHERE owner IS NOT NULL AND owner<>?"
    for (owner,) in db.execute(sql, (slot,)).fetchall():
        if lock_byte(locks, owner):  # its process is gone
            release_leases(db, owner, queue_db.settings, now)
            fcntl.lockf(locks, fcntl.LOCK_UN, 1, owner)  # a process that takes the slot now waits for this commit


def release_leases(
    db: Any, owner: int, settings: QueueSettings, now: float, condition: str = "", lease: Any = None
) -> None:
    """End the slot's leases, or those that a row of LEASE_CONDITIONS selects; their mail may have been sent."""
    reply = make_reply("interrupted", mailer="Queue")
    rows = db.execute(
        "SELECT r.*, m.queueid FROM recipients r"
        f" JOIN messages m ON m.id=r.message WHERE r.owner=?{condition}", (owner, *([lease] if condition else []))
    ).fetchall()  # fmt: skip
    for row in rows:
        held = row["interruptions"] + 1 >= MAX_INTERRUPTIONS
        what = f"held after {MAX_INTERRUPTIONS} times; see `queue retry`" if held else "to be tried again"
        text, status = f"delivery interrupted, the mail may arrive twice; {what}", "held" if held else "deferred"
        log.event("warning", "interrupted", text, queueid=row["queueid"], to=[row["recipient"]], status=status)
        pause = next_disposition(reply, row["attempts"] + 1, 0, random_unit(), settings).pause
        db.execute(
            "UPDATE recipients SET state=?, due=?, owner=NULL, attempts=attempts+1, interruptions=interruptions+1,"
            " history=? WHERE id=?",
            ("held" if held else "open", None if held else now + pause, add_attempt(row["history"], now, reply),
             row["id"]),
        )  # fmt: skip
        db.execute("UPDATE messages SET owner=NULL WHERE id=?", (row["message"],))


# {operation that ends leases: SQL that selects them by its first value}: if it fails by a bug, they are released
LEASE_CONDITIONS = {finish_attempt: " AND r.id=?", finish_request: " AND m.queueid=?"}


def purge(db: Any, slot: int, now: float) -> None:
    """Delete some of what was completed long ago."""
    sql = "DELETE FROM messages WHERE id IN (SELECT id FROM messages WHERE completed_at<? LIMIT 500)"
    db.execute(sql, (now - RETENTION,))


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
    return db.execute(
        f"SELECT r.id, queueid, size, m.created_at, due, sender, recipient, history, {STATE_SQL} FROM recipients r"
        " JOIN messages m ON m.id=r.message WHERE r.id>? AND r.state IN ('open', 'held') ORDER BY r.id LIMIT ?",
        (row_id, limit),
    ).fetchall()


def flush_queue(db: Any, slot: int, queueid: str | None) -> int:
    """Make what waits (but not for `send_at`), or all that waits or is held of one mail, due now, even if throttled;
    return how many recipients."""
    if not queueid:
        return db.execute("UPDATE recipients SET due=0 WHERE due>=0 AND created_at<=?", (time.time(),)).rowcount
    sql = f"UPDATE recipients SET due=0, state='open', interruptions=0 WHERE {WAITING_OF_MESSAGE}"
    return db.execute(sql, (queueid,)).rowcount


def drop_message(db: Any, slot: int, queueid: str, now: float) -> Any:
    """Give up what waits of a mail, without a bounce; return how many recipients, or Rejected if one is being sent."""
    message = message_status(db, slot, queueid)
    if message and any(row["state"] == "sending" for row in message["recipients"]):
        return Rejected(make_reply("queue-sending"))
    count = db.execute(
        f"UPDATE recipients SET state='dropped', due=NULL WHERE {WAITING_OF_MESSAGE}", (queueid,)
    ).rowcount
    if count:
        close_recipients(db, message["id"], count, now)
    return count


def correct_due(db: Any, slot: int, settings: QueueSettings, now: float) -> None:
    """Make due what would wait longer than any pause, since the clock was set back; not what is to be sent later."""
    latest = now + 1.2 * max(settings.retry_after)
    created_at = "(SELECT created_at FROM messages WHERE id=message)"
    db.execute(f"UPDATE recipients SET due=? WHERE due>? AND (attempts>0 OR due<={created_at})", (now, latest))


# -- The process that delivers


class Throttle(NamedTuple):
    """Destination to which nothing can be sent for now."""

    until: float  # time.monotonic()
    failures: int  # in a row


class QueueManager:
    """Delivers what is due: a few at a time to each destination, so that an unreachable host delays no other."""

    def __init__(self, app: Any, wake_socket: socket.socket) -> None:
        self.app, self.db, self.wake_socket = app, app.queue, wake_socket
        self.in_flight: dict = {}  # destination: number of deliveries
        self.settings: Settings | None = None  # those of the latest _schedule()
        self.throttled: dict = {}  # destination: Throttle

    async def run(self) -> None:
        """Deliver until the server stops."""
        self.wake_socket.setblocking(False)
        wakeups, checked_at, clock_offset = AsyncSocket(self.wake_socket), 0.0, float("inf")
        while not self.app.stopping:
            now = time.time()
            try:
                if time.monotonic() - checked_at > 1:
                    checked_at = time.monotonic()
                    await self.db.do(reclaim_dead_leases, self.db, now)
                    await self.db.do(purge, now)
                    if now - checked_at < clock_offset - 60:  # the clock was set back, perhaps while no process ran
                        await self.db.do(correct_due, self.db.settings, now)
                    clock_offset = now - checked_at  # from time.monotonic()
                await self._schedule(now)
                await wakeups.recv(65536, time.monotonic() + 1)
            except socket.timeout:
                pass
            except Rejected:  # the log says why
                await asyncio.sleep(1.0)

    async def _schedule(self, now: float) -> None:
        """Start to deliver what is due."""
        settings = self.app.settings
        if settings is not self.settings:  # a destination may mean another host now
            self.settings, self.throttled = settings, {}
        monotonic = time.monotonic()
        throttled = {key: found.failures for key, found in self.throttled.items() if found.until > monotonic}
        self.in_flight = {destination: count for destination, count in self.in_flight.items() if count}
        expired_before = now - settings.queue.lifetime
        limits = settings.smtpd.max_workers, dict(self.in_flight), throttled, expired_before
        for leased in await self.db.do(lease_due, now, *limits):
            self.in_flight[leased.destination] = self.in_flight.get(leased.destination, 0) + 1
            expired = leased.destination in throttled and leased.created_at <= expired_before and leased.history
            expired = expired and leased.attempts + throttled[leased.destination] >= MIN_ATTEMPTS  # with other mails'
            asyncio.get_running_loop().create_task(self._deliver(leased, bool(expired)))

    async def _deliver(self, leased: LeasedRecipient, expired: bool) -> None:
        """Attempt a delivery; end the lease if its result can't be recorded because of a bug."""
        try:
            await self._attempt_and_record(leased, expired)
        except Exception:  # nobody else would end the lease
            log_exception(leased.queueid)
            await self.db.release(finish_attempt, leased.id)
        finally:
            self.in_flight[leased.destination] -= 1
        self.db.wake_manager()

    async def _attempt_and_record(self, leased: LeasedRecipient, expired: bool) -> None:
        """Make an attempt and record its result; if the mail has expired, record a failure without an attempt."""
        settings, destination = self.app.settings, ""
        if expired:
            reply, disposition = leased.history[-1].reply, Disposition("failed")
        else:
            reply, destination = await self._attempt(leased, settings)
            leased = leased._replace(attempts=leased.attempts + 1)
            age = time.time() - leased.created_at
            disposition = next_disposition(reply, leased.attempts, age, random_unit(), settings.queue)
            self._throttle(leased.destination, reply, settings.queue)
        now = time.time()
        log_attempt(leased, reply, disposition, settings, now)
        outcome = {"delivered": "accepted", "failed": "failed", "open": "deferred"}[disposition.state]
        if leased.kind == "event":
            metrics.add("haineko_webhook_events_total", outcome.replace("accepted", "delivered"))
        else:
            outcome = "unsure" if outcome == "deferred" and reply.maybe_delivered else outcome
            relay = "File" if (reply.mailer or "").startswith("/") else reply.mailer
            metrics.add("haineko_recipients_total", relay if relay in RELAYS else "other", outcome)
        follow_ups = notifications(leased, reply, disposition.state, settings, now)
        result = AttemptResult(None if expired else reply, disposition, follow_ups, destination)
        await self.db.do_eventually(finish_attempt, leased.id, result, now)

    async def _attempt(self, leased: LeasedRecipient, settings: Settings) -> tuple:
        """Return the reply to an attempt and its destination, by the settings that are in force now."""
        try:
            if leased.kind == "event":
                return await post_webhook(leased, settings.queue.secret, time.time(), self.app.transport.http), ""
            to, sender = parse_address(leased.recipient), parse_address(leased.sender)
            if (redirect := settings.smtpd.redirect) and leased.recipient not in redirect:  # from before, or a bounce
                to = parse_address(redirect[0])
            sandbox = leased.destination == destination_key(SANDBOX_ROUTE, "")
            sender_domain = sender.domain if sender else ""
            route = SANDBOX_ROUTE if sandbox else resolve_route(to.domain, sender_domain, settings)[0]
            envelope = leased.queueid, leased.sender, (to.addr_spec,), leased.message, leased.number, settings.dkim
            result = await attempt_transaction(Transaction(route, settings.hostname, *envelope), self.app.transport)
            return result.replies[0], destination_key(route, to.domain)
        except Exception:
            log_exception(leased.queueid)
            return make_reply("relay-fault", mailer="Queue"), ""

    def _throttle(self, destination: str, reply: Reply, settings: QueueSettings) -> None:
        """Throttle a destination after a failure to open a session, for the third pause at most: new mail waits too."""
        throttle, now = self.throttled.get(destination, Throttle(0, 0)), time.monotonic()
        if not (reply.temporary and reply.command in ("CONN", "EHLO", "STARTTLS", "AUTH")):  # before the first mail
            self.throttled.pop(destination, None)
        elif throttle.until <= now:
            failures = throttle.failures + 1
            pause = next_disposition(reply, min(failures, 3), 0, random_unit(), settings).pause
            self.throttled[destination] = Throttle(now + pause, failures)


def log_attempt(
    leased: LeasedRecipient, reply: Reply, disposition: Disposition, settings: Settings, now: float
) -> None:
    """Log one line for each attempt."""
    status = {"delivered": "sent", "failed": "bounced", "open": "deferred"}[disposition.state]
    fields = {"queueid": leased.queueid, "from": leased.sender, "to": [leased.recipient], "relay": reply.relay}
    fields.update({"fallback": reply.fallback, "delay": max(now - leased.created_at, 0), "code": reply.code})
    fields.update({"dsn": reply.dsn, "status": status})
    notes = f"; next attempt in {disposition.pause:.0f} s" if disposition.state == "open" else ""
    notes += "; may arrive twice" if reply.maybe_delivered else ""
    if disposition.state == "failed" and leased.sender and not may_bounce(leased, settings):
        notes += "; no bounce, since the sender did not log in and `recipients` does not permit the address"
    log.event(level_of(status), "attempt", sanitize(" ".join(reply.message), 500) + notes, **fields)


def level_of(status: str) -> str:
    """Return the level of a log line by its status=."""
    return "warning" if status in ("deferred", "bounced") else "info"


# ======================================================================================================================
# 17. Submission pipeline
#     submit() takes a request and calls every stage in order: parse, check, compose, plan, deliver or queue, answer.
# ======================================================================================================================

MAX_REPORTED_ERRORS = 10
# A string (RFC 8941 3.3.3), or a word without quotes, which most clients send.
IDEMPOTENCY_KEY = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\]){1,255})"|([!#-+\--~]{1,255})')
MAX_INLINE_WAIT = 60  # seconds that a cloud may ask for while the client waits
NOT_ASCII = REPLIES["rcpt-ascii"][4]
HEADERS_OF_STATUS = {
    401: (("WWW-Authenticate", 'Basic realm="Haineko", charset="UTF-8"'),),
    409: (("Retry-After", "2"),),
}
DEFAULT_RETRY_AFTER = 60  # seconds
ctime = functools.lru_cache(maxsize=2)(time.ctime)
MAX_ECHO = 200  # characters of a header that an answer repeats, and the queue stores


class App:
    """State of a process: the settings in force, SMTP sessions, the queue, and whether it is stopping."""

    def __init__(
        self, settings: Settings, wake_socket: socket.socket | None = None, limits: SharedLimits | None = None
    ) -> None:
        self.transport = TransportContext(limits=limits)
        self.stopping = False
        self.octets_in_flight = 0  # of bodies that arrived in parts
        self.update_gauges: Callable = int  # replaced by Worker.update_gauges()
        self.queue = QueueDB(settings.queue, wake_socket) if settings.queue else None
        self.apply(settings)

    def apply(self, settings: Settings) -> None:
        """Use these settings from the next request on; the path of the queue stays what it was."""
        settings = pin_queue_path(settings, self.queue.settings if self.queue else None)
        if self.queue:
            self.queue.settings = settings.queue
        tls, base = settings.httpd.tls, os.path.dirname(settings.path or "")
        self.tls = server_context(tls, base) if tls else None
        log.open(settings.smtpd.syslog, settings.smtpd.log)
        if settings.smtpd.resolver != self.transport.resolver.nameservers:
            self.transport.set_nameservers(settings.smtpd.resolver)
        self.settings = settings


class Response(NamedTuple):
    """An HTTP response."""

    status: int
    body: bytes
    headers: tuple = ()  # of (name, value)
    type: str = "application/json; charset=utf-8"


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

    @property
    def refused(self) -> dict:
        return {to: reply for to, reply in self.replies.items() if reply and not reply.accepted}

    @property
    def error(self) -> Reply | None:
        """Return a reply if no recipient was accepted, else None; one of status 503 comes first."""
        if len(self.refused) < len(self.replies):
            return None
        to, reply = min(self.refused.items(), key=lambda item: (item[1].status or http_status(item[1:])) != 503)
        return reply if to is None else reply._replace(message=(f"{to}: {reply.message[0]}", *reply.message[1:]))

    def add_replies(self, replies: list) -> None:
        """Give each accepted recipient its reply; all of a mail that was redirected get the first failure, if any."""
        found = dict(zip([mailbox.as_written for mailbox in self.accepted], replies))
        for to, reply in self.replies.items():
            if not reply:
                self.replies[to] = found.get(to) or min(replies, key=lambda reply: reply.accepted)


async def submit(request: Request, app: App) -> Response:
    """Answer POST /submit: take a mail from its JSON to the replies of the other side."""
    settings, queueid = request.settings or app.settings, new_queueid(request.now)
    mail = await prepare(request, parse_submission, request.body, settings, queueid)
    if not mail.transactions:
        return respond(request, mail.error.status, mail.replies, queueid, mail.submission)
    if mail.submission.dry_run:
        return await answer_dry_run(request, mail, settings)
    try:
        if mail.is_async or mail.key:  # it is stored before anything is sent
            item = new_item(request, mail)
            if earlier := await app.queue.add(item, leased=not mail.is_async):
                return await replay_response(request, mail, earlier, app)
        if mail.is_async:
            announce_queued(request, [item], app)
            replies, attempts = [queued_reply(queueid)] * len(mail.accepted), []
        else:
            results = await deliver(mail.transactions, app.transport, settings)
            replies, attempts = log_results(request, results), []
            if app.queue:
                replies, attempts = await queue_deferred(request, mail, replies, settings, app)
        count_recipients(mail.transactions, replies)
        mail.add_replies(replies)
        response = respond(request, http_status(mail.replies.values()), mail.replies, queueid, mail.submission)
        if mail.key:
            await app.queue.do_eventually(finish_request, queueid, attempts, serialize_response(response), time.time())
        return response
    except Rejected as error:
        return respond(request, error.reply.status, {None: error.reply}, queueid, mail.submission)
    except Exception:  # a bug: what this request has leased is left to the queue
        if app.queue:
            await app.queue.release(finish_request, queueid)
        raise


async def prepare(request: Request, parse: Callable, body: Any, settings: Settings, queueid: str) -> Mail:
    """Parse, check, compose and plan a mail; parse(body) returns a SubmissionResult. What takes long runs in a thread,
    or other requests would have to wait."""
    submission = None
    try:
        values = request, parse, body, settings
        parsed = await asyncio.to_thread(parse_and_check, *values) if is_expensive(body) else parse_and_check(*values)
        submission, replies, accepted, digest = parsed
        is_async, key = queue_options(request, submission, settings)
        if not accepted:
            return Mail(queueid, submission, replies)
        if body is request.body:
            request.body = body = b""  # its memory is needed for the message
        values = request, submission, settings, queueid, accepted
        in_thread = is_expensive(submission)
        message = await asyncio.to_thread(compose_and_check, *values) if in_thread else compose_and_check(*values)
        transactions, accepted = plan_transactions(submission, message, accepted, settings, queueid)
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
        if reply.accepted:
            outcome = "queued" if reply.origin == "queue" else "accepted"
        else:
            outcome = "unsure" if reply.maybe_delivered else "deferred" if reply.temporary else "refused"
        metrics.add("haineko_recipients_total", relay, outcome)


def parse_and_check(request: Request, parse: Callable, body: Any, settings: Settings) -> tuple:
    """Return (Submission, {recipient: the Reply that refuses it, or None}, Mailboxes of the others, digest of the
    document if there is an Idempotency-Key); raise Rejected with every error, or by the first check that fails."""
    submission, errors, is_json = parse(body)
    if errors:
        raise Rejected(make_reply("invalid" if is_json else "json", *errors[:MAX_REPORTED_ERRORS]))
    apply_checks(CHECKS["submission"], request, submission, settings)
    replies, accepted = check_recipients(request, submission, settings)
    digest = document_digest(body) if "idempotency-key" in request.headers and body is request.body else None
    return submission, replies, accepted, digest


def document_digest(body: Any) -> bytes:
    """Return a digest of the document in a body, whatever the order of its keys and its white space."""
    document = parse_json(body.replace(b"\x1b", b"\\u001b"))
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).digest()


def compose_and_check(
    request: Request, submission: Submission, settings: Settings, queueid: str, accepted: list
) -> Message:
    """Return the message; raise Rejected if a check of the message fails."""
    now = max(request.now, submission.send_at or 0)  # a Date weeks before the delivery would pass for a sign of spam
    shown = apply_staging(submission, accepted, settings.smtpd) if settings.smtpd.staging else submission
    message = compose(shown, queueid, request.client, settings.hostname, now)
    if request.dsn is not DEFAULT_DSN:
        message = message._replace(dsn=request.dsn)
    request.recipient_count, longest = len(accepted), max([len(mailbox.addr_spec) for mailbox in accepted])
    request.message_size = sum(map(len, message.parts)) + longest + len(str(len(accepted)))
    apply_checks(CHECKS["message"], request, submission, settings)
    return message


def apply_staging(submission: Submission, accepted: list, smtpd: Smtpd) -> Submission:
    """Return the submission with the prefix in its subject, and with a field that names whom redirected mail is for."""
    header, raw, prefix = submission.header, submission.raw, smtpd.subject_prefix.rstrip()
    more = [("X-Haineko-Recipients", ", ".join([to.addr_spec for to in accepted]))] if smtpd.redirect else []
    if raw:
        head = text_field("", prefix, "UTF-8").encode() if prefix else b":"
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
    values = http_status(mail.replies.values()), mail.replies, mail.queueid, mail.submission
    return answer_document(request, *values, message_octets=len(octets), raw=raw)


def describe_route(route: Route) -> str:
    """Return where a route's mail goes, for people."""
    if route.fallbacks:
        return ", else ".join(describe_route(replace(choice, fallbacks=())) for choice in route.choices)
    tls = ", TLS" if route.port == SMTPS else ", STARTTLS" if route.starttls else ""
    login = f", AUTH as {route.auth}" if route.auth else ""
    where = f"{route.relay} {route.url}" if route.url else route.row.destination.format(route=route, domain="").strip()
    return where + tls + login


def respond(request: Request, status: int, replies: dict, queueid: str, submission: Submission | None) -> Response:
    """Return the response; log each refusal before delivery."""
    refused = {to: reply for to, reply in replies.items() if reply.origin == "policy"}
    if refused:
        log_rejection(request, queueid, submission, refused)
    return answer_document(request, status, replies, queueid, submission)


def log_rejection(request: Request, queueid: str | None, submission: Submission | None, refused: dict) -> None:
    """Log one line for each refusal before delivery; `refused` is {recipient, None for all: Reply}."""
    for reply in refused.values():
        metrics.add("haineko_rejections_total", reply.slug)
    listed = [to for to in refused if to is not None] or list(submission.rcpt if submission else ())
    sender = submission.mail if submission else None
    for reply in dict.fromkeys(refused.values()):
        log_reply(request, queueid, sender, listed[:20], reply)  # the line is cut anyway


def queue_options(request: Request, submission: Submission, settings: Settings) -> tuple:
    """Return (whether to answer at once, digest of login, path and Idempotency-Key or None); raise Rejected for what
    needs a queue if there is none."""
    key, later = request.headers.get("idempotency-key"), submission.send_at is not None
    if not settings.queue:
        asked = {"Idempotency-Key": key is not None, "send_at": later, "async": submission.async_}
        if any(asked.values()):  # to ignore them would be unsafe; Prefer may be ignored
            raise Rejected(make_reply("no-queue", next(filter(asked.get, asked))))
        return False, None
    is_async = later or submission.async_ or prefers_async(request.headers.get("prefer", ""))
    if key is None:
        return is_async, None
    found = IDEMPOTENCY_KEY.fullmatch(key)
    if not found:
        raise Rejected(make_reply("key-form"))
    owner = request.login or f"[{request.client}]"  # nobody else may read the response
    return is_async, hashlib.sha256("\0".join((owner, request.path, found[1] or found[2])).encode()).digest()


def prefers_async(value: str) -> bool:
    """Return True if a Prefer header asks for respond-async (RFC 7240 4.1)."""
    return any(part.partition(";")[0].strip().lower() == "respond-async" for part in value.split(","))


def new_item(request: Request, mail: Mail) -> NewQueueItem:
    """Return the mail as the queue stores it."""
    first, mailboxes, recipients = mail.transactions[0], iter(mail.accepted), []
    for transaction in mail.transactions:
        for to, mailbox in zip(transaction.recipients, mailboxes):  # both in the order of the transactions
            destination = destination_key(transaction.route, mailbox.domain)
            recipients.append(NewRecipient(mailbox.as_written, to, transaction.number, destination))
    envelope = first.queueid, "mail", first.sender, request.login, request.now, first.message
    return NewQueueItem(*envelope, tuple(recipients), mail.key, mail.body_digest, mail.submission.send_at or 0.0)


def announce_queued(request: Request, items: list, app: App) -> None:
    """Log new mails in the queue and have them delivered."""
    for item in items:
        fields = {"queueid": item.queueid, **request.log_fields(), "from": item.sender}
        when = timestamp(int(item.send_at)) if item.send_at > item.created_at else "once"
        log.event("info", "queued", f"queued, to be delivered at {when}", **fields)
    app.queue.wake_manager()


async def queue_deferred(request: Request, mail: Mail, replies: list, settings: Settings, app: App) -> tuple:
    """Return the replies after the first attempts, "queued" where there will be more, and their AttemptResults."""
    if not (mail.key or any(reply.temporary for reply in replies)):
        return replies, []
    item, now, results = new_item(request, mail), time.time(), []
    for recipient, reply in zip(item.recipients, replies):
        disposition = next_disposition(reply, 1, 0.0, random_unit(), settings.queue)
        reports: tuple = ()  # only a delay is reported, since the response has the others
        if disposition.state == "open":
            reports = notifications(first_lease(item, recipient), reply, "open", settings, now)
        results.append(AttemptResult(reply, disposition, reports))
    waiting = [i for i, result in enumerate(results) if result.disposition.state == "open"]
    if not mail.key:  # with one it is in the file already
        part = item._replace(recipients=tuple([item.recipients[i] for i in waiting]))
        try:
            await app.queue.add(part, [results[i] for i in waiting])
        except Rejected:  # the client reads that it failed for now, and that nobody will try again
            return replies, []
    for i in waiting:
        unsure = "; may arrive twice" if replies[i].maybe_delivered else ""
        text = f"queued; next attempt in {results[i].disposition.pause:.0f} s{unsure}"
        log.event("info", "queued", text, queueid=item.queueid, to=[item.recipients[i].recipient], status="deferred")
        replies[i] = queued_reply(item.queueid, replies[i])
    return replies, results


async def replay_response(request: Request, mail: Mail, earlier: tuple, app: App) -> Response:
    """Return the response to the first request with this key; raise Rejected if there is none, or for another body."""
    queueid, answered = earlier["queueid"], earlier["response"]
    if earlier["body_digest"] != mail.body_digest:
        raise Rejected(make_reply("key-reused"))
    if answered is None and earlier["owner"] is not None:
        raise Rejected(make_reply("key-running"))
    if answered is None:  # its process ended before it could answer; the queue has taken the mail over
        rows = {row["as_written"]: row for row in (await app.queue.do(message_status, queueid))["recipients"]}
        mail.add_replies([current_reply(queueid, rows[mailbox.as_written]) for mailbox in mail.accepted])
        response = answer_document(request, http_status(mail.replies.values()), mail.replies, queueid, mail.submission)
        answered = serialize_response(response)
        await app.queue.do(finish_request, queueid, [], answered, request.now)
    return stored_response(answered)


def first_lease(item: NewQueueItem, recipient: NewRecipient) -> LeasedRecipient:
    """Return a recipient as after its first attempt, which was made outside the queue."""
    envelope = item.queueid, item.kind, item.sender, item.login, item.created_at, item.message
    return LeasedRecipient(0, *envelope, *recipient, attempts=1)


def serialize_response(result: Response) -> str:
    """Return a response as the queue stores it."""
    return ENCODER.encode([result.status, result.headers, result.body.decode()])


def stored_response(text: str) -> Response:
    status, headers, body = json.loads(text)
    return Response(status, body.encode(), (*map(tuple, headers), ("Idempotency-Replayed", "true")))


def current_reply(queueid: str, row: Any) -> Reply:
    """Return the reply for the state of a recipient in the queue."""
    history = parse_history(row["history"])
    reply = history[-1].reply if history else None
    return reply if reply and row["state"] in ("delivered", "failed", "dropped") else queued_reply(queueid, reply)


def plan_transactions(
    submission: Submission, message: Message, accepted: list, settings: Settings, queueid: str
) -> tuple:
    """Return (transactions, the mailboxes in their order): one each route if the recipients share the mail, else each.

    By MX a shared mail has one for each domain. Raise Rejected for commands of cloud relays that a route does not let a
    client send.
    """
    groups, sender = {}, parse_address(submission.mail) or NULL_SENDER
    accepted = [parse_address(to) for to in settings.smtpd.redirect] or accepted
    for i, mailbox in enumerate(accepted):
        route = resolve_route(mailbox.domain, sender.domain, settings)[0]
        key = (route, route.relay == "MX" and mailbox.domain.lower()) if submission.shared else i
        groups.setdefault(key, (route, []))[1].append(mailbox)
    given = (*submission.header.extra_fields, *(submission.raw.fields if submission.raw else ()))
    names = [name for name in dict(given) if re.fullmatch(r"(?i)X-(MC|SES|PM|MS-Exchange)-.*|X-SMTPAPI", name)]
    if names and not all(choice.provider_headers for route, _ in groups.values() for choice in route.choices):
        lines = [f"{sanitize(name)}: the route must have provider_headers to send it" for name in names]
        raise Rejected(make_reply("invalid", *lines[:MAX_REPORTED_ERRORS]))
    transactions, signed = [], {}
    for number, (route, mailboxes) in enumerate(groups.values(), 1):
        envelope = settings.hostname, queueid, sender.addr_spec, tuple([mailbox.addr_spec for mailbox in mailboxes])
        transactions.append(Transaction(route, *envelope, message, number, settings.dkim, submission.trace, signed))
    return transactions, [mailbox for _, mailboxes in groups.values() for mailbox in mailboxes]


async def deliver(transactions: list, transport: TransportContext, settings: Settings) -> list:
    """Return a TransactionResult for each transaction, in order; up to `max_workers` are run side by side."""
    if len(transactions) == 1:
        return [await run_transaction(transactions[0], transport)]
    limit = asyncio.Semaphore(settings.smtpd.max_workers)

    async def one(transaction: Transaction) -> TransactionResult:
        async with limit:
            return await run_transaction(transaction, transport)

    return await asyncio.gather(*map(one, transactions))


async def run_transaction(transaction: Transaction, transport: TransportContext) -> TransactionResult:
    """Attempt a transaction, and again as its route says for the recipients that failed temporarily; the replies have
    the SMTP dialogue if it is traced."""
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
    """Return the HTTP status of a submission that went to its relays."""
    replies = list(replies)
    accepted = [reply.accepted for reply in replies]
    if all(accepted):
        return 202 if any(reply.origin == "queue" for reply in replies) else 200
    if any(accepted):
        return 207
    if all(reply.status == 400 or (reply.dsn == "5.6.7" and reply.message[0] == NOT_ASCII) for reply in replies):
        return 400  # the addresses are wrong, even if it took the next server to tell
    return 503 if any(reply.temporary for reply in replies) else 502


def log_results(request: Request, results: list) -> list:
    """Return all replies; log one line for each different one, or more if its recipients don't fit into one line."""
    for transaction, replies, ms in results:
        by_reply: dict = {}
        for to, reply in zip(transaction.recipients, replies):
            by_reply.setdefault(reply, []).append(to)
        for reply, recipients in by_reply.items():
            step = 8 if len(recipients) <= 8 else MAX_TO // max([len(to.encode()) + 3 for to in recipients])
            for i in range(0, len(recipients), step):
                to = recipients[i : i + step]
                log_reply(request, transaction.queueid, transaction.sender, to, reply, ms / 1000)
    return [reply for result in results for reply in result.replies]


def log_reply(
    request: Request, queueid: str | None, sender: str | None, to: list, reply: Reply, delay: float | None = None
) -> None:
    """Log a reply with the keys of Postfix's."""
    is_refusal = reply.origin == "policy"
    at = "" if reply.accepted or is_refusal else f" (in reply to {reply.command})"
    log.event(
        level_of(reply.log_status), "rejection" if is_refusal else "delivery",
        sanitize(("; " if is_refusal else " ").join(reply.message), 500) + at,
        queueid=queueid or "-", **request.log_fields(), **{"from": sender}, to=to or None, relay=reply.relay,
        delay=delay if reply.mailer else None, fallback=reply.fallback, code=reply.code, dsn=reply.dsn,
        status=reply.log_status,
    )  # fmt: skip


def answer_document(
    request: Request, status: int, replies: dict, queueid: str | None, submission: Submission | None, **more: Any
) -> Response:
    """Return the response; `replies` is {recipient, None if none is meant: Reply}, `more` are further keys."""
    accepted = [to for to, reply in replies.items() if to is not None and reply.origin != "policy"]
    document = {
        "queueid": queueid,
        "addresser": submission.mail if submission else None,
        "recipient": accepted if submission else None,
        "response": [reply_to_dict(to, reply) for to, reply in replies.items()],
        "remoteaddr": str(request.client) if request.client else None,
        "remoteport": request.port,
        "useragent": echoed_header(request, "user-agent"),
        "referer": echoed_header(request, "referer"),
        "timestamp": time_to_dict(request.now),
        **more,
    }
    headers = answer_headers(request, status, queueid, replies)
    return Response(status, encode_json(document), headers + (rate_headers(*request.rate) if request.rate else ()))


def answer_headers(request: Request, status: int, queueid: str | None, replies: dict) -> tuple:
    if status == 202:
        applied = prefers_async(request.headers.get("prefer", ""))
        return (("Location", f"/queue/{queueid}"), *([("Preference-Applied", "respond-async")] if applied else []))
    if status == 429:
        return (("Retry-After", str(max(reply.retry_after for reply in replies.values()))),)
    if status == 503:
        seconds = max([DEFAULT_RETRY_AFTER, *[reply.retry_after for reply in replies.values()]])
        return (("Retry-After", str(seconds)),)
    return HEADERS_OF_STATUS.get(status, ())


def rate_headers(rate: Rate, state: RateState) -> tuple:
    """Return the fields of draft-ietf-httpapi-ratelimit-headers-10, and those that clients knew before."""
    left, reset = state.remaining, math.ceil(state.reset)
    return (
        ("RateLimit-Policy", f'"default";q={rate.limit};w={rate.seconds}'),
        ("RateLimit", f'"default";r={left};t={reset}'),
        *zip(("ratelimit-limit", "ratelimit-remaining", "ratelimit-reset"), map(str, (rate.limit, left, reset))),
    )


def time_to_dict(seconds: float | None) -> dict | None:
    """Return a time as answers show it."""
    return None if seconds is None else {"datetime": ctime(int(seconds)), "unixtime": str(int(seconds))}


def echoed_header(request: Request, name: str) -> str | None:
    """Return the start of a header's value, which was decoded as Latin-1, as the UTF-8 that it most often is."""
    value = request.headers.get(name)
    if value is None or value.isascii():
        return value and value[:MAX_ECHO]
    return value[: 4 * MAX_ECHO].encode("latin-1").decode("utf-8", "replace")[:MAX_ECHO]


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
    """A provider's endpoint."""

    names: dict  # {key of a submission, of its header or of an attachment: the provider's key}
    unsupported: tuple  # keys that would change the content
    answer: Callable  # ([Mail, ...], mails, dry_run) -> Response or document
    error: Callable  # (reply, request) -> (HTTP status, document)
    read: Callable = lambda document, limit: [document]  # returns the mails
    limit: int = 1  # mails of a request
    permissive: bool = False  # a refused mail does not stop the others
    is_test: Callable = lambda document, request: False  # everything is checked, nothing sent


async def answer_provider(request: Request, app: App) -> Response:
    """Take the mails of a request and answer in the form of the provider whose endpoint it is."""
    settings, provider = request.settings or app.settings, PROVIDER_ENDPOINTS[request.path]
    document, digest = await asyncio.to_thread(parse_call, request)
    mails, prepared, octets = provider.read(document, provider.limit), [], 0
    for mail in mails:
        prepared.append(await prepare_provider_mail(request, mail, provider, settings))
        octets += request.message_size if prepared[-1].transactions else 0
        if octets > MAX_CALL:  # SendGrid's mails share their attachments
            raise Rejected(make_reply("too-big", f"{octets} octets of all mails exceed the limit of {MAX_CALL}"))
    ready, dry_run = [mail for mail in prepared if mail.transactions], provider.is_test(document, request)
    permissive = provider.read is read_batch and (
        provider.permissive or request.headers.get("x-batch-validation", "").lower() == "permissive"
    )
    for mail in prepared:
        if mail.error and not permissive:
            return provider_error(mail.error, request)
    if not (app.queue or dry_run):
        await deliver_mails(request, ready, settings, app)
        if all(mail.error for mail in prepared) and not permissive:
            return provider_error(prepared[0].error, request)
    for mail in ready if app.queue or dry_run else ():
        mail.add_replies([queued_reply(mail.queueid)] * len(mail.accepted))
    answer = provider.answer(prepared, mails, dry_run)
    response = answer if isinstance(answer, Response) else json_response(answer)
    is_stored = ready and app.queue and not dry_run
    return await store_mails(request, ready, digest, response, app) if is_stored else response


def parse_call(request: Request) -> tuple:
    """Return (document, its digest if there is an Idempotency-Key)."""
    try:
        document = parse_json(request.body)
    except ValueError as error:
        raise Rejected(make_reply("json", sanitize(str(error)))) from None
    return document, document_digest(request.body) if "idempotency-key" in request.headers else None


async def prepare_provider_mail(request: Request, mail: Any, provider: Provider, settings: Settings) -> Mail:
    """Prepare a mail; log its refused recipients and name keys in errors as the provider does."""
    names, parse = provider.names, functools.partial(parse_mail, provider.names, provider.unsupported)
    prepared = await prepare(request, parse, mail, settings, new_queueid(request.now))
    if prepared.refused:
        log_rejection(request, prepared.queueid, prepared.submission, prepared.refused)
    replies = {to: reply and use_provider_keys(reply, names) for to, reply in prepared.replies.items()}
    return prepared._replace(replies=replies)


def use_provider_keys(reply: Reply, names: dict) -> Reply:
    """Replace the key of a submission at the start of each line of an error."""

    def name(found: re.Match) -> str:
        key = {"rcpt": "to", "mail": "from", "replyto": "reply-to"}.get(found[2], found[2])
        return names.get(key.lower()) or (f"{names['headers']}.{key}" if found[1] else key)

    lines = [re.sub(r"^(header\.)?([A-Za-z_-]+)", name, line) for line in reply.message[1:]]
    return reply._replace(message=(reply.message[0], *lines))


async def deliver_mails(request: Request, mails: list, settings: Settings, app: App) -> None:
    """Deliver mails while the client waits, and add their replies."""
    results = iter(await deliver([one for mail in mails for one in mail.transactions], app.transport, settings))
    for mail in mails:
        replies = log_results(request, list(itertools.islice(results, len(mail.transactions))))
        count_recipients(mail.transactions, replies)
        mail.add_replies(replies)


async def store_mails(request: Request, mails: list, digest: Any, response: Response, app: App) -> Response:
    """Store mails and the reports of their refused recipients; return the response, or that to an earlier request."""
    key, items, reports = mails[0].key, [], []
    for mail in mails:
        items.append(new_item(request, mail._replace(key=None if items else key, body_digest=digest)))
        for to, reply in mail.refused.items():
            leased = first_lease(items[-1], NewRecipient(to, to, 1, ""))
            reports += notifications(leased, reply, "failed", request.settings or app.settings, request.now)
    earlier = await app.queue.add_by(enqueue_all, [*items, *reports], serialize_response(response) if key else None)
    if earlier and earlier["body_digest"] != digest:
        raise Rejected(make_reply("key-reused"))
    if earlier:
        return stored_response(earlier["response"])
    for mail in mails:
        count_recipients(mail.transactions, [queued_reply(mail.queueid)] * len(mail.accepted))
    announce_queued(request, items, app)
    return response


# -- Mails


def parse_mail(names: dict, unsupported: tuple, mail: Any) -> SubmissionResult:
    """Parse a mail of a provider's client; keys that are not known are ignored."""
    if not isinstance(mail, dict):
        return SubmissionResult(None, [f"expected an object, got {json_type_name(mail)}"])
    errors = [f"{key}: is not supported" for key in unsupported if mail.get(key)]
    header = OpenHeader(read_headers(mail.get(names["headers"]), names["headers"], errors))
    for key in ("from", "to", "cc", "bcc", "reply-to"):
        value = mail.get(names[key]) or []
        texts = value[: MAX_ADDRESSES + 1] if isinstance(value, list) else [value]
        for i, text in enumerate(texts):
            faults: list = []
            parse_recipient_field(text, "", faults)
            shared = key in ("from", "reply-to")
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
    if isinstance(value, list):
        pairs = [(item.get("Name"), item.get("Value")) if isinstance(item, dict) else (None, None) for item in value]
    else:
        pairs = list(value.items()) if isinstance(value, dict) else []
    for name, text in pairs:
        if not isinstance(name, str) or normalize_key(name) in OWN_FIELDS:
            errors.append(f"{json_path}: {sanitize(str(name))} can't be set here")
        else:
            header.setdefault(name, []).append(text)
    return {name: texts[0] if len(texts) == 1 else texts for name, texts in header.items()}


def read_attachments(mail: dict, names: dict, errors: list) -> Any:
    """Return attachments as a submission has them; a content id that the HTML does not use is left out."""
    html, entries, found = mail.get(names["html"]), mail.get(names["attachments"]), []
    links = content_id_links(html) if isinstance(html, str) else set()
    for i, entry in enumerate(
        entries[: MAX_ATTACHMENTS + 1] if isinstance(entries, list) else [entries] * bool(entries)
    ):
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


def read_personalizations(document: Any, limit: int) -> list:
    """Return one mail for each personalization, whose keys take the place of the document's."""
    whole = document if isinstance(document, dict) else {}
    content = whole.get("content") if isinstance(whole.get("content"), list) else []
    whole = {**whole, "content": []}  # what remains of it is not supported
    for item in content:
        kind = str(item.get("type")).partition(";")[0] if isinstance(item, dict) else ""
        if kind in ("text/plain", "text/html"):
            whole[f"content.{kind}"] = item.get("value")
        else:
            whole["content"].append(item)
    mails = []
    for i, part in enumerate(read_batch(whole.get("personalizations"), limit, "personalizations")):
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


def is_sandbox(document: Any, request: Request) -> bool:
    with contextlib.suppress(LookupError, TypeError):
        return document["mail_settings"]["sandbox_mode"]["enable"] is True
    return False


# -- Answers


def answer_sendgrid(prepared: list, mails: list, dry_run: bool) -> Response:
    """Return the response; the other providers' is a document."""
    queueid = next(mail.queueid for mail in prepared if not mail.error)
    return Response(200 if dry_run else 202, b"", (("X-Message-Id", queueid),))


def postmark_item(prepared: Mail, mail: dict) -> dict:
    if prepared.error:
        return postmark_error(prepared.error, None)[1]
    words = "; ".join(dict.fromkeys(map(reply_text, prepared.refused.values())))
    refused = f"Message OK, but will not deliver to these inactive addresses: {', '.join(prepared.refused)}"
    message = f"{refused}. Inactive recipients: {words}" if words else "OK"  # clients look for these words
    now = time.strftime("%Y-%m-%dT%H:%M:%S.0000000Z", time.gmtime())
    place = {"To": mail.get("To") or "", "SubmittedAt": now, "MessageID": prepared.queueid}
    return {**place, "ErrorCode": 0, "Message": message}


def answer_resend_batch(prepared: list, mails: list, dry_run: bool) -> dict:
    errors = [{"index": i, "message": reply_text(mail.error)} for i, mail in enumerate(prepared) if mail.error]
    document = {"data": [{"id": mail.queueid} for mail in prepared if not mail.error]}
    return {**document, "errors": errors} if errors else document


def provider_error(reply: Reply, request: Request) -> Response:
    """Return the response to a request that is refused, in the form of its provider."""
    status, document = PROVIDER_ENDPOINTS[request.path].error(reply, request)
    headers = answer_headers(request, reply.status or http_status((reply,)), None, {None: reply})
    return json_response(document, status, headers)


def sendgrid_error(reply: Reply, request: Request) -> tuple:
    status, words = error_row(reply, SENDGRID_ERRORS)
    errors = []
    for line in reply.message[1:] if reply.slug == "invalid" else (words or reply_text(reply),):
        found = re.match(r"Invalid '([^']+)'|([a-z_][\w./\[\]-]*): ", line)
        field = re.sub(r"\[(\d+)\]", r".\1", found[1] or found[2]) if found else None
        errors.append({"message": line, "field": field, "help": None})
    return status, {"errors": errors}


def postmark_error(reply: Reply, request: Request | None) -> tuple:
    status, code = error_row(reply, POSTMARK_ERRORS)
    return status, {"ErrorCode": code, "Message": reply_text(reply)}


def resend_error(reply: Reply, request: Request) -> tuple:
    status, name = error_row(reply, RESEND_ERRORS)
    if reply.status == 401 and "authorization" not in request.headers:
        status, name = 401, "missing_api_key"
    return status, {"statusCode": status, "name": name, "message": reply_text(reply)}


def error_row(reply: Reply, table: dict) -> tuple:
    """Return (HTTP status, the provider's name of the error)."""
    status = reply.status or http_status((reply,))
    return table.get(reply.slug) or table.get(status) or (status, table[None])


def reply_text(reply: Reply) -> str:
    """Return the message of a reply on one line."""
    first, *lines = reply.message
    return "; ".join(lines) if lines and reply.slug == "invalid" else ": ".join((first, *lines))


# {name in REPLIES, or HTTP status of a refusal of POST /submit: (HTTP status, the provider's name of the error)}
SENDGRID_GRANT = "The provided authorization grant is invalid, expired, or revoked"
SENDGRID_ERRORS = {"login": (401, SENDGRID_GRANT), 502: (400, None), None: None}
POSTMARK_ERRORS = {
    "json": (422, 402), "batch": (422, 410), "rcpt-many": (422, 300), 400: (422, 300), 401: (401, 10), 403: (422, 405),
    409: (422, 300), 422: (422, 300), 429: (429, 429), 500: (500, 500), 502: (422, 300), 503: (503, 100), None: 300,
}  # fmt: skip
RESEND_ERRORS = {
    **dict.fromkeys(("mail-empty", "rcpt-none", "subject-empty", "body-empty"), (422, "missing_required_field")),
    "mail-form": (422, "invalid_from_address"), "key-form": (400, "invalid_idempotency_key"),
    "json": (400, "validation_error"), 400: (422, "validation_error"), 401: (403, "invalid_api_key"),
    "rcpt-many": (422, "validation_error"), 403: (401, "restricted_api_key"), 404: (404, "not_found"),
    409: (409, "concurrent_idempotent_requests"), 413: (413, "validation_error"),
    422: (409, "invalid_idempotent_request"), 429: (429, "rate_limit_exceeded"), 502: (422, "validation_error"),
    None: "application_error",
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
SENDGRID = Provider(SENDGRID_KEYS, NOT_SENDGRID, answer_sendgrid, sendgrid_error, read_personalizations, 1000)
POSTMARK = Provider(
    POSTMARK_KEYS, ("TemplateId", "TemplateAlias"), lambda prepared, mails, _: postmark_item(prepared[0], mails[0]),
    postmark_error, is_test=lambda _, request: is_postmark_test(request),
)  # fmt: skip
RESEND = Provider(
    RESEND_KEYS, ("template", "topic_id"), lambda prepared, mails, _: {"id": prepared[0].queueid}, resend_error
)
PROVIDER_ENDPOINTS = {
    "/v3/mail/send": SENDGRID._replace(is_test=is_sandbox),
    "/email": POSTMARK,
    "/email/batch": POSTMARK._replace(
        read=read_batch,
        answer=lambda prepared, mails, _: [*map(postmark_item, prepared, mails)],
        limit=500,
        permissive=True,
    ),
    "/emails": RESEND,
    "/emails/batch": RESEND._replace(read=read_batch, answer=answer_resend_batch, limit=100),
}


# ======================================================================================================================
# 19. HTTP server
#     Takes octets from a socket, gives a Request to an endpoint and sends its Response (RFC 9110, 9112). The supervisor
#     binds and watches; workers, forked by it, accept. In a worker one event loop serves all connections.
# ======================================================================================================================

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]"
REQUEST_LINE = re.compile(rf"({_TOKEN}{{1,32}}) ([\x21-\x7e\x80-\xff]+) HTTP/(\d)\.(\d)")
HEADER_LINE = re.compile(rf"({_TOKEN}+):([^\r\n\0]*)")
BARE_LF = re.compile(rb"\n\r?\n")  # an end of the head for some servers; looked for if there is no CR LF CR LF
NOT_IN_HOST = re.compile(r"[\s,/?#@\\]")
CHUNKED = -1
LENGTH = re.compile(r"([0-9]{1,18})(?:[ \t]*,[ \t]*\1)*")  # or the same one, repeated
SAMPLES = json.loads("""[
{"ehlo": "[127.0.0.1]", "mail": "kijitora@example.org", "rcpt": ["mikeneko@example.jp"], "header": {
  "from": "キジトラ <kijitora@example.com>", "subject": "謹賀新年", "replyto": "straycats@cat-ml.example.org",
  "charset": "UTF-8"}, "body": "あとでお年玉貰いに行きます"},
{"mail": "cron@example.org", "rcpt": ["root@example.jp", "ops@example.jp"], "header": {"subject": "Backup done"},
  "body": "42 files, 0 errors\\n"},
{"mail": "shop@example.org", "header": {
  "from": "ねこ屋 <shop@example.org>", "to": "三毛猫 <mikeneko@example.jp>", "subject": "領収書 42"},
  "html": "<p><img src=\\"cid:logo\\" alt=\\"ねこ屋\\"></p><p>合計 <b>1,980円</b></p>", "attachments": [
    {"filename": "logo.png", "cid": "logo", "content":
      "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="},
    {"filename": "領収書 42.csv", "content": "c3VtLDE5ODAK"}]}
]""")
NESTED_SCHEMAS = {"header": "Header", "attachments": "Attachment"}
SCHEMA_TYPES = {
    str: ["string", "array", "null"],
    bool: ["boolean", "integer", "null"],
    tuple: ["string", "array", "object", "null"],
}
QUEUE_PATH = re.compile(r"/queue/[0-9A-Za-z]{1,64}((?:/retry)?)")
HANG_TIMEOUT = 10.0  # seconds without a heartbeat
BACKLOG = 1024

MAX_HEAD = 65536  # octets of request line and headers
MAX_HEADERS = 100  # lines
MAX_BODY = 256 << 20  # octets of a body if max_message_size sets no limit
MAX_IN_FLIGHT = 64 << 20  # octets of all bodies of a worker, or of two if these may be larger
MAX_VICTIMS = 64  # connections that are compared to find the one that is closed in favour of a new one
LINGER_TIMEOUT = 2.0  # seconds for a client to read the last answer before its connection is closed
MAX_LINGERING_503 = 64  # connections over the limit that are answered so and closed by lingering_close() at a time
SHUTDOWN_TIMEOUT = 30.0  # seconds for requests in flight to be answered
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # that a worker handles


class RequestHead(NamedTuple):
    """Request line and headers of a request."""

    method: str
    path: str  # without the query
    headers: dict  # by name in lower case; values of a repeated name are joined by ", "
    keep_alive: bool  # the client wants to go on using the connection
    is_http10: bool


def parse_head(octets: bytes) -> RequestHead:
    """Parse the head of a request, without its empty line; raise Rejected for what RFC 9112 forbids."""
    first, _, rest = octets.decode("latin-1").partition("\r\n")
    method, path, is_http10 = parse_request_line(first)
    lines = rest.split("\r\n")[:-1]
    if len(lines) > MAX_HEADERS:
        raise Rejected(make_reply("head-too-large"))
    headers: dict = {}
    for line in lines:
        name, value = (cached_header_line if line.startswith(CACHED_HEADERS) else parse_header_line)(line)
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    connection = headers.get("connection", "").lower()
    keep_alive = "keep-alive" in connection if is_http10 else "close" not in connection
    return RequestHead(method, path, headers, keep_alive, is_http10)


def parse_header_line(line: str) -> tuple:
    """Return (name in lower case, value)."""
    found = HEADER_LINE.fullmatch(line)
    if not found:
        raise Rejected(make_reply("bad-request", "header line"))
    return found[1].lower(), found[2].strip(" \t")


# Most clients send these again and again; lines that may hold credentials are not kept in memory.
CACHED_HEADERS = ("host:", "user-agent:", "accept", "content-", "connection:")
CACHED_HEADERS += tuple(map(str.title, CACHED_HEADERS))
cached_header_line = cache_short(512, limit=200)(parse_header_line)


def parse_request_line(line: str) -> tuple:
    """Return (method, path without its query, True for HTTP/1.0)."""
    found = REQUEST_LINE.fullmatch(line)
    if not found:
        raise Rejected(make_reply("bad-request", "request line"))
    method, target, major, minor = found.groups()
    if major != "1":
        raise Rejected(make_reply("http-version"))
    if target[0] != "/" and "://" in target:
        target = "/" + target.split("://", 1)[1].partition("/")[2]  # absolute form, RFC 9112 3.2.2
    return method, target.partition("?")[0], minor == "0"


def body_length(head: RequestHead) -> int:
    """Return the octets of the body, or CHUNKED; raise Rejected if two parsers could differ (RFC 9112 6.3)."""
    length, coding = head.headers.get("content-length"), head.headers.get("transfer-encoding")
    if coding is not None:
        if length is not None or head.is_http10:
            raise Rejected(make_reply("bad-request", "Transfer-Encoding"))
        if coding.lower() != "chunked":
            raise Rejected(make_reply("not-implemented"))
        return CHUNKED
    if length is None:
        if head.method == "POST":
            raise Rejected(make_reply("length-required"))
        return 0
    found = LENGTH.fullmatch(length)
    if not found:
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


FORWARDED_ADDRESS = re.compile(r"\[([^]]+)\](?::\d+)?|([^:]+):\d+|(.*)")  # some proxies add the port
FORWARDING_HEADERS = {f"x-forwarded-{what}" for what in ("for", "host", "proto")}  # that proxies add
FORWARDING_HEADERS |= {"via", "forwarded", "x-real-ip", "x-client-ip"}


class Endpoint(NamedTuple):
    """A row of ENDPOINTS: what answers, and the checks before the body is read."""

    handler: Callable  # (request, app) -> awaitable of a Response
    checks: tuple = ()


def constant(response: Response) -> Endpoint:
    """Return an endpoint that always answers the same."""

    async def handler(request: Request, app: App) -> Response:
        return response

    return Endpoint(handler)


async def get_health(request: Request, app: App) -> Response:
    error = "stopping" if app.stopping else app.queue and app.queue.health_error()
    if error:
        return json_response({"status": error}, 503, (("Retry-After", "5"),))
    document = {"status": "ok", "staging": app.settings.smtpd.staging}
    return json_response({key: text for key, text in document.items() if text})


async def get_conf(request: Request, app: App) -> Response:
    return json_response(redacted(app.settings))


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


async def get_queued_mail(request: Request, app: App) -> Response:
    return json_response(message_document(await find_queued_mail(request, app)))


async def cancel_queued_mail(request: Request, app: App) -> Response:
    return await change_queued_mail(request, app, "cancelled", drop_message, request.now)


async def retry_queued_mail(request: Request, app: App) -> Response:
    response = await change_queued_mail(request, app, "retried", flush_queue)
    app.queue.wake_manager()
    return response


async def change_queued_mail(request: Request, app: App, verb: str, operation: Callable, *values: Any) -> Response:
    """Answer with the number of recipients that an operation changed, and the mail as it is now."""
    queueid = (await find_queued_mail(request, app))["queueid"]
    count = await app.queue.do(operation, queueid, *values)
    log.event("info", verb, f"{count} recipients {verb}", queueid=queueid, **request.log_fields())
    return json_response({verb: count, **message_document(await app.queue.do(message_status, queueid))})


async def find_queued_mail(request: Request, app: App) -> dict:
    """Return a mail in the queue; raise Rejected unless the client is a monitor or the login that sent it."""
    found = app.queue and await app.queue.do(message_status, request.path.split("/")[2])
    if not found:
        raise Rejected(make_reply("not-found"))
    if check_monitor(request, None, app.settings) and found["login"] != request.login:
        raise Rejected(make_reply("forbidden"))
    return found


def message_document(message: dict) -> dict:
    """Return a mail in the queue: every recipient with its state, its reply, its next attempt and every earlier one."""
    response, rows = [], message["recipients"]
    for row in rows:
        item = reply_to_dict(row["as_written"], current_reply(message["queueid"], row))
        attempts = [
            {"time": time_to_dict(attempt.time), **reply_to_dict(row["as_written"], attempt.reply)}
            for attempt in parse_history(row["history"])
        ]
        response.append({**item, "state": row["state"], "next": time_to_dict(row["due"]), "attempts": attempts})
    head = {
        "queueid": message["queueid"],
        "addresser": message["sender"],
        "recipient": [row["as_written"] for row in rows],
    }
    timestamp = time_to_dict(message["created_at"])
    return {**head, "response": response, "size": message["size"], "timestamp": timestamp}


async def get_metrics(request: Request, app: App) -> Response:
    """Answer with the metrics of all processes."""
    app.update_gauges()
    current = await asyncio.to_thread(process_metrics)
    stats: dict = dict.fromkeys(("waiting", "sending", "oldest"), None if app.queue else 0)
    if app.queue:
        with contextlib.suppress(Rejected):  # the other metrics are needed then
            stats = await app.queue.do(queue_stats, request.now)
    current.update({("haineko_queue_recipients", state): stats[state] for state in ("waiting", "sending")})
    current[("haineko_queue_oldest_seconds",)] = stats["oldest"] or (stats["waiting"] and 0)
    current[("haineko_queue_disk_free_bytes",)] = app.queue and app.queue.free_space()
    return Response(200, metrics.text(current).encode(), type="text/plain; version=0.0.4; charset=utf-8")


def process_metrics() -> dict:
    """Return the process_... metrics of the supervisor as far as /proc has them."""
    import resource

    found: list = [None] * len(PROCESS_METRICS)
    with contextlib.suppress(OSError, ValueError):
        folder, tick = f"/proc/{os.getppid()}", os.sysconf("SC_CLK_TCK")
        with open(f"{folder}/stat", "rb") as process, open("/proc/stat", "rb") as system:
            words = process.read().rpartition(b")")[2].split()  # from the third field of proc(5) on
            booted = int(system.read().partition(b"\nbtime ")[2].split()[0])
        found[0] = (int(words[11]) + int(words[12])) / tick
        found[1:4] = booted + int(words[19]) / tick, int(words[20]), int(words[21]) * mmap.PAGESIZE
        found[4:] = len(os.listdir(f"{folder}/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return {(name,): value for name, value in zip(PROCESS_METRICS, found)}


async def get_openapi(request: Request, app: App) -> Response:
    """Answer with the OpenAPI description of ENDPOINTS, made of the dataclasses and tables."""
    paths: dict = {}
    for (method, path), endpoint in ENDPOINTS.items():
        summary = (endpoint.handler.__doc__ or endpoint.handler.__name__).split("\n")[0]
        operation = paths.setdefault(path.replace("ID", "{ID}"), {})[method.lower()] = {"summary": summary}
        body, good, bad = schemas_of(path)
        operation["responses"] = {
            "2XX": {"description": "success", **good},
            "default": {"description": "refusal", **bad},
        }
        if body:
            operation["requestBody"] = {"required": True, **body}
        if "ID" in path:
            operation["parameters"] = [{"name": "ID", "in": "path", "required": True, "schema": {"type": "string"}}]
    schemas = {cls.__name__: class_schema(cls) for cls in (Submission, Header, Attachment)}
    logins: dict = {scheme: {"type": "http", "scheme": scheme} for scheme in ("basic", "bearer")}
    logins["token"] = {"type": "apiKey", "in": "header", "name": "X-Postmark-Server-Token"}
    return json_response({
        "openapi": "3.1.0", "info": {"title": "Haineko", "version": __version__}, "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": logins},
        "security": [{}, *({name: []} for name in logins)],
    })  # fmt: skip


def schemas_of(path: str) -> tuple:
    """Return the content of requests, of answers and of refusals; {} for that of no form."""
    asked, provider = Request("POST", path, {}, b"", None, None, None, 0.0), PROVIDER_ENDPOINTS.get(path)
    replies = {"a@example.jp": queued_reply("Q" * 16)}
    answer = json_content(schema_of(answer_document(asked, 200, replies, "Q" * 16, None)))
    if not provider:
        is_submit = path == "/submit"
        body = json_content({"$ref": "#/components/schemas/Submission"}) if is_submit else {}
        return body, answer if is_submit else {}, answer
    keys = ["personalizations"] if provider.read is read_personalizations else []
    mail = {
        "type": "object",
        "properties": {key: {} for key in (*provider.names.values(), *keys) if key.isidentifier()},
    }
    batch = {"type": "array", "items": mail, "maxItems": provider.limit}
    success = provider.answer([Mail("Q" * 16, None, replies)], [{}], False)
    refusal = json_content(schema_of(provider_error(make_reply("login"), asked)))
    body = json_content(batch if provider.read is read_batch else mail)
    return body, {} if isinstance(success, Response) else json_content(schema_of(success)), refusal


def json_content(schema: dict) -> dict:
    return {"content": {"application/json": {"schema": schema}}}


def class_schema(cls: type) -> dict:
    """Return the schema of a dataclass made of config_field()."""
    properties = {}
    for item in fields(cls):
        kind = {"type": types} if (types := SCHEMA_TYPES.get(type(item.default))) else {}
        if item.name in NESTED_SCHEMAS:
            reference = {"$ref": f"#/components/schemas/{NESTED_SCHEMAS[item.name]}"}
            kind = {**kind, "items": reference} if kind else reference
        for key in item.metadata.get("keys") or (item.name,) if "parse" in item.metadata else ():
            properties[key] = {**kind, "description": item.metadata["doc"]}
    return {"type": "object", "properties": properties, "additionalProperties": cls is Header}


def schema_of(value: Any) -> dict:
    """Return the schema of a real response, or of a value within; null stands for any value."""
    value = json.loads(value.body) if isinstance(value, Response) else value
    if isinstance(value, dict):
        return {"type": "object", "properties": dict(zip(value, map(schema_of, value.values()))), "required": [*value]}
    if isinstance(value, list):
        return {"type": "array", "items": schema_of(value[0])} if value else {"type": "array"}
    return {} if value is None else {"type": ["string" if isinstance(value, str) else "integer", "null"]}


async def answer_options(request: Request, app: App) -> Response:
    return Response(204, b"", (("Allow", ", ".join(allowed_methods(request.path))),))


ENDPOINTS = {
    ("POST", "/submit"): Endpoint(submit, CHECKS["head"]),
    **{("POST", path): Endpoint(answer_provider, CHECKS["head"]) for path in PROVIDER_ENDPOINTS},
    ("GET", "/"): constant(json_response({"name": "Haineko", "version": __version__})),
    ("GET", "/health"): Endpoint(get_health),
    ("GET", "/conf"): Endpoint(get_conf, (check_monitor,)),
    ("GET", "/metrics"): Endpoint(get_metrics, (check_monitor,)),
    ("GET", "/queue"): Endpoint(get_queue, (check_monitor,)),
    ("GET", "/queue/ID"): Endpoint(get_queued_mail, (check_queue_access,)),
    ("DELETE", "/queue/ID"): Endpoint(cancel_queued_mail, (check_queue_access,)),
    ("POST", "/queue/ID/retry"): Endpoint(retry_queued_mail, (check_queue_access,)),
    ("GET", "/sample/mail"): constant(json_response(SAMPLES)),
    ("GET", "/openapi.json"): Endpoint(get_openapi),
    ("GET", "/neko"): constant(Response(200, b"Nyaaaaa", type="text/plain; charset=utf-8")),
}


PROCESS_METRICS = {
    "process_cpu_seconds_total": ("counter", "CPU time of the supervisor.", {}),
    "process_start_time_seconds": ("gauge", "When the supervisor started, since the epoch.", {}),
    "process_virtual_memory_bytes": ("gauge", "Virtual memory of the supervisor.", {}),
    "process_resident_memory_bytes": ("gauge", "Resident memory of the supervisor.", {}),
    "process_open_fds": ("gauge", "Files that the supervisor has open.", {}),
    "process_max_fds": ("gauge", "Files that a process may have open.", {}),
}
STATUSES = (*sorted({200, 202, 204, 207, 502, *[row[0] for row in REPLIES.values() if row[0]]}), "other")
PATHS, RELAY_KINDS = (*dict.fromkeys(path for _, path in ENDPOINTS), "other"), (*RELAYS, "other")
OUTCOMES = ("accepted", "queued", "refused", "deferred", "failed", "unsure")
REASONS = tuple(slug for slug in REPLIES if make_reply(slug).slug)
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
    "haineko_build_info": ("gauge", "Versions.", {"version": (__version__,), "python": (sys.version.split()[0],)}),
    **PROCESS_METRICS,
}


def route_key(path: str) -> str:
    """Return the path as ENDPOINTS has it: with "ID" for a queue id."""
    found = QUEUE_PATH.fullmatch(path)
    return f"/queue/ID{found[1]}" if found else path


def allowed_methods(path: str) -> list:
    """Return the methods for a path, none if it is unknown."""
    if path == "*":  # OPTIONS for the whole server, RFC 9110 9.3.7
        return ["GET", "HEAD", "POST", "OPTIONS"]
    methods = [method for method, known in ENDPOINTS if known == route_key(path)]
    return [*methods, *(["HEAD"] if "GET" in methods else []), *(["OPTIONS"] if methods else [])]


def cors_policy(head: RequestHead, settings: Settings) -> tuple:
    """Return (whether a web page of the request's Origin may POST, headers that its browser reads) (Fetch standard)."""
    origin = head.headers.get("origin")
    if origin is None:
        return head.headers.get("sec-fetch-site", "").lower() != "cross-site", ()
    if origin.lower() in settings.httpd.allowed_origins:
        return True, (
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Allow-Methods", "POST, GET, OPTIONS"),
            ("Access-Control-Allow-Headers", "Content-Type, Authorization, Idempotency-Key, Prefer"),
            ("Access-Control-Max-Age", "600"),
            ("Vary", "Origin"),
        )
    host = origin.partition("://")[2].lower()
    return is_own_host(host, settings) and host == head.headers.get("host", "").lower(), ()


class Connection(http.server.BaseHTTPRequestHandler):
    """One connection of a client.

    The base class writes responses into `wfile`, a buffer that is sent by one call. Requests are read with a deadline,
    without a thread, and parsed by parse_head(), which is stricter and faster.
    """

    protocol_version = request_version = "HTTP/1.1"
    command, head, request, extra_headers, close_connection = "", None, None, (), True

    def __init__(self, sock: socket.socket, peer: tuple | str, worker: Worker) -> None:
        self.connection, self.worker, self.app = AsyncSocket(sock), worker, worker.app
        self.settings = worker.app.settings
        self.buffer, self.in_body = b"", False
        self.begun, self.received = time.monotonic(), 0  # when the client's turn began, octets received since
        is_inet = isinstance(peer, tuple)
        self.in_flight = 0  # octets of the body, received in parts
        self.peer = parse_ip(peer[0] if is_inet else "127.0.0.1")  # a client of a Unix socket is on this machine
        self.port = peer[1] if is_inet else None

    async def handle(self) -> None:
        """Serve requests, one after the other, until one side closes."""
        try:
            await self._tls_handshake()
            while self._skip_blank_lines() or await self._wait_request():
                octets = await self.handle_one_request()
                deadline = time.monotonic() + self.settings.httpd.timeout
                await self.connection.sendall(octets, deadline)
                del octets
                if self.close_connection:
                    await self.connection.drain(deadline)
                    await self._while_idle(lingering_close(self.connection))
                    break
                self.begun, self.received = time.monotonic(), 0
        except (OSError, ValueError):  # the client is gone
            pass
        finally:
            with contextlib.suppress(OSError):
                close_notify(self.connection.sock)
            self.connection.close()
            self.worker.forget(self)

    async def _tls_handshake(self) -> None:
        if not self.app.tls:
            return
        deadline = time.monotonic() + self.app.settings.httpd.timeout
        sock = self.app.tls.wrap_socket(self.connection.sock, server_side=True, do_handshake_on_connect=False)
        self.connection.sock = sock
        await self._while_idle(self.connection.call(sock.do_handshake, deadline))

    async def _wait_request(self) -> bool:
        """Return True when a request begins, False if the client closed; socket.timeout if it took too long."""
        deadline = time.monotonic() + self.app.settings.httpd.timeout
        while True:
            self.buffer = await self._while_idle(self.connection.recv(16384, deadline))
            if not self.buffer or self._skip_blank_lines():
                return bool(self.buffer)

    def _skip_blank_lines(self) -> bytes:
        """Return what has arrived of the next request; line ends before it are ignored (RFC 9112 2.2)."""
        self.buffer = self.buffer.lstrip(b"\r\n")
        return self.buffer

    async def _while_idle(self, waiting: Any) -> Any:
        """Await something while the connection may be closed in favour of another."""
        self.worker.mark_idle(self)
        try:
            return await waiting
        finally:
            self.worker.mark_busy(self)

    async def handle_one_request(self) -> bytes:
        """Return the octets of the response to the request that has begun; set `close_connection`."""
        self.settings = self.app.settings  # one set from beginning to end
        self.begun, self.received = time.monotonic(), len(self.buffer)
        self.head = self.request = None
        self.command, self.unread, self.extra_headers = "", 1, ()
        try:
            response = await self._respond(self.begun + self.settings.httpd.timeout)
        except Rejected as error:
            response = self.rejection(error.reply)
        except OSError:
            raise
        except Exception:
            log_exception(None)
            response = self.rejection(make_reply("our-fault"))
        finally:
            self.app.octets_in_flight -= self.in_flight
            self.in_body, self.in_flight = False, 0
        if 0 < self.unread <= len(self.buffer) and self.request:  # a refused body that has arrived already
            self.buffer, self.unread = self.buffer[self.unread :], 0
        self.close_connection = not (self.head and self.head.keep_alive and not self.unread and not self.app.stopping)
        self._count(response.status)
        self.request = None  # an idle connection keeps no body
        return self.response_octets(response)

    def _count(self, status: int) -> None:
        path = route_key(self.request.path) if self.request else ""
        endpoint = path if path in PATHS else "other"
        metrics.add("haineko_http_requests_total", endpoint, status if status in STATUSES else "other")
        metrics.observe("haineko_http_request_seconds", seconds=time.monotonic() - self.begun)

    async def _respond(self, deadline: float) -> Response:
        """Return an endpoint's response; `unread` are the octets of the body that are not read yet."""
        self.head = head = parse_head(await self._read_head(deadline))
        self.command = head.method
        if NOT_IN_HOST.search(head.headers.get("host", "" if head.is_http10 else ",")):  # RFC 9112 3.2
            raise Rejected(make_reply("bad-request", "Host"))
        self.unread = body_length(head)
        self.request = request = self._request(head)
        if request_id := request.trace_id("x-request-id"):
            self.extra_headers = (("X-Request-Id", request_id),)
        allowed, cors_headers = cors_policy(head, self.settings)
        self.extra_headers += cors_headers
        endpoint = self._endpoint(request, allowed)
        if endpoint.checks:
            values, password = (endpoint.checks, request, None, self.settings), self.settings.password
            if password.logins and not password.cached_login(credentials_of(request)):  # a hash is computed
                await asyncio.to_thread(apply_checks, *values)
            else:
                apply_checks(*values)
        if self.unread and head.method != "POST":
            self.unread = CHUNKED  # it is not waited for: the connection is closed
            raise Rejected(make_reply("bad-request", f"{head.method} takes no body"))
        if head.headers.get("content-encoding", "identity").lower() != "identity":
            raise Rejected(make_reply("content-encoding", "send the document as it is"))
        self.in_body = True
        request.body = await self._read_body(head, self.unread, deadline)
        self.in_body, self.unread = False, 0
        return await endpoint.handler(request, self.app)

    def _request(self, head: RequestHead) -> Request:
        client, port = client_address(self.peer, self.port, head.headers, self.settings)
        request = Request(
            head.method, head.path, head.headers, b"", client, self.peer, port, time.time(), self.settings
        )
        request.limits = self.app.transport.limits
        if not FORWARDING_HEADERS.isdisjoint(head.headers):
            request.forwarded = ", ".join(sorted(FORWARDING_HEADERS.intersection(head.headers))).title()
        return request

    def _endpoint(self, request: Request, origin_allowed: bool) -> Endpoint:
        """Return the endpoint for a request; raise Rejected if there is none."""
        method = "GET" if request.method == "HEAD" else request.method
        endpoint = ENDPOINTS.get((method, route_key(request.path)))
        if not endpoint:
            if not allowed_methods(request.path):
                hint = did_you_mean(request.path, {path for _, path in ENDPOINTS})
                raise Rejected(make_reply("not-found", *filter(None, [hint.lstrip("; ")])))
            if method != "OPTIONS":
                raise Rejected(make_reply("method", word=method))
        is_preflight = method == "OPTIONS" and "access-control-request-method" in request.headers
        if not origin_allowed and (method in ("POST", "DELETE") or is_preflight):
            origin = sanitize(request.headers.get("origin", "a cross-site request without Origin"))
            raise Rejected(make_reply("origin", f"{origin} is not in httpd.allowed_origins"))
        return endpoint or Endpoint(answer_options)

    def rejection(self, reply: Reply) -> Response:
        """Return the response for a Reply that refuses the request, and log it."""
        request = self.request or Request("", "", {}, b"", self.peer, self.peer, self.port, time.time())
        queueid = new_queueid(request.now) if reply.command != "HTTP" else None
        response = respond(request, reply.status, {None: reply}, queueid, None)
        if request.method == "POST" and request.path in PROVIDER_ENDPOINTS:
            return provider_error(reply, request)
        if reply.status == 405:
            return response._replace(headers=(("Allow", ", ".join(allowed_methods(request.path))),))
        return response

    def response_octets(self, response: Response) -> bytes:
        self.wfile = io.BytesIO()
        self.send_response_only(response.status)
        self.send_header("Server", self.version_string())
        self.send_header("Date", self.date_time_string())
        if response.status != 204:
            self.send_header("Content-Type", response.type)
            self.send_header("Content-Length", str(len(response.body)))
        for name, value in (*response.headers, *self.extra_headers):
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        elif self.head.is_http10:
            self.send_header("Connection", "keep-alive")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)
        return self.wfile.getvalue()

    def version_string(self) -> str:
        return "Haineko"

    def date_time_string(self, timestamp: float | None = None) -> str:
        return http_date(int(time.time() if timestamp is None else timestamp))

    async def _read_head(self, deadline: float) -> bytes:
        """Return the octets before the empty line."""
        searched = 0  # octets that need no search
        while True:
            end = self.buffer.find(b"\r\n\r\n", searched)
            if end > MAX_HEAD or (end < 0 and len(self.buffer) > MAX_HEAD):
                raise Rejected(make_reply("head-too-large"))
            if end >= 0:
                head, self.buffer = self.buffer[: end + 2], self.buffer[end + 4 :]
                return head
            if BARE_LF.search(self.buffer, searched):
                raise Rejected(make_reply("bad-request", "line ends with LF alone"))
            searched = max(len(self.buffer) - 3, 0)
            self.buffer += await self._receive(deadline)

    async def _receive(self, deadline: float, limit: int = 65536) -> bytes:
        """Return octets from the client; raise Rejected at the deadline."""
        try:
            await asyncio.sleep(0)  # a client that sends faster than we read must not delay the others
            if time.monotonic() >= deadline:
                raise socket.timeout
            octets = await self._while_idle(self.connection.recv(limit, deadline))
        except socket.timeout:
            raise Rejected(make_reply("request-timeout")) from None
        if not octets:
            raise ConnectionError("closed within a request")
        self.received += len(octets)
        if self.in_body:
            size = self.settings.smtpd.max_message_size
            self.in_flight += len(octets)
            self.app.octets_in_flight += len(octets)
            if self.app.octets_in_flight > max(MAX_IN_FLIGHT, 4 * size if size else 2 * MAX_BODY):
                raise Rejected(make_reply("overload"))
        return octets

    def precedence(self, now: float, crowded: set) -> tuple:
        """Return a sort key: a connection over the limit makes room by closing the first of the others."""
        is_limited = self.port is not None and self.peer not in self.app.settings.httpd.trusted_proxies
        rate = (self.received + 500) / max(now - self.begun, 1)  # octets a second, with some to start with
        return not (is_limited and self.peer in crowded), rate

    async def _read_body(self, head: RequestHead, length: int, deadline: float) -> bytes:
        size = self.settings.smtpd.max_message_size
        limit = 2 * size + 65536 if size else MAX_BODY
        if length > limit:
            raise Rejected(make_reply("body-too-large", body_limit(size, limit)))
        expected = head.headers.get("expect")
        if expected:
            if expected.lower() != "100-continue":
                raise Rejected(make_reply("expectation"))
            if not head.is_http10 and (length == CHUNKED or len(self.buffer) < length):
                await self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n", deadline)
        if length == CHUNKED:
            return await self._read_chunks(limit, deadline)
        return await self._read_exactly(length, deadline)

    async def _read_exactly(self, length: int, deadline: float) -> bytes:
        """Return `length` octets; a bytearray if they are many, because a copy would need the memory twice."""
        octets, self.buffer = self.buffer[:length], self.buffer[length:]
        if len(octets) == length:
            return octets
        whole = bytearray(octets)
        while len(whole) < length:
            whole += await self._receive(deadline, min(length - len(whole), 1 << 18))
        return whole if length >= LARGE else bytes(whole)

    async def _read_chunks(self, limit: int, deadline: float) -> bytes:
        """Return a chunked body (RFC 9112 7.1)."""
        body, total = bytearray(), 0
        while True:
            line = await self._read_line(deadline)
            found = re.fullmatch(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;.*)?", line)
            if not found:
                raise Rejected(make_reply("bad-request", "chunk size"))
            size = int(found[1], 16)
            total += len(line) + size  # a body of chunks of one octet costs by its lines
            if total > limit:
                raise Rejected(make_reply("body-too-large", body_limit(self.settings.smtpd.max_message_size, limit)))
            if not size:
                break
            body += await self._read_exactly(size, deadline)
            await asyncio.sleep(0)  # a chunk may be one octet, and thousands of them may have arrived
            if await self._read_exactly(2, deadline) != b"\r\n":
                raise Rejected(make_reply("bad-request", "end of chunk"))
        for _ in range(MAX_HEADERS):
            if not await self._read_line(deadline):
                return body if len(body) >= LARGE else bytes(body)
        raise Rejected(make_reply("head-too-large"))

    async def _read_line(self, deadline: float) -> bytes:
        while b"\r\n" not in self.buffer:
            if len(self.buffer) > 4096:
                raise Rejected(make_reply("bad-request", "chunk line"))
            self.buffer += await self._receive(deadline, 4096)
        line, _, self.buffer = self.buffer.partition(b"\r\n")
        return line


def body_limit(size: int, limit: int) -> str:
    return f"more than {limit} octets" + (f": twice smtpd.max_message_size ({size}) and 65536" if size else "")


async def lingering_close(sock: AsyncSocket) -> None:
    """End the stream and read what still arrives: else a reset could destroy the last response (RFC 9112 9.6)."""
    deadline = time.monotonic() + LINGER_TIMEOUT
    with contextlib.suppress(OSError):
        await sock.call(functools.partial(close_notify, sock.sock), deadline)
        sock.sock.shutdown(socket.SHUT_WR)
        while await sock.recv(1 << 18, deadline):
            pass


def close_notify(sock: Any) -> None:
    """Send the closure alert of TLS (RFC 9112 9.8), once; the client's own is not waited for."""
    if isinstance(sock, ssl.SSLSocket):
        try:
            sock.unwrap()
        except ssl.SSLWantWriteError:
            raise
        except (OSError, ValueError):  # sent and not answered yet, or the connection is broken, or closed already
            pass


@functools.lru_cache(maxsize=2)
def http_date(second: int) -> str:
    return formatdate(second, usegmt=True)


class Worker:
    """Process that serves all its connections in one thread, or that delivers from the queue."""

    ACCEPT_DELAY = 0.001  # seconds for which a worker that is busier than another leaves a new connection to it

    def __init__(
        self,
        listeners: list,
        settings: Settings,
        parent_pipe: Any,
        busy_counts: Any = None,
        slot: int | None = 0,
        wakeup_pair: tuple = (None, None),
        limits: SharedLimits | None = None,
    ) -> None:
        self.app = App(settings, wakeup_pair[1], limits)
        self.listeners, self.parent_pipe = listeners, parent_pipe
        self.busy_counts, self.slot = busy_counts or [0], slot  # busy connections of each worker; index of this one
        self.app.update_gauges = self.update_gauges
        self.loop = EventLoop()
        self.queue_manager = QueueManager(self.app, wakeup_pair[0]) if slot is None else None
        self.connections: set = set()
        self.per_address: Counter = Counter()  # of the connections
        self.idle: OrderedDict = OrderedDict()  # connections without a request, the longest-idle first
        self.lingering_503s = 0  # of them, now

    def run(self) -> None:
        """Serve until a signal to stop comes and all requests in flight are answered."""
        log.start_buffering(self.loop)
        sys.setswitchinterval(0.001)  # a thread at work on a large mail must not hold up the small ones for longer
        self.loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self.stopped, self.reloading = asyncio.Event(), asyncio.Lock()
        self._listen_to_signals()
        for sock in (*self.listeners, self.parent_pipe):
            sock.setblocking(False)
        listeners = list(map(AsyncSocket, self.listeners))
        vital = [*map(self._accept, listeners), self._watch_parent(), self._housekeeping(), self._beat()]
        for coroutine in (*vital, self.queue_manager.run()) if self.queue_manager else vital:
            self.loop.create_task(self._stop_on_error(coroutine))
        await self.stopped.wait()
        began = now = time.monotonic()
        await asyncio.sleep(0.01)  # requests that have come meanwhile are accepted
        for listener in listeners:
            listener.close()
        while now < began + SHUTDOWN_TIMEOUT and self._has_work():
            patient = now <= began + LINGER_TIMEOUT
            for one in list(self.idle):
                if not (one.in_body or (patient and (one.buffer or one.connection.outbox))):
                    self._interrupt(one)  # no request has begun, and no response is on its way
            await asyncio.sleep(0.02)
            now = time.monotonic()
        await asyncio.wait([self.loop.create_task(self.app.transport.sweep(everything=True))], timeout=LINGER_TIMEOUT)

    def _has_work(self) -> bool:
        return bool(self.connections or (self.queue_manager and any(self.queue_manager.in_flight.values())))

    def _listen_to_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self._stop)
        self.loop.add_signal_handler(signal.SIGHUP, lambda: self.loop.create_task(self._reread()))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # one that came since the fork is handled now

    def _stop(self) -> None:
        self.app.stopping = True
        self.stopped.set()

    async def _watch_parent(self) -> None:
        """Stop when the supervisor has died, which could neither replace nor stop this process."""
        await AsyncSocket(self.parent_pipe).recv(1, float("inf"))
        self._stop()

    async def _stop_on_error(self, coroutine: Any) -> None:
        """Await a coroutine that the worker can't do without: if it fails, another worker takes over."""
        try:
            await coroutine
        except Exception:
            log_exception("worker")
            self._stop()

    async def _accept(self, listener: AsyncSocket) -> None:
        while listener.sock.fileno() >= 0:
            least = min(self.busy_counts)
            if len(self.connections) - len(self.idle) > least + least // 4:  # of many, some more make no difference
                await asyncio.sleep(self.ACCEPT_DELAY)
            try:
                sock, peer = listener.sock.accept()
            except BlockingIOError:
                with contextlib.suppress(ConnectionAbortedError):  # closed
                    await listener.wait_ready(float("inf"))
                continue
            except OSError as error:  # the client is gone, or no file is left
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    await asyncio.sleep(0 if self._close_idlest() else 0.05)
                continue
            sock.setblocking(False)
            if listener.sock.family != socket.AF_UNIX:
                with contextlib.suppress(OSError):  # macOS fails here if the client is gone already
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._full() and not await self._make_room():
                self.loop.create_task(self._reject_503(Connection(sock, peer, self)))
                continue
            connection = Connection(sock, peer, self)
            self.connections.add(connection)
            self.per_address[connection.peer] += 1
            self.mark_busy(connection)
            self.loop.create_task(connection.handle())

    def _full(self) -> bool:
        return len(self.connections) >= self.app.settings.httpd.max_connections

    async def _make_room(self) -> bool:
        """Return True if there is room for another connection, or one was closed in its favour."""
        for attempt in range(4):
            await asyncio.sleep(0)  # until what has arrived is read, and the connections that ended are gone
            if not self._full() or (attempt and self._close_idlest()):
                return True
        return False

    def mark_idle(self, connection: Connection) -> None:
        """Note that a connection waits for a request."""
        self.idle[connection] = None
        self.busy_counts[self.slot] = len(self.connections) - len(self.idle)

    def mark_busy(self, connection: Connection) -> None:
        """Note that a connection has a request."""
        self.idle.pop(connection, None)
        self.busy_counts[self.slot] = len(self.connections) - len(self.idle)

    def forget(self, connection: Connection) -> None:
        """Note that a connection is closed."""
        if connection in self.connections:
            self.connections.discard(connection)
            self.per_address[connection.peer] -= 1
            if not self.per_address[connection.peer]:
                del self.per_address[connection.peer]
        self.mark_busy(connection)

    async def _reject_503(self, connection: Connection) -> None:
        """Answer 503 to a connection over the limit; close it at once if many are being answered so, or under TLS."""
        linger = self.lingering_503s < MAX_LINGERING_503
        self.lingering_503s += 1
        octets, sock = connection.response_octets(connection.rejection(make_reply("busy"))), connection.connection
        metrics.add("haineko_http_requests_total", "other", 503)
        with contextlib.suppress(OSError):
            if not self.app.tls:
                await sock.sendall(octets, time.monotonic() + LINGER_TIMEOUT)
                await sock.drain(time.monotonic() + LINGER_TIMEOUT)
                if linger:
                    await lingering_close(sock)
        self.lingering_503s -= 1
        sock.close()

    def _close_idlest(self) -> bool:
        """Close the connection that sent least for its time; return False if none waits for its client.

        Those of an address with more than a quarter of `max_connections` go first.
        """
        limit, now = self.app.settings.httpd.max_connections // 4, time.monotonic()
        crowded = {peer for peer, count in self.per_address.items() if count > limit}
        waiting = list(itertools.islice(self.idle, MAX_VICTIMS))
        return any(map(self._interrupt, sorted(waiting, key=lambda connection: connection.precedence(now, crowded))))

    def _interrupt(self, connection: Connection) -> bool:
        """Abort an idle connection; return False if something has just arrived on it."""
        found = connection.connection.abort(ConnectionAbortedError("closed for another"))
        if found:
            self.forget(connection)
        return found

    async def _beat(self) -> None:
        """Show the supervisor that this loop is not stuck."""
        while metrics.columns:
            metrics.beat()
            await asyncio.sleep(0.5)

    async def _housekeeping(self) -> None:
        """Once a second, close SMTP sessions that nobody uses, look for a new log file, and update the metrics."""
        while True:
            await asyncio.sleep(1.0)
            log.reopen()
            self.update_gauges()
            await self.app.transport.sweep()

    def update_gauges(self) -> None:
        """Write what this process has at the moment into the metrics."""
        pools = self.app.transport.pools.values()
        metrics.set("haineko_sessions", "idle", to=sum([len(pool.idle) for pool in pools]))
        metrics.set("haineko_sessions", "in_use", to=sum([pool.in_use for pool in pools]))
        metrics.set("haineko_sessions", "opening", to=sum([pool.opening for pool in pools]))
        metrics.set("haineko_connections", "idle", to=len(self.idle))
        metrics.set("haineko_connections", "busy", to=len(self.connections) - len(self.idle))
        count_lost_lines()

    async def _reread(self) -> None:
        """Apply settings that changed; the supervisor has logged their faults. The last ones win."""
        async with self.reloading:
            settings, errors = await asyncio.to_thread(load_settings, self.app.settings.path)
            if not errors:
                self.app.apply(settings)


def count_lost_lines() -> None:
    lost, log.lost_ever = log.lost_ever, 0
    metrics.add("haineko_log_lines_lost_total", by=lost)


class Supervisor:
    """Process that binds, forks workers, replaces those that die, and watches the settings."""

    def __init__(self, settings: Settings, listeners: list) -> None:
        self.settings, self.listeners = settings, listeners
        self.workers: dict = {}  # pid: (monotonic time of its start, index in busy_counts, None for the queue's)
        self.busy_counts: Any = [0]
        self.limits = SharedLimits()
        self.wakeup_pair = socket.socketpair() if settings.queue else (None, None)  # written to when something is due
        self.stopping = self.reload_requested = False
        self.bad_stat_keys: tuple = ()  # of settings whose faults are logged already
        self.respawn_not_before = 0.0  # no worker is started before this time
        self.notify_path = os.environ.pop("NOTIFY_SOCKET", "")  # systemd's; no other process speaks to it
        is_ours = os.environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog = int(is_ours and os.environ.pop("WATCHDOG_USEC", "0")) / 2e6  # seconds between messages to it
        self.looked = self.petted = 0.0  # time.monotonic() of the last look at the workers, and of the last message

    def run(self, ready: Callable) -> int:
        """Run until SIGTERM or SIGINT; return the exit code."""
        log.open(self.settings.smtpd.syslog, self.settings.smtpd.log)
        alarm, wake = socket.socketpair()
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, self._signalled)
        self.parent_pipe, self.child_pipe_end = socket.socketpair()
        wanted = self.settings.httpd.workers or os.cpu_count() or 1
        self.busy_counts = memoryview(mmap.mmap(-1, 4 * wanted)).cast("i")  # shared by all that are forked
        metrics.allocate(METRICS, wanted + 2)  # the last rows are the queue's process's and the supervisor's
        metrics.set("haineko_build_info", __version__, sys.version.split()[0], to=1)
        metrics.set("haineko_reload_success", to=1)
        alarm.settimeout(min(self.watchdog or 1.0, 1.0))
        self._replace()
        ready()
        where = " ".join(url_of(listener, bool(self.settings.httpd.tls)) for listener in self.listeners)
        self._notify("READY=1", f"STATUS=listens at {where}")
        while not self.stopping:
            with contextlib.suppress(socket.timeout):
                alarm.recv(4096)
            self._reap()
            log.reopen()
            count_lost_lines()
            if not self.stopping:
                self._check_heartbeats(time.monotonic())
                self._replace()
                self._watch()
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
        beats = {pid: max(began, metrics.last_beat(self._row(slot))) for pid, (began, slot) in self.workers.items()}
        hanging = [pid for pid, beat in beats.items() if now - beat > HANG_TIMEOUT]
        if now - self.looked > HANG_TIMEOUT / 2:  # this process, or the machine, did not run either
            hanging = []
        self.looked = now
        for pid in hanging:
            log.lines(f"worker {pid} hangs; killing it", level="error")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.watchdog and not hanging and now - self.petted > self.watchdog * 0.9:
            self.petted = now
            self._notify("WATCHDOG=1")

    def _row(self, slot: int | None) -> int:
        """Return the row in the metrics of a worker, or of the queue's process."""
        return len(self.busy_counts) if slot is None else slot

    def _signalled(self, number: int, _: Any) -> None:
        self.stopping = self.stopping or number in (signal.SIGTERM, signal.SIGINT)
        self.reload_requested = self.reload_requested or number == signal.SIGHUP

    def _replace(self) -> None:
        """Start the workers that are missing; one that died within a second is replaced a second later."""
        free = set(range(len(self.busy_counts))) - {slot for _, slot in self.workers.values()}
        missing = self.settings.queue and None not in [slot for _, slot in self.workers.values()]
        for slot in (*([None] if missing else []), *sorted(free)):
            if time.monotonic() < self.respawn_not_before:
                return
            sys.stderr.flush()
            if slot is not None:
                self.busy_counts[slot] = 0
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

    def _become_worker(self, slot: int | None) -> None:
        code = 1
        try:
            self.child_pipe_end.close()
            for listener in self.listeners if slot is None else ():
                listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            gc.freeze()
            gc.set_threshold(20000, 50, 50)
            listeners = [] if slot is None else self.listeners
            metrics.use_row(self._row(slot))
            shared = self.parent_pipe, self.busy_counts, slot, self.wakeup_pair, self.limits
            Worker(listeners, self.settings, *shared).run()
            code = 0
        except BaseException:
            log_exception("worker")
        finally:
            log.flush()
            os._exit(code)  # without waiting for threads, and without the supervisor's cleanup

    def _reap(self) -> None:
        while self.workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            started, slot = self.workers.pop(pid, (None, 0))
            if started is not None and not self.stopping:
                name = "queue process" if slot is None else "worker"
                reason = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
                log.lines(f"{name} {pid} ended ({reason}); starting a new one", level="error")
                metrics.add("haineko_workers_restarted_total")
                if time.monotonic() - started < 1:
                    self.respawn_not_before = time.monotonic() + 1

    def _watch(self) -> None:
        """Apply settings that changed, or log their faults once."""
        settings = self.settings
        if not settings.path:
            return
        seen = self.bad_stat_keys or settings.files
        if not self.reload_requested and seen == tuple((path, stat_key(path)) for path, _ in seen):
            return
        self.reload_requested = False
        self._notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        fresh, errors = load_settings(settings.path)
        self._notify("READY=1", f"STATUS=reload failed: {len(errors)} errors" if errors else "STATUS=reloaded")
        metrics.set("haineko_reload_success", to=int(not errors))
        if errors:
            self.bad_stat_keys = fresh.files
            lines = [f"  {sanitize(error)}" for error in errors]
            log.lines("reload failed; keeping the current settings:", *lines, level="error")
            return
        self.bad_stat_keys = ()
        for part in ("listen", "workers"):
            if getattr(fresh.httpd, part) != getattr(settings.httpd, part):
                log.lines(f"httpd.{part}: takes effect at the next start")
        fresh = replace(fresh, httpd=replace(fresh.httpd, listen=settings.httpd.listen, workers=settings.httpd.workers))
        if (fresh.queue and fresh.queue.path) != (settings.queue and settings.queue.path):
            log.lines("queue.path: takes effect at the next start")
        self.settings = fresh = pin_queue_path(fresh, settings.queue)
        log.open(fresh.smtpd.syslog, fresh.smtpd.log)
        log.lines(f"reloaded {settings.path}", *filter(None, [fresh.smtpd.staging]))
        self._signal_workers(signal.SIGHUP)

    def _signal_workers(self, number: int) -> None:
        for pid in self.workers:
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
        self._signal_workers(signal.SIGTERM)
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT + 3
        while self.workers and time.monotonic() < deadline:
            with contextlib.suppress(socket.timeout):
                alarm.recv(4096)
            self._reap()
        self._signal_workers(signal.SIGKILL)
        log.lines("stopped")
        return 0


def bind(listen: str) -> socket.socket:
    """Return a listening TCP or Unix socket; raise OSError."""
    if listen.startswith("unix:"):
        return bind_unix(listen[5:])
    name, _, port = listen.rpartition(":")
    family, *_, address = socket.getaddrinfo(
        ascii_domain(name.strip("[]")).encode(), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    return socket.create_server(address, family=family, backlog=BACKLOG)


def bind_unix(path: str) -> socket.socket:
    """Return a listening Unix socket; one left over by a server that is gone is replaced."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        found = client.connect_ex(path)
    if found == errno.ECONNREFUSED and not stat.S_ISSOCK(os.stat(path).st_mode):  # a file refuses as well
        raise OSError(errno.EEXIST, "exists and is not a socket")
    if found == errno.ECONNREFUSED:
        os.unlink(path)
    elif found != errno.ENOENT:
        found = found or errno.EADDRINUSE
        raise OSError(found, os.strerror(found))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    os.chmod(path, 0o666)  # the folder's mode decides who may connect, as for other servers' sockets
    listener.listen(BACKLOG)
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
    """Return the URL of a listener."""
    address = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{address}"
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"{'https' if tls else 'http'}://{host}:{address[1]}/"


# ======================================================================================================================
# 20. Commands
#     Takes the words of a command line and returns an exit code. Results go to stdout, messages for a person to stderr.
#     A new command is one function and one row of COMMANDS, the table at the end, with its arguments in ARGUMENTS.
# ======================================================================================================================


class CommandError(Exception):
    """A command that cannot be carried out; the arguments are a message and the exit code."""


def main(argv: list) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 wrong usage or settings."""
    open_standard_streams()
    try:
        if argv[:1] == ["sendmail"] and argv[1:] not in (["-h"], ["--help"]):
            return command_sendmail(argv[1:])  # its flags are older than argparse
        parser, commands = argument_parsers()
        if not argv or argv[0] not in commands:
            parser.parse_args(argv)  # prints help, the version, or what is wrong
        return COMMANDS[argv[0]].run(commands[argv[0]].parse_intermixed_args(argv[1:]))
    except CommandError as error:
        return print_error(*error.args)
    except BrokenPipeError:  # of stdout: `queue | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        return 130


def open_standard_streams() -> None:
    """Open those of descriptors 0 to 2 that are closed: a socket with such a number would be read or written to."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # the lowest free number
        name = ("stdin", "stdout", "stderr")[number]
        setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 -- kept for life
    os.close(number)


def argument_parsers() -> tuple:
    """Return (the argparse.ArgumentParser, {command: its own})."""
    import argparse

    top = argparse.ArgumentParser(
        prog="haineko.py", description="HTTP server that relays mail, POSTed as JSON, by SMTP."
    )
    top.add_argument("--version", action="version", version=f"Haineko {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, row in COMMANDS.items():
        about = row.run.__doc__.rstrip(".")
        parser = commands.add_parser(name, help=about, description=about)
        for key in row.arguments.split():
            names, details = ARGUMENTS[key]
            parser.add_argument(*names, **details)
    return top, commands.choices


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


# -- server and daemon


def command_serve(options: Any) -> int:
    """Run the server in the foreground."""
    settings, listeners = prepare_server(options)
    log.devel = options.devel
    return Supervisor(settings, listeners).run(lambda: announce(settings, listeners))


def prepare_server(options: Any) -> tuple:
    """Return a server's Settings and its listening sockets."""
    settings, errors, changes = usable_settings(options.config), [], {}
    if options.listen:
        changes["listen"] = list_of(parse_listen_address)(options.listen, "--listen", errors)
    if options.workers is not None:
        changes["workers"] = integer(0, 256)(options.workers, "--workers", errors)
    if errors:
        raise CommandError("; ".join(errors), 2)
    settings = replace(settings, httpd=replace(settings.httpd, **changes))
    raise_nofile_limit()
    if settings.queue:
        database = QueueDB(settings.queue)
        database.commit([])
        database.close(for_good=True)
        if NEWER_VERSION in database.fault:
            raise CommandError(f"the queue can't be used: {database.fault}", 2)
    try:
        listeners = activated_sockets() or [open_listener(address) for address in settings.httpd.listen]
    except OSError as error:
        raise CommandError(f"a socket of $LISTEN_FDS can't be used: {error.strerror}", 1) from None
    outside = [one for one in listeners if one.family != socket.AF_UNIX]
    outside = [one for one in outside if parse_ip(one.getsockname()[0]) not in LOOPBACK]
    if outside and settings.password.logins and not (settings.httpd.tls or settings.httpd.trusted_proxies.texts):
        words = f"passwords and keys come to {url_of(outside[0], False)} without TLS"
        log.write_bytes(f"haineko: {words}: set httpd.tls, or httpd.trusted_proxies behind a proxy\n".encode())
    for text in risk_warnings(settings):
        log.write_bytes(sanitize(f"haineko: warning: {text}", 500).encode() + b"\n")
    return settings, listeners


def open_listener(address: str) -> socket.socket:
    try:
        return bind(address)
    except (OSError, UnicodeError) as error:
        raise CommandError(f"can't listen at {address}: {getattr(error, 'strerror', None) or error}", 1) from None


def raise_nofile_limit(most: int = 65536) -> None:
    """Allow as many open files as the system permits: each client needs one, and each of its deliveries another."""
    import resource

    with contextlib.suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)  # setrlimit() may reject infinity
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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
    pid_file = pid_file_path(options)
    if running_pid(pid_file):
        raise CommandError(f"runs already (pid {running_pid(pid_file)})", 1)
    settings, listeners = prepare_server(options)
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC"):  # systemd waits for the process that it has started
        os.environ.pop(name, None)
    read_end, write_end = os.pipe()
    sys.stderr.flush()
    if os.fork():
        os.close(write_end)
        line = os.read(read_end, 4096).decode()
        print(line or "haineko: did not start; see the log\n", end="", file=sys.stderr)
        return 0 if " listens at " in line else 1
    os.setsid()
    if os.fork():  # the daemon leads no session, so that it can never get a terminal
        os._exit(0)
    code = 1
    try:
        code = run_daemon(settings, listeners, pid_file, write_end)
    except OSError as error:
        os.write(write_end, f"haineko: can't start: {error}\n".encode())
    finally:
        os._exit(code)


def run_daemon(settings: Settings, listeners: list, pid_file: str, write_end: int) -> int:
    """Run the server detached from its terminal; `write_end` of a pipe gets a line when it listens."""
    import fcntl

    log_file = log_path(pid_file) if settings.smtpd.syslog.disabled else "/dev/null"
    output = os.open(log_file, log.FILE_FLAGS, 0o600)
    pid_fd = os.open(pid_file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(pid_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # kept for life: `status` asks for the lock, not for the pid
    except OSError:
        os.write(write_end, b"haineko: runs already\n")
        return 1
    os.ftruncate(pid_fd, 0)
    os.chdir("/")
    for number, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(target, number)
    log.path = log_file

    def ready() -> None:
        pid, urls = os.getpid(), announce(settings, listeners)
        os.write(pid_fd, f"{pid}\n{urls}\n".encode())
        os.write(write_end, f"haineko {__version__} listens at {urls} (pid {pid}, log {log_file})\n".encode())
        os.close(write_end)

    code = Supervisor(settings, listeners).run(ready)
    os.unlink(pid_file)
    return code


def pid_file_path(options: Any) -> str:
    """Return --pid-file, else haineko.pid beside the settings or this file."""
    beside = settings_path(options.config) or os.path.realpath(__file__)
    return os.path.abspath(options.pid_file or os.path.join(os.path.dirname(beside), "haineko.pid"))


def log_path(pid_file: str) -> str:
    return re.sub(r"(\.pid)?$", ".log", pid_file, count=1)


def running_pid(pid_file: str) -> int:
    """Return the pid of the daemon that has the file locked, 0 if none has."""
    import fcntl

    with contextlib.suppress(OSError, ValueError), open(pid_file, encoding="ascii") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)  # a shared lock needs no right to write
        except OSError:
            return int(stream.readline() or 0)  # URLs follow
    return 0


def command_stop(options: Any) -> int:
    """Stop the daemon when all mail in flight is answered."""
    pid_file = pid_file_path(options)
    pid = signal_daemon(pid_file, signal.SIGTERM)
    deadline = time.monotonic() + SHUTDOWN_TIMEOUT + 10
    while running_pid(pid_file):
        if time.monotonic() > deadline:
            raise CommandError(f"pid {pid} does not stop", 1)
        time.sleep(0.05)
    print("haineko: stopped", file=sys.stderr)
    return 0


def command_restart(options: Any) -> int:
    """Stop the daemon and start it."""
    usable_settings(options.config)  # a faulty file must not cost the server that runs
    if running_pid(pid_file_path(options)):
        command_stop(options)
    return command_start(options)


def command_status(options: Any) -> int:
    """Say whether the daemon runs, since when and where it listens."""
    pid_file = pid_file_path(options)
    pid = running_pid(pid_file)
    if not pid:
        print("haineko does not run")
        return 1
    text = f"haineko runs (pid {pid})"
    with contextlib.suppress(OSError), open(pid_file, encoding="ascii") as stream:  # it may stop just now
        urls, log_file = " ".join(stream.read().split()[1:]), log_path(pid_file)
        text += f" since {local_time(os.fstat(stream.fileno()).st_mtime)}"
        text += f", listens at {urls}" if urls else ", starting"
        text += f", log {log_file}" if os.path.exists(log_file) else ""
    print(text)
    return 0


def command_reload(options: Any) -> int:
    """Have the daemon read its settings again."""
    usable_settings(options.config)
    signal_daemon(pid_file_path(options), signal.SIGHUP)
    return 0


def signal_daemon(pid_file: str, number: int) -> int:
    """Send the daemon a signal; return its pid."""
    pid = running_pid(pid_file)
    if not pid:
        raise CommandError("does not run", 1)
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # killed, but its workers still hold the lock for a moment
        pass
    except PermissionError:
        raise CommandError(f"pid {pid} is another user's", 1) from None
    return pid


# -- check and route


def command_check(options: Any) -> int:
    """Print every fault of the settings, or where mail would go."""
    path = settings_path(options.config)
    settings, errors = load_settings(path)
    for error in errors:
        print(error)
    if errors:
        return 1
    route, why = resolve_route("", "", settings)
    count = len(settings.mailertable) + len(settings.sendermt)
    staging = settings.smtpd.staging and f"{settings.smtpd.staging}; "
    more = "; printed" if not path else f"; {count} routes in all" if count > 1 else ""
    print(
        f"{path or 'no settings file'}: fine; {staging}mail goes to {describe_route(route)} ({why}){more}; "
        f"may be written to: {describe_recipients(settings.recipients)}"
        f"{'' if os.geteuid() else '; warning: the server needs no root'}"
    )
    print_warnings(settings)
    return run(run_checks(settings, options))


async def run_checks(settings: Settings, options: Any) -> int:
    """Run the checks that the options ask for, print a line for each step, and return the exit code."""
    sender, selector = parse_address(options.sender or ""), options.selector
    if options.sender and not (sender and sender.domain[0] != "["):
        raise CommandError(f'"{options.sender}" is no mail address of a domain', 2)
    if selector and not DOMAIN.fullmatch(selector):
        raise CommandError(f'"{selector}" is no selector', 2)
    domain, transport, failed = sender.domain if sender else "", TransportContext(settings.smtpd.resolver), False
    probes = connectivity_probes(settings, domain) if options.connect else ()
    checks = [(name, run_probe(probe, transport)) for name, probe in probes]
    if domain:
        checks.append((domain, check_sender_domain(domain.lower(), selector, transport.resolver, settings.dkim)))
    for name, check in checks:
        for step, ok, text in await check:
            failed = failed or not ok
            print(sanitize(f"{name}: {step}: {'' if ok else 'FAILED: '}{text}", 2000), flush=True)
    return int(failed)


async def run_probe(probe: ConnectivityProbe, transport: TransportContext) -> list:
    """Return the results of fetching a route's access token, and of its probe, whatever it raises."""
    route, results, step = probe.route, [], "TOKEN"
    try:
        if route.oauth2:
            token = await transport.tokens.token_for(route)
            route = replace(route, credentials=(route.credentials[0], token.text))
            text = f"ends in {int(token.expires - time.monotonic())} s, scope {token.scope or 'not told'}"
            results.append(CheckResult(step, True, text))
        step = ""
        return results + await route.row.probe(probe._replace(route=route), transport)
    except Rejected as rejected:
        return [*results, failed_step(step or rejected.reply.command, rejected.reply)]
    except OSError as error:
        return [*results, CheckResult("CONN", False, error_text(error))]


def connectivity_probes(settings: Settings, domain: str) -> list:
    """Return (path in the settings, probe) of every route; `domain` is probed where the route is for many domains."""
    probes = []
    for table in ("mailertable", "sendermt"):
        for key, route in getattr(settings, table).items():
            named = table == "mailertable" and key != "default" and not key.startswith(".")
            for i, choice in enumerate(route.choices):
                place = f"{table}.{key}[{i}]" if route.fallbacks else f"{table}.{key}"
                probes.append((place, ConnectivityProbe(choice, settings.hostname, key if named else domain)))
    if "default" not in {**settings.mailertable, **settings.sendermt}:
        probes.append(("no route", ConnectivityProbe(FALLBACK_ROUTE, settings.hostname)))
    return probes


async def check_sender_domain(domain: str, selector: str | None, resolver: Resolver, keys: dict) -> list:
    """Check what large receivers read in DNS of a sender's domain: SPF, DKIM and DMARC records."""

    async def texts(name: str) -> tuple:
        found = await resolver.lookup(name, TXT, time.monotonic() + Resolver.QUERY_TIMEOUT * Resolver.ATTEMPTS)
        if found.code == SERVFAIL:
            raise ValueError(f"{REPLIES['dns'][-1]}: {name}: {found.why}")
        return found.values

    async def result(step: str, check: Any) -> CheckResult:
        try:
            return CheckResult(step, True, await check)
        except ValueError as error:
            return CheckResult(step, False, str(error))

    return [
        await result("SPF", check_spf(domain, texts)),
        await result("DKIM", check_dkim(domain, selector, keys, texts)),
        await result("DMARC", check_dmarc(domain, texts)),
    ]


async def check_spf(domain: str, texts: Callable) -> str:
    """Describe the domain's SPF record; ValueError says why receivers refuse by it (RFC 7208)."""
    record = spf_record(domain, await texts(domain))
    if record.lower().split()[1:2] == ["-all"]:
        raise ValueError(f"{domain}: v=spf1 -all says that the domain sends no mail at all")
    lookups, records, seen = 0, [record], {domain}
    for text in records:  # included ones are appended
        for mechanism, name in re.findall(SPF_LOOKUP, text):
            lookups += 1
            if lookups > MAX_SPF_LOOKUPS:
                raise ValueError(f"{domain}: more than {MAX_SPF_LOOKUPS} look-ups (RFC 7208 4.6.4): receivers refuse")
            inner = name.lower()
            if mechanism.lower() in ("include:", "redirect=") and "%" not in inner and inner not in seen:
                seen.add(inner)
                records.append(spf_record(f"{domain}: {mechanism}{name}", await texts(inner)))
    return f"{sanitize(record)} ({lookups} of {MAX_SPF_LOOKUPS} look-ups)"


def spf_record(where: str, texts: tuple) -> str:
    """Return the one valid SPF record among TXT records."""
    records = [text for text in texts if re.match(r"(?i)v=spf1(?:\s|$)", text)]
    if len(records) != 1:
        raise ValueError(f"{where}: {'two SPF records: neither counts' if records else 'no SPF record'}")
    for term in records[0].split()[1:]:
        if not re.fullmatch(SPF_TERM, term):
            raise ValueError(f'{where}: "{sanitize(term, 80)}" is no term of SPF: the record does not count')
        if term.lower() in ("all", "+all"):
            raise ValueError(f"{where}: +all lets everybody send in its name: receivers treat it as spam")
    return records[0]


MAX_SPF_LOOKUPS = 10  # RFC 7208 4.6.4
SPF_LOOKUP = r"(?i)(?<=\s)[+?~-]?(include:|redirect=|exists:|(?:a|mx|ptr)(?![^\s:/]):?)([^\s/]*)"
SPF_TERM = (
    r"(?i)[+?~-]?(?:all|include:\S+|exists:\S+|(?:a|mx)(?::[^\s/]+)?(?:/\d+)?(?://\d+)?|ptr(?::\S+)?"
    r"|ip4:[\d.]+(?:/\d+)?|ip6:[\da-f:.]+(?:/\d+)?)|[a-z][\w.-]*=\S*"
)


async def check_dkim(domain: str, selector: str | None, keys: dict, texts: Callable) -> str:
    """Describe the DKIM key of that selector, or of the one in the settings; ValueError says why it is of no use."""
    own = find_dkim_key(domain, keys)
    if own and selector in (None, own.selector):
        domain, selector = own.domain, own.selector
    elif selector:
        own = None
    else:
        return "not looked at; --selector names the key"
    name = f"{selector}._domainkey.{domain}"
    records = await texts(name)
    try:
        return f"{name}: {dkim_key(records, own)}"
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def dkim_key(texts: tuple, own: DkimKey | None) -> str:
    """Describe the public key in the TXT records of a selector, which must be that of `own`, a key of the settings."""
    if len(texts) != 1:
        raise ValueError("more than one record: none counts" if texts else "no key: signatures can't be verified")
    tags = parse_tags(texts[0])
    if tags.get("v", "DKIM1") != "DKIM1" or "p" not in tags:
        raise ValueError("not a DKIM key")
    public = re.sub(r"\s", "", tags["p"])
    if not public:
        raise ValueError("the key is revoked (p= is empty)")
    if own and public != parse_tags(dkim_record(own))["p"]:
        raise ValueError(f"not the key of the settings, which `haineko.py dkim {own.domain}` prints")
    try:
        key = base64.b64decode(public, validate=True)
    except ValueError:
        raise ValueError("the key is no base64") from None
    is_ed25519 = tags.get("k", "rsa") == "ed25519"
    if is_ed25519 and len(key) != 32:
        raise ValueError("an ed25519 key has 32 octets")
    if own:
        info = PrivateKey.ED25519_INFO + key if is_ed25519 else key
        if not PrivateKey.verify(info, b"Haineko", own.private.sign(b"Haineko")):
            raise ValueError("a signature of ours is not valid by this key")
    if is_ed25519:
        return "ed25519"
    bits = rsa_bits(key)
    if bits < 1024:
        raise ValueError(f"RSA key of {bits or 'unknown'} bits: receivers want 1024 at least (RFC 8301)")
    return f"RSA, {bits} bits" + "; t=y: under test, so a failure counts as no signature" * ("y" in tags.get("t", ""))


async def check_dmarc(domain: str, texts: Callable) -> str:
    """Describe the DMARC policy of the domain or of one above it; ValueError says why it does not count (RFC 7489)."""
    labels = domain.split(".")
    for i in range(max(len(labels) - 1, 1)):
        name = "_dmarc." + ".".join(labels[i:])
        records = [text for text in await texts(name) if re.match(r"v=DMARC1\s*(?:;|$)", text)]
        if len(records) > 1:
            raise ValueError(f"{name}: more than one record: none counts")
        if records:
            tags = parse_tags(records[0])
            policy = tags.get("sp", tags.get("p", "")) if i else tags.get("p", "")
            if policy.lower() not in ("none", "quarantine", "reject"):
                raise ValueError(f"{name}: p= names no policy: it does not count")
            return f"{name}: {sanitize(records[0])}"
    raise ValueError(f"_dmarc.{domain}: no DMARC record: Gmail, Yahoo and Outlook refuse bulk mail without")


def describe_recipients(recipients: Recipients) -> str:
    """Describe the recipients that are permitted, for people."""
    if recipients.open_relay:
        return "everybody"
    names = [*sorted(f"@{domain}" for domain in recipients.domainpart), *sorted(recipients.recipients)]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{', '.join(names[:8])}{more} only (setting recipients)" if names else "nobody (setting recipients)"


def print_warnings(settings: Settings) -> None:
    """Print warnings of settings that are valid but risky."""
    for text in dict.fromkeys([*route_warnings(settings), *server_warnings(settings), *file_warnings(settings)]):
        print(sanitize(f"warning: {text}", 500), file=sys.stderr)


def route_warnings(settings: Settings) -> list:
    found, tables = [], {"mailertable": settings.mailertable, "sendermt": settings.sendermt}
    for where, route in [(f"{table}.{key}", route) for table in tables for key, route in tables[table].items()]:
        if re.search(r"(?:\A|\.)example(?:\.(?:com|net|org))?\Z", route.host):
            found.append(f"{where}.host: {route.host} is an example")
        if route.relay == "ESMTP" and not (route.starttls or route.port == SMTPS or is_loopback(route.host)):
            found.append(f"{where}.starttls: mail goes to {route.host} without TLS")
        for key, value in zip(("username", "password"), route.credentials if route.auth else ()):
            if not value and key in route.row.login and not (route.oauth2 and key == "password"):
                found.append(f"authinfo.{route.auth}.{key}: is empty")
    return found


def server_warnings(settings: Settings) -> list:
    httpd, recipients, found = settings.httpd, settings.recipients, []
    for address in () if httpd.tls or httpd.trusted_proxies.texts else httpd.listen:
        if not (address.startswith("unix:") or is_loopback(address.rpartition(":")[0].strip("[]"))):
            found.append(
                f"httpd.listen: {address} takes mail from other machines without TLS; set tls or trusted_proxies"
            )
    found += risk_warnings(settings)
    named = recipients.open_relay or recipients.recipients or recipients.domainpart - {settings.hostname.lower()}
    if not named and resolve_route("", "", settings)[0].relay not in ("Screen", "Discard", "File"):
        found.append(f"recipients: only addresses at {settings.hostname} may be written to")
    old = sorted(user for user, login in settings.password.logins.items() if login.hash.startswith("{SSHA}"))
    return found + [
        f"password.{user}: {{SSHA}} is quick to guess; `haineko.py pw` prints a better line" for user in old
    ]


def risk_warnings(settings: Settings) -> list:
    """Return warnings of what lets strangers use the server or learn a secret; the start tells them too."""
    relayhosts, found = settings.relayhosts, []
    networks = [ipaddress.ip_network(text, strict=False) for text in relayhosts.relayhosts.texts]
    from_outside = relayhosts.open_relay or not all(network.is_loopback for network in networks)
    if settings.recipients.open_relay and from_outside and not settings.password.logins:
        found.append("recipients.open-relay: other machines (relayhosts) may write to everybody without a login")
    for text in settings.httpd.trusted_proxies.texts:
        if not ipaddress.ip_network(text, strict=False).prefixlen:
            found.append(f"httpd.trusted_proxies: {text} lets every client say that it has any address")
    for table, routes in (("mailertable", settings.mailertable), ("sendermt", settings.sendermt)):
        for key, route in routes.items():
            for i, choice in enumerate(route.choices):
                if choice.auth and not choice.tls_verify:
                    where = f"{table}.{key}[{i}]" if route.fallbacks else f"{table}.{key}"
                    words = f"whoever is in between can read the secret of authinfo.{choice.auth}"
                    found.append(f"{where}.tls_verify: {words}")
    return found


def is_loopback(host: str) -> bool:
    return host == "localhost" or (is_ip(host) and parse_ip(host) in LOOPBACK)


def file_warnings(settings: Settings) -> list:
    """Return warnings of files that another user could change, and of a queue that a restart or a network may lose."""
    found, files = [], [path for path, _ in settings.files]
    files += [settings.queue.path] if settings.queue else []
    for path in dict.fromkeys([*files, *map(os.path.dirname, files)]):
        with contextlib.suppress(OSError):
            about = os.stat(path)
            sticky = stat.S_ISDIR(about.st_mode) and about.st_mode & stat.S_ISVTX
            if about.st_mode & 0o022 and not sticky:
                found.append(f"{path} can be changed by other users; chmod go-w {path}")
            if about.st_uid not in (0, os.geteuid()) and os.geteuid():
                found.append(f"{path} belongs to another user")
    kind = file_system(settings.queue.path) if settings.queue else ""
    volatile = re.fullmatch(r"tmpfs|ramfs|nfs\d?|cifs|smb3|fuse\.sshfs|9p", kind)
    return [*found, f"queue.path: {kind} is no file system of a disk of this machine"] if volatile else found


def file_system(path: str) -> str:
    """Return the type of the file system that a path is on, "" if unknown."""
    mounts, folder = {"/": ""}, os.path.realpath(path)
    with contextlib.suppress(OSError), open("/proc/mounts", encoding="utf-8", errors="replace") as stream:
        mounts.update([line.split(" ")[1:3] for line in stream])
    while folder not in mounts:
        folder = os.path.dirname(folder)
    return mounts[folder]


def command_route(options: Any) -> int:
    """Say which relay a recipient would take and why."""
    return print_route(options.address, options.sender or "", usable_settings(options.config))


def print_route(address: str, sender_address: str, settings: Settings) -> int:
    """Print the route of a recipient; return 1 if the recipient is refused."""
    to, sender = parse_address(address), parse_address(sender_address)
    if not to or (sender_address and not sender):
        raise CommandError(f'"{sender_address if to else address}" is no mail address', 2)
    refusal = check_recipient(to, settings)
    route, why = resolve_route(to.domain, sender.domain if sender else "", settings)
    print(f"{address}: {describe_route(route)} ({why})")
    if refusal:
        print(f"{address}: would be refused: {refusal.code} {refusal.dsn} {refusal.message[0]}")
    return 1 if refusal else 0


def command_dkim(options: Any) -> int:
    """Print the TXT record of a domain's key as a line of a zone file, in strings of at most 255 octets."""
    keys = usable_settings(options.config).dkim
    key = keys.get(domain_key(options.domain))
    if not key:
        raise CommandError(f'"{options.domain}" is not in dkim{did_you_mean(options.domain, keys)}', 1)
    strings = '" "'.join(re.findall(".{1,255}", dkim_record(key)))
    print(f'{key.selector}._domainkey.{key.domain}. IN TXT "{strings}"')
    return 0


# -- send


def command_send(options: Any) -> int:
    """Post a mail to a running Haineko."""
    body, credentials = submission_from_options(options), ()
    if options.user:
        remote = re.match(r"(?i)http://(?!(?:localhost|127\.[\d.]+|\[::1\])(?:[:/]|\Z))", options.url)
        if remote and not options.insecure:
            raise CommandError(f"{options.url}: the password would go over the network in clear text (--insecure)", 2)
        credentials = options.user, os.environ.get("HAINEKO_PASSWORD") or ask_password(f"Password of {options.user}: ")
    document = post_submission(options.url, body, credentials)[1]
    print(terminal_json(json.dumps(document, ensure_ascii=False, indent=2)))
    return int(not document["response"] or any(item["error"] for item in document["response"]))


def post_submission(url: str, body: bytes, credentials: tuple = ()) -> tuple:
    """Post a submission to a Haineko at an http, https or unix URL; return (HTTP status, document)."""
    base = "http://localhost" if url.startswith("unix:/") else re.sub(r"(/submit)?/?\Z", "", url, count=1)
    if not parse_base_url(base, "", []):
        raise CommandError(f'"{url}" is no URL of a Haineko', 2)
    connection = KeepAliveConnection(HTTPTarget(base, 300, max_response=MAX_BODY))
    try:
        if url.startswith("unix:"):
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.connect(url[5:])
        with contextlib.closing(connection):
            response = connection.exchange(HTTPRequest("POST", "/submit", body, basic_auth_header(credentials)))
    except Rejected as error:
        raise CommandError(f"{url}: {': '.join(error.reply.message)}", 1) from None
    except OSError as error:
        raise CommandError(f"{url}: {error.strerror}", 1) from None
    document = response.document()
    if not is_answer(document):
        raise CommandError(f"{url}: not a Haineko's answer: {sanitize(response.body.decode('utf-8', 'replace'))}", 1)
    return response.status, document


def is_answer(document: Any) -> bool:
    """Return True if a JSON value is a Haineko's answer to a submission."""
    try:
        keys = {"rcpt", "error", "code", "dsn", "command", "message", "mailer"}
        return all(keys <= item.keys() and isinstance(item["message"], list) for item in document["response"])
    except (KeyError, TypeError, AttributeError):
        return False


def terminal_json(text: str) -> str:
    """Escape in JSON what a terminal would obey or can't show."""
    return re.sub(r"[^\n -~]", lambda found: found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1], text)


def submission_from_options(options: Any) -> bytes:
    """Return the JSON of a submission: from a file, from stdin, or made from flags."""
    header = {"subject": options.subject or "", "from": options.header_from, "replyto": options.reply_to}
    header["charset"] = options.charset
    flags = (options.to, options.sender, *header.values(), options.body, options.html, options.attach)
    if any(flags) and (options.file or not options.to):
        raise CommandError("flags that say what to send want --to, and no FILE, which says all of it", 2)
    if not options.to:
        return read_bytes(options.file or "-")
    attachments = [(os.path.basename(path), base64.b64encode(read_bytes(path)).decode()) for path in options.attach]
    document = {
        "mail": options.sender or default_sender(local_hostname()),
        "rcpt": options.to,
        "header": header,
        "body": read_utf8("-") if options.body is None and not options.html else options.body,
        "html": read_utf8(options.html) if options.html else None,
        "attachments": [{"filename": name, "content": content} for name, content in attachments],
    }
    return encode_json(document)


def read_utf8(path: str) -> str:
    return read_bytes(path).decode("utf-8", "replace")


def read_bytes(path: str) -> bytes:
    """Read a file; "-" is stdin."""
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as stream:
            return stream.read()
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}", 2) from None


def ask_password(prompt: str) -> str:
    """Ask for a password on the terminal: everybody can read a command line."""
    import getpass

    try:
        with open("/dev/tty"):  # without a terminal, getpass() would read the mail on stdin
            return getpass.getpass(prompt)
    except OSError:
        raise CommandError("there is no terminal to ask for the password", 1) from None
    except (EOFError, UnicodeError):
        raise CommandError("no password", 1) from None


# -- queue


def command_queue(options: Any) -> int:
    """List the mail that waits; show one, try it now, or drop it."""
    settings = usable_settings(options.config).queue  # the file itself is used, with the server running or not
    if not settings:
        raise CommandError('the settings have no "queue"', 2)
    wanted = options.action in ("show", "drop") or (options.action == "retry" and not options.all)
    if wanted != bool(options.id):
        raise CommandError(f"queue {options.action}: a queue id is {'wanted' if wanted else 'not wanted'}", 2)
    if not os.path.exists(settings.path):
        raise CommandError(f"{settings.path}: does not exist; nothing was ever queued", 1)
    return QUEUE_ACTIONS[options.action](QueueDB(settings), options.id, options.json)


def run_operation(store: QueueDB, operation: Callable, *values: Any) -> Any:
    """Return the result of an operation on the queue's file."""
    (result,) = store.commit([(operation, values)])
    if isinstance(result, Rejected):
        raise CommandError(store.fault or result.reply.message[0], 1)
    return result


def queue_list(store: QueueDB, _: str, as_json: bool = False) -> int:
    last, count = 0, 0
    if not as_json:
        print(f"{'QUEUE ID':16}  {'SIZE':>9}  {'ARRIVED':25}  {'NEXT ATTEMPT':30}  SENDER -> RECIPIENT  LAST REPLY")
    while rows := run_operation(store, open_recipients_after, last, 500):  # in parts: the server works on meanwhile
        for row in rows:
            print(
                f"{',' if count else '['}\n{queue_row_json(row)}" if as_json else queue_row(row),
                end="" if as_json else "\n",
            )
            count += 1
        last = rows[-1]["id"]
    print(("\n]" if count else "[]") if as_json else f"{count} recipient{'s' * (count != 1)}")
    return 0


def queue_row(row: Any) -> str:
    """Return a recipient in the queue as a line of a table."""
    due, attempts = row["due"], parse_history(row["history"])
    when = row["state"] if due is None else local_time(max(due, row["created_at"]))
    words = reply_line(attempts[-1].reply) if attempts else ""
    envelope = f"<{row['sender']}> -> <{row['recipient']}>"
    came = local_time(row["created_at"])
    return f"{row['queueid']}  {row['size']:>9}  {came}  next {when:25}  {envelope}  {words}"


def queue_row_json(row: Any) -> str:
    attempts = parse_history(row["history"])
    reply = reply_to_dict(row["recipient"], attempts[-1].reply) if attempts else None
    values = {key: row[key] for key in ("queueid", "size", "state", "sender", "recipient")}
    times = {"arrived": time_to_dict(row["created_at"]), "next": time_to_dict(row["due"])}
    return json.dumps({**values, **times, "attempts": len(attempts), "response": reply}, ensure_ascii=False)


def local_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(seconds))


def reply_line(reply: Reply) -> str:
    return sanitize(f"{reply.code} {' '.join(reply.message)}", 500)


def queue_show(store: QueueDB, queueid: str, as_json: bool = False) -> int:
    found = run_operation(store, message_status, queueid)
    if not found:
        raise CommandError(f"{sanitize(queueid)}: not in the queue", 1)
    if as_json:
        print(json.dumps(message_document(found), ensure_ascii=False, indent=2))
        return 0
    print(f"{queueid}  {found['size']} octets  arrived {local_time(found['created_at'])}\nfrom <{found['sender']}>")
    for row in found["recipients"]:
        due = row["due"]
        when = "" if due is None else f", next attempt {local_time(max(due, found['created_at']))}"
        print(f"to <{sanitize(row['as_written'])}>: {row['state']}{when}")
        for attempt in parse_history(row["history"]):
            print(f"   {local_time(attempt.time)}  {attempt.reply.relay}: {reply_line(attempt.reply)}")
    return 0


def queue_retry(store: QueueDB, queueid: str | None, _: bool = False) -> int:
    return print_count(run_operation(store, flush_queue, queueid), "to be tried at once", not queueid)


def queue_drop(store: QueueDB, queueid: str, _: bool = False) -> int:
    return print_count(run_operation(store, drop_message, queueid, time.time()), "dropped", False)


def print_count(count: int, what: str, fine: bool) -> int:
    print(f"{count} recipient{'s' * (count != 1)} {what}")
    return 0 if count or fine else 1


QUEUE_ACTIONS = {"list": queue_list, "show": queue_show, "retry": queue_retry, "drop": queue_drop, "flush": queue_retry}


# -- pw and setup


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
    print(f"{json.dumps(options.user or user_name(), ensure_ascii=False)}: {json.dumps(hash_password(password))}")
    return 0


def command_key(options: Any) -> int:
    """Make an API key: print it, and its line for the section `password`."""
    fences = {"senders": options.sender, "recipients": options.recipient}
    limits = {"rate": options.rate, "expires": options.expires}
    key, errors = new_key(options.prefix), []
    login = {"hash": key_hash(key), **{name: value for name, value in {**fences, **limits}.items() if value}}
    mapping_of(parse_login)({options.name: login}, "password", errors)
    matching(KEY_PREFIX, "letters, digits, - and _")(options.prefix, "--prefix", errors)
    if errors:
        raise CommandError("; ".join(errors), 2)
    print(key)
    print(f"{json.dumps(options.name, ensure_ascii=False)}: {json.dumps(login, ensure_ascii=False)}")
    return 0


KEY_PREFIX = re.compile("[A-Za-z0-9_-]{1,20}")


def user_name() -> str:
    """Return the name of the user who runs this; in a container there may be a number only."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid{os.getuid()}"


def command_setup(options: Any) -> int:
    """Write haineko.json, units for systemd and with --sendmail a program, never over an existing file."""
    import py_compile

    program, folder, code = os.path.realpath(__file__), os.path.abspath(options.dest), 0
    values, settings = (
        {"python": sys.executable, "program": os.path.dirname(program), "folder": folder},
        example_settings(),
    )
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
            code = print_error(f"{path}: {error.strerror}", 1)
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
TimeoutStopSec=40
LimitNOFILE=65536
# then the settings may have: "password": {{"file": "/run/credentials/haineko.service/relay"}}
#LoadCredential=relay:{folder}/relay.secret
UMask=0077
# for ports below 1024 this, and no PrivateUsers: AmbientCapabilities=CAP_NET_BIND_SERVICE
CapabilityBoundingSet=
PrivateUsers=yes
NoNewPrivileges=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectSystem=strict
ProtectHome=read-only
ProtectProc=invisible
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RemoveIPC=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""
SYSTEMD_SOCKET = """\
# optional: systemd listens, in place of httpd.listen, and no connection is refused during a restart
[Unit]
Description=Socket of Haineko

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


# -- sendmail


def command_sendmail(argv: list) -> int:
    """Relay the message on stdin, like /usr/sbin/sendmail."""
    import getopt

    try:
        argv = [f"{word} " if word == "-q" else word for word in argv]  # getopt knows no optional value
        pairs, addresses = getopt.gnu_getopt(argv, "A:B:C:F:GIL:N:O:R:UV:X:ab:ce:f:h:imno:p:q:r:tvx")
        flags = {**dict(pairs), "-o": [value for flag, value in pairs if flag == "-o"]}
        sends = "-q" not in flags or "-t" in flags or addresses
        mode = "i" if "-I" in flags else flags.get("-b", "m" if sends else "q")
        if mode not in SENDMAIL_MODES:
            raise CommandError(f"usage: -b{mode} is not served here; `haineko.py serve` runs the server", os.EX_USAGE)
        return SENDMAIL_MODES[mode](flags, addresses)
    except getopt.GetoptError as error:
        return print_error(f"usage: {error}", os.EX_USAGE)
    except CommandError as error:
        text, code = error.args
        return print_error(text, {1: os.EX_TEMPFAIL, 2: os.EX_CONFIG}.get(code, code))


def print_error(text: str, code: int) -> int:
    print(f"haineko: {text}", file=sys.stderr)
    return code


def sendmail_deliver(flags: dict, addresses: list) -> int:
    """Relay the message on stdin: by its own settings, or if it can't read them, by the server that runs."""
    settings, urls = sendmail_settings(flags)
    octets = read_bytes("-")
    if "-i" not in flags and "i" not in flags["-o"]:
        octets = re.split(rb"(?m)^\.\r?$", octets, maxsplit=1)[0]
    sender = sendmail_sender(flags, settings)
    try:
        message = parse_message(octets)
    except ValueError as error:
        raise CommandError(str(error), os.EX_DATAERR) from None
    fields = [qualified_field(name, field, settings.hostname) for name, field in message.fields]
    rcpt = named_recipients(addresses, recipient_fields(fields) if "-t" in flags else [], settings)
    if not rcpt:
        raise CommandError("usage: no recipient", os.EX_USAGE)
    if "from" not in dict(fields):
        author = parse_address(sender or f"MAILER-DAEMON@{settings.hostname}")
        name = " ".join(flags.get("-F", "").split())
        fields.append(("from", address_field("From", ((name, author),), "UTF-8").encode() + b"\n"))
    raw = b"".join([field for _, field in fields]) + b"\n" + message.body
    document = {"mail": sender, "rcpt": rcpt, "raw": {"base64": base64.b64encode(raw).decode()}}
    if urls:
        document["mail"] = sender or default_sender(settings.hostname)  # the API takes no null sender
        return report_failures(*post_in_parts(urls, document))
    response = run(submit_here(encode_json(document), settings, dsn_options(flags)))
    return report_failures(response.status, json.loads(response.body)["response"])


def sendmail_settings(flags: dict) -> tuple:
    """Return (Settings, URLs of the server to post to: none if the settings and the queue can be used directly)."""
    path = settings_path(flags.get("-C"))
    if not path and "HAINEKO_URL" not in os.environ:  # without, `serve` prints mail, and so loses it
        raise CommandError("no settings file: name one with -C or in $HAINEKO_CONF", os.EX_CONFIG)
    settings, errors = load_settings(path)
    if not settings.hostname:
        settings = replace(settings, smtpd=replace(settings.smtpd, hostname=local_hostname()))
    store = settings.queue.path if settings.queue else ""
    unwritable = store and not os.access(store if os.path.exists(store) else os.path.dirname(store), os.W_OK)
    if not path or unwritable or any(os.strerror(errno.EACCES) in error for error in errors):
        return settings, server_urls(settings, path)
    if errors:
        raise CommandError("\n".join(errors), os.EX_CONFIG)
    return settings, ()


def server_urls(settings: Settings, path: str | None) -> list:
    """Return where a server may listen: $HAINEKO_URL, what `start` wrote into the pid file, the settings' addresses."""
    if "HAINEKO_URL" in os.environ or not path:
        return [os.environ["HAINEKO_URL"]]
    urls = []
    with contextlib.suppress(OSError), open(os.path.join(os.path.dirname(path), "haineko.pid")) as stream:
        urls = stream.read().split()[1:]
    scheme = "https" if settings.httpd.tls else "http"
    for address in settings.httpd.listen:
        host, _, port = address.rpartition(":")
        host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
        urls.append(address if address.startswith("unix:") else f"{scheme}://{host}:{port}/")
    return urls


def post_in_parts(urls: list, document: dict) -> tuple:
    """Post a mail to the first server that answers, in parts if it has too many recipients for the server; return
    (status, items of the answers)."""
    for url in urls:
        try:
            status, answer = post_submission(url, encode_json(document))
            break
        except CommandError as error:
            print_error(error.args[0], 0)
    else:
        raise CommandError("the settings or the queue can't be read, and no server was reached", os.EX_TEMPFAIL)
    rcpt, items = document["rcpt"], answer["response"]
    if items[0]["mailer"] or items[0]["dsn"] != "4.5.3" or len(rcpt) == 1:
        return status, items
    half = len(rcpt) // 2
    parts = [post_in_parts([url], {**document, "rcpt": part}) for part in (rcpt[:half], rcpt[half:])]
    return max(status for status, _ in parts), [item for _, items in parts for item in items]


async def submit_here(body: bytes, settings: Settings, dsn: tuple) -> Response:
    """Submit a mail without a server, as POST /submit does; the log goes to syslog or nowhere."""
    owner = os.stat(settings.path)
    if not os.geteuid() and owner.st_uid:  # the server could not use a queue that belongs to root
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)
    smtpd = replace(settings.smtpd, max_rcpts_per_message=0)
    app = App(replace(settings, httpd=Httpd(), smtpd=smtpd, password=Authenticator({})))
    log.quiet = log.facility is None  # stderr is read by the calling program, which may mail it
    client = parse_ip("127.0.0.1")
    request = Request("POST", "/submit", {}, body, client, None, None, time.time(), login=f"uid{os.getuid()}", dsn=dsn)
    try:
        return await submit(request, app)
    finally:
        await app.transport.sweep(everything=True)


def report_failures(status: int, items: list) -> int:
    """Print the recipients that failed; return the exit code."""
    failed = [item for item in items if item["error"]]
    for item in failed:
        to = f"<{item['rcpt']}>: " if item["rcpt"] is not None else ""
        print_error(f"{to}{item['code']} {item['command']}: {sanitize(' '.join(item['message']), 1000)}", 0)
    codes = {sendmail_code(status, item) for item in failed}
    if len(failed) < len(items) and os.EX_TEMPFAIL in codes:
        return os.EX_UNAVAILABLE  # "try again" would send it twice to the others
    order = (os.EX_TEMPFAIL, os.EX_UNAVAILABLE, os.EX_NOPERM, os.EX_DATAERR)
    return next((code for code in order if code in codes), os.EX_OK)


def sendmail_code(status: int, item: dict) -> int:
    """Return the exit code (sysexits.h) for a recipient's reply, or for the refusal of the whole mail."""
    if item["mailer"] or item["dsn"] == "5.4.6":
        return os.EX_TEMPFAIL if item["code"][0] == "4" and item["dsn"] != "5.4.6" else os.EX_UNAVAILABLE
    if item["rcpt"] is not None:
        return os.EX_DATAERR if item["dsn"] == "5.1.5" else os.EX_NOPERM  # 5.1.5: not an address
    codes = {400: os.EX_DATAERR, 401: os.EX_NOPERM, 403: os.EX_NOPERM, 413: os.EX_DATAERR}
    return codes.get(status, os.EX_TEMPFAIL)


def sendmail_sender(flags: dict, settings: Settings) -> str:
    """Return the envelope sender: of -f or -r, else the user's address; "" is the null sender."""
    given = flags.get("-f", flags.get("-r"))
    if given is None:
        return default_sender(settings.hostname)
    if given.strip() in ("", "<>"):
        return ""
    found = split_addresses(given, settings.hostname)
    if len(found) != 1 or not parse_address(found[0]):
        raise CommandError(f'usage: "{given}" is no mail address', os.EX_USAGE)
    return found[0]


def default_sender(hostname: str) -> str:
    """Return the address of the user who runs this, valid whatever $LOGNAME is."""
    name = user_name()
    if parse_address(name):
        return name
    name = re.sub(r"[^A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]+", "_", name.rpartition("\\")[2])
    name = re.sub(r"\.+", ".", name)[:64].strip("._") or f"uid{os.getuid()}"
    return f"{name}@{hostname}"


def named_recipients(addresses: list, fields: list, settings: Settings) -> list:
    """Return the recipients in words of a command line and in header fields, each name in smtpd.aliases expanded."""
    named = [address for text in addresses for address in split_addresses(text, settings.hostname)]
    here, found = f"@{settings.hostname.lower()}", []
    for address in [*named, *header_recipients(fields)]:
        name = address[: -len(here)] if address.lower().endswith(here) else ""
        found += settings.smtpd.aliases.get(name.lower(), (address,))
    return found


def split_addresses(text: str, hostname: str) -> list:
    """Return the addresses in a list of them, separated by commas or blanks; text that is no list is returned whole."""
    if re.search(r'[<"(:]', text):
        return header_recipients([("to", b"To: " + qualified(text, hostname).encode("utf-8", "replace"))])
    return [qualified(word, hostname) for word in re.split(r"[\s,;]+", text) if word]


def recipient_fields(fields: list) -> list:
    """Return To, Cc and Bcc, or of a message that is sent again the Resent- ones of its last sending, all as "to"."""
    again: dict = {}
    for name, octets in fields:
        if name in again:  # of an earlier sending
            break
        if name.startswith("resent-"):
            again[name] = octets
    resent = [("to", octets) for name, octets in again.items() if name in ("resent-to", "resent-cc", "resent-bcc")]
    return resent or [("to", octets) for name, octets in fields if name in ("to", "cc", "bcc")]


def qualified_field(name: str, field: bytes, hostname: str) -> tuple:
    """Return (name, field), in which addresses without a domain have got one (RFC 5322 3.4.1)."""
    if not re.fullmatch(r"(resent-)?(from|sender|to|cc|bcc|reply-to)|errors-to|return-receipt-to", name):
        return name, field
    label, colon, value = field.decode("latin-1").partition(":")
    return name, (label + colon + qualified(value, hostname)).encode("latin-1")


def qualified(text: str, hostname: str) -> str:
    """Return an address list in which names alone have got the domain; text that is no list stays as it is."""
    tokens = [(found.lastgroup, found[0]) for found in ADDRESS_TOKEN.finditer(text) if found[0]]
    if "fault" in dict(tokens):
        return text
    texts = [token for _, token in tokens]
    words = [i for i, (kind, _) in enumerate(tokens) if kind not in CFWS]
    for before, i, after in zip([None, *words], words, [*words[1:], None]):
        name = texts[i].strip("<> ") if tokens[i][0] == "angle" else texts[i]
        alone = (before is None or texts[before] in (",", ";", ":")) and (after is None or texts[after] in (",", ";"))
        if re.fullmatch("[A-Za-z0-9._+-]+", name) and (alone or tokens[i][0] == "angle"):
            texts[i] = texts[i].replace(name, f"{name}@{hostname}")
    return "".join(texts)


def dsn_options(flags: dict) -> tuple:
    """Return what -R, -V and -N ask of the next server: parameters of MAIL, and of RCPT (RFC 3461)."""
    ret, notify = flags.get("-R", "full").upper(), flags.get("-N", "failure,delay").upper().replace(" ", "")
    if ret not in ("HDRS", "FULL"):
        raise CommandError(f"usage: -R {flags['-R']}: expected hdrs or full", os.EX_USAGE)
    if notify != "NEVER" and not set(notify.split(",")) <= {"SUCCESS", "FAILURE", "DELAY"}:
        raise CommandError(f"usage: -N {flags['-N']}: expected never, or some of success, failure, delay", os.EX_USAGE)
    envid = re.sub(r"[^!-*,-<>-~]", lambda c: "".join(f"+{b:02X}" for b in c[0].encode()), flags.get("-V", "")[:30])
    return f" RET={ret}{' ENVID=' if envid else ''}{envid}", f" NOTIFY={notify}"


def sendmail_queue(flags: dict, addresses: list) -> int:
    """List the queue, or with -q make what waits due: all, or with -qIQUEUEID one mail."""
    settings = usable_settings(flags.get("-C")).queue
    store = QueueDB(settings) if settings and os.path.exists(settings.path) else None
    if "-b" in flags and not store:
        print("Mail queue is empty")
    elif "-b" in flags:
        return queue_list(store, "")
    elif store:
        which = flags["-q"].strip()
        run_operation(store, flush_queue, which[1:] if which[:1] == "I" else None)
    return os.EX_OK


def sendmail_verify(flags: dict, addresses: list) -> int:
    """Say where mail to the addresses would go."""
    settings, _ = sendmail_settings(flags)
    codes = [print_route(to, "", settings) for to in named_recipients(addresses, [], settings)]
    return os.EX_NOPERM if any(codes) else os.EX_OK


# Modes of -b; -q alone is "q". There is no database of aliases (-bi, -I), and none of hosts (-bh, -bH).
SENDMAIL_MODES = {"m": sendmail_deliver, "p": sendmail_queue, "q": sendmail_queue, "v": sendmail_verify}
SENDMAIL_MODES.update(dict.fromkeys("ihH", lambda flags, addresses: os.EX_OK))


ARGUMENTS = {  # name: what ArgumentParser.add_argument() takes
    "config": (("-c", "--config"), {"metavar": "FILE", "help": "settings file"}),
    "pid-file": (("--pid-file",), {"metavar": "F", "help": "file with the daemon's pid"}),
    "listen": (("--listen",), {"metavar": "ADDR", "help": "host:port, [v6]:port or unix:/path"}),
    "workers": (("--workers",), {"metavar": "N", "type": int, "help": "processes; 0 means one per core"}),
    "devel": (("-d", "--devel"), {"action": "store_true", "help": "print every SMTP dialogue, secrets masked"}),
    "connect": (("--connect",), {"action": "store_true", "help": "try what each route would use; no mail is sent"}),
    "records-of": (("--sender",), {"metavar": "A", "help": "read SPF, DKIM and DMARC records of its domain"}),
    "selector": (("--selector",), {"metavar": "S", "help": "of the sender's DKIM key"}),
    "sender": (("--sender",), {"metavar": "ADDRESS"}),
    "address": (("address",), {"metavar": "ADDRESS"}),
    "domain": (("domain",), {"metavar": "DOMAIN"}),
    "file": (("file",), {"metavar": "FILE", "nargs": "?", "help": "JSON of a submission; - or nothing: stdin"}),
    "url": (("--url",), {"default": "http://127.0.0.1:2794/", "help": "the server's root, or its /submit"}),
    "insecure": (("--insecure",), {"action": "store_true", "help": "log in over http:// too"}),
    "login": (("--user",), {"help": "log in; the password is $HAINEKO_PASSWORD or asked for"}),
    "to": (("--to",), {"action": "append", "metavar": "A", "help": "recipient; again for more"}),
    "mail": (("--mail", "--sender"), {"dest": "sender", "metavar": "A", "help": "envelope sender"}),
    "from": (("--from",), {"dest": "header_from", "metavar": "A", "help": "From"}),
    "reply-to": (("--reply-to",), {"metavar": "A"}),
    "subject": (("--subject",), {"metavar": "S"}),
    "charset": (("--charset",), {"metavar": "C"}),
    "body": (("--body",), {"metavar": "TEXT", "help": "absent, and no --html: stdin"}),
    "html": (("--html",), {"metavar": "FILE", "help": "the mail in HTML, in UTF-8"}),
    "attach": (
        ("--attach",),
        {"action": "append", "default": [], "metavar": "FILE", "help": "a file to attach; again for more"},
    ),
    "-C": (("-C",), {"metavar": "FILE", "help": "settings file"}),
    "-t": (("-t",), {"action": "store_true", "help": "recipients from To, Cc and Bcc too"}),
    "-i": (("-i",), {"action": "store_true", "help": "a line with a dot alone does not end the message"}),
    "-f": (("-f",), {"metavar": "SENDER", "help": "envelope sender"}),
    "addresses": (("address",), {"metavar": "ADDRESS", "nargs": "*"}),
    "action": (("action",), {"nargs": "?", "choices": tuple(QUEUE_ACTIONS), "default": "list"}),
    "id": (("id",), {"metavar": "QUEUEID", "nargs": "?"}),
    "json": (("--json",), {"action": "store_true", "help": "list, show: as JSON"}),
    "all": (("--all",), {"action": "store_true", "help": "retry: all that waits, as flush does"}),
    "user": (("-u", "--user"), {"metavar": "USER"}),
    "name": (("name",), {"metavar": "NAME"}),
    "senders": (("--sender",), {"action": "append", "metavar": "D", "help": "address or domain; again for more"}),
    "recipients": (("--recipient",), {"action": "append", "metavar": "D", "help": "the same of recipients"}),
    "rate": (("--rate",), {"metavar": "R", "help": "recipients/seconds"}),
    "expires": (("--expires",), {"metavar": "T", "help": "ISO 8601 date or time"}),
    "prefix": (("--prefix",), {"metavar": "P", "default": "hk_"}),
    "dest": (("--dest",), {"metavar": "DIR", "required": True}),
    "sendmail": (("--sendmail",), {"metavar": "PATH", "help": "where a sendmail program is to be written"}),
}


class Command(NamedTuple):
    """A row of COMMANDS; the function's docstring is its help."""

    run: Callable  # takes the parsed options, returns the exit code
    arguments: str  # names in ARGUMENTS


COMMANDS = {
    "serve": Command(command_serve, "config listen workers devel"),
    "start": Command(command_start, "config pid-file listen workers"),
    "stop": Command(command_stop, "config pid-file"),
    "restart": Command(command_restart, "config pid-file listen workers"),
    "status": Command(command_status, "config pid-file"),
    "reload": Command(command_reload, "config pid-file"),
    "check": Command(command_check, "config connect records-of selector"),
    "route": Command(command_route, "config address sender"),
    "dkim": Command(command_dkim, "config domain"),
    "send": Command(command_send, "file url login insecure to mail from reply-to subject charset body html attach"),
    "sendmail": Command(command_sendmail, "-C -t -i -f addresses"),
    "queue": Command(command_queue, "config action id all json"),
    "pw": Command(command_pw, "user"),
    "key": Command(command_key, "name senders recipients rate expires prefix"),
    "setup": Command(command_setup, "dest sendmail"),
}

if __name__ == "__main__":
    link = ["sendmail"] if os.path.basename(sys.argv[0]) == "sendmail" else []
    sys.exit(main([*link, *sys.argv[1:]]))
