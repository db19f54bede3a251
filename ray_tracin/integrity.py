"""Whether the bytes of a run are the truth: what was written, all of it, and nothing else.

`verify` reads every byte and changes nothing. Running a command again computes anew what it finds damaged; `repair`
does the two things that running can't: it restores the configuration's own files, and deletes what belongs to no key.
"""

import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_tracin import store as paths
from ray_tracin.assembly import AssembleStripes
from ray_tracin.attribution import Differentiate, region_exists
from ray_tracin.claims import driving, is_claim
from ray_tracin.costs import EVENTS_KEY
from ray_tracin.folders import LISTING
from ray_tracin.indexing import IndexSketches, MeasureSketches
from ray_tracin.mapping import TabulateRegions
from ray_tracin.pipeline import all_stages
from ray_tracin.runs import RECORD, Run, open_run, restore_configuration
from ray_tracin.soundness import CHECKED, file_problems
from ray_tracin.stages import ATTEMPTS, LAYOUT, Stage
from ray_tracin.store import Array, Receipt, RunStore
from ray_tracin.vocabulary import Stripe

FOREIGN = "foreign"
"""The name under which `verify` lists files that no receipt names."""
NOT_OURS = (".nii", ".nii.gz", ".ds_store", "thumbs.db")
"""Ends of names of files that a run never writes: somebody's images wherever they lie, what file browsers leave."""
_PATHS = re.compile(rb'"path": "([^"]+)"')
TABLES_THAT_NAME_KEYS = {paths.SLICES, paths.REGIONS, paths.CHECKPOINTS}


@dataclass(frozen=True)
class _Evidence:
    """What the receipts of a run say."""

    stages: list[Stage[Any]]
    by_stage: dict[str, dict[str, Receipt]]
    unreadable: dict[str, str]
    """Paths of receipts that can't be read, with their ``stage/key``."""

    @property
    def receipts(self) -> list[Receipt]:
        return [receipt for held in self.by_stage.values() for receipt in held.values()]


def verify(run: Run) -> dict[str, list[str]]:
    """What is wrong with a run, by ``stage/key``; ``foreign`` lists files that no receipt names.

    Files: missing, of another size, with other bytes than were written. Receipts: unreadable, or missing although a
    later stage is done (which can be told while the tables that name the keys are sound). The tensors: NaN where both
    regions exist, or a number where one doesn't.
    """
    evidence = _read_evidence(run)
    problems = file_problems(run.store, evidence.receipts, check_bytes=True)
    for path, key in evidence.unreadable.items():
        problems.setdefault(key, []).append(f"{path}: no readable receipt")
    damaged = {problem.split(":")[0] for found in problems.values() for problem in found}
    if not damaged & TABLES_THAT_NAME_KEYS:
        for stage, key in _missing(evidence):
            problems.setdefault(f"{stage}/{key}", []).append(f"{paths.RECEIPTS}/{stage}/{key}.json: missing")
    if not problems and _assembled(evidence):
        problems.update(_wrong_nans(run))
    foreign = _foreign(run, evidence)
    return {**problems, **({FOREIGN: foreign} if foreign else {})}


def remedies(problems: Mapping[str, list[str]], uri: str) -> str:
    """How much `verify` has found, and what mends it: running again makes no configuration."""
    damaged, foreign = len(problems) - (FOREIGN in problems), len(problems.get(FOREIGN, []))
    configuration = "/".join(RECORD) in problems
    which = "the others" if configuration else "these"
    found = [
        (configuration, f"`ray-tracin repair --run {uri}` restores the configuration"),
        (damaged > configuration, f"run the same command again, which computes exactly {which} anew"),
        (bool(foreign), f"`ray-tracin repair --run {uri}` deletes the foreign files"),
    ]
    advice = "; ".join(text for helps, text in found if helps)
    return f"{damaged} damaged keys, {foreign} foreign files: {advice}"


def refuse_no_run(uri: str) -> None:
    """Nothing, if there is a run at the folder or URL, be its configuration damaged or gone; no folder is made.

    Raises:
        FileNotFoundError: there is none.
    """
    store = RunStore(uri)
    missing = store.objects.is_local and not Path(store.uri).exists()
    if missing or store.read_receipt(*RECORD) is None:
        open_run(uri)


def repair(uri: str) -> list[str]:
    """Restore the configuration's files and delete those that belong to no key; what was done, a line a file.

    What is damaged besides is computed by running the command again. Nothing is deleted while a receipt is missing or
    unreadable, because the files that it named look foreign too, nor where the configuration had to be restored:
    without it, `verify` could not say what would be.

    Raises:
        ValueError: the configuration can't be restored.
        ClaimHeldError: the run is being computed.
    """
    refuse_no_run(uri)
    store = RunStore(uri)
    with driving(store.objects):
        done = [f"{path}: restored" for path in restore_configuration(uri)]
        run = open_run(uri)
        evidence = _read_evidence(run)
        foreign = [line.rsplit(":", 1)[0] for line in _foreign(run, evidence)]
        if foreign and (done or evidence.unreadable or any(_missing(evidence))):
            again = "`ray-tracin verify` lists them" if done else "the same command as before completes the run"
            return [*done, f"files that no receipt names are left for now ({len(foreign)}): {again}; then repair again"]
        run.store.objects.delete(foreign)
        return [*done, *(f"{path}: deleted" for path in foreign)]


def _read_evidence(run: Run) -> _Evidence:
    stages = all_stages(run)
    names = [RECORD[0], LAYOUT, *(stage.name for stage in stages), EVENTS_KEY]
    by_stage = {name: run.store.receipts(name) for name in names}
    read = {receipt.path for held in by_stage.values() for receipt in held.values()}
    known = {stage.name: keys for stage in stages if (keys := _keys(stage)) is not None}
    unreadable = {}
    for path in sorted(run.store.objects.sizes(paths.RECEIPTS)):
        name, _, rest = path.removeprefix(f"{paths.RECEIPTS}/").partition("/")
        key = rest.removesuffix(".json")
        plausible = rest.endswith(".json") and name in by_stage and key in known.get(name, [key])
        if path not in read and plausible:
            unreadable[path] = f"{name}/{key}"
    return _Evidence(stages, by_stage, unreadable)


def _keys(stage: Stage[Any]) -> list[str] | None:
    """The keys of a stage; None while they can't be known, as before the stages that it builds on are done."""
    try:
        return [str(key) for key in stage.keys()]  # noqa: SIM118
    except (ValueError, KeyError, OSError):
        return None


def _missing(evidence: _Evidence) -> Iterator[tuple[str, str]]:
    """Keys without a receipt that must have been done, by what was built on them."""
    for name, key in _expected(evidence):
        if key not in evidence.by_stage[name] and f"{paths.RECEIPTS}/{name}/{key}.json" not in evidence.unreadable:
            yield name, key


def _expected(evidence: _Evidence) -> Iterator[tuple[str, str]]:
    """The metadata of arrays that a key was written into, and the keys of stages that something later was built on.

    Gradient shards are left out: nobody misses them once their tiles are done, and some runs never store them.
    """
    for place, stage in enumerate(evidence.stages):
        if evidence.by_stage[stage.name] and type(stage).write_layout is not Stage.write_layout:
            yield LAYOUT, stage.name
        later = evidence.stages[place + 1 :]
        if isinstance(stage, IndexSketches | MeasureSketches):  # On an index nothing is built but its own measurement.
            later = [other for other in later if isinstance(other, MeasureSketches) and other.size == stage.size]
        if stage.name != Differentiate.name and any(evidence.by_stage[other.name] for other in later):
            yield from ((stage.name, key) for key in _keys(stage) or [])


def _foreign(run: Run, evidence: _Evidence) -> list[str]:
    known = {file.path for receipt in evidence.receipts for file in receipt.files}
    known |= {paths.CONFIG, paths.VERSIONS, *(receipt.path for receipt in evidence.receipts), *evidence.unreadable}
    for path in evidence.unreadable:  # What a damaged receipt still names is its key's, not a stranger's.
        known |= {name.decode(errors="replace") for name in _PATHS.findall(run.store.objects.get(path))}
    outputs = {path.split("/")[0] for path in known}
    kept = (*_patients_inside(run, outputs), f"{ATTEMPTS}/", f"{CHECKED}/")
    return [
        f"{path}: belongs to no finished key"
        for path in run.store.objects.everything()
        if not (path in known or path.startswith(kept) or path.lower().endswith(NOT_OURS) or is_claim(path))
    ]


def _patients_inside(run: Run, outputs: Set[str]) -> tuple[str, ...]:
    """Where in the run's own folder its patients lie, as the demo's do, also after both were moved; none elsewhere.

    ``outputs``: the first parts of paths that stages write to, which are no place for patients.
    """
    if run.config.data.root is None or not run.store.objects.is_local:
        return ()
    home, root = Path(run.uri).resolve(), Path(run.config.data.root).expanduser().resolve()
    # The last part of the path that leads somewhere in the run: all of it where nothing was moved.
    ends = (
        [root.relative_to(home)]
        if root.is_relative_to(home)
        else [Path(*root.parts[at:]) for at in range(1, len(root.parts))]
    )
    found = next((end for end in ends if end.parts and (home / end).exists() and end.parts[0] not in outputs), None)
    if found is None:
        return (LISTING,) if root == home else ()
    folder = found.parent if found.suffix.lower() == ".csv" else found
    return (found.as_posix(), *((f"{folder.as_posix()}/",) if folder.parts else ()))


def _assembled(evidence: _Evidence) -> bool:
    return bool(evidence.by_stage[AssembleStripes.name]) and bool(evidence.by_stage[TabulateRegions.name])


def _wrong_nans(run: Run) -> Iterator[tuple[str, list[str]]]:
    done = run.store.receipts(AssembleStripes.name)
    for key in AssembleStripes(run).keys():  # noqa: SIM118
        found = [problem for problem in _nan_problems(run, key) if problem] if str(key) in done else []
        if found:
            yield f"{AssembleStripes.name}/{key}", found


def _nan_problems(run: Run, key: Stripe) -> Iterator[str]:
    rows, epochs = run.query_slices(key.query_set)[key.start : key.stop], run.config.influence_epochs()
    queries = np.stack([region_exists(run, rows, epoch).T for epoch in epochs])
    trains = np.stack([region_exists(run, run.train_slices, epoch).T.reshape(-1) for epoch in epochs])
    pairs = queries[..., None] & trains[:, None, None, :]
    always = np.asarray(pairs.all(axis=0))
    every, part = slice(None), slice(key.start, key.stop)
    for prefix, where, exists in (
        ("", (every, part), always),
        ("kernel_", (every, every, part), pairs),
        ("norm2_", (every, every, part), queries),
    ):
        path = f"{paths.INFLUENCE}/{prefix}{key.query_set}"
        yield _compared(path, run.store.array(path)[where], exists)


def _compared(path: str, values: Any, exists: Array) -> str:
    there = ~np.isnan(np.asarray(values))
    lost, invented = int((exists & ~there).sum()), int((there & ~exists).sum())
    if not (lost or invented):
        return ""
    return (
        f"{path}: expected NaN exactly where a region is absent; {lost} are NaN although both regions exist, "
        f"{invented} are numbers although one doesn't"
    )
