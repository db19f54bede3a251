"""Keys are neither forgotten nor tried for ever, whatever workers do."""

from hypothesis import given
from hypothesis import strategies as st

from ray_tracin.assignment import TRIES, Assignment


def test_a_key_that_was_given_out_twice_counts_once() -> None:
    keys = Assignment("ab")
    assert [keys.take(1, [1, 2]), keys.take(2, [1, 2]), keys.take(1, [1, 2])] == ["a", "b", None]
    keys.give_back("a")
    assert keys.waiting == 1
    assert keys.take(1, [1, 2]) is None, "worker 1 has it already"
    assert keys.take(2, [1, 2]) == "a"
    assert keys.copies("a") == 2
    assert [keys.finish("a"), keys.finish("a"), keys.over, keys.finish("b"), keys.over] == [
        True,
        False,
        False,
        True,
        True,
    ]


def test_a_failed_key_goes_to_another_worker_while_there_is_one() -> None:
    keys = Assignment("a")
    assert keys.take(1, [1, 2]) == "a"
    keys.fail("a", RuntimeError())
    assert keys.take(1, [1, 2]) is None
    assert keys.take(1, [1]) == "a", "there is no other any more"


def test_the_third_failure_is_for_good_unless_a_copy_does_it() -> None:
    keys = Assignment("a")
    for number in range(TRIES):
        assert not keys.over
        assert keys.take(number, [number]) == "a"
        keys.fail("a", RuntimeError(str(number)))
    assert (keys.over, keys.left, str(keys.failures["a"])) == (True, 0, "2")
    assert keys.take(9, [9]) is None
    assert keys.finish("a")
    assert keys.failures == {}


@given(st.lists(st.tuples(st.sampled_from(["done", "raised", "lost", "given up"]), st.integers(1, 3)), max_size=80))
def test_every_key_ends_done_or_failed(steps: list[tuple[str, int]]) -> None:
    keys, done, flying, raised = Assignment(range(5)), set(), [], dict.fromkeys(range(5), 0)
    moves = iter(steps)
    while not keys.over:
        what, worker = next(moves, ("done", 1))
        key = keys.take(worker, [1, 2, 3]) if what != "done" else keys.take(worker, [worker])
        flying += [key] if key is not None else []
        if not flying:
            continue
        key = flying.pop(0)
        if what == "done":
            assert keys.finish(key) == (key not in done)
            done.add(key)
        elif what == "lost":
            keys.give_back(key)
        else:
            open_before = keys.is_open(key) and key not in keys.failures
            keys.fail(key, RuntimeError(), for_good=what == "given up")
            raised[key] += open_before and what == "raised"
    assert done | keys.failures.keys() == set(range(5))
    assert not done & keys.failures.keys()
    assert all(count <= TRIES for count in raised.values())
