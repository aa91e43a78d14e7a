"""``saec evaluate --baseline`` and ``saec bench table``, as a user calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import cli_fakes
from cli_fakes import tree
from cli_run import process, saec
from cloud_fakes import service_process
from saec.cli import asked
from saec.config import Settings
from saec.data.hashing import sha256_file
from saec.evaluate.report_run import RunFolder
from saec.types import Where

SIDE = 32


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cli_fakes.install(monkeypatch)
    monkeypatch.setenv("SAEC_MODELS", str(tmp_path / "no-models"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("data") / "parts", other=10)


@pytest.fixture(scope="module")
def station(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stations") / "bolt"
    found = process("fit", root, "--out", out, "--expert")
    assert found.code == 0, found.err
    return out


@pytest.fixture
def bare(station: Path, tmp_path: Path) -> Path:
    """A station without an expert."""
    other = Path(shutil.copytree(station, tmp_path / "bare"))
    shutil.rmtree(other / "expert")
    return other


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of three classes that is sure of nothing: everything is a defect to it."""
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["x"], ["m"], axes=[2, 3], keepdims=0),
            helper.make_node("MatMul", ["m", "w"], ["y"]),
        ],
        "even",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(np.zeros((3, 3), np.float32), "w")],
    )
    path = tmp_path_factory.mktemp("onnx") / "even.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def test_the_commands_explain_themselves():
    for words in (("bench", "table"), ("evaluate",)):
        found = saec(*words, "--help")
        assert found.code == 0
        assert "--baseline" in found.out and "--classifier" in found.out


def test_the_classifier_baseline_judges_every_part_by_saecs_rule(tmp_path, root, station, classifier):
    base = (
        "evaluate",
        root,
        "-s",
        station,
        "-o",
        tmp_path / "run",
        "--baseline",
        "yolo-cls",
        "--classifier",
        classifier,
    )
    assert "pass side 32" in saec(*base).error()  # 448 px is the paper's; this file takes another size
    found = saec(*base, "--side", SIDE, "--json")
    assert found.code == 0, found.err
    summary = json.loads(found.out)
    assert summary["called"] == {"good": 0, "defect": 20}
    assert summary["routing"]["reasons"] == {"edge_only": 20}
    assert summary["models"]["edge"].startswith("even@")
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize(
    ("baseline", "said"),
    [
        ("yolo-cls", "--classifier FILE"),
        ("llava-zero-shot", "saec models pull llava-1.5-7b"),
        ("qwen-zero-shot", "saec models pull qwen2.5-vl-7b"),
    ],
)
def test_a_baseline_whose_model_is_not_at_hand_says_how_to_get_it(tmp_path, root, station, baseline, said):
    base = ("evaluate", root, "-s", station, "-o", tmp_path / "run", "--baseline", baseline)
    assert said in saec(*base).error()
    assert not (tmp_path / "run").exists()


def test_the_model_that_ships_has_no_zero_shot_form(tmp_path, root, station):
    base = ("bench", "table", root, "-s", station, "-o", tmp_path / "t", "--zero-shot", "loupe", "--json")
    arms = {arm["arm"]: arm for arm in json.loads(saec(*base).out)["arms"]}
    assert "its projector is trained with its adapter" in arms["zero-shot"]["status"]["arm"]


def test_a_baseline_is_one_of_the_ways_to_route(tmp_path, root, station):
    base = ("evaluate", root, "-s", station, "-o", tmp_path / "run", "--baseline", "qwen-zero-shot")
    assert "choose one of" in saec(*base, "--edge-only").error()
    assert "asks a multimodal LLM" in saec(*base, "--cloud", "embedded").error()
    assert "asks a multimodal LLM" in saec(*base, "--cloud", "off").error()
    assert "does not answer" in saec(*base, "--cloud", "http://127.0.0.1:9").error()


def test_qwen_zero_shot_puts_every_part_to_a_service_and_its_word_alone_counts(tmp_path, root, station):
    with service_process(tmp_path) as (_, url):
        found = saec(
            *("evaluate", root, "-s", station, "-o", tmp_path / "run", "--json"),
            *("--baseline", "qwen-zero-shot", "--cloud", url),
        )
    assert found.code == 0, found.err
    summary = json.loads(found.out)
    assert summary["routing"]["reasons"] == {"cloud_only": 20}
    verdicts = RunFolder.load(tmp_path / "run").verdicts
    # The fake answers with what the edge said; a zero-shot model is not told that.
    assert {v.cloud_p_defect for v in verdicts if v.where is Where.CLOUD} == {0.0}
    assert summary["called"]["good"] == 20
    assert summary["unanswered"] == 0


def test_the_table_runs_what_is_at_hand_and_lists_the_rest(tmp_path, root, station, classifier):
    out = tmp_path / "table"
    args = ("bench", "table", root, "-s", station, "-o", out, "--classifier", classifier, "--side", SIDE)
    found = saec(*args, "--baseline", "llava-zero-shot", "--published")
    assert found.code == 0, found.err
    tree_ = json.loads((out / "table.json").read_text())
    states = {arm["arm"]: arm["state"] for arm in tree_["arms"]}
    not_at_hand = {name for name, state in states.items() if state == "not at hand"}
    assert not_at_hand == {"zero-shot", "llava-zero-shot", "no-tuning"}
    assert {"edge-only", "yolo-cls", "cloud-only", "cascade", "random", "no-reference"} <= set(states) - not_at_hand
    assert tree_["parts"] == 20
    assert "saec models pull qwen2.5-vl-7b" in found.out
    assert "Published, other hardware and data" in found.out
    markdown = (out / "table.md").read_text()
    assert "| cascade |" in markdown and "85.11" in markdown
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("manifest.json")}
    again = saec(*args, "--baseline", "llava-zero-shot", "--json")
    assert json.loads(again.out)["arms"] == tree_["arms"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("manifest.json")} == stamps


def test_the_table_of_fewer_parts_has_each_label_with_its_share(tmp_path, root, station):
    args = ("bench", "table", root, "-s", station, "-o", tmp_path / "t", "--cloud", "off", "--json")
    tree_ = json.loads(saec(*args, "--parts", 6).out)
    assert (tree_["parts"], tree_["arms"][0]["n"]) == (6, 6)
    assert sum(RunFolder.load(tmp_path / "t" / "arms" / "edge-only").summary["confusion"].values()) == 6
    assert "at least 1" in saec(*args, "--parts", 0).error()
    assert "begun on other parts" in saec(*args, "--parts", 2).error()


def test_without_a_cloud_the_table_is_the_edge_alone(tmp_path, root, bare):
    found = saec("bench", "table", root, "-s", bare, "-o", tmp_path / "t", "--json")
    arms = {arm["arm"]: arm for arm in json.loads(found.out)["arms"]}
    assert [name for name, arm in arms.items() if arm["state"] == "measured"] == ["edge-only"]
    assert "saec models pull loupe" in arms["cascade"]["status"]["arm"]


def test_a_model_without_adapter_is_no_tuned_cloud(tmp_path, root, bare):
    checkpoint = tmp_path / "tiny"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    setting = ("--set", f"mllm.model={checkpoint}")
    args = ("bench", "table", root, "-s", bare, "-o", tmp_path / "t", "--cloud", "mllm", "--json")
    pytest.importorskip("torch")
    line = saec(*args, *setting).error()  # the zero-shot arm is at hand, but there is nothing in the folder
    assert str(checkpoint) in line
    arms = saec("bench", "table", root, "-s", bare, "-o", tmp_path / "t", "--zero-shot", "loupe", "--json", *setting)
    found = {arm["arm"]: arm["status"] for arm in json.loads(arms.out)["arms"]}
    assert "has no adapter" in found["cascade"]["arm"] and "mllm.adapter=DIR" in found["cascade"]["arm"]


def test_an_endpoint_or_service_that_does_not_answer_is_refused_before_anything_runs(tmp_path, root, station):
    args = ("bench", "table", root, "-s", station, "-o", tmp_path / "t")
    assert "does not answer" in saec(*args, "--cloud", "http://127.0.0.1:9").error()
    assert "does not answer" in saec(*args, "--zero-shot", "http://127.0.0.1:9").error()
    nobody = ("--set", "openai.base_url=http://127.0.0.1:9/v1")
    assert "cannot be used" in saec(*args, "--cloud", "openai", *nobody).error()
    assert not (tmp_path / "t").exists()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny random Qwen2.5-VL, and a random adapter for it."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    from tiny_vlms import save_tiny, save_tiny_adapter

    base = save_tiny("qwen2.5-vl", tmp_path_factory.mktemp("models") / "tiny-qwen")
    return base, save_tiny_adapter(base, base.parent / "adapter")


QUICK = ("--set", "mllm.evidence_tokens=16", "--set", "mllm.max_side=56", "--set", "mllm.min_label_mass=0")


def test_a_tiny_model_end_to_end_zero_shot_and_tuned(tmp_path, root, bare, tiny):
    base, adapter = tiny
    model = ("--set", f"mllm.model={base}", "--set", f"mllm.adapter={adapter}", *QUICK)
    found = saec("bench", "table", root, "-s", bare, "-o", tmp_path / "t", "--parts", 6, *model)
    assert found.code == 0, found.err
    arms = {arm["arm"]: arm for arm in json.loads((tmp_path / "t" / "table.json").read_text())["arms"]}
    assert {arm["state"] for arm in arms.values()} <= {"measured", "same as cascade"}
    asked = {name: arm["models"].get("cloud", "") for name, arm in arms.items()}
    assert asked["edge-only"] == ""
    assert asked["zero-shot"].startswith("tiny-qwen+p")
    assert asked["cloud-only"].startswith("tiny-qwen+adapter:")
    said = {
        name: [v.cloud_p_defect for v in RunFolder.load(tmp_path / "t" / "arms" / name).verdicts]
        for name in ("zero-shot", "cloud-only")
    }
    assert all(p is not None for found in said.values() for p in found)
    assert said["zero-shot"] != said["cloud-only"]
    assert "tiny-qwen+adapter:" in found.out
    assert str(base.parent) not in (tmp_path / "t" / "table.json").read_text()


def test_what_the_adapter_that_ships_was_trained_on_is_known_to_the_table(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr("saec.vlm.trained.SHIPPED", tiny[1])
    monkeypatch.setattr(asked, "missing_model", lambda name: None)
    assert asked.tuned("mllm", Settings(), tmp_path).adapter == tiny[1]


def test_what_the_adapter_was_trained_on_cannot_be_evaluated(tmp_path, root, bare, tiny):
    base, adapter = tiny
    own = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    part = root / "bolt" / "test" / "good" / "000.png"
    (own / "trained_on.txt").write_text(f"{sha256_file(part)}  x\n")
    args = (root, "-s", bare, "-o", tmp_path / "t", "--cloud", "mllm", "--set", f"mllm.model={base}")
    for words in (("evaluate",), ("sweep",), ("bench", "table")):
        line = saec(*words, *args, "--set", f"mllm.adapter={own}").error()
        assert "training the adapter" in line and "000.png" in line
    assert not (tmp_path / "t").exists()


def test_a_tiny_model_is_the_zero_shot_baseline_without_its_adapter(tmp_path, root, bare, tiny):
    base, adapter = tiny
    found = saec(
        *("evaluate", root, "-s", bare, "-o", tmp_path / "run", "--baseline", "qwen-zero-shot", "--json"),
        *("--set", f"mllm.model={base}", "--set", f"mllm.adapter={adapter}", *QUICK),
    )
    assert found.code == 0, found.err
    summary = json.loads(found.out)
    assert summary["models"]["cloud"].startswith("tiny-qwen+p")
    assert summary["routing"]["cloud"] + summary["unanswered"] == summary["n"] == 20


def test_a_tiny_llava_answers_in_words_and_each_unusable_answer_is_recorded(tmp_path, root, bare):
    pytest.importorskip("torch")
    from tiny_vlms import save_tiny

    checkpoint = save_tiny("llava", tmp_path / "tiny-llava")
    found = saec(
        *("evaluate", root, "-s", bare, "-o", tmp_path / "run", "--baseline", "llava-zero-shot", "--json"),
        *("--set", f"mllm.model={checkpoint}"),
    )
    assert found.code == 0, found.err
    summary = json.loads(found.out)
    verdicts = RunFolder.load(tmp_path / "run").verdicts
    unusable = [v for v in verdicts if v.where is Where.FALLBACK]
    assert len(unusable) == summary["unanswered"] == summary["routing"]["fallback"]
    assert all("answered neither 0 nor 1: " in v.error for v in unusable)
    assert {v.cloud_p_defect for v in verdicts if v.where is Where.CLOUD} <= {0.0, 1.0}
    right = sum(v.where is Where.CLOUD and v.label is v.truth for v in verdicts)
    assert summary["accuracy"] == right / len(verdicts)
