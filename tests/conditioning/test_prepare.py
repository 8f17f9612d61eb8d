"""Filling the cache, checking it and reading it back; `megatron-sage encode`."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_sage.__main__ import main
from megatron_sage.conditioning import qwen, siglip
from megatron_sage.conditioning.cache import CacheError, EmbeddingCache
from megatron_sage.conditioning.embedding import ImageEmbedding, PromptEmbedding
from megatron_sage.conditioning.encoders import open_image_encoder, open_text_encoder
from megatron_sage.conditioning.prepare import check_cache, fill_cache, image_key, load_prompt, open_conditions, share
from megatron_sage.conditioning.words import WordEncoder
from megatron_sage.config import Config
from megatron_sage.data.images import read_image
from megatron_sage.data.prompts import PromptRow
from megatron_sage.errors import UserError
from tests.hv15 import write_pipeline

TEXTS = ["a cat", 'a sign "OPEN"', "a dog", "a cat"]


@pytest.fixture(autouse=True)
def not_under_torchrun(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("hv15") / "i2v", "i2v", seed=1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[PromptRow]:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(rng.integers(0, 256, (40 + number, 50, 3), np.uint8)).save(folder / f"{number}.png")
    return [PromptRow(text, folder / f"{number % 2}.png") for number, text in enumerate(TEXTS)]


def run(root: Path, cache: Path, **video: int) -> Config:
    config = Config()
    config.model.pretrained, config.data.embedding_cache = str(root), str(cache)
    config.video.height, config.video.width, config.precision.dtype = 32, 48, "fp32"
    for key, value in video.items():
        setattr(config.video, key, value)
    return config


def equal(first: object, second: object) -> bool:
    return all(torch.equal(one, other) for one, other in zip(vars(first).values(), vars(second).values(), strict=True))


@pytest.fixture(scope="module")
def full(root: Path, rows: list[PromptRow], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A filled cache; copy it before changing it."""
    directory = tmp_path_factory.mktemp("full") / "cache"
    fill_cache(run(root, directory), rows)
    return directory


@pytest.fixture
def cache(full: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(full, tmp_path / "cache"))


def test_what_is_read_back_is_what_the_encoders_make(root: Path, rows: list[PromptRow], full: Path) -> None:
    config = run(root, full)
    conditions = open_conditions(config, rows)
    encoder, images = open_text_encoder(root), open_image_encoder(root, 32, 48)
    for row in rows[:2]:
        text, image = load_prompt(config, row, conditions)
        assert equal(text, encoder.encode(row.text))
        assert image is not None and row.image is not None and equal(image, images.encode(read_image(row.image)))
    text, image = load_prompt(config, PromptRow(" "))
    assert image is None and equal(text, encoder.encode("")), "the negative prompt is there"
    assert len(list(full.glob("*.safetensors"))) == 3 + 1 + 2  # distinct texts, the negative prompt, pictures
    assert check_cache(config, rows) == ({"good": 6}, [])


def test_the_cast_of_a_run_is_cached_apart(root: Path, rows: list[PromptRow], cache: Path) -> None:
    """Another dtype or video size is another entry, and the dtype follows the run's, not the device."""
    config = run(root, cache)
    config.precision.dtype = "bf16"
    counts, lines = check_cache(config, rows)
    assert counts == {"missing": 6} and "megatron-sage encode" in lines[0]
    config.encoders.dtype = "fp32"
    assert check_cache(config, rows)[0] == {"good": 6}
    assert check_cache(run(root, cache, width=32), rows)[0] == {"good": 4, "missing": 2}


def test_pictures_are_decoded_by_the_chosen_backend(
    root: Path, rows: list[PromptRow], cache: Path, monkeypatch
) -> None:
    pytest.importorskip("nvidia.dali", reason="the extra dali is not installed")
    from megatron_sage.data.dali import DaliReader

    seen, read = [], DaliReader.read_image
    monkeypatch.setattr(DaliReader, "read_image", lambda self, path: seen.append(path) or read(self, path))
    config = run(root, cache)
    conditions = open_conditions(config, rows)
    assert conditions.images is not None
    before = load_prompt(config, rows[0], conditions)[1]
    for row in rows[:2]:
        assert row.image is not None
        conditions.images.path(image_key(row.image)).unlink()
    config.data.backend = "dali"
    assert fill_cache(config, rows) == {"found": 4, "encoded": 2}
    assert sorted(seen) == sorted(row.image for row in rows[:2] if row.image)
    assert equal(load_prompt(config, rows[0], conditions)[1], before)


def test_a_full_cache_needs_no_weights(root: Path, rows: list[PromptRow], cache: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(root, tmp_path / "bare"))
    for part in ("text_encoder", "text_encoder_2", "image_encoder"):
        (bare / part / "model.safetensors").unlink()
    config = run(bare, cache)
    assert fill_cache(config, rows) == {"found": 6}
    assert load_prompt(config, rows[0])[1] is not None
    # and says so when it does need them
    with pytest.raises(UserError, match="text_encoder: cannot be loaded"):
        fill_cache(config, [PromptRow("something new")])
    for damage in ("cut off", "gone"):
        for path in cache.glob("encoder_*.json"):
            path.write_text("{") if damage == "cut off" else path.unlink()
        with pytest.raises(
            UserError,
            match="not what .megatron-sage encode. writes" if damage == "cut off" else f"and {cache} does not know",
        ):
            open_conditions(config, rows)


def damages(path: Path, entries: list[Path]) -> dict[str, object]:
    """Name -> what it does to an entry."""

    def flip() -> None:
        content = bytearray(path.read_bytes())
        content[len(content) * 2 // 3] ^= 1
        path.write_bytes(bytes(content))

    def reshape() -> None:
        """Consistent in itself, but not what this encoder makes."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        name = {"megatron_sage prompt embedding 1": PromptEmbedding, "megatron_sage image embedding 1": ImageEmbedding}
        kind = name[metadata["format"]]
        if kind is PromptEmbedding:
            value: object = PromptEmbedding(torch.zeros(3, 7), torch.ones(3), torch.zeros(0, 20), torch.zeros(0))
        else:
            value = ImageEmbedding(torch.zeros(9, 18), torch.zeros(32, 3, 2))
        written = EmbeddingCache(path.parent, metadata["fingerprint"], kind).put(metadata["text"], value)  # type: ignore[type-var]
        assert written == path

    return {
        "flipped byte": flip,
        "cut off": lambda: path.write_bytes(path.read_bytes()[:-5]),
        "empty": lambda: path.write_bytes(b""),
        "another's": lambda: shutil.copy(next(entry for entry in entries if entry != path), path),
        "other tensors": lambda: save_file({"x": torch.zeros(3)}, path),
        "other shape": reshape,
    }


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("text", "flipped byte"),
        ("image", "other shape"),
        ("text", "another's"),
        *(
            pytest.param(kind, damage, marks=pytest.mark.nightly)
            for kind in ("text", "image")
            for damage in ("cut off", "empty", "other tensors")
        ),
        *(pytest.param("image", damage, marks=pytest.mark.nightly) for damage in ("flipped byte", "another's")),
        pytest.param("text", "other shape", marks=pytest.mark.nightly),
    ],
)
def test_bad_entries_are_found_and_made_again(root: Path, rows: list[PromptRow], cache: Path, kind, damage) -> None:
    config = run(root, cache)
    conditions = open_conditions(config, rows)
    assert conditions.images is not None and rows[0].image is not None
    if kind == "text":
        path = conditions.texts.path("a cat")
    else:
        path = conditions.images.path(image_key(rows[0].image))
    good = load_prompt(config, rows[0], conditions)
    damages(path, sorted(cache.glob("*.safetensors")))[damage]()  # type: ignore[operator]
    with pytest.raises(CacheError, match="megatron-sage encode") as error:
        load_prompt(config, rows[0])
    assert "\n" not in str(error.value)
    assert check_cache(config, rows)[0] == {"good": 5, "damaged": 1}
    ticks: list[None] = []
    assert fill_cache(config, rows, on_item=lambda: ticks.append(None)) == {"found": 5, "encoded": 1}
    text, image = load_prompt(config, rows[0])
    assert len(ticks) == 6 and equal(text, good[0]) and equal(image, good[1])


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_share_the_work_without_a_word(rows: list[PromptRow], world: int) -> None:
    shares = [share(rows, rank, world) for rank in range(world)]
    texts = [text for mine, _ in shares for text in mine]
    pictures = [path for _, mine in shares for path in mine]
    assert sorted(texts) == sorted({" ", *TEXTS}) and len(pictures) == len(set(pictures)) == 2
    sizes = [len(mine) + len(other) for mine, other in shares]
    assert max(sizes) - min(sizes) <= 1


def test_ranks_fill_one_cache(root: Path, rows: list[PromptRow], full: Path, tmp_path: Path) -> None:
    for rank in (1, 0):  # in any order
        fill_cache(run(root, tmp_path / "cache"), rows, rank, 2)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {path.name for path in full.iterdir()}
    for row in rows:
        (text, image), (text_full, image_full) = (load_prompt(run(root, at), row) for at in (tmp_path / "cache", full))
        assert equal(text, text_full) and equal(image, image_full)


def test_text_encoders_are_gone_before_the_image_encoder_is_loaded(root, rows, cache, monkeypatch) -> None:
    """Each is as large as the policy; the last is gone when training begins."""
    alive: dict[str, weakref.ref] = {}
    before: list[list[str]] = []

    def watched(module):
        load = module.load_model

        def loaded(cls, folder, *arguments):
            before.append([name for name, ref in alive.items() if ref() is not None])
            model = load(cls, folder, *arguments)
            alive[folder.name] = weakref.ref(model)
            return model

        monkeypatch.setattr(module, "load_model", loaded)

    watched(qwen)
    watched(siglip)
    for path in cache.glob("*.safetensors"):
        path.unlink()
    conditions = open_conditions(run(root, cache), rows)
    monkeypatch.setattr(
        "megatron_sage.conditioning.prepare.open_conditions", lambda *_: conditions
    )  # outlives the call
    fill_cache(run(root, cache), rows)
    assert before == [[], ["text_encoder"], []]
    assert list(alive) == ["text_encoder", "text_encoder_2", "image_encoder"]
    assert all(ref() is None for ref in alive.values())


def test_an_embedding_that_overflows_is_refused(tmp_path: Path, monkeypatch) -> None:
    write_tiny(tmp_path)
    bad = PromptEmbedding(torch.full((1, 8), torch.inf), torch.ones(1), torch.zeros(0, 4), torch.zeros(0))
    monkeypatch.setattr(WordEncoder, "encode", lambda *_: bad)
    with pytest.raises(UserError, match=r"encoders.dtype=auto: the embedding of ' ' is not finite; try bf16 or fp32"):
        fill_cache(run(tmp_path, tmp_path / "cache"), [PromptRow("a cat")])
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def write_tiny(root: Path, width: int = 8) -> None:
    WordEncoder(dim=8, dim_2=4).save_pretrained(root / "text_encoder")
    (root / "transformer").mkdir(exist_ok=True)
    text = f'{{"text_embed_dim": {width}, "text_embed_2_dim": 4}}'
    (root / "transformer" / "config.json").write_text(text)


def test_encoders_of_another_checkpoint_are_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path, width=9)
    with pytest.raises(UserError, match=r"text_embed_dim is 9, its encoder's width is 8"):
        open_conditions(run(tmp_path, tmp_path / "cache"), [])


def test_a_picture_that_is_gone_is_named(root: Path, cache: Path, tmp_path: Path) -> None:
    gone = PromptRow("a cat", tmp_path / "gone.png")
    with pytest.raises(UserError, match=r"gone.png: cannot be read"):
        fill_cache(run(root, cache), [gone])
    (tmp_path / "gone.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"gone.png"):
        fill_cache(run(root, cache), [gone])


def test_the_command_reads_tables_with_images(capsys, root: Path, rows: list[PromptRow], full: Path) -> None:
    table = rows[0].image.parent / "prompts.csv"  # type: ignore[union-attr]
    lines = [f"{json.dumps(row.text)},{row.image.name}".replace('\\"', '""') for row in rows]  # type: ignore[union-attr]
    table.write_text("\n".join(["prompt,image", *lines]) + "\n")
    size = ["video.height=32", "video.width=48", "precision.dtype=fp32"]
    assert main(["encode", f"--model={root}", f"--cache={full}", f"--prompts={table}", *size, "--check"]) == 0
    assert "6 good, 0 missing, 0 damaged" in capsys.readouterr().out


# --- the command ---


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """--model, --cache and --prompts of a tiny world."""
    write_tiny(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\n# no prompt\na dog\n")
    return [f"--model={tmp_path}", f"--cache={tmp_path / 'cache'}", f"--prompts={tmp_path / 'prompts.txt'}"]


def test_encode_fills_resumes_and_checks(capsys, tmp_path: Path, tiny: list[str]) -> None:
    assert main(["encode", *tiny, "--check"]) == 1
    assert "0 good, 3 missing, 0 damaged" in capsys.readouterr().out
    assert main(["encode", *tiny]) == 0
    assert "3 encoded, 0 already in" in capsys.readouterr().out
    entry = min((tmp_path / "cache").glob("*.safetensors"))
    entry.write_bytes(entry.read_bytes()[:-1])
    assert main(["encode", *tiny, "--check"]) == 1
    out = capsys.readouterr().out
    assert f"{entry}: damaged" in out and "2 good, 0 missing, 1 damaged" in out
    assert main(["encode", *tiny]) == 0
    assert "1 encoded, 2 already in" in capsys.readouterr().out
    assert main(["encode", *tiny, "--check"]) == 0


def test_a_runs_own_files_are_the_defaults(capsys, tmp_path: Path, tiny: list[str]) -> None:
    (tmp_path / "held_out.txt").write_text("a bird\n")
    yaml = tmp_path / "run.yaml"
    yaml.write_text(
        f"name: x\noutput_dir: {tmp_path}/runs/{{name}}\nmodel: {{pretrained: {tmp_path}}}\n"
        f"data: {{prompts: {tmp_path}/prompts.txt}}\nevaluation: {{prompts: {tmp_path}/held_out.txt}}\n"
    )
    assert main(["encode", str(yaml)]) == 0
    assert "4 encoded" in capsys.readouterr().out and len(list((tmp_path / "runs/x/embeddings").iterdir())) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--model=/no/such/model"], "/no/such/model/text_encoder/config.json: cannot be read"),
        (["--prompts=/no/such/prompts.txt"], "/no/such/prompts.txt: "),
        (["data.promts=x"], "did you mean data.prompts?"),
        (["--device=tpu"], "--device tpu: choose cpu or cuda"),
        (["a.yaml", "b.yaml"], "one configuration file at most"),
        (["--chek"], "unrecognized arguments: --chek"),
        (["no.yaml"], "no.yaml: no such configuration file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, tiny: list[str], change: list[str], said: str) -> None:
    kept = [option for option in tiny if option.split("=")[0] not in {text.split("=")[0] for text in change}]
    assert main(["encode", *kept, *change]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err


@pytest.mark.parametrize("missing", ["--model", "--cache", "--prompts"])
def test_what_is_not_given_is_asked_for(capsys, tiny: list[str], missing: str) -> None:
    assert main(["encode", *(option for option in tiny if not option.startswith(missing))]) == 2
    assert missing in capsys.readouterr().err


@pytest.mark.nightly
def test_torchrun_spreads_the_work(tmp_path: Path, tiny: list[str]) -> None:
    """Real processes, no process group; a fault of one rank's own share is told by that rank."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "megatron_sage", "encode", *tiny], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 2: 2 encoded" in done.stdout and "rank 1 of 2: 1 encoded" in done.stdout
    assert main(["encode", *tiny, "--check"]) == 0


def test_a_ranks_own_fault_is_told_by_that_rank(capsys, monkeypatch, tiny: list[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)

    def broken(*_: object) -> None:
        raise UserError("a.png: cannot be read")

    monkeypatch.setattr(WordEncoder, "encode", broken)
    assert main(["encode", *tiny]) == 2
    assert capsys.readouterr().err == "error (rank 1): a.png: cannot be read\n"
