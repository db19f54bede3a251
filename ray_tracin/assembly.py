"""The stages that put the tiles in their places: ``influence.zarr``, and the tables that are read straight from it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from ray_tracin import store as paths
from ray_tracin.attribution import region_exists
from ray_tracin.influence import sum_checkpoints, train_columns, without_absent
from ray_tracin.runs import Run
from ray_tracin.stages import Result, Stage
from ray_tracin.store import Array
from ray_tracin.tiling import blocks, tiles_path
from ray_tracin.vocabulary import QuerySet, Stripe


@dataclass(frozen=True)
class AssembleStripes(Stage[Stripe]):
    """Put the tiles in their places and sum over checkpoints (eq. 6): ``influence.zarr``."""

    name: ClassVar[str] = "influence"

    def keys(self) -> Sequence[Stripe]:
        """A range of queries each, against all train regions."""
        return [Stripe(name, start, stop) for name in self.run.query_sets for start, stop in blocks(self.run, name)]

    def write_layout(self) -> None:
        """Create the arrays of the tensor, its kernels and its norms."""
        run, side = self.run, self.run.config.influence.tile_slices
        epochs, classes, train = run.config.influence_epochs(), len(run.classes), len(run.train_slices)
        about = {
            "epochs": list(epochs),
            "learning_rates": self._learning_rates,
            "train_slices": list(run.train_slices),
            "classes": list(run.classes),
            **run.config.differentiated(),
        }
        run.store.create_group(paths.INFLUENCE, about)
        kept = ("query_class", "query")
        for name in run.query_sets:
            rows = run.query_slices(name)
            labelled = set(run.slices.loc[run.slices["labelled"], "slice"])
            own = {"query_slices": list(rows), "unlabelled_slices": [row for row in rows if row not in labelled]}
            n, columns = len(rows), classes * train
            shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]] = {
                name: ((classes, n, columns), (classes, side, columns), (*kept, "train")),
                f"kernel_{name}": (
                    (len(epochs), classes, n, columns),
                    (1, classes, side, columns),
                    ("checkpoint", *kept, "train"),
                ),
                f"norm2_{name}": ((len(epochs), classes, n), (len(epochs), classes, side), ("checkpoint", *kept)),
            }
            for array, (shape, chunks, dimensions) in shapes.items():
                run.store.create_array(
                    f"{paths.INFLUENCE}/{array}",
                    shape=shape,
                    chunks=chunks,
                    dtype="float32",
                    dimensions=dimensions,
                    attributes=own,
                )

    @cached_property
    def _learning_rates(self) -> list[float]:
        table = self.run.table("checkpoints").set_index("epoch")["learning_rate"]
        return [float(table.loc[epoch]) for epoch in self.run.config.influence_epochs()]

    def open(self) -> Callable[[Stripe], Result]:
        """Read the tiles of a stripe and write its part of every array."""
        return self._assemble

    def _assemble(self, key: Stripe) -> Result:
        run, epochs = self.run, self.run.config.influence_epochs()
        rows = run.query_slices(key.query_set)[key.start : key.stop]
        stripes, norms = [], []
        for epoch in epochs:
            exists, train_exists = region_exists(run, rows, epoch), region_exists(run, run.train_slices, epoch)
            kernel, norm2 = _read_stripe(run, key, epoch)
            absent = without_absent(torch.from_numpy(kernel), torch.from_numpy(exists), torch.from_numpy(train_exists))
            stripes.append(train_columns(absent))
            norms.append(np.where(exists.T, norm2, np.nan))
        kernels = torch.stack(stripes)
        total = sum_checkpoints(kernels, run.learning_rates)
        every, where = slice(0, len(epochs)), (slice(0, len(run.classes)), slice(key.start, key.stop))
        base = f"{paths.INFLUENCE}/"
        run.store.write(f"{base}kernel_{key.query_set}", (every, *where), kernels.numpy())
        run.store.write(f"{base}norm2_{key.query_set}", (every, *where), np.stack(norms))
        run.store.write(f"{base}{key.query_set}", where, total.numpy())
        return {}


def _read_stripe(run: Run, key: Stripe, epoch: int) -> tuple[Array, Array]:
    """The kernel (class, query, class, train) and the squared norms (class, query) of a stripe, from its tiles."""
    block = key.start // run.config.influence.tile_slices
    length = key.stop - key.start
    parts = []
    for other, (start, stop) in enumerate(blocks(run, "train")):
        mirrored = key.query_set == "train" and other < block
        tile = _read_tile(run, epoch, key.query_set, *((other, block) if mirrored else (block, other)))
        tile = tile.transpose(2, 3, 0, 1) if mirrored else tile
        parts.append(tile[:, :length, :, : stop - start])
    norm2 = run.store.read(f"{tiles_path(epoch, key.query_set)}_norm2", (slice(block, block + 1),))[0]
    return np.concatenate(parts, axis=3), norm2[:, :length]


def _read_tile(run: Run, epoch: int, query_set: QuerySet, query_block: int, train_block: int) -> Array:
    selection = (slice(query_block, query_block + 1), slice(train_block, train_block + 1))
    tile: Array = run.store.read(tiles_path(epoch, query_set), selection)[0, 0]
    return tile


@dataclass(frozen=True)
class ExportInfluence(Stage[Stripe]):
    """The tensors as rows, one a pair of regions: ``tables/influence/``.

    Parquet files partitioned as Hive does, ``query_set=train/query_class=1/``: pandas, Polars and DuckDB add the two as
    columns. Pairs with a region that does not exist are left out.
    """

    name: ClassVar[str] = "export"

    def keys(self) -> Sequence[Stripe]:
        """A range of queries each, as `AssembleStripes`."""
        return AssembleStripes(self.run).keys()

    def open(self) -> Callable[[Stripe], Result]:
        """Write a file for each query class."""
        return self._export

    def _export(self, key: Stripe) -> Result:
        run = self.run
        queries = np.asarray(run.query_slices(key.query_set)[key.start : key.stop], dtype=np.int32)
        train_slices, train_classes = train_regions(run)
        rows = 0
        for position in range(len(run.classes)):
            selection = (slice(position, position + 1), slice(key.start, key.stop))
            influence = run.store.read(f"{paths.INFLUENCE}/{key.query_set}", selection)[0]
            query, column = np.nonzero(~np.isnan(influence))
            table = pd.DataFrame(
                {
                    "query_slice": queries[query],
                    "train_slice": train_slices[column],
                    "train_class": train_classes[column],
                    "influence": influence[query, column],
                }
            )
            folder = f"{paths.INFLUENCE_TABLE}/query_set={key.query_set}/query_class={position + 1}"
            run.write_table(f"{folder}/part-{key.start:06d}-{key.stop:06d}.parquet", table)
            rows += len(table)
        return {"rows": rows}


def train_regions(run: Run) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Slice and class of every train column of the tensor."""
    slices = np.asarray(run.train_slices, dtype=np.int32)
    classes = np.arange(1, len(run.classes) + 1, dtype=np.int32)
    return np.tile(slices, len(classes)), np.repeat(classes, len(slices))


@dataclass(frozen=True)
class TabulateSelfInfluence(Stage[str]):
    """The influence of every train region on itself, largest first: ``tables/self_influence.parquet``.

    A region that the rest of the training set does not support explains itself: wrong annotations rank high.
    ``slice_self_influence.parquet`` and ``patient_self_influence.parquet`` aggregate the regions of a slice and of a
    patient: ``self_influence`` is their sum (to first order what a step on all of them would gain them), ranked by
    ``rank``; ``self_influence_mean`` their mean, ranked by ``rank_mean``, which doesn't favour those with many
    ``regions``.
    """

    name: ClassVar[str] = "self-influence"
    light: ClassVar[bool] = True

    def keys(self) -> Sequence[str]:
        """A key a table, where the train set is among the query sets."""
        return list(SELF_INFLUENCE_TABLES) if "train" in self.run.query_sets else []

    def open(self) -> Callable[[str], Result]:
        """Σ η_t of the squared gradient norms: the diagonal of the train tensor."""

        def tabulate(key: str) -> Result:
            table, about = self._regions(), SELF_INFLUENCE_TABLES[key]
            table = _aggregated(table, about) if about else table
            self.run.write_table(f"tables/{key}.parquet", table)
            return {"rows": len(table)}

        return tabulate

    def _regions(self) -> pd.DataFrame:
        run = self.run
        norms = torch.from_numpy(run.store.read(f"{paths.INFLUENCE}/norm2_train"))
        diagonal = sum_checkpoints(norms[..., None], run.learning_rates)[..., 0].numpy()
        train_slices, train_classes = train_regions(run)
        patients = run.slices.set_index("slice")["patient"]
        table = pd.DataFrame(
            {
                "train_slice": train_slices,
                "train_class": train_classes,
                "patient": patients.reindex(train_slices).to_numpy(),
                "self_influence": diagonal.ravel(),
            }
        ).dropna(subset="self_influence")
        table = table.sort_values(["self_influence", "train_class", "train_slice"], ascending=[False, True, True])
        table["rank"] = np.arange(1, len(table) + 1)
        return table


SELF_INFLUENCE_TABLES: Mapping[str, Sequence[str]] = {
    "self_influence": (),
    "slice_self_influence": ("train_slice", "patient"),
    "patient_self_influence": ("patient",),
}
"""The tables of self-influence, and what identifies the regions that a row adds up; nothing: a row a region."""


def _aggregated(regions: pd.DataFrame, about: Sequence[str]) -> pd.DataFrame:
    """Sum and mean of the regions' self-influence, largest sum first; of equal ones the lower slice or name."""
    groups = regions.astype({"self_influence": np.float64}).groupby(list(about))["self_influence"]
    table = groups.agg(self_influence="sum", self_influence_mean="mean", regions="size").reset_index()
    table = table.sort_values("self_influence", ascending=False, kind="stable", ignore_index=True)
    table["rank"] = np.arange(1, len(table) + 1)
    table["rank_mean"] = table["self_influence_mean"].rank(method="first", ascending=False).astype(np.int64)
    return table
