"""Compiling without a device: ONNX Runtime's optimiser, AI Hub behind a fake client, plans, and rebuilt decoders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import typer
from typer.testing import CliRunner

from saec.cli.app import _Commands
from saec.cli.vlm_compile import compile_
from saec.errors import BadInput, GateFailed
from saec.vlm.compile.hub import QaiHub
from saec.vlm.compile.job import run
from saec.vlm.compile.ort import OrtLocal
from saec.vlm.compile.source import open_source
from saec.vlm.contract.signature import Signature
from saec.vlm.export.decoder import build_decoder
from saec.vlm.export.linear import SidePath
from saec.vlm.export.reread import GraphWeights
from tiny_decoder import TINY, RandomWeights, write_decoder

app = typer.Typer(cls=_Commands, pretty_exceptions_enable=False)
app.command("compile")(compile_)
app.callback()(lambda: None)


class FakeHub:
    """``qai_hub``: keeps what it is given, and answers with a binary or a failure."""

    __version__ = "0.54"

    class Failed(Exception):
        pass

    def __init__(self, status: str = "") -> None:
        self.client = SimpleNamespace(UserError=self.Failed)
        self.status = SimpleNamespace(success=not status, message=status)
        self.asked: dict[str, Any] = {}

    def Device(self, name: str) -> str:
        return f"device {name}"

    def submit_compile_job(self, model: str, **asked: Any) -> SimpleNamespace:
        if asked["device"].endswith("none"):
            raise self.Failed("No devices match")
        self.asked = asked | {"weights": onnx.load(model, load_external_data=False).graph.initializer}
        made = SimpleNamespace(download=lambda file: Path(file).write_bytes(b"binary"))
        return SimpleNamespace(job_id="j5q", wait=lambda: self.status, get_target_model=lambda: made)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setitem(sys.modules, "qai_hub", fake)
    (tmp_path / "client.ini").write_text("[api]\n")
    monkeypatch.setenv("QAIHUB_CLIENT_INI", str(tmp_path / "client.ini"))
    return fake


def test_ai_hub_gets_one_file_and_its_binary_comes_back(tmp_path: Path, hub: FakeHub) -> None:
    write_decoder(tmp_path / "decoder.onnx", n=None)

    folder, record = run(QaiHub("Snapdragon X"), open_source(tmp_path / "decoder.onnx"), tmp_path / "out" / "hub")

    assert (folder / "model.bin").read_bytes() == b"binary"
    assert {file.name for file in folder.iterdir()} == {"model.bin", "metadata.json"}
    assert hub.asked["device"] == "device Snapdragon X"
    assert "--target_runtime qnn_context_binary" in hub.asked["options"]
    assert not any(weight.external_data for weight in hub.asked["weights"])
    assert record.result.tools == {"qai-hub": "0.54", "job": "j5q"}
    assert record.result.compared == {}


@pytest.mark.parametrize(("device", "status"), [("none", ""), ("Snapdragon X", "out of memory")])
def test_a_job_that_ai_hub_refuses_or_fails_is_a_failed_gate(
    tmp_path: Path, hub: FakeHub, device: str, status: str
) -> None:
    write_decoder(tmp_path / "decoder.onnx", "float16")
    hub.status = SimpleNamespace(success=not status, message=status)

    with pytest.raises(GateFailed, match=status or "No devices match"):
        run(QaiHub(device), open_source(tmp_path / "decoder.onnx"), tmp_path / "out" / "hub")

    assert not list((tmp_path / "out").iterdir())


def test_ai_hub_without_client_or_token_says_what_is_missing(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_decoder(tmp_path / "decoder.onnx", "float16")
    source = open_source(tmp_path / "decoder.onnx")
    (tmp_path / "client.ini").unlink()

    with pytest.raises(BadInput, match=r"no token.*configure"):
        run(QaiHub("Snapdragon X"), source, tmp_path / "out" / "hub")
    monkeypatch.setitem(sys.modules, "qai_hub", None)
    with pytest.raises(BadInput, match=r"client is not installed.*dry-run"):
        run(QaiHub("Snapdragon X"), source, tmp_path / "out" / "hub")


def test_onnx_runtimes_optimised_model_is_smaller_and_the_same(tmp_path: Path) -> None:
    signature = write_decoder(tmp_path / "decoder.onnx", "int8", n=None)

    folder, record = run(OrtLocal(), open_source(tmp_path / "decoder.onnx"), tmp_path / "cpu")

    assert {file.name for file in folder.iterdir()} == {"model.onnx", "model.bin", "metadata.json"}
    assert list(record.result.placement) == ["CPUExecutionProvider"]
    assert record.result.compared["logits"].max_abs < 1e-4
    loaded = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in loaded.get_inputs()] == [spec.name for spec in signature.inputs]


@pytest.mark.parametrize("provider", ["qnn-local", "qai-hub", "ort"])
def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, provider: str) -> None:
    write_decoder(tmp_path / "decoder.onnx", n=None)
    before = sorted(tmp_path.iterdir())

    call = ["compile", str(tmp_path / "decoder.onnx"), "-o", str(tmp_path / "x"), "--provider", provider, "--dry-run"]
    found = CliRunner().invoke(app, [*call, "--ar", "8"])

    plan = json.loads(found.output)
    assert found.exit_code == 0
    assert set(plan["files"]) == {"decoder.onnx", "decoder.bin"}
    assert plan["rebuilt"] == (provider != "ort")
    assert plan["signature"]["n"] == (None if provider == "ort" else 8)
    assert plan["inputs"][0]["shape"] == [1, "n" if provider == "ort" else 8, TINY.hidden_size]
    assert sorted(tmp_path.iterdir()) == before


def test_two_compilations_of_one_prefix_do_not_meet(tmp_path: Path) -> None:
    write_decoder(tmp_path / "decoder.onnx")
    source = open_source(tmp_path / "decoder.onnx")

    folders = {run(OrtLocal(), source, tmp_path / "same")[0] for _ in range(2)}

    assert len(folders) == 2
    assert all(folder.is_dir() for folder in folders)


@pytest.mark.parametrize(
    ("content", "said"), [(None, "readable|cannot be read"), (b"no graph", "not a(n| readable) ONNX")]
)
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "decoder.onnx"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(BadInput, match=said):
        open_source(file)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    write_decoder(tmp_path / "decoder.onnx")
    (tmp_path / "decoder.bin").unlink()

    with pytest.raises(BadInput, match=r"weights are missing: .*decoder\.bin"):
        open_source(tmp_path / "decoder.onnx")


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_read_back_from_its_graph_gives_the_same_graph(tmp_path: Path, tied: bool) -> None:
    shape = TINY.model_copy(update={"tied": tied, "o_bias": True})
    signature = write_decoder(tmp_path / "decoder.onnx", shape=shape, n=None)

    again = build_decoder(signature, GraphWeights(tmp_path / "decoder.onnx", shape), "float32")

    one, other = onnx.load(tmp_path / "decoder.onnx").graph, again.model().graph
    assert one.node == other.node
    for left, right in zip(one.initializer, other.initializer, strict=True):
        assert np.array_equal(onnx.numpy_helper.to_array(left), onnx.numpy_helper.to_array(right)), left.name


def test_an_adapter_beside_its_layer_is_merged_when_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(size, dtype=np.float32) for size in ((TINY.hidden_size, 4), (4, 32)))
    name = "model.layers.1.self_attn.k_proj.weight"
    signature = Signature(shape=TINY, cache=31, n=None)
    weights = RandomWeights(TINY, sides={name: SidePath(a, b)})
    build_decoder(signature, weights, "float32").save(tmp_path / "decoder.onnx")

    back = GraphWeights(tmp_path / "decoder.onnx", TINY)

    assert np.allclose(back.array(name), weights.array(name) + (a @ b).T, atol=1e-5)
    other = "model.layers.1.self_attn.v_proj.weight"
    assert np.allclose(back.array(other), weights.array(other), atol=1e-6)


def test_rounded_weights_are_not_read_back(tmp_path: Path) -> None:
    write_decoder(tmp_path / "decoder.onnx", "int8")

    with pytest.raises(BadInput, match="float32"):
        GraphWeights(tmp_path / "decoder.onnx", TINY)
