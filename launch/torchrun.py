"""torchrun that knows how this trainer ends: python launch/torchrun.py ARGUMENTS... train.py ...

It takes the arguments of torchrun, whose own agent

- ends with 1, however its ranks ended: a scheduler cannot tell a typing error from a preemption;
- starts ranks again whatever they ended with;
- kills ranks 30 seconds after it was told to stop: too few to save a large model.

This one ends with the code that a rank gives as the reason, starts no rank again that has said
that starting again is of no use, and on a signal waits for the ranks as long as the scheduler
lets it live.

Source: torch 2.11 distributed/elastic/agent/server/{api,local_elastic_agent}.py.
"""

import signal
import sys
import time
from collections.abc import Iterable

import torch.distributed.launcher.api as launcher
from torch.distributed.elastic.agent.server import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import main as torchrun

# nemomodel/train/faults.py says what they mean; importing it would load the whole trainer.
REASONS = (2, 3, 4, 5, 75)
FINAL = frozenset((2, 3, 75))
"""Ranks that ended so would end so again, or were asked to stop."""
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""Schedulers differ in what they send; the ranks get SIGTERM for each."""
PATIENCE = 7 * 24 * 3600
"""Seconds: for ever, as schedulers count."""
LAST_WORDS = 15
"""Seconds that the other ranks of a node have to end by themselves when one has given a reason.
The agent would kill them at once, and with them the message of the rank that the console shows."""


class Agent(LocalElasticAgent):
    """Of one node: starts its ranks, watches them, and starts them again."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        ranks = [handler.proc for handler in self._pcontext.subprocess_handlers.values()]
        if any(rank.poll() in REASONS for rank in ranks):
            end = time.monotonic() + LAST_WORDS
            while None in [rank.poll() for rank in ranks] and time.monotonic() < end:
                time.sleep(0.05)
        result = super()._monitor_workers(worker_group)
        for rank, failure in sorted(result.failures.items()):
            log = self._pcontext.stderrs[failure.local_rank] or "its messages"
            say(f"rank {rank} ended with {failure.exitcode}, see {log}")
        if any(failure.exitcode in FINAL for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result

    def _invoke_run(self, role: str = "default") -> RunResult:
        try:
            return super()._invoke_run(role)
        except SignalException as stop:
            if self._pcontext is None:  # no rank was started yet
                raise
            for name in STOP_SIGNALS:  # the first one is being obeyed
                signal.signal(getattr(signal, name), signal.SIG_IGN)
            say(f"{stop.sigval.name}: waiting for the ranks to save and end")
            self._pcontext.close(signal.SIGTERM, timeout=PATIENCE)
            return self._monitor_workers(self._worker_group)


def exit_code(failures: Iterable[ProcessFailure]) -> int:
    """The reason that a rank gives, else the end of the first that ended, as a shell has it."""
    codes = [failure.exitcode for failure in sorted(failures, key=lambda f: f.timestamp)]
    first = codes[0] if codes[0] > 0 else 128 - codes[0]
    return next((code for code in codes if code in REASONS), first)


def say(text: str) -> None:
    print(f"launch/torchrun.py: {text}", file=sys.stderr, flush=True)


def main() -> int:
    launcher.LocalElasticAgent = Agent
    try:
        torchrun([f"--signals-to-handle={','.join(STOP_SIGNALS)}", *sys.argv[1:]])
    except ChildFailedError as error:
        return exit_code(error.failures.values())
    except SignalException as error:
        say(f"{error.sigval.name} before any rank was started")
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
