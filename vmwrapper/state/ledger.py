"""The job's state while it runs: the newest checkpoint, and the one way to make a newer one.

Owns the checkpoint store. Every change is durable before the step that counts on it (docs/internals/exactly-once.md).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vmwrapper.errors import translate_os_errors
from vmwrapper.state.accounts import Accounts, FractionDone
from vmwrapper.state.checkpoint import Checkpoint, CheckpointStore


class Ledger:
    """The checkpoint of this job and its changes."""

    def __init__(
        self, store: CheckpointStore, checkpoint: Checkpoint, accounts: Accounts, progress: FractionDone
    ) -> None:
        self._store = store
        self._accounts = accounts
        self._progress = progress
        self.now = checkpoint
        """As it is on disk."""
        self.steps = 0
        """How often the job has got further in this run."""
        self.checkpoint_cpu_time_s = checkpoint.cpu_time_s
        """CPU time at the state to which a crash would take us back; reported to the client."""

    def fraction(self) -> float:
        """Done of the whole job, 0 to 1."""
        return self._progress.reached(self.now.tasks_done)

    def commit(self, **changes: Any) -> None:
        """Write a new checkpoint with `changes`. Durable on return. Raises TemporaryExit when the disk refuses."""
        self.keep(replace(self.now, **changes))

    def keep(self, checkpoint: Checkpoint) -> None:
        """Write this checkpoint, with run time and fraction as they are now."""
        new = replace(
            checkpoint,
            elapsed_s=round(self._accounts.elapsed_s, 3),
            fraction_done=min(max(self.fraction(), checkpoint.fraction_done), 1.0),
        )
        with translate_os_errors("The checkpoint file cannot be written", fault="checkpoint-file"):
            self._store.save(new)
        self.now = new

    def saved(self, checkpoint: Checkpoint, *, task_goes_on: bool = True) -> None:
        """Write a checkpoint that goes with the saved state of the VMs: the next start goes on from exactly now.

        task_goes_on: False for a host task, which begins again at its own last checkpoint: so does its time limit.
        """
        self.keep(
            replace(
                checkpoint,
                cpu_time_s=round(self._accounts.cpu_time_s, 3),
                task_elapsed_s=round(self._accounts.task_elapsed_s, 3) if task_goes_on else checkpoint.task_elapsed_s,
            )
        )
        self.checkpoint_cpu_time_s = self.now.cpu_time_s

    def progressed(self, checkpoint: Checkpoint, *, cpu_time_s: float | None = None) -> None:
        """Write a checkpoint that a crash would take us back to: the work so far is safe now.

        cpu_time_s: at that state, when it is not the present one.
        """
        used = self._accounts.cpu_time_s if cpu_time_s is None else cpu_time_s
        self.keep(
            replace(
                checkpoint,
                cpu_time_s=max(checkpoint.cpu_time_s, round(used, 3)),
                task_elapsed_s=round(self._accounts.task_elapsed_s, 3),
                temporary_exits={},
            )
        )
        self.checkpoint_cpu_time_s = self.now.cpu_time_s
        self.steps += 1
