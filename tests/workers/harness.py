"""Starts processes on this machine that train together, and gives them jobs.

A job is a function of a module in this folder, which takes the strategy first. Each worker runs it
with the same arguments, and writes what it returns into a file.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from workers import answers

TESTS = Path(__file__).parents[1]
#: Seconds, on a machine that does other things, too.
START, JOB = 240, 240
ATTEMPTS = 3
TAIL = 3000
TAKEN = re.compile(r"[Aa]ddress already in use|Could not start gRPC server")


class WorkerError(AssertionError):
    """A worker failed, ended or took too long; with the last that each has printed."""


class Team:
    """Workers of one `MultiWorkerMirroredStrategy`, each a process; killed on leaving `with`.

    Args:
        size: How many.
        folder: Where their output and their answers are written; made anew.
        environment: What their processes have beside that of this one.
    """

    def __init__(self, size, folder, environment=()):
        self.size = size
        self.folder = Path(folder)
        self._environment = dict(environment)
        self._processes = []
        self._jobs = 0

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    def start(self):
        """Start all, on other ports if one has been taken in the meantime; returns itself."""
        for attempt in range(ATTEMPTS):
            self._start(attempt)
            try:
                self.results(START)
            except WorkerError as error:
                if attempt + 1 == ATTEMPTS or not TAKEN.search(str(error)):
                    raise
            except BaseException:
                self.stop()
                raise
            else:
                break
        return self

    def _start(self, attempt):
        self.stop()
        self._jobs = 0
        self._place = self.folder / str(attempt)
        self._place.mkdir(parents=True)
        addresses = [f"127.0.0.1:{port}" for port in free_ports(self.size)]
        paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        for index in range(self.size):
            task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "TF_CONFIG": json.dumps(task),
                "CUDA_VISIBLE_DEVICES": "-1",
                "PYTHONUNBUFFERED": "1",
                "PYTHONFAULTHANDLER": "1",
                **self._environment,
            }
            with self._output(index).open("wb") as output:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "workers.worker", self._place, str(index)],
                        env=environment,
                        stdin=subprocess.PIPE,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def begin(self, job, **arguments):
        """Have all workers begin with a job: "module.function", and what JSON can hold."""
        self._jobs += 1
        order = json.dumps({"job": job, "arguments": arguments}) + "\n"
        try:
            for process in self._processes:
                process.stdin.write(order.encode())
                process.stdin.flush()
        except BrokenPipeError:
            self._fail("has ended before its job")

    def results(self, seconds=JOB):
        """What each worker's job returned."""
        deadline = time.monotonic() + seconds
        files = [self._place / answers.name_of(self._jobs, index) for index in range(self.size)]
        waiting = list(range(self.size))
        while waiting:
            for index in list(waiting):
                if files[index].exists():
                    waiting.remove(index)
                elif self._processes[index].poll() is not None and not files[index].exists():
                    self._fail(f"{index} ended with {self._processes[index].returncode}")
            if waiting and time.monotonic() > deadline:
                self._fail(f"{', '.join(map(str, waiting))} took more than {seconds} s")
            time.sleep(0.01)
        return [answers.read(file) for file in files]

    def do(self, job, seconds=JOB, **arguments):
        """What each worker's job returned, as soon as all are done."""
        self.begin(job, **arguments)
        return self.results(seconds)

    def kill(self, index):
        """Kill one worker, and wait for its end."""
        process = self._processes[index]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)

    def stop(self):
        """Kill all workers, and wait for their ends."""
        for index in range(len(self._processes)):
            self.kill(index)
            with contextlib.suppress(BrokenPipeError):
                self._processes[index].stdin.close()
        self._processes.clear()

    @property
    def is_running(self):
        """Whether all workers are there."""
        return bool(self._processes) and all(each.poll() is None for each in self._processes)

    def _output(self, index):
        return self._place / f"output-{index}.txt"

    def _fail(self, what):
        self.stop()
        tails = [self._output(index).read_text(errors="replace") for index in range(self.size)]
        lines = [f"--- worker {index}:\n{tail[-TAIL:]}" for index, tail in enumerate(tails)]
        raise WorkerError("\n".join([f"worker {what}", *lines]))


def free_ports(count):
    """Ports that nobody listened on a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
