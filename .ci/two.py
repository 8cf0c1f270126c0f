#!/usr/bin/env python3
"""Two Hainekos behind nginx, one of them killed under load: every 200 is a mail that arrived, and none arrived twice.

    python3 .ci/two.py

Needs nginx. The nginx lines are those of the README.
"""

import asyncio
import collections
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAILS, CLIENTS = 3000, 16


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Sink:
    """An SMTP server that counts how often each subject arrived."""

    def __init__(self) -> None:
        self.arrived: collections.Counter = collections.Counter()
        self.ready = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self.serve()), daemon=True).start()
        self.ready.wait()

    async def serve(self) -> None:
        server = await asyncio.start_server(self.talk, "127.0.0.1", 0, limit=1 << 20)
        self.port = server.sockets[0].getsockname()[1]
        self.ready.set()
        await server.serve_forever()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 sink ESMTP\r\n")
        try:
            while line := await reader.readline():
                verb = line[:4].upper()
                if verb == b"EHLO":
                    writer.write(b"250-sink\r\n250 PIPELINING\r\n")
                elif verb == b"DATA":
                    writer.write(b"354 go\r\n")
                    text = await reader.readuntil(b"\r\n.\r\n")
                    self.arrived[re.search(rb"(?m)^Subject: (\S+)", text)[1].decode()] += 1
                    writer.write(b"250 2.0.0 taken\r\n")
                else:
                    writer.write(b"250 2.0.0 ok\r\n")
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def upstream_of_readme(ports: list) -> str:
    """The README's `upstream` block and `location` for two machines, with these ports."""
    block = re.search(r"```nginx two\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    for port in ports:
        block = re.sub(r"192\.0\.2\.\d+:2794", f"127.0.0.1:{port}", block, count=1)
    return block


class TwoBehindNginx(unittest.TestCase):
    def start(self, port: int) -> subprocess.Popen:
        command = [
            sys.executable,
            str(ROOT / "haineko.py"),
            "serve",
            "-c",
            self.settings,
            "--listen",
            f"127.0.0.1:{port}",
        ]
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                return server
            except OSError:
                time.sleep(0.01)

    def kill(self, server: subprocess.Popen) -> None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.sink, self.folder = Sink(), Path(folder.name)
        route = {"mailer": "ESMTP", "host": "127.0.0.1", "port": self.sink.port}
        settings = {
            "httpd": {"trusted_proxies": ["127.0.0.1"]},
            "recipients": {"open-relay": 1},
            "mailertable": {"default": route},
            "smtpd": {"hostname": "relay.example"},
        }
        self.settings = str(self.folder / "haineko.json")
        Path(self.settings).write_text(json.dumps(settings))
        self.ports, self.front = [free_port(), free_port()], free_port()
        self.servers = [self.start(port) for port in self.ports]
        self.addCleanup(lambda: [self.kill(server) for server in self.servers])
        block = upstream_of_readme(self.ports).replace("listen 443 ssl", f"listen 127.0.0.1:{self.front}")
        block = re.sub(r"(?m)^\s*(ssl_|server_name).*\n", "", block)
        places = "".join(
            f"{kind}_temp_path {folder.name}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        head = f"daemon off; pid {folder.name}/pid; error_log /dev/null; events {{}}"
        config = f"{head} http {{ access_log off; {places} {block} }}"
        (self.folder / "nginx.conf").write_text(config)
        nginx = subprocess.Popen(
            ["nginx", "-p", folder.name, "-c", str(self.folder / "nginx.conf")], stderr=subprocess.DEVNULL
        )
        self.addCleanup(nginx.wait)
        self.addCleanup(nginx.terminate)

    def post(self, numbers: list, statuses: dict) -> None:
        while numbers:
            name = f"mail{numbers.pop()}"
            mail = {"mail": "a@example.org", "rcpt": ["b@example.jp"], "header": {"subject": name}, "body": "Meow."}
            request = urllib.request.Request(f"http://127.0.0.1:{self.front}/submit", json.dumps(mail).encode())
            try:
                statuses[name] = urllib.request.urlopen(request, timeout=60).status
            except urllib.error.HTTPError as fault:
                statuses[name] = fault.code
            except OSError:
                statuses[name] = 0

    def test_one_killed_under_load(self) -> None:
        numbers, statuses = list(range(MAILS)), {}
        threads = [threading.Thread(target=self.post, args=(numbers, statuses)) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        while len(statuses) < MAILS // 3:
            time.sleep(0.01)
        self.kill(self.servers[0])
        while len(statuses) < MAILS * 2 // 3:
            time.sleep(0.01)
        self.servers[0] = self.start(self.ports[0])
        for thread in threads:
            thread.join()
        taken = [name for name, status in statuses.items() if status == 200]
        lost = [name for name in taken if not self.sink.arrived[name]]
        twice = [name for name, count in self.sink.arrived.items() if count > 1]
        print(
            f"{len(statuses)} posted, {len(taken)} answered 200, {len(lost)} of these lost, {len(twice)} arrived twice"
        )
        self.assertEqual(len(statuses), MAILS)
        self.assertEqual([lost, twice], [[], []])
        self.assertGreater(len(taken), MAILS * 0.95)


if __name__ == "__main__":
    unittest.main()
