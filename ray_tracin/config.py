"""The configuration of a run: one frozen model a stage, and the fingerprint.

A field either changes the answer or only the speed. The first kind is fingerprinted and stored with the run: a run
resumes on another cluster, never with another configuration. The second kind (``resources``, ``gradients.keep`` and
others) is marked with ``speed_only`` and may differ from one invocation to the next.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from ray_tracin.vocabulary import MOST_CLASSES, Precision, QuerySet, RowDtype

FORMAT_VERSION = 1
"""Version of the run on disk; another one is refused."""

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Norm = Literal["batch", "instance", "group", "none"]
LabelScheme = Literal["auto", "brats", "brats2023", "brats2024", "msd", "nnunet"]


def speed_only(default: Any) -> Any:
    """A field that changes how fast a run goes, never what it computes: left out of the fingerprint."""
    return Field(default, json_schema_extra={"speed_only": True})


class Section(BaseModel):
    """A part of the configuration: frozen, and refusing keys that it doesn't know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SliceSelection(Section):
    """Which slices of a volume are cut."""

    selection: Literal["central", "tumour", "largest", "list"] = "central"
    """``central``: around the middle of the axis; ``tumour``: around the area-weighted centre of the labels;
    ``largest``: those with most labelled pixels; ``list``: the positions of ``indices``."""
    count: PositiveInt = 10
    """Slices a patient (not used by ``list``)."""
    indices: tuple[int, ...] = ()
    """Positions on the slicing axis, after reorientation to LPS; for ``selection: list``."""

    @model_validator(mode="after")
    def _list_has_indices(self) -> "SliceSelection":
        if (self.selection == "list") != bool(self.indices):
            raise ValueError("`indices` goes with `selection: list`, and `selection: list` needs `indices`")
        if self.indices and (len(set(self.indices)) < len(self.indices) or min(self.indices) < 0):
            raise ValueError(f"indices must be different positions from 0 on, got {list(self.indices)}")
        return self


class DataConfig(Section):
    """Where the patients are and how their volumes become slices."""

    root: str | None = None
    """Folder of patients in a BraTS layout, or a CSV file with the columns patient, one per modality, and label."""
    layout: Literal["auto", "brats", "csv"] = "auto"
    """How ``root`` is read; ``auto``: a CSV file if it is one or holds ``dataset.csv``, else the folders of BraTS."""
    modalities: Annotated[tuple[str, ...], Field(min_length=1)] = ("t1", "t1ce", "t2", "flair")
    """Channels of the network, in this order; in a CSV file the names of the columns."""
    label_scheme: LabelScheme = "auto"
    """What the label values mean; ``auto`` decides from the union of values over the whole data set."""
    labels: dict[int, str] | None = None
    """Label value → class name, in class order; overrides ``label_scheme``."""
    grade: Literal["all", "HGG", "LGG"] = "all"
    """Patients of this grade alone: high-grade or low-grade gliomas."""
    cohort: Literal["all", "brats2019"] = "all"
    """``brats2019`` keeps the patients of BraTS 2020 that ``name_mapping.csv`` also lists for 2019."""
    slices: SliceSelection = SliceSelection()
    """Which slices of a patient are cut."""
    size: PositiveInt = 192
    """Height and width of a slice after cropping or padding."""
    crop_start: int | None = None
    """First row and column of the crop; ``null`` crops around the centre."""
    intensity: Literal["percentile", "maximum"] = "percentile"
    """Upper end of the scale to [−1, 1]: the percentile of the non-zero voxels of the volume, or the maximum of the
    cropped slab."""
    percentile: Annotated[float, Field(gt=0, le=100)] = 99.5
    """For ``intensity: percentile``."""
    strict: bool = False
    """Fail on the first patient that cannot be read instead of listing it in ``skipped.parquet``."""

    @model_validator(mode="after")
    def _modalities_differ(self) -> "DataConfig":
        if len(set(self.modalities)) < len(self.modalities):
            raise ValueError(f"modalities must be different, got {list(self.modalities)}")
        return self

    @model_validator(mode="after")
    def _labels_number_classes(self) -> "DataConfig":
        labels = self.labels
        if labels is None:
            return self
        if not labels or min(labels) < 1 or len(set(labels.values())) < len(labels) or len(labels) > MOST_CLASSES:
            raise ValueError(
                f"labels must map 1 to {MOST_CLASSES} label values above 0 (background is never a class) to different "
                f"names, got {labels}"
            )
        return self


class SplitConfig(Section):
    """The patient-wise split. Without a test share, the test queries are the validation slices."""

    validation: Probability = 0.2
    """Share of the patients."""
    test: Probability = 0.0
    """Share of the patients."""

    @model_validator(mode="after")
    def _leaves_training_patients(self) -> "SplitConfig":
        if self.validation + self.test >= 1:
            raise ValueError(f"validation + test must leave patients to train on, got {self.validation} + {self.test}")
        return self


class ModelConfig(Section):
    """The UNet."""

    width: PositiveInt = 64
    """Feature maps of the first level and of the last hidden layer; every level below doubles them."""
    depth: Annotated[int, Field(ge=2)] = 5
    """Levels, the bottom one included."""
    norm: Norm = "batch"
    """The normalisation after every 3×3 convolution."""


class AugmentationConfig(Section):
    """Training-time augmentation: probability of each transform, and its strength."""

    elastic: Probability = 0.5
    """A random smooth displacement."""
    crop: Probability = 0.5
    """A random window, resized to the slice."""
    mirror: Probability = 0.5
    """Left–right."""
    elastic_spacing: Positive = 30.0
    """Distance of the control points, pixels."""
    elastic_magnitude: tuple[NonNegative, NonNegative] = (1.0, 2.0)
    """Range of the displacement at the control points, pixels."""
    crop_fraction: Annotated[float, Field(gt=0, le=1)] = 0.77
    """Side of the random window as a share of the slice; it is resized back."""


class TrainingConfig(Section):
    """Section 3.2 of the paper."""

    epochs: PositiveInt = 30
    """With Adam and SGD together."""
    batch_size: PositiveInt = 10
    """Slices of a step."""
    dice: Literal["slice", "batch"] = "slice"
    """Dice of each slice, averaged, or of all pixels of the batch."""
    smoothing: Positive = 1e-5
    """Added above and below the fraction of the soft Dice, which an absent class would not have otherwise."""
    adam_epochs: Annotated[int, Field(ge=0)] = 5
    """Epochs with Adam; SGD takes over after them."""
    adam_learning_rate: Positive = 1e-4
    """While Adam trains."""
    weight_decay: NonNegative = 1e-5
    """Of Adam; SGD has none."""
    sgd_learning_rate: Positive = 1e-2
    """While SGD trains: η of eq. 6."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of SGD."""
    augmentation: AugmentationConfig = AugmentationConfig()
    workers: PositiveInt = 1
    """Processes that train together through Ray Train; 1 trains in a plain Ray task."""


class RegionsConfig(Section):
    """Section 3.3 of the paper."""

    threshold: Annotated[float, Field(ge=0.5, lt=1)] = 0.8
    """Softmax above which a pixel belongs to a region; at 0.5 and above it implies the argmax."""
    source: Literal["final", "checkpoint"] = "final"
    """Whose prediction the regions come from: the final network for all checkpoints, or each checkpoint's own."""


class GradientsConfig(Section):
    """What is differentiated, and how it is stored."""

    parameters: Literal["all", "head"] | tuple[str, ...] = "all"
    """``all`` trainable parameters; ``head``: the weight of the last layer alone, as the authors' code does; or
    patterns of parameter names such as ``decoder.*``."""
    score: Literal["region", "image"] = "region"
    """Dice on the region (eq. 6) or on the whole slice (the terms of eq. 5)."""
    dtype: RowDtype = "float32"
    """Of packed rows, in memory and on disk: ``float16`` rounds the large layers alone, under a scale of their own, and
    takes half of the room; ``bfloat16`` rounds all. Products always accumulate in float32 or wider."""
    precision: Precision = "float32"
    """Of the operands that convolutions and products multiply: ``float32``, ``tf32`` (GPUs only; the same as float32 on
    a CPU), ``bfloat16`` (of products; convolutions as with ``tf32``)."""
    source: Literal["auto", "stored", "fused"] = speed_only("auto")
    """Where tiles get their rows from: shards on disk, or the network, in memory (`fused`: no gradient touches a disk,
    and blocks that don't fit are made again for every tile). ``auto``: what the plan finds cheaper."""
    shard_slices: PositiveInt = 16
    """Slices of one gradient shard."""
    keep: bool = speed_only(True)
    """Keep the shards of a checkpoint once its tiles are done."""


class InfluenceConfig(Section):
    """Which checkpoints and queries enter the tensor (eq. 6)."""

    checkpoints: PositiveInt | tuple[int, ...] = 5
    """The first so many epochs after the switch to SGD, or a list of epochs."""
    query_sets: tuple[QuerySet, ...] = ("train", "test")
    """What is explained: the training slices themselves, the test queries, or both."""
    tile_slices: PositiveInt = 64
    """Slices on each side of a tile."""

    @model_validator(mode="after")
    def _query_sets_differ(self) -> "InfluenceConfig":
        if not self.query_sets or len(set(self.query_sets)) != len(self.query_sets):
            raise ValueError(f"query_sets must name train, test or both once each, got {list(self.query_sets)}")
        return self


class FeaturesConfig(Section):
    """When a latent feature counts as predictive (section 3.4), and what its masking is compared with."""

    importance: Probability = 0.65
    """A predictive feature's importance at the first proponent is above this."""
    significance: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    """Chance that the F-tests, which tell trends from noise, leave to noise."""
    smallest_change: NonNegative = 0.05
    """A trend whose importance changes less than this over all ranks is flat."""
    random_sets: Annotated[int, Field(ge=0)] = 20
    """Random sets of features that are masked for comparison, a class."""


class ExplainersConfig(Section):
    """Section 3.5 of the paper: global explainers, and the rankings without them."""

    score: Literal["raw", "cosine"] = "raw"
    """What ranks: influence (eq. 6), or its cosine, which doesn't favour regions with large gradients."""
    list_length: PositiveInt = 20
    """Places of the lists in which a train region's share is counted."""
    max_share: Probability = 0.3
    """A train region that stands in a larger share of a query class's lists is a global explainer."""
    top_k: PositiveInt = 20
    """Proponents and opponents that are kept of each query region, global explainers not counted."""
    class_list: PositiveInt = 10
    """Proponents whose classes are counted (figure 5), without global explainers."""


class ReportConfig(Section):
    """The page that readers open. It can be rendered again with other options: nothing here changes the answer."""

    queries: Literal["all"] | PositiveInt | tuple[str, ...] = speed_only("all")
    """Which slices are explained: ``all`` test queries, so many of them (spread over the patients), or a list of
    patients (or cases) and ``patient:index``, of any query set; in quotes where YAML would read a number."""
    top_k: PositiveInt = speed_only(10)
    """Proponents, neutral regions and opponents that are shown at first."""
    images: bool = speed_only(True)
    """Whether pictures of patients, their outlines and feature maps are in it; numbers and names always are."""
    inline_megabytes: NonNegative = speed_only(6.0)
    """Pictures and scores are part of the page up to this size; above it they are files beside it."""


class ResourcesConfig(Section):
    """What a run may use. Workers don't change a bit of the answer; threads, batches and devices change its rounding.

    Training amplifies rounding: the same seed on another number of threads, or another device, is another network.
    """

    workers: PositiveInt | None = speed_only(None)
    """Processes of the pool; ``null``: one a GPU where there are GPUs, else one a CPU."""
    device: Literal["auto", "cpu", "cuda"] = speed_only("auto")
    """``auto``: a GPU where there is one."""
    gpus_per_worker: Annotated[float, Field(gt=0, le=1)] = speed_only(1.0)
    """Share of a GPU that a worker takes, and of its memory; below 1 several are on one."""
    threads: PositiveInt = speed_only(1)
    """CPU threads of a worker."""
    training_threads: PositiveInt = speed_only(2)
    """CPU threads of the training task; on a GPU processes that augment slices for it."""
    batch_slices: PositiveInt = speed_only(8)
    """Slices that are differentiated at once; on a CPU fewer go through the network together if they are large."""
    memory_per_worker: Positive = speed_only(4.0)
    """GiB that one worker may use; the plan refuses what would need more."""
    gpu_memory: Positive = speed_only(16.0)
    """GiB of a GPU that one worker may use, of those that have one; the plan refuses what would need more."""
    lease_seconds: Positive = speed_only(600.0)
    """A key that takes longer than this (or 20 times the median) is given to another worker."""
    check: Literal["bytes", "sizes"] = speed_only("bytes")
    """How finished keys are checked before a run goes on: every byte of files that changed since they were last read
    (as the storage tells), or file sizes alone."""


class RunConfig(Section):
    """Everything that a run is told."""

    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] = 0
    """Of the split, the weights, the augmentation and the order of batches; as PyTorch takes it."""
    data: DataConfig = DataConfig()
    split: SplitConfig = SplitConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    regions: RegionsConfig = RegionsConfig()
    gradients: GradientsConfig = GradientsConfig()
    influence: InfluenceConfig = InfluenceConfig()
    features: FeaturesConfig = FeaturesConfig()
    explainers: ExplainersConfig = ExplainersConfig()
    report: ReportConfig = ReportConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _stages_fit_together(self) -> "RunConfig":
        smallest = 2 ** (self.model.depth - 1)
        if self.data.size % smallest:
            raise ValueError(
                f"data.size must be a multiple of {smallest} for a UNet of {self.model.depth} levels, "
                f"got {self.data.size}"
            )
        if self.explainers.score == "cosine" and "train" not in self.influence.query_sets:
            raise ValueError(
                "explainers.score is cosine, which needs the gradient norms of the train regions: add train to "
                f"influence.query_sets, got {list(self.influence.query_sets)}"
            )
        self.influence_epochs()
        return self

    def influence_epochs(self) -> tuple[int, ...]:
        """The epochs (1-based) whose checkpoints enter the tensor, ascending.

        Raises:
            ValueError: training ends before the epochs that are asked for.
        """
        wanted = self.influence.checkpoints
        first = self.training.adam_epochs + 1
        epochs = tuple(range(first, first + wanted)) if isinstance(wanted, int) else tuple(sorted(set(wanted)))
        if not epochs or epochs[0] < 1 or epochs[-1] > self.training.epochs:
            raise ValueError(
                f"influence.checkpoints asks for epochs {list(epochs)}, training.epochs is {self.training.epochs}: "
                "train longer or ask for fewer checkpoints"
            )
        return epochs

    def differentiated(self) -> dict[str, Any]:
        """Whose regions' gradients by which parameters the influence is made of, as plain values: outputs name it."""
        return {
            "region_source": self.regions.source,
            "score": self.gradients.score,
            "parameters": self.gradients.model_dump(mode="json")["parameters"],
        }

    def answer(self) -> dict[str, Any]:
        """What changes the answer, as plain values."""
        values = _without_speed(self)
        labels = self.data.labels
        if labels and list(labels) != sorted(labels):
            # It numbers the classes, and a mapping alone doesn't tell.
            values["data"]["label_order"] = list(labels)
        return values

    def fingerprint(self) -> str:
        """SHA-256 of what changes the answer and is not at its default, in hexadecimal.

        Defaults are left out, so that a release that adds settings goes on with the runs of earlier ones.
        """
        usual = _flat(RunConfig().answer())
        chosen = {key: value for key, value in _flat(self.answer()).items() if value != usual.get(key)}
        text = json.dumps({"format": FORMAT_VERSION, **chosen}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, other: "RunConfig") -> list[str]:
        """One line for every setting that changes the answer and differs, as ``key: mine → theirs``."""
        mine, theirs = _flat(self.answer()), _flat(other.answer())
        return [
            f"{key}: {mine.get(key)!r} → {theirs.get(key)!r}"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        ]

    def to_yaml(self) -> str:
        """The whole configuration, as `presets.parse_yaml` reads it."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _without_speed(section: BaseModel) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("speed_only"):
            continue
        value = getattr(section, name)
        kept[name] = _without_speed(value) if isinstance(value, BaseModel) else section.model_dump(mode="json")[name]
    return {name: value for name, value in kept.items() if value != {}}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
