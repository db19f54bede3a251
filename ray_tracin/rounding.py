"""How packed rows are kept in memory and on disk: as they are, or in half the room.

The one idea: kernels are sums over all parameters, and the layers that hold few values of a row (the head, the
convolutions at full resolution) hold most of the sum. ``float16`` keeps those small segments as they are and rounds the
large ones, which are nearly all of the row, to float16 under a scale of their own: half the bytes, and the kernel
differs in the sixth digit. ``bfloat16`` rounds everything to 8 bits, which shows in the fifth.

It doesn't know how rows are made, multiplied or stored.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

from ray_tracin.layers import Layout, Segment
from ray_tracin.vocabulary import RowDtype

SMALL = 1 / 50
"""Share of a row up to which ``float16`` leaves a segment as it is."""
LARGEST_EXPONENT = 15
"""Scaled values are below 2¹⁵, which float16 holds (up to 65,504)."""
SMALLEST_SCALE_EXPONENT = -110
"""A part of a segment without any larger value is as good as 0; scales stay normal numbers of float32."""


@dataclass(frozen=True)
class RowFormat:
    """The form in which the packed rows of a layout are kept: a row of *words*, a segment after another.

    A word is a float32 for ``float32`` and 16 bits otherwise, as int16 in tensors and uint16 in arrays. With
    ``float16`` a small segment is its float32 values, two words each; a large one is a float32 scale for each of its
    parts (the input if it holds factors, then the classes) and its values divided by them as float16, padded to an
    even number of words.
    """

    layout: Layout
    dtype: RowDtype

    @property
    def item_bytes(self) -> int:
        """Bytes of a word."""
        return 4 if self.dtype == "float32" else 2

    @property
    def array_dtype(self) -> str:
        """Of arrays of kept rows."""
        return "float32" if self.dtype == "float32" else "uint16"

    @property
    def words(self) -> int:
        """Words of a row."""
        return self._starts[-1]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.words * self.item_bytes

    @property
    def opened_bytes(self) -> int:
        """Bytes that a value of a segment takes while it is read: as kept, and what `segment` makes of it."""
        return self.item_bytes + (4 if self.dtype == "float16" else 0)

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        starts = [0]
        for segment in self.layout.segments:
            starts.append(starts[-1] + self._length(segment))
        return tuple(starts)

    @cached_property
    def _places(self) -> dict[str, slice]:
        units = [segment.unit for segment in self.layout.segments]
        return {unit: slice(*place) for unit, place in zip(units, pairwise(self._starts), strict=True)}

    def place(self, segment: Segment) -> slice:
        """Where the words of a segment are in a row."""
        return self._places[segment.unit]

    def _length(self, segment: Segment) -> int:
        if self.dtype != "float16":
            return segment.length
        if not self._is_rounded(segment):
            return 2 * segment.length
        words = 2 * len(self._parts(segment)) + segment.length
        # Scales are read in place, as pairs of words.
        return words + words % 2

    def _is_rounded(self, segment: Segment) -> bool:
        return segment.length > SMALL * self.layout.values

    def _parts(self, segment: Segment) -> list[slice]:
        """The parts of a segment's values that have a scale each."""
        classes = self.layout.classes
        length = (segment.length - segment.input_values) // classes
        bounds = [segment.input_values + position * length for position in range(classes + 1)]
        parts = [slice(*pair) for pair in pairwise(bounds)]
        return [slice(0, segment.input_values), *parts] if segment.input_values else parts

    def room(self, slices: int, device: torch.device) -> Shaped[Tensor, "slice word"]:
        """Kept rows of some slices, yet to be written."""
        return torch.empty((slices, self.words), dtype=self._word, device=device)

    @property
    def _word(self) -> torch.dtype:
        return torch.float32 if self.dtype == "float32" else torch.int16

    def keep(self, rows: Float[Tensor, "slice value"]) -> Shaped[Tensor, "slice word"]:
        """Packed rows in the form in which they are kept; each row for itself, whatever the others are."""
        kept = self.room(len(rows), rows.device)
        self.write(kept, 0, rows)
        return kept

    def write(self, kept: Shaped[Tensor, "kept word"], start: int, rows: Float[Tensor, "slice value"]) -> None:
        """Writes packed rows into kept ones, in their form, from some position on."""
        place = kept[start : start + len(rows)]
        if self.dtype == "float32":
            place.copy_(rows)
        elif self.dtype == "bfloat16":
            place.view(torch.bfloat16).copy_(rows)
        else:
            for segment in self.layout.segments:
                values = rows[:, segment.offset : segment.stop].float()
                if self._is_rounded(segment):
                    self._round(segment, values, place[:, self.place(segment)])
                else:
                    place[:, self.place(segment)].view(torch.float32).copy_(values)

    def _round(self, segment: Segment, values: Float32[Tensor, "slice length"], place: Tensor) -> None:
        parts = self._parts(segment)
        largest = torch.stack([values[:, part].abs().amax(1) for part in parts], dim=1)
        exponents = (torch.frexp(largest).exponent - LARGEST_EXPONENT).clamp(min=SMALLEST_SCALE_EXPONENT)
        scales = torch.ldexp(torch.ones_like(largest), exponents)
        first = 2 * len(parts)
        place[:, :first] = scales.view(torch.int16)
        for number, part in enumerate(parts):
            scaled = (values[:, part] / scales[:, number, None]).half()
            place[:, first + part.start : first + part.stop] = scaled.view(torch.int16)
        place[:, first + segment.length :] = 0

    def segment(self, kept: Shaped[Tensor, "slice segment_word"], segment: Segment) -> Float[Tensor, "slice length"]:
        """The values of a segment from its words: bfloat16 for ``bfloat16``, else float32."""
        if self.dtype == "float32":
            return kept
        if self.dtype == "bfloat16":
            return kept.view(torch.bfloat16)
        if not self._is_rounded(segment):
            return kept.view(torch.float32)
        parts = self._parts(segment)
        first = 2 * len(parts)
        scales = kept[:, :first].view(torch.float32)
        values = kept[:, first : first + segment.length].view(torch.float16).float()
        for number, part in enumerate(parts):
            values[:, part] *= scales[:, number, None]
        return values

    def read(self, kept: Shaped[Tensor, "slice word"], segment: Segment) -> Float[Tensor, "slice length"]:
        """The values of a segment from whole rows."""
        return self.segment(kept[:, self.place(segment)], segment)

    def rows(self, kept: Shaped[Tensor, "slice word"]) -> Float[Tensor, "slice value"]:
        """The packed rows of which `keep` made this, rounded."""
        return torch.cat([self.read(kept, segment) for segment in self.layout.segments], dim=1)

    @staticmethod
    def to_array(kept: Shaped[Tensor, "slice word"]) -> npt.NDArray[np.float32] | npt.NDArray[np.uint16]:
        """Kept rows as an array for storage; words of 16 bits as uint16."""
        array = kept.cpu().numpy()
        return array if array.dtype == np.float32 else array.view(np.uint16)

    @staticmethod
    def from_array(
        array: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    ) -> Shaped[Tensor, "slice word"]:
        """What `to_array` made an array of."""
        whole = np.ascontiguousarray(array)
        return torch.from_numpy(whole if whole.dtype == np.float32 else whole.view(np.int16))
