"""A process that makes one call after another, with the code of this tree or of another one."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Failed(Exception):
    """A call raised, or its process died; the text says which."""


class Worker:
    """A process in which functions of a tree are called; ``is_sound`` while it lives and its device answers."""

    def __init__(self, tree: Path = ROOT):
        paths = os.pathsep.join((str(tree), str(tree / "kernels"), os.environ.get("PYTHONPATH", "")))
        command, self.is_sound = [sys.executable, "-m", "benchmarks.worker"], True
        self.process = subprocess.Popen(command, cwd=tree, env=os.environ | {"PYTHONPATH": paths}, stdin=-1, stdout=-1)

    def call(self, function: Callable, *args, seconds: float | None = None):
        """What a function returns there; it is found by its module and name.

        Raises:
            Failed: It raised, or the process died.
            TimeoutError: It took longer than ``seconds``; the process is ended.
        """
        answer, cause, self.is_sound = None, "its process died", False
        try:
            with contextlib.suppress(EOFError, BrokenPipeError):
                pickle.dump(pickle.dumps((function, args)), self.process.stdin)
                self.process.stdin.flush()
                if not select.select([self.process.stdout], [], [], seconds)[0]:
                    raise TimeoutError("it took too long")
                answer, cause, self.is_sound = pickle.load(self.process.stdout)
        finally:
            if not self.is_sound:
                self.close()
        if cause:
            raise Failed(cause)
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        with contextlib.suppress(BrokenPipeError), self.process:
            pass


def serve() -> None:
    """Make the calls that stdin asks for. After a fault in a kernel the device answers no more: that is told, too."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what calls print is no answer
    is_sound = True
    while is_sound:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:  # there are no more
            return
        answer, cause = None, ""
        try:
            function, args = pickle.loads(request)
            answer = function(*args)
        except Exception as error:
            traceback.print_exc()
            cause = f"{type(error).__name__}: {str(error).strip()[:300]}"
        torch = sys.modules.get("torch")
        try:
            if torch and torch.cuda.is_initialized():
                torch.cuda.synchronize()
        except RuntimeError:
            is_sound = False
        pickle.dump((answer, cause, is_sound), answers)
        answers.flush()


if __name__ == "__main__":
    serve()
