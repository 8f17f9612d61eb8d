"""Prompt files and the cursor over them."""

import warnings
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sage.data.prompts import PromptCursor, read_prompts
from megatron_sage.errors import UserError


def test_comments_and_blank_lines_are_skipped(tmp_path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# heading\n\n a red circle \nein grüner Kreis\r\n  # more\nlast", encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_prompts(path) == ["a red circle", "ein grüner Kreis", "last"]


def test_duplicates_are_kept_and_warned_about_once(tmp_path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("b\na\nb\nb\n")
    with pytest.warns(UserWarning, match="2 of 4") as caught:
        assert read_prompts(path) == ["b", "a", "b", "b"]
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("content", "named"),
    [(None, "cannot read"), (b"", "no prompt"), (b"# only\n\n", "no prompt"), (b"\xff\xfe", "not UTF-8")],
)
def test_unusable_files_are_refused_in_one_line(tmp_path, content: bytes | None, named: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=named) as error:
        read_prompts(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 5))
def test_every_epoch_holds_every_prompt_once(num_prompts: int, per_iteration: int, seed: int) -> None:
    cursor = PromptCursor(num_prompts, per_iteration, seed)
    taken = [index for _ in range(num_prompts) for index in cursor.take()]
    assert len(taken) == num_prompts * per_iteration
    assert Counter(taken) == dict.fromkeys(range(num_prompts), per_iteration)


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 5), st.integers(0, 7))
def test_a_resumed_cursor_goes_on_with_the_same_prompts(num: int, per_iteration: int, seed: int, before: int) -> None:
    cursor = PromptCursor(num, per_iteration, seed)
    for _ in range(before):
        cursor.take()
    resumed = PromptCursor(num, per_iteration, seed)
    resumed.load_state_dict(cursor.state_dict())
    assert [resumed.take() for _ in range(4)] == [cursor.take() for _ in range(4)]


def test_the_order_is_shuffled_anew_each_epoch_and_by_the_seed() -> None:
    cursor = PromptCursor(32, 32, seed=0)
    first, second = cursor.take(), cursor.take()
    assert first != second and sorted(first) == sorted(second) == list(range(32))
    assert PromptCursor(32, 32, seed=1).take() != first == PromptCursor(32, 32, seed=0).take()


@pytest.mark.parametrize(("num", "seed"), [(9, 0), (8, 1)])
def test_a_state_of_other_prompts_is_refused(num: int, seed: int) -> None:
    with pytest.raises(UserError, match="resume"):
        PromptCursor(num, 2, seed).load_state_dict(PromptCursor(8, 2, 0).state_dict())


@pytest.mark.parametrize(("num", "per_iteration"), [(0, 1), (4, 0)])
def test_an_empty_cursor_is_refused(num: int, per_iteration: int) -> None:
    with pytest.raises(UserError, match="at least 1"):
        PromptCursor(num, per_iteration)
