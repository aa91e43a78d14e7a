"""QNN context binaries made on this machine, by the HTP compiler in the x86-64 Linux wheel of ``onnxruntime-qnn``.

The compiler runs in a process of its own (:mod:`saec.vlm.compile.qnn_child`): it takes gigabytes, and what ends it,
an abort in its own code or the kernel for want of memory, must not end this program.
"""

from __future__ import annotations

import importlib.util
import platform
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from saec.errors import BadInput, GateFailed
from saec.vlm.compile.record import LOG, Compiled, Plan, ProviderName, Target
from saec.vlm.compile.source import Source
from saec.vlm.contract.signature import Signature, TensorSpec

SOCS: Mapping[int, Target] = {
    soc: Target(device=device, soc=soc, arch=arch)
    for soc, arch, device in (
        (43, 73, "Snapdragon 8 Gen 2 (SM8550)"),
        (57, 75, "Snapdragon 8 Gen 3 (SM8650)"),
        (69, 79, "Snapdragon 8 Elite (SM8750)"),
        (87, 81, "Snapdragon 8 Elite Gen 5 (SM8850)"),
    )
}
"""SoCs by the id that QNN gives them (``QnnTypes.h``), with the architecture of their Hexagon processor."""

GLIBC = (2, 35)
"""Oldest C library that the wheel's compiler runs on."""

REQUEST, RESULT = "request.json", "result.json"


class Request(BaseModel):
    """What the compiling process is told: the graph, and the provider's options."""

    model_config = ConfigDict(frozen=True)

    graph: Path
    options: Mapping[str, str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    signature: Signature | None


@dataclass(frozen=True, slots=True)
class QnnLocal:
    """Compiles for one SoC; see :class:`~saec.vlm.compile.job.Provider`."""

    target: Target
    new_tokens: int = 1

    name: ProviderName = "qnn-local"

    @staticmethod
    def known(soc: int) -> Target:
        """Return a SoC of the table.

        Raises:
            BadInput: it is not in there.
        """
        if soc not in SOCS:
            known = ", ".join(f"{each.soc} {each.device}" for each in SOCS.values())
            raise BadInput("unknown SoC", where=soc, fix=f"known: {known}")
        return SOCS[soc]

    def plan(self, source: Source) -> Plan:
        """Return the plan; the graph gets fixed dimensions and float16."""
        fixed = source.fixed(self.new_tokens)
        options = {"backend_type": "htp", "soc_model": str(self.target.soc), "htp_arch": str(self.target.arch)}
        return Plan(
            provider=self.name,
            target=self.target,
            files=source.files(),
            rebuilt=fixed.rebuilt,
            signature=fixed.signature,
            inputs=fixed.inputs,
            outputs=fixed.outputs,
            # Inputs and outputs stay floats where the graph is quantised: the runtime's cache is in floats.
            options={**options, "offload_graph_io_quantization": "0"},
        )

    def compile(self, source: Source, folder: Path) -> Compiled:
        """Write ``model.bin``, ``model_ctx.onnx`` (what ONNX Runtime loads on the device) and ``compile.log``.

        Raises:
            GateFailed: no compiler for this machine, or it failed: refused a node, crashed, ran out of memory.
        """
        _require_compiler()
        plan = self.plan(source)
        graph = source.fixed(self.new_tokens).graph(folder)
        request = Request(
            graph=graph, options=plan.options, inputs=plan.inputs, outputs=plan.outputs, signature=plan.signature
        )
        (folder / REQUEST).write_text(request.model_dump_json(), encoding="utf-8")
        _run([sys.executable, "-m", "saec.vlm.compile.qnn_child", str(folder)], folder / LOG)
        result = Compiled.model_validate_json((folder / RESULT).read_bytes())
        spent = [folder / REQUEST, folder / RESULT]
        if plan.rebuilt:
            spent += [graph, graph.with_suffix(".bin")]
        for file in spent:
            file.unlink()
        return result


def _require_compiler() -> None:
    machine = f"{platform.system()} {platform.machine()}"
    if machine != "Linux x86_64":
        raise GateFailed(f"QNN's compiler runs on Linux x86_64, this is {machine}; use --provider qai-hub")
    library, version = platform.libc_ver()
    if library == "glibc" and tuple(int(part) for part in version.split(".")[:2]) < GLIBC:
        raise GateFailed(f"QNN's compiler needs glibc {GLIBC[0]}.{GLIBC[1]}, here is {version}; use --provider qai-hub")
    if importlib.util.find_spec("onnxruntime_qnn") is None:
        raise GateFailed("QNN's compiler is not installed: pip install 'saec[npu]'")


def _run(command: list[str], log: Path) -> None:
    """Run a command to its end with its output in a log; it does not outlive us.

    Raises:
        GateFailed: it ended with an error or by a signal; the message ends with the log's last line.
    """
    with log.open("wb") as output:
        child = subprocess.Popen(  # noqa: S603 - our own interpreter and module, no shell
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            code = child.wait()
        except BaseException:  # Ctrl-C
            child.kill()
            child.wait()
            raise
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
        ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else "failed"
        memory = ", perhaps out of memory" if code == -signal.SIGKILL else ""
        raise GateFailed(f"QNN's compiler {ended}{memory}: {lines[-1][:300]}")
