"""A run from Python: its configuration, slices, networks, tensors and tables, by name.

A run is one folder, local or in the cloud; nothing outside it is needed to read it. `open_run` is what users of the
results call; `start_run` is what the command line calls.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ray_tracin import store as paths
from ray_tracin.claims import driving
from ray_tracin.config import FORMAT_VERSION, RunConfig
from ray_tracin.objects import StoredFile
from ray_tracin.presets import build_config, parse_config, parse_yaml, read_document
from ray_tracin.store import Array, IncompleteRunError, Receipt, RunStore, ZarrArray
from ray_tracin.unet import build_unet
from ray_tracin.vocabulary import QUERY_SETS, QuerySet, UsageError, checkpoint_name

FINAL = "final"
"""The network after the last epoch."""
RECORD = ("run", "configuration")
"""Stage and key of the receipt of the configuration's own files, which holds their text too."""
PASSING = "/runtime_resources/working_dir_files/"
"""In the path of the folder that Ray unpacks a job's files into, and runs it in."""
PRELIMINARY = (RECORD[0], "inspect", "events")
"""Stages whose receipts keep nobody from another configuration: they are made again for it."""
TOP_TABLES = ("slices", "regions", "checkpoints", "skipped", "events")
PACKAGES = ("ray_tracin", "torch", "numpy", "zarr", "ray", "monai", "nibabel", "pyarrow")


@dataclass(frozen=True)
class Run:
    """One run: where it is and how it is configured. Cheap to pickle; workers receive it whole."""

    store: RunStore
    config: RunConfig

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "config": self.config}

    @property
    def uri(self) -> str:
        """Where the run is."""
        return self.store.uri

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what changes the answer."""
        return self.config.fingerprint()

    @cached_property
    def slices(self) -> pd.DataFrame:
        """``slices.parquet``: slice, patient, case, grade, split, index, labelled, warnings, pixels_1..C, source."""
        return self.store.read_table(paths.SLICES)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; class_id is the position + 1."""
        return tuple(str(name) for name in self._slice_attributes["classes"])

    @cached_property
    def modalities(self) -> tuple[str, ...]:
        """Names of the channels of ``images``."""
        return tuple(str(name) for name in self._slice_attributes["modalities"])

    @property
    def _slice_attributes(self) -> Mapping[str, Any]:
        return self.store.array(paths.IMAGES).attrs.asdict()

    def slices_of(self, patient: str) -> pd.DataFrame:
        """The lines of `slices` of a patient, or of one examination.

        Raises:
            UsageError: there is none of that name.
        """
        mine = self.slices[(self.slices["patient"] == patient) | (self.slices["case"] == patient)]
        if mine.empty:
            there, skipped = sorted(set(self.slices["patient"])), self.table("skipped")
            reasons = "; ".join(skipped.loc[skipped["case"] == patient, "reason"])
            if reasons:
                raise UsageError(f"{patient} was left out when the run was prepared: {reasons}")
            raise UsageError(
                f"no patient {patient!r} in this run; there are {len(there)}, such as {', '.join(there[:5])}"
            )
        return mine

    @cached_property
    def train_slices(self) -> tuple[int, ...]:
        """Rows of the training slices, ascending."""
        return self._rows(("train",))

    def query_slices(self, query_set: QuerySet) -> tuple[int, ...]:
        """Rows of the slices that a query set explains, ascending.

        Without a test share in the split, the test queries are the validation slices and those without ground truth.
        """
        if query_set == "train":
            return self.train_slices
        return self._rows(("test",) if self.config.split.test > 0 else ("validation", "test"))

    @property
    def query_sets(self) -> tuple[QuerySet, ...]:
        """The query sets of this run that have slices, ``train`` first."""
        chosen = self.config.influence.query_sets
        return tuple(name for name in QUERY_SETS if name in chosen and self.query_slices(name))

    @cached_property
    def learning_rates(self) -> torch.Tensor:
        """The η of eq. 6, float64, that the tensor is summed with: of the checkpoints of ``influence_epochs``."""
        return torch.tensor(self.store.attributes(paths.INFLUENCE)["learning_rates"], dtype=torch.float64)

    def _rows(self, splits: Sequence[str]) -> tuple[int, ...]:
        chosen = self.slices.loc[self.slices["split"].isin(splits), "slice"]
        return tuple(sorted(int(row) for row in chosen))

    def images(self, rows: Sequence[int]) -> Array:
        """float32 (slice, modality, h, w) in [−1, 1]."""
        return self._gathered(paths.IMAGES, rows)

    def labels(self, rows: Sequence[int]) -> Array:
        """uint8 (slice, h, w), 0 is background; zeros for slices without ground truth."""
        return self._gathered(paths.LABELS, rows)

    def _gathered(self, path: str, rows: Sequence[int]) -> Array:
        array = self.store.array(path)
        strange = [int(row) for row in rows if not 0 <= row < array.shape[0]]
        if strange:
            raise IndexError(f"expected rows from 0 to {array.shape[0] - 1}, got {strange[:5]}")
        if not len(rows):
            return np.empty((0, *array.shape[1:]), dtype=array.dtype)
        parts = [(slice(int(row), int(row) + 1),) for row in rows]
        return np.concatenate(self.store.objects.parallel(lambda part: self.store.read(path, part), parts))

    def model(self, name: str | None = None, *, epoch: int | None = None) -> nn.Module:
        """A trained network in eval mode on the CPU: ``"final"``, or the checkpoint of an epoch.

        Raises:
            FileNotFoundError: there is no such checkpoint (yet).
        """
        if (name is None) == (epoch is None):
            raise ValueError("give a name such as 'final', or an epoch")
        path = paths.checkpoint_path(name or checkpoint_name(epoch or 0))
        if self.store.objects.size(path) is None:
            names = (Path(held).stem for held in sorted(self.store.objects.sizes("checkpoints")))
            there = ", ".join(held for held in names if held == FINAL or held.startswith("epoch_"))
            raise FileNotFoundError(
                f"{self.uri} has no {path}; it has {there or 'none yet'}: `ray-tracin train --run {self.uri}` makes "
                f"what is missing of its {self.config.training.epochs} epochs"
            )
        weights = self.load_torch(path)
        model = build_unet(self.config.model, len(self.modalities), len(self.classes), self.config.seed)
        model.load_state_dict(weights)
        return model.eval()

    def load_torch(self, path: str) -> dict[str, Any]:
        """A file of tensors and plain values (``weights_only=True``)."""
        loaded = torch.load(BytesIO(self.store.objects.get(path)), map_location="cpu", weights_only=True)
        assert isinstance(loaded, dict)
        return loaded

    def save_torch(self, path: str, values: Mapping[str, Any]) -> None:
        """Write a file of tensors and plain values; recorded for the receipt."""
        self.store.write_bytes(path, torch_bytes(values))

    def influence(self, query_set: QuerySet = "train") -> ZarrArray:
        """The influence tensor of a query set: float32 (query_class, query, train), NaN where a region is absent.

        Column of train region (class j, position z among ``train_slices``): (j − 1)·n + z. Read by slicing, as NumPy;
        what is read may be changed, the array itself can't be.

        Raises:
            UsageError: there is no such query set.
            IncompleteRunError: the tensor is not computed yet.
        """
        if query_set not in QUERY_SETS:
            raise UsageError(f"no query set {query_set!r}: expected {' or '.join(QUERY_SETS)}")
        return self.store.readable(f"{paths.INFLUENCE}/{query_set}")

    def table(self, name: str) -> pd.DataFrame:
        """A table by its name: slices, regions, checkpoints, skipped, events, or one of ``tables/``.

        ``influence`` has a row a pair of regions, which may be more than memory holds.

        Raises:
            IncompleteRunError: there is no such table yet; those that there are, are listed.
        """
        if name == "influence":
            return self._pairs()
        try:
            return self.store.read_table(f"{name}.parquet" if name in TOP_TABLES else f"tables/{name}.parquet")
        except IncompleteRunError as error:
            raise IncompleteRunError(f"{error}; tables that are there: {', '.join(self._tables())}") from None

    def _pairs(self) -> pd.DataFrame:
        parts = [path for path in sorted(self.store.objects.sizes(paths.INFLUENCE_TABLE)) if path.endswith(".parquet")]
        if not parts:
            raise IncompleteRunError(f"{self.uri} has no exported pairs yet: `ray-tracin export --run {self.uri}`")
        return pd.concat([self._part(path) for path in parts], ignore_index=True)

    def _part(self, path: str) -> pd.DataFrame:
        where = dict(part.split("=") for part in path.split("/") if "=" in part)
        query_class = np.int32(where["query_class"])
        return self.store.read_table(path).assign(query_set=where["query_set"], query_class=query_class)

    def _tables(self) -> list[str]:
        found = [path.removeprefix("tables/") for path in self.store.objects.sizes("tables")]
        top = [name for name in TOP_TABLES if self.store.objects.size(f"{name}.parquet") is not None]
        return sorted([*top, *(path.removesuffix(".parquet") for path in found if "/" not in path)])

    def write_table(self, path: str, table: pd.DataFrame) -> None:
        """Write a Parquet file that says in the metadata of its schema what was differentiated; recorded.

        And on which slices the network's own prediction stands in for the ground truth.
        """
        unlabelled = self.slices.loc[~self.slices["labelled"].astype(bool), "slice"]
        about = {**self.config.differentiated(), "unlabelled_slices": sorted(int(row) for row in unlabelled)}
        self.store.write_table(path, table, about={"ray_tracin": json.dumps(about)})


def torch_bytes(values: Mapping[str, Any]) -> bytes:
    """A file of tensors and plain values; equal ones give the same bytes."""
    sink = BytesIO()
    torch.save(dict(values), sink)
    return sink.getvalue()


def is_run(uri: str | Path) -> bool:
    """Whether there is a run at the folder or URL; nothing is written, no folder made."""
    store = RunStore(uri)
    # The first look into a folder makes it.
    missing = store.objects.is_local and not Path(store.uri).exists()
    return not missing and store.objects.size(paths.CONFIG) is not None


def open_run(uri: str | Path) -> Run:
    """The run at a folder or URL, for reading.

    Raises:
        FileNotFoundError: there is no run there.
        ValueError: the run was written in another format, or its configuration was edited by hand.
    """
    store = RunStore(uri)
    if not is_run(uri):
        raise FileNotFoundError(
            f"no run at {store.uri}: expected a folder with {paths.CONFIG}. "
            "Start one with `ray-tracin run --run URI --config FILE`"
        )
    try:
        config = parse_config(_stored_document(store))
    except ValueError as error:
        raise ValueError(f"{error}. {_restores(store)}") from None
    _check_versions(store, config)
    return Run(store, config)


def start_run(
    uri: str | Path,
    *,
    preset: str | None = None,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    base: Run | None = None,
) -> Run:
    """The run at the URI, begun with this configuration, or gone on with where it exists.

    A run that exists needs no configuration again; one that is given must not differ in what changes the answer.
    ``base``: a run whose configuration stands in for a preset or a file.

    Raises:
        ValueError: a bad configuration, one that differs from the run's own (every difference is listed), or none
            for a new run.
        FileNotFoundError: the configuration file does not exist.
        ClaimHeldError: another driver is about to compute the run with the configuration that it has.
    """
    document = read_document(config) if base is None else _stored_document(base.store)
    store = RunStore(uri)
    if not is_run(uri):
        _refuse_passing_folder(uri)
        if preset is None and document is None and not overrides:
            raise ValueError(f"there is no run at {store.uri} yet: give --config FILE or --preset demo|paper")
        return _begin(store, build_config(preset, document, overrides))
    wanted, differs = _wanted(open_run(uri), preset, document, overrides)
    if differs:
        # Nothing was computed: a mistyped setting must not cost the folder. But a driver may be about to.
        with driving(store.objects):
            return _begin(store, _wanted(open_run(uri), preset, document, overrides)[0])
    if store.read_receipt(*RECORD) is None:
        _record(store)
    return Run(store, wanted)


def _refuse_passing_folder(uri: str | Path) -> None:
    """Nothing, unless the run would begin where a Ray job was unpacked, which goes with the cluster's session."""
    if PASSING in Path.cwd().as_posix() and "://" not in str(uri) and not Path(uri).is_absolute():
        raise UsageError(
            f"--run {uri} would be in {Path.cwd()}, where Ray has unpacked this job and keeps nothing: give an "
            "absolute path that all nodes share, s3://… or gs://…"
        )


def open_run_with(
    uri: str | Path, *, preset: str | None = None, config: Path | None = None, overrides: Sequence[str] = ()
) -> Run:
    """`open_run` with the settings that `start_run` would go on with; nothing is written.

    Raises:
        ValueError: as `start_run`.
        FileNotFoundError: there is no run there, or the configuration file does not exist.
    """
    run = open_run(uri)
    return Run(run.store, _wanted(run, preset, read_document(config), overrides)[0])


def _wanted(
    run: Run, preset: str | None, document: Mapping[str, Any] | None, overrides: Sequence[str]
) -> tuple[RunConfig, bool]:
    """The configuration that is asked for, and whether it has another answer; if so, nothing is computed yet."""
    if preset is None and document is None:
        document = _stored_document(run.store)
    wanted = build_config(preset, document, overrides)
    if _absolute(wanted.data.root) == _absolute(run.config.data.root):  # One folder, whichever way it is written.
        wanted = _with_root(wanted, run.config.data.root)
    differences = run.config.differences(wanted)
    if differences and _has_begun(run.store):
        listed = "\n  ".join(differences)
        raise ValueError(
            f"the run at {run.uri} has another configuration (stored → given):\n  {listed}\n"
            f"`ray-tracin run --run {run.uri}`, without them, goes on with it as it is. Or give another --run: with "
            f"--from {run.uri} it begins with what these settings don't change"
        )
    return wanted, bool(differences)


def _has_begun(store: RunStore) -> bool:
    return any(path.split("/")[1] not in PRELIMINARY for path in store.objects.sizes(paths.RECEIPTS))


def _absolute(root: str | None) -> str | None:
    # Links are left as they are: they may lead elsewhere on other nodes.
    return None if root is None else os.path.abspath(Path(root).expanduser())  # noqa: PTH100


def _with_root(config: RunConfig, root: str | None) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"root": root})})


def _begin(store: RunStore, config: RunConfig) -> Run:
    # The run may be gone on with from anywhere.
    config = _with_root(config, _absolute(config.data.root))
    versions = {"format": FORMAT_VERSION, "fingerprint": config.fingerprint(), "versions": installed_versions()}
    store.objects.put(paths.VERSIONS, json.dumps(versions, indent=1).encode())
    store.objects.put(paths.CONFIG, config.to_yaml().encode())
    _record(store)
    return Run(store, config)


def _record(store: RunStore) -> None:
    texts = {path: store.objects.get(path) for path in (paths.CONFIG, paths.VERSIONS)}
    files = tuple(StoredFile.of(path, data) for path, data in texts.items())
    result = {path: data.decode() for path, data in texts.items()}
    fingerprint = str(json.loads(texts[paths.VERSIONS])["fingerprint"])
    store.write_receipt(Receipt(*RECORD, fingerprint, files=files, result=result))


def restore_configuration(uri: str | Path) -> list[str]:
    """Put back ``config.yaml`` and ``versions.json`` as the run began with them; the files that were not so any more.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: the record of them is damaged, and so is one of them.
    """
    store = RunStore(uri)
    record = store.read_receipt(*RECORD)
    if record is None:
        open_run(uri)  # The files are the only evidence: they must at least agree.
        _record(store)
        return [f"{paths.RECEIPTS}/{'/'.join(RECORD)}.json"]
    restored = []
    for file in record.files:
        data = str(record.result[file.path]).encode()
        size = store.objects.size(file.path)
        if size is None or store.objects.get(file.path) != data:
            store.objects.put(file.path, data)
            restored.append(file.path)
    return restored


def _restores(store: RunStore) -> str:
    return f"Unless it was edited on purpose, `ray-tracin repair --run {store.uri}` restores it"


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result can depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _stored_document(store: RunStore) -> dict[str, Any]:
    return parse_yaml(store.objects.get(paths.CONFIG).decode(), f"{store.uri}/{paths.CONFIG}")


def _check_versions(store: RunStore, config: RunConfig) -> None:
    try:
        stored = json.loads(store.objects.get(paths.VERSIONS))
    except (FileNotFoundError, ValueError):
        stored = None
    if not isinstance(stored, dict):
        raise ValueError(f"{store.uri}/{paths.VERSIONS} is damaged or missing. {_restores(store)}")
    if stored.get("format") != FORMAT_VERSION:
        raise ValueError(
            f"the run at {store.uri} has format {stored.get('format')!r}, this ray_tracin reads format "
            f"{FORMAT_VERSION}: use the release that wrote it"
        )
    if stored.get("fingerprint") != config.fingerprint():
        raise ValueError(
            f"{store.uri}/{paths.CONFIG} was changed after the run began (fingerprint {stored.get('fingerprint')}, "
            f"now {config.fingerprint()}). {_restores(store)}; or start another run"
        )
