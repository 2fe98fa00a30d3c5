"""The program `memtx` as a child process that has imported Lightning already: each call is a fork of one server.

So a call has its own exit code and its own stderr, and costs tenths of a second instead of seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import memtx

HOME = Path(memtx.__file__).parent.parent


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


class Program:
    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        command = [sys.executable, str(Path(__file__)), "serve"]
        self._server = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HOME
        )

    def __call__(self, *argv: str, at: Path) -> Done:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps({"argv": argv, "at": str(at)}) + "\n")
        self._server.stdin.flush()
        return Done(**json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=30)


def serve() -> None:
    import memtx.cli.fit  # noqa: F401
    from memtx.cli.main import main

    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if not child:
                os.chdir(asked["at"])
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.argv = ["memtx"]
                # As the installed script does: an exception is a traceback and exit code 1.
                code: int | str | None = 1
                try:
                    code = main(asked["argv"])
                except SystemExit as stopped:
                    code = stopped.code
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 0 if code is None else 1)
            _, status = os.waitpid(child, 0)
            out.seek(0)
            err.seek(0)
            answer = {"code": os.waitstatus_to_exitcode(status), "out": out.read().decode(), "err": err.read().decode()}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
