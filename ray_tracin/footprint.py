"""Bytes that workers hold: of their node's memory, and of a GPU's where they compute on one.

Counted from the configuration, the layout of gradients and the number of slices, so that a run which would not fit is
refused before anything runs. Where a GPU is too small, batches and what is expanded at a time are halved, so that
shards and tiles made of them count the least there; blocks of rows that stay on it want what is fastest.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from ray_tracin.config import RunConfig
from ray_tracin.gradients import differentiate_bytes
from ray_tracin.influence import EXPANDED_VALUES, tile_bytes
from ray_tracin.layers import Layout
from ray_tracin.rounding import RowFormat
from ray_tracin.tiling import LEAST_EXPANDED_VALUES, READ_WORDS

PROCESS_BYTES = 900 << 20
"""Resident size of a worker beyond what is counted here: Ray, torch, and what the allocator keeps between batches.
Measured on Linux with the CPU build of torch, as the peak of a worker less the rest of its plan."""
CLOUD_BYTES = 128 << 20
"""What the client of a cloud storage takes besides: connections, and answers that come in together. Measured alike."""


@dataclass(frozen=True)
class Need:
    """Bytes that a worker takes."""

    host: int
    """Of its node's memory."""
    gpu: int = 0
    """Of its GPU's."""


@dataclass(frozen=True)
class Footprint:
    """What the workers of a run's stages take."""

    config: RunConfig
    layout: Layout
    parameters: int
    """Trainable parameters of the network."""
    train: int
    """Train slices."""
    test: int
    """Slices of the test queries."""
    in_cloud: bool
    """Whether the run is in cloud storage."""

    @property
    def device(self) -> str:
        """What workers compute on: what the configuration says, and where it leaves that open what this machine has."""
        wanted = self.config.resources.device
        return "cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu"

    @property
    def on_gpu(self) -> bool:
        """Whether that is in a GPU's memory."""
        return self.device != "cpu"

    @property
    def gradients(self) -> Need:
        """Of a worker that makes gradient shards: what makes them, a shard and its encoding."""
        batch = 1 if self.on_gpu else self.config.resources.batch_slices
        return self._need(host=4 * self._shard, computing=self._passes(batch), gpu=self._shard)

    @property
    def stored_tiles(self) -> Need:
        """Of a worker that makes tiles from shards: what is read ahead on both sides, and a tile."""
        # As stored and decoded, and before, from a cloud, as its server's answers.
        ahead = (2 + self.in_cloud) * sum(self._sides) * READ_WORDS * self._rows.item_bytes
        return self._need(host=ahead, computing=self._tile(LEAST_EXPANDED_VALUES if self.on_gpu else self._expanded))

    @property
    def fused_tiles(self) -> Need:
        """Of a worker that makes tiles from rows that it makes: what makes them, two blocks and a shard, and a tile."""
        rows = sum(self._sides) * self._rows.row_bytes + self._shard
        passes = self._passes(self.config.resources.batch_slices)
        return self._need(computing=passes + rows + self._tile(self._expanded))

    @property
    def stripes(self) -> Need:
        """Of a worker that puts tiles into the tensor."""
        classes = self.layout.classes
        stripe = classes * self.config.influence.tile_slices * classes * self.train
        return Need(self._process + 4 * stripe * (2 * len(self.config.influence_epochs()) + 4))

    def _need(self, *, computing: int, host: int = 0, gpu: int = 0) -> Need:
        """Of a worker: what is computed is where the device has it."""
        if self.on_gpu:
            return Need(self._process + host, computing + gpu)
        return Need(self._process + host + computing)

    @property
    def _process(self) -> int:
        return PROCESS_BYTES + CLOUD_BYTES * self.in_cloud

    def _passes(self, batch: int) -> int:
        """Network and copies, and a batch."""
        threads = self.config.resources.threads
        return 3 * 4 * self.parameters + differentiate_bytes(self.layout, batch, threads=threads, device=self.device)

    @property
    def _shard(self) -> int:
        return self.config.gradients.shard_slices * self._rows.row_bytes

    @property
    def _expanded(self) -> int:
        return EXPANDED_VALUES[self.device]

    @property
    def _sides(self) -> tuple[int, int]:
        """Slices of a tile: as queries and as train slices; a single train block is both."""
        side = self.config.influence.tile_slices
        queries = self.test if side >= self.train and "test" in self.config.influence.query_sets else self.train
        return min(side, max(queries, self.test)), min(side, self.train)

    def _tile(self, values: int) -> int:
        """What multiplies gradients, so many values of a side at a time, and the tile as it is written."""
        queries, train = self._sides
        opened, device = self._rows.opened_bytes, self.device
        need = tile_bytes(self.layout, queries, train, chunk_values=values, stored_itemsize=opened, device=device)
        return need + 2 * 4 * (self.layout.classes * self.config.influence.tile_slices) ** 2

    @cached_property
    def _rows(self) -> RowFormat:
        return RowFormat(self.layout, self.config.gradients.dtype)
