"""The tests of haineko.py: one class per section of it, in the same order, after the rules of the house.

A test is a table of cases (what it is, input, wanted) and one loop. Peers are real: sockets, processes, files. Clock
and chance are arguments there, so nothing is patched here. Run with `python3 -m unittest`; standard library only.
"""

from __future__ import annotations

import ast
import base64
import email
import email.policy
import email.utils
import hashlib
import importlib.util
import ipaddress
import itertools
import json
import os
import re
import select
import shutil
import signal
import socket
import statistics
import subprocess
import symtable
import sys
import sysconfig
import tempfile
import time
import traceback
import unittest
import urllib.request
from dataclasses import fields

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

import haineko  # noqa: E402

SOURCE = os.path.join(HERE, "haineko.py")
NOW = 1388741758.0
NAME = "relay.example.org"  # of the Haineko under test


def settings(**sections) -> haineko.Settings:
    """Settings as from a file: everybody may be written to and nothing goes out, unless the sections say otherwise."""
    sections = {
        "smtpd": {"hostname": NAME},
        "recipients": {"open-relay": 1},
        "mailertable": {"default": {"mailer": "Discard"}},
        **sections,
    }
    faults: list = []
    found = haineko.read(haineko.Settings, json.loads(json.dumps(sections)), "", faults)
    found, faults = haineko.settled(found, faults)
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
    place = haineko.plain_address(client)
    return haineko.Request("POST", "/submit", headers, body, place, place, 50320, NOW)


def posted(submission, force: haineko.Settings | None = None, client: str = "127.0.0.1") -> tuple:
    """(HTTP status, document) of a submission given to submit()."""
    answer = haineko.run(haineko.submit(request(as_body(submission), client), haineko.Service(force or settings())))
    return answer.status, json.loads(answer.body)


def over_http(octets: bytes, force: haineko.Settings, client: str = "127.0.0.1") -> tuple:
    """(HTTP status, document) of one request written to a connection of that client."""
    here, there = socket.socketpair()
    with here:
        here.sendall(octets)
        here.shutdown(socket.SHUT_WR)
        there.setblocking(False)
        worker = haineko.Worker([], force, here)
        connection = haineko.Connection(there, (client, 50320), worker)
        worker.connections.add(connection)
        worker.loop.spawn(connection.handle())
        deadline = time.monotonic() + 10
        while connection in worker.connections and time.monotonic() < deadline:
            worker.loop.turn()
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


# ======================================================================================================================
# The house
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


class HouseRules(unittest.TestCase):
    """The rules that the front page of haineko.py gives itself."""

    @classmethod
    def setUpClass(cls) -> None:
        with open(SOURCE, encoding="utf-8") as stream:
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

    def test_no_closure_deeper_than_one(self):
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        deep = [
            f"{outer.name} > {inner.name} > {innermost.name}"
            for outer in self.house.functions()
            for inner in ast.walk(outer)
            if isinstance(inner, functions) and inner is not outer
            for innermost in ast.walk(inner)
            if isinstance(innermost, functions) and innermost is not inner
        ]
        self.assertEqual(deep, [])

    def test_no_class_has_another_of_this_file_above_it(self):
        classes = [node for node in ast.walk(self.house.tree) if isinstance(node, ast.ClassDef)]
        bases = [(node.name, ast.unparse(base)) for node in classes for base in node.bases]
        self.assertEqual([(name, base) for name, base in bases if base in self.house.names], [])

    def test_nothing_changes_module_state_but_the_log(self):
        self.assertEqual([line for line in self.house.mutations() if " changes log " not in line], [])

    def test_the_rule_on_state_sees_a_breach(self):
        for line in ("T['a'] = 1", "T.update(a=1)", "T['a'].b = 1", "del T['a']", "global T"):
            with self.subTest(line):
                self.assertEqual(len(House(f"T = {{}}\ndef f():\n    {line}\n").mutations()), 1)

    def test_every_reply_is_given_and_every_given_reply_exists(self):
        given = set()
        for node in ast.walk(self.house.tree):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "reply"
            looked_up = isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == "REPLIES"
            place = node.args[0] if called else node.slice if looked_up else None
            given |= {item.value for item in ast.walk(place or ast.Pass()) if isinstance(item, ast.Constant)}
        self.assertEqual(given, set(haineko.REPLIES))

    def test_every_name_is_used(self):
        used = {node.id for node in ast.walk(self.house.tree) if isinstance(node, ast.Name) and _loads(node)}
        used |= {node.attr for node in ast.walk(self.house.tree) if isinstance(node, ast.Attribute)}
        noted = {
            word
            for node in ast.walk(self.house.tree)
            if isinstance(node, (ast.arg, ast.AnnAssign))
            for word in re.findall(r"\w+", ast.unparse(node.annotation) if node.annotation else "")
        }
        self.assertEqual(sorted(name for name in self.house.names if name not in used | noted | {"MAILERS"}), [])

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

    def test_the_tables_of_relays_are_one(self):
        self.assertEqual(tuple(haineko.RELAYS), haineko.MAILERS)

    def test_the_example_file_is_complete_and_valid(self):
        path = os.path.join(HERE, "haineko.json.example")
        with open(path, encoding="utf-8") as stream:
            written = stream.read()
        self.assertEqual(written, json.dumps(haineko.example(), indent=2) + "\n")
        found, faults = haineko.load(path)
        self.assertEqual(faults, [])
        self.assertEqual(set(json.loads(written)), set(haineko.keys(haineko.Settings)))
        self.assertEqual(found.mailertable["default"].host, "smtp.example.org")
        self.assertEqual(list(found.mailertable), ["default"])

    def test_everything_stands_in_the_readme(self):
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as stream:
            readme = stream.read()
        sections = [haineko.Httpd, haineko.Tls, haineko.Smtpd, haineko.Syslog, haineko.Relayhosts, haineko.Recipients]
        sections += [haineko.Login, haineko.Route, haineko.Header, haineko.Submission]
        wanted = [f"`{name}" for name in (*haineko.COMMANDS, *haineko.RELAYS)]
        wanted += [f"`{method} {path}`" for method, path in haineko.PAGES]
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
        for name in haineko.keys(haineko.Settings):
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
                    command, ("CONN", "EHLO", "STARTTLS", "AUTH", "MAIL", "RCPT", "DATA", "QUEUE", "HTTP", "")
                )
                self.assertTrue(text)
                said = haineko.reply(slug, "more", word="50% of it")
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
                    haineko.decode(octets)
                self.assertIn(words, str(caught.exception))

    def test_what_is_json(self):
        for octets, value in [
            (b"\xef\xbb\xbf{}", {}),
            ('"ねこ"'.encode(), "ねこ"),
            (rb'"\u306d"', "ね"),
            (b" [1] ", [1]),
        ]:
            with self.subTest(octets):
                self.assertEqual(haineko.decode(octets), value)

    def test_keys_that_stand_twice_are_named(self):
        cases = [
            ('{"workers": 1, "workers": 2}', ["httpd.workers: stands more than once"]),
            ('{"workers": 1, "timeout": 9, "workers": 1, "workers": 1}', ["httpd.workers: stands more than once"]),
            ('{"workers": 1, "timeout": 9}', []),
            ('{"tls": {"key": "a", "key": "a"}}', ["httpd.tls.key: stands more than once"]),
        ]
        for text, wanted in cases:
            with self.subTest(text):
                faults: list = []
                haineko.read(haineko.Httpd, haineko.decode(text.encode()), "httpd", faults)
                self.assertEqual(faults, wanted)

    def test_every_fault_is_told_with_its_path(self):
        raw = {"listn": 1, "timeout": 0, "workers": "2", "tls": {"key": 5, "crtificate": "a"}, "max_connections": None}
        faults: list = []
        haineko.read(haineko.Httpd, raw, "httpd", faults)
        self.assertEqual(
            faults,
            [
                'httpd.listn: unknown key; did you mean "listen"?',
                "httpd.timeout: a whole number from 1 to 3600 is wanted, not 0",
                "httpd.workers: a whole number from 0 to 256 is wanted, not 2",
                "httpd.tls.key: a string is wanted, not a number",
                'httpd.tls.crtificate: unknown key; did you mean "certificate"?',
            ],
        )

    def test_an_object_is_wanted(self):
        for raw, kind in [([], "a list"), ("x", "a string"), (1, "a number"), (True, "true or false"), (None, "null")]:
            with self.subTest(kind):
                faults: list = []
                self.assertEqual(haineko.read(haineko.Tls, raw, "", faults).key, "")
                self.assertEqual(faults, [f"the top: an object is wanted, not {kind}"])

    def test_two_keys_that_say_the_same(self):
        faults: list = []
        haineko.read(haineko.Submission, {"rcpt": ["a"], "to": ["b"]}, "", faults)
        self.assertEqual(faults, ["to: says again what another key says already"])
        faults = []
        self.assertEqual(haineko.read(haineko.Submission, {"rcpt": None, "to": "b"}, "", faults).rcpt, ("b",))
        self.assertEqual(faults, [])

    def test_parsers(self):
        number, upper = haineko.number(1, 5), haineko.table_of(haineko.flag, str.upper)
        texts = haineko.list_of(haineko.text)
        wants_flag, wants_number = "w: true or false is wanted, not ", "w: a whole number from 1 to 5 is wanted, not "
        cases = [
            (haineko.text, "ねこ", "ねこ", []),
            (haineko.text, "", "", []),
            (haineko.text, 1, None, ["w: a string is wanted, not a number"]),
            (haineko.text, ["a"], None, ["w: a string is wanted, not a list"]),
            (haineko.text, "a\nb", None, ["w: has a character that can't be printed"]),
            (haineko.text, "a\x1b[2J", None, ["w: has a character that can't be printed"]),
            (haineko.text, "\ud800", None, ["w: has a character that can't be printed"]),
            (haineko.flag, True, True, []),
            (haineko.flag, False, False, []),
            (haineko.flag, 1, True, []),
            (haineko.flag, 0, False, []),
            (haineko.flag, 2, None, [wants_flag + "a number"]),
            (haineko.flag, 1.0, None, [wants_flag + "a number"]),
            (haineko.flag, "true", None, [wants_flag + "a string"]),
            (haineko.flag, [], None, [wants_flag + "a list"]),
            (haineko.flag, {}, None, [wants_flag + "an object"]),
            (number, 1, 1, []),
            (number, 5, 5, []),
            (number, 0, None, [wants_number + "0"]),
            (number, 6, None, [wants_number + "6"]),
            (number, 2.0, None, [wants_number + "2.0"]),
            (number, True, None, [wants_number + "True"]),
            (number, "3", None, [wants_number + "3"]),
            (number, "\n" * 300, None, [wants_number + "?" * 200 + "..."]),
            (number, [1], None, [wants_number + "[1]"]),
            (texts, "a", ("a",), []),
            (texts, ["a", "b"], ("a", "b"), []),
            (texts, [], (), []),
            (
                texts,
                ["a", 1, None],
                None,
                ["w[1]: a string is wanted, not a number", "w[2]: a string is wanted, not null"],
            ),
            (texts, {}, None, ["w: a string is wanted, not an object"]),
            (upper, {"a": 1, "b": 0}, {"A": True, "B": False}, []),
            (upper, {"a": 2}, None, ["w.a: true or false is wanted, not a number"]),
            (upper, {"a": 1, "A": 1}, None, ["w: two keys differ in case only"]),
            (upper, [], None, ["w: an object is wanted, not a list"]),
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
        cases = [
            ("Subjct", "subject"),
            ("replayto", "replyto"),
            ("CHARSET", "charset"),
            ("x", None),
            ("", None),
            ("subject" * 100000, None),
        ]
        known = haineko.keys(haineko.Header)
        for word, wanted in cases:
            with self.subTest(word[:20]):
                self.assertEqual(haineko.did_you_mean(word, known), f'; did you mean "{wanted}"?' if wanted else "")

    def test_hostile_bodies_cost_little(self):
        many = ",".join(f'"k{i}":1' for i in range(100000))
        cases = [
            ("100,000 unknown keys", f"{{{many}}}", 100000),
            ("a key that stands twice among 100,000", f'{{{many},"k7":1}}', 100001),
            ("100,000 spaces where a mailbox is wanted", json.dumps({"header": {"from": " " * 100000}}), 1),
            ("30,000 spaces where a mailbox is wanted", json.dumps({"header": {"from": " " * 30000}}), 1),
            ("comments within comments", json.dumps({"header": {"from": "(" * 30000}}), 1),
            ("quotes without end", json.dumps({"header": {"from": '"' * 30001}}), 1),
            ("a charset of 100,000 letters", json.dumps({"header": {"charset": "x" * 100000}}), 1),
        ]
        for what, text, count in cases:
            with self.subTest(what):
                began = time.process_time()
                self.assertEqual(len(haineko.understand(text.encode())[1]), count)
                self.assertLess(time.process_time() - began, 2)

    def test_printable(self):
        for text, wanted in [("ねこ", "ねこ"), ("a\r\nb\0\x1b[2J\u2028", "a??b??[2J?"), ("x" * 11, "x" * 10 + "...")]:
            self.assertEqual(haineko.printable(text, 10), wanted)


# ======================================================================================================================
# 3. Settings
# ======================================================================================================================


class SettingsFile(Folder):
    KIJITORA = "{SSHA}9p2euyteR33mp0TYKjmYhTlIt1ctxuRn"

    def faults(self, content, mode: int = 0o600) -> list:
        return haineko.load(self.write("haineko.json", content, mode))[1]

    def test_without_a_file_all_mail_is_printed(self):
        found, faults = haineko.load(None)
        self.assertEqual(faults, [])
        self.assertEqual(found.httpd.listen, ("127.0.0.1:2794",))
        self.assertEqual(haineko.choose("example.jp", "example.org", found)[0].mailer, "Screen")
        self.assertTrue(found.recipients.open_relay)
        self.assertIn(haineko.plain_address("127.0.0.1"), found.relayhosts.relayhosts)
        self.assertNotIn(haineko.plain_address("192.0.2.1"), found.relayhosts.relayhosts)

    def test_defaults(self):
        found, faults = haineko.load(self.write("haineko.json", {}))
        self.assertEqual(faults, [])
        self.assertEqual(
            (found.httpd.workers, found.httpd.max_connections, found.httpd.timeout, found.httpd.tls), (0, 512, 30, None)
        )
        self.assertEqual(
            (found.smtpd.max_message_size, found.smtpd.max_rcpts_per_message, found.smtpd.max_workers), (4194304, 4, 4)
        )
        self.assertEqual((found.smtpd.syslog.disabled, found.smtpd.syslog.facility), (True, "local2"))
        self.assertEqual(found.recipients.domainpart, {found.hostname.lower()})
        self.assertFalse(found.recipients.open_relay)
        route = haineko.choose("example.jp", "example.org", found)[0]
        self.assertEqual((route.mailer, route.host, route.port, route.starttls), ("ESMTP", "127.0.0.1", 25, False))
        self.assertEqual((route.tls_verify, route.timeout, route.retry, route.sleep), (True, 30, 0, 5))

    def test_entries_that_can_match_nothing_are_faults(self):
        for content, fault in (
            ({"recipients": {"domainpart": ["*.example.jp"]}}, 'recipients.domainpart: "*.example.jp" is no domain'),
            ({"recipients": {"domainpart": ["@example.jp"]}}, 'recipients.domainpart: "@example.jp" is no domain'),
            ({"recipients": {"domainpart": [".example.jp"]}}, 'recipients.domainpart: ".example.jp" is no domain'),
            ({"recipients": {"domainpart": ["a@example.jp"]}}, 'recipients.domainpart: "a@example.jp" is no domain'),
            ({"recipients": {"recipients": ["example.jp"]}}, 'recipients.recipients: "example.jp" is no address'),
            (
                {"mailertable": {"*.example.jp": {}}},
                'mailertable.*.example.jp: "example.jp", ".example.jp" or "default" is wanted',
            ),
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
                'httpd.listen: "host:port", "[v6]:port" or "unix:/path" is wanted, not "2794"',
                'httpd.worker: unknown key; did you mean "workers"?',
                "httpd.timeout: a whole number from 1 to 3600 is wanted, not 3601",
                'httpd.allowed_origins[0]: a web origin like "https://www.example.org" is wanted, not "example.org"',
                'smtpd.hostname: a host name is wanted, not "a b"',
                f"smtpd.max_message_size: a whole number from 0 to {1 << 40} is wanted, not -1",
                "smtpd.syslog.disabled: true or false is wanted, not a number",
                'smtpd.syslog.facility: "locl2" is no syslog facility; did you mean "local2"?',
                "relayhosts.open-relay: true or false is wanted, not a string",
                'relayhosts.relayhosts: "192.0.2.0/33" is no IP address or network',
                'relayhosts.relayhosts: "::g" is no IP address or network',
                'recipients.domainparts: unknown key; did you mean "domainpart"?',
                'mailertable.default.mailer: "SMTP" is no relay known here; did you mean "ESMTP"?',
                "mailertable.default.port: a whole number from 1 to 65535 is wanted, not 0",
                'mailertable.example.jp.host: a host name or an IP address is wanted, not "a b"',
                "mailertable.example.jp.retry: a whole number from 0 to 100 is wanted, not 1.5",
                "sendermt: an object is wanted, not a list",
                'authinfo.a.user: unknown key; did you mean "username"?',
                'authinfo.b.password: a string, {"file": path} or {"env": NAME} is wanted',
                "authinfo.c.password: a string is wanted, not a number",
                "password.u: a hash as `haineko.py pw` prints it, or {SSHA}, is wanted",
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
             f"mailertable.default.mailer: {gone} is no folder that can be written"),
            ("a file as folder", {"mailertable": {"default": {"mailer": closed}}},
             f"mailertable.default.mailer: {closed} is no folder that can be written"),
            ("folder as host", {"mailertable": {"default": {"host": "/tmp"}}},
             'mailertable.default.host: "/tmp" is no host name'),
            ("ca_file", {"mailertable": {"default": {"ca_file": "gone"}}},
             f"mailertable.default.ca_file: {gone}: No such file or directory"),
            ("ca_file that is none", {"mailertable": {"default": {"ca_file": "closed"}}},
             f"mailertable.default.ca_file: {closed}: "),
            ("tls", {"httpd": {"tls": tls}}, "httpd.tls: "),
            ("env", {"authinfo": {"a": {"password": {"env": "HAINEKO_TEST_UNSET"}}}},
             "authinfo.a.password.env: no environment variable HAINEKO_TEST_UNSET"),
            ("file", {"authinfo": {"a": {"password": {"file": "gone"}}}},
             "authinfo.a.password.file: gone: No such file or directory"),
            ("not ASCII", {"authinfo": {"a": {"username": "ねこ"}}}, "authinfo.a: AUTH takes ASCII only"),
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
            ("a list", [], f"{path}: an object is wanted, not a list"),
            ("NaN", b'{"httpd": {"timeout": NaN}}', f"{path}: NaN is not JSON"),
            ("twice", b'{"httpd": {"timeout": 1, "timeout": 1}}', "httpd.timeout: stands more than once"),
        ]
        for what, content, wanted in cases:
            with self.subTest(what):
                faults = self.faults(content)
                self.assertTrue(len(faults) == 1 and faults[0].startswith(wanted), faults)
        os.unlink(path)
        self.assertEqual(haineko.load(path)[1], [f"{path}: No such file or directory"])
        self.assertEqual(haineko.load(self.folder)[1], [f"{self.folder}: Is a directory"])

    def test_a_section_in_a_file_of_its_own(self):
        self.write("authinfo", {"relay": {"username": "u", "password": "p"}})
        self.write("aside.json", {"default": {"host": "192.0.2.1", "auth": "relay"}}, 0o644)
        path = self.write("haineko.json", {"authinfo": "authinfo", "mailertable": "aside.json"}, 0o644)
        found, faults = haineko.load(path)
        self.assertEqual(faults, [])
        self.assertEqual(found.mailertable["default"].login, ("u", "p"))
        names = {os.path.basename(name) for name, _ in found.files}
        self.assertEqual(names, {"haineko.json", "authinfo", "aside.json"})
        self.assertTrue(all(haineko.signature(name) == was for name, was in found.files))
        self.write("aside.json", {"default": {"hst": "192.0.2.1"}}, 0o644)
        self.assertEqual(haineko.load(path)[1], ['mailertable.default.hst: unknown key; did you mean "host"?'])
        os.unlink(os.path.join(self.folder, "aside.json"))
        gone = os.path.join(self.folder, "aside.json")
        self.assertEqual(haineko.load(path)[1], [f"{gone}: No such file or directory"])

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
        os.environ["HAINEKO_TEST_WORD"] = "from env"
        self.addCleanup(os.environ.pop, "HAINEKO_TEST_WORD")
        logins = {
            "f": {"username": "u", "password": {"file": "word"}},
            "e": {"username": "v", "password": {"env": "HAINEKO_TEST_WORD"}},
        }
        path = self.write("haineko.json", {"authinfo": logins, "mailertable": {k: {"auth": k} for k in logins}}, 0o644)
        found, faults = haineko.load(path)
        self.assertEqual(faults, [])
        self.assertEqual(found.mailertable["f"].login, ("u", "neko"))
        self.assertEqual(found.mailertable["e"].login, ("v", "from env"))
        self.assertIn(os.path.join(self.folder, "word"), [name for name, _ in found.files])

    def test_password_hashes(self):
        digest, salt = hashlib.scrypt(b"neko", salt=b"s" * 16, n=1024, r=8, p=1), base64.b64encode(b"s" * 16).decode()
        line = f"$scrypt$ln=10,r=8,p=1${salt}${base64.b64encode(digest).decode()}"
        cases = [
            (self.KIJITORA, "kijitora", True),
            (self.KIJITORA, "Kijitora", False),
            (self.KIJITORA, "", False),
            (line, "neko", True),
            (line, "neko ", False),
            (haineko.NOBODY, "neko", False),
        ]
        for hashed, word, right in cases:
            with self.subTest(hashed[:20], word=word):
                self.assertEqual(haineko.verify(hashed, word), right)
                faults: list = []
                haineko.password_hash(hashed, "w", faults)
                self.assertEqual(faults, [])

    def test_hashes_that_are_none(self):
        salt = "c2FsdHNhbHRzYWx0c2FsdA=="
        for line in (
            "", "kijitora", "{SSHA}", "{SSHA}!",
            "{SSHA}" + base64.b64encode(b"x" * 20).decode(), "{SSHA512}" + "A" * 88,
            "$scrypt$ln=9,r=8,p=1$" + salt + "$" + salt, "$scrypt$ln=20,r=8,p=1$" + salt + "$" + salt,
            "$scrypt$ln=14,r=8,p=1$A$" + salt, "$scrypt$ln=14,r=8,p=1$" + salt + "$", "$2b$12$abcdefghijklmnopqrstuv",
        ):  # fmt: skip
            with self.subTest(line):
                faults: list = []
                haineko.password_hash(line, "password.u", faults)
                self.assertEqual(faults, ["password.u: a hash as `haineko.py pw` prints it, or {SSHA}, is wanted"])

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
                self.assertFalse(gate.remembers(credentials))
                self.assertEqual(gate.admits(credentials), right)
                self.assertEqual(gate.remembers(credentials), right)

    def test_who_was_right_is_remembered(self):
        salt = b"s" * 16
        digest = haineko.scrypt("neko", salt)
        line = "$scrypt$ln=14,r=8,p=1$" + "$".join(base64.b64encode(octets).decode() for octets in (salt, digest))
        gate = settings(password={"u": line}).password
        credentials = "Basic " + base64.b64encode(b"u:neko").decode()
        began = time.process_time()
        self.assertTrue(gate.admits(credentials))
        slow, began = time.process_time() - began, time.process_time()
        self.assertTrue(all(gate.admits(credentials) for _ in range(10)))
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
                self.assertEqual(haineko.plain_address(address) in found, inside)
        everything = haineko.Networks(("0.0.0.0/0",))
        self.assertIn(haineko.plain_address("203.0.113.9"), everything)
        self.assertNotIn(haineko.plain_address("2001:db8::1"), everything)
        self.assertNotIn(haineko.plain_address("127.0.0.1"), haineko.Networks())

    def test_networks_agree_with_ipaddress(self):
        texts = [f"10.{i}.{i * 7 % 256}.0/{8 + i % 25}" for i in range(60)]
        found = haineko.Networks(tuple(texts))
        plain = [ipaddress.ip_network(text, strict=False) for text in texts]
        for i in range(500):
            text = f"{9 + i % 3}.{i * 13 % 64}.{i * 31 % 256}.{i % 256}"
            inside = any(ipaddress.ip_address(text) in network for network in plain)
            self.assertEqual(haineko.plain_address(text) in found, inside, text)

    def test_listen_addresses(self):
        cases = [
            ("127.0.0.1:0", True), ("[::1]:2794", True), ("unix:/run/haineko.sock", True), ("localhost:65535", True),
            ("127.0.0.1", False), (":2794", False), ("::1:2794", False), ("127.0.0.1:65536", False),
            ("127.0.0.1:-1", False), ("unix:relative", False), ("127.0.0.1:２７", False), ("", False), (5, False),
        ]  # fmt: skip
        for value, good in cases:
            with self.subTest(value):
                faults: list = []
                haineko.listen_address(value, "w", faults)
                self.assertEqual(not faults, good, faults)

    def test_names_of_relays(self):
        for given, mailer, relay in [
            ("esmtp", "ESMTP", "ESMTP"), ("Discard", "Discard", "Discard"), ("SCREEN", "Screen", "Screen"),
            (self.folder, self.folder, "File"), ("File", "File", "File"),
        ]:  # fmt: skip
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
        for text, permitted in [
            ("a@EXAMPLE.com", True), ("a@例え.jp", True), ("a@xn--r8jz45g.jp", True), ("NEKO@example.NET", True),
            ("inu@example.net", False), ("neko@例え.テスト", True), ("a@sub.example.com", False),
        ]:  # fmt: skip
            with self.subTest(text):
                self.assertEqual(haineko.check_rcpt(haineko.address(text), found) is None, permitted)

    def test_domains_in_ascii(self):
        cases = [
            ("example.jp", "example.jp"), ("例え.jp", "xn--r8jz45g.jp"), ("bücher.example", "xn--bcher-kva.example"),
            ("faß.de", ""), ("βόλος.com", ""), ("a\u200db.example", ""), ("a\u200cb.example", ""), ("あ" * 64 + ".jp",
            ""),
        ]  # fmt: skip
        for name, wanted in cases:
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
        found, faults = haineko.load(self.write("haineko.json", content))
        self.assertEqual(faults, [])
        text = json.dumps(haineko.shown(found))
        for word in ("hush-1", self.KIJITORA, self.KIJITORA[6:]):
            self.assertNotIn(word, text)
        shown = json.loads(text)
        self.assertEqual(shown["authinfo"]["relay"], {"username": "mikeneko", "password": "********", "token": ""})
        self.assertEqual(shown["authinfo"]["none"]["password"], "")
        self.assertEqual(shown["password"], {"kijitora": "********"})
        self.assertEqual(shown["relayhosts"], {"open-relay": False, "relayhosts": ["192.0.2.0/24"]})
        self.assertEqual(shown["recipients"]["domainpart"], ["a.example", "b.example"])
        self.assertEqual(shown["mailertable"]["default"]["starttls"], True)
        self.assertNotIn("login", shown["mailertable"]["default"])
        self.assertEqual(shown["httpd"]["listen"], ["127.0.0.1:2794"])
        self.assertEqual(set(shown), set(haineko.keys(haineko.Settings)))
        self.assertNotIn("hush-1", repr(found) + repr(found.mailertable))

    def test_shown_defaults_can_be_read_again(self):
        shown = haineko.shown(settings(mailertable={}, sendermt={}))
        faults: list = []
        haineko.read(haineko.Settings, json.loads(json.dumps(shown)), "", faults)
        self.assertEqual(faults, [])


# ======================================================================================================================
# 4. Log
# ======================================================================================================================


class LogLines(Quiet):
    def test_a_line_is_a_line(self):
        haineko.log.lines("one", "two ねこ", "half \ud800")
        lines = self.logged()
        self.assertEqual(len(lines), 3)
        for line, wanted in zip(lines, ("one", "two ねこ", "half \\ud800")):
            self.assertRegex(line, rf"\A\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{{4}} haineko\[{os.getpid()}\]: ")
            self.assertTrue(line.endswith(": " + wanted), line)

    def test_pairs(self):
        cases = [
            ({"a": "b", "c": 1}, "a=b c=1"),
            ({"a": None, "b": ""}, 'b=""'),
            ({"a": 'say "x y"'}, r'a="say \"x y\""'),
            ({"a": "x\r\ny\x1b[2J"}, "a=x??y?[2J"),
            ({"a": "x" * 501}, "a=" + "x" * 500 + "..."),
        ]
        for values, wanted in cases:
            with self.subTest(wanted):
                self.assertEqual(haineko.pairs(**values), wanted)

    def test_a_full_stderr_costs_no_mail(self):
        with open("/dev/full", "wb") as full:
            os.dup2(full.fileno(), 2)
        self.assertEqual(posted(document())[0], 200)


# ======================================================================================================================
# 5. Submissions
# ======================================================================================================================


class Submissions(unittest.TestCase):
    def understood(self, submission) -> haineko.Submission:
        found, faults = haineko.understand(as_body(submission))
        self.assertEqual(faults, [])
        return found

    def faults(self, submission) -> list:
        return haineko.understand(as_body(submission))[1]

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
            [(name, item.wire) for name, item in found.header.from_], [("キジトラ", "kijitora@example.com")]
        )
        self.assertEqual([item.wire for _, item in found.header.replyto], ["straycats@cat-ml.example.org"])
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
                self.assertEqual(found[0][1].wire, "a@example.jp")

    def test_null_is_as_if_absent_and_empty_is_empty(self):
        names = dict.fromkeys(["ehlo", "helo", "mail", "send", "from", "rcpt", "recv", "to", "header", "body"])
        found, absent = self.understood(names), haineko.Submission()
        self.assertEqual(
            [getattr(found, item.name) for item in fields(found)],
            [getattr(absent, item.name) for item in fields(found)],
        )
        self.assertIsNone(found.ehlo)
        self.assertEqual(self.understood({"header": {"charset": None}}).header.charset, "UTF-8")
        self.assertEqual(self.understood({"ehlo": ""}).ehlo, "")
        self.assertEqual(self.understood({"header": {"from": "", "replyto": ""}}).header.from_, ())

    def test_faults(self):
        wanted = '"name <address>" is wanted, not '
        cases = [
            ([], ["the top: an object is wanted, not a list"]),
            ("x", ["the top: an object is wanted, not a string"]),
            (b"null", ["the top: an object is wanted, not null"]),
            ({"header": []}, ["header: an object is wanted, not a list"]),
            ({"header": "x"}, ["header: an object is wanted, not a string"]),
            ({"rcptt": "a"}, ['rcptt: unknown key; did you mean "rcpt"?']),
            ({"subject": "a"}, ["subject: unknown key"]),
            ({"header": {"reply_to": "a"}}, ['header.reply_to: unknown key; did you mean "replyto"?']),
            ({"header": {"Subject": "a"}}, ['header.Subject: unknown key; did you mean "subject"?']),
            ({"header": {"cc": "a"}}, ["header.cc: unknown key"]),
            ({"a\r\nb": 1}, ["a??b: unknown key"]),
            ({"mail": 1}, ["mail: a string is wanted, not a number"]),
            ({"mail": ["a@example.jp"]}, ["mail: a string is wanted, not a list"]),
            ({"ehlo": False}, ["ehlo: a string is wanted, not true or false"]),
            ({"body": {}}, ["body: a string is wanted, not an object"]),
            ({"rcpt": 5}, ["rcpt: a string is wanted, not a number"]),
            ({"rcpt": {"a": 1}}, ["rcpt: a string is wanted, not an object"]),
            ({"rcpt": ["a", None]}, ["rcpt[1]: a string is wanted, not null"]),
            ({"rcpt": [["a"]]}, ["rcpt[0]: a string is wanted, not a list"]),
            ({"header": {"subject": 1}}, ["header.subject: a string is wanted, not a number"]),
            ({"header": {"subject": "a\nb"}}, ["header.subject: has a CR, LF or NUL"]),
            ({"header": {"from": "nobody"}}, ["header.from: " + wanted + '"nobody"']),
            ({"header": {"replyto": "a b c"}}, ["header.replyto: " + wanted + '"a b c"']),
            ({"header": {"charset": "UTF-9"}}, ['header.charset: "UTF-9" is no charset for mail that is known here']),
            ({"header": {"x-haineko-loop": "a b"}}, ['header.x-haineko-loop: "a b" is no name of a Haineko']),
            ({"header": {"x-haineko-loop": [1]}}, ["header.x-haineko-loop[0]: a string is wanted, not a number"]),
            (b'{"body": "a", "body": "b"}', ["body: stands more than once"]),
            (b'{"header": {"subject": "a", "subject": "a"}}', ["header.subject: stands more than once"]),
            (b'{"body": "\\ud800"}', ["body: has half a surrogate pair at character 0"]),
            (b'{"rcpt": ["a", "b\\udc00"]}', ["rcpt[1]: has half a surrogate pair at character 1"]),
            (b'{"header": {"subject": "\\ud83d"}}', ["header.subject: has half a surrogate pair at character 0"]),
            (b'{"\\ud800": 1}', ["?: unknown key"]),
            ({"rcpt": 1, "body": 2, "x": 3}, [
                "rcpt: a string is wanted, not a number", "body: a string is wanted, not a number", "x: unknown key",
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
                found = haineko.address(text)
                self.assertEqual((found.given, found.local, found.domain), (text, local, domain))

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
                self.assertIsNone(haineko.address(text))

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
                    self.assertEqual([(shown, item.wire) for shown, item in found], wanted)

    def test_headers_that_hold_no_mailbox(self):
        for text in (
            " ", "Neko", "Neko <>", "Neko <neko>", "neko at example.jp", "Neko neko@example.jp>",
            "<neko@example.jp> Neko", "ねこ@example.jp", "ねこ <ねこ@example.jp>", "a@example.jp b@example.jp",
            "a@b@c.jp",
            "A <a@example.jp>, B", '"Neko <neko@example.jp>', "Neko <a b@example.jp>", "neko@faß.de", "()", ",",
            "a" * 99999,
            "N\0 <neko@example.jp>", "N\r\nX: y <neko@example.jp>", "Neko <neko@example.jp\n>",
            "Neko <neko@ex\0ample.jp>",
        ):  # fmt: skip
            with self.subTest(text):
                self.assertEqual(
                    len(self.faults({"header": {"from": text}})),
                    2 if re.search("[\r\n\0]", text) and not haineko.parse_mailboxes(text) else 1,
                )

    def test_names_of_charsets(self):
        cases = [
            ("UTF-8", "UTF-8"), ("utf8", "UTF-8"), ("U8", "UTF-8"), ("iso-2022-jp", "ISO-2022-JP"),
            ("csISO2022JP", "ISO-2022-JP"), ("ISO-8859-1", "ISO-8859-1"), ("latin1", "ISO-8859-1"), ("us-ascii",
            "US-ASCII"),
            ("ASCII", "US-ASCII"), ("ISO-8859-15", "ISO-8859-15"), ("windows-1252", "windows-1252"), ("cp1252",
            "windows-1252"),
            ("Shift_JIS", "Shift_JIS"), ("cp932", "Windows-31J"), ("EUC-JP", "EUC-JP"), ("gb18030", "gb18030"),
            ("Big5", "Big5"), ("KOI8-R", "KOI8-R"), ("EUC-KR", "EUC-KR"),
        ]  # fmt: skip
        for name, wanted in cases:
            with self.subTest(name):
                self.assertEqual(haineko.charset_name(name), wanted)
                self.assertTrue(wanted.encode("ascii").decode().replace("-", "").replace("_", "").isalnum())
        for name in ("", "x", "UTF-16", "utf-7", "utf-8-sig", "idna", "punycode", "rot13", "base64", "hex", "zlib",
                     "hz",
                     "cp037", "undefined", "unicode_escape", "raw_unicode_escape", "mbcs", "utf-8\r\nX: y", "utf-8\0",
                     "utf 8", "ねこ", "../utf8", "a" * 1000):  # fmt: skip
            with self.subTest(name):
                self.assertEqual(haineko.charset_name(name), "")

    def test_names_that_a_mail_has_passed(self):
        cases = [
            ("a.example", ("a.example",)), ("a.example, b.example", ("a.example", "b.example")), ([], ()), ("", ()),
            (["a.example", "b.example,c.example"], ("a.example", "b.example", "c.example")), ([" a "], ("a",)),
        ]  # fmt: skip
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
        self.assertEqual([(name, item.wire) for name, item in found.from_], [("キジトラ", "kijitora@example.com")])
        self.assertEqual(found.replyto, found.from_)

    def test_strings_that_say_so_and_are_not(self):
        cases = [
            ("\x1b$B$\x1b(B", "ends within a character"),
            ("\x1b$B$M\nx\x1b(B", "isn't"),
            ("\x1b$B \x1b(B", ""),
            ("\x1b$B~~\x1b(B", "nobody knows"),
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
        head = f"{http['method']} {http['path']} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
        return over_http(head.encode() + body, settings(**force), http["client"])


MALFORMED = (400, "421", None, "HTTP", "Malformed JSON string")
LOOP = (400, "421", "5.4.6", "CONN", "Detected message loop")
EHLO = (400, "501", "5.0.0", "EHLO", "Invalid domain name")
MAIL_EMPTY = (400, "501", "5.5.2", "MAIL", 'Syntax error in parameters scanning "FROM"')
MAIL_FORM = (400, "553", "5.5.4", "MAIL", "Domain name required for sender address")
MAIL_ASCII = (400, "553", "5.6.7", "MAIL", "non-ASCII address is not permitted")
RCPT_NONE = (400, "553", "5.0.0", "RCPT", "User address required")
RCPT_MANY = (403, "452", "4.5.3", "RCPT", "Too many recipients")
RCPT_FORM = (400, "553", "5.1.5", "RCPT", "Recipient address is invalid")
RCPT_ASCII = (400, "553", "5.6.7", "RCPT", "non-ASCII address is not permitted")
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
        Row("a list", *MALFORMED, raw=b"[]"),
        Row("not UTF-8", *MALFORMED, raw=b'{"body": "\xff"}'),
        Row("too deep", *MALFORMED, raw=b"[" * 100000),
        Row("NaN", *MALFORMED, raw=b'{"body": NaN}'),
        Row("a key twice", *MALFORMED, raw=b'{"body": "a", "body": "a"}'),
        Row("half a surrogate pair", *MALFORMED, raw=b'{"body": "\\ud800"}'),
        Row("an unknown key", *MALFORMED, replyto="a@example.jp"),
        Row("an unknown key of header", *MALFORMED, header={"x-mailer": "a"}),
        Row("a wrong type", *MALFORMED, body=1),
        Row("an unknown charset", *MALFORMED, header={"charset": "klingon"}),
        Row("LF in the subject", *MALFORMED, header={"subject": "a\nX-Evil: b"}),
        Row("NUL in From", *MALFORMED, header={"from": "a\0 <a@example.jp>"}),
        Row("CR in Reply-To", *MALFORMED, header={"replyto": "a\r <a@example.jp>"}),
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
    [Row("mail not ASCII", *MAIL_ASCII, mail="ねこ@example.jp")],
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
    [Row("rcpt not ASCII", *RCPT_ASCII, rcpt=["ねこ@example.jp"])],
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
        self.assertIn(f"{found['queueid'] or '-'}: refused ", lines[0])
        self.assertIn(f"code={item['code']} ", lines[0])

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
        self.assertIn("refused ", lines[-1])

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
        given = ["no", "a@example.jp", "ねこ@example.jp", "b@example.org"]
        status, found = posted(document(rcpt=given), force)
        self.assertEqual(status, 207)
        self.assertEqual(found["recipient"], ["a@example.jp"])
        wanted = [
            ("no", 1, "5.1.5"),
            ("a@example.jp", 0, "2.0.0"),
            ("ねこ@example.jp", 1, "5.6.7"),
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

    def test_the_size_is_that_of_the_finished_message(self):
        octets = composed(document())
        for limit, status in ((len(octets), 200), (len(octets) - 1, 413)):
            with self.subTest(limit):
                force = settings(smtpd={"hostname": NAME, "max_message_size": limit})
                self.assertEqual(posted(document(), force)[0], status)


# ======================================================================================================================
# 7. Messages
# ======================================================================================================================


def composed(submission, client: str = "127.0.0.1", to: str = "mikeneko@example.jp") -> bytes:
    """The octets of the message of a submission."""
    found, faults = haineko.understand(as_body(submission))
    if faults:
        raise ValueError(faults)
    message = haineko.compose(found, "Q" * 16, haineko.plain_address(client), NAME, NOW)
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
            ("ISO-2022-JP", "한국어"), ("ISO-2022-JP", "ü"), ("ISO-2022-JP", "😺"), ("ISO-2022-JP", "か\u3099"),
            ("ISO-2022-JP", "猫\x1b$B"), ("ISO-8859-1", "€"), ("US-ASCII", "é"), ("Shift_JIS", "ü"), ("KOI8-R", "猫"),
        ]  # fmt: skip
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
            encoding, octets = haineko.encode_body(text, "UTF-8")
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
        evil = ["\r\nX-Evil: 1", "\nX-Evil: 1", "\rX-Evil: 1", "\r\n\r\nX-Evil: 1", "\0X-Evil: 1", "\r\n X-Evil: 1",
                "\x0bX-Evil: 1", "\x0c\x1c\x1d\x1e\x85\u2028\u2029X-Evil: 1",
                "\r\n.\r\nMAIL FROM:<x-evil@x>"]  # fmt: skip
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
                    found, faults = haineko.understand(as_body(submission))
                    request_ = request(as_body(submission))
                    if faults or haineko.first_refusal(haineko.CHECKS, request_, found, settings()):
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
                self.assertIsNone(haineko.address(text))

    def test_a_finished_message_is_taken_apart(self):
        cases = [
            (b"A: 1\nB: 2\n\nbody\n", [("a", b"A: 1\n"), ("b", b"B: 2\n")], b"body\n"),
            (b"A: 1\r\n 2\r\nB:3\r\n\r\nx\r\ny", [("a", b"A: 1\n 2\n"), ("b", b"B:3\n")], b"x\ny"),
            (b"From x Mon\nA: 1\n\nb\n", [("a", b"A: 1\n")], b"b\n"),
            (b"A: 1\n", [("a", b"A: 1\n")], b""),
            (b"A: 1", [("a", b"A: 1")], b""),
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
        fields_, body = haineko.parse_message(octets)
        return haineko.finish_message(fields_, body, "s@example.org", list(loop), "Q" * 16, NAME, NOW)

    def test_a_finished_message_is_made_ready(self):
        message = self.finish(
            b"To: a@example.jp\nBcc: secret@example.jp\nReturn-Path: <x>\nSubject: a\n b\nX-Haineko-Loop: r1\n"
            b"\nMeow.\n.\n",
            ("r1",),
        )
        octets = message.copy("", 1)
        self.assertFalse(message.eight)
        self.assertFalse(re.search(rb"\r(?!\n)|(?<!\r)\n", octets))
        found = raw_fields(octets)
        self.assertEqual(
            [name for name, _ in found],
            ["Received", "To", "Subject", "MIME-Version", "Content-Type", "Content-Transfer-Encoding", "From", "Date",
             "Message-Id", "X-Haineko-Loop"],
        )  # fmt: skip
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
        self.assertTrue(message.eight)
        self.assertEqual([name for name, _ in haineko.parse_message(octets)[0]].count("message-id"), 1)
        for line in head.splitlines():
            self.assertIn(line + b"\r\n", octets)
        self.assertTrue(octets.endswith("\r\n\r\nねこ\r\n".encode()))

    def test_a_finished_message_without_mime(self):
        for body, meant in [
            ("ねこ\n".encode(), "ねこ\r\n"), ("é\n".encode("latin-1"), "é\r\n"), (b"x" * 2000 + b"\n",
            "x" * 2000 + "\r\n"),
        ]:  # fmt: skip
            with self.subTest(body[:20]):
                message = self.finish(b"To: a@example.jp\n\n" + body)
                self.assertFalse(message.eight)
                self.assertEqual(decoded_body(message.copy("", 1)), meant)

    def test_a_finished_message_with_lines_too_long_is_refused(self):
        for octets in (b"A: " + b"x" * 996 + b"\n\nb\n", b"MIME-Version: 1.0\n\n" + b"x" * 999 + b"\n"):
            with self.assertRaises(ValueError):
                self.finish(octets)
        self.finish(b"A: " + b"x" * 995 + b"\n\nb\n")

    def test_a_message_in_seven_bits(self):
        text = "ねこ\r\nFrom here\r\n.\r\n" + "x" * 200 + "\r\n"
        head = b"From: a@example.jp\r\nSubject: " + b"s " * 60 + b"\r\nMIME-Version: 1.0\r\n"
        kind = b"Content-Type: text/plain; charset=UTF-8\r\nContent-Transfer-Encoding: 8bit\r\n"
        parts = b"Content-Type: multipart/mixed; boundary=XX\r\n\r\n--XX\r\n" + kind + b"\r\n" + text.encode()
        parts += b"\r\n--XX\r\nContent-Type: image/png\r\nContent-Transfer-Encoding: base64\r\n\r\nAAAA\r\n--XX--\r\n"
        for what, octets in (("one part", head + kind + b"\r\n" + text.encode()), ("two parts", head + parts)):
            with self.subTest(what):
                found = haineko.seven_bit(octets)
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
                    found = haineko.seven_bit(head + b"\r\nFrom caf\xe9 \xff\r\n")
                    self.assertTrue(found.isascii())
                    self.assertEqual(email.message_from_bytes(found).get_payload(decode=True), b"From caf\xe9 \xff\r\n")

    def test_parts_of_seven_bits_stay_as_they_are(self):
        part = b"Content-Type: text/plain\r\n\r\nFrom here\r\n.\r\n--XX\r\n"
        octets = (
            b"MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=XX\r\nContent-Transfer-Encoding: 8bit\r\n"
        )
        octets += b"\r\n--XX\r\n" + part + b"Content-Type: text/plain; charset=UTF-8\r\n\r\n\xe7\x8c\xab\r\n--XX--\r\n"
        found = haineko.seven_bit(octets)
        self.assertIn(part, found)
        self.assertTrue(found.isascii())
        self.assertNotIn(b"8bit", found)


# ======================================================================================================================
# 8. Routes
# ======================================================================================================================


class Routes(unittest.TestCase):
    def route(self, recipient: str, sender: str, **tables) -> tuple:
        """(host, why) of the route chosen by tables of {key: host}."""
        tables = {name: {key: {"host": host} for key, host in table.items()} for name, table in tables.items()}
        found, why = haineko.choose(recipient, sender, settings(**{"mailertable": {}, **tables}))
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
            ("example.jp", "example.org", "m2"), ("example.com", "example.org", "s1"), ("example.com", "x.example",
            "127.0.0.1"),
        ]:  # fmt: skip
            with self.subTest(recipient, sender=sender):
                self.assertEqual(haineko.choose(recipient, sender, found)[0].host, host)

    def test_entries(self):
        cases = [
            ("a.b.c", ["a.b.c", ".b.c", ".c"]),
            ("a", ["a"]),
            ("[192.0.2.1]", ["[192.0.2.1]", ".0.2.1]", ".2.1]", ".1]"]),
        ]
        for domain, wanted in cases:
            with self.subTest(domain):
                self.assertEqual(haineko.entries(domain), wanted)

    def test_a_look_up_costs_the_same_in_a_large_table(self):
        route = haineko.Route(host="m1")
        small = haineko.Settings(mailertable={"example.jp": route})
        large = haineko.Settings(mailertable={**{f"d{i}.example": route for i in range(100000)}, "example.jp": route})

        def cost(table: haineko.Settings) -> float:
            began = time.process_time()
            for _ in range(2000):
                haineko.choose("a.b.example.jp", "example.org", table)
            return time.process_time() - began

        self.assertLess(min(cost(large) for _ in range(3)), 5 * min(cost(small) for _ in range(3)))


ROOT = os.path.dirname(os.path.abspath(haineko.__file__))


class Readme(unittest.TestCase):
    """What README.md says is so: each fenced block is run, and each name that a reader may need stands in a table."""

    URL = "http://127.0.0.1:2794/"  # as README.md has it; replaced by a test's own
    ALL = os.environ.get("HAINEKO_ALL") == "1"  # what takes seconds to start, too

    @classmethod
    def setUpClass(cls):
        with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as stream:
            cls.text = stream.read()
        cls.blocks = re.findall(r"^```(\w+) ?([\w ]*)\n(.*?)^```$", cls.text, re.MULTILINE | re.DOTALL)
        cls.folder = tempfile.mkdtemp(prefix="haineko-readme.")
        cls.addClassCleanup(shutil.rmtree, cls.folder, True)
        for name in ("haineko.py", "haineko.json.example"):
            shutil.copy(os.path.join(ROOT, name), cls.folder)
        for language, mark, name in (("json", "settings", "settings.json"), ("json", "faulty", "faulty.json")):
            cls.write(name, cls.marked(language, mark)[0])
        cls.logs = []
        cls.url = cls.serve()
        nobody = {"httpd": {"listen": "127.0.0.1:0", "workers": 1}, "recipients": {}}
        cls.refusing = cls.serve("-c", cls.write("nobody.json", json.dumps(nobody)))

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
        values = {key: value for key, value in os.environ.items() if not key.startswith("HAINEKO_")}
        path = os.path.dirname(sys.executable) + os.pathsep + values.get("PATH", "")
        values.update(PATH=path, PYTHONDONTWRITEBYTECODE="1", no_proxy="*", **({"HAINEKO_URL": url} if url else {}))
        return values

    @classmethod
    def serve(cls, *flags):
        """Starts a server until the class is done; gives its URL."""
        command = [sys.executable, "haineko.py", "serve", *(flags or ("--listen", "127.0.0.1:0", "--workers", "1"))]
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
        settings, faults = haineko.load(os.path.join(self.folder, "haineko.json"))
        self.assertEqual((faults, settings.mailertable["default"].login), ([], ("me", "nyan")))
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
                self.assertEqual(haineko.load(self.write(f"settings{i}.json", text))[1], [])
        for text in self.marked("json", "faulty"):
            self.assertNotEqual(haineko.load(self.write("faulty.json", text))[1], [])

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

    def test_systemd(self):
        output = self.run_it(["python3", "haineko.py", "setup", "--dest", "etc"])
        paths = [os.path.join(self.folder, "etc", name) for name in ("haineko.json", "haineko.service")]
        self.assertEqual(output.split(), paths)
        self.assertEqual(haineko.load(paths[0])[1], [])
        if not shutil.which("systemd-analyze"):
            self.skipTest("no systemd-analyze on this machine")
        self.assertEqual(self.run_it(["systemd-analyze", "verify", "--man=no", paths[1]]), "")

    def test_every_setting_stands_in_a_table(self):
        """With its default."""
        classes = (haineko.Httpd, haineko.Tls, haineko.Smtpd, haineko.Syslog, haineko.Relayhosts, haineko.Recipients)
        for cls in (*classes, haineko.Route, haineko.Login):
            for key, default in haineko.shown(cls()).items():
                wanted = default[0] if key == "listen" else default
                wanted = "see below" if key == "syslog" else f"`{json.dumps(wanted)}`"
                with self.subTest(key):
                    self.assertIn(f"\n| `{key}` | {wanted} |", self.text)
        for name in haineko.keys(haineko.Settings):
            with self.subTest(name):
                self.assertRegex(self.text, rf"(?m)^### .*\b{name}\b")

    def test_every_row_of_a_table_stands_in_a_table(self):
        for name in haineko.COMMANDS:
            self.assertRegex(self.text, rf"(?m)^\|.*`{name}[ `].*\|", name)
        for name in haineko.RELAYS:
            self.assertIn(f"\n| `{name}` |", self.text)
        for method, path in haineko.PAGES:
            self.assertIn(f"`{method} {path}`", self.text)
        for slug, (status, code, dsn, _, line) in haineko.REPLIES.items():
            with self.subTest(slug):
                words = re.escape(line).replace("%s", "GET" if slug == "method" else ".+")
                if words != ".+" and code != "200":
                    head = rf"{code} \| {re.escape(dsn or '')} ?\|.*" if dsn or slug == "json" else f"{status} .*"
                    self.assertRegex(self.text, rf"(?m)^\|.*{head}\| {words}[ |(]")
        for key in (*haineko.keys(haineko.Submission), *(f"header.{key}" for key in haineko.keys(haineko.Header))):
            if key not in ("header", "header.reply-to"):
                self.assertRegex(self.text, rf"(?m)^\|.*`{re.escape(key)}`.*\|", key)


class SideBySide(unittest.TestSuite):
    """Runs each class of tests in a process of its own, several at a time: most of them wait for deadlines."""

    AT_ONCE = 6

    def run(self, result, debug=False):
        waiting, running = list(self), {}
        while waiting or running:
            while waiting and len(running) < self.AT_ONCE:
                suite = waiting.pop(0)
                reader, writer = os.pipe()
                pid = os.fork()
                if not pid:
                    self.report(suite, writer)
                os.close(writer)
                running[reader] = (pid, suite, [])
            for reader in select.select(list(running), [], [])[0]:
                octets = os.read(reader, 1 << 16)
                running[reader][2].append(octets)
                if not octets:
                    pid, suite, parts = running.pop(reader)
                    os.close(reader)
                    self.add(result, suite, os.waitpid(pid, 0)[1], b"".join(parts))
        return result

    @staticmethod
    def report(suite, writer):
        """In the new process: runs the suite and sends what came of it."""
        result = unittest.TestResult()
        try:
            suite.run(result)
            told = {kind: [(str(test), text) for test, text in getattr(result, kind)] for kind in KINDS}
            with open(writer, "w", encoding="utf-8") as stream:
                json.dump({"run": result.testsRun, **told}, stream)
            code = 0
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            os._exit(code)

    @staticmethod
    def add(result, suite, status, octets):
        """In the first process: adds what another one sent."""
        if status or not octets:
            name = str(next(iter(suite)))
            result.errors.append(
                (unittest.FunctionTestCase(print, description=name), f"its process ended: status {status}")
            )
            return
        told = json.loads(octets)
        result.testsRun += told["run"]
        for kind in KINDS:
            getattr(result, kind).extend(
                (unittest.FunctionTestCase(print, description=name), text) for name, text in told[kind]
            )
        if hasattr(result, "stream"):
            bad = len(told["failures"]) + len(told["errors"])
            result.stream.write(
                "F" * bad + "s" * len(told["skipped"]) + "." * max(0, told["run"] - bad - len(told["skipped"]))
            )
            result.stream.flush()


KINDS = ("failures", "errors", "skipped")


def load_tests(loader, classes, pattern):
    """The whole module: its classes side by side, those that take longest first."""
    suites = [suite for suite in classes if suite.countTestCases()]
    return SideBySide(sorted(suites, key=lambda suite: -suite.countTestCases()))


if __name__ == "__main__":
    unittest.main()
