"""The order of the stages, and what each command runs.

Every command first completes what its stage needs. Gradient shards and tiles alternate by checkpoint when shards are
not kept, so that the disk holds the shards of one checkpoint at a time.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_tracin.ablation import Ablate, TabulateImpact
from ray_tracin.assembly import AssembleStripes, ExportInfluence, TabulateSelfInfluence
from ray_tracin.attribution import Differentiate
from ray_tracin.claims import driving
from ray_tracin.costs import StageCost, events_of, publish_events, stage_costs
from ray_tracin.explaining import CountLists, RankPatients, RankQueries, TabulateGlobalExplainers, TabulateRankings
from ray_tracin.featuring import MapFeatures, RankFeatures, TabulateFeatures
from ray_tracin.figures import DrawFigures
from ray_tracin.folders import existing_root
from ray_tracin.indexing import IndexSketches, MeasureSketches, indexed_sizes
from ray_tracin.learning import TabulateCheckpoints, Train, drop_states
from ray_tracin.mapping import MapRegions, TabulateRegions
from ray_tracin.pictures import DrawSlices
from ray_tracin.planning import plan_of
from ray_tracin.preparation import Cut, Index, Inspect, TabulateSlices
from ray_tracin.report import RenderReport, refuse_wrong_queries
from ray_tracin.runs import Run, open_run
from ray_tracin.stages import Event, Executor, Listener, Stage, complete, done_receipts
from ray_tracin.store import Receipt
from ray_tracin.tiling import ComputeTiles
from ray_tracin.vocabulary import checkpoint_name


@dataclass(frozen=True)
class Executors:
    """Who does the keys of a stage: a pool of workers, or the data engine for the tables."""

    pool: Executor
    tables: Executor


def run_to(run: Run, step: str, executors: Executors, listen: Listener) -> None:
    """Complete every step up to and including the named one.

    Raises:
        StageError: keys failed; everything that could be done is done, and the same call goes on from there.
        ClaimHeldError: another driver computes the run.
        ClaimLostError: another driver has taken the run over meanwhile.
    """
    with _driven(run, listen) as listener:
        _steps_to(run, step, executors, listener)


@contextmanager
def _driven(run: Run, listen: Listener) -> Iterator[Listener]:
    """A listener that ends the work where the run is another driver's by then; at the end events are published."""
    with driving(run.store.objects) as claim:
        refuse_another_configuration(run)

        def listen_while_it_is_ours(event: Event) -> None:
            claim.check()
            listen(event)

        try:
            yield listen_while_it_is_ours
        finally:
            with suppress(OSError):  # Storage that refuses has been, or will be, reported by what matters more.
                publish_events(run, stage_names(run))


def _steps_to(run: Run, step: str, executors: Executors, listen: Listener) -> None:
    for name in STEPS[: STEPS.index(step) + 1]:
        # Shards may be freed once their tiles are done: only their own command insists on having all of them.
        if name != "gradients" or step == "gradients":
            _STEPS[name](run, executors, listen)
        if name == "prepare":
            _refuse_in_time(run, step)


def _refuse_in_time(run: Run, step: str) -> None:
    """Nothing, unless a later step will refuse what it is asked for: patients and slices are known from now on.

    Raises:
        UsageError: the report's options name what is no query; hours of work before the report would say so.
        ValueError: gradients would not fit, which would be said after training, when a new run costs it again.
    """
    if step == "report":
        refuse_wrong_queries(run)
    if STEPS.index(step) > STEPS.index("train") and not run.store.receipt_keys(Train.name):
        refuse_what_does_not_fit(run)


def refuse_another_configuration(run: Run) -> None:
    """Nothing, if the run's configuration is still the one that this process began with.

    Raises:
        ValueError: two drivers began the run at once, each with its own.
    """
    if open_run(run.uri).fingerprint != run.fingerprint:
        raise ValueError(f"another process began {run.uri} with another configuration: give another --run")


def index_sketches(run: Run, size: int, executors: Executors, listen: Listener) -> None:
    """Complete an index of the training set by sketches of a size, and measure it on the run's tensor.

    Not among the steps: who doesn't ask for an index has none.

    Raises:
        StageError: as `run_to`.
    """
    with _driven(run, listen) as listener:
        _steps_to(run, "influence", executors, listener)
        for stage in (IndexSketches(run, size), MeasureSketches(run, size)):
            complete(stage, executors.pool, listener)


def _prepare(run: Run, executors: Executors, listen: Listener) -> None:
    if is_prepared(run):
        if run.config.data.root and Path(run.config.data.root).exists():
            complete(Inspect(run), executors.pool, listen)  # Its receipts may be damaged although nothing needs them.
        return
    for stage in (Inspect(run), Index(run), Cut(run), TabulateSlices(run)):
        complete(stage, executors.pool, listen)


def refuse_missing_patients(run: Run) -> None:
    """Nothing, if the patients are where they should be, or are not needed any more.

    Raises:
        ValueError: ``data.root`` is not set.
        FileNotFoundError: it does not exist.
    """
    root = run.config.data.root
    if not (root and Path(root).exists()) and not is_prepared(run):
        existing_root(run.config.data)


def is_prepared(run: Run) -> bool:
    """Whether the slices are all there: then the patients' folder is not needed any more."""
    stages = (Index(run), Cut(run), TabulateSlices(run))
    return all(_complete(stage) for stage in stages)


def _complete(stage: Stage[Any]) -> bool:
    receipts = done_receipts(stage)
    return bool(receipts) and all(str(key) in receipts for key in stage.keys())  # noqa: SIM118


def _train(run: Run, executors: Executors, listen: Listener) -> None:
    complete(Train(run), executors.pool, listen)
    drop_states(run, before=run.config.training.epochs + 1)  # Nothing will go on from them.
    # Regions have features whatever their influence is: here the workers that take the maxima are there already.
    for stage in (TabulateCheckpoints(run), MapRegions(run), TabulateRegions(run), MapFeatures(run)):
        complete(stage, executors.pool, listen)


def _gradients(run: Run, executors: Executors, listen: Listener) -> None:
    # Shards of all checkpoints, whatever tiles would have wanted.
    gradients = run.config.gradients.model_copy(update={"keep": True, "source": "stored"})
    everything = Run(run.store, run.config.model_copy(update={"gradients": gradients}))
    hint = "" if run.config.gradients == gradients else "\n`influence` stores only what its tiles want"
    refuse_what_does_not_fit(everything, hint)
    complete(Differentiate(run, run.config.influence_epochs()), executors.pool, listen)


def _influence(run: Run, executors: Executors, listen: Listener) -> None:
    epochs = run.config.influence_epochs()
    if run.store.receipt_keys(Differentiate.name):
        complete(Differentiate(run, ()), executors.pool, listen)  # Metadata may be damaged although no shard is wanted.
    for group in [epochs] if run.config.gradients.keep else [(epoch,) for epoch in epochs]:
        _tiles_of(run, group, executors, listen)
    complete(AssembleStripes(run), executors.pool, listen)
    complete(TabulateSelfInfluence(run), executors.pool, listen)


def _tiles_of(run: Run, epochs: tuple[int, ...], executors: Executors, listen: Listener) -> None:
    tiles = ComputeTiles(run, epochs)
    done = done_receipts(tiles)
    missing = tuple(sorted({key.epoch for key in tiles.keys() if str(key) not in done}))  # noqa: SIM118
    if missing:
        refuse_what_does_not_fit(run)
    keep = run.config.gradients.keep
    if missing and plan_of(run).fused:
        complete(ComputeTiles(run, epochs, fused=True), executors.pool, listen)
    else:
        shards = {*missing, *(_stored(run, epochs) if keep else ())}
        if shards:
            complete(Differentiate(run, tuple(sorted(shards))), executors.pool, listen)
        complete(tiles, executors.pool, listen)
    if not keep:
        release_gradients(run, epochs)


def _stored(run: Run, epochs: tuple[int, ...]) -> set[int]:
    """The checkpoints of which the run holds every shard: a damaged one is made again, though no tile needs it."""
    released = {key for key, receipt in run.store.receipts(Differentiate.name).items() if receipt.released}
    held = {*run.store.receipt_keys(Differentiate.name)} - released  # Damaged receipts too.
    keys = Differentiate(run, epochs).keys()
    return set(epochs) - {key.epoch for key in keys if str(key) not in held}


def refuse_what_does_not_fit(run: Run, hint: str = "") -> None:
    """Nothing, if the plan of the run keeps within what its workers and its disk have.

    Raises:
        ValueError: it doesn't; every limit that would be broken is named, with the setting that would help.
    """
    problems = plan_of(run).problems
    if problems:
        changeable = "\nwithout a new run only resources.*, gradients.keep and gradients.source can be set otherwise"
        raise ValueError("this would not fit:\n  " + "\n  ".join(problems) + changeable + hint)


def release_gradients(run: Run, epochs: tuple[int, ...]) -> None:
    """Delete the gradient shards of checkpoints whose tiles are done."""
    names = {checkpoint_name(epoch) for epoch in epochs}
    mine = [key for key in run.store.receipt_keys(Differentiate.name) if key.split("/")[0] in names]
    held = run.store.receipts(Differentiate.name)
    # What a damaged receipt named nobody wants either.
    damaged = (
        Receipt(Differentiate.name, key, run.fingerprint, started=time.time()) for key in mine if key not in held
    )
    run.store.release([*damaged, *(held[key] for key in mine if key in held and not held[key].released)])


def _export(run: Run, executors: Executors, listen: Listener) -> None:
    complete(ExportInfluence(run), executors.tables, listen)


def _explainers(run: Run, executors: Executors, listen: Listener) -> None:
    ranking = (CountLists(run), TabulateGlobalExplainers(run), RankQueries(run), RankPatients(run))
    for stage in (*ranking, TabulateRankings(run)):
        complete(stage, executors.tables, listen)


def _features(run: Run, executors: Executors, listen: Listener) -> None:
    for stage in (RankFeatures(run), TabulateFeatures(run)):
        complete(stage, executors.tables, listen)


def _ablation(run: Run, executors: Executors, listen: Listener) -> None:
    for stage in (Ablate(run), TabulateImpact(run)):
        complete(stage, executors.pool, listen)


def _figures(run: Run, executors: Executors, listen: Listener) -> None:
    complete(DrawFigures(run), executors.pool, listen)


def _report(run: Run, executors: Executors, listen: Listener) -> None:
    for stage in (DrawSlices(run), RenderReport(run)):
        complete(stage, executors.pool, listen)


_STEPS: dict[str, Callable[[Run, Executors, Listener], None]] = {
    "prepare": _prepare,
    "train": _train,
    "gradients": _gradients,
    "influence": _influence,
    "export": _export,
    "explainers": _explainers,
    "features": _features,
    "ablation": _ablation,
    "figures": _figures,
    "report": _report,
}
STEPS = tuple(_STEPS)
"""The commands, in order."""


def all_stages(run: Run) -> list[Stage[Any]]:
    """Every stage, in order. Their keys are known once the stages before them are done."""
    epochs = run.config.influence_epochs()
    return [
        Inspect(run),
        Index(run),
        Cut(run),
        TabulateSlices(run),
        Train(run),
        TabulateCheckpoints(run),
        MapRegions(run),
        TabulateRegions(run),
        MapFeatures(run),
        Differentiate(run, epochs),
        ComputeTiles(run, epochs),
        AssembleStripes(run),
        TabulateSelfInfluence(run),
        *(stage for size in indexed_sizes(run) for stage in (IndexSketches(run, size), MeasureSketches(run, size))),
        ExportInfluence(run),
        CountLists(run),
        TabulateGlobalExplainers(run),
        RankQueries(run),
        RankPatients(run),
        TabulateRankings(run),
        RankFeatures(run),
        TabulateFeatures(run),
        Ablate(run),
        TabulateImpact(run),
        DrawFigures(run),
        DrawSlices(run),
        RenderReport(run),
    ]


@dataclass(frozen=True)
class StageStatus:
    """Where a stage stands: keys done, keys in all (None while it can't be known), released keys, and what it cost."""

    stage: str
    done: int
    total: int | None
    released: int
    cost: StageCost

    @property
    def seconds_left(self) -> float | None:
        """Until the stage is done, at the rate of the keys that are; None where there is nothing to tell it by."""
        if self.total is None or not self.cost.keys_a_minute:
            return None
        return 60 * (self.total - self.done) / self.cost.keys_a_minute


def status(run: Run) -> list[StageStatus]:
    """Where every stage stands, by its receipts and the attempts that came to nothing."""
    found: list[StageStatus] = []
    stages = all_stages(run)
    held = {stage.name: list(run.store.receipts(stage.name).values()) for stage in stages}
    costs = stage_costs(events_of(run, [receipt for receipts in held.values() for receipt in receipts]))
    for stage in stages:
        # Cases may have been inspected for another configuration too.
        done = [receipt for receipt in held[stage.name] if receipt.fingerprint == run.fingerprint]
        if stage.name == Differentiate.name and not done and held[ComputeTiles.name]:
            continue  # Tiles made the rows themselves.
        released = sum(receipt.released for receipt in done)
        cost = costs.get(stage.name, StageCost())
        found.append(StageStatus(stage.name, len(done), _total(stage), released, cost))
    return found


def _total(stage: Stage[Any]) -> int | None:
    try:
        return len(stage.keys())
    except (ValueError, OSError):
        return None


def stage_names(run: Run) -> list[str]:
    """The names of all stages, in order."""
    return [stage.name for stage in all_stages(run)]
