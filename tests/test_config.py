from pathlib import Path

import pytest

from ray_tracin.config import RunConfig, Section
from ray_tracin.presets import PRESETS, build_config, parse_yaml


def test_yaml_round_trip_keeps_everything() -> None:
    for preset in PRESETS:
        config = build_config(preset, None, ["data.labels={1: core, 7: rim}"])
        assert build_config(None, parse_yaml(config.to_yaml(), "text")) == config


def test_later_sources_win_over_earlier_ones() -> None:
    config = build_config("paper", {"training": {"epochs": 20}}, ["training.epochs=12", "model.width=8"])
    assert (config.training.epochs, config.model.width, config.training.dice) == (12, 8, "batch")


def test_speed_settings_are_no_part_of_the_fingerprint() -> None:
    base = build_config("demo")
    faster = build_config("demo", None, ["resources.workers=7", "resources.batch_slices=3", "gradients.keep=false"])
    assert faster != base
    assert faster.fingerprint() == base.fingerprint()
    assert base.differences(faster) == []


@pytest.mark.parametrize("override", ["seed=1", "regions.source=checkpoint", "gradients.dtype=bfloat16", "data.root=x"])
def test_what_changes_the_answer_changes_the_fingerprint(override: str) -> None:
    base, other = build_config("demo"), build_config("demo", None, [override])
    assert other.fingerprint() != base.fingerprint()
    assert len(base.differences(other)) == 1
    assert base.differences(other)[0].startswith(override.split("=", maxsplit=1)[0])


def test_the_order_of_labels_numbers_classes_and_is_part_of_the_fingerprint() -> None:
    usual = build_config("demo", None, ["data.labels={1: a, 4: b}"])
    turned = build_config("demo", None, ["data.labels={4: b, 1: a}"])
    assert turned.fingerprint() != usual.fingerprint()
    assert usual.differences(turned) == ["data.label_order: None → [4, 1]"]
    again = build_config(None, parse_yaml(turned.to_yaml(), "text"))
    assert list(again.data.labels or {}) == [4, 1]
    assert again.fingerprint() == turned.fingerprint()


def test_an_unknown_key_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown setting 'training\.epoch'; known here: .*epochs.*momentum"):
        build_config("demo", {"training": {"epoch": 3}})
    with pytest.raises(ValueError, match=r"unknown setting 'data\.slices\.x'; known here: count, indices, selection"):
        build_config("demo", None, ["data.slices.x=1"])
    with pytest.raises(ValueError, match=r"unknown setting 'optimizer'; known here: data, explainers, features, gr"):
        build_config("demo", {"optimizer": 1})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "report.queries=0",
            r"report\.queries: Input should be 'all', or .* greater than 0, or expected a list .* got 0$",
        ),
        ("data.modalities=t1", r"data\.modalities: expected a list such as \[a, b\], got 't1'"),
        ("model.width=-1", r"model\.width: Input should be greater than 0, got -1"),
        (f"seed={2**64}", r"seed: Input should be less than 18446744073709551616, got 18446744073709551616"),
        (f"seed={-(2**63) - 1}", r"seed: Input should be greater than or equal to -9223372036854775808, got -9223"),
        ("training.epochs=3", r"asks for epochs \[6, 7, 8, 9, 10\], training\.epochs is 3"),
        ("data.size=100", r"data\.size must be a multiple of 16 for a UNet of 5 levels, got 100"),
        ("data.slices={selection: list}", r"`selection: list` needs `indices`"),
        ("data.modalities=[t1, t1]", r"data: modalities must be different, got \['t1', 't1'\]"),
        ("split={validation: 0.6, test: 0.4}", r"must leave patients to train on"),
        ("influence.query_sets=[train, train]", r"once each, got \['train', 'train'\]"),
        (
            "data.slices={selection: list, indices: [3, 3]}",
            r"indices must be different .*, got \[3, 3\]",
        ),
        ("data.slices={selection: list, indices: [-1, 2]}", r"different positions from 0 on, got \[-1, 2\]"),
        ("data.labels={0: background, 1: a}", r"data: labels must map 1 to 255 label values above 0 .*'background'"),
        ("data.labels={1: a, 2: a}", r"to different names, got \{1: 'a', 2: 'a'\}"),
        ("data.labels={}", r"to different names, got \{\}"),
        ("data.labels={1:lesion}", r"data\.labels\.1:lesion.*; YAML wants a space after a colon"),
        ("width", r"an override reads key\.path=value, got 'width'"),
    ],
)
def test_bad_values_say_what_was_expected_and_found(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config("demo", None, [override])


def test_bad_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown preset 'dem'; known: demo, paper"):
        build_config("dem")
    with pytest.raises(ValueError, match=r"file\.yaml must hold a mapping of settings .*, got list"):
        parse_yaml("- a", "file.yaml")
    with pytest.raises(ValueError, match=r"file\.yaml is not valid YAML"):
        parse_yaml("a: [", "file.yaml")


def test_the_paper_preset_is_the_paper(tmp_path: Path) -> None:
    config = build_config("paper")
    assert config.data.slices.indices == tuple(range(90, 100))
    assert (config.data.crop_start, config.data.size, config.data.intensity) == (27, 192, "maximum")
    assert (config.model.width, config.model.depth, config.model.norm) == (64, 5, "batch")
    assert (config.training.epochs, config.training.batch_size, config.training.adam_epochs) == (30, 10, 5)
    assert (config.training.adam_learning_rate, config.training.weight_decay) == (1e-4, 1e-5)
    assert config.regions.threshold == 0.8
    assert config.influence_epochs() == (6, 7, 8, 9, 10)


def test_explicit_checkpoints_are_sorted_and_checked() -> None:
    assert build_config("demo", None, ["influence.checkpoints=[9, 7]"]).influence_epochs() == (7, 9)
    with pytest.raises(ValueError, match="train longer or ask for fewer checkpoints"):
        build_config("demo", None, ["influence.checkpoints=[9, 99]"])


def test_defaults_are_valid() -> None:
    assert RunConfig().influence_epochs() == (6, 7, 8, 9, 10)


def test_every_setting_says_what_it_is() -> None:
    sections = [RunConfig]
    for section in sections:
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                sections.append(field.annotation)
            else:
                assert field.description, f"{section.__name__}.{name}"
    assert len(sections) > 10


@pytest.mark.parametrize(
    ("text", "root"), [("/data/my #1 set", "/data/my #1 set"), ("'/data/a b'", "/data/a b"), (" /data ", "/data")]
)
def test_a_path_is_taken_as_it_is(text: str, root: str) -> None:
    assert build_config("demo", None, [f"data.root={text}"]).data.root == root
