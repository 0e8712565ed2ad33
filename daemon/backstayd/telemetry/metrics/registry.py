"""Declaring metrics: names, help, labels with their known values, and series of runs that come and go.

Everything that ``/metrics`` shows is declared through a :class:`Registry`, so that the reference in docs/metrics.md can be
made from it. Must not know what any metric means.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, disable_created_metrics
from prometheus_client.metrics import MetricWrapperBase

PREFIX: Final = "backstay"
RUN_LABEL: Final = "training_job"  # "job" would collide with the label of the scrape
MAX_RUNS: Final = 200  # runs with exported series; those beyond have none
DURATION_BUCKETS_S: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

Kind = TypeVar("Kind", bound=MetricWrapperBase)


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """One metric as it was declared; ``name`` as in a query (with ``_total``)."""

    name: str
    kind: str
    documentation: str
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)  # label -> its known values; () is open


class PerRun(Generic[Kind]):
    """One metric with a series for each run (and each combination of its other labels).

    Args:
        unregistered: The same metric without labels, outside of any registry: where runs above the limit are counted.
        is_preset: Known combinations of labels are exported at 0 as soon as the run is seen.
        is_possible: Which combinations of the other labels' values can occur; by default all.
    """

    def __init__(
        self,
        registry: Registry,
        metric: Kind,
        unregistered: Kind,
        *,
        labels: dict[str, tuple[str, ...]],
        is_preset: bool,
        is_possible: Callable[..., bool],
    ) -> None:
        self._registry = registry
        self._metric = metric
        self._nowhere = unregistered
        known = itertools.product(*labels.values()) if is_preset else ()
        self._preset = [found for values in known if is_possible(**(found := dict(zip(labels, values, strict=True))))]

    def of(self, run: str, **labels: str) -> Kind:
        """The series of ``run``; it stays until :meth:`Registry.keep_runs` no longer names the run."""
        return self._metric.labels(**{RUN_LABEL: run}, **labels) if self._registry.admit(run) else self._nowhere

    def preset(self, run: str) -> None:
        """Export the known combinations of labels, at 0."""
        for labels in self._preset:
            self._metric.labels(**{RUN_LABEL: run}, **labels)

    def drop(self, run: str) -> None:
        """Remove the run's series, if there are any."""
        self._metric.remove_by_labels({RUN_LABEL: run})


class Registry:
    """The metrics of one daemon. Invariant: at most MAX_RUNS runs have series.

    Attributes:
        collector: What the HTTP server exports.
        declared: Every metric, in the order of its declaration.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the series of each counter
        self.collector = CollectorRegistry()
        self.declared: list[Declared] = []
        self._per_run: list[PerRun[Any]] = []
        self._runs: dict[str, None] = {}

    def counter(self, name: str, documentation: str, **labels: Sequence[str]) -> Counter:
        """A counter; ``name`` has neither prefix nor ``_total``. Labels with known values are exported at 0."""
        return _preset(self._make(Counter, name, documentation, labels), labels)

    def gauge(self, name: str, documentation: str, **labels: Sequence[str]) -> Gauge:
        return _preset(self._make(Gauge, name, documentation, labels), labels)

    def histogram(
        self, name: str, documentation: str, *, buckets: Sequence[float] = DURATION_BUCKETS_S, **labels: Sequence[str]
    ) -> Histogram:
        return _preset(self._make(Histogram, name, documentation, labels, buckets=buckets), labels)

    def run_counter(
        self,
        name: str,
        documentation: str,
        *,
        is_possible: Callable[..., bool] = lambda **labels: True,
        **labels: Sequence[str],
    ) -> PerRun[Counter]:
        """A counter per run, exported at 0 as soon as the run is seen, for the combinations that are possible."""
        return self._make_per_run(Counter, name, documentation, labels, is_preset=True, is_possible=is_possible)

    def run_gauge(
        self, name: str, documentation: str, *, is_preset: bool = False, **labels: Sequence[str]
    ) -> PerRun[Gauge]:
        """A gauge per run; with ``is_preset`` it is 0 as soon as the run is seen."""
        return self._make_per_run(Gauge, name, documentation, labels, is_preset=is_preset)

    def run_summary(self, name: str, documentation: str, **labels: Sequence[str]) -> PerRun[Summary]:
        """A sum and a count per run."""
        return self._make_per_run(Summary, name, documentation, labels, is_preset=True)

    def admit(self, run: str) -> bool:
        """Whether ``run`` has series; when it is seen for the first time, exports its preset series."""
        if run in self._runs:
            return True
        if len(self._runs) >= MAX_RUNS:
            return False
        self._runs[run] = None
        for family in self._per_run:
            family.preset(run)
        return True

    def keep_runs(self, runs: Collection[str]) -> None:
        """Drop the series of every run but ``runs``, so that a daemon that runs for long does not grow."""
        for run in [run for run in self._runs if run not in runs]:
            del self._runs[run]
            for family in self._per_run:
                family.drop(run)

    def _make(
        self, kind: type[Kind], name: str, documentation: str, labels: dict[str, Sequence[str]], **options: Any
    ) -> Kind:
        self._declare(kind, name, documentation, {label: tuple(values) for label, values in labels.items()})
        return kind(f"{PREFIX}_{name}", documentation, tuple(labels), registry=self.collector, **options)

    def _make_per_run(
        self,
        kind: type[Kind],
        name: str,
        documentation: str,
        labels: dict[str, Sequence[str]],
        *,
        is_preset: bool,
        is_possible: Callable[..., bool] = lambda **labels: True,
    ) -> PerRun[Kind]:
        known = {label: tuple(values) for label, values in labels.items()}
        self._declare(kind, name, documentation, {RUN_LABEL: (), **known})
        names = (RUN_LABEL, *known)
        metric = kind(f"{PREFIX}_{name}", documentation, names, registry=self.collector)
        nowhere = kind(f"{PREFIX}_{name}", documentation, registry=None)
        family = PerRun(self, metric, nowhere, labels=known, is_preset=is_preset, is_possible=is_possible)
        self._per_run.append(family)
        return family

    def _declare(
        self, kind: type[MetricWrapperBase], name: str, documentation: str, labels: dict[str, tuple[str, ...]]
    ) -> None:
        full = f"{PREFIX}_{name}{'_total' if kind is Counter else ''}"
        self.declared.append(
            Declared(name=full, kind=kind.__name__.lower(), documentation=documentation, labels=labels)
        )


def _preset(metric: Kind, labels: dict[str, Sequence[str]]) -> Kind:
    for values in itertools.product(*labels.values()) if labels else ():
        metric.labels(**dict(zip(labels, values, strict=True)))
    return metric
