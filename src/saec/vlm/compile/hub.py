"""QNN context binaries made by Qualcomm AI Hub, through its client (``qai-hub``) and the user's own token."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import onnx

from saec.errors import BadInput, GateFailed
from saec.vlm.compile.record import MODEL, Compiled, Plan, ProviderName, Target
from saec.vlm.compile.source import Source
from saec.vlm.export.graph import EMBEDDED_LIMIT

OPTIONS = "--target_runtime qnn_context_binary"

CLIENT_INI = "QAIHUB_CLIENT_INI"
"""Environment variable with the place of the client's configuration, which holds the token."""


@dataclass(frozen=True, slots=True)
class QaiHub:
    """Uploads the graph, weights inside, and downloads the binary; see :class:`~saec.vlm.compile.job.Provider`."""

    device: str
    new_tokens: int = 1

    name: ProviderName = "qai-hub"

    def plan(self, source: Source) -> Plan:
        """Return the plan: what would be uploaded, and for which device."""
        fixed = source.fixed(self.new_tokens)
        return Plan(
            provider=self.name,
            target=Target(device=self.device),
            files=source.files(),
            rebuilt=fixed.rebuilt,
            signature=fixed.signature,
            inputs=fixed.inputs,
            outputs=fixed.outputs,
            options={"options": OPTIONS},
        )

    def compile(self, source: Source, folder: Path) -> Compiled:
        """Write ``model.bin``. It is not run: there is no device here.

        Raises:
            BadInput: no client, no token, or a graph of more than 2 GB.
            GateFailed: the service refused the job, or the job failed; the message is the service's.
        """
        hub = _client()
        graph = source.fixed(self.new_tokens).graph(folder)
        upload = _one_file(graph, folder / "upload.onnx")
        begun = time.perf_counter()
        try:
            job = hub.submit_compile_job(
                model=str(upload), device=hub.Device(self.device), name=source.file.parent.name, options=OPTIONS
            )
            status = job.wait()
            if not status.success:
                raise GateFailed(f"AI Hub's job {job.job_id} failed: {status.message}")
            job.get_target_model().download(str(folder / MODEL))
        except (hub.client.UserError, OSError) as error:
            raise GateFailed(f"AI Hub refused the job: {' '.join(str(error).split())[:300]}") from None
        finally:
            for file in {upload, *((graph, graph.with_suffix(".bin")) if graph.parent == folder else ())}:
                file.unlink(missing_ok=True)
        tools = {"qai-hub": str(hub.__version__), "job": str(job.job_id)}
        return Compiled(seconds=time.perf_counter() - begun, tools=tools)


def _client() -> Any:
    try:
        hub = import_module("qai_hub")
    except ModuleNotFoundError:
        raise BadInput("AI Hub's client is not installed", fix="pip install qai-hub, or pass --dry-run") from None
    configured = Path(os.environ.get(CLIENT_INI) or "~/.qai_hub/client.ini").expanduser()
    if not configured.is_file():
        raise BadInput("AI Hub's client has no token", where=configured, fix="qai-hub configure --api_token TOKEN")
    return hub


def _one_file(graph: Path, to: Path) -> Path:
    model = onnx.load(graph)
    if model.ByteSize() >= EMBEDDED_LIMIT:
        raise BadInput("a graph of more than 2 GB cannot be uploaded in one file", where=graph)
    onnx.save(model, to)
    return to
