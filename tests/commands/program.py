"""The program `memtx` as forks of one child process that has imported Lightning.

Each call has its own exit code and stderr, and takes tenths of a second instead of seconds.
"""

from __future__ import annotations

import json
import os
import socket
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


def free_port() -> int:
    """Return an unused port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Program:
    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        command = [sys.executable, str(Path(__file__)), "serve"]
        self._server = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HOME
        )

    def __call__(self, *argv: str, cwd: Path, ranks: int = 0, environment: dict[str, str] | None = None) -> Done:
        """Run the program once, or in ``ranks`` processes with the environment that torchrun gives them."""
        environments = [environment or {}]
        if ranks:
            common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            common |= {"MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "test", **(environment or {})}
            environments = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        return self.together(*argv, cwd=cwd, environments=environments)

    def together(self, *argv: str, cwd: Path, environments: list[dict[str, str]]) -> Done:
        """Run the program in one process per environment; the code is the first one that is not 0."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps({"argv": argv, "cwd": str(cwd), "environments": environments}) + "\n")
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
        request = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            children = []
            for environment in request["environments"]:
                children.append(os.fork())
                if not children[-1]:
                    os.environ.update(environment)
                    os.chdir(request["cwd"])
                    os.dup2(out.fileno(), 1)
                    os.dup2(err.fileno(), 2)
                    sys.argv = ["memtx"]
                    # As in the installed script, an exception prints a traceback and gives exit code 1.
                    code: int | str | None = 1
                    try:
                        code = main(request["argv"])
                    except SystemExit as error:
                        code = error.code
                    except BaseException:
                        sys.excepthook(*sys.exc_info())
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code if isinstance(code, int) else 0 if code is None else 1)
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            out.seek(0)
            err.seek(0)
            failure = next((code for code in codes if code), 0)
            response = {"code": failure, "out": out.read().decode(), "err": err.read().decode()}
        sys.stdout.write(json.dumps(response) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
