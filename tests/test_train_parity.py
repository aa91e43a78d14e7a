"""Parity gates: they pass what is the same, and each of them catches what it is there for."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
from safetensors.torch import load_file, save_file

from cli_run import saec
from saec.cli.models import _serve as serve
from saec.config import MllmSettings, Settings
from saec.errors import BadInput, GateFailed
from saec.train import parity
from saec.train.adapter import WEIGHTS, add_adapter, save_release
from saec.train.config import load_train_settings
from saec.train.gates import Report
from saec.train.loop import train
from saec.train.parity import verify_adapter, verify_model
from saec.train.probe import made_rows
from saec.train.release import release
from saec.train.rows import query_of, read_rows
from saec.types import Backend, Opinion, Query
from saec.vlm.load import load_vlm
from tiny_vlms import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SIDE = 112
SETTINGS = Settings(mllm=MllmSettings(max_side=SIDE, workers=1))
NAMES = {
    "trained and served: largest |ΔP|",
    "trained and served: labels that differ",
    "alone and in a batch: largest |ΔP|",
    "merged and unmerged: largest |ΔP|",
    "adapters that do not fit their base",
    "files with another hash than stated",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("parity")
    for family in ("qwen2.5-vl", "smolvlm"):
        make_adapter(save_tiny(family, folder / f"tiny-{family}"), folder / f"{family}-adapter")
    lines = made(folder / "made", 6)
    (folder / "probe.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def made(folder: Path, count: int) -> list[dict[str, object]]:
    """Rows of the built-in probe, as they are written, with paths from the folder above."""
    folder.mkdir()
    made_rows(folder, count)
    rows = [json.loads(line) for line in (folder / "probe.jsonl").read_text().splitlines()]
    for row in rows:
        for key in ("image", "anomaly_map"):
            if key in row:
                row[key] = f"{folder.name}/{row[key]}"
    return rows


def make_adapter(base: Path, out: Path, *, rank: int = 4) -> Path:
    """An adapter as training saves it, projector and all, of weights that change the answers."""
    vlm = load_vlm(MllmSettings(model=str(base), dtype="float32"))
    settings = load_train_settings(
        preset="tiny",
        overrides=[f"model={base}", "train_projector=true", f"lora_rank={rank}", "gradient_checkpointing=false"],
    )
    learnt = add_adapter(vlm, settings)
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in learnt.model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
    save_release(learnt, out)
    return out


def check(root: Path, family: str = "qwen2.5-vl", adapter: Path | None = None, **options: object) -> Report:
    how = {
        "settings": SETTINGS,
        "serve": serve,
        "model": str(root / f"tiny-{family}"),
        "probe": root / "probe.jsonl",
    } | options
    return verify_adapter(adapter or root / f"{family}-adapter", **how)


@pytest.fixture(scope="module")
def passed(root: Path) -> Report:
    return check(root, "smolvlm")


def failed(report: Report) -> set[str]:
    assert {gate.name for gate in report.gates} <= NAMES
    return {gate.name for gate in report.gates if not gate.passed}


class Changed:
    """A backend that answers otherwise than the one it stands before."""

    def __init__(self, inner: Backend, change: Callable[[float, int], float]) -> None:
        self.inner, self.change, self.model_id = inner, change, inner.model_id

    def judge(self, queries: Sequence[Query]) -> list[Opinion | Exception]:
        found = self.inner.judge(queries)
        return [replace(one, p_defect=self.change(one.p_defect, len(queries))) for one in found]


# -- what passes


@pytest.mark.parametrize("family", ["qwen2.5-vl", "smolvlm"])
def test_an_adapter_passes_all_gates_on_the_made_plates(root, family):
    report = check(root, family, probe=None)
    assert {gate.name: gate.measured for gate in report.gates if not gate.passed} == {}
    assert {gate.name for gate in report.gates} == NAMES
    assert report.n == 16


def test_the_gates_compare_answers_that_depend_on_the_image(root):
    """Else they would pass anything."""
    vlm = load_vlm(
        MllmSettings(model=str(root / "tiny-qwen2.5-vl"), adapter=root / "qwen2.5-vl-adapter", dtype="float32")
    )
    rows = read_rows(root / "probe.jsonl")
    with_adapter = parity.teacher_forced(vlm, rows, SETTINGS.mllm)
    bare = parity.teacher_forced(load_vlm(MllmSettings(model=str(root / "tiny-qwen2.5-vl"))), rows, SETTINGS.mllm)
    assert max(with_adapter) - min(with_adapter) > 20 * parity.LIMIT
    assert max(abs(p - q) for p, q in zip(with_adapter, bare, strict=True)) > 20 * parity.LIMIT


def test_a_model_without_adapter_is_held_to_batches_of_any_size(root):
    report = verify_model(str(root / "tiny-smolvlm"), SETTINGS, serve, probe=root / "probe.jsonl")
    assert report.passed
    assert report.adapter is None

    def by_batch(settings: Settings) -> Backend:
        return Changed(serve(settings), lambda p, n: p if n == 1 else p + 0.01)

    report = verify_model(str(root / "tiny-smolvlm"), SETTINGS, by_batch, probe=root / "probe.jsonl")
    assert failed(report) == {"alone and in a batch: largest |ΔP|"}


def test_the_made_plates_are_the_same_each_time(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        rows = made_rows(folder)
    assert [file.read_bytes() for file in sorted(one.iterdir())] == [
        file.read_bytes() for file in sorted(other.iterdir())
    ]
    assert [row.label for row in rows] == [0, 1] * 8
    assert {row.anomaly_map is None for row in rows} == {True, False}


# -- what each gate catches


def test_a_service_that_lost_the_adapter_is_caught(root):
    def without(settings: Settings) -> Backend:
        return serve(settings.model_copy(update={"mllm": settings.mllm.model_copy(update={"adapter": None})}))

    report = check(root, serve=without)
    assert "trained and served: largest |ΔP|" in failed(report)
    with pytest.raises(GateFailed, match=r"trained and served: largest \|ΔP\|: 0\.\d+, at most 0.001 allowed"):
        report.require()


def test_a_label_that_differs_is_caught_however_near_the_two_are(root):
    served = [opinion.p_defect for opinion in serve(exact(root)).judge(queries(root))]
    tau = served[0] + 4e-4
    settings = SETTINGS.model_copy(update={"mllm": SETTINGS.mllm.model_copy(update={"tau": tau})})
    report = check(root, settings=settings, serve=lambda how: Changed(serve(how), lambda p, n: p + 8e-4))
    assert failed(report) == {"trained and served: labels that differ"}


def exact(root: Path) -> Settings:
    adapter = root / "qwen2.5-vl-adapter"
    return SETTINGS.model_copy(update={"mllm": parity._exact(SETTINGS.mllm, str(root / "tiny-qwen2.5-vl"), adapter)})


def queries(root: Path) -> list[Query]:
    return [query_of(row) for row in read_rows(root / "probe.jsonl")]


def test_an_answer_that_is_no_number_is_no_parity(root):
    answers = count(1)
    report = check(root, serve=lambda how: Changed(serve(how), lambda p, n: math.nan if next(answers) == 3 else p))
    assert failed(report) == {"alone and in a batch: largest |ΔP|"}


def test_merged_weights_that_were_changed_are_caught(root, monkeypatch):
    real = parity.merge

    def careless(vlm):
        merged = real(vlm)
        with torch.no_grad():
            merged.model.get_input_embeddings().weight.mul_(1.05)
        return merged

    monkeypatch.setattr(parity, "merge", careless)
    assert failed(check(root)) == {"merged and unmerged: largest |ΔP|"}


def test_an_adapter_for_another_base_is_caught(root, tmp_path):
    other = save_tiny("qwen2.5-vl", tmp_path / "other", seed=1)
    report = check(root, model=str(other))
    assert failed(report) == {"adapters that do not fit their base"}
    with pytest.raises(GateFailed, match="made for another base"):
        report.require()
    assert failed(check(root, "smolvlm", root / "qwen2.5-vl-adapter")) == {"adapters that do not fit their base"}


def test_an_image_that_the_service_has_no_opinion_of_is_named(root):
    class Dumb:
        model_id = "dumb"

        def judge(self, queries: Sequence[Query]) -> list[Opinion | Exception]:
            return [ValueError("no idea") for _ in queries]

    with pytest.raises(BadInput, match=r"no opinion of a probe image \(no idea\)"):
        check(root, serve=lambda settings: Dumb())


# -- releases


def test_a_release_holds_the_adapter_its_gates_and_its_hashes(root, tmp_path, passed):
    adapter, out = root / "smolvlm-adapter", tmp_path / "release"
    release(adapter, out, passed)
    record = json.loads((out / "parity.json").read_text())
    assert record["passed"] is True
    assert {gate["name"] for gate in record["gates"]} == NAMES
    assert set(record["files"]) == {"adapter_config.json", WEIGHTS, "saec.json"}
    assert str(root) not in (out / "parity.json").read_text()
    again = check(root, "smolvlm", out)
    assert again.passed
    release(adapter, out, again)  # over itself
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_release_that_was_tampered_with_is_caught_with_both_hashes(root, tmp_path, passed):
    out = tmp_path / "release"
    release(root / "smolvlm-adapter", out, passed)
    weights = load_file(out / WEIGHTS)
    name = next(iter(weights))
    weights[name] = weights[name] * 1.01
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    report = check(root, "smolvlm", out)
    assert failed(report) == {"files with another hash than stated"}
    stated = json.loads((out / "parity.json").read_text())["files"][WEIGHTS]
    with pytest.raises(GateFailed, match=stated):
        report.require()
    shutil.copyfile(root / "smolvlm-adapter" / WEIGHTS, out / WEIGHTS)
    (out / "saec.json").unlink()
    assert failed(check(root, "smolvlm", out)) == {"files with another hash than stated"}


def test_a_release_that_fails_is_refused_and_nothing_is_written(root, tmp_path, passed):
    report = check(root, "smolvlm", serve=lambda how: Changed(serve(how), lambda p, n: 1 - p))
    with pytest.raises(GateFailed):
        release(root / "smolvlm-adapter", tmp_path / "release", report)
    assert not (tmp_path / "release").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(BadInput, match="no release"):
        release(root / "smolvlm-adapter", tmp_path / "mine", passed)


# -- from training to the command line


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    """A run of ``saec train`` on a few plates, at the size in which they are served."""
    rows = made(root / "trained", 6)
    groups = {"train": rows[:4], "val": rows[4:]}
    for split, lines in groups.items():
        text = "".join(json.dumps({**line, "split": split}) + "\n" for line in lines)
        (root / f"{split}.jsonl").write_text(text)
    settings = load_train_settings(
        preset="tiny",
        overrides=[f"model={root / 'tiny-qwen2.5-vl'}", "epochs=1", "lr=0.01", f"max_side={SIDE}", "side_multiple=28"],
    )
    return train(settings, root / "train.jsonl", root / "val.jsonl", root / "run").release


def test_what_was_trained_is_verified_and_released_by_one_command(root, run, tmp_path):
    out = tmp_path / "release"
    options = ("--probe", root / "probe.jsonl")  # served at the size of the training without being told
    found = saec("models", "verify", run, *options, "--release", out)
    assert found.code == 0, found.err
    assert all(name in found.out for name in NAMES)
    assert json.loads((out / "train.json").read_text())["settings"]["max_side"] == SIDE
    assert not any(str(root).encode() in file.read_bytes() for file in out.iterdir()), "where it was made is in it"
    assert "pass --model" in saec("models", "verify", out, *options).error()
    tree = json.loads(saec("models", "verify", out, "--model", root / "tiny-qwen2.5-vl", *options, "--json").out)
    assert tree["passed"] is True
    assert tree["n"] == 6


def test_serving_at_another_size_than_trained_is_caught_at_the_command_line(root, run, tmp_path):
    found = saec("models", "verify", run, "--set", "mllm.max_side=56", "--probe", root / "probe.jsonl",
                 "--release", tmp_path / "release")  # fmt: skip
    assert found.code == 1
    assert "gate failed: trained and served" in found.err
    assert not (tmp_path / "release").exists()


def test_an_adapter_changed_after_its_training_is_caught_by_its_hash(run, tmp_path):
    copy = shutil.copytree(run.parent, tmp_path / "run")
    (copy / run.name / WEIGHTS).write_bytes((copy / run.name / WEIGHTS).read_bytes()[:-1] + b"?")
    found = saec("models", "verify", copy / run.name, "--files")
    assert found.code == 1
    assert "files with another hash than stated: 1" in found.err


def test_what_cannot_be_verified_is_one_line(root, tmp_path):
    assert "only an adapter" in saec("models", "verify", "smolvlm", "--release", tmp_path / "x").error()
    orphan = shutil.copytree(root / "smolvlm-adapter", tmp_path / "orphan")
    assert "pass --model" in saec("models", "verify", orphan).error()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    line = saec("models", "verify", orphan, "--model", root / "tiny-smolvlm", "--release", tmp_path / "mine").error()
    assert "no release" in line
