"""How far protection lags behind training, and since when. Pure; decides nothing.

Each rank has two slots: while one snapshot is encoded, the next is filled. So the newest protected step usually trails training
by up to :data:`LAG_INTERVALS` snapshot intervals. More than that for a whole lease means that steps are trained which no
snapshot covers, however well an older one is protected.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from backstayd.core.sentences import counted, listed

LAG_INTERVALS = 3  # one being encoded, one being filled, one being trained
NAMED = 8  # ranks named in a sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What is known of a world that trains, at one moment."""

    trained_step: int  # the newest step that a rank is known to have completed
    protected_step: int  # now
    restorable_step: int  # the newest that a restart would find, protected or not
    interval_steps: int
    step_s: float  # measured; 0: not known yet
    silent_ranks: Collection[int] = ()  # no daemon reports them, and nothing says that they died
    silent_nodes: Collection[str] = ()
    is_heard: bool = False  # other ranks of the world are reported: ranks train in step, so theirs tell how far it came
    skip_reason: str = ""  # of the newest step that was skipped
    missing: str = ""  # which ranks take no snapshots


@dataclass(frozen=True, slots=True, kw_only=True)
class Behind:
    """Steps that are trained and not protected."""

    protected_step: int
    trained_step: int
    since_s: float  # when training was last within the usual distance
    reason: str

    @property
    def steps(self) -> int:
        """Steps that a restart would repeat, as far as they are known: silent daemons report none."""
        return max(0, self.trained_step - self.protected_step)


@dataclass(slots=True)
class Lag:
    """Invariant: ``behind`` is None unless training was out of the usual distance for longer than the grace."""

    covered_s: float | None = None  # when the newest protected step was last within the usual distance
    behind: Behind | None = None
    protected_step: int = 0  # the newest that was protected while this world trained

    def stop(self) -> None:
        """No world trains: what it trained and nobody holds is lost, and nothing is behind."""
        self.covered_s, self.behind, self.protected_step = None, None, 0

    def update(self, training: Training, *, lease_s: float, now_s: float) -> None:
        """Look at a world that trains."""
        # A protected snapshot whose parity is being repaired is at risk, which the verdict says; training is not behind it.
        held_step = max(training.protected_step, min(self.protected_step, training.restorable_step))
        self.protected_step = max(held_step, self.protected_step)
        usual_steps = LAG_INTERVALS * max(1, training.interval_steps)
        is_unknown = bool(training.silent_ranks) and not training.is_heard
        is_within = training.trained_step - held_step <= usual_steps and not is_unknown
        if is_within or self.covered_s is None:
            self.covered_s = now_s
        # Where nobody reports, steps are not known: until they could have left the usual distance, they have not.
        grace_s = max(lease_s, usual_steps * training.step_s if is_unknown else 0.0)
        if is_within or now_s - self.covered_s < grace_s:
            self.behind = None
            return
        self.behind = Behind(
            protected_step=held_step,
            trained_step=training.trained_step,
            since_s=self.covered_s,
            reason=_reason(training),
        )


def behind_sentence(behind: Behind) -> str:
    """From where on nothing is protected, and why; without numbers that grow, so that it stays one event."""
    return f"no step after {behind.protected_step} is protected: {behind.reason}"


def _reason(training: Training) -> str:
    if training.silent_ranks:
        ranks = sorted(training.silent_ranks)
        more = " and more" if len(ranks) > NAMED else ""
        nodes = listed(sorted(training.silent_nodes)[:NAMED])
        verb = "does" if len(ranks) == 1 else "do"
        return f"{counted(ranks[:NAMED], 'rank')}{more} on {nodes} {verb} not report, so no snapshot becomes complete"
    if training.missing:
        return training.missing
    if training.skip_reason:
        return f"the newest snapshot was skipped ({training.skip_reason})"
    return "newer snapshots do not become protected"
