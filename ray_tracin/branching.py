"""A run that begins with what another one has: its slices, its network or its tensor, under other settings.

Trainings are dear, and tensors dearer; what comes after them has settings of its own. The keys of the stages that the
settings which differ can't have changed are copied, receipts and files, so that the new run stands alone.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from ray_tracin.assembly import AssembleStripes, ExportInfluence, TabulateSelfInfluence
from ray_tracin.claims import current_driver, driving
from ray_tracin.featuring import MapFeatures
from ray_tracin.learning import TabulateCheckpoints, Train
from ray_tracin.mapping import MapRegions, TabulateRegions
from ray_tracin.objects import StoredFile
from ray_tracin.preparation import Cut, Index, Inspect, TabulateSlices
from ray_tracin.runs import Run
from ray_tracin.stages import LAYOUT, Event, Listener, Stage, sound_receipts
from ray_tracin.store import Receipt
from ray_tracin.tiling import ComputeTiles
from ray_tracin.vocabulary import UsageError

GROUPS: tuple[tuple[frozenset[str], tuple[type[Stage[Any]], ...]], ...] = (
    (frozenset({"seed", "data", "split"}), (Inspect, Index, Cut, TabulateSlices)),
    (frozenset({"model", "training"}), (Train,)),
    (
        frozenset({"regions", "gradients", "influence"}),
        (
            *(TabulateCheckpoints, MapRegions, TabulateRegions, MapFeatures),
            *(ComputeTiles, AssembleStripes, TabulateSelfInfluence, ExportInfluence),
        ),
    ),
)
"""Stages in order, with the sections of the configuration that change them and all that follow.

What is left out is cheap beside them, or, as gradient shards, larger than all and needed for tiles alone.
"""
COPYING = "copy"
"""What listeners know the work by."""


def take_over(base: Run, run: Run, listen: Listener) -> None:
    """Copy into ``run`` what ``base`` has done and the settings in which they differ leave as it is.

    What ``run`` has already stays. Called again after an interruption, it goes on.

    Raises:
        UsageError: there is nothing to copy: the settings change everything, or nothing is done.
        ClaimHeldError: another driver computes ``run``.
        ValueError: one computes ``base``, or what it has is damaged.
    """
    if base.uri == run.uri:
        raise UsageError(f"a run can't begin with itself: give another --run than {base.uri}")
    driver = current_driver(base.store.objects)
    if driver is not None:
        raise ValueError(f"{base.uri} is being computed by {driver}: wait until it is done")
    with driving(run.store.objects):
        kept = list(_kept(base, run))
        if not kept:
            raise UsageError(
                f"nothing that {base.uri} has done can be used under these settings (its → given):\n  "
                + "\n  ".join(base.config.differences(run.config))
            )
        there = {name: run.store.receipts(name) for name in {receipt.stage for receipt in kept}}
        missing = [receipt for receipt in kept if receipt.key not in there[receipt.stage]]
        done = len(kept) - len(missing)
        listen(Event(COPYING, "begin", done, len(kept)))
        for receipt in missing:
            _copy(receipt, base, run)
            done += 1
            listen(Event(COPYING, "done", done, len(kept), receipt.key))
        listen(Event(COPYING, "end", done, len(kept), detail=f"from {base.uri}"))


def _kept(base: Run, run: Run) -> Iterator[Receipt]:
    """The receipts of ``base`` that hold in ``run`` too, in the order of their stages; those of layouts before all."""
    differ = {line.split(":")[0].split(".")[0] for line in base.config.differences(run.config)}
    names = []
    for sections, stages in GROUPS:
        if differ & sections:
            break
        names += [stage.name for stage in stages]
    yield from (receipt for receipt in _sound(base, LAYOUT) if receipt.key in names)
    for name in names:
        yield from (receipt for receipt in _sound(base, name) if not receipt.released)


def _sound(base: Run, name: str) -> Iterable[Receipt]:
    """Every receipt of a stage. Parts of two trainings must not mix: one that is damaged has to be mended where it is.

    Raises:
        ValueError: one is.
    """
    sound = sound_receipts(base, name)
    # Cases may have been inspected for another configuration too.
    others = {key for key, held in base.store.receipts(name).items() if held.fingerprint != base.fingerprint}
    damaged = set(base.store.receipt_keys(name)) - sound.keys() - others
    if damaged:
        raise ValueError(
            f"{len(damaged)} keys of stage {name} are damaged in {base.uri}, such as {min(damaged)}: the command that "
            "made them mends them"
        )
    return sound.values()


def _copy(receipt: Receipt, base: Run, run: Run) -> None:
    def copy(file: StoredFile) -> None:
        if run.store.objects.put(file.path, base.store.objects.get(file.path)) != file:
            raise ValueError(f"{file.path} changed in {base.uri} while it was copied: run the same command again")

    run.store.objects.parallel(copy, receipt.files)
    run.store.write_receipt(replace(receipt, fingerprint=run.fingerprint))
