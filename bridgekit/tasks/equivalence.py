"""Are two answers in LaTeX equal? math-verify says so, in a process of its own: `9^{9^{9^9}}` would never end.

    is_readable("9^{9^{9^9}}")        # False, once the worker has spent LIMIT seconds of its processor's time
    are_equal("\\frac12", "0.5")      # True

The worker counts its processor's time, so that a busy machine scores as an idle one does; it ends itself there, and the
next question starts another. It also ends when its input does, with the process that asked.
"""

import functools
import json
import os
import subprocess
import sys
import threading

LIMIT = 2.0  # seconds of processor time for one question
MEMORY = 4 << 30  # bytes
MOST_CHARACTERS = 500  # a longer text in a box is no answer


@functools.cache
def is_readable(answer: str) -> bool:
    """Whether an answer can be read within the limits."""
    return len(answer) <= MOST_CHARACTERS and bool(WORKER.ask(answer))


@functools.cache
def are_equal(gold: str, answer: str) -> bool:
    """Whether an answer is the gold one, written in whatever way."""
    return "".join(gold.split()) == "".join(answer.split()) or is_readable(answer) and bool(WORKER.ask(gold, answer))


class Worker:
    """The process that asks math-verify, started at the first question and again after one that it did not survive."""

    def __init__(self) -> None:
        self.process, self.owner, self.lock = None, 0, threading.Lock()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, encoding="utf-8", start_new_session=True,
        )  # fmt: skip
        self.owner = os.getpid()  # a forked process starts its own
        if not self.process.stdout.readline():
            why = self.process.communicate()[1].strip().rpartition("\n")[2]
            raise RuntimeError(f"task math: its answers cannot be compared ({why}): pip install math-verify")

    def ask(self, *answers: str) -> bool | None:
        """Can this answer be read, or are these two equal? None where the worker ended at its limits."""
        with self.lock:
            if self.process is None or self.owner != os.getpid():
                self.start()
            try:
                self.process.stdin.write(json.dumps(answers) + "\n")
                self.process.stdin.flush()
                line = self.process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if line:
                return json.loads(line)
            self.process.kill()
            self.process.communicate()
            self.process = None
            return None


WORKER = Worker()


def serve() -> None:
    """Answer questions, one a line, until there are no more."""
    import logging
    import resource
    import signal

    from math_verify import parse, verify

    logging.disable()
    replies, sys.stdout, sys.stderr = sys.stdout, open(os.devnull, "w"), open(os.devnull, "w")
    read = functools.lru_cache(4096)(lambda answer: parse(f"\\boxed{{{answer}}}", parsing_timeout=None))

    def answer(texts: list[str]) -> bool:
        parsed = [read(text) for text in texts]
        equal = verify(parsed[0], parsed[-1] if parsed[1:] else read("7"), timeout_seconds=None)  # takes their values
        return equal or len(parsed) == 1

    answer(["\\frac{1}{2}", "\\sin x"])  # what is loaded at first use does not count
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, LIMIT)  # at its end the signal ends this process
        try:
            found = answer(json.loads(line))
        except Exception:  # math-verify's own, sympy's, no memory, too deep
            found = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(bool(found)), file=replies, flush=True)


if __name__ == "__main__":
    serve()
