"""The command line, and the files that it writes."""

import csv
import math
from pathlib import Path

import pytest

from megatron_sage.errors import UserError
from megatron_sage.figures import command
from megatron_sage.figures.output import write_csv
from megatron_sage.figures.registry import FIGURES

DOCS = Path(__file__).parents[2] / "docs" / "figures"


@pytest.mark.parametrize("argv", [[], ["list"]])
def test_the_list_has_one_line_a_figure(argv, capsys):
    assert command.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(FIGURES)
    assert all(len(line.split()) > 3 for line in lines)


def test_an_unknown_name_is_one_line_with_the_nearest():
    with pytest.raises(UserError, match=r"^lambda_schedule: unknown figure; did you mean lambda_schedules\?") as error:
        command.main(["lambda_schedule"])
    assert "\n" not in str(error.value)


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out .*file/in: cannot make this directory"):
        command.main(["step_std", "--out", str(tmp_path / "file" / "in")])


@pytest.mark.parametrize("name", ["step_std", "lambda_schedules"])
def test_a_figure_is_a_picture_and_its_numbers_the_same_each_time(name, tmp_path, capsys):
    made = []
    for out in (tmp_path / "a" / "b", tmp_path / "c"):
        assert command.main([name, "--out", str(out)]) == 0
        assert sorted(path.name for path in out.iterdir()) == [f"{name}.csv", f"{name}.png"]
        assert capsys.readouterr().out.splitlines() == [f"wrote {out / name}.csv", f"wrote {out / name}.png"]
        made.append([(out / f"{name}.{kind}").read_bytes() for kind in ("csv", "png")])
    assert made[0] == made[1]
    png = made[0][1]
    assert png.startswith(b"\x89PNG") and int.from_bytes(png[16:20]) == 1200
    assert b"Software" not in png


def test_all_makes_every_figure(tmp_path, monkeypatch, capsys):
    called = []

    def fake(name):
        def make(out, study):
            called.append((name, out, study))
            return [out / name]

        return make

    monkeypatch.setattr(command, "FIGURES", {name: (fake(name), "") for name in FIGURES})
    assert command.main(["all", "--out", str(tmp_path)]) == 0
    assert called == [(name, tmp_path, Path("docs/study")) for name in FIGURES]
    assert len(capsys.readouterr().out.splitlines()) == len(FIGURES)
    assert command.main(["reward_curves", "--out", str(tmp_path), "--study", "runs/x"]) == 0
    assert called[-1] == ("reward_curves", tmp_path, Path("runs/x"))


@pytest.mark.parametrize("name", ["step_std", "lambda_schedules", "reward_curves", "kl_strategies"])
def test_the_documented_numbers_are_those_of_this_version(name, tmp_path):
    FIGURES[name][0](tmp_path, DOCS.parent / "study")
    fresh, documented = (list(csv.reader((d / f"{name}.csv").open())) for d in (tmp_path, DOCS))
    assert fresh[0] == documented[0] and len(fresh) == len(documented)
    for new, old in zip(fresh[1:], documented[1:], strict=True):
        for a, b in zip(new, old, strict=True):
            assert a == b or math.isclose(float(a), float(b), rel_tol=1e-4, abs_tol=1e-12)


@pytest.mark.parametrize("name", list(FIGURES))
def test_every_figure_is_documented_with_its_command(name):
    page = (DOCS / "README.md").read_text()
    assert f"]({name}.png)" in page and f"megatron-sage figures {name}" in page
    assert (DOCS / f"{name}.png").is_file() and (DOCS / f"{name}.csv").is_file()


def test_csv_has_six_digits_and_plain_line_ends(tmp_path):
    path = write_csv(tmp_path / "x.csv", ["name", "n", "x"], [["a", 3, 1 / 3], ["b", 4, 1e-7]])
    assert path.read_bytes() == b"name,n,x\na,3,0.333333\nb,4,1e-07\n"
