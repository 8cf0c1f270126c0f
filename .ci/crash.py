#!/usr/bin/env python3
"""Two hundred rounds of the crash test of the queue: load, peers that fail, SIGKILL; exit 1 where a mail was lost.

.ci/crash.py [ROUNDS [SEED]]
"""

import os
import subprocess
import sys

here = os.path.dirname(os.path.abspath(__file__))
top = os.path.dirname(here) if os.path.basename(here) == ".ci" else here
name = "test_haineko" if os.path.exists(os.path.join(top, "test_haineko.py")) else "test_queue"
values = dict(zip(("HAINEKO_CRASH_ROUNDS", "HAINEKO_CRASH_SEED"), [*sys.argv[1:3], "200"][: max(len(sys.argv) - 1, 1)]))
words = [sys.executable, "-m", "unittest", f"{name}.QueueCrash"]
sys.exit(subprocess.run(words, cwd=top, env={**os.environ, **values}, check=False).returncode)
