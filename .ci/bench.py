#!/usr/bin/env python3
"""How the cost of a mail grows, on this machine, in one table and under two minutes.

    python3 .ci/bench.py            # all of it
    python3 .ci/bench.py clients    # the rows that begin so

Needs Debian's wrk and postfix; beside swaks and nodemailer where these are (npm puts the latter into the folder for
temporary files, once). Postfix takes mail into a queue of its own where this is run by root.
Ratios within a run can be trusted, figures of two runs can't.
"""

import base64
import contextlib
import json
import os
import platform
import re
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
local f = assert(io.open(os.getenv("PAYLOAD"), "rb"))
wrk.method, wrk.body = "POST", f:read("*a")
wrk.headers["Content-Type"] = "application/json"
done = function(summary, latency)
  local e = summary.errors
  io.write(string.format("RESULT %.3f %.3f %.3f %d\\n", summary.requests / (summary.duration / 1e6),
    latency:percentile(50) / 1000, latency:percentile(99) / 1000, e.status + e.connect + e.read + e.write + e.timeout))
end
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    except OSError:
        return False


class Sink:
    """Postfix's smtp-sink: takes everything."""

    def __init__(self) -> None:
        self.port = free_port()
        command = ["/usr/sbin/smtp-sink", "-u", "nobody", "-m", "2048", f"127.0.0.1:{self.port}", "1024"]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not answers(self.port):
            time.sleep(0.01)


class Server:
    """A Haineko with these changes to its settings, ready when it has answered."""

    def __init__(self, folder: str, sink: Sink, workers: int = 0, **changes: dict) -> None:
        self.port, path = free_port(), Path(folder, "haineko.json")
        settings = {
            "httpd": {"workers": workers, "max_connections": 4096},
            "smtpd": {"hostname": "haineko.example.org", "max_message_size": 0, "max_rcpts_per_message": 0},
            "recipients": {"domainpart": ["example.jp"]},
            "mailertable": {"default": {"mailer": "ESMTP", "host": "127.0.0.1", "port": sink.port}},
        }
        settings.update(changes)
        path.write_text(json.dumps(settings))
        path.chmod(0o600)
        began = time.monotonic()
        command = [
            sys.executable,
            str(ROOT / "haineko.py"),
            "serve",
            "-c",
            str(path),
            "--listen",
            f"127.0.0.1:{self.port}",
        ]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not self._ready():
            time.sleep(0.002)
        self.ready_ms = (time.monotonic() - began) * 1000

    def _ready(self) -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).status == 200
        except OSError:
            return False

    def family(self) -> list:
        children = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False)
        return [self.process.pid, *map(int, children.stdout.split())]

    def memory_mib(self, what: str = "Pss") -> float:
        found = [
            re.search(rf"^{what}:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
            for pid in self.family()
        ]
        return sum(int(item[1]) for item in found) / 1024

    def load(self, folder: str, mail: dict, clients: int, seconds: int = 2) -> tuple:
        """(requests a second, p50 ms, p99 ms, bad ones)"""
        payload, script = Path(folder, "payload.json"), Path(folder, "submit.lua")
        payload.write_text(json.dumps(mail, ensure_ascii=False))
        script.write_text(SCRIPT)
        command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "20s", "-s", str(script)]
        env = {**os.environ, "PAYLOAD": str(payload)}
        url = f"http://127.0.0.1:{self.port}/submit"
        out = subprocess.run([*command, url], env=env, capture_output=True, text=True, check=True).stdout
        return tuple(float(item) for item in re.search(r"RESULT (\S+) (\S+) (\S+) (\d+)", out).groups())

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def mail(recipients: int = 1, octets: int = 1024) -> dict:
    line = "新年明けましておめでとうございます。\n"
    return {
        "ehlo": "[127.0.0.1]",
        "mail": "kijitora@example.org",
        "rcpt": [f"neko{i}@example.jp" for i in range(recipients)],
        "header": {"from": "Kijitora <kijitora@example.org>", "subject": "謹賀新年"},
        "body": line * max(1, octets // len(line.encode())),
    }


def row(what: str, rate: float, p99: float, bad: float, mib: float, note: str = "") -> None:
    print(
        f"{what:34}{rate:>10.0f}{1e6 / rate if rate else 0:>12.0f}{p99:>10.1f}{bad:>6.0f}{mib:>8.0f}  {note}",
        flush=True,
    )


def bench_clients(folder: str, sink: Sink) -> None:
    server = Server(folder, sink)
    for clients in (1, 8, 64, 256, 1024):
        rate, _, p99, bad = server.load(folder, mail(), clients)
        row(f"clients {clients}", rate, p99, bad, server.memory_mib())
    server.stop()


def bench_idle(folder: str, sink: Sink) -> None:
    server, rates = Server(folder, sink), []
    server.load(folder, mail(), 8, 1)
    for idle in (0, 1000, 0, 1000):
        socks = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(idle)]
        for sock in socks:
            sock.sendall(b"GET /neko HTTP/1.1\r\nHost: x\r\n\r\n")
        for sock in socks:
            sock.recv(4096)
        rate, _, p99, bad = server.load(folder, mail(), 8)
        rates.append(rate)
        row(f"idle connections {idle}, clients 8", rate, p99, bad, server.memory_mib())
        for sock in socks:
            sock.close()
    print(f"{'':34}kept with 1000 idle: {(rates[1] + rates[3]) / (rates[0] + rates[2]):.2f}")
    server.stop()


def bench_recipients(folder: str, sink: Sink) -> None:
    server = Server(folder, sink)
    for count in (1, 4, 16, 64):
        rate, _, p99, bad = server.load(folder, mail(count), 2)
        row(f"recipients {count}", rate * count, p99, bad, server.memory_mib(), "rate and time per recipient")
    server.stop()


def bench_bodies(folder: str, sink: Sink) -> None:
    server = Server(folder, sink)
    for octets in (1 << 10, 10 << 10, 100 << 10, 1 << 20, 10 << 20):
        rate, _, p99, bad = server.load(folder, mail(octets=octets), 2, 2 if octets < 10 << 20 else 3)
        row(f"body {octets >> 10} KiB", rate, p99, bad, server.memory_mib(), f"{rate * octets / 1e6:.1f} MB/s")
    server.stop()


def bench_tables(folder: str, sink: Sink) -> None:
    route = {"mailer": "ESMTP", "host": "127.0.0.1", "port": sink.port}
    for count in (1, 100_000):
        table = {f"d{i}.example.com": {"mailer": "Discard"} for i in range(count)}
        server = Server(folder, sink, mailertable={**table, ".example.jp": route, "default": route})
        rate, _, p99, bad = server.load(folder, mail(), 8)
        row(f"routes {count}", rate, p99, bad, server.memory_mib(), f"ready in {server.ready_ms:.0f} ms")
        server.stop()
    for count in (10, 100_000):
        hosts = [f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}" for i in range(count)]
        domains = [f"d{i}.example.com" for i in range(count)]
        server = Server(
            folder,
            sink,
            relayhosts={"relayhosts": [*hosts, "127.0.0.0/8"]},
            recipients={"domainpart": [*domains, "example.jp"], "recipients": [f"a@{d}" for d in domains]},
        )
        rate, _, p99, bad = server.load(folder, mail(), 8)
        row(
            f"relayhosts, recipients {count}", rate, p99, bad, server.memory_mib(), f"ready in {server.ready_ms:.0f} ms"
        )
        server.stop()


def bench_workers(folder: str, sink: Sink) -> None:
    for workers in (1, 2, 4, 8):
        server = Server(folder, sink, workers)
        server.load(folder, mail(), 64, 1)
        rate, _, p99, bad = server.load(folder, mail(), 64)
        row(f"workers {workers}, clients 64", rate, p99, bad, server.memory_mib())
        server.stop()


def seconds_of(code: str) -> float:
    """Of a new Python that runs the code; the median of five."""
    env, times = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}, []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], env=env, check=True)
        times.append(time.perf_counter() - began)
    return sorted(times)[2]


def bench_start(folder: str, sink: Sink) -> None:
    nothing, base, ours = (seconds_of(code) for code in ("pass", "import http.server, smtplib, json", "import haineko"))
    print(f"import: nothing {nothing * 1000:.0f} ms, http.server smtplib json {base * 1000:.0f} ms, ", end="")
    alone = (ours - nothing) / (base - nothing)
    print(f"haineko {ours * 1000:.0f} ms ({ours / base:.2f} x; less the interpreter: {alone:.2f} x)")
    ready = []
    for _ in range(3):
        server = Server(folder, sink)
        ready.append(server.ready_ms)
        server.stop()
    middle = sorted(ready)[1]
    print(f"ready after start: {middle:.0f} ms, {middle - nothing * 1000:.0f} ms more than `python3 -c pass`")


ATTACHMENT = 25_000_000  # octets
NODEMAILER = """
const [port, path] = process.argv.slice(1);
const transport = require("nodemailer").createTransport({host: "127.0.0.1", port: Number(port), ignoreTLS: true});
(async () => {
  for (let i = 0; i < 3; i++) {
    const began = process.hrtime.bigint();
    await transport.sendMail({from: "a@example.org", to: "b@example.jp", text: "Nyaa", attachments: [{path}]});
    console.log(Number(process.hrtime.bigint() - began) / 1e9);
  }
})();
"""


def bench_attachments(folder: str, sink: Sink) -> None:
    """One of 25 MB, from its client until the sink has it."""
    path = Path(folder, "neko.bin")
    path.write_bytes(os.urandom(1 << 20) * (ATTACHMENT >> 20))
    size = path.stat().st_size
    content = base64.b64encode(path.read_bytes())
    message = len(content) / 76 * 78
    server = Server(folder, sink, 1)
    server.load(folder, mail(), 2, 1)
    worker = server.family()[1]
    before = status_of(worker, "VmRSS")
    Path(f"/proc/{worker}/clear_refs").write_text("5")  # VmHWM starts over
    payload = json.dumps({**mail(), "attachments": [{"filename": "neko.bin", "content": content.decode()}]}).encode()
    ours = sorted(seconds_of_post(server.port, payload) for _ in range(3))[1]
    above = status_of(worker, "VmHWM") - before
    server.stop()
    rates = {"haineko": size / ours, **rates_of_others(path, size, sink)}
    for name, rate in rates.items():
        print(f"{f'attachment of 25 MB, {name}':34}{rate / 1e6:>10.1f} MB/s")
    print(f"{'':34}{above / message:.1f} x the finished message of {message / 1e6:.1f} MB: peak of a worker above idle")


def seconds_of_post(port: int, payload: bytes) -> float:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/submit", payload, {"Content-Type": "application/json"})
    began = time.perf_counter()
    urllib.request.urlopen(request, timeout=60).read()
    return time.perf_counter() - began


def status_of(pid: int, what: str) -> int:
    """Octets."""
    return int(re.search(rf"^{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)[1]) * 1024


def rates_of_others(path: Path, size: int, sink: Sink) -> dict:
    """{name: octets a second} of those that are here, with the same file and sink."""
    rates = {}
    if shutil.which("swaks"):
        command = ["swaks", "--server", f"127.0.0.1:{sink.port}", "--from", "a@example.org", "--to", "b@example.jp"]
        began = time.perf_counter()
        subprocess.run([*command, "--attach", f"@{path}", "--suppress-data", "--silent", "2"], check=True)
        rates["swaks --attach"] = size / (time.perf_counter() - began)
    else:
        print("no swaks here")
    packages = Path(tempfile.gettempdir(), "haineko-bench-nodemailer")
    install = ["npm", "install", "--silent", "--no-fund", "--no-audit", "--prefix", str(packages), "nodemailer@7"]
    if not shutil.which("npm"):
        print("no npm here, so no nodemailer")
    elif (packages / "node_modules").is_dir() or not subprocess.run(install, check=False).returncode:
        command = ["node", "-e", NODEMAILER, str(sink.port), str(path)]
        env = {**os.environ, "NODE_PATH": str(packages / "node_modules")}
        times = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()
        rates["nodemailer"] = size / sorted(map(float, times))[1]
    else:
        print("nodemailer can't be installed")
    return rates


def bench_queue(folder: str, sink: Sink) -> None:
    rates = {}
    dead = {"mailertable": {"default": {"port": 1}}}
    for name, later, changes in (
        ("direct, no queue", False, {}),
        ("direct, with the queue", False, {"queue": {"path": "direct.db"}}),
        ("async", True, {"queue": {"path": "async.db"}}),
        ("next hop dead", False, {"queue": {"path": "dead.db", "retry_after": [3600]}, **dead}),
    ):
        server = Server(folder, sink, **changes)
        rates[name], _, p99, bad = server.load(folder, {**mail(), **({"async": True} if later else {})}, 64)
        row(f"queue, {name}", rates[name], p99, bad, server.memory_mib())
        server.stop()
    if os.getuid() == 0:
        with postfix(folder) as port:
            rates["postfix"] = source(port, 12000)
        row("queue, postfix takes it", rates["postfix"], 0, 0, 0, f"async is {rates['async'] / rates['postfix']:.2f} x")
    else:
        print("not root, so no postfix")
    direct = rates["direct, no queue"]
    print(f"{'':34}async: {rates['async'] / direct:.2f} x direct; direct with it: ", end="")
    print(f"{rates['direct, with the queue'] / direct:.2f} x direct without")
    waiting(folder, sink, 100_000)


def source(port: int, count: int) -> float:
    """Messages a second that postfix's own client puts into a server over 64 kept connections."""
    command = ["/usr/sbin/smtp-source", "-d", "-s", "64", "-l", "1024", "-f", "a@example.org", "-t", "b@example.jp"]
    began = time.monotonic()
    subprocess.run([*command, "-m", str(count), f"127.0.0.1:{port}"], check=True)
    return count / (time.monotonic() - began)


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
mynetworks = 127.0.0.0/8
alias_maps =
alias_database =
smtpd_relay_restrictions = permit_mynetworks, reject
smtpd_sender_restrictions = check_sender_access static:HOLD
smtpd_client_connection_count_limit = 0
smtpd_peername_lookup = no
"""
MASTER_CF = """\
127.0.0.1:{port} inet n - n - 200 smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
smtp unix - - n - - error
anvil unix - - n - 1 anvil
postlog unix-dgram n - n - 1 postlogd
"""


@contextlib.contextmanager
def postfix(folder: str) -> Iterator[int]:
    """The port of a postfix that takes everything into its queue and leaves it there."""
    home, port = Path(folder, "postfix"), free_port()
    for name in ("etc", "queue", "data", "log"):
        (home / name).mkdir(parents=True)
    Path(folder).chmod(0o755)  # postfix gives up root
    shutil.chown(home / "data", "postfix")
    (home / "etc" / "main.cf").write_text(MAIN_CF.format(folder=home))
    (home / "etc" / "master.cf").write_text(MASTER_CF.format(port=port))
    command = ["/usr/sbin/postfix", "-c", str(home / "etc")]
    subprocess.run([*command, "start"], check=True, capture_output=True)
    try:
        while not answers(port):
            time.sleep(0.01)
        yield port
    finally:
        subprocess.run([*command, "stop"], check=True, capture_output=True)


def waiting(folder: str, sink: Sink, count: int) -> None:
    """What a queue costs in which so many mails wait."""
    settings, began = {"path": "waiting.db", "min_free": 0}, time.monotonic()
    empty = Server(folder, sink)
    memory = empty.memory_mib()
    empty.stop()
    fill(str(Path(folder, settings["path"])), count)
    filled = time.monotonic() - began
    server = Server(folder, sink, queue=settings, mailertable={"default": {"port": 1}})
    began = time.monotonic()
    counted = json.load(urllib.request.urlopen(f"http://127.0.0.1:{server.port}/queue", timeout=20))["waiting"]
    asked = time.monotonic() - began
    above, began = server.memory_mib() - memory, time.monotonic()
    command = [sys.executable, str(ROOT / "haineko.py"), "queue", "list", "-c", str(Path(folder, "haineko.json"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as listing:
        listing.stdout.readline()
        first = time.monotonic() - began
        listing.kill()
    server.stop()
    print(f"{counted} mails wait (filled in {filled:.1f} s): ready in {server.ready_ms:.0f} ms, {above:.1f} MiB more, ")
    print(f"{'':34}GET /queue {asked * 1000:.0f} ms, `queue list | head -1` {first * 1000:.0f} ms")


def fill(path: str, count: int) -> None:
    """Mails in the file as if each had been tried once: a thousand by Haineko, copies of them by SQLite."""
    sys.path.insert(0, str(ROOT))
    import haineko

    store, now, first = haineko.QueueDB(haineko.QueueSettings(path=path)), time.time(), 1000
    message = haineko.Message((b"Subject: Nyaa\r\nTo: ", b"\r\nMessage-Id: <", b"@x>\r\n\r\n" + b"x" * 1024 + b"\r\n"))
    place = {"mailer": "ESMTP", "host": "127.0.0.1", "port": 1}
    reply = haineko.make_reply("lost", "Connection refused", command="CONN", **place)
    work, fate = [], haineko.AttemptResult(reply, "open", 3600)
    for i in range(first):
        to = haineko.NewRecipient(*[f"neko{i}@example.jp"] * 2, 1, f"ESMTP 127.0.0.{i % 5}:1")
        entry = haineko.QueueItem(f"{i:016d}", "mail", "kijitora@example.org", "", now, message, (to,))
        work.append((haineko.enqueue, (entry, [fate])))
    store.commit(work)
    store.commit([(copy, (first, count // first))])
    store.close(True)


def copy(db: sqlite3.Connection, slot: int, first: int, times: int) -> None:
    for table, other in (("messages", "queueid"), ("recipients", "message")):
        names = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
        changed = {"id": "id + :more", other: "message + :more" if other == "message" else "queueid || :more"}
        columns = ", ".join(changed.get(name, name) for name in names)
        for i in range(1, times):
            db.execute(f"INSERT INTO {table} SELECT {columns} FROM {table} WHERE id <= {first}", {"more": i * first})


BENCHES = {
    "start": bench_start,
    "clients": bench_clients,
    "idle": bench_idle,
    "recipients": bench_recipients,
    "bodies": bench_bodies,
    "tables": bench_tables,
    "workers": bench_workers,
    "attachments": bench_attachments,
    "queue": bench_queue,
}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    print(f"{'':34}{'a second':>10}{'us a mail':>12}{'p99 ms':>10}{'bad':>6}{'MiB':>8}")
    with tempfile.TemporaryDirectory() as folder:
        sink = Sink()
        try:
            for name, bench in BENCHES.items():
                if name.startswith(tuple(sys.argv[1:]) or ""):
                    bench(folder, sink)
        finally:
            sink.process.terminate()


if __name__ == "__main__":
    main()
