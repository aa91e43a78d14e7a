"""What a device answers after an update is exactly what the model answers that the cloud validated."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("peft", reason="the cloud extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

from cloud_fakes import query
from saec.cloud.onnx_vlm import OnnxVlmBackend
from saec.config import PromptSettings, Settings
from saec.fleet.slots import Slots, current_folder
from saec.learn.apply import apply_update
from saec.learn.delta import compress
from saec.learn.state import State, adapter_state, write_adapter
from saec.learn.update import ADAPTER, Update, encode_update
from saec.vlm.decide import _next_token_logits
from saec.vlm.edge.vlm import OnnxVlm
from saec.vlm.export.bundle import export_bundle
from saec.vlm.load import load_vlm
from saec.vlm.prompt import Ask, build_question
from saec.vlm.trained import as_trained
from tiny_vlms import save_tiny, save_tiny_adapter

KEY = b"token"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SAEC_MODELS", str(tmp_path / "cache"))
    save_tiny("smolvlm", tmp_path / "smolvlm")
    save_tiny_adapter(tmp_path / "smolvlm", tmp_path / "device")
    return tmp_path


def settings(home: Path, adapter: Path) -> Settings:
    section = {"model": str(home / "smolvlm"), "adapter": adapter, "max_side": 56, "precision": "float32", "threads": 1}
    return Settings.model_validate({"mllm": {**section, "min_label_mass": 0, "tau": 1.0, "dtype": "float32"}})


def validated(home: Path) -> tuple[bytes, Path]:
    """An update to a taught adapter, and the folder of the decoded one, on which the cloud validates."""
    base = adapter_state(home / "device")
    rng = np.random.default_rng(0)
    moved = {n: (v + rng.normal(size=v.shape) * 0.3).astype(v.dtype) for n, v in sorted(base.tensors.items())}
    delta = compress(base, State(moved, base.document), keep=0.3, bits=4)
    new = delta.apply(base)
    write_adapter(new, home / "cloud")
    return encode_update(Update(ADAPTER, base.sha256, new.sha256, 1, 0, delta), KEY), home / "cloud"


def onnx_p(backend: OnnxVlmBackend) -> list[float]:
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (56, 56, 3), np.uint8) for _ in range(3)]
    asked = [query(str(n), image=image, original_size=(56, 56)) for n, image in enumerate(images)]
    return [answer.p_defect for answer in backend.judge(asked)]


def logits(home: Path, adapter: Path, runtime: str) -> np.ndarray:
    """All logits after one question."""
    image = np.random.default_rng(2).integers(0, 256, (56, 56, 3), np.uint8)
    question = build_question(query("0", image=image, original_size=(56, 56)), Ask.LABEL, PromptSettings(max_side=56))
    wanted = as_trained(settings(home, adapter).mllm)
    if runtime == "onnx":
        bundle = Path(tempfile.mkdtemp(dir=home)) / "bundle"  # each exported on its own: nothing is found in a cache
        export_bundle(wanted.model, bundle, precision="float32", adapter=wanted.adapter)
        vlm = OnnxVlm.load(bundle, threads=1)
        ids = vlm._prompts.ids(question)
        return vlm._graphs.feed(vlm._graphs.open(), ids, lambda: vlm._prompts.pictures(question))
    vlm = load_vlm(wanted)
    return _next_token_logits(vlm, [question], None).numpy()


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_logits_after_applying_equal_those_of_the_validated_model_exactly(home, runtime):
    data, cloud = validated(home)
    before = logits(home, home / "device", runtime)
    apply_update(home / "device", data, key=KEY, most=10_000_000)
    after = logits(home, home / "device", runtime)
    assert np.array_equal(after, logits(home, cloud, runtime))
    assert not np.array_equal(after, before)
    Slots(home / "device").back()
    assert np.array_equal(logits(home, home / "device", runtime), before)


def test_a_model_at_work_takes_the_new_adapter_up_and_gives_it_back(home):
    data, cloud = validated(home)
    backend = OnnxVlmBackend(settings(home, home / "device"))
    backend.warm_up()
    before = (backend.model_id, onnx_p(backend))
    apply_update(home / "device", data, key=KEY, most=10_000_000)
    backend.swap_adapter(home / "device")
    after = (backend.model_id, onnx_p(backend))
    backend.swap_adapter(cloud)
    assert after == (backend.model_id, onnx_p(backend)) != before
    assert current_folder(home / "device") != home / "device"
    Slots(home / "device").back()
    backend.swap_adapter(home / "device")
    assert (backend.model_id, onnx_p(backend)) == before
    backend.close()
