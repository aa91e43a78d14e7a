"""QNN's compiler on this machine: real compilations where its wheel is installed, and one clear line where not."""

from __future__ import annotations

import importlib.util
import platform
import signal
import sys
import threading
import time
from pathlib import Path

import onnx
import pytest

from saec.errors import BadInput, GateFailed
from saec.vlm.compile import qnn
from saec.vlm.compile.job import run
from saec.vlm.compile.qnn import QnnLocal
from saec.vlm.compile.record import Metadata
from saec.vlm.compile.source import open_source
from saec.vlm.contract.signature import Signature
from tiny_decoder import FASTVLM, TINY, Outliers, write_decoder

compiler = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_qnn") is None or platform.machine() != "x86_64",
    reason="onnxruntime-qnn is not installed",
)
SM8650 = QnnLocal.known(57)


@compiler
def test_a_decoder_becomes_one_binary_whose_outputs_are_the_cpus(tmp_path: Path) -> None:
    signature = write_decoder(tmp_path / "decoder.onnx", "float16")

    folder, record = run(QnnLocal(SM8650), open_source(tmp_path / "decoder.onnx"), tmp_path / "tiny")

    assert folder.name == f"tiny_{record.job}"
    assert Metadata.model_validate_json((folder / "metadata.json").read_bytes()) == record
    assert {file.name for file in folder.iterdir()} == {*record.files, "metadata.json"}
    assert set(record.files) == {"model.bin", "model_ctx.onnx", "compile.log"}
    assert list(record.result.placement) == ["QNNExecutionProvider"]
    assert record.result.placement["QNNExecutionProvider"] > 50
    assert list(record.result.compared) == [spec.name for spec in signature.outputs]
    for gap in record.result.compared.values():
        assert gap.max_abs <= 0.01 * max(gap.largest, 1)
        assert gap.largest > 0.01
    assert record.plan.signature == signature
    (node,) = onnx.load(folder / "model_ctx.onnx").graph.node
    assert (node.op_type, record.size) == ("EPContext", (folder / "model.bin").stat().st_size)


@compiler
def test_a_free_float32_graph_is_built_anew_for_the_device(tmp_path: Path) -> None:
    stored = write_decoder(tmp_path / "decoder.onnx", n=None)

    folder, record = run(QnnLocal(SM8650, 4), open_source(tmp_path / "decoder.onnx"), tmp_path / "free")

    signature = record.plan.signature
    assert record.plan.rebuilt
    assert signature == stored.model_copy(update={"n": 4, "cache": stored.context - 4, "dtype": "float16"})
    assert not list(folder.glob("decoder.*"))
    assert record.result.compared["logits"].max_abs < 0.01


@compiler
@pytest.mark.parametrize("n", [1, 8])
def test_outliers_of_the_first_token_survive_half_precision(tmp_path: Path, n: int) -> None:
    shape = TINY.model_copy(update={"o_bias": True})
    write_decoder(tmp_path / "decoder.onnx", "float16", shape, Outliers(shape), n=n)

    _, record = run(QnnLocal(SM8650), open_source(tmp_path / "decoder.onnx"), tmp_path / "outliers")

    logits = record.result.compared["logits"]
    assert logits.max_abs < 0.02 * logits.largest


@compiler
def test_nodes_that_the_compiler_refuses_are_named(tmp_path: Path) -> None:
    nodes = [
        onnx.helper.make_node("Relu", ["x"], ["a"]),
        onnx.helper.make_node("Det", ["a"], ["y"]),
    ]
    shapes = {"x": [1, 4, 4], "y": [1]}
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shapes[name]) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "odd", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "odd.onnx")

    with pytest.raises(GateFailed, match="1 Det"):
        run(QnnLocal(SM8650), open_source(tmp_path / "odd.onnx"), tmp_path / "odd")

    assert [path.suffix for path in tmp_path.glob("odd_*")] == [".log"]


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("print('no memory for that tensor'); sys.exit(3)", "failed: no memory for that tensor"),
        ("print('prepare', flush=True); os.abort()", "was ended by SIGABRT: prepare"),
        ("os.kill(os.getpid(), 9)", "was ended by SIGKILL, perhaps out of memory: it said nothing"),
    ],
)
def test_a_crash_of_the_compiler_is_one_line_with_its_log_kept(tmp_path: Path, end: str, said: str) -> None:
    log = tmp_path / "compile.log"

    with pytest.raises(GateFailed) as error:
        qnn._run([sys.executable, "-c", f"import os, sys; {end}"], log)

    assert str(error.value) == f"QNN's compiler {said}"
    assert log.is_file()


@pytest.mark.timeout(20)
def test_ctrl_c_ends_the_compiler(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    script = (
        f"import time, pathlib\nwhile True: pathlib.Path({str(alive)!r}).write_text(str(time.time())); time.sleep(.02)"
    )

    def interrupt() -> None:
        while not alive.exists():
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    pressing = threading.Thread(target=interrupt)
    pressing.start()
    with pytest.raises(KeyboardInterrupt):
        qnn._run([sys.executable, "-c", script], tmp_path / "log")
    pressing.join()

    last = alive.read_text()
    time.sleep(0.1)
    assert alive.read_text() == last


@pytest.mark.parametrize(
    ("patched", "value", "said"),
    [
        ("platform.machine", lambda: "arm64", "this is Linux arm64"),
        ("platform.libc_ver", lambda: ("glibc", "2.31"), "needs glibc 2.35, here is 2.31"),
        ("importlib.util.find_spec", lambda name: None, r"pip install 'saec\[npu\]'"),
    ],
)
def test_without_a_compiler_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patched: str, value: object, said: str
) -> None:
    write_decoder(tmp_path / "decoder.onnx", "float16")
    source = open_source(tmp_path / "decoder.onnx")
    monkeypatch.setattr(f"saec.vlm.compile.qnn.{patched}", value)

    with pytest.raises(GateFailed, match=said):
        run(QnnLocal(SM8650), source, tmp_path / "out" / "tiny")

    assert not list((tmp_path / "out").iterdir())


def test_an_unknown_soc_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(BadInput, match="57 Snapdragon 8 Gen 3"):
        QnnLocal.known(1)


@compiler
@pytest.mark.slow
def test_fastvlms_decoder_compiles_without_the_cpu(tmp_path: Path) -> None:
    write_decoder(tmp_path / "decoder.onnx", "float16", FASTVLM, cache=1023)

    _, record = run(QnnLocal(SM8650), open_source(tmp_path / "decoder.onnx"), tmp_path / "fastvlm")

    assert list(record.result.placement) == ["QNNExecutionProvider"]
    assert record.size > 900e6
    assert record.result.compared["logits"].max_abs < 0.02 * record.result.compared["logits"].largest


@compiler
@pytest.mark.slow
def test_loupes_decoder_compiles_without_the_cpu(tmp_path: Path) -> None:
    from saec.vlm.export.decoder import METADATA, build_decoder
    from saec.vlm.export.weights import open_decoder
    from saec.vlm.registry import resolve

    try:
        files = resolve("loupe").files
    except BadInput:
        pytest.skip("Loupe is not pulled")
    shape, weights = open_decoder(next(path for name, path in files.items() if name.endswith(".gguf")))
    signature = Signature(shape=shape, cache=1023, n=1, dtype="float16")
    graph = build_decoder(signature, weights, "float16")
    graph.save(tmp_path / "decoder.onnx", metadata={METADATA: signature.model_dump_json()})

    _, record = run(QnnLocal(SM8650), open_source(tmp_path / "decoder.onnx"), tmp_path / "loupe")

    assert list(record.result.placement) == ["QNNExecutionProvider"]
    assert record.result.compared["logits"].max_abs < 0.01 * record.result.compared["logits"].largest
