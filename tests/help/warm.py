"""Commands in forks of one process that has imported torch and transformers already.

A page of the documentation starts some tens of interpreters, and each would spend seconds on the
same imports. Here one server imports them once; ``spacompiler`` on PATH and blocks of Python are
forks of it, with the arguments, directory, environment and standard streams of who asked.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as to:
    to.connect({address!r})
    socket.send_fds(to, [b"."], [0, 1, 2])
    asked = {{"words": {first!r} + sys.argv[1:], "place": os.getcwd(), "env": dict(os.environ)}}
    to.sendall(json.dumps(asked).encode() + b"\\n")
    sys.exit(int(to.makefile().read() or 70))
"""


class Warm:
    """The server, and a directory for PATH with ``spacompiler`` and ``warm-python CODE`` in it."""

    def __init__(self, place: Path) -> None:
        address, self.path = str(place / "socket"), place / "bin"
        self.path.mkdir()
        for name, first in (("spacompiler", ["spacompiler"]), ("warm-python", ["python"])):
            script = self.path / name
            script.write_text(CLIENT.format(python=sys.executable, address=address, first=first))
            script.chmod(0o755)
        self.server = subprocess.Popen([sys.executable, __file__, address],
                                       stdout=subprocess.PIPE, text=True)
        assert self.server.stdout is not None and self.server.stdout.readline() == "ready\n"

    def stop(self) -> None:
        """End the server."""
        self.server.kill()
        self.server.wait()


def serve(address: str) -> None:
    """Answer every connection with a fork that runs what it asks for."""
    import torch  # noqa: F401
    import transformers.generation
    import transformers.modeling_utils  # noqa: F401

    import spacompiler.cli.main  # noqa: F401

    with socket.socket(socket.AF_UNIX) as at:
        at.bind(address)
        at.listen()
        print("ready", flush=True)
        while True:
            to, _ = at.accept()
            if os.fork() == 0:
                if os.fork() == 0:
                    at.close()
                    answer(to)
                os._exit(0)
            os.wait()
            to.close()


def answer(to: socket.socket) -> None:
    """Run one request in a fork of its own, and send its exit status."""
    _, streams, _, _ = socket.recv_fds(to, 1, 3)
    asked = json.loads(to.makefile().readline())
    child = os.fork()
    if child == 0:
        to.close()
        for stream, number in zip(streams, range(3), strict=True):
            os.dup2(stream, number)
        os.chdir(asked["place"])
        os.environ.clear()
        os.environ.update(asked["env"])
        run(*asked["words"])
    _, status = os.waitpid(child, 0)
    to.sendall(str(os.waitstatus_to_exitcode(status) & 255).encode())
    os._exit(0)


def run(what: str, *words: str) -> None:
    """Be ``spacompiler WORDS`` or ``python -c WORD``, and end as that process would."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.path[0] = "" if what == "python" else str(Path(sys.executable).parent)
    code = "from spacompiler.cli.main import main\nmain()" if what == "spacompiler" else words[0]
    sys.argv = ["spacompiler", *words] if what == "spacompiler" else ["-c"]
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), main.__dict__)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    import atexit

    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])
