"""Training: the Dice, the schedule, the augmentation, and that stopping and going on changes nothing."""

import io
import math
from dataclasses import asdict
from multiprocessing import active_children

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ray_tracin.augmentation import augment, build_augmentation
from ray_tracin.config import AugmentationConfig, ModelConfig, TrainingConfig
from ray_tracin.training import (
    Trainer,
    dice_loss,
    dice_scores,
    epoch_batches,
    hard_dice_averages,
    rank_part,
    schedule,
)
from ray_tracin.unet import build_unet


def only(**settings) -> AugmentationConfig:
    """An augmentation that does what is named, and nothing else."""
    return AugmentationConfig(**{"elastic": 0, "crop": 0, "mirror": 0, **settings})


NO_AUGMENTATION = only()


def labels_of(*slices: str) -> torch.Tensor:
    """Slices of four pixels, written as digits."""
    return torch.tensor([[int(digit) for digit in text] for text in slices], dtype=torch.uint8)


def logits_of(labels: torch.Tensor, channels: int, certainty: float = 50.0) -> torch.Tensor:
    return certainty * torch.nn.functional.one_hot(labels.long(), channels).movedim(-1, 1).float()


class TestSoftDice:
    def test_hand_worked_numbers(self):
        probabilities = torch.tensor([[[0.5, 1.0, 0.0, 0.25]], [[1.0, 1.0, 0.0, 0.0]]])
        truth = torch.tensor([[[True, True, False, False]], [[False, True, False, False]]])
        by_slice = dice_scores(probabilities, truth, smoothing=1.0)
        # slice 0: (2·1.5 + 1) / (1.75 + 2 + 1); slice 1: (2·1 + 1) / (2 + 1 + 1)
        assert by_slice.tolist() == [[pytest.approx(4 / 4.75)], [pytest.approx(3 / 4)]]
        together = dice_scores(probabilities, truth, smoothing=1.0, over="batch")
        # (2·2.5 + 1) / (3.75 + 3 + 1)
        assert together.tolist() == [[pytest.approx(6 / 7.75)]]

    def test_space_may_have_any_number_of_axes(self):
        values = torch.rand(2, 3, 24, generator=torch.Generator().manual_seed(0))
        truth = values > 0.6
        for over in ("slice", "batch"):
            flat = dice_scores(values, truth, 1e-5, over)
            cubes = dice_scores(values.reshape(2, 3, 2, 3, 4), truth.reshape(2, 3, 2, 3, 4), 1e-5, over)
            assert torch.allclose(flat, cubes)

    def test_an_absent_class_scores_one_where_it_is_not_predicted_and_nothing_where_it_is(self):
        truth = torch.zeros(2, 1, 100, dtype=torch.bool)
        probabilities = torch.zeros(2, 1, 100)
        probabilities[1] = 0.5
        scores = dice_scores(probabilities, truth, smoothing=1e-5)
        assert scores[0, 0] == 1
        assert scores[1, 0] < 1e-6


class TestLoss:
    def test_a_perfect_prediction_costs_nothing_and_the_background_does_not_count(self):
        labels = labels_of("0123")
        assert float(dice_loss(logits_of(labels, 4), labels, TrainingConfig())) == pytest.approx(0, abs=1e-5)
        # All background: the background itself is half right, and yet the loss is whole.
        everything_background = logits_of(labels_of("0000"), 4)
        assert float(dice_loss(everything_background, labels, TrainingConfig())) == pytest.approx(1, abs=1e-4)

    def test_it_is_one_minus_the_mean_over_classes(self):
        labels = labels_of("1122")
        prediction = logits_of(labels_of("1112"), 4)
        # class 1: 2·2/5; class 2: 2·1/3; class 3 is absent and not predicted: 1
        expected = 1 - (4 / 5 + 2 / 3 + 1) / 3
        # The softmax leaves e⁻⁵⁰ to class 3, far below the smoothing.
        assert float(dice_loss(prediction, labels, TrainingConfig())) == pytest.approx(expected, abs=1e-4)

    def test_slice_and_batch_dice_differ_where_sizes_differ(self):
        labels = labels_of("1110", "1000")
        prediction = logits_of(labels_of("1110", "0100"), 2)
        by_slice = dice_loss(prediction, labels, TrainingConfig(dice="slice"))
        together = dice_loss(prediction, labels, TrainingConfig(dice="batch"))
        assert float(by_slice) == pytest.approx(1 - (1 + 0) / 2, abs=1e-4)
        assert float(together) == pytest.approx(1 - 6 / 8, abs=1e-4)


class TestHardDice:
    def test_three_averages_by_hand(self):
        prediction = labels_of("1100", "0000", "1000", "2222")
        truth = labels_of("1000", "0011", "1000", "2200")
        table = hard_dice_averages(prediction, truth, ["a", "a", "b", "b"], classes=3)
        # class 1, slices: 2/3, 0/2, 2/2, not there. Pooled: 2·2/7. Patient a: 2·1/(2 + 3), b: 1.
        assert table.pooled[0] == pytest.approx(4 / 7)
        assert table.slice[0] == pytest.approx((2 / 3 + 0 + 1) / 3)
        assert table.patient[0] == pytest.approx((2 / 5 + 1) / 2)
        # class 2 stands in the last slice alone: 2·2/6 in each average.
        assert (table.pooled[1], table.slice[1], table.patient[1]) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
        # class 3 stands nowhere.
        assert all(math.isnan(values[2]) for values in (table.pooled, table.slice, table.patient))

    def test_without_slices_everything_is_undefined(self):
        table = hard_dice_averages(labels_of()[:, None], labels_of()[:, None], [], classes=2)
        assert all(math.isnan(value) for values in asdict(table).values() for value in values)
        assert len(table.pooled) == 2


class TestSchedule:
    def test_adam_first_then_sgd(self):
        config = TrainingConfig(adam_epochs=2, adam_learning_rate=0.1, sgd_learning_rate=0.2)
        assert [schedule(config, epoch) for epoch in (1, 2, 3)] == [("adam", 0.1), ("adam", 0.1), ("sgd", 0.2)]

    @given(
        rows=st.lists(st.integers(0, 500), min_size=1, max_size=40, unique=True),
        batch_size=st.integers(1, 12),
        epoch=st.integers(1, 40),
    )
    def test_every_row_is_in_exactly_one_batch(self, rows, batch_size, epoch):
        batches = epoch_batches(rows, batch_size, seed=3, epoch=epoch)
        assert sorted(row for batch in batches for row in batch) == sorted(rows)
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert 1 <= len(batches[-1]) <= batch_size
        assert batches == epoch_batches(rows, batch_size, seed=3, epoch=epoch)

    def test_epochs_and_seeds_shuffle_differently(self):
        rows = range(50)
        orders = {str(epoch_batches(rows, 50, seed, epoch)) for seed in (0, 1) for epoch in (1, 2, 3)}
        assert len(orders) == 6

    @given(batch=st.lists(st.integers(), min_size=1, max_size=15, unique=True), world_size=st.integers(1, 20))
    def test_ranks_share_a_batch_in_equal_parts(self, batch, world_size):
        parts = [rank_part(batch, rank, world_size) for rank in range(world_size)]
        steps = math.ceil(len(batch) / world_size)
        assert [len(part) for part in parts] == [steps] * world_size
        # Read in turns, the parts are the batch, filled up from its start.
        turns = [parts[position % world_size][position // world_size] for position in range(steps * world_size)]
        assert turns[: len(batch)] == batch
        assert turns == [batch[position % len(batch)] for position in range(len(turns))]


def patterned_slice(height: int = 48, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Two modalities and labels on background; the second modality is a ramp from left to right."""
    generator = np.random.default_rng(0)
    image = np.full((2, height, width), -1, np.float32)
    image[0, 4:-4, 2:-2] = generator.uniform(-0.9, 1, (height - 8, width - 4))
    image[1, 4:-4, 2:-2] = np.linspace(-0.9, 1, width - 4, dtype=np.float32)
    labels = np.zeros((height, width), np.uint8)
    labels[10:30, 5:25], labels[14:26, 9:21] = 3, 1
    return image, labels


def augmented(config: AugmentationConfig, seed: int, image: np.ndarray, labels: np.ndarray):
    return augment(build_augmentation(config, *labels.shape), image, labels, seed)


class TestAugmentation:
    def test_probability_zero_is_the_identity(self):
        image, labels = patterned_slice()
        for seed in range(5):
            image_out, labels_out = augmented(NO_AUGMENTATION, seed, image, labels)
            assert np.array_equal(image_out.numpy(), image)
            assert np.array_equal(labels_out.numpy(), labels)

    @pytest.mark.parametrize("name", ["elastic", "crop", "mirror"])
    def test_each_transform_changes_both_and_acts_as_often_as_asked(self, name):
        image, labels = patterned_slice()
        config = only(**{name: 0.5})
        results = [augmented(config, seed, image, labels) for seed in range(40)]
        changed = [not np.array_equal(image_out.numpy(), image) for image_out, _ in results]
        assert 10 <= sum(changed) <= 30
        assert changed == [not np.array_equal(labels_out.numpy(), labels) for _, labels_out in results]

    def test_labels_stay_in_their_set_and_types_and_shapes_stay(self):
        image, labels = patterned_slice()
        for seed in range(20):
            image_out, labels_out = augmented(AugmentationConfig(elastic=1, crop=1, mirror=1), seed, image, labels)
            assert type(image_out) is torch.Tensor
            assert type(labels_out) is torch.Tensor
            assert (image_out.dtype, labels_out.dtype) == (torch.float32, torch.uint8)
            assert (image_out.shape, labels_out.shape) == (image.shape, labels.shape)
            assert set(labels_out.unique().tolist()) <= {0, 1, 3}
            assert float(image_out.min()) >= -1
            assert float(image_out.max()) <= 1

    def test_mirroring_exchanges_left_and_right_of_both(self):
        image, labels = patterned_slice()
        image_out, labels_out = augmented(only(mirror=1), 0, image, labels)
        assert np.array_equal(image_out.numpy(), image[:, :, ::-1])
        assert np.array_equal(labels_out.numpy(), labels[:, ::-1])

    def test_what_the_elastic_deformation_pulls_in_is_background(self):
        image = np.ones((1, 64, 64), np.float32)
        labels = np.full((64, 64), 2, np.uint8)
        config = only(elastic=1, elastic_magnitude=(8, 9))
        image_out, labels_out = augmented(config, 1, image, labels)
        outside = labels_out == 0
        assert 20 < int(outside.sum()) < 2000
        assert (image_out[0][outside] < 0.01).all()
        assert float(image_out.min()) == -1
        # Far from the rim every pixel is what it was: no other value, such as 0, was filled in.
        assert (image_out[0, 24:40, 24:40] == 1).all()

    def test_the_elastic_deformation_moves_image_and_labels_alike(self):
        labels = np.zeros((64, 64), np.uint8)
        labels[16:48, 20:44] = 1
        image = np.where(labels, 1.0, -1.0).astype(np.float32)[None]
        image_out, labels_out = augmented(only(elastic=1), 4, image, labels)
        assert not np.array_equal(labels_out.numpy(), labels)
        # Linear interpolation of an edge passes 0 where the nearest value changes, up to corners.
        assert int(((image_out[0] > 0) != (labels_out == 1)).sum()) <= 8

    def test_a_crop_is_enlarged_to_the_whole_slice_alike(self):
        image, labels = patterned_slice()
        config = only(crop=1, crop_fraction=0.5)
        image_out, _ = augmented(config, 2, image, labels)
        step = image_out[1, 24, 32] - image_out[1, 24, 30]
        # The ramp rises half as steeply once the window is twice as large.
        assert float(step) == pytest.approx(float(image[1, 24, 32] - image[1, 24, 30]) / 2, rel=0.02)
        # The whole of the labels lies in some windows; then there are four times as many pixels of each.
        crop = build_augmentation(config, *labels.shape)
        results = [augment(crop, image, labels, seed)[1] for seed in range(200)]
        counts = [[int((result == class_id).sum()) for class_id in (1, 3)] for result in results]
        assert max(counts) == [4 * 144, 4 * 256]

    def test_the_seed_decides(self):
        image, labels = patterned_slice()
        everything = AugmentationConfig(elastic=1, crop=1, mirror=0.5)
        shared = build_augmentation(everything, *labels.shape)
        first = augment(shared, image, labels, 1)[0]
        other = augment(shared, image, labels, 2)[0]
        assert torch.equal(first, augment(shared, image, labels, 1)[0])
        assert not torch.equal(first, other)


def easy_slices(count: int = 12, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """A bright square (class 1) above a middling one (class 2), on noise."""
    generator = np.random.default_rng(7)
    images = generator.normal(-0.8, 0.05, (count, 1, size, size)).astype(np.float32)
    labels = np.zeros((count, size, size), np.uint8)
    for row in range(count):
        for class_id, top in ((1, 1), (2, size // 2)):
            left = generator.integers(1, size - 6)
            labels[row, top : top + 5, left : left + 5] = class_id
    images[:, 0] += np.choose(labels, [0, 1.6, 0.8]).astype(np.float32)
    return images, labels


FAST = TrainingConfig(epochs=4, adam_epochs=2, adam_learning_rate=0.01, sgd_learning_rate=0.05, batch_size=5)


def changed(**settings) -> TrainingConfig:
    """The fast configuration with other settings."""
    return TrainingConfig(**{**FAST.model_dump(), **settings})


def easy_trainer(config: TrainingConfig = FAST, validation: int = 4, seed: int = 1, **placement) -> Trainer:
    images, labels = easy_slices()
    return Trainer(
        build_unet(ModelConfig(width=8, depth=2), 1, 2, seed=0),
        images,
        labels,
        train=range(8),
        validation=range(8, 8 + validation),
        patients=[f"patient {row // 2}" for row in range(12)],
        config=config,
        seed=seed,
        **placement,
    )


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(one, other):
    """Equal nested values, bit for bit, where NaN equals NaN."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other or (math.isnan(one) and math.isnan(other))


class TestTrainer:
    def test_an_easy_task_is_learned(self):
        trainer = easy_trainer(
            changed(epochs=14, adam_epochs=10, adam_learning_rate=0.02, batch_size=2, augmentation=only(mirror=0.5))
        )
        records = [trainer.train_epoch() for _ in range(14)]
        assert records[-1].loss < 0.2 * records[0].loss
        for split in ("train", "validation"):
            first, last = (np.array(record.dice[split].pooled) for record in (records[0], records[-1]))
            assert (last > 0.9).all()
            assert (last > first + 0.2).all()

    def test_stopping_after_any_epoch_changes_no_bit(self):
        whole = easy_trainer()
        states = [through_a_file(whole.state())]
        for _ in range(4):
            whole.train_epoch()
            states.append(through_a_file(whole.state()))
        for state in states:
            resumed = easy_trainer()
            resumed.restore(state)
            while resumed.epoch < 4:
                resumed.train_epoch()
            assert_same(resumed.state(), states[-1])

    def test_going_back_is_possible_too(self):
        trainer = easy_trainer()
        trainer.train_epoch()
        early = trainer.state()
        for _ in range(3):
            trainer.train_epoch()
        late = trainer.state()
        trainer.restore(early)
        assert trainer.epoch == 1
        for _ in range(3):
            trainer.train_epoch()
        assert_same(trainer.state(), late)

    def test_a_state_shares_no_memory_with_the_trainer(self):
        trainer = easy_trainer()
        trainer.train_epoch()
        state, weights = trainer.state(), trainer.weights()
        kept = through_a_file(state)
        trainer.train_epoch()
        assert_same(state, kept)
        assert_same(weights, kept["model"])

    def test_the_result_depends_on_nothing_but_its_inputs(self):
        torch.manual_seed(1)
        np.random.seed(1)
        first = easy_trainer()
        first.train_epoch()
        torch.manual_seed(2)
        np.random.seed(2)
        second = easy_trainer()
        second.train_epoch()
        assert_same(first.state(), second.state())
        other = easy_trainer(seed=2)
        other.train_epoch()
        assert not torch.equal(other.weights()["head.weight"], first.weights()["head.weight"])

    def test_records_name_the_optimiser_of_each_epoch(self):
        trainer = easy_trainer()
        records = [trainer.train_epoch() for _ in range(4)]
        assert [record.epoch for record in records] == [1, 2, 3, 4]
        assert [record.optimizer for record in records] == ["adam", "adam", "sgd", "sgd"]
        assert [record.learning_rate for record in records] == [0.01, 0.01, 0.05, 0.05]
        assert trainer.records == records

    def test_sgd_steps_as_written_with_momentum_and_without_decay(self):
        config = changed(adam_epochs=0, batch_size=4, momentum=0.5, augmentation=NO_AUGMENTATION)
        trainer = easy_trainer(config)
        images, labels = (torch.from_numpy(array) for array in easy_slices())
        model = build_unet(ModelConfig(width=8, depth=2), 1, 2, seed=0)
        model.train()
        velocity = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
        for epoch in (1, 2):
            for batch in epoch_batches(range(8), 4, seed=1, epoch=epoch):
                model.zero_grad()
                dice_loss(model(images[batch]), labels[batch], config).backward()
                with torch.no_grad():
                    for name, value in model.named_parameters():
                        velocity[name] = 0.5 * velocity[name] + value.grad
                        value.sub_(0.05 * velocity[name])
            trainer.train_epoch()
        for name, value in model.named_parameters():
            assert torch.allclose(trainer.weights()[name], value, atol=1e-6)

    def test_weight_decay_is_adams_alone(self):
        plain, decayed = (easy_trainer(changed(weight_decay=decay)) for decay in (0, 1))
        plain.train_epoch()
        decayed.train_epoch()
        assert not torch.equal(plain.weights()["head.weight"], decayed.weights()["head.weight"])
        plain, decayed = (easy_trainer(changed(weight_decay=decay, adam_epochs=0)) for decay in (0, 1))
        plain.train_epoch()
        decayed.train_epoch()
        assert_same(plain.weights(), decayed.weights())

    def test_evaluation_is_on_clean_slices_in_eval_mode(self):
        trainer = easy_trainer(changed(augmentation=only(crop=1, mirror=1)))
        record = trainer.train_epoch()
        model = build_unet(ModelConfig(width=8, depth=2), 1, 2, seed=0)
        model.load_state_dict(trainer.weights())
        images, labels = (torch.from_numpy(array) for array in easy_slices())
        with torch.no_grad():
            prediction = model.eval()(images[8:]).argmax(1)
        patients = ["d", "d", "e", "e"]
        assert record.dice["validation"] == hard_dice_averages(prediction, labels[8:], patients, classes=2)

    def test_a_row_has_the_columns_of_the_table(self):
        row = easy_trainer().train_epoch().row()
        names = [
            f"dice_{split}_{average}{class_id}"
            for average in ("", "slice_", "patient_")
            for split in ("train", "validation")
            for class_id in (1, 2)
        ]
        assert list(row) == ["epoch", "optimizer", "learning_rate", "loss", *names]
        assert all(type(row[name]) is float for name in ["learning_rate", "loss", *names])

    def test_without_validation_slices_the_validation_dice_is_nan(self):
        row = easy_trainer(validation=0).train_epoch().row()
        assert math.isnan(row["dice_validation_1"])
        assert math.isnan(row["dice_validation_patient_2"])
        assert not math.isnan(row["dice_train_1"])

    def test_divergence_is_named(self):
        config = changed(adam_epochs=0, sgd_learning_rate=1e38)
        expected = (
            r"training diverged: expected finite numbers, the loss in batch 2 of 2 of epoch 1 is not "
            r"\(sgd, learning rate 1e\+38\); lower training\.sgd_learning_rate"
        )
        with pytest.raises(ValueError, match=expected):
            easy_trainer(config).train_epoch()

    def test_divergence_in_the_last_step_is_seen(self):
        config = changed(adam_epochs=0, sgd_learning_rate=1e38, batch_size=8)
        with pytest.raises(ValueError, match="a prediction after the last batch of epoch 1 is not"):
            easy_trainer(config).train_epoch()

    def test_labels_that_the_network_does_not_know_are_refused(self):
        images, labels = easy_slices()
        labels[3] = 255
        with pytest.raises(AssertionError, match="labels are 0 to 2, got 255: are these slices labelled"):
            Trainer(
                build_unet(ModelConfig(width=8, depth=2), 1, 2, seed=0),
                images,
                labels,
                train=[0, 3],
                validation=[],
                patients=["a"] * 12,
                config=FAST,
                seed=0,
            )


class Listening(nn.Module):
    """A wrapper that keeps what went through, as a data-parallel one would split it."""

    def __init__(self, network):
        super().__init__()
        self.network, self.seen = network, []

    def forward(self, images):
        self.seen.append(images.clone())
        return self.network(images)


class TestSeveralProcesses:
    def test_together_they_see_the_batches_that_one_process_sees(self):
        config = changed(batch_size=4)
        alone = easy_trainer(config, wrap=Listening)
        pair = [easy_trainer(config, rank=rank, world_size=2, wrap=Listening) for rank in (0, 1)]
        for trainer in (alone, *pair):
            trainer.train_epoch()
        for number, batch in enumerate(alone._network.seen):
            assert torch.equal(pair[0]._network.seen[number], batch[0::2])
            assert torch.equal(pair[1]._network.seen[number], batch[1::2])

    def test_each_epoch_augments_a_slice_anew(self):
        trainer = easy_trainer(changed(batch_size=8, augmentation=only(crop=1)), wrap=Listening)
        for _ in range(3):
            trainer.train_epoch()
        # The order changes with the epoch, the set of clean slices doesn't: their sums tell the windows apart.
        sums = [sorted(batch.sum((1, 2, 3)).tolist()) for batch in trainer._network.seen]
        assert sums[0] != sums[1] != sums[2]
        plain = easy_trainer(changed(batch_size=8, augmentation=NO_AUGMENTATION), wrap=Listening)
        for _ in range(2):
            plain.train_epoch()
        first, second = (sorted(batch.sum((1, 2, 3)).tolist()) for batch in plain._network.seen)
        assert first == second

    def test_a_last_batch_of_one_slice_is_trained_on(self):
        trainer = easy_trainer(changed(batch_size=7), wrap=Listening)
        trainer.train_epoch()
        assert [len(batch) for batch in trainer._network.seen] == [7, 1]

    def test_the_wrapper_is_trained_through_and_left_out_of_the_weights(self):
        wrapped, plain = easy_trainer(wrap=Listening), easy_trainer()
        wrapped.train_epoch()
        plain.train_epoch()
        assert wrapped._network.seen[0].shape == (5, 1, 16, 16)
        assert_same(wrapped.state(), plain.state())


class KillsALoader(nn.Module):
    """Kills one of the processes that augment when it is first called in training."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images):
        for process in active_children()[:1]:
            process.kill()
        return self.network(images)


class TestLoaders:
    def test_processes_that_augment_change_no_bit_and_end_with_the_epoch(self):
        alone, helped = (easy_trainer(changed(batch_size=3), loaders=loaders, wrap=Listening) for loaders in (0, 2))
        for _ in range(3):
            alone.train_epoch()
            helped.train_epoch()
            assert not active_children()
        assert_same(helped.state(), alone.state())
        assert_same(helped._network.seen, alone._network.seen)

    def test_one_that_is_killed_is_an_error_and_the_epoch_can_be_trained_again(self):
        trainer = easy_trainer(changed(batch_size=1), loaders=2, wrap=KillsALoader)
        before = through_a_file(trainer.state())
        with pytest.raises(RuntimeError, match=r"DataLoader worker .* (killed by signal|exited unexpectedly)"):
            trainer.train_epoch()
        assert not active_children()
        again, alone = easy_trainer(changed(batch_size=1), loaders=2), easy_trainer(changed(batch_size=1))
        again.restore(before)
        assert_same(again.train_epoch(), alone.train_epoch())
        assert_same(again.state(), alone.state())
