"""What Twisted names and the wrapper never uses is imported when something asks for it, and not before."""

from __future__ import annotations

import subprocess
import sys

BEGIN = "import sys\nfrom vmcontrol import lean\nlean.begin()\n"


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", BEGIN + script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_wrapper_imports_neither_asyncio_nor_ssl() -> None:
    script = "from vmwrapper import runner\nprint([n for n in ('asyncio.events', 'ssl', 'email', 'urllib.request')"
    assert run(script + " if n in sys.modules])") == "[]"


def test_coroutines_run_all_the_same() -> None:
    script = (
        "from twisted.internet.defer import Deferred, succeed\n"
        "async def work():\n    return 1 + await succeed(2)\n"
        "Deferred.fromCoroutine(work()).addCallback(print)\n"
    )
    assert run(script) == "3"


def test_who_wants_the_real_modules_gets_them() -> None:
    assert run("from http.cookiejar import CookieJar\nprint(CookieJar())") == "<CookieJar[]>"
    assert run("import http.cookiejar\nprint(http.cookiejar.CookieJar())") == "<CookieJar[]>"
    script = "import asyncio\nasync def work():\n    return 3\nprint(asyncio.run(work()))"
    assert run(script) == "3"
    assert run("import twisted.internet.defer, inspect\ninspect.getmodule(print)\nprint(1)") == "1"
